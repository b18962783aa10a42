"""RMSNorm, computed in float32, with a backward of its own.

Paddle's `rms_norm` for GPUs is not taken. Its sources of 2025 (rms_norm and rms_norm_nzs in phi/kernels/gpu) have a way
that writes a gradient for a frozen weight where there is no memory for it, and one of them has no float16.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read


class _RMSNorm(PyLayer):
    """Autograd would keep five [T, D] intermediates; this keeps the input and one number a row."""

    @staticmethod
    def forward(ctx: PyLayerContext, x_TD: paddle.Tensor, weight_D: paddle.Tensor, eps: float) -> paddle.Tensor:
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = not x_TD.stop_gradient, not weight_D.stop_gradient
        if ways.takes_float32_kernels(x_TD):
            width = x_TD.shape[-1]
            (y_TD, out), (scale_T1, scale) = empty(x_TD.shape), empty([*x_TD.shape[:-1], 1])
            rows, weight = read(x_TD).reshape(-1, width), read(weight_D.astype("float32"))
            cpu_kernels.rms_norm(rows, weight, np.float32(eps), scale.reshape(-1), out.reshape(-1, width))
            ctx.save_for_backward(x_TD.contiguous(), weight_D, scale_T1)
            return y_TD
        x = x_TD.astype("float32")
        scale_T1 = paddle.rsqrt(paddle.mean(x * x, axis=-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TD.contiguous(), weight_D, scale_T1)
        return ((x * scale_T1).astype(x_TD.dtype).astype("float32") * weight_D.astype("float32")).astype(x_TD.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_TD: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensor()
        x_needs_grad, weight_needs_grad = ctx.needs_grad
        if ways.takes_float32_kernels(x_TD) and not weight_needs_grad:
            (grad_x, out), width = empty(x_TD.shape), x_TD.shape[-1]
            rows, grads = (read(t).reshape(-1, width) for t in (x_TD, grad_TD))
            weight, scale = read(weight_D.astype("float32")), read(scale_T1).reshape(-1)
            cpu_kernels.rms_norm_grad(rows, weight, scale, grads, out.reshape(-1, width))
            return grad_x, None
        normed_TD = x_TD.astype("float32") * scale_T1
        grad = grad_TD.astype("float32")
        grad_x = None
        if x_needs_grad:
            inner = grad * weight_D.astype("float32")
            mean_T1 = paddle.mean(inner * normed_TD, axis=-1, keepdim=True)
            grad_x = ((inner - normed_TD * mean_T1) * scale_T1).astype(x_TD.dtype)
        grad_weight = None
        if weight_needs_grad:
            axes = list(range(x_TD.ndim - 1))
            grad_weight = (grad * normed_TD).sum(axis=axes).astype(weight_D.dtype)
        return grad_x, grad_weight


class RMSNorm(nn.Layer):
    """Root-mean-square norm over the last axis. Source: official DeepseekV2RMSNorm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """[..., D] -> [..., D], in the input's dtype."""
        return _RMSNorm.apply(x_TD, self.weight, self.eps)
