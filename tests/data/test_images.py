"""Image headers: sizes, and files that stop before their end."""

import io

import numpy as np
import pytest
from PIL import Image

from data.images import ImageError, decode, read_size


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
    with pytest.raises(ImageError, match=rf"truncated image, its end marker is missing: .*a\.{suffix}"):
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


def test_damaged_pixels_are_found_by_decoding_only(tmp_path, noise):
    path = tmp_path / "a.png"
    noise.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert read_size(path) == (90, 60)
    with pytest.raises(ImageError, match=r"cannot decode the image .*a\.png"):
        decode(path)


def test_not_an_image(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(ImageError, match=r"expected an image file, found something else at .*a\.png"):
        read_size(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"expected an image file, found none at .*b\.png"):
        read_size(tmp_path / "b.png")
    with pytest.raises(ImageError, match="cannot read the image"):
        read_size(tmp_path)


def test_too_large_an_image(tmp_path, noise, monkeypatch):
    noise.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"cannot read the image .*exceeds limit"):
        read_size(tmp_path / "a.png")
