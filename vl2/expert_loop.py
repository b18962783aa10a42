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
        low_x = x if lora_x is None else lora_x
        for e, start, stop in _slices(counts):
            out = paddle.matmul(x[start:stop], weight[e].astype(x.dtype))
            if a is not None and b is not None:
                lows.append(paddle.matmul(low_x[start:stop], a[e]))
                out = out + paddle.matmul(lows[-1], b[e])
            outs.append(out)
        ctx.counts, ctx.has_lora, ctx.has_lora_x = counts, a is not None, lora_x is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [t is not None and not t.stop_gradient for t in (x, weight, lora_x, a, b)]
        low = paddle.concat(lows, axis=0) if lows else None
        ctx.save_for_backward(*(t for t in (x, weight, lora_x, a, b, low) if t is not None))
        return paddle.concat(outs, axis=0) if outs else paddle.zeros([0, weight.shape[2]], x.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of x, weight, lora_x, a and b; None where none is asked for."""
        saved = list(ctx.saved_tensor())
        x, weight = saved.pop(0), saved.pop(0)
        lora_x = saved.pop(0) if ctx.has_lora_x else x
        without: Any = (None, None, None)
        a, b, lows = (*saved, None)[:3] if ctx.has_lora else without
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
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
                elif x_needs and not ctx.has_lora_x:  # the addition is of x itself
                    grad_x[-1] = grad_x[-1] + paddle.matmul(grad_low, a[e], transpose_y=True)

        def rows(parts: list[paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            return paddle.concat(parts, axis=0) if parts else paddle.zeros_like(like)

        def stacked(parts: dict[int, paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            idle = paddle.zeros(like.shape[1:], grad.dtype)
            return paddle.stack([parts.get(e, idle) for e in range(like.shape[0])])

        return (
            rows(grad_x, x, x_needs),
            stacked(grad_w, weight, weight_needs),
            *([rows(grad_lora_x, lora_x, lora_x_needs)] * ctx.has_lora_x),
            *([stacked(grad_a, a, a_needs), stacked(grad_b, b, b_needs)] * ctx.has_lora),
        )
