"""The PROXY protocol, in whose header a load balancer names the address of a client.

Twisted reads the header, but closes a connection whose first bytes are fewer than it needs to know the version.
TCP may cut a header at any byte.
"""

from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.protocols.haproxy._v1parser import V1Parser
from twisted.protocols.haproxy._v2parser import V2Parser
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper, HAProxyWrappingFactory
from twisted.protocols.policies import WrappingFactory
from twisted.python.failure import Failure
from typing_extensions import override
from zope.interface import implementer

PREFIX: Final = "haproxy:"
"""The first word of the text of an endpoint behind such a load balancer."""

# The bytes that Twisted needs to know the version.
_LEAST_V1 = 8
_LEAST_V2 = 16


def is_partial(data: bytes) -> bool:
    """Return whether more bytes are needed to know the version of a header."""
    version_1 = len(data) < _LEAST_V1 and V1Parser.PROXYSTR.startswith(data[: len(V1Parser.PROXYSTR)])
    version_2 = len(data) < _LEAST_V2 and V2Parser.PREFIX.startswith(data[: len(V2Parser.PREFIX)])
    return version_1 or version_2


@implementer(IHalfCloseableProtocol)
class ProxiedProtocol(HAProxyProtocolWrapper):
    """Passes on a connection behind its header."""

    transport: Any
    _begun = b""

    @override
    def dataReceived(self, data: bytes) -> None:
        """Wait until the version of the header is known."""
        if self._parser is None:
            data = self._begun + data
            if is_partial(data):
                self._begun = data
                return
        super().dataReceived(data)

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
