"""wandb and VisualDL, read back with their own tools."""

import json
from pathlib import Path

import pytest
from PIL import Image
from visualdl import LogReader

from tests.train.run.test_run import metrics
from tests.train.run.watch.wandb_reader import history, messages
from train.config.load import load_config
from train.run.watch.log import MetricsLog
from train.run.watch.sink import Sample, flat
from train.run.watch.visualdl_log import VisualDLLog
from train.run.watch.wandb_run import start_wandb

SAMPLES = [
    Sample(
        picture=Image.new("RGB", (30, 20), "red"),
        question="What is this?",
        expected="a square",
        answer="a circle",
        scores={"exact_match": 0.0},
    ),
    Sample(picture=None, question="Is it?", expected="yes", answer="yes", scores={"exact_match": 1.0}),
]


@pytest.mark.slow
def test_a_run_writes_for_both_services(run, data_file, tmp_path):
    """Every number of metrics.jsonl is in wandb's offline folder and in VisualDL's log, the validations too."""
    run_dir = tmp_path / "run"
    held_out = (f"data.eval_path={data_file}", "eval.questions=2", "eval.max_new_tokens=2", "eval.permuted=false")
    assert run(run_dir, "max_steps=1", "wandb.mode=offline", "log=[wandb,visualdl]", *held_out) == 0
    expected: dict[int, dict[str, float]] = {}
    for line in metrics(run_dir):
        expected.setdefault(line["step"], {}).update(flat(line))
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    rows: dict[int, dict] = {}
    for row in history(folder):
        rows.setdefault(row.pop("optimizer_step"), {}).update(row)
    assert rows.keys() == expected.keys() == {0, 1}
    for step, numbers in expected.items():
        assert rows[step]["eval_samples._type"] == "table-file"
        kept = {name: value for name, value in rows[step].items() if not name.startswith(("_", "eval_samples."))}
        found = {name.replace(".", "/"): value for name, value in kept.items()}
        assert {"step": step, **found} == pytest.approx(numbers)
    assert {"loss", "grad_norm_of/experts", "expert_entropy_of/1", "eval_loss", "eval_exact_match"} <= expected[
        1
    ].keys()
    (started,) = [message.run for message in messages(folder) if message.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert (config["recipe"], config["optim"]["lr"], config["log"]) == ("sft_tiny", 1e-2, ["wandb", "visualdl"])
    assert json.loads((run_dir / "run.json").read_text())["wandb_id"] == started.run_id

    (path,) = (run_dir / "visualdl").iterdir()
    reader = LogReader(file_path=str(path))
    for name, value in expected[1].items():
        if name != "step":
            tag = f"eval/{name}" if name.startswith("eval_") else f"train/{name}"
            assert reader.get_data("scalar", tag)[-1].value == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_wandb_takes_samples_and_goes_on(tmp_path, monkeypatch):
    """A run that goes on offline writes a second folder of the same run, with the steps that follow.

    It may make some once more, as a kill lost them: wandb, which counts rows, took none of a step that it had.
    """
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    config = load_config(["conf=sft_tiny", "rehearse=true", "wandb.mode=offline", "wandb.name=mine"])
    for first in (1, 2):
        sink = start_wandb(tmp_path, config, "a1b2c3d4")
        assert sink is not None
        with MetricsLog([sink]) as log:
            for step in (first, first + 1):
                sink.step(step, {"step": step, "loss": 1.0 / step})
            log.validation(first + 1, {"eval_loss": 0.5})
            log.samples(first + 1, SAMPLES)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*-a1b2c3d4*"), key=lambda folder: folder.stat().st_mtime)
    found = [[row["optimizer_step"] for row in history(folder) if "loss" in row] for folder in folders]
    assert found == [[1, 2], [2, 3]] or found == [[1, 2, 2, 3]]
    drawn = [one.metric for one in messages(folders[-1]) if one.WhichOneof("record_type") == "metric"]
    assert ("*", "optimizer_step") in {(each.glob_name, each.step_metric) for each in drawn}
    last: dict = {}
    for row in history(folders[-1]):
        last |= row if row["optimizer_step"] == 3 else {}
    assert (last["eval_loss"], last["eval_samples._type"], last["eval_samples.nrows"]) == (0.5, "table-file", 2)
    tables = [one.artifact for one in messages(folders[0]) if one.WhichOneof("record_type") == "artifact"]
    table = tables[0]
    places = {entry.path: Path(entry.local_path) for entry in table.manifest.contents}
    content = json.loads(places.pop("eval_samples.table.json").read_text())
    assert content["columns"] == ["picture", "question", "expected", "answer", "exact_match"]
    picture, *rest = content["data"][0]
    assert rest == ["What is this?", "a square", "a circle", 0.0]
    assert content["data"][1] == [None, "Is it?", "yes", "yes", 1.0]
    ((name, place),) = places.items()
    assert picture["path"] == name and place.is_relative_to(tmp_path)
    with Image.open(place) as image:
        assert image.size == (30, 20)


def test_visualdl_goes_on_without_double_points(tmp_path):
    """A run killed at step 4, whose newest checkpoint is of step 2; its last record was cut off."""
    for steps, first in ((range(1, 5), 0), (range(3, 6), 2)):
        with MetricsLog([VisualDLLog(tmp_path, first_step=first)]) as log:
            for step in steps:
                log.sinks[0].step(step, {"step": step, "loss": 10 * first + step, "loss_of": {"50% cats": 1.0}})
            log.validation(steps[-1], {"eval_loss": 2.0, "exact_match": 0.5})
            log.samples(steps[-1], SAMPLES)
        (path,) = (tmp_path / "visualdl").iterdir()
        if not first:
            path.write_bytes(path.read_bytes()[:-3])
    reader = LogReader(file_path=str(path))
    losses = [(point.id, point.value) for point in reader.get_data("scalar", "train/loss")]
    assert losses == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    assert [p.id for p in reader.get_data("scalar", "train/loss_of/50_ cats")] == [1, 2, 3, 4, 5]
    assert [(p.id, p.value) for p in reader.get_data("scalar", "eval/exact_match")] == [(5, 0.5)]
    assert [p.id for p in reader.get_data("image", "samples/1/picture")] == [5]
    assert "answer: a circle" in reader.get_data("text", "samples/1/text")[0].text.encoded_text_string
    assert len(reader.log_data["meta_data"]["meta_data_tag"]) == 1
