"""Who is in a room, and who is typing there, for those who asked.

Nothing is counted while people come and go: what is shown is a function of the room's members, taken at most once
a second, and only while someone watches and something has changed.  A watcher first gets the whole
(a *snapshot*), then what changed since the last frame (a *delta*), and all get the same bytes: when
thousands join in one second, each of them is told once, and those who were there are told once too.

A watcher whose transport is full is told nothing, and gets a snapshot when it takes something again.  Typing is
told in the same round and forgotten: whoever could not be told then has missed nothing.

Where several nodes serve one room, each tells the others in its round who is at it, through a *lobby*, and shows its
watchers the sum.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from chatd.room.encoder import Encoder
from chatd.room.sweep import sweep

PRESENCE: Final = "presence"
TYPING: Final = "typing"
EVENTS: Final = frozenset({PRESENCE, TYPING})
"""What a member can ask to be told besides messages."""
ROUND_SECONDS: Final = 1.0
"""How long after one round of frames the next may begin."""
MAX_USERS: Final = 200
"""How many names are shown; where there are more, only the members are counted."""
MAX_TYPING: Final = 10
"""How many who type are named in a round; others are left out."""


class Watcher(Protocol):
    """A member, as far as presence is concerned."""

    events: frozenset[str]
    """What it asked to be told, of EVENTS."""
    name: str | None
    """The username by which it is known."""
    ready: bool
    """Whether its transport takes more."""

    def send_frame(self, frame: bytes) -> None:
        """Hand it a frame that is not of the log."""


class Occupancy(NamedTuple):
    """Who is in a room at one instant."""

    members: int
    """With a name or without."""
    users: frozenset[str] | None
    """The distinct names; None when there are too many to show."""

    @classmethod
    def sum(cls, all_here: "Iterable[Occupancy]") -> "Occupancy":
        """Who is in a room at several nodes: a name may be at more than one."""
        all_here = [*all_here]
        names: set[str] | None = set()
        for here in all_here:
            names = None if names is None or here.users is None else names | here.users
        users = None if names is None or len(names) > MAX_USERS else frozenset(names)
        return cls(sum(here.members for here in all_here), users)


NOBODY: Final = Occupancy(0, frozenset())
Report = Callable[[Occupancy, Sequence[str]], None]
"""Takes who is in a room, and who types."""


class LobbyListener(Protocol):
    """Who is told by a lobby what happens at the other nodes."""

    def elsewhere(self, room: str, node: str, here: Occupancy) -> None:
        """Who is in a room at another node has changed."""

    def typing(self, room: str, usernames: Sequence[str]) -> None:
        """These type at another node."""

    def gone(self, node: str) -> None:
        """Another node is there no more, nor is anyone at it."""


class Lobby(Protocol):
    """Where the nodes that serve the same rooms tell one another who is there."""

    def follow(self, guest: LobbyListener) -> None:
        """Tell this guest from now on."""

    def report(self, room: str, here: Occupancy, typing: Sequence[str]) -> None:
        """Tell the others who is in a room at this node now, and who types; and be told who is there at theirs."""


class Presence:
    """Tells the watchers among a room's members; `report` tells the other nodes, if there are any."""

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
        self._elsewhere: dict[str, Occupancy] = {}
        """Who is here at other nodes."""
        self._watchers: dict[Watcher, bool] = {}
        """... and whether each knows what was shown last."""
        self._shown: Occupancy | None = None
        self._typing: dict[str, None] = {}
        self._typing_elsewhere: dict[str, None] = {}
        self._stale = False
        self._turn: IDelayedCall | None = None
        self._next = 0.0
        # The round: whom it has yet to tell, and what.
        self._round: Iterator[Watcher] | None = None
        self._snapshot = self._delta = self._typed = b""

    def joined(self, member: Watcher) -> None:
        """A member has come."""
        if member.events:
            self._watchers[member] = False
        self.changed()

    def left(self, member: Watcher) -> None:
        """A member has gone."""
        self._watchers.pop(member, None)
        self.changed()
        if self._report is not None and not self._members:  # and so this room is about to be forgotten
            self._report(NOBODY, ())
        if not self._members or not self._heard:
            self._typing = {}
            self._typing_elsewhere = {}
            if self._turn is not None:
                self._turn.cancel()
                self._turn = self._round = None

    def changed(self) -> None:
        """Members have come or gone, or are known by another name."""
        if self._heard:
            self._stale = True
            self._schedule()

    def typing(self, username: str) -> None:
        """Someone writes."""
        if self._heard and len(self._typing) < MAX_TYPING:
            self._typing[username] = None
            self._schedule()

    def elsewhere(self, node: str, here: Occupancy | None) -> None:
        """Who is here at another node has changed; None: it is gone."""
        if here is not None and here.members:
            self._elsewhere[node] = here
        elif self._elsewhere.pop(node, None) is None:
            return
        self.changed()

    def typing_elsewhere(self, usernames: Sequence[str]) -> None:
        """These write, at another node."""
        if self._watchers:
            self._typing_elsewhere |= dict.fromkeys(usernames)
            self._schedule()

    @property
    def _heard(self) -> bool:
        """Whether anyone is told."""
        return bool(self._watchers) or self._report is not None

    def _schedule(self) -> None:
        if self._turn is None:
            self._turn = self._clock.callLater(max(0, self._next - self._clock.seconds()), self._tell)

    def _tell(self) -> None:
        """Go on with the round for one slice, or begin the next one."""
        self._turn = None
        if self._round is None:
            self._next = self._clock.seconds() + ROUND_SECONDS
            self._round = self._begin()
        if not sweep(self._round, self._serve, self._clock):
            self._turn = self._clock.callLater(0, self._tell)
            return
        self._round = None
        if self._stale or self._typing or self._typing_elsewhere:
            self._schedule()

    def _begin(self) -> Iterator[Watcher]:
        """Compose what is told in a new round, and answer to whom."""
        names = {member.name for member in self._members if member.name is not None}
        here = Occupancy(len(self._members), frozenset(names) if len(names) <= MAX_USERS else None)
        typing = [*self._typing]
        if self._report is not None and (here != self._reported or typing):
            self._reported = here
            self._report(here, typing)
        here = Occupancy.sum([here, *self._elsewhere.values()]) if self._elsewhere else here
        self._snapshot, self._delta = self._encode(here, self._shown)
        typing = [*(self._typing | self._typing_elsewhere)][:MAX_TYPING]
        self._typed = self._typing_frame(typing) if typing else b""
        self._shown = here
        self._typing = {}
        self._typing_elsewhere = {}
        self._stale = False
        return iter([*self._watchers])

    def _encode(self, here: Occupancy, shown: Occupancy | None) -> tuple[bytes, bytes]:
        """Return the snapshot, and the delta from what was shown last; no delta if nothing has changed."""
        users = here.users
        snapshot = self._presence_frame(here.members, **({} if users is None else {"users": sorted(users)}))
        if here == shown:
            return snapshot, b""
        if shown is None or shown.users is None or users is None:
            return snapshot, snapshot
        join, leave = sorted(users - shown.users), sorted(shown.users - users)
        return snapshot, self._presence_frame(here.members, join=join, leave=leave)

    def _serve(self, watchers: Sequence[Watcher]) -> None:
        for watcher in watchers:
            knows = self._watchers.get(watcher)
            if knows is None:  # it has left
                continue
            if PRESENCE in watcher.events:
                frame = self._delta if knows else self._snapshot
                if watcher.ready and frame:
                    watcher.send_frame(frame)
                    self._watchers[watcher] = True
                elif frame:
                    self._watchers[watcher] = False
                    self._stale = True  # until it can be told
            if self._typed and TYPING in watcher.events and watcher.ready:
                watcher.send_frame(self._typed)
