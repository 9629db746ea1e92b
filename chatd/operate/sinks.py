"""The places that the log can go to: a file, standard output, a pipe, a device, or syslog.

A sink does not wait for its reader.  Only a regular file, which the kernel buffers, is written in the usual way.
"""

import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from typing_extensions import override

ROTATE_BYTES: Final = 10_000_000
"""The size at which the log file is rotated."""
ROTATED_FILES: Final = 10
"""The number of rotated files that are kept.  Others with higher numbers are left alone."""
_WRITE: Final = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY


class Sink(Protocol):
    """A place that the log goes to."""

    def write(self, data: bytes) -> int:
        """Write some bytes, and return how many were taken.

        Raise BlockingIOError if nothing can be written now, and OSError for another fault.
        """

    def reopen(self) -> None:
        """Open the file of the same name again; on an OSError nothing changes."""

    def rotate(self) -> None:
        """Begin a new file; on an OSError the log continues in the old one."""

    def close(self) -> None:
        """Release the file."""


class RotatingFile(Sink):
    """A file, which is rotated as twistd rotates it: the old files are NAME.1, NAME.2 and so on."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._file = os.open(self._path, _WRITE | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._file).st_size

    @override
    def write(self, data: bytes) -> int:
        if self._size >= ROTATE_BYTES:
            self._size = os.fstat(self._file).st_size  # another program may have truncated it
            if self._size >= ROTATE_BYTES:
                self._size = 0  # if it cannot be rotated, write as much again before the next attempt
                with suppress(OSError):
                    self.rotate()
        taken = os.write(self._file, data)
        self._size += taken
        return taken

    @override
    def reopen(self) -> None:
        mode = stat.S_IMODE(os.fstat(self._file).st_mode)
        try:
            file = os.open(self._path, _WRITE | os.O_CREAT | os.O_EXCL | os.O_APPEND, mode)
            os.fchmod(file, mode)  # twistd sets the umask of a daemon after it has opened the first file
        except FileExistsError:
            file = os.open(self._path, _WRITE | os.O_APPEND)
        os.dup2(file, self._file, inheritable=False)
        os.close(file)
        self._size = os.fstat(self._file).st_size

    @override
    def rotate(self) -> None:
        for number in range(ROTATED_FILES - 1, -1, -1):
            old = Path(f"{self._path}.{number}") if number else self._path
            with suppress(FileNotFoundError):
                old.replace(f"{self._path}.{number + 1}")
        self.reopen()

    @override
    def close(self) -> None:
        os.close(self._file)


class Stream(Sink):
    """A sink of two functions, which cannot be rotated or reopened."""

    def __init__(self, write: Callable[[bytes], int], close: Callable[[], object]) -> None:
        self._write = write
        self._close = close

    @override
    def write(self, data: bytes) -> int:
        return self._write(data)

    @override
    def reopen(self) -> None:
        """Do nothing."""

    @override
    def rotate(self) -> None:
        """Do nothing."""

    @override
    def close(self) -> None:
        self._close()


class Syslog(Stream):
    """The syslog of this machine, which takes one line in each datagram."""

    def __init__(self, address: str = "/dev/log") -> None:
        self._address = address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trial:
            trial.connect(address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        super().__init__(self._send, self._socket.close)

    def _send(self, data: bytes) -> int:
        """Send the first line; without a connection, so that syslog may be restarted."""
        line = data[: data.index(b"\n") + 1]
        self._socket.sendto(line[:-1], socket.MSG_DONTWAIT, self._address)
        return len(line)


def standard_output(descriptor: int = 1) -> Stream:
    """Return a sink that writes to a file that is open already, or to nowhere if standard output is closed.

    Other processes share the open file, so its mode must stay.  The kernel offers other ways for each kind of file.
    """
    if sys.__stdout__ is None:  # another file may have the descriptor
        return Stream(len, lambda: None)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        return Stream(lambda data: connection.send(data, socket.MSG_DONTWAIT), connection.close)
    if stat.S_ISREG(mode):
        return Stream(lambda data: os.write(descriptor, data), lambda: None)
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", _WRITE | os.O_NONBLOCK)
    except OSError:  # the pipe or the terminal may belong to another user
        return Stream(lambda data: _write_when_ready(descriptor, data), lambda: None)
    return _opened(own)


def _opened(descriptor: int) -> Stream:
    return Stream(lambda data: os.write(descriptor, data), lambda: os.close(descriptor))


def _write_when_ready(descriptor: int, data: bytes) -> int:
    """Write as much as a pipe that is ready takes without waiting (POSIX: PIPE_BUF)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(descriptor, data[: select.PIPE_BUF])


def to_path(path: str) -> Sink:
    """Return a sink for a file, or for the pipe or the device of that name."""
    place = Path(path)
    if place.exists() and not place.is_file():
        return _opened(os.open(place, _WRITE | os.O_NONBLOCK))
    return RotatingFile(place)
