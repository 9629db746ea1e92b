"""The client on asyncio against a server in the same process that does what the test asks for."""

import asyncio
import contextlib
import http
import json
import socket
import time

import pytest
from support.loops import quiet
from support.tokens import token
from websockets.asyncio.server import serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode

from chatd.client import aio
from chatd.client.aio import Client, Rejected
from chatd.client.protocol import Backoff
from chatd.messages import Entry, Id
from chatd.transport.frames import ack_frame, history_frame, message_frame
from chatd.transport.framing import payload

ESTABLISHED, ENDED = 1, (7, 8)
"""States of a TCP connection: open, and ended by the other side."""


def history(end, *entries, **notes):
    frames = [
        message_frame("abcd", Entry(number, "bob", f"m{number}", "2026-01-01T00:00:00.000Z")) for number in entries
    ]
    return payload(history_frame("abcd", end, frames, **notes)).decode()


class Script:
    """A server that serves each connection by the next function of a list, and the last one again and again."""

    def __init__(self, *serving, statuses=()):
        self._serving = [*serving]
        self._statuses = [*statuses]
        self.paths = []
        self.done = asyncio.Event()

    async def __aenter__(self):
        self._server = await serve(self._handle, "127.0.0.1", 0, process_request=self._answer, close_timeout=1)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self._server.wait_closed()

    def _answer(self, connection, request):
        self.paths.append(request.path)
        if not self._statuses:
            return None
        status, retry_after = self._statuses.pop(0)
        response = connection.respond(http.HTTPStatus(status), "no\n")
        if retry_after:
            response.headers["Retry-After"] = retry_after
        return response

    async def _handle(self, connection):
        step = self._serving.pop(0) if len(self._serving) > 1 else self._serving[0]
        with contextlib.suppress(ConnectionClosed):
            await step(connection)


async def greet(connection):
    """Serve an empty room until the client goes."""
    await connection.send(history(0))
    await connection.wait_closed()


def user(url, **options):
    return Client(url, username="ann", backoff=lambda: Backoff(0.01, 0.02), **options)


async def until(room, condition):
    """Return the first snapshot with a condition, however soon another follows it."""
    found = asyncio.get_running_loop().create_future()

    def look():
        if not found.done() and condition(snapshot := room.snapshot()):
            found.set_result(snapshot)

    end = room.subscribe(look)
    look()
    try:
        return await found
    finally:
        end()


def is_online(shown):
    return shown.state == "online"


async def reason(room):
    """Wait until a connection has ended, and return why."""
    return (await until(room, lambda shown: shown.state == "waiting")).reason


@quiet
async def test_answers_to_the_handshake():
    """A temporary status is tried again, others are final."""
    async with Script(greet, statuses=[(429, None), (404, None)]) as server, user(server.url) as client:
        room = client.room("a b", events=["typing"])
        assert await reason(room) == "refused with 429 Too Many Requests"
        with pytest.raises(Rejected, match="refused with 404 Not Found") as error:
            await anext(aiter(aiter(room)))
        assert error.value.code == 404
        assert server.paths == ["/rooms/a%20b?events=typing&username=ann"] * 2


@quiet
async def test_server_names_the_time_of_the_next_attempt():
    """The user cannot shorten the pause, but end it by leaving the room."""
    async with Script(greet, statuses=[(503, "600")]) as server, user(server.url) as client:
        room = client.room()
        shown = await until(room, lambda shown: shown.state == "waiting")
        assert shown.reason == "refused with 503 Service Unavailable"
        assert shown.retry_at > time.time() + 500
        room.reconnect()
        assert room.snapshot() is shown
        room.post("unsent").cancel()
        room.stop()
        assert room.snapshot().state == "stopped"
        assert [entry async for entry in room] == []
        assert len(server.paths) == 1


@quiet
async def test_server_that_breaks_the_protocol(caplog):
    """The connection is dropped, the next one repairs the damage, and nothing is shown twice."""

    async def twice(connection):
        await connection.send(history(2, 1, 2))
        await connection.send(payload(message_frame("abcd", Entry(2, "bob", "again", "2026"))).decode())
        await connection.send(payload(message_frame("abcd", Entry(3, "bob", "unseen", "2026"))).decode())
        await connection.wait_closed()

    async def resume(connection):
        await connection.send(history(3, 3, resumed=True))
        await connection.wait_closed()

    async with Script(twice, resume) as server, user(server.url) as client:
        room = client.room()
        assert await reason(room) == "the server broke the protocol"
        shown = await until(room, is_online)
        assert [entry.message for entry in shown.messages] == ["m1", "m2", "m3"]
        assert server.paths[1].endswith("&last_event_id=abcd-2")
    assert "abcd-2 arrived after abcd-2, again" in caplog.text


@quiet
async def test_connection_without_a_close_frame():
    async def abort(connection):
        await connection.send(history(0))
        connection.transport.abort()

    async with Script(abort, greet) as server, user(server.url) as client:
        assert await reason(client.room()) == "no close frame received or sent"


