"""The reports of Linux, systemd and Redis, for `--check`.  Reading it changes nothing.

Whatever cannot be read counts as in order: the server reports its own problems when it starts.
"""

import fcntl
import ipaddress
import math
import os
import re
import resource
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

import hiredis
from typing_extensions import override

from chatd.operate.check import IPAddress, Machine, RedisRefused, Server, Unreached
from chatd.store.sqlite_file import APPLICATION_ID

_T = TypeVar("_T")
LISTENING: Final = "0A"
"""The state of a socket in /proc/net/tcp."""
CAP_NET_BIND_SERVICE: Final = 1 << 10
"""The capability to listen on any port."""
REDIS_SECONDS: Final = 5
"""The time that Redis has to accept a connection, and for each reply."""
FORBIDDEN: Final = "NOPERM", "ERR unknown command"
"""How an error of Redis begins when this user, or every user, may not run the command."""
UNIT_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
"""The units of time spans that systemd prints (systemd.time(7)), up to weeks."""


def timeout_of(unit: str) -> str:
    """Return the time that systemd waits for a unit to stop, as systemctl prints it; "" if there is no answer."""
    command = ["systemctl", "show", "--property=TimeoutStopUSec", "--value", unit]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout  # noqa: S603 -- our own
    except (OSError, subprocess.SubprocessError):
        return ""


def _answer(question: Callable[[], bool]) -> bool:
    """Return the answer to a question about a file, or False if pathlib raises, as for a file in a closed folder."""
    try:
        return question()
    except OSError:
        return False


class ThisMachine(Machine):
    """The machine that this process runs on.

    `proc` is the folder of the kernel's files; `timeout` asks systemd for the TimeoutStopUSec of a unit.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        environ: Mapping[str, str] = os.environ,
        timeout: Callable[[str], str] = timeout_of,
    ) -> None:
        self._proc = proc
        self._environ = environ
        self._timeout = timeout

    @override
    def open_files(self) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    @override
    def stop_seconds(self) -> float | None:
        # Services below user.slice belong to the systemd of a user, which systemctl does not ask.
        unit = re.search(r"(?m):/(?!user\.slice/)(?:.*/)?([^/\n]+\.service)(?:/|$)", self._read("self/cgroup"))
        if unit is None or "INVOCATION_ID" not in self._environ:
            return None
        text = self._timeout(unit[1]).strip()
        if text == "infinity":
            return math.inf
        spans = re.findall(r"([0-9.]+)([a-z]+)", text)
        if not spans or any(name not in UNIT_SECONDS for _, name in spans):
            return None
        return sum(float(number) * UNIT_SECONDS[name] for number, name in spans)

    @override
    def world_readable(self, path: Path) -> bool:
        try:
            return bool(path.stat().st_mode & stat.S_IROTH)
        except OSError:
            return False

    @override
    def unwritable(self, store: Path) -> Path | None:
        if _answer(store.is_symlink):  # the server's other files stand beside the real one
            store = Path(os.path.realpath(store))
        if not os.access(store.parent, os.W_OK | os.X_OK):
            return store.parent
        files = [Path(f"{store}{suffix}") for suffix in ("", "-lock", "-wal", "-shm")]
        return next((file for file in files if _answer(file.exists) and not os.access(file, os.R_OK | os.W_OK)), None)

    @override
    def locked(self, store: Path) -> bool:
        # The file itself is locked too, because it can have other names.
        return any(_locked(path) for path in (f"{os.path.realpath(store)}-lock", store))

    @override
    def names(self, store: Path) -> int:
        try:
            return store.stat().st_nlink
        except OSError:
            return 1

    @override
    def readable_since(self, store: Path) -> int | None:
        # The write-ahead log that a killed server leaves is not read.
        if not _answer(store.is_file) or not store.stat().st_size:
            return None
        try:
            # Immutable: otherwise SQLite creates files for readers too.
            with closing(sqlite3.connect(f"file:{quote(str(store))}?mode=ro&immutable=1", uri=True)) as db:
                (application,) = db.execute("PRAGMA application_id").fetchone()
                (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                if application != APPLICATION_ID:
                    return self._unknown(store) if application or tables else None
                (since,) = db.execute("SELECT readable_since FROM log").fetchone()
                return int(since)
        except sqlite3.Error:
            return self._unknown(store)

    @staticmethod
    def _unknown(store: Path) -> int | None:
        """Return 0 for a file that is no store, or None if the write-ahead log may still make it one."""
        log = Path(f"{store}-wal")
        return None if _answer(log.exists) and log.stat().st_size else 0

    @override
    def file_system(self, folder: Path) -> str:
        longest, found, folder = 0, "", Path(os.path.realpath(folder))
        for line in self._read("self/mountinfo").splitlines():
            fields = line.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            if folder.is_relative_to(point) and len(point) >= longest:  # a later mount covers an earlier one
                longest, found = len(point), fields[fields.index("-") + 1]
        return found

    @override
    def free(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free

    @override
    def listening(self, port: int) -> list[IPAddress]:
        addresses = []
        for line in (self._read("net/tcp") + self._read("net/tcp6")).splitlines():
            _, local, _, state, *_ = line.split()
            address, _, number = local.rpartition(":")
            if state == LISTENING and int(number, 16) == port:
                # Words of 32 bits in the byte order of this machine.
                words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
                addresses.append(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))
        return addresses

    @override
    def may_listen(self, port: int) -> bool:
        first = self._read("sys/net/ipv4/ip_unprivileged_port_start").strip()
        capabilities = re.search(r"CapEff:\s*([0-9a-f]+)", self._read("self/status"))
        privileged = capabilities is None or int(capabilities[1], 16) & CAP_NET_BIND_SERVICE
        return port >= int(first or 0) or bool(privileged)

    @override
    def command_line(self) -> str:
        return self._read("self/cmdline")

    @override
    def secret(self, path: Path) -> str | None:
        try:
            return path.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeError):
            return None

    @override
    def ask(self, server: Server) -> Mapping[str, str]:
        try:
            with (
                socket.create_connection((server.host, server.port), REDIS_SECONDS) as plain,
                _tls(plain, server.host) if server.tls else plain as connection,
            ):
                return _facts(_Redis(connection), server)
        except hiredis.ProtocolError:
            raise Unreached("the server there is not a Redis, or speaks TLS") from None
        except TimeoutError:
            raise Unreached("it does not answer") from None
        except ssl.SSLCertVerificationError as error:
            raise Unreached(f"no TLS: {error.verify_message.rstrip('.')}") from None
        except ssl.SSLError as error:
            raise Unreached(f"no TLS: {error.reason.replace('_', ' ').lower()}") from None
        except UnicodeError:
            raise Unreached("the host name is not valid") from None
        except OSError as error:
            raise Unreached(error.strerror or "it closed the connection") from None

    def _read(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(errors="surrogateescape")
        except OSError:
            return ""


def _locked(path: str | Path) -> bool:
    """Return whether another process holds the lock of a file."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # A shared lock, so that two checks do not take each other for a server.  It is held for a moment.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _tls(plain: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


