"""The schedule of one webhook: which deliveries it sends, and when.

A room with possible news for the application is a *lane*: a cursor, and the end of its next batch.  Lanes are served in
parallel, a few at a time, and each lane has at most one request.  A lane waits a moment before its first request, so
that the entries of that time share it, and after each failure for a random time that grows (*full jitter*).  If nothing
but failures comes back, only one request at a time is tried.

The memory is bounded, however long the application is away, because a lane is a few numbers.  If there are too many
lanes, the rooms beyond are found in the store later, by a *scan*.

A batch that was sent once keeps its range until it is taken, and so its id.  Its text is read again for each attempt.
The next batch of a room waits until the store has the cursor, so that a restart repeats no more than one.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from itertools import count
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.room.cursors import Behind, CursorStore
from chatd.room.log import Log, LogUnavailable
from chatd.store.base import instant
from chatd.webhooks.batch import MAX_ENTRIES, Batch, make_batch
from chatd.webhooks.lease import Lease
from chatd.webhooks.sender import Answer

PARALLEL: Final = 8
"""The most requests of one webhook at a time, each for another room."""
MAX_LANES: Final = 10_000
"""The most rooms with news that are held in memory, with some 300 bytes each."""
RATE: Final = 100.0
"""The most deliveries of one webhook that begin in a second, so that busy rooms leave the CPU to clients.

