"""Presence between nodes: which node has which members in a room.

Each node keeps its own members in a hash of the room, and publishes changes in a stream that all nodes read beside the
feed.  Nodes that send no heartbeat for a while count as dead, and their members with them.

Presence may be lost without harm.  A node publishes all its rooms again in each session, after each new epoch, and when
its heartbeat was missing, because the other nodes may have dropped it.  Each reply holds the occupancy of the
room at all other nodes.  A node that missed entries of the stream therefore asks for its rooms again.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import orjson
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.room.log import LogUnavailable
from chatd.room.presence import Lobby, LobbyListener, Occupancy
from chatd.store.base import new_epoch, notify
from chatd.store.redis.keys import NO_ENTRY
from chatd.store.redis.link import Lost, RedisConnection, RedisRefused, Script, why

ANNOUNCE: Final = Script("announce")
STREAM: Final = "{chatd}:presence"
KEEP: Final = 10_000
"""About how many entries the stream keeps."""
LIVE_SECONDS: Final = 15
"""How long a node counts as alive after a heartbeat."""
BEAT_SECONDS: Final = 5
"""The time between heartbeats."""
LASTING_SECONDS: Final = 3600
"""How long the hash of a room is kept after it was published; it outlives the nodes that are killed."""
REPUBLISH_SECONDS: Final = LASTING_SECONDS // 2
"""The time in which each room is published again."""

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


def _place(stream_id: bytes) -> tuple[int, ...]:
    """Return the two parts of an entry's id, by which entries are ordered."""
    return tuple(map(int, stream_id.split(b"-")))


