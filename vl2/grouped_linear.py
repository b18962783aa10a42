"""One matrix product an expert over rows laid out by expert, with LoRA: one function, a way for CPU and one for GPU.

Shape suffixes: P rows of the layout, R rows without padding, D and I channels, E experts, L LoRA channels.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle

from vl2.expert_batches import ExpertBatches
from vl2.expert_loop import ExpertLoop
from vl2.expert_rows import Layout
from vl2.quantised import Quantised, stored


class GroupedLora(NamedTuple):
    """Low-rank addition to a grouped product: x @ a[e] @ b[e] on the rows of expert e; the scaling is inside b."""

    x: paddle.Tensor  # [P, in], x after dropout
    a: paddle.Tensor  # [E, in, L]
    b: paddle.Tensor  # [E, L, out]


def grouped_linear(
    x_PD: paddle.Tensor, layout: Layout, weight: paddle.Tensor, lora: GroupedLora | None = None
) -> paddle.Tensor:
    """One matrix product per expert over rows that are laid out by expert.

        rows       counts (2, 0, 1), without padding
        x0  @ W[0]
        x1  @ W[0]
        x2  @ W[2]

    A layout in blocks is computed in batched products, whose number does not depend on the number of experts; one
    without blocks, expert by expert. The results are equal but for the order of sums.

    Args:
        x_PD: [P, in], zeros in rows of padding.
        layout: from `vl2.expert_rows.dispatch`.
        weight: [E, in, out]; a frozen one may be of another dtype or in few bits, it is cast where it is used and
            never kept cast.
        lora: addition of low rank, or None.

    Returns:
        [P, out] in x's dtype. Gradients reach x, lora.x, lora.a, lora.b, and the weight when it trains.
    """
    kept = stored_for(weight, x_PD.dtype)
    lora_x = a = b = None
    if lora is not None:
        lora_x = None if lora.x is x_PD else lora.x  # without dropout
        a, b = lora.a.astype(x_PD.dtype), lora.b.astype(x_PD.dtype)
    if layout.blocks is None:
        return ExpertLoop.apply(x_PD, kept, lora_x, a, b, layout.counts)
    return ExpertBatches.apply(x_PD, kept, lora_x, a, b, layout)


def stored_for(weight: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor | Quantised:
    """What a stacked weight is kept in; one that trains, in the type that is computed in."""
    kept = stored(weight)
    if isinstance(kept, paddle.Tensor) and not kept.stop_gradient and kept.dtype != dtype:
        kept = kept.astype(dtype)
    return kept
