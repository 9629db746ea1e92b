"""The metrics of a server without sockets, and the texts of the alerts and the dashboard."""

import json
import platform
import re
import resource
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    REPEATABLE,
    HeldWorker,
    ImmediateWorker,
    ManualTime,
    Reader,
    RecordingPoster,
    ScriptedLog,
    Turns,
    enter,
    result_of,
)
from support.houses import House
from support.metrics import ALERTS, DASHBOARD, METRICS, WEBHOOK_METRICS, Scrape, asked, panels, rules
from support.servers import ROOT
from support.web_doubles import Connection
from support.websocket_frames import masked
from twisted.internet.defer import fail
from twisted.internet.task import Clock

import chatd
from chatd.messages import Code, Entry, Post
from chatd.operate.metrics import CODES, LAG_SECONDS, LAGS, Metrics
from chatd.room.keyframes import LEAST_MEMBERS
from chatd.room.log import LogUnavailable
from chatd.room.registry import Registry
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore
from chatd.store.sqlite import SqliteStore
from chatd.transport import frames, http
from chatd.transport.frames import message_frame


class MeasuredHouse(House):
    """A house without messages that is starting, and its metrics."""

    def __init__(self, **options):
        super().__init__(seed=(), ready=False, **options)
        self.hooks = []
        self.metrics = Metrics(
            store=self.log,
            rooms=self.rooms,
            connections=self.connections,
            refusals={
                "frame": self.site.intake.refusals,
                "handshake": self.factory.refused_handshakes,
                "request": self.site.refused,
            },
            throttles=self.site.intake.throttles,
            limits=self.site.intake.limits,
            sanctioned=self.moderator.refusals,
            clock=self.clock,
            webhooks=self.hooks,
        )

    def scrape(self):
        return Scrape(self.metrics())

    def status(self, method, path, *headers, body=None):
        return self.ask(method, path, *headers, body=body)[0].status


@pytest.fixture
def house():
    return MeasuredHouse()


def test_every_metric_exists_from_the_start(house):
    """Every metric has its samples, which are 0, before the first event that it counts."""
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
    """The text ends with its last line, because the site adds the newline."""
    assert house.metrics().splitlines()[-1].startswith("chatd_build_info{")
    assert house.metrics()[-1] == "}" or house.metrics()[-1].isdigit()


