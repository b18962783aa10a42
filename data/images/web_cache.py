"""Keeps fetched pictures on disk: each address is fetched once, and a second run needs no network.

    addresses/3f/3f61...   sha256 of the address  ->  sha256 of the picture, as text
    pictures/a0/a09c...    sha256 of the picture  ->  the picture

Files are written whole or not at all, and what is read is checked: processes may share a folder, and a damaged file
is one that is not there. Two that miss the same address fetch it twice, which does no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from data.cache import default_cache

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the usual place of fetched pictures."""
    return default_cache() / "pictures"


@dataclass(frozen=True, kw_only=True)
class WebCache:
    """Pictures by the address they were fetched from."""

    folder: Path

    def content_hash(self, address: str) -> str | None:
        """Hash of the picture that is kept for an address, without reading it; None: none is."""
        try:
            found = self._address(address).read_text("ascii")
        except (OSError, UnicodeError):
            return None
        return found if re.fullmatch("[0-9a-f]{64}", found) and self._picture(found).is_file() else None

    def get(self, address: str) -> bytes | None:
        """Read the picture that is kept for an address; None: none is, or it is damaged."""
        found = self.content_hash(address)
        if found is None:
            return None
        try:
            data = self._picture(found).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == found else None

    def put(self, address: str, data: bytes) -> None:
        """Keep a picture; a folder that cannot be written costs time in the next run, nothing else."""
        name = hashlib.sha256(data).hexdigest()
        try:
            _write(self._picture(name), data)  # first, so that an address never names a picture that is not there
            _write(self._address(address), name.encode())
        except OSError as error:
            logger.warning("fetched pictures cannot be kept in %s: %s", self.folder, error.strerror)

    def _address(self, address: str) -> Path:
        name = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / "addresses" / name[:2] / name

    def _picture(self, name: str) -> Path:
        return self.folder / "pictures" / name[:2] / name


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
