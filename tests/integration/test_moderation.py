"""Bans, mutes and rooms to manage: real servers, real sockets, and scripts/moderate."""

import json
import pathlib
import signal
import subprocess
from functools import partial

import pytest
from support.redises import Redis
from support.servers import LONG, LOOPBACK, ROOT, Raw, Server, operate, post, program, stored, upgrade
from support.websocket_frames import CLOSE

TOKEN = "0123456789abcdef"


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path, admin=LOOPBACK) as server:
        yield server


moderate = partial(operate, "moderate")
"""Run the script; return its lines, of which a failure has one, on standard error."""


def result(server, *words):
    """Run the script with --json; return its only result."""
    (line,) = moderate(server, *words, "--json")
    return json.loads(line)


def fault(server, *words, **environ):
    (line,) = moderate(server, *words, code=1, **environ)
    assert line.startswith("moderate: ")
    return line.removeprefix("moderate: ")


def handshake(port, path="/", before=b"", **headers):
    """Return the status of a handshake."""
    with Raw(port) as client:
        client.send(before + upgrade(path, **headers))
        return client.head()[0]


def closing(client):
    """Return the code and the reason of the close frame, and the frames before it."""
    frames = []
    while True:
        opcode, payload = client.frame()
        if opcode == CLOSE:
            return int.from_bytes(payload[:2]), payload[2:].decode(), frames
        frames.append(json.loads(payload))


def test_ban_closes_refuses_and_survives_a_restart(tmp_path, server):
    """It also is in a backup, and ends when it is lifted."""
    with Raw(server.port) as ann, Raw(server.port) as bob:
        ann.join("/rooms/team?username=ann")
        bob.join("/rooms/team")
        ban = result(server, "ban", "--username", "Ann", "--room", "team", "--for", "2h", "--reason", "spam")
        words = f"You are banned from this room until {ban['expires']}: spam"
        assert closing(ann) == (1008, words, [])
        bob.send(post("bob", "hi"))
        assert bob.json()["data"]["message"] == "hi"
        bob.send(post("ANN", "it's me"))
        error = {"type": "error", "message": words, "code": "FORBIDDEN"}
        code, reason, (frame,) = closing(bob)
        assert (code, reason, {**error, "retry_after": frame["retry_after"]}) == (1008, words, frame)
        assert 7000 < frame["retry_after"] <= 7200
    line = r"chatd\.audit: 127\.0\.0\.1:\d+: ban (\w+) of username 'Ann' in team until .+Z: 'spam'$"
    assert server.log.wait(line)[0][1] == ban["id"]
    server.stop()
    subprocess.run([ROOT / "scripts/backup", "--store", "chatd.sqlite", "copy"], cwd=tmp_path, check=True, timeout=LONG)
    for store in ("chatd.sqlite", "copy"):
        with Server(tmp_path, f"--store=sqlite:{store}", admin=LOOPBACK) as again:
            assert handshake(again.port, "/rooms/team?username=ann") == 403
            assert handshake(again.port, "/rooms/other?username=ann") == 101
            assert moderate(again, "lift", ban["id"]) == [f"{ban['id']} is lifted"]
            assert handshake(again.port, "/rooms/team?username=ann") == 101
            assert moderate(again, "list") == []


def test_addresses_behind_a_proxy(tmp_path):
    """The last trusted proxy names the client, and nothing that the client itself sends counts."""
    with Server(tmp_path, "--proxy-hops=1", admin=LOOPBACK) as server:
        moderate(server, "ban", "--address", "2001:db8::/32")
        moderate(server, "mute", "--address", "203.0.113.7", "--room", "main")
        assert handshake(server.port, X_Forwarded_For="2001:db8::7") == 403
        assert handshake(server.port, X_Forwarded_For="2001:db8::7, 2001:db9::7") == 101
        with Raw(server.port) as muted:
            muted.join(X_Forwarded_For="203.0.113.7")
            muted.send(post("ann", "hi"))
            assert muted.json()["message"] == "You are muted in this room"
        assert len(moderate(server, "list", "--json")) == 2


