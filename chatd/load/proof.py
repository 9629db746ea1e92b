"""The proof: every client receives each message once, in one order, as it was posted.

A message is identified by its number.  The first client that receives a number fixes its content, which must be that
of a post; all other clients must receive the same.  A post names its poster and its place among the posts of that
poster.  The rest of its text follows from these two, so a few counters suffice to verify it.  Entries that every
client has received are forgotten.

A server that changes to a new log has lost the old one.  Its clients start over, and which acknowledged messages are
lost is known when the new log has been read back to its start.

This module is pure.  It trusts neither the server nor the client library, and checks the order itself.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

from chatd.client.protocol import History, Posted
from chatd.messages import Entry, Id

_PADDING = 'ab c"\\/<é€\u2028👋\t' * 12


class Kind(StrEnum):
    """The kinds of violations."""

    LOST = "lost"
    """An acknowledged post is not in the log, or not under its number."""
    DUPLICATE = "duplicate"
    """A client received a number twice, or a post is stored twice."""
    DISORDER = "disorder"
    """A number is missing, or stands for different messages, or for one that nobody posted."""
    BROKEN = "broken"
    """Any other broken promise."""


class Violation(Exception):
    """A broken promise of the server; the text names it in one line."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class NumberSet:
    """A set of numbers from 0 that are added nearly in order: all below a bound, and a few above it."""

    def __init__(self) -> None:
        self._bound = 0
        self._above: set[int] = set()

    def add(self, number: int) -> bool:
        """Add a number, and return whether it is new."""
        if number < self._bound or number in self._above:
            return False
        self._above.add(number)
        while self._bound in self._above:
            self._above.remove(self._bound)
            self._bound += 1
        return True

    def __contains__(self, number: int) -> bool:
        return number < self._bound or number in self._above

    def __iter__(self) -> Iterator[int]:
        return chain(range(self._bound), self._above)


