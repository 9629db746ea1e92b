"""`twistd chatd --check` as a process, and the Redis user of docs/operations.md."""

import http.client
import json
import re
import resource
import shlex
import socket
import subprocess
import sys
from contextlib import closing

import pytest
from support.receivers import SECRET as HOOK_KEY
from support.receivers import Receiver
from support.redises import Redis, each_binary
from support.servers import LONG, LOOPBACK, ROOT, TWISTD, Raw, Server, certificate_for, environment, numbered
from support.threads import serving
from support.tokens import SECRET, token
from support.websocket_frames import TEXT, frame

from chatd.config import Configuration
from chatd.operate import check
from chatd.operate.check import findings
from chatd.operate.machine import ThisMachine


def run_check(folder, *options, files=None, **environ):
    """Run `twistd chatd --check`; return the exit status and the lines."""
    result = subprocess.run(
        [sys.executable, TWISTD, "-n", "--pidfile=", "chatd", "--check", *options],
        cwd=folder,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
        preexec_fn=files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))),
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def test_process_prints_its_findings_and_leaves_no_trace(tmp_path):
    """A check connects to no port and creates no file; its findings make the exit status 1."""
    arguments, _ = certificate_for(tmp_path)
    (tmp_path / "key.pem").chmod(0o644)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        options = (f"--listen=ssl:{port}:{arguments}", "--admin=", "--store=sqlite:nowhere/chatd.sqlite", "--ping=61")
        code, lines = run_check(tmp_path, *options, files=200)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()  # the check did not connect
    assert code == 1
    listen = f"--listen ssl:{port}:{arguments}"
    for line, begin in zip(
        lines,
        [
            f"note: {listen}: everyone who reaches this port can read and post",
            f"{listen}: port {port} is in use: ",
            f"{listen}: every user of this machine can read the private key: chmod o= key.pem, ",
            "--store sqlite:nowhere/chatd.sqlite: nowhere is missing, ",
            "--ping 61: ",
            "open files: the limit of 200 leaves room for 136 clients: ",
        ],
        strict=True,
    ):
        assert line.startswith(begin)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_process_without_findings_leaves_no_trace(tmp_path):
    """A check without findings notes the port for everyone, and exits with status 0."""
    options = "--listen=tcp:0", "--admin=", "--store=sqlite:a.sqlite"
    settings = Configuration(options, {}).settings._replace(folder=tmp_path)
    expected = findings(settings, ThisMachine())  # the machine of the tests may have problems
    code, (note, *lines) = run_check(tmp_path, *options)
    assert note.startswith("note: --listen tcp:0: everyone who reaches this port can read and post")
    assert (code, lines) == (1 if expected else 0, expected)
    assert [*tmp_path.iterdir()] == []


def test_process_checks_redis_and_leaves_no_trace(tmp_path):
    """A check reads the settings of Redis, creates no key, and prints no password."""
    with Redis(tmp_path / "redis", user=("chatd", "se/cret"), maxmemory_policy="allkeys-lfu") as redis:
        (tmp_path / "password").write_text("se/cret\n")
        (tmp_path / "password").chmod(0o600)
        url = f"redis://chatd@localhost:{redis.port}"
        options = "--listen=tcp:0", "--admin="
        code, lines = run_check(tmp_path, *options, f"--store={url}", CHATD_STORE_PASSWORD_FILE="password")
        assert code == 1
        shown = f"--store redis://***@localhost:{redis.port}"
        for line, begin in zip(
            [line for line in lines if line.startswith("--store")],
            ["with maxmemory-policy allkeys-lfu, short memory ", "a kill of Redis loses the messages since "],
            strict=True,
        ):
            assert line.startswith(f"{shown}: {begin}")
        code, lines = run_check(tmp_path, *options, f"--store={redis.url}")
        assert "every user of this machine can see the password" in lines[1]
        assert "cret" not in "\n".join(lines)
        assert redis.call("KEYS", "*") == []


# The Redis user of operations.md


