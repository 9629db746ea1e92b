"""A log in one SQLite file: durable, for one node.

One thread writes.  While it commits one batch of posts, the next batch gathers.  Many posts
therefore share one disk sync (*group commit*), and no post waits for a batch to fill.  Messages are numbered
and stamped in the transaction that stores them.  Followers and posters are notified only after the commit.

A second thread reads.  The reactor's thread touches the file when it opens it; later it only asks for its size.
`chatd.store.sqlite_file` holds the SQL.
"""

import pathlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from typing_extensions import override

from chatd.histogram import SECONDS, Histogram
from chatd.messages import Entry, Post
from chatd.room.log import InDoubt, LogUnavailable, Page, Poster
from chatd.store.base import Retention, Store, answer_retry
from chatd.store.sqlite_file import Commit, SqliteFile

MAX_PENDING: Final = 10_000
"""The most posts that may wait for the disk; more are refused, so that a slow disk does not fill the memory."""

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
    """A Worker on a thread pool of one."""

    def __init__(self, reactor: IReactorFromThreads, name: str) -> None:
        self._reactor = reactor
        self._pool = ThreadPool(minthreads=1, maxthreads=1, name=name)

    @override
    def start(self) -> None:
        self._pool.start()

    @override
    def do(self, work: Callable[[], _T]) -> "Deferred[_T]":
        return deferToThreadPool(self._reactor, self._pool, work)

    @override
    def stop(self) -> None:
        self._pool.stop()


class _Pending(NamedTuple):
    """A post that is not in the log yet."""

    room: str
    post: Post
    poster: Poster


class SqliteStore(Store):
    """A store in one SQLite file.

    `now` returns the time in seconds since 1970.
    """

    epoch: str = ""

    def __init__(
        self, path: pathlib.Path, retain: Retention, now: Callable[[], float], writer: Worker, reader: Worker
    ) -> None:
        super().__init__(Histogram(SECONDS))
        self.file = SqliteFile(path, retain, now)
        self._now = now
        self._writer = writer
        self._reader = reader
        self._gathering: list[_Pending] = []
        """The posts of the next commit."""
        self._committing: list[_Pending] | None = None
        """The posts of the commit in progress; None if there is no commit."""
        self._settling: list[Deferred[None]] = []
        """Callers of settled() that wait for the commit in progress."""
        self._to_settle: list[Deferred[None]] = []
        """Callers of settled() that wait for the next commit."""

    # Opening and closing

    @override
    def open(self, seed: Sequence[Entry]) -> "Deferred[None]":
        self.file.open(seed)
        self.epoch = self.file.epoch
        self._writer.start()
        self._reader.start()
        return succeed(None)

    @override
    def close(self) -> "Deferred[None]":
        return self.settled().addCallback(self._close)

    def _close(self, _: None) -> "Deferred[None] | None":
        if self._committing is not None:  # posts arrived meanwhile
            return self.close()
        self._writer.stop()
        self._reader.stop()
        self.file.close()
        return None

    @override
    def usage(self) -> Mapping[str, int]:
        return self.file.usage()

    # Writing

    @override
    def append(self, room: str, post: Post, poster: Poster) -> None:
        if len(self._gathering) >= MAX_PENDING:
            poster.refused(post, LogUnavailable("too many posts wait for the disk"))
            return
        self._gathering.append(_Pending(room, post, poster))
        if self._committing is None:
            self._commit()

    def _commit(self) -> None:
        """Hand all posts that have gathered to the writer."""
        batch = self._committing = self._gathering
        self._gathering = []
        self._settling, self._to_settle = self._to_settle, []
        posts = [(room, post) for room, post, _ in batch]  # a copy: abandon() empties the batch
        commit = self._writer.do(lambda: self.file.commit(posts)).addBoth(self._timed, self._now())
        notified = commit.addCallbacks(self._committed, self._failed, callbackArgs=(batch,), errbackArgs=(batch,))
        notified.addErrback(lambda failure: _logger.failure("a follower or poster failed after a commit", failure))
        notified.addCallback(self._next)

    def _timed(self, result: _T, begun: float) -> _T:
        self.commits.add(max(0.0, self._now() - begun))  # the clock may be set back
        return result

    def _committed(self, commit: Commit, batch: Sequence[_Pending]) -> None:
        self._faults.pop("write", None)
        self._notify(commit)
        for (_, post, poster), (number, stored) in zip(batch, commit.outcomes, strict=False):  # empty if abandoned
            if stored is None:
                poster.posted(post, number)
            else:
                answer_retry(post, number, poster, same=stored == post.message)

    def _failed(self, failure: Failure, batch: Sequence[_Pending]) -> None:
        self._faults["write"] = f"the log cannot be written: {failure.value}"
        if batch:  # empty if it was abandoned
            _logger.error("{posts} posts were not stored: {error}", posts=len(batch), error=failure.value)
        for _, post, poster in batch:
            poster.refused(post, LogUnavailable(str(failure.value)))

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
                    follower.appended(room, entries)
            for room, first in commit.firsts.items():
                follower.trimmed(room, first)

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
            poster.refused(post, InDoubt("the disk has not answered"))

    @override
    def trim(self) -> "Deferred[None]":
        return self._writer.do(self.file.trim).addCallbacks(
            lambda firsts: self._notify(Commit([], {}, firsts)),
            lambda failure: _logger.error("old messages were not removed: {error}", error=failure.value),
        )

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
