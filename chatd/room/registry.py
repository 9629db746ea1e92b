"""The registry: the open rooms by name.

A room is loaded from the log for its first member and forgotten with its last.  A name without members costs nothing,
because all that exists of it is in the log.

The registry follows the log for all rooms, reads it for clients that resume or page, and appends posts to it.
Nothing here knows a reactor, a socket or a disk: time, members, the log and the encoding are handed in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final, Generic, NamedTuple, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.messages import Entry, Id, PageRequest, Post
from chatd.room.encoder import Encoder
from chatd.room.log import EncodedPage, Follower, Log, LogUnavailable, Page, PageRange, Poster, UnknownId
from chatd.room.presence import EMPTY, Lobby, LobbyListener, Occupancy
from chatd.room.room import MAX_LAG, Member, Room
from chatd.room.turns import TurnQueue

MAX_ROOMS: Final = 20_000
"""The most open rooms.  An empty one takes 4 KB, and one with long messages up to some megabytes."""
RELOAD_SECONDS: Final = 0.25
"""The pause before a room is loaded again after a failure."""

_K = TypeVar("_K")
_T = TypeVar("_T")


class TooManyRooms(Exception):
    """No further room can be opened until the last member of another one leaves."""


class JoinTicket(NamedTuple):
    """A room and everything needed to join it in this reactor turn."""

    room: Room
    last: Id | None
    """The last entry of a client that reconnects."""
    backlog: Page | None
    """The entries after that one, where the tail of the room does not hold them."""

    def join(self, member: Member) -> bytes:
        """Add a member to the room; return the history frame that it must be sent first."""
        return self.room.join(member, self.last, self.backlog)


class _SharedReads(Generic[_K, _T]):
    """Reads in flight by key: a second request for the same key waits for the first one's result."""

    def __init__(self) -> None:
        self._waiting: dict[_K, list[Deferred[_T]]] = {}

    def read(self, key: _K, begin: Callable[[], "Deferred[_T]"]) -> "Deferred[_T]":
        waiting: Deferred[_T] = Deferred()
        if key in self._waiting:
            self._waiting[key].append(waiting)
        else:
            self._waiting[key] = [waiting]
            begin().addBoth(self._done, key)
        return waiting

    def _done(self, result: "_T | Failure", key: _K) -> None:
        for waiting in self._waiting.pop(key):
            waiting.callback(result)  # a Failure takes the errback path by itself


