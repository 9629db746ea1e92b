"""The log: one event a line, as text or as JSON.

Events are logged with named fields and formatted late.  A line of JSON holds the fields as they were
given, beside the sentence that they make; a line of text is that sentence, with the time (UTC),
the level and the part of the server before it.  Both are made in a few microseconds, since there is a
line for every client that comes and goes.  For the same reason the lines of one reactor turn are written together.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from select import PIPE_BUF
from threading import RLock
from typing import Any, Final, cast

import orjson
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel, eventAsText, formatEvent
from zope.interface import implementer

from chatd.operate.sinks import Sink, Syslog, standard_output, to_path
from chatd.store.base import timestamp

MAX_WAITING: Final = 1 << 20
"""The most bytes of the log that wait for a reader of a pipe.  Lines beyond that are dropped and counted."""
RETRY_SECONDS: Final = 0.1
"""The interval at which the log tries to write the lines that wait."""
EXIT_SECONDS: Final = 1
"""The time that lines which wait still have when the process ends."""
SEVERITIES: Final = {"debug": 7, "info": 6, "warn": 4, "error": 3, "critical": 2}
"""The severities of syslog (RFC 5424, section 6.2.1), by the names of Twisted's levels."""
LOG_USER: Final = 1 << 3
"""The facility of syslog that twistd uses."""

_CALM: Final = LogLevel.debug, LogLevel.info
"""The levels of events that the log need not show at once."""
_PLAIN: Final = (str, int, float, bool, type(None))
_NOT_FIELDS: Final = frozenset({"isError", "message", "time", "format", "system"})

_logger = Logger()


def drop_contexts(reactor: object) -> None:
    """Let a reactor that uses epoll serve a ready socket without a context for log messages.

    The context names the socket as the `system` of messages that Twisted's former log writes.  Events of chatd name
    their connection themselves.  To make it, Twisted copies two dictionaries for every ready socket, which is a
    twentieth of the time in many small rooms.
    """
    module = type(reactor).__module__
    if module == "twisted.internet.epollreactor":
        cast(Any, sys.modules[module]).log = _NoContext


class _NoContext:
    """Stands for twisted.python.log in the reactor, which calls only this function of it."""

    @staticmethod
    def callWithLogger(_: object, function: Callable[..., object], *args: object) -> None:
        """Call a function, and log its failure, so that the reactor serves the other sockets of this turn."""
        try:
            function(*args)
        except Exception:  # noqa: BLE001 -- whatever it is
            _logger.failure("a socket failed")


def _sentence(event: LogEvent) -> str:
    """Format an event; fall back to Twisted's own formatting, which also supports calls."""
    try:
        sentence = str(event["log_format"].format_map(event))
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        sentence = formatEvent(event)
    return _printable(sentence)


