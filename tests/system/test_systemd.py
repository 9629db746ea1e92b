"""Notifications to systemd, the text of the units, and their behaviour on a machine that has booted."""

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess

import pytest
from support import booted
from support.booted import PORT, UNITS
from support.servers import LONG, ROOT, TWISTD, Lines, certificate_for, numbered, post, stored, upgrade
from support.units import analyze, unit
from support.websocket_frames import CLOSE

from chatd.config import OPTIONS
from chatd.operate.systemd import Notifier

SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
EXPOSURE = 2.0
"""The highest permitted score of `systemd-analyze security`, of 10."""


# Notifications


@pytest.fixture(params=["path", "abstract"])
def heard(request, tmp_path):
    """A socket like that of systemd, and its name in the environment."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@chatd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(LONG)
        yield systemd, name


def test_notify_sends_one_datagram(heard):
    """A notification is one datagram to the socket that systemd names."""
    systemd, name = heard
    notify = Notifier({"NOTIFY_SOCKET": name})
    notify(READY="1", STATUS="ready")
    notify(STOPPING="1")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=ready"
    assert systemd.recv(4096) == b"STOPPING=1"


def test_watchdog_is_fed_twice_per_period(heard):
    systemd, name = heard
    notify = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())})
    assert notify.watchdog == 5
    notify.alive()
    assert systemd.recv(4096) == b"WATCHDOG=1"
    assert Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"}).watchdog == 1.5


@pytest.mark.parametrize("asked", [{}, {"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}])
def test_watchdog_of_another_process_is_not_fed(asked):
    assert Notifier({"NOTIFY_SOCKET": "/run/systemd/notify", **asked}).watchdog is None


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"WATCHDOG_USEC": "3000000"}])
def test_notify_does_nothing_outside_systemd(environ, events, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    notify = Notifier(environ)
    notify(READY="1")
    assert notify.watchdog is None
    assert events == []


def test_failed_notification_is_logged(tmp_path, events):
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})(READY="1")
    (event,) = events
    assert event["log_format"].format(**event).startswith("cannot notify systemd of 'READY=1': [Errno 2]")


def test_full_queue_does_not_block(heard, events, monkeypatch):
    """A notification gives up after SEND_SECONDS if systemd does not read its socket."""
    monkeypatch.setattr("chatd.operate.systemd.SEND_SECONDS", 0.001)
    notify = Notifier({"NOTIFY_SOCKET": heard[1]})
    while not events:
        notify.alive()
    assert "timed out" in str(events[0]["error"])


# The text of the units


(COMMAND,) = unit("chatd.service")["ExecStart"]
(COMMAND_OF_ONE,) = unit("chatd@.service")["ExecStart"]
DRAIN = int(re.search(r"--drain (\d+)", COMMAND)[1])


@pytest.mark.parametrize(("name", "instance"), [("chatd", "chatd"), ("chatd@", "chatd@%i")])
def test_unit_settings_are_consistent(name, instance):
    """The timeouts, the port and the drain of a unit and its socket fit together."""
    one = {key: values[0] for key, values in unit(f"{name}.service").items()}
    socket = unit(f"{name}.socket")
    assert one["Type"] == "notify"
    assert one["Restart"] == "always"
    assert int(one["WatchdogSec"]) > 1
    assert int(one["TimeoutStopSec"]) >= DRAIN + 10
    assert int(one["LimitNOFILE"]) >= 65536
    assert socket["ListenStream"] == [f"0.0.0.0:{PORT}"]
    assert f"--drain {DRAIN}" in one["ExecStart"]
    assert "--listen systemd:domain=INET:index=0" in one["ExecStart"]
    (backlog,) = socket["Backlog"]
    assert socket["ExecStartPre"] == [f"-/usr/sbin/sysctl -q -w net.core.somaxconn={backlog}"]
    assert int(backlog) > 4096  # the default of the kernel
    assert one["Also"] == f"{instance}.socket"
    assert f"{instance}.socket" in (one["Requires"] if name == "chatd" else one["Wants"])
    assert ("ReusePort" in socket) == (name == "chatd@")


def test_both_units_share_their_settings():
    """chatd.service and chatd@.service differ only in the settings listed here."""
    settings, others = unit("chatd.service"), unit("chatd@.service")
    of_their_own = {"Description", "Requires", "Wants", "After", "Also", "Environment", "ExecStart"}
    of_the_first = {"StateDirectory", "StateDirectoryMode", "WorkingDirectory"}
    assert settings.keys() - others.keys() == of_the_first | {"Requires"}
    assert {key for key in others if settings.get(key) != others[key]} == of_their_own - {"Requires"}


@pytest.mark.parametrize("name", ["chatd.service", "chatd@.service"])
def test_environment_and_command_line_do_not_overlap(name):
    """The command line of a unit sets no option that its environment sets too."""
    service = unit(name)
    said = dict(word.split("=", 1) for value in service["Environment"] for word in shlex.split(value))
    options = {option.variable for option in OPTIONS}
    given = {f"CHATD_{name.upper().replace('-', '_')}" for name in re.findall(r"--([a-z-]+) ", *service["ExecStart"])}
    assert {name for name in said if name.startswith("CHATD_")} <= options - given
    assert given <= options


@pytest.fixture(params=["chatd", "chatd@"], ids=["one", "many"])
def unit_file(request, tmp_path):
    """A function that writes the unit with one setting replaced, and returns its path.  Its command exists."""
    instance = request.param + ("1" if "@" in request.param else "")
    shutil.copy(UNITS / f"{request.param}.socket", tmp_path / f"{instance}.socket")

    def write(name="", setting=""):
        service = (UNITS / f"{request.param}.service").read_text()
        text, count = re.subn(rf"^{name}=.*\n", setting, service, flags=re.MULTILINE)
        assert bool(count) == bool(name)
        path = tmp_path / f"{instance}.service"
        path.write_text(text.replace("/opt/chatd/bin/twistd", str(TWISTD)))
        return path

    return write


def exposure(path):
    said, code = analyze("security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", path)
    overall = float(re.search(rf"Overall exposure level for {path.name}: (\d+\.\d)", said)[1])
    assert (code == 0) == (overall <= EXPOSURE)
    return overall


def test_sandbox_has_low_exposure(unit_file):
    assert exposure(unit_file()) <= EXPOSURE


@pytest.mark.parametrize("name", ["CapabilityBoundingSet", "SystemCallFilter"])
def test_weaker_sandbox_is_detected(unit_file, name):
    """A unit without one of its restrictions has a higher exposure than permitted."""
    assert exposure(unit_file(name)) > EXPOSURE


def test_systemd_accepts_the_units(unit_file):
    """systemd-analyze verify reports nothing, and detects a wrong key."""
    verify = ("verify", "--man=no", "--recursive-errors=no")
    assert analyze(*verify, unit_file(), unit_file().with_suffix(".socket")) == ("", 0)
    said, _ = analyze(*verify, unit_file("WatchdogSec", "WatchdogSecs=10\n"))
    assert "Unknown key" in said


# On a machine that has booted


class Chatd:
    """chatd on a machine, as an operator installs it."""

    def __init__(self, machine):
        self.run, self.command, self.path, self.connect = machine.run, machine.command, machine.path, machine.connect
        self._drop_in = self.path("/run/systemd/system/chatd.service.d/test.conf")
        self._options = self.path("/etc/chatd/chatd.env")
        cursor = self.run("journalctl", "--lines=0", "--show-cursor").split()[-1]
        follow = self.command(
            "journalctl", "--follow", "--output=cat", "--unit=chatd.service", f"--after-cursor={cursor}"
        )
        self._follow = subprocess.Popen(follow, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.journal = Lines(self._follow.stdout)
        self.configure()

    def configure(self, *lines, **options):
        """Change lines of the unit, and set options in its file."""
        for path, text in [
            (self._drop_in, "\n".join(["[Service]", *lines, ""])),
            (self._options, "".join(f"CHATD_{name}={value}\n" for name, value in options.items())),
        ]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        self.systemctl("daemon-reload")

    def command_line(self, old, new):
        """Change the command line."""
        assert old in COMMAND
        self.configure("ExecStart=", f"ExecStart={COMMAND.replace(old, new)}")

    def systemctl(self, *arguments):
        self.run("systemctl", *arguments)

    def show(self, name):
        """Return a property of the service."""
        return self.run("systemctl", "show", f"--property={name}", "--value", "chatd.service").strip()

    def close(self):
        """Leave the machine as it was."""
        os.killpg(self._follow.pid, signal.SIGKILL)  # nsenter and its children
        self._follow.wait(LONG)
        self.journal.close()
        self.configure("TimeoutStopSec=1ms")
        self.systemctl("stop", "chatd.socket")
        self.systemctl("reset-failed")
        self.run("rm", "-rf", "/var/lib/private/chatd")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine that boots once for all tests.  Each test leaves it as it was."""
    with booted.Machine(*booted.installed(tmp_path_factory.mktemp("machine")), booted.NO_NETWORK) as machine:
        yield machine


