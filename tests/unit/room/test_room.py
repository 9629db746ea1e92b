"""A room is a log; a client is a cursor."""

import gc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from support.helpers import Reader, ScriptedLog, Slow, count_held, enter, held_by, holds, stamped
from support.room_machines import RoomMachine
from support.websocket_frames import read_frames

from chatd.messages import Entry, Id
from chatd.room.histories import HISTORIES_SECONDS
from chatd.room.log import EncodedPage, Page, PageRange
from chatd.room.presence import PRESENCE, TYPING
from chatd.room.registry import Registry
from chatd.room.room import MAX_LAG, RUNS
from chatd.room.sweep import SLICE_MEMBERS
from chatd.room.tail import Run
from chatd.transport import frames
from chatd.transport.frames import ack_frame, event, message_frame

FRAME = len(message_frame("abcd", Entry(1, "ann", "x", stamped(1))))


def number_of(text):
    return Id.parse(text["id"]).number


# Joining


def test_join_newest_entries(clock):
    log = ScriptedLog()
    for number in range(1, 8):
        log.keep(1, f"m{number}")
    _, member, history = enter(Registry(log, frames, clock, 3))
    assert history == {
        "type": "history",
        "id": "abcd-7",
        "more": True,
        "data": [{"username": "ann", "message": f"m{number}", "timestamp": stamped(number)} for number in (5, 6, 7)],
    }
    assert member.cursor == 7


def test_join_empty_room(rooms):
    assert enter(rooms)[2] == {"type": "history", "id": "abcd-0", "data": []}


@pytest.mark.parametrize(("first", "more"), [(1, True), (4, True), (5, False), (6, False), (8, False)])
def test_history_more_only_with_older_entries(log, clock, first, more):
    log.keep(7)
    log.first = first
    _, _, history = enter(Registry(log, frames, clock, 3))
    assert history.get("more", False) is more
    assert history["id"] == "abcd-7"
    assert len(history["data"]) == min(3, 8 - first)


def test_messages_follow_history(log, rooms, clock):
    """The first message frame is the entry after the last one of the history."""
    room, first, _ = enter(rooms)
    log.say(3)
    _, second, history = enter(rooms)
    log.say(2)
    clock.turns()
    assert [len(history["data"]), history["id"]] == [3, "abcd-3"]
    assert first.numbers == [1, 2, 3, 4, 5]
    assert second.numbers == [4, 5]
    assert room.head == 5


def test_history_is_shared_at_one_head(log, rooms):
    room, _, _ = enter(rooms)
    log.say()
    assert room.join(Reader()) is room.join(Reader())


def test_history_grows_with_room(log, clock):
    rooms = Registry(log, frames, clock, 3)
    enter(rooms)
    log.say(5)
    assert [len(enter(rooms)[2]["data"]), enter(rooms)[2]["more"]] == [3, True]


def test_history_without_trimmed_entries(log, rooms):
    enter(rooms)
    log.say(5)
    assert len(enter(rooms)[2]["data"]) == 5
    log.trim(4)
    history = enter(rooms)[2]
    assert [history["id"], len(history["data"]), "more" in history] == ["abcd-5", 2, False]
    log.trim(6)
    history = enter(rooms)[2]
    assert [history["id"], len(history["data"]), "more" in history] == ["abcd-5", 0, False]


def test_room_sends_presence(rooms, clock):
    room, ann, _ = enter(rooms, Reader(events=[PRESENCE, TYPING], name="ann"))
    clock.turns()
    _, bob, _ = enter(rooms, Reader(name="bob"))
    clock.advance(1)
    rooms.leave(room, bob)
    room.presence.typing("cy")
    clock.advance(1)
    assert ann.texts == [
        {"type": "presence", "data": {"count": 1, "users": ["ann"]}},
        {"type": "presence", "data": {"count": 2, "join": ["bob"], "leave": []}},
        {"type": "presence", "data": {"count": 1, "join": [], "leave": ["bob"]}},
        {"type": "typing", "data": {"users": ["cy"]}},
    ]
    assert bob.writes == []


# Resuming


@pytest.fixture
def ten(clock):
    """Return a room of ten entries, of which a history frame holds four."""
    log = ScriptedLog()
    room, _, _ = enter(Registry(log, frames, clock, 4))
    log.say(10)
    clock.turns()
    room.log = log
    return room


def rejoin(room, number, missed=None, epoch="abcd", member=None):
    """Join after an entry; return the member and its history frame."""
    member = member or Reader()
    (history,) = read_frames(room.join(member, Id(epoch, number), missed))
    holds(history)
    return member, history


@pytest.mark.parametrize(("last", "end"), [(0, 4), (1, 5), (5, 9), (6, 10), (8, 10), (10, 10)])
def test_resume(ten, clock, last, end):
    """A client that resumes gets the oldest missed entries in the history, and the rest as messages."""
    member, history = rejoin(ten, last)
    clock.turns()
    assert history["resumed"] is True
    assert [history["id"], len(history["data"])] == [f"abcd-{end}", end - last]
    assert member.numbers == [*range(end + 1, 11)]


def test_resume_at_head(ten, clock):
    member, history = rejoin(ten, 10)
    assert history == {"type": "history", "id": "abcd-10", "resumed": True, "data": []}
    ten.log.say()
    clock.turns()
    assert member.numbers == [11]


