"""The meaning of frames, over a transport that is a string and a log that the test controls."""

import gc
import json
from collections import deque
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE, result_of
from support.stores import opened_store
from support.websocket_frames import read_frames
from twisted.internet.task import Clock
from twisted.logger import formatEvent

from chatd.messages import Id, Post
from chatd.room.log import InDoubt, LogUnavailable
from chatd.room.presence import EVENTS, ROUND_SECONDS
from chatd.room.registry import Registry
from chatd.transport import frames
from chatd.transport.admission import Rate
from chatd.transport.framing import CloseCode
from chatd.transport.intake import Intake
from chatd.transport.membership import GONE
from chatd.transport.session import LOG_SECONDS, MAX_REFUSALS, Session

PAGE = {"type": "history"}


class SessionClient:
    """A client whose transport is a string; other names are those of its session."""

    number = 0
    peer = "192.0.2.7:4321"

    def __init__(self, rooms, room="main", *, intake=None, events=frozenset(), name=None):
        self.intake = intake or Intake(Clock())
        self.sent = b""
        self.waiting = deque()
        self.reading = True
        self.ended = None
        self.renewals = 0
        self.session = Session(self, rooms, self.intake)
        self.session.events, self.session.name = events, name
        self.session.join(result_of(rooms.open(room)))

    def __getattr__(self, name):
        return getattr(self.session, name)

    # The transport

    def send_frame(self, frame):
        self.sent += frame
        if not self.session.ready:
            self.session.block()

    def write(self, data):
        self.sent += data
        return len(data)

    def stop_reading(self):
        self.reading = False

    def read_on(self):
        self.reading = True

    def read_frames(self):
        while self.waiting and not self.session.must_wait():
            self.session.received(self.waiting.popleft())

    def unread_texts(self):
        return iter([] if self.ended else self.waiting)

    def fail(self, code, reason):
        self.ended = code, reason
        self.session.leave()

    def ban(self, reason):
        self.fail(CloseCode.POLICY_VIOLATION, reason)

    def renewed(self):
        self.renewals += 1

    # The client

    def sends(self, *texts):
        self.waiting.extend(texts)
        self.read_frames()

    def says(self, *documents, **document):
        self.sends(*[json.dumps(said).encode() for said in documents or [document]])

    def posts(self, *messages, **more):
        for message in messages:
            self.says(username="ann", message=message, **more)

    def hears(self):
        """Return the frames sent since the last call."""
        frames, self.sent = read_frames(self.sent), b""
        return frames

    def stalls(self):
        self.session.ready = False

    def takes_one_answer(self):
        """Take the waiting frames, and be full again after the next answer."""
        pause = self.send_frame

        def send_frame(frame):
            self.session.ready = False
            pause(frame)

        self.send_frame = send_frame
        self.takes_again()
        del self.send_frame

    def takes_again(self):
        self.session.resume()


@pytest.fixture
def log():
    return opened_store()


@pytest.fixture
def rooms(log, clock):
    """Rooms that begin with one message, so that every longer page is read from the log."""
    return Registry(log, frames, clock, 1)


@pytest.fixture
def ann(rooms):
    return SessionClient(rooms)


@pytest.fixture
def bob(rooms):
    return SessionClient(rooms)


@pytest.fixture
def old(log):
    """Messages that no room has in memory."""

    class Anyone:
        def posted(self, post, number, *, duplicate=False):
            pass

    for number in range(1, 6):
        log.append("main", Post("old", str(number)), Anyone())


def kinds(frames):
    """Return a short form of each frame."""
    return [
        {
            "message": lambda data: data["data"]["message"],
            "history": lambda data: [entry["message"] for entry in data["data"]],
            "ack": lambda data: f"ack {data['label']}",
            "error": lambda data: data.get("code", data["message"]),
        }[frame["type"]](frame)
        for frame in frames
    ]


# Being there


def test_session_is_joined_from_its_join_to_its_leave(rooms, ann):
    assert ann.joined
    assert ann.session in ann.room.members
    ann.leave()
    assert not ann.joined
    assert ann.room is None
    assert len(rooms) == 0


def test_session_that_has_not_joined_is_not():
    session = Session(GONE, None, Intake(Clock()))
    assert not session.joined
    session.leave()


def test_leave_twice(log, ann):
    """Frames that arrive afterwards are ignored."""
    ann.leave()
    ann.leave()
    ann.posts("too late")
    assert log.messages == []
    assert ann.hears() == []


# Acknowledgements


def test_ack_follows_the_message(clock, ann, bob):
    """The poster alone gets the acknowledgement, after the message."""
    ann.posts("hi", label="c81f")
    assert ann.hears() == []
    clock.advance(0)
    message, ack = ann.hears()
    assert message["data"] == {"username": "ann", "message": "hi", "timestamp": "2026-01-01T00:00:00.000Z"}
    assert ack == {"type": "ack", "label": "c81f", "id": "k7Q2-1"}
    assert bob.hears() == [message]


def test_post_without_a_label_is_not_acknowledged(clock, ann):
    ann.posts("hi")
    clock.advance(0)
    assert kinds(ann.hears()) == ["hi"]


