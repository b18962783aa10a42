"""What every form of a row becomes before it is checked: turns, pictures, boxes, as the row says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message as a row has it; nothing of it has been checked but its type."""

    role: str
    """As DeepSeek-VL2's template knows them: system, user, assistant."""
    content: str
    """Text, with <image> where a picture stands and <bbox> where boxes stand."""
    where: str
    """Its place in the row, for errors: messages[1].content."""
    learn: bool | None = None
    """Whether the answer is learned; None: the row does not say."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row, whatever its form was."""

    turns: tuple[Turn, ...]
    images: tuple[tuple[str, Any], ...]
    """(place in the row, value) of each picture: a path, an address, a data URI, base64, bytes, {"bytes", "path"}."""
    boxes: tuple[Any, ...] = ()
    """Boxes of each <bbox> in the turns, in order: `data.boxes.Box` tuples."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Columns that no form knows and that change no meaning, which are counted and reported."""
