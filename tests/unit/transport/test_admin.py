"""Moderation on the admin port, its token, and the lines about it in the log."""

import json

import pytest
from support.helpers import NEW_YEAR, RecordingPoster, result_of
from support.houses import House
from support.web_doubles import Connection, Transport
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import fail
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import Post
from chatd.operate.logging import json_line, text_line
from chatd.room import moderation
from chatd.room.log import LogUnavailable
from chatd.transport import admin, http
from chatd.transport.admin import AUDIT, ModerationApi, check_token
from chatd.transport.heads import parse

OPERATOR = IPv4Address("TCP", "127.0.0.1", 4711)


class AdminHouse(House):
    """A server without sockets, and its admin port."""

    def __init__(self, token=None):
        super().__init__(seed=())
        self.words = iter(f"s{number}" for number in range(1, 1000))
        more = {"listing": self.listing, "exports": self.exports}
        api = ModerationApi(self.log, self.rooms, self.now, lambda: next(self.words), **more)
        self.admin = http.admin(
            lambda: (True, "ready"),
            self.clock,
            drain=lambda: None,
            metrics=lambda: "",
            resources={"sanctions": api, "rooms": api},
            check=lambda head: check_token(head, token),
        )

    def operate(self, method, path, *headers, peer=OPERATOR, body=None):
        """Send a request to the admin port; return the status, the JSON if there is any, and the headers."""
        connection = Connection(self.admin, Transport(peerAddress=peer))
        body = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        response, text = connection.ask(method.encode(), path.encode(), *headers, body=body)
        connection.lose()
        as_json = "json" in (response.headers["content-type"] or "")
        return response.status, json.loads(text) if text and as_json else text, response.headers

    def add(self, **document):
        status, answer, _ = self.operate("POST", "/sanctions", body={"kind": "ban", **document})
        assert status == 201, answer
        return answer


@pytest.fixture
def house():
    return AdminHouse()


def audited(events):
    """Return the sentences of the lines about changes."""
    return [formatEvent(event) for event in events if event["log_namespace"] == AUDIT]


# Sanctions


def test_sanction_is_added_shown_and_lifted(house):
    """It is in force when the answer arrives."""
    document = {"kind": "mute", "username": "ann", "room": "team", "seconds": 60, "reason": "spam"}
    status, sanction, headers = house.operate("POST", "/sanctions", body=document)
    expected = {
        "id": "s1",
        "kind": "mute",
        "username": "ann",
        "room": "team",
        "reason": "spam",
        "expires": "2026-01-01T00:01:00Z",
    }
    assert (status, sanction, headers["location"]) == (201, expected, "/sanctions/s1")
    assert house.post(path=b"/rooms/team/messages", username="ann", message="hi")[0].status == 403
    assert house.operate("GET", "/sanctions")[:2] == (200, {"sanctions": [expected]})
    assert house.operate("GET", "/sanctions/s1")[:2] == (200, expected)
    assert house.operate("HEAD", "/sanctions/s1")[:2] == (200, "")
    assert house.operate("DELETE", "/sanctions/s1")[:2] == (204, "")
    assert house.operate("DELETE", "/sanctions/s1")[0] == 404
    assert house.operate("GET", "/sanctions")[1] == {"sanctions": []}
    assert house.post(path=b"/rooms/team/messages", username="ann", message="hi")[0].status == 201


def test_expired_sanction_is_not_listed(house):
    house.add(address="203.0.113.0/24", seconds=60)
    assert house.add(subject="x")["expires"] is None
    house.now.advance(60)
    assert [one["id"] for one in house.operate("GET", "/sanctions")[1]["sanctions"]] == ["s2"]


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", 'send a JSON object such as {"kind":"ban","username":"ann"}'),
        (b"[]", 'send a JSON object such as {"kind":"ban","username":"ann"}'),
        ({"kind": "ban"}, "name the client by one of username, subject, address"),
        ({"kind": "ban", "address": "0.0.0.0/0"}, "address: 0.0.0.0/0 stands for everyone; name a smaller network"),
    ],
)
def test_wrong_request_is_a_problem(house, body, detail):
    status, problem, headers = house.operate("POST", "/sanctions", body=body)
    assert (status, problem["detail"], headers["content-type"]) == (400, detail, "application/problem+json")
    assert len(house.log.sanctions) == 0


