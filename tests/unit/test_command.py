"""The command `chatd`: how it finds and starts each program. tests/integration/test_package.py runs it installed."""

import ast
import contextlib
import runpy
import sys
import tomllib

import pytest
from support.needs import ROOT

import chatd
from chatd import __main__ as command

WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
CARRIED = {place for place in WHEEL["only-include"] if place.startswith("scripts/")}
"""The files outside the package that the wheel carries."""


class Started(Exception):
    """Something was started, with these words."""


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Let the starts of programs raise their words instead."""

    def twistd():
        raise Started("twistd", *sys.argv[1:])

    def execute(path, given, name):
        raise Started(name, *given.items(), *sys.argv)

    monkeypatch.setattr("twisted.scripts.twistd.run", twistd)
    monkeypatch.setattr("chatd.load.__main__.run", lambda *given: given)
    monkeypatch.setattr("chatd.client.terminal.program.main", lambda *given: given)
    monkeypatch.setattr(runpy, "run_path", execute)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "argv", ["chatd"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def start(*words):
    with pytest.raises(Started) as caught:
        command.main(words)
    return [*caught.value.args]


def test_serve_is_twistd_in_the_foreground():
    assert start("serve", "--ping=9", "--help") == ["twistd", "--nodaemon", "--pidfile=", "chatd", "--ping=9", "--help"]


def test_check_is_an_option_of_serve():
    assert start("check", "--ping=9") == start("serve", "--check", "--ping=9")


def test_programs_of_the_package():
    """They get the words after the name, and the name for their help; their exit status is that of the command."""
    assert command.main(["load", "ws://h/", "--json"]) == (["ws://h/", "--json"], "chatd load")
    assert command.main(["client", "ws://h/", "--post"]) == (["ws://h/", "--post"], "chatd client")


@pytest.mark.parametrize("name", ["bench", "backup", "restore", "moderate", "erase"])
def test_scripts_of_a_checkout(name):
    named = "STARTED", f"chatd {name}"
    assert start(name, "--help", "a b") == ["__main__", named, str(ROOT / "scripts" / name), "--help", "a b"]
    assert sys.path == [str(ROOT / "scripts")]


def test_scripts_of_the_wheel(tmp_path, monkeypatch):
    """They stand in a folder of the package."""
    monkeypatch.setattr(chatd, "__file__", str(tmp_path / "chatd" / "__init__.py"))
    place = tmp_path / "chatd" / "scripts" / "backup"
    place.parent.mkdir(parents=True)
    place.touch()
    assert command.script("backup") == place


def test_wheel_carries_each_script_with_its_modules():
    """A script imports modules of its own folder, which must be beside it in the wheel."""
    assert WHEEL["sources"] == {"scripts": "chatd/scripts"}
    scripts = {name for name in command.PROGRAMS if (ROOT / "scripts" / name).exists()} - {"serve", "check"}
    assert {f"scripts/{name}" for name in scripts} <= CARRIED
    files = [file for place in CARRIED for file in ([*(ROOT / place).glob("*.py")] or [ROOT / place])]
    trees = [ast.parse(file.read_text()) for file in files if file.suffix in ("", ".py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {str(node.module).partition(".")[0] for node in nodes}
    beside = {
        path.stem for path in (ROOT / "scripts").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names & beside == {"adminport", "benching", "started", "storefiles"}
    assert {f"scripts/{name}.py" for name in ("adminport", "started", "storefiles")} | {"scripts/benching"} <= CARRIED


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(capsys, option):
    assert command.main([option]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.PROGRAMS)
    assert max(map(len, text.splitlines())) <= 120


def test_version(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"chatd {chatd.__version__}\n"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "name a command, such as `chatd serve`: see chatd --help"),
        (["sreve"], "there is no command 'sreve': did you mean serve?"),
        (["fly", "--help"], "there is no command 'fly': see chatd --help"),
        (["--store=redis://:secret@h"], "there is no option --store before a command: write it after one, or see "),
    ],
)
def test_wrong_command_is_one_line(capsys, words, fault):
    assert command.main(words) == command.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"chatd: {fault}")
    assert err.count("\n") == 1
    assert "secret" not in err


def test_words_are_those_of_the_process(capsys, monkeypatch):
    """The entry point of the wheel gives no words."""
    monkeypatch.setattr(sys, "argv", ["chatd", "--version"])
    assert command.main() == 0


@pytest.mark.parametrize("name", command.PROGRAMS)
def test_interrupt_is_no_traceback(capsys, name):
    """Any other exception that ends a program is shown."""
    with contextlib.suppress(Started):
        command.main([name])
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("a fault"), None)
    assert capsys.readouterr().err == "ValueError: a fault\n"
