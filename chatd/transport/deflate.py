"""permessage-deflate (RFC 7692): the answer to an offer, the compressor of a room, and the inflater of a post.

The window of the server has 12 bits, which every client can have and most offer.  The server keeps it from frame to
frame (context takeover), since the frames of a room resemble each other.  Clients begin each message with an empty
window, so that the server keeps no inflater for them.

This module is pure: bytes in, bytes out.
"""

import re
import zlib
from collections.abc import Callable
from typing import Final

from chatd.transport.framing import compressed_frame, payload

WINDOW_BITS: Final = 12
"""The base-2 logarithm of the server's window, 4 KiB, which holds about 25 messages."""
LEAST_BITS: Final = 8
EXTENSION: Final = "permessage-deflate"
ANSWER: Final = f"{EXTENSION}; server_max_window_bits={WINDOW_BITS}; client_no_context_takeover"
"""The answer to every offer that is accepted (section 7.1)."""
LEVEL: Final = 6
MEMORY: Final = 3
"""The memory level of zlib: a compressor takes 13 KB.  Larger ones are slower among many, and compress no better."""
TAIL: Final = b"\x00\x00\xff\xff"
"""The bytes that end every message and are not sent (section 7.2.1)."""

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf"[ \t]*;[ \t]*({_WORD})(?:[ \t]*=[ \t]*(?:({_WORD})|\"((?:[^\"\\]|\\.)*)\"))?[ \t]*")
_NAME = re.compile(rf"[ \t,]*({_WORD})[ \t]*")
_BITS = re.compile(r"[89]|1[0-5]")


class InflateError(Exception):
    """A compressed message that cannot be inflated."""


class InflatedTooLong(InflateError):
    """A compressed message that is longer than it may be."""


def accepts(offers: str) -> bool:
    """Return whether one of the offers in Sec-WebSocket-Extensions can be answered with ANSWER (section 5.1)."""
    place = 0
    while found := _NAME.match(offers, place):
        place = found.end()
        acceptable = found[1] == EXTENSION
        names: set[str] = set()
        while parameter := _PARAMETER.match(offers, place):
            place = parameter.end()
            name, token, quoted = parameter.groups()
            acceptable = acceptable and name not in names and _allows(name, token if quoted is None else quoted)
            names.add(name)
        if place < len(offers) and offers[place] != ",":
            return False
        if acceptable:
            return True
    return False


def _allows(name: str, value: str | None) -> bool:
    """Return whether a parameter of an offer is valid (section 7.1) and permits ANSWER."""
    if name == "client_no_context_takeover":
        return value is None
    if name == "client_max_window_bits":
        return value is None or _BITS.fullmatch(value) is not None
    if name == "server_max_window_bits":
        return value is not None and _BITS.fullmatch(value) is not None and int(value) >= WINDOW_BITS
    return False  # server_no_context_takeover, or unknown


def compressor() -> Callable[[bytes], bytes]:
    """Return a function that compresses the text frames of a server, each with reference to all before it."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW_BITS, MEMORY)

    def compress(frame: bytes) -> bytes:
        data = stream.compress(payload(frame)) + stream.flush(zlib.Z_SYNC_FLUSH)
        return compressed_frame(data[: -len(TAIL)])

    return compress


def inflate(data: bytes, most: int) -> bytes:
    """Inflate the payload of a message, in memory for `most` bytes; raises InflateError."""
    try:
        # The bytes that follow a final block, as in section 7.2.3.4, are no text.
        text = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data + TAIL, most + 1)
    except zlib.error:
        raise InflateError("a compressed message is invalid") from None
    if len(text) > most:
        raise InflatedTooLong(f"a compressed message has more than {most} bytes")
    return text
