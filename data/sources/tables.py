"""Opens tables by `datasets`, memory-mapped: Parquet, Arrow, CSV."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.sources.arrow_rows import ArrowRows
from data.sources.content import BLOCK, kept_array
from data.sources.json_rows import JsonRows
from data.sources.kept_tables import is_full, kept_table
from data.sources.kinds import Table
from data.sources.place import Place
from data.sources.rows import Rows
from vl2.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_BATCH = 1000  # rows of a Parquet file that are unpacked at once
_LONGEST = 200  # characters of another library's message in an error


class _NoRows(Exception):
    """A table without rows, of which `datasets` makes no table."""


def open_table(place: Place, fingerprint: str, kind: Table) -> Rows:
    """Open a table as rows.

    Args:
        place: where it lies.
        fingerprint: hash of its content.
        kind: what it is.

    Raises:
        UserError: it is damaged.
    """
    try:
        if kind == "csv":
            return _open_csv(place, fingerprint)
        table = _open_parquet(place, fingerprint) if kind == "parquet" else _open_arrow(place, fingerprint, kind)
    except _NoRows:
        none = np.empty((0, 3), np.int64)
        return JsonRows(place.path, none, name=place.name, folder=place.folder, fingerprint=fingerprint)
    return ArrowRows(table, name=place.name, folder=place.folder, fingerprint=fingerprint)


def _open_parquet(place: Place, fingerprint: str) -> Dataset:
    from datasets import Dataset  # here: the import takes seconds

    def build(folder: Path) -> Dataset:
        import pyarrow.parquet as pq

        with damage(place.name, "Parquet file"):
            if not pq.read_metadata(place.path).num_rows:
                raise _NoRows
            try:
                # Without a size `datasets` takes that of the first row group, and fails where it has no rows.
                return Dataset.from_parquet(str(place.path), cache_dir=str(folder), batch_size=_BATCH)
            except Exception as error:
                if not is_full(error.__cause__ or error):
                    _find_damage(place)
                raise

    return kept_table(place.kept("tables", fingerprint), build, name=place.name, size=place.path.stat().st_size)


def _find_damage(place: Place) -> None:
    """Say after which row a Parquet file can no longer be read; the error of `datasets` does not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(place.path) as file:
        whole = 0
        try:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(row_groups=[group], use_threads=False):
                    whole += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            text = shortened(error)
            raise UserError(
                f"{place.name}: cannot read the Parquet file after row {whole}: {text}; fetch or write it again"
            ) from None


def _open_arrow(place: Place, fingerprint: str, kind: Literal["arrow file", "arrow stream"]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    with damage(place.name, "Arrow file"):
        if kind == "arrow stream":
            dataset = Dataset.from_file(str(place.path))
        else:  # the kind with a directory at its end, as Feather has; `datasets` maps streams only
            with pa.memory_map(str(place.path)) as file:
                table = pa.ipc.open_file(file).read_all()
            dataset = Dataset(MemoryMappedTable(table, str(place.path)))
        check_table(dataset, place.kept("checked", f"{fingerprint}.npy"))
        return dataset


def check_table(dataset: Dataset, kept: Path | None) -> None:
    """Check every offset and text of a table once: a wrong one, followed, would read foreign memory.

    Args:
        dataset: memory-mapped from a file of the user's.
        kept: named after its content; where the result is kept.
    """

    def check() -> np.ndarray:
        table: pa.Table = dataset.data.table
        table.validate(full=True)
        return np.array([table.num_rows])

    kept_array(kept, check)


def _open_csv(place: Place, fingerprint: str) -> ArrowRows:
    """Open a CSV file, each cell as the text that stands there; rows without any are none."""
    from datasets import Dataset, Features, Value

    def build(folder: Path) -> Dataset:
        import pandas as pd  # datasets reads CSV by it

        _check_text(place)
        with damage(place.name, "CSV file"):
            form = {
                "sep": _separator(place),
                "encoding": "utf-8-sig",
                "na_filter": False,
                "keep_default_na": False,
                "skip_blank_lines": False,
            }
            first = pd.read_csv(place.path, nrows=1, **form)
            if first.empty:
                raise _NoRows
            features = Features({str(name): Value("string") for name in first.columns})
            return Dataset.from_csv(str(place.path), features=features, cache_dir=str(folder), **form)

    table = kept_table(place.kept("tables", fingerprint), build, name=place.name, size=place.path.stat().st_size)

    def filled() -> np.ndarray:
        import pyarrow.compute as pc

        some = np.zeros(len(table), dtype=bool)
        for column in table.data.columns:
            lengths = pc.fill_null(pc.utf8_length(column), 0)
            some |= lengths.to_numpy() > 0
        return np.flatnonzero(some)

    kept = kept_array(place.kept("rows", f"{fingerprint}.filled.npy"), filled)
    return ArrowRows(
        table,
        name=place.name,
        folder=place.folder,
        fingerprint=fingerprint,
        kept=kept,
        first=2,
        empty_is_absent=True,
    )


def _check_text(place: Place) -> None:
    """Refuse a NUL: pandas ends the cell there, without a word."""
    with place.path.open("rb") as file:
        position = 0
        while block := file.read(BLOCK):
            if b"\0" in block:
                raise UserError(
                    f"{place.name}: expected a CSV file in UTF-8, found a NUL at byte {position + block.index(0)}; "
                    "save it as UTF-8 (it may be UTF-16)"
                )
            position += len(block)


def _separator(place: Place) -> str:
    """The one of the usual separators that stands most often in the line of names."""
    with place.path.open("rb") as file:
        names = file.readline(1 << 16)
    return max(",\t;|", key=lambda separator: names.count(separator.encode()))


@contextmanager
def damage(name: str, kind: str, *others: type[Exception]) -> Iterator[None]:
    """Turn what `datasets`, Arrow and pandas raise on damaged files into an error of the user's, and `others` too."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UserError:
        raise
    except (DatasetsError, pa.ArrowException, OSError, ValueError, *others) as error:
        cause = error.__cause__ or error
        if is_full(cause):
            raise OSError(errno.ENOSPC, str(cause)) from None
        remedy = "" if kind == "folder" else "; fetch or write it again"
        raise UserError(f"{name}: cannot read the {kind}: {shortened(cause)}{remedy}") from None


def shortened(error: BaseException) -> str:
    """An error's text in one line of bounded length."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