def test_sanctions_are_bounded(house, monkeypatch):
    assert moderation.MAX_SANCTIONS == 10_000
    monkeypatch.setattr(admin, "MAX_SANCTIONS", 2)
    house.add(username="a")
    house.add(username="b")
    status, problem, _ = house.operate("POST", "/sanctions", body={"kind": "ban", "username": "c"})
    assert (status, problem["title"]) == (409, "Conflict")
    assert len(house.log.sanctions) == 2


# Rooms


def test_rooms_are_listed_in_pages(house):
    for room in ("b", "a", "c"):
        house.say("hi", "ho", room=room)
    house.client("/rooms/b")
    status, page, headers = house.operate("GET", "/rooms?limit=2")
    stamp = "2026-01-01T00:00:00.000Z"
    row = {"messages": 2, "bytes": 10, "first": 1, "head": 2, "id": house.id(2), "timestamp": stamp}
    assert (status, page) == (
        200,
        {"rooms": [{"name": "a", "members": 0, **row}, {"name": "b", "members": 1, **row}], "next": "b"},
    )
    assert headers["link"] == '<?after=b&limit=2>; rel="next"'
    rest = house.operate("GET", f"/rooms?limit=2&after={page['next']}")[1]
    assert rest == {"rooms": [{"name": "c", "members": 0, **row}]}
    assert len(house.operate("GET", "/rooms")[1]["rooms"]) == 3


def test_export_names_the_authors(house):
    """Operators export after the drain too, and see nothing else that clients do not."""
    house.log.append("team", Post("ann", "hi", author="subject-a"), RecordingPoster())
    house.say("ho", room="team")
    house.connections.stopping = True
    connection = Connection(house.admin, Transport(peerAddress=OPERATOR))
    connection.begin(b"GET", b"/rooms/team/export")
    house.turn()
    response, body = connection.response()
    found = [json.loads(line) for line in body.splitlines()]
    assert (response.status, response.headers["content-type"]) == (200, "application/x-ndjson")
    assert [document.pop("author", None) for document in found] == ["subject-a", None]
    assert [document["id"] for document in found] == [house.id(1), house.id(2)]
    assert [document["data"]["message"] for document in found] == ["hi", "ho"]
    assert house.operate("HEAD", "/rooms/team/export?after=x")[0] == 400


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1", "", "99999999999999999999"])
def test_wrong_limit_is_refused(house, limit):
    status, problem, _ = house.operate("GET", f"/rooms?limit={limit}" if limit else "/rooms?limit=+")
    assert (status, problem["detail"]) == (400, "limit: a whole number from 1 to 1000")


def test_cleared_room_goes_on_for_its_clients(house):
    """They stay connected, and their ids go on."""
    client = house.client("/rooms/team")
    client.post("one", "two")
    client.read()
    house.add(username="bob", room="team")
    assert house.operate("POST", "/rooms/team/clear")[:2] == (200, {"room": "team", "removed": 2})
    assert house.get(b"/rooms/team/messages")[1].count('"data":[]') == 1
    client.post("three")
    assert [frame["id"] for frame in client.read()] == [house.id(3)]
    assert len(house.log.sanctions) == 1


