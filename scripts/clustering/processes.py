"""The processes of a cluster: Redis, nodes, a HAProxy in front of them, and a link to Redis that can stall.

Each listens on an address of its own within 127.0.0.0/8, on a port that the kernel chose.  It keeps this port over
restarts.  Outgoing connections use 127.0.0.1, so none of them can take the port while its process is down.

The clients run in the same thread.  So waiting never blocks: it polls, or asks in another thread.
"""
# ruff: noqa: T201 -- a script prints

import argparse
import contextlib
import csv
import datetime as dt
import http.client
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Self

import hiredis
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.messages import Entry, Id

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent.parent
VENV: Final = ROOT / ".venv"
BALANCER, STORE, LINK = "127.0.0.2", "127.0.0.3", "127.0.0.4"
NODES: Final = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
"""Addresses of the loopback interface, one for each process."""
LONG: Final = 30.0
"""The timeout of every wait, in seconds."""
TICK: Final = 0.01
"""Seconds between two polls."""


class RigError(Exception):
    """The test cannot run; the text gives the reason and the remedy."""


def say(words: str) -> None:
    """Print a line of progress."""
    print(f"  {time.monotonic() - START:6.1f} s  {words}", flush=True)


START: Final = time.monotonic()


def sleep(reactor: Any, seconds: float) -> "Deferred[None]":
    """Return a Deferred that fires after a number of seconds."""
    return deferLater(reactor, seconds)


async def until(reactor: Any, true: Callable[[], object], what: Callable[[], str], seconds: float = LONG) -> None:
    """Poll until `true` returns true.  Raises RigError with the text of `what` after a timeout in seconds."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RigError(f"after {seconds:g} seconds: {what()}")
        await sleep(reactor, TICK)


def get(host: str, port: int, path: str) -> tuple[int, str]:
    """Return status and body of a GET request; the status is 0 if there is no response."""
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)


def free_port(host: str) -> int:
    """Return a free port of a host, which the kernel chooses."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


