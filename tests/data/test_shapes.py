"""The shapes data: pictures agree with answers, splits share nothing, and the whole can be made again anywhere."""

import hashlib
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from data.nano_tokenizer import NUM_LEARNED, make_tokenizer
from data.shapes import draw, questions, rows, sample_scene, split_of, write_shapes
from data.shapes.questions import COLOURS_ZH, FORMS_ZH, chinese_questions
from data.shapes.scene import COLOURS, FORMS, LAYOUTS, Scene, Shape

# What stands for each colour in a drawn picture: the nearest of these decides.
PURE = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (30, 60, 255),
    "yellow": (255, 220, 0),
    "purple": (150, 0, 200),
    "black": (0, 0, 0),
}
# Part of its box that each form covers, by geometry: pi / 4, 1, 1/2, 5/9, and the pentagram's.
COVER = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.556, "star": 0.32}


def one(**changes) -> Scene:
    shape = {"colour": "red", "form": "circle", "shade": 0, "place": "middle", "left": 48, "top": 48, "size": 288}
    return Scene(layout="one", background=0, snapped=True, shapes=(Shape(**{**shape, **changes}),))


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene).convert("RGB")).astype(int)


def look(scene: Scene) -> list[tuple[str, str, str]]:
    """Colour, form and place of every shape, found in the pixels alone."""
    red, green, blue = np.moveaxis(pixels(scene), -1, 0)
    picture, layout = (red << 16) + (green << 8) + blue, LAYOUTS[scene.layout]
    found = []
    for index, place in enumerate(layout.places):
        top, left = index // layout.columns * layout.cell, index % layout.columns * layout.cell
        cell = picture[top : top + layout.cell, left : left + layout.cell]
        shown = [value for value in np.unique(cell).tolist() if min(channels(value)) < 200]
        if not shown:
            continue
        (value,) = shown
        mask = cell == value
        side = np.flatnonzero(mask.any(axis=0))[[0, -1]] @ [-1, 1] + 1
        colour = min(PURE, key=lambda name: sum(np.subtract(channels(value), PURE[name]) ** 2))
        form = min(COVER, key=lambda name: abs(COVER[name] - mask.sum() / side**2))
        if form in ("triangle", "cross"):  # too near in cover to tell by it
            form = "cross" if _is_cross(mask) else "triangle"
        found.append((colour, form, place))
    return found


def channels(value: int) -> tuple[int, int, int]:
    return value >> 16, value >> 8 & 255, value & 255


