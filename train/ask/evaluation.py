"""What one model was asked, answered and came to; and two of them beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.ask.answer import Answer
from train.ask.questions import Question, num_cut
from train.ask.scores.boxes import BoxScore, summary
from train.ask.scores.metrics import Scores


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers of one model, an entry a question."""

    model: str
    """As it was typed."""
    rehearsal: bool
    sources: tuple[str, ...]
    """Names of the sources of the data."""
    source_of: tuple[int, ...]
    """Which of them each question comes from."""
    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]
    boxes: tuple[BoxScore, ...]
    scores: Scores
    loss: float
    """Mean per supervised token over all conversations."""
    loss_of: Mapping[int, float]
    """The same of each source that has some, by its place in `sources`."""

    @property
    def numbers(self) -> dict[str, float]:
        """The loss and the mean of each metric that had something to score."""
        return {"loss": self.loss, **self.scores.means}

    def by_source(self) -> dict[str, dict[str, float]]:
        """`numbers` and the count of questions of each source; empty where there is one source."""
        if len(self.sources) == 1:
            return {}
        found = {}
        for number, loss in self.loss_of.items():
            own = [i for i, source in enumerate(self.source_of) if source == number]
            found[self.sources[number]] = {"questions": len(own), "loss": loss, **self.scores.take(own).means}
        return found

    def as_document(self) -> dict[str, Any]:
        """Everything that is printed of it."""
        sources = self.by_source()
        return {
            "model": self.model,
            **self.numbers,
            **summary(self.boxes),
            **({"sources": sources} if sources else {}),
            "questions": len(self.questions),
            "cut": num_cut(self.answers),
            "rehearsal": self.rehearsal,
        }


def difference(one: Evaluation, other: Evaluation) -> dict[str, float]:
    """Numbers of one model less those of the other: the loss, and each metric."""
    theirs = other.numbers
    return {name: value - theirs[name] for name, value in one.numbers.items() if name in theirs}


def right_counts(metric: str, one: Evaluation, other: Evaluation) -> dict[str, int]:
    """Count the questions that both models answer right by a metric, one alone, the other alone, and neither.

    Example: one is right, wrong, right and the other right, wrong, wrong: both 1, model 1, against 0, neither 1.
    """
    names = {(True, True): "both", (True, False): "model", (False, True): "against", (False, False): "neither"}
    counts = dict.fromkeys(names.values(), 0)
    for pair in zip(one.scores.right(metric), other.scores.right(metric), strict=True):
        if None not in pair:
            counts[names[pair[0] is True, pair[1] is True]] += 1
    return counts


def num_differing(answers: Sequence[Answer], others: Sequence[Answer]) -> int:
    """Count the questions that two models answer differently, white space around the answers aside."""
    return sum(one.text.strip() != other.text.strip() for one, other in zip(answers, others, strict=True))
