"""Boxes that a model answers with: in pixels beside the text, drawn on the picture, and how good they are."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import train.ask.evaluate as evaluate
import train.ask.infer as entry
from data.boxes import Box
from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from data.record import Record, RecordError
from tests.data.images.web import Web
from train.ask.answer import Answer
from train.ask.drawing import check_drawing
from train.ask.infer import infer, notes
from train.ask.load import Loaded, load
from train.ask.predictions import check_predictions
from train.ask.questions import questions_of
from train.ask.scores.boxes import box_score, summary
from train.config.schema import NANO, InferConfig
from vl2.errors import UserError
from vl2.prompt import Message

DOG = "<|ref|>a dog<|/ref|><|det|>[[100, 200, 300, 999], [0, 0, 999, 500]]<|/det|>"


def test_a_picture_with_boxes_that_is_gone_is_named_by_its_field(tmp_path):
    """Of several pictures, `images` did not say which."""
    Image.new("RGB", (9, 9)).save(tmp_path / "here.png")
    shown = [ImageRef(kind="file", name=str(tmp_path / name)) for name in ("here.png", "gone.png")]
    record = Record(
        messages=(Message("user", "<image><image>"), Message("assistant", "<bbox>")),
        images=tuple(shown),
        image_places=("pictures[0]", "pictures[1]"),
        boxes=((Box(x1=0, y1=0, x2=1, y2=1, unit="parts", image=1),),),
        source="a.jsonl",
        row=3,
    )
    with pytest.raises(RecordError, match=r"^a\.jsonl, row 3, pictures\[1\]: expected an image file, found none at"):
        list(questions_of(record, ImageReader()))


@pytest.fixture(scope="module")
def loaded(model_folder) -> Loaded:
    return load(model_folder)


@pytest.fixture
def says(loaded, monkeypatch):
    """says(TEXT): what the model will answer."""

    def say(text: str) -> None:
        ids = loaded.tokenizer.encode(text)
        monkeypatch.setattr(entry, "generate", lambda *arguments, **options: [ids])

    return say


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    paths = [str(tmp_path / name) for name in ("small.png", "large.png")]
    for path, size in zip(paths, ((90, 60), (999, 333)), strict=True):
        Image.new("RGB", size, "grey").save(path)
    return paths


def test_boxes_stand_beside_the_text_in_pixels(loaded, says, pictures):
    says(f"Here: {DOG} <|ref|>b<|/ref|><|det|>[[1, 2]]<|/det|>")
    config = InferConfig(prompt="<|ref|>a dog<|/ref|>", image=pictures)
    answer = infer(loaded, config)
    assert DOG in answer["text"]  # the tokens of grounding are not left out of it
    assert answer["boxes"] == [
        {"label": "a dog", "image": 2, "box": [100.0, 66.67, 300.0, 333.0]},
        {"label": "a dog", "image": 2, "box": [0.0, 0.0, 999.0, 166.67]},
    ]
    assert answer["malformed_boxes"] == 1 and "drawn" not in answer
    assert "1 boxes of the answer cannot be read, and are left out" in notes(answer, config)


def test_boxes_of_a_turned_picture_are_in_pixels_as_the_model_saw_it(loaded, says, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg", exif=exif)
    says("<|det|>[[0, 0, 999, 999]]<|/det|>")
    for way, size in (("ignore", [90.0, 60.0]), ("rotate", [60.0, 90.0])):
        turned = Loaded(**{**vars(loaded), "images": ImageReader(exif=way)})
        draw = str(tmp_path / f"{way}.png")
        answer = infer(turned, InferConfig(prompt="?", image=[str(tmp_path / "a.jpg")], draw=draw))
        assert answer["boxes"][0]["box"] == [0.0, 0.0, *size]
        with Image.open(draw) as image:
            assert list(image.size) == size


def test_the_picture_is_drawn(loaded, says, pictures, tmp_path):
    says(DOG)
    draw = str(tmp_path / "new" / "drawn.png")
    answer = infer(loaded, InferConfig(prompt="?", image=pictures[1:], draw=draw))
    assert answer["drawn"] == [draw]
    with Image.open(draw) as image, Image.open(pictures[1]) as before:
        assert image.size == before.size
        rows, columns = np.nonzero((np.asarray(image) != np.asarray(before.convert("RGB"))).any(-1))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 998, 0, 332)
    # Of several pictures each its own file; the boxes are on the last.
    answer = infer(loaded, InferConfig(prompt="?", image=pictures, draw=draw))
    assert answer["drawn"] == [str(tmp_path / "new" / f"drawn-{i}.png") for i in (1, 2)]
    with Image.open(answer["drawn"][0]) as image, Image.open(pictures[0]) as before:
        assert np.array_equal(np.asarray(image), np.asarray(before))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["drawn-1.png", "drawn-2.png", "drawn.png"]
    says("none")
    config = InferConfig(prompt="?", image=pictures, draw=draw)
    assert f"the answer has no boxes, so {draw} shows none" in notes(infer(loaded, config), config)


def test_only_a_drawing_is_drawn_over(loaded, says, pictures, tmp_path, monkeypatch):
    """draw=cat.png with image=cat.png would have replaced the photograph by its drawing."""
    monkeypatch.setattr(entry, "load", lambda *arguments: pytest.fail("loaded"))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("mine")
    for name in (*pictures, "folder.png", "pipe.png", "text.png"):
        path = str(tmp_path / name)
        with pytest.raises(UserError, match=rf"^draw={path}: {path} is no drawing of an earlier answer; give another"):
            check_drawing(Path(path), 1)
    with pytest.raises(UserError, match="is no drawing of an earlier answer"):
        entry.main(["model=nano", f"image={pictures[0]}", "prompt=?", f"draw={pictures[0]}", "device=cpu"])
    again = tmp_path / "drawn.png"
    says(DOG)
    infer(loaded, InferConfig(prompt="?", image=pictures[:1], draw=str(again)))
    check_drawing(again, 1)
    again.rename(tmp_path / "drawn-2.png")
    check_drawing(again, 2)
    (tmp_path / "drawn-1.png").write_bytes(Path(pictures[0]).read_bytes())
    with pytest.raises(UserError, match=r"drawn-1\.png is no drawing of an earlier answer"):
        check_drawing(again, 2)


@pytest.mark.parametrize(
    ("name", "images", "problem"),
    [
        ("a.jpg", 1, r"expected the name of a \.png file"),
        ("", 1, r"expected the name of a \.png file"),
        ("a.png", 0, "there is no picture to draw on; give image=FILE"),
        ("file/a.png", 1, "expected a folder, found"),
    ],
)
def test_drawings_that_cannot_be_written_are_said_first(tmp_path, name, images, problem):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^draw=.*{problem}"):
        check_drawing(tmp_path / name, images)


@pytest.mark.slow
def test_a_picture_from_an_address(loaded, says, pictures, tmp_path, monkeypatch, capsys):
    """Typed by the user, it may lie on a machine nearby; it is fetched once for size, answer and drawing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(entry, "load", lambda *arguments: load(loaded.source.base))
    says(DOG)
    web = Web()
    try:
        web.answers["/a.png"] = lambda handler: handler.give(Path(pictures[1]).read_bytes())
        arguments = ["model=nano", f"image={web.url('/a.png')}", "prompt=?", "device=cpu"]
        assert entry.main([*arguments, f"draw={tmp_path / 'drawn.png'}"]) == 0
        assert len(web.asked) == 1
        with pytest.raises(UserError, match=r"^image: cannot fetch .*/b\.png: the server answers 404 Not Found"):
            entry.main([*arguments, f"image={web.url('/b.png')}"])
    finally:
        web.end()
    out, err = capsys.readouterr()
    assert out == f"{DOG}\n"  # the answer alone
    row = json.loads(next(line for line in err.splitlines() if line.startswith("box: ")).removeprefix("box: "))
    assert row == {"label": "a dog", "image": 1, "box": [100.0, 66.67, 300.0, 333.0]}
    assert (tmp_path / "drawn.png").is_file()


