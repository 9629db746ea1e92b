import fcntl
import os
import pathlib
import queue
import shutil
import sqlite3
import threading
from contextlib import closing
from functools import partial

import pytest
from support.failing_disk import FailingDisk, system_sqlite
from support.helpers import HeldWorker, ImmediateWorker, ManualTime, RecordingFollower, RecordingPoster, result_of
from support.store_contract import SEED, ClockContract, DurableStoreContract, EditContract, ExtraContract, GuardContract
from support.store_files import run_sql
from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import REMOVED, Id, Post
from chatd.room.log import InDoubt, LabelReused, LogUnavailable, Page
from chatd.room.moderation import Sanction
from chatd.store import sqlite, sqlite_file
from chatd.store.base import DAY, STEADY_SECONDS, Retention, StoreError
from chatd.store.sqlite import CLOSE_FILE_SECONDS, DISK_LOOK_SECONDS, SqliteStore, ThreadWorker
from chatd.store.sqlite_file import APPLICATION_ID, FORMAT, ROWS, SqliteFile

ALL = Retention()


class TestSqliteStore(ClockContract, EditContract, ExtraContract, GuardContract, DurableStoreContract):
    worker = ImmediateWorker

    @pytest.fixture
    def paths(self):
        """The file of each store."""
        return {}

    @pytest.fixture
    def make(self, tmp_path, paths):
        return lambda retain, now: self.build(tmp_path / f"{len(paths)}.sqlite", retain, now, paths)

    @pytest.fixture
    def again(self, paths):
        return lambda store, retain, now: self.build(paths[store], retain, now, paths)

    def build(self, path, retain, now, paths):
        store = SqliteStore(path, retain, now, self.worker(), self.worker(), clock=Clock(), steady=now.steady)
        paths[store] = path
        return store


class TestSqliteStoreInBatches(TestSqliteStore):
    gathers = True

    @pytest.fixture(autouse=True)
    def workers(self):
        self.asked = []

    def worker(self):
        self.asked.append(HeldWorker())
        return self.asked[-1]

    def wait(self, deferred):
        while any(worker.held for worker in self.asked):
            for worker in self.asked:
                worker.run_all()
        return super().wait(deferred)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.sqlite"


class Connections(list):
    """All connections, oldest first; an open store has made two."""

    @property
    def writer(self):
        """The newest store's connection for writing."""
        return self[-2]

    @property
    def reader(self):
        """The newest store's connection for reading."""
        return self[-1]


@pytest.fixture
def connections(monkeypatch):
    made, connect = Connections(), sqlite3.connect

    def noted_connect(*args, **options):
        made.append(connect(*args, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noted_connect)
    return made


@pytest.fixture
def opened(path, connections):
    """A function that opens stores; they are closed after the test, which may leave no connection and no lock."""
    stores, paths = [], set()

    def build(where=path, *, retain=ALL, now=None, writer=None, reader=None, seed=(), clock=None):
        paths.add(where)
        writer, reader, now = writer or ImmediateWorker(), reader or ImmediateWorker(), now or ManualTime()
        store = SqliteStore(where, retain, now, writer, reader, clock=clock or Clock(), steady=now.steady)
        store.open(seed)
        stores.append((store, writer))
        return store

    yield build
    for store, writer in stores:
        if writer.running:
            closed = store.close()
            if isinstance(writer, HeldWorker):
                writer.run_all()
            result_of(closed)
    for connection in connections:
        with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
            connection.execute("SELECT 1")
    for where in paths:
        lock = where.with_name(f"{where.name}-lock")
        if lock.exists():
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def post(store, *texts, room="main", label=None, poster=None):
    """Post texts; return their poster."""
    poster = poster or RecordingPoster()
    for text in texts:
        store.append(room, Post("ann", text, label), poster)
    return poster


def page(store, room="main", after=None, limit=10_000):
    return result_of(store.read(room, after, limit))


def texts(store, room="main"):
    return [entry.message for entry in page(store, room).entries]


def copy_of(path, folder):
    """Copy the files as the next process would find them if this one were killed now."""
    folder.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        if not file.name.endswith(("-lock", "-shm")):
            shutil.copy(file, folder)
    return folder / path.name


# Durability


def test_log_outlives_the_process(opened):
    store = opened(seed=SEED)
    post(store, "one", "two")
    post(store, "else", room="other")
    epoch, before = store.epoch, page(store)
    result_of(store.close())
    again = opened(seed=SEED)
    assert again.epoch == epoch
    assert page(again) == before
    assert post(again, "three").numbers == [5]
    assert post(again, "else", room="other").numbers == [2]


def test_timestamps_after_a_restart(opened):
    """A clock that was set back a little between two processes does not move the timestamps of a room back."""
    now = ManualTime()
    store = opened(now=now)
    post(store, "one")
    result_of(store.close())
    now.advance(-30)
    store = opened(now=now)
    post(store, "two")
    post(store, "two", room="other")
    assert page(store).entries[-1].timestamp == "2026-01-01T00:00:00.000Z"
    assert page(store, "other").entries[-1].timestamp == "2025-12-31T23:59:30.000Z"


def test_numbers_after_a_trim_and_a_restart(opened):
    now = ManualTime()
    store = opened(retain=Retention(seconds=DAY), now=now)
    post(store, "one", "two")
    result_of(store.close())
    now.advance(2 * DAY)
    store = opened(retain=Retention(seconds=DAY), now=now)
    now.advance(STEADY_SECONDS)
    result_of(store.trim())
    assert page(store) == Page([], first=3, head=2)
    assert post(store, "three").numbers == [3]


def test_opening_trims(opened):
    """An opening removes the messages above the number that is retained, and logs how many."""
    store = opened()
    post(store, "one", "two", "three", "four")
    post(store, "one", "two", "three", room="other")
    result_of(store.close())
    with capturedLogs() as events:
        store = opened(retain=Retention(messages=2))
    assert texts(store) == ["three", "four"]
    assert [formatEvent(event) for event in events] == ["3 messages removed that --retain no longer keeps"]


def test_opening_trims_in_steps(opened, monkeypatch):
    """An opening takes one step; posts are stored between the others."""
    monkeypatch.setattr(sqlite_file, "REMOVED_ROWS", 3)
    monkeypatch.setattr(sqlite_file, "TRIMMED_ROOMS", 2)
    store = opened()
    for room in "abcd":
        post(store, *"vwxyz", room=room)
    result_of(store.close())
    with capturedLogs() as events:
        store, follower = opened(retain=Retention(messages=1), writer=(writer := HeldWorker())), RecordingFollower()
        store.follow(follower)
        assert texts(store, "a") == ["y", "z"]
        writer.run()
        poster = post(store, "new", room="d")
        writer.run_all()
    assert poster.numbers == [6]
    assert [texts(store, room) for room in "abcd"] == [["z"], ["z"], ["z"], ["new"]]
    assert [event[2] for event in follower.events if event[:2] == ("trimmed", "b")] == [3, 5]
    assert [formatEvent(event) for event in events] == ["14 messages removed that --retain no longer keeps"]


def test_file_shrinks_after_a_trim(opened, path, monkeypatch):
    """Unused pages return to the file system in steps; a part stays for later messages."""
    monkeypatch.setattr(sqlite_file, "RETURNED_PAGES", 3)
    store = opened()
    post(store, *["x" * 400] * 1000)
    result_of(store.close())
    size = path.stat().st_size
    store = opened(retain=Retention(messages=100), writer=(writer := HeldWorker()))
    assert path.stat().st_size == size
    trimmed = store.trim()
    writer.run()
    poster = post(store, "between")
    writer.run_all()
    assert result_of(trimmed) is None
    assert poster.numbers == [1001]
    closed = store.close()
    writer.run_all()
    result_of(closed)
    assert path.stat().st_size < 0.3 * size
    assert run_sql(path, "PRAGMA integrity_check") == [("ok",)]


def test_large_wal_is_emptied_during_a_trim(opened, path, monkeypatch):
    """The write-ahead log stays small, however many messages go."""
    monkeypatch.setattr(sqlite_file, "WAL_USUAL", 1 << 16)
    monkeypatch.setattr(sqlite_file, "REMOVED_ROWS", 50)
    store = opened()
    post(store, *["x" * 400] * 3000)
    result_of(store.close())
    store = opened(retain=Retention(messages=1), writer=(writer := HeldWorker()))
    sizes = []
    while writer.held:
        writer.run()
        sizes.append(path.with_name(f"{path.name}-wal").stat().st_size)
    assert len(sizes) > 50
    assert max(sizes) < 1 << 18
    assert texts(store) == ["x" * 400]


def instructions(connections, work):
    """Run a function; return the number of instructions that the newest store's two connections execute."""
    ran = []
    for set_handler in (connections.writer.set_progress_handler, connections.reader.set_progress_handler):
        set_handler(lambda: ran.append(1), 1)
    work()
    for set_handler in (connections.writer.set_progress_handler, connections.reader.set_progress_handler):
        set_handler(None, 1)
    return len(ran)


def test_work_does_not_grow_with_the_room(opened, tmp_path, connections):
    """SQLite finds everything by an index."""
    costs = []
    for size in (300, 10_000):
        store = opened(tmp_path / f"{size}.sqlite", retain=Retention(messages=size))
        store.file.commit([("main", Post("ann", "hi", None, "a"))] * size)
        original = Id(store.epoch, 200)
        posts = [
            Post("ann", "hi", "again", "a"),
            Post("ann", "hi", "again", "a"),
            Post("ann", "new", None, "a", original),
            Post("ann", REMOVED, None, "a", original, removed=True),
        ]
        works = [partial(store.append, "main", one, RecordingPoster()) for one in posts]
        works += [partial(page, store, after=after, limit=10) for after in (None, 250)]
        works += [partial(store.list_rooms, "", 10), store.trim]
        costs.append([instructions(connections, work) for work in works])
    few, many = costs
    assert all(few)
    assert [more <= less + 50 for less, more in zip(few, many, strict=True)] == [True] * len(few), costs


def test_start_in_2099_removes_nothing(opened):
    """A start with a wrong clock removes no message by its age while the clock can be corrected."""
    now = ManualTime()
    store = opened(retain=Retention(seconds=30 * DAY), now=now)
    post(store, "one", "two")
    result_of(store.close())
    now.jump(73 * 365 * DAY)
    store = opened(retain=Retention(seconds=30 * DAY), now=now)
    post(store, "three")
    now.advance(STEADY_SECONDS - 1)
    result_of(store.trim())
    now.jump(-73 * 365 * DAY)
    post(store, "four")
    now.advance(STEADY_SECONDS)
    result_of(store.trim())
    assert texts(store) == ["one", "two", "three", "four"]


def test_notified_messages_are_on_disk(opened, path, tmp_path):
    """Followers and posters are notified only after the commit."""

    class Killing(RecordingPoster, RecordingFollower):
        def appended(self, room, entries):
            super().appended(room, entries)
            copy_of(path, tmp_path / "followed")

        def posted(self, post, number, *, duplicate=False):
            super().posted(post, number, duplicate=duplicate)
            copy_of(path, tmp_path / "posted")

    store, witness = opened(), Killing()
    store.follow(witness)
    post(store, "hi", poster=witness)
    assert [event[0] for event in witness.events] == ["appended", "posted"]
    for folder in ("followed", "posted"):
        survivor = opened(tmp_path / folder / path.name)
        assert survivor.epoch == store.epoch
        assert page(survivor) == page(store)


# The seed


def test_seed_is_written_once(opened):
    result_of(opened(seed=SEED).close())
    assert page(opened(seed=SEED)) == Page([*SEED], first=1, head=2)


@pytest.mark.parametrize("posts", [0, 1])
def test_seed_is_not_written_again_after_a_trim(opened, posts):
    now = ManualTime()
    store = opened(retain=Retention(seconds=DAY), seed=SEED, now=now)
    now.advance(STEADY_SECONDS)
    post(store, *["hi"] * posts)
    result_of(store.trim())
    result_of(store.close())
    store = opened(seed=SEED)
    assert texts(store) == ["hi"] * posts
    assert page(store)[1:] == (3, 2 + posts)


def test_no_seed_for_an_existing_log(opened):
    result_of(opened().close())
    assert page(opened(seed=SEED)) == Page([], first=1, head=0)


def watch(monkeypatch, prepare):
    """Call a function with each new connection."""
    connect = sqlite3.connect

    def watched_connect(*args, **options):
        connection = connect(*args, **options)
        prepare(connection)
        return connection

    monkeypatch.setattr(sqlite3, "connect", watched_connect)


def copies_of(path, folder, monkeypatch, work):
    """Copy the files before each statement that some work runs; return the copies."""
    copies = []
    with monkeypatch.context() as patch:
        watch(
            patch,
            lambda connection: connection.set_trace_callback(
                lambda _: copies.append(copy_of(path, folder / f"{len(copies)}"))
            ),
        )
        work()
    return copies


def test_crash_during_creation(opened, path, tmp_path, monkeypatch):
    """Whatever statement the crash precedes, the next process finds the whole log or none."""
    stores = []
    copies = copies_of(path, tmp_path, monkeypatch, lambda: stores.append(opened(seed=SEED)))
    assert len(copies) > 10
    known = [None]
    for where in copies:
        store = opened(where, seed=SEED)
        assert page(store) == Page([*SEED], first=1, head=2)
        known.append(store.epoch == stores[0].epoch)
    assert known[1:] == sorted(known[1:])
    assert {*known[1:]} == {False, True}


@pytest.mark.parametrize("table", ["log", "messages", "rooms"])
def test_fault_during_creation_leaves_no_log(opened, monkeypatch, table):
    def deny(action, name, *_):
        denied = action == sqlite3.SQLITE_INSERT and name == table
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    with monkeypatch.context() as patch:
        watch(patch, lambda connection: connection.set_authorizer(deny))
        with pytest.raises(StoreError, match="not authorized"):
            opened(seed=SEED)
    assert page(opened(seed=SEED)) == Page([*SEED], first=1, head=2)


# Group commit


def test_notifications_wait_for_the_commit(opened):
    writer = HeldWorker()
    store, follower = opened(writer=writer), RecordingFollower()
    store.follow(follower)
    poster = post(store, "one")
    assert (follower.events, poster.events, texts(store)) == ([], [], [])
    writer.run()
    assert [event[0] for event in follower.events] == ["appended"]
    assert poster.numbers == [1]


def test_group_commit(opened, connections):
    """Posts that arrive during a commit share the next one."""
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    post(store, "two", "three", poster=poster)
    post(store, "else", room="other", poster=poster)
    assert len(writer.held) == 1
    writer.run()
    assert poster.numbers == [1]
    assert len(writer.held) == 1  # the next commit begins at once
    commits = []
    connections.writer.set_trace_callback(commits.append)
    writer.run()
    assert commits.count("COMMIT") == 1
    assert poster.numbers == [1, 2, 3, 1]
    assert not writer.held
    assert texts(store) == ["one", "two", "three"]


def test_batch_notifies_room_by_room(opened):
    writer = HeldWorker()
    store, follower = opened(writer=writer, retain=Retention(messages=2)), RecordingFollower()
    store.follow(follower)
    poster = post(store, "first", room="c")
    for room in "abababa":
        post(store, room, room=room, poster=poster)
    writer.run_all()
    notified = [(event, room, what if event == "trimmed" else what.number) for event, room, what in follower.events]
    assert [event for event in notified if event[1] == "a"] == [("appended", "a", n) for n in (1, 2, 3, 4)] + [
        ("trimmed", "a", 3)
    ]
    assert [event for event in notified if event[1] == "b"] == [("appended", "b", n) for n in (1, 2, 3)] + [
        ("trimmed", "b", 2)
    ]
    assert poster.numbers == [1, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("size", "statements"), [(1, 1), (2, 1), (3, 2), (ROWS - 1, 8), (ROWS, 1), (ROWS + 1, 2), (600, 5), (1000, 7)]
)
def test_batch_uses_few_statements(opened, size, statements, connections):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "before", *map(str, range(size)))
    writer.run()
    ran = []
    connections.writer.set_trace_callback(ran.append)
    writer.run()
    assert poster.numbers == [*range(1, size + 2)]
    assert [(entry.number, entry.message) for entry in page(store).entries] == [
        (1, "before"),
        *((number + 2, str(number)) for number in range(size)),
    ]
    assert (
        len([statement for statement in ran if statement.startswith("INSERT OR ROLLBACK INTO messages")]) == statements
    )


