"""Products of all experts in at most two batches: for GPU, where every product is a launch.

Rows lie in the blocks of `vl2.expert_rows.Blocks`. Shape suffixes: P rows, E experts, M further parts, B products of a
batch (E or M), n rows of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext

from vl2.expert_rows import Blocks


class ExpertBatches(PyLayer):
    """Forward and backward of all experts in one node of the graph.

    The first block multiplies the stacked weights as they lie in memory; the further parts multiply copies of those of
    their experts, made again in backward.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        lora_x: paddle.Tensor | None,
        a: paddle.Tensor | None,
        b: paddle.Tensor | None,
        blocks: Blocks,
        expert_M: paddle.Tensor | None,
    ) -> paddle.Tensor:
        """[P, in] -> [P, out]; see `vl2.grouped_linear.grouped_linear`."""
        ctx.blocks, ctx.has_lora = blocks, a is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [t is not None and not t.stop_gradient for t in (x, weight, lora_x, a, b)]
        experts = _experts(blocks, expert_M)
        outs = [
            paddle.matmul(x_BnD, _of(weight, which).astype(x.dtype))
            for x_BnD, which in zip(_batches(x, blocks, weight.shape[0]), experts, strict=True)
        ]
        lows = []
        if a is not None and b is not None and lora_x is not None:
            for i, (x_BnD, which) in enumerate(zip(_batches(lora_x, blocks, weight.shape[0]), experts, strict=True)):
                lows.append(paddle.matmul(x_BnD, _of(a, which)))
                outs[i] = outs[i] + paddle.matmul(lows[i], _of(b, which))
        ctx.save_for_backward(*(t for t in (expert_M, x, weight, lora_x, a, b, *lows) if t is not None))
        return _rows(outs)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of x, weight, lora_x, a and b; None where none is asked for."""
        blocks, saved = ctx.blocks, list(ctx.saved_tensor())
        expert_M = saved.pop(0) if blocks.num_parts else None
        x, weight, *rest = saved
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        experts, num_experts = _experts(blocks, expert_M), weight.shape[0]
        grads_BnD = _batches(grad, blocks, num_experts)
        grad_x = grad_weight = None
        if x_needs:
            weights = [_of(weight, which).astype(grad.dtype) for which in experts]
            grad_x = _rows([paddle.matmul(g, w, transpose_y=True) for g, w in zip(grads_BnD, weights, strict=True)])
            del weights
        if weight_needs:
            grad_weight = _stacked(_products(_batches(x, blocks, num_experts), grads_BnD), experts, num_experts)
        if not ctx.has_lora:
            return grad_x, grad_weight
        lora_x, a, b, *lows = rest
        grad_lows = [
            paddle.matmul(g, _of(b, which), transpose_y=True) for g, which in zip(grads_BnD, experts, strict=True)
        ]
        grad_lora_x = grad_a = grad_b = None
        if lora_x_needs:
            parts = zip(grad_lows, experts, strict=True)
            grad_lora_x = _rows([paddle.matmul(g, _of(a, which), transpose_y=True) for g, which in parts])
        if a_needs:
            grad_a = _stacked(_products(_batches(lora_x, blocks, num_experts), grad_lows), experts, num_experts)
        if b_needs:
            grad_b = _stacked(_products(lows, grads_BnD), experts, num_experts)
        return grad_x, grad_weight, grad_lora_x, grad_a, grad_b


def _experts(blocks: Blocks, expert_M: paddle.Tensor | None) -> list[paddle.Tensor | None]:
    """Whose rows each batch holds; None: all experts, in their order."""
    return [None] * bool(blocks.first) + [expert_M] * bool(blocks.num_parts)


def _of(stacked: paddle.Tensor, which: paddle.Tensor | None) -> paddle.Tensor:
    return stacked if which is None else paddle.gather(stacked, which)


def _batches(x_PD: paddle.Tensor, blocks: Blocks, num_experts: int) -> list[paddle.Tensor]:
    """[P, D] as the [B, n, D] of each batch; views."""
    whole, num_first = [], num_experts * blocks.first
    if blocks.first:
        first_PD = x_PD[:num_first] if blocks.num_parts else x_PD
        whole.append(first_PD.reshape([num_experts, blocks.first, -1]))
    if blocks.num_parts:
        further_PD = x_PD[num_first:] if blocks.first else x_PD
        whole.append(further_PD.reshape([blocks.num_parts, blocks.part, -1]))
    return whole


def _rows(batches: Sequence[paddle.Tensor]) -> paddle.Tensor:
    """Undoes `_batches`."""
    rows = [batch.reshape([-1, batch.shape[-1]]) for batch in batches]
    return rows[0] if len(rows) == 1 else paddle.concat(rows, axis=0)


def _products(x: Sequence[paddle.Tensor], grads: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
    """What the rows of each product of each batch add to the gradient of its matrix: x' @ grad."""
    return [paddle.matmul(x_BnD, grad_BnD, transpose_x=True) for x_BnD, grad_BnD in zip(x, grads, strict=True)]


def _stacked(
    products: Sequence[paddle.Tensor], experts: Sequence[paddle.Tensor | None], num_experts: int
) -> paddle.Tensor:
    """Gradient of a stacked matrix from those of its uses, [E, in, out].

    Sums over the parts of an expert are a product with zeros and ones: on a GPU adding by index has no fixed order.
    """
    total = None
    for product, which in zip(products, experts, strict=True):
        part = product
        if which is not None:
            member_ME = F.one_hot(which, num_experts).astype(product.dtype)
            flat = paddle.matmul(member_ME, product.reshape([product.shape[0], -1]), transpose_x=True)
            part = flat.reshape([num_experts, *product.shape[1:]])
        total = part if total is None else total + part
    return total
