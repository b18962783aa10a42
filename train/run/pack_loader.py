"""Packs of a plan from data loader workers, to the trainer: errors travel as items, workers end with the loader."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

WORKER_SECONDS = 2.0  # for a data loader's worker to end by itself


class PackErrors(paddle.io.Dataset):
    """A dataset whose errors travel as items: a data loader's worker process would mangle an exception's message."""

    def __init__(self, packs: paddle.io.Dataset):
        super().__init__()
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        try:
            return self.packs[index]
        except ValueError as error:
            return {"error": np.frombuffer(str(error).encode(), dtype="uint8")}


class PackLoader(paddle.io.DataLoader):
    """A data loader that can be closed after an error, when the traceback keeps its iterator alive.

    Its workers take no signal (see `ignore_in_worker`), so one that is left would keep the process from exiting.
    """

    iterator = None

    def __iter__(self):
        self.iterator = super().__iter__()
        return self.iterator

    def close(self) -> None:
        """End the workers and threads; nothing when they have ended."""
        iterator, self.iterator = self.iterator, None
        if iterator is None:
            return
        workers = getattr(iterator, "_workers", [])
        if workers:
            iterator._try_shutdown_all(timeout=WORKER_SECONDS)
        else:
            iterator._try_shutdown_all()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
