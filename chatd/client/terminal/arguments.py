"""The command line of `python -m chatd.client`."""

import argparse
import getpass
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from chatd.client.address import ServerAddress
from chatd.client.protocol import claims_of
from chatd.client.terminal.display import safe

USAGE: Final = 2
"""The exit status of a wrong command line."""
NAME_MAX: Final = 30
"""The most characters of a name."""
SPLIT: Final = 500
"""The default of --split: the most characters of a message, if the server has no schema of its own."""
SPLIT_MAX: Final = 1_000_000
_PATH = re.compile(r"(.*?)(?:/rooms/([a-z0-9][a-z0-9_-]{0,63}))?/?")

STARTED: Final = "python -m chatd.client"
"""The command that starts this program, unless the command `chatd` does.  Its last word begins each error."""
DESCRIPTION: Final = "Chat in a room from a terminal or a pipe."
EPILOG: Final = """\
In a terminal, /help lists the commands. Messages that are typed offline are kept in
$XDG_STATE_HOME/chatd (~/.local/state/chatd by default) and sent later, each once.

If standard output is not a terminal, the program prints the messages of the room, from
the newest page on: a line each with the time, the name and the text, separated by tabs.

examples:
  %(prog)s ws://localhost:8085/rooms/team --name ann
  %(prog)s ws://localhost:8085/rooms/team | grep -i deploy
  tail -f log | %(prog)s ws://localhost:8085/rooms/team --name bot --post

environment: CHATD_TOKEN, a token, unless --token-file is given; NO_COLOR, no colours;
SSL_CERT_FILE, the certificates of the authorities to trust.

Exit status: 0, done, and each line of --post is stored; 1, a failure, in one line; 2, a
wrong command line."""


class RoomAddress(NamedTuple):
    """A room: the URL of its server, and its name."""

    server: str
    room: str


class ChatOptions(NamedTuple):
    """The command line, checked."""

    address: RoomAddress
    username: str
    token: Callable[[], str] | None
    post: bool
    json: bool
    split: int
    program: str
    """The word that begins each error."""

    def complain(self, text: str) -> None:
        """Write one line about a problem."""
        sys.stderr.write(f"{self.program}: {text}\n")
        sys.stderr.flush()


class CommandLine(argparse.ArgumentParser):
    """A parser that reports an error in one line, and whose options cannot be abbreviated."""

    @property
    def program(self) -> str:
        """The word that begins each error."""
        return self.prog.split()[-1]

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.program}: {message}: see --help\n")


def parse_address(url: str) -> RoomAddress:
    """Parse the URL of a room, or of its page; raise ArgumentTypeError for any other."""
    try:
        address = ServerAddress.parse(re.sub(r"^http(s?)://", r"ws\1://", url))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    found = _PATH.fullmatch(address.path)
    if found is None or address.query or re.search(r"/(rooms|connect)(/|$)", found[1]):
        raise argparse.ArgumentTypeError(f"{url!r} is not the URL of a room, such as ws://localhost:8085/rooms/main")
    scheme = "https" if address.secure else "http"
    return RoomAddress(f"{scheme}://{address.uri_host}:{address.port}{found[1]}", found[2] or "main")


def check_name(text: str) -> str:
    """Return a name; raise ArgumentTypeError if no message may have it."""
    if not 1 <= len(text) <= NAME_MAX or safe(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of 1 to {NAME_MAX} printable characters")
    return text


def _split(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= SPLIT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {SPLIT_MAX:,}")
    return int(text)


def subject(token: str) -> str | None:
    """Return the claim `sub` of a token, which is the username unless the server uses another claim."""
    name = claims_of(token).get("sub")
    return name if isinstance(name, str) else None


def token_source(path: str | None, environ: Mapping[str, str]) -> Callable[[], str] | None:
    """Return a function that returns the token, read from its file each time; None without a token."""
    if path is not None:
        return lambda: Path(path).read_text("utf-8").strip()
    token = environ.get("CHATD_TOKEN", "").strip()
    return (lambda: token) if token else None


def parse(words: Sequence[str], environ: Mapping[str, str], started: str = STARTED) -> ChatOptions:
    """Parse what follows the command `started`; raise SystemExit, with one line on standard error, if it is wrong."""
    parser = CommandLine(
        prog=started,
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "url",
        type=parse_address,
        metavar="URL",
        help="ws://HOST:PORT/rooms/NAME, or wss: for TLS; without a room: main",
    )
    add("--name", type=check_name, help="the name of your messages [that of the token, or the login name]")
    add("--token-file", metavar="FILE", help="a file with a token, which is read again when it expires")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--post", action="store_true", help="post each line of standard input that is not blank")
    way.add_argument("--json", action="store_true", help="print messages as JSON: a `message` frame in each line")
    add(
        "--split",
        type=_split,
        default=SPLIT,
        metavar="N",
        help="split longer lines of --post into messages of N characters [%(default)s]",
    )
    options = parser.parse_args(words)
    token = token_source(options.token_file, environ)
    username = _username(parser, options, token)
    return ChatOptions(options.url, username, token, options.post, options.json, options.split, parser.program)


def _username(parser: CommandLine, options: Any, token: Callable[[], str] | None) -> str:
    """Return the name that the user gave, the token has or the user logged in with."""
    try:
        claimed = subject(token()) if token else None
    except OSError as error:
        parser.error(f"argument --token-file: {options.token_file}: {error.strerror}")
    except ValueError:
        parser.error(f"argument --token-file: {options.token_file} is not text")
    try:
        return options.name or check_name(claimed or getpass.getuser())
    except (argparse.ArgumentTypeError, OSError, KeyError):
        parser.error("argument --name: there is no name to post under: give one")
