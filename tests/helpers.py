"""Doubles that the tests share: small, in memory, and nothing happens in them unless a test says so."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import settings
from twisted.internet.defer import Deferred, execute
from twisted.python.failure import Failure

from chatd.frames import Entry, Post
from chatd.rooms import LogUnavailable

# Its assertions are explained as those of a test file are; this module is imported before it.
pytest.register_assert_rewrite("store_contract")

# The same examples in every run, however slow the machine is, and nothing written beside the tests.
REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=200)

NEW_YEAR = 1_767_225_600.0
"""2026-01-01T00:00:00Z."""


class ManualTime:
    """Seconds since 1970, which pass when the test says so."""

    def __init__(self, now: float = NEW_YEAR) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class RecordingPoster:
    """A Poster that writes down what it is told: ("posted", post, number) or ("refused", post, error)."""

    def __init__(self, events: list[tuple[Any, ...]] | None = None) -> None:
        self.events = [] if events is None else events

    @property
    def numbers(self) -> list[int]:
        return [event[2] for event in self.events if event[0] == "posted"]

    @property
    def refusals(self) -> list[str]:
        return [str(event[2]) for event in self.events if event[0] == "refused"]

    def posted(self, post: Post, number: int) -> None:
        self.events.append(("posted", post, number))

    def refused(self, post: Post, error: LogUnavailable) -> None:
        assert isinstance(error, LogUnavailable)
        self.events.append(("refused", post, error))


class RecordingFollower:
    """A Follower that writes down ("appended", room, entry) for each entry, and ("trimmed", room, first)."""

    def __init__(self, events: list[tuple[Any, ...]] | None = None) -> None:
        self.events = [] if events is None else events

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        self.events.extend(("appended", room, entry) for entry in entries)

    def trimmed(self, room: str, first: int) -> None:
        self.events.append(("trimmed", room, first))


class ImmediateWorker:
    """A Worker that does at once what it is asked."""

    def __init__(self) -> None:
        self.running = False

    def start(self) -> None:
        self.running = True

    def do(self, work: Callable[[], Any]) -> "Deferred[Any]":
        assert self.running, "asked before the start, or after the end"
        return execute(work)

    def stop(self) -> None:
        self.running = False


class HeldWorker(ImmediateWorker):
    """A Worker that does what it is asked one by one, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.held: deque[tuple[Callable[[], Any], Deferred[Any]]] = deque()

    def do(self, work: Callable[[], Any]) -> "Deferred[Any]":
        assert self.running, "asked before the start, or after the end"
        answer: Deferred[Any] = Deferred()
        self.held.append((work, answer))
        return answer

    def run(self) -> None:
        """Do what was asked first of what is held, and answer."""
        work, answer = self.held.popleft()
        execute(work).chainDeferred(answer)

    def run_all(self) -> None:
        """Do all, and what is asked meanwhile."""
        while self.held:
            self.run()

    def stop(self) -> None:
        # As a pool of threads does: what was asked is done first.
        self.run_all()
        super().stop()


def result_of(deferred: "Deferred[Any]") -> Any:
    """What a Deferred has fired with; raises what it has failed with."""
    results: list[Any] = []
    deferred.addBoth(results.append)
    assert results, "it has not fired"
    if isinstance(results[0], Failure):
        results[0].raiseException()
    return results[0]


HEAD = (
    b"GET / HTTP/1.1\r\nHost: localhost:8085\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
)
MASK = b"\x12\x34\x56\x78"


def masked(payload, mask=MASK, first=0x81):
    size = len(payload)
    length = (
        bytes([0x80 | size])
        if size < 126
        else b"\xfe" + size.to_bytes(2)
        if size < 65536
        else b"\xff" + size.to_bytes(8)
    )
    return bytes([first]) + length + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


def read_frames(data):
    """The texts in a stream of a server's frames (RFC 6455, section 5.2)."""
    texts = []
    while data:
        size, begin = data[1], 2
        if size == 126:
            size, begin = int.from_bytes(data[2:4]), 4
        elif size == 127:
            size, begin = int.from_bytes(data[2:10]), 10
        assert data[0] == 0x81
        assert len(data) >= begin + size, "a frame was cut"
        texts.append(json.loads(data[begin : begin + size]))
        data = data[begin + size :]
    return texts
