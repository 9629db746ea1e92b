"""A reader of Server-Sent Events (HTML Living Standard, section 9.2): a member of a room over plain HTTP.

It has a cursor in the room as WebSocket members have, and gets the same messages.  Only the form around
the JSON differs.
"""

from typing import Any, cast

from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.web.http import Request
from zope.interface import implementer

from chatd.room.registry import JoinTicket, Registry
from chatd.transport.admission import JoinRequest, server_stopping
from chatd.transport.connections import EVENT_STREAM, Connections, buffered
from chatd.transport.frames import event
from chatd.transport.framing import CloseCode
from chatd.transport.http import RETRY_AFTER_SECONDS, SERVER
from chatd.transport.membership import Membership

_logger = Logger()


@implementer(IPushProducer)
class EventStream:
    """The transport of one reader (MemberTransport), and one of the Connections."""

    carrier = EVENT_STREAM
    number = 0

    def __init__(self, request: Request, rooms: Registry, connections: Connections, wanted: JoinRequest) -> None:
        self._request = request
        self._channel = cast(Any, request.channel)
        self._connections = connections
        self._open = True
        self._code = CloseCode.ABNORMAL
        self.member = Membership(self, rooms, event)
        self.member.events = wanted.events
        self.member.name = wanted.username
        self.member.identity = wanted.identity
        address = request.getClientAddress()
        self.peer = f"{address.host}:{address.port}" if hasattr(address, "port") else str(address)
        self._channel.when_lost = self._client_left

    @property
    def buffered(self) -> int:
        return buffered(self._channel.transport)

    def join(self, ticket: JoinTicket) -> None:
        """Begin the stream with the history and join the room, unless the client or the server is leaving."""
        if not self._open:
            return
        if self._connections.stopping:
            raise server_stopping()
        request = self._request
        request.setHeader("server", SERVER)
        request.setHeader("content-type", "text/event-stream")
        request.setHeader("cache-control", "no-store")
        request.setHeader("x-accel-buffering", "no")  # else nginx holds the events back
        request.registerProducer(self, streaming=True)
        self._channel.endless = True
        self._connections.add(self)
        history = self.member.join(ticket)
        request.write(b"retry: %d\n\n%b" % (RETRY_AFTER_SECONDS * 1000, event(history)))
        _logger.info(
            "#{connection} {peer} joined {room} for events",
            connection=self.number,
            peer=self.peer,
            room=self.member.room_name,
        )
        if self._channel.half_closed:
            self._channel.loseConnection()

    def write(self, data: bytes) -> int:
        """Write all of the bytes: the transport buffers what the socket does not take."""
        self._request.write(data)
        return len(data)

    def hold(self, rest: bytes) -> None:
        """Raise NotImplementedError: write() takes all bytes, so nothing remains to hold."""
        raise NotImplementedError

    def send_frame(self, frame: bytes) -> None:
        self._request.write(event(frame))

    def ping(self) -> bool:
        """Send a comment, and return True; a client that does not read comments stalls in the end."""
        if self.member.ready:
            self._request.write(b":\n\n")
        return True

    def pauseProducing(self) -> None:
        """IPushProducer: the transport is full."""
        self.member.ready = False
        self._connections.stalls.add(self)

    def resumeProducing(self) -> None:
        """IPushProducer: the transport takes more."""
        self._connections.stalls.discard(self)
        self.member.resume()

    def stopProducing(self) -> None:
        """IPushProducer: the transport has ended; _client_left() follows."""

    def expire(self) -> None:
        """End the stream; the client reconnects, and needs a new token."""
        self._end(CloseCode.POLICY_VIOLATION, b"")

    def evict(self) -> None:
        """End the stream; the client reconnects by itself, with its last id."""
        self._end(CloseCode.TRY_AGAIN_LATER, b"retry: 0\n\n")

    def ban(self, reason: str) -> None:
        """End the stream; the client reconnects by itself, is refused with the reason, and gives up."""
        self._end(CloseCode.POLICY_VIOLATION, b":\n\n")

    def finish(self) -> None:
        """Do nothing, because nothing is read from the client anyway."""

    def restart(self, retry_after: float) -> None:
        self._end(CloseCode.SERVICE_RESTART, b"retry: %d\n\n" % (retry_after * 1000))

    def _end(self, code: CloseCode, farewell: bytes) -> None:
        self.member.leave()
        if self._open:
            self._open = False
            self._code = code
            self._connections.pings.discard(self)
            if self.member.ready:
                self._connections.closings.add(self)
            self._request.write(farewell)
            self._request.unregisterProducer()
            self._channel.persistent = False
            self._request.finish()

    def abort(self) -> None:
        self._channel.transport.abortConnection()

    def _client_left(self) -> None:
        self._open = False
        self._request.producer = None  # no cycle of references remains
        self.member.detach()
        if self._connections.remove(self, self._code):
            room = self.member.room_name
            _logger.info("#{connection} {peer} left {room}", connection=self.number, peer=self.peer, room=room)
