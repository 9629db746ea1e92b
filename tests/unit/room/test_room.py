"""A room is a log; a client is a cursor."""

import gc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.helpers import Reader, ScriptedLog, Slow, Turns, count_held, enter, holds, read_frames, stamped

from chatd.messages import Entry, Id
from chatd.room.log import EncodedPage, Page, PageRange
from chatd.room.presence import PRESENCE, TYPING
from chatd.room.registry import Registry
from chatd.room.room import HISTORIES, MAX_LAG, RUNS
from chatd.room.sweep import SLICE_MEMBERS
from chatd.transport import frames
from chatd.transport.frames import ack_frame, event, message_frame

FRAME = len(message_frame("abcd", Entry(1, "ann", "x", stamped(1))))


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def log():
    return ScriptedLog()


@pytest.fixture
def rooms(log, clock):
    return Registry(log, frames, clock, 100)


@pytest.fixture
def short_tail(monkeypatch):
    """A tail of a few frames, so that the log is needed soon."""
    monkeypatch.setattr("chatd.room.tail.TAIL_BYTES", 400)


def number_of(text):
    return Id.parse(text["id"]).number


# Joining


def test_who_joins_gets_the_newest_messages_oldest_first(clock):
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


def test_an_empty_room_begins_with_a_cursor_too(rooms):
    assert enter(rooms)[2] == {"type": "history", "id": "abcd-0", "data": []}


@pytest.mark.parametrize(("first", "more"), [(1, True), (4, True), (5, False), (6, False), (8, False)])
def test_more_is_said_only_when_the_log_holds_older_messages(log, clock, first, more):
    log.keep(7)
    log.first = first
    _, _, history = enter(Registry(log, frames, clock, 3))
    assert history.get("more", False) is more
    assert history["id"] == "abcd-7"
    assert len(history["data"]) == min(3, 8 - first)


def test_the_history_ends_where_the_messages_that_follow_begin(log, rooms, clock):
    room, first, _ = enter(rooms)
    log.say(3)
    _, second, history = enter(rooms)
    log.say(2)
    clock.turns()
    assert [len(history["data"]), history["id"]] == [3, "abcd-3"]
    assert first.numbers == [1, 2, 3, 4, 5]
    assert second.numbers == [4, 5]
    assert room.head == 5


def test_who_join_at_one_head_share_one_encoded_history(log, rooms):
    room, _, _ = enter(rooms)
    log.say()
    assert room.join(Reader()) is room.join(Reader())


def test_the_history_goes_on_growing_with_the_room(log, clock):
    rooms = Registry(log, frames, clock, 3)
    enter(rooms)
    log.say(5)
    assert [len(enter(rooms)[2]["data"]), enter(rooms)[2]["more"]] == [3, True]


def test_the_history_shows_no_more_what_retention_removed(log, rooms):
    enter(rooms)
    log.say(5)
    assert len(enter(rooms)[2]["data"]) == 5
    log.trim(4)
    history = enter(rooms)[2]
    assert [history["id"], len(history["data"]), "more" in history] == ["abcd-5", 2, False]
    log.trim(6)
    history = enter(rooms)[2]
    assert [history["id"], len(history["data"]), "more" in history] == ["abcd-5", 0, False]


def test_a_room_tells_its_watchers_who_is_here(rooms, clock):
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


# Coming back


@pytest.fixture
def ten(clock):
    """A room of ten messages, of which a history frame holds four."""
    log = ScriptedLog()
    room, _, _ = enter(Registry(log, frames, clock, 4))
    log.say(10)
    clock.turns()
    room.log = log
    return room


def come_back(room, number, missed=None, epoch="abcd", member=None):
    """Join with the last message that the member has; answers the member and what its history frame says."""
    member = member or Reader()
    (history,) = read_frames(room.join(member, Id(epoch, number), missed))
    holds(history)
    return member, history


@pytest.mark.parametrize(("last", "end"), [(0, 4), (1, 5), (5, 9), (6, 10), (8, 10), (10, 10)])
def test_who_comes_back_gets_exactly_what_was_missed_the_oldest_first_and_the_rest_as_messages(ten, clock, last, end):
    member, history = come_back(ten, last)
    clock.turns()
    assert history["resumed"] is True
    assert [history["id"], len(history["data"])] == [f"abcd-{end}", end - last]
    assert member.numbers == [*range(end + 1, 11)]


