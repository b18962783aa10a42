"""Nonsense for a service: requests that are almost right, and bytes that are none; only this machine is asked.

Part of `bash launch.sh bench serve --fuzz MINUTES`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections import Counter
from typing import Any

from tests.train.serve.conftest import RAMBLING, data_uri, picture, shown, user

STRANGE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        -0.0,
        1e-320,
        1e308,
        0.5,
        1.5,
        "",
        "x",
        "nano",
        "\x00",
        "\ud800",
    ),
    *("\u202e", "🙂" * 50, "<image>", "<|User|>", "<|ref|>", "a" * 5000, [], {}, [[]], [None], [1], ["x"], {"a": 1}),
    *({"role": "user"}, {"type": "text"}, {"type": "image_url"}, {"url": "x"}, [{"type": "text", "text": "x"}]),
)
ADDRESSES = (
    *("http://127.0.0.1:1/", "http://[::1]/", "http://169.254.169.254/", "http://localhost/", "https://10.1.2.3/a.png"),
    *("file:///etc/passwd", "file://../x", "data:image/png;base64,AAAA", "data:,", "javascript:alert(1)", "\x00", "//"),
)
FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed", "stream", "stream_options", "n")
_REFUSED = frozenset({400, 404, 405, 408, 413, 415, 429})


def request(draw: random.Random, model: str) -> dict[str, Any]:
    """A request that is right."""
    parts: list[Any] = [draw.choice(("What is this?", RAMBLING, "你好"))]
    if draw.random() < 0.3:
        parts.insert(0, shown(data_uri(picture("red", (64, 64)))))
    fields: dict[str, Any] = {"model": model, "messages": [user(*parts)], "max_tokens": draw.randint(1, 12)}
    if draw.random() < 0.5:
        fields |= {"stream": True}
    if draw.random() < 0.5:
        fields |= {
            "temperature": draw.random() * 2,
            "seed": draw.randint(0, 99),
            "stop": draw.choice(("9", ["a", " "])),
        }
    return fields


def spoil(value: Any, draw: random.Random) -> Any:
    """Put something strange somewhere into a document."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {**value, draw.choice(("x", "", "content", *FIELDS)): draw.choice(STRANGE)}
        if draw.random() < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if key == "url" and draw.random() < 0.7:
            return {**value, key: draw.choice(ADDRESSES)}
        return {**value, key: spoil(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value * draw.choice((0, 2, 50))
        return [*value[:place], spoil(value[place], draw), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice(("\x00", "\ud800", "🙂", "<image>", "%", '"', "")) + value[place + 1 :]
    return draw.choice(STRANGE)


def garble(body: bytes, draw: random.Random) -> bytes:
    """Change some bytes, cut some off, or repeat them."""
    found = bytearray(body)
    for _ in range(draw.randint(1, 5)):
        found[draw.randrange(len(found))] = draw.randrange(256)
    return bytes(found[: draw.randrange(1, len(found) + 1)] * draw.choice((1, 1, 1, 3)))


def fuzz(place: str, seconds: float, model: str) -> dict[str, Any]:
    """Send nonsense for so long; a right question in between is always answered.

    Args:
        place: HOST:PORT on this machine.
        seconds: how long.
        model: what right requests ask.

    Raises:
        AssertionError: an answer that is neither right nor a proper refusal.
    """
    host, _, port = place.partition(":")
    assert host == "127.0.0.1", f"{place}: only a service on this machine is asked"
    draw, statuses, slowest = random.Random(time.time_ns()), Counter[int](), 0.0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        kind, document = draw.random(), request(draw, model)
        for _ in range(draw.randint(0, 3)):
            document = spoil(document, draw)
        body = json.dumps(document).encode()
        if kind < 0.15:
            body = garble(body, draw)
        began = time.monotonic()
        if kind > 0.95:
            _raw(host, int(port), body, draw)
        else:
            status, said = _post(place, body)
            statuses[status] += 1
            assert status == 200 or (status in _REFUSED and said["error"]["message"]), (status, said, body[:2000])
            slowest = max(slowest, time.monotonic() - began)
        if draw.random() < 0.02:
            good = {"model": model, "messages": [user("What is this?")], "max_tokens": 3}
            assert _post(place, json.dumps(good).encode())[0] == 200
    return {"fuzzed": sum(statuses.values()), "statuses": dict(statuses), "slowest_seconds": round(slowest, 2)}


def _post(place: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, json.loads(content) if answer.status != 200 else None


def _raw(host: str, port: int, body: bytes, draw: random.Random) -> None:
    """Bytes that are hardly HTTP; whatever is answered, nobody may hang."""
    lines = [
        draw.choice(("POST", "GET", "OPTIONS", "X" * 50))
        + " /v1/chat/completions "
        + draw.choice(("HTTP/1.1", "HTTP/9")),
        "Host: localhost",
        f"Content-Length: {draw.choice((0, -1, 5, len(body), 'x', 10**12))}",
        draw.choice(("Content-Type: application/json", "Transfer-Encoding: chunked", "X: " + "y" * 9000, "Broken")),
    ]
    with socket.create_connection((host, port), timeout=5) as client:
        client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: draw.randrange(len(body) + 1)])
        if draw.random() < 0.5:
            client.shutdown(socket.SHUT_WR)
            client.settimeout(1)
            with contextlib.suppress(OSError):
                client.recv(1000)
