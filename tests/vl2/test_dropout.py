"""Dropout by place: what stays, how much, and the same in backward."""

import numpy as np
import paddle
import pytest

from vl2.dropout import Dropout


@pytest.mark.parametrize("part", [0.05, 0.5])
def test_what_stays_grows_and_has_the_gradient(part):
    paddle.seed(3)
    x = paddle.rand([300, 200]) + 0.5
    x.stop_gradient = False
    y = Dropout(part)(x)
    y.sum().backward()
    stays = y.numpy() != 0
    assert abs(stays.mean() - (1 - part)) < 0.01
    np.testing.assert_allclose(y.numpy(), np.where(stays, x.numpy() / (1 - part), 0), rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), np.where(stays, 1 / (1 - part), 0), rtol=1e-6)
    again = (Dropout(part)(x).numpy() != 0) & stays
    assert abs(again.mean() - (1 - part) ** 2) < 0.02  # the next draw does not know of this one
    for axis in (0, 1):
        assert abs(stays.mean(axis=axis) - (1 - part)).max() < 6 * (part * (1 - part) / stays.shape[axis]) ** 0.5


def test_nothing_is_dropped_where_nothing_is_asked_for():
    x, dropout = paddle.rand([3, 4]), Dropout(0.5)
    dropout.eval()
    assert np.array_equal(dropout(x).numpy(), x.numpy()) and np.array_equal(Dropout(0.0)(x).numpy(), x.numpy())


def test_a_seed_decides():
    found = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        found.append(Dropout(0.3)(paddle.ones([50, 50])).numpy())
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
