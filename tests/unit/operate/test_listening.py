"""Endpoints, their certificates, and the entrance of clients."""

import os
import socket
import ssl
from contextlib import suppress
from functools import partial
from itertools import count

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from support.servers import certificate_for
from twisted.internet import unix
from twisted.internet.endpoints import _SystemdParser
from twisted.internet.error import CannotListenError, ConnectionDone
from twisted.internet.interfaces import IProtocolNegotiationFactory
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.tcp import Port
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import LogLevel
from twisted.python.failure import Failure
from twisted.python.systemd import ListenFDs
from zope.interface import implementer

from chatd.operate.listening import (
    ACCEPTED_PER_LOOK,
    ANSWERED_FILES,
    RESERVED_FILES,
    WARN_SECONDS,
    Entrance,
    Ports,
    client_files,
)


@pytest.fixture
def reactor():
    return MemoryReactorClock()


@pytest.fixture
def ports(reactor):
    return Ports(reactor, lambda: 1024)


def listen(ports, *texts):
    """Open the ports of endpoints; return the failures."""
    return [failure.value for failure in opened(ports, *texts) if isinstance(failure, Failure)]


def opened(ports, *texts):
    """Open the ports of endpoints; return them, or their failures."""
    endpoints = [ports.endpoint(text) for text in texts]
    results = []
    for endpoint in endpoints:
        endpoint.listen(Factory.forProtocol(Protocol)).addBoth(results.append)
    return results


@pytest.mark.parametrize("text", ["systemd:domain=INET:index=0", "haproxy:systemd:domain=INET6:name=chat"])
def test_socket_that_systemd_did_not_pass(ports, text):
    with pytest.raises(ValueError, match="systemd passed no such socket: start the socket unit, or name a port"):
        ports.endpoint(text)


def test_endpoint_asks_the_reactor_for_the_rest(reactor, ports, monkeypatch):
    """Endpoints of other kinds, which plug-ins of Twisted define, use the reactor itself."""
    reactor.advance(5)
    monkeypatch.setattr("chatd.operate.listening.serverFromString", lambda asked, text: (text, asked.seconds()))
    assert ports.endpoint("onion:80") == ("onion:80", 5)


def test_unix_socket(reactor, ports):
    assert listen(ports, "unix:/run/chatd.socket") == []
    assert [address for address, *_ in reactor.unixServers] == ["/run/chatd.socket"]


