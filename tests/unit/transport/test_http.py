"""HTTP for people, load balancers and scripts, and its deadlines."""

import json
from http import HTTPStatus

import pytest
from support.helpers import Turns
from support.web_doubles import Connection
from twisted.internet.defer import Deferred
from twisted.web.server import NOT_DONE_YET

import chatd
from chatd.messages import Code
from chatd.transport import http
from chatd.transport.admission import Rate
from chatd.transport.frames import MAX_MESSAGE
from chatd.transport.heads import MAX_HEAD, parse


class Registry(http.ChatResource):
    """A double of chatd.transport.api: a page, and an answer with the size of the post."""

    isLeaf = True

    def render_GET(self, request):
        return http.answer(request, HTTPStatus.OK, b"<!doctype html>\n", "text/html; charset=utf-8")

    def render_POST(self, request):
        request.of_a_double = True  # see documented.py
        return http.answer(request, HTTPStatus.OK, b"%d bytes" % len(request.content.read()), "text/plain")


def ready():
    return True, "ready"


def clients_site(clock, ready=ready):
    """Return the site for clients."""
    rooms = Registry()
    return http.site(ready, clock, {"": rooms, "rooms": rooms})


def admin_site(clock, ready=ready, drain=lambda: None):
    """Return the site on the admin port."""
    return http.admin(ready, clock, drain=drain, metrics=lambda: "chatd_members 3.0", hostname="host.example")


SITES = pytest.mark.parametrize("site", [clients_site, admin_site])


@pytest.fixture
def connection(clock):
    """A connection to the site for clients."""
    return Connection(clients_site(clock))


@pytest.fixture
def admin(clock):
    """A connection to the site on the admin port."""
    return Connection(admin_site(clock))


def problem(response, body):
    """Return the status and the words of a refusal, which is a problem as RFC 9457 has it."""
    assert response.headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    assert document["status"] == response.status
    assert document["title"] == HTTPStatus(response.status).phrase == response.reason
    assert document.keys() == {"title", "status", "detail"}
    return response.status, document["detail"]


def test_problem_has_the_code_of_the_error_frame():
    said = json.loads(http.problem(HTTPStatus.NOT_FOUND, "no", Code.UNKNOWN_ID))
    assert said == {"title": "Not Found", "status": 404, "detail": "no", "code": "UNKNOWN_ID"}


# Answers


def test_admin_port_has_no_page_but_a_line(admin):
    response, text = admin.ask(b"GET", b"/", b"Host: x")
    assert (response.status, text) == (
        200,
        "chatd admin: GET /healthz /readyz /metrics /rooms /sanctions, POST /drain\n",
    )
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


@SITES
def test_health_is_that_the_process_answers_ready_or_not(clock, site):
    response, text = Connection(site(clock, lambda: (False, "draining"))).ask(b"GET", b"/healthz")
    assert (response.status, text) == (200, "ok\n")


@SITES
@pytest.mark.parametrize(
    ("ready", "answer"),
    [
        ((True, "ready"), (200, "ready\n")),
        ((True, "degraded: the log cannot be read"), (200, "degraded: the log cannot be read\n")),
        ((False, "starting"), (503, "starting\n")),
        ((False, "draining"), (503, "draining\n")),
    ],
)
def test_readiness_is_200_or_503_with_how_it_is_in_words(clock, site, ready, answer):
    response, text = Connection(site(clock, lambda: ready)).ask(b"GET", b"/readyz")
    assert (response.status, text) == answer
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


def test_words_that_are_not_ascii_are_read_as_they_are(clock):
    words = "degraded: /srv/дом/chat.sqlite"
    response, text = Connection(admin_site(clock, lambda: (True, words))).ask(b"GET", b"/readyz")
    assert text == f"{words}\n"
    assert response.headers["content-length"] == str(len(text.encode()))


@SITES
def test_readiness_is_asked_for_at_each_request(clock, site):
    words = [(True, "ready"), (False, "draining")]
    connection = Connection(site(clock, lambda: words.pop(0)))
    assert [connection.ask(b"GET", b"/readyz")[0].status for _ in range(2)] == [200, 503]


# Commands


