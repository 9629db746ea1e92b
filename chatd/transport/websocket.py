"""One WebSocket connection as a member of a room: Autobahn's protocol, and the factory that makes it.

Autobahn speaks WebSocket (RFC 6455) and this module adapts it to a session in a room: what comes in is
the session's, and what the room hands over goes to the transport.  Every connection to the port begins here; a
request that asks for no upgrade is handed, with all its bytes, to the web site, so that the
WebSocket connections, which are the many, have no HTTP machinery behind them.

Receiving.  A plain handshake and whole, masked text frames, which are nearly all that clients send,
are read by `chatd.fastpath`; everything else is Autobahn's, to answer and to refuse.  Autobahn
gives each connection some forty attributes, three Deferreds and a validator before anything has come:
here they are the class's, and a connection that needs one of its own makes it when it does.

Sending.  An idle TCP socket is written to at once, which costs one system call where Twisted's
buffered write costs three.  What the socket does not take goes into Twisted's buffer, and from
then on everything does, until that is empty and the transport, which knows us as its pull
producer, asks for more.  Other transports (TLS, a proxy protocol) buffer for themselves and are
told apart by type; they pause and resume us as a streaming producer.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from socket import socket
from typing import Any, Final, TypeVar, cast

import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.util import encode_truncate
from autobahn.websocket.types import ConnectionDeny, ConnectionRequest
from autobahn.websocket.utf8validator import Utf8Validator
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IProtocolNegotiationFactory, IPullProducer, IPushProducer, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from zope.interface import implementer

from chatd.messages import Code
from chatd.room.log import LogUnavailable
from chatd.room.registry import JoinTicket, Registry
from chatd.transport.admission import Admission, HttpError, JoinRequest, Rate, read_query
from chatd.transport.connections import (
    ABNORMAL,
    NOT_UTF8,
    OVERLOADED,
    POLICY,
    RESTART,
    UNSUPPORTED,
    WEBSOCKET,
    Connections,
)
from chatd.transport.framing import take_masked_texts
from chatd.transport.handshake import Upgrade, parse_upgrade, switch
from chatd.transport.http import HTTP_1_1, PROBLEM, RETRY_AFTER_SECONDS, SERVER, ChatSite, problem
from chatd.transport.session import SCHEMA, Session

SUBPROTOCOL: Final = "chat.v1"
"""Accepted when a client offers it, and not required."""
MAX_HEAD: Final = 16 << 10
"""Bytes of a request's head."""
MAX_MESSAGE: Final = 16 << 10
"""Bytes of a posted frame: 530 code points, each escaped in twelve bytes, fit twice."""
MAX_REASON: Final = 123
"""Bytes of the reason in a close frame (RFC 6455, section 5.5.1)."""
MAX_FRAGMENTS: Final = 128
"""WebSocket frames that one message may come in."""

_WEBSOCKET = re.compile(rb"\r\nupgrade:[^\r\n]*websocket", re.IGNORECASE)
_log = Logger()
_T = TypeVar("_T")


class _Never:
    """Stands for Autobahn's Deferreds of a connection's opening and end, which nobody here waits for."""

    def callback(self, result: object) -> None:
        """Nothing."""


