"""The interface and the shared parts of all stores.

A store keeps the logs of all rooms.  `chatd.room.log.Log` is the part of it that a room needs.  This module adds the
rest: opening and closing, the epoch, the time, how much is retained, what an operator needs to moderate, and the
cursors of webhooks.
"""

import datetime as dt
import re
import secrets
import string
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from typing_extensions import override

from chatd.histogram import Histogram
from chatd.messages import Entry, Post
from chatd.room.cursors import HELD, CursorStore
from chatd.room.log import MAIN, Follower, Forbidden, LabelReused, Log, NotReplaceable, Poster, UnknownId
from chatd.room.moderation import ModerationStore, Sanction, Sanctions
from chatd.room.presence import Lobby

DAY: Final = 86_400
"""Seconds in a day."""
MILLISECOND: Final = 0.001
"""The resolution of timestamps, in seconds."""
JUMP_SECONDS: Final = 60
"""The largest step of the wall clock, in seconds, that counts as a correction; a larger one is a jump."""
STEADY_SECONDS: Final = 3600
"""How long the wall clock must run without a jump before messages are removed by their age."""
SEED_ROOM: Final = MAIN
"""The room that receives the seed of a new log."""
SAMPLE: Final = 100
"""The number of a room's newest messages from which its size is estimated."""

_logger = Logger()


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


