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
            if len(packs) == NUM_PACKS:
                break
            if spec.samples:
                segments = tuple(self._segment(index) for index in spec.samples)
                step = number // plan.packs_per_step + 1
                packs.append(DrawnPack(number=number + 1, step=step, spec=spec, segments=segments))
        return tuple(packs)

    def _segment(self, index: int) -> DrawnSegment:
        record, size = self.dataset.records[index], self.dataset.sizes[index]
        pictures = [self.reader.size(image) for image in record.images] if record.boxes else []
        messages = place_boxes(record, pictures)
        rendered = render(messages, size.grids, self.tokenizer)
        boxes = text_boxes(record, messages)
        parts: list[DrawnToken | DrawnPicture] = []
        ids = rendered.input_ids
        learned = np.concatenate([[False], rendered.labels[:-1] != IGNORE])  # labels stand before what they name
        position, picture, cut = 0, 0, 0
        while position < len(ids):
            if ids[position] == self.tokenizer.image_id:
                grid = size.grids[picture]
                opened = self._pictures_left > 0
                self._pictures_left -= opened
                drawn = draw_picture(
                    record.images[picture],
                    grid,
                    number=picture + 1,
                    reader=self.reader,
                    boxes=[box for box in boxes if box.image == picture],
                    opened=opened,
                )
                parts.append(drawn)
                position, picture = position + num_image_tokens(grid), picture + 1
                continue
            end = position
            while end < len(ids) and ids[end] != self.tokenizer.image_id:
                end += 1
            drawn_end = min(end, position + self._tokens_left)
            self._tokens_left -= drawn_end - position
            cut += end - drawn_end
            parts.extend(self._texts(ids[position:drawn_end].tolist(), learned[position:drawn_end].tolist()))
            position = end
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
