"""Everything that chatd relies on in Autobahn beyond its documented interface, each use with its reason.

Autobahn speaks WebSocket (RFC 6455).  `AutobahnConnection` is its protocol class, changed in four ways.

- A connection costs little.  Autobahn gives each connection some sixty attributes, three Deferreds and a
  validator before anything has arrived: 6 KB, and most of the time that a connection takes to make.  Here
  they belong to the class, and a connection that needs one of its own makes it then.
- The opening handshake is not Autobahn's: `heads` and `handshake` read it, as they read every request.
- Whole, masked text frames, which are nearly all that clients send, are read by `framing`, and inflated by
  `deflate` if they are compressed.  Autobahn reads the others and refuses the invalid ones.
- The subclass sees what it needs to see through the hooks at the top of the class, and every answer that
  Autobahn sends goes through its `send_frame`.

The unit tests fail if Autobahn drops or renames a name that is used here.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, Generic, Protocol, TypeVar

import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from autobahn.util import encode_truncate
from autobahn.websocket.utf8validator import Utf8Validator
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.transport.deflate import EXTENSION, InflatedTooLong, InflateError, inflate
from chatd.transport.frames import MAX_MESSAGE
from chatd.transport.framing import COMPRESSED_TEXT, MAX_REASON, CloseCode, Opcode, masked_text_at, masked_texts
from chatd.transport.intake import FRAMES_PER_LOOK, FRAMES_PER_TURN, SECONDS_PER_TURN

MAX_FRAGMENTS: Final = 128
"""The largest number of WebSocket frames in one message."""

_T = TypeVar("_T", bound="AutobahnConnection")


class _Ignored:
    """Stands for the Deferreds of a connection's opening and end, which nothing here waits for."""

    def callback(self, result: object) -> None:
        """Do nothing."""


class _Compressed:
    """Stands for Autobahn's compression of a connection: it lets compressed messages through, and keeps nothing.

    A message is inflated when all of it has arrived.
    """

    EXTENSION_NAME = EXTENSION

    def start_decompress_message(self) -> None:
        """Do nothing."""

    end_decompress_message = start_decompress_message

    def decompress_message_data(self, data: bytes, max_output_len: int) -> bytes:
        """Return the data as they are; `max_output_len` is at least their length."""
        return data


_COMPRESSED: Final = _Compressed()


class Receiver(Protocol):
    """The object that handles the frames of a connection."""

    def received(self, text: bytes) -> None:
        """Handle the text of a message."""

    def part_received(self) -> None:
        """Take note of a ping, a pong, a fragment that does not end its message, or a frame after the close frame."""

    def must_wait(self) -> bool:
        """Return whether frames that have arrived must not be handled now."""

    def queue(self) -> None:
        """Call read_frames() in a later reactor turn."""


