"""Boxes on pictures: in pixels, as parts of the picture, and as DeepSeek-VL2 writes them, 0 to 999."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from vl2.errors import UserError
from vl2.prompt import Message

BOX_PLACEHOLDER = "<bbox>"
"""Stands in a message's content where the boxes of one label go, until the picture's size is known."""
COORDINATE_MAX = 999  # of a corner in the model's text, at the right and lower edge
MARKS = re.compile(r"<\|(/?)(ref|det)\|>")
"""Groups: / where it closes, and what."""

Unit = Literal["pixels", "parts", "model"]

_SLACK = 0.01  # pixels or thousandths of the picture, by which arithmetic on boxes may leave it
_BOX = r"\[\s*\d+\s*(?:,\s*\d+\s*){3}\]"
_BOXES = re.compile(rf"\s*\[\s*{_BOX}(?:\s*,\s*{_BOX})*\s*\]\s*", re.ASCII)
_NUMBERS = re.compile(_BOX, re.ASCII)
_MAX_SHOWN = 80  # characters


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle on one picture: upper left and lower right corner."""

    x1: float
    y1: float
    x2: float
    y2: float
    unit: Unit
    """Pixels of the picture as the model sees it, parts of its width and height in [0, 1], or 0 to 999."""
    image: int
    """Which of the conversation's pictures, from 0."""
    where: str = ""
    """Its place in the row, for errors: objects.bbox[0]."""
    of: tuple[float, float] | None = None
    """(width, height) of the picture that the row counts pixels of; None: of the picture itself."""


class _Record(Protocol):
    """What is asked of a `data.record.Record`, which holds boxes and so cannot be imported here."""

    @property
    def messages(self) -> tuple[Message, ...]: ...

    @property
    def boxes(self) -> tuple[tuple[Box, ...], ...]: ...

    def error(self, where: str, problem: str) -> UserError: ...


def place_boxes(record: _Record, sizes: Sequence[tuple[int, int]]) -> tuple[Message, ...]:
    """Write the boxes of a record as DeepSeek-VL2 does, now that the sizes of its pictures are known.

    Args:
        record: its messages hold a <bbox> for each entry of `record.boxes`.
        sizes: (width, height) of each picture in pixels, as the model sees it.

    Returns:
        The messages, with a box in the place of each <bbox>; of a record without boxes, the record's own.

    Raises:
        RecordError: a box that lies outside its picture.

    Source: 0 and 999 are the picture's edges for `parse_ref_bbox`, deepseek_vl2/serve/app_modules/utils.py.  To the
    nearest whole number, so that text and pixels go back and forth within half a unit, 1 / 1998 of the picture.

    Example: x1 = 160, y1 = 120, x2 = 320, y2 = 240 in 320 x 240 pixels are <|det|>[[500, 500, 999, 999]]<|/det|>.
    """
    if not record.boxes:
        return record.messages
    written = _write(record, sizes)
    return tuple(
        replace(message, content=re.sub(BOX_PLACEHOLDER, lambda _: next(written), message.content))
        if BOX_PLACEHOLDER in message.content
        else message
        for message in record.messages
    )


def _write(record: _Record, sizes: Sequence[tuple[int, int]]) -> Iterator[str]:
    for boxes in record.boxes:
        corners = []
        for box in boxes:
            width, height = box.of or sizes[box.image]
            if problem := _outside(box, width, height):
                raise record.error(box.where, problem)
            corners.append(f"[{', '.join(str(number) for number in _in_model_units(box, width, height))}]")
        yield f"<|det|>[{', '.join(corners)}]<|/det|>"


def _in_model_units(box: Box, width: float, height: float) -> list[int]:
    full = {"pixels": (width, height), "parts": (1, 1), "model": (COORDINATE_MAX, COORDINATE_MAX)}[box.unit]
    corners = zip((box.x1, box.y1, box.x2, box.y2), (*full, *full), strict=True)
    # Pixels and parts go through the same division, so that a half is rounded up whichever of them a row says.
    numbers = [math.floor(value / edge * COORDINATE_MAX + 0.5) for value, edge in corners]
    return [min(max(number, 0), COORDINATE_MAX) for number in numbers]


def _outside(box: Box, width: float, height: float) -> str:
    """What is wrong with a box on a picture of that size; empty if nothing is."""
    if box.unit != "pixels":  # seen when the row was read
        return ""
    if min(box.x1, box.y1) >= -_SLACK and box.x2 <= width + _SLACK and box.y2 <= height + _SLACK:
        return ""
    found = ", ".join(f"{value:g}" for value in (box.x1, box.y1, box.x2, box.y2))
    return (
        f"expected a box within the picture of {width:g} x {height:g} pixels (picture {box.image}, from 0), "
        f"found [{found}]; correct it, or leave the row out"
    )


def check_written_boxes(text: str) -> str:
    """Check the boxes that a text holds in DeepSeek-VL2's own form.

    Returns:
        What is wrong with the first that is; empty if all are well-formed, within 0 to 999 and not reversed.

    Example: "<|ref|>a dog<|/ref|><|det|>[[10, 20, 300, 400]]<|/det|>" is as it should be.
    """
    if "<|" not in text:
        return ""
    opened: re.Match[str] | None = None
    for mark in MARKS.finditer(text):
        closes, kind = mark.groups()
        if bool(closes) == (opened is None) or (opened is not None and opened.group(2) != kind):
            before = f" after {opened.group()}" if opened else ""
            return f"expected <|ref|>...<|/ref|> and <|det|>...<|/det|>, found {mark.group()}{before}"
        if opened is not None and kind == "det" and (problem := _check_boxes(text[opened.end() : mark.start()])):
            return problem
        opened = None if closes else mark
    return f"expected <|/{opened.group(2)}|> after {opened.group()}, found none" if opened else ""


def _check_boxes(text: str) -> str:
    short = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    expected = f"expected boxes [[x1, y1, x2, y2], ...] of whole numbers from 0 to {COORDINATE_MAX}"
    if not _BOXES.fullmatch(text):
        return f"{expected} between <|det|> and <|/det|>, found {short!r}"
    for box in _NUMBERS.findall(text):
        numbers = re.findall(r"\d+", box)
        if any(len(number.lstrip("0")) > 3 for number in numbers):
            return f"{expected}, found {box[:_MAX_SHOWN]}; divide pixels by the picture's width or height, times 999"
        x1, y1, x2, y2 = map(int, numbers)
        if x1 > x2 or y1 > y2:
            return f"expected the upper left corner before the lower right one, found {box[:_MAX_SHOWN]}"
    return ""