@implementer(IPullProducer, IPushProducer)
class ChatConnection(Session, WebSocketServerProtocol):  # type: ignore[misc]  # Autobahn's bases disagree
    """A connection: a session, a member of its room, and one of the clients."""

    factory: "ChatFactory"
    carrier = WEBSOCKET
    transport: Any  # Twisted's have much that ITransport does not name
    fragments = 0
    answered = True
    """Whether the last ping was."""
    visit: JoinRequest
    opening: JoinTicket
    """What was asked for and what was found, from the admission until it is joined."""

    is_closed = is_open = _Never()
    # What Autobahn's handshake sets, as our short one leaves it.
    current_frame: Any = None
    inside_message = False
    websocket_version = 13
    _socket: socket | None = None
    """Where it may be written to at once."""

    def __init__(self) -> None:
        """Have nothing of one's own yet: see ChatFactory._lean."""

    @cached_property
    def utf8validator(self) -> Any:  # type: ignore[override]
        """Autobahn's, for messages that come in pieces."""
        return Utf8Validator()

    @property
    def peer(self) -> str:  # type: ignore[override]
        """Where the client is, as `HOST:PORT`."""
        peer = self.transport.getPeer()
        return f"{peer.host}:{peer.port}" if hasattr(peer, "port") else str(peer)

    # Coming

    def connectionMade(self) -> None:
        """A client is there: the time for its request begins."""
        transport = self.transport
        if isinstance(transport, Connection):
            self._socket = transport.socket
            with suppress(OSError):  # a Unix socket has no such option
                transport.setTcpNoDelay(True)
        self.factory.countConnections += 1
        self.factory.connections.handshakes.add(self)

    def buffered(self) -> None:
        """Write nothing at once: it would overtake what the transport holds."""
        self._socket = None

    def processHandshake(self) -> None:
        """Wait for the whole head of a request, and choose who answers it."""
        data = self.data
        end = data.find(b"\r\n\r\n")
        if end < 0 or end > MAX_HEAD:
            if len(data) > MAX_HEAD:
                self.failHandshake("the request's head is too long", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        upgrade = parse_upgrade(data[:end])
        if upgrade is not None:
            self._upgrade(upgrade, data[end + 4 :])
        elif _WEBSOCKET.search(data, 0, end):
            super().processHandshake()
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the web site have this connection, as if it had been there from the start."""
        self.factory.connections.handshakes.discard(self)
        self.factory.countConnections -= 1
        self.state = self.STATE_CLOSED
        channel = self.factory.site.buildProtocol(self.transport.getPeer())
        if isinstance(self.transport, ProtocolWrapper):
            self.transport.wrappedProtocol = channel
        else:
            self.transport.protocol = channel
        channel.makeConnection(self.transport)
        channel.dataReceived(self.data)

    def _upgrade(self, upgrade: Upgrade, rest: bytes) -> None:
        """Answer a plain handshake; what came behind it is kept for when it is answered."""
        self.data = rest
        admitted = maybeDeferred(self._admit, upgrade.path, upgrade.query, upgrade.origin, upgrade.protocols)
        admitted.addCallbacks(self._switch, self._deny, callbackArgs=(upgrade.key,))

    def _switch(self, protocol: str | None, key: str) -> None:
        self.state = self.STATE_OPEN
        self._join(switch(key, protocol, SERVER))
        if self.data:
            self.consumeData()

    def _deny(self, failure: Failure) -> None:
        failure.trap(ConnectionDeny)
        denied = cast(ConnectionDeny, failure.value)
        self.failHandshake(str(denied.reason), denied.code)

    def onConnect(  # type: ignore[override]  # Autobahn takes Deferreds too
        self, request: ConnectionRequest
    ) -> "Deferred[str | None]":
        """Autobahn found a handshake good."""
        path, _, query = self.http_request_uri.partition("?")
        return self._admit(path, query, request.headers.get("origin"), request.protocols)

    def _admit(self, path: str, query: str, origin: str | None, protocols: Sequence[str]) -> "Deferred[str | None]":
        """Find the room, at once if someone is in it; answers the subprotocol chosen, or ConnectionDeny."""
        try:
            visit = self.visit = self.factory.admission.visit(path, read_query(query), origin)
        except HttpError as refused:
            raise ConnectionDeny(refused.status.value, str(refused)) from None
        opening = self.rooms.open(visit.room, visit.last)
        if not opening.called:
            # What a client sends before it has its answer stays in its socket.
            self.transport.pauseProducing()
            opening.addBoth(self._resume_reading)
        chosen = SUBPROTOCOL if SUBPROTOCOL in protocols else None
        return opening.addCallbacks(self._opened, self._not_opened, callbackArgs=(chosen,))

    def _resume_reading(self, opened: _T) -> _T:
        self.transport.resumeProducing()
        return opened

    def _opened(self, opening: JoinTicket, chosen: str | None) -> str | None:
        if self.state != self.STATE_CONNECTING:
            raise ConnectionDeny(HTTPStatus.REQUEST_TIMEOUT.value, "the handshake took too long")
        if self.factory.connections.stopping:
            raise ConnectionDeny(HTTPStatus.SERVICE_UNAVAILABLE.value, "the server is about to stop")
        self.opening = opening
        return chosen

    def _not_opened(self, failure: Failure) -> None:
        failure.trap(LogUnavailable)
        _log.error("the log cannot be read: {error}", error=failure.value)
        raise ConnectionDeny(HTTPStatus.SERVICE_UNAVAILABLE.value, "the room cannot be read now")

    def failHandshake(self, reason: str, code: int = 400, responseHeaders: Any = None) -> None:
        """Refuse a handshake with a status, and a problem that says why."""
        if self.state == self.STATE_CLOSED:
            return
        # Not the reason, in which Autobahn quotes the request, with all the secrets that are in it.
        _log.info("{peer} refused: {code} {phrase}", peer=self.peer, code=int(code), phrase=HTTPStatus(code).phrase)
        self.factory.refused_handshakes[str(int(code))] += 1
        body = problem(HTTPStatus(code), reason)
        headers = [
            ("Content-Type", PROBLEM),
            ("Content-Length", len(body)),
            *(responseHeaders or []),
        ]
        if code == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("Retry-After", RETRY_AFTER_SECONDS))
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "GET"))
        lines = [f"HTTP/1.1 {int(code)} {HTTPStatus(code).phrase}", f"Server: {SERVER}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.sendData("\r\n".join([*lines, "", ""]).encode() + body)
        self.wasClean = True
        self.dropConnection()

    def onOpen(self) -> None:
        """Autobahn has answered a handshake."""
        self._join(b"")

    def _join(self, answer: bytes) -> None:
        """Send the answer to the handshake and the history, and join, all in one turn."""
        visit, opening = self.visit, self.opening
        del self.visit, self.opening
        self.room = opening.room
        self.ready = True  # its own, as is its cursor: what each pass looks at lies together
        if visit.events:
            self.events = visit.events
        if visit.username is not None:
            self.name = visit.username
        self.factory.connections.add(self)
        self.transport.registerProducer(self, self._socket is None)
        self.sendData(answer + opening.join(self))
        _log.info("#{connection} {peer} joined {room}", connection=self.connection, peer=self.peer, room=visit.room)

    # Receiving

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come: take the short way with those that it is for."""
        if self.state == self.STATE_OPEN and not self.inside_message and self.current_frame is None:
            if self.data:
                data = self.data + data
            texts, rest, more = take_masked_texts(data, MAX_MESSAGE)
            for text in texts:
                self.received(text)
            self.data = data[rest:]
            if self.data and not more:
                self.consumeData()
        else:
            self._dataReceived(data)

    def onMessageFrameBegin(self, length: int) -> None:
        """A fragment begins: they are counted, since empty ones would pass every limit in bytes."""
        super().onMessageFrameBegin(length)
        self.fragments += 1
        if self.fragments > MAX_FRAGMENTS and not self.failedByMe:
            self._fail_connection(POLICY, f"a message came in more than {MAX_FRAGMENTS} frames")

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A message has come the long way."""
        self.fragments = 0
        if isBinary:
            self._fail_connection(UNSUPPORTED, "only text frames are understood")
            return
        self.received(payload)

    def _fail_connection(self, code: int = POLICY, reason: str = "") -> None:
        """The client has broken the protocol: as Autobahn does, but for its line in the log, which names nobody."""
        if self.state == self.STATE_CLOSED:
            return
        _log.info(
            "#{connection} {peer} is failed: {code} {reason}",
            connection=self.connection,
            peer=self.peer,
            room=self.room and self.room.name,
            code=code,
            reason=reason,
        )
        self.failedByMe = True
        if self.state == self.STATE_CLOSING:
            self.dropConnection()
        else:
            self.sendCloseFrame(code, encode_truncate(reason, MAX_REASON))

    def not_text(self) -> None:
        """Session.not_text."""
        self._fail_connection(NOT_UTF8, "a text frame is not UTF-8")

    def stop_reading(self) -> None:
        """Session.stop_reading."""
        self.transport.pauseProducing()

    def read_on(self) -> None:
        """Session.read_on."""
        self.transport.resumeProducing()

    def onPong(self, payload: bytes) -> None:
        """The client lives."""
        self.answered = True

    # Sending

    def write(self, data: bytes) -> int:
        """Member.write."""
        if self._socket is None:
            self.transport.write(data)
            return len(data)
        try:
            return self._socket.send(data)
        except OSError:  # it is full; or gone, as the reactor will find when it tries to write the rest
            return 0

    def hold(self, rest: bytes) -> None:
        """Member.hold."""
        self.pauseProducing()
        self.transport.write(rest)

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        """All that is an answer passes here, and keeps its place among what the room sends."""
        if not self.ready:
            # Who does not read what he is answered is not read either, else his answers would pile up.
            self.transport.write(data)
            self.unread = True
            self.stop_reading()
        elif (taken := self.write(data)) < len(data):
            self.hold(data[taken:])

    def send_frame(self, frame: bytes) -> None:
        """Member.tell."""
        self.sendData(frame)

    def ping(self) -> bool:
        """Client.ping."""
        if not self.answered:
            return False
        self.answered = False
        self.sendPing()
        return True

    def pauseProducing(self) -> None:
        """IPushProducer: the transport is full."""
        self.ready = False
        self.factory.connections.stalls.add(self)

    def resumeProducing(self) -> None:
        """IPullProducer: the transport is empty."""
        self.ready = True
        self.factory.connections.stalls.discard(self)
        if self.unread:
            self.unread = False
            self.go_on()
        if self.state == self.STATE_CLOSING:  # the close frame is out by now
            self.factory.connections.closings.add(self)
        if self.room is not None and self in self.room.members:
            self.room.resume(self)

    def stopProducing(self) -> None:
        """IPullProducer: the transport is gone; onClose follows."""

    def evict(self) -> None:
        """Member.overrun."""
        self.close(OVERLOADED, "too slow: reconnect")

    # Going

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake, and read on, for the other half of it."""
        self.sendCloseFrame(code, reason.encode())
        if self._finished:
            self.read_on()

    def restart(self, retry_after: float) -> None:
        """Client.restart."""
        self.close(RESTART, f"retry_after={retry_after:.1f}")

    def abort(self) -> None:
        """End it without any handshake."""
        self.wasClean = True  # it was meant, and is nothing that Autobahn should warn of
        self.dropConnection(abort=True)

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Whoever began it: after the close frame nothing may be sent (RFC 6455, section 5.5.1)."""
        self.leave()
        self.factory.connections.pings.discard(self)
        super().sendCloseFrame(code, reasonUtf8, isReply)
        if self.state == self.STATE_CLOSING and not isReply and self.ready:
            self.factory.connections.closings.add(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone: Autobahn's adapter, without the lines for debugging that it composes."""
        self._connectionLost(reason)  # type: ignore[arg-type]  # so annotated there by mistake

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """The transport is gone."""
        self.leave()
        code = (self.localCloseCode if self.closedByMe else code) or ABNORMAL
        if self.factory.connections.remove(self, code):
            _log.info(
                "#{connection} {peer} left {room}: {code}",
                connection=self.connection,
                peer=self.peer,
                room=self.left,
                code=code,
            )


@implementer(IProtocolNegotiationFactory)
class ChatFactory(WebSocketServerFactory):
    """Makes the connections, and holds what they share."""

    noisy = False

    def __init__(
        self,
        *,
        rooms: Registry,
        connections: Connections,
        admission: Admission,
        site: ChatSite,
        reactor: IReactorTime,
        rate: Rate | None = None,
    ) -> None:
        # Autobahn's own few timers follow the same clock.
        txaio.config.loop = reactor  # type: ignore[attr-defined]
        super().__init__(server=SERVER, reactor=reactor)
        self.setProtocolOptions(
            failByDrop=False,  # a client that errs is told why
            maxFramePayloadSize=MAX_MESSAGE,
            maxMessagePayloadSize=MAX_MESSAGE,
            openHandshakeTimeout=0,  # see Clients
            closeHandshakeTimeout=0,
            allowNullOrigin=True,
        )
        self.connections = connections
        self.admission = admission
        self.site = site
        site.upgrade = self.take_back
        self.refused_handshakes: Counter[str] = Counter()
        """How many, by status."""
        self.refused_frames = Counter(dict.fromkeys([SCHEMA, *Code], 0))
        """How many, by the code of the error."""
        self.protocol = self._lean({"rooms": rooms, "rate": rate, "refusals": self.refused_frames})

    def acceptableProtocols(self) -> list[bytes]:
        """IProtocolNegotiationFactory: what is spoken under TLS (RFC 7301)."""
        return [HTTP_1_1]

    def take_back(self, transport: Any, data: bytes) -> None:
        """Have a connection that has served plain requests, and now begins with a handshake."""
        protocol = cast(ChatConnection, self.buildProtocol(transport.getPeer()))
        if isinstance(transport, ProtocolWrapper):
            transport.wrappedProtocol = protocol
        else:
            transport.protocol = protocol
        protocol.makeConnection(transport)
        protocol.buffered()  # the last answer may not be out yet
        protocol.dataReceived(data)

    def _lean(self, own: Mapping[str, Any]) -> type[ChatConnection]:
        """Make the class of this factory's connections: it has what Autobahn would give to each of them.

        That is some sixty attributes, 6 KB and most of the time that a connection takes to make.  All are
        the same until a connection gets a value of its own, so they are taken from one made Autobahn's way.
        """
        blank = WebSocketServerProtocol()
        blank.factory = self
        blank._connectionMade()  # noqa: SLF001 -- what Autobahn's adapter calls
        self.countConnections = 0
        shared = {
            # A function must not become a method.
            name: staticmethod(value) if callable(value) else value
            for name, value in vars(blank).items()
            if name not in vars(ChatConnection)
        }
        return type(ChatConnection.__name__, (ChatConnection,), {**shared, **own})
