"""The composition of the server from its options, and the plug-in that makes it a command of twistd."""

import gc
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import twisted.internet
import txaio
from support.operator_schemas import schema_with
from support.servers import LONG
from support.tokens import SECRET, token
from support.transports import Wire
from support.websocket_frames import masked, read_frames
from twisted.application.service import Application, IServiceMaker
from twisted.internet.selectreactor import SelectReactor
from twisted.internet.testing import MemoryReactorClock, StringTransportWithDisconnection
from twisted.logger import ILogObserver, LogLevel, capturedLogs, formatEvent
from twisted.plugin import IPlugin
from twisted.scripts.twistd import ServerOptions

from chatd import config, tap
from chatd.operate import check, logging
from chatd.operate.listening import Ports
from chatd.operate.machine import ThisMachine
from chatd.operate.process import ServerProcess
from chatd.service import TRIM_SECONDS
from chatd.store.base import DAY, STEADY_SECONDS, Retention
from chatd.store.memory import MemoryStore
from chatd.store.redis import link
from chatd.transport.admission import HttpError
from chatd.transport.frames import MAX_MESSAGE
from chatd.transport.heads import parse as parse_head
from chatd.transport.limits import LOOK_SECONDS, PROMPT_LOOKS
from chatd.transport.proxied import ProxiedFactory
from twisted.plugins import chatd_plugin

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Reactor(MemoryReactorClock):
    """A reactor in memory that records the signals it handles."""

    def __init__(self):
        super().__init__()
        self.handled = []
        self._calls = threading.Semaphore(0)

    def sigTerm(self, number, frame):
        self.handled.append(("TERM", number, frame))

    def sigInt(self, number, frame):
        self.handled.append(("INT", number, frame))

    def callFromThread(self, function, *arguments):
        self.callLater(0, function, *arguments)
        self._calls.release()

    def wait(self, deferred):
        """Run what threads ask for, until a Deferred fires."""
        while not deferred.called:
            assert self._calls.acquire(timeout=LONG)
            self.advance(0)

    def begin(self):
        """Call the functions that wait for the reactor to run."""
        for hook, arguments, named in self.whenRunningHooks:
            hook(*arguments, **named)


@pytest.fixture(autouse=True)
def daemons(monkeypatch):
    """Restore what a server sets for its process: Autobahn's clock, signals, and the garbage collector.

    No test becomes a daemon; the processes that would are returned.
    """
    made = []

    def daemonize(process):
        made.append(process)

    monkeypatch.setattr(txaio.config, "loop", txaio.config.loop)
    monkeypatch.setattr(ServerProcess, "daemonize", daemonize)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    threshold, install = gc.get_threshold(), signal.signal
    yield made
    for number, handler in handlers.items():
        install(number, handler)
    gc.set_threshold(*threshold)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def environ(monkeypatch):
    """The environment, which is empty."""
    empty = {}
    monkeypatch.setattr(tap.Options, "environ", empty)
    return empty


@pytest.fixture(autouse=True)
def reactor(monkeypatch):
    """The reactor that twistd has installed."""
    memory = Reactor()
    monkeypatch.setattr(twisted.internet, "reactor", memory, raising=False)
    return memory


def parse(*arguments):
    """Parse the options of a server in the foreground."""
    options = tap.Options()
    options.parent = {"nodaemon": 1}
    options.parseOptions(arguments)
    return options


def refusal(*arguments):
    """Return the line that refuses a command line; since it is a text, the exit status is 1."""
    with pytest.raises(SystemExit) as refused:
        parse(*arguments)
    line = refused.value.code
    assert line.startswith("chatd: ")
    assert "\n" not in line
    return line


# The options


def test_wrong_option():
    """The errors of the configuration end twistd with one line."""
    assert refusal("--hist=5") == "chatd: there is no option --hist: did you mean --history?"
    assert refusal("--history=0") == "chatd: --history: '0' is not a whole number from 1 to 10000"


def test_options_from_the_environment_and_a_file(environ, tmp_path):
    (tmp_path / "chatd.toml").write_text("history = 7\nping = 7")
    environ |= {"CHATD_PING": "8", "CHATD_CONFIG": str(tmp_path / "chatd.toml")}
    settings = parse("--drain=9").settings
    assert (settings.history, settings.ping, settings.drain) == (7, 8, 9)


def test_help_of_the_command():
    """`twistd chatd --help` prints the help of the configuration."""
    assert str(tap.Options()) == config.OptionParser().format_help()


def test_endpoints_are_parsed_by_their_text():
    """Each endpoint of --listen and --admin is kept with its text; an empty --admin opens no port."""
    options = parse("--listen=tcp:1", "--admin=tcp:3", "--listen", "tcp:2:interface=127.0.0.1", "--admin=tcp:4")
    assert [*options.listen] == ["tcp:1", "tcp:2:interface=127.0.0.1"]
    assert [*options.admin] == ["tcp:3", "tcp:4"]
    assert parse("--admin=").admin == {}


