"""The protocol of a client, without a connection: frames of the server, the position in a room, pending requests.

The server numbers the entries of a room without gaps, so a client needs to remember one id only.  A `Cursor`
remembers it and checks that each frame continues after it.  `PendingRequests` keeps every request until it is
answered, and sends it again on each new connection under its first label.

This module is pure: frames in, frames out, and answers that are called back when a frame settles them.
"""

import base64
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any, Final, NamedTuple, Protocol

import orjson

from chatd.messages import Code, Entry, Id

CONNECT_SECONDS: Final = 10
"""The time limit of a connection attempt, and then of its handshake."""
IDLE_SECONDS: Final = 25
"""The silence after which the client pings the server, which may itself ping only once an hour."""
SILENCE_SECONDS: Final = 60
"""The silence after which the client gives up a connection."""
ANSWER_SECONDS: Final = 10
"""The time limit of an answer to a probe, and the time without an answer to a request after which the client probes."""
CLOSE_SECONDS: Final = 5
"""The time limit of the closing handshake."""
RATE_LIMIT_PAUSE_SECONDS: Final = 1.0
"""The pause before a request is sent again, if the server refused it for now and named no time."""
WINDOW: Final = 16
"""The default number of requests in flight."""
RENEWAL_SECONDS: Final = 60
"""The time before the expiry of a token at which it is renewed; half of its time if less is left."""
LONGEST_WAIT: Final = 86_400.0
"""The most seconds until a token is renewed."""
RENEWAL_LABEL: Final = "token"
"""The label of frames with a new token, which no request has."""
JOIN_LABEL: Final = "join"
"""The label of frames that join a room, which no request has."""
LEAVE_LABEL: Final = "leave"
"""The label of frames that leave a room, which no request has."""


class ProtocolError(Exception):
    """The server broke the protocol; the text says how."""


class Rejected(Exception):
    """The server refused a client or a request for good; the text is its reason.

    `code` is the code of the error (str), or of the close frame or the HTTP response (int), if there is one.
    """

    def __init__(self, message: str, code: str | int | None = None) -> None:
        super().__init__(message)
        self.code = code


class ClientStopped(Exception):
    """The client was stopped before the answer arrived; a post may or may not have been stored."""


# Tokens

_TOKEN = re.compile(r"[!-~]+")


def checked_token(token: object) -> str | None:
    """Return a token that a header can carry, or None; raise ValueError, which does not show it, for any other."""
    if token is None or (isinstance(token, str) and _TOKEN.fullmatch(token)):
        return token
    raise ValueError("a token is a text of printable ASCII characters without spaces")


def claims_of(token: str) -> Mapping[str, Any]:
    """Return the claims of a JSON Web Token, of which the client verifies nothing; none if it is malformed."""
    try:
        encoded = token.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except (ValueError, IndexError):
        return {}
    return claims if isinstance(claims, dict) else {}


def seconds_to_renewal(token: str, now: float) -> float | None:
    """Return the seconds until a token should be renewed; None if it states no time, or has expired.

    `now` is in seconds since 1970.
    """
    try:
        left = float(claims_of(token)["exp"]) - now
    except (ValueError, KeyError, TypeError):
        return None
    return min(max(left - min(RENEWAL_SECONDS, left / 2), 1.0), LONGEST_WAIT) if left > 0 else None


def token_text(token: str) -> bytes:
    """Return the text of the frame that renews the token of a connection."""
    return orjson.dumps({"type": "token", "token": token, "label": RENEWAL_LABEL})


def join_text(room: str, last: Id | None, events: Sequence[str], username: str | None) -> bytes:
    """Return the text of the frame that joins a room, on a connection that may be in many."""
    asked: dict[str, Any] = {"type": "join", "room": room, "label": JOIN_LABEL}
    optional = {"last_event_id": last and str(last), "events": [*events], "username": username}
    return orjson.dumps(asked | {name: value for name, value in optional.items() if value})


def leave_text(room: str) -> bytes:
    """Return the text of the frame that leaves a room."""
    return orjson.dumps({"type": "leave", "room": room, "label": LEAVE_LABEL})


