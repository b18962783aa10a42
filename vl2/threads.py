"""Compiled loops on all cores that this process may use.

They run on threads of Python's, which such loops do not hold up, beside those of the matrix products; numba's own way
to those ends a forked child. A row's numbers do not depend on who computes them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)  # as the matrix products have
LEAST = 1 << 16  # numbers of a loop that is shared out: with fewer a thread takes longer to wake than to help
_PARTS = 4  # of each thread: who is late, because the products' threads still spin on its core, takes fewer

_pool: ThreadPoolExecutor | None = None


def in_parts(work: Callable[[int, int], object], rows: int, numbers: int) -> None:
    """Calls `work` with the bounds of parts that make up all rows, on several threads at once.

    Args:
        work: does the rows from the first bound to before the second.
        rows: of all parts.
        numbers: that are passed over.
    """
    if THREADS == 1 or numbers < LEAST or rows < 2:
        work(0, rows)
        return
    number = min(rows, _PARTS * THREADS)
    parts = itertools.count()

    def help_out() -> None:
        while (part := next(parts)) < number:
            work(rows * part // number, rows * (part + 1) // number)

    helpers = [_threads().submit(help_out) for _ in range(min(rows, THREADS) - 1)]
    help_out()
    for helper in helpers:
        if not helper.cancel():  # one that never began has nothing left to do
            helper.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="kernels")
    return _pool


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)
