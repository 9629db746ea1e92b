"""HTTP and WebSocket in memory: connections to a site or a factory, which read as clients read."""

import io
import json
import re
from http.client import HTTPResponse
from typing import NamedTuple

from support.helpers import HEAD
from support.websocket_frames import masked, take_frames
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer


class Transport(StringTransport):
    """A transport that may be closed twice and reports its loss once it is aborted, as real ones do."""

    def unregisterProducer(self):
        self.producer = self.streaming = None

    def abortConnection(self):
        if not self.disconnected:
            super().abortConnection()
            self.connection.lose()


@implementer(ISSLTransport)
class SecureTransport(Transport):
    """A connection under TLS."""

    def setTcpNoDelay(self, enabled):
        pass


class Connection:
    """A connection to a site."""

    def __init__(self, site, transport=None):
        self.transport = transport or Transport()
        self.transport.connection = self
        self.channel = site.buildProtocol(None)
        self.channel.makeConnection(self.transport)

    def makefile(self, mode):
        return io.BytesIO(self.transport.value())

    def send(self, data):
        self.channel.dataReceived(data)

    def begin(self, method, path, *headers, body=None, version=b"1.1"):
        """Send a request, which names the host x unless it names another."""
        if not any(header.lower().startswith(b"host:") for header in headers):
            headers = (b"Host: x", *headers)
        if body is not None:
            headers += (b"Content-Length: %d" % len(body),)
        head = b"%b %b HTTP/%b" % (method, path, version)
        self.send(b"\r\n".join([head, *headers, b"", body or b""]))

    def response(self, method=b"GET"):
        """Return the whole answer, parsed by the standard library."""
        response = HTTPResponse(self, method=method.decode())
        response.begin()
        return response, response.read().decode()

    def ask(self, method, path, *headers, body=None):
        """Send a request, and read the response."""
        self.transport.clear()
        self.begin(method, path, *headers, body=body)
        return self.response(method)

    def lose(self):
        """End the transport."""
        self.channel.connectionLost(Failure(ConnectionDone()))

    @property
    def closing(self):
        return self.transport.disconnecting


class WebSocketClient:
    """A client over WebSocket, on a connection that a factory makes; `settle` runs after all that it sends."""

    def __init__(self, factory, target="/", settle=lambda: None, *headers, transport=None):
        self.transport = transport or Transport(peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
        self.transport.connection = self
        self.protocol = factory.buildProtocol(None)
        self.protocol.makeConnection(self.transport)
        self._settle = settle
        self.send(b"\r\n".join([HEAD.replace(b"GET / ", f"GET {target} ".encode()), *headers, b"", b""]))
        self._head, _, self._data = self._take().partition(b"\r\n\r\n")

    def _take(self):
        data = self.transport.value()
        self.transport.clear()
        return data

    @property
    def status(self):
        """The status of the answer to the handshake."""
        return int(self._head.split()[1])

    @property
    def retry_after(self):
        """The seconds after which a refused client may return."""
        return int(re.search(rb"Retry-After: (\d+)", self._head)[1])

    @property
    def answered(self):
        """The head of the answer to the handshake; empty if there was none at once."""
        return self._head

    @property
    def problem(self):
        """The problem that refuses the handshake."""
        return json.loads(self._data)

    def closing(self):
        """Take what was received: the code and the reason of the close frame, if any, and the JSON of the others."""
        data, self._data = self._data + self._take(), b""
        found, _ = take_frames(data)
        texts = [json.loads(frame.payload) for frame in found if frame.first == 0x81]
        if not found or found[-1].first != 0x88:
            return None, texts
        return (int.from_bytes(found[-1].payload[:2]), found[-1].payload[2:].decode()), texts

    def send(self, data):
        self.protocol.dataReceived(data)
        self._settle()

    def say(self, **document):
        self.send(masked(json.dumps(document).encode()))

    def post(self, *messages, **more):
        for message in messages:
            self.say(username="ann", message=message, **more)

    def texts(self):
        """Take the text of each frame received, as it was written."""
        assert self._head.startswith(b"HTTP/1.1 101 ")
        data, self._data = self._data + self._take(), b""
        found, rest = take_frames(data)
        assert not rest, "a frame was cut"
        assert {(frame.first, frame.masked) for frame in found} <= {(0x81, False)}
        return [frame.payload.decode() for frame in found]

    def read(self):
        """Take the JSON of each frame received."""
        return [json.loads(text) for text in self.texts()]

    def close(self, code):
        self.send(masked(code.to_bytes(2), first=0x88))
        self.lose()

    def lose(self):
        """End the transport."""
        self.protocol.connectionLost(Failure(ConnectionDone()))


class Event(NamedTuple):
    """A Server-Sent Event."""

    kind: str
    id: str
    text: str

    @property
    def json(self):
        return json.loads(self.text)


class EventParser:
    """Reads a stream of Server-Sent Events (HTML Living Standard, section 9.2.6)."""

    def __init__(self):
        self._rest = b""
        self._fields = {}
        self.last = ""
        """The id that a client reconnects with."""
        self.retries = []
        self.comments = 0
        self.events = []

    def feed(self, data):
        """Read on; answers the events that are whole by now."""
        *lines, self._rest = re.split(rb"\r\n|\n|\r", self._rest + data)
        begin = len(self.events)
        for line in lines:
            self._line(line.decode())
        return self.events[begin:]

    def _line(self, line):
        if not line:
            self.last = self._fields.get("id", self.last)
            if "data" in self._fields:
                self.events.append(Event(self._fields.get("event", "message"), self.last, self._fields["data"]))
            self._fields = {}
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments += 1
        elif name == "retry":
            assert value.isdigit()
            self.retries.append(int(value))
        else:
            assert name in ("event", "id", "data"), line
            assert name not in self._fields, line
            self._fields[name] = value


class Stream(EventParser):
    """A stream of events on a connection in memory."""

    def __init__(self, connection, path, *headers, version=b"1.1"):
        super().__init__()
        self.connection = connection
        connection.transport.clear()
        connection.begin(b"GET", path, b"Host: x", *headers, version=version)
        self._chunked = False
        self.ended = False
        self.status = None
        self._data = b""

    @property
    def transport(self):
        return self.connection.transport

    def read(self):
        """Read what has come; answers the events."""
        self._data += self.transport.value()
        self.transport.clear()
        if self.status is None:
            if b"\r\n\r\n" not in self._data:
                return []
            head, _, self._data = self._data.partition(b"\r\n\r\n")
            line, *lines = head.decode().split("\r\n")
            self.status = int(line.split()[1])
            self.headers = {name.lower(): value for name, value in (header.split(": ", 1) for header in lines)}
            self._chunked = self.headers.get("transfer-encoding") == "chunked"
        return self.feed(self._body())

    def _body(self):
        if not self._chunked:
            data, self._data = self._data, b""
            return data
        data = b""
        while not self.ended and (match := re.match(rb"([0-9a-fA-F]+)\r\n", self._data)):
            size, begin = int(match[1], 16), match.end()
            data += self._data[begin : begin + size]
            assert self._data[begin + size : begin + size + 2] == b"\r\n", "a chunk was cut"
            self._data = self._data[begin + size + 2 :]
            self.ended = size == 0
        return data

    @property
    def rest(self):
        """The bytes that followed the end."""
        return self._data