def test_addresses_in_the_proxy_protocol(tmp_path):
    """The header of the PROXY protocol names the client."""
    with Server(tmp_path, listen=f"haproxy:{LOOPBACK}", admin=LOOPBACK) as server:
        port = int(server.log.wait(r"ChatFactory \(PROXY\) starting on (\d+)")[0][1])
        moderate(server, "ban", "--address", "203.0.113.0/24")
        for address, status in (("203.0.113.7", 403), ("198.51.100.7", 101)):
            assert handshake(port, before=f"PROXY TCP4 {address} 192.0.2.1 1 2\r\n".encode()) == status


def test_ban_is_in_force_on_all_nodes(tmp_path):
    """Another node closes its connections, and a muted client is muted there too."""
    with Redis(tmp_path / "redis") as redis:
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir()
        options = f"--store={redis.url}"
        with Server(folders[0], options, admin=LOOPBACK) as one, Server(folders[1], options, admin=LOOPBACK) as two:
            with Raw(two.port) as ann:
                ann.join("/rooms/team?username=ann")
                moderate(one, "ban", "--username", "ann")
                assert closing(ann)[0] == 1008
            assert handshake(two.port, "/?username=ann") == 403
            (ban,) = (json.loads(line) for line in moderate(two, "list", "--json"))
            with Raw(two.port) as bob:
                bob.join("/rooms/team")
                for word in ("one", "two"):
                    bob.send(post("bob", word))
                    bob.json()
                assert result(one, "clear", "team") == {"room": "team", "removed": 2}
                moderate(one, "lift", ban["id"])
                bob.send(post("bob", "three"))
                assert bob.json()["id"] == f"{two.epoch}-3"


