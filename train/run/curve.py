"""A picture of a run's loss and learning rate, `curve.png`, from its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SMOOTHING_STEPS = 20  # of the running mean that is drawn over the losses


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, one a logged step."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def running_mean(values: Sequence[float], length: int) -> np.ndarray:
    """Mean of each value and the up to `length` - 1 before it.

    [4, 2, 0], length 2  ->  [4, 3, 1]
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype="float64"))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - length, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw loss (left axis) and learning rate (right axis) over the optimizer steps.

    Args:
        metrics: a metrics.jsonl; without a line, as after `log_steps` that no step reached, nothing is drawn.
        picture: PNG to write.
        title: of the picture.
    """
    lines = read_metrics(metrics)
    if not lines:
        return
    from matplotlib.figure import Figure  # takes a second, and only a finished run needs it

    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    dense = len(lines) > 2 * SMOOTHING_STEPS
    left.plot(steps, losses, color="tab:blue", alpha=0.35 if dense else 1.0, linewidth=1, label="loss")
    if dense:
        mean = running_mean(losses, SMOOTHING_STEPS)
        left.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {SMOOTHING_STEPS} steps")
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        left.set_yscale("log")
    left.set(title=title, xlabel="optimizer step", ylabel="loss per supervised token")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(steps, [line["lr"] for line in lines], color="tab:gray", linewidth=1, linestyle="--", label="lr")
    right.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120)
