"""A server of this checkout under attack, on the loopback, at a port that the kernel chose."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Final

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent.parent
HOST: Final = "127.0.0.1"
TWISTD: Final = sys.executable, str(pathlib.Path(sys.executable).with_name("twistd"))
START_SECONDS: Final = 20
"""The time in which a server must start."""
SUSPICIOUS: Final = re.compile("Traceback|Unhandled|unexpected error|critical")
"""What the log of a server without faults does not have."""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class Server:
    """A server in a process of its own.

    `options` are those of `twistd chatd`; without another, the store is in memory.  `before` are the words before the
    command, as those of prlimit, and `command` is what runs as twistd.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *options: str,
        before: Sequence[str] = (),
        command: Sequence[str] = TWISTD,
    ) -> None:
        self.port, self.admin_port = free_port(), free_port()
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("CHATD_", "PYTHON"))}
        ports = (
            f"--listen=tcp:{self.port}:interface={HOST}:backlog=4096",
            f"--admin=tcp:{self.admin_port}:interface={HOST}",
        )
        self.process = subprocess.Popen(  # noqa: S603 -- this module made the command
            [*before, *command, "--nodaemon", "--pidfile=", "chatd", "--store=memory:", *ports, *options],
            cwd=folder,
            env=kept | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.faults: list[str] = []
        """The suspicious lines of the log."""
        self.last = ""
        """The last line of the log."""
        self.logged = 0
        """The size of the log, in bytes."""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.logged += len(line)
            self.last = line.strip()
            if " ready, with the log " in line:
                self._ready.set()
            if SUSPICIOUS.search(line):
                self.faults.append(self.last)
        self._ready.set()

    def ready(self) -> bool:
        """Wait until the server serves; return whether it does."""
        return self._ready.wait(START_SECONDS) and self.running

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self.process.poll() is None

    def memory(self) -> int:
        """Return the resident memory in MB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) >> 10

    def files(self) -> int:
        """Return the number of open files."""
        return len([*pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir()])

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
