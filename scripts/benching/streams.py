"""The check that every client of a room received every message exactly once and in order.

The clients of a room send the same key and join before the first post, so they should receive the same bytes.  The
check parses and inflates those of the first client: the server's numbers and each sender's own must be consecutive, up
to the last message posted.  It compares the bytes of the others with these, without pings.  That costs the load one
comparison for each read.  Parsing would cost a hundred times as much, and prove less.

Where the server compresses, other bytes are no fault.  A client that fell behind gets plain messages until the next
keyframe, while others get compressed ones (docs/decisions/0010).  From the first frame that differs, a client is
*apart*: its frames are parsed and inflated, and their texts are compared.  Until then it has inflated what the first
client has, so its inflater begins with the same window.
"""

import bisect
import contextlib
import json
import socket
import time
from typing import Final

from benching.messages import (
    PING,
    TEXT,
    WINDOW,
    Inflater,
    StreamError,
    cut,
    facts,
    number_of,
    pong,
    post_frame,
)
from chatd.transport.framing import server_frame_at

MESSAGE: Final = b'{"type":"message"'


class Reference:
    """The complete frames of the first client of a room: all others must receive the same."""

    def __init__(self, greeting: bytes, number: int, senders: int, room: str = "main") -> None:
        self.data = bytearray(greeting)
        self.begin = len(greeting)
        self.room = room
        self.posted = 0
        """The number of messages posted to the room."""
        self.ends: list[int] = []
        """The offset in `data` after each message."""
        self.texts: list[bytes] = []
        self.packed: list[bool] = []
        """True for each message that was compressed."""
        self.stamps: list[int] = []
        """The time at which each message was due, in nanoseconds."""
        self.echoes: list[list[int]] = [[] for _ in range(senders)]
        """The offsets in `data` after the messages of each sender."""
        self.ahead: set[Client] = set()
        """The clients with bytes that the first client has not received."""
        self.ready: set[Client] = set()
        """The senders that got a message back, or have unsent bytes."""
        self._number, self._rest = number, b""
        self._inflater = Inflater()

    def feed(self, data: bytes) -> bytes:
        """Parse received bytes; return the pongs to send."""
        frames, self._rest, pongs = cut(self._rest + data)
        for first, payload, whole in frames:
            self.data += whole
            self._message(self._inflater.text(first, payload), packed=first != TEXT)
        return pongs

    def _message(self, text: bytes, *, packed: bool) -> None:
        if not text.startswith(MESSAGE):
            raise StreamError(f"the server sent {text[:200]!r}")
        message = json.loads(text)
        number = number_of(message["id"])
        sender, sequence, stamp = facts(message["data"]["message"])
        echoes = self.echoes[sender]
        if (number, sequence) != (self._number + 1, len(echoes)):
            raise StreamError(
                f"message {number} of {self.room}, which is post {sequence} of sender {sender}, came where message "
                f"{self._number + 1} and post {len(echoes)} were due"
            )
        self._number = number
        for places in (self.ends, echoes):
            places.append(len(self.data))
        self.texts.append(text)
        self.packed.append(packed)
        self.stamps.append(stamp)

    def window(self, count: int) -> bytes:
        """Return what an inflater remembers of the first `count` messages."""
        newest: list[bytes] = []
        size = 0
        while count and size < WINDOW:
            count -= 1
            if self.packed[count]:
                newest.append(self.texts[count])
                size += len(self.texts[count])
        return b"".join(reversed(newest))


