"""The client in many rooms over one connection in memory, with the test at its other end."""

import pytest
from support.helpers import Longest, result_of
from support.server_ends import Endpoint
from support.tokens import token
from support.watches import Watch
from twisted.internet.task import Clock

from chatd.client import Backoff, ClientStopped, Entry, Id, Posted, Rejected, SharedClient
from chatd.client.protocol import JOIN_LABEL, LEAVE_LABEL, RENEWAL_LABEL
from chatd.messages import Code
from chatd.transport.frames import (
    ack_frame,
    addressed,
    error_frame,
    history_frame,
    labelled,
    left_frame,
    message_frame,
    presence_frame,
    token_frame,
)

LEAVE = {"type": "leave", "room": "a", "label": LEAVE_LABEL}


def message(number):
    return message_frame("abcd", Entry(number, "ann", f"m{number}", "2026-01-01T00:00:00.000Z"))


class Table:
    """A client in the rooms `a` and `b`, with its clock and its endpoint."""

    def __init__(self, *rooms, **options):
        self.clock = Clock()
        self.endpoint = Endpoint()
        backoff = Backoff(chance=Longest())
        self.client = SharedClient(
            self.clock, "ws://h:8085/connect", endpoint=self.endpoint, backoff=backoff, **options
        )
        self.watches, self.rooms = {}, {}
        for room in rooms or "ab":
            self.join(room)
        self.client.start()

    def join(self, room, **options):
        self.watches[room] = Watch()
        self.rooms[room] = self.client.join(room, self.watches[room], **options)
        return self.rooms[room]

    def connect(self):
        """Accept a connection."""
        self.wire = self.endpoint.accept()
        self.wire.answer()
        return self.wire

    def say(self, room, *frames):
        self.wire.say(b"".join(map(addressed(room), frames)))

    def greet(self, room, number=0, **said):
        """Answer a join."""
        self.say(room, labelled(history_frame("abcd", number, [], **said), JOIN_LABEL))

    def ready(self):
        """Accept a connection, and the joins of its rooms."""
        self.connect()
        joins = self.wire.said()
        for room in self.rooms:
            self.greet(room)
        return joins


def join(room, **more):
    return {"type": "join", "room": room, "label": JOIN_LABEL, **more}


def test_each_room_is_joined_and_resumed():
    """A new connection continues each room after its own last id."""
    table = Table()
    assert table.connect().said() == [join("a"), join("b")]
    table.greet("a", 5)
    table.greet("b", 7)
    table.say("a", message(6), message(7))
    table.say("b", presence_frame(1))
    assert table.watches["a"].kinds() == ["on_history", "on_connect", "on_entries", "on_entries"]
    assert table.watches["b"].kinds() == ["on_history", "on_connect", "on_event"]
    table.wire.end()
    assert table.watches["a"].kinds()[-1] == table.watches["b"].kinds()[-1] == "on_disconnect"
    table.clock.advance(1)
    assert table.connect().said() == [join("a", last_event_id="abcd-7"), join("b", last_event_id="abcd-7")]
    table.greet("a", 7, resumed=True)
    table.say("a", message(8))
    assert table.watches["a"].numbers == [6, 7, 8]
    assert table.rooms["a"].last == Id("abcd", 8)


def test_join_while_connected():
    table = Table("a")
    assert table.client.address.path == "/connect"
    table.ready()
    table.join("c", last=Id("abcd", 3), events=["typing", "presence"], username="ann")
    asked = join("c", last_event_id="abcd-3", events=["presence", "typing"], username="ann")
    assert table.wire.said() == [asked]
    with pytest.raises(ValueError, match="is in the room 'c'"):
        table.client.join("c", Watch())


def test_requests_name_their_room():
    """Each room has its own requests, and repeats them on the next connection."""
    table = Table()
    posted, page = table.rooms["a"].post("ann", "hi"), table.rooms["b"].page(limit=1)
    table.ready()
    one, two = said = table.wire.said()
    assert one == {"room": "a", "username": "ann", "message": "hi", "label": one["label"]}
    assert two == {"room": "b", "type": "history", "limit": 1, "label": two["label"]}
    table.say("b", history_frame("abcd", 0, [], label=two["label"]))
    assert result_of(page).end == Id("abcd", 0)
    table.wire.end()
    table.clock.advance(1)
    table.connect().said()
    table.greet("a", resumed=True)
    assert table.wire.said() == said[:1]
    table.say("a", ack_frame(Id("abcd", 7), one["label"], duplicate=True))
    assert result_of(posted) == Posted(Id("abcd", 7), duplicate=True)


