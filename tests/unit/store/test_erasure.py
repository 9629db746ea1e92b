"""A removal erases: no file of a SQLite store, and no backup of it, has the text any longer."""

import contextlib
import random
import re
import sqlite3
import subprocess
import sys

import pytest
from support.helpers import ImmediateWorker, ManualTime, RecordingPoster, result_of
from support.servers import ROOT
from support.store_files import run_sql
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from chatd.messages import REMOVED, Id, Post
from chatd.store import sqlite, sqlite_file
from chatd.store.base import Retention
from chatd.store.sqlite import ERASE_SECONDS, SqliteStore
from chatd.store.sqlite_pages import is_pointer_map, stale_gaps

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
        label, extra = chance.choice([None, str(number)]), {"note": secret(number) * 9}
        original = send(store, Post("ann", text, label, "a", extra=extra), room)
        if chance.random() < 0.3:
            edit = Post("ann", "new", None, "a", Id(store.epoch, original), extra={"note": secret(number + 1)})
            send(store, edit, room)
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


def test_fields_that_an_older_version_left_are_erased(opened, path):
    """Code of format 3 erases a text and not the fields beside it; the next start of this code does."""
    store = opened()
    for number in range(3):
        send(store, Post("ann", "hi", None, "a", extra={"note": secret(number)}))
    result_of(store.close())
    run_sql(
        path,
        "UPDATE messages SET message = '[removed]', removed = 1, replaced = 4 WHERE number = 1",
        "INSERT INTO messages (room, number, username, message, timestamp, author, replaces, removed)"
        " VALUES ('main', 4, 'ann', '[removed]', '2026-01-01T00:00:00.000Z', 'a', 1, 1)",
        "UPDATE rooms SET head = 4 WHERE name = 'main'",
    )
    assert found(*files(path)) == {0, 1, 2}
    entries = result_of(opened().read("main", 0, 9)).entries
    assert [entry.extra for entry in entries] == [None, {"note": secret(1)}, {"note": secret(2)}, None]
    assert found(*files(path)) == {1, 2}


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


# Copies that SQLite leaves in the unused space of its pages


@pytest.fixture
def moved(path):
    """A file whose pages hold copies of texts that SQLite has moved and that were then removed, and those texts."""
    chance = random.Random(2)
    file = sqlite_file.SqliteFile(path, Retention(), ManualTime())
    file.open(())
    kept = {}
    for _ in range(200):
        texts = [f"<text {number:05}>" for number in range(len(kept), len(kept) + 10)]
        sizes = chance.choices([0, 50, 480], k=10)
        posts = [Post("ann", text + "y" * size, None, "a") for text, size in zip(texts, sizes, strict=True)]
        rooms = chance.choices("abcdefgh", k=10)
        outcomes = file.commit([*zip(rooms, posts, strict=True)]).outcomes
        kept |= {(room, number): text.encode() for room, (number, _), text in zip(rooms, outcomes, texts, strict=True)}
    removed = chance.sample([*kept], 300)
    for room, number in removed:
        file.commit([(room, Post("ann", REMOVED, None, "a", Id(file.epoch, number), removed=True))])
    yield file, {kept[one] for one in removed}, {kept[one] for one in kept.keys() - {*removed}}
    file.close()


def in_files(path, texts):
    return texts & {*re.findall(rb"<text \d{5}>", b"".join(file.read_bytes() for file in files(path)))}


def test_copies_in_unused_space_are_erased(path, moved):
    """No copy of a removed text stays where SQLite has moved the row from, nor returns with later posts."""
    file, removed, kept = moved
    assert file.checkpoint()
    assert in_files(path, removed), "SQLite leaves copies: else this test shows nothing"
    assert file.erase()
    assert in_files(path, removed) == set()
    for _ in range(50):
        file.commit([(room, Post("ann", "more" * 50, None, "a")) for room in "abcdefgh"])
    assert file.checkpoint()
    assert in_files(path, removed) == set()
    assert in_files(path, kept) == kept
    assert file.writer.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_copies_are_erased_in_steps(path, moved, monkeypatch):
    """A large file is searched in steps; a removal between them lets the search go once around."""
    file, removed, _ = moved
    monkeypatch.setattr(sqlite_file, "SCRUB_BYTES", 64 << 10)
    monkeypatch.setattr(sqlite_file, "SCRUB_PIECE", 16 << 10)
    assert not file.erase()
    query = "SELECT room, number, message FROM messages WHERE removed = 0"
    room, number, text = file.writer.execute(query).fetchone()
    file.commit([(room, Post("ann", REMOVED, None, "a", Id(file.epoch, number), removed=True))])
    while not file.erase():
        pass
    assert file.erased
    assert in_files(path, removed | {text[:12].encode()}) == set()
    assert file.writer.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_copies_stay_while_another_program_writes(path, moved, monkeypatch):
    """Pages of the file are old while the write-ahead log holds newer ones: they are searched later."""
    file, removed, _ = moved
    with monkeypatch.context() as other:
        other.setattr(file, "checkpoint", lambda: True)
        assert not file.erase()
    assert not file.erased
    assert file.erase()
    assert in_files(path, removed) == set()


