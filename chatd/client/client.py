"""The client for Python people: a reader of a room that loses nothing, whose posts are kept once.

A *client* is chatd.exchange over one connection after another, which Autobahn speaks: when one ends it waits a
moment, connects again with its last id, and says again what has no answer.  So it does in the midst of a connection
when the server says that the log is another: what was kept is void, and what was said may be.

A connection that does not keep the server's promise is given up, and the next one mends what it broke: what is
missing comes, and what came twice does not count.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from autobahn.websocket.types import ConnectingRequest
from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import connectionDone
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger
from twisted.python.failure import Failure

from chatd.client.protocol import (
    WINDOW,
    Ack,
    Assembler,
    Backoff,
    Fault,
    Frame,
    History,
    Message,
    Notice,
    Outbox,
    Posted,
    Rejected,
    Stopped,
    read,
)
from chatd.messages import Entry, Id
from chatd.transport.framing import take_texts

CONNECT_SECONDS: Final = 10
"""How long a connection, and then its handshake, may take."""
SILENCE_SECONDS: Final = 60
"""How long a server may say nothing; it pings more often."""
CLOSE_SECONDS: Final = 5
"""How long it may take to answer a close, or to end the connection after it."""

SUBPROTOCOL: Final = "chat.v1"
NORMAL: Final = 1000
CLIENT_FAULTS: Final = frozenset((1002, 1003, 1007, 1008, 1009))
"""Close codes that say that the client has erred, and would again."""
PASSING: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
"""HTTP statuses that may be others next time; all but these and 101 are final."""

_RETRY_AFTER = re.compile(r"retry_after=(\d+(?:\.\d+)?)")
_SECONDS = re.compile(r"\d{1,6}")
_STATUS = re.compile(r"HTTP/1\.1 (\d\d\d)(?: (.*))?")
_log = Logger()


class ServerAddress(NamedTuple):
    """Where a room is."""

    secure: bool
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """Read `ws://HOST[:PORT][/rooms/NAME][?QUERY]`, or `wss:` for TLS; ValueError for anything else."""
        try:
            scheme, place, path, query, fragment = parts = urlsplit(url)
            port = parts.port
        except ValueError:
            scheme = ""
        if scheme not in ("ws", "wss") or not re.fullmatch(r"[!-~]+", url) or not parts.hostname:
            raise ValueError(f"{url!r} is no URL such as ws://localhost:8085/rooms/main")
        if "@" in place or fragment:
            raise ValueError(f"{url!r} must have neither a user nor a fragment")
        secure = scheme == "wss"
        return cls(secure, parts.hostname, port or (443 if secure else 80), path or "/", query)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.secure else 'ws'}://{host}:{self.port}{self.path}"

    def resource(self, last: Id | None) -> str:
        """What to ask for, with the last id that the client has."""
        pairs = [pair for pair in parse_qsl(self.query) if last is None or pair[0] != "last_event_id"]
        if last is not None:
            pairs.append(("last_event_id", str(last)))
        return f"{self.path}?{urlencode(pairs)}" if pairs else self.path

    def endpoint(self, reactor: Any) -> IStreamClientEndpoint:
        """How to get there; by TLS, trusting whom the machine trusts, or OpenSSL's SSL_CERT_FILE."""
        endpoint: IStreamClientEndpoint = HostnameEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        return wrapClientTLS(optionsForClientTLS(self.host), endpoint) if self.secure else endpoint


class Listener:
    """Who uses a client is told of what comes; nothing need be overridden."""

    def begun(self, history: History) -> None:
        """A fresh start: these messages, in place of all that was kept."""

    def appended(self, epoch: str, entries: Sequence[Entry]) -> None:
        """The messages after the last."""

    def told(self, notice: Notice) -> None:
        """Presence or typing, which the query of the URL asks for."""

    def joined(self) -> None:
        """A connection is there, and what it begins with was told."""

    def faulted(self, fault: Fault) -> None:
        """The server did not keep its promise; the client will connect again."""

    def lost(self, reason: str, wait: float) -> None:
        """There is no connection; in so many seconds another will be tried."""

    def refused(self, reason: Rejected) -> None:
        """There is none, and none will be tried: the server will not have this client."""


