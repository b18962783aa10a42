"""`texts` of user and assistant in pairs, as The Cauldron and FineVision have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation, Turn, show_first
from data.forms.fields import FieldError, Fields, kind_of, objects_of, read_images
from data.forms.objects import place_objects

KEYS = ("texts",)  # that a row of this form has
FIELDS = "texts of user and assistant (The Cauldron, FineVision), images"


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form.

    Raises:
        FieldError: naming the field.
    """
    fields = Fields(row, "", "an object with texts")
    pairs = objects_of(fields.take("texts"), "texts")
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise FieldError("texts", f"expected a list of pairs, found {kind_of(row.get('texts'))}")
    turns: list[Turn] = []
    unknown: tuple[str, ...] = ()
    system_key = columns.get("system", "system")
    system = fields.take_text(system_key)
    if system is not None:
        turns.append(Turn(role="system", content=system, where=fields.place(system_key)))
    for i, pair in enumerate(pairs):
        entry = Fields(pair, f"texts[{i}]", "an object with user and assistant")
        turns.append(Turn(role="user", content=entry.need_text("user"), where=entry.place("user")))
        turns.append(Turn(role="assistant", content=entry.need_text("assistant"), where=entry.place("assistant")))
        unknown += entry.unknown()
    images = read_images(fields, columns)
    placed, boxes = place_objects(fields, show_first(turns, len(images)))
    return Conversation(turns=tuple(placed), images=tuple(images), boxes=boxes, unknown=unknown + fields.unknown())
