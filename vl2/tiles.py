"""How DeepSeek-VL2 cuts an image into tiles of 384 × 384 pixels, and how many tokens the tiles become.

Knows pixels and counts only: no tokenizer, no model. The same functions serve measuring, training and inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from vl2.errors import UserError

TILE_SIZE = 384  # pixels
TOKENS_PER_SIDE = 14  # 384 px / 14 px a patch = 27 patches, padded to 28, two by two merged by the projector
MAX_CROPPED_IMAGES = 2  # a conversation with more images shows each as one local tile
PAD_COLOUR = (127, 127, 127)  # int(0.5 * 255): the image mean of the official processor

Resolution = tuple[int, int]
"""(width, height) in pixels."""
Grid = tuple[int, int]
"""(columns, rows) of local tiles."""


def select_best_resolution(size: tuple[int, int], candidates: Sequence[Resolution]) -> Resolution:
    """Choose the resolution that keeps the most pixels of an image, then wastes the fewest, then comes first.

    Args:
        size: (width, height) of the image, pixels.
        candidates: resolutions to choose from, (width, height) in pixels.

    Returns:
        One of the candidates.

    Source: `select_best_resolution`, deepseek_vl2/models/processing_deepseek_vl_v2.py.
    """
    if not candidates:
        raise UserError("candidate_resolutions is empty: expected at least one (width, height) pair")
    width, height = size
    best = candidates[0]
    most_effective, least_wasted = -1, -1
    for candidate in candidates:
        # The float arithmetic is the official one: int() may round an exact fit down by a pixel.
        scale = min(candidate[0] / width, candidate[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = candidate[0] * candidate[1] - effective
        if effective > most_effective or (effective == most_effective and wasted < least_wasted):
            best, most_effective, least_wasted = candidate, effective, wasted
    return best[0], best[1]


def limit_candidates(candidates: Sequence[Resolution], max_tiles: int) -> tuple[Resolution, ...]:
    """Keep the candidate resolutions of at most `max_tiles` local tiles (the global view is not counted).

    Raises:
        UserError: if `max_tiles` leaves none.
    """
    kept = tuple((w, h) for w, h in candidates if (w // TILE_SIZE) * (h // TILE_SIZE) <= max_tiles)
    if not kept:
        raise UserError(f"data.max_tiles={max_tiles} leaves no resolution: expected a number from 1 to 9")
    return kept


def tile_grid(size: tuple[int, int], num_images: int, candidates: Sequence[Resolution]) -> Grid:
    """Count the columns and rows of local tiles an image is cut into.

    Args:
        size: (width, height) of the image, pixels.
        num_images: images in the WHOLE conversation; with more than two, none is cropped.
        candidates: resolutions to choose from.

    Example: a 1920 × 1080 picture alone is shown at 1536 × 768, so (4, 2); as one of three pictures, (1, 1).
    """
    if num_images > MAX_CROPPED_IMAGES:
        return 1, 1
    width, height = select_best_resolution(size, candidates)
    return width // TILE_SIZE, height // TILE_SIZE


def num_image_tokens(grid: Grid) -> int:
    """Count the tokens of one image: global view, separator, local view, each row of a view with its newline.

    Example: grid (2, 1) has 14·(14+1) + 1 + 14·(28+1) = 617 tokens.
    """
    columns, rows = grid
    side = TOKENS_PER_SIDE
    return side * (side + 1) + 1 + side * rows * (side * columns + 1)


def num_tiles(grid: Grid) -> int:
    """Count the tiles the vision tower sees for one image, the global view included."""
    return 1 + grid[0] * grid[1]


def cut_tiles(image: Image.Image, grid: Grid, out: np.ndarray | None = None) -> np.ndarray:
    """Cut an image into its global view and its local tiles, row by row.

    Args:
        image: the picture; converted to RGB if it is not.
        grid: (columns, rows) of local tiles from `tile_grid`.
        out: where the tiles go; None makes an array.

    Returns:
        `out`, or else a uint8 array [1 + columns·rows, 3, 384, 384]; the model normalises (u8 / 255 − 0.5) / 0.5.

    Source: `tokenize_with_images`, deepseek_vl2/models/processing_deepseek_vl_v2.py.

    Example: grid (2, 1)

        tiles[0] = whole picture at 384×384     tiles[1] | tiles[2] = left and right half at 768×384
    """
    columns, rows = grid
    if image.mode != "RGB":
        image = image.convert("RGB")
    tiles = np.empty((1 + columns * rows, 3, TILE_SIZE, TILE_SIZE), dtype=np.uint8) if out is None else out
    views = (_pad(image, (TILE_SIZE, TILE_SIZE)), _pad(image, (columns * TILE_SIZE, rows * TILE_SIZE)))
    # By channel: Pillow takes pixels apart faster than a copy with a stride of three bytes does.
    for channel, (whole, local) in enumerate(zip(*(view.split() for view in views), strict=True)):
        tiles[0, channel] = np.asarray(whole)
        by_tile = np.asarray(local).reshape(rows, TILE_SIZE, columns, TILE_SIZE).swapaxes(1, 2)
        tiles[1:, channel] = by_tile.reshape(-1, TILE_SIZE, TILE_SIZE)
    return tiles


def _pad(image: Image.Image, size: Resolution) -> Image.Image:
    # A sliver such as 10000 × 1 shrinks to no pixels: Pillow 13 pads nothing to a plain area, older ones raise.
    fitted_width = min(size[0], round(image.width / image.height * size[1]))
    fitted_height = min(size[1], round(image.height / image.width * size[0]))
    if min(fitted_width, fitted_height) == 0:
        return Image.new("RGB", size, PAD_COLOUR)
    return ImageOps.pad(image, size, color=PAD_COLOUR)
