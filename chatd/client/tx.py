"""The Python client on Twisted with the same names as the one on asyncio: rooms with a snapshot and an outbox.

    client = Client(reactor, "http://localhost:8085", username="ann")
    room = client.room("main")
    room.subscribe(lambda: show(room.snapshot()))
    room.post("hi").addCallback(print)

`chatd.client.Client` is for programs that keep nothing: it only calls a listener.
"""

import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from typing_extensions import override

from chatd.client.address import ServerAddress
from chatd.client.chatroom import ChatClient, ChatRoom
from chatd.client.client import Client as Member
from chatd.client.connector import SleepWatch
from chatd.client.core import Listener
from chatd.client.protocol import Backoff, ClientStopped, Posted, Rejected
from chatd.client.storage import FileStorage, MemoryStorage, PendingPost, Storage
from chatd.client.view import EntryPage, RoomEntry, RoomPresence, Snapshot
from chatd.messages import Id

__all__ = [
    "Client",
    "ClientStopped",
    "EntryPage",
    "FileStorage",
    "Id",
    "MemoryStorage",
    "PendingPost",
    "Posted",
    "Rejected",
    "Room",
    "RoomEntry",
    "RoomPresence",
    "Snapshot",
    "Storage",
]


class Room(ChatRoom):
    """A member of one room, over as many connections as needed.  `Client.room` makes it.

    A Deferred fails with Rejected if the server refuses the request, and with ClientStopped if the room is stopped or
    the post discarded.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress,
        *,
        username: str | None,
        token: str | Callable[[], str] | None,
        last: Id | None,
        keep: int | None,
        storage: Storage,
        backoff: Backoff,
        endpoint: IStreamClientEndpoint | None,
    ) -> None:
        def join(listener: Listener) -> Member:
            self._member = Member(
                reactor, address, listener, last=last, token=token, backoff=backoff, endpoint=endpoint
            )
            return self._member

        super().__init__(reactor, time.time, join, username=username, storage=storage, last=last, keep=keep)
        self._member.start()

    def post(self, message: str, **fields: Any) -> "Deferred[Posted]":
        """Post a message, over as many connections as that takes; the Deferred fires when the server has stored it.

        `fields` are those of the operator's own schema.  The call puts the post into the storage.
        """
        answer: Deferred[Posted] = Deferred()
        self._post(message, fields, answer)
        return answer

    def edit(self, id_: Id | str, message: str, **fields: Any) -> "Deferred[Posted]":
        """Replace the text of a message, as `post` does.  Needs a token of its author or of a moderator."""
        answer: Deferred[Posted] = Deferred()
        self._edit(id_, message, fields, answer)
        return answer

    def remove(self, id_: Id | str) -> "Deferred[Posted]":
        """Remove a message, as `post` does.  Needs a token of its author or of a moderator."""
        answer: Deferred[Posted] = Deferred()
        self._remove(id_, answer)
        return answer

    def retry(self, label: str) -> "Deferred[Posted] | None":
        """Send a refused post again, under its label; return None if the outbox has no such post."""
        answer: Deferred[Posted] = Deferred()
        return answer if self._outbox.retry(label, answer) else None

    def page(
        self, *, before: Id | str | None = None, after: Id | str | None = None, limit: int = 50
    ) -> "Deferred[EntryPage]":
        """Read a page: the newest entries, or those before or after an id."""
        answer: Deferred[EntryPage] = Deferred()
        self._page(before, after, limit, answer)
        return answer

    def older(self, limit: int = 50) -> "Deferred[None]":
        """Read the page before the oldest entry, and add it to the snapshot."""
        answer: Deferred[None] = Deferred()
        self._older(limit, answer)
        return answer

    def stop(self) -> "Deferred[None]":
        """Leave the room; the Deferred fires when its connection is closed.  Unsent posts stay in the storage."""
        return self._member.stop()


class Client(ChatClient[Room]):
    """A user of one server.

    `url` is the address of the server, such as `http://localhost:8085` or `wss://chat.example`.
    `username` is the name under which this user posts; with tokens, the one in the token.
    `token` is for a server that asks for one: a text, or a function that returns a valid one and must not block.
    `storage` keeps unsent posts: in memory by default, or in a FileStorage.
    `backoff` makes the pauses between attempts to connect, for each room.
    `endpoint` connects elsewhere than to the host of the URL.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        url: str,
        *,
        username: str | None = None,
        token: str | Callable[[], str] | None = None,
        storage: Storage | None = None,
        backoff: Callable[[], Backoff] = Backoff,
        endpoint: IStreamClientEndpoint | None = None,
    ) -> None:
        super().__init__(url, username=username, storage=storage, backoff=backoff)
        self._reactor = reactor
        self._token = token
        self._endpoint = endpoint
        self._watch = SleepWatch(reactor, time.time, self._wake)

    @override
    def _join(self, address: ServerAddress, last: Id | None, keep: int | None) -> Room:
        self._watch.start()
        return Room(
            self._reactor,
            address,
            username=self.username,
            token=self._token,
            last=last,
            keep=keep,
            storage=self._storage,
            backoff=self._backoff(),
            endpoint=self._endpoint,
        )

    def stop(self) -> "Deferred[Any]":
        """Leave all rooms; the Deferred fires when their connections are closed."""
        self._watch.stop()
        return DeferredList([room.stop() for room in self._rooms.values()])
