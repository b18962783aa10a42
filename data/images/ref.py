"""How a row names a picture: a file, an address, or the encoded bytes themselves. Nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
