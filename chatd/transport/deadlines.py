"""Many deadlines without timers: one check every second serves any number of connections.

Deadlines of one length that are added last expire last.  So a dictionary in order of insertion is the whole queue.
Deadlines of lengths of their own are kept by the second in which they end.
"""

from collections.abc import Iterator
from math import ceil
from typing import Generic, TypeVar

from twisted.internet.interfaces import IReactorTime

_T = TypeVar("_T")


class Deadlines(Generic[_T]):
    """A set whose items expire `delay` seconds after they were added."""

    def __init__(self, delay: float, clock: IReactorTime) -> None:
        self._delay = delay
        self._clock = clock
        self._due: dict[_T, float] = {}

    def __iter__(self) -> Iterator[_T]:
        """Iterate over a copy of the items."""
        return iter([*self._due])

    def add(self, who: _T) -> None:
        """Add an item, or restart its time."""
        self._due.pop(who, None)
        self._due[who] = self._clock.seconds() + self._delay

    def discard(self, who: _T) -> None:
        """Remove an item, if it is in the set."""
        self._due.pop(who, None)

    def expired(self) -> Iterator[_T]:
        """Remove and yield the items whose time is over."""
        now = self._clock.seconds()
        while self._due:
            who = next(iter(self._due))
            if self._due[who] > now:
                return
            del self._due[who]
            yield who


class Expiries(Generic[_T]):
    """A set whose items expire at times of their own, rounded up to the second."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._due: dict[_T, int] = {}
        self._at: dict[int, set[_T]] = {}
        self._checked = int(clock.seconds())

    def set(self, who: _T, delay: float) -> None:
        """Let an item expire `delay` seconds from now, instead of when it would have."""
        self.discard(who)
        due = max(ceil(self._clock.seconds() + delay), self._checked + 1)
        self._due[who] = due
        self._at.setdefault(due, set()).add(who)

    def discard(self, who: _T) -> None:
        """Remove an item, if it is in the set."""
        due = self._due.pop(who, None)
        if due is not None:
            others = self._at[due]
            others.discard(who)
            if not others:
                del self._at[due]

    def expired(self) -> list[_T]:
        """Remove and return the items whose time is over."""
        now = int(self._clock.seconds())
        over = [who for second in range(self._checked + 1, now + 1) for who in self._at.get(second, ())]
        self._checked = now
        for who in over:
            self.discard(who)
        return over
