"""Many rooms on one connection: joins, leaves, fairness, and what ends the place in one room."""

import json

import pytest
from support.helpers import HEAD, result_of
from support.houses import House
from support.shared_clients import SharedClient
from support.tokens import HeldKeys, token, verifier
from support.transports import Tcp
from support.websocket_frames import masked, take_frames

from chatd.transport import limits, subscription
from chatd.transport.connections import WEBSOCKET

BEARER = b"Authorization: Bearer "


@pytest.fixture
def house():
    return House(seed=())


@pytest.fixture
def ann(house):
    return SharedClient(house)


def error(code, room="team", **more):
    return {"type": "error", "room": room, "code": code, **more}


def without_words(frame):
    return {name: value for name, value in frame.items() if name != "message"}


# Joining and leaving


def test_connection_begins_in_no_room(house, ann):
    assert (ann.status, ann.read(), ann.rooms) == (101, [], [])
    assert len(house.rooms) == 0
    assert len(house.connections.connected) == 1


def test_query_of_the_handshake_is_ignored(house):
    assert SharedClient(house, target="/connect?last_event_id=x&events=y&username=").status == 101


@pytest.mark.parametrize("target", ["/connect/", "/Connect", "/rooms/connect/x"])
def test_other_paths_are_404(house, target):
    assert house.client(target).status == 404


def test_each_frame_names_its_room(house, ann):
    """Histories, messages, acks, pages, errors, presence and typing: all that belongs to a room."""
    ann.join("team", "cats", events=["presence", "typing"], username="ann", label="j")
    ann.post("team", "hi", label="p")
    ann.post("team", "hi", label="p")
    ann.post("team", "other", label="p")
    ann.say({"type": "history", "room": "team", "limit": 1, "label": "h"})
    ann.say({"type": "history", "room": "cats", "before": "k7Q2xe-1"})
    ann.say({"type": "typing", "room": "cats", "username": "ann"}, {"room": "cats", "username": "", "message": "hi"})
    house.pass_time(2)
    heard = ann.read()
    team = [one for one in heard if one["room"] == "team"]
    cats = [one for one in heard if one["room"] == "cats"]
    assert len(team) + len(cats) == len(heard)
    assert [one["type"] for one in team] == ["history", "presence", "message", "ack", "ack", "error", "history"]
    assert [one.get("label") for one in team] == ["j", None, None, "p", "p", "p", "h"]
    assert team[2]["data"]["message"] == "hi"
    assert [one["type"] for one in cats] == ["history", "presence", "error", "error", "typing"]


def test_rooms_are_independent(house, ann):
    """A post reaches the members of its room, over every kind of connection, and no others."""
    bob, cy = house.client("/rooms/team"), SharedClient(house)
    cy.join("cats")
    ann.join("team", "cats")
    ann.post("team", "one")
    assert ann.types() == ["team history 0", "cats history 0", "team message 1"]
    assert cy.types() == ["cats history 0"]
    first, message = bob.read()
    assert "room" not in message
    assert first["id"] == house.id(0)
    ann.post("cats", "two")
    assert ann.types() == cy.types() == ["cats message 1"]
    assert bob.read() == []


def test_join_resumes(house, ann):
    """Each room continues after an id of its own."""
    house.say("1", "2", "3", room="team")
    house.say("1", room="cats")
    ann.say(
        {"type": "join", "room": "team", "last_event_id": house.id(1), "label": "a"},
        {"type": "join", "room": "cats", "last_event_id": "zzzzzz-9"},
        {"type": "join", "room": "dogs"},
    )
    team, cats, dogs = ann.read()
    assert ([one["message"] for one in team["data"]], team["resumed"], team["label"]) == (["2", "3"], True, "a")
    assert (cats["id"], cats["resumed"]) == (house.id(1), False)
    assert "resumed" not in dogs
    house.say("4", room="team")
    house.turn()
    assert ann.types() == ["team message 4"]


