"""`instruction`, `input` and `output`, as Alpaca and LLaMA-Factory have them, with history and system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.conversation import Conversation
from data.forms.fields import Fields
from data.forms.question import read_question

KEYS = ("instruction", "output")  # that a row of this form has
FIELDS = "instruction, input and output (alpaca), history, system, images"


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form; `input` goes into the line after the instruction.

    Raises:
        FieldError: naming the field.
    """
    fields = Fields(row, "", "an object with instruction and output")
    return read_question(fields, columns, question="instruction", more="input", answer="output", history=True)
