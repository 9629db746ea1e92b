"""TLS that reads and writes the socket itself.

Twisted implements TLS for any transport.  Each record passes through buffers in memory and a buffered write, which cost
several times as much as the encryption.  Here OpenSSL reads and writes the socket of a TCP transport of Twisted.  The
rest stays as on plain TCP: buffers, producers, and the end of a connection.
"""

from collections.abc import Callable
from contextlib import suppress
from socket import socket
from typing import Any, Final

from OpenSSL._util import lib
from OpenSSL.SSL import (
    NO_OVERLAPPING_PROTOCOLS,
    RECEIVED_SHUTDOWN,
    Connection,
    Error,
    WantReadError,
    WantWriteError,
    ZeroReturnError,
)
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolNegotiationFactory, ISSLTransport
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.ssl import CertificateOptions
from twisted.internet.tcp import Server
from twisted.python.failure import Failure
from typing_extensions import override
from zope.interface import implementer

RECORD: Final = 1 << 14
"""The most bytes that one record of TLS carries (RFC 8446, section 5.1).  A client may ask for smaller records."""
RECORDS_PER_TURN: Final = 64
"""The most records that a connection reads in one reactor turn.  They may be of one byte each."""
MAX_CHANGES: Final = 100
"""The most changes of the state of TLS, such as new keys, while no data arrives.  A handshake takes 20."""


def forget_errors() -> None:
    """Empty OpenSSL's queue of errors, in which OpenSSL before 4.0 would look for an error of the next connection.

    For an error of the socket itself, pyOpenSSL leaves it there.
    """
    lib.ERR_clear_error()


class Certificate:
    """The certificate of a port, with which its connections begin.  `factory` makes their protocols."""

    def __init__(self, options: CertificateOptions, factory: object) -> None:
        negotiation = IProtocolNegotiationFactory(factory, None)
        self._protocols = [] if negotiation is None else [*negotiation.acceptableProtocols()]
        self.use(options)

    def use(self, options: CertificateOptions) -> None:
        """Use what an endpoint has read; raise ValueError if OpenSSL refuses that, as it does a short key."""
        try:
            context = options.getContext()
        except Error as error:
            raise ValueError(f"OpenSSL refuses the certificate: {error}") from None
        context.set_alpn_select_callback(self._choose)
        context.set_info_callback(self._count)
        self._context = context

    def _choose(self, _: Connection, offered: list[bytes]) -> Any:
        """Choose the protocol of a connection among those that its client offers (RFC 7301)."""
        return next((name for name in self._protocols if name in offered), NO_OVERLAPPING_PROTOCOLS)

    @staticmethod
    def _count(tls: Connection, *_: int) -> None:
        """Let a connection end whose client sends TLS messages without a pause: OpenSSL would read on and on."""
        changes = (tls.get_app_data() or 0) + 1
        tls.set_app_data(changes)
        if changes > MAX_CHANGES:
            tls.set_shutdown(RECEIVED_SHUTDOWN)

    def accept(self, own: socket) -> Connection:
        """Return the TLS of a new connection, which begins its handshake when it is read from."""
        tls = Connection(self._context, own)
        tls.set_accept_state()
        return tls


@implementer(ISSLTransport)
class TlsServer(Server):
    """A connection over TCP that speaks TLS.

    The method write() sends at once if nothing waits in the buffer.  OpenSSL keeps a record that the socket has not
    taken, and must get all its bytes again, as the first of the next write.  They are the first bytes in the buffer.
    """

    _read_blocked = False
    """True if OpenSSL must write before it can read on, as in a handshake, or for new keys."""

    def __init__(self, accept: Callable[[socket], Connection], own: socket, *arguments: Any) -> None:
        self._tls = accept(own)
        super().__init__(own, *arguments)

    def getPeerCertificate(self) -> Any:
        """ISSLTransport: return the certificate of the client, or None."""
        return self._tls.get_peer_certificate()

    @override
    def doRead(self) -> Any:
        parts: list[bytes] = []
        end: ConnectionDone | ConnectionLost | None = None
        size = 0
        try:
            while size < self.bufferSize and len(parts) < RECORDS_PER_TURN:
                parts.append(self._tls.recv(RECORD))
                size += len(parts[-1])
        except WantReadError:
            pass
        except WantWriteError:
            self._read_blocked = True
            self.stopReading()  # else the reactor would turn in vain while the client sends more
            self.startWriting()
        except ZeroReturnError:
            end = CONNECTION_DONE
        except Error:
            forget_errors()
            end = CONNECTION_LOST
        if self.dataBuffer or self._tempDataLen:  # it may have waited for the handshake
            self.startWriting()
        if parts:
            self._tls.set_app_data(0)
            self._dataReceived(b"".join(parts))
        return end

    @override
    def doWrite(self) -> Any:
        if self._read_blocked and not self.disconnecting:
            self._read_blocked = False
            self.startReading()
            end = self.doRead()
            if end is not None or self._read_blocked:
                return end
        return super().doWrite()

    @override
    def pauseProducing(self) -> None:
        self._read_blocked = False  # nothing may be read now; later the first attempt finds it again
        super().pauseProducing()

    @override
    def write(self, data: bytes) -> None:
        if self.connected and not (self.dataBuffer or self._tempDataLen):
            sent = self.writeSomeData(data)
            if sent == len(data):
                if self.producer is not None and not self.streamingProducer:
                    self.startWriting()  # then the reactor asks a pull producer for more
                return
            if isinstance(sent, int):  # otherwise the next write finds the same error, and ends the connection
                data = data[sent:]
        super().write(data)

    @override
    def writeSomeData(self, data: bytes | memoryview) -> int | ConnectionLost:
        sent = 0
        try:
            while sent < len(data):
                sent += self._tls.send(data[sent : sent + RECORD])
        except WantWriteError:
            pass
        except WantReadError:  # only a client can continue the handshake
            self.stopWriting()
        except Error:
            forget_errors()
            return CONNECTION_LOST
        return sent

    @override
    def _postLoseConnection(self) -> ConnectionDone:
        """Tell the client that all has been sent."""
        with suppress(Error):
            self._tls.shutdown()
        forget_errors()
        return CONNECTION_DONE

    @override
    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        vars(self).pop("_tls", None)  # Twisted may call this twice