@pytest.mark.parametrize(("limit", "reads"), [(2, 2), (1, 4)])
def test_heads_are_read_once(opened, connections, monkeypatch, limit, reads):
    """A commit reads the heads of rooms that are new to it; those of too many rooms are forgotten."""
    monkeypatch.setattr(sqlite_file, "KNOWN_HEADS", limit)
    store = opened()
    ran = []
    connections.writer.set_trace_callback(ran.append)
    numbers = [post(store, "text", room=room).numbers for room in ("a", "b", "a", "b")]
    assert numbers == [[1], [1], [2], [2]]
    assert len([statement for statement in ran if statement.startswith("SELECT name, head")]) == reads


def test_too_many_pending_posts(opened, monkeypatch, disk):
    monkeypatch.setattr(sqlite, "MAX_PENDING", 2)
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one", "two", "three", "four")  # the first is being committed, two wait
    assert poster.refusals == ["too many posts wait for the disk"]
    assert poster.events[0][1] == Post("ann", "four")
    writer.run_all()
    assert poster.numbers == [1, 2, 3]
    assert post(store, "five").refusals == []
    writer.run_all()
    assert texts(store) == ["one", "two", "three", "five"]


def test_limit_of_pending_posts():
    assert sqlite.MAX_PENDING == 10_000


def test_connections_use_wal_and_full_sync(opened, connections):
    opened()
    for connection in connections:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_failing_follower_is_logged(opened):
    class Failing(RecordingFollower):
        def appended(self, room, entries):
            if entries[0].number == 1:
                raise ZeroDivisionError

    store = opened()
    store.follow(Failing())
    with capturedLogs() as events:
        post(store, "one")
    assert [event["log_format"] for event in events] == ["a follower or poster failed"]
    assert events[0]["log_failure"].type is ZeroDivisionError
    assert post(store, "two").numbers == [2]
    result_of(store.settled())


# Failing commits


@pytest.fixture
def disk(connections):
    """A disk that the test can fill."""

    class Disk:
        @staticmethod
        def fill():
            connections.writer.execute("PRAGMA max_page_count = 1")  # SQLite takes this as the current size

        @staticmethod
        def clear():
            connections.writer.execute("PRAGMA max_page_count = 1000000")

    return Disk


def test_failed_batch_is_rolled_back(opened, disk):
    writer = HeldWorker()
    store, follower = opened(writer=writer), RecordingFollower()
    store.follow(follower)
    first = post(store, "one")
    poster = post(store, *["x" * 500] * 99)
    post(store, "else", room="other", poster=poster)
    writer.run()
    assert first.numbers == [1]
    disk.fill()
    with capturedLogs() as events:
        writer.run()
    assert poster.numbers == []
    assert poster.refusals == ["database or disk is full"] * 100
    assert [event[1].message for event in poster.events] == ["x" * 500] * 99 + ["else"]
    assert [formatEvent(event) for event in events] == ["100 posts were not stored: database or disk is full"]
    # No follower was notified, nothing was stored, and older entries can be read.
    assert len(follower.events) == 1
    assert texts(store) == ["one"]
    assert page(store, "other") == Page([], first=1, head=0)
    # With free space again, posting continues with the next number.
    disk.clear()
    poster = post(store, "two", "three")
    writer.run_all()
    assert poster.numbers == [2, 3]
    assert texts(store) == ["one", "two", "three"]