@pytest.fixture
def drains(clock):
    """A connection to the admin port, and the drains that were asked for."""
    asked = []
    words = iter(["draining", "drained"])
    site = admin_site(clock, lambda: (False, next(words)), drain=lambda: asked.append("drain") or Deferred())
    return Connection(site), asked


@pytest.mark.parametrize("body", [None, b"", b"now, please"])
def test_drain_is_asked_for_and_answered_at_once(drains, body):
    connection, asked = drains
    response, text = connection.ask(b"POST", b"/drain", b"Host: x", body=body)
    assert (response.status, text) == (202, "draining\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert asked == ["drain"]


def test_second_drain_request_gets_the_progress(drains):
    connection, asked = drains
    assert [connection.ask(b"POST", b"/drain")[1] for _ in range(2)] == ["draining\n", "drained\n"]
    assert asked == ["drain"] * 2


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"])
def test_get_does_not_drain(drains, method):
    connection, asked = drains
    response, _ = connection.ask(method, b"/drain", b"Content-Length: 0")
    assert response.status == 405
    assert response.headers["allow"] == "POST"
    assert asked == []


@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.parametrize("path", [b"/drain", b"/metrics"])
def test_what_is_for_operators_is_on_the_admin_port_alone(connection, method, path):
    assert problem(*connection.ask(method, path)) == (404, "there is nothing here")


@pytest.mark.parametrize("path", [b"/drain/", b"/drain/now", b"//drain"])
def test_drain_has_one_name(drains, path):
    connection, asked = drains
    assert problem(*connection.ask(b"POST", path))[0] == 404
    assert asked == []


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz"])
def test_health_is_never_cached(connection, path):
    response, _ = connection.ask(b"GET", path)
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [b"/", b"/healthz", b"/readyz"])
def test_HEAD_answers_as_GET_without_the_body(connection, path):
    response, body = connection.ask(b"GET", path, b"Host: x")
    head, nothing = connection.ask(b"HEAD", path, b"Host: x")
    assert (head.status, nothing) == (response.status, "")
    assert connection.transport.value().endswith(b"\r\n\r\n")
    assert head.headers["content-type"] == response.headers["content-type"]
    assert head.headers["content-length"] == str(len(body.encode()))


