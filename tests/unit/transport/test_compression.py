"""permessage-deflate on a connection (RFC 7692): the handshake, compressed posts, and the frames of the room.

A text that is no post is answered with an error, so a text that arrives whole shows as `error`.
"""

import json
import zlib

import pytest
from support.helpers import HEAD, Turns
from support.stores import opened_store
from support.transports import Tcp
from support.websocket_frames import BINARY, CLOSE, PING, PONG, TEXT, close_code, frame, take_frames

from chatd.room.keyframes import LEAST_MEMBERS
from chatd.room.registry import Registry
from chatd.transport import frames, http
from chatd.transport.admission import Admission, Rate
from chatd.transport.deflate import ANSWER
from chatd.transport.frames import MAX_MESSAGE
from chatd.transport.websocket import ChatFactory

CONTINUATION, COMPRESSED = 0, 4
ERROR = "error"
"""A text was handled."""
FAILED = 1002
OFFER = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
TURNS = 50


def packed(text):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(text) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def compressed(text, opcode=TEXT):
    return frame(opcode, packed(text), bits=COMPRESSED)


def in_two(payload, between=b""):
    middle = len(payload) // 2
    first = frame(TEXT, payload[:middle], fin=False, bits=COMPRESSED)
    return [first, between, frame(CONTINUATION, payload[middle:])]


BOMB = packed(bytes(1 << 22))
CASES = {
    "text": ([compressed(b"hi")], [ERROR]),
    "empty text": ([frame(TEXT, b"\0", bits=COMPRESSED)], [ERROR]),
    "texts of both kinds": ([frame(TEXT, b"hi"), compressed(b"hi"), frame(TEXT, b"hi"), compressed(b"")], [ERROR] * 4),
    "long text": ([compressed(bytes(range(32, 127)) * 100)], [ERROR]),
    "longest text": ([compressed(b" " * MAX_MESSAGE)], [ERROR]),
    "text in two frames": (in_two(packed(b"hello")), [ERROR]),
    "ping in a text": (in_two(packed(b"hello"), frame(PING, b"p")), [("pong", b"p"), ERROR]),
    "plain text after one in two frames": ([*in_two(packed(b"hello")), frame(TEXT, b"hi")], [ERROR] * 2),
    "bit on a continuation": (
        [frame(TEXT, b"a", fin=False), frame(CONTINUATION, b"b", bits=COMPRESSED)],
        [FAILED],
    ),
    "bit on a second frame": (
        [frame(TEXT, packed(b"a"), fin=False, bits=COMPRESSED), frame(CONTINUATION, b"b", bits=COMPRESSED)],
        [FAILED],
    ),
    "compressed text in another": ([frame(TEXT, b"a", fin=False), compressed(b"hi")], [FAILED]),
    "bit on a ping": ([frame(PING, b"p", bits=COMPRESSED)], [FAILED]),
    "bit on a pong": ([frame(PONG, b"p", bits=COMPRESSED)], [FAILED]),
    "bit on a close": ([frame(CLOSE, b"\x03\xe8", bits=COMPRESSED)], [FAILED]),
    "other reserved bits": ([frame(TEXT, b"hi", bits=6)], [FAILED]),
    "unmasked": ([frame(TEXT, packed(b"hi"), bits=COMPRESSED, masked=False)], [FAILED]),
    "length in two bytes": ([b"\xc1\xfe\x00\x05" + bytes(4) + b"hello"], [FAILED]),
    "binary": ([compressed(b"hi", BINARY)], [1003]),
    "invalid data": ([frame(TEXT, b"\xff\xff", bits=COMPRESSED), compressed(b"hi")], [1007]),
    "invalid data in two frames": (in_two(b"\xff\xff"), [1007]),
    "invalid UTF-8": ([compressed(b"\xff")], [1007]),
    "invalid UTF-8 in two frames": (in_two(packed(b"\xc3\xff")), [1007]),
    "too long": ([compressed(b" " * (MAX_MESSAGE + 1)), frame(PING)], [1009]),
    "zip bomb": ([frame(TEXT, BOMB, bits=COMPRESSED)], [1009]),
    "zip bomb in two frames": (in_two(BOMB), [1009]),
    "too long to be inflated": ([frame(TEXT, bytes(MAX_MESSAGE + 1), bits=COMPRESSED)], [1009]),
}


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def server(clock, connections):
    """A function that makes a server, and one that connects to it."""

    def server(**options):
        factory = ChatFactory(
            rooms=Registry(opened_store(), frames, clock, 100),
            connections=connections,
            admission=Admission(),
            site=http.site(lambda: (True, "ready"), clock, {}, options.pop("rate", None)),
            reactor=clock,
            **options,
        )

        def connect(*headers, path=b"/"):
            transport = Tcp()
            transport.protocol = factory.buildProtocol(transport.getPeer())
            transport.protocol.makeConnection(transport)
            head = HEAD.replace(b"GET / ", b"GET %b " % path)
            transport.protocol.dataReceived(b"\r\n".join([head, *headers, b"", b""]))
            transport.answer, _, transport.history = transport.read().partition(b"\r\n\r\n")
            assert transport.answer.startswith(b"HTTP/1.1 101 ")
            return transport

        return connect

    return server


