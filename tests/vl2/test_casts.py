"""The kernels for CPU give what Paddle's operations give, bit for bit."""

import numpy as np
import paddle
import pytest

from vl2 import compiled, ways, weight_kernels
from vl2.casts import cast
from vl2.linear import linear


def counted(monkeypatch, name: str) -> list:
    """Each call of a kernel, which still does its work."""
    calls, function = [], getattr(weight_kernels, name)
    monkeypatch.setattr(weight_kernels, name, lambda *args: calls.append(name) or function(*args))
    return calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_widened_as_by_paddle(dtype, monkeypatch):
    calls = counted(monkeypatch, f"widen_{dtype}")
    every = paddle.to_tensor(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype).reshape([256, 256])
    found, plain = cast(every, paddle.float32), every.astype("float32")
    same = found.numpy().view(np.uint32) == plain.numpy().view(np.uint32)
    not_numbers = np.isnan(found.numpy()) & np.isnan(plain.numpy())  # a signalling one may be made quiet
    assert len(calls) == 1 and found.dtype == paddle.float32 and (same | not_numbers).all()


def test_a_slice_with_strides_is_widened(monkeypatch):
    calls = counted(monkeypatch, "widen_bfloat16")
    x = paddle.randn([6, 8]).astype("bfloat16")
    part = x.transpose([1, 0])[2:5]
    assert np.array_equal(cast(part, paddle.float32).numpy(), part.astype("float32").numpy()) and calls


def test_other_types_are_paddles(monkeypatch):
    calls = counted(monkeypatch, "widen_bfloat16")
    x = paddle.randn([4]).astype("bfloat16")
    assert cast(x, paddle.float16).dtype == paddle.float16
    assert cast(paddle.ones([2], "float32"), paddle.float32).tolist() == [1, 1]
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    assert not ways.takes_kernels(x.place) and cast(x, paddle.float32).dtype == paddle.float32
    assert not calls


def test_kernels_are_compiled_without_a_folder_to_keep_them_in(monkeypatch):
    """Numba refuses `cache=True` where it can write nowhere: of a read-only installation nothing would have run."""
    asked = []

    def njit(**options):
        asked.append(options.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(compiled.numba, "njit", njit)
    assert compiled.kernel(len) is len and asked == [True, False]


def test_a_large_weight_is_multiplied_by_blocks_of_columns(monkeypatch):
    """Equal to the product with the whole, forward and backward; never more than a block is cast."""
    weight = paddle.randn([12, 50]).astype("bfloat16")
    inputs, results, largest = np.random.default_rng(0).normal(size=(2, 3, 12)).astype("float32"), [], []

    def counted_cast(x, dtype):
        largest[-1] = max(largest[-1], x.size)
        return cast(x, dtype)

    monkeypatch.setattr("vl2.stored_products.cast", counted_cast)
    monkeypatch.setattr("vl2.stored_products.takes_bfloat16", lambda: False)
    for block in (1 << 23, 100):
        monkeypatch.setattr("vl2.stored_products._BLOCK", block)
        largest.append(0)
        x = paddle.to_tensor(inputs, stop_gradient=False)
        out = linear(x, weight)
        (out * paddle.arange(50, dtype="float32")).sum().backward()
        results.append((out.numpy(), x.grad.numpy()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    assert largest == [600, 96]