class Client:
    """A member of the room at an address, over as many connections as it takes; begins with `start`.

    `last` is the last id of an earlier client, to go on from there.  `decode` reads frames; many clients in one
    process may share one that remembers.  ValueError for what Address.parse does not read.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        address: ServerAddress | str,
        listener: Listener,
        *,
        last: Id | None = None,
        window: int = WINDOW,
        backoff: Backoff | None = None,
        endpoint: IStreamClientEndpoint | None = None,
        decode: Callable[[bytes], Frame] = read,
    ) -> None:
        self.address = ServerAddress.parse(address) if isinstance(address, str) else address
        self.decode = decode
        self._reactor = reactor
        self._listener = listener
        self._assembler = Assembler(last)
        self._outbox = Outbox(window)
        self._backoff = backoff or Backoff()
        self._endpoint = endpoint or self.address.endpoint(reactor)
        self._factory = _Factory(self, reactor)
        self._attempt: Deferred[Any] | None = None
        self._connection: _Connection | None = None
        self._timers: dict[Callable[[], None], IDelayedCall] = {}
        self._gone: Deferred[None] = Deferred()
        self._ended: Exception | None = None
        """Why there is to be no other connection."""
        self.server: str | None = None
        """What the server calls itself that it is connected to, or was last, such as `chatd/1.0.0`."""

    @property
    def last(self) -> Id | None:
        """The id of the last message that the listener was told of, or of the empty room."""
        return self._assembler.last

    # What its user does

    def start(self) -> None:
        """Connect."""
        self._assembler.connect()
        self._attempt = self._endpoint.connect(self._factory)
        self._attempt.addErrback(self._failed)

    def post(self, username: str, message: str) -> "Deferred[Posted]":
        """Post, however long it takes: fires when the message is in the log.

        Fails with Refused if the server will never have it, and with Stopped.
        """
        return self._say({"username": username, "message": message})

    def page(self, *, before: Id | None = None, after: Id | None = None, limit: int = 50) -> "Deferred[History]":
        """Read the log: the newest messages, or those before or after one, but not both; fails as `post` does."""
        asked = {name: str(place) for name, place in (("before", before), ("after", after)) if place is not None}
        return self._say({"type": "history", **asked, "limit": limit})

    def cut(self) -> bool:
        """Lose the connection, as on a bad network; what is lost by it comes again.  Answers whether there was one."""
        if self._connection is None:
            return False
        self._connection.abort()
        return True

    def stop(self) -> "Deferred[None]":
        """Go: fires when there is no connection; what has no answer fails with Stopped."""
        if self._ended is None:
            self._ended = Stopped("the client was stopped")
            self._outbox.fail(self._ended)
        if self._connection is not None:
            self._connection.leave()
        elif not self._gone.called:
            self._set(self.start, None)
            if self._attempt is not None:
                self._attempt.cancel()
            self._gone.callback(None)
        return self._gone

    # What its connections do

    def opened(self, connection: "_Connection") -> None:
        """A connection is there, as yet without a handshake."""
        self._attempt = None
        self._connection = connection

    def take(self, text: bytes) -> bool:
        """A text has come; answers whether the connection is still of use."""
        try:
            self._take(self.decode(text))
        except Fault as fault:
            _log.warn("{address}: {fault}", address=self.address, fault=fault)
            self._listener.faulted(fault)
            return False
        return True

    def closed(self, reason: str, retry_after: float | None) -> None:
        """The connection is gone."""
        self._connection = None
        self._set(self._send, None)
        if self._ended is None:
            self._again(reason, retry_after)
        else:
            self._gone.callback(None)

    def denied(self, refused: Rejected) -> None:
        """The connection is gone, and no other one would fare better."""
        first = self._ended is None
        self._ended = self._ended or refused
        self.closed(str(refused), None)
        if first:
            self._outbox.fail(refused)
            self._listener.refused(refused)

    def _failed(self, failure: Failure) -> None:
        """There was no connection to be had."""
        self._attempt = None
        if self._ended is None:
            error = getattr(failure.value, "osError", None)
            self._again(os.strerror(error).lower() if error else failure.getErrorMessage().rstrip("."), None)

    def _again(self, reason: str, retry_after: float | None) -> None:
        wait = self._backoff.next(retry_after)
        self._set(self.start, wait)
        self._listener.lost(reason, wait)

    def _take(self, frame: Frame) -> None:
        if isinstance(frame, Message):
            self._assembler.message(frame)
            self._listener.appended(frame.epoch, (frame.entry,))
        elif isinstance(frame, Ack) or (isinstance(frame, History) and frame.label is not None):
            self._outbox.answered(frame)
            self._send()
        elif isinstance(frame, History):
            self._begin(frame)
        elif isinstance(frame, Notice):
            self._listener.told(frame)
        elif self._outbox.refused(frame, self._reactor.seconds()):
            self._send()
        else:
            raise Fault(f"an error came for what was not said: {frame.message}")

    def _begin(self, frame: History) -> None:
        anew = self._assembler.greeted
        if self._assembler.history(frame):
            self._listener.begun(frame)
        elif frame.entries:
            self._listener.appended(frame.end.epoch, frame.entries)
        if anew:
            self._outbox.repeat()
            self._send()
            return
        self._backoff.reset()
        self._outbox.connect()
        self._send()
        self._listener.joined()

    def _say(self, document: dict[str, Any]) -> "Deferred[Any]":
        if self._ended is not None:
            return fail(self._ended)
        answer = self._outbox.add(document)
        self._send()
        return answer

    def _send(self) -> None:
        """Say what can be said by now, and look again when more can."""
        if self._connection is None or not self._connection.speaks or not self._assembler.greeted:
            return  # the next connection will say it
        now = self._reactor.seconds()
        for text in self._outbox.send(now):
            self._connection.sendMessage(text)
        self._set(self._send, self._outbox.wait(now))

    def _set(self, call: Callable[[], None], seconds: float | None) -> None:
        """Have something done in so many seconds and not before; None: not at all."""
        timer = self._timers.pop(call, None)
        if timer is not None and timer.active():
            timer.cancel()
        if seconds is not None:
            self._timers[call] = self._reactor.callLater(seconds, call)


class _Factory(WebSocketClientFactory):
    """Makes a client's connections."""

    noisy = False

    def __init__(self, client: Client, reactor: IReactorTime) -> None:
        super().__init__(str(client.address), protocols=[SUBPROTOCOL], reactor=reactor)
        self.client = client
        self.protocol = _Connection
        # Autobahn's own timers follow a clock that is the whole process's.
        self.setProtocolOptions(openHandshakeTimeout=0, closeHandshakeTimeout=0, serverConnectionDropTimeout=0)
        self.options = {name: getattr(self, name) for name in WebSocketClientProtocol.CONFIG_ATTRS}


