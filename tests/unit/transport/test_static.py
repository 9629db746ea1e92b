"""The files for browsers: whole or compressed, cached, and open to pages of every origin."""

import gzip
import importlib.resources
import pathlib
import re

import pytest
from support.web_doubles import Connection
from twisted.logger import formatEvent

import chatd
from chatd.transport import http
from chatd.transport.static import KINDS, MAX_STYLESHEET, Static, Stylesheet, read_files

FILES = read_files()
VERSIONED = f"/static/{chatd.__version__}/chatd.js".encode()


@pytest.fixture
def connection(clock):
    return Connection(http.site(lambda: (True, "ready"), clock, {"static": Static()}))


def content(name):
    return importlib.resources.files("chatd").joinpath("static", name).read_text("utf-8")


def test_files_that_are_served():
    """All files of chatd/static except the templates and package.json."""
    folder = pathlib.Path(chatd.__file__).parent / "static"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names - FILES.keys() == {"about.html", "index.html", "package.json"}
    assert FILES.keys() >= {"about.css", "about.js", "chatd.d.ts", "chatd.js", "page/boot.js"}
    assert KINDS.keys() == {".css", ".js", ".svg", ".ts"}


@pytest.mark.parametrize("name", [*FILES])
@pytest.mark.parametrize("folder", ["", f"{chatd.__version__}/"])
def test_file_is_served(connection, folder, name):
    """Under the version it may be kept for ever; under the plain name a browser asks each time."""
    response, text = connection.ask(b"GET", f"/static/{folder}{name}".encode())
    assert (response.status, text) == (200, content(name))
    assert response.headers["content-type"] == KINDS[pathlib.PurePath(name).suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["vary"] == "Accept-Encoding"
    assert ("immutable" in response.headers["cache-control"]) == bool(folder)


@pytest.mark.parametrize("name", ["chatd.js", "page/boot.js"])
def test_file_of_another_version(connection, name):
    """A node that is older or newer than the one that served the page has the file, which no browser keeps."""
    response, text = connection.ask(b"GET", f"/static/9.9.9/{name}".encode())
    assert (response.status, text) == (200, content(name))
    assert response.headers["cache-control"] == "public, no-cache"


def raw(connection, *headers):
    """Ask for the library, and return the response with its content in bytes."""
    connection.transport.clear()
    connection.begin(b"GET", VERSIONED, *headers)
    head, _, body = connection.transport.value().partition(b"\r\n\r\n")
    return head.decode(), body


@pytest.mark.parametrize("accepted", [b"gzip", b"br, GZIP;q=0.5", b"deflate,gzip ; q=1"])
def test_file_is_compressed_if_the_client_accepts_it(connection, accepted):
    head, body = raw(connection, b"Accept-Encoding: " + accepted)
    assert gzip.decompress(body).decode() == content("chatd.js")
    assert "Content-Encoding: gzip" in head


@pytest.mark.parametrize("accepted", [b"", b"br", b"gzip;q=0", b"gzip; q=0.00, br", b"x-gzip2"])
def test_file_is_whole_if_the_client_does_not_accept_gzip(connection, accepted):
    head, body = raw(connection, b"Accept-Encoding: " + accepted)
    assert body.decode() == content("chatd.js")
    assert "Content-Encoding" not in head


@pytest.mark.parametrize("accepted", [b"gzip", b"br"])
def test_unchanged_file_is_not_sent_again(connection, accepted):
    """Each content coding has an entity tag of its own."""
    response, _ = connection.ask(b"HEAD", VERSIONED, b"Accept-Encoding: " + accepted)
    tag = response.headers["etag"].encode()
    for known, status in ((tag, 304), (b'"x", ' + tag, 304), (b"W/" + tag, 304), (b'"x"', 200)):
        head, body = raw(connection, b"Accept-Encoding: " + accepted, b"If-None-Match: " + known)
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert (body == b"") == (status == 304)
        assert ("Content-Length" in head) == (status == 200)
    other = b"br" if accepted == b"gzip" else b"gzip"
    head, _ = raw(connection, b"Accept-Encoding: " + other, b"If-None-Match: " + tag)
    assert head.startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "path",
    [
        b"/static",
        b"/static/",
        b"/static/index.html",
        b"/static/about.html",
        b"/static/package.json",
        b"/static/page",
        b"/static/page/",
        b"/static/boot.js",
        b"/static/page/../chatd.js",
        b"/static/page//boot.js",
        b"/static/stylesheet.css",
        b"/static/../messages.py",
        b"/static/9.9.9/boot.js",
        b"/static/9.9.9/9.9.9/chatd.js",
        b"/static/latest/chatd.js",
        b"/static/0123456789abcdef/stylesheet.css",
        b"/static/%2E",
    ],
)
def test_other_files_do_not_exist(connection, path):
    response, _ = connection.ask(b"GET", path)
    assert response.status == 404


