"""Sanctions in force: what banned and muted clients get, over each transport."""

import json

import pytest
from support.helpers import NEW_YEAR, result_of
from support.houses import House
from support.web_doubles import Transport
from support.websocket_frames import masked
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import Deferred

from chatd.messages import Code
from chatd.room.moderation import Sanction, SanctionKind
from chatd.transport.admission import Addresses, Admission, client_address
from chatd.transport.api import Api
from chatd.transport.connections import EVENT_STREAM, WEBSOCKET
from chatd.transport.framing import CloseCode
from chatd.transport.identity import Identity
from chatd.transport.moderator import sanction_words

HOST = "203.0.113.7"
BANNED = "You are banned from this server"


@pytest.fixture
def house():
    return House()


def wire(host=HOST):
    return Transport(peerAddress=IPv4Address("TCP", host, 1))


# Words


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"kind": "ban"}, "You are banned from this server"),
        ({"kind": "ban", "room": "team"}, "You are banned from this room"),
        ({"kind": "mute", "room": "team", "reason": "spam"}, "You are muted in this room: spam"),
        ({"kind": "mute", "seconds": 1.5}, "You are muted on this server until 2026-01-01T00:00:02Z"),
        ({"kind": "ban", "seconds": 60, "reason": "spam"}, f"{BANNED} until 2026-01-01T00:01:00Z: spam"),
    ],
)
def test_words_do_not_name_the_client(document, words):
    """A client learns for how long and why, and not whether its name, its token or its address is banned."""
    for target, whom in (("username", "ann"), ("subject", "ann"), ("address", "203.0.113.0/24")):
        assert sanction_words(Sanction.parse({**document, target: whom}, "s1", NEW_YEAR)) == words


@pytest.mark.parametrize(
    ("forwarded", "hops", "address"),
    [
        (None, 0, HOST),
        ("198.51.100.1", 0, HOST),
        ("198.51.100.1", 1, "198.51.100.1"),
        ("192.0.2.1, 198.51.100.1", 1, "198.51.100.1"),
        ("192.0.2.1, 198.51.100.1", 2, "192.0.2.1"),
        ("198.51.100.1", 2, HOST),
        ("[2001:db8::1]:4711", 1, "2001:db8::1"),
        ("198.51.100.1:4711", 1, "198.51.100.1"),
        ("2001:db8::1", 1, "2001:db8::1"),
        ("unknown", 1, HOST),
    ],
)
def test_address_of_a_client(forwarded, hops, address):
    """A trusted proxy names the client; what no proxy has added counts for nothing."""
    assert client_address(IPv4Address("TCP", HOST, 1), forwarded, hops) == address


def test_unix_socket_has_no_address():
    assert client_address(UNIXAddress(b"/run/x"), None, 0) is None


# WebSocket


@pytest.mark.parametrize(
    "document",
    [{"address": HOST}, {"address": HOST, "room": "team"}, {"username": "Ann"}, {"address": "203.0.112.0/20"}],
)
def test_handshake_of_a_banned_client_is_refused(house, document):
    house.sanction(**document, seconds=60)
    house.log.slow = True  # the room is not read for it
    refused = house.client("/rooms/team?username=ann", transport=wire())
    assert (refused.status, refused.problem["code"]) == (403, "FORBIDDEN")
    assert refused.problem["detail"].startswith("You are banned from this ")
    assert house.factory.refused_handshakes["403"] == house.moderator.refusals["ban"] == 1
    house.log.slow = False
    house.now.advance(60)
    assert house.client("/rooms/team?username=ann", transport=wire()).status == 101


@pytest.mark.parametrize(
    "document", [{"address": "203.0.113.8"}, {"username": "bob"}, {"address": HOST, "room": "other"}, {"kind": "mute"}]
)
def test_handshake_of_another_client_is_admitted(house, document):
    house.sanction(**({"address": HOST} if "kind" in document else {}), **document)
    assert house.client("/rooms/team?username=ann", transport=wire()).status == 101


def test_forwarded_client_is_refused_behind_a_proxy():
    house = House(hops=1)
    house.sanction(address=HOST)
    behind = {"transport": wire("10.0.0.1")}
    assert house.client("/", b"X-Forwarded-For: 203.0.113.7", **behind).status == 403
    assert house.client("/", b"X-Forwarded-For: 203.0.113.8", **behind).status == 101


def test_ban_during_the_load_of_a_room(house):
    """A client that is not connected yet is refused when its room is loaded."""
    house.log.slow = True
    client = house.client("/rooms/team", transport=wire())
    house.sanction(address=HOST)
    house.log.release()
    house.turn()
    assert client.transport.value().startswith(b"HTTP/1.1 403 ")


def test_new_ban_closes_connections(house):
    """Only connections of banned clients close, with the reason, and at once."""
    ann = house.client("/rooms/team?username=ann", transport=wire())
    bob = house.client("/rooms/team?username=bob", transport=wire("203.0.113.8"))
    elsewhere = house.client("/rooms/other?username=ann", transport=wire())
    house.sanction(address=HOST, room="team", reason="spam")
    assert ann.closing()[0] == (1008, "You are banned from this room: spam")
    assert bob.closing()[0] is elsewhere.closing()[0] is None
    bob.post("hi")
    assert ann.closing()[1] == []
    ann.close(1008)
    assert house.connections.closes[WEBSOCKET, CloseCode.POLICY_VIOLATION] == 1


