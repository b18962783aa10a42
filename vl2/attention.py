"""Attention over a flat stream of segments: one function for packs, chunked prefill, decoding and the vision tower.

Shape suffixes: T tokens of the stream, H heads, K channels of a q/k head, V channels of a v head, D model, S segments;
B sequences that go on by one token each, M room of their buffers in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read, tensor_of
from vl2.cache import LayerStep
from vl2.config import LanguageConfig
from vl2.constant_tensors import causal_mask, segment_bounds
from vl2.linear import Linear

# A longer segment is computed in blocks of QUERY_BLOCK queries: with fewer the calls cost more than the work saved.
MAX_ROWS, QUERY_BLOCK = 1024, 512
# The same of a causal segment where kernels add up: MKL multiplies a transposed matrix twice as fast in such blocks.
KERNEL_BLOCK = 256
# Softmax weights of a segment that are kept for backward; those of a longer one are computed again.
KEPT_WEIGHTS = 1 << 27
FLASH_WIDTH = 256  # channels of a head, at most

Block = tuple[slice, int]  # queries of a segment, number of its first keys that they see
Rope = tuple[paddle.Tensor, paddle.Tensor]  # cosine and sine, see `rope_tables`


def attention(
    q_THK: paddle.Tensor,
    k_THK: paddle.Tensor,
    v_THV: paddle.Tensor,
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    *,
    scale: float,
    causal: bool = True,
) -> paddle.Tensor:
    """Softmax attention within each segment, causal and aligned at the segment's end.

        q_lens (2, 1), k_lens (2, 3), causal       a b | e
                                    keys   a       x .
                                           b       x x
                                           c           x      the second segment has a cache of two:
                                           d           x      its single query is the last position
                                           e           x

    Args:
        q_THK: [sum(q_lens), H, K].
        k_THK: [sum(k_lens), H, K].
        v_THV: [sum(k_lens), H, V].
        q_lens: queries of each segment (host integers).
        k_lens: keys of each segment; k >= q, the queries are the last positions.
        scale: factor of the scores.
        causal: False lets every query see every key of its segment.

    Returns:
        [sum(q_lens), H, V]. Segments never see each other.
    """
    if _flash_fits(q_THK, q_lens, k_lens):
        return _flash_attention(q_THK, k_THK, v_THV, q_lens, scale, causal)
    return _PlainAttention.apply(q_THK, k_THK, v_THV, list(q_lens), list(k_lens), scale, causal)


def _segments(
    q_lens: Sequence[int], k_lens: Sequence[int], causal: bool, kernels: bool
) -> Iterator[tuple[slice, slice, list[Block]]]:
    """Of every segment its queries and keys (slices of the stream) and its blocks.

    A segment of up to MAX_ROWS queries is one block; a longer causal one is cut, which skips the keys after each block
    and bounds the score matrix.
    """
    longest, step_of_longer = (KERNEL_BLOCK, KERNEL_BLOCK) if kernels and causal else (MAX_ROWS, QUERY_BLOCK)
    q_start = k_start = 0
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        step = q_len if q_len <= longest else step_of_longer
        blocks = []
        for start in range(0, q_len, step):
            stop = min(start + step, q_len)
            blocks.append((slice(start, stop), k_len - q_len + stop if causal else k_len))
        yield slice(q_start, q_start + q_len), slice(k_start, k_start + k_len), blocks
        q_start, k_start = q_start + q_len, k_start + k_len


def _weights(q_HnK: paddle.Tensor, k_HmK: paddle.Tensor, causal: bool) -> paddle.Tensor:
    """Softmax weights [H, n, m] in float32 of n scaled queries that are the last of m keys."""
    n, m = q_HnK.shape[1], k_HmK.shape[1]
    if ways.takes_float32_kernels(q_HnK):
        scores = empty([q_HnK.shape[0], n, m])
        weights_Hnm = tensor_of(scores)
        paddle.matmul(q_HnK, k_HmK, transpose_y=True, out=weights_Hnm)
        cpu_kernels.softmax(scores.reshape(-1, m), n, n - 1 if causal else 0)
        return weights_Hnm
    scores_Hnm = paddle.matmul(q_HnK, k_HmK, transpose_y=True).astype("float32")
    if causal and n > 1:
        scores_Hnm = scores_Hnm.add_(causal_mask(n, m, scores_Hnm.place))
    return F.softmax_(scores_Hnm, axis=-1)


class _PlainAttention(PyLayer):
    """Matrix products and one softmax a block, with a backward of its own.

    Under autograd every slice of the stream would send back a gradient as long as the whole stream, and every
    elementwise step of the scores would be a fresh array: on CPU memory passes, not arithmetic, cost the time.
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
        # Contiguous, because non-reentrant recompute returns a saved view without its strides.
        q_HTK, k_HTK, v_HTV = _swapped(q_THK, scale), _swapped(k_THK), _swapped(v_THV)
        # Asked now: under recompute the saved tensors come back as other objects, whose flag says nothing.
        ctx.needs_grad = [not x.stop_gradient for x in (q_THK, k_THK, v_THV)]
        outs, kept = [], []
        for queries, keys, blocks in _segments(q_lens, k_lens, causal, ways.takes_float32_kernels(q_HTK)):
            q_HnK, k_HmK, v_HmV = q_HTK[:, queries], k_HTK[:, keys], v_HTV[:, keys]
            keeps = any(ctx.needs_grad) and _keeps(q_HnK, blocks)
            for rows, seen in blocks:
                weights_Hnm = _weights(q_HnK[:, rows], k_HmK[:, :seen], causal).astype(v_THV.dtype)
                outs.append(paddle.matmul(weights_Hnm, v_HmV[:, :seen]))
                if keeps:
                    kept.append(weights_Hnm)
        out_HTV = outs[0] if len(outs) == 1 else paddle.concat(outs, axis=1)
        ctx.args = q_lens, k_lens, scale, causal
        ctx.save_for_backward(q_HTK, k_HTK, v_HTV, out_HTV, *kept)
        return _swapped(out_HTV)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_THV: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        q_HTK, k_HTK, v_HTV, out_HTV, *kept = ctx.saved_tensor()
        q_lens, k_lens, scale, causal = ctx.args
        grad_HTV = _swapped(grad_THV)
        # sum_j weight_j * grad_weight_j of each query, which the softmax's backward subtracts
        mean_HT1 = (grad_HTV * out_HTV).sum(axis=-1, keepdim=True).astype("float32")
        grads: tuple[list, list, list] = [], [], []
        kept = iter(kept)
        for queries, keys, blocks in _segments(q_lens, k_lens, causal, ways.takes_float32_kernels(q_HTK)):
            segment = q_HTK[:, queries], grad_HTV[:, queries], mean_HT1[:, queries], k_HTK[:, keys], v_HTV[:, keys]
            for total, part in zip(grads, _segment_grads(*segment, blocks, kept, causal), strict=True):
                total.append(part)
        grad_q, grad_k, grad_v = (parts[0] if len(parts) == 1 else paddle.concat(parts, axis=1) for parts in grads)
        arrived = zip((grad_q, grad_k, grad_v), (scale, 1.0, 1.0), ctx.needs_grad, strict=True)
        return tuple(_swapped(grad, factor) if needed else None for grad, factor, needed in arrived)


