"""The Python client on asyncio, with the library websockets as its transport.

    async with Client("http://localhost:8085", username="ann") as client:
        room = client.room("main")
        await room.post("hi")
        async for entry in room:
            print(entry.username, entry.message)

The rules are those of the client on Twisted.  This module adds connections, timers and futures.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self, cast

from typing_extensions import override
from websockets.asyncio.client import ClientConnection as Socket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.protocol import State
from websockets.typing import Subprotocol

from chatd.client.address import ServerAddress
from chatd.client.chatroom import ChatClient, ChatRoom
from chatd.client.connector import ConnectorCore, Ending, SingleRoom, SleepWatch
from chatd.client.core import Listener, RoomCore
from chatd.client.protocol import (
    ANSWER_SECONDS,
    CLOSE_SECONDS,
    CONNECT_SECONDS,
    IDLE_SECONDS,
    WINDOW,
    Backoff,
    ClientStopped,
    Posted,
    Rejected,
    checked_token,
    parse_frame,
)
from chatd.client.storage import FileStorage, MemoryStorage, PendingPost, Storage
from chatd.client.view import EntryPage, RoomEntry, RoomPresence, Snapshot
from chatd.messages import Id
from chatd.transport.framing import SUBPROTOCOL

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

_logger = logging.getLogger("chatd.client")

Token = str | Callable[[], str | Awaitable[str]] | None
"""A token, or a function that returns one now or later."""


class _LoopTimer:
    """A call that the loop makes later."""

    def __init__(self, loop: asyncio.AbstractEventLoop, delay: float, call: Callable[..., Any]) -> None:
        self._call = call
        self._handle = loop.call_later(delay, self._fire)
        self._over = False

    def _fire(self) -> None:
        self._over = True
        self._call()

    def active(self) -> bool:
        """Return whether the call is still to be made."""
        return not self._over

    def cancel(self) -> None:
        """Do not make the call."""
        self._over = True
        self._handle.cancel()


class _LoopClock:
    """The time of a loop, in the words of Twisted."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.seconds = loop.time

    def callLater(self, delay: float, callable: Callable[..., Any]) -> _LoopTimer:  # noqa: A002 -- Twisted's name
        """Call a function once, after `delay` seconds."""
        return _LoopTimer(self._loop, delay, callable)


