"""One conversation of a data set: what a row may say, and the error that names file, row and field when it does not."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.images.ref import ImageRef
from data.settings import OnBadRecord, SpecialTokens
from vl2.errors import UserError
from vl2.prompt import IMAGE_PLACEHOLDER, Message, Role
from vl2.tokenizer import ASSISTANT_TOKEN, USER_TOKEN, Tokenizer

# Shows what was found as it is written in code, in one line of bounded length.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 100  # characters
_SHORTENED.maxlist = 20  # entries

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    USER_TOKEN: "user",
    ASSISTANT_TOKEN: "assistant",
}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A conversation and which pictures it shows: no tokens, no pixels."""

    messages: tuple[Message, ...]
    """System turn (optional), then user and assistant turns in alternation."""
    images: tuple[ImageRef, ...]
    """One for each `<image>`, in order."""
    source: str
    """The file the record was read from."""
    row: int
    """Its row in that file, counted from 1."""

    def error(self, where: str, problem: str) -> RecordError:
        """Make an error about a field of this record."""
        return RecordError(self.source, self.row, where, problem)


class RecordError(UserError):
    """A row that cannot be used; `str()` of it is "file, row N, field: expected ..., found ...; what to do"."""

    def __init__(self, source: str, row: int, where: str, problem: str):
        # All four become `args`, so that the error survives the way back from a worker process.
        super().__init__(source, row, where, problem)
        self.source, self.row, self.where, self.problem = source, row, where, problem

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}, {self.where}: {self.problem}"


class UnusableRows(UserError):
    """Too many rows that cannot be used; `skipped` are those that were found."""

    def __init__(self, text: str, skipped: Sequence[RecordError]):
        super().__init__(text)
        self.skipped = tuple(skipped)


@dataclass(kw_only=True)
class BadRecords:
    """What to do with rows that cannot be used: stop at the first, or list them up to a number.

    Example: with on_bad_record="skip" and max_bad=2, two bad rows are listed in `skipped`, the third is an error.
    """

    on_bad_record: OnBadRecord = "error"
    max_bad: int = 0
    """Rows that may be skipped."""
    skipped: list[RecordError] = field(default_factory=list)

    def add(self, error: RecordError) -> None:
        """Raise the error, or list it.

        Raises:
            RecordError: with on_bad_record="error".
            UnusableRows: when more than `max_bad` rows were listed.
        """
        if self.on_bad_record == "error":
            raise error
        self.skipped.append(error)
        if len(self.skipped) > self.max_bad:
            listed = "\n  ".join(str(bad) for bad in self.skipped[:10])
            raise UnusableRows(
                f"more than data.max_bad={self.max_bad} bad rows; correct them or raise data.max_bad. "
                f"The first of them:\n  {listed}",
                self.skipped,
            )


def parse_record(
    row: Any, *, source: str, row_number: int, folder: Path, tokenizer: Tokenizer, special_tokens: SpecialTokens
) -> Record:
    """Check a row with `messages` and `images` and make it a Record.

    Args:
        row: the decoded JSON; keys other than `messages` and `images` are ignored,
            but a picture under `image` is an error.
        source, row_number: where it comes from.
        folder: relative image paths start here.
        tokenizer: knows the special tokens a text must not hold.
        special_tokens: "error" refuses them, "neutralise" encodes them as ordinary text.

    Raises:
        RecordError: naming the field, what was expected and what was found.
    """

    def error(where: str, problem: str) -> RecordError:
        return RecordError(source, row_number, where, problem)

    if not isinstance(row, dict):
        raise error("row", f"expected a JSON object with messages and images, found {_kind(row)}")
    if "messages" not in row:
        raise error("messages", f"expected a list of messages, found no such key among {_SHORTENED.repr(sorted(row))}")
    try:
        messages = parse_messages(row["messages"], tokenizer=tokenizer, special_tokens=special_tokens)
        check_turns(messages)
    except FieldError as problem:
        raise error(problem.where, problem.problem) from None

    names = row.get("images")
    if names is None:
        names = []
    if not isinstance(names, list):
        raise error("images", f"expected a list of paths, found {_kind(names)}")
    if row.get("image") and not names:
        raise error(
            "image", f"this key is not read; expected `images`, a list of paths, one for each {IMAGE_PLACEHOLDER}"
        )
    for i, name in enumerate(names):
        if problem_of_name := _not_a_path(name):
            raise error(f"images[{i}]", f"expected the path of an image file, found {problem_of_name}")
    num_placeholders = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
    if num_placeholders != len(names):
        hint = (
            "" if num_placeholders else f"; write {IMAGE_PLACEHOLDER} into the user's message where the picture stands"
        )
        raise error(
            "images",
            f"expected one path for each {IMAGE_PLACEHOLDER} in the user messages, found {len(names)} "
            f"{_plural(len(names), 'path')} for {num_placeholders} {IMAGE_PLACEHOLDER}{hint}",
        )
    paths = [os.path.abspath(folder / os.path.expanduser(name)) for name in names]
    images = tuple(ImageRef(kind="file", name=path) for path in paths)
    return Record(messages=messages, images=images, source=source, row=row_number)


