"""The rooms by name: loaded for the first who joins, forgotten with the last who leaves, read back by page."""

import pytest
from helpers import REPEATABLE, Reader, ScriptedLog, Turns, arrive, enter, read_frames, result_of, stamped
from hypothesis import example, given
from hypothesis import strategies as st

from chatd.frames import Id, PageRequest, Post
from chatd.log import LogUnavailable, UnknownId
from chatd.rooms import Rooms


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def log():
    return ScriptedLog()


@pytest.fixture
def rooms(log, clock):
    return Rooms(log, clock, 100)


@pytest.fixture
def short_tail(monkeypatch):
    """A tail of a few frames, so that the log is needed soon."""
    monkeypatch.setattr("chatd.tail.TAIL_BYTES", 400)


def told(history):
    """What a history frame says of coming back, its id, and how many messages it holds."""
    return history.get("resumed"), history["id"], len(history["data"])


# Loading


def test_a_room_is_read_from_the_log_for_the_first_who_comes(log, rooms):
    log.keep(3)
    assert told(enter(rooms)[2]) == (None, "abcd-3", 3)
    enter(rooms)
    assert log.reads == [("main", None, 100)]


def test_the_first_to_come_waits_for_the_log_and_the_others_wait_with_it(log, rooms):
    log.held = True
    arrived = [arrive(rooms), arrive(rooms)]
    assert arrived == [[], []]
    assert len(log.reads) == 1
    log.answer()
    assert arrived[0][0][0] is arrived[1][0][0]


def test_rooms_are_loaded_each_for_itself(log, rooms):
    log.held = True
    one, other = arrive(rooms, name="one"), arrive(rooms, name="other")
    assert [name for name, _, _ in log.reads] == ["one", "other"]
    log.answer()
    assert [len(one), len(other)] == [1, 0]
    log.answer()
    assert one[0][0] is not other[0][0]


def test_what_is_appended_while_a_room_is_loaded_is_neither_lost_nor_doubled(log, rooms, clock):
    log.held = True
    arrived = arrive(rooms)
    log.say()
    page = log.page(None, 100)
    log.say()
    log.answer(page)
    ((_, member, history),) = arrived
    assert told(history) == (None, "abcd-2", 2)
    log.say()
    clock.turns()
    assert member.numbers == [3]


def test_what_is_trimmed_while_a_room_is_loaded_is_shown_no_more(log, rooms):
    log.keep(5)
    log.held = True
    arrived = arrive(rooms)
    page = log.page(None, 100)
    log.trim(4)
    log.answer(page)
    assert told(arrived[0][2]) == (None, "abcd-5", 2)


def test_a_log_that_is_down_fails_all_who_wait_and_the_next_try_is_a_new_one(log, rooms):
    log.held = True
    arrived = [arrive(rooms), arrive(rooms)]
    log.fail()
    assert [failure.type for (failure,) in arrived] == [LogUnavailable, LogUnavailable]
    assert rooms._missed == {}
    log.release()
    assert enter(rooms)[2]["id"] == "abcd-0"


def test_who_comes_again_when_told_that_the_log_is_down_begins_a_new_try(log, rooms):
    log.held = True
    again = []
    rooms.open("main").addErrback(lambda _: again.append(arrive(rooms)))
    log.fail()
    log.release()
    assert told(again[0][0][2]) == (None, "abcd-0", 0)


# Forgetting


def test_a_room_is_forgotten_with_its_last_member(log, rooms):
    room, member, _ = enter(rooms)
    _, other, _ = enter(rooms)
    rooms.leave(room, member)
    assert rooms._rooms == {"main": room}
    rooms.leave(room, other)
    assert rooms._rooms == {}
    assert enter(rooms)[0] is not room


def test_a_room_that_was_opened_and_not_joined_is_forgotten(rooms, clock):
    rooms.open("main")
    assert rooms._rooms
    clock.turn()
    assert rooms._rooms == {}


def test_a_room_that_was_joined_is_not_forgotten_by_that(rooms, clock):
    room, _, _ = enter(rooms)
    clock.turns()
    assert rooms._rooms == {"main": room}


