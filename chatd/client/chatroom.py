"""A room as a program uses it, without an event loop: the connection, the view and the outbox together.

`ChatClient` holds the rooms of one user.

`chatd.client.aio` and `chatd.client.tx` give it connections and timers, and return its answers as their futures.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

from chatd.client.address import ServerAddress
from chatd.client.connector import SingleRoom
from chatd.client.core import Clock, Listener
from chatd.client.outbox import Outbox
from chatd.client.protocol import Backoff, History, Requester, page_request
from chatd.client.storage import MemoryStorage, Storage
from chatd.client.view import ONLINE, EntryReader, RoomEntry, Snapshot, View, page_of
from chatd.messages import Id

TYPING_PAUSE_SECONDS: Final = 3.0
"""The least time between two typing notices."""
EVENTS: Final = ("presence", "typing")
"""The events that a room asks for by default."""


def server_address(url: str) -> ServerAddress:
    """Parse the URL of a server, which may begin with http or https; raise ValueError if it is malformed."""
    return ServerAddress.parse("ws" + url[4:] if url.startswith("http") else url)


def room_address(server: ServerAddress, name: str, events: Sequence[str], username: str | None) -> ServerAddress:
    """Return the address of a room of a server."""
    query = {"events": ",".join(events), "username": username or ""}
    path = f"{server.path.rstrip('/')}/rooms/{quote(name, safe='')}"
    return server._replace(path=path, query=urlencode({key: value for key, value in query.items() if value}))


class _PageRequester:
    """Passes a page on, with whole ids."""

    def __init__(self, answer: Requester) -> None:
        self._answer = answer
        self.errback = answer.errback

    def callback(self, result: History) -> None:
        """Take the history frame."""
        self._answer.callback(page_of(result))


class _OlderRequester:
    """Adds an older page to the view, and answers all who asked for it."""

    def __init__(self, view: View, waiting: list[Requester]) -> None:
        self._view, self._waiting = view, waiting

    def callback(self, result: History) -> None:
        """Take the history frame."""
        self._view.prepend(page_of(result))
        for answer in self._end():
            answer.callback(None)

    def errback(self, fail: Exception) -> None:
        """Take the refusal, or the end of the room."""
        for answer in self._end():
            answer.errback(fail)

    def _end(self) -> list[Requester]:
        waiting, self._waiting[:] = [*self._waiting], ()
        return waiting


class ChatRoom:
    """A member of one room, over as many connections as needed.

    `join` makes the connection for a listener.
    """

    def __init__(
        self,
        clock: Clock,
        wall: Callable[[], float],
        join: Callable[[Listener], SingleRoom],
        *,
        username: str | None,
        storage: Storage,
        last: Id | None,
        keep: int | None,
    ) -> None:
        self.username = username
        self._clock = clock
        self._view = View(clock, wall, last, keep, self._ended)
        self._room = join(self._view)
        self._outbox = Outbox(
            storage,
            f"chatd {self._room.address} {username or ''}",
            send=self._room.request,
            forget=self._room.forget_request,
            wall=wall,
            changed=self._view.changed,
            failed=self._room.log_failure,
        )
        self._typed = -TYPING_PAUSE_SECONDS
        self._paging: list[Requester] = []
        self._shown: Snapshot | None = None
        self._version = 0
        """The version of the view that the snapshot shows."""
        self._outbox.send_next()

    # For its user

    @property
    def error(self) -> Exception | None:
        """The reason for which the room has ended: Rejected or ClientStopped.  It is None before."""
        return self._view.error

    def snapshot(self) -> Snapshot:
        """Return what to show.  The object stays the same until something changes."""
        if self._shown is None or self._version != self._view.version:
            view, entries = self._view, tuple(self._view.entries)
            self._version = view.version
            self._shown = Snapshot(
                state=view.state,
                reason=view.reason,
                error=view.error,
                retry_at=view.retry_at,
                messages=tuple(entry for entry in entries if entry.replaces is None),
                entries=entries,
                more=view.more,
                last=view.last,
                outbox=tuple(self._outbox.missing(entries)),
                presence=view.presence,
                typing=tuple(view.typing),
            )
        return self._shown

    def subscribe(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call a function soon after each change; return a function that ends this."""
        return self._view.subscribe(call)

    def typing(self) -> None:
        """Show the others that this user types.  Call it at each key: one notice is sent in three seconds."""
        now = self._clock.seconds()
        if self.username and self._view.state == ONLINE and now - self._typed >= TYPING_PAUSE_SECONDS:
            self._typed = now
            self._room.typing(self.username)

    def discard(self, label: str) -> None:
        """Remove a post from the outbox.  The server may have stored it."""
        self._outbox.discard(label)

    def reconnect(self) -> None:
        """Connect now, unless the server has named the time of the next attempt; check a connection."""
        self._room.reconnect()

    # For its client and its host

    def wake(self) -> None:
        """React to a machine or a network that is back: check the connection, or connect soon."""
        self._room.wake()

    def _post(self, message: str, fields: Mapping[str, Any], answer: Requester) -> None:
        named = {} if self.username is None else {"username": self.username}
        self._outbox.post({**named, "message": message, **fields}, answer, self._view.last)

    def _edit(self, id_: Id | str, message: str, fields: Mapping[str, Any], answer: Requester) -> None:
        self._post(message, {"replaces": str(id_), **fields}, answer)

    def _remove(self, id_: Id | str, answer: Requester) -> None:
        self._outbox.post({"type": "remove", "id": str(id_)}, answer, self._view.last)

    def _page(self, before: Id | str | None, after: Id | str | None, limit: int, answer: Requester) -> str | None:
        return self._room.request(page_request(before, after, limit), _PageRequester(answer))

    def _older(self, limit: int, answer: Requester) -> None:
        """Read the page before the oldest entry; requests that overlap share one page."""
        if not self._view.more:
            answer.callback(None)
            return
        self._paging.append(answer)
        if len(self._paging) == 1:
            self._room.request(page_request(self._view.oldest, None, limit), _OlderRequester(self._view, self._paging))

    def follow(self, reader: EntryReader) -> None:
        """Keep the entries that an iterator has not had yet."""
        self._view.readers.add(reader)

    def following(self, last: Id | None) -> RoomEntry | None:
        """Return the entry after an id, or the oldest one; None if it has not arrived."""
        place = self._view.index_after(last)
        return self._view.entries[place] if place < len(self._view.entries) else None

    def _ended(self, error: Exception) -> None:
        self._outbox.stop(error)


