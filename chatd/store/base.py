"""The interface and the shared parts of all stores.

A store keeps the logs of all rooms.  `chatd.room.log.Log` is the part of it that a room needs.  This module adds the
rest: opening and closing, the epoch, the time, and how much is retained.
"""

import datetime as dt
import re
import secrets
import string
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from twisted.internet.defer import Deferred
from typing_extensions import override

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.log import MAIN, Follower, LabelReused, Log, Poster
from chatd.room.presence import Lobby

DAY: Final = 86_400
"""Seconds in a day."""
MILLISECOND: Final = 0.001
"""The resolution of timestamps, in seconds."""
SEED_ROOM: Final = MAIN
"""The room that receives the seed of a new log."""


class StoreError(Exception):
    """A store cannot be opened; the text is one line that names the remedy."""


class Retention(NamedTuple):
    """The most messages, or the greatest age, that a store keeps of each room; without either, everything."""

    messages: int | None = None
    seconds: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Retention":
        """Read `all`, a number of messages (`5000`) or of days (`30d`); raise ValueError for anything else."""
        if re.fullmatch(r"[1-9][0-9]{0,11}", text):
            return cls(messages=int(text))
        if re.fullmatch(r"[1-9][0-9]{0,4}d", text):  # more days would precede the calendar
            return cls(seconds=int(text[:-1]) * DAY)
        if text == "all":
            return cls()
        raise ValueError(f"{text!r} is neither a number of messages (5000) nor of days (30d) nor all")


class Store(Log):
    """A log that is opened before the first client and closed after the last.

    Stores derive from this class and call `__init__`.  They notify `_followers`, and they
    note in `_faults` each kind of operation that failed when it was last tried.
    """

    lobby: Lobby | None = None
    """How the nodes that share this store exchange presence; None if only one node can use it."""

    def __init__(self, commits: Histogram) -> None:
        self.commits = commits
        """Duration of commits in seconds, including failed ones; empty in a store that has no commits."""
        self._followers: list[Follower] = []
        self._faults: dict[str, str] = {}

    @property
    def fault(self) -> str | None:
        """A description of the store's current fault; None while reads and writes succeed."""
        return "; ".join(self._faults.values()) or None

    @override
    def follow(self, follower: Follower) -> None:
        self._followers.append(follower)

    @abstractmethod
    def usage(self) -> Mapping[str, int]:
        """Return the store's size as `messages` or `bytes`, and the `free_bytes` beside it, if they are known."""

    @abstractmethod
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Open the store, and write the seed if the log is new; fire when the log can be read.

        Raises StoreError at once if it can never be opened.
        """

    @abstractmethod
    def trim(self) -> "Deferred[None]":
        """Remove what is no longer retained, including in rooms that receive no posts."""

    @abstractmethod
    def settled(self) -> "Deferred[None]":
        """Fire when every post appended until now is stored or refused, and its poster notified."""

    @abstractmethod
    def abandon(self) -> None:
        """Refuse all posts in flight with InDoubt, because nobody can wait for them any longer."""

    @abstractmethod
    def close(self) -> "Deferred[None]":
        """Settle, and release the log."""


def new_epoch() -> str:
    """Draw a word that no log had before: 6 random characters of [0-9A-Za-z]."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(6))


def timestamp(seconds: float) -> str:
    """Format seconds since 1970 as RFC 3339, in UTC with milliseconds."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def instant(text: str) -> float:
    """Parse an RFC 3339 timestamp, such as timestamp() writes, to seconds since 1970."""
    return dt.datetime.fromisoformat(text).timestamp()


def answer_retry(post: Post, number: int, poster: Poster, *, same: bool) -> None:
    """Answer a post whose label was used before, for the `same` message or for another."""
    if same:
        poster.posted(post, number, duplicate=True)
    else:
        poster.refused(post, LabelReused())


class Stamp:
    """The clock of a log: the wall clock, except that it never goes back.

    `now` returns seconds since 1970; `last` is the newest timestamp in the log.
    """

    def __init__(self, now: Callable[[], float], last: str | None) -> None:
        self._now = now
        self._last = instant(last) if last else 0.0
        self._text = timestamp(self._last)

    def __call__(self) -> str:
        """Return the timestamp of a message appended now."""
        now = self._now()
        if now - self._last >= MILLISECOND:
            self._last = now
            self._text = timestamp(now)
        return self._text
