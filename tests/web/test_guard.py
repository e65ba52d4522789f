"""The web server under clients that are hostile, silent, or another site's page."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from lfdm_export.web import connections, guard
from lfdm_export.web.app import _read_request
from lfdm_export.web.connections import Connection
from lfdm_export.web.guard import Guard
from tests.running_server import DEADLINE, eventually

GET = b"GET /v1/videos HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\n"


async def count_bytes(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with the size of a request."""
    if scope["type"] == "http":
        size = len(await Request(scope, receive).body())
        length = b"%d" % len(str(size))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": str(size).encode()})


class Site:
    """A running server."""

    def __init__(self, server: uvicorn.Server, port: int) -> None:
        self.server, self._port = server, port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=DEADLINE)

    def ask(self, head: bytes, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        with self.connect() as connection:
            length = b"Content-Length: %d\r\n" % len(body) if body else b""
            connection.sendall(head + length + b"Connection: close\r\n\r\n" + body)
            return parsed(until_closed(connection))


def parsed(answer: bytes) -> tuple[int, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


@contextmanager
def serving(*, here: bool = True) -> Iterator[Site]:
    config = uvicorn.Config(Guard(count_bytes, here=here), port=0, log_level="warning", http=Connection, lifespan="off")
    server = uvicorn.Server(config)
    with closing(server.config.bind_socket()) as listener:
        listener.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Site(server, listener.getsockname()[1])
        finally:
            server.force_exit = server.should_exit = True
            thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.mark.parametrize("host", [b"evil.com", b"evil.com:80", b"localhost.evil.com", b"127.0.0.1.evil.com:8080", b""])
def test_another_name_of_this_machine_is_refused(site: Site, host: bytes):
    """A page whose name leads here (DNS rebinding) could otherwise read and delete all videos."""
    status, body = site.ask(b"GET /v1/videos HTTP/1.1\r\nHost: %s\r\n" % host)
    assert (status, "answers to localhost" in json.loads(body)["error"]["message"]) == (421, True)
    with serving(here=False) as public:
        assert public.ask(b"GET /v1/videos HTTP/1.1\r\nHost: %s\r\n" % (host or b"x"))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Sec-Fetch-Site: cross-site\r\n", 403),
        (b"Sec-Fetch-Site: same-site\r\nOrigin: http://localhost\r\n", 403),
        (b"Origin: http://evil.com\r\n", 403),
        (b"Origin: null\r\n", 403),
        (b"Origin: http://localhost:81\r\n", 403),
        (b"Origin: http://localhost\r\n", 200),
        (b"Sec-Fetch-Site: same-origin\r\nOrigin: https://in.front.of.it\r\n", 200),
        (b"", 200),
    ],
)
def test_pages_of_other_sites_cannot_request_videos(site: Site, headers: bytes, status: int):
    assert site.ask(POST + headers, b"{}")[0] == status
    assert site.ask(GET + headers)[0] == 200, "reading is safe: such a page does not get the answer"


def test_a_websocket_is_closed(site: Site):
    async def refused() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        await Guard(count_bytes, here=True)({"type": "websocket", "headers": [(b"host", b"localhost")]}, receive, send)
        return sent

    assert asyncio.run(refused()) == [{"type": "websocket.close", "code": 1008}]


def test_a_body_that_does_not_come_is_refused_and_not_logged(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with site.connect() as connection:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        status, body = parsed(until_closed(connection))
    assert (status, "did not come in time" in json.loads(body)["error"]["message"]) == (408, True)
    with site.connect() as connection:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
    eventually(lambda: not site.server.server_state.tasks, "the other client's request has ended")
    assert not caplog.records


def test_bodies_over_the_maximum_are_refused_together(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "MOST_BYTES", 1000)
    assert site.ask(POST, bytes(1000)) == (200, b"1000")
    with site.connect() as slow:
        slow.sendall(POST + b"Content-Length: 1000\r\n\r\n" + bytes(900))
        eventually(lambda: site.ask(POST, bytes(101))[0] == 503, "the other body has come")
        assert site.ask(POST, bytes(90)) == (200, b"90")
    eventually(lambda: site.ask(POST, bytes(1000))[0] == 200, "it is gone")


@pytest.mark.parametrize("sent", [b"", GET[:20], GET + b"\r\n"], ids=["nothing", "half a head", "one request"])
def test_a_silent_connection_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch, sent: bytes):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    with site.connect() as connection:
        connection.sendall(sent)
        assert until_closed(connection).count(b"HTTP/1.1 ") == sent.endswith(b"\r\n\r\n")


def test_the_longest_silent_connection_makes_room(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    with site.connect() as silent:
        eventually(lambda: len(site.server.server_state.connections) == 1, "it is open")
        with site.connect():
            eventually(lambda: len(site.server.server_state.connections) == 2, "both are open")
            assert site.ask(GET)[0] == 200
            assert until_closed(silent) == b""


def test_json_that_swells_is_refused():
    """Two bytes of a list become a hundred in memory."""
    body = b'{"a":[' + b"[]," * 1000 + b"1]}"

    async def read() -> Any:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        return await _read_request(Request({"type": "http", "headers": []}, receive), 1 << 20)

    with pytest.raises(Exception, match="more than 1,000 values in JSON"):
        asyncio.run(read())
