"""One pack on one rank: its forward and backward pass, and the losses of a step's packs put together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from data.plan import Plan
from train.run.by_source import Sources, sums_by_source
from train.run.gradients import gather_rows
from train.run.pack_loader import Pack
from train.run.shard.layers import SharedLayers
from vl2.balance import LoadBalance
from vl2.prompt import IGNORE


@dataclass(frozen=True, kw_only=True)
class PackLoss:
    """What one pack added to its step."""

    pack: int  # index in the plan
    loss: paddle.Tensor  # sum over its supervised tokens
    aux_loss: paddle.Tensor | float  # its part of the step's
    has_images: bool  # and something supervised
    of_tokens: list[paddle.Tensor]  # losses of its supervised tokens, in a mixture
    source_of_tokens: np.ndarray  # int, source of each of them


def train_pack(
    model: nn.Layer,
    inputs: Pack,
    *,
    plan: Plan,
    step: int,
    seed: int,
    aux_weight: float,
    loss_scale: float = 1.0,
    sources: Sources | None = None,
    shared: SharedLayers | None = None,
) -> PackLoss:
    """Forward and backward of one pack; its gradients are added to those of the step's packs before it.

    Gradients are summed over packs and ranks, so each pack's loss is divided by the numbers of the whole step: by its
    supervised tokens, and for the load balance by its conversations.

    Args:
        model: in training mode.
        inputs: an item of PackDataset.
        plan: that the pack belongs to.
        step: optimizer steps made before this one.
        seed: of the run.
        aux_weight: of the load-balance loss; 0 does not compute it.
        loss_scale: of fp16.
        sources: of a mixture; None keeps no losses by source.
        shared: layers that all processes compute together; one without a loss takes part all the same.
    """
    batch = dict(inputs)
    pack, supervised = int(batch.pop("pack")), int(batch.pop("supervised_in_step"))
    paddle.seed(pack_seed(seed, step, pack))
    balance = LoadBalance(batch["seq_lens"], batch["labels"] != IGNORE) if aux_weight else None
    of_tokens: list[paddle.Tensor] = []
    source_of_tokens = np.zeros(0, dtype=np.int32)
    if sources is None:
        loss_sum, count = model.loss(batch, balance)
    else:
        loss_sum, count = model.loss(batch, balance, of_tokens)
        if count:
            source_of_tokens = sources.of_tokens(plan.packs[pack], batch["labels"], batch["seq_lens"])
    aux_loss: paddle.Tensor | float = 0.0
    if count:
        loss = loss_sum / supervised
        if balance is not None:
            term = balance.total() * (aux_weight / plan.samples(step))
            loss, aux_loss = loss + term, term.detach()
        (loss * loss_scale).backward()
    elif shared is not None:
        shared.idle(backward=True)
    return PackLoss(
        pack=pack,
        loss=loss_sum.detach(),
        aux_loss=aux_loss,
        has_images=count > 0 and "grids" in batch,
        of_tokens=of_tokens,
        source_of_tokens=source_of_tokens,
    )


def gather_losses(
    done: Sequence[PackLoss], num_sources: int = 0, of_rank: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of a step's packs over all ranks, in the plan's order, so that ranks do not change their sum. Collective.

    Args:
        done: the packs of this rank; every rank has as many.
        num_sources: of a mixture; 0: there is only one.
        of_rank: n numbers more that this rank has to say.

    Returns:
        (float64 [packs of the step, 3 + num_sources]: index in the plan, loss, load-balance loss, loss of each source;
        float64 [ranks, n]: of_rank of each).
    """
    losses = read_scalars([loss for one in done for loss in (one.loss, one.aux_loss)])
    own = [
        [one.pack, *losses[2 * i : 2 * i + 2], *sums_by_source(one.of_tokens, one.source_of_tokens, num_sources)]
        for i, one in enumerate(done)
    ]
    table = gather_rows(np.array([[*itertools.chain.from_iterable(own), *of_rank]], dtype="float64"))
    columns = 3 + num_sources
    rows = table[:, : len(own) * columns].reshape(-1, columns)
    return rows[np.argsort(rows[:, 0])], table[:, len(own) * columns :]


def read_scalars(values: Sequence[paddle.Tensor | float]) -> list[float]:
    """Numbers, of which those in float32 tensors come to the host together: it waits for the device once."""
    tensors = [value for value in values if isinstance(value, paddle.Tensor)]
    read = iter(paddle.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, paddle.Tensor) else value for value in values]


def first_not_finite(rows: np.ndarray) -> tuple[int, str] | None:
    """The first pack of `gather_losses` with a loss that is not a finite number, and which loss, in words."""
    for pack, *losses in rows[:, :3]:
        for name, loss in zip(("loss", "load-balance loss"), losses, strict=True):
            if not math.isfinite(loss):
                return int(pack), f"the {name} of pack {int(pack)} is {loss}"
    return None


def pack_seed(seed: int, step: int, pack: int) -> int:
    """Seed of Paddle's generator for one pack: neither ranks nor interruptions change what dropout draws."""
    return int(np.random.SeedSequence([seed, step, pack]).generate_state(1)[0])
