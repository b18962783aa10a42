"""Tells the size of a picture, and whether all of it is there, from as few of its bytes as that takes."""

from __future__ import annotations

import os
import zlib
from typing import BinaryIO

from PIL import Image

from data.images.files import ImageError, shown
from data.images.pixels import Exif, open_picture, orientation

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks that may hold an orientation
_JPEG_HEAD = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_SIDEWAYS = 5  # orientations from here on exchange width and height


def read_size(file: BinaryIO, name: str, *, exif: Exif, max_pixels: int) -> tuple[int, int]:
    """Read (width, height) in pixels as decoding gives them.

    What is looked at besides the header: a JPEG's end marker, the checksums of a PNG, the length of a WebP; the
    other, rarer kinds are decoded.  Not found are wrong pixels within a JPEG or a WebP of the right length.

    Args:
        file: the encoded picture, from its start.
        name: what errors call it.
        exif: "rotate" exchanges width and height where the orientation in the file does.
        max_pixels: more are refused.

    Raises:
        ImageError: not an image of `FORMATS`, truncated or damaged, too many pixels. Other errors are Pillow's.
    """
    head = file.read(12)
    decodes = False  # what Pillow's header does not tell
    if head.startswith(_PNG_HEAD):
        decodes = _check_png(name, file) and exif == "rotate"
    elif head.startswith(_JPEG_HEAD):
        _check_whole(name, _ends_with(file, _JPEG_END) or _jpeg_reaches_end(file))
    elif head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        _check_whole(name, int.from_bytes(head[4:8], "little") + 8 <= file.seek(0, os.SEEK_END))
    else:
        decodes = True
    file.seek(0)
    with open_picture(file, name, max_pixels) as image:
        if decodes:
            image.load()
        width, height = image.size
        # Not `image.getexif()`: of a PNG without EXIF it decodes the pixels, for a chunk that might follow them.
        sideways = exif == "rotate" and orientation(image, Image.Image.getexif) >= _SIDEWAYS
        return (height, width) if sideways else (width, height)


def _check_whole(name: str, whole: bool) -> None:
    if not whole:
        raise ImageError(f"truncated image, its end is missing: {shown(name)}; fetch or save the file again")


def _ends_with(file: BinaryIO, end: bytes) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(end)))
    return file.read() == end


def _check_png(name: str, file: BinaryIO) -> bool:
    """Walk the chunks (length, type, data, checksum) to IEND; bytes may follow it.

    Returns:
        Whether a chunk after the pixels may hold an orientation.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(len(_PNG_HEAD))
    after_pixels = text_follows = False
    while True:
        header = file.read(8)
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        _check_whole(name, file.tell() + length + 4 <= num_bytes)
        checksum = zlib.crc32(file.read(length), zlib.crc32(kind))
        if checksum != int.from_bytes(file.read(4), "big"):
            raise ImageError(
                f"damaged image, the checksum of its {kind.decode('latin-1')!r} chunk is wrong: {shown(name)}; "
                "fetch or save it again"
            )
        if kind == b"IEND":
            return text_follows
        after_pixels = after_pixels or kind == b"IDAT"
        text_follows = text_follows or (after_pixels and kind in _PNG_TEXTS)


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
        if length < 2:  # it counts itself; less would walk on the spot for ever
            return False
        file.seek(length - 2, 1)
        if marker[1] == 0xDA:
            return _JPEG_END in file.read()
