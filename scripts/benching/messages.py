"""The handshakes and the posts of the clients, and the compression of both directions.

The ratio of compression depends on the text.  A row of dots shrinks to nothing, and random letters hardly shrink at
all.  So each text is a piece of the README, after the sender, the sequence, and the time at which the message was due.
No two texts are equal.

Clients that offer permessage-deflate (RFC 7692) learn from the answer which side keeps its window between messages.
They compress each post for itself, which every answer allows.  They keep the window of what they inflate.  A server
that begins each message with an empty window never refers to it, so this works with every answer too.
"""

import base64
import json
import re
import zlib
from importlib.metadata import metadata
from typing import Final

from benching.server import IN_CHECKOUT, ROOT
from chatd.transport.framing import COMPRESSED_TEXT, FIN, Opcode, masked_frame, server_frame_at

MASK: Final = b"\x5a\xa5\x3c\xc3"
KEY: Final = base64.b64encode(b"the same for all")
TEXT_SIZE: Final = 80
TEXT: Final = FIN | Opcode.TEXT
PING: Final = FIN | Opcode.PING
WINDOW: Final = 1 << zlib.MAX_WBITS
"""The largest distance of a reference in a deflate stream, in bytes."""
FLUSHED: Final = b"\x00\x00\xff\xff"
"""The bytes that end every compressed message and are not sent (section 7.2.1)."""
README: Final = (ROOT / "README.md").read_text("utf-8") if IN_CHECKOUT else str(metadata("chatd").json["description"])
PROSE: Final = " ".join(re.findall("[A-Za-z]+", README))


class StreamError(Exception):
    """Some client did not get every message exactly once and in order."""


def upgrade(room: str, last: str | None = None, *, compress: bool) -> bytes:
    """Compose the request of a handshake, from the message with the id `last` on if there is one."""
    query = f"?last_event_id={last}" if last else ""
    lines = [
        f"GET /rooms/{room}{query} HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {KEY.decode()}",
        *(["Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"] if compress else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def accepts(head: bytes) -> bool:
    """Return whether the head of an answer accepts permessage-deflate."""
    return re.search(rb"\r\nsec-websocket-extensions: *permessage-deflate\b", head.lower()) is not None


def pack(text: bytes) -> bytes:
    """Compress a post for itself, as a client does that may remember nothing (client_no_context_takeover)."""
    stream = zlib.compressobj(1, zlib.DEFLATED, -9, 1)
    return (stream.compress(text) + stream.flush(zlib.Z_SYNC_FLUSH))[: -len(FLUSHED)]


def post_frame(sender: int, sequence: int, due: int, *, label: str = "", compress: bool = False) -> bytes:
    """Compose the frame of a post, which states its sender, its place among the posts of it, and when it was due."""
    head = f"{sender} {sequence} {due} "
    begin = (sender * 104_729 + sequence * 7_919) % (len(PROSE) - TEXT_SIZE)
    text = head + PROSE[begin : begin + TEXT_SIZE - len(head)]
    labelled = f',"label":"{label}"' if label else ""
    document = f'{{"username":"load-{sender}","message":"{text}"{labelled}}}'.encode()
    if compress:
        return bytes([COMPRESSED_TEXT]) + masked_frame(Opcode.TEXT, pack(document), MASK)[1:]
    return masked_frame(Opcode.TEXT, document, MASK)


def facts(message: str) -> tuple[int, int, int]:
    """Return what a text states: its sender, its sequence, and when it was due."""
    sender, sequence, due = map(int, message.split(" ", 3)[:3])
    return sender, sequence, due


def number_of(frame_id: str) -> int:
    """Return the number in an id, `EPOCH-N`."""
    return int(frame_id.rpartition("-")[2])


class Inflater:
    """The window of one client, which holds the texts of its compressed messages; plain ones change nothing in it."""

    def __init__(self, window: bytes = b"") -> None:
        known = {"zdict": window[-WINDOW:]} if window else {}
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS, **known)

    def text(self, first: int, payload: bytes) -> bytes:
        """Return the text of a frame with this first byte."""
        if first == TEXT:
            return payload
        if first != COMPRESSED_TEXT:
            raise StreamError(f"the server sent a frame {first:#x} {payload[:200]!r}")
        try:
            return self._stream.decompress(payload + FLUSHED)
        except zlib.error as error:
            raise StreamError(f"the server sent a message that cannot be inflated: {error}") from None


def pong(payload: bytes) -> bytes:
    """Return the answer to a ping."""
    return masked_frame(Opcode.PONG, payload, MASK)


def cut(data: bytes) -> tuple[list[tuple[int, bytes, bytes]], bytes, bytes]:
    """Cut received bytes into whole frames, except pings.

    Return the first byte, the payload and all bytes of each, then the bytes of a frame that is incomplete, and the
    answers to the pings.
    """
    frames: list[tuple[int, bytes, bytes]] = []
    start, pongs = 0, b""
    while frame := server_frame_at(data, start):
        first, begin, end = frame
        if first == PING:
            pongs += pong(data[begin:end])
        else:
            frames.append((first, data[begin:end], data[start:end]))
        start = end
    return frames, data[start:], pongs


def document(text: bytes, kind: str) -> dict[str, object]:
    """Parse a text of the server that must have this type."""
    if not text.startswith(b'{"type":"%b"' % kind.encode()):
        raise StreamError(f"the server sent {text[:200]!r} where a {kind} was due")
    parsed: dict[str, object] = json.loads(text)
    return parsed
