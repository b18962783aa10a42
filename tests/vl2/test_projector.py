"""Arrangement of image rows, and that equal tiles are encoded once without changing a number."""

import numpy as np
import paddle
import pytest

from tests.precision.emulation import half_precision_on_cpu
from vl2.projector import _squares, arrange, arrange_index, distinct_tiles, plan_rows


def arranged(projected, which, newline, separator, grids) -> paddle.Tensor:
    plan = plan_rows(which, grids, int(projected.shape[1] ** 0.5))
    return arrange(projected, newline, separator, plan, paddle.to_tensor(plan.order_R))


def test_arrange_index_draws_the_docstring():
    """Two rows a tile: global rows, separator, local rows across the tiles; 12 is the newline, 13 the separator."""
    global_rows, local_rows = [0, 1, 12, 2, 3, 12], [4, 5, 8, 9, 12, 6, 7, 10, 11, 12]
    assert arrange_index([(2, 1)], rows=2).tolist() == [*global_rows, 13, *local_rows]


def test_second_image_follows_with_its_own_rows():
    index = arrange_index([(1, 1), (1, 2)], rows=1)
    assert index.tolist() == [0, 5, 6, 1, 5, 2, 5, 6, 3, 5, 4, 5]


def test_local_tile_of_one_by_one_is_encoded_once():
    rng = np.random.default_rng(0)
    view, other = rng.integers(0, 256, [2, 3, 4, 4], np.uint8)
    tiles = np.stack([view, view, other, view, view, view, other])
    first, which = distinct_tiles(tiles, [(1, 1), (2, 1), (1, 1)])
    assert first.tolist() == [0, 2, 3, 4, 5, 6]  # the last pair differs: both are encoded
    assert which.tolist() == [0, 0, 1, 2, 3, 4, 5]
    rows = paddle.to_tensor(rng.standard_normal([7, 4, 5]).astype("float32"))
    rows[1] = rows[0]
    newline, separator = paddle.zeros([5]), paddle.ones([5])
    grids = [(1, 1), (2, 1), (1, 1)]
    expected = arranged(rows, np.arange(7), newline, separator, grids)
    assert np.array_equal(arranged(rows[first.tolist()], which, newline, separator, grids).numpy(), expected.numpy())


def test_wrong_number_of_tiles_is_refused():
    with pytest.raises(ValueError, match="3 tiles were given"):
        distinct_tiles(np.zeros([3, 3, 4, 4], np.uint8), [(2, 2)])


def test_a_learned_row_gets_the_sum_of_its_copies():
    """The row's gradient was added up in bfloat16, copy by copy: 0.6 % off for 56 copies, 1.1 % for 250."""
    grids, rng = [(3, 3)], np.random.default_rng(0)
    copies = 14 * 4  # of the newline
    gradient = rng.normal(1, 0.5, [211 + 196 * 9 + 14 * 3, 8]).astype("float32")
    gradient = paddle.to_tensor(gradient).astype("bfloat16")
    newline, separator = paddle.ones([8]), paddle.zeros([8])
    newline.stop_gradient = separator.stop_gradient = False
    projected = paddle.zeros([10, 196, 8], "bfloat16")
    projected.stop_gradient = False
    with half_precision_on_cpu():
        rows = arranged(projected, np.arange(10), newline, separator, grids)
        assert rows.dtype == paddle.bfloat16
        (rows * gradient).sum().backward()
    arrived = gradient.astype("float32").numpy()
    order = arrange_index(grids, 14)
    expected = arrived[order == 1960].astype("float64").sum(axis=0)
    assert (order == 1960).sum() == copies
    np.testing.assert_allclose(newline.grad.numpy(), expected, rtol=1e-6)
    assert np.array_equal(separator.grad.numpy(), arrived[order == 1961][0])
    back = np.empty([1960, 8], "float32")
    back[order[order < 1960]] = arrived[order < 1960]
    assert np.array_equal(projected.grad.astype("float32").numpy().reshape([1960, 8]), back)


@pytest.mark.parametrize("grids", [[(2, 1)], [(1, 1), (1, 2)]])
def test_rows_are_those_of_the_index(grids):
    tiles = sum(1 + w * h for w, h in grids)
    projected, newline, separator = paddle.randn([tiles, 4, 3]), paddle.randn([3]), paddle.randn([3])
    table = np.concatenate([projected.numpy().reshape([-1, 3]), [newline.numpy(), separator.numpy()]])
    rows = arranged(projected, np.arange(tiles), newline, separator, grids)
    assert np.array_equal(rows.numpy(), table[arrange_index(grids, 2)])


@pytest.mark.parametrize(("patches", "ratio"), [(9, 2), (16, 2), (25, 3)])
def test_squares_are_the_same_in_both_ways(patches, ratio, monkeypatch):
    """With zeros beyond the edge and without; of a tower that trains they keep their gradients."""
    features = paddle.randn([2, patches, 5])
    found = []
    for kernels in (True, False):
        monkeypatch.setattr("vl2.ways.takes_kernels", lambda place, kernels=kernels: kernels)
        found.append(_squares(features, ratio).numpy())
    assert np.array_equal(*found)
    features.stop_gradient = False
    _squares(features, ratio).sum().backward()
    assert (features.grad.numpy() == 1).all()
