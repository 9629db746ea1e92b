"""What `--check` says: each rule with what it finds and what it does not, and the whole over a real process."""

import dataclasses
import json
import re
import resource
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.redises import Redis, each_binary
from support.servers import LONG, ROOT, TEXT, TWISTD, Raw, Server, certificate_for, environment, frame, numbered

from chatd.config import Configuration
from chatd.messages import Entry
from chatd.operate import check
from chatd.operate.check import Endpoint, RedisRefused, Unreached, findings
from chatd.operate.machine import ThisMachine
from chatd.store.base import DAY, Retention
from chatd.transport.frames import history_frame, message_frame

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
"""What a Redis says that keeps what it is given."""
KEY = "ssl:443:privateKey=a\\:b.pem:certKey=c.pem"


@dataclasses.dataclass
class FakeMachine:
    """A machine on which all is well, but for what a test says."""

    files: int = 65_536
    stop: float | None = None
    readable: Path | str = ""
    contents: str | None = ""
    lacking: Path | None = None
    locks: str = ""
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


def said(settings=(), machine=()):
    return findings(SETTINGS._replace(**dict(settings)), FakeMachine(**dict(machine)))


def test_of_the_defaults_on_a_good_machine_nothing_is_said():
    assert said() == []


LOCAL = "tcp:8085:interface=127.0.0.1"

