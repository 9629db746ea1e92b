"""What is sent: requests and frames that are valid, and mutations of them.

A mutation changes a bit, inserts, removes or repeats bytes, puts in a piece of syntax that parsers stumble over, cuts
the input, or continues it as another one.  Everything follows from the random number generator: a seed repeats a run.

Compressed messages (RFC 7692) differ from others by a reserved bit in their first frame.  Clients compress each one for
itself, as the server asks.
"""

import random
import zlib
from typing import Final

POST: Final = b'{"username":"ann","message":"hi"}'
TEXT, PING, PONG, CLOSE = 1, 9, 10, 8
SHORT, MEDIUM = 126, 1 << 16
"""The sizes from which a frame states its length in two and in eight more bytes (RFC 6455, section 5.2)."""


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    """Compose a request with a Host header."""
    return b"\r\n".join([line, b"Host: 127.0.0.1", *headers, b"", body])


def handshake(target: bytes = b"/", *headers: bytes) -> bytes:
    """Compose an opening handshake."""
    key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    wanted = b"Upgrade: websocket", b"Connection: Upgrade", key, b"Sec-WebSocket-Version: 13"
    return request(b"GET %b HTTP/1.1" % target, *wanted, *headers)


def post(*headers: bytes, body: bytes = POST) -> bytes:
    """Compose a post over HTTP."""
    kind, size = b"Content-Type: application/json", b"Content-Length: %d" % len(body)
    return request(b"POST /rooms/team/messages HTTP/1.1", kind, size, *headers, body=body)


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """Compose a frame, whose mask is zero."""
    size, bit = len(payload), masked << 7
    if size < SHORT:
        length = bytes([bit | size])
    elif size < MEDIUM:
        length = bytes([bit | SHORT]) + size.to_bytes(2, "big")
    else:
        length = bytes([bit | SHORT + 1]) + size.to_bytes(8, "big")
    return bytes([fin << 7 | reserved << 4 | opcode]) + length + bytes(4 * masked) + payload


COMPRESSED: Final = 4
"""The reserved bit of a compressed message (RFC 7692, section 6)."""
FLUSHED: Final = b"\x00\x00\xff\xff"
"""The bytes that end every compressed message and are not sent (section 7.2.1)."""
OFFER: Final = b"Sec-WebSocket-Extensions: permessage-deflate"
JOIN_COMPRESSED: Final = handshake(b"/", OFFER)


def deflated(text: bytes) -> bytes:
    """Compress a message for itself."""
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return (stream.compress(text) + stream.flush(zlib.Z_SYNC_FLUSH)).removesuffix(FLUSHED)


def compressed(text: bytes) -> bytes:
    """Compose the frame of a compressed text."""
    return frame(TEXT, deflated(text), reserved=COMPRESSED)


BOMB: Final = compressed(b" " * (8 << 20))
"""A frame of 8 KB with a text of 8 MB."""


TEXTS: Final = (
    POST,
    b'{"username":"ann","message":"hi","label":"a1"}',
    '{"username":"é","message":"😀"}'.encode(),
    b'{"username":"a","message":"\\ud83d\\ude00"}',
    b'{"username":"ann","message":"' + b"x" * 500 + b'"}',
    b'{"type":"history","limit":5}',
    b'{"type":"history","before":"abcdef-3","limit":2,"label":"q"}',
    b'{"type":"typing","username":"ann"}',
    b"{}",
    b"[]",
    b"hi",
    b'{"a":' * 200,
    b"1e999",
    b'"\\u0000"',
)
"""Texts of frames."""

SHARED: Final = (
    b'{"type":"join","room":"team","events":["presence","typing"],"username":"bob","label":"j1"}',
    b'{"room":"team","username":"ann","message":"hi","label":"c2"}',
    b'{"type":"join","room":"other","last_event_id":"abcdef-1"}',
    b'{"type":"history","room":"team","limit":3}',
    b'{"type":"typing","room":"other","username":"bob"}',
    b'{"type":"leave","room":"team","label":"l1"}',
)
"""Texts of frames on a connection with many rooms."""

HEADS: Final = (
    handshake(b"/connect"),
    request(b"GET /events?room=team&room=other HTTP/1.1"),
    handshake(),
    handshake(b"/rooms/team?events=presence,typing&username=bob"),
    handshake(b"/?last_event_id=abcdef-1"),
    handshake(b"/", b"Sec-WebSocket-Protocol: chat.v1, other", b"Origin: http://127.0.0.1"),
    handshake(b"/", b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"),
    request(b"GET / HTTP/1.1"),
    request(b"GET /rooms/team/messages?limit=3&before=abcdef-2 HTTP/1.1"),
    request(b"GET /rooms/team/messages/abcdef-2 HTTP/1.1", b"Connection: close"),
    request(b"GET /rooms/team/export?after=abcdef-2 HTTP/1.1"),
    request(b"GET /rooms/team/presence HTTP/1.1"),
    request(b"GET /rooms?limit=2&after=main HTTP/1.1"),
    request(b"HEAD /rooms/x HTTP/1.0"),
    request(b"OPTIONS * HTTP/1.1"),
    request(b"GET http://127.0.0.1/rooms/a HTTP/1.1"),
    request(b"OPTIONS /rooms/team/messages HTTP/1.1", b"Origin: http://b", b"Access-Control-Request-Method: POST"),
    request(b"GET /healthz HTTP/1.1"),
    post(),
    post(b'Idempotency-Key: "k1"'),
    post(b"Expect: 100-continue"),
    request(
        b"POST /rooms/team/messages HTTP/1.1",
        *(b"Content-Type: application/json", b"Transfer-Encoding: chunked"),
        body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(POST), POST),
    ),
)
"""Requests."""

