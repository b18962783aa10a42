"""One question and its answer in columns of a table: ms-swift's query and response, alpaca's, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping

from data.forms.beside import right_answers, system_turns, with_pictures
from data.forms.conversation import Conversation, Turn
from data.forms.fields import FieldError, Fields, shown


def read_question(
    fields: Fields, columns: Mapping[str, str], *, question: str, more: str | None = None, answer: str, history: bool
) -> Conversation:
    """Read a row with a question and an answer, perhaps earlier ones, a system message and pictures.

    Args:
        fields: the row.
        columns: the user's names of columns, for pictures and the system message.
        question: field of the question.
        more: field of a text that goes into a second line of the question.
        answer: field of the answer.
        history: whether the field `history` holds earlier questions and answers, in pairs.

    Raises:
        FieldError: naming the field.
    """
    turns = system_turns(fields, columns)
    for i, pair in enumerate(fields.take_list("history", "pairs of a question and its answer") if history else []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FieldError(f"history[{i}]", f"expected a pair of texts, question and answer, found {shown(pair)}")
        turns.append(Turn(role="user", content=pair[0], where=f"history[{i}][0]"))
        turns.append(Turn(role="assistant", content=pair[1], where=f"history[{i}][1]"))
    text = fields.need_text(question)
    if more is not None and (rest := fields.take_text(more)) is not None:
        text = f"{text}\n{rest}"
    turns.append(Turn(role="user", content=text, where=fields.place(question)))
    turns.append(Turn(role="assistant", content=_first_answer(fields, answer), where=fields.place(answer)))
    return with_pictures(fields, columns, turns)


def _first_answer(fields: Fields, key: str) -> str:
    """Read the answer that is learned: the field's text, or the first of several in `answers`."""
    if key == "answers" and (several := right_answers(fields)):
        return several[0]
    return fields.need_text(key)
