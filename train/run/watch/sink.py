"""What takes a run's numbers, and the rows of the table of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out question and what the model answered."""

    picture: Image.Image | None  # of several the first; None: a question without
    question: str
    expected: str
    answer: str
    scores: Mapping[str, float] = field(default_factory=dict)  # of the answer, by metric


class Sink:
    """Takes what it is told; whatever a kind of sink has no use for goes past it."""

    every_step = False  # takes the steps between two of `log_steps` too

    def begin(self) -> None:
        """The first step begins."""

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """An optimizer step: StepMetrics as JSON has it."""

    def end(self) -> None:
        """No step follows in this attempt."""

    def validation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """What the held-out rows gave after that many steps."""

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        """Answers after that many steps."""

    def saved(self) -> None:
        """A checkpoint was written."""

    def close(self, failed: bool) -> None:
        """The run ends, `failed`: with an error."""


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Each number with its name; of a table by source or layer, `loss_of/cats`. What is absent is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, float(value)