def test_who_comes_back_with_nothing_missed_gets_the_cursor_again(ten, clock):
    member, history = come_back(ten, 10)
    assert history == {"type": "history", "id": "abcd-10", "resumed": True, "data": []}
    ten.log.say()
    clock.turns()
    assert member.numbers == [11]


def test_the_cursor_of_an_empty_room_is_a_valid_one(rooms, log):
    room, _, _ = enter(rooms)
    assert come_back(room, 0)[1] == {"type": "history", "id": "abcd-0", "resumed": True, "data": []}
    log.say(2)
    history = come_back(room, 0)[1]
    assert [history["resumed"], history["id"], len(history["data"])] == [True, "abcd-2", 2]


def fresh(history):
    """Whether this is a fresh start with the newest of ten messages."""
    assert history["data"]
    return [history["resumed"], history["id"], len(history["data"])] == [False, "abcd-10", 4]


def test_who_has_a_message_of_another_epoch_starts_afresh(ten, clock):
    member, history = come_back(ten, 8, epoch="wxyz")
    assert fresh(history)
    assert history["more"] is True
    clock.turns()
    assert member.numbers == []


def test_who_has_a_message_of_the_future_starts_afresh(ten):
    assert fresh(come_back(ten, 11)[1])


def test_who_has_a_message_that_is_beyond_what_the_log_holds_too_starts_afresh(ten):
    assert fresh(come_back(ten, 11, Page([], 1, 10))[1])


def test_who_has_a_message_of_the_log_that_the_room_was_not_told_of_is_not_of_the_future(ten, clock):
    entries = ten.log.keep(3)
    member, history = come_back(ten, 12, Page(entries[2:], 1, 13))
    assert [history["resumed"], history["id"], member.cursor] == [True, "abcd-13", 13]
    other, history = come_back(ten, 13, Page([], 1, 13))
    assert history == {"type": "history", "id": "abcd-13", "resumed": True, "data": []}
    ten.appended(entries)
    ten.log.say()
    clock.turns()
    assert [member.numbers, other.numbers] == [[14], [14]]


def test_who_has_the_message_before_the_oldest_that_is_kept_has_lost_nothing(ten):
    ten.log.trim(6)
    assert come_back(ten, 5)[1]["resumed"] is True


def test_who_misses_what_retention_removed_starts_afresh(ten):
    ten.log.trim(6)
    assert fresh(come_back(ten, 4)[1])


def test_who_misses_what_retention_removed_in_the_log_alone_starts_afresh(ten):
    assert fresh(come_back(ten, 4, Page(ten.log.entries[5:9], 6, 10))[1])


def test_who_misses_all_of_an_emptied_log_starts_afresh_with_nothing(ten):
    ten.log.trim(11)
    assert come_back(ten, 4)[1] == {"type": "history", "id": "abcd-10", "resumed": False, "data": []}
    assert come_back(ten, 10)[1]["resumed"] is True


def test_who_has_missed_too_much_starts_afresh(ten, monkeypatch):
    assert MAX_LAG == 10_000
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 6)
    assert come_back(ten, 4)[1]["resumed"] is True
    assert fresh(come_back(ten, 3)[1])
    # ... also when it is too much in the log alone.
    assert fresh(come_back(ten, 4, Page(ten.log.entries[4:8], 1, 11))[1])


@pytest.mark.parametrize("last", range(11))
@pytest.mark.parametrize("first", [1, 4])
def test_more_is_never_said_to_who_has_come_back(ten, last, first):
    ten.log.trim(first)
    history = come_back(ten, last)[1]
    assert not (history["resumed"] and "more" in history)
    assert history["resumed"] == (last >= first - 1)


def test_what_the_tail_does_not_hold_any_more_is_taken_from_what_the_log_held(log, clock, short_tail):
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    member, history = come_back(room, 2, log.page(2, 4))
    clock.turns()
    assert [history["resumed"], history["id"], len(history["data"])] == [True, "abcd-6", 4]
    assert member.numbers == [7, 8, 9, 10]


def test_where_nobody_asked_the_log_the_whole_follows(log, clock):
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    member, history = come_back(room, 2)
    clock.turns()
    assert [history["resumed"], history["id"], history["data"]] == [True, "abcd-2", []]
    assert member.numbers == [*range(3, 11)]


