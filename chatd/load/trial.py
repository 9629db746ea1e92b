"""One trial of a server: clients join a room, some of them post, all read, and each is disconnected now and then.

Meanwhile anyone may kill and restart the server.  Every message that a client receives is checked against the proof.
At the end each client asks for the newest page, which arrives after all messages.  The first fault ends the trial.
Only a lost log does not: its losses are counted at the end.

Latency counts from the time at which a post was due, whatever delayed it.
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
from typing_extensions import override

from chatd.client.client import Client, Listener, ServerAddress
from chatd.client.protocol import (
    Backoff,
    ClientStopped,
    Frame,
    History,
    Posted,
    ProtocolError,
    Rejected,
    parse_frame,
)
from chatd.load.figures import Latencies, Progress
from chatd.load.proof import Proof, Reader, Violation
from chatd.messages import Entry, Id

PROVED, REFUTED, UNTRIED, INTERRUPTED = 0, 1, 2, 130
"""The result of a trial as an exit status; an untried one could not run, for example without a server."""
TICK: Final = 0.01
"""Seconds between two steps of a trial."""
TICKS: Final = 20
"""Steps between two reports of progress."""
JOINING: Final = 100
"""Clients that join at the same time."""
REMEMBERED: Final = 1024
"""Frames that are parsed once for all clients."""
PAGE: Final = 100
"""Messages in a page that is read back."""
DEPTH: Final = 8
"""Posts of one poster in flight."""


class TrialClient(Listener):
    """One client of a trial, which checks what it receives against the proof."""

    def __init__(self, trial: "Trial", reader: Reader, chance: Random, make: Callable[..., Client]) -> None:
        self._trial = trial
        self._chance = chance
        self._due: dict[int, float] = {}  # when each post was due that was not received yet
        self._joined = False
        self.reader = reader
        self.name = trial.proof.username(reader.number)
        self.client = make(listener=self, backoff=Backoff(0.2, 2.0, chance))
        self.waiting = 0
        """The number of its posts without an ack."""
        self.paged = False
        """True when it has received the newest page, which follows all messages."""

    def __str__(self) -> str:
        return f"client {self.reader.number}"

    # Callbacks of the client

    @override
    def on_history(self, history: History) -> None:
        self._trial.check(self._trial.proof.check_history, self.reader, history)

    @override
    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        trial = self._trial
        if trial.check(trial.proof.check_entries, self.reader, entries):
            for entry in entries:
                if entry.username == self.name:
                    due = self._due.pop(trial.proof.place(entry.message), None)
                    if due is not None:  # else it was in a lost log
                        trial.echoes.add(trial.now() - due)

    @override
    def on_connect(self) -> None:
        first, self._joined = not self._joined, True
        self._trial.joined(first=first)

    @override
    def on_protocol_error(self, error: ProtocolError) -> None:
        self._trial.fail(f"{self}: {error}")

    @override
    def on_disconnect(self, reason: str, wait: float) -> None:
        self._trial.lost(reason)

    @override
    def on_reject(self, error: Rejected) -> None:
        self._trial.rejected(f"{self} is rejected: {error}")

    # Actions

    def post(self, due: float) -> None:
        """Post a message that was due at this time."""
        place, text = self._trial.proof.post(self.reader.number)
        self._due[place] = due
        self.waiting += 1
        answer = self.client.post(self.name, text, self._trial.proof.extra)
        answer.addCallbacks(self._acked, self._unanswered, callbackArgs=(place, due))

    def page(self) -> None:
        """Ask for the newest page."""
        self.client.page(limit=1).addCallbacks(self._paged, self._unanswered)

    def read_back(self, before: Id) -> "Deferred[Any]":
        """Read the entries before one, which no client has received."""
        return self.client.page(before=before, limit=PAGE).addCallbacks(self._read, self._unanswered)

    def cut_soon(self, mean: float) -> None:
        """Drop the connection repeatedly, after `mean` seconds on average."""
        self._trial.later(self._chance.expovariate(1 / mean), self._cut, mean)

    def _cut(self, mean: float) -> None:
        if self._trial.phase is Phase.POST:
            self._trial.cuts += self.client.drop_connection()
            self.cut_soon(mean)

    def _acked(self, posted: Posted, place: int, due: float) -> None:
        self.waiting -= 1
        self._trial.acked(self.reader, place, posted, due)

    def _paged(self, page: History) -> None:
        self.paged = True
        self._trial.check(self._trial.proof.check_newest_page, self.reader, page.end)

    def _read(self, page: History) -> None:
        self._trial.check(self._trial.proof.check_older_page, self.reader, page)

    def _unanswered(self, failure: Failure) -> None:
        if not failure.check(ClientStopped):
            self._trial.fail(f"{self} was refused a request: {failure.getErrorMessage()}")


class Phase(Enum):
    """The phases of a trial."""

    JOIN = "join"
    POST = "post"
    SETTLE = "settle"
    OVER = "over"


class Trial:
    """One trial; the word `run` identifies its posts.

    `done` fires with the exit status, and `fault` names the fault in one line.
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
        self.proof = Proof(run, options.clients, options.posters, lenient=options.lenient, extra=options.extra)
        self._options = options
        self._address = address
        self._progress = progress
        self._planned: int = options.messages or math.ceil(options.rate * options.seconds) or sys.maxsize
        self._joined = self._connections = self._posted = self._acked = self._retried = 0
        self._reason = "no answer"
        self._start = self._moved = self.now()
        self._seconds = self._cpu = 0.0
        # All clients receive the same bytes, so they are parsed once.
        decode: Callable[[bytes], Frame] = functools.lru_cache(REMEMBERED)(parse_frame)
        endpoint = address.endpoint(reactor)
        make = functools.partial(Client, reactor, address, endpoint=endpoint, decode=decode, window=DEPTH)
        seeds = Random(options.seed)  # noqa: S311 -- repeatable
        self._members = [
            TrialClient(self, reader, Random(seeds.random()), make)  # noqa: S311
            for reader in self.proof.readers
        ]
        self._to_start = iter(self._members)
        self._posters: Iterator[TrialClient] = cycle(self._members[: options.posters])
        self._behind: list[TrialClient] = []
        """The clients that have not received everything."""
        self._reading: Deferred[Any] | None = None
        """The request for the part of a new log that no client has received."""
        self._ticks = 0
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = reactor

    def start(self) -> None:
        """Start the clients."""
        self._ticking.start(TICK).addErrback(self.done.errback)
        for member in [*self._members[:JOINING]]:
            next(self._to_start)
            member.client.start()

    def interrupt(self) -> "Deferred[int]":
        """End the trial early, if it has not ended."""
        self._finish(INTERRUPTED, "interrupted: nothing is proved")
        return self.done

    # Reports of the clients

    def check(self, rule: Callable[..., None], *what: object) -> bool:
        """Apply a rule of the proof, and return whether it holds."""
        try:
            rule(*what)
        except Violation as fault:
            self.fail(str(fault))
            return False
        return True

    def fail(self, fault: str) -> None:
        """End the trial: the server broke a promise."""
        self._finish(REFUTED, fault)

    def joined(self, *, first: bool) -> None:
        """Count a connection, which is the first of a client or a later one."""
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
        """Record why a client was disconnected; without any connection the trial ends."""
        self._reason = reason
        if not self._connections:
            self.rejected(reason)

    def rejected(self, reason: str) -> None:
        """End the trial: the server rejects a client."""
        if self._connections:
            self.fail(reason)
        else:
            self._finish(
                UNTRIED, f"{self._address} cannot be joined: {reason}: check the URL, and that the server runs"
            )

    def acked(self, reader: Reader, place: int, posted: Posted, due: float) -> None:
        """Check and count an ack."""
        self.check(self.proof.check_ack, reader, place, posted)
        self._moved = self.now()
        self._acked += 1
        self._retried += posted.duplicate
        self.acks.add(self._moved - due)

    # Steps

    def _tick(self) -> None:
        if self.phase is Phase.POST:
            self._post()
        elif self.phase is Phase.SETTLE:
            self._settle()
        self._ticks += 1
        if self._ticks % TICKS == 0 and self.phase is not Phase.OVER:
            self.proof.forget()
            self._progress.show(*self._state())
            self._check_patience()

    def _post_from_now(self) -> None:
        self.phase = Phase.POST
        self._start = self.now()
        self._cpu = time.process_time()
        if self._options.cut:
            for member in self._members:
                member.cut_soon(self._options.cut)

    def _post(self) -> None:
        """Post what is due, unless too many posts are in flight."""
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
        """Wait until all clients have received everything, and nothing more can arrive."""
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

    def _state(self) -> tuple[float, str]:
        """Return the completed part of this phase, from 0 to 1, and a description."""
        clients, options = len(self._members), self._options
        if self.phase is Phase.JOIN:
            return self._joined / clients, f"{self._joined:,} of {clients:,} clients joined"
        if self.phase is Phase.SETTLE:
            level = clients - len(self._behind)
            return level / clients, f"{level:,} of {clients:,} clients have everything"
        planned = self._planned < sys.maxsize
        part = self._acked / self._planned if planned else (self.now() - self._start) / options.seconds
        words = f"{self._posted:,} posted, {self._acked:,} acknowledged, {self.proof.delivered:,} delivered"
        began = f", {self.proof.fresh_starts:,} started over" if self.proof.fresh_starts else ""
        return min(part, 1.0), f"{words}, {self._connections - self._joined:,} reconnections{began}"

    def _check_patience(self) -> None:
        patience = self._options.patience
        if self.now() - self._moved < patience or (self.phase is Phase.POST and self._acked == self._posted):
            return
        if self.phase is Phase.JOIN:
            joined = f"{self._joined} of {len(self._members)} clients have joined, and no more are accepted"
            self._finish(UNTRIED, f"{joined} ({self._reason}): ask for fewer --clients, or allow the server more")
        elif self.phase is Phase.POST:
            member = next(member for member in self._members if member.waiting)
            waiting = f"{self._posted - self._acked} posts, {member.waiting} of {member} among them"
            self.fail(
                f"nothing was acknowledged in {patience:g} seconds: {waiting}; the last connection: {self._reason}"
            )
        elif self._behind:
            reader, log = self._behind[-1].reader, self.proof.log
            has = f"client {reader.number} has {log.epoch}-{reader.cursor} of {log.epoch}-{log.head}"
            self.fail(f"{has}, and received no more in {patience:g} seconds")
        else:
            self.fail(f"the messages before {self.proof.unread()} were not received in {patience:g} seconds")

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
        """Return the results.

        `seconds` is the time of posting, and `cpu` is the part of it in which this program was busy.
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
