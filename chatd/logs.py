"""One event a line: the log as JSON, for those who collect logs.

The text format is twistd's own.  Event fields are logged by name and formatted late, so a
line of JSON holds them as they were given beside the sentence that they make.
"""

import sys
from typing import Any, Final, TextIO, cast

import orjson
from twisted.logger import FileLogObserver, LogEvent, eventAsText, formatEvent
from twisted.python.logfile import LogFile

from chatd.store.base import timestamp

_PLAIN: Final = (str, int, float, bool, type(None))


def json_line(event: LogEvent) -> str:
    """One event as one line: time, level, system, event (the sentence), fields, and a traceback if there is one."""
    fields = {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in event.items()
        if not name.startswith("log_") and name not in ("isError", "message", "time", "format", "system")
    }
    level = event.get("log_level")
    line: dict[str, Any] = {
        "time": timestamp(event["log_time"]),
        "level": level.name if level else "info",
        "system": event.get("log_namespace", "-"),
        "event": formatEvent(event),
        **({"fields": fields} if fields else {}),
    }
    if "log_failure" in event:
        line["traceback"] = eventAsText(event, includeTimestamp=False, includeSystem=False)
    return orjson.dumps(line, option=orjson.OPT_NON_STR_KEYS).decode() + "\n"


def json_observer(path: str | None, *, daemon: bool) -> FileLogObserver:
    """Write JSON where twistd would write its text: to its --logfile, else stdout, or twistd.log of a daemon."""
    if path is None and daemon:
        path = "twistd.log"
    out = sys.stdout if path in (None, "", "-") else LogFile.fromFullPath(path)
    return FileLogObserver(cast(TextIO, out), json_line)
