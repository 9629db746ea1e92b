"""The limits on new clients, alone and on every carrier."""

import pytest
from support.houses import House
from support.web_doubles import HEAD, Transport, WebSocketClient
from support.websocket_frames import masked
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionDone
from twisted.logger import formatEvent
from twisted.python.failure import Failure

from chatd.transport.admission import HttpError
from chatd.transport.intake import PROMPT_HANDSHAKES
from chatd.transport.limits import (
    HANDSHAKES_PER_SECOND,
    LATE_LOOKS,
    LATE_SECONDS,
    LOOK_SECONDS,
    NEW_ROOMS,
    NEW_ROOMS_PER_SECOND,
    PROMPT_LOOKS,
    PROMPT_SECONDS,
    RETRY_SECONDS,
    SPREAD_SECONDS,
    Lateness,
    Limits,
)
from chatd.transport.proxied import ProxiedFactory

EVENTS = b"/rooms/main/events"
MANY = 1_000


def peer(host="192.0.2.7"):
    return (IPv6Address if ":" in host else IPv4Address)("TCP", host, 4321)


def over(house, target="/", *headers, host="192.0.2.7"):
    """Return a client over WebSocket from an address."""
    return house.client(target, *headers, transport=Transport(peerAddress=peer(host)))


def refused(limits, host="192.0.2.7", forwarded=None):
    """Return the status and the Retry-After of a refused client."""
    with pytest.raises(HttpError) as caught:
        limits.enter(peer(host), forwarded)
    return caught.value.status, caught.value.headers["Retry-After"]


@pytest.fixture
def limits(clock):
    return Limits(clock, 3, chance=lambda: 0.0)


@pytest.fixture
def house():
    return House(per_address=3)


# One address


def test_connections_of_an_address(limits, clock):
    """A client that leaves makes room for another one."""
    places = [limits.enter(peer(), None) for _ in range(3)]
    clock.advance(1)
    assert refused(limits) == (429, str(RETRY_SECONDS))
    assert limits.enter(peer("192.0.2.8"), None) is not None
    limits.leave(places[0])
    assert limits.enter(peer(), None) is places[0]
    assert refused(limits)[0] == 429
    assert (limits.refusals["connections"], limits.refusals["handshakes"]) == (2, 0)


LOOPBACK = "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"
PRIVATE = "10.1.2.3", "172.31.0.1", "192.168.0.9", "100.64.0.1", "169.254.1.1", "fd00::1", "fe80::1", "::ffff:10.0.0.1"


@pytest.mark.parametrize("host", [*LOOPBACK, *PRIVATE])
@pytest.mark.parametrize("hops", [0, 1])
def test_own_networks_have_no_limit(clock, host, hops):
    """A load balancer in a private network is everybody."""
    limits = Limits(clock, 1, hops)
    assert [limits.enter(peer(host), None) for _ in range(MANY)] == [None] * MANY


def test_unix_socket_has_no_limit(limits):
    assert [limits.enter(UNIXAddress(None), None) for _ in range(MANY)] == [None] * MANY


def test_no_limit_for_addresses(clock):
    limits = Limits(clock, 0)
    assert [limits.enter(peer(), None) for _ in range(MANY)] == [None] * MANY


def test_network_of_ipv6(limits, clock):
    """All addresses of 64 bits are one."""
    for host in ("2001:db8::1", "2001:db8::2:3", "2001:db8:0:0:ffff::1"):
        limits.enter(peer(host), None)
    clock.advance(1)
    assert refused(limits, "2001:db8::9")[0] == 429
    assert limits.enter(peer("2001:db8:0:1::1"), None)


@pytest.mark.parametrize(
    ("hops", "forwarded", "others"),
    [
        (1, "192.0.2.1", ["192.0.2.2", "9.9.9.9, 192.0.2.3"]),
        (2, "192.0.2.1, 10.0.0.2", ["9.9.9.9, 192.0.2.2, 10.0.0.2"]),
        (1, None, ["192.0.2.2"]),
    ],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "198.51.100.1"])
def test_address_behind_proxies(clock, hops, forwarded, others, host):
    """The address that the outermost proxy saw counts, from a proxy on this machine too."""
    limits = Limits(clock, 1, hops)
    if forwarded or host != "127.0.0.1":
        assert limits.enter(peer(host), forwarded)
        clock.advance(1)
        assert refused(limits, host, forwarded and f"8.8.8.8, {forwarded}")[0] == 429
    for other in others:
        assert limits.enter(peer(host), other)


