"""The rooms by name: loaded from the log for the first who joins, forgotten with the last who leaves.

Here the log is followed for all rooms, read for who comes back or pages, and posted to.  A name that nobody is
at costs nothing: what there is of it is in the log.

Nothing here knows a reactor, a socket or a disk: time, members and the log are handed in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Final, Generic, NamedTuple, TypeVar

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure

from chatd.messages import Entry, Id, PageRequest, Post
from chatd.room.encoder import Encoder
from chatd.room.log import EncodedPage, Log, LogUnavailable, Page, PageRange, Poster, UnknownId
from chatd.room.presence import Lobby, Occupancy
from chatd.room.room import MAX_LAG, Member, Room

RELOAD_SECONDS: Final = 0.25
"""How soon a room is loaded again after that has failed."""

_K = TypeVar("_K")
_T = TypeVar("_T")


class JoinTicket(NamedTuple):
    """A room, and all that it takes to join it in this turn."""

    room: Room
    last: Id | None
    missed: Page | None

    def join(self, member: Member) -> bytes:
        """Let a member in; answers the history frame that it must be sent first."""
        return self.room.join(member, self.last, self.missed)


class _Shared(Generic[_K, _T]):
    """What is asked for while it is under way is waited for, not asked for again."""

    def __init__(self) -> None:
        self._waiting: dict[_K, list[Deferred[_T]]] = {}

    def ask(self, key: _K, begin: Callable[[], "Deferred[_T]"]) -> "Deferred[_T]":
        waiting: Deferred[_T] = Deferred()
        if key in self._waiting:
            self._waiting[key].append(waiting)
        else:
            self._waiting[key] = [waiting]
            begin().addBoth(self._done, key)
        return waiting

    def _done(self, result: "_T | Failure", key: _K) -> None:
        for waiting in self._waiting.pop(key):
            waiting.callback(result)  # or errback, as a failure finds its own way


class Registry:
    """The rooms that someone is in, by name; it follows the log for them all."""

    def __init__(
        self, log: Log, encoder: Encoder, clock: IReactorTime, history: int, lobby: Lobby | None = None
    ) -> None:
        self._log = log
        self._encoder = encoder
        self._clock = clock
        self._history = history
        self._rooms: dict[str, Room] = {}
        self.messages = 0
        """How many were appended to the log, in all rooms, since it is followed."""
        self._delivered = 0
        """How many were delivered in rooms that are forgotten."""
        self._loads: _Shared[str, Room] = _Shared()
        self._missed: dict[str, list[Entry]] = {}
        """What is appended to a room while it is loaded,"""
        self._trims: dict[str, int] = {}
        """... and the first message that is kept, if some are removed."""
        self._stale: dict[str, Room] = {}
        """Rooms to which the log may have gone on untold; they are loaded again before anyone joins them."""
        self._interruptions = 0
        """How often that came about: what was read before the last one may lack something."""
        self._retry: IDelayedCall | None = None
        self._recalls: _Shared[tuple[str, int], Page] = _Shared()
        log.follow(self)
        self._lobby = lobby
        if lobby is not None:
            lobby.follow(self)

    def __iter__(self) -> Iterator[Room]:
        """Those that someone is in, or is about to be."""
        return chain(self._rooms.values(), self._stale.values())

    def __len__(self) -> int:
        return len(self._rooms) + len(self._stale)

    @property
    def delivered(self) -> int:
        """How many messages were handed to members after the history, to all of them together."""
        return self._delivered + sum(room.delivered for room in self)

    @property
    def busy(self) -> bool:
        """Whether some member that can be served has not been."""
        return any(room.busy for room in self)

    @property
    def epoch(self) -> str:
        """That of the log."""
        return self._log.epoch

    def open(self, name: str, last: Id | None = None) -> "Deferred[JoinTicket]":
        """A room to join at once, in the callback: a room that nobody is in is forgotten.

        `last` names the last message that the member has.  The first to come waits for the log, and those who come
        meanwhile wait with it.  Fails with LogUnavailable.
        """
        room = self._rooms.get(name)
        if room is not None and last is None:  # as nearly always
            return succeed(JoinTicket(room, None, None))
        return self._open(name).addCallback(self._recall, last)

    def _open(self, name: str) -> "Deferred[Room]":
        room = self._rooms.get(name)
        return succeed(room) if room is not None else self._loads.ask(name, lambda: self._load(name))

    def _load(self, name: str) -> "Deferred[Room]":
        self._missed[name] = []
        self._trims.pop(name, None)
        stale = self._stale.get(name)
        if stale is None or stale.epoch != self._log.epoch:
            reading = self._log.read(name, None, self._history)
        else:
            reading = self._log.read(name, stale.head, MAX_LAG).addCallback(self._or_newest, stale)
        return reading.addCallbacks(
            self._loaded, self._not_loaded, callbackArgs=(name, self._interruptions), errbackArgs=(name,)
        )

    def _or_newest(self, page: Page, stale: Room) -> "Page | Deferred[Page]":
        """What a stale room lacks; or, if that is not to be had any more, the newest messages."""
        return page if stale.continues(page) else self._log.read(stale.name, None, self._history)

    def _loaded(self, page: Page, name: str, interruptions: int) -> "Room | Deferred[Room]":
        if interruptions < self._interruptions:
            return self._load(name)
        room = self._stale.pop(name, None)
        if room is None:
            report = None if self._lobby is None else partial(self._lobby.report, name)
            room = Room(name, self._log, self._encoder, page, clock=self._clock, history=self._history, report=report)
        elif room.continues(page):
            room.appended(page.entries)
        else:
            room.restart(page)
        self._rooms[name] = room
        room.appended(self._missed.pop(name))
        room.trimmed(max(page.first, self._trims.pop(name, 0)))
        # Those who waited join in their callbacks, which come only after this.
        self._clock.callLater(0, self._forget, room)
        return room

    def _not_loaded(self, failure: Failure, name: str) -> Failure:
        del self._missed[name]
        self._trims.pop(name, None)
        return failure

    def interrupted(self) -> None:
        """Follower.interrupted: load again the rooms that someone is in."""
        self._interruptions += 1
        self._stale |= self._rooms
        self._rooms = {}
        self._reload()

    def _reload(self) -> None:
        for name, room in [*self._stale.items()]:
            if room.members or name in self._missed:
                self._open(name).addErrback(self._not_reloaded)
            else:  # all have left meanwhile
                del self._stale[name]
                self._delivered += room.delivered

    def _not_reloaded(self, failure: Failure) -> None:
        failure.trap(LogUnavailable)
        if self._retry is None or not self._retry.active():
            self._retry = self._clock.callLater(RELOAD_SECONDS, self._reload)

    def _recall(self, room: Room, last: Id | None) -> "JoinTicket | Deferred[JoinTicket]":
        """Have the log read if a member comes back that has missed more than the tail holds."""
        if last is not None and last.epoch == self._log.epoch and not room.remembers(last.number):
            name, number = room.name, last.number
            if number > room.head or room.can_resume(number):
                recalled = self._recalls.ask((name, number), lambda: self._log.read(name, number, self._history))
                return recalled.addCallback(lambda page: self._open(name).addCallback(JoinTicket, last, page))
        return JoinTicket(room, last, None)

    def leave(self, room: Room, member: Member) -> None:
        """Let a member go, and the room with its last."""
        room.leave(member)
        self._forget(room)

    def _forget(self, room: Room) -> None:
        if not room.members and self._rooms.get(room.name) is room:
            del self._rooms[room.name]
            self._delivered += room.delivered

    def post(self, room: str, post: Post, poster: Poster) -> None:
        """Append a post to the room's log, from which its members will have it."""
        self._log.append(room, post, poster)

    def page(self, name: str, request: PageRequest) -> "Deferred[EncodedPage]":
        """Read on in a room's log, whoever is in that room; fails with UnknownId, or LogUnavailable."""
        if self._unknown(request):
            return fail(UnknownId())
        before, after = (named and named.number for named in (request.before, request.after))
        span = PageRange(before, after, request.limit)
        room = self._rooms.get(name)
        excerpt = room.excerpt(span) if room is not None else None
        if excerpt is not None:
            return succeed(excerpt)
        return self._log.read(name, span.start, span.limit).addCallback(self._excerpt, request, span)

    def _unknown(self, request: PageRequest) -> bool:
        """Whether a request names a message of another history."""
        return any(named is not None and named.epoch != self._log.epoch for named in (request.before, request.after))

    def _excerpt(self, page: Page, request: PageRequest, span: PageRange) -> EncodedPage:
        if self._unknown(request):  # by now
            raise UnknownId

        encode, epoch = self._encoder.message_frame, self._log.epoch

        def between(after: int, until: int) -> Sequence[bytes]:
            return [encode(epoch, entry) for entry in page.entries if after < entry.number <= until]

        return span.excerpt(page.first, page.head, between)

    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        """Follower.appended: pass on what concerns someone here."""
        self.messages += len(entries)
        if room in self._rooms:
            self._rooms[room].appended(entries)
        elif room in self._missed:
            self._missed[room].extend(entries)

    def trimmed(self, room: str, first: int) -> None:
        """Follower.trimmed."""
        if room in self._rooms:
            self._rooms[room].trimmed(first)
        elif room in self._missed:
            self._trims[room] = first

    # chatd.presence.Guest

    def elsewhere(self, room: str, node: str, here: Occupancy) -> None:
        """Guest.elsewhere."""
        found = self._find(room)
        if found is not None:
            found.presence.elsewhere(node, here)

    def typing(self, room: str, usernames: Sequence[str]) -> None:
        """Guest.typing."""
        found = self._find(room)
        if found is not None:
            found.presence.typing_elsewhere(usernames)

    def gone(self, node: str) -> None:
        """Guest.gone."""
        for room in self:
            room.presence.elsewhere(node, None)

    def _find(self, name: str) -> Room | None:
        return self._rooms.get(name) or self._stale.get(name)
