"""Products where their numbers lie, and layers of them with LoRA, against the same in plain operations."""

import itertools

import numpy as np
import paddle
import pytest

from vl2 import products
from vl2.kernel_linear import Frozen, frozen_linear
from vl2.linear import linear
from vl2.lora_layers import LoRALinear
from vl2.products import multiply
from vl2.quantised import quantise, quantised_of

CASES = list(itertools.product((False, True), (False, True), (False, True), (None, 1, 3)))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=["mkl", "numpy"])
def library(request, monkeypatch) -> str:
    """Whether Paddle comes with MKL."""
    if request.param == "numpy":
        monkeypatch.setattr(products, "_MKL", None)
    elif products._MKL is None:
        pytest.skip("this Paddle has no MKL")
    return request.param


@pytest.mark.parametrize(("transpose_a", "transpose_b", "add", "number"), CASES)
def test_parts_of_arrays(transpose_a, transpose_b, add, number, library):
    """Rows and columns of larger arrays, one matrix or several; around the result nothing changes."""
    lead = () if number is None else (number,)
    a, b, before = (drawn(*lead, 40, side) for side in (33, 34, 35))
    (n, m, k), transposed = (20, 25, 30), (transpose_a, transpose_b)
    shapes = [sides[::-1] if turned else sides for sides, turned in zip(((n, k), (k, m)), transposed, strict=True)]
    left, right = (x[..., 2 : 2 + rows, 1 : 1 + columns] for x, (rows, columns) in zip((a, b), shapes, strict=True))
    found = before.copy()
    multiply(
        *(left, right, found[..., 3 : 3 + n, 4 : 4 + m]),
        **{"transpose_a": transpose_a, "transpose_b": transpose_b, "factor": 0.5, "add": add},
    )
    exact = [x.astype(np.float64) for x in (left, right)]
    first, second = (np.swapaxes(x, -1, -2) if turned else x for x, turned in zip(exact, transposed, strict=True))
    expected = before.copy()
    expected[..., 3 : 3 + n, 4 : 4 + m] = 0.5 * first @ second + add * before[..., 3 : 3 + n, 4 : 4 + m]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_products_of_nothing(library):
    out = drawn(3, 4)
    multiply(np.empty((3, 0), np.float32), np.empty((0, 4), np.float32), out, add=True)
    assert out.any()
    multiply(np.empty((3, 0), np.float32), np.empty((0, 4), np.float32), out)
    assert not out.any()
    multiply(np.empty((0, 3), np.float32), out, np.empty((0, 4), np.float32))


def weights(kind: str) -> tuple[object, np.ndarray]:
    """A weight [24, 70], stored so, and its numbers."""
    numbers = drawn(24, 70) * 0.1
    if kind in ("float32", "bfloat16"):
        weight = paddle.to_tensor(numbers).astype(kind)
        return weight, weight.astype("float32").numpy()
    kept = quantised_of(kind, numbers.shape, {name: part[None] for name, part in quantise(kind, numbers).items()})
    return kept, kept.matrix(paddle.float32).numpy()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("lora", ["none", "same rows", "other rows"])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_a_frozen_product_with_lora(kind, lora, shape, library, monkeypatch):
    """Result and gradients are those of Paddle's operations; a weight is multiplied by blocks of columns."""
    monkeypatch.setattr("vl2.stored_products._BLOCK", 24 * 16)
    weight, numbers = weights(kind)
    bias, outcome = paddle.to_tensor(drawn(70)), []
    for ours in (True, False):
        names = {"x": shape, "lora_x": shape, "a": (24, 4), "b": (4, 70)}
        given = {name: paddle.to_tensor(drawn(*size), stop_gradient=False) for name, size in names.items()}
        x, lora_x, a, b = given.values()
        others = lora_x if lora == "other rows" else None
        if ours:
            factors = (None, None) if lora == "none" else (a, b)
            out = frozen_linear(x, Frozen(weight, bias, 1.5), *factors, others)
        else:
            out = x @ paddle.to_tensor(numbers) + bias
            if lora != "none":
                out = out + 1.5 * ((x if others is None else others) @ a) @ b
        (out * paddle.to_tensor(drawn(*out.shape))).sum().backward()
        outcome.append([out.numpy(), *(None if t.grad is None else t.grad.numpy() for t in given.values())])
    for found, expected in zip(*outcome, strict=True):
        assert (found is None) is (expected is None)
        if expected is not None:
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_needs_no_gradient_gets_none():
    """Of a first layer's rows, and of factors that do not train."""
    a, b = paddle.to_tensor(drawn(24, 4)), paddle.to_tensor(drawn(4, 70), stop_gradient=False)
    x = paddle.to_tensor(drawn(5, 24))
    frozen_linear(x, Frozen(weights("float32")[0]), a, b).sum().backward()
    assert b.grad is not None and a.grad is None and x.grad is None


def test_a_weight_that_trains_takes_another_way():
    """And has a gradient; so has one beside an adapter, where PaddleNLP unfreezes it."""
    from vl2.linear import Linear

    layer = Linear(24, 70)
    lora = LoRALinear(layer, rank=2, scaling=1.0, dropout=0.0)
    for work in (lambda x: linear(x, layer.weight, layer.bias), lora):
        layer.weight.clear_gradient()
        work(paddle.to_tensor(drawn(5, 24))).sum().backward()
        assert layer.weight.grad is not None and layer.bias.grad is not None