def test_label_is_never_sent_to_others(clock, rooms, ann, bob):
    ann.posts("hi", label="secret")
    clock.advance(0)
    bob.says(PAGE)
    newcomer = SessionClient(rooms)
    newcomer.says(PAGE)
    assert "secret" not in str([bob.hears(), newcomer.hears()])


def test_each_post_of_many_has_its_own_acknowledgement_in_order(clock, ann):
    for number in range(5):
        ann.posts(f"m{number}", label=f"l{number}")
    clock.advance(0)
    frames = ann.hears()
    assert kinds(frames) == [*(f"m{number}" for number in range(5)), *(f"ack l{number}" for number in range(5))]
    assert [frame["id"] for frame in frames[5:]] == [f"k7Q2-{number}" for number in range(1, 6)]


@pytest.mark.parametrize("label", ["!", "~" * 64, '"\\'])
def test_label_comes_back_as_it_was(clock, ann, label):
    ann.posts("hi", label=label)
    clock.advance(0)
    assert ann.hears()[1]["label"] == label


def test_retry_is_acknowledged_with_the_first_id(clock, log, ann, bob):
    ann.posts("hi", label="a")
    ann.posts("more")
    clock.advance(0)
    ann.hears(), bob.hears()
    ann.posts("hi", label="a")
    assert ann.hears() == [{"type": "ack", "label": "a", "id": "k7Q2-1", "duplicate": True}]
    clock.advance(0)
    assert log.messages == ["hi", "more"]
    assert (ann.hears(), bob.hears()) == ([], [])


def test_retry_over_another_connection_is_known_too(clock, log, ann, rooms):
    ann.posts("hi", label="a")
    ann.leave()
    again = SessionClient(rooms)
    again.posts("hi", label="a")
    assert again.hears() == [{"type": "ack", "label": "a", "id": "k7Q2-1", "duplicate": True}]
    assert log.messages == ["hi"]


def test_reused_label(clock, log, ann):
    """It is an error, and nothing is stored."""
    ann.posts("hi", label="a")
    clock.advance(0)
    ann.hears()
    ann.posts("ho", label="a")
    assert ann.hears() == [
        {
            "type": "error",
            "message": "The label was given to another message.",
            "code": "LABEL_REUSED",
            "label": "a",
        }
    ]
    assert log.messages == ["hi"]


def test_labels_are_of_one_user_in_one_room(clock, rooms, ann):
    other = SessionClient(rooms, "other")
    ann.says(username="ann", message="1", label="a")
    ann.says(username="bob", message="2", label="a")
    other.says(username="ann", message="3", label="a")
    clock.advance(0)
    assert kinds(ann.hears()) == ["1", "2", "ack a", "ack a"]
    assert kinds(other.hears()) == ["3", "ack a"]


def test_post_while_the_log_is_down(clock, log, ann, bob):
    """The error has the label, and the post may be sent again."""
    log.full = True
    ann.posts("hi", label="a")
    ann.posts("no label")
    error = {"type": "error", "message": "The message was not stored; try again.", "code": "UNAVAILABLE"}
    assert ann.hears() == [error | {"label": "a"}, error]
    log.full = False
    ann.posts("hi", label="a")
    clock.advance(0)
    assert kinds(ann.hears()) == ["hi", "ack a"]
    assert kinds(bob.hears()) == ["hi"]


def test_post_in_doubt_is_reported_with_its_label(ann, bob):
    ann.refused(Post("ann", "hi", "a"), InDoubt("the disk has not answered"))
    ann.refused(Post("ann", "hi"), InDoubt("the disk has not answered"))
    error = {
        "type": "error",
        "message": "The message may not have been stored; try again with the same label.",
        "code": "UNAVAILABLE",
    }
    assert ann.hears() == [error | {"label": "a"}, error]
    assert +ann.intake.refusals == {"UNAVAILABLE": 2}
    assert bob.hears() == []


def test_outcome_of_posts_after_leaving(ann):
    """A client that has left gets no answers."""
    ann.leave()
    ann.refused(Post("ann", "hi", "a"), InDoubt("late"))
    ann.posted(Post("ann", "hi", "a"), 1)
    ann.posted(Post("ann", "hi", "a"), 1, duplicate=True)
    ann.refused(Post("ann", "hi", "a"), LogUnavailable("late"))
    assert ann.hears() == []


def test_acks_of_a_full_transport_wait(clock, ann):
    """Acknowledgements wait with their messages, and the client is not read."""
    ann.stalls()
    ann.posts("1", label="a")
    assert not ann.reading
    ann.posts("2", label="b")
    clock.advance(0)
    assert ann.hears() == []
    ann.takes_again()
    assert ann.reading
    clock.advance(0)
    assert kinds(ann.hears()) == ["1", "2", "ack a", "ack b"]


def test_unread_answers_stop_the_reading(clock, log, ann):
    ann.stalls()
    ann.sends(b"nonsense")
    assert not ann.reading
    ann.posts("held")
    assert log.messages == []
    ann.takes_again()
    assert log.messages == ["held"]
    assert ann.reading


def test_full_transport_without_answers_is_read(log, ann):
    ann.stalls()
    ann.posts("hi")
    assert ann.reading
    assert log.messages == ["hi"]


