"""The clock of Twisted's reactors."""

import time
from typing import Any

from twisted.internet.base import ReactorBase


def use_monotonic_clock(reactor: Any) -> None:
    """Let a reactor measure time by a clock that is never set; call this before the first call is scheduled.

    Twisted's reactors use the wall clock.  When that is set back, all their calls wait until it has caught up.  The
    function that they measure time with is an attribute, which this replaces.
    """
    if isinstance(reactor, ReactorBase):
        reactor.seconds = time.monotonic
