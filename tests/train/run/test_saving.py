"""Checkpoints that are written while the run goes on: what they hold, and what becomes of their errors."""

import errno
import json
import threading
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.trainer import TrainerState

import train.run.saving as saving
from train.run.optim import build_optimizer
from train.run.state import copy_state, trained_values
from train.run.watch.log import MetricsLog
from train.store.checkpoints import checkpoints
from train.store.run_dir import read_marker
from train.store.run_state import History
from vl2.errors import UserError

SMALL = ("lora.groups=[attention]", "lora.rank=2", "packs_per_step=2", "keep_checkpoints=5")


def test_the_next_steps_leave_the_copy_alone():
    """Paddle updates weights and moments in place, and the history is a list that grows."""
    layer, history, state = paddle.nn.Linear(3, 2), History(), TrainerState(global_step=1)
    parameters = {f"projector.{name}": parameter for name, parameter in layer.named_parameters()}
    optimizer = build_optimizer(parameters, 0.1)

    def step() -> None:
        layer(paddle.ones([1, 3])).sum().backward()
        optimizer.step()
        history.add(1.0, 10, 0.5)
        state.log_history.append({"loss": 1.0})

    step()
    copy = copy_state(layer, optimizer, weights=trained_values(layer), history=history, trainer_state=state)
    before = {name: array.copy() for name, array in (copy.weights | copy.optimizer).items()}
    step()
    state.global_step = 2
    assert all(np.array_equal(array, before[name]) for name, array in (copy.weights | copy.optimizer).items())
    assert (copy.step, copy.history, copy.trainer_state.global_step) == (
        1,
        History(losses=[1.0], tokens=10, seconds=0.5),
        1,
    )
    assert copy.trainer_state.log_history == [{"loss": 1.0}]
    now = copy_state(layer, optimizer, weights=trained_values(layer), history=history, trainer_state=state)
    assert not any(np.array_equal(array, before[name]) for name, array in (now.weights | now.optimizer).items())


@pytest.mark.slow
def test_a_checkpoint_is_written_while_the_next_step_is_made(run, whole, tmp_path, monkeypatch):
    """Held back until step 5 is reported, the checkpoint of step 4 is that of a run in which nothing was held back."""
    fifth_step, write, order = threading.Event(), saving.write_folder, []

    def write_late(target: Path, fill) -> None:
        if target.name == "step-000004":
            assert fifth_step.wait(60), "the step after the copy waits for the disk"
        write(target, fill)
        order.append(target.name)

    def report(self, metrics) -> None:
        order.append(metrics.step)
        if metrics.step == 5:
            assert read_marker(tmp_path / "run").step == 2, "the marker names a checkpoint that is not written yet"
            fifth_step.set()
        log(self, metrics)

    log = MetricsLog.write
    monkeypatch.setattr(saving, "write_folder", write_late)
    monkeypatch.setattr(MetricsLog, "write", report)
    assert run(tmp_path / "run", "save_steps=2") == 0
    assert [entry for entry in order if entry in (5, "step-000004", "step-000006")] == [5, "step-000004", "step-000006"]
    for name in ("optimizer.safetensors", "adapter/peft_model.safetensors", "trainer_state.json"):
        late, straight = (folder / "checkpoints" / "step-000004" / name for folder in (tmp_path / "run", whole))
        assert late.read_bytes() == straight.read_bytes(), name
    history = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())["history"]
    assert history["losses"] == json.loads((whole / "summary.json").read_text())["losses"][:4]


@pytest.mark.slow
def test_disk_full_behind_the_steps_ends_the_run(run, tmp_path, monkeypatch):
    """The thread's error is the run's, no later than a step after; the checkpoint before stays, and the run goes on."""
    run_dir, write, log = tmp_path / "run", saving.save_state, MetricsLog.write

    def full(folder: Path, state, **about) -> None:
        write(folder, state, **about)
        if state.step >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    def report(self, metrics) -> None:
        assert metrics.step < 4
        log(self, metrics)

    monkeypatch.setattr(saving, "save_state", full)
    monkeypatch.setattr(MetricsLog, "write", report)
    with pytest.raises(UserError, match=r"step-000002: the disk is full .*nothing was kept"):
        run(run_dir, *SMALL, "max_steps=6", "save_steps=1")
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000001"]
    assert read_marker(run_dir).step == 1
    monkeypatch.undo()
    assert run(run_dir, *SMALL, "max_steps=4", "resume=auto") == 0


@pytest.mark.slow
def test_disk_full_at_the_last_checkpoint_ends_the_run(run, tmp_path, monkeypatch):
    """Nothing comes after it that could fail: the run waits for it before it calls itself finished."""

    def full(folder: Path, state, **about) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_state", full)
    with pytest.raises(UserError, match=r"step-000001: the disk is full .*nothing was kept"):
        run(tmp_path / "run", *SMALL, "max_steps=1", "save_steps=0")
    marker = read_marker(tmp_path / "run")
    assert marker.status == "failed" and "step-000001: the disk is full" in marker.why
    assert not (tmp_path / "run" / "adapter").exists()
