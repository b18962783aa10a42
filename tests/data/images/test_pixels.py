"""Pictures as a person sees them: every mode, transparency, 16 bits, animations, the EXIF orientation."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from data.images.reader import ImageReader
from data.images.ref import ImageRef

NOISE = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data: bytes, **settings: Any) -> np.ndarray:
    return np.asarray(ImageReader(**settings).decode(ImageRef(kind="bytes", name="it", data=data)))


def size(data: bytes, **settings: Any) -> tuple[int, int]:
    return ImageReader(**settings).size(ImageRef(kind="bytes", name="it", data=data))


def official(data: bytes) -> np.ndarray:
    """`load_pil_images` of deepseek_vl2/utils/io.py."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def opaque(mode: str) -> Image.Image:
    rgb = Image.fromarray(NOISE[..., :3])
    return (
        Image.fromarray(np.dstack([NOISE[..., :3], np.full((6, 9), 255, np.uint8)]))
        if mode == "RGBA"
        else (rgb.convert(mode))
    )


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "png") for mode in ("1", "L", "P", "RGB", "RGBA", "LA")),
        *((mode, "tiff") for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "LAB", "I", "F")),
        *((mode, "jpeg") for mode in ("L", "RGB", "CMYK")),
        *((mode, "webp") for mode in ("RGB", "RGBA")),
        *((mode, "gif") for mode in ("L", "P")),
        *((mode, "bmp") for mode in ("1", "L", "P", "RGB")),
        *((mode, "ppm") for mode in ("1", "L", "RGB")),
    ],
)
def test_what_is_opaque_is_as_the_official_loader_has_it(mode, kind):
    data = encoded(opaque(mode), kind)
    assert np.array_equal(decode(data), official(data))
    assert size(data) == (9, 6)


def test_transparent_pixels_lie_on_white():
    """A logo on a transparent ground came out as black on black: convert("RGB") shows the colour the file hides."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)  # black, from invisible to solid
    for kind in ("png", "webp", "tiff"):
        data = encoded(Image.fromarray(pixels), kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))
        assert decode(data)[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]
        assert official(data)[0].tolist() == [[0] * 3] * 3  # what it replaces


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_one_transparent_colour(mode):
    """PNG's tRNS chunk, and GIF's transparent index."""
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((1, 0), (255, 0, 0) if mode in ("P", "RGB") else (255, 255, 255))
    image = image.convert(mode)
    colour = image.getpixel((0, 0))
    right = [255, 0, 0] if mode in ("P", "RGB") else [255] * 3
    for kind in ("png", *(("gif",) if mode == "P" else ())):
        assert decode(encoded(image, kind, transparency=colour))[0].tolist() == [[255] * 3, right]
        assert decode(encoded(image, kind))[0].tolist() == [[0] * 3, right]


def test_palette_with_alpha_values():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0] * 3)
    for i in range(3):
        image.putpixel((i, 0), i)
    assert decode(encoded(image, "png", transparency=b"\x00\x80\xff"))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


GREY = np.array([[0, 257, 32768, 65535]], np.uint16)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_of_grey_are_scaled(kind):
    """A scan or an X-ray of 16 bits was white wherever it was not black: convert("RGB") cuts at 255."""
    data = encoded(Image.fromarray(GREY), kind)
    assert decode(data)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    assert official(data)[0].tolist() == [[0] * 3, [255] * 3, [255] * 3, [255] * 3]  # what it replaces


def test_16_bits_of_grey_with_a_transparent_value():
    data = encoded(Image.fromarray(GREY), "png", transparency=257)
    assert decode(data)[0].tolist() == [[0] * 3, [255] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize(("bits", "photometric", "grey"), [(12, 1, [255, 0]), (16, 1, [255, 4]), (16, 0, [0, 251])])
def test_bits_and_white_of_a_grey_tiff(bits, photometric, grey):
    """A microscope's 12 bits end at 4095, and where white is zero the picture was its own negative."""
    values = b"\xff\xf0\x00" if bits == 12 else struct.pack("<2H", 65535, 1028)
    fields = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    fields.append((279, len(values)))
    data = b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(fields))
    data += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in fields) + bytes(4)
    assert decode(data)[0, :, 0].tolist() == grey


