"""Reads the body of a request: so many bytes and no more, whatever its header says, and not for ever."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import ClientDisconnect, Request

from train.serve.errors import ApiError

# What a client still sends after it has been refused is taken for so long: else it would see a broken connection.
_LINGER_SECONDS = 5.0


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Read a body.

    Args:
        request: whose.
        max_bytes: more are refused.
        seconds: until it must be there.

    Raises:
        ApiError: it is longer, or slower.
    """
    try:
        return await asyncio.wait_for(_read(request, max_bytes), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        raise ApiError(408, f"the body did not come within {seconds:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away", code="disconnected") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    pieces, size, stop = [], 0, 0.0
    async for piece in request.stream():
        size += len(piece)
        if size <= max_bytes:
            pieces.append(piece)
        elif not stop:
            pieces, stop = [], time.monotonic() + _LINGER_SECONDS
        elif time.monotonic() > stop:
            break
    if stop:
        raise ApiError(
            413, f"expected a body of at most {max_bytes} bytes, found more; send smaller pictures", code="too_large"
        )
    return b"".join(pieces)
