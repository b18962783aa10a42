"""Opens one file of rows: JSON text, plain or compressed, Parquet, Arrow, CSV."""

from __future__ import annotations

import itertools
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data.sources.array import ArrayError, find_elements
from data.sources.arrow_rows import SpooledRows
from data.sources.compressed import Compression, CompressionError, decompressed
from data.sources.content import content_hash, kept_array
from data.sources.json_rows import JsonRows, decode_row
from data.sources.kept_tables import kept_table
from data.sources.kinds import HEAD, kind_of_file, kind_of_text
from data.sources.lines import find_lines
from data.sources.place import Place
from data.sources.rows import Rows
from data.sources.spool import write_spool
from data.sources.tables import open_table
from vl2.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

EXPECTED = "JSON lines, a JSON array (both also as .gz or .zst), Parquet, Arrow or CSV"


def open_file(place: Place) -> Rows:
    """Open a file by what it holds.

    Raises:
        UserError: no regular file, or none that can be read.
    """
    _check_regular(place)
    try:
        kind = kind_of_file(place.path, name=place.name)
        fingerprint = content_hash(place.path, place.cache)
        if kind == "lines" or kind == "empty":
            return _open_json(place, fingerprint, "lines", find_lines)
        if kind == "array":
            return _open_json(place, fingerprint, "elements", find_elements)
        if kind == "gzip" or kind == "zstd":
            return _open_compressed(place, fingerprint, kind)
        return open_table(place, fingerprint, kind)
    except PermissionError as error:
        raise UserError(f"{place.name}: expected a data file that can be read, found: {error.strerror}") from None


def _open_json(place: Place, fingerprint: str, what: str, find: Callable[[BinaryIO], np.ndarray]) -> Rows:
    def spans() -> np.ndarray:
        with place.path.open("rb") as file:
            if what == "lines":
                _check_lines(place, file.read(HEAD))
                file.seek(0)
            return find(file)

    try:
        found = kept_array(place.kept("rows", f"{fingerprint}.{what}.npy"), spans)
    except ArrayError as error:
        raise _array_error(place, error) from None
    return JsonRows(place.path, found, name=place.name, folder=place.folder, fingerprint=fingerprint)


def _check_lines(place: Place, head: bytes) -> None:
    """Refuse one object over many lines, each of which would be a bad row."""
    if head.strip().split(b"\n", 1)[0].strip() in (b"{", b"\xef\xbb\xbf{"):
        raise UserError(
            f"{place.name}: expected JSON lines, which hold one whole object a line, or a JSON array, found an object "
            "over several lines; write [ and ] around the objects and commas between them"
        )


def _array_error(place: Place, error: ArrayError) -> UserError:
    """Blame the first row that is no JSON: a quote left open moves all borders after it."""
    with place.path.open("rb") as file:
        for start, stop, number in error.spans.tolist():
            file.seek(start)
            decode_row(file.read(stop - start).strip(), source=place.name, number=number)
    return UserError(f"{place.name}: {error.problem}, after row {error.elements}; write the file again")


def _open_compressed(place: Place, fingerprint: str, compression: Compression) -> Rows:
    def build(folder: Path) -> Dataset:
        blocks = decompressed(place.path, compression)
        try:
            first = next(blocks, b"")
        except CompressionError as error:
            raise UserError(f"{place.name}: {error}, before the first row; fetch or compress it again") from None
        is_array = kind_of_text(first[:HEAD]) == "array"
        return write_spool(itertools.chain([first], blocks), folder, is_array=is_array, name=place.name)

    table = kept_table(place.kept("tables", fingerprint), build, name=place.name, size=place.path.stat().st_size)
    return SpooledRows(table, name=place.name, folder=place.folder, fingerprint=fingerprint)


def _check_regular(place: Place) -> None:
    """Check that a path is a regular file: to open a pipe would wait for ever."""
    try:
        mode = place.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{place.name}: expected a data file ({EXPECTED}), found nothing there") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, which no file name can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{reprlib.repr(place.name)}: expected a data file, found: {reason}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{place.name}: expected a data file ({EXPECTED}), found {found} there")
