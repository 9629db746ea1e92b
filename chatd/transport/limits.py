"""The limits on new clients: what one address may take of the server, and when nobody new is served.

A refused client gets a status and a Retry-After that differs from client to client, so that many refused clients do
not return together.  No limit of an address applies to this machine (the loopback and Unix sockets) and to private
networks: a proxy or a load balancer there is everybody.
"""

import random
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from math import ceil
from typing import Final

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.messages import Code
from chatd.room.registry import TooManyRooms
from chatd.transport.admission import MAX_ADDRESSES, HttpError, Rate, client_network

HANDSHAKES_PER_SECOND: Final = 20
"""New clients a second of one address.  The burst is all that it may have: all may reconnect after a restart."""
NEW_ROOMS: Final = 1_000
"""The rooms that one address may create at once, by the first message in each."""
NEW_ROOMS_PER_SECOND: Final = 1
"""The rooms that one address may create a second after that.  Applications that create rooms have one address."""
JOINS: Final = 10_000
"""The rooms that the shared connections of one address may join at once: 20 rooms for each of 500 people."""
JOINS_PER_SECOND: Final = 200
"""The rooms that they may join a second after that, which take a twentieth of a core."""
SPREAD_SECONDS: Final = 10
"""The longest time that is added to the Retry-After of a refused client, at random."""
RETRY_SECONDS: Final = 2
"""The shortest time after which a refused client may return."""

LOOK_SECONDS: Final = 0.25
"""The interval between two looks at the lag of the reactor."""
LATE_SECONDS: Final = 1.0
"""The lag above which new clients are refused.  A reactor that is only busy has less."""
LATE_LOOKS: Final = 2
"""The late looks in a row before that: a process that was stopped for once is late once."""
PROMPT_SECONDS: Final = 0.25
"""The lag below which new clients are served again."""
PROMPT_LOOKS: Final = 8
"""The prompt looks in a row before that."""

RATE_EXCEEDED: Final = "Rate limit exceeded"
"""The error sent to a client above a rate; Code.RATE_LIMITED."""

FILES, LAG, CONNECTIONS, HANDSHAKES = "files", "lag", "connections", "handshakes"
ROOMS, NEW_ROOM, JOIN = "rooms", "new_rooms", "joins"
LIMITS: Final = FILES, LAG, CONNECTIONS, HANDSHAKES, ROOMS, NEW_ROOM, JOIN
"""The limits, as the metrics call them."""

_logger = Logger()


PRIVATE: Final = tuple(
    ip_network(text)
    for text in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
        *("::/64", "fc00::/7", "fe80::/10"),
    )
)
"""The networks of this machine and of an operator's own (RFC 1918, RFC 4193, RFC 6598, and link-local addresses)."""


class _Pace:
    """The state that a rate limit keeps (admission.Paced)."""

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = 0.0


class Place(_Pace):
    """What one address takes of the server; `due` belongs to its handshakes."""

    __slots__ = ("arriving", "connections", "joins", "rooms")

    def __init__(self) -> None:
        super().__init__()
        self.arriving = 0
        """The number of its connections that have sent no request yet."""
        self.connections = 0
        """The number of its other connections."""
        self.rooms = _Pace()
        """The state of the limit of its new rooms."""
        self.joins = _Pace()
        """The state of the limit of its joins."""

    def is_idle(self, now: float) -> bool:
        """Return whether nothing would change if the place was forgotten."""
        due = max(self.due, self.rooms.due, self.joins.due)
        return not (self.arriving or self.connections) and due <= now