def documented_user():
    """Return the words of the documented `ACL SETUSER`, and those that --check needs in addition."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    command, more = re.search(
        r"(?s)<!-- test: acl -->\n```sh\nredis-cli (.+?)\n```\n+and `(.+?)` for `--check`", page
    ).groups()
    return shlex.split(command.replace("\\\n", "")), shlex.split(more)


def test_redis_user_has_exactly_the_commands_of_the_code():
    """The documented user may run every command that the store uses, and no other."""
    scripts = "".join(path.read_text() for path in (ROOT / "chatd" / "store" / "redis" / "lua").iterdir())
    asked = {*re.findall(r"redis\.p?call\('(\w+)'", scripts)}
    for path in (ROOT / "chatd" / "store" / "redis").glob("*.py"):
        asked |= {*re.findall(r"\bask\(\s*\"(\w+)\"", path.read_text())}
    asked = {word.lower() for word in asked - {"AUTH", "SCRIPT"}} | {"script|load"}  # every user may log in
    assert {word[1:] for word in documented_user()[0] if word.startswith("+")} == asked


@each_binary
def binary(request):
    return request.param


def test_redis_user_may_run_a_server_and_a_check(tmp_path, binary):
    """Redis denies the documented user nothing that a server, or a check with the added rights, asks for."""
    words, more = documented_user()
    assert words[2:5] == ["chatd", "on", ">PASSWORD"]
    with serving(Receiver()) as app, Redis(tmp_path / "redis", binary=binary, appendonly=True, fsync="always") as redis:
        redis.call(*words)
        store = f"--store=redis://chatd:PASSWORD@localhost:{redis.port}/3"
        (tmp_path / "keys").write_text(HOOK_KEY)
        options = store, "--retain=5", f"--webhook={app.url}", "--webhook-key=keys"
        with Server(tmp_path, *options) as server, Raw(server.port) as ann, Raw(server.port) as bob:
            server.log.wait("this node delivers")
            ann.join("/?events=presence,typing&username=ann")
            bob.join("/?events=presence,typing&username=bob")
            said = [json.dumps({"username": "bob", "message": "hi", "label": f"{number}"}) for number in range(9)]
            bob.send(b"".join(frame(TEXT, text.encode()) for text in said))
            acks = []
            while len(acks) < len(said):
                text = bob.json()
                assert text["type"] in ("presence", "message", "ack"), text
                acks += [text["id"]] if text["type"] == "ack" else []
            bob.send(frame(TEXT, json.dumps({"type": "history", "after": acks[-4], "label": "h"}).encode()))
            while (text := bob.json())["type"] == "presence":
                pass
            assert [number for number, *_ in numbered(text)] == [9, 10, 11]
            app.wait(lambda app: len(app.ids) > 0)
            server.stop()
            assert "NOPERM" not in server.log.text
        with Server(tmp_path, store, "--retain=1d") as server:  # trims by age at the start
            server.stop()
        assert redis.call("ACL", "LOG") == []
        redis.call("ACL", "SETUSER", "chatd", *more)
        asked = ThisMachine().ask(check.Server("localhost", redis.port, False, ("chatd", "PASSWORD"), 3))  # noqa: FBT003
        assert (asked["role"], asked["appendfsync"]) == ("master", "always")
        assert redis.call("ACL", "LOG") == []


def test_redis_user_may_moderate_and_erase(tmp_path, binary):
    """Redis denies the documented user nothing that an edit, a removal, a ban or a cleared room asks for."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Redis(tmp_path / "redis", binary=binary) as redis:
        redis.call(*documented_user()[0])
        store = f"--store=redis://chatd:PASSWORD@localhost:{redis.port}"
        with Server(tmp_path, store, "--jwt-key=jwt.key", admin=LOOPBACK) as server, Raw(server.port) as ann:
            bearer = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}

            def ask(port, method, path, document=None, **headers):
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
                    connection.request(method, path, json.dumps(document) if document else "", headers)
                    return json.loads(connection.getresponse().read() or "{}")

            def send(**document):
                ann.send(frame(TEXT, json.dumps(document).encode()))
                answer = ann.json()
                assert answer["type"] == "message"
                return answer["id"]

            ann.join(**bearer)
            first = send(username="ann", message="helo")
            send(username="ann", message="hello", replaces=first)
            send(type="remove", id=first)
            assert ask(server.port, "POST", "/rooms/b/messages", {"username": "ann", "message": "hi"}, **bearer)["id"]
            ban = ask(server.admin_port, "POST", "/sanctions", {"kind": "ban", "username": "bob"})
            assert ask(server.admin_port, "DELETE", f"/sanctions/{ban['id']}") == {}
            assert [room["name"] for room in ask(server.admin_port, "GET", "/rooms")["rooms"]] == ["b", "main"]
            assert ask(server.admin_port, "DELETE", "/rooms/b")["removed"] == 1
            server.stop()  # it erases before it ends
            assert "NOPERM" not in server.log.text
        assert redis.call("EXISTS", "{chatd}:erase") == 0
        assert redis.call("ACL", "LOG") == []
