"""A picture of a run's loss and learning rate, `curve.png`, from its metrics.jsonl."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.run.watch.lines import of_steps, read_metrics
from train.run.watch.sink import Sink
from train.store.names import CURVE, METRICS

logger = logging.getLogger(__name__)

SMOOTHING_STEPS = 20  # of the running mean that is drawn over the losses
_MOST_DRAWN = 12  # sources, those with most supervised tokens; more lines can nobody tell apart
_LONGEST_NAME = 32  # characters of a source's name where there is little room


class CurvePicture(Sink):
    """Draws curve.png.

    Args:
        run_dir: of the run.
        title: of the picture.
    """

    def __init__(self, run_dir: Path, *, title: str):
        self.run_dir, self.title = run_dir, title

    def close(self, failed: bool) -> None:
        """Draw what there is; a picture that cannot be written ends no run."""
        try:
            draw_curve(self.run_dir / METRICS, self.run_dir / CURVE, title=self.title)
        except OSError as problem:
            logger.warning("%s cannot be written: %s", self.run_dir / CURVE, problem.strerror)


def running_mean(values: Sequence[float] | np.ndarray, length: int) -> np.ndarray:
    """Mean of each value and the up to `length` - 1 before it.

    [4, 2, 0], length 2  ->  [4, 3, 1]
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype="float64"))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - length, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def losses_by_source(lines: Sequence[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss of each source of a mixture: the steps that learned from it, and the mean over the last 20 of them.

    The mean is that of the tokens, not of the steps' means: a step with few tokens of a source counts little.

    Args:
        lines: of metrics.jsonl.
    """
    found = {}
    for name in dict.fromkeys(name for line in lines for name in line.get("loss_of", {})):
        of_source = [line for line in lines if name in line.get("loss_of", {})]
        tokens = np.array([line["supervised_of"][name] for line in of_source])
        sums = tokens * [line["loss_of"][name] for line in of_source]
        mean = running_mean(sums, SMOOTHING_STEPS) / running_mean(tokens, SMOOTHING_STEPS)
        found[name] = np.array([line["step"] for line in of_source]), mean
    return found


def ends_by_source(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Loss of each source of a mixture in the first quarter of its steps and in the last, of at most 20 steps each.

    Args:
        lines: of metrics.jsonl.
    """
    found = {}
    for name in losses_by_source(lines):
        of_source = [line for line in lines if name in line.get("loss_of", {})]
        length = min(SMOOTHING_STEPS, max(1, len(of_source) // 4))
        found[name] = [float(losses_by_source(part)[name][1][-1]) for part in (of_source[:length], of_source[-length:])]
    return found


def short_name(name: str) -> str:
    """A source's name, or its end where that is long: of a path the file."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _label(name: str) -> str:
    """A source's name for the legend; to matplotlib `$` is mathematics, and `_` at the beginning no label."""
    short = short_name(name)
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")


def draw_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw the loss, of a mixture each source's too (left axis), and the learning rate (right) over the steps.

    Args:
        metrics: a metrics.jsonl; without a line, as after `log_steps` that no step reached, nothing is drawn.
        picture: PNG to write.
        title: of the picture.
    """
    lines = [line for line in of_steps(read_metrics(metrics)) if line["loss"] is not None]
    if not lines:
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # takes a second, and only a finished run needs it

    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    dense = len(lines) > 2 * SMOOTHING_STEPS
    left.plot(steps, losses, color="tab:blue", alpha=0.35 if dense else 1.0, linewidth=1, label="loss")
    if dense:
        mean = running_mean(losses, SMOOTHING_STEPS)
        left.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {SMOOTHING_STEPS} steps")
    colours = colormaps["Dark2"].colors  # type: ignore[attr-defined]
    of_sources = losses_by_source(lines)
    learned = {name: sum(line.get("supervised_of", {}).get(name, 0) for line in lines) for name in of_sources}
    drawn = sorted(of_sources, key=lambda name: -learned[name])[:_MOST_DRAWN]
    for i, name in enumerate(drawn):
        of_source, mean = of_sources[name]
        # A lone point is no line.
        left.plot(
            of_source,
            mean,
            color=colours[i % len(colours)],
            linewidth=1.2,
            linestyle=("-", "--", ":", "-.")[i // len(colours) % 4],
            marker="." if len(mean) == 1 else "",
            label=_label(name),
        )
    if rest := len(of_sources) - len(drawn):
        left.plot([], [], linestyle="none", label=f"and {rest} more sources")
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        left.set_yscale("log")
    left.set(title=title, xlabel="optimizer step", ylabel="loss per supervised token")
    left.grid(alpha=0.3)
    right = left.twinx()
    right.plot(steps, [line["lr"] for line in lines], color="tab:gray", linewidth=1, linestyle="--", label="lr")
    right.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120)
