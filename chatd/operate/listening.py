"""The ports of the server: their endpoints, their certificates, and the open files that clients may use.

Endpoints are Twisted's.  They open their ports through a reactor, and each endpoint gets a stand-in for it.  This adds
what endpoints cannot do: an IPv6 port beside an IPv4 port of the same number, and new certificates in open ports.
"""

import errno
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Container
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address
from typing import Any, Final, cast

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.internet.ssl import CertificateOptions
from twisted.internet.tcp import Port
from twisted.logger import Logger
from zope.interface import directlyProvides, providedBy

from chatd.operate.check import Endpoint
from chatd.transport.proxied import PREFIX, ProxiedEndpoint
from chatd.transport.tls import Certificate, TlsServer

RESERVED_FILES: Final = 32
"""The open files that clients may not use: for the admin port, the store and the log."""
ANSWERED_FILES: Final = 8
"""The open files for clients that are told that the server is full.  More of them are closed without an answer."""
ACCEPTED_PER_LOOK: Final = 8
"""The number of connections after which the server looks for a crowd.  A look costs two system calls."""
WARN_SECONDS: Final = 60
"""The least time between two warnings that open files are short."""
MAX_UNCHECKED: Final = 100
"""The most clients that enter between two looks at the open files.  A look costs two system calls."""
ANY_IPV6: Final = "::"

_logger = Logger()


