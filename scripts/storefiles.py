"""The shared parts of scripts/backup and scripts/restore: copy a store's file, and read its contents.

A store is a SQLite file that a server may be writing to.  The copy is made in one transaction: in write-ahead logging
mode a reader keeps its snapshot and blocks no writer.  Without the transaction, SQLite would restart
the copy after each commit, and would never finish on a busy server.

Only the standard library is used, so that any Python can run it.
"""
# ruff: noqa: INP001 -- scripts import this module from their own folder

import argparse
import contextlib
import datetime as dt
import fcntl
import os
import pathlib
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Final, NamedTuple, NoReturn
from urllib.parse import quote

from started import StartedParser

APPLICATION_ID: Final = 0x63686174
"""As in chatd.store.sqlite_file."""
PAGES: Final = 1000
"""Pages copied per step: 4 MB, a few milliseconds."""
SIDE_FILES: Final = "-wal", "-shm", "-journal"
"""The endings of files that SQLite applies to the store beside which they stand."""


class StoreFault(Exception):
    """The script cannot do its work; the text is one line with the reason and the remedy."""


class Contents(NamedTuple):
    """A summary of a store."""

    epoch: str
    readable_since: int
    rooms: int
    messages: int

    def __str__(self) -> str:
        return f"messages: {self.messages}, rooms: {self.rooms}"


def copy(source: pathlib.Path, target: pathlib.Path) -> Contents:
    """Copy a store to a file that does not exist yet, and verify the copy; return its contents.

    Raises StoreFault if the source is no store, or is damaged.
    """
    if source.exists() and source.stat().st_nlink > 1:
        raise StoreFault(
            f"{source} has several names (hard links), and only one has its write-ahead log: remove the other names"
        )
    try:
        with closing(connect(source)) as db, closing(sqlite3.connect(target, isolation_level=None)) as copied:
            db.execute("BEGIN")
            if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                raise StoreFault(f"{source} is not a chatd store: name another file")
            copied.execute("PRAGMA synchronous=OFF")  # put() syncs it once, when it is complete
            db.backup(copied, pages=PAGES, progress=lambda _, left, all_: show(f"{100 * (all_ - left) // all_} %"))
            copied.execute("PRAGMA journal_mode=DELETE")  # one file, even for readers without write permission
            show("verifying")
            faults = copied.execute("PRAGMA integrity_check(1)").fetchone()
            if faults != ("ok",):
                raise StoreFault(f"{source} is damaged ({' '.join(faults[0].split())}): take another")
            return contents_of(copied)
    except sqlite3.Error as error:
        raise StoreFault(
            f"{source} cannot be copied ({error}): check that it is a chatd store, and that the disk has space"
        ) from None
    finally:
        show("")


def contents_of(db: sqlite3.Connection) -> Contents:
    """Summarize an open store."""
    counts = "(SELECT count(*) FROM rooms), (SELECT count(*) FROM messages)"
    return Contents(*db.execute(f"SELECT epoch, readable_since, {counts} FROM log").fetchone())  # noqa: S608


def connect(path: pathlib.Path) -> sqlite3.Connection:
    """Open an existing SQLite file."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None)


@contextmanager
def beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Lend the name of a temporary file in the same file system, and remove that file in any case."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise StoreFault(f"{path.parent} cannot be written ({error.strerror}): make it, or make it writable") from None
    with folder as name:
        yield pathlib.Path(name, path.name)


def put(file: pathlib.Path, place: pathlib.Path, contents: Contents) -> None:
    """Rename a file to its final name, atomically and durably, and verify that it has these contents there."""
    for path in (file, file.parent):
        sync(path)
    file.replace(place)
    sync(place.parent)
    try:
        with closing(connect(place)) as db:
            found = contents_of(db)
    except sqlite3.Error as error:
        raise StoreFault(f"{place} cannot be read after it was written ({error}): remove it, and try again") from None
    if found != contents:
        raise StoreFault(
            f"{place} does not hold what was written to it: remove it and the files beside it, and try again"
        )


def put_aside(path: pathlib.Path, why: str) -> str | None:
    """Rename the files of a store, so that SQLite does not apply its log to another file; return the new name.

    The main file is renamed first: after an interruption no store is left without its log.
    """
    aside = f"{path}.before-{why}-{dt.datetime.now(dt.timezone.utc):%Y%m%dT%H%M%S.%fZ}"  # noqa: UP017 -- old Pythons
    found = None
    for suffix in ("", *SIDE_FILES):
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")  # noqa: PTH104 -- these are names, not paths
            found = aside
    return found


@contextmanager
def unused(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a file, so that no server uses it meanwhile under any name; a missing file has none."""
    with contextlib.ExitStack() as held:
        if path.exists():
            lock = held.enter_context(path.open("rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreFault(f"{path} is in use by a chatd: stop it, or name another file") from None
        yield


def sync(path: pathlib.Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def show(progress: str) -> None:
    """Show the progress on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{progress}")
        sys.stderr.flush()


class FileParser(StartedParser):
    """A parser that reports errors in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--force", action="store_true", help="replace an existing file")
        self.add_argument("--json", action="store_true", help="print the result as one JSON object")

    def error(self, message: str) -> NoReturn:
        """Reject the command line."""
        raise StoreFault(f"{message}: see --help")


def run(name: str, main: Callable[[], str]) -> None:
    """Run a script and print its result; a fault is one line and status 1, and leaves no copy behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(main())  # noqa: T201 -- a script prints
    except StoreFault as fault:
        sys.exit(f"{name}: {fault}")
    except OSError as error:
        sys.exit(f"{name}: {error.filename} cannot be used ({error.strerror}): check that it exists and is readable")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted, and nothing was replaced")
