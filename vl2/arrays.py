"""The memory of tensors on a CPU as numpy arrays, without a copy: for compiled loops.

Paddle has the memory, always. To let go of a tensor that was made of an array's memory (DLPack), it takes Python's lock
while it holds one of its own: two threads that do so, one of them in a backward, wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

_CPU = paddle.CPUPlace()
_TYPES = {
    paddle.float32: "<f4",
    paddle.float16: "<f2",
    paddle.bfloat16: "<u2",
    paddle.int64: "<i8",
    paddle.int32: "<i4",
    paddle.int8: "|i1",
    paddle.uint8: "|u1",
}


class _Memory:
    """What numpy asks for the place and shape of an array, and what the array keeps alive."""

    __slots__ = ("_read_only", "_tensor")

    def __init__(self, tensor: paddle.Tensor, *, read_only: bool):
        self._tensor, self._read_only = tensor, read_only

    @property
    def __array_interface__(self) -> dict[str, Any]:
        tensor = self._tensor
        place = tensor.data_ptr(), self._read_only
        return {"data": place, "shape": tuple(tensor.shape), "typestr": _TYPES[tensor.dtype], "version": 3}


def read(tensor: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor on a CPU, not to be written to; those of bfloat16 as their bits, uint16.

    The array is contiguous: of a tensor with other strides it is of a copy. It keeps the tensor's memory alive.
    """
    tensor = tensor.detach().contiguous()
    if not tensor.size:
        return np.empty(tensor.shape, _TYPES[tensor.dtype])
    return np.asarray(_Memory(tensor, read_only=True))


def written(tensor: paddle.Tensor) -> np.ndarray:
    """The array that writes to a tensor's memory; the tensor is contiguous and nothing else's but the caller's."""
    if not tensor.size:
        return np.empty(tensor.shape, _TYPES[tensor.dtype])
    return np.asarray(_Memory(tensor, read_only=False))


def empty(shape: Sequence[int]) -> tuple[paddle.Tensor, np.ndarray]:
    """Room for float32 numbers on the CPU: as a tensor, and as the array that fills it."""
    tensor = paddle.empty(shape, "float32", device=_CPU)
    return tensor, written(tensor)