def test_held_frames_until_the_next_waiting_answer(clock, log, ann):
    ann.stalls()
    ann.sends(b"nonsense")
    ann.posts("1")
    ann.sends(b"nonsense")
    ann.posts("2")
    ann.takes_one_answer()
    assert log.messages == ["1"]
    assert not ann.reading
    ann.takes_again()
    assert log.messages == ["1", "2"]
    assert ann.reading


# Pages


def test_page_from_memory_is_answered_at_once(clock, ann):
    ann.posts("1", "2")
    clock.advance(0)
    ann.hears()
    ann.says(type="history", limit=1, label="h1")
    assert ann.hears() == [
        {
            "type": "history",
            "id": "k7Q2-2",
            "more": True,
            "label": "h1",
            "data": [{"username": "ann", "message": "2", "timestamp": "2026-01-01T00:00:00.000Z"}],
        }
    ]
    assert ann.reading


@pytest.mark.parametrize(
    ("request_", "messages", "end", "more"),
    [
        ({}, "12345", 5, None),
        ({"limit": 2}, "45", 5, True),
        ({"before": "k7Q2-4"}, "123", 3, None),
        ({"before": "k7Q2-4", "limit": 2}, "23", 3, True),
        ({"before": "k7Q2-6", "limit": 100}, "12345", 5, None),
        ({"before": "k7Q2-1"}, "", 0, None),
        ({"before": "k7Q2-0"}, "", 0, None),
        ({"after": "k7Q2-0"}, "12345", 5, None),
        ({"after": "k7Q2-2", "limit": 2}, "34", 4, True),
        ({"after": "k7Q2-5"}, "", 5, None),
        ({"limit": 5.0}, "12345", 5, None),
    ],
)
@pytest.mark.usefixtures("old")
def test_page_has_the_requested_entries(ann, request_, messages, end, more):
    ann.says(PAGE | request_)
    (page,) = ann.hears()
    assert "".join(entry["message"] for entry in page["data"]) == messages
    assert (page["id"], page.get("more")) == (f"k7Q2-{end}", more)
    assert "label" not in page
    assert "resumed" not in page


def test_page_does_not_move_the_cursor(old, clock, ann, bob):
    ann.says(PAGE | {"before": "k7Q2-3"})
    assert ann.cursor == bob.cursor == 5
    bob.posts("6")
    clock.advance(0)
    assert kinds(ann.hears()) == [["1", "2"], "6"]


def test_label_of_a_page_is_no_key_of_a_post(old, clock, log, ann):
    for _ in range(2):
        ann.says(PAGE | {"label": "a"})
    ann.posts("hi", label="a")
    clock.advance(0)
    assert kinds(ann.hears()) == [[*"12345"], [*"12345"], "hi", "ack a"]


@pytest.mark.parametrize(
    "request_", [{"before": "p9Zx-1"}, {"after": "p9Zx-1"}, {"before": "k7Q2-7"}, {"after": "k7Q2-6"}]
)
def test_page_from_unknown_id(old, ann, request_):
    ann.says(PAGE | request_ | {"label": "h1"})
    assert ann.hears() == [
        {
            "type": "error",
            "message": "There is no message of this id.",
            "code": "UNKNOWN_ID",
            "label": "h1",
        }
    ]
    assert ann.reading


def test_page_while_the_log_is_down(old, log, ann, events):
    """It is an error with the label, and is logged."""
    log.slow = True
    ann.says(PAGE | {"label": "h1"})
    log.fail()
    assert ann.hears() == [
        {
            "type": "error",
            "message": "The log cannot be read now; try again.",
            "code": "UNAVAILABLE",
            "label": "h1",
        }
    ]
    assert ann.reading
    assert [event["log_format"].format(**event) for event in events if event["log_level"].name == "error"] == [
        "the log cannot be read: the disk is gone"
    ]
    ann.says(PAGE)
    log.answer()
    assert kinds(ann.hears()) == [[*"12345"]]


def test_unexpected_error_of_a_page_read(old, log, ann, events):
    """It is logged, and the session continues."""
    log.slow = True
    ann.says(PAGE)
    ann.posts("6")
    log.fail(ZeroDivisionError("a fault of ours"))
    gc.collect()
    assert {event["log_level"].name for event in events} == {"critical"}
    assert log.messages == [*"123456"]
    assert ann.reading


@pytest.fixture
def paging(old, log, ann):
    """A client that waits for a page."""
    log.slow = True
    ann.says(PAGE | {"label": "h1"})
    return ann


def test_while_a_page_is_fetched_nothing_more_is_read(log, paging):
    assert not paging.reading
    log.answer()
    assert paging.reading


def test_frames_behind_a_page_request_are_held(clock, log, paging, bob):
    """They are handled in order after the answer."""
    paging.posts("6", label="a")
    paging.sends(b"nonsense")
    paging.posts("7")
    assert paging.hears() == []
    assert log.messages == [*"12345"]
    log.answer()
    clock.advance(0)
    assert kinds(paging.hears()) == [[*"12345"], "Invalid JSON format.", "6", "7", "ack a"]
    assert log.messages == [*"1234567"]
    assert kinds(bob.hears()) == ["6", "7"]


