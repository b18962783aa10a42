"""The pictures of a request: data URIs, addresses of the web under the data module's rules, files of one folder."""

from __future__ import annotations

from dataclasses import dataclass

from data.images.fetch import FetchLimits, fetch
from data.images.files import ImageError
from data.images.ref import ImageRef, image_ref
from train.config.serve_schema import ServeConfig
from train.serve.errors import ApiError
from vl2.errors import UserError

# The data module's names of keys, and the service's own.
_KEYS = {
    "data.image_root": "media_root",
    "data.max_pixels": "max_pixels",
    "data.allow_private_urls": "allow_private_urls",
}
_SCHEMES = ("data:", "http://", "https://", "file://")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Finds what the pictures of a request are."""

    media_root: str  # folder of file:// pictures; empty: there are none
    max_bytes: int  # of a picture, encoded
    allow_private_urls: bool
    limits: FetchLimits

    @classmethod
    def of(cls, config: ServeConfig) -> Pictures:
        """As the settings say; a server that is slow or broken is waited for less than in training."""
        limits = FetchLimits(
            connect_seconds=5, read_seconds=10, total_seconds=30, max_bytes=config.max_image_bytes, tries=1
        )
        return cls(
            media_root=config.media_root,
            max_bytes=config.max_image_bytes,
            allow_private_urls=config.allow_private_urls,
            limits=limits,
        )

    def find(self, where: str, address: str) -> ImageRef:
        """Tell what an address names; nothing is opened or fetched.

        Args:
            where: its field in the request.
            address: data URI, http(s) or file address.

        Raises:
            ApiError: no such address, or a file outside the folder.
        """
        scheme = next((scheme for scheme in _SCHEMES if address[: len(scheme)].lower() == scheme), None)
        if scheme is None:
            raise refused(where, "expected a data URI, or an address that begins with https://, http:// or file://")
        if scheme == "file://" and not self.media_root:
            raise refused(where, "this service reads no files (it was started without media_root)")
        try:
            picture = image_ref(address, self.media_root or "/", self.media_root)
        except UserError as error:
            if scheme == "file://":  # which would tell where the folder lies
                raise refused(where, "expected the address of a file within this service's media_root") from error
            raise refused(where, str(error)) from error
        if len(picture.data) > self.max_bytes:
            raise refused(where, f"expected a picture of at most {self.max_bytes} bytes, found {len(picture.data)}")
        return picture

    def get(self, where: str, picture: ImageRef) -> ImageRef:
        """Fetch a picture that lies at an address of the web; others stay as they are. May take long.

        Raises:
            ApiError: it cannot be had.
        """
        if picture.kind != "url":
            return picture
        try:
            found = fetch(picture.name, limits=self.limits, allow_private=self.allow_private_urls)
        except ImageError as error:
            raise refused(where, str(error)) from error
        return ImageRef(kind="bytes", name=picture.name, data=found.data)


def refused(where: str, problem: str) -> ApiError:
    """An error about one picture.

    Args:
        where: its field in the request.
        problem: as the data module says it.
    """
    for theirs, ours in _KEYS.items():
        problem = problem.replace(theirs, ours)
    return ApiError(400, f"{where}: {problem}", param=where, code="invalid_image")
