"""The files of a SQLite store, as another process sees and changes them."""

import sqlite3
from contextlib import closing


def names(folder):
    """Return the names of the files in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def run_sql(path, *statements):
    """Run statements as another process would; return the rows of the last one."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements][-1]
