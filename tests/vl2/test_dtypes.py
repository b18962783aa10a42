"""The one table of number types, against what Paddle, safetensors and the settings call them."""

import numpy as np
import paddle
import pytest

from train.config.schema import PRECISIONS
from vl2.dtypes import (
    DTYPE_OF_NUMPY,
    DTYPE_OF_SAFETENSORS,
    DTYPE_OF_SETTING,
    WEIGHT_DTYPES,
    bits_type,
    item_bytes,
    safetensors_name,
)


def test_every_precision_that_a_run_may_have_is_a_type():
    assert set(PRECISIONS) == set(DTYPE_OF_SETTING)
    assert set(DTYPE_OF_SETTING.values()) == set(WEIGHT_DTYPES)


@pytest.mark.parametrize("dtype", DTYPE_OF_SAFETENSORS.values())
def test_bits_are_those_of_paddle(dtype):
    """A tensor of each type comes back as numpy's type of the table, under the code that a .pdparams has."""
    found = paddle.zeros([1], dtype).numpy().dtype
    assert found == np.dtype(bits_type(dtype)) and found.itemsize == item_bytes(dtype)
    assert DTYPE_OF_NUMPY[found.str[1:]] == dtype
    assert DTYPE_OF_SAFETENSORS[safetensors_name(dtype)] == dtype
