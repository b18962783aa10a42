"""DeepSeek-VL2's own conversations: a bare list, or `conversation`, of role, content and images in the message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation
from data.forms.fields import Fields
from data.forms.messages import read_conversation

KEYS = ("conversation",)  # that a row of this form has
FIELDS = "a list, or conversation, of role, content and images, with the roles <|User|> and <|Assistant|>"


def read(row: Any, columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form.

    Raises:
        FieldError: naming the field.
    """
    if not isinstance(row, Mapping):
        return read_conversation(Fields({}, "", "an object"), row, "row", columns)
    fields = Fields(row, "", "a JSON object with a conversation")
    fields.take("conversation")
    return read_conversation(fields, row.get("conversation"), "conversation", columns)