@pytest.mark.parametrize("header", [b"Accept-Encoding", b"If-None-Match"])
def test_header_that_is_not_utf_8_is_ignored(connection, header, events):
    response, text = connection.ask(b"GET", VERSIONED, header + b": \xff")
    assert (response.status, text) == (200, content("chatd.js"))
    assert events == []


def test_only_reading_is_allowed(connection):
    response, _ = connection.ask(b"POST", VERSIONED, body=b"")
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")


# The stylesheet of the operator


@pytest.fixture
def stylesheet(tmp_path):
    (tmp_path / "team.css").write_text(":root { --accent: teal }")
    return Stylesheet(tmp_path / "team.css")


@pytest.fixture
def styled(clock, stylesheet):
    """A connection to a server with a stylesheet."""
    return Connection(http.site(lambda: (True, "ready"), clock, {"static": Static(stylesheet)}))


def test_stylesheet_is_served_under_its_hash(styled, stylesheet):
    response, text = styled.ask(b"GET", f"/static/{stylesheet.name}".encode())
    assert (response.status, text) == (200, ":root { --accent: teal }")
    assert response.headers["content-type"] == "text/css; charset=utf-8"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    response, again = styled.ask(b"GET", b"/static/0123456789abcdef/stylesheet.css")
    assert (response.status, again) == (200, text), "that of a node that has read its file at another time"
    assert response.headers["cache-control"] == "public, no-cache"
    for path in (b"/static/stylesheet.css", b"/static/1/stylesheet.css", b"/static/0123456789abcdeg/stylesheet.css"):
        assert styled.ask(b"GET", path)[0].status == 404


def test_stylesheet_is_read_again(styled, stylesheet, tmp_path, events):
    """The new content has a new URL, and the page is composed again."""
    before, changes = stylesheet.name, []
    stylesheet.changed = lambda: changes.append(stylesheet.name)
    (tmp_path / "team.css").write_text(":root { --accent: red }")
    stylesheet.reload()
    assert changes == [stylesheet.name] != [before]
    for name in (before, stylesheet.name):
        response, text = styled.ask(b"GET", f"/static/{name}".encode())
        assert text == ":root { --accent: red }"
        assert ("immutable" in response.headers["cache-control"]) == (name == stylesheet.name)
    assert [event["log_level"].name for event in events] == ["info"]


BAD = {
    "cannot be read (No such file or directory)": None,
    "is not UTF-8": b"\xff",
    "is larger than 256 KiB": b" " * (MAX_STYLESHEET + 1),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_stylesheet(styled, stylesheet, tmp_path, events, reason):
    """It is refused at the start; at SIGHUP the old one stays."""
    file = tmp_path / "team.css"
    file.unlink()
    if BAD[reason] is not None:
        file.write_bytes(BAD[reason])
    stylesheet.reload()
    assert styled.ask(b"GET", f"/static/{stylesheet.name}".encode())[1] == ":root { --accent: teal }"
    (event,) = events
    assert formatEvent(event) == f"the old stylesheet stays: {file} {reason}"
    with pytest.raises(ValueError, match=re.escape(reason)):
        Stylesheet(file)