def test_full_disk(opened, disk):
    store = opened()
    disk.fill()
    poster = RecordingPoster()
    while not poster.refusals:
        post(store, "x" * 500, poster=poster)
    kept = len(poster.numbers)
    assert poster.numbers == [*range(1, kept + 1)]
    assert page(store).head == len(page(store).entries) == kept
    disk.clear()
    assert post(store, "more").numbers == [kept + 1]


def test_locked_file(opened, path, connections):
    store = opened()
    connections.writer.execute("PRAGMA busy_timeout = 0")
    post(store, "one")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert post(store, "two").refusals == ["database is locked"]
        assert texts(store) == ["one"]  # reads do not wait for the lock
        other.execute("ROLLBACK")
    assert post(store, "three").numbers == [2]


def test_unreadable_log(opened, path):
    store = opened()
    run_sql(path, "DROP TABLE messages")
    for after in (None, 5):
        with pytest.raises(LogUnavailable, match="no such table: messages"):
            page(store, after=after)


def test_read_is_one_transaction(opened, connections):
    store = opened(seed=SEED)
    ran = []
    connections.reader.set_trace_callback(ran.append)
    page(store)
    page(store, after=1)
    assert [statement for statement in ran if not statement.strip().startswith("SELECT")] == ["BEGIN", "COMMIT"] * 2
    assert not connections.reader.in_transaction


def test_failed_trim_is_rolled_back(opened, path):
    now = ManualTime()
    store, follower = opened(retain=Retention(seconds=DAY), now=now), RecordingFollower()
    for room in "ab":
        post(store, "one", room=room)
    store.follow(follower)
    now.advance(2 * DAY)
    run_sql(path, "CREATE TRIGGER t BEFORE DELETE ON messages WHEN old.room = 'b' BEGIN SELECT RAISE(ABORT, 'no'); END")
    with capturedLogs() as events:
        result_of(store.trim())
    assert [formatEvent(event) for event in events] == ["old messages were not removed: no"]
    # Room a is rolled back too: otherwise its followers would never learn of the trim.
    assert follower.events == []
    assert [texts(store, room) for room in "ab"] == [["one"], ["one"]]
    run_sql(path, "DROP TRIGGER t")
    result_of(store.trim())
    assert sorted(follower.events) == [("trimmed", "a", 2), ("trimmed", "b", 2)]
    assert post(store, "two", room="a").numbers == [2]


# Faults and size


def test_no_fault(opened):
    store = opened(seed=SEED)
    assert store.fault is None
    post(store, "one")
    page(store)
    result_of(store.trim())
    assert store.fault is None


def test_fault_until_a_commit_succeeds(opened, disk):
    store = opened()
    disk.fill()
    assert store.fault is None, "which is not known before it is tried"
    while not post(store, "x" * 500).refusals:
        assert store.fault is None
    assert store.fault == "the log cannot be written: database or disk is full"
    page(store)
    assert store.fault == "the log cannot be written: database or disk is full"
    disk.clear()
    post(store, "one")
    assert store.fault is None


def test_fault_is_set_before_the_posters_are_notified(opened, connections):
    heard = []

    class Asking(RecordingPoster):
        def posted(self, post, number, *, duplicate=False):
            heard.append(store.fault)

        def refused(self, post, error):
            heard.append(store.fault)

    store = opened()
    connections.writer.execute("PRAGMA query_only = 1")
    post(store, "one", poster=Asking())
    connections.writer.execute("PRAGMA query_only = 0")
    post(store, "two", poster=Asking())
    assert heard == ["the log cannot be written: attempt to write a readonly database", None]


def test_fault_until_a_read_succeeds(opened, path):
    store = opened()
    run_sql(path, "ALTER TABLE messages RENAME TO elsewhere")
    with pytest.raises(LogUnavailable):
        page(store)
    assert store.fault == "the log cannot be read: no such table: messages"
    assert post(store, "one").refusals
    assert store.fault == (
        "the log cannot be read: no such table: messages; the log cannot be written: no such table: messages"
    )
    run_sql(path, "ALTER TABLE elsewhere RENAME TO messages")
    page(store)
    assert store.fault == "the log cannot be written: no such table: messages"
    post(store, "one")
    assert store.fault is None


def test_too_many_pending_posts_are_no_fault(opened, monkeypatch):
    monkeypatch.setattr(sqlite, "MAX_PENDING", 1)
    writer = HeldWorker()
    store = opened(writer=writer)
    assert post(store, "one", "two", "three").refusals
    assert store.fault is None


def test_usage_counts_files_and_free_space(opened, path):
    store = opened()
    before = store.usage()
    assert before.keys() == {"bytes", "free_bytes", "wal_bytes"}
    assert before["bytes"] >= path.stat().st_size > 0
    assert before["free_bytes"] > 0
    post(store, *["x" * 500] * 50)
    assert store.usage()["bytes"] >= before["bytes"] + 50 * 500, "the write-ahead log is counted"


def test_usage_of_a_broken_disk(opened, monkeypatch):
    def broken(path):
        raise OSError

    store = opened()
    monkeypatch.setattr(os, "statvfs", broken)
    assert store.usage() == {}


# Files that cannot be opened


def refused(opened, where):
    """Return why the store cannot be opened: one line that names the file and the remedy."""
    with pytest.raises(StoreError) as error:
        opened(where, seed=SEED)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith((str(where), str(where.parent)))
    assert "--store sqlite:PATH" in line or "run that version again" in line
    return line.removeprefix(str(where))


@pytest.mark.parametrize("text", ["hi\n", "This is a letter to my aunt.\n" * 1000])
def test_open_text_file(opened, path, text):
    path.write_text(text)
    assert refused(opened, path) == (
        " is not a chatd store (file is not a database): name another file with --store sqlite:PATH"
    )
    assert path.read_text() == text


@pytest.mark.parametrize("application", [0, 0x0F055112])
def test_open_foreign_database(opened, path, application):
    run_sql(path, f"PRAGMA application_id = {application}", "CREATE TABLE log (line TEXT)")
    before = path.read_bytes()
    assert refused(opened, path) == " is not a chatd store: name another file with --store sqlite:PATH"
    assert path.read_bytes() == before  # including the journal mode
    assert not path.with_name("chat.sqlite-wal").exists()


def test_open_database_without_tables(opened, path):
    run_sql(path, f"PRAGMA application_id = {APPLICATION_ID}")
    assert refused(opened, path) == (" cannot be opened (no such table: log): name another with --store sqlite:PATH")


def test_open_damaged_file(opened, path):
    result_of(opened(seed=SEED).close())
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 400)
    assert refused(opened, path).startswith(" is not a chatd store (")


def test_open_empty_file(opened, path):
    path.touch()
    assert page(opened(seed=SEED)) == Page([*SEED], first=1, head=2)


def test_open_memory(opened, tmp_path, monkeypatch):
    """`sqlite::memory:` is refused, and the option that keeps messages in memory is named."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"^:memory: is not a file: to keep messages in memory, use --store memory:$"):
        opened(pathlib.Path(":memory:"))
    assert [*tmp_path.iterdir()] == []


def test_open_with_a_name_that_is_too_long(tmp_path):
    """A name that pathlib raises for is refused in one line too, as a closed folder is."""
    file = SqliteFile(tmp_path / ("x" * 255), Retention(), ManualTime())
    with pytest.raises(StoreError, match=r"^\S+ cannot be written \(File name too long\): .* --store sqlite:PATH$"):
        file.open(SEED)


def test_open_folder(opened, path):
    path.mkdir()
    assert refused(opened, path).startswith(" cannot be opened (Is a directory): ")


def test_open_in_missing_folder(opened, tmp_path):
    assert refused(opened, tmp_path / "none" / "chat.sqlite") == (
        f"{tmp_path / 'none'} cannot be written (No such file or directory): "
        "create the folder, or name another file with --store sqlite:PATH"
    )
    assert not (tmp_path / "none").exists()


def test_open_below_a_file(opened, path):
    path.touch()
    assert " cannot be written (Not a directory): " in refused(opened, path / "chat.sqlite")


def test_open_without_permission(opened, path, monkeypatch):
    """The line names the folder, or the lock that another user left."""

    # Simulated, because root may write everywhere.
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    def reason():
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", forbidden)
            return refused(opened, path)

    assert reason().startswith(f"{path.parent} cannot be written (Permission denied): make it writable for this user, ")
    path.with_name(f"{path.name}-lock").touch()  # as another user leaves it
    assert reason().startswith("-lock cannot be written (Permission denied): make it writable for this user, ")


def test_open_a_log_in_use(opened, path):
    """The second process is refused, and the first continues."""
    store = opened()
    assert refused(opened, path) == (
        " is in use by another chatd: stop that one, or name another file with --store sqlite:PATH"
    )
    assert post(store, "hi").numbers == [1]
    result_of(store.close())
    assert texts(opened()) == ["hi"]


def test_refused_lock_is_closed(opened, path, monkeypatch):
    opened()
    files, open_file = [], os.open

    def noted(*args):
        files.append(open_file(*args))
        return files[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noted)
        refused(opened, path)
    assert len(files) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(files[0])


def test_failed_opening_releases_the_lock(opened, path):
    path.write_text("hello")
    refused(opened, path)
    path.unlink()
    opened()


# Formats


def test_new_log_states_its_format(opened, path):
    opened()
    assert run_sql(path, "SELECT written, readable_since FROM log") == [(FORMAT, sqlite_file.READABLE_SINCE)]
    assert run_sql(path, "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert APPLICATION_ID.to_bytes(4, "big") == b"chat"


def test_unreadable_format_is_refused(opened, path):
    result_of(opened(seed=SEED).close())
    run_sql(path, f"UPDATE log SET written = {FORMAT + 7}, readable_since = {FORMAT + 1}")
    assert refused(opened, path) == (
        f" was written by a newer chatd, in format {FORMAT + 7}, which format {FORMAT} cannot read: "
        "run that version again"
    )
    assert run_sql(path, "SELECT written, readable_since FROM log") == [(FORMAT + 7, FORMAT + 1)]


def test_newer_format_that_stays_readable(opened, path):
    """Older code uses a log with newer columns and tables, and keeps them."""
    store = opened(seed=SEED)
    epoch = store.epoch
    result_of(store.close())
    run_sql(
        path,
        f"UPDATE log SET written = {FORMAT + 5}",
        "ALTER TABLE log ADD COLUMN region TEXT NOT NULL DEFAULT 'here'",
        "ALTER TABLE rooms ADD COLUMN topic TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE messages ADD COLUMN reply_to INTEGER",
        "ALTER TABLE messages ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0",
        "CREATE TABLE bans (room TEXT, username TEXT)",
        "UPDATE messages SET reply_to = 1 WHERE number = 2",
        "INSERT INTO bans VALUES ('main', 'mallory')",
    )
    store = opened(retain=Retention(messages=4), seed=SEED)
    assert store.epoch == epoch
    assert page(store) == Page([*SEED], first=1, head=2)
    assert post(store, "three", "four", "five").numbers == [3, 4, 5]
    assert post(store, "else", room="other").numbers == [1]
    result_of(store.trim())
    assert texts(store) == ["Hi Alice!", "three", "four", "five"]
    assert [entry.number for entry in page(store, after=3).entries] == [4, 5]
    result_of(store.close())
    assert texts(opened()) == ["Hi Alice!", "three", "four", "five"]
    # The newer code finds its own columns and tables again.
    assert run_sql(path, "SELECT written, readable_since, region FROM log") == [(FORMAT + 5, 1, "here")]
    assert run_sql(path, "SELECT * FROM bans") == [("main", "mallory")]
    assert run_sql(path, "SELECT reply_to, pinned FROM messages WHERE number IN (2, 5) ORDER BY number") == [
        (1, 0),
        (None, 0),
    ]


FORMAT_1 = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA journal_mode = WAL;
CREATE TABLE log (epoch TEXT NOT NULL, written INTEGER NOT NULL, readable_since INTEGER NOT NULL);
CREATE TABLE rooms (name TEXT PRIMARY KEY, head INTEGER NOT NULL, stamped TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE messages (
    room TEXT NOT NULL,
    number INTEGER NOT NULL,
    username TEXT NOT NULL,
    message TEXT NOT NULL,
    timestamp TEXT NOT NULL,
    PRIMARY KEY (room, number)
) WITHOUT ROWID;
INSERT INTO log VALUES ('k7Q2xe', 1, 1);
INSERT INTO rooms VALUES ('main', 2, '2024-10-20T12:31:00Z'), ('trimmed', 7, '2024-10-20T12:30:00Z');
INSERT INTO messages VALUES
    ('main', 1, 'Alice', 'Hello!', '2024-10-20T12:30:00Z'),
    ('main', 2, 'Bob', 'Hi Alice!', '2024-10-20T12:31:00Z');
"""
"""A log as chatd wrote it before labels existed, with the messages of SEED."""


