"""Remembers measured sizes on disk, so that a second run measures only what is new or changed.

A size is kept under a key that holds everything it was computed from; a wrong size cannot be found, only none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.images.reader import DEFAULT_READER, ImageReader
from data.record import Record
from vl2.tiles import Grid, Resolution, num_tiles
from vl2.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_VERSION = 2  # raise it when sizes change, or when more is found wrong: what passed before is looked at again then


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of a pack a record takes."""

    tokens: int
    """Ids of the whole conversation, image tokens included."""
    supervised: int
    """Of these, tokens that are learned."""
    grids: tuple[Grid, ...]
    """(columns, rows) of local tiles of each image."""

    @property
    def tiles(self) -> int:
        """Tiles the vision tower sees, global views included."""
        return sum(num_tiles(grid) for grid in self.grids)


def record_key(
    record: Record,
    *,
    tokenizer: Tokenizer,
    candidates: Sequence[Resolution],
    verify: str,
    images: ImageReader = DEFAULT_READER,
) -> bytes | None:
    """Hash what decides a record's size: its messages, the tokenizer, the resolutions, each image's state.

    Returns:
        16 bytes, or None when an image is missing.
    """
    states = [images.state(image) for image in record.images]
    if None in states:
        return None
    messages = [[m.role, m.content, m.plain, m.learn] for m in record.messages]
    text = json.dumps([_VERSION, tokenizer.fingerprint, list(candidates), verify, messages, repr(record.boxes), states])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class SizeTable:
    """Sizes by key, in one .npz file; without a path it remembers nothing beyond the process."""

    def __init__(self, path: Path | None):
        self.path = path
        self._sizes: dict[bytes, Size] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                self._sizes = _load(path)
            except Exception as error:  # whatever is wrong with the file, its content can be measured again
                logger.warning("size table %s cannot be read (%s); measuring everything again", path, error)

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, key: bytes) -> Size | None:
        """Return the size kept under a key."""
        return self._sizes.get(key)

    def put(self, key: bytes, size: Size) -> None:
        """Keep a size under a key until `save`."""
        self._sizes[key] = size
        self._changed = True

    def save(self) -> None:
        """Write the table if something was added; the file is replaced whole, so a reader never sees half of it."""
        if self.path is None or not self._changed:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.npz")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _dump(temporary, self._sizes)
            os.replace(temporary, self.path)
        except OSError as error:  # a read-only or full disk costs time in the next run, nothing else
            logger.warning("size table %s cannot be written: %s", self.path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._changed = False


def _dump(path: Path, sizes: dict[bytes, Size]) -> None:
    rows = list(sizes.values())
    grids = [grid for size in rows for grid in size.grids]
    np.savez(
        path,
        keys=np.frombuffer(b"".join(sizes), dtype=np.uint8).reshape(-1, 16),
        tokens=np.array([size.tokens for size in rows], dtype=np.int64),
        supervised=np.array([size.supervised for size in rows], dtype=np.int64),
        num_images=np.array([len(size.grids) for size in rows], dtype=np.int64),
        grids=np.array(grids, dtype=np.int64).reshape(-1, 2),
    )


def _load(path: Path) -> dict[bytes, Size]:
    with np.load(path, allow_pickle=False) as file:
        keys, grids = file["keys"], file["grids"].tolist()
        columns = [file[name].tolist() for name in ("tokens", "supervised", "num_images")]
    sizes = {}
    first = 0
    for key, tokens, supervised, num_images in zip(keys, *columns, strict=True):
        own = tuple((columns_, rows_) for columns_, rows_ in grids[first : first + num_images])
        first += num_images
        sizes[key.tobytes()] = Size(tokens=tokens, supervised=supervised, grids=own)
    return sizes