def test_deleted_room_is_not_listed(house):
    """Its sanctions are lifted, and its numbers are never used again."""
    house.say("hi", room="team")
    for room in ("team", "other"):
        house.add(username="bob", room=room)
    house.add(username="bob")
    status, answer, _ = house.operate("DELETE", "/rooms/team")
    assert (status, answer) == (200, {"room": "team", "removed": 1, "lifted": 1})
    assert house.operate("GET", "/rooms")[1] == {"rooms": []}
    assert [one.room for one in house.log.sanctions] == ["other", None]
    assert result_of(house.log.read("team", None, 1)).head == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/rooms/Team", 404, None),
        ("DELETE", "/rooms/team%2Fx", 404, None),
        ("DELETE", "/rooms/team/messages/abcd-1", 404, None),
        ("GET", "/sanctions/unknown", 404, None),
        ("DELETE", "/sanctions/s1/clear", 404, None),
        ("GET", "/rooms/team/", 404, None),
        ("GET", "/rooms/team", 405, "DELETE"),
        ("GET", "/rooms/team/messages/abcd-1", 405, "DELETE"),
        ("OPTIONS", "/rooms/team/messages/abcd-1", 405, "DELETE"),
        ("OPTIONS", "/rooms/team", 405, "DELETE"),
        ("DELETE", "/rooms/team/messages/1", 404, None),
        ("DELETE", "/rooms/team/messages/", 404, None),
        ("DELETE", "/sanctions/s1/messages/abcd-1", 404, None),
        ("PUT", "/rooms/team/clear", 405, "POST"),
        ("PUT", "/rooms", 405, "GET, HEAD"),
        ("POST", "/rooms/team/export", 405, "GET, HEAD"),
        ("GET", "/rooms/Team/export", 404, None),
        ("PUT", "/sanctions", 405, "GET, HEAD, POST"),
        ("PUT", "/sanctions/s1", 405, "DELETE, GET, HEAD"),
    ],
)
def test_other_requests_are_refused(house, method, path, status, allow):
    house.add(username="ann")
    answered, problem, headers = house.operate(method, path)
    assert (answered, problem["status"], headers["allow"]) == (status, status, allow)


def test_clients_do_not_reach_the_admin_port(house):
    """The port for clients has none of these resources, and no web page may use the admin port."""
    assert house.ask(b"DELETE", b"/rooms/team")[0].status == 405
    assert house.post(path=b"/rooms/team/clear")[0].status == 404
    assert house.get(b"/sanctions")[0].status == 404
    assert house.operate("GET", "/sanctions", b"Origin: https://evil.example")[0] == 403


def test_operator_removes_a_message(house):
    """The text of anyone's message is erased, and its clients get the removal."""
    client = house.client("/rooms/team")
    client.post("a secret")
    client.read()
    status, answer, _ = house.operate("DELETE", f"/rooms/team/messages/{house.id(1)}")
    assert (status, answer) == (200, {"type": "ack", "id": house.id(2)})
    house.turn()
    (removal,) = client.read()
    assert (removal["replaces"], removal["removed"]) == (house.id(1), True)
    assert (removal["data"]["username"], removal["data"]["message"]) == ("operator", "[removed]")
    assert "a secret" not in house.get(b"/rooms/team/messages")[1]
    again = house.operate("DELETE", f"/rooms/team/messages/{house.id(1)}")
    assert (again[0], again[1]["code"]) == (409, "NOT_REPLACEABLE")


# Faults


@pytest.mark.parametrize(
    ("method", "path", "fails"),
    [
        ("POST", "/sanctions", "sanction"),
        ("DELETE", "/sanctions/s1", "lift"),
        ("POST", "/rooms/team/clear", "clear_room"),
        ("DELETE", "/rooms/team", "clear_room"),
        ("DELETE", "/rooms/team", "lift"),
        ("GET", "/rooms", "list_rooms"),
    ],
)
def test_failing_store_is_a_problem(house, monkeypatch, method, path, fails):
    """Nothing that was not changed is in the audit log."""
    house.add(username="ann")
    monkeypatch.setattr(house.log, fails, lambda *_: fail(LogUnavailable("the disk is full")))
    with capturedLogs() as events:
        status, problem, _ = house.operate(
            method, path, body={"kind": "ban", "username": "bob"} if "POST" in method else None
        )
    assert (status, problem["code"]) == (503, "UNAVAILABLE")
    assert ("try again" in problem["detail"]) is (method != "GET")
    assert audited(events) == []
    assert "the disk is full" in formatEvent(events[-1])


# The token