def _is_cross(mask: np.ndarray) -> bool:
    """A cross is the same upside down, a triangle is not."""
    rows_with = np.flatnonzero(mask.any(axis=1))
    body = mask[rows_with[0] : rows_with[-1] + 1]
    return bool((body == body[::-1]).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_picture_shows_what_the_scene_says(layout):
    rng = random.Random(layout)
    for _ in range(12):
        scene = sample_scene(rng, layout, split="train")
        assert draw(scene).size == scene.size
        assert look(scene) == [(shape.colour, shape.form, shape.place) for shape in scene.shapes]


@pytest.mark.parametrize("form", FORMS)
def test_a_shape_touches_all_sides_of_its_box(form):
    """So boxes are tight, to two pixels where a form ends in a point: 48 to 335 of 384 is 124 to 874 of 999."""
    scene = one(form=form)
    mask = (pixels(scene) != 255).any(axis=2)
    for axis in (0, 1):
        first, last = np.flatnonzero(mask.any(axis=axis))[[0, -1]]
        assert 48 <= first <= 50 and 333 <= last <= 335
    assert scene.box(scene.shapes[0]) == (124, 124, 874, 874)


def test_pictures_are_the_same_everywhere():
    """Integers only: a golden of all forms; a change of it needs a new _VERSION in data/shapes/write.py."""
    digest = hashlib.sha256(b"".join(pixels(one(form=form)).astype(np.uint8).tobytes() for form in FORMS))
    assert digest.hexdigest()[:16] == "94dcd2816976c943"


def test_rows_are_the_same_everywhere():
    """A golden of questions and answers; a change of it needs a new _VERSION in data/shapes/write.py."""
    digest = hashlib.sha256()
    for task in ("pretrain", "chinese"):
        for split in ("train", "test"):
            digest.update(repr(list(rows(task=task, split=split, count=40, seed=7))).encode())
    assert digest.hexdigest()[:16] == "908f52ea667d3564"


def test_questions_about_a_scene():
    scene = sample_scene(random.Random(3), "four", split="train", kinds=[("red", "circle"), ("blue", "circle")])
    first, second = (shape.place for shape in scene.shapes)
    asked = {question.text: question.answer for question in questions([scene])}
    assert asked[f"What is at the {first}?"] == "red circle"
    assert asked["Where is the blue circle?"] == second
    assert asked["Which form is red?"] == "circle"
    assert "What colour is the circle?" not in asked, "there are two circles"
    assert asked["How many shapes are there?"] == "2"
    assert asked["List all shapes."] == "red circle, blue circle"
    assert (asked["Is there a red circle?"], asked["Is there a red star?"]) == ("yes", "no")
    assert list(asked.values()).count("nothing") == 4, "two empty places, asked in two languages"
    in_chinese = {question.answer for question in chinese_questions([scene])}
    assert in_chinese == {"红色圆形", "蓝色圆形"}


def test_boxes_take_the_official_form():
    asked = {question.text: question.answer for question in questions([one()])}
    ref = "<|ref|>red circle<|/ref|>"
    assert asked[ref] == f"{ref}<|det|>[[124, 124, 874, 874]]<|/det|>"


@pytest.mark.slow
def test_splits_share_no_picture():
    """Whatever the seeds: the content decides the split. Checked on content and by looking for equal pictures."""
    seen = {}
    for task in ("pretrain", "chinese"):
        for split, seed in (("train", 1), ("test", 1), ("train", 2), ("test", 2)):
            scenes = {scene for row in rows(task=task, split=split, count=300, seed=seed) for scene in row.scenes}
            assert {split_of(scene) for scene in scenes} == {split}
            seen.setdefault(split, set()).update(scenes)
    assert len(seen["train"]) > 1000 and len(seen["test"]) > 600
    assert not seen["train"] & seen["test"]


@pytest.mark.slow
def test_chinese_test_answers_cannot_be_guessed():
    """About one image or the newest of several; as a row's last answer each of the 30 comes as often."""
    found = list(rows(task="chinese", split="test", count=120, seed=5))
    last = Counter(row.turns[-1].answer for row in found)
    assert last == {colour + form: 4 for colour in COLOURS_ZH.values() for form in FORMS_ZH.values()}
    several = [row for row in found if len(row.scenes) > 1]
    assert 40 <= len(several) <= 80
    assert {len(row.scenes) for row in several} == {2, 3}
    for row in found:
        assert len(row.turns) == len(row.scenes)
        assert {turn.text for turn in row.turns} == {"<image>\n这是什么？"}, "the text gives nothing away"
        for turn, scene in zip(row.turns, row.scenes):
            ((colour, form, _),) = look(scene)
            assert turn.answer == COLOURS_ZH[colour] + FORMS_ZH[form]
        names = [scene.shapes[0].name for scene in row.scenes]
        assert len(set(names)) == len(names)


def test_images_in_turns_are_asked_about_at_once():
    train = [row for row in after_warm_up(200) if sum("<image>" in turn.text for turn in row.turns) > 1]
    assert len(train) > 50
    for row in train:
        shown = [i for i, turn in enumerate(row.turns) if turn.text.startswith("<image>\n")]
        assert len(shown) == len(row.scenes) and shown[0] == 0 and not row.preamble


WARM_UP = 1000


def after_warm_up(count: int, **options) -> list:
    """Training rows of the pre-training task, without those that come first."""
    return list(rows(task="pretrain", split="train", count=WARM_UP + count, seed=0, **options))[WARM_UP:]


def test_pretraining_begins_with_single_shapes():
    train = list(rows(task="pretrain", split="train", count=WARM_UP + 30, seed=0))
    layouts = [[scene.layout for scene in row.scenes] for row in train]
    assert layouts[:WARM_UP] == [["one"]] * WARM_UP
    assert any(shown != ["one"] for shown in layouts[WARM_UP:])
    test = rows(task="pretrain", split="test", count=100, seed=0)
    assert all(row.scenes for row in test), "lessons are not asked in the test"


@pytest.mark.slow
def test_pretrain_rows_mix_everything():
    train = after_warm_up(1000, wide_share=0.1)
    assert {len(row.scenes) for row in train} == {0, 1, 2, 3}
    assert {scene.layout for row in train for scene in row.scenes} == set(LAYOUTS)
    kinds = Counter(turn.kind for row in train for turn in row.turns)
    assert min(kinds.values()) >= 15 and len(kinds) == 18
    assert sum(len(row.turns) for row in train) >= 4.5 * len(train)
    for row in train:
        shown = 0
        asked = []
        for turn in row.turns if row.scenes else ():
            shown += turn.text.count("<image>")
            asked.append((shown, turn.text.removeprefix("<image>\n")))
        assert len(set(asked)) == len(asked), "a question is asked once of each picture"
    no_text = after_warm_up(100, text_share=0, wide_share=0)
    assert {scene.layout for row in no_text for scene in row.scenes} == {"one", "four", "nine"}
    test = list(rows(task="pretrain", split="test", count=50, seed=0))
    assert all(len(row.turns) == (1 if row.preamble else len(row.scenes)) for row in test)


@pytest.mark.slow
@pytest.mark.usefixtures("single_threaded_tokenizers")
def test_text_lessons_reach_every_token():
    """Each entry that stands for printable text is a target; what is left are control characters and broken ones."""
    tokenizer = make_tokenizer()
    lessons = after_warm_up(25000, text_share=1)
    answers = [turn.answer for row in lessons for turn in row.turns]
    used = {index for encoding in tokenizer.encode_batch(answers, add_special_tokens=False) for index in encoding.ids}
    missing = [tokenizer.decode([index]) for index in range(3, NUM_LEARNED) if index not in used]
    assert [text for text in missing if text.isprintable() and "\ufffd" not in text] == []
    assert len(missing) < 80


def test_files_are_what_the_rows_say(tmp_path):
    jsonl = write_shapes(tmp_path, task="pretrain", split="train", count=20, seed=4)
    assert jsonl == tmp_path / "train" / "pretrain.jsonl"
    written = [json.loads(line) for line in jsonl.read_text("utf-8").splitlines()]
    made = list(rows(task="pretrain", split="train", count=20, seed=4))
    assert len(written) == len(made) == 20
    for data, row in zip(written, made, strict=True):
        assert [message["role"] for message in data["messages"]] == ["user", "assistant"] * len(row.turns)
        assert [message["content"] for message in data["messages"][1::2]] == [turn.answer for turn in row.turns]
        assert sum(message["content"].count("<image>") for message in data["messages"]) == len(data["images"])
        assert len(data["images"]) == len(row.scenes)
        for name, scene in zip(data["images"], row.scenes, strict=True):
            with Image.open(jsonl.parent / name) as image:
                assert (np.asarray(image.convert("RGB")) == pixels(scene)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"], "nothing unfinished stays"


def test_a_shorter_set_is_the_start_of_a_longer_one():
    shorter = list(rows(task="chinese", split="test", count=10, seed=1))
    assert shorter == list(rows(task="chinese", split="test", count=50, seed=1))[:10]
    assert shorter != list(rows(task="chinese", split="test", count=10, seed=2))


def test_the_same_arguments_reuse_and_others_replace(tmp_path):
    arguments = {"task": "chinese", "split": "test", "count": 3, "seed": 1}
    jsonl = write_shapes(tmp_path, **arguments)
    before = jsonl.stat().st_mtime_ns
    assert write_shapes(tmp_path, **arguments).stat().st_mtime_ns == before
    train = write_shapes(tmp_path, **{**arguments, "split": "train"})
    assert jsonl.exists() and train.parent != jsonl.parent
    longer = write_shapes(tmp_path, **{**arguments, "count": 5})
    assert longer == jsonl and len(jsonl.read_text("utf-8").splitlines()) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "train"]


def test_several_processes_may_write_at_once(tmp_path):
    """As the ranks of a run do, here with an outdated folder in their way."""
    arguments = {"task": "chinese", "split": "test", "seed": 1}
    write_shapes(tmp_path, count=2, **arguments)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: write_shapes(tmp_path, count=6, **arguments), range(8)))
    assert len(set(paths)) == 1 and len(paths[0].read_text("utf-8").splitlines()) == 6
    assert len(list((paths[0].parent / "images").iterdir())) >= 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test"]


def test_shapes_on_nfs(tmp_path, nfs):
    """It locked the folder itself, which can only be opened for reading: there every rehearsal failed."""
    write_shapes(tmp_path, task="chinese", split="test", count=2, seed=1)
    assert nfs == [str(tmp_path / ".lock")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"test: expected an absent folder or one with generated shapes"):
        write_shapes(tmp_path, task="chinese", split="test", count=3, seed=1)
    assert (tmp_path / "test" / "mine.txt").read_text() == "keep"


def test_unknown_task_and_split_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"shapes.task: expected one of pretrain, chinese, found 'french'"):
        write_shapes(tmp_path, task="french", split="test", count=1, seed=1)
    with pytest.raises(ValueError, match=r"shapes.split: expected one of train, test, found 'dev'"):
        write_shapes(tmp_path, task="chinese", split="dev", count=1, seed=1)
    assert not list(tmp_path.iterdir())


def test_every_colour_and_form_has_a_picture_of_its_own():
    shown = {(colour, form): pixels(one(colour=colour, form=form)).tobytes() for colour in COLOURS for form in FORMS}
    assert len(set(shown.values())) == 30
