"""What a run's validation is to do: how often, which checkpoint it keeps, and whether all that goes together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.config.schema import TrainConfig
from vl2.errors import UserError

ALWAYS = ("exact_match",)  # a metric that a run computes whatever eval.metrics says
_EXPECTED = (
    "expected a whole number of optimizer steps (20), a part of an epoch below 1 (0.25), epoch, or 0 for not at all"
)


@dataclass(frozen=True, kw_only=True)
class Every:
    """An interval; both are 0 where there is none."""

    steps: int = 0  # optimizer steps
    part: float = 0.0  # of an epoch, at most 1

    def __bool__(self) -> bool:
        return bool(self.steps or self.part)


def read_every(text: str) -> Every:
    """What `eval.every` means.

    20 -> every 20 optimizer steps; 0.25 -> after each quarter of an epoch; epoch -> after each epoch; 0 -> not at all

    Raises:
        UserError: none of these; 1.5 is neither a part of an epoch nor a number of steps.
    """
    if text.strip() == "epoch":
        return Every(part=1.0)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0 < number < 1:
        return Every(part=number)
    if not (number >= 0 and number.is_integer()):
        raise UserError(f"eval.every={text}: {_EXPECTED}")
    return Every(steps=int(number))


def best_metric(config: TrainConfig) -> str:
    """What decides which checkpoint is the best: `loss` or a metric; empty where none is kept."""
    if config.eval.best == "auto":
        return "loss" if read_every(config.eval.every) else ""
    return "" if config.eval.best == "none" else config.eval.best


def check_validation(config: TrainConfig) -> None:
    """Refuse what would validate nothing, or wait for what is not computed.

    Raises:
        UserError: naming the keys.
    """
    data, wanted = config.data, config.eval
    held_out = data.eval_path or data.eval_fraction is not None or data.eval_rows is not None
    drawn = not (data.path or data.sources)  # which have their own
    every = read_every(wanted.every)
    if every and not (held_out or drawn):
        raise UserError(
            f"eval.every={wanted.every}: no rows are held out to validate on; give data.eval_fraction=0.05, or "
            "data.eval_path=FILE"
        )
    metric = best_metric(config)
    for name, value in (("best", metric), ("patience", wanted.patience)):
        if value and not every:
            raise UserError(f"eval.{name}={value}: nothing is validated on the way; give eval.every=20, say")
    if wanted.patience and not metric:
        raise UserError(f"eval.patience={wanted.patience} with eval.best=none: there is nothing to wait for; give one")
    if not metric or metric == "loss":
        return
    if not wanted.questions:
        raise UserError(f"eval.best={metric} with eval.questions=0: no answer is scored; give questions, or best=loss")
    if metric not in (*ALWAYS, *wanted.metrics):
        computed = ",".join([*wanted.metrics, metric])
        raise UserError(f"eval.best={metric}: this metric is not computed; give eval.metrics=[{computed}]")
