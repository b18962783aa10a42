"""The line reader: encodings, line ends, row numbers."""

import json
import os
from pathlib import Path

import pytest

from data.jsonl import read_records
from data.record import BadRecords
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)


def row(question: str, answer: str = "ok") -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + row("一") + "\r\n\r\n  \n" + row("二", "答"))
    records = read_records(path, tokenizer=TOKENIZER)
    assert [(record.row, record.messages[0].content) for record in records] == [(1, "一"), (4, "二")]
    assert records[0].source == str(path)


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    """str.splitlines would break a row at U+2028, which JSON allows in a string."""
    path = write(tmp_path / "a.jsonl", row("one\u2028two\x85three") + "\n")
    assert [record.messages[0].content for record in read_records(path, tokenizer=TOKENIZER)] == [
        "one\u2028two\x85three"
    ]


def test_image_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl", row("<image>")[:-1] + ', "images": ["../p.png"]}')
    monkeypatch.chdir(tmp_path)
    (record,) = read_records("sub/a.jsonl", tokenizer=TOKENIZER)
    assert [image.name for image in record.images] == [str(tmp_path / "p.png")]
    assert record.source == "sub/a.jsonl"


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: expected a data file .*, found nothing there"):
        read_records(tmp_path / "none.jsonl", tokenizer=TOKENIZER)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="found no regular file there"):
        read_records(tmp_path / "pipe", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="found a folder there"):
        read_records(tmp_path, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (row("a") + "\n{messages: 1}\n", r"a\.jsonl, row 2, row: expected a JSON object, found text that is not JSON"),
        (row("a") + "\n\n" + row("b")[:-5], r"a\.jsonl, row 3, row: expected a JSON object"),
        ("[\n" + row("a") + "\n]", r"a\.jsonl, row 1, row: .*holds one whole object a line"),
        (row("a") + "\n" + row("b") + ",\n", r"a\.jsonl, row 2, row: .*Extra data"),
        (
            row("a") + "\n" + "[" * 100_000 + "]" * 100_000,
            r"a\.jsonl, row 2, row: .*found one nested too deeply to be read",
        ),
        (row("a") + "\n" + '{"messages": ' + "[" * 100_000, r"a\.jsonl, row 2, row: .*found one nested too deeply"),
        (row("a") + "\n" + row("b")[:-1] + ', "id": ' + "1" * 5000 + "}", r"a\.jsonl, row 2, row: .*Exceeds the limit"),
        (row("a").encode() + b"\n\xff\xfe", r"a\.jsonl, row 2, row: expected UTF-8 text, found byte 0 is not"),
        (row("a") + "\n[1]", r"a\.jsonl, row 2, row: expected a JSON object with messages and images, found a list"),
        (row("a") + "\n" + row("b", "<image>"), r"a\.jsonl, row 2, messages\[1\]\.content: found <image> in an answer"),
    ],
)
def test_bad_row(tmp_path, content, message):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=message):
        read_records(path, tokenizer=TOKENIZER)


def test_skipped_rows_are_listed(tmp_path):
    rows = [
        "oops",
        row("a"),
        row("b", ""),
        row("c"),
        "[" * 100_000,
        "1" * 5000,
        row("\ud800").replace("\ud800", "\\ud800"),
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    bad = BadRecords(on_bad_record="skip", max_bad=5)
    records = read_records(path, tokenizer=TOKENIZER, bad=bad)
    assert [record.row for record in records] == [2, 4]
    found = [(error.row, error.where) for error in bad.skipped]
    assert found == [
        (1, "row"),
        (3, "messages[1].content"),
        (5, "row"),
        (6, "row"),
        (7, "messages[0].content"),
    ]