@pytest.mark.parametrize("name", ["listen", "admin"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense:1", "Unknown endpoint type: 'nonsense'"),
        ("tcp:chat", "invalid literal for int() with base 10: 'chat'"),
        ("tcp", "_parseTCP() missing 1 required positional argument: 'port'"),
    ],
)
def test_wrong_endpoint(tmp_path, monkeypatch, name, text, reason):
    """A wrong endpoint is refused with the reason, whether the command line or a file names it."""
    monkeypatch.chdir(tmp_path)
    line = f"{text!r} is not a server endpoint such as tcp:8085 ({reason}"
    assert refusal(f"--{name}={text}").startswith(f"chatd: --{name}: {line}")
    (tmp_path / "chatd.toml").write_text(f"{name} = {json.dumps([text])}")
    assert refusal("--config=chatd.toml").startswith(f"chatd: chatd.toml: {name}: {line}")


def test_endpoint_with_an_unreadable_key(tmp_path, monkeypatch):
    """The line names the file that is missing or that this user may not read, and the remedy."""
    monkeypatch.chdir(tmp_path)
    text = "ssl:1:privateKey=missing.pem"
    path = tmp_path / "missing.pem"
    rest = f"{path} of {text!r} cannot be read (No such file or directory): correct the path or its mode"
    assert refusal(f"--listen={text}") == f"chatd: --listen: {rest}"


def test_reason_of_a_wrong_endpoint_is_one_line(monkeypatch):
    def refuse(reactor, text):
        raise RuntimeError("in two\n lines")

    monkeypatch.setattr("chatd.operate.listening.serverFromString", refuse)
    assert refusal("--listen=tcp:1").endswith(" (in two lines)")


@pytest.fixture
def checked(monkeypatch):
    """The findings that a check returns, and a list of what it checked: settings and machine."""
    found, asked = [], []
    monkeypatch.setattr(check, "findings", lambda *asking: asked.append(asking) or found)
    return found, asked


@pytest.mark.parametrize(
    ("found", "status", "out"), [(["one", "two"], 1, "one\ntwo\n"), ([], 0, "nothing to worry about\n")]
)
def test_check_prints_its_findings_and_exits(capsys, checked, found, status, out):
    """The exit status of --check is 1 if there are findings, and 0 otherwise."""
    checked[0][:] = found
    with pytest.raises(SystemExit) as end:
        parse("--check", "--listen=tcp:0:interface=127.0.0.1")
    assert (end.value.code, capsys.readouterr().out) == (status, out)


def test_check_notes_a_port_for_everyone(capsys, checked):
    """A port beyond this machine without tokens is a note, which changes no exit status."""
    for found, status in ([], 0), (["one"], 1):
        checked[0][:] = found
        with pytest.raises(SystemExit) as end:
            parse("--check")
        first, *others = capsys.readouterr().out.splitlines()
        assert first.startswith(
            "note: --listen tcp:8085:backlog=4096: everyone who reaches this port can read and post"
        )
        assert (end.value.code, others) == (status, found)


def test_check_sees_every_option(environ, checked, tmp_path):
    """`--check` checks what the server would use, from every source."""
    file = tmp_path / "chatd.toml"
    file.write_text("history = 7")
    environ |= {"CHATD_LISTEN": "tcp:1 tcp:2", "CHATD_STORE_PASSWORD_FILE": "password"}
    options = tap.Options()
    options.parent = {"nodaemon": 1, "rundir": "/srv"}
    with pytest.raises(SystemExit):
        options.parseOptions([
            *("--store=sqlite:a", "--admin=", f"--config={file}", "--retain=1d", "--rooms=a", "--rooms=b*", "--check"),
            *("--origin=*.example", "--rate=3", "--max-per-address=7", "--ping=5", "--drain=9", "--proxy-hops=2"),
            *("--log-format=json", "--compress=off"),
        ])  # fmt: skip
    ((settings, machine),) = checked[1]
    assert settings._replace(seed=())._asdict() == {
        "listen": ("tcp:1", "tcp:2"),
        "admin": (),
        "admin_token_file": None,
        "store": "sqlite:a",
        "store_password_file": pathlib.Path("password"),
        "seed": (),
        "schema": None,
        "max_message": 0,
        "history": 7,
        "retain": Retention(seconds=DAY),
        "rooms": ("a", "b*"),
        "origin": ("*.example",),
        "rate": (3, 6),
        "max_per_address": 7,
        "proxy_hops": 2,
        "jwt_key": None,
        "jwks": "",
        "jwt_audience": "",
        "jwt_issuer": "",
        "jwt_username": "sub",
        "jwt_cookie": "",
        "title": "chatd",
        "stylesheet": None,
        "login_url": "",
        "no_page": False,
        "webhook": (),
        "webhook_key": None,
        "compress": False,
        "ping": 5,
        "drain": 9,
        "log_format": "json",
        "config": file,
        "folder": pathlib.Path("/srv"),
        "message": None,
    }
    assert isinstance(machine, ThisMachine)


