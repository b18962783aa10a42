"""From a conversation to an answer: prepare prompts and pictures, generate, some together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.images import decode
from train.ask.load import Loaded
from vl2.generate import generate
from vl2.prompt import Message, render
from vl2.tiles import Resolution, cut_tiles, tile_grid
from vl2.tokenizer import Tokenizer

# Prompts that are answered together: bounds the memory of their caches.
BATCH_TOKENS = 4096


def prepare(
    messages: Sequence[Message], images: Sequence[str | Path], tokenizer: Tokenizer, candidates: Sequence[Resolution]
) -> dict[str, np.ndarray]:
    """A conversation that waits for an answer, as `generate` takes it.

    Args:
        messages: the last one is the user's; one <image> in the users' turns for each image.
        images: files, in the order of the placeholders.
        tokenizer: of the model.
        candidates: resolutions (width, height) in pixels.
    """
    opened = [decode(image) for image in images]
    grids = [tile_grid(image.size, len(opened), candidates) for image in opened]
    prompt = {"input_ids": render(messages, grids, tokenizer, for_generation=True).input_ids}
    if opened:
        prompt["tiles"] = np.concatenate([cut_tiles(image, grid) for image, grid in zip(opened, grids, strict=True)])
        prompt["grids"] = np.array(grids, np.int64)
    return prompt


def answer_all(
    loaded: Loaded,
    questions: Sequence[tuple[Sequence[Message], Sequence[Path]]],
    *,
    max_new_tokens: int,
) -> Iterator[str]:
    """Greedy answers to many questions, some of them computed together, in order.

    Args:
        loaded: the model.
        questions: (messages, images) each.
        max_new_tokens: most tokens of an answer.
    """
    batch: list[dict[str, np.ndarray]] = []

    def flush() -> Iterator[str]:
        ids = generate(loaded.model, batch, eos_id=loaded.tokenizer.eos_id, max_new_tokens=max_new_tokens)
        yield from (loaded.tokenizer.decode(answer) for answer in ids)
        batch.clear()

    for messages, images in questions:
        prompt = prepare(messages, images, loaded.tokenizer, loaded.candidates)
        if batch and sum(len(p["input_ids"]) for p in [*batch, prompt]) > BATCH_TOKENS:
            yield from flush()
        batch.append(prompt)
    if batch:
        yield from flush()
