"""The promise of the server, checked against a list for each room.

Each room has one total order.  Every message arrives at least once, and dense ids make that exactly once in effect.
Acknowledged messages stay.  All this holds whatever is cut, lost, killed or sent twice.

A state machine runs the real server over connections in memory.  Its clients do what the documentation asks of them.
Its sockets and its disk take bytes and commits one by one, as the machine chooses.  Every bound of the server is so low
that the machine reaches it.  Clients read at once what leaves the server, so nothing can leave before the log has it.
"""

import gc
import json
import re
import zlib
from collections import Counter, deque
from typing import NamedTuple

import pytest
import txaio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.helpers import HEAD, PING_SECONDS, REPEATABLE, ImmediateWorker, ManualTime, Turns
from support.transports import Wire
from support.websocket_frames import close_code, frame_at, masked
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, execute
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure

from chatd.messages import Entry, Id
from chatd.room.registry import Registry
from chatd.store.base import DAY, Retention
from chatd.store.memory import MemoryStore
from chatd.store.sqlite import SqliteStore
from chatd.transport import frames, http
from chatd.transport.admission import Addresses, Admission
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.websocket import ChatFactory

HISTORY = 3
MAX_LAG = 8
LOW = {
    "chatd.room.room.MAX_LAG": MAX_LAG,
    "chatd.room.histories.HISTORIES_BYTES": 900,
    "chatd.room.room.RUNS": 2,
    "chatd.room.keyframes.KEYFRAME": 3,
    "chatd.room.keyframes.LEAST_MEMBERS": 1,
    "chatd.room.keyframes.STREAM_BYTES": 300,
    "chatd.room.tail.TAIL_BYTES": 900,
    "chatd.room.tail.RUN_BYTES": 500,
    "chatd.room.sweep.SLICE_MEMBERS": 1,
    "chatd.room.sweep.SLICE_SECONDS": -1,  # one member a turn
}
WINDOW = 2
"""The number of labelled posts of a client in flight; fewer than the log retains, so that it retains their labels."""
ROUNDS, TURNS = 10, 1000
"""The rounds, and the turns of each, in which everything must settle at the end."""


class Disk(ImmediateWorker):
    """A thread whose results reach the reactor later; tasks that it has not run are lost with the process."""

    def __init__(self, done=lambda: None):
        super().__init__()
        self.asked = deque()
        self.answers = deque()
        self._done = done

    def do(self, work):
        answer = Deferred()
        self.asked.append((work, answer))
        return answer

    def work(self, done=lambda: None):
        if self.asked:
            work, answer = self.asked.popleft()
            outcome = []
            execute(work).addBoth(outcome.append)
            done()
            self.answers.append((answer, *outcome))
            self._done()

    def answer(self):
        if self.answers:
            answer, outcome = self.answers.popleft()
            answer.callback(outcome)  # a Failure takes the errback path by itself

    def run(self):
        while self.asked or self.answers:
            self.work()
            self.answer()


class Truth:
    """All entries that a log ever held, by room, and the first number that it still stores."""

    def __init__(self, faults):
        self.rooms = {}
        self.firsts = {}
        self._faults = faults

    def entries(self, room):
        return self.rooms.setdefault(room, [])

    def first(self, room):
        return self.firsts.get(room, 1)

    def appended(self, room, entries):
        for entry in entries:
            before = self.entries(room)
            try:
                assert entry.number == len(before) + 1, "dense, and no number twice"
                # Every post has its own text, and a label is remembered as long as its entry.
                kept = before[self.first(room) - 1 :]
                assert [one for one in kept if one.message == entry.message] == [], "posted twice"
                assert not before or before[-1].timestamp <= entry.timestamp
            except AssertionError as error:
                self._faults.append(error)
            before.append(entry)

    def trimmed(self, room, first):
        self.firsts[room] = first


class MemoryLog:
    """A log that dies with its server."""

    def __init__(self, retain, now, folder, faults):
        self._retain, self._now, self._faults = retain, now, faults
        self.writer = self.reader = Disk()

    def start(self):
        self.truth = Truth(self._faults)
        self.store = MemoryStore(self._retain, self._now)
        self.store.open(())
        self.store.follow(self.truth)

    def failing(self, disk, steps):
        """Do nothing: memory cannot fail."""

    def kill(self):
        """Do nothing: the log ends with its server."""


