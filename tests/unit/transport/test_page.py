"""The page of a room, and the instructions: what they are made of, their headers, and whom they name."""

import gzip
import html
import json
import re
from html.parser import HTMLParser

import pytest
from support.houses import House
from support.operator_schemas import schema_with
from support.tokens import HeldKeys, token, verifier
from support.web_doubles import SecureTransport, Transport
from twisted.internet.address import IPv4Address

import chatd
from chatd.transport.frames import Vocabulary
from chatd.transport.operator_schema import read
from chatd.transport.page import POLICY, ChatPage
from chatd.transport.static import StaticFile, Stylesheet, read_files

HOSTILE = "</title><script>alert('1')</script> \"{room} &amp; <!-- stylesheet -->"
COOKIE = b"Cookie: session="
STATIC = f"static/{chatd.__version__}/"


class Document(HTMLParser):
    """The tags of a document by name, each with its attributes, and the text of its title."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.title, self._inside = {}, "", None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.setdefault(tag, []).append(dict(attrs))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "title":
            self.title += data

    @property
    def settings(self):
        """The attributes of the root element."""
        return {name.removeprefix("data-"): value for name, value in self.tags["html"][0].items() if name != "lang"}

    @property
    def links(self):
        """The URLs of the files that the document loads."""
        files = [*self.tags.get("link", []), *self.tags.get("script", [])]
        return [file.get("href") or file["src"] for file in files]


def shown(path=b"/", *headers, **settings):
    """Return the response and the document at a path."""
    options = {name: settings.pop(name) for name in ("rooms", "tokens", "hops") if name in settings}
    response, text = House(page=ChatPage(**settings), **options).get(path, *headers)
    assert response.status == 200
    return response, Document(text)


@pytest.mark.parametrize(("path", "room", "root"), [(b"/", "main", ""), (b"/rooms/team-1?x=y", "team-1", "../")])
def test_page_of_a_room(path, room, root):
    """Its links are relative to its path, so a proxy may serve it under a prefix."""
    response, document = shown(path)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert document.settings == {
        "title": "chatd",
        "login": "",
        "tokens": "",
        "username": "",
        "max-message": "500",
        "max-username": "30",
        "room": room,
        "version": chatd.__version__,
    }
    assert document.title == "chatd"
    assert {f"{root}{STATIC}page/{name}" for name in ("page.css", "messages.css", "boot.js", "page.js")} <= {
        *document.links
    }
    assert all(link.startswith(f"{root}{STATIC}page/") for link in document.links)
    assert {"http-equiv": "refresh", "content": f"0; url={root}about"} in document.tags["meta"]


def test_page_shows_what_the_operator_chose():
    settings = {"title": "Team", "login": "https://app.example/login?a=b&c=d", "claim": "email"}
    _, document = shown(**settings)
    assert document.title == document.settings["title"] == "Team"
    assert document.settings["login"] == "https://app.example/login?a=b&c=d"
    assert document.settings["tokens"] == "email"


def test_hostile_settings_are_text():
    """They end no attribute and no element, and a name in braces stays as it is."""
    _, document = shown(title=HOSTILE, login=HOSTILE, claim=HOSTILE)
    assert document.title == HOSTILE
    assert [document.settings[name] for name in ("title", "login", "tokens")] == [HOSTILE] * 3
    assert document.tags.keys() == shown()[1].tags.keys()
    assert len(document.tags["script"]) == 2
    assert len(document.tags["link"]) == 3


def policy(response):
    return dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))


@pytest.mark.parametrize("path", [b"/", b"/rooms/a", b"/about"])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_page_may_run_only_files_of_the_server(method, path):
    """No origin but its own serves it anything, and no document of another frames it."""
    response, text = House().ask(method, path)
    assert policy(response) == {
        **dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'"),
        **dict.fromkeys(("script-src", "style-src", "connect-src", "img-src", "frame-ancestors"), "'self'"),
        "require-trusted-types-for": "'script'",
    }
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "same-origin"
    assert (text == "") == (method == b"HEAD")
    if text:
        assert not re.search(r"(?i)<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)|javascript:", text)


@pytest.mark.parametrize("path", [b"/", b"/rooms/a"])
def test_page_is_asked_for_again_and_sent_once(path):
    house = House()
    response, text = house.get(path)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["vary"] == "Origin, Accept-Encoding"
    known = b"If-None-Match: " + response.headers["etag"].encode()
    again, nothing = house.get(path, known)
    assert (again.status, nothing) == (304, "")
    for name in ("etag", "vary", "cache-control", "content-security-policy"):
        assert again.headers[name] == response.headers[name]
    head, nothing = house.ask(b"HEAD", path)
    assert (head.status, nothing, head.headers["content-length"]) == (200, "", str(len(text.encode())))


def test_page_for_every_origin_varies_with_the_coding_alone():
    response, _ = House(origins=["*"]).get(b"/")
    assert response.headers["vary"] == "Accept-Encoding"
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", [b"/", b"/about"])
def test_page_is_compressed(path):
    house = House()
    _, text = house.get(path)
    connection = house.connect()
    connection.begin(b"GET", path, b"Host: chat.example", b"Accept-Encoding: br, gzip")
    head, _, body = connection.transport.value().partition(b"\r\n\r\n")
    assert b"\r\nContent-Encoding: gzip\r\n" in head
    assert gzip.decompress(body).decode() == text


def test_pages_stay_in_memory(monkeypatch):
    """A room that is asked for again costs no new page."""
    house = House(page=ChatPage())
    made, make = [], StaticFile.make
    monkeypatch.setattr(StaticFile, "make", lambda *content: made.append(content) or make(*content))
    for _ in range(3):
        house.get(b"/rooms/a")
        house.get(b"/rooms/b")
    assert len(made) == 2


# Rooms and clients


def test_room_that_does_not_exist_has_no_page():
    house = House(rooms=["team-*"])
    for path in (b"/", b"/rooms/main", b"/rooms/Team-1", b"/rooms/%3Cscript%3E", b"/rooms/team-1/"):
        response, text = house.get(path)
        assert response.status == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert "<" not in text
    assert house.get(b"/rooms/team-1")[0].status == 200
    assert house.get(b"/about")[0].status == 200


def test_banned_address_gets_no_page():
    house = House()
    house.sanction(address="192.0.2.7")
    transport = Transport(peerAddress=IPv4Address("TCP", "192.0.2.7", 1))
    response, _ = house.ask(b"GET", b"/", transport=transport)
    assert response.status == 403


def test_page_needs_no_token():
    response, document = shown(tokens=verifier(), claim="sub")
    assert document.settings["tokens"] == "sub"
    assert response.headers["vary"] == "Origin, Accept-Encoding"


@pytest.mark.parametrize(
    ("headers", "username"),
    [
        ((), ""),
        ((COOKIE + token("ann").encode(),), "ann"),
        ((COOKIE + token(name="<ann>").encode(),), "<ann>"),
        ((COOKIE + token(lasts=-3600).encode(),), ""),
        ((COOKIE + b"nonsense",), ""),
        ((b"Cookie: other=" + token("ann").encode(),), ""),
        ((b"Authorization: Bearer " + token("ann").encode(),), ""),
    ],
)
def test_page_names_the_user_of_a_cookie(headers, username):
    """No shared cache keeps such a page."""
    claim = "name" if username == "<ann>" else "sub"
    tokens = verifier(cookie="session", username=claim)
    response, document = shown(b"/", *headers, tokens=tokens, claim=claim, personal=True)
    assert document.settings["username"] == username
    assert response.headers["cache-control"] == "private, no-cache"
    assert response.headers["vary"] == "Origin, Accept-Encoding, Cookie"


@pytest.mark.parametrize("come", [True, False])
def test_page_waits_for_the_key_of_a_token(come):
    """Without the key it names nobody."""
    keys = HeldKeys()
    house = House(page=ChatPage(personal=True), tokens=verifier(keys, cookie="session"))
    connection = house.connect()
    connection.begin(b"GET", b"/", b"Host: chat.example", COOKIE + token("ann").encode())
    assert connection.transport.value() == b""
    if come:
        keys.come()
    else:
        keys.come(None)
    response, text = connection.response()
    assert response.status == 200
    assert Document(text).settings["username"] == ("ann" if come else "")


def test_client_that_leaves_before_the_key_has_come():
    keys = HeldKeys()
    house = House(page=ChatPage(personal=True), tokens=verifier(keys, cookie="session"))
    connection = house.connect()
    connection.begin(b"GET", b"/", b"Host: chat.example", COOKIE + token("ann").encode())
    connection.lose()
    keys.come()
    assert connection.transport.value() == b""


# Changes while the server runs


def test_page_links_the_stylesheet_of_the_operator(tmp_path):
    """It comes after those of the page, and the link changes with the file."""
    file = tmp_path / "team.css"
    file.write_text("p { color: teal }")
    stylesheet = Stylesheet(file)
    house = House(page=ChatPage(stylesheet=stylesheet))
    before = Document(house.get(b"/rooms/a")[1])
    assert [link for link in before.links if link.endswith(".css")][-1] == f"../static/{stylesheet.name}"
    file.write_text("p { color: red }")
    stylesheet.reload()
    after = Document(house.get(b"/rooms/a")[1])
    assert [link for link in after.links if link.endswith(".css")][-1] == f"../static/{stylesheet.name}"
    assert before.links != after.links


def test_page_knows_the_length_of_a_message():
    """A new schema of the operator changes it."""
    vocabulary = Vocabulary()
    page = ChatPage(vocabulary=vocabulary)
    house = House(page=page)
    assert Document(house.get(b"/")[1]).settings["max-message"] == "500"
    schema = read(json.dumps(schema_with(message={"type": "string", "maxLength": 2000})).encode())
    vocabulary.use(schema.form, schema.max_bytes)
    page.refresh()
    assert Document(house.get(b"/")[1]).settings["max-message"] == "2000"


# The instructions


@pytest.mark.parametrize(
    ("path", "named", "root", "is_page_shown"),
    [(b"/about", "/", "", True), (b"/", "/", "", False), (b"/rooms/team-1?x=y", "/rooms/team-1", "../", False)],
)
def test_instructions_name_the_address(path, named, root, is_page_shown):
    house = House(page=ChatPage(shown=is_page_shown))
    response, text = house.get(path)
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert re.sub("<[^>]*>", "", text).count(f"ws://chat.example{named}") == 3
    assert f"chatd {chatd.__version__}</footer>" in text
    document = Document(text)
    assert {f"{root}{STATIC}about.{kind}" for kind in ("css", "js")} <= {*document.links}
    _, text = house.ask(b"GET", path, transport=SecureTransport())
    assert re.sub("<[^>]*>", "", text).count(f"wss://chat.example{named}") == 3
    assert house.forgotten


@pytest.mark.parametrize(
    ("hops", "headers", "url"),
    [
        (1, [b"X-Forwarded-Proto: https"], "wss://chat.example/"),
        (1, [b"X-Forwarded-Proto: HTTP, Https"], "wss://chat.example/"),
        (1, [b"X-Forwarded-Proto: https, http"], "ws://chat.example/"),
        (1, [b"X-Forwarded-Proto: \xff"], "ws://chat.example/"),
        (1, [b"X-Forwarded-Host: evil.example, room.example"], "ws://room.example/"),
        (1, [b"X-Forwarded-Host: room.example", b"X-Forwarded-Proto: wss"], "wss://room.example/"),
        (0, [b"X-Forwarded-Host: room.example", b"X-Forwarded-Proto: https"], "ws://chat.example/"),
    ],
)
def test_instructions_behind_a_proxy(hops, headers, url):
    """Only a trusted proxy names the scheme and the host that browsers use."""
    _, text = House(hops=hops).get(b"/about", *headers)
    assert f'class="url">{url}</' in text


def test_instructions_without_a_host_header():
    """HTTP/1.0 has none."""
    connection = House().connect()
    connection.send(b"GET /about HTTP/1.0\r\n\r\n")
    assert "ws://localhost/" in connection.response()[1]


@pytest.mark.parametrize("host", [b"x');alert('x", b"a&lt;b", b"<script>", b"{version}", b"\xff"])
def test_hostile_host_is_shown_as_text(host):
    house = House()
    connection = house.connect()
    plain = connection.ask(b"GET", b"/about", b"Host: localhost")[1]
    response, text = house.connect().ask(b"GET", b"/about", b"Host: " + host)
    if response.status == 200:
        name = html.escape(host.decode(errors="replace"))
        assert text == plain.replace("ws://localhost/", f"ws://{name}/")
        assert text.count(name) >= 3
    else:
        assert response.status == 400


def test_instructions_have_one_path():
    house = House()
    for path in (b"/about/", b"/about/x"):
        assert house.get(path)[0].status == 404
    response, _ = house.ask(b"POST", b"/about", body=b"")
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")


def test_scripts_for_every_browser_are_old():
    """The scripts that lead a browser to the instructions run in one that cannot run the page."""
    for name in ("about.js", "page/boot.js"):
        script = read_files()[name].bodies[""][1].decode()
        assert not re.search(r"=>|`|\b(?:let|const|class|import|export|async|await)\b(?! )|\?\.|\?\?", script)
