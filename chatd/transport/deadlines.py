"""Many deadlines of one length, at the cost of a dictionary entry each.

Deadlines that are added last expire last.  So a dictionary in order of insertion is the whole queue, and one
check every second serves any number of connections without timers.
"""

from collections.abc import Iterator
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
