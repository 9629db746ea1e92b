"""Every rule of `--check`, with problems that it finds and settings that it accepts."""

import dataclasses
import json
import re
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.operator_schemas import schema_with

from chatd.config import Configuration
from chatd.messages import Entry
from chatd.operate import check
from chatd.operate.check import Endpoint, RedisRefused, Unreached, exposures, findings
from chatd.store.base import DAY, Retention
from chatd.transport.frames import history_frame, message_frame
from chatd.transport.operator_schema import read
from chatd.webhooks.sender import WebhookAddress

SETTINGS = Configuration((), {}).settings._replace(folder=Path("/srv"))
"""The defaults."""
FILE = Path("/srv/password")
REDIS = "redis://localhost/0"
SECRET = "redis://:secret@localhost"
TOML = Path("/etc/chatd.toml")
WELL = {
    "redis_version": "7.0.15",
    "role": "master",
    "maxmemory_policy": "noeviction",
    "aof_enabled": "1",
    "appendfsync": "always",
}
"""The facts of a Redis that loses nothing."""
HOOKS = {"webhook": (WebhookAddress.parse("https://ann:secret@app.example/hook"),), "webhook_key": FILE}
KEY = "ssl:443:privateKey=a\\:b.pem:certKey=c.pem"


@dataclasses.dataclass
class FakeMachine:
    """A machine without problems, except for those of a test."""

    files: int = 65_536
    stop: float | None = None
    readable: Path | str = ""
    contents: str | None = ""
    lacking: Path | None = None
    locks: str = ""
    links: int = 1
    since: int | None = 1
    mounted: str = "ext4"
    space: int = 1 << 40
    taken: tuple[tuple[int, str], ...] = ()
    first_port: int = 0
    command: str = ""
    password: str | None = "from a file"
    redis: dict | Exception = dataclasses.field(default_factory=dict)
    servers: list = dataclasses.field(default_factory=list)
    asked: set = dataclasses.field(default_factory=set)

    def open_files(self):
        return self.files

    def stop_seconds(self):
        return self.stop

    def world_readable(self, path):
        return path == Path(self.readable)

    def unwritable(self, store):
        assert store == Path("/srv/chatd.sqlite")
        return self.lacking

    def locked(self, store):
        return store == Path(self.locks)

    def names(self, store):
        assert store == Path("/srv/chatd.sqlite")
        return self.links

    def readable_since(self, store):
        assert store == Path("/srv/chatd.sqlite")
        return self.since

    def file_system(self, folder):
        assert (folder, self.lacking) == (Path("/srv"), None)
        return self.mounted

    def free(self, folder):
        assert (folder, self.lacking) == (Path("/srv"), None)
        return self.space

    def listening(self, port):
        return [ip_address(address) for number, address in self.taken if number == port]

    def may_listen(self, port):
        return port >= self.first_port

    def command_line(self):
        return self.command

    def secret(self, path):
        assert path in (FILE, TOML)
        return self.password if path == FILE else self.contents

    def ask(self, server):
        self.servers.append(server)
        if isinstance(self.redis, Exception):
            raise self.redis
        return WELL | self.redis


def found_by(settings=(), machine=()):
    return findings(SETTINGS._replace(**dict(settings)), FakeMachine(**dict(machine)))


def test_defaults_on_a_good_machine():
    """The default options on a machine without problems have no findings."""
    assert found_by() == []


LOCAL = "tcp:8085:interface=127.0.0.1"


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({}, ["--listen tcp:8085:backlog=4096: everyone who reaches this port can read and post in every room"]),
        ({"listen": ("systemd:domain=INET:index=0", LOCAL)}, ["--listen systemd:domain=INET:index=0: everyone "]),
        ({"listen": ("tcp:1", "haproxy:tcp:2")}, ["--listen tcp:1 --listen haproxy:tcp:2: everyone "]),
        ({"jwks": "https://login.example/jwks"}, []),
        ({"jwt_key": FILE, "origin": ("*",)}, ["--origin *: every web page can use this server"]),
        ({"origin": ("https://chat.example", "*")}, ["--listen ", "--origin *: "]),
        ({"listen": (LOCAL, "unix:/run/chatd"), "origin": ("*",)}, []),
    ],
)
def test_exposures(settings, begins):
    """Ports that only this machine reaches, or for clients with tokens, are not open to everyone."""
    lines = exposures(SETTINGS._replace(**settings))
    assert [line.startswith(begin) for line, begin in zip(lines, begins, strict=True)] == [True] * len(begins)