# What is said, of which options, on what machine: one line.
BITES = [
    ("--ping 60: load balancers cut connections on which nothing is said for 60 s: ", {"ping": 60}, {}),
    ("open files: the limit of 1024 leaves room for 960 clients: raise it, with LimitNOFILE=", {}, {"files": 1024}),
    ("open files: the limit of 1087 leaves room for 1023 clients: ", {}, {"files": 1087}),
    ("open files: the limit of 50 leaves room for 0 clients: ", {}, {"files": 50}),
    (
        "--drain 30: systemd kills the server 20 s after it asked it to stop: set TimeoutStopSec=45 in the unit, or ",
        {},
        {"stop": 20.0},
    ),
    ("--drain 90: systemd kills the server 90 s after it asked it to stop: ", {"drain": 90}, {"stop": 90.0}),
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
    ("--store memory: all messages are gone when the server ends: ", {"store": "memory:"}, {}),
    (
        "--store sqlite:chatd.sqlite: /srv is missing, or this user cannot write it: ",
        {},
        {"lacking": Path("/srv"), "mounted": "nfs", "space": 0, "locks": "/srv/chatd.sqlite"},
    ),
    ("--store sqlite:chatd.sqlite: another chatd has it, ", {}, {"locks": "/srv/chatd.sqlite", "since": 99}),
    ("--store sqlite:chatd.sqlite: it is no chatd store: ", {}, {"since": 0}),
    (
        f"--store sqlite:chatd.sqlite: a newer chatd wrote it, in a way that needs format {check.FORMAT + 1}, ",
        {},
        {"since": check.FORMAT + 1},
    ),
    *(
        (
            f"--store sqlite:chatd.sqlite: SQLite's log and locks cannot be relied on over {kind}: ",
            {},
            {"mounted": kind},
        )
        for kind in sorted(check.SHARED)
    ),
    ("--store sqlite:chatd.sqlite: messages are gone with the machine, as all on tmpfs ", {}, {"mounted": "tmpfs"}),
    ("--store sqlite:chatd.sqlite: messages are gone with the machine, as all on ramfs ", {}, {"mounted": "ramfs"}),
    ("--store sqlite:chatd.sqlite: messages are gone with the container, as all on ", {}, {"mounted": "overlay"}),
    ("--store sqlite:chatd.sqlite: 255 MiB are free there: make room, ", {}, {"space": check.FREE - 1}),
    (
        "--history 1000: a first frame can be 3.1 MiB, and common clients take 1 MiB: give at most ",
        {"history": 1000},
        {},
    ),
    (
        "--history 1000: a first frame can be ",
        {"history": 1000, "retain": Retention(messages=500)},
        {},
    ),
    ("--history 1000: a first frame can be ", {"history": 1000, "retain": Retention(seconds=DAY)}, {}),
    ("--rooms team-* mai: who connects to / finds no room: add --rooms main", {"rooms": ("team-*", "mai")}, {}),
    *(
        (f"--origin {text}: browsers leave out {text.lower().split(':')[0]}'s own port, so none is of it: ", given, {})
        for text in ("https://chat.example:443", "http://chat.example:80", "HTTPS://*.chat.example:443")
        for given in [{"origin": ("https://good.example", text)}]
    ),
    *(
        (f"--origin {text}: it lets in all pages below .{domain}: name a domain of yours", {"origin": (text,)}, {})
        for text, domain in (("*.com", "com"), ("https://*.ORG", "org"), ("*.net:8080", "net"))
    ),
    (
        "--listen tcp:80: port 80 is for the privileged: ",
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
        (f"--admin {text}: whoever reaches this machine can see how it is and drain it: ", {"admin": (text,)}, {})
        for text in ("tcp:8086", "tcp:8086:interface=0.0.0.0", "tcp6:8086", "tcp:8086:interface=8.8.8.8")
    ),
    *(
        (
            "--rate 0: one client of anyone's can keep the server and its disk busy: ",
            {"rate": (0, 0), "listen": text},
            {},
        )
        for text in (("tcp:8085",), (LOCAL, "tls:/etc/keys"))
    ),
    *(
        (
            "--proxy-hops 0: clients come by way of a proxy on this machine, and are all one address ",
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
            f"--store redis://{host}: messages, and the password, can be read on their way to another machine: ",
            {"store": f"redis://{host}"},
            {},
        )
        for host in ("redis.example:6379/1", "192.0.2.7", "[2001:db8::7]:7000")
    ),
    (
        "CHATD_STORE_PASSWORD_FILE /srv/password: this user cannot read it: ",
        {"store": REDIS, "store_password_file": Path("password")},
        {"password": None, "redis": Unreached("nobody asks")},
    ),
    (
        "CHATD_STORE_PASSWORD_FILE /srv/password: every user of this machine can read the password: chmod o= /srv/pass",
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
        (f"--store {REDIS}: it is Redis {version}: have 6.2 or later", {"store": REDIS}, {"redis": facts})
        for version in ("6.0.16", "5.0.3")
        for facts in [{"redis_version": version}]
    ),
    (
        f"--store {REDIS}: it is a replica, by which db-1:6380 is found only while it lives: name that",
        {"store": REDIS},
        {"redis": {"role": "slave", "master_host": "db-1", "master_port": "6380"}},
    ),
    *(
        (
            f"--store {REDIS}: maxmemory-policy {policy} removes {what}, when memory is short: ",
            {"store": REDIS},
            {"redis": {"maxmemory_policy": policy}},
        )
        for policy, what in (
            ("allkeys-lru", "messages"),
            ("volatile-ttl", "labels, so that what is retried is kept twice"),
        )
    ),
    (
        f"--store {REDIS}: what came after the last snapshot is lost when Redis is killed: set appendonly yes and ",
        {"store": REDIS},
        {"redis": {"aof_enabled": "0", "appendfsync": "everysec"}},
    ),
    *(
        (
            f"--store {REDIS}: with appendfsync {text} the last acknowledged messages can go with the machine's ",
            {"store": REDIS},
            {"redis": {"appendfsync": text}},
        )
        for text in ("everysec", "no")
    ),
]
# Of which options, on what machine, nothing is said: each stops just short of what bites.
GOOD = [
    ({"ping": 59}, {}),
    ({}, {"files": 1088}),
    ({}, {"stop": 31.0}),
    ({}, {"stop": float("inf")}),
    ({"listen": (KEY,)}, {"readable": "/srv/a"}),
    ({"store": "memory.db", "store_password_file": Path("/nobody/reads/it")}, {}),
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
    ({"listen": ("tcp:0", "tcp:0:interface=127.0.0.1", "systemd:domain=INET:index=0")}, {"first_port": 1024}),
    ({"listen": ("tcp:8085:interface=chat.example",)}, {"taken": ((8085, "0.0.0.0"),)}),
    ({"admin": ()}, {}),
    ({"admin": ("tcp:8086:interface=10.0.0.7",)}, {}),
    ({"admin": ("unix:admin.socket",)}, {}),
    ({"listen": (LOCAL,), "rate": (0, 0)}, {}),
    ({"listen": (LOCAL,), "proxy_hops": 1}, {}),
    ({"listen": (LOCAL, "tcp:8087")}, {}),
    ({"listen": (f"haproxy:{LOCAL}",)}, {}),
]


