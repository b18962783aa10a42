"""A picture of a run, `curve.png`, from its metrics.jsonl: losses and learning rate, and what validations found."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.run.watch.lines import of_steps, of_validation, read_metrics
from train.store.names import CURVE, METRICS

SMOOTHING_STEPS = 21  # of the mean that is drawn over the losses
_MOST_DRAWN = 12  # sources, those with most supervised tokens; more lines can nobody tell apart
_LONGEST_NAME = 32  # characters of a source's name where there is little room
_OF_SCORES = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")  # no blue, no red
_NO_SCORE = ("eval_loss", "eval_questions", "eval_cut")  # numbers of a validation that say not how good answers are


def smooth(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Mean of each value and the up to 10 on either side of it; as many after it as before, but at the end.

    A window that reached back only would lag behind a loss that falls, and lie above all its points at the start. At
    the end, where losses hardly fall any more, it may: else the line would end in the last loss, whatever that is.

    [4, 2, 0, 0]  ->  [4, 2, 1.5, 1.5]

    Args:
        values: to be smoothed.
        weights: of the values; None: all count alike.
    """
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype="float64")
    sums = np.concatenate([[0.0], np.cumsum(weight * values)])
    weights_before = np.concatenate([[0.0], np.cumsum(weight)])
    index = np.arange(len(values))
    before = np.minimum(index, SMOOTHING_STEPS // 2)
    first, last = index - before, index + np.minimum(before, index[::-1]) + 1
    return (sums[last] - sums[first]) / (weights_before[last] - weights_before[first])


def losses_by_source(lines: Sequence[dict[str, Any]], *, log: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loss of each source of a mixture: the steps that learned from it, and its smoothed loss.

    The mean is that of the tokens, not of the steps' means: a step with few tokens of a source counts little.

    Args:
        lines: of optimizer steps.
        log: on a logarithmic axis, where the mean is the geometric one.
    """
    found = {}
    for name in dict.fromkeys(name for line in lines for name in line.get("loss_of", {})):
        of_source = [line for line in lines if name in line.get("loss_of", {})]
        tokens = np.array([line["supervised_of"][name] for line in of_source])
        losses = np.array([line["loss_of"][name] for line in of_source])
        mean = np.exp(smooth(np.log(losses), tokens)) if log and (losses > 0).all() else smooth(losses, tokens)
        found[name] = np.array([line["step"] for line in of_source]), mean
    return found


def ends_by_source(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Loss of each source of a mixture in the first quarter of its steps and in the last, of at most 20 steps each.

    Args:
        lines: of optimizer steps.
    """
    found = {}
    for name in dict.fromkeys(name for line in lines for name in line.get("loss_of", {})):
        of_source = [line for line in lines if name in line.get("loss_of", {})]
        length = min(20, max(1, len(of_source) // 4))
        found[name] = [_mean(part, name) for part in (of_source[:length], of_source[-length:])]
    return found


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    tokens = [line["supervised_of"][name] for line in lines]
    return sum(n * line["loss_of"][name] for n, line in zip(tokens, lines, strict=True)) / sum(tokens)


def short_name(name: str) -> str:
    """A source's name, or its end where that is long: of a path the file."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def _label(name: str) -> str:
    """A source's name for the legend; to matplotlib `$` is mathematics, and `_` at the beginning no label."""
    short = short_name(name)
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")


def draw_curve(run_dir: Path, *, title: str, best_step: int | None = None) -> None:
    """Draw run_dir/curve.png; without a logged step, as after `log_steps` that no step reached, nothing.

    Above the losses (left axis; of a mixture each source's too) and the learning rate (right), with the validations;
    below how good the answers were, where questions were asked.

    Args:
        run_dir: of the run.
        title: of the picture.
        best_step: of the checkpoint that is kept as the best.
    """
    lines = read_metrics(run_dir / METRICS)
    steps = [line for line in of_steps(lines) if line["loss"] is not None and math.isfinite(line["loss"])]
    if not steps:
        return
    from matplotlib.figure import Figure  # takes a second
    from matplotlib.ticker import MaxNLocator

    validations = of_validation(lines)
    scores = _scores(validations)
    figure = Figure(figsize=(8, 6.2 if scores else 4.5), layout="constrained")
    if scores:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
        _draw_scores(below, scores, best_step)
    else:
        above = below = figure.subplots()
    _draw_losses(above, steps)
    _draw_validation(above, validations, best_step)
    above.set(title=title.replace("$", r"\$"), ylabel="loss per supervised token")
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = above.twinx()
    right.plot(
        [line["step"] for line in steps],
        [line["lr"] for line in steps],
        color="tab:gray",
        linewidth=1,
        linestyle="--",
        label="lr",
    )
    right.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    temporary = run_dir / f".{CURVE}"
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, run_dir / CURVE)


def _draw_losses(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    """Every loss, the smoothed loss, and that of each source of a mixture."""
    from matplotlib import colormaps

    steps, losses = [line["step"] for line in lines], np.array([line["loss"] for line in lines])
    log = bool(losses.min() > 0 and losses.max() > 20 * losses.min())
    dense = len(lines) > 2 * SMOOTHING_STEPS
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=0.35 if dense else 1.0,
        linewidth=1,
        marker="." if len(steps) == 1 else "",  # a lone point is no line
        label="loss",
    )
    if dense:
        # Of the logarithms on a logarithmic axis: the mean of losses themselves lies at the upper rim of its points.
        mean = np.exp(smooth(np.log(losses))) if log else smooth(losses)
        axes.plot(steps, mean, color="tab:blue", linewidth=2, label=f"mean of {SMOOTHING_STEPS} steps")
    colours = colormaps["Dark2"].colors  # type: ignore[attr-defined]
    of_sources = losses_by_source(lines, log=log)
    learned = {name: sum(line.get("supervised_of", {}).get(name, 0) for line in lines) for name in of_sources}
    drawn = sorted(of_sources, key=lambda name: -learned[name])[:_MOST_DRAWN]
    for i, name in enumerate(drawn):
        of_source, mean = of_sources[name]
        axes.plot(
            of_source,
            mean,
            color=colours[i % len(colours)],
            linewidth=1.2,
            linestyle=("-", "--", ":", "-.")[i // len(colours) % 4],
            marker="." if len(mean) == 1 else "",
            label=_label(name),
        )
    if rest := len(of_sources) - len(drawn):
        axes.plot([], [], linestyle="none", label=f"and {rest} more sources")
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _draw_validation(axes: Any, lines: Sequence[dict[str, Any]], best_step: int | None) -> None:
    """The loss on the held-out rows; the step of the best checkpoint has a star."""
    found = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    if found:
        options = {"color": "tab:red", "linewidth": 1, "marker": "o", "markersize": 4, "zorder": 3}
        axes.plot(list(found), list(found.values()), **options, label="loss on held-out rows")
    if best_step in found:
        place, height = [best_step], [found[best_step]]
        axes.plot(place, height, color="tab:red", linestyle="none", marker="*", markersize=13, zorder=4, label="best")


def _scores(lines: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric of the answers -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("eval_") and name not in _NO_SCORE and isinstance(value, int | float):
                found.setdefault(name.removeprefix("eval_"), {})[line["step"]] = value
    return found


def _draw_scores(axes: Any, scores: Mapping[str, Mapping[int, float]], best_step: int | None) -> None:
    """How good the answers to the held-out questions were, by metric."""
    for number, (name, found) in enumerate(scores.items()):
        options = {"color": _OF_SCORES[number % len(_OF_SCORES)], "linewidth": 1, "marker": "o", "markersize": 4}
        axes.plot(list(found), list(found.values()), **options, label=name.replace("_", " "))
    if best_step is not None:
        axes.axvline(best_step, color="tab:red", linewidth=1, linestyle=":")
    axes.set(ylabel="answers")
    axes.set_ylim(-0.05, max(1.05, *(value for found in scores.values() for value in found.values())))
    axes.grid(alpha=0.3)
