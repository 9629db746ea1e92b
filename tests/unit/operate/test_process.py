"""The process of the server under twistd, with its system in doubles."""

import contextlib
import os
import signal
from types import SimpleNamespace

import pytest
from twisted.internet.testing import MemoryReactorClock

from chatd.operate.process import SILENT, STARTED, STDERR, UMASK, ServerProcess, obstacle

LONG = "x" * 256
"""A name that pathlib raises for, as it does for names in a folder that is closed to this user."""
NOT_WRITABLE = "this user cannot write it: name another, or give an empty one (--pidfile=)"


class Exited(BaseException):
    """The end of the process."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("twistd", "line"),
    [
        ({}, None),
        ({"rundir": ".", "pidfile": "twistd.pid", "uid": None, "gid": None, "chroot": None}, None),
        ({"rundir": ".", "pidfile": ""}, None),
        ({"rundir": "missing"}, "--rundir missing: there is no such folder for this user: create it, or name another"),
        ({"rundir": "file"}, "--rundir file: there is no such folder for this user: create it, or name another"),
        ({"pidfile": "missing/pid"}, f"--pidfile missing/pid: {NOT_WRITABLE}"),
        ({"rundir": LONG}, f"--rundir {LONG}: there is no such folder for this user: create it, or name another"),
        ({"pidfile": f"missing/{LONG}"}, f"--pidfile missing/{LONG}: {NOT_WRITABLE}"),
        ({"pidfile": "file"}, None),
        ({"uid": 1}, "--uid needs root: start twistd as root, or leave the option out"),
        ({"gid": 0}, "--gid needs root: start twistd as root, or leave the option out"),
        ({"chroot": "/"}, "--chroot needs root: start twistd as root, or leave the option out"),
    ],
)
def test_obstacles(folder, monkeypatch, twistd, line):
    """Options of twistd that would end a daemon are refused with one line."""
    (folder / "file").touch()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert obstacle(twistd) == line


def test_root_may_change_its_user(monkeypatch):
    """Root may use each option; paths in another root folder are not checked."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert obstacle({"uid": 1, "gid": 1}) is None
    assert obstacle({"chroot": "/srv", "rundir": "missing"}) is None


@pytest.mark.parametrize(
    ("twistd", "sheds"), [({}, False), ({"uid": None, "gid": None}, False), ({"uid": 0}, True), ({"gid": 5}, True)]
)
def test_process_that_gives_up_root(twistd, sheds):
    assert ServerProcess(twistd, None).sheds_privileges is sheds


class System:
    """The calls of the system: system with given results, a pipe, and what is written to standard error."""

    path = os.path

    def __init__(self):
        self.results = []
        self.calls = []
        self.err = b""
        self.same_file = True
        self.reading, self.writing = os.pipe()

    def __getattr__(self, name):
        return getattr(os, name)

    def fork(self):
        self.calls.append("fork")
        return self.results.pop(0)

    def pipe(self):
        return self.reading, self.writing

    def setsid(self):
        self.calls.append("setsid")

    def dup2(self, _, descriptor):
        self.calls.append(descriptor)

    def write(self, descriptor, data):
        if descriptor != STDERR:
            return os.write(descriptor, data)
        if self.err is None:
            raise BrokenPipeError
        self.err += data
        return len(data)

    def _exit(self, status):
        raise Exited(status)


@pytest.fixture
def system(monkeypatch):
    double = System()
    monkeypatch.setattr("chatd.operate.process.os", double)
    monkeypatch.setattr("signal.signal", lambda *call: double.calls.append(call))
    yield double
    for descriptor in (double.reading, double.writing):
        with contextlib.suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize("twistd", [{}, {"nodaemon": 1}])
def test_no_daemon_in_the_foreground(system, twistd):
    ServerProcess(twistd, None).daemonize()
    assert system.calls == []
    ServerProcess(twistd, None).started()


