"""Fetches a picture from an address that a stranger may have written.

The name is resolved once, every address it has is checked, and the connection goes to one that was checked: a name
that means another machine at the second look gains nothing. Every redirect goes the same way again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from urllib.parse import urljoin

import certifi

from data.images.files import ImageError, shown
from data.images.limited_socket import LimitedSocket, TooManyBytesError, time_left
from data.images.web_address import Target, parse_address, resolve

_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)  # beside 5xx: the same question may be answered later
_PIECE = 1 << 16  # bytes read at a time
_HEADER_BYTES = 1 << 20  # of an answer, at most


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """How long and how much is waited for."""

    connect_seconds: float = 10.0
    """Until a connection stands."""
    read_seconds: float = 20.0
    """Without a byte."""
    total_seconds: float = 120.0
    """For one picture, with redirects and further tries."""
    max_bytes: int = 100_000_000
    max_redirects: int = 5
    tries: int = 3
    """After a broken connection or an answer that may pass."""
    pause_seconds: float = 1.0
    """Before the second try; doubled before each further one."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What an address gave."""

    data: bytes
    content_type: str
    """As the server says, such as text/html; empty: it says nothing."""


class _MayPassError(Exception):
    """Something that another try may not meet."""


def fetch(address: str, *, limits: FetchLimits, allow_private: bool) -> Fetched:
    """Fetch what lies at an http or https address, without the environment's proxies: through one nothing is checked.

    Args:
        address: as it was written.
        limits: how long and how much is waited for.
        allow_private: let it lead into private and local networks.

    Raises:
        ImageError: naming the address and the reason.
    """
    deadline = time.monotonic() + limits.total_seconds
    for number in range(1, limits.tries + 1):
        try:
            return _follow(address, deadline, limits, allow_private)
        except _MayPassError as error:
            pause = limits.pause_seconds * 2 ** (number - 1)
            if number == limits.tries or time.monotonic() + pause > deadline:
                tries = f"{number} tries" if number > 1 else "1 try"
                raise ImageError(f"cannot fetch {shown(address)}: {error} (after {tries})") from None
            time.sleep(pause)
    raise AssertionError("no try was made")


def _follow(address: str, deadline: float, limits: FetchLimits, allow_private: bool) -> Fetched:
    """Make one try, through all redirects."""
    place, refused = address, f"cannot fetch {shown(address)}"
    for _ in range(limits.max_redirects + 1):
        target = parse_address(place, refused)
        try:
            answer = _ask(target, resolve(target, refused, allow_private=allow_private), deadline, limits, address)
        except ImageError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: http.client on nonsense
            raise _as_failure(error, address, limits) from None
        if isinstance(answer, Fetched):
            return answer
        try:
            place = urljoin(place, answer)
        except ValueError:
            place = answer
        refused = f"cannot fetch {shown(address)}: it redirects to {shown(place)}"
    raise ImageError(f"cannot fetch {shown(address)}: more than {limits.max_redirects} redirects")


def _as_failure(error: Exception, address: str, limits: FetchLimits) -> Exception:
    if isinstance(error, TooManyBytesError):
        return _too_long(address, limits, "more")
    if isinstance(error, TimeoutError):
        return ImageError(f"cannot fetch {shown(address)}: timed out")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ImageError(f"cannot fetch {shown(address)}: its certificate is not valid ({error.verify_message})")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return ImageError(f"cannot fetch {shown(address)}: no such host ({error.strerror})")
    text = (error.strerror if isinstance(error, OSError) else None) or shown(str(error)) or type(error).__name__
    return _MayPassError(text)


def _ask(target: Target, ips: Sequence[str], deadline: float, limits: FetchLimits, address: str) -> Fetched | str:
    """Ask one server.

    Returns:
        What it gave, or where it redirects to.
    """
    with _connect(target, ips, deadline, limits) as raw:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = LimitedSocket(  # type: ignore[assignment]
            raw,
            deadline=deadline,
            read_seconds=limits.read_seconds,
            max_bytes=limits.max_bytes + limits.max_bytes // 8 + _HEADER_BYTES,  # chunks have headers of their own
        )
        headers = {
            "Host": target.host_header,
            "User-Agent": "deepseek-vl2-finetune",
            "Accept": "image/*, */*;q=0.1",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", target.path, headers=headers)
        response = connection.getresponse()
        status = response.status
        if status in _REDIRECTS and (location := response.getheader("Location")):
            with contextlib.suppress(UnicodeError):  # http.client takes every header for Latin-1
                location = location.encode("latin-1").decode("utf-8")
            return location
        if status != 200:
            said = f"the server answers {status} {http.client.responses.get(status, '')}".rstrip()
            if status >= 500 or status in _MAY_PASS:
                raise _MayPassError(said)
            raise ImageError(f"cannot fetch {shown(address)}: {said}")
        return Fetched(
            data=_body(response, limits, address),
            content_type=(response.getheader("Content-Type") or "").partition(";")[0].strip().lower(),
        )


def _body(response: http.client.HTTPResponse, limits: FetchLimits, address: str) -> bytes:
    announced = response.length
    pieces = bytearray()
    while announced is None or announced <= limits.max_bytes:
        piece = response.read(_PIECE)
        pieces += piece
        if len(pieces) > limits.max_bytes:
            break
        if not piece:
            if announced is not None and len(pieces) < announced:
                raise _MayPassError(f"the server announced {announced} bytes and sent {len(pieces)}")
            return bytes(pieces)
    raise _too_long(address, limits, f"{announced}" if announced is not None else "more")


def _too_long(address: str, limits: FetchLimits, found: str) -> ImageError:
    return ImageError(f"cannot fetch {shown(address)}: expected at most {limits.max_bytes} bytes, found {found}")


def _connect(target: Target, ips: Sequence[str], deadline: float, limits: FetchLimits) -> socket.socket:
    """Connect to the first of the checked addresses that answers."""
    last: OSError = OSError("the name has no address")
    for ip in ips:
        try:
            raw = socket.create_connection((ip, target.port), timeout=time_left(deadline, limits.connect_seconds))
        except OSError as error:
            last = error
            continue
        if not target.secure:
            return raw
        try:
            return _tls().wrap_socket(raw, server_hostname=target.host)
        except BaseException:
            raw.close()
            raise
    raise last


@cache
def _tls() -> ssl.SSLContext:
    given = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    return ssl.create_default_context(cafile=given or certifi.where())
