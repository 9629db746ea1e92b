"""Edits and removals over WebSocket, HTTP and event streams: who may do them, and what everyone sees."""

import json

import pytest
from support.houses import House

from chatd.transport import api
from chatd.transport.identity import ANYONE, NO_ROOMS, AllowedRooms, Identity, Permissions

ANN, BOB = Identity("subject-a", "ann"), Identity("subject-b", "bob")
MODERATOR = Identity("subject-m", "mod", permissions=Permissions(moderate=AllowedRooms(frozenset({"main"}))))
READER = Identity("subject-a", "ann", permissions=Permissions(post=NO_ROOMS))
FORBIDDEN = "Only its author or a moderator may replace a message."
NOT_REPLACEABLE = "The message is an edit or was removed, and cannot be replaced."


@pytest.fixture
def house():
    return House(seed=())


@pytest.fixture
def client(house):
    """A function that connects a client with an identity, and reads its history."""

    def connect(identity, target="/"):
        one = house.client(target)
        one.protocol.session.identity = identity
        one.history = one.read()[0]
        return one

    return connect


@pytest.fixture
def requests_of(monkeypatch):
    """A function that gives every request an identity, as a token would."""
    return lambda identity: monkeypatch.setattr(api, "ANYONE", identity)


def test_edit_over_websocket(house, client):
    """Everyone gets the edit as a message, and its author the ack."""
    ann, bob = client(ANN), client(BOB)
    ann.post("helo")
    ann.post("hello", replaces=house.id(1), label="e")
    message, ack = ann.read()[1:]
    assert message["data"].keys() == {"username", "message", "timestamp"}
    assert (message["id"], message["replaces"], message["data"]["message"]) == (house.id(2), house.id(1), "hello")
    assert ack == {"type": "ack", "label": "e", "id": house.id(2)}
    assert bob.read()[1] == message
    history = client(BOB).history
    assert [one["message"] for one in history["data"]] == ["hello", "hello"]
    assert history["replaced"] == {"1": house.id(2)}
    assert history["replaces"] == {"2": house.id(1)}


def test_removal_over_websocket(house, client):
    """A removal carries the username of the token, and leaves the name in the presence as it is."""
    ann = client(ANN, "/?events=presence&username=ann")
    ann.post("secret")
    ann.say(type="remove", id=house.id(1), label="r")
    ann.say(type="remove", id=house.id(1), label="r")
    frames = [frame for frame in ann.read() if frame["type"] != "presence"]
    assert (frames[1]["removed"], frames[1]["replaces"]) == (True, house.id(1))
    assert [frames[1]["data"][name] for name in ("username", "message")] == ["ann", "[removed]"]
    assert [frame.get("duplicate") for frame in frames[2:]] == [None, True]
    assert ann.protocol.session.name == "ann"
    assert "secret" not in json.dumps(client(BOB).history)


@pytest.mark.parametrize("identity", [ANYONE, BOB])
def test_others_may_not_edit(house, client, identity):
    """Neither another subject nor a client without a token replaces a message, whatever its username is."""
    client(ANN).post("mine")
    other = client(identity)
    other.say(username=identity.username or "ann", message="yours", replaces=house.id(1), label="e")
    other.say(type="remove", id=house.id(1), label="r")
    assert other.read() == [
        {"type": "error", "message": FORBIDDEN, "code": "FORBIDDEN", "label": label} for label in ("e", "r")
    ]
    assert house.log.messages == ["mine"]


def test_reader_may_not_remove(house, client):
    """The author needs the permission to post, for a removal too."""
    client(ANN).post("mine")
    reader = client(READER)
    reader.say(type="remove", id=house.id(1))
    assert reader.read()[0]["message"] == "The token does not permit posting in this room."


def test_nobody_edits_without_tokens(house, client):
    one = client(ANYONE)
    one.post("mine")
    one.post("more", replaces=house.id(1))
    assert one.read()[1]["code"] == "FORBIDDEN"


