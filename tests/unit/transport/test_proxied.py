"""The header of the PROXY protocol, however TCP cuts it."""

import socket
import struct

import pytest
from support.transports import Wire
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from chatd.transport.proxied import ProxiedFactory, is_partial

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
ADDRESSES = socket.inet_aton("192.0.2.7") + socket.inet_aton("192.0.2.1") + struct.pack("!HH", 4321, 8085)
HEADERS = {
    "version 1": b"PROXY TCP4 192.0.2.7 192.0.2.1 4321 8085\r\n",
    "version 2": SIGNATURE + b"\x21\x11" + struct.pack("!H", len(ADDRESSES)) + ADDRESSES,
}


class Behind(Protocol):
    """The protocol behind the header."""

    def __init__(self):
        self.received = b""
        self.lost = []

    def dataReceived(self, data):
        self.received += data

    def connectionLost(self, reason):
        self.lost.append(reason)


@implementer(IHalfCloseableProtocol)
class HalfCloseable(Behind):
    def readConnectionLost(self):
        self.lost.append("read")

    def writeConnectionLost(self):
        raise NotImplementedError


class Told(Behind):
    """A protocol that asks for the address."""

    def arrive(self):
        self.received += self.transport.getPeer().host.encode() + b":"


class Lost(Wire):
    """A transport that ends as Twisted's do when nobody handles a half-close."""

    def connectionLost(self, reason):
        self.protocol.connectionLost(reason)


def connect(kind=Behind):
    """A connection, and the protocol behind its header."""
    wire = Lost()
    wire.protocol = ProxiedFactory(Factory.forProtocol(kind)).buildProtocol(None)
    wire.protocol.makeConnection(wire)
    return wire, wire.protocol.wrappedProtocol


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n"])
def test_header_in_two_pieces(header, rest):
    """It may be cut at any byte, and the bytes behind it are passed on."""
    data = header + rest
    for cut in range(1, len(data)):
        wire, behind = connect()
        wire.protocol.dataReceived(data[:cut])
        wire.protocol.dataReceived(data[cut:])
        assert behind.received == rest
        assert (behind.transport.getPeer().host, behind.transport.getPeer().port) == ("192.0.2.7", 4321)
        assert not wire.disconnecting


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_address_is_known_before_the_bytes(header):
    """The protocol learns of the address once, before it gets a byte, and also without one."""
    wire, behind = connect(Told)
    wire.protocol.dataReceived(header)
    assert behind.received == b"192.0.2.7:"
    wire.protocol.dataReceived(b"GET")
    wire, behind = connect(Told)
    wire.protocol.dataReceived(header + b"GET")
    wire.protocol.dataReceived(b" /")
    assert behind.received == b"192.0.2.7:GET /"


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_header_byte_by_byte(header):
    wire, behind = connect()
    for byte in header + b"rest":
        wire.protocol.dataReceived(bytes([byte]))
    assert behind.received == b"rest"


@pytest.mark.parametrize("data", [b"GET / HT", b"G", b"PROXX", b"\r\n\r\nG", SIGNATURE + b"\x31\x11\x00\x00"])
def test_no_header(data):
    """The connection is closed as soon as the bytes can be no header."""
    wire, behind = connect()
    wire.protocol.dataReceived(data)
    assert wire.disconnecting
    assert behind.received == b""


@pytest.mark.parametrize("data", [b"", b"P", b"PROXY T", b"\r", SIGNATURE, SIGNATURE + b"\x21\x11\x00"])
def test_partial_header(data):
    assert is_partial(data)


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY",
        b"PROXY UNKNOWNX",
        b"PROXY TCP5 192.0.2.7 192.0.2.1 4321 8085",
        b"PROXY TCP4 192.0.2.7",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 port 8085",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4321 port",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 -1 8085",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4_3 8085",
        b"PROXY TCP4 192.0.2.7 192.0.2.1 4321 65536",
        b"PROXY TCP4 \xff 192.0.2.1 4321 8085",
        b"PROXY TCP4 <script> 192.0.2.1 4321 8085",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 4321 8085",
        b"PROXY TCP6 2001:db8::7 192.0.2.1 4321 8085",
        b"PROXY UNKNOWN " + 92 * b"x",
    ],
)
def test_invalid_line(line):
    """It closes the connection, and raises nothing that Twisted would log with a traceback."""
    wire, behind = connect()
    wire.protocol.dataReceived(line + b"\r\nGET /")
    assert wire.disconnecting
    assert behind.received == b""


@pytest.mark.parametrize("line", [b"PROXY UNKNOWN", b"PROXY UNKNOWN " + 91 * b"\xff"])
def test_unknown_client(line):
    """A proxy sends it for its own health checks; the peer of the connection then is the client."""
    wire, behind = connect()
    wire.protocol.dataReceived(line + b"\r\nGET /")
    assert behind.received == b"GET /"
    assert behind.transport.getPeer() == wire.getPeer()


def test_version_6():
    wire, behind = connect()
    wire.protocol.dataReceived(b"PROXY TCP6 2001:db8::7 2001:db8::1 4321 65535\r\n")
    assert not wire.disconnecting
    assert behind.transport.getPeer().host == "2001:db8::7"


def test_half_close():
    """The protocol behind the header decides what a half-close means."""
    wire, behind = connect(HalfCloseable)
    assert IHalfCloseableProtocol.providedBy(wire.protocol)
    wire.protocol.readConnectionLost()
    assert behind.lost == ["read"]
    wire.protocol.writeConnectionLost()  # the server never half-closes
    wire, behind = connect()
    wire.protocol.readConnectionLost()
    assert len(behind.lost) == 1
