"""What an evaluation writes: predictions.jsonl, a line for each answer; and when it may write over a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from train.ask.answer import Answer
from train.ask.drawing import box_row
from train.ask.questions import Question
from train.ask.scores.boxes import BoxScore
from train.ask.scores.metrics import Scores
from train.ask.scores.texts import exact_match
from train.page.answers import GENERATOR
from train.store.run_dir import check_place
from vl2.errors import UserError


def check_predictions(path: Path) -> None:
    """Refuse to write predictions over a file that no evaluation wrote.

    Raises:
        UserError: saying what to do.
    """

    def ours(file: Path) -> bool:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(lines.readline())
        return bool({"expected", "answer", "correct"} <= row.keys())

    _check(path, "out", ours)


def check_report(path: Path) -> None:
    """Refuse to write a page over a file that is no page of an evaluation.

    Raises:
        UserError: saying what to do.
    """

    def ours(file: Path) -> bool:
        with file.open(encoding="utf-8") as text:
            return f'<meta name="generator" content="{GENERATOR}">' in text.read(1000)

    _check(path, "report", ours)


def _check(path: Path, key: str, ours: Callable[[Path], bool]) -> None:
    check_place(path.parent, f"{key}={path}")
    place = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not os.access(place, os.W_OK):
        raise UserError(f"{key}={path}: {place} may not be written to; give another {key}=")
    if not path.exists():
        return
    try:
        known = path.is_file() and ours(path)  # to open a pipe would wait for ever
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"{key}={path}: there is a file that no evaluation wrote; give another {key}=")


def write_predictions(
    path: Path,
    model: str,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    boxes: Sequence[BoxScore],
    scores: Scores,
    *,
    add: bool = False,
) -> None:
    """One JSON object an answer: the model, where the question comes from, what was expected and given, its scores.

    Args:
        path: of the file.
        model: that answered.
        questions, answers: one answer a question.
        boxes: of each answer beside the expected ones.
        scores: of the answers.
        add: after what is there, which another model answered.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if add else "w", encoding="utf-8") as file:
        for i, (question, answer, found) in enumerate(zip(questions, answers, boxes, strict=True)):
            row = {
                "model": model,
                "source": question.record.source,
                "row": question.record.row,
                "question": question.messages[-1].content,
                "images": [image.name for image in question.images],
                "expected": question.expected,
                **({"answers": list(question.references)} if question.others else {}),
                "answer": answer.text,
                "correct": exact_match(question.references, answer.text) == 1,
                "scores": {name: value for name, value in scores.of_answer(i).items() if value is not None},
                "cut": answer.cut,
                "boxes": [box_row(each) for each in found.found],
                **({"iou": [round(iou, 4) for iou in found.ious]} if found.expected else {}),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
