"""The admin port of a server, as scripts/moderate and scripts/erase use it; it needs only Python."""

# ruff: noqa: INP001 -- scripts import this module from their own folder

import argparse
import http.client
import json
import os
import pathlib
import re
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final, NoReturn
from urllib.parse import urlencode, urlsplit

from started import StartedParser

URL: Final = "http://127.0.0.1:8086"
SECONDS: Final = 60
"""The time limit for an answer; clearing a large room takes a while."""
CHUNK: Final = 1 << 16
"""The most bytes of an export to read at once."""
ROOM: Final = re.compile("[a-z0-9][a-z0-9_-]{0,63}")

Results = Iterator[tuple[Any, str]]
"""Each result of a command as JSON, and as a line for people."""


class Refused(Exception):
    """The script cannot do its work; the text is one line with the reason and the remedy.

    `code` is that of the problem which the server answered, if it has one.
    """

    def __init__(self, text: str, code: "str | None" = None) -> None:
        super().__init__(text)
        self.code = code


class LineParser(StartedParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Reject the command line."""
        raise Refused(f"{message}: see --help")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which could take the token elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class AdminPort:
    """The admin port of a server."""

    def __init__(self, url: str, token: "str | None") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"--url {url}: it is no URL such as {URL}")
        self._url = url.rstrip("/")
        self._token = token
        # No proxy: the token is for the server alone.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)

    def ask(self, method: str, path: str, document: object = None, unknown: str = "") -> Any:
        """Send a request, and return the JSON of the answer, or {}; raise Refused, for a 404 in the words `unknown`."""
        return json.loads(b"".join(self._answer(method, path, document, unknown)) or b"{}")

    def lines(self, path: str) -> "Iterator[dict[str, Any]]":
        """Yield the documents of an answer in JSON Lines; raise Refused, also if the answer is cut."""
        rest = b""
        for chunk in self._answer("GET", path):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from map(json.loads, lines)

    def _answer(self, method: str, path: str, document: object = None, unknown: str = "") -> "Iterator[bytes]":
        """Send a request, and yield the bytes of the answer."""
        data = None if document is None else json.dumps(document).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, method=method)  # noqa: S310 -- checked above
        request.add_header("Content-Type", "application/json")
        if method == "POST" and data is None:
            request.data = b""
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with self._opener.open(request, timeout=SECONDS) as answer:
                while chunk := answer.read(CHUNK):
                    yield chunk
        except urllib.error.HTTPError as error:
            raise self._refusal(error, unknown) from None
        except http.client.IncompleteRead:
            raise Refused(f"{self._url} has cut its answer: run this again when the server is ready") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise Refused(
                f"{self._url} does not answer ({why}): start the server, or name its admin port with --url"
            ) from None

    def _refusal(self, error: urllib.error.HTTPError, unknown: str) -> Refused:
        """Return the reason for a refusal, in one line, with the remedy."""
        foreign = f"{self._url} answers {error.code}, and is no admin port of chatd: name that with --url"
        try:
            problem = json.loads(error.read())
            detail = " ".join(str(problem["detail"]).split())
        except (OSError, ValueError, KeyError, TypeError):
            return Refused(foreign)
        if error.code == HTTPStatus.NOT_FOUND:
            return Refused(unknown or foreign, problem.get("code"))
        if error.code == HTTPStatus.UNAUTHORIZED:
            return Refused(f"{detail}; give it with --token-file or CHATD_ADMIN_TOKEN")
        return Refused(detail, problem.get("code"))

    def rooms(self) -> "Iterator[dict[str, Any]]":
        """Yield the rooms that hold messages."""
        after: dict[str, str] = {}
        while True:
            page = self.ask("GET", f"/rooms?{urlencode({'limit': 1000, **after})}")
            yield from page["rooms"]
            if "next" not in page:
                return
            after = {"after": page["next"]}


def room_path(name: str) -> str:
    """Return the path of a room."""
    if not ROOM.fullmatch(name):
        raise Refused(f"{name} is no name of a room, such as team-a")
    return f"/rooms/{name}"


def read_token(path: "str | None") -> "str | None":
    """Return the token from a file or, without one, from the environment."""
    if path is None:
        return os.environ.get("CHATD_ADMIN_TOKEN")
    try:
        return pathlib.Path(path).read_text("ascii").strip()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Refused(f"--token-file {path}: it cannot be read ({reason}): name the file of the token") from None


def add_common(parser: LineParser, *, default: bool) -> None:
    """Add the options that may stand before or after the command; only those before it have a `default`."""
    none: Any = None if default else argparse.SUPPRESS
    url = URL if default else argparse.SUPPRESS
    parser.add_argument("--url", default=url, help=f"the admin port of the server [{URL}]")
    parser.add_argument(
        "--token-file", default=none, metavar="FILE", help="the file of its token [the variable CHATD_ADMIN_TOKEN]"
    )
    parser.add_argument("--json", action="store_true", default=none, help="print each result as one JSON object")


def run(
    name: str, parse: Callable[[], argparse.Namespace], work: Callable[[AdminPort, argparse.Namespace], Results]
) -> None:
    """Run a script, and print its results; a fault is one line and status 1."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `moderate rooms | head`
    try:
        options = parse()
        port = AdminPort(options.url, read_token(options.token_file))
        for result, line in work(port, options):
            print(json.dumps(result) if options.json else line)  # noqa: T201 -- a script prints
    except Refused as fault:
        sys.exit(f"{name}: {fault}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
