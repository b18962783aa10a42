"""Rows of memory-mapped Arrow tables, read cell by cell: a third of what `datasets` takes for a row by index."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.record import RecordError
from data.sources.json_rows import decode_row

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


class _Cells:
    """A table's cells by row and column, as Arrow stores them: pictures of an Image feature stay encoded."""

    def __init__(self, dataset: Dataset):
        from datasets import ClassLabel

        batches = dataset.data.to_batches()
        self.columns = dataset.column_names
        self.classes = {name: kind.names for name, kind in dataset.features.items() if isinstance(kind, ClassLabel)}
        """Names of the classes of each column that holds their numbers."""
        self._stops = list(accumulate(batch.num_rows for batch in batches))
        self._batches = [[batch.column(name) for name in self.columns] for batch in batches]

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def row(self, index: int) -> list[pa.Scalar]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._stops, index)
        inside = index - (self._stops[batch - 1] if batch else 0)
        return [column[inside] for column in self._batches[batch]]


class ArrowRows:
    """The rows of a table; see `data.sources.rows.Rows`."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        name: str,
        folder: Path,
        fingerprint: str,
        kept: np.ndarray | None = None,
        first: int = 1,
        empty_is_absent: bool = False,
    ):
        """Take a table's rows.

        Args:
            dataset: memory-mapped.
            name, folder, fingerprint: see `Rows`.
            kept: int64 [N], the table's rows that are rows of the source; None: all of them.
            first: number of the table's first row.
            empty_is_absent: an empty text is an absent one, as in a CSV.
        """
        self.name, self.folder, self.fingerprint = name, folder, fingerprint
        self._cells = _Cells(dataset)
        self._kept, self._first, self._empty = kept, first, empty_is_absent

    def __len__(self) -> int:
        return len(self._cells) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, problems = self._read(index)
        for column, error in problems.items():
            raise RecordError(
                self.name, self.number(index), column, f"expected a cell that can be read, found: {error}"
            )
        return row

    def _read(self, index: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The cells of a row that can be read, and what is wrong with the others, by their columns."""
        row, problems = {}, {}
        for name, cell in zip(self._cells.columns, self._cells.row(self._place(index))):
            try:
                value = cell.as_py()
            except (ValueError, OverflowError) as error:  # text that is no UTF-8, a date that Python cannot hold
                problems[name] = str(error)
                continue
            classes = self._cells.classes.get(name)
            if classes and value is not None:
                if value >= len(classes):
                    problems[name] = f"class {value} of {len(classes)}, counted from 0"
                    continue
                value = classes[value] if value >= 0 else None  # -1: unknown
            if value is not None and not (self._empty and value == ""):
                row[name] = without_null(value)
        return row, problems

    def number(self, index: int) -> int:
        """Place of the row in its table, or in its CSV file, whose first is the row of names."""
        return self._place(index) + self._first

    def content(self, index: int) -> bytes:
        """The row as JSON; encoded pictures by their hash, cells that cannot be read by what is wrong with them."""
        return json.dumps(self._read(index), default=_shortened, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _place(self, index: int) -> int:
        return index if self._kept is None else int(self._kept[index])


class SpooledRows:
    """JSON rows from the file that `data.sources.spool` wrote; see `data.sources.rows.Rows`."""

    def __init__(self, dataset: Dataset, *, name: str, folder: Path, fingerprint: str):
        self.name, self.folder, self.fingerprint = name, folder, fingerprint
        self._cells = _Cells(dataset)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Any:
        return decode_row(self.content(index), source=self.name, number=self.number(index))

    def number(self, index: int) -> int:
        """Line of the row, or its place in the array."""
        number: int = self._cells.row(index)[0].as_py()
        return number

    def content(self, index: int) -> bytes:
        """Text of a row, without the space around it."""
        text: bytes = self._cells.row(index)[1].as_py()
        return text


def without_null(cell: Any) -> Any:
    """Drop the keys without a value: Arrow gives every object of a column the keys of all of them."""
    if isinstance(cell, dict):
        return {key: without_null(value) for key, value in cell.items() if value is not None}
    if isinstance(cell, list):
        return [without_null(value) for value in cell]
    return cell


def _shortened(cell: Any) -> str:
    return hashlib.blake2b(cell, digest_size=16).hexdigest() if isinstance(cell, bytes) else str(cell)
