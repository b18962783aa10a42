"""Work that goes on in a thread while training does: one piece at a time, whose error comes back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """A thread for pieces of work that follow each other.

    An error of the work is raised once, in the thread that calls `check`, `join` or `start` next.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with a piece of work as soon as the one before is done."""
        self.join()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise what went wrong, without waiting for what still goes on."""
        if self._work is not None and self._work.done():
            self.join()

    def join(self) -> None:
        """Wait until nothing goes on any more."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
