"""Small copies of pictures for a page, each picture once, until the page has as many bytes of them as it may."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from train.page.pictures import jpeg_uri

_LONGEST_SIDE = 400  # pixels
_QUALITY = 72  # of its JPEG
MOST_BYTES = 16_000_000  # of all pictures, as text


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A picture of a page."""

    number: int
    """On the page, from 0."""
    width: int
    """Pixels as the model sees it, not of the copy."""
    height: int
    uri: str


class Thumbnails:
    """Makes thumbnails; remembers them."""

    def __init__(self, reader: ImageReader):
        self.reader = reader
        self.made: list[Thumbnail] = []
        self.left_out = 0
        self._known: dict[tuple[str, str, bytes], Thumbnail | str] = {}
        self._bytes = 0

    def get(self, image: ImageRef) -> Thumbnail | str:
        """Make the thumbnail of a picture, or say why there is none."""
        key = (image.kind, image.name, image.data)
        if key not in self._known:
            self._known[key] = self._make(image)
        return self._known[key]

    def _make(self, image: ImageRef) -> Thumbnail | str:
        if self._bytes >= MOST_BYTES:
            self.left_out += 1
            return "not drawn: the page has as many pictures as it may"
        try:
            picture = self.reader.decode(image)
        except ImageError as problem:
            return str(problem)
        size = picture.size
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.BILINEAR)
        uri = jpeg_uri(picture, _QUALITY)
        self._bytes += len(uri)
        self.made.append(Thumbnail(number=len(self.made), width=size[0], height=size[1], uri=uri))
        return self.made[-1]
