"""What is to be proved of a server: each client is given every message once, in one order, as it was posted.

A message is known by its number.  The first client that is given a number says what it stands for, and that is held
to what was posted; all others must be given the same.  A post names its poster and its place among the
poster's own, and the rest of its text follows from these, so that counters are enough to know whether it is right
and whether it was there before.  What everyone has been given is forgotten.

This module is pure, and believes nothing that the client beneath it says of gaps.
"""

import re
from collections.abc import Sequence

from chatd.exchange import Fault, History, Posted
from chatd.frames import Entry, Id

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


class Reader:
    """What a client has been given; `number` is its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.cursor = 0
        """The number of its last message."""
        self.log: Log | None = None


class Log:
    """What is known of the room in the log of one epoch."""

    def __init__(self, epoch: str, posters: int) -> None:
        self.epoch = epoch
        self.head = 0
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

    `lenient`: that a server begins a new log is no fault.
    """

    def __init__(self, run: str, clients: int, posters: int, *, lenient: bool = False) -> None:
        self.run = run
        self.readers = [Reader(number) for number in range(clients)]
        self.posted = [0] * posters
        """How many posts each poster has made."""
        self.delivered = self.others = self.logs_lost = 0
        self._lenient = lenient
        self._logs: dict[str, Log] = {}
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
        log = self._logs.get(epoch)
        if log is None:
            if self._logs:
                self.logs_lost += 1
                if not self._lenient:
                    raise Fault(f"the log {self.log.epoch} is gone, with all that was posted: now there is {epoch}")
            log = self._logs[epoch] = Log(epoch, len(self.posted))
        reader.log, reader.cursor = log, number - len(history.entries)
        log.head = max(log.head, number)
        self.appended(reader, history.entries)

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

    def _learn(self, log: Log, reader: Reader, entry: Entry) -> None:
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
        log, (epoch, number) = self._log(reader), posted.id
        what = f"post {place} of client {reader.number} was acknowledged as {posted.id}"
        if epoch != log.epoch:
            raise Fault(f"{what}, of another log than {log.epoch}")
        if not posted.duplicate and number > reader.cursor:
            raise Fault(f"{what} before it came; the last to come was {epoch}-{reader.cursor}")
        where = log.places.pop((reader.number, place), None)
        if where is None and number > reader.cursor:
            log.awaited[reader.number, place] = number
            log.head = max(log.head, number)
        elif where != number:
            raise Fault(f"{what}, and is {'nowhere' if where is None else f'{epoch}-{where}'}")

    # Whether that was all

    @property
    def log(self) -> Log:
        """The newest."""
        return self._logs[next(reversed(self._logs))]

    def is_level(self, reader: Reader) -> bool:
        """Whether a client has been given all that is known to be in the log."""
        return reader.log is self.log and reader.cursor >= self.log.head

    def paged(self, reader: Reader, end: Id) -> None:
        """The newest page that a client was given ends with this message."""
        log = self._log(reader)
        if end.epoch == log.epoch and end.number < log.head:
            raise Fault(
                f"the newest message is {end}, as client {reader.number} was told: {log.epoch}-{log.head} is lost"
            )

    def conclude(self) -> None:
        """Everyone has been given everything, and all was acknowledged."""
        for (poster, place), number in self.log.awaited.items():
            where = f"{self.log.epoch}-{number}"
            raise Fault(f"post {place} of client {poster} was acknowledged as {where}, and is not there")

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
    def _log(reader: Reader) -> Log:
        if reader.log is None:
            raise Fault(f"client {reader.number} was given something before its history")
        return reader.log


def _quoted(entry: Entry) -> str:
    return f"{entry.username}: {entry.message[:60]!r} of {entry.timestamp}"
