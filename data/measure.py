"""Measures rows: exact tokens, supervised tokens and tiles, from the text and the headers of the images.

What is measured is what `vl2.prompt.render` makes, so a pack can be planned before anything is decoded.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data.boxes import place_boxes
from data.budget import Budget
from data.images.files import ImageError
from data.images.reader import DEFAULT_READER, ImageReader
from data.images.ref import ImageRef, picture_root
from data.processes import can_fork, map_forked
from data.record import BadRecords, Record, RecordError
from data.records import RecordReader
from data.size_table import NOT_MEASURED, SCHEMA, SizeTable, blank, column, forget, hash_key, pictures, sizes_of
from vl2.prompt import Message, Piece, pieces
from vl2.tiles import Grid, Resolution, num_image_tokens, tile_grid

_MIN_PARALLEL = 2000  # rows; below, starting processes costs more than it saves
_MIN_PARALLEL_DECODE = 64  # rows with images to decode
_CHUNK = 512  # rows a process takes at a time
_BATCH_CHARACTERS = 1 << 18  # encoded at once: some 300 bytes of memory for each
_MIN_SHOWN = 1000  # rows; fewer take under a second and need no progress bar
_MIN_PARALLEL_KEYS = 100_000  # rows to hash


def measure(
    reader: RecordReader,
    candidates: Sequence[Resolution],
    *,
    limit: int | None = None,
    images: ImageReader = DEFAULT_READER,
    budget: Budget | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    bad: BadRecords | None = None,
) -> tuple[pa.Table, np.ndarray]:
    """Measure the rows of one file, or find their sizes in the table of an earlier run.

    Args:
        reader: makes records of the rows.
        candidates: resolutions (width, height) in pixels an image may be shown at.
        limit: only the first rows; None takes all.
        images: opens the pictures.
        budget: what a conversation may take at most.
        cache: folder of the size tables; None keeps none.
        workers: processes for large inputs; None takes one a core.
        bad: what to do with rows that cannot be used; without it the first raises.

    Returns:
        A table of `size_table.SCHEMA` with a row for each of the file's, and the indices of those that can be used,
        int64 in order.

    Raises:
        RecordError: a row that cannot be read or parsed, an image that is missing, truncated or no image, a
            conversation over the budget; of several the first in the file.
    """
    bad = bad if bad is not None else BadRecords()
    budget = budget or Budget()
    count = len(reader.rows) if limit is None else min(limit, len(reader.rows))
    job = _Job(reader=reader, candidates=tuple(candidates), images=images, budget=budget)
    kept = SizeTable(cache, reader, candidates=candidates, images=images)
    table = _known(kept, job, workers)
    missing = np.flatnonzero(column(table, "tokens")[:count] == NOT_MEASURED)

    few = _MIN_PARALLEL if reader.settings.verify == "header" else _MIN_PARALLEL_DECODE
    done = _Measured()
    shown = len(missing) >= min(few, _MIN_SHOWN)
    known = _over_budget(table.slice(0, count), np.arange(count), job)  # NOT_MEASURED is over none
    unusable = []
    try:
        with closing(_run(job, missing, _num_workers(len(missing), few, workers), done, shown=shown)) as new:
            for index, problem in heapq.merge(known, new, key=_by_row):
                bad.add(problem)
                unusable.append(index)
    finally:
        if done.indices:  # also when a row is bad: the next try starts from here
            table = _with(table, done)
            kept.save(table)
    return table, np.setdiff1d(np.arange(count), unusable, assume_unique=True)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to measure with; a forked process inherits it, nothing is sent but the indices."""

    reader: RecordReader
    candidates: tuple[Resolution, ...]
    images: ImageReader
    budget: Budget

    def chunk(self, indices: np.ndarray, *, batch: bool) -> tuple[list[int], dict[str, list[Any]], list[_Problem]]:
        """Measure some rows: (those that could be, their columns of `SCHEMA`, what is wrong with the others)."""
        measured: list[int] = []
        cut: list[tuple[list[Piece], list[Grid]]] = []
        columns: dict[str, list[Any]] = {field.name: [] for field in SCHEMA}
        problems: list[_Problem] = []
        fetched = False
        for position, index in enumerate(indices.tolist()):
            try:
                record = self.reader.read(index)
                if not fetched and any(image.kind == "url" for image in record.images):
                    self._fetch(indices[position:])
                    fetched = True
                if too_long := self.budget.far_too_long(record, self.reader.tokenizer):
                    raise too_long
                messages, shown, facts = self._look(record)
            except RecordError as error:
                problems.append((index, error))
                continue
            grids = [(one["columns"], one["rows"]) for one in shown]
            measured.append(index)
            cut.append((list(pieces(messages)), grids))
            columns["row_key"].append(hash_key(self.reader.rows.content(index)))
            content, learned = _content_keys(messages, facts)
            columns["content"].append(content)
            columns["learned"].append(learned)
            columns["unknown"].append(json.dumps(record.unknown) if record.unknown else "")
            columns["images"].append(shown)
        columns["tokens"], columns["supervised"] = self._count(cut, batch=batch)
        return measured, columns, problems

    def _fetch(self, indices: np.ndarray) -> None:
        """Fetch the pictures of some rows that lie at addresses, many at a time: one by one they take hours."""
        found = []
        for index in indices.tolist():
            with suppress(RecordError):  # said when its turn comes
                found += [image for image in self.reader.read(index).images if image.kind == "url"]
        self.images.prefetch(found)

    def row_keys(self, indices: np.ndarray) -> bytes:
        """Hashes of some rows as they lie in the file."""
        return b"".join(hash_key(self.reader.rows.content(index)) for index in indices.tolist())

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
                if image.kind == "url":  # it is here now
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
                {"kind": image.kind, "name": name, "state": _state_key(state), "columns": columns, "rows": rows}
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
        texts = [text for plain, text in found if batch and not plain]
        for few in _batches(texts):
            found.update(zip(((False, text) for text in few), tokenizer.count_batch(few), strict=True))
        for plain, text in found:
            if plain or not batch:
                found[plain, text] = len(tokenizer.encode(text, plain=plain))
        return found


