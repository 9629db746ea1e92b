"""What would bite: the options and the machine, looked at before anything is started (`twistd chatd --check`).

Each rule knows one kind of trouble, and says of what it finds, in one line, the option, the trouble and the remedy.
The rules are few on purpose: what is a matter of taste, and what cannot be told from here, is not said, for nobody
reads a check that cries wolf.  What a rule has to know of the machine it asks of one object; nothing is started, bound
or created.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from chatd.config import Settings, veiled
from chatd.messages import Entry
from chatd.room.log import MAIN
from chatd.store.base import timestamp
from chatd.store.sqlite_file import FORMAT
from chatd.transport.admission import room_pattern
from chatd.transport.frames import history_frame, message_frame

NOTHING: Final = "nothing to worry about"
"""What is said when no rule finds anything."""
IDLE_SECONDS: Final = 60
"""How long the usual load balancers and proxies keep a connection on which nothing is said."""
FILES: Final = 64
"""How many files the server itself may have open: about 20, and those that a request opens for a moment."""
CLIENTS: Final = 1024
"""How many clients a server should have room for; the usual limit of 1,024 files is just too low."""
FRAME: Final = 1 << 20
"""Bytes of a frame that common clients take, unless they are told otherwise."""
FREE: Final = 256 << 20
"""Bytes that should be free under the store."""
SHARED: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gfs2", "lustre", "nfs", "nfs4", "ocfs2"}
    | {"smb3", "vboxsf"}
)
"""File systems of several machines, by which SQLite's write-ahead log cannot be shared, nor its locks relied on."""
FLEETING: Final = {"tmpfs": "the machine", "ramfs": "the machine", "overlay": "the container"}
"""File systems that are gone with something."""
OWN_DOMAINS: Final = frozenset({"example", "internal", "invalid", "lan", "local", "localhost", "test"})
"""Top-level domains that are nobody's (RFC 2606, RFC 6762), below which there can be one's own hosts only."""
REDIS_PORT: Final = 6379
REDIS: Final = 6, 2
"""The oldest version of Redis whose commands the store can do with."""
DURABLE: Final = ".memorydb."
"""In the name of a Redis that has every message on several disks before it answers, though it says nothing of that."""
DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
"""Ports that are left out of an origin as browsers send it (RFC 6454, section 6.2)."""

Address = IPv4Address | IPv6Address


class Server(NamedTuple):
    """A Redis, and how to be let in."""

    host: str
    port: int
    tls: bool
    auth: tuple[str, ...]
    """The user, if one is named, and the password, if there is one."""
    database: int


class Unreached(Exception):
    """A Redis does not answer; the words say why."""


class RedisRefused(Exception):
    """A Redis does not let us in; the words are its own."""


class Machine(Protocol):
    """What there is to know of the machine and of the process."""

    def open_files(self) -> int:
        """How many files the process may have open."""

    def stop_seconds(self) -> float | None:
        """How long systemd waits, once it asked this service to stop, before it kills it; None if it cannot be told."""

    def world_readable(self, path: Path) -> bool:
        """Whether every user may read a file."""

    def unwritable(self, store: Path) -> Path | None:
        """What of a store's folder and its files is missing or cannot be written by this user; None if all can."""

    def locked(self, store: Path) -> bool:
        """Whether a server has a store now."""

    def readable_since(self, store: Path) -> int | None:
        """Since which format a store can be read; 0 if it is no store; None if there is none or it cannot be told."""

    def file_system(self, folder: Path) -> str:
        """The type of the file system that a folder is on."""

    def free(self, folder: Path) -> int:
        """How many bytes this user can write there."""

    def listening(self, port: int) -> list[Address]:
        """The addresses on which a TCP port is listened on now."""

    def may_listen(self, port: int) -> bool:
        """Whether this process is privileged enough for a port."""

    def command_line(self) -> str:
        """The command line of this process, which every user may see."""

    def secret(self, path: Path) -> str | None:
        """What a file with a password says; None if it cannot be read."""

    def ask(self, server: Server) -> Mapping[str, str]:
        """What a Redis says of itself, as far as it tells: the fields of INFO, and `appendfsync`.

        Unreached or Refused, if it tells nothing since it cannot be asked.
        """


