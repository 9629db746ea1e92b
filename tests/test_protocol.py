"""A connection is a member of a room: over in-memory transports, with an injected clock."""

import json

import pytest
import txaio
from autobahn.twisted.websocket import WebSocketServerProtocol
from helpers import HEAD, masked, read_frames
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.internet.testing import StringTransport
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure

from chatd import protocol, web
from chatd.protocol import ChatFactory, ChatProtocol
from chatd.rooms import LogUnavailable, Rooms
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore

HANDSHAKE = HEAD + b"\r\n\r\n"


@pytest.fixture(autouse=True)
def _restore_autobahns_clock():
    before = txaio.config.loop
    yield
    txaio.config.loop = before


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store():
    store = MemoryStore(Retention(), lambda: 1_800_000_000.0)
    store.open(())
    return store


@pytest.fixture
def factory(store, clock):
    return ChatFactory(Rooms(store, clock, 100), web.site(lambda: None, clock, page=True), clock)


class Wire(StringTransport):
    """A transport that buffers without end, as TLS does."""

    aborted = False

    def setTcpNoDelay(self, enabled):
        self.noDelay = enabled

    def abortConnection(self):
        self.aborted = True
        self.loseConnection()

    def registerProducer(self, producer, streaming):
        super().registerProducer(producer, streaming)
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self):
        self.producer = None  # as Twisted's own do, also when there is none

    def resumeProducing(self):
        if not self.disconnecting:  # likewise
            super().resumeProducing()

    def read(self):
        data = self.value()
        self.clear()
        return data


class Socket:
    """A TCP socket that takes `space` bytes more, or all."""

    def __init__(self):
        self.sent = b""
        self.space = None

    def send(self, data):
        if self.space == 0:
            raise BlockingIOError
        taken = len(data) if self.space is None else min(self.space, len(data))
        if self.space is not None:
            self.space -= taken
        self.sent += data[:taken]
        return taken


class Tcp(Wire, Connection):
    """A TCP connection as Twisted has it, down to the socket."""

    def __init__(self):
        Wire.__init__(self, peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
        self.socket = Socket()

    def drain(self):
        """The reactor finds the socket empty, writes what is buffered, and asks its pull producer for more."""
        self.socket.sent += Wire.read(self)
        self.socket.space = None
        self.producer.resumeProducing()

    def read(self):
        data, self.socket.sent = self.socket.sent, b""
        return data


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

    def joins(self):
        self.sends(HANDSHAKE)
        answer, _, rest = self.transport.read().partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 ")
        return read_frames(rest)

    def posts(self, message="hi", username="ann"):
        self.sends(masked(json.dumps({"username": username, "message": message}).encode()))

    def reads(self):
        return read_frames(self.transport.read())

    def reads_close(self):
        """The code of the close frame that is all there is to read."""
        data = self.transport.read() + (Wire.read(self.transport) if isinstance(self.transport, Tcp) else b"")
        assert data[0] == 0x88
        return int.from_bytes(data[2:4])

    def goes(self, reason=ConnectionDone):
        self.now.connectionLost(Failure(reason()))


@pytest.fixture
def client(factory):
    return Client(factory)


# What Autobahn would give each connection


def test_a_connection_has_all_that_autobahn_would_have_given_it(factory):
    theirs = WebSocketServerProtocol()
    theirs.factory = factory
    theirs._connectionMade()
    ours = Client(factory).protocol
    own = {"is_closed", "is_open", "utf8validator", "trafficStats", "_transport_details"}
    for name, value in vars(theirs).items():
        assert hasattr(ours, name), name
        if callable(value):
            assert getattr(ours, name)(None) == value(None), name
        elif name not in own:
            assert getattr(ours, name) == value, name


def test_a_connection_that_waits_has_little_of_its_own(client):
    client.joins()
    assert set(vars(client.protocol)) <= {
        *("factory", "transport", "connected", "state", "data", "room", "cursor", "ready", "_socket"),
    }


def test_no_connection_is_counted_before_the_first(factory):
    assert factory.getConnectionCount() == 0


# Joining


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_a_client_gets_the_answer_and_the_history_at_once(factory, transport):
    client = Client(factory, transport())
    (history,) = client.joins()
    assert history["type"] == "history"
    assert factory.getConnectionCount() == 1
    assert client.transport.streaming is (transport is Wire)


def test_it_does_not_matter_how_a_handshake_is_cut(client):
    for byte in HANDSHAKE[:-1]:
        client.sends(bytes([byte]))
    assert client.transport.read() == b""
    client.sends(HANDSHAKE[-1:])
    assert client.transport.read().startswith(b"HTTP/1.1 101 ")


def test_frames_right_behind_the_handshake_are_read(client, clock):
    client.sends(HANDSHAKE + masked(b'{"username":"ann","message":"hi"}'))
    clock.advance(0)
    frames = read_frames(client.transport.read().partition(b"\r\n\r\n")[2])
    assert [frame["type"] for frame in frames] == ["history", "message"]


def test_chat_v1_is_chosen_when_it_is_offered(client):
    client.sends(HEAD + b"\r\nSec-WebSocket-Protocol: x, chat.v1\r\n\r\n")
    assert b"Sec-WebSocket-Protocol: chat.v1\r\n" in client.transport.read()


def test_other_subprotocols_are_not(client):
    client.sends(HEAD + b"\r\nSec-WebSocket-Protocol: x\r\n\r\n")
    assert b"Sec-WebSocket-Protocol" not in client.transport.read()


def test_a_good_handshake_of_another_form_is_autobahns_and_joins_too(client, clock):
    head = HEAD.replace(b"Connection: keep-alive, Upgrade", b"Connection: keep-alive\r\nConnection: Upgrade")
    client.sends(head + b"\r\nSec-WebSocket-Protocol: chat.v1\r\n\r\n")
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
def test_a_handshake_that_is_refused_is_told_why(client, events, old, new, code):
    client.sends(HANDSHAKE.replace(old, new))
    head, _, body = client.transport.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % code)
    assert b"Content-Length: %d" % len(body) in head
    assert body.endswith(b"\n")
    assert client.transport.disconnecting
    assert [event["code"] for event in events if "code" in event] == [code]
    client.goes()