# A finding, and the options and the machine that cause it.
BAD = [
    ("--ping 60: load balancers cut connections that are idle for 60 s: ", {"ping": 60}, {}),
    ("open files: the limit of 1024 leaves room for 960 clients: raise it, with LimitNOFILE=", {}, {"files": 1024}),
    ("open files: the limit of 1087 leaves room for 1023 clients: ", {}, {"files": 1087}),
    ("open files: the limit of 50 leaves room for 0 clients: ", {}, {"files": 50}),
    (
        "--drain 30: systemd kills the server 20 s after the stop signal: set TimeoutStopSec=45 in the unit, or ",
        {},
        {"stop": 20.0},
    ),
    ("--drain 90: systemd kills the server 90 s after the stop signal: ", {"drain": 90}, {"stop": 90.0}),
    (
        f"--listen {KEY}: every user of this machine can read the private key: chmod o= a:b.pem",
        {"listen": (KEY,)},
        {"readable": "a:b.pem"},
    ),
    (
        "--admin haproxy:ssl:1:interface=127.0.0.1:privateKey=k: every user of this machine can read the private key",
        {"admin": ("haproxy:ssl:1:interface=127.0.0.1:privateKey=k",)},
        {"readable": "k"},
    ),
    (
        "--store memory: all messages are lost when the server stops, and each room keeps 10,000 at most: ",
        {"store": "memory:"},
        {},
    ),
    (
        "--store memory: all messages are lost when the server stops: ",
        {"store": "memory:", "retain": Retention(messages=20_000)},
        {},
    ),
    (
        "--store sqlite:chatd.sqlite: the file has 2 names (hard links), and a store may have only one: remove ",
        {},
        {"links": 2},
    ),
    (
        "--store sqlite:chatd.sqlite: every user of this machine can read the messages in /srv/chatd.sqlite: chmod o= ",
        {},
        {"readable": "/srv/chatd.sqlite"},
    ),
    (
        "--store sqlite:chatd.sqlite: every user of this machine can read the messages in /srv/chatd.sqlite-wal: ",
        {},
        {"readable": "/srv/chatd.sqlite-wal"},
    ),
    (
        "--store sqlite:chatd.sqlite: /srv is missing, or this user cannot write it: ",
        {},
        {"lacking": Path("/srv"), "mounted": "nfs", "space": 0, "locks": "/srv/chatd.sqlite"},
    ),
    ("--store sqlite:chatd.sqlite: another chatd uses it: ", {}, {"locks": "/srv/chatd.sqlite", "since": 99}),
    ("--store sqlite:chatd.sqlite: the file is not a chatd store: ", {}, {"since": 0}),
    (
        f"--store sqlite:chatd.sqlite: a newer chatd wrote it in format {check.FORMAT + 1}, ",
        {},
        {"since": check.FORMAT + 1},
    ),
    *(
        (
            f"--store sqlite:chatd.sqlite: SQLite's log and locks are not reliable on {kind}: ",
            {},
            {"mounted": kind},
        )
        for kind in sorted(check.SHARED)
    ),
    ("--store sqlite:chatd.sqlite: tmpfs does not outlive the machine, ", {}, {"mounted": "tmpfs"}),
    ("--store sqlite:chatd.sqlite: ramfs does not outlive the machine, ", {}, {"mounted": "ramfs"}),
    ("--store sqlite:chatd.sqlite: overlay does not outlive the container, ", {}, {"mounted": "overlay"}),
    ("--store sqlite:chatd.sqlite: its disk has 255 MiB free: free some space, ", {}, {"space": check.FREE - 1}),
    (
        "--history 1000: a first frame can be 3.1 MiB, and common clients accept 1 MiB: use at most ",
        {"history": 1000},
        {},
    ),
    (
        "--history 1000: a first frame can be ",
        {"history": 1000, "retain": Retention(messages=500)},
        {},
    ),
    ("--history 1000: a first frame can be ", {"history": 1000, "retain": Retention(seconds=DAY)}, {}),
    ("--rooms team-* mai: clients that connect to / find no room: add --rooms main", {"rooms": ("team-*", "mai")}, {}),
    *(
        (f"--origin {text}: browsers leave out the default port, so no page matches: ", given, {})
        for text in ("https://chat.example:443", "http://chat.example:80", "HTTPS://*.chat.example:443")
        for given in [{"origin": ("https://good.example", text)}]
    ),
    *(
        (f"--origin {text}: it allows every page below .{domain}: name a domain of yours", {"origin": (text,)}, {})
        for text, domain in (("*.com", "com"), ("https://*.ORG", "org"), ("*.net:8080", "net"))
    ),
    (
        "--listen tcp:80: port 80 needs a privilege: ",
        {"listen": ("tcp:80",)},
        {"first_port": 1024},
    ),
    *(
        ("--listen tcp:8085:backlog=4096: port 8085 is in use: ", {}, {"taken": ((8085, address),)})
        for address in ("0.0.0.0", "127.0.0.1", "::")
    ),
    *(
        (f"--listen {LOCAL}: port 8085 is in use: ", {"listen": (LOCAL, "unix:s"), "proxy_hops": 1}, {"taken": taken})
        for taken in [((8085, "127.0.0.1"),), ((8085, "0.0.0.0"),)]
    ),
    ("--admin tcp:8085:interface=127.0.0.1: port 8085 is in use: ", {"admin": (LOCAL,)}, {}),
    *(
        (f"--admin {text}: everyone who can reach this machine can drain the server: ", {"admin": (text,)}, {})
        for text in ("tcp:8086", "tcp:8086:interface=0.0.0.0", "tcp6:8086", "tcp:8086:interface=8.8.8.8")
    ),
    (
        "--admin-token-file /srv/password: this user cannot read it: ",
        {"admin_token_file": Path("password")},
        {"password": None},
    ),
    (
        "--admin-token-file /srv/password: it holds no token of 16 letters and digits or more: ",
        {"admin_token_file": FILE},
        {"password": "0123456789abcde\n"},
    ),
    (
        "--admin-token-file /srv/password: every user of this machine can read the token: chmod o= /srv/password, and",
        {"admin_token_file": FILE},
        {"password": "0123456789abcdef", "readable": "/srv/password"},
    ),
    (
        "--jwt-key /srv/password: every user of this machine can read the secret: chmod o= /srv/password, and replace",
        {"jwt_key": FILE},
        {"readable": "/srv/password"},
    ),
    *(
        (
            "--rate 0: a single client can keep the server and its disk busy: ",
            {"rate": (0, 0), "listen": text},
            {},
        )
        for text in (("tcp:8085",), (LOCAL, "tls:/etc/keys"))
    ),
    *(
        (
            "--proxy-hops 0: all clients of a proxy on this machine have one address, ",
            {"listen": text},
            {},
        )
        for text in ((LOCAL,), ("tcp6:1:interface=\\:\\:1", "unix:chatd.socket"), ("tcp:1:interface=localhost",))
    ),
    *(
        (
            "--store redis://:***@localhost: every user of this machine can see the password in the command line ",
            {"store": "redis://:a%40b@localhost"},
            {"command": command},
        )
        for command in ("twistd\0--store=redis://:a%40b@localhost\0", "twistd\0--store\0redis://:a%40b@localhost\0")
    ),
    *(
        (
            f"--store redis://{host}: the network can read messages and the password: ",
            {"store": f"redis://{host}"},
            {},
        )
        for host in ("redis.example:6379/1", "192.0.2.7", "[2001:db8::7]:7000")
    ),
    (
        "--store-password-file /srv/password: this user cannot read it: ",
        {"store": REDIS, "store_password_file": Path("password")},
        {"password": None, "redis": Unreached("is never asked")},
    ),
    (
        "--store-password-file /srv/password: every user of this machine can read the password: chmod o= /srv/passw",
        {"store": REDIS, "store_password_file": FILE},
        {"readable": "/srv/password"},
    ),
    (
        "--config /etc/chatd.toml: every user of this machine can read the password of Redis in it: chmod o= /etc/",
        {"store": SECRET, "config": TOML},
        {"readable": TOML, "contents": f"store = '{SECRET}'"},
    ),
    (
        f"--store {REDIS}: Redis cannot be reached (Connection refused): start it, ",
        {"store": REDIS},
        {"redis": Unreached("Connection refused")},
    ),
    (
        f"--store {REDIS}: Redis refuses (NOAUTH Authentication required): correct the user, ",
        {"store": REDIS},
        {"redis": RedisRefused("NOAUTH Authentication required")},
    ),
    *(
        (f"--store {REDIS}: it is Redis {version}: use 6.2 or later", {"store": REDIS}, {"redis": facts})
        for version in ("6.0.16", "5.0.3")
        for facts in [{"redis_version": version}]
    ),
    (
        f"--store {REDIS}: it is a replica of db-1:6380, which must be up for the server to start: ",
        {"store": REDIS},
        {"redis": {"role": "slave", "master_host": "db-1", "master_port": "6380"}},
    ),
    *(
        (
            f"--store {REDIS}: with maxmemory-policy {policy}, short memory removes {what}: ",
            {"store": REDIS},
            {"redis": {"maxmemory_policy": policy}},
        )
        for policy, what in (
            ("allkeys-lru", "messages"),
            ("volatile-ttl", "labels, so retried posts are stored twice"),
        )
    ),
    (
        f"--store {REDIS}: a kill of Redis loses the messages since its last snapshot: set appendonly yes and ",
        {"store": REDIS},
        {"redis": {"aof_enabled": "0", "appendfsync": "everysec"}},
    ),
    *(
        (
            f"--store {REDIS}: with appendfsync {text}, a power failure can lose the last acknowledged messages: ",
            {"store": REDIS},
            {"redis": {"appendfsync": text}},
        )
        for text in ("everysec", "no")
    ),
    (
        "--login-url http://app.example/login: the network can read the tokens that come from it: use https",
        {"login_url": "http://app.example/login"},
        {},
    ),
    *(
        (
            f"--stylesheet /srv/password: the policy of the page lets browsers load nothing from {url}: remove it",
            {"stylesheet": Path("/srv/password")},
            {"password": f"p {{ color: teal }} {css}"},
        )
        for url, css in (
            ("https://fonts.example/a", "@import 'https://fonts.example/a';"),
            ("HTTP://fonts.example/a", "@import url( HTTP://fonts.example/a );"),
            ("//fonts.example/a", 'p { background: url("//fonts.example/a") }'),
            ("data:image/png", "p { background: URL(data:image/png;base64,AAAA) }"),
        )
    ),
    *(
        (f"--{name.replace('_', '-')} {value}: there is no page with --no-page: give one of them", found, {})
        for name, value in (("stylesheet", "/srv/password"), ("login_url", "https://app.example"))
        for found in [{"no_page": True, name: Path(value) if name == "stylesheet" else value}]
    ),
    ("--webhook-key /srv/password: every user of this machine can read the keys: ", HOOKS, {"readable": FILE}),
    (
        "--webhook http://app.example: the network can read the messages: use https",
        {"webhook": (WebhookAddress.parse("http://app.example/hook"),)},
        {},
    ),
    (
        "--webhook https://app.example: every user of this machine can see the password in the command line (ps): ",
        HOOKS,
        {"command": "twistd\0chatd\0--webhook\0https://ann:secret@App.example/hook"},
    ),
]
# Options and machines without a finding, each just short of one.
GOOD = [
    ({"ping": 59}, {}),
    ({}, {"files": 1088}),
    ({}, {"stop": 31.0}),
    ({}, {"stop": float("inf")}),
    ({"listen": (KEY,)}, {"readable": "/srv/a"}),
    ({"store": "memory.db", "store_password_file": Path("/nobody/reads/it")}, {}),
    ({"admin_token_file": FILE, "admin": ("tcp:8086",)}, {"password": "0123456789abcdef\n"}),
    ({"jwt_key": FILE}, {"readable": "/srv/password", "password": "-----BEGIN PUBLIC KEY-----"}),
    ({"jwt_key": FILE}, {}),
    ({"store": REDIS}, {}),
    ({"store": REDIS}, {"redis": {"redis_version": "6.2.0"}}),
    (
        {"store": REDIS},
        {"redis": dict.fromkeys(WELL, "") | {"maxmemory_policy": "noeviction", "appendfsync": "always"}},
    ),
    ({"store": "redis://127.0.0.9:7000"}, {}),
    ({"config": TOML}, {"readable": TOML}),
    ({"store": REDIS, "config": TOML}, {"readable": TOML, "contents": REDIS}),
    ({"store": SECRET, "config": TOML}, {"contents": SECRET}),
    ({"store": SECRET, "config": TOML}, {"readable": TOML}),
    ({"store": SECRET, "config": TOML}, {"readable": TOML, "contents": None}),
    ({"store": "redis://[::1]"}, {}),
    ({"store": "rediss://redis.example"}, {}),
    ({"store": REDIS, "store_password_file": FILE}, {"readable": "/srv/other"}),
    ({"store": "redis://:secret@localhost"}, {"command": "twistd\0chatd\0"}),
    ({"store": REDIS}, {"command": f"--store={REDIS}"}),
    ({"store": "rediss://clustercfg.chat.a1b2c3.memorydb.eu-west-1.amazonaws.com"}, {"redis": {"aof_enabled": "0"}}),
    ({"store": "sqlite:/srv/chatd.sqlite", "folder": Path("/elsewhere")}, {}),
    ({}, {"locks": "/srv/other.sqlite"}),
    ({}, {"since": None}),
    ({}, {"since": check.FORMAT}),
    ({}, {"space": check.FREE}),
    ({}, {"mounted": ""}),
    ({"history": 300}, {}),
    ({"history": 5000, "retain": Retention(messages=300)}, {}),
    ({"rooms": ("team-*", "main")}, {}),
    ({"rooms": ("m*",)}, {}),
    ({"origin": ("https://chat.example", "https://chat.example:80", "http://chat.example:8080", "null")}, {}),
    ({"origin": ("*.chat.example", "*.localhost", "https://*.local:8443", "https://[::1]")}, {}),
    ({"listen": ("tcp:80",)}, {"first_port": 80}),
    ({}, {"taken": ((8084, "0.0.0.0"), (8086, "192.0.2.1"))}),
    ({"listen": ("tcp:8085:interface=192.0.2.1",), "admin": ("tcp:8085:interface=127.0.0.1",)}, {}),
    ({"listen": ("tcp:8085", "tcp6:8085")}, {}),
    ({"listen": ("tcp:0", "tcp:0:interface=127.0.0.1", "systemd:domain=INET:index=0")}, {"first_port": 1024}),
    ({"listen": ("tcp:8085:interface=chat.example",)}, {"taken": ((8085, "0.0.0.0"),)}),
    ({"admin": ()}, {}),
    ({"admin": ("tcp:8086:interface=10.0.0.7",)}, {}),
    ({"admin": ("unix:admin.socket",)}, {}),
    ({"listen": (LOCAL,), "rate": (0, 0)}, {}),
    ({"listen": (LOCAL,), "proxy_hops": 1}, {}),
    ({"listen": (LOCAL, "tcp:8087")}, {}),
    ({"listen": (f"haproxy:{LOCAL}",)}, {}),
    (HOOKS, {"command": "twistd\0chatd\0--webhook\0https://app.example/hook"}),
    ({"webhook": (WebhookAddress.parse("http://127.0.0.1:8000/hook"),)}, {}),
    ({"no_page": True, "title": "Team"}, {}),
    ({"login_url": "http://localhost:3000/login"}, {}),
    ({"stylesheet": Path("/srv/password")}, {"password": "/* url(https://x) */ p { background: url(/logo.svg) }"}),
    ({"stylesheet": Path("/srv/password")}, {"password": None}),
]


