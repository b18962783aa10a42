"""What a run's log, curve and checkpoints cost its steps, by hand: `bash launch.sh bench watch [--pairs=N]`.

One run of nano with save_steps=20 and log=[wandb,visualdl], offline. After ten steps that warm up, blocks of twenty
take turns: in one everything is on, a checkpoint in its middle with the picture and the writing that follow it; in the
next nothing is logged or saved. `ratio` is the time of the blocks with everything over that of those without, which
another process on the machine can move by more than it is; `log`, `save` and `meter` are the seconds that the steps
waited for each, over the whole time of the blocks with everything. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paddlenlp.trainer import TrainerCallback

WARM_UP, BLOCK = 10, 20  # steps


class Stopwatch(TrainerCallback):
    """Times whole turns of the loop, and the parts of them that are wrapped."""

    def __init__(self) -> None:
        self.step, self.began, self.turns = 0, 0.0, {}
        self.parts: dict[str, float] = {}

    @property
    def is_on(self) -> bool:
        """Whether everything is on in this step."""
        return self.step > WARM_UP and (self.step - WARM_UP - 1) // BLOCK % 2 == 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A turn ends and the next one begins."""
        now = time.perf_counter()
        if self.step > WARM_UP:
            self.turns.setdefault(self.is_on, []).append(now - self.began)
        self.step, self.began = state.global_step + 1, now

    def timed(self, part: str, work: Callable, *, always: bool = False) -> Callable:
        """A function that does its work in blocks with everything (or always) and counts the seconds there."""

        def wrapped(*args: Any, **options: Any) -> Any:
            if not (self.is_on or always):
                return None
            begun = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                if self.is_on:
                    self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - begun

        return wrapped


def measure(run_dir: Path, pairs: int, more: list[str]) -> dict[str, float]:
    """Train, and say what it cost.

    Args:
        run_dir: of the run.
        pairs: blocks of each kind.
        more: settings.
    """
    from train.config.load import load_config
    from train.run.saving import Saver
    from train.run.training import train
    from train.run.watch.log import MetricsLog
    from train.run.watch.meter import StepMeter

    watch = Stopwatch()
    wrapped = ((MetricsLog, "write", "log"), (MetricsLog, "saved", "log"), (Saver, "__call__", "save"))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    kept += [(StepMeter, name, getattr(StepMeter, name)) for name in ("metrics", "of_rank")]
    settings = ["conf=sft_tiny", "rehearse=true", f"run_dir={run_dir}", f"max_steps={WARM_UP + 2 * BLOCK * pairs + 1}"]
    settings += ["save_steps=20", "log=[wandb,visualdl]", "wandb.mode=offline", "eval.questions=0", "data.workers=0"]
    try:
        for owner, name, part in wrapped:
            setattr(owner, name, watch.timed(part, getattr(owner, name)))
        for name in ("metrics", "of_rank"):
            setattr(StepMeter, name, watch.timed("meter", getattr(StepMeter, name), always=True))
        if code := train(load_config([*settings, *more]), validate=False, callbacks=[watch]):
            raise RuntimeError(f"the run ended with exit code {code}")
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)
    on, off = sum(watch.turns[True]), sum(watch.turns[False])
    shares = {name: round(seconds / on, 5) for name, seconds in watch.parts.items()}
    return {
        "steps": len(watch.turns[True]),
        "on_seconds": on,
        "off_seconds": off,
        "ratio": round(on / off, 4),
        **shares,
    }


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench watch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="blocks of each kind (default 3)")
    parser.add_argument("settings", nargs="*", help="key=value of the run")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder, "run"), asked.pairs, asked.settings)
    print(f"{found['steps']} steps with log, curve and checkpoints {found['on_seconds']:.1f} s")
    print(f"as many without {found['off_seconds']:.1f} s, ratio {found['ratio']:.3f}")
    print(json.dumps(found))
