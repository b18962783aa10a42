"""Products of all experts one after the other: for CPU, where each of them takes all cores.

Rows lie expert by expert without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import paddle
from paddle.autograd import PyLayer, PyLayerContext


def _slices(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


class ExpertLoop(PyLayer):
    """Forward and backward of all experts in one node of the graph; a loop over views `W[e]` uses all cores on CPU."""

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        lora_x: paddle.Tensor | None,
        a: paddle.Tensor | None,
        b: paddle.Tensor | None,
        counts: list[int],
    ) -> paddle.Tensor:
        """[R, in] -> [R, out]; see `vl2.grouped_linear.grouped_linear`."""
        outs, lows = [], []
        for e, start, stop in _slices(counts):
            out = paddle.matmul(x[start:stop], weight[e].astype(x.dtype))
            if a is not None and b is not None and lora_x is not None:
                low = paddle.matmul(lora_x[start:stop], a[e])
                out = out + paddle.matmul(low, b[e])
                lows.append(low)
            outs.append(out)
        ctx.counts, ctx.has_lora = counts, a is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [t is not None and not t.stop_gradient for t in (x, weight, lora_x, a, b)]
        if a is None:
            ctx.save_for_backward(x, weight)
        else:
            ctx.save_for_backward(x, weight, lora_x, a, b, paddle.concat(lows, axis=0))
        return paddle.concat(outs, axis=0) if outs else paddle.zeros([0, weight.shape[2]], x.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of x, weight, lora_x, a and b; None where none is asked for."""
        x, weight, *rest = ctx.saved_tensor()
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        without: Any = (None, None, None, None)
        lora_x, a, b, lows = rest if ctx.has_lora else without
        grad_x, grad_w, grad_lora_x = [], {}, []
        grad_a, grad_b = {}, {}
        for e, start, stop in _slices(ctx.counts):
            g = grad[start:stop]
            if x_needs:
                grad_x.append(paddle.matmul(g, weight[e].astype(g.dtype), transpose_y=True))
            if weight_needs:
                grad_w[e] = paddle.matmul(x[start:stop], g, transpose_x=True)
            if ctx.has_lora:
                grad_low = paddle.matmul(g, b[e], transpose_y=True)
                grad_b[e] = paddle.matmul(lows[start:stop], g, transpose_x=True)
                grad_a[e] = paddle.matmul(lora_x[start:stop], grad_low, transpose_x=True)
                if lora_x_needs:
                    grad_lora_x.append(paddle.matmul(grad_low, a[e], transpose_y=True))

        def rows(parts: list[paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            return paddle.concat(parts, axis=0) if parts else paddle.zeros_like(like)

        def stacked(parts: dict[int, paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            idle = paddle.zeros(like.shape[1:], grad.dtype)
            return paddle.stack([parts.get(e, idle) for e in range(like.shape[0])])

        grads = [rows(grad_x, x, x_needs), stacked(grad_w, weight, weight_needs)]
        if ctx.has_lora:
            grads += [rows(grad_lora_x, lora_x, lora_x_needs), stacked(grad_a, a, a_needs), stacked(grad_b, b, b_needs)]
        return tuple(grads)