class AutobahnConnection(WebSocketServerProtocol):
    """Autobahn's server protocol, which calls the hooks of a subclass."""

    session: Receiver
    transport: Any  # Twisted's transports have more than ITransport names

    # Autobahn fires these Deferreds.
    is_closed = is_open = _Ignored()
    # Autobahn's own handshake sets these; that of our subclass leaves them as they are.
    current_frame: Any = None
    inside_message = False
    websocket_version = 13
    max_message = MAX_MESSAGE
    """The largest size of a message in bytes."""
    _isMessageCompressed = False
    fragments = 0
    """The number of frames so far in the message that is being received."""

    def __init__(self) -> None:
        """Set no attribute: see AutobahnFactory."""

    # Hooks

    def request_received(self, data: bytes) -> None:
        """Handle the bytes of a request received so far."""
        raise NotImplementedError

    @property
    def takes_compressed(self) -> bool:
        """True if compressed messages are accepted (RFC 7692)."""
        raise NotImplementedError

    def send_frame(self, frame: bytes) -> None:
        """Send a frame, or the answer to a request, after everything that was sent before."""
        raise NotImplementedError

    def failing(self, code: int, reason: str) -> None:
        """Take note that the connection is about to be failed."""
        raise NotImplementedError

    def close_begins(self) -> None:
        """Take note that a close frame is about to be sent, by whichever end began the closing handshake."""
        raise NotImplementedError

    def close_sent(self) -> None:
        """Take note that a close frame was sent that the client has to answer."""
        raise NotImplementedError

    def closed(self, code: int) -> None:
        """Take note that the connection has ended; the code is ABNORMAL if no close frame was exchanged."""
        raise NotImplementedError

    # State

    @property
    def is_connecting(self) -> bool:
        """True until the handshake is finished."""
        return bool(self.state == self.STATE_CONNECTING)

    @property
    def is_closing(self) -> bool:
        """True while the closing handshake is under way."""
        return bool(self.state == self.STATE_CLOSING)

    @property
    @override
    def peer(self) -> str:  # type: ignore[override]  # Autobahn composes and stores it for each connection
        """The address of the client, as `HOST:PORT`."""
        peer = self.transport.getPeer()
        return f"{peer.host}:{peer.port}" if hasattr(peer, "port") else str(peer)

    @property
    def _perMessageCompress(self) -> Any:  # type: ignore[override]  # Autobahn stores it on each connection
        return _COMPRESSED if self.takes_compressed else None

    @cached_property
    def utf8validator(self) -> Any:  # type: ignore[override]  # Autobahn makes one for each connection
        """Check messages that arrive in several frames."""
        return Utf8Validator()

    # Opening

    @override
    def connectionMade(self) -> None:
        # Not Autobahn's, which would set all attributes; its connectionLost decrements the count.
        self.factory.countConnections += 1

    @override
    def processHandshake(self) -> None:
        self.request_received(self.data)

    def keep(self, rest: bytes) -> None:
        """Keep the bytes that follow a handshake until read_frames()."""
        self.data = rest

    def opened(self) -> None:
        """Take note that the handshake was answered."""
        self.state = self.STATE_OPEN

    def release_transport(self) -> bytes:
        """Forget the connection, which another protocol continues, and return what was received."""
        self.factory.countConnections -= 1
        self.state = self.STATE_CLOSED  # nothing that arrives late is read
        return self.data

    def refuse(self, answer: bytes) -> None:
        """Send the answer that refuses a request, and close the connection."""
        self.send_frame(answer)
        self.dropConnection()

    # Receiving

    @override
    def dataReceived(self, data: bytes) -> None:
        self.data = self.data + data if self.data else data
        if self.state in (self.STATE_OPEN, self.STATE_CLOSING):
            self.read_frames()
        else:
            self.consumeData()

    def read_frames(self) -> None:
        """Handle the frames in `data` until one must wait, or the budget of this turn is spent."""
        data, self.data = self.data, b""
        start, size, frames, session = 0, len(data), 0, self.session
        now = deadline = 0.0
        most = self.max_message
        between = self.state == self.STATE_OPEN and not self.inside_message and self.current_frame is None
        while start < size and not session.must_wait():
            if frames:
                if frames % FRAMES_PER_LOOK == 1:
                    now = self.factory.reactor.seconds()
                    deadline = deadline or now + SECONDS_PER_TURN
                if frames == FRAMES_PER_TURN or now > deadline:
                    session.queue()
                    break
            frames += 1
            text, after = masked_text_at(data, start, most) if between else (None, -1)
            if text is not None:
                start = after
                session.received(text)
            elif after == start:
                break
            else:
                data, start, going = self._read_otherwise(data, start, between=between)
                size = len(data)
                between = self.state == self.STATE_OPEN and not self.inside_message
                if not going:
                    break
        self.data = data[start:]

    def _read_otherwise(self, data: bytes, start: int, *, between: bool) -> tuple[bytes, int, bool]:
        """Handle a compressed text, or let Autobahn handle a frame.

        Return the bytes that remain, the offset to go on from, and whether to go on.
        """
        if between and data[start] == COMPRESSED_TEXT and self.takes_compressed:
            packed, after = masked_text_at(data, start, self.max_message, COMPRESSED_TEXT)
            if after >= 0:
                if packed is not None:
                    self._compressed_received(packed)
                return data, after, packed is not None
        self.data = data[start:]
        going = self.processData()  # a header, or as much of a payload as there is
        while going and self.current_frame is not None:
            going = self.processData()
        data, self.data = self.data, b""
        return data, 0, going and self.state != self.STATE_CLOSED

    def _compressed_received(self, payload: bytes) -> None:
        """Inflate the payload of a message, and handle its text."""
        try:
            text = inflate(payload, self.max_message)
        except InflatedTooLong as error:
            self.fail(CloseCode.MESSAGE_TOO_BIG, str(error))
        except InflateError as error:
            self.fail(CloseCode.INVALID_DATA, str(error))
        else:
            self.session.received(text)

    def _inflated(self, payload: bytes) -> bytes | None:
        """Inflate the payload of a message; None if that fails."""
        try:
            return inflate(payload, self.max_message)
        except InflateError:
            return None

    def unread_texts(self) -> Iterator[bytes]:
        """Iterate over the texts that have arrived and wait, unless the connection was failed."""
        between = not self.inside_message and self.current_frame is None
        data = self.data if between and not self.failedByMe else b""
        return masked_texts(data, self.max_message, self._inflated if self.takes_compressed else None)

    @override
    def onFrameBegin(self) -> None:
        super().onFrameBegin()
        frame = self.current_frame
        if self._isMessageCompressed:
            self.utf8validateIncomingCurrentMessage = False  # the frames of the session are checked
        # A message is counted once, when its last frame has arrived.
        if frame.opcode != Opcode.CLOSE and (
            frame.opcode > Opcode.CLOSE or not frame.fin or self.state != self.STATE_OPEN
        ):
            self.session.part_received()

    @override
    def onMessageFrameBegin(self, length: int) -> None:
        super().onMessageFrameBegin(length)
        # Empty fragments would pass every limit in bytes.
        self.fragments += 1
        if self.fragments > MAX_FRAGMENTS and not self.failedByMe:
            self.fail(CloseCode.POLICY_VIOLATION, f"a message came in more than {MAX_FRAGMENTS} frames")

    @override
    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.fragments = 0
        if isBinary:
            self.fail(CloseCode.UNSUPPORTED_DATA, "only text frames are understood")
        elif self._isMessageCompressed:
            self._compressed_received(payload)
        else:
            self.session.received(payload)

    # Sending

    @override
    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:
        # Not Autobahn's, which writes to the transport, whatever the room has handed to the socket.
        self.send_frame(data)

    # Closing

    def fail(self, code: int, reason: str) -> None:
        """Fail the connection (RFC 6455, section 7.1.7)."""
        if self.state == self.STATE_CLOSED:
            return
        self.failing(code, reason)
        self.failedByMe = True
        if self.state == self.STATE_CLOSING:
            self.dropConnection()
        else:
            self.sendCloseFrame(code, encode_truncate(reason, MAX_REASON))

    @override
    def _fail_connection(self, code: int = CloseCode.POLICY_VIOLATION, reason: str = "") -> None:
        # Autobahn calls this for each violation of the protocol, and would log a line without a name.
        self.fail(code, reason)

    @override
    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        # Autobahn's public sendClose accepts neither 1012 nor 1013.
        self.close_begins()
        super().sendCloseFrame(code, reasonUtf8, isReply)
        if self.state == self.STATE_CLOSING and not isReply:
            self.close_sent()

    def drop(self) -> None:
        """End the connection without a closing handshake."""
        self.dropConnection(abort=True)

    @override
    def dropConnection(self, abort: bool = False) -> None:
        self.wasClean = True  # else Autobahn logs a warning that does not name the connection
        super().dropConnection(abort)

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        # Not Autobahn's, which cancels timers that are never set here, and composes lines for debugging.
        self.state = self.STATE_CLOSED
        self.factory.countConnections -= 1
        self.closed((self.localCloseCode if self.closedByMe else self.remoteCloseCode) or CloseCode.ABNORMAL)