def test_metrics_are_on_the_admin_port_alone(house):
    """The admin port serves /metrics, and the port for clients answers 404."""
    admin = http.admin(lambda: (True, "ready"), house.clock, drain=house.connections.abort, metrics=house.metrics)
    house.client()
    response, text = Connection(admin).ask(b"GET", b"/metrics", b"Host: x")
    assert (response.status, response.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert Scrape(text)("chatd_members") == 1
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "/metrics" in Connection(admin).ask(b"GET", b"/")[1]
    assert house.status(b"GET", b"/metrics") == 404


# Connections


def test_connections_by_transport(house):
    """Connections are counted by transport; members and rooms are counted over both."""
    people = [house.client(), house.client(), house.client("/rooms/tea")]
    house.stream(b"/rooms/tea/events")
    scrape = house.scrape()
    assert scrape.some("chatd_connections") == {("websocket",): 3, ("events",): 1}
    assert (scrape("chatd_members"), scrape("chatd_rooms")) == (4, 2)
    people[0].lose()
    people[1].lose()
    scrape = house.scrape()
    assert scrape.some("chatd_connections") == {("websocket",): 1, ("events",): 1}
    assert (scrape("chatd_members"), scrape("chatd_rooms")) == (2, 1)


def test_plain_requests_are_no_connections(house):
    """A request for a page and a refused handshake are not counted as connections."""
    house.status(b"GET", b"/")
    house.client("/nowhere")
    assert house.scrape().some("chatd_connections") == {}


def test_sanctions_and_what_they_refuse(house, monkeypatch):
    """Expired ones are not counted."""
    monkeypatch.setattr("time.time", house.now)
    house.sanction("s1", username="ann")
    house.sanction("s2", username="ann", seconds=1)
    house.sanction("s3", kind="mute", username="bob")
    house.post(username="ann", message="hi")
    house.now.advance(1)
    assert house.scrape().some("chatd_sanctions") == {("ban",): 1, ("mute",): 1}
    assert house.scrape().some("chatd_sanction_refusals_total") == {("ban",): 1}


class Hook:
    """A webhook as the metrics see it."""

    def __init__(self, name, **values):
        self.name, self.outcomes, self.lag = name, Counter(values.pop("outcomes", ())), values.pop("lag", (0, 0.0))
        self.messages = self.missed = self.active = self.stopped = 0
        self.__dict__ |= values


def test_webhooks(house):
    """Each has its own values, and a server without webhooks has none of these metrics."""
    assert not any(name.startswith("chatd_webhook") for name in house.scrape().types)
    house.hooks += [
        Hook("https://a.example", outcomes={"taken": 3, "rejected": 1}, messages=7, active=True, lag=(5, 61.5)),
        Hook("https://b.example", missed=2, stopped=True),
    ]
    scrape = house.scrape()
    assert scrape.types == METRICS | WEBHOOK_METRICS | {"chatd_log_messages": "gauge"}
    assert scrape.some("chatd_webhook_deliveries_total") == {
        ("taken", "https://a.example"): 3,
        ("rejected", "https://a.example"): 1,
    }
    assert scrape("chatd_webhook_deliveries_total", webhook="https://b.example", outcome="unanswered") == 0
    assert scrape("chatd_webhook_messages_total", webhook="https://a.example") == 7
    assert scrape("chatd_webhook_active", webhook="https://a.example") == 1
    assert scrape("chatd_webhook_lag_messages", webhook="https://a.example") == 5
    assert scrape("chatd_webhook_lag_seconds", webhook="https://a.example") == 61.5
    assert scrape("chatd_webhook_missed_total", webhook="https://b.example") == 2
    assert scrape("chatd_webhook_stopped", webhook="https://b.example") == 1


def test_closes_by_code(house):
    """Closed connections are counted by close code, whether the client or the server chose it."""
    house.client().close(1000)
    house.client().close(1001)
    house.client().close(1001)
    house.client().close(3456)
    house.client().close(4000)
    house.client().lose()
    slow, asked = house.client(), house.client()
    slow.protocol.evict()
    asked.protocol.restart(1.0)
    slow.lose()
    asked.lose()
    aborted = house.client()
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
    """An event stream counts with the close code that a WebSocket would have received."""
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
    """A client whose handshake is refused was never connected, so it does not count as closed."""
    house.client("/nowhere").lose()
    assert house.scrape().some("chatd_closes_total") == {}


# Messages


def test_messages_and_deliveries(house):
    """Each message counts once, and each member that receives it adds a delivery; history does not count."""
    ann, bob = house.client(), house.client()
    ann.post("1", "2")
    cy = house.client()  # reads both from the history
    stream = house.stream()
    bob.post("3")
    house.status(
        b"POST", b"/rooms/main/messages", b"Content-Type: application/json", body=b'{"username":"d","message":"4"}'
    )
    house.clock.turns()
    got = [sum(frame["type"] == "message" for frame in client.read()) for client in (ann, bob, cy)]
    stream.read()
    got.append(sum(event.kind == "message" for event in stream.events))
    assert got == [4, 4, 2, 2]
    scrape = house.scrape()
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (4, 12)


def test_deliveries_outlive_members_and_rooms(house):
    """The counter of deliveries does not fall when members leave and rooms close."""
    ann, bob, cy = house.client(), house.client(), house.client("/rooms/tea")
    ann.post("1", "2")
    cy.post("1")
    bob.lose()
    ann.post("3")
    assert house.scrape()("chatd_deliveries_total") == 6
    ann.lose()
    cy.lose()
    scrape = house.scrape()
    assert (scrape("chatd_rooms"), scrape("chatd_deliveries_total"), scrape("chatd_messages_total")) == (0, 6, 4)
    house.client().post("4")
    assert house.scrape()("chatd_deliveries_total") == 7


def test_retried_post_is_one_message(house):
    """Two posts with one label are one message."""
    ann = house.client()
    ann.post("1", "1", label="a")
    assert house.scrape()("chatd_messages_total") == 1


def test_message_in_an_empty_room(house):
    """A message in a room without members counts as a message, with no deliveries."""
    house.rooms.post("empty", Post("ann", "hi"), RecordingPoster())
    scrape = house.scrape()
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (1, 0)


@REPEATABLE
@given(st.lists(st.sampled_from(["come", "come slow", "go", "catch up", "say"]), max_size=30))
def test_deliveries_match_what_members_received(actions):
    """Deliveries equal the messages written to members, in any order of joining, leaving and reading."""
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
        reader.writes.append(reader.held)  # a frame that was begun counts as delivered
    assert rooms.delivered == sum(len(reader.numbers) for reader in [*here, *gone])


def test_cursor_lag_of_the_current_members(house):
    """The histogram of the cursor lag covers the members of this moment."""
    log, clock = ScriptedLog(), Turns()
    rooms = Registry(log, frames, clock, 100)
    metrics = Metrics(
        store=house.log,
        rooms=rooms,
        connections=house.connections,
        refusals={},
        throttles={},
        limits=house.limits,
        sanctioned={},
        clock=clock,
    )
    readers = [enter(rooms, reader)[1] for reader in (Reader(), Reader(), Reader(space=0), Reader(space=1))]
    log.say(8)
    clock.turns()
    log.say(4)
    scrape = Scrape(metrics())
    # No pass has run yet, and a frame that was begun counts as delivered.
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
    """The depth of the tails is the sum over all rooms, in messages and in bytes."""
    house.client().post("1", "22")
    house.client("/rooms/tea").post("333")
    pages = [result_of(house.log.read(room, None, 9)) for room in ("main", "tea")]
    frames = [message_frame(house.log.epoch, entry) for page in pages for entry in page.entries]
    scrape = house.scrape()
    assert (scrape("chatd_tail_messages"), scrape("chatd_tail_bytes")) == (3, sum(map(len, frames)))


def test_kept_histories(house):
    """The history frames that rooms keep count, until a message makes them stale."""
    ann = house.client()
    one = house.scrape()("chatd_histories_bytes")
    house.client("/rooms/tea")
    assert 0 < one < house.scrape()("chatd_histories_bytes")
    ann.post("1")
    assert 0 < house.scrape()("chatd_histories_bytes") <= one


def test_compressed_frames(house):
    """The compressed frames that rooms hold count, as long as someone takes them."""
    offer = b"Sec-WebSocket-Extensions: permessage-deflate"
    takers = [house.client("/", offer) for _ in range(LEAST_MEMBERS)]
    assert house.scrape()("chatd_compressed_bytes") == 0
    takers[0].post("1")
    assert 0 < house.scrape()("chatd_compressed_bytes") < house.scrape()("chatd_tail_bytes")
    for one in takers:
        one.lose()
    assert house.scrape()("chatd_compressed_bytes") == 0


# Refusals


def test_rejected_frames_by_code(house):
    """Rejected frames are counted by error code; frames that break the schema count as `schema`."""
    ann = house.client()
    ann.say(username="ann")
    ann.send(masked(b"{"))
    ann.post("1", "2", label="a")
    ann.say(type="history", before=f"{house.log.epoch}-9")
    house.log.down = True
    ann.post("3")
    house.log.read = lambda *_: fail(LogUnavailable("no disk"))
    ann.say(type="history", before=f"{house.log.epoch}-9")  # beyond the head, so the log must be read
    assert house.scrape().some("chatd_refusals_total") == {
        ("frame", "schema"): 2,
        ("frame", Code.LABEL_REUSED): 1,
        ("frame", Code.UNKNOWN_ID): 1,
        ("frame", Code.UNAVAILABLE): 2,
    }


def test_limits_of_new_clients():
    """Refused clients are counted by limit, and gauges show lag and full buffers."""
    house = MeasuredHouse()
    house.limits.lateness.refuses = True
    house.client()
    house.connections.buffered = 7
    scrape = house.scrape()
    assert scrape.some("chatd_limited_total") == {("lag",): 1}
    assert scrape("chatd_limited_total", limit="connections") == 0
    assert (scrape("chatd_refusing"), scrape("chatd_buffered_bytes")) == (1, 7)


def test_rate_limited_frames_have_one_code():
    """A frame above the rate counts as RATE_LIMITED, whether or not it is valid otherwise."""
    house = MeasuredHouse(rate=(1, 1))
    ann = house.client()
    ann.post("1", "2")
    house.clock.advance(1)
    ann.post("3")
    ann.say(username="ann")
    house.clock.advance(1)
    ann.post("4")
    ann.say(type="typing", username="ann")  # dropped without an error
    assert house.scrape().some("chatd_refusals_total") == {("frame", Code.RATE_LIMITED): 2}
    assert house.scrape()("chatd_throttles_total", transport="websocket") == 3
    assert house.scrape()("chatd_throttles_total", transport="http") == 0


def test_every_error_code_exists_from_the_start(house):
    """Every error code has a sample before its first refusal."""
    reasons = house.scrape().labels()["chatd_refusals_total"]["reason"]
    assert reasons == {"schema", *Code}


def test_refused_handshakes_and_requests_by_status(house):
    """Refused handshakes and refused requests are counted by their HTTP status."""
    house.client("/nowhere")
    house.client("/?events=all")
    house.status(b"GET", b"/nowhere")
    house.status(b"GET", b"/rooms/main/messages?limit=0")
    house.status(b"POST", b"/rooms/main/messages", b"Content-Length: 1000000")
    house.status(b"PUT", b"/rooms/main/messages")
    house.status(b"HEAD", b"/rooms/a.b/messages")
    house.log.down = True
    house.client()
    house.status(b"GET", b"/rooms/main/messages")
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
    """Successful responses and the 503 of /readyz are not refusals."""
    assert house.status(b"GET", b"/readyz") == 503
    assert house.status(b"GET", b"/rooms/main/messages") == 200
    assert house.status(b"OPTIONS", b"/rooms/main/messages") == 204
    house.stream().connection.lose()
    assert house.scrape().some("chatd_refusals_total") == {}


# The log


@pytest.fixture
def sqlite(tmp_path):
    """A house whose log is a file; the test runs its writer and sets its clock."""
    now, clock, writer = ManualTime(), Clock(), HeldWorker()
    store = SqliteStore(tmp_path / "log", Retention(), now, writer, ImmediateWorker(), clock=clock)
    house = MeasuredHouse(log=store)
    house.now, house.store_clock, house.writer = now, clock, writer
    yield house
    closed = store.close()
    writer.run_all()
    assert closed.called


def test_duration_of_commits(sqlite):
    """A commit is timed from its start to its end, also while the wall clock is set."""
    poster = RecordingPoster()
    for seconds, jump in ((0.003, 0), (0.02, 1e9), (0, -5)):
        sqlite.rooms.post("main", Post("ann", "hi"), poster)
        sqlite.rooms.post("main", Post("ann", "ho"), poster)
        sqlite.now.jump(jump)
        sqlite.store_clock.advance(seconds)
        sqlite.writer.run()
        sqlite.writer.run_all()
    scrape = sqlite.scrape()
    assert len(poster.numbers) == 6
    assert {bound: number for bound, number in scrape.buckets("chatd_commit_seconds").items() if number} == {
        0.001: 4,  # posts that queued during a commit; the next commit takes no time
        0.005: 1,
        0.025: 1,
    }
    assert scrape("chatd_commit_seconds_count") == 6
    assert scrape("chatd_commit_seconds_sum") == pytest.approx(0.023)


def test_failing_store_is_down_until_it_succeeds(sqlite, monkeypatch):
    """A failed commit sets chatd_store_up to 0, and the next successful one to 1."""
    commit = sqlite.log.file.commit
    monkeypatch.setattr(sqlite.log.file, "commit", lambda posts: 1 / 0)
    poster = RecordingPoster()
    assert sqlite.scrape()("chatd_store_up") == 1
    sqlite.rooms.post("main", Post("ann", "hi"), poster)
    sqlite.writer.run()
    scrape = sqlite.scrape()
    assert (scrape("chatd_store_up"), scrape("chatd_commit_seconds_count"), scrape("chatd_messages_total")) == (0, 1, 0)
    monkeypatch.setattr(sqlite.log.file, "commit", commit)
    sqlite.rooms.post("main", Post("ann", "hi"), poster)
    sqlite.writer.run()
    scrape = sqlite.scrape()
    assert (scrape("chatd_store_up"), scrape("chatd_commit_seconds_count"), scrape("chatd_messages_total")) == (1, 2, 1)


def test_size_of_a_log_in_a_file(sqlite, tmp_path):
    """The size of a SQLite log is the size of its file and of its write-ahead log."""
    sqlite.rooms.post("main", Post("ann", "hi" * 100), RecordingPoster())
    sqlite.writer.run()
    scrape = sqlite.scrape()
    files = [tmp_path / "log", tmp_path / "log-wal"]
    assert all(file.stat().st_size for file in files)
    assert scrape("chatd_log_bytes") == sum(file.stat().st_size for file in files)
    assert scrape("chatd_log_free_bytes") > 0
    names = ("chatd_log_bytes", "chatd_log_free_bytes", "chatd_log_wal_bytes")
    assert scrape.types == METRICS | dict.fromkeys(names, "gauge")
    assert len({scrape.help[name] for name in names}) == 3


def test_scrape_with_a_failing_disk(tmp_path):
    """A store whose files cannot be read reports no sizes, and the scrape succeeds."""
    workers = ImmediateWorker(), ImmediateWorker()
    store = SqliteStore(tmp_path / "gone" / "log", Retention(), ManualTime(), *workers, clock=Clock())
    assert store.usage() == {}


def test_size_of_a_log_in_memory():
    """The size of a log in memory is the number of messages that it retains."""
    house = MeasuredHouse(log=MemoryStore(Retention(messages=2), ManualTime()))
    for room in ("main", "main", "main", "tea"):
        house.rooms.post(room, Post("ann", "hi"), RecordingPoster())
    scrape = house.scrape()
    assert (scrape("chatd_log_messages"), scrape("chatd_messages_total")) == (3, 4)
    assert scrape.buckets("chatd_commit_seconds") == {float("inf"): 0}


def test_seed_is_no_posted_message():
    """Seed messages count in the size of the log, but not as posted messages."""
    store = MemoryStore(Retention(), ManualTime())
    store.open((Entry(1, "ann", "hi", "2024-10-20T12:30:00Z"),))
    store.open = lambda _: None
    scrape = MeasuredHouse(log=store).scrape()
    assert (scrape("chatd_log_messages"), scrape("chatd_messages_total")) == (1, 0)


# The process


def test_reactor_lag_is_sampled_from_the_first_scrape(house):
    """The first scrape starts the sampling of the reactor lag, and later ones do not start another."""
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
    """A sample that is due in the future, because the clock was set back, counts as zero lag."""
    house.scrape()
    (call,) = house.clock.getDelayedCalls()
    call.func(*(due + 100 for due in call.args))
    assert house.scrape()("chatd_reactor_lag_seconds_sum") == 0


def test_process_metrics_have_their_common_names(house):
    """The process metrics have the names that Prometheus client libraries use."""
    scrape = house.scrape()
    assert scrape("process_max_fds") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < scrape("process_cpu_seconds_total") <= time.process_time()
    assert 0 < scrape("process_start_time_seconds") <= time.time()
    assert 1 << 20 < scrape("process_resident_memory_bytes") < 1 << 40
    assert scrape("chatd_build_info", version=chatd.__version__, python=platform.python_version()) == 1


# The alerts and the dashboard


def test_names_in_a_query():
    """The check of expressions finds metrics, matchers and grouping labels, and skips functions and numbers."""
    metrics, groups = asked(
        'histogram_quantile(0.9, sum by (le, kind) (rate(a_bucket{x="1",y=~"b|c"}[5m]))) > 1e9 + 0.5 * b or vector(0)'
    )
    assert metrics == [("a_bucket", [("x", "=", "1"), ("y", "=~", "b|c")]), ("b", [])]
    assert groups == {"le", "kind"}


def test_dashboard_is_complete():
    """Grafana can import the dashboard: its variables exist, and its panels are complete and do not overlap."""
    document = json.loads(DASHBOARD.read_text("utf-8"))
    assert document.keys() >= {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh", "tags"}
    assert "id" not in document, "Grafana assigns an id on import"
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


def test_counted_close_codes_are_those_of_the_protocol():
    """Every close code that docs/protocol.md lists has its own sample."""
    protocol = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    said = {int(code) for code in re.findall(r"^\| (1\d\d\d) \|", protocol, re.MULTILINE)}
    assert said
    assert said <= {*CODES}


def test_every_alert_has_a_runbook_section():
    """docs/operations.md has a section for every alert, and for no other."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    names = [*rules(ALERTS.read_text("utf-8"))]
    assert names
    assert [name for name in names if f"\n### {name}\n" not in page] == []
    assert sorted(names) == sorted(re.findall(r"^### (Chatd\w+)$", page, re.MULTILINE))