@pytest.mark.parametrize(
    "path",
    [
        b"/nothing",
        b"/healthz/",
        b"/healthz/more",
        b"/index.html",
        b"/../etc/passwd",
        b"/%2e%2e/etc/passwd",
        b"http://x/healthz/",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS"])
def test_unknown_path_is_404(connection, admin, method, path):
    for port in (connection, admin):
        assert problem(*port.ask(method, path)) == (404, "there is nothing here")


@pytest.mark.parametrize("path", [b"//", b"//healthz", b"/rooms", b"/rooms/main"])
def test_admin_port_has_no_rooms(admin, path):
    assert problem(*admin.ask(b"GET", path))[0] == 404


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz"])
@pytest.mark.parametrize("method", [b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"get", b"_"])
def test_other_methods_are_405(connection, admin, method, path):
    """The answer names the allowed methods."""
    for port in (connection, admin):
        response, body = port.ask(method, path, b"Content-Length: 0")
        assert problem(response, body) == (405, f"{method.decode()} is not for this")
        assert response.headers["allow"] == "GET, HEAD"


def test_answer_names_its_server_and_is_not_kept(connection):
    for path in (b"/", b"/healthz", b"/nothing"):
        response, _ = connection.ask(b"GET", path)
        assert response.headers["server"] == f"chatd/{chatd.__version__}"
        assert response.headers["cache-control"] == "no-store"


def test_request_leaves_no_line_in_the_log(clock, events):
    site = clients_site(clock)
    site.doStart()
    try:
        for path in (b"/", b"/healthz", b"/readyz", b"/nothing"):
            connection = Connection(site)
            connection.ask(b"GET", path)
            connection.lose()
    finally:
        site.doStop()
    assert events == []
    assert clock.getDelayedCalls() == []


# Bodies


@pytest.mark.parametrize("size", [0, 1, MAX_MESSAGE])
def test_body_that_is_announced_is_read(connection, size):
    assert connection.ask(b"POST", b"/rooms", body=bytes(size))[1] == f"{size} bytes"
    assert not connection.closing


def test_body_byte_by_byte_and_pipelined_request(connection, clock):
    connection.begin(b"POST", b"/rooms", b"Content-Length: 5")
    for byte in b"hello":
        assert connection.transport.value() == b""
        connection.send(bytes([byte]))
    assert connection.response()[1] == "5 bytes"
    connection.transport.clear()
    connection.send(b"POST /rooms HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none")
    connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.response()[1] == "3 bytes"
    clock.advance(0)
    assert connection.transport.value().endswith(b"\r\n\r\nok\n")


REFUSED = {
    b"Content-Length: %d" % (MAX_MESSAGE + 1): (413, "the body is larger than 16384 bytes"),
    b"Content-Length: 1000000000000": (413, "the body is larger than 16384 bytes"),
    b"Transfer-Encoding: chunked": (411, "say the body's length in Content-Length"),
}


@pytest.mark.parametrize("length", REFUSED)
@pytest.mark.parametrize("expect", [[], [b"Expect: 100-continue"]], ids=["", "expected"])
def test_body_is_refused_before_it_arrives(connection, length, expect):
    """A body that is too large or has no length is refused by its head."""
    connection.begin(b"POST", b"/rooms", b"Host: x", length, *expect)
    response, body = connection.response()
    assert problem(response, body) == REFUSED[length]
    assert response.headers["connection"] == "close"
    assert response.headers["server"] == f"chatd/{chatd.__version__}"
    assert connection.closing


@pytest.mark.parametrize("length", REFUSED)
def test_what_still_comes_of_a_refused_body_is_passed_over(connection, length):
    # As under TLS, where a connection that is being closed still hands over what comes.
    connection.begin(b"POST", b"/rooms", b"Host: x", length)
    answered = connection.transport.value()
    for _ in range(3):
        connection.send(b"5\r\nhello\r\n" * 1000)
    connection.send(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert connection.transport.value() == answered


def test_expect_100_continue(connection):
    connection.begin(b"POST", b"/rooms", b"Content-Length: 5", b"Expect: 100-continue")
    assert connection.transport.value() == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.transport.clear()
    connection.send(b"hello")
    assert connection.response()[1] == "5 bytes"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz\r\n",
        b"GET /healthz HTTP/9\r\n",
        b"GET /healthz HTTP/1.1\r\nno colon\r\n",
        b"GET /healthz HTTP/1.1\r\nA: \x00\r\n",
        b"GET /healthz HTTP/1.1\r\nA B: c\r\n",
        b"GET /healthz HTTP/1.1\r\nContent-Length: -1\r\n",
        b"POST /rooms HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n",
        b"POST /rooms HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n",
        b"POST /rooms HTTP/1.1\r\nTransfer-Encoding: gzip\r\n",
    ],
)
def test_request_that_is_not_http(connection, events, head):
    """It is answered with a problem, and the connection ends."""
    connection.send(head + b"\r\n")
    response, body = connection.response()
    assert problem(response, body)[0] == 400
    assert connection.closing
    answered = connection.transport.value()
    for data in (b"\r\n", b"A: b\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\r\n"):
        connection.send(data)  # as under TLS, where what still comes is handed over
    assert connection.transport.value() == answered
    assert events == []


@pytest.mark.parametrize("requests", [0, 2])
@pytest.mark.parametrize("lines", [b"A: %b\r\n" % (b"a" * MAX_HEAD), b"A: %b" % (b"a" * MAX_HEAD), b"A: b\r\n" * 501])
def test_head_that_is_too_long(connection, requests, lines):
    """It is answered with 431, on each request of a connection."""
    for _ in range(requests):
        connection.ask(b"GET", b"/healthz")
    connection.transport.clear()
    connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines)
    connection.send(b"\r\n")
    response, body = connection.response()
    assert problem(response, body) == (431, "the request's head is too long")
    assert connection.closing
    assert connection.channel.site.refused == {"431": 1}


