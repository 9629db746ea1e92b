"""The conversation as lines above the prompt: messages, edits and removals, under the days on which they were sent."""

from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo
from typing import Final

from chatd.client.storage import PendingPost
from chatd.client.terminal.display import (
    Fragments,
    cells,
    name_style,
    safe_lines,
    shorten,
    shown_name,
    wrap,
)
from chatd.client.view import RoomEntry, Snapshot
from chatd.messages import Id

NARROWEST: Final = 30
"""The fewest cells of a line: narrower terminals wrap lines themselves."""
INDENT: Final = " " * 8
"""The start of a line that continues a message: as wide as its time and its mark, so no text is where times are."""
NOTICE: Final = "-- "
"""The start of a line that is no message."""


def notice(text: str, width: int) -> list[Fragments]:
    """Return a line of the program itself, in as many lines as it needs."""
    first, *rest = wrap(text, max(width, NARROWEST) - len(NOTICE))
    return [[("italic", NOTICE + first)], *([("italic", " " * len(NOTICE) + line)] for line in rest)]


class Transcript:
    """The lines of a room in a terminal, which only grow: each call returns the new ones.

    Entries are those of a snapshot.  `username` is the name of the reader, and `zone` the time zone of the times; by
    default it is that of the machine.
    """

    def __init__(self, username: str, zone: tzinfo | None = None) -> None:
        self._username = username
        self._zone = zone
        self._last: Id | None = None
        """The id of the last entry that is shown."""
        self._day: str | None = None

    def lines(self, snapshot: Snapshot, width: int) -> list[Fragments]:
        """Return the lines of the entries that were not shown yet."""
        width = max(width, NARROWEST)
        if snapshot.last is None or snapshot.last == self._last:
            return []
        entries: Sequence[RoomEntry] = snapshot.entries
        place = self._place(entries)
        lines: list[Fragments] = []
        if place is None and self._last is not None:
            lines += notice("messages are missing here: the newest ones follow", width)
            self._day = None
        if place is None:
            lines += self._messages(snapshot.messages, width)
        else:
            known = {entry.id: entry for entry in entries}
            for entry in entries[place:]:
                if entry.replaces is None:
                    lines += self._messages([entry], width)
                else:
                    lines += self._change(entry, known.get(entry.replaces), width)
        self._last = snapshot.last
        return lines

    def _place(self, entries: Sequence[RoomEntry]) -> int | None:
        """Return the place of the first entry that is new; None if the entries do not follow those that are shown."""
        if self._last is None or not entries:
            return None
        first = entries[0].id
        place = self._last.number + 1 - first.number
        return place if self._last.epoch == first.epoch and 0 <= place <= len(entries) else None

    def older(self, messages: Sequence[RoomEntry], width: int) -> list[Fragments]:
        """Return the lines of an older page."""
        if not messages:
            return notice("there are no older messages", width)
        day, self._day = self._day, None
        lines = self._messages(messages, max(width, NARROWEST))
        self._day = day
        count = f"{len(messages)} older message{'s' if len(messages) > 1 else ''}"
        end = notice("these were older messages; the newest ones are above", width)
        return [*notice(f"{count}:", width), *lines, *end]

    def time_of(self, entry: RoomEntry) -> str:
        """Return the time of day at which an entry was stored."""
        return f"{self._time(entry):%H:%M}"

    def _messages(self, messages: Iterable[RoomEntry], width: int) -> list[Fragments]:
        lines: list[Fragments] = []
        for entry in messages:
            lines += self._divider(entry)
            text = "(removed)" if entry.removed else entry.message
            note = " (edited)" if entry.replaced and not entry.removed else ""
            lines += self._line(entry, ": ", text + note, width)
        return lines

    def _change(self, entry: RoomEntry, original: RoomEntry | None, width: int) -> list[Fragments]:
        """Return the lines of an edit or a removal, which names the message that it changes by its time."""
        which = "an older message" if original is None else f"the message of {self.time_of(original)}"
        deed = f" removed {which}" if entry.removed else f" edited {which}: "
        return [*self._divider(entry), *self._line(entry, deed, "" if entry.removed else entry.message, width)]

    def _divider(self, entry: RoomEntry) -> list[Fragments]:
        day = f"{self._time(entry):%A %-d %B %Y}"
        if day == self._day:
            return []
        self._day = day
        return [[("bold", f"--- {day} ---")]]

    def _line(self, entry: RoomEntry, after: str, text: str, width: int) -> list[Fragments]:
        own = entry.username == self._username
        name = shown_name(entry.username, width // 2)
        head: Fragments = [
            ("", f"{self.time_of(entry)} "),
            ("bold", "> " if own else "  "),
            (name_style(entry.username), name),
        ]
        room = width - len(INDENT) - cells(name) - cells(after)
        first, *rest = safe_lines(text)
        if room < len(INDENT):  # the text begins on a line of its own
            lines = [[*head, ("", after.rstrip())]]
            rest.insert(0, first)
        else:
            first, *wrapped = wrap(first, width - len(INDENT), room)
            lines = [[*head, ("", after + first)]] + [[("", INDENT + line)] for line in wrapped]
        lines += [[("", INDENT + part)] for line in rest for part in wrap(line, width - len(INDENT))]
        return lines

    def _time(self, entry: RoomEntry) -> datetime:
        return datetime.fromisoformat(entry.timestamp).astimezone(self._zone)


def pending_lines(outbox: Sequence[PendingPost], width: int, *, online: bool, most: int = 5) -> list[Fragments]:
    """Return the lines above the prompt that show the posts without an answer."""
    lines: list[Fragments] = []
    for post in outbox[-most:]:
        text = safe_lines(str(post.frame.get("message", "a removal")))[0]
        if post.error is not None:
            reason = safe_lines(str(post.error))[0]
            lines.append([("bold", shorten(f"not sent: {text} ({reason}): /retry or /discard", width))])
        else:
            lines.append([("italic", shorten(f"{'sending' if online else 'unsent'}: {text}", width))])
    if len(outbox) > most:
        lines.insert(0, [("italic", f"{len(outbox) - most} more")])
    return lines
