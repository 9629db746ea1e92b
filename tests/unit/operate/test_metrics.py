"""What Prometheus is told, against real traffic; and that the alerts and the dashboard ask for nothing else."""

import http.client
import itertools
import json
import platform
import re
import resource
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.helpers import (
    HEAD,
    REPEATABLE,
    HeldWorker,
    ImmediateWorker,
    ManualTime,
    Reader,
    RecordingPoster,
    ScriptedLog,
    Turns,
    enter,
    masked,
    read_frames,
)
from support.servers import LONG, ROOT, Raw, Server, need, post
from support.web_doubles import Connection, Stream, Transport
from twisted.internet.defer import fail
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

import chatd
from chatd.messages import Code, Entry, Post
from chatd.operate.metrics import CODES, LAG_SECONDS, LAGS, Metrics
from chatd.room.log import LogUnavailable
from chatd.room.registry import Registry
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore
from chatd.store.sqlite import SqliteStore
from chatd.transport import frames
from chatd.transport import http as web
from chatd.transport.admission import Addresses, Admission, Rate
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.frames import message_frame
from chatd.transport.websocket import ChatFactory

ALERTS = ROOT / "docs" / "alerts.yml"
ALERT_TESTS = ROOT / "tests" / "alerts_test.yml"
DASHBOARD = ROOT / "docs" / "dashboard.json"

METRICS = {
    "chatd_build_info": "gauge",
    "chatd_closes": "counter",
    "chatd_commit_seconds": "histogram",
    "chatd_connections": "gauge",
    "chatd_cursor_lag_messages": "histogram",
    "chatd_cursor_lag_messages_gcount": "gauge",
    "chatd_cursor_lag_messages_gsum": "gauge",
    "chatd_deliveries": "counter",
    "chatd_members": "gauge",
    "chatd_messages": "counter",
    "chatd_reactor_lag_seconds": "histogram",
    "chatd_refusals": "counter",
    "chatd_rooms": "gauge",
    "chatd_store_up": "gauge",
    "chatd_tail_bytes": "gauge",
    "chatd_tail_messages": "gauge",
    "process_cpu_seconds": "counter",
    "process_max_fds": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
}
"""What every server tells, and of which type it is; a counter's samples have `_total` behind its name."""


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text):
        self.types = {}
        self.samples = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation.endswith("."), family.name
            assert family.name not in self.types
            self.types[family.name] = family.type
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples
                self.samples[key] = sample.value

    def __call__(self, name, **labels):
        """The value of one sample."""
        return self.samples[name, frozenset(labels.items())]

    def sum(self, name, **labels):
        """Of all samples with these labels, and maybe others."""
        return sum(value for (of, having), value in self.samples.items() if of == name and labels.items() <= having)

    def some(self, name):
        """The samples of this name that are not 0, by the values of their labels in the order of the labels' names."""
        return {
            tuple(value for _, value in sorted(labels)): number
            for (of, labels), number in self.samples.items()
            if of == name and number
        }

    def buckets(self, name):
        """How many are in each bucket of a histogram, alone."""
        found = sorted(
            (float(dict(labels)["le"]), value) for (of, labels), value in self.samples.items() if of == f"{name}_bucket"
        )
        total = itertools.pairwise([0, *(value for _, value in found)])
        return {bound: after - before for (bound, _), (before, after) in zip(found, total, strict=True)}

    def labels(self):
        """The names of the labels of each sample, and their values."""
        known = {}
        for name, labels in self.samples:
            for label, value in labels:
                known.setdefault(name, {}).setdefault(label, set()).add(value)
            known.setdefault(name, {})
        return known


class Log(MemoryStore):
    """A log that can be down."""

    down = False

    def append(self, room, post, poster):
        if self.down:
            poster.refused(post, LogUnavailable())
        else:
            super().append(room, post, poster)

    def read(self, room, after, limit):
        return fail(LogUnavailable("no disk")) if self.down else super().read(room, after, limit)