class Endpoint:
    """A Twisted server endpoint, read from its description as far as rules ask for it."""

    def __init__(self, text: str) -> None:
        fields = [re.sub(r"\\(.)", r"\1", field) for field in re.findall(r"(?:^|:)((?:\\.|[^:\\])*)", text)]
        self.proxied = fields[0] == "haproxy"
        """Whether a proxy says with each connection whom it is from."""
        self.kind, *values = fields[self.proxied :]
        named = dict(value.split("=", 1) for value in values if "=" in value)
        unnamed = [value for value in values if "=" not in value]
        self.key = named.get("privateKey")
        """The file of its private key, if it names one."""
        self.port = 0
        """The TCP port; 0 if that is not given there, or is for the kernel to choose."""
        self.address: Address | None = None
        """The address; None if it cannot be told."""
        if self.kind in ("tcp", "tcp6", "ssl", "tls"):
            before = 1 if self.kind == "tls" else 0  # the folder of its certificates
            self.port = int(named.get("port") or [*unnamed, "443"][before])
            everywhere = "0.0.0.0" if self.kind in ("tcp", "ssl") else "::"  # noqa: S104 -- it is told, not bound
            self.address = _address(named.get("interface") or everywhere)

    @property
    def public(self) -> bool:
        """Whether it can be reached from anywhere, if no firewall keeps it from that."""
        return self.address is not None and (self.address.is_unspecified or self.address.is_global)

    @property
    def local(self) -> bool:
        """Whether it can be reached from this machine only."""
        return self.kind == "unix" or (self.address is not None and self.address.is_loopback)


def _address(host: str) -> Address | None:
    try:
        return ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def _collide(one: Address, other: Address) -> bool:
    """Whether one port cannot be listened on at both addresses."""
    return one == other or one.is_unspecified or other.is_unspecified


# The rules


def _ping(settings: Settings, _: Machine) -> Iterator[str]:
    if settings.ping >= IDLE_SECONDS:
        yield (
            f"--ping {settings.ping}: load balancers cut connections on which nothing is said for {IDLE_SECONDS} s: "
            "give less than that, such as 25"
        )


def _files(_: Settings, machine: Machine) -> Iterator[str]:
    files = machine.open_files()
    if files < FILES + CLIENTS:
        yield (
            f"open files: the limit of {files} leaves room for {max(0, files - FILES)} clients: "
            "raise it, with LimitNOFILE=65536 in the systemd unit, or with ulimit -n 65536"
        )


def _stop(settings: Settings, machine: Machine) -> Iterator[str]:
    seconds = machine.stop_seconds()
    if seconds is not None and seconds <= settings.drain:
        yield (
            f"--drain {settings.drain}: systemd kills the server {seconds:g} s after it asked it to stop: "
            f"set TimeoutStopSec={settings.drain + 15} in the unit, or give a shorter drain"
        )


def _keys(settings: Settings, machine: Machine) -> Iterator[str]:
    for name, text, endpoint in _endpoints(settings):
        if endpoint.key is not None and machine.world_readable(Path(endpoint.key)):
            yield (
                f"--{name} {text}: every user of this machine can read the private key: "
                f"chmod o= {endpoint.key}, and think of a new key"
            )


