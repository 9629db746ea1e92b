"""Clients of a server that takes tokens, over every transport."""

import json

import pytest
from support.houses import House
from support.tokens import HeldKeys, token, verifier

BEARER = b"Authorization: Bearer "
NARROW = {"read": ["main", "team-*"], "post": ["main"]}


def bearer(**claims):
    return BEARER + token(**claims).encode()


@pytest.fixture
def house():
    return House(tokens=verifier())


@pytest.fixture
def keys():
    return HeldKeys()


@pytest.fixture
def waiting(keys):
    """A server that has no keys yet."""
    return House(tokens=verifier(keys))


def status_of(house, *headers):
    """Return the statuses with which a client is answered on every path that needs a token."""
    return [
        house.client("/", *headers).status,
        house.get(b"/rooms/main/messages", *headers)[0].status,
        house.get(f"/rooms/main/messages/{house.id(1)}".encode(), *headers)[0].status,
        house.post(*headers, username="ann", message="hi")[0].status,
        house.ask(b"HEAD", b"/rooms/main/events", *headers)[0].status,
    ]


# Tokens


def test_valid_token_is_admitted(house):
    assert status_of(house, bearer()) == [101, 200, 200, 201, 200]


@pytest.mark.parametrize(
    "headers",
    [(), (bearer(secret=b"x" * 40),), (BEARER + b"x.y.z",), (bearer(lasts=-61),)],
    ids=["none", "forged", "garbage", "expired"],
)
def test_invalid_token_is_401(house, headers):
    assert status_of(house, *headers) == [401] * 5
    response, text = house.get(b"/rooms/main/messages", *headers)
    assert response.getheader("WWW-Authenticate") == 'Bearer error="invalid_token"' if headers else "Bearer"
    assert json.loads(text)["code"] == "TOKEN_REFUSED"


def test_page_and_preflight_need_no_token(house):
    assert house.get(b"/rooms/main")[0].status == 200
    response, _ = house.ask(b"OPTIONS", b"/rooms/main/messages", b"Origin: http://chat.example")
    assert response.status == 204
    assert response.getheader("Access-Control-Allow-Headers").startswith("Authorization, ")
    assert "WWW-Authenticate" in response.getheader("Access-Control-Expose-Headers")
    assert response.getheader("Access-Control-Allow-Credentials") is None


def test_token_as_subprotocol(house):
    client = house.client("/", b"Sec-WebSocket-Protocol: chat.v1, bearer." + token().encode())
    assert client.status == 101
    assert b"Sec-WebSocket-Protocol: chat.v1\r\n" in client.answered + b"\r\n"


def test_token_as_cookie():
    house = House(tokens=verifier(cookie="session"), origins=["https://chat.example"])
    cookie = b"Cookie: a=b; session=" + token().encode()
    assert status_of(house, cookie) == [101, 200, 200, 201, 200]
    response, _ = house.get(b"/rooms/main/messages", cookie, b"Origin: https://chat.example")
    assert response.getheader("Access-Control-Allow-Credentials") == "true"
    assert house.get(b"/rooms/main/messages", cookie, b"Origin: https://evil.example")[0].status == 403


def test_handshake_waits_for_the_key(waiting, keys):
    """Frames that follow the handshake are handled after it."""
    client = waiting.client("/", bearer())
    assert client.answered == b""
    assert client.transport.producerState == "paused"
    keys.come()
    waiting.turn()
    assert client.transport.producerState == "producing"
    assert b"HTTP/1.1 101 " in client.transport.value()


@pytest.mark.parametrize("path", [b"/rooms/main/messages", b"/rooms/none/messages/x"])
def test_request_waits_for_the_key(waiting, keys, path):
    connection = waiting.connect()
    connection.begin(b"GET", path, bearer())
    assert connection.transport.value() == b""
    keys.come()
    assert connection.response()[0].status == (404 if b"none" in path else 200)


def test_head_of_events_waits_for_the_key(waiting, keys):
    connection = waiting.connect()
    connection.begin(b"HEAD", b"/rooms/main/events", bearer())
    keys.come()
    assert connection.response(b"HEAD")[0].status == 200


def test_client_that_leaves_before_the_key_comes(waiting, keys):
    connection = waiting.connect()
    connection.begin(b"GET", b"/rooms/main/messages", bearer())
    connection.lose()
    keys.come()
    assert connection.transport.value() == b""


def test_no_key_is_503(waiting, keys):
    connection = waiting.connect()
    connection.begin(b"GET", b"/rooms/main/messages", bearer())
    keys.come(None)
    response, _ = connection.response()
    assert (response.status, response.getheader("Retry-After")) == (503, "2")


# Permissions


def test_rooms_that_may_be_read(house):
    """Reading a room needs the permission on every path."""
    narrow = bearer(chatd=NARROW)
    assert [house.client(path, narrow).status for path in ("/", "/rooms/team-a", "/rooms/other")] == [101, 101, 403]
    for path in (b"/rooms/other/messages", b"/rooms/other/messages/abcdef-1", b"/rooms/other/events"):
        response, text = house.get(path, narrow)
        assert (response.status, json.loads(text)["code"]) == (403, "FORBIDDEN")
    assert house.get(b"/rooms/team-a/messages", narrow)[0].status == 200


