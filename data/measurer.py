"""Measures a few rows at a time: what a process does that measures, without knowledge of the others or of the past."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.boxes import place_boxes
from data.budget import Budget
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.record import Record, RecordError
from data.records import RecordReader
from data.size_table import SCHEMA, hash_key, state_key
from vl2.prompt import Message, Piece, pieces
from vl2.tiles import Grid, Resolution, num_image_tokens, tile_grid

_FETCHED = 64  # records whose pictures are fetched together
_BATCH_CHARACTERS = 1 << 18  # encoded at once: some 300 bytes of memory for each

Problem = tuple[int, RecordError]
"""What is wrong with the row of this index."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Some rows of a file."""

    indices: list[int]
    """Those that could be measured."""
    columns: dict[str, list[Any]]
    """Theirs, of `size_table.SCHEMA`."""
    problems: list[Problem]
    """Of the others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurer:
    """All that rows of one file are measured with; a forked process inherits it, and is sent nothing but indices."""

    reader: RecordReader
    candidates: tuple[Resolution, ...]
    """Resolutions (width, height) in pixels an image may be shown at."""
    images: ImageReader
    budget: Budget

    def measure(self, indices: np.ndarray, *, batch: bool) -> Measured:
        """Measure rows: exact tokens, supervised tokens and tiles, from the text and the headers of the images.

        Args:
            indices: int [M] of the rows.
            batch: encode their texts together, for which the library takes threads unless it is told not to.
        """
        found = Measured(indices=[], columns={field.name: [] for field in SCHEMA}, problems=[])
        cut: list[tuple[list[Piece], list[Grid]]] = []
        for first in range(0, len(indices), _FETCHED):
            records = self._read(indices[first : first + _FETCHED].tolist(), found.problems)
            self.images.prefetch(image for _, record in records for image in record.images)
            for index, record in records:
                try:
                    messages, shown, facts = self._look(record)
                except RecordError as problem:
                    found.problems.append((index, problem))
                    continue
                content, learned = _content_keys(messages, facts)
                cut.append((list(pieces(messages)), [(one["columns"], one["rows"]) for one in shown]))
                found.indices.append(index)
                found.columns["row_key"].append(hash_key(self.reader.rows.content(index)))
                found.columns["content"].append(content)
                found.columns["learned"].append(learned)
                found.columns["unknown"].append(json.dumps(record.unknown) if record.unknown else "")
                found.columns["images"].append(shown)
        found.columns["tokens"], found.columns["supervised"] = self._count(cut, batch=batch)
        found.problems.sort(key=lambda problem: problem[0])
        return found

    def row_keys(self, indices: np.ndarray) -> bytes:
        """Hashes of some rows as they lie in the file, 16 bytes each."""
        return b"".join(hash_key(self.reader.rows.content(index)) for index in indices.tolist())

    def _read(self, indices: Sequence[int], problems: list[Problem]) -> list[tuple[int, Record]]:
        records = []
        for index in indices:
            try:
                record = self.reader.read(index)
                if too_long := self.budget.far_too_long(record, self.reader.tokenizer, self.reader.field):
                    raise too_long
            except RecordError as problem:
                problems.append((index, problem))
            else:
                records.append((index, record))
        return records

    def _look(self, record: Record) -> tuple[tuple[Message, ...], list[dict[str, Any]], list[Any]]:
        """Look at the pictures: (messages with boxes in place, what goes into the table, what is shown by each).

        Raises:
            RecordError: a picture or a box that cannot be used.
        """
        shown, facts, sizes = [], [], []
        for i, image in enumerate(record.images):
            state = self.images.state(image)  # before the rest: what changes meanwhile is looked at again
            try:
                size = self.images.size(image)
                if image.kind == "url":  # with a state from now on, as it was fetched
                    state = self.images.state(image)
                if self.reader.settings.verify == "decode":
                    self.images.decode(image)
                facts.append(_content_of(image))
            except ImageError as error:
                raise record.image_error(i, str(error)) from None
            sizes.append(size)
            columns, rows = tile_grid(size, len(record.images), self.candidates)
            name = image.name if image.kind != "bytes" else ""
            shown.append(
                {"kind": image.kind, "name": name, "state": state_key(state), "columns": columns, "rows": rows}
            )
        return place_boxes(record, sizes), shown, facts

    def _count(self, cut: list[tuple[list[Piece], list[Grid]]], *, batch: bool) -> tuple[list[int], list[int]]:
        """Tokens and supervised tokens of conversations in pieces."""
        found = self._count_texts([p for parts, _ in cut for p in parts if p.kind == "text"], batch=batch)
        tokens, supervised = [], []
        for parts, grids in cut:
            of_text = [found[part.plain, part.text] if part.kind == "text" else 1 for part in parts]
            of_images = sum(num_image_tokens(grid) - 1 for grid in grids)
            tokens.append(sum(of_text) + of_images)
            supervised.append(sum(count for part, count in zip(parts, of_text, strict=True) if part.supervised))
        return tokens, supervised

    def _count_texts(self, parts: Sequence[Piece], *, batch: bool) -> dict[tuple[bool, str], int]:
        """Tokens of each text (plain or not)."""
        tokenizer = self.reader.tokenizer
        found = {(part.plain, part.text): 0 for part in parts}
        for few in _batches([text for plain, text in found if batch and not plain]):
            found.update(zip(((False, text) for text in few), tokenizer.count_batch(few), strict=True))
        for plain, text in found:
            if plain or not batch:
                found[plain, text] = len(tokenizer.encode(text, plain=plain))
        return found


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in lists of some hundred thousand characters, or of one longer text."""
    few: list[str] = []
    characters = 0
    for text in texts:
        if few and characters + len(text) > _BATCH_CHARACTERS:
            yield few
            few, characters = [], 0
        few.append(text)
        characters += len(text)
    if few:
        yield few


def _content_of(image: ImageRef) -> list[Any]:
    """What tells pictures apart wherever they lie: of a file its own name and its size."""
    if image.kind == "bytes":
        return [hash_key(image.data).hex()]
    if image.kind == "url":
        return [image.name]
    try:
        return [os.path.basename(image.name), os.path.getsize(image.name)]
    except OSError as error:  # it was there a moment ago
        raise ImageError(f"cannot read the image {image.name}: {error.strerror}") from None


def _content_keys(messages: Sequence[Message], facts: Sequence[Any]) -> tuple[int, int]:
    """Hashes of what a conversation says and shows, and of that with what is learned of it."""
    said = json.dumps([[[message.role, message.content.strip()] for message in messages], facts])
    flags = json.dumps([[message.plain, message.learn] for message in messages])
    digest = hashlib.blake2b(said.encode(), digest_size=8)
    content = int.from_bytes(digest.digest(), "little")
    digest.update(flags.encode())
    return content, int.from_bytes(digest.digest(), "little")