def test_form_is_no_business_of_the_site(connection):
    # Twisted reads forms, and ends the connection of those that it cannot read.
    for kind in (b"multipart/form-data", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded"):
        assert connection.ask(b"POST", b"/rooms", b"Content-Type: " + kind, body=b"--no form")[1] == "9 bytes"


# The end


def test_callback_on_connection_lost(clock):
    connection = Connection(admin_site(clock))
    connection.lose()
    connection = Connection(admin_site(clock))
    told = []
    connection.channel.when_lost = lambda: told.append(True)
    connection.ask(b"GET", b"/healthz")
    assert told == []
    connection.lose()
    assert told == [True]


# Closing


class Later(http.ChatResource):
    """A resource that answers when the test calls it."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def render_POST(self, request):
        request.of_a_double = True  # see documented.py
        self.requests.append(request)
        return NOT_DONE_YET

    def answer(self, text):
        request = self.requests.pop(0)
        request.write(http.answer(request, HTTPStatus.CREATED, text, "text/plain"))
        request.finish()


class Closing:
    """A site that is closed while there are connections."""

    def __init__(self, clock):
        self.later = Later()
        self.site = http.site(ready, clock, {"later": self.later})
        self.over = []

    def connect(self):
        return Connection(self.site)

    def posts(self):
        """Return a connection with a post in flight."""
        connection = self.connect()
        connection.begin(b"POST", b"/later", body=b"hello")
        return connection

    def close(self):
        self.site.close().addCallback(self.over.append)


@pytest.fixture
def closing(clock):
    return Closing(clock)


def test_site_without_connections_is_closed_at_once(closing):
    closing.close()
    assert closing.over == [None]
    gone = closing.connect()
    gone.lose()
    closing.close()
    assert closing.over == [None, None]


def test_close_idle_connections_at_once(closing):
    """Idle connections close at once, and close() waits for all."""
    kept, silent, half = closing.connect(), closing.connect(), closing.connect()
    assert kept.ask(b"GET", b"/healthz")[1] == "ok\n"
    assert not kept.closing
    half.begin(b"POST", b"/later", b"Content-Length: 5")
    half.send(b"hell")
    closing.close()
    closing.close()
    for connection in (kept, silent, half):
        assert closing.over == []
        assert connection.closing
        connection.lose()
    assert closing.over == [None, None]
    assert closing.later.requests == [], "half a post is none"


def test_close_after_the_answer_in_flight(closing):
    connection = closing.posts()
    closing.close()
    assert not connection.closing
    assert connection.transport.value() == b""
    closing.later.answer(b"kept")
    response, text = connection.response()
    assert (response.status, text) == (201, "kept")
    assert connection.closing
    assert closing.over == []
    connection.lose()
    assert closing.over == [None]


def test_close_with_pipelined_requests(closing):
    """The request in flight is answered, and those behind it are not."""
    connection = closing.posts()
    connection.begin(b"POST", b"/later", body=b"next")
    closing.close()
    closing.later.answer(b"kept")
    assert connection.response()[1] == "kept"
    assert connection.transport.value().count(b"HTTP/1.1 ") == 1
    assert closing.later.requests == []
    assert connection.closing


def test_next_request_of_a_connection_is_on_its_way_too(closing, clock):
    connection = closing.connect()
    connection.ask(b"GET", b"/healthz")
    connection.transport.clear()
    connection.begin(b"POST", b"/later", body=b"one")
    connection.begin(b"POST", b"/later", body=b"two")  # which waits behind it
    closing.later.answer(b"first")
    connection.transport.clear()
    clock.advance(0)
    closing.close()
    assert not connection.closing
    closing.later.answer(b"second")
    assert connection.response()[1] == "second"
    assert connection.closing


def test_request_while_the_site_closes(closing):
    """It is answered, and then the connection closes."""
    first = closing.posts()
    closing.close()
    late = closing.connect()
    assert late.ask(b"GET", b"/healthz")[1] == "ok\n"
    assert late.closing
    first.lose()
    assert closing.over == []
    late.lose()
    assert closing.over == [None]


def test_what_is_refused_before_its_body_comes_is_closed_already(closing):
    connection = closing.connect()
    connection.begin(b"POST", b"/later", b"Transfer-Encoding: chunked")
    assert connection.closing
    closing.close()
    assert connection.response()[0].status == 411
    connection.lose()
    assert closing.over == [None]


def test_abort_drops_every_connection(closing):
    connections = [closing.posts(), closing.connect(), closing.posts()]
    closing.close()
    closing.later.answer(b"not read")
    assert connections[0].closing
    closing.site.abort()
    assert [connection.transport.disconnected for connection in connections] == [True] * 3
    assert closing.over == [None]
    closing.site.abort()
    assert closing.site.channels == set()


def test_answer_without_content(closing):
    """A 204 has neither a media type nor a length."""
    connection = closing.posts()
    (request,) = closing.later.requests
    request.write(http.answer(request, HTTPStatus.NO_CONTENT, b"", ""))
    request.finish()
    response, text = connection.response()
    assert (response.status, text) == (204, "")
    assert not {"content-type", "content-length"} & {name.lower() for name in response.headers}


def test_as_long_as_it_is_not_closed_connections_stay(closing):
    connection = closing.posts()
    closing.later.answer(b"kept")
    assert not connection.closing
    assert connection.ask(b"GET", b"/healthz")[1] == "ok\n"
    assert closing.site.channels == {connection.channel}


def test_whether_anyone_waits_for_an_answer(closing):
    assert not closing.site.asked
    first, second = closing.posts(), closing.connect()
    assert closing.site.asked
    second.ask(b"GET", b"/healthz")
    second.begin(b"POST", b"/later", b"Content-Length: 5")
    closing.later.answer(b"kept")
    assert not closing.site.asked, "half a post is none"
    second.send(b"hello")
    assert closing.site.asked
    second.lose()
    assert not closing.site.asked, "nobody waits for that any more"
    first.lose()


# Upgrades


def handshake(*more, method=b"GET", upgrade=b"websocket"):
    lines = [method + b" /rooms/team?username=ann HTTP/1.1", b"Host: x", b"Upgrade: " + upgrade, b"Connection: Upgrade"]
    return b"\r\n".join([*lines, b"Sec-WebSocket-Key: k", b"X: 1", b"X: 2", *more, b"", b""])


class Upgrading(Closing):
    """A site whose connections can become WebSockets, and those that did."""

    def __init__(self, clock):
        super().__init__(clock)
        self.given = []
        self.site.upgrade = lambda *given: self.given.append(given)

    def taken(self, connection):
        """Return the head that the WebSocket side received with a connection, and the bytes behind it."""
        ((transport, head, rest),) = self.given
        assert transport is connection.transport
        assert transport.producer is None
        assert transport.producerState == "producing"
        assert self.site.channels == set()
        return head, rest


@pytest.fixture
def upgrading(clock):
    return Upgrading(clock)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
@pytest.mark.parametrize("requests", [0, 1, 3])
def test_request_for_a_websocket_is_given_back_as_it_came(upgrading, clock, requests, pieces):
    connection = upgrading.connect()
    data = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * requests + handshake()
    for begin in range(0, len(data), pieces):
        assert upgrading.given == []
        connection.send(data[begin : begin + pieces])
        clock.advance(0)
    assert upgrading.taken(connection) == (parse(handshake()[:-4]), b"")
    assert connection.transport.value().count(b"HTTP/1.1 200 ") == requests
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("rest", [b"\x81\x80\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\r\n", bytes(20_000)])
@pytest.mark.parametrize("more", [b"Y: 1", b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: chunked"])
def test_upgrade_passes_on_later_bytes(upgrading, rest, more):
    """Bytes behind a handshake are passed on, and later bytes do not reach the site."""
    connection = upgrading.connect()
    connection.ask(b"GET", b"/healthz")
    connection.send(handshake(more) + rest)
    assert upgrading.taken(connection) == (parse(handshake(more)[:-4]), rest)
    answered = connection.transport.value()
    connection.send(b"GET /healthz HTTP/1.1\r\n\r\n")
    assert connection.transport.value() == answered
    assert not connection.closing
    assert len(upgrading.given) == 1


@pytest.mark.parametrize("upgrade", [b"WebSocket", b"h2c, websocket", b"websocket/13", b"h2c\r\nUpgrade: websocket"])
def test_whoever_names_websocket_among_others_asks_for_it(upgrading, upgrade):
    connection = upgrading.connect()
    connection.send(handshake(upgrade=upgrade))
    assert upgrading.taken(connection)


@pytest.mark.parametrize("method", [b"POST", b"OPTIONS", b"nonsense"])
def test_invalid_upgrade_goes_to_the_websocket_side(upgrading, method):
    """The HTTP side passes it on, and answers nothing itself."""
    connection = upgrading.connect()
    connection.send(handshake(b"Content-Length: 100000", method=method))
    assert upgrading.taken(connection)[0].method == method.decode()
    assert connection.transport.value() == b""


@pytest.mark.parametrize("upgrade", [b"h2c", b"", b"TLS/1.0, HTTP/2.0", b"web socket"])
def test_other_upgrades_are_not_offered(upgrading, upgrade):
    connection = upgrading.connect()
    connection.send(handshake(upgrade=upgrade).replace(b"/rooms/team?username=ann", b"/healthz"))
    assert connection.response()[1] == "ok\n"
    assert upgrading.given == []
    assert upgrading.site.channels == {connection.channel}


def test_admin_port_has_no_websockets(admin):
    assert admin.channel.site.upgrade is None
    admin.send(handshake().replace(b"/rooms/team?username=ann", b"/healthz"))
    assert admin.response()[1] == "ok\n"
    assert not admin.closing


def test_it_waits_for_the_answers_of_those_before_it(upgrading, clock):
    connection = upgrading.posts()
    connection.send(handshake() + b"rest")
    assert upgrading.given == []
    upgrading.later.answer(b"kept")
    assert connection.response()[1] == "kept"
    clock.advance(0)
    assert upgrading.taken(connection)[1] == b"rest"
    assert not upgrading.site.asked


@pytest.mark.parametrize("full", [False, True], ids=["", "and its answers are not out yet"])
def test_it_is_read_on_however_much_came_behind_a_request(upgrading, clock, full):
    connection = upgrading.posts()
    connection.send(handshake() + bytes(20_000))
    assert connection.transport.producerState == "paused"
    if full:
        connection.transport.producer.pauseProducing()
    upgrading.later.answer(b"kept")
    clock.advance(0)
    if full:
        assert upgrading.given == []
        connection.transport.producer.resumeProducing()
        clock.advance(0)
    assert upgrading.taken(connection)[1] == bytes(20_000)


def test_close_ignores_upgraded_connections(upgrading):
    one, other = upgrading.connect(), upgrading.posts()
    one.send(handshake())
    upgrading.close()
    assert not one.closing
    other.send(handshake())
    upgrading.later.answer(b"kept")
    assert other.closing, "nothing is read of it any more"
    assert len(upgrading.given) == 1
    other.lose()
    assert upgrading.over == [None]
    upgrading.site.abort()
    assert not one.transport.disconnected


def test_what_was_refused_asks_for_nothing_more(upgrading):
    connection = upgrading.connect()
    connection.begin(b"POST", b"/later", b"Transfer-Encoding: chunked")
    connection.send(handshake())
    assert connection.response()[0].status == 411
    assert upgrading.given == []


# How long it may take


def test_connection_that_asks_nothing_is_closed(clock, connection):
    clock.advance(http.HTTP_SECONDS - 0.1)
    assert not connection.closing
    clock.advance(0.1)
    assert connection.closing


def test_request_that_trickles_in_is_dropped_at_its_deadline(clock, connection):
    for byte in b"GET /h":
        assert not connection.closing
        connection.send(bytes([byte]))
        clock.advance(http.HTTP_SECONDS / 6)
    assert clock.seconds() == http.HTTP_SECONDS
    assert connection.closing
    assert connection.transport.value() == b""


def test_body_that_trickles_in_is_dropped_at_the_same_deadline(clock, connection):
    clock.advance(http.HTTP_SECONDS - 10)
    connection.begin(b"POST", b"/rooms", b"Content-Length: 100")
    for _ in range(10):
        assert not connection.closing
        connection.send(b"x")
        clock.advance(1)
    assert connection.closing
    assert connection.transport.value() == b""


def test_each_request_of_a_connection_has_a_deadline_of_its_own(clock, connection):
    for _ in range(3):
        clock.advance(http.HTTP_SECONDS - 1)
        assert connection.ask(b"GET", b"/healthz")[1] == "ok\n"
    clock.advance(http.KEEP_ALIVE_SECONDS - 1)
    for byte in b"GET /h":
        assert not connection.closing
        connection.send(bytes([byte]))
        clock.advance(http.HTTP_SECONDS / 6)
    assert connection.closing


def test_peer_that_does_not_take_the_close_is_aborted(clock, connection):
    clock.advance(http.HTTP_SECONDS)
    assert not connection.transport.disconnected
    clock.advance(connection.channel.abortTimeout)
    assert connection.transport.disconnected


# The budget of a reactor turn and the rate


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def answers(connection):
    """The number of answers since the last call."""
    count = connection.transport.value().count(b"HTTP/1.1 200 ")
    connection.transport.clear()
    return count


def test_one_request_in_a_turn():
    """Requests that came at once are answered one in each turn, and nothing more is read meanwhile."""
    reactor = Turns()
    connection = Connection(clients_site(reactor))
    connection.send(HEALTH * 4 + HEALTH[:9])
    for _ in range(4):
        assert answers(connection) == 1
        assert connection.transport.producerState == "paused"
        reactor.turn()
    assert answers(connection) == 0
    assert connection.transport.producerState == "producing"
    assert reactor.idle
    connection.send(HEALTH[9:])
    assert answers(connection) == 1


def test_flood_of_requests_delays_others_by_one():
    """A request of another connection is answered before the next one of the flood."""
    reactor = Turns()
    site = clients_site(reactor)
    flooder, other = Connection(site), Connection(site)
    flooder.send(HEALTH * 100)
    other.send(HEALTH)
    assert (answers(flooder), answers(other)) == (1, 1)
    reactor.turn()
    assert answers(flooder) == 1


def test_no_request_while_answers_wait_in_the_transport():
    """The server stops reading from a client that does not read, and composes no further answers."""
    reactor = Turns()
    connection = Connection(clients_site(reactor))
    connection.send(HEALTH * 3)
    connection.transport.producer.pauseProducing()
    reactor.turns()
    assert answers(connection) == 1
    assert connection.transport.producerState == "paused"
    connection.transport.producer.resumeProducing()
    assert connection.transport.producerState == "paused"
    reactor.turn()
    assert answers(connection) == 1
    connection.transport.producer.pauseProducing()
    connection.transport.producer.resumeProducing()
    assert connection.transport.producerState == "paused"
    reactor.turn()
    assert answers(connection) == 1
    assert connection.transport.producerState == "producing"


def limited(clock):
    """A connection to a site that takes two requests a second, and three at once."""
    return Connection(http.site(ready, clock, {}, Rate(2, 3, clock.seconds)))


def test_requests_above_the_rate_wait(clock):
    """They are answered, and nothing is read meanwhile."""
    connection = limited(clock)
    for _ in range(4):
        connection.send(HEALTH)
    assert answers(connection) == 4
    assert connection.transport.producerState == "paused"
    connection.send(HEALTH)  # as under TLS
    seen = []
    for _ in range(5):
        clock.advance(0.25)
        seen.append((answers(connection), connection.transport.producerState))
    assert seen == [(0, "paused")] * 3 + [(1, "producing"), (0, "producing")]
    assert connection.channel.site.intake.throttles == {"websocket": 0, "http": 1}


def test_requests_within_the_rate_do_not_wait(clock):
    connection = limited(clock)
    for _ in range(10):
        connection.send(HEALTH)
        assert answers(connection) == 1
        assert connection.transport.producerState == "producing"
        clock.advance(0.5)
    assert connection.channel.site.intake.throttles["http"] == 0


@pytest.mark.parametrize("end", ["lose", "close"])
def test_connection_ends_while_requests_wait(clock, end):
    """Requests that wait for their turn are not answered."""
    connection = limited(clock)
    connection.send(HEALTH * 8)
    if end == "lose":
        connection.lose()
    else:
        connection.channel.site.close()
    connection.transport.clear()
    clock.advance(5)
    assert answers(connection) == 0


def test_admin_port_has_no_rate(admin, clock):
    admin.send(HEALTH * 500)
    clock.advance(0)
    assert answers(admin) == 500
