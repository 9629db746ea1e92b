"""The server under kills, stops, full disks and misbehaving clients."""

import contextlib
import itertools
import json
import os
import random
import re
import select
import selectors
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from support.servers import (
    LONG,
    LOOPBACK,
    Lines,
    Raw,
    Server,
    certificate_for,
    environment,
    missing,
    need,
    numbered,
    post,
    run,
    stored,
    upgrade,
)
from support.websocket_frames import BINARY, CLOSE, PING, PONG, TEXT, close_code, frame
from websockets.sync.client import connect

SEED = [(1, "Alice", "Hello!"), (2, "Bob", "Hi Alice!")]
NAMES = [
    "admin",
    "admin-token-file",
    "compress",
    "config",
    "drain",
    "history",
    "jwks",
    "jwt-audience",
    "jwt-cookie",
    "jwt-issuer",
    "jwt-key",
    "jwt-username",
    "listen",
    "log-format",
    "login-url",
    "max-message",
    "max-per-address",
    "no-page",
    "origin",
    "ping",
    "proxy-hops",
    "rate",
    "retain",
    "rooms",
    "schema",
    "seed",
    "store",
    "store-password-file",
    "stylesheet",
    "title",
    "webhook",
    "webhook-key",
]


def only_line(result):
    """Return the only line on the standard error of a server that did not start; there is no traceback."""
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    return line[line.index("chatd: ") :]


# Killed

KILLS = 50
BURSTERS = 4
WINDOW = 16


class Burster(Raw):
    """Posts numbered messages, WINDOW of them ahead of what it has seen of its own, and checks that what it sees is
    consecutive."""

    def __init__(self, port, name):
        super().__init__(port)
        self.name = name
        self.sent = 0
        self.history = self.join()
        self.cursor = int(self.history["id"].partition("-")[2])

    def post(self, count=1):
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        self.send(b"".join(post(self.name, f"{self.name}-{number}") for number in numbers))

    def see(self, text):
        """Record a broadcast; return its number, its username and its message."""
        assert text["type"] == "message"
        ((number, username, message),) = numbered(text)
        assert number == self.cursor + 1, "in order, each once"
        self.cursor = number
        return number, username, message


def burst(server, names, seen, receipts, epoch):
    """Have clients post as fast as they can, and kill the server when so many broadcasts were received."""
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        clients = [stack.enter_context(Burster(server.port, name)) for name in names]

        def note(client, text):
            assert text["id"].startswith(f"{epoch}-")
            number, username, message = client.see(text)
            assert seen.setdefault(number, (username, message)) == (username, message)
            return username

        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        for client in clients:
            client.post(WINDOW)
        received = 0
        while received < receipts:
            ready = selector.select(LONG)
            assert ready, "nothing came"
            for key, _ in ready:
                texts = key.data.arrived()
                assert texts is not None, server.log.text
                received += len(texts)
                key.data.post([note(key.data, text) for text in texts].count(key.data.name))
        server.kill()
        for client in clients:
            for text in client.texts():
                received += 1
                note(client, text)
        return clients[0].history, sum(client.sent for client in clients), received


def test_fifty_kills(tmp_path, capsys):
    """Every message that a client saw is stored once and in order."""
    chance = random.Random(1)
    path = tmp_path / "chatd.sqlite"
    seen = {number: (username, message) for number, username, message in SEED}
    epoch = None
    sent = received = 0

    def check(server):
        """Check that every broadcast is stored, and that the log has no gap and no duplicate."""
        nonlocal epoch
        found, rows = stored(path)
        epoch = epoch or found
        assert found == epoch == server.epoch
        assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "dense"
        log = {number: (username, message) for number, username, message, _ in rows}
        lost = [number for number, entry in seen.items() if log.get(number) != entry]
        assert lost == [], f"lost={len(lost)} of {len(seen)} seen"
        assert [row[3] for row in rows] == sorted(row[3] for row in rows), "time does not go back"
        said = {}
        for _, username, message, _ in rows[len(SEED) :]:
            said.setdefault(username, []).append(message)
        for username, messages in said.items():
            assert messages == [f"{username}-{number}" for number in range(len(messages))], "each once, in order"
        return [row[:3] for row in rows], len(lost)

    for kill in range(KILLS):
        with Server(tmp_path, "--history=10000") as server:
            rows, _ = check(server)
            names = [f"k{kill}c{client}" for client in range(BURSTERS)]
            history, posted, receipts = burst(server, names, seen, chance.randint(1, 400), epoch)
            sent += posted
            received += receipts
            assert [*numbered(history)] == rows, "a client that joins after the restart has the whole log"

    with Server(tmp_path, "--history=10000") as server:
        rows, lost = check(server)
        assert len(rows) <= 10_000, "the whole of it fits a history"
        with Raw(server.port) as client:
            history = client.join()
        assert history["id"] == f"{epoch}-{len(rows)}"
        assert [*numbered(history)] == rows
    assert len(seen) <= len(rows) < sent + len(SEED), "the kills came in the middle of bursts"
    with capsys.disabled():
        figures = f"kills={KILLS} sent={sent} logged={len(rows)} seen={len(seen)} received={received} lost={lost}"
        sys.stdout.write(f"\n{figures}\n")


