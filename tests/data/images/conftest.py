"""A web server with a picture, and a reader that may fetch from it."""

from collections.abc import Iterator

import pytest

from data.images.reader import ImageReader
from tests.data.images.web import QUICK, Web, picture


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    server.answers["/a.png"] = lambda handler: handler.give(picture())
    yield server
    server.end()


@pytest.fixture
def reader(tmp_path) -> ImageReader:
    return ImageReader(cache=tmp_path / "cache", allow_private_urls=True, limits=QUICK)