def test_resume_in_empty_room(rooms, log):
    room, _, _ = enter(rooms)
    assert rejoin(room, 0)[1] == {"type": "history", "id": "abcd-0", "resumed": True, "data": []}
    log.say(2)
    history = rejoin(room, 0)[1]
    assert [history["resumed"], history["id"], len(history["data"])] == [True, "abcd-2", 2]


def fresh(history):
    """Return True for a history with the newest of ten entries that resumes nothing."""
    assert history["data"]
    return [history["resumed"], history["id"], len(history["data"])] == [False, "abcd-10", 4]


def test_resume_from_other_epoch(ten, clock):
    """An id of another epoch gets the newest entries with `"resumed":false`."""
    member, history = rejoin(ten, 8, epoch="wxyz")
    assert fresh(history)
    assert history["more"] is True
    clock.turns()
    assert member.numbers == []


def test_resume_beyond_head(ten):
    assert fresh(rejoin(ten, 11)[1])


def test_resume_beyond_head_of_log(ten):
    assert fresh(rejoin(ten, 11, Page([], 1, 10))[1])


def test_resume_from_id_the_room_has_not_seen(ten, clock):
    """The log may be ahead of the room; its entries are then taken once."""
    entries = ten.log.keep(3)
    member, history = rejoin(ten, 12, Page(entries[2:], 1, 13))
    assert [history["resumed"], history["id"], member.cursor] == [True, "abcd-13", 13]
    other, history = rejoin(ten, 13, Page([], 1, 13))
    assert history == {"type": "history", "id": "abcd-13", "resumed": True, "data": []}
    ten.appended(entries)
    ten.log.say()
    clock.turns()
    assert [member.numbers, other.numbers] == [[14], [14]]


def test_resume_just_before_first(ten):
    ten.log.trim(6)
    assert rejoin(ten, 5)[1]["resumed"] is True


def test_resume_from_trimmed_entries(ten):
    ten.log.trim(6)
    assert fresh(rejoin(ten, 4)[1])


def test_resume_from_entries_trimmed_in_log_only(ten):
    assert fresh(rejoin(ten, 4, Page(ten.log.entries[5:9], 6, 10))[1])


def test_resume_in_emptied_log(ten):
    ten.log.trim(11)
    assert rejoin(ten, 4)[1] == {"type": "history", "id": "abcd-10", "resumed": False, "data": []}
    assert rejoin(ten, 10)[1]["resumed"] is True


def test_resume_beyond_max_lag(ten, monkeypatch):
    assert MAX_LAG == 10_000
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 6)
    assert rejoin(ten, 4)[1]["resumed"] is True
    assert fresh(rejoin(ten, 3)[1])
    # The same holds if it is too much in the log only.
    assert fresh(rejoin(ten, 4, Page(ten.log.entries[4:8], 1, 11))[1])


@pytest.mark.parametrize("last", range(11))
@pytest.mark.parametrize("first", [1, 4])
def test_resumed_history_never_has_more(ten, last, first):
    ten.log.trim(first)
    history = rejoin(ten, last)[1]
    assert not (history["resumed"] and "more" in history)
    assert history["resumed"] == (last >= first - 1)


def test_resume_from_backlog(log, clock, short_tail):
    """A room whose tail is too short takes the entries from the backlog."""
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    member, history = rejoin(room, 2, log.page(2, 4))
    clock.turns()
    assert [history["resumed"], history["id"], len(history["data"])] == [True, "abcd-6", 4]
    assert member.numbers == [7, 8, 9, 10]


def test_resume_without_backlog(log, clock):
    """Without a backlog the history is empty, and all entries follow as messages."""
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    member, history = rejoin(room, 2)
    clock.turns()
    assert [history["resumed"], history["id"], history["data"]] == [True, "abcd-2", []]
    assert member.numbers == [*range(3, 11)]


def test_resumed_history_is_shared(ten):
    def joined(number, epoch="abcd"):
        return ten.join(Reader(), Id(epoch, number))

    assert joined(5) is joined(5)
    assert joined(5) is not joined(6)
    assert joined(5, "wxyz") is joined(7, "efgh")
    assert joined(5, "wxyz") is not ten.join(Reader())


@pytest.mark.parametrize("last", [None, Id("abcd", 8), Id("wxyz", 1)])
def test_history_is_encoded_again_after_changes(ten, last):
    frame = ten.join(Reader(), last)
    assert ten.join(Reader(), last) is frame
    ten.log.trim(2)
    again = ten.join(Reader(), last)
    assert again is not frame
    ten.log.say()
    assert read_frames(ten.join(Reader(), last)) != read_frames(again)


def test_changes_clear_cached_histories(log, rooms, clock):
    room, _, _ = enter(rooms)
    log.say(3)
    clock.turns()
    assert room.histories_bytes == 0
    rejoin(room, 0)
    assert room.histories_bytes > 0
    log.trim(1)
    assert room.histories_bytes == 0
    rejoin(room, 1)
    log.say()
    assert room.histories_bytes == 0


def test_cached_histories_are_bounded_in_bytes(log, rooms, clock, monkeypatch):
    """A frame larger than the bound is shared too, but alone."""
    room, _, _ = enter(rooms)
    log.say(30)
    clock.turns()
    sizes = [len(room.join(Reader(), Id("abcd", number))) for number in range(30)]
    monkeypatch.setattr("chatd.room.histories.HISTORIES_BYTES", 3 * max(sizes))
    clock.advance(HISTORIES_SECONDS)
    kept = []
    for number in range(30):
        rejoin(room, number)
        kept.append(room.histories_bytes)
    assert 2 * max(sizes) < max(kept) <= 3 * max(sizes)
    monkeypatch.setattr("chatd.room.histories.HISTORIES_BYTES", 1)
    frame = room.join(Reader(), Id("abcd", 0))
    assert room.join(Reader(), Id("abcd", 0)) is frame
    assert room.histories_bytes == len(frame)