def test_check_without_twistd_uses_the_working_directory(checked):
    options = tap.Options()
    with pytest.raises(SystemExit):
        options.parseOptions(["--check"])
    assert checked[1][0][0].folder == pathlib.Path()


def test_wrong_options_are_refused_before_the_check(checked):
    assert refusal("--check", "--ping=0").startswith("chatd: --ping: ")
    assert checked[1] == []


def test_every_log_format_has_its_lines():
    """Each value of --log-format has a function that formats an event."""
    assert set(logging.FORMATS) == set(config.LOG_FORMATS)


# The store


def test_store_is_not_opened_before_the_service_starts(tmp_path):
    tap.makeService(parse(f"--store=sqlite:{tmp_path / 'a:b.sqlite'}"))
    assert [*tmp_path.iterdir()] == []


def test_sqlite_writes_in_one_thread_and_reads_in_another(reactor, tmp_path):
    before = {*threading.enumerate()}
    service = tap.makeService(parse(f"--store=sqlite:{tmp_path / 'a:b.sqlite'}", "--drain=0"))
    service.startService()
    names = {thread.name for thread in {*threading.enumerate()} - before}
    reactor.wait(service.stopService())
    assert names == {"PoolThread-chatd-write-0", "PoolThread-chatd-read-0"}
    assert (tmp_path / "a:b.sqlite").exists()


def test_sqlite_file_is_in_the_working_directory(reactor, tmp_path, monkeypatch):
    """twistd may change the working directory between the options and the start."""
    service = tap.makeService(parse("--drain=0"))
    monkeypatch.chdir(tmp_path)
    service.startService()
    reactor.wait(service.stopService())
    assert (tmp_path / "chatd.sqlite").exists()


@pytest.fixture
def linked(monkeypatch):
    """The addresses of Redis that servers were given, each with the file of the password."""
    made = []

    class Link(link.Link):
        def __init__(self, address, reactor, password_file):
            super().__init__(address, reactor, password_file)
            made.append((address, password_file))

    monkeypatch.setattr(link, "Link", Link)
    return made


def test_redis_gets_its_address_and_the_password_file(environ, linked):
    """The parsed URL and the file of the password reach the connection to Redis."""
    for url in ("redis://localhost", "rediss://ann%2F:s%40crt@redis.example:7000/3"):
        tap.makeService(parse(f"--store={url}"))
    environ |= {"CHATD_STORE": "redis://h", "CHATD_STORE_PASSWORD_FILE": "/run/password"}
    tap.makeService(parse())
    tap.makeService(parse("--store=redis://an%2Fn@h:1/2"))
    file = pathlib.Path("/run/password")
    assert linked == [
        (("localhost", 6379, 0, None, None, False), None),
        (("redis.example", 7000, 3, "ann/", "s@crt", True), None),
        (("h", 6379, 0, None, None, False), file),
        (("h", 1, 2, "an/n", None, False), file),
    ]


# The composition


class Disconnecting(Wire, StringTransportWithDisconnection):
    """A transport in memory that tells its protocol at once that the connection is lost."""


class Client:
    """A connection to a port of the server."""

    def __init__(self, factory, data):
        self.transport = Disconnecting()
        self.transport.protocol = factory.buildProtocol(self.transport.getPeer())
        self.transport.protocol.makeConnection(self.transport)
        self.transport.protocol.dataReceived(data)

    @property
    def received(self):
        return self.transport.value()

    def history(self):
        """Return the first frame after the handshake."""
        head, _, frame = self.received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        return json.loads(frame[frame.index(b"{") :])


def start(*arguments):
    service = tap.makeService(parse("--store=memory:", *arguments))
    service.startService()
    return service


