"""The lines of the log, as JSON and as text, and the files that they go to."""

import io
import json

import pytest
from support.helpers import NEW_YEAR
from twisted.logger import Logger, LogLevel, capturedLogs
from twisted.python import log as legacy_log
from twisted.python.failure import Failure

from chatd.operate.logging import json_line, observer, text_line


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
    assert lines[0]["traceback"].startswith("it went wrong\nTraceback (most recent call last)")
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


@pytest.mark.parametrize("path", [None, "", "-"])
def test_lines_go_to_stdout_without_a_file(path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    observer(json_line, path, daemon=False)({"log_time": NEW_YEAR, "log_format": "héllo"})
    assert json.loads(out.getvalue())["event"] == "héllo"


@pytest.mark.parametrize("daemon", [False, True])
def test_lines_go_to_the_named_file(daemon, tmp_path):
    """Lines go to the named file in UTF-8, in the foreground and in a daemon."""
    written = observer(json_line, str(tmp_path / "chat.log"), daemon=daemon)
    written({"log_time": NEW_YEAR, "log_format": "one"})
    written({"log_time": NEW_YEAR, "log_format": "zwölf"})
    written._outFile.close()
    lines = (tmp_path / "chat.log").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["one", "zwölf"]


def test_lines_of_a_daemon_go_to_twistd_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = observer(json_line, None, daemon=True)
    written({"log_time": NEW_YEAR, "log_format": "one"})
    written._outFile.close()
    assert json.loads((tmp_path / "twistd.log").read_text())["event"] == "one"


def test_daemon_that_logs_to_stdout(monkeypatch):
    """`--logfile -` of twistd applies to a daemon too."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    observer(json_line, "-", daemon=True)({"log_time": NEW_YEAR, "log_format": "one"})
    assert json.loads(out.getvalue())["event"] == "one"


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
    """The traceback of a failure follows its line."""
    line = text_of(log_format="it went wrong", log_failure=Failure(ZeroDivisionError("for the test")))
    assert line.startswith("2026-01-01T00:00:00.250Z info -: it went wrong\nTraceback (most recent call last)")


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
