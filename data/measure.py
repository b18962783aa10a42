"""Measures the rows of files in several processes, as far as an earlier run has not measured them.

What is measured is what `vl2.prompt.render` makes, so a pack can be planned before anything is decoded.
"""

from __future__ import annotations

import functools
import heapq
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data.images.reader import ImageReader
from data.images.ref import ImageRef, picture_root
from data.measurer import Measured, Measurer, Problem
from data.processes import can_fork, map_forked
from data.record import BadRecords
from data.size_table import (
    GONE,
    NOT_MEASURED,
    SCHEMA,
    SizeTable,
    blank,
    column,
    forget,
    forget_old,
    pictures,
    sizes_of,
    state_key,
)

_MIN_PARALLEL = 2000  # rows; below, starting processes costs more than it saves
_MIN_PARALLEL_DECODE = 64  # rows with images to decode
_MIN_PARALLEL_KEYS = 100_000  # rows to hash, or pictures whose state is looked up
_CHUNK = 512  # rows a process takes at a time, at most
_MIN_SHOWN = 1000  # rows; fewer take under a second and need no progress bar

Result = TypeVar("Result")


def measure(
    measurers: Sequence[Measurer],
    *,
    cache: Path | None = None,
    workers: int | None = None,
    bad: BadRecords | None = None,
) -> list[tuple[pa.Table, np.ndarray]]:
    """Measure the rows of files, or find their sizes in the tables of an earlier run.

    Args:
        measurers: of each file.
        cache: folder of the size tables; None keeps none.
        workers: processes for large inputs; None takes one a core.
        bad: what to do with rows that cannot be used; without it the first raises.

    Returns:
        For each file a table of `size_table.SCHEMA` with a row for each of the file's, and the indices of those that
        can be used, int64 in order.

    Raises:
        RecordError: a row that cannot be read or parsed, an image that is missing, truncated or no image, a
            conversation over the budget; of several the first.
    """
    bad = bad if bad is not None else BadRecords()
    files = [_File(measurer, cache, workers) for measurer in measurers]
    total = sum(len(file.missing) for file in files)
    decodes = any(measurer.reader.settings.verify == "decode" for measurer in measurers)
    few = _MIN_PARALLEL_DECODE if decodes else _MIN_PARALLEL
    num_workers = _num_workers(total, few, workers)
    size = min(_CHUNK, max(1, math.ceil(total / (4 * num_workers))))
    jobs = [(i, rows) for i, file in enumerate(files) for rows in _chunks(file.missing, size)]

    def work(job: tuple[int, np.ndarray]) -> Measured:
        # Threads or forks, never both: in this process the library takes threads for a batch, which no fork may follow.
        return measurers[job[0]].measure(job[1], batch=num_workers > 1 or not can_fork())

    shown = total >= min(few, _MIN_SHOWN)
    try:
        with (
            tqdm(
                total=total, desc="measuring", unit="record", file=sys.stderr, mininterval=1.0, disable=not shown
            ) as bar,
            closing(_map(work, jobs, num_workers)) as results,
        ):
            for file in files:
                for index, problem in heapq.merge(file.known_problems(), file.take(results, size, bar), key=_by_row):
                    bad.add(problem)
                    file.unusable.append(index)
    finally:
        for file in files:  # also when a row is bad: the next try starts from here
            file.save()
        if cache is not None:
            forget_old(cache)
    return [(file.table, file.usable) for file in files]


