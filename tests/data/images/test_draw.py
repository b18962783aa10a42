"""Boxes and labels on a picture: where they are, in which colours, and that no label breaks it."""

import numpy as np
import pytest
from PIL import Image

import data.images.draw as module
from data.answer_boxes import LabelledBox
from data.boxes import Box
from data.images.draw import can_show, draw_boxes

GREY = (128, 128, 128)


def box(label: str, x1: float, y1: float, x2: float, y2: float) -> LabelledBox:
    return LabelledBox(label=label, box=Box(x1=x1, y1=y1, x2=x2, y2=y2, unit="pixels", image=0))


def changed(image: Image.Image, boxes: list[LabelledBox]) -> np.ndarray:
    """Which pixels were drawn on."""
    return (np.asarray(draw_boxes(image, boxes)) != np.asarray(image)).any(-1)


def test_a_box_is_drawn_where_it_is():
    image = Image.new("RGB", (400, 300), GREY)
    drawn = changed(image, [box("", 100, 50, 300, 200)])
    rows, columns = np.nonzero(drawn)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 300, 50, 200)
    assert not drawn[60:190, 110:290].any()  # what it holds stays to be seen
    assert np.array_equal(np.asarray(image), np.full((300, 400, 3), 128))  # the picture itself is left alone


def test_each_label_has_its_colour_and_a_ground_to_be_read_on():
    image = Image.new("RGB", (400, 300), GREY)
    drawn = draw_boxes(image, [box("a", 50, 100, 90, 140), box("b", 150, 100, 190, 140), box("a", 250, 100, 290, 140)])
    first, second, third = (drawn.getpixel((x, 140)) for x in (70, 170, 270))
    assert first == third != second
    assert drawn.getpixel((51, 99)) == first  # above the box begins the label's ground
    above = np.asarray(drawn)[80:100, 50:70].reshape(-1, 3)
    assert {first, (0, 0, 0)} <= {tuple(pixel) for pixel in above.tolist()}


@pytest.mark.parametrize(
    "label", ["a dog", "一只猫", "кот", "a" * 10_000, "line\nbreak", "\x00\x1b[31m", "😀", "\u202e", "<b>&amp;", " "]
)
@pytest.mark.parametrize("size", [(1, 1), (20, 300), (640, 480)])
def test_any_label_on_any_picture(label, size):
    """At the upper edge, at the right edge, of no area: a label stays on the picture."""
    boxes = [box(label, 0, 0, *size), box(label, *size, *size), box(label, 0, size[1] - 1, size[0], size[1])]
    assert changed(Image.new("RGB", size, GREY), boxes).any()


def test_a_missing_font_is_known(monkeypatch):
    monkeypatch.setattr(module, "_chinese_font", lambda: None)
    assert can_show("a dog, кот") and not can_show("一只猫")
    assert changed(Image.new("RGB", (200, 200), GREY), [box("一只猫", 50, 50, 99, 99)]).any()
