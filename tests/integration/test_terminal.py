"""The terminal chat against real servers: in this process, in pipes, and in pseudo-terminals."""

import asyncio
import contextlib
import importlib
import json
import os
import pathlib
import re
import runpy
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from support.loops import asynchronous
from support.servers import LONG, Server, certificate_for, stored
from support.terminals import COMMAND, Tty, terminal_environment
from support.tokens import SECRET, token

from chatd.client.aio import Client
from chatd.client.terminal import arguments, program

CTRL_C, CTRL_D, ENTER, UP = "\x03", "\x04", "\r", "\x1b[A"


def url(server, room="main"):
    return f"{server.url}rooms/{room}"


def messages(folder, room="main"):
    return [row[2] for row in stored(folder / "chatd.sqlite", room)[1]]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """Keep the outbox of each test apart, and leave no process behind."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("CHATD_TOKEN", raising=False)
    yield
    while Tty.started:
        Tty.started.pop().kill()


# In this process


@contextlib.contextmanager
def streams(monkeypatch, *, given=None):
    """Lend pipes as standard input and output; yield the ends of the test.  With `given`, the input is that."""
    input_, to_input = os.pipe()
    from_output, output = os.pipe()
    monkeypatch.setattr(program, "STDIN", input_)
    monkeypatch.setattr(program, "STDOUT", output)
    writer, reader = os.fdopen(to_input, "wb", buffering=0), os.fdopen(from_output, "rb")
    if given is not None:
        writer.write(given)
        writer.close()
    try:
        yield writer, reader
    finally:
        for one in (writer, reader):
            one.close()
        for one in (input_, output):
            os.close(one)


def start(server, *words, room="main"):
    return asyncio.create_task(program.run(arguments.parse([url(server, room), "--name=ann", *words], os.environ)))


async def follow(server, count, room="main"):
    """Wait until a room has some entries, and return their texts."""
    async with Client(f"http://127.0.0.1:{server.port}") as client:
        texts = []
        async for entry in client.room(room):
            texts.append(entry.message)
            if len(texts) == count:
                break
        return texts


@asynchronous
async def test_lines_are_posted(tmp_path, monkeypatch, capsys):
    """All are stored in order, and then the status is 0."""
    given = "".join(f"line {number}\n" for number in range(200)).encode()
    with Server(tmp_path) as server, streams(monkeypatch, given=given):
        assert await start(server, "--post", room="logs") == 0
    assert messages(tmp_path, "logs") == [f"line {number}" for number in range(200)]
    assert capsys.readouterr().err == ""


@asynchronous
async def test_refused_line_is_a_failure(tmp_path, monkeypatch, capsys):
    """The others are stored."""
    with Server(tmp_path) as server, streams(monkeypatch, given=b"one\n" + b"x" * 501 + b"\ntwo\n"):
        assert await start(server, "--post", "--split=600", room="logs") == 1
    assert messages(tmp_path, "logs") == ["one", "two"]
    assert re.fullmatch(r"chatd\.client: the server refused 1 message \(.*\)\n", capsys.readouterr().err)


@asynchronous
async def test_interrupted_poster_waits_for_its_posts(tmp_path, monkeypatch, capsys):
    """The status is 0 if all that was read is stored."""
    with Server(tmp_path) as server, streams(monkeypatch) as (writer, _):
        posting = start(server, "--post", room="logs")
        writer.write(b"one\n")
        await follow(server, 1, "logs")
        os.kill(os.getpid(), signal.SIGINT)
        assert await posting == 0
    assert capsys.readouterr().err == ""


@asynchronous
async def test_interrupted_poster_that_is_offline(tmp_path, monkeypatch, capsys):
    """It reports once that it tries again, and at the end what may be lost."""
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.01)
    with Server(tmp_path) as server:
        port = server.port
    words = [f"ws://127.0.0.1:{port}/", "--post", "--name=ann"]
    with streams(monkeypatch, given=b"one\ntwo\n"):
        posting = asyncio.create_task(program.run(arguments.parse(words, {})))
        err = ""
        while "trying again" not in err:
            await asyncio.sleep(0.01)
            err += capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        assert await posting == 1
    assert err == "chatd.client: connection refused: trying again until the server answers\n"
    after = capsys.readouterr().err
    assert after == "chatd.client: 2 messages may not be stored, because the program was stopped\n"


@asynchronous
async def test_poster_whose_server_cannot_store(tmp_path, monkeypatch, capsys):
    """While the server rejects posts for now, one line reports that none is stored."""
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(program, "SILENT_SECONDS", 0.1)
    with Server(tmp_path) as server, streams(monkeypatch, given=b"one\n"):
        (tmp_path / "chatd.sqlite").rename(tmp_path / "moved.sqlite")
        posting = start(server, "--post", room="logs")
        err = ""
        while "readyz" not in err:
            await asyncio.sleep(0.01)
            err += capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        assert await posting == 1
    assert err == ("chatd.client: no post was stored for 0.1 s: trying again; the server's /readyz gives the reason\n")


@asynchronous
async def test_poster_survives_a_killed_server(tmp_path, monkeypatch, capsys):
    with streams(monkeypatch) as (writer, _):
        with Server(tmp_path) as server:
            port = server.port
            posting = start(server, "--post", room="logs")
            writer.write(b"one\n")
            await follow(server, 1, "logs")
            server.kill()
        writer.write(b"two\n")
        writer.close()
        with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
            assert await posting == 0
    assert messages(tmp_path, "logs") == ["one", "two"]
    assert capsys.readouterr().err.endswith("chatd.client: connected\n")


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--rooms=main", "the server has no room 'logs'"),
        ("--jwt-key=jwt.key", "the server needs a valid token"),
    ],
)
@asynchronous
async def test_refused_client_is_one_line(tmp_path, monkeypatch, capsys, option, remedy):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, option) as server:
        for words in (["--post"], ["--json"], []):
            with streams(monkeypatch, given=b"one\n"):
                assert await start(server, *words, room="logs") == 1
            err = capsys.readouterr().err
            assert err.startswith(f"chatd.client: {remedy}")
            assert err.count("\n") == 1


@asynchronous
async def test_name_that_is_not_in_the_token(tmp_path, monkeypatch, capsys):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    monkeypatch.setenv("CHATD_TOKEN", token("bea"))
    with Server(tmp_path, "--jwt-key=jwt.key") as server, streams(monkeypatch, given=b"one\n"):
        assert await start(server, "--post") == 1
    assert "check --name and the token" in capsys.readouterr().err


@asynchronous
async def test_messages_are_printed(tmp_path, monkeypatch, capsys):
    with Server(tmp_path) as server, streams(monkeypatch) as (_, reader):
        reading = start(server)
        lines = [await asyncio.to_thread(reader.readline) for _ in range(2)]
        async with Client(f"http://127.0.0.1:{server.port}", username="bea") as client:
            await client.room().post("one\n\x1b[2J")
        lines.append(await asyncio.to_thread(reader.readline))
        reader.close()
        assert await reading == 0
    fields = [line.decode().rstrip("\n").split("\t") for line in lines]
    assert [field[1:] for field in fields] == [["Alice", "Hello!"], ["Bob", "Hi Alice!"], ["bea", "one␊␛[2J"]]
    assert capsys.readouterr().err == ""


@asynchronous
async def test_messages_as_json(tmp_path, monkeypatch):
    with Server(tmp_path) as server, streams(monkeypatch) as (_, reader):
        reading = start(server, "--json")
        document = json.loads(await asyncio.to_thread(reader.readline))
        reader.close()
        assert await reading == 0
        assert document["id"] == f"{server.epoch}-1"
    assert document["type"] == "message"
    assert document["data"]["username"] == "Alice"


@asynchronous
async def test_reader_that_has_gone(tmp_path, monkeypatch, capsys):
    """The program ends quietly, although no message is written."""
    with Server(tmp_path) as server, streams(monkeypatch) as (_, reader):
        reading = start(server)
        await asyncio.to_thread(reader.readline)
        reader.close()
        assert await reading == 0
    assert capsys.readouterr().err == ""


@asynchronous
async def test_reader_that_has_gone_before_a_write(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "watch_reader", lambda *_: None)
    with Server(tmp_path) as server, streams(monkeypatch) as (_, reader):
        reader.close()
        assert await start(server) == 0


@asynchronous
async def test_token_file_is_read_again(tmp_path, monkeypatch):
    """The client reads the next token from the file when the server has refused the first one."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    path = tmp_path / "token"
    old, new = token("ann", secret=b"another secret of at least 32 bytes"), token("ann")
    path.write_text(old)
    real, read = arguments.token_source, []

    def source(*given):
        def counted():
            read.append(real(*given)())
            if len(read) == 2:  # the command line has read the name, and the client the token
                path.write_text(new)
            return read[-1]

        return counted

    monkeypatch.setattr(arguments, "token_source", source)
    with Server(tmp_path, "--jwt-key=jwt.key") as server, streams(monkeypatch, given=b"hi\n"):
        assert await start(server, "--post", f"--token-file={path}") == 0
    assert read == [old, old, new]
    assert messages(tmp_path)[2:] == ["hi"]


