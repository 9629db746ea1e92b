"""The Python client: it reads a room without loss, stores each post once, and reconnects by itself.

When a connection ends, the client pauses, reconnects with its last id, and repeats the requests that have
no answer.  If the server announces another log during a connection, the client starts over with that log.

A connection on which the server breaks the protocol is closed.  The next one repairs the damage: missing entries are
sent again, and repeated ones are not delivered.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IStreamClientEndpoint
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client.connection import CONNECT_SECONDS, ClientConnection, ClientFactory
from chatd.client.protocol import (
    RENEWAL_LABEL,
    WINDOW,
    Ack,
    Backoff,
    ClientStopped,
    Cursor,
    Error,
    Event,
    Frame,
    History,
    Message,
    PendingRequests,
    Posted,
    ProtocolError,
    Rejected,
    parse_frame,
    seconds_to_renewal,
    token_text,
)
from chatd.messages import Entry, Id
from chatd.transport.framing import EXPIRED, CloseCode

_logger = Logger()


class ServerAddress(NamedTuple):
    """The address of a room: a parsed WebSocket URL."""

    secure: bool
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """Parse `ws://HOST[:PORT][/rooms/NAME][?QUERY]`, or `wss:` for TLS; raise ValueError for anything else."""
        shown = re.sub(r"(?s)^((?:[a-z]+://)?[^:@/]*:(?!//)).*@", r"\1***@", url)  # without the password of a user
        try:
            scheme, place, path, query, fragment = parts = urlsplit(url)
            port = parts.port
        except ValueError:
            scheme = ""
        if scheme not in ("ws", "wss") or not re.fullmatch(r"[!-~]+", url) or not parts.hostname or port == 0:
            raise ValueError(f"{shown!r} is not a URL such as ws://localhost:8085/rooms/main")
        if "@" in place or fragment:
            raise ValueError(f"{shown!r} must have neither a user nor a fragment")
        secure = scheme == "wss"
        return cls(secure, parts.hostname, port or (443 if secure else 80), path or "/", query)

    def __str__(self) -> str:
        return f"{'wss' if self.secure else 'ws'}://{self.uri_host}:{self.port}{self.path}"

    @property
    def uri_host(self) -> str:
        """The host as a URL or a Host header has it: an IPv6 address stands in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def resource(self, last: Id | None) -> str:
        """Return the path and query of the handshake, which name the last id that the client has."""
        pairs = [pair for pair in parse_qsl(self.query) if last is None or pair[0] != "last_event_id"]
        if last is not None:
            pairs.append(("last_event_id", str(last)))
        return f"{self.path}?{urlencode(pairs)}" if pairs else self.path

    def endpoint(self, reactor: Any) -> IStreamClientEndpoint:
        """Return an endpoint that connects to the server.

        With TLS it trusts the certificate authorities of the machine, or those in the file that SSL_CERT_FILE names.
        """
        endpoint: IStreamClientEndpoint
        # HostnameEndpoint resolves even an IP address in a thread, so that clients connect in any order.
        if isIPv6Address(self.host):
            endpoint = TCP6ClientEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        elif isIPAddress(self.host):
            endpoint = TCP4ClientEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        else:
            endpoint = HostnameEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        return wrapClientTLS(optionsForClientTLS(self.host), endpoint) if self.secure else endpoint


class Listener:
    """The callbacks of a client.  Override those that you need; each does nothing by default.

    The client calls them in the reactor thread.  A callback should not raise: the client then logs the exception, drops
    the connection and reconnects.  It delivers the same entries again, until the callback accepts them.
    """

    def on_history(self, history: History) -> None:
        """Start over: these entries replace everything received before.

        The client calls this at its first connection, and again when the server has a new log, or cannot resume after
        the last id.
        """

    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        """Receive the entries that follow the last ones, without a gap and in order."""

    def on_event(self, event: Event) -> None:
        """Receive a presence or typing event, if the query of the URL asks for them."""

    def on_connect(self) -> None:
        """React to a new connection, after its history was delivered."""

    def on_protocol_error(self, error: ProtocolError) -> None:
        """React to a server that broke the protocol; the client drops the connection and then reconnects."""

    def on_disconnect(self, reason: str, wait: float) -> None:
        """React to the end of a connection, or to a failed attempt; the next attempt is in `wait` seconds."""

    def on_reject(self, error: Rejected) -> None:
        """React to a server that refused this client for good; the client does not try again.

        The client calls this before the pending requests fail with the same error.
        """