@pytest.fixture
def chatd(machine):
    chatd = Chatd(machine)
    yield chatd
    chatd.close()


def test_start_at_boot(chatd):
    """An enabled service starts with multi-user.target, and its socket with it."""
    chatd.systemctl("enable", "chatd.service")
    chatd.systemctl("start", "multi-user.target")
    chatd.systemctl("is-active", "chatd.service", "chatd.socket")
    assert chatd.show("StatusText") == "ready"


def test_connection_starts_the_service(chatd):
    """A connection to the socket starts the service, and waits until it is ready."""
    chatd.run("mkfifo", "/run/seed")  # chatd is not ready until it has read its seed from this pipe
    chatd.configure(SEED="/run/seed")
    chatd.systemctl("start", "chatd.socket")
    assert chatd.show("ActiveState") == "inactive"
    with chatd.connect() as client:
        client.send(upgrade())
        write = "exec >/run/seed; systemctl show --property=ActiveState --value chatd.service >&2; echo []"
        state = subprocess.run(chatd.command("sh", "-c", write), capture_output=True, timeout=LONG, check=True).stderr
        assert state == b"activating\n"
        assert client.head()[0] == 101
        assert client.json()["data"] == []
    chatd.journal.wait("ready, with the log")
    chatd.systemctl("start", "chatd.service")
    assert chatd.show("ActiveState") == "active"


