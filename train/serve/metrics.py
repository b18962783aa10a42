"""What /metrics tells, in the text format of Prometheus."""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

# Upper ends of the histogram's buckets, seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PREFIX = "vl2_"


class Metrics:
    """Counts of a service since it started."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()  # by status; 499: the client went away
        self.prompt_tokens = 0  # of requests that were taken in
        self.completion_tokens = 0
        self._first = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0

    def first_token(self, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._first[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._first_sum += seconds

    def text(self, now: Mapping[str, tuple[str, float]]) -> str:
        """All of it as Prometheus reads it.

        Args:
            now: (what it is, value) of what is measured at this moment, by name.
        """
        lines = [f"# HELP {_PREFIX}requests_total Requests to /v1 that have ended, by status (499: the client left)."]
        lines.append(f"# TYPE {_PREFIX}requests_total counter")
        for status, count in sorted(self.requests.items()):
            lines.append(f'{_PREFIX}requests_total{{status="{status}"}} {count}')
        for name, what, value in (
            ("prompt_tokens_total", "Tokens of prompts taken in.", self.prompt_tokens),
            ("completion_tokens_total", "Tokens of answers.", self.completion_tokens),
        ):
            lines += _one(name, what, "counter", value)
        for name, (what, number) in now.items():
            lines += _one(name, what, "gauge", number)
        name = f"{_PREFIX}time_to_first_token_seconds"
        lines += [f"# HELP {name} From a request's arrival to its first token.", f"# TYPE {name} histogram"]
        total = 0
        for end, count in zip((*BUCKETS, "+Inf"), self._first, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{end}"}} {total}')
        lines += [f"{name}_sum {self._first_sum:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"


def _one(name: str, what: str, kind: str, value: float) -> list[str]:
    return [f"# HELP {_PREFIX}{name} {what}", f"# TYPE {_PREFIX}{name} {kind}", f"{_PREFIX}{name} {_number(value)}"]


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6f}"
