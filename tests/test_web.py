"""HTTP: what a person, a load balancer or a script is told, and how long a request may take."""

import io
from http.client import HTTPResponse

import pytest
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import globalLogPublisher
from zope.interface import implementer

import chatd
from chatd import web

# Twisted makes its own pages for 404 and 405 of classes that it deprecates.
twisted_pages = pytest.mark.filterwarnings("ignore:twisted.web.resource._Unsafe:DeprecationWarning")


@implementer(ISSLTransport)
class SecureTransport(StringTransport):
    """A connection under TLS."""

    def setTcpNoDelay(self, enabled):
        pass


class Connection:
    """A connection to a site, in memory."""

    def __init__(self, site, transport=None):
        self.transport = transport or StringTransport()
        self.channel = site.buildProtocol(None)
        self.channel.makeConnection(self.transport)

    def makefile(self, mode):
        return io.BytesIO(self.transport.value())

    def send(self, data):
        self.channel.dataReceived(data)

    def ask(self, method, path, *headers):
        """Send a request, and read the response as the standard library understands it."""
        self.transport.clear()
        self.send(b"\r\n".join([b"%b %b HTTP/1.1" % (method, path), *headers, b"", b""]))
        response = HTTPResponse(self, method=method.decode())
        response.begin()
        return response, response.read().decode()

    @property
    def closing(self):
        return self.transport.disconnecting


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def connection(clock):
    """A connection to the site for clients."""
    return Connection(web.site(lambda: None, clock, page=True))


@pytest.fixture
def admin(clock):
    """A connection to the site on the admin port."""
    return Connection(web.site(lambda: None, clock, page=False))


# What is answered


def test_the_page_says_how_to_connect_to_the_address_it_was_asked_for_at(connection):
    response, page = connection.ask(b"GET", b"/", b"Host: chat.example:8085")
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert page.startswith("<!doctype html>")
    assert "npx wscat -c ws://chat.example:8085/\n" in page
    assert f"chatd {chatd.__version__}</footer>" in page
    assert "{url}" not in page
    assert "{version}" not in page


def test_the_page_names_wss_to_those_who_came_by_tls(clock):
    connection = Connection(web.site(lambda: None, clock, page=True), SecureTransport())
    _, page = connection.ask(b"GET", b"/", b"Host: chat.example")
    assert "wss://chat.example/" in page
    assert "ws://chat.example/" not in page


def test_the_page_names_localhost_to_those_who_name_no_host(connection):
    assert "ws://localhost/" in connection.ask(b"GET", b"/")[1]


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        (b"<script>alert(1)</script>", "ws://&lt;script&gt;alert(1)&lt;/script&gt;/"),
        (b'x");alert("x', "ws://x&quot;);alert(&quot;x/"),
        (b"x' onload='x", "ws://x&#x27; onload=&#x27;x/"),
        (b"a&lt;b", "ws://a&amp;lt;b/"),
        (b"\xff", "ws://\N{REPLACEMENT CHARACTER}/"),
    ],
)
def test_a_hostile_host_is_shown_as_text(connection, host, shown):
    plain = connection.ask(b"GET", b"/", b"Host: localhost")[1]
    response, page = connection.ask(b"GET", b"/", b"Host: " + host)
    assert response.status == 200
    assert page == plain.replace("ws://localhost/", shown)
    assert page.count(shown) == 3


def test_the_page_may_load_and_run_nothing(connection):
    response, _ = connection.ask(b"GET", b"/", b"Host: x")
    assert response.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_admin_port_has_no_page_but_a_line(admin):
    response, text = admin.ask(b"GET", b"/", b"Host: x")
    assert (response.status, text) == (200, "chatd admin: /healthz /readyz\n")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("page", [True, False])
def test_health_is_that_the_process_answers_ready_or_not(clock, page):
    response, text = Connection(web.site(lambda: "stopping", clock, page=page)).ask(b"GET", b"/healthz")
    assert (response.status, text) == (200, "ok\n")


