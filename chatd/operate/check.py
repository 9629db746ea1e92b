"""`twistd chatd --check`: find problems in the options and on the machine before the server starts.

Each rule finds one kind of problem and yields one line with the option, the problem and the remedy.  The rules are
few on purpose: operators ignore a check that cries wolf, so matters of taste and guesses have no rule.  Rules ask one
object about the machine.  A check starts, binds and creates nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from chatd.config import Settings, veiled
from chatd.messages import Entry
from chatd.operate.admin_token import check_file
from chatd.room.log import MAIN
from chatd.store.base import timestamp
from chatd.store.memory import KEEP
from chatd.store.sqlite_file import FORMAT
from chatd.transport.admission import OWN_DOMAINS, room_pattern
from chatd.transport.frames import history_frame, message_frame
from chatd.transport.jwks import is_loopback

NOTHING: Final = "nothing to worry about"
"""The output of a check without findings."""
BALANCER_IDLE_SECONDS: Final = 60
"""The idle time-out of common load balancers and proxies."""
FILES: Final = 64
"""Files that the server itself has open: about 20, and a reserve for files that requests open briefly."""
CLIENTS: Final = 1024
"""Clients that a server should have room for.  The usual limit of 1,024 files is just too low."""
FRAME: Final = 1 << 20
"""The largest frame, in bytes, that common clients accept by default."""
FREE: Final = 256 << 20
"""Bytes that should be free on the disk of the store."""
SHARED: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gfs2", "lustre", "nfs", "nfs4", "ocfs2"}
    | {"smb3", "vboxsf"}
)
"""Network file systems, where SQLite's write-ahead log and locks do not work reliably."""
FLEETING: Final = {"tmpfs": "the machine", "ramfs": "the machine", "overlay": "the container"}
"""File systems that do not outlive the machine or the container."""
REDIS_PORT: Final = 6379
REDIS: Final = 6, 2
"""The oldest version of Redis that has the commands of the store."""
DURABLE: Final = ".memorydb."
"""Part of the host name of MemoryDB, which stores messages on several disks although its settings do not show it."""
_FOREIGN = re.compile(r"""(?i)(?:url\(\s*|@import\s+)["']?((?:[a-z][a-z0-9+.-]*:|//)[^"')\s;]{0,100})""")
"""A link of a stylesheet to another host, or to a scheme such as data:."""
DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
"""Ports that browsers leave out of an origin (RFC 6454, section 6.2)."""

IPAddress = IPv4Address | IPv6Address


class Server(NamedTuple):
    """The address and the login of a Redis."""

    host: str
    port: int
    tls: bool
    auth: tuple[str, ...]
    """The password, if there is one, after the user, if there is one."""
    database: int


class Unreached(Exception):
    """A Redis did not answer.  The text is the reason."""


class RedisRefused(Exception):
    """A Redis refused a command.  The text is the error of Redis."""


class Machine(Protocol):
    """The machine and the process, as rules ask about them."""

    def open_files(self) -> int:
        """Return the number of files that the process may have open."""

    def stop_seconds(self) -> float | None:
        """Return the seconds between systemd's request to stop this service and its kill; None if unknown."""

    def world_readable(self, path: Path) -> bool:
        """Return whether every user may read a file."""

    def unwritable(self, store: Path) -> Path | None:
        """Return the folder or file of a store that is missing or not writable; None if all are writable."""

    def locked(self, store: Path) -> bool:
        """Return whether a running server uses a store."""

    def names(self, store: Path) -> int:
        """Return the number of names (hard links) of a store; 1 if there is none."""

    def readable_since(self, store: Path) -> int | None:
        """Return the format that a server needs to read a store; 0 for a file that is no store; None if unknown."""

    def file_system(self, folder: Path) -> str:
        """Return the type of the file system of a folder; "" if unknown."""

    def free(self, folder: Path) -> int:
        """Return the number of bytes that this user can still write to a folder."""

    def listening(self, port: int) -> list[IPAddress]:
        """Return the addresses that sockets listen on at a TCP port."""

    def may_listen(self, port: int) -> bool:
        """Return whether this process has the privilege to listen on a port."""

    def command_line(self) -> str:
        """Return the command line of this process, which every user may see."""

    def secret(self, path: Path) -> str | None:
        """Return the content of a file with a password; None if it cannot be read."""

    def ask(self, server: Server) -> Mapping[str, str]:
        """Return the fields of INFO of a Redis, and `appendfsync`, without those that this user may not read.

        Raise Unreached or RedisRefused if Redis cannot be asked.
        """


