"""HTTP on the WebSocket port and on the admin port: what a person, a load balancer or a script asks.

GET /         what this is and how to connect, for a person
GET /healthz  200: the process answers
GET /readyz   200: send clients here; 503 and why not, otherwise
GET /metrics  what chatd.metrics tells Prometheus (on the admin port)
POST /drain   send all clients elsewhere, and stay (on the admin port)
/rooms/...    the rooms, for those who have no WebSocket: see chatd.api

What is refused is refused with a problem (RFC 9457), here and at the WebSocket handshake.
"""

import html
import importlib.resources
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, cast

import orjson
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel, Request
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request as SiteRequest
from twisted.web.server import Site

import chatd
from chatd.messages import Code

HTTP_SECONDS: Final = 75
"""How long a request may take to come in, and a connection to be idle: longer than a load balancer keeps it."""
MAX_BODY: Final = 16 << 10
"""Bytes of a request's body: what a WebSocket message may have."""

RETRY_AFTER_SECONDS: Final = 2
"""When to try again a server whose log is down, and how long a reader of events waits before it comes back."""

SERVER: Final = f"chatd/{chatd.__version__}"
HTTP_1_1: Final = b"http/1.1"
"""By its name in TLS."""
PROBLEM: Final = "application/problem+json"
"""The media type of what problem() answers."""

TEXT: Final = "text/plain; charset=utf-8"
METRICS: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of Prometheus's text."""

_PAGE: Final = importlib.resources.files("chatd").joinpath("static/index.html").read_text("utf-8")

Ready = Callable[[], tuple[bool, str]]
"""Answers whether clients should be sent here, and how it is, in words."""


def problem(status: HTTPStatus, detail: str, code: Code | None = None) -> bytes:
    """A problem's details (RFC 9457): the status, one line that says why, and the code that a frame would have."""
    document = {"title": status.phrase, "status": status.value, "detail": detail}
    return orjson.dumps(document | ({"code": code} if code else {})) + b"\n"


