"""The table of forms, and which of them a row has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.boxes import BOX_PLACEHOLDER
from data.forms import alpaca, columns, conversations, deepseek_vl2, messages, query, texts
from data.forms.conversation import Conversation
from data.forms.fields import FieldError, is_empty, kind_of, shown
from data.forms.objects import LABEL_PLACEHOLDER
from data.settings import SourceSettings
from vl2.errors import UserError
from vl2.prompt import IMAGE_PLACEHOLDER

AUTO = "auto"
COLUMNS = ("user", "assistant", "system", "image")  # what `data.columns` may name

Columns = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form that rows come in."""

    keys: tuple[str, ...]
    """Fields that every row of it has, and by which it is found; of columns, those that the user named."""
    fields: str
    """All its fields, for errors."""
    read: Callable[[Any, Columns], Conversation]
    """(row, user's names of columns) -> what the row says."""


FORMS: dict[str, Form] = {
    "messages": Form(keys=messages.KEYS, fields=messages.FIELDS, read=messages.read),
    "conversations": Form(keys=conversations.KEYS, fields=conversations.FIELDS, read=conversations.read),
    "deepseek_vl2": Form(keys=deepseek_vl2.KEYS, fields=deepseek_vl2.FIELDS, read=deepseek_vl2.read),
    "query": Form(keys=query.KEYS, fields=query.FIELDS, read=query.read),
    "alpaca": Form(keys=alpaca.KEYS, fields=alpaca.FIELDS, read=alpaca.read),
    "texts": Form(keys=texts.KEYS, fields=texts.FIELDS, read=texts.read),
    "columns": Form(keys=(), fields=columns.FIELDS, read=columns.read),
}


def _found(row: Any, of: Columns) -> list[str]:
    """Names of the forms whose fields a row has."""
    if isinstance(row, Mapping):
        return [name for name, keys in _keys(of).items() if all(not is_empty(row.get(key)) for key in keys)]
    is_talk = isinstance(row, (list, tuple)) and any(isinstance(message, Mapping) for message in row)
    return ["deepseek_vl2"] if is_talk else []


def _meant(row: Any, of: Columns) -> str:
    """Name of the form that a row seems to be meant to have, so that its error can say what is missing; or empty."""
    if not isinstance(row, Mapping):
        return ""
    near = [name for name, keys in _keys(of).items() if any(key in row for key in keys)]
    return near[0] if len(near) == 1 else ""


def _keys(of: Columns) -> dict[str, tuple[str, ...]]:
    keys = {name: form.keys for name, form in FORMS.items() if form.keys}
    return {**keys, "columns": (of["user"], of["assistant"])} if "user" in of and "assistant" in of else keys


def check_form(of: SourceSettings) -> None:
    """Check that a source's form is known, that its columns are named as they can be, and its system message.

    Raises:
        UserError: naming the key.
    """
    if of.form != AUTO and of.form not in FORMS:
        raise UserError(f"data.form: expected auto, {', '.join(FORMS)}, found {shown(of.form)}")
    for slot in (IMAGE_PLACEHOLDER, BOX_PLACEHOLDER, LABEL_PLACEHOLDER):
        if slot in of.system:
            raise UserError(f"data.system: expected a text, found {slot} in it, which only a row can fill; remove it")
    wrong = [key for key in of.columns if key not in COLUMNS]
    if wrong:
        raise UserError(
            f"data.columns: expected {', '.join(COLUMNS)}, each with the name of a column, found {shown(wrong[0])}"
        )
    names = list(of.columns.values())
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data.columns: expected a column of its own for each, found {shown(twice)} twice")
    asked = {"user", "assistant"} & set(of.columns)
    if len(asked) == 1 or (of.form == "columns" and not asked):
        raise UserError(
            "data.columns: expected the names of both columns, data.columns={user: ..., assistant: ...}, "
            f"found {shown(dict(of.columns))}"
        )


def find_form(row: Any, of: SourceSettings) -> str:
    """Find the form of a row by its fields, or return the one that the user said.

    Args:
        row: the decoded row.
        of: the source; its `form` decides where it is not auto, columns of a question and an answer likewise.

    Raises:
        FieldError: no form, or several, have the row's fields.
        UserError: the source says a form or columns that there are not.
    """
    check_form(of)
    if of.form != AUTO:
        return of.form
    if "user" in of.columns:
        return "columns"
    found = _found(row, of.columns)
    if len(found) == 1:
        return found[0]
    if not isinstance(row, Mapping):
        raise FieldError("row", f"expected a JSON object with messages and images, found {kind_of(row)}")
    listed = "; ".join(f"{name}: {form.fields}" for name, form in FORMS.items())
    which = f"those of {' and '.join(found)}" if found else "those of none"
    raise FieldError(
        "row",
        f"expected the fields of one form, found {which} among {shown(sorted(map(str, row)))}. The forms are {listed}. "
        "Say which with data.form=NAME, or name the columns with data.columns={user: ..., assistant: ..., image: ...}",
    )


def read_row(row: Any, form: str, of: SourceSettings) -> Conversation:
    """Read a row in a form.

    Args:
        row: the decoded row.
        form: name of the form; auto finds it by the row's own fields.
        of: the source.

    Raises:
        FieldError: the row has another form, or fields that cannot be used.
        UserError: the source says a form or columns that there are not.
    """
    if form == AUTO:
        form = (of.form == AUTO and not _found(row, of.columns) and _meant(row, of.columns)) or find_form(row, of)
    asked = FORMS[form]
    if asked.keys and isinstance(row, dict) and all(row.get(key) for key in asked.keys):  # nearly every row
        conversation = asked.read(row, of.columns)
        if conversation.unknown and of.form == AUTO:
            find_form(row, of)  # of two forms in a row, one would be lost among the unknown fields
        return conversation
    found = _found(row, of.columns)
    if found and form not in found:
        raise FieldError(
            "row",
            f"expected the form {form} ({asked.fields}), that of this source, found {found[0]} "
            f"({FORMS[found[0]].fields}); give rows of each form a source of their own",
        )
    if not found and not isinstance(row, Mapping):
        raise FieldError("row", f"expected a JSON object with messages and images, found {kind_of(row)}")
    return asked.read(row, of.columns)