def test_a_herd_that_comes_back_with_one_id_shares_one_encoded_history(ten):
    def joined(number, epoch="abcd"):
        return ten.join(Reader(), Id(epoch, number))

    assert joined(5) is joined(5)
    assert joined(5) is not joined(6)
    assert joined(5, "wxyz") is joined(7, "efgh")
    assert joined(5, "wxyz") is not ten.join(Reader())


@pytest.mark.parametrize("last", [None, Id("abcd", 8), Id("wxyz", 1)])
def test_an_encoded_history_is_forgotten_when_something_is_appended_or_trimmed(ten, last):
    frame = ten.join(Reader(), last)
    assert ten.join(Reader(), last) is frame
    ten.log.trim(2)
    again = ten.join(Reader(), last)
    assert again is not frame
    ten.log.say()
    assert read_frames(ten.join(Reader(), last)) != read_frames(again)


def test_history_cache_is_cleared_by_entries(log, rooms, clock):
    room, _, _ = enter(rooms)
    log.say(3)
    clock.turns()
    before = count_held(room, log, clock)
    for number in range(3):
        room.leave(come_back(room, number)[0])
    assert count_held(room, log, clock) > before
    log.trim(1)
    assert count_held(room, log, clock) == before


def test_encoded_histories_are_bounded(log, rooms, clock):
    room, _, _ = enter(rooms)
    log.say(HISTORIES * 3)
    clock.turns()
    sizes = [count_held(room, log, clock)]
    for number in range(HISTORIES * 3):
        member, history = come_back(room, number)
        assert history["resumed"] is True
        rooms.leave(room, member)
        sizes.append(count_held(room, log, clock))
    assert max(sizes) == sizes[HISTORIES]


# Reading back


def test_a_page_is_of_the_frames_that_were_sent(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(5)
    clock.turns()
    excerpt = room.page(PageRange(4, None, 2))
    assert excerpt == EncodedPage(excerpt.frames, 3, older=True, newer=True)
    assert b"".join(excerpt.frames) in member.writes[0]


def test_a_page_is_answered_as_far_as_the_tail_goes(log, clock):
    log.keep(10)
    room, _, _ = enter(Registry(log, frames, clock, 4))
    assert room.page(PageRange(None, None, 4)).end == 10
    assert room.page(PageRange(None, None, 5)) is None
    assert room.page(PageRange(None, 6, 1)).end == 7
    assert room.page(PageRange(None, 5, 1)) is None
    assert room.page(PageRange(9, None, 2)).end == 8
    assert room.page(PageRange(9, None, 3)) is None


def test_a_page_beyond_the_head_is_the_logs_to_judge(log, rooms):
    log.keep(3)
    room, _, _ = enter(rooms)
    assert room.page(PageRange(5, None, 1)) is None
    assert room.page(PageRange(None, 4, 1)) is None


def test_a_page_shows_no_more_what_retention_removed(ten):
    ten.log.trim(8)
    excerpt = ten.page(PageRange(None, 1, 9))
    assert [len(excerpt.frames), excerpt.end, excerpt.older, excerpt.newer] == [3, 10, False, False]


# The flush


def test_nothing_is_sent_before_the_next_turn_and_all_that_came_in_one_turn_is_one_write(log, rooms, clock):
    members = [enter(rooms)[1] for _ in range(3)]
    log.say()
    log.say(2)
    assert [member.writes for member in members] == [[], [], []]
    clock.turn()
    assert [member.numbers for member in members] == [[1, 2, 3]] * 3
    assert [len(member.writes) for member in members] == [1, 1, 1]


def test_members_at_one_cursor_are_handed_the_same_bytes(log, rooms, clock):
    one, other = enter(rooms)[1], enter(rooms)[1]
    log.say(2)
    clock.turn()
    assert one.writes[0] is other.writes[0]


def test_members_of_another_form_get_the_same_messages_in_that(log, rooms, clock):
    member, reader = enter(rooms)[1], enter(rooms, Reader(form=event))[1]
    log.say(3)
    clock.turns()
    assert member.texts == reader.texts
    assert reader.numbers == [1, 2, 3]
    assert reader.writes[0].startswith(b'event: message\nid: abcd-1\ndata: {"type":"message"')


def test_a_run_is_joined_once_for_each_cursor_and_form(log, rooms, clock):
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


def test_a_cut_event_is_completed_first(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(FRAME + 50, form=event))
    log.say(3)
    clock.turns()
    assert not member.ready
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3]


