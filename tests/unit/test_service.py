"""The order in which the parts of the server start and stop."""

import gc
import signal

import pytest
from twisted.application.service import Application, IServiceCollection, MultiService
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogLevel
from zope.interface import implementer

from chatd.messages import Entry
from chatd.operate.systemd import Notifier
from chatd.service import LOOK_SECONDS, TRIM_SECONDS, ChatService, Readiness, page_url
from chatd.store.base import StoreError
from chatd.transport import limits
from chatd.transport.limits import Lateness

READY = {"READY": "1", "STATUS": "ready"}
SEED = (Entry(1, "ann", "hi", "2024-10-20T12:30:00Z"),)


class Store:
    """A store that records its calls; the test decides when they end."""

    epoch = "k7Q2"

    def __init__(self, journal):
        self.journal = journal
        self.fault = None
        self.opened = succeed(None)
        self.trimmed = succeed(None)
        self.closing = succeed(None)

    def open(self, seed):
        self.journal.append(("open", seed))
        if self.fault:
            raise self.fault
        return self.opened

    def trim(self):
        self.journal.append("trim")
        return self.trimmed

    def close(self):
        self.journal.append("store.close")
        return self.closing


class Connections:
    """Connections whose deadlines are checked."""

    def __init__(self, journal):
        self.journal = journal
        self.fault = None

    def check_deadlines(self):
        self.journal.append("look")
        if self.fault:
            raise self.fault


class Drain:
    """A drain that closes the ports at once and ends when `gone` fires, which it has at first."""

    budget = 30.0

    def __init__(self, journal):
        self.journal = journal
        self.gone = succeed(None)
        self.ports = None

    def skip_pace(self):
        self.journal.append("skip pace")

    def run(self, close_ports, *, expecting):
        self.journal.append("drain")
        self.expecting = expecting
        self.ports = close_ports()
        return self.gone


class Notify(Notifier):
    """Notifications to systemd, in the journal of the test."""

    def __init__(self, journal, watchdog):
        self.journal = journal
        self.watchdog = watchdog

    def __call__(self, **values):
        self.journal.append(values)


class Process:
    """The process of the server; the end of it is SystemExit with the line."""

    def __init__(self, journal, *, sheds_privileges):
        self.journal = journal
        self.sheds_privileges = sheds_privileges

    def started(self):
        self.journal.append("started")

    def fail(self, line):
        raise SystemExit(line)

    def fail_later(self, line):
        self.journal.append(("fail later", line))


class Port:
    """An open port."""

    def __init__(self, journal, text):
        self.journal = journal
        self.text = text
        self.stopped = None
        self.host = IPv4Address("TCP", "0.0.0.0", int(text.split(":")[1]))

    def getHost(self):
        return self.host

    def stopReading(self):
        self.journal.append(f"hold {self.text}")

    def startReading(self):
        self.journal.append(f"accept {self.text}")

    def stopListening(self):
        self.journal.append(f"stop {self.text}")
        return self.stopped


@implementer(IStreamServerEndpoint)
class Endpoint:
    """An endpoint that opens its port when `result` fires, which it has at first."""

    def __init__(self, journal, text):
        self.journal = journal
        self.text = text
        self.port = Port(journal, text)
        self.result = succeed(self.port)

    def listen(self, factory):
        self.journal.append(("listen", self.text, factory))
        return self.result


class Webhooks:
    """Webhooks that end when `ended` fires, which it has at first."""

    def __init__(self, journal):
        self.journal = journal
        self.ended = succeed(None)

    def start(self):
        self.journal.append("deliver")

    def stop(self, seconds):
        self.journal.append(("deliver no more", seconds))
        return self.ended


