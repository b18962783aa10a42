"""Matrix products whose weight may be stored in a lower precision than the computation.

A frozen weight of another type is cast where it is used; on a CPU `vl2.kernel_linear` multiplies by it.
Shapes: [in, out].
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import ways
from vl2.kernel_linear import Frozen, frozen_linear
from vl2.quantised import Quantised, stored


class _FrozenMatmul(PyLayer):
    """x @ w with w cast to x's dtype; keeps the stored weight for backward, not its cast copy."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(weight)  # a parameter, so contiguous
        return paddle.matmul(x, weight.astype(x.dtype))

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        (weight,) = ctx.saved_tensor()
        return paddle.matmul(grad, weight.astype(grad.dtype), transpose_y=True), None


class _QuantisedMatmul(PyLayer):
    """x @ w of a weight in few bits, which is made whole in forward and again in backward."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, weight: Quantised) -> paddle.Tensor:
        ctx.weight = weight
        return paddle.matmul(x, weight.matrix(x.dtype))

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> paddle.Tensor:
        return paddle.matmul(grad, ctx.weight.matrix(grad.dtype), transpose_y=True)


def linear(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
    """X @ weight + bias in x's dtype, whatever dtype the parameters are stored in.

    Args:
        x: [..., in].
        weight: [in, out]. Frozen and of another dtype or in few bits: cast here and again in backward, so no copy
            outlives the call.
            Trainable and of another dtype: cast under autograd, the gradient arrives in the parameter's dtype.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype.
    """
    kept = stored(weight)
    if is_frozen(weight, bias) and ways.takes_float32_kernels(x):
        return frozen_linear(x, Frozen(kept, bias))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.astype(x.dtype)
    if isinstance(kept, Quantised):
        product = _QuantisedMatmul.apply(x, kept)
        return product if bias is None else product + bias
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    if weight.stop_gradient:
        product = _FrozenMatmul.apply(x, weight)
    else:
        product = paddle.matmul(x, weight.astype(x.dtype))
    return product if bias is None else product + bias


def is_frozen(weight: paddle.Tensor, bias: paddle.Tensor | None) -> bool:
    """Whether neither trains."""
    return weight.stop_gradient and (bias is None or bias.stop_gradient)


def whole(weight: paddle.Tensor, dtype: Any) -> paddle.Tensor:
    """The matrix [in, out] of a weight in `dtype`, however it is stored."""
    kept = stored(weight)
    return kept.matrix(dtype) if isinstance(kept, Quantised) else kept.astype(dtype)


class Linear(nn.Linear):
    """paddle.nn.Linear whose forward is `linear`, so that stored and computing precision may differ."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)

    def effective_weight(self, dtype: Any) -> paddle.Tensor:
        """The matrix [in, out] that `forward` multiplies with, in `dtype`."""
        return whole(self.weight, dtype)
