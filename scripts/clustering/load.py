"""The clients: they post at a steady rate or as fast as acks arrive, and report everything to the ledger.

The rate is an open loop: a post is due at its time, however slow the cluster is, and its latency counts from then.  A
closed loop would post less while the cluster stalls, and hide the stall.

All clients run in one process and receive the same frames, so each frame is parsed once.
"""

import collections
import functools
import itertools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.client import Client
from chatd.client.core import Listener
from chatd.client.protocol import (
    Backoff,
    ClientStopped,
    Error,
    Frame,
    History,
    Posted,
    ProtocolError,
    Rejected,
    parse_frame,
)
from chatd.load.figures import Latencies
from chatd.messages import Entry
from clustering.ledger import REMEMBERED, Ledger
from clustering.processes import LONG, TICK, sleep, until

JOINING: Final = 50
"""Clients that join at a time."""
POSTERS, DEPTH = 10, 8
"""At full speed: clients that post, and posts in flight of each."""
Row = dict[str, Any]
"""The figures of one measurement, as JSON."""


class Member(Listener):
    """One client, which keeps one place in the ledger over all its connections."""

    def __init__(self, load: "Load", number: int, make: Callable[..., Client]) -> None:
        self._load = load
        self._lost: float | None = None
        self.reader = load.ledger.proof.readers[number]
        chance = Random(number)  # noqa: S311 -- repeatable
        self.client = make(listener=self, backoff=Backoff(chance=chance))
        self.here = False
        """True while the client is connected and has joined."""

    @override
    def on_history(self, history: History) -> None:
        self._load.ledger.check_history(self.reader, history)

    @override
    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        self._load.ledger.check_entries(self.reader, epoch, entries, time.time())

    @override
    def on_connect(self) -> None:
        self.here = True
        if self._lost is None:
            self._load.count_join()
        else:
            self._load.away.add(time.monotonic() - self._lost)
            self._lost = None

    @override
    def on_disconnect(self, reason: str, wait: float) -> None:
        self._load.why = reason
        if self.here:
            self.here, self._lost = False, time.monotonic()
            self._load.losses[re.sub(r" retry_after=.*", "", reason)] += 1

    @override
    def on_protocol_error(self, error: ProtocolError) -> None:
        self._load.ledger.fault("disorder", f"client {self.reader.number}: {error}")

    @override
    def on_reject(self, error: Rejected) -> None:
        self._load.ledger.fault("broken", f"client {self.reader.number} was rejected: {error}")

    def post(self, due: float) -> "Deferred[Any]":
        """Post the next message of this client, which was due at the monotonic time `due`."""
        proof, number = self._load.ledger.proof, self.reader.number
        place, text = proof.post(number)
        answer = self.client.post(proof.username(number), text)
        return answer.addCallbacks(self._answered, self._unanswered, callbackArgs=(place, due))

    def _answered(self, posted: Posted, place: int, due: float) -> None:
        self._load.acks.add(time.monotonic() - due)
        self._load.again += posted.duplicate
        self._load.ledger.check_ack(self.reader, place, posted)

    def _unanswered(self, failure: Failure) -> None:
        if not failure.check(ClientStopped):
            self._load.ledger.fault("broken", f"a post was refused: {failure.getErrorMessage()}")