@pytest.fixture
def old(path):
    """The path of a log of format 1."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(FORMAT_1)
    return path


def columns(path):
    """Return name, type, nullability, default and key of the columns of the table messages."""
    return [column[1:] for column in run_sql(path, "PRAGMA table_info(messages)")]


def test_format_1_is_upgraded(opened, old):
    store = opened(seed=[SEED[0]] * 5)
    assert store.epoch == "k7Q2xe"
    assert page(store) == Page([*SEED], first=1, head=2)
    assert page(store, "trimmed") == Page([], first=8, head=7)
    assert run_sql(old, "SELECT * FROM log") == [("k7Q2xe", FORMAT, 1)]
    assert run_sql(old, "SELECT label, author, replaces FROM messages") == [(None,) * 3] * 2


def test_upgraded_log_equals_a_new_one(opened, old, tmp_path):
    opened()
    opened(tmp_path / "new.sqlite")
    assert columns(old) == columns(tmp_path / "new.sqlite")
    indexes = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql NOT NULL"
    assert run_sql(old, indexes) == run_sql(tmp_path / "new.sqlite", indexes)
    assert [name for name, _ in run_sql(old, indexes)] == ["labels", "edits"]
    assert run_sql(old, "PRAGMA integrity_check") == [("ok",)]


def test_labels_in_an_upgraded_log(opened, old):
    for number in (3, 4, 5):
        store = opened()
        assert post(store, f"new {number}", label=f"l{number}").events[0][::2] == ("posted", number)
        assert post(store, "new 3", label="l3").events[0][::2] == ("duplicate", 3)
        result_of(store.close())
    assert run_sql(old, "SELECT number, label FROM messages") == [(1, None), (2, None), (3, "l3"), (4, "l4"), (5, "l5")]


def test_upgrade_then_trim(opened, old):
    assert page(opened(retain=Retention(messages=1))) == Page([SEED[1]], first=2, head=2)


def test_old_file_keeps_its_size(opened, old):
    """SQLite cannot move pages in it; the trim goes on without that."""
    store = opened(retain=Retention(messages=1))
    post(store, *["x" * 400] * 1000)
    size = old.stat().st_size
    result_of(store.trim())
    assert store.fault is None
    assert old.stat().st_size >= size
    assert texts(store) == ["x" * 400]


def test_failed_upgrade_is_rolled_back(opened, old):
    # The index is created after the column, so its failure must undo the column.
    run_sql(old, "CREATE INDEX labels ON rooms (head)")
    before = columns(old)
    assert refused(opened, old).startswith(" cannot be opened (index labels already exists)")
    assert columns(old) == before
    assert run_sql(old, "SELECT * FROM log") == [("k7Q2xe", 1, 1)]
    run_sql(old, "DROP INDEX labels")
    assert page(opened()) == Page([*SEED], first=1, head=2)


def test_crash_during_the_upgrade(opened, old, tmp_path, monkeypatch):
    """The crash leaves either the old format or the new one, whole."""
    copies = copies_of(old, tmp_path, monkeypatch, lambda: result_of(opened().close()))
    assert len(copies) > 5
    written = []
    for where in copies:
        written += run_sql(where, "SELECT written FROM log")
        assert ("label" in [column[0] for column in columns(where)]) == (written[-1] == (FORMAT,))
        survivor = opened(where)
        assert survivor.epoch == "k7Q2xe"
        assert page(survivor) == Page([*SEED], first=1, head=2)
        assert post(survivor, "hi", "hi", label="l").numbers == [3]
    assert written == sorted(written)
    assert {*written} == {(1,), (FORMAT,)}


def test_rollback_to_format_1(opened, old):
    """Code of format 1 reads and writes an upgraded log."""
    store = opened()
    post(store, "three", label="l3")
    result_of(store.close())
    assert run_sql(old, "SELECT readable_since FROM log") == [(1,)]  # old code checks this
    run_sql(
        old,
        "INSERT INTO messages (room, number, username, message, timestamp) VALUES"
        " ('main', 4, 'ann', 'same', '2026-01-01T00:00:00.000Z'),"
        " ('main', 5, 'ann', 'same', '2026-01-01T00:00:00.000Z')",
        "INSERT INTO rooms (name, head, stamped) VALUES ('main', 5, '2026-01-01T00:00:00.000Z')"
        " ON CONFLICT DO UPDATE SET head = excluded.head, stamped = excluded.stamped",
        "DELETE FROM messages WHERE room = 'main' AND number <= 2",
    )
    store = opened()
    assert texts(store) == ["three", "same", "same"]
    assert post(store, "three", label="l3").events[0][::2] == ("duplicate", 3)
    assert post(store, "same", label="l6").numbers == [6]


def test_format_1_keeps_what_newer_code_stated(opened, old, monkeypatch):
    result_of(opened().close())
    assert run_sql(old, "SELECT written, readable_since FROM log") == [(FORMAT, 1)]
    monkeypatch.setattr(sqlite_file, "FORMAT", 1)
    assert page(opened()) == Page([*SEED], first=1, head=2)  # after a rollback
    assert run_sql(old, "SELECT written, readable_since FROM log") == [(FORMAT, 1)]


def test_current_format():
    assert (FORMAT, sqlite_file.READABLE_SINCE) == (4, 1)


# Labels


def test_label_lookup_uses_the_index(opened, path, connections):
    store = opened()
    ran = []
    connections.writer.set_trace_callback(ran.append)
    post(store, "hi", label="l")
    (lookup,) = [statement for statement in ran if statement.strip().startswith("SELECT") and "label" in statement]
    for _, _, _, step in run_sql(path, f"EXPLAIN QUERY PLAN {lookup}"):
        assert "INDEX labels (room=? AND username=? AND label=?)" in step


def test_index_holds_labels_only(opened, path):
    opened()
    ((sql,),) = run_sql(path, "SELECT sql FROM sqlite_schema WHERE name = 'labels'")
    assert sql.startswith("CREATE UNIQUE INDEX labels ON messages ")
    assert sql.endswith(" WHERE label IS NOT NULL")


def test_index_is_unique(opened, path):
    store = opened()
    post(store, "hi", label="l")
    columns = "username, message, timestamp, label"
    twice = f"INSERT INTO messages (room, number, {columns}) SELECT room, number + 1, {columns} FROM messages"
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE constraint failed"):
        run_sql(path, twice)
    run_sql(path, "UPDATE messages SET label = NULL", twice)


def test_no_lookup_without_a_label(opened, connections):
    store = opened()
    ran = []
    connections.writer.set_trace_callback(ran.append)
    post(store, "hi")
    assert not [statement for statement in ran if statement.startswith("SELECT") and "label" in statement]


def test_duplicate_writes_nothing(opened, connections):
    store = opened(retain=Retention(messages=5))
    post(store, "hi", label="l")
    before = connections.writer.total_changes
    assert post(store, "hi", label="l").events[0][::2] == ("duplicate", 1)
    assert isinstance(post(store, "else", label="l").events[0][2], LabelReused)
    assert connections.writer.total_changes == before


def test_duplicate_is_answered_after_the_commit(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    before = post(store, "before")
    poster = post(store, "hi", "hi", "else", label="l")
    writer.run()
    assert before.numbers == [1]
    assert poster.events == []
    writer.run()
    assert [event[0] for event in poster.events] == ["posted", "duplicate", "refused"]


def test_acknowledged_labels_are_on_disk(opened, path, tmp_path):
    class Killing(RecordingPoster):
        def posted(self, post, number, *, duplicate=False):
            super().posted(post, number, duplicate=duplicate)
            copy_of(path, tmp_path / f"killed-{len(self.events)}")

    store = opened()
    poster = post(store, "hi", "hi", label="l", poster=Killing())
    assert [event[0] for event in poster.events] == ["posted", "duplicate"]
    for number in (1, 2):
        survivor = opened(tmp_path / f"killed-{number}" / path.name)
        assert post(survivor, "hi", label="l").events[0][::2] == ("duplicate", 1)
        assert texts(survivor) == ["hi"]


def test_failed_post_leaves_no_label(opened, disk):
    writer = HeldWorker()
    store, follower = opened(writer=writer), RecordingFollower()
    store.follow(follower)
    post(store, "before")
    poster = post(store, *["x" * 500] * 99)
    post(store, "hi", "hi", "else", label="l", poster=poster)
    writer.run()
    disk.fill()
    with capturedLogs():
        writer.run()
    assert poster.refusals == ["database or disk is full"] * 102
    assert {type(event[2]) for event in poster.events} == {LogUnavailable}  # not LabelReused: the first was not stored
    disk.clear()
    # The label is free, for the same post and for any other.
    retried = post(store, "else", "else", "hi", label="l")
    writer.run_all()
    assert [event[0] for event in retried.events] == ["posted", "duplicate", "refused"]
    assert retried.numbers == [2]
    assert isinstance(retried.events[2][2], LabelReused)
    assert texts(store) == ["before", "else"]
    assert [event[2].number for event in follower.events] == [1, 2]


def test_refused_post_leaves_no_label(opened, monkeypatch, disk):
    monkeypatch.setattr(sqlite, "MAX_PENDING", 1)
    writer = HeldWorker()
    store = opened(writer=writer)
    post(store, "one", "two")
    assert post(store, "hi", label="l").refusals == ["too many posts wait for the disk"]
    writer.run_all()
    poster = post(store, "hi", label="l")
    writer.run_all()
    assert poster.numbers == [3]


def test_duplicate_on_a_full_disk(opened, disk):
    store = opened()
    post(store, "hi", label="l")
    disk.fill()
    poster = RecordingPoster()
    while not poster.refusals:
        post(store, "x" * 500, poster=poster)
    assert post(store, "hi", label="l").events[0][::2] == ("duplicate", 1)


# Settling and closing


def test_idle_log_is_settled(opened):
    assert result_of(opened(writer=HeldWorker()).settled()) is None


def test_settled_ignores_later_posts(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    settled = [store.settled(), store.settled()]
    post(store, "two", poster=poster)
    writer.run()
    assert poster.numbers == [1]
    assert [result_of(one) for one in settled] == [None, None]
    assert not store.settled().called
    writer.run()
    assert poster.numbers == [1, 2]
    assert result_of(store.settled()) is None


def test_settled_waits_for_the_next_batch(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    post(store, "two", poster=poster)
    settled = store.settled()
    post(store, "three", poster=poster)  # in the same batch
    writer.run()
    assert poster.numbers == [1]
    post(store, "four", poster=poster)
    assert not settled.called
    writer.run()
    assert poster.numbers == [1, 2, 3]
    assert result_of(settled) is None


def test_settled_fires_under_constant_load(opened):
    # Each stored message triggers the next post.
    class Eager(RecordingPoster):
        def posted(self, sent, number, *, duplicate=False):
            super().posted(sent, number, duplicate=duplicate)
            if number < 20:
                post(store, f"{number + 1}", poster=self)

    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "1", poster=Eager())
    for number in range(1, 20):
        settled = store.settled()
        assert not settled.called
        writer.run()
        assert settled.called
        assert poster.numbers == [*range(1, number + 1)]


def test_settled_fires_last(opened):
    writer, notified = HeldWorker(), []
    store = opened(writer=writer)
    store.follow(RecordingFollower(notified))
    post(store, "one", poster=RecordingPoster(notified))
    store.settled().addCallback(lambda _: notified.append(("settled",)))
    writer.run()
    assert [event[0] for event in notified] == ["appended", "posted", "settled"]


def test_post_from_settled(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    store.settled().addCallback(lambda _: post(store, "two", poster=poster))
    writer.run()
    settled = store.settled()
    assert not settled.called
    writer.run()
    assert settled.called
    assert poster.numbers == [1, 2]


def test_refused_posts_are_settled(opened, path):
    writer = HeldWorker()
    store = opened(writer=writer)
    run_sql(path, "DROP TABLE messages")
    poster = post(store, "one")
    settled = store.settled()
    writer.run()
    assert poster.refusals == ["no such table: messages"]
    assert result_of(settled) is None


def test_close_waits_and_stops_the_workers(opened):
    writer, reader = HeldWorker(), ImmediateWorker()
    store = opened(writer=writer, reader=reader)
    poster = post(store, "one", "two")
    closed = store.close()
    writer.run()
    assert writer.running
    writer.run()
    assert poster.numbers == [1, 2]
    writer.run_all()
    assert result_of(closed) is None
    assert not writer.running
    assert not reader.running
    assert texts(opened()) == ["one", "two"]


def test_close_waits_for_later_posts(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    closed = []
    store.close().addCallback(closed.append)
    post(store, "two", poster=poster)
    writer.run()
    post(store, "three", poster=poster)
    writer.run()
    writer.run()
    assert closed == []
    assert writer.running
    writer.run_all()
    assert closed == [None]
    assert poster.numbers == [1, 2, 3]
    assert not writer.running
    assert texts(opened()) == ["one", "two", "three"]


def test_close_answers_reads_and_trims(opened):
    writer, reader = HeldWorker(), HeldWorker()
    store = opened(writer=writer, reader=reader, seed=SEED)
    reading, trimming = store.read("main", None, 10), store.trim()
    closed = store.close()
    reader.run_all()
    writer.run_all()
    result_of(closed)
    assert result_of(reading).head == 2
    assert result_of(trimming) is None


def test_failed_opening_starts_no_workers(opened, path, disk):
    path.write_text("hello")
    writer, reader = ImmediateWorker(), ImmediateWorker()
    with pytest.raises(StoreError):
        opened(writer=writer, reader=reader)
    assert not writer.running
    assert not reader.running


# Abandoning


IN_DOUBT = "the disk has not answered"


@pytest.fixture
def stuck(opened):
    """A store whose disk does not answer, with one post being committed and two waiting, and their poster."""
    writer = HeldWorker()
    store, follower, poster = opened(writer=writer), RecordingFollower(), RecordingPoster()
    store.follow(follower)
    for text in ("one", "two", "three"):
        post(store, text, label=text, poster=poster)
    assert len(writer.held) == 1
    return store, writer, follower, poster


def test_abandon_refuses_in_order(stuck, disk):
    store, _, follower, poster = stuck
    with capturedLogs() as events:
        store.abandon()
        store.abandon()
    assert [(what, post.message, type(error)) for what, post, error in poster.events] == [
        ("refused", text, InDoubt) for text in ("one", "two", "three")
    ]
    assert poster.refusals == [IN_DOUBT] * 3
    assert follower.events == []
    assert [formatEvent(event) for event in events] == ["3 posts abandoned: the disk has not answered"]


def test_abandoned_commit_notifies_followers(stuck):
    """A commit in progress continues: followers are notified, the abandoned posters are not."""
    store, writer, follower, poster = stuck
    store.abandon()
    writer.run_all()
    assert [event[2].message for event in follower.events] == ["one"]
    assert texts(store) == ["one"], "what waited for the next commit is dropped"
    assert poster.refusals == [IN_DOUBT] * 3
    assert poster.numbers == []
    assert store.fault is None


def test_abandoned_posts_are_retried(stuck):
    store, writer, follower, _ = stuck
    store.abandon()
    again = RecordingPoster()
    for text in ("one", "two"):
        post(store, text, label=text, poster=again)  # during the commit
    writer.run()
    assert again.events == []
    writer.run_all()
    post(store, "three", label="three", poster=again)
    writer.run_all()
    assert [(what, number) for what, _, number in again.events] == [("duplicate", 1), ("posted", 2), ("posted", 3)]
    assert texts(store) == ["one", "two", "three"]
    assert [event[2].number for event in follower.events] == [1, 2, 3]


def test_settled_after_abandon(opened):
    """Callers of settled() wait for the commit in progress and no longer."""
    writer = HeldWorker()
    store = opened(writer=writer)
    post(store, "one")
    settled = [store.settled()]
    post(store, "two")
    settled += [store.settled(), store.settled()]
    store.abandon()
    settled.append(store.settled())
    assert not any(one.called for one in settled)
    writer.run()
    assert [result_of(one) for one in settled] == [None] * 4
    assert not writer.held
    assert result_of(store.settled()) is None


def test_settled_waits_for_posts_after_abandon(opened):
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one", "two")
    early = store.settled()
    store.abandon()
    post(store, "three", poster=poster)
    late = store.settled()
    writer.run()
    assert not late.called
    assert poster.numbers == []
    writer.run()
    assert [result_of(one) for one in (early, late)] == [None, None]
    assert poster.numbers == [2]
    assert texts(store) == ["one", "three"]


def test_abandoned_commit_fails(stuck, path):
    """Abandoned posters are refused once, and the fault is noted."""
    store, writer, follower, poster = stuck
    settled = store.settled()
    store.abandon()
    run_sql(path, "ALTER TABLE messages RENAME TO elsewhere")
    writer.run()
    assert poster.refusals == [IN_DOUBT] * 3
    assert follower.events == []
    assert store.fault == "the log cannot be written: no such table: messages"
    assert result_of(settled) is None
    run_sql(path, "ALTER TABLE elsewhere RENAME TO messages")
    assert post(store, "more", poster=poster) is poster
    writer.run()
    assert poster.numbers == [1]
    assert store.fault is None


def test_post_from_the_callback_of_abandon(opened):
    class Stubborn(RecordingPoster):
        def refused(self, post, error):
            super().refused(post, error)
            store.append("main", post, self)

    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one", label="a", poster=Stubborn())
    store.abandon()
    writer.run_all()
    assert [event[0] for event in poster.events] == ["refused", "duplicate"]
    assert texts(store) == ["one"]


def test_abandoned_posts_free_their_places(opened, monkeypatch):
    monkeypatch.setattr(sqlite, "MAX_PENDING", 2)
    writer = HeldWorker()
    store = opened(writer=writer)
    post(store, "one", "two", "three")
    store.abandon()
    poster = post(store, "four", "five")
    writer.run_all()
    assert poster.numbers == [2, 3]


def test_abandon_without_posts_is_silent(opened):
    store = opened()
    poster = post(store, "one")
    with capturedLogs() as events:
        store.abandon()
    assert events == []
    assert poster.refusals == []
    assert post(store, "two").numbers == [2]


def test_close_waits_for_the_abandoned_commit(stuck, opened):
    store, writer, _, poster = stuck
    store.abandon()
    closed = store.close()
    writer.run()
    assert writer.running
    writer.run_all()
    assert result_of(closed) is None
    assert not writer.running
    assert poster.numbers == []
    assert texts(opened()) == ["one"]


# Commits in doubt


@pytest.fixture
def failing_sync():
    """A disk under SQLite whose syncs of the write-ahead log the test can let fail."""
    with FailingDisk().installed(system_sqlite()) as disk:
        yield disk


def test_failed_sync_stores_nothing(opened, path, tmp_path, failing_sync):
    """A post that is answered as not stored is not in the log that a kill leaves."""
    store = opened()
    post(store, "one")
    failing_sync.failures = 1
    poster = post(store, "two", label="l")
    assert [(what, type(error)) for what, _, error in poster.events] == [("refused", LogUnavailable)]
    assert poster.refusals == ["disk I/O error"]
    assert texts(opened(copy_of(path, tmp_path / "killed"))) == ["one"]
    assert post(store, "two", label="l").events[0][::2] == ("posted", 2)
    assert texts(store) == ["one", "two"]


def test_failed_sync_leaves_a_post_behind(opened, path, tmp_path, failing_sync):
    """A kill after a failed sync brings the post back, unless another commit overwrites it."""
    store = opened()

    def deny(action, name, *_):
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_UPDATE and name == "log" else sqlite3.SQLITE_OK

    failing_sync.failures = 1
    store.file.writer.set_authorizer(deny)  # so that nothing overwrites it
    assert [type(event[2]) for event in post(store, "one", label="l").events] == [InDoubt]
    assert texts(store) == []
    survivor = opened(copy_of(path, tmp_path / "killed"))
    assert texts(survivor) == ["one"]
    assert post(survivor, "one", label="l").events[0][::2] == ("duplicate", 1)
    assert post(store, "one", label="l").numbers == [1]
    assert texts(opened(copy_of(path, tmp_path / "later"))) == ["one"]


def test_failed_sync_on_a_failing_disk_is_in_doubt(opened, path, tmp_path, failing_sync):
    """While syncs fail, a power failure may bring back a post, and its poster learns that; the next commit ends it."""
    store, follower = opened(), RecordingFollower()
    store.follow(follower)
    post(store, "one")
    failing_sync.failures = 1000
    with capturedLogs() as events:
        poster = post(store, "two", label="l")
    assert [(what, type(error)) for what, _, error in poster.events] == [("refused", InDoubt)]
    assert [formatEvent(event) for event in events] == ["1 posts may or may not be stored: disk I/O error"]
    assert store.fault == "the log cannot be written: disk I/O error"
    assert texts(store) == ["one"]
    failing_sync.failures = 0
    assert post(store, "three").numbers == [2]
    assert texts(opened(copy_of(path, tmp_path / "later"))) == ["one", "three"]
    assert [event[0] for event in follower.events] == ["appended", "interrupted", "appended"]
    assert post(store, "two", label="l").numbers == [3]


@pytest.mark.parametrize("error", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE])
def test_failed_write_leaves_no_post_behind(opened, path, tmp_path, failing_sync, error):
    """Wherever a commit stops for a disk that is full or broken, a kill does not bring a refused post back."""
    store, outcomes = opened(), []
    post(store, "one")
    while "posted" not in outcomes:
        number = len(outcomes)
        failing_sync.writes, failing_sync.error = number, error
        (what, _, outcome), *_ = post(store, "two", label="l").events
        failing_sync.error = None
        outcomes.append(what)
        if what == "refused":
            assert type(outcome) is (LogUnavailable if error == sqlite3.SQLITE_FULL else InDoubt)
            assert texts(opened(copy_of(path, tmp_path / f"{number}"))) == ["one"]
    assert len(outcomes) > 6, "a frame is two writes, and a post changes several pages"
    assert texts(store) == ["one", "two"]


class WrappedConnection(sqlite3.Connection):
    """A connection whose next commits fail with an error."""

    failures = 0
    code = sqlite3.SQLITE_IOERR_FSYNC

    def execute(self, sql, *parameters):
        if sql == "COMMIT":
            self._fail()
        return super().execute(sql, *parameters)

    def _fail(self):
        if self.failures:
            self.failures -= 1
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self.code
            raise error


@pytest.fixture
def wrapped(monkeypatch):
    """Makes every connection a WrappedConnection."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=WrappedConnection))