class _Redis:
    """A blocking client of one Redis."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = hiredis.Reader(encoding="utf-8", errors="replace")

    def ask(self, kind: type[_T], *words: str) -> _T:
        """Send a command and return its reply, which is a `kind`.

        Raise RedisRefused for an error reply, and hiredis.ProtocolError for bytes that are no such reply.
        """
        self._connection.sendall(hiredis.pack_command(cast(Any, words)))
        while (reply := self._reader.gets()) is False:
            data = self._connection.recv(1 << 16)
            if not data:
                raise Unreached("it closed the connection")
            self._reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise RedisRefused(re.split(r"[.,](?: |$)", str(reply))[0])  # the rest can be long or repeat the command
        if not isinstance(reply, kind):
            raise hiredis.ProtocolError
        return reply


def _facts(redis: _Redis, server: Server) -> dict[str, str]:
    """Log in to a Redis, and return its fields of INFO and CONFIG."""
    if server.auth:
        redis.ask(str, "AUTH", *server.auth)
    if server.database:
        redis.ask(str, "SELECT", str(server.database))
    facts: dict[str, str] = {}
    with _permitted():
        facts |= dict(line.split(":", 1) for line in redis.ask(str, "INFO").splitlines() if ":" in line)
    with _permitted():
        config = redis.ask(list, "CONFIG", "GET", "appendfsync")
        facts |= zip(config[::2], config[1::2], strict=True)
    return facts


@contextmanager
def _permitted() -> Iterator[None]:
    """Skip a command that this user is not permitted to run."""
    try:
        yield
    except RedisRefused as refused:
        if not str(refused).startswith(FORBIDDEN):
            raise
