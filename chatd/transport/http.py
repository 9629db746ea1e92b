"""HTTP on the WebSocket port and on the admin port, for people, load balancers and scripts.

GET /         the page of the room main: see chatd.transport.page
GET /about    the instructions for people who connect by other means
GET /healthz  200: the process answers
GET /readyz   200: send clients here; 503 and why not, otherwise
GET /metrics  the metrics for Prometheus (on the admin port)
POST /drain   send all clients elsewhere, and keep running (on the admin port)
/sanctions    bans and mutes (on the admin port, as are /rooms to manage): see chatd.transport.admin
/asyncapi.json, /openapi.json: see chatd.transport.documents
/rooms/...    the rooms over HTTP: see chatd.transport.api
/static/...   the files for browsers: see chatd.transport.static

The admin port refuses every request that a web page may have sent.  Refused requests and WebSocket handshakes
are answered with a problem (RFC 9457).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from io import BytesIO
from types import MappingProxyType
from typing import Any, Final, cast

import orjson
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel, Request
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request as TwistedRequest
from twisted.web.server import Site
from typing_extensions import override
from zope.interface import implementer

import chatd
from chatd.messages import Code
from chatd.transport.admission import HttpError, Rate, check_operator
from chatd.transport.connections import HTTP, buffered
from chatd.transport.deadlines import Deadlines
from chatd.transport.heads import HEAD_END, MAX_HEAD, MAX_HEADERS, Head, check_partial, invalid, parse, too_long
from chatd.transport.intake import Intake
from chatd.transport.limits import Limits, Place
from chatd.transport.tokens import Tokens

HTTP_SECONDS: Final = 75
"""The time in which a request must arrive."""
KEEP_ALIVE_SECONDS: Final = 620
"""The time for which an idle connection is kept after an answer.

Load balancers keep theirs for up to 600 seconds.  One that sends a request on a connection which the server
is about to close answers its client with 502.
"""
RETRY_AFTER_SECONDS: Final = 2
"""The Retry-After of a 503, and the time after which a reader of events reconnects."""

SERVER: Final = f"chatd/{chatd.__version__}"
HTTP_1_1: Final = b"http/1.1"
"""The name of HTTP/1.1 in TLS (ALPN)."""
PROBLEM: Final = "application/problem+json"
"""The media type of problem()."""

HEAD: Final = b"HEAD "
"""The first bytes of a request whose answer has no body."""

TEXT: Final = "text/plain; charset=utf-8"
METRICS: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of the text format of Prometheus."""

Ready = Callable[[], tuple[bool, str]]
"""Returns whether clients should be sent here, and the state in words."""


def problem(status: HTTPStatus, detail: str, code: Code | None = None) -> bytes:
    """Encode a problem (RFC 9457): the status, the reason in one line, and the code that an error frame has."""
    document = {"title": status.phrase, "status": status.value, "detail": detail}
    return orjson.dumps(document | ({"code": code} if code else {})) + b"\n"


