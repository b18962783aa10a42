"""Facts on disk: frozen dataclasses as JSON, written in one rename, read strictly and by format version.

    {"format": 2, "recipe": "sft_tiny", ...}  <->  RunMarker(recipe="sft_tiny", ...)

Format 1 is what was written before the documents said a format. A class whose fields were others then has a static
method `from_format_1`, which turns such a document into today's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from vl2.errors import UserError

FORMAT = 2

Fact = TypeVar("Fact")


def to_document(fact: Any) -> dict[str, Any]:
    """A fact as JSON values, with its format version."""
    return {"format": FORMAT, **asdict(fact)}


def from_document(kind: type[Fact], document: Any, where: str) -> Fact:
    """A fact from JSON values.

    Args:
        kind: dataclass of the fact.
        document: what `to_document` or an earlier format wrote.
        where: file, for the message.

    Raises:
        UserError: a later format, or a field that is missing, unknown or of another type; names file and field.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{where}: expected a JSON object, found {_short(document)}")
    fields = dict(document)
    version = fields.pop("format", 1)
    if isinstance(version, bool) or version not in (1, FORMAT):
        raise UserError(
            f"{where}: format is {_short(version)}; formats up to {FORMAT} are read, a later version wrote it"
        )
    if version == 1 and hasattr(kind, "from_format_1"):
        fields = kind.from_format_1(fields)  # type: ignore[attr-defined]
    try:
        # As JSON, in which a list may stand for a tuple; `strict` refuses "1" and 1.0 for 1.
        return _adapter(kind).validate_json(json.dumps(fields), strict=True, extra="forbid")  # type: ignore[arg-type]
    except ValidationError as problem:
        raise UserError(f"{where}: {_first_error(problem)}") from problem


def read_fact(kind: type[Fact], path: Path) -> Fact:
    """A fact from its file.

    Raises:
        UserError: a file that cannot be read or is not JSON; see also `from_document`.
    """
    try:
        document = from_json(path.read_bytes())
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({problem.strerror})") from problem
    except ValueError as problem:
        raise UserError(f"{path}: not JSON ({problem})") from problem
    return from_document(kind, document, str(path))


def write_fact(path: Path, fact: Any) -> None:
    """Write a fact into its file: after a crash the old one or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(to_document(fact), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_error(problem: ValidationError) -> str:
    """`field: what was expected, what was found`, with the number of further ones."""
    errors = problem.errors(include_url=False)
    first, more = errors[0], len(errors) - 1
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    if first["type"] == "missing":
        text = f"{field} is missing"
    elif first["type"] == "unexpected_keyword_argument":
        text = f"{field} is unknown"
    else:
        text = f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, found {_short(first['input'])}"
    return text + (f" (and {more} more)" if more else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
