"""The reports of the machine: files of several kernels, and real folders, locks and stores."""

import fcntl
import math
import os
import pathlib
import resource
import shutil
import struct
import sys
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from support.helpers import ImmediateWorker, ManualTime, result_of
from support.store_files import names, run_sql
from twisted.internet.task import Clock

from chatd.messages import Post
from chatd.operate import machine
from chatd.operate.machine import ThisMachine
from chatd.store.base import Retention
from chatd.store.sqlite import SqliteStore
from chatd.store.sqlite_file import READABLE_SINCE

HERE = ThisMachine()


@pytest.fixture
def proc(tmp_path):
    """A function that writes the files of a /proc and returns a machine with it."""

    def write(*, environ=os.environ, timeout=machine.timeout_of, **files):
        for name, text in files.items():
            path = tmp_path / "proc" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return ThisMachine(tmp_path / "proc", environ, timeout)

    return write


def test_open_files_is_the_soft_limit_of_the_process():
    assert HERE.open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# systemd


UNIT = "0::/system.slice/chatd.service\n"


def stop_seconds(proc, cgroup=UNIT, said="1min 30s\n", environ=("INVOCATION_ID",)):
    """Return the stop timeout for an answer of systemd, and the units that systemd was asked about."""
    asked = []

    def timeout(unit):
        asked.append(unit)
        return said

    there = proc(self__cgroup=cgroup, environ=dict.fromkeys(environ, "x"), timeout=timeout)
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
def test_stop_timeout_in_the_format_of_systemd(proc, said, seconds):
    """TimeoutStopSec is parsed in the format of systemd.time(7); other texts count as unknown."""
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
def test_unit_of_the_control_group(proc, cgroup):
    """The control group of the process names the unit that systemd is asked about."""
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
def test_process_outside_a_system_service_has_no_timeout(proc, cgroup, environ):
    """systemd is asked only about system services, which it started itself."""
    assert stop_seconds(proc, cgroup, environ=environ) == (None, [])


