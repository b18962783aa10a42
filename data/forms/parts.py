"""Content in parts, as OpenAI's API and Hugging Face's chat templates have it: texts and pictures in a list."""

from __future__ import annotations

from typing import Any

from data.forms.fields import FieldError, Fields, is_empty, kind_of, shown
from vl2.prompt import IMAGE_PLACEHOLDER

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")


class FromColumn:
    """Stands for a picture that a part does not hold itself: the row's next one, or the one of its index."""

    def __init__(self, index: int | None):
        self.index = index


def read_parts(parts: list[Any], where: str) -> tuple[str, list[tuple[str, Any]], tuple[str, ...]]:
    """Read a list of parts.

    The texts are joined as they are, with <image> between them where a picture stands; pictures that lead get a line
    each, as DeepSeek-VL2 was trained with: nobody writes a line end for them into a part.

    Args:
        parts: the decoded list; a part is a string too.
        where: its place in the row.

    Returns:
        The text, (place, value) of each picture, the value a `FromColumn` where the row holds it, and unknown fields.

    Raises:
        FieldError: a part that is neither text nor picture.

    Example: [{"type": "image", "path": "cat.jpg"}, {"type": "text", "text": "Who?"}] is "<image>\\nWho?".
    """
    texts: list[str] = []
    images: list[tuple[str, Any]] = []
    unknown: tuple[str, ...] = ()
    for i, part in enumerate(parts):
        place = f"{where}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        fields = Fields(part, place, "a part with its type, text or image")
        kind = _type_of(fields)
        if kind in _TEXTS:
            text = fields.value.get("text")
            if not isinstance(text, str):
                raise FieldError(f"{place}.text", f"expected a string, found {kind_of(text)}")
            fields.take("text")
            texts.append(text)
            images += [(f"{place}.text", FromColumn(None))] * text.count(IMAGE_PLACEHOLDER)
        else:
            texts.append(IMAGE_PLACEHOLDER)
            place_of_image, value, inner_unknown = _read_image(fields)
            images.append((place_of_image, value))
            unknown += inner_unknown
        if not is_empty(fields.value.get("index")):
            fields.take("index")
        unknown += fields.unknown()
    for i, text in enumerate(texts):  # pictures that lead
        if text != IMAGE_PLACEHOLDER or not "".join(texts[i + 1 :]).strip():
            break
        if not texts[i + 1][:1].isspace():
            texts[i] += "\n"
    return "".join(texts), images, unknown


def _type_of(fields: Fields) -> str:
    kind = fields.take("type")
    if kind is None:  # as Qwen's own code writes them: {"image": ...} and {"text": ...}
        kinds = [key for key in ("text", "image", "image_url") if not is_empty(fields.value.get(key))]
        kind = kinds[0] if len(kinds) == 1 else None
    if not isinstance(kind, str) or kind not in _TEXTS + _IMAGES:
        raise FieldError(
            fields.place("type"), f"expected text, image or image_url, found {shown(kind)}; DeepSeek-VL2 sees no other"
        )
    return kind


def _read_image(fields: Fields) -> tuple[str, Any, tuple[str, ...]]:
    unknown: tuple[str, ...] = ()
    key, value = fields.take_any("image_url", "image", "path", "url", "base64", "data")
    if key == "image_url" and isinstance(value, dict):
        inner = Fields(value, fields.place(key), "an address, or an object with it as url")
        value = inner.take("url")
        unknown = inner.unknown()
        if value is None:
            raise FieldError(inner.place("url"), f"expected an address or a path, found {kind_of(value)}")
    if value is None:
        index = fields.take("index")
        if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
            raise FieldError(fields.place("index"), f"expected the number of a picture, from 0, found {shown(index)}")
        return fields.place("image"), FromColumn(index), unknown
    if key in ("base64", "data") and isinstance(value, str) and not value.startswith("data:"):
        value = f"data:;base64,{value}"
    return fields.place(key), value, unknown