class Timers:
    """The timers of an object, one for each of its methods that are called later."""

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._timers: dict[Callable[[], None], IDelayedCall] = {}

    def _schedule(self, call: Callable[[], None], seconds: float | None) -> None:
        """Replace the timer of a call: it fires in `seconds`, and None cancels it."""
        timer = self._timers.pop(call, None)
        if timer is not None and timer.active():
            timer.cancel()
        if seconds is not None:
            self._timers[call] = self._reactor.callLater(seconds, call)


class RoomClient(Timers):
    """One room as a client reads it: the position, the listener and the pending requests."""

    def __init__(self, reactor: IReactorTime, listener: Listener, last: Id | None, window: int) -> None:
        super().__init__(reactor)
        self.listener = listener
        self._cursor = Cursor(last)
        self._requests = PendingRequests(window)
        self._end: Exception | None = None
        """The reason for which the client has given up the room."""

    @property
    def last(self) -> Id | None:
        """The id of the last entry that the listener received; None before the first history."""
        return self._cursor.last

    # For its user

    def post(self, username: str, message: str, extra: Mapping[str, Any] | None = None) -> "Deferred[Posted]":
        """Post a message, however many connections that takes; the Deferred fires when it is stored.

        `extra` are the fields that the server's own schema has besides.

        The Deferred fails with Rejected if the server refuses the message or the client for good, and with
        ClientStopped after `stop`.
        """
        return self._request({**(extra or {}), "username": username, "message": message})

    def page(self, *, before: Id | None = None, after: Id | None = None, limit: int = 50) -> "Deferred[History]":
        """Read at most `limit` entries: the newest, or those before or after one id, but not both.

        The Deferred fails as that of `post` does.
        """
        asked = {name: str(place) for name, place in (("before", before), ("after", after)) if place is not None}
        return self._request({"type": "history", **asked, "limit": limit})

    def _request(self, document: dict[str, Any]) -> "Deferred[Any]":
        if self._end is not None:
            return fail(self._end)
        answer = self._requests.add(document)
        self._send()
        return answer

    # For its connection

    def disconnected(self) -> None:
        """Send nothing until the room is joined on another connection."""
        self._cursor.connect()
        self._schedule(self._send, None)

    def finish(self, error: Exception) -> None:
        """Give up the room: no request will be answered."""
        self._end = self._end or error
        self._requests.fail(error)

    def reject(self, error: Rejected) -> None:
        """Give up the room, because the server refused the client."""
        try:
            self.listener.on_reject(error)  # first: it names the cause of the failures that follow
        finally:
            self.finish(error)

    @property
    def can_send(self) -> bool:
        """True while a connection takes frames."""
        raise NotImplementedError

    def transmit(self, text: bytes) -> None:
        """Send a text frame."""
        raise NotImplementedError

    def _greeted(self) -> None:
        """React to the first history of a connection."""

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, Message):
            last = self.last
            self._cursor.message(frame)
            self._deliver(last, self.listener.on_entries, frame.epoch, (frame.entry,))
        elif isinstance(frame, Ack) or (isinstance(frame, History) and frame.label is not None):
            self._requests.answer(frame)
            self._send()
        elif isinstance(frame, History):
            self._handle_history(frame)
        elif isinstance(frame, Event):
            self.listener.on_event(frame)
        elif isinstance(frame, Error) and self._requests.refuse(frame, self._reactor.seconds()):
            self._send()
        else:
            raise ProtocolError(f"an error answers no request: {getattr(frame, 'message', frame)}")

    def _handle_history(self, frame: History) -> None:
        new_log, last = self._cursor.greeted, self.last
        if self._cursor.history(frame):
            self._deliver(last, self.listener.on_history, frame)
        elif frame.entries:
            self._deliver(last, self.listener.on_entries, frame.end.epoch, frame.entries)
        if new_log:
            self._requests.repeat()
            self._send()
            return
        self._greeted()
        self._requests.connect()
        self._send()
        self.listener.on_connect()

    def _deliver(self, last: Id | None, callback: Callable[..., None], *received: Any) -> None:
        """Call the listener with what follows `last`; if it raises, the next connection begins there again."""
        try:
            callback(*received)
        except Exception:
            self._cursor.last = last
            raise

    def _send(self) -> None:
        """Send the requests that may be sent now, and schedule the next attempt."""
        if not self._cursor.greeted or not self.can_send:
            return  # the next connection sends them
        now = self._reactor.seconds()
        for text in self._requests.send(now):
            self.transmit(text)
        self._schedule(self._send, self._requests.wait(now))


