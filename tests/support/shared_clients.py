"""A client of a connection that may be in many rooms, over a TCP connection in memory."""

import json

from support.helpers import HEAD
from support.transports import Tcp
from support.websocket_frames import masked, take_frames
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure


class SharedClient:
    """A client of a House on `/connect`, whose socket the test fills and drains.

    `settle` runs after all that it sends; by default nothing is due then.
    """

    def __init__(self, house, *headers, target="/connect", settle=None):
        self.house = house
        self._settle = settle or house.turn
        self.transport = Tcp()
        self.transport.connection = self
        self.protocol = house.factory.buildProtocol(None)
        self.protocol.makeConnection(self.transport)
        self._rest = b""
        self.closed = None
        self.send(b"\r\n".join([HEAD.replace(b"GET / ", f"GET {target} ".encode()), *headers, b"", b""]))
        head, _, self._rest = self.transport.read().partition(b"\r\n\r\n")
        self.status = int(head.split()[1])
        if self.status != 101:
            self.transport.connectionLost = lambda reason: None

    @property
    def session(self):
        return self.protocol.session

    @property
    def rooms(self):
        """The names of the rooms that the connection is in."""
        return sorted(self.session.subscriptions)

    @property
    def socket(self):
        return self.transport.socket

    def send(self, data):
        self.protocol.dataReceived(data)
        self._settle()

    def say(self, *documents, **document):
        """Send frames, all in one piece."""
        said = documents or (document,)
        self.send(b"".join(masked(json.dumps(one).encode()) for one in said))

    def join(self, *rooms, **more):
        self.say(*({"type": "join", "room": room, **more} for room in rooms))

    def post(self, room, *messages, **more):
        self.say(*({"room": room, "username": "ann", "message": message, **more} for message in messages))

    def read(self):
        """Take the JSON of each whole frame that the socket has taken."""
        found, self._rest = take_frames(self._rest + self.transport.read())
        for frame in found:
            if frame.first == 0x88:
                self.closed = int.from_bytes(frame.payload[:2]), frame.payload[2:].decode()
        return [json.loads(frame.payload) for frame in found if frame.first == 0x81]

    def types(self):
        """Take the room and the type of each frame, with the number of the message that it has."""
        return [" ".join([one.get("room", "-"), one["type"], *one.get("id", "").split("-")[1:]]) for one in self.read()]

    def fill(self, space=0):
        """Let the socket take no more than a few bytes."""
        self.socket.space = space

    def drain(self, space=None):
        """Let the socket take what waits, and then `space` bytes, or all."""
        self.transport.socket.sent += self.transport.buffered()
        self.socket.space = space
        self.transport.producer.resumeProducing()
        self._settle()

    def lose(self):
        self.protocol.connectionLost(Failure(ConnectionDone()))