def test_adobes_inverted_cmyk():
    """Photoshop stores CMYK in JPEGs as 255 minus the ink, and says so in an Adobe segment."""
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode(data)[0, 0].astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() <= 2
    assert size(data) == (9, 6)


# What each orientation does to [[a, b, c], [d, e, f]], by EXIF 2.3, 4.6.4: where row 0 and column 0 are seen.
SEEN = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}
COLOURS = {letter: (40 * i, 255 - 40 * i, 128) for i, letter in enumerate("abcdef")}


def drawn(rows: list[str]) -> np.ndarray:
    """Each letter as a block of 16 x 16 pixels of its colour, so that a JPEG keeps it."""
    return np.array([[COLOURS[letter] for letter in row] for row in rows], np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("number", SEEN)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_orientation_turns_pixels_and_the_size_in_the_header(kind, number):
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(Image.fromarray(drawn(SEEN[1])), kind, exif=exif)
    for way, rows in (("ignore", SEEN[1]), ("rotate", SEEN[number])):
        pixels = decode(data, exif=way)
        assert pixels.shape == drawn(rows).shape
        assert np.abs(pixels.astype(int) - drawn(rows))[8::16, 8::16].max() < 10  # in the middle of each block
        assert size(data, exif=way) == pixels.shape[1::-1]
    assert np.array_equal(decode(data), official(data))


@pytest.mark.parametrize("number", SEEN)
def test_orientation_of_a_tiff_is_pillows(number):
    """Pillow applies it while it decodes, so the official loader does, and nobody may do it twice."""
    data = encoded(Image.fromarray(drawn(SEEN[1])), "tiff", tiffinfo={0x0112: number})
    for way in ("ignore", "rotate"):
        assert np.array_equal(decode(data, exif=way), drawn(SEEN[number]))
        assert size(data, exif=way) == drawn(SEEN[number]).shape[1::-1]
    assert np.array_equal(decode(data), official(data))


def test_exif_behind_the_pixels_of_a_png():
    """The eXIf chunk may follow the pixels, where only decoding comes by: header and pixels disagreed."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(drawn(SEEN[1])), "png", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    iend = data.index(b"IEND") - 4
    moved = data[:start] + data[end:iend] + data[start:end] + data[iend:]
    assert decode(moved, exif="rotate").shape[1::-1] == size(moved, exif="rotate") == (32, 48)
    assert decode(moved).shape[1::-1] == size(moved) == (48, 32)


def test_orientation_in_xmp():
    """Some editors write it there alone."""
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    data = encoded(Image.fromarray(drawn(SEEN[1])), "png", pnginfo=text)
    assert decode(data, exif="rotate").shape[1::-1] == size(data, exif="rotate") == (32, 48)


@pytest.mark.parametrize("block", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_exif_that_cannot_be_read_turns_nothing(block):
    data = encoded(Image.fromarray(drawn(SEEN[1])), "jpeg", exif=block)
    assert decode(data, exif="rotate").shape[1::-1] == size(data, exif="rotate") == (48, 32)


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_orientation_that_is_none_turns_nothing(number):
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(Image.fromarray(drawn(SEEN[1])), "webp", exif=exif)
    assert decode(data, exif="rotate").shape[1::-1] == size(data, exif="rotate") == (48, 32)


def test_header_of_a_png_is_enough_to_turn_it(monkeypatch):
    """`getexif()` of a PNG without EXIF decodes it whole, for a chunk that might follow: 20 times as slow."""
    data = encoded(Image.fromarray(drawn(SEEN[1])), "png")
    monkeypatch.setattr(PngImageFile, "load", lambda image: pytest.fail("decoded"))
    assert size(data, exif="rotate") == (48, 32)
