"""The request of one delivery, against a real server that verifies it and misbehaves in every way."""

import base64
import contextlib
import gzip
import ssl
import time

import pytest
from support.loops import drive
from support.receivers import OTHER, SECRET, Receiver
from support.servers import certificate_for
from support.threads import serving
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThreadPool
from twisted.web._newclient import HTTP11ClientProtocol

from chatd.webhooks import sender
from chatd.webhooks.sender import MAX_ANSWER, Sender, WebhookAddress
from chatd.webhooks.signature import SigningKeys

BODY = b'{"type":"messages","room":"team","messages":[]}'


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").write_text(f"{SECRET}\n\n{OTHER}\n")
    return SigningKeys(tmp_path / "keys")


@pytest.fixture
def send(keys):
    """A function that posts a delivery to a URL, and returns the answers, so many times one after the other."""

    def send(url, times=1, act=lambda asked, _: asked):
        async def run(loop):
            transport = Sender(loop, WebhookAddress.parse(url), keys, time.time, 8)
            answers = []
            for number in range(times):
                asked = transport.send(f"team:k7Q2-{number}:{number}", BODY)
                answers.append(await act(asked, loop))
            await transport.close()
            await deferLater(loop, 0)  # what was dropped ends in the next turn
            return answers

        return drive(run)

    return send


def test_request(send):
    """The request is a signed POST of JSON, whose connection serves the next one too."""
    with serving(Receiver()) as app:
        answers = send(app.url, 2)
        assert [answer.status for answer in answers] == [204, 204]
        assert [answer.taken for answer in answers] == [True, True]
        assert app.ids == ["team:k7Q2-0:0", "team:k7Q2-1:1"]
        one, _ = app.headers
        assert one["Content-Type"] == "application/json"
        assert "Authorization" not in one
        assert len(one["Webhook-Signature"].split()) == 2
        assert app.deliveries[0][1] == {"type": "messages", "room": "team", "messages": []}


def test_application_with_the_other_key(send):
    """During a rotation, an application verifies with either key."""
    with serving(Receiver(secret=OTHER)) as app:
        assert send(app.url)[0].taken


def test_credentials_in_the_url(send):
    with serving(Receiver()) as app:
        send(app.url.replace("http://", "http://ann:pass%20word@"))
        (headers,) = app.headers
        assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"ann:pass word"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (500, "answers 500"),
        (410, "answers 410"),
        ((301, {"Location": "/other"}), "answers with a redirect (301), which is not followed"),
        ((302, {"Location": "http://169.254.169.254/"}), "answers with a redirect (302)"),
        ("drop", "gives no valid answer"),
    ],
)
def test_failures(send, reply, words):
    """A redirect is a failure too: nothing is sent to any other URL."""
    with serving(Receiver(reply)) as app:
        (answer,) = send(app.url)
        assert words in str(answer)
        assert not answer.taken
        assert len(app.deliveries) == 1


@pytest.mark.parametrize(
    "reply",
    [
        "cut",
        (200, {"body": b"x" * 4 * MAX_ANSWER}),
        (201, {"body": gzip.compress(b"x" * (1 << 20)), "Content-Encoding": "gzip"}),
    ],
)
def test_status_alone_counts(send, reply):
    """The body of an answer may be cut, large or compressed: it is skipped."""
    with serving(Receiver(reply)) as app:
        assert [answer.taken for answer in send(app.url, 2)] == [True, True]


def test_large_answer_at_once(send):
    """The whole answer may arrive before its body is read."""
    body = b"x" * (MAX_ANSWER + 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(Receiver(lambda handler: handler.wfile.write(head + body) and "drop")) as app:
        assert send(app.url)[0].taken


def endless(head, line):
    """Return a reply that writes until the connection ends, and notes how much was taken."""

    def write(handler):
        handler.wfile.write(head)
        with contextlib.suppress(OSError):
            for _ in range(1 << 20):
                handler.wfile.write(line * 1000)
        return "drop"

    return write


def test_endless_body(send):
    """The connection is dropped at a limit, and the status counts."""
    with serving(Receiver(endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9))) as app:
        assert [answer.taken for answer in send(app.url, 2)] == [True, True]


