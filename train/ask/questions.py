"""The questions that conversations ask, and the answers of a model to many of them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from data.boxes import place_boxes
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.record import Record
from train.ask.answer import Answer, answer_all, prepare
from train.ask.load import Loaded
from train.ask.scores.boxes import BoxScore, box_score
from train.ask.scores.metrics import Scores, score_answers
from vl2.prompt import IMAGE_PLACEHOLDER, Message


@dataclass(frozen=True, kw_only=True)
class Question:
    """A turn to answer: what was said before it, as it is in the data, and the answer expected."""

    record: Record
    messages: tuple[Message, ...]  # up to the user's turn
    images: tuple[ImageRef, ...]  # those of these messages
    expected: str
    others: tuple[str, ...] = ()  # that the data calls right too

    @property
    def references(self) -> tuple[str, ...]:
        """The answers that are right, the expected one first."""
        return tuple(dict.fromkeys((self.expected, *self.others)))


def questions_of(record: Record, images: ImageReader) -> Iterator[Question]:
    """Every assistant's turn of a conversation is a question.

    Args:
        record: the conversation.
        images: tells the sizes of its pictures, where it has boxes on them.

    user A, assistant b, user C, assistant d  ->  (A -> b), (A b C -> d)

    Raises:
        RecordError: a picture with boxes that cannot be opened.
    """
    messages = record.messages
    if record.boxes:
        sizes = []
        for i, image in enumerate(record.images):
            try:
                sizes.append(images.size(image))
            except ImageError as error:
                raise record.image_error(i, str(error)) from error
        messages = place_boxes(record, sizes)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked = messages[:i]
        num_images = sum(m.content.count(IMAGE_PLACEHOLDER) for m in asked)
        yield Question(
            record=record,
            messages=asked,
            images=record.images[:num_images],
            expected=message.content.strip(),
            others=tuple(text.strip() for text in record.answers) if i == len(messages) - 1 else (),
        )


def permuted(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the pictures of the next one that has as many."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[len(question.images)].append(i)
    images = [question.images for question in questions]
    for group in groups.values():
        for i, following in zip(group, [*group[1:], group[0]], strict=True):
            images[i] = questions[following].images
    return [replace(question, images=shown) for question, shown in zip(questions, images, strict=True)]


def prompt_of(question: Question, loaded: Loaded) -> dict[str, np.ndarray]:
    """A question as `generate` takes it.

    Raises:
        RecordError: an image that cannot be decoded.
    """
    try:
        return prepare(question.messages, question.images, loaded)
    except ImageError as error:
        raise question.record.error("images", str(error)) from error


def ask(loaded: Loaded, questions: Sequence[Question], *, max_new_tokens: int, title: str) -> list[Answer]:
    """Greedy answers, in order, with a progress bar on stderr.

    Raises:
        RecordError: an image that cannot be decoded.
    """
    prompts = (prompt_of(question, loaded) for question in questions)
    answers = answer_all(loaded, prompts, max_new_tokens=max_new_tokens)
    return list(tqdm(answers, total=len(questions), desc=title, unit="question", file=sys.stderr, mininterval=1.0))


def num_cut(answers: Sequence[Answer]) -> int:
    """Count the answers that did not come to their end: whether they are right cannot be told."""
    return sum(answer.cut for answer in answers)


def box_scores(questions: Sequence[Question], answers: Sequence[Answer], images: ImageReader) -> list[BoxScore]:
    """Compare the boxes of each answer with the expected ones.

    Raises:
        RecordError: a picture with boxes that cannot be opened.
    """
    scores = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            scores.append(box_score(question.expected, answer.text, question.images, images))
        except ImageError as error:
            raise question.record.error("images", str(error)) from error
    return scores


def score(
    metrics: Iterable[str], questions: Sequence[Question], answers: Sequence[Answer], boxes: Sequence[BoxScore]
) -> Scores:
    """Score the answers to questions, see `score_answers`.

    Args:
        metrics: names among METRICS.
        boxes: of `box_scores`.
    """
    references = [question.references for question in questions]
    return score_answers(metrics, references, [answer.text for answer in answers], boxes)
