"""Server-Sent Events of many rooms: one stream, one id that resumes all of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.houses import House
from support.tokens import token, verifier

from chatd.messages import Id
from chatd.transport.admission import HttpError, last_ids
from chatd.transport.frames import history_frame, shared_event
from chatd.transport.sse import MAX_STREAM_ROOMS

PATH = b"/events?room=a&room=b"


@pytest.fixture
def house():
    return House(seed=())


def follow(house, path=PATH, last=None, **options):
    headers = [] if last is None else [f"Last-Event-ID: {last}".encode()]
    return house.stream(path, *headers, **options)


def seen(stream):
    """Take the room and the type of each event, with the text or the texts that it has."""
    found = []
    for event in stream.read():
        data = event.json.get("data", ())
        texts = [one["message"] for one in data] if isinstance(data, list) else [data.get("message")]
        assert event.json["type"] == event.kind
        found.append((event.json["room"], event.kind, *texts))
    return found


def test_events_of_all_rooms(house):
    house.say("1", room="a")
    stream = follow(house)
    assert seen(stream) == [("a", "history", "1"), ("b", "history")]
    assert (stream.status, stream.retries, stream.last) == (200, [2000], f"{house.epoch}-1,0")
    house.say("2", room="b")
    house.turn()
    assert seen(stream) == [("b", "message", "2")]
    assert stream.last == f"{house.epoch}-1,1"
    assert len(house.connections.connected) == 1


def test_one_id_resumes_all_rooms(house):
    """After any event a new stream continues each room where it was."""
    stream = follow(house)
    for number in range(3):
        house.say(f"a{number}", room="a")
        house.say(f"b{number}", room="b")
        house.turn()
    events = stream.read()
    texts = {room: [f"{room}{number}" for number in range(3)] for room in "ab"}
    for place, event in enumerate(events[1:], 1):
        before = [one.json for one in events[: place + 1]]
        had = {room: sum(one["type"] == "message" for one in before if one["room"] == room) for room in "ab"}
        again = follow(house, last=event.id)
        assert seen(again) == [(room, "history", *texts[room][had[room] :]) for room in "ab"]
    assert events[0].id == f"{house.epoch}-0,"


def test_first_event_leaves_the_other_room_unread(house):
    """A client that lost the stream after the first history gets the whole history of the next room."""
    house.say("1", room="b")
    stream = follow(house, last=f"{house.epoch}-0,")
    first, second = stream.read()
    assert (first.json["resumed"], "resumed" in second.json) == (True, False)


def test_long_run_is_resumed_anywhere(house, monkeypatch):
    """The ids of a run that is cut short name no message that was not sent."""
    monkeypatch.setattr("chatd.room.tail.RUN_BYTES", 500)
    stream = follow(house)
    stream.read()
    house.say(*(str(number) * 60 for number in range(10)), room="a")
    house.say("x", room="b")
    house.clock.turn()
    for _ in range(10):
        for event in stream.read():
            number = Id.parse(event.json["id"]).number
            rooms = dict(zip("ab", last_ids(event.id, 2), strict=True))
            assert rooms[event.json["room"]].number == number
        had = {room.name: room.cursors() for room in house.rooms}
        for room, id_ in zip("ab", last_ids(stream.last, 2), strict=True):
            assert [*had[room]] == [id_.number]
        house.clock.turn()
    assert stream.last == f"{house.epoch}-10,1"


def test_presence_has_no_id(house):
    stream = follow(house, PATH + b"&events=presence,typing&username=ann")
    house.pass_time(2)
    assert [event.id for event in stream.read()][1:] == [stream.last] * 3
    assert stream.last == f"{house.epoch}-0,0"
    house.client("/rooms/b?username=bob")
    house.pass_time(2)
    (event,) = stream.read()
    assert (event.json["room"], event.json["data"]["join"]) == ("b", ["bob"])


def test_rooms_restart(house):
    """Until each room has restarted, the id names the epoch of each."""
    stream = follow(house)
    house.say("1", room="a")
    house.turn()
    stream.read()
    old, house.log.epoch = house.epoch, "newone"
    house.log.slow = True
    house.rooms.interrupted()
    house.log.answer()
    (event,) = stream.read()
    assert (event.json["room"], event.json["resumed"], event.id) == ("a", False, f"newone-1,{old}-0")
    house.log.release()
    (event,) = stream.read()
    assert event.id == "newone-1,0"


def test_full_transport_stops_all_rooms(house):
    """Each time it has space again, another room is served first."""
    stream = follow(house)
    stream.read()
    producer = stream.transport.producer
    producer.pauseProducing()
    house.say("1", room="a")
    house.say("2", room="b")
    house.turn()
    house.pass_time(2)
    assert stream.read() == []
    member = next(iter(house.connections.connected)).member
    assert member.has_pending(member.head)
    producer.resumeProducing()
    house.turn()
    assert sorted(seen(stream)) == [("a", "message", "1"), ("b", "message", "2")]
    assert not member.has_pending(member.head)
    house.pass_time(30)
    assert stream.comments == 0
    stream.read()
    assert stream.comments == 1


def test_slow_reader_is_evicted(house):
    stream = follow(house)
    stream.transport.producer.pauseProducing()
    house.pass_time(41)
    stream.read()
    assert (stream.ended, stream.retries[-1]) == (True, 0)


@pytest.mark.parametrize(
    ("path", "last", "status", "detail"),
    [
        (b"/events", None, 400, f"room: name 1 to {MAX_STREAM_ROOMS} rooms"),
        (b"/events?" + b"&".join(b"room=r%d" % n for n in range(51)), None, 400, "room: name 1 to 50 rooms"),
        (b"/events?room=A", None, 404, "there is no room here; connect to / or to /rooms/NAME"),
        (PATH, "k7Q2xe-1", 400, "last_event_id: there must be one id for each room"),
        (PATH, "1,k7Q2xe-1", 400, "last_event_id: an id is an epoch and a number, such as k7Q2xe-1042"),
        (PATH + b"&events=x", None, 400, "events: choose of presence, typing"),
    ],
)
def test_refused_streams(house, path, last, status, detail):
    headers = [] if last is None else [f"Last-Event-ID: {last}".encode()]
    response, text = house.get(path, *headers)
    assert (response.status, json.loads(text)["detail"]) == (status, detail)


def test_id_in_the_query(house):
    house.say("1", "2", room="b")
    stream = follow(house, PATH + f"&last_event_id={house.epoch}-0,1".encode())
    assert seen(stream) == [("a", "history"), ("b", "history", "2")]


def test_room_named_twice(house):
    assert seen(follow(house, b"/events?room=a&room=a")) == [("a", "history")]


def test_head_and_preflight(house):
    response, text = house.ask(b"HEAD", PATH)
    assert (response.status, response.getheader("content-type"), text) == (200, "text/event-stream", "")
    response, _ = house.ask(b"OPTIONS", PATH, b"Origin: http://chat.example")
    assert (response.status, response.getheader("allow")) == (204, "GET, HEAD, OPTIONS")
    assert house.ask(b"POST", PATH, body=b"")[0].status == 405
    assert len(house.rooms) == 0


def test_tokens_permit_rooms():
    house = House(tokens=verifier(), seed=())
    assert house.get(PATH)[0].status == 401
    bearer = b"Authorization: Bearer " + token(chatd={"read": ["a"]}).encode()
    assert house.get(PATH, bearer)[0].status == 403
    assert seen(house.stream(b"/events?room=a", bearer)) == [("a", "history")]


def test_ban_ends_the_stream(house):
    """A ban of one of the rooms ends it; the browser reconnects, is refused, and gives up."""
    stream = follow(house, PATH + b"&username=ann")
    house.sanction(username="ann", room="b")
    stream.read()
    assert stream.ended
    assert len(house.rooms) == 0
    assert house.get(PATH + b"&username=ann")[0].status == 403


def test_ban_while_a_room_opens(house):
    house.log.slow = True
    stream = follow(house, PATH + b"&username=ann")
    house.log.answer()
    assert seen(stream) == [("a", "history")]
    house.sanction(username="ann", room="b")
    house.log.release()
    stream.read()
    assert stream.ended


def test_eviction_ends_the_stream(house, monkeypatch):
    """The browser reconnects with its id, which all rooms resume after."""
    monkeypatch.setattr("chatd.room.room.MAX_LAG", 3)
    monkeypatch.setattr("chatd.room.tail.TAIL_BYTES", 100)
    house = House(seed=(), history=1)
    stream = follow(house)
    stream.read()
    stream.transport.producer.pauseProducing()
    for number in range(8):
        house.say(str(number), room="a")
        house.turn()
    stream.transport.producer.resumeProducing()
    house.turn()
    stream.read()
    assert (stream.ended, stream.retries[-1], stream.last) == (True, 0, f"{house.epoch}-0,0")
    stream.connection.lose()
    assert house.forgotten


def test_second_room_cannot_be_read(house):
    """The stream ends, and the browser tries again."""
    house.log.slow = True
    stream = follow(house)
    house.log.answer()
    house.log.fail()
    assert seen(stream) == [("a", "history")]
    assert stream.ended
    stream.connection.lose()
    assert house.forgotten


def test_first_room_cannot_be_read(house):
    house.log.down = True
    assert house.get(PATH)[0].status == 503


def test_reader_that_leaves(house):
    """Rooms that are opened for it are not joined."""
    house.log.slow = True
    stream = follow(house)
    house.log.answer()
    stream.connection.lose()
    house.log.release()
    house.turn()
    assert house.forgotten


def test_drain(house):
    stream = follow(house)
    house.drain(0.5)
    stream.read()
    assert (stream.ended, stream.retries[-1]) == (True, 500)


def test_server_that_stops(house):
    house.log.slow = True
    stream = follow(house)
    house.connections.stopping = True
    house.log.release()
    assert stream.transport.value().startswith(b"HTTP/1.1 503 ")


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.none() | st.tuples(st.sampled_from(["abcd", "efgh"]), st.integers(0, 99)), min_size=1, max_size=5))
def test_ids_are_read_as_they_are_written(ids):
    """Whatever the epochs are, the ids of an event are those that its reader resumes after."""
    wanted = [None if one is None else Id(*one) for one in ids]
    event = shared_event(
        history_frame("abcd", 0, []), lambda frame: frame, lambda _: ["" if one is None else str(one) for one in wanted]
    )
    text = event.split(b"\n")[1].removeprefix(b"id: ").decode()
    assert last_ids(text, len(ids)) == wanted or (text == "" and not any(wanted))


def test_malformed_ids():
    with pytest.raises(HttpError):
        last_ids("x,y", 2)