@pytest.mark.parametrize(
    ("line", "settings", "machine"), BITES, ids=[f"{n}-{row[0][:24]}" for n, row in enumerate(BITES)]
)
def test_what_would_bite_is_said_in_one_line_with_the_option_and_the_remedy(line, settings, machine):
    (found,) = said(settings, machine)
    assert found.startswith(line)
    assert "\n" not in found
    assert re.fullmatch(r"(--[a-z-]+ .+?|open files|CHATD_\w+ .+?): .+: .+|--store memory: .+: .+", found)


@pytest.mark.parametrize(("settings", "machine"), GOOD)
def test_what_stops_short_of_it_is_not_mentioned(settings, machine):
    assert said(settings, machine) == []


def test_all_that_would_bite_is_said():
    assert len(said({"ping": 99, "rooms": ("a",), "rate": (0, 0)}, {"files": 9})) == 4


def test_the_history_that_is_advised_fits_a_frame_whatever_is_said_in_it():
    most = int(re.search(r"at most (\d+)", said({"history": 1000})[0])[1])
    # Nothing takes more room in JSON than a control character.
    largest = message_frame("abcdef", Entry(1, "\x01" * 30, "\x01" * 500, "2026-01-01T00:00:00.000Z"))
    assert check.FRAME - len(largest) < len(history_frame("abcdef", most, [largest] * most, more=True)) <= check.FRAME
    assert said({"history": most}) == []
    assert len(said({"history": most + 1})) == 1


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
def test_an_endpoint_is_read_as_twisted_reads_it(text, kind, port, address, key, *, proxied):
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
def test_a_redis_is_asked_as_the_server_would_ask_it(url, file, server):
    machine = FakeMachine()
    findings(SETTINGS._replace(store=url, store_password_file=file), machine)
    assert machine.servers == [server]


def test_of_a_redis_that_tells_nothing_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WELL", {})
    assert said({"store": REDIS}) == []


# A real process


