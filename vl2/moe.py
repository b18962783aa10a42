"""Mixture of experts: the router, the stacked experts and one grouped computation for all of them.

Shape suffixes: T tokens, D model, I inner channels of an expert, E experts, C choices of a token, R = T * C rows
sorted by expert, L LoRA channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer, PyLayerContext
from paddle.nn.functional import swiglu

from vl2.balance import LoadBalance
from vl2.config import LanguageConfig
from vl2.linear import Linear


class GroupedLora(NamedTuple):
    """Low-rank addition to a grouped product: x @ a[e] @ b[e] on the rows of expert e; the scaling is inside b."""

    x: paddle.Tensor  # [R, in], x after dropout
    a: paddle.Tensor  # [E, in, L]
    b: paddle.Tensor  # [E, L, out]


def grouped_linear(
    x_RD: paddle.Tensor, counts: list[int], weight: paddle.Tensor, lora: GroupedLora | None = None
) -> paddle.Tensor:
    """One matrix product per expert over rows that are sorted by expert.

        rows       counts (2, 0, 1)
        x0  @ W[0]
        x1  @ W[0]
        x2  @ W[2]

    Args:
        x_RD: [R, in] with R = sum(counts).
        counts: rows of each expert (host integers, read once a layer).
        weight: [E, in, out]; a frozen one may be of another dtype, it is cast slice by slice and never kept cast.
        lora: addition of low rank, or None.

    Returns:
        [R, out] in x's dtype. Gradients reach x, lora.x, lora.a, lora.b, and the weight when it trains.
    """
    if not weight.stop_gradient and weight.dtype != x_RD.dtype:
        weight = weight.astype(x_RD.dtype)
    if lora is None:
        return _GroupedLinear.apply(x_RD, weight, None, None, None, counts)
    return _GroupedLinear.apply(x_RD, weight, lora.x, lora.a.astype(x_RD.dtype), lora.b.astype(x_RD.dtype), counts)


def _slices(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


class _GroupedLinear(PyLayer):
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
        outs, lows = [], []
        for e, start, stop in _slices(counts):
            out = paddle.matmul(x[start:stop], weight[e].astype(x.dtype))
            if a is not None and b is not None and lora_x is not None:
                low = paddle.matmul(lora_x[start:stop], a[e])
                out = out + paddle.matmul(low, b[e])
                lows.append(low)
            outs.append(out)
        ctx.counts, ctx.has_lora = counts, a is not None
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        ctx.needs_grad = [t is not None and not t.stop_gradient for t in (x, weight, lora_x, a, b)]
        if a is None:
            ctx.save_for_backward(x, weight)
        else:
            ctx.save_for_backward(x, weight, lora_x, a, b, paddle.concat(lows, axis=0))
        return paddle.concat(outs, axis=0) if outs else paddle.zeros([0, weight.shape[2]], x.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensor()
        x_needs, weight_needs, lora_x_needs, a_needs, b_needs = ctx.needs_grad
        without: Any = (None, None, None, None)
        lora_x, a, b, lows = rest if ctx.has_lora else without
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

        def rows(parts: list[paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            return paddle.concat(parts, axis=0) if parts else paddle.zeros_like(like)

        def stacked(parts: dict[int, paddle.Tensor], like: paddle.Tensor, needed: bool) -> paddle.Tensor | None:
            if not needed:
                return None
            idle = paddle.zeros(like.shape[1:], grad.dtype)
            return paddle.stack([parts.get(e, idle) for e in range(like.shape[0])])

        grads = [rows(grad_x, x, x_needs), stacked(grad_w, weight, weight_needs)]
        if ctx.has_lora:
            grads += [rows(grad_lora_x, lora_x, lora_x_needs), stacked(grad_a, a, a_needs), stacked(grad_b, b, b_needs)]
        return tuple(grads)


class Routing(NamedTuple):
    """Where the tokens go. Row r of the sorted stream is choice order[r] of the [T, C] choices, flattened."""

    experts_TC: paddle.Tensor  # int64 expert of each choice
    weights_TC: paddle.Tensor  # float32 weight of each choice
    scores_TE: paddle.Tensor  # float32 scores of all experts
    order_R: paddle.Tensor  # int64, sorts the choices by expert
    inverse_R: paddle.Tensor  # int64, undoes it
    counts: list[int]  # rows of each expert


class _Gather(PyLayer):
    """Token rows copied to their choices. Backward sums a token's choices in their order: deterministic."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, x_TD: paddle.Tensor, order_R: paddle.Tensor, inverse_R: paddle.Tensor, num_choices: int
    ) -> paddle.Tensor:
        ctx.save_for_backward(order_R, inverse_R)
        ctx.num_choices = num_choices
        return paddle.gather(x_TD, order_R // num_choices)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_RD: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        _, inverse_R = ctx.saved_tensor()
        by_choice = paddle.gather(grad_RD, inverse_R).reshape([-1, ctx.num_choices, grad_RD.shape[-1]])
        return by_choice.sum(axis=1), None, None


class _Combine(PyLayer):
    """The transpose of `_Gather`: sum of each token's choices."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, y_RD: paddle.Tensor, order_R: paddle.Tensor, inverse_R: paddle.Tensor, num_choices: int
    ) -> paddle.Tensor:
        ctx.save_for_backward(order_R)
        ctx.num_choices = num_choices
        return paddle.gather(y_RD, inverse_R).reshape([-1, num_choices, y_RD.shape[-1]]).sum(axis=1)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_TD: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        (order_R,) = ctx.saved_tensor()
        return paddle.gather(grad_TD, order_R // ctx.num_choices), None, None


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

    def forward(self, x_TD: paddle.Tensor) -> Routing:
        """Scores of every expert and the choice for each token, in float32."""
        logits_TE = paddle.matmul(x_TD.astype("float32"), self.weight.astype("float32"), transpose_y=True)
        scores_TE = F.sigmoid(logits_TE) if self.sigmoid else F.softmax(logits_TE, axis=-1)
        experts_TC = self.choose(scores_TE)
        weights_TC = paddle.take_along_axis(scores_TE, experts_TC, axis=-1)
        if self.normalise and self.num_choices > 1:
            weights_TC = weights_TC / (weights_TC.sum(axis=-1, keepdim=True) + 1e-20)
        weights_TC = weights_TC * self.factor
        flat_R = experts_TC.flatten()
        order_R = paddle.argsort(flat_R, stable=True)
        inverse_R = paddle.argsort(order_R)
        counts = paddle.bincount(flat_R, minlength=self.num_experts).tolist()
        return Routing(experts_TC, weights_TC, scores_TE, order_R, inverse_R, counts)

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

    def forward(self, x_RD: paddle.Tensor, weights_R1: paddle.Tensor, counts: list[int]) -> paddle.Tensor:
        """Each row through its expert, times its weight: [R, D] -> [R, D]."""
        hidden_R2I = grouped_linear(x_RD, counts, self.gate_up, self.lora and self.lora.gate_up(x_RD))
        # The weight is applied before the down projection, where the rows are narrower; the product is the same.
        inner_RI = swiglu(hidden_R2I) * weights_R1
        return grouped_linear(inner_RI, counts, self.down, self.lora and self.lora.down(inner_RI))


class MLP(nn.Layer):
    """Dense SwiGLU block; also the shared experts, which are one MLP of n times the width."""

    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj = Linear(size, inner, bias_attr=False)
        self.up_proj = Linear(size, inner, bias_attr=False)
        self.down_proj = Linear(inner, size, bias_attr=False)

    def forward(self, x_TD: paddle.Tensor) -> paddle.Tensor:
        """[T, D] -> [T, D]."""
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class MoE(nn.Layer):
    """Routed experts plus shared experts."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts or 0, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, x_TD: paddle.Tensor, balance: LoadBalance | None = None
    ) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        """[T, D] -> [T, D]; with `balance` (that, the load-balance loss of this layer)."""
        routing = self.gate(x_TD)
        num_choices = self.gate.num_choices
        x_RD = _Gather.apply(x_TD, routing.order_R, routing.inverse_R, num_choices)
        weights_R1 = paddle.gather(routing.weights_TC.flatten(), routing.order_R).unsqueeze(-1).astype(x_TD.dtype)
        y_RD = self.experts(x_RD, weights_R1, routing.counts)
        y_TD = _Combine.apply(y_RD, routing.order_R, routing.inverse_R, num_choices)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD if balance is None else (y_TD, balance.of_layer(*self.gate.affinities(routing)))
