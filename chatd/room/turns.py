"""Work for later reactor turns, of which each has a bounded time, so that the reactor can read in between."""

from collections import deque
from collections.abc import Callable
from typing import Final

from twisted.internet.interfaces import IReactorTime

TURN_SECONDS: Final = 0.008
"""The time that all that waits in a queue has in a reactor turn."""


class TurnQueue:
    """A fair queue of work that waits for the next reactor turn: rooms to flush, or the bytes of connections."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._waiting: deque[Callable[[], object]] = deque()
        self._scheduled = False

    def wait(self, go_on: Callable[[], object]) -> None:
        """Call a function in the next turn, or in the first one that has time for it."""
        self._waiting.append(go_on)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._clock.callLater(0, self._serve)

    def _serve(self) -> None:
        """Call each function that waits now, until the time is over."""
        self._scheduled = False
        deadline = self._clock.seconds() + TURN_SECONDS
        try:
            for _ in range(len(self._waiting)):
                self._waiting.popleft()()
                if self._clock.seconds() > deadline:
                    break
        finally:
            self._schedule()