class Connector(Timers):
    """Keeps a server connected, over as many connections as needed; it connects when `start` is called."""

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress | str,
        token: str | Callable[[], str] | None,
        backoff: Backoff | None,
        endpoint: IStreamClientEndpoint | None,
    ) -> None:
        Timers.__init__(self, reactor)
        self.address = ServerAddress.parse(address) if isinstance(address, str) else address
        self._token = token
        self._bearer: str | None = None
        """The newest token."""
        self._unauthorized = False
        """True if the server refused the newest token, before any history."""
        self._backoff = backoff or Backoff()
        self._endpoint = endpoint or self.address.endpoint(reactor)
        self._factory = ClientFactory(self, str(self.address), reactor)
        self._attempt: Deferred[Any] | None = None
        self._connection: ClientConnection | None = None
        self._closed: Deferred[None] = Deferred()
        self._end: Exception | None = None
        """The reason for which the client does not reconnect."""
        self.server: str | None = None
        """The name and version of the last server, such as `chatd/1.0.0`; None before the first connection."""

    # For its user

    def start(self) -> None:
        """Connect."""
        if not self._take_token():
            self._reconnect("there is no token", None)
            return
        self._attempt = self._endpoint.connect(self._factory)
        self._attempt.addErrback(self._connect_failed)

    def drop_connection(self) -> bool:
        """Abort the connection, as a bad network does, and reconnect; return whether there was a connection."""
        if self._connection is None:
            return False
        self._connection.abort()
        return True

    def stop(self) -> "Deferred[None]":
        """Close the connection; the Deferred fires when it is closed.  Pending requests fail with ClientStopped."""
        if self._end is None:
            self._end = ClientStopped("the client was stopped")
            for room in self._rooms():
                room.finish(self._end)
        if self._connection is not None:
            self._connection.close()
        elif not self._closed.called:
            self._schedule(self.start, None)
            if self._attempt is not None:
                self._attempt.cancel()
            self._closed.callback(None)
        return self._closed

    # For a subclass

    def _rooms(self) -> Sequence[RoomClient]:
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
        return self._connection is not None and self._connection.can_send

    def transmit(self, text: bytes) -> None:
        """Send a text frame; `can_send` must be true."""
        cast(ClientConnection, self._connection).sendMessage(text)

    # For its connections (ConnectionOwner)

    def target(self) -> tuple[str, int, str]:
        """Return the host, the port and the resource that a handshake names now."""
        return self.address.uri_host, self.address.port, self.address.resource(None)

    def headers(self) -> dict[str, str]:
        """Return the header that carries the token (RFC 6750, section 2.1)."""
        return {} if self._bearer is None else {"Authorization": f"Bearer {self._bearer}"}

    def connection_made(self, connection: ClientConnection) -> None:
        """Record a new connection, before its handshake."""
        self._attempt = None
        self._connection = connection

    def connection_opened(self) -> None:
        """React to a finished handshake."""

    def handle_text(self, text: bytes) -> str | None:
        """Handle a text frame; return the reason if the connection must be dropped."""
        try:
            try:
                self._receive(text)
            except ProtocolError as error:
                _logger.warn("{address}: {error}", address=self.address, error=error)
                for room in self._rooms():
                    room.listener.on_protocol_error(error)
                return "the server broke the protocol"
        except Exception:  # noqa: BLE001 -- Autobahn loses exceptions if the frame came with the handshake
            _logger.failure("{address}: a callback of the listener failed", address=self.address)
            return "a callback of the listener failed"
        return None

    def connection_lost(self, reason: str, retry_after: float | None) -> None:
        """Reconnect later, or finish if the client was stopped."""
        self._connection = None
        self._schedule(self._renew, None)
        for room in self._rooms():
            room.disconnected()
        if self._end is None:
            self._reconnect(reason, retry_after)
        else:
            self._closed.callback(None)

    def connection_rejected(self, error: Rejected) -> None:
        """Finish, because no other connection would succeed, unless another token may."""
        if self._may_succeed_later(error):
            self.connection_lost(str(error), None)
            return
        first = self._end is None
        self._end = self._end or error
        self.connection_lost(str(error), None)
        if first:
            for room in self._rooms():
                room.reject(error)

    def _may_succeed_later(self, error: Rejected) -> bool:
        """Return whether a new token may help: after one has expired, or when the first one is refused."""
        if not callable(self._token):
            return False
        expired = error.code == CloseCode.POLICY_VIOLATION and EXPIRED in str(error)
        refused = error.code == HTTPStatus.UNAUTHORIZED and not self._unauthorized
        self._unauthorized = self._unauthorized or refused
        return expired or refused

    def _take_token(self) -> bool:
        """Get the token for the next handshake or renewal; return False if its function raises."""
        try:
            self._bearer = self._token() if callable(self._token) else self._token
        except Exception:  # noqa: BLE001 -- it is the application's
            _logger.failure("{address}: the function that returns the token failed", address=self.address)
            return False
        return True

    def _schedule_renewal(self) -> None:
        """Renew the token before it expires, if a function returns the next one."""
        if callable(self._token):
            self._schedule(self._renew, seconds_to_renewal(self._bearer or "", time.time()))

    def _renew(self) -> None:
        if self._take_token() and self.can_send:
            self.transmit(token_text(self._bearer or ""))
        self._schedule_renewal()

    def _is_about_token(self, frame: Frame) -> bool:
        """Return whether a frame answers the renewal of the token."""
        if isinstance(frame, Error) and frame.label == RENEWAL_LABEL:
            _logger.warn("{address}: {reason}", address=self.address, reason=frame.message)
            return True
        return isinstance(frame, Event) and frame.type == "token"

    def _connect_failed(self, failure: Failure) -> None:
        self._attempt = None
        if self._end is None:
            error = getattr(failure.value, "osError", None)
            self._reconnect(os.strerror(error).lower() if error else failure.getErrorMessage().rstrip("."), None)

    def _reconnect(self, reason: str, retry_after: float | None) -> None:
        wait = self._backoff.next(retry_after)
        self._schedule(self.start, wait)
        for room in self._rooms():
            room.listener.on_disconnect(reason, wait)