class _Loading:
    """The changes to a room while it is loaded."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.first = 0


class Registry(Follower, LobbyListener):
    """The open rooms by name, which follow the log."""

    def __init__(
        self, log: Log, encoder: Encoder, clock: IReactorTime, history: int, lobby: Lobby | None = None
    ) -> None:
        self._log = log
        self._encoder = encoder
        self._clock = clock
        self._turns = TurnQueue(clock)
        self._history = history
        self._rooms: dict[str, Room] = {}
        self._stale: dict[str, Room] = {}
        """Rooms that may lack entries; each is loaded again before it takes another member."""
        self._loading: dict[str, _Loading] = {}
        self._loads: _SharedReads[str, Room] = _SharedReads()
        self._backlogs: _SharedReads[tuple[str, int], Page] = _SharedReads()
        self._interruptions = 0
        """The number of interruptions so far; a page read before the last one may lack entries."""
        self._retry: IDelayedCall | None = None
        self.messages = 0
        """The number of entries appended to the log, in all rooms, since the registry follows it."""
        self._delivered = 0
        """The number of entries delivered in rooms that are forgotten."""
        log.follow(self)
        self._lobby = lobby
        if lobby is not None:
            lobby.follow(self)

    def __iter__(self) -> Iterator[Room]:
        """Iterate over the open rooms."""
        return chain(self._rooms.values(), self._stale.values())

    def __len__(self) -> int:
        return len(self._rooms) + len(self._stale)

    @property
    def delivered(self) -> int:
        """The number of entries handed to members after their history, summed over all members."""
        return self._delivered + sum(room.delivered for room in self)

    @property
    def epoch(self) -> str:
        """The epoch of the log."""
        return self._log.epoch

    def holds_entries(self, name: str) -> bool:
        """Return whether a room is open and not empty; the log alone knows of other rooms."""
        room = self._find(name)
        return room is not None and room.head > 0

    def post(self, room: str, post: Post, poster: Poster) -> None:
        """Append a post to the log of a room, from which the members of the room get it."""
        self._log.append(room, post, poster)

    # Joining and leaving

    def open(self, name: str, last: Id | None = None) -> "Deferred[JoinTicket]":
        """Return a ticket for a room; join in the callback, because a room without members is forgotten.

        `last` names the last entry of a client that reconnects.  The first request for a room reads the log, and
        further requests wait with it.  Fails with LogUnavailable or TooManyRooms.
        """
        ticket = self.ticket(name, last)
        return self._open(name).addCallback(self._read_backlog, last) if ticket is None else succeed(ticket)

    def ticket(self, name: str, last: Id | None) -> JoinTicket | None:
        """Return what `open` would, if it is here at once: a ticket for an open room whose log need not be read."""
        room = self._rooms.get(name)
        if room is None or (last is not None and room.needs_backlog(last)):
            return None
        return JoinTicket(room, last, None)

    def _open(self, name: str) -> "Deferred[Room]":
        room = self._rooms.get(name)
        if room is not None:
            return succeed(room)
        begun = name in self._loading or name in self._stale
        if not begun and len(self) + len(self._loading) >= MAX_ROOMS:
            return fail(TooManyRooms())
        return self._loads.read(name, lambda: self._load(name))

    def _read_backlog(self, room: Room, last: Id | None) -> "JoinTicket | Deferred[JoinTicket]":
        """Read the entries after `last`, if the room needs them from the log."""
        if last is None or not room.needs_backlog(last):
            return JoinTicket(room, last, None)
        name, number = room.name, last.number
        reading = self._backlogs.read((name, number), lambda: self._log.read(name, number, self._history))
        return reading.addCallback(lambda page: self._open(name).addCallback(self._ticket, last, page))

    def _ticket(self, room: Room, last: Id, backlog: Page) -> "JoinTicket | Deferred[JoinTicket]":
        """Return a ticket with a backlog, unless that was read before the newest edit in the room."""
        return JoinTicket(room, last, backlog) if backlog.head >= room.edited else self._read_backlog(room, last)

    def leave(self, room: Room, member: Member) -> None:
        """Remove a member from its room, and forget the room with its last member."""
        room.leave(member)
        self._forget(room)

    def _forget(self, room: Room) -> None:
        if not room.members and self._rooms.get(room.name) is room:
            del self._rooms[room.name]
            self._delivered += room.delivered

    # Loading

    def _load(self, name: str) -> "Deferred[Room]":
        self._loading[name] = _Loading()
        stale = self._stale.get(name)
        if stale is None or stale.epoch != self._log.epoch:
            reading = self._log.read(name, None, self._history)
        else:
            reading = self._log.read(name, stale.head, MAX_LAG).addCallback(self._or_newest, stale)
        return reading.addCallbacks(
            self._loaded, self._not_loaded, callbackArgs=(name, self._interruptions), errbackArgs=(name,)
        )

    def _or_newest(self, page: Page, stale: Room) -> "Page | Deferred[Page]":
        """Return the page if it holds every entry that a stale room lacks; otherwise read the newest entries."""
        return page if stale.continues(page) else self._log.read(stale.name, None, self._history)

    def _loaded(self, page: Page, name: str, interruptions: int) -> "Room | Deferred[Room]":
        if interruptions < self._interruptions:
            return self._load(name)
        room = self._stale.pop(name, None)
        if room is None:
            report = None if self._lobby is None else partial(self._lobby.report, name)
            room = Room(
                name,
                self._log,
                self._encoder,
                page,
                clock=self._clock,
                turns=self._turns,
                history=self._history,
                report=report,
            )
        elif room.continues(page):
            room.appended(page.entries)
        else:
            room.restart(page)
        self._rooms[name] = room
        meanwhile = self._loading.pop(name)
        room.appended(meanwhile.entries)
        room.trimmed(max(page.first, meanwhile.first))
        # The clients that wait join in their callbacks, which run only after this.
        self._clock.callLater(0, self._forget, room)
        return room

    def _not_loaded(self, failure: Failure, name: str) -> Failure:
        del self._loading[name]
        return failure

    def _reload(self) -> None:
        for name, room in [*self._stale.items()]:
            if room.members or name in self._loading:
                self._open(name).addErrback(self._not_reloaded)
            else:  # the last member has left meanwhile
                del self._stale[name]
                self._delivered += room.delivered

    def _not_reloaded(self, failure: Failure) -> None:
        failure.trap(LogUnavailable)
        if self._retry is None or not self._retry.active():
            self._retry = self._clock.callLater(RELOAD_SECONDS, self._reload)

    # Paging

    def page(self, name: str, request: PageRequest) -> "Deferred[EncodedPage]":
        """Read a page of a room, open or not; fails with UnknownId or LogUnavailable."""
        if self._is_unknown(request):
            return fail(UnknownId())
        before, after = (named and named.number for named in (request.before, request.after))
        wanted = PageRange(before, after, request.limit)
        room = self._rooms.get(name)
        page = None if room is None else room.page(wanted)
        if page is not None:
            return succeed(page)
        return self._log.read(name, wanted.start, wanted.limit).addCallback(self._encode, name, request, wanted)

    def _is_unknown(self, request: PageRequest) -> bool:
        """Return True if a request names an entry of another history."""
        return any(named is not None and named.epoch != self._log.epoch for named in (request.before, request.after))

    def _encode(
        self, page: Page, name: str, request: PageRequest, wanted: PageRange
    ) -> "EncodedPage | Deferred[EncodedPage]":
        if self._is_unknown(request):  # the epoch may have changed during the read
            raise UnknownId
        room = self._rooms.get(name)
        if room is not None and page.head < room.edited:  # members of the room have a newer text
            return self.page(name, request)
        encode, epoch = self._encoder.message_frame, self._log.epoch

        def frames(after: int, until: int) -> Sequence[bytes]:
            return [encode(epoch, entry) for entry in page.entries if after < entry.number <= until]

        return wanted.encode(page.first, page.head, frames)

    def read(self, name: str, after: Id, limit: int) -> "Deferred[Page]":
        """Read at most `limit` entries of a room, open or not, after an id; fails with UnknownId or LogUnavailable."""
        if after.epoch != self._log.epoch:
            return fail(UnknownId())
        return self._log.read(name, after.number, limit).addCallback(self._check_page, name, after, limit)

    def _check_page(self, page: Page, name: str, after: Id, limit: int) -> "Page | Deferred[Page]":
        room = self._rooms.get(name)
        stale = room is not None and page.head < room.edited  # members of the room have a newer text
        if stale or after.epoch != self._log.epoch:  # the epoch may have changed during the read
            return self.read(name, after, limit)
        return page

    # Presence

    def occupancy(self, name: str) -> "Deferred[Occupancy]":
        """Return who is in a room, open at this node or not, on all nodes; fails with LogUnavailable."""
        if self._lobby is None:
            return succeed(self._here(name))
        return self._lobby.elsewhere(name).addCallback(lambda others: Occupancy.sum([self._here(name), *others]))

    def _here(self, name: str) -> Occupancy:
        room = self._find(name)
        return EMPTY if room is None else room.presence.here

    # Following the log

    @override
    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        self.messages += len(entries)
        if room in self._rooms:
            self._rooms[room].appended(entries)
        elif room in self._loading:
            self._loading[room].entries.extend(entries)

    @override
    def trimmed(self, room: str, first: int) -> None:
        if room in self._rooms:
            self._rooms[room].trimmed(first)
        elif room in self._loading:
            self._loading[room].first = first

    @override
    def interrupted(self) -> None:
        self._interruptions += 1
        self._stale |= self._rooms
        self._rooms = {}
        self._reload()

    # Following the lobby

    @override
    def occupancy_changed(self, room: str, node: str, occupancy: Occupancy) -> None:
        found = self._find(room)
        if found is not None:
            found.presence.remote_changed(node, occupancy)

    @override
    def typing(self, room: str, usernames: Sequence[str]) -> None:
        found = self._find(room)
        if found is not None:
            found.presence.remote_typing(usernames)

    @override
    def node_left(self, node: str) -> None:
        for room in self:
            room.presence.remote_changed(node, None)

    def _find(self, name: str) -> Room | None:
        return self._rooms.get(name) or self._stale.get(name)
