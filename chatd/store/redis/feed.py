"""The feed as one node has read it, and what waits until the feed has reached an entry.

Acknowledgements and pages may arrive before the entries of the feed that they depend on.  If a client saw such a
message and Redis then lost it, this node would not notice, because it checks only what it has read from the feed.
Acknowledgements therefore wait for the entry of their message, and pages for the entry that was newest when
they were read.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twisted.logger import Logger

from chatd.messages import Entry
from chatd.room.log import Follower
from chatd.store.base import notify
from chatd.store.redis.keys import NO_ENTRY, fields_of, message_of, number_of

_logger = Logger()


class EpochChanged(Exception):
    """The log has another epoch than this node knows."""


class _Due(NamedTuple):
    """An action that waits for the feed."""

    seq: int
    """The number of the entry that the feed must reach."""
    act: Callable[[], object]
    give_up: Callable[[], object]
    """Called instead if the feed never reaches it."""


class Feed:
    """The node's position in the log: the epoch, and the newest entry of the feed that it has read."""

    def __init__(self, followers: Sequence[Follower], sanctioned: Callable[[str, bytes], object]) -> None:
        self.epoch = ""
        self.seen = NO_ENTRY
        """The id of the newest entry read."""
        self._followers = followers
        self._sanctioned = sanctioned
        """Takes each change of the sanctions: an id, and the JSON or nothing."""
        self._due: deque[_Due] = deque()

    @property
    def seq(self) -> int:
        """The number of the newest entry read."""
        return number_of(self.seen)

    def adopt(self, epoch: str, newest: bytes) -> None:
        """Take up the log as it is now; if its epoch is another one, continue from its newest entry."""
        if epoch == self.epoch:
            return
        before, self.epoch, self.seen = self.epoch, epoch, newest
        if not before:
            return
        _logger.error("the log {before} has lost messages: its epoch is now {epoch}", before=before, epoch=epoch)
        self._interrupt()
        self.give_up()

    def take(self, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
        """Read the next entries: notify the followers, then act on what waited for them.

        Raises EpochChanged if an entry belongs to another epoch.
        """
        appended: dict[str, list[Entry]] = {}
        trimmed: dict[str, int] = {}
        missed = False
        epoch = self.epoch.encode()
        for stream_id, flat in entries:
            fields = fields_of(flat)
            if fields[b"e"] != epoch:
                raise EpochChanged
            missed |= number_of(stream_id) != self.seq + 1
            self.seen = stream_id
            room = fields[b"r"].decode()
            if b"s" in fields:
                notify(self._sanctioned, fields[b"s"].decode(), fields[b"v"])
            if b"n" in fields:
                appended.setdefault(room, []).append(message_of(stream_id, int(fields[b"n"]), fields))
            if b"f" in fields:
                trimmed[room] = int(fields[b"f"])
        if missed:
            _logger.info("the feed has dropped entries that this node had not read: rereading the rooms")
            self._interrupt()
        for follower in self._followers:
            for room, new in appended.items():
                notify(follower.appended, room, new)
            for room, first in trimmed.items():
                notify(follower.trimmed, room, first)
        self._act()

    def when(self, seq: int, act: Callable[[], object], give_up: Callable[[], object]) -> None:
        """Call `act` when the feed has reached an entry, perhaps at once, or `give_up` if it never will."""
        self._due.append(_Due(seq, act, give_up))
        self._act()

    def give_up(self) -> None:
        """Give up all that waits, because the session has ended or the log is another one."""
        due, self._due = self._due, deque()
        for one in due:
            one.give_up()

    def _act(self) -> None:
        while self._due and self._due[0].seq <= self.seq:
            self._due.popleft().act()

    def _interrupt(self) -> None:
        for follower in self._followers:
            notify(follower.interrupted)
