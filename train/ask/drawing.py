"""`infer ... draw=FILE.png`: the pictures that were shown, with the boxes of the answer drawn on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.answer_boxes import LabelledBox
from data.images.draw import can_show, draw_boxes
from data.images.files import ImageError
from data.images.reader import DEFAULT_READER
from data.images.ref import ImageRef
from train.ask.note import note
from train.store.run_dir import check_place
from vl2.errors import UserError

_SOFTWARE = "deepseek-vl2-finetune: infer draw="  # in each file, by which a drawing is known as one


def box_row(each: LabelledBox) -> dict[str, Any]:
    """A box as JSON says it: its label, the number of its picture, counted from 1, and x1, y1, x2, y2 in pixels."""
    box = each.box
    corners = [round(value, 2) for value in (box.x1, box.y1, box.x2, box.y2)]
    return {"label": each.label, "image": box.image + 1, "box": corners}


def drawing_paths(path: Path, num_images: int) -> list[Path]:
    """Name the file of each picture: FILE.png of one, of several FILE-1.png, FILE-2.png ..."""
    if num_images == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, num_images + 1)]


def check_drawing(path: Path, num_images: int) -> None:
    """Refuse a file that cannot be written, or that is no earlier drawing, before anything is computed.

    Raises:
        UserError: saying what to do.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"draw={path}: expected the name of a .png file")
    if not num_images:
        raise UserError(f"draw={path}: there is no picture to draw on; give image=FILE")
    check_place(path.parent, f"draw={path}")
    for place in drawing_paths(path, num_images):
        if place.exists() and not _is_drawing(place):
            raise UserError(f"draw={path}: {place} is no drawing of an earlier answer; give another draw=")


def write_drawings(path: Path, images: Sequence[Image.Image], boxes: Sequence[LabelledBox]) -> list[Path]:
    """Write each picture with its boxes; an earlier drawing is replaced whole.

    Args:
        path: as `draw=` says.
        images: as the model saw them, RGB.
        boxes: of all of them, in pixels.

    Returns:
        The files.
    """
    about = PngInfo()
    about.add_text("Software", _SOFTWARE)
    if hidden := [each.label for each in boxes if not can_show(each.label)]:
        note(f"no font with the characters of {hidden[0][:60]!r} was found, so they are drawn as squares; install one")
    paths = drawing_paths(path, len(images))
    for number, (place, image) in enumerate(zip(paths, images, strict=True)):
        drawn = draw_boxes(image, [each for each in boxes if each.box.image == number])
        temporary = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(temporary, "png", pnginfo=about)
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"draw={path}: cannot be written ({error.strerror or error})") from error
    return paths


def _is_drawing(path: Path) -> bool:
    try:
        DEFAULT_READER.size(ImageRef(kind="file", name=str(path)))  # a picture, whole, and no pipe
    except ImageError:
        return False
    with Image.open(path, formats=["PNG"]) as image:
        return image.info.get("Software") == _SOFTWARE
