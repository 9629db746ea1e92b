"""A log in memory: gone with the process.  For tests, for benchmarks, and for rooms that may forget."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from twisted.internet.defer import Deferred, succeed

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.log import Follower, Page, Poster
from chatd.room.presence import Lobby
from chatd.store.base import SEED_ROOM, Retention, Stamp, new_epoch, tell_again, timestamp

KEEP: Final = 10_000
"""How many messages of a room are kept when nothing else is asked for."""


class _Room:
    """One room's entries, at most `keep` of them; the last has the number `head`."""

    def __init__(self, keep: int) -> None:
        self.entries: deque[Entry] = deque()
        self.head = 0
        self._keep = keep
        # The log is this process's, and so is the index of its labels.
        self._labelled: dict[tuple[str, str], int] = {}
        self._labels: dict[int, tuple[str, str]] = {}

    @property
    def first(self) -> int:
        return self.head - len(self.entries) + 1

    def append(self, entry: Entry, label: str | None) -> None:
        if len(self.entries) == self._keep:
            self.drop()
        self.entries.append(entry)
        self.head = entry.number
        if label is not None:
            key = self._labels[entry.number] = entry.username, label
            self._labelled[key] = entry.number

    def drop(self) -> None:
        """Let go of the oldest entry, and of its label."""
        key = self._labels.pop(self.entries.popleft().number, None)
        if key is not None:
            del self._labelled[key]

    def find(self, post: Post) -> Entry | None:
        """The entry that was kept of a post with this label."""
        number = None if post.label is None else self._labelled.get((post.username, post.label))
        return None if number is None else self.entries[number - self.first]


class MemoryStore:
    """Implements chatd.store.base.Store.

    `now` gives the time in seconds since 1970.
    """

    lobby: Lobby | None = None

    def __init__(self, retain: Retention, now: Callable[[], float]) -> None:
        self.epoch = ""
        self.fault: str | None = None
        self.commits = Histogram(())
        self._retain = retain
        self._now = now
        self._stamp = Stamp(now, None)
        self._followers: list[Follower] = []
        self._rooms: dict[str, _Room] = {}

    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Begin a new log with the seed."""
        self.epoch = new_epoch()
        for entry in seed:
            self._room(SEED_ROOM).append(entry, None)
            self._stamp = Stamp(self._now, entry.timestamp)
        return self.trim()

    def follow(self, follower: Follower) -> None:
        """Log.tail."""
        self._followers.append(follower)

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Log.append; it cannot fail, and is done on return."""
        log = self._room(room)
        kept = log.find(post)
        if kept is not None:
            tell_again(post, kept.number, poster, same=kept.message == post.message)
            return
        entry = Entry(log.head + 1, post.username, post.message, self._stamp())
        first = log.first
        log.append(entry, post.label)
        for follower in self._followers:
            follower.appended(room, (entry,))
        self._trim(room, log, first)
        poster.posted(post, entry.number)

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """Log.read; it cannot fail."""
        log = self._rooms.get(room) or _Room(0)
        skip = max(0, len(log.entries) - limit if after is None else after + 1 - log.first)
        entries = [log.entries[index] for index in range(skip, min(skip + limit, len(log.entries)))]
        return succeed(Page(entries, log.first, log.head))

    def usage(self) -> Mapping[str, int]:
        """Store.usage."""
        return {"messages": sum(len(log.entries) for log in self._rooms.values())}

    def trim(self) -> "Deferred[None]":
        """Store.trim."""
        for name, log in self._rooms.items():
            self._trim(name, log, log.first)
        return succeed(None)

    def settled(self) -> "Deferred[None]":
        """Store.settled; it always is."""
        return succeed(None)

    def abandon(self) -> None:
        """Store.abandon; nothing ever is on its way."""

    def close(self) -> "Deferred[None]":
        """Store.close."""
        return succeed(None)

    def _room(self, name: str) -> _Room:
        if name not in self._rooms:
            self._rooms[name] = _Room(self._retain.messages or KEEP)
        return self._rooms[name]

    def _trim(self, name: str, log: _Room, first: int) -> None:
        """Remove what is too old, and tell when the room no longer goes back to `first`."""
        if self._retain.seconds:
            oldest = timestamp(self._now() - self._retain.seconds)
            while log.entries and log.entries[0].timestamp < oldest:
                log.drop()
        if log.first != first:
            for follower in self._followers:
                follower.trimmed(name, log.first)