@pytest.mark.parametrize(
    ("report", "status", "err"),
    [(STARTED, 0, b""), (b"chatd: no port\n", 1, b"chatd: no port\n"), (b"", 1, SILENT)],
)
def test_first_process_ends_as_the_daemon_starts(system, folder, report, status, err):
    """Its status is 1 if the daemon reports a failure or ends without a report; the pid file is then removed."""
    (folder / "pid").touch()
    os.write(system.writing, report)
    system.results = [7]
    with pytest.raises(Exited) as end:
        ServerProcess({"nodaemon": 0, "pidfile": "pid"}, None).daemonize()
    assert end.value.args == (status,)
    assert system.err == err
    assert (folder / "pid").exists() is (status == 0)
    assert system.calls == ["fork", (signal.SIGINT, signal.SIG_DFL)]


def test_process_between_ends_at_once(system):
    system.results = [0, 7]
    with pytest.raises(Exited) as end:
        ServerProcess({"nodaemon": 0}, None).daemonize()
    assert end.value.args == (0,)
    assert system.calls == ["fork", "setsid", "fork"]


@pytest.fixture
def daemon(system):
    """The process of a daemon, the options of twistd for it, and the pipe from it."""
    system.results = [0, 0]
    twistd = {"nodaemon": 0, "umask": None, "pidfile": ""}
    process = ServerProcess(twistd, None)
    first = os.dup(system.reading)
    process.daemonize()
    yield process, twistd, first
    os.close(first)


def test_daemon_leaves_its_terminal(system, daemon):
    """The daemon has no standard files, and the umask of twistd; twistd continues as in the foreground."""
    process, twistd, first = daemon
    assert system.calls == ["fork", "setsid", "fork", 0, 1, 2]
    assert twistd == {"nodaemon": True, "umask": UMASK, "pidfile": ""}
    process.started()
    assert os.read(first, 99) == STARTED
    assert os.read(first, 99) == b""
    assert not twistd["nodaemon"], "twistd writes the report of a crash to a file"


def test_daemon_without_standard_files(system, monkeypatch):
    """A process whose standard files are closed may have other files at their descriptors."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.__{name}__", None)
    system.results = [0, 0]
    ServerProcess({"nodaemon": 0}, None).daemonize()
    assert system.calls == ["fork", "setsid", "fork"]
    with pytest.raises(SystemExit):
        ServerProcess({"nodaemon": 1}, None).fail("no port")
    assert system.err == b""


def test_umask_of_twistd_is_kept(system):
    system.results = [0, 0]
    twistd = {"nodaemon": 0, "umask": 0o22}
    ServerProcess(twistd, None).daemonize()
    assert twistd["umask"] == 0o22


def test_daemon_reports_a_failure(system, daemon, events):
    """The line goes to the first process, and to the log."""
    process, _, first = daemon
    with pytest.raises(SystemExit) as end:
        process.fail("no port")
    os.close(system.writing)
    assert end.value.code == 1
    assert os.read(first, 99) == b"chatd: no port\n"
    assert [event["line"] for event in events] == ["no port"]


@pytest.mark.parametrize(
    ("twistd", "same", "logged"),
    [
        ({}, True, 0),
        ({"logfile": "-"}, True, 0),
        ({}, False, 1),
        ({"logfile": "a"}, True, 1),
        ({"syslog": 1}, True, 1),
    ],
)
def test_failure_in_the_foreground(system, folder, events, *, twistd, same, logged):
    """The line goes to standard error, and to the log if that is elsewhere; the pid file is removed."""
    (folder / "pid").touch()
    system.path = SimpleNamespace(sameopenfile=lambda *_: same)
    with pytest.raises(SystemExit) as end:
        ServerProcess({"nodaemon": 1, "pidfile": "pid", **twistd}, None).fail("no port")
    assert end.value.code == 1
    assert system.err == b"chatd: no port\n"
    assert len(events) == logged
    assert not (folder / "pid").exists()


def test_failure_without_standard_error(system):
    """A closed standard error does not hide the status."""
    system.err = None
    with pytest.raises(SystemExit):
        ServerProcess({}, None).fail("no port")


def test_failure_in_a_running_reactor(system):
    """The reactor stops, and the process then ends with status 1."""
    reactor = MemoryReactorClock()
    ServerProcess({}, reactor).fail_later("no port")
    assert system.err == b"chatd: no port\n"
    assert reactor.hasStopped
    assert reactor.triggers["after"]["shutdown"] == [(system._exit, (1,), {})]
