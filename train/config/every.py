"""How often a run is validated: the text of `eval.every`, in optimizer steps or in parts of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vl2.errors import UserError

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