class Server:
    """A ChatService of doubles, which record their calls in one journal."""

    def __init__(
        self,
        *,
        listen=("tcp:8085", "tcp:9085"),
        admin=("tcp:8086",),
        watchdog=None,
        sheds_privileges=False,
        observer=None,
        webhooks=False,
    ):
        self.journal = []
        self.webhooks = Webhooks(self.journal) if webhooks else None
        self.clock = Clock()
        self.store = Store(self.journal)
        self.connections = Connections(self.journal)
        self.drain = Drain(self.journal)
        self.factory = object()
        self.admin_factory = object()
        self.listen = {text: Endpoint(self.journal, text) for text in listen}
        self.admin = {text: Endpoint(self.journal, text) for text in admin}
        self.fault = None
        self.readiness = Readiness(lambda: self.fault)
        self.observer = observer
        self.lateness = Lateness(self.clock)
        self.service = ChatService(
            store=self.store,
            seed=SEED,
            connections=self.connections,
            factory=self.factory,
            admin_factory=self.admin_factory,
            listen=self.listen,
            admin=self.admin,
            readiness=self.readiness,
            drain=self.drain,
            clock=self.clock,
            process=Process(self.journal, sheds_privileges=sheds_privileges),
            lateness=self.lateness,
            observer=self.observer,
            notify=Notify(self.journal, watchdog),
            webhooks=self.webhooks,
        )

    def start(self):
        self.service.startService()
        self.journal.clear()

    def stop(self):
        """Begin to stop; return a Deferred that fires when everything is closed."""
        return maybeDeferred(self.service.stopService)


@pytest.fixture
def server():
    return Server()


def in_use():
    return CannotListenError("", 8085, OSError(98, "Address already in use"))


# Starting


def test_store_opens_with_the_seed_before_any_port(server):
    """The store opens with the seed before any port opens; then systemd is notified."""
    server.service.startService()
    assert server.journal == [
        ("open", SEED),
        ("listen", "tcp:8085", server.factory),
        ("listen", "tcp:9085", server.factory),
        ("listen", "tcp:8086", server.admin_factory),
        READY,
        "started",
    ]
    assert server.service.running


def test_ready_when_all_ports_are_open(server):
    """The server is not ready until its last port is open."""
    server.listen["tcp:9085"].result = Deferred()
    assert server.readiness() == (False, "starting")
    server.service.startService()
    assert server.readiness() == (False, "starting")
    assert READY not in server.journal
    server.listen["tcp:9085"].result.callback(server.listen["tcp:9085"].port)
    assert server.readiness() == (True, "ready")
    assert server.journal[-1] == READY


def test_failing_log_is_degraded_but_ready(server):
    """A failing log does not make a server unready: all nodes share the log, so none would be ready."""
    server.start()
    server.fault = "the log cannot be read: disk I/O error"
    assert server.readiness() == (True, "degraded: the log cannot be read: disk I/O error")
    server.fault = None
    assert server.readiness() == (True, "ready")


@pytest.mark.parametrize("fault", [None, "the log cannot be read: disk I/O error"])
def test_unready_at_the_start_and_in_a_drain(server, fault):
    """A server that starts or drains is not ready, whatever the state of the log."""
    server.fault = fault
    assert server.readiness() == (False, f"starting: {fault}" if fault else "starting")
    server.start()
    server.drain.gone = Deferred()
    server.service.drain()
    assert server.readiness() == (False, "draining")
    server.drain.gone.callback(None)
    assert server.readiness() == (False, "drained")


def test_one_text_for_both_kinds_of_ports(server):
    """--listen and --admin may have the same text, such as tcp:0, which opens another port each time."""
    server = Server(listen=["tcp:0"], admin=["tcp:0"])
    server.admin["tcp:0"].port.text = "admin"
    server.start()
    assert server.readiness() == (True, "ready")
    server.service.drain()
    assert server.journal == [DRAINING, "drain", "stop tcp:0"]
    server.stop()
    assert server.journal[-1] == "stop admin"


def test_admin_port_alone_is_open_before_the_store(server):
    """While the store opens, only the admin port is open, and the server is starting."""
    server.store.opened = Deferred()
    server.service.startService()
    assert server.journal == [("open", SEED), ("listen", "tcp:8086", server.admin_factory), "started"]
    assert server.readiness() == (False, "starting")
    assert server.service.running
    server.journal.clear()
    server.store.opened.callback(None)
    assert server.journal == [
        ("listen", "tcp:8085", server.factory),
        ("listen", "tcp:9085", server.factory),
        READY,
    ]
    assert server.readiness() == (True, "ready")


