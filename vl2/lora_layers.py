"""The low-rank layers: beside one Linear, and beside a layer's stacked experts.

Shapes: Paddle's [in, out], so A is [in, r] and B is [r, out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import paddle
from paddle import nn
from paddlenlp.peft.lora.lora_layers import LoRALinear as PaddleNLPLoRALinear

from vl2 import ways
from vl2.dropout import Dropout
from vl2.expert_mlp import Factors
from vl2.grouped_linear import GroupedLora
from vl2.kernel_linear import Frozen, frozen_linear
from vl2.linear import Linear, is_frozen, linear, whole
from vl2.moe import Experts
from vl2.quantised import stored

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


def addition(
    a: paddle.Tensor, b: paddle.Tensor, a_start: paddle.Tensor | None = None, b_start: paddle.Tensor | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """What an A and a B add, as two matrices (or stacks of them) to multiply.

    Plain LoRA adds A @ B. PiSSA starts with an A and a B that are the greatest part of the weight, and adds how far
    the product has moved from there, A @ B - A0 @ B0. This is written so that it is zeros at the start, and in a 16-bit
    type loses nothing of a small move:

        [A - A0 | A0]  @  [  B   ]
                          [B - B0]

    Args:
        a: [..., in, r].
        b: [..., r, out].
        a_start, b_start: where they started, of PiSSA.

    Returns:
        [..., in, r] and [..., r, out]; of PiSSA [..., in, 2r] and [..., 2r, out].
    """
    if a_start is None or b_start is None:
        return a, b
    return paddle.concat([a - a_start, a_start], axis=-1), paddle.concat([b, b - b_start], axis=-2)


def starts_of(layer: nn.Layer, part: str) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
    """Where the A and the B of a part started, of PiSSA; else nothing."""
    return getattr(layer, f"{part}_A_start", None), getattr(layer, f"{part}_B_start", None)


def _started(factor: paddle.Tensor) -> paddle.Tensor:
    """A frozen parameter for where a factor starts; zeros until `vl2.principal` or an adapter's file sets it."""
    zero = nn.initializer.Constant(0.0)
    start = paddle.create_parameter(factor.shape, "float32", default_initializer=zero)
    start.stop_gradient = True
    return start