def test_rooms_in_which_one_may_post(house):
    narrow = bearer(chatd=NARROW)
    assert house.post(narrow, username="ann", message="hi")[0].status == 201
    response, text = house.post(narrow, path=b"/rooms/team-a/messages", username="ann", message="hi")
    assert (response.status, json.loads(text)["code"]) == (403, "FORBIDDEN")
    client = house.client("/rooms/team-a", narrow)
    client.read()
    client.post("hi", label="a")
    assert client.read() == [
        {
            "type": "error",
            "message": "The token does not permit posting in this room.",
            "code": "FORBIDDEN",
            "label": "a",
        }
    ]


def test_posting_without_reading(house):
    assert house.post(bearer(chatd={"read": []}), username="ann", message="hi")[0].status == 201


def test_username_is_that_of_the_token(house):
    client = house.client("/", bearer())
    client.read()
    client.say(username="bob", message="hi")
    client.say(type="typing", username="bob")
    assert [frame["message"] for frame in client.read()] == ["The username is not that of the token."] * 2
    client.post("mine")
    house.turn()
    assert [frame["data"]["message"] for frame in client.read()] == ["mine"]
    assert house.post(bearer(), username="bob", message="hi")[0].status == 403
    assert house.client("/?username=bob", bearer()).status == 403


def test_presence_names_the_token(house):
    client = house.client("/?events=presence", bearer())
    house.pass_time(2)
    assert {"type": "presence", "data": {"count": 1, "users": ["ann"]}} in client.read()


def test_waiting_posts_of_another_name_are_dropped(house):
    """A client that leaves has its own posts stored, and no others."""
    client = house.client("/", bearer())
    client.read()
    client.protocol.stop_reading()
    client.post("x")
    house.turn()
    assert [frame["data"]["message"] for frame in client.read()] == ["x"]


# Renewal


def renewal(client, text, label="t"):
    client.say(type="token", token=text, label=label)
    return client.read()


def test_renewal(house):
    """The new token is in force, and the old one would have expired."""
    client = house.client("/", bearer(lasts=-50))
    client.read()
    (answer,) = renewal(client, token())
    assert answer.keys() == {"type", "label", "expires"}
    assert (answer["type"], answer["label"]) == ("token", "t")
    house.pass_time(20)
    assert client.closing()[0] is None


def test_renewal_with_another_username(house):
    """The subject is the same, and the username of its posts is the new one."""
    house = House(tokens=verifier(username="name"))
    client = house.client("/", bearer(sub="1", name="ann"))
    client.read()
    renewal(client, token("1", name="anna"))
    client.say(username="anna", message="hi")
    house.turn()
    assert [frame["data"]["username"] for frame in client.read()] == ["anna"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.y.z", "The token is not accepted: a valid token is required."),
        (token("bob"), "The token is of another subject."),
    ],
    ids=["garbage", "another subject"],
)
def test_refused_renewal(house, text, message):
    """The old token stays in force."""
    client = house.client("/", bearer())
    client.read()
    assert renewal(client, text) == [{"type": "error", "message": message, "code": "TOKEN_REFUSED", "label": "t"}]
    client.post("hi")
    house.turn()
    assert len(client.read()) == 1


def test_renewal_that_loses_the_room(house):
    client = house.client("/", bearer())
    client.read()
    client.say(type="token", token=token(chatd={"read": ["other"]}))
    assert client.closing()[0] == (1008, "the token does not permit reading this room")


@pytest.mark.parametrize(("kind", "code"), [("ban", 1008), ("mute", None)])
def test_renewal_to_a_sanctioned_username(kind, code):
    """A token with a banned username ends the connection, as it would have refused the handshake; a mute does not."""
    house = House(tokens=verifier(username="name"))
    house.sanction(kind=kind, username="Bob", reason="spam")
    client = house.client("/", bearer(sub="1", name="ann"))
    client.read()
    client.say(type="token", token=token("1", name="bob"))
    found, frames = client.closing()
    assert (found and found[0]) == code
    if code:
        assert (found[1], frames) == ("You are banned from this server: spam", [])
        assert house.get(b"/rooms/main/messages")[0].status == 401
    else:
        assert [frame["type"] for frame in frames] == ["token"]


def test_renewal_without_tokens():
    client = House().client()
    client.read()
    assert renewal(client, token()) == [
        {"type": "error", "message": "This server takes no tokens.", "code": "TOKEN_REFUSED", "label": "t"}
    ]


def test_renewal_waits_for_the_key(waiting, keys):
    """Frames behind it wait, and a client may leave meanwhile."""
    keys.come()
    staying, leaving = (waiting.client("/", bearer()) for _ in range(2))
    keys.keyring = None
    for client in (staying, leaving):
        client.read()
        client.say(type="token", token=token())
        client.post("later")
        assert client.read() == []
    leaving.lose()
    keys.come()
    waiting.turn()
    assert [frame["type"] for frame in staying.read()][:1] == ["token"]


def test_refused_renewal_after_the_client_left(waiting, keys):
    keys.come()
    client = waiting.client("/", bearer())
    keys.keyring = None
    client.read()
    client.say(type="token", token=token(secret=b"y" * 40))
    client.lose()
    keys.come()
    assert waiting.forgotten


# Expiry


def test_expiry_closes_the_connection(house):
    """A token is accepted a minute longer than it says."""
    client = house.client("/", bearer(lasts=-50))
    client.read()
    house.pass_time(8)
    assert client.closing()[0] is None
    house.pass_time(4)
    assert client.closing()[0] == (1008, "the token has expired")


def test_expiry_ends_an_event_stream(house):
    stream = house.stream(b"/rooms/main/events", bearer(lasts=-50))
    assert len(house.connections.connected) == 1
    house.pass_time(12)
    stream.read()
    assert stream.ended
