"""The client's half of the protocol, without a network."""

import base64
import json
from random import Random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE, result_of
from twisted.internet.defer import Deferred

from chatd.client.protocol import (
    LONGEST_WAIT,
    Ack,
    Backoff,
    ClientStopped,
    Cursor,
    Error,
    Event,
    History,
    Message,
    PendingRequests,
    Posted,
    ProtocolError,
    Rejected,
    parse_frame,
    seconds_to_renewal,
)
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import ack_frame, error_frame, history_frame, message_frame, presence_frame
from chatd.transport.framing import payload, take_texts, text_frame


def entry(number):
    return Entry(number, "ann", f"m{number}", "2026-01-01T00:00:00.000Z")


def message(number, epoch="abcd"):
    return Message(epoch, entry(number))


def history(end, count=0, *, resumed=None, epoch="abcd", label=None):
    return History(
        Id(epoch, end), [entry(end - count + 1 + place) for place in range(count)], resumed=resumed, label=label
    )


# Frames in a byte stream


@given(st.lists(st.sampled_from([0, 1, 125, 126, 65535, 65536]).map(lambda size: b"x" * size)), st.data())
@REPEATABLE
def test_take_whole_text_frames(texts, data):
    """Whole text frames are taken, and the rest of the stream is left."""
    stream = b"".join(map(text_frame, texts))
    cut = data.draw(st.integers(0, len(stream)))
    taken, rest, more = take_texts(stream[:cut])
    again, end, _ = take_texts(stream[rest:])
    assert more
    assert taken + again == texts
    assert rest + end == len(stream)


@pytest.mark.parametrize("other", [b"\x89\x00", b"\x88\x02\x03\xe8", b"\x01\x01x", b"\x81\x81aaaax", b"\xc1\x01x"])
def test_frame_that_is_not_text_is_left(other):
    """Control frames, fragments and masked frames are left to the WebSocket library."""
    first = text_frame(b"first")
    assert take_texts(first + other) == ([b"first"], len(first), False)


# Frames of the server


def test_parse_edits():
    """An entry names the edit that it is, and the newest edit that it carries the text of."""
    entries = [
        entry(6)._replace(replaced=8),
        entry(7)._replace(replaces=6, removed=True),
        entry(8)._replace(replaces=6),
    ]
    frames = [message_frame("abcd", one) for one in entries]
    assert [parse_frame(payload(frame)).entry for frame in frames] == entries
    assert parse_frame(payload(history_frame("abcd", 8, frames))).entries == entries


def test_parse_fields_of_the_operators_own():
    """An entry has them as a mapping, whatever their names are, and None without any."""
    extra = {"color": "red", "number": 7, "author": None, "": {"a": [1.5]}}
    entries = [entry(6)._replace(extra=extra), entry(7)]
    frames = [message_frame("abcd", one) for one in entries]
    assert [parse_frame(payload(frame)).entry for frame in frames] == entries
    assert parse_frame(payload(history_frame("abcd", 7, frames))).entries == entries


def test_parse_an_edit_outside_of_its_history():
    with pytest.raises(ProtocolError):
        parse_frame(b'{"type":"history","id":"abcd-1","removed":[9],"data":[]}')


def test_parse_every_frame_of_the_server():
    messages = [message_frame("abcd", entry(number)) for number in (6, 7)]
    assert parse_frame(payload(messages[0])) == message(6)
    page = parse_frame(payload(history_frame("abcd", 7, messages, more=True, label="h1")))
    assert page == History(Id("abcd", 7), [entry(6), entry(7)], more=True, label="h1")
    assert parse_frame(payload(history_frame("abcd", 0, [], resumed=False))) == history(0, resumed=False)
    assert parse_frame(payload(ack_frame(Id("abcd", 7), "l", duplicate=True))) == Ack(
        "l", Id("abcd", 7), duplicate=True
    )
    assert parse_frame(payload(ack_frame(Id("abcd", 7), "l", duplicate=False))) == Ack("l", Id("abcd", 7))
    assert parse_frame(payload(error_frame("no", Code.RATE_LIMITED, "l", 1.5))) == Error("no", "RATE_LIMITED", "l", 1.5)
    assert parse_frame(payload(error_frame("no"))) == Error("no")
    assert parse_frame(payload(presence_frame(1, users=["ann"]))) == Event("presence", {"count": 1, "users": ["ann"]})