def test_held_posts_are_stored_once(log, paging):
    paging.posts("6")
    log.answer()
    paging.posts("7")
    paging.leave()
    assert log.messages == [*"1234567"]


def test_several_pages_are_answered_in_order_one_at_a_time(log, paging):
    paging.says(PAGE | {"label": "h2", "limit": 1, "before": "k7Q2-3"}, {"type": "typing", "username": "ann"})
    paging.says(PAGE | {"label": "h3", "limit": 2})
    assert len(log.waiting) == 1
    log.answer()
    assert not paging.reading
    assert len(log.waiting) == 1
    log.answer()
    log.answer()
    assert [(frame["label"], [entry["message"] for entry in frame["data"]]) for frame in paging.hears()] == [
        ("h1", [*"12345"]),
        ("h2", ["2"]),
        ("h3", ["4", "5"]),
    ]
    assert paging.reading


def test_messages_of_others_still_come_while_a_page_is_fetched(clock, log, paging, rooms):
    log.slow = False
    SessionClient(rooms).posts("6")
    clock.advance(0)
    assert kinds(paging.hears()) == ["6"]
    log.answer()
    assert kinds(paging.hears()) == [[*"12345"]]


@pytest.mark.parametrize("outcome", ["answer", "fail"])
def test_leave_during_a_page_read(clock, log, paging, bob, outcome):
    """Held posts are stored once, and the client gets no answers."""
    paging.posts("6", label="a")
    paging.sends(b"nonsense")
    paging.says(PAGE, {"type": "typing", "username": "ann"})
    paging.posts("7")
    paging.leave()
    assert log.messages == [*"1234567"]
    getattr(log, outcome)()
    clock.advance(0)
    assert paging.hears() == []
    assert log.messages == [*"1234567"]
    assert kinds(bob.hears()) == ["6", "7"]


def test_leave_before_an_unknown_id_is_found(old, log, ann):
    log.slow = True
    ann.says(PAGE | {"after": "k7Q2-9"})
    ann.leave()
    log.answer()
    assert ann.hears() == []


def test_close_during_a_page_read(log, paging):
    """The client is read again, since it must answer the close."""
    paging.leave()
    log.answer()
    assert paging.reading


def test_held_frames_wait_for_the_answers(clock, log, paging):
    """Frames are held behind a page until the client reads its answers."""
    paging.stalls()
    paging.posts("6")
    log.answer()
    assert not paging.reading
    assert log.messages == [*"12345"]
    paging.takes_again()
    assert log.messages == [*"123456"]
    assert paging.reading


def test_held_frames_wait_for_the_page(log, paging):
    """Frames are held for the page after the client reads its answers again."""
    paging.stalls()
    paging.send_frame(b"")
    paging.posts("6")
    paging.takes_again()
    assert not paging.reading
    assert log.messages == [*"12345"]
    log.answer()
    assert log.messages == [*"123456"]
    assert paging.reading


def test_held_posts_after_invalid_utf_8(log, paging):
    """Nothing after a text that is not UTF-8 is posted."""
    paging.posts("6")
    paging.sends(b'{"username":"ann","message":"\xff"}')
    paging.posts("after the fault")
    log.answer()
    assert paging.ended
    assert log.messages == [*"123456"]


def test_leave_with_invalid_utf_8_held(log, paging):
    """Held posts before it are stored, and those after it are not."""
    paging.posts("6")
    paging.sends(b'{"username":"ann","message":"\xff"}')
    paging.posts("after the fault")
    paging.leave()
    assert log.messages == [*"123456"]


# Being sent elsewhere


def test_head_is_that_of_the_room(ann, bob, clock):
    assert (Session(GONE, None, Intake(Clock())).head, ann.head) == (0, 0)
    bob.posts("1", "2")
    assert (ann.head, ann.cursor) == (2, 0)
    ann.leave()
    assert ann.head == 0


def test_nothing_pending_outside_of_a_room(ann):
    ann.posts("1", label="a")
    assert ann.has_pending(1)
    ann.leave()
    assert not ann.has_pending(1)
    assert not Session(GONE, None, Intake(Clock())).has_pending(1)


def test_messages_are_owed_until_they_were_handed_over(clock, ann, bob):
    assert not bob.has_pending(0)
    ann.posts("1", "2")
    assert bob.has_pending(1)
    assert bob.has_pending(2)
    clock.advance(0)
    assert not bob.has_pending(2)
    assert bob.has_pending(3), "as if one more had come"


def test_acknowledgement_is_owed_until_it_was_sent(clock, ann):
    ann.posts("1", label="a")
    assert ann.has_pending(0), "whatever the number"
    clock.advance(0)
    assert kinds(ann.hears()) == ["1", "ack a"]
    assert not ann.has_pending(1)


@pytest.mark.parametrize("outcome", ["answer", "fail"])
def test_page_is_owed_until_it_was_answered(log, paging, outcome):
    paging.hears()
    assert paging.has_pending(paging.cursor)
    getattr(log, outcome)()
    assert len(paging.hears()) == 1
    assert not paging.has_pending(paging.cursor)