def test_cached_histories_expire(log, rooms, clock):
    """A room that nothing is posted to keeps no copy of its newest entries."""
    log.keep(3)
    room, _, _ = enter(rooms)
    assert room.histories_bytes > 0
    clock.advance(HISTORIES_SECONDS - 0.1)
    enter(rooms)
    assert room.histories_bytes > 0
    clock.advance(0.1)
    assert room.histories_bytes == 0
    assert enter(rooms)[0] is room
    assert room.histories_bytes > 0


def test_last_member_clears_cached_histories(log, rooms, clock):
    room, member, _ = enter(rooms)
    rooms.leave(room, member)
    clock.turns()
    assert (room.histories_bytes, clock.getDelayedCalls()) == (0, [])


# Pages


def test_page_shares_frames_of_messages(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(5)
    clock.turns()
    excerpt = room.page(PageRange(4, None, 2))
    assert excerpt == EncodedPage(excerpt.frames, 3, older=True, newer=True)
    assert b"".join(excerpt.frames) in member.writes[0]


def test_page_within_tail(log, clock):
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    assert room.page(PageRange(None, None, 4)).end == 10
    assert room.page(PageRange(None, None, 5)) is None
    assert room.page(PageRange(None, 6, 1)).end == 7
    assert room.page(PageRange(None, 5, 1)) is None
    assert room.page(PageRange(9, None, 2)).end == 8
    assert room.page(PageRange(9, None, 3)) is None


def test_page_beyond_head_is_left_to_log(log, rooms):
    log.keep(3)
    room, _, _ = enter(rooms)
    assert room.page(PageRange(5, None, 1)) is None
    assert room.page(PageRange(None, 4, 1)) is None


def test_page_without_trimmed_entries(ten):
    ten.log.trim(8)
    excerpt = ten.page(PageRange(None, 1, 9))
    assert [len(excerpt.frames), excerpt.end, excerpt.older, excerpt.newer] == [3, 10, False, False]


def test_emptied_log_leaves_no_frame(log, rooms, clock):
    """A member without the newest entries reconnects, and nobody else notices."""
    room, ann, _ = enter(rooms)
    _, behind, _ = enter(rooms)
    behind.ready = False
    log.say(2)
    clock.turns()
    log.trim(3)
    assert room.held == (0, 0)
    assert enter(rooms)[2]["data"] == []
    behind.drain(room)
    clock.turns()
    log.say()
    clock.turns()
    assert behind.overran
    assert (behind.numbers, ann.numbers) == ([], [1, 2, 3])


# The flush


def test_one_write_for_each_turn(log, rooms, clock):
    """Entries of one turn leave in one write, in the next turn."""
    members = [enter(rooms)[1] for _ in range(3)]
    log.say()
    log.say(2)
    assert [member.writes for member in members] == [[], [], []]
    clock.turn()
    assert [member.numbers for member in members] == [[1, 2, 3]] * 3
    assert [len(member.writes) for member in members] == [1, 1, 1]


def test_members_at_one_cursor_share_bytes(log, rooms, clock):
    one, other = enter(rooms)[1], enter(rooms)[1]
    log.say(2)
    clock.turn()
    assert one.writes[0] is other.writes[0]


def test_form_of_event_stream(log, rooms, clock):
    member, reader = enter(rooms)[1], enter(rooms, Reader(form=event))[1]
    log.say(3)
    clock.turns()
    assert member.texts == reader.texts
    assert reader.numbers == [1, 2, 3]
    assert reader.writes[0].startswith(b'event: message\nid: abcd-1\ndata: {"type":"message"')


def test_run_is_joined_once_for_cursor_and_form(log, rooms, clock):
    members = {}
    for begin in (0, 1):
        for form in (None, event, None, event):
            room, member, _ = enter(rooms, Reader(0, form=form))
            members[member] = begin, form
        log.say()
        clock.turns()
    for member in [*members][::-1]:
        member.drain(room)
    log.say()
    clock.turn()
    runs = {}
    for member, (begin, form) in members.items():
        assert member.numbers == [*range(begin + 1, 4)]
        runs.setdefault((begin, form), set()).add(id(member.writes[-1]))
    assert [len(shared) for shared in runs.values()] == [1, 1, 1, 1]
    assert len(set.union(*runs.values())) == 4


def test_cut_event_is_completed_first(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(FRAME + 50, form=event))
    log.say(3)
    clock.turns()
    assert not member.ready
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3]


def test_idle_after_all_is_sent(log, rooms, clock):
    enter(rooms)
    log.say()
    assert not clock.idle
    clock.turns()
    assert clock.getDelayedCalls() == []


