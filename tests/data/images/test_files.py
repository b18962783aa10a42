"""The door for images: sizes, pixels, and files that cannot be used."""

import io
import os
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.images.files import ImageError, decode, read_size


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_size_of_whole_files(tmp_path, noise, suffix):
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    assert read_size(path) == (90, 60)
    assert decode(path).size == (90, 60)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("lost", [2, 20, 1000])
def test_truncated_file(tmp_path, noise, suffix, lost):
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(ImageError, match=rf"truncated image, its end is missing: .*a\.{suffix}"):
        read_size(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bytes_after_the_end_are_no_damage(tmp_path, noise, suffix):
    """Cameras and editors append data after the end marker."""
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes() + b"trailer" * 3)
    assert read_size(path) == (90, 60)
    assert decode(path).size == (90, 60)


def test_end_marker_of_a_thumbnail_is_not_the_end(tmp_path, noise):
    """A JPEG thumbnail in the EXIF block has an end marker of its own: it must not hide a lost scan."""
    thumbnail = io.BytesIO()
    noise.resize((16, 16)).save(thumbnail, "jpeg")
    block = b"Exif\0\0" + thumbnail.getvalue()
    path = tmp_path / "a.jpg"
    noise.save(path, "jpeg")
    data = path.read_bytes()
    data = data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    path.write_bytes(data + b"xx")
    assert read_size(path) == (90, 60)
    path.write_bytes(data[:-1000])
    with pytest.raises(ImageError, match="truncated image"):
        read_size(path)


def test_size_is_as_stored_whatever_the_orientation(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "a.jpg", exif=exif)
    assert read_size(tmp_path / "a.jpg") == decode(tmp_path / "a.jpg").size == (90, 60)


def test_decoding_ignores_the_exif_rotation(tmp_path, noise):
    """As the official code: the orientation tag is not applied, so header size and pixels agree."""
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to display"
    noise.save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(np.asarray(decode(tmp_path / "rotated.png")), np.asarray(noise))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (5, 4)).save(path)
    assert decode(path).mode == "RGB"


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "ppm"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_file_of_a_rarer_kind(tmp_path, noise, suffix, part):
    """Half a GIF, BMP or TIFF has a whole header: it was measured, and stopped the run when its pack was built."""
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ImageError, match=rf"cannot read the image .*a\.{suffix}: .*truncated"):
        read_size(path)


@pytest.mark.parametrize("chunk", [b"tEXt", b"IDAT"])
def test_png_with_a_wrong_checksum(tmp_path, noise, chunk):
    """One bit of a PNG flipped on the way: only decoding its pixels told, in the middle of a run."""
    path = tmp_path / "a.png"
    text = PngInfo()
    text.add_text("Title", "noise")
    noise.save(path, pnginfo=text)
    data = bytearray(path.read_bytes())
    data[data.index(chunk) + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"damaged image, the checksum of its '{chunk.decode()}' chunk .*a\.png"):
        read_size(path)


def png_of_nonsense(path: Path) -> Path:
    """A PNG with right checksums over pixels that cannot be unpacked."""
    Image.new("RGB", (90, 60)).save(path)
    data = path.read_bytes()
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    nonsense = b"IDAT" + b"\xff" * length
    path.write_bytes(data[:start] + nonsense + zlib.crc32(nonsense).to_bytes(4, "big") + data[start + length + 8 :])
    return path


def test_nonsense_with_right_checksums_is_found_by_decoding_only(tmp_path):
    path = png_of_nonsense(tmp_path / "a.png")
    assert read_size(path) == (90, 60)
    with pytest.raises(ImageError, match=r"cannot read the image .*a\.png"):
        decode(path)


def test_jpeg_segment_without_length_is_truncated(tmp_path):
    """A segment's length counts itself; a length of 0 was walked on the spot for ever."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ImageError, match="truncated image"):
        read_size(path)


@pytest.mark.parametrize("use", [read_size, decode])
def test_what_is_no_regular_file(tmp_path, use):
    """To open a pipe waits for somebody to write into it: a run or `infer` stood still for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        for path, kind in (
            (tmp_path / "pipe.png", "a pipe"),
            (tmp_path / "folder.png", "a folder"),
            (tmp_path / "s.png", "a socket"),
            (Path(os.devnull), "a device"),
        ):
            with pytest.raises(ImageError, match=rf"expected an image file, found {kind} at {path}$"):
                use(path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "data:image/png;base64," + "iVBORw0KGgo" * 1000,
            r"data:image/png;base64,.*\.\.\. \(1\d{4} characters\): File name",
        ),
        ("a/" * 3000, r"\.\.\. \(\d+ characters\): File name too long"),
        ("a\0.png", r"a\\x00\.png: .*null"),
        ("a\ud800.png", r"a\\ud800\.png: .*surrogates"),
    ],
)
def test_path_that_no_file_can_have(name, found):
    with pytest.raises(ImageError, match=rf"^expected the path of an image file, found .*{found}") as caught:
        read_size(name)
    assert len(str(caught.value)) < 500


def test_formats_that_start_foreign_programs_are_refused(tmp_path, noise):
    """Pillow hands an EPS to Ghostscript: somebody's picture is a program."""
    noise.save(tmp_path / "a.eps")
    noise.save(tmp_path / "a.png", "eps")
    for name in ("a.eps", "a.png"):
        with pytest.raises(ImageError, match=r"expected an image file \(JPEG, PNG, .*\), found something else at"):
            decode(tmp_path / name)


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(ImageError, match=r"expected an image file \(JPEG, .*\), found something else at .*a\.png"):
        read_size(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"expected an image file, found none at .*b\.png"):
        read_size(tmp_path / "b.png")


def test_too_large_an_image(tmp_path, noise, monkeypatch):
    noise.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"cannot read the image .*exceeds limit"):
        read_size(tmp_path / "a.png")
