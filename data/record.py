"""One conversation of a data set: what a row says, and the error that names file, row and field if it is bad."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.boxes import Box, check_written_boxes
from data.forms.conversation import Conversation, Turn
from data.forms.fields import FieldError
from data.forms.table import read_row
from data.images.ref import ImageRef, image_ref
from data.settings import OnBadRecord, ReadSettings, SourceSettings
from data.turns import check_order, checked_message, learned_turns
from vl2.errors import UserError
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation and which pictures it shows: no tokens, no pixels."""

    messages: tuple[Message, ...]
    """System turn (optional), then user and assistant turns in alternation."""
    images: tuple[ImageRef, ...]
    """One for each `<image>`, in order."""
    boxes: tuple[tuple[Box, ...], ...] = ()
    """Boxes of each `<bbox>`, in order; `data.boxes.place_boxes` writes them."""
    answers: tuple[str, ...] = field(default=(), compare=False)
    """What else is a right answer to the last question, for metrics; nothing of it is learned."""
    source: str
    """The file the record was read from."""
    row: int
    """Its row in that file, counted from 1."""
    image_places: tuple[str, ...] = field(default=(), compare=False)
    """Field of the row that names each picture, for errors; not given: images[0], images[1] ..."""
    unknown: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the row that say nothing here, for a report: id, messages[].name."""

    def error(self, where: str, problem: str) -> RecordError:
        """Make an error about a field of this record."""
        return RecordError(self.source, self.row, where, problem)

    def image_error(self, index: int, problem: str) -> RecordError:
        """Make an error about one of the pictures."""
        return self.error(self.image_places[index] if self.image_places else f"images[{index}]", problem)


class RecordError(UserError):
    """A row that cannot be used; `str()` of it is "file, row N, field: expected ..., found ...; what to do"."""

    def __init__(self, source: str, row: int, where: str, problem: str):
        # All four become `args`, so that the error survives the way back from a worker process.
        super().__init__(source, row, where, problem)
        self.source, self.row, self.where, self.problem = source, row, where, problem

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}, {self.where}: {self.problem}"


@dataclass(kw_only=True)
class BadRecords:
    """What to do with rows that cannot be used: stop at the first, or list them up to a number.

    Example: with on_bad_record="skip" and max_bad=2, two bad rows are listed in `skipped`, the third is an error.
    """

    on_bad_record: OnBadRecord = "error"
    max_bad: int = 0
    """Rows that may be skipped."""
    skipped: list[RecordError] = field(default_factory=list)

    def add(self, error: RecordError) -> None:
        """Raise the error, or list it.

        Raises:
            RecordError: with on_bad_record="error".
            UserError: when more than `max_bad` rows were listed.
        """
        if self.on_bad_record == "error":
            raise error
        self.skipped.append(error)
        if len(self.skipped) > self.max_bad:
            listed = "\n  ".join(str(bad) for bad in self.skipped[:10])
            raise UserError(
                f"more than data.max_bad={self.max_bad} bad rows; correct them or raise data.max_bad. "
                f"The first of them:\n  {listed}"
            )


def parse_record(
    row: Any,
    *,
    source: str,
    row_number: int,
    folder: Path,
    form: str = "auto",
    tokenizer: Tokenizer,
    settings: ReadSettings,
    of: SourceSettings,
) -> Record:
    """Check a row, whatever its form, and make it a Record.

    Args:
        row: the decoded row.
        source, row_number: where it comes from.
        folder: relative image paths start here, unless the source has an `image_root`.
        form: the form of the source's rows (`data.forms.table.find_form`); auto finds it by this row's fields.
        tokenizer: knows the special tokens a text must not hold.
        settings: what is learned, and what is done with special tokens and unknown fields.
        of: the source.

    Raises:
        RecordError: naming the field, what was expected and what was found.
        UserError: the source says a form or columns that there are not.
    """
    try:
        conversation = read_row(row, form, of)
        if conversation.unknown and settings.unknown == "error":
            raise FieldError(
                conversation.unknown[0],
                "found a field that is not read (data.unknown=error); remove it, or list such fields with "
                "data.unknown=report",
            )
        turns = conversation.turns
        check_order(turns)
        learn = learned_turns(turns, settings.supervise)
        messages = tuple(
            _message(turn, tokenizer, settings, learned) for turn, learned in zip(turns, learn, strict=True)
        )
        if of.system and messages[0].role != "system":
            system = Turn(role="system", content=of.system, where="data.system")
            messages = (checked_message(system, tokenizer, settings.special_tokens), *messages)
        return Record(
            messages=messages,
            images=_images(conversation, folder, of),
            image_places=tuple(where for where, _ in conversation.images),
            boxes=conversation.boxes,
            answers=conversation.answers,
            source=source,
            row=row_number,
            unknown=conversation.unknown,
        )
    except FieldError as problem:
        raise RecordError(source, row_number, problem.where, problem.problem) from None


def _message(turn: Turn, tokenizer: Tokenizer, settings: ReadSettings, learn: bool) -> Message:
    message = checked_message(turn, tokenizer, settings.special_tokens, learn=learn)
    if problem := check_written_boxes(turn.content):
        raise FieldError(turn.where, problem)
    return message


def _images(conversation: Conversation, folder: Path, of: SourceSettings) -> tuple[ImageRef, ...]:
    given = conversation.images
    num_placeholders = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in conversation.turns)
    if num_placeholders != len(given):
        hint = (
            "" if num_placeholders else f"; write {IMAGE_PLACEHOLDER} into the user's message where the picture stands"
        )
        raise FieldError(
            re.sub(r"\[\d+\]$", "", given[0][0]) if given else "images",
            f"expected one picture for each {IMAGE_PLACEHOLDER} in the user messages, found {len(given)} "
            f"{_plural(len(given), 'picture')} for {num_placeholders} {IMAGE_PLACEHOLDER}{hint}",
        )
    for boxes in conversation.boxes:
        for box in boxes:
            if box.image >= len(given):
                raise FieldError(
                    box.where,
                    f"expected a box on one of the row's {len(given)} {_plural(len(given), 'picture')}, "
                    f"found one on picture {box.image} (image_id, from 0)",
                )
    images = []
    for where, value in given:
        try:
            images.append(image_ref(value, folder, of.image_root))
        except UserError as problem:
            raise FieldError(where, str(problem)) from None
    return tuple(images)


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"