def test_memory_store_forgets_all_and_begins_a_new_history(tmp_path):
    epochs = []
    for _ in range(2):
        with Server(tmp_path, "--store=memory:") as server, Raw(server.port) as client:
            assert numbered(client.join()) == SEED
            client.send(post("ann", "hi"))
            assert numbered(client.json()) == [(3, "ann", "hi")]
            epochs.append(server.epoch)
    assert epochs[0] != epochs[1]
    assert [*tmp_path.iterdir()] == []


def test_retain_five_messages(tmp_path):
    """The history has five messages, and the numbers continue."""
    for last, more in ((10, 8), (12, 2)):
        with Server(tmp_path, "--retain=5") as server, Raw(server.port) as client:
            client.join()
            client.send(b"".join(post("ann", f"{number}") for number in range(last - more + 1, last + 1)))
            for _ in range(more):
                client.json()
            with Raw(server.port) as late:
                history = late.join()
            assert numbered(history) == [(number, "ann", f"{number}") for number in range(last - 4, last + 1)]
            assert "more" not in history
    assert [row[0] for row in stored(tmp_path / "chatd.sqlite")[1]] == [8, 9, 10, 11, 12]


def test_short_history_has_more(tmp_path):
    with Server(tmp_path, "--history=1") as server, Raw(server.port) as client:
        history = client.join()
        assert history["more"] is True
        assert numbered(history) == SEED[1:]


# Stopped

POSTS = 500
CROWD = 200


def test_sigterm(tmp_path):
    """Posts are stored and delivered, and clients are asked to reconnect."""
    with Server(tmp_path) as server, Raw(server.port) as sender, Raw(server.port) as reader:
        for client in (sender, reader):
            client.join()
        # The pong proves that all posts were read, not that any was committed.
        sender.send(b"".join(post("ann", f"{number}") for number in range(POSTS)) + frame(PING, b"read"))
        early = []
        while True:
            opcode, payload = sender.frame()
            if opcode == PONG:
                break
            early.append(json.loads(payload))
        server.terminate()
        want = [(number + 3, "ann", f"{number}") for number in range(POSTS)]
        for client, before in ((sender, early), (reader, [])):
            texts = before
            while len(texts) < POSTS:
                texts.append(client.json())
            assert [entry for text in texts for entry in numbered(text)] == want
            assert client.closed() == 1012
        server.stopped()
    assert [row[:3] for row in stored(tmp_path / "chatd.sqlite")[1]] == SEED + want


def test_stop_without_clients(tmp_path):
    with Server(tmp_path, "--drain=3600") as server:
        assert get(server.port, "/healthz")[0] == 200
        server.stop()
    with Server(tmp_path) as server, Raw(server.port) as half:
        half.send(upgrade()[:-2])
        with Raw(server.port) as member:
            member.join()
            server.terminate()
            assert member.closed() == 1012
        server.stopped()


def test_crowd_at_the_stop_is_answered(tmp_path):
    """Clients that the server has not accepted when it stops are admitted, or refused with 503, and none is cut off."""
    with (
        Server(tmp_path, "--drain=30", listen=f"{LOOPBACK}:backlog={CROWD}") as server,
        contextlib.ExitStack() as stack,
    ):
        assert get(server.port, "/healthz")[0] == 200
        server.terminate(signal.SIGSTOP)
        crowd = [stack.enter_context(Raw(server.port)) for _ in range(CROWD)]
        for client in crowd:
            client.send(upgrade())
        server.terminate()
        server.terminate(signal.SIGCONT)
        statuses = {client.head()[0] for client in crowd}
        assert statuses <= {101, 503}
        for client in crowd:
            client.socket.close()
        server.stopped()


