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
to come back.

Nothing here knows a reactor, a socket or a disk: time, members and the log are handed in.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.frames import Entry, Post, history_frame, message_frame

MAIN: Final = "main"
"""The room of a client that names none."""
TAIL_BYTES: Final = 4 << 20
"""How much of a room's newest frames is kept in memory (the history is kept in any case)."""
RUN_BYTES: Final = 64 << 10
"""How much one member is handed in one turn, so that those who lag do not each join a whole tail."""
RUN_FRAMES: Final = RUN_BYTES // 64
"""More frames than fit into RUN_BYTES, since none is that short: what is beyond need not be measured."""
RUNS: Final = 16
"""How many joined runs a pass remembers: the cursors that many members share are few."""
MAX_LAG: Final = 10_000
"""How many messages a member may be behind and still be caught up from the log."""
GONE: Final = sys.maxsize
"""The cursor of who has left."""
SLICE_SECONDS: Final = 0.008
"""How long a flush may keep the reactor from reading."""
SLICE_MEMBERS: Final = 64
"""How many members are served between two looks at the clock."""

_logger = Logger()


class LogUnavailable(Exception):
    """The log cannot take or give messages now; nothing was kept, and the same may be tried again."""


class Page(NamedTuple):
    """What a log holds of a room at one instant, and some of it."""

    entries: Sequence[Entry]
    """Consecutive, oldest first."""
    first: int
    """The number of the oldest message kept; head + 1 when none is."""
    head: int
    """The number of the newest message ever appended; 0 when none was."""


class Poster(Protocol):
    """Who posts: it is told what became of it."""

    def posted(self, post: Post, number: int) -> None:
        """The post is in the log, durably, under this number; its room has been told."""

    def refused(self, post: Post, error: LogUnavailable) -> None:
        """The post is not in the log."""


class Follower(Protocol):
    """Who reads the tail of a log: it is told of every room's messages, in the order of each room."""

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """These came after those told before."""

    def trimmed(self, room: str, first: int) -> None:
        """The messages before this number are kept no more."""


