"""A disk under SQLite that fails to write or to sync, as disks do: what was written before stays.

The functions of SQLite's own file system (https://sqlite.org/vfs.html) are replaced while the test runs.  This works
where Python uses the SQLite library of the system, and not where it carries its own.
"""

import contextlib
import ctypes
import pathlib
import sqlite3

import pytest

Write = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
Open = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
METHODS = 19
"""The number of words in sqlite3_io_methods: its version, and its functions."""
WRITE, SYNC = 3, 5
"""The places of xWrite and xSync among them."""
_KEPT = []
"""The objects that open files refer to.  Files may outlive the test, and so must these."""


class FileSystem(ctypes.Structure):
    """The first fields of sqlite3_vfs."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("file_size", ctypes.c_int),
        ("longest_path", ctypes.c_int),
        ("following", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("open", ctypes.c_void_p),
    )


class FailingDisk:
    """Fails the next `failures` syncs of a write-ahead log, and, with an `error`, all but the next `writes` writes."""

    def __init__(self):
        self.failures = 0
        self.writes = 0
        self.error = None

    def _opened(self, file):
        """Replace functions of a file that was opened."""
        methods = ctypes.cast(file, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
        words = (ctypes.c_void_p * METHODS)(*methods.contents[:METHODS])
        write, sync = Write(words[WRITE]), Sync(words[SYNC])

        def failing_write(file, data, size, offset):
            if self.error is not None:
                if not self.writes:
                    return self.error
                self.writes -= 1
            return write(file, data, size, offset)

        def failing_sync(file, flags):
            if self.failures:
                self.failures -= 1
                return sqlite3.SQLITE_IOERR_FSYNC
            return sync(file, flags)

        replaced = Write(failing_write), Sync(failing_sync)
        words[WRITE], words[SYNC] = (ctypes.cast(one, ctypes.c_void_p).value for one in replaced)
        methods[0] = ctypes.cast(words, ctypes.POINTER(ctypes.c_void_p))
        _KEPT.extend((words, replaced))

    @contextlib.contextmanager
    def installed(self, library):
        """Stand under SQLite until the end of the context."""
        library.sqlite3_vfs_find.restype = ctypes.POINTER(FileSystem)
        system = library.sqlite3_vfs_find(None).contents
        original = system.open
        open_file = Open(original)

        def opening(vfs, name, file, flags, out):
            result = open_file(vfs, name, file, flags, out)  # SQLite keeps the pointer to the name
            if result == 0 and name and ctypes.string_at(name).endswith(b"-wal"):
                self._opened(file)
            return result

        replaced = Open(opening)
        _KEPT.append(replaced)
        system.open = ctypes.cast(replaced, ctypes.c_void_p).value
        try:
            yield self
        finally:
            system.open = original


def system_sqlite():
    """Return the library that Python's sqlite3 uses; skip the test if Python carries its own."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libsqlite3.so.0")
        library.sqlite3_sourceid.restype = ctypes.c_char_p
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            (used,) = db.execute("SELECT sqlite_source_id()").fetchone()
        if (
            library.sqlite3_sourceid().decode() == used
            and "libsqlite3.so" in pathlib.Path("/proc/self/maps").read_text()
        ):
            return library
    pytest.skip("Python carries a SQLite of its own")