def test_when_all_is_sent_nothing_is_left_to_do(log, rooms, clock):
    enter(rooms)
    log.say()
    assert not clock.idle
    clock.turns()
    assert clock.getDelayedCalls() == []


def test_what_the_room_knows_is_passed_over(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(2)
    room.appended(log.entries)
    clock.turns()
    assert member.numbers == [1, 2]


def test_who_left_is_sent_nothing(log, rooms, clock):
    room, member, _ = enter(rooms)
    enter(rooms)
    log.say()
    rooms.leave(room, member)
    clock.turns()
    assert member.writes == []


def test_who_leaves_during_a_pass_is_sent_nothing_any_more(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say()
    clock.turn()
    members[-1].leave()
    clock.turns()
    assert [len(members[-2].writes), members[-1].writes] == [1, []]


def test_who_leaves_with_more_to_get_is_sent_nothing_any_more(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(0))
    enter(rooms)
    log.say(2)
    clock.turns()
    member.drain(room)
    assert member.numbers == [1]
    member.leave()
    clock.turns()
    assert member.numbers == [1]


def test_a_long_pass_is_sliced_and_goes_on_where_it_stopped(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 3 - 1)]
    clock.turns()
    log.say()
    served = []
    while not clock.idle:
        clock.turn()
        served.append(sum(bool(member.writes) for member in members))
        assert len(served) < 10
    assert served[:3] == [SLICE_MEMBERS, SLICE_MEMBERS * 2, len(members)]


def test_messages_that_come_during_a_pass_reach_all_in_the_next(log, rooms, clock):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 2)]
    log.say()
    clock.turn()  # half of them
    log.say()
    newcomer = enter(rooms)[1]
    clock.turns()
    assert [member.numbers for member in members] == [[1, 2]] * len(members)
    assert [len(member.writes) for member in members] == [2] * len(members)
    assert newcomer.numbers == []


def test_a_member_is_handed_a_bounded_run_in_one_turn(log, rooms, clock, monkeypatch):
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


def test_so_is_a_member_that_comes_back_and_is_ready_again_in_the_same_turn(log, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 3 * FRAME)
    room, _, _ = enter(Registry(log, frames, clock, 1))
    log.say(9)
    clock.turns()
    member, _ = come_back(room, 0)
    room.resume(member)
    clock.turn()
    assert member.numbers == [2, 3, 4]


def test_a_frame_above_the_bound_is_still_sent(log, rooms, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 1)
    _, member, _ = enter(rooms)
    log.say(2)
    clock.turns()
    assert member.numbers == [1, 2]


# Acknowledgements


def acknowledged(room, member, number, label=None):
    room.acknowledge(member, number, ack_frame(Id("abcd", number), label or f"c{number}", duplicate=False))


def kinds(member):
    """What a member has received, such as ["message 1", "ack 1"]."""
    return [f"{text['type']} {number_of(text)}" for text in member.texts]


