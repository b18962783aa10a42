"""Which rows go to which expert: their order, and how they are laid out for the products.

Shape suffixes: T tokens, C choices of a token, R = T * C choices, E experts, M further parts of crowded experts,
P rows of the layout (R, and padding).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read
from vl2.constant_tensors import positions

# What a layout costs beside its rows, in rows. One of Tiny (3 * 1280 * 896 multiplications, three times with recompute)
# takes some 0.2 us of a current card at 1e14 operations a second; the products of the further parts are some 100
# launches of 5 us; at 3.3e12 bytes a second reading an expert's weights (2 bytes a number) takes as long as 30 of its
# rows and copying them as 60, whatever its shape: a product of fewer rows waits for its weights.
FURTHER_LAUNCHES, COPIED_EXPERT, READ_EXPERT = 2500, 60, 30
# Rows of a further part: whole tiles of a GPU's product.
PARTS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Blocks(NamedTuple):
    """A layout for batched products: every expert's first rows, then the rest of the crowded ones in equal parts.

        counts (1, 5, 2), first 2, part 2     a .   b c   g h     every expert
                                              d e   f .           the rest of the second one, in two parts

    Dots are padding: rows of zeros.
    """

    first: int  # rows of every expert in the first block; 0: there is none
    part: int  # rows of a further part
    num_parts: int

    def num_rows(self, num_experts: int) -> int:
        """Rows of the layout, padding included."""
        return num_experts * self.first + self.num_parts * self.part


@dataclass(frozen=True, kw_only=True)
class Layout:  # no tuple: a PyLayer takes the tensors in one for its inputs and wants gradients for them
    """How rows are laid out by expert: in batches, or one expert after the other without padding."""

    counts: list[int]  # rows of each expert
    blocks: Blocks | None = None
    expert_M: paddle.Tensor | None = None  # int64, whose rows a further part holds
    member_ME: paddle.Tensor | None = None  # float32, the same as ones among zeros


class Dispatch(NamedTuple):
    """Where the choices go."""

    experts_TC: paddle.Tensor  # int64, the experts of each token
    layout: Layout
    choice_P: paddle.Tensor  # int64 choice in each row of the layout; R in padding
    token_P: paddle.Tensor  # int64 token in each row; T in padding
    row_R: paddle.Tensor  # int64 row of each choice


def choose_blocks(counts: Sequence[int]) -> Blocks:
    """The cheapest layout for batched products: rows with their padding against launches and copies of weights.

    Args:
        counts: rows of each expert.
    """
    counts_E = np.asarray(counts)
    first_F = np.unique(np.append(counts_E, 0))  # between two of them it helps the same experts
    part_G = np.array(PARTS)
    beyond_FE = np.maximum(counts_E - first_F[:, None], 0).astype("float32")  # four times as fast as integers
    parts_FG = np.ceil(beyond_FE[:, None, :] / part_G.astype("float32")[:, None]).sum(axis=-1).astype("int64")
    first_cost_F = len(counts) * np.where(first_F > 0, np.maximum(first_F, READ_EXPERT), 0)
    cost_FG = first_cost_F[:, None] + parts_FG * (part_G + COPIED_EXPERT)
    cost_FG = cost_FG + np.where((parts_FG > 0) & (first_F[:, None] > 0), FURTHER_LAUNCHES, 0)
    first, part = np.unravel_index(np.argmin(cost_FG), cost_FG.shape)
    num_parts = int(parts_FG[first, part])
    return Blocks(int(first_F[first]), int(part_G[part]) if num_parts else 0, num_parts)


def read_counts(bounds_E1: paddle.Tensor) -> list[int]:
    """Rows of each expert, from where those of each begin: the one time a layer that the host waits for the device."""
    bounds = bounds_E1.tolist()
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def dispatch(experts_TC: paddle.Tensor, num_experts: int) -> Dispatch:
    """Lay out the choices by expert; those of an expert stay in the order of the tokens.

    Args:
        experts_TC: int64, the experts of each token.
        num_experts: E.
    """
    place, num_choices = experts_TC.place, experts_TC.shape[1]
    flat_R = experts_TC.flatten()
    num_rows = flat_R.shape[0]
    order_R = paddle.argsort(flat_R, stable=True)
    sorted_R = paddle.gather(flat_R, order_R)
    bounds_E1 = paddle.searchsorted(sorted_R, positions(num_experts + 1, place))
    counts = read_counts(bounds_E1)
    index_R = positions(num_rows, place)
    if not ways.takes_batches(place):
        row_R = paddle.scatter(paddle.zeros_like(order_R), order_R, index_R)
        return Dispatch(experts_TC, Layout(counts=counts), order_R, order_R // num_choices, row_R)
    blocks = choose_blocks(counts)
    offset_R, expert_M = _offsets(sorted_R, bounds_E1, blocks)
    sorted_row_R = offset_R + index_R
    padding_P = paddle.full([blocks.num_rows(num_experts)], num_rows, "int64")
    choice_P = paddle.scatter(padding_P, sorted_row_R, order_R)
    row_R = paddle.scatter(paddle.zeros_like(order_R), order_R, sorted_row_R)
    member_ME = None if expert_M is None else F.one_hot(expert_M, num_experts)
    layout = Layout(counts=counts, blocks=blocks, expert_M=expert_M, member_ME=member_ME)
    return Dispatch(experts_TC, layout, choice_P, choice_P // num_choices, row_R)


def _offsets(
    sorted_R: paddle.Tensor, bounds_E1: paddle.Tensor, blocks: Blocks
) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """What turns a choice's position in the sorted stream into its row, and the expert of each further part."""
    first, part, num_parts = blocks
    start_E, num_experts = bounds_E1[:-1], bounds_E1.shape[0] - 1
    expert_E = positions(num_experts, bounds_E1.place)
    in_first_R = paddle.gather(expert_E * first - start_E, sorted_R)
    if not num_parts:
        return in_first_R, None
    first_stop_E = start_E + first
    parts_E = (paddle.clip(bounds_E1[1:] - first_stop_E, min=0) + (part - 1)) // part
    stop_E = paddle.cumsum(parts_E)
    further_E = (stop_E - parts_E) * part + (num_experts * first) - first_stop_E
    is_first_R = positions(sorted_R.shape[0], sorted_R.place) < paddle.gather(first_stop_E, sorted_R)
    offset_R = paddle.where(is_first_R, in_first_R, paddle.gather(further_E, sorted_R))
    return offset_R, paddle.searchsorted(stop_E, positions(num_parts, bounds_E1.place), right=True)


