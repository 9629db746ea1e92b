"""The page of a room for browsers, and the instructions for people who connect by other means.

GET /, GET /rooms/NAME  the page, which the files of chatd/static/page bring to life; see chatd.transport.api
GET /about              the instructions

The links of both are relative, so a proxy may serve them under a path of its own.  The instructions name the URL of a
room, which the server guesses from the request.  A browser corrects it from its address.
"""

import html
import importlib.resources
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from twisted.web.http import Request

import chatd
from chatd.transport.frames import STANDARD, Vocabulary
from chatd.transport.http import ChatResource
from chatd.transport.static import Static, StaticFile, Stylesheet

HTML: Final = "text/html; charset=utf-8"
TITLE: Final = "chatd"
"""The title of the page by default."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'"
)
"""The Content-Security-Policy: only files of this server, and no script or style in the document.

'self' includes WebSocket connections to the host of the page (CSP Level 3).
"""
REFERRER: Final = "same-origin"
"""The Referrer-Policy: other hosts do not learn from a link in which room it was."""
MAX_PAGES: Final = 256
"""The number of pages that stay in memory, compressed."""
LINK: Final = "<!-- stylesheet -->"
"""The place in the page for the link to the stylesheet of the operator."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def _read(name: str) -> str:
    return importlib.resources.files("chatd").joinpath("static", name).read_text("utf-8")


def fill(template: str, values: Mapping[str, object]) -> bytes:
    """Put values into the places of a template that have their names in braces, as text (HTML, section 13.1.2)."""
    return _PLACEHOLDER.sub(lambda found: html.escape(str(values[found[1]])), template).encode()


class ChatPage:
    """Makes the page and the instructions.

    `login` is the URL at which people get a token, and `claim` the claim of a token with the username; empty: no tokens
    are needed.  With `personal`, the page depends on a cookie.  Without `shown`, the instructions take the place
    of the page.  With `proxied`, a proxy names the host and the scheme that browsers use.
    """

    def __init__(
        self,
        *,
        title: str = TITLE,
        login: str = "",
        claim: str = "",
        personal: bool = False,
        shown: bool = True,
        proxied: bool = False,
        stylesheet: Stylesheet | None = None,
        vocabulary: Vocabulary = STANDARD,
    ) -> None:
        self._page, self._about = _read("index.html"), _read("about.html")
        self._settings = {"title": title, "login": login, "tokens": claim}
        self.personal = personal and shown
        self._shown, self._proxied = shown, proxied
        self.stylesheet, self._vocabulary = stylesheet, vocabulary
        self._make = lru_cache(MAX_PAGES)(self._compose)
        if stylesheet is not None:
            stylesheet.changed = self.refresh
        self.resources = {"static": Static(stylesheet), "about": About(self)}
        """The resources of the web site that belong to the page, by the first part of their path."""

    def refresh(self) -> None:
        """Compose the pages again, because the stylesheet or the vocabulary has changed."""
        self._make.cache_clear()

    def render(self, request: Request, path: str, room: str, username: str | None = None) -> Any:
        """Answer with the page of a room at this path, for the user of the cookie if there is one."""
        if not self._shown:
            return self.render_about(request, path)
        vary = [*request.responseHeaders.getRawHeaders("vary", []), "Accept-Encoding", *(["Cookie"] * self.personal)]
        caching = "private, no-cache" if self.personal else "no-cache"
        return self._send(request, self._make(_root(path), room, username or ""), caching, vary)

    def render_about(self, request: Request, path: str = "/") -> Any:
        """Answer with the instructions, which name the WebSocket URL of the room at this path."""
        host, scheme = _last(request, b"host"), "wss" if request.isSecure() else "ws"
        if self._proxied:
            host = _last(request, b"x-forwarded-host") or host
            scheme = "wss" if _last(request, b"x-forwarded-proto").lower() in ("https", "wss") else scheme
        url = f"{scheme}://{host or 'localhost'}{path}"
        values = {"root": _root(path), "version": chatd.__version__, "url": url}
        return self._send(request, StaticFile.make(fill(self._about, values), HTML), "no-store", ["Accept-Encoding"])

    @staticmethod
    def _send(request: Request, file: StaticFile, caching: str, vary: list[str]) -> Any:
        return file.send(
            request,
            cache_control=caching,
            vary=", ".join(vary),
            content_security_policy=POLICY,
            referrer_policy=REFERRER,
        )

    def _compose(self, root: str, room: str, username: str) -> StaticFile:
        fields = self._vocabulary.message.schema["properties"]
        values = {
            **self._settings,
            "root": root,
            "room": room,
            "username": username,
            "version": chatd.__version__,
            "max_message": fields["message"]["maxLength"],
            "max_username": fields["username"]["maxLength"],
        }
        link = ""
        if self.stylesheet is not None:
            link = f'<link rel="stylesheet" href="{root}static/{self.stylesheet.name}">'
        return StaticFile.make(fill(self._page.replace(LINK, link), values), HTML)


def _root(path: str) -> str:
    """Return the relative URL of the root of the server from a path."""
    return "../" * (path.count("/") - 1)


def _last(request: Request, name: bytes) -> str:
    """Return the last member of a list in a header, which the nearest proxy has added; empty without one."""
    return (request.getHeader(name) or b"").decode(errors="replace").rpartition(",")[2].strip()


class About(ChatResource):
    """The resource /about."""

    def __init__(self, page: ChatPage) -> None:
        super().__init__()
        self._page = page

    def render_GET(self, request: Request) -> Any:
        """Answer with the instructions."""
        return self._page.render_about(request)