class Reader:
    """The position of one client; `number` identifies the client."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cursor = 0
        """The number of the last entry."""
        self.log: ObservedLog | None = None


class ObservedLog:
    """The log of one epoch, as the clients saw it."""

    def __init__(self, epoch: str, posters: int) -> None:
        self.epoch = epoch
        self.head = 0
        self.start = sys.maxsize
        """The number up to which no client has received anything."""
        self.known: dict[int, tuple[Entry, int]] = {}
        """Entries that a client may still receive, by number, with the first client that received each."""
        self.stored = [NumberSet() for _ in range(posters)]
        """The places of the posts that were received, for each poster."""
        self.unacknowledged: dict[tuple[int, int], int] = {}
        """The numbers of received posts that have no ack yet, by poster and place."""
        self.expected: dict[tuple[int, int], int] = {}
        """The numbers of posts that were acknowledged before a client received them, by poster and place."""


class Proof:
    """The posts of one run and what its clients receive.  Every check raises Violation.

    The word `run` marks the posts of this run.  Each text has `size` characters; with None the sizes vary.
    With `lenient` a new log is not a violation, and its losses are only counted.  `extra` are further fields that each
    post has.
    """

    def __init__(
        self,
        run: str,
        clients: int,
        posters: int,
        *,
        lenient: bool = False,
        size: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.extra = extra
        self.readers = [Reader(number) for number in range(clients)]
        self.posted = [0] * posters
        """The number of posts of each poster."""
        self.delivered = self.others = self.fresh_starts = 0
        self.lost: int | None = 0
        """The number of acknowledged posts that were lost with a log; None while that is unknown."""
        self._lenient = lenient
        self._size = size
        self._acked = [NumberSet() for _ in range(posters)]
        self._epochs: list[str] = []
        self._logs: dict[str, ObservedLog] = {}
        self._text = re.compile(rf"{run} (\d+) (\d+) ")

    def username(self, poster: int) -> str:
        """Return the username of a poster."""
        return f"load-{self.run}-{poster}"

    def text(self, poster: int, place: int) -> str:
        """Return the text of a post."""
        head = f"{self.run} {poster} {place} "
        if self._size is not None:
            return head.ljust(self._size, ".")
        return f"{head}{_PADDING[: (31 * place + 7 * poster) % len(_PADDING)]}|"

    def place(self, text: str) -> int:
        """Return the place of a text of this run among the posts of its poster."""
        return int(text.split(" ", 3)[2])

    def post(self, poster: int) -> tuple[int, str]:
        """Make the next post of a poster, and return its place and its text."""
        place = self.posted[poster]
        self.posted[poster] += 1
        return place, self.text(poster, place)

    # Deliveries and acks

    def check_history(self, reader: Reader, history: History) -> None:
        """Check a history that replaces everything a client had."""
        epoch, number = history.end
        if reader.log is not None and reader.log.epoch == epoch:
            raise Violation(
                Kind.BROKEN,
                f"client {reader.number} had {epoch}-{reader.cursor} and had to start over at {history.end}: "
                f"either the log lost messages, or the client missed more of them than the server sends again",
            )
        log = self._enter(epoch)
        self.fresh_starts += reader.log is not None
        reader.log, reader.cursor = log, number - len(history.entries)
        log.start = min(log.start, reader.cursor)
        log.head = max(log.head, number)
        self.check_entries(reader, history.entries)

    def _enter(self, epoch: str) -> ObservedLog:
        """Return the log of an epoch, which may be a new one that replaces all others."""
        if epoch not in self._logs:
            if epoch in self._epochs:
                raise Violation(Kind.BROKEN, f"the log {epoch}, which was lost, has replaced {self.log.epoch}")
            if self._epochs:
                self.lost = None
            self._epochs.append(epoch)
            self._logs[epoch] = ObservedLog(epoch, len(self.posted))
        return self._logs[epoch]

    def check_entries(self, reader: Reader, entries: Sequence[Entry]) -> None:
        """Check the next entries of a client."""
        log, number = self._log(reader), reader.cursor
        known = log.known
        for entry in entries:
            if entry.number != number + 1:
                raise Violation(
                    Kind.DUPLICATE if entry.number <= number else Kind.DISORDER,
                    f"client {reader.number} received {log.epoch}-{entry.number} after {log.epoch}-{number}",
                )
            number = entry.number
            first = known.get(number)
            if first is None:
                self._learn(log, reader, entry)
            elif first[0] != entry and not _edited_between(first[0], entry):
                raise Violation(
                    Kind.DISORDER,
                    f"client {reader.number} received {_quoted(entry)} as {log.epoch}-{number}, "
                    f"and client {first[1]} {_quoted(first[0])}",
                )
        reader.cursor = number
        self.delivered += len(entries)

    def _learn(self, log: ObservedLog, reader: Reader, entry: Entry) -> None:
        """Record the first delivery of an entry; if it is of this run, it must be a post, and only once."""
        log.known[entry.number] = entry, reader.number
        log.head = max(log.head, entry.number)
        found = self._text.match(entry.message)
        if found is None and not entry.username.startswith(f"load-{self.run}-"):
            self.others += 1
            return
        poster, place = map(int, found.groups()) if found else (-1, -1)
        where = f"{log.epoch}-{entry.number}, as client {reader.number} received it,"
        if (
            not 0 <= poster < len(self.posted)
            or place >= self.posted[poster]
            or (*entry[1:3], entry.extra) != (self.username(poster), self.text(poster, place), self.extra)
        ):
            raise Violation(Kind.DISORDER, f"{where} is not what anyone posted: {_quoted(entry)}")
        if not log.stored[poster].add(place):
            raise Violation(Kind.DUPLICATE, f"{where} is post {place} of client {poster} a second time")
        expected = log.expected.pop((poster, place), None)
        if expected is None:
            log.unacknowledged[poster, place] = entry.number
        elif expected != entry.number:
            raise Violation(
                Kind.LOST, f"{where} is post {place} of client {poster}, acknowledged as {log.epoch}-{expected}"
            )

    def check_ack(self, reader: Reader, place: int, posted: Posted) -> None:
        """Check the ack of a post of a client."""
        log, cursor, (epoch, number) = self._log(reader), reader.cursor, posted.id
        what = f"post {place} of client {reader.number} was acknowledged as {posted.id}"
        if epoch != log.epoch:
            if not posted.duplicate or epoch in self._epochs[:-1]:
                raise Violation(Kind.BROKEN, f"{what}, of another log than {log.epoch}")
            log, cursor = self._enter(epoch), 0  # the client is about to start over in it
        if not posted.duplicate and number > cursor:
            raise Violation(
                Kind.BROKEN, f"{what} before the client received it; the last it received is {epoch}-{cursor}"
            )
        where = log.unacknowledged.pop((reader.number, place), None)
        if where is None and not log.start < number <= cursor:
            log.expected[reader.number, place] = number
            log.head = max(log.head, number)
        elif where != number:
            raise Violation(Kind.LOST, f"{what}, and is {'nowhere' if where is None else f'{epoch}-{where}'}")
        self._acked[reader.number].add(place)

    # The end of a run

    @property
    def log(self) -> ObservedLog:
        """The newest log."""
        return self._logs[self._epochs[-1]]

    @property
    def logs_lost(self) -> int:
        """The number of logs that were replaced."""
        return max(len(self._epochs) - 1, 0)

    def is_level(self, reader: Reader) -> bool:
        """Return whether a client has received everything that is known to be in the log."""
        return reader.log is self.log and reader.cursor >= self.log.head

    def check_newest_page(self, reader: Reader, end: Id) -> None:
        """Check the last id of the newest page."""
        log = self._enter(end.epoch)
        if reader.log is log and end.number < log.head:
            raise Violation(
                Kind.LOST,
                f"the newest message that client {reader.number} can read is {end}: {log.epoch}-{log.head} is lost",
            )

    def unread(self) -> Id | None:
        """Return the id before which a new log must be read back, because no client has received that part."""
        return Id(self.log.epoch, self.log.start + 1) if self.logs_lost and self.log.start else None

    def check_older_page(self, reader: Reader, page: History) -> None:
        """Check a page that was read back before the id of `unread`."""
        log = self.log
        if page.end != (log.epoch, log.start):
            raise Violation(
                Kind.DISORDER,
                f"client {reader.number} received {page.end} as the one before {log.epoch}-{log.start + 1}",
            )
        for entry in page.entries:
            self._learn(log, reader, entry)
        log.start = page.entries[0].number - 1 if page.more and page.entries else 0

    def conclude(self) -> None:
        """Check that nothing is lost, when all posts are acknowledged and all clients have received everything."""
        log = self.log
        for (poster, place), number in log.expected.items():
            where = f"{log.epoch}-{number}"
            raise Violation(Kind.LOST, f"post {place} of client {poster} was acknowledged as {where}, and is not there")
        self.lost = sum(place not in log.stored[poster] for poster, place in self._acknowledged())
        if self.logs_lost and not self._lenient:
            lost = " and ".join(self._epochs[:-1])
            raise Violation(
                Kind.LOST, f"the log {lost} is lost, with {self.lost:,} acknowledged messages: now there is {log.epoch}"
            )

    def missing_from(self, entries: Iterable[Entry]) -> list[str]:
        """Return the texts of the acknowledged posts that are not among these entries of a log."""
        there = {(entry.username, entry.message) for entry in entries}
        posts = [(self.username(poster), self.text(poster, place)) for poster, place in self._acknowledged()]
        return [text for username, text in posts if (username, text) not in there]

    def _acknowledged(self) -> Iterator[tuple[int, int]]:
        return ((poster, place) for poster, acked in enumerate(self._acked) for place in acked)

    def forget(self) -> None:
        """Forget the entries that every client has received.

        While a client has yet to join a log, nothing of that log is forgotten: its history is compared too.
        """
        for log in [*self._logs.values()]:
            cursors = [reader.cursor for reader in self.readers if reader.log is log]
            if len(cursors) == len(self.readers):
                lowest = min(cursors)
                for number in [number for number in log.known if number <= lowest]:
                    del log.known[number]
            elif not cursors and log is not self.log:
                del self._logs[log.epoch]

    @staticmethod
    def _log(reader: Reader) -> ObservedLog:
        if reader.log is None:
            raise Violation(Kind.BROKEN, f"client {reader.number} received something before its history")
        return reader.log


def _edited_between(one: Entry, other: Entry) -> bool:
    """Return whether two deliveries of an entry may differ in their text, because it was edited or removed between."""
    edited = any(entry.removed or entry.replaced is not None for entry in (one, other))
    return edited and (one.username, one.timestamp) == (other.username, other.timestamp)


def _quoted(entry: Entry) -> str:
    return f"{entry.username}: {entry.message[:60]!r} of {entry.timestamp}"