def test_one_command_without_a_unit_file(machine, tmp_path):
    """The command of docs/operations.md returns when the service is ready; a stop ends it well and keeps its store."""
    page = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^```sh\n(systemd-run .*?)^```$", page, re.MULTILINE | re.DOTALL)
    machine.run("sh", "-ec", command)
    show = "systemctl", "show", "--value", "chatd-try.service"
    assert machine.run(*show, "--property=StatusText").strip() == "ready"
    timeout = machine.run(*show, "--property=TimeoutStopUSec").strip()
    drain = next(int(option.default) for option in OPTIONS if option.name == "drain")
    assert timeout == "45s"
    assert drain + 10 <= 45
    with machine.connect() as client:
        assert numbered(client.join()) == SEED
        client.send(post("ann", "hi"))
        assert numbered(client.json()) == [(3, "ann", "hi")]
    machine.run("systemctl", "stop", "chatd-try.service")
    store = machine.path("/var/lib/private/chatd-try/chatd.sqlite")
    assert [row[:3] for row in stored(shutil.copy(store, tmp_path))[1]] == [*SEED, (3, "ann", "hi")]
    assert machine.run("systemctl", "list-units", "--state=failed", "--plain", "--no-legend").strip() == ""
    machine.run("rm", "-rf", "/var/lib/private/chatd-try")