def _unavailable(failure: Failure) -> Failure:
    """Turn an error of Redis into LogUnavailable."""
    failure.trap(RedisRefused, *Lost)
    return Failure(LogUnavailable(why(failure)))


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
        self._unsure: dict[str, None] = {}
        """The rooms whose occupancy at the other nodes this node may not know."""
        self._unpublished: dict[str, None] = {}
        """The rooms to publish again after the next heartbeat, because publishing them failed."""
        self._round: list[str] = []
        """The rooms that are yet to be published in this round."""
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

    @override
    def elsewhere(self, room: str) -> "Deferred[Sequence[Occupancy]]":
        connection = self._connection
        if connection is None:
            return fail(LogUnavailable("Redis is not connected"))

        def living(flat: Sequence[bytes]) -> "Deferred[Sequence[Occupancy]]":
            data = dict(zip((node.decode() for node in flat[::2]), flat[1::2], strict=True))
            data.pop(self.node, None)
            if not data:
                return succeed([])
            asked = connection.ask("MGET", *map(self._key, data))
            return asked.addCallback(
                lambda lives: [_decode(data[node]) for node, life in zip(data, lives, strict=True) if life]
            )

        return connection.ask("HGETALL", self._room_key(room)).addCallback(living).addErrback(_unavailable)

    def connected(self, connection: RedisConnection) -> "Deferred[None]":
        """Begin with a new session or epoch: read the stream from its end, and publish every room again."""
        self._send_heartbeat(connection).addErrback(self._failed)
        return connection.ask("XREVRANGE", STREAM, "+", "-", "COUNT", 1).addCallback(self._begin, connection)

    def _begin(self, newest: Sequence[Any], connection: RedisConnection) -> None:
        self.seen = newest[0][0] if newest else NO_ENTRY
        self._connection = connection
        self._mark_dirty(self._here)
        self._publish(connection)

    def _mark_dirty(self, rooms: Iterable[str]) -> None:
        """Publish rooms again; users that type there stay."""
        for room in rooms:
            self._dirty.setdefault(room, {})

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
        self._continue_round()
        self._publish(self._connection)
        self._ticks += 1
        if self._ticks % BEAT_SECONDS == 0:
            self._beat(self._connection)

    def _continue_round(self) -> None:
        """Mark some rooms to be published, so that all of them are within a round."""
        if self._ticks % REPUBLISH_SECONDS == 0:
            self._round += self._here
        share = 1 + len(self._here) // REPUBLISH_SECONDS
        self._unsure |= dict.fromkeys(self._round[:share])
        del self._round[:share]

    def _publish(self, connection: RedisConnection) -> None:
        dirty, self._dirty = self._dirty, {}
        unsure, self._unsure = self._unsure, {}
        for room, typing in dirty.items():
            self._announce(connection, room, typing, again=True)
        for room in unsure:
            if room in self._here and room not in dirty:
                self._announce(connection, room, (), again=False)

    def _announce(self, connection: RedisConnection, room: str, typing: Collection[str], *, again: bool) -> None:
        keys = [STREAM, self._room_key(room), self._key(self.node)]
        typed = orjson.dumps([*typing]) if typing else b""
        limits = LIVE_SECONDS * 1000, KEEP, LASTING_SECONDS * 1000
        connection.run(
            ANNOUNCE, keys, self.node, room, self._here.get(room, b""), typed, *limits, "1" if again else ""
        ).addCallbacks(self._answered, self._not_published, callbackArgs=(room,), errbackArgs=(room,))

    @staticmethod
    def _key(node: str) -> str:
        return f"{{chatd}}:node:{node}"

    @staticmethod
    def _room_key(room: str) -> str:
        return f"{{chatd}}:here:{room}"

    def _answered(self, reply: Sequence[Any], room: str) -> None:
        missing, newest, *flat = reply
        if missing:
            self._mark_dirty(self._here)
        if _place(newest) < _place(self.seen):  # the stream has overtaken this reply
            self._unsure[room] = None
            return
        others = {node.decode(): data for node, data in zip(flat[::2], flat[1::2], strict=True)}
        for node in {*others, *self._others}:
            self._elsewhere(room, node, others.get(node, b""))

    def _not_published(self, failure: Failure, room: str) -> None:
        self._failed(failure)
        self._unpublished[room] = None

    def _failed(self, failure: Failure) -> None:
        """Ignore an error of Redis, because the next heartbeat or session repairs what it caused."""
        failure.trap(RedisRefused, *Lost)

    def _send_heartbeat(self, connection: RedisConnection) -> "Deferred[Any]":
        """Fire with None if the last heartbeat was missing."""
        return connection.ask("SET", self._key(self.node), "1", "PX", LIVE_SECONDS * 1000, "GET")

    def _beat(self, connection: RedisConnection) -> None:
        """Send this node's heartbeat, and check those of the others."""
        self._send_heartbeat(connection).addCallbacks(self._beaten, self._failed)
        if self._others:
            others = sorted(self._others)
            asked = connection.ask("MGET", *map(self._key, others))
            asked.addCallbacks(self._counted, self._failed, callbackArgs=(others,))

    def _beaten(self, life: bytes | None) -> None:
        """Publish again what the other nodes do not have, because they dropped this node or Redis refused it."""
        if life is None:
            self._mark_dirty(self._here)
        failed, self._unpublished = self._unpublished, {}
        self._mark_dirty(failed)

    def _counted(self, lives: Sequence[bytes | None], others: Sequence[str]) -> None:
        for node, life in zip(others, lives, strict=True):
            if life is None:
                _logger.info("node {node} has left", node=node)
                self._others.discard(node)
                for listener in self._listeners:
                    notify(listener.node_left, node)

    def read(self, entries: Sequence[tuple[bytes, Sequence[bytes]]], *, full: bool = False) -> None:
        """Read the next entries of the stream, and notify the listeners; `full` if there may be more."""
        if full and self._connection is not None:
            oldest = self._connection.ask("XRANGE", STREAM, "-", "+", "COUNT", 1)
            oldest.addCallbacks(self._look_for_gap, self._failed, callbackArgs=(self.seen,))
        for stream_id, (_, name, _, room, _, data, _, typed) in entries:
            self.seen = stream_id
            node = name.decode()
            if node == self.node:
                continue
            self._elsewhere(room.decode(), node, data)
            if typed:
                for listener in self._listeners:
                    notify(listener.typing, room.decode(), orjson.loads(typed))

    def _look_for_gap(self, oldest: Sequence[Any], before: bytes) -> None:
        """Ask for every room again, if the stream has dropped entries that this node had not read."""
        if oldest and before != NO_ENTRY and _place(oldest[0][0]) > _place(before):
            _logger.info("the stream of presence has dropped entries that this node had not read: asking again")
            self._unsure |= dict.fromkeys(self._here)

    def _elsewhere(self, room: str, node: str, data: bytes) -> None:
        self._others.add(node)
        here = _decode(data)
        for listener in self._listeners:
            notify(listener.occupancy_changed, room, node, here)
