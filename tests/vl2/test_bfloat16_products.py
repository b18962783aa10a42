"""Products with bfloat16 weights as they are stored: as exact as float32's."""

import numpy as np
import paddle
import pytest

from vl2 import bfloat16_products, weight_kernels
from vl2.bfloat16_products import multiply_bfloat16, takes_bfloat16
from vl2.linear import linear
from vl2.products import multiply

needs_amx = pytest.mark.skipif(not takes_bfloat16(), reason="this CPU does not multiply bfloat16")


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def bits_of(numbers: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype(np.uint16)


def numbers_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_three_parts_are_the_number():
    """To the last digit, over all sizes that a step has; a number that is none stays none."""
    draw = np.random.default_rng(0)
    size = draw.uniform(-80, 120, (7, 1001))
    x = (draw.choice([-1, 1], size.shape) * 2.0**size).astype(np.float32)
    x[0, :3] = 0, np.finfo(np.float32).max, 1 + 2**-23
    parts = np.empty((7, 3, 1001), np.uint16)
    weight_kernels.to_bfloat16_parts(x, parts)
    assert np.array_equal(numbers_of(parts).astype(np.float64).sum(axis=1), x.astype(np.float64))
    for strange in (np.nan, np.inf):
        out = np.empty((1, 3, 8), np.uint16)
        weight_kernels.to_bfloat16_parts(np.full((1, 8), strange, np.float32), out)
        assert not np.isfinite(numbers_of(out).sum(axis=1)).any()


@needs_amx
@pytest.mark.parametrize("rows", [1, 16, 17, 200])
@pytest.mark.parametrize(("transpose", "add"), [(False, False), (True, False), (False, True), (True, True)])
def test_error_is_that_of_float32(rows, transpose, add):
    """Against float64: no more than twice that of a float32 product, few rows or many, of parts of larger arrays."""
    k, m = 320, 90
    x, before = drawn(rows, k + 3)[:, 1 : k + 1], drawn(rows, m + 2)
    bits = bits_of(drawn(*((m, k + 5) if transpose else (k, m + 5))))[:, 2:-3]
    weight = numbers_of(bits)
    found, float32 = before.copy(), before[:, :m].copy()
    multiply_bfloat16(x, bits, found[:, 1:-1], transpose=transpose, add=add)
    multiply(np.ascontiguousarray(x), np.ascontiguousarray(weight), float32, transpose_b=transpose)
    exact = x.astype(np.float64) @ (weight.T if transpose else weight).astype(np.float64)
    error = np.abs(float32 - exact).max()
    assert np.abs(found[:, 1:-1] - exact - add * before[:, 1:-1]).max() <= 2 * error + add * 1e-6
    assert np.array_equal(found[:, [0, -1]], before[:, [0, -1]])


@needs_amx
def test_a_linear_layer_takes_them(monkeypatch):
    """Result and gradient are those of the way without; neither casts the weight."""
    weight = paddle.to_tensor(drawn(24, 40)).astype("bfloat16")
    found = []
    for amx in (True, False):
        monkeypatch.setattr("vl2.stored_products.takes_bfloat16", lambda amx=amx: amx)
        monkeypatch.setattr("vl2.stored_products.cast", None if amx else paddle.Tensor.astype)
        x = paddle.to_tensor(drawn(30, 24), stop_gradient=False)
        out = linear(x, weight)
        (out * paddle.to_tensor(drawn(30, 40))).sum().backward()
        found.append((out.numpy(), x.grad.numpy()))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_without_the_library_or_the_instructions(monkeypatch, tmp_path):
    """A Paddle that comes without oneDNN, or a CPU without AMX, takes the other way."""
    bfloat16_products._product.cache_clear()
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "__init__.py"))
    assert not takes_bfloat16()
    bfloat16_products._product.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(bfloat16_products, "_AMX", 1 << 40)
    assert not takes_bfloat16()
    bfloat16_products._product.cache_clear()