class _File:
    """A file while it is measured: what is known of it, what is missing, what came in."""

    def __init__(self, measurer: Measurer, cache: Path | None, workers: int | None):
        self.measurer = measurer
        self.kept = SizeTable(cache, measurer.reader, candidates=measurer.candidates, images=measurer.images)
        self.table = self._known(workers)
        self.missing = np.flatnonzero(column(self.table, "tokens") == NOT_MEASURED)
        self.unusable: list[int] = []
        self._indices: list[np.ndarray] = []
        self._columns: list[pa.Table] = []

    def known_problems(self) -> Iterator[Problem]:
        """What is wrong with rows that were measured before; NOT_MEASURED is over no budget."""
        return _over_budget(self.table, range(len(self.table)), self.measurer)

    def take(self, results: Iterator[Measured], size: int, bar: tqdm) -> Iterator[Problem]:
        """Take in the chunks of this file, and tell in order what is wrong with some of their rows."""
        for rows in _chunks(self.missing, size):
            found = next(results)
            table = pa.table(found.columns, schema=SCHEMA)
            self._indices.append(np.array(found.indices, dtype=np.int64))
            self._columns.append(table)
            yield from heapq.merge(found.problems, _over_budget(table, found.indices, self.measurer), key=_by_row)
            bar.update(len(rows))

    def save(self) -> None:
        """Put what came in into the table, and keep that."""
        if self._columns:
            indices = np.concatenate(self._indices)
            rows = np.arange(len(self.table))
            rows[indices] = len(self.table) + np.arange(len(indices))
            self.table = pa.concat_tables([self.table, *self._columns]).combine_chunks().take(pa.array(rows))
        if self._columns or self._is_new:
            self.kept.save(self.table)

    @property
    def usable(self) -> np.ndarray:
        """Indices of the rows that can be used."""
        found = np.ones(len(self.table), dtype=bool)
        found[self.unusable] = False
        return np.flatnonzero(found)

    def _known(self, workers: int | None) -> pa.Table:
        """What an earlier run measured of the rows as they are now, and of their pictures as they are now."""
        table = self.kept.load()
        self._is_new = table is None  # to be kept even if all its rows were found in older ones
        if table is None:
            older = self.kept.older()
            count = len(self.measurer.reader.rows)
            table = _found_again(self._row_keys(count, workers), older) if older else blank(count)
        return _unchanged(table, self.measurer.images, picture_root(self.measurer.reader.of.image_root), workers)

    def _row_keys(self, count: int, workers: int | None) -> np.ndarray:
        """Hashes of all rows as they lie in the file: uint8 [16 · count]."""
        num_workers = _num_workers(count, _MIN_PARALLEL_KEYS, workers)
        found = _map(self.measurer.row_keys, _chunks(np.arange(count), _CHUNK), num_workers)
        return np.frombuffer(b"".join(found), dtype=np.uint8)


def _found_again(row_keys: np.ndarray, older: Sequence[pa.Table]) -> pa.Table:
    """A table of the rows with these hashes, from the first of the older tables that has each measured."""
    known = pa.concat_tables(older)
    known = known.filter(pa.array(column(known, "tokens") != NOT_MEASURED))
    buffers = [None, pa.py_buffer(row_keys)]
    wanted = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(row_keys) // 16, buffers)
    found = pc.index_in(wanted, value_set=known["row_key"]).fill_null(len(known))
    return pa.concat_tables([known, blank(1)]).take(found)


def _unchanged(table: pa.Table, images: ImageReader, root: str, workers: int | None) -> pa.Table:
    """The table without the rows of which a picture is not as it was."""
    shown = pictures(table)

    def same(indices: np.ndarray) -> list[bool]:
        state = functools.cache(  # one picture may be shown by many rows
            lambda kind, name: state_key(images.state(ImageRef(kind=kind, name=name, root=root)))
        )
        few = shown.slice(indices[0], len(indices)).to_pylist()
        # Bytes stand in the row, which is as it was.
        return [p["kind"] == "bytes" or state(p["kind"], p["name"]) == p["state"] != GONE for p in few]

    chunks = _chunks(np.arange(len(shown)), _CHUNK)
    found = _map(same, chunks, _num_workers(len(shown), _MIN_PARALLEL_KEYS, workers))
    changed = np.array([not one for few in found for one in few], dtype=bool)
    if not changed.any():
        return table
    until = np.concatenate([[0], np.cumsum(changed)])
    return forget(table, np.diff(until[sizes_of(table).first_image]) > 0)


def _over_budget(table: pa.Table, indices: Sequence[int], measurer: Measurer) -> Iterator[Problem]:
    """What is wrong with measured rows; `indices` are theirs in the file."""
    sizes = sizes_of(table)
    for i in np.flatnonzero(measurer.budget.exceeded(sizes)).tolist():
        yield indices[i], measurer.reader.error(indices[i], *measurer.budget.problem(sizes[i], measurer.reader.field))


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]


def _map(work: Callable[..., Result], jobs: Sequence[object], num_workers: int) -> Generator[Result, None, None]:
    """Do work for each job, here or in forked processes; a generator, so that it can be closed."""
    yield from map(work, jobs) if num_workers == 1 else map_forked(work, jobs, num_workers)


def _num_workers(count: int, few: int, workers: int | None) -> int:
    if count < few or not can_fork():
        return 1
    return max(1, workers if workers is not None else len(os.sched_getaffinity(0)))


def _by_row(problem: Problem) -> int:
    return problem[0]