class Load:
    """All clients of a run, in turn on the given addresses."""

    def __init__(self, reactor: Any, addresses: Sequence[ServerAddress], count: int) -> None:
        self._reactor = reactor
        self.ledger = Ledger(secrets.token_hex(3), count)
        self.acks, self.away = Latencies(), Latencies()
        self.losses: collections.Counter[str] = collections.Counter()
        """The number of connections that ended, by reason."""
        self.refusals: collections.Counter[str] = collections.Counter()
        """The number of error frames, by code and message."""
        self.again = 0
        """The number of acks for a message that an earlier attempt stored."""
        self.why = ""
        self._joined = 0
        remembering = functools.lru_cache(REMEMBERED)(parse_frame)  # all clients receive the same bytes

        def decode(text: bytes) -> Frame:
            frame = remembering(text) if text.startswith(b'{"type":"message"') else parse_frame(text)
            if isinstance(frame, Error):
                self.refusals[f"{frame.code}: {frame.message}"] += 1
            return frame

        endpoints = [(address, address.endpoint(reactor)) for address in addresses]
        self.members = [
            Member(self, number, functools.partial(Client, reactor, address, endpoint=endpoint, decode=decode))
            for number, (address, endpoint) in zip(range(count), itertools.cycle(endpoints), strict=False)
        ]
        self._posters = itertools.cycle(self.members)
        self._posting = LoopingCall(self._post)
        self._rate = self._start = self._seconds = 0.0
        self._cpu, self._due = 0.0, 0

    async def join(self) -> None:
        """Connect all clients, and wait until they have joined.  Raises RigError after a timeout."""
        for some in range(0, len(self.members), JOINING):
            members = self.members[some : some + JOINING]
            for member in members:
                member.client.start()
            await until(
                self._reactor,
                lambda some=some, members=members: self._joined >= some + len(members),  # type: ignore[misc]
                lambda: f"{self._joined} of {len(self.members)} clients joined ({self.why or 'no answer'})",
            )

    def count_join(self) -> None:
        """Count a client that joined for the first time."""
        self._joined += 1

    def start(self, rate: float) -> None:
        """Begin to post at `rate` messages a second, from all clients in turn."""
        self._rate, self._start, self._due = rate, time.monotonic(), 0
        self._cpu = time.process_time()
        self._posting.start(TICK)

    def _post(self) -> None:
        elapsed = time.monotonic() - self._start
        while self._due <= elapsed * self._rate:
            due = self._start + self._due / self._rate
            self._due += 1
            next(self._posters).post(due)

    async def saturate(self, seconds: float) -> None:
        """Post as fast as acks arrive, for a number of seconds."""
        self._start, self._cpu = time.monotonic(), time.process_time()
        end = self._start + seconds

        def post_next(_: object, member: Member) -> None:
            if time.monotonic() < end:
                member.post(time.monotonic()).addCallback(post_next, member)

        for member in self.members[:POSTERS]:
            for _ in range(DEPTH):
                post_next(None, member)
        await sleep(self._reactor, seconds)

    async def settle(self) -> None:
        """Stop posting, and wait until all clients are level, or nothing has arrived for a long time."""
        if self._posting.running:
            self._posting.stop()
        self._seconds, self._cpu = time.monotonic() - self._start, time.process_time() - self._cpu
        ledger, before, moved = self.ledger, (0, 0), time.monotonic()
        while not self.level():
            state = ledger.acked, ledger.delivered
            if state != before:
                before, moved = state, time.monotonic()
            elif time.monotonic() > moved + LONG:
                break
            await sleep(self._reactor, TICK)
        await sleep(self._reactor, 0.3)  # duplicates may follow

    def level(self) -> bool:
        """Return whether all posts are acknowledged and all clients have received them."""
        ledger, proof = self.ledger, self.ledger.proof
        here = all(member.here and proof.is_level(member.reader) for member in self.members)
        return here and ledger.acked == ledger.posted

    def least(self) -> int:
        """Return the lowest cursor of all clients."""
        return min((member.reader.cursor for member in self.members), default=0)

    async def stop(self) -> None:
        """Disconnect all clients."""
        await DeferredList([member.client.stop() for member in self.members])

    def figures(self) -> Row:
        """Return the counts and the latencies; names that end in `_ms` are in milliseconds."""
        ledger, seconds = self.ledger, self._seconds
        return {
            "seconds": round(seconds, 1),
            "clients": len(self.members),
            "posted": ledger.posted,
            "acknowledged": ledger.acked,
            "acknowledged_again": self.again,
            "delivered": ledger.delivered,
            "connections_lost": dict(self.losses),
            "refusals": dict(self.refusals),
            "late_ms": ledger.late.figures(),
            "away_ms": self.away.figures(),
            "ack_ms": self.acks.figures(),
            "load_cpu": round(self._cpu / seconds, 2) if seconds else None,
            "faults": dict(ledger.faults),
            "first_faults": ledger.first_faults,
        }

    def __str__(self) -> str:
        ledger, here = self.ledger, sum(member.here for member in self.members)
        return (
            f"{ledger.posted:,} posted, {ledger.acked:,} acknowledged, {ledger.delivered:,} delivered, "
            f"{here:,} of {len(self.members):,} clients connected, {sum(ledger.faults.values()):,} faults"
        )
