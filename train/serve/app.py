"""The service as a web application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.serve.chat import Chat
from train.serve.connection import LocalOnly, is_local
from train.serve.errors import ApiError
from train.serve.metrics import resident_bytes
from train.serve.models import Served
from train.serve.page_files import PageFiles

_LEFT = 499  # as nginx counts clients that went away


class Counted:
    """Counts the requests to /v1 that are under way, and those that have ended, by their status."""

    def __init__(self, app: ASGIApp, chat: Chat):
        self._app, self._chat = app, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        status = _LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._chat.active += 1
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self._chat.active -= 1
            self._chat.metrics.requests[scope.get("outcome", status)] += 1


def make_app(chat: Chat) -> FastAPI:
    """The application.

    Args:
        chat: answers.
    """
    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="DeepSeek-VL2", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Counted, chat=chat)
    if not chat.has_key and is_local(chat.config.host):
        app.add_middleware(LocalOnly, host=chat.config.host)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await chat.answer(request)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        chat.check_key(request)
        return {"object": "list", "data": [_model(each, started) for each in chat.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        chat.check_key(request)
        if name not in chat.models:
            raise ApiError(404, f"no model {name[:100]!r} here", param="model", code="model_not_found")
        return _model(chat.models[name], started)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ending" if chat.draining else "ok"}, 503 if chat.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        now = {
            "requests_waiting": ("Requests being read, prepared or waiting for their turn.", chat.num_waiting),
            "requests_running": ("Requests being answered.", chat.engine.num_running),
            "kv_cache_bytes": ("Keys and values that are kept.", chat.engine.kv_bytes),
            "resident_bytes": ("Memory of the process.", resident_bytes()),
        }
        return PlainTextResponse(chat.metrics.text(now), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.document, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(found.document, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "a fault of the service; its log says more").document, 500)

    app.mount("/", PageFiles(), name="page")
    return app


def _model(served: Served, created: int) -> dict[str, Any]:
    """A model as a client lists it; the last two are for a page that draws on pictures, and for its reader."""
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "deepseek-vl2-finetune",
        "exif_orientation": served.loaded.images.exif,
        "rehearsal": served.loaded.source.rehearsal,
    }
