"""What a client's frames mean: it posts, it reads back, it types, in the room that it is in.

A session judges what has come, hands posts to the log, and answers: with an acknowledgement, a page or an error.
It is one client's, whatever carries it; the transport is whoever inherits from it.

One that does not read its answers is not read either: while a page is fetched, or answers wait to be taken, nothing
more is read, and what has come already is held until then.
"""

from collections import Counter, deque
from collections.abc import Callable
from math import ceil
from typing import Final, TypeVar

from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.messages import Code, Id, PageRequest, Post, Typing
from chatd.room.log import EncodedPage, InDoubt, LabelReused, LogUnavailable, UnknownId
from chatd.room.registry import Registry
from chatd.room.room import Room
from chatd.transport.admission import Rate
from chatd.transport.frames import FrameError, ack_frame, error_frame, history_frame, parse

SCHEMA: Final = "schema"
"""Stands for the code of an error that has none, which is what breaks its schema."""
NOT_STORED: Final = "The message was not stored; try again."
IN_DOUBT: Final = "The message may not have been stored; try again with the same label."
"""What is said to who posted, when the log fails; Code.UNAVAILABLE."""

_log = Logger()
_T = TypeVar("_T")


def _is_text(text: bytes) -> bool:
    """Whether something that is no good frame is at least UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Session:
    """Implements chatd.log.Poster, and the half of chatd.room.Member that is no transport."""

    rooms: Registry
    refusals: Counter[str]
    """How many frames were refused, by the code of the error."""
    rate: Rate | None = None
    """How fast it may send; None: as it likes."""
    due = 0.0
    connection = 0
    cursor = 0
    ready = True
    room: Room | None = None
    left = ""
    """The name of the room that it was in."""
    events: frozenset[str] = frozenset()
    name: str | None = None
    form: Callable[[bytes], bytes] | None = None
    unread = False
    """Whether nothing is read from the client, because its answers wait."""
    _paging = False
    """Whether nothing is, because a page is fetched for it."""
    _held: deque[bytes] | None = None
    """What came with that and waits."""
    _finished = False
    """Whether nothing more is to be read from the client."""

    # What its transport does

    @property
    def peer(self) -> str:
        """Where the client is, for the log."""
        raise NotImplementedError

    def send_frame(self, frame: bytes) -> None:
        """Send a frame, after what was sent before."""
        raise NotImplementedError

    def write(self, data: bytes) -> int:
        """Member.write."""
        raise NotImplementedError

    def hold(self, rest: bytes) -> None:
        """Member.hold."""
        raise NotImplementedError

    def evict(self) -> None:
        """Member.overrun."""
        raise NotImplementedError

    def stop_reading(self) -> None:
        """Take no more from the transport."""
        raise NotImplementedError

    def read_on(self) -> None:
        """Take more again."""
        raise NotImplementedError

    def not_text(self) -> None:
        """What came is not UTF-8: end the connection."""
        raise NotImplementedError

    # Being there

    @property
    def joined(self) -> bool:
        """Whether it is a member of a room."""
        return self.room is not None and self in self.room.members

    @property
    def head(self) -> int:
        """Client.head."""
        return 0 if self.room is None else self.room.head

    def has_pending(self, head: int) -> bool:
        """Client.owed."""
        if self.room is None:
            return False
        return self.cursor < head or self._paging or bool(self._held) or self.room.owes(self)

    def finish(self) -> None:
        """Client.finish."""
        self._finished = True
        self.stop_reading()

    def leave(self) -> None:
        """Leave the room; what had come by then is still posted."""
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
                self.rooms.post(room.name, frame, self)
        self.room, self.left = None, room.name
        if self in room.members:
            self.rooms.leave(room, self)

    # What comes

    def received(self, text: bytes) -> None:
        """A text has come."""
        if self.unread or self._paging:
            if self._held is None:
                self._held = deque()
            self._held.append(text)
        else:
            self._take(text)

    def go_on(self) -> None:
        """What was waited for is there: take what was held, and read on unless something must be waited for again."""
        while self._held and not (self.unread or self._paging):
            self._take(self._held.popleft())
        if not (self.unread or self._paging or self._finished):
            self.read_on()

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
                self._hurry(wait, frame.label)
        elif isinstance(frame, Post):
            if frame.username != self.name:
                self.name = frame.username
                room.presence.changed()
            self.rooms.post(room.name, frame, self)
        elif isinstance(frame, PageRequest):
            self._page(room, frame)
        else:
            room.presence.typing(frame.username)

    def _wait(self) -> float:
        """Take a frame's token; answers 0.0, or in how many seconds there is one."""
        return 0.0 if self.rate is None else self.rate.take(self)

    def _refuse(self, text: bytes, error: FrameError, wait: float) -> None:
        if not _is_text(text):
            self._held = None
            self.not_text()
            return
        _log.info(
            "#{connection} {peer} in {room} sent what is refused",
            connection=self.connection,
            peer=self.peer,
            room=self.room and self.room.name,
        )
        if wait:
            self._hurry(wait, error.label)
        else:
            self._err(str(error), None, error.label)

    def _hurry(self, wait: float, label: str | None) -> None:
        self._err("Rate limit exceeded", Code.RATE_LIMITED, label, ceil(wait * 1000) / 1000)

    def _err(self, message: str, code: Code | None, label: str | None, retry_after: float | None = None) -> None:
        self.refusals[code or SCHEMA] += 1
        self.send_frame(error_frame(message, code, label, retry_after))

    def _page(self, room: Room, request: PageRequest) -> None:
        reading = self.rooms.page(room.name, request)
        if not reading.called:
            self._paging = True
            self.stop_reading()
        answered = reading.addCallbacks(self._paged, self._not_paged, callbackArgs=(request,), errbackArgs=(request,))
        answered.addBoth(self._page_done)

    def _paged(self, page: EncodedPage, request: PageRequest) -> None:
        if self.room is not None:
            more = page.older if request.after is None else page.newer
            self.send_frame(history_frame(self.rooms.epoch, page.end, page.frames, more=more, label=request.label))

    def _not_paged(self, failure: Failure, request: PageRequest) -> None:
        failure.trap(UnknownId, LogUnavailable)
        if self.room is None:
            return
        if failure.check(UnknownId):
            self._err("There is no message of this id.", Code.UNKNOWN_ID, request.label)
            return
        _log.error("the log cannot be read: {error}", error=failure.value)
        self._err("The log cannot be read now; try again.", Code.UNAVAILABLE, request.label)

    def _page_done(self, result: _T) -> _T:
        if self._paging:
            self._paging = False
            self.go_on()
        return result

    # What became of it

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        """Poster.posted: who gave a label is told, after the message itself."""
        room = self.room
        if post.label is None or room is None:
            return
        ack = ack_frame(Id(self.rooms.epoch, number), post.label, duplicate=duplicate)
        if duplicate:
            self.send_frame(ack)
            return
        room.acknowledge(self, number, ack)
        if not self.ready:
            self.unread = True
            self.stop_reading()

    def refused(self, post: Post, error: LogUnavailable | LabelReused) -> None:
        """Poster.refused."""
        if self.room is None:
            return
        if isinstance(error, LabelReused):
            self._err("The label was given to another message.", Code.LABEL_REUSED, post.label)
        else:
            self._err(IN_DOUBT if isinstance(error, InDoubt) else NOT_STORED, Code.UNAVAILABLE, post.label)
