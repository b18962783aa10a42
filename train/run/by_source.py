"""The loss of each source of a mixture: sums over its supervised tokens, beside the loss that is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from data.plan import PackSpec
from train.run.watch.step_metrics import BySource
from vl2.prompt import IGNORE


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Which source each sample of a plan comes from."""

    names: tuple[str, ...]
    of_sample: np.ndarray
    """int [samples]: index in `names`."""
    supervised: np.ndarray
    """int [samples]: tokens that are learned of each sample."""

    def of_tokens(self, pack: PackSpec, labels: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
        """Source of each supervised token of a pack, in the order of the stream.

        Args:
            pack: of the plan.
            labels: int64 [T], IGNORE where nothing is learned.
            seq_lens: int64 [samples of the pack], sum T.

        Example: samples of sources 1 and 0, labels - - a a, - b: [1, 1, 0].
        """
        of_sample = self.of_sample[list(pack.samples)]
        return np.repeat(of_sample, seq_lens)[labels != IGNORE]

    def tokens(self, packs: Iterable[PackSpec]) -> np.ndarray:
        """Count the supervised tokens of each source in packs, int64 [sources]."""
        samples = [sample for pack in packs for sample in pack.samples]
        counts = np.zeros(len(self.names), dtype=np.int64)
        np.add.at(counts, self.of_sample[samples], self.supervised[samples])
        return counts

    def means(self, packs: Iterable[PackSpec], sums: np.ndarray) -> BySource:
        """Mean loss of each source that packs learned from, and its supervised tokens there.

        Args:
            packs: of a step.
            sums: float64 [sources], of the losses.
        """
        counts = {name: count for name, count in zip(self.names, self.tokens(packs).tolist(), strict=True) if count}
        sum_of = dict(zip(self.names, sums.tolist(), strict=True))
        return BySource(loss={name: sum_of[name] / count for name, count in counts.items()}, supervised=counts)


def sums_by_source(losses: Sequence[paddle.Tensor], of_token: np.ndarray, num_sources: int) -> np.ndarray:
    """Sum of the losses of each source in a pack, float64 [sources].

    Args:
        losses: of the supervised tokens, in pieces of float32 [n, 1] that follow one another.
        of_token: int [N], source of each token.
        num_sources: of the mixture.
    """
    if not losses:  # a pack without supervised tokens
        return np.zeros(num_sources)
    of_pack = np.concatenate([piece.numpy().reshape(-1) for piece in losses])
    return np.bincount(of_token, weights=of_pack, minlength=num_sources)
