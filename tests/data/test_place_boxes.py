"""Boxes of `objects` become DeepSeek-VL2's own text, in 0 to 999 of the picture as the model sees it."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from data.boxes import COORDINATE_MAX, check_written_boxes, place_boxes
from data.dataset import open_dataset
from data.forms.table import find_form
from data.images.reader import ImageReader
from data.record import Record, RecordError, parse_record
from data.settings import ReadSettings, SourceSettings
from tests.places import NANO_BPE
from vl2.errors import UserError
from vl2.prompt import render
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)
SIZE = (640, 480)
GIRAFFE = "<|ref|>The giraffe at the back.<|/ref|>"


def parse(row) -> Record:
    return parse_record(
        row,
        source="a.jsonl",
        row_number=3,
        folder=Path("/pictures"),
        tokenizer=TOKENIZER,
        settings=ReadSettings(),
        of=SourceSettings(path="a.jsonl"),
    )


def row(answer, objects=None, *, question="<image>\n<|grounding|>Where?", images=("a.png",)):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), **({"objects": objects} if objects is not None else {})}


def answer_of(record, *sizes) -> str:
    return place_boxes(record, sizes or [SIZE] * len(record.images))[-1].content


def in_pixels(text, size) -> list[float]:
    """As `parse_ref_bbox` of the official demo does, before it cuts to whole pixels."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return [number / COORDINATE_MAX * edge for number, edge in zip(numbers, (*size, *size))]


def test_pixels_parts_and_text_are_one():
    """One box in the three ways that a row may say it: the same ids, bit for bit."""
    pixels = [580 / 999 * 640, 270 / 999 * 480, 640, 900 / 999 * 480]
    given = {
        "pixels": row("<ref-object><bbox>", {"ref": ["The giraffe at the back."], "bbox": [pixels]}),
        "parts": row(
            "<ref-object><bbox>",
            {
                "ref": ["The giraffe at the back."],
                "bbox": [[x / edge for x, edge in zip(pixels, (640, 480) * 2)]],
                "bbox_type": "norm1",
            },
        ),
        "text": row(f"{GIRAFFE}<|det|>[[580, 270, 999, 900]]<|/det|>"),
    }
    ids = []
    for one in given.values():
        record = parse(one)
        rendered = render(place_boxes(record, [SIZE]), [(1, 1)], TOKENIZER)
        ids.append((rendered.input_ids.tolist(), rendered.labels.tolist()))
    assert ids[0] == ids[1] == ids[2]
    assert TOKENIZER.special_ids["<|det|>"] in ids[0][0]
    assert TOKENIZER.special_ids["<|grounding|>"] in ids[0][0]


@pytest.mark.parametrize("size", [(640, 480), (1998, 999), (37, 41), (1, 1), (9999, 3)])
def test_pixels_come_back_within_half_a_unit(size):
    """Half a unit is 1 / 1998 of the picture's width or height; a half is rounded up, whichever way it is said."""
    width, height = size
    for i in range(40):
        x1, y1 = width * (i / 97) % width, height * (i / 89) % height
        box = [x1, y1, x1 + (width - x1) * (i / 40), y1 + (height - y1) * (1 - i / 40)]
        text = answer_of(parse(row("<bbox>", {"bbox": [box]})), size)
        for found, wanted, edge in zip(in_pixels(text, size), box, (*size, *size)):
            assert math.isclose(found, wanted, abs_tol=edge / 1998 * (1 + 1e-5))
    half = [[1, 1, 1997, 998]]  # of 1998 x 999 pixels: 0.5 and 998.5 units
    parts = [[1 / 1998, 1 / 999, 1997 / 1998, 998 / 999]]
    assert answer_of(parse(row("<bbox>", {"bbox": half})), (1998, 999)) == "<|det|>[[1, 1, 999, 998]]<|/det|>"
    assert answer_of(parse(row("<bbox>", {"bbox": parts, "bbox_type": "norm1"}))) == "<|det|>[[1, 1, 999, 998]]<|/det|>"


