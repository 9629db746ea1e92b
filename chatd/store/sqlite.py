"""A log in one SQLite file: durable, for one node.

One thread writes.  While a commit is on its way to the disk the next batch gathers, so that
however many post, there is one sync for all that came meanwhile (*group commit*); nobody
waits for a batch to fill.  A message is numbered and stamped in the transaction that keeps it,
and told to anyone only after the commit.  A second thread reads, from the snapshot that
write-ahead logging gives it.  The reactor's thread touches the file when it opens it, and
then only asks for its size.

The file says by which format it was last `written`, and since which format it can be read:
formats only add (tables, and columns with a default), so that older code goes on reading and
writing what newer code wrote, until `readable_since` says that it cannot.
"""

import fcntl
import os
import pathlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from typing import Final, NamedTuple, Protocol, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from chatd.histogram import SECONDS, Histogram
from chatd.messages import Entry, Post
from chatd.room.log import Follower, InDoubt, LogUnavailable, Page, Poster
from chatd.room.presence import Lobby
from chatd.store.base import SEED_ROOM, Retention, Stamp, StoreError, new_epoch, tell_again, timestamp

FORMAT: Final = 2
"""What this code writes; it reads every file whose `readable_since` is not above it."""
READABLE_SINCE: Final = 1
"""The oldest format whose code can read and write what this code wrote."""
APPLICATION_ID: Final = 0x63686174
"""Marks the file as ours (`chat`), for SQLite and for file(1)."""
MAX_PENDING: Final = 10_000
"""How many posts may wait for the disk; more are refused, so that a slow disk does not fill the memory."""
ROWS: Final = 256
"""How many messages one statement inserts at most.  Each statement lets go of the interpreter once."""

_SCHEMA: Final = """
CREATE TABLE log (
    epoch TEXT NOT NULL,            -- stands for this history; new whenever numbers are used again
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

_logger = Logger()
_T = TypeVar("_T")


class Worker(Protocol):
    """One thread that does one thing at a time, in order."""

    def start(self) -> None:
        """Begin; before this nothing may be asked."""

    def do(self, work: Callable[[], _T]) -> "Deferred[_T]":
        """Have something done; answers in the reactor's thread."""

    def stop(self) -> None:
        """End; everything that was asked has been answered."""


class ThreadWorker:
    """A Worker on a thread pool of one."""

    def __init__(self, reactor: IReactorFromThreads, name: str) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name=name)

    def start(self) -> None:
        """Worker.start."""
        self._pool.start()

    def do(self, work: Callable[[], _T]) -> "Deferred[_T]":
        """Worker.do."""
        return deferToThreadPool(self._reactor, self._pool, work)

    def stop(self) -> None:
        """Worker.stop."""
        self._pool.stop()


class _Waiting(NamedTuple):
    """A post that is not in the log yet."""

    room: str
    post: Post
    poster: Poster


class _Committed(NamedTuple):
    """What a commit changed."""

    outcomes: "Sequence[tuple[int, str | None]]"
    """Of the posts, in their order: the number, and what is kept under it if that was there before."""
    entries: dict[str, list[Entry]]
    """By room."""
    firsts: dict[str, int]
    """The oldest message kept now, in the rooms where some were trimmed."""


