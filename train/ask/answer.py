"""From a conversation to an answer: prepare prompts and pictures, generate, some together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.images.ref import ImageRef
from train.ask.load import Loaded
from vl2.errors import UserError
from vl2.generate import generate
from vl2.prompt import Message, render
from vl2.tiles import Grid, cut_tiles, tile_grid
from vl2.tokenizer import Tokenizer

# Prompts that are answered together: tokens of the prompts, which enter the cache at once, and of the cache with room
# for the answers (about 1 GB for Tiny, the others less).
BATCH_TOKENS = 4096
CACHE_TOKENS = 4 * BATCH_TOKENS
_EXPECTED = (
    "expected fewer than the {} that the model was made for (max_position_embeddings in its config.json); shorten it"
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said."""

    text: str
    cut: bool  # it did not come to its end within the tokens it was given


def prepare(messages: Sequence[Message], images: Sequence[ImageRef], loaded: Loaded) -> dict[str, np.ndarray]:
    """A conversation that waits for an answer, as `generate` takes it.

    Args:
        messages: the last one is the user's; one <image> in the users' turns for each image.
        images: in the order of the placeholders.
        loaded: the model, with its tokenizer, resolutions and way to read pictures.
    """
    shown = _from_cache(images, loaded) if images and loaded.vision_cache else None
    if shown is None:
        grids, tiles = [], []
        for image in images:
            grid, cut = _cut(image, len(images), loaded)
            grids.append(grid)
            tiles.append(cut)
        shown = {"tiles": np.concatenate(tiles), "grids": np.array(grids, np.int64)} if images else {}
    grids = [(columns, rows) for columns, rows in shown["grids"].tolist()] if images else []
    return {"input_ids": render(messages, grids, loaded.tokenizer, for_generation=True).input_ids, **shown}


def _cut(image: ImageRef, num_images: int, loaded: Loaded) -> tuple[Grid, np.ndarray]:
    """The tiles of a picture; one at a time: a large picture takes far more memory than its tiles."""
    opened = loaded.images.decode(image)
    grid = tile_grid(opened.size, num_images, loaded.candidates)
    return grid, cut_tiles(opened, grid)


def _from_cache(images: Sequence[ImageRef], loaded: Loaded) -> dict[str, np.ndarray] | None:
    """What the vision cache has of some pictures, and takes of those that are new; None: one is there no more."""
    cache = loaded.vision_cache
    assert cache is not None
    grids = [tile_grid(loaded.images.size(image), len(images), loaded.candidates) for image in images]
    names = [cache.name(image, grid) for image, grid in zip(images, grids, strict=True)]
    kept = [cache.holds(name, grid) for name, grid in zip(names, grids, strict=True)]
    tiles = [_cut(image, len(images), loaded)[1] for image, here in zip(images, kept, strict=True) if not here]
    seen = cache.gather(names, kept, grids, np.concatenate(tiles) if tiles else None, loaded.model.seen)
    return None if seen is None else {"seen": seen, "grids": np.array(grids, np.int64)}


def prompt_length(messages: Sequence[Message], images: Sequence[ImageRef], loaded: Loaded) -> int:
    """Count the tokens of what `prepare` makes; of the pictures the headers are read.

    Raises:
        ImageError: a picture that cannot be opened.
    """
    grids = [tile_grid(loaded.images.size(image), len(images), loaded.candidates) for image in images]
    return len(render(messages, grids, loaded.tokenizer, for_generation=True).input_ids)


def check_text(messages: Sequence[Message], tokenizer: Tokenizer, context: int) -> None:
    """Refuse a conversation that cannot fit into the model's context, before it is encoded, which may take all memory.

    Args:
        messages: the conversation.
        tokenizer: of the model.
        context: positions that the model was made for, tokens.
    """
    least = sum(tokenizer.least_tokens(message.content.strip()) for message in messages)
    if least >= context:
        raise UserError(f"prompt of at least {least} tokens: {_EXPECTED.format(context)}")


def answer_limit(prompt_tokens: int, max_new_tokens: int, context: int) -> int:
    """Count the tokens that an answer may have: as many as asked for, as far as the context has room after the prompt.

    Raises:
        UserError: the prompt leaves no room at all.

    Example: after a prompt of 4,000 tokens in a context of 4,096, max_new_tokens=512 is 96.
    """
    if prompt_tokens >= context:
        raise UserError(f"prompt of {prompt_tokens} tokens: {_EXPECTED.format(context)}")
    return min(max_new_tokens, context - prompt_tokens)


def fits_together(lengths: Sequence[int], limits: Sequence[int]) -> bool:
    """Whether prompts are answered at once.

    Args:
        lengths: tokens of each.
        limits: most tokens of each answer.
    """
    return sum(lengths) <= BATCH_TOKENS and sum(lengths) + sum(limits) <= CACHE_TOKENS


def answered_together(lengths: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
    """Which prompts `answer_all` computes together, by their numbers.

    Args:
        lengths, limits: see `fits_together`; in the order of the prompts.
    """
    groups: list[list[int]] = []
    for i in range(len(lengths)):
        last = [*groups[-1], i] if groups else []
        if last and fits_together([lengths[j] for j in last], [limits[j] for j in last]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def answer_all(loaded: Loaded, prompts: Iterable[Mapping[str, np.ndarray]], *, max_new_tokens: int) -> Iterator[Answer]:
    """Greedy answers to many prompts, some of them computed together, in order.

    Args:
        loaded: the model.
        prompts: of `prepare`.
        max_new_tokens: most tokens of an answer; fewer where the model's context has less room.
    """
    batch: list[Mapping[str, np.ndarray]] = []
    limits: list[int] = []
    context = loaded.model.config.language.max_position_embeddings

    def flush() -> Iterator[Answer]:
        ids = generate(loaded.model, batch, eos_id=loaded.tokenizer.eos_id, max_new_tokens=limits)
        for answer, limit in zip(ids, limits, strict=True):
            yield Answer(text=loaded.tokenizer.decode(answer), cut=len(answer) == limit)
        batch.clear()
        limits.clear()

    for prompt in prompts:
        length = len(prompt["input_ids"])
        limit = answer_limit(length, max_new_tokens, context)
        lengths = [*(len(other["input_ids"]) for other in batch), length]
        if batch and not fits_together(lengths, [*limits, limit]):
            yield from flush()
        batch.append(prompt)
        limits.append(limit)
    if batch:
        yield from flush()