def test_server_answers_on_both_ports(reactor):
    """A composed server serves its page, its admin page, /readyz and a WebSocket."""
    start()
    (port, connections, backlog, _), (admin_port, admin, _, interface) = reactor.tcpServers
    assert (port, backlog, admin_port, interface) == (8085, 4096, 8086, "127.0.0.1")
    assert b' data-room="main" ' in Client(connections, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").received
    assert b"<h1>A chat room</h1>" in Client(connections, b"GET /about HTTP/1.1\r\nHost: x\r\n\r\n").received
    assert b"\r\n\r\nchatd admin: " in Client(admin, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").received
    for factory in (connections, admin):
        assert Client(factory, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").received.endswith(b"\r\n\r\nready\n")
    assert Client(connections, HANDSHAKE).history()["type"] == "history"


def test_metrics_count_refused_operators(reactor, tmp_path, monkeypatch):
    """Requests that the admin port refuses are counted apart from those of clients."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "admin").write_text("a-token-of-the-admin-port-for-tests")
    (tmp_path / "admin").chmod(0o600)
    start("--admin-token-file=admin")
    admin = reactor.tcpServers[1][1]
    for header in b"Host: x", b"Origin: https://evil.example\r\nHost: x":
        Client(admin, b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n\r\n")
    text = Client(
        admin, b"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-token-of-the-admin-port-for-tests\r\n\r\n"
    ).received
    for status in b"401", b"403":
        assert b'chatd_refusals_total{kind="admin",reason="%b"} 1.0' % status in text


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [
        ([], ["--listen tcp:8085:backlog=4096: everyone who reaches this port can read and post"]),
        (["--jwt-key=jwt.key", "--origin=*"], ["--origin *: every web page can use this server"]),
        (["--listen=tcp:0", "--origin=*"], ["--listen tcp:0: everyone ", "--origin *: every web page "]),
        (["--jwt-key=jwt.key"], []),
        (["--listen=tcp:0:interface=127.0.0.1", "--origin=*"], []),
    ],
)
def test_start_warns_of_a_port_for_everyone(tmp_path, monkeypatch, arguments, begins):
    """The log at the start has one warning for each way in which a port beyond this machine is open to everyone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with capturedLogs() as events:
        start(*arguments)
    lines = [formatEvent(event) for event in events if event["log_level"] == LogLevel.warn]
    assert [line.startswith(begin) for line, begin in zip(lines, begins, strict=True)] == [True] * len(begins)


@pytest.mark.parametrize(
    ("argument", "history"),
    [("--drain=1", (2, None)), ("--history=1", (1, True)), ("--retain=1", (1, None)), ("--seed=empty", (0, None))],
)
def test_options_reach_the_rooms_and_the_store(reactor, tmp_path, monkeypatch, argument, history):
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
    """Return the status of the first port's response to a request."""
    return int(Client(reactor.tcpServers[0][1], data).received.split(b" ", 2)[1])


def test_listen_behind_a_proxy(reactor):
    """Connections to an endpoint whose text begins with `haproxy:` begin with a header, and no others do."""
    start("--listen=haproxy:tcp:8085", "--listen=tcp:8087")
    factories = {port: factory for port, factory, *_ in reactor.tcpServers}
    assert isinstance(factories[8085], ProxiedFactory)
    assert not isinstance(factories[8087], ProxiedFactory)
    assert "'haproxy:nonsense' is not a server endpoint" in refusal("--listen=haproxy:nonsense")


def test_rooms_limits_the_rooms(reactor):
    """--rooms refuses other rooms over WebSocket and HTTP with 404."""
    start("--rooms=team-*", "--rooms=lobby")
    assert status(reactor, handshake("/rooms/team-1")) == 101
    assert status(reactor, handshake("/rooms/lobby")) == 101
    assert status(reactor, handshake("/")) == 404
    assert status(reactor, b"GET /rooms/team-1/messages HTTP/1.1\r\nHost: x\r\n\r\n") == 200
    assert status(reactor, b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\n\r\n") == 404


def test_origin_limits_the_pages(reactor):
    """--origin refuses other pages over WebSocket and HTTP with 403; no Origin header is allowed."""
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
    """Return the codes of the errors that a client gets at first for a number of posts at once."""
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    client.transport.clear()
    client.transport.protocol.dataReceived(masked(b'{"username":"ann","message":"hi"}') * posts)
    reactor.advance(0)
    return [frame["code"] for frame in read_frames(client.received) if frame["type"] == "error"]


@pytest.mark.parametrize(("arguments", "most"), [([], 40), (["--rate=1"], 2), (["--rate=5:7"], 7), (["--rate=3:0"], 1)])
def test_client_may_send_its_burst_at_once(reactor, arguments, most):
    start(*arguments)
    for _ in range(2):
        assert errors(reactor, most) == []
        assert errors(reactor, most + 3) == ["RATE_LIMITED"]  # the last two wait


def test_client_is_limited_to_the_rate_after_its_burst(reactor):
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


def test_rate_of_zero_is_no_limit(reactor):
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
def test_http_posts_are_limited_by_the_forwarded_address(reactor, hops, same, other):
    """--proxy-hops selects the address that trusted proxies add; clients cannot forge it."""
    start("--rate=1:1", f"--proxy-hops={hops}")
    assert [status(reactor, post(forwarded)) for forwarded in same] == [201, 429]
    if other is not None:
        assert status(reactor, post(other)) == 201


def test_start_becomes_a_daemon_once(daemons):
    """The service is made before the process becomes a daemon, which twistd does later."""
    tap.makeService(parse("--store=memory:"))
    assert len(daemons) == 1


def test_clients_leave_a_reserve_of_open_files(reactor, monkeypatch):
    """Without open files to spare, clients are refused, and operators are not."""
    monkeypatch.setattr(tap.Options, "machine", SimpleNamespace(open_files=lambda: 0))
    start()
    clients, operators = (factory.buildProtocol(None) for _, factory, *_ in reactor.tcpServers)
    assert clients is None
    assert operators is not None


def test_imports_of_the_start_collect_no_garbage():
    """The collector sleeps while the modules of the server are loaded, and only then."""
    program = (
        "import gc; runs = []; gc.callbacks.append(lambda phase, _: runs.append(phase)); "
        "import chatd.tap; print(runs.count('start'), gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    runs, enabled = done.stdout.split()
    assert int(runs) < 10  # a few before the first module and after the last one, and not one for every 700 objects
    assert enabled == "True"


def test_garbage_collection_skips_the_objects_of_the_start():
    """The start freezes all objects and raises the threshold of the garbage collector."""
    start()
    assert gc.get_threshold()[0] == tap.GARBAGE
    assert gc.get_freeze_count() > 0


def test_messages_older_than_the_retention_are_removed(reactor, monkeypatch):
    """The periodic trim removes messages older than --retain, when the clock has run for an hour."""
    began = time.time()
    monkeypatch.setattr(time, "monotonic", reactor.seconds)
    monkeypatch.setattr(time, "time", lambda: began + reactor.seconds())
    start("--retain=1d")
    for _ in range(STEADY_SECONDS // TRIM_SECONDS):
        reactor.advance(TRIM_SECONDS)
    reactor.pump([LOOK_SECONDS] * PROMPT_LOOKS)  # the reactor does not lag any more
    assert Client(reactor.tcpServers[0][1], HANDSHAKE).history()["data"] == []


def test_every_endpoint_is_opened(reactor):
    start("--listen=tcp:1", "--listen=tcp:2", "--admin=tcp:3")
    assert [port for port, *_ in reactor.tcpServers] == [1, 2, 3]


def test_client_must_answer_before_the_next_ping(reactor):
    """A client is pinged every --ping seconds, and is aborted if it has not answered by the next ping."""
    start("--ping=3")
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    client.transport.clear()
    reactor.pump([1, 1])
    assert client.received == b""
    reactor.advance(1)
    assert client.received[0] == 0x89  # a ping
    reactor.pump([1, 1])
    assert not client.transport.aborted
    reactor.advance(1)
    assert client.transport.aborted


def test_drain_takes_its_budget(reactor):
    """A client that does not answer its close is aborted after --drain seconds."""
    service = start("--drain=3")
    client = Client(reactor.tcpServers[0][1], HANDSHAKE)
    stopped = service.stopService()
    reactor.advance(2.9)
    assert not client.transport.aborted
    reactor.advance(0.1)
    assert client.transport.aborted
    assert stopped.called


def test_stop_continues_the_drain_of_the_admin_port(reactor):
    """POST /drain starts one drain, both ports report it, and a stop continues it."""
    service = start("--drain=3")
    connections, admin = (factory for _, factory, *_ in reactor.tcpServers)
    client = Client(connections, HANDSHAKE)
    drain = b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    for _ in range(2):
        assert b" 202 Accepted\r\n" in Client(admin, drain).received
    for factory in (connections, admin):
        assert Client(factory, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").received.endswith(b"\r\n\r\ndraining\n")
    reactor.advance(1)
    stopped = service.stopService()
    reactor.advance(2)
    assert client.transport.aborted
    assert stopped.called


def test_failing_store_is_degraded_and_ready(reactor, monkeypatch):
    """A failing store makes both ports report `degraded` with status 200."""
    monkeypatch.setattr(MemoryStore, "fault", "the log is tired")
    start()
    for _, factory, *_ in reactor.tcpServers:
        answer = Client(factory, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").received
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"\r\n\r\ndegraded: the log is tired\n")


# Signals


class Signals:
    """The signal handlers of a process whose server runs."""

    def __init__(self, reactor):
        self.handlers = {}
        self.received = []
        self._reactor = reactor

    def send(self, number):
        """Send a signal to the process; return the signals that the reactor handled, and those that the service got."""
        begin = len(self._reactor.handled), len(self.received)
        self.handlers[number](number, "frame")
        self._reactor.advance(0)
        return self._reactor.handled[begin[0] :], self.received[begin[1] :]


@pytest.fixture
def signals(monkeypatch, reactor):
    """A function that starts a server in a process that ignores some signals."""

    def begin(ignored=()):
        signals = Signals(reactor)
        monkeypatch.setattr(signal, "signal", signals.handlers.__setitem__)
        monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        monkeypatch.setattr(start(), "signalled", signals.received.append)
        assert not {signal.SIGTERM, signal.SIGINT} & {*signals.handlers}, "the reactor installs its own handlers first"
        reactor.begin()
        return signals

    return begin


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")])
def test_first_signal_ends_the_reactor(signals, number, name):
    """The first signal is that of the reactor, and the service is notified of it."""
    running = signals()
    assert sorted(running.handlers) == [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
    assert running.send(number) == ([(name, number, "frame")], [number])


def test_signals_that_are_ignored_stay_ignored(signals):
    """Shells ignore SIGINT for a process in the background; a server that nohup starts reloads all the same."""
    running = signals([signal.SIGINT, signal.SIGHUP])
    assert sorted(running.handlers) == [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_later_signals_reach_the_service_alone(signals, first, second):
    """The reactor handles the first signal only; the service handles all of them."""
    running = signals()
    running.send(first)
    assert running.send(second) == ([], [second])
    assert running.send(first) == ([], [first])


@pytest.fixture
def kept(monkeypatch):
    """What a server reloads and rotates, in order."""
    calls = []
    monkeypatch.setattr(logging.LineObserver, "reopen", lambda self: calls.append("reopen"))
    monkeypatch.setattr(logging.LineObserver, "rotate", lambda self: calls.append("rotate"))
    monkeypatch.setattr(Ports, "reload", lambda self: calls.append("certificates"))
    return calls


def test_hangup_reloads(signals, kept):
    """SIGHUP reopens the log file and reads the certificates again, also in a drain, and ends nothing."""
    running = signals()
    assert running.send(signal.SIGHUP) == ([], [])
    running.send(signal.SIGTERM)
    assert running.send(signal.SIGHUP) == ([], [])
    assert kept == ["reopen", "certificates"] * 2


@pytest.fixture
def guarded(monkeypatch):
    """A function that asks the admin port of the newest server, and returns the status of its refusal, or None."""
    sites, admin = [], tap.http.admin

    def noted(*args, **options):
        sites.append(admin(*args, **options))
        return sites[-1]

    monkeypatch.setattr(tap.http, "admin", noted)

    def ask(*headers):
        try:
            sites[-1].guard(parse_head(b"\r\n".join([b"GET /sanctions HTTP/1.1", b"Host: x", *headers])))
        except HttpError as refused:
            return refused.status.value
        return None

    return ask


def test_hangup_reads_the_token_again(reactor, kept, guarded, tmp_path, monkeypatch):
    """The file is relative to the folder of twistd, which it enters later."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    file = tmp_path / "token"
    file.write_text("a" * 16)
    options = tap.Options()
    options.parent = {"nodaemon": 1, "rundir": str(tmp_path)}
    options.parseOptions(["--admin-token-file=token", "--store=memory:"])
    tap.makeService(options)
    old, new = (b"Authorization: Bearer " + letter * 16 for letter in (b"a", b"b"))
    assert [guarded(), guarded(old), guarded(new)] == [401, None, 401]
    file.write_text("b" * 16)
    handlers[signal.SIGHUP](signal.SIGHUP, None)
    reactor.advance(0)
    assert [guarded(), guarded(old), guarded(new)] == [401, 401, None]


def test_hangup_reads_the_schema_again(reactor, kept, tmp_path, monkeypatch):
    """The payload limit, the page and the served documents change with it."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema_with(color={"type": "string", "maxLength": 4000})))
    start("--schema=schema.json")
    factory = reactor.tcpServers[0][1]

    def served(path):
        head, body = Client(factory, b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % path).received.split(b"\r\n\r\n", 1)
        assert b"\r\nAccess-Control-Allow-Origin: *" in head
        return json.loads(body)

    def fields():
        body = served(b"openapi.json")["paths"]["/rooms/{name}/messages"]["post"]["requestBody"]
        return [*body["content"]["application/json"]["schema"]["properties"]]

    assert fields() == ["username", "message", "color", "label", "replaces"]
    assert ' data-max-message="30" data-max-username="30"' in page_at(reactor, b"/")
    assert 48_000 < factory.protocol.max_message == factory.protocol.maxFramePayloadSize < 60_000
    file.write_text(json.dumps(schema_with(size={"type": "integer"}, message={"type": "string", "maxLength": 600})))
    handlers[signal.SIGHUP](signal.SIGHUP, None)
    reactor.advance(0)
    assert fields() == ["username", "message", "size", "label", "replaces"]
    assert factory.protocol.max_message == factory.maxMessagePayloadSize == MAX_MESSAGE
    assert ' data-max-message="600"' in page_at(reactor, b"/")


def page_at(reactor, path, *headers):
    """Return what the port for clients answers to a browser."""
    lines = b"".join(header + b"\r\n" for header in (b"Host: x", *headers))
    return Client(reactor.tcpServers[0][1], b"GET %b HTTP/1.1\r\n%b\r\n" % (path, lines)).received.decode()


def test_page_follows_the_options(reactor, tmp_path, monkeypatch):
    """The page has the title, the URL of the login, the claim of the username and the name in the cookie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(SECRET)
    tokens = ["--jwt-key=secret", "--jwt-cookie=session", "--jwt-username=name", "--origin=https://chat.example"]
    start("--title=Team <1>", "--login-url=https://app.example/login", *tokens)
    found = page_at(reactor, b"/rooms/a", b"Cookie: session=" + token(name="Ann").encode())
    for name, value in (
        ("title", "Team &lt;1&gt;"),
        ("login", "https://app.example/login"),
        ("tokens", "name"),
        ("username", "Ann"),
        ("max-message", "500"),
    ):
        assert f' data-{name}="{value}"' in found
    assert "\r\nCache-Control: private, no-cache\r\n" in found


@pytest.mark.parametrize("path", [b"/", b"/rooms/a", b"/about"])
def test_no_page(reactor, path):
    """The instructions take its place, and name the scheme that a trusted proxy has seen."""
    start("--no-page", "--proxy-hops=1")
    found = page_at(reactor, path, b"X-Forwarded-Proto: https")
    url = path.decode().replace("about", "")
    assert "<h1>A chat room</h1>" in found
    assert f">wss://x{url}<" in found


def test_hangup_reads_the_stylesheet_again(reactor, kept, tmp_path, monkeypatch):
    """The page links the new one; a file that is gone leaves the old one."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "team.css"
    file.write_text("p { color: teal }")
    start("--stylesheet=team.css")

    def link():
        return re.search(r'href="(static/[0-9a-f]{16}/stylesheet\.css)"', page_at(reactor, b"/"))[1]

    def hang_up():
        handlers[signal.SIGHUP](signal.SIGHUP, None)
        reactor.advance(0)

    links = [link()]
    file.write_text("p { color: red }")
    hang_up()
    links.append(link())
    assert links[0] != links[1]
    file.unlink()
    hang_up()
    assert link() == links[1]
    assert page_at(reactor, f"/{links[1]}".encode()).endswith("\r\n\r\np { color: red }")


def test_stylesheet_that_goes_before_the_start(reactor, tmp_path, monkeypatch):
    """The process ends with one line."""
    file = tmp_path / "team.css"
    file.write_text("p { color: teal }")
    options = parse("--store=memory:", f"--stylesheet={file}")
    file.unlink()
    with pytest.raises(SystemExit, match=r"^chatd: --stylesheet: .*/team\.css cannot be read \(No such file"):
        tap.makeService(options)


def test_payload_limit_is_an_option(reactor):
    start("--max-message=2000")
    factory = reactor.tcpServers[0][1]
    assert factory.protocol.max_message == factory.intake.vocabulary.max_bytes == 2000


PAGE = b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\n"


def status_with(reactor, *headers):
    """Return the status with which the port for clients answers a request."""
    factory = reactor.tcpServers[0][1]
    lines = b"".join(header + b"\r\n" for header in headers)
    return int(Client(factory, PAGE + lines + b"\r\n").received.split()[1])


@pytest.mark.parametrize("option", ["jwt-key", "jwks"])
def test_tokens_are_needed(reactor, tmp_path, monkeypatch, option):
    """A key makes the port ask for tokens, and SIGHUP reads the file again."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "key"
    key = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "1"}
    texts = {"jwt-key": SECRET.decode(), "jwks": json.dumps({"keys": [key]})}
    file.write_text(texts[option])
    start(f"--{option}=key", "--jwt-username=sub")
    header = b"Authorization: Bearer " + token().encode()
    assert status_with(reactor) == 401
    assert status_with(reactor, header) == (200 if option == "jwt-key" else 401)
    file.write_text("x" * 40 if option == "jwt-key" else texts[option])
    handlers[signal.SIGHUP](signal.SIGHUP, None)
    reactor.advance(0)
    assert status_with(reactor, header) == 401


def test_webhooks(reactor, tmp_path, monkeypatch):
    """Each webhook has metrics under its origin, begins with the store, and SIGHUP reads the keys again."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text(f"whsec_{'A' * 32}")
    urls = "https://ann:geheim@app.example/a", "https://app.example/b", "http://127.0.0.1:1/"
    start(*(f"--webhook={url}" for url in urls), "--webhook-key=keys")
    text = Client(reactor.tcpServers[1][1], b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").received.decode()
    for name in ("https://app.example", "https://app.example 2", "http://127.0.0.1:1"):
        assert f'chatd_webhook_active{{webhook="{name}"}} 1.0' in text
    assert "geheim" not in text
    (tmp_path / "keys").write_text("")
    with capturedLogs() as events:
        handlers[signal.SIGHUP](signal.SIGHUP, None)
        reactor.advance(0)
    assert any("the old keys of the webhooks stay in force" in formatEvent(event) for event in events)


def test_key_set_at_a_url(reactor):
    """Without keys the server says so, and answers 503."""
    start("--jwks=https://login.example/jwks")
    header = b"Authorization: Bearer " + token().encode()
    assert status_with(reactor, header) == 503
    ready = Client(reactor.tcpServers[1][1], b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").received
    assert ready.endswith(b"\r\n\r\ndegraded: no key to verify tokens\n")


def test_port_without_a_token_file_is_open(reactor, guarded):
    tap.makeService(parse("--store=memory:"))
    assert guarded() is None


def test_token_that_cannot_be_read_ends_the_start(tmp_path):
    with pytest.raises(SystemExit) as refused:
        tap.makeService(parse("--store=memory:", f"--admin-token-file={tmp_path / 'token'}"))
    assert refused.value.code == (
        f"chatd: --admin-token-file {tmp_path / 'token'}: this user cannot read it: create it, or chown it"
    )


def test_user_signal_rotates_the_log(signals, kept):
    """SIGUSR1 rotates the log, as it does in every program of twistd."""
    assert signals().send(signal.SIGUSR1) == ([], [])
    assert kept == ["rotate"]


# The clock


def test_timers_follow_a_monotonic_clock(monkeypatch):
    """The wall clock may be set back while a call waits: the reactor does not use it."""
    made = SelectReactor()
    monkeypatch.setattr(twisted.internet, "reactor", made)
    tap.Options().parseOptions([])
    before = time.monotonic()
    waiting = made.callLater(0, list)
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert before <= waiting.getTime() <= made.seconds() <= time.monotonic()
    assert made.timeout() == 0
    made.runUntilCurrent()
    assert not waiting.active()
    made.removeAll()
    made.waker.connectionLost(None)


# The log


@pytest.fixture
def observer():
    """A function that makes a server in an application and returns its log observer."""
    made = []

    def make(options):
        application = Application("chatd")
        tap.makeService(options).setServiceParent(application)
        made.append(application.getComponent(ILogObserver))
        return made[-1]

    yield make
    for observer in made:
        observer.sink.close()


def under_twistd(*arguments):
    """Parse the options of a server as twistd does."""
    twistd = ServerOptions()
    twistd.parseOptions([*arguments, "--store=memory:"])
    return twistd.subOptions


EVENT = {"log_time": 0.0, "log_level": LogLevel.info, "log_namespace": "chatd", "log_format": "hello {who}", "who": "x"}
TEXT = "1970-01-01T00:00:00.000Z info chatd: hello x\n"


@pytest.mark.parametrize(("log_format", "line"), [("text", TEXT), ("json", logging.json_line(EVENT))])
def test_log_in_the_logfile_of_twistd(observer, tmp_path, log_format, line):
    """The log goes to the file of --logfile in the format of --log-format."""
    observer(under_twistd("-n", f"--logfile={tmp_path / 'log'}", "chatd", f"--log-format={log_format}"))(EVENT)
    assert (tmp_path / "log").read_text() == line


def test_log_on_stdout_in_the_foreground(observer, capfd):
    observer(under_twistd("--nodaemon", "chatd"))(EVENT)
    assert capfd.readouterr().out == TEXT


def test_log_of_a_daemon(observer, tmp_path, monkeypatch):
    """The log of a daemon goes to twistd.log, where twistd writes its own."""
    monkeypatch.chdir(tmp_path)
    observer(under_twistd("chatd"))(EVENT)
    assert (tmp_path / "twistd.log").read_text() == TEXT


def test_log_without_twistd(observer, tmp_path, monkeypatch):
    """Without twistd the log goes to twistd.log too."""
    monkeypatch.chdir(tmp_path)
    options = parse("--store=memory:")
    options.parent = None
    observer(options)(EVENT)
    assert (tmp_path / "twistd.log").read_text() == TEXT


def test_end_of_the_reactor_writes_the_log(reactor, observer, monkeypatch):
    """What waits for its reader is written when the reactor has stopped."""
    made = observer(under_twistd("-n", "chatd"))
    assert reactor.triggers["after"]["shutdown"] == [(made.drain, (), {})]


def test_lines_that_wait_are_written_by_the_reactor(reactor, observer, monkeypatch, capfd):
    """A line that standard output does not take is written later, by the reactor."""
    made = observer(under_twistd("-n", "chatd"))
    write = made.sink.write
    monkeypatch.setattr(made.sink, "write", lambda data: 0)
    made(EVENT)
    monkeypatch.setattr(made.sink, "write", write)
    reactor.pump([0, logging.RETRY_SECONDS])
    assert capfd.readouterr().out == TEXT


def test_lines_of_a_turn_of_the_running_reactor_are_written_together(reactor, observer, capfd):
    made = observer(under_twistd("-n", "chatd"))
    reactor.begin()
    made(EVENT)
    assert capfd.readouterr().out == ""
    made(EVENT)
    reactor.pump([0, 0])
    assert capfd.readouterr().out == 2 * TEXT


def test_observer_that_twistd_names(monkeypatch, kept, reactor):
    """With `twistd --logger` the log is not chatd's, and is neither reopened nor rotated."""
    monkeypatch.setattr(signal, "signal", lambda number, heed: heed(number, None))
    application = Application("chatd")
    tap.makeService(under_twistd("-n", "--logger=builtins.list", "chatd")).setServiceParent(application)
    reactor.advance(0)
    assert application.getComponent(ILogObserver, None) is None
    assert kept == ["certificates"]


@pytest.mark.parametrize(
    ("twistd", "line"),
    [
        (["--logfile=-"], "chatd: --logfile -: a daemon has no standard output: name a file, or run twistd -n"),
        (
            ["-n", "--rundir=missing"],
            "chatd: --rundir missing: there is no such folder for this user: create it, or name another",
        ),
    ],
)
def test_options_of_twistd_that_cannot_work(twistd, line):
    """The process ends with one line before it becomes a daemon."""
    with pytest.raises(SystemExit) as refused:
        tap.makeService(under_twistd(*twistd, "chatd"))
    assert refused.value.code == line


# The plug-in


def test_plugin_makes_chatd_a_command_of_twistd():
    plugin = chatd_plugin.chatd
    assert IServiceMaker.providedBy(plugin)
    assert IPlugin.providedBy(plugin)
    assert plugin.tapname == "chatd"
    assert plugin.options is tap.Options
    assert plugin.makeService is tap.makeService
