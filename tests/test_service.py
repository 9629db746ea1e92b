"""What is started before what, and what must have ended before what ends."""

import gc
import math

import pytest
from twisted.application.service import Application, IServiceCollection, MultiService
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogLevel
from zope.interface import implementer

from chatd.frames import Entry
from chatd.service import LOOK_SECONDS, TRIM_SECONDS, ChatService, Readiness
from chatd.store.base import StoreError

SEED = (Entry(1, "ann", "hi", "2024-10-20T12:30:00Z"),)
DRAIN = 30


class Store:
    """A store that notes what is asked of it, and ends when it is told to."""

    epoch = "k7Q2"

    def __init__(self, journal):
        self.journal = journal
        self.fault = None
        self.trimmed = succeed(None)
        self.settling = succeed(None)
        self.closing = succeed(None)

    def open(self, seed):
        self.journal.append(("open", seed))
        if self.fault:
            raise self.fault

    def trim(self):
        self.journal.append("trim")
        return self.trimmed

    def settled(self):
        self.journal.append("settled")
        return self.settling

    def close(self):
        self.journal.append("store.close")
        return self.closing


class Rooms:
    """Rooms that need so many turns of the reactor to serve everyone."""

    turns = 0

    @property
    def busy(self):
        self.turns -= 1
        return self.turns >= 0


class Clients:
    """Clients who are there until `gone` fires."""

    def __init__(self, journal):
        self.journal = journal
        self.gone = succeed(None)
        self.fault = None

    def look(self):
        self.journal.append("look")
        if self.fault:
            raise self.fault

    def close(self, code, reason):
        self.journal.append(("close", code, reason))

    def empty(self):
        return self.gone

    def abort(self):
        self.journal.append("abort")
        if not self.gone.called:
            self.gone.callback(None)


class Port:
    """An open port."""

    def __init__(self, journal, text):
        self.journal = journal
        self.text = text
        self.stopped = None

    def stopListening(self):
        self.journal.append(f"stop {self.text}")
        return self.stopped


@implementer(IStreamServerEndpoint)
class Endpoint:
    """An endpoint that opens its port at once, unless something else is put into `result`."""

    def __init__(self, journal, text):
        self.journal = journal
        self.text = text
        self.port = Port(journal, text)
        self.result = succeed(self.port)

    def listen(self, factory):
        self.journal.append(("listen", self.text, factory))
        return self.result


class Server:
    """A ChatService of doubles, which write what is asked of them into one journal."""

    def __init__(self):
        self.journal = []
        self.clock = Clock()
        self.store = Store(self.journal)
        self.rooms = Rooms()
        self.clients = Clients(self.journal)
        self.factory = object()
        self.admin_factory = object()
        self.listen = {text: Endpoint(self.journal, text) for text in ("tcp:8085", "tcp:9085")}
        self.admin = {"tcp:8086": Endpoint(self.journal, "tcp:8086")}
        self.readiness = Readiness()
        self.observer = object()
        self.service = ChatService(
            store=self.store,
            seed=SEED,
            rooms=self.rooms,
            clients=self.clients,
            factory=self.factory,
            admin_factory=self.admin_factory,
            listen=self.listen,
            admin=self.admin,
            readiness=self.readiness,
            drain=DRAIN,
            clock=self.clock,
            observer=self.observer,
        )

    def start(self):
        self.service.startService()
        self.journal.clear()

    def stop(self):
        """Begin to stop; what is answered has fired when all is closed."""
        return maybeDeferred(self.service.stopService)


@pytest.fixture
def server():
    return Server()


def in_use():
    return CannotListenError("", 8085, OSError(98, "Address already in use"))


# Starting


def test_the_store_is_opened_with_the_seed_before_any_port(server):
    server.service.startService()
    assert server.journal == [
        ("open", SEED),
        ("listen", "tcp:8085", server.factory),
        ("listen", "tcp:9085", server.factory),
        ("listen", "tcp:8086", server.admin_factory),
    ]
    assert server.service.running