class Person:
    """The other end of a WebSocket connection."""

    def __init__(self, house, path="/"):
        self.house = house
        self.transport = Transport()
        self.transport.connection = self
        self.protocol = house.factory.buildProtocol(None)
        self.protocol.makeConnection(self.transport)
        self.sends(HEAD.replace(b"GET / ", f"GET {path} ".encode()) + b"\r\n\r\n")

    def sends(self, data):
        self.protocol.dataReceived(data)
        self.house.clock.turns()

    def says(self, **document):
        self.sends(masked(json.dumps(document).encode()))

    def posts(self, *messages, **more):
        for message in messages:
            self.says(username="ann", message=message, **more)

    def numbers(self):
        """Of the messages that came, the history apart."""
        head, _, frames = self.transport.value().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        return [text["id"] for text in read_frames(frames) if text["type"] == "message"]

    def closes(self, code):
        self.sends(masked(code.to_bytes(2), first=0x88))
        self.lose()

    def lose(self):
        self.protocol.connectionLost(Failure(ConnectionDone()))


class House:
    """A server without sockets."""

    def __init__(self, *, store=None, rate=None):
        self.clock = Turns()
        self.store = store or Log(Retention(), ManualTime())
        self.store.open(())
        self.rooms = Registry(self.store, frames, self.clock, 100)
        self.connections = Connections(self.clock, 25)
        limit = rate and Rate(*rate, self.clock.seconds)
        api = Api(self.rooms, self.connections, Admission(), Addresses(limit, 0, self.clock.seconds))
        self.site = web.site(lambda: (False, "starting"), self.clock, {"": api, "rooms": api})
        self.factory = ChatFactory(
            rooms=self.rooms,
            connections=self.connections,
            admission=Admission(),
            site=self.site,
            reactor=self.clock,
            rate=limit,
        )
        self.metrics = Metrics(
            store=self.store,
            rooms=self.rooms,
            connections=self.connections,
            refusals={
                "frame": self.factory.refused_frames,
                "handshake": self.factory.refused_handshakes,
                "request": self.site.refused,
            },
            clock=self.clock,
        )

    def scrape(self):
        return Scrape(self.metrics())

    def connect(self):
        return Connection(self.site)

    def ask(self, method, path, *headers, body=None):
        return self.connect().ask(method, path, b"Host: x", *headers, body=body)[0].status

    def stream(self, room="main"):
        return Stream(self.connect(), f"/rooms/{room}/events".encode())


@pytest.fixture
def house():
    return House()


def test_every_metric_exists_from_the_start(house):
    scrape = house.scrape()
    assert scrape.types == METRICS | {"chatd_log_messages": "gauge"}
    ours = {
        name: value
        for (name, _), value in scrape.samples.items()
        if name.startswith("chatd_") and name not in ("chatd_build_info", "chatd_store_up")
    }
    assert {*ours.values()} == {0}
    assert house.scrape().samples.keys() == scrape.samples.keys()


def test_text_has_no_final_newline(house):
    assert house.metrics().splitlines()[-1].startswith("chatd_build_info{")
    assert house.metrics()[-1] == "}" or house.metrics()[-1].isdigit()


