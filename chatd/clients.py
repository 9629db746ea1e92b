"""Everyone who is connected, whatever carries them: their deadlines, and their end.

No connection has a timer.  Once a second all are looked at for handshakes that were not finished, for those who are
due a ping or did not answer the last one, for transports that have taken nothing for too long, and for closes
that were not answered.
"""

from typing import Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from chatd.deadlines import Deadlines

HANDSHAKE_SECONDS: Final = 10
"""How long a client may take to send its request, however it trickles in."""
PING_SECONDS: Final = 25
"""How often a client is pinged, below every load balancer's idle limit; the next ping is its deadline."""
STALL_SECONDS: Final = 40
"""How long a transport may take nothing before its client is told to come back, and again before it is dropped."""
CLOSE_SECONDS: Final = 5
"""How long a client may take to answer a close."""

_log = Logger()


class Client(Protocol):
    """One connection."""

    @property
    def peer(self) -> str:
        """Where it is, as `HOST:PORT`."""

    @property
    def joined(self) -> bool:
        """Whether it is a member of a room, and so not closing."""

    def ping(self) -> bool:
        """See to it that it lives; answers whether it answered the last time."""

    def overrun(self) -> None:
        """Close it: it is too slow."""

    def close(self, code: int, reason: str) -> None:
        """Begin to close it."""

    def abort(self) -> None:
        """End it without any handshake."""


class Clients:
    """All of them."""

    def __init__(self, clock: IReactorTime) -> None:
        self.connected: set[Client] = set()
        """Those whose handshake was answered."""
        self.handshakes: Deadlines[Client] = Deadlines(HANDSHAKE_SECONDS, clock)
        self.closings: Deadlines[Client] = Deadlines(CLOSE_SECONDS, clock)
        self.stalls: Deadlines[Client] = Deadlines(STALL_SECONDS, clock)
        self.pings: Deadlines[Client] = Deadlines(PING_SECONDS, clock)
        self.stopping = False
        self._empty: list[Deferred[None]] = []

    def add(self, client: Client) -> None:
        """A client has joined a room."""
        self.handshakes.discard(client)
        self.connected.add(client)
        self.pings.add(client)

    def remove(self, client: Client) -> bool:
        """A connection is gone; answers whether its handshake had been answered."""
        for deadlines in (self.handshakes, self.closings, self.stalls, self.pings):
            deadlines.discard(client)
        if client not in self.connected:
            return False
        self.connected.discard(client)
        if not self.connected:
            waiting, self._empty = self._empty, []
            for empty in waiting:
                empty.callback(None)
        return True

    def look(self) -> None:
        """Do what is due; to be called once a second."""
        for client in self.handshakes.expired():
            self._drop(client, "sent no whole request")
        for client in self.closings.expired():
            self._drop(client, "did not answer the close")
        for client in self.stalls.expired():
            if client.joined:
                client.overrun()
                self.stalls.add(client)
            else:
                self._drop(client, "took nothing")
        for client in self.pings.expired():
            if client.ping():
                self.pings.add(client)
            else:
                self._drop(client, "did not answer a ping")

    def _drop(self, client: Client, why: str) -> None:
        _log.info("{peer} is dropped: it {why} in time", peer=client.peer, why=why)
        client.abort()

    def close(self, code: int, reason: str) -> None:
        """Begin to close all connections; no more join."""
        self.stopping = True
        for client in [*self.connected]:
            client.close(code, reason)
            if client in self.connected:
                self.closings.add(client)

    def abort(self) -> None:
        """Drop those that are left, and the unfinished handshakes."""
        for client in [*self.connected, *self.handshakes]:
            client.abort()

    def empty(self) -> "Deferred[None]":
        """Fires when there is no connection."""
        if not self.connected:
            return succeed(None)
        empty: Deferred[None] = Deferred()
        self._empty.append(empty)
        return empty
