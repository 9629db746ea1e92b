"""The list of rooms for clients with a token, and the members of a room over HTTP."""

import json

import pytest
from support.houses import House
from support.tokens import token, verifier
from support.web_doubles import Transport
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed

from chatd.room.log import LogUnavailable
from chatd.room.presence import Occupancy

BEARER = b"Authorization: Bearer "
STAMP = "2026-01-01T00:00:00.000Z"
ROOMS = "a", "b", "team-1", "team-2", "team-3"


class OtherNodes:
    """A lobby that knows the members at other nodes."""

    def __init__(self):
        self.rooms = {}
        self.down = False

    def follow(self, listener):
        self.listener = listener

    def report(self, room, here, typing):
        """Share nothing."""

    def elsewhere(self, room):
        return fail(LogUnavailable("no Redis")) if self.down else succeed(self.rooms.get(room, []))


@pytest.fixture
def house():
    house = House(seed=(), tokens=verifier())
    for room in ROOMS:
        house.say("hi", "ho", room=room)
    return house


@pytest.fixture
def lobby(monkeypatch):
    """The other nodes of every house that is made afterwards."""
    lobby = OtherNodes()
    monkeypatch.setattr("support.stores.FaultyStore.lobby", lobby, raising=False)
    return lobby


def bearer(**claims):
    return BEARER + token(**claims).encode()


def ask(house, path="/rooms", **claims):
    """Return the status, the document and the headers of an answer to a client with a token."""
    response, body = house.get(path.encode(), bearer(**claims))
    return response.status, json.loads(body), response.headers


def names(answered):
    return [room["name"] for room in answered[1]["rooms"]]


def walk(house, limit, **claims):
    """Follow the links from the first page, and return the names of each page."""
    path, pages = f"/rooms?limit={limit}", []
    while path:
        status, document, headers = ask(house, path, **claims)
        assert status == 200
        pages.append([room["name"] for room in document["rooms"]])
        path = document.get("next") and f"/rooms?after={document['next']}&limit={limit}"
        assert headers["link"] == (path and f'<{path.removeprefix("/rooms")}>; rel="next"')
    return pages


# The list


def test_list_describes_each_room(house):
    house.client("/rooms/b", bearer())
    status, document, _ = ask(house)
    assert (status, names((status, document))) == (200, [*ROOMS])
    row = {"messages": 2, "bytes": 10, "first": 1, "head": 2, "id": house.id(2), "timestamp": STAMP}
    assert document["rooms"][:2] == [{"name": "a", "members": 0, **row}, {"name": "b", "members": 1, **row}]


def test_list_has_only_rooms_that_the_token_may_read(house):
    assert names(ask(house, chatd={"read": ["team-*", "b", "none"]})) == ["b", "team-1", "team-2", "team-3"]
    assert names(ask(house, chatd={"read": []})) == []


def test_pages_are_full_although_rooms_are_left_out(house):
    assert walk(house, 2, chatd={"read": ["team-*"]}) == [["team-1", "team-2"], ["team-3"]]
    assert walk(house, 2) == [["a", "b"], ["team-1", "team-2"], ["team-3"]]


def test_list_leaves_out_rooms_that_are_not_allowed():
    house = House(seed=(), tokens=verifier(), rooms=["team-*"])
    for room in ROOMS:
        house.say("hi", room=room)
    assert names(ask(house)) == ["team-1", "team-2", "team-3"]


def test_list_leaves_out_rooms_of_a_ban(house):
    """Its page is shorter, and the next page follows all the same."""
    house.sanction(subject="ann", room="team-1")
    assert walk(house, 3) == [["a", "b"], ["team-2", "team-3"]]
    house.sanction("s2", subject="ann")
    assert ask(house)[:1] == (403,)
    assert names(ask(house, sub="bob")) == [*ROOMS]


def test_list_without_tokens_names_the_admin_port():
    status, body = House().get(b"/rooms")
    detail = "without tokens the rooms are listed for operators only: GET /rooms on the admin port"
    assert (status.status, json.loads(body)["detail"]) == (403, detail)


