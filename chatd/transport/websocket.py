"""WebSocket connections, and the factory that makes them.

Every connection to the port begins here.  A request that asks for no WebSocket is handed to the web site,
so that WebSocket connections, which are the many, have no HTTP machinery.

A connection holds a session: the session gets the frames that arrive, and the connection sends what the
room and the session hand over.

An idle TCP socket is written to at once, which costs one system call where Twisted's buffered write costs
three.  The rest goes to Twisted's buffer.  From then on everything does, until the
buffer is empty and the transport, which has the connection as its pull producer, asks for more.  Other
transports (TLS, a proxy protocol) get all bytes, and pause and resume the connection as a streaming
producer.  TLS writes to an idle socket at once too.
"""

from collections import Counter
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolNegotiationFactory, IPullProducer, IPushProducer, IReactorTime
from twisted.internet.tcp import Connection as TcpConnection
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from typing_extensions import override
from zope.interface import implementer

from chatd.room.keyframes import COMPRESSIBLE, KeyframeStream
from chatd.room.log import LogUnavailable
from chatd.room.moderation import Visitor
from chatd.room.registry import JoinTicket, Registry
from chatd.transport.admission import (
    NO_EVENTS,
    SHARED_PATH,
    Admission,
    HttpError,
    JoinRequest,
    read_query,
    server_stopping,
)
from chatd.transport.autobahn_adapter import AutobahnConnection, AutobahnFactory
from chatd.transport.connections import WEBSOCKET, Connections, buffered
from chatd.transport.deflate import ANSWER, accepts
from chatd.transport.framing import EXPIRED, SUBPROTOCOL, CloseCode
from chatd.transport.handshake import Upgrade, read_upgrade, switch
from chatd.transport.heads import Head, take
from chatd.transport.http import HEAD, HTTP_1_1, SERVER, ChatSite, refusal
from chatd.transport.identity import Identity
from chatd.transport.limits import Place
from chatd.transport.proxied import ProxiedProtocol
from chatd.transport.session import Session, is_pending
from chatd.transport.subscription import SharedSession
from chatd.transport.tls import TlsServer
from chatd.transport.tokens import admit

_logger = Logger()
_T = TypeVar("_T")


