"""A connection is a member of a room: over in-memory transports, with an injected clock."""

import json
from http import HTTPStatus

import pytest
from support.helpers import HEAD, PING_SECONDS, Turns
from support.stores import opened_store
from support.transports import Encrypted, Tcp, Wire
from support.websocket_frames import close_code, frame_at, masked, read_frames
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import succeed
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.logger import formatEvent
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure

from chatd.operate.drain import TICK_SECONDS, Drain
from chatd.room.presence import ROUND_SECONDS
from chatd.room.registry import Registry
from chatd.transport import frames, http
from chatd.transport.admission import Admission, Rate, origin_pattern, room_pattern
from chatd.transport.autobahn_adapter import MAX_FRAGMENTS
from chatd.transport.connections import CLOSE_SECONDS, HANDSHAKE_SECONDS, STALL_SECONDS
from chatd.transport.frames import MAX_MESSAGE, STANDARD
from chatd.transport.heads import MAX_HEAD
from chatd.transport.intake import FRAMES_PER_LOOK, FRAMES_PER_TURN, SECONDS_PER_TURN
from chatd.transport.session import MAX_REFUSALS
from chatd.transport.websocket import ChatFactory

HANDSHAKE = HEAD + b"\r\n\r\n"
PAGE = {"type": "history"}


def short(target="/", *headers):
    """Return a handshake of the plain form."""
    return b"\r\n".join([HEAD.replace(b"GET / ", b"GET %b " % target.encode()), *headers, b"", b""])


def long(target="/", *headers):
    """Return a handshake of another form, which Autobahn answers."""
    return short(target, *headers).replace(
        b"Connection: keep-alive, Upgrade", b"Connection: keep-alive\r\nConnection: Upgrade"
    )


WAYS = [short, long]


@pytest.fixture(params=WAYS)
def way(request):
    """The ways through a handshake, between which a client sees no difference."""
    return request.param


@pytest.fixture
def store():
    return opened_store()


@pytest.fixture
def rooms(store, clock):
    return Registry(store, frames, clock, 100)


@pytest.fixture
def server(clock, rooms, connections):
    """A function that makes a factory of connections under the operator's rules."""

    def server(rooms=rooms, *, allowed=(), origins=(), rate=None):
        return ChatFactory(
            rooms=rooms,
            connections=connections,
            admission=Admission([room_pattern(text) for text in allowed], [origin_pattern(text) for text in origins]),
            site=http.site(lambda: (True, "ready"), clock, {}, rate),
            reactor=clock,
        )

    return server


@pytest.fixture
def factory(server):
    return server()


class Client:
    """The other end of one connection."""

    def __init__(self, factory, transport=None):
        self.transport = transport or Tcp()
        self.protocol = factory.buildProtocol(self.transport.getPeer())
        self.transport.protocol = self.protocol
        self.protocol.makeConnection(self.transport)

    @property
    def now(self):
        """The protocol that has the connection now."""
        return self.transport.protocol

    def sends(self, data):
        self.now.dataReceived(data)

    def joins(self, handshake=HANDSHAKE):
        self.sends(handshake)
        answer, _, rest = self.transport.read().partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 ")
        return read_frames(rest)

    def says(self, *documents):
        """Send all documents in one piece, as TCP delivers them."""
        self.sends(b"".join(masked(json.dumps(document).encode()) for document in documents))

    def posts(self, message="hi", username="ann", **more):
        self.says({"username": username, "message": message} | more)

    def reads(self):
        return read_frames(self.transport.read())

    def reads_close(self):
        """Return the code of the close frame that is all there is to read."""
        data = self.transport.read() + (self.transport.buffered() if isinstance(self.transport, Tcp) else b"")
        frame = frame_at(data)
        assert frame.first == 0x88
        return close_code(frame.payload)

    def goes(self, reason=ConnectionDone):
        self.now.connectionLost(Failure(reason()))


@pytest.fixture
def client(factory):
    return Client(factory)


# Joining


@pytest.mark.parametrize("transport", [Tcp, Wire, Encrypted])
def test_client_gets_the_answer_and_the_history_at_once(factory, transport):
    client = Client(factory, transport())
    (history,) = client.joins()
    assert history["type"] == "history"
    assert factory.getConnectionCount() == 1
    assert client.transport.streaming is (transport is not Tcp)


def test_it_does_not_matter_how_a_handshake_is_cut(client):
    for byte in HANDSHAKE[:-1]:
        client.sends(bytes([byte]))
    assert client.transport.read() == b""
    client.sends(HANDSHAKE[-1:])
    assert client.transport.read().startswith(b"HTTP/1.1 101 ")


def test_frames_right_behind_the_handshake_are_read(client, clock, way):
    client.sends(way() + masked(b'{"username":"ann","message":"hi"}'))
    clock.advance(0)
    frames = read_frames(client.transport.read().partition(b"\r\n\r\n")[2])
    assert [frame["type"] for frame in frames] == ["history", "message"]


def test_chat_v1_is_chosen_when_it_is_offered(client):
    client.sends(HEAD + b"\r\nSec-WebSocket-Protocol: x, chat.v1\r\n\r\n")
    assert b"Sec-WebSocket-Protocol: chat.v1\r\n" in client.transport.read()


def test_other_subprotocols_are_not(client):
    client.sends(HEAD + b"\r\nSec-WebSocket-Protocol: x\r\n\r\n")
    assert b"Sec-WebSocket-Protocol" not in client.transport.read()


def test_handshake_of_another_form(client, clock):
    """Autobahn accepts it, and the client joins."""
    client.sends(long("/", b"Sec-WebSocket-Protocol: chat.v1"))
    answer, _, rest = client.transport.read().partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"chat.v1" in answer
    assert read_frames(rest)[0]["type"] == "history"
    client.posts()
    clock.advance(0)
    assert client.reads()[0]["type"] == "message"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"GET / ", b"GET /nowhere ", 404),
        (b"Version: 13", b"Version: 99", 400),
        (b"b25jZQ==", b"x", 400),
        (b"GET / HTTP/1.1", b"POST / HTTP/1.1", 405),
        (b"GET / HTTP/1.1", b"GET / HTTP/1.0", 505),
        (b"Host: localhost:8085\r\n", b"", 400),
    ],
)
def test_rejected_handshake_gets_the_reason(client, events, old, new, code):
    client.sends(HANDSHAKE.replace(old, new))
    head, _, body = client.transport.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % code)
    assert b"\r\nContent-Length: %d" % len(body) in head
    assert b"\r\nContent-Type: application/problem+json\r\n" in head
    problem = json.loads(body)
    assert problem["status"] == code
    assert problem["title"]
    assert problem["detail"]
    assert client.transport.disconnecting
    assert [(event["code"], event["phrase"]) for event in events if "code" in event] == [(code, problem["title"])]
    client.goes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET / HTTP/1.1", b"GET /?token=secret HTTP/1.0"),
        (b"GET / HTTP/1.1", b"GET /?token=secret&username=%ff HTTP/1.1"),
        (b"GET / HTTP/1.1", b"GET /?token=secret#secret HTTP/1.1"),
        (b"GET / HTTP/1.1", b"GET secret HTTP/1.1"),
        (b"GET / HTTP/1.1", b"GET /?token=secret"),
        (b"GET / HTTP/1.1", b"secret / HTTP/1.1"),
        (b"localhost:8085", b"localhost:secret"),
        (b"Connection: keep-alive, Upgrade", b"Connection: secret"),
        (b"Version: 13", b"Version: secret"),
        (b"dGhlIHNhbXBsZSBub25jZQ==", b"secret"),
        (b"Upgrade: websocket", b"Upgrade: websocket, secret\r\nAuthorization: secret"),
    ],
)
def test_log_of_a_refused_handshake(client, events, old, new):
    """The line quotes nothing of the request."""
    handshake = HANDSHAKE.replace(old, new)
    assert handshake != HANDSHAKE
    client.sends(handshake)
    status = int(client.transport.read().split()[1])
    if status == 101:
        client.goes()
    else:
        (text,) = [formatEvent(event) for event in events if "code" in event]
        assert text == f"192.0.2.7:4321 refused: {status} {HTTPStatus(status).phrase}"
    assert not [event for event in events if "secret" in f"{event} {formatEvent(event)}"]


