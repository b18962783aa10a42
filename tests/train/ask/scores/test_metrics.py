"""Answers scored with several metrics at once: their marks, sums and means."""

import pytest

from train.ask.scores.boxes import BoxScore
from train.ask.scores.metrics import METRICS, means_of, score_answers
from train.config import schema
from train.config.load import load_config, load_eval_config
from train.machine.devices import Machine
from vl2.errors import UserError


def boxes(*ious: float) -> BoxScore:
    return BoxScore(expected=(), found=(), malformed=0, ious=ious)


NONE, ONE, TWO = boxes(), boxes(0.5 - 1e-12), boxes(0.9, 0.0)
NAMES = ["exact_match", "anls", "box_iou", "box_accuracy"]


def test_marks_sums_and_means():
    """Three answers: one without boxes, one with a box found by half, one with two of which one is missed."""
    scores = score_answers(NAMES, [["monday"], ["b"], ["c", "d"]], ["Mondey", "b", "d"], [NONE, ONE, TWO])
    assert scores.of_answer(0) == {
        "exact_match": 0,
        "anls": pytest.approx(5 / 6),
        "box_iou": None,
        "box_accuracy": None,
    }
    assert scores.of_answer(2) == {"exact_match": 1, "anls": 1, "box_iou": 0.45, "box_accuracy": 0.5}
    assert scores.sums == {
        "exact_match": (2, 3),
        "anls": (pytest.approx(17 / 6), 3),
        "box_iou": (pytest.approx(1.4), 3),
        "box_accuracy": (2, 3),  # half a box counts, though floats make it a digit less
    }
    assert scores.means == {
        "exact_match": pytest.approx(2 / 3),
        "anls": pytest.approx(17 / 18),
        "box_iou": pytest.approx(1.4 / 3),
        "box_accuracy": pytest.approx(2 / 3),
    }


def test_sums_of_parts_add_up():
    """As processes add theirs up, the mean is not the mean of their means."""
    parts = [
        score_answers(["box_iou"], [["a"]], ["a"], [ONE]),
        score_answers(["box_iou"], [["a"]], ["a"], [TWO]),
        score_answers(["box_iou"], [["a"]], ["a"], [NONE]),
    ]
    totals = [sum(numbers) for numbers in zip(*(part.sums["box_iou"] for part in parts), strict=True)]
    assert means_of({"box_iou": tuple(totals)}) == {"box_iou": pytest.approx(1.4 / 3)}


def test_a_metric_with_nothing_to_score_is_absent():
    assert score_answers(["box_iou", "exact_match"], [["a"]], ["a"], [NONE]).means == {"exact_match": 1}
    assert score_answers(NAMES, [], [], []).means == {}


def test_metrics_of_the_settings_are_those_defined():
    assert METRICS == schema.METRICS


def test_settings_refuse_unknown_metrics_and_none():
    evaluation, training = ["model=nano", "data.path=d"], ["conf=sft_tiny"]
    machine = Machine(gpus=0)
    for load, key in (
        (lambda more: load_eval_config([*evaluation, more]), "metrics"),
        (lambda more: load_config([*training, f"eval.{more}"], machine), r"eval\.metrics"),
    ):
        with pytest.raises(UserError, match=rf"^{key}=anl: expected one of exact_match, .*; did you mean anls\?"):
            load("metrics=[exact_match,anl]")
        with pytest.raises(UserError, match=rf"^{key}=\[\]: expected at least one of exact_match, "):
            load("metrics=[]")
    assert load_eval_config(evaluation).metrics == load_config(training, machine).eval.metrics == ["exact_match"]
