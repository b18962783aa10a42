"""A picture as the model sees it, small: on its grid of tiles, with the boxes that the text has."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from data.boxes import BOX_PLACEHOLDER, COORDINATE_MAX
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.record import Record
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.tiles import PAD_COLOUR, Grid, num_image_tokens

_LONGEST_SIDE = 300  # pixels that its tiles are drawn at, and twice as many for dense screens
_DENSITY = 2
_QUALITY = 72  # of its JPEG
_MARK = re.compile(
    rf"{re.escape(IMAGE_PLACEHOLDER)}|(?:<\|ref\|>(?P<label>.*?)<\|/ref\|>\s*)?"
    rf"(?:(?P<box>{re.escape(BOX_PLACEHOLDER)})|<\|det\|>(?P<boxes>.*?)<\|/det\|>)",
    re.DOTALL,
)
_BOX = re.compile(r"\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class DrawnBox:
    """A box on a drawn picture, in percent of it."""

    label: str
    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class DrawnPicture:
    """A picture of a conversation, where its image tokens stand."""

    number: int
    """In the conversation, from 1."""
    name: str
    columns: int
    rows: int
    tokens: int
    size: tuple[int, int] | None = None
    """(width, height) in pixels as the model sees it; None where it was not opened."""
    uri: str = ""
    """The picture itself, padded to its tiles; empty where `missing` says why."""
    missing: str = ""
    boxes: tuple[DrawnBox, ...] = ()

    @property
    def width(self) -> int:
        """Pixels that its tiles are drawn wide."""
        return _canvas((self.columns, self.rows))[0]


def draw_picture(
    image: ImageRef, grid: Grid, *, number: int, reader: ImageReader, boxes: Sequence[TextBox], opened: bool
) -> DrawnPicture:
    """Draw one picture of a conversation.

    Args:
        image: to open.
        grid: (columns, rows) of its local tiles.
        number: in the conversation, from 1.
        reader: opens it.
        boxes: of the text, on this picture.
        opened: False draws its tiles only, which takes no time.
    """
    tiles = DrawnPicture(
        number=number,
        name=image.name,
        columns=grid[0],
        rows=grid[1],
        tokens=num_image_tokens(grid),
        missing="not drawn: the page shows a few pictures",
    )
    if not opened:
        return tiles
    try:
        picture = reader.decode(image)
    except ImageError as problem:
        return replace(tiles, missing=str(problem))
    canvas = (_DENSITY * _canvas(grid)[0], _DENSITY * _canvas(grid)[1])
    width = max(1, min(canvas[0], round(picture.width / picture.height * canvas[1])))
    height = max(1, min(canvas[1], round(picture.height / picture.width * canvas[0])))
    padded = ImageOps.pad(picture.resize((width, height), Image.Resampling.BILINEAR), canvas, color=PAD_COLOUR)
    return replace(
        tiles,
        missing="",
        size=picture.size,
        uri=jpeg_uri(padded),
        boxes=tuple(_on_canvas(box, (width, height), canvas) for box in boxes),
    )


def jpeg_uri(picture: Image.Image, quality: int = _QUALITY) -> str:
    """A picture in RGB as a data URI.

    Args:
        quality: of the JPEG, 1 to 95.
    """
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _canvas(grid: Grid) -> tuple[int, int]:
    """(width, height) in pixels that a grid of tiles is drawn at."""
    columns, rows = grid
    return round(_LONGEST_SIDE * columns / max(grid)), round(_LONGEST_SIDE * rows / max(grid))


def _on_canvas(box: TextBox, inner: tuple[int, int], canvas: tuple[int, int]) -> DrawnBox:
    """Percent of the padded picture, from thousandths of the picture in its middle."""

    def place(low: int, high: int, axis: int) -> tuple[float, float]:
        share = inner[axis] / canvas[axis]
        start = (1 - share) / 2 + share * min(low, COORDINATE_MAX) / COORDINATE_MAX
        return 100 * start, 100 * share * max(0, min(high, COORDINATE_MAX) - low) / COORDINATE_MAX

    left, width = place(box.corners[0], box.corners[2], 0)
    top, height = place(box.corners[1], box.corners[3], 1)
    return DrawnBox(label=box.label, left=left, top=top, width=width, height=height)


@dataclass(frozen=True, kw_only=True)
class TextBox:
    """A box as the model's text has it."""

    label: str
    corners: tuple[int, int, int, int]
    """x1, y1, x2, y2 from 0 to 999."""
    image: int
    """Which of the conversation's pictures, from 0."""


def text_boxes(record: Record, placed: Sequence[Message]) -> list[TextBox]:
    """Find the boxes in a conversation's text, and the picture that each lies on.

    A box that came as numbers knows its picture. The text itself does not say: what was written there lies on the
    picture shown last before it.

    Args:
        record: as it was read, with a <bbox> where its boxes stand.
        placed: its messages as the model reads them.
    """
    shown, found, given = 0, [], iter(record.boxes)
    for read, written in zip(record.messages, placed, strict=True):
        for before, mark in zip(_MARK.finditer(read.content), _MARK.finditer(written.content), strict=True):
            shown += mark.group() == IMAGE_PLACEHOLDER
            if mark["boxes"] is None:
                continue
            known = next(given) if before["box"] else ()
            for i, corners in enumerate(_BOX.findall(mark["boxes"])):
                x1, y1, x2, y2 = map(int, corners)
                image = known[i].image if known else max(0, shown - 1)
                found.append(TextBox(label=mark["label"] or "", corners=(x1, y1, x2, y2), image=image))
    return found
