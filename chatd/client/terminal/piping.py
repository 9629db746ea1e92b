"""Rooms in a pipe: the lines of standard input as messages, and messages as the lines of standard output."""

import asyncio
import codecs
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, BinaryIO, Final

import orjson

from chatd.client.aio import Room
from chatd.client.protocol import ClientStopped, Rejected
from chatd.client.terminal.display import safe
from chatd.client.view import ONLINE, RoomEntry

CHUNK: Final = 1 << 16
"""The most bytes of a read."""
WAITING: Final = 64
"""The most posts that wait for an answer; meanwhile standard input is not read."""


async def read_chunk(descriptor: int) -> bytes:
    """Read what there is, from a file of any kind; return nothing at its end.

    A thread of its own waits for it, which does not keep the program from ending.
    """
    loop = asyncio.get_running_loop()
    chunk: asyncio.Future[bytes] = loop.create_future()

    def deliver(data: bytes) -> None:
        if not chunk.done():
            chunk.set_result(data)

    def read() -> None:
        try:
            data = os.read(descriptor, CHUNK)
        except OSError:  # a terminal that was closed
            data = b""
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(deliver, data)

    threading.Thread(target=read, daemon=True).start()
    return await chunk


async def read_lines(descriptor: int, longest: int) -> AsyncIterator[str]:
    """Yield the lines of a descriptor as UTF-8; a line of more than `longest` characters in pieces, as it arrives."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    while True:
        data = await read_chunk(descriptor)
        text += decoder.decode(data, final=not data)
        *lines, text = text.split("\n")
        for line in lines:
            for piece in _pieces(line.removesuffix("\r"), longest):
                yield piece
        while len(text) > longest:
            yield text[:longest]
            text = text[longest:]
        if not data:
            break
    if text:
        yield text


def _pieces(line: str, longest: int) -> list[str]:
    return [line[start : start + longest] for start in range(0, len(line), longest)]


class LinePoster:
    """Posts lines to a room, at most `WAITING` at a time."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._slots = asyncio.Semaphore(WAITING)
        self._posts: set[asyncio.Task[None]] = set()
        self._waiting = 0
        """The number of lines that were read and have no answer."""
        self._answered = 0
        self._refused = 0
        self._reason = ""

    async def run(self, lines: AsyncIterator[str]) -> None:
        """Post each line that is not blank, and wait until all have an answer."""
        async for line in lines:
            if line.strip():
                self._waiting += 1
                await self._slots.acquire()
                post = asyncio.create_task(self._post(line))
                self._posts.add(post)
                post.add_done_callback(self._posts.discard)
        await self.settle()

    async def settle(self) -> None:
        """Wait until all posts have an answer."""
        if self._posts:
            await asyncio.wait(self._posts)

    async def _post(self, line: str) -> None:
        try:
            await self._room.post(line)
        except Rejected as error:
            self._refused += 1
            self._reason = self._reason or safe(str(error))
            for post in self._room.snapshot().outbox:
                if post.error is not None:
                    self._room.discard(post.label)  # nobody tries it again
        except ClientStopped:
            return
        self._waiting -= 1
        self._answered += 1
        self._slots.release()

    async def watch(self, report: Callable[[str], None], seconds: float) -> None:
        """Report each time that a server stops answering posts without closing the connection; never return.

        A server whose log fails refuses posts for now, and the client sends them again.
        """
        silent = False
        while True:
            before = self._stuck_at()
            await asyncio.sleep(seconds)
            was_silent, silent = silent, before is not None and before == self._stuck_at()
            if silent and not was_silent:
                report(f"no post was stored for {seconds:g} s: trying again; the server's /readyz gives the reason")

    def _stuck_at(self) -> int | None:
        """Return the number of answers so far, or None if the room is offline or no post waits."""
        return self._answered if self._waiting and self._room.snapshot().state == ONLINE else None

    def fault(self) -> str | None:
        """Return which messages are not stored, in one line; None if all are."""
        faults = []
        if self._refused:
            faults.append(f"the server refused {_count(self._refused)} ({self._reason})")
        if self._waiting:
            faults.append(f"{_count(self._waiting)} may not be stored, because the program was stopped")
        return " and ".join(faults) or None


def _count(number: int) -> str:
    return "1 message" if number == 1 else f"{number} messages"


def text_line(entry: RoomEntry) -> bytes:
    """Return an entry as a line: the time, the name and the text, separated by tabs, without control characters."""
    return f"{entry.timestamp}\t{safe(entry.username)}\t{safe(entry.message)}\n".encode()


def json_line(entry: RoomEntry) -> bytes:
    """Return an entry as the text of a `message` frame."""
    data = {"username": entry.username, "message": entry.message, "timestamp": entry.timestamp, **(entry.extra or {})}
    frame: dict[str, Any] = {"type": "message", "id": str(entry.id)}
    if entry.replaces is not None:
        frame["replaces"] = str(entry.replaces)
    if entry.replaced is not None:
        frame["replaced"] = str(entry.replaced)
    if entry.removed:
        frame["removed"] = True
    return orjson.dumps({**frame, "data": data}, option=orjson.OPT_APPEND_NEWLINE)


def watch_reader(descriptor: int, gone: Callable[[], object]) -> None:
    """Call a function when nobody reads a pipe any longer, even if nothing is written to it."""
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        loop = asyncio.get_running_loop()

        def closed() -> None:
            loop.remove_reader(descriptor)
            gone()

        loop.add_reader(descriptor, closed)  # the end for writing has nothing to read, so only errors are reported


async def print_entries(room: Room, out: BinaryIO, line: Callable[[RoomEntry], bytes]) -> None:
    """Print each entry of a room as a line, for ever."""
    async for entry in room:
        out.write(line(entry))
        out.flush()
