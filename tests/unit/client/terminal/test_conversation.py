"""The lines of the user, in a room without a server."""

import asyncio
import sqlite3

import pytest
from support.fake_rooms import FakeRoom, entry, id_of, presence
from support.loops import asynchronous

from chatd.client.protocol import Rejected
from chatd.client.terminal.conversation import COMMANDS, NO_TOKEN, Conversation, drained
from chatd.client.terminal.display import plain
from chatd.client.terminal.status import unsent


class Talk(Conversation):
    """A conversation whose lines are in `lines`."""

    def __init__(self, room, *, can_change=True):
        self.lines = []

        def say(lines):
            self.lines += map(plain, lines)

        super().__init__(room, "ann", say, lambda: 120, can_change=can_change, clock=lambda: 100.0)

    async def type(self, *texts):
        for text in texts:
            self.enter(text)
            await asyncio.sleep(0)
        return self.room.asked


@asynchronous
async def test_line_is_posted():
    """A blank line is not, and two slashes begin a text that begins with one."""
    talk = Talk(FakeRoom())
    assert await talk.type("hi", "", "  ", "//etc/hosts", "a / b") == [
        ("post", "hi"),
        ("post", "/etc/hosts"),
        ("post", "a / b"),
    ]


@asynchronous
async def test_outbox_stands_above_the_prompt():
    talk = Talk(FakeRoom())
    await talk.type("hi")
    assert plain(talk.prompt()) == "sending: hi\nann> "
    talk.room.change(state="waiting", retry_at=103.0)
    assert plain(talk.prompt()) == "unsent: hi\nann> "
    assert unsent(talk.room.snapshot().outbox) == 1
    talk.room.accept("p1")
    assert plain(talk.prompt()) == "ann> "


@asynchronous
async def test_refused_post_waits_for_the_user():
    talk = Talk(FakeRoom())
    await talk.type("/retry", "/discard")
    assert talk.lines == ["-- the server has refused no message"] * 2
    await talk.type("hi", "ho")
    talk.room.refuse("p1", Rejected("too long"))
    await asyncio.sleep(0)
    talk.refresh()
    assert "not sent: hi (too long)" in plain(talk.prompt())
    assert (await talk.type("/retry", "/discard"))[2:] == [("retry", "p1"), ("discard", "p1")]
    assert unsent(talk.room.snapshot().outbox) == 1


@asynchronous
async def test_arrow_up_edits_the_last_own_message():
    talk = Talk(FakeRoom(entry(1, "ann", "one"), entry(2, "ann", "two"), entry(3)))
    assert talk.edit_last() == "two"
    assert plain(talk.prompt()).startswith("edit ")
    assert await talk.type("three") == [("edit", "k7Q2xe-2", "three")]
    talk.room.discard("p1")
    assert plain(talk.prompt()) == "ann> "
    talk.edit_last()
    await talk.type("two")
    talk.edit_last()
    talk.clear()
    assert (await talk.type("new"))[-1] == ("post", "new")
    assert len(talk.room.asked) == 3


@asynchronous
async def test_edit_and_removal_by_command():
    talk = Talk(FakeRoom(entry(1, "ann", "one"), entry(2, "ann", "[removed]", replaced=3, removed=True)))
    assert await talk.type("/edit two words") == [("edit", "k7Q2xe-1", "two words")]
    await talk.type("/edit")
    assert talk.editing.id == id_of(1)
    assert (await talk.type("three"))[1:] == [("edit", "k7Q2xe-1", "three")]
    assert (await talk.type("/remove"))[2:] == [("remove", "k7Q2xe-1")]


@pytest.mark.parametrize("command", ["/edit", "/edit x", "/remove"])
@asynchronous
async def test_nothing_can_be_changed(command):
    """One line says why: there is no token, or no message."""
    talk = Talk(FakeRoom(entry(1, "ann")), can_change=False)
    assert await talk.type(command) == []
    assert talk.edit_last() is None
    assert talk.lines == [f"-- {NO_TOKEN}"] * 2
    talk = Talk(FakeRoom(entry(1, "bea")))
    assert await talk.type(command) == []
    assert talk.lines == ["-- you have no message here that can be changed: /older shows older ones"]


