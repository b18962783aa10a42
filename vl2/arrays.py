"""Tensors on a CPU as numpy arrays and back, without a copy: for `vl2.cpu_kernels`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle
from paddle.utils import dlpack


def read(tensor: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor on a CPU, not to be written to; those of bfloat16 as their bits, uint16.

    The array is contiguous: of a tensor with other strides it is of a copy. It keeps the tensor's memory alive.
    """
    tensor = tensor.detach().contiguous()
    if tensor.dtype == paddle.bfloat16:
        return np.from_dlpack(tensor.view("int16")).view(np.uint16)
    return np.from_dlpack(tensor)


def empty(shape: Sequence[int]) -> np.ndarray:
    """Room for float32 numbers that begins at a whole line of the cache, as Paddle's does.

    Where a matrix begins decides how MKL splits its sums; numpy's arrays begin elsewhere from run to run.
    """
    size = math.prod(shape)
    room = np.empty(size + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + size].reshape(shape)


def tensor_of(array: np.ndarray) -> paddle.Tensor:
    """A tensor of an array's memory, which belongs to it from then on."""
    return dlpack.from_dlpack(array)