def test_who_posted_is_told_after_the_message_itself(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say()
    acknowledged(room, member, 1)
    assert member.writes == []
    clock.turn()
    assert kinds(member) == ["message 1", "ack 1"]
    assert clock.getDelayedCalls() == []


def test_several_acknowledgements_are_told_at_once_and_in_order(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(3)
    for number in (1, 2, 3):
        acknowledged(room, member, number)
    clock.turn()
    assert kinds(member) == ["message 1", "message 2", "message 3", "ack 1", "ack 2", "ack 3"]
    assert len(member.writes) == 2


def test_who_has_the_message_already_is_told_in_the_next_turn(log, rooms, clock):
    log.keep(2)
    room, member, _ = enter(rooms)
    clock.turns()
    acknowledged(room, member, 2)
    assert member.writes == []
    clock.turn()
    assert kinds(member) == ["ack 2"]


@pytest.mark.parametrize("place", [0, SLICE_MEMBERS * 3 - 1])
def test_who_posted_is_told_after_the_message_in_a_sliced_pass_too(log, rooms, clock, place):
    members = [enter(rooms, Slow(clock))[1] for _ in range(SLICE_MEMBERS * 3)]
    room, member = enter(rooms)[0], members[place]
    log.say()
    acknowledged(room, member, 1)
    clock.turns()
    assert kinds(member) == ["message 1", "ack 1"]


def test_who_posted_after_his_slice_is_told_with_the_next_pass(log, rooms, clock):
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


def test_who_is_not_ready_is_told_when_it_has_caught_up(log, rooms, clock):
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


def test_behind_the_frame_that_was_cut_an_acknowledgement_keeps_its_place(log, rooms, clock):
    room, member, _ = enter(rooms, Reader(FRAME + 1))
    log.say(2)
    acknowledged(room, member, 1)
    acknowledged(room, member, 2)
    clock.turns()
    member.drain(room)
    assert kinds(member) == ["message 1", "message 2", "ack 1", "ack 2"]


def test_of_several_only_those_whose_message_was_given_are_told(log, rooms, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 2 * FRAME)
    room, member, _ = enter(rooms)
    log.say(4)
    for number in (1, 2, 3, 4):
        acknowledged(room, member, number)
    clock.turns()
    assert kinds(member) == [f"{kind} {n}" for a in (1, 3) for kind in ("message", "ack") for n in (a, a + 1)]


def test_one_that_lags_holds_up_nobodys_acknowledgement_but_its_own(log, rooms, clock):
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


def test_who_is_refilled_from_the_log_is_told_when_it_has_caught_up(log, clock, short_tail):
    _, room, member = reading(log, clock)
    log.say()
    acknowledged(room, member, 41)
    clock.turns()
    assert "ack 41" not in kinds(member)
    log.release()
    clock.turns(60)
    assert kinds(member)[-2:] == ["message 41", "ack 41"]


def test_who_has_left_is_told_nothing(log, rooms, clock):
    room, member, _ = enter(rooms)
    enter(rooms)
    log.say()
    acknowledged(room, member, 1)
    rooms.leave(room, member)
    clock.turns()
    assert member.writes == []
    assert not room.owes(member)


# As it is measured


def test_what_is_kept_and_who_stands_where(log, rooms, clock, short_tail):
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


def test_a_frame_that_is_cut_is_completed_first_and_nothing_else_is_kept(log, rooms, clock):
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
def test_a_cut_between_two_frames_holds_the_next_one_and_no_more(log, rooms, clock, taken):
    room, member, _ = enter(rooms, Reader(taken * FRAME))
    log.say(3)
    clock.turns()
    assert member.cursor == taken + 1
    assert len(member.held) == FRAME
    member.drain(room)
    clock.turns()
    assert member.numbers == [1, 2, 3]


def test_a_slow_member_does_not_hold_up_the_others(log, rooms, clock):
    enter(rooms, Reader(0))
    fast = enter(rooms)[1]
    for _ in range(5):
        log.say()
        clock.turns()
    assert fast.numbers == [1, 2, 3, 4, 5]


def test_a_member_that_resumes_with_nothing_to_get_costs_nothing(rooms, clock):
    room, member, _ = enter(rooms)
    clock.turns()
    room.resume(member)
    assert clock.getDelayedCalls() == []


def test_many_cursors_do_not_pile_up_joined_runs(log, rooms, clock):
    members = []
    for _ in range(RUNS * 2):
        room, member, _ = enter(rooms, Reader(0))
        members.append(member)
        log.say()
        clock.turns()
    most = []
    for member in members:
        member.drain(room)
        member.write = lambda data, write=member.write: most.append(len(room._runs)) or write(data)
    clock.turns()
    assert max(most) == RUNS
    assert room._runs == {}
    assert [member.numbers for member in members] == [[*range(begin, 2 * RUNS + 1)] for begin in range(1, 2 * RUNS + 1)]


# Refilled from the log


def stalled(log, rooms, clock, members, count=40):
    """A room whose tail has moved on past members that took nothing."""
    for member in members:
        room, _, _ = enter(rooms, member)
    log.say()
    clock.turns()
    log.say(count - 1)
    clock.turns()
    assert room.held[0] < room.head - members[0].cursor
    return room


def reading(log, clock):
    """A member that was overrun and for which the log is being read."""
    rooms, member = Registry(log, frames, clock, 5), Reader(0)
    room = stalled(log, rooms, clock, [member])
    log.held = True
    member.drain(room)
    clock.turns()
    return rooms, room, member


def test_who_was_overrun_by_the_tail_is_caught_up_from_the_log(log, clock, short_tail):
    member = Reader(0)
    room = stalled(log, Registry(log, frames, clock, 5), clock, [member])
    reads = len(log.reads)
    member.drain(room)
    clock.turns(60)
    assert member.numbers == [*range(1, 41)]
    assert len(log.reads) > reads
    assert clock.getDelayedCalls() == []


def test_while_the_log_is_read_for_a_member_it_is_read_once(log, clock, short_tail):
    _, _, member = reading(log, clock)
    reads = len(log.reads)
    log.say()
    clock.turns()
    assert len(log.reads) == reads
    assert clock.idle
    log.release()
    clock.turns(60)
    assert member.numbers == [*range(1, 42)]


def test_members_at_one_cursor_share_one_read_and_one_run(log, clock, short_tail):
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


def test_members_at_one_cursor_share_one_read_of_a_log_that_answers_at_once_too(log, clock, short_tail):
    members = [Reader(0) for _ in range(9)]
    room = stalled(log, Registry(log, frames, clock, 5), clock, members)
    reads = len(log.reads)
    for member in members:
        member.drain(room)
    clock.turns(60)
    assert [member.numbers for member in members] == [[*range(1, 41)]] * 9
    assert len({*log.reads[reads:]}) == len(log.reads[reads:])


def test_what_the_log_gives_during_a_pass_is_used_in_the_next(log, rooms, clock, short_tail):
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


def test_a_page_of_the_log_that_is_longer_than_a_run_is_given_piece_by_piece(log, clock, short_tail, monkeypatch):
    _, _, member = reading(log, clock)
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 2 * FRAME)
    log.release()
    clock.turns(100)
    assert member.numbers == [*range(1, 41)]
    assert max(len(read_frames(data)) for data in member.writes) == 2


def test_a_log_that_gives_more_than_the_room_was_told_of_is_not_told_twice(log, clock, short_tail):
    _, _, member = reading(log, clock)
    new = log.keep(2)
    log.answer(Page(log.entries[1:], 1, 42))
    clock.turns()
    assert member.numbers == [*range(1, 43)]
    log.follower.appended("main", new)
    log.say()
    clock.turns()
    assert member.numbers == [*range(1, 44)]


def test_a_member_that_stalls_again_while_the_log_is_read_loses_nothing(log, clock, short_tail):
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


def test_who_left_while_the_log_was_read_is_sent_nothing(log, clock, short_tail):
    rooms, room, member = reading(log, clock)
    rooms.leave(room, member)
    writes = len(member.writes)
    log.release()
    clock.turns()
    assert len(member.writes) == writes
    assert not member.overran


def test_one_that_left_while_the_log_was_read_does_not_take_it_from_the_other(log, clock, short_tail):
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


def test_who_is_too_far_behind_is_told_to_come_back(log, clock, short_tail, monkeypatch):
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
        lambda log: log.page(19, 5),  # what comes next was removed
        lambda log: log.page(2, 5),  # one is missing
        lambda log: Page(log.entries[:5], 1, 40),  # what it has
        lambda log: Page([], 41, 40),
        lambda log: Page([], 1, 1),  # a log that lost writes
    ],
)
def test_a_log_that_does_not_give_the_next_message_closes_who_needs_it_rather_than_leave_a_gap(
    log, clock, short_tail, page
):
    _, _, member = reading(log, clock)
    reads = len(log.reads)
    log.answer(page(log))
    clock.turns()
    assert member.overran
    assert member.numbers == [1]
    assert len(log.reads) == reads
    assert clock.idle


