"""Values of a foreign configuration: how they must be, and how a wrong one is shown in one line."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, NoReturn

from vl2.errors import UserError

MAX_RANK = 65536  # more than any side of a weight
MAX_ALPHA = 1e9

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """`repr` of a value, cut where it is long or deep."""
    return _SHORT.repr(value)


def rank(path: Path, key: str, value: Any) -> int:
    """Take a rank.

    Raises:
        UserError: it is none.
    """
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise UserError(f"{path}: {key} is {shown(value)}; expected a positive integer up to {MAX_RANK}")
    return value


def alpha(path: Path, key: str, value: Any) -> float:
    """Take an alpha.

    Raises:
        UserError: it is none; NaN and infinity, which Python's JSON knows, are none.
    """
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise UserError(f"{path}: {key} is {shown(value)}; expected a positive number up to {MAX_ALPHA:g}")
    return float(value)


def dropout(path: Path, key: str, value: Any) -> float:
    """Take a dropout; absent is 0.

    Raises:
        UserError: it is no probability.
    """
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise UserError(f"{path}: {key} is {shown(value)}; expected a probability in [0, 1)")
    return float(value)


def flag(path: Path, key: str, value: Any) -> bool:
    """Take true or false; absent is false.

    Raises:
        UserError: it is neither.
    """
    if value is not None and type(value) is not bool:
        raise UserError(f"{path}: {key} is {shown(value)}; expected true or false")
    return bool(value)


def texts(path: Path, key: str, value: Any, expected: str) -> list[str]:
    """Take a list of texts.

    Args:
        path: of the configuration.
        key: where it stands.
        value: what stands there.
        expected: ends the error's text.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{path}: {key} is {shown(value)}; expected {expected}")
    return value


def table(path: Path, key: str, value: Any, expected: str) -> dict[str, Any]:
    """Take a JSON object.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {shown(value)}; expected {expected}")
    return value


def text(path: Path, key: str, value: Any) -> str:
    """Take a text; absent is empty.

    Raises:
        UserError: it is none.
    """
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key} is {shown(value)}; expected a text")
    return value or ""


def refuse(
    path: Path, key: str, value: Any, allowed: str = "only plain LoRA can be read here: A, B and alpha / r"
) -> NoReturn:
    """Refuse a setting of a foreign configuration by its name."""
    raise UserError(f"{path}: {key} is {shown(value)}; {allowed}")
