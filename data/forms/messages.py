"""`messages` of role and content: ours, LLaMA-Factory's, ms-swift's, OpenAI's and Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.beside import right_answers, system_turns
from data.forms.conversation import Conversation, Turn
from data.forms.fields import FieldError, Fields, images_of, kind_of, learned, objects_of, read_images, shown
from data.forms.objects import place_objects
from data.forms.parts import FromColumn, read_parts
from vl2.prompt import IMAGE_PLACEHOLDER, Role
from vl2.tokenizer import ASSISTANT_TOKEN, USER_TOKEN

KEYS = ("messages",)  # that a row of this form has
FIELDS = "messages of role and content, images, objects; content may be a list of parts"

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",  # OpenAI's new name
    "user": "user",
    "assistant": "assistant",
    USER_TOKEN: "user",
    ASSISTANT_TOKEN: "assistant",
}
_CONTENT = f"expected a string in which {IMAGE_PLACEHOLDER} stands for an image, found "


def read(row: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation:
    """Read a row of this form.

    Raises:
        FieldError: naming the field.
    """
    fields = Fields(row, "", "a JSON object with messages and images")
    if "messages" not in row:
        raise FieldError("messages", f"expected a list of messages, found no such key among {shown(sorted(row))}")
    fields.take("messages")
    return read_conversation(fields, row["messages"], "messages", columns)


def read_conversation(fields: Fields, messages: Any, name: str, columns: Mapping[str, str]) -> Conversation:
    """Read a list of messages, and beside them the pictures, the boxes and the system message of their row.

    Args:
        fields: the row.
        messages: the decoded list.
        name: what it is called in errors.
        columns: the user's names of columns.
    """
    column = read_images(fields, columns)
    turns, images, unknown = read_turns(objects_of(messages, name), name)
    system = system_turns(fields, columns)
    if system and turns[0].role == "system":
        raise FieldError(system[0].where, "found a second system message beside that of the conversation")
    placed, boxes = place_objects(fields, [*system, *turns])
    shown_images = _from_column(images, column)
    return Conversation(
        turns=tuple(placed),
        images=tuple((place, value) for place, value in shown_images if not isinstance(value, FromColumn)),
        boxes=boxes,
        answers=right_answers(fields),
        unknown=unknown + fields.unknown(),
    )


def read_turns(messages: Any, name: str) -> tuple[list[Turn], list[tuple[str, Any]], tuple[str, ...]]:
    """Read a list of messages, each {"role": ..., "content": ...}.

    Returns:
        The turns, (place, value) of each picture they show (the value a `FromColumn` where a message does not hold
        it), and unknown fields.

    Raises:
        FieldError: naming the message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise FieldError(name, f"expected a list of messages, found {kind_of(messages)}")
    turns: list[Turn] = []
    images: list[tuple[str, Any]] = []
    unknown: tuple[str, ...] = ()
    for i, message in enumerate(messages):
        fields = Fields(message, f"{name}[{i}]", "an object with role and content")
        role, content = fields.value.get("role"), fields.value.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise FieldError(fields.place("role"), f"expected system, user or assistant, found {shown(role)}")
        where = fields.place("content")
        if isinstance(content, (list, tuple)) and content:
            content, shows, unknown_parts = read_parts(list(content), where)
            unknown += unknown_parts
        elif isinstance(content, str):
            shows = [(where, FromColumn(None))] * content.count(IMAGE_PLACEHOLDER)
        else:
            raise FieldError(where, _CONTENT + kind_of(content))
        learn = None
        if len(fields.value) > 2:  # most messages say nothing beside role and content
            fields.take("role"), fields.take("content")
            key, own = fields.take_any("images", "image")  # as DeepSeek-VL2's own code has them
            shows = _from_column(shows, images_of(own, fields.place(key)))
            learn = learned(fields, _ROLES[role])
            unknown += fields.unknown()
        images += shows
        turns.append(Turn(role=_ROLES[role], content=content, where=where, learn=learn))
    return turns, images, unknown


def _from_column(shows: list[tuple[str, Any]], column: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Take the pictures that are not there themselves from a field with pictures; what is left of it comes last."""
    if not column:
        return shows
    images: list[tuple[str, Any]] = []
    left = dict(enumerate(column))
    for place, value in shows:
        if isinstance(value, FromColumn) and (left or value.index is not None):
            index = next(iter(left)) if value.index is None else value.index
            if index not in range(len(column)):
                raise FieldError(
                    place, f"expected one of the row's {len(column)} pictures, from 0, found picture {index}"
                )
            left.pop(index, None)
            images.append(column[index])
        else:
            images.append((place, value))
    return images + list(left.values())
