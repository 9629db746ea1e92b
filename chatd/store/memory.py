"""A log in memory: lost when the process ends.

Use it for tests, for benchmarks, and for rooms that may forget.  Clients that post could fill it.  Its size is
therefore bounded: by a number of messages in each room, even if all are retained, and by a number of rooms.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from heapq import nsmallest
from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from typing_extensions import override

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.cursors import HELD, Behind
from chatd.room.log import LogUnavailable, Page, Poster
from chatd.room.moderation import RoomSummary, Sanction, every_room
from chatd.store.base import (
    SAMPLE,
    SEED_ROOM,
    LogClock,
    Retention,
    Store,
    answer_retry,
    dump_extra,
    estimate,
    is_retry,
    log_removed,
    new_epoch,
    notify,
    why_not_replaceable,
)

KEEP: Final = 10_000
"""The most messages of each room, unless the retention names a number."""
MAX_ROOMS: Final = 10_000
"""The most rooms.  Posts to more are refused, unless rooms without messages can be forgotten."""

_logger = Logger()


class _Room:
    """One room's entries, at most `keep` of them; `head` is the number of the newest."""

    def __init__(self, keep: int, head: int) -> None:
        self.entries: deque[Entry] = deque()
        self.head = head
        self.stamped = ""
        """The timestamp of the newest entry."""
        self._keep = keep
        # Each label's number, with whether that entry is a removal, and each number's label: both are dropped with the
        # entry.
        self._labelled: dict[tuple[str, str], tuple[int, bool]] = {}
        self._labels: dict[int, tuple[str, str]] = {}
        # The numbers of the edits of each entry.  An entry that was edited keeps its text, and a page looks up the
        # newest one.
        self._edits: dict[int, list[int]] = {}

    @property
    def first(self) -> int:
        return self.head - len(self.entries) + 1

    def append(self, entry: Entry, label: str | None) -> None:
        if len(self.entries) == self._keep:
            self.drop()
        self.entries.append(entry)
        self.head = entry.number
        self.stamped = entry.timestamp
        if label is not None:
            key = self._labels[entry.number] = entry.username, label
            self._labelled[key] = entry.number, entry.removed

    def drop(self) -> None:
        """Remove the oldest entry and its label."""
        number = self.entries.popleft().number
        key = self._labels.pop(number, None)
        if key is not None:
            del self._labelled[key]
        if self._edits:
            self._edits.pop(number, None)

    def edit(self, original: int, edit: Entry) -> None:
        """Note that an entry is about to be replaced; a removal erases its text and those of all its edits."""
        edits = self._edits.setdefault(original, [])
        place = original - self.first
        self.entries[place] = self.entries[place]._replace(replaced=edit.number)
        if edit.removed:
            for number in (original, *edits):
                place = number - self.first
                self.entries[place] = self.entries[place]._replace(message=edit.message, removed=True, extra=None)
        edits.append(edit.number)

    def between(self, start: int, stop: int) -> Sequence[Entry]:
        """Return the entries at these places, each with its newest text."""
        entries = [self.entries[place] for place in range(start, min(stop, len(self.entries)))]
        if not self._edits:
            return entries
        first = self.first
        return [
            entry if entry.replaced is None else _as_edited(entry, self.entries[entry.replaced - first])
            for entry in entries
        ]

    def get(self, number: int) -> Entry | None:
        """Return an entry with the text that it had first; None if it is not here."""
        place = number - self.first
        return self.entries[place] if 0 <= place < len(self.entries) else None

    def summary(self, name: str) -> RoomSummary:
        newest = [self.entries[-1 - index] for index in range(min(SAMPLE, len(self.entries)))]
        size = sum(
            len(entry.username.encode()) + len(entry.message.encode()) + len(dump_extra(entry.extra) or "")
            for entry in newest
        )
        size = estimate(size, len(newest), len(self.entries))
        return RoomSummary(name, self.first, self.head, size, newest[0].timestamp)

    def find(self, post: Post) -> tuple[int, bool] | None:
        """Return the number that was stored with the label of this post, and whether the post repeats that entry."""
        found = None if post.label is None else self._labelled.get((post.username, post.label))
        if found is None:
            return None
        number, removal = found
        return number, is_retry(post, self.entries[number - self.first], removal=removal)


def _as_edited(entry: Entry, edit: Entry) -> Entry:
    """Return an entry with what its newest edit says."""
    return entry._replace(message=edit.message, extra=edit.extra)


