"""Boxes in an answer: back to the pixels they came from, and how well they cover what was expected."""

import io

import numpy as np
import pytest
from PIL import Image

from data.answer_boxes import LabelledBox, iou, matched_ious, read_boxes
from data.boxes import COORDINATE_MAX, Box, place_boxes
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.record import Record
from vl2.prompt import Message


def corners(box: Box) -> list[float]:
    return [box.x1, box.y1, box.x2, box.y2]


def read(text: str, *sizes: tuple[int, int]) -> tuple[list[tuple[str, int, list[float]]], int]:
    """(label, picture, pixels) of each box, and how many were passed over."""
    found = read_boxes(text, sizes)
    return [(each.label, each.box.image, corners(each.box)) for each in found.boxes], found.malformed


def test_boxes_in_pixels():
    """The README of DeepSeek-VL2 has this answer; 999 is the right and the lower edge."""
    text = "<|ref|>The giraffe at the back.<|/ref|><|det|>[[580, 270, 999, 900]]<|/det|>"
    assert read(text, (1998, 333)) == ([("The giraffe at the back.", 0, [1160, 90, 1998, 300])], 0)


def test_several_boxes_labels_and_pictures():
    """One entry a box; all belong to the last picture, as the official demo draws them."""
    text = (
        "Here: <|ref|>a dog<|/ref|><|det|>[[0, 0, 9, 9], [10, 10, 19, 19]]<|/det|> and\n"
        "<|ref|> 一只猫\n<|/ref|> <|det|> [ [1,2,3,4] ] <|/det|>, something <|det|>[[5, 5, 5, 5]]<|/det|>"
    )
    size = (COORDINATE_MAX, COORDINATE_MAX)
    expected = [("a dog", [0, 0, 9, 9]), ("a dog", [10, 10, 19, 19]), ("一只猫", [1, 2, 3, 4]), ("", [5, 5, 5, 5])]
    assert read(text, size) == ([(label, 0, box) for label, box in expected], 0)
    assert read(text, (1, 1), (2, 2), size) == ([(label, 2, box) for label, box in expected], 0)
    assert read("no boxes at all, [[1, 2, 3, 4]] is none", size) == ([], 0)


@pytest.mark.parametrize(
    ("inside", "malformed"),
    [
        ("[[1, 2, 3]]", 1),
        ("[[1, 2, 3, 4, 5]]", 1),
        ("[[1, 2, 3, 1000]]", 1),
        ("[[1, 2, -3, 4]]", 1),
        ("[[9, 2, 3, 4]]", 1),
        ("[[1, 9, 3, 4]]", 1),
        ("[[1, 2, nan, 4]]", 1),
        ("[[1, 2, 1e999, 4]]", 1),
        ("[[" + "9" * 100_000 + ", 2, 3, 4]]", 1),
        ("[[__import__('os').system('true'), 2, 3, 4]]", 1),
        ("[[1, 2, ٣, 4]]", 1),
        ("", 1),
        ("[]", 1),
        ("a dog", 1),
        ("[[1, 2, 3", 1),
        ("[[x], [y, z]]", 2),
    ],
)
def test_malformed_boxes_are_passed_over_and_counted(inside, malformed):
    """The official code evaluates what the model says as Python, and draws nothing if any box of the answer is bad."""
    good = "<|ref|>b<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    text = f"{good}<|ref|>a<|/ref|><|det|>{inside}<|/det|>{good}"
    box = ("b", 0, [1, 2, 3, 4])
    assert read(text, (COORDINATE_MAX, COORDINATE_MAX)) == ([box, box], malformed)


@pytest.mark.parametrize(
    ("text", "boxes", "malformed"),
    [
        ("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]", 0, 1),  # cut at max_new_tokens
        ("<|det|><|det|>[[1, 2, 3, 4]]<|/det|>", 1, 1),
        ("<|/det|>[[1, 2, 3, 4]]<|/det|>", 0, 2),
        ("<|det|>[[1, 2, 3, 4]]<|/ref|>", 0, 1),
        ("<|ref|>a<|det|>[[1, 2, 3, 4]]<|/det|>", 1, 0),
        ("<|ref|>a", 0, 0),
    ],
)
def test_marks_that_do_not_match(text, boxes, malformed):
    found = read_boxes(text, [(10, 10)])
    assert (len(found.boxes), found.malformed) == (boxes, malformed)


