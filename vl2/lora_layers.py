"""The low-rank layers: beside one Linear, and beside a layer's stacked experts.

Shapes: Paddle's [in, out], so A is [in, r] and B is [r, out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import paddle
from paddle import nn
from paddlenlp.peft.lora.lora_layers import LoRALinear as PaddleNLPLoRALinear

from vl2.grouped_linear import GroupedLora
from vl2.linear import Linear, linear
from vl2.moe import Experts

MERGE = (
    "a merge in the weight's dtype loses most of the addition in bfloat16; use vl2.lora.deltas, which add in float32"
)


def refused(why: str) -> Callable[..., Any]:
    """A method in the place of an inherited one that would do wrong.

    Args:
        why: ends the error's text; says what to use instead.
    """

    def method(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"not for a DeepSeek-VL2: {why}")

    return method


class LoRALinear(PaddleNLPLoRALinear):
    """A Linear plus a low-rank addition in float32, computed in the input's dtype.

    PaddleNLP's own multiplies tensors of different dtypes when the base is bfloat16, and its constructor would allocate
    and fill a second base weight: this one takes over the Linear it replaces.
    """

    def __init__(self, base: Linear, *, rank: int, scaling: float, dropout: float):
        nn.Layer.__init__(self)
        self.weight, self.bias, self.name = base.weight, base.bias, None
        self.in_features, self.out_features = base.weight.shape
        self.r, self.scaling = rank, scaling
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = self.create_parameter([self.in_features, rank], dtype="float32")
        self.lora_B = self.create_parameter([rank, self.out_features], dtype="float32")
        self.merged, self.disable_lora = False, False
        self.pissa = self.use_mora = self.lora_use_mixer = self._use_quick_lora = False

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        out = linear(x, self.weight, self.bias)
        if self.disable_lora:
            return out
        low, b = linear(self.lora_dropout(x), self.lora_A), self.lora_B.astype(x.dtype)
        if x.ndim == 2:  # added where it is multiplied, which saves two passes over the result
            return paddle.addmm(out, low, b, alpha=self.scaling)
        return out + paddle.matmul(low, b) * self.scaling

    def effective_weight(self, dtype: Any) -> paddle.Tensor:
        """The matrix [in, out] that `forward` multiplies with (dropout aside), in `dtype`."""
        weight = self.weight.astype(dtype)
        if self.disable_lora:
            return weight
        return weight + (paddle.matmul(self.lora_A, self.lora_B) * self.scaling).astype(dtype)

    # Of PaddleNLP's other methods, get_delta_weight and extra_repr do right with the attributes above.
    merge = unmerge = refused(MERGE)
    pissa_init = refused("PiSSA would change the frozen base, which an adapter of ours is saved without")
    rope_init = refused("MoRA is not trained here")


class ExpertsLoRA(nn.Layer):
    """Low-rank additions to all experts of a layer; gate and up have their own A and B, as in PEFT adapters."""

    def __init__(self, base: Experts, *, rank: int, scaling: float, dropout: float):
        super().__init__()
        num_experts, size, inner = base.gate_up.shape[0], base.gate_up.shape[1], base.down.shape[1]
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.gate_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.gate_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.up_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.up_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.down_A = self.create_parameter([num_experts, inner, rank], dtype="float32")
        self.down_B = self.create_parameter([num_experts, rank, size], dtype="float32")
        self.disable_lora = False

    def gate_up(self, x_PD: paddle.Tensor) -> GroupedLora | None:
        """Addition to the stacked gate and up projections, as one product of rank 2r.

        a = [gate_A | up_A]  [E, D, 2r]        b = [gate_B   0  ]  [E, 2r, 2I], times the scaling
                                                   [  0    up_B ]
        """
        if self.disable_lora:
            return None
        zeros = paddle.zeros_like(self.gate_B)
        gate = paddle.concat([self.gate_B, zeros], axis=-1)
        up = paddle.concat([zeros, self.up_B], axis=-1)
        a = paddle.concat([self.gate_A, self.up_A], axis=-1)
        return GroupedLora(self.dropout(x_PD), a, paddle.concat([gate, up], axis=1) * self.scaling)

    def down(self, inner_PI: paddle.Tensor) -> GroupedLora | None:
        """Addition to the stacked down projections: a [E, I, r], b [E, r, D] times the scaling."""
        if self.disable_lora:
            return None
        return GroupedLora(self.dropout(inner_PI), self.down_A, self.down_B * self.scaling)