class SqliteLog:
    """A log in a file; the truth is what was committed."""

    def __init__(self, retain, now, folder, faults):
        self._retain, self._now, self._faults = retain, now, faults
        self._path = folder / f"{len([*folder.iterdir()])}.sqlite"
        self.truth = Truth(self._faults)

    def start(self):
        self.writer, self.reader = Disk(self._look), Disk()
        self.store = SqliteStore(self._path, self._retain, self._now, self.writer, self.reader, clock=Clock())
        self.store.open(())
        self._db = self.store.file.writer
        self._db.execute("PRAGMA synchronous=OFF")  # no machine loses its power here
        # A commit may trim entries that it appends: a trigger records them all.
        columns = "room, number, username, message, timestamp"
        self._db.execute(f"CREATE TEMP TABLE seen ({columns})")
        values = ", ".join(f"NEW.{column}" for column in columns.split(", "))
        self._db.execute(
            f"CREATE TEMP TRIGGER see AFTER INSERT ON messages BEGIN INSERT INTO seen VALUES ({values}); END"
        )
        self._look()

    def failing(self, disk, steps):
        """Run the next task, and interrupt SQLite after so many steps of its virtual machine."""
        db = self._db if disk is self.writer else self.store.file.reader
        if not disk.asked:
            return
        interrupt = [1]  # once: the cleanup does not fail
        db.set_progress_handler(lambda: interrupt and interrupt.pop(), steps)
        disk.work(lambda: db.set_progress_handler(None, 0))

    def _look(self):
        if self._db.in_transaction:  # nothing is committed yet
            return
        for room, *entry in self._db.execute("SELECT * FROM seen ORDER BY room, number").fetchall():
            self.truth.appended(room, [Entry(*entry)])
        self._db.execute("DELETE FROM seen")
        kept = "SELECT name, coalesce((SELECT min(number) FROM messages WHERE room = name), head + 1) FROM rooms"
        for room, first in self._db.execute(kept).fetchall():
            self.truth.trimmed(room, first)

    def kill(self):
        # The operating system closes the files of a killed process.
        self.store.file.close()


class Socket:
    """The server's end of a connection, which takes `space` more bytes, or everything."""

    def __init__(self, space, received):
        self.space = space
        self._received = received

    def send(self, data):
        taken = len(data) if self.space is None else min(self.space, len(data))
        if not taken:
            raise BlockingIOError
        if self.space is not None:
            self.space -= taken
        self._received(data[:taken])
        return taken


class BoundedWire(Wire):
    """A transport with a buffer like Twisted's, which pauses its producer when full; it stands for TLS."""

    bufferSize = 600
    """The size of the buffer above which a streaming producer is paused."""

    def __init__(self, socket):
        super().__init__(peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
        self.socket = socket
        self.buffer = b""
        self.paused = self.writing = self.lost = False

    def write(self, data):
        self.buffer += data
        self.writing = True
        if self.producer is not None and self.streaming and len(self.buffer) > self.bufferSize and not self.paused:
            self.paused = True
            self.producer.pauseProducing()

    def writeSequence(self, data):
        self.write(b"".join(data))

    def registerProducer(self, producer, streaming):
        self.producer, self.streaming, self.paused = producer, streaming, False
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self):
        self.producer = None
        self.writing |= self.disconnecting

    def loseConnection(self):
        self.disconnecting = self.writing = True

    def abortConnection(self):
        self.lost = True

    def drain(self):
        """Write as the reactor does; with an empty buffer ask the producer for more, or end the connection."""
        if not self.writing:
            return
        if self.buffer:
            try:
                self.buffer = self.buffer[self.socket.send(self.buffer) :]
            except BlockingIOError:
                return
        if self.buffer:
            return
        self.writing = False
        if self.producer is not None and (not self.streaming or self.paused):
            self.paused = False
            self.producer.resumeProducing()
        elif self.disconnecting:
            self.lost = True


class BoundedTcp(BoundedWire, Connection):
    """A transport whose socket may be written to directly; it stands for plain TCP."""

    def __init__(self, socket):
        BoundedWire.__init__(self, socket)


