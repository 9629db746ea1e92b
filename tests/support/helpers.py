"""Doubles that the tests share: small, in memory, and passive until a test acts on them."""

import gc
import io
import json
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from types import FunctionType, ModuleType
from typing import Any

import pytest
from hypothesis import settings
from support.websocket_frames import read_frames
from twisted.internet.defer import Deferred, execute
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from chatd.messages import REMOVED, Entry, Id, Post
from chatd.room.log import LogUnavailable, Page, Refusal
from chatd.store.base import timestamp

# pytest explains failed assertions only in test files and in the modules named here.
pytest.register_assert_rewrite("support.store_contract")

# The same examples in every run and on every machine, and no file written beside the tests.
REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=200)

COLLECTIONS = (dict, list, tuple, set, frozenset, deque)

NEW_YEAR = 1_767_225_600.0

PING_SECONDS = 25
"""The time between two pings of the connections in tests."""
"""2026-01-01T00:00:00Z."""


class ManualTime:
    """Seconds since 1970 that pass only when the test advances them.

    `steady` returns seconds that pass with it, except when it is set back or jumps.
    """

    def __init__(self, now: float = NEW_YEAR) -> None:
        self.now = now
        self._passed = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self._passed += max(seconds, 0.0)

    def jump(self, seconds: float) -> None:
        """Set the clock, while no time passes."""
        self.now += seconds

    def steady(self) -> float:
        return self._passed


class Longest(Random):
    """A source of chance with which every backoff lasts as long as it may."""

    def random(self) -> float:
        return 1.0


class Terminal(io.StringIO):
    """A text stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class RecordingPoster:
    """A Poster that records ("posted" or "duplicate", post, number) or ("refused", post, error)."""

    def __init__(self, events: list[tuple[Any, ...]] | None = None) -> None:
        self.events = [] if events is None else events

    @property
    def numbers(self) -> list[int]:
        return [event[2] for event in self.events if event[0] == "posted"]

    @property
    def refusals(self) -> list[str]:
        return [str(event[2]) for event in self.events if event[0] == "refused"]

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        self.events.append(("duplicate" if duplicate else "posted", post, number))

    def refused(self, post: Post, error: Refusal) -> None:
        assert isinstance(error, Refusal)
        self.events.append(("refused", post, error))


class RecordingFollower:
    """A Follower that records ("appended", room, entry) for each, ("trimmed", room, first) and ("interrupted",)."""

    def __init__(self, events: list[tuple[Any, ...]] | None = None) -> None:
        self.events = [] if events is None else events

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        self.events.extend(("appended", room, entry) for entry in entries)

    def trimmed(self, room: str, first: int) -> None:
        self.events.append(("trimmed", room, first))

    def interrupted(self) -> None:
        self.events.append(("interrupted",))


class ImmediateWorker:
    """A Worker that runs each task at once."""

    def __init__(self) -> None:
        self.running = False

    def start(self) -> None:
        self.running = True

    def do(self, work: Callable[[], Any]) -> "Deferred[Any]":
        assert self.running, "asked before the start, or after the end"
        return execute(work)

    def stop(self) -> None:
        self.running = False


class HeldWorker(ImmediateWorker):
    """A Worker that queues its tasks; the test runs them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.held: deque[tuple[Callable[[], Any], Deferred[Any]]] = deque()

    def do(self, work: Callable[[], Any]) -> "Deferred[Any]":
        assert self.running, "asked before the start, or after the end"
        answer: Deferred[Any] = Deferred()
        self.held.append((work, answer))
        return answer

    def run(self) -> None:
        """Run the oldest task, and fire its Deferred."""
        work, answer = self.held.popleft()
        execute(work).chainDeferred(answer)

    def run_all(self) -> None:
        """Run all tasks, and those added meanwhile."""
        while self.held:
            self.run()

    def stop(self) -> None:
        # A pool of threads finishes its tasks first too.
        self.run_all()
        super().stop()


