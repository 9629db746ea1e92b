"""Lines in and lines out, in a room without a server."""

import asyncio
import io
import json
import os
import threading

import pytest
from support.fake_rooms import FakeRoom, entry
from support.loops import asynchronous
from support.servers import LONG

from chatd.client.protocol import ClientStopped, Rejected
from chatd.client.terminal import piping
from chatd.client.terminal.piping import LinePoster, json_line, print_entries, read_lines, text_line, watch_reader


def pipe(data):
    """Return the end of a pipe that has been written and closed."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(data)
    return os.fdopen(reader, "rb")


async def lines_of(data, longest=500):
    with pipe(data) as file:
        return [line async for line in read_lines(file.fileno(), longest)]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one\ntwo\r\n\nlast", ["one", "two", "last"]),
        ("日本\n".encode(), ["日本"]),
        (b"\xff\n\xe6", ["\ufffd", "\ufffd"]),
    ],
)
@asynchronous
async def test_lines_of_standard_input(data, lines):
    """They are UTF-8, and the last one may have no end."""
    assert await lines_of(data) == lines


@asynchronous
async def test_character_cut_by_a_read(monkeypatch):
    monkeypatch.setattr(piping, "CHUNK", 1)
    assert await lines_of("日本\nx".encode()) == ["日本", "x"]


@asynchronous
async def test_long_line_is_split():
    """The parts are those of the line, without a loss; a part is handed on before the line has ended."""
    assert await lines_of(b"abcdefg\nhi\n", 3) == ["abc", "def", "g", "hi"]
    reader, writer = os.pipe()
    lines = read_lines(reader, 3)
    os.write(writer, b"abcdefg")
    assert [await anext(lines), await anext(lines)] == ["abc", "def"]
    os.close(writer)
    assert await anext(lines) == "g"
    os.close(reader)


@asynchronous
async def test_regular_file_is_read(tmp_path):
    (tmp_path / "log").write_bytes(b"one\ntwo\n")
    with (tmp_path / "log").open("rb") as file:
        assert [line async for line in read_lines(file.fileno(), 500)] == ["one", "two"]


@asynchronous
async def test_terminal_that_was_closed():
    """Nothing more can be read from it."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    assert [line async for line in read_lines(reader, 500)] == []


@asynchronous
async def test_read_after_its_cancellation():
    """The thread that waits for a line keeps neither the loop nor the program."""
    reader, writer = os.pipe()
    threads = {*threading.enumerate()}
    reading = asyncio.create_task(piping.read_chunk(reader))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    os.write(writer, b"late\n")
    for thread in {*threading.enumerate()} - threads:
        thread.join(LONG)
    await asyncio.sleep(0)
    os.close(writer)
    assert await piping.read_chunk(reader) == b""
    os.close(reader)


# Posts


async def given(*lines):
    for line in lines:
        yield line


async def answer_all(room):
    for label in [*room.answers]:
        room.accept(label)
    await asyncio.sleep(0)


@asynchronous
async def test_all_lines_are_stored():
    room = FakeRoom()
    poster = LinePoster(room)
    posting = asyncio.create_task(poster.run(given("one", "", "  \t", "two")))
    while not posting.done():
        await asyncio.sleep(0)
        await answer_all(room)
    await posting
    assert room.asked == [("post", "one"), ("post", "two")]
    assert poster.fault() is None
    await poster.settle()


@asynchronous
async def test_outbox_is_bounded():
    """While as many posts wait as may, the lines behind them are not read."""
    room, read = FakeRoom(), []

    async def lines():
        for number in range(1000):
            read.append(number)
            yield f"line {number}"

    posting = asyncio.create_task(LinePoster(room).run(lines()))
    for _ in range(5000):
        await asyncio.sleep(0)
    assert len(room.answers) == piping.WAITING
    assert len(read) == piping.WAITING + 1
    while not posting.done():
        await answer_all(room)
        await asyncio.sleep(0)
    assert len(room.asked) == 1000


@asynchronous
async def test_refused_lines_are_counted():
    """The lines behind a refused one are posted all the same."""
    room = FakeRoom()
    poster = LinePoster(room)
    posting = asyncio.create_task(poster.run(given("one", "two", "three")))
    for _ in range(9):
        await asyncio.sleep(0)
    room.refuse("p1", Rejected("no\x1b"))
    for _ in range(9):
        await asyncio.sleep(0)  # the others have no answer yet
    room.refuse("p2", Rejected("never"))
    room.accept("p3")
    await posting
    assert poster.fault() == "the server refused 2 messages (no␛)"
    assert [asked for asked in room.asked if asked[0] == "discard"] == [("discard", "p1"), ("discard", "p2")]


@asynchronous
async def test_lines_without_an_answer():
    room = FakeRoom()
    poster = LinePoster(room)
    await asyncio.wait([asyncio.create_task(poster.run(given("one")))], timeout=0.01)
    room.fail("p1", ClientStopped("stopped"))
    await poster.settle()
    assert poster.fault() == "1 message may not be stored, because the program was stopped"


@asynchronous
async def test_server_that_stores_nothing_is_reported():
    """Each silence is reported once, while the room is online and a post waits."""
    room, reports = FakeRoom(), []

    async def turns():
        for _ in range(20):
            await asyncio.sleep(0)
        return len(reports)

    poster = LinePoster(room)
    watching = asyncio.create_task(poster.watch(reports.append, 0))
    assert await turns() == 0
    posting = asyncio.create_task(poster.run(given("one", "two")))
    assert await turns() == 1
    room.accept("p1")
    assert await turns() == 2
    room.accept("p2")
    await posting
    assert await turns() == 2
    assert reports[0] == "no post was stored for 0 s: trying again; the server's /readyz gives the reason"
    watching.cancel()


# Messages


def test_line_of_a_message():
    """Tabs separate exactly three fields, and nothing can forge a line or reach the terminal."""
    line = text_line(entry(1, "b\tea", "one\ntwo\x1b[2J\r\u202e"))
    assert line.decode() == "2026-01-01T12:00:00.000Z\tb␉ea\tone␊two␛[2J␍\ufffd\n"


def test_message_as_json():
    """A line has the fields of a `message` frame, the operator's own too."""
    plain = json.loads(json_line(entry(1)))
    data = {"username": "bea", "message": "hi", "timestamp": "2026-01-01T12:00:00.000Z"}
    assert plain == {"type": "message", "id": "k7Q2xe-1", "data": data}
    assert json.loads(json_line(entry(1, replaced=2)))["replaced"] == "k7Q2xe-2"
    removal = json.loads(json_line(entry(2, replaces=1, removed=True)._replace(extra={"color": "red"})))
    assert (removal["replaces"], removal["removed"], removal["data"]["color"]) == ("k7Q2xe-1", True, "red")


@asynchronous
async def test_entries_are_printed_as_they_arrive():
    class Followed:
        async def __aiter__(self):
            yield entry(1)
            yield entry(2)

    out = io.BytesIO()
    await print_entries(Followed(), out, text_line)
    assert out.getvalue().count(b"\n") == 2


@asynchronous
async def test_reader_that_has_gone():
    """It is noticed although nothing is written; files and terminals have no reader that could go."""
    reader, writer = os.pipe()
    gone = asyncio.Event()
    watch_reader(writer, gone.set)
    await asyncio.sleep(0)
    assert not gone.is_set()
    os.close(reader)
    await gone.wait()
    os.close(writer)
    null = os.open(os.devnull, os.O_WRONLY)
    watch_reader(null, gone.set)
    os.close(null)