def test_moderator_removes(house, client):
    """A moderator may remove everything in the rooms of the claim, and in no other."""
    client(ANN).post("rude")
    client(ANN, "/rooms/other").post("rude")
    client(MODERATOR).say(type="remove", id=house.id(1))
    assert house.log.messages == ["[removed]", "[removed]"]
    elsewhere = client(MODERATOR, "/rooms/other")
    elsewhere.say(type="remove", id=house.id(1))
    assert elsewhere.read()[0]["code"] == "FORBIDDEN"


def test_edit_that_names_another_message(house, client):
    ann = client(ANN)
    ann.post("one")
    ann.post("two", replaces=house.id(1))
    ann.read()
    ann.post("three", replaces=house.id(2), label="e")
    ann.post("four", replaces=house.id(9))
    ann.post("five", replaces="other-1")
    assert ann.read() == [
        {"type": "error", "message": NOT_REPLACEABLE, "code": "NOT_REPLACEABLE", "label": "e"},
        *[{"type": "error", "message": "There is no message of this id.", "code": "UNKNOWN_ID"}] * 2,
    ]


def test_event_stream_has_the_same_json(house, client):
    stream = house.stream()
    ann = client(ANN)
    ann.post("one")
    ann.post("two", replaces=house.id(1))
    ann.say(type="remove", id=house.id(1))
    house.turn()
    assert [event.json for event in stream.read()[1:]] == ann.read()


# HTTP


def test_edit_over_http(house, requests_of):
    """The message then shows its newest text, and the page names the edit."""
    requests_of(ANN)
    assert house.post(username="ann", message="helo")[0].status == 201
    response, body = house.post(username="ann", message="hello", replaces=house.id(1))
    assert (response.status, json.loads(body)) == (201, {"type": "ack", "id": house.id(2)})
    assert response.headers["location"] == f"messages/{house.id(2)}"
    one = json.loads(house.get(f"/rooms/main/messages/{house.id(1)}".encode())[1])
    assert (one["id"], one["replaced"], one["data"]["message"]) == (house.id(1), house.id(2), "hello")
    page = json.loads(house.get(b"/rooms/main/messages")[1])
    assert (page["replaced"], page["replaces"]) == ({"1": house.id(2)}, {"2": house.id(1)})


def test_removal_over_http(house, requests_of):
    """DELETE answers with the ack of the removal; a retry with the same key is a duplicate."""
    requests_of(ANN)
    house.post(username="ann", message="secret")
    path = f"/rooms/main/messages/{house.id(1)}".encode()
    for duplicate in ({}, {"duplicate": True}):
        response, body = house.ask(b"DELETE", path, b"Idempotency-Key: r")
        assert response.status == 200
        assert json.loads(body) == {"type": "ack", "label": "r", "id": house.id(2)} | duplicate
        assert "location" not in response.headers
    for where in (path, b"/rooms/main/messages"):
        body = house.get(where)[1]
        assert "secret" not in body
        assert '"removed":' in body
    assert house.log.messages == ["[removed]", "[removed]"]


def refused(answered):
    response, body = answered
    document = json.loads(body)
    assert document["status"] == response.status
    return response.status, document.get("code")


def test_refusals_over_http(house, requests_of):
    requests_of(ANN)
    house.post(username="ann", message="one")
    house.post(username="ann", message="two", replaces=house.id(1))

    def remove(id_):
        return refused(house.ask(b"DELETE", f"/rooms/main/messages/{id_}".encode()))

    assert remove(house.id(2)) == (409, "NOT_REPLACEABLE")
    assert remove(house.id(9)) == remove("other-1") == remove("nonsense") == (404, "UNKNOWN_ID")
    assert refused(house.post(username="ann", message="x", replaces=house.id(2))) == (409, "NOT_REPLACEABLE")
    assert refused(house.post(username="ann", message="x", replaces="7")) == (400, None)
    requests_of(BOB)
    assert remove(house.id(1)) == (403, "FORBIDDEN")
    assert refused(house.post(username="bob", message="x", replaces=house.id(1))) == (403, "FORBIDDEN")
    requests_of(READER)
    assert remove(house.id(1)) == (403, "FORBIDDEN")


def test_request_without_a_token_may_not_remove(house):
    house.post(username="ann", message="one")
    answered = house.ask(b"DELETE", f"/rooms/main/messages/{house.id(1)}".encode())
    assert refused(answered) == (403, "FORBIDDEN")