def run_check(folder, *options, files=None, **environ):
    """Run `twistd chatd --check`; answers the exit code and the lines."""
    result = subprocess.run(
        [sys.executable, TWISTD, "-n", "--pidfile=", "chatd", "--check", *options],
        cwd=folder,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
        preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))),
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def test_a_process_says_what_would_bite_and_leaves_no_trace(tmp_path):
    arguments, _ = certificate_for(tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        options = (f"--listen=ssl:{port}:{arguments}", "--admin=", "--store=sqlite:nowhere/chatd.sqlite", "--ping=61")
        code, lines = run_check(tmp_path, *options, files=200)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()  # nor was it asked
    assert code == 1
    listen = f"--listen ssl:{port}:{arguments}"
    for line, begin in zip(
        lines,
        [
            f"{listen}: port {port} is in use: ",
            f"{listen}: every user of this machine can read the private key: chmod o= key.pem, ",
            "--store sqlite:nowhere/chatd.sqlite: nowhere is missing, ",
            "--ping 61: ",
            "open files: the limit of 200 leaves room for 136 clients: ",
        ],
        strict=True,
    ):
        assert line.startswith(begin)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_process_that_finds_nothing_says_so_and_leaves_no_trace(tmp_path):
    options = "--listen=tcp:0", "--admin=", "--store=sqlite:a.sqlite"
    settings = SETTINGS._replace(listen=("tcp:0",), admin=(), store="sqlite:a.sqlite", folder=tmp_path)
    expected = findings(settings, ThisMachine())  # which where tests are run may have something to say of
    assert run_check(tmp_path, *options) == (1 if expected else 0, expected or ["nothing to worry about"])
    assert [*tmp_path.iterdir()] == []


def test_a_process_asks_a_real_redis_and_leaves_no_trace_there(tmp_path):
    with Redis(tmp_path / "redis", user=("chatd", "se/cret"), maxmemory_policy="allkeys-lfu") as redis:
        (tmp_path / "password").write_text("se/cret\n")
        (tmp_path / "password").chmod(0o600)
        url = f"redis://chatd@localhost:{redis.port}"
        options = "--listen=tcp:0", "--admin="
        code, lines = run_check(tmp_path, *options, f"--store={url}", CHATD_STORE_PASSWORD_FILE="password")
        assert code == 1
        shown = f"--store redis://***@localhost:{redis.port}"
        for line, begin in zip(
            [line for line in lines if line.startswith("--store")],
            ["maxmemory-policy allkeys-lfu removes messages", "what came after the last snapshot is lost "],
            strict=True,
        ):
            assert line.startswith(f"{shown}: {begin}")
        code, lines = run_check(tmp_path, *options, f"--store={redis.url}")
        assert "every user of this machine can see the password" in lines[0]
        assert "cret" not in "\n".join(lines)
        assert redis.call("KEYS", "*") == []


# The user that operations.md has for a Redis


def documented_user():
    """The words of `ACL SETUSER` as the page has them, and those that are for --check."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    command, more = re.search(
        r"(?s)<!-- test: acl -->\n```sh\nredis-cli (.+?)\n```\n+and `(.+?)` for `--check`", page
    ).groups()
    return shlex.split(command.replace("\\\n", "")), shlex.split(more)


def test_it_may_do_just_what_the_code_asks_for():
    scripts = "".join(path.read_text() for path in (ROOT / "chatd" / "store" / "redis" / "lua").iterdir())
    asked = {*re.findall(r"redis\.call\('(\w+)'", scripts)}
    for path in (ROOT / "chatd" / "store" / "redis").glob("*.py"):
        asked |= {*re.findall(r"\bask\(\s*\"(\w+)\"", path.read_text())}
    asked = {word.lower() for word in asked - {"AUTH", "SCRIPT"}} | {"script|load"}  # anybody may say who he is
    assert {word[1:] for word in documented_user()[0] if word.startswith("+")} == asked


@each_binary
def binary(request):
    return request.param


def test_it_may_do_all_that_is_needed_and_is_asked_by_the_check(tmp_path, binary):
    words, more = documented_user()
    assert words[2:5] == ["chatd", "on", ">PASSWORD"]
    with Redis(tmp_path / "redis", binary=binary, appendonly=True, fsync="always") as redis:
        redis.call(*words)
        store = f"--store=redis://chatd:PASSWORD@localhost:{redis.port}/3"
        with Server(tmp_path, store, "--retain=5") as server, Raw(server.port) as ann, Raw(server.port) as bob:
            ann.join("/?events=presence,typing&username=ann")
            bob.join("/?events=presence,typing&username=bob")
            said = [json.dumps({"username": "bob", "message": "hi", "label": f"{number}"}) for number in range(9)]
            bob.send(b"".join(frame(TEXT, text.encode()) for text in said))
            acks = []
            while len(acks) < len(said):
                text = bob.json()
                assert text["type"] in ("presence", "message", "ack"), text
                acks += [text["id"]] if text["type"] == "ack" else []
            bob.send(frame(TEXT, json.dumps({"type": "history", "after": acks[-4], "label": "h"}).encode()))
            while (text := bob.json())["type"] == "presence":
                pass
            assert [number for number, *_ in numbered(text)] == [9, 10, 11]
            server.stop()
            assert "NOPERM" not in server.log.text
        with Server(tmp_path, store, "--retain=1d") as server:  # which trims by age when it comes
            server.stop()
        assert redis.call("ACL", "LOG") == []
        redis.call("ACL", "SETUSER", "chatd", *more)
        asked = ThisMachine().ask(check.Server("localhost", redis.port, False, ("chatd", "PASSWORD"), 3))  # noqa: FBT003
        assert (asked["role"], asked["appendfsync"]) == ("master", "always")
        assert redis.call("ACL", "LOG") == []
