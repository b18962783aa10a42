"""What a file holds, as a hash, and arrays derived from it: both are kept, so that a second start reads nothing again.

Nothing kept is ever trusted beyond what it is named for: a lost, damaged or unwritable cache costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

BLOCK = 1 << 22
"""Bytes read at once."""
_MAPPED = 1 << 20  # bytes of an array that is left on disk
# Two changes within one tick of the kernel's clock leave the same times; what changed so recently is not kept.
_TICK = 100_000_000  # nanoseconds


def content_hash(path: Path, cache: Path | None) -> str:
    """Hash the bytes of a file, or return what was found before the file changed.

    "Before it changed" goes by its real path, size, modification and change times and inode: the change time is the
    kernel's, so that a file that was changed and given its old size and modification time back is read again.

    Args:
        path: a regular file.
        cache: folder for what was found; None keeps nothing.

    Returns:
        Hex digest of 32 characters.
    """
    started = time.time_ns()
    before = _state(path)
    kept = (
        cache / "hashes" / hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest() if cache else None
    )
    if kept:
        with contextlib.suppress(OSError, ValueError):
            state, _, found = kept.read_text("ascii").partition(" = ")
            if state == before and len(found) == 32:
                return found
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    settled = max(path.stat().st_ctime_ns, path.stat().st_mtime_ns) < started - _TICK
    if kept and settled and _state(path) == before:
        write_whole(kept, lambda file: file.write_text(f"{before} = {digest.hexdigest()}", "ascii"))
    return digest.hexdigest()


def kept_array(path: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of a .npy file, a large one memory-mapped; make and write it where none can be read.

    Args:
        path: named for all that the array depends on; None keeps nothing.
        make: makes the array.
    """
    if path is None:
        return make()
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _load(path)
    array = make()

    def save(file: Path) -> None:
        with file.open("wb") as out:  # np.save given a name adds ".npy" to it
            np.save(out, array, allow_pickle=False)

    if not write_whole(path, save):
        return array
    return _load(path)


def _load(path: Path) -> np.ndarray:
    # A mapped file counts as an open one: of a thousand small ones none is mapped.
    mapped = path.stat().st_size > _MAPPED
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def write_whole(path: Path, write: Callable[[Path], object]) -> bool:
    """Let `write` make a file under a temporary name and give it its own: a reader never sees half of it.

    Returns:
        Whether it is there now; a read-only or full disk is a warning.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be kept, the next start does this work again: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