class MemoryStore(Store):
    """A store in memory: appending, reading and trimming succeed at once.

    `now` returns the time in seconds since 1970, and `steady` seconds that pass evenly.
    """

    epoch: str = ""

    def __init__(self, retain: Retention, now: Callable[[], float], steady: Callable[[], float] | None = None) -> None:
        super().__init__(Histogram(()))
        self._retain = retain
        self._now = now
        self._clock = LogClock(now, steady)
        self._rooms: dict[str, _Room] = {}
        self._forgotten = 0
        """The highest number in any room that was forgotten; every new room continues after it."""
        self._aged = 0
        """The number of messages removed because of their age, and not logged yet."""
        self._cursors: dict[str, dict[str, int]] = {}
        """The cursors of each reader outside, by room."""

    @override
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        self.epoch = new_epoch()
        if self._retain.messages is None:
            _logger.info("memory: each room keeps {messages} messages at most; --retain N keeps N", messages=KEEP)
        for entry in seed:
            self._room(SEED_ROOM).append(entry, None)
        return self.trim()

    @override
    def append(self, room: str, post: Post, poster: Poster) -> None:
        if room not in self._rooms and len(self._rooms) >= MAX_ROOMS:
            self._forget_rooms()
            if len(self._rooms) >= MAX_ROOMS:
                self._faults["rooms"] = f"memory: holds {MAX_ROOMS} rooms, and no more: use --store sqlite:PATH"
                notify(poster.refused, post, LogUnavailable(self._faults["rooms"]))
                return
        log = self._rooms.get(room) or _Room(0, self._forgotten)
        found = log.find(post)
        if found is not None:
            notify(answer_retry, post, found[0], poster, same=found[1])
            return
        replaces = None
        if post.replaces is not None:
            epoch, replaces = post.replaces
            error = why_not_replaceable(post, log.get(replaces) if epoch == self.epoch else None)
            if error is not None:
                notify(poster.refused, post, error)
                return
        log = self._room(room)
        now = self._clock.read().after(log.stamped)
        entry = Entry(
            log.head + 1, post.username, post.message, now, post.author, replaces, post.removed, extra=post.extra
        )
        first = log.first
        if replaces is not None:
            log.edit(replaces, entry)
        log.append(entry, post.label)
        for follower in self._followers:
            notify(follower.appended, room, (entry,))
        self._trim(room, log, first)
        notify(poster.posted, post, entry.number)

    @override
    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        log = self._rooms.get(room) or _Room(0, self._forgotten)
        skip = max(0, len(log.entries) - limit if after is None else after + 1 - log.first)
        return succeed(Page(log.between(skip, skip + limit), log.first, log.head))

    @override
    def usage(self) -> Mapping[str, int]:
        return {"messages": sum(len(log.entries) for log in self._rooms.values())}

    @override
    def trim(self) -> "Deferred[None]":
        for name, log in self._rooms.items():
            self._trim(name, log, log.first)
        if not all(log.entries for log in self._rooms.values()):
            self._faults.pop("rooms", None)
        log_removed(self._aged)
        self._aged = 0
        return self.lift(self.sanctions.expired(self._now()))

    # Moderation

    @override
    def sanction(self, sanction: Sanction) -> "Deferred[None]":
        self.sanctions.add(sanction)
        return succeed(None)

    @override
    def lift(self, words: Sequence[str]) -> "Deferred[None]":
        for word in words:
            self.sanctions.remove(word)
        return succeed(None)

    @override
    def list_rooms(
        self, after: str, limit: int, wanted: Callable[[str], bool] = every_room
    ) -> "Deferred[Sequence[RoomSummary]]":
        held = (name for name, log in self._rooms.items() if log.entries and name > after)
        names = nsmallest(limit, filter(wanted, held))
        return succeed([self._rooms[name].summary(name) for name in names])

    @override
    def clear_room(self, room: str) -> "Deferred[int]":
        log = self._rooms.get(room)
        removed = len(log.entries) if log is not None else 0
        if log is not None and removed:
            for _ in range(removed):
                log.drop()
            for follower in self._followers:
                notify(follower.trimmed, room, log.first)
        return succeed(removed)

    # Cursors of readers outside, of which only this process has any

    @override
    def claim(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        self._cursors.setdefault(reader, {name: log.head for name, log in self._rooms.items()})
        return succeed(HELD)

    @override
    def advance(self, reader: str, word: str, cursors: Mapping[str, int]) -> "Deferred[bool]":
        self._cursors[reader].update(cursors)
        return succeed(HELD)

    @override
    def cursor(self, reader: str, room: str) -> "Deferred[int]":
        return succeed(self._cursors[reader].get(room, 0))

    @override
    def behind(self, reader: str, place: str) -> "Deferred[tuple[Sequence[Behind], str]]":
        cursors = self._cursors[reader]
        rooms = [Behind(name, cursors.get(name, 0), log.head) for name, log in self._rooms.items()]
        return succeed(([room for room in rooms if room.head > room.cursor], ""))

    # Ending

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
            self._rooms[name] = _Room(self._retain.messages or KEEP, self._forgotten)
            self._faults.pop("rooms", None)
        return self._rooms[name]

    def _forget_rooms(self) -> None:
        """Forget the rooms without messages.

        Their numbers are never used again, because new rooms continue after the highest of them.
        """
        empty = {name: log for name, log in self._rooms.items() if not log.entries}
        if not empty:
            return
        self._forgotten = max(self._forgotten, *(log.head for log in empty.values()))
        for name in empty:
            del self._rooms[name]
            for cursors in self._cursors.values():
                cursors.pop(name, None)
        for follower in self._followers:
            notify(follower.interrupted)

    def _trim(self, name: str, log: _Room, first: int) -> None:
        """Remove entries that are too old, and notify the followers if the oldest entry is no longer `first`."""
        ages = self._clock.ages(self._retain.seconds) if self._retain.seconds else None
        if ages is not None:
            old = ages.too_old(entry.timestamp for entry in log.entries)
            self._aged += old
            for _ in range(old):
                log.drop()
        if log.first != first:
            for follower in self._followers:
                notify(follower.trimmed, name, log.first)
