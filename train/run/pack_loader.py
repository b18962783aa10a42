"""Packs of a plan in the order of the steps, built ahead by worker processes.

Paddle's own loader leaves processes and segments in /dev/shm behind when the run is killed, and when one of its workers
is killed it raises wherever the training step happens to be.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

import numpy as np
import paddle

from data.processes import end_with_parent
from train.run.stop import SIGNALS
from vl2.errors import UserError

Pack = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: BaseProcess
    packs: Connection  # where they come out


class PackLoader(paddle.io.DataLoader):
    """The packs that a batch sampler names, one at a time; a DataLoader, as Trainer and its callbacks expect one.

    Worker w of n builds the packs w, w + n, w + 2n ... and hands them over through a pipe of its own, where the next
    one waits until it is fetched. Nothing is shared: a worker that dies closes its pipe and disturbs no other.

    Args:
        packs: builds the pack at an index.
        batch_sampler: batches of one index.
        num_workers: processes; 0: this process builds each pack when it is asked for.
        on_worker_killed: called when a signal ended a worker (that of a system short of memory, say), with what
            happened in words. Its packs are built by this process from then on, so that the step can be finished.
    """

    def __init__(
        self,
        packs: paddle.io.Dataset,
        *,
        batch_sampler: paddle.io.BatchSampler,
        num_workers: int,
        on_worker_killed: Callable[[str], None],
    ):
        super().__init__(packs, batch_sampler=batch_sampler, places=[paddle.CPUPlace()])
        self.num_processes, self.on_worker_killed = num_workers, on_worker_killed
        self._workers: list[_Worker | None] = []  # None in the place of one that was killed

    def __iter__(self) -> Iterator[Pack]:
        """Start the workers.

        Raises:
            UserError: a record that cannot be used, when its pack is fetched.
        """
        self.close()
        indices = [index for (index,) in self.batch_sampler]
        context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
        for first in range(min(self.num_processes, len(indices))):
            theirs = [worker.packs for worker in self._workers if worker]
            own = indices[first :: self.num_processes]
            self._workers.append(_start_worker(context, self.dataset, own, theirs))
        return (self._fetch(position, index) for position, index in enumerate(indices))

    def _fetch(self, position: int, index: int) -> Pack:
        place = position % max(len(self._workers), 1)
        worker = self._workers[place] if self._workers else None
        if worker is None:
            return self.dataset[index]
        try:
            pack = worker.packs.recv()
        except (EOFError, OSError):  # the end of the pipe, perhaps in the middle of a pack
            worker.process.join()
            code = worker.process.exitcode
            if code is None or code >= 0:
                raise RuntimeError(f"a data worker ended with exit code {code}; its traceback stands above") from None
            self._workers[place] = None
            self.on_worker_killed(f"a data worker was killed by {signal.Signals(-code).name} (out of memory?)")
            return self.dataset[index]
        if isinstance(pack, str):
            raise UserError(pack)
        return pack

    def close(self) -> None:
        """End the workers."""
        workers, self._workers = self._workers, []
        for worker in filter(None, workers):
            worker.process.kill()
            worker.process.join()
            worker.packs.close()


def _start_worker(
    context: BaseContext, packs: paddle.io.Dataset, indices: Sequence[int], theirs: Sequence[Connection]
) -> _Worker:
    receiving, sending = context.Pipe(duplex=False)
    arguments = (packs, indices, sending, [receiving, *theirs], os.getpid())
    process = context.Process(target=_build_packs, args=arguments, daemon=True)  # type: ignore[attr-defined]
    process.start()
    sending.close()  # so that the pipe ends with the worker
    return _Worker(process=process, packs=receiving)


def _build_packs(
    packs: paddle.io.Dataset, indices: Sequence[int], sending: Connection, theirs: Sequence[Connection], parent: int
) -> None:
    """What a worker does: a pack for each index, or the words of a record's error."""
    end_with_parent(parent)
    for number in SIGNALS:  # a Ctrl-C reaches the whole process group, but the main process decides
        signal.signal(number, signal.SIG_IGN)
    for connection in theirs:  # the other ends of the pipes, inherited: with them closed, they end with the parent
        connection.close()
    for index in indices:
        try:
            pack = packs[index]
        except UserError as error:
            pack = str(error)
        sending.send(pack)
