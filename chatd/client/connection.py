"""One connection of the client, and everything that it relies on in Autobahn beyond the documented interface.

Autobahn speaks WebSocket (RFC 6455).  `ClientConnection` is its protocol class, which uses these of its internals:

- `CONFIG_ATTRS`: the names of the options that Autobahn copies to each connection, and formats for debugging, which
  takes 0.1 ms.  The connection copies them itself and leaves Autobahn an empty list.
- `_dataReceived`, `consumeData`, `data`, `inside_message` and `current_frame`: how Autobahn reads.  If it is between
  two frames and between two messages, `framing` reads whole, unmasked text frames, which are nearly all that a server
  sends.  Autobahn reads the others and refuses the invalid ones.
- `_connectionLost`: what Autobahn's `connectionLost` calls after it has composed lines for debugging.
- `failHandshake`, `http_status_line` and `http_headers`: the answer to a handshake.  Autobahn's callbacks report
  neither the status of a refusal nor its `Retry-After`.
- `sendCloseFrame`: begins the time limit of the closing handshake, whichever end starts it.
- `dropConnection` and `wasClean`: end a connection at once, without Autobahn's warning in the log.
- `state`: whether the opening handshake is finished and the closing one has not begun.
- `remoteCloseCode`, `remoteCloseReason` and `wasNotCleanReason`: how the connection ended.  `onClose` gets 1006 instead
  of the server's code if the connection did not end cleanly afterwards.

The unit tests fail if Autobahn drops or renames a name that is used here.
"""

import re
from typing import Any, Protocol

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from autobahn.wamp.types import TransportDetails
from autobahn.websocket.types import ConnectingRequest
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client.connector import Ending
from chatd.client.protocol import ANSWER_SECONDS, CLOSE_SECONDS, CONNECT_SECONDS, IDLE_SECONDS, SILENCE_SECONDS
from chatd.transport.framing import SUBPROTOCOL, CloseCode, take_texts

_STATUS = re.compile(r"HTTP/1\.1 (\d\d\d)(?: (.*))?")


class ConnectionOwner(Protocol):
    """The client, as its connections see it."""

    server: str | None

    def target(self) -> tuple[str, int, str]:
        """Return the host, the port and the resource that a handshake names now."""

    def headers(self) -> dict[str, str]:
        """Return the headers that a handshake has besides those of WebSocket."""

    def connection_made(self, connection: "ClientConnection") -> None:
        """Record a new connection, before its handshake."""

    def connection_opened(self) -> None:
        """React to a finished handshake."""

    def handle_text(self, text: bytes) -> str | None:
        """Handle a text frame; return the reason if the connection must be dropped."""

    def connection_ended(self, ending: Ending) -> None:
        """Reconnect later, or finish if no other connection would succeed."""


class ClientFactory(WebSocketClientFactory):
    """The factory of the connections of one client."""

    noisy = False

    def __init__(self, owner: ConnectionOwner, url: str, reactor: IReactorTime) -> None:
        super().__init__(url, protocols=[SUBPROTOCOL], reactor=reactor)
        self.owner = owner
        self.protocol = ClientConnection
        # Autobahn's own timers use one clock for the whole process, so this module has its own.
        self.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0, serverConnectionDropTimeout=0)
        self.options = {name: getattr(self, name) for name in WebSocketClientProtocol.CONFIG_ATTRS}


