"""A client's half of the wire, whatever carries it: what the server said, what is had of it, what is yet to be said.

The server numbers a room's messages without gaps, so that a client needs to keep one id.  An *assembler* keeps it,
and says of what comes whether it is the next; an *outbox* keeps what was said until it is answered, and gives
it again to each new connection, with the label that it had.

This module is pure: frames in, frames out, and Deferreds that fire when a frame says so.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any, Final, NamedTuple

import orjson
from twisted.internet.defer import Deferred

from chatd.messages import Code, Entry, Id

RATE_LIMIT_PAUSE_SECONDS: Final = 1.0
"""After how long a post is sent again that could not be stored."""
WINDOW: Final = 16
"""How many posts wait for their answers at a time."""


class Fault(Exception):
    """The server did not keep its promise; the text says how."""


class Rejected(Exception):
    """The server wants nothing of this client or this post, now or later; the text says why.

    `code` is the error's, the close's or the HTTP status, if there is one.
    """

    def __init__(self, message: str, code: str | int | None = None) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """The client was stopped before the answer came; a post may be in the log, or not."""


# What the server says


class Message(NamedTuple):
    """One new message of the room."""

    epoch: str
    entry: Entry


class History(NamedTuple):
    """Consecutive messages: those that a connection begins with, or a page."""

    end: Id
    """That of the last entry, or of the one before where the first would be."""
    entries: Sequence[Entry]
    """Oldest first."""
    more: bool = False
    """Whether the log holds older ones; newer ones, of a page that goes forward."""
    resumed: bool | None = None
    """Whether they follow the last that the client has, if it named one."""
    label: str | None = None


class Ack(NamedTuple):
    """A post is in the log, durably."""

    label: str
    id: Id
    duplicate: bool = False
    """Whether it was there before."""


class Error(NamedTuple):
    """A frame was refused."""

    message: str
    code: str | None = None
    label: str | None = None
    retry_after: float = 0.0
    """Seconds after which the same will be taken, if that was said; else 0.0."""


class Notice(NamedTuple):
    """Something else: presence, typing, or what is not known yet."""

    type: str
    data: Any


Frame = Message | History | Ack | Error | Notice


def _entry(number: int, data: dict[str, str]) -> Entry:
    return Entry(number, data["username"], data["message"], data["timestamp"])


def _message(document: dict[str, Any]) -> Message:
    epoch, number = Id.parse(document["id"])
    return Message(epoch, _entry(number, document["data"]))


def _history(document: dict[str, Any]) -> History:
    end, data = Id.parse(document["id"]), document["data"]
    entries = [_entry(number, one) for number, one in enumerate(data, end.number - len(data) + 1)]
    return History(end, entries, document.get("more", False), document.get("resumed"), document.get("label"))


def _ack(document: dict[str, Any]) -> Ack:
    return Ack(document["label"], Id.parse(document["id"]), document.get("duplicate", False))


def _error(document: dict[str, Any]) -> Error:
    known = document.get
    return Error(document["message"], known("code"), known("label"), float(known("retry_after", 0)))


_READERS: Final[dict[str, Callable[[dict[str, Any]], Frame]]] = {
    "message": _message,
    "history": _history,
    "ack": _ack,
    "error": _error,
}


def read(text: bytes) -> Frame:
    """Read what a server sent; raises Fault for what is no frame."""
    try:
        document = orjson.loads(text)
        kind = document["type"]
        reader = _READERS.get(kind)
        return reader(document) if reader else Notice(kind, document.get("data"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Fault(f"what came is no frame: {text[:200].decode(errors='replace')}") from None


# What is kept


class Assembler:
    """What a reader has of a room: the id of the last message, which all before it come before.

    `last` is that of an earlier client, if there was one.
    """

    def __init__(self, last: Id | None = None) -> None:
        self.last = last
        self.greeted = False
        """Whether this connection has begun, as it does with a history frame."""

    def connect(self) -> None:
        """Another connection begins, which was told of the last id."""
        self.greeted = False

    def history(self, frame: History) -> bool:
        """A connection begins, or everything, in its midst; answers whether what was kept is to be replaced.

        Raises Fault.
        """
        if self.greeted and frame.resumed is not False:
            raise Fault(f"a connection began a second time, with history up to {frame.end}")
        resumed = frame.resumed is True and self.last is not None
        if resumed:
            self._follows(frame.end.epoch, frame.end.number - len(frame.entries) + 1)
        self.greeted = True
        self.last = frame.end
        return not resumed

    def message(self, frame: Message) -> None:
        """A message came: it must be the next.  Raises Fault, and is as it was."""
        epoch, entry = frame
        if not self.greeted:
            raise Fault(f"message {epoch}-{entry.number} came before the history")
        self._follows(epoch, entry.number)
        self.last = Id(epoch, entry.number)

    def _follows(self, epoch: str, number: int) -> None:
        last = self.last
        if last is None or (last.number == number - 1 and last.epoch == epoch):
            return
        if epoch != last.epoch:
            raise Fault(f"{epoch}-{number} came after {last}, which is of another log")
        again = "again" if number <= last.number else f"instead of {epoch}-{last.number + 1}"
        raise Fault(f"{epoch}-{number} came after {last}, {again}")


class Posted(NamedTuple):
    """A post is in the log, durably."""

    id: Id
    duplicate: bool = False
    """Whether the answer to an earlier attempt was lost."""


@dataclass(slots=True, eq=False)
class _Request:
    """What was said, in all its attempts."""

    text: bytes
    answer: "Deferred[Any]"


class Outbox:
    """What was said and has no final answer yet, each under a label of its own, which no other client draws.

    At most `window` of it is under way at a time; 1 keeps posts in the order in which they were given even if one
    is refused for now.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._most = self._window = window
        self._name = secrets.token_urlsafe(12)
        self._count = 0
        self._requests: dict[int, _Request] = {}
        self._unsent: list[int] = []  # a heap: the oldest first
        self._sent: set[int] = set()
        self._repeated: set[int] = set()
        self._until = 0.0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, document: dict[str, Any]) -> "Deferred[Any]":
        """Say something; the answer is Posted or a History, or Refused."""
        self._count += 1
        answer: Deferred[Any] = Deferred()
        text = orjson.dumps({**document, "label": f"{self._name}.{self._count}"})
        self._requests[self._count] = _Request(text, answer)
        heappush(self._unsent, self._count)
        return answer

    def connect(self) -> None:
        """Another connection begins: what was not answered is to be sent again."""
        self._unsent = [*self._requests]  # in order, which is a heap
        self._sent.clear()
        self._repeated.clear()
        self._until = 0.0  # a rate is a connection's

    def repeat(self) -> None:
        """The log is another: what was not answered is to be sent again, and may yet be answered twice."""
        self._repeated |= self._sent
        self._unsent = [*self._requests]
        self._sent.clear()

    def send(self, now: float) -> list[bytes]:
        """What is to be sent now, oldest first."""
        texts: list[bytes] = []
        while self._unsent and len(self._sent) < self._window and now >= self._until:
            number = heappop(self._unsent)
            if number in self._requests:  # else it was answered when it was to be sent once more
                self._sent.add(number)
                texts.append(self._requests[number].text)
        return texts

    def wait(self, now: float) -> float | None:
        """In how many seconds something may be sent; None while that depends on answers."""
        return max(0.0, self._until - now) if self._unsent and len(self._sent) < self._window else None

    def answered(self, frame: Ack | History) -> None:
        """The log has it, or here is the page."""
        request = self._take(frame.label)
        if request:
            self._window = min(self._window + 1, self._most)
            request.answer.callback(Posted(frame.id, frame.duplicate) if isinstance(frame, Ack) else frame)

    def refused(self, frame: Error, now: float) -> bool:
        """It was refused: for now, or for good; answers whether it is known what was."""
        number = self._number(frame.label)
        if number not in self._requests:
            return number in self._repeated
        if frame.code not in (Code.RATE_LIMITED, Code.UNAVAILABLE):
            self._take(frame.label).answer.errback(Rejected(frame.message, frame.code))  # type: ignore[union-attr]
        elif number in self._sent:
            self._sent.discard(number)
            heappush(self._unsent, number)
            self._until = max(self._until, now + (frame.retry_after or RATE_LIMIT_PAUSE_SECONDS))
            self._window = 1  # what is under way when nothing is taken, is sent in vain
        return True

    def fail(self, reason: Exception) -> None:
        """There will be no answers."""
        requests, self._requests, self._unsent = self._requests, {}, []
        self._sent.clear()
        for request in requests.values():
            request.answer.errback(reason)

    def _number(self, label: str | None) -> int:
        name, _, number = (label or "").rpartition(".")
        return int(number) if name == self._name and number.isdecimal() else 0

    def _take(self, label: str | None) -> _Request | None:
        number = self._number(label)
        self._sent.discard(number)
        return self._requests.pop(number, None)


class Backoff:
    """How long to wait before connecting again: a random part of `first` seconds, then of twice as many, up to `most`.

    All who lost one server do not come to the next at once.
    """

    def __init__(self, first: float = 1.0, most: float = 30.0, chance: Random | None = None) -> None:
        self._first, self._most = first, most
        self._chance = chance or Random()  # noqa: S311 -- it spreads clients, and is no secret
        self._attempts = 0

    def next(self, said: float | None = None) -> float:
        """Seconds to wait now; as many as the server said, if it did."""
        self._attempts += 1
        longest = min(self._first * 2 ** min(self._attempts - 1, 30), self._most)
        return self._chance.random() * longest if said is None else said

    def reset(self) -> None:
        """It has gone well."""
        self._attempts = 0
