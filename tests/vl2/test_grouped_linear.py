"""The ways of the experts give the same: outputs and all gradients, for every load, with and without LoRA.

Tolerance 2e-6 of a tensor's largest value: float32 sums of some hundred terms in another order.
"""

import numpy as np
import paddle
import pytest

from vl2 import cpu_kernels
from vl2.dropout import Dropout
from vl2.expert_mlp import _Dropout
from vl2.expert_rows import Blocks, dispatch
from vl2.lora_layers import ExpertsLoRA
from vl2.moe import Experts

D, I = 24, 16  # noqa: E741  # inner channels, as everywhere


def crowded(num_experts: int, power: float, tokens: int, choices: int) -> np.ndarray:
    """Distinct experts of each token, the k-th wanted in proportion to k^-power."""
    share = np.arange(1, num_experts + 1.0) ** -power
    rng = np.random.default_rng(3)
    draws = [rng.choice(num_experts, choices, replace=False, p=share / share.sum()) for _ in range(tokens)]
    return np.array(draws)


LOADS = {
    "even": (np.arange(96).reshape(48, 2) % 16, 16),
    "zipf 0.3": (crowded(16, 0.3, 300, 3), 16),
    "zipf 1": (crowded(16, 1.0, 300, 3), 16),
    "one expert takes every row": (np.full((70, 1), 2), 8),
    "most experts take none": (np.tile([1, 60], (40, 1)), 64),
    "one token": (np.array([[5, 0, 3]]), 8),
    "one expert": (np.zeros((33, 1), int), 1),
}