def test_what_came_with_a_page_and_waits_is_owed_its_answers_too(clock, log, paging):
    paging.stalls()
    paging.send_frame(b"")  # so that its answers are not read
    paging.posts("6", label="a")
    log.answer()
    assert paging.has_pending(paging.cursor)
    paging.takes_again()
    assert log.messages == [*"123456"]
    clock.advance(0)
    assert kinds(paging.hears()) == [[*"12345"], "6", "ack a"]
    assert not paging.has_pending(6)


def test_log_owes_an_answer_to_pages_and_held_posts(clock, log, paging):
    """A post that was held while the log read a page is in flight once the page is answered, labelled or not."""
    paging.hears()
    paging.posts("6")
    log.held = True
    assert paging.awaits_log
    log.answer()
    assert paging.awaits_log
    log.release()
    assert not paging.awaits_log
    assert paging.has_pending(paging.head)
    clock.advance(0)
    assert not paging.has_pending(paging.head)


def test_log_owes_nothing_after_a_refusal_or_outside_of_a_room(log, ann):
    log.held = True
    ann.posts("1", "2", label="a")
    log.fail()
    assert ann.awaits_log
    log.fail()
    assert not ann.awaits_log
    ann.posts("3")
    ann.leave()
    assert not ann.awaits_log


def test_pending_while_the_transport_is_full(clock, ann, bob):
    assert not bob.has_pending(0)
    ann.stalls()
    ann.posts("1", label="a")
    bob.stalls()
    clock.advance(0)
    assert ann.hears() == []
    assert ann.has_pending(1)
    assert bob.has_pending(1)
    ann.takes_again()
    assert ann.has_pending(1)
    clock.advance(0)
    assert kinds(ann.hears()) == ["1", "ack a"]
    assert not ann.has_pending(1)
    assert bob.has_pending(1)
    bob.leave()
    assert not bob.has_pending(1)


def test_nothing_pending_after_everything_was_sent(clock, ann):
    ann.posts("1", label="a")
    clock.advance(0)
    ann.stalls()
    assert not ann.has_pending(1)


def test_finished_session_is_not_read(clock, ann):
    ann.finish()
    assert not ann.reading
    ann.stalls()
    ann.send_frame(b"")
    ann.takes_again()
    assert not ann.reading


@pytest.mark.parametrize("outcome", ["answer", "fail"])
def test_finish_during_a_page_read(clock, log, paging, outcome):
    """The client gets the page, and its held posts are stored."""
    paging.posts("6", label="a")
    paging.finish()
    getattr(log, outcome)()
    clock.advance(0)
    assert not paging.reading
    assert kinds(paging.hears())[1:] == ["6", "ack a"]
    assert log.messages == [*"123456"]


# Refused frames


ID_PATTERN = "/^[0-9A-Za-z]{4,16}-(0|[1-9][0-9]{0,15})$/"


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"message": "hi"}, '"username" is required'),
        ({"username": "ann"}, '"message" is required'),
        ({"username": 1, "message": "hi"}, '"username" must be a string'),
        ({"username": "ann", "message": ["hi"]}, '"message" must be a string'),
        ({"username": "", "message": "hi"}, '"username" is not allowed to be empty'),
        (
            {"username": 31 * "a", "message": "hi"},
            '"username" length must be less than or equal to 30 characters long',
        ),
        (
            {"username": "ann", "message": 501 * "a"},
            '"message" length must be less than or equal to 500 characters long',
        ),
        ({"username": "ann", "message": "hi", "label": 1}, '"label" must be a string'),
        ({"username": "ann", "message": "hi", "label": None}, '"label" must be a string'),
        ({"username": "ann", "message": "hi", "label": {"a": 1}}, '"label" must be a string'),
        ({"username": "ann", "message": "hi", "label": ""}, '"label" is not allowed to be empty'),
        (
            {"username": "ann", "message": "hi", "label": 65 * "a"},
            '"label" length must be less than or equal to 64 characters long',
        ),
        *(
            (
                {"username": "ann", "message": "hi", "label": label},
                '"label" fails to match the required pattern: /^[!-~]*$/',
            )
            for label in ("a b", "ж", "a\n", "\x7f", "\0")
        ),
        ({"username": "ann", "message": "hi", "before": "k7Q2-1"}, '"before" is not allowed'),
        ({"username": "ann", "message": "hi", "extra": 1}, '"extra" is not allowed'),
        *(
            ({"type": kind}, '"type" must be one of [history, remove, token, typing]')
            for kind in ("x", "", 1, None, [], "message")
        ),
        *(
            (PAGE | {name: value}, f'"{name}" {words}')
            for name in ("before", "after")
            for value, words in (
                (1, "must be a string"),
                (None, "must be a string"),
                (["k7Q2-1"], "must be a string"),
                ("", f"fails to match the required pattern: {ID_PATTERN}"),
                ("1042", f"fails to match the required pattern: {ID_PATTERN}"),
                ("k7Q2-01", f"fails to match the required pattern: {ID_PATTERN}"),
                ("k7Q2--1", f"fails to match the required pattern: {ID_PATTERN}"),
                ("k7Q2-1\n", f"fails to match the required pattern: {ID_PATTERN}"),
                ("k7Q2-" + 17 * "9", f"fails to match the required pattern: {ID_PATTERN}"),
            )
        ),
        *((PAGE | {"limit": limit}, '"limit" must be greater than or equal to 1') for limit in (0, -1, -(10**30))),
        *((PAGE | {"limit": limit}, '"limit" must be less than or equal to 100') for limit in (101, 10**18, 10**30)),
        *((PAGE | {"limit": limit}, '"limit" must be an integer') for limit in ("50", 1.5, True, None, [50], {})),
        (
            PAGE | {"before": "k7Q2-1", "after": "k7Q2-1"},
            '"value" contains a conflict between optional exclusive peers [before, after]',
        ),
        (PAGE | {"label": 1}, '"label" must be a string'),
        (PAGE | {"username": "ann"}, '"username" is not allowed'),
        (PAGE | {"extra": 1}, '"extra" is not allowed'),
        ({"type": "typing"}, '"username" is required'),
        ({"type": "typing", "username": 1}, '"username" must be a string'),
        ({"type": "typing", "username": ""}, '"username" is not allowed to be empty'),
        (
            {"type": "typing", "username": 31 * "a"},
            '"username" length must be less than or equal to 30 characters long',
        ),
        ({"type": "typing", "username": "ann", "message": "hi"}, '"message" is not allowed'),
        *((document, '"value" must be of type object') for document in ([], "hi", 1, None, [{"username": "ann"}])),
    ],
)
def test_refused_frame(clock, ann, bob, document, fault):
    """It is answered with the fault and changes nothing."""
    ann.says(document)
    assert ann.hears() == [{"type": "error", "message": f"Validation error: {fault}"}]
    assert ann.reading
    ann.posts("hi", label="a")
    clock.advance(0)
    assert kinds(ann.hears()) == ["hi", "ack a"]
    assert kinds(bob.hears()) == ["hi"]


