"""Tiles against the official processor: resolutions, grids, token counts and pixels of 18 pictures."""

import json
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.places import GOLDENS
from vl2.tiles import (
    cut_tiles,
    limit_candidates,
    num_image_tokens,
    num_tiles,
    select_best_resolution,
    tile_grid,
)

GOLDEN = json.loads((GOLDENS / "processor" / "images.json").read_text())
CANDIDATES = tuple((w, h) for w, h in GOLDEN["candidates"])
# Pillow 13 resizes some tall pictures vertically first and rounds a few pixels differently by one level.
EXACT_PIXELS = int(PIL.__version__.split(".")[0]) >= 13


def synth_image(w: int, h: int, k: int) -> Image.Image:
    y, x = np.mgrid[0:h, 0:w]
    red = (x * 255 // max(w - 1, 1) + 37 * k) % 256
    green = (y * 255 // max(h - 1, 1) + 91 * k) % 256
    blue = ((x // 16 + y // 16 + k) % 2) * 200 + (7 * x + 13 * y + 29 * k) % 56
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("golden", GOLDEN["images"], ids=lambda g: "x".join(map(str, g["size"])))
@pytest.mark.slow
def test_picture_equals_official(golden):
    w, h = golden["size"]
    assert list(select_best_resolution((w, h), CANDIDATES)) == golden["best_resolution"]
    grid = tile_grid((w, h), 1, CANDIDATES)
    assert [list(grid)] == golden["spatial_crop"]
    assert [num_image_tokens(grid)] == golden["num_image_tokens"]

    tiles = cut_tiles(synth_image(w, h, golden["k"]), grid)
    assert tiles.dtype == np.uint8 and tiles.shape == (golden["n_tiles"], 3, 384, 384)
    assert num_tiles(grid) == golden["n_tiles"]
    if EXACT_PIXELS:
        assert [zlib.crc32(np.ascontiguousarray(tile)) for tile in tiles] == golden["tile_crc32_u8"]
        assert zlib.crc32(tiles) == golden["crc32_u8"]

    levels = 0 if EXACT_PIXELS else 1
    with np.load(GOLDENS / "processor" / "pixels.npz") as pixels:
        key = f"{w}x{h}"
        signed = tiles.astype(np.int16)
        assert np.abs(signed[:, :, 191] - pixels[f"{key}_row191_u8"]).max() <= levels
        assert np.abs(signed[:, :, 188:196, 188:196] - pixels[f"{key}_centre_u8"]).max() <= levels
        if f"{key}_tiles_u8" in pixels:
            assert np.abs(signed - pixels[f"{key}_tiles_u8"]).max() <= levels
        # The corners are normalised pixels, as the model makes them; float32 rounds differently in the last bit.
        normalised = (tiles[:, :, :6, :6].astype(np.float32) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(normalised, pixels[f"{key}_corner"], rtol=0, atol=1e-6 + levels * 2 / 255)


def test_best_resolution_equals_official_on_500_sizes():
    assert len(GOLDEN["select_500"]) == 500
    for w, h, best_w, best_h in GOLDEN["select_500"]:
        assert select_best_resolution((w, h), CANDIDATES) == (best_w, best_h), (w, h)


@pytest.mark.parametrize("size", [(10000, 1), (1, 10000), (4000, 3), (1, 1)])
def test_extreme_sizes(size):
    golden = GOLDEN["edge_cases"][str(size)]
    assert list(select_best_resolution(size, CANDIDATES)) == golden["best"]
    grid = tile_grid(size, 1, CANDIDATES)
    assert [list(grid)] == golden["crop"]
    assert cut_tiles(Image.new("RGB", size), grid).shape == (num_tiles(grid), 3, 384, 384)


def test_sliver_that_shrinks_to_nothing_is_plain():
    """Pillow before 13 raised on a picture whose short side rounds to zero pixels."""
    assert np.unique(cut_tiles(Image.new("RGB", (10000, 1)), (1, 1))).tolist() == [127]


def test_more_than_two_images_are_not_cropped():
    assert tile_grid((1920, 1080), 2, CANDIDATES) == (4, 2)
    assert tile_grid((1920, 1080), 3, CANDIDATES) == (1, 1)


@pytest.mark.parametrize(
    ("grid", "tokens"), [((1, 1), 421), ((2, 1), 617), ((1, 2), 631), ((3, 3), 2017), ((9, 1), 1989), ((1, 9), 2101)]
)
def test_num_image_tokens(grid, tokens):
    assert num_image_tokens(grid) == tokens


def test_local_tiles_are_row_major():
    image = Image.new("RGB", (768, 768))
    for i, corner in enumerate([(0, 0), (384, 0), (0, 384), (384, 384)]):
        image.paste((10 * i, 0, 0), (*corner, corner[0] + 384, corner[1] + 384))
    tiles = cut_tiles(image, (2, 2))
    assert [int(tile[0, 200, 200]) for tile in tiles[1:]] == [0, 10, 20, 30]


def test_limit_candidates_counts_local_tiles():
    assert len(limit_candidates(CANDIDATES, 9)) == len(CANDIDATES)
    assert limit_candidates(CANDIDATES, 2) == ((384, 384), (384, 768), (768, 384))
    assert limit_candidates(CANDIDATES, 1) == ((384, 384),)
    with pytest.raises(ValueError, match=r"data\.max_tiles=0 leaves no resolution"):
        limit_candidates(CANDIDATES, 0)


def test_no_candidates():
    with pytest.raises(ValueError, match="candidate_resolutions is empty"):
        select_best_resolution((10, 10), ())
