"""Opens a source: finds what lies at its path and gives its rows."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np

from data.settings import SourceSettings
from data.sources.content import content_hash, kept_array
from data.sources.json_rows import JsonRows
from data.sources.lines import find_lines
from data.sources.rows import Rows
from vl2.errors import UserError


def open_sources(settings: SourceSettings, *, cache: Path | None) -> list[Rows]:
    """Open what a source's path names, each file by itself.

    Args:
        settings: `path` and `image_root` of the source.
        cache: folder for what is worth keeping until the next start; None keeps nothing.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    return [_open_file(Path(settings.path), name=settings.path, image_root=settings.image_root, cache=cache)]


def _open_file(path: Path, *, name: str, image_root: str, cache: Path | None) -> Rows:
    _check_file(path, name)
    fingerprint = content_hash(path, cache)
    index = cache / "rows" / f"{fingerprint}.lines.npy" if cache else None

    def find() -> np.ndarray:
        with path.open("rb") as file:
            return find_lines(file)

    folder = Path(image_root).expanduser().absolute() if image_root else path.absolute().parent
    return JsonRows(path, kept_array(index, find), name=name, folder=folder, fingerprint=fingerprint)


def _check_file(path: Path, name: str) -> None:
    """Check that a path is a regular file: to open a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError) as error:  # ValueError: a NUL, which no file name can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name!r}: expected a data file, found: {reason}") from None
    if not stat.S_ISREG(mode):
        kinds = {0: "nothing", stat.S_IFDIR: "a folder"}
        found = kinds.get(stat.S_IFMT(mode), "no regular file")
        raise UserError(f"{name}: expected a data file (JSON lines: one conversation a line), found {found} there")