def test_leave_is_confirmed_and_final(house, ann):
    """After the confirmation no frame of the room follows, not even an ack; another join starts over."""
    ann.join("team", "cats")
    ann.read()
    house.log.held = True
    ann.say(
        {"room": "team", "username": "ann", "message": "hi", "label": "p"},
        {"type": "leave", "room": "team", "label": "l"},
    )
    assert ann.read() == [{"type": "left", "room": "team", "label": "l"}]
    house.log.release()
    house.say("more", room="team")
    house.turn()
    assert ann.read() == []
    assert ann.rooms == ["cats"]
    assert [room.name for room in house.rooms] == ["cats"]
    ann.join("team", last_event_id=house.id(0))
    assert ann.types() == ["team history 2"]


def test_leave_without_label(ann):
    ann.join("team")
    ann.read()
    ann.say(type="leave", room="team")
    assert ann.read() == [{"type": "left", "room": "team"}]


@pytest.mark.parametrize(
    "frame",
    [
        {"username": "ann", "message": "hi", "label": "x"},
        {"type": "history", "label": "x"},
        {"type": "leave", "label": "x"},
        {"type": "remove", "id": "k7Q2xe-1", "label": "x"},
    ],
)
def test_frame_for_another_room_is_an_error(ann, frame):
    """It has the room and the label of the frame, and does not count as a broken one."""
    ann.join("cats")
    ann.read()
    for _ in range(101):
        ann.say({"room": "team", **frame})
    heard = ann.read()
    assert len(heard) == 101
    assert without_words(heard[0]) == error("NOT_JOINED", label="x")


def test_typing_in_another_room_is_an_error(ann):
    ann.say(type="typing", room="team", username="ann")
    assert [without_words(one) for one in ann.read()] == [error("NOT_JOINED")]


def test_second_join_is_an_error(ann):
    """The first one stays as it is."""
    ann.join("team", "team", label="x")
    assert [without_words(one) for one in ann.read()[1:]] == [error("ALREADY_JOINED", label="x")]
    assert ann.rooms == ["team"]


def test_rooms_of_a_connection_are_bounded(ann, monkeypatch):
    monkeypatch.setattr(subscription, "MAX_SUBSCRIPTIONS", 2)
    ann.join("a", "b", "c", label="x")
    assert without_words(ann.read()[2]) == error("TOO_MANY_ROOMS", "c", label="x")
    ann.say({"type": "leave", "room": "a"}, {"type": "join", "room": "c"})
    assert ann.types() == ["a left", "c history 0"]


@pytest.mark.parametrize(
    ("frame", "fault", "room"),
    [
        ([], '"value" must be of type object', None),
        ({"username": "ann", "message": "hi"}, '"room" is required', None),
        ({"room": 7, "username": "ann", "message": "hi"}, '"room" must be a string', None),
        (
            {"room": "A", "username": "ann", "message": "hi"},
            '"room" fails to match the required pattern: /^[a-z0-9][a-z0-9_-]{0,63}$/',
            None,
        ),
        ({"room": "team", "username": "ann"}, '"message" is required', "team"),
        ({"room": "team", "username": "ann", "message": "hi", "x": 1}, '"x" is not allowed', "team"),
        (
            {"room": "team", "type": "post"},
            '"type" must be one of [history, join, leave, remove, token, typing]',
            "team",
        ),
        ({"room": "team", "type": 7}, '"type" must be one of [history, join, leave, remove, token, typing]', "team"),
        ({"room": "A", "type": 7}, '"type" must be one of [history, join, leave, remove, token, typing]', None),
        ({"room": "team", "type": "leave", "x": 1}, '"x" is not allowed', "team"),
        ({"room": "team", "type": "history", "limit": 0}, '"limit" must be greater than or equal to 1', "team"),
        ({"room": "team", "type": "token", "token": "t"}, '"room" is not allowed', None),
        (
            {"room": "team", "type": "join", "events": ["presence", 7]},
            '"events[1]" must be one of [presence, typing]',
            "team",
        ),
    ],
)
def test_broken_frame(ann, frame, fault, room):
    """The error has the words of other connections, and the room and the label if they are valid."""
    ann.join("team")
    ann.read()
    labelled = isinstance(frame, dict)
    ann.say({**frame, "label": "x"} if labelled else frame)
    expected = {"type": "error", "message": f"Validation error: {fault}"}
    expected |= {"label": "x"} if labelled and "typing" not in frame else {}
    expected |= {"room": room} if room else {}
    assert ann.read() == [expected]


