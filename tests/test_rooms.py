"""A room is a log; a client is a cursor."""

import pytest
from helpers import read_frames
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from chatd import rooms
from chatd.frames import Entry, Post, message_frame
from chatd.rooms import LogUnavailable, Page, Rooms, Run, Tail


class ScriptedLog:
    """A log that says only what the test makes it say; reads wait until answered when `held`."""

    epoch = "abcd"

    def __init__(self, entries=()):
        self.entries = list(entries)
        self.first = 1
        self.posts = []
        self.reads = []
        self.held = False

    def tail(self, follower):
        self.follower = follower

    def append(self, room, post, poster):
        self.posts.append((room, post, poster))

    def read(self, room, after, limit):
        reading = Deferred()
        self.reads.append((room, after, limit, reading))
        if not self.held:
            self.answer()
        return reading

    def answer(self):
        _, after, limit, reading = self.reads[-1]
        kept = [entry for entry in self.entries if entry.number >= self.first]
        page = kept[-limit:] if after is None else [entry for entry in kept if entry.number > after][:limit]
        reading.callback(Page(page, self.first, len(self.entries)))

    def say(self, count=1, text="x", room="main"):
        """Append as the log of all nodes would: keep, then tell."""
        new = [Entry(len(self.entries) + 1 + index, "ann", text, "t") for index in range(count)]
        self.entries += new
        self.follower.appended(room, new)


class Reader:
    """A member whose transport takes `space` bytes, or everything."""

    def __init__(self, space=None):
        self.cursor = 0
        self.ready = True
        self.space = space
        self.writes = []
        self.overran = False

    def write(self, data):
        taken = len(data) if self.space is None else min(self.space, len(data))
        if self.space is not None:
            self.space -= taken
        if taken:
            self.writes.append(data[:taken])
        return taken

    def hold(self, rest):
        self.ready = False
        self.held = rest

    def drain(self, room, space=None):
        """The transport is empty again: first the rest that it held goes out."""
        self.writes.append(self.held)
        self.ready = True
        self.space = space
        room.resume(self)

    def overrun(self):
        self.overran = True
        self.leave()

    @property
    def numbers(self):
        """Of the messages that it has received."""
        return [int(text["id"].split("-")[1]) for text in read_frames(b"".join(self.writes))]


class Turns(Clock):
    """A clock whose `turn` is the reactor's: what is put off to the next turn waits for it."""

    def turn(self):
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        for call in due:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def log():
    return ScriptedLog()


@pytest.fixture
def lobby(log, clock):
    return Rooms(log, clock, 100)


def enter(lobby, member=None, name="main"):
    """Open a room and join it, as a connection does."""
    member = member or Reader()
    entered = []
    lobby.open(name).addCallback(lambda room: entered.append((room, room.join(member))))
    room, greeting = entered[0]
    member.leave = lambda: lobby.leave(room, member)
    (history,) = read_frames(greeting)
    return room, member, history


def turns(clock, count=20):
    for _ in range(count):
        clock.turn()


# Joining


def test_who_joins_gets_the_newest_messages_oldest_first(log, clock):
    log.entries = [Entry(number, "ann", f"m{number}", "t") for number in range(1, 8)]
    _, member, history = enter(Rooms(log, clock, 3))
    assert history == {
        "type": "history",
        "id": "abcd-7",
        "more": True,
        "data": [{"username": "ann", "message": f"m{number}", "timestamp": "t"} for number in (5, 6, 7)],
    }
    assert member.cursor == 7


def test_an_empty_room_begins_with_a_cursor_too(lobby):
    assert enter(lobby)[2] == {"type": "history", "id": "abcd-0", "data": []}


def test_more_is_said_only_when_the_log_holds_older_messages(log, clock):
    log.entries = [Entry(number, "ann", "m", "t") for number in range(1, 8)]
    log.first = 5
    _, _, history = enter(Rooms(log, clock, 3))
    assert "more" not in history
    assert history["id"] == "abcd-7"


