"""The memory of tensors on a CPU as numpy arrays, without a copy: for compiled loops."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle.utils import dlpack

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
_LINE = 64  # bytes of a line of the cache: where a matrix begins decides how MKL splits its sums
# A DLManagedTensor: data, device, axes, type, shape, strides, offset, who manages it, and what lets go of it.
_MANAGED = struct.Struct("@PiiiBBHPPQPP")
_ON_CPU, _FLOAT32 = (1, 0), (2, 32, 1)
_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _Memory:
    """What numpy asks for the place and shape of an array, and what the array keeps alive."""

    __slots__ = ("_read_only", "_shape", "_tensor")

    def __init__(self, tensor: paddle.Tensor, shape: Sequence[int], *, read_only: bool):
        self._tensor, self._shape, self._read_only = tensor, tuple(shape), read_only

    @property
    def __array_interface__(self) -> dict[str, Any]:
        place, kind = (self._tensor.data_ptr(), self._read_only), _TYPES[self._tensor.dtype]
        return {"data": place, "shape": self._shape, "typestr": kind, "version": 3}


def read(tensor: paddle.Tensor) -> np.ndarray:
    """The numbers of a tensor on a CPU, not to be written to; those of bfloat16 as their bits, uint16.

    The array is contiguous: of a tensor with other strides it is of a copy. It keeps the tensor's memory alive.
    """
    tensor = tensor.detach().contiguous()
    if not tensor.size:
        return np.empty(tensor.shape, _TYPES[tensor.dtype])
    return np.asarray(_Memory(tensor, tensor.shape, read_only=True))


def read_strided(tensor: paddle.Tensor) -> tuple[np.ndarray, list[int]]:
    """The numbers of a tensor on a CPU from its first to its last in memory, and the steps of its axes but the last.

    Parts of a tensor have strides; a copy of them would be a pass over memory more. The last axis steps by one number.
    """
    tensor = tensor.detach()
    if not tensor.size or tensor.strides[-1] != 1:
        tensor = tensor.contiguous()
    size = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.strides, strict=True))
    if not tensor.size:
        return np.empty(0, _TYPES[tensor.dtype]), tensor.strides[:-1]
    return np.asarray(_Memory(tensor, [size], read_only=True)), tensor.strides[:-1]


def written(tensor: paddle.Tensor) -> np.ndarray:
    """The array that writes to a tensor's memory; the tensor is contiguous and nothing else's but the caller's."""
    if not tensor.size:
        return np.empty(tensor.shape, _TYPES[tensor.dtype])
    return np.asarray(_Memory(tensor, tensor.shape, read_only=False))


def empty(shape: Sequence[int]) -> tuple[paddle.Tensor, np.ndarray]:
    """Room for float32 numbers on the CPU: as a tensor, and as the array that fills it.

    It begins at a whole line of the cache, as Paddle's does, but leaves no hole where it ends: glibc never gives an
    aligned block to a request of the same size again, and a step's activations took 150 MB more.

    The block begins with its own description and is let go of by C's `free` alone. Paddle holds a lock while it lets go
    of such memory; an array's takes Python's lock as well, and two threads that do so, one of them in a backward, then
    wait for each other for ever.
    """
    size, axes = math.prod(shape), len(shape)
    if not size:
        tensor = paddle.empty(shape, "float32", device=_CPU)
        return tensor, written(tensor)
    start = -(-(_MANAGED.size + 8 * axes) // _LINE) * _LINE
    block = _libc.malloc(start + 4 * size + _LINE)
    if not block:
        raise MemoryError(f"no room for {4 * size} bytes")
    data = -(-(block + start) // _LINE) * _LINE
    shape_at = block + _MANAGED.size
    managed = _MANAGED.pack(data, *_ON_CPU, axes, *_FLOAT32, shape_at, 0, 0, block, _FREE)
    ctypes.memmove(block, managed + struct.pack(f"@{axes}q", *shape), _MANAGED.size + 8 * axes)
    tensor = dlpack.from_dlpack(_capsule(block, b"dltensor", None))
    return tensor, written(tensor)
