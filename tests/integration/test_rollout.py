"""A server is replaced: its clients move elsewhere at a pace, and no stored message is lost."""

import asyncio
import contextlib
import http.client
import json
import re
import resource
import signal
import socket
import sqlite3
import sys
import time
from itertools import pairwise

import pytest
from support.loops import asynchronous
from support.raw_clients import EventReader, RawMember, moment
from support.servers import LONG, LOOPBACK, TWISTD, Raw, Server, numbered, stored, upgrade
from support.websocket_frames import CLOSE, PING, PONG, TEXT, close_code, frame, take_frames

from chatd.operate.drain import TICK_SECONDS

SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
DRAINED = r"\bdrained\b"


def show(figures):
    """Print figures, which pytest -s shows."""
    sys.stdout.write(f"\n{figures}\n")


def ask(port, method, path, body=None, **headers):
    """Send one request on its own connection; return the status and the text."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def said(message, label, username="ann"):
    """Return a frame that posts with a label."""
    return frame(TEXT, json.dumps({"username": username, "message": message, "label": label}).encode())


@contextlib.contextmanager
def locked(path):
    """Keep the server from committing, as a slow disk does; it gives up after five seconds."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        finally:
            if db.in_transaction:
                db.execute("COMMIT")


# Posts in flight


class Visitor(asyncio.Protocol):
    """A WebSocket client that posts, reads to its close, and records the acks that it received."""

    def __init__(self, path="/", window=0, name="", sent=0):
        loop = asyncio.get_running_loop()
        self.path = path
        self.window = window
        self.name = name
        self.sent = sent
        self.acked = {}
        """The number that each label was given."""
        self.doubted = set()
        """The labels of what may not have been stored."""
        self.told = asyncio.Event()
        """Set at each, and at each message."""
        self.cursor = None
        self.gaps = 0
        self.history = loop.create_future()
        self.joined = None
        self.close = None
        self.closed = None
        """When the close came."""
        self.gone = loop.create_future()
        self._data = bytearray()
        self._upgraded = False

    @classmethod
    async def comes(cls, port, *args, **named):
        """Connect and join."""
        loop = asyncio.get_running_loop()
        _, visitor = await loop.create_connection(lambda: cls(*args, **named), "127.0.0.1", port)
        await visitor.history
        return visitor

    def connection_made(self, transport):
        self.transport = transport
        transport.write(upgrade(self.path))

    async def until(self, count):
        """Wait for so many acknowledgements."""
        while len(self.acked) < count:
            self.told.clear()
            await self.told.wait()

    async def reads(self, number):
        """Wait for the message of this number."""
        while self.cursor < number:
            self.told.clear()
            await self.told.wait()

    def posts(self, count=1):
        """Post messages that are their own labels."""
        self.says([f"{self.name}-{number}" for number in range(self.sent, self.sent + count)])
        self.sent += count

    def says(self, labels):
        """Post these."""
        self.transport.write(b"".join(said(label, label, self.name) for label in labels))

    def data_received(self, data):
        self._data += data
        if not self._upgraded:
            if b"\r\n\r\n" not in self._data:
                return
            assert self._data.startswith(b"HTTP/1.1 101 "), bytes(self._data)
            self._data = self._data.partition(b"\r\n\r\n")[2]
            self._upgraded = True
        found, self._data = take_frames(self._data)
        for one in found:
            self._frame(one.opcode, one.payload)

    def _frame(self, opcode, payload):
        if opcode == CLOSE:
            self.transport.write(frame(CLOSE, payload[:2]))
            self.close = close_code(payload), payload[2:].decode()
            self.closed = time.monotonic()
        elif payload.startswith(b'{"type":"message","id":"'):
            number = int(payload[24 : payload.index(b'"', 24)].rpartition(b"-")[2])
            self.gaps += number != self.cursor + 1
            self.cursor = number
            self.told.set()
        elif opcode == TEXT:
            document = json.loads(payload)
            if document["type"] == "error":
                self.doubted.add(in_doubt(document))
                self.told.set()
                return
            number = int(document["id"].rpartition("-")[2])
            if document["type"] == "history":
                self.cursor = number
                self.joined = time.monotonic()
                self.history.set_result(document)
                self.posts(self.window)
            else:
                assert document["type"] == "ack", document
                assert number <= self.cursor, "after the message itself"
                self.acked[document["label"]] = number
                self.told.set()
                if self.window:
                    self.posts()

    def connection_lost(self, error):
        self.gone.set_result(time.monotonic())


