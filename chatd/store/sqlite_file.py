"""The SQLite file that holds a log: its lock, its format, and every statement of SQL.

All of it is synchronous.  `chatd.store.sqlite` calls `commit` and `trim` in one thread, the only one that
writes, and `page` in another.  Readers see a snapshot, because the file is in write-ahead logging (WAL) mode.

The file states the newest format that has `written` to it, and the oldest format that can still read it.
Formats only add (tables, and columns with a default).  Older code therefore reads and writes
what newer code wrote, until `readable_since` forbids it.
"""

import fcntl
import os
import pathlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from typing import Final, NamedTuple

from chatd.messages import Entry, Post
from chatd.room.log import Page
from chatd.store.base import SEED_ROOM, Retention, Stamp, StoreError, new_epoch, timestamp

FORMAT: Final = 2
"""The format this code writes; it reads every file whose `readable_since` is not higher."""
READABLE_SINCE: Final = 1
"""The oldest format whose code can read and write what this code writes."""
APPLICATION_ID: Final = 0x63686174
"""Marks the file as ours (`chat`), for SQLite and for file(1)."""
ROWS: Final = 256
"""The most messages that one statement inserts.  Python's GIL is released once per statement."""

_SCHEMA: Final = """
CREATE TABLE log (
    epoch TEXT NOT NULL,            -- stands for this history; replaced whenever numbers are reused
    written INTEGER NOT NULL,       -- the newest format that wrote here
    readable_since INTEGER NOT NULL -- the oldest format that can read and write here
);
CREATE TABLE rooms (
    name TEXT PRIMARY KEY,
    head INTEGER NOT NULL,          -- the number of the newest message; it stays when that is trimmed
    stamped TEXT NOT NULL           -- the timestamp of the newest message
) WITHOUT ROWID;
CREATE TABLE messages (
    room TEXT NOT NULL,
    number INTEGER NOT NULL,        -- 1, 2, 3 ... in each room, without gaps
    username TEXT NOT NULL,
    message TEXT NOT NULL,
    timestamp TEXT NOT NULL,
    label TEXT,                     -- the poster's key for it (since format 2)
    PRIMARY KEY (room, number)
) WITHOUT ROWID;
"""
_INDEX: Final = "CREATE UNIQUE INDEX labels ON messages (room, username, label) WHERE label IS NOT NULL"


class Commit(NamedTuple):
    """The effect of one transaction."""

    outcomes: Sequence[tuple[int, str | None]]
    """For each post in order, its number, and the message stored under that number if its label was used before."""
    entries: dict[str, list[Entry]]
    """The new entries by room."""
    firsts: dict[str, int]
    """The number of the oldest entry left, by room, in rooms that were trimmed."""


