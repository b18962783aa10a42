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
NF4_GROUP = 256  # scales of a range
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
_NF4_MIDDLES = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2  # from one value's neighbourhood to the next
_FINITE = np.finfo(np.float32).max
_FLOAT16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
# e^x is 2^n e^r; ln 2 in two parts, and a polynomial for |r| < 0.35. Source: Cephes, expf.
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ROUND = np.float32(1.5 * 2**23)  # adding and subtracting it leaves whole numbers
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_ONE = np.float32(1.0)


def kernel(function: Callable[..., Any], *, reorder: bool = False) -> Callable[..., Any]:
    """Compiles a function at its first call; where no folder can be written to, in every process again.

    Args:
        function: of numpy arrays and numbers.
        reorder: a sum may be taken in several lanes, whose number depends on the processor only.
    """
    fastmath = {"contract", "reassoc", "nsz"} if reorder else {"contract"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder for what it compiled
        return numba.njit(**options)(function)


def sum_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` of a sum in lanes."""
    return kernel(function, reorder=True)


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
def _from_nf4(codes: np.ndarray, scales: np.ndarray, ranges: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    size = out.size
    for block in range((size + NF4_BLOCK - 1) // NF4_BLOCK):
        group, first = block // NF4_GROUP, block * NF4_BLOCK
        scale = ranges[group, 0] + np.float32(scales[block]) * ranges[group, 1]
        for i in range(first // 2, min(first + NF4_BLOCK, size) // 2):
            out[2 * i] = values[codes[i] & 15] * scale
            out[2 * i + 1] = values[codes[i] >> 4] * scale
        if size % 2 and size < first + NF4_BLOCK:
            out[size - 1] = values[codes[size // 2] & 15] * scale


def from_nf4(codes: np.ndarray, scales: np.ndarray, ranges: np.ndarray, out: np.ndarray) -> None:
    """Numbers of a matrix from what `vl2.quantised.Nf4` keeps of it -> float32 [n]."""
    _from_nf4(codes, scales, ranges, NF4_VALUES, out)


@kernel
def largest_of_blocks(values: np.ndarray, out: np.ndarray) -> bool:
    """Largest magnitude of each block of 64: float32 [n] -> [n / 64 or more]; whether all numbers are finite."""
    finite = True
    for block in range(values.size // NF4_BLOCK):
        most = np.float32(0.0)
        for i in range(block * NF4_BLOCK, (block + 1) * NF4_BLOCK):
            size = abs(values[i])
            finite &= size <= _FINITE
            most = size if size > most else most
        out[block] = most
    return finite


@kernel
def _to_nf4(values: np.ndarray, inverses: np.ndarray, middles: np.ndarray, codes: np.ndarray) -> None:
    near = np.empty(NF4_BLOCK, np.int32)  # as wide as what is compared: twice as fast as bytes
    scaled = np.empty(NF4_BLOCK, np.float32)
    for block in range(values.size // NF4_BLOCK):
        start, inverse = block * NF4_BLOCK, inverses[block]
        for i in range(NF4_BLOCK):
            scaled[i] = values[start + i] * inverse
            near[i] = 0
        for k in range(middles.size):
            middle = middles[k]
            for i in range(NF4_BLOCK):
                near[i] += np.int32(scaled[i] > middle)
        for i in range(NF4_BLOCK // 2):
            codes[start // 2 + i] = np.uint8(near[2 * i] | (near[2 * i + 1] << 4))


def to_nf4(values: np.ndarray, inverses: np.ndarray, codes: np.ndarray) -> None:
    """Nearest of the sixteen values for each number: float32 [n], 1 / scale of each block -> uint8 [n / 2]."""
    _to_nf4(values, inverses, _NF4_MIDDLES, codes)


@kernel
def largest_of_columns(values: np.ndarray, out: np.ndarray) -> bool:
    """Largest magnitude of each column: float32 [I, O], zeros [O] -> [O]; whether all numbers are finite."""
    finite = True
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            size = abs(values[i, j])
            finite &= size <= _FINITE
            out[j] = size if size > out[j] else out[j]
    return finite


@kernel
def to_int8(values: np.ndarray, inverses: np.ndarray, codes: np.ndarray) -> None:
    """Nearest whole number of scales: float32 [I, O], 1 / scale of each column -> int8 [I, O]."""
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            codes[i, j] = np.int8(np.rint(values[i, j] * inverses[j]))


@kernel
def from_int8(codes: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    """Numbers from their codes [I, O] and each column's scale [O] -> float32 [I, O]."""
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = np.float32(codes[i, j]) * scales[j]


@kernel
def widen_transposed(bits: np.ndarray, out: np.ndarray) -> None:
    """Bits of bfloat16 [m, n] -> those of float32 [n, m], by squares: both sides are passed line by line."""
    rows, columns, side = *bits.shape, 16
    square = np.empty((side, side), np.uint32)
    for top in range(0, rows, side):
        height = min(side, rows - top)
        for left in range(0, columns, side):
            width = min(side, columns - left)
            for i in range(height):
                line = bits[top + i, left : left + width]
                for j in range(width):
                    square[j, i] = np.uint32(line[j]) << np.uint32(16)
            for j in range(width):
                line_out = out[left + j, top : top + height]
                for i in range(height):
                    line_out[i] = square[j, i]


@kernel
def _exp(x: np.float32) -> np.float32:
    """Within two units in the last place from -87 to 88, held there beyond; of no number it is no number."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _ONE) * power


@sum_kernel
def _sum(x: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i]
    return total


@sum_kernel
def _max(x: np.ndarray) -> np.float32:
    top = x[0]
    for i in range(x.size):
        top = x[i] if x[i] > top else top
    return top


@kernel
def softmax(scores: np.ndarray, queries: int, hidden: int) -> None:
    """Softmax of each row in its place, float32 [H * n, m]; a row sees fewer of the last keys the earlier its query is.

        3 queries of 4 keys, hidden 2      x x . .
                                           x x x .
                                           x x x x

    Args:
        scores: of H heads, in the order of the queries; zeros take the place of what is hidden.
        queries: n.
        hidden: keys that the first query does not see; 0: every query sees every key.
    """
    rows, keys = scores.shape
    for row in range(rows):
        seen = keys - max(hidden - row % queries, 0)
        values = scores[row, :seen]
        top = _max(values)
        for i in range(seen):
            values[i] = _exp(values[i] - top)
        factor = _ONE / _sum(values)
        for i in range(seen):
            values[i] *= factor
        scores[row, seen:] = 0


@kernel
def softmax_grad(weights: np.ndarray, grad: np.ndarray, mean: np.ndarray) -> None:
    """Gradient of the scores in the place of that of the weights [rows, m]: weights * (grad - mean), mean [rows]."""
    rows, keys = grad.shape
    for row in range(rows):
        for i in range(keys):
            grad[row, i] = weights[row, i] * (grad[row, i] - mean[row])


@kernel
def gated(gate: np.ndarray, up: np.ndarray, stride: int, weights: np.ndarray, out: np.ndarray) -> None:
    """SiLU of the gate times up times the row's weight, float32 [P, I].

    Args:
        gate: flat; row p begins at p * stride.
        up: likewise.
        stride: numbers from row to row.
        weights: [P].
        out: [P, I].
    """
    rows, inner = out.shape
    for row in range(rows):
        g, u = gate[row * stride : row * stride + inner], up[row * stride : row * stride + inner]
        for i in range(inner):
            out[row, i] = g[i] / (_ONE + _exp(-g[i])) * u[i] * weights[row]


@kernel
def gated_grad(
    gate: np.ndarray,
    up: np.ndarray,
    stride: int,
    weights: np.ndarray,
    grad: np.ndarray,
    grad_gate: np.ndarray,
    grad_up: np.ndarray,
    grad_weights: np.ndarray,
) -> None:
    """Gradients of what `gated` takes, from that of what it gives, [P, I]; they lie as what they are of."""
    rows, inner = grad.shape
    parts = np.empty(inner, np.float32)
    for row in range(rows):
        start, stop, weight, d = row * stride, row * stride + inner, weights[row], grad[row]
        g, u, to_gate, to_up = gate[start:stop], up[start:stop], grad_gate[start:stop], grad_up[start:stop]
        for i in range(inner):
            sigmoid = _ONE / (_ONE + _exp(-g[i]))
            silu = g[i] * sigmoid
            parts[i] = d[i] * silu * u[i]
            to_up[i] = d[i] * weight * silu
            to_gate[i] = d[i] * weight * u[i] * (sigmoid + silu * (_ONE - sigmoid))
        grad_weights[row] = _sum(parts)


@kernel
def sum_rows(x: np.ndarray, index: np.ndarray, each: int, out: np.ndarray) -> None:
    """Each row of `out` is the sum of so many rows of x that follow one another in the index, in their order."""
    rows, width = out.shape
    for row in range(rows):
        first = x[index[row * each]]
        for i in range(width):
            out[row, i] = first[i]
        for choice in range(1, each):
            further = x[index[row * each + choice]]
            for i in range(width):
                out[row, i] += further[i]


@kernel
def add_first(total: np.ndarray, part: np.ndarray) -> None:
    """Adds [H, s, K] to the first rows of [H, m, K]."""
    for head in range(part.shape[0]):
        for row in range(part.shape[1]):
            to, what = total[head, row], part[head, row]
            for i in range(part.shape[2]):
                to[i] += what[i]


@kernel
def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Rotates pairs (i, i + K/2) of [rows, K]; see `vl2.attention.rotate_half_split`."""
    rows, width = x.shape
    half = width // 2
    for row in range(rows):
        a, b, to_a, to_b = x[row, :half], x[row, half:], out[row, :half], out[row, half:]
        for i in range(half):
            to_a[i] = a[i] * cos[row, i] + b[i] * sin[row, i]
            to_b[i] = b[i] * cos[row, half + i] + a[i] * sin[row, half + i]


@kernel
def rotate_back(grad: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Gradient of what `rotate` takes, from that of what it gives."""
    rows, width = grad.shape
    half = width // 2
    for row in range(rows):
        a, b, to_a, to_b = grad[row, :half], grad[row, half:], out[row, :half], out[row, half:]
        for i in range(half):
            to_a[i] = a[i] * cos[row, i] + b[i] * sin[row, half + i]
            to_b[i] = b[i] * cos[row, half + i] + a[i] * sin[row, i]


@sum_kernel
def _dot(x: np.ndarray, y: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@kernel
def rms_norm(x: np.ndarray, weight: np.ndarray, eps: np.float32, scale: np.ndarray, out: np.ndarray) -> None:
    """Rows [T, D] over the root of their mean square, times a weight [D]; `scale` takes the factor of each row."""
    rows, width = x.shape
    for row in range(rows):
        scale[row] = _ONE / np.sqrt(_dot(x[row], x[row]) / np.float32(width) + eps)
        for i in range(width):
            out[row, i] = x[row, i] * scale[row] * weight[i]


@kernel
def rms_norm_grad(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad: np.ndarray, out: np.ndarray) -> None:
    """Gradient of the rows that `rms_norm` takes, from that of what it gives."""
    rows, width = x.shape
    inner = np.empty(width, np.float32)
    for row in range(rows):
        for i in range(width):
            inner[i] = grad[row, i] * weight[i]
        mean = _dot(inner, x[row]) * scale[row] / np.float32(width)
        for i in range(width):
            out[row, i] = (inner[i] - x[row, i] * scale[row] * mean) * scale[row]


@kernel
def swap(x: np.ndarray, factor: np.float32, out: np.ndarray) -> None:
    """Exchanges the first two axes, [A, B, K] -> [B, A, K], and multiplies by a factor."""
    for a in range(x.shape[0]):
        for b in range(x.shape[1]):
            row, to = x[a, b], out[b, a]
            for i in range(x.shape[2]):
                to[i] = row[i] * factor
