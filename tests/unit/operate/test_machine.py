"""The machine as it is seen: files of the kernel's as they are on several, and this one's folders, locks and stores."""

import fcntl
import math
import os
import pathlib
import resource
import shutil
import socket
import sqlite3
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.helpers import ImmediateWorker, ManualTime, result_of
from support.redises import Proxy, Redis, each_binary
from support.servers import certificate_for

from chatd.messages import Post
from chatd.operate import machine
from chatd.operate.check import RedisRefused, Server, Unreached
from chatd.operate.machine import ThisMachine
from chatd.store.base import Retention
from chatd.store.sqlite import SqliteStore
from chatd.store.sqlite_file import READABLE_SINCE

HERE = ThisMachine()


@pytest.fixture
def proc(tmp_path):
    """Writes files of a /proc, and answers the machine that has it."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "proc" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return ThisMachine(tmp_path / "proc")

    return write


def test_the_limit_of_open_files_is_that_of_this_process():
    assert HERE.open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# systemd


UNIT = "0::/system.slice/chatd.service\n"


def stop_seconds(proc, cgroup=UNIT, said="1min 30s\n", environ=("INVOCATION_ID",)):
    """What is made of what systemd says, and of which unit it was asked."""
    asked = []

    def timeout(unit):
        asked.append(unit)
        return said

    there = ThisMachine(proc(self__cgroup=cgroup)._proc, dict.fromkeys(environ, "x"), timeout)
    return there.stop_seconds(), asked


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1min 30s\n", 90),
        ("45s", 45),
        ("1.500s", 1.5),
        ("500ms", 0.5),
        ("1w 1d 2h", 694_800 + 3600),
        ("infinity\n", math.inf),
        ("", None),
        ("1month", None),
        ("[not set]", None),
    ],
)
def test_the_time_to_stop_is_read_as_systemd_writes_it(proc, said, seconds):
    found, asked = stop_seconds(proc, said=said)
    assert found == (None if seconds is None else pytest.approx(seconds))
    assert asked == ["chatd.service"]


@pytest.mark.parametrize(
    "cgroup",
    [
        "1:name=systemd:/system.slice/chatd.service\n0::/\n",
        "0::/system.slice/chatd.service/control\n",
        "0::/chat.slice/chatd.service",
    ],
)
def test_the_unit_is_told_by_the_control_group(proc, cgroup):
    assert stop_seconds(proc, cgroup) == (90, ["chatd.service"])


@pytest.mark.parametrize(
    ("cgroup", "environ"),
    [
        (UNIT, ()),
        ("0::/user.slice/user-0.slice/session-1.scope\n", ("INVOCATION_ID",)),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/chatd.service\n", ("INVOCATION_ID",)),
        ("0::/\n", ("INVOCATION_ID",)),
    ],
)
def test_what_is_no_service_of_the_machines_has_no_time_to_stop(proc, cgroup, environ):
    assert stop_seconds(proc, cgroup, environ=environ) == (None, [])


def test_systemctl_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.timeout_of("chatd.service") == ""  # there is none
    command = tmp_path / "systemctl"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    assert machine.timeout_of("chatd.service") == "show --property=TimeoutStopUSec --value chatd.service\n"


# Files


@pytest.mark.parametrize(("mode", "readable"), [(0o644, True), (0o604, True), (0o640, False), (0o600, False)])
def test_who_may_read_a_key(tmp_path, mode, readable):
    key = tmp_path / "key.pem"
    key.touch()
    key.chmod(mode)
    assert HERE.world_readable(key) is readable


def test_a_key_that_is_not_there_is_read_by_nobody(tmp_path):
    assert not HERE.world_readable(tmp_path / "key.pem")


def test_what_of_a_store_cannot_be_written(tmp_path, monkeypatch):
    store = tmp_path / "chatd.sqlite"
    assert HERE.unwritable(store) is None
    assert HERE.unwritable(tmp_path / "missing" / "chatd.sqlite") == tmp_path / "missing"
    denied = set()  # root may write all, so that access cannot be tested by modes
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in denied)
    for suffix in ("-shm", "-wal", "-lock", ""):
        path = tmp_path / f"chatd.sqlite{suffix}"
        denied.add(str(path))
        assert HERE.unwritable(store) is None
        path.touch()
        assert HERE.unwritable(store) == path
        denied.clear()
    denied.add(str(tmp_path))
    assert HERE.unwritable(store) == tmp_path


def test_whether_a_server_has_a_store(tmp_path):
    store = tmp_path / "chatd.sqlite"
    lock = tmp_path / "chatd.sqlite-lock"
    assert not HERE.locked(store)
    assert not lock.exists()
    lock.touch()
    assert not HERE.locked(store)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert HERE.locked(store)
        fcntl.flock(held, fcntl.LOCK_SH)  # someone else who looks
        assert not HERE.locked(store)


@contextmanager
def opened(path):
    store = SqliteStore(path, Retention(), ManualTime(), ImmediateWorker(), ImmediateWorker())
    store.open(())
    yield store
    result_of(store.close())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_sql(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def test_since_when_a_store_can_be_read(tmp_path):
    path = tmp_path / "a ?b.sqlite"
    with opened(path):
        pass
    assert HERE.readable_since(path) == READABLE_SINCE
    run_sql(path, "UPDATE log SET readable_since = 77")
    before = path.read_bytes()
    assert HERE.readable_since(path) == 77
    assert (names(tmp_path), path.read_bytes()) == ([path.name, f"{path.name}-lock"], before)


def test_where_no_store_is_yet_none_is_made(tmp_path):
    path = tmp_path / "chatd.sqlite"
    assert HERE.readable_since(path) is None
    assert names(tmp_path) == []
    path.touch()
    assert HERE.readable_since(path) is None
    run_sql(path, "PRAGMA user_version = 1")  # a file of SQLite's in which nothing is: it becomes a store
    assert HERE.readable_since(path) is None
    with opened(path):
        pass
    assert HERE.readable_since(path) == READABLE_SINCE


@pytest.mark.parametrize("statements", [["CREATE TABLE t (x)"], ["PRAGMA application_id = 7"]])
def test_another_programs_file_is_no_store(tmp_path, statements):
    path = tmp_path / "chatd.sqlite"
    run_sql(path, *statements)
    assert HERE.readable_since(path) == 0


def test_what_is_no_file_of_sqlites_is_no_store(tmp_path):
    path = tmp_path / "chatd.sqlite"
    path.write_text("messages: none\n" * 1000)
    assert HERE.readable_since(path) == 0
    assert HERE.readable_since(tmp_path) is None  # the server says so when it starts


def test_of_a_store_that_is_all_in_its_log_yet_nothing_is_said(tmp_path):
    path, folder = tmp_path / "chatd.sqlite", tmp_path / "killed"
    folder.mkdir()
    with opened(path) as store:
        store.append("main", Post("ann", "hi", None), type("Poster", (), {"posted": lambda *_, **__: None})())
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", folder)  # as kill -9 would leave them
    assert (folder / "chatd.sqlite-wal").stat().st_size
    assert HERE.readable_since(folder / "chatd.sqlite") is None
    assert names(folder) == ["chatd.sqlite", "chatd.sqlite-wal"]
    with opened(folder / "chatd.sqlite"):
        pass
    assert HERE.readable_since(folder / "chatd.sqlite") == READABLE_SINCE


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 0:40 / {folder} rw - nfs4 server:/export rw
31 30 0:41 / {folder}/with\\040space rw - tmpfs tmpfs rw
32 30 0:42 / {folder}/covered rw - xfs /dev/vdb rw
33 30 0:43 / {folder}/covered rw - btrfs /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("", "nfs4"), ("other", "nfs4"), ("with space/below", "tmpfs"), ("withspace", "nfs4"), ("covered", "btrfs")],
)
def test_the_file_system_is_that_of_the_nearest_mount(proc, tmp_path, folder, kind):
    there = proc(self__mountinfo=MOUNTS.format(folder=tmp_path / "data"))
    assert there.file_system(tmp_path / "data" / folder) == kind
    assert there.file_system(tmp_path) == "ext4"
    (tmp_path / "link").symlink_to(tmp_path / "data" / folder)
    assert there.file_system(tmp_path / "link") == kind


def test_how_much_is_free(tmp_path):
    assert HERE.free(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 30)


def test_this_machine_can_be_looked_at(tmp_path):
    assert HERE.file_system(tmp_path)
    assert HERE.may_listen(65_535)


def test_what_cannot_be_read_is_in_order(tmp_path):
    nothing = ThisMachine(tmp_path / "no-proc", {"INVOCATION_ID": "x"})
    assert nothing.stop_seconds() is None
    assert nothing.file_system(tmp_path) == ""
    assert nothing.listening(8085) == []
    assert nothing.may_listen(1)


# Ports


def words(packed):
    """An address as /proc/net writes it: words of 32 bits in the machine's order."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def test_which_addresses_are_listened_on(proc):
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rest = "00000000:00000000 00:00000000 00000000 0 0 1061 1"
    lines = {"tcp": head, "tcp6": head}
    for name, address, port, state in (
        ("tcp", "127.0.0.1", 8085, "0A"),
        ("tcp", "192.0.2.7", 8085, "01"),  # a connection
        ("tcp", "0.0.0.0", 8086, "0A"),
        ("tcp6", "2001:db8::7", 8085, "0A"),
        ("tcp6", "::", 8086, "0A"),
    ):
        packed = ip_address(address).packed
        lines[name] += f"   0: {words(packed)}:{port:04X} {words(bytes(len(packed)))}:0000 {state} {rest}\n"
    there = proc(net__tcp=lines["tcp"], net__tcp6=lines["tcp6"])
    assert there.listening(8085) == [ip_address("127.0.0.1"), ip_address("2001:db8::7")]
    assert there.listening(8086) == [ip_address("0.0.0.0"), ip_address("::")]
    assert there.listening(8087) == []