def test_reason_and_deadlines_before_the_store_is_open(server):
    """While the store opens, /readyz gives the reason for the delay, and deadlines are checked."""
    server.store.opened = Deferred()
    server.fault = "the log at localhost:6379 cannot be reached (connection refused)"
    server.start()
    assert server.readiness() == (False, f"starting: {server.fault}")
    server.clock.advance(LOOK_SECONDS)
    assert server.journal == ["look"]
    server.store.opened.callback(None)
    assert server.readiness() == (True, f"degraded: {server.fault}")
    server.fault = None
    assert server.readiness() == (True, "ready")


def test_admin_port_that_fails_before_the_store_is_open(server):
    """An admin port that cannot open ends the process, even while the store is opening."""
    server.store.opened = Deferred()
    server.admin["tcp:8086"].result = fail(in_use())
    with pytest.raises(SystemExit, match="cannot listen on tcp:8086 "):
        server.service.startService()
    assert server.journal[-1] == "store.close"
    assert server.clock.getDelayedCalls() == []


def test_store_that_opens_before_the_admin_port(server):
    """A store that opens first leaves the server unready until the admin port is open."""
    server.store.opened = Deferred()
    server.admin["tcp:8086"].result = Deferred()
    server.start()
    server.store.opened.callback(None)
    assert server.readiness() == (False, "starting")
    server.admin["tcp:8086"].result.callback(server.admin["tcp:8086"].port)
    assert server.readiness() == (True, "ready")


@pytest.mark.parametrize("late", [False, True])
def test_stop_before_the_store_is_open(server, late):
    """A server that is stopped while its store opens stops without opening its ports."""
    server.store.opened = Deferred()
    server.start()
    server.drain.gone = Deferred()
    stopped = server.stop()
    if late:
        server.store.opened.callback(None)
    server.drain.gone.callback(None)
    assert stopped.called
    assert server.journal == [STOPPING, DRAINING, "drain", "store.close", "stop tcp:8086"]
    assert server.clock.getDelayedCalls() == []
    assert not server.service.running


def test_store_that_opens_in_a_drain_opens_no_port(server):
    server.store.opened = Deferred()
    server.start()
    server.service.drain()
    server.store.opened.callback(None)
    assert server.journal == [DRAINING, "drain"]
    assert server.readiness() == (False, "drained")


def test_log_names_the_ports_and_the_epoch(server, events):
    """The log lists each endpoint, the epoch of the log, and a URL for each port."""
    server.service.startService()
    texts = [event["log_format"].format(**event) for event in events]
    assert texts == [
        "listening on tcp:8085",
        "listening on tcp:9085",
        "listening on tcp:8086",
        "ready, with the log k7Q2",
        "Open http://localhost:8085/",
        "Open http://localhost:9085/",
    ]


@pytest.mark.parametrize(
    ("endpoint", "host", "url"),
    [
        ("tcp:0", IPv4Address("TCP", "0.0.0.0", 40085), "http://localhost:40085/"),
        ("tcp6:0", IPv6Address("TCP", "::", 40085), "http://localhost:40085/"),
        ("tcp:0", IPv4Address("TCP", "127.0.0.1", 40085), "http://127.0.0.1:40085/"),
        ("tcp6:0", IPv6Address("TCP", "::1", 40085), "http://[::1]:40085/"),
        ("ssl:443", IPv4Address("TCP", "0.0.0.0", 443), "https://localhost:443/"),
        ("unix:/run/chatd", UNIXAddress("/run/chatd"), None),
    ],
)
def test_url_of_a_port(endpoint, host, url):
    """The URL has the port that the kernel gave, and a host that a browser on this machine reaches."""
    assert page_url(endpoint, host) == url


def test_port_without_a_page(server, events):
    """No URL is logged for a port that is not TCP."""
    for endpoint in server.listen.values():
        endpoint.port.host = UNIXAddress("/run/chatd")
    server.service.startService()
    assert [event["log_format"] for event in events][-1].startswith("ready")


def test_store_that_cannot_be_opened_ends_the_process(server):
    """The error of the store ends the process, and no port opens."""
    server.store.fault = StoreError("chatd.sqlite is in use by another chatd: stop that one")
    with pytest.raises(SystemExit) as refusal:
        server.service.startService()
    assert refusal.value.code == "chatd.sqlite is in use by another chatd: stop that one"
    assert server.journal == [("open", SEED)]
    assert not server.service.running
    assert server.readiness() == (False, "starting")


