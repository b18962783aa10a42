"""From a scene to pixels, in integer arithmetic: the same picture on every machine and with every Pillow."""

from functools import lru_cache

import numpy as np
from PIL import Image

from data.shapes.scene import FORMS, Scene

_SHADES = {
    "red": ((220, 30, 30), (245, 50, 45), (195, 15, 25)),
    "green": ((30, 160, 50), (50, 185, 65), (15, 135, 40)),
    "blue": ((40, 80, 225), (65, 105, 245), (25, 55, 195)),
    "yellow": ((245, 205, 0), (255, 220, 40), (230, 190, 10)),
    "purple": ((160, 50, 190), (180, 70, 210), (135, 35, 165)),
    "black": ((20, 20, 20), (45, 45, 45), (0, 0, 0)),
}
_BACKGROUNDS = ((255, 255, 255), (238, 238, 238), (250, 244, 228), (230, 240, 250))

# Corners in thousandths of the box, x to the right and y down. The star's five points stand as in a regular one,
# stretched to touch the box; point k is joined to point k + 2.
_TRIANGLE = ((500, 0), (1000, 1000), (0, 1000))
_STAR = ((500, 0), (1000, 382), (809, 1000), (191, 1000), (0, 382))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene as a palette image (convert it to RGB to look at pixels).

    Args:
        scene: What to draw; its `size` is the image's.
    """
    width, height = scene.size
    pixels = np.zeros((height, width), dtype=np.uint8)
    palette = list(_BACKGROUNDS[scene.background])
    for index, shape in enumerate(scene.shapes, start=1):
        box = pixels[shape.top : shape.top + shape.size, shape.left : shape.left + shape.size]
        box[_mask(shape.form, shape.size)] = index
        palette += _SHADES[shape.colour][shape.shade]
    image = Image.fromarray(pixels)  # grey levels become palette entries below
    image.putpalette(palette)
    return image


@lru_cache(maxsize=256)
def _mask(form: str, size: int) -> np.ndarray:
    """Which pixels of its box a form covers, bool [size, size].

    Coordinates are 2 * pixel + 1, so that pixel centres and the box's middle (size, size) are integers.
    """
    assert form in FORMS, form
    y, x = np.ogrid[1 : 2 * size : 2, 1 : 2 * size : 2]
    x, y = x.astype(np.int64), y.astype(np.int64)
    if form == "circle":
        return (x - size) ** 2 + (y - size) ** 2 <= size**2
    if form == "cross":
        return (3 * abs(x - size) < size) | (3 * abs(y - size) < size)
    if form == "triangle":
        return _half_planes(x, y, size, _TRIANGLE, step=1) == 3
    if form == "star":
        return _half_planes(x, y, size, _STAR, step=2) >= 4
    return np.ones((size, size), dtype=bool)


def _half_planes(x: np.ndarray, y: np.ndarray, size: int, corners: tuple, *, step: int) -> np.ndarray:
    """On how many lines (corner k to corner k + step) a pixel lies on the inner side, int [size, size]."""
    count = np.zeros((size, size), dtype=np.int64)
    for index, (x1, y1) in enumerate(corners):
        x2, y2 = corners[(index + step) % len(corners)]
        # Cross product of the line and the way from its start to the pixel, all in 1/500 pixel.
        count += (x2 - x1) * (500 * y - y1 * size) - (y2 - y1) * (500 * x - x1 * size) >= 0
    return count
