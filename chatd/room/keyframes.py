"""The compressed frames of a room: one running stream for all members that take it.

A compressed frame refers to the text of the frames before it.  So it serves every member that has received those in
the same stream, whoever that is.  Every KEYFRAME frames a frame refers to nothing before itself: a *keyframe*, as in
video.  A member gets plain frames up to a keyframe, and compressed ones from there on.  Plain frames change nothing in
what a client remembers of the stream.  After a plain frame of the room a member therefore waits for a keyframe again.

A stream is a form of the room's frames.  The form of a member that waits is COMPRESSIBLE, and that of a member in step
is the stream itself.  A member changes its form at its cursor, and nothing else is kept for it.

Frames are compressed when the first member in step is served with them.  A stream that nobody takes costs nothing.

This module is pure: bytes in, bytes out.
"""

from collections.abc import Callable, Sequence
from sys import maxsize
from typing import Final

from chatd.room.tail import Tail

KEYFRAME: Final = 64
"""The number of frames from one keyframe to the next.  Four times as many would save 4 % of the bytes."""
LEAST_MEMBERS: Final = 5
"""The number of members that take compressed frames below which no keyframe begins.

A stream takes about 20 KB, and up to 20 µs a message.  The bytes that one member saves cost a hundred times as much as
these 20 µs (docs/performance.md).
"""
STREAM_BYTES: Final = 1 << 20
"""The size above which a stream drops its oldest frames."""
NEVER: Final = maxsize
"""The number of the next keyframe if none will come."""


class KeyframeStream:
    """Consecutive compressed frames, the first of which is a keyframe."""

    __slots__ = ("_compress", "_compressor", "_frames", "first", "size")

    def __init__(self, compressor: Callable[[], Callable[[bytes], bytes]], first: int) -> None:
        self.first = first
        """The number of the oldest frame held, or of the first one to come."""
        self._compressor = compressor
        self._compress: Callable[[bytes], bytes] | None = None
        self._frames: list[bytes] = []
        self.size = 0
        """The total size of the frames held."""

    @property
    def head(self) -> int:
        """The number of the newest frame."""
        return self.first + len(self._frames) - 1

    def next_keyframe(self, number: int) -> int:
        """Return the number of the first keyframe from a number on, which is one of the stream or follows its head."""
        return max(self.first, number + (self.first - number) % KEYFRAME)

    def extend(self, tail: Tail, until: int, *, wanted: bool) -> None:
        """Compress the frames up to a number; begin no keyframe unless it is wanted."""
        for frame in tail.between(self.head, until):
            if len(self._frames) % KEYFRAME == 0:
                self._compress = None
                if not wanted:
                    return
            if self._compress is None:
                self._compress = self._compressor()
            compressed = self._compress(frame)
            self._frames.append(compressed)
            self.size += len(compressed)
        while self.size > STREAM_BYTES and len(self._frames) > KEYFRAME:
            self.size -= sum(map(len, self._frames[:KEYFRAME]))
            del self._frames[:KEYFRAME]
            self.first += KEYFRAME

    def between(self, after: int, until: int) -> Sequence[bytes]:
        """Return the frames held of those numbered after + 1 to until; none unless the first of them is held."""
        return self._frames[after + 1 - self.first : until + 1 - self.first] if after + 1 >= self.first else ()

    def end(self) -> None:
        """Forget all frames, and what the next one could refer to: no member is in step any longer."""
        self._compress = None
        self._frames.clear()
        self.size = 0
        self.first = NEVER


def _no_compressor() -> Callable[[bytes], bytes]:
    raise NotImplementedError


COMPRESSIBLE: Final = KeyframeStream(_no_compressor, NEVER)
"""The form of a member that takes compressed frames and waits for a keyframe: a stream without frames."""


class Keyframes:
    """The stream of one room, which ends and begins again, and the members that take it."""

    __slots__ = ("_compressor", "_stream", "members")

    def __init__(self, compressor: Callable[[], Callable[[bytes], bytes]]) -> None:
        self._compressor = compressor
        self._stream = COMPRESSIBLE
        self.members = 0
        """The number of members of the room that take compressed frames, in step or not."""

    @property
    def size(self) -> int:
        """The size of the compressed frames that the room holds, in bytes."""
        return self._stream.size

    @property
    def first(self) -> int:
        """The number of the oldest compressed frame that the room holds, or of the first one to come, or NEVER."""
        return self._stream.first

    @property
    def _wanted(self) -> bool:
        """True if another keyframe pays."""
        return self.members >= LEAST_MEMBERS

    def next_keyframe(self, after: int) -> int:
        """Return the number of the keyframe at which a member that waits with this cursor may get in step, or NEVER."""
        keyframe = self._stream.next_keyframe(after + 1)
        if keyframe <= self._stream.head:
            return keyframe
        if not self._wanted:
            return NEVER
        return after + 1 if self._is_left(after) else keyframe

    def _is_left(self, after: int) -> bool:
        """Return True if there is no stream, or if nobody took it up to a cursor."""
        return self._stream.first == NEVER or self._stream.head < after

    def form_at(self, after: int) -> KeyframeStream:
        """Return the form for a member at a cursor that is not in step: the stream if a keyframe is next."""
        if self.next_keyframe(after) != after + 1:
            return COMPRESSIBLE
        if self._is_left(after):
            self.end()
            self._stream = KeyframeStream(self._compressor, after + 1)
        return self._stream

    def between(self, stream: KeyframeStream, after: int, until: int, tail: Tail) -> Sequence[bytes]:
        """Return the frames of a stream numbered after + 1 to at most `until`; none if it does not continue there."""
        head = stream.head
        if head < until:
            if head + 1 < tail.first:
                self.end()
            else:
                stream.extend(tail, until, wanted=self._wanted)
        return stream.between(after, until)

    def joined(self, form: object) -> None:
        """Count a member with this form."""
        self.members += isinstance(form, KeyframeStream)

    def left(self, form: object) -> None:
        """Count a member no longer; end the stream with the last one."""
        self.members -= isinstance(form, KeyframeStream)
        if not self.members:
            self.end()

    def erase(self, number: int) -> None:
        """End the stream if it holds the frame of a number: that text must not be sent any more."""
        if self._stream.first <= number:
            self.end()

    def end(self) -> None:
        """End the stream: its members get plain frames until another one begins."""
        self._stream.end()
        self._stream = COMPRESSIBLE
