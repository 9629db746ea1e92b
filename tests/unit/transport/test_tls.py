"""TLS on a socket: the handshake, full sockets, bursts, and every way to end."""

import ssl
from contextlib import suppress
from socket import socketpair

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from support.servers import certificate_for
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from zope.interface import implementer

from chatd.transport.tls import MAX_SILENT, RECORD, Certificate, TlsServer

pytestmark = pytest.mark.filterwarnings("ignore:Passing pyOpenSSL")
"""Twisted uses pyOpenSSL in a way that the latter deprecates."""


@implementer(IProtocolNegotiationFactory)
class Negotiating(Factory):
    def acceptableProtocols(self):
        return [b"http/1.1"]


class Recorder(Protocol):
    """A protocol, and the producer of its transport."""

    paused = False

    def __init__(self):
        self.received = []
        self.lost = None

    def dataReceived(self, data):
        self.received.append(data)

    def connectionLost(self, reason):
        self.lost = reason.type

    def pauseProducing(self):
        self.paused = True

    def resumeProducing(self):
        self.paused = False

    def stopProducing(self):
        pass


class Pair:
    """A server and a client over a socket pair, in no event loop."""

    def __init__(self, folder, certificate, trust):
        trust.set_alpn_protocols(["h2", "http/1.1"])
        own, self.raw = socketpair()
        self.raw.settimeout(0)
        self.reactor = MemoryReactorClock()
        self.protocol = Recorder()
        self.server = TlsServer(certificate, own, self.protocol, ("192.0.2.1", 1), None, 0, self.reactor)
        self.protocol.makeConnection(self.server)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.keys = trust.keylog_filename = folder / "keys"
        self.client = trust.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")

    def exchange(self):
        """Carry what both ends have sent."""
        if self.outgoing.pending:
            self.raw.sendall(self.outgoing.read())
        with suppress(BlockingIOError):
            while data := self.raw.recv(1 << 16):
                self.incoming.write(data)

    def handshake(self):
        for _ in range(4):
            with suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            self.exchange()
            assert self.server.doRead() is None
            self.exchange()
        return self

    def read(self):
        """Return what the client has received."""
        self.exchange()
        parts = []
        with suppress(ssl.SSLWantReadError):
            while part := self.client.read(1 << 16):
                parts.append(part)
        return b"".join(parts)

    def fill(self):
        """Fill the socket of the server; return the number of bytes."""
        junk = 0
        with suppress(BlockingIOError):
            while True:
                junk += self.server.socket.send(bytes(1 << 12))
        return junk

    def empty(self, junk):
        while junk:
            junk -= len(self.raw.recv(junk))

    @property
    def waits_to_write(self):
        return self.server in self.reactor.getWriters()

    @property
    def waits_to_read(self):
        return self.server in self.reactor.getReaders()

    def end(self):
        self.raw.close()
        if self.protocol.lost is None:
            self.server.connectionLost(Failure(CONNECTION_DONE))


