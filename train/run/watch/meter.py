"""Measures an optimizer step: its time and what of it was spent waiting, its losses and norms, the experts' load."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
from paddle import nn

from data.plan import Plan
from train.machine.memory import peak_memory_gb
from train.run.watch.step_metrics import BySource, StepMetrics
from vl2.moe import MoE

Item = TypeVar("Item")
_RECENT = 50  # steps


class StepMeter:
    """Holds what a rank measures of a step until all of them have put theirs together.

    Args:
        model: under training.
        plan: of its packs.
        lr_scales: group of weights that trains -> what its learning rate is multiplied by.
    """

    def __init__(self, model: nn.Layer, plan: Plan, *, lr_scales: Mapping[str, float]):
        self.plan, self.lr_scales = plan, lr_scales if len(lr_scales) > 1 else {}
        self.layers = expert_layers(model)
        self._started = self._waited = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds of the last steps

    def begin(self) -> None:
        """A step begins."""
        self._started, self._waited = time.perf_counter(), 0.0

    def fetch(self, items: Iterator[Item]) -> Item:
        """The next item; what that takes is time spent waiting for data."""
        asked = time.perf_counter()
        item = next(items)
        self._waited += time.perf_counter() - asked
        return item

    def of_rank(self) -> list[float]:
        """What this rank has to say of the step: the seconds that it waited, and how often each expert was chosen."""
        return [self._waited, *(float(count) for layer in self.layers.values() for count in layer.take_load())]

    def metrics(
        self,
        step: int,
        losses: np.ndarray,
        of_ranks: np.ndarray,
        *,
        by_source: BySource | None,
        lr: float,
        norms: tuple[float, Mapping[str, float]] | None,
    ) -> StepMetrics:
        """What was measured in a step, with what was planned for it.

        Args:
            step: optimizer steps made before this one.
            losses: of the step's packs, see `gather_losses`.
            of_ranks: `of_rank` of every rank, float64 [ranks, n].
            by_source: of a mixture; None: there is only one source, or the step was left out.
            lr: of groups whose own is not scaled.
            norms: of all gradients, and of each group's; None: the step was left out.
        """
        seconds = time.perf_counter() - self._started
        plan = self.plan
        self._recent.append(seconds)
        packs, supervised, samples = plan.step(step), plan.supervised(step), plan.samples(step)
        tokens, tiles = sum(pack.tokens for pack in packs), sum(pack.tiles for pack in packs)
        used, finite = sum(bool(pack.samples) for pack in packs), bool(np.isfinite(losses).all())
        norm, norm_of = norms or (None, {})
        busiest, entropy = self._expert_loads(of_ranks[:, 1:].sum(axis=0))
        return StepMetrics(
            step=step + 1,
            epoch=plan.epoch(step),
            loss=float(losses[:, 1].sum()) / supervised if finite else None,
            aux_loss=float(losses[:, 2].sum()) if finite else 0.0,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            supervised=supervised,
            tiles=tiles,
            samples=samples,
            fill=tokens / max(used * plan.settings["data.max_tokens"], 1),
            seconds=seconds,
            seconds_left=(plan.num_steps - step - 1) * sum(self._recent) / len(self._recent),
            tokens_per_second=tokens / seconds,
            supervised_per_second=supervised / seconds,
            tiles_per_second=tiles / seconds,
            samples_per_second=samples / seconds,
            data_wait=float(of_ranks[:, 0].max()) / seconds,
            memory_gb=peak_memory_gb(),
            loss_of=by_source.loss if by_source else {},
            supervised_of=by_source.supervised if by_source else {},
            lr_of={group: lr * scale for group, scale in self.lr_scales.items()},
            grad_norm_of={group: norm_of[group] for group in self.lr_scales if group in norm_of},
            expert_busiest_of=busiest,
            expert_entropy_of=entropy,
        )

    def _expert_loads(self, counts: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """The busiest expert's share, and the entropy, by layer.

        Args:
            counts: float64 [layers * experts], how often each was chosen.
        """
        if not counts.any():
            return {}, {}
        busiest, entropy = expert_load(counts.reshape(len(self.layers), -1))
        return dict(zip(self.layers, busiest, strict=True)), dict(zip(self.layers, entropy, strict=True))


def expert_layers(model: nn.Layer) -> dict[str, MoE]:
    """Layers with experts by their number in the model: language.model.layers.3.mlp -> 3."""
    named = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, MoE)}
    return {name.rpartition(".layers.")[2].partition(".")[0]: layer for name, layer in named.items()}


def expert_load(counts_LE: np.ndarray) -> tuple[list[float], list[float]]:
    """How the choices of each layer are shared among its experts, in six digits.

    counts (3, 1, 0, 0)  ->  busiest 3/4; entropy of (3/4, 1/4), 0.562 nats, over that of an even load, ln 4: 0.406

    Args:
        counts_LE: how often each expert was chosen; every layer chose.

    Returns:
        (share of the busiest expert, entropy over that of an even load), each by layer.
    """
    share_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # of experts that nobody chose
        terms_LE = np.where(share_LE > 0, share_LE * np.log(share_LE), 0.0)
    entropy_L = -terms_LE.sum(axis=1) / np.log(counts_LE.shape[1])
    return share_LE.max(axis=1).round(6).tolist(), (entropy_L + 0.0).round(6).tolist()  # + 0.0: no -0.0