def test_timeout_from_systemctl(tmp_path, monkeypatch):
    """systemctl is asked for the one property; the text is empty if there is no systemctl."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.timeout_of("chatd.service") == ""
    command = tmp_path / "systemctl"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    assert machine.timeout_of("chatd.service") == "show --property=TimeoutStopUSec --value chatd.service\n"


# Files


@pytest.mark.parametrize(("mode", "readable"), [(0o644, True), (0o604, True), (0o640, False), (0o600, False)])
def test_world_readable_key(tmp_path, mode, readable):
    """A private key is world-readable if its mode lets others read it."""
    key = tmp_path / "key.pem"
    key.touch()
    key.chmod(mode)
    assert HERE.world_readable(key) is readable


def test_missing_key_is_not_readable(tmp_path):
    assert not HERE.world_readable(tmp_path / "key.pem")


def test_unwritable_part_of_a_store(tmp_path, monkeypatch):
    """The first file or folder of a store that this user cannot write is reported."""
    store = tmp_path / "chatd.sqlite"
    assert HERE.unwritable(store) is None
    assert HERE.unwritable(tmp_path / "missing" / "chatd.sqlite") == tmp_path / "missing"
    denied = set()  # modes do not stop root
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


@pytest.mark.parametrize("name", ["x" * 256, "x" * 250, "loop"])
def test_store_with_a_name_that_pathlib_raises_for(tmp_path, name):
    """A check of a name that is too long, or that leads to itself, finds what there is to find, and ends."""
    (tmp_path / "loop").symlink_to("loop")
    store = tmp_path / name
    assert HERE.unwritable(store) is None
    assert not HERE.locked(store)
    assert HERE.readable_since(store) is None
    assert HERE.file_system(store / "folder") == HERE.file_system(tmp_path)


def test_locked_store(tmp_path):
    """A store is locked while a server holds its lock exclusively; the check creates no lock file."""
    store = tmp_path / "chatd.sqlite"
    lock = tmp_path / "chatd.sqlite-lock"
    assert not HERE.locked(store)
    assert not lock.exists()
    lock.touch()
    assert not HERE.locked(store)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert HERE.locked(store)
        fcntl.flock(held, fcntl.LOCK_SH)  # another check
        assert not HERE.locked(store)


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_locked_store_under_another_name(tmp_path, kind):
    store, other = tmp_path / "chatd.sqlite", tmp_path / "other"
    with opened(store):
        (other.symlink_to if kind == "symbolic" else other.hardlink_to)(store)
        assert HERE.locked(other)
        if kind == "symbolic":
            (tmp_path / "chatd.sqlite-lock").unlink()
        assert HERE.locked(other)
    assert not HERE.locked(other)


def test_names_of_a_store(tmp_path):
    store = tmp_path / "chatd.sqlite"
    assert HERE.names(store) == 1
    store.touch()
    assert HERE.names(store) == 1
    (tmp_path / "other").hardlink_to(store)
    assert HERE.names(store) == 2


def test_store_through_a_link_is_writable(tmp_path, monkeypatch):
    """The files beside the real store count, and not the folder of the link."""
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to(tmp_path / "chatd.sqlite")
    monkeypatch.setattr(os, "access", lambda path, mode: "links" not in str(path))
    assert HERE.unwritable(link) is None


@contextmanager
def opened(path):
    store = SqliteStore(path, Retention(), ManualTime(), ImmediateWorker(), ImmediateWorker(), clock=Clock())
    store.open(())
    yield store
    result_of(store.close())


def test_format_of_a_store(tmp_path):
    """The format of a store is read without a change to its file."""
    path = tmp_path / "a ?b.sqlite"
    with opened(path):
        pass
    assert HERE.readable_since(path) == READABLE_SINCE
    run_sql(path, "UPDATE log SET readable_since = 77")
    before = path.read_bytes()
    assert HERE.readable_since(path) == 77
    assert (names(tmp_path), path.read_bytes()) == ([path.name, f"{path.name}-lock"], before)


def test_missing_store_is_not_created(tmp_path):
    """A missing or empty store has no format yet, and the check does not create it."""
    path = tmp_path / "chatd.sqlite"
    assert HERE.readable_since(path) is None
    assert names(tmp_path) == []
    path.touch()
    assert HERE.readable_since(path) is None
    run_sql(path, "PRAGMA user_version = 1")  # an empty database becomes a store
    assert HERE.readable_since(path) is None
    with opened(path):
        pass
    assert HERE.readable_since(path) == READABLE_SINCE


@pytest.mark.parametrize("statements", [["CREATE TABLE t (x)"], ["PRAGMA application_id = 7"]])
def test_database_of_another_program(tmp_path, statements):
    """An SQLite database of another program reports format 0."""
    path = tmp_path / "chatd.sqlite"
    run_sql(path, *statements)
    assert HERE.readable_since(path) == 0


def test_file_that_is_no_database(tmp_path):
    """A file that is not an SQLite database reports format 0; a folder reports none."""
    path = tmp_path / "chatd.sqlite"
    path.write_text("messages: none\n" * 1000)
    assert HERE.readable_since(path) == 0
    assert HERE.readable_since(tmp_path) is None  # the server reports it when it starts


def test_store_that_is_in_its_write_ahead_log(tmp_path):
    """A store whose format is still in the write-ahead log reports none, and the check changes no file."""
    path, folder = tmp_path / "chatd.sqlite", tmp_path / "killed"
    folder.mkdir()
    with opened(path) as store:
        store.append("main", Post("ann", "hi", None), type("Poster", (), {"posted": lambda *_, **__: None})())
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", folder)  # the state after kill -9
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
def test_file_system_of_the_nearest_mount(proc, tmp_path, folder, kind):
    """The file system of a folder is that of its nearest mount, and of the last one if mounts overlap."""
    there = proc(self__mountinfo=MOUNTS.format(folder=tmp_path / "data"))
    assert there.file_system(tmp_path / "data" / folder) == kind
    assert there.file_system(tmp_path) == "ext4"
    (tmp_path / "link").symlink_to(tmp_path / "data" / folder)
    assert there.file_system(tmp_path / "link") == kind


@pytest.mark.parametrize("mounts", ["", "22 27 0:21 / /proc rw,relatime - proc proc rw\n"])
def test_file_system_without_a_mount_at_the_root(proc, tmp_path, mounts):
    """A container may not see the mount of its root: the file system is then unknown."""
    assert proc(self__mountinfo=mounts).file_system(tmp_path) == ""


def test_free_space(tmp_path):
    """The free space is that of the disk below the folder."""
    assert HERE.free(tmp_path) == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 30)


def test_real_machine_answers(tmp_path):
    """The functions that read /proc work on the machine of the tests."""
    assert isinstance(HERE.file_system(tmp_path), str)  # "" in some containers
    assert HERE.may_listen(65_535)


def test_missing_proc_is_in_order(tmp_path):
    """Without /proc nothing is reported as a problem."""
    nothing = ThisMachine(tmp_path / "no-proc", {"INVOCATION_ID": "x"})
    assert nothing.stop_seconds() is None
    assert nothing.file_system(tmp_path) == ""
    assert nothing.listening(8085) == []
    assert nothing.may_listen(1)


# Ports


def words(packed):
    """Return an address as /proc/net prints it: words of 32 bits in the byte order of the machine."""
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def test_addresses_that_listen_on_a_port(proc):
    """Only sockets in the state LISTEN count, over IPv4 and IPv6."""
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
def test_privileged_ports(proc, capabilities, first, port, may):
    """A low port needs CAP_NET_BIND_SERVICE among the effective capabilities."""
    there = proc(
        self__status=f"Name:\tpython\nCapPrm:\t0000000000000400\nCapEff:\t{capabilities}\nCapBnd:\tffffffffffffffff\n",
        sys__net__ipv4__ip_unprivileged_port_start=first,
    )
    assert there.may_listen(port) is may


def test_relative_store_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert HERE.unwritable(Path("chatd.sqlite")) is None
    with opened(tmp_path / "chatd.sqlite"):
        assert HERE.locked(Path("chatd.sqlite"))
    assert HERE.readable_since(Path("chatd.sqlite")) == READABLE_SINCE


# The process


def test_password_file(tmp_path):
    """A password is the line of its file in UTF-8; a file that cannot be read gives none."""
    path = tmp_path / "password"
    assert HERE.secret(path) is None
    path.write_bytes("p\u00e4ss\r\n".encode())
    assert HERE.secret(path) == "p\u00e4ss"
    path.write_bytes(b"\xff")
    assert HERE.secret(path) is None


def test_command_line_of_the_process(proc, tmp_path):
    """The command line of the process includes bytes that are not UTF-8."""
    assert pathlib.Path(sys.executable).name in HERE.command_line()
    assert proc(self__cmdline="a\0--store=b\0").command_line() == "a\0--store=b\0"
    (tmp_path / "proc/self/cmdline").write_bytes(b"\xff")
    assert proc().command_line() == "\udcff"