def refusal(refused: HttpError, *, bodiless: bool) -> bytes:
    """Compose the answer that refuses a request by its head and closes the connection."""
    status, body = refused.status, problem(refused.status, str(refused), refused.code)
    headers = {
        "Server": SERVER,
        "Connection": "close",
        # A page that is refused may not read why.
        **({} if status == HTTPStatus.FORBIDDEN else {"Access-Control-Allow-Origin": "*"}),
        "Content-Type": PROBLEM,
        "Content-Length": str(len(body)),
        **retry_after(refused),
        **refused.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode() + (b"" if bodiless else body)


def retry_after(refused: HttpError) -> dict[str, str]:
    """Return the Retry-After header of a 503."""
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if refused.status == HTTPStatus.SERVICE_UNAVAILABLE else {}


def answer(request: Request, status: HTTPStatus, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    """Set the head of an answer and return its body; `_` in the name of a header stands for `-`."""
    request.setResponseCode(status.value, status.phrase.encode())
    request.setHeader("server", SERVER)
    if kind:
        request.setHeader("content-type", kind)
    request.setHeader("x-content-type-options", "nosniff")
    request.setHeader("cache-control", "no-store")
    for name, value in headers.items():
        request.setHeader(name.replace("_", "-"), value)
    if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        request.setHeader("content-length", str(len(body)))
    return b"" if request.method == b"HEAD" else body


def header(request: Request, name: bytes) -> str | None:
    """Return a header as it was sent, with all its lines; Twisted would decode it as UTF-8."""
    values = request.requestHeaders.getRawHeaders(name)
    return b", ".join(values).decode("latin-1") if values else None


def begin(request: Request, kind: str) -> bytes:
    """Set the head of an answer of unknown length, and return no body."""
    body = answer(request, HTTPStatus.OK, b"", kind)
    request.responseHeaders.removeHeader(b"content-length")
    return body


def problem_answer(request: Request, refused: HttpError) -> bytes:
    """Set the head of the answer that refuses a request, and return its body."""
    return answer(request, refused.status, problem(refused.status, str(refused), refused.code), PROBLEM)


class ChatResource(Resource):
    """A resource that answers errors with problems."""

    @override
    def getChild(self, path: bytes, request: Request) -> Resource:
        """Return a 404: only children that were put exist."""
        return _Missing()

    @override
    def render(self, request: Request) -> Any:
        """Call render_METHOD, if it exists; HEAD is GET without the body."""
        method = request.method.decode("latin-1")
        render = getattr(self, f"render_{'GET' if method == 'HEAD' else method}", None)
        if render is None:
            there = {"GET": "GET", "HEAD": "GET", "POST": "POST"}
            allowed = [name for name, method in there.items() if hasattr(self, f"render_{method}")]
            status = HTTPStatus.METHOD_NOT_ALLOWED
            return answer(
                request, status, problem(status, f"{method} is not for this"), PROBLEM, allow=", ".join(allowed)
            )
        return render(request)


class _Missing(ChatResource):
    """A path that does not exist."""

    @override
    def render(self, request: Request) -> bytes:
        """Answer with 404."""
        return answer(request, HTTPStatus.NOT_FOUND, problem(HTTPStatus.NOT_FOUND, "there is nothing here"), PROBLEM)


class Text(ChatResource):
    """A resource that is one line of text."""

    def __init__(self, text: Callable[[], tuple[HTTPStatus, str]], kind: str = TEXT) -> None:
        super().__init__()
        self._text = text
        self._kind = kind

    def render_GET(self, request: Request) -> bytes:
        """Answer with the text and its status."""
        status, text = self._text()
        return answer(request, status, text.encode() + b"\n", self._kind)


class Command(ChatResource):
    """A resource that runs an action on POST and answers at once with the state."""

    def __init__(self, act: Callable[[], object], state: Callable[[], str]) -> None:
        super().__init__()
        self._act = act
        self._state = state

    def render_POST(self, request: Request) -> bytes:
        """Run the action, and answer with 202."""
        self._act()
        return answer(request, HTTPStatus.ACCEPTED, self._state().encode() + b"\n", TEXT)


class _SiteRequest(TwistedRequest):
    """A request whose answer has only the headers that a resource sets."""

    defaultContentType = None  # what Twisted takes for none
    channel: "_Channel"

    @override
    def gotLength(self, length: int | None) -> None:
        """Keep the body in memory, which the channel bounds; Twisted would spool one of 100 KB to the disk."""
        self.content = BytesIO()

    @override
    def process(self) -> None:
        self.channel.asked = True
        self.channel.idle = False
        super().process()

    @override
    def _handleStar(self) -> None:
        """Answer OPTIONS for the whole server (RFC 9110, section 9.3.7) with the methods that some path has."""
        self.write(answer(self, HTTPStatus.NO_CONTENT, b"", "", allow="GET, HEAD, OPTIONS, POST"))
        self.finish()


@implementer(IHalfCloseableProtocol)
class _Channel(HTTPChannel):
    """An HTTP connection on which each request has one deadline, which bytes that arrive do not extend.

    A line of this line receiver is a whole head.  Twisted's parser gets the lines of a valid one only.

    The connection handles one request in a reactor turn, and none while answers wait in the transport.  Unless a
    proxy shares the connection between clients, each request that the rate of its address has not allowed costs a
    token, and above the rate the next request waits.
    """

    delimiter = HEAD_END
    MAX_LENGTH = MAX_HEAD
    # Limits of Twisted, which no valid head reaches.
    maxHeaders = MAX_HEADERS
    totalHeadersSize = 4 * MAX_HEAD

    transport: Any
    site: "ChatSite"
    due = 0.0
    """The state that the rate limit keeps of this connection (admission.Paced)."""
    counted = False
    """True if the rate of an address has counted and allowed the current request."""
    _overdue = False
    """True if the next request waits only for the transport."""
    _refused = False
    asked = False
    """True while a request waits for its answer."""
    idle = False
    """True from an answer until the next request begins."""
    endless = False
    """True if the current answer does not end by itself."""
    half_closed = False
    """True if the client has finished sending."""
    when_lost: Callable[[], None] | None = None
    """A function to call when the connection has ended."""
    _place: Place | None = None
    """The place of the address of this connection, if the connection counts there."""
    _stays = True
    """False if the connection closes after its answer."""
    # What connections.Connection has, for an answer that waits in a full transport.
    number = 0
    joined = True
    """False if the connection had all the time for its answer once."""

    @property
    def member(self) -> "_Channel":
        return self

    @property
    def peer(self) -> str:
        """The address of the client, as `HOST:PORT`."""
        address = self.transport.getPeer()
        return f"{address.host}:{address.port}" if hasattr(address, "port") else str(address)

    @property
    def buffered(self) -> int:
        """The number of bytes that the transport holds."""
        return buffered(self.transport)

    def evict(self) -> None:
        """Take note that the client is too slow; there is no way to tell it."""
        self.joined = False

    def abort(self) -> None:
        """Drop the connection."""
        self.transport.abortConnection()

    @override
    def connectionMade(self) -> None:
        """Add the connection to those of the site."""
        super().connectionMade()
        self.site.channels.add(self)
        if not self.site.proxied:
            limits = self.site.intake.limits
            self._place = limits.place(self.transport.getPeer(), None)
            self._stays = limits.keep(self._place)

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Remove the connection from those of the site."""
        super().connectionLost(reason)
        self.site.remove(self)
        self._not_stalled()
        self._leave_place()
        # No cycle of references remains.
        self._requestProducer = None
        when_lost, self.when_lost = self.when_lost, None
        if when_lost is not None:
            when_lost()

    @override
    def pauseProducing(self) -> None:
        """Note that the transport is full, unless an event stream does that for its client."""
        super().pauseProducing()
        if self._requestProducer is None and self.site.stalls is not None:
            self.site.stalls.add(self)

    def _not_stalled(self) -> None:
        if self.site.stalls is not None:
            self.site.stalls.discard(self)

    def _leave_place(self) -> None:
        place, self._place = self._place, None
        self.site.intake.limits.leave(place)

    def begin_stream(self, forwarded: str | None) -> None:
        """Count a reader of events; at a limit raise HttpError, and close the connection after that answer."""
        self._leave_place()
        self._stays = False
        self._place = self.site.intake.limits.enter(self.transport.getPeer(), forwarded)
        self._stays = True

    @override
    def requestDone(self, request: Request) -> None:
        """Wait for the next request after an answer, unless the site is closing."""
        self.asked = False
        self.idle = True
        self._savedTimeOut = KEEP_ALIVE_SECONDS
        if self.site.closing or not self._stays:
            self.persistent = False
        self.paused = True  # LineReceiver keeps the bytes that have arrived
        super().requestDone(request)
        if self.persistent:
            self._wait_for_turn()
        self._close_if_finished()

    def _wait_for_turn(self) -> None:
        """Handle the next request in another turn, or when the rate allows it."""
        intake = self.site.intake
        rate = None if self.site.proxied or self.counted else intake.rate
        self.counted = False
        wait = 0.0 if rate is None else rate.charge(self)
        if not wait and not self._buffer:
            self.paused = False
            return
        self._networkProducer.pauseProducing()
        if wait:
            intake.throttles[HTTP] += 1
            intake.clock.callLater(wait, self._next)
        else:
            intake.turns.wait(self._next)

    def _next(self) -> None:
        """Handle the next request, unless the answers before it wait in the transport."""
        if self not in self.site.channels or self.transport.disconnecting:
            return
        self._overdue = self._waitingForTransport
        if not self._overdue:
            self.paused = False
            self._networkProducer.resumeProducing()
            self.dataReceived(b"")

    @override
    def resumeProducing(self) -> None:
        self._not_stalled()
        self.joined = True
        super().resumeProducing()
        if self.paused:
            self._networkProducer.pauseProducing()
            if self._overdue:
                self._overdue = False
                self.site.intake.turns.wait(self._next)

    @override
    def resetTimeout(self) -> None:
        """Keep the timeout that was set when the request began; Twisted calls this for all bytes that arrive."""

    @override
    def dataReceived(self, data: bytes) -> None:
        """Read bytes; ignore those that arrive after a refusal, as they may under TLS."""
        if self._refused:
            return
        super().dataReceived(data)
        self._close_if_finished()
        if self.idle and (self._buffer or not self.line_mode):
            self.idle = False
            self.setTimeout(HTTP_SECONDS)
        if self.line_mode and HEAD_END not in self._buffer:
            try:
                check_partial(self._buffer)
            except HttpError as refused:
                self._refuse(refused, bodiless=self._buffer.startswith(HEAD))

    @override
    def lineReceived(self, line: bytes) -> None:
        """Read a head."""
        if not line:  # empty lines before a request (RFC 9112, section 2.2)
            return
        try:
            head = parse(line)
        except HttpError as refused:
            self._refuse(refused, bodiless=line.startswith(HEAD))
        else:
            self.head_received(head)

    @override
    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse a head that is too long."""
        self._refuse(too_long(), bodiless=line.startswith(HEAD))

    def head_received(self, head: Head) -> None:
        """Begin a request: a body must have a small Content-Length, because it is kept in memory."""
        try:
            self.site.guard(head)
            if self.site.upgrade is not None and head.asks_for_websocket:
                self._give_back(self.site.upgrade, head)
                return
            _check_plain(head, self.site.intake.vocabulary.max_bytes)
        except HttpError as refused:
            self._refuse(refused, bodiless=head.method == "HEAD")
            return
        for line in head.lines():
            super().lineReceived(line)

    def readConnectionLost(self) -> None:
        """IHalfCloseableProtocol: answer what the client has asked before it finished sending; then close.

        An answer that does not end by itself ends now.
        """
        self.half_closed = True
        if self.endless:
            self.loseConnection()
        self._close_if_finished()

    def _close_if_finished(self) -> None:
        """Close the connection when a client that sends no more has all its answers."""
        pending = self.asked or self._busyReceiving or HEAD_END in self._buffer
        if self.half_closed and not pending:
            self.loseConnection()

    def writeConnectionLost(self) -> None:
        """IHalfCloseableProtocol: the server does not half-close."""

    def _give_back(self, upgrade: Callable[[Any, Head, bytes], None], head: Head) -> None:
        """Let the WebSocket factory continue this connection, which a proxy may have kept for handshakes too."""
        self._refused = True
        self.setTimeout(None)
        cast(Any, self._networkProducer).unregisterProducer()
        self._networkProducer.resumeProducing()  # else it stays paused while answers wait to be sent
        self.site.remove(self)
        self._not_stalled()
        self._leave_place()
        upgrade(self.transport, head, self.clearLineBuffer())

    def _refuse(self, refused: HttpError, *, bodiless: bool) -> None:
        """Refuse a request without reading its body, and close the connection."""
        self._refused = True
        self.site.refused[str(refused.status.value)] += 1
        self.transport.write(refusal(refused, bodiless=bodiless))
        self.loseConnection()


def _check_plain(head: Head, max_body: int) -> None:
    """Raise HttpError unless the site reads this version of HTTP and a body of this length."""
    if head.version not in ("HTTP/1.0", "HTTP/1.1"):
        raise invalid()
    if head.length is None:
        raise HttpError(HTTPStatus.LENGTH_REQUIRED, "say the body's length in Content-Length")
    if head.length > max_body:
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {max_body} bytes")


class ChatSite(Site):
    """The HTTP site, which logs no line for each request."""

    noisy = False
    requestFactory = _SiteRequest
    protocol = _Channel  # type: ignore[assignment]  # HTTP/2 is not offered

    def __init__(
        self,
        resource: IResource,
        reactor: IReactorTime,
        rate: Rate | None = None,
        limits: Limits | None = None,
        *,
        tokens: Tokens | None = None,
        proxied: bool = False,
    ) -> None:
        super().__init__(resource, timeout=HTTP_SECONDS, reactor=reactor, parsePOSTFormSubmission=False)
        self.intake = Intake(reactor, rate, limits, tokens)
        self.proxied = proxied
        """True if one connection may carry the requests of many clients."""
        self.refused: Counter[str] = Counter()
        """The number of requests answered with a problem, by status."""
        self.channels: set[_Channel] = set()
        """The open connections."""
        self.upgrade: Callable[[Any, Head, bytes], None] | None = None
        """Continues a connection that begins a WebSocket handshake after other requests, and the bytes behind it."""
        self.stalls: Deadlines[Any] | None = None
        """Collects the connections whose answer waits in a full transport, if somebody looks after them."""
        self.guard: Callable[[Head], None] = lambda _: None
        """Raises HttpError for a request that may not use this site."""
        self.closing = False
        """True if each connection closes after its answer."""
        self._empty: list[Deferred[None]] = []

    @property
    def asked(self) -> bool:
        """True while a connection waits for an answer."""
        return any(channel.asked for channel in self.channels)

    def close(self) -> "Deferred[None]":
        """Close idle connections now and the others after their answers; fire when none is left."""
        self.closing = True
        for channel in [*self.channels]:
            if not channel.asked:
                channel.loseConnection()
        if not self.channels:
            return succeed(None)
        empty: Deferred[None] = Deferred()
        self._empty.append(empty)
        return empty

    def abort(self) -> None:
        """Drop the remaining connections."""
        for channel in [*self.channels]:
            channel.abort()

    def remove(self, channel: _Channel) -> None:
        """Remove a connection that has ended."""
        self.channels.discard(channel)
        if not self.channels:
            waiting, self._empty = self._empty, []
            for empty in waiting:
                empty.callback(None)

    @override
    def acceptableProtocols(self) -> list[bytes]:
        """IProtocolNegotiationFactory: the protocols under TLS (RFC 7301)."""
        return [HTTP_1_1]

    @override
    def startFactory(self) -> None:
        """Start no timer for an access log."""

    @override
    def stopFactory(self) -> None:
        """Stop no timer: startFactory() started none."""

    @override
    def log(self, request: Request) -> None:
        """Log nothing, and count refused requests."""
        if request.responseHeaders.getRawHeaders("content-type") == [PROBLEM]:
            self.refused[str(request.code)] += 1


def site(
    ready: Ready,
    reactor: IReactorTime,
    resources: Mapping[str, IResource],
    rate: Rate | None = None,
    limits: Limits | None = None,
    *,
    tokens: Tokens | None = None,
    proxied: bool = False,
) -> ChatSite:
    """Make the site of a port: health checks, and these resources by the first part of their path.

    `rate` limits each connection, unless it is `proxied` and may carry the requests of many clients.  `limits` are
    those of new clients.  `tokens` are needed by WebSocket clients, if they are given.
    """

    def readiness() -> tuple[HTTPStatus, str]:
        well, words = ready()
        return HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE, words

    root = ChatResource()
    root.putChild(b"healthz", Text(lambda: (HTTPStatus.OK, "ok")))
    root.putChild(b"readyz", Text(readiness))
    for name, resource in resources.items():
        root.putChild(name.encode(), resource)
    return ChatSite(root, reactor, rate, limits, tokens=tokens, proxied=proxied)


def admin(
    ready: Ready,
    reactor: IReactorTime,
    *,
    drain: Callable[[], object],
    metrics: Callable[[], str],
    resources: Mapping[str, IResource] = MappingProxyType({}),
    check: Callable[[Head], None] = lambda _: None,
    hostname: str = "localhost",
    refused: Counter[str] | None = None,
) -> ChatSite:
    """Make the site of the admin port of the machine with this name, which no web page may use.

    It has these resources too.  `check` raises HttpError for a request that lacks the token of the port.  `refused`
    counts the refused requests by status.
    """
    paths = "GET /healthz /readyz /metrics /rooms /sanctions, POST /drain"
    resources = {
        **resources,
        "": Text(lambda: (HTTPStatus.OK, f"chatd admin: {paths}")),
        "metrics": Text(lambda: (HTTPStatus.OK, metrics()), METRICS),
        "drain": Command(drain, lambda: ready()[1]),
    }
    admin = site(ready, reactor, resources)
    admin.refused = Counter() if refused is None else refused

    def guard(head: Head) -> None:
        check_operator(head.headers, hostname)
        check(head)

    admin.guard = guard
    return admin
