"""Many rooms on one connection: a session whose subscriptions are members of their rooms.

A client connects to `/connect`, and joins and leaves rooms with frames.  A *subscription* is its place in one room: a
member with a cursor of its own, whose frames carry the name of the room.  All subscriptions of a connection share its
transport.

Only one of them can fill the transport.  A subscription that finds it full, or finds that others wait for it, waits in
the queue of the session and keeps its cursor.  When the transport has space, the first ones of the queue are served.
One that is cut goes to the end.  So no room keeps another from the transport, nothing is stored for a message that
waits, and a full transport costs the same however many rooms the connection is in.
"""

from http import HTTPStatus
from itertools import islice
from sys import intern
from typing import Any, Final, NamedTuple, cast

from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Code, Join, Leave, Post, Typing
from chatd.room.log import LogUnavailable, Refusal
from chatd.room.moderation import Sanction, SanctionKind, Visitor
from chatd.room.registry import JoinTicket, Registry, TooManyRooms
from chatd.room.room import LATER, Room
from chatd.transport.admission import SHARED_PATH, Admission, HttpError, JoinRequest, Rate
from chatd.transport.frames import (
    FrameError,
    addressed,
    each_frame,
    labelled,
    left_frame,
    parse_addressed,
)
from chatd.transport.identity import Identity
from chatd.transport.intake import Intake
from chatd.transport.limits import ROOMS
from chatd.transport.moderator import sanction_words
from chatd.transport.session import Addressee, Session, SessionTransport

MAX_SUBSCRIPTIONS: Final = 1_000
"""The most rooms of one connection.  With the default rate, one user of an application hardly needs more."""
GRANTS: Final = 16
"""The number of subscriptions at the front of the queue that are served together.

A reactor turn serves each of them once.  More of them empty a long queue in fewer turns; fewer are less work if the
first one fills the transport again.
"""

UNREADABLE: Final = "The token does not permit reading this room."
"""The error sent to a client that may not be in a room; Code.FORBIDDEN."""
UNREAD: Final = "The room cannot be read now; try again."
"""The error sent to a client that joins when the store fails; Code.UNAVAILABLE."""

_logger = Logger()


class Subscription:
    """The place of a shared connection in one room (chatd.room.room.Member, chatd.room.log.Poster)."""

    __slots__ = ("_session", "cursor", "events", "form", "name", "ready", "room")

    def __init__(self, session: "SharedSession", room: Room, events: frozenset[str], name: str | None) -> None:
        self._session = session
        self.cursor = 0
        self.events = events
        self.form = room.addressed
        self.name = name
        self.ready = True
        """False while the subscription waits in the queue of the session."""
        self.room: Room | None = room

    @property
    def room_name(self) -> str:
        """The name of the room."""
        return cast(Room, self.room).name

    @property
    def visitor(self) -> Visitor:
        """The client as sanctions see it in this room."""
        return self._session.visitor._replace(username=self.name)

    # chatd.room.room.Member

    def write(self, data: bytes) -> int:
        session = self._session
        if session.ready and not session.waiting:  # nearly always
            return session.write(data)
        return session.write_in_turn(self, data)

    def hold(self, rest: bytes) -> None:
        self._session.hold(rest)
        self._session.wait(self)

    def send_frame(self, frame: bytes) -> None:
        self._session.send_frame(b"".join(map(self.form, each_frame(frame))))
        self._session.turn_over(self)

    @property
    def takes_events(self) -> bool:
        return self._session.ready and not self._session.waiting

    def start_over(self, history: bytes) -> None:
        if self._session.ready:
            self.send_frame(history)
        else:  # the histories of all rooms would wait in the transport
            self._session.end(self, "The room has restarted: join it again.", Code.EVICTED)

    def evict(self) -> None:
        self._session.end(self, "Too slow: join the room again.", Code.EVICTED)

    def ban(self, sanction: Sanction, words: str) -> None:
        """Leave the room, or close the connection for a ban from all rooms."""
        self._session.ban_from(self, sanction, words)

    # chatd.room.log.Poster

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        self._session.stored(self, post, number, duplicate=duplicate)

    def refused(self, post: Post, error: Refusal) -> None:
        self._session.not_stored(self, post, error)


class Outsider(NamedTuple):
    """The addressee of answers to frames for a room that the connection is not in."""

    session: "SharedSession"
    room_name: str
    room: None = None

    def send_frame(self, frame: bytes) -> None:
        self.session.send_frame(addressed(self.room_name)(frame))


