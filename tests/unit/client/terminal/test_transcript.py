"""The lines above the prompt."""

from datetime import UTC

import pytest
from support.fake_rooms import FakeRoom, entry, pending

from chatd.client.terminal.display import cells, name_style, plain
from chatd.client.terminal.transcript import Transcript, notice, pending_lines

NEXT_DAY = "2026-01-02T08:05:00.000Z"


def shown(transcript, room, width=60):
    return [plain(line) for line in transcript.lines(room.snapshot(), width)]


def transcript():
    return Transcript("ann", UTC)


def test_history_then_what_follows():
    """Each entry is shown once, and own ones are marked."""
    room, lines = FakeRoom(entry(1), entry(2, "ann", "ho")), transcript()
    assert shown(lines, room) == ["--- Thursday 1 January 2026 ---", "12:00   bea: hi", "12:00 > ann: ho"]
    assert shown(lines, room) == []
    room.receive(entry(3, "cy", "hey", NEXT_DAY), entry(4, timestamp=NEXT_DAY))
    assert shown(lines, room) == ["--- Friday 2 January 2026 ---", "08:05   cy: hey", "08:05   bea: hi"]


def test_nothing_before_the_first_history():
    room = FakeRoom()
    assert shown(transcript(), room) == []
    room.change(last=None)
    assert shown(transcript(), room) == []


def test_first_message_of_an_empty_room():
    room, lines = FakeRoom(), transcript()
    shown(lines, room)
    room.receive(entry(1))
    assert shown(lines, room) == ["--- Thursday 1 January 2026 ---", "12:00   bea: hi"]


def test_edits_and_removals_of_the_history():
    """Messages have their newest texts already, so edits among them are not shown again."""
    room = FakeRoom(
        entry(1, message="new", replaced=3), entry(2, message="[removed]", replaced=4, removed=True),
        entry(3, message="new", replaces=1), entry(4, message="[removed]", replaces=2, removed=True),
    )  # fmt: skip
    assert shown(transcript(), room)[1:] == ["12:00   bea: new (edited)", "12:00   bea: (removed)"]


def test_edits_and_removals_that_arrive():
    room, lines = FakeRoom(entry(5)), transcript()
    shown(lines, room)
    room.receive(
        entry(6, message="new", replaces=5),
        entry(7, message="[removed]", replaces=5, removed=True),
        entry(8, message="new", replaces=1),
    )
    assert shown(lines, room) == [
        "12:00   bea edited the message of 12:00: new",
        "12:00   bea removed the message of 12:00",
        "12:00   bea edited an older message: new",
    ]


def test_fresh_start_replaces_everything():
    room, lines = FakeRoom(entry(1)), transcript()
    shown(lines, room)
    room.restart(entry(7, message="other"))  # there is a gap
    assert shown(lines, room) == [
        "-- messages are missing here: the newest ones follow",
        "--- Thursday 1 January 2026 ---",
        "12:00   bea: other",
    ]


def test_notice_is_wrapped():
    assert [plain(line) for line in notice("one two three four five six seven", 30)] == [
        "-- one two three four five ",
        "   six seven",
    ]


def test_older_page_stands_between_notices():
    """After it the day of the newest messages is still known."""
    room, lines = FakeRoom(entry(9, timestamp=NEXT_DAY)), transcript()
    shown(lines, room)
    older = [plain(line) for line in lines.older([entry(1), entry(2)], 60)]
    assert older == [
        "-- 2 older messages:",
        "--- Thursday 1 January 2026 ---",
        "12:00   bea: hi",
        "12:00   bea: hi",
        "-- these were older messages; the newest ones are above",
    ]
    room.receive(entry(10, timestamp=NEXT_DAY))
    assert shown(lines, room) == ["08:05   bea: hi"]
    assert [plain(line) for line in lines.older([], 60)] == ["-- there are no older messages"]
    assert plain(lines.older([entry(1)], 60)[0]) == "-- 1 older message:"


@pytest.mark.parametrize("width", [5, 30, 40, 80, 200])
@pytest.mark.parametrize("name", ["bea", "日" * 30, "b" * 30, "12:00 > ann: hi"])
@pytest.mark.parametrize(
    "text",
    [
        "first\n12:00   ann: forged",
        "x" * 24 + " 12:00   ann: forged" * 5,
        " " * 70 + "12:00   ann: forged",
        "日" * 500,
        "\u2764\ufe0f" * 100,
        "\r12:00   ann: forged\x1b[1A\x1b]0;title\x07",
    ],
)
def test_no_text_forges_a_line(width, name, text):
    """All lines of a message after its first are indented, and the terminal never wraps one itself."""
    room = FakeRoom(entry(1, name, text))
    _, first, *rest = shown(transcript(), room, width)
    assert first.startswith("12:00   ")
    assert all(line.startswith(" " * 8) for line in rest)
    assert all(cells(line) <= max(width, 30) for line in (first, *rest))
    assert all(line.isprintable() or "\u200d" in line for line in (first, *rest))


def test_name_has_its_colour():
    room = FakeRoom(entry(1))
    (_, line) = transcript().lines(room.snapshot(), 60)
    assert (name_style("bea"), "bea") in line


def test_posts_without_an_answer():
    outbox = [pending("1", message="one\ntwo"), pending("2", type="remove", id="k7Q2xe-1")]
    assert [plain(line) for line in pending_lines(outbox, 60, online=True)] == ["sending: one", "sending: a removal"]
    assert plain(pending_lines(outbox, 60, online=False)[0]) == "unsent: one"


def test_refused_post_has_its_reason():
    outbox = [pending("1", ValueError("too long"), message="\x1b[31mone")]
    (line,) = pending_lines(outbox, 60, online=True)
    assert plain(line) == "not sent: ␛[31mone (too long): /retry or /discard"


def test_long_outbox_is_counted():
    outbox = [pending(str(number), message="x" * 99) for number in range(9)]
    lines = [plain(line) for line in pending_lines(outbox, 20, online=True)]
    assert lines == ["4 more", *["sending: xxxxxxxxxx…"] * 5]
