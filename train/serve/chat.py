"""One chat completion, from the request's bytes to the job that the engine answers."""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from data.answer_boxes import read_boxes
from data.images.files import ImageError
from data.images.ref import ImageRef
from train.ask.answer import answer_limit, check_text, prepare
from train.ask.drawing import box_row
from train.ask.load import Loaded
from train.config.schema import MAX_NEW_TOKENS
from train.config.serve_schema import ServeConfig
from train.serve.body import read_body
from train.serve.conversation import read_conversation
from train.serve.engine import Engine, Job, Piece
from train.serve.errors import ApiError
from train.serve.metrics import Metrics
from train.serve.models import Served
from train.serve.pictures import Pictures, refused
from train.serve.request import ChatRequest, read_request
from train.serve.stream import Answering, Pieces
from vl2.errors import UserError
from vl2.prompt import Message
from vl2.tiles import num_image_tokens, tile_grid

_FETCHED_TOGETHER = 16
_MOST_PREPARING = 4  # threads; each may hold a decoded picture
_MOST_HELD = 2**30  # bytes of bodies and tiles that all requests that wait may hold together,
_HELD_BODIES = 16  # or as many bodies of the largest size
_RETRY_SECONDS = 2


class Chat:
    """Takes requests in, and answers them through the engine.

    Args:
        config: the limits.
        models: by the names that requests give.
        engine: computes.
        metrics: counts.
        key: that requests must have; empty: none.

    Attributes:
        draining: no new requests are taken.
        active: requests that are being read, prepared, waiting or answered.
    """

    def __init__(
        self, config: ServeConfig, models: Mapping[str, Served], engine: Engine, metrics: Metrics, *, key: str
    ):
        self.config, self.models, self.engine, self.metrics = config, models, engine, metrics
        self.draining, self.active = False, 0
        self._key = key.encode()
        self._pictures = Pictures.of(config)
        self._held = 0
        workers = min(_MOST_PREPARING, os.cpu_count() or 1)
        self._preparing = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
        self._fetching = ThreadPoolExecutor(_FETCHED_TOGETHER, thread_name_prefix="fetch")

    @property
    def num_waiting(self) -> int:
        """Requests that are not answered yet: being read, prepared or waiting for their turn."""
        return max(0, self.active - self.engine.num_running)

    @property
    def has_key(self) -> bool:
        """Whether requests must have a key."""
        return bool(self._key)

    def check_key(self, request: Request) -> None:
        """Refuse a request without the key; how long it takes tells nothing of it.

        Raises:
            ApiError: 401.
        """
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        scheme, _, key = given.partition(b" ")
        if self._key and not (scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)):
            raise ApiError(401, "expected the header Authorization: Bearer KEY, with this service's key")

    async def answer(self, request: Request) -> Response:
        """Answer a request to /v1/chat/completions.

        Raises:
            ApiError: it is not answered.
        """
        arrived = time.monotonic()
        self.check_key(request)
        self._check_room()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "expected the header Content-Type: application/json")
        body = await read_body(request, max_bytes=self.config.max_body, seconds=self.config.deadline)
        size = len(body)
        self._held += size
        try:
            asked = read_request(body, max_messages=self.config.max_messages)
            del body
            job, sizes = await self._job(asked, arrived)
        finally:
            self._held -= size
        self._check_memory(job.num_bytes)
        pieces = Pieces()

        def take(piece: Piece) -> None:
            if pieces.fresh and piece.num_ids:
                self.metrics.first_token(time.monotonic() - arrived)
            pieces.put(piece)

        job.receive = take
        self.metrics.prompt_tokens += len(job.prompt["input_ids"])
        self.engine.submit(job)
        return Answering(
            job,
            pieces,
            boxes=lambda text: _boxes(text, sizes),
            streamed=bool(asked.stream),
            usage=bool(asked.stream_options and asked.stream_options.include_usage),
            finished=self._count_tokens,
        )

    def _count_tokens(self, num_ids: int) -> None:
        self.metrics.completion_tokens += num_ids

    def _check_room(self) -> None:
        if self.draining:
            raise ApiError(503, "this service is ending", code="ending", retry_after=_RETRY_SECONDS)
        if self.num_waiting > self.config.max_waiting:
            raise _overloaded()
        self._check_memory(0)

    def _check_memory(self, more: int) -> None:
        """Refuse a request that would wait with `more` bytes beside those of all that wait."""
        waiting = self._held + self.engine.waiting_bytes
        if waiting and waiting + more > max(_MOST_HELD, _HELD_BODIES * self.config.max_body):
            raise _overloaded()

    async def _job(self, asked: ChatRequest, arrived: float) -> tuple[Job, list[tuple[int, int]]]:
        served = self.models.get(asked.model)
        if served is None:
            raise ApiError(
                404,
                f"no model {asked.model[:100]!r} here; there is {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        limit = asked.limit or min(MAX_NEW_TOKENS, self.config.max_new_tokens)
        if limit > self.config.max_new_tokens:
            raise ApiError(
                400,
                f"max_tokens: expected at most {self.config.max_new_tokens} (max_new_tokens), found {limit}",
                param="max_tokens",
                code="invalid_value",
            )
        loaded = served.loaded
        messages, addresses = read_conversation(asked, loaded.tokenizer, max_images=self.config.max_images)
        found = [(where, self._pictures.find(where, address)) for where, address in addresses]
        loop = asyncio.get_running_loop()
        fetched = await asyncio.gather(
            *(loop.run_in_executor(self._fetching, self._pictures.get, *each) for each in found)
        )
        places = [where for where, _ in found]
        prompt, sizes = await loop.run_in_executor(self._preparing, _prepare, loaded, messages, places, fetched)
        prompt_tokens = len(prompt["input_ids"])
        context = loaded.model.config.language.max_position_embeddings
        if prompt_tokens >= self.config.max_batch_tokens:
            raise ApiError(
                400,
                f"messages: prompt of {prompt_tokens} tokens, expected fewer than {self.config.max_batch_tokens} "
                "(max_batch_tokens)",
                param="messages",
                code="context_length_exceeded",
            )
        seed = asked.seed % 2**64 if asked.seed is not None else secrets.randbits(32)
        return Job(
            model=asked.model,
            prompt=prompt,
            limit=answer_limit(prompt_tokens, limit, context),
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=seed,
            stops=asked.stops,
            deadline=arrived + self.config.deadline,
        ), sizes


def _boxes(text: str, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The fields of an answer's message that tell of its boxes, as `infer` names them."""
    read = read_boxes(text, sizes)
    return {"boxes": [box_row(each) for each in read.boxes], "malformed_boxes": read.malformed}


def _overloaded() -> ApiError:
    return ApiError(429, "too many requests are waiting", code="overloaded", retry_after=_RETRY_SECONDS)


def _prepare(
    loaded: Loaded, messages: Sequence[Message], places: Sequence[str], pictures: Sequence[ImageRef]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The prompt, and the size of each picture in pixels; runs in a thread.

    Raises:
        ApiError: a picture that cannot be used, or a prompt that is too long.
    """
    sizes = []
    for where, picture in zip(places, pictures, strict=True):
        try:
            sizes.append(loaded.images.size(picture))
        except ImageError as error:
            raise refused(where, str(error)) from error
    context = loaded.model.config.language.max_position_embeddings
    grids = [tile_grid(size, len(sizes), loaded.candidates) for size in sizes]
    try:
        check_text(messages, loaded.tokenizer, context)
        answer_limit(sum(map(num_image_tokens, grids)), 1, context)  # before anything is decoded
        prompt = prepare(messages, pictures, loaded)
        answer_limit(len(prompt["input_ids"]), 1, context)
        return prompt, sizes
    except ImageError as error:
        raise refused("messages", str(error)) from error
    except UserError as error:
        raise ApiError(400, f"messages: {error}", param="messages", code="context_length_exceeded") from error
