"""`bash launch.sh serve model=FOLDER`: loads, listens, and ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from train.ask.note import note
from train.config.load import load_serve_config
from train.config.serve_schema import ServeConfig
from train.machine.devices import use_device
from train.machine.memory import find_free_memory
from train.serve.app import make_app
from train.serve.chat import Chat
from train.serve.connection import Connection
from train.serve.engine import Engine, Job, Piece
from train.serve.metrics import Metrics
from train.serve.models import load_models, warn_of_memory
from vl2.errors import UserError

_LONGEST_KEY = 4096  # characters
_CLOSING_SECONDS = 5.0  # connections may take so long to close once all is answered
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: list[str]) -> int:
    """Entry script."""
    started = time.perf_counter()
    config = load_serve_config(arguments)
    key = check_key("api_key", config.api_key) if config.api_key else read_key(config.api_key_file)
    check_folder(config.media_root)
    use_device(config.device, tf32=config.tf32)
    with listen(config.host, config.port) as place:
        models = load_models(config)
        warn_of_memory(models, config.max_batch_tokens, find_free_memory())
        return asyncio.run(serve(config, models, key, place, started))


async def serve(config: ServeConfig, models: dict, key: str, place: socket.socket, started: float) -> int:
    """Answer requests until a signal comes, then let what runs come to its end; the exit code."""
    loop, code = asyncio.get_running_loop(), 0

    def deliver(pieces: list[tuple[Job, Piece]]) -> None:
        loop.call_soon_threadsafe(_hand_out, pieces)

    def failed() -> None:
        nonlocal code
        code = 1
        loop.call_soon_threadsafe(_end_now, server)

    engine = Engine(
        models, chunk=config.chunk, max_batch_tokens=config.max_batch_tokens, deliver=deliver, failed=failed
    )
    chat = Chat(config, models, engine, Metrics(), key=key)
    server = _Server(
        uvicorn.Config(
            make_app(chat), http=Connection, log_level="warning", access_log=False, lifespan="off", server_header=False
        )
    )
    for number in _SIGNALS:
        loop.add_signal_handler(number, _end, server, chat)
    engine.start()
    running = asyncio.create_task(server.serve(sockets=[place]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"serving {', '.join(models)} at http://{shown}:{port} after {time.perf_counter() - started:.1f} s", flush=True
    )
    await running
    engine.stop()
    return code


def _hand_out(pieces: list[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        job.receive(piece)


class _Server(uvicorn.Server):
    """A server that leaves the signals to us: uvicorn would refuse connections from the first one on."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _end(server: uvicorn.Server, chat: Chat) -> None:
    """Take no new requests; end when none is under way, or at once the second time."""
    if chat.draining:
        _end_now(server)
        return
    chat.draining = True
    _draining.add(asyncio.ensure_future(_drain(server, chat)))
    with contextlib.suppress(OSError):  # who read what it says may be gone: it ends all the same
        note(f"ending: {chat.active} requests are under way")


def _end_now(server: uvicorn.Server) -> None:
    server.should_exit = server.force_exit = True


_draining: set[asyncio.Future] = set()


async def _drain(server: uvicorn.Server, chat: Chat) -> None:
    """Wait for the requests that are under way; none takes longer than its deadline.

    A client that does not read what it was sent keeps its connection open for ever: it is not waited for.
    """
    stop = time.monotonic() + chat.config.deadline
    while chat.active and time.monotonic() < stop:
        await asyncio.sleep(0.05)
    server.should_exit = True
    # Requests that such a client has sent one after another start while the loop cancels those before: it never ends.
    hard_end = threading.Timer(_CLOSING_SECONDS + 1, os._exit, [0])
    hard_end.daemon = True
    hard_end.start()
    await asyncio.sleep(_CLOSING_SECONDS)
    server.force_exit = True


def read_key(path: str) -> str:
    """The key in a file, without the white space around it; empty: no file was given.

    Raises:
        UserError: no such file, or one that holds no key.
    """
    if not path:
        return ""
    try:
        key = Path(path).read_text("ascii").strip()
    except UnicodeDecodeError:
        raise UserError(f"api_key_file={path}: expected a key of ASCII characters, found other bytes") from None
    except OSError as error:
        raise UserError(f"api_key_file={path}: cannot be read ({error.strerror})") from error
    return check_key(f"api_key_file={path}", key)


def check_key(where: str, key: str) -> str:
    """Refuse what a header cannot hold; the key.

    Args:
        where: it was given; the key itself is not shown.
        key: as it was given.

    Raises:
        UserError: naming the place.
    """
    if not key or len(key) > _LONGEST_KEY or any(not "!" <= character <= "~" for character in key):
        raise UserError(
            f"{where}: expected one key of 1 to {_LONGEST_KEY} ASCII characters, spaces not among them, found "
            f"{len(key)} characters"
        )
    return key


def check_folder(path: str) -> None:
    """Refuse a media_root that is no folder."""
    if path and not Path(path).is_dir():
        raise UserError(f"media_root={path}: no such folder")


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before the model is loaded, which takes longer; connections are refused until it is.

    Raises:
        UserError: it is taken, or the address is none of this machine's.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen at host={host} port={port}: {error.strerror or error}; give another "
            "port=, or 0 for a free one"
        ) from error
    return place
