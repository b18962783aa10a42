"""The first packs of a plan, token by token: what is learned or special, where pictures and conversations stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.boxes import place_boxes
from data.dataset import Dataset
from data.images.reader import ImageReader
from data.plan import PackSpec, Plan
from train.page.pictures import DrawnPicture, draw_picture, text_boxes
from vl2.prompt import IGNORE, render
from vl2.tiles import num_image_tokens
from vl2.tokenizer import Tokenizer

NUM_PACKS = 3
MOST_TOKENS = 12_000  # drawn on a page, pictures not counted
MOST_PICTURES = 12  # opened for a page
_MOST_PARTS = 4  # tokens that share a character


@dataclass(frozen=True, kw_only=True)
class DrawnToken:
    """One token of text; several, where they spell one character together."""

    text: str
    learned: bool
    special: bool
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnSegment:
    """A conversation in a pack."""

    source: str
    row: int
    tokens: int
    supervised: int
    parts: tuple[DrawnToken | DrawnPicture, ...]
    cut: int
    """Tokens at the end that are not drawn."""


@dataclass(frozen=True, kw_only=True)
class DrawnPack:
    """A pack of the plan."""

    number: int
    """In the plan, from 1."""
    step: int
    """Optimizer step, from 1."""
    spec: PackSpec
    segments: tuple[DrawnSegment, ...]
    left_out: int
    """Conversations at its end that are not drawn."""


class PackPen:
    """Draws packs, until so many tokens and pictures are drawn that a page stays quick."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, reader: ImageReader):
        self.dataset, self.tokenizer, self.reader = dataset, tokenizer, reader
        self._special = set(tokenizer.special_ids.values())
        self._tokens_left, self._pictures_left = MOST_TOKENS, MOST_PICTURES

    def draw(self, plan: Plan) -> tuple[DrawnPack, ...]:
        """Draw the first packs of a plan."""
        packs: list[DrawnPack] = []
        for number, spec in enumerate(plan.packs):
            if len(packs) == NUM_PACKS or not self._tokens_left:
                break
            if spec.samples:
                segments = tuple(self._segments(spec))
                left_out = len(spec.samples) - len(segments)
                step = number // plan.packs_per_step + 1
                packs.append(DrawnPack(number=number + 1, step=step, spec=spec, segments=segments, left_out=left_out))
        return tuple(packs)

    def _segments(self, spec: PackSpec) -> Iterator[DrawnSegment]:
        for index in spec.samples:
            if not self._tokens_left:
                return
            yield self._segment(index)

    def _segment(self, index: int) -> DrawnSegment:
        record, size = self.dataset.records[index], self.dataset.sizes[index]
        messages = place_boxes(record, [self.reader.size(image) for image in record.images] if record.boxes else [])
        rendered = render(messages, size.grids, self.tokenizer)
        pictures = iter(zip(record.images, size.grids, strict=True))
        boxes = text_boxes(record, messages)
        learned = np.concatenate([[False], rendered.labels[:-1] != IGNORE])  # labels stand before what they name
        ids = rendered.input_ids
        starts = np.flatnonzero(
            np.diff(ids == self.tokenizer.image_id, prepend=False)
        ).tolist()  # of pictures and texts
        parts: list[DrawnToken | DrawnPicture] = []
        cut, number = 0, 0
        for start, end in zip([0, *starts], [*starts, len(ids)], strict=True):
            position = start
            while position < end and ids[position] == self.tokenizer.image_id:  # pictures may follow each other
                image, grid = next(pictures)
                own = [box for box in boxes if box.image == number]
                number, opened = number + 1, self._pictures_left > 0
                self._pictures_left -= opened
                parts.append(draw_picture(image, grid, number=number, reader=self.reader, boxes=own, opened=opened))
                position += num_image_tokens(grid)
            drawn = slice(position, min(end, position + self._tokens_left))
            parts.extend(self._texts(ids[drawn].tolist(), learned[drawn].tolist()))
            self._tokens_left -= drawn.stop - drawn.start
            cut += end - drawn.stop
        return DrawnSegment(
            source=record.source,
            row=record.row,
            tokens=size.tokens,
            supervised=size.supervised,
            parts=tuple(parts),
            cut=cut,
        )

    def _texts(self, ids: Sequence[int], learned: Sequence[bool]) -> Iterator[DrawnToken]:
        pending: list[int] = []
        for i, token in enumerate(ids):
            pending.append(token)
            text = self.tokenizer.decode(pending)
            goes_on = i + 1 < len(ids) and learned[i + 1] == learned[i] and ids[i + 1] not in self._special
            if text.endswith("\ufffd") and goes_on and len(pending) < _MOST_PARTS:
                continue  # the bytes of one character are spread over tokens
            yield DrawnToken(text=text, learned=learned[i], special=token in self._special, ids=tuple(pending))
            pending = []