class SqliteFile:
    """A log in one file.

    `now` returns the time in seconds since 1970.
    """

    def __init__(self, path: pathlib.Path, retain: Retention, now: Callable[[], float]) -> None:
        self.epoch = ""
        self.path = path
        self.writer: sqlite3.Connection
        self.reader: sqlite3.Connection
        self._retain = retain
        self._now = now

    # Opening

    def open(self, seed: Sequence[Entry]) -> None:
        """Lock the file; if it is new, write an epoch and the seed in one transaction.

        Raises StoreError if the folder cannot be written, another chatd uses the file, it is not a store,
        or a newer chatd wrote it in a format that this code cannot read.
        """
        if str(self.path) == ":memory:":  # SQLite would give each connection a database of its own
            raise StoreError(":memory: is no file: to keep messages in memory, use --store memory:")
        try:
            with ExitStack() as opened:
                opened.callback(os.close, self._take_lock())
                self.writer = self._connect(opened)
                self.epoch = self._check(seed)
                (last,) = self.writer.execute("SELECT max(stamped) FROM rooms").fetchone()
                self._stamp = Stamp(self._now, last)
                self.trim()
                self.reader = self._connect(opened)
                self._opened = opened.pop_all()
        except sqlite3.Error as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreError(
                    f"{self.path} is no chatd store ({error}): name another file with --store sqlite:PATH"
                ) from None
            raise StoreError(f"{self.path} cannot be opened ({error}): name another with --store sqlite:PATH") from None

    def close(self) -> None:
        """Close the connections and release the lock."""
        self._opened.close()

    def _take_lock(self) -> int:
        """Lock a file beside the store, because SQLite holds its own locks only during transactions."""
        path = f"{self.path}-lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self.path.parent} cannot be written ({error.strerror}): "
                "make it writable for this user, or name another file with --store sqlite:PATH"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreError(
                f"{self.path} is in use by another chatd: stop that one, or name another file with --store sqlite:PATH"
            ) from None
        return lock

    def _connect(self, opened: ExitStack) -> sqlite3.Connection:
        # Each connection moves once, from the thread that opens it to the one thread that uses it.
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        opened.enter_context(closing(connection))
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _check(self, seed: Sequence[Entry]) -> str:
        """Create or upgrade the tables as needed, and return the epoch."""
        db = self.writer
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        new = not application and not tables
        if not new and application != APPLICATION_ID:
            raise StoreError(f"{self.path} is no chatd store: name another file with --store sqlite:PATH")
        db.execute("PRAGMA journal_mode=WAL")  # persistent, so set it only in a file that is ours
        if new:
            self._create(seed)
        epoch, written, readable_since = db.execute("SELECT epoch, written, readable_since FROM log").fetchone()
        if readable_since > FORMAT:
            raise StoreError(
                f"{self.path} was written by a newer chatd, in format {written}, which format {FORMAT} "
                "cannot read: run that version again"
            )
        if written < FORMAT:
            self._upgrade()
        return str(epoch)

    def _create(self, seed: Sequence[Entry]) -> None:
        db = self.writer
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {_SCHEMA}")
        db.execute("INSERT INTO log VALUES (?, ?, ?)", (new_epoch(), FORMAT, READABLE_SINCE))
        db.execute(_INDEX)
        self._insert([(SEED_ROOM, *entry, None) for entry in seed])
        if seed:
            self._set_head(SEED_ROOM, seed[-1].number, seed[-1].timestamp)
        db.execute("COMMIT")

    def _upgrade(self) -> None:
        """Upgrade a file of format 1, which has no labels."""
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("ALTER TABLE messages ADD COLUMN label TEXT")
            db.execute(_INDEX)
            db.execute("UPDATE log SET written = ?, readable_since = ?", (FORMAT, READABLE_SINCE))

    def usage(self) -> Mapping[str, int]:
        """Return the bytes of the file and its write-ahead log, and the free bytes; nothing if the disk fails."""
        files = self.path, self.path.with_name(f"{self.path.name}-wal")
        try:
            disk = os.statvfs(self.path.parent)
            size = sum(file.stat().st_size for file in files if file.exists())
        except OSError:
            return {}
        return {"bytes": size, "free_bytes": disk.f_bavail * disk.f_frsize}

    # Writing

    def commit(self, posts: Sequence[tuple[str, Post]]) -> Commit:
        """Number, stamp and store posts, each with its room, in one transaction; on an exception none is stored."""
        db = self.writer
        stamp = self._stamp()
        entries: dict[str, list[Entry]] = {}
        heads: dict[str, int] = {}
        outcomes: list[tuple[int, str | None]] = []
        rows: list[tuple[str, int, str, str, str, str | None]] = []
        labelled: dict[tuple[str, str, str], tuple[int, str]] = {}
        """The labels of this batch, which the table does not hold yet."""
        try:
            db.execute("BEGIN IMMEDIATE")
            for room, post in posts:
                if room not in heads:
                    heads[room] = self._head(room)
                    entries[room] = []
                if post.label is not None:
                    key = room, post.username, post.label
                    stored = labelled.get(key) or self._labelled(*key)
                    if stored is not None:
                        outcomes.append(stored)
                        continue
                    labelled[key] = heads[room] + 1, post.message
                number = heads[room] = heads[room] + 1
                entry = Entry(number, post.username, post.message, stamp)
                outcomes.append((number, None))
                rows.append((room, *entry, post.label))
                entries[room].append(entry)
            self._insert(rows)
            for room, new in entries.items():
                if new:
                    self._set_head(room, new[-1].number, stamp)
            firsts = {room: first for room, new in entries.items() if new and (first := self._trim(room))}
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
        return Commit(outcomes, entries, firsts)

    def _labelled(self, room: str, username: str, label: str) -> tuple[int, str] | None:
        """Return the number and the text of the message that has a label."""
        query = "SELECT number, message FROM messages WHERE room = ? AND username = ? AND label = ?"
        row: tuple[int, str] | None = self.writer.execute(query, (room, username, label)).fetchone()
        return row

    def _head(self, room: str) -> int:
        row = self.writer.execute("SELECT head FROM rooms WHERE name = ?", (room,)).fetchone()
        return int(row[0]) if row else 0

    def _set_head(self, room: str, head: int, stamped: str) -> None:
        self.writer.execute(
            "INSERT INTO rooms (name, head, stamped) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET head = excluded.head, stamped = excluded.stamped",
            (room, head, stamped),
        )

    def _insert(self, rows: Sequence[tuple[str, int, str, str, str, str | None]]) -> None:
        """Insert rows with few statements, in powers of two so that few different ones are prepared."""
        done, size = 0, ROWS
        while done < len(rows):
            while size > len(rows) - done:
                size //= 2
            values = ",".join(["(?,?,?,?,?,?)"] * size)
            self.writer.execute(
                f"INSERT INTO messages (room, number, username, message, timestamp, label) VALUES {values}",
                list(chain.from_iterable(rows[done : done + size])),
            )
            done += size

    def trim(self) -> dict[str, int]:
        """Remove what is no longer retained; return the first number left, in rooms that were trimmed."""
        if self._retain == Retention():
            return {}
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            rooms = db.execute("SELECT name FROM rooms").fetchall()
            return {room: first for (room,) in rooms if (first := self._trim(room))}

    def _trim(self, room: str) -> int:
        """Trim one room; return the first number left, or 0 if nothing was removed."""
        db, retain = self.writer, self._retain
        removed = 0
        if retain.messages:
            last = self._head(room) - retain.messages
            removed = db.execute("DELETE FROM messages WHERE room = ? AND number <= ?", (room, last)).rowcount
        elif retain.seconds:
            # Timestamps never go back within a room, so the messages that are too old are its first ones.
            oldest = timestamp(self._now() - retain.seconds)
            query = "SELECT number FROM messages WHERE room = ? AND timestamp >= ? ORDER BY number LIMIT 1"
            row = db.execute(query, (room, oldest)).fetchone()
            first = row[0] if row else self._head(room) + 1
            removed = db.execute("DELETE FROM messages WHERE room = ? AND number < ?", (room, first)).rowcount
        return self._bounds(db, room)[0] if removed else 0

    # Reading

    def page(self, room: str, after: int | None, limit: int) -> Page:
        """Read a page from one snapshot: entries after a number, or the newest."""
        db = self.reader
        columns = "SELECT number, username, message, timestamp FROM messages WHERE room = ?"
        with db:
            db.execute("BEGIN")
            first, head = self._bounds(db, room)
            if after is None:
                rows = db.execute(f"{columns} ORDER BY number DESC LIMIT ?", (room, limit)).fetchall()[::-1]
            else:
                rows = db.execute(f"{columns} AND number > ? ORDER BY number LIMIT ?", (room, after, limit)).fetchall()
        return Page([Entry(*row) for row in rows], first, head)

    @staticmethod
    def _bounds(db: sqlite3.Connection, room: str) -> tuple[int, int]:
        """Return the numbers of the oldest message stored and of the newest ever appended."""
        query = (
            "SELECT coalesce((SELECT min(number) FROM messages WHERE room = name), head + 1), head"
            " FROM rooms WHERE name = ?"
        )
        first, head = db.execute(query, (room,)).fetchone() or (1, 0)
        return first, head
