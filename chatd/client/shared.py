"""The Python client in many rooms, over one connection.

Each room has a position, a listener and requests of its own, like a `Client`.  When a connection ends, the next one
joins each room again after its own last id.  When the server removes the client from a room because it reads too
slowly, the client joins that room again.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.client import Connector, RoomClient
from chatd.client.core import Listener
from chatd.client.protocol import (
    JOIN_LABEL,
    LEAVE_LABEL,
    RATE_LIMIT_PAUSE_SECONDS,
    WINDOW,
    Backoff,
    ClientStopped,
    Error,
    Frame,
    History,
    Left,
    ProtocolError,
    Rejected,
    join_text,
    leave_text,
    parse_addressed_frame,
)
from chatd.messages import Code, Id

TEMPORARY: frozenset[str | None] = frozenset((Code.RATE_LIMITED, Code.UNAVAILABLE))
"""The errors after which a later join may succeed; all others are final."""


class JoinedRoom(RoomClient):
    """One room of a SharedClient, which makes it: a member of the room, however many connections that takes."""

    def __init__(
        self,
        client: "SharedClient",
        name: str,
        listener: Listener,
        *,
        last: Id | None,
        events: Collection[str],
        username: str | None,
        window: int,
    ) -> None:
        super().__init__(client.reactor, listener, last, window)
        self.name = name
        self._client = client
        self._events = sorted(events)
        self._username = username
        self._asked = False
        """True while a join waits for its answer."""
        self._left: Deferred[None] | None = None
        """Fires when the room is left; None until the user asks for that."""

    def leave(self) -> "Deferred[None]":
        """Leave the room; the Deferred fires when no more of it is received.  Pending requests fail with ClientStopped.

        Wait for the answers to your posts first: the server stores the posts in flight, and does not acknowledge them.
        """
        if self._left is None:
            self._left = Deferred()
            self.finish(ClientStopped("the room was left"))
            self._schedule(self.join, None)
            if self.can_send and (self._asked or self._cursor.greeted):
                self._ask_to_leave()
            else:
                self._gone(self._left)
        return self._left

    def _ask_to_leave(self) -> None:
        if self.can_send:
            self.transmit(leave_text(self.name))

    def _gone(self, left: "Deferred[None]") -> None:
        self._client.forget(self)
        left.callback(None)

    # For its client

    @property
    @override
    def can_send(self) -> bool:
        return self._client.can_send

    @override
    def transmit(self, text: bytes) -> None:
        self._client.transmit(text)

    def join(self) -> None:
        """Join the room on this connection."""
        if self.can_send:
            self._asked = True
            self.transmit(join_text(self.name, self.last, self._events, self._username))

    @override
    def disconnected(self) -> None:
        super().disconnected()
        self._asked = False
        self._schedule(self.join, None)
        self._schedule(self._ask_to_leave, None)
        if self._left is not None:
            self._gone(self._left)

    @override
    def finish(self, error: Exception) -> None:
        super().finish(error)
        self._schedule(self._send, None)

    @override
    def reject(self, error: Rejected) -> None:
        self._client.forget(self)
        super().reject(error)

    @override
    def _greeted(self) -> None:
        self._asked = False
        self._client.greeted()

    @override
    def _addressed(self, document: dict[str, Any]) -> dict[str, Any]:
        return {"room": self.name, **document}

    def receive(self, frame: Frame) -> None:
        """Handle a frame of this room."""
        if isinstance(frame, Left):
            self._removed(frame)
        elif isinstance(frame, Error) and frame.label == JOIN_LABEL:
            self._not_joined(frame)
        elif isinstance(frame, Error) and frame.label == LEAVE_LABEL:
            self._not_left(frame)
        elif self._left is not None or (isinstance(frame, Error) and frame.code == Code.NOT_JOINED):
            pass  # the rest until the server confirms the leave; or requests that the next join repeats
        elif isinstance(frame, History) and frame.label == JOIN_LABEL:
            if not self._asked:
                raise ProtocolError(f"the room {self.name} was joined twice")
            self._handle(frame._replace(label=None))
        else:
            self._handle(frame)

    def _removed(self, frame: Left) -> None:
        """Join again after an eviction; give the room up if the server has removed the client for good."""
        self.disconnected()
        if self._left is not None:
            return
        if frame.code == Code.EVICTED:
            self.listener.on_disconnect(frame.message or "", 0.0)
            self.join()
        else:
            self.reject(Rejected(frame.message or "the server has ended the room", frame.code))

    def _not_joined(self, frame: Error) -> None:
        self._asked = False
        if self._left is not None:
            self._gone(self._left)
        elif frame.code in TEMPORARY:
            wait = frame.retry_after or RATE_LIMIT_PAUSE_SECONDS
            self.listener.on_disconnect(frame.message, wait)
            self._schedule(self.join, wait)
        else:
            self.reject(Rejected(frame.message, frame.code))

    def _not_left(self, frame: Error) -> None:
        """Repeat a leave above the rate; any other error answers a leave of a room that was ended before."""
        if self._left is not None and frame.code == Code.RATE_LIMITED:
            self._schedule(self._ask_to_leave, frame.retry_after or RATE_LIMIT_PAUSE_SECONDS)


class SharedClient(Connector):
    """A client in many rooms over one connection; it connects when `start` is called.

    `address` is the URL of a server, such as `ws://localhost:8085/connect`, or parsed.  `token`, `backoff`, `endpoint`
    and `decode` are as for `Client`.  A room can be joined and left at any time:

        client = SharedClient(reactor, "ws://localhost:8085/connect")
        team = client.join("team", listener)
        client.start()
        team.post("ann", "hi")
    """

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress | str,
        *,
        token: str | Callable[[], str] | None = None,
        backoff: Backoff | None = None,
        endpoint: IStreamClientEndpoint | None = None,
        decode: Callable[[bytes], tuple[str | None, Frame]] = parse_addressed_frame,
    ) -> None:
        super().__init__(reactor, address, token, backoff, endpoint)
        self.reactor = reactor
        self._decode = decode
        self._joined: dict[str, JoinedRoom] = {}

    # For its user

    def join(
        self,
        room: str,
        listener: Listener,
        *,
        last: Id | None = None,
        events: Collection[str] = (),
        username: str | None = None,
        window: int = WINDOW,
    ) -> JoinedRoom:
        """Join a room, now and on each later connection; raise ValueError if the client is in it.

        `last` is the last id of an earlier client in the room, after which this one continues.  `events` are those
        wanted besides entries: `presence` and `typing`.  `username` is the name in presence until the first post.
        `window` is the largest number of requests in flight.

        The listener learns of the room as that of a `Client` does.  Its `on_disconnect` is called also if the client
        will join this room again on the same connection, and `on_reject` if the server refuses the room for good.
        """
        if room in self._joined:
            raise ValueError(f"the client is in the room {room!r}")
        joined = JoinedRoom(self, room, listener, last=last, events=events, username=username, window=window)
        if self._end is not None:
            joined.finish(self._end)
            return joined
        self._joined[room] = joined
        joined.join()
        return joined

    # For its rooms

    def forget(self, room: JoinedRoom) -> None:
        """Forget a room that was left."""
        if self._joined.get(room.name) is room:
            del self._joined[room.name]

    def greeted(self) -> None:
        """Note that the server serves this client."""
        self._greeted()

    # For its connections

    @override
    def connection_opened(self) -> None:
        if not self._joined:
            self._greeted()
        for room in self._rooms():
            room.join()

    @override
    def _rooms(self) -> Sequence[JoinedRoom]:
        return [*self._joined.values()]

    @override
    def _receive(self, text: bytes) -> None:
        name, frame = self._decode(text)
        if name is not None:
            room = self._joined.get(name)
            if room is not None:
                room.receive(frame)
            elif not isinstance(frame, Left | Error):
                raise ProtocolError(f"a frame of the room {name}, in which the client is not")
        elif not self._is_about_token(frame):
            raise ProtocolError("a frame names no room")
