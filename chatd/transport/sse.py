"""Readers of Server-Sent Events (HTML Living Standard, section 9.2): members of rooms over plain HTTP.

A reader has a cursor in its room as WebSocket members have, and gets the same messages.  Only the form around
the JSON differs.

A reader of many rooms has a membership in each.  A browser reconnects with one id, the last one that it has received.
So each event of such a stream has the ids of all its rooms, as the reader has them after this event.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

from twisted.internet.interfaces import IPushProducer
from twisted.logger import Logger
from twisted.web.http import Request
from typing_extensions import override
from zope.interface import implementer

from chatd.room.moderation import Visitor
from chatd.room.registry import JoinTicket, Registry
from chatd.room.room import Room
from chatd.transport.admission import JoinRequest, server_stopping
from chatd.transport.connections import EVENT_STREAM, Connections, buffered
from chatd.transport.frames import event, shared_event
from chatd.transport.framing import CloseCode
from chatd.transport.http import RETRY_AFTER_SECONDS, SERVER
from chatd.transport.membership import Membership

MAX_STREAM_ROOMS = 50
"""The most rooms of one stream.  Each event has the ids of all of them."""

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
        self.member = self._membership(rooms)
        self.member.events = wanted.events
        self.member.name = wanted.username
        self.member.identity = wanted.identity
        address = request.getClientAddress()
        self.peer = f"{address.host}:{address.port}" if hasattr(address, "port") else str(address)
        self._channel.when_lost = self._client_left

    def _membership(self, rooms: Registry) -> Membership:
        return Membership(self, rooms, event)

    @property
    def buffered(self) -> int:
        return buffered(self._channel.transport)

    def join(self, ticket: JoinTicket) -> None:
        """Begin the stream with the history and join the room, unless the client or the server is leaving."""
        if self._open:
            self._begin()
            history = self.member.join(ticket)
            self._request.write(b"retry: %d\n\n%b" % (RETRY_AFTER_SECONDS * 1000, event(history)))
            self._begun()

    def _begin(self) -> None:
        """Set the headers of the stream; raise HttpError if the server is leaving."""
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

    def _begun(self) -> None:
        """Note that the client has joined; end the stream of one that sends nothing more."""
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


class _StreamPart(Membership):
    """The membership of a stream of many rooms in one of them."""

    __slots__ = ("_joint", "last", "wanted")

    def __init__(self, joint: "JointMembership", stream: "SharedStream", rooms: Registry, wanted: JoinRequest) -> None:
        super().__init__(stream, rooms)
        self._joint = joint
        self.form = self.event
        self.events = wanted.events
        self.name = wanted.username
        self.wanted = wanted.room
        self.last = "" if wanted.last is None else str(wanted.last)
        """The id that the client has of the room before it joins; empty for none."""

    @property
    @override
    def visitor(self) -> Visitor:
        return self._joint.visitor

    @override
    def send_frame(self, frame: bytes) -> None:
        self.write(self.event(frame))

    @override
    def detach(self) -> None:
        super().detach()
        self.form = None

    @property
    def id(self) -> str:
        """The id of the last message of the room that the client has."""
        return self.last if self.room is None else f"{self.room.epoch}-{self.cursor}"

    def event(self, frame: bytes) -> bytes:
        """Convert a frame of the room to an event; the other rooms stay where they are."""
        parts = self._joint.parts
        return shared_event(
            frame, cast(Room, self.room).addressed, lambda id_: [id_ if one is self else one.id for one in parts]
        )


class JointMembership(Membership):
    """The memberships of a stream of many rooms, as its connection sees them."""

    __slots__ = ("_order", "_ready", "parts")

    def __init__(self, stream: "SharedStream", rooms: Registry, wanted: Sequence[JoinRequest]) -> None:
        self.parts: Sequence[_StreamPart] = ()
        super().__init__(stream, rooms)
        self.room_name = ",".join(one.room for one in wanted)
        self.parts = [_StreamPart(self, stream, rooms, one) for one in wanted]
        self._order = deque(self.parts)
        """The rooms, the next one to be resumed first."""

    @property
    def ready(self) -> bool:
        """True while the transport takes more."""
        return self._ready

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._ready = ready
        for part in self.parts:
            part.ready = ready

    @property
    @override
    def joined(self) -> bool:
        return any(part.joined for part in self.parts)

    @override
    def memberships(self) -> Iterator[Membership]:
        yield from (part for part in self.parts if part.joined)

    @property
    @override
    def head(self) -> Any:
        return [part.head for part in self.parts]

    @override
    def has_pending(self, head: Any) -> bool:
        return any(part.has_pending(number) for part, number in zip(self.parts, head, strict=True))

    @override
    def resume(self) -> None:
        """Send again, with another room first each time, so that none fills the transport always."""
        self.ready = True
        self._order.rotate(-1)
        for part in self._order:
            part.resume()

    @override
    def leave(self) -> None:
        for part in self.parts:
            part.leave()

    @override
    def detach(self) -> None:
        for part in self.parts:
            part.detach()
        self.parts = ()
        self._order.clear()
        super().detach()


class SharedStream(EventStream):
    """The transport of one reader of many rooms."""

    member: JointMembership

    def __init__(
        self, request: Request, rooms: Registry, connections: Connections, wanted: Sequence[JoinRequest]
    ) -> None:
        self._wanted = wanted
        super().__init__(request, rooms, connections, wanted[0])
        self.begun = False
        """True when the client has joined a room."""

    @override
    def _membership(self, rooms: Registry) -> JointMembership:
        return JointMembership(self, rooms, self._wanted)

    def join_part(self, part: _StreamPart, ticket: JoinTicket) -> None:
        """Join one of the rooms, and send its history, unless the client or the server is leaving."""
        if not self._open:
            return
        if not self.begun:
            self._begin()
            self._request.write(b"retry: %d\n\n" % (RETRY_AFTER_SECONDS * 1000))
            self.begun = True
        part.send_frame(part.join(ticket))
        if part is self.member.parts[-1]:
            self._begun()
