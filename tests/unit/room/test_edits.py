"""Edits and removals in a room: the tail, the histories and the pages show the newest text, and forget the old one."""

import pytest
from support.helpers import (
    EditedLog,
    Reader,
    Slow,
    arrive,
    count_held,
    enter,
    holds_text,
    result_of,
)
from support.websocket_frames import read_frames

from chatd.messages import REMOVED, Id, PageRequest
from chatd.room.log import UnknownId
from chatd.transport import frames

SECRET = "sesame"


@pytest.fixture
def log():
    return EditedLog()


def data(history):
    """Return the texts of a history, each of which is the only note beside it, if there is one."""
    assert all(one.get("note", one["message"]) == one["message"] for one in history["data"])
    return [one["message"] for one in history["data"]]


def page(rooms, *, after=None, limit=100):
    """Return the page that the registry answers with, as a history frame."""
    encoded = result_of(
        rooms.page("main", PageRequest(None, None if after is None else Id("abcd", after), limit, None))
    )
    (history,) = read_frames(frames.history_frame("abcd", encoded.end, encoded.frames))
    return history


@pytest.fixture
def remembers(log):
    """A function that returns whether a room holds the secret, outside of its log and its members."""
    return lambda room: holds_text(SECRET, room, log, *room.members)


# Edits


def test_edit_is_delivered_as_a_message(log, rooms, clock):
    """Members get the edit as the next frame, and what it replaces stays as they have it."""
    _, member, _ = enter(rooms)
    log.say(2, "old")
    clock.turns()
    log.edit(1)
    clock.turns()
    assert member.numbers == [1, 2, 3]
    assert [text["data"]["message"] for text in member.texts] == ["old", "old", "new"]
    assert [text.get("replaces") for text in member.texts] == [None, None, "abcd-1"]
    assert all("removed" not in text and "replaced" not in text for text in member.texts)


@pytest.mark.parametrize("loaded", [True, False])
def test_later_history_shows_the_newest_text(log, rooms, clock, loaded):
    """The tail and a freshly loaded room give the same history."""
    if loaded:
        enter(rooms)
        log.say(3, "old")
        log.edit(2)
        log.edit(2, "newest")
    else:
        log.keep(3, "old")
        log.follow(rooms)
        log.edit(2, notify=False)
        log.edit(2, "newest", notify=False)
    clock.turns()
    for history in (enter(rooms)[2], page(rooms)):
        assert data(history) == ["old", "newest", "old", "new", "newest"]
        assert history["replaced"] == {"2": "abcd-5"}
        assert history["replaces"] == {"4": "abcd-2", "5": "abcd-2"}
        assert "removed" not in history
    assert data(page(rooms, after=2, limit=1)) == ["old"]
    assert page(rooms, after=1, limit=1)["replaced"] == {"2": "abcd-5"}


def test_resume_gets_the_edits_after_the_cursor(log, rooms, clock):
    """A client that has the original gets the edit entry as it is."""
    log.keep(3, "old")
    log.edit(1, notify=False)
    _, _, history = enter(rooms, last="abcd-3")
    assert (history["resumed"], data(history), history["replaces"]) == (True, ["new"], {"4": "abcd-1"})
    assert "replaced" not in history


def test_member_behind_gets_the_newest_text_in_place(log, rooms, clock):
    """A member that has yet to get the original gets it with the text of its edit, and then the edit."""
    _, member, _ = enter(rooms, Reader(0))
    log.say(1, "old")
    clock.turns()
    member.held = b""  # nothing of the frame was sent
    member.cursor = 0
    log.edit(1)
    (room,) = rooms
    member.drain(room, None)
    clock.turns()
    assert [text["data"]["message"] for text in member.texts] == ["new", "new"]
    assert member.texts[0]["replaced"] == "abcd-2"


def test_edit_of_an_entry_that_the_tail_dropped(log, rooms, clock, short_tail):
    """The log answers for what the tail does not hold, and the room forgets which edits those were."""
    room, _, _ = enter(rooms)
    log.say(300)
    before = count_held(room, log, clock)
    for original in range(2, 299):
        log.edit(original)
    log.say(300)
    assert count_held(room, log, clock) <= before + 50
    log.edit(1, "newest")
    assert data(page(rooms, after=0, limit=1)) == ["newest"]


# Removals


def test_removal_erases_the_tail_and_the_histories(log, rooms, clock, remembers):
    """After a removal, nothing that the room holds has a text of the entry or of its edits."""
    room, _, _ = enter(rooms)
    log.say(1, SECRET)
    log.edit(1, f"{SECRET} 2")
    log.say(1, "stays")
    enter(rooms)
    enter(rooms, last="abcd-0")
    assert remembers(room)
    log.remove(1)
    assert not remembers(room)
    clock.turns()
    history = enter(rooms)[2]
    assert data(history) == [REMOVED, REMOVED, "stays", REMOVED]
    assert history["replaced"] == {"1": "abcd-4"}
    assert history["replaces"] == {"2": "abcd-1", "4": "abcd-1"}
    assert history["removed"] == [1, 2, 4]
    assert not remembers(room)


