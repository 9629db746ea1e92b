"""The sanctions in Redis, which all nodes share.

A hash holds them, and the feed announces each change.  A node reads the hash at the beginning of each session, and
again when the feed has dropped entries that it had not read.
"""

from collections.abc import Sequence
from typing import Final

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Entry
from chatd.room.log import Follower
from chatd.room.moderation import Sanctions
from chatd.store.base import load_sanction
from chatd.store.redis.link import RedisConnection

SANCTIONS: Final = "{chatd}:sanctions"


class SharedSanctions(Follower):
    """Keeps the sanctions of one node equal to those in Redis."""

    def __init__(self, sanctions: Sanctions) -> None:
        self._sanctions = sanctions
        self._connection: RedisConnection | None = None
        self._loads = 0
        """The number of reads of the hash in flight."""
        self._meanwhile: list[tuple[str, bytes]] = []
        """The changes announced since the first of them began, which its reply may lack."""

    def connected(self, connection: RedisConnection) -> "Deferred[None]":
        """Read the hash over the connection of a new session."""
        self._connection = connection
        return self._load(connection)

    def _load(self, connection: RedisConnection) -> "Deferred[None]":
        self._loads += 1
        return connection.ask("HGETALL", SANCTIONS).addBoth(self._loaded)

    def _loaded(self, reply: "Sequence[bytes] | Failure") -> Failure | None:
        self._loads -= 1
        meanwhile = [*self._meanwhile]
        if not self._loads:
            self._meanwhile.clear()
        if isinstance(reply, Failure):
            return reply
        self._sanctions.replace([load_sanction(data) for data in reply[1::2]])
        for word, data in meanwhile:
            self._apply(word, data)
        return None

    def changed(self, word: str, data: bytes) -> None:
        """Take a change from the feed: the JSON of a sanction, or nothing if it was removed."""
        if self._loads:
            self._meanwhile.append((word, data))
        self._apply(word, data)

    def _apply(self, word: str, data: bytes) -> None:
        if data:
            self._sanctions.add(load_sanction(data))
        else:
            self._sanctions.remove(word)

    @override
    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """Do nothing: messages are no sanctions."""

    @override
    def trimmed(self, room: str, first: int) -> None:
        """Do nothing, as for messages that are appended."""

    @override
    def interrupted(self) -> None:
        """Read the hash again; if that fails, the next session reads it."""
        connection = self._connection
        if connection is not None:
            self._load(connection).addErrback(lambda _: connection.drop())