def test_check_beside_the_unit(chatd):
    """The command of docs/operations.md checks as the unit's user, and leaves the state directory as it is."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    (command,) = re.findall(r"^  ```sh\n  (systemd-run .*?)^  ```$", page, re.MULTILINE | re.DOTALL)
    chatd.systemctl("start", "chatd.service")
    folder = chatd.path("/var/lib/private/chatd")
    before = folder.stat()
    printed = booted.succeed(*chatd.command("sh", "-c", command), statuses=(1,))
    assert "--store sqlite:/var/lib/chatd/chatd.sqlite: another chatd uses it" in printed
    assert "cannot be" not in printed
    assert "open files" not in printed
    assert (folder.stat().st_mode, folder.stat().st_uid) == (before.st_mode, before.st_uid)


def test_start_times_out_without_ready(chatd):
    """The start fails if the service does not notify systemd."""
    chatd.configure(
        "ExecStart=", f"ExecStart=/usr/bin/env -u NOTIFY_SOCKET {COMMAND}", "TimeoutStartSec=3", "Restart=no"
    )
    with pytest.raises(AssertionError, match="a timeout was exceeded"):
        chatd.systemctl("start", "chatd.service")
    chatd.journal.wait("ready, with the log")
    assert chatd.show("Result") == "timeout"


def test_state_directory_of_the_dynamic_user(chatd, tmp_path):
    """The store is private to the dynamic user and survives a restart of the service."""
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        assert numbered(client.join()) == SEED
        client.send(post("ann", "hi"))
        assert numbered(client.json()) == [(3, "ann", "hi")]
    process = chatd.path(f"/proc/{chatd.show('MainPID')}").stat()
    chatd.systemctl("stop", "chatd.socket")
    store = chatd.path("/var/lib/private/chatd/chatd.sqlite")
    assert store.stat().st_uid == process.st_uid
    assert 61184 <= process.st_uid <= 65519, "the range of dynamic users of systemd"
    assert store.stat().st_mode & 0o777 == 0o600
    assert [row[:3] for row in stored(shutil.copy(store, tmp_path))[1]] == [*SEED, (3, "ann", "hi")]
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        assert numbered(client.join()) == [*SEED, (3, "ann", "hi")]


def test_process_has_no_privileges(chatd):
    """The process has no capabilities, and has a system call filter."""
    chatd.systemctl("start", "chatd.service")
    status = chatd.path(f"/proc/{chatd.show('MainPID')}/status").read_text()
    has = dict(line.split(":\t") for line in status.splitlines())
    assert {int(has[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (has["NoNewPrivs"], has["Seccomp"]) == ("1", "2")


def test_journal_has_json_lines(chatd):
    chatd.systemctl("start", "chatd.service")
    (line,) = chatd.journal.wait(r"^\{.*ready, with the log.*\}$")
    assert json.loads(line[0])["system"] == "chatd.service"


def test_stop_drains_successfully(chatd):
    """A stop releases the clients, reports `draining` and ends with success."""
    chatd.command_line(f"--drain {DRAIN}", "--drain 2")
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        client.join()
        stop = subprocess.Popen(chatd.command("systemctl", "stop", "chatd.socket"))
        opcode, payload = client.frame()
        assert (opcode, payload[:2]) == (CLOSE, (1012).to_bytes(2))
        assert chatd.show("StatusText") == "draining"
    assert stop.wait(LONG) == 0
    chatd.journal.wait(r"\bstopped\b")
    assert chatd.show("ActiveState") == "inactive"
    assert chatd.show("Result") == "success"
    with pytest.raises(ConnectionRefusedError):
        chatd.connect()


def test_admin_drain_is_reported_to_systemd(chatd):
    """The status of the service is `draining` after POST /drain, and the service stays active."""
    chatd.command_line(f"--drain {DRAIN}", "--drain 2")
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client, chatd.connect(8086) as admin:
        client.join()
        admin.send(b"POST /drain HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert admin.head()[0] == 202
        assert chatd.show("StatusText") == "draining"
        assert client.closed() == 1012
    assert chatd.show("ActiveState") == "active"


def test_reload_keeps_clients(chatd):
    """`systemctl reload` sends SIGHUP, which ends neither the server nor a connection."""
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        client.join()
        chatd.systemctl("reload", "chatd.service")
        chatd.journal.wait(r"\breloading\b")
        client.send(post("ann", "still here"))
        assert client.json()["data"]["message"] == "still here"
    assert chatd.show("NRestarts") == "0"


def test_stop_times_out(chatd):
    """systemd kills a server whose drain is longer than TimeoutStopSec."""
    chatd.configure("TimeoutStopSec=1")
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        client.join()
        chatd.systemctl("stop", "chatd.socket")
    assert chatd.show("Result") == "timeout"


def test_connection_waits_during_restart(chatd):
    """A connection during a restart waits in the socket for the next process."""
    chatd.command_line(f"--drain {DRAIN}", "--drain 2")
    chatd.systemctl("start", "chatd.service")
    with chatd.connect() as client:
        first = client.join()
        restart = subprocess.Popen(chatd.command("systemctl", "restart", "chatd.service"))
        assert client.frame()[0] == CLOSE
        with chatd.connect() as other:
            client.socket.close()
            assert other.join() == first
    assert restart.wait(LONG) == 0


def test_hanging_server_is_restarted(chatd):
    """The watchdog aborts a server that hangs, whose stack is in the journal, and systemd restarts it."""
    chatd.configure("WatchdogSec=2")
    chatd.systemctl("start", "chatd.service")
    process = chatd.show("MainPID")
    with chatd.connect() as client:
        client.join()
        chatd.systemctl("kill", "--signal=STOP", "chatd.service")
        client.rest()  # until the process has ended
    with chatd.connect() as client:
        assert numbered(client.join()) == SEED, "the next process serves the log"
    chatd.journal.wait("Watchdog timeout")
    chatd.journal.wait("Fatal Python error: Aborted")
    # The thread that got the signal writes the stacks while the others may run on.
    chatd.journal.wait(r"\(most recent call first\):")
    chatd.journal.wait(r'File ".*\.py", line [0-9]+ in \w+')
    assert chatd.show("MainPID") != process
    assert chatd.show("NRestarts") == "1"


def test_working_server_is_not_restarted(chatd):
    """A server that works feeds the watchdog in time."""
    chatd.configure("WatchdogSec=1")
    chatd.systemctl("start", "chatd.service")
    began, fed = (int(chatd.show(f"{name}TimestampMonotonic")) for name in ("ActiveEnter", "Watchdog"))
    while fed < began + 3_000_000:
        fed = int(chatd.show("WatchdogTimestampMonotonic"))
        assert chatd.show("NRestarts") == "0"


def test_unfed_watchdog_kills(chatd):
    """The watchdog kills a server that does not feed it."""
    chatd.configure("ExecStart=", f"ExecStart=/usr/bin/env -u WATCHDOG_USEC {COMMAND}", "WatchdogSec=1", "Restart=no")
    chatd.systemctl("start", "chatd.service")
    chatd.journal.wait("Watchdog timeout")


def test_tls_in_the_sandbox(chatd, tmp_path):
    _, trust = certificate_for(tmp_path)
    for name in ("key.pem", "cert.pem"):
        chatd.path(f"/etc/chatd/{name}").write_bytes((tmp_path / name).read_bytes())
    keys = "privateKey=/etc/chatd/key.pem:certKey=/etc/chatd/cert.pem"
    chatd.configure(ADMIN=f"ssl:8443:interface=127.0.0.1:{keys}")
    chatd.systemctl("start", "chatd.service")
    with chatd.connect(8443) as client:
        client.socket = trust.wrap_socket(client.socket, server_hostname="127.0.0.1")
        client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.head()[0] == 200


CONTEXT = "from twisted.internet.ssl import CertificateOptions; CertificateOptions().getContext()"


def test_memory_that_is_written_and_executed(chatd):
    """Twisted's TLS, which chatd speaks to Redis and to webhooks, needs it; MemoryDenyWriteExecute forbids it."""
    command = "systemd-run", "--quiet", "--pipe", "--wait"
    chatd.run(*command, "/opt/chatd/bin/python3", "-c", CONTEXT)
    with pytest.raises(AssertionError, match=r"Cannot allocate write\+execute memory"):
        chatd.run(*command, "--property=MemoryDenyWriteExecute=yes", "/opt/chatd/bin/python3", "-c", CONTEXT)