@pytest.mark.parametrize("depth", [254, 1_000])
def test_frame_that_is_nested_deeply(house, ann, depth):
    """orjson reads such a frame, and does not encode it."""
    ann.join("team")
    ann.read()
    text = b'{"room":"team","username":"ann","label":"x","message":%b}' % (b"[" * depth + b"]" * depth)
    ann.send(masked(text))
    words = 'Validation error: "value" is nested too deeply'
    assert ann.read() == [{"type": "error", "room": "team", "message": words, "label": "x"}]
    ann.session.queue()  # it also waits for a turn while the connection ends
    ann.protocol.dataReceived(masked(text))
    ann.lose()
    assert house.forgotten


def test_text_that_is_not_json(ann):
    ann.send(masked(b"hi"))
    assert [one["message"] for one in ann.read()] == ["Invalid JSON format."]
    ann.send(masked(b"\xff"))
    ann.read()
    assert ann.closed[0] == 1007


def test_posts_follow_their_join(house, ann):
    """The frames behind a join wait until its room is open."""
    house.log.slow = True
    ann.say(
        {"type": "join", "room": "team"},
        {"room": "team", "username": "ann", "message": "hi", "label": "p"},
        {"type": "leave", "room": "team"},
    )
    assert ann.read() == []
    assert ann.session.awaits_log
    house.log.release()
    house.turn()
    assert [one["type"] for one in ann.read()] == ["history", "left"]
    assert house.rooms.messages == 1


@pytest.fixture
def trimmed(monkeypatch):
    """A house with a slow log and an open room, whose tail does not reach back to its first messages."""
    monkeypatch.setattr("chatd.room.tail.TAIL_BYTES", 200)
    house = House(seed=(), history=3)
    SharedClient(house).join("team")
    house.say(*"123456789", room="team")
    house.turn()
    house.log.slow = True
    return house


def test_frames_wait_for_a_resume_from_the_log(trimmed):
    """A room that is open, and whose log must be read for one client, holds back the frames behind the join as well."""
    house, ann = trimmed, SharedClient(trimmed)
    join = {"type": "join", "room": "team", "last_event_id": house.id(1)}
    ann.say(join, join, {"room": "team", "username": "ann", "message": "hi", "label": "p"})
    assert ann.read() == []
    assert ann.session.awaits_log
    house.log.slow = False
    house.log.release()
    house.turn()
    frames = ann.read()
    first, *others = frames
    assert (first["type"], first["id"], first["resumed"]) == ("history", house.id(4), True)
    assert [one["id"] for one in others if one["type"] == "message"] == [house.id(one) for one in range(5, 11)]
    assert [one["code"] for one in others if one["type"] == "error"] == ["ALREADY_JOINED"]
    assert (frames[-1]["type"], frames[-1]["id"]) == ("ack", house.id(10))
    (room,) = house.rooms
    assert len(room.members) == 2


def test_frames_behind_a_handshake_wait_for_a_resume_from_the_log(trimmed):
    """On a connection to one room too: they are no second request."""
    transport, protocol = Tcp(), trimmed.factory.buildProtocol(None)
    protocol.makeConnection(transport)
    protocol.dataReceived(
        b"%b\r\n\r\n" % HEAD.replace(b"GET /", f"GET /rooms/team?last_event_id={trimmed.id(1)}".encode())
    )
    protocol.dataReceived(masked(b'{"username":"ann","message":"hi"}'))
    trimmed.log.slow = False
    trimmed.log.release()
    trimmed.turn()
    head, _, rest = transport.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    frames, _ = take_frames(rest)
    assert json.loads(frames[-1].payload)["id"] == trimmed.id(10)


def test_client_that_goes_during_a_resume_from_the_log(trimmed):
    ann = SharedClient(trimmed)
    ann.join("team", last_event_id=trimmed.id(1))
    ann.lose()
    trimmed.log.release()
    (room,) = trimmed.rooms
    assert len(room.members) == 1


def test_client_that_goes_while_a_room_opens(house, ann):
    house.log.slow = True
    ann.join("team")
    ann.lose()
    house.log.release()
    assert house.forgotten


def test_client_that_goes_while_a_room_fails_to_open(house, ann):
    house.log.slow = True
    ann.join("team")
    ann.lose()
    house.log.fail()
    assert house.forgotten


