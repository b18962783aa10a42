"""Takes an address of the web apart, and finds where it leads: to the public Internet, unless more is allowed."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from data.images.files import ImageError, shown

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_SAFE = "/%:@!$&'()*+,;=?~[]"  # what stays as it is in the path and query of an address


@dataclass(frozen=True, kw_only=True)
class Target:
    """One address, taken apart."""

    secure: bool
    host: str  # ASCII, without brackets
    port: int
    path: str  # with the query

    @property
    def host_header(self) -> str:
        """What the server is told that it was asked for."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(place: str, refused: str) -> Target:
    """Take an address apart.

    Args:
        place: the address.
        refused: how an error about it begins.

    Raises:
        ImageError: none of http or https, or one that cannot be taken apart without doubt.
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
    return Target(secure=secure, host=host, port=port or (443 if secure else 80), path=path)


def resolve(target: Target, refused: str, *, allow_private: bool) -> list[str]:
    """Look up the IP addresses of a host; one private address among its many refuses it.

    Args:
        target: whose host.
        refused: how an error about it begins.
        allow_private: take any address.

    Raises:
        ImageError: a private or local address.
        OSError: no such host, or nobody who knows.
    """
    try:
        infos = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise ImageError(f"{refused}: no such host") from None
    found = list(dict.fromkeys(str(info[4][0]) for info in infos))
    if not allow_private and not all(map(is_public, found)):
        raise ImageError(
            f"{refused}: it leads to {shown(target.host)}, in a private or local network; with "
            "data.allow_private_urls=true such addresses are fetched"
        )
    return found


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
