"""What a room needs of a log: the durable order of its messages, whoever keeps it.

The interfaces are declared here, where they are used, and the stores implement them.  A log numbers the
messages of each room 1, 2, 3 ... without gaps, tells its followers of them in that order, and answers readers
with pages, each of which is one instant of the log.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred

from chatd.messages import Entry, Post

MAIN: Final = "main"
"""The room of a client that names none."""


class LogUnavailable(Exception):
    """The log cannot take or give messages now; nothing was kept, and the same may be tried again."""


class InDoubt(LogUnavailable):
    """It cannot be told whether the message was kept: with its label, it may be posted again."""


class LabelReused(Exception):
    """The label is that of another message of this user in this room; nothing was kept."""


class UnknownId(Exception):
    """No message of this log has, or had, this id."""


class Page(NamedTuple):
    """What a log holds of a room at one instant, and some of it."""

    entries: Sequence[Entry]
    """Consecutive, oldest first."""
    first: int
    """The number of the oldest message kept; head + 1 when none is."""
    head: int
    """The number of the newest message ever appended; 0 when none was."""


class Poster(Protocol):
    """Who posts: it is told what became of it."""

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        """The post is in the log, durably, under this number; its room has been told.

        It is a `duplicate` if it was there before: its label is that of an equal post.
        """

    def refused(self, post: Post, error: LogUnavailable | LabelReused) -> None:
        """The post is not in the log; or, with InDoubt, it may be."""


class Follower(Protocol):
    """Who reads the tail of a log: it is told of every room's messages, in the order of each room."""

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """These came after those told before."""

    def trimmed(self, room: str, first: int) -> None:
        """The messages before this number are kept no more."""

    def interrupted(self) -> None:
        """Messages may have come that were not told, or the epoch is another, and all that was known is void."""


class Log(Protocol):
    """The durable order of all rooms' messages."""

    @property
    def epoch(self) -> str:
        """The word that stands for this history, 4 to 16 characters of [0-9A-Za-z]; another if that is lost."""

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Number, stamp and keep a post, then tell the followers, then the poster; never blocks.

        The posters of a room are told in the order of its messages.  A post with a label that this user has used in
        this room is not kept again; the labels are remembered as long as their messages.
        """

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """At most `limit` messages after the number given, or the newest; LogUnavailable if it cannot.

        They are of the epoch that stands when they are answered.
        """

    def follow(self, follower: Follower) -> None:
        """Tell this follower of all that is appended and trimmed from now on."""


class EncodedPage(NamedTuple):
    """Some of a room's messages, as frames."""

    frames: Sequence[bytes]
    """Consecutive, oldest first."""
    end: int
    """The number of the last, or the one before where the first would be."""
    older: bool
    """Whether the log holds messages before these."""
    newer: bool
    """Whether it holds messages after these."""


class PageRange(NamedTuple):
    """Which messages a reader wants: at most `limit` before or after a number, or the newest."""

    before: int | None
    after: int | None
    limit: int

    @property
    def start(self) -> int | None:
        """After which number the log is to be read, whatever it holds; None: the newest."""
        return self.after if self.before is None else max(self.before - 1 - self.limit, 0)

    def bounds(self, first: int, head: int) -> tuple[int, int]:
        """Which these are in a log that holds `first` to `head`: those after the one number up to the other.

        Raises UnknownId for what is beyond the head.
        """
        if self.after is not None:
            if self.after > head:
                raise UnknownId
            after = max(self.after, first - 1)
            return after, min(after + self.limit, head)
        if self.before is not None and self.before > head + 1:
            raise UnknownId
        until = head if self.before is None else max(self.before - 1, 0)
        return min(until, max(until - self.limit, first - 1)), until

    def excerpt(self, first: int, head: int, between: Callable[[int, int], Sequence[bytes]]) -> EncodedPage:
        """Take these out of what `between` answers."""
        after, until = self.bounds(first, head)
        return EncodedPage(between(after, until), until, older=after >= first, newer=max(until, first - 1) < head)
