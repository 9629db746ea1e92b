"""Sending the clients elsewhere so that nobody notices: in turn, within a budget, with all that they said kept.

A load balancer goes on sending clients for a while after it was told not to, so handshakes are still
accepted during the *grace*.  Then the ports close, and the clients are told to come back (1012, *service restart*) at
an even pace, each after a moment of its own, so that they arrive elsewhere as a stream and not as a herd.  Before a
client is told, no more is read from it, what it said is in the log or refused, and it has been answered.

Whoever is in a hurry skips the pace: then all are told at once, with longer moments.
"""

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from chatd.clients import CLOSE_SECONDS, Client, Clients

GRACE_SECONDS: Final = 20
"""How long handshakes are accepted at most; a quarter of the budget if that is less."""
ANSWER_SECONDS: Final = CLOSE_SECONDS + 2
"""How long before the end the last is told: it has time to answer, or is dropped; a quarter if that is less."""
TICK_SECONDS: Final = 0.05
"""How often the next clients are told."""
SPREAD_SECONDS: Final = 1.0
"""Within how long a client is told to come back."""
HURRIED_SPREAD_SECONDS: Final = 10.0
"""Within how long, when all are told at once."""


class Drain:
    """One drain of all clients.

    `settled` answers a Deferred that fires when all that was posted by then is in the log, or refused; `budget` is
    the whole time that it may take, in seconds.
    """

    def __init__(
        self, clients: Clients, settled: Callable[[], "Deferred[None]"], budget: float, clock: IReactorTime
    ) -> None:
        self._clients = clients
        self._settled = settled
        self._budget = budget
        self._clock = clock
        self._hurried = False
        self._end = 0.0

    def hurry(self) -> None:
        """Tell all clients now."""
        self._hurried = True

    @inlineCallbacks
    def run(self, close_ports: Callable[[], "Deferred[Any]"]) -> Generator[Deferred[Any], Any, None]:
        """Send the clients away; fires when none is left, within the budget."""
        clients, clock = self._clients, self._clock
        begin = clock.seconds()
        over = clock.callLater(self._budget, clients.abort)
        self._end = begin + self._budget - min(ANSWER_SECONDS, self._budget / 4)
        grace = begin + min(GRACE_SECONDS, self._budget / 4)
        while clients.connected and not self._hurried and clock.seconds() < grace:
            yield deferLater(clock, TICK_SECONDS)
        yield close_ports()
        clients.stopping = True
        yield DeferredList((yield from self._in_turn([*clients.connected])))
        yield clients.empty()
        if over.active():
            over.cancel()

    def _in_turn(self, leaving: list[Client]) -> Generator["Deferred[Any]", Any, "list[Deferred[None]]"]:
        """Release them at an even pace; answers what fires when each was told."""
        total, begin = len(leaving), self._clock.seconds()
        released: list[Deferred[None]] = []
        while leaving and self._clients.connected:
            passed, whole = self._clock.seconds() - begin + TICK_SECONDS, self._end - begin
            due = total if self._hurried or passed >= whole else int(total * passed / whole)
            count = due - (total - len(leaving))
            if count:
                released.append(self._release(leaving[:count]))
                del leaving[:count]
            if leaving:
                yield deferLater(self._clock, TICK_SECONDS)
        return released

    @inlineCallbacks
    def _release(self, some: Sequence[Client]) -> Generator["Deferred[Any]", Any, None]:
        """Read no more from some clients, and tell them to come back when they have been answered."""
        for client in some:
            client.finish()
        settled = self._settled()
        while self._clients.connected and not settled.called and self._clock.seconds() < self._end:
            yield deferLater(self._clock, TICK_SECONDS)
        waiting = {client: client.head for client in some if client in self._clients.connected}
        while waiting:
            late = self._clock.seconds() >= self._end
            for client, head in [*waiting.items()]:
                if late or not client.owed(head):
                    del waiting[client]
                    self._tell(client)
            if waiting:
                yield deferLater(self._clock, TICK_SECONDS)

    def _tell(self, client: Client) -> None:
        if client in self._clients.connected:
            spread = HURRIED_SPREAD_SECONDS if self._hurried else SPREAD_SECONDS
            client.restart(random.random() * spread)  # noqa: S311 -- no secret
            if client in self._clients.connected:
                self._clients.closings.add(client)
