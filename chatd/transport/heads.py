"""The head of an HTTP/1.1 request: the one grammar for every connection, by RFC 9112 and RFC 9110.

Every request is read here first, on each port and whatever follows it.  The parts behind get a `Head`, which
is valid and normalised: each header is one line, and the target is in origin form.

This module is pure: bytes in, values out.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from http import HTTPStatus
from typing import Final, NamedTuple

from chatd.transport.admission import HttpError

MAX_HEAD: Final = 16 << 10
"""The largest size of the head of a request, in bytes."""
MAX_HEADERS: Final = 500
"""The largest number of header lines."""
HEAD_END: Final = b"\r\n\r\n"

_MOST_LENGTH: Final = 10**18
"""Stands for every longer body."""

# RFC 9110, section 5.6.2
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]"
# RFC 9112, section 3
_REQUEST_LINE = rf"({_NAME}++) ([!-~]++) (HTTP/[0-9]\.[0-9])"
# RFC 9112, section 2.2, and RFC 9110, section 5.5.  A folded line is invalid (RFC 9112, section 5.2).
_HEAD = re.compile(rf"(?:\r\n)*+{_REQUEST_LINE}((?:\r\n{_NAME}++:[\t -~\x80-\xff]*+)*+)")
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
# A byte that begins no method, a first line that is no request line, or a line that does not end with CRLF.
_NO_HEAD = re.compile(
    rf"(?:\r\n)*+(?:(?!{_NAME}|\r)(?s:.)|(?=[^\r\n]*\r\n)(?!{_REQUEST_LINE}\r\n)|(?s:.)*?(?:(?<!\r)\n|\r(?!\n|\Z)))".encode()
)
# RFC 3986, section 3.2: an address in brackets or a name, and a port.
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+)(?::[0-9]*)?")
# RFC 9112, section 3.2.3: the target of CONNECT.
_AUTHORITY = re.compile(rf"(?=.*:[0-9]+\Z)(?!:){_HOST.pattern}")
# RFC 9112, section 3.2.2: a target in absolute form, whose authority has no user.
_ABSOLUTE = re.compile(r"(?i:https?|wss?)://([^/?:][^/?]*)(.*)")


class Head(NamedTuple):
    """A valid request line with its headers."""

    method: str
    target: str
    """The path and the query; `*` for OPTIONS, or an authority for CONNECT."""
    version: str
    headers: Mapping[str, str]
    """The value of each header by its name in lower case; repeated lines are joined by commas."""
    repeated: Collection[str]
    """The names of the headers that came in more than one line."""
    length: int | None
    """The length of the body in bytes; None if its end is to be found in the body itself."""

    @property
    def asks_for_websocket(self) -> bool:
        """True for a WebSocket handshake, also for an invalid one."""
        return "websocket" in self.headers.get("upgrade", "").lower()

    def has_option(self, name: str, option: str) -> bool:
        """Return whether a header that is a list has this member, whatever its case (RFC 9110, section 5.6.1)."""
        value = self.headers.get(name, "").lower()
        return value == option or (option in value and option in [member.strip(" \t") for member in value.split(",")])

    def lines(self) -> Iterator[bytes]:
        """Compose the lines of the head, with the empty line that ends it."""
        yield f"{self.method} {self.target} {self.version}".encode()
        closing = {"connection": "close"} if self.has_option("connection", "close") else {}
        for name, value in {**self.headers, **closing}.items():
            yield f"{name}: {value}".encode("latin-1")
        yield b""


def too_long() -> HttpError:
    """Make the error for a head above the limits."""
    return HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too long")


def invalid(detail: str = "this is no HTTP request") -> HttpError:
    """Make the error for a request that breaks the grammar."""
    return HttpError(HTTPStatus.BAD_REQUEST, detail)


def take(data: bytes) -> tuple[Head | None, bytes]:
    """Take a head off the bytes received so far, and return it with the rest; None if it is not whole yet.

    Raises HttpError as soon as the bytes cannot become a valid head.
    """
    if data.startswith(b"\r\n"):
        data = data[_EMPTY_LINES.match(data).end() :]  # type: ignore[union-attr]  # it matches every text
    end = data.find(HEAD_END)
    if end > MAX_HEAD or (end < 0 and len(data) > MAX_HEAD):
        raise too_long()
    if end < 0:
        check_partial(data)
        return None, data
    return parse(data[:end]), data[end + len(HEAD_END) :]


def check_partial(data: bytes) -> None:
    """Raise HttpError if no bytes that may follow make these a valid head."""
    if _NO_HEAD.match(data):
        raise invalid()


def parse(data: bytes) -> Head:
    """Parse a whole head, without the empty line that ends it; raise HttpError if it is invalid."""
    match = _HEAD.fullmatch(data.decode("latin-1"))
    if match is None:
        raise invalid()
    method, target, version, block = match.groups()
    headers: dict[str, str] = {}
    repeated: set[str] = set()
    lines = block.split("\r\n")
    if len(lines) > MAX_HEADERS + 1:  # the first one is empty
        raise too_long()
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            repeated.add(name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    head = Head(method, target, version, headers, repeated, _length(headers, repeated))
    _check_host(head)
    if target[0] != "/" or "#" in target:
        return _in_origin_form(head)
    return head


def _check_host(head: Head) -> None:
    """Refuse a request without exactly one valid Host header (RFC 9112, section 3.2)."""
    host = head.headers.get("host")
    if host is not None and "host" not in head.repeated and _HOST.fullmatch(host):
        return
    where = " in opening handshake request" if head.asks_for_websocket else ""
    if host is None:
        if head.version != "HTTP/1.0":
            raise invalid(f"HTTP Host header missing{where}")
    elif "host" in head.repeated:
        raise invalid(f"HTTP Host header appears more than once{where}")
    else:
        _, colon, port = host.rpartition(":")
        wrong = f'invalid port "{port}" in' if colon and "]" not in port else "invalid"
        raise invalid(f'{wrong} HTTP Host header "{host}"')


def _in_origin_form(head: Head) -> Head:
    """Return a head with its target in origin form, whose authority replaces the Host header (section 3.2.2)."""
    target, fragment, text = head.target.partition("#")
    if fragment:
        raise invalid(f'HTTP requested resource contains a fragment identifier "{text}"')
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not _HOST.fullmatch(absolute[1]):
        if (head.method == "OPTIONS" and target == "*") or (head.method == "CONNECT" and _AUTHORITY.fullmatch(target)):
            return head
        raise invalid()
    rest = absolute[2] or ("*" if head.method == "OPTIONS" else "/")
    target = f"/{rest}" if rest[0] == "?" else rest
    return head._replace(target=target, headers={**head.headers, "host": absolute[1]})


def _length(headers: dict[str, str], repeated: Collection[str]) -> int | None:
    """Return the length of the body (RFC 9112, section 6.3), of which there may be one statement only."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is None and length is None:
        return 0
    if coding is not None:
        if length is not None or coding.lower() != "chunked":
            raise invalid()
        return None
    if "content-length" in repeated or length is None or not (length.isascii() and length.isdigit()):
        raise invalid()
    number = min(int(length.lstrip("0")[:20] or "0"), _MOST_LENGTH)
    headers["content-length"] = str(number)
    return number
