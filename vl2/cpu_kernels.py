"""Compiled loops over the numbers of a step: what Paddle's CPU kernels take several passes over memory for.

What a step calls often is shared out among threads, row by row (`row_kernel`). Sums go in one order, whatever their
number.
"""

from __future__ import annotations

import numpy as np

from vl2.compiled import kernel, row_kernel, sum_kernel

# e^x is 2^n e^r; ln 2 in two parts, and a polynomial for |r| < 0.35. Source: Cephes, expf.
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ROUND = np.float32(1.5 * 2**23)  # adding and subtracting it leaves whole numbers
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_ONE = np.float32(1.0)
_GELU_1, _GELU_3 = np.float32(2 * 0.7978845608028654), np.float32(2 * 0.7978845608028654 * 0.044715)  # 2 (2 / pi)^0.5
_LANES = 64  # of a maximum: compilers split sums into lanes, but no maximum of numbers that may be none


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


@kernel
def _max(x: np.ndarray) -> np.float32:
    """Greatest number; one that is none is passed over where it is not the first of all."""
    lanes = np.full(_LANES, x[0])
    whole = x.size - x.size % _LANES
    for start in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes[i] = x[start + i] if x[start + i] > lanes[i] else lanes[i]
    for i in range(x.size - whole):
        lanes[i] = x[whole + i] if x[whole + i] > lanes[i] else lanes[i]
    top = lanes[0]
    for i in range(_LANES):
        top = lanes[i] if lanes[i] > top else top
    return top


@row_kernel
def softmax(scores: np.ndarray, queries: int, hidden: int, notes: np.ndarray, start: int, stop: int) -> None:
    """Softmax of each row in its place, float32 [H * n, m]; a row sees fewer of the last keys the earlier its query is.

        3 queries of 4 keys, hidden 2      x x . .
                                           x x x .
                                           x x x x

    Args:
        scores: of H heads, in the order of the queries; zeros take the place of what is hidden.
        queries: n.
        hidden: keys that the first query does not see; 0: every query sees every key.
        notes: [H * n, 2] takes each row's greatest score and the factor of its exponentials, for `softmax_grad`.
    """
    keys = scores.shape[1]
    for row in range(start, stop):
        seen = keys - max(hidden - row % queries, 0)
        values = scores[row, :seen]
        top = _max(values)
        for i in range(seen):
            values[i] = _exp(values[i] - top)
        factor = _ONE / _sum(values)
        for i in range(seen):
            values[i] *= factor
        scores[row, seen:] = 0
        notes[row, 0], notes[row, 1] = top, factor


