"""Packs of a plan in the order of the steps, built ahead by worker processes.

Paddle's own loader leaves processes and segments in /dev/shm behind when the run is killed, and when one of its workers
is killed it raises wherever the training step happens to be.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import paddle

from data.processes import end_with_parent
from train.run.stop import SIGNALS
from vl2.errors import UserError

_PIPE_BYTES = 1 << 20  # what Linux lets anybody have: a pack of 9 MB fills 64 KB 140 times

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
        self._workers: list[_Worker] = []
        self._dead: set[int] = set()  # numbers of those that were killed
        self._packs: Generator[Pack, None, None] | None = None

    def __iter__(self) -> Iterator[Pack]:
        """Start the workers.

        Raises:
            UserError: a record that cannot be used, when its pack is fetched.
        """
        self.close()
        indices = [index for (index,) in self.batch_sampler]
        context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
        for first in range(min(self.num_processes, len(indices))):
            theirs = [worker.packs for worker in self._workers]
            own = indices[first :: self.num_processes]
            self._workers.append(_start_worker(context, self.dataset, own, theirs))
        self._packs = self._in_order(indices)
        return self._packs

    def _in_order(self, indices: Sequence[int]) -> Generator[Pack, None, None]:
        if not self._workers:
            yield from map(self.dataset.__getitem__, indices)
            return
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self._receive, 0)
            for position, index in enumerate(indices):
                pack = coming.result()
                if position + 1 < len(indices):  # received while the step computes with this one
                    coming = reader.submit(self._receive, position + 1)
                if pack is None:
                    self._report_death(position % len(self._workers))
                    pack = self.dataset[index]
                yield pack

    def _receive(self, position: int) -> Pack | None:
        """The pack at a position, from the worker whose turn it is; None when that worker is dead."""
        try:
            pack = _receive(self._workers[position % len(self._workers)].packs)
        except (EOFError, OSError):  # the end of the pipe, perhaps in the middle of a pack
            return None
        if isinstance(pack, str):
            raise UserError(pack)
        return pack

    def _report_death(self, number: int) -> None:
        process = self._workers[number].process
        process.join()
        code = process.exitcode
        if code is None or code >= 0:
            raise RuntimeError(f"a data worker ended with exit code {code}; its traceback stands above")
        if number not in self._dead:
            self._dead.add(number)
            self.on_worker_killed(f"a data worker was killed by {signal.Signals(-code).name} (out of memory?)")

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        if self._packs is not None:
            self._packs.close()  # its reader has met the ends of the pipes
        for worker in self._workers:
            worker.packs.close()
        self._workers, self._packs, self._dead = [], None, set()


def _start_worker(
    context: BaseContext, packs: paddle.io.Dataset, indices: Sequence[int], theirs: Sequence[Connection]
) -> _Worker:
    receiving, sending = context.Pipe(duplex=False)
    if sys.platform.startswith("linux"):
        with suppress(OSError):  # above what this user may have: it stays as it is
            fcntl.fcntl(sending.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
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
        _send(pack, sending)


def _send(pack: Pack | str, connection: Connection) -> None:
    """Send a pack, its arrays as they lie in memory: to pickle 9 MB of tiles would copy them twice."""
    buffers: list[pickle.PickleBuffer] = []
    frame = pickle.dumps(pack, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    connection.send((frame, [array.nbytes for array in arrays]))
    for array in arrays:
        left = array
        while left.nbytes:
            left = left[os.write(connection.fileno(), left) :]


def _receive(connection: Connection) -> Any:
    """Receive what `_send` sent, each array straight into its memory.

    Raises:
        EOFError: the sender ended.
    """
    frame, sizes = connection.recv()
    arrays = [np.empty(size, dtype=np.uint8) for size in sizes]
    for array in arrays:
        left = array.data
        while left.nbytes:
            count = os.readv(connection.fileno(), [left])
            if not count:
                raise EOFError
            left = left[count:]
    return pickle.loads(frame, buffers=arrays)