class Asked(NamedTuple):
    """A request for a page, and the state of the log at that time."""

    before: int | None
    after: int | None
    limit: int
    epoch: str
    first: int
    known: int


class Client:
    """The program of one user in one room, with the entries it has and the posts without an outcome."""

    def __init__(self, machine, name, room):
        self.machine, self.name, self.room = machine, name, room
        self.entries = []
        self.cursor = None
        self.labels = 0
        self.pending = {}
        self.acked = {}
        self.wire = None

    @property
    def log(self):
        return self.machine.log

    def met(self, what):
        self.machine.met[what] += 1

    # The connection

    def connect(self, wire, space, *, fresh=False):
        if fresh:
            self.cursor = None
        self.wire = wire(Socket(space, self._received))
        self.wire.protocol = self.machine.factory.buildProtocol(self.wire.getPeer())
        self.asked_from = self.cursor
        self.greeted = self.over = False
        self.pages = {}
        self.outbox = self.request()
        self._inbox, self._take_bytes = b"", self._take_head
        self.wire.protocol.makeConnection(self.wire)

    def request(self):
        query = b"?last_event_id=%b" % str(self.cursor).encode() if self.cursor else b""
        return HEAD.replace(b"GET / ", b"GET /rooms/%b%b " % (self.room.encode(), query)) + b"\r\n\r\n"

    def send(self, payload, first=0x81):
        self.outbox += masked(payload, first=first)

    def deliver(self, size=None):
        """Let `size` bytes reach the server, or all, if the server reads."""
        if self.wire is None or self.wire.producerState != "producing" or self.wire.lost or not self.outbox:
            return
        data, self.outbox = (self.outbox, b"") if size is None else (self.outbox[:size], self.outbox[size:])
        self.wire.protocol.dataReceived(data)

    def disconnect(self, reason=ConnectionDone):
        """Cut the connection; bytes in flight in either direction are lost."""
        if self.wire is not None:
            if self.wire.producerState == "producing" and self._inbox and self.greeted:
                self.met("a frame cut on its way to the client")
            if self.outbox:
                self.met("a frame cut on its way to the server")
            wire, self.wire = self.wire, None
            wire.protocol.connectionLost(Failure(reason()))

    def drain(self):
        if self.wire is not None:
            self.wire.drain()
            if self.over or self.wire.lost:
                self.disconnect()

    def _received(self, data):
        self._inbox += data
        try:
            while not self.over and self._take_bytes():
                pass
        except Exception as error:  # noqa: BLE001 -- the server must not see the failed assertion
            self.machine.faults.append(error)
            self.over = True

    def _take_head(self):
        head, end, rest = self._inbox.partition(b"\r\n\r\n")
        if not end:
            return False
        self._inbox = rest
        status = int(head.split(b" ", 2)[1])
        assert status in (101, 200, 503), head
        self.over = status == 503
        self.met(f"status {status}")
        self._take_bytes = self._take_body
        return True

    def _take_body(self):
        found = frame_at(self._inbox)
        if found is None:
            return False
        self._inbox = self._inbox[found.end :]
        if found.first == 0x88:
            self.met(f"close {close_code(found.payload)}")
            self.over = True
        elif found.first == 0x89:
            self.send(found.payload, first=0x8A)
        else:
            self.take(json.loads(self._text_of(found)))
        return True

    def _text_of(self, found):
        assert found.first == 0x81
        return found.payload

    # Sending

    def post(self, size, *, labelled):
        self.labels += 1
        label = f"l{self.labels}" if labelled else None
        text = f"{self.name} {self.room} {self.labels} {'x' * size}"
        if labelled:
            self.pending[label] = text
        self._post(text, label)

    def _post(self, text, label):
        document = {"username": self.name, "message": text, "label": label}
        self.send(json.dumps({name: value for name, value in document.items() if value is not None}).encode())

    def retry(self):
        for label, text in self.pending.items():
            self._post(text, label)

    def ask(self, back, limit, *, before):
        self.labels += 1
        label = f"p{self.labels}"
        number = max(self.cursor.number - back, 0)
        known = self.cursor.number
        limits = (number, None) if before else (None, number)
        self.pages[label] = Asked(*limits, limit, self.cursor.epoch, self.log.truth.first(self.room), known)
        wanted = {"before" if before else "after": f"{self.cursor.epoch}-{number}", "limit": limit}
        self.send(json.dumps({"type": "history", "label": label, **wanted}).encode())

    # Receiving

    def take(self, frame):
        kind = frame["type"]
        assert self.greeted or kind == "history", "the first frame is history"
        if kind == "history" and "label" in frame:
            self._page(frame)
        elif kind in ("history", "message"):
            self._given(frame)
        elif kind == "ack":
            self._acked(frame)
        else:
            self._refused(frame)

    def _read(self, frame):
        epoch, number = Id.parse(frame["id"])
        data = [frame["data"]] if frame["type"] == "message" else frame["data"]
        entries = [Entry(number - len(data) + place, **one) for place, one in enumerate(data, 1)]
        truth = self.log.truth.entries(self.room)
        assert epoch == self.log.store.epoch
        assert entries == truth[number - len(data) : number], "it is in the log"
        assert number <= len(truth)
        return Id(epoch, number), entries

    def _given(self, frame):
        newest, entries = self._read(frame)
        if frame["type"] == "history":
            self._begin(frame, newest, entries)
        for entry in entries:
            assert entry.number == self.cursor.number + 1, "no gap, nothing twice, in order"
            self.cursor = Id(newest.epoch, entry.number)
            self.entries.append(entry)
        assert self.cursor == newest

    def _begin(self, frame, newest, entries):
        assert not self.greeted, "a history frame comes once"
        self.greeted = True
        assert len(entries) <= HISTORY
        asked = self.asked_from
        assert ("resumed" in frame) == (asked is not None)
        self.met(f"{type(self).__name__} resumed {frame.get('resumed')}")
        if frame.get("resumed"):
            assert "more" not in frame
            assert asked.epoch == newest.epoch
            return
        truth, room = self.log.truth, self.room
        if asked is not None and asked.epoch == newest.epoch:
            missed = len(truth.entries(room)) - asked.number
            assert asked.number < truth.first(room) - 1 or missed > MAX_LAG, "there was no reason to begin anew"
        self.entries = []
        self.cursor = Id(newest.epoch, newest.number - len(entries))

    def _acked(self, frame):
        newest, label = Id.parse(frame["id"]), frame["label"]
        self.met("duplicate" if "duplicate" in frame else "ack")
        assert newest.epoch == self.log.store.epoch
        text = self.pending.pop(label, None) or self.acked[label][1]
        entry = self.log.truth.entries(self.room)[newest.number - 1]
        assert entry[:3] == (newest.number, self.name, text), "it is in the log"
        if "duplicate" not in frame:
            assert self.cursor.number >= newest.number, "after the message itself"
        before = self.acked.setdefault(label, (newest, text))[0]
        assert before == newest or before.epoch != newest.epoch or before.number < self.log.truth.first(self.room)
        self.acked[label] = newest, text

    def _refused(self, frame):
        assert frame["type"] == "error"
        page = self.pages.pop(frame.get("label"), None)
        self.met(f"{frame['code']} {'page' if page else 'post'}")
        if frame["code"] == "UNKNOWN_ID":
            assert page.epoch != self.log.store.epoch or max(page.before or 0, page.after or 0) > page.known
        else:
            assert frame["code"] == "UNAVAILABLE"
            assert self.machine.failures, "nothing had failed"

    def _page(self, frame):
        page = self.pages.pop(frame["label"])
        self.met("page")
        newest, entries = self._read(frame)
        firsts = range(page.first, self.log.truth.first(self.room) + 1)
        after = newest.number - len(entries)
        assert "resumed" not in frame
        assert len(entries) <= page.limit
        if page.before is not None:
            assert newest.number == max(page.before - 1, 0)
            assert len(entries) == page.limit or after + 1 in firsts or not entries
            assert frame.get("more", False) in {after >= first for first in firsts}
        else:
            assert after == page.after or after + 1 in firsts
            assert len(entries) == page.limit or newest.number >= page.known
            assert frame.get("more", False) or newest.number >= page.known
        assert frame.get("more", True) is True

    def check(self):
        """Check that the client has the whole log, and that all its acknowledged posts are there."""
        entries = self.log.truth.entries(self.room)
        assert self.pending == {}
        assert self.cursor.number == len(entries)
        assert self.entries == (entries[self.entries[0].number - 1 :] if self.entries else [])
        assert self.entries or self.log.truth.first(self.room) > len(entries)
        for newest, text in self.acked.values():
            if newest.epoch == self.log.store.epoch:
                assert entries[newest.number - 1].message == text