class Endpoint:
    """The parts of a Twisted server endpoint that rules need, parsed from its description."""

    def __init__(self, text: str) -> None:
        fields = [re.sub(r"\\(.)", r"\1", field) for field in re.findall(r"(?:^|:)((?:\\.|[^:\\])*)", text)]
        self.proxied = fields[0] == "haproxy"
        """True if every connection begins with the client's address, in the PROXY protocol."""
        self.kind, *values = fields[self.proxied :]
        named = dict(value.split("=", 1) for value in values if "=" in value)
        unnamed = [value for value in values if "=" not in value]
        self.key = named.get("privateKey")
        """The file of the private key, if there is one."""
        self.port = 0
        """The TCP port; 0 without one, or if the kernel chooses it."""
        self.address: IPAddress | None = None
        """The address; None if unknown."""
        if self.kind in ("tcp", "tcp6", "ssl", "tls"):
            before = 1 if self.kind == "tls" else 0  # the folder of the certificates
            self.port = int(named.get("port") or [*unnamed, "443"][before])
            everywhere = "0.0.0.0" if self.kind in ("tcp", "ssl") else "::"  # noqa: S104 -- compared, not bound
            self.address = _address(named.get("interface") or everywhere)

    @property
    def public(self) -> bool:
        """True if other networks can reach it, unless a firewall prevents that."""
        return self.address is not None and (self.address.is_unspecified or self.address.is_global)

    @property
    def local(self) -> bool:
        """True if only this machine can reach it."""
        return self.kind == "unix" or (self.address is not None and self.address.is_loopback)


def _address(host: str) -> IPAddress | None:
    try:
        return ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def _collide(one: IPAddress, other: IPAddress) -> bool:
    """Return whether two sockets cannot listen on one port at these addresses."""
    return one == other or one.is_unspecified or other.is_unspecified


# The rules


def _ping(settings: Settings, _: Machine) -> Iterator[str]:
    if settings.ping >= BALANCER_IDLE_SECONDS:
        yield (
            f"--ping {settings.ping}: load balancers cut connections that are idle for {BALANCER_IDLE_SECONDS} s: "
            "ping more often, such as every 25 s"
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
            f"--drain {settings.drain}: systemd kills the server {seconds:g} s after the stop signal: "
            f"set TimeoutStopSec={settings.drain + 15} in the unit, or give a shorter drain"
        )


def _keys(settings: Settings, machine: Machine) -> Iterator[str]:
    for name, text, endpoint in _endpoints(settings):
        if endpoint.key is not None and machine.world_readable(Path(endpoint.key)):
            yield (
                f"--{name} {text}: every user of this machine can read the private key: "
                f"chmod o= {endpoint.key}, and replace the key"
            )


def _secret(settings: Settings, machine: Machine) -> Iterator[str]:
    file = settings.jwt_key
    if file is not None and machine.world_readable(file) and "-----BEGIN " not in (machine.secret(file) or ""):
        yield (
            f"--jwt-key {file}: every user of this machine can read the secret: chmod o= {file}, and replace the secret"
        )


