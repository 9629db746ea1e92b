"""The log that a room needs: the durable order of its entries.

The interfaces are declared here, where they are used, and the stores implement them.  A log numbers the entries of
each room 1, 2, 3 … without gaps.  It notifies its followers of the entries in that order.  It answers readers with
pages, and each page shows the log at one instant.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred

from chatd.messages import Entry, Post

MAIN: Final = "main"
"""The room of clients that name no room."""


class LogUnavailable(Exception):
    """The log can neither store nor return entries now; nothing was stored, and a retry may succeed."""


class InDoubt(LogUnavailable):
    """The post may or may not have been stored; a labelled post is safe to retry."""


class LabelReused(Exception):
    """The label belongs to another message of this user in this room; nothing was stored."""


class UnknownId(Exception):
    """No entry of this log has, or had, this id."""


class Forbidden(Exception):
    """The entry to replace belongs to another author; nothing was stored."""


class NotReplaceable(Exception):
    """The entry to replace is an edit itself, or was removed; nothing was stored."""


Refusal = LogUnavailable | LabelReused | UnknownId | Forbidden | NotReplaceable
"""The reason for which a post is not stored."""


class Page(NamedTuple):
    """Entries of a room, with the bounds of its log at the same instant."""

    entries: Sequence[Entry]
    """Consecutive entries, oldest first."""
    first: int
    """The number of the oldest stored entry; head + 1 if the log holds none."""
    head: int
    """The number of the newest entry ever appended; 0 if there was none."""


class Poster(Protocol):
    """The receiver of the outcome of a post."""

    def posted(self, post: Post, number: int, *, duplicate: bool = False) -> None:
        """Learn that the post is stored durably under this number, after the followers of its room.

        The post is a `duplicate` if its label identifies an equal post that was stored earlier.
        """

    def refused(self, post: Post, error: Refusal) -> None:
        """Learn that the post is not stored, or, with InDoubt, that it may be."""


class Follower(Protocol):
    """A reader of the log of every room, notified in the order of each room."""

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """Take entries that follow those of earlier calls; an edit changes an earlier one, and carries its new text."""

    def trimmed(self, room: str, first: int) -> None:
        """Learn that the log no longer holds the entries before this number."""

    def interrupted(self) -> None:
        """Learn that notifications may be missing, or that the log has a new epoch: all knowledge of it is void."""


class Log(Protocol):
    """The durable order of the entries of all rooms."""

    @property
    def epoch(self) -> str:
        """The word that names this history, 4 to 16 characters of [0-9A-Za-z]; a new history has a new word."""

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Number, stamp and store a post, then notify the followers and then the poster; never blocks.

        The posters of a room are notified in the order of its entries.  A post with a label that this user has used in
        this room is not stored again.  A label is remembered as long as its entry.

        A post that replaces an entry is stored as the next entry.  The log refuses it unless the author of that entry
        or a moderator posts it: with UnknownId, Forbidden or NotReplaceable.  A removal erases the texts of that entry
        and of all its edits.
        """

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """Read at most `limit` entries after a number, or the newest ones; fails with LogUnavailable.

        The page belongs to the epoch that is current when the Deferred fires.  Entries that were edited carry their
        newest text.
        """

    def follow(self, follower: Follower) -> None:
        """Notify this follower of everything that is appended or trimmed from now on."""


class EncodedPage(NamedTuple):
    """A page as frames."""

    frames: Sequence[bytes]
    """Consecutive message frames, oldest first."""
    end: int
    """The number of the last frame; for an empty page, the number before its place."""
    older: bool
    """True if the log holds entries before this page."""
    newer: bool
    """True if the log holds entries after this page."""


class PageRange(NamedTuple):
    """The entries that a reader wants: at most `limit` before or after a number, or the newest."""

    before: int | None
    after: int | None
    limit: int

    @property
    def start(self) -> int | None:
        """The argument `after` for a Log.read of `limit` entries that covers this range in any log."""
        return self.after if self.before is None else max(self.before - 1 - self.limit, 0)

    def bounds(self, first: int, head: int) -> tuple[int, int]:
        """Return (after, until) in a log that holds `first` to `head`: the range is after + 1 to until.

        Raises UnknownId for a number beyond the head.
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

    def encode(self, first: int, head: int, frames: Callable[[int, int], Sequence[bytes]]) -> EncodedPage:
        """Return this range of a log that holds `first` to `head`; `frames(after, until)` returns its frames.

        Raises UnknownId for a number beyond the head.
        """
        after, until = self.bounds(first, head)
        return EncodedPage(frames(after, until), until, older=after >= first, newer=max(until, first - 1) < head)
