"""Loops that make stored weights the float32 numbers that a CPU computes with, and weights in few bits of them."""

from __future__ import annotations

import numpy as np

from vl2.compiled import kernel, row_kernel

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


@row_kernel
def widen_bfloat16(bits: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Bits of bfloat16 [n] -> bits of float32, uint32 [n]."""
    for i in range(start, stop):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@row_kernel
def _look_up(index: np.ndarray, table: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    for i in range(start, stop):
        out[i] = table[index[i]]


def widen_float16(bits: np.ndarray, out: np.ndarray) -> None:
    """Bits of float16 [n] -> float32 [n]."""
    _look_up(bits, _FLOAT16_VALUES, out)


@row_kernel
def _from_nf4(
    codes: np.ndarray,
    ranges: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
    scales: np.ndarray,
    start: int,
    stop: int,
) -> None:
    size = out.size
    for block in range(start, stop):
        group, first = block // NF4_GROUP, block * NF4_BLOCK
        scale = ranges[group, 0] + np.float32(scales[block]) * ranges[group, 1]
        for i in range(first // 2, min(first + NF4_BLOCK, size) // 2):
            out[2 * i] = values[codes[i] & 15] * scale
            out[2 * i + 1] = values[codes[i] >> 4] * scale
        if size % 2 and size < first + NF4_BLOCK:
            out[size - 1] = values[codes[size // 2] & 15] * scale


def from_nf4(codes: np.ndarray, scales: np.ndarray, ranges: np.ndarray, out: np.ndarray) -> None:
    """Numbers of a matrix from what `vl2.quantised.Nf4` keeps of it -> float32 [n]."""
    _from_nf4(codes, ranges, NF4_VALUES, out, scales[: -(-out.size // NF4_BLOCK)])


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


@row_kernel
def from_int8(codes: np.ndarray, scales: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Numbers from their codes [I, O] and each column's scale [O] -> float32 [I, O]."""
    for i in range(start, stop):
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
def _first_digits(x: np.float32) -> np.uint32:
    return np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)


@row_kernel
def to_bfloat16_parts(x: np.ndarray, parts: np.ndarray, start: int, stop: int) -> None:
    """Three bfloat16 numbers whose sum each number is, as their bits: float32 [n, k] -> uint16 [n, 3, k].

    Each takes the first eight binary digits of what is left, so that no digit is rounded away.
    """
    for row in range(start, stop):
        for i in range(x.shape[1]):
            first = _first_digits(x[row, i])
            left = x[row, i] - np.uint32(first).view(np.float32)
            second = _first_digits(left)
            third = _first_digits(left - np.uint32(second).view(np.float32))
            parts[row, 0, i] = np.uint16(first >> np.uint32(16))
            parts[row, 1, i] = np.uint16(second >> np.uint32(16))
            parts[row, 2, i] = np.uint16(third >> np.uint32(16))