def test_rooms_are_listed_cleared_and_deleted(tmp_path, server):
    """Clients stay, and no number is used twice."""
    with Raw(server.port) as ann:
        for room in ("load-1", "load-2", "team"):
            with Raw(server.port) as poster:
                poster.join(f"/rooms/{room}")
                poster.send(post("bob", "hi"))
                poster.json()
        ann.join("/rooms/team")
        (team,) = (json.loads(line) for line in moderate(server, "rooms", "--match", "team", "--json"))
        assert (team["messages"], team["bytes"], team["members"], team["head"]) == (1, 5, 1, 1)
        lines = moderate(server, "rooms", "--match", "load-*")
        assert [line.split()[0] for line in lines] == ["load-1", "load-2"]
        assert "messages: 1, 5 bytes, members: " in lines[0]
        assert moderate(server, "delete", "load-1", "load-2") == [
            "load-1 is deleted: 1 messages removed",
            "load-2 is deleted: 1 messages removed",
        ]
        assert moderate(server, "clear", "team") == ["team is cleared: 1 messages removed"]
        assert [line.split()[0] for line in moderate(server, "rooms")] == ["main"]
        ann.send(post("ann", "on"))
        assert ann.json()["id"].endswith("-2")
    server.stop()
    assert [row[:3] for row in stored(tmp_path / "chatd.sqlite", "team")[1]] == [(2, "ann", "on")]


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "of unknown size"), (2, "2 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (2_000_000, "1953.1 KiB")],
)
def test_size_of_a_room(number, text, monkeypatch):
    """A size below 1 KiB is in bytes."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    assert program(ROOT / "scripts" / "moderate").size(number) == text


def test_message_is_removed(tmp_path, server):
    """Its text leaves the store, its clients learn it, and the audit log names it."""
    with Raw(server.port) as ann:
        ann.join("/rooms/team")
        ann.send(post("ann", "a secret"))
        message = ann.json()["id"]
        (line,) = moderate(server, "remove", "team", message)
        removal = ann.json()
        assert line == f"{message} is removed: clients learn it by {removal['id']}"
        assert (removal["replaces"], removal["removed"]) == (message, True)
        assert (removal["data"]["username"], removal["data"]["message"]) == ("operator", "[removed]")
        assert (
            fault(server, "remove", "team", message) == "the message is an edit or was removed, and cannot be replaced"
        )
        assert fault(server, "remove", "team", "none-9").startswith("team has no message none-9: ")
    assert f"remove the message {message} of team" in server.log.text
    server.stop()
    assert [row[:3] for row in stored(tmp_path / "chatd.sqlite", "team")[1]] == [
        (1, "ann", "[removed]"),
        (2, "operator", "[removed]"),
    ]


def test_admin_port_with_a_token(tmp_path):
    """The script takes it from a file or from the environment, and SIGHUP replaces it."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with Server(tmp_path, "--admin-token-file=token", admin=LOOPBACK) as server:
        detail = "the admin port needs its token: send Authorization: Bearer TOKEN"
        assert fault(server, "list") == f"{detail}; give it with --token-file or CHATD_ADMIN_TOKEN"
        assert fault(server, "list", CHATD_ADMIN_TOKEN="wrong").startswith(detail)
        assert moderate(server, "--token-file", str(file), "list") == []
        assert moderate(server, "list", CHATD_ADMIN_TOKEN=TOKEN) == []
        with Raw(server.admin_port) as client:
            client.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.head()[0] == 200
        file.write_text("new" * 6)
        server.terminate(signal.SIGHUP)
        server.log.wait("reloading")
        assert moderate(server, "list", "--token-file", str(file)) == []
        assert fault(server, "list", CHATD_ADMIN_TOKEN=TOKEN).startswith(detail)
        assert TOKEN not in server.log.text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["ban", "--username", "ann", "--for", "5"],
            "argument --for: '5' is no time such as 90s, 10m, 2h or 7d: see --help",
        ),
        (["ban"], "one of the arguments --username --subject --address is required: see --help"),
        (
            ["ban", "--username", "a", "--address", "::1"],
            "argument --address: not allowed with argument --username: see --help",
        ),
        (["list", "--url", "ftp://x"], "--url ftp://x: it is no URL such as http://127.0.0.1:8086"),
        (["list", "--token-file", "/none"], "--token-file /none: it cannot be read (No such file or directory): "),
        (
            ["list", "--url", "http://127.0.0.1:1"],
            "http://127.0.0.1:1 does not answer ([Errno 111] Connection refused): ",
        ),
    ],
)
def test_fault_is_one_line(words, line):
    assert fault(None, *words).startswith(line)


def test_refusal_is_one_line(server):
    """The script gives the server's reason, and recognizes an unknown id and a port of something else."""
    assert fault(server, "lift", "x/y") == "no ban or mute has the id x/y: see the ids with list"
    assert fault(server, "mute", "--address", "0.0.0.0/0").startswith("address: 0.0.0.0/0 stands for everyone")
    assert fault(server, "ban", "--username", "ann", "--room", "Team A").startswith("room: a name such as team-a")
    assert fault(server, "delete", "Team A") == "Team A is no name of a room, such as team-a"
    clients = f"http://127.0.0.1:{server.port}"
    wrong = f"{clients} answers 404, and is no admin port of chatd: name that with --url"
    assert fault(None, "--url", clients, "list") == wrong


def test_rooms_of_many_pages(monkeypatch):
    """The script reads on until there is no next page."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    port = program(ROOT / "scripts" / "adminport.py").AdminPort("http://localhost", None)
    pages = {
        "/rooms?limit=1000": {"rooms": [{"name": "a"}], "next": "a"},
        "/rooms?limit=1000&after=a": {"rooms": [{"name": "b"}]},
    }
    monkeypatch.setattr(port, "ask", lambda method, path: pages[path])
    assert [room["name"] for room in port.rooms()] == ["a", "b"]


def test_help_names_every_command():
    text = "\n".join(moderate(None, "--help"))
    assert all(
        f"\n    {name} " in text for name in ("ban", "mute", "lift", "list", "remove", "rooms", "clear", "delete")
    )
    assert pathlib.Path(ROOT / "scripts/moderate").stat().st_mode & 0o111
