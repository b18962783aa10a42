"""Safetensors files: what the format allows is read, and anything else is one line that names file and tensor."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

from tests.places import GOLDENS
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError

GOLDEN = GOLDENS / "nano_tiny" / "model.safetensors"


@pytest.fixture
def path(tmp_path) -> Path:
    return Path(shutil.copy(GOLDEN, tmp_path))


def test_header_is_aligned_and_keeps_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones([3], np.float32)}, {"a": "float32"}, {"format": "pt", "note": "é"})
    tensors, metadata, raw = read_header(path)
    assert metadata == {"format": "pt", "note": "é"}
    assert tensors["a"].offset % 8 == 0 and tensors["a"].offset == 8 + len(raw)
    assert tensors["a"].read().tolist() == [1, 1, 1]


def entry(**changes):
    """Changes the first tensor's entry."""

    def change(header):
        name = next(name for name in header if name != "__metadata__")
        header[name].update(changes)
        return header

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(dtype="F8_E4M3"), r"image_newline has type F8_E4M3; expected one of F32, F16, BF16"),
        (entry(dtype="F32"), r"image_newline has 128 bytes, which do not fill \[64\] of float32"),
        (entry(shape=[65]), r"image_newline has 128 bytes, which do not fill \[65\] of bfloat16"),
        (entry(dtype=["BF16"]), r"image_newline has type \['BF16'\]; expected one of F32"),
        (entry(dtype="BF16\n"), r"image_newline has type 'BF16\\n'; expected one of F32"),
        (entry(shape="x"), r"image_newline has the shape x; expected a list of at most 32 sizes"),
        (entry(shape=[-64]), r"image_newline has the shape \[-64\]; expected a list"),
        (entry(shape=[64.0]), r"image_newline has the shape \[64\.0\]; expected a list"),
        (entry(shape=[64, True]), r"image_newline has the shape \[64, True\]; expected a list"),
        (entry(shape=[64] + [1] * 32), r"image_newline has the shape \[64, 1, 1, 1, 1, 1, \.\.\.\]; expected a list"),
        (entry(shape=[2**64, 0]), r"image_newline has the shape \[18446744073709551616, 0\]; expected a list"),
        (entry(data_offsets=[0]), r"image_newline has data_offsets \[0\]; expected \[first byte"),
        (entry(data_offsets=[-128, 0]), r"image_newline has data_offsets \[-128, 0\]; expected \[first byte"),
        (entry(data_offsets=[0.0, 128.0]), r"image_newline has data_offsets \[0\.0, 128\.0\]; expected \[first byte"),
        (entry(data_offsets=[128, 0]), r"image_newline has data_offsets \[128, 0\]; expected \[first byte"),
        (lambda header: [1, 2], r"its header is a JSON list, expected an object of tensors"),
        (lambda header: {"a": {}}, r"a: expected an object with dtype, shape and data_offsets"),
        (lambda header: {"a": 3}, r"a: expected an object with dtype, shape and data_offsets"),
        (lambda header: {**header, "__metadata__": {"format": 3}}, r"__metadata__ .* expected an object of texts"),
        (lambda header: {**header, "__metadata__": [1]}, r"__metadata__ .* expected an object of texts"),
    ],
)
def test_header_that_is_wrong_is_refused(path, change, message):
    """Negative offsets, sizes that are no whole numbers, types in a list and 33 dimensions ended in tracebacks."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    encoded = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    with pytest.raises(UserError, match=r"model\.safetensors: " + message):
        read_header(path)


def header_of(**tensors: tuple[int, int]) -> str:
    """A header's JSON: float16 tensors by the first byte of their values and the byte after the last."""
    entries = [
        f'"{name}": {{"dtype": "F16", "shape": [{(stop - start) // 2}], "data_offsets": [{start}, {stop}]}}'
        for name, (start, stop) in tensors.items()
    ]
    return "{" + ", ".join(entries) + "}"


def write_header(path: Path, header: str) -> None:
    """A file of this header and 8 bytes of values."""
    encoded = header.encode("latin-1")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))


@pytest.mark.parametrize("header", [header_of(a=(0, 4), b=(4, 8)), header_of(b=(4, 8), a=(0, 4), none=(4, 4))])
def test_values_in_any_order_and_tensors_without_values_are_read(path, header):
    write_header(path, header)
    assert [read_header(path).tensors[name].read().tolist() for name in "ab"] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (header_of(a=(0, 4), b=(2, 8)), "b overlaps a"),
        (header_of(a=(0, 8), b=(0, 8)), "b overlaps a"),
        (header_of(a=(0, 2), b=(4, 8)), "b begins 2 bytes behind a"),
        (header_of(a=(2, 8)), "a begins 2 bytes behind the header"),
        (header_of(a=(0, 4)), "4 bytes follow a, which ends the values"),
        ("{}", "8 bytes follow the header"),
        (header_of(a=(0, 4), b=(4, 16)), "but b ends at .* the file is truncated"),
        (header_of(a=(0, 4))[:-1] + ", " + header_of(a=(4, 8))[1:], "its header has a twice"),
        ('{"a": {"dtype": "F16", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "its header has dtype twice"),
        ("[" * 100_000, "its header is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "its header is not JSON"),
        ('{"\\ud800": 3}', r"'\\ud800': expected an object"),
        ('{"a\\nb": 3}', r"'a\\nb': expected an object"),
        ('{"\xff": 3}', "its header is not JSON"),
    ],
)
def test_ranges_and_names_that_the_format_does_not_allow(path, header, message):
    """Overlapping, doubled and missing ranges were taken without a word; deep JSON and half characters ended in a
    traceback. The format's own library refuses all of them too."""
    write_header(path, header)
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert "\n" not in str(error.value)
    str(error.value).encode("utf-8")  # can be printed
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np")


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 100, b"<!DOCTYPE html><html>" * 20])
def test_file_that_is_no_safetensors_is_refused(path, content):
    """A download that ended at once, or that brought the page of an error."""
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.safetensors: {len(content)} bytes, not a whole safetensors file"):
        read_header(path)


def test_header_longer_than_the_format_allows_is_not_read(path):
    """A damaged length of less than the file had gigabytes parsed as JSON."""
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(UserError, match=r"a header of 100000001 bytes is announced, at most 100000000"):
        read_header(path)


def test_file_that_is_not_there_or_is_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(UserError, match=r"no such file; expected a safetensors file"):
            read_header(path)


@pytest.mark.slow
def test_damaged_headers_give_tensors_or_a_users_error(path):
    """Whatever stands in a file that somebody downloaded: never another exception than the one that is printed."""
    draw, whole = random.Random(7), path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            # Digits, brackets and quotes break more than other bytes do.
            content[draw.randrange(length)] = draw.choice((draw.randrange(256), *b'0123456789-.[]{}"\\,:en'))
        path.write_bytes(content)
        try:
            tensors = read_header(path).tensors
            assert sum(tensor.read().nbytes for tensor in tensors.values()) == len(whole) - length
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert 150 < refused < 300
