"""What becomes of a step whose loss or gradient is not a finite number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import paddle.distributed as dist

from data.packs import PackDataset
from train.config.schema import TrainConfig
from train.run.micro_batch import first_not_finite
from train.run.watch.lines import keep_steps
from train.store.names import NONFINITE

MAX_LEFT_OUT = 20  # so many steps in a row are no accident, nor the loss scale's of fp16


class FiniteCheck:
    """Looks at the numbers of each step before the optimizer takes them; all ranks see the same.

    What is found stands in nonfinite.jsonl, a line a step:

        {"step": 7, "what": "the loss of pack 12 is nan", "left_out": true,
         "packs": [{"pack": 12, "rows": [{"source": "a.jsonl", "row": 3, "images": ["/data/3.png"]}]}]}

    Args:
        config: of the run.
        dataset: of its packs, whose rows are named.
    """

    def __init__(self, config: TrainConfig, dataset: PackDataset):
        self.config, self.dataset = config, dataset
        self.path = Path(config.run_dir, NONFINITE)
        self._in_a_row = 0  # steps left out

    def begin(self, first_step: int) -> None:
        """Forget what an earlier attempt found in steps that are made again."""
        if dist.get_rank() == 0:
            keep_steps(self.path, first_step)

    def leaves_out(self, step: int, rows: np.ndarray, norm: float, overflow: bool | None) -> bool:
        """Whether the optimizer must not make this step.

        An overflow of fp16 alone is the loss scaler's business: it is left out and not written down.

        Args:
            step: optimizer steps made before this one.
            rows: of `gather_losses`.
            norm: of all gradients.
            overflow: whether fp16's loss scaler will leave the step out; None: there is none.

        Raises:
            FloatingPointError: what is found is not to be left out, or too many steps in a row were.
        """
        found = first_not_finite(rows)
        if found is None and (overflow or math.isfinite(norm)):
            self._in_a_row = self._in_a_row + 1 if overflow else 0
            if self._in_a_row >= MAX_LEFT_OUT:
                raise self._diverged(step, f"gradients overflowed in {self._in_a_row} steps in a row")
            return bool(overflow)
        packs = [found[0]] if found else rows[:, 0].astype(int).tolist()  # whose gradient it was, nobody knows
        what = found[1] if found else f"the gradient norm is {norm}"
        # The scaler makes every step that did not overflow.
        skip = self.config.on_nonfinite == "skip" and overflow is not False
        self._in_a_row += 1
        self._write_down(step, what, packs, left_out=skip and self._in_a_row < MAX_LEFT_OUT)
        if skip and self._in_a_row >= MAX_LEFT_OUT:
            raise self._diverged(step, f"{self._in_a_row} steps in a row had to be left out; in this one {what}")
        if not skip:
            raise self._diverged(step, f"{what}{self._of_rows(packs)}")
        return True

    def _write_down(self, step: int, what: str, packs: list[int], *, left_out: bool) -> None:
        if dist.get_rank() != 0:
            return
        named = [{"pack": pack, "rows": self._rows(pack)} for pack in packs]
        line = {"step": step + 1, "what": what, "left_out": left_out, "packs": [one for one in named if one["rows"]]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _rows(self, pack: int) -> list[dict[str, object]]:
        records = [self.dataset.records[i] for i in self.dataset.plan.packs[pack].samples]
        return [
            {"source": one.source, "row": one.row, "images": [image.name for image in one.images]} for one in records
        ]

    def _of_rows(self, packs: list[int]) -> str:
        """The rows of the one pack that is to blame; of several the file has them."""
        rows = self._rows(packs[0]) if len(packs) == 1 else []
        return f" ({rows[0]['source']}, row {', '.join(str(row['row']) for row in rows)})" if rows else ""

    def _diverged(self, step: int, what: str) -> FloatingPointError:
        where = f"; {self.path} names the rows of what was found" if self.path.exists() else ""
        return FloatingPointError(
            f"step {step + 1}: {what}. Lower optim.lr={self.config.optim.lr}, lengthen optim.warmup_ratio, or with "
            f"precision=fp16 take bf16; the checkpoints before this step are good{where}"
        )


def count_left_out(run_dir: Path) -> int:
    """Steps of a run that were left out for a loss or gradient that was not finite, by its nonfinite.jsonl."""
    path = run_dir / NONFINITE
    if not path.is_file():
        return 0
    return sum(json.loads(line)["left_out"] for line in path.read_text(encoding="utf-8").splitlines())