def test_leave():
    """The client drops the frames that still arrive, and can join the room again afterwards."""
    table = Table()
    table.ready()
    posted = table.rooms["a"].post("ann", "hi")
    table.wire.said()
    left = table.rooms["a"].leave()
    assert table.rooms["a"].leave() is left
    with pytest.raises(ClientStopped):
        result_of(posted)
    assert table.wire.said() == [LEAVE]
    table.say("a", message(1))
    assert not left.called
    table.say("a", left_frame())
    assert result_of(left) is None
    assert table.watches["a"].numbers == []
    table.say("a", error_frame("No.", Code.NOT_JOINED))
    assert not table.wire.aborted
    table.join("a")
    assert table.wire.said() == [join("a")]


def test_leave_above_the_rate_is_repeated():
    table = Table("a")
    table.ready()
    left = table.rooms["a"].leave()
    limited = error_frame("Rate limit exceeded", Code.RATE_LIMITED, LEAVE_LABEL, 3.0)
    assert table.wire.said() == [LEAVE]
    table.say("a", limited)
    table.clock.advance(2)
    assert table.wire.said() == []
    table.clock.advance(1)
    assert table.wire.said() == [LEAVE]
    table.say("a", left_frame(LEAVE_LABEL))
    assert result_of(left) is None
    table.clock.advance(3)
    assert table.wire.said() == []


def test_refused_leave_of_a_room_that_was_ended():
    """The client has joined the room again, and stays in it."""
    table = Table("a")
    table.ready()
    left = table.rooms["a"].leave()
    table.say("a", left_frame(None, "Too slow.", Code.EVICTED))
    assert result_of(left) is None
    table.join("a")
    assert table.wire.said() == [LEAVE, join("a")]
    table.say("a", error_frame("Rate limit exceeded", Code.RATE_LIMITED, LEAVE_LABEL, 3.0))
    table.greet("a")
    table.clock.advance(3)
    assert table.wire.said() == []
    assert not table.wire.aborted


def test_connection_ends_while_a_leave_waits():
    table = Table("a")
    table.ready()
    left = table.rooms["a"].leave()
    table.wire.said()
    table.say("a", error_frame("Rate limit exceeded", Code.RATE_LIMITED, LEAVE_LABEL, 3.0))
    table.wire.close(1012)
    assert table.wire.read()  # the answer to the close, after which nothing may be sent
    table.clock.advance(3)
    assert not table.wire.read()
    table.wire.end()
    assert result_of(left) is None


def test_leave_without_connection():
    table = Table()
    assert result_of(table.rooms["a"].leave()) is None
    assert table.connect().said() == [join("b")]
    left = table.rooms["b"].leave()
    table.greet("b")
    table.wire.end()
    assert result_of(left) is None
    table.clock.advance(1)
    assert table.connect().said() == []


def test_leave_of_a_room_that_cannot_be_joined():
    table = Table("a")
    table.connect()
    left = table.rooms["a"].leave()
    table.say("a", error_frame("No.", Code.FORBIDDEN, JOIN_LABEL), error_frame("No.", Code.NOT_JOINED))
    assert result_of(left) is None
    assert table.watches["a"].kinds() == []


def test_eviction_joins_again():
    """Posts that reached the server in between are sent again."""
    table = Table()
    table.ready()
    posted = table.rooms["a"].post("ann", "hi")
    (text,) = table.wire.said()
    table.say("a", left_frame(None, "Too slow.", Code.EVICTED), error_frame("No.", Code.NOT_JOINED, text["label"]))
    assert table.watches["a"].events[-1] == ("on_disconnect", "Too slow.", 0.0)
    assert table.wire.said() == [join("a", last_event_id="abcd-0")]
    table.greet("a", resumed=True)
    assert table.wire.said() == [text]
    table.say("a", ack_frame(Id("abcd", 1), text["label"], duplicate=False))
    assert result_of(posted) == Posted(Id("abcd", 1))


@pytest.mark.parametrize(
    "frame",
    [left_frame(None, "You are banned.", Code.FORBIDDEN), error_frame("You are banned.", Code.FORBIDDEN, JOIN_LABEL)],
    ids=["left", "error"],
)
def test_room_that_the_server_refuses(frame):
    """The other rooms go on, and later connections do not ask for this one."""
    table = Table()
    table.connect().said()
    table.greet("b")
    posted = table.rooms["a"].post("ann", "hi")
    table.say("a", frame)
    ((kind, error),) = table.watches["a"].events
    assert (kind, str(error), error.code) == ("on_reject", "You are banned.", "FORBIDDEN")
    with pytest.raises(Rejected):
        result_of(posted)
    with pytest.raises(Rejected):
        result_of(table.rooms["a"].post("ann", "hi"))
    table.say("b", message(1))
    assert table.watches["b"].numbers == [1]
    table.wire.end()
    table.clock.advance(1)
    assert table.connect().said() == [join("b", last_event_id="abcd-1")]


