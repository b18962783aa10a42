"""All experts of a layer on a CPU, from tokens to tokens in one node of the graph.

Shape suffixes: T tokens, C choices of a token, P = T * C rows expert by expert, n rows of some experts, E experts,
D model, I inner channels, L and K LoRA channels of the two products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels
from vl2.arrays import empty, read
from vl2.dropout import Rule, draw_seeds, rule
from vl2.expert_products import ExpertGradients, ExpertProducts, slices, some_rows
from vl2.expert_rows import Dispatch
from vl2.quantised import Quantised, needs_grad
from vl2.scratch import scratch

# Rows that are gathered, multiplied and added up together: of some experts, while they are in the cache.
GROUP = 2048

Factors = tuple[paddle.Tensor, paddle.Tensor] | tuple[None, None]  # A and B of all experts, the scaling inside B


class Group(NamedTuple):
    """Some experts and their rows."""

    rows: slice  # of all rows
    parts: list[tuple[int, slice]]  # each expert and its rows, counted from the group's first


def expert_mlp(
    x_TD: paddle.Tensor,
    weights_TC: paddle.Tensor,
    where: Dispatch,
    gate_up: paddle.Tensor | Quantised,
    gate_up_factors: Factors,
    down: paddle.Tensor | Quantised,
    down_factors: Factors,
    dropout: float = 0.0,
) -> paddle.Tensor:
    """Each token through its experts, and the sum of what they give times their weights; float32, on a CPU.

    Rows are copied, multiplied and added up by groups of experts. Of a layer only what the first product gives is there
    whole: not the copies of the tokens, nor what lies between the products, the results, or the gradients of these.

    Args:
        x_TD: tokens.
        weights_TC: of the choices.
        where: from `vl2.expert_rows.dispatch`, without blocks.
        gate_up: [E, D, 2I].
        gate_up_factors: [E, D, L] and [E, L, 2I].
        down: [E, I, D].
        down_factors: [E, I, K] and [E, K, D].
        dropout: part of what the factors multiply that is dropped; drawn from Paddle's generator.

    Returns:
        [T, D]. Gradients reach x, weights_TC, the factors, and gate_up and down when they train.
    """
    operands = gate_up, *gate_up_factors, down, *down_factors
    return _ExpertMLP.apply(x_TD, weights_TC, *operands, _Rows(where), _Dropout.drawn(dropout))


class _Rows:  # no tuple: a PyLayer would take the tensors in one for its inputs
    """Where rows come from."""

    def __init__(self, where: Dispatch):
        self.counts = where.layout.counts
        self.token_P, self.choice_P = read(where.token_P), read(where.choice_P)


class _Dropout(NamedTuple):
    """What the factors multiply: their numbers are dropped by place, so that backward need not keep which."""

    part: float
    seeds: tuple[int, int]  # of the two products

    @staticmethod
    def drawn(part: float) -> _Dropout | None:
        """Of this layer and step; None drops nothing."""
        if not part:
            return None
        first, second = draw_seeds(2)
        return _Dropout(part, (first, second))

    def rule(self, product: int, rows: slice) -> Rule:
        """What stays of some rows of the first (0) or second product: row by row the next seed."""
        return rule(self.part, self.seeds[product] + rows.start)


class _ExpertMLP(PyLayer):
    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x_TD: paddle.Tensor,
        weights_TC: paddle.Tensor,
        gate_up: paddle.Tensor | Quantised,
        a_EDL: paddle.Tensor | None,
        b_EL2I: paddle.Tensor | None,
        down: paddle.Tensor | Quantised,
        a_EIK: paddle.Tensor | None,
        b_EKD: paddle.Tensor | None,
        where: _Rows,
        dropout: _Dropout | None,
    ) -> paddle.Tensor:
        x, weights = read(x_TD), read(weights_TC).reshape(-1)
        (tokens, width), inner, rows = x.shape, down.shape[1], where.token_P.size
        first, second = ExpertProducts(gate_up, a_EDL, b_EL2I), ExpertProducts(down, a_EIK, b_EKD)
        (hidden_P2I, hidden), (y_TD, y) = empty([rows, 2 * inner]), empty([tokens, width])
        (low_PL, low_x), (low_PK, low_inner) = (
            (None, None) if a is None else empty([rows, a.shape[2]]) for a in (a_EDL, a_EIK)
        )
        y[...] = 0
        for group in _groups(where.counts):
            index, n = where.token_P[group.rows], group.rows.stop - group.rows.start
            x_nD, inner_nI, y_nD = (
                scratch(f"expert_{name}", n, size) for name, size in (("x", width), ("inner", inner), ("y", width))
            )
            hidden_n2I, low_nL, low_nK = hidden[group.rows], *(some_rows(t, group.rows) for t in (low_x, low_inner))
            cpu_kernels.take_rows(x, index, x_nD)
            lora_x_nD = _dropped("x", x_nD, dropout, 0, group.rows)
            for e, part in group.parts:
                first.forward(e, x_nD[part], hidden_n2I[part], some_rows(low_nL, part), some_rows(lora_x_nD, part))
            gates = hidden_n2I.reshape(-1)
            cpu_kernels.gated(gates, gates[inner:], 2 * inner, weights[where.choice_P[group.rows]], inner_nI)
            lora_inner_nI = _dropped("inner", inner_nI, dropout, 1, group.rows)
            for e, part in group.parts:
                second.forward(e, inner_nI[part], y_nD[part], some_rows(low_nK, part), some_rows(lora_inner_nI, part))
            cpu_kernels.add_rows(y_nD, index, y)
        # Noted here: under non-reentrant recompute a saved tensor comes back without its stop_gradient.
        operands = gate_up, a_EDL, b_EL2I, down, a_EIK, b_EKD
        ctx.where, ctx.dropout, ctx.needs_grad = where, dropout, [needs_grad(t) for t in (x_TD, weights_TC, *operands)]
        ctx.kept = [t if isinstance(t, Quantised) else t is not None for t in (*operands, low_PL, low_PK)]
        saved = (t for t in (*operands, low_PL, low_PK) if isinstance(t, paddle.Tensor))
        ctx.save_for_backward(x_TD.contiguous(), weights_TC.contiguous(), hidden_P2I, *saved)
        return y_TD

    @staticmethod
    def backward(ctx: PyLayerContext, grad_TD: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        saved, where, dropout = iter(ctx.saved_tensor()), ctx.where, ctx.dropout
        x_TD, weights_TC, hidden_P2I = next(saved), next(saved), next(saved)
        operands = [next(saved) if kept is True else (kept or None) for kept in ctx.kept]
        gate_up, a_EDL, b_EL2I, down, a_EIK, b_EKD, low_PL, low_PK = operands
        assert gate_up is not None and down is not None
        grad, x, weights, hidden = read(grad_TD), read(x_TD), read(weights_TC).reshape(-1), read(hidden_P2I)
        low_x, low_inner = (None if low is None else read(low) for low in (low_PL, low_PK))
        width, inner = x.shape[1], down.shape[1]
        x_needs, weights_need, *needs = ctx.needs_grad
        of_first = ExpertGradients(gate_up, a_EDL, b_EL2I, needs[:3], where.counts)
        of_second = ExpertGradients(down, a_EIK, b_EKD, needs[3:], where.counts)
        (grad_x_TD, to_x), (grad_weights_TC, to_weights) = empty(x_TD.shape), empty(weights_TC.shape)
        to_x[...] = 0
        for group in _groups(where.counts):
            index, n = where.token_P[group.rows], group.rows.stop - group.rows.start
            choices = where.choice_P[group.rows]
            sizes = {"x": width, "inner": inner, "y": width, "grad_inner": inner, "grad_hidden": 2 * inner}
            rooms = [scratch(f"expert_{name}", n, size) for name, size in sizes.items()]
            x_nD, inner_nI, y_nD, grad_inner_nI, grad_hidden_n2I = rooms
            hidden_n2I, low_nL, low_nK = hidden[group.rows], *(some_rows(t, group.rows) for t in (low_x, low_inner))
            cpu_kernels.take_rows(grad, index, y_nD)
            from_lora, same = _room_of_dropped("inner", n, inner, dropout), dropout is None
            grad_lows = [
                of_second.to_rows(e, y_nD[part], grad_inner_nI[part], some_rows(from_lora, part), same_rows=same)
                for e, part in group.parts
            ]
            _add_dropped(from_lora, dropout, 1, group.rows, grad_inner_nI)
            gates, to_gates = hidden_n2I.reshape(-1), grad_hidden_n2I.reshape(-1)
            of_weights = np.empty(n, np.float32)
            cpu_kernels.gated_grad(
                *(gates, gates[inner:], 2 * inner, weights[choices], grad_inner_nI),
                *(to_gates, to_gates[inner:], inner_nI, of_weights),
            )
            to_weights.reshape(-1)[choices] = of_weights
            lora_inner_nI = _dropped("inner", inner_nI, dropout, 1, group.rows)
            for (e, part), grad_low in zip(group.parts, grad_lows, strict=True):
                rows = inner_nI[part], some_rows(low_nK, part), some_rows(lora_inner_nI, part)
                of_second.to_matrices(e, y_nD[part], grad_low, *rows)
            lora_x_nD = None
            if of_first.need_rows:
                cpu_kernels.take_rows(x, index, x_nD)
                lora_x_nD = _dropped("x", x_nD, dropout, 0, group.rows)
            from_lora = _room_of_dropped("y", n, width, dropout if x_needs else None)
            for e, part in group.parts:
                grad_n2I, to_rows = grad_hidden_n2I[part], y_nD[part] if x_needs else None
                grad_low = of_first.to_rows(e, grad_n2I, to_rows, some_rows(from_lora, part), same_rows=same)
                of_first.to_matrices(
                    e, grad_n2I, grad_low, x_nD[part], some_rows(low_nL, part), some_rows(lora_x_nD, part)
                )
            if x_needs:
                _add_dropped(from_lora, dropout, 0, group.rows, y_nD)
                cpu_kernels.add_rows(y_nD, index, to_x)
        grads = [grad_x_TD if x_needs else None, grad_weights_TC if weights_need else None]
        for operand, found in ((gate_up, of_first), (down, of_second)):
            grads += [] if isinstance(operand, Quantised) else [found.of_weight]
            grads += [found.of_a, found.of_b] if found.has_factors else []
        return tuple(grads)


def _dropped(name: str, numbers: np.ndarray, dropout: _Dropout | None, product: int, rows: slice) -> np.ndarray | None:
    """What the factors multiply, where it is not what the weights multiply."""
    if dropout is None:
        return None
    out = scratch(f"expert_lora_{name}", *numbers.shape)
    cpu_kernels.drop(numbers, *dropout.rule(product, rows), out)
    return out


def _room_of_dropped(name: str, rows: int, width: int, dropout: _Dropout | None) -> np.ndarray | None:
    """Room for the gradient of what the factors multiply, where it is not what the weights multiply."""
    return None if dropout is None else scratch(f"expert_grad_lora_{name}", rows, width)


def _add_dropped(
    grads: np.ndarray | None, dropout: _Dropout | None, product: int, rows: slice, total: np.ndarray
) -> None:
    if grads is not None and dropout is not None:
        cpu_kernels.add_dropped(grads, *dropout.rule(product, rows), total)


def _groups(counts: Sequence[int]) -> Iterator[Group]:
    """Neighbours of at most GROUP rows together; an expert that has more by itself."""
    parts: list[tuple[int, slice]] = []
    for expert, rows in slices(counts):
        if parts and rows.stop - parts[0][1].start > GROUP:
            yield _group(parts)
            parts = []
        parts.append((expert, rows))
    if parts:
        yield _group(parts)


def _group(parts: list[tuple[int, slice]]) -> Group:
    first = parts[0][1].start
    inside = [(expert, slice(rows.start - first, rows.stop - first)) for expert, rows in parts]
    return Group(slice(first, parts[-1][1].stop), inside)