def test_endless_head(send):
    """An answer whose head does not end is none."""
    with serving(Receiver(endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"))) as app:
        one, other = send(app.url, 2)
        assert (str(one), other.taken) == ("gives no valid answer (ConnectionAborted)", True)


def test_bytes_behind_the_limit_are_not_parsed(send, monkeypatch):
    """They cost the server nothing, even if they arrive with the rest."""
    parsed, parse = [], HTTP11ClientProtocol.dataReceived

    def noted(connection, data):
        parsed.append(len(data))
        parse(connection, data)

    monkeypatch.setattr(HTTP11ClientProtocol, "dataReceived", noted)
    head = b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * MAX_ANSWER
    with serving(Receiver(lambda handler: handler.wfile.write(head) and "drop")) as app:
        assert send(app.url)[0].status is None
    assert sum(parsed) == MAX_ANSWER


def test_retry_after(send):
    """It is a number of seconds or a date; anything else counts as missing."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    values = "30", date, "Thu, 01 Jan 1970 00:00:00 GMT", "soon", "-1"
    with serving(Receiver(*((429, {"Retry-After": value}) for value in values), 503)) as app:
        waits = [answer.retry_after for answer in send(app.url, 6)]
    assert waits[0] == 30
    assert 90 < waits[1] <= 101
    assert waits[2:] == [0, None, None, None]


def test_answer_with_a_foreign_retry_after(send):
    """A header that is no text in UTF-8 counts as missing, and its connection serves the next delivery."""
    with serving(Receiver(*[(503, {"Retry-After": "\xff"})] * 3)) as app:
        answers = send(app.url, 4)
        assert [(answer.status, answer.retry_after) for answer in answers] == [(503, None)] * 3 + [(204, None)]
        assert app.connections == 1


def test_hanging_application(send, monkeypatch):
    """The time of a request is bounded, and its connection is dropped."""
    monkeypatch.setattr(sender, "REQUEST_SECONDS", 0.1)
    with serving(Receiver("hang")) as app:
        (answer,) = send(app.url)
        assert str(answer) == "does not answer within 0.1 seconds"
        app.released.set()


def test_answer_with_a_hanging_body(send, monkeypatch):
    """The status counts after the time limit."""
    monkeypatch.setattr(sender, "REQUEST_SECONDS", 0.2)

    def begin(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nx")
        handler.wfile.flush()
        return "hang"

    with serving(Receiver(begin)) as app:
        (answer,) = send(app.url)
        assert answer.status == 200
        app.released.set()


def test_cancelled_request(send):
    """A node that loses the lease drops its requests, and the Deferred does not fail."""

    async def cancel(asked, loop):
        await deferToThreadPool(loop, loop.getThreadPool(), app.wait, lambda app: app.deliveries)
        asked.cancel()
        return await asked

    with serving(Receiver("hang")) as app:
        (answer,) = send(app.url, act=cancel)
        assert answer.status is None
        app.released.set()


def test_certificate(send, tmp_path, monkeypatch):
    """The application needs a certificate of an authority that the machine trusts, or that SSL_CERT_FILE names."""
    certificate_for(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    app = Receiver()
    app.socket = context.wrap_socket(app.socket, server_side=True)
    with serving(app):
        url = app.url.replace("http:", "https:")
        assert str(send(url)[0]) == "has no valid certificate, or does not speak TLS"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert send(url)[0].taken
        assert send(url.replace("127.0.0.1", "localhost"))[0].status is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://nowhere.invalid/"])
def test_unreachable_application(send, url):
    assert str(send(url)[0]) == "cannot be reached"


def test_server_that_speaks_no_http(send):
    with serving(Receiver(lambda handler: handler.wfile.write(b"nonsense\r\n\r\n") and "drop")) as app:
        assert "gives no valid answer" in str(send(app.url)[0])