class _AcceptedSocket:
    """The socket of a port, which takes all connections from the kernel when many arrive.

    The kernel's queue of a port is short (`net.core.somaxconn`).  It drops the connections that do not fit, and their
    clients try again after one second, and then after two more.  Answering a handshake costs ten times as much as
    taking a connection.  So a crowd waits here, and not in the kernel.

    `limit` returns the number of files that the process may have open.  A socket that was `passed` by another program,
    such as systemd, stays open there: connections in the kernel wait for the next server.
    """

    def __init__(self, port: Port, clock: IReactorTime, limit: Callable[[], int], *, passed: bool) -> None:
        self._port = port
        self._passed = passed
        self._clock = clock
        self._socket = port.socket
        self._limit = limit
        self._waiting: deque[tuple[socket.socket, Any]] = deque()
        self._accepted = 0
        self._scheduled = False
        self._stopping = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the connection that has waited longest, with its address, or raise as a socket does."""
        if self._waiting:
            return self._waiting.popleft()
        if self._stopping:
            raise BlockingIOError(errno.EAGAIN, "the port is about to close")
        found = self._socket.accept()
        self._accepted += 1
        if self._accepted % ACCEPTED_PER_LOOK == 0:
            self._take(found[0].fileno())
        return found

    def _take(self, newest: int) -> None:
        """Take the connections from the kernel for which files are left, and serve them in the next turn.

        `newest` is the descriptor of the newest connection.
        """
        last = client_files(self._limit()) - 2  # the next file must be for clients too: see Entrance
        with suppress(OSError):  # no more wait
            while newest < last:
                connection, address = self._socket.accept()
                self._waiting.append((connection, address))
                newest = connection.fileno()
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._clock.callLater(0, self._accept_more)

    def _accept_more(self) -> None:
        self._scheduled = False
        if self._waiting:  # the port may be closed meanwhile
            newest, _ = self._waiting[-1]
            self._take(newest.fileno())
            self._port.doRead()

    def stop_listening(self) -> "Deferred[None] | None":
        """Serve the connections that wait, as those before them, and close the port."""
        if not self._passed:
            self._take(self._socket.fileno())
        self._stopping = True
        while self._waiting:
            self._port.doRead()
        return cast("Deferred[None] | None", self._port.loseConnection())

    def close(self) -> None:
        """Close the port and the connections that wait."""
        for connection, _ in self._waiting:
            connection.close()
        self._waiting.clear()
        self._socket.close()


class _EndpointReactor:
    """The reactor for one endpoint."""

    def __init__(self, reactor: Any, text: str) -> None:
        self._reactor = reactor
        self.endpoint: IStreamServerEndpoint = serverFromString(self, text.removeprefix(PREFIX))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)


class _Reader(_EndpointReactor):
    """The reactor for an endpoint that only reads its certificate."""

    options: CertificateOptions

    def listenSSL(self, port: int, factory: object, contextFactory: CertificateOptions, **_: object) -> None:
        """Keep what the endpoint has read, and open nothing."""
        self.options = contextFactory


class _PortReactor(_EndpointReactor):
    """The reactor for an endpoint that opens its port.

    `ipv4_ports` are the numbers of the ports that are opened for IPv4.  `limit` returns the number of files that the
    process may have open.
    """

    certificate: Certificate | None = None
    """None if the port does not speak TLS."""

    def __init__(self, reactor: Any, text: str, ipv4_ports: Container[int], limit: Callable[[], int]) -> None:
        super().__init__(reactor, text)
        self.text = text
        self._ipv4_ports = ipv4_ports
        self._limit = limit

    def listenTCP(self, port: int, factory: IProtocolFactory, backlog: int = 50, interface: str = "") -> IListeningPort:
        """Open a port; one for all IPv6 addresses leaves IPv4 to another port of the same number."""
        if interface != ANY_IPV6 or port not in self._ipv4_ports:
            opened: IListeningPort = self._reactor.listenTCP(port, factory, backlog, interface)
            return self._accept_ahead(opened)
        with socket.socket(socket.AF_INET6) as own:
            own.settimeout(0)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                own.bind((interface, port))
                own.listen(backlog)
            except OSError as error:
                raise CannotListenError(interface, port, error) from None
            return self._accept_ahead(self._reactor.adoptStreamPort(own.fileno(), socket.AF_INET6, factory))

    def adoptStreamPort(
        self, fileDescriptor: int, addressFamily: socket.AddressFamily, factory: IProtocolFactory
    ) -> IListeningPort:
        """Open a port with a socket that another program, such as systemd, has opened."""
        return self._accept_ahead(self._reactor.adoptStreamPort(fileDescriptor, addressFamily, factory), passed=True)

    def _accept_ahead(self, port: IListeningPort, *, passed: bool = False) -> IListeningPort:
        """Let a port take connections from the kernel before it serves them, and let them send at once."""
        if isinstance(port, Port):
            with suppress(OSError):  # a Unix socket has no such option
                port.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            port.socket = accepted = _AcceptedSocket(port, self._reactor, self._limit, passed=passed)
            port.stopListening = accepted.stop_listening  # type: ignore[method-assign, assignment]
        return port

    def listenUNIX(
        self, address: str, factory: IProtocolFactory, backlog: int = 50, mode: int = 0o666, wantPID: bool = False
    ) -> IListeningPort:
        """Open a Unix socket."""
        return self._accept_ahead(self._reactor.listenUNIX(address, factory, backlog, mode, wantPID))

    def listenSSL(
        self,
        port: int,
        factory: IProtocolFactory,
        contextFactory: CertificateOptions,
        backlog: int = 50,
        interface: str = "",
    ) -> IListeningPort:
        """Open a port that speaks TLS."""
        self.certificate = Certificate(contextFactory, factory)
        opened: Any = self.listenTCP(port, factory, backlog, interface)
        opened.transport = partial(TlsServer, self.certificate)
        return cast(IListeningPort, opened)


class Ports:
    """The endpoints of the server.

    `limit` returns the number of files that the process may have open.
    """

    def __init__(self, reactor: Any, limit: Callable[[], int]) -> None:
        self._reactor = reactor
        self._limit = limit
        self._opened: list[_PortReactor] = []
        self._ipv4_ports: set[int] = set()

    def endpoint(self, text: str) -> IStreamServerEndpoint:
        """Parse an endpoint; raise ValueError with one line."""
        try:
            port = _PortReactor(self._reactor, text, self._ipv4_ports, self._limit)
        except Exception as error:  # noqa: BLE001 -- every kind of endpoint is a plug-in with errors of its own
            if isinstance(error, OSError) and error.filename:
                raise ValueError(
                    f"{error.filename} of {text!r} cannot be read ({error.strerror}): correct the path or its mode"
                ) from None
            reason = " ".join(str(error).split())
            if "systemd:" in text and isinstance(error, LookupError):
                reason = "systemd passed no such socket: start the socket unit, or name a port"
            raise ValueError(f"{text!r} is not a server endpoint such as tcp:8085 ({reason})") from None
        self._opened.append(port)
        parsed = Endpoint(text)
        if isinstance(parsed.address, IPv4Address):
            self._ipv4_ports.add(parsed.port)
        return ProxiedEndpoint(port.endpoint) if text.startswith(PREFIX) else port.endpoint

    def reload(self) -> None:
        """Read the certificates again; log a failure, and keep the old certificate in force."""
        for port in self._opened:
            if port.certificate is None:
                continue
            try:
                reader = _Reader(self._reactor, port.text)
                reader.endpoint.listen(Factory())
                port.certificate.use(reader.options)
            except Exception as error:  # noqa: BLE001 -- files that OpenSSL and Twisted cannot read
                reason = " ".join(str(error).split())
                _logger.warn("the old certificate of {endpoint} stays: {reason}", endpoint=port.text, reason=reason)
            else:
                _logger.info("read the certificate of {endpoint}", endpoint=port.text)


class Entrance:
    """A factory that refuses clients when open files are short.

    A few files are for clients whose handshakes are refused with a reason, by is_full().  The last files are for the
    server: then connections are closed at once.  The kernel gives each connection the lowest free descriptor, so a
    high one means that all lower ones are in use.
    `limit` returns the number of files that the process may have open.
    """

    def __init__(self, factory: Any, clock: IReactorTime, limit: Callable[[], int]) -> None:
        directlyProvides(self, providedBy(factory))
        self._factory = factory
        self._clock = clock
        self._limit = limit
        self._unchecked = 0
        """The number of clients that may enter before the next look at the open files."""
        self._refused = 0
        self._quiet_until = 0.0
        self._full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factory, name)

    def buildProtocol(self, address: IAddress) -> IProtocol | None:
        """Return the protocol for a new client, or None to close its connection at once, which frees its file."""
        protocol: IProtocol | None
        if self._unchecked > 0:
            self._unchecked -= 1
            protocol = self._factory.buildProtocol(address)
            return protocol
        free, answered, limit = self._free()
        self._full = free <= 0
        if self._full:
            self._warn(limit)
        if free > -answered:
            self._unchecked = min(MAX_UNCHECKED, max(int(free), 0) // 2)  # others open files too
            protocol = self._factory.buildProtocol(address)
            return protocol
        return None

    def is_full(self) -> bool:
        """Return whether no new client may be served."""
        if self._full:
            self._full = self._free()[0] <= 0
        return self._full

    def _free(self) -> tuple[float, int, int]:
        """Return how many files clients may still use, those for answers besides, and the limit of all files."""
        limit = self._limit()
        return client_files(limit) - _lowest_free(), _answered_files(limit), limit

    def _warn(self, limit: int) -> None:
        self._refused += 1
        now = self._clock.seconds()
        if now >= self._quiet_until:
            self._quiet_until = now + WARN_SECONDS
            _logger.warn(
                "refused {refused} clients: all but the reserve of {limit} open files is in use: "
                "raise LimitNOFILE or ulimit -n",
                refused=self._refused,
                limit=limit,
            )
            self._refused = 0


def client_files(limit: int) -> int:
    """Return how many of the files that the process may have open are for clients."""
    return limit - min(RESERVED_FILES, limit // 2) - _answered_files(limit)


def _answered_files(limit: int) -> int:
    return min(ANSWERED_FILES, limit // 8)


def _lowest_free() -> float:
    """Return the descriptor that the next open file gets."""
    try:
        descriptor = os.dup(0)
    except OSError as error:
        return math.inf if error.errno == errno.EMFILE else 0
    os.close(descriptor)
    return descriptor
