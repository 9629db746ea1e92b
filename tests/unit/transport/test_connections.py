"""The deadlines of connections, and how all of them end."""

import pytest
from support.helpers import PING_SECONDS
from twisted.internet.abstract import FileDescriptor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from chatd.transport.connections import CLOSE_SECONDS, HANDSHAKE_SECONDS, STALL_SECONDS, Connections, buffered
from chatd.transport.identity import ANYONE, LEEWAY_SECONDS, Identity


class Connection:
    """A connection that records its calls."""

    peer = "192.0.2.7:4321"
    carrier = "websocket"
    member = property(lambda self: self)
    joined = True
    answers = True
    number = 0
    buffered = 0
    identity = ANYONE

    def __init__(self):
        self.journal = []

    def ping(self):
        self.journal.append("ping")
        return self.answers

    def evict(self):
        self.journal.append("overrun")
        self.joined = False

    def abort(self):
        self.journal.append("abort")

    def expire(self):
        self.journal.append("expire")
        self.joined = False


@pytest.fixture
def client():
    return Connection()


def reasons(events):
    return [event["why"] for event in events if "why" in event]


# Coming and going


def test_no_connections_at_first(connections):
    assert connections.connected == set()
    assert not connections.stopping
    assert connections.closes == {}


def test_add_ends_the_handshake_deadline(connections, client):
    connections.handshakes.add(client)
    connections.add(client)
    assert connections.connected == {client}
    assert [*connections.handshakes] == []
    assert [*connections.pings] == [client]


def test_remove_leaves_no_trace(connections, client, pass_time):
    connections.add(client)
    for deadlines in (connections.handshakes, connections.closings, connections.stalls):
        deadlines.add(client)
    assert connections.remove(client, 1000)
    assert connections.connected == set()
    pass_time(STALL_SECONDS + 1)
    assert client.journal == []


def test_remove_during_the_handshake(connections, client):
    """It is not counted as a close."""
    connections.handshakes.add(client)
    assert not connections.remove(client, 1000)
    assert [*connections.handshakes] == []


def test_remove_twice(connections, client):
    connections.add(client)
    assert connections.remove(client, 1000)
    assert not connections.remove(client, 1000)


def test_closes_are_counted_by_carrier_and_code(connections):
    for carrier, code in [("websocket", 1000), ("websocket", 1012), ("events", 1012), ("websocket", 1000)]:
        client = Connection()
        client.carrier = carrier
        connections.add(client)
        connections.remove(client, code)
    connections.remove(Connection(), 1006)  # its handshake was never answered
    assert connections.closes == {("websocket", 1000): 2, ("websocket", 1012): 1, ("events", 1012): 1}


def test_ping_interval_is_an_option(clock):
    connections = Connections(clock, 3)
    client = Connection()
    connections.add(client)
    for journal in ([], [], ["ping"], ["ping"], ["ping"], ["ping", "ping"]):
        clock.advance(1)
        connections.check_deadlines()
        assert client.journal == journal


# Looking


def test_slow_handshake_is_dropped_and_logged_once(connections, client, pass_time, events):
    connections.handshakes.add(client)
    pass_time(HANDSHAKE_SECONDS - 1)
    assert client.journal == []
    pass_time(HANDSHAKE_SECONDS)
    assert client.journal == ["abort"]
    assert [event["log_format"].format(**event) for event in events] == [
        "#0 192.0.2.7:4321 is dropped: it sent no whole request in time"
    ]


def test_answered_pings_continue(connections, client, pass_time):
    connections.add(client)
    pass_time(PING_SECONDS - 1)
    assert client.journal == []
    pass_time(1)
    assert client.journal == ["ping"]
    pass_time(2 * PING_SECONDS)
    assert client.journal == ["ping"] * 3


def test_drop_after_an_unanswered_ping(connections, client, pass_time, events):
    connections.add(client)
    pass_time(PING_SECONDS)
    client.answers = False
    pass_time(PING_SECONDS - 1)
    assert client.journal == ["ping"]
    pass_time(2 * PING_SECONDS)
    assert client.journal == ["ping", "ping", "abort"]
    assert reasons(events) == ["did not answer a ping"]


def test_stalled_client_is_evicted_then_dropped(connections, client, pass_time, events):
    connections.stalls.add(client)
    pass_time(STALL_SECONDS - 1)
    assert client.journal == []
    pass_time(1)
    assert client.journal == ["overrun"]
    pass_time(STALL_SECONDS - 1)
    assert client.journal == ["overrun"]
    pass_time(STALL_SECONDS)
    assert client.journal == ["overrun", "abort"]
    assert reasons(events) == ["took nothing"]


def test_stalled_client_that_is_closing_is_dropped(connections, client, pass_time):
    client.joined = False
    connections.stalls.add(client)
    pass_time(STALL_SECONDS)
    assert client.journal == ["abort"]


def test_client_that_reads_again_stays(connections, client, pass_time):
    connections.stalls.add(client)
    pass_time(STALL_SECONDS - 1)
    connections.stalls.discard(client)
    pass_time(STALL_SECONDS)
    assert client.journal == []


@pytest.fixture
def few_bytes(monkeypatch):
    """Let all transports together hold 100 bytes."""
    monkeypatch.setattr("chatd.transport.connections.MAX_BUFFERED", 100)