@pytest.mark.parametrize(
    "text", [b"", b"nonsense", b"{", b'{"a":NaN}', b'{"limit":1e400}', b'{"a":"\\ud800"}', b"\x00"]
)
def test_what_is_no_json_is_answered_and_changes_nothing(log, ann, text):
    ann.sends(text)
    hint = 'Send a JSON object such as {"username":"ann","message":"hi"}'
    assert ann.hears() == [{"type": "error", "message": "Invalid JSON format.", "hint": hint}]
    assert ann.joined
    assert log.messages == []


@pytest.mark.parametrize(
    ("document", "label"),
    [
        ({"username": "ann", "label": "c82"}, "c82"),
        (PAGE | {"limit": 0, "label": "c82"}, "c82"),
        ({"type": "typing", "label": "c82"}, "c82"),
        ({"type": "x", "label": "c82"}, "c82"),
        ({"username": "ann", "message": "hi", "extra": 1, "label": "c82"}, "c82"),
        ({"username": "ann", "label": ""}, None),
        ({"username": "ann", "label": 65 * "a"}, None),
        ({"username": "ann", "label": "a b"}, None),
        ({"username": "ann", "label": 1}, None),
    ],
)
def test_error_echoes_a_label_that_is_well_formed(ann, document, label):
    ann.says(document)
    (error,) = ann.hears()
    assert error.get("label") == label


def test_invalid_utf_8(log, ann):
    """It ends the connection and is not answered."""
    ann.sends(b'{"username":"ann","message":"\xff"}')
    assert ann.ended
    ann.posts("too late")
    assert ann.hears() == []
    assert log.messages == []


def test_invalid_frame_is_logged_without_its_text(ann, events):
    ann.says(username="ann", secret="tell nobody")
    assert [event["log_format"].format(**event) for event in events] == [
        "#0 192.0.2.7:4321 in main sent an invalid frame"
    ]
    assert "tell nobody" not in str(events)


# Presence and typing


def typing(frames):
    return [frame["data"]["users"] for frame in frames if frame["type"] == "typing"]


def present(frames):
    return [frame["data"] for frame in frames if frame["type"] == "presence"]


def test_no_events_without_asking(clock, rooms, ann):
    watcher = SessionClient(rooms, events=EVENTS)
    ann.says(type="typing", username="ann")
    ann.posts("hi")
    SessionClient(rooms).leave()
    clock.pump([0, ROUND_SECONDS, ROUND_SECONDS])
    assert kinds(ann.hears()) == ["hi"]
    assert {frame["type"] for frame in watcher.hears()} == {"message", "presence", "typing"}


def test_typing_reaches_watchers_and_is_not_stored(clock, log, rooms, ann):
    watcher = SessionClient(rooms, events=frozenset({"typing"}))
    ann.says(type="typing", username="ann")
    clock.advance(0)
    assert watcher.hears() == [{"type": "typing", "data": {"users": ["ann"]}}]
    assert ann.hears() == []
    assert log.messages == []


def test_typing_does_not_change_the_name(clock, rooms, ann):
    watcher = SessionClient(rooms, events=EVENTS, name="watcher")
    ann.says(type="typing", username="someone")
    clock.advance(0)
    assert present(watcher.hears()) == [{"count": 2, "users": ["watcher"]}]


