"""The operator's rules for connecting: which rooms exist, which pages may connect, and how fast clients may send.

A client asks for the same things over every transport.  The path names the room.  The query names the last
message that the client has, the events that it wants and its username.  A browser adds the origin of its
page.  All of that is checked here, and refused with an HTTP status.

The rate limit is the generic cell rate algorithm (ITU-T I.371): the state of a client is one number, the
time at which its whole burst is available again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol
from urllib.parse import parse_qs

from chatd.messages import Code, Id
from chatd.room.log import MAIN
from chatd.room.presence import EVENTS
from chatd.transport.frames import STANDARD, Vocabulary
from chatd.transport.identity import ANYONE, Identity

NO_EVENTS: Final[frozenset[str]] = frozenset()
MAX_ADDRESSES: Final = 10_000
"""The number of addresses in memory above which idle ones are removed."""
NETWORK_BITS: Final = 64
"""The bits of an IPv6 address that name a network (RFC 4291, section 2.5.4): one host can have all addresses of it."""

ANY_ORIGIN: Final = r".*\Z"
"""The pattern of `*`, which every page matches."""
OWN_DOMAINS: Final = frozenset({"example", "internal", "invalid", "lan", "local", "localhost", "test"})
"""Top-level domains without an owner (RFC 2606, RFC 6762): every host below them is the operator's own."""
MAX_HOSTS: Final = 8
"""The most names that are read of X-Forwarded-Host, the last ones: a client could name thousands."""
ROUNDING: Final = 1e-6
"""The seconds that sums of fractions may lose."""

SHARED_PATH: Final = "/connect"
"""The path of connections that may be in many rooms."""

_PATH = re.compile(r"/rooms/([a-z0-9][a-z0-9_-]{0,63})")
_ROOMS = re.compile(r"[a-z0-9_*?-]+")
_PAGE = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\[\]:/]+)(?::([0-9]+))?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/]+)(?::([0-9]*))?")
_PORTS = {"http": "80", "https": "443"}
_ORIGIN = re.compile(
    r"null|(?!wss?:)[a-z][a-z0-9+.-]*://([a-z0-9_.-]+|\[[0-9a-f:]+\])(:[0-9]+)?|(https?://)?\*\.[a-z0-9_.-]+(:[0-9]+)?"
)


class HttpError(Exception):
    """A refused request: a status, the reason in one line, and headers of the answer."""

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        code: Code | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.headers = headers


def server_stopping() -> HttpError:
    """Make the error for clients that may not join any more."""
    return HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is about to stop", Code.UNAVAILABLE)


class JoinRequest(NamedTuple):
    """The request of a client that connects, validated."""

    room: str
    """The name of the room; "" on a connection that may be in many."""
    last: Id | None
    """The id of the last message that the client has."""
    events: frozenset[str]
    """The events that it wants besides messages."""
    username: str | None
    identity: Identity = ANYONE


def room_pattern(text: str) -> str:
    """Read a pattern of room names, such as `team-*`, as a regular expression; raise ValueError if it is invalid."""
    if not _ROOMS.fullmatch(text):
        raise ValueError(f"{text!r} is not a pattern of room names such as team-*")
    return translate(text)


def origin_pattern(text: str) -> str:
    """Read an origin (RFC 6454), or a pattern for a domain, as a regular expression.

    `https://chat.example` is that one; `https://*.example` every host below, and `*.example` by either scheme.
    `*` is every origin.
    """
    if text == "*":
        return ANY_ORIGIN
    text = text.lower()
    if not _ORIGIN.fullmatch(text):
        raise ValueError(f"{text!r} is not an origin such as https://chat.example or *.example")
    return re.sub(r"^(.*)\\\*", lambda found: f"{found[1] or 'https?://'}[a-z0-9_.-]+", re.escape(text)) + r"\Z"


def is_same_host(origin: str, host: str) -> bool:
    """Return whether a page of this origin was loaded from the host in a Host header.

    Behind a proxy, the scheme of the request is unknown.  The scheme of the page decides the default port of both.
    """
    if origin.partition("://")[2] == host != "":  # nearly always
        return True
    page, server = _PAGE.fullmatch(origin.lower()), _HOST.fullmatch(host.lower())
    if page is None or server is None:
        return False
    port = _PORTS.get(page[1])
    return page[2] == server[1] and (page[3] or port) == (server[2] or port)


def check_operator(headers: Mapping[str, str], hostname: str) -> None:
    """Raise HttpError 403 for requests that a web page may have sent.

    A page sends its origin, or how it relates to this server (Fetch Metadata).  One that made its own name
    resolve to this machine sends that name as the host.  So the host must be an address, this machine's
    name, or a name that nobody can have in the public DNS.
    """
    host = headers.get("host", "").lower()
    server = _HOST.fullmatch(host)
    name = server[1] if server else host
    own = "." not in name or name.rpartition(".")[2] in OWN_DOMAINS
    if not (own or is_address(name.strip("[]")) or name == hostname.lower()):
        raise HttpError(HTTPStatus.FORBIDDEN, "this is the admin port of another host; send Host: localhost")
    origin = headers.get("origin")
    page = headers.get("sec-fetch-site", "none")
    if (origin is not None and not is_same_host(origin, host)) or page not in ("none", "same-origin"):
        raise HttpError(HTTPStatus.FORBIDDEN, "no web page may use the admin port")