@asynchronous
async def test_refused_edit_is_forgotten():
    talk = Talk(FakeRoom(entry(1, "ann")))
    await talk.type("/edit x", "/remove")
    talk.room.refuse("p1", Rejected("Only\x1b its author"))
    talk.room.refuse("p2", Rejected("no"))
    talk.refresh()
    assert talk.lines[-2:] == [
        "-- the message was not changed: Only␛ its author",
        "-- the message was not changed: no",
    ]
    assert talk.room.snapshot().outbox == []


@asynchronous
async def test_older_messages():
    talk = Talk(FakeRoom(entry(9)))
    talk.room.hold_older(entry(7), entry(8))
    assert await talk.type("/older") == [("older",)]
    assert talk.lines[0] == "-- 2 older messages:"
    await talk.type("/older")
    assert talk.lines[-1] == "-- there are no older messages"
    talk.room.failing = Rejected("no\x07")
    await talk.type("/older")
    assert talk.lines[-1] == "-- the older messages cannot be read: no␇"


@asynchronous
async def test_older_messages_are_read_once_at_a_time():
    talk = Talk(FakeRoom())
    talk.enter("/older")
    talk.enter("/older")
    await asyncio.sleep(0)
    assert talk.room.asked == [("older",)]


@asynchronous
async def test_people_and_help():
    talk = Talk(FakeRoom())
    await talk.type("/who")
    assert talk.lines.pop() == "-- nobody knows while offline"
    talk.room.change(presence=presence(2, ["ann", "bea"]))
    await talk.type("/who", "/nonsense\x1b x")
    assert talk.lines == [
        "-- 2 here: ann, bea",
        "-- /nonsense␛ is no command: /help lists them, and // begins a text with a slash",
    ]
    talk.lines.clear()
    await talk.type("/help")
    assert [line.split()[1] for line in talk.lines if line.startswith("-- /")] == [*COMMANDS]


@asynchronous
async def test_quit():
    talk = Talk(FakeRoom())
    await talk.type("/quit")
    assert talk.quits


def test_names_that_can_be_completed():
    """Members and authors are offered if a terminal may show their names."""
    talk = Talk(FakeRoom(entry(1, "bea"), entry(2, "e\x1bvil")))
    assert talk.names() == ["bea"]
    talk.room.change(presence=presence(500))
    assert talk.names() == ["bea"]
    talk.room.change(presence=presence(2, ["ann", "cy"]))
    assert talk.names() == ["ann", "bea", "cy"]


def test_typing_a_message():
    """Commands are nobody's business."""
    talk = Talk(FakeRoom())
    for text in ("", "/", "/edit x"):
        talk.typed(text)
    assert talk.room.asked == []
    talk.typed("h")
    talk.typed("//")
    assert talk.room.asked == [("typing",)] * 2


def test_reason_of_a_lost_connection():
    talk = Talk(FakeRoom())
    talk.room.change(state="waiting", reason="connection refused", retry_at=103.0)
    assert talk.toolbar() == "offline (connection refused), reconnecting in 3 s"


@pytest.mark.parametrize("error", [OSError("disk is full"), sqlite3.OperationalError("disk is full")])
@asynchronous
async def test_outbox_that_cannot_be_written(error):
    talk = Talk(FakeRoom())
    talk.room.failing = error
    await talk.type("hi")
    assert talk.lines == ["-- the message was not sent, because the outbox cannot keep it: disk is full"]


@asynchronous
async def test_quitting_waits_for_the_outbox():
    talk = Talk(FakeRoom())
    await talk.type("hi", "ho")
    waiting = asyncio.create_task(drained(talk.room, 60))
    await asyncio.sleep(0)
    talk.room.accept("p1")
    await asyncio.sleep(0)
    assert not waiting.done()
    talk.room.accept("p2")
    await waiting
    await talk.type("hey")
    await drained(talk.room, 0.01)
    assert unsent(talk.room.snapshot().outbox) == 1
