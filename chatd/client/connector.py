"""The rules by which a client keeps a server connected, without a connection.

When a connection ends, the client pauses and reconnects, or it gives up if no other connection would succeed.  It takes
a token for each connection, renews it before its expiry, and gets another one when the server has refused it.

A host opens the connections: `chatd.client.client` on Twisted, and `chatd.client.aio` on asyncio.
"""

import re
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.core import Clock, RoomCore, Timers
from chatd.client.protocol import (
    RENEWAL_LABEL,
    Backoff,
    ClientStopped,
    Error,
    Event,
    Frame,
    ProtocolError,
    Rejected,
    seconds_to_renewal,
    token_text,
)
from chatd.transport.framing import EXPIRED, CloseCode

FINAL_CLOSE_CODES: Final = frozenset(
    (
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED_DATA,
        CloseCode.INVALID_DATA,
        CloseCode.POLICY_VIOLATION,
        CloseCode.MESSAGE_TOO_BIG,
    )
)
"""Close codes that blame the client, which would fail again."""
TEMPORARY_STATUSES: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
"""HTTP statuses after which a later attempt may succeed; all others but 101 are final."""

WATCH_SECONDS: Final = 10.0
"""The time between two looks at the clock on the wall."""
SLEPT_SECONDS: Final = 5.0
"""A timer that is so late shows that the machine slept, or that the program was stopped."""

_RETRY_AFTER = re.compile(r"retry_after=(\d+(?:\.\d+)?)")
_SECONDS = re.compile(r"\d{1,6}")


def seconds_of(header: str) -> float | None:
    """Return the seconds that a header Retry-After names; None for a date or nothing."""
    return float(header) if _SECONDS.fullmatch(header) else None


class Ending(NamedTuple):
    """The end of a connection, or of an attempt to connect."""

    reason: str
    code: int = 0
    """The code of the close frame, or the HTTP status of a refused handshake, or 0."""
    retry_after: float | None = None
    """The seconds after which the server wants the client back, if it named them."""

    @classmethod
    def closed(cls, code: int, reason: str) -> "Ending":
        """Return the end by a close frame of the server."""
        found = _RETRY_AFTER.search(reason)
        return cls(f"closed with {code} {reason}".rstrip(), code, float(found[1]) if found else None)

    @classmethod
    def refused(cls, status: int, phrase: str, retry_after: str) -> "Ending":
        """Return the end by an HTTP status, with the header Retry-After."""
        return cls(f"refused with {status} {phrase}".rstrip(), status, seconds_of(retry_after))

    @property
    def is_final(self) -> bool:
        """True if another connection would end in the same way."""
        if self.code in FINAL_CLOSE_CODES:
            return True
        return 100 <= self.code < 1000 and self.code not in TEMPORARY_STATUSES  # noqa: PLR2004 -- HTTP statuses


