"""The server under load, of this checkout or installation, and the processor time that it takes.

*Work* is a number of deliveries for a second of the server's CPU time: its own, and the kernel's on its behalf.  Unlike
deliveries per second of the clock, it depends neither on the speed of the load nor on other processes that wait for the
core.  It does depend on the speed of the machine, which drifts.
"""

import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final, Self

ROOT: Final = pathlib.Path(__file__).resolve().parent.parent.parent
IN_CHECKOUT: Final = (ROOT / "scripts" / "venv").exists()
"""False in the wheel, beside the chatd that is installed."""
STORES: Final = {"memory:": "memory:", "sqlite:": "sqlite:bench.sqlite"}
TICKS: Final = 10
"""The ticks of the clock below which a quotient is noise."""
STARTING: Final = 30.0
"""The seconds in which a server must be ready."""


class BenchError(Exception):
    """The measurement is not possible; the text names the reason and the remedy."""


class Server:
    """A `chatd serve` on a core of its own, in a temporary folder; on leaving, nothing of it is left."""

    def __init__(self, store: str, core: int, *, compress: bool = False) -> None:
        self.core = core
        self._folder = tempfile.TemporaryDirectory(prefix="chatd-bench-")
        self._log = pathlib.Path(self._folder.name, "log")
        self._options = [f"--store={STORES[store]}", f"--compress={'on' if compress else 'off'}"]
        self.port = 0
        """The port on the loopback: the first start chooses it, and later ones keep it."""
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def start(self) -> None:
        """Start a process, which is not ready yet."""
        python = str(ROOT / ".venv/bin/python") if IN_CHECKOUT else sys.executable
        command = [python, "-m", "chatd", "serve", "--admin=", "--rate=0"]
        command += [*self._options, f"--listen=tcp:{self.port}:interface=127.0.0.1:backlog=65535"]
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("CHATD_", "PYTHON"))}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- its words are all from here
                command,
                cwd=self._folder.name,
                env=kept | ({"PYTHONPATH": str(ROOT)} if IN_CHECKOUT else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.sched_setaffinity(self._process.pid, {self.core})  # before it has threads, which inherit it

    def ready(self) -> bool:
        """Return whether the server listens and has read its log; raise BenchError if it never will."""
        text = self._log.read_text(errors="replace")
        listening = re.search(r"ChatFactory starting on (\d+)", text)
        if listening and "ready, with the log" in text:
            self.port = int(listening[1])
            return True
        if self._process.poll() is not None:
            raise BenchError(f"the server did not start: {(text.splitlines() or ['it does not say why'])[-1]}")
        return False

    def wait(self) -> None:
        """Wait until the server is ready."""
        deadline = time.monotonic() + STARTING
        while not self.ready():
            if time.monotonic() > deadline:
                raise BenchError(f"the server was not ready within {STARTING:g} seconds")
            time.sleep(0.02)

    def kill(self) -> None:
        """End the process as a failing machine does, with SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def cpu(self) -> float:
        """Seconds of CPU time used, with the kernel's on its behalf."""
        fields = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes of resident memory."""
        pages = pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Clock:
    """The time since it began: on the clock, of the server, of this process, and of everyone on their cores."""

    def __init__(self, server: Server) -> None:
        self._server, self._cores = server, {server.core, *os.sched_getaffinity(0)}
        self._begin = self._times()
        self.start = time.monotonic()

    def _times(self) -> tuple[float, float, float]:
        return self._server.cpu(), time.process_time(), used(self._cores)

    def shares(self, spent: float) -> dict[str, float]:
        """Return the seconds of the server, and the shares of `spent` seconds in which each was on these cores."""
        cpu, own, everyone = (now - then for now, then in zip(self._times(), self._begin, strict=True))
        return {
            "server_cpu_s": cpu,
            "server_share": cpu / spent,
            "load_share": own / spent,
            "others_share": max(0.0, everyone - cpu - own) / spent,
        }


def used(cores: set[int]) -> float:
    """Seconds that these cores spent on any process, or that a host took from them."""
    lines = [text.split() for text in pathlib.Path("/proc/stat").read_text().splitlines()]
    mine = [words for words in lines if words[0] in {f"cpu{core}" for core in cores}]
    return sum(int(words[place]) for words in mine for place in (1, 2, 3, 8)) / os.sysconf("SC_CLK_TCK")


def per_cpu(count: int, seconds: float) -> float | None:
    """Return the rate per second of CPU time, or None if the time is too short to measure."""
    return count / seconds if seconds * os.sysconf("SC_CLK_TCK") >= TICKS else None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` percent of all do not exceed (the nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