def test_metrics_are_on_the_admin_port_alone(house):
    admin = web.admin(lambda: (True, "ready"), house.clock, drain=house.connections.abort, metrics=house.metrics)
    Person(house)
    response, text = Connection(admin).ask(b"GET", b"/metrics", b"Host: x")
    assert (response.status, response.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert Scrape(text)("chatd_members") == 1
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "/metrics" in Connection(admin).ask(b"GET", b"/")[1]
    assert house.ask(b"GET", b"/metrics") == 404


# Who is here


def test_connections_by_transport(house):
    people = [Person(house), Person(house), Person(house, "/rooms/tea")]
    house.stream("tea")
    scrape = house.scrape()
    assert scrape.some("chatd_connections") == {("websocket",): 3, ("events",): 1}
    assert (scrape("chatd_members"), scrape("chatd_rooms")) == (4, 2)
    people[0].lose()
    people[1].lose()
    scrape = house.scrape()
    assert scrape.some("chatd_connections") == {("websocket",): 1, ("events",): 1}
    assert (scrape("chatd_members"), scrape("chatd_rooms")) == (2, 1)


def test_plain_requests_are_no_connections(house):
    house.ask(b"GET", b"/")
    Person(house, "/nowhere")
    assert house.scrape().some("chatd_connections") == {}


def test_closes_by_code(house):
    Person(house).closes(1000)
    Person(house).closes(1001)
    Person(house).closes(1001)
    Person(house).closes(3456)
    Person(house).closes(4000)
    Person(house).lose()
    slow, asked = Person(house), Person(house)
    slow.protocol.evict()
    asked.protocol.restart(1.0)
    slow.lose()
    asked.lose()
    aborted = Person(house)
    aborted.protocol.abort()
    assert house.scrape().some("chatd_closes_total") == {
        ("1000", "websocket"): 1,
        ("1001", "websocket"): 2,
        ("other", "websocket"): 2,
        ("1006", "websocket"): 2,
        ("1012", "websocket"): 1,
        ("1013", "websocket"): 1,
    }


def test_closes_of_event_streams(house):
    left, slow, asked = house.stream(), house.stream(), house.stream()
    streams = sorted(house.connections.connected, key=lambda one: one.number)
    members = dict(zip((left, slow, asked), streams, strict=True))
    members[slow].evict()
    members[asked].restart(1.0)
    for stream in members:
        stream.connection.lose()
    assert house.scrape().some("chatd_closes_total") == {
        ("1006", "events"): 1,
        ("1012", "events"): 1,
        ("1013", "events"): 1,
    }


def test_refused_handshake_is_no_close(house):
    Person(house, "/nowhere").lose()
    assert house.scrape().some("chatd_closes_total") == {}


# Messages


def test_messages_and_deliveries(house):
    ann, bob = Person(house), Person(house)
    ann.posts("1", "2")
    cy = Person(house)  # who has these from the history
    stream = house.stream()
    bob.posts("3")
    house.ask(
        b"POST", b"/rooms/main/messages", b"Content-Type: application/json", body=b'{"username":"d","message":"4"}'
    )
    house.clock.turns()
    got = [len(person.numbers()) for person in (ann, bob, cy)]
    stream.read()
    got.append(sum(event.kind == "message" for event in stream.events))
    assert got == [4, 4, 2, 2]
    scrape = house.scrape()
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (4, 12)


def test_deliveries_outlive_members_and_rooms(house):
    ann, bob, cy = Person(house), Person(house), Person(house, "/rooms/tea")
    ann.posts("1", "2")
    cy.posts("1")
    bob.lose()
    ann.posts("3")
    assert house.scrape()("chatd_deliveries_total") == 6
    ann.lose()
    cy.lose()
    scrape = house.scrape()
    assert (scrape("chatd_rooms"), scrape("chatd_deliveries_total"), scrape("chatd_messages_total")) == (0, 6, 4)
    Person(house).posts("4")
    assert house.scrape()("chatd_deliveries_total") == 7


def test_retried_post_is_one_message(house):
    ann = Person(house)
    ann.posts("1", "1", label="a")
    assert house.scrape()("chatd_messages_total") == 1


def test_message_in_an_empty_room(house):
    house.rooms.post("empty", Post("ann", "hi"), RecordingPoster())
    scrape = house.scrape()
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (1, 0)


@REPEATABLE
@given(st.lists(st.sampled_from(["come", "come slow", "go", "catch up", "say"]), max_size=30))
def test_deliveries_match_what_members_received(actions):
    log, clock = ScriptedLog(3), Turns()
    rooms = Registry(log, frames, clock, 2)
    here, gone, before = [], [], 0
    for action in ["come", *actions, "catch up"]:
        if action.startswith("come"):
            here.append(enter(rooms, Reader(space=0 if action == "come slow" else None))[1])
        elif action == "go" and here:
            gone.append(here.pop(0))
            gone[-1].leave()
        elif action == "catch up":
            for reader in here:
                if not reader.ready:
                    reader.drain(next(iter(rooms)))
        elif action == "say":
            log.say(3)
        clock.turns()
        assert rooms.delivered >= before
        before = rooms.delivered
    for reader in gone:
        reader.writes.append(reader.held)  # a frame that was begun has been handed over
    assert rooms.delivered == sum(len(reader.numbers) for reader in [*here, *gone])


def test_cursor_lag_of_the_current_members(house):
    log, clock = ScriptedLog(), Turns()
    rooms = Registry(log, frames, clock, 100)
    metrics = Metrics(store=house.store, rooms=rooms, connections=house.connections, refusals={}, clock=clock)
    readers = [enter(rooms, reader)[1] for reader in (Reader(), Reader(), Reader(space=0), Reader(space=1))]
    log.say(8)
    clock.turns()
    log.say(4)
    scrape = Scrape(metrics())
    # Each pass is yet to come, and a frame that was begun counts as given.
    assert scrape.buckets("chatd_cursor_lag_messages") == {
        0: 0,
        1: 0,
        10: 2,
        100: 2,
        1000: 0,
        10_000: 0,
        float("inf"): 0,
    }
    assert scrape("chatd_cursor_lag_messages_gsum") == 4 + 4 + 11 + 11
    clock.turns()
    scrape = Scrape(metrics())
    assert scrape.buckets("chatd_cursor_lag_messages")[0] == 2
    assert scrape("chatd_cursor_lag_messages_gcount") == 4
    for reader in readers[2:]:
        reader.drain(next(iter(rooms)))
    clock.turns()
    assert Scrape(metrics()).buckets("chatd_cursor_lag_messages")[0] == 4
    assert [*LAGS] == sorted({*LAGS})


def test_tails_of_all_rooms(house):
    Person(house).posts("1", "22")
    Person(house, "/rooms/tea").posts("333")
    frames = [message_frame(house.store.epoch, entry) for log in house.store._rooms.values() for entry in log.entries]
    scrape = house.scrape()
    assert (scrape("chatd_tail_messages"), scrape("chatd_tail_bytes")) == (3, sum(map(len, frames)))


# Refusals


def test_rejected_frames_by_code(house):
    ann = Person(house)
    ann.says(username="ann")
    ann.sends(masked(b"{"))
    ann.posts("1", "2", label="a")
    ann.says(type="history", before=f"{house.store.epoch}-9")
    house.store.down = True
    ann.posts("3")
    house.store.read = lambda *_: fail(LogUnavailable("no disk"))
    ann.says(type="history", before=f"{house.store.epoch}-9")  # beyond the head, so that the log must be read
    assert house.scrape().some("chatd_refusals_total") == {
        ("frame", "schema"): 2,
        ("frame", Code.LABEL_REUSED): 1,
        ("frame", Code.UNKNOWN_ID): 1,
        ("frame", Code.UNAVAILABLE): 2,
    }


def test_rate_limited_frames_have_one_code():
    house = House(rate=(1, 1))
    ann = Person(house)
    ann.posts("1", "2")
    ann.says(username="ann")
    ann.says(type="typing", username="ann")  # which is only dropped
    assert house.scrape().some("chatd_refusals_total") == {("frame", Code.RATE_LIMITED): 2}


def test_every_error_code_exists_from_the_start(house):
    reasons = house.scrape().labels()["chatd_refusals_total"]["reason"]
    assert reasons == {"schema", *Code}


def test_refused_handshakes_and_requests_by_status(house):
    Person(house, "/nowhere")
    Person(house, "/?events=all")
    house.ask(b"GET", b"/nowhere")
    house.ask(b"GET", b"/rooms/main/messages?limit=0")
    house.ask(b"POST", b"/rooms/main/messages", b"Content-Length: 1000000")
    house.ask(b"PUT", b"/rooms/main/messages")
    house.ask(b"HEAD", b"/rooms/a.b/messages")
    house.store.down = True
    Person(house)
    house.ask(b"GET", b"/rooms/main/messages")
    house.connect().send(b"nonsense\r\n\r\n")
    assert house.scrape().some("chatd_refusals_total") == {
        ("handshake", "404"): 1,
        ("handshake", "400"): 1,
        ("handshake", "503"): 1,
        ("request", "404"): 2,
        ("request", "400"): 2,
        ("request", "413"): 1,
        ("request", "405"): 1,
        ("request", "503"): 1,
    }


def test_good_answers_and_unreadiness_are_no_refusals(house):
    assert house.ask(b"GET", b"/readyz") == 503
    assert house.ask(b"GET", b"/rooms/main/messages") == 200
    assert house.ask(b"OPTIONS", b"/rooms/main/messages") == 204
    house.stream().connection.lose()
    assert house.scrape().some("chatd_refusals_total") == {}


# The log


@pytest.fixture
def sqlite(tmp_path):
    """A house whose log is a file, with a writer that waits for the test, and a clock for it."""
    now, writer = ManualTime(), HeldWorker()
    store = SqliteStore(tmp_path / "log", Retention(), now, writer, ImmediateWorker())
    house = House(store=store)
    house.now, house.writer = now, writer
    yield house
    closed = store.close()
    writer.run_all()
    assert closed.called


def test_duration_of_commits(sqlite):
    poster = RecordingPoster()
    for seconds in (0.003, 0.02, -5):  # the clock was set back
        sqlite.rooms.post("main", Post("ann", "hi"), poster)
        sqlite.rooms.post("main", Post("ann", "ho"), poster)
        sqlite.now.advance(seconds)
        sqlite.writer.run()
        sqlite.writer.run_all()
    scrape = sqlite.scrape()
    assert len(poster.numbers) == 6
    assert {bound: number for bound, number in scrape.buckets("chatd_commit_seconds").items() if number} == {
        0.001: 4,  # what had gathered meanwhile, and was committed at once
        0.005: 1,
        0.025: 1,
    }
    assert scrape("chatd_commit_seconds_count") == 6
    assert scrape("chatd_commit_seconds_sum") == pytest.approx(0.023)


def test_failing_store_is_down_until_it_succeeds(sqlite, monkeypatch):
    commit = sqlite.store.file.commit
    monkeypatch.setattr(sqlite.store.file, "commit", lambda posts: 1 / 0)
    poster = RecordingPoster()
    assert sqlite.scrape()("chatd_store_up") == 1
    sqlite.rooms.post("main", Post("ann", "hi"), poster)
    sqlite.writer.run()
    scrape = sqlite.scrape()
    assert (scrape("chatd_store_up"), scrape("chatd_commit_seconds_count"), scrape("chatd_messages_total")) == (0, 1, 0)
    monkeypatch.setattr(sqlite.store.file, "commit", commit)
    sqlite.rooms.post("main", Post("ann", "hi"), poster)
    sqlite.writer.run()
    scrape = sqlite.scrape()
    assert (scrape("chatd_store_up"), scrape("chatd_commit_seconds_count"), scrape("chatd_messages_total")) == (1, 2, 1)


def test_size_of_a_log_in_a_file(sqlite, tmp_path):
    sqlite.rooms.post("main", Post("ann", "hi" * 100), RecordingPoster())
    sqlite.writer.run()
    scrape = sqlite.scrape()
    files = [tmp_path / "log", tmp_path / "log-wal"]
    assert all(file.stat().st_size for file in files)
    assert scrape("chatd_log_bytes") == sum(file.stat().st_size for file in files)
    assert scrape("chatd_log_free_bytes") > 0
    assert scrape.types == METRICS | {"chatd_log_bytes": "gauge", "chatd_log_free_bytes": "gauge"}


def test_scrape_with_a_failing_disk(tmp_path):
    store = SqliteStore(tmp_path / "gone" / "log", Retention(), ManualTime(), ImmediateWorker(), ImmediateWorker())
    assert store.usage() == {}


def test_size_of_a_log_in_memory():
    house = House(store=MemoryStore(Retention(messages=2), ManualTime()))
    for room in ("main", "main", "main", "tea"):
        house.rooms.post(room, Post("ann", "hi"), RecordingPoster())
    scrape = house.scrape()
    assert (scrape("chatd_log_messages"), scrape("chatd_messages_total")) == (3, 4)
    assert scrape.buckets("chatd_commit_seconds") == {float("inf"): 0}


def test_seed_is_no_posted_message():
    store = MemoryStore(Retention(), ManualTime())
    store.open((Entry(1, "ann", "hi", "2024-10-20T12:30:00Z"),))
    store.open = lambda _: None
    scrape = House(store=store).scrape()
    assert (scrape("chatd_log_messages"), scrape("chatd_messages_total")) == (1, 0)


# The process


def test_reactor_lag_is_sampled_from_the_first_scrape(house):
    clock = house.clock
    assert clock.getDelayedCalls() == []
    house.scrape()
    house.scrape()
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(LAG_SECONDS)
    clock.advance(LAG_SECONDS + 0.3)
    clock.advance(LAG_SECONDS)
    clock.advance(LAG_SECONDS + 20)
    scrape = house.scrape()
    lags = {bound: number for bound, number in scrape.buckets("chatd_reactor_lag_seconds").items() if number}
    assert lags == {0.001: 2, 0.5: 1, float("inf"): 1}
    assert scrape("chatd_reactor_lag_seconds_count") == 4
    assert scrape("chatd_reactor_lag_seconds_sum") == pytest.approx(20.3)
    assert len(clock.getDelayedCalls()) == 1


def test_clock_that_is_set_back_is_no_lag(house):
    house.scrape()
    (call,) = house.clock.getDelayedCalls()
    call.func(*(due + 100 for due in call.args))
    assert house.scrape()("chatd_reactor_lag_seconds_sum") == 0


def test_process_metrics_have_their_common_names(house):
    scrape = house.scrape()
    assert scrape("process_max_fds") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < scrape("process_cpu_seconds_total") <= time.process_time()
    assert 0 < scrape("process_start_time_seconds") <= time.time()
    assert 1 << 20 < scrape("process_resident_memory_bytes") < 1 << 40
    assert scrape("chatd_build_info", version=chatd.__version__, python=platform.python_version()) == 1


# A real server


def ask_metrics(port, method="GET", path="/metrics"):
    """Ask as a scraper does: the status, the media type and the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, response.headers["content-type"], body


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A scrape of a real server that has met all that the alerts and the dashboard are about, as its text."""
    with Server(tmp_path_factory.mktemp("server"), admin="tcp:port=0:interface=127.0.0.1") as server:
        with Raw(server.port) as ann, Raw(server.port) as bob:
            ann.join()
            bob.join()
            ann.send(post("ann", "hi"))
            assert ann.json()["type"] == bob.json()["type"] == "message"
            status, kind, text = ask_metrics(server.admin_port)
            assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
            assert ask_metrics(server.admin_port, "HEAD") == (200, kind, "")
            assert ask_metrics(server.admin_port, "POST")[0] == 405
            for method in ("GET", "HEAD", "POST"):
                assert ask_metrics(server.port, method)[0] == 404, "it is for operators alone"
        server.stop()
    return text


def test_metrics_of_a_real_server(scraped):
    scrape = Scrape(scraped)
    assert scrape.types == METRICS | {"chatd_log_bytes": "gauge", "chatd_log_free_bytes": "gauge"}
    assert scrape.some("chatd_connections") == {("websocket",): 2}
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (1, 2)
    assert (scrape("chatd_members"), scrape("chatd_rooms"), scrape("chatd_tail_messages")) == (2, 1, 3)
    assert scrape("chatd_commit_seconds_count") == scrape("chatd_store_up") == 1
    assert scrape.sum("chatd_refusals_total") == scrape.sum("chatd_closes_total") == 0


def promtool(*arguments, **options):
    """Run promtool; answers whether it found all well, and what it said."""
    done = subprocess.run(
        [need("promtool"), *arguments], capture_output=True, text=True, timeout=LONG, check=False, **options
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_nothing_wrong_with_a_scrape(scraped):
    assert promtool("check", "metrics", input=scraped) == (True, "")
    assert not promtool("check", "metrics", input=scraped.replace("_total", "_count"))[0], "it looks"


# What the alerts and the dashboard ask for

_NUMBER = re.compile(r"\[[^\]]*\]|(?<![\w\"])[0-9][0-9.e]*\b")
_SELECTOR = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{([^}]*)\})?(?![a-z0-9_:]|\s*\()", re.IGNORECASE)
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(by|without)\s*\(([^)]*)\)")
WORDS = {"and", "or", "unless", "bool", "offset"}
ADDED = {"up": {}}
"""What Prometheus itself knows of a server."""
ADDED_LABELS = {"job", "instance"}


