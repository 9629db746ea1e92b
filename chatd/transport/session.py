"""The meaning of one client's frames: it posts, pages and types in the room that it is in.

A session checks each frame, hands posts to the log, and answers with an acknowledgement, a page or an
error.  A WebSocket connection holds one session.

A client that does not read its answers is not read either.  While a page is being fetched, or while
answers wait in the transport, the session reads nothing more, and holds the frames that have arrived.
"""

from collections import Counter, deque
from enum import Flag, auto
from math import ceil
from typing import Final, Protocol, TypeVar

from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Code, Id, PageRequest, Post, Typing
from chatd.room.log import EncodedPage, InDoubt, LabelReused, LogUnavailable, UnknownId
from chatd.room.registry import Registry
from chatd.room.room import Room
from chatd.transport.admission import Rate
from chatd.transport.frames import FrameError, ack_frame, error_frame, history_frame, parse
from chatd.transport.membership import Membership, MemberTransport

SCHEMA: Final = "schema"
"""The key of errors without a code in the count of refused frames: those that break their schema."""
NOT_STORED: Final = "The message was not stored; try again."
"""The error sent to the poster when the store fails; Code.UNAVAILABLE."""
IN_DOUBT: Final = "The message may not have been stored; try again with the same label."
"""The error sent to the poster when the store fails and may have stored the post; Code.UNAVAILABLE."""

_logger = Logger()
_T = TypeVar("_T")


class Pause(Flag):
    """The reasons for reading nothing from a client.

    Each reason is set and cleared on its own.  Frames that arrive meanwhile are held while a HOLDING reason
    is set.  The transport is read again when no reason is left.
    """

    NONE = 0
    FETCHING = auto()
    """A page is being read from the log."""
    BLOCKED = auto()
    """Answers wait in the transport."""
    FINISHED = auto()
    """The server drains, and reads no more."""
    HOLDING = FETCHING | BLOCKED


_UNPAUSED: Final = Pause.NONE  # each frame compares with it, and Python 3.11 computes `Pause.NONE` at every use


class SessionTransport(MemberTransport, Protocol):
    """The transport of a session."""

    def stop_reading(self) -> None:
        """Read no more from the client."""

    def read_on(self) -> None:
        """Read from the client again."""

    def fail_not_text(self) -> None:
        """Fail the connection, because a text frame is not UTF-8."""


