"""Arrangement of image rows, and that equal tiles are encoded once without changing a number."""

import numpy as np
import paddle
import pytest

from vl2.projector import arrange, arrange_index, distinct_tiles


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
    expected = arrange(rows, np.arange(7), newline, separator, grids)
    assert np.array_equal(arrange(rows[first.tolist()], which, newline, separator, grids).numpy(), expected.numpy())


def test_wrong_number_of_tiles_is_refused():
    with pytest.raises(ValueError, match="3 tiles were given"):
        distinct_tiles(np.zeros([3, 3, 4, 4], np.uint8), [(2, 2)])
