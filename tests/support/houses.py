"""A server without sockets: WebSocket, HTTP and events over one store with faults."""

import json

from support.helpers import NEW_YEAR, PING_SECONDS, RecordingPoster, Turns
from support.stores import FaultyStore
from support.web_doubles import Connection, Stream, WebSocketClient

from chatd.messages import Entry, Post
from chatd.room.moderation import Sanction
from chatd.room.registry import Registry
from chatd.store.base import Retention
from chatd.transport import frames, http
from chatd.transport.admission import Addresses, Admission, Rate, origin_pattern, room_pattern
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.export import ExportQueue
from chatd.transport.limits import Limits
from chatd.transport.listing import RoomList
from chatd.transport.moderator import Moderator
from chatd.transport.page import ChatPage
from chatd.transport.websocket import ChatFactory

SEED = (
    Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
    Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
)
JSON = b"Content-Type: application/json"


class House:
    """A server without sockets."""

    def __init__(
        self,
        *,
        log=None,
        retain="all",
        history=100,
        rooms=(),
        origins=(),
        rate=None,
        hops=0,
        seed=SEED,
        ready=True,
        per_address=0,
        tokens=None,
        page=None,
    ):
        self.clock = Turns()
        self.log = log or FaultyStore(Retention.parse(retain))
        self.log.open(seed)
        self.rooms = Registry(self.log, frames, self.clock, history, self.log.lobby)
        self.connections = Connections(self.clock, PING_SECONDS)
        allowed, pages = [room_pattern(text) for text in rooms], [origin_pattern(text) for text in origins]
        admission = Admission(allowed, pages, proxied=hops > 0)
        limit = Rate(*rate, self.clock.seconds) if rate else None
        addresses = Addresses(limit, hops, self.clock.seconds)
        self.listing = RoomList(self.log, self.rooms)
        self.exports = ExportQueue(self.rooms, self.connections, self.clock)
        page = page or ChatPage(proxied=hops > 0)
        more = {"listing": self.listing, "exports": self.exports, "page": page}
        api = Api(self.rooms, self.connections, admission, addresses, tokens, **more)
        self.limits = Limits(self.clock, per_address, hops, lambda: 0.0)
        state = ready, "ready" if ready else "starting"
        self.site = http.site(
            lambda: state,
            self.clock,
            {"": api, "rooms": api, "events": api, **page.resources},
            limit,
            self.limits,
            tokens=tokens,
            proxied=hops > 0,
        )
        self.now = getattr(self.log, "now", lambda: NEW_YEAR)
        self.moderator = Moderator(self.log.sanctions, self.connections.connected, self.now, hops)
        self.site.intake.moderator = self.moderator
        self.factory = ChatFactory(
            rooms=self.rooms,
            connections=self.connections,
            admission=admission,
            site=self.site,
            reactor=self.clock,
        )

    def sanction(self, word="s1", kind="ban", **document):
        """Store a sanction, which is in force at once."""
        self.log.sanction(Sanction.parse({"kind": kind, **document}, word, self.now()))

    @property
    def epoch(self):
        return self.log.epoch

    def id(self, number):
        return f"{self.epoch}-{number}"

    def connect(self, transport=None):
        return Connection(self.site, transport)

    def ask(self, method, path, *headers, body=None, transport=None):
        """Send one request on its own connection, and close it."""
        connection = self.connect(transport)
        response, text = connection.ask(method, path, b"Host: chat.example", *headers, body=body)
        connection.lose()
        return response, text

    def get(self, path, *headers):
        return self.ask(b"GET", path, *headers)

    def post(self, *headers, path=b"/rooms/main/messages", kind=JSON, transport=None, **document):
        """Post a message; headers come before what it is."""
        body = json.dumps(document).encode()
        return self.ask(b"POST", path, *([kind] if kind else []), *headers, body=body, transport=transport)

    def say(self, *messages, room="main"):
        """Append messages to the log."""
        poster = RecordingPoster()
        for message in messages:
            self.log.append(room, Post("ann", message), poster)
        assert len(poster.numbers) == len(messages)

    def drain(self, retry_after=0.5):
        """Send all clients elsewhere, at once."""
        self.connections.stopping = True
        for client in [*self.connections.connected]:
            client.restart(retry_after)
            if client in self.connections.connected:
                self.connections.closings.add(client)

    def client(self, target="/", *headers, transport=None):
        return WebSocketClient(self.factory, target, self.turn, *headers, transport=transport)

    def stream(self, path=b"/rooms/main/events", *headers, **options):
        return Stream(self.connect(), path, *headers, **options)

    def turn(self):
        """Let the reactor turn, until nothing is due."""
        while any(call.getTime() <= self.clock.seconds() for call in self.clock.getDelayedCalls()):
            self.clock.advance(0)

    def pass_time(self, seconds):
        """Let time pass as the service does: once a second all are looked at."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.connections.check_deadlines()
            self.turn()

    @property
    def forgotten(self):
        """True if no trace of any client remains."""
        self.turn()
        return (
            not (
                self.connections.connected
                or [*self.connections.stalls]
                or [*self.connections.pings]
                or [*self.connections.closings]
            )
            and len(self.rooms) == 0
        )
