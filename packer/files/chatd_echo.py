"""Join a room, post one message, and wait until it is read back, to check that a server stores and delivers.

The smoke test of an image, chatd-lifecycle before an instance enters service, and scripts/deploy after a rollout all
use it.  As a program, `chatd_echo.py URL SECONDS` makes one attempt and prints which server answered.

Exit status: 0, the message was read back; 1, it was not, and a line on standard error gives the reason.
"""
# ruff: noqa: INP001 -- installed beside the programs that use it

import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure
from typing_extensions import override

from chatd.client import Client, History, Listener, Rejected
from chatd.messages import Entry


class Echo(Listener):
    """A member that posts once.

    `heard` fires when the message is read back.  It fails with Rejected if the server refuses the member or the post
    for good.
    """

    def __init__(self) -> None:
        self.message = secrets.token_hex(8)
        self.heard: Deferred[None] = Deferred()

    @override
    def on_history(self, history: History) -> None:  # after a lost connection the message can be part of the history
        self.on_entries("", history.entries)

    @override
    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        if not self.heard.called and any(entry.message == self.message for entry in entries):
            self.heard.callback(None)

    @override
    def on_reject(self, reason: Exception) -> None:
        if not self.heard.called:
            self.heard.errback(reason)


class Attempt(Echo):
    """An echo that also fails when its connection is lost."""

    @override
    def on_disconnect(self, reason: str, wait: float) -> None:
        self.on_reject(Rejected(reason, None))


async def echo(reactor: Any, url: str, username: str, member: Echo) -> str | None:
    """Post to the room at a URL, wait until the message is read back, and return the server's name and version."""
    client = Client(reactor, url, member)
    client.start()
    client.post(username, member.message).addErrback(lambda failure: member.on_reject(failure.value))
    try:
        await member.heard
    finally:
        closed = client.stop()
    await closed
    return client.server


def main(url: str, seconds: str) -> None:
    """Make one attempt, print its result, and end the process."""
    from twisted.internet import reactor as _reactor

    reactor: Any = _reactor
    member = Attempt()

    def late(_value: object, _seconds: float) -> None:
        raise Rejected("no answer in time", None)

    def end(result: str | Failure | None) -> None:
        failed = isinstance(result, Failure)
        (sys.stderr if failed else sys.stdout).write(f"{result.value if isinstance(result, Failure) else result}\n")
        sys.stdout.flush()
        os._exit(failed)  # without waiting for a thread that resolves a name

    member.heard.addTimeout(float(seconds), reactor, late)
    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(echo(reactor, url, "deploy", member)).addBoth(end))
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
