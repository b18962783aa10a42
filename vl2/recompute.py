"""Activation recomputation, the one way it is right here."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.distributed.fleet.utils import recompute


def recomputed(layer: nn.Layer, *args: Any) -> Any:
    """layer(*args) whose activations are computed again in backward.

    Always non-reentrant: the reentrant default loses every LoRA gradient of a block whose inputs are all frozen,
    silently. The RNG state is restored, so dropout draws the same mask again. Inside such a layer a PyLayer must save
    contiguous tensors only (a view comes back without its strides) and ask for stop_gradient in forward.
    """
    return recompute(layer, *args, use_reentrant=False)
