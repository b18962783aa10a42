"""Decodes a picture to RGB as a person sees it: every mode, transparency, 16 bits, orientation, the first frame."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from data.images.files import DAMAGE, FORMATS, ImageError, shown

Exif = Literal["ignore", "rotate"]

_ORIENTATION = 0x0112  # tag of EXIF 2.3, 4.6.4
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF 6.0 that say what a grey value of 16 bits means.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def decode(file: BinaryIO, name: str, *, exif: Exif, max_pixels: int) -> Image.Image:
    """Decode a picture to RGB.

    Palette, grey, CMYK and every other mode as the official loader does, `Image.open(...).convert("RGB")`, bit for
    bit, and of an animation the first frame.  Two kinds are shown as a person sees them, not as that loader does:
    what is transparent lies on white (there it turns into whatever colour the file hides, mostly black), and grey
    of 16 bits is scaled to 8 (there everything above 255 is white).

    Args:
        file: the encoded picture, from its start.
        name: what errors call it.
        exif: "ignore" shows the pixels as stored, as the published models saw theirs; "rotate" applies the
            orientation that the file names. A TIFF's is always applied, by Pillow.
        max_pixels: more are refused.

    Raises:
        ImageError: too many pixels. Other errors are Pillow's.

    Source: `load_pil_images`, deepseek_vl2/utils/io.py.
    """
    with open_picture(file, name, max_pixels) as image:
        image.load()
        rgb = _to_rgb(image)
        method = _TRANSPOSE.get(orientation(image)) if exif == "rotate" else None
        return rgb if method is None else rgb.transpose(method)


@contextmanager
def open_picture(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture by its header; one that takes too much memory is refused before its pixels are decoded."""
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, which lies above ours
        number = re.search(r"\d+", str(error))
        raise _too_many(name, f"{number.group() if number else 'far more'} pixels", max_pixels) from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise _too_many(name, f"{width} × {height} = {width * height} pixels", max_pixels)
        yield image


def _too_many(name: str, found: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"expected a picture of at most data.max_pixels={max_pixels} pixels, found {found}: {shown(name)}; make it "
        "smaller"
    )


def orientation(image: Image.Image, read: Callable[[Image.Image], Image.Exif] | None = None) -> int:
    """Read how a picture wants to be turned, 1 to 8 as in EXIF; 1, as it is, where it says nothing that can be read.

    Args:
        image: an opened picture; a TIFF must be decoded, which turns it and takes this away.
        read: gives its EXIF; None: `image.getexif`.
    """
    try:
        found = (read(image) if read else image.getexif()).get(_ORIENTATION, 1)
    except DAMAGE:  # the pixels are none the worse for it
        return 1
    return found if isinstance(found, int) and found in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    alpha: Image.Image | None = None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        rgb, alpha = _grey_of_16_bits(image)
    elif image.has_transparency_data:
        seen = image.convert("RGBA")
        rgb, alpha = seen.convert("RGB"), seen.getchannel("A")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if alpha is None:
        return rgb
    white = Image.new("RGB", image.size, "white")
    white.paste(rgb, mask=alpha)
    return white


def _grey_of_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Scale to 8 bits, 65535 (of a TIFF of 12 bits 4095) to 255; and the alpha, where one value is transparent."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    white = (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
    grey = (values * 255 + white // 2) // white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB"), alpha