def test_the_history_ends_where_the_messages_that_follow_begin(log, lobby, clock):
    room, first, _ = enter(lobby)
    log.say(3)
    _, second, history = enter(lobby)
    log.say(2)
    turns(clock)
    assert [len(history["data"]), history["id"]] == [3, "abcd-3"]
    assert first.numbers == [1, 2, 3, 4, 5]
    assert second.numbers == [4, 5]
    assert room.head == 5


def test_who_join_at_one_head_share_one_encoded_history(log, lobby):
    room, _, _ = enter(lobby)
    log.say()
    assert room.join(Reader()) is room.join(Reader())
    before = room.join(Reader())
    log.say()
    assert room.join(Reader()) is not before


def test_the_history_shows_no_more_what_retention_removed(log, lobby):
    room, _, _ = enter(lobby)
    log.say(5)
    log.first = 4
    log.follower.trimmed("main", 4)
    _, _, history = enter(lobby)
    assert len(history["data"]) == 2
    assert history["id"] == "abcd-5"
    log.follower.trimmed("elsewhere", 4)
    assert room.head == 5


def test_the_history_goes_on_growing_with_the_room(log, clock):
    lobby = Rooms(log, clock, 3)
    enter(lobby)
    log.say(5)
    assert [len(enter(lobby)[2]["data"]), enter(lobby)[2]["more"]] == [3, True]


# Loading and forgetting


def test_the_first_to_come_waits_for_the_log_and_the_others_wait_with_it(log, lobby):
    log.held = True
    opened = [lobby.open("main"), lobby.open("main")]
    assert [waiting.called for waiting in opened] == [False, False]
    assert len(log.reads) == 1
    log.answer()
    assert opened[0].result is opened[1].result


def test_what_is_appended_while_a_room_is_loaded_is_neither_lost_nor_doubled(log, lobby):
    log.held = True
    entered = []
    member = Reader()
    lobby.open("main").addCallback(lambda room: entered.append(read_frames(room.join(member))[0]))
    log.say()
    log.say()
    log.entries.pop()  # the page was read between the two
    log.answer()
    assert [entered[0]["id"], len(entered[0]["data"])] == ["abcd-2", 2]


def test_a_log_that_is_down_fails_all_who_wait_and_the_next_try_is_a_new_one(log, lobby):
    log.held = True
    failures = []
    for _ in range(2):
        lobby.open("main").addErrback(failures.append)
    log.reads[0][3].errback(LogUnavailable("down"))
    assert [failure.type for failure in failures] == [LogUnavailable, LogUnavailable]
    log.held = False
    assert enter(lobby)[2]["id"] == "abcd-0"


def test_a_room_is_forgotten_with_its_last_member(log, lobby):
    room, member, _ = enter(lobby)
    other = enter(lobby)[1]
    lobby.leave(room, member)
    assert enter(lobby)[0] is room
    lobby.leave(room, other)
    for reader in [*room.members]:
        lobby.leave(room, reader)
    assert lobby._rooms == {}
    assert enter(lobby)[0] is not room


def test_a_room_that_was_opened_and_not_joined_is_forgotten(lobby, clock):
    lobby.open("main")
    clock.turn()
    assert lobby._rooms == {}


def test_a_million_names_leave_nothing_behind(lobby, clock):
    for number in range(1000):  # in proportion
        room, member, _ = enter(lobby, name=f"r{number}")
        lobby.leave(room, member)
    clock.turn()
    assert (lobby._rooms, lobby._loading, lobby._missed) == ({}, {}, {})


def test_messages_of_other_rooms_are_passed_over(log, lobby, clock):
    _, member, _ = enter(lobby)
    log.say(room="elsewhere")
    turns(clock)
    assert member.writes == []


def test_a_post_goes_to_the_log_and_nowhere_else(log, lobby, clock):
    _, member, _ = enter(lobby)
    poster = object()
    lobby.post("main", Post("ann", "hi"), poster)
    turns(clock)
    assert log.posts == [("main", Post("ann", "hi"), poster)]
    assert member.writes == []


