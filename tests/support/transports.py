"""Transports in memory, which behave as Twisted's where a connection depends on it."""

from twisted.internet.address import IPv4Address
from twisted.internet.tcp import Connection
from twisted.internet.testing import StringTransport

from chatd.transport.tls import TlsServer


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
        self.producer = None  # Twisted's transports accept this without a producer too

    def resumeProducing(self):
        if not self.disconnecting:  # Twisted's transports ignore it then
            super().resumeProducing()

    def buffered(self):
        """Take the bytes that wait in the buffer."""
        data = self.value()
        self.clear()
        return data

    def read(self):
        """Take the bytes that were written since the last call."""
        return self.buffered()


class Socket:
    """A TCP socket that takes `space` bytes more, or all."""

    def __init__(self):
        self.sent = b""
        self.space = None
        self.sending = lambda: None
        """Called before each send."""

    def send(self, data):
        self.sending()
        if self.space == 0:
            raise BlockingIOError
        taken = len(data) if self.space is None else min(self.space, len(data))
        if self.space is not None:
            self.space -= taken
        self.sent += data[:taken]
        return taken


class Tcp(Wire, Connection):
    """A TCP connection of Twisted, down to the socket."""

    def __init__(self):
        Wire.__init__(self, peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
        self.socket = Socket()

    def drain(self):
        """Act as the reactor does when the socket is empty: write the buffer, and ask the pull producer for more."""
        self.socket.sent += self.buffered()
        self.socket.space = None
        self.producer.resumeProducing()

    def read(self):
        data, self.socket.sent = self.socket.sent, b""
        return data


class Encrypted(Wire, TlsServer):
    """A connection that speaks TLS, which writes and buffers itself."""

    def __init__(self):
        Wire.__init__(self)