def _store(settings: Settings, machine: Machine) -> Iterator[str]:
    kind, _, rest = settings.store.partition(":")
    option = f"--store {settings.store}"
    if kind == "memory":
        kept = f", and each room keeps {KEEP:,} at most" if settings.retain.messages is None else ""
        yield f"{option} all messages are lost when the server stops{kept}: store them with --store sqlite:PATH"
    if kind != "sqlite":
        return
    path = settings.folder / rest
    unwritable = machine.unwritable(path)
    if unwritable is not None:
        yield f"{option}: {unwritable} is missing, or this user cannot write it: create it, or make it writable"
        return
    yield from _store_file(option, path, machine)
    file_system = machine.file_system(path.parent)
    if file_system in SHARED:
        yield f"{option}: SQLite's log and locks are not reliable on {file_system}: name a file on a local disk"
    if file_system in FLEETING:
        yield (
            f"{option}: {file_system} does not outlive {FLEETING[file_system]}, and messages are lost with it: "
            "name a file on a disk or a permanent volume"
        )
    free = machine.free(path.parent)
    if free < FREE:
        yield f"{option}: its disk has {free >> 20} MiB free: free some space, or store less with --retain"


def _store_file(option: str, path: Path, machine: Machine) -> Iterator[str]:
    names = machine.names(path)
    if names > 1:
        yield f"{option}: the file has {names} names (hard links), and a store may have only one: remove the others"
    readable = next((file for file in (path, Path(f"{path}-wal")) if machine.world_readable(file)), None)
    if readable is not None:
        yield f"{option}: every user of this machine can read the messages in {readable}: chmod o= {readable}"
    if machine.locked(path):
        yield f"{option}: another chatd uses it: stop that one, name another file, or share a redis://"
    elif (since := machine.readable_since(path)) == 0:
        yield f"{option}: the file is not a chatd store: name another file"
    elif since is not None and since > FORMAT:
        yield (
            f"{option}: a newer chatd wrote it in format {since}, and this one reads up to format {FORMAT}: "
            "run that version"
        )


def _redis(settings: Settings, machine: Machine) -> Iterator[str]:
    url = urlsplit(settings.store)
    if url.scheme not in ("redis", "rediss"):
        return
    option = f"--store {veiled(settings.store)}"
    if url.password and settings.store in machine.command_line():
        yield (
            f"{option}: every user of this machine can see the password in the command line (ps): "
            "put it into a file and name that with --store-password-file"
        )
    host = url.hostname or ""
    address = _address(host)
    if url.scheme == "redis" and not (address and address.is_loopback):
        yield (f"{option}: the network can read messages and the password: let Redis speak TLS, and use rediss://")
    password = unquote(url.password) if url.password else None
    if settings.store_password_file:
        file = settings.folder / settings.store_password_file
        password = machine.secret(file)
        if password is None:
            yield f"--store-password-file {file}: this user cannot read it: create it, or chown it"
            return
        if machine.world_readable(file):
            yield (
                f"--store-password-file {file}: every user of this machine can read the password: "
                f"chmod o= {file}, and replace the password"
            )
    auth = () if password is None else (password,) if not url.username else (unquote(url.username), password)
    server = Server(host, url.port or REDIS_PORT, url.scheme == "rediss", auth, int(url.path.lstrip("/") or 0))
    try:
        facts = machine.ask(server)
    except Unreached as error:
        yield f"{option}: Redis cannot be reached ({error}): start it, or correct the address"
    except RedisRefused as error:
        yield f"{option}: Redis refuses ({error}): correct the user, the password or the database"
    else:
        yield from (f"{option}: {line}" for line in _of_redis(facts, durable=DURABLE in host))


def _config(settings: Settings, machine: Machine) -> Iterator[str]:
    file = settings.config
    if file is None or not urlsplit(settings.store).password or not machine.world_readable(file):
        return
    if settings.store in (machine.secret(file) or ""):
        yield f"--config {file}: every user of this machine can read the password of Redis in it: chmod o= {file}"


