"""The numbers of one optimizer step, for the log and the user's callbacks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.plan import Plan
from train.machine.memory import peak_memory_gb


@dataclass(frozen=True, kw_only=True)
class BySource:
    """Of each source of a mixture that a step learned from."""

    loss: dict[str, float]  # mean per supervised token
    supervised: dict[str, int]  # tokens


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step did, over all ranks."""

    step: int  # optimizer steps made, this one included
    epoch: int  # from 0
    loss: float  # mean per supervised token
    aux_loss: float  # load-balance loss of the experts, mean per conversation, times optim.aux_loss; not in `loss`
    lr: float
    grad_norm: float | None  # before clipping; None in a step that overflowed in fp16 and was left out
    tokens: int  # of the packs, image tokens included
    supervised: int  # tokens
    tiles: int
    fill: float  # tokens over the budget of the packs that are not empty
    seconds: float
    tokens_per_second: float
    memory_gb: float  # peak so far, of this process (CPU) or its GPU
    loss_of: dict[str, float]  # of each source of a mixture that the step learned from, like `loss`; else empty
    supervised_of: dict[str, int]  # tokens of each of these sources

    def to_json(self) -> dict[str, Any]:
        """As a line of metrics.jsonl, which says nothing of sources where there is only one."""
        line = asdict(self)
        return line if self.supervised_of else {key: line[key] for key in line if not key.endswith("_of")}


def step_metrics(
    plan: Plan,
    step: int,
    *,
    losses: np.ndarray,
    lr: float,
    grad_norm: float | None,
    started: float,
    by_source: BySource | None,
) -> StepMetrics:
    """What was measured in a step, with what was planned for it.

    Args:
        step: optimizer steps made before this one.
        losses: of the step's packs, see `gather_losses`.
        lr, grad_norm: see StepMetrics.
        started: when the step began, of time.perf_counter.
        by_source: of a mixture; None: there is only one source.
    """
    seconds = time.perf_counter() - started
    packs = plan.step(step)
    tokens, used = sum(pack.tokens for pack in packs), sum(bool(pack.samples) for pack in packs)
    return StepMetrics(
        step=step + 1,
        epoch=plan.epoch(step),
        loss=float(losses[:, 1].sum()) / plan.supervised(step),
        aux_loss=float(losses[:, 2].sum()),
        lr=lr,
        grad_norm=grad_norm,
        tokens=tokens,
        supervised=plan.supervised(step),
        tiles=sum(pack.tiles for pack in packs),
        fill=tokens / max(used * plan.settings["data.max_tokens"], 1),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_gb=peak_memory_gb(),
        loss_of=by_source.loss if by_source else {},
        supervised_of=by_source.supervised if by_source else {},
    )
