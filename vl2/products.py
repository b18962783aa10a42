"""Matrix products of arrays where they lie: parts of larger ones, without a copy, and added to what is there.

They are MKL's, from the library that Paddle's own products are in; `paddle.matmul` copies what is not contiguous, and
adds by a pass over memory. Where Paddle comes without MKL they are numpy's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle

_ROWS, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of CBLAS
_FEW = 32  # columns of a result that is made lying on its side
_int, _float, _address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p


def _library() -> ctypes.CDLL | None:
    """Paddle's MKL."""
    path = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    try:
        mkl = ctypes.CDLL(str(path))
        one, some = mkl.cblas_sgemm, mkl.cblas_sgemm_batch
    except (OSError, AttributeError):
        return None
    one.restype = some.restype = None
    one.argtypes = [_int] * 6 + [_float, _address, _int, _address, _int, _float, _address, _int]
    some.argtypes = [_int] + [_address] * 13 + [_int, _address]
    return mkl


_MKL = _library()


def multiply(
    a: np.ndarray,
    b: np.ndarray,
    out: np.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    factor: float = 1.0,
    add: bool = False,
) -> None:
    """Writes factor * a @ b, of float32 matrices or of as many matrices each.

    Args:
        a: [n, k] or [H, n, k]; its last axis steps by one number, as those of the others.
        b: [k, m] or [H, k, m].
        out: [n, m] or [H, n, m]; not where a or b are.
        transpose_a: a is [k, n] or [H, k, n].
        transpose_b: b is [m, k] or [H, m, k].
        factor: of the products.
        add: to what `out` holds.
    """
    if not out.size:
        return
    if not a.size:
        if not add:
            out[...] = 0
        return
    (_multiply_mkl if _MKL else _multiply_numpy)(a, b, out, transpose_a, transpose_b, factor, add)


def _multiply_numpy(
    a: np.ndarray, b: np.ndarray, out: np.ndarray, transpose_a: bool, transpose_b: bool, factor: float, add: bool
) -> None:
    a, b = (np.swapaxes(x, -1, -2) if swapped else x for x, swapped in ((a, transpose_a), (b, transpose_b)))
    product = np.matmul(a, b) * np.float32(factor)
    out[...] = out + product if add else product


def _multiply_mkl(
    a: np.ndarray, b: np.ndarray, out: np.ndarray, transpose_a: bool, transpose_b: bool, factor: float, add: bool
) -> None:
    assert _MKL
    if transpose_a and out.ndim == 2 and out.shape[1] <= _FEW < out.shape[0] and not add:
        turned = np.empty(out.shape[::-1], np.float32)  # of few rows MKL takes half as long as of few columns
        _multiply_mkl(b, a, turned, not transpose_b, False, factor, False)
        out[...] = turned.T
        return
    of_a, of_b = (_TRANSPOSED if transposed else _AS_IT_IS for transposed in (transpose_a, transpose_b))
    (n, m), k = out.shape[-2:], a.shape[-2 if transpose_a else -1]
    beta = 1.0 if add else 0.0
    if out.ndim == 2 or len(out) == 1:
        sides = (_place(x) for x in (a, b, out))
        (a_at, a_step), (b_at, b_step), (out_at, out_step) = sides
        _MKL.cblas_sgemm(
            *(_ROWS, of_a, of_b, n, m, k, factor, a_at, a_step, b_at, b_step, beta, out_at, out_step),
        )
        return
    # All of them are of one kind: one group, whose arguments MKL takes by address.
    places = [x.ctypes.data + x.strides[0] * np.arange(len(out)) for x in (a, b, out)]
    a_at, b_at, out_at = (each.ctypes.data for each in places)
    steps = [_one(_int, x.strides[1] // x.itemsize) for x in (a, b, out)]
    sizes = (_one(_int, number) for number in (of_a, of_b, n, m, k))
    _MKL.cblas_sgemm_batch(
        *(_ROWS, *sizes, _one(_float, factor), a_at, steps[0], b_at, steps[1], _one(_float, beta), out_at, steps[2]),
        *(1, _one(_int, len(out))),
    )


def _place(x: np.ndarray) -> tuple[int, int]:
    """Where a matrix begins, and the numbers from row to row."""
    return x.ctypes.data, x.strides[-2] // x.itemsize


def _one(kind: Callable[..., ctypes._SimpleCData], number: float) -> object:
    return ctypes.byref(kind(number))