def _of_redis(facts: Mapping[str, str], *, durable: bool) -> Iterator[str]:
    """Yield the problems of a Redis; a `durable` one stores every message although its settings do not show it."""
    version = facts.get("redis_version", "")
    number = re.match(r"(\d+)\.(\d+)", version)
    if number and (int(number[1]), int(number[2])) < REDIS:
        yield f"it is Redis {version}: use 6.2 or later, or Valkey"
    if facts.get("role") == "slave":
        primary = f"{facts.get('master_host')}:{facts.get('master_port')}"
        yield f"it is a replica of {primary}, which must be up for the server to start: name the primary instead"
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        what = "labels, so retried posts are stored twice" if policy.startswith("volatile") else "messages"
        yield f"with maxmemory-policy {policy}, short memory removes {what}: set maxmemory-policy noeviction"
    if durable:
        return
    if facts.get("aof_enabled") == "0":
        yield (
            "a kill of Redis loses the messages since its last snapshot: "
            "set appendonly yes and appendfsync always in its configuration"
        )
    elif facts.get("appendfsync", "always") != "always":
        yield (
            f"with appendfsync {facts['appendfsync']}, a power failure can lose the last acknowledged messages: "
            "set appendfsync always, or accept that"
        )


def _history(settings: Settings, _: Machine) -> Iterator[str]:
    largest = message_frame("", Entry(1, "\0" * 30, "\0" * 500, timestamp(0)))
    one, two = (len(history_frame("", 1, [largest] * count)) for count in (1, 2))
    size = two - one if settings.message is None else settings.message.longest
    most = FRAME // size
    if min(settings.history, settings.retain.messages or settings.history) > most:
        yield (
            f"--history {settings.history}: a first frame can be {settings.history * size / (1 << 20):.1f} MiB, "
            f"and common clients accept 1 MiB: use at most {most}; clients can read the rest in pages"
        )


def _rooms(settings: Settings, _: Machine) -> Iterator[str]:
    if settings.rooms and not any(re.match(room_pattern(text), MAIN) for text in settings.rooms):
        yield f"--rooms {' '.join(settings.rooms)}: clients that connect to / find no room: add --rooms {MAIN}"


def _origins(settings: Settings, _: Machine) -> Iterator[str]:
    for text in settings.origin:
        place = re.fullmatch(r"(https?)://.+:(\d+)", text.lower())
        if place and DEFAULT_PORTS[place[1]] == place[2]:
            yield f"--origin {text}: browsers leave out the default port, so no page matches: remove :{place[2]}"
        domain = re.fullmatch(r"(?:https?://)?\*\.([^.:]+)(?::\d+)?", text.lower())
        if domain and domain[1] not in OWN_DOMAINS:
            yield f"--origin {text}: it allows every page below .{domain[1]}: name a domain of yours"


def _ports(settings: Settings, machine: Machine) -> Iterator[str]:
    ours: list[tuple[int, IPAddress]] = []
    for name, text, endpoint in _endpoints(settings):
        port, address = endpoint.port, endpoint.address
        if not port or address is None:
            continue
        if not machine.may_listen(port):
            yield (
                f"--{name} {text}: port {port} needs a privilege: choose a higher one, or set "
                "AmbientCapabilities=CAP_NET_BIND_SERVICE in the systemd unit"
            )
        # Beside a port for IPv4, the server opens one for IPv6 alone.
        own = [other for number, other in ours if number == port and other.version == address.version]
        if any(_collide(address, other) for other in (*machine.listening(port), *own)):
            yield f"--{name} {text}: port {port} is in use: choose another, or stop the other program (ss -ltnp)"
        ours.append((port, address))


def _admin(settings: Settings, machine: Machine) -> Iterator[str]:
    if settings.admin_token_file is not None:
        file = settings.folder / settings.admin_token_file
        try:
            check_file(file, machine.secret(file))
        except ValueError as error:
            yield str(error)
        else:
            if machine.world_readable(file):
                yield (
                    f"--admin-token-file {file}: every user of this machine can read the token: "
                    f"chmod o= {file}, and replace the token"
                )
    for text in settings.admin:
        if Endpoint(text).public and settings.admin_token_file is None:
            yield (
                f"--admin {text}: everyone who can reach this machine can drain the server: "
                "add :interface=127.0.0.1, or an address of a private network, or set --admin-token-file"
            )


