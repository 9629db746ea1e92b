"""Real servers for the end-to-end tests, and a raw client that can misbehave.

A server is `twistd` in a process of its own, run from this checkout on a port that the kernel chose.
Nothing here sleeps: every wait is for an event (a line of the log, a frame, the end of a process) and
has a time-out that only a broken server reaches.
"""

import base64
import contextlib
import datetime as dt
import importlib.machinery
import importlib.util
import ipaddress
import json
import os
import pathlib
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support import documented
from support.needs import NODE, ROOT, missing, need  # noqa: F401 -- tests import them from here
from support.websocket_frames import CLOSE, TEXT, close_code, frame, frame_at, take_frames

TWISTD = pathlib.Path(sys.executable).with_name("twistd")
WATCHED = ROOT / "tests" / "support" / "documented.py"
"""twistd that dies, with the status documented.STATUS, of sending what the documents do not describe."""
LONG = 60
"""Seconds after which a test stops waiting and fails."""
LOOPBACK = "tcp:0:interface=127.0.0.1"


def program(path):
    """Return a program that is one file, as a module; nothing is written beside it."""
    loader = importlib.machinery.SourceFileLoader(path.name.replace("-", "_"), str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def environment(**changes):
    """Return this process's environment without what would change a server."""
    # systemd sets the last four, for its own service and not for a server that a test starts.
    foreign = ("CHATD_", "PYTHON", "COVERAGE", "NOTIFY_", "WATCHDOG_", "LISTEN_", "INVOCATION_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PYTHONPATH": str(ROOT)} | changes


def run(*options, cwd, env=None, command=(sys.executable, TWISTD), flags=("-n", "--pidfile=")):
    """Run `twistd chatd` until it exits by itself."""
    return subprocess.run(
        [*command, *flags, "chatd", *options],
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def operate(script, server, *words, code=0, **environ):
    """Run a script of an operator against a server, if any; return its lines, those of a failure on standard error."""
    url = [] if server is None else ["--url", f"http://127.0.0.1:{server.admin_port}"]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *url, *words],
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return (done.stderr if code else done.stdout).splitlines()


class Lines:
    """The lines that a process writes to a pipe, as they come."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._lines = []
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self._pipe:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self):
        with self._changed:
            return iter([*self._lines])

    @property
    def text(self):
        return "\n".join(self)

    def wait(self, pattern, count=1, seconds=LONG):
        """Wait until a pattern was found in so many lines, and answer those matches."""
        found = []

        def enough():
            found[:] = [match for line in self._lines if (match := re.search(pattern, line))]
            return len(found) >= count or self._ended

        with self._changed:
            self._changed.wait_for(enough, seconds)
        if len(found) < count:
            raise AssertionError(f"{pattern!r} was not found {count} times in:\n{self.text}")
        return found[:count]

    def close(self):
        """Wait for the end of the lines; the process must have ended."""
        self._thread.join(LONG)
        self._pipe.close()


class Server:
    """A `twistd chatd` in the folder given; a context manager that leaves no process behind."""

    def __init__(
        self,
        folder,
        *options,
        env=None,
        listen=LOOPBACK,
        admin="",
        command=(sys.executable, WATCHED),
        words=("-n", "--pidfile=", "chatd"),
    ):
        endpoints = [f"--{name}={text}" for name, text in (("listen", listen), ("admin", admin)) if text is not None]
        if "CHATD_RATE" not in (env or ()) and not any(option.startswith("--rate") for option in options):
            endpoints.append("--rate=0")  # what most tests send comes faster than any person types
        if "CHATD_DRAIN" not in (env or ()) and not any(option.startswith("--drain") for option in options):
            endpoints.append("--drain=1")  # few tests want to see how gently clients are sent away
        self._process = subprocess.Popen(
            [*command, *words, *endpoints, *options],
            cwd=folder,
            env=env or environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        self.log = Lines(self._process.stdout)
        self.errors = Lines(self._process.stderr)

    def __enter__(self):
        try:
            self.log.wait(r"ready, with the log \w+")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def pid(self):
        return self._process.pid

    @property
    def port(self):
        """The port on which the server listens for clients."""
        return int(self.log.wait(r"ChatFactory starting on (\d+)")[0][1])

    @property
    def admin_port(self):
        return int(self.log.wait(r"ChatSite starting on (\d+)")[0][1])

    @property
    def url(self):
        return f"ws://127.0.0.1:{self.port}/"

    @property
    def epoch(self):
        return self.log.wait(r"ready, with the log (\w+)")[0][1]

    def memory(self, what="VmRSS"):
        """Return the resident memory in bytes."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) << 10

    def terminate(self, number=signal.SIGTERM):
        """Ask it to stop."""
        self._process.send_signal(number)

    def wait(self):
        """Wait for its end, and answer its exit code."""
        code = self._process.wait(LONG)
        self.log.close()
        self.errors.close()
        return code

    def stopped(self, number=signal.SIGTERM):
        """Wait for its end, which must be the orderly one, by the signal that it was sent first."""
        code = self.wait()
        assert re.search(r"\bstopped\b", self.log.text), self.log.text
        assert "Server Shut Down" in self.log.text
        assert "Traceback" not in self.log.text
        assert code == -number

    def stop(self):
        """Ask it to stop, and wait until it has; it must have served something, to know signals by then."""
        self.terminate()
        self.stopped()

    def kill(self):
        """Kill the server with SIGKILL, and check nothing."""
        self._process.kill()
        code = self.wait()
        assert code != documented.STATUS, self.errors.text
        return code


def certificate_for(folder, key=None):
    """Make a self-signed certificate for 127.0.0.1; return the endpoint's arguments, and a context that trusts it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "chatd's tests")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return "privateKey=key.pem:certKey=cert.pem", ssl.create_default_context(cafile=folder / "cert.pem")


def stored(path, room="main"):
    """Return the content of a store: its epoch and the rows (number, username, message, timestamp) of a room."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        (epoch,) = db.execute("SELECT epoch FROM log").fetchone()
        query = "SELECT number, username, message, timestamp FROM messages WHERE room = ? ORDER BY number"
        return epoch, db.execute(query, (room,)).fetchall()


def numbered(frame):
    """Return the entries of a history or message frame as (number, username, message), oldest first."""
    number = int(frame["id"].partition("-")[2])
    entries = [frame["data"]] if frame["type"] == "message" else frame["data"]
    first = number - len(entries) + 1
    return [(first + place, entry["username"], entry["message"]) for place, entry in enumerate(entries)]


def post(username, message):
    """Return a frame that posts."""
    return frame(TEXT, json.dumps({"username": username, "message": message}).encode())


def upgrade(path="/", **headers):
    """Compose an opening handshake; a header of None is left out."""
    fields = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
        "Sec-WebSocket-Version": "13",
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


class Raw:
    """A raw client: it sends bytes, and receives frames or HTTP answers."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), LONG)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        """Send, to a server that may have had enough before it was all sent."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def _more(self):
        """Read on; False at the end."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionError:
            return False
        self._data += data
        return bool(data)

    def take(self, size):
        """Return the next bytes; raises EOFError at the end."""
        while len(self._data) < size:
            if not self._more():
                raise EOFError(bytes(self._data))
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def rest(self):
        """Return all bytes that arrive before the server ends the connection."""
        while self._more():
            pass
        data = bytes(self._data)
        self._data.clear()
        return data

    def head(self):
        """Return the status and the head of an HTTP answer."""
        while b"\r\n\r\n" not in self._data:
            if not self._more():
                raise EOFError(bytes(self._data))
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), head.decode()

    def join(self, path="/", **headers):
        """Become a member, and return the history frame."""
        self.send(upgrade(path, **headers))
        status, head = self.head()
        assert status == 101, head
        return self.json()

    def frame(self):
        """Return the opcode and the payload of the next frame; raises EOFError at the end."""
        while (found := frame_at(self._data)) is None:
            if not self._more():
                raise EOFError(bytes(self._data))
        del self._data[: found.end]
        assert found.first & 0xF0 == 0x80, "whole frames, without reserved bits"
        assert not found.masked
        return found.opcode, found.payload

    def json(self):
        """Return the JSON of the next frame, which must be a text."""
        opcode, payload = self.frame()
        assert opcode == TEXT, (opcode, payload)
        return json.loads(payload)

    def arrived(self):
        """Read once, and answer the texts that are whole by now; None at the end."""
        if not self._more():
            return None
        found, self._data = take_frames(self._data)
        return [json.loads(one.payload) for one in found if one.opcode == TEXT]

    def texts(self):
        """Yield every text that arrives before a killed server's connection ends."""
        with contextlib.suppress(EOFError):
            while True:
                opcode, payload = self.frame()
                if opcode == TEXT:
                    yield json.loads(payload)

    def closed(self):
        """Answer the close frame that arrives, wait for the end of the connection, and return the code."""
        while True:
            opcode, payload = self.frame()
            if opcode == CLOSE:
                break
        self.send(frame(CLOSE, payload[:2]))
        assert self.rest() == b""
        return close_code(payload)
