"""The meaning of one client's frames: it posts, pages, types and renews its token in the room that it is in.

A session checks each frame, hands posts to the log, and answers with an acknowledgement, a page or an
error.  A WebSocket connection holds one session.

A client that does not read its answers is not read either.  While a page is being fetched, or while
answers wait in the transport, the session reads nothing more.  A client that exceeds the rate gets one
error and is not read until the rate allows the next frame.  Frames that have arrived wait, in order, in
the transport.
"""

from collections.abc import Iterator
from enum import Flag, auto
from math import ceil
from typing import Any, Final, Protocol, TypeVar, cast

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Code, Id, PageRequest, Post, Renewal, Typing
from chatd.room.log import (
    EncodedPage,
    Forbidden,
    InDoubt,
    LabelReused,
    LogUnavailable,
    NotReplaceable,
    Refusal,
    UnknownId,
)
from chatd.room.moderation import Sanction, SanctionKind
from chatd.room.registry import JoinTicket, Registry
from chatd.room.room import Member, Room
from chatd.transport.admission import HttpError, JoinRequest, Rate
from chatd.transport.connections import WEBSOCKET
from chatd.transport.frames import FrameError, ack_frame, error_frame, history_frame, token_frame
from chatd.transport.framing import CloseCode
from chatd.transport.identity import ANYONE, Identity, refusal
from chatd.transport.intake import SCHEMA, Intake
from chatd.transport.limits import RATE_EXCEEDED, Place
from chatd.transport.membership import Membership, MemberTransport
from chatd.transport.moderator import sanction_words

MAX_REFUSALS: Final = 100
"""The number of refused frames in a row at which the connection is closed."""
LOG_SECONDS: Final = 60
"""The interval in which at most one line is logged about the refused frames of a connection."""
NOT_STORED: Final = "The message was not stored; try again."
"""The error sent to the poster when the store fails; Code.UNAVAILABLE."""
IN_DOUBT: Final = "The message may not have been stored; try again with the same label."
"""The error sent to the poster when the store fails and may have stored the post; Code.UNAVAILABLE."""
REFUSALS: Final[dict[type[Exception], tuple[Code, str]]] = {
    Forbidden: (Code.FORBIDDEN, "Only its author or a moderator may replace a message."),
    LabelReused: (Code.LABEL_REUSED, "The label was given to another message."),
    NotReplaceable: (Code.NOT_REPLACEABLE, "The message is an edit or was removed, and cannot be replaced."),
    UnknownId: (Code.UNKNOWN_ID, "There is no message of this id."),
}
"""The errors sent to the client when the log refuses what it sent."""

NEW_ROOMS_EXCEEDED: Final = "Too many new rooms"
"""The error sent to a poster whose address has created too many rooms; Code.RATE_LIMITED."""

Request = Post | PageRequest | Renewal | Typing
"""A valid frame of a client."""

_logger = Logger()
_T = TypeVar("_T")


class Pause(Flag):
    """The reasons for reading nothing from a client.

    Each reason is set and cleared on its own.  Frames that have arrived wait while a HOLDING reason is set.
    The transport is read again when no reason is left.
    """

    NONE = 0
    FETCHING = auto()
    """A page is being read from the log."""
    VERIFYING = auto()
    """A key for a new token is being fetched."""
    BLOCKED = auto()
    """Answers wait in the transport."""
    THROTTLED = auto()
    """The client exceeded the rate."""
    QUEUED = auto()
    """The frames that have arrived are handled in a later reactor turn."""
    FINISHED = auto()
    """The server drains, and reads no more."""
    EARLY = THROTTLED | QUEUED
    """The client sends more than the server reads now."""
    HOLDING = FETCHING | VERIFYING | BLOCKED | EARLY


_UNPAUSED: Final = Pause.NONE  # each frame compares with it, and Python 3.11 computes `Pause.NONE` at every use


class SessionTransport(MemberTransport, Protocol):
    """The transport of a session."""

    def stop_reading(self) -> None:
        """Read no more from the client."""

    def read_on(self) -> None:
        """Read from the client again."""

    def read_frames(self) -> None:
        """Handle the frames that have arrived, until one must wait."""

    def unread_texts(self) -> Iterator[bytes]:
        """Iterate over the texts of frames that have arrived and wait."""

    def fail(self, code: CloseCode, reason: str) -> None:
        """Fail the connection."""

    def renewed(self) -> None:
        """Take note that the session has a new identity."""