# The flush


def test_nothing_is_sent_before_the_next_turn_and_all_that_came_in_one_turn_is_one_write(log, lobby, clock):
    members = [enter(lobby)[1] for _ in range(3)]
    log.say()
    log.say(2)
    assert [member.writes for member in members] == [[], [], []]
    clock.turn()
    assert [member.numbers for member in members] == [[1, 2, 3]] * 3
    assert [len(member.writes) for member in members] == [1, 1, 1]


def test_members_at_one_cursor_are_handed_the_same_bytes(log, lobby, clock):
    one, other = enter(lobby)[1], enter(lobby)[1]
    log.say(2)
    clock.turn()
    assert one.writes[0] is other.writes[0] or one.writes == other.writes
    taken = []
    for member in (one, other):
        member.write = lambda data: taken.append(data) or len(data)
    log.say(2)
    clock.turn()
    assert taken[0] is taken[1]


def test_when_all_is_sent_nothing_is_left_to_do(log, lobby, clock):
    enter(lobby)
    log.say()
    assert lobby.busy
    turns(clock)
    assert not lobby.busy
    assert clock.getDelayedCalls() == []


def test_who_left_is_sent_nothing(log, lobby, clock):
    room, member, _ = enter(lobby)
    enter(lobby)
    log.say()
    lobby.leave(room, member)
    turns(clock)
    assert member.writes == []