@asynchronous
async def test_posts_around_a_sigterm(tmp_path):
    """Posts that were read are stored and acknowledged; the others can be retried."""
    with Server(tmp_path, "--drain=2", "--history=10000") as server:
        people = [await Visitor.comes(server.port, window=16, name=f"p{index}") for index in range(8)]
        await asyncio.gather(*(person.until(100) for person in people))
        server.terminate()
        await asyncio.gather(*(person.gone for person in people))
        await asyncio.to_thread(server.stopped)
    _, rows = stored(tmp_path / "chatd.sqlite")
    kept = {message: number for number, username, message, _ in rows if username.startswith("p")}
    assert [row[0] for row in rows] == [*range(1, len(rows) + 1)]
    assert len(kept) == len(rows) - 2, "each once"
    unread = set()
    for person in people:
        assert person.close[0] == 1012
        assert 0 <= moment(person.close[1]) <= 1
        assert person.gaps == 0
        assert not person.doubted
        mine = {message: number for message, number in kept.items() if message.startswith(f"{person.name}-")}
        assert person.acked == mine, "no more and no less"
        assert {*mine} == {f"{person.name}-{number}" for number in range(len(mine))}
        unread |= {f"{person.name}-{number}" for number in range(len(mine), person.sent)}
    show(f"posted={sum(person.sent for person in people)} kept={len(kept)} unread={len(unread)} lost=0")
    # At the next server what was not acknowledged is said again, and is there once.
    with Server(tmp_path) as server, RawMember(server.port) as member:
        member.send(b"".join(said(message, message, message.partition("-")[0]) for message in sorted(unread)))
        acks = []
        while len(acks) < len(unread):
            text = member.json()
            acks += [text] if text["type"] == "ack" else []
        assert not [ack for ack in acks if "duplicate" in ack]
    messages = [row[2] for row in stored(tmp_path / "chatd.sqlite")[1][2:]]
    assert sorted(messages) == sorted(f"{person.name}-{number}" for person in people for number in range(person.sent))


COUNT = 50


def in_flight(member):
    """Send messages that a server reads but cannot commit yet."""
    member.send(b"".join(said(f"{number}", f"{number}") for number in range(COUNT)) + frame(PING, b"read"))
    assert member.frame() == (PONG, b"read")


def test_slow_disk_during_a_drain(tmp_path):
    """Posts are acknowledged before the close, however slow the disk is."""
    with Server(tmp_path) as server, RawMember(server.port) as ann, RawMember(server.port) as bob:
        with locked(tmp_path / "chatd.sqlite"):
            in_flight(ann)
            server.terminate()
            server.log.wait("draining")
            # The port closes when the grace is over, and then the first of them has its turn.
            server.log.wait(r"\(TCP Port \d+ Closed\)")
        texts, _ = ann.goes()
        messages, acks = ([text for text in texts if text["type"] == kind] for kind in ("message", "ack"))
        assert [numbered(message)[0] for message in messages] == [(n + 3, "ann", f"{n}") for n in range(COUNT)]
        assert [(ack["label"], ack["id"]) for ack in acks] == [
            (f"{n}", message["id"]) for n, message in enumerate(messages)
        ]
        assert bob.goes()[0] == messages
        server.stopped()
    assert [row[2] for row in stored(tmp_path / "chatd.sqlite")[1][2:]] == [f"{number}" for number in range(COUNT)]


