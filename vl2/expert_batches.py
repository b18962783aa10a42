"""Products of all experts in at most two batches: for GPU, where every product is a launch.

Rows lie in the blocks of `vl2.expert_rows.Blocks`. Shape suffixes: P rows, E experts, M further parts, B products of a
batch (E or M), n rows of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2.expert_rows import Layout
from vl2.quantised import Quantised, needs_grad, tensors_of


class ExpertBatches(PyLayer):
    """Forward and backward of all experts in one node of the graph.

    The first block multiplies the stacked weights as they lie in memory; the further parts multiply copies of those of
    their experts, made again in backward.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        weight: paddle.Tensor | Quantised,
        lora_x: paddle.Tensor | None,
        a: paddle.Tensor | None,
        b: paddle.Tensor | None,
        layout: Layout,
    ) -> paddle.Tensor:
        """[P, in] -> [P, out]; see `vl2.grouped_linear.grouped_linear`."""
        ctx.layout, ctx.has_lora, ctx.has_lora_x = layout, a is not None, lora_x is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [needs_grad(t) for t in (x, weight, lora_x, a, b)]
        ctx.quantised = weight if isinstance(weight, Quantised) else None
        xs = lora_xs = _batches(x, layout)
        if lora_x is not None:
            lora_xs = _batches(lora_x, layout)
        outs, lows = [], []
        for x_BnD, lora_x_BnD, which in zip(xs, lora_xs, _experts(layout), strict=True):
            out = _product(x_BnD, weight, which)
            if a is not None and b is not None:
                lows.append(paddle.matmul(lora_x_BnD, _of(a, which)))
                out = paddle.baddbmm(out, lows[-1], _of(b, which))
            outs.append(out)
        ctx.save_for_backward(*(t for t in (x, *tensors_of(weight), lora_x, a, b, *lows) if t is not None))
        return _rows(outs)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of those of x, weight, lora_x, a and b that are tensors; None where none is asked for."""
        layout = ctx.layout
        x, *rest = ctx.saved_tensor()
        weight = ctx.quantised or rest.pop(0)
        lora_x = rest.pop(0) if ctx.has_lora_x else x
        a, b, *lows = rest or (None, None)
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        grads_BnO = _batches(grad, layout)
        x_parts: list[paddle.Tensor] = []
        lora_x_parts: list[paddle.Tensor] = []
        weight_parts = _products(_batches(x, layout), grads_BnO) if weight_needs else []
        b_parts = _products(lows, grads_BnO) if b_needs else []
        grad_lows = []
        for grad_BnO, which in zip(grads_BnO, _experts(layout), strict=True):
            if x_needs:
                x_parts.append(_product(grad_BnO, weight, which, transpose_y=True))
            if ctx.has_lora:
                grad_lows.append(paddle.matmul(grad_BnO, _of(b, which), transpose_y=True))
                if lora_x_needs or (x_needs and not ctx.has_lora_x):
                    lora_x_parts.append(paddle.matmul(grad_lows[-1], _of(a, which), transpose_y=True))
        if not ctx.has_lora_x and lora_x_parts:  # the addition is of x itself
            x_parts = [part + more for part, more in zip(x_parts, lora_x_parts, strict=True)]
            lora_x_parts = []
        a_parts = _products(_batches(lora_x, layout), grad_lows) if a_needs else []
        return (
            _rows(x_parts) if x_parts else None,
            *([] if ctx.quantised else [_stacked(weight_parts, layout)]),
            *([_rows(lora_x_parts) if lora_x_parts else None] * ctx.has_lora_x),
            *([_stacked(parts, layout) for parts in (a_parts, b_parts)] * ctx.has_lora),
        )


def _experts(layout: Layout) -> list[paddle.Tensor | None]:
    """Whose rows each batch holds; None: all experts, in their order."""
    blocks = layout.blocks
    assert blocks is not None
    return [None] * (blocks.first > 0 or not blocks.num_parts) + [layout.expert_M] * (blocks.num_parts > 0)


def _of(stacked: paddle.Tensor, which: paddle.Tensor | None) -> paddle.Tensor:
    return stacked if which is None else paddle.gather(stacked, which)


def _product(
    x_BnD: paddle.Tensor,
    weight: paddle.Tensor | Quantised,
    which: paddle.Tensor | None,
    *,
    transpose_y: bool = False,
) -> paddle.Tensor:
    """Each product of a batch with the matrix of its expert; of weights in few bits some matrices are whole at once."""
    if not isinstance(weight, Quantised):
        return paddle.matmul(x_BnD, _of(weight, which).astype(x_BnD.dtype), transpose_y=transpose_y)
    parts = [
        paddle.matmul(
            x_BnD[some],
            weight.matrices(some if which is None else which[some]).astype(x_BnD.dtype),
            transpose_y=transpose_y,
        )
        for some in weight.slices(x_BnD.shape[0])
    ]
    return parts[0] if len(parts) == 1 else paddle.concat(parts)


def _batches(x_PD: paddle.Tensor, layout: Layout) -> list[paddle.Tensor]:
    """[P, D] as the [B, n, D] of each batch; views."""
    blocks = layout.blocks
    assert blocks is not None
    shapes = [(len(layout.counts), blocks.first), (blocks.num_parts, blocks.part)]
    shapes = [shape for shape in shapes if shape[0] * shape[1]] or shapes[:1]
    parts = [x_PD] if len(shapes) == 1 else paddle.split(x_PD, [num * rows for num, rows in shapes])
    return [part.reshape([*shape, x_PD.shape[-1]]) for part, shape in zip(parts, shapes, strict=True)]


def _rows(batches: Sequence[paddle.Tensor]) -> paddle.Tensor:
    """Undoes `_batches`."""
    rows = [batch.reshape([-1, batch.shape[-1]]) for batch in batches]
    return rows[0] if len(rows) == 1 else paddle.concat(rows, axis=0)


def _products(x: Sequence[paddle.Tensor], grads: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
    """What the rows of each product of each batch add to the gradient of its matrix: x' @ grad."""
    return [paddle.matmul(x_BnD, grad_BnD, transpose_x=True) for x_BnD, grad_BnD in zip(x, grads, strict=True)]


def _stacked(products: Sequence[paddle.Tensor], layout: Layout) -> paddle.Tensor | None:
    """Gradient of a stacked matrix from those of its uses, [E, in, out]; None from none.

    Sums over the parts of an expert are a product with zeros and ones: on a GPU adding by index has no fixed order.
    """
    total = None
    for product, which in zip(products, _experts(layout) if products else [], strict=True):
        part = product
        if which is not None and layout.member_ME is not None:
            member_ME = layout.member_ME.astype(product.dtype)
            flat = paddle.matmul(member_ME, product.reshape([product.shape[0], -1]), transpose_x=True)
            part = flat.reshape([-1, *product.shape[1:]])
        total = part if total is None else total + part
    return total
