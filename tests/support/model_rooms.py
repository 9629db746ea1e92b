"""A model of a server with one room, and a client in it without any event loop."""

import json
from random import Random

from twisted.internet.task import Clock

from chatd.client.chatroom import ChatRoom
from chatd.client.connector import ConnectorCore, Ending, SingleRoom
from chatd.client.core import RoomCore
from chatd.client.protocol import WINDOW, Backoff, parse_frame
from chatd.client.storage import MemoryStorage
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import ack_frame, error_frame, history_frame, message_frame
from chatd.transport.framing import payload

STAMP = "2026-01-01T00:00:00.000Z"


class Outcome:
    """Receives the outcome of a request."""

    def __init__(self):
        self.result = self.error = None
        self.settled = 0

    def callback(self, result):
        self.result = result
        self.settled += 1

    def errback(self, fail):
        self.error = fail
        self.settled += 1


class ModelServer:
    """The log of one room, and the frames that are on their way to one client."""

    def __init__(self, history=3):
        self._history = history
        self.epoch = "aaaa"
        self.log = []
        self.labels = {}
        self.lost = set()
        """The texts that were lost with a log."""
        self.queue = []
        self.refusals = 0
        """The number of the next posts that are refused for now."""

    def connect(self, last):
        self.queue = []
        number = last.number if last else None
        if last is not None and last.epoch == self.epoch and number <= len(self.log):
            missed = self.log[number:][: self._history]
            self._say_history(number + len(missed), missed, resumed=True)
            self.queue += [message_frame(self.epoch, entry) for entry in self.log[number + len(missed) :]]
        else:
            self._start_over(resumed=None if last is None else False)

    def lose(self, count):
        """Lose the newest entries, as Redis may in a failover: the epoch changes, and acks that wait never arrive."""
        self.queue = [frame for frame in self.queue if b'"type":"ack"' not in frame]
        self.epoch = chr(ord(self.epoch[0]) + 1) * 4
        kept = max(0, len(self.log) - count)
        self.lost |= {entry.message for entry in self.log[kept:]}
        self.log = self.log[:kept]
        self.labels = {label: number for label, number in self.labels.items() if number <= len(self.log)}
        self._start_over(resumed=False)

    def receive(self, text):
        """Take a frame of the client."""
        document = json.loads(text)
        label = document["label"]
        if document.get("type") == "history":
            end = Id.parse(document["before"]).number - 1
            entries = self.log[max(0, end - document["limit"]) : end]
            self._say_history(end, entries, more=len(entries) < end, label=label)
        elif label in self.labels:
            self.queue.append(ack_frame(Id(self.epoch, self.labels[label]), label, duplicate=True))
        elif self.refusals:
            self.refusals -= 1
            self.queue.append(error_frame("slow", Code.RATE_LIMITED, label, 0.5))
        else:
            self._store(document, label)

    def append(self, message, replaces=None, *, removed=False):
        """Store a message of somebody else."""
        self.log.append(Entry(len(self.log) + 1, "bob", message, STAMP, replaces=replaces, removed=removed))
        self.queue.append(message_frame(self.epoch, self.log[-1]))
        if replaces is not None:
            self._apply(self.log[-1])

    def _store(self, document, label):
        number = len(self.log) + 1
        self.labels[label] = number
        self.log.append(Entry(number, document["username"], document["message"], STAMP))
        self.queue += [
            message_frame(self.epoch, self.log[-1]),
            ack_frame(Id(self.epoch, number), label, duplicate=False),
        ]

    def _apply(self, edit):
        for place, entry in enumerate(self.log[:-1]):
            if entry.number == edit.replaces or (edit.removed and entry.replaces == edit.replaces):
                self.log[place] = entry.revised(edit)

    def _start_over(self, resumed):
        entries = self.log[-self._history :]
        self._say_history(len(self.log), entries, more=len(entries) < len(self.log), resumed=resumed)

    def _say_history(self, end, entries, **notes):
        frames = [message_frame(self.epoch, entry) for entry in entries]
        self.queue.append(history_frame(self.epoch, end, frames, **notes))


class ModelMember(SingleRoom):
    """A client whose connections are arguments of the test."""

    def __init__(self, clock, listener, last=None, token=None):
        RoomCore.__init__(self, clock, listener, last, WINDOW)
        ConnectorCore.__init__(self, clock, "ws://h/rooms/a", token, Backoff(chance=Random(1)))
        self._decode = parse_frame
        self.opened = False
        self.attempts = 0
        self.sent = []
        self.probes = 0
        self.failures = []
        self.warnings = []

    @property
    def can_send(self):
        return self.opened

    def transmit(self, text):
        self.sent.append(text)

    def _connect(self):
        self.attempts += 1

    def _probe(self):
        self.probes += 1

    def log_warning(self, text):
        self.warnings.append(text)

    def log_failure(self, text):
        self.failures.append(text)

    def stop(self):
        self._stop()

    def open(self):
        self.opened = True
        self.sent = []

    def hear(self, frame):
        """Take a frame of the server; return the reason if the connection must be dropped."""
        return self.handle_text(payload(frame))

    def end(self, reason="cut", code=0, retry_after=None):
        self.opened = False
        self.connection_ended(Ending(reason, code, retry_after))


class ModelChat(ChatRoom):
    """A room whose requests are answered to an Outcome, and which reads its entries as an iterator does."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []
        self.last = None

    def ask(self, request, *arguments):
        """Make a request of a host: post, edit, remove, page or older."""
        outcome = Outcome()
        {
            "post": lambda message, **fields: self._post(message, fields, outcome),
            "edit": lambda id_, message: self._edit(id_, message, {}, outcome),
            "remove": lambda id_: self._remove(id_, outcome),
            "older": lambda limit=50: self._older(limit, outcome),
            "page": lambda before, after, limit: self._page(before, after, limit, outcome),
            "retry": lambda label: self._outbox.retry(label, outcome),
        }[request](*arguments)
        return outcome

    def read(self):
        """Read the entries that have arrived."""
        while (entry := self.following(self.last)) is not None:
            self.seen.append(entry)
            self.last = entry.id
        return self.seen


class ModelRoom:
    """A room with its clock, its connection and its server."""

    def __init__(self, *, storage=None, last=None, username="ann", history=3, wall=1_000_000.0, keep=None):
        self.clock = Clock()
        self.server = ModelServer(history)
        self.storage = MemoryStorage() if storage is None else storage
        self.wall = wall
        self.member = None

        def join(listener):
            self.member = ModelMember(self.clock, listener, last)
            return self.member

        self.room = ModelChat(
            *(self.clock, lambda: self.wall + self.clock.seconds(), join),
            username=username,
            storage=self.storage,
            last=last,
            keep=keep,
        )
        self.member.start()

    def connect(self):
        """Finish the handshake."""
        self.server.connect(self.member.last)
        self.member.open()

    def exchange(self, count=None):
        """Carry frames until none is left, or so many frames of the server; return whether that went well."""
        while (self.member.sent or self.server.queue) and count != 0:
            while self.member.sent:
                self.server.receive(self.member.sent.pop(0))
            if self.server.queue:
                count = None if count is None else count - 1
                if self.member.hear(self.server.queue.pop(0)) is not None:
                    return False
        return True

    def online(self):
        self.connect()
        assert self.exchange()
        return self

    def cut(self):
        """Lose all that is on its way, and let the pause pass."""
        self.server.queue = []
        self.member.end()
        self.clock.advance(60)

    def texts(self):
        return [entry.message for entry in self.room.snapshot().messages]