def test_known_entries_are_ignored(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(2)
    room.appended(log.entries)
    clock.turns()
    assert member.numbers == [1, 2]


def test_leave_before_flush(log, rooms, clock):
    room, member, _ = enter(rooms)
    enter(rooms)
    log.say()
    rooms.leave(room, member)
    clock.turns()
    assert member.writes == []


def test_leave_during_pass(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say()
    clock.turn()
    members[-1].leave()
    clock.turns()
    assert [len(members[-2].writes), members[-1].writes] == [1, []]


def test_leave_while_behind(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(0))
    enter(rooms)
    log.say(2)
    clock.turns()
    member.drain(room)
    assert member.numbers == [1]
    member.leave()
    clock.turns()
    assert member.numbers == [1]


def test_long_pass_is_sliced(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 3 - 1)]
    clock.turns()
    log.say()
    served = []
    while not clock.idle:
        clock.turn()
        served.append(sum(bool(member.writes) for member in members))
        assert len(served) < 10
    assert served[:3] == [SLICE_MEMBERS, SLICE_MEMBERS * 2, len(members)]


def test_entries_during_pass(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say()
    clock.turn()  # half of them
    log.say()
    newcomer = enter(rooms)[1]
    clock.turns()
    assert [member.numbers for member in members] == [[1, 2]] * len(members)
    assert [len(member.writes) for member in members] == [2] * len(members)
    assert newcomer.numbers == []


def test_one_bounded_run_for_each_turn(log, rooms, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 3 * FRAME)
    _, member, _ = enter(rooms)
    log.say(8)
    written = []
    while not clock.idle:
        clock.turn()
        written.append(len(member.writes))
    assert written == [1, 2, 3]
    assert member.numbers == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(read_frames(data)) for data in member.writes] == [3, 3, 2]


def test_one_run_after_join_and_resume_in_one_turn(log, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 3 * FRAME)
    room, _, _ = enter(Registry(log, frames, clock, 1))
    log.say(9)
    clock.turns()
    member, _ = rejoin(room, 0)
    room.resume(member)
    clock.turn()
    assert member.numbers == [2, 3, 4]


def test_frame_larger_than_run(log, rooms, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 1)
    _, member, _ = enter(rooms)
    log.say(2)
    clock.turns()
    assert member.numbers == [1, 2]


# Acknowledgements


def acknowledged(room, member, number, label=None):
    room.acknowledge(member, number, ack_frame(Id("abcd", number), label or f"c{number}", duplicate=False))


def kinds(member):
    """Return the frames that a member received, such as ["message 1", "ack 1"]."""
    return [f"{text['type']} {number_of(text)}" for text in member.texts]


def test_ack_follows_message(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say()
    acknowledged(room, member, 1)
    assert member.writes == []
    clock.turn()
    assert kinds(member) == ["message 1", "ack 1"]
    assert clock.getDelayedCalls() == []


def test_acks_are_joined_in_order(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(3)
    for number in (1, 2, 3):
        acknowledged(room, member, number)
    clock.turn()
    assert kinds(member) == ["message 1", "message 2", "message 3", "ack 1", "ack 2", "ack 3"]
    assert len(member.writes) == 2


def test_ack_of_delivered_entry(log, rooms, clock):
    log.keep(2)
    room, member, _ = enter(rooms)
    clock.turns()
    acknowledged(room, member, 2)
    assert member.writes == []
    clock.turn()
    assert kinds(member) == ["ack 2"]


@pytest.mark.parametrize("place", [0, SLICE_MEMBERS * 3 - 1])
def test_ack_follows_message_in_sliced_pass(log, rooms, clock, place):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 3)]
    room, member = enter(rooms)[0], members[place]
    log.say()
    acknowledged(room, member, 1)
    clock.turns()
    assert kinds(member) == ["message 1", "ack 1"]


def test_ack_after_slice_waits_for_next_pass(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 3)]
    room = enter(rooms)[0]
    log.say()
    acknowledged(room, members[0], 1)
    clock.turn()
    log.say()
    acknowledged(room, members[0], 2)
    acknowledged(room, members[-1], 2)
    clock.turns()
    assert kinds(members[0]) == ["message 1", "ack 1", "message 2", "ack 2"]
    assert kinds(members[-1]) == ["message 1", "message 2", "ack 2"]


def test_ack_waits_for_full_member(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(0))
    log.say(2)
    clock.turns()
    log.say()
    acknowledged(room, member, 3)
    clock.turns()
    assert member.held == message_frame("abcd", log.entries[0])
    assert clock.getDelayedCalls() == []
    member.drain(room)
    clock.turns()
    assert kinds(member) == ["message 1", "message 2", "message 3", "ack 3"]


def test_ack_follows_cut_frame(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(FRAME + 1))
    log.say(2)
    acknowledged(room, member, 1)
    acknowledged(room, member, 2)
    clock.turns()
    member.drain(room)
    assert kinds(member) == ["message 1", "message 2", "ack 1", "ack 2"]


def test_acks_only_for_delivered_entries(log, rooms, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 2 * FRAME)
    room, member, _ = enter(rooms)
    log.say(4)
    for number in (1, 2, 3, 4):
        acknowledged(room, member, number)
    clock.turns()
    assert kinds(member) == [f"{kind} {n}" for a in (1, 3) for kind in ("message", "ack") for n in (a, a + 1)]


def test_slow_member_delays_only_own_ack(log, rooms, clock):
    room, slow, _ = enter(rooms, Reader(0))
    _, fast, _ = enter(rooms)
    log.say(3)
    acknowledged(room, slow, 2)
    acknowledged(room, fast, 3)
    clock.turn()
    assert kinds(fast)[-1] == "ack 3"
    assert kinds(slow) == []
    slow.drain(room)
    clock.turns()
    assert kinds(slow) == ["message 1", "message 2", "message 3", "ack 2"]