def outcome(monkeypatch, load: str, way: Blocks | str, *, lora: bool, train: bool, frozen=False, dropout=0.0) -> dict:
    """Output and gradients of a layer's experts by name; the way is "kernels", "loop", "batches" or a layout."""
    experts_TC, num_experts = LOADS[load]
    rng = np.random.default_rng(0)
    experts = Experts(num_experts, D, I)
    if lora:
        experts.lora = ExpertsLoRA(experts, rank=4, scaling=2.0, dropout=dropout)
    for name, parameter in experts.named_parameters():
        parameter.set_value(rng.normal(0, 0.3, parameter.shape).astype("float32"))
        parameter.stop_gradient = not (train or "lora" in name)
    x_TD = paddle.to_tensor(rng.normal(0, 1, (len(experts_TC), D)).astype("float32"), stop_gradient=frozen)
    weights_TC = paddle.to_tensor(rng.random(experts_TC.shape).astype("float32"), stop_gradient=frozen)
    loops = way in ("kernels", "loop")
    monkeypatch.setattr("vl2.ways.takes_kernels", lambda place: way == "kernels")
    with monkeypatch.context() as patch:
        patch.setattr("vl2.ways.takes_batches", lambda place: not loops)
        if isinstance(way, Blocks):
            counts = np.bincount(experts_TC.ravel(), minlength=num_experts)
            num_parts = int((-(-np.maximum(counts - way.first, 0) // way.part)).sum())
            patch.setattr("vl2.expert_rows.choose_blocks", lambda counts: way._replace(num_parts=num_parts))
        where = dispatch(paddle.to_tensor(experts_TC), num_experts)
    assert (where.layout.blocks is None) is loops
    y_TD = experts(x_TD, weights_TC, where)
    (y_TD * paddle.to_tensor(rng.normal(0, 1, y_TD.shape).astype("float32"))).sum().backward()
    found = {"y": y_TD.numpy(), "x": None, "weights": None}
    if not frozen:
        found |= {"x": x_TD.grad.numpy(), "weights": weights_TC.grad.numpy()}
    return found | {name: p.grad.numpy() for name, p in experts.named_parameters() if not p.stop_gradient}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert np.abs(expected).max() > 0, name
        assert np.abs(ours[name] - expected).max() <= 2e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("lora", "train"), [(True, False), (False, True), (True, True)])
def test_all_ways_are_equal(monkeypatch, load, lora, train):
    monkeypatch.setattr("vl2.expert_mlp.GROUP", 64)
    loop = outcome(monkeypatch, load, "loop", lora=lora, train=train)
    assert len(loop) == 3 + 6 * lora + 2 * train
    for way in ("batches", "kernels"):
        assert_equal(outcome(monkeypatch, load, way, lora=lora, train=train), loop)


@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_groups_decide_what_is_in_the_cache_only(monkeypatch, rows):
    """To the last bit; also of experts with more rows than a group has."""
    found = []
    for group in (rows, 64):
        monkeypatch.setattr("vl2.expert_mlp.GROUP", group)
        found.append(outcome(monkeypatch, "zipf 1", "kernels", lora=True, train=True))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_a_frozen_layer_gives_its_input_no_gradient(monkeypatch):
    """What nothing below needs is not computed; the factors have theirs all the same."""
    whole = outcome(monkeypatch, "zipf 1", "kernels", lora=True, train=False)
    part = outcome(monkeypatch, "zipf 1", "kernels", lora=True, train=False, frozen=True)
    assert part.pop("x") is None and part.pop("weights") is None
    assert all(np.array_equal(part[name], whole[name]) for name in part)


@pytest.mark.parametrize("blocks", [Blocks(20, 32, 0), Blocks(1, 64, 0), Blocks(0, 32, 0), Blocks(0, 1024, 0)])
@pytest.mark.parametrize("load", ["zipf 1", "most experts take none", "one token"])
def test_any_layout_is_equal(monkeypatch, blocks, load):
    """What a layout costs decides which is taken, not what comes out."""
    loop = outcome(monkeypatch, load, "loop", lora=True, train=True)
    assert_equal(outcome(monkeypatch, load, blocks, lora=True, train=True), loop)


def test_dropout_of_groups(monkeypatch):
    """What is dropped is the same in backward, and right: equal to the loop's with the same numbers dropped."""
    seeds = iter([11, 22] * 9)
    monkeypatch.setattr("vl2.expert_mlp.GROUP", 64)
    monkeypatch.setattr(paddle, "randint", lambda *args: paddle.to_tensor([next(seeds), next(seeds)]))
    found = outcome(monkeypatch, "zipf 1", "kernels", lora=True, train=True, dropout=0.4)

    def by_place(layer, x):
        """The layer's dropout, told of the first product's rows [P, D] and the second's [P, I]."""
        rule = _Dropout(0.4, (11, 22)).rule(0 if x.shape[1] == D else 1, slice(0, x.shape[0]))
        stays = np.empty(x.shape, np.float32)
        cpu_kernels.drop(np.ones(x.shape, np.float32), *rule, stays)
        assert abs((stays > 0).mean() - 0.6) < 0.02 and abs((stays > 0).mean(axis=0) - 0.6).max() < 0.07
        return x * paddle.to_tensor(stays)

    monkeypatch.setattr(Dropout, "forward", by_place)
    loop = outcome(monkeypatch, "zipf 1", "loop", lora=True, train=True, dropout=0.4)
    assert_equal(found, loop)


def test_dropout_is_drawn_from_the_generator(monkeypatch):
    """So that a run that goes on drops what it would have, and a layer computed again what it did."""
    found = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        found.append(outcome(monkeypatch, "zipf 1", "kernels", lora=True, train=False, dropout=0.4)["y"])
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_batches_are_deterministic(monkeypatch):
    first, second = (outcome(monkeypatch, "zipf 1", Blocks(9, 32, 0), lora=True, train=True) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_frozen_weights_get_no_gradient_and_are_not_kept_cast(monkeypatch):
    """A bfloat16 weight is cast in forward and again in backward; what is saved is the weight itself."""
    experts_TC, num_experts = LOADS["zipf 1"]
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    experts = Experts(num_experts, D, I)
    values = [parameter.astype("bfloat16") for parameter in experts.parameters()]
    exact = Experts(num_experts, D, I)
    for mine, theirs, value in zip(experts.parameters(), exact.parameters(), values, strict=True):
        theirs.set_value(value.astype("float32"))
        theirs.stop_gradient = mine.stop_gradient = True
    experts.to(dtype="bfloat16")
    saved = []
    results = []
    for layer in (experts, exact):
        x_TD = paddle.to_tensor(np.random.default_rng(0).normal(0, 1, (len(experts_TC), D)).astype("float32"))
        x_TD.stop_gradient = False
        weights_TC = paddle.ones(experts_TC.shape)
        with paddle.autograd.saved_tensors_hooks(lambda x: saved.append((x.dtype, x.shape)) or x, lambda x: x):
            y_TD = layer(x_TD, weights_TC, dispatch(paddle.to_tensor(experts_TC), num_experts))
        y_TD.sum().backward()
        results.append((y_TD.numpy(), x_TD.grad.numpy()))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    weights = [(dtype, shape) for dtype, shape in saved if shape in ([16, D, 2 * I], [16, I, D])]
    assert [dtype for dtype, _ in weights] == [paddle.bfloat16] * 2 + [paddle.float32] * 2
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_not_a_number_stays_with_its_expert(monkeypatch):
    """Padding is zeros, not a copy of some token: one bad token spoils its own experts' gradients and no others."""
    experts_TC = np.array([[0], [1], [1], [1], [2]])
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    experts = Experts(3, D, I)
    x = np.ones((5, D), "float32")
    x[0] = np.nan
    where = dispatch(paddle.to_tensor(experts_TC), 3)
    assert where.layout.blocks == Blocks(3, 0, 0)
    experts(paddle.to_tensor(x), paddle.ones([5, 1]), where).sum().backward()
    finite = np.isfinite(experts.gate_up.grad.numpy()).all(axis=(1, 2))
    assert finite.tolist() == [False, True, True]


@pytest.mark.parametrize("way", ["kernels", "loop"])
def test_products_are_not_lost_where_slices_are_copies(monkeypatch, way):
    """With FLAGS_use_stride_kernel=0 a product of Paddle's that is written into a slice vanishes without a word."""
    expected = outcome(monkeypatch, "one token", way, lora=True, train=False)
    paddle.set_flags({"FLAGS_use_stride_kernel": False})
    try:
        assert_equal(outcome(monkeypatch, "one token", way, lora=True, train=False), expected)
    finally:
        paddle.set_flags({"FLAGS_use_stride_kernel": True})
