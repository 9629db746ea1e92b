"""What a server may answer: whole HTTP responses, or a handshake and then valid frames.

This decoder is independent of the server's code.
"""

import json
import re
import zlib
from typing import Final

SWITCHING, CONTINUE, SERVER_ERROR = 101, 100, 500
REFUSALS: Final = 501, 503, 505
"""The statuses of 500 and more that are no fault of the server."""
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
COMPRESSED: Final = 64
"""The reserved bit of a compressed message (RFC 7692, section 6)."""
FLUSHED: Final = b"\x00\x00\xff\xff"
"""The bytes that end every compressed message and are not sent (section 7.2.1)."""
ACCEPTED: Final = b"\r\nsec-websocket-extensions: permessage-deflate"
"""The beginning of the header with which a server accepts compression."""
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
            return frame_fault(rest, compressed=ACCEPTED in head.lower())
        headers = dict(one.lower().split(b": ", 1) for one in lines)
        if b"chunked" in headers.get(b"transfer-encoding", b"") or b"event-stream" in headers.get(b"content-type", b""):
            return None
        size = int(headers.get(b"content-length", b"0"))
        # The answer to HEAD states the size of a body that does not follow.
        data = rest if _STATUS.match(rest.partition(b"\r\n")[0]) else rest[size:]
        if 0 < len(rest) < size and data != rest:
            return "the body is cut"
    return None


def frame_fault(data: bytes, *, compressed: bool = False) -> str | None:
    """Return what is wrong with the frames that a server sent (RFC 6455, section 5); None if nothing is.

    With compression every compressed text must inflate after those before it (RFC 7692, section 7.2.2).
    """
    found = None
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    closed = False
    while data and found is None:
        extended = {126: 2, 127: 8}.get(data[1] & 127, 0) if data[1:] else 0
        start = 2 + extended
        size = int.from_bytes(data[2:start], "big") if extended else (data + b"\0")[1] & 127
        payload, opcode = data[start : start + size], data[0] & 15
        packed = compressed and opcode == TEXT and data[0] & 112 == COMPRESSED
        if closed:
            found = "a frame follows the close frame"
        elif len(data) < start + size:
            found = "a frame is cut"
        elif (data[0] & 112 and not packed) or data[1] & 128 or not data[0] & 128:
            found = "a frame has a mask or reserved bits, or is a fragment"
        elif opcode not in (TEXT, CLOSE, PING, PONG):
            found = f"opcode {opcode}"
        elif opcode == TEXT:
            found = _text_fault(payload, inflater if packed else None)
        closed = opcode == CLOSE
        data = data[start + size :]
    return found


def _text_fault(payload: bytes, inflater: "zlib._Decompress | None") -> str | None:
    try:
        text = payload if inflater is None else inflater.decompress(payload + FLUSHED)
    except zlib.error:
        return "a text cannot be inflated"
    return None if "type" in json.loads(text) else "a text has no type"
