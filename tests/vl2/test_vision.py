"""The vision tower's products, as a GPU would take them."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from vl2 import linear
from vl2.config import VisionConfig
from vl2.model import frozen_tile_slice
from vl2.vision import PatchProjection, patches_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patches_are_multiplied_without_a_fused_bias(dtype, monkeypatch):
    """With a bias, F.linear of a CUDA build is cublasLt's epilogue, and these rows of 588 are no multiple of 8.

    Source: paddle/nn/functional/common.py, `linear` (`linear_v2` with a bias, `matmul` without).
    """
    biases, plain = [], linear.F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, w, bias=None: biases.append(bias) or plain(x, w, bias))
    projection = PatchProjection(VisionConfig(width=16))
    projection.to(dtype=dtype)  # stored in bfloat16, computed in float32
    for parameter in projection.parameters():
        parameter.set_value(paddle.randn(parameter.shape).astype(dtype))
    tiles = np.random.default_rng(0).integers(0, 256, [1, 3, 384, 384]).astype("uint8")
    pixels = (paddle.to_tensor(tiles).astype("float32") / 255.0 - 0.5) / 0.5
    found = projection(patches_of(paddle.to_tensor(tiles), "float32", 27, 14))
    assert biases == ([None] if dtype == "float32" else [])
    weight, bias = projection.weight.astype("float32"), projection.bias.astype("float32")
    expected = paddle.nn.functional.conv2d(pixels, weight, bias, stride=14).flatten(2).transpose([0, 2, 1])
    assert (found - expected).abs().max().item() < 1e-4 * expected.abs().max().item()


def test_patches_are_the_same_in_both_ways(monkeypatch):
    """To the last bit, so that a cache of what the tower makes of them holds for both."""
    tiles = paddle.to_tensor(np.random.default_rng(0).integers(0, 256, [2, 3, 384, 384]).astype("uint8"))
    found = []
    for kernels in (True, False):
        monkeypatch.setattr("vl2.ways.takes_kernels", lambda place, kernels=kernels: kernels)
        found.append(patches_of(tiles, "float32", 27, 14).numpy())
    assert found[0].shape == (2, 729, 588) and np.array_equal(*found)


def test_a_gpu_takes_more_tiles_at_once():
    """Eight tiles a launch leave a card waiting for the host; on a CPU more only take more memory."""
    assert frozen_tile_slice(paddle.CPUPlace()) == 1
    assert frozen_tile_slice(SimpleNamespace(is_gpu_place=lambda: True)) == 32
