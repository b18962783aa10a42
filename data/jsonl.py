"""Reads conversations from a JSON-lines file, row by row, and knows the row's number when something is wrong."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from data.record import BadRecords, Record, RecordError, parse_record
from data.settings import ReadSettings, SourceSettings, SpecialTokens
from vl2.errors import UserError
from vl2.tokenizer import Tokenizer


def read_records(
    path: str | PathLike[str],
    *,
    tokenizer: Tokenizer,
    special_tokens: SpecialTokens = "error",
    bad: BadRecords | None = None,
) -> list[Record]:
    """Read a file with one JSON object a line, `messages` and (optionally) `images`.

    A byte order mark, CRLF line ends and blank lines are passed over; row numbers are line numbers, so that an
    editor jumps to them. Image paths are relative to the file.

    Args:
        path: the file, UTF-8.
        tokenizer: knows the special tokens a text must not hold.
        special_tokens: "error" refuses them, "neutralise" encodes them as ordinary text.
        bad: what to do with rows that cannot be used; without it the first raises.

    Raises:
        UserError: no such file, or a row that cannot be used (`RecordError`).
    """
    bad = bad if bad is not None else BadRecords()
    file = Path(path)
    source = str(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no regular file" if file.exists() else "nothing"
        raise UserError(f"{source}: expected a data file (JSON lines: one conversation a line), found {found} there")
    folder = file.absolute().parent
    settings, of = ReadSettings(special_tokens=special_tokens), SourceSettings(path=source)

    records = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                bad.add(RecordError(source, number, "row", f"expected UTF-8 text, found byte {error.start} is not"))
                continue
            except json.JSONDecodeError as error:
                bad.add(RecordError(source, number, "row", _not_json(text, error)))
                continue
            except RecursionError:
                bad.add(
                    RecordError(source, number, "row", "expected a JSON object, found one nested too deeply to be read")
                )
                continue
            except ValueError as error:  # a number of thousands of digits
                bad.add(RecordError(source, number, "row", f"expected a JSON object that can be read, found: {error}"))
                continue
            try:
                record = parse_record(
                    row,
                    source=source,
                    row_number=number,
                    folder=folder,
                    tokenizer=tokenizer,
                    settings=settings,
                    of=of,
                )
            except RecordError as problem:
                bad.add(problem)
                continue
            records.append(record)
    return records


def _not_json(text: str, error: json.JSONDecodeError) -> str:
    problem = f"expected a JSON object, found text that is not JSON ({error.msg}, column {error.colno}): {text[:40]!r}"
    if text.startswith("[") or text == "{":
        problem += "; a file of JSON lines holds one whole object a line, without brackets or commas around them"
    return problem
