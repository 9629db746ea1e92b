"""HTTP on the WebSocket port and on the admin port: what a person, a load balancer or a script asks.

GET /         what this is and how to connect, for a person
GET /healthz  200: the process answers
GET /readyz   200: send clients here; 503 and why not, otherwise
"""

import html
import importlib.resources
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.interfaces import IReactorTime
from twisted.web.http import HTTPChannel, Request
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request as SiteRequest
from twisted.web.server import Site

import chatd

HTTP_SECONDS: Final = 30
"""How long a request may take to come in, and a connection to be idle."""

SERVER: Final = f"chatd/{chatd.__version__}"

_PAGE: Final = importlib.resources.files("chatd").joinpath("static/index.html").read_text("utf-8")

Why = Callable[[], str | None]
"""Answers why this server should get no clients now, or None when it should."""


class _Text(Resource):
    """Answers GET and HEAD with a line of text."""

    def __init__(self, text: Callable[[], tuple[int, str]]) -> None:
        super().__init__()
        self._text = text

    def render_GET(self, request: Request) -> bytes:
        """The text, with its status."""
        code, text = self._text()
        request.setResponseCode(code)
        request.setHeader("content-type", "text/plain; charset=utf-8")
        request.setHeader("cache-control", "no-store")
        return text.encode() + b"\n"


class _Page(Resource):
    """The page at `/`."""

    def render_GET(self, request: SiteRequest) -> bytes:
        """The page, naming the address that it was asked for at."""
        scheme = "wss" if request.isSecure() else "ws"
        host = (request.getHeader(b"host") or b"localhost").decode(errors="replace")
        url = html.escape(f"{scheme}://{host}/")
        request.setHeader("content-type", "text/html; charset=utf-8")
        request.setHeader("content-security-policy", "default-src 'none'; style-src 'unsafe-inline'")
        return _PAGE.replace("{url}", url).replace("{version}", chatd.__version__).encode()


class _Channel(HTTPChannel):
    """An HTTP connection on which each request has one absolute deadline, not one that every byte puts off."""

    transport: Any

    def resetTimeout(self) -> None:
        """Called for each byte that comes in; the time-out set at the request's beginning stands."""

    def allHeadersReceived(self) -> None:
        """A request's head is there: no body is wanted, and none is spooled to the disk."""
        if self.length == 0:
            super().allHeadersReceived()
        else:
            self.transport.write(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.loseConnection()


class ChatSite(Site):
    """The resources, served without a line of log for each health check."""

    noisy = False
    protocol = _Channel  # type: ignore[assignment]  # HTTP/2 is not offered

    def __init__(self, resource: IResource, reactor: IReactorTime) -> None:
        super().__init__(resource, timeout=HTTP_SECONDS, reactor=reactor)

    def startFactory(self) -> None:
        """Start no clock for lines of an access log."""

    def stopFactory(self) -> None:
        """Likewise."""

    def log(self, request: Request) -> None:
        """Log nothing."""


def site(why_not: Why, reactor: IReactorTime, *, page: bool) -> ChatSite:
    """The HTTP side of a port, with the page for people or, on the admin port, without it."""

    def ready() -> tuple[int, str]:
        why = why_not()
        return (503, why) if why else (200, "ready")

    root = Resource()
    root.putChild(b"healthz", _Text(lambda: (200, "ok")))
    root.putChild(b"readyz", _Text(ready))
    root.putChild(b"", _Page() if page else _Text(lambda: (200, "chatd admin: /healthz /readyz")))
    return ChatSite(root, reactor)