class Process:
    """A server of the cluster that can end and start again."""

    def __init__(self, reactor: Any, name: str, folder: pathlib.Path, host: str, core: int | None = None) -> None:
        self.reactor, self.name, self.host = reactor, name, host
        self.port = free_port(host)
        self.folder = folder / name
        self.folder.mkdir()
        self.core = core
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """Return the command line."""
        raise NotImplementedError

    async def is_ready(self) -> bool:
        """Return whether the process serves."""
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
            return True
        return False

    def start(self) -> None:
        """Start the process, always on the same port."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("CHATD_", "PYTHON"))}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- this module made the command
                self.command(),
                cwd=self.folder,
                env=kept | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if self.core is not None:
            os.sched_setaffinity(self._process.pid, {self.core})

    async def ready(self) -> float:
        """Wait until the process serves, and return the seconds that took.  Raises RigError after a timeout."""
        begin = time.monotonic()
        while not await self.is_ready():
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
            last = f"its last line is: {lines[-1] if lines else 'nothing'}"
            if self._process is None or self._process.poll() is not None:
                raise RigError(f"{self.name} has ended: {last}")
            if time.monotonic() > begin + LONG:
                raise RigError(f"{self.name} is not ready: {last}")
            await sleep(self.reactor, 0.05)
        return time.monotonic() - begin

    def signal(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self._process is not None:
            self._process.send_signal(number)

    async def ended(self, seconds: float = LONG) -> int:
        """Wait until the process ends, and return its status.  Raises RigError after a timeout in seconds."""
        process = self._process
        if process is None:
            raise RigError(f"{self.name} was never started")
        await until(self.reactor, lambda: process.poll() is not None, lambda: f"{self.name} has not ended", seconds)
        return int(process.returncode)

    def end(self) -> None:
        """Kill the process if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def cpu(self) -> float:
        """Return the CPU seconds of the process, in user and kernel mode."""
        pid = self._process.pid if self._process else 0
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Redis(Process):
    """The Redis that stores the rooms, with an append-only file."""

    def __init__(self, binary: str, fsync: str, *args: Any) -> None:
        super().__init__(*args)
        self._binary, self._fsync = binary, fsync

    @override
    def command(self) -> list[str]:
        options = {"bind": self.host, "port": self.port, "dir": self.folder, "save": "", "appendonly": "yes"}
        words = [f"--{name}={text}" for name, text in (options | {"appendfsync": self._fsync}).items()]
        return [self._binary, *itertools.chain.from_iterable(word.split("=", 1) for word in words)]

    @override
    async def is_ready(self) -> bool:
        try:
            return bool(self.ask("PING") == b"PONG")
        except (OSError, EOFError, hiredis.ReplyError):
            return False

    def ask(self, *words: str | int) -> Any:
        """Return the reply to a command.  Raises hiredis.ReplyError for an error reply."""
        with socket.create_connection((self.host, self.port), 5) as sock:
            sock.sendall(hiredis.pack_command(words))
            reader = hiredis.Reader()
            while (reply := reader.gets()) is False:
                data = sock.recv(1 << 16)
                if not data:
                    raise EOFError
                reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def log(self) -> list[Entry]:
        """Return the entries of the room from its stream."""
        entries = []
        for stream_id, fields in self.ask("XRANGE", "{chatd}:room:main", "-", "+"):
            known = {name.decode(): text.decode() for name, text in zip(fields[::2], fields[1::2], strict=True)}
            number, micros = map(int, stream_id.split(b"-"))
            moment = dt.datetime.fromtimestamp(micros // 1000 / 1000, dt.UTC).isoformat(timespec="milliseconds")
            entries.append(Entry(number, known["u"], known["m"], known.get("t") or moment.replace("+00:00", "Z")))
        return entries

    def info(self, section: str, name: str) -> int:
        """Return a number from a section of INFO."""
        found = re.search(rf"^{name}:(\d+)", self.ask("INFO", section).decode(), re.MULTILINE)
        return int(found[1]) if found else 0


class Node(Process):
    """A chatd node.  It is ready when /readyz returns 200 without degradation."""

    def __init__(self, store: str, options: Sequence[str], *args: Any) -> None:
        super().__init__(*args)
        self.admin_port = free_port(self.host)
        self._options = [*options, f"--store={store}"]

    @property
    def address(self) -> ServerAddress:
        """The address for clients."""
        return ServerAddress.parse(f"ws://{self.host}:{self.port}/")

    @override
    def command(self) -> list[str]:
        interface = f"interface={self.host}"
        endpoints = [f"--listen=tcp:{self.port}:{interface}:backlog=4096", f"--admin=tcp:{self.admin_port}:{interface}"]
        return [str(VENV / "bin/twistd"), "--nodaemon", "--pidfile=", "chatd", *endpoints, *self._options]

    @override
    async def is_ready(self) -> bool:
        return bool(await self.readiness() == (200, "ready\n"))

    def readiness(self) -> "Deferred[tuple[int, str]]":
        """Return status and body of /readyz."""
        return deferToThread(get, self.host, self.admin_port, "/readyz")

    def pages(self, epoch: str) -> list[Entry]:
        """Return the entries of the room, page by page."""
        entries: list[Entry] = []
        more = True
        with contextlib.closing(http.client.HTTPConnection(self.host, self.port, timeout=LONG)) as connection:
            while more:
                after = f"{epoch}-{entries[-1].number if entries else 0}"
                connection.request("GET", f"/rooms/main/messages?after={after}&limit=100")
                page = json.loads(connection.getresponse().read())
                if page.get("type") != "history":
                    say(f"{self.name} returned no page after {after}: {page}")
                    break
                number = Id.parse(page["id"]).number - len(page["data"])
                for place, one in enumerate(page["data"], number + 1):
                    entries.append(Entry(place, one["username"], one["message"], one["timestamp"]))
                more = page.get("more", False)
        return entries


class Balancer(Process):
    """The HAProxy to which clients connect.  It is ready when its statistics socket exists too."""

    def __init__(self, binary: str, nodes: Sequence[Node], clients: int, *args: Any) -> None:
        super().__init__(*args)
        self._binary, self._nodes, self._clients = binary, nodes, clients

    def configuration(self) -> str:
        """Return the text of haproxy.cfg."""
        servers = "\n".join(f"    server {node.name} {node.host}:{node.port}" for node in self._nodes)
        return f"""\
global
    maxconn {2 * self._clients + 100}
    stats socket {self.folder}/socket
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
    timeout check 2s
    timeout http-request 10s
    retries 3
    option redispatch 1
    option http-server-close
frontend chat
    bind {self.host}:{self.port}
    default_backend nodes
backend nodes
    balance leastconn
    option httpchk GET /readyz
    default-server check inter 500ms fall 1 rise 1
{servers}
"""

    @override
    def command(self) -> list[str]:
        (self.folder / "haproxy.cfg").write_text(self.configuration())
        return [self._binary, "-db", "-f", str(self.folder / "haproxy.cfg")]

    @override
    async def is_ready(self) -> bool:
        return (self.folder / "socket").exists() and await super().is_ready()

    def status(self) -> dict[str, tuple[bool, int]]:
        """Return whether each node is up, and its number of connections."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self.folder / "socket"))
            sock.sendall(b"show stat\n")
            text = sock.makefile().read()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        servers = [row for row in rows if row["pxname"] == "nodes" and row["svname"] != "BACKEND"]
        return {row["svname"]: (row["status"] == "UP", int(row["scur"])) for row in servers}

    async def up(self, *nodes: Node) -> None:
        """Wait until HAProxy sends clients to these nodes."""
        names = ", ".join(node.name for node in nodes)
        await until(
            self.reactor,
            lambda: all(self.status()[node.name][0] for node in nodes),
            lambda: f"HAProxy does not mark {names} up",
        )


class Link(Process):
    """A link to Redis that can stall: a HAProxy that forwards bytes until SIGSTOP stops it."""

    def __init__(self, binary: str, redis: Redis, *args: Any) -> None:
        super().__init__(*args)
        self._binary, self._redis = binary, redis

    @override
    def command(self) -> list[str]:
        (self.folder / "haproxy.cfg").write_text(f"""\
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen redis
    bind {self.host}:{self.port}
    server redis {self._redis.host}:{self._redis.port}
""")
        return [self._binary, "-db", "-f", str(self.folder / "haproxy.cfg")]


class Tools(NamedTuple):
    """The paths of the programs that a cluster needs besides chatd."""

    redis: str
    haproxy: str


class Cluster:
    """A Redis, nodes and a HAProxy.  The context manager kills them and removes their folder."""

    def __init__(
        self,
        reactor: Any,
        tools: Tools,
        options: argparse.Namespace,
        *,
        fsync: str = "everysec",
        link: bool = False,
        nodes: int = len(NODES),
        settings: Sequence[str] = (),
        cores: Sequence[int] = (),
    ) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="chatd-cluster-"))
        self._keep = options.keep
        store_core = cores[-1] if cores else None
        self.redis = Redis(tools.redis, fsync, reactor, "redis", self.folder, STORE, store_core)
        self.link = Link(tools.haproxy, self.redis, reactor, "link", self.folder, LINK) if link else None
        settings = [f"--drain={options.drain:g}", *settings]
        ways = [self.link or self.redis] + [self.redis] * (nodes - 1)
        self.nodes = [
            Node(
                f"redis://{way.host}:{way.port}/0",
                settings,
                reactor,
                f"node{place + 1}",
                self.folder,
                host,
                cores[place % max(1, len(cores) - 1)] if cores else None,
            )
            for place, (host, way) in enumerate(zip(NODES, ways, strict=False))
        ]
        self.balancer = Balancer(
            tools.haproxy, self.nodes, options.clients, reactor, "haproxy", self.folder, BALANCER, store_core
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in filter(None, (self.balancer, *self.nodes, self.link, self.redis)):
            process.end()
        if self._keep:
            say(f"kept: {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def start(self) -> None:
        """Start all processes, and wait until they serve."""
        for some in ([self.redis], [self.link] if self.link else [], self.nodes, [self.balancer]):
            for process in some:
                process.start()
            for process in some:
                await process.ready()
        await self.balancer.up(*self.nodes)
        nodes = " ".join(f"{node.host}:{node.port}" for node in self.nodes)
        say(
            f"redis at {self.redis.host}:{self.redis.port}, nodes at {nodes}, "
            f"haproxy at {self.balancer.host}:{self.balancer.port}"
        )

    def spread(self) -> str:
        """Return the number of connections of each node, as text."""
        return ", ".join(f"{name} {count}" for name, (_, count) in self.balancer.status().items())

    async def logs(self, epoch: str) -> dict[str, list[Entry]]:
        """Return the log as Redis and each node return it, by place."""
        logs = {"Redis": await deferToThread(self.redis.log)}
        for node in self.nodes:
            logs[node.name] = await deferToThread(node.pages, epoch)
        return logs