_Room = TypeVar("_Room", bound=ChatRoom)


class ChatClient(Generic[_Room]):
    """The rooms of one user of a server.  A host joins them and stops them."""

    def __init__(
        self, url: str, *, username: str | None, storage: Storage | None, backoff: Callable[[], Backoff]
    ) -> None:
        self.username = username
        self._address = server_address(url)
        self._storage = storage or MemoryStorage()
        self._backoff = backoff
        self._rooms: dict[str, _Room] = {}

    def room(
        self,
        name: str = "main",
        *,
        events: Collection[str] = EVENTS,
        last: Id | str | None = None,
        keep: int | None = None,
    ) -> _Room:
        """Join a room, or return it if this client is in it.  A room that has ended is joined again.

        `events` are those wanted besides entries.  `last` is the last id of an earlier client, after which this one
        continues.  `keep` is the number of entries to keep, for programs that run for long: the oldest ones are dropped
        when all iterators have had them.  These options count when the room is joined.
        """
        known = self._rooms.get(name)
        if known is None or known.error is not None:
            address = room_address(self._address, name, sorted(events), self.username)
            known = self._join(address, Id.parse(last) if isinstance(last, str) else last, keep)
            self._rooms[name] = known
        return known

    def _join(self, address: ServerAddress, last: Id | None, keep: int | None) -> _Room:
        """Join the room at an address."""
        raise NotImplementedError

    def _wake(self) -> None:
        for room in self._rooms.values():
            room.wake()