class Store(Log, ModerationStore, CursorStore):
    """A log that is opened before the first client and closed after the last.

    Stores derive from this class and call `__init__`.  They notify `_followers`, and they
    note in `_faults` each kind of operation that failed when it was last tried.
    """

    lobby: Lobby | None = None
    """How the nodes that share this store exchange presence; None if only one node can use it."""

    def __init__(self, commits: Histogram) -> None:
        self.commits = commits
        """Duration of commits in seconds, including failed ones; empty in a store that has no commits."""
        self.sanctions = Sanctions()
        self._followers: list[Follower] = []
        self._faults: dict[str, str] = {}

    @property
    def fault(self) -> str | None:
        """A description of the store's current fault; None while reads and writes succeed."""
        return "; ".join(self._faults.values()) or None

    @override
    def follow(self, follower: Follower) -> None:
        self._followers.append(follower)

    # A claim on a reader outside, in a store that only one process can use

    @override
    def renew(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        return succeed(HELD)

    @override
    def end_claim(self, reader: str, word: str) -> "Deferred[None]":
        return succeed(None)

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
        """Remove what is no longer retained, including in rooms that receive no posts, and expired sanctions."""

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


def is_retry(post: Post, stored: Entry, *, removal: bool) -> bool:
    """Return whether a post repeats an entry that has its label, and that is itself a `removal` or not.

    The text of an entry that a removal has erased is no longer known: any text of the same kind and target repeats it.
    """
    if (stored.replaces, removal) != (post.replaces and post.replaces.number, post.removed):
        return False
    same = stored.message == post.message and (stored.extra is post.extra or sorted_extra(stored) == sorted_extra(post))
    return stored.removed or same


def sorted_extra(message: Post | Entry) -> str:
    """Return the operator's own fields as JSON in which the order of keys has no meaning; "" without any."""
    return "" if message.extra is None else orjson.dumps(message.extra, option=orjson.OPT_SORT_KEYS).decode()


def dump_extra(extra: Mapping[str, Any] | None) -> str | None:
    """Encode the operator's own fields for a store."""
    return None if extra is None else orjson.dumps(extra).decode()


def load_extra(text: str | bytes | None) -> Mapping[str, Any] | None:
    """Decode what dump_extra() encoded; an empty text stands for no fields."""
    fields: dict[str, Any] | None = orjson.loads(text) if text else None
    return fields


def why_not_replaceable(post: Post, stored: Entry | None) -> UnknownId | Forbidden | NotReplaceable | None:
    """Return why a post may not replace an entry, if it may not; `stored` is None if the log does not hold it."""
    if not post.moderated and (post.author is None or (stored is not None and stored.author != post.author)):
        return Forbidden()
    if stored is None:
        return UnknownId()
    return NotReplaceable() if stored.removed or stored.replaces is not None else None


def notify(receive: Callable[..., object], *args: object, **options: object) -> None:
    """Call a follower or a poster, and log its exception, so that the others are still notified."""
    try:
        receive(*args, **options)
    except Exception:  # noqa: BLE001 -- their faults are not those of the store
        _logger.failure("a follower or poster failed")


def dump_sanction(sanction: Sanction) -> bytes:
    """Encode a sanction for a store."""
    return orjson.dumps(sanction._asdict())


def load_sanction(data: str | bytes) -> Sanction:
    """Decode a sanction that dump_sanction() encoded."""
    return Sanction.load(orjson.loads(data))


def estimate(size: int, sampled: int, messages: int) -> int:
    """Return the approximate size of a room in bytes, from the size of some of its messages."""
    return round(size * messages / sampled)


class Moment(NamedTuple):
    """One reading of the wall clock."""

    seconds: float
    text: str

    def after(self, last: str) -> str:
        """Return the timestamp of a message that follows one with the timestamp `last`, or "" for the first one.

        After a small step back of the clock, timestamps wait for it.  After a jump back they follow it, because
        the timestamp before was wrong or this one is, and numbers give the order.
        """
        if not last or (last <= self.text and last.endswith("Z")):  # in most cases the texts can be compared
            return self.text
        before = instant(last)
        return timestamp(before) if 0 < before - self.seconds <= JUMP_SECONDS else self.text


class Ages(NamedTuple):
    """The timestamps of messages that are young enough to be kept."""

    oldest: str
    newest: str
    """Later timestamps were given by a clock that was wrong, and the age of their messages is unknown."""

    def too_old(self, timestamps: Iterable[str]) -> int:
        """Return how many of the oldest messages, given by their timestamps in order, are too old.

        The first message that is young enough ends them, because all later messages are younger.  A message of
        unknown age counts as too old only before another one that is.
        """
        old = 0
        for count, text in enumerate(timestamps, 1):
            if text < self.oldest:
                old = count
            elif text <= self.newest:
                break
        return old


class LogClock:
    """The wall clock as logs use it.

    `now` returns seconds since 1970.  The wall clock may jump: a machine without a battery starts in 1970, and some
    firmware in 2099.  Compared with `steady`, seconds that pass evenly, a jump is seen but not which of the two
    times is wrong.  After a start and after a jump, no message is therefore removed by its age for STEADY_SECONDS.
    """

    def __init__(self, now: Callable[[], float], steady: Callable[[], float] | None = None) -> None:
        self._now = now
        self._steady = steady or now
        self._offset = now() - self._steady()
        self._since = self._steady()
        self._moment = Moment(0.0, timestamp(0.0))

    def read(self) -> Moment:
        """Return the time now, to the millisecond."""
        now = self._now()
        if not 0 <= now - self._moment.seconds < MILLISECOND:
            self._moment = Moment(now, timestamp(now))
        return self._moment

    def ages(self, seconds: float) -> Ages | None:
        """Return which messages are at most so many seconds old; None while the clock may be wrong."""
        now, steady = self._now(), self._steady()
        offset, before = now - steady, self._offset
        self._offset = offset
        if abs(offset - before) > JUMP_SECONDS:
            self._since = steady
            _logger.warn(
                "the clock has jumped from {before} to {now}: no message is removed by its age for {minutes} minutes",
                before=timestamp(before + steady),
                now=timestamp(now),
                minutes=STEADY_SECONDS // 60,
            )
        if steady - self._since < STEADY_SECONDS:
            return None
        return Ages(timestamp(now - seconds), timestamp(now + JUMP_SECONDS))


def log_removed(messages: int) -> None:
    """Log that retention has removed messages."""
    if messages:
        _logger.info("{messages} messages removed that --retain no longer keeps", messages=messages)