def test_forwarded_header_without_proxies(limits, clock):
    """A client cannot name an address for itself."""
    for number in range(3):
        limits.enter(peer(), f"10.0.0.{number}")
    clock.advance(1)
    assert refused(limits, forwarded="10.0.0.9")[0] == 429


def test_handshakes_of_an_address(clock):
    """All that an address may have can reconnect at once, and then as many a second as the limit allows."""
    limits = Limits(clock, 5, chance=lambda: 0.0)
    for _ in range(5):
        limits.leave(limits.enter(peer(), None))
    assert refused(limits) == (429, str(RETRY_SECONDS))
    assert limits.enter(peer("192.0.2.8"), None)
    clock.advance(1 / HANDSHAKES_PER_SECOND)
    limits.leave(limits.enter(peer(), None))
    assert refused(limits)[0] == 429
    assert limits.refusals["handshakes"] == 2


def test_retry_after_is_spread(clock):
    """Refused clients do not return together."""
    chances = iter([0.0, 0.5, 0.999])
    limits = Limits(clock, 1, chance=lambda: next(chances))
    limits.enter(peer(), None)
    waits = [int(refused(limits)[1]) for _ in range(3)]
    assert waits == [RETRY_SECONDS, RETRY_SECONDS + SPREAD_SECONDS // 2, RETRY_SECONDS + SPREAD_SECONDS - 1]


def test_idle_addresses_are_forgotten(clock, monkeypatch):
    """Memory is bounded by the addresses that have clients, or are still counted."""
    monkeypatch.setattr("chatd.transport.limits.MAX_ADDRESSES", 10)
    limits = Limits(clock, 3)
    kept = limits.enter(peer("198.18.0.1"), None)
    creator = limits.enter(peer("198.18.0.2"), None)
    for _ in range(99):
        limits.room_created(creator)
    limits.leave(creator)
    for second in range(200):
        clock.advance(1 / HANDSHAKES_PER_SECOND)
        limits.leave(limits.enter(peer(f"198.18.1.{second}"), None))
    assert len(limits) <= 21
    assert limits.place(peer("198.18.0.1"), None) is kept
    assert limits.place(peer("198.18.0.2"), None) is creator


# Files


def test_full_server_refuses_new_clients(limits):
    limits.is_full = lambda: True
    assert refused(limits) == (503, str(RETRY_SECONDS))
    assert refused(limits, "127.0.0.1")[0] == 503
    assert limits.refusals["files"] == 2


# New rooms


def test_new_rooms_of_an_address(limits, clock):
    place = limits.place(peer(), None)
    for _ in range(NEW_ROOMS):
        assert limits.room_wait(place) == 0
        limits.room_created(place)
    assert limits.room_wait(place) == pytest.approx(1 / NEW_ROOMS_PER_SECOND)
    clock.advance(1 / NEW_ROOMS_PER_SECOND)
    assert limits.room_wait(place) == 0
    assert limits.refusals["new_rooms"] == 1
    limits.room_created(None)
    assert limits.room_wait(None) == 0


@pytest.fixture
def few_rooms(monkeypatch):
    """Let an address create two rooms."""
    monkeypatch.setattr("chatd.transport.limits.NEW_ROOMS", 2)
    return House(per_address=10)


def test_new_rooms_by_frames(few_rooms):
    """Only the first message of a room counts, and other rooms stay usable."""
    for room in ("a", "b"):
        client = over(few_rooms, f"/rooms/{room}")
        client.post("first", "second", "third")
        assert [frame["type"] for frame in client.read()] == ["history", "message", "message", "message"]
    client = over(few_rooms, "/rooms/c")
    client.read()
    client.post("first", label="l")
    assert client.read() == [
        {
            "type": "error",
            "message": "Too many new rooms",
            "code": "RATE_LIMITED",
            "label": "l",
            "retry_after": 1 / NEW_ROOMS_PER_SECOND,
        }
    ]
    here, other = over(few_rooms), over(few_rooms, "/rooms/c", host="192.0.2.8")
    here.post("in an old room")
    other.post("of another address")
    assert [frame["type"] for frame in (here.read()[-1], other.read()[-1], client.read()[-1])] == ["message"] * 3


def test_new_rooms_by_posts_of_a_client_that_leaves(few_rooms):
    """Frames that wait when a client leaves create no room above the limit either."""
    for room in ("a", "b"):
        over(few_rooms, f"/rooms/{room}").post("first")
    client = over(few_rooms, "/rooms/c")
    client.protocol.session.queue()
    client.protocol.dataReceived(masked(b'{"username":"ann","message":"waits"}'))
    client.lose()
    few_rooms.turn()
    assert few_rooms.get(b"/rooms/c/messages")[1].count("waits") == 0


def test_new_rooms_over_http(few_rooms):
    """Without free new rooms, an address can post only in rooms that are open and not empty."""

    def post(room, host="192.0.2.7"):
        response, _ = few_rooms.post(
            path=b"/rooms/%b/messages" % room,
            transport=Transport(peerAddress=peer(host)),
            username="ann",
            message="hi",
        )
        return response

    assert [post(room).status for room in (b"a", b"a", b"b", b"c")] == [201, 201, 201, 429]
    assert post(b"c").headers["retry-after"] == "1"
    assert post(b"a").status == 429
    member = over(few_rooms, "/rooms/a")
    assert post(b"a").status == 201
    few_rooms.turn()
    assert len(member.read()) == 2
    assert post(b"c", "192.0.2.8").status == 201


# Every carrier


def test_connections_over_websocket(house):
    clients = [over(house) for _ in range(4)]
    assert [client.status for client in clients] == [101, 101, 101, 429]
    assert clients[3].retry_after >= RETRY_SECONDS
    clients[3].lose()
    house.clock.advance(1)
    assert over(house).status == 429
    clients[0].lose()
    assert over(house).status == 101
    assert house.factory.refused_handshakes["429"] == 2


def test_refused_handshake_keeps_no_place(house):
    """A place is free again when the connection of a refused client ends."""
    for _ in range(10):
        client = over(house, "/nowhere")
        assert client.status == 404
        client.lose()
        house.clock.advance(1)
    assert over(house).status == 101


def stream(house, host="192.0.2.7"):
    """Return a connection that has asked for events, as browsers do."""
    connection = house.connect(Transport(peerAddress=peer(host)))
    connection.begin(b"GET", EVENTS, b"Accept: text/event-stream")
    house.turn()
    return connection


def test_connections_for_events(house):
    """A browser retries a stream that ends, and gives up after any status but 200."""
    streams = [stream(house) for _ in range(3)]
    house.clock.advance(1)
    assert over(house).status == 429
    refused = stream(house)
    assert refused.response()[1] == f"retry: {RETRY_SECONDS * 1000}\n\n"
    assert refused.closing
    refused.lose()
    connection = house.connect(Transport(peerAddress=peer()))
    response, _ = connection.ask(b"GET", EVENTS)
    assert (response.status, response.headers["retry-after"]) == (429, str(RETRY_SECONDS))
    connection.lose()
    streams[0].lose()
    house.clock.advance(1)
    assert over(house).status == 101


def test_stream_counts_once(house):
    """The connection of plain HTTP below a stream does not count beside it."""
    streams = [stream(house) for _ in range(2)]
    assert house.limits.place(peer(), None).connections == 2
    for one in streams:
        one.lose()
    assert house.limits.place(peer(), None).connections == 0


def test_idle_connections_of_plain_http(house):
    """Above the limit every request is answered, and its connection closes then."""
    connections = [house.connect(Transport(peerAddress=peer())) for _ in range(4)]
    assert [connection.ask(b"GET", b"/readyz")[0].status for connection in connections] == [200] * 4
    assert [connection.closing for connection in connections] == [False, False, False, True]
    assert over(house).status == 429
    for connection in connections:
        connection.lose()
    assert house.limits.place(peer(), None).connections == 0


def test_connections_of_a_proxy(clock):
    """A proxy's own connections do not count: the clients behind it do."""
    house = House(per_address=1, hops=1)
    proxies = [house.connect(Transport(peerAddress=peer("198.18.0.1"))) for _ in range(3)]
    assert [proxy.ask(b"GET", b"/readyz")[0].status for proxy in proxies] == [200] * 3
    assert not any(proxy.closing for proxy in proxies)
    assert over(house, "/", b"X-Forwarded-For: 192.0.2.1", host="198.18.0.1").status == 101
    assert over(house, "/", b"X-Forwarded-For: 192.0.2.2", host="198.18.0.1").status == 101
    assert over(house, "/", b"X-Forwarded-For: 192.0.2.1", host="198.18.0.1").status == 429


def test_upgrade_after_other_requests_counts_once(house):
    connection = house.connect(Transport(peerAddress=peer()))
    assert connection.ask(b"GET", b"/readyz")[0].status == 200
    connection.transport.protocol = connection.channel
    connection.begin(
        b"GET",
        b"/",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    assert b"HTTP/1.1 101 " in connection.transport.value()
    assert house.limits.place(peer(), None).connections == 1


class Silent:
    """A connection that has sent no whole request, over a transport of its own."""

    def __init__(self, house, host="192.0.2.7", wrap=lambda factory: factory):
        self.transport = Transport(peerAddress=peer(host))
        self.transport.connection = self
        self.protocol = wrap(house.factory).buildProtocol(None)
        self.protocol.makeConnection(self.transport)

    def lose(self):
        self.protocol.connectionLost(Failure(ConnectionDone()))

    @property
    def dropped(self):
        return self.transport.disconnected


def test_silent_connections_of_an_address(house):
    """Connections without a request are limited too, or one address could take all the files of the server."""
    silent = [Silent(house) for _ in range(4)]
    assert [one.dropped for one in silent] == [False, False, False, True]
    assert house.limits.refusals["connections"] == 1
    assert not Silent(house, "192.0.2.8").dropped
    assert not Silent(house, "127.0.0.1").dropped
    silent[0].lose()
    assert over(house).status == 101
    assert not Silent(house).dropped
    assert Silent(house).dropped


def test_silent_connections_end_in_every_way(house):
    """No way in which a connection goes on, or ends, keeps it among the silent ones."""
    lost, plain, refused, joined = (Silent(house, f"192.0.2.{number}") for number in range(4))
    lost.protocol.dataReceived(b"GET / HT")
    lost.lose()
    plain.protocol.dataReceived(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
    refused.protocol.dataReceived(b"nonsense\r\n\r\n")
    joined.protocol.dataReceived(HEAD + b"\r\n\r\n")
    house.turn()
    refused.lose()
    places = [house.limits.place(peer(f"192.0.2.{number}"), None) for number in range(4)]
    assert [(place.arriving, place.connections) for place in places] == [(0, 0), (0, 1), (0, 0), (0, 1)]


def test_silent_connections_behind_a_load_balancer(house):
    """With the PROXY protocol they count at the address in its header, and before it nowhere."""
    silent = [Silent(house, "198.51.100.1", ProxiedFactory) for _ in range(9)]
    for one in silent:
        one.protocol.dataReceived(b"PROXY TCP4 192.0.2.7 192.0.2.1 4321 8085\r\nGET / HT")
    assert [one.dropped for one in silent] == [False] * 3 + [True] * 6
    assert house.limits.place(peer("198.51.100.1"), None).arriving == 0
    silent[0].protocol.dataReceived(HEAD.removeprefix(b"GET / HT") + b"\r\n\r\n")
    place = house.limits.place(peer(), None)
    assert (place.arriving, place.connections) == (2, 1)


def test_silent_connections_behind_proxies(clock):
    """With X-Forwarded-For nobody knows the address before the request."""
    assert Limits(clock, 1, 1).arrive(peer()) is None


def test_crowded_address_refuses_an_upgrade(house):
    """A connection that begins a handshake after other requests is dropped like a new one."""
    connection = house.connect(Transport(peerAddress=peer()))
    assert connection.ask(b"GET", b"/readyz")[0].status == 200
    for _ in range(3):
        Silent(house)
    connection.transport.protocol = connection.channel
    connection.begin(b"GET", b"/", *HEAD.split(b"\r\n")[2:])
    assert b" 101 " not in connection.transport.value()
    assert connection.transport.disconnected


def test_silent_addresses_are_kept(clock, monkeypatch):
    """An address is not forgotten while it has silent connections."""
    monkeypatch.setattr("chatd.transport.limits.MAX_ADDRESSES", 10)
    limits = Limits(clock, 3)
    kept = limits.arrive(peer("198.18.0.1"))
    for number in range(100):
        limits.settle(limits.arrive(peer(f"198.18.1.{number}")))
    assert limits.place(peer("198.18.0.1"), None) is kept
    assert len(limits) <= 21


# Open rooms


@pytest.fixture
def two_rooms(monkeypatch):
    """Let two rooms be open at one time."""
    monkeypatch.setattr("chatd.room.registry.MAX_ROOMS", 2)
    return House()


def test_open_rooms(two_rooms):
    """Above the limit clients join open rooms, and no others until one is empty."""
    main, other = two_rooms.client(), two_rooms.client("/rooms/other")
    refused = two_rooms.client("/rooms/third")
    assert (refused.status, refused.retry_after) == (503, RETRY_SECONDS)
    assert two_rooms.client().status == 101
    assert two_rooms.limits.refusals["rooms"] == 1
    other.lose()
    two_rooms.turn()
    assert two_rooms.client("/rooms/third").status == 101
    response, _ = two_rooms.get(b"/rooms/other/events")
    assert response.status == 503
    main.post("still here")
    assert main.read()[-1]["data"]["message"] == "still here"


def test_rooms_that_are_loaded_again(two_rooms):
    """Rooms that are open are loaded again at the limit."""
    members = two_rooms.client(), two_rooms.client("/rooms/other")
    two_rooms.rooms.interrupted()
    two_rooms.turn()
    members[0].post("still here")
    assert members[0].read()[-1]["data"]["message"] == "still here"
    assert two_rooms.client("/rooms/other").status == 101


# Lag


class Reactor:
    """A reactor whose turns take as long as the test wants."""

    def __init__(self, clock):
        self.clock = clock
        self.lateness = Lateness(clock)
        self.lateness.look()

    def look(self, lag=0.0, times=1):
        for _ in range(times):
            self.clock.advance(LOOK_SECONDS + lag)
            self.lateness.look()
        return self.lateness.refuses


@pytest.fixture
def reactor(clock):
    return Reactor(clock)


def test_lag_refuses_new_clients(reactor, events):
    """A lag that stays refuses them, and none that passes."""
    assert not reactor.look(LATE_SECONDS - 0.01, times=100)
    assert not reactor.look(60, times=LATE_LOOKS - 1)
    assert not reactor.look()
    assert not reactor.look(LATE_SECONDS, times=LATE_LOOKS - 1)
    assert reactor.look(LATE_SECONDS)
    assert [formatEvent(event) for event in events] == ["new clients are refused: the event loop lags by 1.0 s"]


def test_new_clients_are_served_again(reactor, events):
    """They are served after some prompt looks in a row."""
    reactor.look(2 * LATE_SECONDS, times=LATE_LOOKS)
    assert reactor.look(times=PROMPT_LOOKS - 1)
    assert reactor.look(PROMPT_SECONDS)
    assert reactor.look(times=PROMPT_LOOKS - 1)
    assert not reactor.look(PROMPT_SECONDS - 0.01)
    assert formatEvent(events[-1]) == "new clients are served again"
    assert not reactor.look(LATE_SECONDS, times=LATE_LOOKS - 1)


def test_lagging_server(house):
    """New clients get 503 and Retry-After, those on this machine too; the others stay, and health checks succeed."""
    member = over(house)
    house.limits.lateness.refuses = True
    for host in ("192.0.2.7", "127.0.0.1"):
        refused = over(house, host=host)
        assert (refused.status, refused.retry_after) == (503, RETRY_SECONDS)
    assert stream(house).response()[1] == f"retry: {RETRY_SECONDS * 1000}\n\n"
    member.post("still here")
    assert member.read()[-1]["data"]["message"] == "still here"
    assert [house.get(path)[0].status for path in (b"/healthz", b"/readyz", b"/rooms/main/messages")] == [200] * 3
    assert house.limits.refusals["lag"] == 3


# Crowds


def join(house):
    """Return a client whose handshake was sent, before the reactor turns."""
    return WebSocketClient(house.factory)


def test_crowd_of_handshakes():
    """The first handshakes are answered at once, and the others in later turns, before what they send next."""
    house = House(per_address=99)
    early = [join(house) for _ in range(PROMPT_HANDSHAKES)]
    late = [join(house) for _ in range(3)]
    assert all(client.status == 101 for client in early)
    assert [client.transport.value() for client in late] == [b""] * 3
    late[0].lose()
    late[1].protocol.dataReceived(masked(b'{"username":"ann","message":"early"}'))
    assert [client.transport.producerState for client in late] == ["producing", "paused", "producing"]
    house.turn()
    assert late[0].transport.value() == b""
    frames = late[1].transport.value()
    assert frames.startswith(b"HTTP/1.1 101 ")
    assert frames.index(b'"type":"history"') < frames.index(b'"early"')
    assert late[1].transport.producerState == "producing"
    assert len(house.connections.connected) == PROMPT_HANDSHAKES + 2
    assert house.limits.place(late[1].transport.getPeer(), None).connections == PROMPT_HANDSHAKES + 2
    house.clock.advance(1)
    assert join(house).status == 101
