"""Sending the clients elsewhere so that nobody notices: in turn, within a budget, with all that they said kept.

A load balancer goes on sending clients for a while after it was told not to, so handshakes are still
accepted during the *grace*.  Then the ports close, and the clients are told to come back (1012, *service restart*) at
an even pace, each after a moment of its own, so that they arrive elsewhere as a stream and not as a herd.  Before a
client is told, no more is read from it, what it said is in the log or refused, and it has been answered.

Whoever is in a hurry skips the pace: then all are told at once, with longer moments.  What a log does not keep in
time is refused, and last go those who came by plain HTTP, with their answers.
"""

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from chatd.transport.connections import CLOSE_SECONDS, Connection, Connections

GRACE_SECONDS: Final = 20
"""How long handshakes are accepted at most; a quarter of the budget if that is less."""
ANSWER_SECONDS: Final = CLOSE_SECONDS + 2
"""How long before the end the last is told: it has time to answer, or is dropped; a quarter if that is less."""
LATE_SECONDS: Final = CLOSE_SECONDS + 1
"""How long before the end nothing is waited for but the answers to the closes; an eighth if that is less."""
FULL_SECONDS: Final = CLOSE_SECONDS
"""How long a client that is owed something may take it."""
HURRIED_SECONDS: Final = 1.0
"""How long in a hurry, and how long the log may take then."""
TICK_SECONDS: Final = 0.05
"""How often the next clients are told."""
MISSED_TICKS: Final = 4
"""How many ticks may be made up for at once."""
SPREAD_SECONDS: Final = 1.0
"""Within how long a client is told to come back."""
HURRIED_SPREAD_SECONDS: Final = 10.0
"""Within how long, when all are told at once."""


class PendingPosts(Protocol):
    """Where the clients' posts go."""

    def settled(self) -> "Deferred[None]":
        """Fires when all that was posted until now is kept or refused, and told."""

    def abandon(self) -> None:
        """Refuse what is still on its way."""


class Requests(Protocol):
    """Those who came by plain HTTP."""

    @property
    def asked(self) -> bool:
        """Whether any waits for an answer."""

    def close(self) -> "Deferred[None]":
        """Let each go when it has its answer; fires when none is left."""

    def abort(self) -> None:
        """Drop those that are left."""


class Drain:
    """One drain of all clients; `budget` is the whole time that it may take, in seconds."""

    def __init__(
        self, connections: Connections, log: PendingPosts, requests: Requests, budget: float, clock: IReactorTime
    ) -> None:
        self._clients = connections
        self._log = log
        self._requests = requests
        self._budget = budget
        self._clock = clock
        self._hurried: float | None = None
        self._end = self._limit = 0.0

    def hurry(self) -> None:
        """Tell all clients now."""
        if self._hurried is None:
            self._hurried = self._clock.seconds()

    @inlineCallbacks
    def run(
        self, close_ports: Callable[[], "Deferred[Any]"], *, expecting: bool = False
    ) -> Generator[Deferred[Any], Any, None]:
        """Send the clients away; fires when none is left, within the budget.

        The grace ends when nobody is connected, unless clients are expected.
        """
        connections, clock = self._clients, self._clock
        begin = clock.seconds()
        over = clock.callLater(self._budget, self._abort)
        self._end = begin + self._budget - min(ANSWER_SECONDS, self._budget / 4)
        self._limit = begin + self._budget - min(LATE_SECONDS, self._budget / 8)
        grace = begin + min(GRACE_SECONDS, self._budget / 4)
        while (expecting or connections.connected) and self._hurried is None and clock.seconds() < grace:
            yield deferLater(clock, TICK_SECONDS)
        yield close_ports()
        connections.stopping = True
        yield DeferredList((yield from self._in_turn([*connections.connected])))
        yield connections.empty()
        gone = self._requests.close()
        yield from self._settle(lambda: self._requests.asked)
        yield gone
        if over.active():
            over.cancel()

    def _abort(self) -> None:
        self._log.abandon()
        self._clients.abort()
        self._requests.abort()

    def _late(self) -> bool:
        """Whether nothing is waited for any more."""
        now = self._clock.seconds()
        return now >= self._limit or (self._hurried is not None and now >= self._hurried + HURRIED_SECONDS)

    def _in_turn(self, leaving: list[Connection]) -> Generator["Deferred[Any]", Any, "list[Deferred[None]]"]:
        """Release them at an even pace; answers what fires when each was told.

        At each tick it is what is left over the time that is left: whoever could not run for a while does not make
        up for it in one burst.
        """
        released: list[Deferred[None]] = []
        due = 0.0
        last = self._clock.seconds() - TICK_SECONDS
        while leaving and self._clients.connected:
            now = self._clock.seconds()
            passed, left = min(now - last, MISSED_TICKS * TICK_SECONDS), self._end - now
            last = now
            if self._hurried is None and left > 0:
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
        """Read no more from some clients, and tell them to come back when they have been answered."""
        for client in some:
            client.finish()
        yield from self._settle(lambda: bool(self._clients.connected))
        waiting = {client: client.member.head for client in some if client in self._clients.connected}
        enough = self._clock.seconds() + FULL_SECONDS
        while waiting:
            late = self._late() or self._clock.seconds() >= enough
            for client, head in [*waiting.items()]:
                if late or not client.member.has_pending(head):
                    del waiting[client]
                    self._tell(client)
            if waiting:
                yield deferLater(self._clock, TICK_SECONDS)

    def _settle(self, wanted: Callable[[], bool]) -> Generator["Deferred[Any]", Any, None]:
        """Wait until what was posted by now is kept or refused, for as long as that is wanted, and not too long."""
        settled = self._log.settled()
        while wanted() and not settled.called and not self._late():
            yield deferLater(self._clock, TICK_SECONDS)
        if not settled.called and self._late():
            self._log.abandon()

    def _tell(self, client: Connection) -> None:
        if client in self._clients.connected:
            spread = SPREAD_SECONDS if self._hurried is None else HURRIED_SPREAD_SECONDS
            client.restart(random.random() * spread)  # noqa: S311 -- no secret
            if client in self._clients.connected:
                self._clients.closings.add(client)
