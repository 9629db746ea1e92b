"""EC2 instances without EC2: the image that was baked, booted in a network of the test's own, and what surrounds it.

A host is a network namespace, optionally connected to others by a bridge.  On its loopback an instance finds the
metadata service at the usual address.  The baked image boots unchanged: only the kernel's command line names the
endpoint of AWS, which is the double of tests/support/imds.py too.
"""

import concurrent.futures
import contextlib
import ctypes
import itertools
import os
import pathlib
import subprocess
import threading

from support import booted
from support.booted import succeed
from support.imds import INSTANCE, Cloud
from support.servers import LONG, Raw, environment, need

METADATA = "169.254.169.254"
CLIENTS_PORT = 8085
NETWORK = "198.18.77"
"""A network from the range for such tests (RFC 2544), visible only in the namespaces."""

_numbers = itertools.count(1)


class Host:
    """A network namespace of this machine; a context manager.

    With a hub it has an address on the hub's bridge; without one it is alone.
    """

    def __init__(self, hub=None):
        number = next(_numbers)
        self.name = f"chatd-{os.getpid()}-{number}"
        self.address = "127.0.0.1"
        self._stack = contextlib.ExitStack()
        self._ip = need("ip")
        succeed(self._ip, "netns", "add", self.name)
        self._stack.callback(succeed, self._ip, "netns", "delete", self.name)
        self._do("link", "set", "lo", "up")
        self._do("address", "add", f"{METADATA}/32", "dev", "lo")
        if hub is not None:
            self.address = f"{NETWORK}.{number % 250 + 2}"
            peer = f"host{number}"
            self._do("link", "add", "eth0", "type", "veth", "peer", "name", peer, "netns", hub.name)
            self._do("address", "add", f"{self.address}/24", "dev", "eth0")
            self._do("link", "set", "eth0", "up")
            hub._do("link", "set", peer, "master", "bridge", "up")

    def _do(self, *words):
        succeed(self._ip, "-netns", self.name, *words)

    def bridge(self):
        """Have the others wired to this one."""
        self.address = f"{NETWORK}.1"
        self._do("link", "add", "bridge", "type", "bridge")
        self._do("address", "add", f"{self.address}/24", "dev", "bridge")
        self._do("link", "set", "bridge", "up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    @property
    def path(self):
        return pathlib.Path("/run/netns", self.name)

    def inside(self, make):
        """Make something that is on this network."""

        def enter():
            with self.path.open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            return make()

        # It is a thread that is on a network, and this one ends when it is done.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()

    def connect(self, port=CLIENTS_PORT):
        """Return a raw client."""
        return self.inside(lambda: Raw(port))

    def run(self, *command, **options):
        """Start a program here, which is killed at the end if it runs until then."""
        process = subprocess.Popen([self._ip, "netns", "exec", self.name, *command], env=environment(), **options)
        self._stack.callback(self._kill, process)
        return process

    @staticmethod
    def _kill(process):
        process.kill()
        process.wait(LONG)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()

    def redis(self, *options):
        """Start a Redis here; answers its URL."""
        server = self.run(
            *(need("redis-server"), "--bind", self.address, "--port", "6379", "--save", "", "--protected-mode", "no"),
            *options,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = threading.Event()

        def read():
            for line in server.stdout:
                if "Ready to accept connections" in line:
                    ready.set()

        threading.Thread(target=read, daemon=True).start()
        assert ready.wait(LONG)
        return f"redis://{self.address}:6379/0"

    def password(self, word):
        """Have the Redis here ask for a password."""
        self.inside(lambda: succeed(need("redis-cli"), "-h", self.address, "config", "set", "requirepass", word))


@contextlib.contextmanager
def surroundings(host, number=0):
    """Run the surroundings of an instance on a host: its metadata and AWS."""
    with host.inside(lambda: Cloud(f"{INSTANCE[:-1]}{number}", (METADATA, 80))) as cloud:
        yield cloud


def boot(root, host, cloud, *changes, more=()):
    """Boot an image on a host; changes are pairs of a path in the machine and a file that is there instead.

    `more` is for the kernel's command line.
    """
    binds = [(file, path, False) for path, file in changes]
    arguments = *more, booted.NO_NETWORK, f"systemd.setenv=AWS_ENDPOINT_URL={cloud.url}"
    return booted.Machine(root, binds, *arguments, network=host.path)
