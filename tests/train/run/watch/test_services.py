"""wandb and VisualDL, read back with their own tools."""

import pytest
from PIL import Image
from visualdl import LogReader

from train.run.watch.log import MetricsLog
from train.run.watch.sink import Sample
from train.run.watch.visualdl_log import VisualDLLog

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
def test_a_run_writes_for_both_services(run, tmp_path):
    assert run(tmp_path / "run", "max_steps=1", "wandb.mode=offline", "log=[wandb,visualdl]") == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    (path,) = (tmp_path / "run" / "visualdl").iterdir()
    (loss,) = LogReader(file_path=str(path)).get_data("scalar", "train/loss")
    assert (loss.id, loss.value) == (1, pytest.approx(8.06, abs=0.2))


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
