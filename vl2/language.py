"""The DeepSeek-V2 decoder over a flat stream of segments.

Shape suffixes: T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2.attention import MultiHeadAttention
from vl2.balance import LoadBalance
from vl2.cache import LayerStep, Step
from vl2.config import LanguageConfig
from vl2.expert_rows import Dispatch
from vl2.linear import Linear
from vl2.mla import LatentAttention
from vl2.moe import MLP, MoE
from vl2.norm import RMSNorm
from vl2.recompute import recomputed
from vl2.shared_weights import LayerWeights, computed_with

# Supervised positions whose logits exist at the same time: 1024 x 129280 float32 is 0.5 GB.
HEAD_CHUNK = 1024


class DecoderLayer(nn.Layer):
    """Pre-norm attention and MLP (dense in the first layers, experts after)."""

    def __init__(self, config: LanguageConfig, index: int):
        super().__init__()
        self.self_attn = LatentAttention(config) if config.use_mla else MultiHeadAttention(config)
        self.mlp = MoE(config) if config.is_moe(index) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TD: paddle.Tensor,
        cos: paddle.Tensor,
        sin: paddle.Tensor,
        q_lens: list[int],
        cache: LayerStep | None = None,
        balance: LoadBalance | None = None,
        kept: list[Dispatch] | None = None,
    ) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        """[T, D] -> [T, D]; with `balance` (that, the load-balance loss of this layer or None where it is dense).

        Args:
            x_TD: [T, D].
            cos, sin: of the rotation.
            q_lens: tokens of each segment.
            cache: of this layer, which the stream continues.
            balance: of the stream.
            kept: an empty list when the layer will be computed again in backward, see `MoE.forward`.
        """
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), (cos, sin), q_lens, cache)
        normed_TD = self.post_attention_layernorm(x_TD)
        made = self.mlp(normed_TD, balance, kept) if isinstance(self.mlp, MoE) else self.mlp(normed_TD)
        if balance is None:
            return x_TD + made
        y_TD, loss = made if isinstance(made, tuple) else (made, None)
        return x_TD + y_TD, loss


class Embedding(nn.Layer):
    """Token embedding, [V, D]."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.weight = self.create_parameter([config.vocab_size, config.hidden_size])

    def forward(self, ids_T: paddle.Tensor) -> paddle.Tensor:
        """Ids [T] -> rows [T, D], in the stored dtype."""
        return F.embedding(ids_T, self.weight)


class Decoder(nn.Layer):
    """Embedding, layers and final norm: what the checkpoint calls `language.model`."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.layers = nn.LayerList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute_every = 0
        self.shared_weights: LayerWeights | None = None  # brings and takes what other processes keep

    def forward(
        self,
        x_TD: paddle.Tensor,
        position_ids_T: paddle.Tensor,
        q_lens: list[int],
        cache: Step | None = None,
        trace: list | None = None,
        balance: LoadBalance | None = None,
    ) -> paddle.Tensor:
        """[T, D] -> [T, D] after the final norm.

        Args:
            x_TD: input embeddings of the stream.
            position_ids_T: int64, restarting with each segment.
            q_lens: tokens of each segment.
            cache: the stream continues what it holds, which the step ends with; None for training.
            trace: receives the input of every layer and the result, for parity checks.
            balance: receives the load-balance loss of every expert layer.
        """
        cos, sin = self.layers[0].self_attn.rope(position_ids_T, self.config)
        for i, layer in enumerate(self.layers):
            if trace is not None:
                trace.append(x_TD)
            if cache is not None:
                x_TD = layer(x_TD, cos, sin, q_lens, cache.layer(i))
                continue
            again = self.recompute_every and i % self.recompute_every == 0 and paddle.is_grad_enabled()
            args = (x_TD, cos, sin, q_lens, None, balance)
            if self.shared_weights is not None:
                x_TD = computed_with(self.shared_weights, i, layer, *args, [])
            else:
                x_TD = recomputed(layer, *args, []) if again else layer(*args)
            if balance is not None:
                x_TD, loss = x_TD
                if loss is not None:
                    balance.layers.append(loss)
        if cache is not None:
            cache.end()
        x_TD = self.norm(x_TD)
        if trace is not None:
            trace.append(x_TD)
        return x_TD


class LanguageModel(nn.Layer):
    """Decoder and untied output head."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias_attr=False)

    def logits(self, hidden_ND: paddle.Tensor) -> paddle.Tensor:
        """[N, D] -> float32 [N, V]."""
        return self.lm_head(hidden_ND).astype("float32")

    def loss_sum(
        self, hidden_ND: paddle.Tensor, labels_N: paddle.Tensor, of_tokens: list[paddle.Tensor] | None = None
    ) -> paddle.Tensor:
        """Sum of -log p(label) over N supervised positions, float32 scalar; logits exist for one chunk at a time.

        Args:
            hidden_ND: final hidden states of the supervised positions only, N > 0.
            labels_N: int64 next tokens, all valid.
            of_tokens: receives the loss of each position, in pieces of [n, 1] that no gradient goes through.
        """
        n = hidden_ND.shape[0]
        if n <= HEAD_CHUNK:
            parts_n1 = [self._chunk_losses(hidden_ND, labels_N)]
        else:
            chunks = [slice(i, min(i + HEAD_CHUNK, n)) for i in range(0, n, HEAD_CHUNK)]
            parts_n1 = [recomputed(self._chunk_losses, hidden_ND[c], labels_N[c]) for c in chunks]
        if of_tokens is not None:
            of_tokens += [part.detach() for part in parts_n1]
        sums = [part.sum() for part in parts_n1]
        return sums[0] if len(sums) == 1 else paddle.add_n(sums)

    def _chunk_losses(self, hidden_ND: paddle.Tensor, labels_N: paddle.Tensor) -> paddle.Tensor:
        return F.cross_entropy(self.logits(hidden_ND), labels_N.unsqueeze(-1), reduction="none")
