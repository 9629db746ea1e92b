"""The lease of a webhook: which node delivers.

A claim in the store lasts LEASE_SECONDS and is renewed in time.  This node counts from the moment at which it asked,
and stops a little earlier than the store.  A node that was suspended, or cut off from the store, therefore stops before
another one begins.  It cannot take back a request that was sent, so the store refuses to move a cursor for it.
"""

import secrets
from collections.abc import Callable
from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.room.cursors import CursorStore
from chatd.room.log import LogUnavailable

LEASE_SECONDS: Final = 15.0
"""How long a claim lasts; after a crash, another node begins within this time and RENEW_SECONDS."""
RENEW_SECONDS: Final = 5.0
"""The time after which a claim is renewed, or tried again."""
END_SECONDS: Final = 1.0
"""The time limit for ending a claim in the store."""
MARGIN_SECONDS: Final = 1.0
"""How long before the end of its claim a node stops."""

_logger = Logger()


class Lease:
    """The claim of this node on one reader.

    `gained` is called when the node has the reader, and `lost` when it no longer has.
    """

    def __init__(
        self,
        cursors: CursorStore,
        reader: str,
        clock: IReactorTime,
        gained: Callable[[], object],
        lost: Callable[[], object],
    ) -> None:
        self.held = False
        self.word = ""
        """The word of the claim."""
        self._cursors = cursors
        self._reader = reader
        self._clock = clock
        self._gained = gained
        self._lost = lost
        self._next: IDelayedCall | None = None
        self._end: IDelayedCall | None = None
        self._until = 0.0
        self._asks = 0
        """The number of requests so far; the answer to any but the last is ignored."""

    @property
    def in_force(self) -> bool:
        """True while no other node can have the reader; a process that was suspended may still count as `held`."""
        return self.held and self._clock.seconds() < self._until

    def start(self) -> None:
        """Claim the reader, and try again until that succeeds; claim it once more if the log has another epoch."""
        word = self.word if self.held else ""
        self.lose()
        self._ask(word)

    def lose(self) -> None:
        """Give up the claim in this process."""
        self._asks += 1
        for call in (self._next, self._end):
            if call is not None and call.active():
                call.cancel()
        if self.held:
            self.held = False
            self._lost()

    def stop(self) -> "Deferred[None]":
        """Give up the claim in the store too; fire when that is done, or cannot be."""
        held = self.held
        self.lose()
        if not held:
            return succeed(None)
        ended = self._cursors.end_claim(self._reader, self.word).addTimeout(END_SECONDS, self._clock)
        return ended.addErrback(_trap)

    def _ask(self, word: str = "") -> None:
        """Renew the claim, or make one, under a new word unless one is given."""
        self._asks += 1
        asked, now = self._asks, self._clock.seconds()
        if self.held:
            answer = self._cursors.renew(self._reader, self.word, LEASE_SECONDS)
        else:
            self.word = word or secrets.token_hex(8)
            answer = self._cursors.claim(self._reader, self.word, LEASE_SECONDS)
        answer.addCallbacks(self._answered, self._failed, callbackArgs=(asked, now), errbackArgs=(asked,))
        answer.addErrback(lambda failure: _logger.failure("unexpected error in the lease of a webhook", failure))

    def _answered(self, held: bool, asked: int, since: float) -> None:
        if asked != self._asks:
            return
        until = since + LEASE_SECONDS - MARGIN_SECONDS
        left = until - self._clock.seconds()
        if not held or left <= 0:
            self.lose()
            self._again()
            return
        if self._end is not None and self._end.active():
            self._end.cancel()
        self._until = until
        self._end = self._clock.callLater(left, self._expired)
        self._again()
        if not self.held:
            self.held = True
            self._gained()

    def _failed(self, failure: Failure, asked: int) -> None:
        _trap(failure)
        if asked == self._asks:
            self._again()

    def _expired(self) -> None:
        self.lose()
        self._again()

    def _again(self) -> None:
        self._next = self._clock.callLater(RENEW_SECONDS, self._ask)


def _trap(failure: Failure) -> None:
    failure.trap(LogUnavailable, DeferredTimeoutError)