class _FutureRequester:
    """Receives an answer for a future, which may be cancelled."""

    def __init__(self, future: "asyncio.Future[Any]") -> None:
        self._future = future
        future.add_done_callback(_retrieve)

    def callback(self, result: Any) -> None:
        """Take the result."""
        if not self._future.done():
            self._future.set_result(result)

    def errback(self, fail: Exception) -> None:
        """Take the reason of a failure."""
        if not self._future.done():
            self._future.set_exception(fail)


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Mark an exception as known: the snapshot shows it too, so nobody has to wait for it."""
    if not future.cancelled():
        future.exception()


def _reason(error: Exception) -> str:
    """Return the reason of a failed attempt to connect, for people."""
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0).lower()
    return str(error) or type(error).__name__


class _Connection(SingleRoom):
    """The connection of one room, by websockets."""

    _serving: "asyncio.Task[None]"
    """The task of the newest attempt."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: ServerAddress,
        listener: Listener,
        *,
        last: Id | None,
        token: Token,
        backoff: Backoff,
        options: dict[str, Any],
        tasks: "set[asyncio.Task[None]]",
    ) -> None:
        clock = _LoopClock(loop)
        RoomCore.__init__(self, clock, listener, last, WINDOW)
        ConnectorCore.__init__(self, clock, address, token, backoff)
        self._decode = parse_frame
        self._loop = loop
        self._options = options
        self._tasks = tasks
        """All tasks of the client that are not done."""
        self._helpers: set[asyncio.Task[None]] = set()
        """The tasks that end with this connection."""
        self._socket: Socket | None = None
        self._unsent: asyncio.Queue[bytes | None] = asyncio.Queue()
        """The frames to send; None stands for a ping."""
        self._expecting = False
        """True while a request waits for an answer, and no probe is due sooner."""
        self._fault: str | None = None
        """The reason for which this client aborts the connection."""

    # For the room

    def stop(self) -> None:
        """Give up the room, and close the connection soon."""
        if self._end is None:  # a second call must not cut the closing handshake short
            self._stop()
            self._schedule(self.start, None)
            self._serving.cancel()

    # For the rules

    @override
    def _connect(self) -> None:
        self._serving = self._spawn(self._run())

    @property
    @override
    def can_send(self) -> bool:
        return self._socket is not None and self._socket.state is State.OPEN

    @override
    def transmit(self, text: bytes) -> None:
        self._unsent.put_nowait(text)
        if not self._expecting and not self._is_scheduled(self._give_up):
            self._expecting = True
            self._schedule(self._probe, ANSWER_SECONDS)

    @override
    def _probe(self) -> None:
        self._schedule(self._probe, None)
        if not self._is_scheduled(self._give_up):
            self._schedule(self._give_up, ANSWER_SECONDS)
            self._unsent.put_nowait(None)

    @override
    def _renew(self) -> None:
        self._help(self._renew_now())

    @override
    def log_warning(self, text: str) -> None:
        _logger.warning("%s: %s", self.address, text)

    @override
    def log_failure(self, text: str) -> None:
        _logger.error("%s: %s", self.address, text, exc_info=True)  # noqa: LOG014 -- in a handler of the caller

    # Connections

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _help(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._spawn(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def _run(self) -> None:
        """Make one attempt to connect, and serve the connection until its end."""
        try:
            ending = await self._serve()
        except Exception as error:  # noqa: BLE001 -- the client goes on, whatever a library raises
            self.log_failure("unexpected error of the connection")
            ending = Ending(_reason(error))
        self.connection_ended(ending)

    async def _serve(self) -> Ending:
        if not await self._take_token():
            return Ending("there is no token")
        try:
            socket = await self._open()
        except InvalidStatus as error:
            response = error.response
            retry_after = [*response.headers.get_all("Retry-After"), ""][0]
            return Ending.refused(response.status_code, response.reason_phrase, retry_after)
        except (OSError, EOFError, WebSocketException) as error:
            return Ending(_reason(error))
        self.server = socket.response.headers.get("Server") if socket.response else None
        self._unsent = asyncio.Queue()
        self._fault = None
        self._socket = socket
        self._help(self._send_all(socket, self._unsent))
        try:
            self._heard()
            self.connection_opened()
            return await self._receive_all(socket)
        finally:
            self._socket = None
            for call in (self._probe, self._give_up, self._renew):
                self._schedule(call, None)
            for helper in self._helpers:
                helper.cancel()
            if self._fault is not None:
                socket.transport.abort()
            await socket.close()

    async def _open(self) -> Socket:
        host, port, resource = self.target()
        scheme = "wss" if self.address.secure else "ws"
        return await connect(
            f"{scheme}://{host}:{port}{resource}",
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=self.headers(),
            compression=None,
            open_timeout=CONNECT_SECONDS,
            close_timeout=CLOSE_SECONDS,
            ping_interval=None,
            max_size=None,
            **self._options,
        )

    async def _receive_all(self, socket: Socket) -> Ending:
        """Handle the frames of the server until the connection ends."""
        try:
            while True:
                text = await socket.recv(decode=False)
                self._heard()
                fault = self.handle_text(text)
                if fault is not None:
                    self._fault = fault
                    return Ending(fault)
        except ConnectionClosed as error:
            if error.rcvd is not None:
                return Ending.closed(error.rcvd.code, error.rcvd.reason)
            return Ending(self._fault or str(error))

    async def _send_all(self, socket: Socket, unsent: "asyncio.Queue[bytes | None]") -> None:
        """Send frames until the connection ends."""
        with contextlib.suppress(ConnectionClosed):  # the receiver learns the reason
            while True:
                text = await unsent.get()
                if text is None:
                    pong = asyncio.ensure_future(await socket.ping())
                    pong.add_done_callback(self._ponged)
                else:
                    await socket.send(text, text=True)

    # Silence

    def _heard(self) -> None:
        """Note a sign of life of the server."""
        self._expecting = False
        self._schedule(self._give_up, None)
        self._schedule(self._probe, IDLE_SECONDS)

    def _ponged(self, pong: "asyncio.Future[float]") -> None:
        if not pong.cancelled() and pong.exception() is None and self.can_send:
            self._heard()

    def _give_up(self) -> None:
        self._fault = "the server did not answer in time"
        cast(Socket, self._socket).transport.abort()

    # Tokens

    async def _take_token(self) -> bool:
        """Get the token for the next handshake or renewal; return False if its function fails."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                token = self._token() if callable(self._token) else self._token
                self._bearer = checked_token(await token if inspect.isawaitable(token) else token)
        except asyncio.CancelledError:
            if cast("asyncio.Task[None]", asyncio.current_task()).cancelling():
                raise
            self.log_failure("the function that returns the token was cancelled")
            return False
        except Exception:  # noqa: BLE001 -- it is the application's
            self.log_failure("the function that returns the token failed")
            return False
        return True

    async def _renew_now(self) -> None:
        if await self._take_token() and self.can_send:
            self._send_token()
        self._schedule_renewal()


class Room(ChatRoom):
    """A member of one room, over as many connections as needed.  `Client.room` makes it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: ServerAddress,
        *,
        username: str | None,
        token: Token,
        last: Id | None,
        keep: int | None,
        storage: Storage,
        backoff: Backoff,
        options: dict[str, Any],
        tasks: "set[asyncio.Task[None]]",
    ) -> None:
        def join(listener: Listener) -> _Connection:
            self._connection = _Connection(
                loop, address, listener, last=last, token=token, backoff=backoff, options=options, tasks=tasks
            )
            return self._connection

        super().__init__(_LoopClock(loop), time.time, join, username=username, storage=storage, last=last, keep=keep)
        self._loop = loop
        self._change = asyncio.Event()
        """The next change."""
        self.subscribe(self._wake)
        self._connection.start()

    # Posts

    def post(self, message: str, **fields: Any) -> "asyncio.Future[Posted]":
        """Post a message, over as many connections as that takes; the result arrives when the server has stored it.

        `fields` are those of the operator's own schema.  The call puts the post into the storage, so it need not be
        awaited.  Cancelling the future does not take the post back: see `discard`.

        Raises Rejected if the server refuses the post, and ClientStopped if the room is stopped or the post discarded.
        """
        future, answer = self._promise()
        self._post(message, fields, answer)
        return future

    def edit(self, id_: Id | str, message: str, **fields: Any) -> "asyncio.Future[Posted]":
        """Replace the text of a message, as `post` does.  Needs a token of its author or of a moderator."""
        future, answer = self._promise()
        self._edit(id_, message, fields, answer)
        return future

    def remove(self, id_: Id | str) -> "asyncio.Future[Posted]":
        """Remove a message, as `post` does.  Needs a token of its author or of a moderator."""
        future, answer = self._promise()
        self._remove(id_, answer)
        return future

    def retry(self, label: str) -> "asyncio.Future[Posted] | None":
        """Send a refused post again, under its label; return None if the outbox has no such post."""
        future, answer = self._promise()
        return future if self._outbox.retry(label, answer) else None

    # Pages

    async def page(
        self, *, before: Id | str | None = None, after: Id | str | None = None, limit: int = 50
    ) -> EntryPage:
        """Read a page: the newest entries, or those before or after an id.

        Raises Rejected if the server refuses the request, and ClientStopped if the room is stopped.
        """
        future, answer = self._promise()
        label = self._page(before, after, limit, answer)
        try:
            page: EntryPage = await future
        finally:
            if future.cancelled() and label is not None:
                self._connection.forget_request(label)
        return page

    async def older(self, limit: int = 50) -> None:
        """Read the page before the oldest entry, and add it to the snapshot."""
        future, answer = self._promise()
        self._older(limit, answer)
        await future

    # Entries

    def __aiter__(self) -> "RoomIterator":
        return RoomIterator(self)

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._change.wait()

    def stop(self) -> None:
        """Leave the room.  Unsent posts stay in the storage."""
        self._connection.stop()

    def _promise(self) -> "tuple[asyncio.Future[Any], _FutureRequester]":
        future: asyncio.Future[Any] = self._loop.create_future()
        return future, _FutureRequester(future)

    def _wake(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


class RoomIterator:
    """The entries of a room, from the oldest known one.

    It ends when the room is stopped, and raises Rejected when the server rejects the client.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.last: Id | None = None
        """The id of the entry that it yielded last."""
        room.follow(self)

    def __aiter__(self) -> "RoomIterator":
        return self

    async def __anext__(self) -> RoomEntry:
        while (entry := self._room.following(self.last)) is None:
            error = self._room.error
            if isinstance(error, Rejected):
                raise error
            if error is not None:
                raise StopAsyncIteration
            await self._room.changed()
        self.last = entry.id
        return entry


class Client(ChatClient[Room]):
    """A user of one server.

    `url` is the address of the server, such as `http://localhost:8085` or `wss://chat.example`.
    `username` is the name under which this user posts; with tokens, the one in the token.
    `token` is for a server that asks for one: a text, or a function that returns a valid one, now or as an awaitable.
    The client calls it for each connection, before the token expires, and after the server refused the token.
    `storage` keeps unsent posts: in memory by default, or in a FileStorage.
    `ssl` is the TLS context, and `proxy` the URL of a proxy.  The settings of the machine count by default.
    `backoff` makes the pauses between attempts to connect, for each room.

    Call its methods while the loop runs.
    """

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        token: Token = None,
        storage: Storage | None = None,
        ssl: ssl.SSLContext | None = None,
        proxy: str | Literal[True] | None = True,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        super().__init__(url, username=username, storage=storage, backoff=backoff)
        self._token = token
        self._options: dict[str, Any] = {"proxy": proxy}
        if ssl is not None and self._address.secure:
            self._options["ssl"] = ssl
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: SleepWatch | None = None

    @override
    def _join(self, address: ServerAddress, last: Id | None, keep: int | None) -> Room:
        loop = asyncio.get_running_loop()
        if self._watch is None:
            self._watch = SleepWatch(_LoopClock(loop), time.time, self._wake)
            self._watch.start()
        return Room(
            loop,
            address,
            username=self.username,
            token=self._token,
            last=last,
            keep=keep,
            storage=self._storage,
            backoff=self._backoff(),
            options=self._options,
            tasks=self._tasks,
        )

    def stop(self) -> None:
        """Leave all rooms."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        for room in self._rooms.values():
            room.stop()

    async def close(self) -> None:
        """Leave all rooms, and wait until their connections are closed."""
        self.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