def test_removal_erases_edits_that_were_loaded(log, rooms, remembers):
    """A room knows the edits of the page that it was loaded from."""
    log.keep(1, SECRET)
    log.follow(rooms)
    log.edit(1, SECRET, notify=False)
    room, _, _ = enter(rooms)
    log.remove(1)
    assert not remembers(room)


def test_removal_in_the_middle_of_a_pass(log, rooms, clock):
    """The joined runs of a pass do not bring the text back."""
    members = [enter(rooms, Slow(clock))[1] for _ in range(2000)]
    log.say(1, SECRET)
    clock.turn()
    served = sum(bool(member.writes) for member in members)
    assert 0 < served < len(members)
    log.remove(1)
    clock.turns(500)
    assert all(member.numbers == [1, 2] for member in members)
    assert sum(SECRET in str(member.texts) for member in members) == served


# Reads that an edit overtakes


@pytest.fixture
def behind(log, rooms, clock, short_tail):
    """A member that waits for the log, in which its next entry is the secret; the read has not been answered."""
    _, member, _ = enter(rooms, Reader(0))
    log.say(1, "x")
    clock.turns()
    log.say(1, SECRET)
    log.edit(2, f"{SECRET} 2")
    log.say(300, "x")
    log.held = True
    (room,) = rooms
    member.drain(room, None)
    clock.turns()
    assert len(log.waiting) == 1
    return member


def test_refill_read_before_a_removal_is_read_again(log, rooms, clock, behind):
    after, limit, _ = log.waiting[0]
    old = log.page(after, limit)
    log.remove(2)
    log.answer(old)
    log.release()
    clock.turns(50)
    assert SECRET not in str(behind.texts)
    assert behind.numbers == [*range(1, 305)]


def test_removal_changes_a_refill(log, rooms, clock, behind, remembers):
    """Frames that were read for a member are changed before they are sent."""
    log.release()
    (room,) = rooms
    assert remembers(room)
    log.remove(2)
    assert not remembers(room)
    clock.turns(50)
    assert SECRET not in str(behind.texts)
    assert behind.numbers == [*range(1, 305)]


def test_edit_changes_a_refill(log, rooms, clock, behind):
    log.release()
    log.edit(2, "newest")
    clock.turns(50)
    assert [text["data"]["message"] for text in behind.texts][1:3] == ["newest", f"{SECRET} 2"]


def test_page_read_before_an_edit_is_read_again(log, rooms, clock, short_tail):
    """Nobody who has the edit gets an older text afterwards."""
    enter(rooms)
    log.say(1, SECRET)
    log.say(300)
    log.held = True
    reading = rooms.page("main", PageRequest(None, Id("abcd", 0), 1, None))
    after, limit, _ = log.waiting[0]
    old = log.page(after, limit)
    log.remove(1)
    log.answer(old)
    assert reading.paused
    log.answer()
    assert SECRET.encode() not in result_of(reading).frames[0]


@pytest.mark.parametrize("joined", [True, False])
def test_entries_read_before_an_edit_are_read_again(log, rooms, clock, joined):
    """Members of the room have the newer text; without members nobody has it yet."""
    if joined:
        enter(rooms)
    log.say(1, SECRET)
    log.held = True
    reading = rooms.read("main", Id("abcd", 0), 9)
    after, limit, _ = log.waiting[0]
    old = log.page(after, limit)
    log.remove(1)
    log.answer(old)
    assert bool(log.waiting) is joined
    if joined:
        log.answer()
    assert (SECRET in str(result_of(reading))) is not joined


@pytest.mark.parametrize("meanwhile", [True, False])
def test_entries_after_an_id_of_another_epoch(log, rooms, meanwhile):
    """The epoch may also change while the log is read."""
    log.say(1)
    log.held = True
    reading = rooms.read("main", Id("abcd" if meanwhile else "efgh", 0), 9)
    if meanwhile:
        log.epoch = "efgh"
        log.answer()
    assert not log.waiting
    with pytest.raises(UnknownId):
        result_of(reading)


def test_backlog_read_before_an_edit_is_read_again(log, rooms, clock, short_tail, remembers):
    room, _, _ = enter(rooms)
    log.say(1, SECRET)
    log.say(300)
    log.held = True
    arrived = arrive(rooms, last="abcd-0")
    after, limit, _ = log.waiting[0]
    old = log.page(after, limit)
    log.remove(1)
    log.answer(old)
    assert arrived == []
    log.answer()
    assert data(arrived[0][2])[0] == REMOVED
    assert not remembers(room)