@pytest.mark.parametrize(
    ("failures", "code", "error"),
    [
        (1, sqlite3.SQLITE_IOERR_FSYNC, LogUnavailable),
        (2, sqlite3.SQLITE_IOERR_FSYNC, InDoubt),
        (2, sqlite3.SQLITE_IOERR_WRITE, InDoubt),
        (2, sqlite3.SQLITE_FULL, LogUnavailable),
    ],
)
def test_failed_commit(opened, wrapped, failures, code, error):
    """A failed commit is in doubt unless another follows it at once, or the disk was full before its end."""
    store = opened()
    store.file.writer.failures, store.file.writer.code = failures, code
    assert type(post(store, "one", label="l").events[0][2]) is error
    store.file.writer.failures = 0
    assert post(store, "two").numbers == [1]
    assert post(store, "one", label="l").numbers == [2]


def test_commit_fails_in_a_lost_file(opened, path, wrapped):
    """A failed commit is in doubt if the file is not in its place any more."""
    store = opened()
    store.file.writer.failures = 1
    path.rename(path.with_name("elsewhere"))
    assert type(post(store, "one").events[0][2]) is InDoubt


def test_failed_commit_of_every_poster(opened, wrapped):
    """Every poster of a batch in doubt gets the same answer, and abandoned ones get no second answer."""
    writer = HeldWorker()
    store = opened(writer=writer)
    poster = post(store, "one")
    post(store, "two", "three", poster=poster)
    writer.run()
    store.file.writer.failures = 2
    writer.run()
    assert [type(event[2]) for event in poster.events] == [int, InDoubt, InDoubt]
    post(store, "four", poster=poster)
    store.file.writer.failures = 2
    store.abandon()
    writer.run()
    assert poster.refusals == ["disk I/O error", "disk I/O error", IN_DOUBT]


