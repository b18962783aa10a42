"""Weights in few bits: what they take, how near they are, and products with them against products with whole ones."""

import numpy as np
import paddle
import pytest

from vl2.expert_rows import dispatch
from vl2.grouped_linear import GroupedLora, grouped_linear
from vl2.linear import Linear, linear, whole
from vl2.quantised import KINDS, Quantised, quantise, quantised_bytes, quantised_of, stored

# Of weights from a normal distribution: half the width of the codes' neighbourhoods.
ERROR = {"nf4": (0.08, 0.1), "int8": (0.002, 0.012)}
NF4 = [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
NF4 += [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1]


def kept(kind: str, values: np.ndarray) -> Quantised:
    """Of a matrix or a stack of them."""
    matrices = values.reshape(-1, *values.shape[-2:])
    arrays = [quantise(kind, np.ascontiguousarray(matrix)) for matrix in matrices]
    return quantised_of(kind, values.shape, {name: np.stack([a[name] for a in arrays]) for name in arrays[0]})


def weight_of(quantised: Quantised) -> paddle.Tensor:
    """A parameter without memory, as a model has it."""
    with paddle.LazyGuard():
        layer = paddle.nn.Layer()
        parameter = layer.create_parameter(list(quantised.shape))
    parameter.quantised = quantised
    parameter.stop_gradient = True
    return parameter


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("shape", [(64, 64), (7, 5), (33, 129), (300, 256), (3, 32, 48)])
def test_error_and_bytes_in_both_ways(kind, shape, monkeypatch):
    """Kernel and operations give the same numbers, also of a last block and a last group that are not full."""
    values = drawn(*shape)
    quantised, number = kept(kind, values), values[..., 0, 0].size
    assert quantised.num_bytes == quantised_bytes(kind, shape)
    found = np.stack([quantised.matrix(paddle.float32, i).numpy() for i in range(number)]).reshape(shape)
    monkeypatch.setattr("vl2.ways.takes_kernels", lambda place: False)
    plain = np.stack([quantised.matrix(paddle.float32, i).numpy() for i in range(number)]).reshape(shape)
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    np.testing.assert_allclose(quantised.matrices(slice(0, number)).numpy().reshape(shape), plain, rtol=1e-6)
    low, high = ERROR[kind]
    assert low / 2 < np.linalg.norm(found - values) / np.linalg.norm(values) < high


def test_bits_of_a_weight():
    """Those of QLoRA with double quantisation, and a byte and a scale for each output channel."""
    size = 2048 * 2816
    assert quantised_bytes("nf4", (2048, 2816)) * 8 / size == pytest.approx(4.129, abs=1e-3)
    assert quantised_bytes("int8", (2048, 2816)) * 8 / size == pytest.approx(8.016, abs=1e-3)


def test_nf4_by_hand():
    """The sixteen values stay what they are; what lies between two goes to the nearer one; zeros stay zeros."""
    block = np.repeat(np.array(NF4, np.float32), 4)
    between = np.linspace(-1, 1, 64, dtype=np.float32)
    values = np.concatenate([block * 3, between, np.zeros(64, np.float32)]).reshape(1, -1)
    found = kept("nf4", values).matrix(paddle.float32).numpy().reshape(3, 64)
    np.testing.assert_allclose(found[0], block * 3, rtol=1e-4, atol=1e-6)
    table = np.array(NF4, np.float32)
    nearest = table[np.abs(between[:, None] - table).argmin(axis=1)]
    assert (np.abs(found[1] - nearest) < 0.01).mean() > 0.95  # a scale's code moves a middle by a hair
    assert not found[2].any()


def test_int8_by_hand():
    values = np.array([[1.27, -254.0, 0.0], [-0.01, 3.0, 0.0]], np.float32)
    found = kept("int8", values).matrix(paddle.float32).numpy()
    np.testing.assert_allclose(found, [[1.27, -254, 0], [-0.01, 4, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(kind, bad):
    values = drawn(20, 20)
    values[13, 7] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(kind, values)


@pytest.mark.parametrize("kind", [*KINDS])
def test_smallest_numbers_and_zeros(kind):
    """Scales without an inverse do no harm."""
    for values in (np.zeros((8, 8), np.float32), np.full((8, 8), 1e-45, np.float32)):
        found = kept(kind, values).matrix(paddle.float32).numpy()
        assert np.isfinite(found).all() and np.abs(found - values).max() <= 1e-44


@pytest.mark.parametrize("kind", [*KINDS])
def test_linear_and_its_gradient(kind):
    """Equal to the product with the whole matrix, which is made twice and kept never."""
    quantised = kept(kind, drawn(32, 48))
    weight, full = weight_of(quantised), quantised.matrix(paddle.float32)
    results = []
    for each in (weight, full):
        x = paddle.to_tensor(drawn(6, 32) * 50, stop_gradient=False)
        out = linear(x, each)
        (out * paddle.arange(48, dtype="float32")).sum().backward()
        results.append((out.numpy(), x.grad.numpy()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert isinstance(stored(weight), Quantised) and stored(full) is full
    layer = Linear(32, 48, bias_attr=False)
    layer.weight = weight
    np.testing.assert_array_equal(layer.effective_weight("float32").numpy(), full.numpy())
    assert whole(weight, paddle.bfloat16).dtype == paddle.bfloat16


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_experts_in_both_ways(kind, batches, with_lora, monkeypatch):
    """The loop, and batches whose matrices are whole two at a time, against the same products with whole weights."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: batches)
    monkeypatch.setattr("vl2.quantised.SLICE", 2 * 16 * 24)
    quantised = kept(kind, drawn(5, 16, 24))
    full = paddle.stack([quantised.matrix(paddle.float32, i) for i in range(5)])
    choices = paddle.to_tensor(np.array([[0, 1]] * 9 + [[3, 0]] * 2 + [[4, 0]]))
    layout = dispatch(choices, 5).layout
    results = []
    for weight in (weight_of(quantised), full):
        x = paddle.to_tensor(drawn(_rows(layout), 16) * 50, stop_gradient=False)
        a, b = (paddle.to_tensor(drawn(5, *shape) * 50, stop_gradient=False) for shape in ((16, 3), (3, 24)))
        out = grouped_linear(x, layout, weight, GroupedLora(x, a, b) if with_lora else None)
        (out * paddle.arange(24, dtype="float32")).sum().backward()
        grads = [x.grad, *([a.grad, b.grad] if with_lora else [])]
        results.append([out.numpy(), *(grad.numpy() for grad in grads)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def _rows(layout) -> int:
    blocks = layout.blocks
    if blocks is None:
        return sum(layout.counts)
    return len(layout.counts) * blocks.first + blocks.num_parts * blocks.part
