"""The answer on its way to the client: as one document, or piece by piece as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from train.serve.engine import Job, Piece
from train.serve.errors import ApiError

_SENDING_SECONDS = 5.0  # beyond its deadline an answer may take so long to be read
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class Pieces:
    """The pieces of one answer as they come, or the news that the client has gone."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        self.fresh = True  # nothing has come yet

    def put(self, piece: Piece) -> None:
        """Take a piece, in the thread of the event loop."""
        self.fresh = False
        self._queue.put_nowait(piece)

    async def take(self) -> list[Piece]:
        """Wait for a piece; and all that are there then."""
        pieces = [await self._queue.get()]
        while not self._queue.empty():
            pieces.append(self._queue.get_nowait())
        return pieces


class Answering(Response):
    """Answers a job: waits for its pieces, and lets it go when its client goes.

    Args:
        job: waits in the engine.
        pieces: what comes of it.
        boxes: reads the boxes of a whole answer: the fields of its message that tell of them.
        streamed: piece by piece.
        usage: a last event of a stream counts the tokens.
        finished: called once with the number of tokens, however it ends.
    """

    def __init__(
        self,
        job: Job,
        pieces: Pieces,
        *,
        boxes: Callable[[str], dict[str, Any]],
        streamed: bool,
        usage: bool,
        finished: Callable[[int], None],
    ):
        self.job, self.pieces, self.boxes = job, pieces, boxes
        self.streamed, self.usage, self.finished = streamed, usage, finished
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.outcome, self.num_ids, self.background = 499, 0, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; without a client, or one that reads, there is nothing to answer."""
        answer = asyncio.ensure_future(self._stream(send) if self.streamed else self._whole(scope, receive, send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            rest = max(0.0, self.job.deadline - time.monotonic()) + _SENDING_SECONDS
            await asyncio.wait([answer, gone], timeout=rest, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await answer
        finally:
            self.job.gone = True
            gone.cancel()
            scope["outcome"] = self.outcome
            self.finished(self.num_ids)

    async def _pieces(self) -> AsyncIterator[Piece]:
        """The pieces, some of them joined, until the last.

        Raises:
            ApiError: there will be no answer.
        """
        while True:
            came = await self.pieces.take()
            self.num_ids, finish = came[-1].num_ids, came[-1].finish
            if finish == "deadline":
                raise ApiError(504, "the request took longer than this service's deadline", code="deadline")
            if finish == "failed":
                raise ApiError(500, "the answer failed; the service's log says why", code="server_error")
            yield Piece(text="".join(piece.text for piece in came), num_ids=self.num_ids, finish=finish)
            if finish:
                return

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        text, finish = "", None
        try:
            async for piece in self._pieces():
                text, finish = text + piece.text, piece.finish
        except ApiError as error:
            self.outcome = error.status
            await JSONResponse(error.document, error.status, error.headers)(scope, receive, send)
            return
        self.outcome = 200
        message = {"role": "assistant", "content": text, "refusal": None, **self.boxes(text)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        document = self._document("chat.completion", [choice], usage=self._usage())
        await JSONResponse(document)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        text = ""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await self._send(send, self._chunk({"role": "assistant", "content": "", "refusal": None}))
            async for piece in self._pieces():
                text += piece.text
                if piece.text:
                    await self._send(send, self._chunk({"content": piece.text}))
                if piece.finish:
                    found = {key: value for key, value in self.boxes(text).items() if value}
                    await self._send(send, self._chunk(found, piece.finish))
            if self.usage:
                await self._send(send, self._document("chat.completion.chunk", [], usage=self._usage()))
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
            self.outcome = 200
        except ApiError as error:
            self.outcome = error.status
            await self._send(send, error.document)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, document: dict[str, Any]) -> None:
        body = f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._document("chat.completion.chunk", [choice], **({"usage": None} if self.usage else {}))

    def _document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.job.model}
        return {**head, "choices": choices, **more}

    def _usage(self) -> dict[str, int]:
        prompt = len(self.job.prompt["input_ids"])
        return {"prompt_tokens": prompt, "completion_tokens": self.num_ids, "total_tokens": prompt + self.num_ids}


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
