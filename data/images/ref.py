"""How a row names a picture: a file, an address, or the encoded bytes themselves. Nothing is opened here."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from vl2.errors import UserError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
# How base64 of a JPEG, PNG, GIF, WebP, TIFF or BMP begins; "/9j/" looks like a path, and none is that long.
_HEADS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk")
_LEAST_BASE64 = 64  # characters; the smallest picture of any kind has more
_MAX_PATH = 4096  # characters, Linux' PATH_MAX
_MAX_SHOWN = 60  # characters
_EXPECTED = "expected a picture's path, address, data URI or base64"


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """One picture of a conversation; `ImageReader` opens it."""

    kind: Literal["file", "url", "bytes"]
    """Where the encoded picture lies."""
    name: str
    """Absolute path of the file, or the address; of bytes, what errors and reports call them."""
    data: bytes = field(default=b"", repr=False)
    """The encoded picture itself, of kind "bytes"."""
    root: str = ""
    """Folder that the file may not lie outside of, links followed; empty: anywhere."""


def image_ref(value: Any, folder: str | PathLike[str], root: str = "") -> ImageRef:
    """Tell what a value of a row names: a file, an address, or a picture itself.

    Args:
        value: a path, an http(s) or file address, a data URI, base64, bytes, or {"bytes": ..., "path": ...}.
        folder: relative paths start here where there is no root.
        root: folder where relative paths start and that none may leave; empty: anywhere.

    Raises:
        UserError: the value names no picture, or a file outside the root; the text is short, whatever the value is.

    Example: "cat.jpg" in folder "/data" is the file /data/cat.jpg; "data:image/png;base64,iVBO..." the bytes it holds.
    """
    if isinstance(value, Mapping):
        return _of_object(value, folder, root)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _of_bytes(bytes(value), "bytes")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{_EXPECTED}, found {_kind(value)}")
    if value[:5].lower() == "data:":
        return _of_bytes(_data_uri(value), "a data URI")
    if scheme := _SCHEME.match(value):
        return _of_address(value, scheme.group(1).lower(), folder, root)
    if len(value) >= _LEAST_BASE64 and value.startswith(_HEADS) and _BASE64.fullmatch(_joined(value)):
        return _of_bytes(_base64(value, "base64"), "base64")
    return _of_path(value, folder, root)


def _of_object(value: Mapping[Any, Any], folder: str | PathLike[str], root: str) -> ImageRef:
    """The Image feature of `datasets`: bytes, and the path they came from or where they are still to be found."""
    unknown = [key for key in value if key not in ("bytes", "path")]
    data, path = value.get("bytes"), value.get("path")
    if unknown or (data is None and not isinstance(path, str)):
        raise UserError(f'{_EXPECTED}, or an object {{"bytes", "path"}}, found an object with {_shown(list(value))}')
    if data is None:
        return image_ref(path, folder, root)
    if isinstance(data, str):  # as JSON has to write them
        data = _base64(data, "base64")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UserError(f"expected the bytes of a picture under bytes, found {_kind(data)}")
    return _of_bytes(bytes(data), f"bytes of {_shown(path)}" if isinstance(path, str) and path else "bytes")


def _of_bytes(data: bytes, what: str) -> ImageRef:
    return ImageRef(kind="bytes", name=f"{what} ({len(data)} bytes)", data=data)


def _data_uri(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise UserError(f"expected a data URI (data:image/...;base64,...), found {_shown(value)}")
    if head.lower().endswith(";base64"):
        return _base64(unquote(body) if "%" in body else body, "the base64 of a data URI")
    return unquote_to_bytes(body)


def _base64(text: str, what: str) -> bytes:
    joined = _joined(text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(joined + "=" * (-len(joined) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"expected {what} of a picture, found what cannot be decoded ({error}): {_shown(text)}"
        ) from None


def _joined(text: str) -> str:
    """Without line ends and spaces, which base64 is often wrapped with."""
    return "".join(text.split())


def _of_address(value: str, scheme: str, folder: str | PathLike[str], root: str) -> ImageRef:
    if scheme not in ("http", "https", "file"):
        raise UserError(
            f"{_EXPECTED}, found {_shown(value)}; an address begins with http:// or https://: fetch the picture to a "
            "file and name that"
        )
    _check_characters(value, "address")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"expected the address of a picture, found {_shown(value)}: {error}") from None
    if scheme == "file":
        if host not in (None, "localhost"):
            raise UserError(f"expected a file of this machine, found {_shown(value)}; write its path")
        return _of_path(unquote(parts.path), folder, root)
    if not host:
        raise UserError(f"expected the address of a picture, found {_shown(value)} without a host")
    return ImageRef(kind="url", name=value)


def _of_path(value: str, folder: str | PathLike[str], root: str) -> ImageRef:
    if len(value) > _MAX_PATH:
        raise UserError(f"{_EXPECTED}, found {_shown(value)}, which is none of them")
    _check_characters(value, "file")
    if not root:
        return ImageRef(kind="file", name=os.path.abspath(os.path.join(folder, os.path.expanduser(value))))
    start = picture_root(root)
    path = os.path.abspath(os.path.join(start, os.path.expanduser(value)))
    if os.path.commonpath([start, path]) != start:
        raise UserError(
            f"expected a picture within data.image_root ({start}), found {_shown(value)}, which lies outside; "
            "correct the path, or give a root that holds all pictures"
        )
    return ImageRef(kind="file", name=path, root=start)


def picture_root(root: str) -> str:
    """What `ImageRef.root` of a source's pictures is, given the root as the user typed it."""
    return os.path.abspath(os.path.expanduser(root)) if root else ""


def _check_characters(value: str, what: str) -> None:
    # A line end or half a surrogate pair may be in a file's name, in theory; no JSON of a data set means it.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{_EXPECTED}, found {_shown(value)}, which no {what} can be called")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "an empty string" if not value else "a string of spaces"
    kinds = {type(None): "nothing (null)", bool: "a boolean", list: "a list", tuple: "a list"}
    return kinds.get(type(value)) or f"the {type(value).__name__} {_shown(value)}"


def _shown(value: Any) -> str:
    """A value in one short line, however long it is."""
    if isinstance(value, str) and len(value) > _MAX_SHOWN:
        return f"{value[:_MAX_SHOWN]!r}... ({len(value)} characters)"
    text = ascii(value)
    return text if len(text) <= 2 * _MAX_SHOWN else f"{text[: 2 * _MAX_SHOWN]}..."
