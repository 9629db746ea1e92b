"""The options, their errors, and the composition of the server; and the plug-in that makes it a command of twistd."""

import gc
import json
import os
import pathlib
import signal
import sys
import threading

import pytest
import txaio
from support.helpers import masked, read_frames
from support.servers import Raw, Server
from twisted.application.service import Application, IServiceMaker
from twisted.internet.testing import MemoryReactorClock, StringTransportWithDisconnection
from twisted.logger import ILogObserver, LogLevel
from twisted.plugin import IPlugin
from twisted.scripts.twistd import ServerOptions

import chatd
from chatd import tap
from chatd.operate import check
from chatd.operate import logging as logs
from chatd.operate.machine import ThisMachine
from chatd.service import TRIM_SECONDS
from chatd.store.base import DAY, Retention
from chatd.store.memory import MemoryStore
from chatd.store.redis.store import RedisStore
from chatd.store.sqlite import SqliteStore
from twisted.plugins import chatd_plugin

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
LISTEN = "tcp:8085:backlog=4096"
ADMIN = "tcp:8086:interface=127.0.0.1"
NAMES = [
    *("admin", "drain", "history", "listen", "log-format", "max-per-address", "origin", "ping", "proxy-hops", "rate"),
    *("retain", "rooms", "seed", "store"),
]
# What the fixtures below replace.
REACTOR, ENVIRON = tap._reactor, tap.Options.environ


@pytest.fixture(autouse=True)
def _process(monkeypatch):
    """Put back what a server sets for its process: the clock of Autobahn's timers, and when to look for garbage."""
    monkeypatch.setattr(txaio.config, "loop", txaio.config.loop)
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """The environment, in which nothing is set."""
    empty = {}
    monkeypatch.setattr(tap.Options, "environ", empty)
    return empty


@pytest.fixture(autouse=True)
def reactor(monkeypatch):
    """A reactor in memory."""
    memory = MemoryReactorClock()
    monkeypatch.setattr(tap, "_reactor", lambda: memory)
    return memory


def parse(*arguments):
    """The options of a server in the foreground."""
    options = tap.Options()
    options.parent = {"nodaemon": 1}
    options.parseOptions(arguments)
    return options


def refusal(*arguments):
    """The line that a command line is refused with; since it is a text, the exit status is 1."""
    with pytest.raises(SystemExit) as refused:
        parse(*arguments)
    line = refused.value.code
    assert line.startswith("chatd: ")
    assert "\n" not in line
    return line


# The options


def test_the_defaults():
    options = parse()
    assert {name: value for name, value in options.items() if name not in ("store", "seed", "listen", "admin")} == {
        "history": 100,
        "retain": Retention(),
        "rate": (20, 40),
        "max-per-address": 0,
        "proxy-hops": 0,
        "rooms": {},
        "origin": {},
        "ping": 25,
        "drain": 30,
        "log-format": logs.text_line,
    }
    assert sorted(options) == NAMES
    assert [*options["listen"]] == [LISTEN]
    assert [*options["admin"]] == [ADMIN]


def test_by_default_messages_are_kept_in_a_file_of_the_working_directory_which_twistd_may_change_yet():
    store = parse()["store"](Retention())
    assert isinstance(store, SqliteStore)
    assert store._path == pathlib.Path("chatd.sqlite")