def test_unanswered_close_does_not_extend_the_drain(tmp_path):
    with Server(tmp_path, "--drain=1") as server, Raw(server.port) as client:
        client.join()
        server.terminate()
        assert client.frame()[0] == CLOSE
        assert client.rest() == b""
        server.stopped()
        assert "did not answer the close" not in server.log.text


def test_it_runs_as_a_daemon_with_a_pid_file_and_a_log_file(tmp_path):
    pid_file, log_file = tmp_path / "chatd.pid", tmp_path / "chatd.log"
    flags = (f"--pidfile={pid_file}", f"--logfile={log_file}")
    result = run("--listen", LOOPBACK, "--admin=", "--drain=1", cwd=tmp_path, flags=flags)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    # twistd's first process ends when the one that stays has started.
    daemon = os.pidfd_open(int(pid_file.read_text()))
    try:
        port = int(re.search(r"ChatFactory starting on (\d+)", log_file.read_text())[1])
        with Raw(port) as client:
            assert numbered(client.join()) == SEED
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
            assert client.closed() == 1012
        assert select.select([daemon], [], [], LONG)[0], "it ends"
        assert "Server Shut Down" in log_file.read_text()
        assert not pid_file.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
        os.close(daemon)


# Not started


def test_second_server_on_one_store(tmp_path):
    """It ends with one line that gives the reason."""
    with Server(tmp_path) as server:
        result = run("--listen", LOOPBACK, "--admin=", cwd=tmp_path)
        line = only_line(result)
        assert re.fullmatch(
            r"chatd: \S*chatd\.sqlite is in use by another chatd: stop that one, or .* --store .*", line
        )
        with Raw(server.port) as client:
            assert numbered(client.join()) == SEED


@pytest.mark.parametrize("option", ["listen", "admin"])
def test_port_in_use_is_refused_in_one_line(tmp_path, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other = {"listen": "--admin=", "admin": f"--listen={LOOPBACK}"}[option]
        endpoint = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        line = only_line(run(f"--{option}={endpoint}", other, cwd=tmp_path))
        assert line.startswith(f"chatd: cannot listen on {endpoint} (")
        assert "Address already in use" in line
    with Server(tmp_path) as server:
        assert server.epoch, "the store was let go"


def test_what_hinders_the_start_is_one_line_of_json_too(tmp_path):
    (tmp_path / "chatd.sqlite").write_text("This is a diary, and no store of anything.\n" * 100)
    result = run("--log-format=json", "--listen", LOOPBACK, "--admin=", cwd=tmp_path)
    assert result.returncode == 1
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert [event for event in events if "chatd.sqlite is not a chatd store" in event] == events[-1:]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("missing/chatd.sqlite", "missing cannot be written (No such file or directory)"),
        ("folder", "folder cannot be opened"),
        ("newer.sqlite", "was written by a newer chatd, in format 9"),
        ("foreign.sqlite", "foreign.sqlite is not a chatd store: name another file"),
    ],
)
def test_store_that_cannot_be_opened_is_refused_in_one_line(tmp_path, store, reason):
    (tmp_path / "folder").mkdir()
    if store == "newer.sqlite":
        with Server(tmp_path, f"--store=sqlite:{store}"):
            pass
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.sqlite")) as db, db:
        if store == "newer.sqlite":
            db.execute("UPDATE log SET written = 9, readable_since = 9")
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign.sqlite")) as db, db:
        db.execute("CREATE TABLE diary (line)")
    line = only_line(run(f"--store=sqlite:{store}", "--listen", LOOPBACK, "--admin=", cwd=tmp_path))
    assert reason in line
    assert "--store sqlite:PATH" in line or "run that version again" in line


