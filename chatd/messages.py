"""The domain: messages, their ids, and what clients ask for.

This module knows neither JSON nor WebSocket.
"""

import re
from enum import StrEnum
from typing import NamedTuple

_ID = re.compile(r"([0-9A-Za-z]{4,16})-(0|[1-9][0-9]{0,15})")


class Code(StrEnum):
    """What an error is about, for programs; a frame that breaks the schema has none."""

    LABEL_REUSED = "LABEL_REUSED"
    """The label is that of another message."""
    RATE_LIMITED = "RATE_LIMITED"
    """Too many frames; the same may be sent again later."""
    UNAVAILABLE = "UNAVAILABLE"
    """The log cannot take or give messages now; the same may be sent again."""
    UNKNOWN_ID = "UNKNOWN_ID"
    """No message of this log has, or had, this id."""


class Id(NamedTuple):
    """What names one message of a room: the log's epoch and the message's number, written `EPOCH-N`."""

    epoch: str
    number: int

    @classmethod
    def parse(cls, text: str) -> "Id":
        """Read an id; ValueError for anything else."""
        match = _ID.fullmatch(text)
        if not match:
            raise ValueError("an id is an epoch and a number, such as k7Q2xe-1042")
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


class Post(NamedTuple):
    """What a client asks to be said, already checked."""

    username: str
    message: str
    label: str | None = None
    """The client's key for this post, by which a second one is known as a retry."""


class PageRequest(NamedTuple):
    """What a client asks to read again: the newest messages, or those before or after one."""

    before: Id | None
    after: Id | None
    limit: int
    label: str | None


class Typing(NamedTuple):
    """That someone writes."""

    username: str


class Entry(NamedTuple):
    """One message of a room's log."""

    number: int
    """1, 2, 3 ... in its room, without gaps."""
    username: str
    message: str
    timestamp: str
    """RFC 3339 in UTC, as `YYYY-MM-DDTHH:MM:SS.mmmZ`."""
