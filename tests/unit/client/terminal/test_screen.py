"""The line of prompt_toolkit, with keys from a pipe and without a screen."""

import asyncio
import contextlib
import sys

import pytest
from prompt_toolkit.application import create_app_session, get_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from support.fake_rooms import FakeRoom, entry, presence
from support.loops import asynchronous

from chatd.client.terminal.conversation import Conversation
from chatd.client.terminal.display import plain
from chatd.client.terminal.screen import WordCompleter, converse, converse_in_lines, print_above, print_lines

UP, CTRL_C, CTRL_D, ENTER = "\x1b[A", "\x03", "\x04", "\r"


class Screen(DummyOutput):
    """An output that keeps all text."""

    def __init__(self):
        self.text = ""

    def write(self, data):
        self.text += data

    write_raw = write


@contextlib.contextmanager
def keyboard():
    with create_pipe_input() as keys, create_app_session(input=keys, output=Screen()):
        yield keys


def talk(room, **options):
    said = []
    conversation = Conversation(room, "ann", lambda lines: said.extend(map(plain, lines)), lambda: 80, **options)
    conversation.said = said
    return conversation


async def press(*texts, room=None, can_change=True):
    """Lead a conversation with these keys; return what was asked of the room, and the notices."""
    room = room or FakeRoom()
    conversation = talk(room, can_change=can_change)
    with keyboard() as keys:
        keys.send_text("".join(texts) + CTRL_D)
        await converse(conversation)
    return [asked for asked in room.asked if asked != ("typing",)], conversation.said


@asynchronous
async def test_lines_are_posted():
    room = FakeRoom()
    asked, _ = await press("hi", ENTER, "日本", ENTER, room=room)
    assert asked == [("post", "hi"), ("post", "日本")]
    assert ("typing",) in room.asked


@asynchronous
async def test_pasted_lines_are_one_message():
    asked, _ = await press("\x1b[200~one\ntwo\x1b[201~", ENTER)
    assert asked == [("post", "one\ntwo")]


@asynchronous
async def test_control_c_clears_the_line():
    """It also gives up an edit."""
    asked, _ = await press("no", CTRL_C, "yes", ENTER, UP, CTRL_C, "new", ENTER, room=FakeRoom(entry(1, "ann", "old")))
    assert asked == [("post", "yes"), ("post", "new")]


@asynchronous
async def test_arrow_up_on_an_empty_line():
    """On any other line it does not edit."""
    asked, _ = await press(UP, "er", ENTER, "x", UP, ENTER, room=FakeRoom(entry(1, "ann", "old")))
    assert asked == [("edit", "k7Q2xe-1", "older"), ("post", "x")]


@asynchronous
async def test_arrow_up_without_a_token():
    asked, said = await press(UP, room=FakeRoom(entry(1, "ann", "old")), can_change=False)
    assert asked == []
    assert "token" in said[0]


@asynchronous
async def test_edit_command_fills_the_line():
    asked, _ = await press("/edit", ENTER, "er", ENTER, room=FakeRoom(entry(1, "ann", "old")))
    assert asked == [("edit", "k7Q2xe-1", "older")]


@asynchronous
async def test_quit_command():
    conversation = talk(FakeRoom(), can_change=True)
    with keyboard() as keys:
        keys.send_text("/quit" + ENTER)
        await converse(conversation)
    assert conversation.quits


@asynchronous
async def test_tab_completes():
    room = FakeRoom()
    room.change(presence=presence(2, ["bea", "cyril"]))
    asked, _ = await press("cy\tyes", ENTER, "hi b\t", ENTER, "/he\t", ENTER, room=room)
    assert asked == [("post", "cyril: yes"), ("post", "hi bea")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/re", ["/remove", "/retry"]),
        ("/edit b", ["bea"]),
        ("", []),
        ("hi ", []),
        ("B", ["bea: "]),
        ("@b", ["bea"]),
        ("hi @b", ["bea"]),
    ],
)
def test_completions(text, found):
    completer = WordCompleter(lambda: ["ann", "bea"])
    assert [one.text for one in completer.get_completions(Document(text), CompleteEvent())] == found


class Waiting(Conversation):
    """A conversation that hangs up after its toolbar was shown a few times."""

    shown = 0

    def toolbar(self):
        self.shown += 1
        if self.shown == 5:
            self.keys.send_text(CTRL_D)
        return super().toolbar()


@pytest.mark.parametrize("others", [True, False])
@asynchronous
async def test_countdown_is_shown(others):
    """The line below the prompt changes while the client waits, and when the room changes."""
    room = FakeRoom()
    room.change(state="online" if others else "waiting")
    conversation = Waiting(room, "ann", print, lambda: 80, can_change=True)
    with keyboard() as keys:
        conversation.keys = keys
        talking = asyncio.create_task(converse(conversation, 0.01))
        while not talking.done():
            await asyncio.sleep(0.02)
            if others:
                room.change(typing=["bea"])
        await talking
    assert conversation.shown >= 5


@asynchronous
async def test_lines_are_printed_above_the_prompt():
    with keyboard():
        print_above([[("bold", "a"), ("", "b")], [("", "c")]])
        assert get_app_session().output.text.splitlines() == ["ab", "c"]


# Without a screen


async def lines_of(*texts):
    for text in texts:
        yield text


@asynchronous
async def test_lines_of_a_dumb_terminal():
    """The state is printed, as there is no place where it could stay."""
    room = FakeRoom()
    conversation = talk(room, can_change=True)
    await converse_in_lines(conversation, lines_of("hi", "/quit", "never"))
    assert room.asked[0] == ("post", "hi")
    assert len(room.asked) == 1
    assert conversation.said == ["-- online"]


@asynchronous
async def test_state_of_a_dumb_terminal_is_printed_once():
    room = FakeRoom()
    conversation = talk(room, can_change=True)

    async def lines():
        room.change(state="connecting")
        room.change(state="connecting")
        yield ""

    await converse_in_lines(conversation, lines())
    room.change(state="online")
    assert conversation.said == ["-- online", "-- connecting"]


def test_lines_without_styles(capsys):
    print_lines(sys.stdout)([[("bold", "a"), ("", "b")], [("", "c")]])
    assert capsys.readouterr().out == "ab\nc\n"
