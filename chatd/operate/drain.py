"""Drain: send every client to another server, at an even pace, with all of its posts committed and answered.

A load balancer keeps sending clients for a while after a server becomes unready.  Handshakes are therefore still
accepted during the *grace*.  Then the ports close, and the drain releases the clients one by one (1012, *service
restart*).  Each gets a random time after which to reconnect, so that they arrive elsewhere as a stream and not as a
herd.  Before a client is released, the server stops reading from it, commits or rejects its posts, and sends it the
answers.

An *immediate* drain skips the pace: it releases all clients at once, with longer times to reconnect.  Posts that the
log does not commit in time are rejected.  HTTP requests are answered last.
"""

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from chatd.transport.connections import CLOSE_SECONDS, Connection, Connections

GRACE_SECONDS: Final = 20
"""The grace at most; a quarter of the budget if that is less."""
ANSWER_SECONDS: Final = CLOSE_SECONDS + 2
"""The time left for the close handshake of the last client; a quarter of the budget if that is less."""
LATE_SECONDS: Final = CLOSE_SECONDS + 1
"""The time left when only close handshakes are still waited for; an eighth of the budget if that is less."""
FULL_SECONDS: Final = CLOSE_SECONDS
"""The time that a client has to read its answers."""
IMMEDIATE_SECONDS: Final = 1.0
"""The time that clients and the log have in an immediate drain."""
ASK_SECONDS: Final = 1.0
"""The time in which clients that have connected can still ask, after the ports are closed and all others have left."""
TICK_SECONDS: Final = 0.05
"""The interval at which the next clients are released."""
MISSED_TICKS: Final = 4
"""The number of missed ticks that one tick makes up for."""
SPREAD_SECONDS: Final = 1.0
"""The longest time after which a client reconnects."""
IMMEDIATE_SPREAD_SECONDS: Final = 10.0
"""The longest time after which a client reconnects in an immediate drain."""


class PendingPosts(Protocol):
    """The posts in flight."""

    def settled(self) -> "Deferred[None]":
        """Fire when every post so far is committed or rejected, and its client has the answer."""

    def abandon(self) -> None:
        """Reject the posts in flight."""


class Requests(Protocol):
    """The connections of plain HTTP."""

    @property
    def asked(self) -> bool:
        """True if any connection waits for an answer."""

    def close(self) -> "Deferred[None]":
        """Close every connection once it has its answer; fire when all are closed."""

    def abort(self) -> None:
        """Drop the remaining connections."""


class Drain:
    """One drain of all clients, which takes at most `budget` seconds."""

    def __init__(
        self, connections: Connections, log: PendingPosts, requests: Requests, budget: float, clock: IReactorTime
    ) -> None:
        self._connections = connections
        self._log = log
        self._requests = requests
        self.budget = budget
        """The longest duration of the drain in seconds."""
        self._clock = clock
        self._immediate: float | None = None
        """The time at which the drain became immediate."""
        self._end = self._limit = 0.0

    def skip_pace(self) -> None:
        """Make the drain immediate."""
        if self._immediate is None:
            self._immediate = self._clock.seconds()

    @inlineCallbacks
    def run(
        self, close_ports: Callable[[], "Deferred[Any]"], *, expecting: bool = False
    ) -> Generator[Deferred[Any], Any, None]:
        """Release all clients; fire when all are disconnected, within the budget.

        The grace ends early when no client is connected, unless more are `expecting`.
        """
        connections, clock = self._connections, self._clock
        begin = clock.seconds()
        over = clock.callLater(self.budget, self._abort)
        self._end = begin + self.budget - min(ANSWER_SECONDS, self.budget / 4)
        self._limit = begin + self.budget - min(LATE_SECONDS, self.budget / 8)
        grace = begin + min(GRACE_SECONDS, self.budget / 4)
        while (expecting or connections.connected) and self._immediate is None and clock.seconds() < grace:
            yield deferLater(clock, TICK_SECONDS)
        yield close_ports()
        connections.stopping = True
        yield DeferredList((yield from self._in_turn([*connections.connected])))
        asks = clock.seconds() + ASK_SECONDS
        while (connections.asked or ([*connections.handshakes] and clock.seconds() < asks)) and not self._late():
            yield deferLater(clock, TICK_SECONDS)
        yield connections.empty()
        closed = self._requests.close()
        yield from self._settle(lambda: self._requests.asked)
        yield closed
        if over.active():
            over.cancel()

    def _abort(self) -> None:
        self._log.abandon()
        self._connections.abort()
        self._requests.abort()

    def _late(self) -> bool:
        """Return whether it is too late to wait for anything but close handshakes."""
        now = self._clock.seconds()
        return now >= self._limit or (self._immediate is not None and now >= self._immediate + IMMEDIATE_SECONDS)

    def _in_turn(self, leaving: list[Connection]) -> Generator["Deferred[Any]", Any, "list[Deferred[None]]"]:
        """Release clients at an even pace; return Deferreds that fire when they are released.

        Each tick releases its share of the remaining clients: remaining clients ÷ remaining time.  After a stall, the
        pace rises evenly and there is no burst.
        """
        released: list[Deferred[None]] = []
        due = 0.0
        last = self._clock.seconds() - TICK_SECONDS
        while leaving and self._connections.connected:
            now = self._clock.seconds()
            passed, left = min(now - last, MISSED_TICKS * TICK_SECONDS), self._end - now
            last = now
            if self._immediate is None and left > 0:
                due += (len(leaving) - due) * passed / (left + passed)
            else:
                due = len(leaving)
            if due >= 1:
                count = int(due)
                released.append(self._release(leaving[:count]))
                del leaving[:count]
                due -= count
            if leaving:
                yield deferLater(self._clock, TICK_SECONDS)
        return released

    @inlineCallbacks
    def _release(self, some: Sequence[Connection]) -> Generator["Deferred[Any]", Any, None]:
        """Stop reading from some clients, and release each when it has its answers."""
        for client in some:
            client.finish()
        yield from self._settle(lambda: bool(self._connections.connected))
        # The entry that each client must have got; None while the log has yet to answer frames that were held.
        waiting: dict[Connection, int | None] = dict.fromkeys(some)
        enough = self._clock.seconds() + FULL_SECONDS
        while waiting:
            if self._late() and any(client.member.awaits_log for client in waiting):
                self._log.abandon()
            late = self._late() or self._clock.seconds() >= enough
            for client, head in [*waiting.items()]:
                if not late and client.member.awaits_log:
                    waiting[client] = None
                    continue
                if head is None:
                    head = waiting[client] = client.member.head  # noqa: PLW2901 -- it is now known
                if late or not client.member.has_pending(head):
                    del waiting[client]
                    self._restart(client)
            if waiting:
                yield deferLater(self._clock, TICK_SECONDS)

    def _settle(self, wanted: Callable[[], bool]) -> Generator["Deferred[Any]", Any, None]:
        """Wait until every post so far is committed or rejected, while that is `wanted` and not late."""
        settled = self._log.settled()
        while wanted() and not settled.called and not self._late():
            yield deferLater(self._clock, TICK_SECONDS)
        if not settled.called and self._late():
            self._log.abandon()

    def _restart(self, client: Connection) -> None:
        if client in self._connections.connected:
            spread = SPREAD_SECONDS if self._immediate is None else IMMEDIATE_SPREAD_SECONDS
            client.restart(random.random() * spread)  # noqa: S311 -- no secret
            if client in self._connections.connected:
                self._connections.closings.add(client)