# Recovery without a post


def test_fault_ends_without_a_post(opened, path):
    """The store tries a failing disk every few seconds, until that succeeds."""
    clock = Clock()
    store = opened(clock=clock)
    run_sql(path, "ALTER TABLE messages RENAME TO elsewhere", "ALTER TABLE log RENAME TO other")
    assert post(store, "one").refusals
    with pytest.raises(LogUnavailable):
        page(store)
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault == (
        "the log cannot be written: no such table: log; the log cannot be read: no such table: messages"
    )
    run_sql(path, "ALTER TABLE other RENAME TO log")
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault == "the log cannot be read: no such table: messages"
    run_sql(path, "ALTER TABLE elsewhere RENAME TO messages")
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None
    assert run_sql(path, "SELECT written FROM log") == [(FORMAT,)]


def test_full_disk_stays_a_fault(opened, disk, monkeypatch):
    """A trial takes no space, and a disk without free space therefore stays at fault."""
    clock = Clock()
    store = opened(clock=clock)
    disk.fill()
    while not post(store, "x" * 500).refusals:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "PROBE_BYTES", 1 << 60)
        clock.advance(DISK_LOOK_SECONDS)
    assert store.fault == "the log cannot be written: the disk is full"
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None


def test_disk_that_does_not_answer_is_a_fault(opened):
    """A commit that takes longer than two looks is a fault until it ends, and is logged once."""
    clock, writer = Clock(), HeldWorker()
    store = opened(clock=clock, writer=writer)
    poster = post(store, "one")
    with capturedLogs() as events:
        clock.advance(DISK_LOOK_SECONDS)
        assert store.fault is None
        clock.advance(DISK_LOOK_SECONDS)
        clock.advance(DISK_LOOK_SECONDS)
    assert store.fault == f"the disk has not answered for {DISK_LOOK_SECONDS} s"
    assert [formatEvent(event) for event in events] == [store.fault]
    assert len(writer.held) == 2, "looks do not pile up"
    writer.run_all()
    assert poster.numbers == [1]
    assert store.fault is None


def test_closed_store_looks_at_no_file(opened, path):
    clock = Clock()
    store = opened(clock=clock)
    assert clock.getDelayedCalls()
    result_of(store.close())
    assert clock.getDelayedCalls() == []


# Files that are lost