class Addressee(Protocol):
    """The place of a client in one room, to which its frames for that room and their answers belong."""

    room: Room | None
    """The room, as long as the client is in it."""
    name: str | None
    """The username by which others know the client there."""

    def send_frame(self, frame: bytes) -> None:
        """Send a frame that is not an entry."""

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        """Learn the outcome of a post (chatd.room.log.Poster)."""

    def refused(self, post: Post, error: Refusal) -> None:
        """Learn the outcome of a post (chatd.room.log.Poster)."""

    def ban(self, sanction: Sanction, words: str) -> None:
        """Close the connection or leave the room, because the client is banned."""


def is_pending(deferred: "Deferred[Any]") -> bool:
    """Return whether a Deferred has no result yet.

    One that waits for another Deferred, which a callback returned, counts as `called` and has no result.
    """
    return not deferred.called or bool(deferred.paused)


def _is_text(text: bytes) -> bool:
    """Check that the payload of a refused frame is at least UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Session(Membership):
    """A membership whose client sends frames; it receives the outcome of its posts (chatd.room.log.Poster)."""

    __slots__ = ("_in_flight", "_intake", "_pauses", "_quiet_until", "_refusals", "due", "place")
    _transport: SessionTransport

    def __init__(self, transport: SessionTransport, rooms: Registry, intake: Intake) -> None:
        super().__init__(transport, rooms)
        self._intake = intake
        self.due = 0.0
        """The state that the rate limit keeps of this client (admission.Paced)."""
        self.place: Place | None = None
        """The place of the client's address under the limits; None if no limit of an address applies."""
        self._in_flight = 0
        """The number of posts that the log has yet to answer."""
        self._pauses = Pause.NONE
        self._refusals = 0
        """The number of frames refused since the last accepted one."""
        self._quiet_until = 0.0
        """The time before which no further line is logged about refused frames."""

    def open(self, request: JoinRequest) -> "JoinTicket | Deferred[JoinTicket] | None":
        """Find the room of a client that connects, at once if it is open, or as Registry.open does; None: no room."""
        return self._rooms.ticket(request.room, request.last) or self._rooms.open(request.room, request.last)

    def begin(self, request: JoinRequest, ticket: JoinTicket | None) -> bytes:
        """Join the room, and return the history frame that must be sent first."""
        self.events = request.events
        self.name = request.username
        self.identity = request.identity
        return self.join(cast(JoinTicket, ticket))

    @property
    @override
    def awaits_log(self) -> bool:
        return self.joined and (self._in_flight > 0 or Pause.FETCHING in self._pauses)

    @override
    def has_pending(self, head: int) -> bool:
        room = self.room
        if room is None:
            return False
        return super().has_pending(head) or room.owes(self) or self._has_unanswered()

    def _has_unanswered(self) -> bool:
        """Return whether frames of the client that have arrived wait for their answers."""
        if Pause.FETCHING in self._pauses:
            return True
        return self.must_wait() and any(True for _ in self._transport.unread_texts())

    @override
    def leave(self) -> None:
        """Leave the room; posts that have arrived and wait are still appended to the log, within the rate."""
        if self.joined:
            self._append_unread()
            super().leave()

    def _append_unread(self) -> None:
        """Append the posts that have arrived and wait, within the rate."""
        for text in self._transport.unread_texts():
            if self._intake.rate is not None and self._intake.rate.take(self):
                break
            try:
                member, frame = self._read(text)
            except FrameError:
                if _is_text(text):
                    continue
                break
            room = member.room
            if (
                isinstance(frame, Post)
                and room is not None
                and refusal(self.identity, room.name, frame.username) is None
                and self._sanction(room, frame.username) is None
            ):
                if self._room_wait(room):
                    break
                self._append(member, room, frame)

    # Reading

    @property
    def finished(self) -> bool:
        """True if a drain has ended the reading."""
        return Pause.FINISHED in self._pauses

    @property
    def early(self) -> bool:
        """True while frames of the client wait for the rate or for the next reactor turn."""
        return bool(self._pauses & Pause.EARLY)

    def must_wait(self) -> bool:
        """Return whether frames that have arrived must not be handled now."""
        return self._pauses is not _UNPAUSED and bool(self._pauses & Pause.HOLDING)

    def finish(self) -> None:
        """Read no more from the client, for good."""
        self._pause(Pause.FINISHED)

    def read_again(self) -> None:
        """Undo finish(), because the client has a close to answer."""
        self._go_on(Pause.FINISHED)

    def block(self) -> None:
        """Read no more until the transport has taken the answers that wait in it."""
        self._pause(Pause.BLOCKED)

    def _pause(self, reason: Pause) -> None:
        self._pauses |= reason
        self._transport.stop_reading()

    def queue(self) -> None:
        """Handle the frames that have arrived in a later reactor turn."""
        self._pause(Pause.QUEUED)
        self._intake.turns.wait(lambda: self._go_on(Pause.QUEUED))

    def _go_on(self, reason: Pause) -> None:
        """Clear a reason, handle the frames that wait until the next reason, and read on if no reason is set."""
        self._pauses &= ~reason
        self._transport.read_frames()
        if self._pauses is Pause.NONE:
            self._transport.read_on()

    @override
    def resume(self) -> None:
        self.ready = True
        if self._pauses is not Pause.NONE and Pause.BLOCKED in self._pauses:
            self._go_on(Pause.BLOCKED)
        if self.room is not None:  # as in the base class, which would be one more call for each resume
            self.room.resume(self)

    # Frames

    def received(self, text: bytes) -> None:
        """Handle the text of a frame."""
        if not self.joined:  # the connection is closing
            return
        rate = self._intake.rate
        try:
            member, frame = self._read(text)
        except FrameError as error:
            wait = 0.0 if rate is None else rate.take(self)
            if not _is_text(text):
                self._transport.fail(CloseCode.INVALID_DATA, "a text frame is not UTF-8")
            elif wait:
                self._limit(self._addressee(error), wait, error.label)
            else:
                self._refuse(error)
            return
        wait = 0.0 if rate is None else self._charge(rate, frame)
        if wait:
            if isinstance(frame, Typing):
                self._throttle(wait)
            else:
                self._limit(member, wait, frame.label)
            return
        self._refusals = 0
        self._handle(member, frame)

    def _read(self, text: bytes) -> tuple[Addressee, Any]:
        """Parse the text of a frame, and find its room; raises FrameError as frames.parse does."""
        parse = self._intake.vocabulary.parse  # a local: Python 3.11 calls a function in an attribute slowly
        return self, parse(text)

    def _addressee(self, error: FrameError) -> Addressee:
        """Return the receiver of the error for a frame that breaks its schema."""
        return self

    def _charge(self, rate: Rate, frame: Any) -> float:
        """Take a token for a frame; return as Rate.take does."""
        return rate.take(self)

    def _handle(self, member: Addressee, frame: Any) -> None:
        """Handle a frame that the rate allows."""
        room = cast(Room, member.room)
        if isinstance(frame, Renewal):
            self._renew(frame)
        elif isinstance(frame, PageRequest):
            self._page(member, room, frame)
        elif sanction := self._sanction(room, frame.username):
            self._obey(member, sanction, frame)
        elif not self._may_post(member, room, frame):
            return
        elif isinstance(frame, Post):
            self._post(member, room, frame)
        else:
            room.presence.typing(frame.username)

    def _may_post(self, member: Addressee, room: Room, frame: Post | Typing) -> bool:
        """Return whether the client may post under a name; answer with an error if it may not."""
        if self.identity is ANYONE:
            return True
        reason = refusal(self.identity, room.name, frame.username)
        if reason is not None:
            self._err(member, reason, Code.FORBIDDEN, frame.label if isinstance(frame, Post) else None)
        return reason is None

    def _post(self, member: Addressee, room: Room, post: Post) -> None:
        wait = self._room_wait(room)
        if wait:
            self._err(member, NEW_ROOMS_EXCEEDED, Code.RATE_LIMITED, post.label, ceil(wait * 1000) / 1000)
            return
        if not post.removed:
            self._rename(member, room, post.username)
        self._append(member, room, post)

    def _room_wait(self, room: Room) -> float:
        """Return 0.0, or the seconds until the client may post the first message of its room."""
        return 0.0 if room.head else self._intake.limits.room_wait(self.place)

    def _sanction(self, room: Room, username: str) -> Sanction | None:
        """Return the sanction that forbids the client to post in a room under a name."""
        moderator = self._intake.moderator
        if not moderator.active:  # nearly always
            return None
        return moderator.find(room.name, self.visitor._replace(username=username or self.identity.username))

    def _obey(self, member: Addressee, sanction: Sanction, frame: Post | Typing) -> None:
        """Refuse a post of a sanctioned client, hide that it types, and remove a banned one."""
        moderator, words = self._intake.moderator, sanction_words(sanction)
        if isinstance(frame, Post):
            moderator.refusals[sanction.kind] += 1
            self._err(member, words, Code.FORBIDDEN, frame.label, moderator.retry_after(sanction))
        if sanction.kind is SanctionKind.BAN:
            member.ban(sanction, words)

    def _rename(self, member: Addressee, room: Room, username: str | None) -> None:
        if username != member.name:
            member.name = username
            room.presence.changed()

    def _append(self, member: Addressee, room: Room, post: Post) -> None:
        """Hand a post to the log, with its author."""
        self._in_flight += 1
        self._rooms.post(room.name, self.identity.sign(post, room.name), member)

    def _renew(self, renewal: Renewal) -> None:
        """Go on with a new token; a token that is refused leaves the old one in force."""
        tokens = self._intake.tokens
        if tokens is None:
            self._err(self, "This server takes no tokens.", Code.TOKEN_REFUSED, renewal.label)
            return
        verifying = maybeDeferred(tokens.verify, renewal.token)
        if is_pending(verifying):
            self._pause(Pause.VERIFYING)
        verifying.addCallbacks(
            self._renewed, self._not_renewed, callbackArgs=(renewal.label,), errbackArgs=(renewal.label,)
        ).addBoth(self._renewal_done)

    def _renewed(self, identity: Identity, label: str | None) -> None:
        if not self.joined:
            return
        if identity.subject != self.identity.subject:
            self._err(self, "The token is of another subject.", Code.TOKEN_REFUSED, label)
        elif self._keep_rooms(identity):
            self.identity = identity
            self._transport.renewed()
            self.send_frame(token_frame(identity.expires or 0.0, label))

    def _keep_rooms(self, identity: Identity) -> bool:
        """Stay in the rooms that a new token permits; return whether the connection stays open."""
        room = cast(Room, self.room)
        if not identity.may_read(room.name):
            self._transport.fail(CloseCode.POLICY_VIOLATION, "the token does not permit reading this room")
            return False
        sanction = self._sanction(room, identity.username or "")
        if sanction is not None and sanction.kind is SanctionKind.BAN:
            self._transport.fail(CloseCode.POLICY_VIOLATION, sanction_words(sanction))
            return False
        self._rename(self, room, identity.username)
        return True

    def _not_renewed(self, failure: Failure, label: str | None) -> None:
        failure.trap(HttpError)
        error = cast(HttpError, failure.value)
        if self.joined:
            self._err(self, f"The token is not accepted: {error}.", error.code, label)

    def _renewal_done(self, result: _T) -> _T:
        if Pause.VERIFYING in self._pauses:
            self._go_on(Pause.VERIFYING)
        return result

    def part_received(self) -> None:
        """Take a token for a frame that cannot be refused; above the rate, throttle the client."""
        rate = self._intake.rate
        wait = 0.0 if rate is None else rate.charge(self)
        if wait:
            self._throttle(wait)

    def _throttle(self, wait: float) -> None:
        """Stop reading until the rate allows the next frame."""
        self._intake.throttles[WEBSOCKET] += 1
        self._pause(Pause.THROTTLED)
        self._intake.clock.callLater(wait, self._go_on, Pause.THROTTLED)
        self._log_once("#{connection} {peer} in {room} exceeds the rate")

    def _limit(self, member: Addressee, wait: float, label: str | None) -> None:
        """Refuse a frame above the rate."""
        wait = ceil(wait * 1000) / 1000
        self._throttle(wait)
        if not self._is_last(Code.RATE_LIMITED):
            self._err(member, RATE_EXCEEDED, Code.RATE_LIMITED, label, wait)

    def _refuse(self, error: FrameError) -> None:
        """Refuse a frame that breaks its schema."""
        self._log_once("#{connection} {peer} in {room} sent an invalid frame")
        if not self._is_last(SCHEMA):
            self._err(self._addressee(error), str(error), None, error.label)

    def _is_last(self, reason: str) -> bool:
        """Count one more refused frame in a row; instead of an answer to the last one, close the connection."""
        self._refusals += 1
        if self._refusals < MAX_REFUSALS:
            return False
        self._intake.refusals[reason] += 1
        self._transport.fail(CloseCode.POLICY_VIOLATION, f"{MAX_REFUSALS} frames in a row were rejected")
        return True

    def _log_once(self, line: str) -> None:
        now = self._intake.clock.seconds()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_SECONDS
            _logger.info(
                line,
                connection=self._transport.number,
                peer=self._transport.peer,
                room=self.room_name,
            )

    def _err(
        self, member: Addressee, message: str, code: Code | None, label: str | None, retry_after: float | None = None
    ) -> None:
        self._intake.refusals[code or SCHEMA] += 1
        member.send_frame(error_frame(message, code, label, retry_after))

    def _page(self, member: Addressee, room: Room, request: PageRequest) -> None:
        asked = member, request
        reading = self._fetch(self._rooms.page(room.name, request))
        reading.addCallbacks(self._paged, self._not_paged, callbackArgs=asked, errbackArgs=asked)
        reading.addBoth(self._fetched)

    def _paged(self, page: EncodedPage, member: Addressee, request: PageRequest) -> None:
        if member.room is not None:
            more = page.older if request.after is None else page.newer
            member.send_frame(history_frame(self._rooms.epoch, page.end, page.frames, more=more, label=request.label))

    def _not_paged(self, failure: Failure, member: Addressee, request: PageRequest) -> None:
        failure.trap(UnknownId, LogUnavailable)
        if member.room is None:
            return
        if failure.check(UnknownId):
            code, words = REFUSALS[UnknownId]
            self._err(member, words, code, request.label)
            return
        _logger.error("the log cannot be read: {error}", error=failure.value)
        self._err(member, "The log cannot be read now; try again.", Code.UNAVAILABLE, request.label)

    def _fetch(self, reading: "Deferred[_T]") -> "Deferred[_T]":
        """Handle no further frame until a read of the log is done."""
        if is_pending(reading):
            self._pause(Pause.FETCHING)
        return reading

    def _fetched(self, result: _T) -> _T:
        if Pause.FETCHING in self._pauses:
            self._go_on(Pause.FETCHING)
        return result

    # chatd.room.log.Poster

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        self.stored(self, post, number, duplicate=duplicate)

    def refused(self, post: Post, error: Refusal) -> None:
        self.not_stored(self, post, error)

    # The outcomes of posts

    def stored(self, member: Addressee, post: Post, number: int, *, duplicate: bool) -> None:
        """Acknowledge a post with a label, after the message itself."""
        self._in_flight -= 1
        if number == 1 and not duplicate:
            self._intake.limits.room_created(self.place)
        room = member.room
        if post.label is None or room is None:
            return
        ack = ack_frame(Id(self._rooms.epoch, number), post.label, duplicate=duplicate)
        if duplicate:
            member.send_frame(ack)
            return
        room.acknowledge(cast(Member, member), number, ack)
        if not self.ready:
            self.block()

    def not_stored(self, member: Addressee, post: Post, error: Refusal) -> None:
        """Answer a post that the log refused."""
        self._in_flight -= 1
        if member.room is None:
            return
        if isinstance(error, LogUnavailable):
            self._err(member, IN_DOUBT if isinstance(error, InDoubt) else NOT_STORED, Code.UNAVAILABLE, post.label)
        else:
            code, words = REFUSALS[type(error)]
            self._err(member, words, code, post.label)
