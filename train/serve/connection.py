"""Who may connect, and for how long a connection may keep the service waiting."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from train.serve.errors import ApiError

_PATIENCE = 10.0  # seconds


class Connection(H11Protocol):
    """uvicorn's, which is cut where it waits for its client: for the rest of a request's headers, or to read an answer.

    uvicorn itself limits how long a connection may be idle, and nothing else: with some thousand that send one byte of
    a header each, there would be no file descriptor left.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._stuck: tuple[Any, ...] | None = None
        self._look_again = self.loop.call_later(_PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._look_again.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Cut the connection if it waits for what it waited for the last time."""
        answered = self.cycle is None or self.cycle.response_complete
        stuck: tuple[Any, ...] | None = None
        if self.transport.is_closing():
            stuck = ("closing", self.transport.get_write_buffer_size())
        elif answered and self.timeout_keep_alive_task is None and self.conn.their_state is h11.IDLE:
            stuck = ("headers", id(self.cycle))
        if stuck is not None and stuck == self._stuck:
            self.transport.abort()
            return
        self._stuck = stuck
        self._look_again = self.loop.call_later(_PATIENCE, self._look)


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address to listen at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class LocalOnly:
    """Refuses requests to other names than this machine's own.

    A page of the web could otherwise ask a service that has no key: its server lets its own name lead here once the
    page is loaded, and the browser takes the answers for the page's own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it with 421."""
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
            name = name.strip("[]").lower()
            if not (is_local(name) or name == self._host):
                error = ApiError(
                    421,
                    f"expected the header Host: localhost, as this service has no key, found {given[:100]!a}; "
                    "start it with api_key_file= to ask it under another name",
                )
                await JSONResponse(error.document, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)
