"""Reads .gz and .zst block by block, and says so when they are damaged."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data.sources.content import BLOCK

Compression = Literal["gzip", "zstd"]

# One block of zstd may hold 128 KiB in four bytes: small bites keep what one of them becomes in bounds.
_BITE = 1 << 14  # bytes
_LONGEST_WINDOW = 1 << 31  # bytes; what `zstd --long=31` writes


class CompressionError(ValueError):
    """A compressed file that is damaged or cut short."""


def decompressed(path: Path, compression: Compression) -> Iterator[bytes]:
    """Read a compressed file, several members or frames after each other included.

    Raises:
        CompressionError: when the damaged place is reached.
    """
    try:
        yield from (_gzip if compression == "gzip" else _zstd)(path)
    except EOFError:
        raise CompressionError(f"expected a whole {compression} file, found it cut short") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CompressionError(f"expected a whole {compression} file, found it damaged ({error})") from None


def _gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while block := file.read(BLOCK):
            yield block


def _zstd(path: Path) -> Iterator[bytes]:
    """A stream reader of zstandard takes a frame that is cut short for a whole one, its decompression object knows."""
    import zstandard  # here: few sources need it

    context = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
    frame = context.decompressobj()
    begun = False
    with path.open("rb") as file:
        while bite := file.read(_BITE):
            while bite:
                if frame.eof:
                    frame, begun = context.decompressobj(), False
                try:
                    block = frame.decompress(bite)
                except zstandard.ZstdError as error:
                    raise CompressionError(f"expected a whole zstd file, found it damaged ({error})") from None
                begun = True
                if block:
                    yield block
                bite = frame.unused_data
    if begun and not frame.eof:
        raise EOFError