class Client(Connector, RoomClient):
    """A member of one room, over as many connections as needed; it connects when `start` is called.

    `address` is a URL, or parsed; the constructor raises ValueError for a URL that ServerAddress.parse rejects.
    `last` is the last id of an earlier client, after which this one continues.
    `window` is the largest number of requests in flight; with 1 posts keep their order.
    `token` goes to a server that asks for one: a text, or a function that returns a valid one.  The client calls the
    function, which must not block, for each connection and before the token expires.
    `backoff` chooses the pauses between attempts to connect.
    `endpoint` connects elsewhere than to the host of the address, or is shared by many clients.
    `decode` parses frames; many clients in one process may share one that caches results.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress | str,
        listener: Listener,
        *,
        last: Id | None = None,
        window: int = WINDOW,
        token: str | Callable[[], str] | None = None,
        backoff: Backoff | None = None,
        endpoint: IStreamClientEndpoint | None = None,
        decode: Callable[[bytes], Frame] = parse_frame,
    ) -> None:
        RoomClient.__init__(self, reactor, listener, last, window)
        Connector.__init__(self, reactor, address, token, backoff, endpoint)
        self._decode = decode

    @override
    def target(self) -> tuple[str, int, str]:
        return self.address.uri_host, self.address.port, self.address.resource(self.last)

    @override
    def _rooms(self) -> Sequence[RoomClient]:
        return (self,)

    @override
    def _receive(self, text: bytes) -> None:
        frame = self._decode(text)
        if not self._is_about_token(frame):
            self._handle(frame)
