"""Who uses a folder now: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vl2.errors import UserError

_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: set[TextIO] = set()


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file, which names the holder and is removed at the end.

    Args:
        path: of the lock file; its folder is there.
        what: is locked, for the message.

    Raises:
        UserError: another process holds it, "in use by process N on HOST"; or the file cannot be written.
    """
    file = _take(path, what)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before the lock is let go: nobody can have taken it yet
            _held.discard(file)
            file.close()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file; where the file system has no locks, nobody does."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as problem:
        return problem.errno in _TAKEN
    return False


def _take(path: Path, what: str) -> TextIO | None:
    while True:
        try:
            file = path.open("a+", encoding="utf-8")  # for appending: on NFS flock wants a file that may be written
        except OSError as problem:
            raise UserError(f"{what}: {path.parent} cannot be written to ({problem.strerror})") from problem
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if problem.errno in _TAKEN:
                raise UserError(f"{what}: in use by {holder}; wait until it ends, or give another folder") from problem
            print(f"warning: {what}: this file system has no locks ({problem.strerror})", file=sys.stderr)
            return None
        if _is_same(file, path):
            break
        file.close()  # its last holder removed it between our two calls
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.add(file)
    return file


def _is_same(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    """A forked worker that outlives its parent would hold the lock on."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
