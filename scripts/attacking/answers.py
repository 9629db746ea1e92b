"""What a server may answer: whole HTTP responses, or a handshake and then valid frames.

This decoder is independent of the server's code.
"""

import json
import re
from typing import Final

SWITCHING, CONTINUE, SERVER_ERROR = 101, 100, 500
REFUSALS: Final = 501, 503, 505
"""The statuses of 500 and more that are no fault of the server."""
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2}) [^\r\n]*\Z")


def fault(data: bytes) -> str | None:
    """Return what is wrong with all that a server sent on one connection; None if nothing is."""
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        status = _STATUS.match(line)
        if not status or not end:
            return "no response"
        code = int(status[1])
        if code >= SERVER_ERROR and code not in REFUSALS:
            return f"status {code}"
        if code == SWITCHING:
            return frame_fault(rest)
        headers = dict(one.lower().split(b": ", 1) for one in lines)
        if b"chunked" in headers.get(b"transfer-encoding", b"") or b"event-stream" in headers.get(b"content-type", b""):
            return None
        size = int(headers.get(b"content-length", b"0"))
        # The answer to HEAD states the size of a body that does not follow.
        data = rest if _STATUS.match(rest.partition(b"\r\n")[0]) else rest[size:]
        if 0 < len(rest) < size and data != rest:
            return "the body is cut"
    return None


def frame_fault(data: bytes) -> str | None:
    """Return what is wrong with the frames that a server sent (RFC 6455, section 5); None if nothing is."""
    found = None
    closed = False
    while data and found is None:
        extended = {126: 2, 127: 8}.get(data[1] & 127, 0) if data[1:] else 0
        start = 2 + extended
        size = int.from_bytes(data[2:start], "big") if extended else (data + b"\0")[1] & 127
        payload, opcode = data[start : start + size], data[0] & 15
        if closed:
            found = "a frame follows the close frame"
        elif len(data) < start + size:
            found = "a frame is cut"
        elif data[0] & 112 or data[1] & 128 or not data[0] & 128:
            found = "a frame has a mask or reserved bits, or is a fragment"
        elif opcode not in (TEXT, CLOSE, PING, PONG):
            found = f"opcode {opcode}"
        elif opcode == TEXT and "type" not in json.loads(payload):
            found = "a text has no type"
        closed = opcode == CLOSE
        data = data[start + size :]
    return found