def test_ack_after_refill(log, clock, short_tail):
    _, room, member = reading(log, clock)
    log.say()
    acknowledged(room, member, 41)
    clock.turns()
    assert "ack 41" not in kinds(member)
    log.release()
    clock.turns(60)
    assert kinds(member)[-2:] == ["message 41", "ack 41"]


def test_many_acks_are_sliced(log, rooms, clock):
    """Acknowledgements for a crowd leave time for the reactor to read, as messages do."""

    class Acked(Slow):
        def send_frame(self, frame):
            clock.rightNow += 0.001
            super().send_frame(frame)

    members = [enter(rooms, Acked(clock)) for _ in range(SLICE_MEMBERS * 3 - 1)]
    log.say()
    clock.turns()
    for room, member, _ in members:
        acknowledged(room, member, 1)
    members.pop(100)[1].leave()
    served = []
    while not clock.idle:
        clock.turn()
        served.append(sum("ack 1" in kinds(member) for _, member, _ in members))
    assert served[:3] == [SLICE_MEMBERS, SLICE_MEMBERS * 2, len(members)]
    assert all(kinds(member) == ["message 1", "ack 1"] for _, member, _ in members)


def test_leave_drops_acks(log, rooms, clock):
    room, member, _ = enter(rooms)
    enter(rooms)
    log.say()
    acknowledged(room, member, 1)
    rooms.leave(room, member)
    clock.turns()
    assert member.writes == []
    assert not room.owes(member)


# Measures


def test_measures(log, rooms, clock, short_tail):
    room, member, _ = enter(rooms)
    log.say(3)
    enter(rooms)
    assert room.held == (3, 3 * FRAME)
    assert room.cursors() == {0: 1, 3: 1}
    assert room.delivered == 0
    clock.turns()
    assert room.cursors() == {3: 2}
    assert room.delivered == 3
    rooms.leave(room, member)
    assert (room.cursors(), room.delivered) == ({3: 1}, 3)
    log.say(300)
    count, size = room.held
    assert (room.head, count < 303, size) == (
        303,
        True,
        sum(len(message_frame("abcd", entry)) for entry in log.entries[-count:]),
    )


# Slow members


def test_cut_frame_is_completed_first(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(FRAME + 5))
    log.say(4)
    clock.turns()
    assert not member.ready
    assert member.cursor == 2
    assert len(member.held) == FRAME - 5
    log.say()
    clock.turns()
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_cut_between_frames_holds_one(log, rooms, clock, taken):
    room, member, _ = enter(rooms, Reader(taken * FRAME))
    log.say(3)
    clock.turns()
    assert member.cursor == taken + 1
    assert len(member.held) == FRAME
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3]


def test_slow_member_does_not_delay_others(log, rooms, clock):
    enter(rooms, Reader(0))
    fast = enter(rooms)[1]
    for _ in range(5):
        log.say()
        clock.turns()
    assert fast.numbers == [1, 2, 3, 4, 5]


def test_resume_at_head_schedules_nothing(rooms, clock):
    room, member, _ = enter(rooms)
    clock.turns()
    room.resume(member)
    assert clock.idle


def runs_of(room):
    return sum(isinstance(one, Run) for one in held_by(room))


def test_joined_runs_are_bounded(log, rooms, clock):
    members = []
    for _ in range(RUNS * 2):
        room, member, _ = enter(rooms, Reader(0))
        members.append(member)
        log.say()
        clock.turns()
    most = []
    for member in members:
        member.drain(room)
        member.write = lambda data, write=member.write: most.append(runs_of(room)) or write(data)
    clock.turns()
    assert max(most) == RUNS
    assert runs_of(room) == 0
    assert [member.numbers for member in members] == [[*range(begin, 2 * RUNS + 1)] for begin in range(1, 2 * RUNS + 1)]


# Refills


def stalled(log, rooms, clock, members, count=40):
    """Return a room whose tail has moved past members that took nothing."""
    for member in members:
        room, _, _ = enter(rooms, member)
    log.say()
    clock.turns()
    log.say(count - 1)
    clock.turns()
    assert room.held[0] < room.head - members[0].cursor
    return room


def reading(log, clock):
    """Return a member that the tail overran, while the log is read for it."""
    rooms, member = Registry(log, frames, clock, 5), Reader(0)
    room = stalled(log, rooms, clock, [member])
    log.held = True
    member.drain(room)
    clock.turns()
    return rooms, room, member


def test_refill_from_log(log, clock, short_tail):
    member = Reader(0)
    room = stalled(log, Registry(log, frames, clock, 5), clock, [member])
    reads = len(log.reads)
    member.drain(room)
    clock.turns(60)
    assert member.numbers == [*range(1, 41)]
    assert len(log.reads) > reads
    assert clock.getDelayedCalls() == []


def test_one_read_for_each_refill(log, clock, short_tail):
    _, _, member = reading(log, clock)
    reads = len(log.reads)
    log.say()
    clock.turns()
    assert len(log.reads) == reads
    assert clock.idle
    log.release()
    clock.turns(60)
    assert member.numbers == [*range(1, 42)]


def test_refill_is_shared(log, clock, short_tail):
    members = [Reader(0), Reader(0, form=event), Reader(0), Reader(0, form=event)]
    room = stalled(log, Registry(log, frames, clock, 5), clock, members)
    reads = len(log.reads)
    log.held = True
    for member in members:
        member.drain(room)
        clock.turns()
    assert log.reads[reads:] == [("main", 1, 5)]
    log.answer()
    clock.turn()
    assert [member.numbers for member in members] == [[*range(1, 7)]] * 4
    assert members[0].writes[-1] is members[2].writes[-1]
    assert members[1].writes[-1] is members[3].writes[-1]
    log.release()
    clock.turns(60)
    assert [member.numbers for member in members] == [[*range(1, 41)]] * 4


