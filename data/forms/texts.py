"""`texts` of user and assistant in pairs, as The Cauldron and FineVision have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.beside import system_turns, with_pictures
from data.forms.conversation import Conversation, Turn
from data.forms.fields import FieldError, Fields, kind_of, objects_of

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
    turns = system_turns(fields, columns)
    unknown: tuple[str, ...] = ()
    for i, pair in enumerate(pairs):
        entry = Fields(pair, f"texts[{i}]", "an object with user and assistant")
        turns.append(Turn(role="user", content=entry.need_text("user"), where=entry.place("user")))
        turns.append(Turn(role="assistant", content=entry.need_text("assistant"), where=entry.place("assistant")))
        unknown += entry.unknown()
    return with_pictures(fields, columns, turns, unknown)
