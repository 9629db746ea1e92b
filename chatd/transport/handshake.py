"""The opening handshake of RFC 6455, section 4.2.

This module is pure: the head of a request in, values and bytes out.
"""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, NamedTuple

from chatd.transport.admission import HttpError
from chatd.transport.framing import BEARER, accept_token
from chatd.transport.heads import Head

VERSIONS: Final = {"13": "origin", "8": "sec-websocket-origin"}
"""The versions of the protocol, newest first, and the header in which each has the origin of the page."""
KEY_SIZE: Final = 24
"""The length of a key, which is 16 bytes in base64."""

_ACCEPTED = ",".join(VERSIONS)
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/]")
_VERSION = re.compile(r"0|[1-9][0-9]{0,2}")


class Upgrade(NamedTuple):
    """A valid opening handshake."""

    path: str
    query: str
    origin: str | None
    """The origin of the page, if a browser sent the handshake."""
    key: str
    protocols: Sequence[str]
    """The subprotocols that the client offers."""
    extensions: str
    """The extensions that the client offers, as it wrote them."""


def read_upgrade(head: Head) -> Upgrade:
    """Read the handshake in the head of a request; raise HttpError unless it is valid (section 4.2.1)."""
    headers = head.headers
    if head.method != "GET":
        raise HttpError(
            HTTPStatus.METHOD_NOT_ALLOWED, f'HTTP method "{head.method}" not allowed', headers={"Allow": "GET"}
        )
    if head.version != "HTTP/1.1":
        raise HttpError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f'Unsupported HTTP version "{head.version}"')
    if head.length != 0:
        raise _invalid("an opening handshake has no body")
    if not head.has_option("upgrade", "websocket"):
        upgrade = headers["upgrade"]
        raise _invalid(f'HTTP Upgrade headers do not include "websocket" value (case-insensitive): "{upgrade}"')
    connection = headers.get("connection")
    if connection is None:
        raise _invalid("HTTP Connection header missing")
    if not head.has_option("connection", "upgrade"):
        raise _invalid(f'HTTP Connection headers do not include "upgrade" value (case-insensitive): "{connection}"')
    version = headers.get("sec-websocket-version")
    if version not in VERSIONS:
        raise HttpError(
            HTTPStatus.BAD_REQUEST, _wrong_version(version, head), headers={"Sec-WebSocket-Version": _ACCEPTED}
        )
    offered = headers.get("sec-websocket-protocol")
    protocols = _protocols(offered) if offered else []
    if VERSIONS[version] in head.repeated:
        raise _invalid("HTTP Origin header appears more than once in opening handshake request")
    key = headers.get("sec-websocket-key")
    if key is None or not _KEY.fullmatch(key):
        raise _invalid(_wrong_key(key, head))
    path, _, query = head.target.partition("?")
    return Upgrade(
        path, query, headers.get(VERSIONS[version]), key, protocols, headers.get("sec-websocket-extensions", "")
    )


def _invalid(detail: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, detail)


def _wrong_version(version: str | None, head: Head) -> str:
    """Explain what is wrong with the version of a handshake."""
    if version is None:
        return "WebSocket connection denied - Hixie76 protocol not supported."
    if "sec-websocket-version" in head.repeated:
        return "HTTP Sec-WebSocket-Version header appears more than once in opening handshake request"
    if _VERSION.fullmatch(version):
        return f"WebSocket version {version} not supported (supported versions: {_ACCEPTED})"
    return f'could not parse HTTP Sec-WebSocket-Version header "{version}" in opening handshake request'


def _protocols(offered: str) -> list[str]:
    """Return the subprotocols that a client offers; raise HttpError if one is offered twice (section 4.1)."""
    protocols = [name for member in offered.split(",") if (name := member.strip(" \t"))]
    seen: set[str] = set()
    for name in protocols:
        if name in seen:
            shown = BEARER if name.startswith(BEARER) else name  # nobody repeats a token
            raise _invalid(f'duplicate protocol "{shown}" specified in HTTP Sec-WebSocket-Protocol header')
        seen.add(name)
    return protocols


def _wrong_key(key: str | None, head: Head) -> str:
    """Explain what is wrong with the key of a handshake."""
    if key is None:
        return "HTTP Sec-WebSocket-Key header missing"
    if "sec-websocket-key" in head.repeated:
        return "HTTP Sec-WebSocket-Key header appears more than once in opening handshake request"
    if len(key) != KEY_SIZE:
        return f'bad Sec-WebSocket-Key (length must be {KEY_SIZE} ASCII chars) "{key}"'
    wrong = _NO_BASE64.search(key[:-2])
    if not key.endswith("==") or wrong is None:
        return f'bad Sec-WebSocket-Key (invalid base64 encoding) "{key}"'
    return f'bad character "{wrong[0]}" in Sec-WebSocket-Key (invalid base64 encoding) "{key}"'


def switch(key: str, protocol: str | None, server: str, extension: str | None = None) -> bytes:
    """Compose the answer to a valid handshake (section 4.2.2)."""
    chosen = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    if extension is not None:
        chosen += f"Sec-WebSocket-Extensions: {extension}\r\n"
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nServer: {server}\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n"
        f"{chosen}Sec-WebSocket-Accept: {accept_token(key.encode()).decode()}\r\n\r\n"
    ).encode()