def test_refill_is_shared_with_immediate_log(log, clock, short_tail):
    members = [Reader(0) for _ in range(9)]
    room = stalled(log, Registry(log, frames, clock, 5), clock, members)
    reads = len(log.reads)
    for member in members:
        member.drain(room)
    clock.turns(60)
    assert [member.numbers for member in members] == [[*range(1, 41)]] * 9
    assert len({*log.reads[reads:]}) == len(log.reads[reads:])


def test_refill_during_pass_is_used_in_next(log, rooms, clock, short_tail):
    rooms = Registry(log, frames, clock, 5)
    member, others = Reader(0), [Slow(clock) for _ in range(SLICE_MEMBERS * 3)]
    room = stalled(log, rooms, clock, [member, *others])
    log.held = True
    member.drain(room)
    log.say()
    clock.turn()
    reads = len(log.reads)
    log.answer()
    clock.turn()
    while others[-1].numbers[-1] == 40:
        assert member.numbers == [1]
        clock.turn()
    clock.turn()
    assert member.numbers == [1, 2, 3, 4, 5, 6]
    assert log.reads[reads:] == [("main", 6, 5)] * (len(log.reads) - reads)
    log.release()
    clock.turns(60)
    assert member.numbers == [*range(1, 42)]


def test_refill_longer_than_run(log, clock, short_tail, monkeypatch):
    _, _, member = reading(log, clock)
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 2 * FRAME)
    log.release()
    clock.turns(100)
    assert member.numbers == [*range(1, 41)]
    assert max(len(read_frames(data)) for data in member.writes) == 2


def test_refill_ahead_of_room(log, clock, short_tail):
    """Entries that a refill delivers before the notification are sent once."""
    _, _, member = reading(log, clock)
    new = log.keep(2)
    log.answer(Page(log.entries[1:], 1, 42))
    clock.turns()
    assert member.numbers == [*range(1, 43)]
    log.follower.appended("main", new)
    log.say()
    clock.turns()
    assert member.numbers == [*range(1, 44)]


def test_member_stalls_during_refill(log, clock, short_tail):
    _, room, member = reading(log, clock)
    member.ready = False
    log.release()
    clock.turns()
    assert member.numbers == [1]
    assert clock.getDelayedCalls() == []
    member.drain(room, space=10)
    clock.turns()
    member.drain(room)
    clock.turns(60)
    assert member.numbers == [*range(1, 41)]


def test_leave_during_refill(log, clock, short_tail):
    rooms, room, member = reading(log, clock)
    rooms.leave(room, member)
    writes = len(member.writes)
    log.release()
    clock.turns()
    assert len(member.writes) == writes
    assert not member.overran


def test_leave_during_shared_refill(log, clock, short_tail):
    rooms, members = Registry(log, frames, clock, 5), [Reader(0), Reader(0)]
    room = stalled(log, rooms, clock, members)
    log.held = True
    for member in members:
        member.drain(room)
    clock.turns()
    rooms.leave(room, members[0])
    log.release()
    clock.turns(60)
    assert [member.numbers for member in members] == [[1], [*range(1, 41)]]


def test_evict_beyond_max_lag(log, clock, short_tail, monkeypatch):
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 30)
    member = Reader(0)
    room = stalled(log, Registry(log, frames, clock, 5), clock, [member])
    reads = len(log.reads)
    member.drain(room)
    clock.turns()
    assert member.overran
    assert len(log.reads) == reads


@pytest.mark.parametrize(
    "page",
    [
        lambda log: log.page(19, 5),  # the next entry was trimmed
        lambda log: log.page(2, 5),  # one entry is missing
        lambda log: Page(log.entries[:5], 1, 40),  # entries that the member has
        lambda log: Page([], 41, 40),
        lambda log: Page([], 1, 1),  # a log that lost writes
    ],
)
def test_evict_rather_than_leave_a_gap(log, clock, short_tail, page):
    _, _, member = reading(log, clock)
    reads = len(log.reads)
    log.answer(page(log))
    clock.turns()
    assert member.overran
    assert member.numbers == [1]
    assert len(log.reads) == reads
    assert clock.idle


def test_evict_after_trim(log, clock, short_tail):
    member = Reader(0)
    room = stalled(log, Registry(log, frames, clock, 5), clock, [member])
    log.trim(20)
    member.drain(room)
    clock.turns()
    assert member.overran
    assert member.numbers == [1]


def test_evict_if_log_cannot_be_read(log, clock, short_tail, events):
    _, _, member = reading(log, clock)
    log.fail()
    assert member.overran
    assert clock.idle
    assert [event["log_level"].name for event in events if event["log_namespace"] == "chatd.room.room"] == [
        "error",
        "info",
    ]


def test_failed_refill_after_leave(log, clock, short_tail):
    rooms, room, member = reading(log, clock)
    rooms.leave(room, member)
    log.fail()
    assert not member.overran


# Restarts


def received(member):
    """Return the frames that a member received, such as ["message abcd-1", "history efgh-0"]."""
    return [f"{text['type']} {text['id']}" for text in member.texts]