def test_unknown_types_and_fields_are_accepted():
    """A newer server may send frames and fields that this client does not know."""
    assert parse_frame(b'{"type":"weather","sun":1}') == Event("weather", None)
    assert parse_frame(b'{"type":"ack","label":"l","id":"abcd-7","new":1}') == Ack("l", Id("abcd", 7))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"{}",
        b'{"type":"message"}',
        b'{"type":"message","id":"abcd","data":{}}',
        b'{"type":"message","id":"abcd-1","data":[]}',
        b'{"type":"history","id":"abcd-1","data":7}',
        b'{"type":"error","message":"m","retry_after":null}',
        b'{"type":[]}',
        b'"\xff"',
        b'{"type":"message","id":"abcd-1","data":{"username":1,"message":"hi","timestamp":"2026"}}',
        b'{"type":"message","id":"abcd-1","data":{"username":"ann","message":[],"timestamp":"2026"}}',
        b'{"type":"message","id":"abcd-1","data":{"username":"ann","message":"hi","timestamp":null}}',
    ],
)
def test_malformed_frame(text):
    with pytest.raises(ProtocolError, match="malformed frame: "):
        parse_frame(text)


# The cursor


def test_messages_follow_the_history():
    had = Cursor()
    assert had.last is None
    assert had.history(history(7, 3))
    had.message(message(8))
    assert had.last == Id("abcd", 8)


def test_second_connection_resumes():
    """The cursor of the first connection is the start of the second."""
    had = Cursor(Id("abcd", 7))
    assert not had.history(history(9, 2, resumed=True))
    had.message(message(10))
    had.connect()
    assert not had.history(history(10, resumed=True))
    assert had.last == Id("abcd", 10)


def test_history_that_does_not_resume_replaces_all():
    had = Cursor(Id("abcd", 7))
    assert had.history(history(2, 2, resumed=False, epoch="efgh"))
    had.connect()
    assert had.history(history(3, 1, epoch="efgh")), "of a server that says nothing of it"
    assert had.last == Id("efgh", 3)


def test_resumed_history_without_a_last_id():
    """It replaces all, because the client had nothing to resume from."""
    assert Cursor().history(history(9, 2, resumed=True))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (message(7), "abcd-7 arrived after abcd-7, again"),
        (message(3), "abcd-3 arrived after abcd-7, again"),
        (message(9), "abcd-9 arrived after abcd-7, instead of abcd-8"),
        (message(8, "efgh"), "efgh-8 arrived after abcd-7, which is from another log"),
    ],
)
def test_message_out_of_order_is_an_error(frame, words):
    had = Cursor()
    had.history(history(7))
    with pytest.raises(ProtocolError, match=words):
        had.message(frame)
    had.message(message(8))


@pytest.mark.parametrize(("end", "count"), [(9, 1), (9, 3), (8, 0), (6, 0)])
def test_resumed_history_with_a_gap_or_overlap(end, count):
    """It is a protocol error, and the cursor stays."""
    had = Cursor(Id("abcd", 7))
    with pytest.raises(ProtocolError):
        had.history(history(end, count, resumed=True))
    assert (had.last, had.greeted) == (Id("abcd", 7), False)


def test_connection_begins_with_one_history():
    had = Cursor()
    with pytest.raises(ProtocolError, match="abcd-1 arrived before the history"):
        had.message(message(1))
    had.history(history(0))
    for resumed in (None, True):
        with pytest.raises(ProtocolError, match="a second history frame, up to abcd-1"):
            had.history(history(1, 1, resumed=resumed))


@pytest.mark.parametrize(("end", "epoch"), [(2, "efgh"), (0, "efgh"), (9, "efgh"), (900, "abcd")])
def test_fresh_start_during_a_connection(end, epoch):
    """A history with resumed=false replaces all, at any time."""
    had = Cursor()
    had.history(history(7, 3))
    had.message(message(8))
    assert had.history(history(end, min(end, 2), resumed=False, epoch=epoch))
    assert (had.last, had.greeted) == (Id(epoch, end), True)
    with pytest.raises(ProtocolError, match=f"arrived after {epoch}-{end}"):
        had.message(message(9))
    had.message(message(end + 1, epoch))
    had.connect()
    assert not had.history(history(end + 1, resumed=True, epoch=epoch))


# Pending requests


class Said:
    """Pending requests, and the texts that they send."""

    def __init__(self, window=16):
        self.box = PendingRequests(window)
        self.now = 100.0
        self.answers = []

    def say(self, count=1):
        for _ in range(count):
            answer = Deferred()
            self.box.add({"message": len(self.answers)}, answer)
            answer.addErrback(lambda failure: failure.value)
            self.answers.append(answer)
        return self

    def sent(self):
        texts = [json.loads(text) for text in self.box.send(self.now)]
        if texts:
            self.labels = [text["label"] for text in texts]
        return [text["message"] for text in texts]

    def ack(self, label, number=7, *, duplicate=False):
        self.box.answer(Ack(label, Id("abcd", number), duplicate))

    def refuse(self, label, code, retry_after=0.0):
        return self.box.refuse(Error("no", code, label, retry_after), self.now)


