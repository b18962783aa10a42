"""Boxes that stand in a text as DeepSeek-VL2 writes them: read back into pixels, and compared by how they overlap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.boxes import COORDINATE_MAX, MARKS, Box

_CORNERS = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"\d{1,4}(?:\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class LabelledBox:
    """A box and what it is said to hold."""

    label: str
    """Empty where none was said."""
    box: Box
    """In pixels."""


@dataclass(frozen=True, kw_only=True)
class BoxesRead:
    """The boxes of a text."""

    boxes: tuple[LabelledBox, ...]
    """In order; one entry a box, however many a label has."""
    malformed: int
    """Boxes that were passed over: cut off, without four numbers, beyond 999, reversed, or without a picture."""


def read_boxes(text: str, sizes: Sequence[tuple[int, int]]) -> BoxesRead:
    """Read the boxes of an answer, in pixels of the picture they belong to, which is the last one shown before it.

    The text names no picture, and neither does a setting: the official demo draws all boxes onto the last picture, and
    so does its example of two, in which the object of the first is to be found in the second.

    Args:
        text: with special tokens as they are written.
        sizes: (width, height) in pixels of each picture shown so far, as the model sees it.

    Returns:
        A box for each [x1, y1, x2, y2]; its label is the <|ref|>...<|/ref|> before its <|det|>.

    Source: `parse_ref_bbox` in deepseek_vl2/serve/app_modules/utils.py, and its callers in inference.py and
    web_demo.py; pixels are number / 999 * size there, here without its rounding down.

    Example: <|ref|>a dog<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|> on 999 x 333 pixels is a dog at 0, 0, 500, 333.
    """
    boxes: list[LabelledBox] = []
    malformed, label = 0, ""
    opened: re.Match[str] | None = None
    for mark in MARKS.finditer(text):
        closes, kind = mark.groups()
        dangling = opened is not None and opened.group(2) == "det"
        if not closes:
            malformed += dangling
            opened = mark
            continue
        if opened is None or opened.group(2) != kind:
            malformed += dangling or kind == "det"
        elif kind == "ref":
            label = text[opened.end() : mark.start()].strip()
        else:
            corners = _CORNERS.findall(text, opened.end(), mark.start())
            found = [box for box in (_read_box(each, sizes) for each in corners) if box is not None]
            malformed += len(corners) - len(found) if corners else 1
            boxes += [LabelledBox(label=label, box=box) for box in found]
            label = ""
        opened = None
    malformed += opened is not None and opened.group(2) == "det"
    return BoxesRead(boxes=tuple(boxes), malformed=malformed)


def _read_box(corners: str, sizes: Sequence[tuple[int, int]]) -> Box | None:
    texts = [part.strip() for part in corners.split(",")]
    if len(texts) != 4 or not sizes or not all(map(_NUMBER.fullmatch, texts)):
        return None
    x1, y1, x2, y2 = map(float, texts)
    if not (x1 <= x2 <= COORDINATE_MAX and y1 <= y2 <= COORDINATE_MAX):
        return None
    width, height = (edge / COORDINATE_MAX for edge in sizes[-1])
    return Box(x1=x1 * width, y1=y1 * height, x2=x2 * width, y2=y2 * height, unit="pixels", image=len(sizes) - 1)


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes in one unit on one picture, 0 to 1; of two equal points 1."""
    width = min(one.x2, other.x2) - max(one.x1, other.x1)
    height = min(one.y2, other.y2) - max(one.y1, other.y1)
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(one) + _area(other) - shared
    if union > 0:
        return shared / union
    return float((one.x1, one.y1, one.x2, one.y2) == (other.x1, other.y1, other.x2, other.y2))


def _area(box: Box) -> float:
    return (box.x2 - box.x1) * (box.y2 - box.y1)


def matched_ious(expected: Sequence[LabelledBox], found: Sequence[LabelledBox]) -> list[float]:
    """Overlap of each expected box with the one found for it; 0 where none was.

    Boxes of equal labels (upper case and white space aside) on one picture are matched one to one, the pair of the
    highest IoU first. Boxes beyond the expected ones change nothing here: count them beside it.

    Source: COCO's evaluation (`COCOeval.evaluateImg`) assigns greedily by IoU within a category; it goes by confidence
    first, of which a text says nothing.

    Example: expected a dog and a cat, found a dog that overlaps by half and two birds: [0.5, 0.0].
    """
    pairs = [
        (iou(wanted.box, given.box), i, j)
        for i, wanted in enumerate(expected)
        for j, given in enumerate(found)
        if _same(wanted, given)
    ]
    ious = [0.0] * len(expected)
    free, left = set(range(len(expected))), set(range(len(found)))
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if i in free and j in left:
            ious[i] = overlap
            free.remove(i)
            left.remove(j)
    return ious


def _same(one: LabelledBox, other: LabelledBox) -> bool:
    return one.box.image == other.box.image and _plain(one.label) == _plain(other.label)


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())