@pytest.fixture
def connect(tmp_path):
    """Return a function that connects a client to one port."""
    _, trust = certificate_for(tmp_path)
    pem = (tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes()
    certificate = Certificate(PrivateCertificate.loadPEM(pem).options(), Negotiating())
    pairs = []

    def connect():
        pairs.append(Pair(tmp_path, certificate, trust))
        return pairs[-1]

    yield connect
    for pair in pairs:
        pair.end()
    assert certificate.incoming.pending == certificate.outgoing.pending == 0


@pytest.fixture
def pair(connect):
    return connect()


def test_write_to_an_idle_socket(pair):
    """Bytes are on their way when write() returns, and the reactor is not asked to wait for the socket."""
    pair.handshake().server.write(b"hello")
    assert not pair.waits_to_write
    assert pair.read() == b"hello"
    assert pair.client.selected_alpn_protocol() == "http/1.1"
    assert pair.server.getPeerCertificate() is None


def test_write_before_the_handshake(pair):
    """The bytes wait for the client, and the reactor does not turn in vain meanwhile."""
    pair.server.write(b"hel")
    pair.server.write(b"lo")
    assert not pair.waits_to_write
    assert pair.handshake().read() == b"hello"
    assert not pair.waits_to_write


def test_write_of_a_sequence(pair):
    pair.handshake().server.writeSequence([b"hel", b"", b"lo"])
    assert pair.read() == b"hello"


def test_write_of_nothing(pair):
    """An empty record would cost the client as much as another."""
    pair.handshake().server.write(b"")
    with pytest.raises(BlockingIOError):
        pair.raw.recv(1)


def test_handshake_into_a_full_socket(pair):
    """OpenSSL goes on when the socket takes more, though it was reading."""
    junk = pair.fill()
    with suppress(ssl.SSLWantReadError):
        pair.client.do_handshake()
    pair.raw.sendall(pair.outgoing.read())
    assert pair.server.doRead() is None
    assert pair.waits_to_write
    assert pair.server.doWrite() is None
    assert pair.waits_to_write
    pair.empty(junk)
    assert pair.server.doWrite() is None
    assert not pair.waits_to_write
    pair.handshake().server.write(b"hello")
    assert pair.read() == b"hello"


def test_full_socket(pair):
    """The client gets every byte once and in order; the producer is paused meanwhile."""
    pair.handshake().server.registerProducer(pair.protocol, streaming=True)
    sent = b"".join(b"%7d\n" % number for number in range(1 << 17))
    pair.server.write(sent[:7])
    pair.server.write(sent[7:-9])
    pair.server.write(sent[-9:])
    assert pair.protocol.paused
    assert pair.waits_to_write
    received = b""
    while pair.waits_to_write:
        received += pair.read()
        assert pair.server.doWrite() is None
    assert received + pair.read() == sent
    assert not pair.protocol.paused


def test_pull_producer(pair):
    """The reactor asks for more when the socket has taken all."""
    pair.handshake()
    asked = []
    pair.protocol.resumeProducing = lambda: asked.append(pair.server.write(b"more"))
    pair.server.registerProducer(pair.protocol, streaming=False)
    assert pair.waits_to_write
    assert pair.server.doWrite() is None
    assert len(asked) == 2
    assert pair.read() == b"moremore"


def test_burst_of_small_records(pair):
    """One turn reads a bounded number of bytes, and so of records."""
    pair.handshake()
    most = RECORD // 23  # a record of one byte has a head of 5, a type of 1, and a tag of 16
    for _ in range(most + 9):
        pair.client.write(b"x")
    pair.exchange()
    assert pair.server.doRead() is None
    assert pair.server.doRead() is None
    assert pair.protocol.received == [b"x" * most, b"x" * 9]


def test_large_record(pair):
    """A record arrives in two turns."""
    pair.handshake().client.write(bytes(RECORD))
    pair.exchange()
    assert pair.server.doRead() is None
    assert pair.protocol.received == []
    assert pair.server.doRead() is None
    assert pair.server.doRead() is None  # there is nothing more
    assert pair.protocol.received == [bytes(RECORD)]


def test_much_data(pair):
    """The bound on bytes without data begins again with each record."""
    pair.handshake()
    for _ in range(2 * MAX_SILENT // RECORD):
        pair.client.write(bytes(RECORD))
        pair.exchange()
        assert pair.server.doRead() is None
        assert pair.server.doRead() is None
    assert len(b"".join(pair.protocol.received)) == 2 * MAX_SILENT


def flooded(pair, flood):
    """Send bytes turn by turn until the server ends the connection; return the number of turns and the end."""
    turns = 0
    end = None
    while end is None and turns < 99:
        pair.raw.sendall(flood[turns * RECORD :][:RECORD])
        turns += 1
        end = pair.server.doRead()
    return turns, end


def test_hello_in_records_of_one_byte(pair):
    """OpenSSL would read 131 KB in 131,000 records; the server closes first, and reads a bounded part in each turn."""
    hello = b"\1" + (131_000).to_bytes(3, "big") + bytes(131_000)
    records = b"".join(b"\x16\3\1\0\1" + bytes([one]) for one in hello)
    turns, end = flooded(pair, records)
    assert end is CONNECTION_LOST
    assert turns == MAX_SILENT // RECORD + 1


def new_keys(pair, count, *, answered):
    """Return records that change the keys of the client, and then one with data (RFC 8446, sections 4.6.3 and 7)."""

    def derived(secret, label, size):
        info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
        return HKDFExpand(SHA384(), size, info).derive(secret)

    def record(secret, content):
        head = b"\x17\x03\x03" + (len(content) + 16).to_bytes(2, "big")
        return head + AESGCM(derived(secret, b"key", 32)).encrypt(derived(secret, b"iv", 12), content, head)

    assert pair.client.cipher()[0] == "TLS_AES_256_GCM_SHA384"
    (line,) = (line for line in pair.keys.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0 "))
    secret = bytes.fromhex(line.split()[2])
    records = []
    for _ in range(count):
        records.append(record(secret, b"\x18\0\0\1" + bytes([answered]) + b"\x16"))
        secret = derived(secret, b"traffic upd", 48)
    return b"".join(records) + record(secret, b"hello\x17")


@pytest.mark.parametrize("answered", [False, True])
def test_new_keys(pair, answered):
    """A client may change its keys, and ask for new keys of the server."""
    pair.handshake().raw.sendall(new_keys(pair, 8, answered=answered))
    assert pair.server.doRead() is None
    assert pair.protocol.received == [b"hello"]


@pytest.fixture
def blocked(pair):
    """A connection that has answered new keys, and whose socket is full."""
    pair.handshake()
    pair.junk = pair.fill()
    pair.raw.sendall(new_keys(pair, 2, answered=True))
    assert pair.server.doRead() is None
    assert pair.waits_to_write
    assert pair.protocol.received == [b"hello"]
    return pair


def test_new_keys_into_a_full_socket(blocked):
    """The answers wait before the next data."""
    blocked.server.write(b"hello")
    blocked.empty(blocked.junk)
    assert blocked.server.doWrite() is None
    assert not blocked.waits_to_write
    assert blocked.read() == b"hello"


def test_server_closes_while_the_socket_is_full(blocked):
    """A connection ends when its last bytes are sent."""
    blocked.server.loseConnection()
    assert blocked.server.doWrite() is None
    blocked.empty(blocked.junk)
    assert blocked.server.doWrite() is CONNECTION_DONE


def test_new_keys_while_much_waits(pair):
    """A client that reads nothing could ask for answers without end."""
    pair.handshake().fill()
    pair.server.write(bytes(pair.server.bufferSize))
    pair.raw.sendall(new_keys(pair, 2, answered=True))  # the second one makes OpenSSL answer the first
    assert pair.server.doRead() is CONNECTION_LOST


@pytest.mark.parametrize("answered", [False, True])
def test_flood_of_new_keys(pair, answered):
    """The server closes, and no turn reads more than a few of them."""
    flood = new_keys(pair.handshake(), 2 * MAX_SILENT // 27, answered=answered)
    turns, end = flooded(pair, flood)
    assert end is CONNECTION_LOST
    assert MAX_SILENT // RECORD <= turns <= MAX_SILENT // RECORD + 1
    assert pair.protocol.received == []


def test_client_closes(pair):
    """The bytes before the end are delivered first."""
    pair.handshake().client.write(b"bye")
    with suppress(ssl.SSLWantReadError):
        pair.client.unwrap()
    pair.exchange()
    assert pair.server.doRead() is CONNECTION_DONE
    assert pair.protocol.received == [b"bye"]


def test_client_vanishes(pair):
    """An end without a close_notify is no clean end; the next write finds that too."""
    pair.handshake().raw.close()
    assert pair.server.doRead() is CONNECTION_LOST
    pair.server.write(b"hello")
    assert pair.waits_to_write
    assert pair.server.doWrite() is CONNECTION_LOST


def test_client_resets(pair):
    """The socket itself fails."""
    pair.handshake().server.write(b"hello")
    pair.raw.close()
    assert pair.server.doRead() is CONNECTION_LOST


def test_close_while_the_socket_is_full(pair):
    """A client that has read too little misses the close_notify, and delays nothing."""
    pair.handshake().fill()
    pair.server.loseConnection()
    assert pair.server.doWrite() is CONNECTION_DONE


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\3\1\0\4\x63\0\0\0"])
def test_client_that_speaks_no_tls(pair, sent):
    """A later write ends the connection, whose stream would have a gap."""
    pair.raw.sendall(sent)
    assert pair.server.doRead() is CONNECTION_LOST
    pair.server.write(b"hello")
    pair.reactor.advance(0)
    assert pair.protocol.lost is ConnectionAborted


def test_alert(pair):
    """A client with a fault learns which."""
    pair.raw.sendall(b"\x16\3\1\0\4\x63\0\0\0")
    assert pair.server.doRead() is CONNECTION_LOST
    assert pair.raw.recv(9) == b"\x15\3\3\0\2\2\x0a"  # unexpected_message (RFC 8446, section 6)


def test_connections_share_no_bytes(connect):
    """The rest of what one client has sent, and of the answer to it, does not reach another."""
    good, bad, closing = connect().handshake(), connect(), connect().handshake()
    bad.raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
    assert bad.server.doRead() is CONNECTION_LOST
    bad.server.write(b"lost")
    with suppress(ssl.SSLWantReadError):
        closing.client.unwrap()
    closing.exchange()
    closing.raw.sendall(b"more")
    assert closing.server.doRead() is CONNECTION_DONE
    good.client.write(b"ping")
    good.exchange()
    assert good.server.doRead() is None
    assert good.protocol.received == [b"ping"]
    good.server.write(b"pong")
    assert good.read() == b"pong"


def test_server_closes(pair):
    """The client gets all bytes and a close_notify; later writes are dropped."""
    pair.handshake().server.write(b"bye")
    pair.server.loseConnection()
    assert pair.server.doWrite() is CONNECTION_DONE
    pair.server.connectionLost(Failure(CONNECTION_DONE))
    pair.server.connectionLost(Failure(CONNECTION_LOST))
    assert pair.protocol.lost is ConnectionDone
    pair.server.write(b"too late")
    assert pair.read() == b"bye"
    assert pair.client.read(1) == b""


def test_server_closes_before_the_handshake(pair):
    pair.server.loseConnection()
    assert pair.server.doWrite() is CONNECTION_DONE
    pair.server.connectionLost(Failure(CONNECTION_LOST))
    assert pair.protocol.lost is ConnectionLost


def test_server_closes_before_it_can_write(pair):
    """What waits for the handshake is lost: only the client can continue that, and nothing is read any more."""
    pair.server.write(b"bye")
    pair.server.loseConnection()
    assert pair.server.doWrite() is CONNECTION_LOST