def test_room_that_cannot_be_read(house, ann):
    house.log.down = True
    ann.join("team", label="x")
    assert ann.read() == [error("UNAVAILABLE", label="x", message="The room cannot be read now; try again.")]
    house.log.down = False
    ann.join("team")
    assert ann.types() == ["team history 0"]


def test_too_many_rooms_are_open(house, ann, monkeypatch):
    monkeypatch.setattr("chatd.room.registry.MAX_ROOMS", 1)
    ann.join("cats", "team")
    assert without_words(ann.read()[1]) == error("UNAVAILABLE", retry_after=2)
    assert house.limits.refusals[limits.ROOMS] == 1


def test_join_while_the_reactor_lags(house, ann):
    house.limits.lateness.refuses = True
    ann.join("team")
    assert ann.read() == [error("UNAVAILABLE", message="the server is busy", retry_after=2)]


def test_room_that_the_operator_does_not_allow():
    ann = SharedClient(House(rooms=["team-*"]))
    ann.join("team-1", "cats")
    assert [without_words(one) for one in ann.read()[1:]] == [error("FORBIDDEN", "cats")]


# The rate


def test_first_joins_take_no_token(monkeypatch):
    """All rooms can be joined after a reconnect; posts and further joins are paced as ever."""
    monkeypatch.setattr(subscription, "MAX_SUBSCRIPTIONS", 3)
    ann = SharedClient(House(rate=(1, 1), seed=()))
    ann.join("a", "b", "c")
    ann.post("a", "hi")
    assert ann.types() == ["a history 0", "b history 0", "c history 0", "a message 1"]
    ann.say({"type": "leave", "room": "a", "label": "x"})
    assert [(one["code"], one["room"], one["label"]) for one in ann.read()] == [("RATE_LIMITED", "a", "x")]
    ann.house.pass_time(1)
    ann.say({"type": "leave", "room": "a"})
    ann.house.pass_time(1)
    ann.join("d")
    ann.join("e")
    assert [one.get("code", one["type"]) for one in ann.read()] == ["left", "history", "RATE_LIMITED"]


PUBLIC = b"X-Forwarded-For: 203.0.113.7"


def test_joins_of_an_address_are_limited(monkeypatch):
    monkeypatch.setattr(limits, "JOINS", 2)
    house = House(rate=(20, 40), per_address=10, hops=1, seed=())
    ann, bob = SharedClient(house, PUBLIC), SharedClient(house, PUBLIC)
    ann.join("a", "b")
    bob.join("a", label="j")
    assert ann.types() == ["a history 0", "b history 0"]
    refused = {"message": "Rate limit exceeded", "label": "j", "retry_after": 2}
    assert bob.read() == [error("RATE_LIMITED", "a", **refused)]
    assert house.limits.refusals[limits.JOIN] == 1
    house.pass_time(1)
    bob.join("b")
    assert bob.types() == ["b history 0"]


def test_crowd_of_an_address_joins_in_the_end(monkeypatch):
    """However many rooms are refused, no connection is closed; each refused join takes a token of its connection."""
    monkeypatch.setattr(limits, "JOINS", 1)
    monkeypatch.setattr(limits, "JOINS_PER_SECOND", 0.2)
    house = House(rate=(20, 40), per_address=10, hops=1, seed=())
    SharedClient(house, PUBLIC).join("a")
    crowd = [SharedClient(house, PUBLIC) for _ in range(3)]
    for one in crowd:
        one.join(*["a"] * 120)
    for one in crowd:
        assert [frame["code"] for frame in one.read()] == ["RATE_LIMITED"] * 41
    for _ in range(40):
        house.clock.advance(0.1)
        house.turn()
    for one in crowd:
        assert {frame["code"] for frame in one.read()} == {"RATE_LIMITED"}
        assert one.closed is None
    house.pass_time(2)
    crowd[0].join("b")
    assert crowd[0].types() == ["b history 0"]


def test_broken_frame_above_the_rate():
    ann = SharedClient(House(rate=(1, 1), seed=()))
    ann.say({"room": "team"}, {"room": "team", "label": "x"})
    ann.house.turn()
    assert [one.get("code") for one in ann.read()] == [None, "RATE_LIMITED"]


# Presence