def test_failing_store_during_a_drain(tmp_path):
    """Posts are refused before the close."""
    with Server(tmp_path) as server, RawMember(server.port) as ann:
        with locked(tmp_path / "chatd.sqlite") as db:
            in_flight(ann)
            server.terminate()
            server.log.wait("draining")
            db.execute("ALTER TABLE messages RENAME TO elsewhere")
        texts, _ = ann.goes()
        assert [(text["type"], text["code"], text["label"]) for text in texts] == [
            ("error", "UNAVAILABLE", f"{number}") for number in range(COUNT)
        ]
        server.stopped()
    with contextlib.closing(sqlite3.connect(tmp_path / "chatd.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM elsewhere").fetchone() == (2,)


def in_doubt(text):
    """Return the label of a refusal that leaves open whether the post was stored."""
    assert (text["type"], text["code"]) == ("error", "UNAVAILABLE")
    assert text["message"] == "The message may not have been stored; try again with the same label."
    return text["label"]


def test_hung_disk_during_a_drain(tmp_path):
    """Posts are refused as in doubt before the close."""
    labels = [f"{number}" for number in range(COUNT)]
    with Server(tmp_path) as server, RawMember(server.port) as ann, RawMember(server.port) as bob:
        with locked(tmp_path / "chatd.sqlite"):
            in_flight(ann)
            server.terminate()
            texts, _ = ann.goes()
            assert [in_doubt(text) for text in texts] == labels
            assert bob.goes()[0] == []
        server.stopped()
    kept = [row[2] for row in stored(tmp_path / "chatd.sqlite")[1][2:]]
    assert kept == labels[: len(kept)], "those of the commit that was under way, as it turns out"
    with Server(tmp_path) as server, RawMember(server.port) as ann:
        ann.send(b"".join(said(label, label) for label in labels))
        acks = []
        while len(acks) < COUNT:
            text = ann.json()
            acks += [text] if text["type"] == "ack" else []
        assert sorted(ack["label"] for ack in acks if "duplicate" in ack) == sorted(kept)
    assert sorted(row[2] for row in stored(tmp_path / "chatd.sqlite")[1][2:]) == sorted(labels), "each once"


# Over HTTP

POST = "POST", "/rooms/main/messages", '{"username":"ann","message":"hi"}'
KEYED = {"Content-Type": "application/json", "Idempotency-Key": '"a"'}


@contextlib.contextmanager
def keeping(port):
    """Open an HTTP connection that has answered a request and stays open."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        yield connection


def begin_post(server, connection):
    """Send a post that a server reads but cannot commit yet."""
    connection.request(*POST, KEYED)
    assert ask(server.port, "GET", "/healthz") == (200, "ok\n"), "which came after it"


def by_signal(server):
    server.terminate()


def by_command(server):
    assert ask(server.admin_port, "POST", "/drain") == (202, "draining\n")


@pytest.mark.parametrize("drain", [by_signal, by_command])
@pytest.mark.parametrize("members", [0, 1])
def test_post_over_http_that_is_on_its_way_is_answered(tmp_path, members, drain):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "--drain=4", admin=LOOPBACK))
        people = [stack.enter_context(RawMember(server.port)) for _ in range(members)]
        posting, idle = (stack.enter_context(keeping(server.port)) for _ in range(2))
        with locked(tmp_path / "chatd.sqlite"):
            begin_post(server, posting)
            drain(server)
            server.log.wait(r"\(TCP Port \d+ Closed\)")
            if not people:
                assert idle.sock.recv(1) == b"", "it has asked for nothing"
        answer = posting.getresponse()
        assert (answer.status, json.loads(answer.read())) == (
            201,
            {"type": "ack", "label": "a", "id": f"{server.epoch}-3"},
        )
        for member in people:
            assert [numbered(text) for text in member.goes()[0]] == [[(3, "ann", "hi")]]
        for connection in (posting, idle):
            assert connection.sock.recv(1) == b""
        server.log.wait(DRAINED)
        if drain is by_command:
            assert ask(server.admin_port, "GET", "/readyz") == (503, "drained\n")
            server.terminate()
        server.stopped()
    assert [row[:3] for row in stored(tmp_path / "chatd.sqlite")[1]] == [*SEED, (3, "ann", "hi")]


@pytest.mark.parametrize(
    ("budget", "stop"), [(2, signal.SIGTERM), (3600, signal.SIGINT)], ids=["by the limit", "immediate"]
)
@pytest.mark.parametrize("members", [0, 1])
def test_http_post_on_a_hung_disk(tmp_path, members, budget, stop):
    """The post is refused as in doubt."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, f"--drain={budget}"))
        people = [stack.enter_context(RawMember(server.port)) for _ in range(members)]
        posting, idle = (stack.enter_context(keeping(server.port)) for _ in range(2))
        with locked(tmp_path / "chatd.sqlite"):
            begin_post(server, posting)
            server.terminate(stop)
            for member in people:
                assert member.goes()[0] == []
            assert idle.sock.recv(1) == b"", "it has asked for nothing"
            answer = posting.getresponse()
            document = json.loads(answer.read())
            assert (answer.status, document["code"], document["detail"]) == (
                503,
                "UNAVAILABLE",
                "the message may not have been stored; try again with the same key",
            )
        server.stopped(stop)


def ask_on(deaf):
    """Ask and ask, until the server has no room for another answer, and so reads no more either."""
    while True:
        deaf.sendall(b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\n\r\n" * 100)


def test_unread_answers_at_the_end_of_the_drain(tmp_path):
    """The client is dropped."""
    with Server(tmp_path, "--drain=2") as server, contextlib.closing(socket.socket()) as deaf:
        with RawMember(server.port) as ann:
            ann.send(b"".join(said("x" * 500, f"{number}") for number in range(100)))
            while ann.json().get("label") != "99":
                pass
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.settimeout(1)
        with pytest.raises(TimeoutError):
            ask_on(deaf)
        begun = time.monotonic()
        server.terminate()
        server.stopped()
        assert time.monotonic() - begun > 1.5, "it was waited for"


# Signals and commands


def test_drained_server_stays_unready(tmp_path):
    with Server(tmp_path, "--drain=2", admin=LOOPBACK) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)
        with contextlib.closing(kept), RawMember(server.port) as early:
            for port in (server.port, server.admin_port):
                assert ask(port, "GET", "/readyz") == (200, "ready\n")
            kept.request("GET", "/healthz")
            assert kept.getresponse().read() == b"ok\n"
            assert ask(server.admin_port, "POST", "/drain") == (202, "draining\n")
            for port in (server.port, server.admin_port):
                assert ask(port, "GET", "/readyz") == (503, "draining\n")
                assert ask(port, "GET", "/healthz") == (200, "ok\n")
            with RawMember(server.port) as late:  # which a load balancer sent here all the same
                assert numbered(late.history) == SEED
                late.send(said("hi", "a", "bob"))
                (message, ack), seconds = late.goes()
                assert (numbered(message), ack["label"]) == ([(3, "bob", "hi")], "a")
                assert 0 <= seconds <= 1
            texts, seconds = early.goes()
            assert texts == [message]
            assert 0 <= seconds <= 1
            server.log.wait(DRAINED)
            with pytest.raises(ConnectionRefusedError):
                Raw(server.port)
            assert kept.sock.recv(1) == b"", "who is not connected comes back to another"
        assert ask(server.admin_port, "GET", "/healthz") == (200, "ok\n")
        assert ask(server.admin_port, "POST", "/drain") == (202, "drained\n")
        assert ask(server.admin_port, "GET", "/readyz") == (503, "drained\n")
        server.stop()
        assert "skipping the paced drain" not in server.log.text
        assert len(re.findall(DRAINED, server.log.text)) == 1


def test_sigterm_during_a_requested_drain(tmp_path):
    """The server ends when it has drained, at the same pace."""
    with Server(tmp_path, "--drain=2", admin=LOOPBACK) as server, RawMember(server.port) as member:
        assert ask(server.admin_port, "POST", "/drain")[0] == 202
        server.terminate()
        server.log.wait(r"\bstopping\b")
        assert ask(server.admin_port, "GET", "/readyz") == (503, "draining\n")
        assert member.goes()[1] <= 1
        server.stopped()
        assert "skipping the paced drain" not in server.log.text


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),
    ],
    ids=lambda signals: "-".join(number.name for number in signals),
)
def test_immediate_drain_spreads_clients_over_ten_seconds(tmp_path, signals):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(tmp_path, "--drain=3600", admin=LOOPBACK))
        members = [stack.enter_context(RawMember(server.port)) for _ in range(20)]
        readers = [stack.enter_context(EventReader(server.port)) for _ in range(20)]
        members[0].send(said("hi", "a"))
        for number in signals:
            server.terminate(number)
            server.log.wait("draining")
            if len(signals) == 2 and number == signals[0] == signal.SIGTERM:
                assert ask(server.admin_port, "GET", "/readyz") == (503, "draining\n")
        gone = [client.goes() for client in (*members, *readers)]
        server.stopped(signals[0])
        assert "skipping the paced drain" in server.log.text
    texts = [texts for texts, _ in gone]
    seconds = [seconds for _, seconds in gone]
    assert all(0 <= moment <= 10 for moment in seconds)
    assert max(seconds) > 2, "which 40 would miss once in 10 ** 28 rollouts"
    kept = [row[:3] for row in stored(tmp_path / "chatd.sqlite")[1]][2:]
    assert [ack["label"] for ack in texts[0][len(kept) :]] == ["a"] * len(kept), "it was read, or it was not"
    for member in texts[1:20]:
        assert [numbered(text)[0] for text in member] == kept
    for history, *reader in texts[20:]:
        assert [*numbered(history), *(numbered(text)[0] for text in reader)] == [*SEED, *kept]


