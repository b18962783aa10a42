"""Answers scored with the metrics that were asked for: each answer, means, and sums that add up over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from train.ask.scores.boxes import GOOD, BoxScore
from train.ask.scores.texts import anls, contains, exact_match, normalised_match, relaxed_accuracy

# What an answer's text is worth beside the right answers, 0 to 1. Names as in train.config.schema.METRICS.
_OF_TEXT: Mapping[str, Callable[[Sequence[str], str], float]] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "contains": contains,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def _box_iou(score: BoxScore) -> tuple[float, ...]:
    """IoU of each expected box with the one found for it, see `matched_ious`; 0 where none was."""
    return score.ious


def _box_accuracy(score: BoxScore) -> tuple[float, ...]:
    """1 for each expected box whose IoU is 0.5 or more, else 0.

    Source: Acc@0.5 of RefCOCO (Kazemzadeh et al. 2014; Yu et al. 2016, section 5), where each question has one box.
    """
    # Rounded: half a box is 0.5 in thousandths, and a digit less once it was in pixels.
    return tuple(float(round(iou, 9) >= GOOD) for iou in score.ious)


_OF_BOXES: Mapping[str, Callable[[BoxScore], tuple[float, ...]]] = {
    "box_iou": _box_iou,
    "box_accuracy": _box_accuracy,
}
METRICS = (*_OF_TEXT, *_OF_BOXES)
_RIGHT_FROM = {"box_iou": GOOD}


def right_from(metric: str) -> float:
    """What an answer must be worth to count as right: all that it can be; by box_iou 0.5."""
    return _RIGHT_FROM.get(metric, 1.0)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What answers are worth by each metric; higher is better by all of them."""

    marks: Mapping[str, tuple[tuple[float, ...], ...]]
    """Metric -> for each answer what counts in the mean, each 0 to 1: one number, with boxes one for each that is
    expected, and none where the metric has nothing to score."""

    def of_answer(self, index: int) -> dict[str, float | None]:
        """What one answer is worth by each metric: the mean of its marks; None where a metric has nothing to score."""
        return {name: _mean(marks[index]) for name, marks in self.marks.items()}

    def take(self, indices: Iterable[int]) -> Scores:
        """The scores of some answers."""
        wanted = list(indices)
        return Scores(marks={name: tuple(marks[i] for i in wanted) for name, marks in self.marks.items()})

    def right(self, metric: str) -> list[bool | None]:
        """Whether each answer is right by a metric, see `right_from`; None where it has nothing to score."""
        values = map(_mean, self.marks[metric])
        return [None if value is None else value >= right_from(metric) for value in values]

    @property
    def sums(self) -> dict[str, tuple[float, int]]:
        """Sum and number of the marks of each metric, which add up over processes."""
        return {
            name: (sum(sum(each) for each in marks), sum(len(each) for each in marks))
            for name, marks in self.marks.items()
        }

    @property
    def means(self) -> dict[str, float]:
        """Mean of each metric over all its marks; a metric that had nothing to score is absent."""
        return means_of(self.sums)


def means_of(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Means from `Scores.sums`; a metric that had nothing to score is absent."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def score_answers(
    metrics: Iterable[str],
    references: Sequence[Sequence[str]],
    answers: Sequence[str],
    boxes: Sequence[BoxScore],
) -> Scores:
    """Score answers.

    Args:
        metrics: names among METRICS; one that comes twice counts once.
        references: for each answer the right ones, the first being the one that the data expects.
        answers: as the model gave them.
        boxes: of each answer beside the expected ones, see `box_score`.

    Example: exact_match and box_iou of "cat" where "cat" is expected, without boxes, are marks of (1.0,) and ().
    """
    marks: dict[str, tuple[tuple[float, ...], ...]] = {}
    for name in dict.fromkeys(metrics):
        if name in _OF_TEXT:
            of = _OF_TEXT[name]
            marks[name] = tuple((of(right, given),) for right, given in zip(references, answers, strict=True))
        else:
            marks[name] = tuple(map(_OF_BOXES[name], boxes))
    return Scores(marks=marks)


def _mean(marks: Sequence[float]) -> float | None:
    return sum(marks) / len(marks) if marks else None
