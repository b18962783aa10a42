"""What a row's value names: a file, an address, a picture itself, or nothing that could be opened."""

import base64

import pytest

from data.images.ref import ImageRef, image_ref
from vl2.errors import UserError

JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(200))
BASE64 = base64.b64encode(JPEG).decode()


def test_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for value, path in [
        ("a.png", "/data/a.png"),
        ("../b/a b.png", "/b/a b.png"),
        ("/c/a.png", "/c/a.png"),
        ("~/a.png", "/home/me/a.png"),
        ("file:///c/a%20b.png", "/c/a b.png"),
        ("file://localhost/c/a.png", "/c/a.png"),
        ("C:/a.png", "/data/C:/a.png"),
        ("9j/short.jpg", "/data/9j/short.jpg"),
        ({"bytes": None, "path": "a.png"}, "/data/a.png"),
        ({"path": "a.png"}, "/data/a.png"),
    ]:
        assert image_ref(value, "/data") == ImageRef(kind="file", name=path), value


def test_folder_that_no_path_may_leave():
    assert image_ref("sub/a.png", "/data", "/album") == ImageRef(kind="file", name="/album/sub/a.png", root="/album")
    assert image_ref("/album/../album/a.png", "/data", "/album").name == "/album/a.png"
    for outside in ("../a.png", "sub/../../albums/a.png", "/etc/passwd", "file:///etc/passwd", {"path": "../a"}):
        with pytest.raises(UserError, match=r"expected a picture within data\.image_root \(/album\), found .*outside"):
            image_ref(outside, "/data", "/album")


def test_addresses():
    for value in ("http://example.org/a.png?b=c#d", "HTTPS://example.org:8080/ä.png"):
        assert image_ref(value, "/data", "/album") == ImageRef(kind="url", name=value)


def test_bytes():
    wrapped = "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76)) + "\n"
    for value in [
        JPEG,
        bytearray(JPEG),
        {"bytes": JPEG, "path": None},
        {"bytes": JPEG, "path": "../../cat.jpg"},
        {"bytes": BASE64},
        BASE64,
        wrapped,
        BASE64.rstrip("="),
        f"data:image/jpeg;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        f"DATA:image/jpeg;BASE64,{wrapped}",
        f"data:image/jpeg;base64,{BASE64.replace('+', '%2B').replace('/', '%2F')}",
        f"data:image/jpeg;base64,{BASE64.replace('+', '-').replace('/', '_')}",
    ]:
        found = image_ref(value, "/data", "/album")
        assert (found.kind, found.data, found.root) == ("bytes", JPEG, ""), value
        assert found.name.endswith(f"({len(JPEG)} bytes)") and len(found.name) < 200
    assert image_ref("data:image/svg+xml,%3Csvg%3E", "/data").data == b"<svg>"
    assert image_ref(b"", "/data").data == b""  # whoever opens it says that it is empty


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, r"found nothing \(null\)"),
        ("", "found an empty string"),
        (" \n", "found a string of spaces"),
        (3, "found the int 3"),
        (True, "found a boolean"),
        (["a.png"], "found a list"),
        ({}, r'an object \{"bytes", "path"\}, found an object with \[\]'),
        ({"bytes": None, "path": None}, "found an object with"),
        ({"bytes": [1, 2]}, "expected the bytes of a picture under bytes, found a list"),
        ({"url": "a.png"}, r"found an object with \['url'\]"),
        ({"path": {"path": None}}, "found an object with"),
        ("s3://bucket/a.png", r"found 's3://bucket/a\.png'; an address begins with http:// or https://"),
        ("http:///a.png", "without a host"),
        ("http://[::1/a.png", "Invalid IPv6 URL"),
        ("http://host:port/a.png", "Port could not be cast"),
        ("file://server/a.png", "expected a file of this machine"),
        ("a\0.png", r"found 'a\\x00\.png', which no file can be called"),
        ("a\ud800.png", r"found 'a\\ud800\.png', which no file can be called"),
        ("http://example.org/\ud800", "which no address can be called"),
        ("data:image/png;base64", "expected a data URI"),
        ("data:image/png;base64,not base64!", "expected the base64 of a data URI of a picture, found what cannot be"),
        ("data:image/png;base64,ééé", "found what cannot be decoded"),
        (BASE64[:65], "expected base64 of a picture, found what cannot be decoded"),
        ("ab/" * 100_000, r"found 'ab/.*'\.\.\. \(300000 characters\), which is none of them"),
        ("data:" + "x" * 100_000, r"expected a data URI .*\(100005 characters\)"),
        ("s3://" + "x" * 100_000, r"\(100005 characters\)"),
        ({"x" * 100_000: 1}, "found an object with"),
    ],
)
def test_what_names_no_picture(value, problem):
    """base64 in `images` ended in a traceback; a long value is cut in the error."""
    with pytest.raises(UserError, match=problem) as raised:
        image_ref(value, "/data")
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()