def spread(x_ND: paddle.Tensor, where: Dispatch, *, each: int) -> paddle.Tensor:
    """Rows copied to where they are multiplied, [P, D]; zeros in padding. Gradients of a row's copies add up in order.

    Args:
        x_ND: of the tokens (`each` is C) or of the choices (1).
        where: from `dispatch`.
        each: choices of a row.
    """
    source_P = where.choice_P if each == 1 else where.token_P
    return _Spread.apply(x_ND, source_P, where.row_R, each, where.layout.blocks is not None)


def combine(y_PD: paddle.Tensor, where: Dispatch, *, each: int) -> paddle.Tensor:
    """The transpose of `spread`: the sum of each token's choices, in their order, [T, D]."""
    return _Combine.apply(y_PD, where.token_P, where.row_R, each, where.layout.blocks is not None)


def _gather_padded(x_ND: paddle.Tensor, source_P: paddle.Tensor, padded: bool) -> paddle.Tensor:
    if padded:
        x_ND = F.pad(x_ND, [0, 1, 0, 0], pad_from_left_axis=True)  # the row that padding is a copy of
    return paddle.gather(x_ND, source_P)


def _sum_of_choices(y_PD: paddle.Tensor, row_R: paddle.Tensor, each: int) -> paddle.Tensor:
    if ways.takes_float32_kernels(y_PD):
        y_TD, out = empty([row_R.shape[0] // each, y_PD.shape[-1]])
        cpu_kernels.sum_rows(read(y_PD), read(row_R), each, out)
        return y_TD
    y_RD = paddle.gather(y_PD, row_R)
    return y_RD if each == 1 else y_RD.reshape([-1, each, y_PD.shape[-1]]).sum(axis=1)


class _Spread(PyLayer):
    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x_ND: paddle.Tensor,
        source_P: paddle.Tensor,
        row_R: paddle.Tensor,
        each: int,
        padded: bool,
    ) -> paddle.Tensor:
        ctx.save_for_backward(row_R)
        ctx.each = each
        return _gather_padded(x_ND, source_P, padded)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_PD: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        (row_R,) = ctx.saved_tensor()
        return _sum_of_choices(grad_PD, row_R, ctx.each), None, None


class _Combine(PyLayer):
    @staticmethod
    def forward(
        ctx: PyLayerContext,
        y_PD: paddle.Tensor,
        token_P: paddle.Tensor,
        row_R: paddle.Tensor,
        each: int,
        padded: bool,
    ) -> paddle.Tensor:
        ctx.save_for_backward(token_P)
        ctx.padded = padded
        return _sum_of_choices(y_PD, row_R, each)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_TD: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        (token_P,) = ctx.saved_tensor()
        return _gather_padded(grad_TD, token_P, ctx.padded), None, None
