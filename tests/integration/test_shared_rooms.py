"""Many rooms on one connection: real servers, real sockets, every store."""

import json
import re
import socket
import sys

import pytest
from support.redises import Redis
from support.servers import LOOPBACK, TWISTD, Raw, Server, upgrade
from support.tokens import SECRET, token
from support.websocket_frames import CLOSE, TEXT, frame

from chatd.transport.subscription import MAX_SUBSCRIPTIONS


@pytest.fixture(params=["memory", "sqlite", "redis"])
def server(request, tmp_path):
    """A server with each of the stores."""
    if request.param != "redis":
        path = f"sqlite:{tmp_path}/log" if request.param == "sqlite" else "memory:"
        with Server(tmp_path, f"--store={path}", admin=LOOPBACK) as server:
            yield server
        return
    folder = tmp_path / "redis"
    folder.mkdir()
    with Redis(folder) as redis, Server(tmp_path, f"--store={redis.url}", admin=LOOPBACK) as server:
        yield server


class Shared(Raw):
    """A client of `/connect` that reads the frames of its rooms."""

    def __init__(self, server, **headers):
        super().__init__(server.port)
        self.send(upgrade("/connect", **headers))
        assert self.head()[0] == 101

    def say(self, *documents):
        self.send(b"".join(frame(TEXT, json.dumps(one).encode()) for one in documents))

    def enter(self, *rooms, **more):
        """Join rooms, and return their histories."""
        self.say(*({"type": "join", "room": room, **more} for room in rooms))
        return self.read(len(rooms))

    def post(self, room, *messages, **more):
        self.say(*({"room": room, "username": "ann", "message": message, **more} for message in messages))

    def read(self, count=1):
        return [self.json() for _ in range(count)]


def data(frames):
    return [(one["room"], one["data"]["message"]) for one in frames]


def test_rooms_on_every_store(server):
    """Rooms are joined, left and resumed, each by itself, and acks follow their messages."""
    with Shared(server) as ann, Shared(server) as bob:
        rooms = [f"r{number}" for number in range(5)]
        assert [one["room"] for one in ann.enter(*rooms)] == rooms
        bob.enter("r0")
        for room in rooms:
            ann.post(room, f"to {room}", label="x")
        heard = ann.read(10)
        for room in rooms:
            of_room = [one for one in heard if one["room"] == room]
            assert [one["type"] for one in of_room] == ["message", "ack"]
            assert of_room[0]["data"]["message"] == f"to {room}"
            assert of_room[0]["id"] == of_room[1]["id"]
        (message,) = bob.read()
        assert message["data"]["message"] == "to r0"
        bob.say({"type": "leave", "room": "r0", "label": "l"})
        assert bob.read() == [{"type": "left", "room": "r0", "label": "l"}]
        ann.post("r0", "missed")
        assert data(ann.read()) == [("r0", "missed")]
        bob.enter("r1")
        (history,) = bob.enter("r0", last_event_id=message["id"])
        assert (history["resumed"], [one["message"] for one in history["data"]]) == (True, ["missed"])


def test_drain(server):
    """Before it closes, each room has what the log held, and each post its ack."""
    with Shared(server) as ann:
        ann.enter("a", "b")
        ann.post("a", *"12345")
        ann.post("b", "6", label="x")
        server.terminate()
        heard = []
        while (found := ann.frame())[0] == TEXT:
            heard.append(json.loads(found[1]))
        assert (found[0], int.from_bytes(found[1][:2])) == (CLOSE, 1012)
        ann.send(frame(CLOSE, found[1]))
    messages = data(one for one in heard if one["type"] == "message")
    assert [text for room, text in messages if room == "a"] == [*"12345"]
    assert [text for room, text in messages if room == "b"] == ["6"]
    assert [one["label"] for one in heard if one["type"] == "ack"] == ["x"]
    server.stopped()


def lag(server):
    """Return how many messages members are behind, in sum."""
    with Raw(server.admin_port) as admin:
        admin.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return float(re.search(rb"\nchatd_cursor_lag_messages_gsum (\S+)", admin.rest())[1])


