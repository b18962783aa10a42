"""metrics.jsonl: a line for each logged step, and one for each validation, numbers unrounded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.run.watch.sink import Sink
from train.store.names import METRICS


class MetricsFile(Sink):
    """Writes metrics.jsonl.

    Args:
        run_dir: of the run.
        first_step: steps made already; lines of later ones are removed.
    """

    def __init__(self, run_dir: Path, *, first_step: int):
        path = run_dir / METRICS
        self.validated = of_validation(keep_steps(path, first_step))
        self._file = path.open("a", encoding="utf-8")

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """A line, on the disk at once."""
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def validation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """A line without a training loss."""
        self.step(step, {"step": step, **numbers})

    def close(self, failed: bool) -> None:
        """Close the file; what a full disk did not take was said when it was written."""
        with suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl but for one that was cut off: the disk was full, or it is being written."""
    return [line for _, line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that can be read, as text and as what it says."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield text, line


def of_steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of optimizer steps."""
    return [line for line in lines if "loss" in line]


def of_validation(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of what held-out rows gave."""
    return [line for line in lines if "loss" not in line]


def keep_steps(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop lines after step `last`, to which an earlier attempt may have gone on, unsaved; return the others."""
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return kept
    lines = []
    for text, line in _whole_lines(path):
        if line["step"] <= last:
            lines.append(text + "\n")
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
    return kept