@pytest.mark.parametrize(
    ("port", "left_out"), [(8443, None), (443, None), (8443, "SupplementaryGroups=chatd-tls"), (443, "PrivateUsers=no")]
)
def test_documented_tls(chatd, port, left_out, tmp_path):
    """The drop-in of docs/operations.md serves TLS, and certbot's hook renews the key.  Each setting is needed."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    chapter = re.search(r"^### chatd itself\n(.*?)^### ", page, re.MULTILINE | re.DOTALL)[1]
    (hook,) = re.findall(r"^```sh\n(.*?)^```$", chapter, re.MULTILINE | re.DOTALL)
    (drop_in,) = re.findall(r"^```ini\n\[Service\]\n(.*?)^```$", chapter, re.MULTILINE | re.DOTALL)
    privileges = re.findall(r"`((?:PrivateUsers|AmbientCapabilities|CapabilityBoundingSet)=\w+)`", chapter)
    lines = [*drop_in.replace("ssl:8443", f"ssl:{port}").splitlines(), *(privileges if port == 443 else [])]

    def renew(name):
        folder, lineage = tmp_path / name, chatd.path("/etc/letsencrypt")
        for path in (folder, lineage):
            path.mkdir(exist_ok=True)
        _, trust = certificate_for(folder)
        for file, own in (("privkey.pem", "key.pem"), ("cert.pem", "cert.pem"), ("chain.pem", "cert.pem")):
            (lineage / file).write_bytes((folder / own).read_bytes())
        chatd.run("env", "RENEWED_LINEAGE=/etc/letsencrypt", "sh", "-euc", hook)
        return trust

    def answered(trust):
        with chatd.connect(port) as client:
            client.socket = trust.wrap_socket(client.socket, server_hostname="127.0.0.1")
            client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
            return client.head()[0]

    chatd.run("groupadd", "--system", "--force", "chatd-tls")
    chatd.configure(*(line for line in lines if line != left_out), "Restart=no")
    trust = renew("old")
    if left_out:
        assert left_out in lines
        with pytest.raises(AssertionError, match=r"Job for chatd\.service failed"):
            chatd.systemctl("start", "chatd.service")
        return
    chatd.systemctl("start", "chatd.service")
    assert answered(trust) == 200
    trust = renew("new")
    chatd.journal.wait("read the certificate of ssl:")
    assert answered(trust) == 200


# Several instances on one machine


class Instances:
    """Instances of chatd on a machine, which share a Redis with a password."""

    ADMIN = (8091, 8092)

    def __init__(self, machine):
        self.run, self.command, self.connect = machine.run, machine.command, machine.connect
        drop_in = machine.path("/run/systemd/system/chatd@.service.d/test.conf")
        password = machine.path("/etc/chatd/store-password")
        lines = [
            "[Service]",
            "LoadCredential=store-password:/etc/chatd/store-password",
            "Environment=CHATD_STORE_PASSWORD_FILE=%d/store-password",
            "ExecStart=",
            f"ExecStart={COMMAND_OF_ONE.replace(f'--drain {DRAIN}', '--drain 2')}",
        ]
        for path, text in [(drop_in, "\n".join([*lines, ""])), (password, "s3cret\n")]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        password.chmod(0o600)
        self.systemctl("daemon-reload")
        redis = booted.REDIS, "--bind", "127.0.0.1", "--save", "", "--requirepass", "s3cret"
        self.run("systemd-run", "--quiet", "--unit=redis", *redis)

    def systemctl(self, *arguments):
        self.run("systemctl", *arguments)

    def members(self):
        """Return the number of members of each instance, from its admin port."""
        return [self._members(port) for port in self.ADMIN]

    def _members(self, port):
        with self.connect(port) as admin:
            admin.send(b"GET /metrics HTTP/1.0\r\n\r\n")
            return int(float(re.search(rb"(?m)^chatd_members (\S+)$", admin.rest())[1]))

    def close(self):
        """Leave the machine as it was."""
        self.systemctl("kill", "--signal=KILL", "chatd@*.service")
        self.systemctl("stop", "chatd@*.socket", "chatd@*.service", "redis.service")
        self.run("rm", "-rf", "/run/systemd/system/chatd@.service.d", "/etc/chatd/store-password")
        self.systemctl("daemon-reload")


@pytest.fixture
def instances(machine):
    instances = Instances(machine)
    yield instances
    instances.close()


MOST = 64
"""Enough clients for both instances to get one: the kernel misses one instance once in 10 ** 19 runs."""


def check_delivery(clients, message):
    """Post with the first client, and check that all receive the same frame."""
    clients[0].send(post("ann", message))
    received = [client.json() for client in clients]
    assert [frame == received[0] for frame in received] == [True] * len(clients)
    assert received[0]["data"]["message"] == message


def connect_to_both(instances, stack, clients):
    """Connect clients until each instance has one."""
    while not all(instances.members()):
        assert len(clients) < MOST
        clients.append(stack.enter_context(instances.connect()))
        clients[-1].join()


def reconnect(instances, stack, clients, count):
    """Wait for a number of clients to be released, and reconnect them.  The others stay connected."""
    while count:
        ready, _, _ = select.select([client.socket for client in clients], [], [], LONG)
        assert ready
        for client in [client for client in clients if client.socket in ready]:
            assert client.closed() == 1012
            clients.remove(client)
            clients.append(stack.enter_context(instances.connect()))
            clients[-1].join()
            count -= 1


def test_two_instances_share_port_and_rooms(instances):
    """Two instances share one port and their rooms; the clients of one that stops move to the other."""
    instances.systemctl("enable", "chatd@1.service")
    instances.systemctl("is-enabled", "chatd@1.service", "chatd@1.socket")
    instances.systemctl("disable", "chatd@1.service")
    instances.systemctl("start", "chatd@1.service", "chatd@2.service")
    instances.systemctl("is-active", *(f"chatd@{name}.{kind}" for name in (1, 2) for kind in ("service", "socket")))
    with contextlib.ExitStack() as stack:
        clients = []
        connect_to_both(instances, stack, clients)
        check_delivery(clients, "on both")
        first, _ = instances.members()
        # The socket first, as in operations.md, so that the leaving instance gets no new clients.
        instances.systemctl("stop", "chatd@1.socket")
        stop = subprocess.Popen(instances.command("systemctl", "stop", "chatd@1.service"))
        reconnect(instances, stack, clients, first)
        check_delivery(clients, "on the other")
        assert stop.wait(LONG) == 0
        with pytest.raises(ConnectionRefusedError):
            instances.connect(instances.ADMIN[0])
        instances.systemctl("start", "chatd@1.service")
        connect_to_both(instances, stack, clients)
        check_delivery(clients, "on both again")


def test_restart_one_of_two_instances(instances):
    """A restart of one instance moves its clients, and afterwards both accept clients."""
    instances.systemctl("start", "chatd@1.service", "chatd@2.service")
    with contextlib.ExitStack() as stack:
        clients = []
        connect_to_both(instances, stack, clients)
        first, _ = instances.members()
        instances.systemctl("stop", "chatd@1.socket")
        restart = subprocess.Popen(instances.command("systemctl", "restart", "chatd@1.service"))
        reconnect(instances, stack, clients, first)
        assert restart.wait(LONG) == 0
        instances.systemctl("is-active", "chatd@1.service", "chatd@1.socket")
        connect_to_both(instances, stack, clients)
        check_delivery(clients, "on both")
