"""What every form of a row becomes before it is checked: turns, pictures, boxes, as the row says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.boxes import Box
from vl2.prompt import IMAGE_PLACEHOLDER, Role


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message as a row has it; nothing of it has been checked but its type."""

    role: Role
    """As DeepSeek-VL2's template knows them: system, user, assistant."""
    content: str
    """Text, with <image> where a picture stands and <bbox> where boxes stand."""
    where: str
    """Place of its text in the row, for errors: messages[1].content."""
    learn: bool | None = None
    """Whether the answer is learned; None: the row does not say."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row, whatever its form was."""

    turns: tuple[Turn, ...]
    images: tuple[tuple[str, Any], ...]
    """(place in the row, value) of each picture: a path, an address, a data URI, base64, bytes, {"bytes", "path"}."""
    boxes: tuple[tuple[Box, ...], ...] = ()
    """Boxes of each <bbox> in the turns, in order."""
    answers: tuple[str, ...] = ()
    """What the row calls right answers to its last question, for metrics; learned is the last turn."""
    unknown: tuple[str, ...] = ()
    """Fields that no form knows and that change no meaning, which are counted and reported: id, messages[].name."""


def show_first(turns: list[Turn], num_images: int) -> list[Turn]:
    """Put pictures for which no turn has a placeholder before the first question, each in a line of its own.

    That is where LLaVA's loader and the official demo of DeepSeek-VL2 put them.

    Example: one picture and "What is this?" become "<image>\\nWhat is this?".
    """
    if not num_images or any(IMAGE_PLACEHOLDER in turn.content for turn in turns):
        return turns
    for i, turn in enumerate(turns):
        if turn.role == "user":
            content = f"{IMAGE_PLACEHOLDER}\n" * num_images + turn.content
            first = Turn(role="user", content=content, where=turn.where, learn=turn.learn)
            return [*turns[:i], first, *turns[i + 1 :]]
    return turns
