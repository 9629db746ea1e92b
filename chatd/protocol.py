"""One WebSocket connection as a member of a room: Autobahn's protocol, and the factory that makes it.

Autobahn speaks WebSocket (RFC 6455) and this module adapts it to a room: what comes in is posted,
and what the room hands over goes to the transport.  Every connection to the port begins here; a
request that asks for no upgrade is handed, with all its bytes, to the web site, so that the
WebSocket connections, which are the many, have no HTTP machinery behind them.

Sending.  An idle TCP socket is written to at once, which costs one system call where Twisted's
buffered write costs three.  What the socket does not take goes into Twisted's buffer, and from
then on everything does, until that is empty and the transport, which knows us as its pull
producer, asks for more.  Other transports (TLS, a proxy protocol) buffer for themselves and are
told apart by type; they pause and resume us as a streaming producer.

Time.  Nothing here has a timer of its own: the factory looks once a second for handshakes that were
not finished, for connections that are due a ping or did not answer the last one, and for transports that
have taken nothing for too long.
"""

import re
from http import HTTPStatus
from typing import Any, Final, cast

import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.websocket.types import ConnectionDeny, ConnectionRequest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPullProducer, IPushProducer, IReactorTime
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from twisted.web.server import Site
from zope.interface import implementer

from chatd import frames
from chatd.deadlines import Deadlines
from chatd.frames import FrameError, Post
from chatd.rooms import MAIN, LogUnavailable, Room, Rooms
from chatd.web import SERVER

SUBPROTOCOL: Final = "chat.v1"
"""Accepted when a client offers it, and not required."""
MAX_HEAD: Final = 16 << 10
"""Bytes of a request's head."""
MAX_MESSAGE: Final = 16 << 10
"""Bytes of a posted frame: 530 code points, each escaped in twelve bytes, fit twice."""
MAX_FRAGMENTS: Final = 128
"""WebSocket frames that one message may come in."""
HANDSHAKE_SECONDS: Final = 10
"""How long a client may take to send its request, however it trickles in."""
PING_SECONDS: Final = 25
"""How often a client is pinged, below every load balancer's idle limit; the next ping is its deadline."""
STALL_SECONDS: Final = 40
"""How long a transport may take nothing at all."""
CLOSE_SECONDS: Final = 5
"""How long a client may take to answer a close."""
RETRY_SECONDS: Final = 2
"""When to try again a server whose log is down."""

UNSUPPORTED, NOT_UTF8, POLICY, RESTART, OVERLOADED = 1003, 1007, 1008, 1012, 1013

_WEBSOCKET = re.compile(rb"\r\nupgrade:[^\r\n]*websocket", re.IGNORECASE)
_log = Logger()


