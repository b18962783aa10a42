"""`conversations` of from and value: LLaVA's and ShareGPT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.beside import system_turns, with_pictures
from data.forms.conversation import Conversation, Turn
from data.forms.fields import FieldError, Fields, kind_of, learned, objects_of, shown
from vl2.prompt import Role

KEYS = ("conversations",)  # that a row of this form has
FIELDS = "conversations of from and value (LLaVA, ShareGPT), image or images"

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    **dict.fromkeys(("chatgpt", "bing", "bard", "bot", "model"), "assistant"),  # names that ShareGPT's dumps hold
}


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form; some write role and content for from and value.

    Raises:
        FieldError: naming the field.
    """
    fields = Fields(row, "", "an object with conversations")
    entries = objects_of(fields.take("conversations"), "conversations")
    if not isinstance(entries, (list, tuple)) or not entries:
        raise FieldError("conversations", f"expected a list of turns, found {kind_of(row.get('conversations'))}")
    turns = system_turns(fields, columns)
    unknown: tuple[str, ...] = ()
    for i, entry in enumerate(entries):
        turn, unknown_here = _read_turn(entry, f"conversations[{i}]")
        turns.append(turn)
        unknown += unknown_here
    return with_pictures(fields, columns, turns, unknown)


def _read_turn(entry: Any, where: str) -> tuple[Turn, tuple[str, ...]]:
    fields = Fields(entry, where, "an object with from and value")
    key, name = fields.take_any("from", "role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise FieldError(fields.place(key), f"expected system, human or gpt, found {shown(name)}")
    key = "content" if "value" not in fields.value and "content" in fields.value else "value"
    value = fields.value.get(key)
    if not isinstance(value, str):
        raise FieldError(fields.place(key), f"expected a string, found {kind_of(value)}")
    fields.take(key)
    return Turn(role=role, content=value, where=fields.place(key), learn=learned(fields, role)), fields.unknown()
