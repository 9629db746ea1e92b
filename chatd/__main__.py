"""The command `chatd`, which starts each program of chatd by its name; also `python -m chatd`.

It implements none of them, and all run in this process.  Those of `scripts/` are files that the wheel carries too.
"""

import difflib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import chatd

USAGE: Final = 2
"""The exit status of a wrong command line."""
SEE: Final = "see chatd --help"


class Program(NamedTuple):
    """A program that the command can start."""

    about: str
    """Its purpose, as a phrase for `--help`."""
    start: Callable[[Sequence[str]], int | None]
    """Runs it with the words after its name; returns its exit status, if it returns."""


def _twistd(words: Sequence[str]) -> None:
    """Run the server as scripts/serve does: in the foreground, without a file that a killed server would leave."""
    from twisted.scripts.twistd import run

    sys.argv = ["twistd", "--nodaemon", "--pidfile=", "chatd", *words]
    run()


def _check(words: Sequence[str]) -> None:
    _twistd(["--check", *words])


def _load(words: Sequence[str]) -> int:
    from chatd.load.__main__ import run

    return run(words, "chatd load")


def _client(words: Sequence[str]) -> int:
    from chatd.client.terminal.program import main as run

    return run(words, "chatd client")


def script(name: str) -> Path:
    """Return the path of a program of `scripts/`, in the wheel or in a checkout."""
    package = Path(chatd.__file__).parent
    carried = package / "scripts" / name
    return carried if carried.exists() else package.parent / "scripts" / name


def _script(name: str) -> Callable[[Sequence[str]], None]:
    def start(words: Sequence[str]) -> None:
        path = script(name)
        sys.argv = [str(path), *words]
        sys.path.insert(0, str(path.parent))  # as for any script: it imports what is beside it
        runpy.run_path(str(path), {"STARTED": f"chatd {name}"}, "__main__")

    return start


PROGRAMS: Final = {
    "serve": Program("run the server in the foreground, until Ctrl-C or SIGTERM", _twistd),
    "check": Program("look for problems of the server's options and of this machine, and exit", _check),
    "client": Program("chat in a room from this terminal, or post and read in a pipe", _client),
    "load": Program("prove under load that a server loses nothing", _load),
    "bench": Program("measure what one core of this machine carries", _script("bench")),
    "backup": Program("copy the store of a server, running or not, to a file", _script("backup")),
    "restore": Program("restore a store from such a file", _script("restore")),
    "moderate": Program("ban, mute, and manage rooms, through the admin port", _script("moderate")),
    "erase": Program("remove all that one person wrote, through the admin port", _script("erase")),
}
"""The programs by their names, in the order of `--help`."""


def help_text() -> str:
    """Return what `chatd --help` prints."""
    width = max(map(len, PROGRAMS))
    rows = "\n".join(f"  {name:{width}}  {program.about}" for name, program in PROGRAMS.items())
    return f"""\
usage: chatd COMMAND [options]

A chat-room server over WebSocket that keeps every message, and the programs around it.

commands:
{rows}

options:
  --help, -h  print this, or after a command the help of that command
  --version   print the version

examples:
  chatd serve                                                  then open http://localhost:8085/
  chatd serve --store sqlite:/var/lib/chatd/chatd.sqlite --rooms 'team-*'
  chatd client ws://localhost:8085/rooms/team --name ann

`chatd serve` takes the options of `twistd chatd`. Use `twistd chatd` for twistd's own options: a daemon, a user, a log
file.
"""


def _hide_interrupt(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Show an exception that ends a program, but for Ctrl-C, as an excepthook: the program may still be starting.

    Python then ends the process by SIGINT, for which shells report 130.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def main(words: Sequence[str] | None = None) -> int | None:
    """Start the program that the command line names; return the exit status."""
    name, *rest = (sys.argv[1:] if words is None else words) or [""]
    if name in ("--help", "-h"):
        sys.stdout.write(help_text())
        return 0
    if name == "--version":
        sys.stdout.write(f"chatd {chatd.__version__}\n")
        return 0
    if name in PROGRAMS:
        sys.excepthook = _hide_interrupt
        return PROGRAMS[name].start(rest)
    near = difflib.get_close_matches(name, PROGRAMS, n=1)
    if not name:
        fault = f"name a command, such as `chatd serve`: {SEE}"
    elif name.startswith("-"):
        fault = f"there is no option {name.partition('=')[0]} before a command: write it after one, or {SEE}"
    else:
        fault = f"there is no command {name!r}: {f'did you mean {near[0]}?' if near else SEE}"
    sys.stderr.write(f"chatd: {fault}\n")
    return USAGE


if __name__ == "__main__":  # pragma: no cover -- `main` is tested
    sys.exit(main())