@pytest.mark.parametrize(
    "header",
    [None, b"Bearer wrong", b"Basic c2VjcmV0", b"secret", b"Bearer", b"Bearer secret, Bearer secret", b"Bearer \xff"],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/sanctions", "/rooms", "/healthz/x", "/nothing"])
def test_request_without_the_token_is_refused(header, path):
    house = AdminHouse(b"secret")
    headers = [b"Authorization: " + header] if header else []
    status, problem, answered = house.operate("GET", path, *headers)
    assert (status, answered["www-authenticate"]) == (401, 'Bearer realm="chatd admin"')
    assert problem["detail"] == "the admin port needs its token: send Authorization: Bearer TOKEN"


def test_request_with_the_token_is_answered():
    house = AdminHouse(b"secret")
    for header in (b"Authorization: Bearer secret", b"authorization: bearer  secret "):
        assert house.operate("GET", "/sanctions", header)[0] == 200
    assert house.operate("POST", "/drain", b"Authorization: Bearer secret", body=b"")[0] == 202


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthz?x=1"])
def test_health_checks_need_no_token(path):
    """Load balancers have none."""
    assert AdminHouse(b"secret").operate("GET", path)[0] == 200


def test_port_without_a_token_asks_for_none():
    check_token(parse(b"GET /sanctions HTTP/1.1\r\nHost: x"), None)


# The audit log


def test_every_change_is_one_line(house):
    """It names the operator, the action, the clients, the room, the end and the reason, also as text."""
    house.say("hi", room="team")
    with capturedLogs() as events:
        house.add(username="ann", room="team", seconds=60, reason="it's {spam}")
        house.add(kind="mute", address="203.0.113.7")
        house.operate("DELETE", f"/rooms/team/messages/{house.id(1)}")
        house.operate("DELETE", f"/rooms/team/messages/{house.id(1)}")
        house.operate("POST", "/rooms/team/clear")
        house.operate("DELETE", "/rooms/team")
        house.operate("DELETE", "/sanctions/s2", peer=UNIXAddress(None))
        house.operate("GET", "/sanctions")
        house.operate("GET", "/rooms")
    assert audited(events) == [
        "127.0.0.1:4711: ban s1 of username 'ann' in team until 2026-01-01T00:01:00Z: \"it's {spam}\"",
        "127.0.0.1:4711: mute s2 of address '203.0.113.7/32' in all rooms until it is lifted: ''",
        f"127.0.0.1:4711: remove the message {house.id(1)} of team",
        "127.0.0.1:4711: clear the room team, which held 2 messages",
        "127.0.0.1:4711: delete the room team, which held 0 messages",
        "127.0.0.1:4711: lift s1 of username 'ann' in team until 2026-01-01T00:01:00Z: \"it's {spam}\"",
        "UNIXAddress(None): lift s2 of address '203.0.113.7/32' in all rooms until it is lifted: ''",
    ]
    (first, *_) = [event for event in events if event["log_namespace"] == AUDIT]
    line = json.loads(json_line(first | {"log_time": NEW_YEAR}))
    assert (line["time"], line["level"], line["system"]) == ("2026-01-01T00:00:00.000Z", "info", "chatd.audit")
    assert line["fields"] == {
        "operator": "127.0.0.1:4711",
        "action": "ban",
        "id": "s1",
        "kind": "ban",
        "target": "username",
        "whom": "ann",
        "room": "team",
        "expires": "2026-01-01T00:01:00Z",
        "reason": "it's {spam}",
    }
    text = text_line(first | {"log_time": NEW_YEAR})
    assert text.startswith("2026-01-01T00:00:00.000Z info chatd.audit: 127.0.0.1:4711: ban s1 ")
    assert text.count("\n") == 1


def test_operator_disconnects_before_the_answer(house):
    """The audit log contains the change all the same."""
    connection = Connection(house.admin, Transport(peerAddress=OPERATOR))
    with capturedLogs() as events:
        connection.begin(b"POST", b"/sanctions", body=b'{"kind":"ban","username":"ann"}')
        connection.lose()
    assert len(audited(events)) == 1