def test_pixels_are_of_the_size_that_the_row_says():
    """ms-swift's `width` and `height` were read and not looked at: boxes were taken as they were."""
    said = {"bbox": [[160, 120, 320, 240]], "width": [320], "height": [240]}
    assert answer_of(parse(row("<bbox>", said)), (640, 480)) == "<|det|>[[500, 500, 999, 999]]<|/det|>"
    with pytest.raises(RecordError, match=r"objects\.bbox\[0\]: expected a box within the picture of 300 x 240 pixels"):
        answer_of(parse(row("<bbox>", {**said, "width": [300]})), (640, 480))
    with pytest.raises(RecordError, match=r"objects\.width: expected a width and a height for each picture, found 1"):
        parse(row("<bbox>", {**said, "image_id": [1]}))


def test_text_comes_back_exactly():
    for size in (SIZE, (3, 5)):
        for number in range(0, 1000, 37):
            text = f"<|det|>[[0, {number}, {number}, 999]]<|/det|>"
            assert answer_of(parse(row("<bbox>", {"bbox": [in_pixels(text, size)]})), size) == text


def test_several_boxes_labels_and_pictures():
    """Labels and boxes are taken in order through all turns; boxes side by side belong to one label."""
    left, right, low = [0, 0, 320, 480], [320, 0, 640, 480], [0, 240, 640, 480]
    objects = {
        "ref": ["dog", "dog", "cat"],
        "bbox": [left, right, low, [0, 0, 50, 100]],
        "image_id": [0, 0, 0, 1],
    }
    record = parse(
        row(
            "<ref-object><bbox><bbox> before <ref-object><bbox>, then click(<bbox>).",
            objects,
            question="<image><image>\nFind the <ref-object>.",
            images=("a.png", "b.png"),
        )
    )
    assert [len(boxes) for boxes in record.boxes] == [2, 1, 1]
    messages = place_boxes(record, [SIZE, (100, 200)])
    assert messages[0].content == "<image><image>\nFind the <|ref|>dog<|/ref|>."
    assert messages[1].content == (
        "<|ref|>dog<|/ref|><|det|>[[0, 0, 500, 999], [500, 0, 999, 999]]<|/det|> before "
        "<|ref|>cat<|/ref|><|det|>[[0, 500, 999, 999]]<|/det|>, then click(<|det|>[[0, 0, 500, 500]]<|/det|>)."
    )


def test_objects_beside_other_forms():
    objects = {"ref": ["dog"], "bbox": [[0, 0, 320, 480]]}
    turns = [{"from": "human", "value": "<ref-object>?"}, {"from": "gpt", "value": "<bbox>"}]
    found = [
        parse({"conversations": turns, "image": "a.png", "objects": objects}),
        parse({"query": "<ref-object>?", "response": "<bbox>", "images": ["a.png"], "objects": json.dumps(objects)}),
    ]
    for record in found:
        assert [message.content for message in place_boxes(record, [SIZE])] == [
            "<image>\n<|ref|>dog<|/ref|>?",
            "<|det|>[[0, 0, 500, 999]]<|/det|>",
        ]


@pytest.mark.parametrize("objects", [None, {}, {"ref": [], "bbox": []}, {"ref": None, "bbox": None, "image_id": None}])
def test_row_without_boxes_in_a_table_with_some(objects):
    record = parse({**row("It is here."), "objects": objects})
    assert place_boxes(record, [SIZE]) is record.messages
    with pytest.raises(RecordError, match=r"messages\[1\]\.content: found <bbox> in a row without objects"):
        parse({**row("It is <bbox>."), "objects": objects})


