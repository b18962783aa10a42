"""Being asked to stop: the run finishes its step, saves and exits with a code that says why."""

from __future__ import annotations

import os
import signal
import sys
from threading import Event
from types import FrameType

from data.processes import end_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PEER_LOST = signal.SIGUSR1  # from the launcher, when another process of the run has failed
WORKER_KILLED, TIME_IS_UP = 1, 75  # exit codes; 75 is EX_TEMPFAIL: the same again, later


class PeerLost(RuntimeError):
    """Another process of the run is gone, and this one would wait for it for ever."""


peer_lost = Event()  # in this process, which ends soon


def check_peers() -> None:
    """Raise where there is no use in waiting for the other processes.

    Raises:
        PeerLost: the launcher says that one of them has failed.
    """
    if peer_lost.is_set():
        raise PeerLost("another process of the run is gone")


class StopRequest:
    """Context in which the signals are taken as a request.

    `code` is 0 while nobody asked, then the exit code the run ends with once it has saved: 128 + the signal's number,
    the shell's convention (143 after SIGTERM, 130 after SIGINT, 129 after SIGHUP), WORKER_KILLED or TIME_IS_UP. So a
    caller tells "stopped and saved" from "finished" (0) and from a mistake in the input (2). A second SIGTERM or SIGINT
    ends the process at once.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # nohup means that a hangup is ignored: that stays.
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in taken}
        # Taken for good: the word may come while this process still writes its last lines, and would end it.
        signal.signal(PEER_LOST, lambda *_: peer_lost.set())
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def worker_killed(self, what: str) -> None:
        """Ask because a process that builds packs is gone."""
        self.code = self.code or WORKER_KILLED
        print(f"\n{what}: finishing this step, then saving", file=sys.stderr, flush=True)

    def time_is_up(self) -> None:
        """Ask because the run may not take longer."""
        self.code = self.code or TIME_IS_UP

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = "; once more ends it at once"
        if number == signal.SIGHUP:  # the terminal may be gone; it may send two, one by the kernel and one by the shell
            again = ""
            for descriptor in (1, 2):
                write_or_detach(descriptor, "\n")
            if self.code:
                return
        if self.code > 128:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.code = 128 + number
        write_or_detach(2, f"\n{signal.Signals(number).name}: finishing this step, then saving{again}\n")


def write_or_detach(descriptor: int, text: str) -> None:
    """Write at once, as print may be interrupted in the middle of itself; a terminal that is gone becomes /dev/null.

    After a hangup every write to the terminal fails, and the first word about the saved checkpoint would end the run.
    """
    try:
        os.write(descriptor, text.encode())
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def stop_with_parent(parent: int) -> None:
    """Be asked to stop when the parent ends: a rank whose launcher is gone would train on unattended."""
    end_with_parent(parent, signal.SIGTERM)