def test_presence_for_each_room(house, ann):
    """A connection is one member of each room, under the name that it has there."""
    ann.join("team", events=["presence"], username="ann")
    ann.join("cats", events=["presence"], username="kitty")
    bob = SharedClient(house)
    bob.join("team", username="bob")
    house.pass_time(2)
    seen = {one["room"]: one["data"] for one in ann.read() if one["type"] == "presence"}
    assert seen["cats"] == {"count": 1, "users": ["kitty"]}
    assert seen["team"]["count"] == 2
    bob.say(type="leave", room="team")
    house.pass_time(2)
    assert [one["data"] for one in ann.read()] == [{"count": 1, "join": [], "leave": ["bob"]}]
    ann.post("team", "hi")
    ann.say(room="team", username="anna", message="hi")
    house.pass_time(2)
    assert [one["data"]["join"] for one in ann.read() if one["type"] == "presence"] == [["anna"]]


def test_presence_waits_for_a_full_transport(house, ann):
    """Presence of many rooms does not pile up; a snapshot follows."""
    ann.join("team", events=["presence"])
    house.pass_time(2)
    ann.read()
    ann.fill()
    house.say("x", room="team")
    house.turn()
    waits = len(ann.transport.value())
    for number in range(5):
        house.client(f"/rooms/team?username=n{number}")
        house.pass_time(2)
    assert len(ann.transport.value()) == waits
    ann.drain()
    house.pass_time(1)
    assert [one["data"]["count"] for one in ann.read() if one["type"] == "presence"] == [6]


# Fairness


def waiting(ann):
    """Return the rooms that wait to write, in order."""
    return [one.room_name for one in ann.session.waiting]


def test_rooms_wait_in_order(house, ann):
    """A full transport takes one frame; the rooms that find it full wait, and keep their cursors."""
    rooms = [f"r{number}" for number in range(5)]
    ann.join(*rooms)
    ann.read()
    ann.fill(10)
    for room in rooms:
        house.say("1", room=room)
        house.turn()
    assert waiting(ann) == rooms
    assert [one.cursor for one in ann.session.subscriptions.values()] == [1, 0, 0, 0, 0]
    house.say("2", room="r0")
    house.turn()
    assert [one.cursor for one in ann.session.subscriptions.values()] == [1, 0, 0, 0, 0]
    ann.drain()
    assert ann.types() == ["r0 message 1", "r0 message 2", *(f"{room} message 1" for room in rooms[1:])]
    assert waiting(ann) == []


def test_cut_room_goes_to_the_end(house, ann):
    """A room that fills the transport again and again does not keep others from it."""
    ann.join("hot", "a", "b")
    ann.read()
    ann.fill(0)
    house.say(*"123456", room="hot")
    house.turn()
    for room in ("a", "b"):
        house.say("1", room=room)
    house.turn()
    heard = []
    for _ in range(4):
        ann.drain(10)
        house.say("more", room="hot")
        house.turn()
        heard += ann.types()
    assert heard == ["hot message 1", "hot message 2", "a message 1", "b message 1"]
    ann.drain()
    assert [one for one in ann.types() if "hot" not in one] == []
    assert waiting(ann) == []


def test_hot_room_waits_for_others(house, ann):
    """A subscription that has not waited yet goes behind those that wait, although the transport has space."""
    rooms = [f"r{number:02}" for number in range(40)]
    ann.join("hot", *rooms)
    ann.read()
    ann.fill(0)
    for room in rooms:
        house.say("1", room=room)
    house.turn()
    ann.transport.socket.sent += ann.transport.buffered()
    ann.socket.space = None
    ann.transport.producer.resumeProducing()
    house.say("1", room="hot")
    house.turn()
    assert ann.types() == [*(f"{room} message 1" for room in rooms), "hot message 1"]


def test_full_transport_costs_the_same(house, ann):
    """When it has space again, only the first rooms that wait are served."""
    rooms = [f"r{number:03}" for number in range(200)]
    ann.join(*rooms)
    ann.read()
    ann.fill(0)
    for room in rooms:
        house.say("1", room=room)
    house.turn()
    ann.transport.socket.sent += ann.transport.buffered()
    ann.fill(10)
    ann.transport.producer.resumeProducing()
    assert sum(one.ready for one in ann.session.waiting) == subscription.GRANTS
    house.turn()
    assert waiting(ann) == [*rooms[2:], rooms[1]]
    assert not any(one.ready for one in ann.session.waiting if one.room_name not in rooms[1:18])