def test_boxes_are_scored_against_the_expected_ones():
    pictures = [ImageRef(kind="bytes", name="it", data=png(width=999, height=333))]
    reader = ImageReader()
    expected = "<|ref|>a<|/ref|><|det|>[[0, 0, 100, 100], [200, 0, 300, 100]]<|/det|>"
    expected += "<|ref|>b<|/ref|><|det|>[[5, 5, 9, 9]]<|/det|>"
    answer = "<|ref|>A<|/ref|><|det|>[[0, 0, 100, 50], [0]]<|/det|> <|ref|>c<|/ref|><|det|>[[5, 5, 9, 9]]<|/det|>"
    score = box_score(expected, answer, pictures, reader)
    assert score.ious == pytest.approx((0.5, 0.0, 0.0))
    assert (len(score.found), score.malformed) == (2, 1)
    right = box_score(expected, expected, pictures, reader)
    assert right.ious == pytest.approx((1.0, 1.0, 1.0))
    beside = box_score("no box expected", answer, pictures, reader)
    assert summary([score, right, beside])["boxes"] == {
        "expected": 6,
        "found": 5,  # those of the question for which no box was expected are not counted
        "malformed": 1,
        "mean_iou": pytest.approx(3.5 / 6),
        "over_half": pytest.approx(4 / 6),
    }
    assert summary([beside]) == summary([]) == {}
    absent = [ImageRef(kind="file", name="/absent.png")]
    assert box_score("text", "text", absent, reader).ious == ()  # no picture need be opened
    with pytest.raises(ImageError, match="found none at"):
        box_score(expected, answer, absent, reader)