def test_by_default_a_log_begins_with_two_messages():
    assert [entry.number for entry in parse()["seed"]] == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("history", "1", 1),
        ("history", "10000", 10_000),
        ("retain", "5000", Retention(messages=5000)),
        ("retain", "30d", Retention(seconds=30 * DAY)),
        ("retain", "all", Retention()),
        ("rate", "5", (5, 10)),
        ("rate", "5:7", (5, 7)),
        ("rate", "0", (0, 0)),
        ("rate", "1000000:1000000", (1_000_000, 1_000_000)),
        ("max-per-address", "3", 3),
        ("proxy-hops", "0", 0),
        ("proxy-hops", "2", 2),
        ("proxy-hops", "100", 100),
        ("ping", "1", 1),
        ("ping", "3600", 3600),
        ("drain", "0", 0),
        ("drain", "3600", 3600),
        ("log-format", "text", logs.text_line),
        ("log-format", "json", logs.json_line),
    ],
)
def test_an_option_is_read_from_the_command_line_and_from_the_environment(environ, name, text, value):
    assert parse(f"--{name}={text}")[name] == value
    environ["CHATD_" + name.upper().replace("-", "_")] = text
    assert parse()[name] == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        *(("history", text, "is not a whole number from 1 to 10000") for text in ("0", "10001", "-1", "1.5", "", "x")),
        ("history", "\N{ARABIC-INDIC DIGIT THREE}", "is not a whole number from 1 to 10000"),
        ("history", "\N{SUPERSCRIPT TWO}", "is not a whole number from 1 to 10000"),
        *(
            ("retain", text, "is neither a number of messages (5000) nor of days (30d) nor all")
            for text in ("0", "30h", "ALL", "-5", "")
        ),
        *(("rate", text, "is not a whole number from 0 to 1000000") for text in ("x", "1000001", "")),
        ("max-per-address", "-1", "is not a whole number from 0 to 1000000"),
        *(("proxy-hops", text, "is not a whole number from 0 to 100") for text in ("-1", "101", "1.5", "x", "")),
        *(("ping", text, "is not a whole number from 1 to 3600") for text in ("0", "3601", "2.5", "x")),
        ("drain", "3601", "is not a whole number from 0 to 3600"),
        *(("log-format", text, "is neither text nor json") for text in ("xml", "JSON", "")),
        *(
            ("store", text, "is neither memory: nor sqlite:PATH nor redis://HOST:PORT/DATABASE")
            for text in ("memory", "memory:x", "sqlite", "sqlite:", "chatd.sqlite", "redit://localhost/0", "")
        ),
    ],
)
def test_a_wrong_value_is_refused_with_the_options_name_and_what_is_allowed(name, text, allowed):
    assert refusal(f"--{name}={text}") == f"chatd: --{name}: {text!r} {allowed}"


@pytest.mark.parametrize("text", ["20:", ":40", "20:x", "20:40:60"])
def test_a_rate_has_at_most_one_burst(text):
    assert refusal("--rate", text).startswith("chatd: --rate: ")


def test_a_wrong_value_in_the_environment_is_refused_alike(environ):
    environ["CHATD_DRAIN"] = "soon"
    assert refusal() == "chatd: --drain: 'soon' is not a whole number from 0 to 3600"


def test_the_command_line_wins_over_the_environment(environ):
    environ |= {"CHATD_HISTORY": "7", "CHATD_LISTEN": "tcp:1", "CHATD_ADMIN": "tcp:2"}
    options = parse("--history=8", "--listen=tcp:3", "--admin=tcp:4")
    assert (options["history"], [*options["listen"]], [*options["admin"]]) == (8, ["tcp:3"], ["tcp:4"])


def test_what_is_empty_in_the_environment_is_not_said(environ):
    environ |= {"CHATD_HISTORY": "", "CHATD_STORE": ""}
    assert parse()["history"] == 100


# Endpoints


def test_listen_and_admin_may_be_repeated():
    options = parse("--listen=tcp:1", "--admin=tcp:3", "--listen", "tcp:2:interface=127.0.0.1", "--admin=tcp:4")
    assert [*options["listen"]] == ["tcp:1", "tcp:2:interface=127.0.0.1"]
    assert [*options["admin"]] == ["tcp:3", "tcp:4"]


def test_the_environment_separates_endpoints_by_white_space(environ):
    environ["CHATD_LISTEN"] = " tcp:1  tcp:2\n"
    environ["CHATD_ADMIN"] = "tcp:3 tcp:4"
    options = parse()
    assert [*options["listen"]] == ["tcp:1", "tcp:2"]
    assert [*options["admin"]] == ["tcp:3", "tcp:4"]


