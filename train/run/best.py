"""Which checkpoint of a run is the best by its validation, and when there is nothing more to wait for."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from train.config.schema import TrainConfig
from train.config.validation import best_metric
from train.run.resume import Resumed
from train.run.say import say
from train.store.checkpoints import checkpoint_path
from train.store.names import CHECKPOINTS
from train.store.run_state import Best, ValidationState


def judge(state: ValidationState | None, step: int, numbers: Mapping[str, float], metric: str) -> ValidationState:
    """Take in a validation: of two equal ones the earlier stays the best.

    Args:
        state: before it; None: it is the first.
        step: optimizer steps made.
        numbers: what it found.
        metric: that decides; empty: nothing is the best.
    """
    best, value = state.best if state else None, numbers.get(metric, math.nan)
    if math.isfinite(value) and (best is None or _is_better(metric, value, best.value)):
        return ValidationState(step=step, best=Best(metric=metric, step=step, value=value), without_best=0)
    return ValidationState(step=step, best=best, without_best=(state.without_best if state else 0) + 1)


def _is_better(metric: str, value: float, than: float) -> bool:
    return value < than if metric == "loss" else value > than


def carried_over(resumed: Resumed | None, config: TrainConfig) -> ValidationState | None:
    """How far the validation is that goes on from a checkpoint.

    The best is forgotten, so that the next validation finds one, where another metric decides now or where its
    checkpoint is not in this run's folder: pruned for a later one that was given up, or of another run.
    """
    state = resumed.state.validation if resumed else None
    if state is None or state.best is None:
        return state
    best, metric = state.best, best_metric(config)
    place = checkpoint_path(Path(config.run_dir) / CHECKPOINTS, best.step)
    if best.metric == metric and place.is_dir():
        return state
    if metric:
        reason = (
            f"{place} is not there" if best.metric == metric else f"it was so by {best.metric}, now {metric} decides"
        )
        say(f"note: the best checkpoint so far, of step {best.step}, counts no longer: {reason}", sys.stderr)
    return replace(state, best=None, without_best=0)


def patience_is_over(state: ValidationState | None, config: TrainConfig) -> bool:
    """Whether the run ends early."""
    patience = config.eval.patience
    return state is not None and patience is not None and state.without_best >= patience
