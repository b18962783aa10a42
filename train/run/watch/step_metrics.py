"""The numbers of one optimizer step, for the log and the user's callbacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BySource:
    """Of each source of a mixture that a step learned from."""

    loss: dict[str, float]  # mean per supervised token
    supervised: dict[str, int]  # tokens


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step did, over all ranks. A table that would be empty is left out of what is written."""

    step: int  # optimizer steps made, this one included
    epoch: int  # from 0
    loss: float | None  # mean per supervised token; None: not a finite number, and the step was left out
    aux_loss: float  # load-balance loss of the experts, mean per conversation, times optim.aux_loss; not in `loss`,
    # and 0 where that is None
    lr: float
    grad_norm: float | None  # before clipping; None in a step that was left out, as one that overflowed in fp16
    tokens: int  # of the packs, image tokens included
    supervised: int  # tokens
    tiles: int
    samples: int  # conversations
    fill: float  # tokens over the budget of the packs that are not empty
    seconds: float
    seconds_left: float  # of the steps that are to come, if each takes the mean of the last ones
    tokens_per_second: float
    supervised_per_second: float
    tiles_per_second: float
    samples_per_second: float
    data_wait: float  # share of the seconds that the rank which waited longest for its packs waited
    memory_gb: float  # peak so far, of this process (CPU) or its GPU
    loss_of: dict[str, float]  # of each source of a mixture that the step learned from, like `loss`
    supervised_of: dict[str, int]  # tokens of each of these sources
    lr_of: dict[str, float]  # of each group of weights, where several train
    grad_norm_of: dict[str, float]  # before clipping, of each of these groups; their squares add up to grad_norm's
    expert_busiest_of: dict[str, float]  # share of the choices that the busiest expert of a layer got
    expert_entropy_of: dict[str, float]  # of the choices of a layer: 1 when all experts got alike, 0 when one got all

    def to_json(self) -> dict[str, Any]:
        """As a line of metrics.jsonl."""
        return {name: value for name, value in asdict(self).items() if value != {}}
