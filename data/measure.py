"""Measures records: exact tokens, supervised tokens and tiles, from the text and the headers of the images.

What is measured is what `vl2.prompt.render` makes, so a pack can be planned before anything is decoded.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from data.images.files import ImageError
from data.images.reader import DEFAULT_READER, ImageReader
from data.processes import end_with_parent
from data.record import BadRecords, Record, RecordError
from data.settings import Verify
from data.size_table import Size, SizeTable, record_key
from vl2.errors import UserError
from vl2.prompt import IGNORE, render
from vl2.tiles import Resolution, tile_grid
from vl2.tokenizer import Tokenizer

_MIN_PARALLEL = 2000  # records; below, starting processes costs more than it saves
_MIN_PARALLEL_DECODE = 64  # records with images to decode
_CHUNK = 256  # records a process takes at a time
_MIN_SHOWN = 1000  # records; fewer take under a second and need no progress bar


def measure(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    candidates: Sequence[Resolution],
    *,
    images: ImageReader = DEFAULT_READER,
    cache: Path | None = None,
    workers: int | None = None,
    verify: Verify = "header",
    bad: BadRecords | None = None,
) -> list[Size | None]:
    """Measure every record, or find its size in the table of an earlier run.

    Args:
        records: what to measure.
        tokenizer: counts the text.
        candidates: resolutions (width, height) in pixels an image may be shown at.
        images: opens the pictures.
        cache: file of the size table; None keeps none.
        workers: processes for large inputs; None takes one a core.
        verify: "header" reads of each image what `ImageReader.size` says; "decode" decodes every image too.
        bad: what to do with records that cannot be measured; without it the first raises.

    Returns:
        A size for each record, None for one that `bad` skipped.

    Raises:
        RecordError: an image is missing, truncated or no image.
    """
    bad = bad if bad is not None else BadRecords()
    table = SizeTable(cache)
    keys = [
        record_key(record, tokenizer=tokenizer, candidates=candidates, verify=verify, images=images)
        for record in records
    ]
    sizes = [table.get(key) if key is not None else None for key in keys]
    missing = [i for i, size in enumerate(sizes) if size is None]

    job = _Job([records[i] for i in missing], tokenizer, tuple(candidates), verify, images)
    results = tqdm(
        _run(job, _num_workers(job, workers)),
        total=len(missing),
        desc="measuring",
        unit="record",
        file=sys.stderr,
        mininterval=1.0,
        disable=len(missing) < (_MIN_SHOWN if verify == "header" else _MIN_PARALLEL_DECODE),
    )
    try:
        for i, result in zip(missing, results, strict=True):
            if isinstance(result, RecordError):
                bad.add(result)
                continue
            sizes[i] = result
            key = keys[i]
            if key is not None:
                table.put(key, result)
    finally:
        table.save()  # also when a record is bad: the next try starts from here
    return sizes


class _Job:
    """What to measure; a forked process inherits it, nothing is sent."""

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        candidates: tuple[Resolution, ...],
        verify: Verify,
        images: ImageReader,
    ):
        self.records, self.tokenizer, self.candidates, self.verify = records, tokenizer, candidates, verify
        self.images = images

    def one(self, index: int) -> Size | RecordError:
        record = self.records[index]
        grids = []
        for i, image in enumerate(record.images):
            try:
                size = self.images.size(image)
                if self.verify == "decode":
                    self.images.decode(image)
            except ImageError as error:
                return record.error(f"images[{i}]", str(error))
            grids.append(tile_grid(size, len(record.images), self.candidates))
        rendered = render(record.messages, grids, self.tokenizer)
        supervised = int((rendered.labels != IGNORE).sum())
        return Size(tokens=len(rendered.input_ids), supervised=supervised, grids=tuple(grids))


def _num_workers(job: _Job, workers: int | None) -> int:
    few = _MIN_PARALLEL if job.verify == "header" else _MIN_PARALLEL_DECODE
    # Forked children run the tokenizer and Pillow only, no Paddle: safe after Paddle's threads exist. Not so on macOS.
    if len(job.records) < few or not sys.platform.startswith("linux"):
        return 1
    return max(1, workers if workers is not None else len(os.sched_getaffinity(0)))


def _run(job: _Job, workers: int) -> Iterator[Size | RecordError]:
    if workers == 1:
        yield from map(job.one, range(len(job.records)))
        return
    chunks = [range(first, min(first + _CHUNK, len(job.records))) for first in range(0, len(job.records), _CHUNK)]
    # An executor, not a Pool: it reports a killed child, where a Pool waits for ever.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, os.getpid())) as executor:
        try:
            for chunk in executor.map(_work, chunks):
                yield from chunk
        except BrokenProcessPool:
            raise UserError(
                f"a process that measures the data was killed (out of memory?): {workers} were at work; give "
                f"data.workers={max(1, workers // 2)}, which takes less memory. What was measured is kept"
            ) from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_job: _Job | None = None


def _start_worker(job: _Job, parent: int) -> None:
    global _job
    end_with_parent(parent)
    _job = job


def _work(indices: Iterable[int]) -> list[Size | RecordError]:
    assert _job is not None
    return [_job.one(index) for index in indices]
