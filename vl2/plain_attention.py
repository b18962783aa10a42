"""Softmax attention in matrix products, for where there is no kernel for all of it.

Shape suffixes: T tokens of the stream, H heads, K channels of a q/k head, V channels of a v head; n queries of a block,
m keys that they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext

from vl2.constant_tensors import causal_mask

# A longer segment is computed in blocks of QUERY_BLOCK queries: with fewer the calls cost more than the work saved.
MAX_ROWS, QUERY_BLOCK = 1024, 512

Block = tuple[slice, int]  # queries of a segment, number of its first keys that they see


def _segments(q_lens: Sequence[int], k_lens: Sequence[int], causal: bool) -> Iterator[tuple[slice, slice, list[Block]]]:
    """Of every segment its queries and keys (slices of the stream) and its blocks.

    A segment of up to MAX_ROWS queries is one block; a longer causal one is cut, which skips the keys after each block
    and bounds the score matrix.
    """
    q_start = k_start = 0
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        step = q_len if q_len <= MAX_ROWS else QUERY_BLOCK
        blocks = []
        for start in range(0, q_len, step):
            stop = min(start + step, q_len)
            blocks.append((slice(start, stop), k_len - q_len + stop if causal else k_len))
        yield slice(q_start, q_start + q_len), slice(k_start, k_start + k_len), blocks
        q_start, k_start = q_start + q_len, k_start + k_len


def _weights(q_HnK: paddle.Tensor, k_HmK: paddle.Tensor, causal: bool) -> paddle.Tensor:
    """Softmax weights [H, n, m] in float32 of n scaled queries that are the last of m keys."""
    n, m = q_HnK.shape[1], k_HmK.shape[1]
    scores_Hnm = paddle.matmul(q_HnK, k_HmK, transpose_y=True).astype("float32")
    if causal and n > 1:
        scores_Hnm = scores_Hnm.add_(causal_mask(n, m, scores_Hnm.place))
    return F.softmax_(scores_Hnm, axis=-1)


class PlainAttention(PyLayer):
    """Matrix products and one softmax a block, with a backward of its own that makes the weights again.

    Under autograd every slice of the stream would send back a gradient as long as the whole stream, and every
    elementwise step of the scores would be a fresh array: on CPU memory passes, not arithmetic, cost the time. Weights
    that were kept would be the largest thing of a layer; a product of one head's width makes their scores again.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        q_THK: paddle.Tensor,
        k_THK: paddle.Tensor,
        v_THV: paddle.Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> paddle.Tensor:
        """See `vl2.attention.attention`."""
        # Contiguous, because non-reentrant recompute returns a saved view without its strides.
        q_HTK, k_HTK, v_HTV = _swapped(q_THK, scale), _swapped(k_THK), _swapped(v_THV)
        # Asked now: under recompute the saved tensors come back as other objects, whose flag says nothing.
        ctx.needs_grad = [not x.stop_gradient for x in (q_THK, k_THK, v_THV)]
        outs = []
        for queries, keys, blocks in _segments(q_lens, k_lens, causal):
            q_HnK, k_HmK, v_HmV = q_HTK[:, queries], k_HTK[:, keys], v_HTV[:, keys]
            for rows, seen in blocks:
                weights_Hnm = _weights(q_HnK[:, rows], k_HmK[:, :seen], causal)
                outs.append(paddle.matmul(weights_Hnm.astype(v_THV.dtype), v_HmV[:, :seen]))
        out_THV = _swapped(outs[0] if len(outs) == 1 else paddle.concat(outs, axis=1))
        ctx.args = q_lens, k_lens, scale, causal
        # Detached: what is given would hold its own node, and both stay where no backward is run.
        ctx.save_for_backward(q_HTK, k_HTK, v_HTV, out_THV.detach())
        return out_THV

    @staticmethod
    def backward(ctx: PyLayerContext, grad_THV: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of queries, keys and values; None where none is asked for."""
        q_HTK, k_HTK, v_HTV, out_THV = ctx.saved_tensor()
        q_lens, k_lens, scale, causal = ctx.args
        grad_HTV = _swapped(grad_THV)
        # sum_j weight_j * grad_weight_j of each query, which the softmax's backward subtracts
        mean_TH1 = (grad_THV * out_THV).sum(axis=-1, keepdim=True).astype("float32")
        mean_HT1 = mean_TH1.transpose([1, 0, 2]).contiguous()
        grads: tuple[list, list, list] = [], [], []
        for queries, keys, blocks in _segments(q_lens, k_lens, causal):
            segment = q_HTK[:, queries], grad_HTV[:, queries], mean_HT1[:, queries], k_HTK[:, keys], v_HTV[:, keys]
            for total, part in zip(grads, _segment_grads(*segment, blocks, causal), strict=True):
                total.append(part)
        grad_q, grad_k, grad_v = (parts[0] if len(parts) == 1 else paddle.concat(parts, axis=1) for parts in grads)
        arrived = zip((grad_q, grad_k, grad_v), (scale, 1.0, 1.0), ctx.needs_grad, strict=True)
        return tuple(_swapped(grad, factor) if needed else None for grad, factor, needed in arrived)


def _swapped(x: paddle.Tensor, factor: float = 1.0) -> paddle.Tensor:
    """[A, B, K] -> [B, A, K], contiguous, times a factor."""
    return ((x * factor) if factor != 1.0 else x).transpose([1, 0, 2]).contiguous()


def _segment_grads(
    q_HnK: paddle.Tensor,
    grad_HnV: paddle.Tensor,
    mean_Hn1: paddle.Tensor,
    k_HmK: paddle.Tensor,
    v_HmV: paddle.Tensor,
    blocks: list[Block],
    causal: bool,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Gradients of one segment's q, k and v."""
    grad_q: list[paddle.Tensor] = []
    grad_k: paddle.Tensor | None = None
    grad_v: paddle.Tensor | None = None
    for rows, seen in blocks:
        q, grad, k, v = q_HnK[:, rows], grad_HnV[:, rows], k_HmK[:, :seen], v_HmV[:, :seen]
        weights_Hnm, scores_Hnm = _weights_and_scores_grad(q, k, v, grad, mean_Hn1[:, rows], causal)
        grad_q.append(paddle.matmul(scores_Hnm, k))
        part_v = paddle.matmul(weights_Hnm, grad, transpose_x=True)
        part_k = paddle.matmul(scores_Hnm, q, transpose_x=True)
        if len(blocks) == 1:
            return grad_q[0], part_k, part_v
        grad_k, grad_v = _add_first(grad_k, part_k, k_HmK), _add_first(grad_v, part_v, v_HmV)
    return paddle.concat(grad_q, axis=1), grad_k, grad_v


def _weights_and_scores_grad(
    q_HnK: paddle.Tensor,
    k_HmK: paddle.Tensor,
    v_HmV: paddle.Tensor,
    grad_HnV: paddle.Tensor,
    mean_Hn1: paddle.Tensor,
    causal: bool,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """A block's softmax weights, and the gradient of its scores from that of its result; both [H, n, m]."""
    weights_Hnm = _weights(q_HnK, k_HmK, causal)
    scores_Hnm = paddle.matmul(grad_HnV, v_HmV, transpose_y=True).astype("float32")
    scores_Hnm = scores_Hnm.subtract_(mean_Hn1).multiply_(weights_Hnm)
    return weights_Hnm.astype(grad_HnV.dtype), scores_Hnm.astype(grad_HnV.dtype)


def _add_first(total_HmK: paddle.Tensor | None, part_HsK: paddle.Tensor, like_HmK: paddle.Tensor) -> paddle.Tensor:
    """The sum of a total, zeros where there is none yet, and of a part that is for its first rows."""
    total_HmK = paddle.zeros(like_HmK.shape, like_HmK.dtype) if total_HmK is None else total_HmK
    total_HmK[:, : part_HsK.shape[1]] += part_HsK
    return total_HmK
