"""The lines of the log, as JSON and as text, and the files that they go to."""

import json
import socket
from itertools import chain
from select import PIPE_BUF

import pytest
from support import loops
from support.helpers import NEW_YEAR
from twisted.internet import epollreactor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.selectreactor import SelectReactor
from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel, capturedLogs
from twisted.python import context
from twisted.python import log as legacy_log
from twisted.python.failure import Failure

from chatd.operate.logging import (
    MAX_WAITING,
    RETRY_SECONDS,
    LineObserver,
    drop_contexts,
    json_line,
    open_log,
    syslog_lines,
    text_line,
)
from chatd.operate.sinks import RotatingFile, Stream, Syslog


def line_of(**event):
    """Return the parsed JSON line of an event."""
    line = json_line({"log_time": NEW_YEAR + 0.25, **event})
    assert line.endswith("\n")
    assert line.count("\n") == 1
    return json.loads(line)


@pytest.fixture
def logged():
    """A logger, and the parsed JSON lines of its events."""
    lines = []
    return Logger(namespace="chatd.test", observer=lambda event: lines.append(json.loads(json_line(event)))), lines


def test_json_line():
    """A line has the time in UTC, the level, the system and the sentence."""
    assert line_of(log_level=LogLevel.warn, log_namespace="chatd.rooms", log_format="something is up") == {
        "time": "2026-01-01T00:00:00.250Z",
        "level": "warn",
        "system": "chatd.rooms",
        "event": "something is up",
    }


def test_json_fields_beside_the_sentence(logged):
    """The values of an event are fields with their JSON types."""
    logger, lines = logged
    logger.info("{room}: {lag} behind", room="main", lag=7, seconds=0.5, late=True, reason=None)
    assert lines[0]["event"] == "main: 7 behind"
    assert lines[0]["fields"] == {"room": "main", "lag": 7, "seconds": 0.5, "late": True, "reason": None}


def test_json_field_of_another_type_is_text(logged):
    logger, lines = logged
    logger.error("{error}", error=ValueError("no"), data=b"\xff")
    assert lines[0]["fields"] == {"error": "no", "data": r"b'\xff'"}


def test_line_breaks_become_spaces_in_json():
    """The sentence of an event is one line."""
    assert line_of(log_format="{text}", text="a\nb")["event"] == "a b"


def test_text_that_is_not_ascii_is_kept(logged):
    logger, lines = logged
    logger.info("{name}", name="Алиса 👋")
    assert lines[0]["event"] == "Алиса 👋"


def test_failure_in_json(logged):
    """The traceback of a failure is a field of the same line."""
    logger, lines = logged
    logger.failure("it went wrong", Failure(ZeroDivisionError("for the test")))
    assert lines[0]["level"] == "critical"
    assert lines[0]["event"] == "it went wrong"
    assert lines[0]["traceback"].startswith("Traceback (most recent call last)")
    assert "ZeroDivisionError: for the test" in lines[0]["traceback"]


def test_json_without_failure_and_fields():
    """A line without failure and fields has neither key."""
    assert line_of(log_format="plain").keys() == {"time", "level", "system", "event"}


def test_event_of_the_legacy_logging():
    """Events of twisted.python.log have a sentence and fields too."""
    with capturedLogs() as events:
        legacy_log.msg("said the old way", number=5, system="old")
    line = json.loads(json_line(events[0]))
    assert line["event"] == "said the old way"
    assert line["fields"] == {"number": 5}


def test_event_without_level_and_system():
    """The default level is info, and the default system is a dash."""
    line = line_of(log_format="plain")
    assert (line["level"], line["system"]) == ("info", "-")


def text_of(**event):
    """Return the line of text of an event."""
    return text_line({"log_time": NEW_YEAR + 0.25, **event})


def test_text_line():
    """A line of text has the time in UTC, the level, the system and the sentence."""
    line = text_of(log_level=LogLevel.warn, log_namespace="chatd.rooms", log_format="{lag} behind", lag=7)
    assert line == "2026-01-01T00:00:00.250Z warn chatd.rooms: 7 behind\n"
    assert text_of(log_format="plain") == "2026-01-01T00:00:00.250Z info -: plain\n"


def test_line_breaks_become_spaces_in_text():
    """The sentence of an event is one line."""
    assert text_of(log_format="{text}", text="a\nb") == "2026-01-01T00:00:00.250Z info -: a b\n"


def test_failure_in_text():
    """The traceback of a failure follows its line, indented."""
    lines = text_of(log_format="it went wrong", log_failure=Failure(ZeroDivisionError("for the test"))).splitlines()
    assert lines[0] == "2026-01-01T00:00:00.250Z info -: it went wrong"
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1].endswith("ZeroDivisionError: for the test")