def refusal(client, handshake):
    """Return the status and the reason with which a handshake is refused."""
    client.sends(handshake)
    head, _, body = client.transport.read().partition(b"\r\n\r\n")
    assert b" 101 " not in head
    problem = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % problem["status"])
    assert client.transport.disconnecting
    assert client.protocol.session.room is None
    return problem["status"], problem["detail"]


def test_unsupported_websocket_version(client):
    """The answer names the supported versions."""
    client.sends(HANDSHAKE.replace(b"Version: 13", b"Version: 99"))
    assert b"\r\nSec-WebSocket-Version: " in client.transport.read().partition(b"\r\n\r\n")[0]


def test_head_without_end_is_refused(client):
    client.sends(b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD)
    assert client.transport.read().startswith(b"HTTP/1.1 431 ")


def test_long_head_that_ends_is_refused(client):
    client.sends(HEAD + b"\r\nX: " + b"x" * MAX_HEAD + b"\r\n\r\n")
    assert client.transport.read().startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_request_without_an_upgrade_is_the_web_sites(factory, transport):
    client = Client(factory, transport())
    client.sends(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    client.sends(b"\r\n")
    assert isinstance(client.now, http.HTTPChannel)
    answer = client.transport.value()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"ok\n")
    assert factory.getConnectionCount() == 0
    assert [*factory.connections.handshakes] == []
    client.goes()


def test_behind_a_wrapper_the_web_site_is_put_in_the_wrapper(factory):
    wrapper = ProtocolWrapper(WrappingFactory(factory), factory.buildProtocol(None))
    wire = Wire()
    wrapper.makeConnection(wire)
    wrapper.dataReceived(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert wire.value().endswith(b"ok\n")
    assert isinstance(wrapper.wrappedProtocol, http.HTTPChannel)
    wrapper.connectionLost(Failure(ConnectionDone()))


# A connection that proxies keep


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADED = b"HTTP/1.1 101 "


def written(client):
    """Return all bytes written; the transport must hold all of them, so that none overtakes another."""
    if isinstance(client.transport, Tcp):
        assert client.transport.socket.sent == b"", "it would overtake what the transport holds"
    return client.transport.buffered()


@pytest.mark.parametrize("transport", [Tcp, Wire])
@pytest.mark.parametrize("cut", [(requests, pieces) for requests in (1, 3) for pieces in (1, 7, 1000)])
def test_upgrade_after_plain_requests(factory, clock, way, transport, cut):
    """The WebSocket's bytes follow the answers to the requests."""
    requests, pieces = cut
    connections = factory.connections
    client, other = Client(factory, transport()), Client(factory)
    data = HEALTH * requests + way("/rooms/team?username=ann", b"Sec-WebSocket-Protocol: chat.v1")
    data += masked(b'{"username":"ann","message":"hi"}')
    for begin in range(0, len(data), pieces):
        client.sends(data[begin : begin + pieces])
    other.joins(way("/rooms/team"))
    clock.advance(0)
    *answers, last = written(client).split(b"ok\n")
    assert len(answers) == requests
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
    head, _, frames = last.partition(b"\r\n\r\n")
    assert head.startswith(UPGRADED)
    assert b"chat.v1" in head
    assert [frame["type"] for frame in read_frames(frames)] == ["history", "message"]
    assert client.now.session.name == "ann"
    assert factory.getConnectionCount() == 2
    assert connections.connected == {client.now, other.now}
    assert [*connections.handshakes] == []
    other.posts("ho")
    clock.advance(0)
    assert clock.getDelayedCalls() == []
    assert [frame["data"]["message"] for frame in read_frames(written(client))] == ["ho"]
    client.goes()
    assert connections.connected == {other.now}
    assert factory.site.channels == set()


def test_buffered_transport_pauses_the_connection(factory, clock):
    client = Client(factory)
    client.sends(HEALTH + HANDSHAKE)
    clock.advance(0)
    written(client)
    assert client.transport.streaming
    client.transport.producer.pauseProducing()
    client.posts("1")
    clock.advance(0)
    assert written(client) == b""
    client.transport.producer.resumeProducing()
    clock.advance(0)
    assert [frame["data"]["message"] for frame in read_frames(written(client))] == ["1"]


def test_behind_a_wrapper_it_is_put_in_the_wrapper(factory, connections):
    wrapper = ProtocolWrapper(WrappingFactory(factory), factory.buildProtocol(None))
    wire = Wire()
    wrapper.makeConnection(wire)
    wrapper.dataReceived(HEALTH)
    wrapper.dataReceived(HANDSHAKE[:50])
    assert isinstance(wrapper.wrappedProtocol, http.HTTPChannel)
    wrapper.dataReceived(HANDSHAKE[50:])
    assert connections.connected == {wrapper.wrappedProtocol}
    assert UPGRADED in wire.value()
    wrapper.connectionLost(Failure(ConnectionDone()))
    assert connections.connected == set()
    assert factory.getConnectionCount() == 0


@pytest.mark.parametrize(
    ("handshake", "status"),
    [(short("/nowhere"), 404), (long("/?username=%ff"), 400), (short().replace(b"13", b"7"), 400)],
)
def test_refused_upgrade_after_plain_requests(factory, connections, clock, handshake, status):
    """It gets the reason, and the connection ends."""
    client = Client(factory)
    client.sends(HEALTH + handshake)
    clock.advance(0)
    _, _, answer = written(client).partition(b"ok\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert client.transport.disconnecting
    assert factory.refused_handshakes == {f"{status}": 1}
    client.goes()
    assert [*connections.handshakes] == []
    assert factory.getConnectionCount() == 0


def test_upgrade_after_plain_requests_while_stopping(factory, connections, way):
    client = Client(factory)
    client.sends(HEALTH)
    connections.stopping = True
    client.sends(way())
    assert b"ok\nHTTP/1.1 503 " in written(client)
    assert client.transport.disconnecting


def test_it_has_as_long_as_any_other_when_the_log_is_slow(held, clock, server, connections, pass_time):
    client = Client(server(Registry(held, frames, clock, 100)))
    client.sends(HEALTH + HANDSHAKE)
    clock.advance(0)
    assert client.transport.producerState == "paused"
    pass_time(HANDSHAKE_SECONDS)
    assert client.transport.aborted
    assert UPGRADED not in written(client)
    client.goes()
    held.answer()
    assert not connections.connected


@pytest.mark.parametrize("named", ["factory", "site"])
def test_under_tls_http_1_1_is_spoken_and_nothing_else(factory, named):
    either = factory if named == "factory" else factory.site
    assert IProtocolNegotiationFactory.providedBy(either)
    assert either.acceptableProtocols() == [b"http/1.1"]


# Requests to join


@pytest.mark.parametrize("room", ["main", "a", "0", "team-1_b", 64 * "a"])
def test_client_comes_into_the_room_that_the_path_names(factory, clock, way, room):
    here, elsewhere = Client(factory), Client(factory)
    here.joins(way(f"/rooms/{room}"))
    elsewhere.joins(way("/rooms/elsewhere"))
    here.posts("hi")
    clock.advance(0)
    assert [frame["data"]["message"] for frame in here.reads()] == ["hi"]
    assert elsewhere.reads() == []
    assert here.protocol.session.room.name == room


def test_root_is_the_room_main(factory, clock, way):
    one, other = Client(factory), Client(factory)
    one.joins(way("/"))
    other.joins(way("/rooms/main?"))
    one.posts("hi")
    clock.advance(0)
    assert len(other.reads()) == 1


@pytest.mark.parametrize(
    "path",
    [
        *("/rooms", "/rooms/", "/rooms/main/", "/rooms//", "/main", "/rooms/..", "/rooms/../main", "/rooms/a.b"),
        *("/rooms/%2f", "/rooms/%6dain", "/rooms/%2e%2e", "/rooms/main%0a", "/rooms/MAIN", "/rooms/m%d0%b0in"),
        *("/rooms/" + 65 * "a", "/rooms/-a", "/rooms/_a", "/rooms/main/messages", "/rooms/main/events"),
        *("/rooms/main;x", "/rooms/main;", "/;x", "//rooms/main", "//localhost/rooms/main", "/rooms/main/?"),
    ],
)
def test_any_other_path_is_404(client, way, path):
    assert refusal(client, way(path)) == (404, "there is no room here; connect to / or to /rooms/NAME")


def test_path_of_other_than_ascii_is_400(client):
    assert refusal(client, HANDSHAKE.replace(b"GET / ", b"GET /rooms/m\xd0\xb0in "))[0] == 400


@pytest.mark.parametrize(
    ("target", "status"), [("/rooms/team-1", 101), ("/rooms/lobby", 101), ("/", 404), ("/rooms/main", 404)]
)
def test_allowed_rooms(server, way, target, status):
    client = Client(server(allowed=["team-*", "lobby"]))
    client.sends(way(target))
    assert client.transport.read().startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    ("last", "resumed", "messages"),
    [
        ("k7Q2-1", True, ["2", "3"]),
        ("k7Q2-3", True, []),
        ("k7Q2-4", False, ["1", "2", "3"]),
        ("p9Zx-1", False, ["1", "2", "3"]),
        ("", None, ["1", "2", "3"]),
        ("nonsense&last_event_id=k7Q2-2", True, ["3"]),
    ],
)
def test_resume_from_the_last_id(factory, way, last, resumed, messages):
    writer = Client(factory)
    writer.joins()
    for message in "123":
        writer.posts(message)
    (history,) = Client(factory).joins(way(f"/?last_event_id={last}"))
    assert history.get("resumed") == resumed
    assert [entry["message"] for entry in history["data"]] == messages


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("last_event_id=1042", "last_event_id: an id is an epoch and a number, such as k7Q2xe-1042"),
        ("last_event_id=k7Q2-1&last_event_id=x", "last_event_id: an id is an epoch and a number, such as k7Q2xe-1042"),
        ("events=x", "events: choose of presence, typing"),
        ("events=presence,", "events: choose of presence, typing"),
        ("username=" + 31 * "a", "username: 1 to 30 characters"),
        ("username=" + 31 * "%f0%9f%91%8b", "username: 1 to 30 characters"),
        ("username=%ff", "the query is not UTF-8"),
        ("colour=%ff", "the query is not UTF-8"),
    ],
)
def test_what_cannot_be_asked_for_is_400_and_why(client, way, query, detail):
    assert refusal(client, way(f"/?{query}")) == (400, detail)