def test_room_that_leaves_makes_way(house, ann):
    ann.join("a", "b", "c")
    ann.read()
    ann.fill(0)
    for room in "abc":
        house.say("1", room=room)
        house.turn()
    ann.say(type="leave", room="b")
    assert waiting(ann) == ["a", "c"]
    ann.drain()
    assert ann.types() == ["a message 1", "b left", "c message 1"]
    assert waiting(ann) == []


def test_room_that_is_not_behind_makes_way(house, ann):
    """A restart or an eviction may bring a subscription to the head while it waits."""
    ann.join("a", "b", "c")
    ann.read()
    ann.fill(0)
    for room in "abc":
        house.say("1", room=room)
        house.turn()
    assert waiting(ann) == ["a", "b", "c"]
    for one in [*ann.session.subscriptions.values()][:2]:
        one.cursor = 1
    ann.drain()
    assert ann.types() == ["a message 1", "c message 1"]
    assert waiting(ann) == []


def test_tls_transport_pauses_all_rooms(house):
    """A transport with a buffer of its own takes what it gets, and pauses."""
    ann = SharedClient(house)
    ann.join("a", "b")
    ann.read()
    ann.protocol.buffer()
    ann.protocol.pauseProducing()
    for room in "ab":
        house.say("1", room=room)
    house.turn()
    assert waiting(ann) == ["a", "b"]
    ann.drain()
    assert ann.transport.buffered()
    assert waiting(ann) == []


def test_ack_of_a_room_that_waits(house, ann):
    """An ack follows its message, and the client is not read while its answers wait."""
    ann.join("a", "b")
    ann.read()
    ann.fill(0)
    house.say("1", room="a")
    house.turn()
    ann.post("b", "mine", label="p")
    assert ann.transport.producerState == "paused"
    assert waiting(ann) == ["a", "b"]
    ann.drain()
    assert ann.types() == ["a message 1", "b message 1", "b ack 1"]
    assert ann.transport.producerState == "producing"


def test_acks_of_one_turn_are_joined(house, ann):
    """Several acknowledgements in one write name the room each."""
    ann.join("a")
    ann.read()
    ann.post("a", "1", "2", label="p")
    ann.say(*({"room": "a", "username": "ann", "message": f"{n}", "label": f"l{n}"} for n in range(3)))
    acks = [one for one in ann.read() if one["type"] == "ack"]
    assert [one["room"] for one in acks] == ["a"] * len(acks)
    assert len(acks) == 4


# The end of the place in a room


def test_evicted_from_one_room(monkeypatch):
    """A subscription too far behind ends with a frame; the connection and its other rooms go on."""
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 3)
    monkeypatch.setattr("chatd.room.tail.TAIL_BYTES", 100)
    house = House(history=1, seed=())
    ann = SharedClient(house)
    ann.join("team", "cats")
    ann.read()
    ann.fill(0)
    house.say("1", room="cats")
    house.turn()
    for number in range(8):
        house.say(str(number), room="team")
        house.turn()
    ann.drain()
    assert [one.get("code", one["room"]) for one in ann.read()] == ["cats", "EVICTED"]
    assert ann.rooms == ["cats"]
    assert len(house.connections.connected) == 1
    ann.join("team", last_event_id=house.id(0))
    assert ann.read()[0]["resumed"] is False


def lose_log(house):
    """Let the log lose its newest entries, as Redis may in a failover."""
    house.log.epoch = "newone"
    house.rooms.interrupted()
    house.turn()


def test_room_restarts(house, ann):
    """Each subscription gets a fresh start."""
    ann.join("team", "cats")
    house.say("1", room="team")
    house.turn()
    ann.read()
    lose_log(house)
    assert [(one["room"], one["id"], one["resumed"]) for one in ann.read()] == [
        ("team", "newone-1", False),
        ("cats", "newone-0", False),
    ]


def test_room_restarts_while_the_transport_is_full(house, ann):
    """The histories of many rooms do not pile up in the transport: the client joins again."""
    ann.join("team", "cats")
    ann.read()
    ann.fill(0)
    house.say("1", room="team")
    house.turn()
    lose_log(house)
    ann.drain()
    assert [(one["room"], one.get("code", one["type"])) for one in ann.read()] == [
        ("team", "message"),
        ("team", "EVICTED"),
        ("cats", "EVICTED"),
    ]
    assert ann.rooms == []


