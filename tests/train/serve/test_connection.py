"""Connections that keep the service waiting, and pages that would ask it behind its user's back."""

import asyncio
import socket

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from train.serve import connection, stream
from train.serve.connection import Connection, LocalOnly
from train.serve.engine import Job
from train.serve.stream import Answering, Pieces

ASK = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def talk(sent: bytes, more: bytes = b"") -> tuple[bytes, bytes]:
    """What comes back to `sent`, and to `more` once the service has looked twice at the connection."""
    config = uvicorn.Config(PlainTextResponse("fine"), log_level="critical", lifespan="off")
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    found = []
    for each in (sent, more):
        writer.write(each)
        try:
            found.append(await asyncio.wait_for(reader.read(1000), 1.0))
        except (TimeoutError, asyncio.TimeoutError, ConnectionError) as error:
            found.append(type(error).__name__.encode())
        await asyncio.sleep(5 * connection._PATIENCE)
    writer.close()
    server.close()
    return tuple(found)


def test_headers_that_do_not_come_end_the_connection(monkeypatch):
    monkeypatch.setattr(connection, "_PATIENCE", 0.02)
    for begun in (b"", ASK[:20]):
        first, _ = asyncio.run(talk(begun))
        assert first in (b"", b"ConnectionResetError")
    # One that is idle between two requests has uvicorn's own limit.
    first, second = asyncio.run(talk(ASK + b"\r\n", ASK + b"\r\n"))
    assert first.endswith(b"fine") and second.endswith(b"fine")


def test_an_answer_that_nobody_reads_is_let_go(monkeypatch):
    """The engine had long ended it; it stayed among the requests under way, and an ending service waited for it."""
    monkeypatch.setattr(stream, "_SENDING_SECONDS", 0.05)
    counted = []
    job = Job(model="m", prompt={}, limit=1, temperature=0.0, top_p=1.0, seed=0, stops=[], deadline=0.0)
    answer = Answering(
        job, Pieces(), boxes=lambda text: {}, streamed=True, usage=False, finished=lambda count: counted.append(count)
    )

    async def forever(*_):
        await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(answer({"type": "http"}, forever, forever), 5))
    assert job.gone and counted == [0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "127.8.0.1", "[::1]:8000", "[::1]")),
        *((name, 421) for name in ("evil.example", "localhost.evil.example:8000", "10.0.0.1", "[::2]:8000", "", "a:b")),
    ],
)
def test_only_names_of_this_machine(host, status):
    found = TestClient(LocalOnly(PlainTextResponse("fine"), "127.0.0.1")).get("/", headers={"Host": host})
    assert found.status_code == status
    assert status == 200 or "Host: localhost" in found.json()["error"]["message"]


@pytest.mark.slow
def test_a_service_without_a_key_has_no_other_name(service):
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        link.sendall(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 421 ")