def asked(expression):
    """The metrics that a PromQL expression names, each with its matchers; and the labels that it groups by."""
    groups = {label.strip() for _, labels in _GROUPING.findall(expression) for label in labels.split(",")}
    bare = _NUMBER.sub("", _GROUPING.sub("", expression))
    found = [(name, _MATCHER.findall(inside)) for name, inside in _SELECTOR.findall(bare) if name not in WORDS]
    return found, groups


def unknown(expression, scrape):
    """What an expression asks for and a scrape has not."""
    known = scrape.labels() | ADDED
    metrics, groups = asked(expression)
    assert metrics, expression
    for name, matchers in metrics:
        if name not in known:
            yield name
            continue
        for label, sign, value in matchers:
            if label not in ADDED_LABELS and (
                label not in known[name] or (sign == "=" and value not in known[name][label])
            ):
                yield f"{name}{{{label}}}"
    yield from groups - ADDED_LABELS - {label for name, _ in metrics for label in known.get(name, ())}


def rules(text):
    """The alerts by their names: expression and the rest of what is said."""
    found = {}
    for part in text.split("- alert: ")[1:]:
        name, _, rest = part.partition("\n")
        (expression,) = re.findall(r"^ +expr: (.+)$", rest, re.MULTILINE)
        found[name] = expression, rest
    return found