BOX = [1, 2, 3, 4]
BAD_OBJECTS = [
    ("<bbox>", None, r"messages\[1\]\.content: found <bbox> in a row without objects, which would be learned"),
    ("<ref-object>", None, r"messages\[1\]\.content: found <ref-object> in a row without objects"),
    ("<bbox>", "here", r"objects: expected an object with ref and bbox, found a string"),
    ("<bbox><bbox>", {"bbox": [BOX]}, r"objects\.bbox: expected one entry for each <bbox> .*found 1 for 2 <bbox>"),
    ("<bbox>", {"bbox": [BOX, BOX]}, r"objects\.bbox: expected one entry for each <bbox> .*found 2 for 1 <bbox>"),
    ("<bbox>", {"ref": ["a"], "bbox": [BOX]}, r"objects\.ref: expected one entry for each <ref-object> .*1 for 0"),
    ("<ref-object><bbox>", {"bbox": [BOX]}, r"objects\.ref: expected one entry .*found 0 for 1 <ref-object>"),
    ("<bbox>", {"bbox": BOX}, r"objects\.bbox: expected one entry for each <bbox> .*found 4 for 1|objects\.bbox\[0\]"),
    ("<bbox>", {"bbox": [[1, 2]]}, r"objects\.bbox\[0\]: expected four finite numbers .*found \[1, 2\]"),
    ("<bbox>", {"bbox": [[1, 2, 3, "4"]]}, r"objects\.bbox\[0\]: expected four finite numbers"),
    ("<bbox>", {"bbox": [[1, 2, 3, float("nan")]]}, r"objects\.bbox\[0\]: expected four finite numbers .*nan"),
    ("<bbox>", {"bbox": [[1, 2, 3, float("inf")]]}, r"objects\.bbox\[0\]: expected four finite numbers .*inf"),
    ("<bbox>", {"bbox": [[1, 2, 3, 10**400]]}, r"objects\.bbox\[0\]: expected four finite numbers"),
    ("<bbox>", {"bbox": [[3, 2, 1, 4]]}, r"objects\.bbox\[0\]: .*upper left corner before .*found \[3, 2, 1, 4\]"),
    ("<bbox>", {"bbox": [[1, 4, 3, 2]]}, r"objects\.bbox\[0\]: .*upper left corner before .*x \+ width"),
    ("<bbox>", {"bbox": [BOX], "bbox_type": "norm1"}, r"objects\.bbox\[0\]: expected parts .*from 0 to 1"),
    ("<bbox>", {"bbox": [BOX], "bbox_type": "norm1000"}, r"objects\.bbox_type: expected real .*found 'norm1000'"),
    ("<bbox>", {"bbox": [BOX], "image_id": [1]}, r"objects\.bbox\[0\]: .*the row's 1 picture, found one on picture 1"),
    ("<bbox>", {"bbox": [BOX], "image_id": [-1]}, r"objects\.image_id\[0\]: expected the number of a picture"),
    ("<bbox>", {"bbox": [BOX], "image_id": [0, 0]}, r"objects\.image_id: expected the number of a picture for each"),
    ("<bbox>", {"bbox": [BOX], "points": [1]}, r"objects\.points: expected ref, bbox, bbox_type, image_id, width"),
    ("<bbox>", {"bbox": [BOX], "width": [9]}, r"objects\.width: expected as many widths as heights, found 1 for 0"),
    ("<bbox>", {"bbox": [BOX], "width": [9], "height": [0]}, r"objects\.height\[0\]: expected pixels, found 0"),
    ("<bbox>", {"bbox": [BOX], "width": 9, "height": 9}, r"objects\.width: expected a list of widths"),
    ("<bbox>", {"bbox": [BOX], "ref": "dog"}, r"objects\.ref: expected a list of labels, found a string"),
    ("<ref-object><bbox>", {"ref": [""], "bbox": [BOX]}, r"objects\.ref\[0\]: expected a label, found an empty string"),
    ("<ref-object><bbox>", {"ref": ["<image>"], "bbox": [BOX]}, r"objects\.ref\[0\]: expected a label, found <image>"),
]


@pytest.mark.parametrize(("answer", "objects", "match"), BAD_OBJECTS)
def test_bad_objects(answer, objects, match):
    """A row with `<bbox>` was trained with the literal text."""
    with pytest.raises(RecordError, match=r"^a\.jsonl, row 3, (?:" + match + ")"):
        parse(row(answer, objects))


@pytest.mark.parametrize("box", [[-1, 0, 10, 10], [0, 0, 641, 10], [0, 0, 10, 480.5], [700, 0, 800, 10]])
def test_box_outside_its_picture(box):
    record = parse(row("<bbox>", {"bbox": [box]}))
    with pytest.raises(
        RecordError,
        match=r"^a\.jsonl, row 3, objects\.bbox\[0\]: expected a box within the picture of 640 x 480 pixels",
    ):
        place_boxes(record, [SIZE])


