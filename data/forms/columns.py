"""Columns of a table that the user named: `data.columns={user: question, assistant: answer, image: picture}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation
from data.forms.fields import Fields
from data.forms.question import read_question

FIELDS = "two columns, named by data.columns={user: ..., assistant: ...}, perhaps image and system"


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form.

    Raises:
        FieldError: naming the column.
    """
    fields = Fields(row, "", "an object with a question and an answer")
    return read_question(fields, columns, question=columns["user"], answer=columns["assistant"], history=False)