def panels():
    return json.loads(DASHBOARD.read_text("utf-8"))["panels"]


def queries():
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_a_query_is_read_for_its_names():
    metrics, groups = asked(
        'histogram_quantile(0.9, sum by (le, kind) (rate(a_bucket{x="1",y=~"b|c"}[5m]))) > 1e9 + 0.5 * b or vector(0)'
    )
    assert metrics == [("a_bucket", [("x", "=", "1"), ("y", "=~", "b|c")]), ("b", [])]
    assert groups == {"le", "kind"}


def test_every_alert_uses_existing_metrics(scraped):
    scrape = Scrape(scraped)
    for name, (expression, _) in rules(ALERTS.read_text("utf-8")).items():
        assert [*unknown(expression, scrape)] == [], name


def test_every_panel_uses_existing_metrics(scraped):
    scrape = Scrape(scraped)
    for query in queries():
        assert [*unknown(query, scrape)] == [], query


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("chatd_store_ok == 0", "chatd_store_ok"),
        ("rate(chatd_messages[5m]) > 1", "chatd_messages"),
        ('chatd_closes_total{code="1014"}', "chatd_closes_total{code}"),
        ('chatd_closes_total{reason="1013"}', "chatd_closes_total{reason}"),
        ('chatd_closes_total{reason=~"1.*"}', "chatd_closes_total{reason}"),
        ("sum by (room) (chatd_members)", "room"),
        ("absent(up) or chatd_member", "chatd_member"),
    ],
)
def test_unknown_metric_is_found(scraped, expression, found):
    assert [*unknown(expression, Scrape(scraped))] == [found]