def test_list_needs_a_valid_token(house):
    assert house.get(b"/rooms")[0].status == 401
    response, _ = house.ask(b"POST", b"/rooms", bearer(), body=b"")
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
    assert house.ask(b"OPTIONS", b"/rooms")[0].status == 204
    response, body = house.ask(b"HEAD", b"/rooms", bearer())
    assert (response.status, body) == (200, "")


def test_one_list_is_read_at_a_time(house, monkeypatch):
    """However many clients ask, and although an earlier one has failed."""
    waiting = []

    def list_rooms(*_):
        waiting.append(Deferred())
        return waiting[-1]

    monkeypatch.setattr(house.log, "list_rooms", list_rooms)
    connections = [house.connect() for _ in range(3)]
    for connection in connections:
        connection.begin(b"GET", b"/rooms", bearer())
    assert len(waiting) == 1
    waiting[0].errback(LogUnavailable("no disk"))
    assert len(waiting) == 2
    connections[2].lose()
    waiting[1].callback([])
    waiting[2].callback([])
    assert [connection.response()[0].status for connection in connections[:2]] == [503, 200]


def test_list_counts_as_a_read():
    house = House(seed=(), tokens=verifier(), rate=(1, 1))
    assert [ask(house)[0] for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("limit", ["0", "101", "x", "-1"])
def test_wrong_limit_is_refused(house, limit):
    status, problem, _ = ask(house, f"/rooms?limit={limit}")
    assert (status, problem["detail"]) == (400, "limit: a whole number from 1 to 100")


def test_list_while_the_log_is_down(house, monkeypatch):
    monkeypatch.setattr(house.log, "list_rooms", lambda *_: fail(LogUnavailable("no disk")))
    assert ask(house)[0] == 503


# Presence


def test_presence_is_that_of_the_first_frame(house):
    path = "/rooms/team-1/presence"
    assert ask(house, path)[:2] == (200, {"type": "presence", "data": {"count": 0, "users": []}})
    house.client("/rooms/team-1", bearer(sub="bob"))
    watcher = house.client("/rooms/team-1?events=presence", bearer())
    house.turn()
    assert (
        ask(house, path)[1] == watcher.read()[1] == {"type": "presence", "data": {"count": 2, "users": ["ann", "bob"]}}
    )
    assert ask(house, "/rooms/main/presence")[1]["data"]["count"] == 0


def test_presence_of_many_is_a_number(house):
    for number in range(201):
        house.client("/rooms/a", bearer(sub=f"u{number}"))
    assert ask(house, "/rooms/a/presence")[1]["data"] == {"count": 201}


def test_presence_needs_the_permission_to_read(house):
    assert ask(house, "/rooms/a/presence", chatd={"read": ["b"]})[0] == 403
    assert house.get(b"/rooms/a/presence")[0].status == 401
    house.sanction(address="192.0.2.7", room="a")
    peer = IPv4Address("TCP", "192.0.2.7", 4321)
    response, _ = house.ask(b"GET", b"/rooms/a/presence", bearer(), transport=Transport(peerAddress=peer))
    assert response.status == 403


def test_members_of_all_nodes_are_counted(lobby):
    """A room need not be open at this node."""
    house = House(seed=(), tokens=verifier())
    for room in ("a", "b"):
        house.say("hi", room=room)
    lobby.rooms = {"a": [Occupancy(2, frozenset({"bob", "cy"})), Occupancy(1, frozenset({"bob"}))]}
    house.client("/rooms/a", bearer())
    assert ask(house, "/rooms/a/presence")[1]["data"] == {"count": 4, "users": ["ann", "bob", "cy"]}
    assert [room["members"] for room in ask(house)[1]["rooms"]] == [4, 0]
    house.client("/rooms/b", bearer())
    assert [room["members"] for room in ask(house)[1]["rooms"]] == [4, 1]


def test_presence_while_the_other_nodes_are_unknown(lobby):
    house = House(seed=(), tokens=verifier())
    house.say("hi", room="a")
    lobby.down = True
    for path in ("/rooms/a/presence", "/rooms"):
        assert ask(house, path)[:2] == (
            503,
            {
                "title": "Service Unavailable",
                "status": 503,
                "detail": "the log cannot be read now",
                "code": "UNAVAILABLE",
            },
        )
