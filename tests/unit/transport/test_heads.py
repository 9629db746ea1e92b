"""One grammar: heads.jsonl has the verdict on every head, and each path that reads heads comes to it.

A row has a request, in which `HOST:PORT` stands for the server's own name, and three statuses.  `websocket` is the
answer on the port for clients.  `plain` is the answer there if the request asks for another upgrade.  `admin` is that
of the admin port.
"""

import json
import pathlib
import re
from http.client import HTTPResponse
from io import BytesIO

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import PING_SECONDS, REPEATABLE
from support.transports import Wire
from twisted.internet.task import Clock

from chatd.room.registry import Registry
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore
from chatd.transport import frames, http
from chatd.transport.admission import Addresses, Admission, HttpError
from chatd.transport.api import Api
from chatd.transport.connections import Connections
from chatd.transport.framing import accept_token
from chatd.transport.heads import MAX_HEAD, Head, check_partial, parse, take
from chatd.transport.websocket import ChatFactory

CASES = [json.loads(line) for line in pathlib.Path(__file__).with_name("heads.jsonl").read_text("utf-8").splitlines()]
KEEP = b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


class Server:
    """Both ports of a server in memory."""

    def __init__(self):
        self.clock = clock = Clock()
        store = MemoryStore(Retention(), lambda: 0.0)
        store.open(())
        rooms = Registry(store, frames, clock, 100)
        connections, admission = Connections(clock, PING_SECONDS), Admission()
        api = Api(rooms, connections, admission, Addresses(None, 0, clock.seconds), listing=None, exports=None)
        site = http.site(lambda: (True, "ready"), clock, {"": api, "rooms": api})
        self.open = ChatFactory(rooms=rooms, connections=connections, admission=admission, site=site, reactor=clock)
        self.admin = http.admin(lambda: (True, "ready"), clock, drain=lambda: None, metrics=lambda: "")

    def connect(self, port):
        self.clock.advance(1)  # so that no handshake is one of a crowd
        return Client(self.open if port == "open" else self.admin)


class Client:
    """The other end of one connection."""

    def __init__(self, factory):
        self.wire = Wire()
        self.wire.protocol = factory.buildProtocol(None)
        self.wire.protocol.makeConnection(self.wire)

    def send(self, data):
        """Send bytes as under TLS, where they arrive although the connection is being closed."""
        self.wire.protocol.dataReceived(data)

    def answer(self, request):
        """The status of the answer to a request, whose head is as it must be for that status."""
        data = self.wire.read().removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        response = HTTPResponse(_Readable(data), method="HEAD" if request.startswith(b"HEAD ") else None)
        response.begin()
        headers, status = response.headers, response.status
        if status == 101:
            key = re.search(rb"(?i)sec-websocket-key: *([^ \t\r]*)", request)[1]
            assert headers["sec-websocket-accept"] == accept_token(key).decode()
            return 101
        body = data.partition(b"\r\n\r\n")[2]
        detail = json.loads(body)["detail"] if "problem" in headers.get("content-type", "") and body else ""
        if request.startswith(b"HEAD "):
            assert body == b""
            assert int(headers["content-length"]) > 0
        elif status != 204:
            assert len(body) == int(headers["content-length"])
        assert status != 405 or headers["allow"]
        versions = ("Hixie76", "WebSocket version", "Sec-WebSocket-Version")
        assert ("sec-websocket-version" in headers) == any(word in detail for word in versions) or not body
        if headers["connection"] == "close":
            assert self.wire.disconnecting
        return status


class _Readable(BytesIO):
    def makefile(self, _):
        return self


@pytest.fixture(scope="module")
def server():
    return Server()


def raw(case, *, plain=False):
    request = case["request"].replace("HOST:PORT", "localhost:8085")
    if plain:
        request = re.sub("(?i)(upgrade *:[^\r\n]*)websocket", r"\1another", request)
    return request.encode("latin-1")


