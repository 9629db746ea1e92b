"""What is to be proved of a server: each client is given every message once, in one order, as it was posted.

A message is known by its number.  The first client that is given a number says what it stands for, and that is held
to what was posted; all others must be given the same.  A post names its poster and its place among the
poster's own, and the rest of its text follows from these, so that counters are enough to know whether it is right
and whether it was there before.  What everyone has been given is forgotten.

A server whose log is another all of a sudden has lost the one that was there.  Its clients begin anew, and which of
the acknowledged messages are lost is known when the new log has been read back to its beginning.

This module is pure, and believes nothing that the client beneath it says of gaps.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain

from chatd.client.protocol import Fault, History, Posted
from chatd.messages import Entry, Id

_PADDING = 'ab c"\\/<é€\u2028👋\t' * 12


class Once:
    """Numbers from 0, nearly in order: which were there is kept as all below one, and a few."""

    def __init__(self) -> None:
        self._floor = 0
        self._above: set[int] = set()

    def add(self, number: int) -> bool:
        """Answers whether it is new."""
        if number < self._floor or number in self._above:
            return False
        self._above.add(number)
        while self._floor in self._above:
            self._above.remove(self._floor)
            self._floor += 1
        return True

    def __contains__(self, number: int) -> bool:
        return number < self._floor or number in self._above

    def __iter__(self) -> Iterator[int]:
        return chain(range(self._floor), self._above)


class Reader:
    """What a client has been given; `number` is its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cursor = 0
        """The number of its last message."""
        self.log: ObservedLog | None = None


class ObservedLog:
    """What is known of the room in the log of one epoch."""

    def __init__(self, epoch: str, posters: int) -> None:
        self.epoch = epoch
        self.head = 0
        self.start = sys.maxsize
        """Up to here nobody was given what there may be."""
        self.floor = 0
        """Up to here all have been given, and it is forgotten."""
        self.known: dict[int, tuple[Entry, int]] = {}
        """The messages above, and which client was the first to have them."""
        self.kept = [Once() for _ in range(posters)]
        self.places: dict[tuple[int, int], int] = {}
        """Where the posts are that are not acknowledged yet, by poster and place among its own."""
        self.awaited: dict[tuple[int, int], int] = {}
        """Where those must be that were acknowledged before anyone had them."""