def test_boxes_without_a_picture():
    assert read("<|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>") == ([], 1)


def rotated(size: tuple[int, int], number: int) -> ImageRef:
    exif = Image.Exif()
    exif[0x0112] = number
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "jpeg", exif=exif)
    return ImageRef(kind="bytes", name="it", data=stream.getvalue())


@pytest.mark.parametrize("exif", ["ignore", "rotate"])
def test_from_pixels_to_text_and_back_within_half_a_unit(exif):
    """Of random boxes on pictures of every shape, turned ones too: half of 1 / 999 of the edge, and no more."""
    draw = np.random.default_rng(0)
    reader = ImageReader(exif=exif)
    for number in range(200):
        size = (int(draw.integers(1, 3000)), int(draw.integers(1, 3000))) if number % 2 else (640, 480)
        image = rotated(size, number % 8 + 1) if number < 16 else None
        width, height = reader.size(image) if image else size
        xs, ys = np.sort(draw.uniform(0, width, 2)), np.sort(draw.uniform(0, height, 2))
        box = Box(x1=xs[0], y1=ys[0], x2=xs[1], y2=ys[1], unit="pixels", image=1, where="objects.bbox[0]")
        messages = (Message("user", "<image><image>?"), Message("assistant", "<|ref|>it<|/ref|><bbox>"))
        images = (image or ImageRef(kind="file", name="a"),) * 2
        record = Record(messages=messages, images=images, boxes=((box,),), source="f", row=1)
        text = place_boxes(record, [(7, 7), (width, height)])[-1].content
        back = read_boxes(text, [(7, 7), (width, height)])
        assert [each.label for each in back.boxes] == ["it"] and back.boxes[0].box.image == 1
        off = np.abs(np.subtract(corners(back.boxes[0].box), corners(box)))
        assert (off <= np.array([width, height] * 2) / COORDINATE_MAX / 2 + 1e-6).all()


def test_from_text_to_pixels_and_back_is_exact():
    for size in ((640, 480), (1, 1), (4000, 37)):
        for numbers in ([0, 0, 999, 999], [1, 2, 3, 4], [499, 500, 501, 998]):
            text = f"<|det|>[{numbers}]<|/det|>"
            boxes = tuple(each.box for each in read_boxes(text, [size]).boxes)
            messages = (Message("user", "<image>"), Message("assistant", "<bbox>"))
            image = ImageRef(kind="file", name="a")
            record = Record(messages=messages, images=(image,), boxes=(boxes,), source="f", row=1)
            assert place_boxes(record, [size])[-1].content == text


def box(x1: float, y1: float, x2: float, y2: float, label: str = "a", image: int = 0) -> LabelledBox:
    return LabelledBox(label=label, box=Box(x1=x1, y1=y1, x2=x2, y2=y2, unit="pixels", image=image))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (0, 0, 5, 10), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (11, 11, 20, 20), 0.0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 1.0),
        ((3, 3, 3, 3), (4, 4, 4, 4), 0.0),
        ((3, 3, 3, 3), (0, 0, 10, 10), 0.0),
    ],
)
def test_iou(one, other, expected):
    assert iou(box(*one).box, box(*other).box) == iou(box(*other).box, box(*one).box) == pytest.approx(expected)


def test_boxes_are_matched_one_to_one_within_their_label():
    a, b = (0, 0, 10, 10), (0, 0, 5, 10)
    assert matched_ious([box(*a), box(*b)], [box(*b), box(*a)]) == [1.0, 1.0]  # the order does not count
    assert matched_ious([box(*a), box(*a)], [box(*a)]) == [1.0, 0.0]  # one answer does not serve twice
    assert matched_ious([box(*a)], [box(*b), box(*a), box(*a)]) == [1.0]  # nor do more answers harm
    assert matched_ious([box(*a, "Dog ")], [box(*b, " dog"), box(*a, "cat")]) == [0.5]
    assert matched_ious([box(*a)], [box(*a, image=1)]) == [0.0]
    assert matched_ious([], [box(*a)]) == []
    # The pair of the highest IoU first: the second expected box keeps its better partner.
    assert matched_ious([box(0, 0, 10, 10), box(0, 0, 9, 10)], [box(0, 0, 9, 10)]) == [0.0, 1.0]
