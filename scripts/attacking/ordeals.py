"""What happens to a server besides connections: it is stopped, short of files or disk, or its clock is set."""

import asyncio
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from attacking.attacks import JOINED, attack
from attacking.servers import TWISTD, Server

FEW_FILES: Final = 256
DISK: Final = "disk"
"""The folder of a small disk, in the folder of the server."""
DISK_SIZE: Final = "16m"
SMALL_DISK: Final = f'mkdir {DISK} && mount -t tmpfs -o size={DISK_SIZE} tmpfs {DISK} && exec "$@"'
"""The shell command that runs a program with a small disk; it needs a mount namespace of its own."""
SET_CLOCK: Final = """
import signal, time
true, offset, steps = time.time, [0], [86_400, -3600, 1_800, 0, -86_400, 5, 0]
time.time = lambda: true() + offset[0]
def step(*_):
    offset[0] = steps[0]
    steps.append(steps.pop(0))
signal.signal(signal.SIGUSR2, step)
from twisted.scripts.twistd import run
run()
"""
"""twistd with a wall clock that each SIGUSR2 sets, forward and backward, by seconds to a day."""


def start(folder: str, *options: str, before: Sequence[str] = (), command: Sequence[str] = TWISTD) -> Server:
    """Start a server that keeps few messages, so that its memory stays."""
    return Server(folder, "--retain=5000", *options, before=before, command=command)


class Ordeal(NamedTuple):
    """One of them."""

    words: str
    run: Callable[[Server, float], Awaitable[object]]
    """Let it happen to the server for so many seconds."""
    start: Callable[[str], Server] = start
    """Start a server in a folder."""
    seconds: float | None = None
    """How long it lasts; None for as long as an attack."""
    waits: bool = False
    """True if posts cannot be answered meanwhile."""


async def _stop(server: Server, seconds: float) -> None:
    server.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    server.process.send_signal(signal.SIGCONT)


def _with_few_files(folder: str) -> Server:
    return start(folder, before=("prlimit", f"--nofile={FEW_FILES}:{FEW_FILES}"))


async def _crowd(server: Server, seconds: float) -> None:
    await attack(JOINED, server, seconds)


def _with_small_disk(folder: str) -> Server:
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    before = "unshare", "--mount", *user, "sh", "-c", SMALL_DISK, "sh"
    return start(folder, f"--store=sqlite:{DISK}/chatd.sqlite", before=before)


def fill(path: pathlib.Path) -> None:
    """Write zeros until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


async def _fill_disk(server: Server, seconds: float) -> None:
    """Fill the disk, and free it."""
    filler = pathlib.Path(f"/proc/{server.process.pid}/cwd/{DISK}/filler")
    fill(filler)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(filler.unlink)


def _with_clock(folder: str) -> Server:
    return start(folder, "--retain=30d", command=(sys.executable, "-c", SET_CLOCK))


async def _set_clock(server: Server, seconds: float) -> None:
    """Set the clock once a second."""
    for _ in range(max(1, round(seconds))):
        server.process.send_signal(signal.SIGUSR2)
        await asyncio.sleep(1)


ORDEALS: Final = {
    "stop": Ordeal("SIGSTOP of the server for a minute", _stop, seconds=60, waits=True),
    "files": Ordeal(f"1,000 clients of a server that may open {FEW_FILES} files", _crowd, _with_few_files),
    "disk": Ordeal("a full disk under a SQLite store", _fill_disk, _with_small_disk, waits=True),
    "clock": Ordeal("a wall clock that is set once a second, by up to a day", _set_clock, _with_clock),
}
"""Each ordeal by its name."""