def test_unexpected_error_at_the_start(server, events):
    """An error that nobody foresaw ends the process with one line too, and the log has the traceback."""
    server.store.fault = ZeroDivisionError("for the test")
    with pytest.raises(SystemExit, match=r"the store cannot be opened \(ZeroDivisionError\('for the test'\)\)"):
        server.service.startService()
    assert events[-1]["log_failure"].type is ZeroDivisionError


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (in_use(), "[Errno 98] Address already in use"),
        (OverflowError("port must be 0-65535."), "port must be 0-65535."),
    ],
)
def test_port_that_cannot_be_opened_ends_the_process(server, events, fault, reason):
    """The process ends with one line that names the port, and the store is closed."""
    server.listen["tcp:8085"].result = fail(fault)
    with pytest.raises(SystemExit) as refusal:
        server.service.startService()
    assert refusal.value.code == (f"cannot listen on tcp:8085 ({reason}): choose another with --listen or --admin")
    assert server.journal[-1] == "store.close"
    assert not server.service.running
    assert server.readiness() == (False, "starting")
    assert server.clock.getDelayedCalls() == []
    assert [event for event in events if event["log_level"] > LogLevel.info] == []


def test_first_failing_port_is_named(server):
    """If several ports cannot open, the line names the first, and the store is closed once."""
    server.listen["tcp:9085"].result = fail(in_use())
    server.admin["tcp:8086"].result = fail(in_use())
    with pytest.raises(SystemExit, match="cannot listen on tcp:9085 "):
        server.service.startService()
    assert server.journal.count("store.close") == 1


@pytest.mark.parametrize("text", ["tcp:9085", "tcp:8086"])
def test_port_that_fails_later_ends_the_process(server, text):
    """A port that fails after the start ends the process with the same line, once."""
    server.store.opened = Deferred()
    for endpoint in (server.listen["tcp:8085"], (server.listen | server.admin)[text]):
        endpoint.result = Deferred()
    server.service.startService()
    server.store.opened.callback(None)
    (server.listen | server.admin)[text].result.errback(in_use())
    line = f"cannot listen on {text} ([Errno 98] Address already in use): choose another with --listen or --admin"
    assert server.journal[-1] == ("fail later", line)
    assert server.readiness() == (False, "starting")
    server.listen["tcp:8085"].result.errback(in_use())
    assert server.journal[-1] == ("fail later", line)
    server.stop()
    assert server.journal[-1] == "stop tcp:8086" if text == "tcp:9085" else "store.close"


# Giving up root


@pytest.fixture
def shedding():
    """A server whose process changes its user between the privileged start and the start."""
    return Server(sheds_privileges=True)


PRIVILEGED = ["tcp:8085", "tcp:9085", "tcp:8086"]


def test_ports_open_before_root_is_given_up(shedding):
    """All ports open first, and nothing is ready before the store is open."""
    shedding.service.privilegedStartService()
    assert [text for _, text, _ in shedding.journal] == PRIVILEGED
    assert shedding.readiness() == (False, "starting")
    shedding.journal.clear()
    shedding.service.startService()
    assert shedding.journal == [("open", SEED), READY, "started"]


def test_clients_wait_for_a_store_that_opens_late(shedding):
    """The ports of clients accept nobody until the store is open; the admin port serves."""
    shedding.store.opened = Deferred()
    shedding.service.privilegedStartService()
    shedding.journal.clear()
    shedding.service.startService()
    assert shedding.journal == [("open", SEED), "hold tcp:8085", "hold tcp:9085", "started"]
    shedding.journal.clear()
    shedding.store.opened.callback(None)
    assert shedding.journal == ["accept tcp:8085", "accept tcp:9085", READY]


def test_privileged_port_that_cannot_be_opened(shedding):
    """The process ends, and the store is not opened."""
    shedding.admin["tcp:8086"].result = fail(in_use())
    with pytest.raises(SystemExit, match="cannot listen on tcp:8086 "):
        shedding.service.privilegedStartService()
    assert [text for _, text, _ in shedding.journal] == PRIVILEGED


def test_privileged_start_of_a_usual_server(server):
    """A process that keeps its user opens its ports after the store."""
    server.service.privilegedStartService()
    assert server.journal == []


# Running


def test_deadlines_are_checked_each_second(server):
    server.start()
    server.clock.advance(LOOK_SECONDS - 0.1)
    assert server.journal == []
    server.clock.pump([0.1, LOOK_SECONDS, LOOK_SECONDS])
    assert server.journal == ["look"] * 3


