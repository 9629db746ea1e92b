"""Everyone who is connected, whatever carries them: their deadlines, and their end.

No connection has a timer.  Once a second all are looked at for handshakes that were not finished, for those who are
due a ping or did not answer the last one, for transports that have taken nothing for too long, and for closes
that were not answered.
"""

from collections import Counter
from itertools import count
from typing import Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from chatd.transport.deadlines import Deadlines

HANDSHAKE_SECONDS: Final = 10
"""How long a client may take to send its request, however it trickles in."""
PING_SECONDS: Final = 25
"""How often a client is pinged unless it is told otherwise, below every load balancer's idle limit; the next ping is
its deadline."""
STALL_SECONDS: Final = 40
"""How long a transport may take nothing before its client is told to come back, and again before it is dropped."""
CLOSE_SECONDS: Final = 5
"""How long a client may take to answer a close."""

WEBSOCKET, EVENT_STREAM = CARRIERS = "websocket", "events"
"""What can carry a client."""
UNSUPPORTED, ABNORMAL, NOT_UTF8, POLICY, RESTART, OVERLOADED = 1003, 1006, 1007, 1008, 1012, 1013
"""Close codes (RFC 6455, section 7.4); ABNORMAL is that there was none."""

_log = Logger()


class Connection(Protocol):
    """One connection."""

    connection: int
    """Its number in this process, for the log; 0 until its handshake was answered."""

    @property
    def peer(self) -> str:
        """Where it is, as `HOST:PORT`."""

    @property
    def carrier(self) -> str:
        """One of CARRIERS."""

    @property
    def joined(self) -> bool:
        """Whether it is a member of a room, and so not closing."""

    def ping(self) -> bool:
        """See to it that it lives; answers whether it answered the last time."""

    def evict(self) -> None:
        """Close it: it is too slow."""

    @property
    def head(self) -> int:
        """The number of the newest message in its room; 0 if it is in none."""

    def has_pending(self, head: int) -> bool:
        """Whether it waits for the message of this number, or for an answer to what it said."""

    def finish(self) -> None:
        """Read no more from it."""

    def restart(self, retry_after: float) -> None:
        """Ask it to come back in so many seconds, and begin to close it."""

    def abort(self) -> None:
        """End it without any handshake."""


class Connections:
    """All of them; each is pinged every `ping` seconds."""

    def __init__(self, clock: IReactorTime, ping: float = PING_SECONDS) -> None:
        self.connected: set[Connection] = set()
        """Those whose handshake was answered."""
        self.closes: Counter[tuple[str, int]] = Counter()
        """How many of those are gone, by carrier and close code."""
        self.handshakes: Deadlines[Connection] = Deadlines(HANDSHAKE_SECONDS, clock)
        self.closings: Deadlines[Connection] = Deadlines(CLOSE_SECONDS, clock)
        self.stalls: Deadlines[Connection] = Deadlines(STALL_SECONDS, clock)
        self.pings: Deadlines[Connection] = Deadlines(ping, clock)
        self._numbers = count(1)
        self.stopping = False
        """Whether no more may join."""
        self._empty: list[Deferred[None]] = []

    def add(self, client: Connection) -> None:
        """A client has joined a room."""
        self.handshakes.discard(client)
        client.connection = next(self._numbers)
        self.connected.add(client)
        self.pings.add(client)

    def remove(self, client: Connection, code: int) -> bool:
        """A connection is gone, with a close code; answers whether its handshake had been answered."""
        for deadlines in (self.handshakes, self.closings, self.stalls, self.pings):
            deadlines.discard(client)
        if client not in self.connected:
            return False
        self.connected.discard(client)
        self.closes[client.carrier, code] += 1
        if not self.connected:
            waiting, self._empty = self._empty, []
            for empty in waiting:
                empty.callback(None)
        return True

    def check_deadlines(self) -> None:
        """Do what is due; to be called once a second."""
        for client in self.handshakes.expired():
            self._drop(client, "sent no whole request")
        for client in self.closings.expired():
            self._drop(client, "did not answer the close")
        for client in self.stalls.expired():
            if client.joined:
                client.evict()
                self.stalls.add(client)
            else:
                self._drop(client, "took nothing")
        for client in self.pings.expired():
            if client.ping():
                self.pings.add(client)
            else:
                self._drop(client, "did not answer a ping")

    def _drop(self, client: Connection, why: str) -> None:
        _log.info(
            "#{connection} {peer} is dropped: it {why} in time",
            connection=client.connection,
            peer=client.peer,
            why=why,
        )
        client.abort()

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
