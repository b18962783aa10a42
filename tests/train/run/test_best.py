"""The best checkpoint of a run: which it is, what keeps it, who finds it; and a run that ends early."""

import json
import math
import os
import shutil
import signal

import pytest

from tests.train.run.test_run import metrics
from train.config.load import load_config
from train.export.merged import main as export_main
from train.run.best import judge
from train.run.build import open_base
from train.run.build_data import build_data
from train.run.held_out import HeldOut
from train.store.checkpoints import checkpoints, chosen_checkpoint, prune, read_state
from train.store.facts import read_fact
from train.store.provenance import ExportReport
from train.store.run_dir import read_marker
from vl2.errors import UserError


def test_the_earlier_of_two_equal_ones_stays_the_best():
    """Loss is better when it is lower, a metric when it is higher; a number that is none is never the best."""
    found, seen = None, []
    for step, loss in enumerate((3.0, 2.0, 2.0, math.nan, 2.5, 1.0), start=1):
        found = judge(found, step, {"loss": loss, "anls": loss}, "loss")
        seen.append((found.best.step, found.without_best))
    assert seen == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (6, 0)]
    first = judge(None, 1, {"loss": 1.0, "anls": 0.5}, "anls")
    assert judge(first, 2, {"loss": 2.0, "anls": 0.6}, "anls").best.step == 2
    assert judge(first, 2, {"loss": 0.1, "anls": 0.5}, "anls").best == first.best
    assert judge(None, 4, {"loss": 1.0}, "").best is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["eval.best=loss"], r"eval\.best=loss: nothing is validated on the way; give eval\.every"),
        (["eval.patience=2"], r"eval\.patience=2: nothing is validated on the way"),
        (["eval.every=2", "eval.patience=0"], r"eval\.patience=0: expected at least 1"),
        (["eval.every=2", "eval.patience=2", "eval.best=none"], r"eval\.patience=2 with eval\.best=none"),
        (
            ["eval.every=2", "eval.best=anls"],
            r"eval\.best=anls: .* not computed; .*=\[exact_match,anls\]",
        ),
        (
            ["eval.every=2", "eval.best=exact_match", "eval.questions=0"],
            r"best=exact_match with eval\.questions=0",
        ),
        (["eval.every=2", "eval.best=los"], r"eval\.best=los: expected one of auto, none, loss.*did you mean loss"),
    ],
)
def test_what_would_never_be_the_best_is_refused(arguments, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load_config(arguments(tmp_path, "data.eval_rows=3", *settings))


def test_pruning_keeps_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr("train.store.checkpoints.is_whole", lambda folder: True)
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:06d}").mkdir()
    prune(tmp_path, 2, best=1)
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["1", "3", "4"]
    prune(tmp_path, 1)
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["4"]


# ---- a run whose held-out loss falls, then rises


LOSSES = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 1.5, 6: 1.2}
SETTINGS = ("eval.every=1", "eval.questions=0", "save_steps=3", "keep_checkpoints=1", "lora.groups=[attention]")


@pytest.fixture
def given_losses(monkeypatch):
    """The held-out rows have the losses of LOSSES, whatever the model; the steps at which they were asked."""
    asked = []

    def validate(self, step, asked_to_stop):
        asked.append(step)
        return original(self, step, asked_to_stop)

    from train.run.validation import Validation

    original = Validation._validate
    monkeypatch.setattr(Validation, "_validate", validate)
    monkeypatch.setattr(
        HeldOut, "losses", lambda self, stop: type("Losses", (), {"mean": lambda self: LOSSES[asked[-1]]})()
    )
    monkeypatch.setattr(HeldOut, "loss_of", lambda self, losses: {})
    return asked


@pytest.mark.slow
def test_the_best_checkpoint_outlives_pruning_and_is_found_by_its_name(
    run, data_file, tmp_path, given_losses, capsys, model_folder
):
    run_dir, out = tmp_path / "run", tmp_path / "predictions.jsonl"
    settings = (*SETTINGS, f"data.eval_path={data_file}")
    assert run(run_dir, *settings) == 0
    assert given_losses == [0, 1, 2, 3, 4, 5, 6]  # after is what the last step was
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000002", "step-000006"]
    best = read_marker(run_dir).best
    assert (best.metric, best.step, best.value) == ("loss", 2, 1.0)
    state = read_state(run_dir / "checkpoints" / "step-000006").validation
    assert (state.step, state.best, state.without_best) == (6, best, 4)

    export_main([f"run={run_dir}", "checkpoint=best", "device=cpu"])
    report = read_fact(ExportReport, run_dir / "export-step-000002" / "export.json")
    assert report.step == 2
    from train.ask.evaluate import main as eval_main
    from train.ask.infer import main as infer_main

    capsys.readouterr()
    for which in ("2", "best", "last"):
        arguments = [f"model={run_dir}", f"checkpoint={which}", "device=cpu", "max_new_tokens=1"]
        assert infer_main([*arguments, "prompt=What?"]) == 0
    assert eval_main([f"model={run_dir}", "checkpoint=best", f"data.path={data_file}", f"out={out}", "limit=1"]) == 0
    for which, message in (
        ("4", r"checkpoint=4: .*step-000004 is not there; there are the steps 2, 6"),
        ("newest", r"checkpoint=newest: expected best, last or a number"),
    ):
        with pytest.raises(UserError, match=message):
            infer_main([f"model={run_dir}", f"checkpoint={which}", "prompt=What?"])
    with pytest.raises(UserError, match=r"checkpoint=best: .* holds no checkpoints; expected the folder of a run"):
        chosen_checkpoint(str(model_folder), "best")
    shutil.rmtree(run_dir / "checkpoints" / "step-000002")
    with pytest.raises(UserError, match=r"checkpoint=best: .*step-000002 is not there; there are the steps 6"):
        chosen_checkpoint(str(run_dir), "best")


