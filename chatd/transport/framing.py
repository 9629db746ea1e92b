"""The short way through RFC 6455, for the form that nearly every request and frame has.

A client asks for the upgrade in one plain way and then sends small, whole, masked text frames.
Both are recognised here from their bytes alone, in a few microseconds, with no state.
Whatever is not of that form, or not good, is answered by "not mine", never judged: it goes to
Autobahn, which knows all the rest of the protocol and how to refuse.

This module is pure: bytes in, values out.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""What a server appends to a client's key (RFC 6455, section 1.3)."""

_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_REQUEST = re.compile(r"GET (/[!-~]*) HTTP/1\.1")

SHORT: Final = 6
"""The length of the shortest header, with its mask."""
FIN_TEXT: Final = 0x81
MASKED: Final = 0x80
LONG: Final = 126
"""The length that says that two more bytes of length follow."""


class Upgrade(NamedTuple):
    """A good opening handshake."""

    path: str
    query: str
    origin: str | None
    """Of the page that a browser is on."""
    key: str
    protocols: Sequence[str]
    """The subprotocols that the client offers."""


def parse_upgrade(head: bytes) -> Upgrade | None:
    """Read the head of a request, without the empty line; None unless it is a plain WebSocket handshake.

    Plain are HTTP/1.1, each header once, version 13 and a key of the right form (RFC 6455, section 4.2.1).
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    request = _REQUEST.fullmatch(first)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        headers[name.lower()] = value.strip()
        if not colon:
            return None
    good = (
        request is not None
        and len(headers) == len(lines)
        and "#" not in request[1]
        and "host" in headers
        and headers.get("upgrade", "").lower() == "websocket"
        and "upgrade" in [token.strip() for token in headers.get("connection", "").lower().split(",")]
        and headers.get("sec-websocket-version") == "13"
        and _KEY.fullmatch(headers.get("sec-websocket-key", ""))
    )
    if not good or request is None:
        return None
    path, _, query = request[1].partition("?")
    offered = headers.get("sec-websocket-protocol")
    protocols = [name.strip() for name in offered.split(",")] if offered else []
    return Upgrade(path, query, headers.get("origin"), headers["sec-websocket-key"], protocols)


def switch(key: str, protocol: str | None, server: str) -> bytes:
    """The answer to a good handshake (RFC 6455, section 4.2.2)."""
    accept = base64.b64encode(hashlib.sha1(key.encode() + MAGIC, usedforsecurity=False).digest())
    chosen = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nServer: {server}\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
        f"{chosen}Sec-WebSocket-Accept: {accept.decode()}\r\n\r\n"
    ).encode()


def take_texts(data: bytes, most: int) -> tuple[list[bytes], int, bool]:
    """Unmask the whole text frames, of at most `most` bytes, at the beginning of what was received.

    Answers their payloads, the offset at which the rest begins, and whether that rest may still become
    such a frame when more comes.
    """
    payloads: list[bytes] = []
    integer = int.from_bytes
    start, end = 0, len(data)
    while start + SHORT <= end:
        length = data[start + 1] - MASKED
        if data[start] != FIN_TEXT or not 0 <= length <= LONG:
            return payloads, start, False
        begin = start + SHORT
        if length == LONG:
            begin = start + 8
            if begin > end:
                break
            length = int.from_bytes(data[start + 2 : start + 4])
            if length < LONG or length > most:
                return payloads, start, False
        after = begin + length
        if after > end:
            break
        # All bytes at once: as one integer each, payload and repeated mask (section 5.3).
        mask = data[begin - 4 : begin] * (length // 4 + 1)
        unmasked = integer(data[begin:after], "little") ^ integer(mask[:length], "little")
        payloads.append(unmasked.to_bytes(length, "little"))
        start = after
    return payloads, start, True


def text_frame(payload: bytes) -> bytes:
    """Wrap a text in one unmasked, unfragmented WebSocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


def payload(frame: bytes) -> bytes:
    """The text in a frame that text_frame made."""
    size = frame[1]
    return frame[2 if size < 126 else 4 if size == 126 else 10 :]