def test_ban_by_name_closes_its_posters(house):
    ann = house.client("/rooms/team")
    ann.post("hi")
    house.sanction(username="ANN")
    assert ann.closing()[0] == (1008, BANNED)
    house.sanction("s2", username="ANN")  # it is closing already
    assert ann.closing()[0] is None


@pytest.mark.parametrize("document", [{"seconds": -1}, {"kind": "mute"}])
def test_connection_stays(house, document):
    """A mute closes nothing, and neither does a ban that has expired by the time that this node learns of it."""
    ann = house.client("/rooms/team?username=ann")
    late = house.now() + document.pop("seconds", 1)
    one = Sanction.parse({"kind": "ban", **document, "username": "ann"}, "s1", 0)._replace(expires=late)
    house.log.sanctions.add(one)
    assert ann.closing()[0] is None


def test_post_with_a_banned_name_closes(house):
    """It is refused, and nothing of the client is stored."""
    ann = house.client("/rooms/team")
    house.sanction(username="ann", seconds=60)
    ann.closing()
    ann.send(masked(json.dumps({"username": "Ann", "message": "hi", "label": "l"}).encode()) * 2)
    words = f"{BANNED} until 2026-01-01T00:01:00Z"
    error = {"type": "error", "message": words, "code": "FORBIDDEN", "label": "l", "retry_after": 60}
    assert ann.closing() == ((1008, words), [error])
    house.turn()
    assert result_of(house.log.read("team", None, 1)).head == 0


def test_long_reason_is_cut_in_the_close_frame(house):
    """A close frame has room for 123 bytes of text."""
    ann = house.client()
    house.sanction(address="192.0.2.7", reason="\u20ac" * 200)
    (code, reason), _ = ann.closing()
    assert code == 1008
    assert len(reason.encode()) in range(121, 124)


def test_muted_client_reads_and_does_not_post(house):
    """Its connection stays, and so does its name."""
    ann, bob = house.client("/?events=presence&username=zed"), house.client()
    house.sanction(kind="mute", username="ann", seconds=60, reason="spam")
    ann.closing()
    for _ in range(200):  # no count of refused frames closes it
        ann.post("hi", label="l")
    words = "You are muted on this server until 2026-01-01T00:01:00Z: spam"
    error = {"type": "error", "message": words, "code": "FORBIDDEN", "label": "l", "retry_after": 60}
    assert ann.closing() == (None, [error] * 200)
    assert house.site.intake.refusals[Code.FORBIDDEN] == house.moderator.refusals["mute"] == 200
    bob.say(username="bob", message="hello")
    house.turn()
    assert [frame["data"]["message"] for frame in ann.closing()[1] if frame["type"] == "message"] == ["hello"]
    house.now.advance(59.5)
    ann.post("hi")
    assert ann.closing()[1][-1]["retry_after"] == 1
    house.now.advance(0.5)
    ann.post("at last")
    house.turn()
    assert house.log.messages[-1] == "at last"


@pytest.mark.parametrize("kind", SanctionKind)
def test_sanctioned_name_does_not_type(house, kind):
    watcher, ann = house.client("/?events=typing"), house.client()
    house.sanction(kind=kind, username="ann")
    ann.say(type="typing", username="ann")
    house.clock.advance(1)
    assert [frame["type"] for frame in watcher.closing()[1]] == ["history"]
    assert (ann.closing()[0] is not None) is (kind is SanctionKind.BAN)


def test_pages_are_sent_to_a_muted_client(house):
    ann = house.client()
    house.sanction(kind="mute", address="192.0.2.7")
    ann.closing()
    ann.say(type="history", limit=1)
    assert [frame["type"] for frame in ann.closing()[1]] == ["history"]


@pytest.mark.parametrize("kind", SanctionKind)
@pytest.mark.parametrize(("address", "stored"), [(HOST, 64), ("192.0.2.1", 70)])
def test_posts_that_wait_are_dropped(house, kind, address, stored):
    """Frames that have arrived are otherwise stored when a connection closes."""
    ann = house.client("/rooms/a", transport=wire())
    ann.protocol.dataReceived(masked(b'{"username":"ann","message":"hi"}') * 70)  # more than one turn handles
    house.sanction(kind=kind, address=address)
    ann.lose()
    house.turn()
    assert result_of(house.log.read("a", None, 1)).head == stored


# HTTP and event streams