def readable(files, *_):
    """Return what select() does at once, also in a process with more than 1,024 open files, as that of the tests."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [file for file, _ in poll.poll(0)], [], []


@contextlib.contextmanager
def screen(monkeypatch):
    """Lend a terminal without a screen; yield the keyboard."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(program.os, "isatty", lambda _: True)
    monkeypatch.setattr("prompt_toolkit.input.posix_utils.select", SimpleNamespace(select=readable))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


@asynchronous
async def test_conversation(tmp_path, monkeypatch, capsys):
    """Lines that were typed before Ctrl-D are stored."""
    with Server(tmp_path) as server, screen(monkeypatch) as keys:
        talking = start(server)
        keys.send_text("hi" + ENTER)
        assert (await follow(server, 3))[-1] == "hi"
        keys.send_text("ho" + ENTER + CTRL_D)
        assert await talking == 0
    assert messages(tmp_path)[2:] == ["hi", "ho"]
    assert capsys.readouterr().err == ""


@asynchronous
async def test_edit_with_a_token(tmp_path, monkeypatch):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    monkeypatch.setenv("CHATD_TOKEN", token("ann"))
    with Server(tmp_path, "--jwt-key=jwt.key") as server, screen(monkeypatch) as keys:
        talking = start(server)
        keys.send_text("hi" + ENTER)
        async with Client(f"http://127.0.0.1:{server.port}", token=token("bea"), username="bea") as client:
            async for entry in client.room():
                if entry.message == "hi":
                    break
            keys.send_text(UP + " there" + ENTER)
            async for entry in client.room():
                if entry.replaces:
                    break
        keys.send_text(CTRL_D)
        assert await talking == 0
    assert entry.message == "hi there"