def test_an_empty_admin_is_none(environ):
    assert parse("--admin=")["admin"] == {}
    environ["CHATD_ADMIN"] = ""
    assert parse()["admin"] == {}


def test_it_must_listen_somewhere(environ):
    line = "chatd: --listen: give at least one server endpoint such as tcp:8085"
    assert refusal("--listen=") == line
    environ["CHATD_LISTEN"] = ""
    assert refusal() == line


@pytest.mark.parametrize("name", ["listen", "admin"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense:1", "Unknown endpoint type: 'nonsense'"),
        ("tcp:chat", "invalid literal for int() with base 10: 'chat'"),
        ("tcp", "_parseTCP() missing 1 required positional argument: 'port'"),
        ("ssl:1:privateKey=missing.pem", "[Errno 2] No such file or directory: "),
    ],
)
def test_what_is_no_endpoint_is_refused_with_the_reason(tmp_path, monkeypatch, name, text, reason):
    monkeypatch.chdir(tmp_path)
    line = refusal(f"--{name}={text}")
    assert line.startswith(f"chatd: --{name}: {text!r} is no server endpoint such as tcp:8085 ({reason}")


def test_the_reason_of_an_endpoint_is_put_on_one_line(monkeypatch):
    def refuse(reactor, text):
        raise RuntimeError("in two\n lines")

    monkeypatch.setattr(tap, "serverFromString", refuse)
    assert refusal("--listen=tcp:1").endswith(" (in two lines)")


# Rooms and origins


GOOD = {"rooms": ("main", "team-*", "team-?"), "origin": ("https://chat.example", "*.Example.ORG", "null")}


@pytest.mark.parametrize("name", GOOD)
def test_rooms_and_origins_may_be_repeated(environ, name):
    assert [*parse(*(f"--{name}={text}" for text in GOOD[name]))[name]] == [*GOOD[name]]
    environ[f"CHATD_{name.upper()}"] = "  ".join(GOOD[name]) + "\n"
    assert [*parse()[name]] == [*GOOD[name]]
    assert [*parse(f"--{name}={GOOD[name][0]}")[name]] == [GOOD[name][0]]


@pytest.mark.parametrize("name", GOOD)
def test_empty_rooms_and_origins_are_any(environ, name):
    assert parse(f"--{name}=")[name] == {}
    environ[f"CHATD_{name.upper()}"] = ""
    assert parse()[name] == {}


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        *(
            ("rooms", text, "is no pattern of room names such as team-*")
            for text in ("Main", "/rooms/main", "[ab]", "a,b", "\N{CYRILLIC SMALL LETTER A}")
        ),
        *(
            ("origin", text, "is no origin such as https://chat.example or *.example")
            for text in ("chat.example", "*", "https://chat.example/", "wss://chat.example", "https://a.*.example")
        ),
    ],
)
def test_what_is_no_room_or_origin_is_refused_from_the_command_line_and_from_the_environment(
    environ, name, text, fault
):
    line = f"chatd: --{name}: {text!r} {fault}"
    assert refusal(f"--{name}={GOOD[name][0]}", f"--{name}={text}") == line
    environ[f"CHATD_{name.upper()}"] = f"{GOOD[name][0]} {text}"
    assert refusal() == line


# The store and the seed


def test_memory_forgets():
    assert isinstance(parse("--store=memory:")["store"](Retention()), MemoryStore)


def test_sqlite_is_given_a_path(tmp_path):
    store = parse(f"--store=sqlite:{tmp_path / 'a:b.sqlite'}")["store"](Retention())
    assert isinstance(store, SqliteStore)
    assert store._path == tmp_path / "a:b.sqlite"


def link(*arguments):
    """The way to the Redis of a server: its address, and the file with the password."""
    store = parse(*arguments)["store"](Retention())
    assert isinstance(store, RedisStore)
    return store._link.address, store._link._password_file