class ClientConnection(WebSocketClientProtocol):
    """One connection.  It parses whole text frames itself, which are nearly all, and leaves the others to Autobahn."""

    CONFIG_ATTRS: list[str] = []  # noqa: RUF012 -- Autobahn's type
    factory: ClientFactory
    transport: Any  # Twisted's transports have more than ITransport names
    refusal: Ending | None = None
    """The end by a refused handshake."""
    reason = ""
    """The reason for the end of the connection, if it is known."""

    @override
    def connectionMade(self) -> None:
        vars(self).update(self.factory.options)
        self.owner = self.factory.owner
        self._reactor = self.factory.reactor
        self._heard = self._reactor.seconds()
        self._deadline = self._reactor.callLater(CONNECT_SECONDS, self._check_silence)
        self._patience: float = CONNECT_SECONDS
        self.owner.connection_made(self)
        super().connectionMade()

    @override
    def onConnecting(self, transport_details: TransportDetails) -> ConnectingRequest:
        host, port, resource = self.owner.target()
        return ConnectingRequest(host, port, resource, self.owner.headers(), protocols=self.factory.protocols)

    @override
    def failHandshake(self, reason: str) -> None:
        status = _STATUS.match(self.http_status_line)
        if status and status[1] != "101":
            retry_after = self.http_headers.get("retry-after", "")
            self.refusal = Ending.refused(int(status[1]), status[2] or "", retry_after)
        self.abort(reason)

    @override
    def onOpen(self) -> None:
        self.owner.server = self.http_headers.get("server")
        self._expect(SILENCE_SECONDS)
        self.owner.connection_opened()

    @override
    def dataReceived(self, data: bytes) -> None:
        self._heard = self._reactor.seconds()
        if self.state == self.STATE_CONNECTING or self.inside_message or self.current_frame is not None:
            self._dataReceived(data)
            return
        if self.data:
            data = self.data + data
        texts, rest, more = take_texts(data)
        self.data = data[rest:]
        for text in texts:
            self.onMessage(text, isBinary=False)
        if self.data and not more:
            self.consumeData()

    @override
    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        if self.state == self.STATE_OPEN and (fault := self.owner.handle_text(payload)):
            self.abort(fault)

    @override
    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        super().sendCloseFrame(code, reasonUtf8, isReply)
        self._expect(CLOSE_SECONDS)

    @property
    def can_send(self) -> bool:
        """True while frames can be sent: after the opening handshake, before the closing one."""
        return bool(self.state == self.STATE_OPEN)

    def close(self) -> None:
        """Start the closing handshake, or abort if the connection never opened; it may be ending already."""
        if self.state == self.STATE_CONNECTING:
            self.abort()
        elif self.can_send:
            self.sendClose(CloseCode.NORMAL.value)  # Autobahn accepts plain integers only

    def abort(self, reason: str = "dropped by the client") -> None:
        """Drop the connection without a closing handshake."""
        self.reason = reason
        self.wasClean = True  # so that Autobahn does not warn of it
        self.dropConnection(abort=True)

    def probe(self) -> None:
        """Ping the server, and abort if it does not answer soon."""
        self.sendPing()
        self._heard = self._reactor.seconds() + ANSWER_SECONDS - SILENCE_SECONDS
        self._deadline.reset(ANSWER_SECONDS)

    def _expect(self, seconds: float) -> None:
        """Abort if nothing is received for so many seconds."""
        self._patience = seconds
        self._deadline.reset(min(seconds, IDLE_SECONDS))

    def _check_silence(self) -> None:
        """Ping a server that is idle, and abort if it is silent for too long."""
        idle = self._reactor.seconds() - self._heard
        if idle >= self._patience or self.state != self.STATE_OPEN:
            self.abort("the server did not answer in time")
            return
        if idle >= IDLE_SECONDS:
            self.sendPing()
        wait = (self._patience if idle >= IDLE_SECONDS else IDLE_SECONDS) - idle
        self._deadline = self._reactor.callLater(wait, self._check_silence)

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._deadline.active():
            self._deadline.cancel()
        self._connectionLost(reason)  # not Autobahn's adapter, which composes lines for debugging

    @override
    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        if self.remoteCloseCode is not None:
            ending = Ending.closed(self.remoteCloseCode, self.remoteCloseReason or "")
        else:
            ending = self.refusal or Ending(self.reason or self.wasNotCleanReason or "closed without a code")
        self.owner.connection_ended(ending)
