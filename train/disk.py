"""Room on the disk: looked at before something is written, and said with figures when it runs out."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.checkpoint import temporary_folder


def check_space(target: Path, num_bytes: int, what: str) -> None:
    """Refuse to write what does not fit.

    Args:
        target: where it will lie; it need not exist yet.
        num_bytes: what will be written.
        what: the setting to change, for the error.

    Raises:
        ValueError: with what is needed and what is free.
    """
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ValueError(
            f"{what}: no room: {num_bytes / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free in {place}; "
            f"free {(num_bytes - free) / 1e9:.2f} GB or give a place on another disk"
        )


@contextmanager
def whole_or_nothing(target: Path, num_bytes: int, what: str) -> Iterator[None]:
    """Around `write_folder`: whatever goes wrong, what was half written goes too.

    Args:
        target: the folder's final place.
        num_bytes: what will be written.
        what: the setting to change, for the error.

    Raises:
        ValueError: when the disk is full; every other error as it is.
    """
    temporary = temporary_folder(target)
    try:
        yield
    except BaseException as problem:
        written = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        shutil.rmtree(temporary, ignore_errors=True)
        left = f"{temporary} could not be removed" if temporary.exists() else "the half-written folder was removed"
        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"{what}: the disk is full after {written / 1e9:.2f} of {num_bytes / 1e9:.2f} GB "
                f"({problem.strerror}); {left}; make room or give a place on another disk"
            ) from problem
        if temporary.exists():
            print(f"warning: {left}", file=sys.stderr)
        raise