def test_name_of_a_member(clock, rooms):
    """A member has the name of its last post, and until then that of its request."""
    watcher = SessionClient(rooms, events=frozenset({"presence"}))
    someone = SessionClient(rooms, name="someone")
    clock.advance(0)
    assert present(watcher.hears()) == [{"count": 2, "users": ["someone"]}]
    for message in "123":
        someone.posts(message)  # as ann
    clock.advance(ROUND_SECONDS)
    assert present(watcher.hears()) == [{"count": 2, "join": ["ann"], "leave": ["someone"]}]
    someone.posts("again")
    clock.advance(ROUND_SECONDS)
    assert present(watcher.hears()) == []
    someone.leave()
    clock.advance(ROUND_SECONDS)
    assert present(watcher.hears()) == [{"count": 1, "join": [], "leave": ["ann"]}]


def test_refused_frame_gives_no_name(clock, rooms, ann):
    ann.says(username="nobody")
    ann.says(username="nobody", message="")
    assert ann.name is None


# The rate limit


@pytest.fixture
def hasty(rooms, clock):
    """A client that may send three frames at once, and two a second."""
    return SessionClient(rooms, intake=Intake(clock, Rate(2, 3, clock.seconds)))


LIMITED = {"type": "error", "message": "Rate limit exceeded", "code": "RATE_LIMITED"}


def test_burst_goes_through_and_then_one_each_half_second(clock, log, hasty):
    hasty.posts(*"1234")
    assert log.messages == [*"123"]
    assert hasty.hears() == [LIMITED | {"retry_after": 0.5}]
    clock.advance(0.5)
    hasty.hears()
    hasty.posts("5", "6")
    assert log.messages == [*"1235"]
    assert [frame["retry_after"] for frame in hasty.hears()] == [0.5]


def test_rate_is_per_connection(rooms, clock, log):
    intake = Intake(clock, Rate(1, 2, clock.seconds))
    for _ in range(2):
        SessionClient(rooms, intake=intake).posts("1", "2", "3")
    assert log.messages == ["1", "2"] * 2


def test_limited_post_echoes_its_label(clock, log, hasty):
    """The post may be sent again with its label."""
    hasty.posts(*"123")
    hasty.posts("4", label="a")
    assert hasty.hears() == [LIMITED | {"label": "a", "retry_after": 0.5}]
    clock.advance(0.5)
    hasty.hears()
    hasty.posts("4", label="a")
    clock.advance(0)
    assert kinds(hasty.hears()) == ["4", "ack a"]
    assert log.messages == [*"1234"]


@pytest.mark.parametrize(
    "costly",
    [
        {"username": "ann", "message": "hi", "label": "a"},
        {"username": "ann"},
        PAGE,
        PAGE | {"before": "p9Zx-1"},
        {"type": "typing", "username": "ann"},
        {"type": "x"},
        [],
    ],
    ids=["retries", "refused", "pages", "unknown-ids", "typing", "unknown", "lists"],
)
def test_every_frame_costs_one(clock, log, hasty, costly):
    hasty.says(costly, costly, costly)
    clock.advance(0)
    hasty.hears()
    hasty.posts("too many")
    assert kinds(hasty.hears()) == ["RATE_LIMITED"]
    assert "too many" not in log.messages


def test_what_is_no_json_costs_one_too_and_is_limited(hasty):
    for _ in range(4):
        hasty.sends(b"nonsense")
    assert kinds(hasty.hears()) == ["Invalid JSON format."] * 3 + ["RATE_LIMITED"]


@pytest.mark.parametrize(
    "document",
    [
        {"username": "ann", "label": "c82"},
        {"username": "ann", "message": "hi", "label": "c82"},
        PAGE | {"label": "c82"},
        PAGE | {"limit": 0, "label": "c82"},
    ],
)
def test_refused_frame_above_the_rate(hasty, monkeypatch, document):
    """It is answered with the rate limit and its label, and its fault is not looked for."""
    monkeypatch.setattr(frames.Form, "explain", None)
    hasty.posts(*"123")
    hasty.says(document)
    assert hasty.hears() == [LIMITED | {"label": "c82", "retry_after": 0.5}]


def test_client_above_the_rate_is_not_read(clock, log, hasty):
    """One frame is refused; those behind it wait until the rate allows the next one."""
    hasty.posts(*"123456")
    assert log.messages == [*"123"]
    assert not hasty.reading
    clock.advance(0.4)
    assert kinds(hasty.hears()) == ["RATE_LIMITED", *"123"]
    assert not hasty.reading
    clock.advance(0.1)
    assert log.messages == [*"1235"]
    assert not hasty.reading
    clock.advance(0.5)
    assert hasty.reading
    assert kinds(hasty.hears()) == ["RATE_LIMITED", "5"]
    assert hasty.intake.throttles["websocket"] == 2


def test_client_above_the_rate_leaves(clock, log, hasty):
    """Its posts that wait are not stored, and nothing happens when the rate would allow them."""
    hasty.posts(*"123456")
    hasty.session.detach()
    clock.advance(1)
    assert log.messages == [*"123"]


def test_drain_while_a_client_is_above_the_rate(clock, log, hasty):
    """The frames that have arrived are pending, and are answered; nothing more is read."""
    hasty.posts(*"12345")
    hasty.finish()
    assert hasty.has_pending(0)
    clock.advance(0.5)
    assert log.messages == [*"1235"]
    assert not hasty.has_pending(0)
    assert not hasty.reading
    hasty.read_again()
    assert hasty.reading


