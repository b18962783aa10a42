"""The compiled kernels against Paddle's operations, which other devices use, and against float64.

Both ways differ by the order of sums and by the last place of the exponential function: some 1e-6 of the largest value.
"""

import numpy as np
import paddle
import pytest

from vl2 import cpu_kernels
from vl2.attention import attention
from vl2.expert_rows import combine, dispatch
from vl2.gated import gated, gated_pair
from vl2.norm import RMSNorm
from vl2.rotation import rope_tables, rotate_half_split
from vl2.vision import VisionMLP

CLOSE = {"rtol": 0, "atol": 4e-6}


def in_both_ways(monkeypatch, work, *shapes):
    """What `work` gives, and the gradients of random tensors of these shapes, with kernels and with operations."""
    found = []
    for kernels in (True, False):
        monkeypatch.setattr("vl2.ways.takes_kernels", lambda place, kernels=kernels: kernels)
        paddle.seed(0)
        tensors = [paddle.randn(shape) for shape in shapes]
        for tensor in tensors:
            tensor.stop_gradient = False
        result = work(*tensors)
        (result * paddle.randn(result.shape)).sum().backward()
        found.append([result.numpy(), *(tensor.grad.numpy() for tensor in tensors)])
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_lens", "k_lens"), [((1,), (1,)), ((5, 1, 9), (5, 1, 9)), ((2, 1), (7, 4)), ((40,), (41,))])
def test_attention(causal, q_lens, k_lens, monkeypatch):
    """Packs of one token, several segments, cached keys, and blocks of queries."""
    monkeypatch.setattr("vl2.plain_attention.MAX_ROWS", 16)
    monkeypatch.setattr("vl2.plain_attention.QUERY_BLOCK", 8)
    monkeypatch.setattr("vl2.kernel_attention.BLOCK", 7)
    monkeypatch.setattr("vl2.kernel_attention.WIDE", 16)
    monkeypatch.setattr("vl2.kernel_attention.SCORES", 100)  # two heads of five at a time

    def work(q, k, v):
        return attention(q, k, v, q_lens, k_lens, scale=0.4, causal=causal)

    shapes = [sum(q_lens), 5, 6], [sum(k_lens), 5, 6], [sum(k_lens), 5, 5]
    for kernel, plain in zip(*in_both_ways(monkeypatch, work, *shapes), strict=True):
        np.testing.assert_allclose(kernel, plain, **CLOSE)


def test_weights_come_again_to_the_same_bits():
    """In backward, which keeps two numbers of each row; what is hidden has no gradient."""
    scores = np.random.default_rng(0).normal(0, 5, (6, 9)).astype(np.float32)
    grad = np.random.default_rng(1).normal(0, 1, (6, 9)).astype(np.float32)
    weights, again, notes = scores.copy(), scores.copy(), np.zeros((6, 2), np.float32)
    cpu_kernels.softmax(weights, 3, 2, notes)
    mean = (weights * grad).sum(axis=1)
    expected = weights * (grad - mean[:, None])
    cpu_kernels.softmax_grad(again, grad, 3, 2, notes, mean)
    assert np.array_equal(again, weights) and not grad[::3, -2:].any()
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6)


def test_gated_activations(monkeypatch):
    def pair(hidden, weights):
        return gated_pair(hidden * 3, weights)

    def two(gate, up):
        return gated(gate * 3, up)

    for work, shapes in ((pair, ([7, 18], [7, 1])), (two, ([3, 4, 9], [3, 4, 9]))):
        for kernel, plain in zip(*in_both_ways(monkeypatch, work, *shapes), strict=True):
            np.testing.assert_allclose(kernel, plain, rtol=1e-6, atol=2e-5)  # of values up to 20


def test_gelu():
    """In the form that the tower has; float64 is the measure."""
    x = np.linspace(-12, 12, 4001, dtype=np.float32).reshape(1, -1)
    found, exact = np.empty_like(x), x.astype(np.float64)
    cpu_kernels.gelu(x, found)
    u = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    np.testing.assert_allclose(found, 0.5 * exact * (1 + np.tanh(u)), rtol=3e-6, atol=1e-7)
    layer = VisionMLP(8, 24)
    numbers = np.random.default_rng(0).normal(0, 1, (2, 3, 8)).astype(np.float32)
    with paddle.no_grad():
        ours = layer(paddle.to_tensor(numbers)).numpy()
    theirs = layer(paddle.to_tensor(numbers, stop_gradient=False))
    np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)
    theirs.sum().backward()
    assert layer.fc1.weight.grad is not None


@pytest.mark.parametrize("heads", [1, 3])
def test_rotations(heads, monkeypatch):
    """Tables with one head are views of those with all, as MLA's shared key takes them."""
    cos, sin = rope_tables(paddle.arange(5), 8, 100.0, 3)

    def work(x):
        return rotate_half_split(x, cos[:, :heads], sin[:, :heads])

    for kernel, plain in zip(*in_both_ways(monkeypatch, work, [5, heads, 8]), strict=True):
        np.testing.assert_allclose(kernel, plain, **CLOSE)


@pytest.mark.parametrize("trains", [True, False])
def test_norms(trains, monkeypatch):
    norm = RMSNorm(33, 1e-6)
    norm.weight.set_value(paddle.linspace(-1, 2, 33))
    norm.weight.stop_gradient = not trains
    for kernel, plain in zip(*in_both_ways(monkeypatch, norm, [2, 7, 33]), strict=True):
        np.testing.assert_allclose(kernel, plain, **CLOSE)


def test_sums_of_choices(monkeypatch):
    experts = paddle.to_tensor([[2, 0, 1], [1, 2, 0], [2, 1, 0], [0, 1, 2]])

    def work(y):
        return combine(y, dispatch(experts, 3), each=3)

    for kernel, plain in zip(*in_both_ways(monkeypatch, work, [12, 5]), strict=True):
        np.testing.assert_allclose(kernel, plain, **CLOSE)


def softmax_of(rows: np.ndarray, hidden: int = 0) -> np.ndarray:
    scores = np.array(rows, np.float32)
    cpu_kernels.softmax(scores, len(scores), hidden, np.empty((len(scores), 2), np.float32))
    return scores


def test_exponentials_are_those_of_float64():
    x = -np.random.default_rng(0).uniform(0, 80, (50, 1000)).astype(np.float32)
    x[:, 7] = 0  # the greatest, so that nothing is rounded when it is subtracted
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(softmax_of(x), exact / exact.sum(axis=1, keepdims=True), rtol=5e-7)


def test_what_is_hidden_weighs_nothing():
    expected = [[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]]
    found = softmax_of([[0, 9, 9], [0, 0, 9], [5, 5, 5]], hidden=2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_is_no_number_stays_none():
    """A clamp with `min` and `max` would make it the least number, and a step that has gone wrong be trained on."""
    assert np.isnan(softmax_of([[0, np.nan, 1]])).all() and np.isnan(softmax_of([[0, np.inf, 1]])[0, 1])
    one = np.ones(1, np.float32)
    for gate, up in ((np.nan, 1), (1, np.nan), (np.inf, np.nan)):
        out = np.zeros((1, 1), np.float32)
        cpu_kernels.gated(one * np.float32(gate), one * np.float32(up), 1, one, out)
        assert np.isnan(out).all()