def _is_text(text: bytes) -> bool:
    """Check that the payload of a refused frame is at least UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Session(Membership):
    """A membership whose client sends frames; it receives the outcome of its posts (chatd.room.log.Poster)."""

    __slots__ = ("_held", "_in_flight", "_pauses", "_rate", "_refusals", "due")
    _transport: SessionTransport

    def __init__(
        self, transport: SessionTransport, rooms: Registry, refusals: Counter[str], rate: Rate | None = None
    ) -> None:
        super().__init__(transport, rooms)
        self._refusals = refusals
        """Counts the refused frames, by the code of the error."""
        self._rate = rate
        """The rate limit, if there is one,"""
        self.due = 0.0
        """... and the state that it keeps of this client (admission.Paced)."""
        self._in_flight = 0
        """The number of posts that the log has yet to answer."""
        self._pauses = Pause.NONE
        self._held: deque[bytes] | None = None
        """Frames that arrived while a HOLDING reason was set."""

    @property
    @override
    def awaits_log(self) -> bool:
        return self.room is not None and (self._in_flight > 0 or Pause.FETCHING in self._pauses)

    @override
    def has_pending(self, head: int) -> bool:
        if self.room is None:
            return False
        return super().has_pending(head) or (Pause.FETCHING in self._pauses or bool(self._held) or self.room.owes(self))

    @override
    def leave(self) -> None:
        """Leave the room; posts that are held are still appended to the log."""
        room = self.room
        if room is None:
            return
        held, self._held = self._held, None
        for text in held or ():
            if self._wait():
                continue
            try:
                frame = parse(text)
            except FrameError:
                if _is_text(text):
                    continue
                break
            if isinstance(frame, Post):
                self._in_flight += 1
                self._rooms.post(room.name, frame, self)
        super().leave()

    # Reading

    @property
    def finished(self) -> bool:
        """True if a drain has ended the reading."""
        return Pause.FINISHED in self._pauses

    def finish(self) -> None:
        """Read no more from the client, for good."""
        self._pause(Pause.FINISHED)

    def block(self) -> None:
        """Read no more until the transport has taken the answers that wait in it."""
        self._pause(Pause.BLOCKED)

    def _pause(self, reason: Pause) -> None:
        self._pauses |= reason
        self._transport.stop_reading()

    def _go_on(self, reason: Pause) -> None:
        """Clear a reason, handle held frames until the next reason, and read on if no reason is set."""
        self._pauses &= ~reason
        while self._held and not self._pauses & Pause.HOLDING:
            self._take(self._held.popleft())
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
        """Handle the text of a frame, or hold it."""
        if self._pauses is _UNPAUSED or not self._pauses & Pause.HOLDING:
            self._take(text)
            return
        if self._held is None:
            self._held = deque()
        self._held.append(text)

    def _take(self, text: bytes) -> None:
        room = self.room
        if room is None:  # the connection is closing
            return
        wait = self._wait()
        try:
            frame = parse(text)
        except FrameError as error:
            self._refuse(text, error, wait)
            return
        if wait:
            if not isinstance(frame, Typing):
                self._limit(wait, frame.label)
        elif isinstance(frame, Post):
            if frame.username != self.name:
                self.name = frame.username
                room.presence.changed()
            self._in_flight += 1
            self._rooms.post(room.name, frame, self)
        elif isinstance(frame, PageRequest):
            self._page(room, frame)
        else:
            room.presence.typing(frame.username)

    def _wait(self) -> float:
        """Take a token of the rate limit; return 0.0, or the seconds until the next token."""
        return 0.0 if self._rate is None else self._rate.take(self)

    def _refuse(self, text: bytes, error: FrameError, wait: float) -> None:
        if not _is_text(text):
            self._held = None
            self._transport.fail_not_text()
            return
        _logger.info(
            "#{connection} {peer} in {room} sent an invalid frame",
            connection=self._transport.number,
            peer=self._transport.peer,
            room=self.room_name,
        )
        if wait:
            self._limit(wait, error.label)
        else:
            self._err(str(error), None, error.label)

    def _limit(self, wait: float, label: str | None) -> None:
        self._err("Rate limit exceeded", Code.RATE_LIMITED, label, ceil(wait * 1000) / 1000)

    def _err(self, message: str, code: Code | None, label: str | None, retry_after: float | None = None) -> None:
        self._refusals[code or SCHEMA] += 1
        self.send_frame(error_frame(message, code, label, retry_after))

    def _page(self, room: Room, request: PageRequest) -> None:
        reading = self._rooms.page(room.name, request)
        if not reading.called:
            self._pause(Pause.FETCHING)
        answered = reading.addCallbacks(self._paged, self._not_paged, callbackArgs=(request,), errbackArgs=(request,))
        answered.addBoth(self._page_done)

    def _paged(self, page: EncodedPage, request: PageRequest) -> None:
        if self.room is not None:
            more = page.older if request.after is None else page.newer
            self.send_frame(history_frame(self._rooms.epoch, page.end, page.frames, more=more, label=request.label))

    def _not_paged(self, failure: Failure, request: PageRequest) -> None:
        failure.trap(UnknownId, LogUnavailable)
        if self.room is None:
            return
        if failure.check(UnknownId):
            self._err("There is no message of this id.", Code.UNKNOWN_ID, request.label)
            return
        _logger.error("the log cannot be read: {error}", error=failure.value)
        self._err("The log cannot be read now; try again.", Code.UNAVAILABLE, request.label)

    def _page_done(self, result: _T) -> _T:
        if Pause.FETCHING in self._pauses:
            self._go_on(Pause.FETCHING)
        return result

    # chatd.room.log.Poster

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        """Acknowledge a post with a label, after the message itself."""
        self._in_flight -= 1
        room = self.room
        if post.label is None or room is None:
            return
        ack = ack_frame(Id(self._rooms.epoch, number), post.label, duplicate=duplicate)
        if duplicate:
            self.send_frame(ack)
            return
        room.acknowledge(self, number, ack)
        if not self.ready:
            self.block()

    def refused(self, post: Post, error: LogUnavailable | LabelReused) -> None:
        self._in_flight -= 1
        if self.room is None:
            return
        if isinstance(error, LabelReused):
            self._err("The label was given to another message.", Code.LABEL_REUSED, post.label)
        else:
            self._err(IN_DOUBT if isinstance(error, InDoubt) else NOT_STORED, Code.UNAVAILABLE, post.label)