def test_it_is_ready_when_all_ports_are_open(server):
    server.listen["tcp:9085"].result = Deferred()
    assert server.readiness() == "starting"
    server.service.startService()
    assert server.readiness() == "starting"
    server.listen["tcp:9085"].result.callback(server.listen["tcp:9085"].port)
    assert server.readiness() is None


def test_it_says_where_it_listens_and_on_which_log(server, events):
    server.service.startService()
    texts = [event["log_format"].format(**event) for event in events]
    assert texts == [
        "listening on tcp:8085",
        "listening on tcp:9085",
        "listening on tcp:8086",
        "ready, with the log k7Q2",
    ]


def test_a_store_that_cannot_be_opened_ends_the_process_with_its_line_and_opens_no_port(server):
    server.store.fault = StoreError("chatd.sqlite is in use by another chatd: stop that one")
    with pytest.raises(SystemExit) as refusal:
        server.service.startService()
    assert refusal.value.code == "chatd: chatd.sqlite is in use by another chatd: stop that one"
    assert server.journal == [("open", SEED)]
    assert not server.service.running
    assert server.readiness() == "starting"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (in_use(), "[Errno 98] Address already in use"),
        (OverflowError("port must be 0-65535."), "port must be 0-65535."),
    ],
)
def test_a_port_that_cannot_be_opened_ends_the_process_with_a_line_and_the_store_closed(server, events, fault, reason):
    server.listen["tcp:8085"].result = fail(fault)
    with pytest.raises(SystemExit) as refusal:
        server.service.startService()
    assert refusal.value.code == (
        f"chatd: cannot listen on tcp:8085 ({reason}): choose another with --listen or --admin"
    )
    assert server.journal[-1] == "store.close"
    assert not server.service.running
    assert server.readiness() == "starting"
    assert server.clock.getDelayedCalls() == []
    assert [event for event in events if event["log_level"] > LogLevel.info] == []


def test_of_several_ports_that_cannot_be_opened_the_first_is_named(server):
    server.listen["tcp:9085"].result = fail(in_use())
    server.admin["tcp:8086"].result = fail(in_use())
    with pytest.raises(SystemExit, match="chatd: cannot listen on tcp:9085 "):
        server.service.startService()
    assert server.journal.count("store.close") == 1


def test_a_port_that_fails_later_leaves_it_unready_and_is_logged_as_an_error(server, events):
    server.admin["tcp:8086"].result = Deferred()
    server.service.startService()
    events.clear()
    server.admin["tcp:8086"].result.errback(in_use())
    assert server.readiness() == "starting"
    assert [(event["log_level"], event["fault"]) for event in events] == [
        (
            LogLevel.error,
            "cannot listen on tcp:8086 ([Errno 98] Address already in use): choose another with --listen or --admin",
        )
    ]
    assert "store.close" not in server.journal
    server.stop()
    assert server.journal[-1] == "store.close"


# Running


def test_deadlines_are_looked_at_each_second(server):
    server.start()
    server.clock.advance(LOOK_SECONDS - 0.1)
    assert server.journal == []
    server.clock.pump([0.1, LOOK_SECONDS, LOOK_SECONDS])
    assert server.journal == ["look"] * 3


def test_rooms_are_trimmed_every_ten_minutes(server):
    server.start()
    server.clock.advance(TRIM_SECONDS - 0.1)
    assert "trim" not in server.journal
    server.clock.pump([0.1, TRIM_SECONDS])
    assert server.journal.count("trim") == 2


def test_a_trim_is_not_begun_before_the_last_has_ended(server):
    server.start()
    server.store.trimmed = Deferred()
    server.clock.pump([TRIM_SECONDS, TRIM_SECONDS])
    assert server.journal.count("trim") == 1
    server.store.trimmed.callback(None)
    server.clock.advance(TRIM_SECONDS)
    assert server.journal.count("trim") == 2