def post(text, **more):
    return json.dumps({"username": "ann", "message": text, **more}).encode()


def seen(data):
    """Describe the frames that the server sent: handled texts, pongs, and the code of a close."""
    received, rest = take_frames(data)
    assert not rest
    assert all(one.first & 0x70 == 0 for one in received)
    return [
        close_code(one.payload) if one.opcode == CLOSE else ("pong", one.payload) if one.opcode == PONG else ERROR
        for one in received
    ]


def received(data, inflater):
    """Return whether each frame is compressed, and its JSON."""
    found, rest = take_frames(data)
    assert not rest
    return [
        (
            one.first,
            json.loads(inflater.decompress(one.payload + b"\0\0\xff\xff") if one.first == 0xC1 else one.payload),
        )
        for one in found
    ]


# The handshake


def test_offer_is_answered(server):
    answer = server()(OFFER).answer
    assert b"\r\nSec-WebSocket-Extensions: %b\r\n" % ANSWER.encode() in answer


@pytest.mark.parametrize("headers", [(), (b"Sec-WebSocket-Extensions: foo",)])
def test_no_answer_without_a_good_offer(server, headers):
    assert b"Extensions" not in server()(*headers).answer


def test_server_without_compression(server):
    transport = server(compress=False)(OFFER)
    assert b"Extensions" not in transport.answer
    transport.protocol.dataReceived(compressed(b"hi"))
    assert seen(transport.read()) == [FAILED]


def test_connection_in_many_rooms_is_not_compressed(server):
    """Rooms do not know of each other what the one window of the client holds."""
    transport = server()(OFFER, path=b"/connect")
    assert b"Extensions" not in transport.answer
    transport.protocol.dataReceived(compressed(b"hi"))
    assert seen(transport.read()) == [FAILED]


def test_compressed_frame_without_an_offer(server):
    transport = server()()
    transport.protocol.dataReceived(compressed(b"hi"))
    assert seen(transport.read()) == [FAILED]


# From the client


@pytest.mark.parametrize("piece", [1 << 20, 7, 1], ids=["whole", "by 7", "by 1"])
@pytest.mark.parametrize("case", CASES)
def test_case(server, clock, case, piece):
    """A case is the same however the network cuts it."""
    transport, (sent, answers) = server()(OFFER), CASES[case]
    data = b"".join(sent)
    if piece < len(data) > 4096:
        piece *= 1000
    for start in range(0, len(data), piece):
        transport.protocol.dataReceived(data[start : start + piece])
    clock.turns(TURNS)
    assert seen(transport.read()) == answers


def test_compressed_post(server, clock):
    transport = server()(OFFER)
    transport.protocol.dataReceived(compressed(post("hi", label="c1")))
    clock.turns(TURNS)
    (_, message), (_, ack) = received(transport.read(), zlib.decompressobj(-12))
    assert (message["data"]["message"], ack["label"]) == ("hi", "c1")


def test_compressed_posts_that_wait_are_stored(server, clock):
    """A client that leaves may have posts that wait for their turn, up to the first that is invalid."""
    connect = server(rate=Rate(1, 1, clock.seconds))
    transport, other = connect(OFFER), connect()
    transport.protocol.dataReceived(compressed(post("one")))
    clock.turns(TURNS)
    transport.protocol.dataReceived(compressed(b"too fast"))
    clock.advance(0.5)
    transport.protocol.dataReceived(
        compressed(post("two")) + frame(PING) + frame(TEXT, b"\xff\xff", bits=COMPRESSED) + compressed(post("three"))
    )
    clock.rightNow += 5
    assert [*transport.protocol.unread_texts()] == [post("two")]
    transport.protocol.close(1000, "")
    clock.turns(TURNS)
    found = received(other.read(), zlib.decompressobj(-12))
    assert [text["data"]["message"] for _, text in found] == ["one", "two"]


# To the client


def test_room_compresses_for_members_that_offer_it(server, clock):
    """Acks, errors, pages and pongs stay plain in between."""
    connect = server()
    takers, other = [connect(OFFER) for _ in range(LEAST_MEMBERS)], connect()
    inflaters = {one: zlib.decompressobj(-12) for one in (*takers, other)}
    for number in range(3):
        takers[0].protocol.dataReceived(compressed(post(f"message {number}", label=f"c{number}")))
        takers[0].protocol.dataReceived(frame(TEXT, b"{}") + frame(TEXT, b'{"type":"history"}'))
        clock.turns(TURNS)
        for one, first in [*((one, 0xC1) for one in takers), (other, 0x81)]:
            found = received(one.read(), inflaters[one])
            assert [(bits, text["data"]["message"]) for bits, text in found if text["type"] == "message"] == [
                (first, f"message {number}")
            ]
            rest = [(bits, text["type"]) for bits, text in found if text["type"] != "message"]
            assert sorted(rest) == ([(0x81, "ack"), (0x81, "error"), (0x81, "history")] if one is takers[0] else [])
