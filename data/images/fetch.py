"""Fetches a picture from an address that a stranger may have written.

The name is resolved once, every address it has is checked, and the connection goes to one that was checked: a name
that means another machine at the second look gains nothing. Every redirect goes the same way again.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import certifi

from data.images.files import ImageError, shown

_REDIRECTS = (301, 302, 303, 307, 308)
_MAY_PASS = (408, 425, 429)  # beside 5xx: the same question may be answered later
_PIECE = 1 << 16  # bytes read at a time
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_SAFE = "/%:@!$&'()*+,;=?~[]"  # what stays as it is in the path and query of an address


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


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public Internet, and so does the IPv4 address that is hidden in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        hidden = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            hidden.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if any(inner is not None and not is_public(str(inner)) for inner in hidden):
            return False
        if ip.ipv4_mapped is not None or ip in _NAT64:
            return True
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One address, taken apart."""

    secure: bool
    host: str  # ASCII, without brackets
    port: int
    path: str  # with the query

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def _parse(place: str, refused: str) -> _Target:
    """Take an address apart.

    Args:
        place: the address.
        refused: how an error about it begins.
    """
    try:
        parts = urlsplit(place)
        host, port = parts.hostname or "", parts.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as error:  # UnicodeError is one
        raise ImageError(f"{refused}: not an address ({shown(str(error))})") from None
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{refused}: expected an address of http or https")
    if parts.username is not None or parts.password is not None:
        raise ImageError(f"{refused}: expected an address without a user name or a password")
    if not host or any(not ("!" <= character < "\x7f") for character in host):
        raise ImageError(f"{refused}: expected an address with the name of a host")
    secure = parts.scheme == "https"
    path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    return _Target(secure=secure, host=host, port=port or (443 if secure else 80), path=path)


def _follow(address: str, deadline: float, limits: FetchLimits, allow_private: bool) -> Fetched:
    """Make one try, through all redirects."""
    place, refused = address, f"cannot fetch {shown(address)}"
    for _ in range(limits.max_redirects + 1):
        target = _parse(place, refused)
        try:
            answer = _ask(target, _checked_addresses(target, address, allow_private), deadline, limits, address)
        except (OSError, http.client.HTTPException) as error:
            raise _as_failure(error, address) from None
        if isinstance(answer, Fetched):
            return answer
        try:
            place = urljoin(place, answer)
        except ValueError:
            place = answer
        refused = f"cannot fetch {shown(address)}: it redirects to {shown(place)}"
    raise ImageError(f"cannot fetch {shown(address)}: more than {limits.max_redirects} redirects")


def _as_failure(error: Exception, address: str) -> Exception:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, TimeoutError):
        return ImageError(f"cannot fetch {shown(address)}: timed out")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ImageError(f"cannot fetch {shown(address)}: its certificate is not valid ({error.verify_message})")
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return ImageError(f"cannot fetch {shown(address)}: no such host ({error.strerror})")
    text = (error.strerror if isinstance(error, OSError) else None) or shown(str(error)) or type(error).__name__
    return _MayPassError(text)


def _checked_addresses(target: _Target, address: str, allow_private: bool) -> list[str]:
    """Resolve a host; one private address among its many refuses it, for which of them is taken is not ours to say."""
    try:
        infos = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise ImageError(f"cannot fetch {shown(address)}: no such host") from None
    found = list(dict.fromkeys(str(info[4][0]) for info in infos))
    if not allow_private and not all(map(is_public, found)):
        raise ImageError(
            f"cannot fetch {shown(address)}: it leads to {shown(target.host)}, in a private or local network; with "
            "data.allow_private_urls=true such addresses are fetched"
        )
    return found


def _ask(target: _Target, ips: Sequence[str], deadline: float, limits: FetchLimits, address: str) -> Fetched | str:
    """Ask one server.

    Returns:
        What it gave, or where it redirects to.
    """
    with _connect(target, ips, deadline, limits) as raw:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _TimedSocket(raw, deadline, limits.read_seconds)  # type: ignore[assignment]
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
        if status in _REDIRECTS and response.getheader("Location"):
            return str(response.getheader("Location"))
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
    found = f"{announced}" if announced is not None else "more"
    raise ImageError(f"cannot fetch {shown(address)}: expected at most {limits.max_bytes} bytes, found {found}")


def _connect(target: _Target, ips: Sequence[str], deadline: float, limits: FetchLimits) -> socket.socket:
    """Connect to the first of the checked addresses that answers."""
    last: OSError = OSError("the name has no address")
    for ip in ips:
        try:
            raw = socket.create_connection((ip, target.port), timeout=_left(deadline, limits.connect_seconds))
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


def _left(deadline: float, most: float) -> float:
    """How long one wait may take, seconds."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, most)


class _TimedSocket:
    """What http.client needs of a socket, with a deadline: a server that sends a byte now and then holds nobody up."""

    def __init__(self, raw: socket.socket, deadline: float, read_seconds: float):
        self.raw, self.deadline, self.read_seconds = raw, deadline, read_seconds

    def sendall(self, data: bytes) -> None:
        self.raw.settimeout(_left(self.deadline, self.read_seconds))
        self.raw.sendall(data)

    def makefile(self, mode: str, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self))

    def close(self) -> None:
        """Leave it open: the answer is still read, and `_ask` closes it."""


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket):
        super().__init__()
        self.timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.timed.raw.settimeout(_left(self.timed.deadline, self.timed.read_seconds))
        return self.timed.raw.recv_into(buffer)
