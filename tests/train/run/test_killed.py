"""Runs that somebody kills, in part or whole: what is finished is saved, and nothing stays behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.processes import assert_end
from train.run.watch.log import MetricsLog
from train.store.checkpoints import damage

pytestmark = pytest.mark.slow


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_with_a_checkpoint(run, whole, tmp_path, monkeypatch, capsys):
    """The system short of memory kills a worker: it was a traceback and no checkpoint."""
    write = MetricsLog.write

    def kill_then_write(self, step_metrics):
        if step_metrics.step == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        write(self, step_metrics)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(MetricsLog, "write", kill_then_write)
    assert run(run_dir, "save_steps=0", "data.workers=2") == 1
    monkeypatch.undo()
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert damage(saved) is None
    said = capsys.readouterr().err
    assert "a data worker was killed by SIGKILL (out of memory?): finishing this step, then saving" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: stopped after step {int(saved.name[-6:])} of 6; saved {saved}: a data worker was")
    assert "data.workers=2" in last and last.endswith("resume=auto goes on")

    assert run(run_dir, "save_steps=0", "resume=auto") == 0
    assert losses(run_dir) == losses(whole)


def test_a_hangup_is_taken_like_sigterm(run, tmp_path, monkeypatch, capsys):
    """A terminal that closed, or a lost ssh connection, ended the run at once."""
    write = MetricsLog.write

    def hang_up_then_write(self, step_metrics):
        if step_metrics.step == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        write(self, step_metrics)

    monkeypatch.setattr(MetricsLog, "write", hang_up_then_write)
    assert run(tmp_path / "run", "save_steps=0") == 129
    assert (
        f"stopped by SIGHUP after step 1 of 6; saved {tmp_path}/run/checkpoints/step-000001" in capsys.readouterr().out
    )


def test_a_killed_process_ends_the_others_which_save(arguments, tmp_path):
    """Short of memory the system kills one of two: the other waited for ever in a sum, or was killed unsaved."""
    run_dir = tmp_path / "run"
    launcher = ["-m", "train.door.ranks", "cpu", "--nproc_per_node", "2", "--log_dir", str(run_dir / "log")]
    command = [sys.executable, *launcher, sys.executable, "-u", "-m", "train.door.cli", "train.run.training"]
    command += arguments(run_dir, "nproc=2", "save_steps=0", "max_steps=1000")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environ, stdout=said, stderr=said)
    try:
        wait_for_steps(run_dir, 2, process, tmp_path / "said")
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (second,) = (int(n) for n in ranks if b"PADDLE_TRAINER_ID=1\0" in Path(f"/proc/{n}/environ").read_bytes())
        os.kill(second, signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    text = (tmp_path / "said").read_text()
    assert "error: process 1 of this machine was killed by SIGKILL (out of memory?)" in text
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert damage(saved) is None and int(saved.name[-6:]) == len(losses(run_dir)), text
    assert f"the newest checkpoint is {saved}; the same command with resume=auto goes on" in text


def wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 120
    while not ((run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= steps):
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_behind(arguments, tmp_path):
    """Each kill left two workers of 330 MB, deaf to SIGTERM, and about 22 segments in /dev/shm."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "train.door.cli", "train.run.training"]
    command += arguments(run_dir, "data.workers=2", "max_steps=1000")
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environ, stdout=said, stderr=said)
    children_of, children = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    try:
        deadline = time.monotonic() + 120
        while not (len(children) == 2 and (run_dir / "metrics.jsonl").read_text()):  # it is in the steps
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
            children = [int(number) for number in children_of.read_text().split()]
    finally:
        process.kill()
        process.wait()
    assert_end(children)
    own = [f"_{number}_" for number in (process.pid, *children)]
    assert not [name for name in os.listdir("/dev/shm") if any(number in name for number in own)]
