"""The cursors that a store keeps for readers outside: programs that get every room, and that may be away for long.

A member of a room is a cursor in memory, which ends with its connection.  A webhook is a cursor in the store: for each
room the number of the last entry delivered to it.  It goes on after a restart, or on another node.

One node at a time reads for a reader outside.  It *claims* the reader under a word that nobody used before, and the
store refuses to move a cursor for anyone who claimed the reader earlier.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred

HELD: Final = True
"""The answer to every claim in a store of one node."""


class Behind(NamedTuple):
    """A room with entries that a reader does not have."""

    room: str
    cursor: int
    """The number of the last entry delivered; 0 if no entry of this history was."""
    head: int
    """The number of the newest entry."""


class CursorStore(Protocol):
    """The store that readers outside need.  Every method fails with LogUnavailable."""

    def claim(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        """Claim a reader for some seconds, unless another node has it; fire with whether this one has it now.

        A reader that the store does not know begins at the heads of all rooms.  If the log has another epoch than at
        the last claim, the reader has no cursor and begins at the start of every room.
        """

    def renew(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        """Keep a claim for some seconds more; fire with False if it is over."""

    def end_claim(self, reader: str, word: str) -> "Deferred[None]":
        """End a claim, so that another node need not wait for its end."""

    def advance(self, reader: str, word: str, cursors: Mapping[str, int]) -> "Deferred[bool]":
        """Move the cursors of some rooms; fire with False, and move none, if another claim followed this one."""

    def cursor(self, reader: str, room: str) -> "Deferred[int]":
        """Read the cursor of one room, as in `Behind`."""

    def behind(self, reader: str, place: str) -> "Deferred[tuple[Sequence[Behind], str]]":
        """Return rooms that the reader lacks entries of, from a place on, and the next place, "" after the last.

        The first place is "".  Each call looks at a bounded number of rooms.
        """
