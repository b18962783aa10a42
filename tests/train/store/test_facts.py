"""Facts on disk: what is written comes back, what is not ours is refused by file and field, format 1 is read."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from train.store.facts import from_document, read_fact, to_document, write_fact


@dataclass(frozen=True, kw_only=True)
class Inner:
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One field of each type that facts have."""

    name: str
    number: int
    part: float
    known: bool
    inner: Inner
    table: dict[str, float]
    maybe: str | None

    @staticmethod
    def from_format_1(document: dict[str, Any]) -> dict[str, Any]:
        return {"maybe": None, **document}


EXAMPLE = Example(name="方", number=3, part=0.5, known=True, inner=Inner(rows=(1, 2)), table={"a": 1.5}, maybe="x")


def test_what_is_written_is_read(tmp_path):
    write_fact(tmp_path / "fact.json", EXAMPLE)
    assert read_fact(Example, tmp_path / "fact.json") == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["fact.json"]
    assert "方" in (tmp_path / "fact.json").read_text(encoding="utf-8")


def test_format_1_had_fewer_fields():
    document = to_document(EXAMPLE)
    del document["format"], document["maybe"]
    assert from_document(Example, document, "old.json").maybe is None
    with pytest.raises(ValueError, match=r"^old\.json: maybe is missing$"):
        from_document(Example, {**document, "format": 2}, "old.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 3.0}, r"number: input should be a valid integer, found 3\.0"),
        ({"number": "3"}, "number: input should be a valid integer"),
        ({"number": True}, "number: input should be a valid integer"),
        ({"known": 1}, "known: input should be a valid boolean"),
        ({"name": None}, "name: input should be a valid string, found null"),
        ({"inner": {"rows": [1, "2"]}}, r"inner\.rows\.1: input should be a valid integer"),
        ({"inner": {"rows": [1], "more": 1}}, r"inner\.more is unknown"),
        ({"table": {"a": []}}, r"table\.a: input should be a valid number"),
        ({"stray": 1}, "stray is unknown"),
        ({"stray": 1, "other": 2}, r"stray is unknown \(and 1 more\)"),
        ({"format": 3}, "format is 3; formats up to 2 are read, a later version wrote it"),
        ({"format": "2"}, 'format is "2"'),
        ({"format": True}, "format is true"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ValueError, match=f"^run/fact.json: {message}"):
        from_document(Example, {**to_document(EXAMPLE), **change}, "run/fact.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"name": "x"', "not JSON"),
        (b"[1, 2]", r"expected a JSON object, found \[1, 2\]"),
        (b"{}", r"name is missing \(and 5 more\)"),
        (b'{"name": "\xff"}', "not JSON"),
        (b'{"name":' + b"[" * 100_000, "not JSON"),
        (b'{"number": ' + b"1" * 5000 + b"}", "not JSON|number"),
    ],
)
def test_a_file_that_is_none_of_ours_is_one_line(tmp_path, content, message):
    """A run.json cut off by a crash, or `{}`, gave tracebacks or counted as a run."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"run.json: ({message})") as error:
        read_fact(Example, path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_fact(Example, path)


def test_a_crash_while_writing_leaves_the_old_fact(tmp_path, monkeypatch):
    path = tmp_path / "fact.json"
    write_fact(path, EXAMPLE)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "half")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_fact(path, EXAMPLE)
    monkeypatch.undo()
    assert read_fact(Example, path) == EXAMPLE
