"""Posting to and reading from the log in Redis.

Posts are sent at once, many in flight.  A reply says under which number Redis stored a post and which entry of
the feed announces it; the poster is notified when the feed has reached that entry.  A page likewise waits for
the feed.  If the session ends first, posts in flight are in doubt and reads fail.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

from twisted.internet.defer import Deferred, fail, inlineCallbacks, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.histogram import SECONDS, Histogram
from chatd.messages import Entry, Post
from chatd.room.cursors import Behind
from chatd.room.log import Forbidden, InDoubt, LogUnavailable, NotReplaceable, Page, Poster, Refusal, UnknownId
from chatd.room.moderation import RoomSummary, Sanction, every_room
from chatd.store.base import (
    DAY,
    SAMPLE,
    LogClock,
    Retention,
    Store,
    answer_retry,
    dump_sanction,
    estimate,
    instant,
    log_removed,
    notify,
    sorted_extra,
)
from chatd.store.redis.feed import Feed
from chatd.store.redis.keys import (
    ERASURES,
    HEADS,
    KEYS,
    LOG,
    MICROSECONDS,
    copy_key,
    cursors_key,
    digest,
    fields_of,
    label_key,
    lease_key,
    message_of,
    number_of,
    room_key,
)
from chatd.store.redis.link import Link, Lost, RedisConnection, RedisRefused, Script, why
from chatd.store.redis.lobby import RedisLobby
from chatd.store.redis.redis_session import RedisSession
from chatd.store.redis.shared_sanctions import SANCTIONS, SharedSanctions

MAX_PENDING: Final = 10_000
"""The most posts that may be in flight; more are refused."""
FEED_LENGTH: Final = 100_000
"""About how many entries the feed keeps; a node that misses more rereads its rooms."""
LABEL_SECONDS: Final = DAY
"""How long a label is remembered at least."""
ROOMS: Final = 200
"""The most rooms that one script trims."""
ERASE_SECONDS: Final = 1.0
"""The time after which a removed text is erased; until then the feed has delivered it everywhere."""
ERASE_PIECE: Final = 500
"""The most entries of a room that one script copies, in a few milliseconds."""
ERASE_FEED: Final = 2000
"""The most entries that the feed keeps when a text is erased from it; a node that misses more rereads its rooms."""
COPY_SECONDS: Final = 60
"""How long a copy is kept that no node continues."""

REASONS: Final = Forbidden, UnknownId, NotReplaceable
"""The reasons for which the script `append` does not replace a message."""
SCANNED: Final = 1000
"""About how many names of rooms one request reads."""
NEW_READER: Final = 2
"""The answer of the script `claim` about a reader that has no cursors yet."""
SUMMARIES: Final = 20
"""The most rooms that one script summarizes."""

APPEND, PAGE, TRIM, ERASE, SANCTION, CLEAR, SUMMARIZE, CLAIM, ADVANCE = SCRIPTS = tuple(
    Script(name) for name in ("append", "page", "trim", "erase", "sanction", "clear", "rooms", "claim", "advance")
)

_logger = Logger()
_T = TypeVar("_T")


class _SentPost(NamedTuple):
    """A post in flight."""

    post: Post
    poster: Poster
    begun: float


class RedisStore(Store):
    """A store in Redis.

    `now` returns the time of messages in seconds since 1970, in place of Redis's own clock.  `steady` returns seconds
    that pass evenly.  Between two trims, the time by which posts remove messages follows `steady`, so that a jump of
    Redis's clock removes nothing before the next trim has noticed it.
    """

    lobby: RedisLobby

    def __init__(
        self,
        link: Link,
        retain: Retention,
        now: Callable[[], float] | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(Histogram(SECONDS))
        self._retain = retain
        self._now = now
        self._steady = steady
        self._offset = 0.0
        """How far Redis's clock was ahead of `steady` when it was last read."""
        self._ages: LogClock | None = None
        """Redis's clock; None until it was read."""
        self._removed = 0
        """The number of messages removed and not logged yet; posts count only those that were too old."""
        shared = SharedSanctions(self.sanctions)
        self._followers.append(shared)
        self._feed = Feed(self._followers, shared.changed)
        self._session = RedisSession(
            link, self._feed, self._faults, SCRIPTS, prepare=self._prepare, begin=shared.connected
        )
        self.lobby = self._session.lobby
        self._clock = link.clock
        self._serials = 0
        self._erase_call: IDelayedCall | None = None
        self._closing = False
        self._pending: dict[int, _SentPost] = {}
        """The posts in flight by serial."""
        self._settling: deque[tuple[int, Deferred[None]]] = deque()
        """Callers of settled(), each with the last serial that it waits for."""

    @property
    @override
    def epoch(self) -> str:
        return self._feed.epoch

    @override
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        return self._session.start(seed)

    @override
    def close(self) -> "Deferred[None]":
        return self.settled().addCallback(self._close)

    def _close(self, _: object) -> "Deferred[None]":
        """Erase what this node removed a moment ago, and end the session."""
        self._closing = True
        erased = succeed(None) if self._erase_call is None else self._erase_now()
        return erased.addCallback(lambda _: self._session.stop())

    @override
    def usage(self) -> Mapping[str, int]:
        return {}  # Redis has metrics of its own

    # Posting

    @override
    def append(self, room: str, post: Post, poster: Poster) -> None:
        if self._session.connection is None:
            notify(poster.refused, post, LogUnavailable(self.fault))
            return
        if len(self._pending) >= MAX_PENDING:
            notify(poster.refused, post, LogUnavailable("too many posts are in flight"))
            return
        label, text_digest = LOG, ""
        if post.label is not None:
            label = label_key(room, post.username, post.label)
            target = "" if post.replaces is None else str(post.replaces.number)
            text_digest = digest(post.message, *filter(None, [target, sorted_extra(post)]))
        serial = self._serials = self._serials + 1
        self._pending[serial] = _SentPost(post, poster, self._clock.seconds())
        self._session.connection.run(
            APPEND,
            [*KEYS, room_key(room), label],
            self.epoch,
            self._feed.seq,
            room,
            post.username,
            post.message,
            text_digest,
            max(LABEL_SECONDS, self._retain.seconds or 0) * 1000,
            *self._trimming(),
            post.author or "",
            str(post.replaces or ""),
            "1" if post.removed else "",
            "1" if post.moderated else "",
            sorted_extra(post),
        ).addBoth(self._timed, serial).addCallbacks(
            self._stored, self._not_stored, callbackArgs=(serial,), errbackArgs=(serial,)
        ).addErrback(lambda failure: _logger.failure("a poster failed", failure))

    def _timed(self, result: _T, serial: int) -> _T:
        pending = self._pending.get(serial)
        if pending is not None:
            self.commits.add(max(0.0, self._clock.seconds() - pending.begun))
        return result

    def _trimming(self) -> tuple[int | str, ...]:
        """Return the arguments of the scripts that trim: messages, oldest, newest, length of the feed, time."""
        ages = self._ages.ages(self._retain.seconds) if self._ages and self._retain.seconds else None
        oldest, newest = (round(instant(text) * MICROSECONDS) for text in ages) if ages else (0, 0)
        return self._retain.messages or 0, oldest, newest, FEED_LENGTH, self._given

    @property
    def _given(self) -> int | str:
        """The time for scripts in microseconds; "" for Redis's own clock."""
        return "" if self._now is None else round(self._now() * MICROSECONDS)

    def _stored(self, reply: Sequence[int], serial: int) -> None:
        pending = self._pending.get(serial)
        if not reply:
            self._session.drop()  # the next session adopts the new epoch
            self._refuse(serial, LogUnavailable("the log has lost messages"))
            return
        self._session.writable()
        if not reply[0]:
            self._refuse(serial, REASONS[reply[1] - 1]())
            return
        number, seq, removed, *same = reply
        if pending is not None and pending.post.removed:
            self._erase_later()
        if self._retain.seconds:
            self._removed += removed
        if pending is None:  # abandoned
            return

        def answer() -> None:
            if self._pending.pop(serial, None) is None:
                return
            if same:
                notify(answer_retry, pending.post, number, pending.poster, same=same[0] == 1)
            else:
                notify(pending.poster.posted, pending.post, number)
            self._settle()

        self._feed.when(seq, answer, lambda: self._refuse(serial, InDoubt("the feed has not reached the message")))

    def _not_stored(self, failure: Failure, serial: int) -> None:
        if failure.check(RedisRefused):
            self._session.refused(failure)
            self._refuse(serial, LogUnavailable(str(failure.value)))
        else:
            failure.trap(*Lost)
            pending = self._pending.get(serial)
            if pending is not None and pending.post.removed:
                self._erase_later()  # it may be stored
            self._refuse(serial, InDoubt(why(failure)))

    def _refuse(self, serial: int, error: Refusal) -> None:
        pending = self._pending.pop(serial, None)
        if pending is not None:
            notify(pending.poster.refused, pending.post, error)
            self._settle()

    @override
    def settled(self) -> "Deferred[None]":
        if not self._pending:
            return succeed(None)
        settled: Deferred[None] = Deferred()
        self._settling.append((self._serials, settled))
        return settled

    def _settle(self) -> None:
        oldest = next(iter(self._pending), self._serials + 1)
        while self._settling and self._settling[0][0] < oldest:
            self._settling.popleft()[1].callback(None)

    @override
    def abandon(self) -> None:
        if self._pending:
            _logger.error("{posts} posts abandoned: Redis has not answered", posts=len(self._pending))
        for serial in [*self._pending]:
            self._refuse(serial, InDoubt("Redis has not answered"))

    # Erasing

    def _erase_later(self) -> None:
        """Erase removed texts soon, once for the removals of a second."""
        if self._erase_call is None and not self._closing:
            self._erase_call = self._clock.callLater(ERASE_SECONDS, self._erase_now)

    def _erase_now(self) -> "Deferred[Any]":
        """Erase removed texts, and repeat it if that fails."""
        call, self._erase_call = self._erase_call, None
        if call is not None and call.active():
            call.cancel()
        connection = self._session.connection
        if connection is None:
            self._erase_later()
            return succeed(None)
        return self._erase(connection).addErrback(self._not_erased)

    @inlineCallbacks
    def _erase(self, connection: RedisConnection) -> Generator["Deferred[Any]", Any, None]:
        """Erase the removed texts of all rooms, those that other nodes have left too."""
        flat = yield connection.ask("HGETALL", ERASURES)
        for name in flat[::2]:
            room, epoch, done = name.decode(), self.epoch, 0
            while not done:
                keys = [*KEYS, room_key(room), copy_key(epoch, room)]
                limits = ERASE_PIECE, ERASE_FEED, COPY_SECONDS * 1000
                done = yield connection.run(ERASE, keys, epoch, room, *limits)

    def _not_erased(self, failure: Failure) -> None:
        failure.trap(RedisRefused, *Lost)
        _logger.error("a removed text was not erased yet: {error}", error=why(failure))
        self._erase_later()

    # Trimming

    @override
    def trim(self) -> "Deferred[None]":
        connection = self._session.connection
        if connection is None:
            return succeed(None)
        trimmed = self._trim(connection).addCallback(self._reached).addCallback(self._lift_expired)
        return trimmed.addErrback(self._not_trimmed).addCallback(lambda _: self._erase_now())

    def _lift_expired(self, _: None) -> "Deferred[None]":
        expired = self.sanctions.expired(time.time() if self._now is None else self._now())
        return self.lift(expired) if expired else succeed(None)

    def _prepare(self, connection: RedisConnection) -> "Deferred[Any]":
        """Trim before the first session is ready; the log can also be read if Redis refuses that."""

        def failed(failure: Failure) -> None:
            failure.trap(RedisRefused)
            self._not_trimmed(failure)

        def not_erased(failure: Failure) -> None:
            failure.trap(RedisRefused)
            self._not_erased(failure)

        trimmed = self._trim(connection).addErrback(failed)
        return trimmed.addCallback(lambda _: self._erase(connection)).addErrback(not_erased)

    @inlineCallbacks
    def _trim(self, connection: RedisConnection) -> Generator["Deferred[Any]", Any, int]:
        """Trim every room; return the number of the feed's entry that announces the last one."""
        seq = 0
        cursor = b"0"
        if self._retain.seconds:
            yield self._read_clock(connection)
        while self._retain != Retention():
            cursor, flat = yield connection.ask("HSCAN", HEADS, cursor, "COUNT", ROOMS)
            rooms = [room.decode() for room in flat[::2]]
            for some in _slices(rooms, ROOMS):
                keys = [*KEYS, *map(room_key, some)]
                seq, removed, *failed = yield connection.run(TRIM, keys, self.epoch, *self._trimming(), *some)
                self._removed += removed
                for room, error in zip(failed[::2], failed[1::2], strict=True):
                    self._not_trimmed(Failure(RedisRefused(f"{room.decode()}: {error.decode()}")))
            if cursor == b"0":
                break
        log_removed(self._removed)
        self._removed = 0
        return seq

    @inlineCallbacks
    def _read_clock(self, connection: RedisConnection) -> Generator["Deferred[Any]", Any, None]:
        if self._now is None:
            seconds, micros = yield connection.ask("TIME")
            now = int(seconds) + int(micros) / MICROSECONDS
        else:
            now = self._now()
        self._offset = now - self._steady()
        self._ages = self._ages or LogClock(lambda: self._steady() + self._offset, self._steady)

    def _not_trimmed(self, failure: Failure) -> None:
        _logger.error("old messages were not removed: {error}", error=failure.value)

    def _reached(self, seq: int) -> "Deferred[None]":
        """Fire when the feed has reached an entry, or never will."""
        reached: Deferred[None] = Deferred()
        self._feed.when(seq, lambda: reached.callback(None), lambda: reached.callback(None))
        return reached

    # Moderation

    @override
    def sanction(self, sanction: Sanction) -> "Deferred[None]":
        return self._sanction(sanction.id, dump_sanction(sanction))

    @override
    def lift(self, words: Sequence[str]) -> "Deferred[None]":
        return self._sanction(*chain.from_iterable((word, "") for word in words))

    def _sanction(self, *changes: str | bytes) -> "Deferred[None]":
        feed = self.epoch, self._feed.seq, FEED_LENGTH, self._given
        return self._moderate(SANCTION, [SANCTIONS], *feed, *changes).addCallback(lambda _: None)

    @override
    def clear_room(self, room: str) -> "Deferred[int]":
        return self._moderate(CLEAR, [room_key(room)], self.epoch, room, FEED_LENGTH, self._given)

    def _moderate(self, script: Script, keys: list[str], *args: str | bytes | int) -> "Deferred[Any]":
        """Run a script that changes the log; fire with the second part of its reply when the feed has reached it."""
        connection = self._session.connection
        if connection is None:
            return fail(LogUnavailable(self.fault))

        def done(reply: Sequence[int]) -> "Deferred[int]":
            if not reply:
                self._session.drop()
                raise LogUnavailable("the log has lost messages")
            self._session.writable()
            answer: Deferred[int] = Deferred()
            lost = LogUnavailable("the feed has not reached the change, which may be stored")
            self._feed.when(reply[0], lambda: answer.callback(reply[-1]), lambda: answer.errback(lost))
            return answer

        def failed(failure: Failure) -> Failure:
            failure.trap(RedisRefused, *Lost)
            if failure.check(RedisRefused):
                self._session.refused(failure)
            return Failure(LogUnavailable(why(failure)))

        return connection.run(script, [*KEYS, *keys], *args).addCallbacks(done, failed)

    @override
    def list_rooms(
        self, after: str, limit: int, wanted: Callable[[str], bool] = every_room
    ) -> "Deferred[Sequence[RoomSummary]]":
        if self._session.connection is None:
            return fail(LogUnavailable(self.fault))
        return self._summaries(self._session.connection, after, limit, wanted).addErrback(self._unreadable)

    @inlineCallbacks
    def _summaries(
        self, connection: RedisConnection, after: str, limit: int, wanted: Callable[[str], bool]
    ) -> Generator["Deferred[Any]", Any, Sequence[RoomSummary]]:
        names: list[str] = []  # a heap: to sort all at once would keep the reactor thread for long
        cursor = b""
        while cursor != b"0":
            cursor, flat = yield connection.ask("HSCAN", HEADS, cursor or b"0", "COUNT", SCANNED)
            for room in flat[::2]:
                name = room.decode()
                if name > after and wanted(name):
                    heappush(names, name)
        found: list[RoomSummary] = []
        while some := pop_names(names, SUMMARIES):
            rows = yield connection.run(SUMMARIZE, [*KEYS, *map(room_key, some)], SAMPLE, *some)
            for name, (first, head, sampled, size, *newest) in zip(some, rows, strict=True):
                if sampled:
                    ((stream_id, flat),) = newest
                    entry = message_of(stream_id, number_of(stream_id), fields_of(flat))
                    total = estimate(size, sampled, head - first + 1)
                    found.append(RoomSummary(name, first, head, total, entry.timestamp))
            if len(found) >= limit:
                break
        return found[:limit]

    # Cursors of readers outside

    @override
    def claim(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        return self._using(lambda connection: self._claim(connection, reader, word, seconds))

    @inlineCallbacks
    def _claim(
        self, connection: RedisConnection, reader: str, word: str, seconds: float
    ) -> Generator["Deferred[Any]", Any, bool]:
        keys, epoch = [*KEYS, lease_key(reader), cursors_key(reader)], self.epoch
        found = yield connection.run(CLAIM, keys, epoch, word, round(seconds * 1000), "")
        if found != NEW_READER:
            return bool(found)
        cursor = b""
        held = 1
        while cursor != b"0" and held:
            cursor, heads = yield connection.ask("HSCAN", HEADS, cursor or b"0", "COUNT", SCANNED)
            held = yield connection.run(ADVANCE, [*KEYS, cursors_key(reader)], epoch, word, *heads)
        if held:
            held = yield connection.run(ADVANCE, [*KEYS, cursors_key(reader)], epoch, word, "#epoch", epoch)
        return bool(held)

    @override
    def renew(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        keys, lasting = [*KEYS, lease_key(reader), cursors_key(reader)], round(seconds * 1000)
        return self._using(lambda connection: connection.run(CLAIM, keys, self.epoch, word, lasting, "1")).addCallback(
            bool
        )

    @override
    def end_claim(self, reader: str, word: str) -> "Deferred[None]":
        keys = [*KEYS, lease_key(reader), cursors_key(reader)]
        return self._using(lambda connection: connection.run(CLAIM, keys, self.epoch, word, 0, "")).addCallback(
            lambda _: None
        )

    @override
    def advance(self, reader: str, word: str, cursors: Mapping[str, int]) -> "Deferred[bool]":
        pairs = [part for pair in cursors.items() for part in pair]
        keys = [*KEYS, cursors_key(reader)]
        return self._using(lambda connection: connection.run(ADVANCE, keys, self.epoch, word, *pairs)).addCallback(bool)

    @override
    def cursor(self, reader: str, room: str) -> "Deferred[int]":
        read = self._using(lambda connection: connection.ask("HGET", cursors_key(reader), room))
        return read.addCallback(lambda number: int(number or 0))

    @override
    def behind(self, reader: str, place: str) -> "Deferred[tuple[Sequence[Behind], str]]":
        return self._using(lambda connection: self._behind(connection, reader, place))

    @inlineCallbacks
    def _behind(
        self, connection: RedisConnection, reader: str, place: str
    ) -> Generator["Deferred[Any]", Any, tuple[Sequence[Behind], str]]:
        place_after, flat = yield connection.ask("HSCAN", HEADS, place or "0", "COUNT", SCANNED)
        rooms, heads = flat[::2], flat[1::2]
        cursors = (yield connection.ask("HMGET", cursors_key(reader), *rooms)) if rooms else ()
        found = [
            Behind(room.decode(), int(cursor or 0), int(head))
            for room, cursor, head in zip(rooms, cursors, heads, strict=True)
        ]
        next_place = "" if place_after == b"0" else place_after.decode()
        return [room for room in found if room.head > room.cursor], next_place

    def _using(self, ask: "Callable[[RedisConnection], Deferred[_T]]") -> "Deferred[_T]":
        """Ask over the connection of this session; fail with LogUnavailable."""
        connection = self._session.connection
        if connection is None:
            return fail(LogUnavailable(self.fault))
        return ask(connection).addErrback(self._unreadable)

    # Reading

    @override
    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        if self._session.connection is None:
            return fail(LogUnavailable(self.fault))
        asked = self._session.connection.run(PAGE, [*KEYS, room_key(room)], room, "" if after is None else after, limit)
        return asked.addCallbacks(self._page, self._unreadable, callbackArgs=(after is None,))

    def _page(self, reply: Sequence[Any], newest: bool) -> "Deferred[Page]":
        """Decode a page; fire with it when the feed has reached the instant of the page."""
        if not reply or reply[0] != self.epoch.encode():
            self._session.drop()
            raise LogUnavailable("the log has lost messages")
        _, seq, first, head, entries = reply
        found = [message_of(stream_id, number_of(stream_id), fields_of(flat)) for stream_id, flat in entries]
        page = Page(found[::-1] if newest else found, first, head)
        answer: Deferred[Page] = Deferred()
        lost = LogUnavailable("the feed has not reached the page")
        self._feed.when(int(seq), lambda: answer.callback(page), lambda: answer.errback(lost))
        return answer

    def _unreadable(self, failure: Failure) -> Failure:
        """Turn an error of Redis into LogUnavailable."""
        failure.trap(RedisRefused, *Lost)
        if failure.check(RedisRefused):
            self._session.unreadable(failure)
        return Failure(LogUnavailable(why(failure)))


def pop_names(heap: list[str], most: int) -> list[str]:
    """Remove the smallest names from a heap, which may hold a name many times, and return each once, in order."""
    found: list[str] = []
    while heap and len(found) < most:
        name = heappop(heap)
        found.append(name)
        while heap and heap[0] == name:
            heappop(heap)
    return found


def _slices(rooms: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(rooms), size):
        yield rooms[begin : begin + size]
