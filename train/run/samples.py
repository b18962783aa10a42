"""The table of samples of a validation: a few of the held-out questions, the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.images.files import ImageError
from data.images.reader import ImageReader
from train.ask.answer import Answer
from train.ask.questions import Question
from train.ask.scores.metrics import Scores
from train.run.watch.sink import Sample

MOST = 8  # questions
LARGEST = (512, 512)  # pixels of a picture


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Questions with what the model answered, and what that is worth."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    scores: Scores

    @property
    def num_cut(self) -> int:
        """Answers that did not come to their end."""
        return sum(answer.cut for answer in self.answers)


class SampleTable:
    """Chooses the questions once, and opens their pictures once.

    Args:
        questions: all that are asked.
        images: opens pictures.
    """

    def __init__(self, questions: Sequence[Question], images: ImageReader):
        self.images, self.chosen = images, [questions[i] for i in spread(len(questions), MOST)]
        self._pictures: dict[int, Image.Image | None] = {}  # by id() of the question

    def rows(self, answered: Answered) -> list[Sample]:
        """The chosen ones of the questions, answered; a question that was left out this time has no row."""
        number_of = {id(question): i for i, question in enumerate(answered.questions)}
        return [
            Sample(
                picture=self._picture(question),
                question=question.messages[-1].content,
                expected=question.expected,
                answer=answered.answers[i].text,
                scores={name: mark for name, mark in answered.scores.of_answer(i).items() if mark is not None},
            )
            for question in self.chosen
            if (i := number_of.get(id(question))) is not None
        ]

    def _picture(self, question: Question) -> Image.Image | None:
        """The first picture of a question, small; None where it has none that can be opened."""
        number = id(question)
        if number not in self._pictures:
            found = None
            with suppress(ImageError, IndexError):
                found = self.images.decode(question.images[0])
                found.thumbnail(LARGEST)
            self._pictures[number] = found
        return self._pictures[number]


def spread(count: int, wanted: int) -> list[int]:
    """Some of `count` numbers, evenly, the first and the last among them.

    4 of 10  ->  0 3 6 9        4 of 0  ->  none
    """
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, wanted)).tolist()})
