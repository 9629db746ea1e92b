"""The attacks: each is a coroutine that goes on until a time, with connections that the server may end as it likes.

Each takes the port, and the time of time.monotonic() at which to end.  All connections come from the loopback, where
no limit of an address applies, so the attacks show what the server itself stands.
"""

import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

from attacking import inputs
from attacking.servers import HOST, Server
from chatd.load.options import allow_files

Attack = Callable[[int, float], Coroutine[None, None, None]]

JOIN: Final = inputs.handshake()
SHARED: Final = inputs.handshake(b"/connect")
PAUSE: Final = 0.05
"""The time that an attacker waits before it connects again, in seconds."""
_numbers = itertools.count()


def text(**document: object) -> bytes:
    """Compose a text frame."""
    return inputs.frame(inputs.TEXT, json.dumps(document).encode())


def posts(count: int = 200, username: str | None = None, **more: object) -> bytes:
    """Compose posts."""
    return b"".join(text(username=username or f"user{next(_numbers)}", message="attack", **more) for _ in range(count))


async def _discard(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(1 << 16):
            pass


async def _connections(count: int, until: float, one: Callable[[int], Awaitable[None]]) -> None:
    """Keep so many connections, each of which `one` serves; when it returns, begin another."""

    async def repeat(number: int) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await asyncio.wait_for(one(number), until - time.monotonic())
            await asyncio.sleep(PAUSE)

    await asyncio.gather(*(repeat(number) for number in range(count)))


def drip(count: int, begin: bytes, rest: bytes) -> Attack:
    """Make an attack that sends the beginning of something, and then one byte a second."""

    async def attack(port: int, until: float) -> None:
        async def one(_: int) -> None:
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(begin)
                discarding = asyncio.create_task(_discard(reader))
                for byte in itertools.cycle(rest or b"\0"):
                    if discarding.done():
                        return
                    await asyncio.sleep(1)
                    if rest:
                        writer.write(bytes([byte]))
            finally:
                writer.close()

        await _connections(count, until, one)

    return attack


def flood(count: int, begin: Callable[[], bytes], more: Callable[[], bytes], *, reading: bool = True) -> Attack:
    """Make an attack that sends as fast as the server takes it."""

    async def attack(port: int, until: float) -> None:
        async def one(_: int) -> None:
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                discarding = asyncio.create_task(_discard(reader)) if reading else None
                writer.write(begin())
                while discarding is None or not discarding.done():
                    writer.write(more())
                    await writer.drain()
                    await asyncio.sleep(0)
            finally:
                writer.close()

        await _connections(count, until, one)

    return attack


def visits(count: int, request: Callable[[], bytes]) -> Attack:
    """Make an attack that connects, sends a request, reads the first bytes, and disconnects."""

    async def attack(port: int, until: float) -> None:
        async def one(_: int) -> None:
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(request())
                await reader.read(1 << 16)
            finally:
                writer.close()

        await _connections(count, until, one)

    return attack


def unread(count: int, begin: bytes) -> Attack:
    """Make an attack of clients that join and never read, while another one posts."""

    async def attack(port: int, until: float) -> None:
        async def one(number: int) -> None:
            reader, writer = await asyncio.open_connection(HOST, port, limit=1)
            try:
                writer.write(begin if number else JOIN)
                if number:
                    writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport has it
                    await asyncio.sleep(until - time.monotonic())
                discarding = asyncio.create_task(_discard(reader))
                while not discarding.done():
                    writer.write(posts(10, "poster"))
                    await asyncio.sleep(0.5)
            finally:
                writer.close()

        await _connections(count, until, one)

    return attack


def room() -> bytes:
    """Compose the path of a room that nobody has named."""
    return b"/rooms/attack-%d" % next(_numbers)


def join(room: str) -> bytes:
    """Compose the frame that joins a room on a shared connection."""
    return text(type="join", room=room)


def _visit() -> bytes:
    """Compose a join of a room that nobody has named, and a leave."""
    name = f"attack-{next(_numbers)}"
    return join(name) + text(type="leave", room=name)


def _late(count: int) -> Callable[[], bytes]:
    return lambda: b"".join(text(type="history", limit=100) for _ in range(count))


def compressed_posts() -> bytes:
    """Compose posts, each compressed for itself."""
    return b"".join(
        inputs.compressed(json.dumps({"username": f"user{next(_numbers)}", "message": "attack"}).encode())
        for _ in range(200)
    )


SLOW: Final = inputs.frame(inputs.TEXT, b" " * 10_000)[:8]
ATTACKS: Final[dict[str, tuple[str, Attack]]] = {
    "connect": ("1,000 connections that send nothing", drip(1000, b"", b"")),
    "head": ("1,000 heads, a byte a second", drip(1000, b"GET / HTTP/1.1\r\n", b"X: ")),
    "body": ("1,000 bodies, a byte a second", drip(1000, inputs.post(body=b"x" * 9000)[:-9000], b" ")),
    "frame": ("1,000 frames, a byte a second", drip(1000, JOIN + SLOW, b" ")),
    "unread": ("1,000 clients that never read", unread(1000, JOIN)),
    "unread-events": (
        "500 event streams that nobody reads",
        unread(500, inputs.request(b"GET /rooms/main/events HTTP/1.1")),
    ),
    "invalid": ("20 floods of {}", flood(20, lambda: JOIN, lambda: inputs.frame(inputs.TEXT, b"{}") * 2000)),
    "posts": ("20 floods of posts", flood(20, lambda: JOIN, posts)),
    "labels": (
        "20 floods of labelled posts",
        flood(20, lambda: JOIN, lambda: b"".join(posts(1, label=f"l{next(_numbers)}") for _ in range(200))),
    ),
    "compressed": ("20 floods of compressed posts", flood(20, lambda: inputs.JOIN_COMPRESSED, compressed_posts)),
    "compressed-unread": (
        "1,000 clients that take compressed messages and never read",
        unread(1000, inputs.JOIN_COMPRESSED),
    ),
    "bombs": (
        "compressed messages of 8 KB with texts of 8 MB",
        flood(20, lambda: inputs.JOIN_COMPRESSED, lambda: inputs.BOMB),
    ),
    "pings": ("20 floods of pings", flood(20, lambda: JOIN, lambda: inputs.frame(inputs.PING, b"") * 2000)),
    "pongs": ("20 floods of pongs", flood(20, lambda: JOIN, lambda: inputs.frame(inputs.PONG, b"") * 2000)),
    "fragments": (
        "20 floods of empty fragments",
        flood(
            20,
            lambda: JOIN + inputs.frame(inputs.TEXT, b"", fin=False),
            lambda: inputs.frame(0, b"", fin=False) * 2000,
        ),
    ),
    "typing": (
        "20 floods of typing notices",
        flood(20, lambda: inputs.handshake(b"/?events=typing"), lambda: text(type="typing", username="a") * 300),
    ),
    "names": (
        "joins with presence under ever new names",
        visits(50, lambda: inputs.handshake(b"/?events=presence&username=name%d" % next(_numbers))),
    ),
    "joins": ("joins, as fast as 100 clients can", visits(100, lambda: JOIN)),
    "rooms": ("joins of ever new rooms", visits(100, lambda: inputs.handshake(room()))),
    "shared-joins": (
        "20 floods of joins and leaves of ever new rooms on shared connections",
        flood(20, lambda: SHARED, lambda: b"".join(_visit() for _ in range(100))),
    ),
    "shared-unread": (
        "100 shared connections in 100 rooms each, and in that of the others, that never read",
        unread(100, SHARED + join("main") + b"".join(join(f"shared-{number}") for number in range(100))),
    ),
    "new-rooms": (
        "posts in ever new rooms",
        visits(100, lambda: inputs.handshake(room()) + posts(1)),
    ),
    "resumes": ("resumes from the first message", visits(100, lambda: inputs.handshake(b"/?last_event_id=aaaaaa-1"))),
    "pages": ("20 floods of page requests", flood(20, lambda: JOIN, _late(300))),
    "http-pages": (
        "100 clients that read pages over HTTP",
        visits(100, lambda: inputs.request(b"GET /rooms/main/messages?limit=100 HTTP/1.1")),
    ),
    "pipelines": (
        "20 floods of pipelined requests, unread",
        flood(20, lambda: b"", lambda: inputs.request(b"GET / HTTP/1.1") * 400, reading=False),
    ),
    "heads": (
        "heads of 16 KB",
        visits(100, lambda: inputs.request(b"GET / HTTP/1.1", *(b"X-%d: %b" % (n, b"y" * 60) for n in range(300)))),
    ),
    "smuggling": (
        "requests with two lengths",
        visits(
            100,
            lambda: inputs.post(b"Transfer-Encoding: chunked", b"Content-Length: 3") + random.choice(inputs.HEADS),  # noqa: S311 -- not a secret
        ),
    ),
}
"""Each attack by its name: in words, and what it does."""
JOINED: Final = "joined"
"""The name of the attack by 1,000 clients that join and stay; it matters to a server with few files only."""


async def attack(name: str, server: Server, seconds: float) -> None:
    """Run one attack in another process for so many seconds."""
    command = sys.executable, "-m", "attacking.attacks", name, str(server.port), str(seconds)
    process = await asyncio.create_subprocess_exec(*command, cwd=pathlib.Path(__file__).parent.parent)
    await process.wait()


if __name__ == "__main__":
    allow_files(10_000)
    one = ATTACKS[sys.argv[1]][1] if sys.argv[1] in ATTACKS else drip(1000, JOIN, b"")
    asyncio.run(one(int(sys.argv[2]), time.monotonic() + float(sys.argv[3])))
