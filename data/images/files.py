"""The one door for image files: training, evaluation and `infer` open every picture here.

An image that cannot be used is found by `read_size` before anything is trained or asked, as far as that is cheap.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vl2.errors import UserError

# Pillow knows many more; some of them start foreign programs (EPS runs Ghostscript), none belongs into a data set.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
# What Pillow raises on damaged files and bombs: the first four on purpose, the others when it stumbles.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(IndexError, KeyError, TypeError, EOFError, OverflowError, struct.error),
)
_MAX_SHOWN = 200  # characters of a path in an error

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_JPEG_HEAD = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"


class ImageError(UserError):
    """An image file that cannot be used; the text says why and where the file is."""


def read_size(path: str | PathLike[str]) -> tuple[int, int]:
    """Read (width, height) in pixels, as stored: the EXIF orientation is not applied, neither here nor on decoding.

    What is looked at besides the header: a JPEG's end marker, the checksums of a PNG, the length of a WebP; the
    other, rarer kinds are decoded.  Not found are wrong pixels within a JPEG or a WebP of the right length.

    Raises:
        ImageError: no regular file, not an image of `FORMATS`, truncated or damaged, too many pixels.
    """
    path = Path(path)
    with _opened(path) as file:
        head = file.read(12)
        if head.startswith(_PNG_HEAD):
            _check_png(path, file)
        elif head.startswith(_JPEG_HEAD):
            whole = _ends_with(file, _JPEG_END) or _jpeg_reaches_end(file)
            _check_whole(path, whole)
        elif head.startswith(b"RIFF") and head.endswith(b"WEBP"):
            _check_whole(path, int.from_bytes(head[4:8], "little") + 8 <= os.fstat(file.fileno()).st_size)
        else:
            return _decode(file).size
        with Image.open(file, formats=FORMATS) as image:
            return image.size


def decode(path: str | PathLike[str]) -> Image.Image:
    """Decode an image file to RGB as the official code does: the first frame, no EXIF rotation, alpha dropped.

    Raises:
        ImageError: no regular file, not an image of `FORMATS`, truncated or damaged, too many pixels.

    Source: `load_pil_images`, deepseek_vl2/utils/io.py. The published models never saw the EXIF orientation
    applied, and boxes refer to the pixels as stored: a file whose stored pixels lie on their side stays so.
    """
    with _opened(Path(path)) as file:
        return _decode(file)


def _decode(file: BinaryIO) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        return image.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The open file; whatever reading it raises becomes an ImageError."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ImageError(f"expected an image file, found none at {_shown(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate, which no file name can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"expected the path of an image file, found {_shown(path)}: {reason}") from None
    if not stat.S_ISREG(mode):  # to open a pipe would wait for ever
        raise ImageError(f"expected an image file, found {_kind(mode)} at {_shown(path)}")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # a large picture is no news here; a far too large one still raises
            yield file
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"expected an image file ({_KINDS}), found something else at {_shown(path)}") from None
    except _DAMAGE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"cannot read the image {_shown(path)}: {text}") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _shown(path: Path) -> str:
    """A path as an error shows it: in one line, and not as long as a picture that somebody typed in its place."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def _check_whole(path: Path, whole: bool) -> None:
    if not whole:
        raise ImageError(f"truncated image, its end is missing: {_shown(path)}; fetch or save the file again")


def _ends_with(file: BinaryIO, end: bytes) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(end)))
    return file.read() == end


def _check_png(path: Path, file: BinaryIO) -> None:
    """Walk the chunks (length, type, data, checksum) to IEND; bytes may follow it."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(len(_PNG_HEAD))
    while True:
        header = file.read(8)
        length = int.from_bytes(header[:4], "big")
        _check_whole(path, file.tell() + length + 4 <= num_bytes)
        checksum = zlib.crc32(file.read(length), zlib.crc32(header[4:]))
        if checksum != int.from_bytes(file.read(4), "big"):
            name = header[4:].decode("latin-1")
            raise ImageError(
                f"damaged image, the checksum of its {name!r} chunk is wrong: {_shown(path)}; fetch or save it again"
            )
        if header[4:] == b"IEND":
            return


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