def test_failing_store_while_serving(tmp_path):
    """The failure is reported, and clients stay."""
    with Server(tmp_path, admin=LOOPBACK) as server, RawMember(server.port) as ann:
        with contextlib.closing(sqlite3.connect(tmp_path / "chatd.sqlite", isolation_level=None)) as db:
            db.execute("ALTER TABLE messages RENAME TO elsewhere")
            ann.send(said("hi", "a"))
            assert ann.json()["code"] == "UNAVAILABLE"
            words = "degraded: the log cannot be written: no such table: messages\n"
            for port in (server.port, server.admin_port):
                assert ask(port, "GET", "/readyz") == (200, words)
            with RawMember(server.port) as bob:  # the room is in memory
                assert numbered(bob.history) == SEED
            db.execute("ALTER TABLE elsewhere RENAME TO messages")
        ann.send(said("hi", "a"))
        assert [ann.json()["type"] for _ in range(2)] == ["message", "ack"]
        assert ask(server.port, "GET", "/readyz") == (200, "ready\n")
        server.terminate()
        ann.goes()
        server.stopped()


# Many

MANY = 2000
BUDGET = 12
PACED = 6
"""Seconds of the budget after the grace, in which clients are released."""
WRITERS = 20
PAUSE = 1.5
"""Seconds between two posts of a writer."""


