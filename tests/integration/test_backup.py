"""scripts/backup and scripts/restore, run without packages, on the stores of real servers."""

import contextlib
import fcntl
import json
import os
import pty
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from support.servers import LONG, ROOT, Raw, Server, environment, numbered, post, program, stored
from support.store_files import names, run_sql
from support.websocket_frames import TEXT, frame

from chatd.store import base, sqlite_file

SCRIPTS = ROOT / "scripts"
PYTHON = (sys.executable, "-S", "-B")
"""Python without packages, which writes no compiled files."""
SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]


def run(name, *arguments, cwd, code=0, **changes):
    """Run a script that must end with a code; return its output, or its one line of error."""
    result = subprocess.run(
        [*PYTHON, SCRIPTS / name, *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    if code == 0:
        assert result.stderr == ""
        return result.stdout
    assert result.stdout == ""
    assert re.fullmatch(rf"{name}: .+\n", result.stderr)
    return result.stderr


@pytest.fixture
def scripts(monkeypatch):
    """Load a script as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # also for storefiles
    yield lambda name: program(SCRIPTS / name)
    sys.modules.pop("storefiles", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a server left a store with five messages."""
    folder = tmp_path_factory.mktemp("made")
    with Server(folder) as server:
        say(server, "three", "four", "five")
        server.stop()
    return folder


@pytest.fixture
def store(made, tmp_path):
    """A copy of that store, with its lock."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "chatd.sqlite"


def say(server, *texts):
    """Post, and wait until every message is delivered."""
    with Raw(server.port) as client:
        client.join()
        for text in texts:
            client.send(post("ann", text))
            assert client.json()["type"] == "message"


def texts(path):
    return [message for _, _, message, _ in stored(path)[1]]


# Under load


class Poster(threading.Thread):
    """Posts to a room, message after message, until it is stopped. It knows the last acknowledged message."""

    def __init__(self, server, name, room):
        super().__init__(daemon=True)
        self.name, self.room = name, room
        self._server = server
        self._changed = threading.Condition()
        self._stopping = False
        self.acked = 0
        """The number of the last acknowledged message, among those of this poster."""
        self.faults = []

    def run(self):
        with Raw(self._server.port) as client:
            client.join(f"/rooms/{self.room}")
            while not self._stopping and not self.faults:
                text = str(self.acked + 1)
                document = {"username": self.name, "message": text * 50, "label": text}
                client.send(frame(TEXT, json.dumps(document).encode()))
                while (said := client.json())["type"] == "message":
                    pass
                if said["type"] != "ack" or "duplicate" in said:
                    self.faults.append(said)
                with self._changed:
                    self.acked += 1
                    self._changed.notify_all()

    def more(self):
        """Wait until a message posted from now on is acknowledged."""
        with self._changed:
            enough = self.acked + 2
            assert self._changed.wait_for(lambda: self.acked >= enough or self.faults, LONG)

    def stop(self):
        self._stopping = True
        self.join(LONG)
        assert not self.is_alive()
        assert self.faults == []


def test_backup_of_a_busy_server(tmp_path):
    """Each backup is one moment of the log, and no post fails meanwhile."""
    path = tmp_path / "chatd.sqlite"
    rooms = {"ann": "main", "bob": "main", "cy": "kitchen"}
    with Server(tmp_path) as server:
        posters = [Poster(server, name, room) for name, room in rooms.items()]
        for poster in posters:
            poster.start()
        for poster in posters:
            poster.more()
        acked = []
        for number in range(3):
            acked.append({poster.name: poster.acked for poster in posters})
            said = json.loads(run("backup", "--json", f"{number}.backup", cwd=tmp_path))
            assert said["epoch"] == server.epoch
            for poster in posters:
                poster.more()
        for poster in posters:
            poster.stop()
        final = {room: stored(path, room) for room in ("main", "kitchen")}
        server.stop()
    for number, before in enumerate(acked):
        backup = tmp_path / f"{number}.backup"
        for room, (epoch, rows) in final.items():
            copied_epoch, copied = stored(backup, room)
            assert copied_epoch == epoch
            assert copied == rows[: len(copied)]
            assert len(copied) < len(rows)
            assert [row[0] for row in copied] == [*range(1, len(copied) + 1)]
            for name in (name for name, its in rooms.items() if its == room):
                assert [row[1] for row in copied].count(name) >= before[name], "what was acknowledged is in it"
        with closing(sqlite3.connect(backup)) as db:
            labels = db.execute("SELECT room, username, label FROM messages WHERE label IS NOT NULL").fetchall()
            assert len({*labels}) == len(labels) > 0
            heads = dict(db.execute("SELECT name, head FROM rooms"))
            assert heads == {room: len(stored(backup, room)[1]) for room in final}


def test_backup_ends_despite_constant_writes(store, tmp_path, scripts, monkeypatch):
    load = scripts("backup")
    storefiles = sys.modules["storefiles"]
    monkeypatch.setattr(storefiles, "PAGES", 1)
    steps = []
    with closing(sqlite3.connect(store, isolation_level=None)) as writer:

        def show(progress):
            steps.append(progress)
            assert len(steps) < 100
            writer.execute("UPDATE rooms SET head = head + 1")

        monkeypatch.setattr(storefiles, "show", show)
        monkeypatch.setattr(sys, "argv", ["backup", f"--store={store}", str(tmp_path / "copy")])
        assert load.main().startswith(f"{tmp_path}/copy: the log ")
    percents = [int(step.removesuffix(" %")) for step in steps if step.endswith(" %")]
    assert percents == sorted({*percents})
    assert percents[-1] == 100
    with closing(sqlite3.connect(tmp_path / "copy")) as db:
        assert db.execute("SELECT head FROM rooms").fetchone() == (5,)


# Backups


def test_backup_prints_its_content(store, tmp_path):
    epoch, _ = stored(store)
    size = store.stat().st_size
    said = run("backup", "--store=chatd.sqlite", "one", cwd=tmp_path)
    assert said == f"one: the log {epoch}, messages: 5, rooms: 1, {size >> 10} KiB\n"
    assert json.loads(run("backup", "--json", "two", cwd=tmp_path)) == {
        "path": "two",
        "bytes": (tmp_path / "two").stat().st_size,
        "epoch": epoch,
        "readable_since": sqlite_file.READABLE_SINCE,
        "rooms": 1,
        "messages": 5,
        "kept": None,
    }
    assert stored(tmp_path / "one") == stored(tmp_path / "two") == stored(store)


def test_backup_takes_the_servers_store_option(store, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, (arguments, changes) in enumerate([
        ([f"--store={store}"], {}),
        ([f"--store=sqlite:{store}"], {}),
        ([], {"CHATD_STORE": f"sqlite:{store}"}),
    ]):  # fmt: skip
        run("backup", *arguments, number, cwd=elsewhere, **changes)
        assert stored(elsewhere / str(number)) == stored(store)


def test_backup_is_one_file_and_leaves_the_store(store, tmp_path):
    store.chmod(0o640)
    before = names(tmp_path), store.read_bytes()
    folder = tmp_path / "backups"
    folder.mkdir()
    run("backup", "backups/a", cwd=tmp_path)
    assert names(folder) == ["a"]
    assert (folder / "a").stat().st_mode & 0o777 == 0o640
    shutil.rmtree(folder)
    assert (names(tmp_path), store.read_bytes()) == before


def test_backup_includes_the_log_of_a_killed_server(tmp_path):
    """The write-ahead log of a killed server is part of the backup."""
    with Server(tmp_path) as server:
        say(server, "three")
        server.kill()
    assert (tmp_path / "chatd.sqlite-wal").stat().st_size
    run("backup", "copy", cwd=tmp_path)
    assert texts(tmp_path / "copy")[2:] == ["three"]


def test_backup_replaces_a_file_only_on_request(store, tmp_path):
    copy = tmp_path / "copy"
    copy.write_text("precious")
    line = run("backup", "copy", cwd=tmp_path, code=1)
    assert line == "backup: copy exists: name another file, or replace it with --force\n"
    assert copy.read_text() == "precious"
    run("backup", "--force", "copy", cwd=tmp_path)
    assert len(texts(copy)) == 5
    line = run("backup", "--force", "chatd.sqlite", cwd=tmp_path, code=1)
    assert line == "backup: chatd.sqlite is the store itself: name another file\n"
    assert names(tmp_path) == ["chatd.sqlite", "chatd.sqlite-lock", "copy"]


@pytest.fixture
def stale(store, tmp_path):
    """The file `copy` of a server that was killed, whose write-ahead log holds two messages of its own."""
    epoch, rows = stored(store)
    place = tmp_path / "copy"
    shutil.copy(store, place)
    with closing(sqlite3.connect(place, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("DELETE FROM messages WHERE number > 3")
        db.execute("PRAGMA wal_checkpoint")
        db.execute("UPDATE messages SET message = 'stale'")
        db.execute("UPDATE log SET epoch = 'stale'")
        for suffix in ("", "-wal"):
            shutil.copy(f"{place}{suffix}", tmp_path / f"killed{suffix}")
    for suffix in ("", "-wal"):
        (tmp_path / f"killed{suffix}").replace(f"{place}{suffix}")
    (tmp_path / "copy-shm").unlink(missing_ok=True)
    assert (tmp_path / "copy-wal").stat().st_size
    return epoch, rows


@pytest.mark.parametrize("main", [True, False])
def test_stale_write_ahead_log_is_put_aside(store, tmp_path, stale, main):
    """A write-ahead log that stands beside the file to make is kept, and does not get into the backup."""
    if not main:
        (tmp_path / "copy").unlink()
    (tmp_path / "copy-journal").write_text("journal")
    said = run("backup", *["--force"] * main, "copy", cwd=tmp_path)
    (aside,) = re.findall(r"; what was there is (copy\.before-backup-\d{8}T\d{6}\.\d{6}Z)\n", said)
    assert stored(tmp_path / "copy") == stale
    assert [name for name in names(tmp_path) if name.startswith("copy-")] == []
    assert (tmp_path / f"{aside}-journal").read_text() == "journal"
    (tmp_path / f"{aside}-journal").unlink()
    if main:
        assert stored(tmp_path / aside)[0] == "stale"


def test_backup_is_verified_under_its_name(store, tmp_path, stale, scripts, monkeypatch):
    """A backup that does not have its contents under its name is an error."""
    load = scripts("backup")
    monkeypatch.setattr(load, "put_aside", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["backup", "--force", f"--store={store}", str(tmp_path / "copy")])
    with pytest.raises(sys.modules["storefiles"].StoreFault, match=r"copy (does not hold|cannot be read)"):
        load.main()


def test_backup_onto_a_store_in_use_is_rejected(store, tmp_path):
    """The store of a running server is no place for a backup, whatever its name."""
    other = tmp_path / "other"
    other.mkdir()
    with Server(other) as server:
        say(server, "three")
        (tmp_path / "link").symlink_to(other / "chatd.sqlite")
        for place in ("other/chatd.sqlite", "link"):
            line = run("backup", "--force", place, cwd=tmp_path, code=1)
            assert line == f"backup: {place} is in use by a chatd: stop it, or name another file\n"
        say(server, "four")
        server.stop()


@pytest.mark.parametrize("name", ["backup", "restore"])
def test_source_with_several_names_is_rejected(store, tmp_path, name):
    """One of the names may lack the write-ahead log, and with it the newest messages."""
    (tmp_path / "other").hardlink_to(store)
    arguments = ["--store=other", "copy"] if name == "backup" else ["other", "copy"]
    line = run(name, *arguments, cwd=tmp_path, code=1)
    assert line == (
        f"{name}: other has several names (hard links), and only one has its write-ahead log: remove the other names\n"
    )


def test_restore_to_a_link_of_a_store_in_use(tmp_path, made):
    """A restore is refused while a server uses the store under another name."""
    with Server(tmp_path) as server:
        for kind, place in (("symbolic", tmp_path / "symbolic"), ("hard", tmp_path / "hard")):
            if kind == "symbolic":
                place.symlink_to(tmp_path / "chatd.sqlite")
            else:
                place.hardlink_to(tmp_path / "chatd.sqlite")
            line = run("restore", "--force", made / "chatd.sqlite", place, cwd=tmp_path, code=1)
            assert "is in use by a chatd" in line
            place.unlink()
        server.stop()


def test_restore_through_a_link_keeps_the_link(store, tmp_path):
    """The file that a symbolic link names is replaced, with the files beside it."""
    run("backup", "copy", cwd=tmp_path)
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "link").symlink_to(store)
    run("restore", "--force", "copy", "links/link", cwd=tmp_path)
    assert (folder / "link").is_symlink()
    assert names(folder) == ["link"]
    assert stored(store)[0] != stored(tmp_path / "copy")[0]


def test_restored_store_is_private(store, tmp_path):
    """A new store cannot be read by others, even if its backup could; an existing store keeps its mode."""
    run("backup", "copy", cwd=tmp_path)
    (tmp_path / "copy").chmod(0o644)
    run("restore", "copy", "new.sqlite", cwd=tmp_path)
    assert (tmp_path / "new.sqlite").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new.sqlite").chmod(0o604)
    run("restore", "--force", "copy", "new.sqlite", cwd=tmp_path)
    assert (tmp_path / "new.sqlite").stat().st_mode & 0o777 == 0o604


def test_progress_on_a_terminal(store, tmp_path):
    terminal, end = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as terminal:
        with os.fdopen(end, "wb") as end:
            command = [*PYTHON, SCRIPTS / "backup", "copy"]
            subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=end, timeout=LONG, check=True)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal ends with an error
            while data := terminal.read(1000):
                shown += data
    assert shown.replace(b"\r\x1b[K", b"|") == b"|100 %|verifying|"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["copy"], 1)])
def test_password_is_never_printed(tmp_path, arguments, code):
    """CHATD_STORE may be a Redis URL with a password."""
    output = run("backup", *arguments, cwd=tmp_path, code=code, CHATD_STORE="redis://:secret@localhost")
    assert "secret" not in output
    assert ("back up Redis with its own tools" in output) == (code == 1)


@pytest.mark.parametrize("name", ["backup", "restore"])
def test_help_has_examples(name, tmp_path):
    said = run(name, "--help", cwd=tmp_path)
    assert f"\n  scripts/{name} " in said
    assert "--force" in said


# Restoring


def test_restore_makes_a_new_log_of_the_old_messages(tmp_path):
    with Server(tmp_path) as server:
        say(server, "three")
        run("backup", "copy", cwd=tmp_path)
        say(server, "lost", "lost too")
        old, last = server.epoch, f"{server.epoch}-5"
        server.kill()
    said = run("restore", "--force", "copy", "chatd.sqlite", cwd=tmp_path)
    new, aside = re.fullmatch(
        rf"chatd\.sqlite: the log (\w+) \(it was {old}\), messages: 3, rooms: 1; "
        r"what was there is (chatd\.sqlite\.before-restore-\d{8}T\d{6}\.\d{6}Z)\n",
        said,
    ).groups()
    assert new != old
    assert [entry[:3] for entry in stored(tmp_path / "chatd.sqlite")[1]] == [*SEED, (3, "ann", "three")]
    with Server(tmp_path) as server:
        assert server.epoch == new
        with Raw(server.port) as client:
            history = client.join(f"/?last_event_id={last}")
            assert (history["id"], history["resumed"]) == (f"{new}-3", False)
            assert numbered(history) == [*SEED, (3, "ann", "three")]
            client.send(post("ann", "again"))
            assert client.json()["id"] == f"{new}-4"
        server.stop()
    # Nothing is lost: the replaced store still has its write-ahead log.
    assert (tmp_path / f"{aside}-wal").stat().st_size
    assert texts(tmp_path / aside)[2:] == ["three", "lost", "lost too"]
    assert stored(tmp_path / aside)[0] == old


def test_each_restore_makes_another_log(store, tmp_path):
    run("backup", "copy", cwd=tmp_path)
    said = [json.loads(run("restore", "--json", "copy", f"{number}.sqlite", cwd=tmp_path)) for number in range(3)]
    assert len({stored(store)[0], *(one["epoch"] for one in said)}) == 4
    for number, one in enumerate(said):
        assert one == {
            "path": f"{number}.sqlite",
            "epoch": stored(tmp_path / one["path"])[0],
            "readable_since": sqlite_file.READABLE_SINCE,
            "rooms": 1,
            "messages": 5,
            "epoch_before": stored(store)[0],
            "kept": None,
        }
        assert stored(tmp_path / one["path"])[1] == stored(store)[1]
    assert stored(tmp_path / "copy") == stored(store)


def test_restore_fails_while_a_server_runs(tmp_path):
    with Server(tmp_path) as server:
        say(server, "three")
        run("backup", "copy", cwd=tmp_path)
        before = names(tmp_path)
        for force in ([], ["--force"]):
            line = run("restore", *force, "copy", "chatd.sqlite", cwd=tmp_path, code=1)
            assert line.startswith("restore: chatd.sqlite is in use by a chatd: stop it, ")
        assert names(tmp_path) == before
        say(server, "four")
        server.stop()
    assert texts(tmp_path / "chatd.sqlite")[2:] == ["three", "four"]


def test_server_does_not_start_during_a_restore(store, tmp_path, scripts):
    restore = scripts("restore")
    lock = tmp_path / "chatd.sqlite-lock"
    with lock.open() as ours, restore.locked(store, store.stat()), pytest.raises(BlockingIOError):
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as ours:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_restore_replaces_a_store_only_on_request(store, tmp_path):
    run("backup", "copy", cwd=tmp_path)
    before = names(tmp_path), store.read_bytes()
    line = run("restore", "copy", "sqlite:chatd.sqlite", cwd=tmp_path, code=1)
    assert line == "restore: chatd.sqlite exists: name another file, or replace it with --force\n"
    assert (names(tmp_path), store.read_bytes()) == before


def test_restore_removes_a_stale_write_ahead_log(store, tmp_path):
    """The write-ahead log of the replaced store does not apply to the restored one."""
    run("backup", "copy", cwd=tmp_path)
    for suffix in ("-wal", "-shm", "-journal"):
        (tmp_path / f"new.sqlite{suffix}").write_text(suffix)
    kept = json.loads(run("restore", "--json", "copy", "new.sqlite", cwd=tmp_path))["kept"]
    assert {suffix: (tmp_path / f"{kept}{suffix}").read_text() for suffix in ("-wal", "-shm", "-journal")} == {
        suffix: suffix for suffix in ("-wal", "-shm", "-journal")
    }
    assert texts(tmp_path / "new.sqlite") == texts(store)
    assert [name for name in names(tmp_path) if name.startswith("new.sqlite-")] == ["new.sqlite-lock"]


def test_restore_keeps_another_format(store, tmp_path):
    run_sql(store, "UPDATE log SET written = 77")  # a newer format that this server can read
    run("restore", "chatd.sqlite", "new.sqlite", cwd=tmp_path)
    with closing(sqlite3.connect(tmp_path / "new.sqlite")) as db:
        assert db.execute("SELECT written, readable_since FROM log").fetchone() == (77, sqlite_file.READABLE_SINCE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_restore_by_root_keeps_the_owner(store, tmp_path):
    run("backup", "copy", cwd=tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, 1234, 1235)

    def owners():
        found = [(folder / name).stat() for name in ("new.sqlite", "new.sqlite-lock")]
        return {(one.st_uid, one.st_gid) for one in found}

    run("restore", "copy", "folder/new.sqlite", cwd=tmp_path)
    assert owners() == {(1234, 1235)}
    os.chown(folder / "new.sqlite", 2345, 2346)
    (folder / "new.sqlite").chmod(0o660)
    run("restore", "--force", "copy", "folder/new.sqlite", cwd=tmp_path)
    assert owners() == {(2345, 2346)}
    assert (folder / "new.sqlite").stat().st_mode & 0o777 == 0o660


def test_scripts_share_the_servers_constants(scripts, monkeypatch):
    restore = scripts("restore")
    assert restore.FORMAT == sqlite_file.FORMAT
    assert sys.modules["storefiles"].APPLICATION_ID == sqlite_file.APPLICATION_ID
    drawn = []
    monkeypatch.setattr(secrets, "choice", lambda letters: drawn.append(letters) or letters[len(drawn) % 62])
    restore.new_epoch()
    half = len(drawn)
    base.new_epoch()
    assert drawn[:half] == drawn[half:]
    assert half == 6


# Errors


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def damage(path):
    """Overwrite part of each page except the first."""
    data = bytearray(path.read_bytes())
    for page in range(4096, len(data), 4096):
        data[page + 4000 : page + 4096] = bytes(range(96))
        data[page + 3] ^= 0xFF
    path.write_bytes(data)


NEWER = f"UPDATE log SET readable_since = {sqlite_file.FORMAT + 1}"
DAMAGES = {
    "text": (
        lambda path: path.write_text("messages: none\n" * 1000),
        r"cannot be copied \(file is not a database\): check ",
    ),
    "empty": (lambda path: path.write_bytes(b""), "is not a chatd store: name another file"),
    "foreign": (lambda path: run_sql(path, "PRAGMA application_id = 7"), "is not a chatd store: name another file"),
    "tables": (lambda path: run_sql(path, "DROP TABLE log"), r"cannot be copied \(no such table: log\): check "),
    "truncated": (truncate, r"(cannot be copied|is damaged) \(.+\): "),
    "damaged": (damage, r"(cannot be copied|is damaged) \(.+\): "),
    "missing": (lambda path: path.unlink(), r"cannot be copied \(unable to open database file\): check "),
}


@pytest.mark.parametrize("name", ["backup", "restore"])
@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_store_is_rejected(store, tmp_path, name, what):
    """The script fails and leaves no file."""
    spoil, reason = DAMAGES[what]
    source = tmp_path / "source"
    run("backup", "source", cwd=tmp_path)
    spoil(source)
    present = tmp_path / "present"
    shutil.copy(store, present)
    kept = present.read_bytes()
    for force, place in (([], "absent"), (["--force"], "present")):
        arguments = [*force, "--store=source", place] if name == "backup" else [*force, "source", place]
        assert re.fullmatch(rf"{name}: source {reason}.*\n", run(name, *arguments, cwd=tmp_path, code=1))
    assert present.read_bytes() == kept
    made = {*names(tmp_path)} - {"chatd.sqlite", "chatd.sqlite-lock", "present", "source"}
    assert made <= {"absent-lock", "present-lock"}


def test_backup_of_a_newer_format_is_rejected(store, tmp_path):
    run_sql(store, NEWER)
    run("backup", "copy", cwd=tmp_path)
    line = run("restore", "copy", "new.sqlite", cwd=tmp_path, code=1)
    assert line == (
        f"restore: copy was written by a newer chatd, in a way that needs format {sqlite_file.FORMAT + 1}: "
        "restore it with that version\n"
    )
    assert not (tmp_path / "new.sqlite").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("backup", [], "the following arguments are required: DEST: see --help"),
        ("backup", ["--colour", "a"], "unrecognized arguments: --colour: see --help"),
        ("backup", ["nowhere/copy"], "nowhere cannot be written (No such file or directory): make it, or make it "),
        ("backup", ["."], ". is a folder: name a file in it"),
        ("backup", ["--force", "folder"], "folder is a folder: name a file in it"),
        ("backup", ["--store=memory:", "copy"], "memory: cannot be copied (unable to open database file): "),
        ("restore", ["chatd.sqlite"], "the following arguments are required: PATH: see --help"),
        ("restore", ["chatd.sqlite", "nowhere/new"], "nowhere cannot be used (No such file or directory): "),
    ],
)
def test_error_is_one_line(store, tmp_path, name, arguments, line):
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    assert run(name, *arguments, cwd=tmp_path, code=1).startswith(f"{name}: {line}")
    assert names(tmp_path) == before


DYING = """
import os, runpy, sys
name, when, number, *arguments = sys.argv[1:]
sys.path.insert(0, os.path.dirname(name))
import storefiles
storefiles.PAGES = 1
said = storefiles.show
def show(progress):
    if progress.endswith(when) and progress != "100 %":
        os.kill(os.getpid(), int(number))
storefiles.show = show
sys.argv = [name, *arguments]
runpy.run_path(name, run_name="__main__")
"""


@pytest.mark.parametrize("when", [" %", "verifying"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("arguments", [("backup", "copy"), ("restore", "--force", "chatd.sqlite", "new.sqlite")])
def test_interrupted_script_leaves_no_file(store, tmp_path, arguments, number, when):
    (tmp_path / "new.sqlite").write_text("old")
    (tmp_path / "new.sqlite-lock").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    name, *rest = arguments
    result = subprocess.run(
        [*PYTHON, "-c", DYING, SCRIPTS / name, when, str(int(number)), *rest],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    code = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 1}
    said = f"{name}: interrupted, and nothing was replaced\n" if number == signal.SIGINT else ""
    assert (result.returncode, result.stdout, result.stderr) == (code[number], "", said)
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for suffix in ("-wal", "-shm"):  # SQLite creates these for a reader
        after.pop(tmp_path / f"chatd.sqlite{suffix}", None)
    assert after == before
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [path.name[: path.name.rindex("-")] for path in left] == (
        [f".{rest[-1]}"] if number == signal.SIGKILL else []
    )
