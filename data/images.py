"""What an image file tells without decoding its pixels: its size, and whether its end is there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vl2.errors import UserError
from vl2.tiles import load_image

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_JPEG_HEAD = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"


class ImageError(UserError):
    """An image file that cannot be used; the text says why, without the path."""


def read_size(path: Path) -> tuple[int, int]:
    """Read (width, height) in pixels, as stored: the EXIF orientation is not applied, neither here nor on decoding.

    JPEG, PNG and WebP files that stop before their end are refused; a few bytes are read, no pixels decoded.

    Raises:
        ImageError: missing, not an image, truncated.
    """
    if not path.exists():
        raise ImageError(f"expected an image file, found none at {path}")
    try:
        with path.open("rb") as file:
            whole = _has_end(file, path.stat().st_size)
        size = _header_size(path) if whole else None
    except UnidentifiedImageError:
        raise ImageError(f"expected an image file, found something else at {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {path}: {error}") from error
    if size is None:
        raise ImageError(f"truncated image, its end marker is missing: {path}; fetch or save the file again")
    return size


def decode(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        ImageError: missing, not an image, truncated or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_image(path)
    # Pillow's decoders raise these on damaged files: SyntaxError and ValueError among others.
    except (OSError, SyntaxError, ValueError, IndexError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot decode the image {path}: {error}") from error


def _header_size(path: Path) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a large picture is no news here; a far too large one still raises
        with Image.open(path) as image:
            return image.size


def _has_end(file: BinaryIO, num_bytes: int) -> bool:
    """Whether a file of a format we know has the end that its format asks for; other formats pass."""
    head = file.read(12)
    if head.startswith(_PNG_HEAD):
        return _ends_with(file, num_bytes, _PNG_END) or _png_reaches_end(file, num_bytes)
    if head.startswith(_JPEG_HEAD):
        return _ends_with(file, num_bytes, _JPEG_END) or _jpeg_reaches_end(file)
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return int.from_bytes(head[4:8], "little") + 8 <= num_bytes
    return True


def _ends_with(file: BinaryIO, num_bytes: int, end: bytes) -> bool:
    file.seek(max(0, num_bytes - len(end)))
    return file.read() == end


def _png_reaches_end(file: BinaryIO, num_bytes: int) -> bool:
    """Walk the chunks (length, type, data, checksum) to IEND; bytes may follow it."""
    position = len(_PNG_HEAD)
    while position + len(_PNG_END) <= num_bytes:
        file.seek(position)
        header = file.read(8)
        if header[4:] == b"IEND":
            return True
        position += 12 + int.from_bytes(header[:4], "big")
    return False


def _jpeg_reaches_end(file: BinaryIO) -> bool:
    """Look for the end marker after the start of scan; bytes may follow it (cameras append previews and the like).

    Before the scan lie segments with a length, among them thumbnails with end markers of their own; inside the scan
    a data byte FF is always followed by 00, so the first FFD9 there is the end.
    """
    file.seek(2)
    while True:
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            return False
        if marker[1] == 0xFF:  # fill byte
            file.seek(-1, 1)
            continue
        length = int.from_bytes(file.read(2), "big")
        file.seek(length - 2, 1)
        if marker[1] == 0xDA:
            return _JPEG_END in file.read()