def _printable(text: str) -> str:
    """Replace line breaks and control sequences, since a text may come from a client."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def _traceback(event: LogEvent) -> list[str]:
    """Return the lines of a traceback."""
    bare = {"log_format": "", "log_failure": event["log_failure"]}
    return eventAsText(bare, includeTimestamp=False, includeSystem=False).strip().split("\n")


def _level(event: LogEvent) -> str:
    level = event.get("log_level")
    return str(level.name) if level else "info"


def _moment(seconds: float) -> str:
    """Format a time as timestamp() does; the lines of one second share most of the text."""
    whole = int(seconds)
    return f"{_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return timestamp(seconds).partition(".")[0]


def text_line(event: LogEvent) -> str:
    """One event as `TIME LEVEL SYSTEM: SENTENCE`; a traceback follows on indented lines of its own.

    The indent distinguishes a line of an error's text, which may come from a client, from an event.
    """
    lines = [f"{_moment(event['log_time'])} {_level(event)} {event.get('log_namespace', '-')}: {_sentence(event)}"]
    if "log_failure" in event:
        lines += (f"    {_printable(line)}" for line in _traceback(event))
    return "\n".join(lines) + "\n"


def json_line(event: LogEvent) -> str:
    """One event as one line: time, level, system, event (the sentence), fields, and a traceback if there is one."""
    fields = {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in event.items()
        if not name.startswith("log_") and name not in _NOT_FIELDS
    }
    line: dict[str, Any] = {
        "time": _moment(event["log_time"]),
        "level": _level(event),
        "system": event.get("log_namespace", "-"),
        "event": _sentence(event),
        **({"fields": fields} if fields else {}),
    }
    if "log_failure" in event:
        line["traceback"] = "\n".join(_traceback(event))
    try:
        text = orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError:  # a lone surrogate, or an integer above 64 bits
        text = json.dumps(line)
    # Programs read the same value from an escape, and a terminal that shows the line obeys nothing in it.
    return (text if text.isprintable() else json.dumps(json.loads(text))) + "\n"


FORMATS: Final[dict[str, Callable[[LogEvent], str]]] = {"text": text_line, "json": json_line}


def syslog_lines(line: Callable[[LogEvent], str], prefix: str) -> Callable[[LogEvent], str]:
    """Return a function that begins each line of an event with the severity and a prefix, as syslog needs them."""

    def lines(event: LogEvent) -> str:
        head = f"<{LOG_USER | SEVERITIES[_level(event)]}>{prefix}: "
        return "".join(f"{head}{one}\n" for one in line(event).splitlines())

    return lines


@implementer(ILogObserver)
class LineObserver:
    """The log observer of the server: it never waits for a reader of the log.

    While the reactor runs, a line waits for the end of the turn, because a write costs more than making the line.  As
    many lines as one write takes are written before that.  A warning or an error is written at once, with the lines
    before it.

    Lines that the sink does not take now wait in memory, and are dropped when too many wait.  When lines flow again,
    the log states how many were dropped.  Threads may log too.  `later` calls a function in the reactor's thread after
    so many seconds.
    """

    def __init__(
        self, line: Callable[[LogEvent], str], sink: Sink, later: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self.sink = sink
        self.line = line
        self._later = later
        self._lock = RLock()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        """The number of bytes that wait."""
        self._dropped = 0
        """The number of lines dropped since the log last stated it."""
        self._gathers = False
        """True while the lines of a turn wait for its end."""
        self._scheduled = False
        """True if what waits is to be written later."""
        self._logger = Logger(namespace=__name__, observer=self)

    def __call__(self, event: LogEvent) -> None:
        """Write an event, or keep it until it can be written."""
        data = self.line(event).encode("utf-8", "backslashreplace")
        with self._lock:
            if self._size + len(data) > MAX_WAITING:
                self._dropped += data.count(b"\n")
                return
            waits = self._gathers and event.get("log_level") in _CALM
            if waits and self._size + len(data) > PIPE_BUF:
                self._write()
            self._waiting.append(data)
            self._size += len(data)
            if waits:
                self._write_after(0)
            else:
                self._write()

    def gather(self) -> None:
        """Write the lines of each turn together from now on: the reactor runs."""
        self._gathers = True

    def _write_after(self, seconds: float) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._later(seconds, self._write_now)

    def _write_now(self) -> None:
        with self._lock:
            self._scheduled = False
            self._write()

    def _write(self) -> None:
        """Write what waits."""
        written = False
        while self._waiting:
            data = self._take()
            try:
                taken = self.sink.write(data)
            except BlockingIOError:
                taken = 0
            except OSError:  # the disk is full, or the reader has closed the pipe
                self._dropped += data.count(b"\n")
                continue
            written = True
            if taken < len(data):
                self._waiting.appendleft(data[taken:])
                self._size += len(data) - taken
                if not taken:
                    self._write_after(RETRY_SECONDS)
                    return
        if self._dropped and written:
            dropped, self._dropped = self._dropped, 0
            self._logger.warn("{dropped} lines of the log were dropped: it could not be written", dropped=dropped)

    def _take(self) -> bytes:
        """Take the oldest lines, not more than a pipe with several writers takes as a whole (POSIX: PIPE_BUF)."""
        waiting = self._waiting
        lines = [waiting.popleft()]
        size = len(lines[0])
        while waiting and size + len(waiting[0]) <= PIPE_BUF:
            size += len(waiting[0])
            lines.append(waiting.popleft())
        self._size -= size
        return b"".join(lines)

    def reopen(self) -> None:
        """Open the file again, because a program like logrotate has moved it; if that fails, keep the old one."""
        self._move(self.sink.reopen, "reopened")

    def rotate(self) -> None:
        """Begin a new file, and keep the old one under another name, as twistd does at SIGUSR1."""
        self._move(self.sink.rotate, "rotated")

    def _move(self, move: Callable[[], None], done: str) -> None:
        try:
            with self._lock:
                self._write()  # the lines before it belong to the old file
                move()
        except OSError as error:
            self._logger.warn("the log file cannot be {done} ({reason})", done=done, reason=error.strerror)

    def drain(self) -> None:
        """Wait, for a limited time, until the lines that wait are written: the process is about to end."""
        end = time.monotonic() + EXIT_SECONDS
        with self._lock:
            self._gathers = False
            self._write()
            while self._waiting and time.monotonic() < end:
                time.sleep(RETRY_SECONDS / 10)
                self._write()


def open_log(
    line: Callable[[LogEvent], str],
    twistd: Mapping[str, Any],
    later: Callable[[float, Callable[[], None]], None],
) -> LineObserver:
    """Make the observer that writes where the options of twistd say; raise ValueError with one line if it cannot.

    The options are --syslog and --prefix, --logfile, and --nodaemon: a daemon writes to twistd.log unless a file is
    named, and other processes to standard output.
    """
    path, daemon = twistd.get("logfile"), not twistd.get("nodaemon")
    if twistd.get("syslog"):
        try:
            return LineObserver(syslog_lines(line, twistd["prefix"]), Syslog(), later)
        except OSError as error:
            raise ValueError(f"--syslog: no syslog answers ({error.strerror}): start one, or log to a file") from None
    if path == "-" and daemon:
        raise ValueError("--logfile -: a daemon has no standard output: name a file, or run twistd -n")
    if path == "-" or not (path or daemon):
        return LineObserver(line, standard_output(), later)
    file = path or "twistd.log"
    try:
        return LineObserver(line, to_path(file), later)
    except OSError as error:
        raise ValueError(
            f"--logfile {file}: it cannot be opened ({error.strerror}): name a file that this user can write"
        ) from None
