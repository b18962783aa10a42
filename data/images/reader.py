"""The one door to pictures: training, evaluation and `infer` open every picture through an `ImageReader`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data.images import files, headers, pixels
from data.images.fetch import FetchLimits, fetch
from data.images.files import ImageError
from data.images.pixels import Exif
from data.images.ref import ImageRef
from data.images.web_cache import WebCache

MAX_PIXELS = 100_000_000
"""Of one picture, by default: 300 MB of RGB."""
MOST_PIXELS = 178_956_970
"""Whatever a setting says: from here on Pillow takes a picture for an attack."""
_FETCHED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Opens pictures as the settings say; holds nothing open, so forked workers may share one."""

    exif: Exif = "ignore"
    """Pixels as stored, or turned as the file's EXIF orientation says."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused, by their header."""
    allow_private_urls: bool = False
    """Addresses may lead into private and local networks."""
    cache: Path | None = None
    """Folder where fetched pictures are kept, see `web_cache`; None: fetched whenever they are opened."""
    limits: FetchLimits = field(default_factory=FetchLimits)
    """How long and how much is waited for at an address."""
    failed: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Why `prefetch` could not get an address: nobody waits for it again."""

    def size(self, image: ImageRef) -> tuple[int, int]:
        """Read (width, height) in pixels as the model will see them, from the header where that is enough.

        Raises:
            ImageError: a picture that cannot be used; the text says why and what it is called.
        """
        with self._open(image) as file:
            return headers.read_size(file, image.name, exif=self.exif, max_pixels=self.max_pixels)

    def decode(self, image: ImageRef) -> Image.Image:
        """Decode a picture to RGB, as the model sees it.

        Raises:
            ImageError: likewise.
        """
        with self._open(image) as file:
            return pixels.decode(file, image.name, exif=self.exif, max_pixels=self.max_pixels)

    def state(self, image: ImageRef) -> str | None:
        """Return what changes when the picture's content or the way it is read changes; None: it cannot be had.

        Of an address it can be had once the picture was fetched.
        """
        way = f"{self.exif} {self.max_pixels}"
        if image.kind == "bytes":
            return f"{hashlib.blake2b(image.data, digest_size=16).hexdigest()} {way}"
        if image.kind == "url":
            content = WebCache(folder=self.cache).content_hash(image.name) if self.cache else None
            return content and f"{image.name} {content} {way}"
        try:
            stat = Path(image.name).stat()
        except (OSError, ValueError):
            return None
        return f"{image.name} {image.root} {stat.st_size} {stat.st_mtime_ns} {way}"

    def content_hash(self, image: ImageRef) -> str:
        """Hash of the encoded picture and of the way it is read: the same wherever the picture lies.

        Raises:
            ImageError: a picture that cannot be had.
        """
        digest = hashlib.blake2b(self.exif.encode(), digest_size=16)
        with self._open(image) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def prefetch(self, images: Iterable[ImageRef]) -> None:
        """Fetch the addresses among pictures that are not kept yet, several at a time.

        What cannot be fetched raises nothing here, but where the picture is opened.
        """
        if self.cache is None:
            return
        kept = WebCache(folder=self.cache)
        addresses = dict.fromkeys(image.name for image in images if image.kind == "url")
        missing = [address for address in addresses if address not in self.failed and not kept.content_hash(address)]
        if not missing:
            return

        def one(address: str) -> None:
            try:
                self._fetched(address)
            except ImageError as error:
                self.failed[address] = str(error)

        threads = ThreadPoolExecutor(min(_FETCHED_TOGETHER, len(missing)))
        try:
            list(threads.map(one, missing))
        finally:  # no thread is left for a fork to meet; who interrupts waits for what is under way alone
            threads.shutdown(cancel_futures=True)

    @contextmanager
    def _open(self, image: ImageRef) -> Iterator[BinaryIO]:
        """Open the encoded picture; what Pillow raises while it is read becomes an ImageError."""
        if image.kind == "file":
            with files.opened(Path(image.name), image.root) as file, files.reading(image.name):
                yield file
            return
        data = image.data if image.kind == "bytes" else self._fetched(image.name)
        if not data:
            raise ImageError(f"expected an image, found 0 bytes at {files.shown(image.name)}")
        with files.reading(image.name):
            yield io.BytesIO(data)

    def _fetched(self, address: str) -> bytes:
        """Read a picture from the cache, or fetch it; only what is a whole picture is kept."""
        if problem := self.failed.get(address):
            raise ImageError(problem)
        kept = WebCache(folder=self.cache) if self.cache else None
        data = kept.get(address) if kept else None
        if data is not None:
            return data
        found = fetch(address, limits=self.limits, allow_private=self.allow_private_urls)
        try:
            with files.reading(address):
                headers.read_size(io.BytesIO(found.data), address, exif=self.exif, max_pixels=self.max_pixels)
        except ImageError as error:
            said = "" if found.content_type.startswith("image/") or not found.content_type else found.content_type
            raise ImageError(f"{error}" + (f" (the server calls it {files.shown(said)})" if said else "")) from None
        if kept:
            kept.put(address, found.data)
        return found.data


DEFAULT_READER = ImageReader()
"""Pictures as the official loader reads them."""