class Proof:
    """The posts of one run, which a word stands for, and what its clients are given; all faults are raised as Fault.

    `lenient`: that a server begins a new log is no fault, and what is lost so is only counted.
    """

    def __init__(self, run: str, clients: int, posters: int, *, lenient: bool = False) -> None:
        self.run = run
        self.readers = [Reader(number) for number in range(clients)]
        self.posted = [0] * posters
        """How many posts each poster has made."""
        self.delivered = self.others = self.fresh_starts = 0
        self.lost: int | None = 0
        """How many acknowledged posts went with a log; None while that is not known."""
        self._lenient = lenient
        self._acked = [Once() for _ in range(posters)]
        self._epochs: list[str] = []
        self._logs: dict[str, ObservedLog] = {}
        self._text = re.compile(rf"{run} (\d+) (\d+) ")

    def username(self, poster: int) -> str:
        """The name that a poster goes by."""
        return f"load-{self.run}-{poster}"

    def text(self, poster: int, place: int) -> str:
        """What a post says."""
        return f"{self.run} {poster} {place} {_PADDING[: (31 * place + 7 * poster) % len(_PADDING)]}|"

    def place(self, text: str) -> int:
        """Which of its poster's posts one of this run's texts is."""
        return int(text.split(" ", 3)[2])

    def post(self, poster: int) -> tuple[int, str]:
        """Another post: its place and its text."""
        place = self.posted[poster]
        self.posted[poster] += 1
        return place, self.text(poster, place)

    # What the clients are given

    def begun(self, reader: Reader, history: History) -> None:
        """A client was given these instead of all that it had."""
        epoch, number = history.end
        if reader.log is not None and reader.log.epoch == epoch:
            raise Fault(
                f"client {reader.number} had {epoch}-{reader.cursor} and was told to begin again at {history.end}: "
                f"either the log lost messages, or the client was away for more of them than the server gives again"
            )
        log = self._enter(epoch)
        self.fresh_starts += reader.log is not None
        reader.log, reader.cursor = log, number - len(history.entries)
        log.start = min(log.start, reader.cursor)
        log.head = max(log.head, number)
        self.appended(reader, history.entries)

    def _enter(self, epoch: str) -> ObservedLog:
        """The log of an epoch, which may be a new one, in place of all that were."""
        if epoch not in self._logs:
            if epoch in self._epochs:
                raise Fault(f"the log {epoch}, which was gone, is there again in place of {self.log.epoch}")
            if self._epochs:
                self.lost = None
            self._epochs.append(epoch)
            self._logs[epoch] = ObservedLog(epoch, len(self.posted))
        return self._logs[epoch]

    def appended(self, reader: Reader, entries: Sequence[Entry]) -> None:
        """A client was given the next messages."""
        log, number = self._log(reader), reader.cursor
        known = log.known
        for entry in entries:
            if entry.number != number + 1:
                raise Fault(f"client {reader.number} was given {log.epoch}-{entry.number} after {log.epoch}-{number}")
            number = entry.number
            first = known.get(number)
            if first is None:
                if number > log.floor:
                    self._learn(log, reader, entry)
            elif first[0] != entry:
                raise Fault(
                    f"client {reader.number} was given {_quoted(entry)} as {log.epoch}-{number}, "
                    f"and client {first[1]} {_quoted(first[0])}"
                )
        reader.cursor = number
        self.delivered += len(entries)

    def _learn(self, log: ObservedLog, reader: Reader, entry: Entry) -> None:
        """The first client was given a message: if it is of this run, it must be a post, and only once."""
        log.known[entry.number] = entry, reader.number
        log.head = max(log.head, entry.number)
        found = self._text.match(entry.message)
        if found is None and not entry.username.startswith(f"load-{self.run}-"):
            self.others += 1
            return
        poster, place = map(int, found.groups()) if found else (-1, -1)
        where = f"{log.epoch}-{entry.number}, as client {reader.number} was given it,"
        if (
            not 0 <= poster < len(self.posted)
            or place >= self.posted[poster]
            or entry[1:3] != (self.username(poster), self.text(poster, place))
        ):
            raise Fault(f"{where} is not what anyone posted: {_quoted(entry)}")
        if not log.kept[poster].add(place):
            raise Fault(f"{where} is post {place} of client {poster} a second time")
        awaited = log.awaited.pop((poster, place), None)
        if awaited is None:
            log.places[poster, place] = entry.number
        elif awaited != entry.number:
            raise Fault(f"{where} is post {place} of client {poster}, acknowledged as {log.epoch}-{awaited}")

    def acked(self, reader: Reader, place: int, posted: Posted) -> None:
        """A client's post was acknowledged."""
        log, cursor, (epoch, number) = self._log(reader), reader.cursor, posted.id
        what = f"post {place} of client {reader.number} was acknowledged as {posted.id}"
        if epoch != log.epoch:
            if not posted.duplicate or epoch in self._epochs[:-1]:
                raise Fault(f"{what}, of another log than {log.epoch}")
            log, cursor = self._enter(epoch), 0  # in which this client is about to begin
        if not posted.duplicate and number > cursor:
            raise Fault(f"{what} before it came; the last to come was {epoch}-{cursor}")
        where = log.places.pop((reader.number, place), None)
        if where is None and not log.start < number <= cursor:
            log.awaited[reader.number, place] = number
            log.head = max(log.head, number)
        elif where != number:
            raise Fault(f"{what}, and is {'nowhere' if where is None else f'{epoch}-{where}'}")
        self._acked[reader.number].add(place)

    # Whether that was all

    @property
    def log(self) -> ObservedLog:
        """The newest."""
        return self._logs[self._epochs[-1]]

    @property
    def logs_lost(self) -> int:
        """How many were there before it."""
        return max(len(self._epochs) - 1, 0)

    def is_level(self, reader: Reader) -> bool:
        """Whether a client has been given all that is known to be in the log."""
        return reader.log is self.log and reader.cursor >= self.log.head

    def paged(self, reader: Reader, end: Id) -> None:
        """The newest page that a client was given ends with this message."""
        log = self._enter(end.epoch)
        if reader.log is log and end.number < log.head:
            raise Fault(
                f"the newest message is {end}, as client {reader.number} was told: {log.epoch}-{log.head} is lost"
            )

    def unread(self) -> Id | None:
        """Before which message of a log in another's place there may be some that nobody was given; None: before none.

        They are to be read back, until there are none.
        """
        return Id(self.log.epoch, self.log.start + 1) if self.logs_lost and self.log.start else None

    def recalled(self, reader: Reader, page: History) -> None:
        """A client has read back what is before those messages."""
        log = self.log
        if page.end != (log.epoch, log.start):
            raise Fault(f"client {reader.number} was given {page.end} as the one before {log.epoch}-{log.start + 1}")
        for entry in page.entries:
            self._learn(log, reader, entry)
        log.start = page.entries[0].number - 1 if page.more and page.entries else 0

    def conclude(self) -> None:
        """Everyone has been given everything, what nobody was given is read back, and all was acknowledged."""
        log = self.log
        for (poster, place), number in log.awaited.items():
            where = f"{log.epoch}-{number}"
            raise Fault(f"post {place} of client {poster} was acknowledged as {where}, and is not there")
        self.lost = sum(place not in log.kept[poster] for poster, acked in enumerate(self._acked) for place in acked)
        if self.logs_lost and not self._lenient:
            gone = " and ".join(self._epochs[:-1])
            raise Fault(f"the log {gone} is gone, with {self.lost:,} acknowledged messages: now there is {log.epoch}")

    def forget(self) -> None:
        """Keep only what someone has yet to be given."""
        for log in [*self._logs.values()]:
            cursors = [reader.cursor for reader in self.readers if reader.log is log]
            if cursors:
                low = min(cursors)
                for number in [number for number in log.known if number <= low]:
                    del log.known[number]
                log.floor = max(log.floor, low)
            elif log is not self.log:
                del self._logs[log.epoch]

    @staticmethod
    def _log(reader: Reader) -> ObservedLog:
        if reader.log is None:
            raise Fault(f"client {reader.number} was given something before its history")
        return reader.log


def _quoted(entry: Entry) -> str:
    return f"{entry.username}: {entry.message[:60]!r} of {entry.timestamp}"
