"""The domain: entries, their ids, and the requests of clients.

This module knows neither JSON nor WebSocket.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple

REMOVED: Final = "[removed]"
"""The text of a removal, and of everything that it erased."""

_ID = re.compile(r"([0-9A-Za-z]{4,16})-(0|[1-9][0-9]{0,15})")


class Code(StrEnum):
    """The cause of an error, for programs; a frame that breaks its schema has no code."""

    ALREADY_JOINED = "ALREADY_JOINED"
    """The connection is in this room already."""
    EVICTED = "EVICTED"
    """The client reads this room too slowly, and may join it again."""
    FORBIDDEN = "FORBIDDEN"
    """The token of the client does not permit this."""
    LABEL_REUSED = "LABEL_REUSED"
    """The label belongs to another message."""
    NOT_JOINED = "NOT_JOINED"
    """The connection is not in this room."""
    NOT_REPLACEABLE = "NOT_REPLACEABLE"
    """The message to replace is an edit itself, or was removed."""
    RATE_LIMITED = "RATE_LIMITED"
    """The client sends too many frames and may send this one again later."""
    TOKEN_REFUSED = "TOKEN_REFUSED"  # noqa: S105 -- not a password
    """A token is needed, and there is none or it is not valid."""
    TOO_MANY_ROOMS = "TOO_MANY_ROOMS"
    """The connection is in as many rooms as it may."""
    UNAVAILABLE = "UNAVAILABLE"
    """The log can neither store nor return entries now; the client may retry."""
    UNKNOWN_ID = "UNKNOWN_ID"
    """No entry of this log has, or had, this id."""


class Id(NamedTuple):
    """The name of one entry of a room: the epoch of the log and the number of the entry, written `EPOCH-N`."""

    epoch: str
    number: int

    @classmethod
    def parse(cls, text: str) -> "Id":
        """Parse an id; raises ValueError for any other text."""
        match = _ID.fullmatch(text)
        if not match:
            raise ValueError("an id is an epoch and a number, such as k7Q2xe-1042")
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


class Post(NamedTuple):
    """A valid request to append a message, which may replace an earlier one."""

    username: str
    message: str
    label: str | None = None
    """The key by which a retry of this post is recognized."""
    author: str | None = None
    """The subject of the poster's token; None without tokens."""
    replaces: Id | None = None
    """The message that this one is the newest text of; None for a new message."""
    removed: bool = False
    """True for a removal: an edit that erases the message that it replaces, and all its edits."""
    moderated: bool = False
    """True if the poster may replace the messages of others in this room."""
    extra: Mapping[str, Any] | None = None
    """The operator's own fields, as JSON values by name; None without any."""


class PageRequest(NamedTuple):
    """A valid request to read entries: the newest, or those before or after one id."""

    before: Id | None
    after: Id | None
    limit: int
    label: str | None


class Typing(NamedTuple):
    """A notice that a user types."""

    username: str


class Renewal(NamedTuple):
    """A request to go on with a new token."""

    token: str
    label: str | None


class Join(NamedTuple):
    """A request to join a room, on a connection that may be in many."""

    last: Id | None
    """The id of the last message that the client has."""
    events: frozenset[str]
    """The events that it wants besides messages."""
    username: str | None
    label: str | None


class Leave(NamedTuple):
    """A request to leave a room, on a connection that may be in many."""

    label: str | None


class Entry(NamedTuple):
    """One stored message of a room."""

    number: int
    """The place in the log of its room: 1, 2, 3 … without gaps."""
    username: str
    message: str
    timestamp: str
    """RFC 3339 in UTC, as `YYYY-MM-DDTHH:MM:SS.mmmZ`."""
    author: str | None = None
    """The subject of the token of the poster; None without tokens."""
    replaces: int | None = None
    """The number of the entry that this edit is a newer text of; None for an entry of its own."""
    removed: bool = False
    """True for a removal, and for an entry whose text a removal has erased."""
    replaced: int | None = None
    """The number of the newest edit of this entry, whose text it carries; None if it was never edited."""
    extra: Mapping[str, Any] | None = None
    """The operator's own fields, as JSON values by name; None without any.  Nobody may change the mapping."""

    def revised(self, edit: "Entry") -> "Entry":
        """Return this entry as an edit leaves it: the original, or an earlier edit that a removal erases."""
        if self.number == edit.replaces:
            return self._replace(message=edit.message, removed=edit.removed, replaced=edit.number, extra=edit.extra)
        return self._replace(message=edit.message, removed=True, extra=None)