def test_slow_reader_loses_nothing(server):
    """A client that does not read for a while gets every message of each room, in order, when it does."""
    text = "\U0001f40c" * 490
    sent = {"hot": [*range(4000)], "a": [*range(0, 4000, 20)], "b": [*range(0, 4000, 20)]}
    with Shared(server) as slow, Shared(server) as fast:
        slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        slow.enter(*sent)
        fast.enter(*sent)
        for number in range(0, 4000, 20):
            fast.post("a", f"{number} {text}")
            fast.post("hot", *(f"{number + place} {text}" for place in range(20)))
            fast.post("b", f"{number} {text}")
            fast.read(22)
        assert lag(server) > 100
        heard = {room: [] for room in sent}
        for _ in range(4400):
            (one,) = slow.read()
            heard[one["room"]].append(int(one["data"]["message"].split()[0]))
    assert heard == sent


def events(server, *lines):
    """Read events of two rooms, and return those that arrive until the one with the text `end`."""
    with Raw(server.port) as client:
        client.send("\r\n".join(["GET /events?room=a&room=b HTTP/1.0", "Host: localhost", *lines, "", ""]).encode())
        assert client.head()[0] == 200
        data = b""
        while b'"message":"end"' not in data or not data.endswith(b"\n\n"):
            data += client.take(1)
    return re.findall(r"id: (\S+)\ndata: (.*)\n", data.decode())


def test_one_event_stream(server):
    """A stream of two rooms is broken after any event, and resumes both with its one id."""
    with Shared(server) as ann:
        ann.enter("a", "b")
        for room, text in [("a", "1"), ("b", "2"), ("a", "3"), ("b", "end")]:
            ann.post(room, text)
        ann.read(4)
    found = events(server)
    texts = [[one["message"] for one in json.loads(data)["data"]] for _, data in found]
    assert texts == [["1", "3"], ["2", "end"]]
    epoch = server.epoch
    assert [id_ for id_, _ in found] == [f"{epoch}-2,", f"{epoch}-2,2"]
    again = events(server, f"Last-Event-ID: {epoch}-1,1")
    assert [[one["message"] for one in json.loads(data)["data"]] for _, data in again] == [["3"], ["end"]]
    assert all(json.loads(data)["resumed"] for _, data in again)


def test_a_thousand_rooms(tmp_path):
    """A connection joins a thousand rooms at the default rate, and gets the messages of each."""
    with Server(tmp_path, "--store=memory:", "--rate=20:40", command=(sys.executable, TWISTD)) as server:
        rooms = [f"r{number}" for number in range(MAX_SUBSCRIPTIONS)]
        with Shared(server) as ann:
            assert [one["room"] for one in ann.enter(*rooms)] == rooms
            (refused,) = ann.enter("more")
            assert refused["code"] == "TOO_MANY_ROOMS"
            for room in (rooms[0], rooms[500], rooms[-1]):
                ann.post(room, "hi")
            assert data(ann.read(3)) == [("r0", "hi"), ("r500", "hi"), ("r999", "hi")]
        with Shared(server) as again:
            again.enter(*rooms)


def test_ban_and_narrowed_token(tmp_path):
    """A ban of one room, and a new token that does not permit another, end only these."""
    (tmp_path / "key").write_bytes(SECRET)
    with Server(tmp_path, "--store=memory:", f"--jwt-key={tmp_path}/key", admin=LOOPBACK) as server:
        with Shared(server, Authorization=f"Bearer {token()}") as ann:
            ann.enter("a", "b", "c")
            request = json.dumps({"kind": "ban", "username": "ann", "room": "a", "reason": "spam"}).encode()
            with Raw(server.admin_port) as admin:
                head = f"POST /sanctions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(request)}\r\n"
                admin.send(f"{head}Content-Type: application/json\r\n\r\n".encode() + request)
                assert admin.head()[0] == 201
            words = "You are banned from this room: spam"
            assert ann.read() == [{"type": "left", "room": "a", "message": words, "code": "FORBIDDEN"}]
            ann.say({"type": "token", "token": token(chatd={"read": ["c"], "post": ["c"]}), "label": "t"})
            assert [(one["type"], one.get("room")) for one in ann.read(2)] == [("left", "b"), ("token", None)]
            ann.post("c", "still here")
            assert data(ann.read()) == [("c", "still here")]
        assert not re.search(r"Traceback", server.log.text)
