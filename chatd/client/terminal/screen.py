"""The conversation on a screen, by prompt_toolkit, and in the lines of a terminal that can do no more (TERM=dumb)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import get_app, get_app_session
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.shortcuts import CompleteStyle
from typing_extensions import override

from chatd.client.terminal.conversation import COMMANDS, Conversation
from chatd.client.terminal.display import Fragments, plain
from chatd.client.view import WAITING


class WordCompleter(Completer):
    """Completes commands at the start of a line, and names anywhere."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    @override
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/") and " " not in text:
            yield from (Completion(name, -len(text)) for name in COMMANDS if name.startswith(text))
            return
        word = text.rpartition(" ")[2].removeprefix("@")
        after = ": " if word == text else ""
        for name in self._names():
            if word and name.casefold().startswith(word.casefold()):
                yield Completion(name + after, -len(word), display=name)


def screen_width() -> int:
    """Return the width of the terminal in cells."""
    return get_app_session().output.get_size().columns


def print_above(lines: Sequence[Fragments]) -> None:
    """Print lines above the prompt.

    The terminal stays in its mode: in another one it would itself show the keys that are pressed meanwhile.
    """
    session = get_app_session()
    ended = FormattedText(part for line in lines for part in (*line, ("", "\n")))
    if session.app is None or not session.app.is_running:
        print_formatted_text(ended, end="")
        return
    renderer = session.app.renderer
    renderer.erase()
    session.app.print_text(ended)
    renderer.reset()
    renderer.request_absolute_cursor_position()
    session.app.invalidate()


def key_bindings(conversation: Conversation) -> KeyBindings:
    """Return what keys do besides what they always do on a line."""
    bindings = KeyBindings()

    @bindings.add("up", filter=Condition(lambda: not get_app().current_buffer.text))
    def edit(event: KeyPressEvent) -> None:
        text = conversation.edit_last()
        if text is not None:
            event.current_buffer.document = Document(text)

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def clear(event: KeyPressEvent) -> None:
        conversation.clear()
        event.current_buffer.reset()

    return bindings


async def converse(conversation: Conversation, tick: float = 1.0) -> None:
    """Lead the conversation on the screen, until the user quits; `tick` is the pace of a countdown in seconds."""
    session: PromptSession[str] = PromptSession(
        lambda: FormattedText(conversation.prompt()),
        bottom_toolbar=conversation.toolbar,
        completer=WordCompleter(conversation.names),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=key_bindings(conversation),
        erase_when_done=True,
        enable_suspend=True,
    )

    def accept(buffer: Buffer) -> bool:
        """Take the line; the prompt stays, since the terminal would show keys that are pressed between two prompts."""
        conversation.enter(buffer.text)
        if conversation.quits:
            session.app.exit(result="")
        if conversation.editing is not None:
            buffer.document = Document(conversation.editing.message)
        return conversation.editing is not None

    session.default_buffer.accept_handler = accept
    session.default_buffer.on_text_changed += lambda buffer: conversation.typed(buffer.text)
    unsubscribe = conversation.room.subscribe(session.app.invalidate)
    clock = asyncio.create_task(_count_down(conversation, session.app.invalidate, tick))
    try:
        with patch_stdout(raw=False), suppress(EOFError):
            await session.prompt_async()
    finally:
        clock.cancel()
        unsubscribe()


async def _count_down(conversation: Conversation, show: Callable[[], Any], tick: float) -> None:
    """Show the time until the next attempt to connect, as it passes."""
    while True:
        await asyncio.sleep(tick)
        if conversation.room.snapshot().state == WAITING:
            show()


def print_lines(out: TextIO) -> Callable[[Sequence[Fragments]], None]:
    """Return a function that prints lines without styles."""

    def say(lines: Sequence[Fragments]) -> None:
        out.write("".join(f"{plain(line)}\n" for line in lines))
        out.flush()

    return say


async def converse_in_lines(conversation: Conversation, lines: AsyncIterator[str]) -> None:
    """Lead the conversation without moving the cursor, until the user quits."""
    shown = ""

    def show() -> None:
        nonlocal shown
        state = conversation.room.snapshot().state
        if state != shown:
            shown = state
            conversation.note(conversation.toolbar())

    unsubscribe = conversation.room.subscribe(show)
    show()
    try:
        async for line in lines:
            conversation.enter(line)
            if conversation.quits:
                break
    finally:
        unsubscribe()