def _store(settings: Settings, machine: Machine) -> Iterator[str]:
    kind, _, rest = settings.store.partition(":")
    said = f"--store {settings.store}"
    if kind == "memory":
        yield f"{said} all messages are gone when the server ends: keep them, with --store sqlite:PATH"
    if kind != "sqlite":
        return
    path = settings.folder / rest
    lacking = machine.unwritable(path)
    if lacking is not None:
        yield f"{said}: {lacking} is missing, or this user cannot write it: make it, or make it writable"
        return
    if machine.locked(path):
        yield f"{said}: another chatd has it, and a file is for one: stop that one, name another file, or share a redis://"
    elif (since := machine.readable_since(path)) == 0:
        yield f"{said}: it is no chatd store: name another file"
    elif since is not None and since > FORMAT:
        yield (
            f"{said}: a newer chatd wrote it, in a way that needs format {since}, and this one knows {FORMAT}: "
            "run that version"
        )
    file_system = machine.file_system(path.parent)
    if file_system in SHARED:
        yield f"{said}: SQLite's log and locks cannot be relied on over {file_system}: name a file on a disk of its own"
    if file_system in FLEETING:
        yield (
            f"{said}: messages are gone with {FLEETING[file_system]}, as all on {file_system} is: "
            "name a file on a disk or a volume that stays"
        )
    free = machine.free(path.parent)
    if free < FREE:
        yield f"{said}: {free >> 20} MiB are free there: make room, or keep less with --retain"


def _redis(settings: Settings, machine: Machine) -> Iterator[str]:
    url = urlsplit(settings.store)
    if url.scheme not in ("redis", "rediss"):
        return
    said = f"--store {veiled(settings.store)}"
    if url.password and settings.store in machine.command_line():
        yield (
            f"{said}: every user of this machine can see the password in the command line (ps): "
            "put it into a file that CHATD_STORE_PASSWORD_FILE names"
        )
    host = url.hostname or ""
    address = _address(host)
    if url.scheme == "redis" and not (address and address.is_loopback):
        yield (
            f"{said}: messages, and the password, can be read on their way to another machine: "
            "have Redis speak TLS, and give rediss://"
        )
    password = unquote(url.password) if url.password else None
    if settings.store_password_file:
        file = settings.folder / settings.store_password_file
        password = machine.secret(file)
        if password is None:
            yield f"CHATD_STORE_PASSWORD_FILE {file}: this user cannot read it: make it, or chown it"
            return
        if machine.world_readable(file):
            yield (
                f"CHATD_STORE_PASSWORD_FILE {file}: every user of this machine can read the password: "
                f"chmod o= {file}, and think of a new password"
            )
    auth = () if password is None else (password,) if not url.username else (unquote(url.username), password)
    server = Server(host, url.port or REDIS_PORT, url.scheme == "rediss", auth, int(url.path.lstrip("/") or 0))
    try:
        facts = machine.ask(server)
    except Unreached as error:
        yield f"{said}: Redis cannot be reached ({error}): start it, or name where it is"
    except RedisRefused as error:
        yield f"{said}: Redis refuses ({error}): correct the user, the password or the database"
    else:
        yield from (f"{said}: {line}" for line in _of_redis(facts, durable=DURABLE in host))


def _config(settings: Settings, machine: Machine) -> Iterator[str]:
    file = settings.config
    if file is None or not urlsplit(settings.store).password or not machine.world_readable(file):
        return
    if settings.store in (machine.secret(file) or ""):
        yield f"--config {file}: every user of this machine can read the password of Redis in it: chmod o= {file}"


def _of_redis(facts: Mapping[str, str], *, durable: bool) -> Iterator[str]:
    """What would bite of what a Redis says of itself; `durable` is one that keeps all without saying how."""
    version = facts.get("redis_version", "")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number and (int(number[1]), int(number[2])) < REDIS:
        yield f"it is Redis {version}: have 6.2 or later, or Valkey"
    if facts.get("role") == "slave":
        primary = f"{facts.get('master_host')}:{facts.get('master_port')}"
        yield f"it is a replica, by which {primary} is found only while it lives: name that, or what leads to it"
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        what = "labels, so that what is retried is kept twice" if policy.startswith("volatile") else "messages"
        yield f"maxmemory-policy {policy} removes {what}, when memory is short: set maxmemory-policy noeviction"
    if durable:
        return
    if facts.get("aof_enabled") == "0":
        yield (
            "what came after the last snapshot is lost when Redis is killed: "
            "set appendonly yes and appendfsync always in its configuration"
        )
    elif facts.get("appendfsync", "always") != "always":
        yield (
            f"with appendfsync {facts['appendfsync']} the last acknowledged messages can go with the machine's power: "
            "set appendfsync always, or accept that"
        )