def _webhooks(settings: Settings, machine: Machine) -> Iterator[str]:
    key = settings.webhook_key
    if key is not None and machine.world_readable(key):
        yield (
            f"--webhook-key {key}: every user of this machine can read the keys: chmod o= {key}, and replace the keys"
        )
    for address in settings.webhook:
        host = urlsplit(address.origin).hostname or ""
        if address.authorization is not None and f"@{host}" in machine.command_line().lower():
            yield (
                f"--webhook {address.origin}: every user of this machine can see the password in the command line "
                "(ps): put the URL into the environment, as CHATD_WEBHOOK"
            )
        if address.origin.startswith("http:") and not is_loopback(host):
            yield f"--webhook {address.origin}: the network can read the messages: use https"


def _page(settings: Settings, machine: Machine) -> Iterator[str]:
    url = urlsplit(settings.login_url)
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        yield f"--login-url {settings.login_url}: the network can read the tokens that come from it: use https"
    if settings.stylesheet is not None:
        css = machine.secret(settings.stylesheet) or ""
        foreign = _FOREIGN.search(re.sub(r"(?s)/\*.*?\*/", "", css))
        if foreign:
            yield (
                f"--stylesheet {settings.stylesheet}: the policy of the page lets browsers load nothing from "
                f"{foreign[1]}: remove it"
            )
    if settings.no_page:
        for name in ("stylesheet", "login_url"):
            if getattr(settings, name):
                option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
                yield f"{option}: there is no page with --no-page: give one of them"
    elif settings.message is not None:
        unsent = [name for name in settings.message.form.schema["required"] if name not in ("username", "message")]
        if unsent:
            fields = ", ".join(unsent)
            yield f"--schema {settings.schema}: it requires {fields}, which the page does not send: use --no-page"


def _rate(settings: Settings, _: Machine) -> Iterator[str]:
    if not settings.rate[0] and any(Endpoint(text).public for text in settings.listen):
        yield "--rate 0: a single client can keep the server and its disk busy: set a rate, such as 20:40"


def _proxy(settings: Settings, _: Machine) -> Iterator[str]:
    endpoints = [Endpoint(text) for text in settings.listen]
    behind = all(endpoint.local and not endpoint.proxied for endpoint in endpoints)
    if behind and settings.rate[0] and not settings.proxy_hops:
        yield (
            "--proxy-hops 0: all clients of a proxy on this machine have one address, and share one --rate "
            "for HTTP posts and reads: use --proxy-hops 1, or listen at haproxy:tcp:..."
        )


def _endpoints(settings: Settings) -> list[tuple[str, str, Endpoint]]:
    """Return every endpoint, with its option and its text."""
    given = [*(("listen", text) for text in settings.listen), *(("admin", text) for text in settings.admin)]
    return [(name, text, Endpoint(text)) for name, text in given]


RULES: Final[tuple[Callable[[Settings, Machine], Iterator[str]], ...]] = (
    *(_ports, _keys, _secret, _admin, _proxy, _store, _config, _redis),
    *(_history, _rooms, _origins, _page, _webhooks, _rate, _ping, _stop, _files),
)


def exposures(settings: Settings) -> list[str]:
    """Return one line for each way in which ports beyond this machine are open to everyone.

    They are no findings: a server for everyone is a good use.  The server logs them when it starts.
    """
    ports = " ".join(f"--listen {text}" for text in settings.listen if not Endpoint(text).local)
    lines = []
    if ports and not settings.tokens:
        lines.append(
            f"{ports}: everyone who reaches this port can read and post in every room, under any name: "
            "ask for tokens with --jwt-key or --jwks, or add :interface=127.0.0.1"
        )
    if ports and "*" in settings.origin:
        lines.append("--origin *: every web page can use this server in the browsers of its visitors: name your pages")
    return lines


def findings(settings: Settings, machine: Machine) -> list[str]:
    """Return the findings of all rules, one line each."""
    return [line for rule in RULES for line in rule(settings, machine)]