def test_lag_is_measured(server):
    """A reactor that keeps on lagging refuses new clients."""
    server.start()
    server.clock.pump([limits.LOOK_SECONDS, *[10] * limits.LATE_LOOKS])
    assert server.lateness.refuses


def test_rooms_are_trimmed_every_ten_minutes(server):
    server.start()
    server.clock.advance(TRIM_SECONDS - 0.1)
    assert "trim" not in server.journal
    server.clock.pump([0.1, TRIM_SECONDS])
    assert server.journal.count("trim") == 2


def test_trims_do_not_overlap(server):
    """A trim does not begin before the last one has ended."""
    server.start()
    server.store.trimmed = Deferred()
    server.clock.pump([TRIM_SECONDS, TRIM_SECONDS])
    assert server.journal.count("trim") == 1
    server.store.trimmed.callback(None)
    server.clock.advance(TRIM_SECONDS)
    assert server.journal.count("trim") == 2


def test_watchdog_is_fed_until_everything_is_closed():
    """systemd is notified once per interval, also during the drain, until the server has stopped."""
    server = Server(watchdog=7.5)
    alive = {"WATCHDOG": "1"}
    server.start()
    server.clock.advance(7.4)
    assert alive not in server.journal
    server.clock.pump([0.1, 7.5])
    assert server.journal.count(alive) == 2
    server.drain.gone = Deferred()
    server.stop()
    server.clock.advance(7.5)
    assert server.journal.count(alive) == 3
    server.drain.gone.callback(None)
    assert server.clock.getDelayedCalls() == []


def test_watchdog_is_off_by_default(server):
    """Without WatchdogSec no notification is sent to the watchdog."""
    server.start()
    server.clock.advance(3600)
    assert {"WATCHDOG": "1"} not in server.journal


# Draining

STOPPING = {"STOPPING": "1", "STATUS": "stopping"}
DRAINING = {"STATUS": "draining"}
PORTS = ["stop tcp:8085", "stop tcp:9085"]


def test_drain_leaves_the_process_running(server):
    """A drain closes the ports for clients; the store and the admin port stay open."""
    server.start()
    server.drain.gone = Deferred()
    drained = server.service.drain()
    assert server.journal == [DRAINING, "drain", *PORTS]
    assert not drained.called
    server.drain.gone.callback(None)
    assert drained.called
    server.clock.advance(LOOK_SECONDS)
    assert server.journal == [DRAINING, "drain", *PORTS, "look"], "the store and the admin port stay"
    assert server.service.running
    assert server.readiness() == (False, "drained"), "until it is stopped"


@pytest.mark.parametrize("expecting", [False, True])
def test_drain_with_expected_clients(server, expecting):
    """The drain knows whether clients are expected."""
    server.start()
    server.service.drain(expecting=expecting)
    assert server.drain.expecting is expecting


def test_drain_is_unready_from_its_start(server):
    """The server is unready before the first client is released."""
    server.start()
    seen = []
    server.drain.run = lambda close_ports, **_: seen.append(server.readiness()) or succeed(None)
    server.service.drain()
    assert seen == [(False, "draining")]


def test_drain_waits_for_every_port_to_close(server):
    """The ports count as closed when the last one has closed."""
    server.start()
    for endpoint in server.listen.values():
        endpoint.port.stopped = Deferred()
    server.service.drain()
    server.listen["tcp:8085"].port.stopped.callback(None)
    assert not server.drain.ports.called
    server.listen["tcp:9085"].port.stopped.callback(None)
    assert server.drain.ports.called


def test_drain_skips_ports_that_are_not_open_yet(server):
    """A drain closes the open ports, and does not wait for one that is still opening."""
    server.listen["tcp:8085"].result = Deferred()
    server.start()
    server.service.drain()
    assert server.journal == [DRAINING, "drain", "stop tcp:9085"]
    assert server.drain.ports.called