class Slow(Reader):
    """A member whose every write takes time."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def write(self, data):
        self.clock.rightNow += self.seconds
        return super().write(data)


def test_a_long_pass_is_sliced_and_goes_on_where_it_stopped(log, lobby, clock):
    members = [enter(lobby, Slow(clock, 0.001))[1] for _ in range(rooms.SLICE_MEMBERS * 3 - 1)]
    log.say()
    served = []
    while lobby.busy:
        clock.turn()
        served.append(sum(bool(member.writes) for member in members))
        assert len(served) < 10
    assert served[:3] == [rooms.SLICE_MEMBERS, rooms.SLICE_MEMBERS * 2, len(members)]


def test_messages_that_come_during_a_pass_reach_all_in_the_next(log, lobby, clock):
    members = [enter(lobby, Slow(clock, 0.001))[1] for _ in range(rooms.SLICE_MEMBERS * 2)]
    log.say()
    clock.turn()  # half of them
    log.say()
    newcomer = enter(lobby)[1]
    turns(clock)
    assert [member.numbers for member in members] == [[1, 2]] * len(members)
    assert [len(member.writes) for member in members] == [2] * len(members)
    assert newcomer.numbers == []


def test_a_member_is_handed_a_bounded_run_in_one_turn(log, lobby, clock, monkeypatch):
    frame = len(message_frame("abcd", Entry(1, "ann", "x", "t")))
    monkeypatch.setattr(rooms, "RUN_BYTES", 3 * frame)
    _, member, _ = enter(lobby)
    log.say(8)
    turns(clock)
    assert member.numbers == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(read_frames(data)) for data in member.writes] == [3, 3, 2]


def test_a_frame_above_the_bound_is_still_sent(log, lobby, clock, monkeypatch):
    monkeypatch.setattr(rooms, "RUN_BYTES", 1)
    _, member, _ = enter(lobby)
    log.say(2)
    turns(clock)
    assert member.numbers == [1, 2]


# Slow members


def test_a_frame_that_is_cut_is_completed_first_and_nothing_else_is_kept(log, lobby, clock):
    frame = len(message_frame("abcd", Entry(1, "ann", "x", "t")))
    room, member, _ = enter(lobby, Reader(frame + 5))
    log.say(4)
    turns(clock)
    assert not member.ready
    assert member.cursor == 2
    assert len(member.held) == frame - 5
    log.say()
    turns(clock)
    member.drain(room)
    turns(clock)
    assert member.numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_cut_between_two_frames_holds_the_next_one_and_no_more(log, lobby, clock, taken):
    frame = len(message_frame("abcd", Entry(1, "ann", "x", "t")))
    room, member, _ = enter(lobby, Reader(taken * frame))
    log.say(3)
    turns(clock)
    assert member.cursor == taken + 1
    assert len(member.held) == frame
    member.drain(room)
    turns(clock)
    assert member.numbers == [1, 2, 3]


def test_a_slow_member_does_not_hold_up_the_others(log, lobby, clock):
    enter(lobby, Reader(0))
    fast = enter(lobby)[1]
    for _ in range(5):
        log.say()
        turns(clock)
    assert fast.numbers == [1, 2, 3, 4, 5]


def test_a_member_that_resumes_with_nothing_to_get_costs_nothing(log, lobby, clock):
    room, member, _ = enter(lobby)
    turns(clock)
    room.resume(member)
    assert clock.getDelayedCalls() == []


@pytest.fixture
def short_tail(monkeypatch):
    """A tail of a few frames, so that the log is needed soon."""
    monkeypatch.setattr(rooms, "TAIL_BYTES", 400)


def overrun(log, lobby, clock, count=40):
    """A room whose tail has moved on past a stalled member."""
    room, member, _ = enter(lobby, Reader(0))
    log.say()
    turns(clock)
    log.say(count - 1)
    turns(clock)
    assert room._tail.first > member.cursor + 1
    return room, member


def reading(log, clock):
    """A member that was overrun and for which the log is being read."""
    lobby = Rooms(log, clock, 5)
    room, member = overrun(log, lobby, clock)
    log.held = True
    member.drain(room)
    turns(clock)
    return lobby, room, member


def test_who_was_overrun_by_the_tail_is_caught_up_from_the_log(log, clock, short_tail):
    room, member = overrun(log, Rooms(log, clock, 5), clock)
    reads = len(log.reads)
    member.drain(room)
    turns(clock, 60)
    assert member.numbers == [*range(1, 41)]
    assert len(log.reads) > reads
    assert clock.getDelayedCalls() == []


def test_while_the_log_is_read_for_a_member_it_is_read_once(log, clock, short_tail):
    lobby = Rooms(log, clock, 5)
    room, member = overrun(log, lobby, clock)
    log.held = True
    reads = len(log.reads)
    member.drain(room)
    turns(clock)
    log.say()
    turns(clock)
    assert len(log.reads) == reads + 1
    assert lobby.busy
    log.held = False
    log.answer()
    turns(clock, 60)
    assert member.numbers == [*range(1, 42)]


def test_a_member_that_stalls_again_while_the_log_is_read_loses_nothing(log, clock, short_tail):
    _, room, member = reading(log, clock)
    member.ready = False
    log.held = False
    log.answer()
    member.held = b""
    member.drain(room, space=10)
    turns(clock)
    member.drain(room)
    turns(clock, 60)
    assert member.numbers == [*range(1, 41)]


def test_who_left_while_the_log_was_read_is_sent_nothing(log, clock, short_tail):
    lobby, room, member = reading(log, clock)
    lobby.leave(room, member)
    writes = len(member.writes)
    log.answer()
    turns(clock)
    assert len(member.writes) == writes
    assert not member.overran


def test_who_is_too_far_behind_is_told_to_come_back(log, clock, short_tail, monkeypatch):
    monkeypatch.setattr(rooms, "MAX_LAG", 30)
    room, member = overrun(log, Rooms(log, clock, 5), clock)
    member.drain(room)
    turns(clock)
    assert member.overran


def test_who_misses_what_retention_removed_is_told_to_come_back_rather_than_given_a_gap(log, clock, short_tail):
    room, member = overrun(log, Rooms(log, clock, 5), clock)
    log.first = 20
    member.drain(room)
    turns(clock)
    assert member.overran
    assert member.numbers == [1]


def test_a_log_that_cannot_be_read_closes_who_needs_it(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.reads[-1][3].errback(LogUnavailable("down"))
    assert member.overran


def test_a_log_that_cannot_be_read_closes_nobody_who_has_left(log, clock, short_tail):
    lobby, room, member = reading(log, clock)
    lobby.leave(room, member)
    log.reads[-1][3].errback(LogUnavailable("down"))
    assert not member.overran


def test_many_cursors_do_not_pile_up_joined_runs(log, lobby, clock, monkeypatch):
    monkeypatch.setattr(rooms, "RUNS", 3)
    members = [enter(lobby, Reader(0))[1] for _ in range(10)]
    room = next(iter(lobby._rooms.values()))
    most = []
    for number, member in enumerate(members):
        log.say()
        turns(clock)
        member.cursor = number
    for member in members:
        member.held = b""
        member.writes = []
        member.drain(room)
    flush = room._flush
    clock.getDelayedCalls()[0].cancel()
    flush()
    most.append(len(room._runs))
    turns(clock)
    assert max(most) <= 3
    assert all(member.numbers == [*range(number + 1, 11)] for number, member in enumerate(members))


# The parts


def test_the_tail_lets_go_of_the_oldest_but_never_of_the_history(monkeypatch):
    monkeypatch.setattr(rooms, "TAIL_BYTES", 100)
    tail = Tail(0, 4)
    for number in range(1, 101):
        tail.extend([b"x" * 30])
        assert tail.head == number
        assert len(tail.between(tail.first - 1, tail.head)) >= min(number, 4)
        assert len(tail.between(tail.first - 1, tail.head)) <= 9


def test_a_run_is_cut_at_the_frame_that_its_bytes_fall_in():
    run = Run.of(7, [b"aa", b"bbb", b"c"])
    assert run == Run(b"aabbbc", 6, 10, [b"aa", b"bbb", b"c"])
    assert [run.cut(taken) for taken in range(6)] == [
        (8, b"aa"),
        (8, b"a"),
        (9, b"bbb"),
        (9, b"bb"),
        (9, b"b"),
        (10, b"c"),
    ]


class OneRoomWithSlowReaders(RuleBasedStateMachine):
    """Whatever members and transports do, each has received a run of the log without gap or double."""

    @initialize(tail=st.integers(200, 2000), history=st.integers(1, 5))
    def begin(self, tail, history):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(rooms, "TAIL_BYTES", tail)
        self.patch.setattr(rooms, "RUN_BYTES", 400)
        self.clock, self.log = Turns(), ScriptedLog()
        self.lobby = Rooms(self.log, self.clock, history)
        self.members = {}

    def teardown(self):
        self.patch.undo()

    @rule(space=st.none() | st.integers(0, 600))
    def join(self, space):
        room, member, history = enter(self.lobby, Reader(space))
        self.members[member] = room, int(history["id"].split("-")[1])

    @rule(count=st.integers(1, 9))
    def say(self, count):
        self.log.say(count, "x" * count)

    @rule()
    def turn(self):
        self.clock.turn()

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: any(not member.ready for member in self.members))
    def drain(self, which, space):
        member = which.choice([member for member in self.members if not member.ready])
        member.drain(self.members[member][0], space)

    @rule(which=st.randoms(use_true_random=False))
    @precondition(lambda self: self.members)
    def leave(self, which):
        member = which.choice([*self.members])
        self.lobby.leave(self.members.pop(member)[0], member)

    @invariant()
    def nobody_is_closed(self):
        assert not any(member.overran for member in getattr(self, "members", ()))

    @rule()
    def all_catch_up(self):
        for _ in range(200):
            for member, (room, _) in self.members.items():
                if not member.ready:
                    member.drain(room)
            if not self.clock.getDelayedCalls():
                break
            self.clock.turn()
        head = len(self.log.entries)
        for member, (_, joined) in self.members.items():
            assert member.numbers == [*range(joined + 1, head + 1)]
            assert member.cursor == head


OneRoomWithSlowReaders.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOneRoomWithSlowReaders = OneRoomWithSlowReaders.TestCase
