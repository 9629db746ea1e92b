"""The opening handshake of RFC 6455, for the plain form that nearly every client sends.

A handshake of any other form is not judged here: Autobahn accepts or refuses it.

This module is pure: bytes in, values out.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""The bytes that a server appends to the key of a client (RFC 6455, section 1.3)."""

_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_REQUEST = re.compile(r"GET (/[!-~]*) HTTP/1\.1")


class Upgrade(NamedTuple):
    """A valid opening handshake."""

    path: str
    query: str
    origin: str | None
    """The origin of the page, if a browser sent the handshake."""
    key: str
    protocols: Sequence[str]
    """The subprotocols that the client offers."""


def parse_upgrade(head: bytes) -> Upgrade | None:
    """Parse the head of a request, without the empty line; return None unless it is a plain handshake.

    A plain handshake is an HTTP/1.1 request with each header once, version 13 and a valid key
    (RFC 6455, section 4.2.1).
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


def accept_token(key: bytes) -> bytes:
    """Compute the Sec-WebSocket-Accept header that proves that a server read a client's key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + MAGIC, usedforsecurity=False).digest())


def switch(key: str, protocol: str | None, server: str) -> bytes:
    """Compose the answer to a valid handshake (section 4.2.2)."""
    chosen = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nServer: {server}\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
        f"{chosen}Sec-WebSocket-Accept: {accept_token(key.encode()).decode()}\r\n\r\n"
    ).encode()
