"""Stopping on SIGTERM and SIGINT: the first asks the run to finish its step and save, the second ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context in which the two signals are taken as a request; `signum` tells which came, 0 for none.

    A run that stopped exits with 128 + signum, the shell's convention: 143 after SIGTERM, 130 after SIGINT. So a caller
    tells "stopped and saved" from "finished" (0) and from an error (1, 2).
    """

    def __init__(self):
        self.signum = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signum:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signum = number
        # os.write: print may be interrupted in the middle of itself.
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving; once more ends it at once\n"
        os.write(2, text.encode())


def ignore_in_worker(_: int) -> None:
    """For data loader workers: a Ctrl-C reaches the whole process group, but the main process decides.

    Workers end when the loader closes, or when they see that their parent is gone.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
