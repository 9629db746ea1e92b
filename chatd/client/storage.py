"""Storages of the outbox: where posts are kept until the server answers, in memory or in a file."""

import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Protocol

from typing_extensions import override

from chatd.client.protocol import Rejected
from chatd.messages import Id

BUSY_SECONDS: Final = 10.0
"""The time for which a storage waits for another process that writes to the same file."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS outbox (label TEXT PRIMARY KEY, key TEXT NOT NULL, at INTEGER NOT NULL, post TEXT NOT NULL)
"""


@dataclass(frozen=True, slots=True)
class PendingPost:
    """A post without an answer, or one that the server refused for good."""

    label: str
    key: str
    """The room and the user to whom the post belongs."""
    at: int
    """The order of the posts: about the time in milliseconds since 1970."""
    frame: Mapping[str, Any]
    """The frame for the server, without its label: a message, an edit (`replaces`) or a removal (`type`, `id`)."""
    since: Id | None = None
    """The newest entry that the client had when the post was made."""
    error: Rejected | None = None
    """The reason for which the server refused it; such a post is not sent again."""


class Storage(Protocol):
    """Keeps posts until the server answers.  The methods do not return before that is done, and may block briefly."""

    def list(self, key: str) -> Sequence[PendingPost]:
        """Return the posts of one user in one room."""

    def put(self, post: PendingPost) -> None:
        """Add or replace a post."""

    def delete(self, label: str) -> None:
        """Remove a post, if it is there."""


class MemoryStorage(Storage):
    """Keeps posts as long as the program runs."""

    def __init__(self) -> None:
        self._posts: dict[str, PendingPost] = {}

    @override
    def list(self, key: str) -> Sequence[PendingPost]:
        return [post for post in self._posts.values() if post.key == key]

    @override
    def put(self, post: PendingPost) -> None:
        self._posts[post.label] = post

    @override
    def delete(self, label: str) -> None:
        self._posts.pop(label, None)


class FileStorage(Storage):
    """Keeps posts in a file, an SQLite database, so that they survive the end of the program and of the machine.

    Several programs may use one file.  If two send the same post, its label makes the server store it once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # others must not read what was typed
        self._run(_SCHEMA)

    @override
    def list(self, key: str) -> Sequence[PendingPost]:
        rows = self._run("SELECT label, at, post FROM outbox WHERE key = ?", key)
        return [_load(label, key, at, json.loads(post)) for label, at, post in rows]

    @override
    def put(self, post: PendingPost) -> None:
        error = post.error and (str(post.error), post.error.code)
        text = json.dumps({"frame": dict(post.frame), "since": post.since and str(post.since), "error": error})
        self._run("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?)", post.label, post.key, post.at, text)

    @override
    def delete(self, label: str) -> None:
        self._run("DELETE FROM outbox WHERE label = ?", label)

    def _run(self, statement: str, *values: str | int) -> Sequence[tuple[Any, ...]]:
        """Run a statement, and sync what it changes."""
        with closing(sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            return database.execute(statement, values).fetchall()


def _load(label: str, key: str, at: int, kept: dict[str, Any]) -> PendingPost:
    since, error = kept["since"], kept["error"]
    return PendingPost(label, key, at, kept["frame"], since and Id.parse(since), error and Rejected(*error))
