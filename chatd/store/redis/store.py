"""A log in Redis (6.2 or later) or Valkey: many nodes, one room.

The log is in a few keys (see lua/prelude.lua), and only scripts write there, each in one piece: whichever node a
message comes to, Redis numbers it, stamps it, keeps it in the stream of its room, and tells of it in one more
stream, the *feed*, that is of all rooms.  Every node reads the feed, and learns of messages from there alone, also of
its own: so all clients of all nodes see one order.  Who posted is told when the feed has come to the message, and
who reads, when it has come to where the page was read: so nobody has seen what this node would not miss.

A node holds two connections: one that asks, with many posts on their way at once, and one that waits for the feed.
They are one *session*: when either fails both are dropped, and what was on its way is in doubt.  Each session begins
by seeing whether the log is still the one that was known: is the newest entry that was read still there?  Redis may
have lost it, in a failover or with a backup that was restored, and may have given its number again.  Then the epoch
is replaced, once for all nodes, and each node tells its followers to read anew.  The same is asked whenever the feed
has been silent for a while, and each entry of the feed names its epoch.

What this cannot promise: Redis answers before a replica has the message, and, as it is configured, before the disk
has it (docs/operations.md).  What is lost so is never papered over.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredList, fail, inlineCallbacks, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.histogram import SECONDS, Histogram
from chatd.messages import Entry, Post
from chatd.room.log import Follower, InDoubt, LogUnavailable, Page, Poster
from chatd.store.base import DAY, SEED_ROOM, Retention, StoreError, instant, new_epoch, tell_again, timestamp
from chatd.store.redis.link import REPLY_SECONDS, Link, Lost, RedisConnection, Refusal, Script, TlsErrors, code_of, why
from chatd.store.redis.lobby import ANNOUNCE, STREAM, RedisLobby

FORMAT: Final = 1
"""What this code writes; it reads every log whose `readable_since` is not above it."""
READABLE_SINCE: Final = 1
"""The oldest format whose code can read and write what this code wrote."""
MAX_PENDING: Final = 10_000
"""How many posts may be on their way; more are refused."""
FEED: Final = 100_000
"""About how many entries the feed keeps: a node that misses more reads its rooms again."""
RUN: Final = 1000
"""How many entries of the feed are read at once."""
SILENCE_SECONDS: Final = 2.0
"""How long the feed may be silent before it is seen whether the log is still the same."""
FAREWELL_SECONDS: Final = 1.0
"""How long it may take to tell the other nodes that this one goes."""
LABEL_SECONDS: Final = DAY
"""How long a label is remembered at least."""
SESSION_BACKOFF_SECONDS: Final = 0.1, 1.0
"""How soon the next session is begun after one has failed: twice as late each time, and at most."""
ROOMS: Final = 200
"""How many rooms are trimmed at once."""
MICROSECONDS: Final = 1_000_000

OPEN, APPEND, PAGE, TRIM = SCRIPTS = tuple(Script(name) for name in ("open", "append", "page", "trim"))
_LOG, _HEADS, _FEED = _KEYS = [f"{{chatd}}:{name}" for name in ("log", "heads", "feed")]
_NONE: Final = b"0-0"
"""The feed's newest entry when there is none."""
_STAYS: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS", "BUSY", "WRONGTYPE", "NOPERM"})
"""Refusals after which nothing is better by coming again."""

_logger = Logger()
_T = TypeVar("_T")


class _Other(Exception):
    """The log is another than the one that is known."""


class _Waiting(NamedTuple):
    """A post that is on its way."""

    post: Post
    poster: Poster
    begun: float


class _Due(NamedTuple):
    """What is to be done when the feed has come to an entry."""

    seq: int
    act: Callable[[], object]
    give_up: Callable[[], object]
    """... or if it never will."""


def _stream(room: str) -> str:
    return f"{{chatd}}:room:{room}"


def _number(stream_id: bytes) -> int:
    return int(stream_id.partition(b"-")[0])


