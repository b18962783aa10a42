"""Kills a run of nano again and again and looks what is left, by hand: `bash launch.sh bench soak kills=200`.

SIGKILL at a random moment: while it starts, steps, validates, saves or is exported; three in ten wait for a save, which
is short. After each kill the newest checkpoint must be as new as before, the marker must name none that is not there,
and `resume=auto` goes on. A run that has come to its end, and its export, must be those of a run that nobody killed,
byte for byte; then the next run begins. Attempts are forked from a process that has Paddle imported, so that one takes
seconds. The last line is JSON; any loss ends the soak with exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure  # noqa: F401  # so that no attempt takes the time for it

from tests.train.conftest import write_data
from train.config.schema import NANO
from train.export import merged
from train.run import training
from train.store.checkpoints import checkpoint_path, checkpoints
from train.store.names import CHECKPOINTS, METRICS
from train.store.run_dir import read_marker
from train.store.whole_folder import damage

SETTINGS = {
    "conf": "sft_tiny",
    "model.path": NANO,
    "device": "cpu",
    "rehearse": "false",
    "precision": "fp32",
    "data.max_tokens": 256,
    "data.workers": 1,
    "data.eval_fraction": 0.2,
    "eval.questions": 1,
    "eval.permuted": "false",
    "eval.max_new_tokens": 2,
    "eval.every": 3,
    "eval.best": "loss",
    "packs_per_step": 1,
    "lora.rank": 2,
    "lora.dropout": 0.1,
    "optim.lr": 1e-3,
    "recompute": 0,
    "log": "[]",
    "keep_checkpoints": 2,
    "seed": 6,
}
AIMED, SAVE_SECONDS = 0.3, 0.02  # so many kills wait for a save, which takes about that long here
MOST_OF_IT = 0.7  # of the time that a run takes: the latest kill
WEIGHTS = Path("adapter", "peft_model.safetensors")


class Soak:
    """Runs, kills, looks.

    Args:
        place: empty folder for all of it.
        steps: of a run.
        draw: the moments.
    """

    def __init__(self, place: Path, *, steps: int, save_steps: int, draw: random.Random):
        self.place, self.draw = place, draw
        data = write_data(place, rows=20, images=0)
        self.arguments = [f"{key}={value}" for key, value in SETTINGS.items()]
        self.arguments += [f"data.path={data}", f"max_steps={steps}", f"save_steps={save_steps}"]
        self.kills: Counter[str] = Counter()  # by where they struck
        self.lost: list[str] = []
        self.runs = self.attempts = 0
        self.patience = 1.0  # what the latest moment is multiplied by

    def reference(self) -> None:
        """One run and export that nobody kills, for their bytes and how long they take."""
        run_dir, started = self.place / "whole", time.monotonic()
        assert self.attempt(run_dir, training.main, self.train(run_dir, ""), None) == 0
        self.run_seconds, started = time.monotonic() - started, time.monotonic()
        assert self.attempt(run_dir, merged.main, self.export(run_dir), None) == 0
        self.export_seconds = time.monotonic() - started
        self.expected = result(run_dir)

    def until(self, kills: int) -> None:
        """Run after run, each killed until it has come to its end all the same."""
        while self.kills.total() < kills and not self.lost:
            self.runs += 1
            run_dir, done = self.place / f"run-{self.runs}", False
            while not done:
                done = self.make(run_dir, training.main, self.train(run_dir, how_to_go_on(run_dir)), self.run_seconds)
            if self.lost:
                return
            self.patience = 1.0
            if not self.make(run_dir, merged.main, self.export(run_dir), self.export_seconds):
                assert self.attempt(run_dir, merged.main, self.export(run_dir), None) == 0
            if result(run_dir) != self.expected:
                self.lost.append(f"{run_dir}: the result is not that of a run that nobody killed")
            else:
                shutil.rmtree(run_dir)
            print(f"{self.kills.total()} kills, {self.runs} runs: {dict(self.kills)}", flush=True)

    def train(self, run_dir: Path, goes_on: str) -> list[str]:
        """The arguments of a run."""
        return [*self.arguments, f"run_dir={run_dir}", *filter(None, [goes_on])]

    def export(self, run_dir: Path) -> list[str]:
        """The arguments of its export."""
        return [f"run={run_dir}", "device=cpu", "overwrite=true"]

    def make(self, run_dir: Path, main: Callable[[list[str]], int], arguments: list[str], seconds: float) -> bool:
        """One attempt, killed unless it ends before. Returns whether it came to its end."""
        before = newest(run_dir)
        moment = self.draw.uniform(0, MOST_OF_IT * seconds * self.patience)
        in_a_save = main is training.main and self.draw.random() < AIMED
        started = time.monotonic()
        code = self.attempt(run_dir, main, arguments, moment, in_a_save=in_a_save)
        if code == 0 and main is training.main and not before:
            self.run_seconds = min(self.run_seconds, time.monotonic() - started)  # the first one reads it all from disk
        if code is not None:
            if code:
                self.lost.append(f"{run_dir}: exit code {code}, see its log")
            return code == 0 or bool(self.lost)
        self.kills[where(run_dir, main)] += 1
        self.look(run_dir, before)
        # Else a machine that has become slower would never come to the first checkpoint, or to the end of an export.
        self.patience = 1.0 if newest(run_dir) > before else 1.5 * self.patience
        return bool(self.lost)

    def look(self, run_dir: Path, before: int) -> None:
        """What a kill may not have taken. An old checkpoint may be half removed: it was being pruned."""
        now, marker = newest(run_dir), read_marker(run_dir)
        if now < before:
            self.lost.append(f"{run_dir}: the newest whole checkpoint was of step {before}, it is of step {now}")
        if marker is not None and marker.step > now:
            self.lost.append(f"{run_dir}: the marker names step {marker.step}, the newest whole checkpoint is of {now}")

    def attempt(
        self,
        run_dir: Path,
        main: Callable[[list[str]], int],
        arguments: list[str],
        kill_after: float | None,
        *,
        in_a_save: bool = False,
    ) -> int | None:
        """Fork a process that does it. Returns its exit code, None when it was killed.

        Args:
            kill_after: seconds; None: not at all.
            in_a_save: not before a checkpoint is being written, and within its time.
        """
        self.attempts += 1
        process = os.fork()
        if process == 0:
            code = 99
            try:
                log = os.open(self.place / f"{run_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = main(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        deadline = None if kill_after is None else time.monotonic() + kill_after
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if deadline is not None and time.monotonic() >= deadline:
                if in_a_save:
                    if not list((run_dir / CHECKPOINTS).glob(".new-*")):
                        time.sleep(0.001)
                        continue
                    time.sleep(self.draw.uniform(0, SAVE_SECONDS))
                os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
            time.sleep(0.002)


def how_to_go_on(run_dir: Path) -> str:
    """What a user types: before the first checkpoint there is nothing to resume."""
    return "resume=auto" if checkpoints(run_dir / CHECKPOINTS) else "overwrite=true"


def newest(run_dir: Path) -> int:
    """Step of the newest whole checkpoint; 0: there is none."""
    whole = [folder for folder in checkpoints(run_dir / CHECKPOINTS) if damage(folder) is None]
    return int(whole[-1].name.partition("-")[2]) if whole else 0


def where(run_dir: Path, main: Callable[[list[str]], int]) -> str:
    """Where a kill struck, by what lies there."""
    if main is merged.main:
        return "in an export"
    if list((run_dir / CHECKPOINTS).glob(".new-*")):
        return "in a save"
    marker = read_marker(run_dir)
    if marker is None or not (run_dir / METRICS).is_file():
        return "before the steps"
    if marker.step == marker.steps or list(run_dir.glob(".new-*")):
        return "after the steps"
    return "in the steps"


def result(run_dir: Path) -> dict[str, str]:
    """Checksums of what a run came to: weights, optimizer, export."""
    last = checkpoint_path(run_dir / CHECKPOINTS, newest(run_dir))
    files = [run_dir / WEIGHTS, last / WEIGHTS, last / "optimizer.safetensors"]
    files += sorted((run_dir / "export").glob("*.safetensors"))
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(arguments: list[str]) -> int:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="kills=200 steps=12 save_steps=2 seed=0")
    asked = {"kills": 200, "steps": 12, "save_steps": 2, "seed": 0}
    for setting in parser.parse_args(arguments).settings:
        key, _, value = setting.partition("=")
        if key not in asked or not value.isdigit():
            parser.error(f"{setting}: expected one of {', '.join(asked)}, and a number")
        asked[key] = int(value)
    draw, started = random.Random(asked["seed"]), time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(place, steps=asked["steps"], save_steps=asked["save_steps"], draw=draw)
    soak.reference()
    print(f"a run takes {soak.run_seconds:.1f} s, its export {soak.export_seconds:.1f} s; in {place}", flush=True)
    soak.until(asked["kills"])
    for loss in soak.lost:
        print(f"lost: {loss}", file=sys.stderr)
    if not soak.lost:
        shutil.rmtree(place)
    found = {"kills": soak.kills.total(), **soak.kills, "runs": soak.runs, "attempts": soak.attempts}
    print(json.dumps({**found, "lost": len(soak.lost), "seconds": round(time.monotonic() - started)}))
    return 1 if soak.lost else 0