def test_the_queries_of_the_dashboard_are_promql(tmp_path):
    lines = [
        f"      - record: panel:{place}\n        expr: {json.dumps(query.replace('$__rate_interval', '5m'))}\n"
        for place, query in enumerate(queries())
    ]
    file = tmp_path / "rules.yml"
    file.write_text("groups:\n  - name: dashboard\n    rules:\n" + "".join(lines))
    well, said = promtool("check", "rules", str(file))
    assert well, said
    file.write_text(file.read_text().replace("sum by (le)", "sum bye (le)"))
    assert not promtool("check", "rules", str(file))[0], "it looks"


def test_the_dashboard_is_one():
    document = json.loads(DASHBOARD.read_text("utf-8"))
    assert document.keys() >= {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh", "tags"}
    assert "id" not in document, "who imports it gives it one"
    variables = {variable["name"] for variable in document["templating"]["list"]}
    assert {*re.findall(r"\$\{?(\w+)", json.dumps(document))} == variables | {"__rate_interval"}
    cells = set()
    for panel in panels():
        assert panel.keys() >= {"id", "type", "title", "description", "datasource", "gridPos", "fieldConfig", "options"}
        assert panel["type"] in ("stat", "timeseries")
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len({*references}) == len(references)
        at = panel["gridPos"]
        taken = {(at["x"] + right, at["y"] + down) for right in range(at["w"]) for down in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in taken), panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_every_alert_has_a_summary_severity_and_runbook():
    for name, (_, rest) in rules(ALERTS.read_text("utf-8")).items():
        assert re.search(r"labels: \{severity: (critical|warning)\}", rest), name
        assert re.search(r"^ +summary: \".+\"$", rest, re.MULTILINE), name
        assert f"runbook: docs/operations.md#{name.lower()}\n" in rest


def test_the_rules_are_good_and_fire_when_they_should():
    well, said = promtool("check", "rules", str(ALERTS))
    assert well, said
    assert f"{len(rules(ALERTS.read_text('utf-8')))} rules found" in said
    well, said = promtool("test", "rules", str(ALERT_TESTS))
    assert well, said


def test_rule_with_another_metric_fails_its_test(tmp_path):
    text = ALERTS.read_text("utf-8")
    renamed = re.sub(r"(?<= expr: ).+", lambda found: re.sub(r"\b(chatd|process)_", "other_", found[0]), text)
    for name, content in {"docs/alerts.yml": renamed, "tests/alerts_test.yml": ALERT_TESTS.read_text("utf-8")}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    well, said = promtool("test", "rules", str(tmp_path / "tests" / "alerts_test.yml"))
    assert not well
    of_up = {"ChatdDown", "ChatdAbsent"}
    assert {*re.findall(r'exp: {alertname="(\w+)"}', said)} == {*rules(text)} - of_up


def test_counted_close_codes_are_those_of_the_protocol():
    protocol = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    said = {int(code) for code in re.findall(r"^\| (1\d\d\d) \|", protocol, re.MULTILINE)}
    assert said
    assert said <= {*CODES}


def test_every_alert_has_a_runbook_section():
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    names = [*rules(ALERTS.read_text("utf-8"))]
    assert names
    assert [name for name in names if f"\n### {name}\n" not in page] == []
    assert sorted(names) == sorted(re.findall(r"^### (Chatd\w+)$", page, re.MULTILINE))