def page_request(before: Id | str | None, after: Id | str | None, limit: int) -> dict[str, Any]:
    """Return the request for a page: the newest entries, or those before or after one id."""
    places = {"before": before, "after": after}
    return {"type": "history", **{name: str(id_) for name, id_ in places.items() if id_ is not None}, "limit": limit}


# Frames of the server


class Message(NamedTuple):
    """One new entry of the room."""

    epoch: str
    entry: Entry


class History(NamedTuple):
    """Consecutive entries: the start of a connection, or a page."""

    end: Id
    """The id of the last entry; without entries, the id after which the next one follows."""
    entries: Sequence[Entry]
    """The entries, oldest first."""
    more: bool = False
    """True if the log has older entries or, for a page that goes forward, newer ones."""
    resumed: bool | None = None
    """True if the entries follow the id that the client named; None if the server does not say."""
    label: str | None = None
    """The label of the request that a page answers."""


class Ack(NamedTuple):
    """The server has stored a post."""

    label: str
    id: Id
    duplicate: bool = False
    """True if an earlier attempt stored the post."""


class Error(NamedTuple):
    """The server refused a frame."""

    message: str
    code: str | None = None
    label: str | None = None
    retry_after: float = 0.0
    """Seconds after which the server accepts the same frame; 0.0 if it does not say."""


class Left(NamedTuple):
    """The connection is not in the room any longer."""

    message: str | None = None
    """The reason of the server, if the client did not ask for it."""
    code: str | None = None


class Event(NamedTuple):
    """A frame of another type: presence, typing, or a type that this version does not know."""

    type: str
    data: Any


Frame = Message | History | Ack | Error | Event | Left


_KNOWN: Final = "username", "message", "timestamp"
"""The fields of a message without any of the operator's own."""
_EDITS: Final = "replaces", "replaced"
"""The fields of the envelope that name an edit, and those of Entry."""


def _entry(number: int, data: dict[str, Any]) -> Entry:
    entry = Entry(number, data["username"], data["message"], data["timestamp"])
    if not (isinstance(entry[1], str) and isinstance(entry[2], str) and isinstance(entry[3], str)):
        raise TypeError
    if len(data) == len(_KNOWN):
        return entry
    return entry._replace(extra={name: value for name, value in data.items() if name not in _KNOWN})


def _message(document: dict[str, Any]) -> Message:
    epoch, number = Id.parse(document["id"])
    entry = _entry(number, document["data"])
    if "replaces" in document or "replaced" in document:
        replaces, replaced = (Id.parse(document[name]).number if name in document else None for name in _EDITS)
        entry = entry._replace(replaces=replaces, removed="removed" in document, replaced=replaced)
    return Message(epoch, entry)


def _history(document: dict[str, Any]) -> History:
    end, data = Id.parse(document["id"]), document["data"]
    entries = [_entry(number, one) for number, one in enumerate(data, end.number - len(data) + 1)]
    for name in _EDITS:
        for number, id_ in document.get(name, {}).items():
            place = int(number) - end.number - 1
            note: dict[str, Any] = {name: Id.parse(id_).number}
            entries[place] = entries[place]._replace(**note)
    for number in document.get("removed", ()):
        place = number - end.number - 1
        entries[place] = entries[place]._replace(removed=True)
    return History(end, entries, document.get("more", False), document.get("resumed"), document.get("label"))


def _ack(document: dict[str, Any]) -> Ack:
    return Ack(document["label"], Id.parse(document["id"]), document.get("duplicate", False))


def _error(document: dict[str, Any]) -> Error:
    known = document.get
    return Error(document["message"], known("code"), known("label"), float(known("retry_after", 0)))


_PARSERS: Final[dict[str, Callable[[dict[str, Any]], Frame]]] = {
    "message": _message,
    "history": _history,
    "ack": _ack,
    "error": _error,
}


def _left(document: dict[str, Any]) -> Left:
    return Left(document.get("message"), document.get("code"))


_ADDRESSED: Final = {**_PARSERS, "left": _left}


def parse_frame(text: bytes) -> Frame:
    """Parse a text frame of the server; raise ProtocolError if it is malformed."""
    return _parse(text, _PARSERS)[1]