def test_slow_connection_is_closed(house, ann):
    ann.join("team")
    ann.fill(0)
    house.say("1", room="team")
    house.turn()
    house.pass_time(41)
    ann.drain()
    ann.read()
    assert ann.closed == (1013, "too slow: reconnect")
    assert len(house.rooms) == 0


# Tokens and sanctions


def bearer(**claims):
    return BEARER + token(**claims).encode()


def test_token_permits_rooms():
    """A connection needs a valid token, and each join the permission to read."""
    house = House(tokens=verifier(), seed=())
    assert house.client("/connect").status == 401
    ann = SharedClient(house, bearer(chatd={"read": ["team"], "post": []}))
    ann.join("team", "cats")
    ann.say({"type": "join", "room": "team", "username": "bob"}, {"type": "leave", "room": "team"})
    ann.join("team", username="bob")
    ann.join("team", username="ann")
    assert [one.get("code", one["type"]) for one in ann.read()] == [
        *("history", "FORBIDDEN", "ALREADY_JOINED", "left", "FORBIDDEN", "history")
    ]
    ann.post("team", "hi")
    assert [one["message"] for one in ann.read()] == ["The token does not permit posting in this room."]


def test_new_token_narrows():
    """The connection leaves the rooms that the new token does not permit, and stays in the others."""
    house = House(tokens=verifier(), seed=())
    ann = SharedClient(house, bearer())
    ann.join("team", "cats", events=["presence"])
    ann.read()
    ann.say(type="token", token=token(chatd={"read": ["cats"]}), label="t")
    heard = ann.read()
    assert [(one["type"], one.get("room"), one.get("code")) for one in heard] == [
        ("left", "team", "FORBIDDEN"),
        ("token", None, None),
    ]
    assert ann.rooms == ["cats"]
    ann.join("team")
    assert ann.read()[0]["code"] == "FORBIDDEN"
    ann.say(type="token", token=token("bob"))
    assert ann.read()[0]["code"] == "TOKEN_REFUSED"


def test_new_token_renames():
    """The name in presence is that of the token, in all rooms."""
    house = House(tokens=verifier(username="name"), seed=())
    ann = SharedClient(house, bearer(name="ann"))
    ann.join("team", events=["presence"])
    house.pass_time(2)
    ann.say(type="token", token=token(name="anna"))
    house.pass_time(2)
    assert [one["data"]["users"] for one in ann.read() if "users" in one.get("data", ())] == [["ann"]]
    assert [one.name for one in ann.session.subscriptions.values()] == ["anna"]


@pytest.mark.parametrize(("where", "closed"), [({"room": "team"}, None), ({}, 1008)])
def test_new_token_of_a_banned_name(where, closed):
    """A ban of one room ends that room, and a ban of all rooms the connection."""
    house = House(tokens=verifier(username="name"), seed=())
    ann = SharedClient(house, bearer(name="ann"))
    ann.join("team", "cats")
    house.sanction(username="bob", **where)
    ann.say(type="token", token=token(name="bob"))
    heard = ann.read()
    if closed:
        assert (ann.closed[0], ann.rooms) == (closed, [])
    else:
        assert [one["type"] for one in heard[2:]] == ["left", "token"]
        assert ann.rooms == ["cats"]


def test_token_that_is_verified_late():
    keys = HeldKeys()
    house = House(tokens=verifier(keys), seed=())
    ann = house.client("/connect", bearer())
    assert ann.answered == b""
    keys.come()
    house.turn()
    assert b"HTTP/1.1 101 " in ann.transport.value()


def test_token_expires():
    house = House(tokens=verifier(), seed=())
    ann = SharedClient(house, bearer(lasts=-58))
    ann.join("team")
    house.pass_time(4)
    ann.read()
    assert ann.closed == (1008, "the token has expired")


