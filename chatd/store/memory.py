"""A log in memory: lost when the process ends.

Use it for tests, for benchmarks, and for rooms that may forget.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from twisted.internet.defer import Deferred, succeed
from typing_extensions import override

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.log import Page, Poster
from chatd.store.base import SEED_ROOM, Retention, Stamp, Store, answer_retry, new_epoch, timestamp

KEEP: Final = 10_000
"""The most messages of each room, unless the retention names a number."""


class _Room:
    """One room's entries, at most `keep` of them; `head` is the number of the newest."""

    def __init__(self, keep: int) -> None:
        self.entries: deque[Entry] = deque()
        self.head = 0
        self._keep = keep
        # Each label's number, and each number's label: both are dropped with the entry.
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
        """Remove the oldest entry and its label."""
        key = self._labels.pop(self.entries.popleft().number, None)
        if key is not None:
            del self._labelled[key]

    def find(self, post: Post) -> Entry | None:
        """Return the entry that was stored with the label of this post."""
        number = None if post.label is None else self._labelled.get((post.username, post.label))
        return None if number is None else self.entries[number - self.first]


class MemoryStore(Store):
    """A store in memory: appending, reading and trimming succeed at once.

    `now` returns the time in seconds since 1970.
    """

    epoch: str = ""

    def __init__(self, retain: Retention, now: Callable[[], float]) -> None:
        super().__init__(Histogram(()))
        self._retain = retain
        self._now = now
        self._stamp = Stamp(now, None)
        self._rooms: dict[str, _Room] = {}

    @override
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        self.epoch = new_epoch()
        for entry in seed:
            self._room(SEED_ROOM).append(entry, None)
            self._stamp = Stamp(self._now, entry.timestamp)
        return self.trim()

    @override
    def append(self, room: str, post: Post, poster: Poster) -> None:
        log = self._room(room)
        stored = log.find(post)
        if stored is not None:
            answer_retry(post, stored.number, poster, same=stored.message == post.message)
            return
        entry = Entry(log.head + 1, post.username, post.message, self._stamp())
        first = log.first
        log.append(entry, post.label)
        for follower in self._followers:
            follower.appended(room, (entry,))
        self._trim(room, log, first)
        poster.posted(post, entry.number)

    @override
    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        log = self._rooms.get(room) or _Room(0)
        skip = max(0, len(log.entries) - limit if after is None else after + 1 - log.first)
        entries = [log.entries[index] for index in range(skip, min(skip + limit, len(log.entries)))]
        return succeed(Page(entries, log.first, log.head))

    @override
    def usage(self) -> Mapping[str, int]:
        return {"messages": sum(len(log.entries) for log in self._rooms.values())}

    @override
    def trim(self) -> "Deferred[None]":
        for name, log in self._rooms.items():
            self._trim(name, log, log.first)
        return succeed(None)

    @override
    def settled(self) -> "Deferred[None]":
        return succeed(None)

    @override
    def abandon(self) -> None:
        pass  # no post is ever in flight

    @override
    def close(self) -> "Deferred[None]":
        return succeed(None)

    def _room(self, name: str) -> _Room:
        if name not in self._rooms:
            self._rooms[name] = _Room(self._retain.messages or KEEP)
        return self._rooms[name]

    def _trim(self, name: str, log: _Room, first: int) -> None:
        """Remove entries that are too old, and notify the followers if the oldest entry is no longer `first`."""
        if self._retain.seconds:
            oldest = timestamp(self._now() - self._retain.seconds)
            while log.entries and log.entries[0].timestamp < oldest:
                log.drop()
        if log.first != first:
            for follower in self._followers:
                follower.trimmed(name, log.first)
