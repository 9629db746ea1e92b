"""A room is a log; a client is a cursor.

The log numbers the entries of a room 1, 2, 3 … and notifies the room of them in that order, including those posted
through this server.  The room encodes each entry once, as a frame, and keeps the newest frames in its *tail*, which
is bounded in bytes.  A *member* is one integer: the number of the last entry handed to it.  No member has a queue.
Serving a member means joining the frames from its cursor to the head and handing them to its transport in one write.
Members at one cursor share the joined bytes.

A room is flushed in the reactor turn after something was appended.  No entry waits for a batch to fill, and yet all
entries of one turn leave in one write.  Under load the system calls therefore follow the number of members, and not
that of messages times members.

A flush is a *pass* over the members, and then over those that wait for acknowledgements.  A pass aims at the head it
began with.  It stops every few milliseconds to let the reactor read, and then continues where it stopped.  The next
pass begins after it.  All rooms share the time of a reactor turn: a room that finds it spent is flushed in the next
one.  Correctness does not depend on passes: the cursor alone states what a member has, and a pass without work changes
nothing.

A member whose transport is full is not *ready*.  Its cursor stays, and the room keeps nothing for it; the transport
keeps the rest of the frame that was cut.  When the transport has space again the member is served from the tail, or
from the log if the tail has dropped those entries.  A member too far behind is evicted.  It reconnects with the id of
its last entry, and that id is its cursor.

Members may get another form of the same frames.  One form is a running stream of compressed frames, which members join
and leave at their cursors: see `keyframes`.

Nothing here knows a reactor, a socket or a disk: time, members, the log and the encoding are handed in.

An edit is an entry, which members get like any other.  It also changes the frame of the entry that it replaces, in its
place in the tail, so that later histories and pages show the newest text.  A removal changes the frames of the earlier
edits too: nothing here holds the old text any longer.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import Any, Final, Protocol, cast

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.messages import Entry, Id
from chatd.room.encoder import Encoder
from chatd.room.histories import Histories
from chatd.room.keyframes import COMPRESSIBLE, Keyframes, KeyframeStream
from chatd.room.log import EncodedPage, Log, Page, PageRange, UnknownId
from chatd.room.presence import Presence, Report
from chatd.room.sweep import sweep
from chatd.room.tail import NO_RUN, RUN_FRAMES, Run, Tail
from chatd.room.turns import TurnQueue

RUNS: Final = 16
"""The number of joined runs that a pass remembers; the cursors that many members share are few."""
MAX_LAG: Final = 10_000
"""The number of entries that a member may be behind and still catch up from the log."""
LEFT: Final = sys.maxsize
"""The cursor of a member that has left."""
LATER: Final = -1
"""The result of Member.write when another member of the same transport is to write first."""

MemberForm = Callable[[bytes], bytes] | KeyframeStream | None
"""What a member gets of a frame: what a function makes of it, what a stream compresses it to, or the frame itself."""

_logger = Logger()


class Member(Protocol):
    """One reader of a room: a cursor and a transport."""

    cursor: int
    """The number of the last entry handed to it."""
    ready: bool
    """True while its transport takes data; the transport calls Room.resume when it takes data again."""
    events: frozenset[str]
    """The notices that it wants besides entries: see chatd.room.presence."""
    name: str | None
    """The username by which others know it."""

    @property
    def form(self) -> MemberForm:
        """The form of the frames that its transport sends; the room sets it if it is a stream."""

    @property
    def takes_events(self) -> bool:
        """True while its transport takes more, and nothing that was sent before waits."""

    def write(self, data: bytes) -> int:
        """Hand bytes to the transport and return the number of bytes it took, or LATER.

        Raises OSError if it takes none now, as a socket does.  After LATER the member is not ready, and calls
        Room.resume in its turn.
        """

    def hold(self, rest: bytes) -> None:
        """Keep the rest of a frame that write() cut, and be ready again when it is sent."""

    def send_frame(self, frame: bytes) -> None:
        """Send one frame that is not an entry, or several acknowledgements, after all that was handed to it."""

    def start_over(self, history: bytes) -> None:
        """Send the history frame of a room that has restarted, or leave the room."""

    def evict(self) -> None:
        """Close it and leave the room: it is too slow, and gets what it lacks by reconnecting."""


_cursor: Callable[[Member], int] = attrgetter("cursor")


class Room:
    """One room that has members."""

    def __init__(
        self,
        name: str,
        log: Log,
        encoder: Encoder,
        page: Page,
        *,
        clock: IReactorTime,
        turns: TurnQueue,
        history: int,
        report: Report | None = None,
    ) -> None:
        self.name = name
        self.members: dict[Member, None] = {}
        self._log = log
        self._message_frame = encoder.message_frame
        self._entry_of = encoder.entry_of
        self._history_frame = encoder.history_frame
        self._addressed = encoder.addressed
        self._clock = clock
        self._turns = turns
        self._history = history
        self.presence = Presence(self.members, encoder, clock, report)
        self._histories = Histories(clock)
        self._keyframes = Keyframes(encoder.compressor)
        self._flushing = False
        """True while a flush waits for its turn."""
        # The pass: the members yet to serve, the head it aims at, and its joined runs by cursor and form.
        self._pass: Iterator[Member] | None = None
        self._target = page.head
        self._runs: dict[tuple[int, MemberForm], Run] = {}
        # The members to serve in the next pass even if nothing is appended.
        self._unfinished: dict[Member, None] = {}
        # The members that wait for the log, by cursor; and the frames read for this pass and for the next.
        self._refilling: dict[int, dict[Member, None]] = {}
        self._refills: dict[int, list[bytes]] = {}
        self._next_refills: dict[int, list[bytes]] = {}
        # The acknowledgements to send, each with the epoch and the number of its entry.  And the members that this pass
        # has yet to send them to.
        self._acks: dict[Member, list[tuple[str, int, bytes]]] = {}
        self._acknowledging: Iterator[Member] | None = None
        # The sum of the cursors at which members have left, minus that of the cursors at which members have joined.
        self._delivered = 0
        self._load(page)

    def _load(self, page: Page) -> None:
        """Take these entries as the newest."""
        self.epoch = self._log.epoch
        """The epoch of every entry in this room."""
        self.edited = 0
        """The number of the newest edit; a page that was read before it may show an old text."""
        # The numbers of the edits in the tail, by the number of the entry that they replace.
        self._edits: dict[int, list[int]] = {}
        self._first = page.first
        self._tail = Tail(page.head - len(page.entries), self._history)
        self._tail.extend(self._encode(page.entries))
        for entry in page.entries:
            if entry.replaces is not None:
                self._edits.setdefault(entry.replaces, []).append(entry.number)
                self.edited = entry.number
        self._target = page.head

    def _encode(self, entries: Sequence[Entry]) -> list[bytes]:
        encode, epoch = self._message_frame, self.epoch
        return [encode(epoch, entry) for entry in entries]

    @cached_property
    def addressed(self) -> Callable[[bytes], bytes]:
        """The form that names this room in each frame; one object, so that members with this form share runs."""
        return self._addressed(self.name)

    # Measures

    @property
    def head(self) -> int:
        """The number of the newest entry."""
        return self._tail.head

    @property
    def delivered(self) -> int:
        """The number of entries handed to members after their history, summed over all members."""
        return self._delivered + sum(map(_cursor, self.members))

    @property
    def held(self) -> tuple[int, int]:
        """The number of frames in the tail, and their size in bytes."""
        return self.head + 1 - self._tail.first, self._tail.bytes

    @property
    def histories_bytes(self) -> int:
        """The size of the history frames that the room keeps."""
        return self._histories.bytes

    @property
    def compressed_bytes(self) -> int:
        """The size of the compressed frames that the room holds."""
        return self._keyframes.size

    def cursors(self) -> Counter[int]:
        """Count the members at each cursor."""
        return Counter(map(_cursor, self.members))

    # Joining and leaving

    def join(self, member: Member, last: Id | None = None, backlog: Page | None = None) -> bytes:
        """Add a member; return the history frame that it must be sent first, in this turn.

        `last` names the last entry of a client that reconnects.  `backlog` holds the entries after it as read from the
        log, for a room whose tail does not reach back that far.  If no entry is lost the frame holds the oldest of
        those entries and the rest follow as messages.  Otherwise it holds the newest entries, as for a new client.
        """
        frame, member.cursor = self._history_after(last, backlog)
        self._delivered -= member.cursor
        self.members[member] = None
        self._keyframes.joined(member.form)
        self.presence.joined(member)
        self.resume(member)
        return frame

    def leave(self, member: Member) -> None:
        """Remove a member; nothing more is sent to it."""
        del self.members[member]
        self._delivered += member.cursor
        member.cursor = LEFT
        self._acks.pop(member, None)
        self._keyframes.left(member.form)
        if not self.members:
            self._histories.clear()
        self.presence.left(member)

    def resume(self, member: Member) -> bool:
        """Serve a member whose transport takes more again; return whether there is anything to send to it."""
        if member.cursor < self.head or member in self._acks:
            self._unfinished[member] = None
            self._schedule()
            return True
        return False

    # Reading

    def needs_backlog(self, last: Id) -> bool:
        """Return True if the log must be read before a client can join after this id."""
        if last.epoch != self._log.epoch or self._tail_reaches(last.number):
            return False
        return last.number > self.head or self._can_resume(last.number)  # the log may be ahead of the room

    def page(self, wanted: PageRange) -> EncodedPage | None:
        """Return a page from the tail, or None if the log must be read."""
        try:
            after, _ = wanted.bounds(self._first, self.head)
        except UnknownId:  # unless the log is ahead of the room
            return None
        return wanted.encode(self._first, self.head, self._tail.between) if after + 1 >= self._tail.first else None

    def _tail_reaches(self, number: int) -> bool:
        """Return True if the tail holds every entry after a number."""
        return self._tail.first - 1 <= number <= self.head

    def _can_resume(self, number: int, backlog: Page | None = None) -> bool:
        """Return True if the log holds every entry after a number, and not too many."""
        first, head = self._first, self.head
        if backlog is not None:
            first, head = max(first, backlog.first), max(head, backlog.head)
        return max(first - 1, head - MAX_LAG) <= number <= head

    def _history_after(self, last: Id | None, backlog: Page | None) -> tuple[bytes, int]:
        """Return the history frame for a client that has the entry `last`, and the number of the frame's last entry."""
        resumed = None if last is None else last.epoch == self.epoch and self._can_resume(last.number, backlog)
        key = resumed, (last.number if last is not None and resumed else self.head)
        return self._histories.get(
            key, lambda: self._resumed_history(key[1], backlog) if resumed else self._newest_history(resumed=resumed)
        )

    def _resumed_history(self, number: int, backlog: Page | None) -> tuple[bytes, int]:
        if self._tail_reaches(number):
            frames = self._tail.between(number, min(self.head, number + self._history))
        else:
            frames = self._encode(backlog.entries) if backlog is not None else ()
        end = number + len(frames)
        return self._history_frame(self.epoch, end, frames, resumed=True), end

    def _newest_history(self, *, resumed: bool | None) -> tuple[bytes, int]:
        head = self.head
        after = min(head, max(head - self._history, self._first - 1, self._tail.first - 1))
        frames = self._tail.between(after, head)
        return self._history_frame(self.epoch, head, frames, more=after >= self._first, resumed=resumed), head

    # Following the log

    def appended(self, entries: Sequence[Entry]) -> None:
        """Take entries from the log, except those that the room has loaded already."""
        encode, epoch, head, first = self._message_frame, self.epoch, self._tail.head, self._tail.first
        self._tail.extend([encode(epoch, entry) for entry in entries if entry.number > head])
        for entry in entries:
            if entry.replaces is not None and entry.number > head:
                self._edit(entry.replaces, entry)
        if self._edits and self._tail.first > first:
            self._forget_edits()
        self._histories.clear()
        self._schedule()

    def _edit(self, original: int, edit: Entry) -> None:
        """Change the frame of the entry that an edit replaces; for a removal also those of its earlier edits."""

        def change(frame: bytes) -> bytes:
            return self._message_frame(self.epoch, self._entry_of(frame).revised(edit))

        edits = self._edits.setdefault(original, [])
        for number in (original, *edits) if edit.removed else (original,):
            self._tail.replace(number, change)
        for after, frames in chain(self._refills.items(), self._next_refills.items()):
            for number, frame in enumerate(frames, after + 1):
                if number == original or (edit.removed and self._entry_of(frame).replaces == original):
                    frames[number - after - 1] = change(frame)
        if edit.removed:
            self._keyframes.erase(max(original, *edits) if edits else original)
        self._runs.clear()
        edits.append(edit.number)
        self.edited = edit.number

    def _forget_edits(self) -> None:
        """Forget the edits that the tail and the compressed frames have dropped."""
        first = min(self._tail.first, self._keyframes.first)
        kept = {entry: [number for number in numbers if number >= first] for entry, numbers in self._edits.items()}
        self._edits = {entry: numbers for entry, numbers in kept.items() if numbers}

    def trimmed(self, first: int) -> None:
        """Stop showing entries that the log no longer holds; forget the frames of a log that holds none."""
        self._first = first
        if first > self.head:
            self._tail = Tail(self.head, self._history)
            self._runs.clear()
            self._keyframes.end()
        self._histories.clear()

    def continues(self, page: Page) -> bool:
        """Return True if a page read after the head of this room holds every entry since."""
        return self.epoch == self._log.epoch and self.head + len(page.entries) == page.head

    def restart(self, page: Page) -> None:
        """Load the newest entries of another history, or those beyond a gap, and send them to every member."""
        self._pass = self._acknowledging = None
        for kept in (self._runs, self._unfinished, self._refilling, self._refills, self._next_refills, self._histories):
            kept.clear()
        self._keyframes.end()
        self._load(page)
        for member, acks in [*self._acks.items()]:
            self._acks[member] = [ack for ack in acks if ack[0] == self.epoch]
        frame, head = self._newest_history(resumed=False)
        self._delivered += sum(member.cursor - head for member in self.members)
        for member in self.members:
            member.cursor = head
        for member in [*self.members]:
            member.start_over(frame)
        self._schedule()

    # Serving

    def _schedule(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._turns.wait(self._flush)

    def _flush(self) -> None:
        """Continue the pass for one slice, or begin the next pass."""
        self._flushing = False
        if self._pass is None:
            self._pass = self._begin_pass()
        if not sweep(self._pass, self._serve, self._clock):
            self._schedule()
            return
        self._runs.clear()
        if self._acks:
            if self._acknowledging is None:
                self._acknowledging = iter([*self._acks])
            if not sweep(self._acknowledging, self._send_acks, self._clock):
                self._schedule()
                return
        self._pass = self._acknowledging = None
        if self._target < self.head or self._unfinished:
            self._schedule()

    def _begin_pass(self) -> Iterator[Member]:
        """Return the members to serve: all of them if there are new entries, otherwise the unfinished ones."""
        members = [*self.members] if self._target < self.head else self._unfinished
        self._unfinished = {}
        self._refills, self._next_refills = self._next_refills, {}
        self._target = self.head
        return iter(members)

    def _serve(self, members: Sequence[Member]) -> None:
        """Hand each member that is ready and behind the run at its cursor."""
        target = self._target
        # The place of the previous member: nearly all members share it, and with it the run.
        at, form, run, data, size, end = LEFT, None, NO_RUN, b"", 0, 0
        for member in members:
            cursor = member.cursor
            if cursor >= target or not member.ready:
                continue
            if cursor != at or member.form is not form:
                at, form = cursor, member.form
                run = self._run(at, form)
                data, size, end, _ = run
            if run is NO_RUN:
                self._serve_otherwise(member)
                continue
            try:
                taken = member.write(data)
            except OSError:
                taken = 0
            if taken == size:
                member.cursor = end
                if end < target:
                    self._unfinished[member] = None
            elif taken != LATER:
                member.cursor, rest = run.cut(taken)  # the transport took whole frames, and one in part
                member.hold(rest)

    def _run(self, cursor: int, form: MemberForm) -> Run:
        """Return the run at a cursor, joined once; NO_RUN if there is none in this form."""
        run = self._runs.get((cursor, form))
        if run is None:
            pieces = self._pieces(cursor, form)
            if not pieces:
                return NO_RUN
            if len(self._runs) == RUNS:
                self._runs.clear()
            run = self._runs[cursor, form] = Run.of(cursor, pieces)
        return run

    def _pieces(self, cursor: int, form: MemberForm) -> Sequence[bytes]:
        """Return frames after a cursor; none if the tail has moved on, or if a member must change its form here."""
        until = min(self._target, cursor + RUN_FRAMES)
        if isinstance(form, KeyframeStream):
            if form is not COMPRESSIBLE:
                return self._keyframes.between(form, cursor, until, self._tail)
            until = min(until, self._keyframes.next_keyframe(cursor) - 1)
            form = None
        is_held = cursor + 1 >= self._tail.first
        pieces = self._tail.between(cursor, until) if is_held else self._refills.get(cursor, ())
        return pieces if form is None else [form(piece) for piece in pieces]

    def _serve_otherwise(self, member: Member) -> None:
        """Serve a member in the form that fits its cursor, if it has another one; or else from the log."""
        form, cursor = member.form, member.cursor
        if isinstance(form, KeyframeStream):
            is_held = cursor + 1 >= self._tail.first
            fitting = self._keyframes.form_at(cursor) if is_held else COMPRESSIBLE
            if fitting is not form:
                cast(Any, member).form = fitting
                self._serve([member])
                return
        self._refill(member)

    # Acknowledging

    def owes(self, member: Member) -> bool:
        """Return True while a member waits for an acknowledgement."""
        return member in self._acks

    def acknowledge(self, member: Member, number: int, frame: bytes) -> None:
        """Send a member a frame once it has the entry of this number, in the current epoch of the log."""
        self._acks.setdefault(member, []).append((self._log.epoch, number, frame))
        self.resume(member)

    def _send_acks(self, members: Sequence[Member]) -> None:
        """Send each member the acknowledgements of entries that it has."""
        for member in members:
            acks = self._acks.get(member, [])  # none if it has left
            due = [frame for epoch, number, frame in acks if epoch == self.epoch and number <= member.cursor]
            if len(due) == len(acks):
                self._acks.pop(member, None)
            else:
                self._acks[member] = acks[len(due) :]
            if due:
                member.send_frame(b"".join(due))

    # Refilling

    def _refill(self, member: Member) -> None:
        """Read the log for a member that the tail overran, or evict a member that is too far behind."""
        cursor = member.cursor
        if cursor in self._next_refills:
            self._unfinished[member] = None
            return
        if cursor in self._refilling:
            self._refilling[cursor][member] = None
            return
        if self.head - cursor > MAX_LAG:
            self._evict(member)
            return
        self._refilling[cursor] = {member: None}
        self._log.read(self.name, cursor, self._history).addCallbacks(
            self._refilled, self._not_refilled, callbackArgs=(cursor,), errbackArgs=(cursor,)
        )

    def _refilled(self, page: Page, cursor: int) -> None:
        """Serve the members that wait at a cursor with the next pass."""
        waiting = [member for member in self._refilling.pop(cursor, ()) if member in self.members]
        if not waiting or self.epoch != self._log.epoch:  # the room is about to restart
            return
        if page.head < self.edited:  # it was read before an edit that the members have yet to get
            for member in waiting:
                self._refill(member)
            return
        if page.entries and page.entries[0].number == cursor + 1:
            self._next_refills[cursor] = self._encode(page.entries)
            self._unfinished |= dict.fromkeys(waiting)
            self._schedule()
            return
        for member in waiting:
            self._evict(member)

    def _not_refilled(self, failure: Failure, cursor: int) -> None:
        _logger.error("{room}: the log cannot be read: {error}", room=self.name, error=failure.value)
        for member in self._refilling.pop(cursor, ()):
            if member in self.members:
                self._evict(member)

    def _evict(self, member: Member) -> None:
        _logger.info("{room}: evicting a member {lag} entries behind", room=self.name, lag=self.head - member.cursor)
        member.evict()