def _history(settings: Settings, _: Machine) -> Iterator[str]:
    largest = message_frame("", Entry(1, "\0" * 30, "\0" * 500, timestamp(0)))
    one, two = (len(history_frame("", 1, [largest] * count)) for count in (1, 2))
    most = FRAME // (two - one)
    if min(settings.history, settings.retain.messages or settings.history) > most:
        yield (
            f"--history {settings.history}: a first frame can be {settings.history * (two - one) / (1 << 20):.1f} MiB, "
            f"and common clients take 1 MiB: give at most {most}; clients can ask for the rest by pages"
        )


def _rooms(settings: Settings, _: Machine) -> Iterator[str]:
    if settings.rooms and not any(re.match(room_pattern(text), MAIN) for text in settings.rooms):
        yield f"--rooms {' '.join(settings.rooms)}: who connects to / finds no room: add --rooms {MAIN}"


def _origins(settings: Settings, _: Machine) -> Iterator[str]:
    for text in settings.origin:
        place = re.fullmatch(r"(https?)://.+:(\d+)", text.lower())
        if place and DEFAULT_PORTS[place[1]] == place[2]:
            yield f"--origin {text}: browsers leave out {place[1]}'s own port, so none is of it: leave out :{place[2]}"
        domain = re.fullmatch(r"(?:https?://)?\*\.([^.:]+)(?::\d+)?", text.lower())
        if domain and domain[1] not in OWN_DOMAINS:
            yield f"--origin {text}: it lets in all pages below .{domain[1]}: name a domain of yours"


def _ports(settings: Settings, machine: Machine) -> Iterator[str]:
    ours: list[tuple[int, Address]] = []
    for name, text, endpoint in _endpoints(settings):
        port, address = endpoint.port, endpoint.address
        if not port or address is None:
            continue
        if not machine.may_listen(port):
            yield (
                f"--{name} {text}: port {port} is for the privileged: choose a higher one, or set "
                "AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit"
            )
        taken = [*machine.listening(port), *(other for number, other in ours if number == port)]
        if any(_collide(address, other) for other in taken):
            yield f"--{name} {text}: port {port} is in use: choose another, or stop what listens there (ss -ltnp)"
        ours.append((port, address))


def _admin(settings: Settings, _: Machine) -> Iterator[str]:
    for text in settings.admin:
        if Endpoint(text).public:
            yield (
                f"--admin {text}: whoever reaches this machine can see how it is and drain it: "
                "add :interface=127.0.0.1, or an address of a private network"
            )


def _rate(settings: Settings, _: Machine) -> Iterator[str]:
    if not settings.rate[0] and any(Endpoint(text).public for text in settings.listen):
        yield "--rate 0: one client of anyone's can keep the server and its disk busy: give a rate, such as 20:40"


def _proxy(settings: Settings, _: Machine) -> Iterator[str]:
    endpoints = [Endpoint(text) for text in settings.listen]
    behind = all(endpoint.local and not endpoint.proxied for endpoint in endpoints)
    if behind and settings.rate[0] and not settings.proxy_hops:
        yield (
            "--proxy-hops 0: clients come by way of a proxy on this machine, and are all one address to the server, "
            "with one --rate for what they post over HTTP: give --proxy-hops 1, or listen as haproxy:tcp:..."
        )


def _endpoints(settings: Settings) -> list[tuple[str, str, Endpoint]]:
    """Each endpoint, after the option and the text that it was given by."""
    given = [*(("listen", text) for text in settings.listen), *(("admin", text) for text in settings.admin)]
    return [(name, text, Endpoint(text)) for name, text in given]


RULES: Final[tuple[Callable[[Settings, Machine], Iterator[str]], ...]] = (
    *(_ports, _keys, _admin, _proxy, _store, _config, _redis, _history, _rooms, _origins, _rate, _ping, _stop, _files),
)


def findings(settings: Settings, machine: Machine) -> list[str]:
    """All that would bite, a line each; none when nothing would."""
    return [line for rule in RULES for line in rule(settings, machine)]