def result_of(deferred: "Deferred[Any]") -> Any:
    """Return the result of a Deferred; raises the exception it failed with."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    assert results, "it has not fired"
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


HEAD = (
    b"GET / HTTP/1.1\r\nHost: localhost:8085\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
)


def read_events(data):
    """Return the JSON of each event in a stream of Server-Sent Events (HTML Living Standard, section 9.2)."""
    texts = []
    *events, rest = data.decode().split("\n\n")
    assert rest == "", "an event was cut"
    for event in events:
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        text = json.loads(fields["data"])
        # Only entries have an id there, because browsers use it as the cursor.
        cursor = text["id"] if text["type"] in ("history", "message") else None
        assert (fields["event"], fields.get("id")) == (text["type"], cursor)
        texts.append(text)
    return texts


class Turns(Clock):
    """A clock whose `turn` is one turn of a reactor: calls scheduled in a turn wait for the next."""

    def turn(self):
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)

    def turns(self, count=20):
        for _ in range(count):
            self.turn()

    @property
    def idle(self):
        """True if the next turn has nothing to do."""
        return self.idle_for(0)

    def idle_for(self, seconds):
        """Return whether nothing is due within this time."""
        return all(call.getTime() > self.seconds() + seconds for call in self.calls)


def held_by(owner, *others):
    """Yield every object reachable from an object by attributes and collections, except through `others`."""
    seen, todo = {id(other) for other in others}, [owner]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType)):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, COLLECTIONS):
            todo += [*one, *one.values()] if isinstance(one, dict) else one
        else:
            todo += getattr(one, "__dict__", {}).values()


def count_held(owner, *others):
    """Count the items in all collections reachable from an object, except through `others`.

    An object that forgets what it should holds as many items afterwards as before.
    """
    return sum(len(one) for one in held_by(owner, *others) if isinstance(one, COLLECTIONS))


def holds_text(text, owner, *others):
    """Return whether any bytes that are reachable from an object, except through `others`, contain a text."""
    seen, todo = {id(other) for other in others}, [owner]
    while todo:
        one = todo.pop()
        if isinstance(one, bytes) and text.encode() in one:
            return True
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen.add(id(one))
            todo += gc.get_referents(one)
    return False


def stamped(number):
    """Return the timestamp of the entry of this number in a ScriptedLog, which identifies it."""
    return timestamp(NEW_YEAR + number)


def holds(history):
    """Return the numbers of the entries in a history frame, and check that its id agrees."""
    end, count = Id.parse(history["id"]).number, len(history["data"])
    numbers = [*range(end - count + 1, end + 1)]
    assert [entry["timestamp"] for entry in history["data"]] == [stamped(number) for number in numbers]
    return numbers


class ScriptedLog:
    """A log of one room that the test drives; while it is `held`, reads wait for the test to answer them.

    A page belongs to the epoch at the time of the answer, as in every log.
    """

    epoch = "abcd"

    def __init__(self, count=0):
        self.first = 1
        self.entries = []
        self.posts = []
        self.reads = []
        self.held = False
        self.waiting = deque()
        self.keep(count)

    def follow(self, follower):
        self.follower = follower

    def append(self, room, post, poster):
        self.posts.append((room, post, poster))

    def read(self, room, after, limit):
        reading = Deferred()
        self.reads.append((room, after, limit))
        if self.held:
            self.waiting.append((after, limit, reading))
        else:
            reading.callback(self.page(after, limit))
        return reading

    def page(self, after, limit):
        kept = self.entries[self.first - 1 :]
        some = kept[-limit:] if after is None else [entry for entry in kept if entry.number > after][:limit]
        return Page(some, self.first, len(self.entries))

    def answer(self, page=None):
        """Answer the oldest read with the current page, or with another one."""
        after, limit, reading = self.waiting.popleft()
        reading.callback(page or self.page(after, limit))

    def release(self):
        """Answer all reads, and stop holding."""
        self.held = False
        while self.waiting:
            self.answer()

    def fail(self):
        """Fail the oldest read."""
        self.waiting.popleft()[2].errback(LogUnavailable("down"))

    def keep(self, count=1, text="x"):
        """Append entries without a notification."""
        head = len(self.entries)
        new = [Entry(number, "ann", text, stamped(number)) for number in range(head + 1, head + count + 1)]
        self.entries += new
        return new

    def say(self, count=1, text="x", room="main"):
        """Append entries and notify the follower."""
        self.follower.appended(room, self.keep(count, text))

    def trim(self, first, room="main"):
        self.first = first
        self.follower.trimmed(room, first)

    def miss(self, count=0, text="x"):
        """Append entries whose notifications are lost, and interrupt the follower."""
        self.keep(count, text)
        self.follower.interrupted()

    def lose(self, kept=0, epoch="efgh"):
        """Lose all but the first entries, and begin another history."""
        self.epoch, self.entries = epoch, self.entries[:kept]
        self.first = min(self.first, kept + 1)
        self.follower.interrupted()


class EditedLog(ScriptedLog):
    """A log whose entries the test replaces and removes."""

    def edit(self, original, text="new", *, removed=False, notify=True):
        """Append an edit, and notify the follower."""
        number = len(self.entries) + 1
        extra = None if removed else {"note": text}
        edit = Entry(number, "ann", REMOVED if removed else text, stamped(number), "a", original, removed, extra=extra)
        for place, entry in enumerate(self.entries):
            if entry.number == original or (removed and entry.replaces == original):
                self.entries[place] = entry.revised(edit)
        self.entries.append(edit)
        if notify:
            self.follower.appended("main", [edit])

    def remove(self, original):
        self.edit(original, removed=True)


class Reader:
    """A member whose transport takes `space` bytes of entries, or everything."""

    def __init__(self, space=None, *, events=(), name=None, form=None):
        self.cursor = 0
        self.ready = True
        self.space = space
        self.events = frozenset(events)
        self.name = name
        self.form = form
        self.writes = []
        self.held = b""
        self.overran = False

    def write(self, data):
        assert self.ready
        taken = len(data) if self.space is None else min(self.space, len(data))
        if self.space is not None:
            self.space -= taken
        if taken:
            self.writes.append(data[:taken])
        return taken

    def hold(self, rest):
        self.ready = False
        self.held = rest

    def send_frame(self, frame):
        told = frame if self.form is None else self.form(frame)
        if self.ready:
            self.writes.append(told)
        else:
            self.held += told

    @property
    def takes_events(self):
        return self.ready

    def start_over(self, history):
        self.send_frame(history)

    def drain(self, room, space=None):
        """Empty the transport: the rest that it held goes out first."""
        self.writes.append(self.held)
        self.held = b""
        self.ready = True
        self.space = space
        room.resume(self)

    def evict(self):
        self.overran = True
        self.leave()

    @property
    def texts(self):
        """Every frame received."""
        return (read_frames if self.form is None else read_events)(b"".join(self.writes))

    @property
    def numbers(self):
        """The number of every message received."""
        messages = [text for text in self.texts if text["type"] == "message"]
        numbers = [Id.parse(text["id"]).number for text in messages]
        assert [text["data"]["timestamp"] for text in messages] == [stamped(number) for number in numbers]
        return numbers


class Slow(Reader):
    """A member whose every write takes a millisecond."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def write(self, data):
        self.clock.rightNow += 0.001
        return super().write(data)


def arrive(rooms, member=None, name="main", last=None):
    """Open a room and join it as a connection does; return a list that gets (room, member, history) or a failure."""
    member = member or Reader()
    arrived = []

    def join(opening):
        (history,) = read_frames(opening.join(member))
        holds(history)
        member.leave = lambda: rooms.leave(opening.room, member)
        arrived.append((opening.room, member, history))

    rooms.open(name, last and Id.parse(last)).addCallback(join).addErrback(arrived.append)
    return arrived


def enter(rooms, member=None, name="main", last=None):
    """Join a room whose log answers at once; return (room, member, history)."""
    ((room, member, history),) = arrive(rooms, member, name, last)
    return room, member, history
