"""Containers without Docker: buildah makes the image of the Dockerfile, and runc runs it as its configuration says.

The base is a Debian of its packages, made by mmdebstrap, in place of the official image of Python.  pip takes the
locked wheels from folders, so that a build needs no network.  A container has the image's root read-only, no
capability, and the network of a Host.  Docker's engine, its networks and its names do not take part.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from support.booted import kept, succeed, wheels
from support.servers import LONG, ROOT, Lines, need

SUITE = "trixie"
PACKAGES = "python3,python3-venv,ca-certificates,passwd"
LOCK = ROOT / "requirements-build.txt"
PIP = "[global]\nno-index = true\nfind-links = /wheels /build-wheels\n"


def base():
    """Return the archive of a Debian with Python."""
    command = [need("mmdebstrap"), "--quiet", "--variant=essential", f"--include={PACKAGES}", SUITE]

    def make(folder):
        folder.mkdir()
        succeed(*command, folder / "base.tar")

    return kept("container-base", make, *command[1:]) / "base.tar"


def build_wheels():
    """Return the folder of the locked wheels of the build backend."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command = [*pip, "--require-hashes", "--only-binary=:all:", f"--requirement={LOCK}"]
    return kept("build-wheels", lambda folder: succeed(*command, f"--dest={folder}"), LOCK.read_text())


@dataclass
class Image:
    """An image: the folder of its files, and its configuration as Docker reads it."""

    root: pathlib.Path
    config: dict


@contextlib.contextmanager
def built(folder):
    """Build the image of the Dockerfile in a folder, and remove everything at the end."""
    need("root")
    need("runc")
    storage = folder / "storage"
    buildah = [need("buildah"), f"--root={storage}", f"--runroot={folder / 'run'}", "--storage-driver=overlay"]
    pip = folder / "pip.conf"
    pip.write_text(PIP)
    mounts = {wheels(): "/wheels", build_wheels(): "/build-wheels", pip: "/etc/pip.conf"}
    try:
        scratch = succeed(*buildah, "from", "scratch").strip()
        succeed(*buildah, "add", "--quiet", scratch, base(), "/")
        succeed(*buildah, "commit", "--quiet", scratch, "localhost/base")
        build = [*buildah, "build", "--isolation=chroot", "--format=docker", "--pull-never", "--tag=localhost/chatd"]
        build += [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
        succeed(*build, "--build-arg=BASE=localhost/base", ROOT)
        config = json.loads(succeed(*buildah, "inspect", "--type=image", "localhost/chatd"))["Docker"]["config"]
        made = succeed(*buildah, "from", "--pull-never", "localhost/chatd").strip()
        yield Image(pathlib.Path(succeed(*buildah, "mount", made).strip()), config)
    finally:
        subprocess.run([*buildah, "rm", "--all"], capture_output=True, check=False)
        subprocess.run([*buildah, "rmi", "--all", "--force"], capture_output=True, check=False)
        subprocess.run([need("umount"), storage / "overlay"], capture_output=True, check=False)


class Container:
    """A container of an image on the network of a Host; a context manager that leaves nothing of it behind.

    Without words it runs the command of the image.  `volumes` are folders by the paths where they are, `tmpfs` are
    options of file systems in memory by theirs, `names` is the text of /etc/hosts, and `files` how many may be open.
    """

    _numbers = itertools.count()

    def __init__(self, image, host, *words, environment=None, volumes=None, tmpfs=None, names="", files=None):
        self.image = image
        self._name = f"chatd-{os.getpid()}-{next(self._numbers)}"
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self._runc = [need("runc"), f"--root={folder / 'state'}"]
        succeed(*self._runc, "spec", f"--bundle={folder}")
        spec = json.loads((folder / "config.json").read_text())
        uid, gid = map(int, image.config["User"].split(":"))
        extra = [f"{name}={value}" for name, value in (environment or {}).items()]
        spec["process"] |= {
            "terminal": False,
            "user": {"uid": uid, "gid": gid},
            "args": image.config["Entrypoint"] + (list(words) or image.config["Cmd"]),
            "env": image.config["Env"] + extra,
            "cwd": image.config["WorkingDir"],
            "capabilities": {},
            "noNewPrivileges": True,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": files, "soft": files}] if files else [],
        }
        spec["root"] = {"path": str(image.root), "readonly": True}
        spec["linux"]["resources"] = {}
        spec["linux"]["namespaces"] = [
            one | ({"path": str(host.path)} if one["type"] == "network" else {})
            for one in spec["linux"]["namespaces"]
            if one["type"] != "cgroup"
        ]
        bound = {"/etc/hosts": folder / "hosts", **(volumes or {})}
        spec["mounts"] = [one for one in spec["mounts"] if one["type"] != "cgroup"]
        spec["mounts"] += [
            {"destination": place, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
            for place, source in bound.items()
        ]
        spec["mounts"] += [
            {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options.split(",")}
            for place, options in (tmpfs or {}).items()
        ]
        (folder / "config.json").write_text(json.dumps(spec))
        self._process = subprocess.Popen(
            [*self._runc, "run", f"--bundle={folder}", self._name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.log = Lines(self._process.stdout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            subprocess.run([*self._runc, "kill", self._name, "KILL"], capture_output=True, check=False)
            self._process.kill()
            self._process.wait(LONG)
        self.log.close()
        subprocess.run([*self._runc, "delete", "--force", self._name], capture_output=True, check=False)
        self._folder.cleanup()

    def _signal(self, number):
        succeed(*self._runc, "kill", self._name, str(int(number)))

    @property
    def pid(self):
        """The number of its first process on this machine."""
        return json.loads(succeed(*self._runc, "state", self._name))["pid"]

    def execute(self, *command):
        """Run a command in it as `docker exec` does; return the result."""
        return subprocess.run(
            [*self._runc, "exec", self._name, *command], capture_output=True, text=True, timeout=LONG, check=False
        )

    def healthy(self):
        """Return whether the check of the image succeeds now."""
        kind, *command = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        return self.execute(*command).returncode == 0

    def ready(self):
        """Wait until the server in it is ready; return this container."""
        self.log.wait(r"ready, with the log \w+")
        return self

    def kill(self):
        """End it as the kernel does when memory is short."""
        self._signal(signal.SIGKILL)
        self._process.wait(LONG)

    def stop(self, seconds):
        """Stop it as Docker does: return its exit status, or None if it had to be killed after these seconds."""
        self._signal(signal.Signals[self.image.config["StopSignal"]])
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def wait(self, seconds=LONG):
        """Wait for its end; return its exit status."""
        return self._process.wait(seconds)
