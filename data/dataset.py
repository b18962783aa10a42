"""Opens the sources of a run: read, measured, checked against the budget. The one door through which data comes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.budget import Budget
from data.images.reader import DEFAULT_READER, ImageReader
from data.measure import measure
from data.measurer import Measurer
from data.record import BadRecords, RecordError
from data.records import RecordReader, Records
from data.settings import ReadSettings, SourceSettings
from data.size_table import column, count_values, pictures, sizes_of
from data.sizes import Sizes
from data.sources.open import open_sources
from vl2.errors import UserError
from vl2.tiles import Resolution
from vl2.tokenizer import Tokenizer

COLUMNS = "columns:"
"""A fingerprint that begins so was computed from columns, not from the records one by one."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was found in one source."""

    settings: SourceSettings
    rows: int
    """In its files, or as many as `settings.limit` takes."""
    kept: int
    """Of these, rows that can be used."""
    form: str
    """Form of its rows as `data.forms.table` calls it; several in the order they were found in its files."""
    unknown: Mapping[str, int]
    """Fields of the kept rows that say nothing here, with the number of rows that have each."""

    first_skipped: RecordError | None
    """What is wrong with the first row that was left out."""

    @property
    def skipped(self) -> int:
        """Rows that were left out."""
        return self.rows - self.kept

    def found_none(self) -> str:
        """Why no row can be used, for errors."""
        if not self.rows:
            return "it is empty"
        return f"all {self.rows} rows were skipped, the first: {self.first_skipped}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """N usable records of all sources with their sizes: numbers in columns, records when they are asked for."""

    records: Records
    """In the order of the sources and their rows."""
    sizes: Sizes
    """One for each record."""
    source_of: np.ndarray
    """int32 [N]: the index in `sources` of each record."""
    content_keys: np.ndarray
    """uint64 [N]: hash of what each conversation says and shows, whatever its form, file and place."""
    picture_keys: np.ndarray
    """uint64 [I]: hash of each picture in `sizes`: the same for the same file, address or bytes; 0: unknown."""
    sources: tuple[Source, ...]
    fingerprint: str
    """Hash of what the records say, their images' names and bytes, and their sizes; no absolute path, no time."""
    skipped: tuple[RecordError, ...]
    """Rows that were left out, with on_bad_record=skip."""

    def take(self, indices: np.ndarray) -> Dataset:
        """Return the data set of some records, in the order given; its `sources` and `skipped` are those of all.

        Args:
            indices: int [M] of records.
        """
        digest = hashlib.sha256(self.fingerprint.encode())
        digest.update(np.ascontiguousarray(indices, dtype=np.int64).data)
        return Dataset(
            records=self.records.take(indices),
            sizes=self.sizes.take(indices),
            source_of=self.source_of[indices],
            content_keys=self.content_keys[indices],
            picture_keys=self.picture_keys[self.sizes.images_of(indices)],
            sources=self.sources,
            fingerprint=COLUMNS + digest.hexdigest(),
            skipped=self.skipped,
        )