@pytest.mark.slow
def test_a_run_ends_early_and_an_interrupted_validation_is_made_up_for(
    run, data_file, tmp_path, given_losses, monkeypatch, capsys
):
    """SIGTERM comes while step 3 is validated: the step is saved at once, and the resumed run validates it first."""
    original = HeldOut.losses

    def interrupted(self, asked_to_stop):
        if given_losses[-1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked_to_stop()
            return None
        return original(self, asked_to_stop)

    run_dir, settings = tmp_path / "run", (*SETTINGS, f"data.eval_path={data_file}", "eval.patience=2")
    monkeypatch.setattr(HeldOut, "losses", interrupted)
    assert run(run_dir, *settings) == 128 + signal.SIGTERM
    assert read_state(run_dir / "checkpoints" / "step-000003").validation.step == 2
    assert read_marker(run_dir).best.step == 2
    monkeypatch.setattr(HeldOut, "losses", original)
    assert run(run_dir, *settings, "resume=auto") == 0
    assert given_losses == [0, 1, 2, 3, 3, 4]
    out = capsys.readouterr().out
    assert "no better loss in 2 validations (eval.patience): the run ends here" in out
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000002", "step-000004"]
    assert (run_dir / "adapter").is_dir() and json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    lines = [(line["step"], line["eval_loss"]) for line in metrics(run_dir) if "eval_loss" in line]
    assert lines == [(step, LOSSES[step]) for step in (0, 1, 2, 3, 4)]

    assert run(run_dir, *settings, "resume=auto") == 0  # ended early it stays
    assert given_losses[6:] == [4]
    assert read_marker(run_dir).step == 4
    assert run(run_dir, *SETTINGS, f"data.eval_path={data_file}", "eval.patience=3", "resume=auto") == 0
    assert given_losses[7:] == [5]


@pytest.mark.slow
def test_an_interrupted_validation_of_the_last_step_is_made_up_for(run, data_file, tmp_path, given_losses, monkeypatch):
    """A run whose steps are all made was finished without it, so that an earlier checkpoint stayed the best."""

    def interrupted(self, asked_to_stop):
        if given_losses[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        return original(self, asked_to_stop)

    original = HeldOut.losses
    run_dir, settings = tmp_path / "run", (*SETTINGS, f"data.eval_path={data_file}", "max_steps=2")
    monkeypatch.setattr(HeldOut, "losses", interrupted)
    assert run(run_dir, *settings) == 128 + signal.SIGTERM
    assert read_marker(run_dir).best.step == 1
    monkeypatch.setattr(HeldOut, "losses", original)
    assert run(run_dir, *settings, "resume=auto") == 0
    assert given_losses == [0, 1, 2, 2]
    assert read_marker(run_dir).best.step == 2 and read_marker(run_dir).status == "finished"
    assert read_state(run_dir / "checkpoints" / "step-000002").validation.step == 2


@pytest.mark.slow
def test_the_best_counts_no_longer_where_its_checkpoint_is_gone(run, data_file, tmp_path, given_losses, capsys):
    """Going on from step 3, whose best was pruned for a later one that is given up: the next validation is the best."""
    run_dir, settings = tmp_path / "run", (*SETTINGS, f"data.eval_path={data_file}", "max_steps=3")
    assert run(run_dir, *settings) == 0
    shutil.rmtree(run_dir / "checkpoints" / "step-000002")
    assert run(run_dir, *settings, "max_steps=4", "resume=auto") == 0
    assert "the best checkpoint so far, of step 2, counts no longer" in capsys.readouterr().err
    assert read_marker(run_dir).best.step == 4


def test_boxes_that_nobody_expects_decide_nothing(arguments, data_file, tmp_path):
    settings = ("eval.every=2", "eval.best=box_iou", "eval.metrics=[box_iou]", f"data.eval_path={data_file}")
    config = load_config(arguments(tmp_path / "run", *settings))
    with pytest.raises(UserError, match=r"eval\.best=box_iou: none of the 20 held-out rows .* expects a box"):
        build_data(config, open_base(config))
