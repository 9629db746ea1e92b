"""The registry: rooms are loaded for the first member, forgotten with the last, and read by page.

After an interruption of the log they are loaded again.  Their members get what they lack, or another history.
"""

import gc
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from support.helpers import (
    REPEATABLE,
    Reader,
    ScriptedLog,
    Slow,
    Turns,
    arrive,
    count_held,
    enter,
    holds,
    result_of,
    stamped,
)
from support.room_machines import RoomMachine
from support.websocket_frames import read_frames

from chatd.messages import Id, PageRequest, Post
from chatd.room.log import LogUnavailable, UnknownId
from chatd.room.presence import PRESENCE, TYPING, Occupancy
from chatd.room.registry import RELOAD_SECONDS, Registry
from chatd.room.room import MAX_LAG
from chatd.room.sweep import SLICE_MEMBERS
from chatd.transport import frames
from chatd.transport.frames import ack_frame, event


def summary(history):
    """Return the answer of a history frame to a resume, its id, and the number of its entries."""
    return history.get("resumed"), history["id"], len(history["data"])


# Loading


def test_first_member_loads_room(log, rooms):
    log.keep(3)
    assert summary(enter(rooms)[2]) == (None, "abcd-3", 3)
    enter(rooms)
    assert log.reads == [("main", None, 100)]


def test_joins_share_one_load(log, rooms):
    log.held = True
    arrived = [arrive(rooms), arrive(rooms)]
    assert arrived == [[], []]
    assert len(log.reads) == 1
    log.answer()
    assert arrived[0][0][0] is arrived[1][0][0]


def test_rooms_load_separately(log, rooms):
    log.held = True
    one, other = arrive(rooms, name="one"), arrive(rooms, name="other")
    assert [name for name, _, _ in log.reads] == ["one", "other"]
    log.answer()
    assert [len(one), len(other)] == [1, 0]
    log.answer()
    assert one[0][0] is not other[0][0]


def test_append_during_load(log, rooms, clock):
    log.held = True
    arrived = arrive(rooms)
    log.say()
    page = log.page(None, 100)
    log.say()
    log.answer(page)
    ((_, member, history),) = arrived
    assert summary(history) == (None, "abcd-2", 2)
    log.say()
    clock.turns()
    assert member.numbers == [3]


def test_trim_during_load(log, rooms):
    log.keep(5)
    log.held = True
    arrived = arrive(rooms)
    page = log.page(None, 100)
    log.trim(4)
    log.answer(page)
    assert summary(arrived[0][2]) == (None, "abcd-5", 2)


def test_failed_load_then_retry(log, rooms, clock):
    log.held = True
    arrived = [arrive(rooms), arrive(rooms)]
    log.fail()
    assert [failure.type for (failure,) in arrived] == [LogUnavailable, LogUnavailable]
    assert count_held(rooms, log, clock) == 0
    log.release()
    assert enter(rooms)[2]["id"] == "abcd-0"


def test_retry_in_errback_of_load(log, rooms):
    log.held = True
    again = []
    rooms.open("main").addErrback(lambda _: again.append(arrive(rooms)))
    log.fail()
    log.release()
    assert summary(again[0][0][2]) == (None, "abcd-0", 0)


# Forgetting


def test_last_leave_forgets_room(log, rooms):
    room, member, _ = enter(rooms)
    _, other, _ = enter(rooms)
    rooms.leave(room, member)
    assert [*rooms] == [room]
    rooms.leave(room, other)
    assert [*rooms] == []
    assert enter(rooms)[0] is not room


def test_unjoined_room_is_forgotten(rooms, clock):
    rooms.open("main")
    assert len(rooms) == 1
    clock.turn()
    assert len(rooms) == 0


def test_joined_room_is_kept(rooms, clock):
    room, _, _ = enter(rooms)
    clock.turns()
    assert [*rooms] == [room]


def test_forgetting_old_room_keeps_new_one(log, rooms, clock):
    old, member, _ = enter(rooms)
    rooms.leave(old, member)
    new, _, _ = enter(rooms)
    clock.turns()
    assert [*rooms] == [new]


def test_names_leave_nothing_behind(log, rooms, clock):
    for number in range(1000):  # in proportion
        name, last = f"r{number}", f"abcd-{number}"
        room, member, _ = enter(rooms, name=name, last=last)
        room.presence.typing("ann")
        rooms.leave(room, member)
        rooms.open(name)
        result_of(rooms.page(name, PageRequest(None, None, 5, None)))
        log.follower.appended(name, [])
        log.follower.trimmed(name, 1)
        clock.turn()
    assert count_held(rooms, log, clock) == 0
    assert clock.getDelayedCalls() == []


# Following


def test_entries_of_other_rooms_are_ignored(log, rooms, clock):
    _, member, _ = enter(rooms)
    log.say(room="elsewhere")
    log.trim(2, room="elsewhere")
    clock.turns()
    assert member.writes == []
    assert summary(enter(rooms)[2]) == (None, "abcd-0", 0)


def test_trim_reaches_room(log, rooms):
    enter(rooms)
    log.say(5)
    log.trim(4)
    assert summary(enter(rooms)[2]) == (None, "abcd-5", 2)


def test_post_goes_to_log_only(log, rooms, clock):
    """A room shows a post only when the log notifies it."""
    _, member, _ = enter(rooms)
    poster = object()
    rooms.post("main", Post("ann", "hi"), poster)
    clock.turns()
    assert log.posts == [("main", Post("ann", "hi"), poster)]
    assert member.writes == []


