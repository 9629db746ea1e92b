"""The files for browsers: those of chatd/static, and the stylesheet of the operator.

GET /static/VERSION/NAME         the file of this version of chatd, which a browser may keep for ever
GET /static/NAME                 the same file; a browser asks each time whether it has changed
GET /static/HASH/stylesheet.css  the stylesheet of the operator with this hash, which a browser may keep for ever

NAME may be in a folder, as page/page.js is.  Pages of every origin may read the files.  They are small, so they stay in
memory, as they are and compressed.

While nodes are replaced one by one, one node may serve a page and another get the requests for its files.  Another
version or hash than that of this node is answered as the plain name is.
"""

import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from twisted.logger import Logger
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET

import chatd
from chatd.transport.http import PROBLEM, ChatResource, answer, header, problem

KINDS: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".ts": "text/plain; charset=utf-8",
}
"""The media types of the files that are served, by the end of their names."""
IMMUTABLE: Final = "public, max-age=31536000, immutable"
"""The Cache-Control of a file under its version (RFC 8246)."""
REVALIDATE: Final = "public, no-cache"
"""The Cache-Control of a file under its plain name: a browser keeps it, and asks each time whether it has changed."""
STYLESHEET: Final = "stylesheet.css"
"""The name of the stylesheet of the operator."""
MAX_STYLESHEET: Final = 256 << 10
"""The largest size of that stylesheet in bytes, because it stays in memory."""

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!]{0,63}")
_HASH = re.compile(r"[0-9a-f]{16}")
_TAG = re.compile(r'"[^"]*"')
"""An entity tag; whether it is weak makes no difference in If-None-Match (RFC 9110, section 13.1.2)."""
_logger = Logger()


class StaticFile(NamedTuple):
    """A content that stays in memory."""

    kind: str
    """The media type."""
    hash: str
    bodies: dict[str, tuple[str, bytes]]
    """The entity tag and the content by the content coding, which is empty or gzip."""

    @classmethod
    def make(cls, content: bytes, kind: str) -> "StaticFile":
        """Compress a content, and hash it."""
        tag = hashlib.sha256(content).hexdigest()[:16]
        compressed = gzip.compress(content, 9, mtime=0)
        return cls(kind, tag, {"": (f'"{tag}"', content), "gzip": (f'"{tag}-gzip"', compressed)})

    def send(self, request: Request, **headers: str) -> Any:
        """Answer with the content, or with 304 if the client has it; `headers` are as in answer()."""
        coding = "gzip" if _accepts_gzip(header(request, b"accept-encoding") or "") else ""
        tag, body = self.bodies[coding]
        if coding:
            request.setHeader("content-encoding", coding)
        headers = {"vary": "Accept-Encoding", **headers, "etag": tag}
        if tag not in _TAG.findall(header(request, b"if-none-match") or ""):
            return answer(request, HTTPStatus.OK, body, self.kind, **headers)
        answer(request, HTTPStatus.NOT_MODIFIED, b"", self.kind, **headers)
        request.finish()  # Twisted would add the length of the content, which a 304 leaves out
        return NOT_DONE_YET


def _accepts_gzip(accepted: str) -> bool:
    """Return whether an Accept-Encoding allows gzip (RFC 9110, section 12.5.3)."""
    for member in accepted.split(","):
        coding, _, weight = member.partition(";")
        if coding.strip().lower() == "gzip":
            return re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) is None
    return False


@cache
def read_files() -> Mapping[str, StaticFile]:
    """Return the files that are served, by their names in chatd/static; compress them once in a process."""
    return dict(_files(importlib.resources.files("chatd").joinpath("static"), ""))


def _files(folder: Traversable, place: str) -> Iterator[tuple[str, StaticFile]]:
    for entry in folder.iterdir():
        kind = KINDS.get(PurePosixPath(entry.name).suffix)
        if entry.is_dir():
            yield from _files(entry, f"{place}{entry.name}/")
        elif kind is not None:
            yield f"{place}{entry.name}", StaticFile.make(entry.read_bytes(), kind)


def read_stylesheet(path: Path) -> StaticFile:
    """Read the stylesheet of the operator; raise ValueError with one line if it cannot be served."""
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    if len(content) > MAX_STYLESHEET:
        raise ValueError(f"{path} is larger than {MAX_STYLESHEET >> 10} KiB")
    return StaticFile.make(content, KINDS[".css"])


class Stylesheet:
    """The stylesheet of the operator.  The constructor raises ValueError.

    It calls `changed` whenever the stylesheet changes.
    """

    def __init__(self, path: Path, changed: Callable[[], object] = lambda: None) -> None:
        self._path = path
        self.changed = changed
        self.file = read_stylesheet(path)

    @property
    def name(self) -> str:
        """The path of the file below /static, which differs for each content."""
        return f"{self.file.hash}/{STYLESHEET}"

    def reload(self) -> None:
        """Read the file again; if that fails, the old stylesheet stays."""
        try:
            self.file = read_stylesheet(self._path)
        except ValueError as error:
            _logger.error("the old stylesheet stays: {reason}", reason=error)  # noqa: TRY400 -- the line says it all
            return
        self.changed()
        _logger.info("read the stylesheet in {path}", path=self._path)


class Static(ChatResource):
    """The resource /static."""

    isLeaf = True

    def __init__(self, stylesheet: Stylesheet | None = None) -> None:
        super().__init__()
        self._files = read_files()
        self._stylesheet = stylesheet

    def render_GET(self, request: Request) -> Any:
        """Answer with a file, or with 304 if the client has it."""
        request.setHeader("access-control-allow-origin", "*")
        path = "/".join(part.decode("latin-1") for part in request.postpath or ())  # type: ignore[attr-defined]
        file, version = self._find(path)
        if file is None:
            status = HTTPStatus.NOT_FOUND
            return answer(request, status, problem(status, "there is no such file"), PROBLEM)
        return file.send(request, cache_control=IMMUTABLE if path.startswith(f"{version}/") else REVALIDATE)

    def _find(self, path: str) -> tuple[StaticFile | None, str]:
        """Return the file at a path, and the version or hash under which a browser may keep it for ever."""
        folder, _, name = path.partition("/")
        if name == STYLESHEET and _HASH.fullmatch(folder) and self._stylesheet is not None:
            return self._stylesheet.file, self._stylesheet.file.hash
        return self._files.get(name if _VERSION.fullmatch(folder) else path), chatd.__version__
