"""What processes that talk to each other do where the system has little shared memory (Docker gives 64 MB)."""

from __future__ import annotations

import sys

from train.machine.disk import NCCL_SHARED_BYTES
from train.machine.memory import gigabytes


def spare_shared_memory(environ: dict[str, str], room: int | None) -> None:
    """Makes NCCL go without shared memory where there is too little, and says so: it would die of SIGBUS.

    Args:
        environ: of the processes, changed in place.
        room: free bytes of /dev/shm.
    """
    if room is None or room >= NCCL_SHARED_BYTES or "NCCL_SHM_DISABLE" in environ:
        return
    environ["NCCL_SHM_DISABLE"] = "1"
    print(
        f"note: /dev/shm has {gigabytes(room)} free: the GPUs talk without shared memory (NCCL_SHM_DISABLE=1), which "
        "is slower where they cannot reach each other directly; start the container with --shm-size=1g",
        file=sys.stderr,
    )
