"""The export of a room: all its entries as JSON Lines, for backups and for people who ask for their data.

An export is a cursor.  It reads a page of the log, writes it, and goes on when the transport takes more.  It ends at
the head that the room had at first, so it ends although others post.  A client that reads slowly costs the bytes of
one turn, and one that does not read is dropped as any other.

All exports share one turn: one page is read at a time, in the order in which they wait.  Any number of exports
therefore costs the log no more than one reader, and another client waits for one page of them at most.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import orjson
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import Request
from zope.interface import implementer

from chatd.messages import Entry, Id
from chatd.room.log import LogUnavailable, Page, UnknownId
from chatd.room.registry import Registry
from chatd.transport.admission import HttpError, server_stopping
from chatd.transport.connections import Connections, buffered
from chatd.transport.deadlines import Deadlines
from chatd.transport.frames import message_frame
from chatd.transport.framing import payload
from chatd.transport.http import begin
from chatd.transport.tokens import unauthorized

JSON_LINES: Final = "application/x-ndjson"
"""The media type of an export: one JSON document a line."""
EXPORT_ENTRIES: Final = 100
"""The most entries that are read, encoded and written in one turn, as in a page for clients."""
EXPORT_BYTES: Final = 256 << 10
"""The size in bytes after which a turn writes no further entry, because those of an operator's schema may be long."""

_DATA: Final = b'"data":'
_logger = Logger()


def client_line(epoch: str, entry: Entry) -> bytes:
    """Encode an entry as the frame that clients know, on one line."""
    return payload(message_frame(epoch, entry)) + b"\n"


def operator_line(epoch: str, entry: Entry) -> bytes:
    """Encode an entry with its author, whom only operators see."""
    line = client_line(epoch, entry)
    if entry.author is None:
        return line
    envelope, _, data = line.partition(_DATA)
    return b'%b"author":%b,%b%b' % (envelope, orjson.dumps(entry.author), _DATA, data)


class ExportQueue:
    """The exports that wait for their next page; one page is read in a reactor turn."""

    def __init__(self, rooms: Registry, connections: Connections, clock: IReactorTime) -> None:
        self.rooms = rooms
        self.connections = connections
        self.clock = clock
        self._waiting: deque[Export] = deque()
        self._reading = False

    def wait(self, export: "Export") -> None:
        """Read the next page of an export after those that wait."""
        self._waiting.append(export)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._reading:
            self._reading = True
            self.clock.callLater(0, self._read)

    def _read(self) -> None:
        export = self._waiting.popleft()
        export.read().addCallback(export.write).addErrback(export.fail).addBoth(self._next)

    def _next(self, result: object) -> None:
        self._reading = False
        self._schedule()
        if isinstance(result, Failure):
            _logger.failure("an export failed", result)


class NotJoined:
    """The member of a connection that is in no room."""

    joined = False


@implementer(IPushProducer)
class Export:
    """The answer to one request, and a Connection among those that may stall.

    `encode` makes the line of an entry, and `admit` raises HttpError before a page that the client may not have.  After
    `seconds_left` its token has expired, and it gets no further page.  `refuse` answers the request with an error that
    precedes the first line.
    """

    number = 0
    member = NotJoined()

    def __init__(
        self,
        queue: ExportQueue,
        request: Request,
        room: str,
        after: Id,
        *,
        encode: Callable[[str, Entry], bytes],
        admit: Callable[[], None],
        refuse: Callable[[Failure], None],
        seconds_left: float | None = None,
    ) -> None:
        self._queue = queue
        self._request = request
        self._channel = cast(Any, request.channel)
        self._room = room
        self._after = after
        self._encode = encode
        self._admit = admit
        self._refuse = refuse
        self._until = None if seconds_left is None else queue.clock.seconds() + seconds_left
        self._head: int | None = None
        """The number of the last entry to write; None until the first page is there."""
        self._limit = EXPORT_ENTRIES
        """The most entries of the next page: about as many as a turn writes, so that few are read in vain."""
        self._paused = False
        self._waits = True
        """True while the export waits for its turn or its page."""
        self._open = True
        address = request.getClientAddress()
        self.peer = f"{address.host}:{address.port}" if hasattr(address, "port") else str(address)
        self._channel.when_lost = self._client_left
        queue.wait(self)

    @property
    def buffered(self) -> int:
        return buffered(self._channel.transport)

    @property
    def _stalls(self) -> Deadlines[Any]:
        """The deadlines of transports that take nothing; an export has all of a Connection that they need."""
        return self._queue.connections.stalls

    def read(self) -> "Deferred[Page]":
        """Read the next page."""
        return self._queue.rooms.read(self._room, self._after, self._limit)

    def write(self, page: Page) -> None:
        """Write the entries of a page, and end the answer or wait for the next page."""
        self._waits = False
        if not self._open:
            return
        if self._channel.site.closing:
            raise server_stopping()
        self._admit()
        if self._until is not None and self._queue.clock.seconds() >= self._until:
            raise unauthorized()
        head = self._begin(page.head) if self._head is None else self._head
        entries = [entry for entry in page.entries if entry.number <= head]
        if entries:
            self._write(entries)
        if not entries or self._after.number == head:
            self._end()
        elif not self._paused:
            self._wait()

    def _write(self, entries: Sequence[Entry]) -> None:
        """Write the first entries of some, up to about EXPORT_BYTES."""
        lines: list[bytes] = []
        size = 0
        for entry in entries:
            lines.append(self._encode(self._after.epoch, entry))
            size += len(lines[-1])
            if size >= EXPORT_BYTES:
                break
        whole = len(lines) == len(entries)
        self._limit = min(EXPORT_ENTRIES, 2 * self._limit) if whole else len(lines)
        self._after = self._after._replace(number=entries[len(lines) - 1].number)
        self._request.write(b"".join(lines))

    def _wait(self) -> None:
        self._waits = True
        self._queue.wait(self)

    def _begin(self, head: int) -> int:
        """Begin the answer; raise UnknownId if the client names an entry beyond the head."""
        if self._after.number > head:
            raise UnknownId
        self._head = head
        begin(self._request, JSON_LINES)
        self._request.setHeader("connection", "close")
        self._request.registerProducer(self, streaming=True)
        return head

    def _end(self) -> None:
        self._stalls.add(self)  # until the client has taken the rest
        self._request.unregisterProducer()
        self._channel.persistent = False
        self._request.finish()

    def fail(self, failure: Failure) -> None:
        """Refuse the request or, after the first line, cut the answer, so that the client sees that it is not whole."""
        self._waits = False
        if not self._open:
            return
        if self._head is None:
            self._refuse(failure)
            return
        self.abort()
        failure.trap(HttpError, LogUnavailable, UnknownId)
        _logger.warn("the export of {room} was cut: {error!r}", room=self._room, error=failure.value)

    def pauseProducing(self) -> None:
        """IPushProducer: the transport is full."""
        self._paused = True
        self._stalls.add(self)

    def resumeProducing(self) -> None:
        """IPushProducer: the transport takes more."""
        self._paused = False
        self._stalls.discard(self)
        if not self._waits:
            self._wait()

    def stopProducing(self) -> None:
        """IPushProducer: the transport has ended; _client_left() follows."""

    def abort(self) -> None:
        """Drop the connection."""
        self._channel.transport.abortConnection()

    def _client_left(self) -> None:
        self._open = False
        self._stalls.discard(self)