# Stopping


def test_it_stops_the_ports_then_settles_delivers_closes_the_clients_and_last_the_store(server):
    server.start()
    port = server.admin["tcp:8086"].port
    port.stopped, server.store.settling, server.store.closing = Deferred(), Deferred(), Deferred()
    server.clients.gone = Deferred()
    server.rooms.turns = 1
    stopped = server.stop()
    ports = ["stop tcp:8085", "stop tcp:9085", "stop tcp:8086"]
    assert server.journal == ports

    port.stopped.callback(None)
    assert server.journal == [*ports, "settled"]

    server.store.settling.callback(None)
    assert server.journal == [*ports, "settled"]

    server.clock.advance(0)
    restart = ("close", 1012, "restarting")
    assert server.journal == [*ports, "settled", restart]

    server.clients.gone.callback(None)
    assert server.journal == [*ports, "settled", restart, "store.close"]
    assert not stopped.called

    server.store.closing.callback(None)
    assert stopped.called
    assert not server.service.running


def test_without_clients_it_stops_at_once_and_leaves_nothing_on_the_clock(server):
    server.start()
    stopped = server.stop()
    assert stopped.called
    assert server.journal[-1] == "store.close"
    assert server.clock.getDelayedCalls() == []


def test_it_is_unready_from_the_first_moment_of_stopping(server):
    server.start()
    server.listen["tcp:8085"].port.stopped = Deferred()
    server.stop()
    assert server.readiness() == "stopping"


def test_when_the_drain_is_over_the_clients_that_are_left_are_aborted_and_the_store_is_closed(server):
    server.start()
    server.clients.gone = Deferred()
    stopped = server.stop()
    server.clock.advance(DRAIN - 0.1)
    assert "abort" not in server.journal
    server.clock.advance(0.1)
    assert server.journal[-2:] == ["abort", "store.close"]
    assert stopped.called
    assert server.clock.getDelayedCalls() == []


def test_clients_that_cannot_be_served_are_not_waited_for_longer_than_the_drain(server):
    server.start()
    server.rooms.turns = math.inf
    stopped = server.stop()
    server.clock.advance(DRAIN)
    assert server.journal[-3:] == ["abort", ("close", 1012, "restarting"), "store.close"]
    assert stopped.called


def test_a_store_that_never_settles_does_not_keep_the_clients_longer_than_the_drain(server):
    server.start()
    server.store.settling = Deferred()
    server.clients.gone = Deferred()
    stopped = server.stop()
    server.clock.advance(DRAIN)
    assert server.journal[-1] == "abort"
    server.store.settling.callback(None)
    assert stopped.called


def test_deadlines_are_looked_at_while_it_drains(server):
    server.start()
    server.clients.gone = Deferred()
    server.stop()
    server.clock.pump([LOOK_SECONDS] * 3)
    assert server.journal.count("look") == 3


def test_a_look_that_failed_is_logged_and_the_next_one_follows(server, events):
    server.start()
    events.clear()
    server.clients.fault = ZeroDivisionError()
    server.clock.advance(LOOK_SECONDS)
    gc.collect()
    assert {event["log_level"] for event in events} == {LogLevel.critical}
    server.clients.fault = None
    looks = server.journal.count("look")
    server.clock.advance(LOOK_SECONDS)
    assert server.journal.count("look") == looks + 1
    assert server.stop().called
    assert server.journal[-1] == "store.close"


# In an application


def test_it_brings_its_log_observer_to_the_application(server):
    application = Application("chatd")
    server.service.setServiceParent(application)
    assert application.getComponent(ILogObserver) is server.observer
    assert IServiceCollection(application).getServiceNamed("chatd") is server.service


def test_it_runs_under_any_service_too(server):
    parent = MultiService()
    server.service.setServiceParent(parent)
    assert [*parent] == [server.service]