def ids(case):
    return case["name"]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_first_head_of_a_connection(server, case):
    client = server.connect("open")
    client.send(raw(case))
    assert client.answer(raw(case)) == case["websocket"]


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("requests", [1, 2])
def test_later_head_of_a_connection(server, case, requests):
    """A connection that proxies keep comes to the same verdict."""
    client = server.connect("open")
    client.send(KEEP * requests)
    assert client.wire.read().count(b"HTTP/1.1 200 ") == requests
    client.send(raw(case))
    assert client.answer(raw(case)) == case["websocket"]


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("port", ["open", "admin"])
def test_head_in_pieces(server, case, port):
    """It does not matter how a head is cut, and a verdict does not wait for bytes that cannot change it."""
    client, request = server.connect(port), raw(case)
    size = 1 if len(request) < 1000 else 997
    for begin in range(0, len(request), size):
        client.send(request[begin : begin + size])
    assert client.answer(request) == case["admin" if port == "admin" else "websocket"]


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("before", [b"", KEEP])
def test_head_of_a_plain_request(server, case, before):
    client, request = server.connect("open"), raw(case, plain=True)
    client.send(before)
    client.wire.read()
    client.send(request)
    assert client.answer(request) == case["plain"]


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("before", [b"", KEEP])
def test_head_on_the_admin_port(server, case, before):
    client = server.connect("admin")
    client.send(before)
    client.wire.read()
    client.send(raw(case))
    assert client.answer(raw(case)) == case["admin"]


# The normalised form


def test_head_is_normalised():
    """Each header is one line, and the target has origin form, whose authority is the host."""
    head = parse(
        b"\r\nGET HTTP://a.example?x=1 HTTP/1.1\r\nX: 1\r\nhOST: b.example\r\nx:\t2 \r\nContent-Length: 05\r\n"
        b"Connection: keep-alive,Close"
    )
    headers = {"x": "1, 2", "host": "a.example", "content-length": "5", "connection": "keep-alive,Close"}
    assert head == Head("GET", "/?x=1", "HTTP/1.1", headers, {"x"}, 5)
    lines = [b"GET /?x=1 HTTP/1.1", b"x: 1, 2", b"host: a.example", b"content-length: 5", b"connection: close", b""]
    assert [*head.lines()] == lines


@REPEATABLE
@given(st.sampled_from([case for case in CASES if 200 in (case["plain"], case["admin"])]))
def test_normalised_head_is_itself(case):
    head, _ = take(raw(case, plain=True))
    assert take(b"\r\n".join(head.lines()) + b"\r\nrest") == (head._replace(repeated=set()), b"rest")


@REPEATABLE
@given(st.binary(max_size=40), st.sampled_from([b"", b"\r\n", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n"]))
@example(b"\r", b"")
def test_partial_head_is_refused_for_good(more, begun):
    """Bytes that are refused are no valid head whatever follows, and bytes of a valid head are never refused."""
    data = begun + more
    try:
        check_partial(data)
    except HttpError:
        for rest in (b"", b"\r\n\r\n", b"\n\r\n\r\n", b" / HTTP/1.1\r\nHost: x\r\n\r\n"):
            with pytest.raises(HttpError):
                take(data + rest)


def test_end_of_a_head():
    """The bytes behind it are the rest; empty lines before it are passed over."""
    head = b"GET / HTTP/1.1\r\nHost: x"
    assert take(b"\r\n\r\n" + head + b"\r\n\r\n\r\nrest") == (parse(head), b"\r\nrest")
    assert take(b"\r\n\r\n\r") == (None, b"\r")
    assert take(b"") == (None, b"")
    with pytest.raises(HttpError, match="too long"):
        take(head + b"\r\nX: " + bytes(MAX_HEAD))


@pytest.mark.parametrize(
    ("old", "new", "detail"),
    [
        (b"Host: x\r\n", b"", "HTTP Host header missing{}"),
        (b"Host: x", b"Host: x\r\nHost: x", "HTTP Host header appears more than once{}"),
        (b"Host: x", b"Host: x:y", 'invalid port "y" in HTTP Host header "x:y"'),
        (b"Host: x", b"Host: [::1]y", 'invalid HTTP Host header "[::1]y"'),
        (b"Host: x", b"Host: a/b", 'invalid HTTP Host header "a/b"'),
        (b"GET / ", b"GET /#top ", 'HTTP requested resource contains a fragment identifier "top"'),
        (b"Host: x", b"Host: x\r\nno colon", "this is no HTTP request"),
    ],
)
def test_reason_of_a_refused_head(old, new, detail):
    """A client gets the reason; that of a handshake says that it is one."""
    for upgrade, where in ((b"", ""), (b"\r\nUpgrade: websocket", " in opening handshake request")):
        with pytest.raises(HttpError) as refused:
            parse(b"GET / HTTP/1.1\r\nHost: x\r\n".replace(old, new).removesuffix(b"\r\n") + upgrade)
        assert str(refused.value) == detail.format(where)