def acked(log, room, member, number):
    """Acknowledge the entry of this number in the current epoch of the log."""
    place = Id(log.epoch, number)
    room.acknowledge(member, number, ack_frame(place, f"c{place}", duplicate=False))


def test_page_continues_room(log, rooms):
    log.keep(5)
    room, _, _ = enter(rooms)
    assert room.continues(Page([], 1, 5))
    log.keep(3)
    assert room.continues(log.page(5, 3))
    assert not room.continues(log.page(5, 2))
    assert room.continues(log.page(None, 3))
    assert not room.continues(log.page(None, 2))
    assert not room.continues(log.page(None, 4))
    assert not room.continues(Page([], 1, 4)), "a log that is behind"
    log.first = 7
    assert not room.continues(log.page(5, 100))
    log.first = 9
    assert not room.continues(log.page(5, 100))
    log.epoch = "efgh"
    assert not room.continues(Page([], 1, 5))


def test_epoch_of_room_until_restart(log, rooms, clock):
    """Until a restart, the frames of a room have the epoch that it was loaded with."""
    room, member, _ = enter(rooms)
    log.epoch = "efgh"
    room.appended(log.keep(2))
    clock.turns()
    assert received(member) == ["message abcd-1", "message abcd-2"]
    assert rejoin(room, 1)[1]["id"] == "abcd-2"


def test_restart_sends_history_to_all(log, clock):
    log.keep(9)
    rooms = Registry(log, frames, clock, 3)
    room, member, _ = enter(rooms)
    _, reader, _ = enter(rooms, Reader(form=event))
    log.epoch, log.first = "efgh", 3
    room.restart(log.page(None, 3))
    (history,) = member.texts
    assert [history["id"], history["resumed"], history["more"], holds(history)] == ["efgh-9", False, True, [7, 8, 9]]
    assert reader.texts == [history]
    assert (member.cursor, reader.cursor, room.head, room.epoch) == (9, 9, 9, "efgh")
    assert room.delivered == 0


def test_leave_during_restart(log, rooms):
    log.keep(4)
    room, first, _ = enter(rooms)
    _, last, _ = enter(rooms)
    first.send_frame = lambda _: room.leave(first)
    log.epoch = "efgh"
    room.restart(log.page(None, 1))
    assert [*room.members] == [last]
    assert room.delivered == 0