FRAMES: Final = (
    *(handshake() + frame(TEXT, text) for text in TEXTS),
    handshake() + frame(PING, b"x") + frame(PONG, b"") + frame(TEXT, POST),
    handshake() + frame(TEXT, POST[:5], fin=False) + frame(PING, b"") + frame(0, POST[5:]),
    handshake() + frame(TEXT, b"", fin=False) * 30 + frame(0, POST),
    handshake() + frame(CLOSE, b"\x03\xe8bye"),
    handshake() + frame(2, b"\0"),
    handshake() + frame(3, b""),
    handshake() + frame(TEXT, POST) * 20,
    handshake(b"/rooms/team") + frame(TEXT, POST, masked=False),
    handshake() + frame(TEXT, POST, reserved=4),
    handshake() + frame(PING, b"x" * SHORT),
    handshake(b"/connect") + b"".join(frame(TEXT, text) for text in SHARED),
    *(handshake(b"/connect") + frame(TEXT, SHARED[0]) + frame(TEXT, text) for text in (*SHARED, *TEXTS)),
)
"""Connections that speak WebSocket."""

COMPRESSED_FRAMES: Final = (
    *(JOIN_COMPRESSED + compressed(text) for text in TEXTS),
    JOIN_COMPRESSED + (compressed(POST) + frame(TEXT, POST)) * 10,
    JOIN_COMPRESSED + frame(TEXT, deflated(POST)[:9], fin=False, reserved=COMPRESSED) + frame(0, deflated(POST)[9:]),
    JOIN_COMPRESSED + frame(TEXT, deflated(POST)[:9], fin=False, reserved=COMPRESSED) + frame(PING, b"") + BOMB,
    JOIN_COMPRESSED + BOMB,
    JOIN_COMPRESSED + frame(TEXT, zlib.compress(POST), reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(TEXT, zlib.compress(POST)[2:-4], reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(TEXT, deflated(POST)[:-3], reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(TEXT, deflated(POST) + b"\xff" * 40, reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(TEXT, b"", reserved=COMPRESSED) + compressed(b"\xff\xfe"),
    JOIN_COMPRESSED + frame(2, deflated(POST), reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(PING, b"", reserved=COMPRESSED),
    JOIN_COMPRESSED + frame(TEXT, POST[:5], fin=False) + frame(0, POST[5:], reserved=COMPRESSED),
    handshake() + compressed(POST),
    handshake(b"/connect", OFFER) + frame(TEXT, SHARED[0]) + compressed(SHARED[1]),
)
"""Connections that compress, well or badly."""

PIPELINES: Final = tuple(first + second for first in HEADS[7:] for second in (*FRAMES[:3], *HEADS[:3], *HEADS[-4:]))
"""Two requests at once."""

STREAM: Final = request(b"GET /rooms/team/events HTTP/1.1")
SYNTAX: Final = (
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"?", b"#", b'"', b"{", b"}"),
    *(b"Transfer-Encoding: chunked\r\n", b"chunked", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n"),
    *(b"Content-Length: 99999999999999999999\r\n", b"Host: b\r\n", b"Connection: close\r\n", b"Upgrade: h2c\r\n"),
    *(
        b"Connection: keep-alive\r\n",
        b"Expect: 100-continue\r\n",
        b"Origin: null\r\n",
        b"Origin: http://evil.example\r\n",
    ),
    *(b"X-Forwarded-For: 1.2.3.4\r\n", b"Content-Encoding: gzip\r\n", b"Last-Event-ID: abcdef-1\r\n"),
    *(b"Accept: text/event-stream\r\n", b"HTTP/1.0", b"HTTP/2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"HEAD", b"CONNECT", b"TRACE", b"DELETE", b"PUT", STREAM, b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
    *(b"\x16\x03\x01\x02\x00", b"%00", b"%zz", b"../", b"a" * 300, b"9" * 30, b"-0", b"1e400", b"null"),
    *(b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\u0000", b"\\ud800"),
    *(b"\x88\x80\0\0\0\0", b"\x81\xff" + b"\xff" * 8, b"\x81\xfe\xff\xff", b"\x89\xfe\0\x7e"),
)
"""Pieces that parsers stumble over."""

MUTATIONS: Final = 0, 1, 1, 1, 2, 2, 3, 5, 9
"""How many mutations an input has, each as often as it stands here."""


def mutated(chance: random.Random) -> bytes:
    """Return an input."""
    kind = chance.choice((HEADS, FRAMES, COMPRESSED_FRAMES, PIPELINES))
    data = bytearray(chance.choice(kind))
    for _ in range(chance.choice(MUTATIONS)):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(8):
            case 0 if data:
                data[place - 1] ^= 1 << chance.randrange(8)
            case 1:
                data[place:place] = chance.randbytes(chance.randrange(1, 6))
            case 2:
                del data[place : place + chance.randrange(1, 30)]
            case 3:
                start = chance.randrange(len(data) + 1)
                data[place:place] = data[start : start + chance.randrange(1, 60)]
            case 4:
                data[place:place] = chance.choice(SYNTAX)
            case 5:
                piece = chance.choice(SYNTAX)
                data[place : place + len(piece)] = piece
            case 6:
                del data[place:]
            case _:
                other = chance.choice(FRAMES + COMPRESSED_FRAMES + HEADS)
                data[place:] = other[chance.randrange(len(other)) :]
    return bytes(data)


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Cut an input into the pieces in which it is sent."""
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 0, 1, 2, 3))))
    return [piece for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if (piece := data[start:end])]
