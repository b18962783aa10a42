"""From the messages of a request to those of the prompt, and the pictures they show."""

from __future__ import annotations

from collections.abc import Sequence

from data.forms.fields import FieldError
from data.forms.messages import read_turns
from data.forms.parts import FromColumn
from data.turns import checked_message
from train.serve.errors import ApiError
from train.serve.request import ChatRequest
from vl2.prompt import IMAGE_PLACEHOLDER, Message
from vl2.tokenizer import Tokenizer


def read_conversation(
    request: ChatRequest, tokenizer: Tokenizer, *, max_images: int
) -> tuple[tuple[Message, ...], list[tuple[str, str]]]:
    """The conversation as the prompt has it.

    Args:
        request: its messages.
        tokenizer: knows the special tokens that a text must not hold: they would end or forge a turn.
        max_images: most pictures.

    Returns:
        The messages, with <image> where a picture stands; (field, address) of each picture in that order.

    Raises:
        ApiError: naming the field, 400.
    """
    messages = [message.model_dump(include={"role", "content"}) for message in request.messages]
    if messages[-1]["role"] != "user":
        raise _refused(f"messages[{len(messages) - 1}].role", "the last message must be a user's")
    try:
        turns, shown, _ = read_turns(messages, "messages")
        pictures = _addresses(shown)
        if len(pictures) > max_images:
            raise _refused("messages", f"expected at most {max_images} pictures, found {len(pictures)}")
        for i, turn in enumerate(turns):
            if turn.role == "system" and i:
                raise _refused(f"messages[{i}].role", "a system message must be the first message")
            typed = tokenizer.find_typed_special(turn.content) if turn.role != "assistant" else None
            if typed:
                raise _refused(turn.where, f"found the special token {typed} typed into the text; remove it")
        # What the model itself said earlier is taken as plain text, whatever it looks like.
        return tuple(checked_message(turn, tokenizer, "neutralise") for turn in turns), pictures
    except FieldError as error:
        raise _refused(error.where, error.problem) from error


def _addresses(shown: Sequence[tuple[str, object]]) -> list[tuple[str, str]]:
    pictures = []
    for where, value in shown:
        if isinstance(value, FromColumn):
            raise _refused(
                where, f"found {IMAGE_PLACEHOLDER} typed into the text; send a picture as a part of type image_url"
            )
        pictures.append((where, str(value)))
    return pictures


def _refused(where: str, problem: str) -> ApiError:
    return ApiError(400, f"{where}: {problem}", param=where, code="invalid_value")