@row_kernel
def softmax_grad(
    scores: np.ndarray,
    grad: np.ndarray,
    queries: int,
    hidden: int,
    notes: np.ndarray,
    mean: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """The weights in the place of the scores, as `softmax` gave them, and the scores' gradient in that of the weights'.

    Args:
        scores: [H * n, m].
        grad: of the weights, [H * n, m]; becomes weights * (grad - mean).
        queries, hidden, notes: as of `softmax`.
        mean: [H * n].
    """
    keys = scores.shape[1]
    for row in range(start, stop):
        seen = keys - max(hidden - row % queries, 0)
        values, grads, top, factor, middle = (
            scores[row, :seen],
            grad[row, :seen],
            notes[row, 0],
            notes[row, 1],
            mean[row],
        )
        for i in range(seen):
            values[i] = _exp(values[i] - top) * factor
        for i in range(seen):
            grads[i] = values[i] * (grads[i] - middle)
        scores[row, seen:] = 0
        grad[row, seen:] = 0


@row_kernel
def gated(
    gate: np.ndarray, up: np.ndarray, stride: int, weights: np.ndarray, out: np.ndarray, start: int, stop: int
) -> None:
    """SiLU of the gate times up times the row's weight, float32 [P, I].

    Args:
        gate: flat; row p begins at p * stride.
        up: likewise.
        stride: numbers from row to row.
        weights: [P].
        out: [P, I].
    """
    inner = out.shape[1]
    for row in range(start, stop):
        g, u = gate[row * stride : row * stride + inner], up[row * stride : row * stride + inner]
        for i in range(inner):
            out[row, i] = g[i] / (_ONE + _exp(-g[i])) * u[i] * weights[row]


@row_kernel
def gated_grad(
    gate: np.ndarray,
    up: np.ndarray,
    stride: int,
    weights: np.ndarray,
    grad: np.ndarray,
    grad_gate: np.ndarray,
    grad_up: np.ndarray,
    again: np.ndarray,
    grad_weights: np.ndarray,
    start: int,
    stop: int,
) -> None:
    """Gradients of what `gated` takes, from that of what it gives, [P, I]; they lie as what they are of.

    `again` takes what `gated` gives [P, I], for whoever did not keep it; nothing, where it has no rows.
    """
    inner = grad.shape[1]
    parts, spare = np.empty(inner, np.float32), np.empty(inner, np.float32)
    for row in range(start, stop):
        here, end, weight, d = row * stride, row * stride + inner, weights[row], grad[row]
        g, u, to_gate, to_up = gate[here:end], up[here:end], grad_gate[here:end], grad_up[here:end]
        again_row = again[row] if again.size else spare
        for i in range(inner):
            sigmoid = _ONE / (_ONE + _exp(-g[i]))
            silu = g[i] * sigmoid
            parts[i] = d[i] * silu * u[i]
            to_up[i] = d[i] * weight * silu
            to_gate[i] = d[i] * weight * u[i] * (sigmoid + silu * (_ONE - sigmoid))
            again_row[i] = silu * u[i] * weight
        grad_weights[row] = _sum(parts)


@row_kernel
def gelu(x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """GELU in its tanh form, which is x times a sigmoid: float32 [N, I]."""
    for row in range(start, stop):
        for i in range(out.shape[1]):
            u = x[row, i] * (_GELU_1 + _GELU_3 * x[row, i] * x[row, i])
            out[row, i] = x[row, i] / (_ONE + _exp(-u))


@row_kernel
def fill_rows(numbers: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """The same numbers [O] in every row of [N, O]."""
    for row in range(start, stop):
        for i in range(out.shape[1]):
            out[row, i] = numbers[i]


@row_kernel
def take_rows(x: np.ndarray, index: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Rows of x [N, D] in the order of the index [n] -> [n, D]."""
    for row in range(start, stop):
        source = x[index[row]]
        for i in range(source.size):
            out[row, i] = source[i]


@row_kernel
def add_rows(x: np.ndarray, index: np.ndarray, total: np.ndarray, start: int, stop: int) -> None:
    """Adds each row of x [n, D] to the row of the total [N, D] that the index [n] names, in the order of x."""
    for row in range(index.size):
        place = index[row]
        if start <= place < stop:
            source, to = x[row], total[place]
            for i in range(source.size):
                to[i] += source[i]


@row_kernel
def sum_rows(x: np.ndarray, index: np.ndarray, each: int, out: np.ndarray, start: int, stop: int) -> None:
    """Each row of `out` is the sum of so many rows of x that follow one another in the index, in their order."""
    width = out.shape[1]
    for row in range(start, stop):
        first = x[index[row * each]]
        for i in range(width):
            out[row, i] = first[i]
        for choice in range(1, each):
            further = x[index[row * each + choice]]
            for i in range(width):
                out[row, i] += further[i]


@row_kernel
def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Rotates pairs (i, i + K/2) of [rows, K]; see `vl2.rotation.rotate_half_split`."""
    half = out.shape[1] // 2
    for row in range(start, stop):
        a, b, to_a, to_b = x[row, :half], x[row, half:], out[row, :half], out[row, half:]
        for i in range(half):
            to_a[i] = a[i] * cos[row, i] + b[i] * sin[row, i]
            to_b[i] = b[i] * cos[row, half + i] + a[i] * sin[row, half + i]


@row_kernel
def rotate_back(grad: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Gradient of what `rotate` takes, from that of what it gives."""
    half = out.shape[1] // 2
    for row in range(start, stop):
        a, b, to_a, to_b = grad[row, :half], grad[row, half:], out[row, :half], out[row, half:]
        for i in range(half):
            to_a[i] = a[i] * cos[row, i] + b[i] * sin[row, half + i]
            to_b[i] = b[i] * cos[row, half + i] + a[i] * sin[row, i]


@kernel
def _mixed(number: np.uint32) -> np.uint32:
    """Bits at random of a number, all of which depend on all of its own. Source: Wellons, lowbias32."""
    number = np.uint32(np.uint32(number ^ (number >> np.uint32(16))) * np.uint32(0x7FEB352D))
    number = np.uint32(np.uint32(number ^ (number >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(number ^ (number >> np.uint32(16)))


@row_kernel
def drop(
    x: np.ndarray, seed: np.uint32, least: np.uint32, factor: np.float32, out: np.ndarray, start: int, stop: int
) -> None:
    """Zeros in the place of some numbers of x [n, D], and the others times a factor; the same ones for the same seed.

    Args:
        x: rows.
        seed: with a number's place it decides whether it stays.
        least: a number stays where what they are mixed to is not less.
        factor: of what stays.
        out: [n, D].
    """
    width = out.shape[1]
    for row in range(start, stop):
        first = _mixed(np.uint32(np.uint32(row) + seed))
        for i in range(width):
            stays = _mixed(np.uint32(first + np.uint32(i))) >= least
            out[row, i] = x[row, i] * factor if stays else np.float32(0.0)


@row_kernel
def add_dropped(
    x: np.ndarray, seed: np.uint32, least: np.uint32, factor: np.float32, total: np.ndarray, start: int, stop: int
) -> None:
    """Adds to the total what `drop` makes of x."""
    width = total.shape[1]
    for row in range(start, stop):
        first = _mixed(np.uint32(np.uint32(row) + seed))
        for i in range(width):
            if _mixed(np.uint32(first + np.uint32(i))) >= least:
                total[row, i] += x[row, i] * factor


@sum_kernel
def _dot(x: np.ndarray, y: np.ndarray) -> np.float32:
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@row_kernel
def dots(x: np.ndarray, y: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
    """Products of the rows of x and y, each [H, T, V], with one another -> [H, T]."""
    for head in range(start, stop):
        for row in range(out.shape[1]):
            out[head, row] = _dot(x[head, row], y[head, row])


@row_kernel
def rms_norm(
    x: np.ndarray, weight: np.ndarray, eps: np.float32, scale: np.ndarray, out: np.ndarray, start: int, stop: int
) -> None:
    """Rows [T, D] over the root of their mean square, times a weight [D]; `scale` takes the factor of each row."""
    width = x.shape[1]
    for row in range(start, stop):
        scale[row] = _ONE / np.sqrt(_dot(x[row], x[row]) / np.float32(width) + eps)
        for i in range(width):
            out[row, i] = x[row, i] * scale[row] * weight[i]


@row_kernel
def rms_norm_grad(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad: np.ndarray, out: np.ndarray, start: int, stop: int
) -> None:
    """Gradient of the rows that `rms_norm` takes, from that of what it gives."""
    width = x.shape[1]
    inner = np.empty(width, np.float32)
    for row in range(start, stop):
        for i in range(width):
            inner[i] = grad[row, i] * weight[i]
        mean = _dot(inner, x[row]) * scale[row] / np.float32(width)
        for i in range(width):
            out[row, i] = (inner[i] - x[row, i] * scale[row] * mean) * scale[row]


@row_kernel
def swap(x: np.ndarray, row: int, head: int, factor: np.float32, out: np.ndarray, start: int, stop: int) -> None:
    """Exchanges the first two axes, [A, B, K] -> [B, A, K], and multiplies by a factor.

    Args:
        x: flat from its first number on; [a, b, 0] is at a * row + b * head, and the K follow.
        row: numbers from one a to the next.
        head: numbers from one b to the next.
        factor: of all numbers.
        out: [B, A, K].
    """
    for b in range(start, stop):
        for a in range(out.shape[1]):
            first, to = a * row + b * head, out[b, a]
            source = x[first : first + to.size]
            for i in range(to.size):
                to[i] = source[i] * factor


@row_kernel
def patches(tile: np.ndarray, side: int, out: np.ndarray, start: int, stop: int) -> None:
    """Rows of square patches, channel by channel, of a tile uint8 [3, X, X]; pixel = (u8 / 255 - 0.5) / 0.5.

    Args:
        tile: beyond the last whole patch it is dropped.
        side: pixels of a patch.
        out: [patches of a side, patches of a side, 3 * side * side].
    """
    half = np.float32(0.5)
    for y in range(start, stop):
        for x in range(out.shape[1]):
            to = out[y, x]
            for channel in range(3):
                for i in range(side):
                    line = tile[channel, y * side + i, x * side : (x + 1) * side]
                    first = (channel * side + i) * side
                    for j in range(side):
                        to[first + j] = (np.float32(line[j]) / np.float32(255.0) - half) / half


@row_kernel
def squares(features: np.ndarray, ratio: int, out: np.ndarray, start: int, stop: int) -> None:
    """Squares of neighbours as rows, zeros beyond the edge, each channel's numbers together.

    Args:
        features: [P, P, W].
        ratio: neighbours along a side of a square.
        out: [R, R, W * ratio * ratio].
    """
    side, width = features.shape[0], features.shape[2]
    for y in range(start, stop):
        for x in range(out.shape[1]):
            to = out[y, x]
            for corner in range(ratio * ratio):
                above, left = ratio * y + corner // ratio, ratio * x + corner % ratio
                inside = above < side and left < side
                source = features[min(above, side - 1), min(left, side - 1)]
                for channel in range(width):
                    to[channel * ratio * ratio + corner] = source[channel] if inside else np.float32(0.0)
