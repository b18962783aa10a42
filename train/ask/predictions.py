"""predictions.jsonl: a line for each question that was answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from train.ask.answer import Answer
from train.ask.drawing import box_row
from train.ask.questions import Question
from train.ask.scores.boxes import BoxScore
from train.ask.scores.metrics import Scores
from train.ask.scores.texts import exact_match
from train.store.run_dir import check_place
from vl2.errors import UserError


def check_predictions(path: Path) -> None:
    """Refuse to write over a file that no evaluation wrote.

    Raises:
        UserError: saying what to do.
    """
    check_place(path.parent, f"out={path}")
    if not path.exists():
        return
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise OSError
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        ours = {"expected", "answer", "correct"} <= row.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"out={path}: there is a file that no evaluation wrote; give another out=")


def write_predictions(
    path: Path, questions: Sequence[Question], answers: Sequence[Answer], boxes: Sequence[BoxScore], scores: Scores
) -> None:
    """One JSON object a question: where it comes from, the question, the expected and the given answer, its boxes.

    Args:
        path: of the file.
        questions, answers: one answer a question.
        boxes: of each answer beside the expected ones.
        scores: of the answers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, (question, answer, found) in enumerate(zip(questions, answers, boxes, strict=True)):
            row = {
                "source": question.record.source,
                "row": question.record.row,
                "question": question.messages[-1].content,
                "images": [image.name for image in question.images],
                "expected": question.expected,
                "answer": answer.text,
                "correct": exact_match([question.expected], answer.text) == 1,
                "scores": {name: value for name, value in scores.of_answer(i).items() if value is not None},
                "cut": answer.cut,
                "boxes": [box_row(each) for each in found.found],
                **({"iou": [round(iou, 4) for iou in found.ious]} if found.expected else {}),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
