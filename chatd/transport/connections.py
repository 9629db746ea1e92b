"""All connected clients, over every carrier: their deadlines, and how they end.

No connection has a timer.  Once a second all are checked for unfinished handshakes, for pings that are due
or unanswered, for transports that have taken nothing for too long, and for unanswered closes.
"""

import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from chatd.transport.deadlines import Deadlines, Expiries
from chatd.transport.identity import LEEWAY_SECONDS, Identity
from chatd.transport.membership import Membership

HANDSHAKE_SECONDS: Final = 10
"""The time in which a client must send its whole request."""
STALL_SECONDS: Final = 40
"""The time after which a transport that takes nothing is closed, and after which it is then dropped."""
CLOSE_SECONDS: Final = 5
"""The time in which a client must answer a close."""
MAX_BUFFERED: Final = 256 << 20
"""The most bytes that full transports may hold together.  It is the memory of some hundred clients that never read."""

WEBSOCKET, EVENT_STREAM, HTTP = "websocket", "events", "http"
"""The carriers: what frames and requests travel on.  The metrics call them transports."""
CARRIERS: Final = WEBSOCKET, EVENT_STREAM
"""The carriers of connections that have a member; over HTTP there are single requests."""

_logger = Logger()


class Connection(Protocol):
    """One connected client."""

    number: int
    """The number of the connection in this process, for the log; 0 until its handshake is answered."""

    @property
    def peer(self) -> str:
        """The address of the client, as `HOST:PORT`."""

    @property
    def carrier(self) -> str:
        """What carries the connection, one of CARRIERS."""

    @property
    def member(self) -> Membership:
        """The place of the client in its room."""

    @property
    def buffered(self) -> int:
        """The number of bytes that the transport holds."""

    def ping(self) -> bool:
        """Send a ping, and return whether the client answered the previous one."""

    def expire(self) -> None:
        """Close the connection, because the client's token has expired."""

    def evict(self) -> None:
        """Close the connection, because the client is too slow."""

    def ban(self, reason: str) -> None:
        """Close the connection, because the client is banned from its room."""

    def finish(self) -> None:
        """Read no more from the client."""

    def restart(self, retry_after: float) -> None:
        """Ask the client to reconnect after so many seconds, and begin to close the connection."""

    def abort(self) -> None:
        """End the connection without a closing handshake."""


def buffered(transport: Any) -> int:
    """Return the number of bytes that a transport of Twisted holds, with those below it: TLS, or a PROXY header."""
    total = 0
    while transport is not None:
        own = vars(transport)  # a wrapper has the attributes of what it wraps
        total += len(own.get("dataBuffer", b"")) - own.get("offset", 0) + own.get("_tempDataLen", 0)
        total += sum(map(len, own.get("_appSendBuffer", ())))
        transport = own.get("transport")
    return total


class Connections:
    """The set of all connections, which pings each of them every `ping` seconds; a pong is due by the next ping.

    `wall` returns the seconds since 1970, with which the expiry of a token is compared.
    """

    def __init__(self, clock: IReactorTime, ping: float, wall: Callable[[], float] = time.time) -> None:
        self.connected: set[Connection] = set()
        """The connections whose handshake was answered."""
        self.closes: Counter[tuple[str, int]] = Counter()
        """The number of ended connections, by carrier and close code."""
        self.handshakes: Deadlines[Connection] = Deadlines(HANDSHAKE_SECONDS, clock)
        self.asked: set[Connection] = set()
        """The connections whose handshake waits for its turn, for a key of its token, or for the log."""
        self.closings: Deadlines[Connection] = Deadlines(CLOSE_SECONDS, clock)
        self.stalls: Deadlines[Any] = Deadlines(STALL_SECONDS, clock)
        """The connections whose transport is full: of these clients, and those of plain HTTP."""
        self.pings: Deadlines[Connection] = Deadlines(ping, clock)
        self.expiries: Expiries[Connection] = Expiries(clock)
        """The connections with a token, until it expires."""
        self._wall = wall
        self._numbers = count(1)
        self.stopping = False
        """True if new clients are refused."""
        self.buffered = 0
        """The bytes that full transports held at the last check."""
        self._empty: list[Deferred[None]] = []

    def add(self, client: Connection) -> None:
        """Add a client that joins a room."""
        self.handshakes.discard(client)
        client.number = next(self._numbers)
        self.connected.add(client)
        self.pings.add(client)
        self.expect_expiry(client)

    def expect_expiry(self, client: Connection) -> None:
        """Close a connection when its newest token expires.

        The time that is left is measured once, when the token is accepted.  A wall clock that jumps later ends no
        connection early.
        """
        left = self.seconds_left(client.member.identity)
        if left is not None:
            self.expiries.set(client, left)

    def seconds_left(self, identity: Identity) -> float | None:
        """Return the seconds until the token of a client is no longer accepted; None if that never happens."""
        return None if identity.expires is None else identity.expires + LEEWAY_SECONDS - self._wall()

    def remove(self, client: Connection, code: int) -> bool:
        """Remove a connection that has ended with a close code, and return whether its handshake was answered."""
        for deadlines in (self.handshakes, self.closings, self.stalls, self.pings, self.expiries):
            deadlines.discard(client)
        self.asked.discard(client)
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
        """Act on the deadlines that are over; to be called once a second."""
        for client in self.handshakes.expired():
            self._drop(client, "sent no whole request")
        for client in self.closings.expired():
            self._drop(client, "did not answer the close")
        for client in self.stalls.expired():
            if client.member.joined:
                client.evict()
                self.stalls.add(client)
            else:
                self._drop(client, "took nothing")
        for client in self.expiries.expired():
            if client.member.joined:
                client.expire()
        for client in self.pings.expired():
            if client.ping():
                self.pings.add(client)
            else:
                self._drop(client, "did not answer a ping")
        self._bound_buffers()

    def _bound_buffers(self) -> None:
        """Evict the clients with the most waiting bytes while all together hold too many, and free those bytes now."""
        held = {client: client.buffered for client in self.stalls}
        self.buffered = sum(held.values())
        for client in sorted(held, key=held.__getitem__, reverse=True):
            if self.buffered <= MAX_BUFFERED:
                return
            self.buffered -= held[client]
            if client.member.joined:
                client.evict()
            self._drop(client, "did not read its bytes, the most of too many,")

    def _drop(self, client: Connection, why: str) -> None:
        _logger.info(
            "#{connection} {peer} is dropped: it {why} in time",
            connection=client.number,
            peer=client.peer,
            why=why,
        )
        client.abort()

    def abort(self) -> None:
        """Drop all remaining connections and unfinished handshakes."""
        for client in [*self.connected, *self.handshakes]:
            client.abort()

    def empty(self) -> "Deferred[None]":
        """Return a Deferred that fires when no client is connected."""
        if not self.connected:
            return succeed(None)
        empty: Deferred[None] = Deferred()
        self._empty.append(empty)
        return empty
