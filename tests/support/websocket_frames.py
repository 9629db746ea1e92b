"""The tests' own encoder and decoder of WebSocket frames (RFC 6455, section 5.2), independent of chatd's."""

import json
from typing import NamedTuple

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MASK = b"\x12\x34\x56\x78"


class Frame(NamedTuple):
    """One frame of a stream."""

    first: int
    """The first byte: the FIN bit, the reserved bits and the opcode."""
    masked: bool
    header: int
    """The size of the header in bytes, with the mask."""
    payload: bytes
    """The unmasked payload."""
    end: int
    """The offset in the stream of the byte after the frame."""

    @property
    def opcode(self):
        return self.first & 0x0F


def apply_mask(payload, mask):
    key = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload) ^ int.from_bytes(key)).to_bytes(len(payload))


def frame(opcode, payload=b"", *, fin=True, bits=0, masked=True, length=None, mask=MASK):
    """Encode a frame; it is invalid if it has reserved `bits`, or a `length` other than the payload's."""
    size = len(payload) if length is None else length
    head = bytes([fin << 7 | bits << 4 | opcode])
    if size < 126:
        head += bytes([masked << 7 | size])
    elif size < 65536:
        head += bytes([masked << 7 | 126]) + size.to_bytes(2)
    else:
        head += bytes([masked << 7 | 127]) + size.to_bytes(8)
    return head + mask + apply_mask(payload, mask) if masked else head + payload


def masked(payload, mask=MASK, first=0x81):
    """Encode a client's frame with this first byte."""
    return frame(first & 0x0F, payload, fin=first >> 7, bits=first >> 4 & 7, mask=mask)


def frame_at(data, begin=0):
    """Decode the frame at an offset of a stream; return None if it is not complete."""
    if len(data) < begin + 2:
        return None
    size, start = data[begin + 1] & 0x7F, begin + 2
    if size > 125:
        wide, least = (2, 126) if size == 126 else (8, 65536)
        if len(data) < start + wide:
            return None
        size, start = int.from_bytes(data[start : start + wide]), start + wide
        assert least <= size < 1 << 63, "the length is not in its shortest form"
    mask = data[start : start + 4] if data[begin + 1] & 0x80 else b""
    start += 4 if data[begin + 1] & 0x80 else 0
    end = start + size
    if len(data) < end:
        return None
    payload = bytes(data[start:end])
    return Frame(data[begin], bool(mask), start - begin, apply_mask(payload, mask) if mask else payload, end)


def take_frames(data):
    """Decode the complete frames at the beginning of a stream; return them and the rest."""
    frames, end = [], 0
    while found := frame_at(data, end):
        frames.append(found)
        end = found.end
    return frames, data[end:]


def read_frames(data, *, masked=False):
    """Return the JSON of each frame in a stream of complete text frames."""
    frames, rest = take_frames(data)
    assert not rest, "a frame was cut"
    assert {(one.first, one.masked) for one in frames} <= {(0x81, masked)}
    return [json.loads(one.payload) for one in frames]


def read_frame(data):
    """Decode the one frame that a server sent."""
    ((only,), rest) = take_frames(data)
    assert not rest, "a frame was cut"
    assert only.first & 0x70 == 0, "a reserved bit is set"
    assert not only.masked, "a server's frame is masked"
    return only


def close_code(payload):
    """Return the code in the payload of a close frame."""
    return int.from_bytes(payload[:2])
