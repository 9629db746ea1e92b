"""The view of a room: a pure listener of the client that keeps entries, presence, typing and the state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakSet

from typing_extensions import override

from chatd.client.core import Clock, Listener, Timers
from chatd.client.protocol import ClientStopped, Event, History, ProtocolError, Rejected
from chatd.client.storage import PendingPost
from chatd.messages import Entry, Id

TYPING_SECONDS: Final = 5.0
"""The time for which a name is shown as typing."""
CONNECTING, ONLINE, WAITING, REJECTED, STOPPED = "connecting", "online", "waiting", "rejected", "stopped"
"""The states of a room.  In `waiting` the next attempt is due later.  `rejected` and `stopped` are final."""


class RoomEntry(NamedTuple):
    """One stored message of a room, with whole ids."""

    id: Id
    username: str
    message: str
    timestamp: str
    """RFC 3339 in UTC, by the clock of the server."""
    replaces: Id | None = None
    """The id of the message that this edit or removal replaces; None for a message of its own."""
    replaced: Id | None = None
    """The id of the newest edit of this message, whose text it has; None if it was never edited."""
    removed: bool = False
    """True for a removal, and for a message whose text a removal has erased."""
    extra: Mapping[str, Any] | None = None
    """The operator's own fields; None without any."""


class EntryPage(NamedTuple):
    """Consecutive entries of a room, oldest first."""

    id: Id
    """The id of the last entry; without entries, the id after which the next one follows."""
    entries: Sequence[RoomEntry]
    more: bool
    """True if the log has older entries or, for a page that goes forward, newer ones."""


@dataclass(frozen=True, slots=True)
class RoomPresence:
    """The members of a room."""

    count: int
    """The number of connections."""
    users: Sequence[str] | None
    """The distinct names, sorted; None if there are more than 200."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state and the messages of a room at one instant.  It never changes."""

    state: str
    """`connecting`, `online`, `waiting`, `rejected` or `stopped`."""
    reason: str | None
    """In `waiting` and `rejected`, why the connection ended."""
    error: Exception | None
    """In `rejected` and `stopped`, what ended the room: Rejected or ClientStopped."""
    retry_at: float | None
    """In `waiting`, the time of the next attempt in seconds since 1970."""
    messages: Sequence[RoomEntry]
    """The messages, oldest first, with their newest texts and without the edits."""
    entries: Sequence[RoomEntry]
    """All entries, the edits included."""
    more: bool
    """True if the log has older entries than these."""
    last: Id | None
    """The id of the newest entry."""
    outbox: Sequence[PendingPost]
    """The posts without an answer.  None of them is in `messages`."""
    presence: RoomPresence | None
    """The members of the room, if the events were asked for and the room is online."""
    typing: Sequence[str]
    """The names of those who type now."""


def entries_of(epoch: str, entries: Sequence[Entry]) -> list[RoomEntry]:
    """Give entries their whole ids."""
    return [
        RoomEntry(
            Id(epoch, one.number),
            *one[1:4],
            None if one.replaces is None else Id(epoch, one.replaces),
            None if one.replaced is None else Id(epoch, one.replaced),
            one.removed,
            one.extra,
        )
        for one in entries
    ]


def page_of(history: History) -> EntryPage:
    """Return the page that a history frame holds."""
    return EntryPage(history.end, entries_of(history.end.epoch, history.entries), history.more)