def test_arithmetic_may_leave_a_box_a_hair_outside():
    record = parse(row("<bbox>", {"bbox": [[-1e-6, 0, 640.0000001, 480]]}))
    assert answer_of(record) == "<|det|>[[0, 0, 999, 999]]<|/det|>"


def test_pixels_are_those_that_the_model_sees(tmp_path):
    """A photograph that lies on its side: boxes mean it upright with exif=rotate, and as it is stored otherwise."""
    exif = Image.Exif()
    exif[274] = 6  # orientation: turn it clockwise
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.jsonl").write_text(json.dumps(row("<bbox>", {"bbox": [[5, 10, 20, 40]]}, images=["a.jpg"])) + "\n")

    def answer(exif_setting: str) -> str:
        images = ImageReader(exif=exif_setting)
        source = SourceSettings(path=str(tmp_path / "a.jsonl"))
        opened = open_dataset(
            [source], settings=ReadSettings(), tokenizer=TOKENIZER, candidates=((384, 384),), images=images, workers=1
        )
        record = opened.records[0]
        return place_boxes(record, [images.size(image) for image in record.images])[-1].content

    assert answer("rotate") == "<|det|>[[250, 250, 999, 999]]<|/det|>"
    with pytest.raises(RecordError, match=r"objects\.bbox\[0\]: expected a box within the picture of 40 x 20 pixels"):
        answer("ignore")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "<|ref|>a dog<|/ref|><|det|>[[10, 20, 300, 400]]<|/det|>, <|det|>[[0,0,9,999], [1, 1, 1, 1]]<|/det|>",
            "",
        ),
        ("<|ref|>a dog<|/ref|>.", ""),
        ("<|grounding|>a < b | c", ""),
        ("<|det|>[[1, 2, 3, 4]]", r"expected <|/det|> after <|det|>, found none"),
        ("[[1, 2, 3, 4]]<|/det|>", r"found <|/det|>"),
        ("<|ref|>a<|det|>[[1, 2, 3, 4]]<|/det|>", r"found <|det|> after <|ref|>"),
        ("<|ref|>a<|/det|>", r"found <|/det|> after <|ref|>"),
        ("<|det|><|/det|>", r"found ''"),
        ("<|det|>[1, 2, 3, 4]<|/det|>", r"found '[1, 2, 3, 4]'"),
        ("<|det|>[[1, 2, 3]]<|/det|>", r"found '[[1, 2, 3]]'"),
        ("<|det|>[[0.1, 0.2, 0.3, 0.4]]<|/det|>", r"found '[[0.1, 0.2, 0.3, 0.4]]'"),
        ("<|det|>[[-1, 2, 3, 4]]<|/det|>", r"found '[[-1, 2, 3, 4]]'"),
        ("<|det|>[[1, 2, 3, 1000]]<|/det|>", r"found [1, 2, 3, 1000]; divide pixels by"),
        ("<|det|>[[1, 2, 3, " + "9" * 9999 + "]]<|/det|>", r"found [1, 2, 3, 9999"),
        (
            "<|det|>[[5, 2, 3, 4]]<|/det|>",
            r"upper left corner before the lower right one, found [5, 2, 3, 4]",
        ),
        ("<|det|>" + "[" * 9999 + "<|/det|>", r"found '[[[["),
    ],
)
def test_boxes_in_text(text, problem):
    found = check_written_boxes(text)
    assert problem in found and bool(problem) == bool(found) and len(found) < 400
    if found:
        for turn in ("Look: " + text, text):
            with pytest.raises(RecordError, match=r"^a\.jsonl, row 3, messages\[1\]\.content: expected "):
                parse(row(turn))
    else:
        assert answer_of(parse(row(text))) == text


@pytest.mark.parametrize("slot", ["<bbox>", "<ref-object>", "<image>"])
def test_default_system_message_has_no_slots(slot):
    """It would take the place of a row's box or picture."""
    with pytest.raises(UserError, match=rf"data\.system: expected a text, found {slot} in it"):
        find_form({}, SourceSettings(path="a.jsonl", system=f"Answer with {slot}."))