def test_redis_is_given_an_address_and_a_password_in_it_or_in_a_file_that_the_environment_names(environ):
    assert link("--store=redis://localhost") == (("localhost", 6379, 0, None, None, False), None)
    url = "rediss://ann%2F:s%40crt@redis.example:7000/3"
    assert link(f"--store={url}") == (("redis.example", 7000, 3, "ann/", "s@crt", True), None)
    environ |= {"CHATD_STORE": "redis://h", "CHATD_STORE_PASSWORD_FILE": "/run/password"}
    file = pathlib.Path("/run/password")
    assert link() == (("h", 6379, 0, None, None, False), file)
    assert link("--store=redis://an%2Fn@h:1/2") == (("h", 1, 2, "an/n", None, False), file)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@h:x", "redis://:***@h:x"),
        ("redis://ann:s3cret@h/x", "redis://ann:***@h/x"),
        ("rediss://:s3cret/@h", "rediss://:***@h"),
        ("redis://s3cret@h", "redis://***@h"),
        ("postgres://ann:s3cret@h", "postgres://ann:***@h"),
    ],
)
def test_a_store_that_is_refused_is_shown_without_its_password(url, shown):
    assert refusal(f"--store={url}").startswith(f"chatd: --store: {shown!r} ")


def test_a_store_is_not_opened_before_the_service_is_started(tmp_path):
    tap.makeService(parse(f"--store=sqlite:{tmp_path / 'chatd.sqlite'}"))
    assert [*tmp_path.iterdir()] == []


def test_sqlite_writes_in_one_thread_and_reads_in_another(tmp_path):
    store = parse(f"--store=sqlite:{tmp_path / 'chatd.sqlite'}")["store"](Retention())
    before = {*threading.enumerate()}
    store.open(())
    names = {thread.name for thread in {*threading.enumerate()} - before}
    store.close()
    assert names == {"PoolThread-chatd-write-0", "PoolThread-chatd-read-0"}


def test_the_seed_is_read_from_a_file(tmp_path):
    path = tmp_path / "seed.json"
    path.write_text('[{"username":"ann","message":"hi","timestamp":"2024-10-20T12:30:00Z"}]')
    assert parse(f"--seed={path}")["seed"] == ((1, "ann", "hi", "2024-10-20T12:30:00Z"),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "is not JSON: "),
        ("{}", "must be a list of messages"),
        ('[{"username":"ann"}]', 'message 1: "message" is required'),
        ('[{"username":"ann","message":"hi"}]', 'message 1: "timestamp" must be a time such as 2024-10-20T12:30:00Z'),
    ],
)
def test_a_seed_that_is_none_is_refused_with_its_path_and_the_fault(tmp_path, text, fault):
    path = tmp_path / "seed.json"
    path.write_text(text)
    assert refusal(f"--seed={path}").startswith(f"chatd: --seed: {path} {fault}")


def test_a_seed_that_cannot_be_read_is_refused_with_the_reason(tmp_path):
    missing = tmp_path / "missing.json"
    assert refusal(f"--seed={missing}") == f"chatd: --seed: {missing} cannot be read (No such file or directory)"
    assert refusal(f"--seed={tmp_path}") == f"chatd: --seed: {tmp_path} cannot be read (Is a directory)"


# The command line as a whole


def test_an_unknown_option_is_refused_with_where_help_is():
    assert refusal("--colour=red") == (
        "chatd: option --colour not recognized: `twistd chatd --help` explains every option"
    )


def test_an_option_without_its_value_is_refused():
    assert refusal("--store").startswith("chatd: option --store requires argument: ")


def test_an_argument_is_refused():
    assert refusal("8085").startswith("chatd: Wrong number of arguments")


