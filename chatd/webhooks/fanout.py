"""All webhooks of a server: they follow the log together."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList
from typing_extensions import override

from chatd.messages import Entry
from chatd.room.log import Follower
from chatd.webhooks.delivery import Webhook
from chatd.webhooks.signature import SigningKeys

STOP_SECONDS: Final = 3.0
"""The longest time for which a stop waits for deliveries; what is not answered by then is sent again later."""


class Fanout(Follower):
    """Passes what the log appends to every webhook."""

    def __init__(self, webhooks: Sequence[Webhook], keys: SigningKeys) -> None:
        self._webhooks = webhooks
        self._keys = keys

    def __iter__(self) -> Iterator[Webhook]:
        return iter(self._webhooks)

    def start(self) -> None:
        """Begin to deliver; the log is open."""
        for webhook in self._webhooks:
            webhook.start()

    def stop(self, seconds: float) -> "Deferred[Any]":
        """Send nothing new; fire within some seconds, when every cursor is stored and every request is over."""
        return DeferredList([webhook.stop(min(seconds, STOP_SECONDS)) for webhook in self._webhooks])

    def reload(self) -> None:
        """Read the keys again, and try the webhooks that their application has ended."""
        self._keys.reload()
        for webhook in self._webhooks:
            webhook.resume()

    @override
    def appended(self, room: str, entries: Sequence[Entry]) -> None:
        first, head = entries[0].number, entries[-1].number
        removed = [entry.replaces for entry in entries if entry.removed and entry.replaces is not None]
        for webhook in self._webhooks:
            webhook.appended(room, first, head)
            if removed:
                webhook.erased(room, removed)

    @override
    def trimmed(self, room: str, first: int) -> None:
        for webhook in self._webhooks:
            webhook.trimmed(room, first)

    @override
    def interrupted(self) -> None:
        for webhook in self._webhooks:
            webhook.interrupted()
