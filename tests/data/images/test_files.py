"""The door for images: sizes, pixels, and files that cannot be used."""

import io
import os
import socket
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.images.files import ImageError, reading
from data.images.reader import ImageReader
from data.images.ref import ImageRef


def read_size(path: str | Path) -> tuple[int, int]:
    return ImageReader().size(ImageRef(kind="file", name=str(path)))


def decode(path: str | Path) -> Image.Image:
    return ImageReader().decode(ImageRef(kind="file", name=str(path)))


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


def test_palette_that_is_missing(tmp_path, noise):
    """Pillow stumbles over an assertion of its own: a traceback in the middle of a run."""
    noise.convert("P").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:])
    with pytest.raises(ImageError, match=r"cannot read the image .*a\.png"):
        decode(tmp_path / "a.png")


def test_threads_leave_the_filters_of_warnings_alone():
    """They are one list for all threads: two that opened pictures at once left every later warning unsaid."""
    before = list(warnings.filters)
    inside, end = threading.Event(), threading.Event()

    def look() -> None:
        with reading("a.png"):
            inside.set()
            end.wait(10)

    thread = threading.Thread(target=look)
    thread.start()
    assert inside.wait(10)
    assert warnings.filters == before
    end.set()
    thread.join()


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


@pytest.mark.parametrize("way", ["size", "decode"])
@pytest.mark.parametrize(
    ("size", "found"), [((11_000, 10_000), "11000 × 10000 = 110000000"), ((30_000, 30_000), "900000000")]
)
def test_too_many_pixels_are_refused_by_the_header(tmp_path, way, size, found):
    """30,000 x 30,000 pixels: a file of 100 bytes that takes 2.7 GB. The larger one Pillow refuses itself."""
    path = tmp_path / "a.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ImageError, match=rf"at most data\.max_pixels=100000000 pixels, found {found} pixels: .*a\.png"):
        getattr(ImageReader(), way)(ImageRef(kind="file", name=str(path)))


def test_limit_of_pixels_is_a_setting(tmp_path, noise):
    noise.save(tmp_path / "a.gif")
    image = ImageRef(kind="file", name=str(tmp_path / "a.gif"))
    assert ImageReader(max_pixels=90 * 60).size(image) == (90, 60)
    for way in (ImageReader(max_pixels=90 * 60 - 1).size, ImageReader(max_pixels=90 * 60 - 1).decode):
        with pytest.raises(ImageError, match="max_pixels=5399 pixels, found 90 × 60 = 5400 pixels"):
            way(image)


def png_header(width: int, height: int) -> bytes:
    """Build a PNG that is whole and says it has so many pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data


def test_empty_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ImageError, match=r"found an empty file \(0 bytes\) at .*a\.jpg"):
        read_size(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"found 0 bytes at images\[0\]"):
        ImageReader().size(ImageRef(kind="bytes", name="images[0]"))


def test_a_file_may_not_lie_outside_its_root(tmp_path, noise):
    """By `..`, by a link to the file, by a link to its folder; a link that stays inside is none of them."""
    root, outside = tmp_path / "shop", tmp_path / "shop2"  # whose name begins like the root's
    root.mkdir()
    outside.mkdir()
    noise.save(root / "in.png")
    noise.save(outside / "out.png")
    (root / "link.png").symlink_to(outside / "out.png")
    (root / "folder").symlink_to(outside)
    (root / "fine.png").symlink_to(root / "in.png")
    reader = ImageReader()

    def ref(name: str) -> ImageRef:
        return ImageRef(kind="file", name=str(root / name), root=str(root))

    for name in ("in.png", "fine.png", "folder/../shop/in.png"):
        assert reader.size(ref(name)) == reader.decode(ref(name)).size == (90, 60)
    for name in ("../shop2/out.png", "link.png", "folder/out.png", "folder/absent.png"):
        for way in (reader.size, reader.decode):
            with pytest.raises(
                ImageError, match=r"lies outside its folder .*shop \(data\.image_root\), links followed"
            ):
                way(ref(name))
    (tmp_path / "shop3").symlink_to(root)  # the root itself may be a link
    assert reader.size(ImageRef(kind="file", name=str(root / "in.png"), root=str(tmp_path / "shop3"))) == (90, 60)


def test_a_link_put_there_while_a_file_is_opened(tmp_path, noise, monkeypatch):
    """The look for links and the opening were two steps."""
    root, outside = tmp_path / "shop", tmp_path / "outside"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "inner", outside):
        noise.save(folder / "a.png")
    picture = ImageRef(kind="file", name=str(root / "inner" / "a.png"), root=str(root))
    real = os.open

    def swapped(*names):
        def open_after(path, *args, **options):
            found = real(path, *args, **options)
            if str(path) == str(root):  # the first step
                for name in names:
                    (root / name).rename(root / name.replace("a.png", "old.png").replace("inner", "old", 1))
                    (root / name).symlink_to(outside if name == "inner" else outside / "a.png")
            return found

        return open_after

    assert ImageReader().size(picture) == (90, 60)
    for name in ("inner/a.png", "inner"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", swapped(name))
            (root / "old").mkdir(exist_ok=True)
            with pytest.raises(ImageError, match=r"expected the path of an image file, found .*a\.png: "):
                ImageReader().size(picture)
        if name != "inner":
            (root / name).unlink()
            (root / "old" / "old.png").rename(root / name)
            (root / "old").rmdir()


def test_bytes_are_read_like_a_file(tmp_path, noise):
    for suffix in ("png", "jpeg", "webp", "gif", "tiff"):
        stream = io.BytesIO()
        noise.save(stream, suffix)
        image = ImageRef(kind="bytes", name="row 3, image", data=stream.getvalue())
        (tmp_path / "a").write_bytes(stream.getvalue())
        assert ImageReader().size(image) == (90, 60)
        assert ImageReader().decode(image).tobytes() == decode(tmp_path / "a").tobytes()
        cut = ImageRef(kind="bytes", name="row 3, image", data=stream.getvalue()[:-1000])
        with pytest.raises(ImageError, match=r"truncated.*|cannot read the image row 3, image") as caught:
            ImageReader().size(cut)
        assert "row 3, image" in str(caught.value)


def test_state_changes_with_content_and_with_the_way_it_is_read(tmp_path, noise):
    noise.save(tmp_path / "a.png")
    file = ImageRef(kind="file", name=str(tmp_path / "a.png"))
    given = [ImageRef(kind="bytes", name=name, data=data) for name, data in (("a", b"x"), ("b", b"x"), ("a", b"y"))]
    states = [ImageReader().state(image) for image in given]
    assert states[0] == states[1] != states[2]  # of bytes the content counts, not what they are called
    for image in (file, given[0]):
        ways = [ImageReader(), ImageReader(exif="rotate"), ImageReader(max_pixels=10)]
        assert len({reader.state(image) for reader in ways}) == 3
    before = ImageReader().state(file)
    noise.rotate(90).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert ImageReader().state(file) != before
    assert ImageReader().state(ImageRef(kind="file", name=str(tmp_path / "absent.png"))) is None
