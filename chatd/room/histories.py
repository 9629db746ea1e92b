"""The history frames of a room, each encoded once for the clients that connect together.

Clients that reconnect at one moment have the same last entry, and so the same history frame.  A frame is a copy of the
entries in it, so the room keeps few of them, and not for long: only as long as such a moment lasts.
"""

from collections.abc import Callable
from typing import Final

from twisted.internet.interfaces import IDelayedCall, IReactorTime

HISTORIES_BYTES: Final = 256 * 1024
"""The size of the frames that a room keeps; one frame alone may be larger."""
HISTORIES_SECONDS: Final = 5
"""The time for which a room keeps them."""

HistoryKey = tuple[bool | None, int]
"""Whether a client resumes (None: it is new), and the number of its last entry."""


class Histories:
    """The history frames that a room keeps, each with the number of its last entry."""

    __slots__ = ("_clock", "_expiry", "_frames", "bytes")

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._expiry: IDelayedCall | None = None
        self._frames: dict[HistoryKey, tuple[bytes, int]] = {}
        self.bytes = 0
        """The size of the frames."""

    def get(self, key: HistoryKey, encode: Callable[[], tuple[bytes, int]]) -> tuple[bytes, int]:
        """Return a frame and the number of its last entry; encode it if the room does not keep it."""
        found = self._frames.get(key)
        if found is None:
            found = encode()
            size = len(found[0])
            if self.bytes + size > HISTORIES_BYTES:
                self.clear()
            if self._expiry is None:
                self._expiry = self._clock.callLater(HISTORIES_SECONDS, self._expire)
            self._frames[key] = found
            self.bytes += size
        return found

    def clear(self) -> None:
        """Drop all frames, because the room has changed or needs the memory."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expire()

    def _expire(self) -> None:
        self._expiry = None
        self._frames.clear()
        self.bytes = 0
