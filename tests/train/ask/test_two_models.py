"""`eval` of one model and of two: numbers, predictions and the page, and what is refused before anything starts."""

import gc
import json
import re
import shutil
import weakref

import pytest
from PIL import Image

import train.ask.evaluate as evaluate
from data.record import RecordError
from tests.train.page.html_reader import Page, outside_links
from train.ask.answer import Answer
from train.ask.load import load
from train.ask.losses import mean_losses
from train.ask.predictions import check_predictions, check_report
from train.config.load import load_eval_config
from vl2.errors import UserError

BOX = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
HALF = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 500]]<|/det|>"


@pytest.fixture(scope="module")
def other_folder(model_folder, tmp_path_factory):
    """A copy, but for how it was shown photographs."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("other") / "model")
    (folder / "processor_config.json").write_text('{"exif_orientation": "rotate"}')
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files: a question with a box and one without; and two questions in one conversation."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (80, 40), "red").save(folder / "cat.png")

    def write(name: str, *rows: tuple[str, ...]):
        lines = []
        for row in rows:
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(row)]
            images = ["cat.png"] * row[0].count("<image>")
            lines.append(json.dumps({"messages": turns, "images": images}) + "\n")
        (folder / name).write_text("".join(lines))
        return folder / name

    return write("a.jsonl", ("<image>cat?", BOX), ("red?", "Yes")), write("b.jsonl", ("one?", "1", "two?", "20"))


@pytest.fixture
def says(monkeypatch):
    """Each model in its turn says these."""
    alive = []

    def go(*answers_of_models: list[str]):
        turns = iter(answers_of_models)

        def ask(loaded, questions, **options):
            gc.collect()
            assert [each for each in alive if each() is not None] == [], "two models in memory at once"
            alive.append(weakref.ref(loaded.model))
            return [Answer(text=text, cut=text == "cu") for text in next(turns)]

        monkeypatch.setattr(evaluate, "ask", ask)

    return go


@pytest.mark.slow
def test_two_models_answer_the_same_questions(model_folder, other_folder, files, says, tmp_path, capsys):
    """A box found and one found by half, one answer cut; the second model is loaded when the first is gone."""
    says([BOX, "yes", "1", "2"], [HALF, "Yes", "cu", "21"])
    out, report = tmp_path / "p.jsonl", tmp_path / "new" / "r.html"
    metrics = "metrics=[exact_match,normalised_match,relaxed_accuracy,box_iou]"
    arguments = [f"model={model_folder}", f"against={other_folder}", f"data.path={files[0]}", f"data.path={files[1]}"]
    arguments += [f"out={out}", f"report={report}", metrics, "device=cpu"]
    assert evaluate.main(arguments) == 0
    printed, said = capsys.readouterr()
    found = json.loads(printed)
    names = ("exact_match", "normalised_match", "relaxed_accuracy", "box_iou")
    half = pytest.approx(500 / 999)
    assert (found["model"], found["against"]["model"]) == (str(model_folder), str(other_folder))
    assert [found[name] for name in names] == [0.5, 0.75, 0.75, 1.0]
    assert [found["against"][name] for name in names] == [0.25, 0.25, 0.5, half]
    assert [found["difference"][name] for name in names] == [0.25, 0.5, 0.25, pytest.approx(499 / 999)]
    assert found["difference"]["loss"] == 0 and found["loss"] > 0  # a copy of the model
    assert found["right"]["exact_match"] == {"both": 0, "model": 2, "against": 1, "neither": 1}
    assert found["right"]["box_iou"] == {"both": 1, "model": 0, "against": 0, "neither": 0}
    assert (found["answers_differ"], found["cut"], found["against"]["cut"]) == (4, 0, 1)
    sources = found["sources"]
    assert [sources[str(file)]["questions"] for file in files] == [2, 2]
    assert [sources[str(file)]["exact_match"] for file in files] == [0.5, 0.5]
    assert "box_iou" not in sources[str(files[1])]
    assert f"note: 1 of 4 answers of {other_folder} were cut" in said
    assert "note: one model was trained with photographs turned" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == [str(model_folder)] * 4 + [str(other_folder)] * 4
    assert rows[4]["scores"] == {"exact_match": 0, "normalised_match": 0, "relaxed_accuracy": 0, "box_iou": half}
    html = report.read_text("utf-8")
    page = Page(html)
    assert outside_links(page) == []
    assert [len(re.findall(f'class="drawn {kind}"', html)) for kind in ("expected", "model0", "model1")] == [1, 1, 1]
    assert page.count("article") == 4 and page.count("option", value=str(1)) == 1
    check_predictions(out)
    check_report(report)


@pytest.mark.slow
def test_a_metric_without_anything_to_score_is_said(model_folder, files, tmp_path, says, capsys):
    says(["1", "20"])
    arguments = [f"model={model_folder}", f"data.path={files[1]}", f"out={tmp_path / 'p.jsonl'}", "device=cpu"]
    assert evaluate.main([*arguments, "metrics=[box_iou]", f"report={tmp_path / 'r.html'}"]) == 0
    printed, said = capsys.readouterr()
    assert "box_iou" not in json.loads(printed)
    assert "note: box_iou has no value: none of the 2 expected answers has a box" in said
    assert "0 of 0" in Page((tmp_path / "r.html").read_text("utf-8")).text


@pytest.mark.slow
def test_bad_rows_are_left_out_on_wish_before_a_model_is_loaded(
    model_folder, files, tmp_path, says, capsys, monkeypatch
):
    """A picture whose damage no header shows too, which would else have stopped what was half done."""
    Image.new("RGB", (64, 64)).save(tmp_path / "broken.jpg")
    data = (tmp_path / "broken.jpg").read_bytes()
    tables, frame = data.index(b"\xff\xdb"), data.index(b"\xff\xc0")  # without them no pixel can be computed
    (tmp_path / "broken.jpg").write_bytes(data[:tables] + data[frame:])
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk, "images": [name]} for name in ("gone.png", "broken.jpg")]
    rows.append({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"model={model_folder}", f"data.path={file}", f"out={tmp_path / 'p.jsonl'}", "device=cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_opened", lambda opened: pytest.fail("loaded"))
        with pytest.raises(RecordError, match=r"rows\.jsonl, row 1, images\[0\]: expected an image file, found none"):
            evaluate.main(arguments)
        with pytest.raises(UserError, match=r"more than data\.max_bad=1 bad rows"):
            evaluate.main([*arguments, "data.on_bad_record=skip", "data.max_bad=1"])
    says(["y"])
    assert evaluate.main([*arguments, "data.on_bad_record=skip"]) == 0
    printed, said = capsys.readouterr()
    found = json.loads(printed)
    assert (found["skipped"], found["conversations"], found["exact_match"]) == (2, 1, 1.0)
    assert "note: 2 rows cannot be used and were left out, the first: " in said


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_loaded(model_folder, other_folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_opened", lambda opened: pytest.fail("loaded"))
    monkeypatch.setattr(evaluate, "open_rows", lambda *arguments: pytest.fail("rows were read"))
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "file").touch()
    base = [f"model={model_folder}", f"data.path={files[0]}", f"out={tmp_path / 'p.html'}", "device=cpu"]
    for more, problem in (
        (
            [f"report={tmp_path / 'mine.html'}"],
            "^report=.*mine.html: there is a file that no evaluation wrote; give an",
        ),
        ([f"report={tmp_path / 'file' / 'r.html'}"], "^report=.*: expected a folder, found"),
        ([f"report={tmp_path / 'r.txt'}"], r"^report=.*: expected the name of a \.html file"),
        ([f"report={tmp_path / 'x' / '..' / 'p.html'}"], "^report=.*: the same file as out="),
        ([f"against={model_folder}/."], "^against=.*: expected another model, found the one of model="),
        ([f"against={tmp_path / 'no'}"], "no: no such folder"),
        ([f"against={tmp_path}"], "neither a model .* nor an adapter"),
        ([f"against={other_folder}", "against_checkpoint=best"], "holds no checkpoints"),
        (["against_base=nano"], r"^against_base=.*: expected against=FOLDER too, found none"),
    ):
        with pytest.raises(UserError, match=problem):
            evaluate.main([*base, *more])
    assert load_eval_config([*base, f"against={other_folder}"]).against == str(other_folder)


def test_a_row_that_one_model_cannot_take_is_left_out_for_both(model_folder, data_file, tmp_path):
    """Of 20 rows three show a picture, whose tokens are more than the other model has positions for."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["max_position_embeddings"] = 400
    (folder / "config.json").write_text(json.dumps(config))
    models = [evaluate.open_model(place) for place in (model_folder, folder)]
    arguments = [f"model={model_folder}", f"against={folder}", f"data.path={data_file}"]
    rows = evaluate.open_rows(load_eval_config([*arguments, "data.on_bad_record=skip"]), models)
    assert [len(each.records) for each in rows] == [17, 17]
    assert [record.row for record in rows[0].records] == [record.row for record in rows[1].records]
    assert not any(record.images for record in rows[0].records)
    assert [len(each.skipped) for each in rows] == [0, 3]


@pytest.mark.slow
def test_the_loss_of_each_source_is_that_of_its_rows_alone(model_folder, files):
    """A source without rows has none."""
    loaded = load(model_folder)

    def losses(*more: str):
        config = load_eval_config([f"model={model_folder}", *more])
        return mean_losses(loaded, *evaluate.open_rows(config, [evaluate.open_model(model_folder)]))

    paths = [f"data.path={file}" for file in files]
    (one, _), (other, _), (both, of) = losses(paths[0]), losses(paths[1]), losses(*paths)
    assert of == pytest.approx({0: one, 1: other}, rel=1e-6)
    assert min(one, other) < both < max(one, other)
    first, of = losses(*paths, "limit=1")
    assert of == {0: first}
