"""Exports of real servers, and scripts/erase, which works by them."""

import argparse
import contextlib
import http.client
import json
import pathlib
import socket
import sys
import threading
import urllib.request
from functools import partial

import pytest
from support.redises import Redis
from support.servers import LONG, LOOPBACK, ROOT, Raw, Server, operate, post, program
from support.tokens import SECRET, token

SCRIPT = ROOT / "scripts" / "erase"
STORES = "sqlite:chatd.sqlite", "memory:", "redis"


@pytest.fixture(params=STORES)
def options(request, tmp_path):
    """The options for a server with tokens, and each store in turn."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with contextlib.ExitStack() as stack:
        store = request.param
        if store == "redis":
            store = stack.enter_context(Redis(tmp_path / "redis")).url
        yield "--jwt-key=jwt.key", f"--store={store}"


@pytest.fixture
def server(tmp_path, options):
    with Server(tmp_path, *options, admin=LOOPBACK) as server:
        yield server


def ask(port, path, method="GET", who=None, **document):
    """Send a request of a person; return the JSON of the answer, or the text."""
    headers = {"Content-Type": "application/json"}
    if who is not None:
        headers["Authorization"] = f"Bearer {token(**who)}"
    data = json.dumps(document).encode() if document else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=LONG) as answer:
        return answer.read().decode()


def say(server, sub, text, room="team", **more):
    """Post as a person; return the id."""
    posted = ask(server.port, f"/rooms/{room}/messages", "POST", {"sub": sub}, username=sub, message=text, **more)
    return json.loads(posted)["id"]


def export(port, room="team", who=None, after=None):
    query = "" if after is None else f"?after={after}"
    return [json.loads(line) for line in ask(port, f"/rooms/{room}/export{query}", who=who).splitlines()]


run = partial(operate, "erase")
"""Run the script; return its lines."""


def results(server, *words):
    *rooms, left = map(json.loads, run(server, *words, "--json"))
    assert "backups and exports made before" in left["not_erased"]
    return rooms


def test_erasure_is_whole_and_resumable(server):
    """Everything that one person wrote goes from every room, and nothing else does."""
    first = say(server, "ann", "secret 1")
    other = say(server, "bob", "ann said: hi")
    say(server, "ann", "secret 2", replaces=first)
    second = say(server, "ann", "secret 3")
    third = say(server, "ann", "secret 4", room="quiet")
    before = export(server.port, who={"sub": "bob"})
    assert [line["data"]["message"] for line in before] == ["secret 2", "ann said: hi", "secret 2", "secret 3"]
    assert [line.get("author") for line in export(server.admin_port)] == ["ann", "bob", "ann", "ann"]

    plan = {"room": "team", "dry_run": True, "removed": [first, second], "before": 0, "kept": []}
    quiet = {"room": "quiet", "dry_run": True, "removed": [third], "before": 0, "kept": []}
    assert results(server, "--username", "ann", "--dry-run") == [quiet, plan]
    assert export(server.port, who={"sub": "bob"}) == before
    ask(server.admin_port, f"/rooms/team/messages/{first}", "DELETE")  # as an erasure that was interrupted
    quiet["dry_run"] = False
    done = {"room": "team", "dry_run": False, "removed": [second], "before": 1, "kept": []}
    assert results(server, "--username", "ann") == [quiet, done]
    for room in ("team", "quiet"):
        assert "secret" not in json.dumps(export(server.admin_port, room))
    lines = export(server.port, who={"sub": "bob"})
    assert [line["id"] for line in lines if "removed" not in line] == [other]
    again = run(server, "--username", "ann")
    assert again[:2] == [
        "quiet: 0 messages removed, 1 removed before",
        "team: 0 messages removed, 2 removed before",
    ]
    assert again[2].startswith("The server cannot erase backups and exports made before, ")
    assert len(again) == 3
    assert [line["id"] for line in export(server.admin_port, after=second)] == [line["id"] for line in lines[4:]]


@pytest.mark.parametrize("options", ["memory:"], indirect=True)
def test_subject_and_room_narrow_an_erasure(server):
    """A subject stays when its name changes, and others may have the name."""
    mine = say(server, "ann", "one")
    say(server, "ann", "two", room="other")
    assert results(server, "--subject", "bob", "--dry-run") == []
    assert results(server, "--username", "ann", "--subject", "bob") == []
    assert results(server, "--username", "Ann") == []
    (done,) = results(server, "--subject", "ann", "--room", "team")
    assert (done["room"], done["removed"]) == ("team", [mine])


@pytest.mark.parametrize("options", ["memory:"], indirect=True)
def test_edits_of_the_messages_of_others_are_kept(server):
    """They go only with the message that they edit."""
    message = say(server, "ann", "helo")
    moderator = {"sub": "mod", "chatd": {"moderate": ["*"]}}
    edit = ask(
        server.port, "/rooms/team/messages", "POST", moderator, username="mod", message="hello", replaces=message
    )
    line, _ = run(server, "--username", "mod")
    kept = json.loads(edit)["id"]
    assert line == (
        "team: 0 messages removed, 0 removed before; kept, because they edit messages of others or of nobody any more: "
        f"{kept}"
    )
    line, _ = run(server, "--username", "ann", "--dry-run")
    assert line == f"team: 1 messages to remove, 0 removed before ({message})"


@pytest.mark.parametrize(("code", "goes_on"), [("UNKNOWN_ID", True), ("NOT_REPLACEABLE", True), ("UNAVAILABLE", False)])
def test_message_that_went_meanwhile(monkeypatch, code, goes_on):
    """Another operator or --retain may remove a message after the export."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # also for adminport
    script = program(SCRIPT)

    class Port:
        def lines(self, path):
            yield {"id": "k7Q2-1", "data": {"username": "ann"}}

        def ask(self, method, path):
            raise script.Refused("no", code)

    options = argparse.Namespace(username="ann", subject=None, room="team", dry_run=False)
    try:
        (done, _), _ = script.erase(Port(), options)
        assert (goes_on, done["removed"], done["before"]) == (True, [], 1)
    except script.Refused:
        assert not goes_on
    finally:
        del sys.modules["adminport"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "one of the arguments --username --subject is required: see --help"),
        (["--username", "ann", "--url", "ftp://x"], "--url ftp://x: it is no URL such as http://127.0.0.1:8086"),
        (["--username", "ann", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer ("),
    ],
)
def test_fault_is_one_line(words, line):
    (found,) = run(None, *words, code=1)
    assert found.startswith(f"erase: {line}")


@pytest.mark.parametrize("options", ["memory:"], indirect=True)
def test_refusal_is_one_line(server):
    (line,) = run(server, "--username", "ann", "--room", "Team A", code=1)
    assert line == "erase: Team A is no name of a room, such as team-a"


def test_help_states_the_limits():
    text = "\n".join(run(None, "--help"))
    assert all(word in text for word in ("--dry-run", "run it again", "letter for letter"))
    assert pathlib.Path(SCRIPT).stat().st_mode & 0o111


def test_export_that_is_cut_is_a_fault(tmp_path):
    """The script removes nothing by half of an export."""
    listener = socket.create_server(("127.0.0.1", 0))
    line = b'{"type":"message","id":"k7Q2-1","data":{"username":"ann","message":"hi","timestamp":""}}\n'
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(head + b"%x\r\n%b\r\n" % (len(line), line))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    (fault,) = run(None, "--url", url, "--username", "ann", "--room", "team", code=1)
    assert fault == f"erase: {url} has cut its answer: run this again when the server is ready"
    thread.join(LONG)
    listener.close()


# Exports


def slow_export(port):
    """Begin an export whose bytes wait in the server, because the client has a small buffer and reads nothing."""
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.sock = socket.socket()
    client.sock.settimeout(LONG)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    client.sock.connect(("127.0.0.1", port))
    client.request("GET", "/rooms/team/export")
    return client, client.getresponse()


def test_slow_reader_costs_one_page(tmp_path):
    """The server keeps a page for a reader that stops, and sends the rest when it goes on."""
    with Server(tmp_path, "--store=memory:") as server:
        with Raw(server.port) as poster:
            poster.join("/rooms/team")
            for _ in range(10):
                poster.send(post("ann", "\N{WAVING HAND SIGN}" * 500) * 500)
                for _ in range(500):
                    poster.json()
        before = server.memory()
        clients = [slow_export(server.port) for _ in range(3)]
        for _ in range(200):
            assert ask(server.port, "/rooms/team/presence") == '{"type":"presence","data":{"count":0,"users":[]}}\n'
        assert server.memory() - before < 6 << 20, "the kernel takes less than half of three times 10 MB"
        for client, answer in clients:
            found = [json.loads(line) for line in answer.read().splitlines()]
            assert [line["id"] for line in found] == [f"{server.epoch}-{number}" for number in range(1, 5001)]
            client.close()


def test_export_of_a_stopped_server_resumes_on_the_next(tmp_path):
    with Server(tmp_path) as server:
        with Raw(server.port) as poster:
            poster.join("/rooms/team")
            poster.send(b"".join(post("ann", f"m{number}") for number in range(250)))
            for _ in range(250):
                poster.json()
        first = export(server.port)[:120]
        server.stop()
    with Server(tmp_path) as server:
        rest = export(server.port, after=first[-1]["id"])
    assert [line["data"]["message"] for line in [*first, *rest]] == [f"m{number}" for number in range(250)]


def test_presence_and_rooms_of_two_nodes(tmp_path):
    """A node that has none of the members counts them too."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "jwt.key").write_bytes(SECRET)
    with Redis(tmp_path / "redis") as redis:
        options = "--jwt-key=jwt.key", f"--store={redis.url}"
        with Server(folders[0], *options) as one, Server(folders[1], *options) as two, Raw(one.port) as ann:
            ann.join("/rooms/team", Authorization=f"Bearer {token()}")
            say(one, "ann", "hi")
            with Raw(two.port) as bob:
                bob.join("/rooms/team?events=presence", Authorization=f"Bearer {token('bob')}")
                while (frame := bob.json())["type"] != "presence" or frame["data"]["count"] < 2:
                    pass
            who = {"sub": "bob"}
            found = json.loads(ask(two.port, "/rooms/team/presence", who=who))
            assert found["data"] == {"count": 1, "users": ["ann"]}
            (main, team) = json.loads(ask(two.port, "/rooms", who=who))["rooms"]
            assert (main["name"], main["members"], team["members"], team["id"]) == ("main", 0, 1, f"{one.epoch}-1")