def test_room_that_ends_without_reason():
    """It can be joined again, and then the first object of it has no part in it."""
    table = Table("a")
    table.ready()
    table.say("a", left_frame())
    assert str(table.watches["a"].events[-1][1]) == "the server has ended the room"
    ended = table.rooms["a"]
    table.join("a")
    assert result_of(ended.leave()) is None
    assert table.wire.said() == [join("a")]
    table.greet("a")
    assert table.watches["a"].kinds() == ["on_history", "on_connect"]


def test_join_is_tried_again():
    table = Table("a")
    table.connect().said()
    table.say("a", error_frame("slow", Code.RATE_LIMITED, JOIN_LABEL, 2.5))
    assert table.watches["a"].events == [("on_disconnect", "slow", 2.5)]
    table.clock.advance(2.5)
    assert table.wire.said() == [join("a")]
    table.say("a", error_frame("no", Code.UNAVAILABLE, JOIN_LABEL))
    table.clock.advance(1)
    assert table.wire.said() == [join("a")]
    table.say("a", error_frame("no", Code.UNAVAILABLE, JOIN_LABEL))
    table.wire.end()
    table.clock.advance(0.9)
    assert len(table.endpoint.attempts) == 0


def test_fresh_start_of_one_room():
    table = Table()
    table.ready()
    table.say("a", history_frame("efgh", 2, [message(1), message(2)], resumed=False))
    assert table.watches["a"].kinds() == ["on_history", "on_connect", "on_history"]
    assert table.watches["b"].kinds() == ["on_history", "on_connect"]


@pytest.mark.parametrize(
    ("room", "frame", "words"),
    [
        ("a", message(9), "abcd-9 arrived after abcd-0, instead of abcd-1"),
        ("a", labelled(history_frame("abcd", 5, []), JOIN_LABEL), "the room a was joined twice"),
        ("c", message(1), "a frame of the room c, in which the client is not"),
        (None, message(1), "a frame names no room"),
        (None, b"\x81\x02{}", "malformed frame: {}"),
    ],
)
def test_protocol_error(room, frame, words):
    """Every listener learns of it."""
    table = Table()
    table.ready()
    table.wire.say(frame if room is None else addressed(room)(frame))
    assert table.wire.aborted
    for watch in table.watches.values():
        assert watch.kinds()[-1] == "on_protocol_error"
        assert str(watch.events[-1][1]) == words


def test_rejected_client():
    """No other connection would succeed: every room ends."""
    table = Table()
    posted = table.rooms["b"].post("ann", "hi")
    wire = table.endpoint.accept()
    wire.answer("403 Forbidden")
    wire.end()
    for watch in table.watches.values():
        assert watch.kinds() == ["on_reject"]
    with pytest.raises(Rejected):
        result_of(posted)
    assert table.endpoint.attempts == []


def test_stop():
    table = Table()
    table.ready()
    posted = table.rooms["a"].post("ann", "hi")
    stopped = table.client.stop()
    with pytest.raises(ClientStopped):
        result_of(posted)
    with pytest.raises(ClientStopped):
        result_of(table.client.join("c", Watch()).post("ann", "hi"))
    table.wire.close(1000)
    table.wire.end()
    assert result_of(stopped) is None
    assert table.clock.getDelayedCalls() == []


def test_backoff_begins_again_after_a_connection():
    """A connection in no room counts when it is open, and any other when a room is joined."""
    table = Table("a")
    for _ in range(3):
        table.endpoint.refuse()
        table.clock.advance(30)
    table.ready()
    table.wire.end()
    assert table.watches["a"].events[-1][2] == 1.0
    table.rooms["a"].leave()
    for _ in range(2):
        table.clock.advance(30)
        table.endpoint.refuse()
    table.clock.advance(30)
    table.connect().end()
    table.clock.advance(1)
    assert len(table.endpoint.attempts) == 1


def test_token_is_renewed():
    """The token belongs to the connection, and not to a room."""
    table = Table("a", token=lambda: token(lasts=30))
    table.connect().said()
    table.greet("a")
    table.clock.advance(16)
    (renewal,) = table.wire.said()
    assert (renewal["type"], renewal["label"]) == ("token", RENEWAL_LABEL)
    table.wire.say(token_frame(1.0, RENEWAL_LABEL) + error_frame("No.", Code.TOKEN_REFUSED, RENEWAL_LABEL))
    assert not table.wire.aborted