@pytest.mark.parametrize("query", ["", "events=&username=&last_event_id=", "colour=red", "token=%00&x=y;z", "&&=&"])
def test_what_is_empty_or_unknown_is_not_asked_for(client, clock, way, query):
    (history,) = client.joins(way(f"/?{query}"))
    assert "resumed" not in history
    clock.pump([0, ROUND_SECONDS])
    assert client.reads() == []


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("username=ann", "ann"),
        ("username=" + 30 * "%f0%9f%91%8b", 30 * "\N{WAVING HAND SIGN}"),
        ("username=%D0%90%D0%BD%D1%8F+1", "Аня 1"),
        ("username=ann&username=bob", "bob"),
    ],
)
def test_client_is_known_by_the_name_that_it_came_with(client, clock, way, query, name):
    client.joins(way(f"/?events=presence,typing&{query}"))
    clock.advance(0)
    assert client.reads() == [{"type": "presence", "data": {"count": 1, "users": [name]}}]


def test_events_reach_only_watchers(factory, clock, way):
    asked, asked_half, not_asked = (Client(factory) for _ in range(3))
    asked.joins(way("/?events=presence,typing&username=ann"))
    asked_half.joins(way("/?events=typing"))
    not_asked.joins(way())
    Client(factory).joins()
    not_asked.says({"type": "typing", "username": "bob"})
    not_asked.posts()
    clock.pump([0, ROUND_SECONDS, ROUND_SECONDS])
    assert [{frame["type"] for frame in client.reads()} for client in (asked, asked_half, not_asked)] == [
        {"presence", "typing", "message"},
        {"typing", "message"},
        {"message"},
    ]


@pytest.mark.parametrize(
    "origin",
    [
        *("https://chat.example", "https://a.example.org", "http://a.b.example.org", "http://localhost:3000"),
        *("https://team.example.net", "null"),
    ],
)
def test_page_of_the_operators_may_connect(server, way, origin):
    client = Client(server(origins=ORIGINS))
    assert client.joins(way("/", b"Origin: " + origin.encode()))


ORIGINS = ["https://chat.example", "*.example.org", "http://localhost:3000", "HTTPS://*.Example.NET", "null"]


@pytest.mark.parametrize(
    "origin",
    [
        *("http://chat.example", "https://chat.example:8443", "https://chat.example.attacker.net", "http://localhost"),
        *(
            "https://evil.example.org.attacker.net",
            "https://xexample.org",
            "https://example.org",
            "http://a.example.net",
        ),
        *("https://a.example.org:8443", "https://attacker.net/.example.org", "https://attacker.net", "http://null"),
    ],
)
def test_page_elsewhere_may_not(server, way, origin):
    client = Client(server(origins=ORIGINS))
    assert refusal(client, way("/", b"Origin: " + origin.encode())) == (403, "this page may not connect here")


def test_where_null_is_not_named_a_page_of_no_origin_may_not(server, way):
    assert refusal(Client(server(origins=["https://chat.example"])), way("/", b"Origin: null"))[0] == 403


def test_handshake_without_origin_is_allowed(server, way):
    assert Client(server(origins=["https://chat.example"])).joins(way())


def test_two_origins_are_none(server):
    client = Client(server(origins=["https://chat.example"]))
    origins = (b"Origin: https://chat.example", b"Origin: https://attacker.net")
    assert refusal(client, short("/", *origins))[0] in (400, 403)


@pytest.mark.parametrize("origin", ["https://anything.example", "null", "http://localhost:3000"])
def test_every_page_may_connect_by_a_star(server, way, origin):
    assert Client(server(origins=["*"])).joins(way("/", b"Origin: " + origin.encode()))