def test_a_real_port_is_found():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert HERE.listening(port) == [ip_address("127.0.0.1")]
    assert HERE.listening(port) == []


@pytest.mark.parametrize(
    ("capabilities", "first", "port", "may"),
    [
        ("0000000000000000", "1024\n", 1023, False),
        ("0000000000000000", "1024\n", 1024, True),
        ("0000000000000000", "80\n", 80, True),
        ("0000000000000400", "1024\n", 1, True),
        ("fffffffffffffbff", "1024\n", 1, False),
    ],
)
def test_who_may_listen_on_a_port(proc, capabilities, first, port, may):
    there = proc(
        self__status=f"Name:\tpython\nCapPrm:\t0000000000000400\nCapEff:\t{capabilities}\nCapBnd:\tffffffffffffffff\n",
        sys__net__ipv4__ip_unprivileged_port_start=first,
    )
    assert there.may_listen(port) is may


def test_a_relative_store_is_looked_for_where_the_process_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert HERE.unwritable(Path("chatd.sqlite")) is None
    with opened(tmp_path / "chatd.sqlite"):
        assert HERE.locked(Path("chatd.sqlite"))
    assert HERE.readable_since(Path("chatd.sqlite")) == READABLE_SINCE


# A Redis


def server(port, *auth, tls=False, database=0, host="127.0.0.1"):
    return Server(host, port, tls, auth, database)