def test_traceback_forges_no_line():
    """A text in an error can neither control the terminal nor look like another event."""
    forged = ValueError("\x1b[2J\u202e\r\n2026-01-01T00:00:00.000Z info chatd: forged")
    line = text_of(log_format="a\nb", log_failure=Failure(forged))
    first, *rest = line.splitlines()
    assert first.endswith(" a b")
    assert all(one.startswith("    ") and one.isprintable() for one in rest)
    assert rest[-1].strip() == "2026-01-01T00:00:00.000Z info chatd: forged"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b2J", "\u202e", "\u2028", "\ud800", "\U000e0001"])
def test_json_has_the_value_without_its_effect(text):
    """A field keeps a control sequence or half a character, and the line contains it as an escape only."""
    line = json_line({"log_time": NEW_YEAR, "log_format": "{text}", "text": text, "name": "ü"})
    assert line[:-1].isprintable()
    assert json.loads(line)["fields"] == {"text": text, "name": "ü"}


def test_json_of_a_large_integer():
    assert line_of(log_format="", number=1 << 70)["fields"] == {"number": 1 << 70}


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        ({"log_format": "{call()}", "call": lambda: "called"}, "called"),
        ({"log_format": "{value.real}", "value": 3}, "3"),
        ({"log_format": None}, ""),
        ({}, ""),
    ],
)
def test_fallback_to_the_formatting_of_twisted(event, sentence):
    """Twisted formats an event whose format is missing or contains a call."""
    assert text_of(**event) == f"2026-01-01T00:00:00.250Z info -: {sentence}\n"
    assert line_of(**event)["event"] == sentence


def test_event_that_cannot_be_formatted_is_a_line():
    """An event that cannot be formatted produces a line that describes the fault."""
    assert "missing" in text_of(log_format="{missing}")


# The observer


class Sink(Stream):
    """A sink that takes a number of bytes in all, or fails."""

    def __init__(self):
        super().__init__(self.take, lambda: None)
        self.writes = []
        self.space = 1 << 30
        self.fault = None
        self.moved = []

    def take(self, data):
        if self.fault:
            raise self.fault
        if not self.space:
            raise BlockingIOError
        taken = data[: self.space]
        self.space -= len(taken)
        self.writes.append(taken)
        return len(taken)

    @property
    def written(self):
        return b"".join(self.writes)

    def reopen(self):
        self.moved.append("reopen")
        if self.fault:
            raise self.fault

    def rotate(self):
        self.moved.append("rotate")


class Observed:
    """An observer whose lines are the sentences of its events."""

    def __init__(self):
        self.sink = Sink()
        self.clock = Clock()
        self.observer = LineObserver(lambda event: event["log_format"].format(**event) + "\n", self.sink, self.later)

    def later(self, seconds, function):
        self.clock.callLater(seconds, function)

    def write(self, text, level=LogLevel.info):
        self.observer({"log_format": text, "log_level": level})

    @property
    def lines(self):
        return self.sink.written.decode().splitlines()


@pytest.fixture
def observed():
    return Observed()


DROPPED = "{} lines of the log were dropped: it could not be written"


def test_lines_wait_for_a_full_pipe(observed):
    """What a sink does not take waits, in order, and is written when there is space."""
    observed.sink.space = 5
    for text in ("one", "two", "three"):
        observed.write(text)
    assert observed.sink.written == b"one\nt"
    observed.clock.advance(RETRY_SECONDS)
    assert len(observed.clock.getDelayedCalls()) == 1
    observed.sink.space = 1 << 30
    observed.clock.advance(RETRY_SECONDS)
    assert observed.lines == ["one", "two", "three"]
    assert observed.clock.getDelayedCalls() == []


