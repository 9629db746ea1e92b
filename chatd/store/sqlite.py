"""A log in one SQLite file: durable, for one node.

One thread writes.  While it commits one batch of posts, the next batch gathers.  Many posts
therefore share one disk sync (*group commit*), and no post waits for a batch to fill.  Messages are numbered
and stamped in the transaction that stores them.  Followers and posters are notified only after the commit.

A second thread reads.  The reactor's thread touches the file when it opens it; later it only asks for its size.
Every few seconds the store looks whether its files are in place or, after a failure, tries the disk.  It therefore
notices a fault, and recovers from one, without a post.
`chatd.store.sqlite_file` holds the SQL.
"""

import pathlib
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import IDelayedCall, IReactorFromThreads, IReactorTime
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from typing_extensions import override

from chatd.histogram import SECONDS, Histogram
from chatd.messages import Entry, Post
from chatd.room.cursors import HELD, Behind
from chatd.room.log import MAIN, InDoubt, LogUnavailable, Page, Poster
from chatd.room.moderation import RoomSummary, Sanction, every_room
from chatd.store.base import Retention, Store, answer_retry, notify
from chatd.store.sqlite_file import Commit, SqliteFile

MAX_PENDING: Final = 10_000
"""The most posts that may wait for the disk; more are refused, so that a slow disk does not fill the memory."""
DISK_LOOK_SECONDS: Final = 5
"""The interval at which the store looks at its files, or tries a failing disk."""
ERASE_SECONDS: Final = 1
"""The time after which the write-ahead log no longer holds what a removal erased, unless another program reads it.

Each further step, which searches a part of a large file for copies, follows after this time too."""
CLOSE_FILE_SECONDS: Final = 10
"""How long a disk that does not answer may delay the end of the process."""

_logger = Logger()
_T = TypeVar("_T")


class Worker(Protocol):
    """One thread that does one thing at a time, in order."""

    def start(self) -> None:
        """Start the thread; call this before `do`."""

    def do(self, work: Callable[[], _T]) -> "Deferred[_T]":
        """Run a function in the thread; fire with its result in the reactor's thread."""

    def stop(self) -> None:
        """Finish all the work, and end the thread."""


class ThreadWorker(Worker):
    """A Worker on a thread pool of one, which a disk that does not answer cannot keep from ending the process."""

    def __init__(self, reactor: IReactorFromThreads, name: str) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name=name)
        self._pool.threadFactory = partial(threading.Thread, daemon=True)  # type: ignore[assignment]

    @override
    def start(self) -> None:
        self._pool.start()

    @override
    def do(self, work: Callable[[], _T]) -> "Deferred[_T]":
        return deferToThreadPool(self._reactor, self._pool, work)

    @override
    def stop(self) -> None:
        self._pool.stop()


class _QueuedPost(NamedTuple):
    """A post that is not in the log yet."""

    room: str
    post: Post
    poster: Poster


