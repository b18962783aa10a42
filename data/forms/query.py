"""`query` and `response`, as ms-swift has them, with history and system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation
from data.forms.fields import Fields
from data.forms.question import read_question

KEYS = ("query", "response")  # that a row of this form has
FIELDS = "query and response (ms-swift), history, system, images, objects"


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form.

    Raises:
        FieldError: naming the field.
    """
    fields = Fields(row, "", "an object with query and response")
    return read_question(fields, columns, question="query", answer="response", history=True)
