"""How rows are laid out for the experts: the choice of blocks, the index of every row, and the way back."""

import itertools

import numpy as np
import paddle
import pytest

from tests.vl2.expert_loads import NANO_LOADS, zipf
from vl2.expert_rows import (
    COPIED_EXPERT,
    FURTHER_LAUNCHES,
    PARTS,
    READ_EXPERT,
    Blocks,
    choose_blocks,
    combine,
    dispatch,
    spread,
)


def cost(blocks: Blocks, num_experts: int) -> int:
    further = FURTHER_LAUNCHES * bool(blocks.first and blocks.num_parts)
    first = num_experts * max(blocks.first, READ_EXPERT) if blocks.first else 0
    return first + further + (blocks.part + COPIED_EXPERT) * blocks.num_parts


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([100] * 64, Blocks(100, 0, 0)),  # even: one block, no padding
        ([1] + [0] * 7, Blocks(0, 32, 1)),  # a pack of one token with one choice
        ([0, 1] * 6 + [0] * 52, Blocks(0, 32, 6)),  # decoding reads six experts' weights, not those of all 64
        ([4096] + [0] * 63, Blocks(0, 1024, 4)),  # one expert takes every row: its weights, not 63 others' padding
        ([50_000], Blocks(50_000, 0, 0)),  # a single expert
        ([0, 0], Blocks(0, 0, 0)),
        ([300] * 63 + [2000], Blocks(300, 1024, 2)),
    ],
)
def test_blocks_for_loads(counts, expected):
    assert choose_blocks(counts) == expected


@pytest.mark.slow
def test_hardly_another_layout_is_cheaper():
    """The first block ends at an expert's count only; a search over all others finds no cheaper one by a tenth."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 200, 6) * rng.integers(0, 12, 6)
        found = choose_blocks(counts.tolist())
        others = [
            Blocks(first, part, int((-(-np.maximum(counts - first, 0) // part)).sum()))
            for first, part in itertools.product(range(0, counts.max() + 1, 3), PARTS)
        ]
        assert cost(found, 6) <= 1.1 * min(cost(other, 6) for other in others)


@pytest.mark.parametrize(("power", "most"), [(0.0, 1.01), (0.3, 1.25), (1.0, 1.6)])
@pytest.mark.parametrize("num_experts", [64, 72])
def test_padding_of_skewed_loads(power, most, num_experts):
    """A pack of 4,096 tokens with six choices each, as the recipes make them. One block alone pads 2.5 and 13 times."""
    counts = zipf(num_experts, 4096 * 6, power)
    assert choose_blocks(counts).num_rows(num_experts) <= most * sum(counts)


@pytest.mark.parametrize("counts", NANO_LOADS)
def test_padding_of_measured_loads(counts):
    assert choose_blocks(counts).num_rows(8) <= 1.25 * sum(counts)


@pytest.mark.parametrize(
    "blocks", [None, Blocks(4, 0, 0), Blocks(2, 2, 1), Blocks(1, 3, 3), Blocks(0, 2, 4), Blocks(0, 4, 3)]
)
def test_every_choice_has_its_row(monkeypatch, blocks):
    """Four tokens with two choices of four experts; the third expert is idle. Padding reads the row after the last.

    With Blocks(2, 2, 1):   experts 0 1 2 3 | 1     choices 0 2, 1 3, . ., 4 6 | 5 7
    """
    experts_TC = np.array([[0, 1], [0, 1], [3, 1], [3, 1]])
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: blocks is not None)
    monkeypatch.setattr("vl2.expert_rows.choose_blocks", lambda counts: blocks)
    where = dispatch(paddle.to_tensor(experts_TC), 4)
    assert where.layout.counts == [2, 4, 0, 2]
    choice_P, row_R = where.choice_P.numpy(), where.row_R.numpy()
    assert choice_P[row_R].tolist() == list(range(8))
    assert (np.delete(choice_P, row_R) == 8).all()
    assert where.token_P.numpy().tolist() == (choice_P // 2).tolist()
    expert_P = np.repeat(np.arange(4), where.layout.counts)
    if blocks:
        assert len(choice_P) == blocks.num_rows(4)
        parts = where.layout.expert_M.numpy() if blocks.num_parts else np.array([], int)
        expert_P = np.concatenate([np.repeat(np.arange(4), blocks.first), np.repeat(parts, blocks.part)])
    assert expert_P[row_R].tolist() == experts_TC.ravel().tolist()
    for expert in range(4):  # in the tokens' order
        mine = choice_P[(expert_P == expert) & (choice_P < 8)]
        assert mine.tolist() == sorted(mine)

    x_TD = paddle.arange(1, 9, dtype="float32").reshape([4, 2])
    x_PD = spread(x_TD, where, each=2).numpy()
    assert np.array_equal(x_PD, np.vstack([x_TD.numpy(), np.zeros((1, 2))])[where.token_P.numpy()])
    assert np.array_equal(combine(paddle.to_tensor(x_PD), where, each=2).numpy(), 2 * x_TD.numpy())


def test_host_reads_once_and_no_operation_waits(monkeypatch):
    """`bincount` waits for the device in its own kernel, and a second sort is not needed to undo the first."""
    for name in ("bincount", "nonzero", "masked_select", "unique"):
        monkeypatch.delattr(paddle, name)
    ran, read = [], []
    argsort = paddle.argsort
    monkeypatch.setattr(paddle, "argsort", lambda *args, **kwargs: ran.append(1) or argsort(*args, **kwargs))
    for name in ("numpy", "item", "__int__", "__float__", "__bool__"):
        method = getattr(paddle.Tensor, name)
        monkeypatch.setattr(
            paddle.Tensor, name, lambda self, *args, method=method: read.append(self.shape) or method(self, *args)
        )
    experts_TC = paddle.to_tensor(np.random.default_rng(0).integers(0, 4, (50, 2)))
    for batched in (False, True):
        monkeypatch.setattr("vl2.ways.takes_batches", lambda place, batched=batched: batched)
        ran.clear(), read.clear()
        dispatch(experts_TC, 4)
        assert (len(ran), read) == (1, [[5]])