class Lateness:
    """Whether the reactor lags so much that it serves no new clients."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._due: float | None = None
        self._looks = 0
        """The number of looks in a row that speak for a change."""
        self.refuses = False
        """True while new clients are refused."""

    def look(self) -> None:
        """Measure the lag; to be called every LOOK_SECONDS."""
        now = self._clock.seconds()
        lag = 0.0 if self._due is None else now - self._due
        self._due = now + LOOK_SECONDS
        changes = lag < PROMPT_SECONDS if self.refuses else lag >= LATE_SECONDS
        self._looks = self._looks + 1 if changes else 0
        if self._looks < (PROMPT_LOOKS if self.refuses else LATE_LOOKS):
            return
        self._looks = 0
        self.refuses = not self.refuses
        if self.refuses:
            _logger.warn("new clients are refused: the event loop lags by {lag:.1f} s", lag=lag)
        else:
            _logger.info("new clients are served again")


class Limits:
    """The limits that all connections to a port share.

    `most` is the number of connections that one address may have; 0 sets no limit on addresses.  `hops` proxies are
    trusted to add to X-Forwarded-For.  `chance` returns a random number from 0 to 1.
    """

    def __init__(
        self, clock: IReactorTime, most: int = 0, hops: int = 0, chance: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._most = most
        self._hops = hops
        self._chance = chance
        self._handshakes = Rate(HANDSHAKES_PER_SECOND, most, clock.seconds)
        self._new_rooms = Rate(NEW_ROOMS_PER_SECOND, NEW_ROOMS, clock.seconds)
        self._joins = Rate(JOINS_PER_SECOND, JOINS, clock.seconds)
        self._places: dict[str, Place] = {}
        self._forget_above = MAX_ADDRESSES
        self.lateness = Lateness(clock)
        self.is_full: Callable[[], bool] = lambda: False
        """Returns whether open files are short, so that no new client is served."""
        self.refusals = Counter(dict.fromkeys(LIMITS, 0))
        """The number of refused clients and posts, by limit."""

    def __len__(self) -> int:
        """Return the number of addresses in memory."""
        return len(self._places)

    def place(self, peer: object, forwarded: str | None) -> Place | None:
        """Return the place of the address behind a connection; None for one that has no limit.

        `peer` is the address of the connection as Twisted has it, and `forwarded` the header X-Forwarded-For.
        """
        if not self._most:
            return None
        host = getattr(peer, "host", "")
        if not self._hops and host.startswith("127."):  # so that nearly all of them need not be parsed
            return None
        name = client_network(host, forwarded, self._hops)
        if name is None:
            return None
        place = self._places.get(name)
        if place is None:
            address = ip_address(name)
            if any(address in private for private in PRIVATE):
                return None
            self._forget_idle()
            place = self._places[name] = Place()
        return place

    def _forget_idle(self) -> None:
        if len(self._places) >= self._forget_above:
            now = self._clock.seconds()
            self._places = {name: place for name, place in self._places.items() if not place.is_idle(now)}
            self._forget_above = max(MAX_ADDRESSES, 2 * len(self._places))

    def arrive(self, peer: object) -> Place | None:
        """Count a new connection, which has sent nothing yet, and return its place, which `settle` takes back.

        Behind proxies that add to X-Forwarded-For, nobody knows the address of a client before its request.
        """
        place = None if self._hops else self.place(peer, None)
        if place is not None:
            place.arriving += 1
        return place

    def is_crowded(self, place: Place) -> bool:
        """Return whether too many connections of an address have sent no request, and count the refused client."""
        crowded = place.arriving > self._most
        self.refusals[CONNECTIONS] += crowded
        return crowded

    @staticmethod
    def settle(place: Place) -> None:
        """Take back what `arrive` counted."""
        place.arriving -= 1

    def enter(self, peer: object, forwarded: str | None) -> Place | None:
        """Count a new client, and return its place, which `leave` takes back; raise HttpError above a limit."""
        self.check_lateness()
        if self.is_full():
            raise self.refusal(FILES, HTTPStatus.SERVICE_UNAVAILABLE, "the server is full")
        place = self.place(peer, forwarded)
        if place is None:
            return None
        wait = self._handshakes.take(place)
        if wait:
            raise self.refusal(HANDSHAKES, HTTPStatus.TOO_MANY_REQUESTS, "too many new clients of this address", wait)
        if place.connections >= self._most:
            raise self.refusal(CONNECTIONS, HTTPStatus.TOO_MANY_REQUESTS, "too many connections of this address")
        place.connections += 1
        return place

    def check_lateness(self) -> None:
        """Raise HttpError 503 while the reactor lags."""
        if self.lateness.refuses:
            raise self.refusal(LAG, HTTPStatus.SERVICE_UNAVAILABLE, "the server is busy")

    def check_joins(self, place: Place | None) -> None:
        """Count a room that a shared connection joins; raise HttpError 429 if its address joins too many.

        All connections of the address wait for the same moment, and only one of them gets the next room.  So the time
        to wait is spread, as for handshakes.
        """
        wait = 0.0 if place is None else self._joins.take(place.joins)
        if wait:
            raise self.refusal(JOIN, HTTPStatus.TOO_MANY_REQUESTS, RATE_EXCEEDED, wait)

    def keep(self, place: Place | None) -> bool:
        """Count a connection of plain HTTP, and return whether it may stay open after its answer."""
        if place is None:
            return True
        place.connections += 1
        return place.connections <= self._most

    @staticmethod
    def leave(place: Place | None) -> None:
        """Take back what `enter` or `keep` counted."""
        if place is not None:
            place.connections -= 1

    def room_wait(self, place: Place | None) -> float:
        """Return 0.0, or the seconds until an address may create one more room."""
        wait = 0.0 if place is None else self._new_rooms.wait(place.rooms)
        if wait:
            self.refusals[NEW_ROOM] += 1
        return wait

    def room_created(self, place: Place | None) -> None:
        """Count a room that an address has created."""
        if place is not None:
            self._new_rooms.take(place.rooms)

    def too_many_rooms(self, failure: Failure) -> Failure:
        """Raise HttpError if a room could not be opened beside the others, and return any other failure."""
        if failure.check(TooManyRooms):
            raise self.refusal(ROOMS, HTTPStatus.SERVICE_UNAVAILABLE, "too many rooms are open")
        return failure

    def refusal(self, limit: str, status: HTTPStatus, detail: str, wait: float = 0.0) -> HttpError:
        """Count a refused client, and make its error."""
        self.refusals[limit] += 1
        code = Code.UNAVAILABLE if status == HTTPStatus.SERVICE_UNAVAILABLE else Code.RATE_LIMITED
        seconds = max(ceil(wait), RETRY_SECONDS) + int(self._chance() * SPREAD_SECONDS)
        return HttpError(status, detail, code, {"Retry-After": str(seconds)})