@pytest.fixture
def hasty(monkeypatch):
    """Probe servers that are silent for a moment."""
    monkeypatch.setattr(aio, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(aio, "ANSWER_SECONDS", 0.1)


@quiet
async def test_idle_server_answers_probes(hasty):
    """An answer to a probe keeps the connection."""
    pings = asyncio.Queue()

    async def count(connection):
        handle = connection.process_event

        def watch(event):
            if event.opcode == Opcode.PING:
                pings.put_nowait(event)
            handle(event)

        connection.process_event = watch
        await greet(connection)

    async with Script(count) as server, user(server.url) as client:
        room = client.room()
        for _ in range(3):
            await pings.get()
            room.reconnect()
            room.reconnect()
        assert is_online(room.snapshot())
        assert len(server.paths) == 1


@quiet
async def test_silent_server_is_given_up(hasty):
    """A server that answers neither a post nor a probe loses the connection, and the post is sent again."""

    async def hang(connection):
        await connection.send(history(0))
        connection.transport.pause_reading()
        await connection.wait_closed()

    async def acknowledge(connection):
        await connection.send(history(0, resumed=True))
        label = json.loads(await connection.recv())["label"]
        await connection.send(payload(ack_frame(Id("abcd", 1), label, duplicate=False)).decode())
        await connection.wait_closed()

    async with Script(hang, acknowledge) as server, user(server.url) as client:
        room = client.room()
        await until(room, is_online)
        post = room.post("hi")
        room.typing()
        assert await reason(room) == "the server did not answer in time"
        assert (await post).id == Id("abcd", 1)


@quiet
async def test_handshake_that_hangs(monkeypatch):
    """The attempt times out, and a client that is closed meanwhile leaves nothing behind."""
    monkeypatch.setattr(aio, "CONNECT_SECONDS", 0.05)
    writers = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    async with user(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        assert await reason(client.room()) == "the server did not answer in time"
    for writer in writers:
        writer.close()
    server.close()
    await server.wait_closed()


@quiet
async def test_unexpected_error(monkeypatch, caplog):
    """It is logged, and the client goes on."""

    def broken(*_, **__):
        raise ValueError

    monkeypatch.setattr(aio, "connect", broken)
    async with user("http://127.0.0.1:1") as client:
        assert await reason(client.room()) == "ValueError"
    assert "unexpected error of the connection" in caplog.text


@quiet
async def test_machine_that_slept(monkeypatch):
    """Connections are checked, and pauses end."""
    monkeypatch.setattr("chatd.client.connector.WATCH_SECONDS", 0.01)
    offset = 0.0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + offset)
    connections = []

    async def hang(connection):
        connections.append(connection)
        await connection.send(history(0, resumed=True if len(connections) > 1 else None))
        connection.transport.pause_reading()
        await connection.wait_closed()

    async with Script(hang) as server, Client(server.url, username="ann", backoff=lambda: Backoff(0.01)) as client:
        room = client.room()
        await until(room, is_online)
        monkeypatch.setattr(aio, "ANSWER_SECONDS", 0.05)
        offset = 100.0
        assert await reason(room) == "the server did not answer in time"
        client.stop()
        client.stop()
        client.room()


@quiet
async def test_renewal_in_a_room_that_is_stopped():
    """The task that waits for a token ends with the connection."""
    waiting = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()
    tokens = iter([token(lasts=2)])

    async def issue():
        if (found := next(tokens, None)) is not None:
            return found
        asked.set()
        return await waiting

    async with Script(greet) as server, user(server.url, token=issue) as client:
        room = client.room()
        await asked.wait()
        room.stop()
    assert waiting.cancelled()


@quiet
async def test_token_function_that_is_cancelled(caplog):
    """It fails as one that raises, and is called again."""
    tokens = iter([asyncio.CancelledError(), "secret"])

    async def issue():
        if isinstance(found := next(tokens), BaseException):
            raise found
        return found

    async with Script(greet) as server, user(server.url, token=issue) as client:
        room = client.room()
        assert await reason(room) == "there is no token"
        await until(room, is_online)
    assert "the function that returns the token was cancelled" in caplog.text


@quiet
async def test_token_that_no_header_can_carry(caplog):
    """It is shown nowhere."""
    async with Script(greet) as server, user(server.url, token="secret\n") as client:
        assert await reason(client.room()) == "there is no token"
        assert server.paths == []
    assert "printable ASCII" in caplog.text
    assert "secret" not in caplog.text


@quiet
async def test_second_stop_leaves_the_closing_handshake(monkeypatch):
    """The connection is closed even if the server does not answer."""
    monkeypatch.setattr("chatd.client.aio.CLOSE_SECONDS", 0.05)
    sockets = []

    async def silent(connection):
        sockets.append(connection.transport.get_extra_info("socket"))
        await connection.send(history(0))
        connection.transport.pause_reading()
        await over.wait()
        connection.transport.abort()

    def state():
        """Return the state of the server's socket, as Linux numbers them (tcp_states.h)."""
        return sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    over = asyncio.Event()
    async with Script(silent) as server, user(server.url) as client:
        room = client.room()
        await until(room, is_online)
        room.stop()
        await asyncio.sleep(0)
        assert state() == ESTABLISHED
        await client.close()
        assert state() in ENDED
        over.set()


def test_address_that_is_no_url():
    with pytest.raises(ValueError, match="is not a URL"):
        Client("localhost:8085")
