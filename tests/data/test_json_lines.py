"""JSON lines become records: encodings, line ends, row numbers, what is wrong with a row."""

import json
from pathlib import Path

import pytest

from data.record import Record, RecordError
from data.records import RecordReader
from data.settings import ReadSettings, SourceSettings
from data.sources.open import open_sources
from tests.places import NANO_BPE
from vl2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(NANO_BPE)


def row(question: str, answer: str = "ok") -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reader_of(path: Path | str) -> RecordReader:
    of = SourceSettings(path=str(path))
    (rows,) = open_sources(of, cache=None)
    return RecordReader(rows=rows, of=of, settings=ReadSettings(), tokenizer=TOKENIZER)


def read_records(path: Path | str) -> list[Record]:
    reader = reader_of(path)
    return [reader.read(i) for i in range(len(reader.rows))]


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + row("一") + "\r\n\r\n  \n" + row("二", "答"))
    records = read_records(path)
    assert [(record.row, record.messages[0].content) for record in records] == [(1, "一"), (4, "二")]
    assert records[0].source == str(path)


def test_line_separators_inside_a_text_do_not_split_it(tmp_path):
    """str.splitlines would break a row at U+2028, which JSON allows in a string."""
    path = write(tmp_path / "a.jsonl", row("one\u2028two\x85three") + "\n")
    assert [record.messages[0].content for record in read_records(path)] == ["one\u2028two\x85three"]


def test_image_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.jsonl", row("<image>")[:-1] + ', "images": ["../p.png"]}')
    monkeypatch.chdir(tmp_path)
    (record,) = read_records("sub/a.jsonl")
    assert [image.name for image in record.images] == [str(tmp_path / "p.png")]
    assert record.source == "sub/a.jsonl"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (row("a") + "\n{messages: 1}\n", r"a\.jsonl, row 2, row: expected a JSON object, found text that is not JSON"),
        (row("a") + "\n\n" + row("b")[:-5], r"a\.jsonl, row 3, row: expected a JSON object"),
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
        read_records(path)


def test_bad_rows_do_not_hide_the_others(tmp_path):
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
    reader, found = reader_of(path), []
    for i in range(len(reader.rows)):
        try:
            reader.read(i)
        except RecordError as error:
            found.append((error.row, error.where))
    assert found == [
        (1, "row"),
        (3, "messages[1].content"),
        (5, "row"),
        (6, "row"),
        (7, "messages[0].content"),
    ]
