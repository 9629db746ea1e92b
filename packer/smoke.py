"""Join, post and read, as a client does: the smoke test of an image, in the machine that is baked."""
# ruff: noqa: INP001, PLR2004, T201 -- a program by itself, which prints; the figures are those of RFC 6455

import base64
import json
import socket
from io import BufferedIOBase
from typing import Any

MASK = b"\x5a\xa5\x3c\xc3"
TEXT = "Is this thing on?"


def frame(stream: BufferedIOBase) -> Any:
    """The next text, which the server sends in one frame."""
    kind, size = stream.read(2)
    if kind != 0x81:
        raise SystemExit(f"no text frame: {kind:#x}")
    if size > 125:
        size = int.from_bytes(stream.read(2 if size == 126 else 8))
    return json.loads(stream.read(size))


with socket.create_connection(("127.0.0.1", 8085), 30) as client, client.makefile("rwb") as stream:
    key = base64.b64encode(bytes(16)).decode()
    stream.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
    stream.write(f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode())
    stream.flush()
    status = stream.readline().decode()
    if " 101 " not in status:
        raise SystemExit(f"no WebSocket: {status}")
    while stream.readline().strip():
        pass
    if frame(stream)["type"] != "history":
        raise SystemExit("the first frame is no history")
    payload = json.dumps({"username": "smoke", "message": TEXT}).encode()
    masked = bytes(byte ^ MASK[place % 4] for place, byte in enumerate(payload))
    stream.write(bytes([0x81, 0x80 | len(payload)]) + MASK + masked)
    stream.flush()
    answer = frame(stream)
    if answer["type"] != "message" or answer["data"]["message"] != TEXT:
        raise SystemExit(f"not what was posted: {answer}")
print("joined, posted and read")
