"""The log: one event a line, as text or as JSON.

Events are logged with named fields and formatted late.  A line of JSON holds the fields as they were
given, beside the sentence that they make; a line of text is that sentence, with the time (UTC),
the level and the part of the server before it.  Both are made in a few microseconds, since there is a
line for every client that comes and goes.
"""

import sys
from collections.abc import Callable
from typing import Any, Final, TextIO, cast

import orjson
from twisted.logger import FileLogObserver, LogEvent, eventAsText, formatEvent
from twisted.python.logfile import LogFile

from chatd.store.base import timestamp

_PLAIN: Final = (str, int, float, bool, type(None))
_NOT_FIELDS: Final = frozenset({"isError", "message", "time", "format", "system"})


def _sentence(event: LogEvent) -> str:
    """Format an event; fall back to Twisted's own formatting, which also supports calls."""
    try:
        sentence = str(event["log_format"].format_map(event))
    except (KeyError, AttributeError, IndexError, TypeError, ValueError):
        sentence = formatEvent(event)
    if sentence.isprintable():
        return sentence
    # The sentence may contain text from a client: remove line breaks and control sequences.
    return "".join(character if character.isprintable() else " " for character in sentence)


def _level(event: LogEvent) -> str:
    level = event.get("log_level")
    return str(level.name) if level else "info"


def text_line(event: LogEvent) -> str:
    """One event as `TIME LEVEL SYSTEM: SENTENCE`; a traceback, if there is one, follows on lines of its own."""
    if "log_failure" in event:
        sentence = eventAsText(event, includeTimestamp=False, includeSystem=False)
    else:
        sentence = _sentence(event)
    return f"{timestamp(event['log_time'])} {_level(event)} {event.get('log_namespace', '-')}: {sentence}\n"


def json_line(event: LogEvent) -> str:
    """One event as one line: time, level, system, event (the sentence), fields, and a traceback if there is one."""
    fields = {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in event.items()
        if not name.startswith("log_") and name not in _NOT_FIELDS
    }
    line: dict[str, Any] = {
        "time": timestamp(event["log_time"]),
        "level": _level(event),
        "system": event.get("log_namespace", "-"),
        "event": _sentence(event),
        **({"fields": fields} if fields else {}),
    }
    if "log_failure" in event:
        line["traceback"] = eventAsText(event, includeTimestamp=False, includeSystem=False)
    return orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode() + "\n"


FORMATS: Final[dict[str, Callable[[LogEvent], str]]] = {"text": text_line, "json": json_line}


def observer(line: Callable[[LogEvent], str], path: str | None, *, daemon: bool) -> FileLogObserver:
    """Write lines where twistd would: to its --logfile, else stdout, or twistd.log of a daemon."""
    if path is None and daemon:
        path = "twistd.log"
    out = sys.stdout if path in (None, "", "-") else LogFile.fromFullPath(path)
    return FileLogObserver(cast(TextIO, out), line)