@each_binary
def redis(request, tmp_path):
    with Redis(tmp_path / "redis", binary=request.param, appendonly=True, fsync="always") as redis:
        yield redis


def test_what_a_redis_says_of_itself(redis, tmp_path):
    said = HERE.ask(server(redis.port, database=3))
    assert (said["role"], said["aof_enabled"], said["appendfsync"]) == ("master", "1", "always")
    assert said["maxmemory_policy"] == "noeviction"
    assert tuple(map(int, said["redis_version"].split(".")[:2])) >= (6, 2)
    with Redis(tmp_path / "replica", binary=redis.binary, replica_of=redis, maxmemory_policy="volatile-lru") as replica:
        said = HERE.ask(server(replica.port, host="localhost"))
    assert (said["role"], said["master_host"], said["master_port"]) == ("slave", "127.0.0.1", str(redis.port))
    assert (said["aof_enabled"], said["maxmemory_policy"]) == ("0", "volatile-lru")


def test_a_user_is_told_what_he_may_ask(redis):
    redis.call("ACL", "SETUSER", "none", "on", ">a b", "~*")
    redis.call("ACL", "SETUSER", "some", "on", ">a b", "~*", "+info")
    assert HERE.ask(server(redis.port, "none", "a b")) == {}
    said = HERE.ask(server(redis.port, "some", "a b"))
    assert said["role"] == "master"
    assert "appendfsync" not in said


