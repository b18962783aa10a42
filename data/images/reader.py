"""The one door to pictures: training, evaluation and `infer` open every picture through an `ImageReader`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.images import files
from data.images.ref import ImageRef


@dataclass(frozen=True, kw_only=True)
class ImageReader:
    """Opens pictures as the settings say; holds nothing open, so forked workers may share one."""

    def size(self, image: ImageRef) -> tuple[int, int]:
        """Read (width, height) in pixels as the model will see them, from the header where that is enough.

        Raises:
            ImageError: a picture that cannot be used; the text says why and what it is called.
        """
        return files.read_size(image.name)

    def decode(self, image: ImageRef) -> Image.Image:
        """Decode a picture to RGB, as the model sees it.

        Raises:
            ImageError: likewise.
        """
        return files.decode(image.name)

    def state(self, image: ImageRef) -> str | None:
        """Return what changes when the picture's content or the way it is read changes; None: it cannot be had."""
        try:
            stat = Path(image.name).stat()
        except (OSError, ValueError):
            return None
        return f"{image.name} {stat.st_size} {stat.st_mtime_ns}"


DEFAULT_READER = ImageReader()
"""Pictures as the official loader reads them."""
