"""Clients that behave: each posts a labelled message at an interval, and checks what it gets.

A witness that is disconnected reconnects with its last id, as `docs/protocol.md` says, and repeats the posts that
have no ack.  Every other witness compresses its posts, and inflates what the server compresses.  So whatever an attack
does, a witness misses no message, gets none twice, and gets an ack for each post.
"""

import asyncio
import contextlib
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from attacking import inputs
from attacking.servers import HOST

PREFIX: Final = "witness"
"""The beginning of the name and of the posts of each witness."""
INTERVAL_SECONDS: Final = 5.0
"""The interval between two posts of one witness, well within the rate of the server."""
MESSAGE: Final = b'{"type":"message","id":"'
"""The beginning of a message."""
RETRY_SECONDS: Final = 0.5
"""The time after which a witness reconnects."""
ANSWER_SECONDS: Final = 30.0
"""The longest time that the answer to a handshake may take."""


def frames(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the first byte, the begin and the end of the payload of each whole frame of a server."""
    end, size = 0, len(data)
    while end + 2 <= size:
        length, begin = data[end + 1], end + 2
        if length in (126, 127):
            begin += 2 if length == 126 else 8  # noqa: PLR2004 -- RFC 6455, section 5.2
            length = int.from_bytes(data[end + 2 : begin], "big")
        if begin + length > size:
            return
        yield data[end], begin, begin + length
        end = begin + length


class Witness:
    """One client that behaves."""

    def __init__(self, name: str, port: int, room: str, interval: float, *, compresses: bool = False) -> None:
        self.name = name
        self.faults: list[str] = []
        self.latencies: list[tuple[float, float]] = []
        """When each acknowledged post was first sent, and the seconds until its ack."""
        self.disconnects = 0
        self.seen: dict[str, int] = {}
        """The number of each post that was seen, by its text."""
        self.joined = asyncio.Event()
        self.number: int | None = None
        """The number of the last message."""
        self._port, self._room, self._interval = port, room, interval
        self._compresses = compresses
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self.inflated = 0
        """The number of compressed messages."""
        self._epoch = ""
        self._pending: dict[str, tuple[str, float]] = {}
        """The posts without an ack: text and time, by label."""
        self.acked: dict[str, int] = {}
        """The number of each post that was acknowledged, by its text."""
        self._writer: asyncio.StreamWriter | None = None
        self._count = 0

    @property
    def waits(self) -> bool:
        """True while an ack is due."""
        return bool(self._pending)

    async def listen(self) -> None:
        """Connect, and read until the task is cancelled."""
        while True:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await self._session()
            self.disconnects += 1
            await asyncio.sleep(RETRY_SECONDS)

    async def post(self, delay: float) -> None:
        """Post at the interval until the task is cancelled."""
        await asyncio.sleep(delay)
        while True:
            self._count += 1
            label = f"{self.name}-{self._count}"
            self._pending[label] = f"{self.name} {self._count}", time.monotonic()
            self._send(label)
            await asyncio.sleep(self._interval)

    async def _session(self) -> None:
        resume = f"?last_event_id={self._epoch}-{self.number}" if self._epoch else ""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            offer = [inputs.OFFER] if self._compresses else []
            writer.write(inputs.handshake(f"/rooms/{self._room}{resume}".encode(), *offer))
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_SECONDS)
            if not head.startswith(b"HTTP/1.1 101 "):
                return
            self._writer = writer
            self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            rest = b""
            while chunk := await reader.read(1 << 18):
                rest = self._received(rest + chunk, writer)
        finally:
            self._writer = None
            writer.close()

    def _received(self, data: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Handle the whole frames in what has arrived, and return the rest."""
        end = 0
        for first, begin, end in frames(data):
            opcode = first & 15
            if opcode == inputs.TEXT:
                self._take_text(self._text(first, data[begin:end]))
            elif opcode == inputs.PING:
                writer.write(inputs.frame(inputs.PONG, data[begin:end]))
            elif opcode == inputs.CLOSE:
                writer.write(inputs.frame(inputs.CLOSE, data[begin : begin + 2]))
                writer.close()
        return data[end:]

    def _text(self, first: int, payload: bytes) -> bytes:
        if not first & inputs.COMPRESSED << 4:
            return payload
        self.inflated += 1
        try:
            return self._inflater.decompress(payload + inputs.FLUSHED)
        except zlib.error as error:
            self.faults.append("a message cannot be inflated")
            raise EOFError from error  # reconnect

    def _take_text(self, text: bytes) -> None:
        # An attacker may post a thousand messages a second, of which only the number counts.
        if text.startswith(MESSAGE) and PREFIX.encode() not in text:
            self._count_message(int(text[len(MESSAGE) : text.index(b'"', len(MESSAGE))].partition(b"-")[2]))
        else:
            self._take(json.loads(text))

    def _count_message(self, number: int) -> None:
        if number != (self.number or 0) + 1:
            self.faults.append(f"message {number} follows message {self.number}")
        self.number = number

    def _send(self, label: str) -> None:
        if self._writer is not None:
            document = {"username": self.name, "message": self._pending[label][0], "label": label}
            text = json.dumps(document).encode()
            self._writer.write(inputs.compressed(text) if self._compresses else inputs.frame(inputs.TEXT, text))

    def _take(self, document: dict[str, Any]) -> None:
        kind = document["type"]
        if kind == "history":
            self._join(document)
        elif kind == "message":
            number = int(document["id"].partition("-")[2])
            self._count_message(number)
            self._see(number, document["data"]["message"])
        elif kind == "ack":
            text, sent = self._pending.pop(document["label"], ("", 0.0))
            if text:
                self.latencies.append((sent, time.monotonic() - sent))
                self.acked[text] = int(document["id"].partition("-")[2])
        elif kind == "error" and document.get("code") not in ("RATE_LIMITED", "UNAVAILABLE"):
            self.faults.append(f"an error: {document['message']}")
        elif kind == "error" and document.get("label") in self._pending:
            asyncio.get_running_loop().call_later(
                document.get("retry_after", RETRY_SECONDS), self._again, document["label"]
            )

    def _again(self, label: str) -> None:
        if label in self._pending:
            self._send(label)

    def _join(self, document: dict[str, Any]) -> None:
        epoch, _, number = document["id"].partition("-")
        if self._epoch:
            if document.get("resumed") is not True:
                self.faults.append("the server did not resume")
            elif int(number) - len(document["data"]) != self.number:
                self.faults.append(f"{len(document['data'])} messages until {number} follow message {self.number}")
            for index, data in enumerate(document["data"]):
                self._see(int(number) - len(document["data"]) + 1 + index, data["message"])
        self._epoch, self.number = epoch, int(number)
        self.joined.set()
        for label in [*self._pending]:
            self._send(label)

    def _see(self, number: int, text: str) -> None:
        if not text.startswith(PREFIX):  # an attacker's
            return
        if text in self.seen:
            self.faults.append(f"{text!r} came as {self.seen[text]} and as {number}")
        self.seen[text] = number


class Witnesses:
    """A number of witnesses in one room."""

    def __init__(self, count: int, port: int, room: str = "main", interval: float = INTERVAL_SECONDS) -> None:
        self._interval = interval
        self.everyone = [
            Witness(f"{PREFIX}{number}", port, room, interval, compresses=number % 2 == 1) for number in range(count)
        ]
        self._reading: list[asyncio.Task[None]] = []
        self._posting: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Connect all of them, and begin to post."""
        count = len(self.everyone)
        self._reading = [asyncio.create_task(one.listen()) for one in self.everyone]
        await asyncio.gather(*(one.joined.wait() for one in self.everyone))
        delays = (self._interval * index / count for index in range(count))
        self._posting = [asyncio.create_task(one.post(delay)) for one, delay in zip(self.everyone, delays, strict=True)]

    async def end(self, seconds: float) -> None:
        """Post no more, wait for the last acks and messages for so long, and disconnect."""
        for task in self._posting:
            task.cancel()
        for _ in range(int(seconds / RETRY_SECONDS)):
            if not any(one.waits for one in self.everyone) and len({one.number for one in self.everyone}) == 1:
                break
            await asyncio.sleep(RETRY_SECONDS)
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, *self._posting, return_exceptions=True)

    @property
    def faults(self) -> Counter[str]:
        """What the witnesses found, without its numbers, and how often."""
        found = Counter(re.sub("[0-9]+", "N", fault) for one in self.everyone for fault in one.faults)
        for one in self.everyone:
            if one.waits:
                found["a post has no ack"] += 1
            for text, number in one.acked.items():
                missed = sum(other.seen.get(text) != number for other in self.everyone)
                if missed:
                    found["an acknowledged post was not delivered"] += missed
        return found

    @property
    def disconnects(self) -> int:
        """The number of lost connections."""
        return sum(one.disconnects for one in self.everyone)

    @property
    def inflated(self) -> int:
        """The number of compressed messages that they received."""
        return sum(one.inflated for one in self.everyone)

    @property
    def acked(self) -> int:
        """The number of acknowledged posts."""
        return sum(len(one.acked) for one in self.everyone)

    def percentile(self, part: float, begin: float, end: float) -> float:
        """Return a percentile of the milliseconds to the ack, over the posts sent from `begin` to `end`."""
        found = sorted(late for one in self.everyone for sent, late in one.latencies if begin <= sent < end)
        return 1000 * found[min(int(part * len(found)), len(found) - 1)] if found else float("nan")
