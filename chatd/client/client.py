"""The Python client on Twisted: it reads a room without loss, stores each post once, and reconnects by itself.

When a connection ends, the client pauses, reconnects with its last id, and repeats the requests that have
no answer.  If the server announces another log during a connection, the client starts over with that log.

A connection on which the server breaks the protocol is closed.  The next one repairs the damage: missing entries are
sent again, and repeated ones are not delivered.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.connection import ClientConnection, ClientFactory
from chatd.client.connector import ConnectorCore, SingleRoom
from chatd.client.core import Listener, RoomCore
from chatd.client.protocol import WINDOW, Backoff, Frame, History, Posted, checked_token, page_request, parse_frame
from chatd.messages import Id

_logger = Logger()


class RoomClient(RoomCore):
    """One room, whose requests are answered by Deferreds.

    A Deferred fails with Rejected if the server refuses the request or the client for good, and with ClientStopped
    after `stop`.
    """

    def post(self, username: str, message: str, extra: Mapping[str, Any] | None = None) -> "Deferred[Posted]":
        """Post a message, however many connections that takes; the Deferred fires when it is stored.

        `extra` are the fields that the server's own schema has besides.
        """
        return self._request({**(extra or {}), "username": username, "message": message})

    def edit(self, username: str, id_: Id, message: str, extra: Mapping[str, Any] | None = None) -> "Deferred[Posted]":
        """Replace the text of a message, of which the user of the token is the author or a moderator."""
        return self.post(username, message, {**(extra or {}), "replaces": str(id_)})

    def remove(self, id_: Id) -> "Deferred[Posted]":
        """Remove a message, of which the user of the token is the author or a moderator."""
        return self._request({"type": "remove", "id": str(id_)})

    def page(self, *, before: Id | None = None, after: Id | None = None, limit: int = 50) -> "Deferred[History]":
        """Read at most `limit` entries: the newest, or those before or after one id, but not both."""
        return self._request(page_request(before, after, limit))

    def _request(self, document: dict[str, Any]) -> "Deferred[Any]":
        answer: Deferred[Any] = Deferred()
        self.request(document, answer)
        return answer


class Connector(ConnectorCore):
    """Keeps a server connected, by Twisted."""

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress | str,
        token: str | Callable[[], str] | None,
        backoff: Backoff | None,
        endpoint: IStreamClientEndpoint | None,
    ) -> None:
        ConnectorCore.__init__(self, reactor, address, token, backoff)
        self._endpoint = endpoint or self.address.endpoint(reactor)
        self._factory = ClientFactory(self, str(self.address), reactor)
        self._attempt: Deferred[Any] | None = None
        self._connection: ClientConnection | None = None
        self._closed: Deferred[None] = Deferred()

    # For its user

    def drop_connection(self) -> bool:
        """Abort the connection, as a bad network does, and reconnect; return whether there was a connection."""
        if self._connection is None:
            return False
        self._connection.abort()
        return True

    def stop(self) -> "Deferred[None]":
        """Close the connection; the Deferred fires when it is closed.  Pending requests fail with ClientStopped."""
        self._stop()
        if self._connection is not None:
            self._connection.close()
        elif not self._closed.called:
            self._schedule(self.start, None)
            if self._attempt is not None:
                self._attempt.cancel()
            self._closed.callback(None)
        return self._closed

    # For its connections

    @override
    def _connect(self) -> None:
        taken = self._take_token()
        if self._end is not None:
            return  # on_attempt or the function that returns the token has stopped the client
        if not taken:
            self._reconnect("there is no token", None)
            return
        self._attempt = self._endpoint.connect(self._factory)
        self._attempt.addErrback(self._connect_failed)

    def _connect_failed(self, failure: Failure) -> None:
        self._attempt = None
        if self._end is None:
            error = getattr(failure.value, "osError", None)
            self._reconnect(os.strerror(error).lower() if error else failure.getErrorMessage().rstrip("."), None)

    def connection_made(self, connection: ClientConnection) -> None:
        """Record a new connection, before its handshake."""
        self._attempt = None
        self._connection = connection

    @override
    def _ended(self) -> None:
        self._connection = None

    @override
    def _finished(self) -> None:
        self._closed.callback(None)

    @property
    @override
    def can_send(self) -> bool:
        return self._connection is not None and self._connection.can_send

    @override
    def transmit(self, text: bytes) -> None:
        cast(ClientConnection, self._connection).sendMessage(text)

    @override
    def _probe(self) -> None:
        cast(ClientConnection, self._connection).probe()

    # Tokens

    def _take_token(self) -> bool:
        """Get the token for the next handshake or renewal; return False if its function raises."""
        try:
            self._bearer = checked_token(self._token() if callable(self._token) else self._token)
        except Exception:  # noqa: BLE001 -- it is the application's
            self.log_failure("the function that returns the token failed")
            return False
        return True

    @override
    def _renew(self) -> None:
        if self._take_token() and self.can_send:
            self._send_token()
        self._schedule_renewal()

    # The log

    @override
    def log_warning(self, text: str) -> None:
        _logger.warn("{address}: {text}", address=self.address, text=text)

    @override
    def log_failure(self, text: str) -> None:
        _logger.failure("{address}: {text}", address=self.address, text=text)


class Client(Connector, RoomClient, SingleRoom):
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
        RoomCore.__init__(self, reactor, listener, last, window)
        Connector.__init__(self, reactor, address, token, backoff, endpoint)
        self._decode = decode
