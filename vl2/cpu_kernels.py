"""Loops over numpy arrays, compiled for this CPU: what Paddle's CPU kernels take several passes over memory for.

They run on one core each and without threads of their own: most are bound by memory, which one core nearly fills, and
a second pool beside that of the matrix products would wait for it, need a lock, and not survive a fork. Sums go in one
order, whatever the number of threads. They are compiled at their first call and kept on disk (NUMBA_CACHE_DIR).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

NF4_BLOCK = 64  # values of a scale
# The values of the sixteen codes: quantiles of a normal distribution, scaled to [-1, 1]. Source: arXiv 2305.14314, E.
NF4_VALUES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FLOAT16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call; where no folder can be written to, in every process again."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder for what it compiled
        return numba.njit(**options)(function)


@kernel
def widen_bfloat16(bits: np.ndarray, out: np.ndarray) -> None:
    """Bits of bfloat16 [n] -> bits of float32, uint32 [n]."""
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@kernel
def _look_up(index: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    for i in range(index.size):
        out[i] = table[index[i]]


def widen_float16(bits: np.ndarray, out: np.ndarray) -> None:
    """Bits of float16 [n] -> float32 [n]."""
    _look_up(bits, _FLOAT16_VALUES, out)


@kernel
def _nf4(codes: np.ndarray, scales: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    half = NF4_BLOCK // 2
    for block in range(scales.size):
        scale = scales[block]
        for i in range(block * half, (block + 1) * half):
            out[2 * i] = values[codes[i] & 15] * scale
            out[2 * i + 1] = values[codes[i] >> 4] * scale


def nf4(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Packed codes uint8 [n / 2] and scales float32 [n / 64] -> float32 [n]; see `vl2.casts.from_nf4`."""
    _nf4(codes, scales, NF4_VALUES, out)
