"""The rooms of the client on Twisted, on a transport in memory with the test at its other end."""

import time

import pytest
from support.helpers import Longest, result_of
from support.server_ends import Endpoint
from twisted.internet.task import Clock

from chatd.client.connector import SLEPT_SECONDS, WATCH_SECONDS
from chatd.client.protocol import ANSWER_SECONDS, Backoff, ClientStopped, Posted, Rejected
from chatd.client.tx import Client
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import ack_frame, error_frame, history_frame, message_frame


def message(number):
    return message_frame("abcd", Entry(number, "bob", f"m{number}", "2026-01-01T00:00:00.000Z"))


class Table:
    """A client with its clock and its endpoint, in one room."""

    def __init__(self, **options):
        self.clock = Clock()
        self.endpoint = Endpoint()
        self.client = Client(
            *(self.clock, "http://h:8085"),
            username="ann",
            endpoint=self.endpoint,
            backoff=lambda: Backoff(chance=Longest()),
            **options,
        )
        self.room = self.client.room("a", last="abcd-2", events=["presence"])

    def join(self, end=2, **said):
        self.wire = self.endpoint.accept()
        self.request = self.wire.value().decode()
        self.wire.answer()
        self.wire.say(history_frame("abcd", end, [], **said))
        return self.wire

    def answer(self, number):
        """Acknowledge the post that was sent, and return it without its label."""
        ((text),) = self.wire.said()
        label = text.pop("label")
        self.wire.say(ack_frame(Id("abcd", number), label, duplicate=False))
        return text


def test_requests():
    """They have the names of the other clients, and Deferreds as their results."""
    table = Table()
    wire = table.join(resumed=True)
    assert table.request.startswith("GET /rooms/a?events=presence&username=ann&last_event_id=abcd-2 HTTP/1.1\r\n")
    posted = table.room.post("hi", color="red")
    assert table.answer(3) == {"username": "ann", "message": "hi", "color": "red"}
    assert result_of(posted) == Posted(Id("abcd", 3))
    edited = table.room.edit("abcd-3", "ho")
    assert table.answer(4) == {"username": "ann", "message": "ho", "replaces": "abcd-3"}
    assert result_of(edited).id.number == 4
    removed = table.room.remove(Id("abcd", 3))
    assert table.answer(5) == {"type": "remove", "id": "abcd-3"}
    assert result_of(removed).id.number == 5
    page, older = table.room.page(limit=1), table.room.older()
    for request in wire.said():
        end = 2 if "before" in request else 5
        wire.say(history_frame("abcd", end, [message(end)], label=request["label"]))
    assert [entry.message for entry in result_of(page).entries] == ["m5"]
    assert result_of(older) is None
    assert [entry.id for entry in table.room.snapshot().messages] == [Id("abcd", 2)]
    table.room.typing()
    assert wire.said() == [{"type": "typing", "username": "ann"}]


def test_refused_post_is_retried():
    table = Table()
    wire = table.join(resumed=True)
    refused = table.room.post("hi")
    ((text),) = wire.said()
    wire.say(error_frame("muted", Code.FORBIDDEN, text["label"]))
    with pytest.raises(Rejected, match="muted"):
        result_of(refused)
    again = table.room.retry(text["label"])
    assert table.room.retry(text["label"]) is None
    table.answer(3)
    assert result_of(again).id.number == 3


def test_rooms_of_a_client():
    """A room is joined once, and again after it has ended."""
    table = Table()
    wire = table.join(resumed=True)
    assert table.client.room("a") is table.room
    other = table.client.room("b", last=Id("abcd", 7))
    assert "/rooms/b?" in table.endpoint.accept().value().decode()
    stopped = table.room.stop()
    wire.end()
    assert result_of(stopped) is None
    with pytest.raises(ClientStopped):
        result_of(table.room.post("late"))
    again = table.client.room("a")
    assert again is not table.room
    assert other.snapshot().last == Id("abcd", 7)


def test_stop_of_a_client():
    """All rooms are left, and no timer runs on."""
    table = Table()
    wire = table.join(resumed=True)
    stopped = table.client.stop()
    wire.close(1000)
    wire.end()
    assert result_of(stopped) == [(True, None)]
    assert table.room.snapshot().state == "stopped"
    table.clock.advance(0)
    assert table.clock.getDelayedCalls() == []


def test_machine_that_slept(monkeypatch):
    """A connection is checked, and one that does not answer is given up."""
    wall = [1000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    table = Table()
    wire = table.join(resumed=True)
    wall[0] += WATCH_SECONDS
    table.clock.advance(WATCH_SECONDS)
    assert wire.value() == b""
    wall[0] += WATCH_SECONDS + SLEPT_SECONDS + 1
    table.clock.advance(WATCH_SECONDS)
    assert wire.value()[:1] == b"\x89"
    wall[0] += ANSWER_SECONDS
    table.clock.advance(ANSWER_SECONDS)
    assert wire.aborted
    wire.end()
    shown = table.room.snapshot()
    assert (shown.state, shown.reason, shown.retry_at) == (
        *("waiting", "the server did not answer in time"),
        wall[0] + 1.0,
    )