@pytest.mark.parametrize("ending", ["", "-wal", "-shm"])
def test_file_is_removed_while_the_server_runs(opened, path, ending):
    """Posts are rejected, because what is written to a removed file ends with the process."""
    clock = Clock()
    store, follower = opened(clock=clock), RecordingFollower()
    store.follow(follower)
    post(store, "one")
    path = path.with_name(f"{path.name}{ending}")
    path.unlink()
    first, later = post(store, "two"), post(store, "three")
    assert [type(poster.events[0][2]) for poster in (first, later)] == [InDoubt, LogUnavailable]
    lost = f"{path} was removed, renamed or replaced: put it back, or restart the server"
    assert first.refusals == later.refusals == [lost]
    assert store.fault == f"the log cannot be written: {lost}"
    assert texts(store)[0] == "one", "what is stored can be read"
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault == f"the log cannot be written: {lost}"
    assert [event[0] for event in follower.events] == ["appended"]


def test_file_is_put_back(opened, path):
    """The store recovers when its own file is in its place again, and not with another."""
    clock = Clock()
    store, follower = opened(clock=clock), RecordingFollower()
    store.follow(follower)
    post(store, "one", label="1")
    path.rename(path.with_name("aside"))
    assert isinstance(post(store, "two", label="2").events[0][2], InDoubt)
    path.write_bytes(path.with_name("aside").read_bytes())
    assert post(store, "three", label="3").refusals
    path.with_name("aside").replace(path)
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None
    assert [event[0] for event in follower.events] == ["appended", "interrupted"]
    assert post(store, "two", label="2").events[0][::2] == ("duplicate", 2)
    assert post(store, "three", label="3").numbers == [3]
    assert [event[0] for event in follower.events] == ["appended", "interrupted", "appended"]


def test_file_is_put_back_before_the_next_post(opened, path):
    store = opened()
    path.rename(path.with_name("aside"))
    assert post(store, "one", label="1").refusals
    path.with_name("aside").rename(path)
    assert post(store, "two").numbers == [2]
    assert store.fault is None


@pytest.mark.parametrize("ending", ["", "-wal", "-shm"])
def test_file_is_removed_from_an_idle_server(opened, path, ending):
    """The store notices without a post that one of its files is lost, logs it once, and rejects posts."""
    clock = Clock()
    store = opened(clock=clock)
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None
    path.with_name(f"{path.name}{ending}").unlink()
    with capturedLogs() as events:
        clock.advance(DISK_LOOK_SECONDS)
        clock.advance(DISK_LOOK_SECONDS)
    lost = f"{path}{ending} was removed, renamed or replaced: put it back, or restart the server"
    assert [formatEvent(event) for event in events] == [f"the log cannot be written: {lost}"]
    assert store.fault == f"the log cannot be written: {lost}"
    assert post(store, "one").refusals == [lost]


def test_trim_of_a_removed_file(opened, path):
    """Nothing is removed from a file that is lost, and the failure is logged."""
    store = opened(retain=Retention(messages=1))
    post(store, "one")
    path.unlink()
    with capturedLogs() as events:
        result_of(store.trim())
    lost = f"{path} was removed, renamed or replaced: put it back, or restart the server"
    assert [formatEvent(event) for event in events] == [f"old messages were not removed: {lost}"]
    assert store.fault == f"the log cannot be written: {lost}"


def test_commit_asks_once_for_the_place_of_each_file(opened, monkeypatch):
    """A batch costs one look at each file, however many posts it has."""
    writer, looks = HeldWorker(), []
    store = opened(writer=writer)
    post(store, "one")
    post(store, *"abcdefgh", room="other")
    writer.run()
    look = pathlib.Path.stat
    monkeypatch.setattr(pathlib.Path, "stat", lambda *args, **options: looks.append(args) or look(*args, **options))
    writer.run()
    assert len(looks) == 3


# The size of the write-ahead log


@pytest.fixture
def small(monkeypatch):
    """Lower limits for the write-ahead log."""
    monkeypatch.setattr(sqlite_file, "WAL_ROWS", 10)
    monkeypatch.setattr(sqlite_file, "WAL_USUAL", 100_000)
    monkeypatch.setattr(sqlite_file, "WAL_MOST", 400_000)


def test_old_reader_does_not_fill_the_disk(opened, path, small):
    """While another program reads, the write-ahead log grows up to a limit; then posts are rejected."""
    clock = Clock()
    store = opened(clock=clock)
    post(store, "before")
    wal = path.with_name(f"{path.name}-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader, capturedLogs() as events:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        poster = RecordingPoster()
        while not poster.refusals:
            post(store, "x" * 500, poster=poster)
            assert wal.stat().st_size < 600_000
        grown = f"{wal} has grown to 0 MiB, because another program reads the store: end that program"
        assert poster.refusals == [grown]
        assert store.usage()["wal_bytes"] == wal.stat().st_size > 400_000
        assert store.fault == f"the log cannot be written: {grown}"
        clock.advance(DISK_LOOK_SECONDS)
        assert store.fault == f"the log cannot be written: {grown}"
        assert texts(store)[0] == "before"
    lines = [formatEvent(event) for event in events]
    assert lines == [grown, f"1 posts were not stored: {grown}"]
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None
    assert wal.stat().st_size < 100_000
    assert post(store, "after").numbers == [len(poster.numbers) + 2]


def test_write_ahead_log_shrinks_after_a_reader(opened, path, small):
    store = opened()
    wal = path.with_name(f"{path.name}-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        while wal.stat().st_size < 200_000:
            assert post(store, "x" * 500).numbers
    post(store, *["more"] * 30)
    assert wal.stat().st_size <= 100_000


def test_limits_of_the_write_ahead_log(opened, connections):
    opened()
    for connection in connections:
        assert connection.execute("PRAGMA journal_size_limit").fetchone() == (64 << 20,)
    assert sqlite_file.WAL_MOST == 1 << 30


# Permissions and locks


def test_new_files_are_readable_by_their_user_only(opened, path):
    mask = os.umask(0o022)
    try:
        post(opened(), "one")
    finally:
        os.umask(mask)
    modes = {file.name.removeprefix(path.name): file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"": 0o600, "-wal": 0o600, "-shm": 0o600, "-lock": 0o600}


def test_permissions_of_an_existing_file_stay(opened, path):
    result_of(opened().close())
    path.chmod(0o640)
    post(opened(), "one")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "folder"])
def test_file_in_use_by_another_name(opened, path, tmp_path, kind):
    """A second server is refused whatever the name by which it knows the file, and the first one continues."""
    store = opened()
    post(store, "one")
    other = tmp_path / "other"
    if kind == "symlink":
        other.symlink_to(path)
    elif kind == "hardlink":
        other.hardlink_to(path)
    else:
        other.symlink_to(tmp_path)
        other /= path.name
    assert refused(opened, other).startswith(" is in use by another chatd: ")
    assert post(store, "two").numbers == [2]
    if kind == "hardlink":
        other.unlink()


def test_file_in_use_without_its_lock(opened, path):
    """The lock beside the file can be removed without effect, because the file itself is locked too."""
    opened()
    path.with_name(f"{path.name}-lock").unlink()
    assert refused(opened, path).startswith(" is in use by another chatd: ")


def test_store_by_a_symbolic_link(opened, path, tmp_path):
    """The other files stand beside the real one, and the store is the same."""
    folder = tmp_path / "links"
    folder.mkdir()
    link = folder / "link.sqlite"
    link.symlink_to(path)
    store = opened(link)
    post(store, "one")
    assert [*folder.iterdir()] == [link]
    result_of(store.close())
    assert texts(opened()) == ["one"]


def test_file_with_several_names_is_refused(opened, path, tmp_path):
    """After a kill, the write-ahead log belongs to one name, and the other would show an old log."""
    result_of(opened(seed=SEED).close())
    other = tmp_path / "other"
    other.hardlink_to(path)
    for where in (path, other):
        assert refused(opened, where) == (
            " has 2 names (hard links), and its write-ahead log belongs to one of them: "
            "remove the others, or name another file with --store sqlite:PATH"
        )
    other.unlink()
    opened()


def test_lock_that_cannot_be_written(opened, path, monkeypatch):
    """The error names the lock, such as one that root left, and not the folder."""
    lock = path.with_name(f"{path.name}-lock")
    lock.touch()

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbidden)
        with pytest.raises(StoreError, match=rf"^{lock} cannot be written \(Permission denied\): make it writable"):
            opened()


# A disk that does not answer


def test_close_on_a_disk_that_does_not_answer(opened):
    """The end of the process waits for a commit, but not for ever; its poster learns that it is in doubt."""
    clock, writer = Clock(), HeldWorker()
    store = opened(writer=writer, clock=clock)
    poster, closed = post(store, "one", "two"), []
    store.close().addCallback(closed.append)
    with capturedLogs() as events:
        clock.advance(CLOSE_FILE_SECONDS - 0.1)
        assert (closed, poster.events) == ([], [])
        clock.advance(0.1)
    assert closed == [None]
    assert poster.refusals == [IN_DOUBT] * 2
    assert formatEvent(events[-1]) == f"the store was not closed: the disk has not answered for {CLOSE_FILE_SECONDS} s"


def test_read_that_does_not_answer(opened):
    clock, reader, closed = Clock(), HeldWorker(), []
    store = opened(reader=reader, clock=clock)
    store.read("main", None, 1)
    store.close().addCallback(closed.append)
    assert closed == []
    clock.advance(CLOSE_FILE_SECONDS)
    assert closed == [None]
    reader.run_all()
    store.file.close()


# Threads


class QueueReactor:
    """A reactor that runs one call per `turn`."""

    def __init__(self):
        self._calls = queue.Queue()

    def callFromThread(self, function, *args, **kwargs):
        self._calls.put((function, args, kwargs))

    def turn(self):
        function, args, kwargs = self._calls.get(timeout=30)
        function(*args, **kwargs)

    def result_of(self, deferred):
        results = []
        deferred.addBoth(results.append)
        while not results:
            self.turn()
        return result_of(succeed(results[0]))


