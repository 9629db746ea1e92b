"""What the stores have in common.

A store keeps the logs of all rooms.  What a room needs of one is `chatd.log.Log`; here is
the rest: how it is opened and closed, the epoch, the time, and how much is retained.
"""

import datetime as dt
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.log import MAIN, LabelReused, Log, Poster
from chatd.room.presence import Lobby

DAY: Final = 86_400
"""Seconds."""
MILLISECOND: Final = 0.001
"""The grain of timestamps."""
SEED_ROOM: Final = MAIN
"""The room that a new log's seed is written to."""


class StoreError(Exception):
    """A store cannot be opened; the text is one line that names the remedy."""


class Retention(NamedTuple):
    """How much of a room is kept; both None: everything."""

    messages: int | None = None
    seconds: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Retention":
        """Read `all`, a number of messages (`5000`) or of days (`30d`); ValueError for anything else."""
        if re.fullmatch(r"[1-9][0-9]{0,11}", text):
            return cls(messages=int(text))
        if re.fullmatch(r"[1-9][0-9]{0,4}d", text):  # more days would go back to before the calendar
            return cls(seconds=int(text[:-1]) * DAY)
        if text == "all":
            return cls()
        raise ValueError(f"{text!r} is neither a number of messages (5000) nor of days (30d) nor all")


class Store(Log, Protocol):
    """A log with a life: opened before the first client, closed after the last."""

    @property
    def lobby(self) -> Lobby | None:
        """Where the nodes that share it tell one another who is there; None if it is one node's."""

    @property
    def fault(self) -> str | None:
        """What is wrong with it now, in words; None while it keeps and gives what it is asked."""

    @property
    def commits(self) -> Histogram:
        """How long commits took, in seconds, failed ones too; where there are none, none."""

    def usage(self) -> Mapping[str, int]:
        """How large it is, in `messages` or `bytes`, and how many `free_bytes` there are besides, if that is known."""

    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Open it, and write the seed into a log that did not exist; fires when it can be read.

        StoreError, at once, if it never can.
        """

    def trim(self) -> "Deferred[None]":
        """Remove what is retained no longer, in rooms where nothing is posted too."""

    def settled(self) -> "Deferred[None]":
        """Fires when all that was appended until now is kept or refused, and told."""

    def abandon(self) -> None:
        """Refuse all that is on its way, in doubt: nobody can wait for it any more."""

    def close(self) -> "Deferred[None]":
        """Settle, and let go of the log."""


def new_epoch() -> str:
    """A word that no log had before: 6 of 62 characters, drawn at random."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(6))


def timestamp(seconds: float) -> str:
    """A time in seconds since 1970 as RFC 3339 has it, in UTC and milliseconds."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def instant(text: str) -> float:
    """What timestamp() wrote, or another time of RFC 3339, in seconds since 1970."""
    return dt.datetime.fromisoformat(text).timestamp()


def tell_again(post: Post, number: int, poster: Poster, *, same: bool) -> None:
    """Tell the poster of a label that was used before whether it was for the `same` message."""
    if same:
        poster.posted(post, number, duplicate=True)
    else:
        poster.refused(post, LabelReused())


class Stamp:
    """The time of messages: that of the clock, except that it never goes back.

    `now` gives seconds since 1970; `last` is the newest timestamp there is.
    """

    def __init__(self, now: Callable[[], float], last: str | None) -> None:
        self._now = now
        self._last = instant(last) if last else 0.0
        self._text = timestamp(self._last)

    def __call__(self) -> str:
        """The timestamp of a message that is appended now."""
        now = self._now()
        if now - self._last >= MILLISECOND:
            self._last = now
            self._text = timestamp(now)
        return self._text
