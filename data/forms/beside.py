"""What stands beside the turns of a row, in every form: its system message, pictures and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.forms.conversation import Conversation, Turn, show_first
from data.forms.fields import FieldError, Fields, read_images, unpacked
from data.forms.objects import place_objects


def system_turns(fields: Fields, columns: Mapping[str, str]) -> list[Turn]:
    """Read the system message of a row, from `system` or the column that the user named: one turn, or none.

    Raises:
        FieldError: it is no text.
    """
    key = columns.get("system", "system")
    text = fields.take_text(key)
    return [] if text is None else [Turn(role="system", content=text, where=fields.place(key))]


def right_answers(fields: Fields) -> tuple[str, ...]:
    """Read the right answers to the last question from `answers`, as DocVQA and TextVQA have them; () where none are.

    A field of that name that is no list of texts is left unread.
    """
    try:
        value = unpacked(fields.value.get("answers"), "answers")
    except FieldError:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        return ()
    fields.take("answers")
    return tuple(value)


def with_pictures(
    fields: Fields, columns: Mapping[str, str], turns: Sequence[Turn], unknown: tuple[str, ...] = ()
) -> Conversation:
    """Put the pictures and boxes of a row to its turns; a form whose turns hold no pictures themselves ends so.

    Args:
        fields: the row; what is still unread then is unknown.
        columns: the user's names of columns.
        turns: what was said.
        unknown: fields inside of the turns that say nothing.

    Raises:
        FieldError: naming the field.
    """
    images = read_images(fields, columns)
    placed, boxes = place_objects(fields, show_first(list(turns), len(images)))
    answers = right_answers(fields)
    return Conversation(
        turns=tuple(placed), images=tuple(images), boxes=boxes, answers=answers, unknown=unknown + fields.unknown()
    )