# IPv6


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("texts", [("tcp:{}", "tcp6:{}"), ("tcp6:{}", "tcp:{}:interface=127.0.0.1")])
def test_port_for_ipv6_beside_one_for_ipv4(reactor, ports, monkeypatch, texts):
    """A port for all IPv6 addresses leaves IPv4 to the other port, whatever their order."""
    found = []

    def adopt(descriptor, family, factory):
        with socket.socket(fileno=os.dup(descriptor)) as adopted:
            found.append(adopted.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
            found.append(adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            found.append(os.get_blocking(descriptor))

    monkeypatch.setattr(reactor, "adoptStreamPort", adopt)
    port = free_port()
    assert listen(ports, *(text.format(port) for text in texts)) == []
    assert found == [1, 1, False]
    assert [opened[0] for opened in reactor.tcpServers] == [port]


def test_taken_port_for_ipv6(ports):
    with socket.create_server(("::", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        (error,) = listen(ports, f"tcp6:{port}", f"tcp:{port}:interface=127.0.0.2")
    assert isinstance(error, CannotListenError)
    assert "Address already in use" in str(error)


def test_port_for_ipv6_alone_serves_ipv4_too(reactor, ports):
    """Twisted opens a port for both, unless another one has the number."""
    assert listen(ports, "tcp6:1", "tcp:2", "tcp6:2:interface=\\:\\:1") == []
    assert [(port, interface) for port, _, _, interface in reactor.tcpServers] == [(1, "::"), (2, ""), (2, "::1")]


# A crowd


class RealPorts(MemoryReactorClock):
    """A reactor whose ports are open, and whose turns the test controls."""

    def __init__(self):
        super().__init__()
        self.later = []

    def callLater(self, seconds, function, *args):
        self.later.append(partial(function, *args))

    def listenTCP(self, port, factory, backlog=50, interface=""):
        return self._opened(Port(port, factory, backlog, interface, self))

    def listenUNIX(self, address, factory, backlog=50, mode=0o666, wantPID=False):
        return self._opened(unix.Port(address, factory, backlog, mode, self, wantPID))

    def adoptStreamPort(self, descriptor, family, factory):
        if family == socket.AF_UNIX:
            return self._opened(unix.Port._fromListeningDescriptor(self, descriptor, factory))
        return self._opened(Port._fromListeningDescriptor(self, descriptor, family, factory))

    @staticmethod
    def _opened(port):
        port.startListening()
        return port


class Crowd(Factory):
    """Clients that connect to a port with a short queue in the kernel."""

    def __init__(self, ipv6=False, passed=False):
        self.reactor = RealPorts()
        self.files = 1 << 20
        """The number of files that the process may open."""
        self.served = []
        """The ports of the clients that have a protocol, in order."""
        self.clients = []
        self.following = 0
        """The number of clients that connect when the next one is served."""
        ports = Ports(self.reactor, lambda: self.files)
        text = "tcp:0:interface=127.0.0.1:backlog=2"
        if ipv6:  # beside a port for IPv4
            number = free_port()
            ports.endpoint(f"tcp:{number}")
            text = f"tcp6:{number}:backlog=2"
        if passed:
            text = "systemd:domain=INET:index=0"
        self.port = ports.endpoint(text).listen(self).result
        for _ in range(ACCEPTED_PER_LOOK - 1):  # the next client makes the server look for a crowd
            self.connect(1)
            self.turn()
        self.served.clear()
        self.before = len(self.clients)

    def buildProtocol(self, address):
        self.served.append(address.port)
        self.connect(self.following)
        self.following = 0
        return Protocol()

    def connect(self, count):
        """Connect clients; the kernel drops those for which it has no space, and they time out."""
        address = self.port.getHost()
        for _ in range(count):
            self.clients.append(socket.create_connection((address.host, address.port), timeout=0.5))

    def turn(self, most=1):
        """Let a turn of the reactor pass, in which the port serves one client, as after a quiet time, or more."""
        self.port.numberAccepts = most
        later, self.reactor.later = self.reactor.later, []
        for call in later or [self.port.doRead]:
            call()

    def turns(self):
        """Let turns pass until the port waits for new clients."""
        while self.reactor.later:
            self.turn()

    @property
    def arrived(self):
        return [client.getsockname()[1] for client in self.clients[self.before :]]

    def end(self):
        for client in self.clients:
            client.close()
        for reader in self.reactor.getReaders():
            reader.connectionLost(Failure(ConnectionDone()))


@pytest.fixture
def crowd(request):
    crowd = Crowd(**getattr(request, "param", {}))
    yield crowd
    crowd.end()


@pytest.fixture
def passed(monkeypatch):
    """A socket that systemd has passed to the server."""
    with socket.create_server(("127.0.0.1", 0), backlog=2) as passed:
        passed.settimeout(0)
        own = passed.dup().detach()  # the endpoint closes it
        monkeypatch.setattr(_SystemdParser, "_sddaemon", ListenFDs([own]))
        yield passed


@pytest.mark.parametrize("crowd", [{}, {"ipv6": True}], indirect=True)
def test_crowd_does_not_fill_the_queue_of_the_kernel(crowd):
    """In each turn the server takes all connections from the kernel, and serves some of them, in order."""
    for _ in range(4):
        crowd.connect(3)  # one more than the backlog is all that the kernel keeps
        crowd.turn()
    assert crowd.served == crowd.arrived[:4]
    crowd.turns()
    assert crowd.served == crowd.arrived


def test_second_crowd_while_the_first_is_served(crowd, monkeypatch):
    """The server looks for both in one call a turn."""
    monkeypatch.setattr("chatd.operate.listening.ACCEPTED_PER_LOOK", 1)
    crowd.connect(3)
    crowd.turn()
    crowd.following = 2
    crowd.turn(most=9)
    assert len(crowd.reactor.later) == 1
    crowd.turns()
    assert crowd.served == crowd.arrived


def test_crowd_waits_in_the_kernel_while_files_are_short(crowd):
    """A connection that waits takes no file from those that the server still offers."""
    crowd.connect(3)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    crowd.files = next(limit for limit in count() if client_files(limit) == lowest_free + 3)
    entrance = Entrance(crowd, Clock(), lambda: crowd.files)
    crowd.port.factory = entrance
    crowd.turn()
    crowd.turns()
    assert not entrance.is_full()
    assert crowd.served == crowd.arrived[:2]


@pytest.mark.parametrize("crowd", [{}, {"ipv6": True}], indirect=True)
def test_connection_sends_at_once(crowd):
    """A frame does not wait for the acknowledgement of the frame before (RFC 9293, section 3.7.4)."""
    crowd.connect(1)
    accepted, _ = crowd.port.socket.accept()
    with accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_unix_socket_serves_waiting_connections_when_it_stops(folder):
    reactor, address = RealPorts(), str(folder / "socket")
    with socket.socket(socket.AF_UNIX) as client:
        port = Ports(reactor, lambda: 1 << 20).endpoint(f"unix:{address}").listen(Factory.forProtocol(Protocol)).result
        client.connect(address)
        client.settimeout(0)
        port.stopListening()
        for call in reactor.later:
            call()
        with pytest.raises(BlockingIOError):
            client.recv(1)
        for reader in reactor.getReaders():
            reader.connectionLost(Failure(ConnectionDone()))


def test_unix_socket_of_systemd(folder, monkeypatch):
    """It has no option to send at once."""
    with socket.socket(socket.AF_UNIX) as own, socket.socket(socket.AF_UNIX) as client:
        own.settimeout(0)
        own.bind(str(folder / "socket"))
        own.listen()
        monkeypatch.setattr(_SystemdParser, "_sddaemon", ListenFDs([os.dup(own.fileno())]))
        port = Ports(RealPorts(), lambda: 1024).endpoint("systemd:domain=UNIX:index=0").listen(Factory()).result
        client.connect(str(folder / "socket"))
        port.socket.accept()[0].close()
        port.socket.close()


def test_stopped_port_serves_waiting_connections(crowd):
    """Clients that wait in the server or in the kernel are served, and not closed."""
    crowd.connect(3)
    crowd.turn()
    crowd.connect(2)
    crowd.port.stopListening()
    assert crowd.served == crowd.arrived
    crowd.turns()
    assert not crowd.port.connected
    for client in crowd.clients:
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def test_stopped_port_leaves_the_kernel_to_the_next_server(passed):
    """A server that was passed its socket by systemd serves only the connections that it has taken."""
    crowd = Crowd(passed=True)
    crowd.connect(3)
    crowd.turn()
    crowd.connect(2)
    crowd.port.stopListening()
    assert crowd.served == crowd.arrived[:3]
    crowd.turns()
    for client in crowd.arrived[3:]:
        connection, (_, port) = passed.accept()
        connection.close()
        assert port == client
    crowd.end()


def test_closed_port_closes_waiting_connections(crowd, events):
    """Clients of a port that is lost before their turn connect elsewhere."""
    crowd.connect(3)
    crowd.turn()
    crowd.port.connectionLost(Failure(ConnectionDone()))
    crowd.turns()
    assert crowd.served == crowd.arrived[:1]
    assert [client.recv(1) for client in crowd.clients[crowd.before + 1 :]] == [b"", b""]
    assert not any(event.get("isError") for event in events)


# Certificates

CERTIFICATE = 11

deprecated = pytest.mark.filterwarnings("ignore:Passing pyOpenSSL")
"""Twisted uses pyOpenSSL in a way that the latter deprecates."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def certificate(port):
    """Return the certificate that a new connection gets."""
    return session(port).getpeercert(binary_form=True)


def session(port, **options):
    """Return the TLS of a client after its handshake; `options` are attributes of its context."""
    (own,) = port.transport.args
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers(options.pop("ciphers", "DEFAULT"))
    for name, value in options.items():
        setattr(context, name, value)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = context.wrap_bio(incoming, outgoing), own.accept()
    for _ in range(3):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
            own.incoming.write(outgoing.read())
            incoming.write(own.outgoing.read())
    return client


@deprecated
@pytest.mark.parametrize("prefix", ["", "haproxy:"])
def test_new_certificate(folder, reactor, ports, events, prefix):
    """A reload replaces the certificate of an open port; a file that cannot be read leaves the old one in force."""
    arguments, _ = certificate_for(folder)
    text = f"{prefix}ssl:443:{arguments}"
    port, plain = opened(ports, text, "tcp:1")
    assert not hasattr(plain, "transport")
    first = certificate(port)
    certificate_for(folder)
    ports.reload()
    second = certificate(port)
    assert first != second
    assert len(reactor.tcpServers) == 2
    (folder / "cert.pem").write_text("nonsense")
    ports.reload()
    assert certificate(port) == second
    assert [(event["log_level"], event["endpoint"]) for event in events] == [
        (LogLevel.info, text),
        (LogLevel.warn, text),
    ]


@deprecated
def test_certificate_that_openssl_refuses(folder, ports, events):
    """A key that is too short is refused at the start and at a reload, and not at each connection."""
    arguments, _ = certificate_for(folder)
    (port,) = opened(ports, f"ssl:443:{arguments}")
    first = certificate(port)
    certificate_for(folder, rsa.generate_private_key(65537, 1024))
    ports.reload()
    assert certificate(port) == first
    assert "ee key too small" in events[0]["reason"]
    (error,) = listen(ports, f"ssl:444:{arguments}")
    assert "ee key too small" in str(error)


def chain(port):
    """Return the certificates that a connection of TLS 1.2 begins with, as they are on the wire (RFC 5246, 7.4.2)."""
    (own,) = port.transport.args
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    client, server = context.wrap_bio(ssl.MemoryBIO(), outgoing), own.accept()
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    own.incoming.write(outgoing.read())
    with suppress(ssl.SSLWantReadError):
        server.do_handshake()
    records = own.outgoing.read()
    found = []
    while records:
        kind, size = records[5], int.from_bytes(records[3:5], "big")
        content, records = records[5 : 5 + size], records[5 + size :]
        if kind == CERTIFICATE:
            content = content[7:]
            while content:
                size = int.from_bytes(content[:3], "big")
                found.append(content[3 : 3 + size])
                content = content[3 + size :]
    return found


@deprecated
def test_chain_of_certificates(folder, ports):
    """A connection begins with the first certificate of `certKey`, and with all of `extraCertChain`."""
    certificate_for(folder)
    own, issuer = folder / "cert.pem", folder / "chain.pem"
    issuer.write_bytes(own.read_bytes())
    arguments, _ = certificate_for(folder)
    want = [ssl.PEM_cert_to_DER_cert(one.read_text()) for one in (own, issuer)]
    own.write_bytes(own.read_bytes() + issuer.read_bytes())
    with_chain, alone = opened(ports, f"ssl:443:{arguments}:extraCertChain=chain.pem", f"ssl:444:{arguments}")
    assert chain(with_chain) == want
    assert chain(alone) == want[:1]


@deprecated
@pytest.mark.filterwarnings("ignore:Passing method")
def test_versions_of_tls(folder, ports):
    """TLS 1.2 and 1.3 are served; `sslmethod` may exclude 1.3, but not admit what is no longer secure."""
    arguments, _ = certificate_for(folder)
    both, old = opened(ports, f"ssl:443:{arguments}", f"ssl:444:{arguments}:sslmethod=TLSv1_2_METHOD")
    assert session(both).version() == "TLSv1.3"
    assert session(both, maximum_version=ssl.TLSVersion.TLSv1_2).version() == "TLSv1.2"
    assert session(old).version() == "TLSv1.2"
    (error,) = listen(ports, f"ssl:445:{arguments}:sslmethod=TLSv1_METHOD")
    assert str(error) == "sslmethod allows only versions of TLS that are no longer secure"


FFDHE2048 = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group of RFC 7919, appendix A.1."""


@deprecated
def test_parameters_for_diffie_hellman(folder, ports):
    """`dhParameters` admits clients that know no elliptic curves."""
    arguments, _ = certificate_for(folder, rsa.generate_private_key(65537, 2048))
    (folder / "dh.pem").write_text(FFDHE2048)
    (port,) = opened(ports, f"ssl:443:{arguments}:dhParameters=dh.pem")
    client = session(port, maximum_version=ssl.TLSVersion.TLSv1_2, ciphers="DHE+AESGCM")
    assert client.cipher()[0].startswith("DHE-RSA-AES")


@deprecated
def test_no_tickets(folder, ports):
    """Sessions are not resumed: a ticket would cost each connection memory and bytes."""
    arguments, _ = certificate_for(folder)
    (port,) = opened(ports, f"ssl:443:{arguments}")
    assert session(port, maximum_version=ssl.TLSVersion.TLSv1_2).session.has_ticket is False


@deprecated
def test_certificate_of_a_factory_without_protocols(folder, ports):
    """Clients that offer protocols are served even so."""
    arguments, _ = certificate_for(folder)
    (port,) = opened(ports, f"ssl:443:{arguments}")
    assert session(port).selected_alpn_protocol() is None


# Open files


@implementer(IProtocolNegotiationFactory)
class Served(Factory):
    """A factory with an interface of its own."""

    protocol = Protocol

    def acceptableProtocols(self):
        return [b"http/1.1"]


class Door:
    """An entrance for a process that may open so many files."""

    def __init__(self, monkeypatch, limit):
        self.files = 0
        self.limit = limit
        self.clock = Clock()
        self.entrance = Entrance(Served(), self.clock, lambda: self.limit)
        monkeypatch.setattr("os.dup", self._dup)
        monkeypatch.setattr("os.close", lambda _: None)

    def _dup(self, descriptor):
        if self.files >= self.limit:
            raise OSError(24, "Too many open files")
        return self.files

    def admits(self, files):
        self.files = files
        return self.entrance.buildProtocol(None) is not None


def test_reserve_of_open_files(monkeypatch, events):
    """Clients are refused while only the reserve is left, and enter again when others have left."""
    door = Door(monkeypatch, 1024)
    last = 1024 - RESERVED_FILES
    assert door.admits(last - 1)
    assert door.entrance.is_full()
    assert not door.admits(last)
    assert not door.admits(1024)
    assert door.admits(last - 1)
    assert len(events) == 1
    assert door.admits(last - ANSWERED_FILES - 1)
    assert not door.entrance.is_full()


def test_server_is_full_until_clients_leave(monkeypatch, events):
    """The last files for clients are for answers; that others have left is seen without a new connection."""
    door = Door(monkeypatch, 1024)
    last = 1024 - RESERVED_FILES - ANSWERED_FILES
    assert door.admits(last - 1)
    assert not door.entrance.is_full()
    assert door.admits(last)
    assert door.entrance.is_full()
    door.files = last - 1
    assert not door.entrance.is_full()
    assert len(events) == 1


def test_open_files_are_looked_at_less_often_while_many_are_free(monkeypatch, events):
    """Half of the free files are for clients that enter before the next look, and never more than 100."""
    door = Door(monkeypatch, 1024)
    assert door.admits(1024 - RESERVED_FILES - ANSWERED_FILES - 8)
    assert [door.admits(1024) for _ in range(5)] == [True, True, True, True, False]
    assert door.admits(0)
    assert [door.admits(1024) for _ in range(101)] == [True] * 100 + [False]


def test_closed_standard_input(monkeypatch):
    """Only a lack of files refuses clients, and no other error."""
    door = Door(monkeypatch, 1024)
    monkeypatch.setattr("os.dup", lambda _: (_ for _ in ()).throw(OSError(9, "Bad file descriptor")))
    assert door.admits(0)


def test_reserve_of_a_small_limit(monkeypatch, events):
    """At least half of the files are for clients."""
    door = Door(monkeypatch, 40)
    assert door.admits(19)
    assert not door.admits(20)


@deprecated
@pytest.mark.parametrize("prefix", ["haproxy:tcp:1", "ssl:1:", "haproxy:ssl:1:"])
def test_refusal_below_another_protocol(monkeypatch, folder, reactor, ports, prefix):
    """A connection with TLS or behind a PROXY header has no protocol then, so that its file is closed at once."""
    door = Door(monkeypatch, 1024)
    text = prefix + certificate_for(folder)[0] * prefix.endswith(":")
    ports.endpoint(text).listen(door.entrance)
    factory = reactor.tcpServers[0][1]
    door.files = 1024 - RESERVED_FILES - 1
    assert factory.buildProtocol(None) is not None
    door.files = 1024
    assert factory.buildProtocol(None) is None


def test_shortage_of_open_files_is_logged_once(monkeypatch, events):
    """One warning a minute states how many clients were refused."""
    door = Door(monkeypatch, 1024)
    for _ in range(5):
        assert not door.admits(1024)
    door.clock.advance(WARN_SECONDS)
    assert not door.admits(1024)
    assert [(event["log_level"], event["refused"], event["limit"]) for event in events] == [
        (LogLevel.warn, 1, 1024),
        (LogLevel.warn, 5, 1024),
    ]


def test_entrance_is_the_factory_otherwise(monkeypatch):
    """TLS and the log see the factory of the clients."""
    entrance = Door(monkeypatch, 1024).entrance
    assert IProtocolNegotiationFactory.providedBy(entrance)
    assert entrance.acceptableProtocols() == [b"http/1.1"]
    assert entrance.logPrefix() == "Served"