def test_who_misses_what_retention_removed_is_told_to_come_back(log, clock, short_tail):
    member = Reader(0)
    room = stalled(log, Registry(log, frames, clock, 5), clock, [member])
    log.trim(20)
    member.drain(room)
    clock.turns()
    assert member.overran
    assert member.numbers == [1]


def test_a_log_that_cannot_be_read_closes_who_needs_it(log, clock, short_tail, events):
    _, _, member = reading(log, clock)
    log.fail()
    assert member.overran
    assert clock.idle
    assert [event["log_level"].name for event in events if event["log_namespace"] == "chatd.room.room"] == [
        "error",
        "info",
    ]


def test_a_log_that_cannot_be_read_closes_nobody_who_has_left(log, clock, short_tail):
    rooms, room, member = reading(log, clock)
    rooms.leave(room, member)
    log.fail()
    assert not member.overran


# Begun anew


def told(member):
    """What a member has received, such as ["message abcd-1", "ack abcd-1", "history efgh-0"]."""
    return [f"{text['type']} {text['id']}" for text in member.texts]


def acked(log, room, member, number):
    """Acknowledge the message of this number in the log as it is now."""
    place = Id(log.epoch, number)
    room.acknowledge(member, number, ack_frame(place, f"c{place}", duplicate=False))