def test_epoch_is_that_of_log(log, rooms):
    assert rooms.epoch == "abcd"
    log.epoch = "efgh"
    assert rooms.epoch == "efgh"


# Other nodes


class Lobby:
    """A lobby that records reports."""

    def __init__(self):
        self.reports = []

    def follow(self, listener):
        self.listener = listener

    def report(self, room, here, typing):
        self.reports.append((room, *here, [*typing]))


@pytest.fixture
def lobby():
    return Lobby()


@pytest.fixture
def node(log, clock, lobby):
    return Registry(log, frames, clock, 100, lobby)


def watcher():
    return Reader(events=[PRESENCE, TYPING], name="ann")


def shown(member):
    """Return the presence and typing frames that a member received."""
    return [text["data"] for text in member.texts if text["type"] in (PRESENCE, TYPING)]


def test_lobby_gets_reports(node, clock, lobby):
    enter(node, Reader(name="ann"))
    room, _, _ = enter(node, Reader(name="bob"), name="kitchen")
    room.presence.typing("bob")
    clock.turns()
    assert lobby.reports == [("main", 1, {"ann"}, []), ("kitchen", 1, {"bob"}, ["bob"])]


@pytest.mark.parametrize("stale", [False, True])
def test_remote_occupancy_until_node_leaves(log, node, clock, lobby, stale):
    _, member, _ = enter(node, watcher())
    _, other, _ = enter(node, watcher(), name="kitchen")
    clock.turns()
    log.held = True
    if stale:
        log.miss()
    for room in ("main", "nowhere"):
        lobby.listener.occupancy_changed(room, "B", Occupancy(2, frozenset({"bob"})))
        lobby.listener.typing(room, ["bob"])
    clock.advance(1)
    lobby.listener.node_left("B")
    clock.advance(1)
    alone = {"count": 1, "users": ["ann"]}
    assert shown(member) == [
        alone,
        {"count": 3, "join": ["bob"], "leave": []},
        {"users": ["bob"]},
        {"count": 1, "join": [], "leave": ["bob"]},
    ]
    assert shown(other) == [alone]


# Resuming


def test_resume_from_tail_reads_nothing(log, rooms):
    log.keep(5)
    enter(rooms)
    assert summary(enter(rooms, last="abcd-2")[2]) == (True, "abcd-5", 3)
    assert len(log.reads) == 1


