"""A room is a log; a client is a cursor.

A room's messages are numbered 1, 2, 3 ... by the log, and a room hears of them from the log
alone, in that order, also of those posted here.  What it keeps of them is its *tail*: the newest
WebSocket frames, each encoded once, in a list bounded in bytes.  A *member* is one integer, the
number of the last message it was given.  No queue belongs to a member: to serve it is to join the
frames from its cursor to the head and to hand them to its transport in one write.  Members at one
cursor share the joined bytes.

The room is flushed in the reactor's next turn after something was appended, so nothing waits
for a batch to fill, and yet under load what came in one turn leaves in one write: the cost falls
from messages x members system calls to members.  A flush is a *pass* over the members.  It aims at
the head it began with, stops every few milliseconds to let the reactor read, and goes on where
it stopped; the next pass begins after it.  Correctness does not rest on any of this: the cursor
says what a member has, and a pass that found nothing to do has changed nothing.

A member whose transport is full is not *ready*.  Its cursor stays, and nothing is kept for it
but the rest of the one frame that was cut.  When there is room again it is served from the tail, or,
where the tail has moved on, from the log; when it is too far behind for that, it is told
to come back.  Coming back is the same thing again: the client names the last message it has, and that is
its cursor.

Nothing here knows a reactor, a socket or a disk: time, members and the log are handed in.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Final, Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.messages import Entry, Id
from chatd.room.encoder import Encoder
from chatd.room.log import EncodedPage, Log, Page, PageRange, UnknownId
from chatd.room.presence import Presence, Report
from chatd.room.sweep import sweep
from chatd.room.tail import NO_RUN, RUN_FRAMES, Run, Tail

RUNS: Final = 16
"""How many joined runs a pass remembers: the cursors that many members share are few."""
MAX_LAG: Final = 10_000
"""How many messages a member may be behind and still be caught up from the log."""
GONE: Final = sys.maxsize
"""The cursor of who has left."""
GREETINGS: Final = 16
"""How many history frames a room remembers: who comes back in a herd was at the same message."""

_logger = Logger()


class Member(Protocol):
    """One who reads a room: a cursor and a transport."""

    cursor: int
    """The number of the last message it was given."""
    ready: bool
    """Whether its transport takes more; when it does again, it says so to Room.resume."""
    events: frozenset[str]
    """What it asked to be told besides messages: see chatd.presence."""
    name: str | None
    """The username by which it is known."""

    @property
    def form(self) -> Callable[[bytes], bytes] | None:
        """Makes of a WebSocket frame what this transport sends; None: the frame itself."""

    def write(self, data: bytes) -> int:
        """Hand bytes to the transport, and answer how many it took."""

    def hold(self, rest: bytes) -> None:
        """Keep the rest of a frame that write() cut, and be ready again when it is gone."""

    def send_frame(self, frame: bytes) -> None:
        """Send it a frame that is not of the log, or several acknowledgements, after what it was given."""

    def evict(self) -> None:
        """Close it, and let it leave: it is too slow, and what it misses is better had by coming back."""


_cursor: Callable[[Member], int] = attrgetter("cursor")


class Room:
    """One room with someone in it."""

    def __init__(
        self,
        name: str,
        log: Log,
        encoder: Encoder,
        page: Page,
        *,
        clock: IReactorTime,
        history: int,
        report: Report | None = None,
    ) -> None:
        self.name = name
        self.members: dict[Member, None] = {}
        self._log = log
        self._message_frame = encoder.message_frame
        self._history_frame = encoder.history_frame
        self._clock = clock
        self._history = history
        self.presence = Presence(self.members, encoder, clock, report)
        self._greetings: dict[tuple[bool | None, int], tuple[bytes, int]] = {}
        self._turn: IDelayedCall | None = None
        # The pass: whom it has yet to serve, up to which message, with which joined runs by cursor;
        # and who is to be served again in the next, new messages or not.
        self._pass: Iterator[Member] | None = None
        self._runs: dict[tuple[int, Callable[[bytes], bytes] | None], Run] = {}
        self._again: dict[Member, None] = {}
        # Who waits for the log, by cursor; and what it gave, for this pass and for the next.
        self._refilling: dict[int, dict[Member, None]] = {}
        self._refills: dict[int, Sequence[bytes]] = {}
        self._refills_to_come: dict[int, Sequence[bytes]] = {}
        # Who is owed acknowledgements, of which messages of which epoch.
        self._acks: dict[Member, list[tuple[str, int, bytes]]] = {}
        # The sum of the cursors at which members have left, less that of those at which members have joined.
        self._delivered = 0
        self._load(page)

    def _load(self, page: Page) -> None:
        """Take these as the newest messages."""
        self.epoch = self._log.epoch
        """That of all messages here."""
        self._first = page.first
        self._tail = Tail(page.head - len(page.entries), self._history)
        self._tail.extend(self._encode(page.entries))
        self._target = page.head

    @property
    def head(self) -> int:
        """The number of the newest message."""
        return self._tail.head

    @property
    def busy(self) -> bool:
        """Whether some member that can be served has not been."""
        return self._turn is not None or bool(self._refilling)

    def join(self, member: Member, last: Id | None = None, missed: Page | None = None) -> bytes:
        """Let a member in; answers the history frame that it must be sent first, in this turn.

        `last` names the last message that it has, if it has been here before, and `missed` is what the log holds
        after that, where the tail may not go back so far.  If nothing of that is lost, the frame holds the oldest
        of it, and the rest follows; else the newest messages, as for someone new.
        """
        frame, member.cursor = self._greet(last, missed)
        self._delivered -= member.cursor
        self.members[member] = None
        self.presence.joined(member)
        self.resume(member)
        return frame

    def leave(self, member: Member) -> None:
        """Let a member go; it is behind nothing any more, and so served nothing."""
        del self.members[member]
        self._delivered += member.cursor
        member.cursor = GONE
        self._acks.pop(member, None)
        self.presence.left(member)

    def cursors(self) -> Counter[int]:
        """How many members are at which cursor."""
        return Counter(map(_cursor, self.members))

    @property
    def delivered(self) -> int:
        """How many messages were handed to members after the history, to all of them together."""
        return self._delivered + sum(map(_cursor, self.members))

    @property
    def held(self) -> tuple[int, int]:
        """How many messages the tail holds, and of how many bytes."""
        return self.head + 1 - self._tail.first, self._tail.bytes

    def remembers(self, number: int) -> bool:
        """Whether the tail holds all that came after a message."""
        return self._tail.first - 1 <= number <= self.head

    def excerpt(self, span: PageRange) -> EncodedPage | None:
        """A page from the tail, or None if the log must be asked."""
        try:
            after, _ = span.bounds(self._first, self.head)
        except UnknownId:  # unless the log has gone on meanwhile
            return None
        return span.excerpt(self._first, self.head, self._tail.between) if after + 1 >= self._tail.first else None

    def owes(self, member: Member) -> bool:
        """Whether a member waits for an acknowledgement."""
        return member in self._acks

    def acknowledge(self, member: Member, number: int, frame: bytes) -> None:
        """Send a member a frame once it has been given the message of this number in the log as it is now."""
        self._acks.setdefault(member, []).append((self._log.epoch, number, frame))
        self.resume(member)

    def appended(self, entries: Sequence[Entry]) -> None:
        """Take what the log appended; what is known already, because the room was loaded since, is passed over."""
        encode, epoch, head = self._message_frame, self.epoch, self._tail.head
        self._tail.extend([encode(epoch, entry) for entry in entries if entry.number > head])
        self._greetings.clear()
        self._schedule()

    def continues(self, page: Page) -> bool:
        """Whether a page that was read after the head of this room holds all that came since."""
        return self.epoch == self._log.epoch and self.head + len(page.entries) == page.head

    def restart(self, page: Page) -> None:
        """Begin anew with the newest messages, of another history, or too far on: every member is told."""
        self._pass = None
        for kept in (self._runs, self._again, self._refilling, self._refills, self._refills_to_come, self._greetings):
            kept.clear()
        self._load(page)
        for member, acks in [*self._acks.items()]:
            self._acks[member] = [ack for ack in acks if ack[0] == self.epoch]
        frame, head = self._compose_history(resumed=False, number=self.head, missed=None)
        self._delivered += sum(member.cursor - head for member in self.members)
        for member in self.members:
            member.cursor = head
        for member in [*self.members]:
            member.send_frame(frame)
        self._schedule()

    def trimmed(self, first: int) -> None:
        """Show no more what the log no longer keeps."""
        self._first = first
        self._greetings.clear()

    def resume(self, member: Member) -> None:
        """Serve a member whose transport takes more again."""
        if member.cursor < self.head or member in self._acks:
            self._again[member] = None
            self._schedule()

    def _greet(self, last: Id | None, missed: Page | None) -> tuple[bytes, int]:
        """The history frame for who has the message `last`, and the number of the last message in it."""
        epoch = self.epoch
        resumed = None if last is None else last.epoch == epoch and self.can_resume(last.number, missed)
        key = resumed, (last.number if last is not None and resumed else self.head)
        if key not in self._greetings:
            if len(self._greetings) == GREETINGS:
                self._greetings.clear()
            self._greetings[key] = self._compose_history(*key, missed)
        return self._greetings[key]

    def can_resume(self, number: int, missed: Page | None = None) -> bool:
        """Whether the log holds all that came after a message, and that is not too much."""
        first, head = self._first, self.head
        if missed is not None:
            first, head = max(first, missed.first), max(head, missed.head)
        return max(first - 1, head - MAX_LAG) <= number <= head

    def _compose_history(self, resumed: bool | None, number: int, missed: Page | None) -> tuple[bytes, int]:
        epoch = self.epoch
        if not resumed:
            excerpt = PageRange(None, None, self._history).excerpt(
                max(self._first, self._tail.first), number, self._tail.between
            )
            older = number - len(excerpt.frames) >= self._first
            return self._history_frame(epoch, number, excerpt.frames, more=older, resumed=resumed), number
        if self.remembers(number):
            frames = self._tail.between(number, min(self.head, number + self._history))
        else:
            frames = self._encode(missed.entries) if missed else []
        end = number + len(frames)
        return self._history_frame(epoch, end, frames, resumed=resumed), end

    def _encode(self, entries: Sequence[Entry]) -> list[bytes]:
        encode, epoch = self._message_frame, self.epoch
        return [encode(epoch, entry) for entry in entries]

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self._clock.callLater(0, self._flush)

    def _flush(self) -> None:
        """Go on with the pass for one slice, or begin the next one."""
        self._turn = None
        if self._pass is None:
            self._pass = self._begin()
        if not sweep(self._pass, self._serve, self._clock):
            self._schedule()
            return
        self._pass = None
        self._runs.clear()
        if self._acks:
            self._acknowledge()
        if self._target < self.head or self._again:
            self._schedule()

    def _begin(self) -> Iterator[Member]:
        """Who is to be served in a new pass: everyone when there are new messages, else those with more to get."""
        members = [*self.members] if self._target < self.head else self._again
        self._again = {}
        self._refills, self._refills_to_come = self._refills_to_come, {}
        self._target = self.head
        return iter(members)

    def _serve(self, members: Sequence[Member]) -> None:
        """Hand each member that is ready and behind the run at its cursor."""
        target = self._target
        # Where the member before stood, as nearly all do, so that its run is at hand.
        at, form, run, data, size, end = GONE, None, NO_RUN, b"", 0, 0
        for member in members:
            cursor = member.cursor
            if cursor >= target or not member.ready:
                continue
            if cursor != at or member.form is not form:
                at, form = cursor, member.form
                run = self._run(at, form)
                data, size, end, _ = run
            if run is NO_RUN:
                self._refill(member)
            elif (taken := member.write(data)) == size:
                member.cursor = end
                if end < target:
                    self._again[member] = None
            else:
                member.cursor, rest = run.cut(taken)  # whole frames were taken, and one in part
                member.hold(rest)

    def _run(self, cursor: int, form: Callable[[bytes], bytes] | None) -> Run:
        """Join the run at a cursor, unless it was; NO_RUN when the tail has moved on, and the log must be read."""
        run = self._runs.get((cursor, form))
        if run is None:
            if cursor + 1 >= self._tail.first:
                pieces = self._tail.between(cursor, min(self._target, cursor + RUN_FRAMES))
            elif cursor in self._refills:
                pieces = self._refills[cursor]
            else:
                return NO_RUN
            if len(self._runs) == RUNS:
                self._runs.clear()
            run = Run.of(cursor, pieces if form is None else [form(piece) for piece in pieces])
            self._runs[cursor, form] = run
        return run

    def _acknowledge(self) -> None:
        """Send what is due by now."""
        for member, acks in [*self._acks.items()]:
            due = [frame for epoch, number, frame in acks if epoch == self.epoch and number <= member.cursor]
            if len(due) == len(acks):
                del self._acks[member]
            else:
                self._acks[member] = acks[len(due) :]
            if due:
                member.send_frame(b"".join(due))

    def _refill(self, member: Member) -> None:
        """Serve a member that the tail overran from the log, or close it when that is too far."""
        cursor = member.cursor
        if cursor in self._refills_to_come:
            self._again[member] = None
            return
        if cursor in self._refilling:
            self._refilling[cursor][member] = None
            return
        if self.head - cursor > MAX_LAG:
            self._overrun(member)
            return
        self._refilling[cursor] = {member: None}
        self._log.read(self.name, cursor, self._history).addCallbacks(
            self._refilled, self._not_refilled, callbackArgs=(cursor,), errbackArgs=(cursor,)
        )

    def _refilled(self, page: Page, cursor: int) -> None:
        """Serve those who wait at a cursor with the next pass."""
        waiting = [member for member in self._refilling.pop(cursor, ()) if member in self.members]
        if not waiting or self.epoch != self._log.epoch:  # this room begins anew
            return
        if page.entries and page.entries[0].number == cursor + 1:
            self._refills_to_come[cursor] = self._encode(page.entries)
            self._again |= dict.fromkeys(waiting)
            self._schedule()
            return
        for member in waiting:
            self._overrun(member)

    def _not_refilled(self, failure: Failure, cursor: int) -> None:
        _logger.error("{room}: the log cannot be read: {error}", room=self.name, error=failure.value)
        for member in self._refilling.pop(cursor, ()):
            if member in self.members:
                self._overrun(member)

    def _overrun(self, member: Member) -> None:
        _logger.info("{room}: a member {lag} messages behind is closed", room=self.name, lag=self.head - member.cursor)
        member.evict()
