"""Free disk, shared memory included: whether what is to be written fits."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from train.machine.memory import gigabytes
from vl2.errors import UserError

# What NCCL wants of /dev/shm at the least for the cards of one machine; its manual asks for 1 GB.
NCCL_SHARED_BYTES = 2**29


def check_disk(target: Path, num_bytes: int, what: str) -> None:
    """Refuse to write what does not fit on the disk.

    Args:
        target: file or folder to write, there or not.
        num_bytes: that it will take.
        what: its name, for the message.

    Raises:
        UserError: with the bytes needed and the bytes free.
    """
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"{target}: no room on the disk: {what} takes {gigabytes(num_bytes)}, {gigabytes(free)} are free; "
            "free some, or give a folder on another disk"
        )


def shared_memory_room(folder: Path = Path("/dev/shm")) -> int | None:
    """Free bytes of the system's shared memory, which Docker cuts to 64 MB; None where there is none."""
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def is_full(problem: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return problem.errno in (errno.ENOSPC, errno.EDQUOT)
