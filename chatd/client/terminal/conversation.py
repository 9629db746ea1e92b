"""The conversation of one user in a room: what each line of the user does, and what is printed in answer.

It knows neither the keyboard nor the screen: a terminal gives it lines, and a function that prints.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Any, Final

from chatd.client.aio import Room
from chatd.client.protocol import ClientStopped, Rejected
from chatd.client.terminal.display import Fragments, safe
from chatd.client.terminal.status import people_words, toolbar, unsent
from chatd.client.terminal.transcript import Transcript, notice, pending_lines
from chatd.client.view import ONLINE, RoomEntry

GRACE_SECONDS: Final = 3.0
"""The time that unsent posts have when the user quits."""
COMMANDS: Final = {
    "/help": "show this list",
    "/who": "show who is here",
    "/older": "show older messages",
    "/edit": "edit your last message, as the arrow up does; /edit TEXT replaces it",
    "/remove": "remove your last message",
    "/retry": "send the messages again that the server refused",
    "/discard": "forget the messages that the server refused",
    "/quit": "quit, as Ctrl-D does",
}
KEYS: Final = "Tab completes commands and names. Ctrl-C clears the line. A text that begins with / is typed with //."
NO_TOKEN: Final = "messages can only be changed with a token, which proves who wrote them: see --token-file"  # noqa: S105
PEOPLE_WIDTH: Final = 2000


class Conversation:
    """A user in a room.  `say` prints lines above the prompt, and `width` returns the cells of a line."""

    def __init__(
        self,
        room: Room,
        username: str,
        say: Callable[[Sequence[Fragments]], None],
        width: Callable[[], int],
        *,
        can_change: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.room = room
        self.username = username
        self.quits = False
        """True after the user has quit."""
        self.editing: RoomEntry | None = None
        """The message that the next line replaces."""
        self._say = say
        self._width = width
        self._can_change = can_change
        self._clock = clock
        self._transcript = Transcript(username)
        self._paging: asyncio.Task[None] | None = None

    # For the screen

    def refresh(self) -> None:
        """Print what is new in the room."""
        snapshot = self.room.snapshot()
        lines = self._transcript.lines(snapshot, self._width())
        if lines:
            self._say(lines)
        for post in snapshot.outbox:
            if post.error is not None and ("replaces" in post.frame or "type" in post.frame):
                self.room.discard(post.label)  # the message is still as it was
                self.note(f"the message was not changed: {safe(str(post.error))}")

    def prompt(self) -> list[tuple[str, str]]:
        """Return the text before the line of the user: the posts without an answer, and the name."""
        snapshot = self.room.snapshot()
        pending = pending_lines(snapshot.outbox, self._width() - 1, online=snapshot.state == ONLINE)
        head = f"edit {self._transcript.time_of(self.editing)}> " if self.editing else f"{safe(self.username)}> "
        return [*(part for line in pending for part in (*line, ("", "\n"))), ("bold", head)]

    def toolbar(self) -> str:
        """Return the line below the prompt."""
        return toolbar(self.room.snapshot(), self.username, self._width(), self._clock())

    def note(self, text: str) -> None:
        """Print a line of the program itself."""
        self._say(notice(text, self._width()))

    def names(self) -> list[str]:
        """Return the names of those who are here or have written, which can be completed."""
        snapshot = self.room.snapshot()
        here = snapshot.presence.users if snapshot.presence else None
        names = {*(here or ()), *(entry.username for entry in snapshot.messages)}
        return sorted(name for name in names if safe(name) == name)

    # For the keyboard

    def typed(self, text: str) -> None:
        """Tell the others that the user types a message."""
        if text and (not text.startswith("/") or text.startswith("//")):
            self.room.typing()

    def clear(self) -> None:
        """Give up the line and the edit."""
        self.editing = None

    def edit_last(self) -> str | None:
        """Begin to edit the user's last message and return its text; print why that is not possible."""
        last = self._last_own()
        if last is not None:
            self.editing = last
            return str(last.message)
        return None

    def enter(self, text: str) -> None:
        """Take a line of the user."""
        editing, self.editing = self.editing, None
        if not text.strip():
            return
        if editing is not None:
            if text != editing.message:
                self._ask(lambda: self.room.edit(editing.id, text))
        elif text.startswith("/") and not text.startswith("//"):
            self._command(*text.split(maxsplit=1))
        else:
            self._ask(lambda: self.room.post(text.removeprefix("/") if text.startswith("//") else text))

    def _command(self, command: str, text: str = "") -> None:
        handlers: dict[str, Callable[[str], Any]] = {
            "/help": self._help,
            "/who": self._who,
            "/older": self._older,
            "/edit": self._edit,
            "/remove": self._remove,
            "/retry": lambda _: self._refused(self.room.retry),
            "/discard": lambda _: self._refused(self.room.discard),
            "/quit": self._quit,
        }
        if command in handlers:
            handlers[command](text)
        else:
            self.note(f"{safe(command)} is no command: /help lists them, and // begins a text with a slash")

    def _help(self, _: str) -> None:
        for text in (*(f"{name:9} {words}" for name, words in COMMANDS.items()), KEYS):
            self.note(text)

    def _who(self, _: str) -> None:
        presence = self.room.snapshot().presence
        self.note(people_words(presence, PEOPLE_WIDTH) if presence else "nobody knows while offline")

    def _edit(self, text: str) -> None:
        last = self._last_own()
        if last is not None and text:
            self._ask(lambda: self.room.edit(last.id, text))
        else:
            self.editing = last

    def _remove(self, _: str) -> None:
        last = self._last_own()
        if last is not None:
            self._ask(lambda: self.room.remove(last.id))

    def _quit(self, _: str) -> None:
        self.quits = True

    def _older(self, _: str) -> None:
        if self._paging is None or self._paging.done():
            self._paging = asyncio.create_task(self._read_older())

    async def _read_older(self) -> None:
        known = {entry.id for entry in self.room.snapshot().messages}
        try:
            await self.room.older()
        except (Rejected, ClientStopped) as error:
            self.note(f"the older messages cannot be read: {safe(str(error))}")
            return
        page = takewhile(lambda entry: entry.id not in known, self.room.snapshot().messages)
        self._say(self._transcript.older([*page], self._width()))

    def _refused(self, act: Callable[[str], Any]) -> None:
        refused = [post.label for post in self.room.snapshot().outbox if post.error is not None]
        for label in refused:
            self._ask(partial(act, label))
        if not refused:
            self.note("the server has refused no message")

    def _last_own(self) -> RoomEntry | None:
        """Return the user's last message that can be changed; print the reason if there is none."""
        if not self._can_change:
            self.note(NO_TOKEN)
            return None
        messages: Sequence[RoomEntry] = self.room.snapshot().messages
        own = (entry for entry in reversed(messages) if entry.username == self.username and not entry.removed)
        last: RoomEntry | None = next(own, None)
        if last is None:
            self.note("you have no message here that can be changed: /older shows older ones")
        return last

    def _ask(self, request: Callable[[], object]) -> None:
        """Put a request into the outbox, which the snapshot shows until the server answers."""
        try:
            request()
        except (OSError, sqlite3.Error) as error:
            self.note(f"the message was not sent, because the outbox cannot keep it: {safe(str(error))}")


async def drained(room: Room, seconds: float) -> None:
    """Wait until the outbox has no post to send, or for some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while unsent(room.snapshot().outbox):
                await room.changed()
