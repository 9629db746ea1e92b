"""The server's end of a client's connection, in memory, and an endpoint that leads to it."""

import base64
import hashlib
import re

from support.transports import Wire
from support.websocket_frames import CLOSE, frame, read_frames
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from chatd.transport.framing import MAGIC


class ServerEnd(Wire):
    """A connection with the test at its other end."""

    def __init__(self, protocol):
        super().__init__()
        self.client = protocol
        protocol.makeConnection(self)

    def request(self):
        return self.read().decode()

    def answer(self, status="101 Switching Protocols", *headers):
        key = re.search(r"Sec-WebSocket-Key: (\S+)", self.request())[1]
        accept = base64.b64encode(hashlib.sha1(key.encode() + MAGIC).digest()).decode()
        lines = [f"HTTP/1.1 {status}", "Upgrade: WebSocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {accept}"]
        self.say("\r\n".join([*lines, *headers, "", ""]).encode())

    def say(self, data):
        self.client.dataReceived(data)

    def close(self, code=None, reason=""):
        self.say(frame(CLOSE, b"" if code is None else code.to_bytes(2) + reason.encode(), masked=False))

    def said(self):
        """Take the texts that the client sent."""
        return read_frames(self.read(), masked=True)

    def end(self):
        """Report the loss of the connection to the client."""
        self.client.connectionLost(Failure(error.ConnectionLost()))


class Endpoint:
    """An endpoint that accepts or refuses when the test asks for it."""

    def __init__(self):
        self.attempts = []

    def connect(self, factory):
        self.cancelled = False
        attempt = Deferred(lambda _: setattr(self, "cancelled", True))
        self.attempts.append((attempt, factory))
        return attempt

    def accept(self):
        attempt, factory = self.attempts.pop()
        wire = ServerEnd(factory.buildProtocol(None))
        attempt.callback(wire.client)
        return wire

    def refuse(self, why=None):
        self.attempts.pop()[0].errback(Failure(why or error.ConnectionRefusedError(111, "no")))