def test_autobahn_refuses_an_unknown_path_too(client):
    head = HEAD.replace(b"GET / ", b"GET /nowhere ").replace(b"keep-alive, Upgrade", b"a\r\nConnection: Upgrade")
    client.sends(head + b"\r\n\r\n")
    assert client.transport.read().startswith(b"HTTP/1.1 404 ")


def test_a_head_without_end_is_refused(client):
    client.sends(b"GET / HTTP/1.1\r\nX: " + b"x" * protocol.MAX_HEAD)
    assert client.transport.read().startswith(b"HTTP/1.1 431 ")


def test_a_long_head_that_ends_is_refused(client):
    client.sends(HEAD + b"\r\nX: " + b"x" * protocol.MAX_HEAD + b"\r\n\r\n")
    assert client.transport.read().startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("transport", [Tcp, Wire])
def test_a_request_without_an_upgrade_is_the_web_sites(factory, transport):
    client = Client(factory, transport())
    client.sends(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    client.sends(b"\r\n")
    assert isinstance(client.now, web.HTTPChannel)
    answer = client.transport.value()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"ok\n")
    assert factory.getConnectionCount() == 0
    assert [*factory.handshakes] == []
    client.goes()


def test_behind_a_wrapper_the_web_site_is_put_in_the_wrapper(factory):
    wrapper = ProtocolWrapper(WrappingFactory(factory), factory.buildProtocol(None))
    wire = Wire()
    wrapper.makeConnection(wire)
    wrapper.dataReceived(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert wire.value().endswith(b"ok\n")
    assert isinstance(wrapper.wrappedProtocol, web.HTTPChannel)
    wrapper.connectionLost(Failure(ConnectionDone()))


class HeldStore(MemoryStore):
    """A store whose reads wait for the test."""

    def read(self, room, after, limit):
        self.reading = Deferred()
        self.page = super().read(room, after, limit).result
        return self.reading


@pytest.fixture
def held(clock):
    store = HeldStore(Retention(), lambda: 1_800_000_000.0)
    store.open(())
    return store


@pytest.fixture
def waiting(held, clock):
    """A client that waits for the log."""
    factory = ChatFactory(Rooms(held, clock, 100), web.site(lambda: None, clock, page=True), clock)
    client = Client(factory)
    client.sends(HANDSHAKE)
    return client


def test_while_the_room_is_loaded_nothing_more_is_read_from_the_client(held, waiting):
    assert waiting.transport.producerState == "paused"
    assert waiting.transport.read() == b""
    held.reading.callback(held.page)
    assert waiting.transport.producerState == "producing"
    assert waiting.transport.read().startswith(b"HTTP/1.1 101 ")


def test_a_log_that_is_down_is_503_and_when_to_try_again(held, waiting, events):
    held.reading.errback(LogUnavailable("down"))
    answer = waiting.transport.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 2\r\n" in answer
    assert "the log cannot be read: {error}" in [event["log_format"] for event in events]


def test_who_gave_up_while_the_room_was_loaded_does_not_join(held, waiting, clock):
    clock.advance(protocol.HANDSHAKE_SECONDS)
    waiting.protocol.factory.look()
    assert waiting.transport.aborted
    held.reading.callback(held.page)
    assert waiting.transport.read() == b""
    assert waiting.protocol.room is None
    assert not waiting.protocol.factory.connections


# Posting


def test_a_message_goes_to_all_and_its_sender(factory, clock):
    ann, bob = Client(factory), Client(factory)
    ann.joins()
    bob.joins()
    ann.posts("hi")
    clock.advance(0)
    (message,) = ann.reads()
    assert message["data"] == {"username": "ann", "message": "hi", "timestamp": "2027-01-15T08:00:00.000Z"}
    assert bob.reads() == [message]


def test_an_error_goes_to_the_sender_alone_and_closes_nothing(factory, clock):
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


def test_a_message_in_fragments_with_a_ping_between_is_put_together(client, clock):
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
        (masked(b"x" * (protocol.MAX_MESSAGE + 1)), 1009),
        (masked(b"", first=0x01) + masked(b"", first=0x00) * protocol.MAX_FRAGMENTS, 1008),
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
def test_what_no_client_may_send_closes_with_a_code_and_is_not_posted(client, clock, frame, code):
    client.joins()
    client.sends(frame + masked(b'{"username":"ann","message":"too late"}'))
    assert client.reads_close() == code
    client.posts()
    clock.advance(0)
    assert client.transport.read() == b""
    assert [*client.protocol.factory.closings] == [client.protocol]


def test_many_messages_of_many_fragments_are_fine(client, clock):
    client.joins()
    for _ in range(3):
        text = b'{"username":"ann","message":"hi"}'
        client.sends(masked(text[:1], first=0x01) + masked(b"", first=0x00) * 60 + masked(text[1:], first=0x80))
    clock.advance(0)
    assert len(client.reads()) == 3


class FullStore(MemoryStore):
    """A store whose disk is full."""

    def append(self, room, post, poster):
        self.refuse = lambda: poster.refused(post, LogUnavailable("disk full"))


def test_a_post_that_cannot_be_kept_is_answered_with_an_error(clock):
    store = FullStore(Retention(), lambda: 0.0)
    store.open(())
    client = Client(ChatFactory(Rooms(store, clock, 100), web.site(lambda: None, clock, page=True), clock))
    client.joins()
    client.posts()
    store.refuse()
    assert client.reads() == [
        {"type": "error", "message": "The message was not stored; try again.", "code": "UNAVAILABLE"}
    ]
    client.goes()
    store.refuse()
    assert client.transport.read() == b""


# Sending


def test_a_full_socket_is_left_alone_until_it_is_empty(client, clock):
    client.joins()
    client.transport.socket.space = 10
    client.posts("1")
    clock.advance(0)
    client.posts("2")
    clock.advance(0)
    assert not client.protocol.ready
    assert len(client.transport.socket.sent) == 10
    client.transport.drain()
    clock.advance(0)
    assert [frame["data"]["message"] for frame in client.reads()] == ["1", "2"]


def test_what_autobahn_sends_keeps_its_place_behind_what_is_buffered(client, clock):
    client.joins()
    client.transport.socket.space = 10
    client.posts("1")
    clock.advance(0)
    client.sends(masked(b"ping", first=0x89))
    client.transport.drain()
    data = client.transport.read()
    assert data.endswith(b"\x8a\x04ping")
    assert read_frames(data[:-6])[0]["data"]["message"] == "1"


def test_what_autobahn_sends_is_buffered_when_the_socket_does_not_take_it(client):
    client.joins()
    client.transport.socket.space = 2
    client.sends(masked(b"ping", first=0x89))
    assert not client.protocol.ready
    client.transport.drain()
    assert client.transport.read() == b"\x8a\x04ping"
    assert client.protocol.ready


@pytest.mark.parametrize("nonsense", [masked(b"nonsense"), masked(b"ping", first=0x89)], ids=["errors", "pongs"])
def test_who_does_not_read_his_answers_is_not_read(client, nonsense):
    client.joins()
    client.transport.socket.space = 0
    client.sends(nonsense)
    assert client.transport.producerState == "producing"  # one answer may be under way
    client.sends(nonsense)
    assert client.transport.producerState == "paused"
    client.transport.drain()
    assert client.transport.producerState == "producing"
    assert client.transport.read()


def test_a_transport_that_buffers_for_itself_pauses_its_member(factory, clock):
    client = Client(factory, Wire())
    client.joins()
    client.transport.producer.pauseProducing()
    client.posts()
    clock.advance(0)
    assert client.transport.read() == b""
    client.transport.producer.resumeProducing()
    clock.advance(0)
    assert len(client.reads()) == 1


def test_a_connection_that_is_gone_is_not_written_to(client):
    client.joins()
    producer = client.transport.producer
    client.goes()
    producer.resumeProducing()
    producer.stopProducing()
    assert client.transport.read() == b""


def test_a_member_that_the_tail_overran_is_closed_with_1013(client):
    client.joins()
    client.protocol.overrun()
    assert client.reads_close() == 1013


# Deadlines


def look(factory, clock, seconds):
    """Let time pass, and look each second as the service does."""
    for _ in range(seconds):
        clock.advance(1)
        factory.look()


def test_half_a_handshake_and_silence_is_dropped(client, factory, clock, events):
    client.sends(HANDSHAKE[:20])
    look(factory, clock, protocol.HANDSHAKE_SECONDS - 1)
    client.sends(HANDSHAKE[20:30])  # each byte does not buy new time
    assert not client.transport.aborted
    look(factory, clock, 1)
    assert client.transport.aborted
    assert "sent no whole request" in [event.get("why") for event in events]


def test_who_answers_pings_stays(client, factory, clock):
    client.joins()
    for _ in range(4):
        look(factory, clock, protocol.PING_SECONDS)
        assert client.transport.read() == b"\x89\x00"
        client.sends(masked(b"", first=0x8A))
    assert not client.transport.aborted


def test_who_does_not_answer_a_ping_is_dropped_at_the_next(client, factory, clock):
    client.joins()
    look(factory, clock, protocol.PING_SECONDS)
    assert not client.transport.aborted
    look(factory, clock, protocol.PING_SECONDS)
    assert client.transport.aborted


def stall(client, factory, clock):
    """Take nothing for so long that the server has had enough."""
    client.joins()
    client.transport.socket.space = 0
    client.posts()
    clock.advance(0)
    look(factory, clock, protocol.PING_SECONDS)
    client.sends(masked(b"", first=0x8A))
    look(factory, clock, protocol.STALL_SECONDS - protocol.PING_SECONDS)


def test_who_took_nothing_for_too_long_and_then_reads_is_told_to_come_back(client, factory, clock):
    stall(client, factory, clock)
    assert factory.rooms._rooms == {}
    look(factory, clock, protocol.STALL_SECONDS - 1)
    assert not client.transport.aborted
    client.transport.drain()
    data = client.transport.read().replace(b"\x89\x00", b"")  # without the ping
    close = data.index(b"\x88")
    assert read_frames(data[:close])[0]["data"]["message"] == "hi"
    assert int.from_bytes(data[close + 2 : close + 4]) == 1013
    look(factory, clock, protocol.CLOSE_SECONDS)
    assert client.transport.aborted


def test_who_takes_nothing_even_then_is_dropped(client, factory, clock, events):
    stall(client, factory, clock)
    look(factory, clock, protocol.STALL_SECONDS)
    assert client.transport.aborted
    assert "took nothing" in [event.get("why") for event in events]


def test_a_transport_that_takes_something_has_all_its_time_again(client, factory, clock):
    client.joins()
    for _ in range(3):
        client.transport.socket.space = 0
        client.posts()
        clock.advance(0)
        look(factory, clock, protocol.STALL_SECONDS - 20)
        client.sends(masked(b"", first=0x8A))
        client.transport.drain()
        clock.advance(0)
    assert not client.transport.aborted


def test_who_does_not_answer_a_close_is_dropped(client, factory, clock):
    client.joins()
    client.protocol.close(1012, "restarting")
    look(factory, clock, protocol.CLOSE_SECONDS)
    assert client.transport.aborted


# Going


def test_a_close_is_answered_and_the_member_leaves(client, factory, clock):
    client.joins()
    client.sends(masked(b"\x03\xe8", first=0x88))
    assert client.transport.disconnecting
    assert factory.rooms._rooms == {}
    client.goes()
    assert factory.getConnectionCount() == 0
    assert not factory.connections


def test_a_connection_that_breaks_leaves_nothing_behind(client, factory, clock):
    client.joins()
    client.transport.socket.space = 0
    client.posts()
    clock.advance(0)
    client.goes(ConnectionLost)
    left = (factory.handshakes, factory.closings, factory.stalls, factory.pings)
    assert [[*deadlines] for deadlines in left] == [[], [], [], []]
    assert factory.rooms._rooms == {}
    assert factory.getConnectionCount() == 0


def test_a_connection_that_never_asked_for_anything_leaves_nothing_behind(client, factory, events):
    client.goes(ConnectionLost)
    assert [*factory.handshakes] == []
    assert [event for event in events if event["log_namespace"] == "chatd.protocol"] == []


def test_joining_refusals_and_leaving_are_logged_without_what_was_said(client, events):
    client.joins()
    client.sends(masked(b'{"username":"ann","secret":"tell nobody"}'))
    client.goes()
    ours = [event for event in events if event["log_namespace"] == "chatd.protocol"]
    assert [event["log_format"] for event in ours] == [
        "{peer} joined {room}",
        "{peer} posted what is refused",
        "{peer} left: {code}",
    ]
    assert {event["peer"] for event in ours} == {"192.0.2.7:4321"}
    assert not [event for event in events if "tell nobody" in str(event) or "secret" in str(event)]


def test_a_peer_without_a_port_has_a_name_too(factory):
    wire = Wire(peerAddress=UNIXAddress(b"/run/x"))
    assert "UNIXAddress" in Client(factory, wire).protocol.peer


def test_a_socket_without_the_option_of_no_delay_is_served(factory):
    class Unix(Tcp):
        def setTcpNoDelay(self, enabled):
            raise OSError

    assert Client(factory, Unix()).joins()


def test_closing_all_tells_every_client_and_fires_when_the_last_is_gone(factory, clock):
    clients = [Client(factory) for _ in range(3)]
    for client in clients:
        client.joins()
    done = []
    factory.empty().addCallback(done.append)
    factory.close(1012, "restarting")
    assert [client.reads_close() for client in clients] == [1012] * 3
    for client in clients:
        assert not done
        client.sends(masked(b"\x03\xf4", first=0x88))
        client.goes()
    assert done == [None]
    assert factory.empty().called


def test_abort_drops_what_is_left_and_unfinished_handshakes(factory):
    joined, unfinished = Client(factory), Client(factory)
    joined.joins()
    factory.abort()
    assert joined.transport.aborted
    assert unfinished.transport.aborted


def test_ours_shadows_nothing_of_autobahns_by_accident():
    meant = {
        *(
            "connectionLost",
            "connectionMade",
            "dataReceived",
            "failHandshake",
            "onClose",
            "onConnect",
            "onMessage",
            "onMessageFrameBegin",
        ),
        *("onOpen", "onPong", "peer", "processHandshake", "sendCloseFrame", "sendData", "__init__"),
        *("is_closed", "is_open", "log"),
        *("__module__", "__doc__", "__annotations__", "__implemented__", "__provides__", "__providedBy__"),
    }
    names = set(vars(ChatProtocol)) - meant
    assert {name for name in names if hasattr(WebSocketServerProtocol, name)} == set()


def test_who_comes_while_the_server_stops_is_told_when_to_come_again(factory, client):
    factory.close(1012, "restarting")
    client.sends(HANDSHAKE)
    answer = client.transport.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After" in answer


def test_who_waits_for_the_log_when_the_server_stops_is_told_too(held, waiting):
    waiting.protocol.factory.close(1012, "restarting")
    held.reading.callback(held.page)
    assert waiting.transport.read().startswith(b"HTTP/1.1 503 ")
    assert not waiting.protocol.factory.connections
