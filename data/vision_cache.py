"""What a frozen vision tower makes of pictures, kept on disk: a file for each picture and grid, shared by runs.

    pictures/3f/3f61...    a link, by the state of a picture's file; its text is the hash of the picture's content
    seen/a0/a09c...-2x1    by that hash and the grid: the numbers of the distinct tiles, and their hash

A folder holds what one tower makes, computed in one way; `about` says which, and another one has another folder. Files
are written whole or not at all and what is read is checked, so processes may share a folder, and a damaged file is one
that is not there. Two that miss the same picture compute it twice, which does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.size_table import GONE, state_key
from vl2.tiles import Grid, num_tiles

logger = logging.getLogger(__name__)

See = Callable[[np.ndarray], np.ndarray]
"""Tiles uint8 [n, 3, 384, 384] -> what the tower makes of them [n, rows, width]."""

ABOUT = "about.json"
_DIGEST_BYTES = 16
_ABANDONED = 3600  # seconds after which a half-written file has no writer any more
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def num_distinct(grid: Grid) -> int:
    """Count the tiles of a picture that need encoding: the only local tile is the global view again."""
    return 1 if tuple(grid) == (1, 1) else num_tiles(grid)


@dataclass(kw_only=True)
class VisionCache:
    """Numbers of pictures, of one tower. Holds nothing open, so forked workers may share one."""

    folder: Path
    about: dict[str, Any]
    """What the numbers depend on beside the picture; decides the folder's name."""
    shape: tuple[int, int]
    """Rows of a tile, and their width."""
    dtype: str
    """Of numpy; bfloat16 is kept as uint16."""
    images: ImageReader
    writable: bool = field(default=True, init=False)

    @property
    def place(self) -> Path:
        """Folder of this tower's numbers."""
        return self.folder / hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]

    def num_bytes(self, grid: Grid) -> int:
        """Bytes that a picture takes."""
        return num_distinct(grid) * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize + _DIGEST_BYTES

    # ---- looking

    def name(self, picture: ImageRef, grid: Grid) -> str:
        """What a picture is called here: by its content, the way it is read, and its grid.

        Raises:
            ImageError: it cannot be had.
        """
        state = state_key(self.images.state(picture))
        content = self._content(state.hex()) if state != GONE else None
        if content is None:
            content = self.images.content_hash(picture)
            if state != GONE:
                self._link(state.hex(), content)
        return f"{content}-{grid[0]}x{grid[1]}"

    def holds(self, name: str, grid: Grid) -> bool:
        """Whether the numbers of a picture are there and whole; a damaged file is named in a warning."""
        try:
            with self._file(name).open("rb") as file:
                data = file.read()
        except OSError:
            return False
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if len(data) == self.num_bytes(grid) and _digest(body) == digest:
            return True
        logger.warning("%s is damaged; the picture is seen again", self._file(name))
        return False

    def read(self, name: str, grid: Grid) -> np.ndarray | None:
        """Map the numbers of a picture that `holds` found, [n, rows, width]; None: they are there no more."""
        path = self._file(name)
        try:
            if path.stat().st_size != self.num_bytes(grid):
                return None
            return np.memmap(path, dtype=self.dtype, mode="r", shape=(num_distinct(grid), *self.shape))
        except OSError:
            return None

    def known(self) -> tuple[dict[int, str], set[str]]:
        """What lies in the folder: contents by the first 8 bytes of their states, and names of the pictures seen."""
        contents: dict[int, str] = {}
        for entry in _entries(self.place / "pictures"):
            with contextlib.suppress(OSError, ValueError):
                contents[int.from_bytes(bytes.fromhex(entry.name)[:8], "little")] = os.readlink(entry.path)
        seen = set()
        for entry in _entries(self.place / "seen"):
            if not entry.name.startswith("."):
                seen.add(entry.name)
            elif self.writable and time.time() - entry.stat().st_mtime > _ABANDONED:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
        return contents, seen

    # ---- what a batch needs

    def gather(
        self, names: Sequence[str], kept: Sequence[bool], grids: Sequence[Grid], tiles: np.ndarray | None, see: See
    ) -> np.ndarray | None:
        """The numbers of all distinct tiles of some pictures, in their order, [n, rows, width]; new ones are kept.

        Args:
            names: of the pictures; empty: not to be kept.
            kept: whether they are here.
            grids: of all pictures.
            tiles: of those that are not, each one's global view first.
            see: the tower.

        Returns:
            None when one that was here is here no more.
        """
        parts: dict[int, np.ndarray] = {}
        for i, (name, grid) in enumerate(zip(names, grids, strict=True)):
            if kept[i]:
                found = self.read(name, grid)
                if found is None:
                    return None
                parts[i] = found
        missing = [i for i in range(len(names)) if not kept[i]]
        if missing:
            assert tiles is not None
            ends = np.cumsum([num_tiles(grids[i]) for i in missing]).tolist()
            starts = [0, *ends[:-1]]
            wanted = [start + k for i, start in zip(missing, starts) for k in range(num_distinct(grids[i]))]
            made = see(tiles[wanted])
            until = np.cumsum([num_distinct(grids[i]) for i in missing])
            for i, part in zip(missing, np.split(made, until[:-1]), strict=True):
                parts[i] = part
                if names[i]:
                    self._put(names[i], part)
        return np.concatenate([parts[i] for i in range(len(names))])

    # ---- writing

    def prepare(self) -> str:
        """Make the folder; what keeps it from being written to, in words, or nothing."""
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            _write(self.place / ABOUT, json.dumps(self.about, indent=2, sort_keys=True).encode())
        except OSError as problem:
            self.writable = False
            return _reason(problem)
        return ""

    def _put(self, name: str, numbers: np.ndarray) -> None:
        assert numbers.dtype == self.dtype and numbers.shape[1:] == self.shape
        data = np.ascontiguousarray(numbers).tobytes()
        self._try(lambda: _write(self._file(name), data + _digest(data)))

    def _link(self, state: str, content: str) -> None:
        path = self.place / "pictures" / state[:2] / state

        def link() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.symlink(content, path)

        self._try(link)

    def _try(self, write: Callable[[], None]) -> None:
        """Write, as long as that goes well; the run needs none of it."""
        if not self.writable:
            return
        try:
            write()
        except OSError as problem:
            self.writable = False
            logger.warning(
                "vision cache %s: %s; the run goes on and keeps no further pictures", self.place, _reason(problem)
            )

    def _content(self, state: str) -> str | None:
        try:
            return os.readlink(self.place / "pictures" / state[:2] / state)
        except OSError:
            return None

    def _file(self, name: str) -> Path:
        return self.place / "seen" / name[:2] / name


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in the folders in a folder."""
    found: list[os.DirEntry] = []
    with contextlib.suppress(OSError):
        for inner in os.scandir(folder):
            with contextlib.suppress(OSError):
                found.extend(os.scandir(inner.path))
    return found


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _reason(problem: OSError) -> str:
    if problem.errno in _FULL:
        return "the disk is full"
    return "it cannot be written to" if problem.errno in _CANNOT_WRITE else f"{problem.strerror}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
