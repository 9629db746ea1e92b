"""Presence between nodes: which node has which members in a room.

Each node keeps its own members in a hash of the room, and publishes changes in a stream that all nodes read beside the
feed.  Presence may be lost without harm: a node publishes it again in each session.  Nodes
that send no heartbeat for a while count as dead, and their members with them.
"""

from collections.abc import Sequence
from typing import Any, Final

import orjson
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.room.presence import Lobby, LobbyListener, Occupancy
from chatd.store.base import new_epoch
from chatd.store.redis.keys import NO_ENTRY
from chatd.store.redis.link import Lost, RedisConnection, Refusal, Script

ANNOUNCE: Final = Script("announce")
STREAM: Final = "{chatd}:presence"
KEEP: Final = 10_000
"""About how many entries the stream keeps."""
LIVE_SECONDS: Final = 15
"""How long a node counts as alive after a heartbeat."""
BEAT_SECONDS: Final = 5
"""The time between heartbeats."""

_logger = Logger()


def _encode(here: Occupancy) -> bytes:
    """Encode an occupancy; an empty room is empty bytes."""
    users = None if here.users is None else sorted(here.users)
    return orjson.dumps([here.members, users]) if here.members else b""


def _decode(data: bytes) -> Occupancy:
    if not data:
        return Occupancy(0, frozenset())
    members, users = orjson.loads(data)
    return Occupancy(members, None if users is None else frozenset(users))


class RedisLobby(Lobby):
    """A lobby in Redis.

    Reports are published once a second, when the session calls `tick`.
    """

    def __init__(self) -> None:
        self.node = new_epoch()
        """The name of this process."""
        self.seen = NO_ENTRY
        """The id of the newest entry of the stream that was read."""
        self._listeners: list[LobbyListener] = []
        self._here: dict[str, bytes] = {}
        """The occupancy last reported, by room."""
        self._dirty: dict[str, dict[str, None]] = {}
        """The rooms to publish, each with the users that type there."""
        self._others: set[str] = set()
        self._connection: RedisConnection | None = None
        self._ticks = 0

    @override
    def follow(self, listener: LobbyListener) -> None:
        self._listeners.append(listener)

    @override
    def report(self, room: str, occupancy: Occupancy, typing: Sequence[str]) -> None:
        data = _encode(occupancy)
        if data:
            self._here[room] = data
        else:
            self._here.pop(room, None)
        self._dirty.setdefault(room, {}).update(dict.fromkeys(typing))

    def connected(self, connection: RedisConnection) -> "Deferred[None]":
        """Begin with a new session: read the stream from its end, and publish every room again."""
        self._dirty |= {room: {} for room in self._here if room not in self._dirty}
        return connection.ask("XREVRANGE", STREAM, "+", "-", "COUNT", 1).addCallback(self._begin, connection)

    def _begin(self, newest: Sequence[Any], connection: RedisConnection) -> None:
        self.seen = newest[0][0] if newest else NO_ENTRY
        self._connection = connection
        self._publish(connection)

    def disconnected(self) -> None:
        """Stop publishing, because the session has ended."""
        self._connection = None

    def close(self) -> "Deferred[Any]":
        """Publish what is left, normally that every room is empty, and remove this node; fire when Redis replies."""
        if self._connection is None:
            return succeed(None)
        self._publish(self._connection)
        return self._connection.ask("DEL", self._key(self.node)).addErrback(self._failed)

    def tick(self) -> None:
        """Publish what was reported, and send and check heartbeats; call this once a second."""
        if self._connection is None:
            return
        self._publish(self._connection)
        self._ticks += 1
        if self._ticks % BEAT_SECONDS == 0:
            self._beat(self._connection)

    def _publish(self, connection: RedisConnection) -> None:
        dirty, self._dirty = self._dirty, {}
        for room, typing in dirty.items():
            keys = [STREAM, f"{{chatd}}:here:{room}", self._key(self.node)]
            typed = orjson.dumps([*typing]) if typing else b""
            arguments = self._here.get(room, b""), typed, LIVE_SECONDS * 1000, KEEP
            connection.run(ANNOUNCE, keys, self.node, room, *arguments).addCallbacks(
                self._answered, self._failed, callbackArgs=(room,)
            )

    @staticmethod
    def _key(node: str) -> str:
        return f"{{chatd}}:node:{node}"

    def _answered(self, others: Sequence[bytes], room: str) -> None:
        for node, data in zip(others[::2], others[1::2], strict=True):
            self._elsewhere(room, node.decode(), data)

    def _failed(self, failure: Failure) -> None:
        """Ignore an error of Redis: the next session or the next change publishes the room again."""
        failure.trap(Refusal, *Lost)

    def _beat(self, connection: RedisConnection) -> None:
        """Send this node's heartbeat, and check those of the others."""
        connection.ask("SET", self._key(self.node), "1", "PX", LIVE_SECONDS * 1000).addErrback(self._failed)
        if self._others:
            others = sorted(self._others)
            asked = connection.ask("MGET", *map(self._key, others))
            asked.addCallbacks(self._counted, self._failed, callbackArgs=(others,))

    def _counted(self, lives: Sequence[bytes | None], others: Sequence[str]) -> None:
        for node, life in zip(others, lives, strict=True):
            if life is None:
                _logger.info("node {node} has left", node=node)
                self._others.discard(node)
                for listener in self._listeners:
                    listener.node_left(node)

    def read(self, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
        """Read the next entries of the stream, and notify the listeners."""
        for stream_id, (_, name, _, room, _, data, _, typed) in entries:
            self.seen = stream_id
            node = name.decode()
            if node == self.node:
                continue
            self._elsewhere(room.decode(), node, data)
            if typed:
                for listener in self._listeners:
                    listener.typing(room.decode(), orjson.loads(typed))

    def _elsewhere(self, room: str, node: str, data: bytes) -> None:
        self._others.add(node)
        here = _decode(data)
        for listener in self._listeners:
            listener.occupancy_changed(room, node, here)