@implementer(IPullProducer, IPushProducer)
class WebSocketConnection(AutobahnConnection):
    """A client over WebSocket: the transport of its session (SessionTransport), and one of the Connections."""

    factory: "ChatFactory"
    carrier = WEBSOCKET
    number = 0
    session: Session
    admitted: tuple[JoinRequest, JoinTicket | None]
    """The request and the ticket, from the admission until the client joins."""
    _held_back = False
    """True if bytes that follow a handshake have arrived before its turn."""
    _unanswered = False
    """True while a ping waits for its pong."""
    _arrival: Place | None = None
    """The place of the address of this connection, until a request arrives."""
    _direct = False
    """True if the socket itself is written to."""

    @property
    def member(self) -> Session:
        return self.session

    @property
    def buffered(self) -> int:
        return buffered(self.transport)

    # Opening

    @override
    def connectionMade(self) -> None:
        super().connectionMade()
        factory, transport = self.factory, self.transport
        if isinstance(transport, TcpConnection) and not isinstance(transport, TlsServer):  # that writes at once itself
            # The method of the socket itself, because one call more for each delivery is a part of its cost.
            self.write = transport.socket.send  # type: ignore[method-assign, assignment]
            self._direct = True
        self.session = Session(self, factory.rooms, factory.intake)
        factory.connections.handshakes.add(self)
        if not isinstance(transport, ProxiedProtocol):  # that one calls it when it knows the address
            self.arrive()

    def arrive(self) -> None:
        """Count the connection at its address, and drop it if too many there have sent no request."""
        limits = self.factory.intake.limits
        place = limits.arrive(self.transport.getPeer())
        if place is not None:
            self._arrival = place
            if limits.is_crowded(place):
                self.drop()

    def _settle(self) -> None:
        """Count the connection no longer among those that have sent no request."""
        place = self._arrival
        if place is not None:
            del self._arrival
            self.factory.intake.limits.settle(place)

    def buffer(self) -> None:
        """Write nothing to the socket itself: it would overtake what the transport holds."""
        if self._direct:
            del self.write, self._direct
            self.session.write = self.write

    @override
    def request_received(self, data: bytes) -> None:
        """Wait for the whole head of the request, and choose who answers it."""
        if self in self.factory.connections.asked:
            # These bytes follow the handshake, and some transports cannot be paused at once.
            self._held_back = True
            self.transport.pauseProducing()
            return
        try:
            head, rest = take(data)
        except HttpError as refused:
            self._refuse(refused, bodiless=data.startswith(HEAD))
            return
        self.keep(rest)
        if head is not None:
            self.head_received(head)

    def head_received(self, head: Head) -> None:
        """Answer a handshake, and hand any other request to the web site."""
        if not head.asks_for_websocket:
            self._hand_over(head)
        elif self.factory.intake.answers_promptly():
            self._answer(head)
        else:  # between the handshakes of a crowd the other clients are served
            self.factory.connections.asked.add(self)
            self.factory.intake.turns.wait(lambda: self._answer_in_turn(head))

    def _answer_in_turn(self, head: Head) -> None:
        self.factory.connections.asked.discard(self)
        if self._held_back:
            self._held_back = False
            self.transport.resumeProducing()
        if self.is_connecting:  # the client may have disconnected meanwhile
            self._answer(head)

    def _answer(self, head: Head) -> None:
        """Answer a handshake, at once if nothing has to be read or fetched, as is usual."""
        try:
            answer = self._admit(head)
        except HttpError as refused:
            self._refuse(refused, bodiless=head.method == "HEAD")
            return
        if isinstance(answer, bytes):
            self._switch(answer)
        else:
            answer.addCallbacks(self._switch, self._deny, errbackArgs=(head,))

    def _hand_over(self, head: Head) -> None:
        """Let the web site continue this connection, as if it had been there from the start."""
        self.factory.connections.handshakes.discard(self)
        self._settle()
        self.session.detach()
        rest = self.release_transport()
        channel = self.factory.site.buildProtocol(self.transport.getPeer())
        replace_protocol(self.transport, channel)
        channel.head_received(head)
        channel.dataReceived(rest)

    def _switch(self, answer: bytes) -> None:
        self.opened()
        self._join(answer)
        self.read_frames()

    def _deny(self, failure: Failure, head: Head) -> None:
        failure.trap(HttpError)
        self._refuse(cast(HttpError, failure.value), bodiless=head.method == "HEAD")

    def _refuse(self, refused: HttpError, *, bodiless: bool) -> None:
        """Answer with a problem that states the reason, and close the connection."""
        if self.is_connecting:
            # The log does not get the reason, which may quote the request with all its secrets.
            status = refused.status
            _logger.info("{peer} refused: {code} {phrase}", peer=self.peer, code=status.value, phrase=status.phrase)
            self.factory.refused_handshakes[str(status.value)] += 1
            self.refuse(refusal(refused, bodiless=bodiless))

    def _admit(self, head: Head) -> "bytes | Deferred[bytes]":
        """Find the room, at once if someone is in it; return the answer to the handshake, or raise HttpError."""
        factory, headers = self.factory, head.headers
        peer, forwarded = self.transport.getPeer(), headers.get("x-forwarded-for")
        self._settle()
        self.session.place = factory.intake.limits.enter(peer, forwarded)
        upgrade = read_upgrade(head)
        factory.admission.check_origin(upgrade.origin, headers["host"], headers.get("x-forwarded-host"))
        if upgrade.path == SHARED_PATH:
            request = self._share()
        else:
            request = factory.admission.join_request(upgrade.path, read_query(upgrade.query))
        self.session.address = factory.intake.moderator.address(peer, forwarded)
        chosen = SUBPROTOCOL if SUBPROTOCOL in upgrade.protocols else None
        extension = self._compress(upgrade) if upgrade.extensions else None
        answer = switch(upgrade.key, chosen, SERVER, extension)
        tokens = factory.intake.tokens
        if tokens is None:
            return self._open(request, answer)
        identity = tokens.identify(headers.get("authorization"), headers.get("cookie"), upgrade.protocols)
        if isinstance(identity, Identity):
            return self._open(admit(request, identity), answer)
        self._wait_for(identity)
        return identity.addCallback(lambda identity: self._open(admit(request, identity), answer))

    def _share(self) -> JoinRequest:
        """Let the connection be in many rooms."""
        place, factory = self.session.place, self.factory
        self.session = SharedSession(self, factory.rooms, factory.intake, factory.admission)
        self.session.place = place
        return JoinRequest("", None, NO_EVENTS, None)

    def _compress(self, upgrade: Upgrade) -> str | None:
        """Take and send compressed messages if the client offers it; return the answer to its offers.

        A connection that may be in many rooms has one window for them all, and no room can know what is in it.
        """
        if not self.factory.compress or upgrade.path == SHARED_PATH or not accepts(upgrade.extensions):
            return None
        self.session.form = COMPRESSIBLE
        return ANSWER

    def _open(self, request: JoinRequest, answer: bytes) -> "bytes | Deferred[bytes]":
        """Find the room; return the answer to the handshake, or raise HttpError."""
        self._check_sanctions(request)
        opening = self.session.open(request)
        if not isinstance(opening, Deferred):
            return self._opened(opening, request, answer)
        if is_pending(opening):
            self._wait_for(opening)
        return opening.addCallbacks(self._opened, self._not_opened, callbackArgs=(request, answer))

    def _check_sanctions(self, request: JoinRequest) -> None:
        """Raise HttpError 403 for a client that is banned from the room."""
        moderator = self.factory.intake.moderator
        if moderator.active:  # hardly ever
            visitor = Visitor(request.username, request.identity.subject, self.session.address)
            moderator.admit(request.room, visitor)

    def _wait_for(self, deferred: "Deferred[Any]") -> None:
        """Leave the frames that a client sends before it has its answer in its socket."""
        self.factory.connections.asked.add(self)
        self.transport.pauseProducing()
        deferred.addBoth(self._resume_reading)

    def _resume_reading(self, result: _T) -> _T:
        self.factory.connections.asked.discard(self)
        self.transport.resumeProducing()
        return result

    def _opened(self, ticket: JoinTicket | None, request: JoinRequest, answer: bytes) -> bytes:
        if not self.is_connecting:
            raise HttpError(HTTPStatus.REQUEST_TIMEOUT, "the handshake took too long")
        if self.factory.connections.stopping:
            raise server_stopping()
        self._check_sanctions(request)
        self.admitted = request, ticket
        return answer

    def _not_opened(self, failure: Failure) -> NoReturn:
        self.factory.intake.limits.too_many_rooms(failure).trap(LogUnavailable)
        _logger.error("the log cannot be read: {error}", error=failure.value)
        raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the room cannot be read now")

    def _join(self, answer: bytes) -> None:
        """Join, and send the answer to the handshake with the history, all in one reactor turn."""
        request, ticket = self.admitted
        del self.admitted
        history = self.session.begin(request, ticket)
        self.factory.connections.add(self)
        self.transport.registerProducer(self, not self._direct)
        self.send_frame(answer + history)
        room = self.session.room_name
        _logger.info("#{connection} {peer} joined {room}", connection=self.number, peer=self.peer, room=room)

    # Reading

    @property
    @override
    def takes_compressed(self) -> bool:
        return not self.is_connecting and isinstance(self.session.form, KeyframeStream)

    def stop_reading(self) -> None:
        self.transport.pauseProducing()

    def read_on(self) -> None:
        self.transport.resumeProducing()

    def finish(self) -> None:
        self.session.finish()

    @override
    def onPong(self, payload: bytes) -> None:
        self._unanswered = False

    # Writing

    def write(self, data: bytes) -> int:
        """Write all of the bytes: the transport buffers what it cannot send."""
        self.transport.write(data)
        return len(data)

    def hold(self, rest: bytes) -> None:
        self.session.ready = False
        self.factory.connections.stalls.add(self)
        self.transport.write(rest)

    @override
    def send_frame(self, frame: bytes) -> None:
        """Send an answer of Autobahn, the session or the room, in order with the entries of the room."""
        if not self.session.ready:
            # A client that does not take its answers is not read, so that they do not pile up.
            self.transport.write(frame)
            self.session.block()
            return
        try:
            taken = self.write(frame)
        except OSError:  # it is full, or gone, as the reactor finds when it writes the rest
            taken = 0
        if taken < len(frame):
            self.hold(frame[taken:])

    def ping(self) -> bool:
        # The pong may be behind frames that wait.  A client that sent them is alive.
        if self._unanswered and not self.session.early:
            return False
        self._unanswered = True
        self.sendPing()
        return True

    def pauseProducing(self) -> None:
        """IPushProducer: the transport is full."""
        self.session.ready = False
        self.factory.connections.stalls.add(self)

    def resumeProducing(self) -> None:
        """IPullProducer: the transport is empty."""
        session, connections = self.session, self.factory.connections
        connections.stalls.discard(self)
        if not session.joined and self.is_closing:  # the close frame is sent by now
            connections.closings.add(self)
        session.resume()

    def stopProducing(self) -> None:
        """IPullProducer: the transport has ended; closed() follows."""

    # Closing

    def renewed(self) -> None:
        self.factory.connections.expect_expiry(self)

    def expire(self) -> None:
        self.close(CloseCode.POLICY_VIOLATION, EXPIRED)

    def evict(self) -> None:
        self.close(CloseCode.TRY_AGAIN_LATER, "too slow: reconnect")

    def ban(self, reason: str) -> None:
        self.fail(CloseCode.POLICY_VIOLATION, reason)

    def restart(self, retry_after: float) -> None:
        self.close(CloseCode.SERVICE_RESTART, f"retry_after={retry_after:.1f}")

    def close(self, code: CloseCode, reason: str) -> None:
        """Begin the closing handshake, and read on for the answer to it."""
        self.sendCloseFrame(code, reason.encode())
        if self.session.finished:
            self.session.read_again()

    def abort(self) -> None:
        self.drop()

    @override
    def failing(self, code: int, reason: str) -> None:
        _logger.info(
            "#{connection} {peer} connection failed: {code} {reason}",
            connection=self.number,
            peer=self.peer,
            room=self.session.room_name,
            code=code,
            reason=reason,
        )

    @override
    def close_begins(self) -> None:
        """Leave the room: after the close frame nothing may be sent (RFC 6455, section 5.5.1)."""
        self.session.leave()
        self.factory.connections.pings.discard(self)

    @override
    def close_sent(self) -> None:
        if self.session.ready:
            self.factory.connections.closings.add(self)

    @override
    def closed(self, code: int) -> None:
        self.session.detach()
        self._settle()
        self.factory.intake.limits.leave(self.session.place)
        if self.factory.connections.remove(self, code):
            _logger.info(
                "#{connection} {peer} left {room}: {code}",
                connection=self.number,
                peer=self.peer,
                room=self.session.room_name,
                code=code,
            )


