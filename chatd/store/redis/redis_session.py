"""Sessions with Redis, one after the other, for as long as the store is open.

A session is two connections.  One carries posts and reads, many in flight at once; the other
waits for the feed.  If either fails, both are dropped, and the posts in flight are in doubt.  The next session starts
after a pause.

Each session begins with a check: is the newest entry of the feed that this node has read still there?  Redis may
have lost it, in a failover or because a backup was restored, and may have reused its number.  Then the epoch
is replaced, once for all nodes, and each node makes its followers reread.  The check is repeated whenever the feed
is silent for a while.  Every entry of the feed also names its epoch.

The check also repairs a log that has lost some of its keys, and draws a new epoch (`lua/open.lua`).  A Redis that
refuses to write, because it is full, does not end a session: the log can still be read and trimmed.
"""

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred, DeferredList, inlineCallbacks, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.messages import Entry
from chatd.store.base import SEED_ROOM, StoreError, instant, new_epoch, sorted_extra
from chatd.store.redis.feed import EpochChanged, Feed
from chatd.store.redis.keys import FEED, KEYS, MICROSECONDS, digest, room_key
from chatd.store.redis.link import (
    REPLY_SECONDS,
    Link,
    Lost,
    RedisConnection,
    RedisRefused,
    Script,
    TlsErrors,
    code_of,
    remedy,
    why,
)
from chatd.store.redis.lobby import ANNOUNCE, STREAM, RedisLobby

FORMAT: Final = 3
"""The format this code writes; it reads every log whose `readable_since` is not higher."""
READABLE_SINCE: Final = 1
"""The oldest format whose code can read and write what this code writes."""
FEED_ENTRIES: Final = 1000
"""The most entries that one read of the feed returns."""
SEED_PIECE: Final = 500
"""The most messages of the seed that one script stores."""
FEED_SILENCE_SECONDS: Final = 2.0
"""How long the feed may be silent before the log is checked again."""
FAREWELL_SECONDS: Final = 1.0
"""The time limit for announcing that this node leaves."""
SESSION_BACKOFF_SECONDS: Final = 0.1, 1.0
"""The pause before the next session: the first, doubled after each failure, and the longest."""

OPEN: Final = Script("open")
_FULL: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS"})
"""Refusals of writes alone: everything can still be read."""
_PASSING: Final = _FULL | {"BUSY", "WRONGTYPE", "NOPERM"}
"""Refusals that a new session would not cure."""

_logger = Logger()


