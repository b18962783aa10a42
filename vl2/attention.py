"""Attention over a flat stream of segments: one function for packs, chunked prefill, decoding and the vision tower.

Shape suffixes: T tokens of the stream, H heads, K channels of a q/k head, V channels of a v head, D model, S segments;
B sequences that go on by one token each, M room of their buffers in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2 import ways
from vl2.cache import LayerStep
from vl2.config import LanguageConfig
from vl2.constant_tensors import segment_bounds
from vl2.kernel_attention import KernelAttention
from vl2.linear import Linear
from vl2.plain_attention import PlainAttention
from vl2.rotation import Rope, rope_tables, rotate_half_split

FLASH_WIDTH = 256  # channels of a head, at most


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
    way = KernelAttention if ways.takes_float32_kernels(q_THK) else PlainAttention
    return way.apply(q_THK, k_THK, v_THV, list(q_lens), list(k_lens), scale, causal)


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
