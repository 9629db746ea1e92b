"""Whole text frames are read from their bytes; every other frame is left to Autobahn."""

import pytest
from autobahn.websocket.protocol import WebSocketServerProtocol
from hypothesis import given
from hypothesis import strategies as st
from support.websocket_frames import MASK, masked

from chatd.transport.framing import (
    FIN,
    CloseCode,
    Opcode,
    ServerFrame,
    masked_frame,
    masked_text_at,
    masked_texts,
    server_frame_at,
    text_frame,
)


@given(st.lists(st.binary(max_size=400), max_size=5), st.binary(min_size=4, max_size=4), st.data())
def test_frames_of_a_stream_cut_anywhere(payloads, mask, data):
    stream = b"".join(masked(payload, mask) for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    seen, kept = [], b""
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        kept += stream[begin:end]
        start, text = 0, b""
        while text is not None:
            text, after = masked_text_at(kept, start, 1000)
            assert after >= start
            seen += [] if text is None else [text]
            start = after
        kept = kept[start:]
    assert seen == payloads
    assert kept == b""


@pytest.mark.parametrize(
    "frame",
    [
        masked(b"x", first=0x82),
        masked(b"x", first=0x01),
        masked(b"x", first=0x80),
        masked(b"x", first=0xC1),
        masked(b"", first=0x89),
        masked(b"\x03\xe8", first=0x88),
        b"\x81\x05hello",
        b"\x81\xfe\x00\x05" + MASK + b"hello",
        masked(b"x" * 1001),
        masked(b"x" * 65536),
    ],
    ids=["binary", "fragment", "continuation", "rsv", "ping", "close", "unmasked", "long-winded", "too-big", "huge"],
)
def test_other_frames_are_left_to_autobahn(frame):
    """No other frame is taken, whatever stands before or after it."""
    stream = masked(b"one") + frame + masked(b"two")
    text, after = masked_text_at(stream, 0, 1000)
    assert text == b"one"
    assert stream[after:] == frame + masked(b"two")
    assert masked_text_at(stream, after, 1000) == (None, -1)


@pytest.mark.parametrize(
    ("frames", "texts"),
    [
        (b"", []),
        (masked(b"one") + masked(b"two"), [b"one", b"two"]),
        (masked(b"one") + masked(b"x", first=0x89) + masked(b"", first=0x8A) + masked(b"two"), [b"one", b"two"]),
        (masked(b"one") + masked(b"x" * 126, first=0x89) + masked(b"two"), [b"one"]),
        (masked(b"one") + b"\x89\x01x" + masked(b"two"), [b"one"]),
        (masked(b"one") + masked(b"x", first=0x01) + masked(b"two"), [b"one"]),
        (masked(b"one") + masked(b"\x03\xe8", first=0x88) + masked(b"two"), [b"one"]),
        (masked(b"one") + masked(b"two")[:-1], [b"one"]),
        (masked(b"x", first=0x89)[:-1], []),
    ],
    ids=["none", "texts", "control", "long-ping", "unmasked", "fragment", "close", "half", "half-ping"],
)
def test_texts_before_any_other_frame(frames, texts):
    """Pings and pongs are passed over; the first other frame ends the texts."""
    assert [*masked_texts(frames, 1000)] == texts


def test_half_a_long_header_may_become_a_frame():
    frame = masked(b"x" * 300)
    for size in range(len(frame)):
        assert masked_text_at(frame[:size], 0, 1000) == (None, 0)
    assert masked_text_at(frame, 0, 1000) == (b"x" * 300, len(frame))


def test_text_of_64_kib_and_more():
    """It has a length of eight bytes, which must be needed."""
    frame = masked(b"x" * 65536)
    for size in (*range(20), len(frame) - 1):
        assert masked_text_at(frame[:size], 0, 70_000) == (None, 0)
    assert masked_text_at(frame + b"more", 0, 70_000) == (b"x" * 65536, len(frame))
    assert [*masked_texts(frame + frame, 65536)] == [b"x" * 65536] * 2
    assert masked_text_at(frame, 0, 65535) == (None, -1)
    assert masked_text_at(b"\x81\xff" + (65535).to_bytes(8) + MASK + b"x" * 65535, 0, 70_000) == (None, -1)


SIZES = [0, 1, 3, 125, 126, 127, 65535]


@pytest.mark.parametrize("size", [*SIZES, 65536])
@pytest.mark.parametrize("opcode", Opcode)
def test_masked_frame(opcode, size):
    """A client's frame is what the independent encoder of the tests makes."""
    payload = bytes(range(256)) * 256
    assert masked_frame(opcode, payload[:size], MASK) == masked(payload[:size], MASK, FIN | opcode)


@pytest.mark.parametrize("size", [*SIZES, 65536, 100_000])
def test_server_frame_at(size):
    """A frame is found at its offset, once all of it has arrived."""
    stream = b"x" + text_frame(b"a" * size)
    begin = len(stream) - size
    assert server_frame_at(stream + b"more", 1) == ServerFrame(FIN | Opcode.TEXT, begin, len(stream))
    for cut in {1, 2, 3, begin - 1, begin, len(stream) - 1} - {len(stream)}:
        assert server_frame_at(stream[:cut], 1) is None


def test_close_codes_are_autobahns():
    """The codes have the values that the protocol implementation gives them."""
    theirs = set(WebSocketServerProtocol.CLOSE_STATUS_CODES_ALLOWED)
    assert {*CloseCode} - {CloseCode.ABNORMAL} <= theirs