class _Connection(WebSocketClientProtocol):
    """One of a client's connections; whole text frames, which nearly all are, are read here, the others by Autobahn."""

    CONFIG_ATTRS: list[str] = []  # noqa: RUF012 -- none, since Autobahn would describe each at length for nobody
    factory: _Factory
    transport: Any  # Twisted's have much that ITransport does not name
    status = 0
    """Of the answer that refused the handshake."""
    retry_after: float | None = None
    why = ""
    """It is gone, as far as that was said."""

    def connectionMade(self) -> None:
        """The server is there."""
        vars(self).update(self.factory.options)
        self.client = self.factory.client
        self._reactor = self.factory.reactor
        self._heard = self._reactor.seconds()
        self._deadline = self._reactor.callLater(CONNECT_SECONDS, self._late)
        self._patience: float = CONNECT_SECONDS
        self.client.opened(self)
        super().connectionMade()

    def startHandshake(self) -> None:
        """Ask for the room, and for what was missed."""
        address = self.client.address
        host = f"[{address.host}]" if ":" in address.host else address.host
        resource = address.resource(self.client.last)
        self._actuallyStartHandshake(ConnectingRequest(host, address.port, resource, protocols=self.factory.protocols))

    def failHandshake(self, reason: str) -> None:
        """The server refused."""
        status = _STATUS.match(self.http_status_line)
        if status and status[1] != "101":
            self.status = int(status[1])
            reason = f"refused with {status[1]} {status[2] or ''}".rstrip()
        said = self.http_headers.get("retry-after", "")
        self.retry_after = float(said) if _SECONDS.fullmatch(said) else None
        self.abort(reason)

    def onOpen(self) -> None:
        """The handshake is done."""
        self.client.server = self.http_headers.get("server")
        self._expect(SILENCE_SECONDS)

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come: take the short way with those that it is for."""
        self._heard = self._reactor.seconds()
        if self.state == self.STATE_CONNECTING or self.inside_message or self.current_frame is not None:
            self._dataReceived(data)
            return
        if self.data:
            data = self.data + data
        texts, rest, more = take_texts(data)
        self.data = data[rest:]
        for text in texts:
            self.onMessage(text, isBinary=False)
        if self.data and not more:
            self.consumeData()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """A whole message has come."""
        if self.state == self.STATE_OPEN and not self.client.take(payload):
            self.abort("the server did not keep its promise")

    def sendCloseFrame(self, code: int | None = None, reasonUtf8: bytes | None = None, isReply: bool = False) -> None:
        """Whoever began it, the other end is to do the rest soon."""
        super().sendCloseFrame(code, reasonUtf8, isReply)
        self._expect(CLOSE_SECONDS)

    @property
    def speaks(self) -> bool:
        """Whether it is open, and not closing."""
        return bool(self.state == self.STATE_OPEN)

    def leave(self) -> None:
        """Begin to close, if it was ever open."""
        if self.state == self.STATE_CONNECTING:
            self.abort()
        else:
            self.sendClose(NORMAL)

    def abort(self, reason: str = "it was cut off") -> None:
        """End it without any handshake."""
        self.why = reason
        self.wasClean = True  # it was meant, and is nothing that Autobahn should warn of
        self.dropConnection(abort=True)

    def _expect(self, seconds: float) -> None:
        """Give up if nothing is heard for so long."""
        self._patience = seconds
        self._deadline.reset(seconds)

    def _late(self) -> None:
        left = self._heard + self._patience - self._reactor.seconds()
        if left > 0 and self.state == self.STATE_OPEN:
            self._deadline = self._reactor.callLater(left, self._late)
        else:
            self.abort("the server did not answer in time")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The transport is gone: Autobahn's adapter, without the lines for debugging that it composes."""
        if self._deadline.active():
            self._deadline.cancel()
        self._connectionLost(reason)

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        """The connection is gone."""
        code, said = self.remoteCloseCode, self.remoteCloseReason or ""
        if code is not None:
            self.why = f"closed with {code} {said}".rstrip()
        found = _RETRY_AFTER.search(said)
        if found:
            self.retry_after = float(found[1])
        why = self.why or self.wasNotCleanReason or "closed without a code"
        if code in CLIENT_FAULTS or (self.status and self.status not in PASSING):
            self.client.denied(Rejected(why, code or self.status))
        else:
            self.client.closed(why, self.retry_after)