class RedisSession:
    """Keeps a session with Redis, and starts the next one when it fails.

    `scripts` are those that the store runs.  `prepare` runs before the first session is ready, and `begin` before each.
    `faults` belongs to the store; this class keeps `session` and `write` in it.
    """

    def __init__(
        self,
        link: Link,
        feed: Feed,
        faults: dict[str, str],
        scripts: Sequence[Script],
        *,
        prepare: Callable[[RedisConnection], "Deferred[Any]"],
        begin: Callable[[RedisConnection], "Deferred[Any]"],
    ) -> None:
        self.lobby = RedisLobby()
        self.connection: RedisConnection | None = None
        """The connection for posts and reads; None while there is no session."""
        self.clock = link.clock
        self._link = link
        self._feed = feed
        self._faults = faults
        self._scripts = scripts
        self._prepare = prepare
        self._begin = begin
        self._connections: list[RedisConnection] = []
        self._ticks = LoopingCall(self._tick)
        self._pause = SESSION_BACKOFF_SECONDS[0]
        self._closing = False
        self._dropped = False
        self._seed: Sequence[Entry] = ()
        self._seed_digest = ""
        self._ended: Deferred[None] = succeed(None)
        faults["session"] = "it is not open yet"

    def start(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Start the first session; fire when it is there, however many attempts that takes."""
        opened: Deferred[None] = Deferred()
        self._seed = seed
        self._seed_digest = digest(*(text for entry in seed for text in (*entry[1:4], sorted_extra(entry)) if text))
        self._ticks.clock = self.clock
        self._ticks.start(1, now=False)
        self._ended = self._run(opened)
        return opened

    def stop(self) -> "Deferred[None]":
        """Announce that this node leaves, end the session, and start no other."""
        farewell = self.lobby.close().addTimeout(FAREWELL_SECONDS, self.clock)
        return farewell.addErrback(lambda failure: failure.trap(DeferredTimeoutError)).addCallback(self._stop)

    def _stop(self, _: object) -> "Deferred[None]":
        self._closing = True
        if self._ticks.running:
            self._ticks.stop()
        self.drop()
        self._ended.cancel()
        return self._ended

    def _tick(self) -> None:
        for connection in self._connections:
            connection.drop_if_overdue()
            connection.keep_alive()
        self.lobby.tick()

    def drop(self) -> "Deferred[Any]":
        """End the session, which fails all requests; fire when the connections are closed."""
        self._faults.setdefault("session", f"there is no connection to the log at {self._link.address}")
        self.connection = None
        self._dropped = True
        self.lobby.disconnected()
        self._feed.give_up()
        return DeferredList([connection.drop() for connection in self._connections])

    # Faults

    def refused(self, refusal: Failure) -> None:
        """Note that Redis refused a write."""
        self._unwritable(refusal)
        self.unreadable(refusal)

    def unreadable(self, refusal: Failure) -> None:
        """End the session after a refusal, unless a new session would not help."""
        if code_of(refusal) not in _PASSING:
            self.drop()

    def writable(self) -> None:
        """Note that Redis accepted a write."""
        self._faults.pop("write", None)

    def _unwritable(self, refusal: Failure) -> None:
        words = f"the log at {self._link.address} cannot be written ({refusal.value})"
        self._report("write", words, f"{remedy(refusal)}; posts are refused until then")

    def _failed(self, failure: Failure) -> None:
        if self._closing or (self._dropped and failure.check(*Lost)):
            return
        if failure.check(StoreError):
            words = str(failure.value)
        else:
            what = "refuses" if failure.check(RedisRefused) else "cannot be reached"
            words = f"the log at {self._link.address} {what} ({why(failure)})"
        new = self._report("session", words, f"{remedy(failure)}; retrying")
        if new and not failure.check(*Lost, *TlsErrors, RedisRefused, StoreError):
            _logger.failure("unexpected error in the Redis session", failure)

    def _report(self, what: str, words: str, remedy: str) -> bool:
        """Note a fault, and log it if it is new; return whether it is."""
        if self._faults.get(what) == words:
            return False
        self._faults[what] = words
        _logger.error("{fault}: {remedy}", fault=words, remedy=remedy)
        return True

    # One session after the other

    @inlineCallbacks
    def _run(self, opened: "Deferred[None]") -> Generator["Deferred[Any]", Any, None]:
        while not self._closing:
            try:
                yield self._session(opened)
            except (EpochChanged, CancelledError):
                pass
            except Exception:  # noqa: BLE001 -- the store must retry after any error
                self._failed(Failure())
            with suppress(CancelledError):
                yield self.drop()
            self._connections.clear()
            if not self._closing:
                with suppress(CancelledError):
                    yield deferLater(self.clock, self._pause * random.uniform(0.5, 1))  # noqa: S311 -- no secret
                self._pause = min(2 * self._pause, SESSION_BACKOFF_SECONDS[1])

    @inlineCallbacks
    def _session(self, opened: "Deferred[None]") -> Generator["Deferred[Any]", Any, None]:
        """Connect, check the log, and read its feed until something fails."""
        self._dropped = False
        connection = yield self._dial(OPEN, *self._scripts, ANNOUNCE)
        yield self._check(connection)
        if not opened.called:
            yield self._prepare(connection)
            self._feed.seen = yield self._check(connection)
        reader = yield self._dial()
        reader.patience = FEED_SILENCE_SECONDS + REPLY_SECONDS
        connection.whenDisconnected().addCallback(lambda _: reader.drop())
        yield self._begin(connection)
        yield self.lobby.connected(connection)
        self.connection = connection
        self._pause = SESSION_BACKOFF_SECONDS[0]
        if self._faults.pop("session", None) and opened.called:
            _logger.info("reconnected to the log at {address}", address=self._link.address)
        if not opened.called:
            opened.callback(None)
        yield self._follow(connection, reader)

    @inlineCallbacks
    def _follow(self, connection: RedisConnection, reader: RedisConnection) -> Generator["Deferred[Any]", Any, None]:
        """Read the feed and the lobby's stream, and check the log whenever the feed is silent."""
        block = int(FEED_SILENCE_SECONDS * 1000)
        heard = self.clock.seconds()
        while True:
            before = self._feed.seen
            cursors = before, self.lobby.seen
            reply = yield reader.ask("XREAD", "COUNT", FEED_ENTRIES, "BLOCK", block, "STREAMS", FEED, STREAM, *cursors)
            for stream, entries in reply or ():
                if stream == STREAM.encode():
                    self.lobby.read(entries, full=len(entries) == FEED_ENTRIES)
                else:
                    self._feed.take(entries)
            if self._feed.seen != before:
                heard = self.clock.seconds()
            elif reply is None or self.clock.seconds() - heard >= FEED_SILENCE_SECONDS:
                epoch = self._feed.epoch
                yield self._check(connection)
                if self._feed.epoch != epoch:  # what was lost may include the presence of this node
                    yield self.lobby.connected(connection)
                heard = self.clock.seconds()

    @inlineCallbacks
    def _dial(self, *scripts: Script) -> Generator["Deferred[Any]", Any, RedisConnection]:
        connection = yield self._link.dial(*scripts)
        self._connections.append(connection)
        return connection  # type: ignore[no-any-return]

    @inlineCallbacks
    def _check(self, connection: RedisConnection) -> Generator["Deferred[Any]", Any, bytes]:
        """Check that the log is the one this node knows, and adopt its epoch; create a log if it does not exist.

        Returns the newest entry of the feed.
        """
        try:
            reply = yield self._open(connection)
        except RedisRefused as refusal:
            yield self._link.refused(connection, refusal)
            raise
        epoch, readable, written, newest, lost, refused = reply
        if int(readable) > FORMAT:
            raise StoreError(
                f"the log at {self._link.address} was written by a newer chatd, in format {int(written)}, which format "
                f"{FORMAT} cannot read: run that version again"
            )
        if refused:
            self._unwritable(Failure(RedisRefused(refused.decode())))
        else:
            self.writable()
        if lost:
            _logger.error(
                "the log at {address} has lost {lost}: its epoch is now {epoch}",
                address=self._link.address,
                lost=lost.decode(),
                epoch=epoch.decode(),
            )
        self._feed.adopt(epoch.decode(), newest)
        return newest  # type: ignore[no-any-return]

    @inlineCallbacks
    def _open(self, connection: RedisConnection) -> Generator["Deferred[Any]", Any, list[bytes]]:
        """Run the script `open`, and give it the seed in pieces if the log is new; return its last reply."""
        stored, piece = 0, self._seed[:0]
        while True:
            words: list[str | bytes | int] = [new_epoch(), FORMAT, READABLE_SINCE, self._feed.epoch, self._feed.seen]
            words += [self._seed_digest, len(self._seed), stored]
            for entry in piece:
                words += [*entry[1:4], sorted_extra(entry), round(instant(entry.timestamp) * MICROSECONDS)]
            reply = yield connection.run(OPEN, [*KEYS, room_key(SEED_ROOM)], *words)
            if len(reply) > 1:
                reply[-1] = reply[-1].strip(b"-\r\n")  # Redis 6.2 gives the whole line
                refusal = RedisRefused(reply[-1].decode())
                if reply[-1] and code_of(Failure(refusal)) not in _FULL:  # such as READONLY
                    raise refusal
                return reply  # type: ignore[no-any-return]
            stored = reply[0]
            piece = self._seed[stored : stored + SEED_PIECE]
