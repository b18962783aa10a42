"""Fetched pictures: each address once, by every process, in every run; damage of the cache costs time only."""

import multiprocessing
import threading

import pytest

from data.images.files import ImageError
from data.images.reader import ImageReader
from data.images.ref import ImageRef
from tests.data.images.web import QUICK, picture, ref


def test_each_address_is_fetched_once(web, reader, tmp_path):
    """By size, by decoding, by another process, by the next run, and without a network."""
    image = ref(web.url("/a.png"))
    assert reader.state(image) is None
    assert reader.size(image) == reader.decode(image).size == (90, 60)
    state = reader.state(image)
    assert state is not None and image.name in state
    child = multiprocessing.get_context("fork").Process(target=reader.decode, args=(image,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert web.asked == [("/a.png", f"127.0.0.1:{web.server_port}")]
    web.end()  # offline from here on
    later = ImageReader(cache=tmp_path / "cache")
    assert (later.size(image), later.state(image)) == ((90, 60), state)


def test_processes_that_miss_the_same_picture_at_once(web, reader):
    """Each fetches it, none reads half of it, and one whole picture is kept."""
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(4)
    image = ref(web.url("/a.png"))

    def look() -> None:
        together.wait(10)
        assert reader.decode(image).size == (90, 60)

    children = [fork.Process(target=look) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0] * 4
    assert reader.cache is not None
    assert [path.read_bytes() for path in (reader.cache / "pictures").rglob("*") if path.is_file()] == [picture()]


def test_state_is_of_the_content(web, reader, tmp_path):
    """Another picture at the same address, in another cache, is another state: sizes kept on disk do not mislead."""
    web.answers["/b.png"] = lambda handler: handler.give(picture(size=(30, 60)))
    web.answers["/c.png"] = lambda handler: handler.give(picture())
    for path in ("/a.png", "/b.png", "/c.png"):
        reader.size(ref(web.url(path)))
    assert len({reader.state(ref(web.url(path))) for path in ("/a.png", "/b.png", "/c.png")}) == 3
    other = ImageReader(cache=tmp_path / "other", allow_private_urls=True, limits=QUICK)
    web.answers["/a.png"] = web.answers["/b.png"]
    other.size(ref(web.url("/a.png")))
    assert other.state(ref(web.url("/a.png"))) != reader.state(ref(web.url("/a.png")))


def test_damaged_and_unwritable_caches_cost_time_only(web, reader, tmp_path, caplog):
    image = ref(web.url("/a.png"))
    reader.size(image)
    (kept,) = (tmp_path / "cache" / "pictures").rglob("*/*")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert reader.decode(image).size == (90, 60)
    assert (len(web.asked), kept.read_bytes()) == (2, picture())
    (address,) = (tmp_path / "cache" / "addresses").rglob("*/*")
    address.write_bytes(b"\xff/../../passwd")
    assert reader.state(image) is None
    assert reader.size(image) == (90, 60)
    assert len(web.asked) == 3
    (tmp_path / "secret").write_bytes(picture())
    address.write_bytes(b"../secret")  # <cache>/pictures/../../secret is a file
    assert reader.state(image) is None
    (tmp_path / "file").touch()
    unwritable = ImageReader(cache=tmp_path / "file", allow_private_urls=True, limits=QUICK)
    assert unwritable.size(image) == (90, 60)
    assert "fetched pictures cannot be kept in" in caplog.text


def test_addresses_are_fetched_together(web, reader):
    """10,000 pictures one after the other take an hour; and nobody waits twice for one that is not there."""
    together = threading.Barrier(4, timeout=10)

    def wait(handler):
        together.wait()
        handler.give(picture())

    for i in range(4):
        web.answers[f"/{i}.png"] = wait
    images = [ref(web.url(f"/{i}.png")) for i in range(4)]
    ImageReader(cache=reader.cache, allow_private_urls=True).prefetch([*images, *images])
    assert len(web.asked) == 4
    absent = ref(web.url("/absent.png"))
    reader.prefetch([*images, absent, ImageRef(kind="file", name="/a.png")])
    assert len(web.asked) == 5
    for _ in range(2):
        with pytest.raises(ImageError, match="404"):
            reader.size(absent)
    assert len(web.asked) == 5
