"""Who is in the rooms at which node, told through Redis.

Each node keeps what it has said in a hash of the room, and says it once more in a stream that all nodes read along
with the feed.  It is nothing that must not be lost: a node says it again when it comes back to Redis, and one that
has not been heard of for a while is taken to be dead, with all who are at it.
"""

from collections.abc import Sequence
from typing import Any, Final

import orjson
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.room.presence import LobbyListener, Occupancy
from chatd.store.base import new_epoch
from chatd.store.redis.link import Lost, RedisConnection, Refusal, Script

ANNOUNCE: Final = Script("announce")
STREAM: Final = "{chatd}:presence"
KEEP: Final = 10_000
"""About how many entries the stream keeps."""
LIVE_SECONDS: Final = 15
"""How long a node is taken to live after it was heard of."""
BEAT_SECONDS: Final = 5
"""How often a node is heard of."""

_logger = Logger()


def _write(here: Occupancy) -> bytes:
    """What is said of who is there; nothing if nobody is."""
    users = None if here.users is None else sorted(here.users)
    return orjson.dumps([here.members, users]) if here.members else b""


def _read(said: bytes) -> Occupancy:
    if not said:
        return Occupancy(0, frozenset())
    members, users = orjson.loads(said)
    return Occupancy(members, None if users is None else frozenset(users))


class RedisLobby:
    """Implements chatd.presence.Lobby.

    What is reported goes out once a second, when the store calls `tick`.
    """

    def __init__(self) -> None:
        self.node = new_epoch()
        """Stands for this process."""
        self.seen = b"0-0"
        """The newest entry of the stream that was read."""
        self._guests: list[LobbyListener] = []
        self._here: dict[str, bytes] = {}
        """What was said last, by room."""
        self._dirty: dict[str, dict[str, None]] = {}
        """The rooms of which something is to be said, and who types there."""
        self._others: set[str] = set()
        self._line: RedisConnection | None = None
        self._ticks = 0

    def follow(self, listener: LobbyListener) -> None:
        """Lobby.follow."""
        self._guests.append(listener)

    def report(self, room: str, occupancy: Occupancy, typing: Sequence[str]) -> None:
        """Lobby.report."""
        said = _write(occupancy)
        if said:
            self._here[room] = said
        else:
            self._here.pop(room, None)
        self._dirty.setdefault(room, {}).update(dict.fromkeys(typing))

    def come(self, line: RedisConnection) -> "Deferred[None]":
        """A session has begun: read the stream from here on, and say all again."""
        self._dirty |= {room: {} for room in self._here if room not in self._dirty}
        return line.ask("XREVRANGE", STREAM, "+", "-", "COUNT", 1).addCallback(self._begin, line)

    def _begin(self, newest: Sequence[Any], line: RedisConnection) -> None:
        self.seen = newest[0][0] if newest else b"0-0"
        self._line = line
        self._say(line)

    def left(self) -> None:
        """The session has ended."""
        self._line = None

    def close(self) -> "Deferred[Any]":
        """Say what there is still to say, which is that nobody is here, and go; fires when that has been heard."""
        if self._line is None:
            return succeed(None)
        self._say(self._line)
        return self._line.ask("DEL", self._key(self.node)).addErrback(self._failed)

    def tick(self) -> None:
        """Say what is to be said, and see who lives; to be called once a second."""
        if self._line is None:
            return
        self._say(self._line)
        self._ticks += 1
        if self._ticks % BEAT_SECONDS == 0:
            self._beat(self._line)

    def _say(self, line: RedisConnection) -> None:
        dirty, self._dirty = self._dirty, {}
        for room, typing in dirty.items():
            keys = [STREAM, f"{{chatd}}:here:{room}", self._key(self.node)]
            typed = orjson.dumps([*typing]) if typing else b""
            said = self._here.get(room, b""), typed, LIVE_SECONDS * 1000, KEEP
            line.run(ANNOUNCE, keys, self.node, room, *said).addCallbacks(
                self._answered, self._failed, callbackArgs=(room,)
            )

    @staticmethod
    def _key(node: str) -> str:
        return f"{{chatd}}:node:{node}"

    def _answered(self, others: Sequence[bytes], room: str) -> None:
        for node, said in zip(others[::2], others[1::2], strict=True):
            self._elsewhere(room, node.decode(), said)

    def _failed(self, failure: Failure) -> None:
        """It is said again in the next session, or with the next change."""
        failure.trap(Refusal, *Lost)

    def _beat(self, line: RedisConnection) -> None:
        """Say that this node lives, and see which of the others do."""
        line.ask("SET", self._key(self.node), "1", "PX", LIVE_SECONDS * 1000).addErrback(self._failed)
        if self._others:
            others = sorted(self._others)
            asked = line.ask("MGET", *map(self._key, others))
            asked.addCallbacks(self._counted, self._failed, callbackArgs=(others,))

    def _counted(self, lives: Sequence[bytes | None], others: Sequence[str]) -> None:
        for node, life in zip(others, lives, strict=True):
            if life is None:
                _logger.info("node {node} is there no more", node=node)
                self._others.discard(node)
                for guest in self._guests:
                    guest.node_left(node)

    def read(self, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
        """Take what has come in the stream."""
        for stream_id, (_, name, _, room, _, said, _, typed) in entries:
            self.seen = stream_id
            node = name.decode()
            if node == self.node:
                continue
            self._elsewhere(room.decode(), node, said)
            if typed:
                for guest in self._guests:
                    guest.typing(room.decode(), orjson.loads(typed))

    def _elsewhere(self, room: str, node: str, said: bytes) -> None:
        self._others.add(node)
        here = _read(said)
        for guest in self._guests:
            guest.occupancy_changed(room, node, here)