class AutobahnFactory(WebSocketServerFactory, Generic[_T]):
    """Autobahn's factory, whose connections share the attributes that Autobahn would give to each."""

    def __init__(self, connection: type[_T], server: str, reactor: IReactorTime) -> None:
        # The few timers of Autobahn follow the same clock.
        txaio.config.loop = reactor  # type: ignore[attr-defined]
        super().__init__(server=server, reactor=reactor)
        self.setProtocolOptions(
            echoCloseCodeReason=True,  # as RFC 6455, section 5.5.1, suggests, and browsers show
            failByDrop=False,  # a client that breaks the protocol gets the reason
            maxFramePayloadSize=MAX_MESSAGE,
            maxMessagePayloadSize=MAX_MESSAGE,
            openHandshakeTimeout=0,  # connections.Connections has all deadlines
            closeHandshakeTimeout=0,
        )
        self.protocol = self._lean(connection)

    def allow(self, max_bytes: int) -> None:
        """Accept messages of at most so many bytes from now on."""
        self.setProtocolOptions(maxFramePayloadSize=max_bytes, maxMessagePayloadSize=max_bytes)
        connection: Any = self.protocol
        connection.max_message = connection.maxFramePayloadSize = connection.maxMessagePayloadSize = max_bytes

    def _lean(self, connection: type[_T]) -> type[_T]:
        """Derive the class of the connections, which has what Autobahn sets on each of them.

        All values are the same until a connection gets one of its own, so they are taken from a connection
        that is made in Autobahn's way.
        """
        blank = WebSocketServerProtocol()
        blank.factory = self
        blank._connectionMade()  # noqa: SLF001 -- Autobahn's connectionMade calls it
        self.countConnections = 0
        shared = {
            # A function must not become a method.
            name: staticmethod(value) if callable(value) else value
            for name, value in vars(blank).items()
            if name not in vars(AutobahnConnection)
        }
        return type(connection.__name__, (connection,), shared)