def _swapped(x: paddle.Tensor, factor: float = 1.0) -> paddle.Tensor:
    """[A, B, K] -> [B, A, K], contiguous, times a factor."""
    if ways.takes_float32_kernels(x) and x.is_contiguous():
        out = empty([x.shape[1], x.shape[0], x.shape[2]])
        cpu_kernels.swap(read(x), np.float32(factor), out)
        return tensor_of(out)
    return ((x * factor) if factor != 1.0 else x).transpose([1, 0, 2]).contiguous()


def _segment_grads(
    q_HnK: paddle.Tensor,
    grad_HnV: paddle.Tensor,
    mean_Hn1: paddle.Tensor,
    k_HmK: paddle.Tensor,
    v_HmV: paddle.Tensor,
    blocks: list[Block],
    kept: Iterator[paddle.Tensor],
    causal: bool,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Gradients of one segment's q, k and v; `kept` yields the softmax weights of its blocks, where they are kept."""
    grad_q: list[paddle.Tensor] = []
    grad_k: Any = None
    grad_v: Any = None
    keeps = _keeps(q_HnK, blocks)
    for rows, seen in blocks:
        grad = grad_HnV[:, rows]
        weights_Hnm = next(kept) if keeps else _weights(q_HnK[:, rows], k_HmK[:, :seen], causal).astype(grad.dtype)
        part_v = paddle.matmul(weights_Hnm, grad, transpose_x=True)
        scores_Hnm = _scores_grad(grad, v_HmV[:, :seen], weights_Hnm, mean_Hn1[:, rows])
        grad_q.append(paddle.matmul(scores_Hnm, k_HmK[:, :seen]))
        part_k = paddle.matmul(scores_Hnm, q_HnK[:, rows], transpose_x=True)
        if len(blocks) == 1:
            return grad_q[0], part_k, part_v
        grad_k, grad_v = _add_first(grad_k, part_k, k_HmK), _add_first(grad_v, part_v, v_HmV)
    grad_k, grad_v = (tensor_of(x) if isinstance(x, np.ndarray) else x for x in (grad_k, grad_v))
    return paddle.concat(grad_q, axis=1), grad_k, grad_v


def _keeps(q_HnK: paddle.Tensor, blocks: list[Block]) -> bool:
    """Whether the weights of a segment are kept for its backward."""
    return q_HnK.shape[0] * sum((rows.stop - rows.start) * seen for rows, seen in blocks) <= KEPT_WEIGHTS


def _add_first(total_HmK: Any, part_HsK: paddle.Tensor, like_HmK: paddle.Tensor) -> Any:
    """The sum of a total, zeros where there is none yet, and of a part that is for its first rows; an array on CPU.

    Paddle's addition to a slice takes longer there than the product that made the part.
    """
    if ways.takes_float32_kernels(part_HsK):
        if total_HmK is None:
            total_HmK = empty(like_HmK.shape)
            total_HmK.fill(0)
        cpu_kernels.add_first(total_HmK, read(part_HsK))
        return total_HmK
    total_HmK = paddle.zeros_like(like_HmK) if total_HmK is None else total_HmK
    total_HmK[:, : part_HsK.shape[1]] += part_HsK
    return total_HmK


def _scores_grad(
    grad_HnV: paddle.Tensor, v_HmV: paddle.Tensor, weights_Hnm: paddle.Tensor, mean_Hn1: paddle.Tensor
) -> paddle.Tensor:
    """Gradient of the scores, [H, n, m], from that of a block's result."""
    if ways.takes_float32_kernels(grad_HnV):
        scores = empty(weights_Hnm.shape)
        scores_Hnm, keys = tensor_of(scores), v_HmV.shape[1]
        paddle.matmul(grad_HnV, v_HmV, transpose_y=True, out=scores_Hnm)
        weights = read(weights_Hnm).reshape(-1, keys)
        cpu_kernels.softmax_grad(weights, scores.reshape(-1, keys), read(mean_Hn1).reshape(-1))
        return scores_Hnm
    scores_Hnm = paddle.matmul(grad_HnV, v_HmV, transpose_y=True).astype("float32")
    scores_Hnm = scores_Hnm.subtract_(mean_Hn1).multiply_(weights_Hnm.astype("float32"))
    return scores_Hnm.astype(grad_HnV.dtype)


def attend_last(
    q_BHK: paddle.Tensor, k_BHMK: paddle.Tensor, v_BHMV: paddle.Tensor, mask_BH1M: paddle.Tensor, scale: float
) -> paddle.Tensor:
    """Attention of the last token of each sequence, which reads keys and values where they lie in the cache.

    The buffers are multiplied whole, what lies beyond the last token hidden by a mask: cutting them would copy them.

    Args:
        q_BHK: one query a sequence.
        k_BHMK: keys, and room.
        v_BHMV: values, and room.
        mask_BH1M: float32, see `Shelf.mask`.
        scale: factor of the scores.

    Returns:
        [B, H, V].
    """
    scores_BH1M = paddle.matmul((q_BHK * scale).unsqueeze(2), k_BHMK, transpose_y=True).astype("float32")
    weights_BH1M = F.softmax(scores_BH1M + mask_BH1M, axis=-1)
    return paddle.matmul(weights_BH1M.astype(v_BHMV.dtype), v_BHMV).squeeze(2)


def _flash_fits(q_THK: paddle.Tensor, q_lens: Sequence[int], k_lens: Sequence[int]) -> bool:
    """Variable-length flash attention wants 16-bit numbers and heads of a multiple of 8 channels, at most 256.

    It is taken only where queries and keys coincide: its alignment of a shorter query with a longer key is not
    something this code relies on.
    """
    width = q_THK.shape[-1]
    if q_THK.dtype not in (paddle.bfloat16, paddle.float16) or width % 8 or width > FLASH_WIDTH:
        return False
    return list(q_lens) == list(k_lens) and _has_flash(q_THK.place)


def _has_flash(place: paddle.base.core.Place) -> bool:
    """Whether tensors at this place can take it: on a GPU from Ampere on."""
    return place.is_gpu_place() and paddle.device.cuda.get_device_capability()[0] >= 8


def _flash_attention(
    q_THK: paddle.Tensor, k_THK: paddle.Tensor, v_THV: paddle.Tensor, lens: Sequence[int], scale: float, causal: bool
) -> paddle.Tensor:
    from paddle.nn.functional.flash_attention import flash_attn_unpadded

    bounds_S1 = segment_bounds(lens, q_THK.place)
    width, longest = q_THK.shape[-1], max(lens)
    v_width = v_THV.shape[-1]
    if v_width < width:  # MLA: the kernel wants one head size for q, k and v
        v_THV = F.pad(v_THV, [0, width - v_width], data_format="NCL")
    out_THK, _ = flash_attn_unpadded(
        q_THK, k_THK, v_THV, bounds_S1, bounds_S1, longest, longest, scale, 0.0, causal, False
    )
    return out_THK[..., :v_width]


def rope_tables(position_ids_T: paddle.Tensor, size: int, theta: float, num_heads: int = 1) -> Rope:
    """Cosine and sine of rotary position embedding, float32: bfloat16 would merge distinct positions.

    Args:
        position_ids_T: int64 [T], restarting at 0 with each segment.
        size: rotated channels of a head, even.
        theta: base of the wavelengths.
        num_heads: heads the tables are laid out for; Paddle's CPU product of equal shapes is several times as fast as
            one that broadcasts, and one pair of tables serves all layers.

    Returns:
        (cos, sin), each [T, num_heads, size]; the first half of the sines is negative, see `rotate_half_split`.
    """
    inverse = 1.0 / (theta ** (paddle.arange(0, size, 2, dtype="float32") / size))
    angles = position_ids_T.astype("float32").unsqueeze(-1) * inverse.unsqueeze(0)
    cos, sin = paddle.cos(angles), paddle.sin(angles)
    tables = paddle.concat([cos, cos], axis=-1), paddle.concat([-sin, sin], axis=-1)
    shape = [angles.shape[0], num_heads, size]
    return tuple(table.unsqueeze(1).expand(shape).contiguous() for table in tables)


def rotate_half_split(x_THK: paddle.Tensor, cos_THK: paddle.Tensor, sin_THK: paddle.Tensor) -> paddle.Tensor:
    """Rotate pairs (i, i + K/2), as DeepSeek's MHA does; computed in float32, returned in x's dtype.

    Paddle's `fused_rotary_position_embedding` is not taken: it reads the tables in x's dtype, where 16 bits round them,
    and those that it makes by itself are of pairs (2i, 2i + 1). Source: phi/kernels/fusion/gpu/fused_rope_utils.h.

    x                    a b c d
    halves exchanged     c d a b
    sines                - - + +        result: a cos - c sin, b cos - d sin, c cos + a sin, d cos + b sin
    """
    return _Rotate.apply(x_THK, cos_THK, sin_THK)


class _Rotate(PyLayer):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, x_THK: paddle.Tensor, cos_THK: paddle.Tensor, sin_THK: paddle.Tensor
    ) -> paddle.Tensor:
        ctx.save_for_backward(cos_THK.contiguous(), sin_THK.contiguous())
        if ways.takes_float32_kernels(x_THK):
            return _rotated(cpu_kernels.rotate, x_THK, cos_THK, sin_THK)
        x, half = x_THK.astype("float32"), x_THK.shape[-1] // 2
        return (x * cos_THK + paddle.roll(x, half, axis=-1) * sin_THK).astype(x_THK.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_THK: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        cos_THK, sin_THK = ctx.saved_tensor()
        if ways.takes_float32_kernels(grad_THK):
            return _rotated(cpu_kernels.rotate_back, grad_THK, cos_THK, sin_THK), None, None
        grad, half = grad_THK.astype("float32"), grad_THK.shape[-1] // 2
        return (grad * cos_THK + paddle.roll(grad * sin_THK, half, axis=-1)).astype(grad_THK.dtype), None, None


def _rotated(rotation: Callable[..., None], *tensors: paddle.Tensor) -> paddle.Tensor:
    out = empty(tensors[0].shape)
    rotation(*(array.reshape(-1, out.shape[-1]) for array in (*map(read, tensors), out)))
    return tensor_of(out)


class MultiHeadAttention(nn.Layer):
    """Plain attention of DeepSeek-VL2-Tiny (`use_mla: false`)."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = Linear(size, inner, bias_attr=False)
        self.k_proj = Linear(size, inner, bias_attr=False)
        self.v_proj = Linear(size, inner, bias_attr=False)
        self.o_proj = Linear(inner, size, bias_attr=False)

    @staticmethod
    def rope(position_ids_T: paddle.Tensor, config: LanguageConfig) -> Rope:
        """The tables that `forward` rotates with, made once for all layers."""
        return rope_tables(position_ids_T, config.head_dim, config.rope_theta, config.num_attention_heads)

    def forward(
        self, x_TD: paddle.Tensor, rope: Rope, q_lens: list[int], cache: LayerStep | None = None
    ) -> paddle.Tensor:
        """[T, D] -> [T, D]; with a `LayerStep` the stream continues what the cache holds."""
        heads = [-1, self.num_heads, self.head_dim]
        q_THK = rotate_half_split(self.q_proj(x_TD).reshape(heads), *rope)
        k_THK = rotate_half_split(self.k_proj(x_TD).reshape(heads), *rope)
        v_THK = self.v_proj(x_TD).reshape(heads)
        scale = self.head_dim**-0.5
        if cache is None:
            out_THK = attention(q_THK, k_THK, v_THK, q_lens, q_lens, scale=scale)
        else:
            outs = [
                attend_last(q_THK[rows], k_BHMK, v_BHMV, shelf.mask(self.num_heads), scale)
                for rows, (k_BHMK, v_BHMV), shelf in cache.last((k_THK, v_THK))
            ]
            if found := cache.pieces((k_THK, v_THK)):
                rows, (k_THK, v_THK), q_lens, k_lens = found
                outs.append(attention(q_THK[rows], k_THK, v_THK, q_lens, k_lens, scale=scale))
            out_THK = outs[0] if len(outs) == 1 else paddle.concat(outs)
        return self.o_proj(out_THK.reshape([-1, self.num_heads * self.head_dim]))
