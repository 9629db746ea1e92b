"""One round over many members in slices of a few milliseconds, so that the reactor can read in between."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from twisted.internet.interfaces import IReactorTime

SLICE_SECONDS: Final = 0.008
"""The duration of a slice."""
SLICE_MEMBERS: Final = 64
"""The number of members served between two looks at the clock."""

_T = TypeVar("_T")


def sweep(members: Iterator[_T], serve: Callable[[Sequence[_T]], None], clock: IReactorTime) -> bool:
    """Serve members for one slice; return True if all were served.  The iterator holds the place to continue from."""
    deadline = clock.seconds() + SLICE_SECONDS
    while some := [*islice(members, SLICE_MEMBERS)]:
        serve(some)
        if clock.seconds() > deadline:
            return False
    return True