class StoppableWorker(ThreadWorker):
    """A ThreadWorker that may be stopped at any time, also twice."""

    running = False

    def start(self):
        super().start()
        self.running = True

    def stop(self):
        if self.running:
            self.running = False
            super().stop()


@pytest.fixture
def thread_worker():
    """A function that makes ThreadWorkers; they are stopped, because a failed test would never end otherwise."""
    workers = []

    def build(reactor):
        workers.append(StoppableWorker(reactor, "for-the-test"))
        return workers[-1]

    yield build
    for worker in workers:
        worker.stop()


@pytest.fixture
def thread(thread_worker):
    """A running ThreadWorker and its reactor."""
    reactor = QueueReactor()
    worker = thread_worker(reactor)
    worker.start()
    return worker, reactor


def test_worker_uses_one_thread_in_order(thread):
    worker, reactor = thread
    done = []
    answers = [worker.do(lambda n=n: done.append(n) or threading.current_thread()) for n in range(20)]
    threads = {reactor.result_of(answer) for answer in answers}
    assert done == [*range(20)]
    assert len(threads) == 1
    assert threads != {threading.current_thread()}
    assert "for-the-test" in threads.pop().name


def test_worker_answers_in_the_reactors_thread(thread):
    worker, reactor = thread
    work_is_done = threading.Event()
    heard = []
    worker.do(work_is_done.set).addCallback(lambda _: heard.append(threading.current_thread()))
    assert work_is_done.wait(30)
    assert heard == []  # the reactor has not run
    reactor.turn()
    assert heard == [threading.current_thread()]


def test_worker_passes_exceptions_on(thread):
    worker, reactor = thread
    with pytest.raises(ZeroDivisionError):
        reactor.result_of(worker.do(lambda: 1 // 0))
    assert reactor.result_of(worker.do(lambda: "and goes on")) == "and goes on"


def test_worker_finishes_before_it_stops(thread):
    worker, reactor = thread
    done = []
    answers = [worker.do(lambda n=n: done.append(n)) for n in range(20)]
    worker.stop()
    assert done == [*range(20)]
    assert not [one for one in threading.enumerate() if "for-the-test" in one.name]
    for answer in answers:
        reactor.result_of(answer)


def test_store_with_real_threads(path, thread_worker):
    reactor = QueueReactor()
    store = SqliteStore(path, ALL, ManualTime(), thread_worker(reactor), thread_worker(reactor), clock=Clock())
    store.open(SEED)
    follower, poster = RecordingFollower(), RecordingPoster()
    store.follow(follower)
    post(store, *map(str, range(500)), poster=poster)
    reading = store.read("main", None, 10)  # does not wait for the writer
    reactor.result_of(store.settled())
    assert poster.numbers == [*range(3, 503)]
    assert [event[2].number for event in follower.events] == poster.numbers
    assert reactor.result_of(reading).head in range(2, 503)
    assert reactor.result_of(store.read("main", None, 1)).head == 502
    reactor.result_of(store.trim())
    reactor.result_of(store.close())
    assert not [one for one in threading.enumerate() if "for-the-test" in one.name]
    assert run_sql(path, "SELECT count(*) FROM messages") == [(502,)]


# Moderation


def ban(word, **document):
    return Sanction.parse({"kind": "ban", "username": word, **document}, word, 0)


def test_room_is_cleared_in_steps(opened, monkeypatch):
    """Posts are stored between the steps, and stay."""
    monkeypatch.setattr(sqlite_file, "REMOVED_ROWS", 2)
    writer = HeldWorker()
    store, follower = opened(writer=writer), RecordingFollower()
    post(store, *"abcde")
    writer.run_all()
    store.follow(follower)
    clearing = store.clear_room("main")
    writer.run()
    post(store, "f")
    writer.run_all()
    assert result_of(clearing) == 5
    firsts = [event[2] for event in follower.events if event[0] == "trimmed"]
    assert firsts == [3, 5, 6]
    assert texts(store) == ["f"]


def test_moderation_fails_with_the_disk(opened, path):
    """What failed has no effect, and the store has a fault until the disk works."""
    clock = Clock()
    store = opened(clock=clock)
    post(store, "one")
    result_of(store.sanction(ban("ann")))
    run_sql(path, "CREATE TRIGGER t BEFORE DELETE ON messages BEGIN SELECT RAISE(ABORT, 'no'); END")
    for event in ("INSERT", "DELETE"):
        run_sql(path, f"CREATE TRIGGER no_{event} BEFORE {event} ON sanctions BEGIN SELECT RAISE(ABORT, 'no'); END")
    for failing in (store.sanction(ban("bob")), store.lift(["ann"]), store.clear_room("main")):
        with pytest.raises(LogUnavailable, match="no"):
            result_of(failing)
        assert store.fault == "the log cannot be written: no"
    assert [one.id for one in store.sanctions] == ["ann"]
    clock.advance(DISK_LOOK_SECONDS)
    assert store.fault is None


def test_other_reads_go_on_while_rooms_are_listed(opened, monkeypatch):
    """Each step looks at a few rooms, whether they are wanted or not."""
    monkeypatch.setattr(sqlite_file, "SCAN_ROOMS", 2)
    reader = HeldWorker()
    store = opened(reader=reader)
    for name in "abcdef":
        post(store, "hi", room=name)
    listing = store.list_rooms("", 2, lambda name: name in "ef")
    reader.run()
    reading = store.read("f", None, 1)
    reader.run()
    reader.run()
    assert result_of(reading).head == 1
    assert listing.paused
    reader.run_all()
    assert [room.name for room in result_of(listing)] == ["e", "f"]
    store.close()
    reader.run_all()


def test_later_step_of_a_list_fails(opened, path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "SCAN_ROOMS", 2)
    reader = HeldWorker()
    store = opened(reader=reader)
    for name in "abc":
        post(store, "hi", room=name)
    listing = store.list_rooms("", 9)
    reader.run()
    run_sql(path, "DROP TABLE rooms")
    store.close()
    reader.run_all()
    with pytest.raises(LogUnavailable, match="no such table: rooms"):
        result_of(listing)


def test_rooms_that_cannot_be_listed(opened, path):
    store = opened()
    run_sql(path, "DROP TABLE rooms")
    with pytest.raises(LogUnavailable, match="no such table: rooms"):
        result_of(store.list_rooms("", 9))


def test_file_without_sanctions_gets_their_table(opened, path):
    """A file of an earlier version works, and the version of its format stays."""
    result_of(opened(seed=SEED).close())
    run_sql(path, "DROP TABLE sanctions")
    before = run_sql(path, "SELECT written, readable_since FROM log")
    store = opened()
    result_of(store.sanction(ban("ann")))
    assert run_sql(path, "SELECT id FROM sanctions") == [("ann",)]
    assert run_sql(path, "SELECT written, readable_since FROM log") == before


# Cursors of readers outside


def cursors(store, *, reader="app"):
    """Return the rooms that a reader lacks entries of, as (room, cursor, head)."""
    found, place = result_of(store.behind(reader, ""))
    while place:
        more, place = result_of(store.behind(reader, place))
        found = [*found, *more]
    return [tuple(room) for room in found]


def test_new_epoch_takes_the_cursors(opened, path):
    """After a restored backup the numbers stand for other messages, so a reader begins at the start of every room."""
    store = opened()
    result_of(store.claim("app", "w", 1))
    post(store, "a", "b")
    result_of(store.advance("app", "w", {"main": 2}))
    assert result_of(store.cursor("app", "main")) == 2
    result_of(store.close())
    run_sql(path, "UPDATE log SET epoch = 'newone'")
    again = opened()
    result_of(again.claim("app", "w", 1))
    assert cursors(again) == [("main", 0, 2)]


def test_rooms_behind_are_read_in_pieces(opened, monkeypatch):
    monkeypatch.setattr(sqlite_file, "SCANNED_ROOMS", 10)
    store = opened()
    result_of(store.claim("app", "w", 1))
    for number in range(20):
        post(store, "a", room=f"r{number:02}")
    assert len(result_of(store.behind("app", ""))[0]) == 10
    assert cursors(store) == [(f"r{number:02}", 0, 1) for number in range(20)]


def test_store_without_readers_has_no_table_for_them(opened, path):
    post(opened(), "a")
    assert run_sql(path, "SELECT name FROM sqlite_schema WHERE name IN ('readers', 'cursors')") == []


def test_cursors_do_not_sync_the_disk(opened):
    """A post after a cursor is synced as before."""
    store = opened()
    result_of(store.claim("app", "w", 1))
    (full,) = store.file.writer.execute("PRAGMA synchronous").fetchone()
    seen = []
    store.file.writer.set_trace_callback(seen.append)
    result_of(store.advance("app", "w", {"main": 0}))
    store.file.writer.set_trace_callback(None)
    assert seen[0] == "PRAGMA synchronous=NORMAL"
    assert store.file.writer.execute("PRAGMA synchronous").fetchone() == (full,) == (2,)


def test_faults_of_cursors(opened, path):
    """An error of SQLite is a fault of the log like every other one, and nothing moves."""
    store = opened()
    result_of(store.claim("app", "w", 1))
    post(store, "a")
    run_sql(path, "CREATE TRIGGER no_cursor BEFORE INSERT ON cursors BEGIN SELECT RAISE(ABORT, 'no'); END")
    run_sql(path, "CREATE TRIGGER no_reader BEFORE INSERT ON readers BEGIN SELECT RAISE(ABORT, 'no'); END")
    for failing in (store.claim("new", "w", 1), store.advance("app", "w", {"main": 1})):
        with pytest.raises(LogUnavailable, match="no"):
            result_of(failing)
    assert store.file.writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert cursors(store) == [("main", 0, 1)]
    run_sql(path, "DROP TABLE cursors")
    for failing in (store.cursor("app", "main"), store.behind("app", "")):
        with pytest.raises(LogUnavailable, match="no such table"):
            result_of(failing)