BAD_OPTIONS = [
    (["--bogus"], "there is no option --bogus: "),
    (["--hist=5"], "there is no option --hist: did you mean --history?"),
    (["--config=missing.toml"], "--config: missing.toml cannot be read (No such file or directory): "),
    (["--config=broken.json"], "--config: broken.json is not TOML ("),
    (["extra"], "unexpected argument 'extra': "),
    (["--history"], "argument --history: expected one argument: "),
    (["--history=0"], "--history: '0' is not a whole number from 1 to 10000"),
    (["--history=10001"], "--history: '10001' is not a whole number from 1 to 10000"),
    (["--history=many"], "--history: 'many' is not a whole number from 1 to 10000"),
    (["--retain=0"], "--retain: '0' is neither"),
    (["--retain=5w"], "--retain: '5w' is neither"),
    (["--rate=fast"], "--rate: 'fast' is not a whole number"),
    (["--rate=5:"], "--rate: '' is not a whole number"),
    (["--max-per-address=-1"], "--max-per-address: '-1' is not a whole number"),
    (["--drain=soon"], "--drain: 'soon' is not a whole number"),
    (["--log-format=xml"], "--log-format: 'xml' is neither text nor json"),
    (["--store=postgres:chat"], "--store: 'postgres:chat' is neither"),
    (["--store=sqlite:"], "--store: 'sqlite:' is neither"),
    (["--seed=missing.json"], "--seed: missing.json cannot be read (No such file or directory)"),
    (["--seed=broken.json"], "--seed: broken.json is not JSON"),
    (["--seed=wrong.json"], '--seed: wrong.json message 1: "message" is required'),
    (["--listen=nowhere"], "--listen: 'nowhere' is not a server endpoint"),
    (["--listen=tcp:port"], "--listen: 'tcp:port' is not a server endpoint"),
    (["--admin=ssl:0:privateKey=/no/key.pem"], "--admin: /no/key.pem of 'ssl:0:privateKey=/no/key.pem' cannot be read"),
]