def test_request_is_sent_once_and_answered():
    said = Said().say(2)
    assert said.sent() == [0, 1]
    assert said.sent() == []
    assert len(said.box) == 2
    said.ack(said.labels[1], 8, duplicate=True)
    assert result_of(said.answers[1]) == Posted(Id("abcd", 8), duplicate=True)
    said.ack(said.labels[1], 8)
    assert len(said.box) == 1
    assert not said.answers[0].called


def test_labels_are_valid_and_unique():
    """An ack with the label of another client answers nothing."""
    one, two = Said().say(2), Said().say(2)
    one.sent(), two.sent()
    assert len({*one.labels, *two.labels}) == 4
    assert all(1 <= len(label) <= 64 and label.isascii() and label.isprintable() for label in one.labels)
    two.ack(one.labels[0])
    two.ack("x.1")
    two.ack("")
    assert len(two.box) == 2


def test_answer_must_be_of_the_kind_of_its_request():
    """Otherwise the request stays, and the next connection repeats it."""
    box, post, read = PendingRequests(), Deferred(), Deferred()
    posting, reading = box.add({"message": "hi"}, post), box.add({"type": "history"}, read)
    texts = box.send(0.0)
    page = history(7, 2, label=reading)
    for wrong in (history(7, 2, label=posting), Ack(reading, Id("abcd", 7))):
        with pytest.raises(ProtocolError, match="answers a request of another kind"):
            box.answer(wrong)
    box.connect()
    assert box.send(0.0) == texts
    box.answer(page)
    assert result_of(read) == page


def test_reconnect_repeats_requests_in_order_with_their_labels():
    said = Said(2).say(4)
    assert said.sent() == [0, 1]
    first = said.labels
    said.refuse(first[0], "UNAVAILABLE")
    said.box.connect()
    assert said.sent() == [0], "as slowly as before"
    said.ack(said.labels[0])
    assert said.labels == first[:1]
    assert said.sent() == [1, 2]
    assert said.labels[0] == first[1]


def test_fresh_start_repeats_requests_with_their_labels():
    said = Said(2).say(4)
    said.sent()
    first = said.labels
    said.ack(first[0])
    said.box.repeat()
    assert said.sent() == [1, 2]
    assert said.labels[0] == first[1]
    said.ack(first[1])
    assert said.sent() == [3]


def test_repeat_waits_for_the_rate_limit():
    said = Said().say(2)
    said.sent()
    said.refuse(said.labels[0], "RATE_LIMITED", 5)
    said.box.repeat()
    assert (said.sent(), said.box.wait(said.now)) == ([], 5)
    said.now += 5
    assert said.sent() == [0]


def test_repeated_request_may_be_answered_twice():
    """The second answer is accepted and ignored."""
    said = Said().say(4)
    said.sent()
    labels = said.labels
    said.box.repeat()
    assert said.sent() == [0, 1, 2, 3]
    said.ack(labels[0], 8)
    said.ack(labels[0], 8, duplicate=True)
    assert result_of(said.answers[0]) == Posted(Id("abcd", 8))
    said.ack(labels[1], 9)
    assert said.refuse(labels[1], "RATE_LIMITED", 5)
    assert said.box.wait(said.now) is None, "it was not needed"
    assert said.refuse(labels[2], "UNAVAILABLE")
    said.ack(labels[2], 10)
    said.now += 1
    assert said.sent() == []
    assert said.box.wait(said.now) is None
    said.box.connect()
    assert not said.refuse(labels[1], "RATE_LIMITED", 5), "on another connection nothing is said twice"
    assert said.sent() == [3]


def test_window_limits_requests_in_flight():
    said = Said(2).say(3)
    assert said.sent() == [0, 1]
    assert said.box.wait(said.now) is None
    said.ack(said.labels[0])
    assert said.box.wait(said.now) == 0
    assert said.sent() == [2]
    assert said.box.wait(said.now) is None


