"""Serving many without keeping the reactor from reading: a slice of a few milliseconds at a time."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from twisted.internet.interfaces import IReactorTime

SLICE_SECONDS: Final = 0.008
"""How long a slice may take."""
SLICE_MEMBERS: Final = 64
"""How many are served between two looks at the clock."""

_T = TypeVar("_T")


def sweep(members: Iterator[_T], serve: Callable[[Sequence[_T]], None], clock: IReactorTime) -> bool:
    """Serve for one slice, and answer whether all were served; the iterator knows where to go on."""
    deadline = clock.seconds() + SLICE_SECONDS
    while some := [*islice(members, SLICE_MEMBERS)]:
        serve(some)
        if clock.seconds() > deadline:
            return False
    return True
