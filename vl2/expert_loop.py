"""Products of all experts one after the other: for CPU, where each of them takes all cores; float32.

Rows lie expert by expert without padding.
"""

from __future__ import annotations

import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2.arrays import empty, read
from vl2.expert_products import ExpertGradients, ExpertProducts, slices, some_rows
from vl2.quantised import Quantised, needs_grad, tensors_of


class ExpertLoop(PyLayer):
    """Forward and backward of all experts in one node of the graph; a loop over views `W[e]` uses all cores on CPU."""

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        weight: paddle.Tensor | Quantised,
        lora_x: paddle.Tensor | None,
        a: paddle.Tensor | None,
        b: paddle.Tensor | None,
        counts: list[int],
    ) -> paddle.Tensor:
        """[R, in] -> [R, out]; see `vl2.grouped_linear.grouped_linear`."""
        ctx.counts, ctx.has_lora_x = counts, lora_x is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [needs_grad(t) for t in (x, weight, lora_x, a, b)]
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        products = ExpertProducts(weight, a, b)
        out, results = empty([x.shape[0], weight.shape[2]])
        low, lows = (None, None) if a is None else empty([x.shape[0], a.shape[2]])
        multiplied, lora_multiplied = read(x), None if lora_x is None else read(lora_x)
        for e, rows in slices(counts):
            of_lora = some_rows(lows, rows), some_rows(lora_multiplied, rows)
            products.forward(e, multiplied[rows], results[rows], *of_lora)
        ctx.save_for_backward(*(t for t in (x, *tensors_of(weight), a, b, low, lora_x) if t is not None))
        return out

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of those of x, weight, lora_x, a and b that are tensors; None where none is asked for."""
        x, *rest = ctx.saved_tensor()
        weight = ctx.quantised or rest.pop(0)
        a, b, low, lora_x = (*rest, None)[:4] if rest else (None, None, None, None)
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        grad_x, to_x = empty(x.shape) if x_needs else (None, None)
        grad_lora_x, to_lora_x = empty(x.shape) if lora_x_needs else (None, None)
        gradients = ExpertGradients(weight, a, b, (weight_needs, a_needs, b_needs), ctx.counts)
        grads, multiplied = read(grad), read(x)
        lows, lora_multiplied = (None if t is None else read(t) for t in (low, lora_x))
        for e, rows in slices(ctx.counts):
            g = grads[rows]
            into = some_rows(to_x, rows), some_rows(to_lora_x, rows)
            grad_low = gradients.to_rows(e, g, *into, same_rows=not ctx.has_lora_x)
            of_lora = some_rows(lows, rows), some_rows(lora_multiplied, rows)
            gradients.to_matrices(e, g, grad_low, multiplied[rows], *of_lora)
        of_tensors = [grad_x, *([] if ctx.quantised else [gradients.of_weight]), *([grad_lora_x] * ctx.has_lora_x)]
        return *of_tensors, *([gradients.of_a, gradients.of_b] * bool(rest))