@pytest.mark.parametrize(("line", "settings", "machine"), BAD, ids=[f"{n}-{row[0][:24]}" for n, row in enumerate(BAD)])
def test_problem_is_one_line_with_the_option_and_the_remedy(line, settings, machine):
    (found,) = found_by(settings, machine)
    assert found.startswith(line)
    assert "\n" not in found
    assert re.fullmatch(r"(--[a-z-]+ .+?|open files|CHATD_\w+ .+?): .+: .+|--store memory: .+: .+", found)


@pytest.mark.parametrize(("settings", "machine"), GOOD)
def test_no_finding_just_short_of_a_problem(settings, machine):
    """Options and machines that only just pass have no findings."""
    assert found_by(settings, machine) == []


def test_every_problem_is_found():
    """One check reports all problems, and not only the first."""
    assert len(found_by({"ping": 99, "rooms": ("a",), "rate": (0, 0)}, {"files": 9})) == 4


def test_advised_history_fits_a_frame():
    """The advised --history is the largest whose first frame fits, whatever the messages contain."""
    most = int(re.search(r"at most (\d+)", found_by({"history": 1000})[0])[1])
    # No character is longer in JSON than a control character.
    largest = message_frame("abcdef", Entry(1, "\x01" * 30, "\x01" * 500, "2026-01-01T00:00:00.000Z"))
    assert check.FRAME - len(largest) < len(history_frame("abcdef", most, [largest] * most, more=True)) <= check.FRAME
    assert found_by({"history": most}) == []
    assert len(found_by({"history": most + 1})) == 1