def test_a_page_continues_a_room_if_it_ends_it_without_a_gap_in_the_same_history(log, rooms):
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


def test_until_then_what_a_room_has_is_of_the_history_that_it_was_loaded_from(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.epoch = "efgh"
    room.appended(log.keep(2))
    clock.turns()
    assert told(member) == ["message abcd-1", "message abcd-2"]
    assert come_back(room, 1)[1]["id"] == "abcd-2"


def test_all_members_are_told_the_newest_messages_and_stand_at_the_newest(log, clock):
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


def test_the_others_are_not_told_of_what_one_is_told_as_it_leaves(log, rooms):
    log.keep(4)
    room, first, _ = enter(rooms)
    _, last, _ = enter(rooms)
    first.send_frame = lambda _: room.leave(first)
    log.epoch = "efgh"
    room.restart(log.page(None, 1))
    assert [*room.members] == [last]
    assert room.delivered == 0


def test_acknowledgements_of_the_lost_history_are_dropped(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.say(2)
    acked(log, room, member, 1)
    acked(log, room, member, 2)
    log.lose(2)
    clock.turns()
    assert told(member) == ["history efgh-2"]
    assert not room.owes(member)
    assert clock.getDelayedCalls() == []


def test_an_acknowledgement_of_the_new_history_comes_after_it_though_the_room_is_still_in_the_old(log, rooms, clock):
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
    assert told(member) == ["history efgh-2", "ack efgh-2"]
    assert not room.owes(member)


def test_and_after_its_message_if_that_is_not_in_the_history(log, rooms, clock):
    log.keep(9)
    room, member, _ = enter(rooms)
    log.held = True
    log.lose(1)
    page = log.page(None, 100)
    log.say()
    acked(log, room, member, 2)
    log.answer(page)
    clock.turns()
    assert told(member) == ["history efgh-1", "message efgh-2", "ack efgh-2"]


def test_of_several_only_those_of_the_history_that_is_are_told(log, rooms, clock):
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
    assert told(member) == ["message abcd-1", "ack abcd-1", "history ijkl-2", "ack ijkl-2"]


def test_an_acknowledgement_that_is_due_is_told_while_one_of_the_new_history_waits(log, rooms, clock):
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
    assert told(member) == ["message abcd-1", "message abcd-2", "ack abcd-2"]
    log.release()
    clock.turns()
    assert told(member)[3:] == ["history efgh-2", "ack efgh-2"]


def test_an_acknowledgement_is_not_dropped_where_the_history_goes_on(log, clock, monkeypatch):
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
    assert told(member) == ["message abcd-1", "history abcd-5", "ack abcd-2"]


def test_an_acknowledgement_that_is_kept_is_told_without_another_message(log, rooms, clock):
    room, member, _ = enter(rooms)
    log.epoch = "efgh"
    acked(log, room, member, 1)
    clock.turns()
    room.restart(Page([], 2, 1))
    clock.turns()
    assert told(member) == ["history efgh-1", "ack efgh-1"]


def test_who_is_refilled_goes_on_in_the_history_that_is(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.lose(3)
    log.say(2)
    log.release()
    clock.turns(60)
    assert told(member) == ["message abcd-1", "history efgh-5"]
    assert clock.idle
    assert not member.overran


def test_what_is_read_of_the_new_history_is_not_given_to_who_has_the_old(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.lose(30)
    log.answer()  # for the refill: messages 2 to 6, of another history
    clock.turns()
    assert told(member) == ["message abcd-1"]
    assert clock.idle
    log.release()
    clock.turns()
    assert told(member) == ["message abcd-1", "history efgh-30"]


def test_a_read_that_fails_when_all_began_anew_closes_nobody(log, clock, short_tail, events):
    _, _, member = reading(log, clock)
    log.lose(3)
    log.waiting.rotate(-1)
    log.answer()
    clock.turns()
    log.fail()
    assert not member.overran
    log.say()
    clock.turns()
    assert told(member) == ["message abcd-1", "history efgh-3", "message efgh-4"]
    gc.collect()
    assert [event["log_format"] for event in events] == ["{room}: the log cannot be read: {error}"]


def test_one_that_comes_when_all_began_anew_gives_nobody_anything(log, clock, short_tail, events):
    _, room, member = reading(log, clock)
    log.lose(30)
    log.waiting.rotate(-1)
    log.answer()
    clock.turns()
    held = count_held(room, log, clock)
    log.answer()
    clock.turns()
    assert told(member) == ["message abcd-1", "history efgh-30"]
    assert clock.idle
    assert count_held(room, log, clock) == held
    gc.collect()
    assert events == []


def test_what_was_read_for_the_next_pass_is_not_given_in_another_history(log, clock, short_tail):
    _, room, member = reading(log, clock)
    log.answer()
    log.held = False
    log.lose(30)
    clock.turns()
    assert told(member) == ["message abcd-1", "history efgh-30"]
    held = count_held(room, log, clock)
    room.restart(log.page(None, 5))
    member.writes.pop()
    assert count_held(room, log, clock) == held


def test_who_is_refilled_where_the_history_goes_on_gets_it_all(log, clock, short_tail):
    _, _, member = reading(log, clock)
    log.miss(5)
    log.release()
    clock.turns(80)
    assert member.numbers == [*range(1, 46)]
    assert clock.idle


def test_an_encoded_history_is_forgotten_with_the_history(log, rooms):
    log.keep(3)
    room, _, _ = enter(rooms)
    before = room.join(Reader()), room.join(Reader(), Id("abcd", 2))
    log.epoch = "efgh"
    room.restart(log.page(None, 100))
    after = room.join(Reader()), room.join(Reader(), Id("abcd", 2))
    assert [read_frames(frame)[0]["id"] for frame in (*before, *after)] == ["abcd-3", "abcd-3", "efgh-3", "efgh-3"]
    assert read_frames(after[1])[0]["resumed"] is False


# Whatever happens


class OneRoomWithSlowReaders(RuleBasedStateMachine):
    """Whatever members and transports do, each client has received a run of the log without gap or double.

    A client is what comes back as another member: all that its members received, in turn.
    """

    @initialize(tail=st.integers(200, 2000), history=st.integers(1, 5))
    def begin(self, tail, history):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("chatd.room.tail.TAIL_BYTES", tail)
        self.patch.setattr("chatd.room.tail.RUN_BYTES", 400)
        self.patch.setattr("chatd.room.sweep.SLICE_MEMBERS", 2)
        self.patch.setattr("chatd.room.sweep.SLICE_SECONDS", -1)
        self.clock, self.log = Turns(), ScriptedLog()
        self.rooms = Registry(self.log, frames, self.clock, history)
        self.members = {}
        """The room of each, and what its client has had before it: a number, or None."""
        self.acks = {}
        self.away = []

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    def come(self, member, had):
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
        self.come(Reader(space, form=form), None)

    @rule(count=st.integers(1, 9))
    def say(self, count):
        self.log.say(count, "x" * count)

    @rule(which=st.randoms(use_true_random=False), count=st.integers(1, 3))
    @precondition(lambda self: any(member.form is None for member in self.members))
    def post(self, which, count):
        # A reader of events posts over HTTP, and so is acknowledged there.
        member = which.choice([member for member in self.members if member.form is None])
        for _ in range(count):
            self.log.say()
            number = len(self.log.entries)
            acknowledged(self.members[member][0], member, number)
            self.acks[member].append(number)

    @rule()
    def turn(self):
        self.clock.turn()

    @rule()
    def hold(self):
        self.log.held = True

    @rule()
    @precondition(lambda self: self.log.waiting)
    def answer(self):
        self.log.answer()

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
            # The last message is had if it came whole.
            self.away.append((member.form, joined + len(numbers) - cut))

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: self.away)
    def come_back(self, which, space):
        form, had = self.away.pop(which.randrange(len(self.away)))
        self.come(Reader(space, form=form), had)

    @invariant()
    def nobody_is_closed(self):
        assert not any(member.overran for member in getattr(self, "members", ()))

    @rule()
    def all_catch_up(self):
        self.log.release()
        for _ in range(400):
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
            texts = member.texts
            acks = [(place, number_of(text)) for place, text in enumerate(texts) if text["type"] == "ack"]
            assert [number for _, number in acks] == self.acks[member]
            for place, number in acks:
                assert number <= joined or number in {number_of(text) for text in texts[:place]}
        assert self.clock.idle


OneRoomWithSlowReaders.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestOneRoomWithSlowReaders = OneRoomWithSlowReaders.TestCase
