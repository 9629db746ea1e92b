"""The newest frames of a room, and runs of them joined for one write.

A tail is a list of frames by number, bounded in bytes.  A run is what one member gets in one turn: the frames
from its cursor on, up to a bound, joined once for all who stand at that cursor.

This module is pure: bytes in, bytes out.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

TAIL_BYTES: Final = 4 << 20
"""How much of a room's newest frames is kept in memory (the history is kept in any case)."""
RUN_BYTES: Final = 64 << 10
"""How much one member is handed in one turn, so that those who lag do not each join a whole tail."""
RUN_FRAMES: Final = RUN_BYTES // 64
"""More frames than fit into RUN_BYTES, since none is that short: what is beyond need not be measured."""


class Run(NamedTuple):
    """Consecutive frames, joined."""

    data: bytes
    size: int
    """Of the data, in bytes."""
    end: int
    """The number of the last frame."""
    pieces: Sequence[bytes]

    @classmethod
    def of(cls, after: int, pieces: Sequence[bytes]) -> "Run":
        """Join frames, the first of which is numbered after + 1, up to RUN_BYTES, and at least one."""
        if sum(map(len, pieces)) > RUN_BYTES:
            fit = sum(end <= RUN_BYTES for end in accumulate(map(len, pieces)))
            pieces = pieces[: max(fit, 1)]
        data = b"".join(pieces)
        return cls(data, len(data), after + len(pieces), pieces)

    def cut(self, taken: int) -> tuple[int, bytes]:
        """Where a transport stands that took so many bytes: the number of the frame that was cut, and its rest.

        That rest must be sent before anything else may be.  If the cut fell between two frames it is the next
        one, since only a transport with something to send tells when it can.
        """
        ends = enumerate(accumulate(map(len, self.pieces)), self.end - len(self.pieces) + 1)
        number, end = next((number, end) for number, end in ends if end > taken)
        return number, self.data[taken:end]


NO_RUN: Final = Run(b"", 0, 0, ())


class Tail:
    """The newest frames of a room by number, bounded in bytes but never below `keep` messages."""

    def __init__(self, head: int, keep: int) -> None:
        self.first = head + 1
        """The number of the oldest frame held; the rest must be read from the log."""
        self._keep = keep
        self._frames: list[bytes] = []
        self.bytes = 0
        """How much is held."""

    @property
    def head(self) -> int:
        """The number of the newest message."""
        return self.first + len(self._frames) - 1

    def extend(self, new: Sequence[bytes]) -> None:
        """Add the next messages' frames, and let go of the oldest quarter when that makes it too much."""
        self._frames += new
        self.bytes += sum(map(len, new))
        while self.bytes > TAIL_BYTES and len(self._frames) > 2 * self._keep:
            old = min(len(self._frames) // 4 + 1, len(self._frames) - self._keep)
            self.bytes -= sum(map(len, self._frames[:old]))
            del self._frames[:old]
            self.first += old

    def between(self, after: int, until: int) -> Sequence[bytes]:
        """The frames numbered after + 1 to until, all of which must be held."""
        return self._frames[after + 1 - self.first : until + 1 - self.first]