def _entry(stream_id: bytes, number: int, fields: Mapping[bytes, bytes]) -> Entry:
    """The message under an id, whose second part is its time."""
    written = fields.get(b"t")
    stamp = written.decode() if written else timestamp(int(stream_id.partition(b"-")[2]) / MICROSECONDS)
    return Entry(number, fields[b"u"].decode(), fields[b"m"].decode(), stamp)


def _pairs(fields: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=True))


class RedisStore:
    """Implements chatd.store.base.Store.

    `now` gives the time of messages in seconds since 1970, in place of Redis's own clock.
    """

    def __init__(self, link: Link, retain: Retention, now: Callable[[], float] | None = None) -> None:
        self.epoch = ""
        self.commits = Histogram(SECONDS)
        self.lobby = RedisLobby()
        self._link = link
        self._clock = link.clock
        self._retain = retain
        self._now = now
        self._faults: dict[str, str] = {"session": "it is not open yet"}
        self._followers: list[Follower] = []
        self._seen = _NONE
        """The newest entry of the feed that was read."""
        self._asking: RedisConnection | None = None
        """The connection for posts and pages, while there is a session."""
        self._lines: list[RedisConnection] = []
        self._tickets = 0
        self._waiting: dict[int, _Waiting] = {}
        """What is on its way, by ticket."""
        self._due: deque[_Due] = deque()
        self._settling: deque[tuple[int, Deferred[None]]] = deque()
        """Who waits for what is on its way up to a ticket."""
        self._looks = LoopingCall(self._look)
        self._delay = SESSION_BACKOFF_SECONDS[0]
        self._closing = False
        self._ended: Deferred[None] = succeed(None)

    # Opening and closing

    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        """Store.open; it goes on trying, and says in `fault` what is wrong meanwhile."""
        opened: Deferred[None] = Deferred()
        self._looks.clock = self._clock
        self._looks.start(1, now=False)
        self._ended = self._live(seed, opened)
        return opened

    def close(self) -> "Deferred[None]":
        """Store.close."""
        return self.settled().addCallback(self._bid_farewell).addCallback(self._close)

    def _bid_farewell(self, _: None) -> "Deferred[Any]":
        farewell = self.lobby.close().addTimeout(FAREWELL_SECONDS, self._clock)
        return farewell.addErrback(lambda failure: failure.trap(DeferredTimeoutError))

    def _close(self, _: object) -> "Deferred[None]":
        self._closing = True
        if self._looks.running:
            self._looks.stop()
        self._drop()
        self._ended.cancel()
        return self._ended

    def _look(self) -> None:
        for line in self._lines:
            line.look()
        self.lobby.tick()

    def _drop(self) -> "Deferred[Any]":
        """End the session; what is asked fails by that.  Fires when the connections are gone."""
        self._faults.setdefault("session", f"there is no connection to the log at {self._link.address}")
        self._asking = None
        self.lobby.left()
        self._give_up()
        return DeferredList([line.drop() for line in self._lines])

    # The session

    @inlineCallbacks
    def _live(self, seed: Sequence[Entry], opened: "Deferred[None]") -> Generator["Deferred[Any]", Any, None]:
        """Have one session after the other."""
        while not self._closing:
            try:
                yield self._session(seed, opened)
            except (_Other, CancelledError):
                pass
            except Exception:  # noqa: BLE001 -- clients rely on it that this goes on
                self._failed(Failure())
            with suppress(CancelledError):
                yield self._drop()
            self._lines.clear()
            if not self._closing:
                with suppress(CancelledError):
                    yield deferLater(self._clock, self._delay * random.uniform(0.5, 1))  # noqa: S311 -- no secret
                self._delay = min(2 * self._delay, SESSION_BACKOFF_SECONDS[1])

    def _failed(self, failure: Failure) -> None:
        if self._closing:
            return
        if failure.check(StoreError):
            words = str(failure.value)
        else:
            words = f"the log at {self._link.address} cannot be reached ({why(failure)})"
        remedy = "start it, or name another with --store; it is tried again and again"
        if self._fault("session", words, remedy) and not failure.check(*Lost, *TlsErrors, Refusal, StoreError):
            _logger.failure("nobody foresaw that", failure)

    def _fault(self, what: str, words: str, remedy: str) -> bool:
        """Something is wrong: it is logged, once.  Answers whether that is news."""
        if self._faults.get(what) == words:
            return False
        self._faults[what] = words
        _logger.error("{fault}: {remedy}", fault=words, remedy=remedy)
        return True

    @inlineCallbacks
    def _session(self, seed: Sequence[Entry], opened: "Deferred[None]") -> Generator["Deferred[Any]", Any, None]:
        """Come to the log, and read its feed for as long as nothing fails."""
        asking = yield self._dial(*SCRIPTS, ANNOUNCE)
        yield self._come(asking, seed)
        if not opened.called:
            yield self._trim(asking)
            self._seen = yield self._come(asking, seed)
        feed = yield self._dial()
        feed.patience = SILENCE_SECONDS + REPLY_SECONDS
        asking.whenDisconnected().addCallback(lambda _: feed.drop())
        yield self.lobby.come(asking)
        self._asking = asking
        self._delay = SESSION_BACKOFF_SECONDS[0]
        if self._faults.pop("session", None) and opened.called:
            _logger.info("the log at {address} is there again", address=self._link.address)
        if not opened.called:
            opened.callback(None)
        block = int(SILENCE_SECONDS * 1000)
        heard = self._clock.seconds()
        while True:
            before = self._seen
            cursors = before, self.lobby.seen
            reply = yield feed.ask("XREAD", "COUNT", RUN, "BLOCK", block, "STREAMS", _FEED, STREAM, *cursors)
            for stream, entries in reply or ():
                if stream == STREAM.encode():
                    self.lobby.read(entries)
                else:
                    self._read(entries)
            if self._seen != before:
                heard = self._clock.seconds()
            elif reply is None or self._clock.seconds() - heard >= SILENCE_SECONDS:
                yield self._come(asking, seed)
                heard = self._clock.seconds()

    @inlineCallbacks
    def _dial(self, *scripts: Script) -> Generator["Deferred[Any]", Any, RedisConnection]:
        line = yield self._link.dial(*scripts)
        self._lines.append(line)
        return line  # type: ignore[no-any-return]

    @inlineCallbacks
    def _come(self, line: RedisConnection, seed: Sequence[Entry]) -> Generator["Deferred[Any]", Any, bytes]:
        """See whether the log is the one that is known, and take up the one that is there.

        Answers the newest entry of its feed.
        """
        words: list[str | bytes | int] = [new_epoch(), FORMAT, READABLE_SINCE, self.epoch, self._seen]
        for _, *said, stamp in seed:
            words += [*said, stamp, round(instant(stamp) * MICROSECONDS)]
        try:
            epoch, readable, written, newest = yield line.run(OPEN, [*_KEYS, _stream(SEED_ROOM)], *words)
        except Refusal as refusal:
            if line is self._asking and code_of(Failure()) in _STAYS:
                self._unwritable(refusal)
                return self._seen
            yield self._link.refused(line, refusal)
            raise
        self._faults.pop("write", None)
        if int(readable) > FORMAT:
            raise StoreError(
                f"the log at {self._link.address} was written by a newer chatd, in format {int(written)}, which format "
                f"{FORMAT} cannot read: run that version again"
            )
        self._adopt(epoch.decode(), newest)
        return newest  # type: ignore[no-any-return]

    def _adopt(self, epoch: str, newest: bytes) -> None:
        if epoch == self.epoch:
            return
        before, self.epoch, self._seen = self.epoch, epoch, newest
        if not before:
            return
        _logger.error("the log {before} has lost messages: it is {epoch} from now on", before=before, epoch=epoch)
        self._interrupted()
        self._give_up()

    def _give_up(self) -> None:
        """Wait for the feed no more."""
        due, self._due = self._due, deque()
        for one in due:
            one.give_up()

    def _interrupted(self) -> None:
        for follower in self._followers:
            follower.interrupted()

    # Reading the feed

    def follow(self, follower: Follower) -> None:
        """Log.tail."""
        self._followers.append(follower)

    def _read(self, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> None:
        """Tell the followers of what has come, and then the posters."""
        appended: dict[str, list[Entry]] = {}
        trimmed: dict[str, int] = {}
        missed = False
        epoch = self.epoch.encode()
        for stream_id, flat in entries:
            fields = _pairs(flat)
            if fields[b"e"] != epoch:
                raise _Other
            missed |= _number(stream_id) != _number(self._seen) + 1
            self._seen = stream_id
            room = fields[b"r"].decode()
            if b"n" in fields:
                appended.setdefault(room, []).append(_entry(stream_id, int(fields[b"n"]), fields))
            if b"f" in fields:
                trimmed[room] = int(fields[b"f"])
        if missed:
            _logger.info("the feed no longer goes back to where it was read: the rooms are read again")
            self._interrupted()
        for follower in self._followers:
            for room, new in appended.items():
                follower.appended(room, new)
            for room, first in trimmed.items():
                follower.trimmed(room, first)
        self._tell()

    def _tell(self) -> None:
        """Do what was due when the feed came here."""
        seq = _number(self._seen)
        while self._due and self._due[0].seq <= seq:
            self._due.popleft().act()

    # Posting

    def append(self, room: str, post: Post, poster: Poster) -> None:
        """Log.append."""
        if self._asking is None:
            poster.refused(post, LogUnavailable(self.fault))
            return
        if len(self._waiting) >= MAX_PENDING:
            poster.refused(post, LogUnavailable("too many posts are on their way"))
            return
        label, digest = _LOG, ""
        if post.label is not None:
            label = f"{{chatd}}:label:{_digest(room, post.username, post.label)}"
            digest = _digest(post.message)
        ticket = self._tickets = self._tickets + 1
        self._waiting[ticket] = _Waiting(post, poster, self._clock.seconds())
        self._asking.run(
            APPEND,
            [*_KEYS, _stream(room), label],
            self.epoch,
            _number(self._seen),
            room,
            post.username,
            post.message,
            digest,
            max(LABEL_SECONDS, self._retain.seconds or 0) * 1000,
            *self._keep(),
        ).addBoth(self._timed, ticket).addCallbacks(
            self._kept, self._not_kept, callbackArgs=(ticket,), errbackArgs=(ticket,)
        ).addErrback(lambda failure: _logger.failure("what was kept could not be told", failure))

    def _timed(self, result: _T, ticket: int) -> _T:
        waiting = self._waiting.get(ticket)
        if waiting is not None:
            self.commits.add(max(0.0, self._clock.seconds() - waiting.begun))
        return result

    def _keep(self) -> tuple[int | str, ...]:
        """What the scripts need to know to trim, and to tell."""
        given = "" if self._now is None else round(self._now() * MICROSECONDS)
        return self._retain.messages or 0, (self._retain.seconds or 0) * MICROSECONDS, FEED, given

    def _kept(self, reply: Sequence[int], ticket: int) -> None:
        waiting = self._waiting.get(ticket)
        if not reply:
            self._drop()  # and see, in a new session
            self._refuse(ticket, LogUnavailable("the log has lost messages"))
            return
        self._faults.pop("write", None)
        if waiting is None:  # it was given up
            return
        number, seq, *same = reply

        def tell() -> None:
            if self._waiting.pop(ticket, None) is None:
                return
            if same:
                tell_again(waiting.post, number, waiting.poster, same=same[0] == 1)
            else:
                waiting.poster.posted(waiting.post, number)
            self._settle()

        self._due.append(_Due(seq, tell, lambda: self._refuse(ticket, InDoubt("the feed has not come to it"))))
        self._tell()

    def _not_kept(self, failure: Failure, ticket: int) -> None:
        if failure.check(Refusal):
            self._unwritable(failure.value)
            if code_of(failure) not in _STAYS:
                self._drop()
            self._refuse(ticket, LogUnavailable(str(failure.value)))
        else:
            failure.trap(*Lost)
            self._refuse(ticket, InDoubt(why(failure)))

    def _unwritable(self, error: object) -> None:
        words = f"the log at {self._link.address} cannot be written ({error})"
        self._fault("write", words, "posts are refused until it can")

    def _refuse(self, ticket: int, error: LogUnavailable) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            waiting.poster.refused(waiting.post, error)
            self._settle()

    def settled(self) -> "Deferred[None]":
        """Store.settled."""
        if not self._waiting:
            return succeed(None)
        settled: Deferred[None] = Deferred()
        self._settling.append((self._tickets, settled))
        return settled

    def _settle(self) -> None:
        oldest = next(iter(self._waiting), self._tickets + 1)
        while self._settling and self._settling[0][0] < oldest:
            self._settling.popleft()[1].callback(None)

    def abandon(self) -> None:
        """Store.abandon."""
        if self._waiting:
            _logger.error("{posts} posts are not waited for any more", posts=len(self._waiting))
        for ticket in [*self._waiting]:
            self._refuse(ticket, InDoubt("Redis has not answered"))

    @property
    def fault(self) -> str | None:
        """Store.fault."""
        return "; ".join(self._faults.values()) or None

    def usage(self) -> Mapping[str, int]:
        """Store.usage; Redis tells its own metrics."""
        return {}

    # Trimming

    def trim(self) -> "Deferred[None]":
        """Store.trim."""
        asking = self._asking
        if asking is None:
            return succeed(None)
        return self._trim(asking).addCallbacks(
            self._heard, lambda failure: _logger.error("old messages are not removed: {error}", error=failure.value)
        )

    @inlineCallbacks
    def _trim(self, line: RedisConnection) -> Generator["Deferred[Any]", Any, int]:
        """Trim every room; answers the number in the feed after which that has been told."""
        seq = 0
        cursor = b"0"
        while self._retain != Retention():
            cursor, flat = yield line.ask("HSCAN", _HEADS, cursor, "COUNT", ROOMS)
            rooms = [room.decode() for room in flat[::2]]
            for some in _slices(rooms, ROOMS):
                seq = yield line.run(TRIM, [*_KEYS, *map(_stream, some)], *self._keep(), *some)
            if cursor == b"0":
                break
        return seq

    def _heard(self, seq: int) -> "Deferred[None]":
        """Fires when the feed has come to an entry, or never will."""
        heard: Deferred[None] = Deferred()
        self._due.append(_Due(seq, lambda: heard.callback(None), lambda: heard.callback(None)))
        self._tell()
        return heard

    # Reading

    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        """Log.read."""
        if self._asking is None:
            return fail(LogUnavailable(self.fault))
        asked = self._asking.run(PAGE, [*_KEYS, _stream(room)], room, "" if after is None else after, limit)
        return asked.addCallbacks(self._page, self._unreadable, callbackArgs=(after is None,))

    def _page(self, reply: Sequence[Any], newest: bool) -> "Deferred[Page]":
        """The page, when the feed has come to where it was read: what nobody but a reader knew could be lost unseen."""
        epoch, seq, first, head, entries = reply
        if epoch != self.epoch.encode():
            self._drop()
            raise LogUnavailable("the log has lost messages")
        page = [_entry(stream_id, _number(stream_id), _pairs(flat)) for stream_id, flat in entries]
        told: Deferred[Page] = Deferred()
        answer = Page(page[::-1] if newest else page, first, head)
        lost = LogUnavailable("the feed has not come to it")
        self._due.append(_Due(int(seq), lambda: told.callback(answer), lambda: told.errback(lost)))
        self._tell()
        return told

    def _unreadable(self, failure: Failure) -> Failure:
        failure.trap(Refusal, *Lost)
        if failure.check(Refusal) and code_of(failure) not in _STAYS:
            self._drop()
        return Failure(LogUnavailable(why(failure)))


def _digest(*parts: str) -> str:
    """Stands for some texts, in forty characters; none of them may stand for others."""
    return hashlib.sha1("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()  # noqa: S324 -- a key


def _slices(rooms: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(rooms), size):
        yield rooms[begin : begin + size]
