"""Checks the turns of a conversation, whatever its form was, and makes them messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.forms.conversation import Turn
from data.forms.fields import FieldError
from data.forms.messages import read_turns
from data.forms.parts import FromColumn
from data.settings import SpecialTokens, Supervise
from vl2.prompt import IMAGE_PLACEHOLDER, Message, Role
from vl2.tokenizer import Tokenizer


def parse_messages(
    value: Any, *, tokenizer: Tokenizer, special_tokens: SpecialTokens = "error", name: str = "messages"
) -> tuple[Message, ...]:
    """Check a decoded list of messages that holds no picture itself; the order of turns is not looked at.

    Args:
        value: the decoded JSON.
        tokenizer: knows the special tokens a text must not hold.
        special_tokens: "error" refuses them, "neutralise" marks the message as plain.
        name: what the list is called in errors.

    Raises:
        FieldError: naming the message.
    """
    turns, images, _ = read_turns(value, name)
    for where, image in images:
        if not isinstance(image, FromColumn) or image.index is not None:
            raise FieldError(where, f"expected {IMAGE_PLACEHOLDER} alone, found a picture; give it beside the messages")
    return tuple(checked_message(turn, tokenizer, special_tokens) for turn in turns)


def checked_message(turn: Turn, tokenizer: Tokenizer, special_tokens: SpecialTokens, *, learn: bool = True) -> Message:
    """Check the text of a turn and make it a message.

    Raises:
        FieldError: half a character, a picture where none may stand, a special token.
    """
    content = turn.content
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise FieldError(turn.where, f"expected Unicode text, found {content[error.start]!r}") from None
    if turn.role != "user" and IMAGE_PLACEHOLDER in content:
        kind = "an answer" if turn.role == "assistant" else "a system message"
        raise FieldError(
            turn.where, f"found {IMAGE_PLACEHOLDER} in {kind}, expected it in user messages only; remove it"
        )
    typed = tokenizer.find_typed_special(content)
    if typed and special_tokens == "error":
        raise FieldError(
            turn.where,
            f"found the special token {typed} typed into the text, which would end or forge a turn; "
            "remove it, or set data.special_tokens=neutralise to encode it as ordinary text",
        )
    return Message(turn.role, content, plain=typed is not None, learn=learn)


def check_order(turns: Sequence[Turn]) -> None:
    """Check the order of a conversation to learn from: a system turn or none, then questions and answers by turns.

    Raises:
        FieldError: naming the turn.
    """
    where = _message(turns[-1]).partition("[")[0]
    if all(turn.role != "assistant" for turn in turns):
        raise FieldError(where, "expected an assistant message, found none: no supervised token to learn from")
    expected: Role = "user"
    for i, turn in enumerate(turns):
        if turn.role == "system":
            if i:
                raise FieldError(
                    f"{_message(turn)}.role", "found a system message, expected it as the first message only"
                )
            continue
        if turn.role != expected:
            raise FieldError(
                f"{_message(turn)}.role",
                f"expected {expected!r}, found {turn.role!r}; user and assistant must alternate",
            )
        if turn.role == "assistant" and not turn.content.strip():
            raise FieldError(turn.where, "expected an answer, found an empty text")
        expected = "assistant" if expected == "user" else "user"
    if turns[-1].role != "assistant":
        raise FieldError(
            f"{_message(turns[-1])}.role", "expected the last message to be an answer, found 'user'; remove it"
        )


def learned_turns(turns: Sequence[Turn], supervise: Supervise) -> list[bool]:
    """Decide which answers are learned: those that neither the row nor the setting leaves out.

    Returns:
        One for each turn; True for the others, of which nothing is learned anyway.

    Raises:
        FieldError: nothing of the conversation is learned.
    """
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    learn = [turn.learn is not False for turn in turns]
    if supervise == "last":
        for i in answers[:-1]:
            learn[i] = False
    if not any(learn[i] for i in answers):
        last = turns[answers[-1]]
        hint = ", and data.supervise=last leaves only the last" if supervise == "last" and len(answers) > 1 else ""
        raise FieldError(
            _message(last),
            f"expected an answer to learn from, found none: the row says of each not to learn it (loss, train or "
            f"weight){hint}; leave the row out",
        )
    return learn


def _message(turn: Turn) -> str:
    """Place of the whole message whose text a turn is."""
    return turn.where.rpartition(".")[0] or turn.where