def test_resume_reads_backlog(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    _, member, history = enter(rooms, last="abcd-3")
    assert summary(history) == (True, "abcd-8", 5)
    clock.turns()
    assert member.numbers == [9, 10, 11, 12]
    assert log.reads[:2] == [("main", None, 5), ("main", 3, 5)]


def test_resumes_share_one_backlog(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(50)]
    other = arrive(rooms, last="abcd-2")
    assert log.reads[1:] == [("main", 3, 5), ("main", 2, 5)]
    log.release()
    assert {summary(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}
    assert summary(other[0][2]) == (True, "abcd-7", 5)


def test_resumes_share_load_and_backlog(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(50)]
    log.answer()
    assert log.reads == [("main", None, 5), ("main", 3, 5)]
    log.answer()
    assert {summary(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}


def test_resume_with_log_ahead_of_room(log, rooms, clock):
    enter(rooms)
    new = log.keep(3)
    _, ahead, history = enter(rooms, last="abcd-3")
    assert summary(history) == (True, "abcd-3", 0)
    _, between, history = enter(rooms, last="abcd-1")
    assert summary(history) == (True, "abcd-3", 2)
    log.follower.appended("main", new)
    log.say(2)
    clock.turns()
    assert [ahead.numbers, between.numbers] == [[4, 5], [4, 5]]


def test_resume_beyond_log(log, rooms):
    enter(rooms)
    log.keep(3)
    _, _, history = enter(rooms, last="abcd-4")
    assert summary(history) == (False, "abcd-0", 0)


@pytest.mark.parametrize("last", ["wxyz-3", "wxyz-99", "abcd-1"])
def test_no_read_for_lost_entries(log, clock, last):
    log.keep(20)
    log.first = 4
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    assert summary(enter(rooms, last=last)[2]) == (False, "abcd-20", 5)
    assert len(log.reads) == 1


def test_no_read_beyond_max_lag(log, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 10)
    log.keep(20)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    assert summary(enter(rooms, last="abcd-9")[2]) == (False, "abcd-20", 5)
    assert len(log.reads) == 1
    assert summary(enter(rooms, last="abcd-10")[2]) == (True, "abcd-15", 5)


def test_trim_during_backlog_read(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    page = log.page(3, 5)
    log.trim(6)
    log.answer(page)
    assert summary(arrived[0][2]) == (False, "abcd-12", 5)


def test_append_during_backlog_read(log, clock, short_tail):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.say(3)
    log.release()
    ((_, member, history),) = arrived
    clock.turns(60)
    assert summary(history) == (True, "abcd-8", 5)
    assert member.numbers == [*range(9, 16)]


def test_room_forgotten_during_backlog_read(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(3)]
    log.answer()
    clock.turns()
    assert len(rooms) == 0
    log.keep(2)
    log.answer()
    assert log.reads == [("main", None, 5), ("main", 3, 5), ("main", None, 5)]
    log.release()
    assert {summary(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}
    ((room, member, _), *_) = [*herd[0]]
    assert [*rooms] == [room]
    log.say()
    clock.turns(60)
    assert member.numbers == [*range(9, 16)]


def test_failed_backlog_read_then_retry(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    arrived = [arrive(rooms, last="abcd-3"), arrive(rooms, last="abcd-3")]
    log.fail()
    assert [failure.type for (failure,) in arrived] == [LogUnavailable, LogUnavailable]
    assert len(log.waiting) == 0
    log.release()
    assert summary(enter(rooms, last="abcd-3")[2]) == (True, "abcd-8", 5)


def test_failed_reload_after_backlog_read(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.answer()
    clock.turns()
    log.answer()
    log.fail()
    assert arrived[0].type is LogUnavailable
    assert count_held(rooms, log, clock) == 0


# Pages


def request(before=None, after=None, limit=3):
    before, after = (named if named is None else Id("abcd", named) for named in (before, after))
    return PageRequest(before, after, limit, None)


def page(rooms, asked):
    """Return the numbers on a page, its end, and the flags for older and newer entries."""
    frames, end, older, newer = result_of(rooms.page("main", asked))
    texts = read_frames(b"".join(frames))
    numbers = [Id.parse(text["id"]).number for text in texts]
    assert [text["data"]["timestamp"] for text in texts] == [stamped(number) for number in numbers]
    return numbers, end, older, newer


def test_page_from_tail(log, rooms):
    log.keep(9)
    enter(rooms)
    assert page(rooms, request()) == ([7, 8, 9], 9, True, False)
    assert page(rooms, request(before=7)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(after=0)) == ([1, 2, 3], 3, False, True)
    assert page(rooms, request(after=9)) == ([], 9, True, False)
    assert page(rooms, request(before=10)) == ([7, 8, 9], 9, True, False)
    assert len(log.reads) == 1


def test_page_from_log(log, clock):
    log.keep(9)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    assert page(rooms, request(before=8)) == ([5, 6, 7], 7, True, True)
    assert len(log.reads) == 1
    assert page(rooms, request(before=7)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(after=3)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(limit=6)) == ([4, 5, 6, 7, 8, 9], 9, True, False)
    assert log.reads[1:] == [("main", 3, 3), ("main", 3, 3), ("main", None, 6)]


def test_page_of_closed_room(log, rooms, clock):
    """A page of a room without members is read from the log and opens no room."""
    log.keep(9)
    assert page(rooms, request(before=4)) == ([1, 2, 3], 3, False, True)
    assert len(rooms) == 0
    assert clock.getDelayedCalls() == []


def test_page_of_unknown_room(rooms):
    for asked in (request(), request(before=0), request(before=1), request(after=0)):
        assert page(rooms, asked) == ([], 0, False, False)


def test_page_waits_for_log(log, rooms):
    log.held = True
    log.keep(3)
    reading = rooms.page("main", request())
    assert not reading.called
    log.answer()
    assert result_of(reading).end == 3


def test_page_with_log_ahead_of_room(log, rooms):
    enter(rooms)
    log.keep(3)
    assert page(rooms, request(after=1)) == ([2, 3], 3, True, False)
    assert page(rooms, request(before=3)) == ([1, 2], 2, False, True)


@pytest.mark.parametrize("someone", [True, False])
@pytest.mark.parametrize("asked", [request(before=11), request(after=10), request(after=10**15)])
def test_page_from_unknown_number(log, rooms, someone, asked):
    log.keep(9)
    if someone:
        enter(rooms)
    with pytest.raises(UnknownId):
        page(rooms, asked)


@pytest.mark.parametrize("named", ["before", "after"])
def test_page_from_other_epoch(log, rooms, named):
    log.keep(9)
    asked = request()._replace(**{named: Id("wxyz", 5)})
    with pytest.raises(UnknownId):
        page(rooms, asked)
    assert log.reads == []


def test_page_with_log_down(log, rooms):
    log.held = True
    reading = rooms.page("main", request())
    log.fail()
    with pytest.raises(LogUnavailable):
        result_of(reading)


@st.composite
def kept(draw):
    """Draw the first number and the head of a log, and the length of the history of its room."""
    head = draw(st.integers(0, 30))
    return draw(st.integers(1, head + 1)), head, draw(st.integers(1, 40))


def two(held):
    """Return two registries of equal logs: one with a member in the room, and one without."""
    first, head, history = held
    filled, empty = ScriptedLog(head), ScriptedLog(head)
    filled.first = empty.first = first
    crowded = Registry(filled, frames, Turns(), history)
    enter(crowded)
    return crowded, Registry(empty, frames, Turns(), history)


@REPEATABLE
@given(kept(), st.integers(1, 9))
@example((4, 20, 5), 3)
def test_paging_backwards_covers_log(held, limit):
    first, head, _ = held
    for rooms in two(held):
        seen, asked = [], request(limit=limit)
        while True:
            numbers, end, older, _ = page(rooms, asked)
            assert len(numbers) <= limit
            seen[:0] = numbers
            asked = request(before=end - len(numbers) + 1, limit=limit)
            if not older:
                break
        assert seen == [*range(first, head + 1)]
        assert page(rooms, asked)[0] == []


@REPEATABLE
@given(kept(), st.integers(1, 9))
@example((4, 20, 5), 3)
def test_paging_forwards_covers_log(held, limit):
    first, head, _ = held
    for rooms in two(held):
        seen, asked = [], request(after=0, limit=limit)
        while True:
            numbers, end, _, newer = page(rooms, asked)
            assert len(numbers) <= limit
            seen += numbers
            asked = request(after=end, limit=limit)
            if not newer:
                break
        assert seen == [*range(first, head + 1)]
        assert end == head
        assert page(rooms, asked)[0] == []


@REPEATABLE
@given(kept(), st.sampled_from(["before", "after"]), st.integers(0, 33), st.integers(1, 9))
def test_tail_and_log_give_same_page(held, named, number, limit):
    def answer(rooms):
        try:
            return page(rooms, request(**{named: number}, limit=limit))
        except UnknownId:
            return None

    crowded, empty = two(held)
    assert answer(crowded) == answer(empty)


@REPEATABLE
@given(kept(), st.integers(0, 33), st.integers(0, 9))
def test_resume_property(held, number, later):
    """A client that resumes gets exactly what it missed, or learns that this is lost."""
    first, head, history = held
    log, clock = ScriptedLog(head), Turns()
    log.first = first
    rooms = Registry(log, frames, clock, history)
    enter(rooms)
    member = Reader()
    _, _, said = enter(rooms, member, last=f"abcd-{number}")
    log.say(later)
    clock.turns(80)
    end = Id.parse(said["id"]).number
    assert len(said["data"]) <= history
    if first - 1 <= number <= head:
        assert said["resumed"]
        assert "more" not in said
        assert end == number + min(history, head - number)
    else:
        assert said["resumed"] is False
        assert end == head
        assert ("more" in said) == (head - len(said["data"]) >= first)
    assert member.numbers == [*range(end + 1, head + later + 1)]
    assert member.cursor == head + later


# Interruptions


def received(member):
    """Return the frames that a member received, such as ["message abcd-3", "history efgh-2"]."""
    for text in member.texts:
        if text["type"] == "history":
            assert text["resumed"] is False
            holds(text)
    return [f"{text['type']} {text['id']}" for text in member.texts]


def test_interruption_reads_missed_entries(log, rooms, clock):
    log.keep(3)
    room, member, _ = enter(rooms)
    _, reader, _ = enter(rooms, Reader(form=event))
    log.say()
    clock.turns()
    log.miss(2)
    assert log.reads[1:] == [("main", 4, MAX_LAG)]
    clock.turns()
    log.say()
    clock.turns()
    assert received(member) == received(reader) == [f"message abcd-{number}" for number in (4, 5, 6, 7)]
    assert clock.getDelayedCalls() == []
    assert enter(rooms)[0] is room


def test_interruption_without_missed_entries(log, rooms, clock):
    log.keep(3)
    _, member, _ = enter(rooms)
    log.miss()
    clock.turns()
    assert member.writes == []
    assert log.reads[1:] == [("main", 3, MAX_LAG)]


@pytest.mark.parametrize("notified", [0, 1, 2, 3])
def test_append_during_reload(log, rooms, clock, notified):
    _, member, _ = enter(rooms)
    log.say()
    log.held = True
    log.miss(2)
    for number in range(3):
        if number == notified:
            page = log.page(1, MAX_LAG)
        log.say()
    clock.turns()
    assert member.numbers == [1], "the rest waits"
    log.answer(page if notified < 3 else None)
    clock.turns()
    assert member.numbers == [1, 2, 3, 4, 5, 6]


def test_interruption_of_empty_room(log, rooms, clock):
    room, member, _ = enter(rooms)
    rooms.open("opened")
    rooms.leave(room, member)
    reads = len(log.reads)
    log.miss(2)
    assert (len(log.reads), len(rooms)) == (reads, 0)


def test_rooms_reload_separately(log, rooms, clock):
    log.keep(2)
    members = [enter(rooms, name=name)[1] for name in ("one", "other")]
    log.held = True
    log.miss(1)
    assert log.reads[2:] == [("one", 2, MAX_LAG), ("other", 2, MAX_LAG)]
    log.answer()
    clock.turns()
    assert [member.numbers for member in members] == [[3], []]
    log.answer()
    clock.turns()
    assert [member.numbers for member in members] == [[3], [3]]


def test_restart_after_long_interruption(log, clock, monkeypatch):
    """Members restart with the newest entries if they missed more than MAX_LAG."""
    monkeypatch.setattr("chatd.room.registry.MAX_LAG", 4)
    rooms = Registry(log, frames, clock, 3)
    log.keep(2)
    _, member, _ = enter(rooms)
    log.miss(4)
    clock.turns()
    assert received(member) == [f"message abcd-{number}" for number in (3, 4, 5, 6)]
    log.miss(5)
    assert log.reads[2:] == [("main", 6, 4), ("main", None, 3)]
    clock.turns()
    assert received(member)[4:] == ["history abcd-11"]
    assert (len(member.texts[-1]["data"]), member.texts[-1]["more"]) == (3, True)
    log.say()
    clock.turns()
    assert received(member)[5:] == ["message abcd-12"]


def test_restart_if_missed_entries_are_trimmed(log, rooms, clock):
    log.keep(2)
    _, member, _ = enter(rooms)
    log.keep(3)
    log.first = 5
    log.miss()
    clock.turns()
    assert received(member) == ["history abcd-5"]
    assert [len(member.texts[0]["data"]), "more" in member.texts[0]] == [1, False]


def test_no_restart_if_missed_entries_are_stored(log, rooms, clock):
    log.keep(2)
    _, member, _ = enter(rooms)
    log.keep(3)
    log.first = 3
    log.miss()
    clock.turns()
    assert member.numbers == [3, 4, 5]
    assert summary(enter(rooms)[2]) == (None, "abcd-5", 3)


def test_new_epoch_restarts_members(log, rooms, clock):
    log.keep(5)
    room, member, _ = enter(rooms)
    _, reader, _ = enter(rooms, Reader(form=event))
    log.say()
    clock.turns()
    log.lose(4)
    assert log.reads[1:] == [("main", None, 100)]
    clock.turns()
    log.say(2)
    clock.turns()
    assert (
        received(member) == received(reader) == ["message abcd-6", "history efgh-4", "message efgh-5", "message efgh-6"]
    )
    assert [member.cursor, reader.cursor, room.head, room.epoch] == [6, 6, 6, "efgh"]
    assert reader.writes[1].startswith(b"event: history\nid: efgh-4\n")


def test_new_epoch_of_any_length(log, rooms, clock):
    log.keep(2)
    _, member, _ = enter(rooms)
    log.lose(2, "efgh")
    clock.turns()
    log.epoch = "ijkl"
    log.miss(3)
    clock.turns()
    log.lose(0, "mnop")
    clock.turns()
    assert received(member) == ["history efgh-2", "history ijkl-5", "history mnop-0"]
    assert [len(text["data"]) for text in member.texts] == [2, 5, 0]


def test_append_and_trim_during_restart(log, rooms, clock):
    log.keep(5)
    _, member, _ = enter(rooms)
    log.held = True
    log.lose(1)
    log.say()
    page = log.page(None, 100)
    log.say()
    log.trim(2)
    log.answer(page)
    clock.turns()
    assert received(member) == ["history efgh-2", "message efgh-3"]
    assert summary(enter(rooms)[2]) == (None, "efgh-3", 2)


def test_restart_of_full_member(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(10))
    log.say(3)
    clock.turns()
    assert not member.ready
    log.lose(1)
    clock.turns()
    log.say()
    clock.turns()
    member.drain(room)
    clock.turns()
    assert received(member) == ["message abcd-1", "history efgh-1", "message efgh-2"]


def test_restart_ends_pass(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say(2)
    clock.turn()
    log.lose(1)
    log.say()
    clock.turn()
    assert received(members[0]) == ["message abcd-1", "message abcd-2", "history efgh-1", "message efgh-2"]
    clock.turns()
    assert received(members[-1]) == ["history efgh-1", "message efgh-2"]
    assert clock.idle


def test_pass_continues_during_reload(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say(2)
    clock.turn()
    log.held = True
    log.miss(2)
    clock.turns()
    assert [member.numbers for member in members] == [[1, 2]] * len(members)
    log.release()
    clock.turns()
    assert [member.numbers for member in members] == [[1, 2, 3, 4]] * len(members)


def test_restart_drops_joined_runs(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say(2, "lost")
    clock.turn()
    log.lose(0)
    log.say(2, "found")
    clock.turns(40)
    assert [text["data"]["message"] for text in members[-1].texts[1:]] == ["found", "found"]
    assert [text["data"]["message"] for text in members[0].texts[3:]] == ["found", "found"]


def test_join_after_new_epoch(log, rooms):
    log.keep(3)
    enter(rooms)
    assert summary(enter(rooms, last="abcd-3")[2]) == (True, "abcd-3", 0)
    log.lose(3)
    assert summary(enter(rooms)[2]) == (None, "efgh-3", 3)
    assert summary(enter(rooms, last="abcd-3")[2]) == (False, "efgh-3", 3)
    assert summary(enter(rooms, last="efgh-3")[2]) == (True, "efgh-3", 0)


# Joins, leaves, posts and pages during an interruption


def test_join_waits_for_restart(log, rooms, clock):
    log.keep(3)
    room, member, _ = enter(rooms)
    log.held = True
    log.lose(1)
    arrived = [arrive(rooms), arrive(rooms)]
    assert arrived == [[], []]
    assert len(log.reads) == 2
    log.answer()
    assert received(member) == ["history efgh-1"]
    assert [summary(history) for ((_, _, history),) in arrived] == [(None, "efgh-1", 1)] * 2
    assert {joined for ((joined, _, _),) in arrived} == {room}
    log.say()
    clock.turns()
    assert [newcomer.numbers for ((_, newcomer, _),) in arrived] == [[2], [2]]
    assert received(member)[1:] == ["message efgh-2"]


def test_resume_waits_for_reload(log, rooms, clock):
    log.keep(3)
    enter(rooms)
    log.held = True
    log.miss(2)
    arrived = arrive(rooms, last="abcd-2")
    log.answer()
    assert summary(arrived[0][2]) == (True, "abcd-5", 3)
    log.release()


@pytest.mark.parametrize(
    ("last", "history"),
    [("abcd-2", (False, "efgh-3", 3)), ("efgh-2", (True, "efgh-3", 1)), ("efgh-9", (False, "efgh-3", 3))],
)
def test_resume_waits_for_restart(log, rooms, clock, last, history):
    log.keep(5)
    enter(rooms)
    log.held = True
    log.lose(3)
    arrived = arrive(rooms, last=last)
    log.release()
    assert summary(arrived[0][2]) == history


def test_new_epoch_during_backlog_read(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.lose(11)
    log.answer()
    assert arrived == []
    log.answer()
    assert summary(arrived[0][2]) == (False, "efgh-11", 5)


def test_interruption_during_backlog_read(log, clock):
    log.keep(12)
    rooms = Registry(log, frames, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.miss(2)
    log.answer()
    assert arrived == [], "the room is loaded again"
    log.release()
    clock.turns(60)
    ((_, member, history),) = arrived
    assert summary(history) == (True, "abcd-8", 5)
    assert member.numbers == [*range(9, 15)]


def test_page_during_reload(log, rooms):
    log.keep(3)
    enter(rooms)
    log.held = True
    log.miss(2)
    reading = rooms.page("main", request())
    log.release()
    assert result_of(reading).end == 5


def test_page_after_new_epoch(log, rooms):
    log.keep(5)
    enter(rooms)
    log.lose(4)
    with pytest.raises(UnknownId):
        page(rooms, request(before=3))
    numbers, end, _, _ = page(rooms, request())
    assert (numbers, end) == ([2, 3, 4], 4)
    asked = PageRequest(None, Id("efgh", 1), 3, None)
    assert page(rooms, asked)[0] == [2, 3, 4]


@pytest.mark.parametrize("named", ["before", "after"])
def test_new_epoch_during_page_from_id(log, rooms, named):
    log.keep(5)
    log.held = True
    asked = request()._replace(**{named: Id("abcd", 3)})
    reading = rooms.page("main", asked)
    log.lose(4)
    log.release()
    with pytest.raises(UnknownId):
        result_of(reading)


def test_new_epoch_during_newest_page(log, rooms):
    log.keep(5)
    log.held = True
    reading = rooms.page("main", request())
    log.lose(4)
    log.release()
    frames = result_of(reading).frames
    assert [text["id"] for text in read_frames(b"".join(frames))] == ["efgh-2", "efgh-3", "efgh-4"]


def test_post_during_reload(log, rooms, clock):
    _, member, _ = enter(rooms)
    log.held = True
    log.miss(2)
    poster = object()
    rooms.post("main", Post("ann", "hi"), poster)
    assert log.posts == [("main", Post("ann", "hi"), poster)]
    log.say()
    log.release()
    clock.turns()
    assert member.numbers == [1, 2, 3]


def test_leave_during_reload(log, rooms, clock):
    log.keep(3)
    room, one, _ = enter(rooms)
    _, other, _ = enter(rooms)
    log.held = True
    log.lose(1)
    rooms.leave(room, one)
    log.answer()
    assert (one.writes, received(other)) == ([], ["history efgh-1"])
    log.lose(1, "ijkl")
    rooms.leave(room, other)
    log.answer()
    clock.turns()
    assert received(other) == ["history efgh-1"]
    assert count_held(rooms, log, clock) == 0
    assert clock.getDelayedCalls() == []


def test_leave_while_history_is_sent(log, rooms, clock):
    log.keep(3)
    _, first, _ = enter(rooms)
    _, last, _ = enter(rooms)
    log.say()
    clock.turns()
    delivered = rooms.delivered
    first.send_frame = lambda _: last.leave() or first.leave()
    log.lose(1)
    clock.turns()
    assert rooms.delivered == delivered == 2
    assert count_held(rooms, log, clock) == 0


def test_trim_during_reload(log, rooms):
    log.keep(5)
    enter(rooms)
    log.held = True
    log.miss(2)
    page = log.page(5, MAX_LAG)
    log.trim(4)
    log.answer(page)
    assert summary(enter(rooms)[2]) == (None, "abcd-7", 4)


def test_trim_before_reload(log, rooms, clock):
    log.keep(5)
    enter(rooms)
    log.held = True
    log.miss(2)
    log.fail()
    log.trim(4)
    log.release()
    clock.advance(RELOAD_SECONDS)
    assert summary(enter(rooms)[2]) == (None, "abcd-7", 4)


def test_trim_of_lost_history_is_dropped(log, rooms):
    log.keep(9)
    log.held = True
    arrived = arrive(rooms)
    log.trim(8)
    log.first = 1  # a replica that lacks the trim
    log.lose(5)
    log.release()
    assert summary(arrived[0][2]) == (None, "efgh-5", 5)


# Repeated interruptions, and a log that is down


def test_failed_reload_is_retried(log, rooms, clock):
    """While a reload fails, members are served what the room has."""
    room, member, _ = enter(rooms, Reader(10))
    log.say(3)
    clock.turns()
    log.held = True
    log.miss(2)
    arrived = arrive(rooms)
    log.fail()
    assert arrived[0].type is LogUnavailable
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3]
    reads = len(log.reads)
    clock.advance(RELOAD_SECONDS - 0.01)
    assert len(log.reads) == reads
    clock.advance(0.01)
    assert log.reads[reads:] == [("main", 3, MAX_LAG)]
    log.fail()
    clock.advance(RELOAD_SECONDS)
    log.say()
    log.answer()
    clock.turns()
    assert member.numbers == [1, 2, 3, 4, 5, 6]
    assert clock.getDelayedCalls() == []


def test_join_after_failed_reload(log, rooms, clock):
    log.keep(1)
    _, member, _ = enter(rooms)
    log.held = True
    log.lose()
    log.fail()
    log.release()
    assert summary(enter(rooms)[2]) == (None, "efgh-0", 0)
    assert received(member) == ["history efgh-0"]
    reads = len(log.reads)
    clock.advance(RELOAD_SECONDS)
    assert len(log.reads) == reads


def test_one_retry_for_all_rooms(log, rooms, clock):
    for name in ("one", "other"):
        enter(rooms, name=name)
    clock.turns()
    log.held = True
    for _ in range(5):
        log.miss(1)
    log.fail(), log.fail()
    assert [call.getTime() for call in clock.calls if call.getTime() <= RELOAD_SECONDS] == [RELOAD_SECONDS]
    reads = len(log.reads)
    clock.advance(RELOAD_SECONDS)
    assert log.reads[reads:] == [("one", 0, MAX_LAG), ("other", 0, MAX_LAG)]
    log.fail()
    assert not clock.idle_for(RELOAD_SECONDS)
    calls = len(clock.getDelayedCalls())
    log.fail()
    assert len(clock.getDelayedCalls()) == calls


def test_no_retry_for_empty_room(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(2)
    clock.turns()
    log.held = True
    log.miss(2)
    log.fail()
    rooms.leave(room, member)
    delivered, reads = rooms.delivered, len(log.reads)
    clock.advance(RELOAD_SECONDS)
    assert (rooms.delivered, len(log.reads), len(rooms)) == (delivered, reads, 0)
    assert clock.getDelayedCalls() == []


def test_retry_for_empty_room_with_waiting_join(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.held = True
    log.miss(2)
    log.fail()
    rooms.leave(room, member)
    arrived = arrive(rooms)
    clock.advance(RELOAD_SECONDS)
    log.answer()
    assert summary(arrived[0][2]) == (None, "abcd-2", 2)
    assert arrived[0][0] is room


def test_interruption_during_reload(log, rooms, clock):
    log.keep(1)
    _, member, _ = enter(rooms)
    log.held = True
    log.miss(1)
    page = log.page(1, MAX_LAG)
    log.say()
    log.miss(1)
    log.say()
    log.answer(page)
    clock.turns()
    assert (log.reads[1:], member.writes) == ([("main", 1, MAX_LAG)] * 2, [])
    log.answer()
    log.say()
    clock.turns()
    assert member.numbers == [2, 3, 4, 5, 6]


def test_interruption_during_load(log, rooms, clock):
    log.held = True
    arrived = arrive(rooms)
    page = log.page(None, 100)
    log.miss(2)
    log.say()
    log.answer(page)
    assert arrived == []
    log.answer()
    assert summary(arrived[0][2]) == (None, "abcd-3", 3)


def test_new_epoch_during_load(log, rooms, clock):
    log.held = True
    arrived = arrive(rooms)
    log.say(3)
    log.lose(1)
    log.say()
    log.release()
    ((_, member, history),) = arrived
    clock.turns()
    assert (summary(history), member.writes) == ((None, "efgh-2", 2), [])


def test_two_new_epochs_are_one_restart(log, rooms, clock):
    log.keep(3)
    _, member, _ = enter(rooms)
    log.held = True
    log.lose(2, "efgh")
    page = log.page(None, 100)
    log.lose(1, "ijkl")
    log.answer(page)
    clock.turns()
    assert member.writes == []
    log.release()
    clock.turns()
    assert received(member) == ["history ijkl-1"]


def test_new_epoch_during_reload(log, rooms, clock):
    log.keep(3)
    _, member, _ = enter(rooms)
    log.held = True
    log.miss(2)
    log.lose(1)
    log.release()
    clock.turns()
    assert received(member) == ["history efgh-1"]


def test_unexpected_error_is_logged(log, rooms, events):
    enter(rooms)
    log.held = True
    log.miss()
    log.waiting.popleft()[2].errback(ZeroDivisionError())
    gc.collect()
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]


# Counters during an interruption


def test_counters_never_decrease(log, rooms, clock):
    seen = []

    def look():
        assert [*rooms] == [*{*rooms}]
        assert len([*rooms]) == len(rooms)
        seen.append((rooms.delivered, rooms.messages))
        assert [*seen] == sorted(seen)
        return len(rooms), rooms.delivered, not clock.idle

    log.keep(5)
    room, member, _ = enter(rooms)
    _, other, _ = enter(rooms)
    log.say()
    assert look() == (1, 0, True)
    clock.turns()
    assert look() == (1, 2, False)
    log.held = True
    log.lose(1)
    assert look() == (1, 2, False)
    rooms.leave(room, other)
    assert look() == (1, 2, False)
    log.say()
    log.answer()
    assert look() == (1, 2, True)
    clock.turns()
    assert look() == (1, 2, False), "it was in the history"
    log.say(2)
    clock.turns()
    assert look() == (1, 4, False)
    rooms.leave(room, member)
    assert look() == (0, 4, False)


def test_delivery_during_reload_is_counted(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(10))
    log.say(3)
    clock.turns()
    log.held = True
    log.lose()
    member.drain(room)
    assert not clock.idle
    clock.turns()
    assert (rooms.delivered, clock.idle) == (3, True)


# Any order of events


class Recorded:
    """A client with all that it received: its history, and what followed."""

    def __init__(self, rooms, member, last=None):
        self.member = member
        self.arrived = arrive(rooms, member, last=last)
        self.acks = []

    @property
    def here(self):
        return bool(self.arrived) and isinstance(self.arrived[0], tuple)

    @property
    def room(self):
        return self.arrived[0][0]

    @property
    def can_post(self):
        """True while its session acknowledges posts: an event stream never does, nor a session that has left."""
        return self.here and self.member.form is None and not self.member.overran

    def follow(self, logs, lag, removed):
        """Check everything against the logs by epoch, and return the id of its last entry."""
        history = self.arrived[0][2]
        at, acks = self._begin(history, logs), []
        for text in self.member.texts:
            kind, place = text["type"], Id.parse(text["id"])
            if kind == "history":
                assert text["resumed"] is False
                # In the same history this happens only if the client lacks too much, or entries were trimmed.
                assert place.epoch != at.epoch or place.number > at.number + lag or at.number + 1 < removed
                at = self._begin(text, logs)
            elif kind == "message":
                assert place == Id(at.epoch, at.number + 1)
                assert text["data"]["message"] == logs[place.epoch][place.number - 1].message
                at = place
            else:
                assert place.epoch == at.epoch
                assert place.number <= at.number, "after its message"
                acks.append(place)
        assert acks == [ack for ack in self.acks if ack in acks], "in order, and once each"
        return at

    def acked(self, epoch):
        """Return the ids of its acknowledged posts in one history."""
        acks = [Id.parse(text["id"]) for text in self.member.texts if text["type"] == "ack"]
        return [ack for ack in acks if ack.epoch == epoch]

    @staticmethod
    def _begin(history, logs):
        epoch, end = Id.parse(history["id"])
        data = history["data"]
        entries = logs[epoch][end - len(data) : end]
        assert [entry["message"] for entry in data] == [entry.message for entry in entries]
        return Id(epoch, end)


class LostLogMachine(RoomMachine):
    """However often the log is interrupted or lost, each client has a gapless run of each history, once.

    Every text is appended once, so that an entry of one history never equals one of another.
    """

    LAG = 8

    def prepare(self):
        self.patch.setattr("chatd.room.registry.MAX_LAG", self.LAG)
        self.logs = {self.log.epoch: self.log.entries}
        self.untold = []
        self.removed = 0
        self.clients = []
        self.away = []
        self.texts = count()
        self.delivered = 0

    def write(self, number):
        for _ in range(number):
            self.untold += self.log.keep(1, f"m{next(self.texts)}")

    @rule(number=st.integers(1, 4))
    def keep(self, number):
        """Append entries, and notify later."""
        self.write(number)

    @rule()
    def send_frame(self):
        self.log.follower.appended("main", self.untold)
        self.untold = []

    @rule(number=st.integers(0, 12))
    def miss(self, number):
        self.write(number)
        self.untold = []
        self.log.miss()

    @rule(part=st.integers(0, 4))
    def lose(self, part):
        self.untold = []
        self.log.lose(len(self.log.entries) * part // 4, f"e{len(self.logs):03}")
        self.logs[self.log.epoch] = self.log.entries

    @rule(part=st.integers(1, 4))
    def trim(self, part):
        first = max(self.log.first, len(self.log.entries) * part // 4)
        self.removed = max(self.removed, first)
        self.log.trim(first)

    @rule(space=st.none() | st.integers(0, 600), form=st.sampled_from([None, event]))
    def join(self, space, form):
        self.clients.append(Recorded(self.rooms, Reader(space, form=form)))

    @rule(which=st.randoms(use_true_random=False), ahead=st.integers(0, 2))
    @precondition(lambda self: self.away)
    def rejoin(self, which, ahead):
        last = self.away.pop(which.randrange(len(self.away)))
        self.clients.append(Recorded(self.rooms, Reader(), f"{last.epoch}-{last.number + ahead}"))

    @rule(which=st.randoms(use_true_random=False), number=st.integers(1, 3))
    @precondition(lambda self: any(client.can_post for client in self.clients))
    def post(self, which, number):
        client = which.choice([client for client in self.clients if client.can_post])
        for _ in range(number):
            self.write(1)
            self.send_frame()
            place = Id(self.log.epoch, len(self.log.entries))
            client.room.acknowledge(client.member, place.number, ack_frame(place, f"c{place}", duplicate=False))
            client.acks.append(place)

    @rule()
    def wait(self):
        self.clock.advance(RELOAD_SECONDS)

    @rule()
    @precondition(lambda self: self.log.waiting)
    def fail(self):
        self.log.fail()

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: any(client.here and not client.member.ready for client in self.clients))
    def drain(self, which, space):
        client = which.choice([client for client in self.clients if client.here and not client.member.ready])
        client.member.drain(client.room, space)

    @rule(which=st.randoms(use_true_random=False))
    @precondition(lambda self: any(client.here for client in self.clients))
    def leave(self, which):
        client = which.choice([client for client in self.clients if client.here])
        if not client.member.overran:
            client.member.leave()
        self.clients.remove(client)
        client.member.writes.append(client.member.held)
        self.away.append(client.follow(self.logs, self.LAG, self.removed))

    @invariant()
    def counters_never_decrease(self):
        if hasattr(self, "rooms"):
            assert self.rooms.delivered >= self.delivered
            self.delivered = self.rooms.delivered
            assert len(self.rooms) == len([*self.rooms]) <= 1

    @rule()
    def settle(self):
        self.send_frame()
        self.run_out(lambda: ((one.member, one.room) for one in self.clients if one.here), RELOAD_SECONDS)
        for client in [*self.clients]:
            if not client.here or client.member.overran:
                self.clients.remove(client)
                continue
            at = client.follow(self.logs, self.LAG, self.removed)
            assert [ack for ack in client.acks if ack.epoch == at.epoch] == client.acked(at.epoch)
            assert at == (self.log.epoch, len(self.log.entries))
            assert client.member.cursor == at.number
        assert self.clock.idle
        assert not self.log.waiting
        assert len(self.rooms) == bool(self.clients)
        if not self.clients:
            assert count_held(self.rooms, self.log, self.clock) == 0


LostLogMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestLostLogMachine = LostLogMachine.TestCase
