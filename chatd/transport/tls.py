"""TLS between the socket of a TCP transport of Twisted and its buffer.

Twisted implements TLS for any transport.  Each record then passes through a buffered write, which costs several times
as much as the encryption.  Here a connection encrypts what it writes and sends it at once.  The rest stays as on plain
TCP: the buffer, producers, and the end of a connection.  The buffer holds encrypted bytes.
"""

import os
import ssl
from collections.abc import Iterable
from contextlib import suppress
from socket import socket
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from OpenSSL import SSL
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocolNegotiationFactory, ISSLTransport
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.ssl import CertificateOptions
from twisted.internet.tcp import Server
from twisted.python.failure import Failure
from typing_extensions import override
from zope.interface import implementer

RECORD: Final = 1 << 14
"""The most bytes that one record of TLS carries (RFC 8446, section 5.1), and that a connection reads in one turn."""
MAX_SILENT: Final = 1 << 16
"""The most bytes that a client may send without any data among them, as in a handshake or for new keys."""
OLD_METHODS: Final = (SSL.TLSv1_METHOD, SSL.TLSv1_1_METHOD)


class Certificate:
    """The certificate of a port, with which its connections begin.  `factory` makes their protocols.

    All connections share two buffers, which each call leaves empty.  A buffer of OpenSSL keeps its largest size, so two
    for each connection would be most of its memory.
    """

    def __init__(self, options: CertificateOptions, factory: object) -> None:
        negotiation = IProtocolNegotiationFactory(factory, None)
        self._protocols = [] if negotiation is None else [name.decode() for name in negotiation.acceptableProtocols()]
        self.incoming = ssl.MemoryBIO()
        """Encrypted bytes from a client."""
        self.outgoing = ssl.MemoryBIO()
        """Encrypted bytes for a client."""
        self.use(options)

    def use(self, options: CertificateOptions) -> None:
        """Use what an endpoint has read; raise ValueError if OpenSSL refuses that, as it does a short key."""
        if options.method in OLD_METHODS:
            raise ValueError("sslmethod allows only versions of TLS that are no longer secure")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        if options.method == SSL.TLSv1_2_METHOD:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if self._protocols:
            context.set_alpn_protocols(self._protocols)
        if options.dhParameters is not None:
            context.load_dh_params(options.dhParameters._dhFile.path)  # noqa: SLF001 -- Twisted has no other name for it
        try:
            _load(context, options)
        except ssl.SSLError as error:
            raise ValueError(f"OpenSSL refuses the certificate: {error}") from None
        self._context = context

    def accept(self) -> ssl.SSLObject:
        """Return the TLS of a new connection, which begins its handshake when it is read from."""
        return self._context.wrap_bio(self.incoming, self.outgoing, server_side=True)


def _load(context: ssl.SSLContext, options: Any) -> None:
    """Let a context use the key and the certificates of an endpoint, which Python reads only from files."""
    key = options.privateKey.to_cryptography_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = (one.to_cryptography() for one in (options.certificate, *options.extraCertChain))
    with os.fdopen(os.memfd_create("certificate"), "wb", buffering=0) as file:
        file.write(b"".join([*(one.public_bytes(Encoding.PEM) for one in chain), key]))
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")


@implementer(ISSLTransport)
class TlsServer(Server):
    """A connection over TCP that speaks TLS.

    The method write() sends at once if nothing waits in the buffer.
    """

    _early: tuple[bytes, ...] = ()
    """The data that waits for the end of the handshake."""
    _silent = 0
    """The number of bytes that have arrived since the last data."""

    def __init__(self, certificate: Certificate, own: socket, *arguments: Any) -> None:
        self._certificate = certificate
        self._tls = certificate.accept()
        super().__init__(own, *arguments)

    def getPeerCertificate(self) -> None:
        """ISSLTransport: return None, because clients are not asked for a certificate."""

    @override
    def doRead(self) -> Any:
        try:
            encrypted = self.socket.recv(RECORD)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not encrypted:  # without a close_notify
            return CONNECTION_LOST
        data, end = self._decrypt(encrypted)
        answer = self._certificate.outgoing.read()
        if answer:
            if self._isSendBufferFull():  # a client that reads nothing may ask for answers without end
                return CONNECTION_LOST
            self._send(answer)
        if self._early:
            early, self._early = self._early, ()
            self.write(b"".join(early))
        if data:
            self._silent = 0
            self._dataReceived(data)
        else:
            self._silent += len(encrypted)
            if self._silent > MAX_SILENT:
                return CONNECTION_LOST
        return end

    def _decrypt(self, encrypted: bytes) -> tuple[bytes, ConnectionDone | ConnectionLost | None]:
        """Return the data in bytes from the client, and the end of the connection if the client has ended it."""
        incoming = self._certificate.incoming
        incoming.write(encrypted)
        parts: list[bytes] = []
        end: ConnectionDone | ConnectionLost = CONNECTION_DONE
        try:
            while part := self._tls.read(RECORD):
                parts.append(part)
        except ssl.SSLWantReadError:  # OpenSSL has taken all the bytes
            return b"".join(parts), None
        except ssl.SSLError:
            end = CONNECTION_LOST
        incoming.read()  # the next bytes are for another connection
        return b"".join(parts), end

    @override
    def write(self, data: bytes) -> None:
        if not self.connected or not data:
            return
        try:
            self._tls.write(data)
        except ssl.SSLWantReadError:  # only a client can continue the handshake
            self._early = (*self._early, data)
        except ssl.SSLError:  # the connection has failed, and its stream would have a gap
            self._certificate.outgoing.read()
            self.abortConnection()
        else:
            self._send(self._certificate.outgoing.read())

    @override
    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        self.write(b"".join(iovec))

    def _send(self, encrypted: bytes) -> None:
        """Send bytes at once, or after those that wait."""
        if not (self.dataBuffer or self._tempDataLen):
            sent = 0
            with suppress(OSError):  # the socket is full, or the next write finds the same error
                sent = self.socket.send(encrypted)
            if sent == len(encrypted):
                if self.producer is not None and not self.streamingProducer:
                    self.startWriting()  # then the reactor asks a pull producer for more
                return
            encrypted = encrypted[sent:]
        super().write(encrypted)

    @override
    def _postLoseConnection(self) -> ConnectionDone | ConnectionLost:
        """Tell the client that all has been sent, if it has."""
        if self._early:
            return CONNECTION_LOST
        with suppress(ssl.SSLError):  # it may wait for the client to do the same
            self._tls.unwrap()
        with suppress(OSError):
            self.socket.send(self._certificate.outgoing.read())
        return CONNECTION_DONE

    @override
    def connectionLost(self, reason: Failure) -> None:
        super().connectionLost(reason)
        vars(self).pop("_tls", None)  # Twisted may call this twice