@pytest.mark.parametrize(
    ("origin", "status"), [("http://localhost:8085", 101), ("http://localhost:3000", 403), ("null", 403)]
)
def test_page_of_the_same_host_by_default(client, way, origin, status):
    """By default, pages of the host in the Host header may connect, and no others."""
    client.sends(way("/", b"Origin: " + origin.encode()))
    assert client.transport.read().startswith(b"HTTP/1.1 %d " % status)


@pytest.fixture
def held():
    """A store whose reads wait for the test."""
    store = opened_store()
    store.slow = True
    return store


@pytest.fixture(params=WAYS)
def waiting(request, held, clock, server):
    """A client that waits for the log."""
    client = Client(server(Registry(held, frames, clock, 100)))
    client.sends(request.param())
    return client


def test_load_of_a_room_stops_the_reading(held, waiting):
    assert waiting.transport.producerState == "paused"
    assert waiting.transport.read() == b""
    held.answer()
    assert waiting.transport.producerState == "producing"
    assert waiting.transport.read().startswith(b"HTTP/1.1 101 ")


def test_frames_behind_the_handshake_wait_for_the_room(held, clock, server, way):
    client = Client(server(Registry(held, frames, clock, 100)))
    client.sends(way() + masked(b'{"username":"ann","message":"hi"}'))
    held.answer()
    clock.advance(0)
    texts = read_frames(client.transport.read().partition(b"\r\n\r\n")[2])
    assert [frame["type"] for frame in texts] == ["history", "message"]


def test_bytes_that_arrive_while_the_room_is_loaded(held, waiting, clock):
    """Transports that cannot stop at once bring frames meanwhile, which wait for the room and are no request."""
    waiting.sends(masked(b'{"username":"ann","message":"hi"}'))
    assert waiting.transport.read() == b""
    held.answer()
    clock.advance(0)
    texts = read_frames(waiting.transport.read().partition(b"\r\n\r\n")[2])
    assert [frame["type"] for frame in texts] == ["history", "message"]


def test_log_that_is_down_is_503_and_when_to_try_again(held, waiting, events):
    held.fail()
    answer = waiting.transport.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 2\r\n" in answer
    assert "the log cannot be read: {error}" in [event["log_format"] for event in events]


def test_handshake_timeout_during_the_load_of_a_room(held, waiting, clock, connections):
    """The client does not join."""
    clock.advance(HANDSHAKE_SECONDS)
    connections.check_deadlines()
    assert waiting.transport.aborted
    held.answer()
    assert waiting.transport.read() == b""
    assert waiting.protocol.session.room is None
    assert not connections.connected


# Posting


def test_message_goes_to_all_and_its_sender(factory, clock):
    ann, bob = Client(factory), Client(factory)
    ann.joins()
    bob.joins()
    ann.posts("hi")
    clock.advance(0)
    (message,) = ann.reads()
    assert message["data"] == {"username": "ann", "message": "hi", "timestamp": "2026-01-01T00:00:00.000Z"}
    assert bob.reads() == [message]


def test_error_goes_to_the_sender_alone_and_closes_nothing(factory, clock):
    ann, bob = Client(factory), Client(factory)
    ann.joins()
    bob.joins()
    ann.sends(masked(b'{"username":"ann"}') + masked(b"nonsense"))
    ann.posts()
    clock.advance(0)
    assert [frame.get("message", frame["type"]) for frame in ann.reads()] == [
        'Validation error: "message" is required',
        "Invalid JSON format.",
        "message",
    ]
    assert [frame["type"] for frame in bob.reads()] == ["message"]


def test_it_does_not_matter_how_frames_are_cut(client, clock):
    client.joins()
    for byte in masked(b'{"username":"ann","message":"1"}') + masked(b'{"username":"ann","message":"2"}'):
        client.sends(bytes([byte]))
    clock.advance(0)
    assert [frame["data"]["message"] for frame in client.reads()] == ["1", "2"]


def test_fragmented_message_with_a_ping_between(client, clock):
    client.joins()
    text = '{"username":"ann","message":"жук"}'.encode()
    client.sends(masked(text[:29], first=0x01))
    client.sends(masked(b"are you there", first=0x89) + masked(text[29:], first=0x80))
    assert client.transport.read() == b"\x8a\x0dare you there"
    clock.advance(0)
    assert client.reads()[0]["data"]["message"] == "жук"
    client.posts("plain again")
    clock.advance(0)
    assert client.reads()[0]["data"]["message"] == "plain again"


