"""Reads the fields of a row; none is dropped in silence: it is used, refused by name, or counted as unknown."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vl2.errors import UserError

# Shows what was found as it is written in code, in one line of bounded length.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 100  # characters
_SHORTENED.maxlist = _SHORTENED.maxdict = 20  # entries
_MAX_SHOWN = 1000  # characters of a whole list or dictionary
_MAX_NAME = 100  # characters

_PREFERENCE = "belongs to preference training; keep the answer to be learned, and remove this field"
_TOOLS = "describes tools, which DeepSeek-VL2's template does not know; write them into the text, or remove this field"
_MEDIA = "is no picture, and DeepSeek-VL2 sees pictures only; remove this field, or leave the row out"
_WEIGHT = "would weigh the whole row; repeat a source with data.sources[...].repeat, and remove this field"
_PICTURE = "seems to name a picture; call the column images, or give data.columns={image: NAME}"
# What a field with such a name would change, in a row, a message or a part of one; None of them is read anywhere.
_REFUSED = tuple(
    (re.compile(names, re.IGNORECASE), reason)
    for names, reason in (
        (r"chosen(_.*)?|rejected(_.*)?|kto_tag|margin|preferences?|(non_)?preferred_output", _PREFERENCE),
        (r"labels?", "is a class or a preference, and what is learned here are answers; remove this field"),
        (r"tools|functions|tool_calls|tool_call_id|function_call|tool_choice|parallel_tool_calls", _TOOLS),
        (r"videos?|audios?|video_url|audio_url|input_audio", _MEDIA),
        (r"loss|loss_scale|train|weights?|sample_weight|loss_weight", _WEIGHT),
        (r"channel", "would report its loss apart; make it a source of its own in data.sources, and remove this field"),
        (r"objects", "holds boxes, which this form does not know at this place; put it beside the conversation"),
        (
            r"bbox(es)?|boxes|bounding_box(es)?",
            "holds boxes, which are read as objects; give ref and bbox there",
        ),
        (r"history", "holds earlier turns, which this form does not know; put them into the conversation"),
        (r"images?|image_(path|file|url)s?|imgs?|pictures?|photos?", _PICTURE),
        (r"reasoning_content|thinking|refusal", "would be part of the answer; put it into the content"),
        (r"train_detail", "would learn parts of an answer; split the answer into messages, and remove this field"),
    )
)


class FieldError(UserError):
    """Something in a row that cannot be used; `where` is its place, such as messages[1].content."""

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def shown(value: Any) -> str:
    """Show a value as it is written in code, in one line of bounded length."""
    text = _SHORTENED.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def kind_of(value: Any) -> str:
    """Say what kind of thing a decoded value is: a list, a string, the number 3."""
    if isinstance(value, (str, list, tuple)) and not value:
        return "an empty " + ("string" if isinstance(value, str) else "list")
    if value is None:
        return "nothing (null)"
    for kind, name in ((bool, "a boolean"), (str, "a string"), (bytes, "bytes"), (Mapping, "an object")):
        if isinstance(value, kind):
            return name
    return "a list" if isinstance(value, (list, tuple)) else f"the number {shown(value)}"


def is_empty(value: Any) -> bool:
    """Tell whether a field says nothing: tables of mixed rows hold null, or nothing, where a row has no such field."""
    return value is None or (not value and isinstance(value, (str, list, tuple, Mapping)))


class Fields:
    """The fields of one object of a row; remembers which were read."""

    def __init__(self, value: Any, where: str, expected: str):
        """Start with nothing read.

        Args:
            value: the decoded object.
            where: its place in the row; empty for the row itself.
            expected: what it should be, for the error when it is no object.

        Raises:
            FieldError: it is no object.
        """
        if not isinstance(value, (dict, Mapping)):
            raise FieldError(where or "row", f"expected {expected}, found {kind_of(value)}")
        self.value, self.where = value, where
        self._read: set[str] = set()

    def place(self, key: str) -> str:
        """Name the place of a field in the row."""
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str) -> Any:
        """Read a field; None where it is absent or empty."""
        self._read.add(key)
        value = self.value.get(key)
        return None if is_empty(value) else value

    def take_any(self, *keys: str) -> tuple[str, Any]:
        """Read the one of several fields that says something: its name and value; the first and None where none does.

        Raises:
            FieldError: two of them say something.
        """
        found = [(key, value) for key in keys if (value := self.take(key)) is not None]
        if len(found) > 1:
            raise FieldError(
                self.place(found[1][0]), f"expected one of {', '.join(keys)}, found {found[0][0]} too; remove one"
            )
        return found[0] if found else (keys[0], None)

    def take_text(self, key: str) -> str | None:
        """Read a text; None where it is absent or empty, and a whole number as it is written.

        Raises:
            FieldError: it is something else.
        """
        value = self.take(key)
        if isinstance(value, int) and not isinstance(value, bool):  # a column of a table, where "3" became 3
            return str(value)
        if value is not None and not isinstance(value, str):
            raise FieldError(self.place(key), f"expected a string, found {kind_of(value)}")
        return value

    def need_text(self, key: str) -> str:
        """Read a text that must be there.

        Raises:
            FieldError: it is absent, empty or no text.
        """
        text = self.take_text(key)
        if text is None:
            found = (
                kind_of(self.value[key]) if key in self.value else f"no such field among {shown(sorted(self.value))}"
            )
            raise FieldError(self.place(key), f"expected a string, found {found}")
        return text

    def take_list(self, key: str, of: str) -> list[Any]:
        """Read a list, also one that a table holds as JSON text; empty where it is absent.

        Raises:
            FieldError: it is something else.
        """
        value = unpacked(self.take(key), self.place(key))
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise FieldError(self.place(key), f"expected a list of {of}, found {kind_of(value)}")
        return list(value)

    def unknown(self) -> tuple[str, ...]:
        """Name the fields that nobody read and that change no meaning; a message's are `messages[].name`.

        Raises:
            FieldError: a field that changes the meaning.
        """
        if len(self._read) >= len(self.value) and self._read >= self.value.keys():
            return ()
        names = []
        for key, value in self.value.items():
            if key in self._read or is_empty(value):
                continue
            reason = _reason_to_refuse(key)
            if reason and not (reason is _WEIGHT and value == 1):  # true and 1 say what is done anyway
                raise FieldError(self.place(key), f"found {shown(value)}, which is not read: it {reason}")
            if not reason:
                name = re.sub(r"\[\d+\]", "[]", self.place(key))[:_MAX_NAME]
                names.append(name if name.isprintable() else ascii(name))
        return tuple(names)


@lru_cache(maxsize=1000)
def _reason_to_refuse(key: str) -> str:
    return next((reason for pattern, reason in _REFUSED if pattern.fullmatch(key)), "")


def unpacked(value: Any, where: str) -> Any:
    """Decode a list or an object that a table of texts (CSV) holds as JSON; anything else is returned as it is.

    Raises:
        FieldError: a text that begins like JSON and is none.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a number too long"
        raise FieldError(where, f"expected JSON ({problem}), found {shown(value)}") from None