def test_schema_that_the_page_does_not_fit():
    """The page sends a username and a message, and nothing else."""
    document = schema_with(color={"type": "string", "maxLength": 9}, size={"type": "integer"})
    fits = read(json.dumps(document).encode())
    assert found_by({"schema": FILE, "message": fits}) == []
    requires = read(json.dumps(document | {"required": ["username", "color", "message", "size"]}).encode())
    (found,) = found_by({"schema": FILE, "message": requires})
    assert found == "--schema /srv/password: it requires color, size, which the page does not send: use --no-page"
    assert found_by({"schema": FILE, "message": requires, "no_page": True}) == []


def test_history_of_long_messages():
    """The advice follows from the operator's own schema of messages."""
    message = read(json.dumps(schema_with(message={"type": "string", "maxLength": 8000})).encode())
    (found,) = found_by({"history": 100, "message": message})
    assert found.startswith(
        "--history 100: a first frame can be 4.7 MiB, and common clients accept 1 MiB: use at most 2"
    )
    assert found_by({"history": 20, "message": message}) == []


@pytest.mark.parametrize(
    ("text", "kind", "port", "address", "key"),
    [
        ("tcp:8085", "tcp", 8085, "0.0.0.0", None),
        ("tcp:port=8085:interface=localhost", "tcp", 8085, "127.0.0.1", None),
        ("tcp6:8085", "tcp6", 8085, "::", None),
        ("tcp6:8085:interface=\\:\\:1", "tcp6", 8085, "::1", None),
        ("tcp:8085:interface=chat.example", "tcp", 8085, None, None),
        ("ssl:443:privateKey=/a\\:\\\\b:certKey=c", "ssl", 443, "0.0.0.0", "/a:\\b"),
        ("ssl:port=443:privateKey=k", "ssl", 443, "0.0.0.0", "k"),
        ("tls:/etc/keys", "tls", 443, "::", None),
        ("tls:/etc/keys:8443:interface=192.0.2.7", "tls", 8443, "192.0.2.7", None),
        ("unix:/run/chatd.socket", "unix", 0, None, None),
        ("systemd:domain=INET:index=0", "systemd", 0, None, None),
    ],
)
@pytest.mark.parametrize("proxied", [False, True])
def test_endpoint_is_parsed_as_twisted_parses_it(text, kind, port, address, key, *, proxied):
    endpoint = Endpoint(f"haproxy:{text}" if proxied else text)
    assert (endpoint.kind, endpoint.port, endpoint.key, endpoint.proxied) == (kind, port, key, proxied)
    assert endpoint.address == (address and ip_address(address))


@pytest.mark.parametrize(
    ("url", "file", "server"),
    [
        ("redis://localhost", None, ("localhost", 6379, False, (), 0)),
        ("redis://:a%2Fb@localhost:7000/2", None, ("localhost", 7000, False, ("a/b",), 2)),
        ("rediss://an%40n:b@[::1]/", None, ("::1", 6379, True, ("an@n", "b"), 0)),
        ("redis://localhost", FILE, ("localhost", 6379, False, ("from a file",), 0)),
        ("redis://:b@localhost", FILE, ("localhost", 6379, False, ("from a file",), 0)),
        ("redis://ann@localhost", FILE, ("localhost", 6379, False, ("ann", "from a file"), 0)),
    ],
)
def test_redis_is_asked_with_the_login_of_the_server(url, file, server):
    """The check connects to Redis with the user, the password and the database of the server."""
    machine = FakeMachine()
    findings(SETTINGS._replace(store=url, store_password_file=file), machine)
    assert machine.servers == [server]


def test_redis_that_reports_nothing(monkeypatch):
    """Facts that Redis does not report are not findings."""
    monkeypatch.setattr(sys.modules[__name__], "WELL", {})
    assert found_by({"store": REDIS}) == []