class SqliteStore(Store):
    """A store in one SQLite file.

    `now` returns the time in seconds since 1970, and `steady` seconds that pass evenly.
    """

    epoch: str = ""

    def __init__(
        self,
        path: pathlib.Path,
        retain: Retention,
        now: Callable[[], float],
        writer: Worker,
        reader: Worker,
        *,
        clock: IReactorTime,
        steady: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(Histogram(SECONDS))
        self.file = SqliteFile(path, retain, now, steady)
        self._now = now
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._look_call: IDelayedCall
        self._erase_call: IDelayedCall | None = None
        self._looking = False
        """True while the writer has not answered the last look."""
        self._closing = False
        self._in_doubt = False
        """True after a batch that may be stored although the followers do not know it."""
        self._gathering: list[_QueuedPost] = []
        """The posts of the next commit."""
        self._committing: list[_QueuedPost] | None = None
        """The posts of the commit in progress; None if there is no commit."""
        self._settling: list[Deferred[None]] = []
        """Callers of settled() that wait for the commit in progress."""
        self._to_settle: list[Deferred[None]] = []
        """Callers of settled() that wait for the next commit."""

    # Opening and closing

    @override
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        untrimmed = self.file.open(seed)
        self.epoch = self.file.epoch
        self.sanctions.replace(self.file.sanctions())
        self._writer.start()
        self._reader.start()
        self._look_later()
        if not self.file.erased:
            self._erase_later()
        if untrimmed is not None:
            self._trim_after(untrimmed)
        return succeed(None)

    @override
    def close(self) -> "Deferred[None]":
        closed: Deferred[None] = self.settled().addCallback(self._close)
        return closed.addTimeout(CLOSE_FILE_SECONDS, self._clock).addErrback(self._not_closed)

    def _close(self, _: None) -> "Deferred[None] | None":
        if self._closing:
            return None
        if self._committing is not None:  # posts arrived meanwhile
            return self.settled().addCallback(self._close)
        self._closing = True
        self._look_call.cancel()
        if self._erase_call is not None:  # closing the file empties its write-ahead log too
            self._erase_call.cancel()
        # The file is closed in a thread, because that can take as long as a commit.
        idle = self._reader.do(_nothing)
        return idle.addCallback(lambda _: self._writer.do(self.file.close)).addCallback(self._closed)

    def _closed(self, _: None) -> None:
        self._writer.stop()
        self._reader.stop()

    def _not_closed(self, failure: Failure) -> None:
        """Give up a disk that does not answer; the process ends without it."""
        failure.trap(DeferredTimeout)
        self.abandon()
        _logger.error("the store was not closed: the disk has not answered for {seconds} s", seconds=CLOSE_FILE_SECONDS)

    @override
    def usage(self) -> Mapping[str, int]:
        return self.file.usage()

    # Writing

    @override
    def append(self, room: str, post: Post, poster: Poster) -> None:
        if len(self._gathering) >= MAX_PENDING:
            poster.refused(post, LogUnavailable("too many posts wait for the disk"))
            return
        self._gathering.append(_QueuedPost(room, post, poster))
        if self._committing is None:
            self._commit()

    def _commit(self) -> None:
        """Hand all posts that have gathered to the writer."""
        batch = self._committing = self._gathering
        self._gathering = []
        self._settling, self._to_settle = self._to_settle, []
        posts = [(room, post) for room, post, _ in batch]  # a copy: abandon() empties the batch
        commit = self._writer.do(lambda: self.file.commit(posts)).addBoth(self._timed, self._clock.seconds())
        notified = commit.addCallbacks(self._committed, self._failed, callbackArgs=(batch,), errbackArgs=(batch,))
        notified.addErrback(lambda failure: _logger.failure("a follower or poster failed after a commit", failure))
        notified.addCallback(self._next)

    def _timed(self, result: _T, begun: float) -> _T:
        self.commits.add(self._clock.seconds() - begun)
        return result

    def _committed(self, commit: Commit, batch: Sequence[_QueuedPost]) -> None:
        self._writable()
        self._notify(commit)
        for (_, post, poster), outcome in zip(batch, commit.outcomes, strict=False):  # empty if abandoned
            if isinstance(outcome, Exception):
                notify(poster.refused, post, outcome)
                continue
            number, same = outcome
            if same is None:
                notify(poster.posted, post, number)
            else:
                notify(answer_retry, post, number, poster, same=same)

    def _erase_later(self) -> None:
        """Erase what removals have left in the files soon, once for the removals of a second."""
        if self._erase_call is None and not self._closing:
            self._erase_call = self._clock.callLater(ERASE_SECONDS, self._erase)

    def _erase(self) -> None:
        self._erase_call = None
        self._writer.do(self.file.erase).addCallbacks(self._erased, self._not_erased)

    def _erased(self, done: bool) -> None:
        if not done:  # the file is large, or another program reads the store
            self._erase_later()

    def _not_erased(self, failure: Failure) -> None:
        _logger.error("the write-ahead log was not emptied: {error}", error=failure.value)
        self._erase_later()

    def _failed(self, failure: Failure, batch: Sequence[_QueuedPost]) -> None:
        self._unwritable(failure)
        error: LogUnavailable
        if isinstance(failure.value, InDoubt):
            self._in_doubt = True
            error, outcome = failure.value, "may or may not be stored"
        else:
            error, outcome = LogUnavailable(str(failure.value)), "were not stored"
        if batch:  # empty if it was abandoned
            _logger.error("{posts} posts {outcome}: {error}", posts=len(batch), outcome=outcome, error=error)
        for _, post, poster in batch:
            notify(poster.refused, post, error)

    def _next(self, _: None) -> None:
        self._committing = None
        settling, self._settling = self._settling, []
        if self._gathering:
            self._commit()
        else:  # the posts of the next commit may have been abandoned
            settling += self._to_settle
            self._to_settle = []
        for settled in settling:
            settled.callback(None)

    def _notify(self, commit: Commit) -> None:
        for follower in self._followers:
            for room, entries in commit.entries.items():
                if entries:
                    notify(follower.appended, room, entries)
            for room, first in commit.firsts.items():
                notify(follower.trimmed, room, first)

    @override
    def settled(self) -> "Deferred[None]":
        if self._committing is None:
            return succeed(None)
        settled: Deferred[None] = Deferred()
        (self._to_settle if self._gathering else self._settling).append(settled)
        return settled

    @override
    def abandon(self) -> None:
        abandoned = [*(self._committing or ()), *self._gathering]
        if self._committing is not None:
            self._committing.clear()  # the commit itself continues
        self._gathering.clear()
        if abandoned:
            _logger.error("{posts} posts abandoned: the disk has not answered", posts=len(abandoned))
        for _, post, poster in abandoned:
            notify(poster.refused, post, InDoubt("the disk has not answered"))

    @override
    def trim(self) -> "Deferred[None]":
        return self._trim_after("")

    def _trim_after(self, place: str) -> "Deferred[None]":
        """Trim the rooms after a name, and do what follows."""
        trimmed = self._trim(place).addCallback(self._lift_expired)
        return trimmed.addCallback(self._return_space).addErrback(self._not_trimmed)

    def _trim(self, place: str) -> "Deferred[None]":
        """Trim the rooms after a name in steps, between which posts are stored."""

        def trimmed(step: tuple[dict[str, int], str | None]) -> "Deferred[None] | None":
            firsts, place = step
            self._notify(Commit([], {}, firsts))
            return None if place is None or self._closing else self._trim(place)

        return self._writer.do(lambda: self.file.trim(place)).addCallback(trimmed)

    def _return_space(self, _: None) -> "Deferred[None]":
        """Shrink the file in steps, between which posts are stored."""

        def returned(more: bool) -> "Deferred[None] | None":
            return self._return_space(None) if more and not self._closing else None

        return self._writer.do(self.file.return_space).addCallback(returned)

    def _lift_expired(self, _: None) -> "Deferred[None]":
        expired = self.sanctions.expired(self._now())
        return self.lift(expired) if expired else succeed(None)

    def _not_trimmed(self, failure: Failure) -> None:
        self._unwritable(failure)
        _logger.error("old messages were not removed: {error}", error=failure.value)

    # Moderation

    @override
    def sanction(self, sanction: Sanction) -> "Deferred[None]":
        stored = self._writer.do(lambda: self.file.add_sanction(sanction))
        return stored.addCallbacks(lambda _: self.sanctions.add(sanction), self._not_moderated)

    @override
    def lift(self, words: Sequence[str]) -> "Deferred[None]":
        def lifted(_: None) -> None:
            for word in words:
                self.sanctions.remove(word)

        return self._writer.do(lambda: self.file.remove_sanctions(words)).addCallbacks(lifted, self._not_moderated)

    @override
    def list_rooms(
        self, after: str, limit: int, wanted: Callable[[str], bool] = every_room
    ) -> "Deferred[Sequence[RoomSummary]]":
        def more(step: tuple[Sequence[RoomSummary], str | None]) -> Any:
            """Go on behind the last room; other reads run between the steps."""
            found, last = step
            if last is None or len(found) == limit:
                return found
            rest = self.list_rooms(last, limit - len(found), wanted)
            return rest.addCallback(lambda others: [*found, *others])

        step = self._reader.do(lambda: self.file.summaries(after, limit, wanted))
        return step.addCallbacks(more, self._unreadable)

    @override
    def clear_room(self, room: str) -> "Deferred[int]":
        return self._clear(room, None, 0)

    def _clear(self, room: str, until: int | None, before: int) -> "Deferred[int]":
        """Remove the messages up to a number in steps, between which posts are stored; fire with the sum."""

        def cleared(step: tuple[int, int, int]) -> "int | Deferred[int]":
            removed, first, last = step
            if removed:
                self._notify(Commit([], {}, {room: first}))
                self._erase_later()
            return before + removed if first > last else self._clear(room, last, before + removed)

        return self._writer.do(lambda: self.file.clear(room, until)).addCallbacks(cleared, self._not_moderated)

    def _not_moderated(self, failure: Failure) -> Failure:
        """Turn an error of SQLite into LogUnavailable."""
        failure.trap(sqlite3.Error, LogUnavailable)
        self._unwritable(failure)
        return Failure(LogUnavailable(str(failure.value)))

    # Cursors of readers outside, of which only this process has any, because it locks the file

    @override
    def claim(self, reader: str, word: str, seconds: float) -> "Deferred[bool]":
        claimed = self._writer.do(lambda: self.file.claim(reader))
        return claimed.addCallbacks(lambda _: HELD, self._not_moderated)

    @override
    def advance(self, reader: str, word: str, cursors: Mapping[str, int]) -> "Deferred[bool]":
        advanced = self._writer.do(lambda: self.file.advance(reader, cursors))
        return advanced.addCallbacks(lambda _: HELD, self._not_moderated)

    @override
    def cursor(self, reader: str, room: str) -> "Deferred[int]":
        return self._reader.do(lambda: self.file.cursor(reader, room)).addErrback(self._unreadable)

    @override
    def behind(self, reader: str, place: str) -> "Deferred[tuple[Sequence[Behind], str]]":
        return self._reader.do(lambda: self.file.behind(reader, place)).addErrback(self._unreadable)

    # Faults

    def _writable(self) -> None:
        self._faults.pop("write", None)
        if not self.file.erased:
            self._erase_later()
        if self._in_doubt:
            self._in_doubt = False
            for follower in self._followers:
                notify(follower.interrupted)

    def _unwritable(self, failure: Failure) -> None:
        self._faults["write"] = f"the log cannot be written: {failure.value}"

    def _look_later(self) -> None:
        self._look_call = self._clock.callLater(DISK_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Look at the files, and try what failed when it was last tried."""
        self._look_later()
        if self._looking:  # behind a commit that takes so long
            if "disk" not in self._faults:
                self._faults["disk"] = f"the disk has not answered for {DISK_LOOK_SECONDS} s"
                _logger.error("{fault}", fault=self._faults["disk"])
            return
        self._looking = True
        if "read" in self._faults:
            self.read(MAIN, None, 1).addErrback(lambda _: None)  # the fault is noted already
        if "write" in self._faults:
            looked = self._writer.do(self.file.probe).addCallbacks(lambda _: self._writable(), self._unwritable)
        else:
            looked = self._writer.do(self.file.check_files).addErrback(self._lost)
        looked.addCallback(self._looked)

    def _looked(self, _: None) -> None:
        self._looking = False
        self._faults.pop("disk", None)

    def _lost(self, failure: Failure) -> None:
        self._unwritable(failure)
        _logger.error("{fault}", fault=self._faults["write"])

    # Reading

    @override
    def read(self, room: str, after: int | None, limit: int) -> "Deferred[Page]":
        page = self._reader.do(lambda: self.file.page(room, after, limit))
        return page.addCallbacks(self._readable, self._unreadable)

    def _readable(self, page: Page) -> Page:
        self._faults.pop("read", None)
        return page

    def _unreadable(self, failure: Failure) -> Failure:
        """Turn an error of SQLite into LogUnavailable."""
        failure.trap(sqlite3.Error)
        self._faults["read"] = f"the log cannot be read: {failure.value}"
        return Failure(LogUnavailable(str(failure.value)))


def _nothing() -> None:
    """Find out that a worker has no other work."""