@pytest.mark.slow
def test_eval_scores_boxes_where_they_are_expected(model_folder, pictures, tmp_path, monkeypatch, capsys):
    """Rows in pixels, in VL2's own text, and without any; the answers are half of the box, all of it, and none."""
    objects = {"ref": ["a dog"], "bbox": [[0, 0, 999, 333]]}
    rows = [
        {"messages": talk("<image>Where?", "<ref-object><bbox>"), "images": pictures[1:], "objects": objects},
        {"messages": talk("<image><image>Where?", DOG), "images": pictures},
        {"messages": talk("What?", "Nothing.")},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["<|ref|>a dog<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>", DOG, "Nothing."]
    asked = []

    def ask(loaded, questions, **options):
        asked.extend(questions)
        return [Answer(text=text, cut=False) for text in given]

    monkeypatch.setattr(evaluate, "ask", ask)
    out = tmp_path / "predictions.jsonl"
    arguments = [f"model={model_folder}", f"data.path={data}", f"out={out}", "device=cpu"]
    assert evaluate.main(arguments) == 0
    assert asked[0].expected == "<|ref|>a dog<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    half = 500 / 999
    assert json.loads(capsys.readouterr().out)["boxes"] == {
        "expected": 3,
        "found": 3,
        "malformed": 0,
        "mean_iou": pytest.approx((half + 2) / 3),
        "over_half": 1.0,
    }
    first, second, third = map(json.loads, out.read_text().splitlines())
    assert first["boxes"] == [{"label": "a dog", "image": 1, "box": [0.0, 0.0, 999.0, 166.67]}]
    assert (first["iou"], second["iou"]) == ([pytest.approx(half, abs=1e-4)], [1.0, 1.0])
    assert [box["image"] for box in second["boxes"]] == [2, 2]
    assert third["boxes"] == [] and "iou" not in third
    check_predictions(out)  # rows with boxes are known as predictions


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "png")
    return stream.getvalue()


@pytest.mark.slow
def test_nano_finds_a_shape(tmp_path):
    """From the question to the pixels, with a model that has really learned it."""
    picture = Image.new("RGB", (384, 384), "white")
    ImageDraw.Draw(picture).ellipse((48, 48, 336, 336), fill=(220, 40, 40))
    picture.save(tmp_path / "a.png")
    answer = infer(load(NANO), InferConfig(prompt="<|ref|>red circle<|/ref|>", image=[str(tmp_path / "a.png")]))
    assert [box["label"] for box in answer["boxes"]] == ["red circle"]
    assert np.abs(np.subtract(answer["boxes"][0]["box"], [48, 48, 336, 336])).max() < 10  # of 384 pixels
