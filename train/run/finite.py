"""What becomes of a step whose loss or gradient is not a finite number."""

from __future__ import annotations

import math

import numpy as np

from data.packs import PackDataset
from train.config.schema import TrainConfig
from train.run.micro_batch import first_not_finite

MAX_LEFT_OUT = 20  # fp16: so many overflows in a row are no longer the loss scale's


class FiniteCheck:
    """Looks at the numbers of each step before the optimizer takes them; all ranks see the same.

    Args:
        config: of the run.
        dataset: of its packs, whose rows an error names.
    """

    def __init__(self, config: TrainConfig, dataset: PackDataset):
        self.config, self.dataset = config, dataset
        self._in_a_row = 0  # steps left out

    def leaves_out(self, step: int, rows: np.ndarray, norm: float, overflow: bool) -> bool:
        """Whether the optimizer must not make this step.

        Args:
            step: optimizer steps made before this one.
            rows: of `gather_losses`.
            norm: of all gradients.
            overflow: of fp16, which its loss scaler leaves out.

        Raises:
            FloatingPointError: something else is not finite, or too many steps in a row were left out.
        """
        if found := first_not_finite(rows):
            pack, what = found
            records = [self.dataset.records[i] for i in self.dataset.plan.packs[pack].samples]
            numbers = ", ".join(str(one.row) for one in records)
            raise self._diverged(step, f"{what} ({records[0].source}, row {numbers})")
        self._in_a_row = self._in_a_row + 1 if overflow else 0
        if self._in_a_row >= MAX_LEFT_OUT:
            raise self._diverged(step, f"gradients overflowed in {self._in_a_row} steps in a row")
        if not (overflow or math.isfinite(norm)):
            raise self._diverged(step, f"the gradient norm is {norm}")
        return overflow

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"step {step + 1}: {what}. Lower optim.lr={self.config.optim.lr}, lengthen optim.warmup_ratio, or with "
            "precision=fp16 take bf16; the checkpoints before this step are good"
        )