@pytest.fixture
def _many_files():
    """Let this process, and the servers that it starts, have as many connections as the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 3 * MANY:
        pytest.skip(f"no more than {hard} open files are allowed")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Mover:
    """A client that moves to the next server when asked to, and posts there what the first refused."""

    def __init__(self, name):
        self.name = name
        self.unkept = []
        """The labels of its retries, in order."""

    async def comes(self, port):
        self.first = await Visitor.comes(port, name=self.name)

    async def moves(self, port):
        writing = asyncio.ensure_future(self.writes(self.first)) if self.name else None
        await self.first.gone
        if writing:
            writing.cancel()
            self.first.sent += 1  # what it was about to say
        self.retry_after = moment(self.first.close[1])
        await asyncio.sleep(self.retry_after)
        self.second = await Visitor.comes(port, name=self.name, sent=self.first.sent)
        if self.name:
            labels = (f"{self.name}-{number}" for number in range(self.first.sent))
            self.unkept = [label for label in labels if label not in self.first.acked]
            self.second.says(self.unkept)

    @staticmethod
    async def writes(visitor):
        """Post now and then."""
        while visitor.close is None:
            visitor.posts()
            await asyncio.sleep(PAUSE)


class Heart:
    """A timer that beats every 20 ms unless the process stalls."""

    worst = 0.0
    """The longest time between two beats."""

    async def beat(self):
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.02)
            now = time.monotonic()
            self.worst = max(self.worst, now - last)
            last = now


def posted(path):
    """Check that a log has no gap and no duplicate; return the numbers of a writer's messages."""
    _, rows = stored(path)
    assert [row[0] for row in rows] == [*range(1, len(rows) + 1)]
    numbers = {message: number for number, _, message, _ in rows}
    assert len(numbers) == len(rows)
    return {message: number for message, number in numbers.items() if message.startswith("w")}