def replace_protocol(transport: Any, protocol: Any) -> None:
    """Let another protocol continue a connection."""
    if isinstance(transport, ProtocolWrapper):
        transport.wrappedProtocol = protocol
    else:
        transport.protocol = protocol
    protocol.makeConnection(transport)


@implementer(IProtocolNegotiationFactory)
class ChatFactory(AutobahnFactory[WebSocketConnection]):
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
        compress: bool = True,
    ) -> None:
        super().__init__(WebSocketConnection, SERVER, reactor)
        self.compress = compress
        """True if clients may get compressed messages."""
        self.rooms = rooms
        self.connections = connections
        self.admission = admission
        self.intake = site.intake
        self.site = site
        site.upgrade = self.take_back
        site.stalls = connections.stalls
        self.refused_handshakes: Counter[str] = Counter()
        """The number of refused handshakes, by status."""

    def acceptableProtocols(self) -> list[bytes]:
        """IProtocolNegotiationFactory: the protocols under TLS (RFC 7301)."""
        return [HTTP_1_1]

    def take_back(self, transport: Any, head: Head, rest: bytes) -> None:
        """Continue a connection that served plain requests and now begins a handshake."""
        connection = cast(WebSocketConnection, self.buildProtocol(transport.getPeer()))
        replace_protocol(transport, connection)
        connection.buffer()  # the last answer may still be in the transport
        connection.keep(rest)
        if connection.is_connecting:
            connection.head_received(head)