def is_address(text: str) -> bool:
    """Return whether a text is an IP address."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


class Admission:
    """The rules for rooms and for the origins of pages.

    An empty list of rooms allows all rooms, and an empty list of origins the pages of the server's own host.
    With `proxied`, that is also the host that a proxy names in X-Forwarded-Host.
    """

    def __init__(
        self,
        rooms: Sequence[str] = (),
        origins: Sequence[str] = (),
        *,
        proxied: bool = False,
        vocabulary: Vocabulary = STANDARD,
    ) -> None:
        self._rooms = [re.compile(pattern) for pattern in rooms]
        self._origins = [re.compile(pattern) for pattern in origins]
        self._proxied = proxied
        self._vocabulary = vocabulary
        self.any_origin = ANY_ORIGIN in origins

    def room(self, path: str) -> str:
        """Return the room that a path names, `/rooms/NAME` as written or `/`; raise HttpError 404 for others."""
        match = _PATH.fullmatch(path)
        name = match[1] if match else MAIN if path == "/" else None
        if name is None or not self.allows(name):
            raise HttpError(HTTPStatus.NOT_FOUND, "there is no room here; connect to / or to /rooms/NAME")
        return name

    def allows(self, room: str) -> bool:
        """Return whether the operator allows a room."""
        return not self._rooms or any(pattern.match(room) for pattern in self._rooms)

    def join_requests(self, query: Mapping[str, Sequence[str]], last: str | None, most: int) -> list[JoinRequest]:
        """Validate the request of a client that reads many rooms, or raise HttpError.

        `last` is the header Last-Event-ID, which counts before the query.
        """
        rooms = [*dict.fromkeys(query.get("room", ()))]
        if not 1 <= len(rooms) <= most:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"room: name 1 to {most} rooms")
        ids = last_ids(last or query.get("last_event_id", [None])[-1], len(rooms))
        others = {name: query[name] for name in ("events", "username") if name in query}
        return [
            self.join_request(f"/rooms/{room}", others)._replace(last=id_) for room, id_ in zip(rooms, ids, strict=True)
        ]

    def check_origin(self, origin: str | None, host: str | None, forwarded: str | None = None) -> None:
        """Refuse pages of other origins with HttpError 403; requests without an Origin header are allowed.

        `host` and `forwarded` are the headers Host and X-Forwarded-Host, neither of which a page can set.
        """
        if origin is None or self.any_origin:
            return
        if self._origins:
            allowed = any(pattern.match(origin) for pattern in self._origins)
        else:
            hosts = [
                host or "",
                *(forwarded.rsplit(",", MAX_HOSTS)[-MAX_HOSTS:] if forwarded and self._proxied else ()),
            ]
            allowed = any(is_same_host(origin, one.strip()) for one in hosts)
        if not allowed:
            raise HttpError(HTTPStatus.FORBIDDEN, "this page may not connect here")

    def join_request(self, path: str, query: Mapping[str, Sequence[str]]) -> JoinRequest:
        """Validate the request of a client that connects, or raise HttpError; ignore unknown keys of the query."""
        room = self.room(path)
        if not query:
            return JoinRequest(room, None, NO_EVENTS, None)
        last, events, username = (query.get(name, [None])[-1] for name in ("last_event_id", "events", "username"))
        return JoinRequest(room, last_id(last), _events(events), self._username(username))

    def _username(self, text: str | None) -> str | None:
        if text and not self._vocabulary.is_username(text):
            raise HttpError(HTTPStatus.BAD_REQUEST, f"username: {self._vocabulary.usernames}")
        return text or None


def last_id(text: str | None) -> Id | None:
    """Read the id of the last message that a client has, if it names one; raise HttpError 400 if it is invalid."""
    try:
        return Id.parse(text) if text else None
    except ValueError as error:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"last_event_id: {error}") from None


def last_ids(text: str | None, count: int) -> list[Id | None]:
    """Read the ids that a client has of several rooms, in the order of its rooms; raise HttpError 400 if invalid.

    An id without an epoch has that of the id before it, and an empty one stands for a room without messages.
    """
    if not text:
        return [None] * count
    found: list[Id | None] = []
    epoch = ""
    for item in text.split(","):
        found.append(last_id(item if "-" in item or not item else f"{epoch}-{item}"))
        epoch = epoch if found[-1] is None else found[-1].epoch
    if len(found) != count:
        raise HttpError(HTTPStatus.BAD_REQUEST, "last_event_id: there must be one id for each room")
    return found


def _events(text: str | None) -> frozenset[str]:
    events = frozenset(text.split(",")) if text else NO_EVENTS
    if not events <= EVENTS:
        raise HttpError(HTTPStatus.BAD_REQUEST, f"events: choose of {', '.join(sorted(EVENTS))}")
    return events


def read_query(query: str) -> dict[str, list[str]]:
    """Read the query of a URL; raise HttpError 400 if it is not percent-encoded UTF-8 (RFC 3986, section 2.5)."""
    try:
        return parse_qs(query.encode("ascii").decode(), errors="strict") if query else {}
    except ValueError:
        raise HttpError(HTTPStatus.BAD_REQUEST, "the query is not UTF-8") from None


class Paced(Protocol):
    """A client under a rate limit."""

    due: float
    """The time at which its whole burst is available again; 0.0 at first."""


class Rate:
    """A rate limit of `rate` frames a second and `burst` at once; `now` returns seconds since any instant."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float]) -> None:
        self._interval = 1 / rate
        self._tolerance = (max(burst, 1) - 1) / rate
        self._now = now

    def take(self, who: Paced) -> float:
        """Count one more frame of a client; return 0.0, or the seconds until the frame is allowed."""
        now = self._now()
        # A clock that jumps does not lock a client out for longer than one frame above the burst.
        due = min(max(who.due, now), now + self._tolerance + self._interval + ROUNDING)
        wait = due - now - self._tolerance
        if wait > ROUNDING:
            return wait
        who.due = due + self._interval
        return 0.0

    def wait(self, who: Paced) -> float:
        """Return 0.0, or the seconds until one more frame of a client is allowed, and count nothing."""
        now = self._now()
        wait = min(who.due - now, self._tolerance + self._interval + ROUNDING) - self._tolerance
        return wait if wait > ROUNDING else 0.0

    def charge(self, who: Paced) -> float:
        """Count one more frame that cannot be refused; return 0.0, or above the rate the seconds until the next one."""
        wait = self.take(who)
        if not wait:
            return 0.0
        wait += self._interval
        who.due = self._now() + wait + self._tolerance
        return wait