def test_ban_of_one_room(house, ann):
    """The client leaves the room with the reason, and stays in its other rooms."""
    ann.join("team", "cats", username="ann")
    ann.read()
    house.sanction(username="ann", room="team", seconds=60, reason="spam")
    words = "You are banned from this room until 2026-01-01T00:01:00Z: spam"
    assert ann.read() == [{"type": "left", "room": "team", "message": words, "code": "FORBIDDEN", "retry_after": 60}]
    assert ann.rooms == ["cats"]
    ann.join("team", username="ann", label="x")
    assert ann.read() == [error("FORBIDDEN", message=words, label="x", retry_after=60)]
    ann.join("team", username="bob")
    assert ann.types() == ["team history 0"]
    ann.post("team", "hi", label="p")
    assert [one["type"] for one in ann.read()] == ["error", "left"]


@pytest.mark.parametrize("document", [{"address": "192.0.2.7"}, {"username": "ann"}])
def test_ban_of_all_rooms_closes(house, ann, document):
    ann.join("team", "cats", username="ann")
    house.sanction(**document)
    ann.read()
    assert ann.closed == (1008, "You are banned from this server")
    assert ann.rooms == []
    refused = house.client("/connect")
    assert refused.status == (403 if "address" in document else 101)


def test_connection_in_no_room_is_banned(house, ann):
    house.sanction(address="192.0.2.7")
    house.sanction("s2", address="192.0.2.7")
    ann.read()
    assert ann.closed[0] == 1008


def test_ban_of_another_client(house, ann):
    ann.join("team", username="ann")
    house.sanction(username="bob")
    house.sanction("s2", address="192.0.2.7", room="cats")
    assert ann.types() == ["team history 0"]
    ann.join("cats")
    assert ann.read()[0]["code"] == "FORBIDDEN"


def test_ban_while_a_room_opens(house, ann):
    house.log.slow = True
    ann.join("team")
    house.sanction(address="192.0.2.7", room="team")
    house.log.release()
    house.turn()
    assert ann.read()[0]["code"] == "FORBIDDEN"
    assert ann.rooms == []


# The end


def test_drain_waits_for_every_room(house, ann):
    """A connection has pending work until each room has what the log held, and each frame is answered."""
    ann.join("a", "b")
    ann.read()
    session = ann.session
    assert not session.has_pending(session.head)
    ann.fill(0)
    for room in "ab":
        house.say("1", room=room)
    house.turn()
    head = session.head
    assert session.has_pending(head)
    house.say("2", room="b")
    ann.drain()
    assert not session.has_pending(head)
    house.log.held = True
    ann.post("a", "hi", label="p")
    assert session.awaits_log
    house.log.release()
    assert session.has_pending(session.head)
    house.turn()
    assert not session.awaits_log
    assert not session.has_pending(session.head)


def test_drain_closes(house, ann):
    ann.join("a")
    house.drain()
    ann.read()
    assert ann.closed == (1012, "retry_after=0.5")
    assert not ann.session.has_pending(ann.session.head)
    ann.lose()
    assert house.forgotten
    assert house.connections.closes[WEBSOCKET, 1006] + house.connections.closes[WEBSOCKET, 1012] == 1


def test_posts_that_wait_are_stored(house, ann):
    """When the connection closes, posts that have arrived are appended, to the rooms that it is in."""
    ann.join("team")
    house.log.slow = True
    ann.say(
        {"type": "history", "room": "team", "before": house.id(1)},
        {"room": "team", "username": "ann", "message": "1"},
        {"room": "cats", "username": "ann", "message": "2"},
        {"type": "leave", "room": "team"},
        {"type": "join", "room": "dogs"},
    )
    house.log.slow = False
    ann.lose()
    assert [result_of(house.log.read(room, None, 9)).head for room in ("team", "cats", "dogs")] == [1, 0, 0]


def test_nothing_remains(house, ann):
    ann.join(*"abc", events=["presence", "typing"])
    ann.post("a", "1", label="x")
    ann.lose()
    ann.lose()
    assert house.forgotten


def test_post_that_fails(house, ann):
    ann.join("team")
    ann.read()
    house.log.full = True
    ann.post("team", "hi", label="x")
    assert [without_words(one) for one in ann.read()] == [error("UNAVAILABLE", label="x")]
    house.log.full, house.log.held = False, True
    ann.post("team", "hi", label="x")
    ann.say(type="leave", room="team")
    house.log.fail()
    assert [one["type"] for one in ann.read()] == ["left"]
