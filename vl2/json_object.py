"""JSON objects from foreign files: whatever else stands in one is a line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vl2.errors import UserError


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is none, or not in UTF-8.
    """
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(content: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object from a text, or from its UTF-8.

    Args:
        content: all of it.
        where: what it is, for errors.

    Raises:
        UserError: it is none.
    """
    try:
        document = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number of thousands of digits, is a ValueError
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise UserError(f"{where}: expected a JSON object, found a {type(document).__name__}")
    return document
