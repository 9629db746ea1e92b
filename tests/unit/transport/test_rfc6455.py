"""RFC 6455 case by case, in the chapters of the Autobahn test suite.

The suite tests servers that echo.  This one answers a text that is no post with an error, so a text that arrives whole
shows as `error`.  Texts are limited to 16 KiB, so the suite's larger ones show as a close with 1009.
"""

import pytest
from support.helpers import HEAD
from support.stores import opened_store
from support.transports import Tcp
from support.websocket_frames import BINARY, CLOSE, PING, PONG, TEXT, close_code, frame, frame_at

from chatd.room.registry import Registry
from chatd.transport import frames, http
from chatd.transport.admission import Admission
from chatd.transport.frames import MAX_MESSAGE
from chatd.transport.websocket import ChatFactory

CONTINUATION = 0
ERROR = "error"
"""A text was handled."""
FAILED = 1002
TURNS = 200
"""More reactor turns than any case takes."""


def closed(payload):
    return frame(CLOSE, payload)


def code(number, reason=b""):
    return closed(number.to_bytes(2) + reason)


def parts(opcode, *payloads):
    """Cut a message into frames."""
    last = len(payloads) - 1
    return [frame(opcode if not index else CONTINUATION, one, fin=index == last) for index, one in enumerate(payloads)]


def pong(payload=b""):
    return "pong", payload


def framing():
    """Chapter 1: every way to state a length."""
    for size in (0, 125, 126, 127, 128, 4096, MAX_MESSAGE):
        yield f"1.1 text of {size}", [frame(TEXT, b"*" * size)], [ERROR]
        yield f"1.2 binary of {size}", [frame(BINARY, b"\xfe" * size)], [1003]
    for size in (MAX_MESSAGE + 1, 65535, 65536):
        yield f"1.1 text of {size}", [frame(TEXT, b"*" * size)], [1009]
    yield "1.1 text of 2**63 bytes announced", [frame(TEXT, length=1 << 63)[:14]], [FAILED]


