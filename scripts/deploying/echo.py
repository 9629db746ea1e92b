"""Join a room at a URL, post, and have the message back; prints which server that was.

A process of its own, since Twisted's reactor runs once in one.  Exit status: 0, or 1 with the reason on standard error.
"""

import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any, Final

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred

from chatd.client.client import Client, Listener
from chatd.client.protocol import Rejected
from chatd.messages import Entry

ROOM: Final = "rooms/launch"
"""Where instances post when they are launched, so that nobody is disturbed."""
reactor: Any = _reactor


class Echo(Listener):
    """A client that posts once."""

    def __init__(self, url: str) -> None:
        self.said = f"verify {secrets.token_hex(8)}"
        self.fault = "no answer in time"
        self.done: Deferred[None] = Deferred()
        self.client = Client(reactor, url, self)

    def joined(self) -> None:
        self.client.post("deploy", self.said).addErrback(lambda _: None)  # that it is in the log shows when it comes

    def appended(self, epoch: str, entries: Sequence[Entry]) -> None:
        if any(entry.message == self.said for entry in entries) and not self.done.called:
            self.fault = ""
            self.done.callback(None)

    def lost(self, reason: str, wait: float) -> None:
        self._fail(reason)

    def refused(self, reason: Rejected) -> None:
        self._fail(str(reason))

    def _fail(self, reason: str) -> None:
        if not self.done.called:
            self.fault = reason
            self.done.callback(None)


def main(url: str, seconds: str) -> int:
    """Do so within so many seconds; answers the exit status."""
    try:
        echo = Echo(f"{url.rstrip('/')}/{ROOM}")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    echo.done.addTimeout(float(seconds), reactor)
    echo.done.addErrback(lambda _: None)
    echo.done.addCallback(lambda _: echo.client.stop())
    echo.done.addBoth(lambda _: reactor.stop())
    reactor.callWhenRunning(echo.client.start)
    reactor.run()
    (sys.stderr if echo.fault else sys.stdout).write(f"{echo.fault or echo.client.server}\n")
    sys.stdout.flush()
    os._exit(bool(echo.fault))  # no thread of the resolver's is waited for


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
