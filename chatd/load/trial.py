"""One trial of a server: clients join a room, some of them post, all read, and each is cut off now and then.

Meanwhile anyone may kill the server and start it again.  Every message that any client is given is held to the
proof, and at the end each client asks for the newest page: its answer comes behind all that was to come.  The first
fault ends the trial, but for a log that is lost: what was lost with it is counted in the end.

A post's latency is counted from when it was due, whatever held it up.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import cycle
from random import Random
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure

from chatd.client import protocol as exchange
from chatd.client.client import Client, Listener, ServerAddress
from chatd.client.protocol import Backoff, Fault, Frame, History, Posted, Rejected, Stopped
from chatd.load.figures import Latencies, Progress
from chatd.load.proof import Proof, Reader
from chatd.messages import Entry, Id

PROVED, REFUTED, UNTRIED, INTERRUPTED = 0, 1, 2, 130
"""What comes of it, as an exit status; untried is what could not be, for want of a server say."""
TICK: Final = 0.01
"""Seconds between looks at what is to be done."""
TICKS: Final = 20
"""Looks, between two at how far it is."""
JOINING: Final = 100
"""Clients that join at a time."""
REMEMBERED: Final = 1024
"""Frames that are read once for all clients."""
PAGE: Final = 100
"""Messages that are read back at a time."""
DEPTH: Final = 8
"""Posts of one poster that wait for their acknowledgements."""


class TrialClient(Listener):
    """One of the clients: what comes is held to the proof."""

    def __init__(self, trial: "Trial", reader: Reader, chance: Random, make: Callable[..., Client]) -> None:
        self._trial = trial
        self._chance = chance
        self._due: dict[int, float] = {}  # when its posts were due that have not come back
        self._joined = False
        self.reader = reader
        self.name = trial.proof.username(reader.number)
        self.client = make(listener=self, backoff=Backoff(0.2, 2.0, chance))
        self.waiting = 0
        """How many of its posts wait to be acknowledged."""
        self.paged = False
        """Whether it has been given the newest page, behind which nothing is to come."""

    def __str__(self) -> str:
        return f"client {self.reader.number}"

    # What it is told

    def begun(self, history: History) -> None:
        """Listener.begun."""
        self._trial.check(self._trial.proof.begun, self.reader, history)

    def appended(self, epoch: str, entries: Sequence[Entry]) -> None:
        """Listener.appended."""
        trial = self._trial
        if trial.check(trial.proof.appended, self.reader, entries):
            for entry in entries:
                if entry.username == self.name:
                    due = self._due.pop(trial.proof.place(entry.message), None)
                    if due is not None:  # else it was in a log that is gone
                        trial.echoes.add(trial.now() - due)

    def joined(self) -> None:
        """Listener.joined."""
        first, self._joined = not self._joined, True
        self._trial.joined(first=first)

    def faulted(self, fault: Fault) -> None:
        """Listener.faulted."""
        self._trial.fail(f"{self}: {fault}")

    def lost(self, reason: str, wait: float) -> None:
        """Listener.lost."""
        self._trial.lost(reason)

    def refused(self, reason: Rejected) -> None:
        """Listener.refused."""
        self._trial.turned_away(f"{self} is turned away: {reason}")

    # What it does

    def post(self, due: float) -> None:
        """Post now what was due by then."""
        place, text = self._trial.proof.post(self.reader.number)
        self._due[place] = due
        self.waiting += 1
        answer = self.client.post(self.name, text)
        answer.addCallbacks(self._acked, self._unanswered, callbackArgs=(place, due))

    def page(self) -> None:
        """Ask for the newest page."""
        self.client.page(limit=1).addCallbacks(self._paged, self._unanswered)

    def read_back(self, before: Id) -> "Deferred[Any]":
        """Read what is before a message, which nobody was given."""
        return self.client.page(before=before, limit=PAGE).addCallbacks(self._read, self._unanswered)

    def cut_soon(self, mean: float) -> None:
        """Lose the connection, in so many seconds in the mean, and again and again."""
        self._trial.later(self._chance.expovariate(1 / mean), self._cut, mean)

    def _cut(self, mean: float) -> None:
        if self._trial.phase is Phase.POST:
            self._trial.cuts += self.client.cut()
            self.cut_soon(mean)

    def _acked(self, posted: Posted, place: int, due: float) -> None:
        self.waiting -= 1
        self._trial.acked(self.reader, place, posted, due)

    def _paged(self, page: History) -> None:
        self.paged = True
        self._trial.check(self._trial.proof.paged, self.reader, page.end)

    def _read(self, page: History) -> None:
        self._trial.check(self._trial.proof.recalled, self.reader, page)

    def _unanswered(self, failure: Failure) -> None:
        if not failure.check(Stopped):
            self._trial.fail(f"{self} was refused what it said: {failure.getErrorMessage()}")


class Phase(Enum):
    """How far a trial is; the values are what one reads meanwhile."""

    JOIN = "join"
    POST = "post"
    SETTLE = "wait for all to have everything"
    OVER = "over"


class Trial:
    """One trial; `run` is a word that stands for it.

    `done` fires with what came of it, and `fault` says in one line what was wrong.
    """

    def __init__(
        self, options: argparse.Namespace, address: ServerAddress, run: str, reactor: Any, progress: Progress
    ) -> None:
        self.now: Callable[[], float] = reactor.seconds
        self.later: Callable[..., IDelayedCall] = reactor.callLater
        self.done: Deferred[int] = Deferred()
        self.phase = Phase.JOIN
        self.fault: str | None = None
        self.cuts = 0
        self.acks, self.echoes = Latencies(), Latencies()
        self.proof = Proof(run, options.clients, options.posters, lenient=options.lenient)
        self._options = options
        self._address = address
        self._progress = progress
        self._planned: int = options.messages or math.ceil(options.rate * options.seconds) or sys.maxsize
        self._joined = self._connections = self._posted = self._acked = self._retried = 0
        self._reason = "no answer"
        self._start = self._moved = self.now()
        self._seconds = self._cpu = 0.0
        # The same bytes come to everyone: they are read once.
        decode: Callable[[bytes], Frame] = functools.lru_cache(REMEMBERED)(exchange.read)
        endpoint = address.endpoint(reactor)
        make = functools.partial(Client, reactor, address, endpoint=endpoint, decode=decode, window=DEPTH)
        seeds = Random(options.seed)  # noqa: S311 -- it is to be repeated
        self._members = [
            TrialClient(self, reader, Random(seeds.random()), make)  # noqa: S311
            for reader in self.proof.readers
        ]
        self._to_start = iter(self._members)
        self._posters: Iterator[TrialClient] = cycle(self._members[: options.posters])
        self._behind: list[TrialClient] = []
        """Who has not been given everything."""
        self._reading: Deferred[Any] | None = None
        """What was there before anyone was given anything, of a log that took another's place."""
        self._ticks = 0
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = reactor

    def start(self) -> None:
        """Let the clients join."""
        self._ticking.start(TICK).addErrback(self.done.errback)
        for member in [*self._members[:JOINING]]:
            next(self._to_start)
            member.client.start()

    def interrupt(self) -> "Deferred[int]":
        """End it before its time, if it has not ended."""
        self._finish(INTERRUPTED, "interrupted: nothing is proved")
        return self.done

    # What the members say

    def check(self, rule: Callable[..., None], *what: object) -> bool:
        """Hold something to the proof; answers whether it stands."""
        try:
            rule(*what)
        except Fault as fault:
            self.fail(str(fault))
            return False
        return True

    def fail(self, fault: str) -> None:
        """The server has not kept its promise."""
        self._finish(REFUTED, fault)

    def joined(self, *, first: bool) -> None:
        """A client has come, or come back."""
        self._connections += 1
        if first:
            self._joined += 1
            self._moved = self.now()
            member = next(self._to_start, None)
            if member is not None:
                member.client.start()
            if self._joined == len(self._members):
                self._post_from_now()

    def lost(self, reason: str) -> None:
        """A client has no connection."""
        self._reason = reason
        if not self._connections:
            self.turned_away(reason)

    def turned_away(self, reason: str) -> None:
        """A client will have none."""
        if self._connections:
            self.fail(reason)
        else:
            self._finish(UNTRIED, f"{self._address} cannot be joined: {reason}: is the URL right, and the server up?")

    def acked(self, reader: Reader, place: int, posted: Posted, due: float) -> None:
        """A post was acknowledged."""
        self.check(self.proof.acked, reader, place, posted)
        self._moved = self.now()
        self._acked += 1
        self._retried += posted.duplicate
        self.acks.add(self._moved - due)

    # What is done now and then

    def _tick(self) -> None:
        if self.phase is Phase.POST:
            self._post()
        elif self.phase is Phase.SETTLE:
            self._settle()
        self._ticks += 1
        if self._ticks % TICKS == 0 and self.phase is not Phase.OVER:
            self.proof.forget()
            self._progress.show(*self._far())
            self._lose_patience()

    def _post_from_now(self) -> None:
        self.phase = Phase.POST
        self._start = self.now()
        self._cpu = time.process_time()
        if self._options.cut:
            for member in self._members:
                member.cut_soon(self._options.cut)

    def _post(self) -> None:
        """Post what is due, as far as the posters have not too much under way."""
        now, rate = self.now(), self._options.rate
        elapsed = now - self._start
        if not rate and not self._options.messages and elapsed >= self._options.seconds:
            self._planned = self._posted
        due = min(self._planned, math.ceil(elapsed * rate)) if rate else self._planned
        full = 0
        while self._posted < due and full < self._options.posters:
            member = next(self._posters)
            if member.waiting >= DEPTH:
                full += 1
                continue
            full = 0
            if self._acked == self._posted:
                self._moved = now
            member.post(self._start + self._posted / rate if rate else now)
            self._posted += 1
        if self._posted == self._planned == self._acked:
            self.phase = Phase.SETTLE
            self._measure()
            self._behind = [*self._members]
            for member in self._members:
                member.page()

    def _measure(self) -> None:
        self._seconds = self.now() - self._start
        self._cpu = time.process_time() - self._cpu

    def _settle(self) -> None:
        """Wait until all have been given everything, and nothing more can come."""
        before = len(self._behind)
        while self._behind and self._behind[-1].paged and self.proof.is_level(self._behind[-1].reader):
            self._behind.pop()
        if len(self._behind) < before:
            self._moved = self.now()
        if self._behind:
            return
        self._behind = [member for member in self._members if not self.proof.is_level(member.reader)]
        unread = self.proof.unread()
        if self._behind or (self._reading is not None and not self._reading.called):
            return
        if unread is not None:
            self._moved = self.now()
            self._reading = self._members[0].read_back(unread)
        elif self.check(self.proof.conclude):
            self._finish(PROVED, None)

    def _far(self) -> tuple[float, str]:
        """How far it is, in this phase."""
        clients, options = len(self._members), self._options
        if self.phase is Phase.JOIN:
            return self._joined / clients, f"{self._joined:,} of {clients:,} clients joined"
        if self.phase is Phase.SETTLE:
            level = clients - len(self._behind)
            return level / clients, f"{level:,} of {clients:,} clients have everything"
        planned = self._planned < sys.maxsize
        part = self._acked / self._planned if planned else (self.now() - self._start) / options.seconds
        words = f"{self._posted:,} posted, {self._acked:,} acknowledged, {self.proof.delivered:,} delivered"
        began = f", {self.proof.fresh_starts:,} began anew" if self.proof.fresh_starts else ""
        return min(part, 1.0), f"{words}, {self._connections - self._joined:,} came back{began}"

    def _lose_patience(self) -> None:
        patience = self._options.patience
        if self.now() - self._moved < patience or (self.phase is Phase.POST and self._acked == self._posted):
            return
        if self.phase is Phase.JOIN:
            joined = f"{self._joined} of {len(self._members)} clients have joined, and no more can"
            self._finish(UNTRIED, f"{joined} ({self._reason}): ask for fewer --clients, or allow the server more")
        elif self.phase is Phase.POST:
            member = next(member for member in self._members if member.waiting)
            waiting = f"{self._posted - self._acked} posts, {member.waiting} of {member} among them"
            self.fail(
                f"nothing was acknowledged in {patience:g} seconds: {waiting}; the last connection: {self._reason}"
            )
        else:
            reader, log = self._behind[-1].reader, self.proof.log
            has = f"client {reader.number} has {log.epoch}-{reader.cursor} of {log.epoch}-{log.head}"
            self.fail(f"{has}, and was given no more in {patience:g} seconds")

    def _finish(self, status: int, fault: str | None) -> None:
        if self.phase is Phase.OVER:
            return
        if self.phase is Phase.POST:
            self._measure()
        self.phase = Phase.OVER
        self.fault = fault
        if self._ticking.running:
            self._ticking.stop()
        self._progress.clear()
        stopped = DeferredList([member.client.stop() for member in self._members])
        stopped.addCallback(lambda _: self.done.callback(status))

    def report(self) -> dict[str, Any]:
        """What was done, and found, in figures.

        `seconds` are those of the posting, and `cpu` is the share of them that this program was busy.
        """
        seconds = self._seconds
        return {
            "proved": self.phase is Phase.OVER and self.fault is None,
            "fault": self.fault,
            "url": str(self._address),
            "clients": self._joined,
            "posters": self._options.posters,
            "seconds": round(seconds, 3),
            "posted": self._posted,
            "acknowledged": self._acked,
            "acknowledged_again": self._retried,
            "delivered": self.proof.delivered,
            "deliveries_per_second": round(self.proof.delivered / seconds) if seconds else None,
            "of_others": self.proof.others,
            "cut": self.cuts,
            "came_back": self._connections - self._joined,
            "fresh_starts": self.proof.fresh_starts,
            "logs_lost": self.proof.logs_lost,
            "lost": self.proof.lost,
            "cpu": round(self._cpu / seconds, 3) if seconds else None,
            "latency_ms": {"ack": self.acks.figures(), "message": self.echoes.figures()},
        }