@pytest.mark.parametrize("fault", [ZeroDivisionError("sync"), fail(ZeroDivisionError("async"))])
def test_port_that_cannot_be_closed(server, events, fault):
    """A port that cannot be closed does not keep the others from closing."""
    server.start()

    def stuck():
        if isinstance(fault, Deferred):
            return fault
        raise fault

    server.listen["tcp:8085"].port.stopListening = stuck
    assert server.stop().called
    assert server.journal == [STOPPING, DRAINING, "drain", "stop tcp:9085", "store.close", "stop tcp:8086"]
    server.drain.ports = None
    gc.collect()


def test_second_drain_joins_the_first(server, events):
    """All requests for a drain wait for the same drain, which is logged once."""
    server.start()
    server.drain.gone = Deferred()
    drains = [server.service.drain() for _ in range(3)]
    assert server.journal == [DRAINING, "drain", *PORTS]
    assert not any(drained.called for drained in drains)
    server.drain.gone.callback(None)
    assert all(drained.called for drained in drains)
    assert server.service.drain().called
    assert server.journal == [DRAINING, "drain", *PORTS]
    texts = [event["log_format"] for event in events]
    assert (texts.count("draining"), texts.count("drained")) == (1, 1)


def test_stop_in_a_drain_waits_for_it(server):
    """A stop during a drain waits for that drain, and then closes the store and the admin port."""
    server.start()
    server.drain.gone = Deferred()
    drained = server.service.drain()
    stopped = server.stop()
    assert server.journal == [DRAINING, "drain", *PORTS, STOPPING]
    server.drain.gone.callback(None)
    assert drained.called
    assert stopped.called
    assert server.journal[-2:] == ["store.close", "stop tcp:8086"]


def test_stop_after_a_drain_is_immediate(server):
    """A stop after a drain does not drain again."""
    server.start()
    server.service.drain()
    server.journal.clear()
    assert server.stop().called
    assert server.journal == [STOPPING, "store.close", "stop tcp:8086"]


def test_drain_in_a_stop_joins_it(server):
    """A drain that is requested during a stop is the drain of that stop."""
    server.start()
    server.drain.gone = Deferred()
    server.stop()
    drained = server.service.drain()
    assert server.journal.count("drain") == 1
    server.drain.gone.callback(None)
    assert drained.called


def test_failing_drain_does_not_block_the_stop(server, events):
    """A drain that fails is logged, and the stop continues."""
    server.start()
    server.drain.gone = fail(ZeroDivisionError())
    drained, stopped = server.service.drain(), server.stop()
    gc.collect()
    assert drained.called
    assert stopped.called
    assert server.journal[-2:] == ["store.close", "stop tcp:8086"]
    (failed,) = [event for event in events if event["log_level"] > LogLevel.info]
    assert failed["log_format"] == "the drain failed"
    assert failed["log_failure"].type is ZeroDivisionError


@pytest.mark.parametrize("text", ["tcp:9085", "tcp:8086"])
def test_port_that_opens_in_a_drain(server, text):
    """A port that opens during a drain does not make the server ready."""
    late = (server.listen | server.admin)[text]
    late.result = Deferred()
    server.start()
    server.drain.run = lambda close_ports, **_: Deferred()  # closes no port
    server.service.drain()
    late.result.callback(late.port)
    assert server.readiness() == (False, "draining")
    assert READY not in server.journal


@pytest.mark.parametrize("text", ["tcp:9085", "tcp:8086"])
def test_port_that_opens_after_the_others_are_closed(server, text):
    """A port that opens after the drain has closed the others is closed at the stop."""
    late = (server.listen | server.admin)[text]
    late.result = Deferred()
    server.start()
    server.service.drain()
    late.result.callback(late.port)
    server.stop()
    assert f"stop {text}" in server.journal


# Signals


def test_first_sigterm_keeps_the_pace(server):
    """The first SIGTERM starts a paced drain."""
    server.start()
    server.service.signalled(signal.SIGTERM)
    assert server.journal == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_skips_the_pace(server, second):
    server.start()
    server.drain.gone = Deferred()
    server.service.signalled(signal.SIGTERM)
    server.stop()
    server.journal.clear()
    server.service.signalled(second)
    assert server.journal == ["skip pace"]


def test_keyboard_interrupt_skips_the_pace(server):
    """SIGINT makes the drain immediate, even as the first signal."""
    server.start()
    server.service.signalled(signal.SIGINT)
    server.stop()
    assert server.journal[0] == "skip pace"