def most_in_a_second(moments):
    """Return the number of these moments in the fullest second."""
    moments = sorted(moments)
    most = begin = 0
    for end, last in enumerate(moments):
        while moments[begin] <= last - 1:
            begin += 1
        most = max(most, end - begin + 1)
    return most


@pytest.mark.usefixtures("_many_files")
@asynchronous
async def test_two_thousand_clients_move(tmp_path):
    """They move to a second node at an even pace, and nothing is lost."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    options = {"listen": f"{LOOPBACK}:backlog=4096", "command": (sys.executable, TWISTD)}
    with (
        Server(folders[0], f"--drain={BUDGET}", **options) as first,
        Server(folders[1], "--drain=0", **options) as second,
    ):
        movers = [Mover(f"w{index}" if index < WRITERS else "") for index in range(MANY)]
        for begin in range(0, MANY, 100):
            await asyncio.gather(*(mover.comes(first.port) for mover in movers[begin : begin + 100]))
        heart = Heart()
        beating = asyncio.ensure_future(heart.beat())
        begun = time.monotonic()
        port = second.port
        first.terminate()
        await asyncio.gather(*(mover.moves(port) for mover in movers))
        took = time.monotonic() - begun
        beating.cancel()
        await asyncio.to_thread(first.stopped)
        writers = movers[:WRITERS]
        for mover in writers:
            mover.second.posts(2)
        await asyncio.gather(*(mover.second.until(len(mover.unkept) + 2) for mover in writers))
        head = max(mover.second.cursor for mover in movers)
        await asyncio.gather(*(mover.second.reads(head) for mover in movers))
        assert not any(mover.second.gone.done() for mover in movers)
        for mover in movers:
            mover.second.transport.close()
        await asyncio.gather(*(mover.second.gone for mover in movers))
        await asyncio.to_thread(second.stop)

    # Nobody is left behind, and nobody missed anything.
    assert all(mover.first.close[0] == 1012 for mover in movers)
    assert all(0 <= mover.retry_after <= 1 for mover in movers)
    assert sum(mover.first.gaps + mover.second.gaps for mover in movers) == 0
    # Nothing is lost, and what was acknowledged is in one of the logs, once.
    here, there = (posted(folder / "chatd.sqlite") for folder in folders)
    every = {f"{mover.name}-{number}" for mover in writers for number in range(mover.second.sent)}
    doubted = {label for mover in writers for label in mover.first.doubted}
    assert every == {*here, *there}
    assert {*here} & {*there} <= doubted
    assert {label for mover in writers for label in mover.first.acked} == {*here} - doubted
    for mover in writers:
        assert mover.first.acked.items() <= here.items()
        assert mover.second.acked.items() <= there.items()
        assert {*mover.unkept} <= {*mover.second.acked}
    # They arrive at an even pace, within the limits of this machine.
    told = sorted(mover.first.closed for mover in movers)
    even = MANY / PACED
    asked = most_in_a_second([mover.first.closed + mover.retry_after for mover in movers])
    came = most_in_a_second([mover.second.joined for mover in movers])
    waits = [after - before for before, after in pairwise(told)]
    ticks = sum(wait > TICK_SECONDS / 2 for wait in waits) * TICK_SECONDS / (told[-1] - told[0])
    starved = max(heart.worst, *waits) > 0.25 or ticks < 0.9
    show(
        f"clients={MANY} seconds={took:.1f} peak={came} asked={asked} even={even:.0f} ratio={came / even:.2f} "
        f"again={len([label for mover in writers for label in mover.unkept])} doubted={len(doubted)} lost=0 "
        f"late={heart.worst:.3f}/{max(waits):.3f} ticks={ticks:.2f}{' starved' if starved else ''}"
    )
    assert starved or asked <= 1.5 * even