@implementer(IPullProducer, IPushProducer)
class ChatProtocol(WebSocketServerProtocol):
    """A connection: implements chatd.rooms.Member and chatd.rooms.Poster."""

    factory: "ChatFactory"
    transport: Any  # Twisted's have much that ITransport does not name
    cursor = 0
    ready = True
    room: Room | None = None
    fragments = 0
    answered = True
    """Whether the last ping was."""
    _direct = False

    # Coming

    def connectionMade(self) -> None:
        """The first of a connection: the time for its request begins."""
        super().connectionMade()
        self._direct = isinstance(self.transport, Connection)
        self.factory.handshakes.add(self)

    def processHandshake(self) -> None:
        """Wait for the whole head of a request, and choose who answers it."""
        end = self.data.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD:
            if len(self.data) > MAX_HEAD:
                self.failHandshake("the request's head is too long", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif _WEBSOCKET.search(self.data, 0, end):
            super().processHandshake()
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the web site have this connection, as if it had been there from the start."""
        self.factory.handshakes.discard(self)
        self.factory.countConnections -= 1
        self.state = self.STATE_CLOSED
        channel = self.factory.site.buildProtocol(self.transport.getPeer())
        if isinstance(self.transport, ProtocolWrapper):
            self.transport.wrappedProtocol = channel
        else:
            self.transport.protocol = channel
        channel.makeConnection(self.transport)
        channel.dataReceived(self.data)

    def onConnect(  # type: ignore[override]  # Autobahn takes Deferreds too
        self, request: ConnectionRequest
    ) -> "Deferred[str | None]":
        """Autobahn found the handshake good: wait for the room, which is there at once unless nobody is in it."""
        if request.path != "/":
            raise ConnectionDeny(HTTPStatus.NOT_FOUND, "there is no room here; connect to /")
        chosen = SUBPROTOCOL if SUBPROTOCOL in request.protocols else None
        # What a client sends before it has its answer stays in the socket.
        self.transport.pauseProducing()
        return self.factory.rooms.open(MAIN).addCallbacks(self._opened, self._not_opened, callbackArgs=(chosen,))

    def _opened(self, room: Room, chosen: str | None) -> str | None:
        if self.state != self.STATE_CONNECTING:
            raise ConnectionDeny(HTTPStatus.REQUEST_TIMEOUT, "the handshake took too long")
        self.room = room
        self.transport.resumeProducing()
        return chosen

    def _not_opened(self, failure: Failure) -> None:
        failure.trap(LogUnavailable)
        _log.error("the log cannot be read: {error}", error=failure.value)
        raise ConnectionDeny(HTTPStatus.SERVICE_UNAVAILABLE, "the room cannot be read now")

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: Any = None) -> None:
        """Refuse a handshake with a status, and the reason as text."""
        _log.info("{peer} refused: {code} {reason}", peer=self.peer, code=int(code), reason=reason)
        body = f"{reason}\n".encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", len(body)),
            *(responseHeaders or []),
        ]
        if code == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("Retry-After", RETRY_SECONDS))
        lines = [f"HTTP/1.1 {int(code)} {HTTPStatus(code).phrase}", f"Server: {SERVER}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.sendData("\r\n".join([*lines, "", ""]).encode() + body)
        self.wasClean = True
        self.dropConnection()

    def onOpen(self) -> None:
        """The handshake is answered: in the same turn send the history and join."""
        factory, room = self.factory, cast(Room, self.room)
        factory.handshakes.discard(self)
        factory.connections.add(self)
        factory.pings.add(self)
        self.transport.registerProducer(self, not self._direct)
        self.sendData(room.join(self))
        _log.info("{peer} joined {room}", peer=self.peer, room=room.name)

    # Receiving

    def onMessageFrameBegin(self, length: int) -> None:
        """A fragment begins: they are counted, since empty ones would pass every limit in bytes."""
        super().onMessageFrameBegin(length)
        self.fragments += 1
        if self.fragments > MAX_FRAGMENTS and not self.failedByMe:
            self._fail_connection(POLICY, f"a message came in more than {MAX_FRAGMENTS} frames")

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A whole message: post it, or say to this client alone why not."""
        self.fragments = 0
        if self.room is None:
            return
        if isBinary:
            self._fail_connection(UNSUPPORTED, "only text frames are understood")
            return
        try:
            post = frames.parse_post(payload)
        except FrameError as error:
            _log.info("{peer} posted what is refused", peer=self.peer)
            self.sendData(frames.error_frame(str(error)))
            return
        self.factory.rooms.post(self.room.name, post, self)

    def posted(self, post: Post, number: int) -> None:
        """Poster.posted: the message that comes back to its sender tells it."""

    def refused(self, post: Post, error: LogUnavailable) -> None:
        """Poster.refused."""
        if self.room is not None:
            text = "The message was not stored; try again."
            self.sendData(frames.error_frame(text, "UNAVAILABLE"))

    def onPong(self, payload: bytes) -> None:
        """The client lives."""
        self.answered = True

    # Sending

    def write(self, data: bytes) -> int:
        """Member.write."""
        if self._direct:
            taken = self.transport.writeSomeData(data)
            # A lost connection takes nothing; the reactor will notice when it tries to write the rest.
            return taken if isinstance(taken, int) else 0
        self.transport.write(data)
        return len(data)

    def hold(self, rest: bytes) -> None:
        """Member.hold."""
        self.pauseProducing()
        self.transport.write(rest)

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        """All that Autobahn sends passes here, and keeps its place among what the room sends."""
        if not self.ready:
            self.transport.write(data)
        elif (taken := self.write(data)) < len(data):
            self.hold(data[taken:])

    def pauseProducing(self) -> None:
        """IPushProducer: the transport is full."""
        self.ready = False
        self.factory.stalls.add(self)

    def resumeProducing(self) -> None:
        """IPullProducer: the transport is empty."""
        self.ready = True
        self.factory.stalls.discard(self)
        if self.room is not None and self in self.room.members:
            self.room.resume(self)

    def stopProducing(self) -> None:
        """IPullProducer: the transport is gone; onClose follows."""

    def overrun(self) -> None:
        """Member.overrun."""
        self.close(OVERLOADED, "too slow: reconnect")

    # Going

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake."""
        self.sendCloseFrame(code, reason.encode())

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Whoever began it: after the close frame nothing may be sent (RFC 6455, section 5.5.1)."""
        self._leave()
        super().sendCloseFrame(code, reasonUtf8, isReply)
        if self.state == self.STATE_CLOSING and not isReply:
            self.factory.closings.add(self)

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """The transport is gone."""
        factory = self.factory
        self._leave()
        for deadlines in (factory.handshakes, factory.closings, factory.stalls):
            deadlines.discard(self)
        if self in factory.connections:
            factory.connections.discard(self)
            _log.info("{peer} left: {code}", peer=self.peer, code=self.localCloseCode or code)
            factory.gone()

    def _leave(self) -> None:
        room, self.room = self.room, None
        if room is not None and self in room.members:
            self.factory.pings.discard(self)
            self.factory.rooms.leave(room, self)


class ChatFactory(WebSocketServerFactory):
    """Makes the connections, and holds what they share."""

    protocol = ChatProtocol  # type: ignore[assignment]

    def __init__(self, rooms: Rooms, site: Site, reactor: IReactorTime) -> None:
        # Autobahn's own few timers follow the same clock.
        txaio.config.loop = reactor  # type: ignore[attr-defined]
        super().__init__(server=SERVER, reactor=reactor)
        self.setProtocolOptions(
            failByDrop=False,  # a client that errs is told why
            maxFramePayloadSize=MAX_MESSAGE,
            maxMessagePayloadSize=MAX_MESSAGE,
            openHandshakeTimeout=0,  # see Deadlines
            closeHandshakeTimeout=0,
            allowNullOrigin=True,
        )
        self.rooms = rooms
        self.site = site
        self.connections: set[ChatProtocol] = set()
        self.handshakes: Deadlines[ChatProtocol] = Deadlines(HANDSHAKE_SECONDS, reactor)
        self.closings: Deadlines[ChatProtocol] = Deadlines(CLOSE_SECONDS, reactor)
        self.stalls: Deadlines[ChatProtocol] = Deadlines(STALL_SECONDS, reactor)
        self.pings: Deadlines[ChatProtocol] = Deadlines(PING_SECONDS, reactor)
        self._empty: list[Deferred[None]] = []

    def look(self) -> None:
        """Do what is due; to be called once a second."""
        for late, why in (
            (self.handshakes, "sent no whole request"),
            (self.closings, "did not answer the close"),
            (self.stalls, "took nothing"),
        ):
            for connection in late.expired():
                self._drop(connection, why)
        for connection in [*self.pings.expired()]:
            if connection.answered:
                connection.answered = False
                connection.sendPing()
                self.pings.add(connection)
            else:
                self._drop(connection, "did not answer a ping")

    def _drop(self, connection: ChatProtocol, why: str) -> None:
        _log.info("{peer} is dropped: it {why} in time", peer=connection.peer, why=why)
        connection.wasClean = True
        connection.dropConnection(abort=True)

    def close(self, code: int, reason: str) -> None:
        """Begin to close all connections."""
        for connection in [*self.connections]:
            connection.close(code, reason)

    def abort(self) -> None:
        """Drop those that are left, and the unfinished handshakes."""
        for connection in [*self.connections, *self.handshakes]:
            connection.wasClean = True
            connection.dropConnection(abort=True)

    def empty(self) -> "Deferred[None]":
        """Fires when there is no connection."""
        if not self.connections:
            return succeed(None)
        empty: Deferred[None] = Deferred()
        self._empty.append(empty)
        return empty

    def gone(self) -> None:
        """A connection is."""
        if not self.connections:
            waiting, self._empty = self._empty, []
            for empty in waiting:
                empty.callback(None)