class Log(Protocol):
    """The durable order of all rooms' messages."""

    @property
    def epoch(self) -> str:
        """The word that stands for this history, 4 to 16 characters of [0-9A-Za-z]."""

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Number, stamp and keep a post, then tell the followers, then the poster; never blocks."""

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """At most `limit` messages after the number given, or the newest; LogUnavailable if it cannot."""

    def tail(self, follower: Follower) -> None:
        """Tell this follower of all that is appended and trimmed from now on."""


class Member(Protocol):
    """One who reads a room: a cursor and a transport."""

    cursor: int
    """The number of the last message it was given."""
    ready: bool
    """Whether its transport takes more; when it does again, it says so to Room.resume."""

    def write(self, data: bytes) -> int:
        """Hand bytes to the transport, and answer how many it took."""

    def hold(self, rest: bytes) -> None:
        """Keep the rest of a frame that write() cut, and be ready again when it is gone."""

    def overrun(self) -> None:
        """Close it, and let it leave: it is too slow, and what it misses is better had by coming back."""


class Run(NamedTuple):
    """Consecutive frames, joined."""

    data: bytes
    size: int
    """Of the data, in bytes."""
    end: int
    """The number of the last frame."""
    pieces: Sequence[bytes]

    @classmethod
    def of(cls, after: int, pieces: Sequence[bytes]) -> "Run":
        """Join frames, the first of which is numbered after + 1, up to RUN_BYTES, and at least one."""
        if sum(map(len, pieces)) > RUN_BYTES:
            fit = sum(end <= RUN_BYTES for end in accumulate(map(len, pieces)))
            pieces = pieces[: max(fit, 1)]
        data = b"".join(pieces)
        return cls(data, len(data), after + len(pieces), pieces)

    def cut(self, taken: int) -> tuple[int, bytes]:
        """Where a transport stands that took so many bytes: the number of the frame that was cut, and its rest.

        That rest must be sent before anything else may be.  If the cut fell between two frames it is the next
        one, since only a transport with something to send tells when it can.
        """
        ends = enumerate(accumulate(map(len, self.pieces)), self.end - len(self.pieces) + 1)
        number, end = next((number, end) for number, end in ends if end > taken)
        return number, self.data[taken:end]


NO_RUN: Final = Run(b"", 0, 0, ())


class Tail:
    """The newest frames of a room by number, bounded in bytes but never below `keep` messages."""

    def __init__(self, head: int, keep: int) -> None:
        self.first = head + 1
        """The number of the oldest frame held; the rest must be read from the log."""
        self._keep = keep
        self._frames: list[bytes] = []
        self._bytes = 0

    @property
    def head(self) -> int:
        """The number of the newest message."""
        return self.first + len(self._frames) - 1

    def extend(self, new: Sequence[bytes]) -> None:
        """Add the next messages' frames, and let go of the oldest quarter when that makes it too much."""
        self._frames += new
        self._bytes += sum(map(len, new))
        if self._bytes > TAIL_BYTES and len(self._frames) > 2 * self._keep:
            old = min(len(self._frames) // 4 + 1, len(self._frames) - self._keep)
            self._bytes -= sum(map(len, self._frames[:old]))
            del self._frames[:old]
            self.first += old

    def between(self, after: int, until: int) -> Sequence[bytes]:
        """The frames numbered after + 1 to until, all of which must be held."""
        return self._frames[after + 1 - self.first : until + 1 - self.first]


class Room:
    """One room with someone in it."""

    def __init__(self, name: str, log: Log, page: Page, clock: IReactorTime, history: int) -> None:
        self.name = name
        self.members: dict[Member, None] = {}
        self._log = log
        self._clock = clock
        self._history = history
        self._first = page.first
        self._tail = Tail(page.head - len(page.entries), history)
        self._tail.extend([message_frame(log.epoch, entry) for entry in page.entries])
        self._greeting: tuple[tuple[int, int], bytes] | None = None
        self._turn: IDelayedCall | None = None
        # The pass: whom it has yet to serve, up to which message, with which joined runs by cursor;
        # and who is to be served again in the next, new messages or not.
        self._pass: Iterator[Member] | None = None
        self._target = page.head
        self._runs: dict[int, Run] = {}
        self._again: list[Member] = []
        self._refilling: set[Member] = set()

    @property
    def head(self) -> int:
        """The number of the newest message."""
        return self._tail.head

    @property
    def busy(self) -> bool:
        """Whether some member that can be served has not been."""
        return self._turn is not None or bool(self._refilling)

    def join(self, member: Member) -> bytes:
        """Let a member in at the head; answers the history frame that it must be sent first, in this turn."""
        member.cursor = self.head
        self.members[member] = None
        return self._history_frame()

    def leave(self, member: Member) -> None:
        """Let a member go; it is behind nothing any more, and so served nothing."""
        member.cursor = GONE
        del self.members[member]

    def appended(self, entries: Sequence[Entry]) -> None:
        """Take what the log appended; what is known already, because the room was loaded since, is passed over."""
        head, epoch = self._tail.head, self._log.epoch
        self._tail.extend([message_frame(epoch, entry) for entry in entries if entry.number > head])
        self._schedule()

    def trimmed(self, first: int) -> None:
        """Show no more what the log no longer keeps."""
        self._first = first

    def resume(self, member: Member) -> None:
        """Serve a member whose transport takes more again."""
        if member.cursor < self.head:
            self._again.append(member)
            self._schedule()

    def _history_frame(self) -> bytes:
        """The newest messages in one frame, which all share who join at one head."""
        key = (self.head, self._first)
        if self._greeting is None or self._greeting[0] != key:
            after = max(self.head - self._history, self._first - 1, self._tail.first - 1)
            newest = self._tail.between(after, self.head)
            more = after + 1 > self._first
            self._greeting = key, history_frame(self._log.epoch, self.head, newest, more=more)
        return self._greeting[1]

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self._clock.callLater(0, self._flush)

    def _flush(self) -> None:
        """Go on with the pass for one slice, or begin the next one."""
        self._turn = None
        if self._pass is None:
            self._pass = self._begin()
        deadline = self._clock.seconds() + SLICE_SECONDS
        while members := [*islice(self._pass, SLICE_MEMBERS)]:
            self._serve(members)
            if self._clock.seconds() > deadline:
                self._schedule()
                return
        self._pass = None
        self._runs.clear()
        if self._target < self.head or self._again:
            self._schedule()

    def _begin(self) -> Iterator[Member]:
        """Who is to be served in a new pass: everyone when there are new messages, else those with more to get."""
        members = [*self.members] if self._target < self.head else self._again
        self._again = []
        self._target = self.head
        return iter(members)

    def _serve(self, members: Sequence[Member]) -> None:
        """Hand each member that is ready and behind the run at its cursor."""
        target = self._target
        # Where the member before stood, as nearly all do, so that its run is at hand.
        at, run, data, size, end = GONE, NO_RUN, b"", 0, 0
        for member in members:
            cursor = member.cursor
            if cursor >= target or not member.ready:
                continue
            if cursor != at:
                at, run = cursor, self._run(cursor)
                data, size, end, _ = run
            if run is NO_RUN:
                self._refill(member)
            elif (taken := member.write(data)) == size:
                member.cursor = end
                if end < target:
                    self._again.append(member)
            else:
                self._cut(member, run, taken)

    @staticmethod
    def _cut(member: Member, run: Run, taken: int) -> None:
        """A member's transport took a part of a run: whole frames, and what it must keep the rest of."""
        member.cursor, rest = run.cut(taken)
        member.hold(rest)

    def _run(self, cursor: int) -> Run:
        """Join the run at a cursor, unless it was; NO_RUN when the tail has moved on, and the log must be read."""
        if cursor + 1 < self._tail.first:
            return NO_RUN
        run = self._runs.get(cursor)
        if run is None:
            if len(self._runs) == RUNS:
                self._runs.clear()
            until = min(self._target, cursor + RUN_FRAMES)
            run = self._runs[cursor] = Run.of(cursor, self._tail.between(cursor, until))
        return run

    def _refill(self, member: Member) -> None:
        """Serve a member that the tail overran from the log, or close it when that is too far."""
        if member in self._refilling:
            return
        if self.head - member.cursor > MAX_LAG:
            self._overrun(member)
            return
        self._refilling.add(member)
        reading = self._log.read(self.name, member.cursor, self._history)
        reading.addCallbacks(self._refilled, self._not_refilled, callbackArgs=(member,), errbackArgs=(member,))

    def _refilled(self, page: Page, member: Member) -> None:
        self._refilling.discard(member)
        if not member.ready or member not in self.members:
            return
        if member.cursor + 1 < page.first:
            self._overrun(member)
            return
        pieces = [message_frame(self._log.epoch, entry) for entry in page.entries]
        run = Run.of(member.cursor, pieces)
        taken = member.write(run.data)
        if taken == run.size:
            member.cursor = run.end
            self.resume(member)
        else:
            self._cut(member, run, taken)

    def _not_refilled(self, failure: Failure, member: Member) -> None:
        self._refilling.discard(member)
        _logger.error("{room}: the log cannot be read: {error}", room=self.name, error=failure.value)
        if member in self.members:
            self._overrun(member)

    def _overrun(self, member: Member) -> None:
        _logger.info("{room}: a member {lag} messages behind is closed", room=self.name, lag=self.head - member.cursor)
        member.overrun()


class Rooms:
    """The rooms that someone is in, by name; it follows the log for them all."""

    def __init__(self, log: Log, clock: IReactorTime, history: int) -> None:
        self._log = log
        self._clock = clock
        self._history = history
        self._rooms: dict[str, Room] = {}
        self._loading: dict[str, list[Deferred[Room]]] = {}
        self._missed: dict[str, list[Entry]] = {}
        log.tail(self)

    @property
    def busy(self) -> bool:
        """Whether some member that can be served has not been."""
        return any(room.busy for room in self._rooms.values())

    def open(self, name: str) -> "Deferred[Room]":
        """A room to join at once, in the callback: a room that nobody is in is forgotten.

        The first to come waits for the log, and those who come meanwhile wait with it.
        Fails with LogUnavailable.
        """
        room = self._rooms.get(name)
        if room is not None:
            return succeed(room)
        waiting: Deferred[Room] = Deferred()
        if name in self._loading:
            self._loading[name].append(waiting)
        else:
            self._loading[name] = [waiting]
            self._missed[name] = []
            self._log.read(name, None, self._history).addCallbacks(
                self._loaded, self._not_loaded, callbackArgs=(name,), errbackArgs=(name,)
            )
        return waiting

    def _loaded(self, page: Page, name: str) -> None:
        room = self._rooms[name] = Room(name, self._log, page, self._clock, self._history)
        room.appended(self._missed.pop(name))
        for waiting in self._loading.pop(name):
            waiting.callback(room)
        # Those who waited join in their callbacks, which the first may add only after this.
        self._clock.callLater(0, self._forget, room)

    def _not_loaded(self, failure: Failure, name: str) -> None:
        del self._missed[name]
        for waiting in self._loading.pop(name):
            waiting.errback(failure)

    def leave(self, room: Room, member: Member) -> None:
        """Let a member go, and the room with its last."""
        room.leave(member)
        self._forget(room)

    def _forget(self, room: Room) -> None:
        if not room.members and self._rooms.get(room.name) is room:
            del self._rooms[room.name]

    def post(self, room: str, post: Post, poster: Poster) -> None:
        """Append a post to the room's log, from which its members will have it."""
        self._log.append(room, post, poster)

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """Follower.appended: pass on what concerns someone here."""
        if room in self._rooms:
            self._rooms[room].appended(entries)
        elif room in self._loading:
            self._missed[room].extend(entries)

    def trimmed(self, room: str, first: int) -> None:
        """Follower.trimmed."""
        if room in self._rooms:
            self._rooms[room].trimmed(first)