class SqliteStore:
    """Implements chatd.store.base.Store.

    `now` gives the time in seconds since 1970.
    """

    lobby: Lobby | None = None

    def __init__(
        self, path: pathlib.Path, retain: Retention, now: Callable[[], float], writer: Worker, reader: Worker
    ) -> None:
        self.epoch = ""
        self.commits = Histogram(SECONDS)
        self._faults: dict[str, str] = {}
        """What failed when it was last tried: writing, or reading."""
        self._path = path
        self._retain = retain
        self._now = now
        self._writer = writer
        self._reader = reader
        self._followers: list[Follower] = []
        self._waiting: list[_Waiting] = []
        self._batch: list[_Waiting] = []
        """Those who wait for the commit that is on its way."""
        self._committing = False
        self._settling: list[Deferred[None]] = []
        self._to_settle: list[Deferred[None]] = []
        """Who waits for the batch that is on its way, and who for the one that gathers."""

    # Opening and closing

    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Lock the file, and create it if it is not there, with an epoch and the seed in one transaction.

        Raises StoreError when the folder cannot be written, another chatd has it, it is something
        else, or a newer chatd wrote it in a way that this one cannot read.
        """
        try:
            with ExitStack() as opened:
                opened.callback(os.close, self._take_lock())
                self._write_to = self._connect(opened)
                self.epoch = self._check(seed)
                (last,) = self._write_to.execute("SELECT max(stamped) FROM rooms").fetchone()
                self._stamp = Stamp(self._now, last)
                self._trim_all()
                self._read_from = self._connect(opened)
                self._opened = opened.pop_all()
        except sqlite3.Error as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreError(
                    f"{self._path} is no chatd store ({error}): name another file with --store sqlite:PATH"
                ) from None
            raise StoreError(
                f"{self._path} cannot be opened ({error}): name another with --store sqlite:PATH"
            ) from None
        self._writer.start()
        self._reader.start()
        return succeed(None)

    def _take_lock(self) -> int:
        """Lock a file beside the store, since SQLite's own locks are taken and left with each transaction."""
        path = f"{self._path}-lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self._path.parent} cannot be written ({error.strerror}): "
                "make it writable for this user, or name another file with --store sqlite:PATH"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StoreError(
                f"{self._path} is in use by another chatd: stop that one, or name another file with --store sqlite:PATH"
            ) from None
        return lock

    def _connect(self, opened: ExitStack) -> sqlite3.Connection:
        # The workers use their connections one at a time, in threads of their own.
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        opened.enter_context(closing(connection))
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _check(self, seed: Sequence[Entry]) -> str:
        """Create what is missing, and answer the epoch of a log that this code can read."""
        db = self._write_to
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        new = not application and not tables
        if not new and application != APPLICATION_ID:
            raise StoreError(f"{self._path} is no chatd store: name another file with --store sqlite:PATH")
        db.execute("PRAGMA journal_mode=WAL")  # the file keeps it, so only our own is changed
        if new:
            self._create(seed)
        epoch, written, readable_since = db.execute("SELECT epoch, written, readable_since FROM log").fetchone()
        if readable_since > FORMAT:
            raise StoreError(
                f"{self._path} was written by a newer chatd, in format {written}, which format {FORMAT} "
                "cannot read: run that version again"
            )
        if written < FORMAT:
            self._upgrade()
        return str(epoch)

    def _upgrade(self) -> None:
        """Add what format 1 lacks."""
        with self._write_to as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("ALTER TABLE messages ADD COLUMN label TEXT")
            db.execute(_INDEX)
            db.execute("UPDATE log SET written = ?, readable_since = ?", (FORMAT, READABLE_SINCE))

    def _create(self, seed: Sequence[Entry]) -> None:
        db = self._write_to
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {_SCHEMA}")
        db.execute("INSERT INTO log VALUES (?, ?, ?)", (new_epoch(), FORMAT, READABLE_SINCE))
        db.execute(_INDEX)
        self._insert([(SEED_ROOM, *entry, None) for entry in seed])
        if seed:
            self._set_head(SEED_ROOM, seed[-1].number, seed[-1].timestamp)
        db.execute("COMMIT")

    def close(self) -> "Deferred[None]":
        """Store.close."""
        return self.settled().addCallback(self._close)

    def _close(self, _: None) -> "Deferred[None] | None":
        if self._committing:  # what came since
            return self.close()
        self._writer.stop()
        self._reader.stop()
        self._opened.close()
        return None

    @property
    def fault(self) -> str | None:
        """Store.fault."""
        return "; ".join(self._faults.values()) or None

    def usage(self) -> Mapping[str, int]:
        """Store.usage: of the file and its write-ahead log; nothing is known when the disk does not answer."""
        files = self._path, self._path.with_name(f"{self._path.name}-wal")
        try:
            disk = os.statvfs(self._path.parent)
            size = sum(file.stat().st_size for file in files if file.exists())
        except OSError:
            return {}
        return {"bytes": size, "free_bytes": disk.f_bavail * disk.f_frsize}

    # Writing

    def follow(self, follower: Follower) -> None:
        """Log.tail."""
        self._followers.append(follower)

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Log.append."""
        if len(self._waiting) >= MAX_PENDING:
            poster.refused(post, LogUnavailable("too many posts wait for the disk"))
            return
        self._waiting.append(_Waiting(room, post, poster))
        if not self._committing:
            self._start()

    def _start(self) -> None:
        """Hand all that waits to the writer."""
        batch = self._batch = self._waiting
        self._waiting = []
        self._settling, self._to_settle = self._to_settle, []
        self._committing = True
        posts = tuple(batch)  # which stays, whoever is told
        committed = self._writer.do(lambda: self._commit(posts)).addBoth(self._timed, self._now())
        told = committed.addCallbacks(self._committed, self._refused, callbackArgs=(batch,), errbackArgs=(batch,))
        told.addErrback(lambda failure: _logger.failure("what was committed could not be told", failure))
        told.addCallback(self._next)

    def _timed(self, result: _T, begun: float) -> _T:
        self.commits.add(max(0.0, self._now() - begun))  # the clock may be set back
        return result

    def _next(self, _: None) -> None:
        self._committing = False
        self._batch = []
        settling, self._settling = self._settling, []
        if self._waiting:
            self._start()
        else:  # they may have been abandoned
            settling += self._to_settle
            self._to_settle = []
        for settled in settling:
            settled.callback(None)

    def _commit(self, batch: Sequence[_Waiting]) -> _Committed:
        """Keep a batch in one transaction, or nothing of it (in the writer's thread)."""
        db = self._write_to
        stamp = self._stamp()
        entries: dict[str, list[Entry]] = {}
        heads: dict[str, int] = {}
        outcomes: list[tuple[int, str | None]] = []
        rows: list[tuple[str, int, str, str, str, str | None]] = []
        labelled: dict[tuple[str, str, str], tuple[int, str]] = {}
        """Those of this batch, which are not in the table yet."""
        try:
            db.execute("BEGIN IMMEDIATE")
            for room, post, _ in batch:
                if room not in heads:
                    heads[room] = self._head(room)
                    entries[room] = []
                if post.label is not None:
                    key = room, post.username, post.label
                    kept = labelled.get(key) or self._labelled(*key)
                    if kept is not None:
                        outcomes.append(kept)
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
        return _Committed(outcomes, entries, firsts)

    def _labelled(self, room: str, username: str, label: str) -> tuple[int, str] | None:
        """The number and the text of the message that has a label."""
        query = "SELECT number, message FROM messages WHERE room = ? AND username = ? AND label = ?"
        row: tuple[int, str] | None = self._write_to.execute(query, (room, username, label)).fetchone()
        return row

    def _head(self, room: str) -> int:
        row = self._write_to.execute("SELECT head FROM rooms WHERE name = ?", (room,)).fetchone()
        return int(row[0]) if row else 0

    def _set_head(self, room: str, head: int, stamped: str) -> None:
        self._write_to.execute(
            "INSERT INTO rooms (name, head, stamped) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET head = excluded.head, stamped = excluded.stamped",
            (room, head, stamped),
        )

    def _insert(self, rows: Sequence[tuple[str, int, str, str, str, str | None]]) -> None:
        """Insert rows by few statements, of sizes that are powers of two so that few are prepared."""
        done, size = 0, ROWS
        while done < len(rows):
            while size > len(rows) - done:
                size //= 2
            values = ",".join(["(?,?,?,?,?,?)"] * size)
            self._write_to.execute(
                f"INSERT INTO messages (room, number, username, message, timestamp, label) VALUES {values}",
                list(chain.from_iterable(rows[done : done + size])),
            )
            done += size

    def _committed(self, committed: _Committed, batch: Sequence[_Waiting]) -> None:
        self._faults.pop("write", None)
        self._tell(committed)
        for (_, post, poster), (number, kept) in zip(batch, committed.outcomes, strict=False):  # if any still wait
            if kept is None:
                poster.posted(post, number)
            else:
                tell_again(post, number, poster, same=kept == post.message)

    def _tell(self, committed: _Committed) -> None:
        for follower in self._followers:
            for room, entries in committed.entries.items():
                if entries:
                    follower.appended(room, entries)
            for room, first in committed.firsts.items():
                follower.trimmed(room, first)

    def _refused(self, failure: Failure, batch: Sequence[_Waiting]) -> None:
        self._faults["write"] = f"the log cannot be written: {failure.value}"
        if batch:  # else it was abandoned
            _logger.error("{posts} posts are not kept: {error}", posts=len(batch), error=failure.value)
        for waiting in batch:
            waiting.poster.refused(waiting.post, LogUnavailable(str(failure.value)))

    def settled(self) -> "Deferred[None]":
        """Store.settled."""
        if not self._committing:
            return succeed(None)
        settled: Deferred[None] = Deferred()
        (self._to_settle if self._waiting else self._settling).append(settled)
        return settled

    def abandon(self) -> None:
        """Store.abandon; a commit that is on its way goes on."""
        abandoned = [*self._batch, *self._waiting]
        self._batch.clear()
        self._waiting.clear()
        if abandoned:
            _logger.error("{posts} posts are not waited for any more", posts=len(abandoned))
        for waiting in abandoned:
            waiting.poster.refused(waiting.post, InDoubt("the disk has not answered"))

    # Trimming

    def trim(self) -> "Deferred[None]":
        """Store.trim."""
        return self._writer.do(self._trim_all).addCallbacks(
            lambda firsts: self._tell(_Committed([], {}, firsts)),
            lambda failure: _logger.error("old messages are not removed: {error}", error=failure.value),
        )

    def _trim_all(self) -> dict[str, int]:
        """Trim every room; answers the first message kept where some were removed (in the writer's thread)."""
        if self._retain == Retention():
            return {}
        with self._write_to as db:
            db.execute("BEGIN IMMEDIATE")
            rooms = db.execute("SELECT name FROM rooms").fetchall()
            return {room: first for (room,) in rooms if (first := self._trim(room))}

    def _trim(self, room: str) -> int:
        """Remove what is retained no longer; answers the first message kept, or 0 when nothing was removed."""
        db, retain = self._write_to, self._retain
        removed = 0
        if retain.messages:
            last = self._head(room) - retain.messages
            removed = db.execute("DELETE FROM messages WHERE room = ? AND number <= ?", (room, last)).rowcount
        elif retain.seconds:
            # In a room times never go back, so what is too old is all at its beginning.
            oldest = timestamp(self._now() - retain.seconds)
            query = "SELECT number FROM messages WHERE room = ? AND timestamp >= ? ORDER BY number LIMIT 1"
            row = db.execute(query, (room, oldest)).fetchone()
            first = row[0] if row else self._head(room) + 1
            removed = db.execute("DELETE FROM messages WHERE room = ? AND number < ?", (room, first)).rowcount
        return self._bounds(db, room)[0] if removed else 0

    # Reading

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """Log.read."""
        return self._reader.do(lambda: self._page(room, after, limit)).addCallbacks(self._readable, self._unreadable)

    def _readable(self, page: Page) -> Page:
        self._faults.pop("read", None)
        return page

    def _unreadable(self, failure: Failure) -> Failure:
        """A failure of the file is one of the log."""
        failure.trap(sqlite3.Error)
        self._faults["read"] = f"the log cannot be read: {failure.value}"
        return Failure(LogUnavailable(str(failure.value)))

    def _page(self, room: str, after: int | None, limit: int) -> Page:
        """Read a page from one snapshot (in the reader's thread)."""
        db = self._read_from
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
        """The numbers of the oldest message kept and of the newest ever appended."""
        query = (
            "SELECT coalesce((SELECT min(number) FROM messages WHERE room = name), head + 1), head"
            " FROM rooms WHERE name = ?"
        )
        first, head = db.execute(query, (room,)).fetchone() or (1, 0)
        return first, head