class Compressor(Client):
    """A client that compresses what it sends, and inflates what it gets compressed."""

    def request(self):
        self._inflater = zlib.decompressobj(-12)
        return super().request()[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"

    def send(self, payload, first=0x81):
        if first == 0x81:
            deflater = zlib.compressobj(wbits=-15)
            payload = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
            payload, first = payload[:-4], 0xC1
        super().send(payload, first)

    def _text_of(self, found):
        if found.first != 0xC1:
            return super()._text_of(found)
        self.met("a compressed message")
        return self._inflater.decompress(found.payload + b"\x00\x00\xff\xff")


_CHUNK = re.compile(rb"([0-9a-f]+)\r\n")
_EVENT = re.compile(r"event: (\w+)\nid: (\S+)\ndata: (.*)")


class Listener(Client):
    """A reader of Server-Sent Events, which posts nothing."""

    def request(self):
        last = b"Last-Event-ID: %b\r\n" % str(self.cursor).encode() if self.cursor else b""
        return b"GET /rooms/%b/events HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (self.room.encode(), last)

    def connect(self, *args, **options):
        self._events = ""
        super().connect(*args, **options)

    def _take_body(self):
        chunk = _CHUNK.match(self._inbox)
        if not chunk or len(self._inbox) < chunk.end() + (size := int(chunk[1], 16)) + 2:
            return False
        self._events += self._inbox[chunk.end() : chunk.end() + size].decode()
        self._inbox = self._inbox[chunk.end() + size + 2 :]
        *events, self._events = self._events.split("\n\n")
        for event in events:
            match = _EVENT.fullmatch(event)
            if match:
                frame = json.loads(match[3])
                assert match.groups()[:2] == (frame["type"], frame["id"])
                self.take(frame)
            else:
                assert event == ":" or re.fullmatch(r"retry: \d+", event), event
        return True

    def post(self, size, *, labelled):
        pass

    def ask(self, back, limit, *, before):
        pass


who = st.integers(0, 4)
cuts = st.none() | st.integers(1, 300)
spaces = st.none() | st.integers(0, 900)
wires = st.sampled_from([BoundedTcp, BoundedTcp, BoundedWire])
happens = st.sampled_from(["work", "answer", "run"])


class Machine(RuleBasedStateMachine):
    """The server, its clients, and the events around them."""

    def __init__(self, make, folder, met):
        super().__init__()
        self._make, self._folder = make, folder
        self.faults = []
        self.met = met
        self.failures = 0
        self.now = ManualTime()
        self.started = False

    @initialize(retain=st.sampled_from(["all", "6", "1d"]))
    def begin(self, retain):
        self.log = self._make(Retention.parse(retain), self.now, self._folder, self.faults)
        names = [(Compressor, "ann", "main"), (Compressor, "bob", "main")]
        names += [(Client, "ann", "other"), (Compressor, "cy", "other")]
        names.append((Listener, "dee", "main"))
        self.clients = [make(self, name, room) for make, name, room in names]
        self.start()
        self.started = True

    def start(self):
        self.log.start()
        self.clock = Turns()
        rooms = Registry(self.log.store, frames, self.clock, HISTORY)
        self.connections = Connections(self.clock, PING_SECONDS)
        admission = Admission()
        api = Api(
            rooms, self.connections, admission, Addresses(None, 0, self.clock.seconds), listing=None, exports=None
        )
        self.factory = ChatFactory(
            rooms=rooms,
            connections=self.connections,
            admission=admission,
            site=http.ChatSite(api, self.clock),
            reactor=self.clock,
        )

    # Clients

    @rule(who=who, wire=wires, space=spaces, cut=cuts, fresh=st.sampled_from([False] * 7 + [True]))
    def reconnect(self, who, wire, space, cut, fresh):
        client = self.clients[who]
        client.disconnect()
        client.connect(wire, space, fresh=fresh)
        client.deliver(cut)

    @rule(
        who=who,
        count=st.integers(1, 6),
        size=st.sampled_from([0, 20, 300]),
        labelled=st.sampled_from([True, True, False]),
        retry=st.booleans(),
        cut=cuts,
    )
    def post(self, who, count, size, labelled, retry, cut):  # noqa: PLR0917 -- hypothesis draws them by name
        client = self.clients[who]
        if client.wire is None:
            client.connect(BoundedTcp, None)
        if retry:
            client.retry()
        for _ in range(min(count, WINDOW - len(client.pending)) if labelled else count):
            client.post(size, labelled=labelled)
        client.deliver(cut)

    @rule(who=who, back=st.integers(-2, 12), limit=st.integers(1, 6), before=st.booleans())
    def page(self, who, back, limit, before):
        client = self.clients[who]
        if self.ensure_joined(client):
            client.ask(back, limit, before=before)
            client.deliver()

    @rule(who=who, cut=cuts)
    def deliver(self, who, cut):
        self.clients[who].deliver(cut)

    @rule(who=who, space=spaces)
    def take(self, who, space):
        client = self.clients[who]
        if client.wire is not None:
            client.wire.socket.space = space

    @rule(
        who=who,
        count=st.integers(1, 6),
        size=st.sampled_from([0, 300]),
        space=st.integers(0, 900),
        goes_on=st.sampled_from([True, True, False]),
    )
    def post_with_full_socket(self, who, count, size, space, goes_on):
        client = self.clients[who]
        if self.ensure_joined(client):
            client.wire.socket.space = space
            for _ in range(count):
                client.post(size, labelled=len(client.pending) < WINDOW)
            client.deliver()
            self.log.writer.run()
            self.turn(3)
            if not goes_on:
                client.disconnect()
                return
            if client.wire is not None:
                client.wire.socket.space = None
                client.retry()
                client.deliver()
                self.log.writer.run()
                self.turn(3)

    @rule(who=who)
    def fall_too_far_behind(self, who):
        client = self.clients[who]
        other = next(other for other in self.clients if other.room == client.room and other is not client)
        if self.ensure_joined(other) and self.ensure_joined(client) and other.wire is not None:
            client.wire.socket.space = 0
            for _ in range(2 * MAX_LAG):
                other.post(0, labelled=False)
            other.deliver()
            self.log.writer.run()
            self.turn(3)

    @rule(who=who, order=st.permutations(["read", "read", "write", "write"]))
    def join_empty_room_during_commit(self, who, order):
        client = self.clients[who]
        if not self.ensure_joined(client):
            return
        self.settle_down()
        if client.wire is None:
            return
        client.post(0, labelled=False)
        client.deliver()
        for other in self.clients:
            if other.room == client.room:
                other.disconnect()
        client.connect(BoundedTcp, None)
        client.deliver()
        # Four events in any order: the read and its result, the commit and its result.
        begun = set()
        for what in order:
            disk = self.log.reader if what == "read" else self.log.writer
            (disk.answer if what in begun else disk.work)()
            begun.add(what)

    @rule(who=who, reason=st.sampled_from([ConnectionDone, ConnectionLost]))
    def disconnect(self, who, reason):
        self.clients[who].disconnect(reason)

    # The server's machine

    @rule(count=st.integers(1, 5))
    def turn(self, count):
        for _ in range(count):
            self.clock.turn()
            for client in self.clients:
                client.drain()

    @rule()
    def settle_down(self):
        """Run disk, network and reactor until nothing is in flight."""
        for _ in range(10):
            self.log.writer.run()
            self.log.reader.run()
            for client in self.clients:
                client.deliver()
            self.turn(1)

    def ensure_joined(self, client):
        """Connect the client if needed; return True if it has joined."""
        if client.wire is None:
            client.connect(BoundedTcp, None)
        if not client.greeted:
            self.settle_down()
        return client.wire is not None and client.greeted

    @rule(seconds=st.sampled_from([1, 26, 41, DAY // 2, DAY + 1]))
    def time_passes(self, seconds):
        self.now.advance(seconds)
        self.clock.advance(min(seconds, 60))
        self.connections.check_deadlines()
        if seconds >= DAY // 2:
            self.log.store.trim()

    @rule(what=happens)
    def write(self, what):
        getattr(self.log.writer, what)()

    @rule(what=happens)
    def read(self, what):
        getattr(self.log.reader, what)()

    @rule(who=who, steps=st.integers(1, 300), posts=st.booleans())
    def writing_fails(self, who, steps, posts):
        """Fail the next commit, of a new post if `posts`."""
        client = self.clients[who]
        if posts and self.ensure_joined(client):
            self.log.writer.run()
            client.post(0, labelled=False)
            client.deliver()
        self.failures += 1
        self.log.failing(self.log.writer, steps)

    @rule(who=who, steps=st.integers(1, 60), joins=st.booleans())
    def reading_fails(self, who, steps, joins):
        """Fail the next read, for a client that joins if `joins`."""
        client = self.clients[who]
        if joins and not any(other.wire for other in self.clients if other.room == client.room and other is not client):
            client.disconnect()
            self.log.reader.run()
            client.connect(BoundedTcp, None)
            client.deliver()
        self.failures += 1
        self.log.failing(self.log.reader, steps)

    @precondition(lambda self: any(len(entries) > HISTORY for entries in self.log.truth.rooms.values()))
    @rule(done=st.integers(0, 2))
    def kill(self, done):
        """Kill the server, after commits whose results it has not seen."""
        for _ in range(done):
            self.log.writer.work()
        self.log.kill()
        for client in self.clients:
            client.wire = None
        self.start()

    @invariant()
    def no_client_found_a_fault(self):
        if self.faults:
            raise self.faults[0]

    # The end

    def teardown(self):
        try:
            if self.started and not self.faults:
                self._settle()
                self.no_client_found_a_fault()
                for client in self.clients:
                    client.check()
                for client in self.clients:
                    client.disconnect()
        finally:
            if self.started:
                self.log.kill()

    def _settle(self):
        """Reconnect every client, retry posts without an outcome, and deliver everything."""
        for _ in range(ROUNDS):
            for client in self.clients:
                if client.wire is None:
                    client.connect(BoundedTcp, None)
                    client.retry()
                client.wire.socket.space = None
            for _ in range(TURNS):
                if self._idle():
                    break
                self.log.writer.run()
                self.log.reader.run()
                for client in self.clients:
                    client.deliver()
                self.turn(1)
            else:
                raise AssertionError("the server does not become idle")
            for client in self.clients:
                if client.wire is not None and client.pending:
                    client.retry()
            if all(client.wire is not None and not client.pending for client in self.clients):
                return
        raise AssertionError("the clients do not settle")

    def _idle(self):
        return (
            self.clock.idle
            and not (self.log.writer.asked or self.log.writer.answers)
            and not (self.log.reader.asked or self.log.reader.answers)
            and not any(client.wire and (client.outbox or client.wire.writing) for client in self.clients)
        )


@pytest.fixture(autouse=True)
def _low_bounds(monkeypatch):
    for name, value in LOW.items():
        monkeypatch.setattr(name, value)
    loop = txaio.config.loop
    yield
    txaio.config.loop = loop


EXAMPLES = settings(
    REPEATABLE,
    max_examples=60,
    stateful_step_count=100,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
MET = {
    *("Client resumed None", "Client resumed True", "Client resumed False", "Listener resumed True"),
    *("a frame cut on its way to the client", "a frame cut on its way to the server"),
    *("Compressor resumed True", "Compressor resumed False", "a compressed message"),
    *("ack", "duplicate", "page", "close 1013"),
}
"""The events that the clients must have met in each run, so that the server was really tried."""


@pytest.mark.parametrize(
    ("log", "met"),
    [(MemoryLog, MET), (SqliteLog, MET | {"status 503", "UNAVAILABLE post"})],
    ids=["memory", "sqlite"],
)
def test_promise(log, met, tmp_path, events):
    """Each client has the log, each message once and in order, whatever happens."""
    seen = Counter()
    run_state_machine_as_test(lambda: Machine(log, tmp_path, seen), settings=EXAMPLES)
    assert met <= seen.keys()
    gc.collect()  # logs failures of forgotten Deferreds
    assert [event for event in events if "log_failure" in event] == []
