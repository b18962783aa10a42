"""Multi-head latent attention of DeepSeek-VL2-Small and -full: keys and values come from one compressed row a token.

Shape suffixes: T tokens of the stream, B sequences, D model, H heads, C compressed channels (512), N channels of a head
without position (nope, 128), R with position (rope, 64), W = C + R of a cached row, V of a value head (128).
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2.attention import attention
from vl2.cache import LayerStep, Shelf
from vl2.config import LanguageConfig
from vl2.linear import Linear
from vl2.norm import RMSNorm
from vl2.rotation import Rope, rope_tables, rotate_half_split


def rotate_interleaved(x_THR: paddle.Tensor, cos_THR: paddle.Tensor, sin_THR: paddle.Tensor) -> paddle.Tensor:
    """Rotate pairs (2i, 2i + 1). The result is in half-split order, for queries and keys alike, so scores are right."""
    tokens, heads, size = x_THR.shape
    split = x_THR.reshape([tokens, heads, size // 2, 2]).transpose([0, 1, 3, 2]).reshape([tokens, heads, size])
    return rotate_half_split(split, cos_THR, sin_THR)


class LatentAttention(nn.Layer):
    """MLA without query compression. Source: official DeepseekV2Attention, arXiv 2405.04434 section 2.1.

    The cache holds the normed compressed row and the rotated shared key: C + R values a token (576), not
    H * (N + R + V).
    """

    def __init__(self, config: LanguageConfig):
        super().__init__()
        heads, size = config.num_attention_heads, config.hidden_size
        self.num_heads, self.rank = heads, config.kv_lora_rank or 0
        self.nope, self.rope_dim, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scale = (self.nope + self.rope_dim) ** -0.5
        self.q_proj = Linear(size, heads * (self.nope + self.rope_dim), bias_attr=False)
        self.kv_a_proj_with_mqa = Linear(size, self.rank + self.rope_dim, bias_attr=False)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)  # the official class's own default, not the config's
        self.kv_b_proj = Linear(self.rank, heads * (self.nope + self.v_dim), bias_attr=False)
        self.o_proj = Linear(heads * self.v_dim, size, bias_attr=False)

    @staticmethod
    def rope(position_ids_T: paddle.Tensor, config: LanguageConfig) -> Rope:
        """The tables that `forward` rotates with, made once for all layers."""
        return rope_tables(position_ids_T, config.qk_rope_head_dim, config.rope_theta, config.num_attention_heads)

    def forward(
        self, x_TD: paddle.Tensor, rope: Rope, q_lens: list[int], cache: LayerStep | None = None
    ) -> paddle.Tensor:
        """[T, D] -> [T, D]; with a `LayerStep` the stream continues what the cache holds."""
        cos, sin = rope
        q = self.q_proj(x_TD).reshape([-1, self.num_heads, self.nope + self.rope_dim])
        # Split, not sliced: the gradients of parts are one concatenation then, and not sums of padded copies.
        q_THN, q_THR = paddle.split(q, [self.nope, self.rope_dim], axis=-1)
        q_THR = rotate_interleaved(q_THR, cos, sin)
        compressed_TC, k_TR = paddle.split(self.kv_a_proj_with_mqa(x_TD), [self.rank, self.rope_dim], axis=-1)
        c_TC = self.kv_a_layernorm(compressed_TC)
        k_T1R = rotate_interleaved(k_TR.unsqueeze(1), cos[:, :1], sin[:, :1])
        if cache is None:
            out_THV = self._unfolded(q_THN, q_THR, c_TC, k_T1R, q_lens, q_lens)
        else:
            new_T1W = paddle.concat([c_TC.unsqueeze(1), k_T1R], axis=-1)
            outs = [
                self._folded(q_THN[rows], q_THR[rows], rows_B1MW, shelf)
                for rows, (rows_B1MW,), shelf in cache.last((new_T1W,))
            ]
            if found := cache.pieces((new_T1W,)):
                rows, (rows_T1W,), q_lens, k_lens = found
                c_TC, k_T1R = rows_T1W[:, 0, : self.rank], rows_T1W[..., self.rank :]
                outs.append(self._unfolded(q_THN[rows], q_THR[rows], c_TC, k_T1R, q_lens, k_lens))
            out_THV = outs[0] if len(outs) == 1 else paddle.concat(outs)
        return self.o_proj(out_THV.reshape([-1, self.num_heads * self.v_dim]))

    def _unfolded(
        self,
        q_THN: paddle.Tensor,
        q_THR: paddle.Tensor,
        c_TC: paddle.Tensor,
        k_T1R: paddle.Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int],
    ) -> paddle.Tensor:
        """Keys and values of all heads from the compressed rows: for training and long prefill."""
        kv = self.kv_b_proj(c_TC).reshape([-1, self.num_heads, self.nope + self.v_dim])
        k_THN, v_THV = paddle.split(kv, [self.nope, self.v_dim], axis=-1)
        k_THR = k_T1R.expand([k_T1R.shape[0], self.num_heads, self.rope_dim])
        k = paddle.concat([k_THN, k_THR], axis=-1)
        q = paddle.concat([q_THN, q_THR], axis=-1)
        return attention(q, k, v_THV, q_lens, k_lens, scale=self.scale)

    def _folded(
        self, q_BHN: paddle.Tensor, q_BHR: paddle.Tensor, rows_B1MW: paddle.Tensor, shelf: Shelf
    ) -> paddle.Tensor:
        """Scores of the last token of each sequence against the compressed rows themselves, for decoding: [B, H, V].

        The heads are folded into the query, so all of them read one row a token, where it lies in the cache. The
        position's channels are summed up with the rest and left out of the result: without them the rows would be
        copied.
        """
        # The effective weight, so that an adapter on kv_b_proj counts here too.
        weight = self.kv_b_proj.effective_weight(q_BHN.dtype).reshape([self.rank, self.num_heads, -1])
        up_k_HNC = weight[..., : self.nope].transpose([1, 2, 0])
        up_v_HCV = weight[..., self.nope :].transpose([1, 0, 2])
        q_BHC = paddle.matmul(q_BHN.transpose([1, 0, 2]), up_k_HNC).transpose([1, 0, 2])
        q_BHW = paddle.concat([q_BHC, q_BHR], axis=-1) * self.scale
        rows_BMW = rows_B1MW.squeeze(1)
        scores_BHM = paddle.matmul(q_BHW, rows_BMW, transpose_y=True).astype("float32")
        weights_BHM = F.softmax(scores_BHM + shelf.mask(self.num_heads).squeeze(2), axis=-1)
        out_BHW = paddle.matmul(weights_BHM.astype(rows_BMW.dtype), rows_BMW)
        return paddle.matmul(out_BHW[..., : self.rank].transpose([1, 0, 2]), up_v_HCV).transpose([1, 0, 2])
