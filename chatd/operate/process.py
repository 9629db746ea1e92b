"""The process of the server under twistd: how it becomes a daemon, and how a failed start ends it.

twistd reports only an Exception from a daemon that starts, in two lines of at most 100 bytes.  If the daemon ends in
another way, the process that started it waits for ever.  chatd therefore becomes a daemon by itself, and twistd then
runs in what it takes for the foreground.  The first process waits until the daemon has started or ended, and its
exit status is 1 unless the daemon has started.
"""

import os
import pathlib
import signal
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, Final, NoReturn

from twisted.logger import Logger

STARTED: Final = b"started"
"""The report of a daemon that has started; another report is the line that explains a failure."""
SILENT: Final = b"chatd: the daemon ended before it had started: its log may give the reason\n"
"""The line for a daemon that ended without a report."""
STDOUT, STDERR = 1, 2
"""Descriptors; twistd redirects `sys.stdout` and `sys.stderr` to the log."""
UMASK: Final = 0o077
"""The umask that twistd gives a daemon."""

_logger = Logger()


def obstacle(twistd: MutableMapping[str, Any]) -> str | None:
    """Return one line about an option of twistd that will end the process after it has become a daemon, or None."""
    root = os.geteuid() == 0
    for option in ("uid", "gid", "chroot"):
        if twistd.get(option) is not None and not root:
            return f"--{option} needs root: start twistd as root, or leave the option out"
    if twistd.get("chroot") is not None:
        return None  # the other paths start there
    folder = pathlib.Path(twistd.get("rundir") or ".")
    if not os.access(f"{folder}/.", os.X_OK):
        return f"--rundir {folder}: there is no such folder for this user: create it, or name another"
    if twistd.get("pidfile"):
        file = pathlib.Path(twistd["pidfile"])
        if not os.access(file if os.access(file, os.F_OK) else file.parent, os.W_OK):
            return f"--pidfile {file}: this user cannot write it: name another, or give an empty one (--pidfile=)"
    return None


class ServerProcess:
    """The current process, with the options of twistd for it."""

    def __init__(self, twistd: MutableMapping[str, Any], reactor: Any) -> None:
        self._twistd = twistd
        self._reactor = reactor
        self._report: int | None = None
        """The pipe to the process that waits for the start of this daemon."""

    @property
    def sheds_privileges(self) -> bool:
        """True if twistd will change the user of the process."""
        return any(self._twistd.get(option) is not None for option in ("uid", "gid"))

    def daemonize(self) -> None:
        """Continue in a daemon if twistd should make one; this process only reports its start, and ends."""
        if self._twistd.get("nodaemon", True):
            return
        streams = sys.__stdin__, sys.__stdout__, sys.__stderr__
        for stream in streams[1:]:
            if stream is not None:
                stream.flush()
        reading, writing = os.pipe()
        if os.fork():
            os.close(writing)
            self._await(reading)
        os.close(reading)
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, stream in enumerate(streams):
            if stream is not None:  # otherwise another file may have the descriptor
                os.dup2(null, descriptor)
        os.close(null)
        self._report = writing
        self._twistd["nodaemon"] = True
        if self._twistd.get("umask") is None:
            self._twistd["umask"] = UMASK

    def _await(self, reading: int) -> NoReturn:
        """Wait until the daemon has started or ended; end this process accordingly."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with open(reading, "rb") as pipe:
            report = pipe.read()
        if report == STARTED:
            os._exit(0)
        _print(report or SILENT)
        self._remove_pid_file()  # the daemon may have given up the right to do that
        os._exit(1)

    def started(self) -> None:
        """Report that the server has started."""
        if self._report is not None:
            os.write(self._report, STARTED)
            os.close(self._report)
            self._report = None
            self._twistd["nodaemon"] = False  # twistd writes the report of a crash to a file then

    def fail(self, line: str) -> NoReturn:
        """End the process with one line on standard error and status 1, before the reactor runs."""
        self._explain(line)
        raise SystemExit(1)

    def fail_later(self, line: str) -> None:
        """Stop the reactor, and then end the process in the same way: twistd would end it with status 0."""
        self._explain(line)
        self._reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self._reactor.stop()

    def _explain(self, line: str) -> None:
        if not self._shows_log:
            _logger.error("{line}", line=line)
        self._remove_pid_file()
        text = f"chatd: {line}\n".encode()
        if self._report is None:
            _print(text)
        else:
            os.write(self._report, text)

    @property
    def _shows_log(self) -> bool:
        """True if standard error shows the log too, as in a terminal."""
        twistd = self._twistd
        elsewhere = self._report is not None or twistd.get("syslog") or twistd.get("logfile") not in (None, "", "-")
        closed = sys.__stdout__ is None or sys.__stderr__ is None
        return not (elsewhere or closed) and os.path.sameopenfile(STDOUT, STDERR)

    def _remove_pid_file(self) -> None:
        if self._twistd.get("pidfile"):
            with suppress(OSError):
                pathlib.Path(self._twistd["pidfile"]).unlink()


def _print(text: bytes) -> None:
    """Write to standard error, unless it is closed."""
    if sys.__stderr__ is not None:
        with suppress(OSError):
            os.write(STDERR, text)
