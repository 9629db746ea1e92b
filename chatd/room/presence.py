"""Presence: the members and typing users of a room, for the members that asked for them.

Nothing is counted when members join and leave.  Watchers see a function of the members of the room, computed at
most once a second, and only while there are watchers and something has changed.  A watcher first gets the whole (a
*snapshot*), and after that the changes since the last frame (a *delta*).  All watchers get the same bytes.  When
thousands join in one second, each watcher gets one frame.

A watcher whose transport is full gets no frame, and later a snapshot.  Typing users are sent in the same round and
then forgotten: a watcher that was not ready has missed nothing of value.

If several nodes serve one room, each node reports its members in its round to a *lobby*, which passes them on to
the other nodes.  Watchers see the sum over all nodes.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from chatd.room.encoder import Encoder
from chatd.room.sweep import sweep

PRESENCE: Final = "presence"
TYPING: Final = "typing"
EVENTS: Final = frozenset({PRESENCE, TYPING})
"""The notices that a member can ask for besides entries."""
ROUND_SECONDS: Final = 1.0
"""The shortest time from the beginning of one round to that of the next."""
MAX_USERS: Final = 200
"""The number of names above which only the members are counted."""
MAX_TYPING: Final = 10
"""The number of typing users named in one round; further ones are left out."""


class Watcher(Protocol):
    """The part of a member that presence needs."""

    events: frozenset[str]
    """The notices that it asked for, a part of EVENTS."""
    name: str | None
    """The username by which others know it."""

    @property
    def takes_events(self) -> bool:
        """True while its transport takes more, and nothing that was sent before waits."""

    def send_frame(self, frame: bytes) -> None:
        """Send one frame that is not an entry."""


class Occupancy(NamedTuple):
    """The members of a room at one instant."""

    members: int
    """The number of members, with a name or without."""
    users: frozenset[str] | None
    """The distinct names; None if they are too many to show."""

    @classmethod
    def sum(cls, parts: "Iterable[Occupancy]") -> "Occupancy":
        """Add the occupancy of several nodes; one name may be at more than one node."""
        parts = [*parts]
        names: set[str] | None = set()
        for part in parts:
            names = None if names is None or part.users is None else names | part.users
        users = None if names is None or len(names) > MAX_USERS else frozenset(names)
        return cls(sum(part.members for part in parts), users)

    @property
    def shown(self) -> Mapping[str, Sequence[str]]:
        """The `users` of a snapshot; empty if they are too many to show."""
        return {} if self.users is None else {"users": sorted(self.users)}


EMPTY: Final = Occupancy(0, frozenset())
Report = Callable[[Occupancy, Sequence[str]], None]
"""A function that takes the occupancy of a room at this node, and the users that type there."""


class LobbyListener(Protocol):
    """The receiver of changes at the other nodes."""

    def occupancy_changed(self, room: str, node: str, occupancy: Occupancy) -> None:
        """Take the new occupancy of a room at another node."""

    def typing(self, room: str, usernames: Sequence[str]) -> None:
        """Take the names of users that type at another node."""

    def node_left(self, node: str) -> None:
        """Drop another node with all its members."""


class Lobby(Protocol):
    """The exchange of occupancy between the nodes that serve the same rooms."""

    def follow(self, listener: LobbyListener) -> None:
        """Notify this listener from now on."""

    def elsewhere(self, room: str) -> "Deferred[Sequence[Occupancy]]":
        """Return the occupancy of a room at each other node; fails with LogUnavailable."""

    def report(self, room: str, occupancy: Occupancy, typing: Sequence[str]) -> None:
        """Share the occupancy of a room at this node and its typing users, and learn those of the other nodes."""


class Presence:
    """The presence of one room; `report`, if given, shares it with the other nodes."""

    def __init__(
        self,
        members: Collection[Watcher],
        encoder: Encoder,
        clock: IReactorTime,
        report: Report | None = None,
    ) -> None:
        self._members = members
        self._presence_frame = encoder.presence_frame
        self._typing_frame = encoder.typing_frame
        self._clock = clock
        self._report = report
        self._reported: Occupancy | None = None
        self._remote: dict[str, Occupancy] = {}
        """The occupancy of this room at the other nodes."""
        self._watchers: dict[Watcher, bool] = {}
        """The watchers, each with True if it has received the last occupancy shown."""
        self._shown: Occupancy | None = None
        self._typing: dict[str, None] = {}
        self._remote_typing: dict[str, None] = {}
        self._changed = False
        self._round_call: IDelayedCall | None = None
        self._next_round = 0.0
        # The round: the watchers yet to serve, and the frames for them.
        self._round: Iterator[Watcher] | None = None
        self._snapshot = self._delta = self._typed = b""

    @property
    def here(self) -> Occupancy:
        """The occupancy of the room at this node."""
        names = {member.name for member in self._members if member.name is not None}
        return Occupancy(len(self._members), frozenset(names) if len(names) <= MAX_USERS else None)

    def joined(self, member: Watcher) -> None:
        """Note that a member has joined."""
        if member.events:
            self._watchers[member] = False
        self.changed()

    def left(self, member: Watcher) -> None:
        """Note that a member has left."""
        self._watchers.pop(member, None)
        self.changed()
        if self._report is not None and not self._members:  # the room is about to be forgotten
            self._report(EMPTY, ())
        if not self._members or not self._has_audience:
            self._typing = {}
            self._remote_typing = {}
            if self._round_call is not None:
                self._round_call.cancel()
                self._round_call = self._round = None

    def changed(self) -> None:
        """Note that members have joined, left or changed their names."""
        if self._has_audience:
            self._changed = True
            self._schedule()

    def typing(self, username: str) -> None:
        """Note that a user types at this node."""
        if self._has_audience and len(self._typing) < MAX_TYPING:
            self._typing[username] = None
            self._schedule()

    def remote_changed(self, node: str, occupancy: Occupancy | None) -> None:
        """Take the occupancy of this room at another node; None drops the node."""
        if occupancy is not None and occupancy.members:
            self._remote[node] = occupancy
        elif self._remote.pop(node, None) is None:
            return
        self.changed()

    def remote_typing(self, usernames: Sequence[str]) -> None:
        """Note that users type at another node."""
        if self._watchers:
            self._remote_typing |= dict.fromkeys(usernames)
            self._schedule()

    @property
    def _has_audience(self) -> bool:
        return bool(self._watchers) or self._report is not None

    def _schedule(self) -> None:
        if self._round_call is None:
            delay = max(0, self._next_round - self._clock.seconds())
            self._round_call = self._clock.callLater(delay, self._send)

    def _send(self) -> None:
        """Continue the round for one slice, or begin the next round."""
        self._round_call = None
        if self._round is None:
            self._next_round = self._clock.seconds() + ROUND_SECONDS
            self._round = self._begin_round()
        if not sweep(self._round, self._serve, self._clock):
            self._round_call = self._clock.callLater(0, self._send)
            return
        self._round = None
        if self._changed or self._typing or self._remote_typing:
            self._schedule()

    def _begin_round(self) -> Iterator[Watcher]:
        """Encode the frames of a new round, and return the watchers to serve."""
        occupancy = self.here
        typing = [*self._typing]
        if self._report is not None and (occupancy != self._reported or typing):
            self._reported = occupancy
            self._report(occupancy, typing)
        if self._remote:
            occupancy = Occupancy.sum([occupancy, *self._remote.values()])
        self._snapshot, self._delta = self._encode(occupancy, self._shown)
        typing = [*(self._typing | self._remote_typing)][:MAX_TYPING]
        self._typed = self._typing_frame(typing) if typing else b""
        self._shown = occupancy
        self._typing = {}
        self._remote_typing = {}
        self._changed = False
        return iter([*self._watchers])

    def _encode(self, occupancy: Occupancy, shown: Occupancy | None) -> tuple[bytes, bytes]:
        """Return the snapshot, and the delta from the occupancy shown last, which is empty if nothing changed."""
        users = occupancy.users
        snapshot = self._presence_frame(occupancy.members, **occupancy.shown)
        if occupancy == shown:
            return snapshot, b""
        if shown is None or shown.users is None or users is None:
            return snapshot, snapshot
        join, leave = sorted(users - shown.users), sorted(shown.users - users)
        return snapshot, self._presence_frame(occupancy.members, join=join, leave=leave)

    def _serve(self, watchers: Sequence[Watcher]) -> None:
        for watcher in watchers:
            informed = self._watchers.get(watcher)
            if informed is None:  # it has left
                continue
            if PRESENCE in watcher.events:
                frame = self._delta if informed else self._snapshot
                if frame and watcher.takes_events:
                    watcher.send_frame(frame)
                    self._watchers[watcher] = True
                elif frame:
                    self._watchers[watcher] = False
                    self._changed = True  # until the watcher is ready
            if self._typed and TYPING in watcher.events and watcher.takes_events:
                watcher.send_frame(self._typed)