def test_two_messages_in_fragments_do_not_mix(factory, clock):
    one, other = Client(factory), Client(factory)
    one.joins()
    other.joins()
    text = '{"username":"ann","message":"жук"}'.encode()
    one.sends(masked(text[:29], first=0x01))
    other.sends(masked(text[:30], first=0x01))
    one.sends(masked(text[29:], first=0x80))
    other.sends(masked(text[30:], first=0x80))
    clock.advance(0)
    assert [frame["data"]["message"] for frame in one.reads()] == ["жук", "жук"]


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (masked(b"\x00", first=0x82), 1003),
        (masked(b'{"username":"\xff"}'), 1007),
        (masked(b"\xff", first=0x01), 1007),
        (masked(b"x" * (MAX_MESSAGE + 1)), 1009),
        (masked(b"", first=0x01) + masked(b"", first=0x00) * MAX_FRAGMENTS, 1008),
        (b"\x81\x05hello", 1002),
        (masked(b"x", first=0x83), 1002),
        (masked(b"x", first=0xC1), 1002),
        (masked(b"x", first=0x80), 1002),
        (masked(b"x" * 126, first=0x89), 1002),
        (masked(b"\x00\x01", first=0x88), 1002),
    ],
    ids=[
        *("binary", "utf8", "utf8-fragment", "big", "fragments", "unmasked", "opcode", "rsv", "continuation"),
        *("long-ping", "close-code"),
    ],
)
def test_protocol_violations_close_with_a_code(client, clock, frame, code):
    client.joins()
    client.sends(frame + masked(b'{"username":"ann","message":"too late"}'))
    clock.pump([0] * (MAX_FRAGMENTS // FRAMES_PER_TURN))
    assert client.reads_close() == code
    client.posts()
    clock.advance(0)
    assert client.transport.read() == b""
    assert [*client.protocol.factory.connections.closings] == [client.protocol]


def failures(events):
    return [
        (event["connection"], event["peer"], event["room"], event["code"], event["reason"])
        for event in events
        if "connection failed" in event["log_format"]
    ]


def test_violation_after_the_close_is_logged_once(client, events):
    """Autobahn logs nothing of its own when it drops the connection."""
    client.joins()
    client.sends(b"\xc1\x80" + bytes(4) + b"\xc1\x80" + bytes(4))
    assert client.reads_close() == 1002
    assert client.transport.disconnecting
    assert {event["log_namespace"].partition(".")[0] for event in events} == {"chatd"}
    assert [code for *_, code, _ in failures(events)] == [1002] * 2


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_protocol_violation_gets_a_reason(factory, events, pass_time, transport):
    """The client may answer the close."""
    client = Client(factory, transport())
    client.joins()
    why = "why " + "\N{WAVING HAND SIGN}" * 50
    client.protocol._fail_connection(1008, why)
    data = client.transport.read()
    assert data[:4] == bytes([0x88, len(data) - 2]) + b"\x03\xf0"
    assert len(data) <= 2 + 125
    assert data[4:].decode() == "why " + "\N{WAVING HAND SIGN}" * 29
    assert client.protocol.failedByMe
    assert not client.transport.disconnecting
    assert failures(events) == [(1, "192.0.2.7:4321" if transport is Tcp else events[0]["peer"], "main", 1008, why)]
    client.sends(masked(b"\x03\xf0", first=0x88))
    assert client.transport.disconnecting


def test_protocol_violation_while_closing(client, events):
    """The client is dropped."""
    client.joins()
    client.protocol.restart(0.5)
    assert client.reads_close() == 1012
    client.sends(b"\x81\x05hello")
    assert client.transport.read() == b""
    assert client.transport.disconnecting
    assert [(room, code) for _, _, room, code, _ in failures(events)] == [("main", 1002)]


def test_fail_after_the_connection_is_lost(client, events):
    client.joins()
    client.goes()
    client.protocol._fail_connection()
    assert client.transport.read() == b""
    assert failures(events) == []


@pytest.mark.parametrize("payload", [b"\x03\xe8secret\xff", b"\x00\x01secret"])
def test_log_of_an_invalid_close_frame(client, events, payload):
    client.joins()
    client.sends(masked(payload, first=0x88))
    assert client.transport.read()[0] == 0x88
    assert len(failures(events)) == 1
    assert not [event for event in events if "secret" in f"{event} {formatEvent(event)}"]


def test_many_messages_of_many_fragments_are_fine(client, clock):
    client.joins()
    for _ in range(3):
        text = b'{"username":"ann","message":"hi"}'
        client.sends(masked(text[:1], first=0x01) + masked(b"", first=0x00) * 60 + masked(text[1:], first=0x80))
    clock.advance(0)
    assert len(client.reads()) == 3


def test_post_that_cannot_be_kept_is_answered_with_an_error(client, store):
    client.joins()
    store.held = True
    client.posts()
    client.posts()
    store.fail()
    assert client.reads() == [
        {"type": "error", "message": "The message was not stored; try again.", "code": "UNAVAILABLE"}
    ]
    client.goes()
    store.fail()
    assert client.transport.read() == b""


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_ack_follows_the_message(factory, clock, way, transport):
    """The poster alone gets the acknowledgement, after the message."""
    ann, bob = Client(factory, transport()), Client(factory, transport())
    ann.joins(way())
    bob.joins(way())
    ann.posts("hi", label="c81f")
    clock.advance(0)
    message, ack = ann.reads()
    assert (message["id"], ack) == ("k7Q2-1", {"type": "ack", "label": "c81f", "id": "k7Q2-1"})
    assert bob.reads() == [message]
    ann.posts("hi", label="c81f")
    assert ann.reads() == [ack | {"duplicate": True}]
    ann.posts("ho", label="c81f")
    assert [frame["code"] for frame in ann.reads()] == ["LABEL_REUSED"]


def test_retries_after_a_lost_connection_are_stored_once(factory, clock, store):
    ann = Client(factory)
    ann.joins()
    ann.posts("1", label="a")
    ann.posts("2", label="b")
    ann.goes(ConnectionLost)
    again = Client(factory)
    again.joins()
    again.posts("1", label="a")
    again.posts("2", label="b")
    again.posts("3", label="c")
    clock.advance(0)
    assert [frame.get("duplicate", frame["type"]) for frame in again.reads()] == [True, True, "message", "ack"]
    assert store.messages == ["1", "2", "3"]


def in_pieces(payload):
    size = 1000
    pieces = [payload[begin : begin + size] for begin in range(0, len(payload), size)]
    firsts = [0x01, *[0x00] * (len(pieces) - 2), 0x80]
    return b"".join(masked(piece, first=first) for piece, first in zip(pieces, firsts, strict=True))


@pytest.mark.parametrize("frame", [masked, in_pieces])
@pytest.mark.parametrize(
    "big",
    [
        ("label", (1 << 20) * "a"),
        *((name, MAX_MESSAGE * "a") for name in ("label", "username", "message", "before", "limit", "type", "extra")),
    ],
    ids=lambda big: f"{big[0]}-{len(big[1])}",
)
def test_message_too_big(client, clock, store, big, frame):
    """It closes with 1009 in every form, and earlier posts are not lost."""
    client.joins()
    client.posts("before")
    text = json.dumps({"username": "ann", "message": "hi"} | dict([big])).encode()
    client.sends(frame(text) + masked(b'{"username":"ann","message":"too late"}'))
    clock.advance(0)
    assert client.reads_close() == 1009
    assert store.messages == ["before"]


@pytest.mark.parametrize("frame", [masked, in_pieces])
def test_what_is_as_large_as_may_be_is_only_refused(client, clock, frame):
    client.joins()
    head = b'{"username":"ann","message":"hi","label":"'
    client.sends(frame(head + b"a" * (MAX_MESSAGE - len(head) - 2) + b'"}'))
    (error,) = client.reads()
    assert error["message"] == 'Validation error: "label" length must be less than or equal to 64 characters long'
    assert "label" not in error
    client.posts("hi")
    clock.advance(0)
    assert len(client.reads()) == 1


def test_each_connection_has_a_limit_of_its_own(server, clock):
    factory = server(rate=Rate(2, 3, clock.seconds))
    ann, bob = Client(factory), Client(factory)
    for client in (ann, bob):
        client.joins()
        client.says(*[{"username": "ann", "message": "hi"}] * 4)
    assert ann.reads() == [
        {"type": "error", "message": "Rate limit exceeded", "code": "RATE_LIMITED", "retry_after": 0.5}
    ]
    assert [frame["code"] for frame in bob.reads()] == ["RATE_LIMITED"]
    clock.advance(0.5)
    assert len(ann.reads()) == 6
    ann.posts("again", label="a")
    clock.advance(0)
    assert [frame["type"] for frame in ann.reads()] == ["message", "ack"]


PING, PONG = masked(b"", first=0x89), masked(b"", first=0x8A)
BEGIN, MIDDLE = masked(b"", first=0x01), masked(b"", first=0x00)
HI = b'{"username":"ann","message":"hi"}'


@pytest.fixture
def limited(server, clock):
    """A client of a server that takes one frame a second, and three at once."""
    client = Client(server(rate=Rate(1, 3, clock.seconds)))
    client.joins()
    return client


@pytest.mark.parametrize(
    ("parts", "post"),
    [(PING * 4, masked(HI)), (PONG * 4, masked(HI)), (BEGIN + MIDDLE * 3, masked(HI, first=0x80))],
    ids=["pings", "pongs", "fragments"],
)
def test_control_frames_and_fragments_cost_a_token(limited, clock, parts, post):
    """Above the rate the client is not read until the rate allows the frame, and gets no error."""
    limited.sends(parts + post)
    assert limited.transport.producerState == "paused"
    assert limited.protocol.factory.intake.throttles == {"websocket": 1, "http": 0}
    limited.transport.read()
    clock.pump([1.9, 0])
    assert limited.transport.read() == b""
    clock.pump([0.2, 0])
    assert [frame.get("code", frame["type"]) for frame in limited.reads()] == ["message"]
    assert limited.transport.producerState == "producing"


def test_every_ping_above_the_rate_is_answered_in_time(limited, clock):
    limited.sends(PING * 8)
    seconds = []
    for _ in range(6):
        seconds.append(limited.transport.read().count(b"\x8a\x00"))
        clock.advance(1)
    assert seconds == [4, 0, 2, 0, 2, 0]


def test_close_frame_costs_nothing(limited, clock):
    """It is read in order, behind the frames that wait for the rate."""
    limited.sends(PING * 3 + masked(b"\x03\xe8", first=0x88))
    assert close_code(limited.transport.read()[-2:]) == 1000


# The budget of a reactor turn


@pytest.fixture
def reactor():
    """A clock on which one turn of the reactor can pass."""
    return Turns()


@pytest.fixture
def busy(reactor, connections, store):
    """A factory of connections that need several turns."""
    rooms = Registry(store, frames, reactor, 100)
    site = http.site(lambda: (True, "ready"), reactor, {})
    return ChatFactory(rooms=rooms, connections=connections, admission=Admission(), site=site, reactor=reactor)


VALID = masked(b'{"type":"history","limit":1}')


@pytest.mark.parametrize("frame", [VALID, PING], ids=["texts", "pings"])
@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_turn_has_a_budget_of_frames(busy, reactor, transport, frame):
    """The client is not read until all of its frames are handled, also if its transport reads on."""
    client = Client(busy, transport())
    client.joins()
    client.sends(frame * (2 * FRAMES_PER_TURN + 1))
    answers = []
    while client.transport.producerState == "paused":
        answers.append(client.transport.read().count(b"\x8a\x00" if frame == PING else b"history"))
        if len(answers) == 1:
            client.sends(frame * FRAMES_PER_TURN)
        reactor.turn()
    answers.append(client.transport.read().count(b"\x8a\x00" if frame == PING else b"history"))
    assert answers == [FRAMES_PER_TURN] * 3 + [1]


def test_turn_has_a_budget_of_time(busy, reactor, monkeypatch):
    """Frames that take long end the turn early."""
    client = Client(busy)
    client.joins()
    parse = STANDARD.parse

    def slowly(text):
        reactor.rightNow += 0.6 * SECONDS_PER_TURN
        return parse(text)

    monkeypatch.setattr(STANDARD, "parse", slowly)
    client.sends(VALID * 8)
    answers = [len(client.reads())]
    for _ in range(2):
        reactor.turn()
        answers.append(len(client.reads()))
    assert answers == [1 + FRAMES_PER_LOOK, 3, 0]


def test_flood_delays_others_by_one_budget(busy, reactor):
    """A frame of another client is handled before the next budget of the one that floods."""
    flooder, other = Client(busy), Client(busy)
    for client in (flooder, other):
        client.joins()
    flooder.sends(VALID * 3 * FRAMES_PER_TURN)
    assert len(flooder.reads()) == FRAMES_PER_TURN
    other.says({})
    assert len(other.reads()) == 1
    reactor.turn()
    assert len(flooder.reads()) == FRAMES_PER_TURN


def test_two_floods_take_turns(busy, reactor):
    clients = [Client(busy), Client(busy)]
    for client in clients:
        client.joins()
        client.sends(VALID * 3 * FRAMES_PER_TURN)
    for _ in range(3):
        assert [len(client.reads()) for client in clients] == [FRAMES_PER_TURN] * 2
        reactor.turn()


def test_frames_behind_a_refused_row_are_not_read(busy, reactor, connections):
    """The close ends the flood, and the client's answer to it is still found."""
    client = Client(busy)
    client.joins()
    client.sends(masked(b"nonsense") * 2 * MAX_REFUSALS + masked(b"\x03\xf0", first=0x88))
    reactor.turns()
    data = client.transport.read()
    assert data.count(b"error") == MAX_REFUSALS - 1
    assert close_code(data[data.rindex(b"\x88") + 2 :]) == 1008
    client.goes()
    assert connections.closes == {("websocket", 1008): 1}


def test_connection_lost_while_frames_wait_for_a_turn(busy, reactor, store, connections):
    """Posts that have arrived are stored once."""
    client = Client(busy)
    client.joins()
    client.sends(masked(HI) * (FRAMES_PER_TURN + 3) + b"\x81")
    client.goes(ConnectionLost)
    reactor.turns()
    assert len(store.messages) == FRAMES_PER_TURN + 3
    assert not connections.connected


def test_frame_cut_by_the_budget(busy, reactor, store):
    """A frame of which a part has arrived waits for its rest, without further turns."""
    client = Client(busy)
    client.joins()
    client.sends(masked(HI) * (FRAMES_PER_TURN + 1) + masked(HI, first=0x01)[:5])
    reactor.turn()
    reactor.turns()
    assert reactor.idle
    assert client.transport.producerState == "producing"
    client.sends(masked(HI)[5:])
    assert len(store.messages) == FRAMES_PER_TURN + 1


def test_throttled_client_is_not_dropped_for_its_pong(limited, clock, connections, pass_time):
    """Its pong waits behind its own frames, which show that it is alive."""
    limited.sends(masked(HI) * 200 + PONG)
    for _ in range(3):
        pass_time(PING_SECONDS)
    assert not limited.transport.aborted
    clock.pump([1] * 200)
    pass_time(PING_SECONDS)
    assert not limited.transport.aborted
    pass_time(PING_SECONDS)
    assert limited.transport.aborted


# Reading back


@pytest.fixture
def archive(store, held, server, clock):
    """A factory of connections to a log that is slow to read back beyond its newest message."""
    held.slow = False
    writer = Client(server(Registry(held, frames, clock, 100)))
    writer.joins()
    for message in "123":
        writer.posts(message)
    writer.goes()
    return server(Registry(held, frames, clock, 1))


@pytest.fixture(params=[Tcp, Wire])
def pager(request, archive, held, way):
    """A client that may ask for pages, which then wait."""
    client = Client(archive, request.param())
    client.joins(way())
    held.slow = True
    return client


H1 = PAGE | {"label": "h1"}
POST = {"username": "ann", "message": "4", "label": "a"}


def test_page_read_stops_the_reading(held, clock, pager):
    """Frames that arrived with the request wait for their turn."""
    text = json.dumps(POST | {"message": "5", "label": "b"}).encode()
    pager.sends(
        masked(json.dumps(H1).encode())
        + masked(json.dumps(POST).encode())
        + masked(b"still here?", first=0x89)
        + masked(text[:7], first=0x01)
        + masked(text[7:], first=0x80)
        + masked(b"nonsense")
        + masked(json.dumps(PAGE | {"limit": 1, "label": "h2"}).encode())
    )
    assert pager.transport.read() == b""
    assert pager.transport.producerState == "paused"
    assert held.messages == ["1", "2", "3"]
    held.answer()
    assert pager.transport.producerState == "producing"
    clock.advance(0)
    page, pong, rest = pager.transport.read().partition(b"\x8a\x0bstill here?")
    assert pong
    frames = read_frames(page + rest)
    assert [frame.get("label", frame["type"]) for frame in frames] == [
        "h1",
        "error",
        "h2",
        "message",
        "message",
        "a",
        "b",
    ]
    assert [[entry["message"] for entry in frame["data"]] for frame in (frames[0], frames[2])] == [
        ["1", "2", "3"],
        ["5"],
    ]


def test_client_closes_during_a_page_read(held, clock, pager):
    """The client gets the page, and posts that arrived before the close are stored once."""
    pager.sends(masked(json.dumps(H1).encode()) + masked(json.dumps(POST).encode()) + masked(b"\x03\xe8", first=0x88))
    assert held.messages == ["1", "2", "3"]
    held.answer()
    page, _, close = pager.transport.read().rpartition(b"\x88")
    assert [frame["label"] for frame in read_frames(page)] == ["h1"]
    assert close_code(close[1:]) == 1000
    assert held.messages == ["1", "2", "3", "4"]
    pager.goes()
    clock.advance(0)
    assert pager.transport.read() == b""
    assert held.messages == ["1", "2", "3", "4"]


def test_connection_lost_during_a_page_read(held, clock, pager, connections):
    """Posts that arrived before are stored once."""
    pager.says(H1, POST)
    pager.goes(ConnectionLost)
    assert held.messages == ["1", "2", "3", "4"]
    held.answer()
    clock.advance(0)
    assert pager.transport.read() == b""
    assert held.messages == ["1", "2", "3", "4"]
    assert not connections.connected


@pytest.mark.parametrize("finished", [False, True])
def test_close_during_a_page_read(held, pager, connections, pass_time, finished):
    """The client can answer the close."""
    pager.says(H1, POST)
    if finished:
        pager.protocol.finish()
    pager.protocol.restart(0.5)
    assert pager.reads_close() == 1012
    assert held.messages == ["1", "2", "3", "4"]
    held.answer()
    assert pager.transport.producerState == "producing"
    pager.sends(masked(b"\x03\xf4", first=0x88))
    pager.goes()
    assert connections.empty().called


def test_post_while_the_log_is_down(held, clock, pager):
    """It is an error, and the connection continues."""
    pager.says(H1, POST)
    held.fail()
    assert [(frame["code"], frame["label"]) for frame in pager.reads()] == [("UNAVAILABLE", "h1")]
    clock.advance(0)
    assert [frame["type"] for frame in pager.reads()] == ["message", "ack"]


def test_unread_pages_stop_the_reading(archive, held):
    client = Client(archive)
    client.joins()
    client.transport.socket.space = 10
    client.says(H1, H1, POST)
    assert client.transport.producerState == "paused"
    assert held.messages == ["1", "2", "3"]
    client.transport.drain()
    assert client.transport.producerState == "producing"
    assert held.messages == ["1", "2", "3", "4"]
    assert [frame["label"] for frame in client.reads()] == ["h1", "h1"]


def test_page_waits_for_the_log_and_the_reader(archive, held):
    client = Client(archive)
    client.joins()
    held.slow = True
    client.transport.socket.space = 0
    client.sends(masked(b"ping", first=0x89) * 2)
    client.transport.drain()
    assert client.transport.producerState == "producing"
    client.transport.socket.space = 0
    client.says(H1, H1, POST)
    held.answer()
    assert client.transport.producerState == "paused"
    client.transport.drain()
    assert client.transport.producerState == "paused"
    assert held.messages == ["1", "2", "3"]
    held.answer()
    assert client.transport.producerState == "producing"
    assert held.messages == ["1", "2", "3", "4"]


# Sending


def test_unread_acks_stop_the_reading(client, clock):
    client.joins()
    client.transport.socket.space = 0
    client.posts("1", label="a")
    clock.advance(0)
    client.posts("2", label="b")
    assert client.transport.producerState == "paused"
    client.transport.drain()
    assert client.transport.producerState == "producing"
    clock.advance(0)
    assert [frame.get("label", frame["type"]) for frame in client.reads()] == ["message", "a", "message", "b"]


def test_full_socket_is_left_alone_until_it_is_empty(client, clock):
    client.joins()
    client.transport.socket.space = 10
    client.posts("1")
    clock.advance(0)
    client.posts("2")
    clock.advance(0)
    assert not client.protocol.session.ready
    assert len(client.transport.socket.sent) == 10
    client.transport.drain()
    clock.advance(0)
    assert [frame["data"]["message"] for frame in client.reads()] == ["1", "2"]


def test_answer_of_autobahn_behind_buffered_bytes(client, clock):
    client.joins()
    client.transport.socket.space = 10
    client.posts("1")
    clock.advance(0)
    client.sends(masked(b"ping", first=0x89))
    client.transport.drain()
    data = client.transport.read()
    assert data.endswith(b"\x8a\x04ping")
    assert read_frames(data[:-6])[0]["data"]["message"] == "1"


def test_answer_of_autobahn_to_a_full_socket(client):
    """It is buffered."""
    client.joins()
    client.transport.socket.space = 2
    client.sends(masked(b"ping", first=0x89))
    assert not client.protocol.session.ready
    client.transport.drain()
    assert client.transport.read() == b"\x8a\x04ping"
    assert client.protocol.session.ready


@pytest.mark.parametrize("nonsense", [masked(b"nonsense"), masked(b"ping", first=0x89)], ids=["errors", "pongs"])
def test_unread_answers_stop_the_reading(client, nonsense):
    client.joins()
    client.transport.socket.space = 0
    client.sends(nonsense)
    assert client.transport.producerState == "producing"  # one answer may be under way
    client.sends(nonsense)
    assert client.transport.producerState == "paused"
    client.transport.drain()
    assert client.transport.producerState == "producing"
    assert client.transport.read()


def test_transport_that_buffers_for_itself_pauses_its_member(factory, clock):
    client = Client(factory, Wire())
    client.joins()
    client.transport.producer.pauseProducing()
    client.posts()
    clock.advance(0)
    assert client.transport.read() == b""
    client.transport.producer.resumeProducing()
    clock.advance(0)
    assert len(client.reads()) == 1


def test_no_writes_to_a_lost_connection(client):
    client.joins()
    producer = client.transport.producer
    client.goes()
    producer.resumeProducing()
    producer.stopProducing()
    assert client.transport.read() == b""


def test_member_that_the_tail_overran_is_closed_with_1013(client):
    client.joins()
    client.protocol.evict()
    assert client.reads_close() == 1013


# Deadlines


def test_half_a_handshake_and_silence_is_dropped(client, pass_time, events):
    client.sends(HANDSHAKE[:20])
    pass_time(HANDSHAKE_SECONDS - 1)
    client.sends(HANDSHAKE[20:30])  # each byte does not buy new time
    assert not client.transport.aborted
    pass_time(1)
    assert client.transport.aborted
    assert "sent no whole request" in [event.get("why") for event in events]


def test_answered_pings(client, pass_time):
    client.joins()
    for _ in range(4):
        pass_time(PING_SECONDS)
        assert client.transport.read() == b"\x89\x00"
        client.sends(masked(b"", first=0x8A))
    assert not client.transport.aborted


def test_unanswered_ping(client, pass_time):
    """The client is dropped at the next ping."""
    client.joins()
    pass_time(PING_SECONDS)
    assert not client.transport.aborted
    pass_time(PING_SECONDS)
    assert client.transport.aborted


@pytest.fixture
def stall(client, clock, pass_time):
    """A function that lets the client take nothing until the server evicts it."""

    def stall():
        client.joins()
        client.transport.socket.space = 0
        client.posts()
        clock.advance(0)
        pass_time(PING_SECONDS)
        client.sends(masked(b"", first=0x8A))
        pass_time(STALL_SECONDS - PING_SECONDS)

    return stall


def test_stalled_client_that_reads_is_evicted(client, rooms, pass_time, stall):
    stall()
    assert len(rooms) == 0
    pass_time(STALL_SECONDS - 1)
    assert not client.transport.aborted
    client.transport.drain()
    data = client.transport.read().replace(b"\x89\x00", b"")  # without the ping
    close = data.index(b"\x88")
    assert read_frames(data[:close])[0]["data"]["message"] == "hi"
    assert close_code(frame_at(data, close).payload) == 1013
    pass_time(CLOSE_SECONDS)
    assert client.transport.aborted


def test_evicted_client_that_stays_full_is_dropped(client, pass_time, stall, events):
    stall()
    pass_time(STALL_SECONDS)
    assert client.transport.aborted
    assert "took nothing" in [event.get("why") for event in events]


def test_transport_that_takes_something_has_all_its_time_again(client, clock, pass_time):
    client.joins()
    for _ in range(3):
        client.transport.socket.space = 0
        client.posts()
        clock.advance(0)
        pass_time(STALL_SECONDS - 20)
        client.sends(masked(b"", first=0x8A))
        client.transport.drain()
        clock.advance(0)
    assert not client.transport.aborted


def test_unanswered_close(client, pass_time):
    """The client is dropped."""
    client.joins()
    client.protocol.restart(0.5)
    pass_time(CLOSE_SECONDS)
    assert client.transport.aborted


# Going


def test_close_is_answered_and_the_member_leaves(client, factory, rooms, connections):
    client.joins()
    client.sends(masked(b"\x03\xe8", first=0x88))
    assert client.transport.disconnecting
    assert len(rooms) == 0
    client.goes()
    assert factory.getConnectionCount() == 0
    assert not connections.connected


def test_connection_that_breaks_leaves_nothing_behind(client, factory, rooms, connections, clock):
    client.joins()
    client.transport.socket.space = 0
    client.posts()
    clock.advance(0)
    client.goes(ConnectionLost)
    left = (connections.handshakes, connections.closings, connections.stalls, connections.pings)
    assert [[*deadlines] for deadlines in left] == [[], [], [], []]
    assert len(rooms) == 0
    assert factory.getConnectionCount() == 0


def test_connection_without_a_request(client, connections, events):
    """It leaves no trace."""
    client.goes(ConnectionLost)
    assert [*connections.handshakes] == []
    assert [event for event in events if event["log_namespace"] == "chatd.transport.websocket"] == []


def test_log_lines_quote_no_message(client, events):
    client.joins()
    client.sends(masked(b'{"username":"ann","secret":"tell nobody"}'))
    client.goes()
    ours = [
        event for event in events if event["log_namespace"] in ("chatd.transport.websocket", "chatd.transport.session")
    ]
    assert [event["log_format"] for event in ours] == [
        "#{connection} {peer} joined {room}",
        "#{connection} {peer} in {room} sent an invalid frame",
        "#{connection} {peer} left {room}: {code}",
    ]
    assert {event["peer"] for event in ours} == {"192.0.2.7:4321"}
    assert not [event for event in events if "tell nobody" in str(event) or "secret" in str(event)]


def test_peer_without_a_port_has_a_name_too(factory):
    wire = Wire(peerAddress=UNIXAddress(b"/run/x"))
    assert "UNIXAddress" in Client(factory, wire).protocol.peer


@pytest.mark.parametrize(
    ("seconds", "reason"), [(0, b"0.0"), (0.04, b"0.0"), (0.7, b"0.7"), (0.96, b"1.0"), (9.98, b"10.0")]
)
@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_restart_names_the_time_to_reconnect(factory, connections, transport, seconds, reason):
    client = Client(factory, transport())
    client.joins()
    gone = connections.empty()
    client.protocol.restart(seconds)
    text = b"\x03\xf4retry_after=" + reason
    assert client.transport.read() == bytes([0x88, len(text)]) + text
    client.sends(masked(text, first=0x88))
    assert client.transport.disconnecting
    assert not gone.called
    client.goes()
    assert gone.called
    assert connections.closes == {("websocket", 1012): 1}


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_finished_client_answers_the_close(factory, transport):
    """It is not read until it must answer the close."""
    client = Client(factory, transport())
    client.joins()
    client.protocol.finish()
    assert client.transport.producerState == "paused"
    client.protocol.restart(0.5)
    assert client.reads_close() == 1012
    assert client.transport.producerState == "producing"


def test_frames_after_the_close_are_not_posted(client, rooms, store):
    client.joins()
    client.protocol.finish()
    client.protocol.restart(0.5)
    client.posts("too late", label="a")
    client.says(PAGE)
    assert client.reads_close() == 1012
    assert store.messages == []


def test_finished_client_that_takes_its_answers(factory, clock):
    """It is not read again."""
    client = Client(factory)
    client.joins()
    client.transport.socket.space = 0
    client.says({}, {})
    client.protocol.finish()
    client.transport.drain()
    assert client.transport.producerState == "paused"
    assert [frame["type"] for frame in client.reads()] == ["error", "error"]


@pytest.fixture
def drain(factory, connections, store, clock):
    """Begin a drain of so many seconds, or an immediate one."""

    def begin(budget, *, immediate=False):
        drain = Drain(connections, store, factory.site, budget, clock)
        if immediate:
            drain.skip_pace()
        drain.run(lambda: succeed(None))

    return begin


def last_words(data):
    """Return the labels, or else the types, of the frames before the final close, which asks to reconnect."""
    frames, close = data[: data.rindex(b"\x88")], data[data.rindex(b"\x88") :]
    assert close[2:4] == b"\x03\xf4"
    return [frame.get("label", frame["type"]) for frame in read_frames(frames)]


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_drain_sends_pending_answers_before_the_close(factory, clock, drain, transport):
    client = Client(factory, transport())
    client.joins()
    client.posts("hi", label="a")
    client.says(PAGE | {"label": "h1"})
    drain(8, immediate=True)
    clock.pump([0, 0, TICK_SECONDS])
    assert last_words(client.transport.read()) == ["h1", "message", "a"]


@pytest.fixture
def full(factory, clock):
    """A client that has posted while its transport was full, and another."""
    client, other = Client(factory), Client(factory)
    client.joins()
    other.joins()
    client.transport.socket.space = 10
    other.posts("1")
    clock.advance(0)
    client.posts("2", label="a")
    clock.advance(0)
    assert not client.protocol.session.ready
    return client, other


@pytest.mark.parametrize("immediate", [False, True])
def test_drain_of_a_briefly_full_transport(full, clock, drain, immediate):
    """The acknowledgement precedes the close."""
    client, other = full
    drain(8, immediate=immediate)
    clock.pump([TICK_SECONDS] * (10 if immediate else 130))  # both were released
    assert last_words(other.transport.read()) == ["message", "message"]
    begun = client.transport.read()
    assert len(begun) == 10
    client.transport.drain()
    clock.pump([0, TICK_SECONDS])
    assert last_words(begun + client.transport.read()) == ["message", "message", "a"]


@pytest.mark.parametrize("immediate", [False, True])
def test_drain_of_a_full_transport(full, clock, drain, immediate):
    """The close follows what the client has not taken."""
    client, _ = full
    drain(8, immediate=immediate)
    clock.pump([TICK_SECONDS] * (25 if immediate else 145))
    client.transport.drain()
    assert last_words(client.transport.read()) == ["message"], "what it posted, it can post again with its label"


def test_restart_twice_sends_one_close(client):
    client.joins()
    client.protocol.evict()
    client.protocol.finish()
    client.protocol.restart(0.5)
    assert client.reads_close() == 1013
    assert client.transport.producerState == "producing", "its answer is waited for"


def test_client_that_goes_waits_for_no_answer(waiting, connections):
    waiting.goes()
    assert not connections.asked


def test_abort_drops_what_is_left_and_unfinished_handshakes(factory, connections):
    joined, unfinished = Client(factory), Client(factory)
    joined.joins()
    connections.abort()
    assert joined.transport.aborted
    assert unfinished.transport.aborted


def test_handshake_while_stopping(client, connections, way):
    """It is a 503 with Retry-After."""
    connections.stopping = True
    client.sends(way())
    answer = client.transport.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 2\r\n" in answer


def test_stop_during_the_load_of_a_room(held, waiting, connections):
    """A client that waits for the log gets a 503, which a drain waits for."""
    connections.stopping = True
    assert connections.asked == {waiting.protocol}
    held.answer()
    assert not connections.asked
    assert waiting.transport.read().startswith(b"HTTP/1.1 503 ")
    assert not connections.connected