A delivery costs about 1 ms, and 0.05 ms for each message.  Messages of rooms that wait share deliveries."""
BURST_SECONDS: Final = 0.1
"""The time for which an idle webhook saves the deliveries that it may begin."""
GATHER_SECONDS: Final = 0.1
"""How long the first new entry of a room waits for others."""
BACKOFF_SECONDS: Final = 1.0, 60.0
"""The longest pause after the first failure, which doubles with each further one, and the longest of all."""
MAX_WAIT_SECONDS: Final = 3600.0
"""The longest Retry-After that is honoured."""
STORE_SECONDS: Final = 1.0
"""The pause after the store could not be read or written."""
LOG_SECONDS: Final = 60.0
"""The time in which the same fault is logged once."""
OUTCOMES: Final = "taken", "rejected", "unanswered"
"""The outcomes of deliveries: a status of 2xx, another status, and none."""
GONE: Final = 410
"""The status by which the application ends the webhook (Standard Webhooks, delivery success and failure)."""

_logger = Logger()


class WebhookTransport(Protocol):
    """The carrier of deliveries to the application."""

    def send(self, webhook_id: str, body: bytes) -> "Deferred[Answer]":
        """Send a delivery; the Deferred never fails.  Cancel it to drop the request."""

    def close(self) -> "Deferred[Any]":
        """Close what is idle."""


class _Lane:
    """One room with entries that the application may lack."""

    __slots__ = ("attempts", "cursor", "erased", "head", "last", "originals", "request", "room", "since")

    def __init__(self, room: str, cursor: int | None, head: int) -> None:
        self.room = room
        self.cursor = cursor
        """The number of the last entry that the application has taken; None: ask the store."""
        self.head = head
        self.last: int | None = None
        """The end of the batch that was sent and not taken yet."""
        self.attempts = 0
        self.since: float | None = None
        """The time of the oldest entry that the application lacks, in seconds since 1970; None until it was read."""
        self.request: Deferred[Answer] | None = None
        """The request that waits for its answer."""
        self.erased = False
        """True if a text was erased since the batch was read, which may hold it."""
        self.originals: frozenset[int] = frozenset()
        """The numbers of the messages in the request, and of those that its edits replace."""


class Webhook:
    """One application that gets what is appended to every room.

    `now` returns the seconds since 1970, and `jitter` a random number between two others.
    """

    def __init__(
        self,
        name: str,
        reader: str,
        transport: WebhookTransport,
        *,
        log: Log,
        cursors: CursorStore,
        clock: IReactorTime,
        now: Callable[[], float],
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.name = name
        """Stands for it in the log and the metrics, without what its URL may disclose."""
        self.stopped = False
        """True after the application has ended the webhook, until `resume`."""
        self.outcomes: Counter[str] = Counter()
        self.messages = 0
        """The number of messages that the application has taken."""
        self.missed = 0
        """The number of messages that were removed before the application could take them."""
        self._reader = reader
        self._transport = transport
        self._log = log
        self._cursors = cursors
        self._clock = clock
        self._now = now
        self._jitter = jitter
        self._lease = Lease(cursors, reader, clock, self._gained, self._lost)
        self._epoch = ""
        self._lanes: dict[str, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._waiting: list[tuple[float, int, _Lane]] = []
        """A heap of lanes by the time at which they are due."""
        self._serials = count()
        self._in_flight: dict[str, Deferred[None]] = {}
        self._unsaved: dict[str, _Lane] = {}
        """Lanes whose batch was taken, and whose cursor is not in the store yet."""
        self._saving: dict[str, _Lane] = {}
        """Lanes whose cursor the store is writing."""
        self._place: str | None = None
        """The place at which the scan goes on; None if every room with news has a lane."""
        self._scanning: Deferred[Any] | None = None
        """The request for the next rooms of the scan."""
        self._overflowed = False
        """True if a room got no lane since the scan began."""
        self._failures = 0
        """Failed deliveries in a row, over all rooms."""
        self._paused = 0.0
        """The time until which nothing is sent."""
        self._paced = 0.0
        """The time at which RATE permits the next delivery."""
        self._timer: IDelayedCall | None = None
        self._stopping: Deferred[None] | None = None
        self._logged: tuple[str, float] = "", 0.0

    @property
    def active(self) -> bool:
        """True if this node delivers."""
        return self._lease.held

    @property
    def lag(self) -> tuple[int, float]:
        """The known number of messages that the application lacks, and the age of the oldest one in seconds."""
        lanes = self._lanes.values()
        messages = sum(lane.head - lane.cursor for lane in lanes if lane.cursor is not None)
        oldest = min((lane.since for lane in lanes if lane.since is not None), default=None)
        return messages, 0.0 if oldest is None else max(0.0, self._now() - oldest)

    # Its life

    def start(self) -> None:
        """Begin to deliver, when no other node does."""
        self._epoch = self._log.epoch
        self._lease.start()

    def stop(self, seconds: float) -> "Deferred[None]":
        """Send nothing new; fire when all that was sent is answered, or dropped after some seconds."""
        stopping: Deferred[None] = Deferred()
        self._stopping = stopping
        over = self._clock.callLater(max(0.0, seconds), self._forget)

        def stopped(_: None) -> "Deferred[Any]":
            for call in (over, self._timer):
                if call is not None and call.active():
                    call.cancel()
            return self._lease.stop().addCallback(lambda _: self._transport.close())

        stopping.addCallback(stopped)
        self._pump()
        return stopping

    def resume(self) -> None:
        """Deliver again after the application has ended the webhook."""
        if self.stopped:
            self.stopped = False
            self._pump()

    def _gained(self) -> None:
        _logger.info("webhook {name}: this node delivers", name=self.name)
        self._scan_all()

    def _lost(self) -> None:
        _logger.info("webhook {name}: this node no longer delivers", name=self.name)
        self._forget()

    def _forget(self) -> None:
        """Drop every request and every lane."""
        self._lanes.clear()
        self._ready.clear()
        self._waiting.clear()
        self._unsaved, self._saving = {}, {}
        self._place = None
        self._scanning = None
        self._overflowed = False
        for request in [*self._in_flight.values()]:
            request.cancel()
        self._in_flight.clear()
        self._pump()

    # News

    def appended(self, room: str, first: int, head: int) -> None:
        """Learn of new entries of a room."""
        if not self._lease.held:
            return
        lane = self._lanes.get(room)
        if lane is not None:
            lane.head = head
        elif len(self._lanes) < MAX_LANES:
            # Every room without a lane is at its head, unless a scan is still looking for such rooms.
            self._add(_Lane(room, first - 1 if self._place is None else None, head), GATHER_SECONDS)
        elif self._place is None:
            self._place = ""
        else:
            self._overflowed = True

    def erased(self, room: str, originals: Collection[int]) -> None:
        """Drop a request that may have the text of a removed message; its batch is read and sent again."""
        lane = self._lanes.get(room)
        if lane is None:
            return
        if lane.request is None:
            lane.erased = True  # the page that is being read may have it
        elif not lane.originals.isdisjoint(originals):
            lane.erased = True
            lane.request.cancel()

    def trimmed(self, room: str, first: int) -> None:
        """Drop a request if the room has no entry any more, because it may have been cleared."""
        lane = self._lanes.get(room)
        if lane is not None and first > lane.head:
            self.erased(room, lane.originals)

    def interrupted(self) -> None:
        """Look for news in the store, because a notification may be missing or the log has another epoch."""
        if self._epoch and self._log.epoch != self._epoch:
            self.start()
        elif self._place is None and self._lease.held:
            self._scan_all()
        else:
            self._overflowed = True

    def _scan_all(self) -> None:
        """Look at all rooms of the store."""
        self._place = ""
        self._overflowed = False
        self._scan()

    def _scan(self) -> None:
        """Go on with the scan if there is one, and space for lanes."""
        if self._place is None or self._scanning is not None or len(self._lanes) > MAX_LANES // 2:
            return
        asked = self._scanning = self._cursors.behind(self._reader, self._place)
        asked.addCallbacks(self._scanned, self._not_scanned, callbackArgs=(asked,), errbackArgs=(asked,))
        asked.addErrback(self._unexpected)

    def _scanned(self, result: tuple[Sequence[Behind], str], asked: "Deferred[Any]") -> None:
        if self._scanning is not asked:  # forgotten
            return
        found, place = result
        self._place = place or None
        if self._place is None and self._overflowed:
            self._place, self._overflowed = "", False
        for room, cursor, head in found:
            if room not in self._lanes:
                self._add(_Lane(room, cursor, head), 0.0)
        self._scanning = None
        self._scan()

    def _not_scanned(self, failure: Failure, asked: "Deferred[Any]") -> None:
        failure.trap(LogUnavailable)

        def again() -> None:
            if self._scanning is asked:
                self._scanning = None
                self._scan()

        self._clock.callLater(STORE_SECONDS, again)

    # Lanes

    def _add(self, lane: _Lane, delay: float) -> None:
        self._lanes[lane.room] = lane
        self._later(lane, delay)

    def _later(self, lane: _Lane, delay: float) -> None:
        heapq.heappush(self._waiting, (self._clock.seconds() + delay, next(self._serials), lane))
        self._pump()

    def _stale(self, lane: _Lane) -> bool:
        """Return whether a lane was forgotten."""
        return self._lanes.get(lane.room) is not lane

    def _pump(self) -> None:
        """Send what is due."""
        if self._stopping is not None:
            if not (self._in_flight or self._unsaved or self._saving or self._stopping.called):
                self._stopping.callback(None)
            return
        if self.stopped or not self._lease.in_force:
            return
        now = self._clock.seconds()
        waiting = self._waiting
        while waiting and waiting[0][0] <= now and len(self._ready) < PARALLEL:  # the others cost time only when needed
            self._ready.append(heapq.heappop(waiting)[2])
        most = PARALLEL if self._failures < PARALLEL else 1
        while self._ready and len(self._in_flight) < most and now >= max(self._paused, self._paced):
            self._paced = max(self._paced, now - BURST_SECONDS) + 1 / RATE
            self._begin(self._ready.popleft())
        blocked = max(self._paused, self._paced)
        if self._ready:
            if now < blocked:  # else the end of a request goes on
                self._wake_at(blocked)
        elif waiting:
            self._wake_at(max(waiting[0][0], blocked))

    def _wake_at(self, due: float) -> None:
        if self._timer is not None and self._timer.active():
            if self._timer.getTime() <= due:
                return
            self._timer.cancel()
        self._timer = self._clock.callLater(max(0.0, due - self._clock.seconds()), self._pump)

    def _begin(self, lane: _Lane) -> None:
        """Deliver the next batch of a lane."""
        delivering = self._deliver(lane)
        self._in_flight[lane.room] = delivering
        delivering.addErrback(self._not_delivered, lane).addBoth(self._ended, lane.room, delivering)

    def _ended(self, _: None, room: str, delivering: "Deferred[None]") -> None:
        if self._in_flight.get(room) is delivering:  # it was not forgotten
            del self._in_flight[room]
        self._pump()

    @inlineCallbacks
    def _deliver(self, lane: _Lane) -> Generator["Deferred[Any]", Any, None]:
        if lane.cursor is None:
            lane.cursor = yield self._cursors.cursor(self._reader, lane.room)
        limit = MAX_ENTRIES if lane.last is None else lane.last - lane.cursor
        lane.erased = False
        page = yield self._log.read(lane.room, lane.cursor, limit)
        if lane.erased:
            self._later(lane, GATHER_SECONDS)
            return
        lane.head = max(lane.head, page.head)
        batch = make_batch(self._log.epoch, lane.room, lane.cursor, page, lane.last)
        if batch is None:
            self._settle(lane)
            return
        lane.last = batch.last
        lane.since = instant(batch.timestamp) if batch.timestamp else None
        lane.originals = frozenset(entry.replaces or entry.number for entry in page.entries)
        lane.request = self._transport.send(batch.id, batch.body)
        answer = yield lane.request
        lane.request = None
        if not self._stale(lane):
            self._answered(lane, batch, answer)

    def _not_delivered(self, failure: Failure, lane: _Lane) -> None:
        """Try again soon after a fault of the store."""
        if self._stale(lane):  # and cancelled
            return
        if not failure.check(LogUnavailable):
            self._unexpected(failure)
        self._later(lane, STORE_SECONDS)

    def _unexpected(self, failure: Failure) -> None:
        _logger.failure("unexpected error in the webhook {name}", failure, name=self.name)

    # Answers

    def _answered(self, lane: _Lane, batch: Batch, answer: Answer) -> None:
        self.outcomes["taken" if answer.taken else "unanswered" if answer.status is None else "rejected"] += 1
        if answer.taken:
            self._taken(lane, batch)
        elif answer.status == GONE:
            self.stopped = True
            self._later(lane, 0.0)
            _logger.error(
                "webhook {name} answers 410 and gets nothing more: reload or restart the server to deliver again",
                name=self.name,
            )
        elif answer.status is None and lane.erased:
            self._later(lane, GATHER_SECONDS)
        else:
            self._failed(lane, answer)

    def _failed(self, lane: _Lane, answer: Answer) -> None:
        """Try a batch again later."""
        lane.attempts += 1
        self._failures += 1
        now = self._clock.seconds()
        if answer.retry_after is not None:
            self._paused = max(self._paused, now + min(answer.retry_after, MAX_WAIT_SECONDS))
        elif self._failures >= PARALLEL:
            self._paused = max(self._paused, now + self._backoff(self._failures - PARALLEL))
        line = f"webhook {self.name} {answer}: retrying"
        if self._logged[0] != line or now >= self._logged[1]:
            self._logged = line, now + LOG_SECONDS
            _logger.warn("{line}", line=line)
        self._later(lane, self._backoff(lane.attempts - 1))

    def _backoff(self, failures: int) -> float:
        """Return a random pause after some earlier failures."""
        first, most = BACKOFF_SECONDS
        return self._jitter(0.0, min(most, first * 2.0 ** min(failures, 32)))

    def _taken(self, lane: _Lane, batch: Batch) -> None:
        """Move the cursor behind a batch, and store it."""
        if self._logged[0]:
            self._logged = "", 0.0
            _logger.info("webhook {name} takes deliveries again", name=self.name)
        if self._failures >= PARALLEL:  # the other rooms need not wait longer
            self._ready.extend(lane for _, _, lane in self._waiting)
            self._waiting.clear()
        self._failures = 0
        self.messages += batch.messages
        if batch.missed:
            self.missed += batch.missed
            _logger.warn(
                "webhook {name}: {missed} messages of the room {room} were removed before they were delivered",
                name=self.name,
                missed=batch.missed,
                room=lane.room,
            )
        lane.cursor = batch.last
        lane.last = lane.since = None
        lane.attempts = 0
        self._unsaved[lane.room] = lane
        self._save()

    def _save(self) -> None:
        """Store the cursors of all batches taken since the last time."""
        if self._saving or not self._unsaved:
            return
        self._saving, self._unsaved = self._unsaved, {}
        cursors: Mapping[str, int] = {room: lane.cursor for room, lane in self._saving.items() if lane.cursor}
        saved = self._cursors.advance(self._reader, self._lease.word, cursors)
        lanes = self._saving
        saved.addCallbacks(self._saved, self._not_saved, callbackArgs=(lanes,), errbackArgs=(lanes,))
        saved.addErrback(self._unexpected)

    def _saved(self, held: bool, lanes: dict[str, _Lane]) -> None:
        if self._saving is not lanes:  # forgotten
            return
        self._saving = {}
        if not held:
            self._lease.start()
            return
        for lane in lanes.values():
            self._settle(lane)
        self._save()
        self._pump()

    def _not_saved(self, failure: Failure, lanes: dict[str, _Lane]) -> None:
        failure.trap(LogUnavailable)
        if self._saving is not lanes:
            return
        self._saving = {}
        self._unsaved |= lanes
        self._clock.callLater(STORE_SECONDS, self._save)

    def _settle(self, lane: _Lane) -> None:
        """Close a lane that has nothing more, and go on with any other."""
        if lane.head > (lane.cursor or 0):
            self._later(lane, GATHER_SECONDS)
            return
        del self._lanes[lane.room]
        self._scan()