_Problem = tuple[int, RecordError]  # of the row with this index


def _by_row(problem: _Problem) -> int:
    return problem[0]


@dataclass(kw_only=True)
class _Measured:
    """Chunks that were measured, as they come in."""

    indices: list[int] = field(default_factory=list)
    columns: list[pa.Table] = field(default_factory=list)


def _known(kept: SizeTable, job: _Job, workers: int | None) -> pa.Table:
    """What an earlier run measured of the rows as they are now, and of their pictures as they are now."""
    count = len(job.reader.rows)
    table = kept.load()
    if table is None:
        table = blank(count)
        older = list(kept.older())
        if older:
            table = _found_again(_all_row_keys(job, count, workers), older)
    return _unchanged(table, job.images, picture_root(job.reader.of.image_root))


def _all_row_keys(job: _Job, count: int, workers: int | None) -> np.ndarray:
    """Hashes of all rows of the file as they lie in it: uint8 [16 · count]."""
    chunks = [np.arange(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    num_workers = _num_workers(count, _MIN_PARALLEL_KEYS, workers)
    found = map(job.row_keys, chunks) if num_workers == 1 else map_forked(job.row_keys, chunks, num_workers)
    return np.frombuffer(b"".join(found), dtype=np.uint8)


def _found_again(row_keys: np.ndarray, older: Sequence[pa.Table]) -> pa.Table:
    """A table of the rows with these hashes, from the first of the older tables that has each measured."""
    known = pa.concat_tables(older)
    known = known.filter(pa.array(column(known, "tokens") != NOT_MEASURED))
    buffers = [None, pa.py_buffer(row_keys)]
    wanted = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(row_keys) // 16, buffers)
    found = pc.index_in(wanted, value_set=known["row_key"]).fill_null(len(known))
    return pa.concat_tables([known, blank(1)]).take(found)


def _unchanged(table: pa.Table, images: ImageReader, root: str) -> pa.Table:
    """The table without the rows of which a picture is not as it was."""
    shown = pictures(table)
    first_image = sizes_of(table).first_image
    same = np.ones(len(shown), dtype=bool)
    for first in range(0, len(shown), _CHUNK):
        states: dict[tuple[str, str], bytes] = {}  # one picture may be shown by many rows
        for i, picture in enumerate(shown[first : first + _CHUNK].to_pylist(), start=first):
            kind, name = picture["kind"], picture["name"]
            if kind == "bytes":  # they stand in the row
                continue
            if (kind, name) not in states:
                states[kind, name] = _state_key(images.state(ImageRef(kind=kind, name=name, root=root)))
            same[i] = states[kind, name] == picture["state"] != _GONE
    if same.all():
        return table
    num_changed = np.concatenate([[0], np.cumsum(~same)])
    return forget(table, np.diff(num_changed[first_image]) > 0)


def _over_budget(table: pa.Table, indices: np.ndarray, job: _Job) -> Iterator[_Problem]:
    """What is wrong with measured rows; `indices` are theirs in the file."""
    sizes = sizes_of(table)
    for i in np.flatnonzero(job.budget.exceeded(sizes)).tolist():
        index = int(indices[i])
        yield index, job.reader.error(index, *job.budget.problem(sizes[i]))


def _run(
    job: _Job, missing: np.ndarray, workers: int, done: _Measured, *, shown: bool
) -> Generator[_Problem, None, None]:
    """Measure rows into `done`, and tell in order what is wrong with some."""
    chunks = [missing[first : first + _CHUNK] for first in range(0, len(missing), _CHUNK)]
    # Threads or forks, never both: in this process the library would take threads for a batch.
    work = functools.partial(job.chunk, batch=workers > 1)
    results = map(work, chunks) if workers == 1 else map_forked(work, chunks, workers)
    with tqdm(
        total=len(missing), desc="measuring", unit="record", file=sys.stderr, mininterval=1.0, disable=not shown
    ) as bar:
        for chunk, (measured, columns, problems) in zip(chunks, results, strict=True):
            new = pa.table(columns, schema=SCHEMA)
            done.indices.extend(measured)
            done.columns.append(new)
            over = _over_budget(new, np.array(measured, dtype=np.int64), job)
            yield from heapq.merge(problems, over, key=_by_row)
            bar.update(len(chunk))


def _with(table: pa.Table, done: _Measured) -> pa.Table:
    """The table with what was measured."""
    rows = np.arange(len(table))
    rows[done.indices] = len(table) + np.arange(len(done.indices))
    return pa.concat_tables([table, *done.columns]).combine_chunks().take(pa.array(rows))


def _num_workers(count: int, few: int, workers: int | None) -> int:
    if count < few or not can_fork():
        return 1
    return max(1, workers if workers is not None else len(os.sched_getaffinity(0)))


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


_GONE = bytes(16)


def _state_key(state: str | None) -> bytes:
    return _GONE if state is None else hash_key(state.encode("utf-8", "surrogatepass"))


def _content_of(image: ImageRef) -> list[Any]:
    """What tells pictures apart wherever they lie: of a file its own name and its size."""
    if image.kind == "bytes":
        return [hash_key(image.data).hex()]
    return [os.path.basename(image.name), os.path.getsize(image.name)] if image.kind == "file" else [image.name]


def _content_keys(messages: Sequence[Message], facts: Sequence[Any]) -> tuple[int, int]:
    """Hashes of what a conversation says and shows, and of that with what is learned of it."""
    said = json.dumps([[[message.role, message.content.strip()] for message in messages], facts])
    flags = json.dumps([[message.plain, message.learn] for message in messages])
    digest = hashlib.blake2b(said.encode(), digest_size=8)
    content = int.from_bytes(digest.digest(), "little")
    digest.update(flags.encode())
    return content, int.from_bytes(digest.digest(), "little")
