"""Projector and image arrangement: patch features of the tiles to the image's rows in the token stream.

Shape suffixes: N tiles, P patches (729), W vision width, D model, G projected rows of a tile (14 x 14 = 196).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read
from vl2.config import ProjectorConfig
from vl2.errors import UserError
from vl2.linear import Linear


class Projector(nn.Layer):
    """27 x 27 patches -> zero-padded 28 x 28 -> 2 x 2 unfolded -> MLP -> 14 x 14 (`layers` 0 and 2)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.ratio = config.downsample_ratio
        inner = config.n_embed * config.mlp_ratio
        self.layers = nn.LayerList(
            [Linear(config.input_dim * self.ratio**2, inner), nn.GELU(), Linear(inner, config.n_embed)]
        )

    def forward(self, features_NPW: paddle.Tensor) -> paddle.Tensor:
        """[N, P, W] -> [N, G, D]. An unfolded row holds channel c of the 2 x 2 patches at 4c .. 4c + 3."""
        return self.layers[2](F.gelu(self.layers[0](_squares(features_NPW, self.ratio))))


def _squares(features_NPW: paddle.Tensor, r: int) -> paddle.Tensor:
    """Squares of r x r patches as rows, [N, G, W * r * r]."""
    n, p, w = features_NPW.shape
    side = int(p**0.5)
    pad = -side % r
    rows = (side + pad) // r
    if ways.takes_float32_kernels(features_NPW) and features_NPW.stop_gradient:
        made, out = empty([n, rows, rows, w * r * r])
        for features, to in zip(read(features_NPW).reshape(n, side, side, w), out, strict=True):
            cpu_kernels.squares(features, r, to)
        return made.reshape([n, rows * rows, w * r * r])
    x = features_NPW.reshape([n, side, side, w])
    if pad:
        x = F.pad(x, [0, pad, 0, pad], data_format="NHWC")
    return x.reshape([n, rows, r, rows, r, w]).transpose([0, 1, 3, 5, 2, 4]).reshape([n, rows * rows, w * r * r])


def distinct_tiles(tiles_N3XX: np.ndarray | None, grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles need encoding: the local tile of a 1 x 1 grid is its global view again.

        grids (1, 1), (2, 1): tiles a a | b c d  ->  first 0 2 3 4, which 0 0 1 2 3

    Args:
        tiles_N3XX: uint8 tiles of all images, each image's global view first; None: cut as `vl2.tiles.cut_tiles` does.
        grids: (width, height) in tiles of each image.

    Returns:
        (first: positions of the distinct tiles, which: for each of the N tiles its place among them).
    """
    first, which, tile = [], [], 0
    for w, h in grids:
        for i in range(tile, tile + 1 + w * h):
            equal = tiles_N3XX is None or np.array_equal(tiles_N3XX[i], tiles_N3XX[tile]) if (w, h) == (1, 1) else False
            if i == tile or not equal:
                first.append(i)
            which.append(len(first) - 1)
        tile += 1 + w * h
    if tiles_N3XX is not None and tile != len(tiles_N3XX):
        raise UserError(f"{len(tiles_N3XX)} tiles were given, but the grids {[tuple(g) for g in grids]} need {tile}")
    return np.array(first), np.array(which)


def arrange_index(grids: Sequence[tuple[int, int]], rows: int) -> np.ndarray:
    """Order in which the rows of a [projected rows | newline | separator] table enter the stream.

    With 2 rows a tile instead of 14, one image of 2 x 1 tiles (0 global, 1 and 2 local), N newline, S separator:

        0a 0b N        global view, each row ends with a newline
        0c 0d N
        S
        1a 1b 2a 2b N  local rows run across the tiles
        1c 1d 2c 2d N

    Args:
        grids: (width, height) in tiles of each image.
        rows: projected rows along a side of a tile (14).

    Returns:
        int64 indices into a table of N * rows² projected rows, then newline, then separator.
    """
    tiles = sum(1 + w * h for w, h in grids)
    newline, separator = tiles * rows * rows, tiles * rows * rows + 1
    parts, tile = [], 0
    square = np.arange(rows * rows).reshape(rows, rows)
    for w, h in grids:
        view = square + tile * rows * rows
        parts.append(np.pad(view, ((0, 0), (0, 1)), constant_values=newline).ravel())
        parts.append(np.array([separator]))
        first = (tile + 1 + np.arange(h * w).reshape(h, w)) * rows * rows
        local = (first[:, None, :, None] + square[None, :, None, :]).reshape(h * rows, w * rows)
        parts.append(np.pad(local, ((0, 0), (0, 1)), constant_values=newline).ravel())
        tile += 1 + w * h
    return np.concatenate(parts).astype(np.int64)


class Arrangement(NamedTuple):
    """How projected tiles and copies of the two learned rows become the rows of all images."""

    order_R: np.ndarray  # int64, of each row of the stream its place in [projected rows | newlines | separators]
    newlines: int
    separators: int


def plan_rows(which: np.ndarray, grids: Sequence[tuple[int, int]], side: int) -> Arrangement:
    """Plan the rows of all images.

    Args:
        which: for every tile of every image, each image's global view first, its place among the projected ones.
        grids: (width, height) in tiles of each image.
        side: projected rows along a side of a tile (14).
    """
    rows, size = side * side, (int(which.max()) + 1) * side * side
    table = np.concatenate([(which[:, None] * rows + np.arange(rows)).ravel(), [size, size + 1]])
    order_R = table[arrange_index(grids, side)]
    newlines, separators = np.flatnonzero(order_R == size), np.flatnonzero(order_R == size + 1)
    order_R[newlines] = size + np.arange(newlines.size)
    order_R[separators] = size + newlines.size + np.arange(separators.size)
    return Arrangement(order_R, newlines.size, separators.size)


def arrange(
    projected_NGD: paddle.Tensor,
    newline_D: paddle.Tensor,
    separator_D: paddle.Tensor,
    plan: Arrangement,
    order_R: paddle.Tensor,
) -> paddle.Tensor:
    """Rows of all images in stream order.

    A learned row is copied before it is rounded: the gradients of the copies, some 250 a pack, add up in the row's own
    precision and in a fixed order. Gather's backward would add them into one bfloat16 row, 1 % off in emulation.

    Args:
        projected_NGD: projected distinct tiles.
        newline_D: the learned row end.
        separator_D: the learned separator of global and local view.
        plan: from `plan_rows`.
        order_R: its order, on the device.

    Returns:
        [sum of image tokens, D].
    """
    n, g, d = projected_NGD.shape
    table = [projected_NGD.reshape([n * g, d])]
    for learned_D, copies in ((newline_D, plan.newlines), (separator_D, plan.separators)):
        table.append(learned_D.expand([copies, d]).astype(projected_NGD.dtype))
    return paddle.gather(paddle.concat(table, axis=0), order_R)
