"""JSON lines where they lie: encodings, line ends, row numbers, and one pass over the bytes."""

import io
import subprocess
import sys

import numpy as np
import pytest

from data.record import RecordError
from data.settings import SourceSettings
from data.sources import lines
from data.sources.lines import find_lines
from data.sources.open import open_sources
from tests.places import ROOT


def open_one(path, cache=None):
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=cache)
    return rows


def by_hand(content: bytes) -> list[tuple[int, bytes]]:
    found = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [(number, line) for number, line in found if line.strip()]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\n\n\n",
        b"{}",
        b"{}\n",
        b"{}\n\n{}",
        b"\xef\xbb\xbf{}\r\n\r\n  \n [1]\r\n\t\r\n",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf\n{}",
        b" \n\x0b\n{ }",
        b"   ",
        b"\n{}\n",
    ],
)
def test_lines_are_found_whatever_the_blocks(monkeypatch, content, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    found = find_lines(io.BytesIO(content))
    assert found.dtype == np.int64 and found.shape[1] == 3
    assert [(number, content[start:stop]) for start, stop, number in found.tolist()] == by_hand(content)


def test_rows_are_read_by_index(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "一"}\r\n\r\n  \n{"a": "one\u2028two\x85three"}'.encode())
    rows = open_one(path)
    assert [rows[i] for i in range(len(rows))] == [{"a": "一"}, {"a": "one\u2028two\x85three"}]
    assert [rows.number(i) for i in range(len(rows))] == [1, 4]
    assert rows.content(1) == '{"a": "one\u2028two\x85three"}'.encode()
    assert (rows.name, rows.folder) == (str(path), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}\n{messages: 1}\n", r"a\.jsonl, row 2, row: expected a JSON object, found text that is not JSON"),
        (b'{}\n\n{"a": [', r"a\.jsonl, row 3, row: expected a JSON object"),
        (b"{}\n{},\n", r"a\.jsonl, row 2, row: .*Extra data"),
        (b"{}\n" + b"[" * 100_000 + b"]" * 100_000, r"a\.jsonl, row 2, row: .*found one nested too deeply to be read"),
        (b"{}\n" + b'{"a": ' + b"[" * 100_000, r"a\.jsonl, row 2, row: .*found one nested too deeply"),
        (b"{}\n" + b'{"id": ' + b"1" * 5000 + b"}", r"a\.jsonl, row 2, row: .*Exceeds the limit"),
        (b"{}\n\xff\xfe", r"a\.jsonl, row 2, row: expected UTF-8 text, found byte 0 is not"),
    ],
)
def test_bad_row(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    rows = open_one(path)
    assert rows[0] == {}
    with pytest.raises(RecordError, match=message) as caught:
        rows[1]
    assert len(str(caught.value)) < 300


def test_json_as_python_has_it(tmp_path):
    """Of a key given twice the last counts; NaN is a number, which the field that needs a true one refuses."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "a": 2}\n{"b": NaN}\n')
    rows = open_one(path)
    assert rows[0] == {"a": 2}
    assert rows[1]["b"] != rows[1]["b"]


def test_plain_json_waits_for_no_large_import(tmp_path):
    """`datasets` takes seconds to import, and nothing of it reads plain JSON."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    script = (
        "import sys\nfrom data.settings import SourceSettings\nfrom data.sources.open import open_sources\n"
        "(rows,) = open_sources(SourceSettings(path=sys.argv[1]), cache=None)\n"
        "assert rows[0] == {'a': 1}\n"
        "assert not {'datasets', 'pandas', 'zstandard', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.jsonl")], cwd=ROOT, check=True, timeout=100)
