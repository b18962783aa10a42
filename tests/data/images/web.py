"""A web server on 127.0.0.1 that answers as a test says, for pictures that are fetched."""

from __future__ import annotations

import io
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images.fetch import FetchLimits
from data.images.ref import ImageRef

CERTIFICATE = Path(__file__).with_name("pictures_example.pem")
"""Of pictures.example, which vouches for itself until 2126, with its key, which guards nothing."""

QUICK = FetchLimits(connect_seconds=10, read_seconds=10, total_seconds=30, pause_seconds=0.01, max_bytes=200_000)
"""Time enough for a busy machine, few bytes, and no pause to wait for."""

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Looks the path up among the server's answers."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        answer = self.server.answers.get(self.path)  # type: ignore[attr-defined]
        if answer is None:
            self.send_error(404)
        else:
            answer(self)

    def give(self, data: bytes, *, length: int | None = None, kind: str = "image/png") -> None:
        """Send a body, of which `length` bytes are announced; None: all."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def redirect(self, to: str, status: int = 302) -> None:
        self.send_response(status)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class Web(ThreadingHTTPServer):
    """The server; `answers` holds what each path does, `asked` the paths and hosts that were asked for."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, secure: bool = False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str]] = []
        self.ending = threading.Event()  # what an answer that dawdles waits for
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, path: str = "", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that has had enough hangs up."""

    def end(self) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()


def picture(kind: str = "png", size: tuple[int, int] = (90, 60)) -> bytes:
    """Encode noise, always the same."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def ref(address: str) -> ImageRef:
    """A picture at an address."""
    return ImageRef(kind="url", name=address)
