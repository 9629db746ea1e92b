"""The command line of the terminal chat."""

import argparse
import getpass

import pytest
from support.tokens import token

from chatd.client.terminal import arguments
from chatd.client.terminal.arguments import RoomAddress, parse, parse_address, subject, token_source

URL = "ws://localhost:8085/rooms/team"


def refused(capsys, *words, **environ):
    with pytest.raises(SystemExit) as ended:
        parse(words, environ)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("url", "server", "room"),
    [
        ("ws://localhost:8085", "http://localhost:8085", "main"),
        ("ws://localhost:8085/", "http://localhost:8085", "main"),
        ("ws://localhost/rooms/team", "http://localhost:80", "team"),
        ("wss://chat.example/rooms/a-b_c/", "https://chat.example:443", "a-b_c"),
        ("https://chat.example/prefix/rooms/team", "https://chat.example:443/prefix", "team"),
        ("http://localhost:8085/rooms/team", "http://localhost:8085", "team"),
        ("ws://[::1]:8085/", "http://[::1]:8085", "main"),
    ],
)
def test_room_of_a_url(url, server, room):
    """A room is named by its WebSocket or by its page, and a proxy may put both under a prefix."""
    assert parse_address(url) == RoomAddress(server, room)


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8085", "ftp://h/", "ws://", "ws://h:x/", "ws://u:secret@h/", "ws://h/#a", "ws://h/rooms/"),
        *("ws://h/rooms/Team", "ws://h/connect", "ws://h/?username=ann", "ws://h/rooms/team/messages"),
    ],
)
def test_url_of_no_room(url):
    with pytest.raises(argparse.ArgumentTypeError, match=r"ws://localhost:8085/rooms/main|neither a user") as refusal:
        parse_address(url)
    assert "secret" not in str(refusal.value)


def test_defaults(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "login")
    settings = parse([URL], {})
    assert settings == (RoomAddress("http://localhost:8085", "team"), "login", None, False, False, 500, "chatd.client")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "URL"),
        (("nonsense",), "'nonsense' is not a URL such as"),
        ((URL, "--name="), "'' is not a name of 1 to 30 printable characters"),
        ((URL, "--name", "a" * 31), "is not a name"),
        ((URL, "--name", "a\x1b[2J"), "is not a name"),
        ((URL, "--name", "a\ud800"), "is not a name"),
        ((URL, "--post", "--json"), "not allowed with argument"),
        ((URL, "--token-file=/nowhere/token"), "/nowhere/token: No such file or directory"),
        ((URL, "--split=0"), "'0' is not a whole number from 1 to 1,000,000"),
        ((URL, "--split=x"), "'x' is not a whole number"),
        ((URL, "--token=eyJ"), "unrecognized arguments"),
    ],
)
def test_wrong_command_line_is_one_line(capsys, words, part):
    assert part in refused(capsys, *words)


def test_token_file_that_is_not_text(tmp_path, capsys):
    (tmp_path / "token").write_bytes(b"\xff")
    assert f"{tmp_path / 'token'} is not text" in refused(capsys, URL, f"--token-file={tmp_path / 'token'}")


def test_nobody_has_logged_in(monkeypatch, capsys):
    def getuser():
        raise KeyError

    monkeypatch.setattr(getpass, "getuser", getuser)
    assert "there is no name to post under: give one" in refused(capsys, URL)
    monkeypatch.setattr(getpass, "getuser", lambda: "a" * 31)
    assert "there is no name to post under: give one" in refused(capsys, URL)


def test_name_in_the_token(tmp_path):
    (tmp_path / "token").write_text(token("bea") + "\n")
    words = [URL, f"--token-file={tmp_path / 'token'}"]
    assert parse(words, {"CHATD_TOKEN": token("cy")}).username == "bea"
    assert parse([URL], {"CHATD_TOKEN": token("cy")}).username == "cy"
    assert parse([*words, "--name=dee"], {}).username == "dee"


@pytest.mark.parametrize("text", ["", "a", "a.b", "a.e30", "a.!!!!", "a.W10", "a.eyJzdWIiOjd9", "a.MQ"])
def test_token_without_a_name(text):
    assert subject(text) is None


def test_token_is_read_again(tmp_path):
    path = tmp_path / "token"
    path.write_text(" one \n")
    source = token_source(str(path), {})
    assert source() == "one"
    path.write_text("two")
    assert source() == "two"
    assert token_source(None, {"CHATD_TOKEN": "three\n"})() == "three"
    assert token_source(None, {"CHATD_TOKEN": " "}) is None


def test_help_names_each_option(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"], {})
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--name", "--token-file", "--post", "--json", "--split N", "CHATD_TOKEN", "NO_COLOR"):
        assert word in shown
    assert "[500]" in shown
    assert arguments.SPLIT == 500
