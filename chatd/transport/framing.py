"""RFC 6455 as bytes: the frames, and the proof of a handshake.  The server, the client and the scripts share this code.

Clients send small, whole, masked text frames, and servers send whole, unmasked ones.  Both kinds are
read here from their bytes alone, in a few microseconds and without state.  Every other frame, good or
bad, is left to Autobahn, which knows the rest of the protocol.

This module is pure: bytes in, values out.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple

SUBPROTOCOL: Final = "chat.v1"
"""The name of chatd's protocol, which a handshake may name: `Sec-WebSocket-Protocol` (section 1.9)."""
BEARER: Final = "bearer."
"""The prefix of the subprotocol that carries a token beside it."""
MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""The bytes that a server appends to the key of a client (section 1.3)."""


class Opcode(IntEnum):
    """The kinds of frames (RFC 6455, section 5.2)."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(IntEnum):
    """The reasons for closing a connection (RFC 6455, section 7.4, and IANA's registry)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    ABNORMAL = 1006
    """The connection ended without a close frame; never sent."""
    INVALID_DATA = 1007
    """A text message is not UTF-8."""
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TRY_AGAIN_LATER = 1013


EXPIRED: Final = "the token has expired"
"""The reason of the close that ends a connection with its token.  A client that can get another token reconnects."""

MAX_REASON: Final = 123
"""The largest size in bytes of the reason in a close frame (section 5.5.1)."""

FIN: Final = 0x80
"""The bit of the first byte that marks the last frame of a message."""
MASKED: Final = 0x80
"""The bit of the second byte that marks a masked payload."""
LENGTH_16: Final = 126
"""The length field of a frame whose length is in the next two bytes."""
LENGTH_64: Final = 127
"""The length field of a frame whose length is in the next eight bytes."""

_TEXT: Final = FIN | Opcode.TEXT.value
RSV1: Final = 0x40
"""The bit of the first byte that marks a compressed message (RFC 7692, section 6)."""
COMPRESSED_TEXT: Final = _TEXT | RSV1
"""The first byte of a whole, compressed text frame."""
_PASSED_OVER: Final = FIN | Opcode.PING.value, FIN | Opcode.PONG.value
_SHORTEST_MASKED: Final = 6
"""The size of the smallest masked frame: its header and its mask."""
_SHORTEST: Final = 2
_integer: Final = int.from_bytes


def masked_text_at(data: bytes, start: int, max_size: int, first: int = _TEXT) -> tuple[bytes | None, int]:
    """Unmask the whole text frame of a client that begins at an offset, or the frame with another `first` byte.

    Return its payload and the offset after it.  Return None and `start` while the frame is incomplete.  Return None and
    -1 for any other frame, and for a payload of more than `max_size` bytes.
    """
    end = len(data)
    begin = start + _SHORTEST_MASKED
    if begin > end:
        # An unmasked frame may be this short.
        return None, -1 if end > start + 1 and data[start + 1] < MASKED else start
    length = data[start + 1] - MASKED
    if data[start] != first or not 0 <= length <= LENGTH_64:
        return None, -1
    if length >= LENGTH_16:
        shortest = LENGTH_16 if length == LENGTH_16 else 1 << 16
        begin += 2 if length == LENGTH_16 else 8
        if begin > end:
            return None, start
        length = int.from_bytes(data[start + 2 : begin - 4])
        if length < shortest or length > max_size:
            return None, -1
    after = begin + length
    if after > end:
        return None, start
    # Unmask all bytes at once: payload and repeated mask as two integers (section 5.3).
    mask = data[begin - 4 : begin] * (length // 4 + 1)
    unmasked = _integer(data[begin:after], "little") ^ _integer(mask[:length], "little")
    return unmasked.to_bytes(length, "little"), after


def masked_texts(data: bytes, max_size: int, inflate: Callable[[bytes], bytes | None] | None = None) -> Iterator[bytes]:
    """Unmask the whole text frames of a client up to the first other frame; pass over pings and pongs.

    `inflate` inflates the payload of a compressed one, if they are allowed, or returns None.
    """
    start, end = 0, len(data)
    while start < end:
        text, after = masked_text_at(data, start, max_size)
        if after < 0 and inflate is not None:
            packed, end_of_packed = masked_text_at(data, start, max_size, COMPRESSED_TEXT)
            if packed is not None:
                text, after = inflate(packed), end_of_packed
        if text is not None:
            yield text
        elif after < 0 and data[start] in _PASSED_OVER and MASKED <= data[start + 1] < MASKED + LENGTH_16:
            after = start + _SHORTEST_MASKED + data[start + 1] - MASKED
        else:
            return
        start = after


def take_texts(data: bytes) -> tuple[list[bytes], int, bool]:
    """Take the whole text frames that a server sent, at the beginning of `data`.

    Return their payloads, the offset of the rest, and whether the rest may become such a frame when
    more bytes arrive.
    """
    payloads: list[bytes] = []
    start, end = 0, len(data)
    while start + _SHORTEST <= end:
        length, begin = data[start + 1], start + _SHORTEST
        if data[start] != _TEXT or length > LENGTH_64:
            return payloads, start, False
        if length >= LENGTH_16:
            begin += 8 if length == LENGTH_64 else 2
            length = int.from_bytes(data[start + 2 : begin])
        after = begin + length
        if after > end:
            break
        payloads.append(data[begin:after])
        start = after
    return payloads, start, True


class ServerFrame(NamedTuple):
    """The position of one unmasked frame in a stream."""

    first: int
    """The first byte: FIN, the reserved bits and the opcode."""
    begin: int
    """The offset of its payload."""
    end: int
    """The offset after its payload."""


def server_frame_at(data: bytes, start: int) -> ServerFrame | None:
    """Find the unmasked frame that begins at an offset; return None while it is incomplete."""
    if len(data) < start + _SHORTEST:
        return None
    size, begin = data[start + 1], start + _SHORTEST
    if size >= LENGTH_16:
        begin += 8 if size == LENGTH_64 else 2
        size = int.from_bytes(data[start + 2 : begin])
    return ServerFrame(data[start], begin, begin + size) if begin + size <= len(data) else None


def masked_frame(opcode: Opcode, payload: bytes, mask: bytes) -> bytes:
    """Wrap a payload in one frame of a client."""
    size = len(payload)
    if size < LENGTH_16:
        length = bytes([MASKED | size])
    elif size < 1 << 16:
        length = bytes([MASKED | LENGTH_16]) + size.to_bytes(2)
    else:
        length = bytes([MASKED | LENGTH_64]) + size.to_bytes(8)
    repeated = (mask * (size // 4 + 1))[:size]
    unmasked = int.from_bytes(payload) ^ int.from_bytes(repeated)
    return bytes([FIN | opcode]) + length + mask + unmasked.to_bytes(size)


def text_frame(payload: bytes) -> bytes:
    """Wrap a text in one unmasked, unfragmented frame of a server (section 5.2)."""
    size = len(payload)
    if size < LENGTH_16:
        return b"\x81%c%b" % (size, payload)
    if size < 1 << 16:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def compressed_frame(payload: bytes) -> bytes:
    """Wrap the payload of a compressed text in one frame of a server (RFC 7692, section 7.2.1)."""
    return bytes((COMPRESSED_TEXT,)) + text_frame(payload)[1:]


def payload(frame: bytes) -> bytes:
    """Return the text in a frame that text_frame made."""
    size = frame[1]
    return frame[2 if size < LENGTH_16 else 4 if size == LENGTH_16 else 10 :]


def accept_token(key: bytes) -> bytes:
    """Compute the Sec-WebSocket-Accept header that proves that a server read a client's key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + MAGIC, usedforsecurity=False).digest())