def objects_of(value: Any, where: str) -> Any:
    """List the objects of a field, also where a table keeps them as JSON text, or as one list for each of their keys.

    Example: {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}, as `datasets.Sequence` of a dictionary is stored,
    is [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]; what is neither is returned as it is.
    """
    value = unpacked(value, where)
    if not isinstance(value, Mapping) or not value:
        return value
    columns = list(value.values())
    if not all(isinstance(column, (list, tuple)) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]


def learned(fields: Fields, role: str) -> bool | None:
    """Read whether a message is learned: ms-swift's `loss`, OpenAI's `weight`, `train`; None where it does not say.

    Raises:
        FieldError: something between yes and no, a contradiction, or a question that shall be learned.
    """
    learn: bool | None = None
    for key in ("loss", "train", "weight", "loss_scale"):
        value = fields.take(key)
        if value is None:
            continue
        place = fields.place(key)
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise FieldError(
                place, f"expected true or false (1 or 0), found {shown(value)}; an answer is learned or it is not"
            )
        if learn is not None and learn != bool(value):
            raise FieldError(place, f"found {shown(value)}, and another field of the message says the contrary")
        learn = bool(value)
        if learn and role != "assistant":
            raise FieldError(
                place, f"found {shown(value)} in a message of {role}, expected it in answers only; remove it"
            )
    return learn


def read_images(fields: Fields, columns: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Read the pictures of a row from `images`, `image`, or the column that the user named.

    Returns:
        (place in the row, value) of each, in order.

    Raises:
        FieldError: both fields are there.
    """
    keys = (columns["image"],) if "image" in columns else ("images", "image")
    key, value = fields.take_any(*keys)
    return images_of(value, fields.place(key))


def images_of(value: Any, where: str) -> list[tuple[str, Any]]:
    """List the pictures of a field that holds one or a list of them: (place in the row, value) of each."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = unpacked(value, where)
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [(f"{where}[{i}]", one) for i, one in enumerate(value)]
    return [(where, value)]
