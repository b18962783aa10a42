"""Opens the file of a picture, and says in one line why it cannot be used: missing, outside its root, damaged ..."""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vl2.errors import UserError

# Pillow knows many more; some of them start foreign programs (EPS runs Ghostscript), none belongs into a data set.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF or PPM"
# What Pillow raises on damaged files: the first four on purpose, the others when it stumbles.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(IndexError, KeyError, TypeError, EOFError, OverflowError, AssertionError, struct.error),
)
_MAX_SHOWN = 200  # characters of a path in an error


class ImageError(UserError):
    """A picture that cannot be used; the text says why and what it is called."""


def shown(name: str | Path) -> str:
    """Write a path or an address as an error shows it: in one line, and not as long as a picture typed in its place."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


@contextmanager
def opened(path: Path, root: str = "") -> Iterator[BinaryIO]:
    """Open the file of a picture.

    Args:
        path: of the file.
        root: folder that the file may not lie outside of, links followed; empty: anywhere.

    Raises:
        ImageError: no regular file, or one outside its root.
    """
    try:
        if root and not _inside(path, root):
            raise ImageError(
                f"{shown(path)} lies outside its folder {shown(root)} (data.image_root), links followed; "
                "move the picture there, or give another folder"
            )
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
            raise ImageError(f"expected an image file, found {_kind(status.st_mode)} at {shown(path)}")
        if not status.st_size:
            raise ImageError(f"expected an image file, found an empty file (0 bytes) at {shown(path)}")
        file = _open_inside(path, root) if root else path.open("rb")
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"expected an image file, found none at {shown(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate, which no file name can hold
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"expected the path of an image file, found {shown(path)}: {reason}") from None
    with file:
        yield file


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Make whatever Pillow raises on a damaged picture an ImageError.

    Args:
        name: what the picture is called in errors.
    """
    try:
        with _no_warnings():
            yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"expected an image file ({_KINDS}), found something else at {shown(name)}") from None
    except DAMAGE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else shown(str(error)) or "damaged"
        raise ImageError(f"cannot read the image {shown(name)}: {text}") from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Say nothing of a large picture or of odd EXIF data; a far too large one still raises.

    In the main thread only: filters are one list for all threads, and two that change it leave it changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open_inside(path: Path, root: str) -> BinaryIO:
    """Open a file without following any link, each folder from the one before: no link put there meanwhile counts."""
    top = os.path.realpath(root)
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *names, name = Path(os.path.realpath(path)).relative_to(top).parts
        for each in names:
            inner = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb")
    finally:
        os.close(folder)


def _inside(path: Path, root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