def pings():
    """Chapter 2: pings and pongs."""
    for size in (0, 1, 125):
        yield f"2.1 ping of {size}", [frame(PING, b"p" * size)], [pong(b"p" * size)]
    yield (
        "2.4 binary ping",
        [frame(PING, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")],
        [pong(b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")],
    )
    yield "2.5 ping of 126", [frame(PING, b"\xfe" * 126)], [FAILED]
    yield "2.7 pong that nobody asked for", [frame(PONG)], []
    yield "2.8 pong with a payload", [frame(PONG, b"unsolicited")], []
    yield "2.9 pong, then a ping", [frame(PONG, b"unsolicited"), frame(PING, b"a")], [pong(b"a")]
    names = [b"ping %d" % number for number in range(10)]
    yield "2.10 ten pings", [frame(PING, name) for name in names], [pong(name) for name in names]


def reserved_bits():
    """Chapter 3: reserved bits without an extension."""
    for bits in range(1, 8):
        yield f"3.1 text with bits {bits}", [frame(TEXT, b"hi", bits=bits)], [FAILED]
        yield (
            f"3.2 bits {bits} after a text",
            [frame(TEXT, b"hi"), frame(TEXT, b"hi", bits=bits), frame(PING)],
            [ERROR, FAILED],
        )
        yield f"3.5 binary with bits {bits}", [frame(BINARY, b"\xfe", bits=bits)], [FAILED]
        yield f"3.6 ping with bits {bits}", [frame(PING, b"hi", bits=bits)], [FAILED]
        yield f"3.7 close with bits {bits}", [frame(CLOSE, b"\x03\xe8", bits=bits)], [FAILED]


def opcodes():
    """Chapter 4: reserved opcodes."""
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield f"4 opcode {opcode}", [frame(opcode)], [FAILED]
        yield f"4 opcode {opcode} with a payload", [frame(opcode, b"reserved")], [FAILED]
        yield f"4 opcode {opcode} after a text", [frame(TEXT, b"hi"), frame(opcode), frame(PING)], [ERROR, FAILED]


def fragments():
    """Chapter 5: messages in several frames."""
    yield "5.1 ping in two frames", parts(PING, b"a", b"b"), [FAILED]
    yield "5.2 pong in two frames", parts(PONG, b"a", b"b"), [FAILED]
    yield "5.3 text in two frames", parts(TEXT, b"a", b"b"), [ERROR]
    first, last = parts(TEXT, b"a", b"b")
    yield "5.6 ping between two frames", [first, frame(PING, b"p"), last], [pong(b"p"), ERROR]
    yield "5.9 continuation of nothing, final", [frame(CONTINUATION, b"a"), frame(TEXT, b"b")], [FAILED]
    yield "5.12 continuation of nothing, not final", [frame(CONTINUATION, b"a", fin=False), frame(TEXT, b"b")], [FAILED]
    yield (
        "5.15 continuation after a whole message",
        [first, last, frame(CONTINUATION, b"c", fin=False)],
        [ERROR, FAILED],
    )
    yield "5.18 text within a text", [first, frame(TEXT, b"b")], [FAILED]
    pieces = parts(TEXT, b"1", b"2", b"3", b"4", b"5")
    mixed = [pieces[0], pieces[1], frame(PING, b"a"), pieces[2], pieces[3], frame(PING, b"b"), pieces[4]]
    yield "5.19 pings within a text in five frames", mixed, [pong(b"a"), pong(b"b"), ERROR]
    yield "5 empty frames around a text", parts(TEXT, b"", b"", b"a", b""), [ERROR]
    yield "5 binary in two frames", parts(BINARY, b"a", b"b"), [1003]


VALID = [
    *("κόσμε", "\x00", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\ufffd", "\ufffe", "\uffff"),
    *("\U00010000", "\U0001fffe", "\U0010ffff", "\ufdd0", "€" * 300),
]
INVALID = [
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",  # a surrogate
    *(b"\xed\xa0\x80", b"\xed\xad\xbf", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80"),
    *(b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"),  # above U+10FFFF
    *(b"\x80", b"\xbf", b"\x80\xbf\x80", b"\xc0", b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"),  # no first byte
    *(b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf"),  # overlong
    *(b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc3a", b"\xe2\x82a"),  # cut
]


def utf8():
    """Chapter 6: UTF-8."""
    for text in VALID:
        whole = text.encode()
        yield f"6.5 {text[:3]!a}", [frame(TEXT, whole)], [ERROR]
        yield f"6.2 {text[:3]!a} in two frames", parts(TEXT, whole[:1], whole[1:]), [ERROR]
        yield f"6.2 {text[:3]!a} in frames of a byte", parts(TEXT, *(bytes([byte]) for byte in whole[:60])), [ERROR]
    for data in INVALID:
        yield f"6.3 {data[:20]!r}", [frame(TEXT, data)], [1007]
        yield f"6.4 {data[:20]!r} in two frames", parts(TEXT, data[:1], data[1:]), [1007]
        yield (
            f"6.4 {data[:20]!r} after a good frame",
            [frame(TEXT, "κόσμε".encode(), fin=False), frame(0, data)],
            [1007],
        )


def closes():
    """Chapter 7: the close handshake."""
    late = [frame(TEXT, b"late"), frame(PING, b"late")]
    yield "7.1 close", [code(1000)], [1000]
    yield "7.1.1 close after a text", [frame(TEXT, b"hi"), code(1000)], [ERROR, 1000]
    yield "7.1.2 two closes", [code(1000), code(1000)], [1000]
    yield "7.1.3 frames after the close", [code(1000), *late], [1000]
    yield "7.1.5 close within a text", [frame(TEXT, b"a", fin=False), code(1000), frame(0, b"b")], [1000]
    yield "7.3.1 close without a code", [closed(b"")], [None]
    yield "7.3.2 close of one byte", [closed(b"a")], [FAILED]
    yield "7.3.4 close with a reason", [code(1000, b"Hello World!")], [1000]
    yield "7.3.5 close of 125 bytes", [code(1000, b"*" * 123)], [1000]
    yield "7.3.6 close of 126 bytes", [code(1000, b"*" * 124)], [FAILED]
    yield "7.5.1 close with a reason that is no UTF-8", [code(1000, b"\xce\xba\xed\xa0\x80")], [1007]
    for number in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 3000, 3999, 4000, 4999):
        yield f"7.7 code {number}", [code(number)], [number]
    for number in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
        yield f"7.9 code {number}", [code(number)], [FAILED]


def masks_and_lengths():
    """Section 5.1 and 5.2: what the suite's own client cannot send."""
    yield "unmasked text", [frame(TEXT, b"hi", masked=False)], [FAILED]
    yield "unmasked ping", [frame(PING, b"hi", masked=False)], [FAILED]
    yield "mask of zero", [frame(TEXT, b"hi", mask=bytes(4))], [ERROR]
    yield "length 5 in two bytes", [b"\x81\xfe\x00\x05" + bytes(4) + b"hello"], [FAILED]
    yield "length 5 in eight bytes", [b"\x81\xff" + (5).to_bytes(8) + bytes(4) + b"hello"], [FAILED]


CHAPTERS = framing, pings, reserved_bits, opcodes, fragments, utf8, closes, masks_and_lengths
CASES = [case for chapter in CHAPTERS for case in chapter()]


@pytest.fixture
def joined(clock, connections):
    """Return a transport on which a client has joined, and what turns the reactor."""
    factory = ChatFactory(
        rooms=Registry(opened_store(), frames, clock, 100),
        connections=connections,
        admission=Admission(),
        site=http.site(lambda: (True, "ready"), clock, {}),
        reactor=clock,
    )
    transport = Tcp()
    transport.protocol = factory.buildProtocol(transport.getPeer())
    transport.protocol.makeConnection(transport)
    transport.protocol.dataReceived(HEAD + b"\r\n\r\n")
    assert transport.read().startswith(b"HTTP/1.1 101 ")
    return transport


def seen(data):
    """Describe the frames that the server sent: handled texts, pongs, and the code of a close."""
    found, end = [], 0
    while one := frame_at(data, end):
        end = one.end
        assert one.first & 0x70 == 0
        assert not one.masked
        if one.opcode == CLOSE:
            found.append(close_code(one.payload) if one.payload else None)
        else:
            found.append(("pong", one.payload) if one.opcode == PONG else ERROR)
    assert end == len(data)
    return found


@pytest.mark.parametrize("piece", [1 << 20, 7, 1], ids=["whole", "by 7", "by 1"])
@pytest.mark.parametrize(("sent", "answers"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_case(joined, clock, sent, answers, piece):
    """A case is the same however the network cuts it."""
    data = b"".join(sent)
    if piece < len(data) > 4096:
        piece *= 1000
    for start in range(0, len(data), piece):
        joined.protocol.dataReceived(data[start : start + piece])
    clock.pump([0] * TURNS)
    assert seen(joined.read()) == answers
