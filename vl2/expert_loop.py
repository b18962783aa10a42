"""Products of all experts one after the other: for CPU, where each of them takes all cores.

Rows lie expert by expert without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2.errors import UserError
from vl2.quantised import Quantised, matrix_of, needs_grad, tensors_of

_VIEWS = "FLAGS_use_stride_kernel"


class ExpertLoop(PyLayer):
    """Forward and backward of all experts in one node of the graph; a loop over views `W[e]` uses all cores on CPU.

    Every product writes its rows where they belong, and what LoRA adds to them follows while they are in the cache: a
    pass over memory costs a CPU as much as a skinny product. Float32, for these products have no 16-bit kernels there.
    """

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
        _check_views()
        ctx.counts, ctx.has_lora_x = counts, lora_x is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [needs_grad(t) for t in (x, weight, lora_x, a, b)]
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        out = paddle.empty([x.shape[0], weight.shape[2]], x.dtype)
        if a is None or b is None:
            for e, rows in _slices(counts):
                paddle.matmul(x[rows], matrix_of(weight, x.dtype, e), out=out[rows])
            ctx.save_for_backward(x, *tensors_of(weight))
            return out
        low = paddle.empty([x.shape[0], a.shape[2]], x.dtype)
        a_E, b_E = paddle.unbind(a), paddle.unbind(b)  # all views at once: one costs as much as a small product
        for e, rows in _slices(counts):
            x_n, low_n, out_n = x[rows], low[rows], out[rows]
            paddle.matmul(x_n, matrix_of(weight, x.dtype, e), out=out_n)
            paddle.matmul(x_n if lora_x is None else lora_x[rows], a_E[e], out=low_n)
            paddle.addmm_(out_n, low_n, b_E[e])
        ctx.save_for_backward(x, *tensors_of(weight), a, b, low, *([lora_x] * ctx.has_lora_x))
        return out

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of those of x, weight, lora_x, a and b that are tensors; None where none is asked for."""
        x, *rest = ctx.saved_tensor()
        weight = ctx.quantised or rest.pop(0)
        a, b, low, lora_x = (*rest, x)[:4] if rest else (None, None, None, None)
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        grad_x = paddle.empty_like(x) if x_needs else None
        grad_lora_x = paddle.empty_like(lora_x) if lora_x_needs else None
        grad_w, grad_a, grad_b = (
            _room(stacked, ctx.counts, grad.dtype) if needed else None
            for stacked, needed in ((weight, weight_needs), (a, a_needs), (b, b_needs))
        )
        if rest:
            b_E, a_T_E = paddle.unbind(b), paddle.unbind(a.transpose([0, 2, 1]).contiguous())
            grad_a_E, grad_b_E = (grad if grad is None else paddle.unbind(grad) for grad in (grad_a, grad_b))
        for e, rows in _slices(ctx.counts):
            g, grad_x_n = grad[rows], None if grad_x is None else grad_x[rows]
            if grad_x_n is not None:
                paddle.matmul(g, matrix_of(weight, g.dtype, e), transpose_y=True, out=grad_x_n)
            if grad_w is not None:
                paddle.matmul(x[rows], g, transpose_x=True, out=grad_w[e])
            if not rest:
                continue
            grad_low = paddle.matmul(g, b_E[e], transpose_y=True)
            if grad_b_E is not None:
                paddle.matmul(low[rows], g, transpose_x=True, out=grad_b_E[e])
            if grad_a_E is not None:
                paddle.matmul(lora_x[rows], grad_low, transpose_x=True, out=grad_a_E[e])
            if grad_lora_x is not None:
                paddle.matmul(grad_low, a_T_E[e], out=grad_lora_x[rows])
            elif grad_x_n is not None and not ctx.has_lora_x:  # the addition is of x itself
                paddle.addmm_(grad_x_n, grad_low, a_T_E[e])
        of_tensors = [grad_x, *([] if ctx.quantised else [grad_w]), *([grad_lora_x] * ctx.has_lora_x)]
        return *of_tensors, *([grad_a, grad_b] * bool(rest))


def _check_views() -> None:
    if not paddle.get_flags(_VIEWS)[_VIEWS]:
        raise UserError(f"{_VIEWS}=0 is set: slices would be copies, and products written into them lost; unset it")


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of those that have some."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _room(stacked: paddle.Tensor, counts: Sequence[int], dtype: paddle.dtype) -> paddle.Tensor:
    """Room for the gradient of a stacked matrix; zeros for experts without rows."""
    room = paddle.empty(stacked.shape, dtype)
    for expert, count in enumerate(counts):
        if not count:
            room[expert].zero_()
    return room
