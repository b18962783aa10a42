"""Tensors made of host numbers are sent to the device once, not once a layer and pack."""

import numpy as np
import paddle
import pytest

from vl2 import constant_tensors
from vl2.attention import attention
from vl2.constant_tensors import causal_mask, positions, segment_bounds

PLACE = paddle.ones([1]).place


def test_positions_are_views_of_one_range(monkeypatch):
    assert positions(3, PLACE).tolist() == [0, 1, 2]
    assert positions(5000, PLACE).tolist() == list(range(5000))
    monkeypatch.delattr(paddle, "arange")  # 5000 made 8192
    assert positions(8192, PLACE)[-1].item() == 8191
    assert positions(0, PLACE).shape == [0]


def test_bounds():
    assert segment_bounds([3, 2, 0], PLACE).tolist() == [0, 3, 5, 5]
    assert segment_bounds([3, 2], PLACE).dtype == paddle.int32


def test_bounds_of_equal_segments_are_sent_once(monkeypatch):
    """Every layer asked for them anew: up to 132 waits for the device a pack."""
    sent, to_tensor = [], paddle.to_tensor
    monkeypatch.setattr(paddle, "to_tensor", lambda *args, **kwargs: sent.append(args) or to_tensor(*args, **kwargs))
    monkeypatch.setattr("vl2.attention._flash_fits", lambda *args: True)
    kernel = "paddle.nn.functional.flash_attention.flash_attn_unpadded"
    bounds = []
    monkeypatch.setattr(kernel, lambda q, k, v, q_bounds, k_bounds, *rest: (bounds.append(q_bounds) or v, None))
    q_THK = paddle.ones([19, 2, 8])
    for _ in range(12):
        attention(q_THK, q_THK, q_THK, [12, 7], [12, 7], scale=1.0)
    assert len(sent) == 1
    assert [b.tolist() for b in bounds] == [[0, 12, 19]] * 12
    attention(q_THK, q_THK, q_THK, [7, 12], [7, 12], scale=1.0)
    assert len(sent) == 2


def test_static_programs_share_nothing():
    """A value of one traced program means nothing in the next, so neither is kept."""
    paddle.enable_static()
    try:
        for _ in range(2):
            with paddle.static.program_guard(paddle.static.Program()):
                assert positions(4, PLACE).shape == [4]
    finally:
        paddle.disable_static()
    assert positions(4, PLACE).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("lens", [[4], [1, 1, 1]])
def test_bounds_take_any_sequence(lens):
    assert segment_bounds(tuple(lens), PLACE) is segment_bounds(lens, PLACE)


def test_one_mask_for_all_layers(monkeypatch):
    """Where kernels do not hide what is to come themselves."""
    monkeypatch.setattr("vl2.ways.takes_batches", lambda place: True)
    constant_tensors._causal_mask.cache_clear()
    made, triu = [], paddle.triu
    monkeypatch.setattr(paddle, "triu", lambda *args, **kwargs: made.append(args) or triu(*args, **kwargs))
    q_THK = paddle.ones([14, 2, 4])
    for _ in range(12):
        attention(q_THK, q_THK, q_THK, [9, 5], [9, 5], scale=1.0)
    assert len(made) == 2
    assert causal_mask(2, 4000, PLACE) is not causal_mask(
        2, 4000, PLACE
    )  # those of long segments are too large to keep
    assert causal_mask(2, 3, PLACE).tolist() == [[0, 0, np.float32(-1e30)], [0, 0, 0]]
