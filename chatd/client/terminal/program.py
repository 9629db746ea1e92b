"""The program behind `python -m chatd.client`: a conversation, or posting or reading in a pipe, from start to end."""

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from chatd.client.aio import Client, Room
from chatd.client.protocol import Rejected
from chatd.client.storage import FileStorage, MemoryStorage, Storage
from chatd.client.terminal.arguments import SPLIT_MAX, STARTED, USAGE, ChatOptions, parse
from chatd.client.terminal.conversation import GRACE_SECONDS, Conversation, drained
from chatd.client.terminal.piping import LinePoster, json_line, print_entries, read_lines, text_line, watch_reader
from chatd.client.terminal.screen import converse, converse_in_lines, print_above, print_lines, screen_width
from chatd.client.terminal.status import reason_words, refusal_words, stays_words
from chatd.client.view import ONLINE, REJECTED, STOPPED, WAITING

DONE: Final = 0
FAILED: Final = 1
KEPT: Final = 20_000
"""The most entries in memory of a program in a pipe, which may run for months: more than a resume returns at once."""
SILENT_SECONDS: Final = 10
"""The seconds without a stored post after which a program that posts reports this."""
STDIN: Final = 0
STDOUT: Final = 1


class Stop:
    """The signals that end the program: SIGINT, SIGTERM and SIGHUP."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The last signal; None before the first one."""
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop, number)

    def _stop(self, number: int) -> None:
        self.signal = number
        self._event.set()

    async def wait(self) -> None:
        """Wait for a signal that no earlier call has returned for."""
        await self._event.wait()
        self._event.clear()


async def race(*ways: Awaitable[Any]) -> None:
    """Wait until the first one is done, cancel the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def ended(room: Room) -> None:
    """Wait until the server has refused the client, or the room was stopped."""
    while room.snapshot().state not in (REJECTED, STOPPED):
        await room.changed()


def report_states(room: Room, complain: Callable[[str], None]) -> Callable[[], None]:
    """Return a function that reports, once each, that the server cannot be reached, and that it can be again."""
    told: list[str] = []

    def report() -> None:
        snapshot = room.snapshot()
        reason = reason_words(snapshot.reason)
        if snapshot.state == WAITING and told[-1:] != [reason]:
            told.append(reason)
            complain(f"{reason}: trying again until the server answers")
        elif snapshot.state == ONLINE and told:
            told.clear()
            complain("connected")

    return report


def state_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder of the outbox, by the XDG Base Directory Specification."""
    path = Path(environ.get("XDG_STATE_HOME", ""))
    return (path if path.is_absolute() else Path.home() / ".local" / "state") / "chatd"


def open_storage(environ: Mapping[str, str]) -> tuple[Storage, str | None]:
    """Return the storage of unsent messages, and the reason if that is only the memory of this program."""
    try:
        folder = state_folder(environ)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return FileStorage(folder / "outbox.sqlite"), None
    except (OSError, RuntimeError, sqlite3.Error) as error:
        return MemoryStorage(), f"unsent messages cannot be kept in a file, and end with this program: {error}"


async def talk(options: ChatOptions, stop: Stop) -> int:
    """Lead a conversation in the terminal."""
    dumb = os.environ.get("TERM", "dumb") in ("", "dumb", "unknown")
    say = print_lines(sys.stdout) if dumb else print_above
    width = (lambda: shutil.get_terminal_size().columns) if dumb else screen_width
    storage, problem = open_storage(os.environ)
    async with join(options, storage) as client:
        room = client.room(options.address.room)
        conversation = Conversation(room, options.username, say, width, can_change=options.token is not None)
        if problem:
            conversation.note(problem)
        room.subscribe(conversation.refresh)
        lead = converse_in_lines(conversation, read_lines(STDIN, SPLIT_MAX)) if dumb else converse(conversation)
        await race(lead, ended(room), stop.wait())
        if room.snapshot().state == ONLINE:
            await drained(room, GRACE_SECONDS)
        snapshot = room.snapshot()
    stays = stays_words(snapshot.outbox, kept=problem is None)
    if stays:
        options.complain(stays)
    if snapshot.state == REJECTED:
        options.complain(refusal_words(snapshot.error, options.address.room))
        return FAILED
    return DONE


async def post(options: ChatOptions, stop: Stop) -> int:
    """Post the lines of standard input."""
    async with join(options) as client:
        room = client.room(options.address.room, events=(), keep=KEPT)
        room.subscribe(report_states(room, options.complain))
        poster = LinePoster(room)
        watch = poster.watch(options.complain, SILENT_SECONDS)
        await race(poster.run(read_lines(STDIN, options.split)), watch, ended(room), stop.wait())
        if stop.signal is not None:
            await race(poster.settle(), ended(room), stop.wait(), asyncio.sleep(GRACE_SECONDS))
        snapshot, fault = room.snapshot(), poster.fault()
    if snapshot.state == REJECTED:
        fault = refusal_words(snapshot.error, options.address.room)
    if fault:
        options.complain(fault)
    return FAILED if fault else DONE


@contextmanager
def ended_by_sigint() -> Iterator[None]:
    """Let SIGINT end the program at once, even while a write waits for the reader of a pipe."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


async def read(options: ChatOptions) -> int:
    """Print the messages of a room until a signal, the reader or the server ends that."""
    line = json_line if options.json else text_line
    gone, fault = asyncio.Event(), None
    watch_reader(STDOUT, gone.set)
    with ended_by_sigint(), open(STDOUT, "wb", closefd=False) as out:  # noqa: ASYNC230 -- it is open
        async with join(options) as client:
            room = client.room(options.address.room, events=(), keep=KEPT)
            room.subscribe(report_states(room, options.complain))
            try:
                await race(print_entries(room, out, line), ended(room), gone.wait())
            except BrokenPipeError:
                gone.set()
            except OSError as error:
                fault = f"standard output cannot be written: {error.strerror}"
            except Rejected:
                pass  # the snapshot has it
            refusal = room.snapshot().error
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # the rest of the buffer cannot be written
    if gone.is_set():
        return DONE
    options.complain(fault or refusal_words(refusal, options.address.room))
    return FAILED


def join(options: ChatOptions, storage: Storage | None = None) -> Client:
    """Return a client of the server that the options name; by default its outbox is in memory."""
    return Client(options.address.server, username=options.username, token=options.token, storage=storage)


async def run(options: ChatOptions) -> int:
    """Do what the options ask for, and return the exit status."""
    if options.post:
        return await post(options, Stop())
    if options.json or not os.isatty(STDOUT):
        return await read(options)
    return await talk(options, Stop())


def main(words: Sequence[str], started: str = STARTED) -> int:
    """Run the program, and return its exit status."""
    options = parse(words, os.environ, started)
    if not options.post and not options.json and os.isatty(STDOUT) and not os.isatty(STDIN):
        options.complain("standard input is not a terminal: use --post to post its lines: see --help")
        return USAGE
    logging.getLogger("chatd.client").addHandler(logging.NullHandler())  # what it logs, the states report
    return asyncio.run(run(options))
