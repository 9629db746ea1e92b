"""What scripts/backup and scripts/restore have in common: copying a store's file, and knowing what is in it.

A store is a SQLite file in which a server may be writing.  The copy is made from one snapshot: in write-ahead logging a
reader's transaction keeps what it began with, and stops no writer.  Without that transaction, SQLite would begin
the copy anew at each commit of the server's, and on a busy server never come to an end.

Only the standard library is used, so that any Python will do.
"""
# ruff: noqa: INP001 -- what is beside a script is imported by its name

import argparse
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

APPLICATION_ID: Final = 0x63686174
"""That of chatd.store.sqlite."""
PAGES: Final = 1000
"""How many pages are copied at a time: 4 MB, a few milliseconds."""


class StoreFault(Exception):
    """It cannot be done; the text is one line that says why, and what helps."""


class Contents(NamedTuple):
    """What is in a store."""

    epoch: str
    readable_since: int
    rooms: int
    messages: int

    def __str__(self) -> str:
        return f"messages: {self.messages}, rooms: {self.rooms}"


def copy(source: pathlib.Path, target: pathlib.Path) -> Contents:
    """Copy a store as it is at this moment to a file that is not there yet; answers what is in the copy, found whole.

    Raises StoreFault when it is no store, or damaged.
    """
    try:
        with closing(connect(source)) as db, closing(sqlite3.connect(target, isolation_level=None)) as copied:
            db.execute("BEGIN")
            if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                raise StoreFault(f"{source} is no chatd store: name another file")
            copied.execute("PRAGMA synchronous=OFF")  # it is synced once, when it is whole
            db.backup(copied, pages=PAGES, progress=lambda _, left, all_: tell(f"{100 * (all_ - left) // all_} %"))
            copied.execute("PRAGMA journal_mode=DELETE")  # so that it is one file, also for who only reads it
            tell("verifying")
            faults = copied.execute("PRAGMA integrity_check(1)").fetchone()
            if faults != ("ok",):
                raise StoreFault(f"{source} is damaged ({' '.join(faults[0].split())}): take another")
            counts = "(SELECT count(*) FROM rooms), (SELECT count(*) FROM messages)"
            return Contents(*copied.execute(f"SELECT epoch, readable_since, {counts} FROM log").fetchone())  # noqa: S608
    except sqlite3.Error as error:
        raise StoreFault(
            f"{source} cannot be copied ({error}): see that it is a chatd store, and that there is room"
        ) from None
    finally:
        tell("")


def connect(path: pathlib.Path) -> sqlite3.Connection:
    """Open a SQLite file that is there."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None)


@contextmanager
def beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Lend the name of a file in the same file system; what is there in the end, however it comes, is removed."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise StoreFault(f"{path.parent} cannot be written ({error.strerror}): make it, or make it writable") from None
    with folder as name:
        yield pathlib.Path(name, path.name)


def put(file: pathlib.Path, place: pathlib.Path) -> None:
    """Give a file its place, at once and for good."""
    for path in (file, file.parent):
        sync(path)
    file.replace(place)
    sync(place.parent)


def sync(path: pathlib.Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def tell(progress: str) -> None:
    """Show, to who sits at a terminal, how far it is."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{progress}")
        sys.stderr.flush()


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--force", action="store_true", help="replace what is there")
        self.add_argument("--json", action="store_true", help="say what was done as one JSON object")

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise StoreFault(f"{message}: see --help")


def run(name: str, main: Callable[[], str]) -> None:
    """Do a script's work and print what it says; a fault is one line and the status 1, and leaves no copy behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(main())  # noqa: T201 -- a script prints
    except StoreFault as fault:
        sys.exit(f"{name}: {fault}")
    except OSError as error:
        sys.exit(f"{name}: {error.filename} cannot be used ({error.strerror}): see that it is there, and yours")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted, and nothing was replaced")
