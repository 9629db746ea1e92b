"""The files of chatd/static for browsers: chatd.js and its types.

GET /static/VERSION/NAME  the file of this version of chatd, which a browser may keep for ever
GET /static/NAME          the same file; a browser asks each time whether it has changed

Pages of every origin may read them.  The files are small, so they stay in memory, as they are and compressed.
"""

import gzip
import hashlib
import importlib.resources
import re
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET

import chatd
from chatd.transport.http import PROBLEM, ChatResource, answer, problem

FILES: Final = {"chatd.js": "text/javascript; charset=utf-8", "chatd.d.ts": "text/plain; charset=utf-8"}
"""The files that are served, with their media types."""
IMMUTABLE: Final = "public, max-age=31536000, immutable"
"""The Cache-Control of a file under its version (RFC 8246)."""
REVALIDATE: Final = "public, no-cache"
"""The Cache-Control of a file under its plain name: a browser keeps it, and asks each time whether it has changed."""


class _File(NamedTuple):
    kind: str
    bodies: dict[str, tuple[str, bytes]]
    """The entity tag and the content by the content coding, which is empty or gzip."""


def _read(name: str, kind: str) -> _File:
    plain = importlib.resources.files("chatd").joinpath("static", name).read_bytes()
    tag = hashlib.sha256(plain).hexdigest()[:16]
    compressed = gzip.compress(plain, 9, mtime=0)
    return _File(kind, {"": (f'"{tag}"', plain), "gzip": (f'"{tag}-gzip"', compressed)})


def _accepts_gzip(header: str) -> bool:
    """Return whether an Accept-Encoding allows gzip (RFC 9110, section 12.5.3)."""
    for member in header.split(","):
        coding, _, weight = member.partition(";")
        if coding.strip().lower() == "gzip":
            return re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) is None
    return False


class Static(ChatResource):
    """The resource /static."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self._files = {name: _read(name, kind) for name, kind in FILES.items()}

    def render_GET(self, request: Request) -> Any:
        """Answer with a file, or with 304 if the client has it."""
        *folders, name = [part.decode("latin-1") for part in request.postpath or [b""]]  # type: ignore[attr-defined]
        file = self._files.get(name)
        request.setHeader("access-control-allow-origin", "*")
        if file is None or folders not in ([], [chatd.__version__]):
            status = HTTPStatus.NOT_FOUND
            return answer(request, status, problem(status, "there is no such file"), PROBLEM)
        coding = "gzip" if _accepts_gzip(request.getHeader("accept-encoding") or "") else ""
        tag, body = file.bodies[coding]
        if coding:
            request.setHeader("content-encoding", coding)
        headers = {"cache_control": IMMUTABLE if folders else REVALIDATE, "etag": tag, "vary": "Accept-Encoding"}
        if tag not in re.split(r"\s*,\s*", request.getHeader("if-none-match") or ""):
            return answer(request, HTTPStatus.OK, body, file.kind, **headers)
        answer(request, HTTPStatus.NOT_MODIFIED, b"", file.kind, **headers)
        request.finish()  # Twisted would add the length of the content, which a 304 leaves out
        return NOT_DONE_YET
