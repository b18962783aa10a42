"""What a request to /v1/chat/completions may say. Whatever is neither known here nor without effect is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from train.serve.errors import ApiError

_TAG = "="  # begins the names of a union's members, which are no part of a field's place
LEAST_TEMPERATURE = 0.001  # below it the softmax overflows; 0 is greedy
_MAX_STOPS, _MAX_STOP = 16, 500
_MAX_SHOWN = 200  # characters of a value in an error
_MAX_VALUES = 1_000_000  # of the JSON: while Python decodes it, all other answers wait


def _kind(value: Any) -> str | None:
    return "=text" if isinstance(value, str) else "=parts" if isinstance(value, list) else None


def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"={kind}" if kind in ("text", "image_url") else None


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else None
    known = {"system": "=system", "developer": "=system", "user": "=user", "assistant": "=assistant"}
    return known.get(role) if isinstance(role, str) else None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture lies."""

    url: str
    detail: Literal["auto", "high"] | None = None  # the model has one way to look at a picture


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Text = Annotated[
    Annotated[str, Tag("=text")] | Annotated[list[TextPart], Field(min_length=1), Tag("=parts")], Discriminator(_kind)
]
Part = Annotated[Annotated[TextPart, Tag("=text")] | Annotated[ImagePart, Tag("=image_url")], Discriminator(_part)]
TextAndPictures = Annotated[
    Annotated[str, Tag("=text")] | Annotated[list[Part], Field(min_length=1), Tag("=parts")], Discriminator(_kind)
]


class SystemMessage(_Strict):
    """What holds for the whole conversation."""

    role: Literal["system", "developer"]
    content: Text


class UserMessage(_Strict):
    """A question."""

    role: Literal["user"]
    content: TextAndPictures


class AssistantMessage(_Strict):
    """An earlier answer; a client may send it as it came, with the fields that it came with."""

    role: Literal["assistant"]
    content: Text
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    boxes: Any = None  # read from the text again, as are those that cannot be read
    malformed_boxes: Any = None


Message = Annotated[
    Annotated[SystemMessage, Tag("=system")]
    | Annotated[UserMessage, Tag("=user")]
    | Annotated[AssistantMessage, Tag("=assistant")],
    Discriminator(_role),
]


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # a padding that is not sent


class ResponseFormat(_Strict):
    """The form of an answer: text."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """A conversation that waits for an answer. null is taken for a field that is left out."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0.001, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # In force as they are here only:
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    # Without effect on the answer:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("temperature")
    @classmethod
    def _temperature(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"expected 0, which is greedy, or at least {LEAST_TEMPERATURE}")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        stops = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP for stop in stops):
            raise ValueError(f"expected a text, or a list of texts, of 1 to {_MAX_STOP} characters")
        if len(stops) > _MAX_STOPS:
            raise ValueError(f"expected at most {_MAX_STOPS} texts, found {len(stops)}")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop words."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: nothing was said."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes, *, max_messages: int) -> ChatRequest:
    """Read the body of a request.

    Raises:
        ApiError: naming the field, 400.
    """
    document = _json(body)
    if not isinstance(document, dict):
        raise ApiError(400, "expected a JSON object", code="invalid_json")
    messages = document.get("messages")
    if isinstance(messages, list) and len(messages) > max_messages:
        raise ApiError(
            400,
            f"expected at most {max_messages} messages, found {len(messages)}",
            param="messages",
            code="too_many_messages",
        )
    try:
        return ChatRequest.model_validate(document)
    except ValidationError as error:
        raise _as_api_error(error) from None


def _json(body: bytes) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    marks = body.count(b",") + body.count(b"[") + body.count(b"{")  # those in texts are counted as well
    if marks > _MAX_VALUES:
        raise ApiError(413, f"expected at most {_MAX_VALUES:,} values, found {marks:,} , [ and {{", code="too_large")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise ApiError(400, "the JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"the body is not JSON in UTF-8: {str(error)[:_MAX_SHOWN]}", code="invalid_json") from None


def _as_api_error(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)[0]
    place = ""
    for item in found["loc"]:
        if isinstance(item, int):
            place += f"[{item}]"
        elif not item.startswith(_TAG):
            place += f".{item}" if place else item
    kind, place = found["type"], ascii(place)[1:-1][:_MAX_SHOWN]
    if kind == "extra_forbidden":
        return ApiError(400, f"Unknown or unsupported field: {place}", param=place, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing field: {place}", param=place, code="missing_required_parameter")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        leaf = place.rpartition(".")[2]
        expected = {
            "content": "a text, or a list of parts",
            "messages": "an object with role (system, user or assistant) and content",
        }.get(leaf.partition("[")[0] if not leaf.startswith("content[") else "", "a part of type text or image_url")
        return ApiError(400, f"{place}: expected {expected}", param=place, code="invalid_value")
    said = found["msg"].removeprefix("Value error, ")
    given = found["input"]
    shown = f", found {ascii(given)[:_MAX_SHOWN]}" if isinstance(given, str | int | float) else ""
    return ApiError(400, f"{place}: {said}{shown}" if place else said, param=place or None, code="invalid_value")