class Client:
    """A client whose stream is compared with the reference; the first few of a room also post."""

    def __init__(
        self, sock: socket.socket, reference: Reference, name: int, *, sampled: bool, compress: bool = False
    ) -> None:
        self.sock, self.reference, self.name = sock, reference, name
        self.position = 0
        """The bytes of the reference that it received, in its own frames or in others with the same text."""
        self.surplus = 0
        """The number of bytes by which its own frames were longer."""
        self.posted = self.echoed = 0
        self.latencies: list[float] = []
        """In milliseconds."""
        self._sampled, self._sender, self._compress = sampled, name < len(reference.echoes), compress
        self._rest = self._unsent = b""
        self._seen = 0
        self._apart: Inflater | None = None
        self._taken = 0  # messages received, of a client that is apart

    def __str__(self) -> str:
        return f"client {self.name} of {self.reference.room}"

    @property
    def received(self) -> int:
        """The bytes received, without pings."""
        return self.position + self.surplus

    @property
    def complete(self) -> bool:
        """True if it has every message posted to its room."""
        reference = self.reference
        return len(reference.ends) == reference.posted and self.position == len(reference.data)

    def take(self, data: bytes) -> None:
        """Check received bytes, and count the messages in them."""
        reference = self.reference
        if self._apart is not None:
            self._parse(self._rest + data, self._apart)
        elif not self._rest and reference.data.startswith(data, self.position):
            self.position += len(data)
        else:
            self._compare(self._rest + data)
        if self._sender:
            echoes, before = reference.echoes[self.name], self.echoed
            while self.echoed < len(echoes) and echoes[self.echoed] <= self.position:
                self.echoed += 1
            if self.echoed > before:
                reference.ready.add(self)
        if self._sampled:
            ends, stamps, now = reference.ends, reference.stamps, time.monotonic_ns()
            while self._seen < len(ends) and ends[self._seen] <= self.position:
                self.latencies.append((now - stamps[self._seen]) / 1e6)
                self._seen += 1

    def _compare(self, rest: bytes) -> None:
        """Compare piece by piece: bytes before the first client has them, pings, and frames that differ."""
        known = self.reference.data
        while rest:
            same = rest[: len(known) - self.position]
            if not known.startswith(same, self.position):
                pairs = zip(same, known[self.position : self.position + len(same)], strict=True)
                same = same[: next(place for place, (ours, theirs) in enumerate(pairs) if ours != theirs)]
            self.position += len(same)
            rest = rest[len(same) :]
            if rest[:1] == bytes([PING]):
                if not (frame := server_frame_at(rest, 0)):
                    break
                self.send(pong(rest[frame.begin : frame.end]))
                rest = rest[frame.end :]
            elif self.position == len(known):
                break
            elif rest:
                self._part(rest)
                return
        self._keep(rest)

    def _part(self, rest: bytes) -> None:
        """Begin to parse, at the frame in which the bytes differ."""
        reference = self.reference
        self._taken = bisect.bisect_right(reference.ends, self.position)
        begin = reference.ends[self._taken - 1] if self._taken else reference.begin
        if self.position < begin:
            raise StreamError(f"{self} was greeted with {rest[:200]!r}, and the first client with something else")
        rest = bytes(reference.data[begin : self.position]) + rest
        self.position = begin
        self._apart = Inflater(reference.window(self._taken))
        self._parse(rest, self._apart)

    def _parse(self, data: bytes, inflater: Inflater) -> None:
        """Compare the texts of frames."""
        reference, start = self.reference, 0
        while frame := server_frame_at(data, start):
            first, begin, end = frame
            if first == PING:
                self.send(pong(data[begin:end]))
            elif self._taken == len(reference.texts):
                break
            else:
                text = inflater.text(first, data[begin:end])
                if text != reference.texts[self._taken]:
                    raise StreamError(f"{self} got {text[:200]!r} where the first client got something else")
                self.surplus += end - start - (reference.ends[self._taken] - self.position)
                self.position = reference.ends[self._taken]
                self._taken += 1
            start = end
        self._keep(data[start:])

    def _keep(self, rest: bytes) -> None:
        self._rest = rest
        (self.reference.ahead.add if rest else self.reference.ahead.discard)(self)

    def post(self, due: int, count: int = 1) -> None:
        """Send `count` messages after the unsent bytes."""
        places = range(self.posted, self.posted + count)
        frames = b"".join(post_frame(self.name, place, due, compress=self._compress) for place in places)
        self.posted += len(places)
        self.reference.posted += len(places)
        self.send(frames)

    def send(self, data: bytes) -> None:
        """Send the unsent bytes and then these, until the socket is full."""
        self._unsent += data
        with contextlib.suppress(BlockingIOError, ConnectionError):  # reading reports a lost connection
            self._unsent = self._unsent and self._unsent[self.sock.send(self._unsent) :]
        if self._unsent and self._sender:
            self.reference.ready.add(self)


class First(Client):
    """The first client of a room: its stream is the reference."""

    def take(self, data: bytes) -> None:
        self.send(self.reference.feed(data))
        self.position = len(self.reference.data)
        super().take(b"")
        ahead, self.reference.ahead = self.reference.ahead, set()
        for client in ahead:
            client.take(b"")
