"""Pictures of a data set's rows that cannot be used: file, row, field and remedy; skipped, nothing else changes."""

import base64
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.dataset import Dataset, open_dataset
from data.images.fetch import FetchLimits
from data.images.reader import ImageReader
from data.record import RecordError
from data.settings import ReadSettings, SourceSettings
from tests.data.images.test_files import png_header
from tests.data.images.web import QUICK, Web
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)


def photograph(kind: str = "jpeg") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((90, 60), 50).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    server.answers.update(
        {
            "/whole.jpg": lambda handler: handler.give(photograph()),
            "/silent.jpg": lambda handler: handler.server.ending.wait(10),
            "/loop.jpg": lambda handler: handler.redirect("/loop.jpg"),
            "/inside.jpg": lambda handler: handler.redirect("http://169.254.169.254/latest/meta-data/"),
            "/less.jpg": lambda handler: handler.give(photograph(), length=500),
            "/more.jpg": lambda handler: handler.give(photograph()[:500], length=5000),
            "/page.jpg": lambda handler: handler.give(b"<!DOCTYPE html>", kind="text/html"),
        }
    )
    yield server
    server.end()


def opened(folder: Path, rows: list[Any], *, images: ImageReader, skip: int | None = None, root: str = "") -> Dataset:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_dataset(
        [SourceSettings(path=str(folder / "data.jsonl"), image_root=root)],
        settings=ReadSettings() if skip is None else ReadSettings(on_bad_record="skip", max_bad=skip),
        tokenizer=TOKENIZER,
        candidates=[(384, 384)],
        images=images,
        cache=folder / "sizes",
    )


def row(picture: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A cat."}]
    return {"messages": messages, "images": [picture]}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent.jpg": (lambda path: None, "expected an image file, found none at"),
    "empty.jpg": (Path.touch, r"found an empty file \(0 bytes\) at"),
    "page.jpg": (lambda path: path.write_text("<!DOCTYPE html>"), r"expected an image file \(JPEG, .*found something"),
    "cut.jpg": (lambda path: path.write_bytes(photograph()[:-100]), "truncated image, its end is missing"),
    "cut.gif": (lambda path: path.write_bytes(photograph("gif")[:-2000]), "cannot read the image"),
    "huge.png": (
        lambda path: path.write_bytes(png_header(30_000, 30_000)),
        "data.max_pixels=.*found 900000000 pixels",
    ),
    "folder.jpg": (Path.mkdir, "expected an image file, found a folder at"),
    "pipe.jpg": (os.mkfifo, "expected an image file, found a pipe at"),
    "link.jpg": (lambda path: path.symlink_to("/etc/hostname"), "lies outside its folder"),
    "../outside.jpg": (lambda path: path.write_bytes(photograph()), "outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used(tmp_path, name):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    make, problem = BAD[name]
    make(pictures / name)
    (pictures / "good.png").write_bytes(photograph())  # a wrong extension is none of them
    rows = [row("good.png"), row(name), row("good.png")]
    check(tmp_path, rows, problem, images=ImageReader(), root=str(pictures))


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/absent.jpg", "cannot fetch http.*absent.jpg: the server answers 404 Not Found"),
        ("/silent.jpg", "cannot fetch .*silent.jpg: timed out"),
        ("/loop.jpg", "cannot fetch .*loop.jpg: more than 5 redirects"),
        ("/less.jpg", "truncated image, its end is missing: http.*less.jpg"),
        ("/more.jpg", r"the server announced 5000 bytes and sent 500 \(after 3 tries\)"),
        ("/page.jpg", r"found something else at http.*page.jpg \(the server calls it text/html\)"),
    ],
)
def test_an_address_that_cannot_be_used(tmp_path, web, path, problem):
    limits = FetchLimits(read_seconds=1) if path == "/silent.jpg" else QUICK
    reader = ImageReader(cache=tmp_path / "cache", allow_private_urls=True, limits=limits)
    rows = [row(web.url("/whole.jpg")), row(web.url(path)), row(web.url("/whole.jpg"))]
    check(tmp_path, rows, problem, images=reader)
    assert [asked for asked, _ in web.asked].count("/whole.jpg") == 1


@pytest.mark.parametrize("path", ["/inside.jpg", "/whole.jpg"])
def test_a_private_network_is_not_asked(tmp_path, web, path, monkeypatch):
    """Neither by a redirect of a public address nor at once."""
    public = path == "/inside.jpg"  # 127.0.0.1 stands for a public address then
    monkeypatch.setattr("data.images.web_address.is_public", lambda ip: public and ip == "127.0.0.1")
    (tmp_path / "good.png").write_bytes(photograph())
    rows = [row("good.png"), row(web.url(path)), row("good.png")]
    problem = "in a private or local network; with data.allow_private_urls=true such addresses are fetched"
    check(tmp_path, rows, problem, images=ImageReader(cache=tmp_path / "cache", limits=QUICK))
    assert len(web.asked) == public  # nobody asks twice for what was refused


def check(folder: Path, rows: list[Any], problem: str, *, images: ImageReader, root: str = "") -> None:
    """The second row is refused with its name, or skipped and listed, and the others are as they were."""
    with pytest.raises(RecordError, match=rf"data\.jsonl, row 2, images\[0\]: .*{problem}") as caught:
        opened(folder, rows, images=images, root=root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    dataset = opened(folder, rows, images=images, skip=1, root=root)
    assert [record.row for record in dataset.records] == [1, 3]
    (skipped,) = dataset.skipped
    assert (skipped.row, skipped.where) == (2, "images[0]")
    alone = opened(folder, [rows[0], rows[2]], images=images, root=root)
    assert np.array_equal(dataset.sizes.tokens, alone.sizes.tokens)


def test_base64_that_is_none(tmp_path):
    whole = base64.b64encode(photograph()).decode()
    rows = [row(whole), row("data:image/jpeg;base64," + "*" * 10_000), row(f"data:image/jpeg;base64,{whole}")]
    check(tmp_path, rows, "", images=ImageReader())


def test_addresses_of_a_data_set_are_fetched_together_and_once(tmp_path, web):
    """A second start fetches nothing and measures nothing, with the network gone too."""
    for number in range(40):
        web.answers[f"/{number}.jpg"] = web.answers["/whole.jpg"]
    rows = [row(web.url(f"/{number % 40}.jpg")) for number in range(80)]
    reader = ImageReader(cache=tmp_path / "cache", allow_private_urls=True, limits=QUICK)
    first = opened(tmp_path, rows, images=reader)
    assert sorted(path for path, _ in web.asked) == sorted(f"/{number}.jpg" for number in range(40))
    web.end()
    later = ImageReader(cache=tmp_path / "cache", allow_private_urls=True, limits=QUICK)
    second = opened(tmp_path, rows, images=later)
    assert second.fingerprint == first.fingerprint
    assert later.decode(second.records[79].images[0]).size == (90, 60)
