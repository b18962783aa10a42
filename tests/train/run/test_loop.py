"""The training loop as a user's TrainerCallback sees it, and a step whose log does not fit on the disk."""

import errno
import json
import time

import pytest
from paddlenlp.trainer import TrainerCallback

from train.run import gradients
from train.run.stop import TIME_IS_UP
from train.run.watch.log import MetricsLog
from train.store.checkpoints import checkpoints
from train.store.run_dir import read_marker
from vl2.errors import UserError

SMALL = ("lora.groups=[attention]", "lora.rank=2", "packs_per_step=2", "save_steps=0")


class Recorder(TrainerCallback):
    """Writes down every event with the step it belongs to, and asks for a save or a stop at the end of a step."""

    def __init__(self, *, save_at: int = 0, stop_at: int = 0):
        self.save_at, self.stop_at = save_at, stop_at
        self.events: list[tuple[str, int]] = []
        self.seen: dict[str, object] = {}

    def _take(self, event, state, details):
        self.events.append((event, state.global_step))
        self.seen.update(details)

    def on_step_end(self, args, state, control, **details):
        self._take("on_step_end", state, details)
        control.should_save = state.global_step == self.save_at
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_at


def _recording(event):
    def on_event(self, args, state, control, **details):
        self._take(event, state, details)

    return on_event


EVENTS = (
    *("on_train_begin", "on_epoch_begin", "on_step_begin", "on_load_data_end", "on_substep_end", "on_optimizer_begin"),
    *("on_optimizer_end", "on_log", "on_save", "on_epoch_end", "on_train_end"),
)
for name in EVENTS:
    setattr(Recorder, name, _recording(name))


@pytest.mark.slow
def test_callback_gets_every_event_in_order(run, tmp_path):
    """Two steps of two packs: Trainer's own loop would have fired these, and a user's callback counts on them."""
    recorder = Recorder()
    assert run(tmp_path / "run", *SMALL, "max_steps=2", callbacks=[recorder]) == 0
    step = ["on_step_begin", "on_load_data_end", "on_substep_end", "on_load_data_end"]
    step += ["on_optimizer_begin", "on_optimizer_end", "on_step_end", "on_log"]
    expected = ["on_train_begin", "on_epoch_begin", *step, *step, "on_epoch_end", "on_save", "on_train_end"]
    assert [event for event, _ in recorder.events] == expected
    assert dict(recorder.events) == {  # steps made when each came last
        **dict.fromkeys(("on_train_begin", "on_epoch_begin"), 0),
        **dict.fromkeys(("on_step_begin", "on_load_data_end", "on_substep_end"), 1),
        **dict.fromkeys(("on_optimizer_begin", "on_optimizer_end"), 1),
        **dict.fromkeys(("on_step_end", "on_log", "on_epoch_end", "on_save", "on_train_end"), 2),
    }
    for part in ("model", "optimizer", "lr_scheduler", "train_dataloader"):
        assert recorder.seen[part] is not None


@pytest.mark.slow
def test_callback_may_ask_for_a_save_and_a_stop(run, tmp_path):
    """A stop counts as the end of the run: its weights are kept, its marker says how many steps were made."""
    run_dir = tmp_path / "run"
    recorder = Recorder(save_at=1, stop_at=3)
    assert run(run_dir, *SMALL, "max_steps=6", "keep_checkpoints=5", callbacks=[recorder]) == 0
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000001", "step-000003"]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    marker = read_marker(run_dir)
    assert (marker.status, marker.step, marker.steps) == ("finished", 3, 6)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 3
    # The same command goes on from there, to the planned end.
    assert run(run_dir, *SMALL, "max_steps=6", "resume=auto") == 0
    assert read_marker(run_dir).step == 6


def test_one_rank_that_asks_is_enough(monkeypatch):
    """A save or stop asked for on one rank alone would leave the others waiting in their next sum."""
    import numpy as np

    other = np.array([[0.0, 1.0, 0.0]])
    monkeypatch.setattr(gradients, "gather_rows", lambda rows: np.concatenate([rows, other]))
    assert gradients.any_rank(True, False, False) == [True, True, False]


@pytest.mark.slow
def test_a_run_ends_in_time_and_saves_by_the_clock(run, tmp_path, monkeypatch, capsys):
    """Over before it begins, it makes a step all the same: a job that is sent again and again comes to its end."""
    run_dir, write = tmp_path / "run", MetricsLog.write

    def slow_step_2(self, metrics):
        time.sleep(0.7 if metrics.step == 2 else 0)
        write(self, metrics)

    monkeypatch.setattr(MetricsLog, "write", slow_step_2)
    options = (*SMALL, "max_steps=4", "keep_checkpoints=9")
    assert run(run_dir, *options, "max_minutes=0.01") == TIME_IS_UP == 75
    saved = run_dir / "checkpoints" / "step-000001"
    expected = f"stopped before max_minutes=0.01 were over, after step 1 of 4; saved {saved}. The same command with"
    assert expected in capsys.readouterr().out
    assert read_marker(run_dir).status == "stopped"
    assert run(run_dir, *options, "save_minutes=0.01", "resume=auto") == 0
    steps = [folder.name for folder in checkpoints(run_dir / "checkpoints")]
    assert steps[:2] == ["step-000001", "step-000002"] and steps[-1] == "step-000004"


@pytest.mark.slow
def test_disk_full_in_the_log_saves_the_step(run, tmp_path, monkeypatch):
    """The steps since the last save were lost: writing metrics.jsonl raised before the checkpoint was due."""
    run_dir, write = tmp_path / "run", MetricsLog.write

    def full_at_step_2(self, metrics):
        if metrics.step == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(run_dir / "metrics.jsonl"))
        write(self, metrics)

    monkeypatch.setattr(MetricsLog, "write", full_at_step_2)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full.*step 2.*saved.*resume=auto"):
        run(run_dir, *SMALL, "max_steps=4")
    assert [folder.name for folder in checkpoints(run_dir / "checkpoints")] == ["step-000002"]
    monkeypatch.undo()
    assert run(run_dir, *SMALL, "max_steps=4", "resume=auto") == 0
