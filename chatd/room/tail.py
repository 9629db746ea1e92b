"""The newest frames of a room, and runs of them joined for one write.

A tail is a list of frames by number, bounded in bytes.  A run is the piece that one member gets in one turn: the
frames after its cursor, up to a bound, joined once for all members at that cursor.

This module is pure: bytes in, bytes out.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

TAIL_BYTES: Final = 4 << 20
"""The size above which a tail drops its oldest frames; the history of a room is kept at any size."""
RUN_BYTES: Final = 64 << 10
"""The size of the run for one member and turn, so that members behind do not each join a whole tail."""
RUN_FRAMES: Final = RUN_BYTES // 64
"""More frames than fit into RUN_BYTES, as every frame is longer than 64 bytes: further ones need not be measured."""


class Run(NamedTuple):
    """Consecutive frames, joined."""

    data: bytes
    size: int
    """The length of the data in bytes."""
    end: int
    """The number of the last frame."""
    pieces: Sequence[bytes]

    @classmethod
    def of(cls, after: int, pieces: Sequence[bytes]) -> "Run":
        """Join frames numbered from after + 1, at least one of them and at most RUN_BYTES."""
        if sum(map(len, pieces)) > RUN_BYTES:
            fit = sum(end <= RUN_BYTES for end in accumulate(map(len, pieces)))
            pieces = pieces[: max(fit, 1)]
        data = b"".join(pieces)
        return cls(data, len(data), after + len(pieces), pieces)

    def cut(self, taken: int) -> tuple[int, bytes]:
        """Return the number of the frame in which a transport stopped after `taken` bytes, and the rest of that frame.

        The caller must send the rest before anything else.  If the transport stopped between two frames, the rest is
        the whole next frame, because a transport reports that it has space only after it held something.
        """
        ends = enumerate(accumulate(map(len, self.pieces)), self.end - len(self.pieces) + 1)
        number, end = next((number, end) for number, end in ends if end > taken)
        return number, self.data[taken:end]


NO_RUN: Final = Run(b"", 0, 0, ())


class Tail:
    """The newest frames of a room by number, bounded in bytes but never below `keep` frames."""

    def __init__(self, head: int, keep: int) -> None:
        self.first = head + 1
        """The number of the oldest frame held; older ones are in the log only."""
        self.head = head
        """The number of the newest frame."""
        self._keep = keep
        self._frames: list[bytes] = []
        self.bytes = 0
        """The total size of the frames held."""

    def extend(self, new: Sequence[bytes]) -> None:
        """Add the frames that follow, and drop the oldest quarter while the tail is too large."""
        self._frames += new
        self.head += len(new)
        self.bytes += sum(map(len, new))
        while self.bytes > TAIL_BYTES and len(self._frames) > 2 * self._keep:
            old = min(len(self._frames) // 4 + 1, len(self._frames) - self._keep)
            self.bytes -= sum(map(len, self._frames[:old]))
            del self._frames[:old]
            self.first += old

    def replace(self, number: int, change: Callable[[bytes], bytes]) -> None:
        """Put another frame in the place of one, if that is still held."""
        place = number - self.first
        if place >= 0:
            before = self._frames[place]
            self._frames[place] = change(before)
            self.bytes += len(self._frames[place]) - len(before)

    def between(self, after: int, until: int) -> Sequence[bytes]:
        """Return the frames numbered after + 1 to until, all of which must be held."""
        return self._frames[after + 1 - self.first : until + 1 - self.first]
