"""Remembers what was measured, in columns on disk, so that a second start measures only what is new or changed.

A table holds a row for each row of one file; its name is made of everything else that decides a size, of the file's
content and of its place. When the content changed, the rows that stayed are found in the table of before by hashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers

from data.images.reader import ImageReader
from data.images.ref import picture_root
from data.records import RecordReader
from data.sizes import Sizes
from vl2.tiles import Resolution

logger = logging.getLogger(__name__)

_DECIDING = ("prompt", "tiles", "tokenizer")  # of vl2
NOT_MEASURED = -1  # tokens of a row that was not, or that could not be used: it is looked at anew, as it may be mended
GONE = bytes(16)  # state of a picture that cannot be had, which is looked at anew
_TABLES_KEPT = 4096
_BYTES_KEPT = 2 << 30
_HEAD_BYTES = 64
_OLDER_TRIED = 4  # tables of before in which rows are looked for

IMAGE = pa.struct(
    [
        ("kind", pa.string()),  # of its ImageRef
        ("name", pa.large_string()),  # ten million paths are more than 2 GB
        ("state", pa.binary(16)),  # hash of `ImageReader.state`
        ("columns", pa.uint8()),
        ("rows", pa.uint8()),
    ]
)
SCHEMA = pa.schema(
    [
        ("row_key", pa.binary(16)),  # hash of the row as it lies in the file
        ("tokens", pa.int32()),
        ("supervised", pa.int32()),
        ("content", pa.uint64()),  # hash of what the conversation says and shows
        ("learned", pa.uint64()),  # hash of that and of what is learned of it
        ("unknown", pa.large_string()),  # JSON list of the columns that nobody reads; empty: none
        ("images", pa.large_list(IMAGE)),
    ]
)


def hash_key(content: bytes) -> bytes:
    """Hash to the 16 bytes that rows and states are found by."""
    return hashlib.blake2b(content, digest_size=16).digest()


def state_key(state: str | None) -> bytes:
    """Hash of `ImageReader.state`; GONE of a picture that cannot be had."""
    return GONE if state is None else hash_key(state.encode("utf-8", "surrogatepass"))


def sizes_of(table: pa.Table) -> Sizes:
    """Read the sizes out of a table: of its rows that were not measured, NOT_MEASURED tokens."""
    first_image = _combined(table, "images").offsets.to_numpy()
    shown = pictures(table)
    grids = np.stack([shown.field(name).to_numpy() for name in ("columns", "rows")], axis=1)
    return Sizes(
        tokens=column(table, "tokens"),
        supervised=column(table, "supervised"),
        first_image=first_image - first_image[0],
        grids=grids,
    )


def pictures(table: pa.Table) -> pa.StructArray:
    """The pictures of all rows of a table, one after the other."""
    return _combined(table, "images").flatten()


def forget(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The table with some rows blank.

    Args:
        table: of N rows.
        rows: bool [N].
    """
    kept = np.where(rows, len(table), np.arange(len(table)))
    return pa.concat_tables([table, blank(1)]).take(pa.array(kept))


def column(table: pa.Table, name: str) -> np.ndarray:
    """One column of numbers of a table."""
    return _combined(table, name).to_numpy(zero_copy_only=False)


def count_values(table: pa.Table, name: str, rows: np.ndarray) -> dict[str, int]:
    """How often each text stands in a column, among some rows."""
    found = pc.value_counts(_combined(table, name).take(pa.array(rows)))
    return {entry["values"]: entry["counts"] for entry in found.to_pylist()}


def blank(count: int) -> pa.Table:
    """A table of rows that were not measured."""
    fills = {"row_key": bytes(16), "tokens": NOT_MEASURED, "unknown": ""}
    flat = [field for field in SCHEMA if field.name != "images"]
    columns = [pa.repeat(pa.scalar(fills.get(field.name, 0), field.type), count) for field in flat]
    no_images = pa.LargeListArray.from_arrays(np.zeros(count + 1, dtype=np.int64), pa.array([], IMAGE))
    return pa.table([*columns, no_images], schema=SCHEMA)