def test_buffers_of_all_clients(few_bytes, connections, pass_time, events):
    """While all hold too many bytes, the client that holds the most is evicted and dropped."""
    clients = [Connection() for _ in range(4)]
    for client, held in zip(clients, (30, 50, 40, 29), strict=True):
        client.buffered = held
        connections.stalls.add(client)
    clients[2].joined = False  # its close is under way
    pass_time(1)
    assert [client.journal for client in clients] == [[], ["overrun", "abort"], [], []]
    assert connections.buffered == 99
    connections.stalls.discard(clients[1])
    clients[3].buffered = 31
    pass_time(1)
    assert [client.journal for client in clients] == [[], ["overrun", "abort"], ["abort"], []]
    assert [event["why"] for event in events] == ["did not read its bytes, the most of too many,"] * 2


def test_buffers_within_the_bound(few_bytes, connections, client, pass_time):
    client.buffered = 100
    connections.stalls.add(client)
    pass_time(STALL_SECONDS - 1)
    assert (client.journal, connections.buffered) == ([], 100)


def test_buffered_bytes_of_transports():
    """They are counted down to the socket, below TLS and the PROXY protocol."""
    below = FileDescriptor(MemoryReactorClock())
    below.connected = 1
    below.write(b"x" * 10)
    below.dataBuffer, below.offset = b"y" * 7, 2
    assert buffered(below) == 15
    above = ProtocolWrapper(WrappingFactory(Factory()), Protocol())
    above.transport = below
    above._appSendBuffer = [b"z" * 3, b"z"]
    assert buffered(above) == 19
    assert buffered(None) == 0


def test_unanswered_close(connections, client, pass_time, events):
    """The client is dropped."""
    connections.closings.add(client)
    pass_time(CLOSE_SECONDS - 1)
    assert client.journal == []
    pass_time(CLOSE_SECONDS)
    assert client.journal == ["abort"]
    assert reasons(events) == ["did not answer the close"]


def test_each_has_deadlines_of_its_own(connections, pass_time):
    early, late = Connection(), Connection()
    connections.add(early)
    pass_time(1)
    connections.add(late)
    pass_time(PING_SECONDS - 1)
    assert (early.journal, late.journal) == (["ping"], [])
    pass_time(1)
    assert (early.journal, late.journal) == (["ping"], ["ping"])


# The end


def test_unanswered_close_of_a_full_transport(connections, client, pass_time):
    """The client is dropped, however full its transport is."""
    connections.add(client)
    connections.stalls.add(client)
    connections.closings.add(client)
    pass_time(CLOSE_SECONDS)
    assert client.journal == ["abort"]


def test_abort_drops_what_is_left_and_unfinished_handshakes(connections):
    joined, unfinished = Connection(), Connection()
    connections.add(joined)
    connections.handshakes.add(unfinished)
    connections.abort()
    assert (joined.journal, unfinished.journal) == (["abort"], ["abort"])


def test_empty_fires_at_once_without_connections(connections):
    assert connections.empty().called


def test_empty_fires_once_for_every_caller(connections):
    first, last = Connection(), Connection()
    connections.add(first)
    connections.add(last)
    fired = []
    connections.empty().addCallback(lambda _: fired.append("one"))
    connections.empty().addCallback(lambda _: fired.append("other"))
    connections.remove(first, 1000)
    assert fired == []
    connections.remove(last, 1000)
    assert fired == ["one", "other"]
    connections.add(first)
    connections.remove(first, 1000)
    assert fired == ["one", "other"]


def test_unfinished_handshakes_are_not_waited_for(connections, client):
    connections.handshakes.add(client)
    assert connections.empty().called


# Tokens


class Wall:
    """A wall clock, which can be set."""

    now = 1_790_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def wall():
    return Wall()


@pytest.fixture
def guarded(clock, wall):
    """The connections of a server with tokens, which needs no pings."""
    return Connections(clock, 10_000, wall)


def test_token_expires(guarded, client, clock, wall):
    """A connection is closed when its token and the leeway are over, and not a second time."""
    client.identity = Identity("s", "ann", wall.now + 10)
    guarded.add(client)
    clock.advance(10 + LEEWAY_SECONDS - 1)
    guarded.check_deadlines()
    assert client.journal == []
    clock.advance(1)
    guarded.check_deadlines()
    guarded.check_deadlines()
    assert client.journal == ["expire"]


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_jump_of_the_wall_clock(guarded, client, clock, wall, jump):
    """A wall clock that is set changes no deadline of a token that was accepted before."""
    client.identity = Identity("s", "ann", wall.now + 10)
    guarded.add(client)
    wall.now += jump
    clock.advance(10 + LEEWAY_SECONDS - 1)
    guarded.check_deadlines()
    assert client.journal == []
    clock.advance(1)
    guarded.check_deadlines()
    assert client.journal == ["expire"]


def test_renewal_moves_the_expiry(guarded, client, clock, wall):
    """The newest token counts, whether it lasts longer or not."""
    for lasts, over in ((10, 100), (100, 5)):
        client.identity = Identity("s", "ann", wall.now + lasts)
        guarded.add(client)
        client.identity = Identity("s", "ann", wall.now + over)
        guarded.expect_expiry(client)
        clock.advance(over + LEEWAY_SECONDS - 1)
        guarded.check_deadlines()
        assert client.journal == []
        clock.advance(1)
        guarded.check_deadlines()
        assert client.journal == ["expire"]
        client.journal.clear()
        client.joined = True


def test_connection_that_closes_is_not_expired(guarded, client, clock, wall):
    """A connection that has left its room, or has ended, is not closed again."""
    client.identity = Identity("s", "ann", wall.now)
    guarded.add(client)
    client.joined = False
    clock.advance(LEEWAY_SECONDS)
    guarded.check_deadlines()
    guarded.add(client)
    guarded.remove(client, 1000)
    clock.advance(LEEWAY_SECONDS)
    guarded.check_deadlines()
    assert client.journal == []