def test_version_is_printed_and_nothing_is_started(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"chatd {chatd.__version__}\n"


@pytest.fixture
def checked(monkeypatch):
    """What is to be found by a check, and then what was checked: the settings, and the machine."""
    found, asked = [], []
    monkeypatch.setattr(check, "findings", lambda *asking: asked.append(asking) or found)
    return found, asked


@pytest.mark.parametrize(
    ("found", "status", "out"), [(["one", "two"], 1, "one\ntwo\n"), ([], 0, "nothing to worry about\n")]
)
def test_a_check_says_what_would_bite_and_ends(capsys, checked, found, status, out):
    checked[0][:] = found
    with pytest.raises(SystemExit) as end:
        parse("--check")
    assert (end.value.code, capsys.readouterr().out) == (status, out)


def test_of_what_is_checked_nothing_is_left_out(environ, checked):
    environ |= {"CHATD_LISTEN": "tcp:1 tcp:2", "CHATD_STORE_PASSWORD_FILE": "password"}
    options = tap.Options()
    options.parent = {"nodaemon": 1, "rundir": "/srv"}
    with pytest.raises(SystemExit):
        options.parseOptions([
            *("--store=sqlite:a", "--admin=", "--history=7", "--retain=1d", "--rooms=a", "--rooms=b*", "--check"),
            *("--origin=*.example", "--rate=3", "--ping=5", "--drain=9", "--proxy-hops=2"),
        ])  # fmt: skip
    ((settings, machine),) = checked[1]
    assert settings._asdict() == {
        "listen": ("tcp:1", "tcp:2"),
        "admin": (),
        "store": "sqlite:a",
        "history": 7,
        "retain": Retention(seconds=DAY),
        "rooms": ("a", "b*"),
        "origin": ("*.example",),
        "rate": (3, 6),
        "ping": 5,
        "drain": 9,
        "proxy_hops": 2,
        "folder": pathlib.Path("/srv"),
        "password_file": pathlib.Path("password"),
    }
    assert isinstance(machine, ThisMachine)


def test_without_twistd_it_is_the_working_directory_that_is_checked(checked):
    options = tap.Options()
    with pytest.raises(SystemExit):
        options.parseOptions(["--check"])
    assert checked[1][0][0].folder == pathlib.Path()


def test_options_that_are_not_understood_are_refused_before_the_check(checked):
    assert refusal("--check", "--ping=0").startswith("chatd: --ping: ")
    assert checked[1] == []


def test_help_names_each_option_with_its_default():
    # The text is broken into lines, so white space says nothing.
    text = " ".join(str(tap.Options()).split())
    for name in NAMES:
        assert f"--{name}= " in text
    for default in (LISTEN, ADMIN, "sqlite:chatd.sqlite", "100", "all", "20:40", "0", "25", "30", "text", "any"):
        assert f"[default: {default}]" in text
    assert "CHATD_STORE for --store" in text
    assert "CHATD_STORE_PASSWORD_FILE names a file" in text


def test_the_environment_is_that_of_the_process():
    assert ENVIRON["PATH"] == os.environ["PATH"]


def test_the_reactor_is_the_one_that_twistd_installed():
    from twisted.internet import reactor

    assert REACTOR() is reactor


# The composition


class Wire(StringTransportWithDisconnection):
    def unregisterProducer(self):
        self.producer = None  # as Twisted's own do, also when there is none


class Client:
    """A connection to a port that the server has opened in memory."""

    def __init__(self, factory, data):
        self.transport = Wire()
        self.transport.protocol = factory.buildProtocol(self.transport.getPeer())
        self.transport.protocol.makeConnection(self.transport)
        self.transport.protocol.dataReceived(data)

    @property
    def received(self):
        return self.transport.value()

    def history(self):
        """The frame that follows the handshake."""
        head, _, frame = self.received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        return json.loads(frame[frame.index(b"{") :])


def start(*arguments):
    service = tap.makeService(parse("--store=memory:", *arguments))
    service.startService()
    return service


def test_the_parts_are_composed_into_a_server_that_answers(reactor):
    start()
    (port, connections, backlog, _), (admin_port, admin, _, interface) = reactor.tcpServers
    assert (port, backlog, admin_port, interface) == (8085, 4096, 8086, "127.0.0.1")
    assert b"<h1>A chat room</h1>" in Client(connections, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").received
    assert b"\r\n\r\nchatd admin: " in Client(admin, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").received
    for factory in (connections, admin):
        assert Client(factory, b"GET /readyz HTTP/1.1\r\n\r\n").received.endswith(b"\r\n\r\nready\n")
    assert Client(connections, HANDSHAKE).history()["type"] == "history"


@pytest.mark.parametrize(
    ("argument", "history"),
    [("--drain=1", (2, None)), ("--history=1", (1, True)), ("--retain=1", (1, None)), ("--seed=empty", (0, None))],
)
def test_the_options_reach_the_rooms_and_the_store(reactor, tmp_path, monkeypatch, argument, history):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("[]")
    start(argument)
    frame = Client(reactor.tcpServers[0][1], HANDSHAKE).history()
    assert (len(frame["data"]), frame.get("more")) == history


def handshake(target="/", *headers):
    return HANDSHAKE.replace(b"GET / ", b"GET %b " % target.encode()).replace(
        b"\r\n\r\n", b"".join(b"\r\n" + header for header in headers) + b"\r\n\r\n"
    )


def status(reactor, data):
    """The status with which the first port answers a request."""
    return int(Client(reactor.tcpServers[0][1], data).received.split(b" ", 2)[1])


def test_only_rooms_that_the_operator_named_are_there(reactor):
    start("--rooms=team-*", "--rooms=lobby")
    assert status(reactor, handshake("/rooms/team-1")) == 101
    assert status(reactor, handshake("/rooms/lobby")) == 101
    assert status(reactor, handshake("/")) == 404
    assert status(reactor, b"GET /rooms/team-1/messages HTTP/1.1\r\nHost: x\r\n\r\n") == 200
    assert status(reactor, b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\n\r\n") == 404


def test_only_pages_that_the_operator_named_may_connect(reactor):
    start("--origin=https://chat.example", "--origin=*.Example.ORG")
    for origin, code in (
        (b"https://chat.example", 101),
        (b"https://a.example.org", 101),
        (b"https://xexample.org", 403),
        (b"null", 403),
    ):
        assert status(reactor, handshake("/", b"Origin: " + origin)) == code
    assert status(reactor, handshake()) == 101
    request = b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\nOrigin: %b\r\n\r\n"
    assert status(reactor, request % b"https://chat.example") == 200
    assert status(reactor, request % b"https://evil.example") == 403


def errors(reactor, posts):
    """The codes of the errors that a client gets for so many posts at once."""
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    client.transport.clear()
    client.transport.protocol.dataReceived(masked(b'{"username":"ann","message":"hi"}') * posts)
    return [frame["code"] for frame in read_frames(client.received)]


@pytest.mark.parametrize(("arguments", "most"), [([], 40), (["--rate=1"], 2), (["--rate=5:7"], 7), (["--rate=3:0"], 1)])
def test_each_client_may_send_its_burst_at_once(reactor, arguments, most):
    start(*arguments)
    for _ in range(2):
        assert errors(reactor, most + 3) == ["RATE_LIMITED"] * 3


def test_and_then_as_many_a_second_as_the_rate_is(reactor):
    start("--rate=4:1")
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    post = masked(b'{"username":"ann","message":"hi"}')
    client.transport.protocol.dataReceived(post)
    reactor.advance(0)
    for _ in range(8):
        client.transport.clear()
        reactor.advance(0.25)
        client.transport.protocol.dataReceived(post * 2)
        reactor.advance(0)
        limited, posted = read_frames(client.received)
        assert limited["retry_after"] == pytest.approx(0.25, abs=0.0011)
        assert posted["type"] == "message"


def test_a_rate_of_zero_is_no_limit(reactor):
    start("--rate=0")
    assert errors(reactor, 500) == []


def post(forwarded):
    body = b'{"username":"ann","message":"hi"}'
    return (
        b"POST /rooms/main/messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"X-Forwarded-For: %b\r\nContent-Length: %d\r\n\r\n%b" % (forwarded, len(body), body)
    )


@pytest.mark.parametrize(
    ("hops", "same", "other"),
    [
        (0, (b"203.0.113.1", b"203.0.113.2"), None),
        (1, (b"spoofed, 203.0.113.1", b"203.0.113.1"), b"203.0.113.2"),
        (2, (b"203.0.113.1, 198.51.100.1", b"spoofed, 203.0.113.1, 198.51.100.2"), b"203.0.113.2, 198.51.100.1"),
    ],
)
def test_who_posts_over_http_is_limited_by_the_address_that_trusted_proxies_name(reactor, hops, same, other):
    start("--rate=1:1", f"--proxy-hops={hops}")
    assert [status(reactor, post(forwarded)) for forwarded in same] == [201, 429]
    if other is not None:
        assert status(reactor, post(other)) == 201


def test_garbage_is_looked_for_seldom_and_not_among_what_was_there_before():
    start()
    assert gc.get_threshold()[0] == tap.GARBAGE
    assert gc.get_freeze_count() > 0


def test_messages_older_than_the_days_that_are_retained_are_removed(reactor):
    start("--retain=1d")
    reactor.advance(TRIM_SECONDS)
    assert Client(reactor.tcpServers[0][1], HANDSHAKE).history()["data"] == []


def test_all_endpoints_are_listened_on(reactor):
    start("--listen=tcp:1", "--listen=tcp:2", "--admin=tcp:3")
    assert [port for port, *_ in reactor.tcpServers] == [1, 2, 3]


def test_a_client_is_pinged_as_often_as_the_option_says_and_has_until_the_next_to_answer(reactor):
    start("--ping=3")
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    client.transport.clear()
    reactor.pump([1, 1])
    assert client.received == b""
    reactor.advance(1)
    assert client.received[0] == 0x89  # a ping
    reactor.pump([1, 1])
    assert not client.transport.disconnected
    reactor.advance(1)
    assert client.transport.disconnected


def test_the_drain_takes_as_long_as_its_option_says(reactor):
    service = start("--drain=3")
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    stopped = service.stopService()
    reactor.advance(2.9)
    assert not client.transport.disconnected
    reactor.advance(0.1)
    assert client.transport.disconnected
    assert stopped.called


def test_a_drain_is_asked_for_on_the_admin_port_and_is_that_of_the_stop_too(reactor):
    service = start("--drain=3")
    connections, admin = (factory for _, factory, *_ in reactor.tcpServers)
    client = Client(connections, HANDSHAKE)
    for _ in range(2):
        assert b" 202 Accepted\r\n" in Client(admin, b"POST /drain HTTP/1.1\r\nContent-Length: 0\r\n\r\n").received
    for factory in (connections, admin):
        assert Client(factory, b"GET /readyz HTTP/1.1\r\n\r\n").received.endswith(b"\r\n\r\ndraining\n")
    reactor.advance(1)
    stopped = service.stopService()
    reactor.advance(2)
    assert client.transport.disconnected
    assert stopped.called


def test_a_log_that_fails_is_told_on_both_ports_which_stay_ready(reactor):
    start()._store.fault = "the log is tired"
    for _, factory, *_ in reactor.tcpServers:
        answer = Client(factory, b"GET /readyz HTTP/1.1\r\n\r\n").received
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"\r\n\r\ndegraded: the log is tired\n")


# Signals


class Signals:
    """The signals of a process, of a reactor that handles them, and of a service that is told."""

    def __init__(self, monkeypatch):
        self.handlers = {}
        self.heard = []
        self.later = []
        monkeypatch.setattr(signal, "signal", self.handlers.__setitem__)

    def sigTerm(self, number, frame):
        self.heard.append(("reactor", "TERM", number, frame))

    def sigInt(self, number, frame):
        self.heard.append(("reactor", "INT", number, frame))

    def signalled(self, number):
        self.heard.append(("service", number))

    def callFromThread(self, function, *args):
        self.later.append((function, args))

    def send(self, number):
        """Send a signal to the process; answers who heard of it, in a reactor that turns then."""
        begin = len(self.heard)
        self.handlers[number](number, "frame")
        for function, args in self.later:
            function(*args)
        self.later.clear()
        return self.heard[begin:]


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    signals = Signals(monkeypatch)
    tap._heed_signals(signals, signals)
    return signals


def test_signals_are_heeded_when_the_reactor_runs_which_has_handlers_of_its_own_by_then(reactor, monkeypatch):
    signals = Signals(monkeypatch)
    service = start()
    assert signals.handlers == {}
    assert [hook for hook, _, _ in reactor.whenRunningHooks] == [tap._heed_signals]
    ((_, arguments, _),) = reactor.whenRunningHooks
    assert arguments == (reactor, service)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGHUP, "TERM"), (signal.SIGINT, "INT")]
)
def test_the_first_signal_is_the_reactors_and_the_service_hears_of_it(signals, number, name):
    assert sorted(signals.handlers) == [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
    assert signals.send(number) == [("reactor", name, number, "frame"), ("service", number)]


def test_a_hangup_that_is_ignored_as_under_nohup_stays_so(monkeypatch):
    monkeypatch.setattr(
        signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL
    )
    signals = Signals(monkeypatch)
    tap._heed_signals(signals, signals)
    assert sorted(signals.handlers) == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_comes_after_it_only_the_service_hears_of(signals, first, second):
    signals.send(first)
    assert signals.send(second) == [("service", second)]
    assert signals.send(first) == [("service", first)]


def test_a_hangup_drains_a_real_process_and_ends_it(tmp_path):
    with Server(tmp_path) as server, Raw(server.port) as client:
        client.join()
        server.terminate(signal.SIGHUP)
        assert client.closed() == 1012
        server.stopped(signal.SIGHUP)


# The log


@pytest.fixture
def observer():
    """Makes a server by its options, joins it to an application, and answers the log observer that it brings."""
    made = []

    def make(options):
        application = Application("chatd")
        tap.makeService(options).setServiceParent(application)
        made.append(application.getComponent(ILogObserver))
        return made[-1]

    yield make
    for observer in made:
        if observer._outFile is not sys.stdout:
            observer._outFile.close()


def under_twistd(*arguments):
    """The options of a server as twistd has read them."""
    twistd = ServerOptions()
    twistd.parseOptions([*arguments, "--store=memory:"])
    return twistd.subOptions


EVENT = {"log_time": 0.0, "log_level": LogLevel.info, "log_namespace": "chatd", "log_format": "hello {who}", "who": "x"}
TEXT = "1970-01-01T00:00:00.000Z info chatd: hello x\n"


@pytest.mark.parametrize(("log_format", "line"), [("text", TEXT), ("json", logs.json_line(EVENT))])
def test_the_log_goes_to_twistds_logfile_in_its_format(observer, tmp_path, log_format, line):
    observer(under_twistd("-n", f"--logfile={tmp_path / 'log'}", "chatd", f"--log-format={log_format}"))(EVENT)
    assert (tmp_path / "log").read_text() == line


def test_the_log_goes_to_stdout_in_the_foreground(observer, capsys):
    observer(under_twistd("--nodaemon", "chatd"))(EVENT)
    assert capsys.readouterr().out == TEXT


def test_the_log_of_a_daemon_goes_where_twistd_writes_its_own(observer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    observer(under_twistd("chatd"))(EVENT)
    assert (tmp_path / "twistd.log").read_text() == TEXT


def test_without_twistd_it_logs_as_its_daemon_does(observer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse("--store=memory:")
    options.parent = None
    observer(options)(EVENT)
    assert (tmp_path / "twistd.log").read_text() == TEXT


# The plug-in


def test_the_plugin_makes_chatd_a_command_of_twistd():
    plugin = chatd_plugin.chatd
    assert IServiceMaker.providedBy(plugin)
    assert IPlugin.providedBy(plugin)
    assert plugin.tapname == "chatd"
    assert plugin.options is tap.Options
    assert plugin.makeService is tap.makeService
