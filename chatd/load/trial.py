"""One trial of a server: clients join a room, some of them post, all read, and each is disconnected now and then.

Meanwhile anyone may kill and restart the server.  Every message that a client receives is checked against the proof.
At the end each client asks for the newest page, which arrives after all messages.  The first fault ends the trial.
Only a lost log does not: its losses are counted at the end.

With `--rooms N` each client is in N rooms over one connection.  Each room has a proof of its own, and a client is one
reader of each.

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
from typing import Any, Final, cast

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.client import Client, Connector, RoomClient
from chatd.client.core import Listener
from chatd.client.protocol import (
    Backoff,
    ClientStopped,
    Frame,
    History,
    Posted,
    ProtocolError,
    Rejected,
    parse_addressed_frame,
    parse_frame,
)
from chatd.client.shared import SharedClient
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
    """One client in one room of a trial, which checks what it receives against the proof of the room.

    `client` is the room as the client library has it, from the call of `join` on.
    """

    client: RoomClient

    def __init__(self, trial: "Trial", proof: Proof, reader: Reader, room: str | None) -> None:
        self._trial = trial
        self._due: dict[int, float] = {}  # when each post was due that was not received yet
        self._joined = False
        self._room = room
        self.proof = proof
        self.reader = reader
        self.name = proof.username(reader.number)
        self.waiting = 0
        """The number of its posts without an ack."""
        self.paged = False
        """True when it has received the newest page, which follows all messages."""

    def __str__(self) -> str:
        return f"client {self.reader.number}{self.where}"

    @property
    def where(self) -> str:
        """The room, for the text of a fault; empty if there is only one."""
        return "" if self._room is None else f" in {self._room}"

    # Callbacks of the client

    @override
    def on_history(self, history: History) -> None:
        self._check(self.proof.check_history, self.reader, history)

    @override
    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        trial = self._trial
        if self._check(self.proof.check_entries, self.reader, entries):
            for entry in entries:
                if entry.username == self.name:
                    due = self._due.pop(self.proof.place(entry.message), None)
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

    def _check(self, rule: Callable[..., None], *what: object) -> bool:
        return self._trial.check(rule, *what, where=self.where)

    # Actions

    def post(self, due: float) -> None:
        """Post a message that was due at this time."""
        place, text = self.proof.post(self.reader.number)
        self._due[place] = due
        self.waiting += 1
        answer = self.client.post(self.name, text, self.proof.extra)
        answer.addCallbacks(self._acked, self._unanswered, callbackArgs=(place, due))

    def page(self) -> None:
        """Ask for the newest page."""
        self.client.page(limit=1).addCallbacks(self._paged, self._unanswered)

    def read_back(self, before: Id) -> "Deferred[Any]":
        """Read the entries before one, which no client has received."""
        return self.client.page(before=before, limit=PAGE).addCallbacks(self._read, self._unanswered)

    def _acked(self, posted: Posted, place: int, due: float) -> None:
        self.waiting -= 1
        self._check(self.proof.check_ack, self.reader, place, posted)
        self._trial.acked(posted, due)

    def _paged(self, page: History) -> None:
        self.paged = True
        self._check(self.proof.check_newest_page, self.reader, page.end)

    def _read(self, page: History) -> None:
        self._check(self.proof.check_older_page, self.reader, page)

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

    With `options.rooms` the rooms are `NAME-0`, `NAME-1` and so on, where `options.room` is the NAME.

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
        self._options = options
        self._address = address
        self._progress = progress
        self._planned: int = options.messages or math.ceil(options.rate * options.seconds) or sys.maxsize
        self._joined = self._connections = self._posted = self._acked = self._retried = 0
        self._reason = "no answer"
        self._start = self._moved = self.now()
        self._seconds = self._cpu = 0.0
        names = [f"{options.room or f'load-{run}'}-{number}" for number in range(options.rooms)]
        runs = [f"{run}-{number}" for number in range(options.rooms)] or [run]
        self._proofs = [
            Proof(one, options.clients, options.posters, lenient=options.lenient, extra=options.extra) for one in runs
        ]
        self._members: list[TrialClient] = []
        """One for each client and room, client by client."""
        self._clients: list[tuple[Connector, Random]] = []
        """The connections, each with its source of randomness."""
        seeds = Random(options.seed)  # noqa: S311 -- repeatable
        chances = [Random(seeds.random()) for _ in range(options.clients)]  # noqa: S311
        if names:
            self._share(names, chances, reactor)
        else:
            self._join(chances, reactor)
        self._to_start = iter(self._clients)
        posting = self._members[: options.posters * len(self._proofs)]
        self._posters: Iterator[TrialClient] = cycle(posting)
        self._posting = len(posting)
        self._behind: list[TrialClient] = []
        """The clients that have not received everything."""
        self._reading: Deferred[Any] | None = None
        """The request for the part of a new log that no client has received."""
        self._ticks = 0
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = reactor

    # All clients receive the same bytes, so they are parsed once.

    def _join(self, chances: Sequence[Random], reactor: Any) -> None:
        """Make clients of the one room."""
        decode: Callable[[bytes], Frame] = functools.lru_cache(REMEMBERED)(parse_frame)
        endpoint, (proof,) = self._address.endpoint(reactor), self._proofs
        for reader, chance in zip(proof.readers, chances, strict=True):
            member = TrialClient(self, proof, reader, None)
            backoff = Backoff(0.2, 2.0, chance)
            client = Client(
                *(reactor, self._address, member),
                backoff=backoff,
                endpoint=endpoint,
                decode=decode,
                window=DEPTH,
            )
            member.client = client
            self._members.append(member)
            self._clients.append((client, chance))

    def _share(self, names: Sequence[str], chances: Sequence[Random], reactor: Any) -> None:
        """Make clients of all rooms, over one connection each."""
        decode = functools.lru_cache(REMEMBERED)(parse_addressed_frame)
        endpoint = self._address.endpoint(reactor)
        for number, chance in enumerate(chances):
            backoff = Backoff(0.2, 2.0, chance)
            client = SharedClient(reactor, self._address, backoff=backoff, endpoint=endpoint, decode=decode)
            for name, proof in zip(names, self._proofs, strict=True):
                member = TrialClient(self, proof, proof.readers[number], name)
                member.client = client.join(name, member, window=DEPTH)
                self._members.append(member)
            self._clients.append((client, chance))

    def start(self) -> None:
        """Start the clients."""
        self._ticking.start(TICK).addErrback(self.done.errback)
        for _ in range(JOINING):
            self._start_next()

    def _start_next(self) -> None:
        following = next(self._to_start, None)
        if following is not None:
            following[0].start()

    def interrupt(self) -> "Deferred[int]":
        """End the trial early, if it has not ended."""
        self._finish(INTERRUPTED, "interrupted: nothing is proved")
        return self.done

    # Reports of the clients

    def check(self, rule: Callable[..., None], *what: object, where: str = "") -> bool:
        """Apply a rule of a proof, and return whether it holds; `where` names its room."""
        try:
            rule(*what)
        except Violation as fault:
            self.fail(f"{fault}{where}")
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
            self._start_next()
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

    def acked(self, posted: Posted, due: float) -> None:
        """Count an ack."""
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
            for proof in self._proofs:
                proof.forget()
            self._progress.show(*self._state())
            self._check_patience()

    def _post_from_now(self) -> None:
        self.phase = Phase.POST
        self._start = self.now()
        self._cpu = time.process_time()
        if self._options.cut:
            for client, chance in self._clients:
                self._cut_soon(client, chance)

    def _cut_soon(self, client: Connector, chance: Random) -> None:
        """Drop a connection repeatedly, after `--cut` seconds on average."""
        self.later(chance.expovariate(1 / self._options.cut), self._cut, client, chance)

    def _cut(self, client: Connector, chance: Random) -> None:
        if self.phase is Phase.POST:
            self.cuts += client.drop_connection()
            self._cut_soon(client, chance)

    def _post(self) -> None:
        """Post what is due, unless too many posts are in flight."""
        now, rate = self.now(), self._options.rate
        elapsed = now - self._start
        if not rate and not self._options.messages and elapsed >= self._options.seconds:
            self._planned = self._posted
        due = min(self._planned, math.ceil(elapsed * rate)) if rate else self._planned
        full = 0
        while self._posted < due and full < self._posting:
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
        while self._behind and self._behind[-1].paged and self._is_level(self._behind[-1]):
            self._behind.pop()
        if len(self._behind) < before:
            self._moved = self.now()
        if self._behind:
            return
        self._behind = [member for member in self._members if not self._is_level(member)]
        if self._behind or (self._reading is not None and not self._reading.called):
            return
        found = self._unread()
        if found is not None:
            self._moved = self.now()
            member, unread = found
            self._reading = member.read_back(unread)
        elif all(self.check(proof.conclude) for proof in self._proofs):
            self._finish(PROVED, None)

    @staticmethod
    def _is_level(member: TrialClient) -> bool:
        return member.proof.is_level(member.reader)

    def _unread(self) -> tuple[TrialClient, Id] | None:
        """Return a client in a room whose new log must be read back, and the id before which to read."""
        for member in self._members[: len(self._proofs)]:
            unread = member.proof.unread()
            if unread is not None:
                return member, unread
        return None

    def _sum(self, measure: Callable[[Proof], int]) -> int:
        return sum(map(measure, self._proofs))

    def _state(self) -> tuple[float, str]:
        """Return the completed part of this phase, from 0 to 1, and a description."""
        members, options = len(self._members), self._options
        clients = "readers" if options.rooms else "clients"
        if self.phase is Phase.JOIN:
            return self._joined / members, f"{self._joined:,} of {members:,} {clients} joined"
        if self.phase is Phase.SETTLE:
            level = members - len(self._behind)
            return level / members, f"{level:,} of {members:,} {clients} have everything"
        planned = self._planned < sys.maxsize
        part = self._acked / self._planned if planned else (self.now() - self._start) / options.seconds
        delivered, starts = self._sum(lambda proof: proof.delivered), self._sum(lambda proof: proof.fresh_starts)
        words = f"{self._posted:,} posted, {self._acked:,} acknowledged, {delivered:,} delivered"
        began = f", {starts:,} started over" if starts else ""
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
            member = self._behind[-1]
            reader, log = member.reader, member.proof.log
            has = f"{member} has {log.epoch}-{reader.cursor} of {log.epoch}-{log.head}"
            self.fail(f"{has}, and received no more in {patience:g} seconds")
        else:
            member, unread = cast(tuple[TrialClient, Id], self._unread())
            self.fail(f"the messages before {unread}{member.where} were not received in {patience:g} seconds")

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
        stopped = DeferredList([client.stop() for client, _ in self._clients])
        stopped.addCallback(lambda _: self.done.callback(status))

    def report(self) -> dict[str, Any]:
        """Return the results.

        `seconds` is the time of posting, and `cpu` is the part of it in which this program was busy.
        """
        seconds = self._seconds
        delivered, losses = self._sum(lambda proof: proof.delivered), [proof.lost for proof in self._proofs]
        return {
            "proved": self.phase is Phase.OVER and self.fault is None,
            "fault": self.fault,
            "url": str(self._address),
            "clients": self._joined // len(self._proofs),
            "rooms": len(self._proofs),
            "posters": self._options.posters,
            "seconds": round(seconds, 3),
            "posted": self._posted,
            "acknowledged": self._acked,
            "acknowledged_again": self._retried,
            "delivered": delivered,
            "deliveries_per_second": round(delivered / seconds) if seconds else None,
            "of_others": self._sum(lambda proof: proof.others),
            "cut": self.cuts,
            "came_back": self._connections - self._joined,
            "fresh_starts": self._sum(lambda proof: proof.fresh_starts),
            "logs_lost": max(proof.logs_lost for proof in self._proofs),
            "lost": None if None in losses else sum(filter(None, losses)),
            "cpu": round(self._cpu / seconds, 3) if seconds else None,
            "latency_ms": {"ack": self.acks.figures(), "message": self.echoes.figures()},
        }
