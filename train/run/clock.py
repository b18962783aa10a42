"""What a run does by the clock: a checkpoint every so often, and its end before its time is up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from train.config.schema import TrainConfig

ENDING_SECONDS = 5.0  # for the last lines, a service's upload, the interpreter's end
_DISK_BYTES_A_SECOND = 10**8  # before the first checkpoint has been written; slow, so that the last one is in time

Clock = Callable[[], float]


class SaveSchedule:
    """Says when a checkpoint is due: every `save_steps`, every `save_minutes`, and after the last step.

    Args:
        config: of the run.
        num_steps: of the run.
        clock: seconds; for tests.
    """

    def __init__(self, config: TrainConfig, num_steps: int, clock: Clock = time.monotonic):
        self.config, self.num_steps, self.clock = config, num_steps, clock
        self._last = clock()

    def is_due(self, step: int) -> bool:
        """Whether step `step`, counted from 1, is to be saved. Ranks may differ: one that finds so is enough."""
        every, minutes = self.config.save_steps, self.config.save_minutes
        by_clock = minutes is not None and self.clock() - self._last >= 60 * minutes
        return by_clock or step == self.num_steps or (every > 0 and step % every == 0)

    def saved(self) -> None:
        """Count the minutes from here on, whyever it was saved."""
        self._last = self.clock()


class Deadline:
    """Says when a run must stop to end within `max_minutes` of its process's start.

    It must when a turn of its loop as long as the longest so far, validation included, and the last checkpoint would
    not fit any more; with one still on its way to the disk, the last one waits for that first.

        limit 100 s, turns of 8 s, a checkpoint takes 10 s, the end 5 s: stops at the first turn's end after 77 s

    Args:
        minutes: that the run has; None: it has all the time.
        saved_bytes: that a checkpoint holds.
        validation: seconds that one on the way may take; the first one comes after turns that had none.
        clock: seconds since the start of the process; for tests.
    """

    def __init__(self, minutes: float | None, *, saved_bytes: int, validation: float = 0.0, clock: Clock | None = None):
        self.seconds = None if minutes is None else 60 * minutes
        self.clock = clock or seconds_since_start
        self._saving = saved_bytes / _DISK_BYTES_A_SECOND
        self._measured = self._under_way = False
        self._turn_began, self._longest_turn = self.clock(), validation

    def saving_begins(self) -> None:
        """Take in that a checkpoint is on its way, which the next one waits for."""
        self._under_way = True

    def saving_took(self, seconds: float) -> None:
        """Take in how long a checkpoint took to be written."""
        self._saving = max(self._saving, seconds) if self._measured else seconds
        self._measured, self._under_way = True, False

    def ends_turn(self) -> bool:
        """Whether the turn of the loop that ends here must be the last. Ranks may differ: one is enough."""
        now = self.clock()
        self._longest_turn = max(self._longest_turn, now - self._turn_began)
        self._turn_began = now
        if self.seconds is None:
            return False
        saving = self._saving * (2 if self._under_way else 1)
        return now + self._longest_turn + saving + ENDING_SECONDS > self.seconds


def seconds_since_start() -> float:
    """How long this process has run, of several on a machine their launcher; since this import where /proc is not."""
    begun = [_age(os.getpid())]
    if "PADDLE_TRAINER_ID" in os.environ:
        begun.append(_age(os.getppid()))
    known = [age for age in begun if age is not None]
    return max(known) if known else time.monotonic() - _IMPORTED


def _age(process: int) -> float | None:
    """Seconds since a process began; it keeps its age when it becomes another program."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.monotonic()