class SizeTable:
    """The tables of one file's rows under everything that decides a size; without a folder it remembers nothing."""

    def __init__(
        self, folder: Path | None, reader: RecordReader, *, candidates: Sequence[Resolution], images: ImageReader
    ):
        """Name the table; nothing is read yet.

        Args:
            folder: where tables are kept.
            reader: of the rows.
            candidates: resolutions (width, height) in pixels an image may be shown at.
            images: opens the pictures.
        """
        self.folder, self.reader = folder, reader
        place = hash_key(os.path.join(reader.rows.folder, reader.rows.name).encode("utf-8", "surrogateescape"))
        self._decides = _decides(reader, candidates, images)
        self._content = f"{self._decides}-{hash_key(reader.rows.fingerprint.encode()).hex()[:16]}-"
        self._place = f"-{place.hex()[:16]}.arrow"

    def load(self) -> pa.Table | None:
        """Return what was measured of a file with this very content: a row for each of its rows."""
        for path in self._named(self._content):
            table = _read(path)
            if table is not None and len(table) == len(self.reader.rows):
                with contextlib.suppress(OSError):
                    os.utime(path)  # the tables used last are kept
                return self._here(table)
        return None

    def older(self) -> list[pa.Table]:
        """Tables of other content under the same settings: rows that stayed may be in one.

        Returns:
            Those of a file at this place first, then the newest.
        """
        tables = map(_read, self._named(f"{self._decides}-")[:_OLDER_TRIED])
        return [self._here(table) for table in tables if table is not None]

    def save(self, table: pa.Table) -> None:
        """Keep a table; the file is replaced whole, so a reader never sees half of it."""
        if self.folder is None:
            return
        path = self.folder / f"{self._content.removesuffix('-')}{self._place}"
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        table = table.replace_schema_metadata({"folder": str(self.reader.rows.folder)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(bytes(_HEAD_BYTES))
                with pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            with pa.memory_map(str(temporary)) as written:
                head = _head(written.read_buffer()[_HEAD_BYTES:])
            with temporary.open("r+b") as file:
                file.write(head)
            os.replace(temporary, path)
        except OSError as error:  # a read-only or full disk costs time in the next run, nothing else
            logger.warning("size table %s cannot be written: %s", path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _named(self, prefix: str) -> list[Path]:
        """Tables whose names begin so: those of this place, then those used last."""
        paths = _by_age(self.folder, prefix) if self.folder else []
        return sorted(paths, key=lambda path: not path.name.endswith(self._place))

    def _here(self, table: pa.Table) -> pa.Table:
        """Blank what names a picture by its place, when the file has been moved: the same name is another there."""
        if (table.schema.metadata or {}).get(b"folder") == str(self.reader.rows.folder).encode():
            return table
        pictured = pc.greater(pc.list_value_length(table["images"]), 0)
        if not pc.any(pictured).as_py():
            return table
        return forget(table, _combined(pa.table({"pictured": pictured}), "pictured").to_numpy(zero_copy_only=False))


def _decides(reader: RecordReader, candidates: Sequence[Resolution], images: ImageReader) -> str:
    """Digest of all that decides a size besides the row and the pictures."""
    of, settings = dataclasses.asdict(reader.of), dataclasses.asdict(reader.settings)
    for name in ("path", "name", "form", "repeat", "limit"):  # which rows are taken and how often; `reader.form` counts
        del of[name]
    for name in ("on_bad_record", "max_bad"):
        del settings[name]
    of["image_root"] = picture_root(of["image_root"])
    of["columns"] = dict(of["columns"])
    decides = [_code(), reader.tokenizer.fingerprint, list(candidates), repr(images), reader.form, of, settings]
    return hash_key(json.dumps(decides, sort_keys=True).encode()).hex()[:16]


@functools.cache
def _code() -> str:
    """Hash of the code that measures, ours and the libraries': what it finds today it may not have found before."""
    digest = hashlib.blake2b(f"{tokenizers.__version__} {PIL.__version__}".encode(), digest_size=16)
    data = Path(__file__).parent
    for path in [*sorted(data.rglob("*.py")), *(data.parent / "vl2" / f"{name}.py" for name in _DECIDING)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> pa.Table | None:
    """Map a table into memory: its pages are read when they are used, and take none that others could not have."""
    try:
        with pa.memory_map(str(path)) as file:
            whole = file.read_buffer()
        head, content = whole[:_HEAD_BYTES], whole[_HEAD_BYTES:]
        if head != _head(content):
            raise pa.ArrowInvalid("it is damaged")
        table = pa.ipc.open_file(content).read_all()
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowInvalid("other columns than expected")
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:  # whatever is wrong with the file, its content can be measured again
        logger.warning("size table %s cannot be read (%s); measuring everything again", path, error)
        return None
    return table


def _head(content: pa.Buffer) -> bytes:
    """What stands before a table: a checksum, as long as its columns are aligned."""
    return hashlib.blake2b(content, digest_size=_HEAD_BYTES).digest()


def _combined(table: pa.Table, name: str) -> pa.Array:
    chunks = table[name].combine_chunks()
    return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks


def _by_age(folder: Path, prefix: str = "") -> list[Path]:
    """The tables in a folder whose names begin so, the one used last first."""
    names, found = [], []
    with contextlib.suppress(OSError):  # no folder
        names = os.listdir(folder)
    for path in (folder / name for name in names if name.startswith(prefix) and name.endswith(".arrow")):
        with contextlib.suppress(OSError):  # another process removed it meanwhile
            found.append((-path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def forget_old(folder: Path) -> None:
    """Remove the tables that were not used for longest, beyond so many and so much."""
    num_bytes = 0
    for i, path in enumerate(_by_age(folder)):
        with contextlib.suppress(OSError):
            num_bytes += path.stat().st_size
            if i and (i >= _TABLES_KEPT or num_bytes > _BYTES_KEPT):
                path.unlink()
