"""The machine as `--check` asks for it, read from where Linux tells it; looking changes nothing.

What cannot be read is taken to be in order: the server itself will say what is wrong, when it starts.
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
from io import BufferedRWPair
from pathlib import Path
from typing import Final
from urllib.parse import quote

from chatd.operate.check import Address, RedisRefused, Server, Unreached
from chatd.store.sqlite_file import APPLICATION_ID

LISTENING: Final = "0A"
"""The state of a socket in /proc/net/tcp."""
CAP_NET_BIND_SERVICE: Final = 1 << 10
"""The capability that takes any port."""
REDIS_SECONDS: Final = 5
"""How long a Redis may take to be connected to, and to answer."""
FORBIDDEN: Final = "NOPERM", "ERR unknown command"
"""How a Redis begins when it does not tell something to this user, or to anybody."""
SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
"""What systemd writes a time span in (systemd.time(7)), up to weeks."""


def timeout_of(unit: str) -> str:
    """What systemd says of how long it waits for a unit to stop."""
    command = ["systemctl", "show", "--property=TimeoutStopUSec", "--value", unit]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout  # noqa: S603 -- our own
    except (OSError, subprocess.SubprocessError):
        return ""


class ThisMachine:
    """Implements chatd.check.Machine.

    `proc` is where the kernel tells of itself; `timeout` asks systemd for a unit's TimeoutStopUSec.
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

    def open_files(self) -> int:
        """Machine.open_files."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def stop_seconds(self) -> float | None:
        """Machine.stop_seconds; of a service of the machine, not of one that a user runs for himself."""
        unit = re.search(r"(?m):/(?!user\.slice/)(?:.*/)?([^/\n]+\.service)(?:/|$)", self._read("self/cgroup"))
        if unit is None or "INVOCATION_ID" not in self._environ:
            return None
        said = self._timeout(unit[1]).strip()
        if said == "infinity":
            return math.inf
        spans = re.findall(r"([0-9.]+)([a-z]+)", said)
        if not spans or any(name not in SECONDS for _, name in spans):
            return None
        return sum(float(number) * SECONDS[name] for number, name in spans)

    def world_readable(self, path: Path) -> bool:
        """Machine.world_readable."""
        try:
            return bool(path.stat().st_mode & stat.S_IROTH)
        except OSError:
            return False

    def unwritable(self, store: Path) -> Path | None:
        """Machine.unwritable."""
        if not os.access(store.parent, os.W_OK | os.X_OK):
            return store.parent
        files = [Path(f"{store}{suffix}") for suffix in ("", "-lock", "-wal", "-shm")]
        return next((file for file in files if file.exists() and not os.access(file, os.R_OK | os.W_OK)), None)

    def locked(self, store: Path) -> bool:
        """Machine.locked."""
        try:
            lock = os.open(f"{store}-lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            # Shared, so that two who look do not take each other for a server; and only for a moment.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def readable_since(self, store: Path) -> int | None:
        """Machine.readable_since; what a server that was killed left in the write-ahead log is not looked at."""
        if not store.is_file() or not store.stat().st_size:
            return None
        try:
            # Immutable, since SQLite would else make its files for readers too.
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
        """A file that is no store, unless all that makes it one is in the write-ahead log yet."""
        log = Path(f"{store}-wal")
        return None if log.exists() and log.stat().st_size else 0

    def file_system(self, folder: Path) -> str:
        """Machine.file_system."""
        longest, found, folder = 0, "", folder.resolve()
        for line in self._read("self/mountinfo").splitlines():
            fields = line.split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            if folder.is_relative_to(point) and len(point) >= longest:  # a later one covers an earlier
                longest, found = len(point), fields[fields.index("-") + 1]
        return found

    def free(self, folder: Path) -> int:
        """Machine.free."""
        return shutil.disk_usage(folder).free

    def listening(self, port: int) -> list[Address]:
        """Machine.listening."""
        addresses = []
        for line in (self._read("net/tcp") + self._read("net/tcp6")).splitlines():
            _, local, _, state, *_ = line.split()
            address, _, number = local.rpartition(":")
            if state == LISTENING and int(number, 16) == port:
                # The words are in this machine's order.
                words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
                addresses.append(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))
        return addresses

    def may_listen(self, port: int) -> bool:
        """Machine.may_listen."""
        first = self._read("sys/net/ipv4/ip_unprivileged_port_start").strip()
        capabilities = re.search(r"CapEff:\s*([0-9a-f]+)", self._read("self/status"))
        privileged = capabilities is None or int(capabilities[1], 16) & CAP_NET_BIND_SERVICE
        return port >= int(first or 0) or bool(privileged)

    def command_line(self) -> str:
        """Machine.command_line."""
        return self._read("self/cmdline")

    def secret(self, path: Path) -> str | None:
        """Machine.secret."""
        try:
            return path.read_text("utf-8").rstrip("\r\n")
        except (OSError, UnicodeError):
            return None

    def ask(self, server: Server) -> Mapping[str, str]:
        """Machine.ask."""
        try:
            with (
                socket.create_connection((server.host, server.port), REDIS_SECONDS) as plain,
                _tls(plain, server.host) if server.tls else plain as there,
                there.makefile("rwb") as stream,
            ):
                return _facts(stream, server)
        except TimeoutError:
            raise Unreached("it does not answer") from None
        except ssl.SSLCertVerificationError as error:
            raise Unreached(f"no TLS: {error.verify_message.rstrip('.')}") from None
        except ssl.SSLError as error:
            raise Unreached(f"no TLS: {error.reason.replace('_', ' ').lower()}") from None
        except UnicodeError:
            raise Unreached("it is no name of a machine") from None
        except OSError as error:
            raise Unreached(error.strerror or "it hung up") from None

    def _read(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(errors="surrogateescape")
        except OSError:
            return ""


def _tls(plain: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def _facts(stream: BufferedRWPair, server: Server) -> dict[str, str]:
    """Say who we are, and ask a Redis what it is."""
    if server.auth:
        _ask(stream, "AUTH", *server.auth)
    if server.database:
        _ask(stream, "SELECT", str(server.database))
    facts: dict[str, str] = {}
    with _allowed():
        (info,) = _ask(stream, "INFO")
        facts |= dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    with _allowed():
        config = _ask(stream, "CONFIG", "GET", "appendfsync")
        facts |= zip(config[::2], config[1::2], strict=True)
    return facts


@contextmanager
def _allowed() -> Iterator[None]:
    """Do without what this user may not ask."""
    try:
        yield
    except RedisRefused as refused:
        if not str(refused).startswith(FORBIDDEN):
            raise


def _ask(stream: BufferedRWPair, *words: str) -> list[str]:
    """Send a command, and read the texts of its reply (RESP)."""
    parts = [word.encode() for word in words]
    stream.write(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
    stream.flush()
    return _reply(stream)


def _reply(stream: BufferedRWPair) -> list[str]:
    line = stream.readline()
    kind, rest = line[:1], line[1:].decode(errors="replace").strip()
    if kind == b"-":
        raise RedisRefused(re.split(r"[.,](?: |$)", rest)[0])  # what follows can be long, or the words that were sent
    if kind == b"$":
        return [stream.read(int(rest) + 2)[:-2].decode(errors="replace")]
    if kind == b"*":
        return [text for _ in range(int(rest)) for text in _reply(stream)]
    if kind == b"+":
        return [rest]
    raise Unreached("what is there is no Redis, or speaks TLS" if line else "it hung up")