def test_temporary_errors_are_retried_one_by_one():
    said = Said(4).say(6)
    assert said.sent() == [0, 1, 2, 3]
    labels = said.labels
    said.ack(labels[0])
    assert said.refuse(labels[2], "RATE_LIMITED", 0.5)
    assert said.refuse(labels[1], "RATE_LIMITED", 0.25)
    assert said.refuse(labels[3], "RATE_LIMITED", 0.25)
    assert said.refuse(labels[3], "RATE_LIMITED", 9), "said again by someone"
    assert said.sent() == []
    assert said.box.wait(said.now) == 0.5
    said.now += 0.5
    assert said.sent() == [1]
    assert said.labels == labels[1:2]
    said.ack(labels[1])
    assert said.sent() == [2, 3]
    said.refuse(labels[2], "UNAVAILABLE")
    said.refuse(labels[3], "UNAVAILABLE")
    assert said.box.wait(said.now) == 1.0


@pytest.mark.parametrize("code", [None, "LABEL_REUSED", "UNKNOWN_ID", "FORBIDDEN"])
def test_rejected_request_fails_alone(code):
    said = Said().say(2)
    said.sent()
    assert said.refuse(said.labels[0], code)
    error = result_of(said.answers[0])
    assert isinstance(error, Rejected)
    assert (str(error), error.code) == ("no", code)
    assert not said.answers[1].called
    assert not said.refuse(said.labels[0], code), "it has its answer"


@pytest.mark.parametrize("label", [None, "", "another", "x.1", "x.y"])
def test_error_that_answers_no_request(label):
    assert not Said().say().refuse(label, "RATE_LIMITED", 1)


def test_request_with_a_label_of_its_own():
    """It is answered under this label, also on a later connection."""
    said = Said()
    answers = [Deferred(), Deferred()]
    for answer, label in zip(answers, ("one", "two"), strict=True):
        said.box.add({"message": label}, answer, label)
    assert said.sent() == ["one", "two"]
    assert said.labels == ["one", "two"]
    said.ack("one")
    assert result_of(answers[0]) == Posted(Id("abcd", 7))
    said.box.connect()
    assert said.sent() == ["two"]
    said.ack("two", 8)
    assert result_of(answers[1]) == Posted(Id("abcd", 8))
    assert not said.refuse("one", "UNAVAILABLE")


def test_forgotten_request():
    """It is not sent, and an answer to it changes nothing; on the next connection nobody knows its label."""
    said = Said().say(2)
    said.sent()
    answer = Deferred()
    said.box.add({"message": "mine"}, answer, "mine")
    said.sent()
    said.box.forget("mine")
    said.box.forget("mine")
    said.box.forget("unknown")
    assert said.refuse("mine", "UNAVAILABLE")
    said.ack("mine")
    assert not answer.called
    said.box.connect()
    assert said.sent() == [0, 1]
    assert not said.refuse("mine", "UNAVAILABLE")


def test_stop_fails_all_requests():
    said = Said(1).say(2)
    said.sent()
    said.box.fail(ClientStopped("over"))
    assert [type(result_of(answer)) for answer in said.answers] == [ClientStopped, ClientStopped]
    assert (len(said.box), said.sent(), said.box.wait(0)) == (0, [], None)


# Backoff


def test_backoff_doubles_up_to_a_bound():
    chance = Random(7)
    spans = [1, 2, 4, 8, 16, 30, 30]
    backoff = Backoff(chance=Random(7))
    assert [backoff.next() for _ in spans] == [chance.random() * span for span in spans]
    backoff.reset()
    assert backoff.next() <= 1.0
    for _ in range(5000):
        assert backoff.next() <= 30


def test_backoff_takes_the_time_from_the_server():
    backoff = Backoff()
    assert backoff.next(0.7) == 0.7
    assert backoff.next(7) == 7


@pytest.mark.parametrize(
    ("left", "wait"),
    [
        (3600, 3540),
        (120, 60),
        (60, 30),
        (1, 1),
        (0.5, 1),
        (0, None),
        (-5, None),
        (10**9, LONGEST_WAIT),
        (1e308, LONGEST_WAIT),
    ],
)
def test_time_of_the_renewal(left, wait):
    """A token is renewed a minute before its expiry, or after half of a shorter time; a day is the longest wait."""
    claims = base64.urlsafe_b64encode(orjson.dumps({"exp": 1000 + left})).rstrip(b"=").decode()
    assert seconds_to_renewal(f"x.{claims}.y", 1000) == wait


@pytest.mark.parametrize(
    "token", ["", "secret", "a.!.c", "a.e30.c", "a.W10.c", "a.eyJleHAiOiJ4In0.c", "a.eyJleHAiOltdfQ.c"]
)
def test_token_without_a_time(token):
    """A token that the client cannot read is sent as it is, and never renewed."""
    assert seconds_to_renewal(token, 0) is None
