"""The programs of docs/bots.md, run as they stand there against a server with tokens."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
from support.servers import LONG, ROOT, Lines, Raw, Server, environment, need, post
from support.tokens import SECRET, token

PAGE = (ROOT / "docs" / "bots.md").read_text("utf-8")
NAMES = {"python": "bot", "node": "nodebot"}


def block(marker, server):
    """Return the block of code behind a marker of the page, with the address of the server."""
    code = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", PAGE, re.DOTALL)[1]
    return code.replace("localhost:8085", f"127.0.0.1:{server.port}")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "jwt.key").write_bytes(SECRET)
    with Server(folder, "--jwt-key=jwt.key") as server:
        yield server


@pytest.fixture
def ann(server):
    """A person in the room of the bots."""
    with Raw(server.port) as ann:
        ann.join("/rooms/team?events=presence", Authorization=f"Bearer {token('ann')}")
        yield ann


@contextlib.contextmanager
def running(kind, server, folder):
    """Run a bot of the page, as a reader would."""
    (folder / "bot.py").write_text(block("test: python", server))
    (folder / "bot.mjs").write_text(block("test: node", server))
    command = [sys.executable, "bot.py"]
    if kind == "node":
        command = [need("node"), "bot.mjs"]
        with contextlib.suppress(FileExistsError):
            (folder / "node_modules").symlink_to(pathlib.Path(need("ws")).parent)
    claims = {"chatd": {"read": ["team"], "post": ["team"]}}
    bot = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(CHATD_TOKEN=token(NAMES[kind], **claims)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = Lines(bot.stdout)
    try:
        yield
    finally:
        bot.kill()
        bot.wait(LONG)
        lines.close()
        assert lines.text == ""


def say(ann, text):
    ann.send(post("ann", text))


def heard(ann):
    """Return the author and the text of the next message."""
    while (frame := ann.json())["type"] != "message":
        pass
    return frame["data"]["username"], frame["data"]["message"]


def arrival(ann):
    """Wait until there is a second member."""
    while (frame := ann.json())["type"] != "presence" or frame["data"]["count"] < 2:
        pass


@pytest.mark.parametrize("kind", NAMES)
def test_bot_answers_once_and_resumes(kind, server, ann, tmp_path):
    """It answers neither what is older than its first start, nor anything twice."""
    name = NAMES[kind]
    say(ann, "!ping")
    assert heard(ann) == ("ann", "!ping")
    with running(kind, server, tmp_path):
        arrival(ann)
        for text in ("hello", "!ping"):
            say(ann, text)
            assert heard(ann) == ("ann", text)
        assert heard(ann) == (name, "pong, ann")
    say(ann, "!ping")
    assert heard(ann) == ("ann", "!ping")
    with running(kind, server, tmp_path):
        assert heard(ann) == (name, "pong, ann")
        say(ann, "!ping")
        assert [heard(ann), heard(ann)] == [("ann", "!ping"), (name, "pong, ann")]


def test_node_bot_that_lost_its_place(server, ann, tmp_path):
    """It goes through older messages again, and posts no answer twice."""
    with running("node", server, tmp_path):
        arrival(ann)
        say(ann, "!ping")
        assert [heard(ann), heard(ann)] == [("ann", "!ping"), ("nodebot", "pong, ann")]
    (tmp_path / "nodebot.last").write_text(f"{server.epoch}-0")
    with Raw(server.port) as bob, running("node", server, tmp_path):
        bob.join("/rooms/team", Authorization=f"Bearer {token('bob')}")
        bob.send(post("bob", "!ping"))
        assert [heard(ann), heard(ann)] == [("bob", "!ping"), ("nodebot", "pong, bob")]


def test_cron_job_posts_once(server, ann, tmp_path):
    need("curl")
    report, binaries = tmp_path / "report", tmp_path / "bin"
    binaries.mkdir()
    for program, code in (
        (report, block("test: curl", server)),
        (binaries / "df", "#!/bin/sh\necho ' Use%'\necho ' 42%'\n"),
    ):
        program.write_text(code)
        program.chmod(0o755)
    (tmp_path / "report.token").write_text(token("report"))
    environ = environment(PATH=f"{binaries}:{os.environ['PATH']}")
    for _ in range(2):
        subprocess.run([report], cwd=tmp_path, env=environ, check=True, timeout=LONG, capture_output=True)
    assert heard(ann) == ("report", "The disk is 42% full.")
    say(ann, "once?")
    assert heard(ann) == ("ann", "once?")


def test_users_of_one_application_server(tmp_path):
    """With --proxy-hops each of them has a rate of their own."""
    need("curl")
    options = re.search(r"With `(--rate [^`]+)`", PAGE)[1].split()
    with Server(tmp_path, *["=".join(pair) for pair in zip(options[::2], options[1::2], strict=True)]) as server:
        done = subprocess.run(
            ["sh", "-euc", block("test: address", server)],
            env=environment(),
            check=True,
            timeout=LONG,
            capture_output=True,
            text=True,
        )
        assert done.stdout == block("output: address", server)
