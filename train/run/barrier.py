"""Waiting for the other processes, however long they take."""

from __future__ import annotations

import itertools
import time

import paddle.distributed as dist
from paddle.distributed import collective

from train.run.stop import check_peers

_POLL_SECONDS = (0.001, 0.05)  # the first wait, doubled up to the last: steps meet here as well as long evaluations
_numbers = itertools.count()


def barrier() -> None:
    """Return when every process has called this as often.

    Counted in the job's key-value store, because gloo's own barrier gives up after 30 seconds: rank 0 may measure data
    or ask questions for longer.

    Raises:
        PeerLost: the launcher says that one of them has failed.
    """
    world = dist.get_world_size()
    if world == 1:
        return
    key, store = f"barrier/{next(_numbers)}", collective._default_store

    def wait_for_all(name: str) -> None:
        pause, longest = _POLL_SECONDS
        while store.add(name, 0) < world:
            check_peers()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    store.add(f"{key}/come", 1)
    wait_for_all(f"{key}/come")
    store.add(f"{key}/gone", 1)
    if dist.get_rank() == 0:  # it holds the store, so it must not end while others still ask
        wait_for_all(f"{key}/gone")
