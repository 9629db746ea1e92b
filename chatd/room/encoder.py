"""The encoding that a room needs: how entries and presence become frames.

Rooms keep frames and never look inside them.  The functions that make the frames are handed in, so that the room wing
knows neither JSON nor WebSocket.  `chatd.transport.frames` is the implementation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from chatd.messages import Entry


class Encoder(Protocol):
    """The functions that encode frames; a module that defines them implements this interface."""

    def message_frame(self, epoch: str, entry: Entry) -> bytes:
        """Encode one entry as the frame that every member receives."""

    def entry_of(self, frame: bytes) -> Entry:
        """Return the entry in a frame of message_frame, without its author."""

    def history_frame(
        self, epoch: str, number: int, messages: Iterable[bytes], *, more: bool = False, resumed: bool | None = None
    ) -> bytes:
        """Join message frames into one history frame.

        `messages` are frames of message_frame, oldest first, and `number` is the number of the last one.  `more` means
        that the log holds older entries.  `resumed` answers a client that named its last message.
        """

    def addressed(self, room: str) -> Callable[[bytes], bytes]:
        """Return the form for connections in many rooms: it adds the name of this room to a frame."""

    def compressor(self) -> Callable[[bytes], bytes]:
        """Return a function that compresses frames of message_frame, each with reference to all before it."""

    def presence_frame(self, count: int, **names: Sequence[str]) -> bytes:
        """Encode the number of members, with all `users`, or with those that `join` and `leave`."""

    def typing_frame(self, users: Sequence[str]) -> bytes:
        """Encode the names of the users that type."""
