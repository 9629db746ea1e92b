"""The ledger: what was posted, acknowledged and delivered in one scenario, and which promises the cluster broke.

chatd.load.proof is the oracle, here as in `python -m chatd.load`: its checks of every delivery and every ack are those
of one server, because a cluster promises the same.  The oracle raises at the first violation, and a ledger counts them
all.  It therefore passes entries to the oracle one by one, and after a violation moves the reader to where the server
believes it to be, so that one fault counts once.

At the end the ledger compares what the clients received with the log that Redis and each node return.  It does not call
`Proof.conclude`, which stops at the first loss, nor `Proof.forget`: the comparison needs all entries.
"""

import collections
import datetime as dt
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Final

from chatd.client.protocol import History, Posted
from chatd.load.figures import Latencies
from chatd.load.proof import Kind, Proof, Reader, Violation
from chatd.messages import Entry

TEXT_SIZE: Final = 100
"""Characters in each message."""
REMEMBERED: Final = 4096
"""Frames and timestamps that are parsed once for all clients."""
QUOTED: Final = 10
"""Faults that the report describes; all others are only counted."""


class Ledger:
    """The posts, acks and deliveries of one scenario, with the number of faults of each kind."""

    KINDS: Final = ("lost", "duplicate", "disorder", "undelivered", "unanswered", "broken")
    """The kinds of chatd.load.proof, messages that a client never received, and posts without an ack."""

    def __init__(self, run: str, clients: int) -> None:
        self.proof = Proof(run, clients, clients, size=TEXT_SIZE)
        self.faults: collections.Counter[str] = collections.Counter(dict.fromkeys(self.KINDS, 0))
        self.first_faults: list[str] = []
        """Descriptions of the first faults."""
        self.acked = 0
        self.late = Latencies()

    @property
    def posted(self) -> int:
        """The number of posts."""
        return sum(self.proof.posted)

    @property
    def delivered(self) -> int:
        """The number of deliveries to all clients."""
        return self.proof.delivered

    @property
    def epoch(self) -> str:
        """The epoch of the newest log."""
        return self.proof.log.epoch

    @property
    def head(self) -> int:
        """The highest number that a client received or an ack names."""
        return self.proof.log.head

    def fault(self, kind: str, text: str, count: int = 1) -> None:
        """Count a fault, and keep its description if it is among the first."""
        self.faults[kind] += count
        if len(self.first_faults) < QUOTED:
            self.first_faults.append(f"{kind}: {text}")

    def _check(self, rule: Callable[..., None], *what: object) -> bool:
        """Apply a rule of the proof, and return whether it holds."""
        try:
            rule(*what)
        except Violation as violation:
            self.fault(violation.kind, str(violation))
            return False
        return True

    def check_history(self, reader: Reader, history: History) -> None:
        """Check a history that replaces everything a client had."""
        if not self._check(self.proof.check_history, reader, history):
            reader.cursor = history.end.number

    def check_entries(self, reader: Reader, epoch: str, entries: Sequence[Entry], now: float) -> None:
        """Check the next entries of a client, which received them at the time `now` in seconds since 1970."""
        if reader.log is None or reader.log.epoch != epoch:
            self.fault("disorder", f"client {reader.number} received messages of {epoch}, which is not its log")
            return
        for entry in entries:
            if self._is_next(reader, entry):
                self.late.add(now - _seconds(entry.timestamp))

    def _is_next(self, reader: Reader, entry: Entry) -> bool:
        """Check an entry, and return whether it moved its client forward.

        A client that receives an old entry stays where it is.  A client that receives an entry beyond a gap continues
        behind the gap.
        """
        before = reader.cursor
        if not self._check(self.proof.check_entries, reader, (entry,)):
            if entry.number > before + 1:
                reader.cursor = entry.number - 1
                self._check(self.proof.check_entries, reader, (entry,))
            reader.cursor = max(before, entry.number)
        return reader.cursor > before

    def check_ack(self, reader: Reader, place: int, posted: Posted) -> None:
        """Check and count an ack.

        An ack that names the second copy of a post is no loss: the copy has been counted as a duplicate.
        """
        self.acked += 1
        known = self.proof.log.known.get(posted.id.number)
        try:
            self.proof.check_ack(reader, place, posted)
        except Violation as violation:
            if (
                violation.kind is not Kind.LOST
                or not known
                or known[0].message != self.proof.text(reader.number, place)
            ):
                self.fault(violation.kind, str(violation))

    def conclude(self, logs: dict[str, list[Entry]]) -> None:
        """Compare everything the clients received with the log, as each place returned it."""
        (place, log), *others = logs.items()
        for other, entries in others:
            if entries != log:
                count = sum(one != another for one, another in itertools.zip_longest(log, entries))
                self.fault("disorder", f"{other} and {place} differ in {count} messages", count)
        if [entry.number for entry in log] != [*range(1, len(log) + 1)]:
            self.fault("disorder", "the numbers of the log are not 1, 2, 3 ...")
        self._compare({entry.number: entry for entry in log})
        for text in self.proof.missing_from(log):
            self.fault("lost", f"{text.rstrip('.')!r} was acknowledged")
        if self.proof.logs_lost:
            self.fault("broken", f"the log {self.epoch} replaced another", self.proof.logs_lost)
        if self.posted > self.acked:
            self.fault("unanswered", "posts have no ack", self.posted - self.acked)
        for one in self.proof.readers:
            if one.cursor < len(log):
                self.fault("undelivered", f"client {one.number} has nothing after {one.cursor}", len(log) - one.cursor)

    def _compare(self, stored: dict[int, Entry]) -> None:
        """Compare what the clients received with the entries of the log by number."""
        for number, (entry, reader) in self.proof.log.known.items():
            if stored.get(number) != entry:
                self.fault(
                    "disorder", f"client {reader} received {_quoted(entry)}, the log has {_quoted(stored.get(number))}"
                )


@functools.lru_cache(REMEMBERED)
def _seconds(timestamp: str) -> float:
    """Return a timestamp in seconds since 1970."""
    return dt.datetime.fromisoformat(timestamp).timestamp()


def _quoted(entry: Entry | None) -> str:
    """Return an entry in a few words."""
    return f"{entry.message.rstrip('.')!r} as {entry.number}, of {entry.timestamp}" if entry else "nothing"
