"""The page of an evaluation: what one model or two answered, beside what was expected, the worst first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from data.answer_boxes import LabelledBox
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from train.page.differences import Part, differences
from train.page.render import render_page
from train.page.thumbnails import Thumbnail, Thumbnails
from vl2.prompt import IMAGE_PLACEHOLDER, Message

GENERATOR = "deepseek-vl2-finetune eval"
"""In the page's head, by which a page is known as one."""
MOST_QUESTIONS = 5_000
MOST_CHARACTERS = 6_000_000  # of all questions that the page shows
_MOST_TEXT = 3_000  # characters of one text
_MOST_TURNS = 20  # of one question, the last ones
_MOST_PICTURES = 6  # likewise
_MOST_BOXES = 50  # on one picture, of each who drew them
_PLACEHOLDER = re.compile(rf"({re.escape(IMAGE_PLACEHOLDER)})")


@dataclass(frozen=True, kw_only=True)
class GivenAnswer:
    """What one model answered."""

    text: str
    cut: bool
    """It did not come to its end."""
    boxes: tuple[LabelledBox, ...]
    values: Mapping[str, float | None]
    """Metric -> what the answer is worth, 0 to 1; None: the metric has nothing to score here."""


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """A question with the answers of one model or two."""

    source: str
    """Of its data, as filters call it."""
    file: str
    row: int
    messages: tuple[Message, ...]
    """The conversation up to the user's turn that was answered."""
    images: tuple[ImageRef, ...]
    expected: tuple[str, ...]
    """The right answers, the one to be learned first."""
    boxes: tuple[LabelledBox, ...]
    """Of the expected answer."""
    answers: tuple[GivenAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers in words; each row begins with what it is about."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class PageMetric:
    """A metric as the page's filters have it."""

    name: str
    right_from: float
    """An answer worth less is wrong."""


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text as far as it is shown."""

    parts: tuple[Part, ...]
    more: int
    """Characters that are left out."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    role: str
    pieces: tuple[str | int, ...]
    """Texts, and numbers of the pictures that stand between them, from 1."""
    more: int


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A box on a picture, in percent of it."""

    kind: str
    label: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class _Picture:
    number: int
    """In the conversation, from 1."""
    name: str
    thumbnail: Thumbnail | None
    missing: str
    frames: tuple[_Frame, ...]


@dataclass(frozen=True, kw_only=True)
class _Card:
    question: AnsweredQuestion
    number: int
    source: int
    turns: tuple[_Turn, ...]
    more_turns: int
    """Before these."""
    pictures: tuple[_Picture, ...]
    more_pictures: int
    """Likewise."""
    expected: _Text
    others: tuple[_Text, ...]
    answers: tuple[tuple[GivenAnswer, _Text], ...]
    differ: bool
    """Two models said different things."""


def make_answers_page(
    *,
    title: str,
    models: Sequence[str],
    metrics: Sequence[PageMetric],
    words: Mapping[str, str],
    tables: Sequence[Table],
    questions: Sequence[AnsweredQuestion],
    reader: ImageReader,
    done: Callable[[], object] = lambda: None,
) -> str:
    """Make the page.

    Args:
        title: of it.
        models: the names of one or two.
        metrics: that the answers were scored with; by the first one the page is sorted.
        words: facts of the evaluation, name by name.
        tables: of means and counts.
        questions: with an answer of each model, in the order of the data.
        reader: opens the pictures.
        done: called after each question.

    Returns:
        HTML that refers to nothing outside of it.
    """
    sources = list(dict.fromkeys(question.source for question in questions))
    thumbnails, cards, characters = Thumbnails(reader), [], 0
    for place in _worst_first(questions, metrics)[:MOST_QUESTIONS]:
        card = _card(questions[place], place + 1, sources, thumbnails)
        characters += _characters(card)
        if characters > MOST_CHARACTERS:
            break
        cards.append(card)
        done()
    return render_page(
        "answers.html.j2",
        script="answers.js",
        styles=["page.css", "answers.css"],
        title=title,
        generator=GENERATOR,
        models=models,
        letters=_letters(len(models)),
        metrics=metrics,
        words=words,
        tables=tables,
        cards=cards,
        sources=sources,
        thumbnails=thumbnails.made,
        num_questions=len(questions),
        pictures_left_out=thumbnails.left_out,
        has_boxes=any(picture.frames for card in cards for picture in card.pictures),
    )


def _letters(num_models: int) -> tuple[str, ...]:
    """What the page calls the models where there is little room."""
    return ("answer",) if num_models == 1 else ("A", "B")


def _worst_first(questions: Sequence[AnsweredQuestion], metrics: Sequence[PageMetric]) -> list[int]:
    """Indices of the questions: by the worst answer of the first metric, then the next; those without a value last."""

    def worth(index: int) -> tuple[float, ...]:
        values: list[float] = []
        for metric in metrics:
            found = [answer.values.get(metric.name) for answer in questions[index].answers]
            values += sorted(2.0 if value is None else value for value in found)
        return tuple(values)

    return sorted(range(len(questions)), key=worth)


def _card(question: AnsweredQuestion, number: int, sources: Sequence[str], thumbnails: Thumbnails) -> _Card:
    expected = question.expected[0]
    marked: tuple[Part, ...] = (Part(text=expected, differs=False),)
    answers = []
    for answer in question.answers:
        wanted, given = differences(expected[:_MOST_TEXT], answer.text.strip()[:_MOST_TEXT])
        if len(question.answers) == 1:
            marked = wanted
        answers.append((answer, _Text(parts=given, more=max(0, len(answer.text.strip()) - _MOST_TEXT))))
    turns = tuple(_turns(question.messages))
    first = max(0, len(question.images) - _MOST_PICTURES)  # the boxes are on the last picture
    return _Card(
        question=question,
        number=number,
        source=sources.index(question.source),
        turns=turns[-_MOST_TURNS:],
        more_turns=max(0, len(turns) - _MOST_TURNS),
        pictures=tuple(_picture(i, question, thumbnails) for i in range(first, len(question.images))),
        more_pictures=first,
        expected=_Text(parts=_cut(marked), more=max(0, len(expected) - _MOST_TEXT)),
        others=tuple(
            _Text(parts=(Part(text=other[:_MOST_TEXT], differs=False),), more=max(0, len(other) - _MOST_TEXT))
            for other in question.expected[1:10]
        ),
        answers=tuple(answers),
        differ=len({answer.text.strip() for answer in question.answers}) > 1,
    )


def _cut(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The first characters of a text that are shown."""
    left, found = _MOST_TEXT, []
    for part in parts:
        if left > 0:
            found.append(Part(text=part.text[:left], differs=part.differs))
        left -= len(part.text)
    return tuple(found)


def _turns(messages: Sequence[Message]) -> Iterable[_Turn]:
    shown = 0
    for message in messages:
        pieces: list[str | int] = []
        for piece in _PLACEHOLDER.split(message.content[:_MOST_TEXT]):
            if piece == IMAGE_PLACEHOLDER:
                shown += 1
                pieces.append(shown)
            elif piece.strip():
                pieces.append(piece.strip())
        yield _Turn(role=message.role, pieces=tuple(pieces), more=max(0, len(message.content) - _MOST_TEXT))


def _picture(index: int, question: AnsweredQuestion, thumbnails: Thumbnails) -> _Picture:
    image = question.images[index]
    found = thumbnails.get(image)
    frames: list[_Frame] = []
    if isinstance(found, Thumbnail):
        drawn = [("expected", question.boxes)]
        drawn += [(f"model{i}", answer.boxes) for i, answer in enumerate(question.answers)]
        for kind, boxes in drawn:
            own = [each for each in boxes if each.box.image == index][:_MOST_BOXES]
            frames += [_frame(kind, each, found) for each in own]
    return _Picture(
        number=index + 1,
        name=image.name,
        thumbnail=found if isinstance(found, Thumbnail) else None,
        missing=found if isinstance(found, str) else "",
        frames=tuple(frames),
    )


def _frame(kind: str, each: LabelledBox, picture: Thumbnail) -> _Frame:
    box = each.box
    return _Frame(
        kind=kind,
        label=each.label,
        left=100 * box.x1 / picture.width,
        top=100 * box.y1 / picture.height,
        width=100 * (box.x2 - box.x1) / picture.width,
        height=100 * (box.y2 - box.y1) / picture.height,
    )


def _characters(card: _Card) -> int:
    texts = [card.expected, *card.others, *(text for _, text in card.answers)]
    said = sum(len(piece) for turn in card.turns for piece in turn.pieces if isinstance(piece, str))
    return said + sum(len(part.text) for text in texts for part in text.parts) + 500  # of the card itself
