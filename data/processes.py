"""Processes that end with their parent, however it ended; and work shared out over forked ones."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from vl2.errors import UserError

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_LIBC = ctypes.CDLL(None, use_errno=True)

Item = TypeVar("Item")
Result = TypeVar("Result")


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends; on Linux only.

    Args:
        parent: process id of the parent, which may have ended before this call.
        signum: SIGKILL by default, as a worker has nothing to save.
    """
    if not sys.platform.startswith("linux"):
        return
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signum)


def can_fork() -> bool:
    """Whether forked children may run the tokenizer and Pillow after Paddle's threads exist: not so on macOS."""
    return sys.platform.startswith("linux")


def map_forked(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Do a piece of work for each item in forked processes; `work` and all it holds is inherited, not sent.

    Args:
        work: what is done; it may not use Paddle.
        items: what it is done for, each of them sent.
        workers: processes.

    Returns:
        The results, in order.

    Raises:
        UserError: when a process was killed.
    """
    context = multiprocessing.get_context("fork")
    # An executor, not a Pool: it reports a killed child, where a Pool waits for ever.
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(work, os.getpid())) as executor:
        try:
            yield from executor.map(_work_on, items)
        except BrokenProcessPool:
            raise UserError(
                f"a process that measures the data was killed (out of memory?): {workers} were at work; give "
                f"data.measure_workers={max(1, workers // 2)}, which takes less memory. What was measured is kept"
            ) from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _start(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    end_with_parent(parent)
    # Here only: the parent's threads are its own business, but a fork within a fork's batch would wait for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work


def _work_on(item: Any) -> Any:
    assert _work is not None
    return _work(item)
