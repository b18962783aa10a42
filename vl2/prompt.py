"""The chat template: a conversation and its image grids become token ids and labels, for training and inference.

Ids and labels are made together from the same spans; nothing searches for `<image>` among ids afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from vl2.errors import UserError
from vl2.tiles import Grid, num_image_tokens
from vl2.tokenizer import IMAGE_TOKEN, Tokenizer

IMAGE_PLACEHOLDER = IMAGE_TOKEN
IGNORE = -100  # label of a position whose next token is not supervised

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks: the system (first turn only), the user, the assistant."""
    content: str
    """What is said; in a user's turn each `<image>` stands for one image."""
    plain: bool = False
    """Encode special tokens in the content, except grounding tokens, as ordinary text."""
    learn: bool = True
    """Whether an answer is supervised; of the other roles nothing ever is."""


class Piece(NamedTuple):
    """A stretch of a conversation that becomes ids on its own: a text, one token of the template, or an image."""

    kind: Literal["text", "bos", "eos", "user", "assistant", "image"]
    text: str = ""
    """What is encoded, of kind "text"."""
    plain: bool = False
    """As in `Message`."""
    supervised: bool = False
    """Whether its ids are learned."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as the model reads it."""

    input_ids: np.ndarray
    """int64 [T]; an image is `num_image_tokens` times the image id."""
    labels: np.ndarray
    """int64 [T], already shifted: labels[t] = input_ids[t+1] where that token is supervised, else IGNORE."""


def render(
    messages: Sequence[Message],
    grids: Sequence[Grid],
    tokenizer: Tokenizer,
    *,
    for_generation: bool = False,
) -> Rendered:
    """Turn a conversation into ids and labels; answers with `learn` are supervised, EOS included.

    Args:
        messages: an optional system turn first, then user and assistant turns.
        grids: (columns, rows) of local tiles of each image, in the order of the placeholders.
        tokenizer: gives the ids.
        for_generation: the last turn is a user's, and the prompt ends where the answer begins, without EOS.

    Raises:
        UserError: a system turn that is not first, a placeholder outside user turns, a number of placeholders
            that is not the number of grids, or (for_generation) a last turn that is not a user's.

    Example: user "Hi", assistant "Yes"

        input_ids   BOS  <|User|>  ": Hi\\n\\n"  <|Assistant|>  ":"   "Yes"  EOS
        labels       -      -          -              -        "Yes"   EOS    -

    Source: `format_messages_v2`, deepseek_vl2/models/processing_deepseek_vl_v2.py, with mask_prompt=True.
    """
    if for_generation and (not messages or messages[-1].role != "user"):
        found = messages[-1].role if messages else "no messages"
        raise UserError(f"to generate an answer the last message must be a user's, found: {found}")

    of_token = {
        "bos": [tokenizer.bos_id],
        "eos": [tokenizer.eos_id],
        "user": [tokenizer.user_id],
        "assistant": [tokenizer.assistant_id],
    }
    spans: list[tuple[list[int], bool]] = []  # (ids, supervised)
    num_placed = 0
    for piece in pieces(messages):
        if piece.kind == "text":
            ids = tokenizer.encode(piece.text, plain=piece.plain)
        elif piece.kind == "image":
            ids = [tokenizer.image_id] * num_image_tokens(grids[num_placed]) if num_placed < len(grids) else []
            num_placed += 1
        else:
            ids = of_token[piece.kind]
        spans.append((ids, piece.supervised))
    if num_placed != len(grids):
        raise UserError(f"found {num_placed} {IMAGE_PLACEHOLDER} in the messages for {len(grids)} images")

    input_ids = np.array([token for ids, _ in spans for token in ids], dtype=np.int64)
    supervised = np.repeat([flag for _, flag in spans], [len(ids) for ids, _ in spans])
    labels = np.full_like(input_ids, IGNORE)
    labels[:-1] = np.where(supervised[1:], input_ids[1:], IGNORE)
    return Rendered(input_ids=input_ids, labels=labels)


def pieces(messages: Sequence[Message]) -> Iterator[Piece]:
    """Cut a conversation into what `render` makes ids of, and what measuring counts: one cut for both.

    The pieces of text between images are encoded separately, together with the template's punctuation around
    them, as the official code does: a space before a word belongs to its token.

    Raises:
        UserError: a system turn that is not first, or a placeholder outside user turns.

    Example: user "a <image>b", assistant "Yes"

        bos  user  ": a "  image  "b\\n\\n"  assistant  ":"  "Yes"  eos
    """
    yield Piece("bos")
    for index, message in enumerate(messages):
        content = message.content.strip()
        if message.role == "user":
            yield Piece("user")
            body = f": {content}\n\n" if content else ":"
            for i, text in enumerate(body.split(IMAGE_PLACEHOLDER)):
                if i:
                    yield Piece("image")
                yield Piece("text", text, message.plain)
            yield Piece("assistant")
            yield Piece("text", ":")
            continue
        if IMAGE_PLACEHOLDER in content:
            raise UserError(
                f"messages[{index}]: {IMAGE_PLACEHOLDER} in a turn of role {message.role!r}; only users show images"
            )
        if message.role == "assistant":
            yield Piece("text", content, message.plain, message.learn)
            yield Piece("eos", supervised=message.learn)
        elif index == 0:
            yield Piece("text", content, message.plain)
        else:
            raise UserError(f"messages[{index}]: a system message must be the first message")