def test_a_room_that_was_loaded_again_meanwhile_is_not_forgotten_for_the_old_one(log, rooms, clock):
    old, member, _ = enter(rooms)
    rooms.leave(old, member)
    new, _, _ = enter(rooms)
    clock.turns()
    assert rooms._rooms == {"main": new}


def test_a_million_names_leave_nothing_behind(log, rooms, clock):
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
    assert [rooms._rooms, rooms._missed, rooms._loads._waiting, rooms._recalls._waiting] == [{}] * 4
    assert clock.getDelayedCalls() == []


# Following


def test_messages_of_other_rooms_are_passed_over(log, rooms, clock):
    _, member, _ = enter(rooms)
    log.say(room="elsewhere")
    log.trim(2, room="elsewhere")
    clock.turns()
    assert member.writes == []
    assert told(enter(rooms)[2]) == (None, "abcd-0", 0)


def test_what_is_trimmed_is_shown_no_more(log, rooms):
    enter(rooms)
    log.say(5)
    log.trim(4)
    assert told(enter(rooms)[2]) == (None, "abcd-5", 2)


def test_a_post_goes_to_the_log_and_nowhere_else(log, rooms, clock):
    _, member, _ = enter(rooms)
    poster = object()
    rooms.post("main", Post("ann", "hi"), poster)
    clock.turns()
    assert log.posts == [("main", Post("ann", "hi"), poster)]
    assert member.writes == []


def test_the_epoch_is_that_of_the_log(log, rooms):
    assert rooms.epoch == "abcd"
    log.epoch = "efgh"
    assert rooms.epoch == "efgh"


def test_it_is_busy_while_some_member_has_more_to_get(log, rooms, clock):
    assert not rooms.busy
    enter(rooms)
    enter(rooms, name="elsewhere")
    clock.turns()
    assert not rooms.busy
    log.say()
    assert rooms.busy
    clock.turns()
    assert not rooms.busy


# Coming back


def test_what_the_tail_holds_is_not_read_for_who_comes_back(log, rooms):
    log.keep(5)
    enter(rooms)
    assert told(enter(rooms, last="abcd-2")[2]) == (True, "abcd-5", 3)
    assert len(log.reads) == 1


