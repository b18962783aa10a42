"""`objects`: boxes beside a conversation, as ms-swift has them, for `<ref-object>` and `<bbox>` in its texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.boxes import BOX_PLACEHOLDER, Box, Unit
from data.forms.conversation import Turn
from data.forms.fields import FieldError, Fields, is_empty, kind_of, shown, unpacked
from vl2.prompt import IMAGE_PLACEHOLDER
from vl2.tokenizer import GROUNDING_TOKENS

LABEL_PLACEHOLDER = "<ref-object>"
_SLOTS = re.compile(f"{LABEL_PLACEHOLDER}|(?:{BOX_PLACEHOLDER})+")
_UNITS: dict[str, Unit] = {"real": "pixels", "pixels": "pixels", "norm1": "parts"}
_SLACK = 1e-5  # of a picture, by which arithmetic on parts may leave it


def place_objects(fields: Fields, turns: Sequence[Turn]) -> tuple[Sequence[Turn], tuple[tuple[Box, ...], ...]]:
    """Write the labels of a row's `objects` into its texts, and gather the boxes of each <bbox>.

    Labels and boxes are taken in the order of the placeholders, each on its own, through all turns.  Boxes that
    follow one another with nothing between them belong to one label, and become one <bbox>.

    Args:
        fields: the row; its `objects` hold `ref`, `bbox`, `bbox_type` (real: pixels; norm1: 0 to 1), `image_id`, and
            `width` and `height` of each picture that the pixels are counted on, where it is not the picture's own.
        turns: the conversation.

    Returns:
        The turns, and the boxes of each <bbox> that is left in them.

    Raises:
        FieldError: a box or a label without its placeholder, or the reverse; a box that is none.

    Example: "<ref-object><bbox><bbox>" with ref ["dog"] and two boxes becomes "<|ref|>dog<|/ref|><bbox>" and ((a, b),).
    """
    value = unpacked(fields.take("objects"), "objects")
    if value is None or _says_nothing(value):
        for turn in turns:
            if "<" in turn.content and (slot := _SLOTS.search(turn.content)):
                raise FieldError(
                    turn.where,
                    f"found {slot.group()[:20]} in a row without objects, which would be learned as it stands; give "
                    "objects with ref and bbox, or remove it",
                )
        return turns, ()
    objects = Fields(value, "objects", "an object with ref and bbox")
    labels = [_label(label, f"objects.ref[{i}]") for i, label in enumerate(objects.take_list("ref", "labels"))]
    boxes = _read_boxes(objects)
    if unknown := objects.unknown():
        raise FieldError(
            unknown[0], "expected ref, bbox, bbox_type, image_id, width and height in objects; remove others"
        )

    num_labels = sum(turn.content.count(LABEL_PLACEHOLDER) for turn in turns)
    num_boxes = sum(turn.content.count(BOX_PLACEHOLDER) for turn in turns)
    for key, kind, placed, given in (
        ("ref", LABEL_PLACEHOLDER, num_labels, len(labels)),
        ("bbox", BOX_PLACEHOLDER, num_boxes, len(boxes)),
    ):
        if placed != given:
            raise FieldError(
                f"objects.{key}",
                f"expected one entry for each {kind} in the messages, found {given} for {placed} {kind}",
            )

    next_label, next_box = iter(labels), iter(boxes)
    groups: list[tuple[Box, ...]] = []

    def fill(slot: re.Match[str]) -> str:
        if slot.group() == LABEL_PLACEHOLDER:
            return f"<|ref|>{next(next_label)}<|/ref|>"
        groups.append(tuple(next(next_box) for _ in range(len(slot.group()) // len(BOX_PLACEHOLDER))))
        return BOX_PLACEHOLDER

    return [replace(turn, content=_SLOTS.sub(fill, turn.content)) for turn in turns], tuple(groups)


def _says_nothing(value: Any) -> bool:
    """Tables fill rows without boxes with {"ref": [], "bbox": []}."""
    return isinstance(value, dict) and is_empty(value.get("ref")) and is_empty(value.get("bbox"))


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FieldError(where, f"expected a label, found {kind_of(value)}")
    for token in (*GROUNDING_TOKENS, IMAGE_PLACEHOLDER, BOX_PLACEHOLDER, LABEL_PLACEHOLDER):
        if token in value:
            raise FieldError(where, f"expected a label, found {token} in it")
    return value


def _read_boxes(objects: Fields) -> list[Box]:
    unit = objects.take("bbox_type") or "real"
    if not isinstance(unit, str) or unit not in _UNITS:
        raise FieldError(
            "objects.bbox_type", f"expected real (pixels) or norm1 (0 to 1), found {shown(unit)}; convert the boxes"
        )
    values = objects.take_list("bbox", "boxes [x1, y1, x2, y2]")
    images = unpacked(objects.take("image_id"), "objects.image_id")
    images = (
        [images] if isinstance(images, int) else list(images) if isinstance(images, (list, tuple)) else images or []
    )
    if not isinstance(images, list) or len(images) > len(values):
        raise FieldError("objects.image_id", f"expected the number of a picture for each box, found {shown(images)}")
    images += [0] * (len(values) - len(images))  # as ms-swift does
    sizes = _read_sizes(objects)
    boxes = []
    for i, (value, image) in enumerate(zip(values, images, strict=True)):
        if not isinstance(image, int) or isinstance(image, bool) or image < 0:
            raise FieldError(
                f"objects.image_id[{i}]", f"expected the number of a picture, from 0, found {shown(image)}"
            )
        if sizes and image >= len(sizes):
            raise FieldError("objects.width", f"expected a width and a height for each picture, found {len(sizes)}")
        box = _box(value, _UNITS[unit], image, f"objects.bbox[{i}]")
        boxes.append(replace(box, of=sizes[image]) if sizes and unit != "norm1" else box)
    return boxes


def _read_sizes(objects: Fields) -> list[tuple[float, float]]:
    """(width, height) of each picture as the row says it; none where it says nothing."""
    widths, heights = objects.take_list("width", "widths"), objects.take_list("height", "heights")
    for key, values in (("width", widths), ("height", heights)):
        for i, value in enumerate(values):
            if not _is_number(value) or value <= 0:
                raise FieldError(f"objects.{key}[{i}]", f"expected pixels, found {shown(value)}")
    if len(widths) != len(heights):
        raise FieldError(
            "objects.width", f"expected as many widths as heights, found {len(widths)} for {len(heights)}; give both"
        )
    return list(zip(widths, heights, strict=True))


def _box(value: Any, unit: Unit, image: int, where: str) -> Box:
    if not isinstance(value, (list, tuple)) or len(value) != 4 or not all(map(_is_number, value)):
        raise FieldError(where, f"expected four finite numbers [x1, y1, x2, y2], found {shown(value)}")
    x1, y1, x2, y2 = value
    if x1 > x2 or y1 > y2:
        raise FieldError(
            where,
            f"expected [x1, y1, x2, y2] with the upper left corner before the lower right one, found {shown(value)}; "
            "a box of x, y, width and height is [x, y, x + width, y + height]",
        )
    if unit == "parts" and (min(value) < -_SLACK or max(value) > 1 + _SLACK):
        raise FieldError(where, f"expected parts of the picture from 0 to 1 (bbox_type norm1), found {shown(value)}")
    return Box(x1=x1, y1=y1, x2=x2, y2=y2, unit=unit, image=image, where=where)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not
