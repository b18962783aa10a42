"""Mixture of experts: the router and the stacked experts.

Shape suffixes: T tokens, D model, I inner channels of an expert, E experts, C choices of a token, P rows of the layout
by expert (T * C, and padding).
"""

from __future__ import annotations

from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2 import ways
from vl2.balance import LoadBalance
from vl2.config import LanguageConfig
from vl2.expert_mlp import expert_mlp
from vl2.expert_rows import Dispatch, combine, dispatch, spread
from vl2.gated import gated, gated_pair
from vl2.grouped_linear import grouped_linear, stored_for
from vl2.linear import Linear


class Routing(NamedTuple):
    """Where the tokens go, and how much each expert's answer counts."""

    experts_TC: paddle.Tensor  # int64 expert of each choice
    weights_TC: paddle.Tensor  # float32 weight of each choice
    scores_TE: paddle.Tensor  # float32 scores of all experts


class Router(nn.Layer):
    """Choice of experts, in float32. Source: official MoEGate."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.num_choices, self.num_experts = config.num_experts_per_tok, config.n_routed_experts or 0
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        # [E, D] as in the checkpoint; not a Linear, so that no LoRA group can ever take it.
        self.weight = self.create_parameter([self.num_experts, config.hidden_size])
        self.sigmoid, self.e_score_correction_bias = config.scoring_func == "sigmoid", None
        if config.topk_method == "noaux_tc":
            # Takes part in the choice only, so no gradient ever reaches it.
            self.e_score_correction_bias = self.create_parameter([self.num_experts], is_bias=True)

    def forward(self, x_TD: paddle.Tensor, experts_TC: paddle.Tensor | None = None) -> Routing:
        """Scores of every expert and the choice for each token, in float32.

        Args:
            x_TD: [T, D].
            experts_TC: the choice, where it has been made before.
        """
        logits_TE = paddle.matmul(x_TD.astype("float32"), self.weight.astype("float32"), transpose_y=True)
        scores_TE = F.sigmoid(logits_TE) if self.sigmoid else F.softmax(logits_TE, axis=-1)
        if experts_TC is None:
            experts_TC = self.choose(scores_TE)
        weights_TC = paddle.take_along_axis(scores_TE, experts_TC, axis=-1, broadcast=False)
        if self.normalise and self.num_choices > 1:
            weights_TC = weights_TC / (weights_TC.sum(axis=-1, keepdim=True) + 1e-20)
        return Routing(experts_TC, weights_TC * self.factor, scores_TE)

    def choose(self, scores_TE: paddle.Tensor) -> paddle.Tensor:
        """The experts of each token, int64 [T, C]; the correction bias takes part, without a gradient."""
        scores_TE = scores_TE.detach()
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias.detach().astype("float32")
        return paddle.topk(scores_TE, self.num_choices, axis=-1, sorted=False)[1]

    def affinities(self, routing: Routing) -> tuple[paddle.Tensor, paddle.Tensor]:
        """What the load-balance loss looks at: scores that add up to 1 [T, E], and the experts of the highest [T, C].

        A sigmoid's scores are divided by their sum, and the correction bias takes no part in the choice. Source: arXiv
        2412.19437, equations 17 to 20 (the official code refuses to train such a router).
        """
        scores_TE, experts_TC = routing.scores_TE, routing.experts_TC
        if self.sigmoid:
            scores_TE = scores_TE / (scores_TE.sum(axis=-1, keepdim=True) + 1e-20)
        if self.e_score_correction_bias is not None:
            experts_TC = paddle.topk(scores_TE.detach(), self.num_choices, axis=-1, sorted=False)[1]
        return scores_TE, experts_TC


class Experts(nn.Layer):
    """All routed experts of a layer, stacked; `lora` holds their low-rank additions when they are tuned."""

    def __init__(self, num_experts: int, size: int, inner: int):
        super().__init__()
        self.gate_up = self.create_parameter([num_experts, size, 2 * inner])
        self.down = self.create_parameter([num_experts, inner, size])
        self.lora = None

    def forward(self, x_TD: paddle.Tensor, weights_TC: paddle.Tensor, where: Dispatch) -> paddle.Tensor:
        """Each token through its experts, and the sum of what they give times their weights: [T, D] -> [T, D]."""
        layout = where.layout
        if layout.blocks is None and ways.takes_float32_kernels(x_TD):
            gate_up, down = (stored_for(weight, x_TD.dtype) for weight in (self.gate_up, self.down))
            if self.lora is None:
                return expert_mlp(x_TD, weights_TC, where, gate_up, (None, None), down, (None, None))
            factors = self.lora.gate_up_factors(), self.lora.down_factors()
            return expert_mlp(x_TD, weights_TC, where, gate_up, factors[0], down, factors[1], self.lora.dropped())
        x_PD = spread(x_TD, where, each=weights_TC.shape[1])
        weights_P1 = spread(weights_TC.reshape([-1, 1]), where, each=1).astype(x_TD.dtype)
        hidden_P2I = grouped_linear(x_PD, layout, self.gate_up, self.lora and self.lora.gate_up(x_PD))
        # The weight is applied before the down projection, where the rows are narrower; the product is the same.
        inner_PI = gated_pair(hidden_P2I, weights_P1)
        y_PD = grouped_linear(inner_PI, layout, self.down, self.lora and self.lora.down(inner_PI))
        return combine(y_PD, where, each=weights_TC.shape[1])


class MLP(nn.Layer):
    """Dense SwiGLU block; also the shared experts, which are one MLP of n times the width."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias_attr=False)
        self.up_proj = Linear(size, inner, bias_attr=False)
        self.down_proj = Linear(inner, size, bias_attr=False)

    def forward(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(gated(self.gate_proj(x_TD), self.up_proj(x_TD)))


class MoE(nn.Layer):
    """Routed experts plus shared experts; in training it counts how often each expert is chosen."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts or 0, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self._load = [0] * self.gate.num_experts

    def take_load(self) -> list[int]:
        """How often each expert was chosen in training since this was asked before; a layer computed again is once."""
        load, self._load = self._load, [0] * self.gate.num_experts
        return load

    def forward(
        self, x_TD: paddle.Tensor, balance: LoadBalance | None = None, kept: list[Dispatch] | None = None
    ) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        """[T, D] -> [T, D]; with `balance` (that, the load-balance loss of this layer).

        Args:
            x_TD: [T, D].
            balance: of the stream.
            kept: takes up where the choices go, or gives it when the layer is computed again in backward: a GPU would
                be waited for twice, and a token whose scores are almost equal might go elsewhere the second time.
        """
        known = kept[0] if kept else None
        routing = self.gate(x_TD, known and known.experts_TC)
        where = known or dispatch(routing.experts_TC, self.gate.num_experts)
        if self.training and known is None:  # on the host already: the products need them there
            self._load = [sum(both) for both in zip(self._load, where.layout.counts, strict=True)]
        if kept is not None and known is None:
            kept.append(where)
        y_TD = self.experts(x_TD, routing.weights_TC, where)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD if balance is None else (y_TD, balance.of_layer(*self.gate.affinities(routing)))
