"""JSON arrays: elements found block by block, and what is wrong said with the row reached."""

import io
import json
import random

import pytest

from data.record import RecordError
from data.settings import SourceSettings
from data.sources import array
from data.sources.array import ArrayError, ArrayScanner, find_elements
from data.sources.open import open_sources
from vl2.errors import UserError


def open_one(path, cache=None):
    (rows,) = open_sources(SourceSettings(path=str(path)), cache=cache)
    return rows


def some_value(chance: random.Random, depth: int = 0):
    kind = chance.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return "".join(chance.choice('ab"\\[]{},\n é') for _ in range(chance.randrange(9)))
    if kind == 1:
        return chance.choice([7, -1.5e9, True, None])
    if kind == 2:
        return [some_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {f"{i}\\": some_value(chance, depth + 1) for i in range(3)}


@pytest.mark.parametrize("block", [1, 2, 3, 17, 1 << 20])
def test_elements_are_found_whatever_the_blocks(monkeypatch, block):
    """A border between blocks may lie behind a backslash, inside a string, or between two brackets."""
    monkeypatch.setattr(array, "BLOCK", block)
    chance = random.Random(block)
    for _ in range(60):
        values = [some_value(chance) for _ in range(chance.randrange(5))]
        text = json.dumps(values, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5).encode()
        text = chance.choice([b"", b" \n", b"\xef\xbb\xbf"]) + text + chance.choice([b"", b"\n \n"])
        found = find_elements(io.BytesIO(text)).tolist()
        assert [json.loads(text[start:stop]) for start, stop, _ in found] == values
        assert [number for _, _, number in found] == list(range(1, len(values) + 1))


def test_the_example_of_the_docstring():
    assert ArrayScanner().feed(b'[1, "],"]').tolist() == [0, 2, 8]


@pytest.mark.parametrize(
    ("text", "message", "elements"),
    [
        (b'[{"a": 1}, {"b": 2}', r"expected the array to end with \]", 1),
        (b"[", "expected the array to end", 0),
        (b'["a', "expected the array to end", 0),
        (b"[1, 2] [3]", r"expected nothing after the array's closing \], found b'\[", 2),
        (b"[1, 2]]", "expected nothing after", 2),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_what_is_not_one_whole_array(monkeypatch, text, message, elements, block):
    monkeypatch.setattr(array, "BLOCK", block)
    with pytest.raises(ArrayError, match=message) as caught:
        find_elements(io.BytesIO(text))
    assert caught.value.elements == elements


def test_rows_of_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": "é"},\n {"a": [1, 2]}\n]\n', "utf-8")
    rows = open_one(path)
    assert [rows[i] for i in range(len(rows))] == [{"a": "é"}, {"a": [1, 2]}]
    assert [rows.number(i) for i in range(len(rows))] == [1, 2]
    assert rows.content(1) == b'{"a": [1, 2]}'


@pytest.mark.parametrize("text", ["[]", "[ \n ]", " []\n"])
def test_an_array_without_elements(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert len(open_one(tmp_path / "a.json")) == 0


def test_a_comma_too_many_is_a_bad_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1},\n]')
    rows = open_one(tmp_path / "a.json")
    assert rows[0] == {"a": 1}
    with pytest.raises(RecordError, match=r"^[^ ]*a\.json, row 2, row: found nothing between two commas .*; remove"):
        rows[1]


def test_an_array_that_breaks_off_names_the_row(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, {"a"')
    with pytest.raises(UserError, match=r"a\.json: expected the array to end with \], .*, after row 2; write"):
        open_one(tmp_path / "a.json")


def test_a_quote_left_open_is_found_where_it_is(tmp_path):
    """It turns all strings after it inside out: elements seem to end in the middle of texts, the array nowhere."""
    (tmp_path / "a.json").write_text('[{"a": "x"}, {"a": "x}, {"a": "}, {"}, {"a": "}, {"}]')
    with pytest.raises(UserError, match=r"a\.json, row 2, row: expected a JSON object, found text that is not JSON"):
        open_one(tmp_path / "a.json")


def test_errors_of_a_row_over_several_lines_say_which(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {\n "a": 1\n "b": 2}]')
    with pytest.raises(RecordError, match=r"row 2, row: .*\(Expecting ',' delimiter, line 3 of the row, column 2\)"):
        open_one(tmp_path / "a.json")[1]


def test_one_object_over_several_lines_is_told_from_json_lines(tmp_path):
    """As lines each of them would be a bad row, and with on_bad_record=skip a hundred of them."""
    (tmp_path / "a.json").write_text(json.dumps({"messages": []}, indent=1))
    with pytest.raises(UserError, match=r"a\.json: expected JSON lines, .*, found an object over several lines; write"):
        open_one(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"messages": []}')
    assert open_one(tmp_path / "b.json")[0] == {"messages": []}
