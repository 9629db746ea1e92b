"""TLS on a socket: the handshake, full sockets, bursts, and every way to end."""

import ssl
from contextlib import suppress
from socket import socketpair

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL._util import lib
from support.servers import certificate_for
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import PrivateCertificate
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from zope.interface import implementer

from chatd.transport.tls import MAX_CHANGES, RECORD, RECORDS_PER_TURN, Certificate, TlsServer

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
    """A server and a client over a socket pair, in no event loop.

    `instead` returns what the server gets instead of OpenSSL's connection.
    """

    def __init__(self, folder, instead):
        _, trust = certificate_for(folder)
        pem = (folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes()
        certificate = Certificate(PrivateCertificate.loadPEM(pem).options(), Negotiating())
        trust.set_alpn_protocols(["h2", "http/1.1"])
        own, self.raw = socketpair()
        self.raw.settimeout(0)
        self.reactor = MemoryReactorClock()
        self.protocol = Recorder()
        self.server = TlsServer(
            lambda own: instead(certificate.accept(own)), own, self.protocol, ("192.0.2.1", 1), None, 0, self.reactor
        )
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


@pytest.fixture
def pair(tmp_path, request):
    pair = Pair(tmp_path, getattr(request, "param", lambda tls: tls))
    yield pair
    pair.raw.close()
    if pair.protocol.lost is None:
        pair.server.connectionLost(Failure(CONNECTION_DONE))


def test_write_to_an_idle_socket(pair):
    """Bytes are on their way when write() returns, and the reactor is not asked to wait for the socket."""
    pair.handshake().server.write(b"hello")
    assert not pair.waits_to_write
    assert pair.read() == b"hello"
    assert pair.client.selected_alpn_protocol() == "http/1.1"
    assert pair.server.getPeerCertificate() is None


def test_write_before_the_handshake(pair):
    """The bytes wait for the client, and the reactor does not turn in vain meanwhile."""
    pair.server.write(b"hello")
    assert pair.waits_to_write
    assert pair.server.doWrite() is None
    assert not pair.waits_to_write
    pair.handshake()
    assert pair.waits_to_write
    assert pair.server.doWrite() is None
    assert not pair.waits_to_write
    assert pair.read() == b"hello"


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


class Fragments:
    """A connection whose client accepts at most 512 bytes in a record (RFC 6066, section 4)."""

    def __init__(self, tls):
        self.tls = tls

    def __getattr__(self, name):
        return getattr(self.tls, name)

    def send(self, data):
        return self.tls.send(data[:512])


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


@pytest.mark.parametrize("pair", [Fragments], indirect=True)
def test_client_that_accepts_only_small_records(pair):
    """OpenSSL then sends a part of what it gets, and the client gets every byte once."""
    pair.handshake()
    sent = b"".join(b"%7d\n" % number for number in range(3000))
    pair.server.write(sent[:4000])
    assert pair.read() == sent[:4000]
    pair.server.write(sent[4000:])
    assert pair.read() == sent[4000:]


def test_burst_of_small_records(pair):
    """One turn reads several records, but not all that a client can send."""
    pair.handshake()
    for _ in range(RECORDS_PER_TURN + 1):
        pair.client.write(b"x")
    pair.exchange()
    assert pair.server.doRead() is None
    assert pair.server.doRead() is None
    assert pair.protocol.received == [b"x" * RECORDS_PER_TURN, b"x"]


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
    """A connection that must answer new keys before it reads on, and whose socket is full."""
    pair.handshake()
    pair.junk = pair.fill()
    pair.raw.sendall(new_keys(pair, 2, answered=True))  # the second one waits for the answer to the first
    assert pair.server.doRead() is None
    assert pair.waits_to_write
    assert not pair.waits_to_read  # there are bytes, and the reactor would turn in vain
    return pair


def test_new_keys_into_a_full_socket(blocked):
    """The connection reads on when the socket takes more."""
    assert blocked.server.doWrite() is None
    assert not blocked.waits_to_read
    blocked.empty(blocked.junk)
    assert blocked.server.doWrite() is None
    assert blocked.waits_to_read
    assert blocked.protocol.received == [b"hello"]


def test_pause_while_the_socket_is_full(blocked):
    """A paused connection reads nothing, whatever it writes."""
    blocked.server.pauseProducing()
    blocked.empty(blocked.junk)
    assert blocked.server.doWrite() is None
    assert not blocked.waits_to_read
    assert not blocked.waits_to_write
    assert blocked.protocol.received == []
    blocked.server.resumeProducing()
    assert blocked.waits_to_read
    assert blocked.server.doRead() is None
    assert blocked.protocol.received == [b"hello"]


def test_server_closes_while_the_socket_is_full(blocked):
    """A connection that ends reads nothing more."""
    blocked.server.loseConnection()
    assert blocked.server.doWrite() is CONNECTION_DONE
    assert blocked.protocol.received == []


@pytest.mark.parametrize("answered", [False, True])
def test_flood_of_new_keys(pair, answered):
    """OpenSSL would read such messages as long as there are more, and no other client would be served meanwhile."""
    pair.handshake().raw.sendall(new_keys(pair, MAX_CHANGES, answered=answered))
    assert pair.server.doRead() in (CONNECTION_DONE, CONNECTION_LOST)
    assert pair.protocol.received == []


def test_burst_of_large_records(pair):
    """One turn reads as many bytes as a plain connection does."""
    pair.handshake()
    most = pair.server.bufferSize // RECORD
    for _ in range(most + 1):
        pair.client.write(bytes(RECORD))
    pair.exchange()
    assert pair.server.doRead() is None
    assert [len(data) for data in pair.protocol.received] == [most * RECORD]


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


def test_error_of_one_connection(pair):
    """OpenSSL before 4.0 would take it for an error of whichever connection is served next."""
    pair.handshake().raw.close()
    pair.server.write(b"hello")
    assert not lib.ERR_peek_error()
    assert pair.server.doWrite() is CONNECTION_LOST
    assert not lib.ERR_peek_error()


def test_error_at_the_end_of_a_connection(pair):
    """The close_notify finds no client."""
    pair.handshake().raw.close()
    pair.server.loseConnection()
    assert pair.server.doWrite() is CONNECTION_DONE
    assert not lib.ERR_peek_error()


def test_client_that_speaks_no_tls(pair):
    pair.raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert pair.server.doRead() is CONNECTION_LOST


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