def test_who_missed_more_than_the_tail_holds_gets_it_from_the_log(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    _, member, history = enter(rooms, last="abcd-3")
    assert told(history) == (True, "abcd-8", 5)
    clock.turns()
    assert member.numbers == [9, 10, 11, 12]
    assert log.reads[:2] == [("main", None, 5), ("main", 3, 5)]


def test_the_log_is_read_once_for_many_who_come_back_with_the_same_id_at_once(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(50)]
    other = arrive(rooms, last="abcd-2")
    assert log.reads[1:] == [("main", 3, 5), ("main", 2, 5)]
    log.release()
    assert {told(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}
    assert told(other[0][2]) == (True, "abcd-7", 5)


def test_who_come_back_at_once_where_the_room_must_be_loaded_share_that_too(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(50)]
    log.answer()
    assert log.reads == [("main", None, 5), ("main", 3, 5)]
    log.answer()
    assert {told(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}


def test_a_log_that_is_ahead_of_the_room_knows_the_message_that_the_room_does_not(log, rooms, clock):
    enter(rooms)
    new = log.keep(3)
    _, ahead, history = enter(rooms, last="abcd-3")
    assert told(history) == (True, "abcd-3", 0)
    _, between, history = enter(rooms, last="abcd-1")
    assert told(history) == (True, "abcd-3", 2)
    log.follower.appended("main", new)
    log.say(2)
    clock.turns()
    assert [ahead.numbers, between.numbers] == [[4, 5], [4, 5]]


def test_a_message_that_the_log_does_not_know_either_is_of_the_future(log, rooms):
    enter(rooms)
    log.keep(3)
    _, _, history = enter(rooms, last="abcd-4")
    assert told(history) == (False, "abcd-0", 0)


@pytest.mark.parametrize("last", ["wxyz-3", "wxyz-99", "abcd-1"])
def test_the_log_is_not_read_for_who_has_missed_what_is_gone(log, clock, last):
    log.keep(20)
    log.first = 4
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    assert told(enter(rooms, last=last)[2]) == (False, "abcd-20", 5)
    assert len(log.reads) == 1


def test_the_log_is_not_read_for_who_has_missed_too_much(log, clock, monkeypatch):
    monkeypatch.setattr("chatd.room.MAX_LAG", 10)
    log.keep(20)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    assert told(enter(rooms, last="abcd-9")[2]) == (False, "abcd-20", 5)
    assert len(log.reads) == 1
    assert told(enter(rooms, last="abcd-10")[2]) == (True, "abcd-15", 5)


def test_what_is_trimmed_while_the_log_is_read_is_lost_for_who_comes_back(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    page = log.page(3, 5)
    log.trim(6)
    log.answer(page)
    assert told(arrived[0][2]) == (False, "abcd-12", 5)


def test_what_is_appended_while_the_log_is_read_for_who_comes_back_follows(log, clock, short_tail):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.say(3)
    log.release()
    ((_, member, history),) = arrived
    clock.turns(60)
    assert told(history) == (True, "abcd-8", 5)
    assert member.numbers == [*range(9, 16)]


def test_a_room_that_is_forgotten_while_the_log_is_read_is_loaded_again(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    log.held = True
    herd = [arrive(rooms, last="abcd-3") for _ in range(3)]
    log.answer()
    clock.turns()
    assert rooms._rooms == {}
    log.keep(2)
    log.answer()
    assert log.reads == [("main", None, 5), ("main", 3, 5), ("main", None, 5)]
    log.release()
    assert {told(history) for ((_, _, history),) in herd} == {(True, "abcd-8", 5)}
    ((room, member, _), *_) = [*herd[0]]
    assert rooms._rooms == {"main": room}
    log.say()
    clock.turns(60)
    assert member.numbers == [*range(9, 16)]


def test_a_log_that_is_down_fails_who_comes_back_and_the_next_try_is_a_new_one(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    log.held = True
    arrived = [arrive(rooms, last="abcd-3"), arrive(rooms, last="abcd-3")]
    log.fail()
    assert [failure.type for (failure,) in arrived] == [LogUnavailable, LogUnavailable]
    assert rooms._recalls._waiting == {}
    log.release()
    assert told(enter(rooms, last="abcd-3")[2]) == (True, "abcd-8", 5)


def test_a_log_that_goes_down_when_the_room_must_be_loaded_again_fails_who_comes_back(log, clock):
    log.keep(12)
    rooms = Rooms(log, clock, 5)
    log.held = True
    arrived = arrive(rooms, last="abcd-3")
    log.answer()
    clock.turns()
    log.answer()
    log.fail()
    assert arrived[0].type is LogUnavailable
    assert [rooms._rooms, rooms._missed, rooms._loads._waiting, rooms._recalls._waiting] == [{}] * 4


# Pages


def request(before=None, after=None, limit=3):
    before, after = (named if named is None else Id("abcd", named) for named in (before, after))
    return PageRequest(before, after, limit, None)


def page(rooms, asked):
    """The numbers on a page, its end, and whether there is more before and after it."""
    frames, end, older, newer = result_of(rooms.page("main", asked))
    texts = read_frames(b"".join(frames))
    numbers = [Id.parse(text["id"]).number for text in texts]
    assert [text["data"]["timestamp"] for text in texts] == [stamped(number) for number in numbers]
    return numbers, end, older, newer


def test_a_page_is_answered_from_the_tail_without_the_log(log, rooms):
    log.keep(9)
    enter(rooms)
    assert page(rooms, request()) == ([7, 8, 9], 9, True, False)
    assert page(rooms, request(before=7)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(after=0)) == ([1, 2, 3], 3, False, True)
    assert page(rooms, request(after=9)) == ([], 9, True, False)
    assert page(rooms, request(before=10)) == ([7, 8, 9], 9, True, False)
    assert len(log.reads) == 1


def test_a_page_that_goes_beyond_the_tail_is_read_from_the_log(log, clock):
    log.keep(9)
    rooms = Rooms(log, clock, 5)
    enter(rooms)
    assert page(rooms, request(before=8)) == ([5, 6, 7], 7, True, True)
    assert len(log.reads) == 1
    assert page(rooms, request(before=7)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(after=3)) == ([4, 5, 6], 6, True, True)
    assert page(rooms, request(limit=6)) == ([4, 5, 6, 7, 8, 9], 9, True, False)
    assert log.reads[1:] == [("main", 3, 3), ("main", 3, 3), ("main", None, 6)]


def test_a_page_of_a_room_that_nobody_is_in_is_read_from_the_log_and_loads_nothing(log, rooms, clock):
    log.keep(9)
    assert page(rooms, request(before=4)) == ([1, 2, 3], 3, False, True)
    assert rooms._rooms == {}
    assert clock.getDelayedCalls() == []


def test_a_page_of_a_room_that_never_was_is_empty(rooms):
    for asked in (request(), request(before=0), request(before=1), request(after=0)):
        assert page(rooms, asked) == ([], 0, False, False)


def test_a_page_waits_for_the_log(log, rooms):
    log.held = True
    log.keep(3)
    reading = rooms.page("main", request())
    assert not reading.called
    log.answer()
    assert result_of(reading).end == 3


def test_a_page_may_name_what_the_log_has_and_the_room_was_not_told_of_yet(log, rooms):
    enter(rooms)
    log.keep(3)
    assert page(rooms, request(after=1)) == ([2, 3], 3, True, False)
    assert page(rooms, request(before=3)) == ([1, 2], 2, False, True)


@pytest.mark.parametrize("someone", [True, False])
@pytest.mark.parametrize("asked", [request(before=11), request(after=10), request(after=10**15)])
def test_a_message_that_there_is_not_is_unknown(log, rooms, someone, asked):
    log.keep(9)
    if someone:
        enter(rooms)
    with pytest.raises(UnknownId):
        page(rooms, asked)


@pytest.mark.parametrize("named", ["before", "after"])
def test_a_message_of_another_epoch_is_unknown_and_the_log_is_not_read_for_it(log, rooms, named):
    log.keep(9)
    asked = request()._replace(**{named: Id("wxyz", 5)})
    with pytest.raises(UnknownId):
        page(rooms, asked)
    assert log.reads == []


def test_a_log_that_is_down_fails_the_page(log, rooms):
    log.held = True
    reading = rooms.page("main", request())
    log.fail()
    with pytest.raises(LogUnavailable):
        result_of(reading)


@st.composite
def kept(draw):
    """How much a log holds: its first and its head, and how many messages the tail of its room holds."""
    head = draw(st.integers(0, 30))
    return draw(st.integers(1, head + 1)), head, draw(st.integers(1, 40))


def two(held):
    """The same log twice: with someone in the room, and with nobody."""
    first, head, history = held
    filled, empty = ScriptedLog(head), ScriptedLog(head)
    filled.first = empty.first = first
    crowded = Rooms(filled, Turns(), history)
    enter(crowded)
    return crowded, Rooms(empty, Turns(), history)


@REPEATABLE
@given(kept(), st.integers(1, 9))
@example((4, 20, 5), 3)
def test_whoever_pages_backwards_gets_every_message_that_is_retained_once(held, limit):
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
def test_whoever_pages_forwards_gets_every_message_that_is_retained_once(held, limit):
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
def test_the_tail_and_the_log_answer_alike(held, named, number, limit):
    def answer(rooms):
        try:
            return page(rooms, request(**{named: number}, limit=limit))
        except UnknownId:
            return None

    crowded, empty = two(held)
    assert answer(crowded) == answer(empty)


@REPEATABLE
@given(kept(), st.integers(0, 33), st.integers(0, 9))
def test_whoever_comes_back_gets_exactly_what_was_missed_or_is_told_that_it_is_gone(held, number, later):
    first, head, history = held
    log, clock = ScriptedLog(head), Turns()
    log.first = first
    rooms = Rooms(log, clock, history)
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