def test_lines_that_cannot_wait_are_counted(observed):
    """Beyond a limit lines are dropped; when lines flow again, one line states how many."""
    observed.sink.space = 0
    for _ in range(4):
        observed.write("x" * (MAX_WAITING // 3))
    observed.write("y" * MAX_WAITING)
    observed.sink.space = 1 << 30
    observed.write("more")
    observed.clock.advance(RETRY_SECONDS)
    assert [line[:4] for line in observed.lines] == ["xxxx"] * 2 + ["more", "3 li"]
    assert observed.lines[-1] == DROPPED.format(3)
    observed.write("again")
    assert observed.lines[-1] == "again"


def test_lines_that_fail_are_counted(observed):
    """A full disk, or a pipe without a reader, costs the lines and nothing else."""
    observed.sink.fault = OSError(28, "No space left on device")
    observed.write("one")
    observed.write("two")
    observed.sink.fault = None
    observed.write("three")
    assert observed.lines == ["three", DROPPED.format(2)]


def test_end_of_the_process_writes_what_waits(observed, monkeypatch):
    """The process waits a moment for a reader at its end, and no longer."""
    observed.sink.space = 0
    observed.write("one")
    now = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(now) * 0.4)
    monkeypatch.setattr("time.sleep", lambda _: None)
    observed.observer.drain()
    assert observed.lines == []
    monkeypatch.setattr("time.sleep", lambda _: setattr(observed.sink, "space", 9))
    observed.observer.drain()
    assert observed.lines == ["one"]


def test_lines_of_a_turn_are_written_together(observed):
    """While the reactor runs, lines wait for the end of its turn, and one write takes them all."""
    observed.write("before it runs")
    observed.observer.gather()
    for text in ("one", "two"):
        observed.write(text)
    assert observed.lines == ["before it runs"]
    observed.clock.advance(0)
    assert observed.sink.writes[1:] == [b"one\ntwo\n"]
    observed.write("three")
    observed.clock.advance(0)
    assert observed.sink.writes[2:] == [b"three\n"]
    assert observed.clock.getDelayedCalls() == []


@pytest.mark.parametrize("level", [LogLevel.warn, LogLevel.error, LogLevel.critical, None])
def test_warning_does_not_wait(observed, level):
    """A warning or an error is in the log before anything else happens, after the lines before it."""
    observed.observer.gather()
    observed.write("one")
    observed.write("beware", level)
    assert observed.sink.writes == [b"one\nbeware\n"]


def test_write_has_whole_lines_as_many_as_a_pipe_takes_at_once(observed):
    """Lines of several processes in one pipe do not mix."""
    observed.sink.space = 0
    for digit in "0123456789":
        observed.write(digit * 999)
    observed.write("x" * 2 * PIPE_BUF)
    observed.sink.space = 1 << 30
    observed.clock.advance(RETRY_SECONDS)
    assert [len(write) for write in observed.sink.writes] == [4000, 4000, 2000, 2 * PIPE_BUF + 1]
    assert [line[0] for line in observed.lines] == [*"0123456789x"]


def test_turn_of_many_lines_loses_none(observed):
    """Lines do not wait for the end of a turn when there are as many as one write takes."""
    observed.observer.gather()
    lines = [f"{number:99}" for number in range(2 * MAX_WAITING // 100)]
    for line in lines:
        observed.write(line)
    observed.clock.advance(0)
    assert observed.lines == lines
    assert len(observed.sink.writes) < len(lines) / 30


def test_lines_that_wait_are_in_order_after_a_full_pipe(observed):
    """The rest of a write goes before the lines after it, and its lines are counted if it is lost."""
    observed.observer.gather()
    observed.sink.space = 6
    for text in ("one", "two", "three"):
        observed.write(text)
    observed.clock.advance(0)
    assert observed.sink.writes == [b"one\ntw"]
    observed.write("four")
    observed.sink.fault = OSError(32, "Broken pipe")
    observed.clock.advance(RETRY_SECONDS)
    observed.sink.fault = None
    observed.sink.space = 1 << 30
    observed.write("five", LogLevel.warn)
    assert observed.lines == ["one", "twfive", DROPPED.format(3)]


def test_end_of_the_reactor_ends_the_waiting(observed):
    observed.observer.gather()
    observed.write("one")
    observed.observer.drain()
    observed.write("two")
    assert observed.sink.writes == [b"one\n", b"two\n"]


def test_file_is_reopened_and_rotated(observed):
    observed.observer.reopen()
    observed.observer.rotate()
    assert observed.sink.moved == ["reopen", "rotate"]
    assert observed.lines == []


@pytest.mark.parametrize("move", ["reopen", "rotate"])
def test_lines_before_a_new_file_go_to_the_old_one(observed, move):
    observed.observer.gather()
    observed.write("one")
    steps = observed.sink.moved
    observed.sink.write = lambda data: steps.append(data) or len(data)
    getattr(observed.observer, move)()
    assert steps == [b"one\n", move]


def test_file_that_cannot_be_reopened(observed):
    """The log states the reason, and continues in the old file."""
    observed.sink.fault = PermissionError(13, "Permission denied")
    observed.observer.reopen()
    observed.sink.fault = None
    observed.write("one")
    assert observed.lines[0] == "one"
    assert observed.lines[-1] == DROPPED.format(1)


# The options of twistd


def opened(**twistd):
    return open_log(text_line, twistd, lambda *_: None)


def test_log_of_the_foreground_is_standard_output(capfd):
    """Without a file, or with -, the log of a process in the foreground goes to standard output, in UTF-8."""
    for path in (None, "", "-"):
        observer = opened(nodaemon=True, logfile=path)
        observer({"log_time": NEW_YEAR, "log_format": "héllo"})
        observer.sink.close()
    assert capfd.readouterr().out == "2026-01-01T00:00:00.000Z info -: héllo\n" * 3


@pytest.mark.parametrize(
    ("twistd", "name"),
    [
        ({}, "twistd.log"),
        ({"logfile": ""}, "twistd.log"),
        ({"logfile": "a.log"}, "a.log"),
        ({"logfile": "a.log", "nodaemon": True}, "a.log"),
    ],
)
def test_log_file(tmp_path, monkeypatch, twistd, name):
    """The log goes to the file of --logfile, and that of a daemon to twistd.log."""
    monkeypatch.chdir(tmp_path)
    observer = opened(**twistd)
    assert isinstance(observer.sink, RotatingFile)
    observer({"log_time": NEW_YEAR, "log_format": "zwölf"})
    assert (tmp_path / name).read_text("utf-8") == "2026-01-01T00:00:00.000Z info -: zwölf\n"
    observer.sink.close()


@pytest.mark.parametrize(
    ("twistd", "line"),
    [
        ({"logfile": "-"}, "--logfile -: a daemon has no standard output: name a file, or run twistd -n"),
        (
            {"logfile": "a/b"},
            "--logfile a/b: it cannot be opened (No such file or directory): name a file that this user can write",
        ),
        (
            {"logfile": "."},
            "--logfile .: it cannot be opened (Is a directory): name a file that this user can write",
        ),
    ],
)
def test_log_that_cannot_be_opened(tmp_path, monkeypatch, twistd, line):
    """One line names the option and the remedy."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="logfile") as refused:
        opened(**twistd)
    assert str(refused.value) == line


def test_syslog_takes_every_line_with_its_severity():
    """Each line of an event begins with its severity and the prefix of twistd."""
    lines = syslog_lines(lambda event: event["log_format"] + "\n", "chat")
    assert lines({"log_format": "one"}) == "<14>chat: one\n"
    failed = {"log_format": "one\n    two", "log_level": LogLevel.critical}
    assert lines(failed) == "<10>chat: one\n<10>chat:     two\n"


def test_syslog(tmp_path, monkeypatch):
    """--syslog has precedence over --logfile."""
    monkeypatch.setattr(Syslog.__init__, "__defaults__", (str(tmp_path / "log"),))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        observer = opened(syslog=1, prefix="chat", logfile="-")
        observer({"log_time": NEW_YEAR, "log_format": "one"})
        assert daemon.recv(99) == b"<14>chat: 2026-01-01T00:00:00.000Z info -: one"
        observer.sink.close()


def test_missing_syslog(tmp_path, monkeypatch):
    monkeypatch.setattr(Syslog.__init__, "__defaults__", (str(tmp_path / "log"),))
    with pytest.raises(ValueError, match="--syslog: no syslog answers"):
        opened(syslog=1, prefix="twisted", logfile="-")


@pytest.mark.parametrize(("dropped", "system"), [(SelectReactor, "reader"), (EPollReactor, "-")])
def test_sockets_are_served_without_a_context(monkeypatch, dropped, system):
    """Twisted names a ready socket in the context of its former log; chatd drops that context with epoll."""
    monkeypatch.setattr(epollreactor, "log", legacy_log)
    systems = []
    ours, theirs = socket.socketpair()

    class Reader:
        fileno, logPrefix = ours.fileno, staticmethod(lambda: "reader")

        def doRead(self):
            systems.append(context.get(legacy_log.ILogContext)["system"])

    with ours, theirs, loops.reactor() as loop:
        drop_contexts(object.__new__(dropped))
        loop.addReader(Reader())
        theirs.send(b"bytes")
        loop.doIteration(0)
    assert systems == [system]


@pytest.mark.parametrize("loses", [True, False])
def test_fault_of_a_socket_without_a_context(monkeypatch, loses):
    """A socket that fails is closed, the failure is logged, and the other sockets of the turn are served."""
    monkeypatch.setattr(epollreactor, "log", legacy_log)
    lost, served = [], []

    class Reader:
        def __init__(self, own):
            self.fileno = own.fileno

        def doRead(self):
            served.append(self)
            raise ZeroDivisionError

        def connectionLost(self, reason):
            lost.append(reason.type)
            if loses:
                raise KeyError

        readConnectionLost = connectionLost

    pairs = [socket.socketpair() for _ in range(2)]
    with loops.reactor() as loop, capturedLogs() as events:
        drop_contexts(loop)
        for ours, theirs in pairs:
            loop.addReader(Reader(ours))
            theirs.send(b"bytes")
        loop.doIteration(0)
    for own in chain(*pairs):
        own.close()
    assert (len(served), lost) == (2, [ZeroDivisionError] * 2)
    assert [event.get("log_failure", event.get("failure")).type for event in events] == [
        ZeroDivisionError,
        *[KeyError] * loses,
    ] * 2