def open_dataset(
    sources: Sequence[SourceSettings],
    *,
    settings: ReadSettings,
    tokenizer: Tokenizer,
    candidates: Sequence[Resolution],
    images: ImageReader = DEFAULT_READER,
    max_tokens: int | None = None,
    max_tiles_per_pack: int | None = None,
    context: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    bad: BadRecords | None = None,
) -> Dataset:
    """Read and measure data, and check that each conversation fits into a pack.

    Args:
        sources: where it lies.
        settings: how rows become records, and what is done with those that cannot be used.
        tokenizer: counts the text.
        candidates: resolutions (width, height) in pixels an image may be shown at.
        images: opens the pictures.
        max_tokens: budget of a pack, tokens; None does not check.
        max_tiles_per_pack: budget of a pack, tiles with global views; None does not check.
        context: positions the model was made for, tokens; None does not check. Training may go beyond them.
        cache: folder for what need not be found out twice, see `data.cache`; None keeps nothing.
        workers: processes for measuring; None takes one a core.
        bad: what is done with rows that cannot be used instead of what `settings` say.

    Raises:
        UserError: no such file, no usable row, or too many bad ones; `RecordError` names file, row and field.
    """
    if bad is None:
        bad = BadRecords(on_bad_record=settings.on_bad_record, max_bad=settings.max_bad)
    budget = Budget(max_tokens=max_tokens, max_tiles_per_pack=max_tiles_per_pack, context=context)
    measurers: list[Measurer] = []
    source_of: list[int] = []
    for number, of in enumerate(sources):
        for rows in open_sources(of, cache=cache):
            reader = RecordReader(rows=rows, of=of, settings=settings, tokenizer=tokenizer)
            measurers.append(Measurer(reader=reader, candidates=tuple(candidates), images=images, budget=budget))
            source_of.append(number)
    folder = cache / "sizes" if cache is not None else None
    measured = measure(measurers, cache=folder, workers=workers, bad=bad)
    parts = [
        _Part(reader=measurer.reader, source=number, rows=kept, table=table)
        for measurer, number, (table, kept) in zip(measurers, source_of, measured, strict=True)
    ]
    if not any(len(part.rows) for part in parts):
        named = ", ".join(of.path for of in sources)
        saw = "an empty file"
        if bad.skipped:
            saw = f"none; all {len(bad.skipped)} rows were skipped, the first: {bad.skipped[0]}"
        raise UserError(f"{named}: empty dataset: expected at least one conversation, found {saw}")
    columns = {name: np.concatenate([part.column(name) for part in parts]) for name in ("content", "learned")}
    sizes = Sizes.concatenate([sizes_of(part.table).take(part.rows) for part in parts])
    return Dataset(
        records=Records(
            [part.reader for part in parts],
            np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.rows) for part in parts]),
            np.concatenate([part.rows for part in parts]),
        ),
        sizes=sizes,
        source_of=np.repeat(
            np.array([part.source for part in parts], dtype=np.int32), [len(part.rows) for part in parts]
        ),
        content_keys=columns["content"],
        picture_keys=np.concatenate([part.picture_keys() for part in parts]),
        sources=tuple(_source(of, [p for p in parts if p.source == i], bad) for i, of in enumerate(sources)),
        fingerprint=_fingerprint(tokenizer, sizes, columns["learned"]),
        skipped=tuple(bad.skipped),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """One file or table of a source, measured."""

    reader: RecordReader
    source: int
    rows: np.ndarray  # int64, those that can be used
    table: pa.Table

    def column(self, name: str) -> np.ndarray:
        return column(self.table, name)[self.rows]

    def picture_keys(self) -> np.ndarray:
        """uint64, of the pictures of the rows that can be used."""
        states = pictures(self.table).field("state")  # of 16 bytes each, of which the first 8 will do
        halves = np.frombuffer(states.buffers()[1], dtype="<u8")[2 * states.offset :][: 2 * len(states)]
        return halves[2 * sizes_of(self.table).images_of(self.rows)]


def _source(of: SourceSettings, parts: Sequence[_Part], bad: BadRecords) -> Source:
    files = {part.reader.rows.name for part in parts}
    unknown: Counter[str] = Counter()
    for part in parts:
        for names, count in count_values(part.table, "unknown", part.rows).items():
            unknown.update(dict.fromkeys(json.loads(names) if names else [], count))
    return Source(
        settings=of,
        rows=sum(len(part.table) for part in parts),
        kept=sum(len(part.rows) for part in parts),
        form=", ".join(dict.fromkeys(part.reader.form for part in parts if len(part.table))),
        unknown=dict(unknown.most_common()),
        first_skipped=next((error for error in bad.skipped if error.source in files), None),
    )


def _fingerprint(tokenizer: Tokenizer, sizes: Sizes, learned: np.ndarray) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for numbers in (learned, sizes.tokens, sizes.supervised, sizes.first_image, sizes.grids):
        digest.update(np.ascontiguousarray(numbers).data)
    return COLUMNS + digest.hexdigest()
