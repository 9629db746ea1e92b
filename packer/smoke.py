"""Smoke test of an image, run on the machine that is baked: join a room, post a message and read it.

It runs in the environment that chatd is installed in.
"""
# ruff: noqa: INP001, T201 -- a program by itself, which prints

import base64
import json
import socket
from io import BufferedIOBase
from typing import Any

from chatd.transport.framing import FIN, LENGTH_16, Opcode, masked_frame

MASK = b"\x5a\xa5\x3c\xc3"
TEXT = "Is this thing on?"


def frame(stream: BufferedIOBase) -> Any:
    """Read the next text, which the server sends in one frame."""
    kind, size = stream.read(2)
    if kind != FIN | Opcode.TEXT:
        raise SystemExit(f"no text frame: {kind:#x}")
    if size >= LENGTH_16:
        size = int.from_bytes(stream.read(2 if size == LENGTH_16 else 8))
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
    stream.write(masked_frame(Opcode.TEXT, payload, MASK))
    stream.flush()
    answer = frame(stream)
    if answer["type"] != "message" or answer["data"]["message"] != TEXT:
        raise SystemExit(f"not what was posted: {answer}")
print("joined, posted and read")