class ConnectorCore(Timers):
    """Keeps a server connected, over as many connections as needed; it connects when `start` is called."""

    def __init__(
        self,
        clock: Clock,
        address: ServerAddress | str,
        token: str | Callable[[], Any] | None,
        backoff: Backoff | None,
    ) -> None:
        Timers.__init__(self, clock)
        self.address = ServerAddress.parse(address) if isinstance(address, str) else address
        self._token = token
        self._bearer: str | None = None
        """The newest token."""
        self._unauthorized = False
        """True if the server refused the newest token, before any history."""
        self._backoff = backoff or Backoff()
        self._paced = False
        """True if the server named the time of the next attempt."""
        self._end: Exception | None = None
        """The reason for which the client does not reconnect."""
        self.server: str | None = None
        """The name and version of the last server, such as `chatd/1.0.0`; None before the first connection."""

    # For its user

    def start(self) -> None:
        """Connect."""
        for room in self._rooms():
            room.listener.on_attempt()
        self._connect()

    def reconnect(self, *, wait: float = 0.0) -> None:
        """Connect now, or in `wait` seconds, unless the server has named the time; check a connection."""
        if self.can_send:
            self._probe()
        elif self._is_scheduled(self.start) and not self._paced:
            self._schedule(self.start, wait)

    def wake(self) -> None:
        """React to a machine or a network that is back, as all clients of the server may at the same time."""
        self.reconnect(wait=self._backoff.spread())

    # For its host

    def _connect(self) -> None:
        """Take a token and open a connection."""
        raise NotImplementedError

    def _probe(self) -> None:
        """Check that the server answers."""
        raise NotImplementedError

    def log_warning(self, text: str) -> None:
        """Write a warning to the log."""
        raise NotImplementedError

    def log_failure(self, text: str) -> None:
        """Write the exception that is being handled to the log."""
        raise NotImplementedError

    # For a subclass

    def _rooms(self) -> Sequence[RoomCore]:
        """Return the rooms that the client reads."""
        raise NotImplementedError

    def _receive(self, text: bytes) -> None:
        """Handle a text frame; raise ProtocolError if it breaks the protocol."""
        raise NotImplementedError

    def _greeted(self) -> None:
        """Note that the server serves this client."""
        self._backoff.reset()
        self._unauthorized = False
        self._schedule_renewal()

    @property
    def can_send(self) -> bool:
        """True while a connection takes frames."""
        raise NotImplementedError

    def transmit(self, text: bytes) -> None:
        """Send a text frame; `can_send` must be true."""
        raise NotImplementedError

    # For its connections

    def target(self) -> tuple[str, int, str]:
        """Return the host, the port and the resource that a handshake names now."""
        return self.address.uri_host, self.address.port, self.address.resource(None)

    def headers(self) -> dict[str, str]:
        """Return the header that carries the token (RFC 6750, section 2.1)."""
        return {} if self._bearer is None else {"Authorization": f"Bearer {self._bearer}"}

    def connection_opened(self) -> None:
        """React to a finished handshake."""

    def handle_text(self, text: bytes) -> str | None:
        """Handle a text frame; return the reason if the connection must be dropped."""
        try:
            try:
                self._receive(text)
            except ProtocolError as error:
                self.log_warning(str(error))
                for room in self._rooms():
                    room.listener.on_protocol_error(error)
                return "the server broke the protocol"
        except Exception:  # noqa: BLE001 -- Autobahn loses exceptions if the frame came with the handshake
            self.log_failure("a callback of the listener failed")
            return "a callback of the listener failed"
        return None

    def connection_ended(self, ending: Ending) -> None:
        """Reconnect later, or finish if the client was stopped or no other connection would succeed."""
        error = None
        if ending.is_final:
            error = Rejected(ending.reason, ending.code)
            if self._may_succeed_later(error):
                error, ending = None, Ending(ending.reason)
        rejected = error is not None and self._end is None
        self._end = self._end or error
        self._ended()
        self._schedule(self._renew, None)
        for room in self._rooms():
            room.disconnected()
        if self._end is None:
            self._reconnect(ending.reason, ending.retry_after)
        else:
            self._finished()
        if error is not None and rejected:
            for room in self._rooms():
                room.reject(error)

    def _ended(self) -> None:
        """Forget the connection."""

    def _finished(self) -> None:
        """React to the end of the last connection."""

    def _stop(self) -> None:
        """Give up all rooms, whose pending requests fail with ClientStopped."""
        if self._end is None:
            self._end = ClientStopped("the client was stopped")
            for room in self._rooms():
                room.finish(self._end)

    def _reconnect(self, reason: str, retry_after: float | None) -> None:
        self._paced = retry_after is not None
        wait = self._backoff.next(retry_after)
        self._schedule(self.start, wait)
        for room in self._rooms():
            room.listener.on_disconnect(reason, wait)

    # Tokens

    def _may_succeed_later(self, error: Rejected) -> bool:
        """Return whether a new token may help: after one has expired, or when the first one is refused."""
        if not callable(self._token):
            return False
        expired = error.code == CloseCode.POLICY_VIOLATION and EXPIRED in str(error)
        refused = error.code == HTTPStatus.UNAUTHORIZED and not self._unauthorized
        self._unauthorized = self._unauthorized or refused
        return expired or refused

    def _schedule_renewal(self) -> None:
        """Renew the token before it expires, if a function returns the next one."""
        if callable(self._token):
            self._schedule(self._renew, seconds_to_renewal(self._bearer or "", time.time()))

    def _renew(self) -> None:
        """Take the next token, and send it."""
        raise NotImplementedError

    def _send_token(self) -> None:
        self.transmit(token_text(self._bearer or ""))

    def _is_about_token(self, frame: Frame) -> bool:
        """Return whether a frame answers the renewal of the token."""
        if isinstance(frame, Error) and frame.label == RENEWAL_LABEL:
            self.log_warning(frame.message)
            return True
        return isinstance(frame, Event) and frame.type == "token"


class SleepWatch(Timers):
    """Notices that the machine slept: more time has passed by the clock on the wall than a timer waited.

    `wall` returns the seconds since 1970, and `woke` is called after a sleep.
    """

    def __init__(self, clock: Clock, wall: Callable[[], float], woke: Callable[[], None]) -> None:
        super().__init__(clock)
        self._wall, self._woke = wall, woke
        self._due = 0.0

    def start(self) -> None:
        """Begin, or go on after a look at the clock."""
        self._due = self._wall() + WATCH_SECONDS
        self._schedule(self._look, WATCH_SECONDS)

    def stop(self) -> None:
        """End."""
        self._schedule(self._look, None)

    def _look(self) -> None:
        slept = self._wall() - self._due > SLEPT_SECONDS
        self.start()
        if slept:
            self._woke()


class SingleRoom(ConnectorCore, RoomCore):
    """A client in one room, which the address names."""

    _decode: Callable[[bytes], Frame]

    @override
    def target(self) -> tuple[str, int, str]:
        return self.address.uri_host, self.address.port, self.address.resource(self.last)

    @override
    def _rooms(self) -> Sequence[RoomCore]:
        return (self,)

    @override
    def _receive(self, text: bytes) -> None:
        frame = self._decode(text)
        if not self._is_about_token(frame):
            self._handle(frame)