@pytest.mark.parametrize(
    "path", [b"/rooms/team", b"/rooms/team/messages", b"/rooms/team/messages/x", b"/rooms/team/events"]
)
def test_request_of_a_banned_client_is_refused(house, path):
    house.sanction(address=HOST, reason="spam", seconds=60)
    response, text = house.ask(b"GET", path, transport=wire())
    assert (response.status, json.loads(text)["detail"]) == (403, f"{BANNED} until 2026-01-01T00:01:00Z: spam")
    assert json.loads(text)["code"] == "FORBIDDEN"
    assert response.headers["Retry-After"] == "60"
    assert house.ask(b"GET", b"/rooms/team", transport=wire("203.0.113.8"))[0].status == 200
    assert house.ask(b"OPTIONS", path, transport=wire())[0].status == 204


def test_request_behind_a_proxy_is_refused():
    house = House(hops=1)
    house.sanction(address="2001:db8::/32")
    for header, status in ((b"2001:db8::1", 403), (b"2001:db9::1", 200)):
        assert house.get(b"/rooms/team", b"X-Forwarded-For: " + header)[0].status == status


@pytest.mark.parametrize("kind", SanctionKind)
def test_post_over_http_is_refused(house, kind):
    house.sanction(kind=kind, username="ann")
    response, text = house.post(username="ann", message="hi")
    assert response.status == 403
    assert json.loads(text)["detail"].startswith(f"You are {'banned' if kind == 'ban' else 'muted'}")
    assert "Retry-After" not in response.headers
    assert house.post(username="bob", message="hi")[0].status == 201
    assert house.moderator.refusals == {**dict.fromkeys(SanctionKind, 0), kind: 1}


def test_event_stream_of_a_banned_name_is_refused(house):
    house.sanction(username="ann")
    assert house.get(b"/rooms/team/events?username=ann")[0].status == 403
    stream = house.stream(b"/rooms/team/events?username=bob")
    stream.read()
    assert stream.status == 200


def test_new_ban_ends_event_streams(house):
    ann, bob = (house.stream(b"/rooms/team/events?username=" + name) for name in (b"ann", b"bob"))
    house.turn()
    house.sanction(username="ann")
    assert [event.kind for event in ann.read()] == ["history"]
    assert ann.comments == 1
    assert ann.ended
    bob.read()
    assert not bob.ended
    ann.connection.lose()
    assert house.connections.closes[EVENT_STREAM, CloseCode.POLICY_VIOLATION] == 1


def test_ban_during_the_load_of_a_stream(house):
    house.log.slow = True
    stream = house.stream(b"/rooms/team/events?username=ann")
    house.sanction(username="ann")
    house.log.release()
    house.turn()
    response, text = stream.connection.response()
    assert (response.status, json.loads(text)["detail"]) == (403, BANNED)


# Subjects of tokens

SUBJECT = "auth0|7"


class FakeTokens:
    """Every client has a token of one subject, which is known at once or, if `slow`, when the test fires it."""

    cookie = None

    def __init__(self, *, slow=False):
        self.identity = Identity(SUBJECT, "ann", NEW_YEAR)
        self.waiting = Deferred() if slow else None

    def identify(self, *_):
        return self.identity if self.waiting is None else self.waiting

    def verified(self):
        if self.waiting is not None:
            self.waiting.callback(self.identity)


@pytest.fixture(params=[False, True], ids=["known", "verified later"])
def tokens(request, house):
    """The tokens of a server whose clients have the subject SUBJECT."""
    tokens = FakeTokens(slow=request.param)
    house.site.intake.tokens = tokens
    addresses = Addresses(None, 0, house.clock.seconds)
    more = {"listing": house.listing, "exports": house.exports}
    house.site.resource.putChild(b"rooms", Api(house.rooms, house.connections, Admission(), addresses, tokens, **more))
    return tokens


def test_handshake_of_a_banned_subject_is_refused(house, tokens):
    house.sanction(subject=SUBJECT)
    client = house.client("/rooms/team")
    first = client.answered
    tokens.verified()
    assert (first or client.transport.value()).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("request_line", "kind", "words"),
    [
        (b"GET /rooms/team/messages", "ban", BANNED),
        (b"GET /rooms/team/events", "ban", BANNED),
        (b"POST /rooms/team/messages", "ban", BANNED),
        (b"POST /rooms/team/messages", "mute", "You are muted on this server"),
    ],
)
def test_request_of_a_sanctioned_subject_is_refused(house, tokens, request_line, kind, words):
    method, path = request_line.split()
    house.sanction(kind=kind, subject=SUBJECT)
    connection = house.connect()
    connection.transport.clear()
    body = json.dumps({"username": "ann", "message": "hi"}).encode() if method == b"POST" else None
    connection.begin(method, path, b"Content-Type: application/json", body=body)
    tokens.verified()
    response, text = connection.response()
    assert (response.status, json.loads(text)["detail"]) == (403, words)


def test_new_ban_of_a_subject_closes_its_connections(house, tokens):
    """A mute of the subject refuses its posts."""
    client = house.client("/rooms/team")
    tokens.verified()
    client.closing()
    house.sanction("s1", kind="mute", subject=SUBJECT)
    client.post("hi")
    assert client.closing()[1][0]["message"] == "You are muted on this server"
    house.sanction("s2", subject=SUBJECT)
    assert client.closing()[0] == (1008, BANNED)