_HOST_PORT = re.compile(r"\[([^][]+)\](?::[0-9]{1,5})?|([^:]+):[0-9]{1,5}")
"""An address with brackets or a port, as some proxies write it (RFC 7239, section 6)."""


def network(text: str) -> str | None:
    """Return the host or network that an IP address stands for under a rate limit; None if the text is no address.

    The network is an IPv4 address, also one that is mapped into IPv6, or the first 64 bits of an IPv6 address.
    """
    match = _HOST_PORT.fullmatch(text)
    try:
        address = ip_address(match[1] or match[2] if match else text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return str(IPv6Address(int(address) >> NETWORK_BITS << NETWORK_BITS))
        address = address.ipv4_mapped
    return str(address)


def client_network(peer: str, forwarded: str | None, hops: int) -> str | None:
    """Return the network of the client behind a connection, or None if neither of its addresses is an IP address.

    `hops` proxies stand before the server and are trusted to add to `X-Forwarded-For` (RFC 7239, section 7.4).  What is
    no IP address there counts as the address of the connection, so that nobody can fill the memory with names.
    """
    return network(_behind(peer, forwarded, hops))


def client_address(peer: object, forwarded: str | None, hops: int) -> str | None:
    """Return the IP address of the client behind a connection; None if it has none, as over a Unix socket.

    `peer` is the address of the connection as Twisted has it.  The others are as in client_network().
    """
    return _behind(getattr(peer, "host", ""), forwarded, hops) or None


def _behind(peer: str, forwarded: str | None, hops: int) -> str:
    """Return the IP address that the outermost of the trusted proxies saw, or else the address of the connection."""
    entries = forwarded.rsplit(",", hops)[-hops:] if forwarded and hops else []
    if not entries or len(entries) < hops:
        return peer
    named = entries[0].strip()
    match = _HOST_PORT.fullmatch(named)
    host = (match[1] or match[2]) if match else named
    return host if is_address(host) else peer


class _AddressRate:
    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = 0.0


class Addresses:
    """The rate limits of addresses; None sets no limit.

    `hops` is as in client_network().
    """

    def __init__(self, rate: Rate | None, hops: int, now: Callable[[], float]) -> None:
        self._rate = rate
        self._hops = hops
        self._now = now
        self._addresses: dict[str, _AddressRate] = {}
        self._most = MAX_ADDRESSES

    def take(self, peer: str, forwarded: str | None, *, reading: bool = False) -> float:
        """Count one more post, or with `reading` one more read, of the address behind a connection.

        Posts and reads have a limit each.  Return as Rate.take does.
        """
        if self._rate is None:
            return 0.0
        address = client_network(peer, forwarded, self._hops) or peer
        if len(self._addresses) >= self._most:
            now = self._now()
            self._addresses = {name: one for name, one in self._addresses.items() if one.due > now}
            self._most = max(MAX_ADDRESSES, 2 * len(self._addresses))
        name = f"reads of {address}" if reading else address
        return self._rate.take(self._addresses.setdefault(name, _AddressRate()))
