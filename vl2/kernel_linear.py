"""Products with frozen weights and LoRA of float32 rows on a CPU: written once, and what is added, added in place.

Shape suffixes: N rows, I and O channels, L LoRA channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels
from vl2.arrays import empty, read
from vl2.products import multiply
from vl2.quantised import Quantised, needs_grad
from vl2.stored_products import StoredMatrices


@dataclass(frozen=True)
class Frozen:
    """What rows are multiplied by and what is added; an object, for a PyLayer would take tensors for its inputs."""

    weight: paddle.Tensor | Quantised  # [I, O]
    bias: paddle.Tensor | None = None  # [O]
    factor: float = 1.0  # of x @ a @ b


def frozen_linear(
    x: paddle.Tensor,
    frozen: Frozen,
    a_IL: paddle.Tensor | None = None,
    b_LO: paddle.Tensor | None = None,
    lora_x: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """X @ weight + bias + factor * (lora_x @ a) @ b.

    Args:
        x: [..., I].
        frozen: the weight, however it is stored; no float32 copy of it outlives the call.
        a_IL, b_LO: of LoRA.
        lora_x: what they multiply, where it is not x.

    Returns:
        [..., O]. Gradients reach x, a, b and lora_x.
    """
    return _FrozenLinear.apply(x, lora_x, a_IL, b_LO, frozen)


class _FrozenLinear(PyLayer):
    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        lora_x: paddle.Tensor | None,
        a_IL: paddle.Tensor | None,
        b_LO: paddle.Tensor | None,
        frozen: Frozen,
    ) -> paddle.Tensor:
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [needs_grad(t) for t in (x, lora_x, a_IL, b_LO)]
        ctx.frozen, ctx.shape = frozen, x.shape
        ctx.has_factors, ctx.has_lora_x = a_IL is not None, lora_x is not None
        x_NI = _rows(x)
        out, out_NO = empty([*x.shape[:-1], frozen.weight.shape[1]])
        results = out_NO.reshape(-1, out_NO.shape[-1])
        if frozen.bias is not None:
            cpu_kernels.fill_rows(read(frozen.bias.astype(x.dtype)), results)
        StoredMatrices(frozen.weight).multiply(x_NI, results, add=frozen.bias is not None)
        if a_IL is None or b_LO is None:
            return out
        low_NL, low = empty([len(x_NI), a_IL.shape[1]])
        multiply(x_NI if lora_x is None else _rows(lora_x), read(a_IL), low)
        multiply(low, read(b_LO), results, factor=frozen.factor, add=True)
        ctx.save_for_backward((x if lora_x is None else lora_x).contiguous(), a_IL, b_LO, low_NL)
        return out

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of those of x, lora_x, a and b that are tensors; None where none is asked for."""
        x_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        grad_NO, factor = _rows(grad), ctx.frozen.factor
        grad_x, to_x = empty(ctx.shape) if x_needs else (None, None)
        if to_x is not None:
            StoredMatrices(ctx.frozen.weight).multiply(grad_NO, _flat(to_x), transpose=True)
        if not ctx.has_factors:
            return (grad_x,)
        multiplied, a_IL, b_LO, low_NL = ctx.saved_tensor()
        a, b = read(a_IL), read(b_LO)
        grad_low = np.empty([len(grad_NO), a.shape[1]], np.float32)
        multiply(grad_NO, b, grad_low, transpose_b=True, factor=factor)
        grads = [grad_x]
        if ctx.has_lora_x:
            grad_lora_x, to_lora_x = empty(ctx.shape) if lora_x_needs else (None, None)
            if to_lora_x is not None:
                multiply(grad_low, a, _flat(to_lora_x), transpose_b=True)
            grads.append(grad_lora_x)
        elif to_x is not None:
            multiply(grad_low, a, _flat(to_x), transpose_b=True, add=True)
        (grad_a, to_a), (grad_b, to_b) = empty(a.shape), empty(b.shape)
        if a_needs:
            multiply(_rows(multiplied), grad_low, to_a, transpose_a=True)
        if b_needs:
            multiply(read(low_NL), grad_NO, to_b, transpose_a=True, factor=factor)
        return *grads, grad_a if a_needs else None, grad_b if b_needs else None


def _rows(x: paddle.Tensor) -> np.ndarray:
    return _flat(read(x))


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])