class SharedSession(Session):
    """The session of a connection that may be in many rooms.

    It is in no room itself: its subscriptions are.
    """

    __slots__ = ("_admission", "_is_open", "_joins", "subscriptions", "waiting")

    def __init__(self, transport: SessionTransport, rooms: Registry, intake: Intake, admission: Admission) -> None:
        super().__init__(transport, rooms, intake)
        self._admission = admission
        self._is_open = False
        self._joins = 0
        """The number of joins that took no token."""
        self.room_name = SHARED_PATH
        self.subscriptions: dict[str, Subscription] = {}
        """The rooms that the client is in, by name."""
        self.waiting: dict[Subscription, None] = {}
        """The subscriptions that wait to write, in order; those at the front that are ready are being served."""

    # The connection

    @override
    def open(self, request: JoinRequest) -> None:
        """Open no room: the client joins rooms later."""

    @override
    def begin(self, request: JoinRequest, ticket: JoinTicket | None) -> bytes:
        self.name = request.username
        self.identity = request.identity
        self._is_open = True
        return b""

    @property
    @override
    def joined(self) -> bool:
        """True from the handshake until the connection begins to close."""
        return self._is_open

    @override
    def memberships(self) -> Any:
        if self._is_open:
            yield self
            yield from (one for one in [*self.subscriptions.values()] if one.room is not None)

    @property
    @override
    def head(self) -> Any:
        return {one: cast(Room, one.room).head for one in self.subscriptions.values()}

    @override
    def has_pending(self, head: Any) -> bool:
        rooms = ((one, cast(Room, one.room)) for one in self.subscriptions.values())
        return self._is_open and (
            self._has_unanswered() or any(one.cursor < head.get(one, 0) or room.owes(one) for one, room in rooms)
        )

    @override
    def leave(self) -> None:
        if self._is_open:
            self._append_unread()
            self._is_open = False
            for one in [*self.subscriptions.values()]:
                self._remove(one)

    def _remove(self, one: Subscription) -> None:
        room, one.room = cast(Room, one.room), None
        del self.subscriptions[room.name]
        self._rooms.leave(room, one)
        self.turn_over(one)

    def end(self, one: Subscription, message: str, code: Code, retry_after: float | None = None) -> None:
        """Leave a room, and tell the client why."""
        self._leave(one, left_frame(None, message, code, retry_after))

    def _leave(self, one: Subscription, farewell: bytes) -> None:
        form = one.form
        self._remove(one)
        self.send_frame(form(farewell))

    def ban_from(self, one: Subscription, sanction: Sanction, words: str) -> None:
        """Remove a banned client from a room, or close its connection if the ban holds in all of them."""
        if sanction.room is None:
            self.ban(sanction, words)
        else:
            self.end(one, words, Code.FORBIDDEN, self._intake.moderator.retry_after(sanction))

    @override
    def _keep_rooms(self, identity: Identity) -> bool:
        self.name = identity.username
        for name, one in [*self.subscriptions.items()]:
            room = cast(Room, one.room)
            sanction = self._sanction(room, identity.username or "")
            if not identity.may_read(name):
                self.end(one, UNREADABLE, Code.FORBIDDEN)
            elif sanction is not None and sanction.kind is SanctionKind.BAN:
                one.ban(sanction, sanction_words(sanction))
                if not self._is_open:
                    return False
            else:
                self._rename(one, room, identity.username)
        return True

    # The queue

    @override
    def resume(self) -> None:
        super().resume()
        self._serve_waiting()

    def wait(self, one: Subscription) -> None:
        """Let a subscription wait: a new one at the end of the queue, and one that is in it at its place."""
        one.ready = False
        self.waiting.setdefault(one)

    def write_in_turn(self, one: Subscription, data: bytes) -> int:
        """Write for a subscription that is being served; let all others wait."""
        if not self.ready or one not in self.waiting:
            self.wait(one)
            return LATER
        del self.waiting[one]
        taken = self.write(data)
        if taken == len(data):
            self._serve_waiting()
        return taken

    def turn_over(self, one: Subscription) -> None:
        """Serve the next subscription, because one has sent a frame or left."""
        if one in self.waiting and (one.ready or one.room is None):
            del self.waiting[one]
            self._serve_waiting()

    def _serve_waiting(self) -> None:
        """Resume the subscriptions at the front of the queue, without those that are not behind any longer."""
        idle: list[Subscription] | None = None
        while self.ready and idle != []:
            idle = [one for one in islice(self.waiting, GRANTS) if not one.ready and not self._resume_one(one)]
            for one in idle:
                del self.waiting[one]

    @staticmethod
    def _resume_one(one: Subscription) -> bool:
        one.ready = True
        return cast(Room, one.room).resume(one)

    # Frames

    @override
    def _read(self, text: bytes) -> tuple[Addressee, Any]:
        room, frame = parse_addressed(text, self._intake.vocabulary)
        return self._in_room(room), frame

    @override
    def _addressee(self, error: FrameError) -> Addressee:
        return self._in_room(error.room)

    def _in_room(self, room: str | None) -> Addressee:
        return self if room is None else cast(Addressee, self.subscriptions.get(room) or Outsider(self, room))

    @override
    def _charge(self, rate: Rate, frame: Any) -> float:
        if not isinstance(frame, Join) or self._joins == MAX_SUBSCRIPTIONS:
            return rate.take(self)
        self._joins += 1
        return 0.0

    @override
    def _handle(self, member: Any, frame: Any) -> None:
        if isinstance(frame, Join):
            self._join(member, frame)
        elif isinstance(member, Outsider):
            label = None if isinstance(frame, Typing) else frame.label
            self._err(cast(Addressee, member), "The connection is not in this room.", Code.NOT_JOINED, label)
        elif isinstance(frame, Leave):
            self._leave(member, left_frame(frame.label))
        else:
            super()._handle(member, frame)

    def _join(self, member: Subscription | Outsider, frame: Join) -> None:
        if isinstance(member, Subscription):
            self._err(member, "The connection is in this room already.", Code.ALREADY_JOINED, frame.label)
            return
        if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            words = f"The connection is in {MAX_SUBSCRIPTIONS:,} rooms already."
            self._err(cast(Addressee, member), words, Code.TOO_MANY_ROOMS, frame.label)
            return
        try:
            self._intake.limits.check_joins(self.place)
        except HttpError as error:
            self._not_admitted(error, member, frame)
            self.part_received()
            return
        name = member.room_name
        username = self.identity.username or frame.username or self.name
        visitor = Visitor(username, self.identity.subject, self.address)
        try:
            self._admit(name, frame.username, visitor)
        except HttpError as error:
            self._not_admitted(error, member, frame)
            return
        opening = self._fetch(self._rooms.open(name, frame.last))
        opening.addCallback(self._opened, frame, visitor)
        opening.addErrback(self._not_opened, member, frame).addBoth(self._fetched)

    def _admit(self, name: str, username: str | None, visitor: Visitor) -> None:
        """Raise HttpError unless the client may join a room, as a handshake would."""
        if not self._admission.allows(name):
            raise HttpError(HTTPStatus.NOT_FOUND, "This server has no such room.", Code.FORBIDDEN)
        if not self.identity.may_read(name):
            raise HttpError(HTTPStatus.FORBIDDEN, UNREADABLE, Code.FORBIDDEN)
        if username and self.identity.username not in (None, username):
            raise HttpError(HTTPStatus.FORBIDDEN, "The username is not that of the token.", Code.FORBIDDEN)
        self._intake.limits.check_lateness()
        self._check_bans(name, visitor)

    def _check_bans(self, name: str, visitor: Visitor) -> None:
        """Raise HttpError 403 for a client that is banned from a room."""
        if self._intake.moderator.active:  # hardly ever
            self._intake.moderator.admit(name, visitor)

    def _opened(self, ticket: JoinTicket, frame: Join, visitor: Visitor) -> None:
        if not self._is_open:
            return
        room = ticket.room
        self._check_bans(room.name, visitor)
        one = Subscription(self, room, frame.events, visitor.username and intern(visitor.username))
        self.subscriptions[room.name] = one
        one.send_frame(labelled(ticket.join(one), frame.label))

    def _not_opened(self, failure: Failure, member: Outsider, frame: Join) -> None:
        if failure.check(TooManyRooms):
            limits = self._intake.limits
            failure = Failure(limits.refusal(ROOMS, HTTPStatus.SERVICE_UNAVAILABLE, "too many rooms are open"))
        if failure.check(LogUnavailable):
            _logger.error("the log cannot be read: {error}", error=failure.value)
            failure = Failure(HttpError(HTTPStatus.SERVICE_UNAVAILABLE, UNREAD, Code.UNAVAILABLE))
        failure.trap(HttpError)
        if self._is_open:
            self._not_admitted(cast(HttpError, failure.value), member, frame)

    def _not_admitted(self, error: HttpError, member: Outsider, frame: Join) -> None:
        wait = error.headers.get("Retry-After")
        self._err(cast(Addressee, member), str(error), error.code, frame.label, None if wait is None else float(wait))