def test_sigterm_in_a_requested_drain_keeps_the_pace(server):
    """SIGTERM during a drain that the admin port requested counts as the first signal."""
    server.start()
    server.drain.gone = Deferred()
    server.service.drain()
    server.service.signalled(signal.SIGTERM)
    server.stop()
    assert "skip pace" not in server.journal
    server.service.signalled(signal.SIGTERM)
    assert server.journal[-1] == "skip pace"


# Stopping


def test_order_of_the_stop(server):
    """A stop drains, then closes the store, and closes the admin port last."""
    server.start()
    server.drain.gone, server.store.closing, server.admin["tcp:8086"].port.stopped = Deferred(), Deferred(), Deferred()
    stopped = server.stop()
    assert server.journal == [STOPPING, DRAINING, "drain", *PORTS]
    server.drain.gone.callback(None)
    assert server.journal == [STOPPING, DRAINING, "drain", *PORTS, "store.close"]
    server.store.closing.callback(None)
    assert server.journal == [STOPPING, DRAINING, "drain", *PORTS, "store.close", "stop tcp:8086"]
    assert not stopped.called
    server.admin["tcp:8086"].port.stopped.callback(None)
    assert stopped.called
    assert not server.service.running


@pytest.mark.parametrize("late", [False, True])
def test_webhooks_need_the_store(late):
    """They begin when it is open and end before it closes, in the time that the drain has left."""
    server = Server(webhooks=True)
    if late:
        server.store.opened = Deferred()
        server.service.startService()
        assert "deliver" not in server.journal
        server.store.opened.callback(None)
    else:
        server.service.startService()
    assert server.journal.count("deliver") == 1
    server.journal.clear()
    server.drain.gone, server.webhooks.ended = Deferred(), Deferred()
    server.stop()
    server.clock.advance(10)
    server.journal.clear()
    server.drain.gone.callback(None)
    assert server.journal == [("deliver no more", 20.0)]
    server.webhooks.ended.callback(None)
    assert server.journal[1] == "store.close"


def test_webhooks_after_a_long_drain():
    server = Server(webhooks=True)
    server.start()
    server.drain.gone = Deferred()
    server.stop()
    server.clock.advance(40)
    server.drain.gone.callback(None)
    assert ("deliver no more", 0.0) in server.journal


def test_no_calls_are_left_after_the_stop(server):
    server.start()
    assert server.stop().called
    assert server.clock.getDelayedCalls() == []


def test_log_of_a_stop(server, events):
    """Each step of a stop is logged."""
    server.start()
    events.clear()
    server.service.signalled(signal.SIGINT)
    server.stop()
    assert [event["log_format"] for event in events] == [
        "skipping the paced drain",
        "stopping",
        "draining",
        "drained",
        "stopped",
    ]


def test_deadlines_are_checked_in_a_drain(server):
    server.start()
    server.drain.gone = Deferred()
    server.stop()
    server.clock.pump([LOOK_SECONDS] * 3)
    assert server.journal.count("look") == 3


def test_failing_loop_is_logged_and_continues(server, events):
    """A check of the deadlines that fails is logged, and the next one follows."""
    server.start()
    events.clear()
    server.connections.fault = ZeroDivisionError()
    server.clock.advance(LOOK_SECONDS)
    gc.collect()
    assert {event["log_level"] for event in events} == {LogLevel.critical}
    server.connections.fault = None
    looks = server.journal.count("look")
    server.clock.advance(LOOK_SECONDS)
    assert server.journal.count("look") == looks + 1
    assert server.stop().called
    assert "store.close" in server.journal


# In an application


def test_application_gets_the_log_observer():
    """The service sets the log observer of the application that it joins."""
    server = Server(observer=object())
    application = Application("chatd")
    server.service.setServiceParent(application)
    assert application.getComponent(ILogObserver) is server.observer
    assert IServiceCollection(application).getServiceNamed("chatd") is server.service


def test_log_observer_of_twistd():
    """An application keeps the observer that `twistd --logger` names."""
    server = Server(observer=None)
    application = Application("chatd")
    server.service.setServiceParent(application)
    assert application.getComponent(ILogObserver, None) is None


def test_parent_without_an_application(server):
    """The service also runs under a parent that is not an application."""
    parent = MultiService()
    server.service.setServiceParent(parent)
    assert [*parent] == [server.service]