def parse_addressed_frame(text: bytes) -> tuple[str | None, Frame]:
    """Parse a text frame on a connection that may be in many rooms, and return its room too; None without one.

    Raises ProtocolError if the frame is malformed.
    """
    return _parse(text, _ADDRESSED)


def _parse(text: bytes, parsers: dict[str, Callable[[dict[str, Any]], Frame]]) -> tuple[str | None, Frame]:
    try:
        document = orjson.loads(text)
        kind = document["type"]
        parser = parsers.get(kind)
        return document.get("room"), parser(document) if parser else Event(kind, document.get("data"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ProtocolError(f"malformed frame: {text[:200].decode(errors='replace')}") from None


# The position in the room


class Cursor:
    """The position of a client in a room: the id of the last entry that it received, over all connections.

    `last` is the last id of an earlier client, if this one continues after it.
    """

    def __init__(self, last: Id | None = None) -> None:
        self.last = last
        self.greeted = False
        """True after this connection has received its history frame, which is the first one."""

    def connect(self) -> None:
        """Start a new connection, whose handshake names the last id."""
        self.greeted = False

    def history(self, frame: History) -> bool:
        """Accept the start of a connection, or a fresh start during one.

        Return whether the entries replace all earlier ones.  Raise ProtocolError, and change nothing, if the server
        may not send such a frame now.
        """
        if self.greeted and frame.resumed is not False:
            raise ProtocolError(f"a second history frame, up to {frame.end}, is not a fresh start")
        resumed = frame.resumed is True and self.last is not None
        if resumed:
            self._check_next(frame.end.epoch, frame.end.number - len(frame.entries) + 1)
        self.greeted = True
        self.last = frame.end
        return not resumed

    def message(self, frame: Message) -> None:
        """Accept the next entry; raise ProtocolError, and change nothing, if it is another one."""
        epoch, entry = frame
        if not self.greeted:
            raise ProtocolError(f"message {epoch}-{entry.number} arrived before the history")
        self._check_next(epoch, entry.number)
        self.last = Id(epoch, entry.number)

    def _check_next(self, epoch: str, number: int) -> None:
        last = self.last
        if last is None or (last.number == number - 1 and last.epoch == epoch):
            return
        if epoch != last.epoch:
            raise ProtocolError(f"{epoch}-{number} arrived after {last}, which is from another log")
        fault = "again" if number <= last.number else f"instead of {epoch}-{last.number + 1}"
        raise ProtocolError(f"{epoch}-{number} arrived after {last}, {fault}")


# Requests


class Posted(NamedTuple):
    """The result of a post: the server has stored the message under this id."""

    id: Id
    duplicate: bool = False
    """True if an earlier attempt stored the message and its answer was lost."""


class Requester(Protocol):
    """Receives the outcome of a request, once.  A Deferred is one."""

    def callback(self, result: Any) -> None:
        """Take the result: Posted or a History."""

    def errback(self, fail: Any) -> None:
        """Take the reason of a failure: Rejected or ClientStopped."""


@dataclass(slots=True, eq=False)
class _PendingRequest:
    """One request, for all of its attempts."""

    text: bytes
    answer: Requester
    reads: bool
    """True if a page answers it, and no ack."""


class PendingRequests:
    """The requests without a final answer, each under a label that no other client draws.

    At most `window` requests are in flight.  With a window of 1 posts are stored in the order of `add`, even if the
    server refuses one for now.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._largest_window = self._window = window
        self._name = secrets.token_urlsafe(12)
        self._count = 0
        self._requests: dict[int, _PendingRequest] = {}
        self._given: dict[str, int] = {}  # the labels that `add` got
        self._unsent: list[int] = []  # a heap: the oldest first
        self._sent: set[int] = set()
        self._repeated: set[int] = set()
        self._until = 0.0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, document: dict[str, Any], answer: Requester, label: str | None = None) -> str:
        """Add a request and return its label, which is a new one by default."""
        self._count += 1
        if label is None:
            label = f"{self._name}.{self._count}"
        else:
            self._given[label] = self._count
        text, reads = orjson.dumps({**document, "label": label}), document.get("type") == "history"
        self._requests[self._count] = _PendingRequest(text, answer, reads)
        heappush(self._unsent, self._count)
        return label

    def forget(self, label: str) -> None:
        """Drop a request, whose answer may yet arrive."""
        number = self._number(label)
        if number in self._requests:
            self._repeated.add(number)
            self._take(label)

    def connect(self) -> None:
        """Start a new connection, on which every request without an answer is sent again."""
        self._unsent = [*self._requests]  # in order, which is a heap
        self._sent.clear()
        self._repeated.clear()
        self._given = {label: number for label, number in self._given.items() if number in self._requests}
        self._until = 0.0  # the server limits the rate of each connection

    def repeat(self) -> None:
        """Send every request again on the same connection, because the log is another; two answers may arrive."""
        self._repeated |= self._sent
        self._unsent = [*self._requests]
        self._sent.clear()

    def send(self, now: float) -> list[bytes]:
        """Return the texts to send now, oldest first."""
        texts: list[bytes] = []
        while self._unsent and len(self._sent) < self._window and now >= self._until:
            number = heappop(self._unsent)
            if number in self._requests:  # it may have been answered before it was sent again
                self._sent.add(number)
                texts.append(self._requests[number].text)
        return texts

    def wait(self, now: float) -> float | None:
        """Return the seconds until something can be sent; None if that depends on answers."""
        return max(0.0, self._until - now) if self._unsent and len(self._sent) < self._window else None

    def answer(self, frame: Ack | History) -> None:
        """Complete the request that an ack or a page answers; raise ProtocolError if it is of the other kind."""
        request, is_page = self._requests.get(self._number(frame.label)), isinstance(frame, History)
        if request and request.reads != is_page:
            raise ProtocolError(f"{'a page' if is_page else 'an ack'} answers a request of another kind")
        self._take(frame.label)
        if request:
            self._window = min(self._window + 1, self._largest_window)
            request.answer.callback(Posted(frame.id, frame.duplicate) if isinstance(frame, Ack) else frame)

    def refuse(self, frame: Error, now: float) -> bool:
        """Fail a request, or send it again later if the error is temporary; return whether the label is known."""
        number = self._number(frame.label)
        if number not in self._requests:
            return number in self._repeated
        if frame.code not in (Code.RATE_LIMITED, Code.UNAVAILABLE):
            self._take(frame.label).answer.errback(Rejected(frame.message, frame.code))  # type: ignore[union-attr]
        elif number in self._sent:
            self._sent.discard(number)
            heappush(self._unsent, number)
            self._until = max(self._until, now + (frame.retry_after or RATE_LIMIT_PAUSE_SECONDS))
            self._window = 1  # while the server refuses everything, one attempt at a time is enough
        return True

    def fail(self, reason: Exception) -> None:
        """Fail every request."""
        requests, self._requests, self._unsent = self._requests, {}, []
        self._sent.clear()
        for request in requests.values():
            request.answer.errback(reason)

    def _number(self, label: str | None) -> int:
        if label in self._given:
            return self._given[label]
        name, _, number = (label or "").rpartition(".")
        return int(number) if name == self._name and number.isdecimal() else 0

    def _take(self, label: str | None) -> _PendingRequest | None:
        number = self._number(label)
        self._sent.discard(number)
        if number not in self._repeated:
            self._given.pop(label or "", None)
        return self._requests.pop(number, None)


class Backoff:
    """Random pauses between attempts to connect, so that clients of a failed server return at different times.

    The first pause is at most `first` seconds.  The bound doubles with each attempt, up to `most` seconds.  `chance`
    is the source of randomness.
    """

    def __init__(self, first: float = 1.0, most: float = 30.0, chance: Random | None = None) -> None:
        self._first, self._most = first, most
        self._chance = chance or Random()  # noqa: S311 -- it spreads clients, and is no secret
        self._attempts = 0

    def next(self, retry_after: float | None = None) -> float:
        """Return the seconds to wait now: `retry_after` if the server named it, else a random pause."""
        self._attempts += 1
        longest = min(self._first * 2 ** min(self._attempts - 1, 30), self._most)
        return self._chance.random() * longest if retry_after is None else retry_after

    def spread(self) -> float:
        """Return a first pause, after an event that many clients notice at the same time."""
        return self._chance.random() * self._first

    def reset(self) -> None:
        """Begin again with short pauses, because a connection has succeeded."""
        self._attempts = 0
