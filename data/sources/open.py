"""Opens a source: finds what lies at its path and gives its rows."""

from __future__ import annotations

import errno
import glob
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.settings import SourceSettings
from data.sources.files import open_file
from data.sources.place import Place
from data.sources.repository import is_saved, open_folder, open_name, open_saved
from data.sources.rows import Rows
from vl2.errors import UserError

_LAYOUT = "sources-1"
"""Folder in the cache; another number when what is kept there means something else."""
_PARTS = re.compile(r"(?P<path>.+?)(?::(?P<config>[^:@/]+))?(?:@(?P<split>[^:@/]+))?")
_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
# What ends so is a file that is not there, not a data set on the hub.
_OF_FILES = re.compile(r"\.(jsonl?|ndjson|txt|gz|zst|parquet|arrow|feather|csv|tsv)", re.IGNORECASE)


def open_sources(settings: SourceSettings, *, cache: Path | None) -> list[Rows]:
    """Open what a source's path names.

    In this order: a file or folder that lies there; what a glob finds, in the order of the names; a folder with
    `:config@split` after it; a data set on the hub, likewise.

    Args:
        settings: `path`, `image_root` and `limit` of the source.
        cache: folder for what is worth keeping until the next start; None keeps nothing.

    Returns:
        One for each file, or table.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    root = Path(settings.image_root).expanduser().absolute() if settings.image_root else None
    path = Path(settings.path).expanduser()
    place = Place(path=path, name=settings.path, root=root, cache=cache / _LAYOUT if cache else None)
    try:
        found = _open(place)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UserError(
            f"{place.name}: more files than a process may hold open; raise `ulimit -n`, or join the files"
        ) from None
    return found if settings.limit is None else _first_rows(found, settings.limit)


def _open(place: Place) -> list[Rows]:
    if _exists(place.path):
        return _open_path(place)
    if re.search(r"[*?\[]", place.name):
        names = sorted(glob.glob(str(place.path), recursive=True))
        if not names:
            raise UserError(f"{place.name}: expected data files, found none that this pattern matches")
        return [rows for name in names for rows in _open_path(replace(place, path=Path(name), name=name))]
    parts = _PARTS.fullmatch(place.name)
    if parts:
        path, config, split = parts["path"], parts["config"] or "", parts["split"] or ""
        folder = Path(path).expanduser()
        if _exists(folder) and folder.is_dir():
            return _open_path(replace(place, path=folder), config, split)
        if _NAME.fullmatch(path) and not _OF_FILES.search(path) and not _is_below_a_folder(folder):
            return open_name(replace(place, root=place.root or Path.cwd()), path, config, split)
    return [open_file(place)]  # which says what is wrong


def _open_path(place: Place, config: str = "", split: str = "") -> list[Rows]:
    if not place.path.is_dir():
        return [open_file(place)]
    if is_saved(place.path):
        return [open_saved(place, split)]
    return open_folder(place, config, split)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _is_below_a_folder(path: Path) -> bool:
    return len(path.parts) > 1 and Path(path.parts[0]).is_dir()


class FirstRows:
    """The first rows of others; see `data.sources.rows.Rows`."""

    def __init__(self, rows: Rows, count: int):
        self.name, self.folder = rows.name, rows.folder
        self.fingerprint = hashlib.blake2b(f"{rows.fingerprint} {count}".encode(), digest_size=16).hexdigest()
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._rows[index]

    def number(self, index: int) -> int:
        """Number of a row."""
        return self._rows.number(index)

    def content(self, index: int) -> bytes:
        """Bytes of a row."""
        return self._rows.content(index)


def _first_rows(found: list[Rows], limit: int) -> list[Rows]:
    first: list[Rows] = []
    for rows in found:
        if limit <= 0:
            break
        first.append(rows if len(rows) <= limit else FirstRows(rows, limit))
        limit -= len(rows)
    return first
