"""Who may come in, to which room, and how fast they may speak.

What a client asks for when it comes is the same whatever carries it: the path names the room, the query
the last message it has, what it wants to be told and under which name it is here, and a browser adds the origin of the
page that it is on.  All of it is judged here, and refused with an HTTP status.

The rate limit is the generic cell rate algorithm (ITU-T I.371): a client is one number, the time at
which it would be owed nothing more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from http import HTTPStatus
from typing import Final, NamedTuple, Protocol
from urllib.parse import parse_qs

from chatd.messages import Code, Id
from chatd.room.log import MAIN
from chatd.room.presence import EVENTS
from chatd.transport.frames import is_username

NO_EVENTS: Final[frozenset[str]] = frozenset()
MAX_ADDRESSES: Final = 10_000
"""How many addresses are remembered, at least, before those that are owed nothing are forgotten."""

ROUNDING: Final = 1e-6
"""Seconds that may be lost in adding up fractions."""

_PATH = re.compile(r"/rooms/([a-z0-9][a-z0-9_-]{0,63})")
_ROOMS = re.compile(r"[a-z0-9_*?-]+")
_ORIGIN = re.compile(
    r"null|(?!wss?:)[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:]+\])(:[0-9]+)?|(https?://)?\*\.[a-z0-9_.-]+(:[0-9]+)?"
)


class HttpError(Exception):
    """A request that is refused, with a status and one line that says why."""

    def __init__(self, status: HTTPStatus, detail: str, code: Code | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code


def server_stopping() -> HttpError:
    """Make the error for clients that may not join any more."""
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is about to stop", Code.UNAVAILABLE)


class JoinRequest(NamedTuple):
    """What a client that comes in asks for, found good."""

    room: str
    last: Id | None
    """The last message that it has."""
    events: frozenset[str]
    """What it wants to be told besides messages."""
    username: str | None


def room_pattern(text: str) -> str:
    """Read a pattern of room names, such as `team-*`, as a regular expression; ValueError if it is none."""
    if not _ROOMS.fullmatch(text):
        raise ValueError(f"{text!r} is no pattern of room names such as team-*")
    return translate(text)


def origin_pattern(text: str) -> str:
    """Read an origin (RFC 6454), or all below a domain, as a regular expression.

    `https://chat.example` is that one; `https://*.example` every host below, and `*.example` by either scheme.
    """
    text = text.lower()
    if not _ORIGIN.fullmatch(text):
        raise ValueError(f"{text!r} is no origin such as https://chat.example or *.example")
    return re.sub(r"^(.*)\\\*", lambda found: f"{found[1] or 'https?://'}[a-z0-9_.-]+", re.escape(text)) + r"\Z"


class Admission:
    """The operator's rules: which rooms there may be, and which pages may connect; none given: any."""

    def __init__(self, rooms: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self._rooms = [re.compile(pattern) for pattern in rooms]
        self._origins = [re.compile(pattern) for pattern in origins]
        self.any_origin = not origins

    def room(self, path: str) -> str:
        """The room that a path names: `/rooms/NAME` as it is written, and `/`; Refused with 404 if there is none."""
        match = _PATH.fullmatch(path)
        name = match[1] if match else MAIN if path == "/" else None
        if name is None or (self._rooms and not any(pattern.match(name) for pattern in self._rooms)):
            raise HttpError(HTTPStatus.NOT_FOUND, "there is no room here; connect to / or to /rooms/NAME")
        return name

    def check_origin(self, origin: str | None) -> None:
        """Refuse with 403 what a page elsewhere asks; who is no browser says no origin and is let in."""
        if origin is not None and self._origins and not any(pattern.match(origin) for pattern in self._origins):
            raise HttpError(HTTPStatus.FORBIDDEN, "this page may not connect here")

    def visit(self, path: str, query: Mapping[str, Sequence[str]], origin: str | None) -> JoinRequest:
        """Judge what a client that comes in asks for; raises Refused.  Unknown keys of the query are ignored."""
        self.check_origin(origin)
        room = self.room(path)
        if not query:
            return JoinRequest(room, None, NO_EVENTS, None)
        last, events, username = (query.get(name, [None])[-1] for name in ("last_event_id", "events", "username"))
        return JoinRequest(room, last_id(last), _events(events), _username(username))


def last_id(text: str | None) -> Id | None:
    """Read the id of the last message that a client has, if it names one; Refused with 400 when it is no id."""
    try:
        return Id.parse(text) if text else None
    except ValueError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"last_event_id: {error}") from None


def _events(text: str | None) -> frozenset[str]:
    events = frozenset(text.split(",")) if text else NO_EVENTS
    if not events <= EVENTS:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"events: choose of {', '.join(sorted(EVENTS))}")
    return events


def _username(text: str | None) -> str | None:
    if text and not is_username(text):
        raise HttpError(HTTPStatus.BAD_REQUEST, "username: 1 to 30 characters")
    return text or None


def read_query(query: str) -> dict[str, list[str]]:
    """Read a URL's query; Refused with 400 when it is not UTF-8 in percents (RFC 3986, section 2.5)."""
    try:
        return parse_qs(query.encode("ascii").decode(), errors="strict") if query else {}
    except ValueError:
        raise HttpError(HTTPStatus.BAD_REQUEST, "the query is not UTF-8") from None


class Paced(Protocol):
    """Who is held to a rate."""

    due: float
    """When it would be owed nothing more; 0.0 at first."""


class Rate:
    """So many frames a second, and `burst` at once; `now` gives seconds, from any beginning."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float]) -> None:
        self._interval = 1 / rate
        self._tolerance = (max(burst, 1) - 1) / rate
        self._now = now

    def take(self, who: Paced) -> float:
        """Let someone send one more frame; answers 0.0, or in how many seconds it may, if not now."""
        now = self._now()
        # Nobody owes more than one frame above the burst, whatever was done to the clock.
        due = min(max(who.due, now), now + self._tolerance + self._interval + ROUNDING)
        wait = due - now - self._tolerance
        if wait > ROUNDING:
            return wait
        who.due = due + self._interval
        return 0.0


class _Address:
    due = 0.0


class Addresses:
    """Holds addresses to a rate, as far as they are owed something; no rate: no limit.

    `hops` proxies stand before the server and are trusted to add to `X-Forwarded-For` (RFC 7239, section 7.4).
    """

    def __init__(self, rate: Rate | None, hops: int, now: Callable[[], float]) -> None:
        self._rate = rate
        self._hops = hops
        self._now = now
        self._addresses: dict[str, _Address] = {}
        self._most = MAX_ADDRESSES

    def take(self, peer: str, forwarded: str | None) -> float:
        """Let the address behind a connection send one more; answers as Rate.take does."""
        if self._rate is None:
            return 0.0
        entries = [entry.strip() for entry in forwarded.split(",")] if forwarded else []
        address = entries[-self._hops] if 0 < self._hops <= len(entries) else peer
        if len(self._addresses) >= self._most:
            now = self._now()
            self._addresses = {name: one for name, one in self._addresses.items() if one.due > now}
            self._most = max(MAX_ADDRESSES, 2 * len(self._addresses))
        return self._rate.take(self._addresses.setdefault(address, _Address()))