def _names(names: Any) -> list[str]:
    """Return a list of names; raise TypeError if it is none."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError
    return names


class EntryReader(Protocol):
    """Reads the entries in order, as an iterator does."""

    last: Id | None
    """The id of the entry that it had last; None before the first one."""


class View(Timers, Listener):
    """The entries of a room and its state, as the callbacks of a client report them.

    `wall` returns the seconds since 1970.  `last` is the id after which the client continues.  `keep` is the number of
    entries to keep, or None for all.  `ended` is called with the error that ends the room.
    """

    def __init__(
        self,
        clock: Clock,
        wall: Callable[[], float],
        last: Id | None,
        keep: int | None,
        ended: Callable[[Exception], None],
    ) -> None:
        super().__init__(clock)
        self._wall = wall
        self._keep = keep
        self._ended = ended
        self.readers: WeakSet[EntryReader] = WeakSet()
        """The iterators, which miss no entry."""
        self.version = 0
        """The number of changes."""
        self._calls: set[Callable[[], None]] = set()
        self._typists: dict[str, Callable[[], None]] = {}
        """The names of people who type, each with the call that forgets it."""
        self.state = CONNECTING
        self.reason: str | None = None
        self.error: Exception | None = None
        self.retry_at: float | None = None
        self.last = last
        self.entries: list[RoomEntry] = []
        self.more = last is not None
        self.presence: RoomPresence | None = None

    # For its user

    @property
    def typing(self) -> list[str]:
        """The names of those who type now."""
        return [*self._typists]

    def subscribe(self, call: Callable[[], None]) -> Callable[[], None]:
        """Call a function after each change, once for all changes of one turn; return a function that ends this."""

        def notify() -> None:  # each subscription has its own
            call()

        def unsubscribe() -> None:
            self._calls.discard(notify)
            self._schedule(notify, None)

        self._calls.add(notify)
        return unsubscribe

    def changed(self) -> None:
        """Note a change, and call the subscribers soon: one that raises cannot disturb the client."""
        self.version += 1
        for call in self._calls:
            if not self._is_scheduled(call):
                self._schedule(call, 0.0)

    def index_after(self, id_: Id | None) -> int:
        """Return the place in `entries` of the first one after an id, or of the oldest one if the id is not there."""
        if id_ is None or not self.entries or id_.epoch != self.entries[0].id.epoch:
            return 0
        place = id_.number + 1 - self.entries[0].id.number
        return place if 0 <= place <= len(self.entries) else 0

    @property
    def oldest(self) -> Id | None:
        """The id before which the next older page ends; None before the first history."""
        if self.entries:
            return self.entries[0].id
        return self.last and Id(self.last.epoch, self.last.number + 1)

    def prepend(self, page: EntryPage) -> None:
        """Add an older page, unless it does not end at the oldest entry."""
        oldest = self.oldest
        if oldest is None or page.id != Id(oldest.epoch, oldest.number - 1):
            return
        self.more = page.more
        self.entries[:0] = page.entries
        for entry in [*self.entries]:
            self._edit(entry)
        self.changed()

    # Callbacks of the client

    @override
    def on_attempt(self) -> None:
        self._set_state(CONNECTING)

    @override
    def on_history(self, history: History) -> None:
        page = page_of(history)
        self.entries, self.more, self.last = [*page.entries], page.more, page.id
        self.changed()

    @override
    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        for entry in entries_of(epoch, entries):
            self.entries.append(entry)
            self.last = entry.id
            self._edit(entry)
            self._forget(entry.username)
        self._trim()
        self.changed()

    @override
    def on_event(self, event: Event) -> None:
        data = event.data
        try:
            if event.type == "presence":
                self.presence = self._presence(data)
            elif event.type == "typing":
                for name in _names(data["users"]):
                    self._type(name)
        except (LookupError, TypeError, AttributeError):
            raise ProtocolError(f"malformed {event.type} event") from None
        self.changed()

    @override
    def on_connect(self) -> None:
        self._set_state(ONLINE)

    @override
    def on_disconnect(self, reason: str, wait: float) -> None:
        self._set_state(WAITING, reason, retry_at=self._wall() + wait)

    @override
    def on_reject(self, error: Rejected) -> None:
        self._set_state(REJECTED, str(error), error)
        self._ended(error)

    @override
    def on_stop(self, error: ClientStopped) -> None:
        self._set_state(STOPPED, None, error)
        self._ended(error)

    def _set_state(
        self, state: str, reason: str | None = None, error: Exception | None = None, retry_at: float | None = None
    ) -> None:
        self.state, self.reason, self.error, self.retry_at = state, reason, error, retry_at
        if state != ONLINE:
            self.presence = None
            for name in self.typing:
                self._forget(name)
        self.changed()

    def _trim(self) -> None:
        """Drop the oldest entries that all readers have, now and then."""
        if self._keep is None or len(self.entries) < 2 * self._keep:
            return
        surplus = min([len(self.entries) - self._keep, *(self.index_after(one.last) for one in self.readers)])
        if surplus > 0:
            del self.entries[:surplus]
            self.more = True

    # Events

    def _presence(self, data: Mapping[str, Any]) -> RoomPresence:
        users = data.get("users")
        if "join" in data and self.presence is not None and self.presence.users is not None:
            users = [*({*self.presence.users} - {*data["leave"]} | {*data["join"]})]
        return RoomPresence(index(data["count"]), None if users is None else sorted(_names(users)))

    def _type(self, name: str) -> None:
        def forget() -> None:
            self._forget(name)
            self.changed()

        self._schedule(self._typists.setdefault(name, forget), TYPING_SECONDS)

    def _forget(self, name: str) -> None:
        forget = self._typists.pop(name, None)
        if forget is not None:
            self._schedule(forget, None)

    # Edits

    def _edit(self, edit: RoomEntry) -> None:
        """Put the text of an edit in place of the old one; a removal also erases the earlier edits."""
        if edit.replaces is None:
            return
        place = edit.replaces.number - self.entries[0].id.number
        if 0 <= place < len(self.entries):
            replaced = self.entries[place].replaced
            if replaced is None or replaced.number < edit.id.number:
                self._change(place, edit, replaced=edit.id)
        if edit.removed:
            for number, entry in enumerate(self.entries):
                if entry.replaces == edit.replaces:
                    self._change(number, edit)

    def _change(self, place: int, edit: RoomEntry, **fields: Any) -> None:
        entry = self.entries[place]
        self.entries[place] = entry._replace(message=edit.message, removed=edit.removed, extra=edit.extra, **fields)