@asynchronous
async def test_message_typed_offline_is_sent_by_the_next_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.01)
    with Server(tmp_path) as server:
        port = server.port
    with screen(monkeypatch) as keys:
        keys.send_text("offline" + ENTER + CTRL_D)
        assert await start(server) == 0
    assert "1 message is in the outbox" in capsys.readouterr().err
    with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1") as server, screen(monkeypatch) as keys:
        talking = start(server)
        assert (await follow(server, 3))[-1] == "offline"
        keys.send_text(CTRL_D)
        assert await talking == 0
    assert messages(tmp_path)[2:] == ["offline"]


@asynchronous
async def test_outbox_without_a_place(tmp_path, monkeypatch, capsys):
    """The program goes on, and the user knows what that means."""
    (tmp_path / "state").write_text("a file")
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.01)
    with Server(tmp_path) as server:
        pass
    with screen(monkeypatch) as keys:
        keys.send_text("offline" + ENTER + CTRL_D)
        assert await start(server) == 0
    assert "1 message is lost, because the outbox could not be kept" in capsys.readouterr().err


@asynchronous
async def test_refused_conversation(tmp_path, monkeypatch, capsys):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server, screen(monkeypatch):
        assert await start(server) == 1
    err = capsys.readouterr().err
    assert "use --token-file FILE, or CHATD_TOKEN" in err
    assert err.count("\n") == 1


@asynchronous
async def test_dumb_terminal(tmp_path, monkeypatch, capsys):
    with Server(tmp_path) as server, streams(monkeypatch) as (writer, _), screen(monkeypatch):
        monkeypatch.setenv("TERM", "dumb")
        talking = start(server)
        writer.write(b"hi\n")
        await follow(server, 3)
        writer.write(b"/quit\n")
        assert await talking == 0
    out = capsys.readouterr().out
    assert "Alice: Hello!" in out
    assert "-- online" in out
    assert "\x1b" not in out


