"""The SQLite file that holds a log: its lock, its format, and every statement of SQL.

All of it is synchronous.  `chatd.store.sqlite` calls `commit`, `trim` and `return_space` in one thread, the only one
that writes, and `page` in another.  Readers see a snapshot, because the file is in write-ahead logging (WAL) mode.

The file states the newest format that has `written` to it, and the oldest format that can still read it.
Formats only add (tables, and columns with a default).  Older code therefore reads and writes
what newer code wrote, until `readable_since` forbids it.

A removal erases: SQLite overwrites with zeros what it frees (`secure_delete`).  `erase` then empties the write-ahead
log, which still holds the page as it was, and overwrites copies that SQLite has left in the unused space of pages.

A COMMIT can fail after its pages were written, because the disk did not sync them.  SQLite forgets them, but whoever
recovers the file after a kill finds them: they are *in doubt*.  The next commit overwrites them, wherever they begin.
A failed commit is therefore followed by one without effect.  If that succeeds, the batch is certainly not stored.
"""

import fcntl
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

from twisted.logger import Logger

from chatd.messages import Entry, Id, Post
from chatd.room.cursors import Behind
from chatd.room.log import Forbidden, InDoubt, LogUnavailable, NotReplaceable, Page, UnknownId
from chatd.room.moderation import RoomSummary, Sanction
from chatd.store.base import (
    SAMPLE,
    SEED_ROOM,
    LogClock,
    Retention,
    StoreError,
    dump_extra,
    dump_sanction,
    estimate,
    is_retry,
    load_extra,
    load_sanction,
    log_removed,
    new_epoch,
    why_not_replaceable,
)
from chatd.store.sqlite_pages import MOST_PAGES, is_pointer_map, stale_gaps

FORMAT: Final = 4
"""The format this code writes; it reads every file whose `readable_since` is not higher."""
READABLE_SINCE: Final = 1
"""The oldest format whose code can read and write what this code writes."""
APPLICATION_ID: Final = 0x63686174
"""Marks the file as ours (`chat`), for SQLite and for file(1)."""
ROWS: Final = 256
"""The most rows that one statement reads or writes for a batch.  Python's GIL is released once per statement."""
BUSY_MILLISECONDS: Final = 5000
"""How long a statement waits for another program that writes to the file."""
SCAN_ROOMS: Final = 1000
"""The rooms that one step of a list looks at."""
REMOVED_ROWS: Final = 5000
"""The most messages that one transaction removes; posts wait for it."""
TRIMMED_ROOMS: Final = 1000
"""The most rooms that one transaction trims."""
RETURNED_PAGES: Final = 1024
"""The most unused pages that one transaction returns to the file system; posts wait for it."""
MOST_UNUSED: Final = 1 / 4
"""The part of the file that may be unused, because later messages will fill it."""
PROBE_BYTES: Final = 1 << 20
"""The bytes that a disk has free after it was full, before it counts as writable."""
SCANNED_ROOMS: Final = 1000
"""The most rooms that one look for rooms with undelivered messages reads."""
WAL_ROWS: Final = 4096
"""The number of messages after which the size of the write-ahead log is looked at."""
WAL_USUAL: Final = 64 << 20
"""The size in bytes that the write-ahead log has at most, unless another program keeps SQLite from emptying it."""
WAL_MOST: Final = 1 << 30
"""The size in bytes at which posts are rejected, so that the write-ahead log does not fill the disk."""
KNOWN_HEADS: Final = 10_000
"""The number of heads in memory, some 200 bytes each, above which all of them are forgotten."""
SCRUB_BYTES: Final = 32 << 20
"""The part of the file in which one step looks for copies of erased texts, in some 20 ms; posts wait for it."""
SCRUB_PIECE: Final = 1 << 20
"""The bytes of one read of such a step."""

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
    author TEXT,                    -- the token subject of the poster (since format 3, as the next four)
    replaces INTEGER,               -- the number of the message that this one is a newer text of
    removed INTEGER,                -- 1 for a removal, and for a message whose text it erased
    replaced INTEGER,               -- the number of the newest edit, whose text a page shows
    extra TEXT,                     -- the operator's own fields as a JSON object (since format 4)
    PRIMARY KEY (room, number)
) WITHOUT ROWID;
"""
_LABELS: Final = "CREATE UNIQUE INDEX labels ON messages (room, username, label) WHERE label IS NOT NULL"
_EDITS: Final = "CREATE INDEX edits ON messages (room, replaces) WHERE replaces IS NOT NULL"
_UPGRADES: Final = {
    2: ["ALTER TABLE messages ADD COLUMN label TEXT", _LABELS],
    3: [
        *(f"ALTER TABLE messages ADD COLUMN {column}" for column in ("author TEXT", "replaces INTEGER")),
        *(f"ALTER TABLE messages ADD COLUMN {column}" for column in ("removed INTEGER", "replaced INTEGER")),
        _EDITS,
    ],
    4: ["ALTER TABLE messages ADD COLUMN extra TEXT"],
}
"""The statements that make a file of the format before one of this format."""
_NEWEST: Final = """
        CASE WHEN replaced IS NULL THEN {0}
            ELSE (SELECT {0} FROM messages AS edit WHERE edit.room = shown.room AND edit.number = shown.replaced)
        END"""
_SHOWN: Final = f"""
    SELECT number, username, {_NEWEST.format("message")},
        timestamp, author, replaces, ifnull(removed, 0), replaced, {_NEWEST.format("extra")}
    FROM messages AS shown WHERE room = ?"""
"""The entries of a room, each with its newest text."""
_STORED: Final = """
    SELECT number, username, message, timestamp, author, replaces, ifnull(removed, 0), NULL, extra
    FROM messages WHERE room = ?"""
"""The entries of a room, each with the text that it had first."""
_REMOVALS: Final = "SELECT room, number, replaces FROM messages WHERE replaces NOT NULL AND removed"
"""The removals, by the index of edits: a search of all messages would delay the start."""
_ERASE_EXTRA: Final = "UPDATE messages SET extra = NULL WHERE extra NOT NULL AND room = ? AND number IN (?, ?)"
"""Erases what format 3, which does not know the column, has left beside a removed text."""
_PLAIN: Final = "room", "number", "username", "message", "timestamp", "label"
_AUTHORED: Final = *_PLAIN, "author", "replaces", "removed"
_COLUMNS: Final = _PLAIN, _AUTHORED, (*_AUTHORED, "extra")
"""The columns of a row, so that a row without an author or fields of the operator's own needs few."""

