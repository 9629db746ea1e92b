"""permessage-deflate (RFC 7692): offers, the frames of a compressor, and posts that are inflated."""

import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.websocket_frames import take_frames

from chatd.transport.deflate import ANSWER, TAIL, InflatedTooLong, InflateError, accepts, compressor, inflate
from chatd.transport.framing import text_frame

ACCEPTED = [
    "permessage-deflate",
    "permessage-deflate; client_max_window_bits",  # Chromium and Node ws
    "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12",  # python-websockets
    "permessage-deflate;client_no_context_takeover;client_max_window_bits=15",
    "permessage-deflate ; server_max_window_bits = 15",
    'permessage-deflate; server_max_window_bits="13"',
    'permessage-deflate; client_max_window_bits="8"',
    "permessage-deflate; server_max_window_bits=10, permessage-deflate",  # a second choice
    "permessage-deflate; server_no_context_takeover,,permessage-deflate; client_max_window_bits",
    'foo; bar="x,y;permessage-deflate"; baz, permessage-deflate',
    "foo, permessage-deflate",
]
DECLINED = [
    "",
    ",",
    "foo",
    "x-webkit-deflate-frame",
    "permessage-deflate; server_max_window_bits=11",
    "permessage-deflate; server_max_window_bits=8",
    "permessage-deflate; server_no_context_takeover",
    "permessage-deflate; server_max_window_bits",
    "permessage-deflate; server_max_window_bits=16",
    "permessage-deflate; server_max_window_bits=012",
    "permessage-deflate; server_max_window_bits=twelve",
    "permessage-deflate; server_max_window_bits=12; server_max_window_bits=12",
    "permessage-deflate; client_max_window_bits=7",
    "permessage-deflate; client_max_window_bits; client_max_window_bits",
    "permessage-deflate; client_no_context_takeover=1",
    "permessage-deflate; unknown",
    'foo; bar="permessage-deflate',
    "permessage-deflate; =",
    "permessage-deflate permessage-deflate",
    "permessage-bzip2, permessage-deflate; server_max_window_bits=9",
]


@pytest.mark.parametrize("offers", ACCEPTED)
def test_offer_is_accepted(offers):
    assert accepts(offers)


@pytest.mark.parametrize("offers", DECLINED)
def test_offer_is_declined(offers):
    assert not accepts(offers)


def test_answer_bounds_both_windows():
    """The server keeps a window of 12 bits and has the client keep none."""
    assert ANSWER == "permessage-deflate; server_max_window_bits=12; client_no_context_takeover"


@given(st.lists(st.text(), max_size=20))
def test_each_frame_refers_to_those_before(texts):
    """An inflater of 12 bits yields every text from the frames alone."""
    compress, inflater = compressor(), zlib.decompressobj(-12)
    for text in texts:
        ((frame,), rest) = take_frames(compress(text_frame(text.encode())))
        assert (frame.first, rest) == (0xC1, b"")
        assert inflater.decompress(frame.payload + b"\x00\x00\xff\xff") == text.encode()


def test_repeated_text_shrinks():
    compress, text = compressor(), text_frame(b'{"type":"message","data":{"username":"ann","message":"good morning"}}')
    assert len(compress(text)) > 5 * len(compress(text))


def packed(text, *, level=6, final=False):
    """Compress a message as a client does (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -15)
    data = deflater.compress(text)
    if final:
        return data + deflater.flush() + b"\x00"
    return (data + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("text", [b"", b"hi", b"x" * 1000, bytes(range(256)) * 3])
def test_inflate(text, level):
    assert inflate(packed(text, level=level), 1000) == text


def test_inflate_final_block():
    """A client may end a message with a final block (section 7.2.3.4)."""
    assert inflate(packed(b"Hello", final=True), 1000) == b"Hello"
    assert inflate(bytes.fromhex("f348cdc9c9070000"), 1000) == b"Hello"


@pytest.mark.parametrize("data", [b"\xff", b"\x07", b"hello", b"\x03\x02"])
def test_inflate_invalid_data(data):
    with pytest.raises(InflateError, match="a compressed message is invalid"):
        inflate(data, 1000)


def test_inflate_too_long_message():
    assert inflate(packed(b"x" * 1000), 1000)
    with pytest.raises(InflatedTooLong, match="a compressed message has more than 1000 bytes"):
        inflate(packed(b"x" * 1001), 1000)


def test_zip_bomb_costs_no_more_than_the_limit():
    bomb = packed(b"\0" * (64 << 20), level=9)
    tracemalloc.start()
    try:
        with pytest.raises(InflatedTooLong):
            inflate(bomb, 16 << 10)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(bomb)
    finally:
        tracemalloc.stop()