def test_input_that_is_no_terminal(monkeypatch, capsys):
    """Its lines are neither posted nor dropped in silence."""
    monkeypatch.setattr(program.os, "isatty", lambda descriptor: descriptor == program.STDOUT)
    assert program.main(["ws://127.0.0.1:1/"]) == 2
    assert capsys.readouterr().err.startswith("chatd.client: standard input is not a terminal: use --post")
    assert program.main(["ws://127.0.0.1:1/"], "chatd client") == 2
    assert capsys.readouterr().err.startswith("client: standard input is not a terminal: use --post")


def test_run_as_a_program(tmp_path, monkeypatch):
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        monkeypatch.setattr(sys, "argv", ["chatd.client", server.url, "--post"])
        with streams(monkeypatch, given=b"hi\n"), pytest.raises(SystemExit) as ended:
            runpy.run_module("chatd.client", run_name="__main__", alter_sys=False)
    assert ended.value.code == 1


def test_import_runs_nothing():
    """Tools that import every module start no chat."""
    assert importlib.import_module("chatd.client.__main__").main is program.main
    del sys.modules["chatd.client.__main__"]  # else runpy warns of it


def test_folder_of_the_outbox(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert program.state_folder({"XDG_STATE_HOME": "/state"}) == pathlib.Path("/state/chatd")
    assert program.state_folder({"XDG_STATE_HOME": "relative"}) == pathlib.Path("/h/.local/state/chatd")
    assert program.state_folder({}) == pathlib.Path("/h/.local/state/chatd")


# In pipes and pseudo-terminals


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ex\r12:00   bea: forged\n12:01   bea: forged"


def say(server, username, message):
    """Post a message as another person."""

    async def post():
        async with Client(f"http://127.0.0.1:{server.port}", username=username) as client:
            await client.room().post(message)

    asyncio.run(post())


@pytest.mark.parametrize("changes", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_hostile_message_in_a_terminal(tmp_path, changes):
    """It neither sets the title, moves the cursor nor forges a line; and at the end the terminal is as it was."""
    with Server(tmp_path) as server:
        tty = Tty(tmp_path, server.url, "--name=ann", **({"TERM": "xterm"} | changes))
        tty.wait("online")
        say(server, "e\x1b[1Avil", HOSTILE)
        tty.type("hi\r")
        tty.wait("ann(\x1b[^m]*m)*: hi")
        tty.type(CTRL_D)
        assert tty.end() == (0, True)
    assert "e␛[1Avil" in tty.output
    assert "␛]0;owned␇␛[2J\ufffd31m\ufffdx␍12:00   bea: forged" in tty.output
    assert "\n        12:01   bea: forged" in tty.output
    assert not re.search("\x1b\\]|\x9b|\u202e|\x1b\\[2J|\x1b\\[1A[^\x1b]*vil", tty.output)
    assert bool(re.search("\x1b\\[(\\d+;)*[39][0-7][;m]", tty.output)) == (changes == {})


def test_outbox_after_a_kill(tmp_path):
    """A message typed offline is stored once, although SIGKILL ends the program and two others send it."""
    with Server(tmp_path) as server:
        port, url_ = server.port, server.url
    tty = Tty(tmp_path, url_, "--name=ann")
    tty.wait("offline \\(connection refused\\), reconnecting in \\d+ s")
    tty.type("typed offline\r")
    tty.wait("unsent: typed offline")
    tty.process.kill()
    tty.end()
    both = [Tty(tmp_path, url_, "--name=ann") for _ in range(2)]
    for one in both:
        one.wait("unsent: typed offline")
    with Server(tmp_path, listen=f"tcp:{port}:interface=127.0.0.1"):
        for one in both:
            one.wait("ann(\x1b[^m]*m)*: typed offline")
            one.type(CTRL_D)
        assert [one.end() for one in both] == [(0, True)] * 2
    assert messages(tmp_path)[2:] == ["typed offline"]


def test_full_disk_under_the_output(tmp_path):
    with Server(tmp_path) as server, pathlib.Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, server.url],
            env=terminal_environment(tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=LONG,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == b"chatd.client: standard output cannot be written: No space left on device\n"


@asynchronous
async def test_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    with Server(tmp_path) as server, streams(monkeypatch):
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(program, "STDOUT", full)
        assert await start(server) == 1
        os.close(full)
    assert "No space left on device" in capsys.readouterr().err


def test_interrupt_of_a_reader(tmp_path):
    """It ends the program at once and quietly, even while nobody takes what it writes."""
    with Server(tmp_path) as server:
        asyncio.run(fill(server, 200))
        reading = subprocess.Popen(
            [*COMMAND, server.url],
            env=terminal_environment(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pipesize=4096,
        )
        reading.stdout.read(1)
        reading.send_signal(signal.SIGINT)
        _, err = reading.communicate(timeout=LONG)
    assert (reading.returncode, err) == (-signal.SIGINT, b"")


async def fill(server, count):
    """Post long messages."""
    async with Client(f"http://127.0.0.1:{server.port}", username="bea") as client:
        await asyncio.gather(*(client.room().post("x" * 500) for _ in range(count)))


def test_signal_leaves_the_terminal_as_it_was(tmp_path):
    with Server(tmp_path) as server:
        tty = Tty(tmp_path, server.url, "--name=ann")
        tty.wait("online")
        tty.process.terminate()
        assert tty.end() == (0, True)


def run(tmp_path, *words, **options):
    return subprocess.run(
        [*COMMAND, *words],
        env=terminal_environment(tmp_path, **options.pop("changes", {})),
        capture_output=True,
        timeout=LONG,
        check=False,
        **options,
    )


def test_pipe_in_and_out(tmp_path):
    """A reader that ends early ends the program quietly."""
    with Server(tmp_path) as server:
        posted = run(tmp_path, server.url, "--post", "--name=bot", input=b"one\n" + "日本".encode())
        assert (posted.returncode, posted.stdout, posted.stderr) == (0, b"", b"")
        shell = f"{sys.executable} -m chatd.client {server.url} | head -n 4 | cut -f 2,3; echo ${{PIPESTATUS[0]}}"
        read = subprocess.run(
            ["bash", "-c", shell], env=terminal_environment(tmp_path), capture_output=True, timeout=LONG, check=False
        )
    assert read.stdout.decode() == "Alice\tHello!\nBob\tHi Alice!\nbot\tone\nbot\t日本\n0\n"
    assert read.stderr == b""


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["http://"], 2, "is not a URL such as ws://localhost:8085/rooms/main"),
        (["ws://h/", "--name="], 2, "is not a name of 1 to 30 printable characters"),
        (["ws://h/", "--token-file=/nowhere"], 2, "/nowhere: No such file or directory"),
    ],
)
def test_fault_of_the_user_is_one_line(tmp_path, words, status, line):
    done = run(tmp_path, *words, stdin=subprocess.DEVNULL)
    assert done.returncode == status
    assert line in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def first_line(tmp_path, *words, **changes):
    """Return the first line on standard error of a program that keeps trying, and stop it."""
    with subprocess.Popen(
        [*COMMAND, *words, "--post"],
        env=terminal_environment(tmp_path, **changes),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program_:
        line = program_.stderr.readline()
        program_.send_signal(signal.SIGINT)
        rest = program_.communicate(timeout=LONG)[1]
    assert program_.returncode == 0
    assert rest == ""
    return line


def test_server_that_cannot_be_reached(tmp_path):
    """The client keeps trying, and one line names the reason and the remedy."""
    assert first_line(tmp_path, "ws://127.0.0.1:1/") == (
        "chatd.client: connection refused: trying again until the server answers\n"
    )
    line = first_line(tmp_path, "ws://no-such-host.invalid/")
    assert "check the host in the URL: trying again" in line


def test_certificate_of_a_stranger(tmp_path):
    arguments_, _ = certificate_for(tmp_path)
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments_}") as server:
        place = f"wss://127.0.0.1:{server.port}/"
        assert "SSL_CERT_FILE names the authorities to trust: trying again" in first_line(tmp_path, place)
        trusted = {"SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        done = run(tmp_path, place, "--post", "--name=ann", input=b"hi\n", changes=trusted)
        assert (done.returncode, done.stderr) == (0, b"")