def answer(request: Request, status: HTTPStatus, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    """Prepare an answer, and give its body; of a header's name, `_` stands for `-`."""
    request.setResponseCode(status.value, status.phrase.encode())
    request.setHeader("server", SERVER)
    if kind:
        request.setHeader("content-type", kind)
    request.setHeader("x-content-type-options", "nosniff")
    request.setHeader("cache-control", "no-store")
    for name, value in headers.items():
        request.setHeader(name.replace("_", "-"), value)
    if status != HTTPStatus.NO_CONTENT:
        request.setHeader("content-length", str(len(body)))
    return b"" if request.method == b"HEAD" else body


class ChatResource(Resource):
    """A resource whose refusals are problems."""

    def getChild(self, path: bytes, request: Request) -> Resource:
        """Nothing is below it that was not put there."""
        return _Missing()

    def render(self, request: Request) -> Any:
        """Call render_METHOD, if there is one; HEAD is as GET, without the body."""
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
    """What is not there."""

    def render(self, request: Request) -> bytes:
        """404."""
        return answer(request, HTTPStatus.NOT_FOUND, problem(HTTPStatus.NOT_FOUND, "there is nothing here"), PROBLEM)


class Text(ChatResource):
    """Answers GET and HEAD with a line of text."""

    def __init__(self, text: Callable[[], tuple[HTTPStatus, str]], kind: str = TEXT) -> None:
        super().__init__()
        self._text = text
        self._kind = kind

    def render_GET(self, request: Request) -> bytes:
        """The text, with its status."""
        status, text = self._text()
        return answer(request, status, text.encode() + b"\n", self._kind)


class Command(ChatResource):
    """Does something for who posts to it, and says at once how it stands."""

    def __init__(self, act: Callable[[], object], state: Callable[[], str]) -> None:
        super().__init__()
        self._act = act
        self._state = state

    def render_POST(self, request: Request) -> bytes:
        """Do it; 202."""
        self._act()
        return answer(request, HTTPStatus.ACCEPTED, self._state().encode() + b"\n", TEXT)


def page(request: Request, path: str) -> bytes:
    """The page for people, naming the address of a room on the host that it was asked for at."""
    scheme = "wss" if request.isSecure() else "ws"
    host = (request.getHeader(b"host") or b"localhost").decode(errors="replace")
    url = html.escape(f"{scheme}://{host}{path}")
    body = _PAGE.replace("{url}", url).replace("{version}", chatd.__version__).encode()
    # The page's example connects by WebSocket to this host, which 'self' includes (CSP Level 3).
    policy = "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'"
    return answer(request, HTTPStatus.OK, body, "text/html; charset=utf-8", content_security_policy=policy)


class _Request(SiteRequest):
    """A request whose answer has just the headers that it is given."""

    defaultContentType = None  # what Twisted takes for none
    channel: "_Channel"

    def process(self) -> None:
        """The whole request is there."""
        self.channel.asked = True
        super().process()


class _Channel(HTTPChannel):
    """An HTTP connection on which each request has one absolute deadline, not one that every byte puts off."""

    transport: Any
    site: "ChatSite"
    _refused = False
    asked = False
    """Whether a request is being answered."""
    when_lost: Callable[[], None] | None = None
    """To be called when the connection is gone."""

    def connectionMade(self) -> None:
        """A connection is there."""
        super().connectionMade()
        self.site.channels.add(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        super().connectionLost(reason)
        self.site.gone(self)
        if self.when_lost is not None:
            self.when_lost()

    def requestDone(self, request: Request) -> None:
        """A request was answered: wait for the next, unless there is to be none."""
        self.asked = False
        if self.site.closing:
            self.persistent = False
        super().requestDone(request)

    def resetTimeout(self) -> None:
        """Called for each byte that comes in; the time-out set at the request's beginning stands."""

    def dataReceived(self, data: bytes) -> None:
        """Bytes have come; those that come after a refusal, as they may under TLS, are passed over."""
        if not self._refused:
            super().dataReceived(data)

    def _respondToBadRequestAndDisconnect(self) -> None:
        """Twisted found a request not to be HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, "this is no HTTP request")

    def allHeadersReceived(self) -> None:
        """A request's head is there: a body must be announced, and be small, for none is spooled to the disk."""
        if self.site.upgrade is not None and self._is_upgrade():
            self._give_back(self.site.upgrade)
        elif self.length is None:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "say the body's length in Content-Length")
        elif self.length > MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {MAX_BODY} bytes")
        else:
            super().allHeadersReceived()

    def allContentReceived(self) -> None:
        """A whole request is there."""
        if not self._refused:
            super().allContentReceived()

    def _is_upgrade(self) -> bool:
        """Whether the request asks for a WebSocket, as it may on a connection that a proxy has kept."""
        wanted = self.requests[-1].requestHeaders.getRawHeaders(b"upgrade", [])
        return any(b"websocket" in value.lower() for value in wanted)

    def _give_back(self, upgrade: Callable[[Any, bytes], None]) -> None:
        """Let the WebSocket side have this connection, with the request as it came."""
        headers = self.requests[-1].requestHeaders.getAllRawHeaders()
        lines = [b"%b: %b\r\n" % (name, value) for name, values in headers for value in values]
        head = b"%b %b %b\r\n%b\r\n" % (self._command, self._path, self._version, b"".join(lines))
        self._refused = True
        self.setTimeout(None)
        cast(Any, self._networkProducer).unregisterProducer()
        self._networkProducer.resumeProducing()  # nobody else would, if its answers are not out yet
        self.site.gone(self)
        upgrade(self.transport, head + self.clearLineBuffer())

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Refuse a request whose body is not read, and so end the connection."""
        body = problem(status, detail)
        self._refused = True
        self.site.refused[str(status.value)] += 1
        self.transport.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nServer: {SERVER}\r\nConnection: close\r\n"
            "Access-Control-Allow-Origin: *\r\n"
            f"Content-Type: {PROBLEM}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        self.loseConnection()


class ChatSite(Site):
    """The resources, served without a line of log for each health check."""

    noisy = False
    requestFactory = _Request
    protocol = _Channel  # type: ignore[assignment]  # HTTP/2 is not offered

    def __init__(self, resource: IResource, reactor: IReactorTime) -> None:
        super().__init__(resource, timeout=HTTP_SECONDS, reactor=reactor, parsePOSTFormSubmission=False)
        self.refused: Counter[str] = Counter()
        """How many requests were answered with a problem, by status."""
        self.channels: set[_Channel] = set()
        """The connections."""
        self.upgrade: Callable[[Any, bytes], None] | None = None
        """Takes a connection that asks for a WebSocket after other requests, and the bytes that it begins with."""
        self.closing = False
        """Whether each is to be closed when it was answered."""
        self._empty: list[Deferred[None]] = []

    @property
    def asked(self) -> bool:
        """Whether any connection waits for an answer."""
        return any(channel.asked for channel in self.channels)

    def close(self) -> "Deferred[None]":
        """Close the connections, but each that has asked for something with its answer; fires when none is left."""
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
        """Drop the connections that are left."""
        for channel in [*self.channels]:
            channel.transport.abortConnection()

    def gone(self, channel: _Channel) -> None:
        """A connection is gone."""
        self.channels.discard(channel)
        if not self.channels:
            waiting, self._empty = self._empty, []
            for empty in waiting:
                empty.callback(None)

    def acceptableProtocols(self) -> list[bytes]:
        """IProtocolNegotiationFactory: what is spoken under TLS (RFC 7301)."""
        return [HTTP_1_1]

    def startFactory(self) -> None:
        """Start no clock for lines of an access log."""

    def stopFactory(self) -> None:
        """Likewise."""

    def log(self, request: Request) -> None:
        """Log nothing, and count what was refused."""
        if request.responseHeaders.getRawHeaders("content-type") == [PROBLEM]:
            self.refused[str(request.code)] += 1


def site(ready: Ready, reactor: IReactorTime, resources: Mapping[str, IResource]) -> ChatSite:
    """The HTTP side of a port: health, and these resources by the first part of their path."""

    def readiness() -> tuple[HTTPStatus, str]:
        well, words = ready()
        return HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE, words

    root = ChatResource()
    root.putChild(b"healthz", Text(lambda: (HTTPStatus.OK, "ok")))
    root.putChild(b"readyz", Text(readiness))
    for name, resource in resources.items():
        root.putChild(name.encode(), resource)
    return ChatSite(root, reactor)


def admin(ready: Ready, reactor: IReactorTime, *, drain: Callable[[], object], metrics: Callable[[], str]) -> ChatSite:
    """The HTTP side of the admin port."""
    resources = {
        "": Text(lambda: (HTTPStatus.OK, "chatd admin: GET /healthz /readyz /metrics, POST /drain")),
        "metrics": Text(lambda: (HTTPStatus.OK, metrics()), METRICS),
        "drain": Command(drain, lambda: ready()[1]),
    }
    return site(ready, reactor, resources)
