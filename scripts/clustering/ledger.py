"""What was posted, acknowledged and delivered, checked."""

import collections
import datetime as dt
import itertools
import time
from collections.abc import Sequence
from typing import Final

from chatd.client.protocol import (
    History,
    Posted,
)
from chatd.load.figures import Latencies
from chatd.messages import Entry

TOLD: Final = 10  # faults that are told at length


class Reader:
    """What one client was given."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.epoch = ""
        self.begin = 0
        """The newest message when it first joined: those after it are awaited."""
        self.cursor = 0


class Ledger:
    """What was posted, acknowledged and given to whom; faults are counted by their kinds."""

    KINDS: Final = {
        "lost": "acknowledged messages that are not in the log",
        "duplicate": "messages that came, or were kept, twice",
        "disorder": "gaps, and messages that were another under the same id",
        "undelivered": "messages that a client was never given",
        "unanswered": "posts that were never acknowledged",
        "broken": "other promises that were not kept",
    }

    def __init__(self) -> None:
        self.faults: collections.Counter[str] = collections.Counter(dict.fromkeys(self.KINDS, 0))
        self.told: list[str] = []
        self.epoch = ""
        self.head = 0
        self.entries: dict[int, Entry] = {}
        self.acked: dict[str, int] = {}
        """Under which number each text was acknowledged."""
        self.posted = 0
        self.delivered = 0
        self.late = Latencies()
        self._stamps: dict[int, float] = {}

    def fault(self, kind: str, words: str, count: int = 1) -> None:
        """Something is wrong."""
        self.faults[kind] += count
        if len(self.told) < TOLD:
            self.told.append(f"{kind}: {words}")

    def begun(self, reader: Reader, history: History) -> None:
        """A client was given these, in place of all that it had."""
        epoch, number = history.end
        if reader.epoch == epoch:
            self.fault("broken", f"client {reader.number}, which had {epoch}-{reader.cursor}, was told to begin again")
        if self.epoch != epoch:
            if self.epoch:
                self.fault("broken", f"the log {self.epoch} is gone: client {reader.number} was told of {epoch}")
            self.epoch, self.head = epoch, 0
            self.entries.clear()
            self._stamps.clear()
        reader.epoch, reader.begin, reader.cursor = epoch, number, number - len(history.entries)
        self.appended(reader, epoch, history.entries, time.time())

    def appended(self, reader: Reader, epoch: str, entries: Sequence[Entry], now: float) -> None:
        """A client was given the next messages."""
        if epoch != self.epoch:
            self.fault("disorder", f"client {reader.number} was given messages of {epoch} in the log {self.epoch}")
            return
        for entry in entries:
            number, expected = entry.number, reader.cursor + 1
            if number < expected:
                self.fault("duplicate", f"client {reader.number} was given {epoch}-{number} again")
                continue
            if number > expected:
                self.fault("disorder", f"client {reader.number} was given {epoch}-{number} where {expected} was due")
            known = self.entries.get(number)
            if known is None:
                self._learn(entry)
            elif known is not entry and known != entry:
                self.fault(
                    "disorder", f"client {reader.number} was given {quoted(entry)}, and another one {quoted(known)}"
                )
            reader.cursor = number
            self.delivered += 1
            if number > reader.begin:
                self.late.add(now - self._stamps[number])

    def _learn(self, entry: Entry) -> None:
        number = entry.number
        self.entries[number] = entry
        self._stamps[number] = dt.datetime.fromisoformat(entry.timestamp).timestamp()
        self.head = max(self.head, number)

    def answered(self, text: str, posted: Posted) -> None:
        """A post was acknowledged."""
        self.acked[text] = posted.id.number
        self.head = max(self.head, posted.id.number if posted.id.epoch == self.epoch else 0)

    def conclude(self, logs: dict[str, list[Entry]], readers: Sequence[Reader]) -> None:
        """Compare all that was seen with the log, as each place tells it."""
        (place, log), *others = logs.items()
        for other, told in others:
            if told != log:
                count = sum(one != another for one, another in itertools.zip_longest(log, told))
                self.fault("disorder", f"{other} tells of {count} messages otherwise than {place}", count)
        if [entry.number for entry in log] != [*range(1, len(log) + 1)]:
            self.fault("disorder", "the numbers of the log are not 1, 2, 3 ...")
        for text, count in collections.Counter(entry.message for entry in log).items():
            if count > 1:
                self.fault("duplicate", f"{text.rstrip('.')!r} is in the log {count} times", count - 1)
        self._compare({entry.number: entry for entry in log})
        if self.posted > len(self.acked):
            self.fault("unanswered", "posts have no acknowledgement", self.posted - len(self.acked))
        for reader in readers:
            if reader.cursor < len(log):
                missed = len(log) - reader.cursor
                self.fault("undelivered", f"client {reader.number} has nothing after {reader.cursor}", missed)

    def _compare(self, log: dict[int, Entry]) -> None:
        for number, entry in self.entries.items():
            if log.get(number) != entry:
                self.fault("disorder", f"clients were given {quoted(entry)}, and the log has {quoted(log.get(number))}")
        for text, number in self.acked.items():
            if number not in log or log[number].message != text:
                self.fault("lost", f"{text.rstrip('.')!r}, acknowledged as {number}")


def quoted(entry: Entry | None) -> str:
    """A message, in a few words."""
    return f"{entry.message.rstrip('.')!r} as {entry.number}, of {entry.timestamp}" if entry else "nothing"