@pytest.mark.parametrize(("options", "reason"), BAD_OPTIONS, ids=[" ".join(options) for options, _ in BAD_OPTIONS])
def test_bad_option_is_refused_in_exactly_one_line(tmp_path, options, reason):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "wrong.json").write_text('[{"username": "ann"}]')
    result = run(*options, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"chatd: {reason}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "wrong.json"]


def test_invalid_value_in_the_environment(tmp_path):
    """The error names the variable."""
    result = run(cwd=tmp_path, env=environment(CHATD_PROXY_HOPS="lots"))
    assert result.returncode == 1
    assert result.stderr == "chatd: CHATD_PROXY_HOPS: 'lots' is not a whole number from 0 to 100\n"


# What it prints and reads


def test_help_names_each_option(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    found = re.findall(r"^  (?:-h, )?--([a-z-]+)", result.stdout, re.MULTILINE)
    assert sorted(found) == sorted([*NAMES, "check", "help", "version"])


def test_command_line_wins_over_environment(tmp_path):
    (tmp_path / "seed.json").write_text(
        json.dumps([{"username": "env", "message": f"{n}", "timestamp": "2024-01-01T00:00:00Z"} for n in range(4)])
    )
    (tmp_path / "chatd.toml").write_text('retain = 3\nhistory = 3\nlisten = ["tcp:1"]')
    env = environment(
        CHATD_LISTEN=f"{LOOPBACK} {LOOPBACK}:backlog=50",
        CHATD_ADMIN=LOOPBACK,
        CHATD_STORE="sqlite:elsewhere.sqlite",
        CHATD_SEED="seed.json",
        CHATD_HISTORY="1",
        CHATD_CONFIG="chatd.toml",
        CHATD_RATE="0",
        CHATD_DRAIN="2",
        CHATD_LOG_FORMAT="json",
    )
    with Server(tmp_path, "--history=2", env=env, listen=None, admin=None) as server:
        ports = [int(match[1]) for match in server.log.wait(r"ChatFactory starting on (\d+)", 2)]
        assert server.admin_port not in ports
        for port in ports:
            with Raw(port) as client:
                assert numbered(client.join()) == [(3, "env", "2"), (4, "env", "3")]
        assert all(json.loads(line) for line in server.log)
        assert (tmp_path / "elsewhere.sqlite").exists()
        assert not (tmp_path / "chatd.sqlite").exists()


# Logged

SECRET = "xyzzy-plugh"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_log_quotes_no_message(tmp_path, log_format):
    """The log has joins and refusals, and no text of a message."""
    with Server(tmp_path, f"--log-format={log_format}", admin=LOOPBACK) as server:
        with Raw(server.port) as client:
            client.join()
            for text in (
                {"username": SECRET, "message": SECRET},
                {"username": SECRET, "message": SECRET, SECRET: SECRET},
                {"username": 7, "message": SECRET * 100},
            ):
                client.send(frame(TEXT, json.dumps(text).encode()))
                client.json()
            client.send(frame(TEXT, f'{{"username":"{SECRET}","message":'.encode()))
            assert client.json() == NOT_JSON
            client.send(frame(TEXT, SECRET.encode() * 2000))
            assert client.closed() == 1009
        for data, code in ((SECRET.encode() + b"\xff", 1007), (SECRET.encode(), None)):
            with Raw(server.port) as client:
                client.join()
                client.send(frame(TEXT, data, bits=0 if code else 7))
                assert client.closed() == (code or 1002)
        with Raw(server.port) as client:
            client.send(upgrade("/nowhere"))
            assert client.head()[0] == 404
        server.stop()
    log = [*server.log]
    assert [*server.errors] == []
    assert SECRET not in server.log.text
    if log_format == "json":
        events = [json.loads(line) for line in log]
        assert all({"time", "level", "system", "event"} <= event.keys() for event in events)
        log = [event["event"] for event in events]
    for pattern in (
        r"listening on tcp:0",
        r"127\.0\.0\.1.*joined main",
        r"127\.0\.0\.1.*sent an invalid frame",
        r"127\.0\.0\.1.*left main: 1009",
        r"127\.0\.0\.1.*refused: 404",
        r"stopping",
        r"stopped",
    ):
        assert any(re.search(pattern, line) for line in log), pattern


# Out of disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    need("root")
    mount, umount = need("mount"), need("umount")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        missing(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run([umount, folder], check=True)


def fill(client, ballast):
    """Post until the disk is full; answers the numbers that came back, and what was refused."""
    numbers = []
    for number in itertools.count():
        client.send(post("ann", f"{number} " + "x" * 480))
        answer = client.json()
        if answer["type"] == "error":
            return numbers, answer
        numbers.append(numbered(answer)[0][0])
        assert number < 2000, "the disk does not fill"
        if number == 5:
            # All but a little of what is left.
            free = os.statvfs(ballast.parent)
            ballast.write_bytes(bytes(max(free.f_bavail * free.f_frsize - (128 << 10), 0)))
    return None


def test_full_disk(tmp_path, small_disk):
    """Only posts are refused, until the disk has room again."""
    ballast = small_disk / "ballast"
    with Server(tmp_path, f"--store=sqlite:{small_disk}/chatd.sqlite", "--history=10000") as server:
        with Raw(server.port) as client, Raw(server.port) as other:
            head = len(numbered(client.join()))
            other.join()
            for _ in range(2):
                numbers, refused = fill(client, ballast)
                assert numbers == list(range(head + 1, head + 1 + len(numbers)))
                head = numbers[-1]
                assert refused == {
                    "type": "error",
                    "message": "The message was not stored; try again.",
                    "code": "UNAVAILABLE",
                }
                assert [numbered(other.json())[0][0] for _ in numbers] == numbers, "the error was its sender's alone"

                # A burst over the full disk: each post is refused or kept, and told so once.
                other.send(b"".join(post("bob", f"{number} " + "y" * 480) for number in range(100)))
                answers = [other.json() for _ in range(100)]
                kept = [text for text in answers if text["type"] == "message"]
                assert {text.get("code") for text in answers if text not in kept} == {"UNAVAILABLE"}
                for text in kept:
                    assert client.json() == text
                    head += 1
                    assert numbered(text)[0][0] == head
                with Raw(server.port) as late:
                    history = late.join()
                    assert [entry[0] for entry in numbered(history)] == list(range(1, head + 1))

                ballast.unlink()
                client.send(post("ann", "room again"))
                head += 1
                assert numbered(client.json()) == [(head, "ann", "room again")]
                assert numbered(other.json()) == [(head, "ann", "room again")]
        server.stop()
    assert [row[0] for row in stored(small_disk / "chatd.sqlite")[1]] == list(range(1, head + 1))


def test_kill_with_a_full_disk(tmp_path, small_disk):
    """Nothing is lost, and the server starts on the full disk."""
    ballast = small_disk / "ballast"
    store = f"--store=sqlite:{small_disk}/chatd.sqlite"
    with Server(tmp_path, store) as server, Raw(server.port) as client:
        client.join()
        numbers, _ = fill(client, ballast)
        server.kill()
    with Server(tmp_path, store, "--history=10000") as server, Raw(server.port) as client:
        assert [entry[0] for entry in numbered(client.join())] == list(range(1, numbers[-1] + 1))
        ballast.unlink()
        client.send(post("ann", "room again"))
        assert numbered(client.json()) == [(numbers[-1] + 1, "ann", "room again")]


# Encrypted


@pytest.fixture
def certificate(tmp_path):
    return certificate_for(tmp_path)


def test_big_burst_over_tls(tmp_path, certificate):
    arguments, trust = certificate
    # This client reads in a thread of its own, and CPython 3.11 takes no lock around OpenSSL (issue 124984).  Under TLS
    # 1.3 the reader handles session tickets while the request is written, and the request is lost: 3 times in 12,000.
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server:
        url = f"wss://127.0.0.1:{server.port}/"
        with connect(url, ssl=trust) as sender, connect(url, ssl=trust) as reader:
            for client in (sender, reader):
                assert numbered(json.loads(client.recv(LONG))) == SEED
            said = [f"{number} " + "é" * 490 for number in range(2000)]
            for text in said:
                sender.send(json.dumps({"username": "ann", "message": text}))
            want = [(number, "ann", text) for number, text in enumerate(said, 3)]
            for client in (sender, reader):
                assert [numbered(json.loads(client.recv(LONG)))[0] for _ in said] == want
            server.terminate()
            for client in (sender, reader):
                with pytest.raises(Exception, match="1012"):
                    client.recv(LONG)
        server.stopped()


# Slow

SLOW = 10


def test_clients_that_do_not_read(tmp_path):
    """They take no memory and delay no other client."""
    said = [f"{number} " + "x" * 480 for number in range(15_000)]
    with Server(tmp_path, "--store=memory:", "--history=2") as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(server.port)) for _ in range(SLOW)]
        sender = stack.enter_context(Raw(server.port))
        for client in (*slow, sender):
            client.join()
        memory = server.memory()
        for begin in range(0, len(said), 100):
            sender.send(b"".join(post("ann", text) for text in said[begin : begin + 100]))
            for number, text in enumerate(said[begin : begin + 100], begin + 3):
                assert numbered(sender.json()) == [(number, "ann", text)]
        # Each slow client has 9 MB left to read.
        assert server.memory() < memory + (32 << 20)
        for client in slow:
            # Clients that read again get every missed message, or the first of them and then 1013.
            numbers = []
            while len(numbers) < len(said):
                opcode, payload = client.frame()
                if opcode == CLOSE:
                    assert close_code(payload) == 1013
                    break
                numbers += [entry[0] for entry in numbered(json.loads(payload))]
            assert numbers == list(range(3, 3 + len(numbers)))
            assert len(numbers) > 0


# Lied to


@pytest.fixture(scope="module")
def common_room(tmp_path_factory):
    """A server for all misbehaving clients, one well-behaved client, and the server's memory at first."""
    with Server(tmp_path_factory.mktemp("common"), admin=LOOPBACK) as server, connect(server.url) as good:
        good.recv(LONG)
        yield server, good, server.memory()


def fragments(client):
    """One message in 100,000 frames, most of them empty."""
    client.send(frame(TEXT, b'{"username":', fin=False) + frame(0, fin=False) * 99_998 + frame(0, b"}"))


@pytest.fixture
def server(common_room):
    """The common server. After each test it still serves the well-behaved client and uses no more memory."""
    server, good, memory = common_room
    yield server
    good.send('{"username":"good","message":"undisturbed"}')
    assert numbered(json.loads(good.recv(LONG)))[0][1:] == ("good", "undisturbed")
    assert server.memory("VmHWM") < memory + (4 << 20), "not for a moment"


def invalid(fault):
    return {"type": "error", "message": fault}


NOT_JSON = invalid("Invalid JSON format.") | {"hint": 'Send a JSON object such as {"username":"ann","message":"hi"}'}
NO_OBJECT = invalid('Validation error: "value" must be of type object')
REFUSED = {
    "nothing": (b"", NOT_JSON),
    "a word": (b"hello", NOT_JSON),
    "half an object": (b'{"username":"ann","message":"hi"', NOT_JSON),
    "two objects": (b'{"username":"ann","message":"hi"}{}', NOT_JSON),
    "an array": (b'[{"username":"ann","message":"hi"}]', NO_OBJECT),
    "a number": (b"1", NO_OBJECT),
    "null": (b"null", NO_OBJECT),
    "a string": (b'"hi"', NO_OBJECT),
    "an empty object": (b"{}", invalid('Validation error: "username" is required')),
    "deep arrays": (b"[" * 8000 + b"]" * 8000, NOT_JSON),
    "deep objects": (b'{"a":' * 2000 + b"1" + b"}" * 2000, NOT_JSON),
    "an unclosed depth": (b"[" * 16_000, NOT_JSON),
    "NaN": (b'{"username":"ann","message":NaN}', NOT_JSON),
    "a lone surrogate": (rb'{"username":"ann","message":"\ud800"}', NOT_JSON),
    "a lone low surrogate": (rb'{"username":"\udc00","message":"hi"}', NOT_JSON),
    "a big integer": (
        b'{"username":18446744073709551616,"message":"hi"}',
        invalid('Validation error: "username" must be a string'),
    ),
    "a null name": (b'{"username":null,"message":"hi"}', invalid('Validation error: "username" must be a string')),
    "an unknown key": (b'{"username":"ann","message":"hi","x":1}', invalid('Validation error: "x" is not allowed')),
    "a long text": (
        b'{"username":"ann","message":"%b"}' % (b"x" * 501),
        invalid('Validation error: "message" length must be less than or equal to 500 characters long'),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_invalid_text(server, what):
    """It gets its error, and the connection stays open."""
    payload, answer = REFUSED[what]
    with Raw(server.port) as client:
        client.join()
        client.send(frame(TEXT, payload))
        assert client.json() == answer
        client.send(frame(PING, b"still there"))
        assert client.frame() == (PONG, b"still there")


def test_integer_of_ten_thousand_digits(server):
    """It is refused, and the connection stays open."""
    with Raw(server.port) as client:
        client.join()
        client.send(frame(TEXT, b'{"username":%b,"message":"hi"}' % (b"9" * 10_000)))
        assert client.json()["type"] == "error"
        client.send(frame(PING))
        assert client.frame() == (PONG, b"")


def test_of_duplicate_keys_the_last_counts(common_room, server):
    _, good, _ = common_room
    with Raw(server.port) as client:
        client.join()
        client.send(frame(TEXT, b'{"username":"ann","message":"one","username":"bob","message":"two"}'))
        assert numbered(client.json())[0][1:] == ("bob", "two")
        assert numbered(json.loads(good.recv(LONG)))[0][1:] == ("bob", "two")


CLOSED = {
    "a text that is not UTF-8": (frame(TEXT, b'{"username":"\xff"}'), 1007),
    "a text that ends in the middle of a character": (frame(TEXT, b'"\xc3'), 1007),
    "a surrogate in UTF-8": (frame(TEXT, b'"\xed\xa0\x80"'), 1007),
    "a binary message": (frame(BINARY, b'{"username":"ann","message":"hi"}'), 1003),
    "an empty binary message": (frame(BINARY), 1003),
    "a frame of ten megabytes": (frame(TEXT, b" " * (10 << 20)), 1009),
    "a frame that says it has an exabyte": (frame(TEXT, b" ", length=1 << 60), 1009),
    "ten megabytes in frames that would do": (
        frame(TEXT, fin=False) + b"".join(frame(0, b" " * 10_000, fin=False) for _ in range(1000)),
        1009,
    ),
    "a length with its highest bit": (frame(TEXT, b" ", length=1 << 63), 1002),
    "a length in more bytes than it needs": (b"\x81\xfe\x00\x01" + bytes(5), 1002),
    "a frame without a mask": (frame(TEXT, b'{"username":"ann","message":"hi"}', masked=False), 1002),
    "a reserved opcode": (frame(3), 1002),
    "a reserved control opcode": (frame(11), 1002),
    "a reserved bit": (frame(TEXT, b"{}", bits=4), 1002),
    "a control frame that is too long": (frame(PING, bytes(126)), 1002),
    "a control frame in two": (frame(PING, fin=False), 1002),
    "a continuation of nothing": (frame(0, b"{}"), 1002),
    "a message within a message": (frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"), 1002),
}


@pytest.mark.parametrize("what", CLOSED)
def test_breach_of_the_protocol_is_closed_with_its_code(server, what):
    data, code = CLOSED[what]
    with Raw(server.port) as client:
        client.join()
        client.send(data)
        assert client.closed() == code


@pytest.mark.parametrize(
    ("payload", "code"),
    [(b"\x03", 1002), (b"\x03\xed", 1002), (b"\x0b\xb8\xff", 1007)],
    ids=["of one byte", "with a code that nobody may send", "with a reason that is not UTF-8"],
)
def test_invalid_close_frame(server, payload, code):
    """The connection ends, and the log has the reason."""
    with Raw(server.port) as client:
        client.join()
        port = client.socket.getsockname()[1]
        client.send(frame(CLOSE, payload))
        client.rest()
    server.log.wait(rf"127\.0\.0\.1:{port} left main: {code}")


def test_close_is_answered_with_a_close(server):
    with Raw(server.port) as client:
        client.join()
        client.send(frame(CLOSE, (1000).to_bytes(2) + b"bye"))
        assert client.closed() == 1000


def test_message_in_a_hundred_thousand_frames(server):
    with Raw(server.port) as client:
        client.join()
        fragments(client)
        assert client.closed() in (1008, 1009)


def test_fragments_with_pings_byte_by_byte(common_room, server):
    _, good, _ = common_room
    data = frame(TEXT, b'{"username":"ann",', fin=False) + frame(PING, b"!") + frame(0, b'"message":"hi"}')
    with Raw(server.port) as client:
        client.join()
        for byte in data:
            client.send(bytes([byte]))
        assert client.frame() == (PONG, b"!")
        assert numbered(client.json())[0][1:] == ("ann", "hi")
        good.recv(LONG)


def test_client_that_goes_without_a_word_is_gone(server):
    for data in (b"", b"\x81", frame(TEXT, b"{", fin=False), frame(TEXT, b"{}", length=5000), frame(CLOSE)):
        with Raw(server.port) as client:
            client.join()
            client.send(data)


HANDSHAKES = {
    "another path": (upgrade("/nowhere"), 404),
    "a path of strange bytes": (upgrade("/%00%0a\N{SNOWMAN}"), (400, 404)),
    "no key": (upgrade(Sec_WebSocket_Key=None), 400),
    "a key of another length": (upgrade(Sec_WebSocket_Key="AAAA"), 400),
    "another version": (upgrade(Sec_WebSocket_Version="12"), (400, 426)),
    "no version": (upgrade(Sec_WebSocket_Version=None), (400, 426)),
    "no host": (upgrade(Host=None), 400),
    "no connection header": (upgrade(Connection=None), 400),
    "another method": (upgrade().replace(b"GET", b"POST"), (400, 405)),
    "an old HTTP": (upgrade().replace(b"HTTP/1.1", b"HTTP/1.0"), (400, 505)),
    "a long head": (upgrade(X_Padding="x" * (16 << 10)), 431),
    "a head without an end": (b"GET / HTTP/1.1\r\nX: " + b"x" * (64 << 10), 431),
    "garbage": (bytes(range(256)) + b"\r\n\r\n", 400),
    "lines of nothing": (b"\r\n\r\n\r\n\r\n", (400, None)),
    "plain HTTP elsewhere": (b"GET /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", 404),
    "a plain POST": (b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 405),
}


@pytest.mark.parametrize("what", HANDSHAKES)
def test_bad_request_is_refused_with_its_status(server, what):
    data, status = HANDSHAKES[what]
    with Raw(server.port) as client:
        client.send(data)
        with contextlib.suppress(OSError):  # it has gone already
            client.socket.shutdown(socket.SHUT_WR)
        answer = client.rest()
    found = int(answer.split(b" ")[1]) if answer else None
    assert found in (status if isinstance(status, tuple) else (status,)), answer[:500]


def get(port, path):
    """Return the answer that the standard library's HTTP client receives."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=LONG) as answer:
            return answer.status, answer.headers.get_content_type(), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get_content_type(), error.read().decode()


def test_plain_http_gets_a_page_and_health_on_both_ports(server):
    for path, content in (("/", 'data-room="main"'), ("/about", server.url)):
        status, kind, page = get(server.port, path)
        assert (status, kind) == (200, "text/html")
        assert content in page
    status, kind, page = get(server.admin_port, "/")
    assert (status, kind) == (200, "text/plain")
    for port in (server.port, server.admin_port):
        assert get(port, "/healthz") == (200, "text/plain", "ok\n")
        assert get(port, "/readyz") == (200, "text/plain", "ready\n")
        assert get(port, "/nowhere")[0] == 404


def test_no_chat_on_the_admin_port(server):
    with Raw(server.admin_port) as client:
        client.send(upgrade())
        assert client.head()[0] == 200


def test_kept_connection_serves_several_requests(server):
    with Raw(server.port) as client:
        for _ in range(3):
            client.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert client.head()[0] == 200
            assert client.take(3) == b"ok\n"


def test_lines_are_read_as_they_come_and_end_with_their_process():
    with subprocess.Popen(["sh", "-c", "echo one; echo two"], stdout=subprocess.PIPE, text=True) as process:
        lines = Lines(process.stdout)
        assert [match[0] for match in lines.wait("o", 2)] == ["o", "o"]
        with pytest.raises(AssertionError, match="three"):
            lines.wait("three")
        lines.close()
