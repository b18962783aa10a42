"""Whether a process is still there, for the tests that kill some."""

import time
from collections.abc import Iterable
from pathlib import Path


def assert_end(processes: Iterable[int], seconds: float = 30) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + seconds
    for process in processes:
        while is_running(process):
            assert time.monotonic() < deadline, f"process {process} is still there after {seconds} s"
            time.sleep(0.02)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