@pytest.mark.parametrize("size", [512, 4096])
def test_pointer_maps_are_the_pages_that_hold_no_data(tmp_path, size):
    """A file with `auto_vacuum` has pages that look like any other, but that nothing may be overwritten in."""
    with contextlib.closing(sqlite3.connect(tmp_path / "some", isolation_level=None)) as db:
        for name, value in (("page_size", size), ("auto_vacuum", "INCREMENTAL")):
            db.execute(f"PRAGMA {name}={value}")
        db.execute("CREATE TABLE texts (text)")
        db.executemany("INSERT INTO texts VALUES (?)", [("x" * size,)] * 1000)
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        data = {page for (page,) in db.execute("SELECT pageno FROM dbstat")}
    assert {page for page in range(1, pages + 1) if is_pointer_map(page, size)} == {*range(1, pages + 1)} - data


def test_pointer_map_moves_behind_the_page_of_locks():
    """No data is on the page with the bytes that SQLite locks, at 1 GiB."""
    lock = (1 << 30) // 1024 + 1
    assert not is_pointer_map(lock, 1024)
    assert is_pointer_map(lock + 1, 1024)


def test_pointer_maps_stay(path, moved, monkeypatch):
    file, _, _ = moved
    assert file.checkpoint()
    monkeypatch.setattr(sqlite_file, "is_pointer_map", lambda page, size: True)
    before = path.read_bytes()
    assert file.erase()
    assert path.read_bytes() == before


def test_file_whose_pages_do_not_tell_their_kind(path, moved, monkeypatch):
    """In a file of 128 GiB an overflow page may look like a page of a table: nothing is written, as the log tells."""
    file, removed, _ = moved
    monkeypatch.setattr(sqlite_file, "MOST_PAGES", 10)
    with capturedLogs() as events:
        assert file.erase()
    assert in_files(path, removed)
    assert "VACUUM" in events[0]["log_format"]


def test_cleared_room_is_erased(opened, path, clock):
    """A clear by an operator also erases the unused space."""
    store = opened()
    send(store, Post("ann", secret(0)))
    assert result_of(store.clear_room("main")) == 1
    assert not store.file.erased
    clock.advance(ERASE_SECONDS)
    assert store.file.erased
    assert found(*files(path)) == set()


def test_space_is_returned_after_a_search_only(opened, path, clock):
    """A page that moves to a place that was searched already would escape."""
    store = opened()
    for number in range(50):
        send(store, Post("ann", secret(number) * 50, None, "a"))
    result_of(store.close())
    store = opened("3")
    remove(store, 50)
    assert not store.file.return_space()
    clock.advance(ERASE_SECONDS)
    assert store.file.return_space()


def test_search_goes_on_after_a_restart(opened, path, clock, monkeypatch):
    """A store that holds a removal is searched when it opens, in steps."""
    store = opened()
    send(store, Post("ann", secret(0), None, "a"))
    remove(store, 1)
    result_of(store.close())
    monkeypatch.setattr(sqlite_file, "SCRUB_BYTES", 4096)
    again = opened()
    assert not again.file.erased
    for _ in range(10):
        clock.advance(ERASE_SECONDS)
    assert again.file.erased


@pytest.mark.parametrize(
    ("page", "gaps"),
    [
        (b"\x0d\0\0\0\1\0\x1e\0\0\x1eSTALE" + bytes(15) + b"!!", [(10, 30)]),
        (b"\x0d\0\0\0\1\0\x1e\0\0\x1e" + bytes(20) + b"!!", []),  # nothing stale
        (b"\x0d\0\0\0\1\0\x1e\0\0\x0cSTALE" + bytes(15) + b"!!", []),  # a row in the gap: not a valid page
        (b"\x0d\0\0\0\1\0\x21\0\0\x1eSTALE" + bytes(15) + b"!!", []),  # it begins behind the page
        (b"\x0d\0\0\0\1\0\0\0\0\x1eSTALE" + bytes(15) + b"!!", []),  # 0 stands for 65536
        (b"\0\0\0\7\1\0\x1e\0\0\x1eSTALE" + bytes(15) + b"!!", []),  # an overflow page
        (b"\x05\0\0\0\0\0\x1e\0\0\0\0\1STALE" + bytes(13) + b"!!", [(12, 30)]),  # an interior page without rows
    ],
)
def test_gaps_of_a_page(page, gaps):
    """Only the unused space of a valid page is found, and only if it holds something."""
    assert len(page) == 32
    assert [*stale_gaps(bytes(32) + page + page[:20], 32)] == [(32 + start, 32 + stop) for start, stop in gaps]
