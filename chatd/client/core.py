"""One room as a client reads it, without a connection: a state machine that every event loop can drive.

The host gives it frames, and sends what it sends.  It measures time by a `Clock`, which is a reactor of Twisted, the
loop of asyncio behind an adapter, or a clock of a test.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson

from chatd.client.protocol import (
    Ack,
    ClientStopped,
    Cursor,
    Error,
    Event,
    Frame,
    History,
    Message,
    PendingRequests,
    ProtocolError,
    Rejected,
    Requester,
)
from chatd.messages import Entry, Id


class DelayedCall(Protocol):
    """A call that a clock makes later."""

    def active(self) -> bool:
        """Return whether the call is still to be made."""

    def cancel(self) -> None:
        """Do not make the call."""


class Clock(Protocol):
    """Time, as Twisted's IReactorTime has it."""

    def seconds(self) -> float:
        """Return the time now."""

    def callLater(self, delay: float, callable: Callable[..., Any]) -> Any:  # noqa: A002 -- the name is Twisted's
        """Call a function once, after `delay` seconds, and return the DelayedCall."""


class Listener:
    """The callbacks of a client.  Override those that you need; each does nothing by default.

    The client calls them in the reactor thread.  A callback should not raise: the client then logs the exception, drops
    the connection and reconnects.  It delivers the same entries again, until the callback accepts them.
    """

    def on_attempt(self) -> None:
        """React to the start of an attempt to connect."""

    def on_history(self, history: History) -> None:
        """Start over: these entries replace everything received before.

        The client calls this at its first connection, and again when the server has a new log, or cannot resume after
        the last id.
        """

    def on_entries(self, epoch: str, entries: Sequence[Entry]) -> None:
        """Receive the entries that follow the last ones, without a gap and in order."""

    def on_event(self, event: Event) -> None:
        """Receive a presence or typing event, if the query of the URL asks for them."""

    def on_connect(self) -> None:
        """React to a new connection, after its history was delivered."""

    def on_protocol_error(self, error: ProtocolError) -> None:
        """React to a server that broke the protocol; the client drops the connection and then reconnects."""

    def on_disconnect(self, reason: str, wait: float) -> None:
        """React to the end of a connection, or to a failed attempt; the next attempt is in `wait` seconds."""

    def on_reject(self, error: Rejected) -> None:
        """React to a server that refused this client for good; the client does not try again.

        The client calls this before the pending requests fail with the same error.
        """

    def on_stop(self, error: ClientStopped) -> None:
        """React to the end of the room by its user, before the pending requests fail with the same error."""


class Timers:
    """The timers of an object, one for each of its methods that are called later."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._timers: dict[Callable[[], None], DelayedCall] = {}

    def _schedule(self, call: Callable[[], None], seconds: float | None) -> None:
        """Replace the timer of a call: it fires in `seconds`, and None cancels it."""
        timer = self._timers.pop(call, None)
        if timer is not None and timer.active():
            timer.cancel()
        if seconds is not None:
            self._timers[call] = self._clock.callLater(seconds, call)

    def _is_scheduled(self, call: Callable[[], None]) -> bool:
        return call in self._timers and self._timers[call].active()


class RoomCore(Timers):
    """One room as a client reads it: the position, the listener and the pending requests."""

    def __init__(self, clock: Clock, listener: Listener, last: Id | None, window: int) -> None:
        super().__init__(clock)
        self.listener = listener
        self._cursor = Cursor(last)
        self._requests = PendingRequests(window)
        self._typed = False
        """True after a typing notice, which has no label, and so has an error that answers it."""
        self._over: Exception | None = None
        """The reason for which the client has given up the room."""

    @property
    def last(self) -> Id | None:
        """The id of the last entry that the listener received; None before the first history."""
        return self._cursor.last

    # For its user

    def request(self, document: dict[str, Any], answer: Requester, label: str | None = None) -> str | None:
        """Send a request until it is answered; return its label, or None if the client has given up the room."""
        if self._over is not None:
            answer.errback(self._over)
            return None
        label = self._requests.add(self._addressed(document), answer, label)
        self._send()
        return label

    def forget_request(self, label: str) -> None:
        """Drop a request, whose answer may yet arrive."""
        self._requests.forget(label)

    def typing(self, username: str) -> None:
        """Show the others that this user types, if the room is joined now."""
        if self._cursor.greeted and self.can_send:
            self._typed = True
            self.transmit(orjson.dumps(self._addressed({"type": "typing", "username": username})))

    # For its connection

    def disconnected(self) -> None:
        """Send nothing until the room is joined on another connection."""
        self._cursor.connect()
        self._schedule(self._send, None)

    def finish(self, error: Exception) -> None:
        """Give up the room: no request will be answered."""
        try:
            if self._over is None and isinstance(error, ClientStopped):
                self.listener.on_stop(error)
        finally:
            self._over = self._over or error
            self._requests.fail(error)

    def reject(self, error: Rejected) -> None:
        """Give up the room, because the server refused the client."""
        try:
            self.listener.on_reject(error)  # first: it names the cause of the failures that follow
        finally:
            self.finish(error)

    @property
    def can_send(self) -> bool:
        """True while a connection takes frames."""
        raise NotImplementedError

    def transmit(self, text: bytes) -> None:
        """Send a text frame."""
        raise NotImplementedError

    def _addressed(self, document: dict[str, Any]) -> dict[str, Any]:
        """Add the name of the room to a frame, on a connection that may be in many."""
        return document

    def _greeted(self) -> None:
        """React to the first history of a connection."""

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, Message):
            last = self.last
            self._cursor.message(frame)
            self._deliver(last, self.listener.on_entries, frame.epoch, (frame.entry,))
        elif isinstance(frame, Ack) or (isinstance(frame, History) and frame.label is not None):
            self._requests.answer(frame)
            self._send()
        elif isinstance(frame, History):
            self._handle_history(frame)
        elif isinstance(frame, Event):
            self.listener.on_event(frame)
        elif isinstance(frame, Error) and self._requests.refuse(frame, self._clock.seconds()):
            self._send()
        elif not (self._typed and isinstance(frame, Error) and frame.label is None):
            raise ProtocolError(f"an error answers no request: {getattr(frame, 'message', frame)}")

    def _handle_history(self, frame: History) -> None:
        new_log, last = self._cursor.greeted, self.last
        if self._cursor.history(frame):
            self._deliver(last, self.listener.on_history, frame)
        elif frame.entries:
            self._deliver(last, self.listener.on_entries, frame.end.epoch, frame.entries)
        if new_log:
            self._requests.repeat()
            self._send()
            return
        self._greeted()
        self._requests.connect()
        self._send()
        self.listener.on_connect()

    def _deliver(self, last: Id | None, callback: Callable[..., None], *received: Any) -> None:
        """Call the listener with what follows `last`; if it raises, the next connection begins there again."""
        try:
            callback(*received)
        except Exception:
            self._cursor.last = last
            raise

    def _send(self) -> None:
        """Send the requests that may be sent now, and schedule the next attempt."""
        if not self._cursor.greeted or not self.can_send:
            return  # the next connection sends them
        now = self._clock.seconds()
        for text in self._requests.send(now):
            self.transmit(text)
        self._schedule(self._send, self._requests.wait(now))
