"""The place of one client in a room: the state that the room reads, and how the client joins and leaves.

A WebSocket connection and an event stream are transports.  Each holds one membership, and the membership
is what the room, the presence and the drain know.
"""

from collections.abc import Iterator
from typing import Any, Final, Protocol

from chatd.room.moderation import Sanction, Visitor
from chatd.room.registry import JoinTicket, Registry
from chatd.room.room import MemberForm, Room
from chatd.transport.admission import NO_EVENTS
from chatd.transport.framing import CloseCode
from chatd.transport.identity import ANYONE


class MemberTransport(Protocol):
    """The transport of one member."""

    number: int
    """The number of the connection in this process, for the log."""

    @property
    def peer(self) -> str:
        """The address of the client, as `HOST:PORT`."""

    def write(self, data: bytes) -> int:
        """Hand bytes to the transport, and return how many it took; raises OSError if it takes none now."""

    def hold(self, rest: bytes) -> None:
        """Keep the rest of a frame that write() cut, and pause the member until it is sent."""

    def send_frame(self, frame: bytes) -> None:
        """Send a frame that is not an entry, after everything sent before."""

    def evict(self) -> None:
        """Close the connection, because the client is too slow."""

    def ban(self, reason: str) -> None:
        """Close the connection, because the client is banned."""


class Membership:
    """Implements chatd.room.room.Member on top of a transport."""

    __slots__ = (
        *(
            "_rooms",
            "_transport",
            "address",
            "cursor",
            "events",
            "form",
            "identity",
            "name",
            "ready",
            "room",
            "room_name",
            "write",
        ),
    )

    def __init__(self, transport: MemberTransport, rooms: Registry, form: MemberForm = None) -> None:
        self._rooms = rooms
        self._transport = transport
        # A pass over the members reads the cursor, the form and `ready` of each, and calls write.  So `ready`
        # is a plain attribute, which the transport clears when it is full, and write is the method of the
        # transport itself.
        self.cursor = 0
        self.form: MemberForm = form
        self.ready = True
        self.write = transport.write
        self.events = NO_EVENTS
        self.name: str | None = None
        self.identity = ANYONE
        """The identity of the client, which a new token renews."""
        self.address: str | None = None
        """The IP address of the client; None over a Unix socket."""
        self.room: Room | None = None
        """The room, from join() to leave()."""
        self.room_name = ""
        """The name of the room, also after leave()."""

    @property
    def takes_events(self) -> bool:
        return self.ready

    @property
    def visitor(self) -> Visitor:
        """The client as sanctions see it; its name is that of its last post."""
        return Visitor(self.name, self.identity.subject, self.address)

    @property
    def joined(self) -> bool:
        """True while the client is in a room; it leaves before its connection closes."""
        return self.room is not None

    def memberships(self) -> "Iterator[Membership]":
        """Iterate over the memberships of the client: itself, while it is in a room."""
        if self.room is not None:
            yield self

    @property
    def head(self) -> Any:
        """The argument of has_pending(): the number of the newest entry in the room; 0 outside of a room."""
        return 0 if self.room is None else self.room.head

    @property
    def awaits_log(self) -> bool:
        """True while the log has yet to answer the client's own frames."""
        return False

    def has_pending(self, head: Any) -> bool:
        """Return whether the client has yet to get what `head` was, or an answer to its own frames."""
        return self.room is not None and bool(self.cursor < head)

    def join(self, ticket: JoinTicket) -> bytes:
        """Join the room of a ticket, and return the history frame that must be sent first."""
        frame = ticket.join(self)
        self.room = ticket.room
        self.room_name = ticket.room.name
        return frame

    def resume(self) -> None:
        """Send again, because the transport takes more."""
        self.ready = True
        if self.room is not None:
            self.room.resume(self)

    def leave(self) -> None:
        """Leave the room, if the client is in one."""
        room, self.room = self.room, None
        if room is not None:
            self._rooms.leave(room, self)

    def detach(self) -> None:
        """Leave the room and let go of the transport, which has ended.

        No cycle of references remains for the garbage collector.
        """
        self.leave()
        self._transport = GONE
        self.write = GONE.write

    # chatd.room.room.Member

    def hold(self, rest: bytes) -> None:
        self._transport.hold(rest)

    def send_frame(self, frame: bytes) -> None:
        self._transport.send_frame(frame)

    def start_over(self, history: bytes) -> None:
        self.send_frame(history)

    def evict(self) -> None:
        self._transport.evict()

    def ban(self, sanction: Sanction, words: str) -> None:
        """Close the connection, because the client is banned; the words are for the client."""
        self._transport.ban(words)


class _Gone:
    """The transport of a client that has disconnected: it takes every call and does nothing."""

    number = 0
    peer = ""

    def write(self, data: bytes) -> int:
        return len(data)

    def hold(self, rest: bytes = b"") -> None:
        """Do nothing."""

    send_frame = hold

    def evict(self) -> None:
        """Do nothing."""

    stop_reading = read_on = read_frames = renewed = evict

    def ban(self, reason: str) -> None:
        """Do nothing."""

    def fail(self, code: CloseCode, reason: str) -> None:
        """Do nothing."""

    def unread_texts(self) -> Iterator[bytes]:
        """Return no text."""
        return iter(())


GONE: Final = _Gone()