# Not part of a format: code that does not know the table leaves it as it is.
_SANCTIONS: Final = """
CREATE TABLE IF NOT EXISTS sanctions (
    id TEXT PRIMARY KEY,
    sanction TEXT NOT NULL          -- the fields as a JSON object
)
"""
_READERS: Final = """
CREATE TABLE IF NOT EXISTS readers (
    name TEXT PRIMARY KEY,          -- a program outside that gets every room, such as a webhook
    epoch TEXT NOT NULL             -- the epoch of its cursors
) WITHOUT ROWID
"""
_CURSORS: Final = """
CREATE TABLE IF NOT EXISTS cursors (
    reader TEXT NOT NULL,
    room TEXT NOT NULL,
    number INTEGER NOT NULL,        -- the number of the last message delivered
    PRIMARY KEY (reader, room)
) WITHOUT ROWID
"""

_logger = Logger()
_T = TypeVar("_T")


_Row = tuple[Any, ...]
_Heads = dict[str, tuple[int, str]]
"""The number and the timestamp of the newest message by room; 0 and "" if there was none."""
_NotReplaced = UnknownId | Forbidden | NotReplaceable
Outcome = tuple[int, bool | None] | _NotReplaced
"""The number of a post, and whether it is a retry (None: its label is new); or why it was not stored."""


class Commit(NamedTuple):
    """The effect of one transaction."""

    outcomes: Sequence[Outcome]
    """The outcome of each post in order."""
    entries: dict[str, list[Entry]]
    """The new entries by room."""
    firsts: dict[str, int]
    """The number of the oldest entry left, by room, in rooms that were trimmed."""


def _place(file: pathlib.Path) -> tuple[int, int] | None:
    """Return the device and the inode of a file; None if it is missing."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _entry(row: _Row) -> Entry:
    """Return the entry in a row of _SHOWN or _STORED."""
    entry = Entry(*row)
    return entry if row[-1] is None else entry._replace(extra=load_extra(row[-1]))


def _row(room: str, entry: Entry, label: str | None) -> tuple[int, _Row]:
    """Return the row of an entry, and which of _COLUMNS it has."""
    if entry.extra is not None:
        return 2, (room, *entry[:4], label, *entry[4:7], dump_extra(entry.extra))
    if entry.author is None and entry.replaces is None:
        return 0, (room, *entry[:4], label)
    return 1, (room, *entry[:4], label, *entry[4:7])


def _pieces(rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Split rows into pieces for one statement each: powers of two, so that few different statements are prepared."""
    done, size = 0, ROWS
    while done < len(rows):
        while size > len(rows) - done:
            size //= 2
        yield rows[done : done + size]
        done += size