@pytest.mark.parametrize(
    ("auth", "database", "words"),
    [
        ((), 0, "NOAUTH Authentication required"),
        (("wrong",), 0, "WRONGPASS invalid username-password pair or user is disabled"),
        (("nobody", "right"), 0, "WRONGPASS invalid username-password pair or user is disabled"),
        (("right",), 99, "ERR DB index is out of range"),
    ],
)
def test_a_redis_that_does_not_let_us_in_says_why(tmp_path, auth, database, words):
    with Redis(tmp_path / "redis", password="right") as redis:
        assert HERE.ask(server(redis.port, "right"))["role"] == "master"
        with pytest.raises(RedisRefused) as refused:
            HERE.ask(server(redis.port, *auth, database=database))
    assert str(refused.value) == words


@contextmanager
def says(reply):
    """A server that answers so, to whatever it is asked, and hangs up."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(serve)
            yield listening.getsockname()[1]
            served.result()


def test_what_a_refusal_says_more_is_not_repeated():
    line = b"-ERR unknown command `AUTH`, with args beginning with: `secret`\r\n"
    with says(line) as port, pytest.raises(RedisRefused) as refused:
        HERE.ask(server(port, "secret"))
    assert str(refused.value) == "ERR unknown command `AUTH`"


@pytest.mark.parametrize(
    ("reply", "words"),
    [(b"", "it hung up"), (b"HTTP/1.1 400 Bad Request\r\n", "what is there is no Redis, or speaks TLS")],
)
def test_what_is_no_redis_is_not_reached(reply, words):
    with says(reply) as port, pytest.raises(Unreached) as unreached:
        HERE.ask(server(port))
    assert str(unreached.value) == words


def unreached(port, **named):
    with pytest.raises(Unreached) as unreached:
        HERE.ask(server(port, **named))
    return str(unreached.value)


def test_where_none_can_be_reached_it_is_said_why(monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(machine, "REDIS_SECONDS", 0.01)
        assert unreached(port) == "it does not answer"
    assert unreached(port) == "Connection refused"
    assert unreached(port, host="a" * 64) == "it is no name of a machine"
    assert unreached(port, host="chatd.invalid")  # in the words of the resolver


def test_by_tls_the_certificate_must_be_trusted_and_of_that_name(tmp_path, monkeypatch):
    certificate_for(tmp_path)
    with Redis(tmp_path / "redis") as redis, Proxy(redis.port, tls=tmp_path) as proxy:
        assert unreached(proxy.port, tls=True) == "no TLS: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert HERE.ask(server(proxy.port, tls=True))["role"] == "master"
        other = "no TLS: Hostname mismatch, certificate is not valid for 'localhost'"
        assert unreached(proxy.port, tls=True, host="localhost") == other
    with says(b"-ERR no TLS here\r\n") as port:
        assert unreached(port, tls=True).startswith("no TLS: ")


def test_a_password_is_the_line_of_its_file(tmp_path):
    path = tmp_path / "password"
    assert HERE.secret(path) is None
    path.write_bytes("p\u00e4ss\r\n".encode())
    assert HERE.secret(path) == "p\u00e4ss"
    path.write_bytes(b"\xff")
    assert HERE.secret(path) is None


def test_the_command_line_is_that_of_the_process(proc, tmp_path):
    assert pathlib.Path(sys.executable).name in HERE.command_line()
    assert proc(self__cmdline="a\0--store=b\0").command_line() == "a\0--store=b\0"
    (tmp_path / "proc/self/cmdline").write_bytes(b"\xff")
    assert proc().command_line() == "\udcff"
