"""`conversations` of from and value: LLaVA's and ShareGPT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation, Turn, show_first
from data.forms.fields import FieldError, Fields, kind_of, learned, objects_of, read_images, shown
from data.forms.objects import place_objects
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
    turns: list[Turn] = []
    unknown: tuple[str, ...] = ()
    system_key = columns.get("system", "system")
    system = fields.take_text(system_key)
    if system is not None:
        turns.append(Turn(role="system", content=system, where=fields.place(system_key)))
    for i, entry in enumerate(entries):
        turn, unknown_here = _read_turn(entry, f"conversations[{i}]")
        turns.append(turn)
        unknown += unknown_here
    images = read_images(fields, columns)
    placed, boxes = place_objects(fields, show_first(turns, len(images)))
    return Conversation(turns=tuple(placed), images=tuple(images), boxes=boxes, unknown=unknown + fields.unknown())


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