def test_refused_frames_in_a_row_end_the_connection(ann):
    """The last one is not answered, and nothing behind it is read."""
    ann.says(*[{}] * (MAX_REFUSALS - 1))
    assert len(ann.hears()) == MAX_REFUSALS - 1
    assert not ann.ended
    ann.says({})
    assert ann.ended == (1008, "100 frames in a row were rejected")
    assert ann.hears() == []
    assert ann.intake.refusals["schema"] == MAX_REFUSALS
    ann.posts("too late")
    assert ann.hears() == []


def test_refusals_above_the_rate_count_too(clock, hasty):
    """Refusals of both kinds in a row end the connection."""
    hasty.says(*[{}] * MAX_REFUSALS)
    clock.pump([0.5] * (MAX_REFUSALS // 2))
    assert hasty.ended == (1008, "100 frames in a row were rejected")
    counted = hasty.intake.refusals
    assert counted["schema"] + counted["RATE_LIMITED"] == MAX_REFUSALS
    assert len(hasty.hears()) == MAX_REFUSALS - 1


def test_accepted_frame_ends_a_row_of_refusals(log, ann):
    for _ in range(3):
        ann.says(*[{}] * (MAX_REFUSALS - 1))
        ann.posts("hi")
    assert not ann.ended
    assert len(log.messages) == 3


def test_posts_above_the_rate_never_end_the_connection(clock, log, hasty):
    """Every second one is accepted, so the refusals are not in a row."""
    hasty.posts(*["hi"] * 3 * MAX_REFUSALS)
    clock.pump([0.5] * 2 * MAX_REFUSALS)
    assert not hasty.ended
    assert hasty.intake.refusals["RATE_LIMITED"] > MAX_REFUSALS
    assert len(log.messages) + hasty.intake.refusals["RATE_LIMITED"] == 3 * MAX_REFUSALS


def test_refusals_are_logged_once_a_minute(clock, hasty, events):
    """The log of a flood does not grow with the number of its frames."""
    hasty.says(*[{}] * 5)
    clock.pump([1] * (LOG_SECONDS - 1))
    hasty.says({}, {})
    assert [formatEvent(event) for event in events] == ["#0 192.0.2.7:4321 in main sent an invalid frame"]
    clock.advance(1)
    hasty.posts(*"1234")
    assert [formatEvent(event) for event in events[1:]] == ["#0 192.0.2.7:4321 in main exceeds the rate"]


def test_invalid_utf_8_above_the_rate(hasty):
    hasty.posts(*"123")
    hasty.sends(b"\xff")
    assert hasty.ended
    assert hasty.hears() == []


def test_typing_too_often_is_dropped_without_a_word(clock, rooms, hasty):
    watcher = SessionClient(rooms, events=frozenset({"typing"}))
    hasty.posts(*"123")
    hasty.says(type="typing", username="ann")
    assert hasty.hears() == []
    clock.advance(0)
    assert typing(watcher.hears()) == []


def test_limited_post_gives_no_name(hasty):
    hasty.says(*[{"username": "ann", "message": "hi"}] * 3, {"username": "bob", "message": "hi"})
    assert hasty.name == "ann"


def test_what_was_held_costs_as_much(old, clock, log, hasty):
    log.slow = True
    hasty.says(PAGE)
    hasty.posts(*"6789")
    log.answer()
    assert log.messages == [*"1234567"]
    assert kinds(hasty.hears()) == [[*"12345"], "RATE_LIMITED"]
    clock.advance(0.5)
    assert log.messages == [*"12345679"]


def test_rate_applies_to_held_posts_of_a_leaver(old, clock, log, hasty):
    log.slow = True
    hasty.says(PAGE)
    hasty.posts(*"6789")
    hasty.leave()
    assert log.messages == [*"1234567"]


@REPEATABLE
@given(a_second=st.integers(1, 1000), pause=st.floats(0, 1))
def test_retry_after_is_exact(a_second, pause):
    """A client that waits for retry_after is served, and less is too little."""
    clock, log = Clock(), opened_store()
    intake = Intake(clock, Rate(a_second, 1, clock.seconds))
    person = SessionClient(Registry(log, frames, clock, 1), intake=intake)
    person.posts("1")
    clock.advance(min(pause, 0.99) / a_second)
    person.sent = b""
    person.posts("2")
    (error,) = person.hears()
    assert error["retry_after"] <= ceil(1000 / a_second) / 1000 + 0.001
    clock.advance(error["retry_after"])
    person.posts("3")
    assert log.messages == ["1", "3"]


def test_without_a_rate_there_is_no_limit(log, ann):
    ann.posts(*["hi"] * 500)
    assert len(log.messages) == 500


def test_id_in_an_acknowledgement_can_be_paged_from(clock, ann):
    ann.posts("hi", label="a")
    ann.posts("ho")
    clock.advance(0)
    named = Id.parse(ann.hears()[-1]["id"])
    ann.says(PAGE | {"after": str(named)})
    assert kinds(ann.hears()) == [["ho"]]