def test_restart_drops_old_acks(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(2)
    acked(log, room, member, 1)
    acked(log, room, member, 2)
    log.lose(2)
    clock.turns()
    assert received(member) == ["history efgh-2"]
    assert not room.owes(member)
    assert clock.getDelayedCalls() == []


def test_ack_of_new_history_waits_for_restart(log, rooms, clock):
    log.keep(9)
    room, member, _ = enter(rooms)
    log.held = True
    log.lose(1)
    log.say()
    acked(log, room, member, 2)
    clock.turns()
    assert member.writes == []
    assert room.owes(member)
    log.answer()
    clock.turns()
    assert received(member) == ["history efgh-2", "ack efgh-2"]
    assert not room.owes(member)


def test_ack_of_new_history_follows_message(log, rooms, clock):
    log.keep(9)
    room, member, _ = enter(rooms)
    log.held = True
    log.lose(1)
    page = log.page(None, 100)
    log.say()
    acked(log, room, member, 2)
    log.answer(page)
    clock.turns()
    assert received(member) == ["history efgh-1", "message efgh-2", "ack efgh-2"]


def test_acks_of_current_epoch_only(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(0))
    log.say(2)
    acked(log, room, member, 1)
    clock.turns()
    acked(log, room, member, 2)
    log.held = True
    log.lose(1, "efgh")
    log.say()
    acked(log, room, member, 2)
    log.lose(1, "ijkl")
    log.say()
    acked(log, room, member, 2)
    log.release()
    clock.turns()
    member.drain(room)
    clock.turns()
    assert received(member) == ["message abcd-1", "ack abcd-1", "history ijkl-2", "ack ijkl-2"]


def test_due_ack_before_ack_of_new_history(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(0))
    log.say(2)
    acked(log, room, member, 2)
    clock.turns()
    log.held = True
    log.lose(1)
    log.say()
    acked(log, room, member, 2)
    member.drain(room)
    clock.turns()
    assert received(member) == ["message abcd-1", "message abcd-2", "ack abcd-2"]
    log.release()
    clock.turns()
    assert received(member)[3:] == ["history efgh-2", "ack efgh-2"]


def test_restart_keeps_acks_of_same_epoch(log, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.registry.MAX_LAG", 2)
    rooms = Registry(log, frames, clock, 1)
    room, member, _ = enter(rooms, Reader(0))
    log.say(2)
    clock.turns()
    acked(log, room, member, 2)
    log.miss(3)
    clock.turns()
    member.drain(room)
    clock.turns()
    assert received(member) == ["message abcd-1", "history abcd-5", "ack abcd-2"]


def test_kept_ack_needs_no_further_entry(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.epoch = "efgh"
    acked(log, room, member, 1)
    clock.turns()
    room.restart(Page([], 2, 1))
    clock.turns()
    assert received(member) == ["history efgh-1", "ack efgh-1"]


def test_restart_during_refill(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.lose(3)
    log.say(2)
    log.release()
    clock.turns(60)
    assert received(member) == ["message abcd-1", "history efgh-5"]
    assert clock.idle
    assert not member.overran


def test_refill_from_new_history_is_dropped(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.lose(30)
    log.answer()  # the refill: entries 2 to 6 of another history
    clock.turns()
    assert received(member) == ["message abcd-1"]
    assert clock.idle
    log.release()
    clock.turns()
    assert received(member) == ["message abcd-1", "history efgh-30"]


def test_failed_refill_after_restart(log, clock, short_tail, events):
    _, _, member = reading(log, clock)
    log.lose(3)
    log.waiting.rotate(-1)
    log.answer()
    clock.turns()
    log.fail()
    assert not member.overran
    log.say()
    clock.turns()
    assert received(member) == ["message abcd-1", "history efgh-3", "message efgh-4"]
    gc.collect()
    assert [event["log_format"] for event in events] == ["{room}: the log cannot be read: {error}"]


def test_late_refill_after_restart(log, clock, short_tail, events):
    _, room, member = reading(log, clock)
    log.lose(30)
    log.waiting.rotate(-1)
    log.answer()
    clock.turns()
    held = count_held(room, log, clock)
    log.answer()
    clock.turns()
    assert received(member) == ["message abcd-1", "history efgh-30"]
    assert clock.idle
    assert count_held(room, log, clock) == held
    gc.collect()
    assert events == []


def test_restart_drops_refills(log, clock, short_tail):
    _, room, member = reading(log, clock)
    log.answer()
    log.held = False
    log.lose(30)
    clock.turns()
    assert received(member) == ["message abcd-1", "history efgh-30"]
    held = count_held(room, log, clock)
    room.restart(log.page(None, 5))
    member.writes.pop()
    clock.turns()
    assert count_held(room, log, clock) == held


def test_refill_after_reload(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.miss(5)
    log.release()
    clock.turns(80)
    assert member.numbers == [*range(1, 46)]
    assert clock.idle


def test_restart_clears_cached_histories(log, rooms):
    log.keep(3)
    room, _, _ = enter(rooms)
    before = room.join(Reader()), room.join(Reader(), Id("abcd", 2))
    log.epoch = "efgh"
    room.restart(log.page(None, 100))
    after = room.join(Reader()), room.join(Reader(), Id("abcd", 2))
    assert [read_frames(frame)[0]["id"] for frame in (*before, *after)] == ["abcd-3", "abcd-3", "efgh-3", "efgh-3"]
    assert read_frames(after[1])[0]["resumed"] is False


# Any order of events


class SlowReadersMachine(RoomMachine):
    """Whatever members and transports do, each client receives a gapless run of the log, once.

    A client that reconnects is another member; what its members received is one run.
    """

    def prepare(self):
        self.members = {}
        """The room of each member, and the number of the last entry of its history."""
        self.acks = {}
        self.away = []

    def enter(self, member, had):
        self.log.held, held = False, self.log.held
        room, _, history = enter(self.rooms, member, last=None if had is None else f"abcd-{had}")
        self.log.held = held
        assert history.get("resumed") == (None if had is None else True)
        end = number_of(history)
        assert had is None or len(history["data"]) == end - had
        self.members[member] = room, end
        self.acks[member] = []

    @rule(space=st.none() | st.integers(0, 600), form=st.sampled_from([None, event]))
    def join(self, space, form):
        self.enter(Reader(space, form=form), None)

    @rule(count=st.integers(1, 9))
    def say(self, count):
        self.log.say(count, "x" * count)

    @rule(which=st.randoms(use_true_random=False), count=st.integers(1, 3))
    @precondition(lambda self: any(member.form is None for member in self.members))
    def post(self, which, count):
        # Readers of events post over HTTP and get the acknowledgement there.
        member = which.choice([member for member in self.members if member.form is None])
        for _ in range(count):
            self.log.say()
            number = len(self.log.entries)
            acknowledged(self.members[member][0], member, number)
            self.acks[member].append(number)

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: any(not member.ready for member in self.members))
    def drain(self, which, space):
        member = which.choice([member for member in self.members if not member.ready])
        member.drain(self.members[member][0], space)

    @rule(which=st.randoms(use_true_random=False), away=st.booleans())
    @precondition(lambda self: self.members)
    def leave(self, which, away):
        member = which.choice([*self.members])
        room, joined = self.members.pop(member)
        cut = bool(member.held)
        if cut:
            member.writes.append(member.held)
        numbers = member.numbers
        assert numbers == [*range(joined + 1, joined + 1 + len(numbers))]
        self.rooms.leave(room, member)
        if away:
            # The last message counts if it arrived whole.
            self.away.append((member.form, joined + len(numbers) - cut))

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: self.away)
    def rejoin(self, which, space):
        form, had = self.away.pop(which.randrange(len(self.away)))
        self.enter(Reader(space, form=form), had)

    @invariant()
    def nobody_is_evicted(self):
        assert not any(member.overran for member in getattr(self, "members", ()))

    @rule()
    def settle(self):
        self.run_out(lambda: [(member, room) for member, (room, _) in self.members.items()])
        head = len(self.log.entries)
        for member, (_, joined) in self.members.items():
            assert member.numbers == [*range(joined + 1, head + 1)]
            assert member.cursor == head
            texts = member.texts
            acks = [(place, number_of(text)) for place, text in enumerate(texts) if text["type"] == "ack"]
            assert [number for _, number in acks] == self.acks[member]
            for place, number in acks:
                assert number <= joined or number in {number_of(text) for text in texts[:place]}
        assert self.clock.idle


SlowReadersMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestSlowReadersMachine = SlowReadersMachine.TestCase