def _lost(file: pathlib.Path) -> str:
    return f"{file} was removed, renamed or replaced: put it back, or restart the server"


class SqliteFile:
    """A log in one file.

    `now` returns the time in seconds since 1970, and `steady` seconds that pass evenly.
    """

    def __init__(
        self,
        path: pathlib.Path,
        retain: Retention,
        now: Callable[[], float],
        steady: Callable[[], float] | None = None,
    ) -> None:
        self.epoch = ""
        self.path = path
        self.writer: sqlite3.Connection
        self.reader: sqlite3.Connection
        self._retain = retain
        self._clock = LogClock(now, steady)
        self._file = self._wal = path
        """The paths of the file and of its write-ahead log, without symbolic links, which SQLite follows too."""
        self._places: dict[pathlib.Path, tuple[int, int] | None] = {}
        """The device and the inode of each file that is open."""
        self._misplaced = False
        """True if a file was not in its place when that was last looked at."""
        self._unseen = 0
        """The number of messages stored since the write-ahead log was last looked at."""
        self._wal_size = 0
        self._known: _Heads = {}
        """The heads of rooms that had a post, so that a commit need not read them; only this process writes."""
        self._unlogged = 0
        """The number of messages that trims, and commits because of an age, have removed since that was last logged."""
        self._descriptor: int
        """The open file, for what SQLite does not do.  Closing another one would release the locks of SQLite."""
        self._scrub_page, self._scrub_left = 1, 0
        """The page with which the search for copies of erased texts continues, and how many pages are left."""

    # Opening

    def open(self, seed: Sequence[Entry]) -> str | None:
        """Lock the file; if it is new, write an epoch and the seed in one transaction.  Begin to trim it.

        Returns the name after which the next step of `trim` begins; None if nothing is left to do.
        Raises StoreError if the folder cannot be written or another chatd uses the file under any name.  Raises it
        also if the file is no store, has several names, or has a format that this code cannot read.
        """
        if str(self.path) == ":memory:":  # SQLite would give each connection a database of its own
            raise StoreError(":memory: is not a file: to keep messages in memory, use --store memory:")
        try:
            with ExitStack() as opened:
                self._take_locks(opened)
                self.writer = self._connect(opened)
                self.epoch = self._check(seed)
                self.reader = self._connect(opened)
                files = self._file, self._wal, pathlib.Path(f"{self._file}-shm")
                self._places = {file: _place(file) for file in files}
                _, untrimmed = self.trim("")
                if self.writer.execute("SELECT 1 FROM messages WHERE replaces NOT NULL LIMIT 1").fetchone():
                    self.writer.executemany(_ERASE_EXTRA, self.writer.execute(_REMOVALS).fetchall())
                    self._scrub_all()  # a process that was killed may have removed something
                    self.erase()
                self._opened = opened.pop_all()
                return untrimmed
        except sqlite3.Error as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise StoreError(
                    f"{self.path} is not a chatd store ({error}): name another file with --store sqlite:PATH"
                ) from None
            raise StoreError(f"{self.path} cannot be opened ({error}): name another with --store sqlite:PATH") from None

    def close(self) -> None:
        """Erase what was removed a moment ago, close the connections and release the lock."""
        with self._opened, suppress(sqlite3.Error, OSError):
            self.erase()

    def _take_locks(self, opened: ExitStack) -> None:
        """Lock the file, and a file beside it that stays when scripts/restore replaces the store.

        SQLite holds its own locks only during transactions.  The locks end with the process, whatever ends it.
        """
        self._file = pathlib.Path(os.path.realpath(self.path))
        self._wal = pathlib.Path(f"{self._file}-wal")
        beside = pathlib.Path(f"{self._file}-lock")
        try:
            self._take_lock(beside, opened)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise StoreError(
                f"{beside if _place(beside) else self.path.parent} cannot be written ({error.strerror}): "
                f"{'create the folder' if missing else 'make it writable for this user'}, "
                "or name another file with --store sqlite:PATH"
            ) from None
        try:
            lock = self._descriptor = self._take_lock(self._file, opened)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be opened ({error.strerror}): name another with --store sqlite:PATH"
            ) from None
        names = os.fstat(lock).st_nlink
        if names > 1:
            raise StoreError(
                f"{self.path} has {names} names (hard links), and its write-ahead log belongs to one of them: "
                "remove the others, or name another file with --store sqlite:PATH"
            )

    def _take_lock(self, file: pathlib.Path, opened: ExitStack) -> int:
        """Lock a file, which only this user may read if it is new."""
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        opened.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{self.path} is in use by another chatd: stop that one, or name another file with --store sqlite:PATH"
            ) from None
        return lock

    def _connect(self, opened: ExitStack) -> sqlite3.Connection:
        # Each connection moves once, from the thread that opens it to the one thread that uses it.
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        opened.enter_context(closing(connection))
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA journal_size_limit={WAL_USUAL}")
        connection.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
        connection.execute("PRAGMA secure_delete=ON").fetchone()
        return connection

    def _check(self, seed: Sequence[Entry]) -> str:
        """Create or upgrade the tables as needed, and return the epoch."""
        db = self.writer
        application = self._pragma("application_id")
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        new = not application and not tables
        if not new and application != APPLICATION_ID:
            raise StoreError(f"{self.path} is not a chatd store: name another file with --store sqlite:PATH")
        if new:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # before anything else is written
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
            self._upgrade(written)
        db.execute(_SANCTIONS)
        return str(epoch)

    def _create(self, seed: Sequence[Entry]) -> None:
        db = self.writer
        db.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {_SCHEMA}")
        db.execute("INSERT INTO log VALUES (?, ?, ?)", (new_epoch(), FORMAT, READABLE_SINCE))
        db.execute(_LABELS)
        db.execute(_EDITS)
        rows: list[list[_Row]] = [[] for _ in _COLUMNS]
        for entry in seed:
            kind, row = _row(SEED_ROOM, entry, None)
            rows[kind].append(row)
        self._insert_all(rows)
        if seed:
            self._set_heads([(SEED_ROOM, seed[-1].number, seed[-1].timestamp)])
        db.execute("COMMIT")

    def _upgrade(self, written: int) -> None:
        """Upgrade a file of an older format."""
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            for statement in chain.from_iterable(_UPGRADES[number] for number in range(written + 1, FORMAT + 1)):
                db.execute(statement)
            db.execute("UPDATE log SET written = ?, readable_since = ?", (FORMAT, READABLE_SINCE))

    def usage(self) -> Mapping[str, int]:
        """Return the bytes of the file and its write-ahead log, and the free bytes; nothing if the disk fails."""
        try:
            disk = os.statvfs(self._file)
            wal = self._wal.stat().st_size
            size = self._file.stat().st_size + wal
        except OSError:
            return {}
        return {"bytes": size, "wal_bytes": wal, "free_bytes": disk.f_bavail * disk.f_frsize}

    # Health

    def probe(self) -> None:
        """Raise what a commit would raise; write to the file and sync it, without a change."""
        self._empty_wal()
        self._overwrite()
        disk = os.statvfs(self._file)
        if disk.f_bavail * disk.f_frsize < PROBE_BYTES:  # what was written may have taken no new space
            raise LogUnavailable("the disk is full")

    def _overwrite(self) -> None:
        """Commit a transaction without effect, which overwrites what is left of one that failed."""
        self.check_files()
        db = self.writer
        try:
            db.execute("BEGIN IMMEDIATE")
            for _ in range(2):  # SQLite writes no page that an update leaves unchanged
                db.execute("UPDATE log SET written = -written")
            db.execute("COMMIT")
        finally:
            self._roll_back()

    def _pragma(self, name: str) -> int:
        """Return a number that SQLite states about the file."""
        return int(self.writer.execute(f"PRAGMA {name}").fetchone()[0])

    def _roll_back(self) -> None:
        if self.writer.in_transaction:
            self.writer.execute("ROLLBACK")

    def check_files(self) -> None:
        """Raise LogUnavailable if a file is not in its place: whatever is written would be lost with it."""
        for file, place in self._places.items():
            if _place(file) != place:
                self._misplaced = True
                raise LogUnavailable(_lost(file))
        self._misplaced = False

    def _empty_wal(self) -> None:
        """Look at the files; raise LogUnavailable if the write-ahead log is too large and cannot be emptied."""
        self.check_files()
        self._unseen = 0
        before, self._wal_size = self._wal_size, self._wal.stat().st_size
        if self._wal_size <= WAL_USUAL:
            return
        self.checkpoint()
        self._wal_size = self._wal.stat().st_size
        grown = (
            f"{self._wal} has grown to {self._wal_size >> 20} MiB, because another program reads the store: "
            "end that program"
        )
        if self._wal_size > WAL_USUAL >= before:
            _logger.warn("{grown}", grown=grown)
        if self._wal_size > WAL_MOST:
            raise LogUnavailable(grown)

    def erase(self) -> bool:
        """Empty the write-ahead log, and look for copies of erased texts in a part of the file.

        Returns False if there is more to do, or if another program still reads what is in the log.
        """
        return self.checkpoint() and self._scrub()

    @property
    def erased(self) -> bool:
        """True if nothing was erased since the whole file was searched for copies."""
        return not self._scrub_left

    def checkpoint(self) -> bool:
        """Empty the write-ahead log; return False if another program still reads what is in it."""
        try:
            self.writer.execute("PRAGMA busy_timeout=0")
            busy, *_ = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            self.writer.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
        return not busy

    def _scrub_all(self) -> None:
        """Search the whole file for copies of erased texts, in the next calls of erase()."""
        self._scrub_left = self._pragma("page_count")

    def _scrub(self) -> bool:
        """Overwrite the copies in a part of the file; return True if none is left.

        The transaction keeps others from writing, and the write-ahead log is empty.  So the file holds the newest
        version of every page.  SQLite must forget the versions in its memory, which it would write again.
        """
        db = self.writer
        if self.erased:
            return True
        db.execute("PRAGMA shrink_memory")
        db.execute("BEGIN IMMEDIATE")
        try:
            if self._wal.stat().st_size:  # another program has written meanwhile
                return False
            size, pages = self._pragma("page_size"), self._pragma("page_count")
            if pages >= MOST_PAGES:  # the first byte of a page does not tell its kind
                _logger.warn("{file}: removed texts may stay in unused space until a VACUUM", file=self._file)
                self._scrub_left = 0
                return True
            self._scrub_some(size, pages)
        finally:
            self._roll_back()
        return self.erased

    def _scrub_some(self, size: int, pages: int) -> None:
        """Overwrite the copies in SCRUB_BYTES of the file, from the page on at which the last call stopped."""
        until = max(self._scrub_left - SCRUB_BYTES // size, 0)
        movable = self._pragma("auto_vacuum")
        found = False
        while self._scrub_left > until:
            if self._scrub_page >= pages:
                self._scrub_page = 1  # the first page, number 0 here, holds no text
            count = min(self._scrub_left - until, SCRUB_PIECE // size, pages - self._scrub_page)
            place = self._scrub_page * size
            for start, stop in stale_gaps(os.pread(self._descriptor, count * size, place), size):
                if movable and is_pointer_map((place + start) // size + 1, size):
                    continue
                os.pwrite(self._descriptor, bytes(stop - start), place + start)
                found = True
            self._scrub_page += count
            self._scrub_left -= count
        if found:
            os.fsync(self._descriptor)

    # Writing

    def commit(self, posts: Sequence[tuple[str, Post]]) -> Commit:
        """Number, stamp and store posts, each with its room, in one transaction.

        On an exception none is stored; after InDoubt, they may be.
        """
        db = self.writer
        if self._misplaced or self._unseen >= WAL_ROWS or self._wal_size > WAL_MOST:
            self._empty_wal()
        heads, self._known = self._known, {}  # forgotten if the transaction fails
        try:
            db.execute("BEGIN IMMEDIATE")
            commit, aged = self._store(posts, heads)
            self._end()
        finally:
            self._roll_back()
        if len(heads) <= KNOWN_HEADS:
            self._known = heads
        try:
            self.check_files()
        except LogUnavailable as error:
            raise InDoubt(str(error)) from None
        self._unseen += len(posts)
        self._unlogged += aged
        return commit

    def _end(self) -> None:
        """Commit the transaction; raise InDoubt if it failed, and it is not known whether it is on the disk."""
        try:
            self.writer.execute("COMMIT")
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:  # before the page that would have ended it
                raise
            try:
                self._roll_back()
                self._overwrite()
            except (sqlite3.Error, OSError, LogUnavailable):
                raise InDoubt(str(error)) from None
            raise

    def _store(self, posts: Sequence[tuple[str, Post]], heads: _Heads) -> tuple[Commit, int]:
        """Insert posts in the open transaction, and trim their rooms; return also how many messages age removed.

        `heads` holds those of some rooms before the transaction, and then those of all its rooms.
        """
        now = self._clock.read()
        entries: dict[str, list[Entry]] = {room: [] for room, _ in posts}
        heads |= self._heads([room for room in entries if room not in heads])
        outcomes: list[Outcome] = []
        rows: list[list[_Row]] = [[] for _ in _COLUMNS]
        labelled: dict[tuple[str, str, str], Entry] = {}
        """The labels of this batch that the table does not hold yet.  None of them belongs to a removal."""
        for room, post in posts:
            if post.label is not None:
                key = room, post.username, post.label
                stored = labelled.get(key) or self._labelled(*key)
                if stored is not None:
                    outcomes.append((stored.number, is_retry(post, stored, removal=self._is_removal(room, stored))))
                    continue
            head, stamped = heads[room]
            stamp = now.after(stamped)
            entry = Entry(head + 1, post.username, post.message, stamp, post.author, extra=post.extra)
            if post.replaces is not None:
                self._insert_all(rows)  # the post may replace one of them
                refused = self._edit(room, post, post.replaces, entry.number)
                if refused is not None:
                    outcomes.append(refused)
                    continue
                entry = entry._replace(replaces=post.replaces.number, removed=post.removed)
                if post.removed:
                    self._scrub_all()
            kind, row = _row(room, entry, post.label)
            rows[kind].append(row)
            if post.removed:
                self._insert_all(rows)
                labelled.clear()  # the table has them now, and the removal has erased some
            elif post.label is not None:
                labelled[key] = entry
            heads[room] = entry.number, stamp
            outcomes.append((entry.number, None))
            entries[room].append(entry)
        self._insert_all(rows)
        firsts, total = self._finish(entries)
        return Commit(outcomes, entries, firsts), total if self._retain.seconds else 0

    def _finish(self, entries: Mapping[str, Sequence[Entry]]) -> tuple[dict[str, int], int]:
        """Note the heads of rooms with new entries, and trim them; return their firsts and how many were removed."""
        self._set_heads([(room, new[-1].number, new[-1].timestamp) for room, new in entries.items() if new])
        firsts: dict[str, int] = {}
        total = 0
        for room, new in entries.items():
            removed = self._trim(room, REMOVED_ROWS) if new else 0
            if removed:
                total += removed
                firsts[room] = self._bounds(self.writer, room)[0]
        return firsts, total

    def _edit(self, room: str, post: Post, replaces: Id, number: int) -> _NotReplaced | None:
        """Mark the message that a post replaces, and erase it for a removal; return why that is refused, if it is."""
        epoch, original = replaces
        stored = self._find(f"{_STORED} AND number = ?", room, original) if epoch == self.epoch else None
        refused = why_not_replaceable(post, stored)
        if refused is None:
            db = self.writer
            if post.removed:
                for column in ("number", "replaces"):  # with OR between them, SQLite searches the whole room
                    erase = "UPDATE messages SET message = ?, removed = 1, extra = NULL WHERE room = ?"
                    db.execute(f"{erase} AND {column} = ?", (post.message, room, original))
            db.execute("UPDATE messages SET replaced = ? WHERE room = ? AND number = ?", (number, room, original))
        return refused

    def _labelled(self, room: str, username: str, label: str) -> Entry | None:
        """Return the message that has a label."""
        return self._find(f"{_STORED} AND username = ? AND label = ?", room, username, label)

    def _is_removal(self, room: str, stored: Entry) -> bool:
        """Return whether an entry is a removal: the last one that replaces its message, which erased the others."""
        if not stored.removed or stored.replaces is None:
            return False
        last = "SELECT max(number) FROM messages WHERE room = ? AND replaces = ?"
        (number,) = self.writer.execute(last, (room, stored.replaces)).fetchone()
        return bool(number == stored.number)

    def _find(self, query: str, *values: str | int) -> Entry | None:
        row = self.writer.execute(query, values).fetchone()
        return row and _entry(row)

    def _heads(self, rooms: Sequence[str]) -> _Heads:
        """Read the heads of rooms."""
        heads: _Heads = dict.fromkeys(rooms, (0, ""))
        for some in _pieces(rooms):
            names = ",".join("?" * len(some))
            found = self.writer.execute(f"SELECT name, head, stamped FROM rooms WHERE name IN ({names})", some)
            heads.update((name, (head, stamped)) for name, head, stamped in found)
        return heads

    def _set_heads(self, rows: Sequence[_Row]) -> None:
        """Note the newest message of each room: its name, the number and the timestamp."""
        raised = "ON CONFLICT DO UPDATE SET head = excluded.head, stamped = excluded.stamped"
        self._insert("rooms", ("name", "head", "stamped"), rows, raised)

    def _insert_all(self, rows: list[list[_Row]]) -> None:
        """Insert the rows of each kind, and clear the lists."""
        for columns, some in zip(_COLUMNS, rows, strict=True):
            self._insert("messages", columns, some)
            some.clear()

    def _insert(self, table: str, columns: Sequence[str], rows: Sequence[_Row], conflict: str = "") -> None:
        """Insert rows with few statements.

        One that fails rolls the whole transaction back, which ends in any case.  Otherwise SQLite would copy every
        page that a statement changes to a temporary file, to undo that statement alone.
        """
        row = f"({','.join('?' * len(columns))})"
        for some in _pieces(rows):
            values = ",".join([row] * len(some))
            self.writer.execute(
                f"INSERT OR ROLLBACK INTO {table} ({','.join(columns)}) VALUES {values} {conflict}",
                [*chain.from_iterable(some)],
            )

    def trim(self, place: str) -> tuple[dict[str, int], str | None]:
        """Remove what is no longer retained in some rooms after a name, which is empty at first.

        Returns the first number left in rooms that were trimmed, and the name after which the next step begins; None
        after the last one.
        """
        self._empty_wal()
        if self._retain == Retention():
            return {}, None
        firsts: dict[str, int] = {}
        left = REMOVED_ROWS
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            names = "SELECT name FROM rooms WHERE name > ? ORDER BY name LIMIT ?"
            rooms = db.execute(names, (place, TRIMMED_ROOMS)).fetchall()
            for (room,) in rooms:
                removed = self._trim(room, left)
                if removed:
                    firsts[room] = self._bounds(db, room)[0]
                    left -= removed
                    if left <= 0:  # the room may have more
                        break
                place = room
        self._unlogged += REMOVED_ROWS - left
        if left <= 0 or len(rooms) == TRIMMED_ROOMS:
            return firsts, place
        log_removed(self._unlogged)
        self._unlogged = 0
        return firsts, None

    def _trim(self, room: str, most: int) -> int:
        """Trim one room by a number of messages at most; return the number of messages removed."""
        db, retain = self.writer, self._retain
        last = 0
        if retain.messages:
            last = self._heads([room])[room][0] - retain.messages
        elif retain.seconds:
            last = self._last_old(room, retain.seconds)
        if last <= 0:
            return 0
        first, _ = self._bounds(db, room)
        if first > last:
            return 0
        last = min(last, first + most - 1)
        return db.execute("DELETE FROM messages WHERE room = ? AND number <= ?", (room, last)).rowcount

    def return_space(self) -> bool:
        """Return a part of the unused pages to the file system; return True if there are more.

        Files that older code made have no `auto_vacuum`, so SQLite cannot move their pages: they keep their size.
        """
        self._empty_wal()
        movable, pages, unused = (self._pragma(name) for name in ("auto_vacuum", "page_count", "freelist_count"))
        if not movable or not self.erased or unused <= pages * MOST_UNUSED:
            return False
        # A step of this statement moves one page, and execute() takes one step of what yields no columns.
        self.writer.executescript(f"PRAGMA incremental_vacuum({RETURNED_PAGES})")
        return True

    def _last_old(self, room: str, seconds: int) -> int:
        """Return the number of the last message that is too old, as `Ages.too_old` counts; 0 if all are kept."""
        db, ages = self.writer, self._clock.ages(seconds)
        if ages is None:
            return 0
        young = "SELECT number FROM messages WHERE room = ? AND timestamp BETWEEN ? AND ? ORDER BY number LIMIT 1"
        row = db.execute(young, (room, *ages)).fetchone()
        before = "SELECT max(number) FROM messages WHERE room = ? AND number < ? AND timestamp < ?"
        (last,) = db.execute(
            before, (room, row[0] if row else self._heads([room])[room][0] + 1, ages.oldest)
        ).fetchone()
        return last or 0

    # Moderation

    def sanctions(self) -> list[Sanction]:
        """Return the sanctions of the file."""
        return [load_sanction(text) for (text,) in self.writer.execute("SELECT sanction FROM sanctions ORDER BY rowid")]

    def add_sanction(self, sanction: Sanction) -> None:
        """Store a sanction."""
        self.check_files()
        text = dump_sanction(sanction).decode()
        self.writer.execute("INSERT OR REPLACE INTO sanctions (id, sanction) VALUES (?, ?)", (sanction.id, text))

    def remove_sanctions(self, words: Sequence[str]) -> None:
        """Remove the sanctions of these ids."""
        self.check_files()
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM sanctions WHERE id = ?", [(word,) for word in words])

    def clear(self, room: str, until: int | None) -> tuple[int, int, int]:
        """Remove the oldest messages of a room, up to a number and REMOVED_ROWS at most.

        Returns how many were removed, the number of the oldest one left, and the number itself, which is the head at
        first.
        """
        self._empty_wal()
        with self.writer as db:
            db.execute("BEGIN IMMEDIATE")
            first, head = self._bounds(db, room)
            until = head if until is None else until
            last = min(until, first + REMOVED_ROWS - 1)
            removed = db.execute("DELETE FROM messages WHERE room = ? AND number <= ?", (room, last)).rowcount
            if removed:
                self._scrub_all()
            return removed, self._bounds(db, room)[0], until

    def summaries(
        self, after: str, limit: int, wanted: Callable[[str], bool]
    ) -> tuple[Sequence[RoomSummary], str | None]:
        """Summarize at most `limit` of the wanted rooms that hold messages, among the next SCAN_ROOMS after a name.

        Returns the last name of these rooms too, unless there is no room after them.
        """
        rooms = "SELECT name, head, stamped FROM rooms WHERE name > ? ORDER BY name LIMIT ?"
        oldest = "SELECT min(number) FROM messages WHERE room = ?"
        sample = (
            "SELECT count(*), sum(length(CAST(username || message || ifnull(extra, '') AS BLOB))) FROM"
            " (SELECT username, message, extra FROM messages WHERE room = ? ORDER BY number DESC LIMIT ?)"
        )
        found: list[RoomSummary] = []
        with self.reader as db:
            db.execute("BEGIN")
            scanned = db.execute(rooms, (after, SCAN_ROOMS)).fetchall()
            for name, head, stamped in scanned:
                if len(found) == limit:
                    break
                (first,) = db.execute(oldest, (name,)).fetchone() if wanted(name) else (None,)
                if first is not None:
                    sampled, size = db.execute(sample, (name, SAMPLE)).fetchone()
                    found.append(RoomSummary(name, first, head, estimate(size, sampled, head - first + 1), stamped))
        return found, scanned[-1][0] if len(scanned) == SCAN_ROOMS else None

    # Cursors of readers outside

    def claim(self, reader: str) -> None:
        """Note a reader: a new one has all messages so far, and one of another epoch has none."""
        self.check_files()
        db = self.writer
        db.execute(_READERS)
        db.execute(_CURSORS)
        with db:
            db.execute("BEGIN IMMEDIATE")
            known = db.execute("SELECT epoch FROM readers WHERE name = ?", (reader,)).fetchone()
            if known is None:
                db.execute("INSERT INTO cursors SELECT ?, name, head FROM rooms", (reader,))
            elif known[0] != self.epoch:
                db.execute("DELETE FROM cursors WHERE reader = ?", (reader,))
            db.execute("INSERT OR REPLACE INTO readers VALUES (?, ?)", (reader, self.epoch))

    def advance(self, reader: str, cursors: Mapping[str, int]) -> None:
        """Move cursors.  The disk is not synced: after a power failure, some messages are delivered again."""
        self.check_files()
        db = self.writer
        db.execute("PRAGMA synchronous=NORMAL")
        try:
            with db:
                db.execute("BEGIN IMMEDIATE")
                rows = [(reader, room, number) for room, number in cursors.items()]
                db.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?)", rows)
        finally:
            db.execute("PRAGMA synchronous=FULL")

    def cursor(self, reader: str, room: str) -> int:
        """Return the number of the last message of a room that was delivered; 0 without one."""
        query = "SELECT number FROM cursors WHERE reader = ? AND room = ?"
        row = self.reader.execute(query, (reader, room)).fetchone()
        return int(row[0]) if row else 0

    def behind(self, reader: str, place: str) -> tuple[Sequence[Behind], str]:
        """Look for rooms with undelivered messages after a name; return them and the next name, "" at the end."""
        query = (
            "SELECT name, ifnull(number, 0), head FROM rooms LEFT JOIN cursors ON reader = ? AND room = name"
            " WHERE name > ? ORDER BY name LIMIT ?"
        )
        rows = self.reader.execute(query, (reader, place, SCANNED_ROOMS)).fetchall()
        found = [Behind(*row) for row in rows if row[2] > row[1]]
        return found, rows[-1][0] if len(rows) == SCANNED_ROOMS else ""

    # Reading

    def page(self, room: str, after: int | None, limit: int) -> Page:
        """Read a page from one snapshot: entries after a number, or the newest."""
        db = self.reader
        with db:
            db.execute("BEGIN")
            first, head = self._bounds(db, room)
            if after is None:
                rows = db.execute(f"{_SHOWN} ORDER BY number DESC LIMIT ?", (room, limit)).fetchall()[::-1]
            else:
                rows = db.execute(f"{_SHOWN} AND number > ? ORDER BY number LIMIT ?", (room, after, limit)).fetchall()
        return Page([*map(_entry, rows)], first, head)

    @staticmethod
    def _bounds(db: sqlite3.Connection, room: str) -> tuple[int, int]:
        """Return the numbers of the oldest message stored and of the newest ever appended."""
        query = (
            "SELECT coalesce((SELECT min(number) FROM messages WHERE room = name), head + 1), head"
            " FROM rooms WHERE name = ?"
        )
        first, head = db.execute(query, (room,)).fetchone() or (1, 0)
        return first, head
