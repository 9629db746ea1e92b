"""The PROXY protocol, in whose header a load balancer names the address of a client.

Twisted reads the header, but closes a connection whose first bytes are fewer than it needs to know the version.
TCP may cut a header at any byte.  A line of version 1 is also checked here, because Twisted takes any text for an
address or a port, and takes no line that only says UNKNOWN.
"""

import re
from ipaddress import ip_address
from typing import Any, Final, Protocol, runtime_checkable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.protocols.haproxy._exceptions import InvalidProxyHeader
from twisted.protocols.haproxy._v1parser import V1Parser
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper, HAProxyWrappingFactory
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure
from typing_extensions import override
from zope.interface import implementer

PREFIX: Final = "haproxy:"
"""The first word of the text of an endpoint behind such a load balancer."""

# The bytes of a version 2 header that Twisted needs to know the version.
_LEAST_V2 = 16
# The most bytes of a version 1 line, with its end (section 2.1 of the specification).
_MOST_V1 = 107
_V1 = re.compile(rb"PROXY (?:(UNKNOWN)(?: .*)?|TCP([46]) ([!-~]+) ([!-~]+) ([0-9]{1,5}) ([0-9]{1,5}))\r\n")
_MAX_PORT = 65535


@runtime_checkable
class Arriving(Protocol):
    """A protocol that asks for the address of a client before its first request."""

    def arrive(self) -> None:
        """Take note that the address is known."""


def is_partial(data: bytes) -> bool:
    """Return whether these may be the first bytes of a header, too few to check its line or to know its version."""
    version_1 = V1Parser.PROXYSTR.startswith(data[: len(V1Parser.PROXYSTR)])
    version_2 = V2Parser.PREFIX.startswith(data[: len(V2Parser.PREFIX)])
    return (version_1 and V1Parser.NEWLINE not in data and len(data) < _MOST_V1) or (
        version_2 and len(data) < _LEAST_V2
    )


def is_version_2(data: bytes) -> bool:
    """Return whether a header is of version 2."""
    return data.startswith(V2Parser.PREFIX) and data[12] >> 4 == 2  # noqa: PLR2004 -- section 2.2 of the specification


def check_line(line: bytes) -> bytes:
    """Return a line of version 1 as Twisted reads it; raise ValueError if it is invalid."""
    match = _V1.fullmatch(line)
    if match is None:
        raise ValueError(line)
    unknown, version, *addresses, source, destination = match.groups()
    if unknown:
        return b"PROXY UNKNOWN \r\n"
    versions = {ip_address(address.decode("ascii")).version for address in addresses}
    if versions != {int(version)} or max(int(source), int(destination)) > _MAX_PORT:
        raise ValueError(line)
    return line


@implementer(IHalfCloseableProtocol)
class ProxiedProtocol(HAProxyProtocolWrapper):
    """Passes on a connection behind its header."""

    transport: Any
    _begun = b""

    @override
    def dataReceived(self, data: bytes) -> None:
        """Pass on what follows the header, behind the news that the address is known."""
        if self._proxyInfo is None:
            rest = self._read_header(data)
            if self._proxyInfo is None:
                return
            if isinstance(self.wrappedProtocol, Arriving):
                self.wrappedProtocol.arrive()
            data = rest
        if data and self.wrappedProtocol is not None:  # arrive() may have ended it
            self.wrappedProtocol.dataReceived(data)

    def _read_header(self, data: bytes) -> bytes:
        """Read more of the header, and return what follows it; close the connection if it is invalid."""
        try:
            if self._parser is None:
                data = self._begun + data
                if is_partial(data):
                    self._begun = data
                    return b""
                self._parser = V2Parser() if is_version_2(data) else V1Parser()
                if isinstance(self._parser, V1Parser):
                    line, end, rest = data[:_MOST_V1].partition(V1Parser.NEWLINE)
                    data = check_line(line + end) + rest + data[_MOST_V1:]
            self._proxyInfo, remaining = self._parser.feed(data)
        except (InvalidProxyHeader, ValueError):
            self.loseConnection()
            return b""
        return remaining or b""

    def readConnectionLost(self) -> None:
        """IHalfCloseableProtocol: the protocol behind the header decides."""
        half = IHalfCloseableProtocol(self.wrappedProtocol, None)
        if half is None:
            self.transport.connectionLost(Failure(CONNECTION_DONE))
        else:
            half.readConnectionLost()

    def writeConnectionLost(self) -> None:
        """IHalfCloseableProtocol: the server does not half-close."""


class RefusingFactory(WrappingFactory[Any]):
    """A factory around one that may refuse a client, which Twisted forgets: the port then closes the connection."""

    @override
    def buildProtocol(self, addr: IAddress | None) -> Any:
        protocol = self.wrappedFactory.buildProtocol(addr)
        return None if protocol is None else self.protocol(self, protocol)


class ProxiedFactory(RefusingFactory, HAProxyWrappingFactory):
    """Makes the connections of a port behind a load balancer."""

    protocol: Any = ProxiedProtocol  # Twisted names the one class


@implementer(IStreamServerEndpoint)
class ProxiedEndpoint:
    """An endpoint whose connections begin with a header of the PROXY protocol."""

    def __init__(self, endpoint: IStreamServerEndpoint) -> None:
        self._endpoint = endpoint

    def listen(self, factory: IProtocolFactory) -> "Deferred[IListeningPort]":
        """IStreamServerEndpoint: listen for connections."""
        return self._endpoint.listen(ProxiedFactory(factory))
