"""summary.json: what a finished run came to, and the same as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config.schema import TrainConfig
from train.machine.memory import peak_memory_gb
from train.run.finite import count_left_out
from train.run.report import pairs
from train.run.watch.curve import ends_by_source, short_name
from train.run.watch.lines import of_steps, read_metrics
from train.store.checkpoints import checkpoint_path
from train.store.names import CHECKPOINTS, CONFIG_FILE, CURVE, METRICS, NONFINITE
from train.store.run_state import Best, History
from train.store.versions import versions


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json says of a finished run."""

    recipe: str
    rehearsal: bool
    model: str  # base model as typed
    steps: int
    loss_first: float
    loss_last: float
    losses: list[float | None]  # mean per supervised token of each step; None: not finite
    accuracy_before: float | None  # share of the held-out answers that are right; None: not asked
    accuracy_after: float | None
    accuracy_with_pictures_exchanged: float | None  # after training
    answers_cut_before: int  # answers that reached eval.max_new_tokens before their end
    answers_cut_after: int
    evaluation: dict[str, dict[str, float] | None]  # "before" and "after" -> all its numbers
    tokens: int
    seconds: float  # in steps
    tokens_per_second: float
    peak_memory_gb: float  # of rank 0
    paths: dict[str, str | None]
    versions: dict[str, str]
    best: Best | None = None  # checkpoint
    loss_of: dict[str, list[float]] = field(default_factory=dict)  # source of a mixture -> at the start and at the end
    steps_left_out: int = 0  # for a loss or gradient that was not finite, see nonfinite.jsonl

    @staticmethod
    def from_format_1(document: Mapping[str, Any]) -> dict[str, Any]:
        """It counted no cut answers."""
        return {"answers_cut_before": 0, "answers_cut_after": 0, **document}


def summarise(
    config: TrainConfig,
    history: History,
    *,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    best: Best | None,
    trained: Path,
) -> Summary:
    """The summary of a run at its end.

    Args:
        config: of the run.
        history: of all its steps.
        before: numbers of the held-out questions before training.
        after: the same after.
        best: checkpoint of the run.
        trained: folder of the trained weights.
    """
    run_dir = Path(config.run_dir)
    steps, known = len(history.losses), [loss for loss in history.losses if loss is not None]
    return Summary(
        recipe=config.recipe,
        rehearsal=config.rehearsal,
        model=config.model.path,
        steps=steps,
        loss_first=known[0] if known else math.nan,
        loss_last=known[-1] if known else math.nan,
        losses=history.losses,
        accuracy_before=(before or {}).get("exact_match"),
        accuracy_after=(after or {}).get("exact_match"),
        accuracy_with_pictures_exchanged=(after or {}).get("exact_match_permuted"),
        answers_cut_before=int((before or {}).get("cut", 0)),
        answers_cut_after=int((after or {}).get("cut", 0)),
        evaluation={"before": dict(before) if before else None, "after": dict(after) if after else None},
        tokens=history.tokens,
        seconds=history.seconds,
        tokens_per_second=history.tokens / history.seconds,
        peak_memory_gb=peak_memory_gb(),
        paths={
            "run_dir": str(run_dir),
            trained.name: str(trained),
            "checkpoint": str(checkpoint_path(run_dir / CHECKPOINTS, steps)),
            "metrics": str(run_dir / METRICS),
            "curve": str(run_dir / CURVE) if (run_dir / CURVE).is_file() else None,
            "config": str(run_dir / CONFIG_FILE),
        },
        versions=versions(),
        steps_left_out=count_left_out(run_dir),
        best=best,
        loss_of=ends_by_source(of_steps(read_metrics(run_dir / METRICS))),
    )


def end_text(summary: Summary) -> str:
    """The summary of a finished run as a table."""
    best = summary.best
    losses = [f"{found['loss']:.4f}" for found in summary.evaluation.values() if found and "loss" in found]
    rows = {
        "recipe": summary.recipe + (" (REHEARSAL)" if summary.rehearsal else ""),
        "steps": str(summary.steps),
        "steps left out": f"{summary.steps_left_out}, with a loss or gradient that was not finite: {NONFINITE}",
        "loss": f"{summary.loss_first:.4f} -> {summary.loss_last:.4f}",
        **{
            f"loss of {short_name(name)}": f"{first:.4f} -> {last:.4f}"
            for name, (first, last) in summary.loss_of.items()
        },
        "held-out loss": " -> ".join(losses),
        "best checkpoint": f"step {best.step}, {best.metric} {best.value:.4f}" if best else "",
        "accuracy": f"{_share(summary.accuracy_before)} -> {_share(summary.accuracy_after)}",
        "answers cut": f"{summary.answers_cut_before} -> {summary.answers_cut_after}",
        "with pictures exchanged": _share(summary.accuracy_with_pictures_exchanged),
        "speed": f"{summary.tokens_per_second:,.0f} tokens/s, {summary.seconds:.1f} s in steps",
        "peak memory": f"{summary.peak_memory_gb:.2f} GB",
        **{name: path for name, path in summary.paths.items() if path},
    }
    if not losses:
        del rows["held-out loss"]
    if not summary.steps_left_out:
        del rows["steps left out"]
    if not best:
        del rows["best checkpoint"]
    if summary.accuracy_before is None and summary.accuracy_after is None:
        del rows["accuracy"]
    if not (summary.answers_cut_before or summary.answers_cut_after):
        del rows["answers cut"]
    if summary.accuracy_with_pictures_exchanged is None:
        del rows["with pictures exchanged"]
    return pairs(rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