@pytest.mark.parametrize("page", [True, False])
@pytest.mark.parametrize(
    ("why_not", "answer"),
    [(None, (200, "ready\n")), ("starting", (503, "starting\n")), ("stopping", (503, "stopping\n"))],
)
def test_readiness_is_200_or_503_with_the_reason(clock, page, why_not, answer):
    response, text = Connection(web.site(lambda: why_not, clock, page=page)).ask(b"GET", b"/readyz")
    assert (response.status, text) == answer


def test_readiness_is_asked_for_at_each_request(clock):
    words = [None, "stopping"]
    connection = Connection(web.site(lambda: words.pop(0), clock, page=False))
    assert [connection.ask(b"GET", b"/readyz")[0].status for _ in range(2)] == [200, 503]


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz"])
def test_health_is_never_cached(connection, path):
    response, _ = connection.ask(b"GET", path)
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [b"/", b"/healthz", b"/readyz"])
def test_HEAD_answers_what_GET_does_without_the_body(connection, path):
    response, body = connection.ask(b"GET", path, b"Host: x")
    head, nothing = connection.ask(b"HEAD", path, b"Host: x")
    assert (head.status, nothing) == (response.status, "")
    assert connection.transport.value().endswith(b"\r\n\r\n")
    assert head.headers["content-type"] == response.headers["content-type"]
    assert head.headers["content-length"] == str(len(body.encode()))


@twisted_pages
@pytest.mark.parametrize(
    "path", [b"/nothing", b"/healthz/", b"/healthz/more", b"/index.html", b"//", b"/../etc/passwd"]
)
def test_an_unknown_path_is_404(connection, admin, path):
    assert connection.ask(b"GET", path)[0].status == 404
    assert admin.ask(b"GET", path)[0].status == 404


@twisted_pages
@pytest.mark.parametrize("path", [b"/", b"/healthz", b"/readyz"])
def test_other_methods_are_405_which_names_those_that_are_allowed(connection, admin, path):
    for port in (connection, admin):
        response, _ = port.ask(b"POST", path, b"Content-Length: 0")
        assert response.status == 405
        assert sorted(response.headers["allow"].split(", ")) == ["GET", "HEAD"]


def test_a_request_leaves_no_line_in_the_log(clock):
    site = web.site(lambda: None, clock, page=True)
    site.doStart()
    events = []
    globalLogPublisher.addObserver(events.append)
    try:
        for path in (b"/", b"/healthz", b"/readyz"):
            assert Connection(site).ask(b"GET", path)[0].status == 200
    finally:
        globalLogPublisher.removeObserver(events.append)
        site.doStop()
    assert events == []


# How long it may take


def test_a_connection_that_asks_nothing_is_closed(clock, connection):
    clock.advance(web.HTTP_SECONDS - 0.1)
    assert not connection.closing
    clock.advance(0.1)
    assert connection.closing


def test_a_request_that_trickles_in_is_dropped_at_its_deadline(clock, connection):
    for byte in b"GET /h":
        assert not connection.closing
        connection.send(bytes([byte]))
        clock.advance(5)
    assert clock.seconds() == web.HTTP_SECONDS
    assert connection.closing
    assert connection.transport.value() == b""


@pytest.mark.parametrize("length", [b"Content-Length: 100", b"Transfer-Encoding: chunked"])
def test_a_body_is_refused_before_it_comes(connection, length):
    connection.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
    assert connection.transport.value().startswith(b"HTTP/1.1 413 ")
    assert connection.closing


def test_each_request_of_a_connection_has_a_deadline_of_its_own(clock, connection):
    for _ in range(3):
        clock.advance(20)
        assert connection.ask(b"GET", b"/healthz")[1] == "ok\n"
    for byte in b"GET /h":
        assert not connection.closing
        connection.send(bytes([byte]))
        clock.advance(5)
    assert connection.closing


def test_a_peer_that_does_not_take_the_close_is_aborted(clock, connection):
    clock.advance(web.HTTP_SECONDS)
    assert not connection.transport.disconnected
    clock.advance(connection.channel.abortTimeout)
    assert connection.transport.disconnected