class LoRALinear(PaddleNLPLoRALinear):
    """A Linear plus a low-rank addition in float32, computed in the input's dtype.

    PaddleNLP's own multiplies tensors of different dtypes when the base is bfloat16, and its constructor would allocate
    and fill a second base weight: this one takes over the Linear it replaces.
    """

    def __init__(self, base: Linear, *, rank: int, scaling: float, dropout: float, pissa: bool = False):
        nn.Layer.__init__(self)
        self.weight, self.bias, self.name = base.weight, base.bias, None
        self.in_features, self.out_features = base.weight.shape
        self.r, self.scaling = rank, scaling
        self.lora_dropout = Dropout(dropout)
        self.lora_A = self.create_parameter([self.in_features, rank], dtype="float32")
        self.lora_B = self.create_parameter([rank, self.out_features], dtype="float32")
        if pissa:
            self.lora_A_start, self.lora_B_start = _started(self.lora_A), _started(self.lora_B)
        self.merged, self.disable_lora = False, False
        self.pissa = self.use_mora = self.lora_use_mixer = self._use_quick_lora = False

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        if self.disable_lora:
            return linear(x, self.weight, self.bias)
        a, b = self.product()
        if is_frozen(self.weight, self.bias) and ways.takes_float32_kernels(x):
            lora_x = self.lora_dropout(x)
            frozen = Frozen(stored(self.weight), self.bias, self.scaling)
            return frozen_linear(x, frozen, a, b, None if lora_x is x else lora_x)
        out = linear(x, self.weight, self.bias)
        low, b = linear(self.lora_dropout(x), a), b.astype(x.dtype)
        if x.ndim == 2:  # added where it is multiplied, which saves two passes over the result
            return paddle.addmm(out, low, b, alpha=self.scaling)
        return out + paddle.matmul(low, b) * self.scaling

    def effective_weight(self, dtype: Any) -> paddle.Tensor:
        """The matrix [in, out] that `forward` multiplies with (dropout aside), in `dtype`."""
        weight = whole(self.weight, dtype)
        if self.disable_lora:
            return weight
        return weight + self.get_delta_weight().astype(dtype)

    def product(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The two matrices whose product, times the scaling, is added to the weight."""
        return addition(self.lora_A, self.lora_B, *starts_of(self, "lora"))

    def get_delta_weight(self) -> paddle.Tensor:  # type: ignore[override]  # PaddleNLP's takes other factors, too
        """What is added to the weight, [in, out]."""
        a, b = self.product()
        return paddle.matmul(a, b) * self.scaling

    # Of PaddleNLP's other methods, extra_repr does right with the attributes above.
    merge = unmerge = refused(MERGE)
    pissa_init = refused("PaddleNLP's changes the frozen base; use vl2.principal.start_from_principal")
    rope_init = refused("MoRA is not trained here")


class ExpertsLoRA(nn.Layer):
    """Low-rank additions to all experts of a layer; gate and up have their own A and B, as in PEFT adapters."""

    def __init__(self, base: Experts, *, rank: int, scaling: float, dropout: float, pissa: bool = False):
        super().__init__()
        num_experts, size, inner = base.gate_up.shape[0], base.gate_up.shape[1], base.down.shape[1]
        self.scaling = scaling
        self.dropout = Dropout(dropout)
        self.gate_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.gate_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.up_A = self.create_parameter([num_experts, size, rank], dtype="float32")
        self.up_B = self.create_parameter([num_experts, rank, inner], dtype="float32")
        self.down_A = self.create_parameter([num_experts, inner, rank], dtype="float32")
        self.down_B = self.create_parameter([num_experts, rank, size], dtype="float32")
        for name in ("gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B") if pissa else ():
            setattr(self, f"{name}_start", _started(getattr(self, name)))
        self.disable_lora = False

    def product(self, part: str) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The two stacks of matrices whose products, times the scaling, are added to gate, up or down."""
        return addition(getattr(self, f"{part}_A"), getattr(self, f"{part}_B"), *starts_of(self, part))

    def gate_up(self, x_PD: paddle.Tensor) -> GroupedLora | None:
        """Addition to the stacked gate and up projections, as one product of rank 2r.

        a = [gate_A | up_A]  [E, D, 2r]        b = [gate_B   0  ]  [E, 2r, 2I], times the scaling
                                                   [  0    up_B ]
        """
        a, b = self.gate_up_factors()
        return None if a is None or b is None else GroupedLora(self.dropout(x_PD), a, b)

    def down(self, inner_PI: paddle.Tensor) -> GroupedLora | None:
        """Addition to the stacked down projections: a [E, I, r], b [E, r, D] times the scaling."""
        a, b = self.down_factors()
        return None if a is None or b is None else GroupedLora(self.dropout(inner_PI), a, b)

    def gate_up_factors(self) -> Factors:
        """The A and B of `gate_up`, see there."""
        if self.disable_lora:
            return None, None
        (gate_a, gate_b), (up_a, up_b) = self.product("gate"), self.product("up")
        zeros = paddle.zeros_like(gate_b)
        gate = paddle.concat([gate_b, zeros], axis=-1)
        up = paddle.concat([zeros, up_b], axis=-1)
        a = paddle.concat([gate_a, up_a], axis=-1)
        return a, paddle.concat([gate, up], axis=1) * self.scaling

    def down_factors(self) -> Factors:
        """The A and B of `down`, see there."""
        if self.disable_lora:
            return None, None
        a, b = self.product("down")
        return a, b * self.scaling

    def dropped(self) -> float:
        """Part of the rows' channels that is dropped before the factors multiply them."""
        return float(self.dropout.p) if self.training and not self.disable_lora else 0.0
