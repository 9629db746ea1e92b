"""Many deadlines of one length, for the price of a dictionary entry each.

Those that are added last expire last, so a dictionary in order of insertion is all the queue that is
needed, and one look every second serves any number of connections: no timer belongs to any.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

from twisted.internet.interfaces import IReactorTime

_T = TypeVar("_T")


class Deadlines(Generic[_T]):
    """Who has to have done something `delay` seconds after it was added."""

    def __init__(self, delay: float, clock: IReactorTime) -> None:
        self._delay = delay
        self._clock = clock
        self._due: dict[_T, float] = {}

    def __iter__(self) -> Iterator[_T]:
        """Those who are waited for, as they are now."""
        return iter([*self._due])

    def add(self, who: _T) -> None:
        """Begin someone's time, anew if it has begun."""
        self._due.pop(who, None)
        self._due[who] = self._clock.seconds() + self._delay

    def discard(self, who: _T) -> None:
        """Wait no longer for someone."""
        self._due.pop(who, None)

    def expired(self) -> Iterator[_T]:
        """Take out, and answer, those whose time is over."""
        now = self._clock.seconds()
        while self._due:
            who = next(iter(self._due))
            if self._due[who] > now:
                return
            del self._due[who]
            yield who
