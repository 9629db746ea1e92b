"""A removal erases: no file of a SQLite store, and no backup of it, has the text any longer."""

import random
import subprocess
import sys

import pytest
from support.helpers import ImmediateWorker, ManualTime, RecordingPoster, result_of
from support.servers import ROOT
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from chatd.messages import REMOVED, Id, Post
from chatd.store import sqlite, sqlite_file
from chatd.store.base import Retention
from chatd.store.sqlite import ERASE_SECONDS, SqliteStore

SECRETS = 400


def secret(number):
    return f"<secret {number}>"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chat.sqlite"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(path, clock):
    """A function that opens a store, which the fixture closes."""
    stores = []

    def build(retain="all"):
        now = ManualTime()
        workers = ImmediateWorker(), ImmediateWorker()
        stores.append(SqliteStore(path, Retention.parse(retain), now, *workers, clock=clock, steady=now.steady))
        stores[-1].open(())
        return stores[-1]

    yield build
    for store in stores:
        result_of(store.close())


def send(store, post, room="main"):
    """Append a post, and return its number."""
    poster = RecordingPoster()
    store.append(room, post, poster)
    assert poster.refusals == []
    return poster.numbers[0]


def remove(store, number, room="main"):
    send(store, Post("ann", REMOVED, None, "a", Id(store.epoch, number), removed=True), room)


def found(*files):
    """Return the numbers of the secrets in the files."""
    data = b"".join(file.read_bytes() for file in files if file.exists())
    return {number for number in range(SECRETS) if secret(number).encode() in data}


def files(path):
    return sorted(path.parent.glob(f"{path.name}*"))


def backup(path):
    copy = path.parent / "copy"
    command = [sys.executable, "-S", "-B", ROOT / "scripts" / "backup", "--force", "--store", path, copy]
    subprocess.run(command, check=True, capture_output=True)
    return found(copy)


@pytest.mark.parametrize("retain", ["all", "60"])
def test_removal_leaves_no_text_in_any_file(opened, path, clock, retain):
    """Messages of all sizes in several rooms, edits of them and trims: after each removal the rest is still there."""
    store, chance = opened(retain), random.Random(1)
    kept = {}
    for number in range(0, SECRETS, 2):
        room = chance.choice(["a", "main", "z"])
        text = secret(number) + "👋" * chance.choice([5, 50, 400]) + secret(number)  # some overflow their page
        original = send(store, Post("ann", text, chance.choice([None, str(number)]), "a"), room)
        if chance.random() < 0.3:
            send(store, Post("ann", secret(number + 1), None, "a", Id(store.epoch, original)), room)
        kept[number] = room, original
        if number % 20 == 0 and retain == "all":
            gone = chance.choice([*kept])
            room, original = kept.pop(gone)
            remove(store, original, room)
            clock.advance(ERASE_SECONDS)
            assert not {gone, gone + 1} & found(*files(path))
    for room, original in [*kept.values()][-20:]:
        remove(store, original, room)
    removed = {*[*kept][-20:]}
    clock.advance(ERASE_SECONDS)
    assert not (removed | {number + 1 for number in removed}) & found(*files(path))
    assert not (removed | {number + 1 for number in removed}) & backup(path)
    if retain == "all":
        assert {*kept} - removed <= found(*files(path))
        assert {*kept} - removed <= backup(path)


def test_text_is_in_the_files_until_then(opened, path, clock):
    """The search finds what is there: in the file, in its write-ahead log, and in a backup."""
    store = opened()
    for number in (0, 1):
        send(store, Post("ann", secret(number), None, "a"))
    assert found(path.with_name("chat.sqlite-wal")) == backup(path) == {0, 1}
    remove(store, 2)
    assert found(path.with_name("chat.sqlite-wal")) == {0, 1}, "it is erased a moment later"
    assert backup(path) == {0}
    clock.advance(ERASE_SECONDS)
    assert found(*files(path)) == found(path) == {0}


def test_erasure_waits_for_readers(opened, path, clock):
    """Another program that reads the store delays the end of the text, and no post."""
    store = opened()
    send(store, Post("ann", secret(0), None, "a"))
    other = sqlite_file.sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM messages").fetchone()
    remove(store, 1)
    for _ in range(3):
        clock.advance(ERASE_SECONDS)
    assert found(*files(path)) == {0}
    send(store, Post("ann", "posts go on"))
    other.close()
    clock.advance(ERASE_SECONDS)
    assert found(*files(path)) == set()


def test_removals_share_one_erasure(opened, clock, monkeypatch):
    store = opened()
    erased = []
    monkeypatch.setattr(store.file, "erase", lambda: erased.append(clock.seconds()) or True)
    numbers = [send(store, Post("ann", "text", None, "a")) for _ in range(5)]
    for number in numbers:
        remove(store, number)
    clock.advance(ERASE_SECONDS)
    assert erased == [ERASE_SECONDS]


def test_erasure_is_repeated_after_a_fault(opened, path, clock, monkeypatch):
    store = opened()
    send(store, Post("ann", secret(0), None, "a"))
    remove(store, 1)
    with monkeypatch.context() as broken, capturedLogs() as events:
        broken.setattr(store.file, "erase", lambda: 1 / 0)
        clock.advance(ERASE_SECONDS)
    assert len(events) == 1
    clock.advance(ERASE_SECONDS)
    assert found(*files(path)) == set()


def test_killed_process_leaves_the_erasure_to_the_next(opened, path, tmp_path):
    """Whoever opens the store next erases what a killed process did not."""
    store = opened()
    send(store, Post("ann", secret(0), None, "a"))
    remove(store, 1)
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in files(path):
        if not file.name.endswith(("-lock", "-shm")):
            (killed / file.name).write_bytes(file.read_bytes())
    assert found(*files(killed / path.name)) == {0}
    after = sqlite_file.SqliteFile(killed / path.name, Retention(), ManualTime())
    after.open(())
    assert found(*files(killed / path.name)) == set()
    after.close()


def test_close_erases(opened, path, clock):
    """A clean stop leaves nothing, even within the second, and no timer."""
    store = opened()
    send(store, Post("ann", secret(0), None, "a"))
    remove(store, 1)
    result_of(store.close())
    assert found(*files(path)) == set()
    assert clock.getDelayedCalls() == []
    assert sqlite.ERASE_SECONDS == 1
