"""Products with bfloat16 weights as they are stored, to float32's rounding, on a CPU that multiplies bfloat16 (AMX).

A float32 number is the sum of three bfloat16 numbers: its first eight binary digits, the next eight and the last eight.
A product of bfloat16 numbers is exact in float32, where all are added up; so three products take the place of one, and
no float32 copy of the weight is made. They are oneDNN's, from the library that Paddle comes with.

On two cores that multiply bfloat16 at 4 to 5 times the rate of float32, the three took 0.4 to 0.6 of the time of the
copy and its product, and a tenth of it for one row. The largest error was 1.1 to 1.5 times that of MKL's float32
product in sums of up to 1,280 numbers, and 2.7 times in those of 4,304.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from vl2 import weight_kernels
from vl2.scratch import scratch

_PARTS = 3
_AMX = 0xFEF  # oneDNN's number of avx512_core_amx; later instruction sets have all of its bits
_FEW = 16  # rows whose parts are multiplied together: the weight is read once
_size, _address, _float, _char = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_char


@cache
def _product() -> Any:
    """The product of bfloat16 matrices into float32; None where oneDNN has none, or no AMX for it."""
    folder = Path(paddle.__file__).parent / "libs"
    try:
        library = ctypes.CDLL(str(folder / "libdnnl.so.3"))
        product, instructions = library.dnnl_gemm_bf16bf16f32, library.dnnl_get_effective_cpu_isa()
    except (OSError, AttributeError):
        return None
    product.restype = ctypes.c_int
    product.argtypes = [_char] * 2 + [_size] * 3 + [_float, _address, _size, _address, _size, _float, _address, _size]
    return product if instructions & _AMX == _AMX else None


def takes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    return _product() is not None


def multiply_bfloat16(
    x: np.ndarray, bits: np.ndarray, out: np.ndarray, *, transpose: bool = False, add: bool = False
) -> None:
    """Writes x @ w.

    Args:
        x: [n, k], float32; an infinite number is none in the result.
        bits: of w, uint16 [k, m]; its last axis steps by one number, as those of the others.
        out: [n, m], float32.
        transpose: w is [m, k].
        add: to what `out` holds.

    Raises:
        RuntimeError: oneDNN cannot.
    """
    (n, k), m = x.shape, out.shape[1]
    if not out.size:
        return
    parts = scratch("parts", -(-n * _PARTS * k // 2)).view(np.uint16)[: n * _PARTS * k].reshape(n, _PARTS, k)
    weight_kernels.to_bfloat16_parts(x, parts)
    if n <= _FEW:
        each = scratch("of_parts", n * _PARTS, m)
        _multiply(parts.reshape(-1, k), bits, each, transpose, add=False)
        total = each.reshape(n, _PARTS, m).sum(axis=1)
        out[...] = out + total if add else total
        return
    for part in reversed(range(_PARTS)):  # the smallest numbers first
        _multiply(parts[:, part], bits, out, transpose, add=add or part < _PARTS - 1)


def _multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray, transpose: bool, *, add: bool) -> None:
    (n, k), m, beta = a.shape, out.shape[1], 1.0 if add else 0.0
    sides = [(x.ctypes.data, x.strides[0] // x.itemsize) for x in (a, b, out)]
    status = _product()(b"N", b"T" if transpose else b"N", n, m, k, 1.0, *sides[0], *sides[1], beta, *sides[2])
    if status:
        raise RuntimeError(f"oneDNN's product of [{n}, {k}] and [{k}, {m}] ended with status {status}")