def _not_a_path(name: Any) -> str:
    """What stands where the path of an image should; empty for what may be one."""
    if not isinstance(name, str) or not name:
        return _kind(name)
    if name.startswith("data:"):
        return f"a data URI ({name[:30]!r}...); write the picture to a file and name that"
    if re.match("[a-z][a-z0-9+.-]*://", name, re.IGNORECASE):
        return f"an address ({_SHORTENED.repr(name)}); fetch the picture to a file and name that"
    if "\0" in name or not _is_unicode(name):
        return f"{_SHORTENED.repr(name)}, which no file can be called"
    return ""


def _is_unicode(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair, which JSON can spell but which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class FieldError(UserError):
    """A message that cannot be used; `where` is its place, such as messages[1].content."""

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def parse_messages(
    value: Any, *, tokenizer: Tokenizer, special_tokens: SpecialTokens = "error", name: str = "messages"
) -> tuple[Message, ...]:
    """Check a decoded list of messages, each {"role": ..., "content": ...}; the order of turns is not looked at.

    Args:
        value: the decoded JSON.
        tokenizer: knows the special tokens a text must not hold.
        special_tokens: "error" refuses them, "neutralise" marks the message as plain.
        name: what the list is called in errors.

    Raises:
        FieldError: naming the message.
    """
    if not isinstance(value, list) or not value:
        raise FieldError(name, f"expected a list of messages, found {_kind(value)}")
    return tuple(_parse_message(entry, f"{name}[{i}]", tokenizer, special_tokens) for i, entry in enumerate(value))


def _parse_message(entry: Any, where: str, tokenizer: Tokenizer, special_tokens: SpecialTokens) -> Message:
    if not isinstance(entry, dict):
        raise FieldError(where, f"expected an object with role and content, found {_kind(entry)}")
    role = entry.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise FieldError(f"{where}.role", f"expected system, user or assistant, found {_SHORTENED.repr(role)}")
    content = entry.get("content")
    if not isinstance(content, str):
        raise FieldError(
            f"{where}.content",
            f"expected a string in which {IMAGE_PLACEHOLDER} stands for an image, found {_kind(content)}",
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise FieldError(f"{where}.content", f"expected Unicode text, found {content[error.start]!r}") from None
    if _ROLES[role] != "user" and IMAGE_PLACEHOLDER in content:
        kind = "an answer" if _ROLES[role] == "assistant" else "a system message"
        raise FieldError(
            f"{where}.content", f"found {IMAGE_PLACEHOLDER} in {kind}, expected it in user messages only; remove it"
        )
    typed = tokenizer.find_typed_special(content)
    if typed and special_tokens == "error":
        raise FieldError(
            f"{where}.content",
            f"found the special token {typed} typed into the text, which would end or forge a turn; "
            "remove it, or set data.special_tokens=neutralise to encode it as ordinary text",
        )
    return Message(_ROLES[role], content, plain=typed is not None)


def check_turns(messages: Sequence[Message]) -> None:
    """Check the order of a conversation to learn from: a system turn or none, then questions and answers by turns.

    Raises:
        FieldError: naming the message.
    """
    if all(message.role != "assistant" for message in messages):
        raise FieldError("messages", "expected an assistant message, found none: no supervised token to learn from")
    expected: Role = "user"
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.role == "system":
            if i:
                raise FieldError(f"{where}.role", "found a system message, expected it as the first message only")
            continue
        if message.role != expected:
            raise FieldError(
                f"{where}.role", f"expected {expected!r}, found {message.role!r}; user and assistant must alternate"
            )
        if message.role == "assistant" and not message.content.strip():
            raise FieldError(f"{where}.content", "expected an answer, found an empty text")
        expected = "assistant" if expected == "user" else "user"
    if messages[-1].role != "assistant":
        raise FieldError(
            f"messages[{len(messages) - 1}].role", "expected the last message to be an answer, found 'user'; remove it"
        )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing (null)"}
    if value in ("", []) and isinstance(value, (str, list)):
        return "an empty " + ("string" if isinstance(value, str) else "list")
    return names.get(type(value)) or f"the number {_SHORTENED.repr(value)}"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"
