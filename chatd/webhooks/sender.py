"""The request of one delivery.

The request goes to the configured URL and nowhere else: redirects are not followed.  Its time is bounded, and so is the
part of the answer that is read.  This is Twisted's own agent, as for key sets: treq adds cookies and decompression, and
neither may serve here.

A URL may hold a password or a secret path, so the log names a webhook by its origin alone.
"""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, cast
from urllib.parse import SplitResult, unquote, urlsplit

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web._newclient import HTTP11ClientProtocol
from twisted.web.client import Agent, HTTPConnectionPool, ResponseFailed, _HTTP11ClientFactory
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer
from typing_extensions import override
from zope.interface import implementer

from chatd.webhooks.signature import SigningKeys, sign

REQUEST_SECONDS: Final = 15
"""The time limit of one request with its answer (Standard Webhooks recommends 15 to 30 seconds)."""
MAX_ANSWER: Final = 16 << 10
"""The bytes of an answer, with its head, after which its connection is dropped; the body has no meaning.

Bytes behind it are not parsed, because 64 KiB of short headers or of 1xx answers take up to 50 ms."""
IDLE_SECONDS: Final = 1.5
"""How long an idle connection is kept; common servers close theirs after 2 seconds or more."""

_URL = re.compile(r"https?://[!-~]+")
_SUCCESS: Final = range(200, 300)
_REDIRECTS: Final = range(300, 400)


@dataclass(frozen=True, repr=False)
class WebhookAddress:
    """The URL that a webhook posts to."""

    url: bytes
    """The URL without credentials."""
    origin: str
    """The scheme, the host and the port: all of the URL that may be logged."""
    authorization: bytes | None
    """The header for the credentials in the URL."""

    @classmethod
    def parse(cls, text: str) -> "WebhookAddress":
        """Read `http[s]://[USER:PASSWORD@]HOST[:PORT][/PATH][?QUERY]`; raise ValueError with one line."""
        try:
            parts = urlsplit(text)
            whole = bool(_URL.fullmatch(text) and parts.hostname and parts.port != 0 and not parts.fragment)
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("the URL of a webhook is like https://app.example/chatd, without a fragment")
        host = parts.netloc.rpartition("@")[2]
        bare = SplitResult(parts.scheme, host, parts.path or "/", parts.query, "")
        credentials = None
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            credentials = b"Basic " + base64.b64encode(login.encode())
        return cls(bare.geturl().encode(), f"{parts.scheme}://{host.lower()}", credentials)

    @property
    def reader(self) -> str:
        """The name of its cursors in the store, which does not disclose the URL."""
        return hashlib.sha256(self.url).hexdigest()[:24]


class Answer(NamedTuple):
    """The answer to a delivery."""

    status: int | None
    """The HTTP status; None if there was no answer."""
    reason: str = ""
    """Why there was none, in a few words."""
    retry_after: float | None = None
    """The seconds that the application asks to wait."""

    @property
    def taken(self) -> bool:
        """True if the application has taken the delivery."""
        return self.status in _SUCCESS

    def __str__(self) -> str:
        """Describe it for the log."""
        if self.status is None:
            return self.reason
        if self.status in _REDIRECTS:
            return f"answers with a redirect ({self.status}), which is not followed: name the new URL with --webhook"
        return f"answers {self.status}"


def parse_retry_after(text: str, now: float) -> float | None:
    """Read Retry-After, as seconds or as a date (RFC 9110, section 10.2.3); None if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except ValueError:
        return None


class Sender:
    """Posts signed deliveries to one address; `now` returns the seconds since 1970."""

    def __init__(
        self, reactor: Any, address: WebhookAddress, keys: SigningKeys, now: Callable[[], float], connections: int
    ) -> None:
        self._reactor = reactor
        self._address = address
        self._keys = keys
        self._now = now
        self._pool = _ConnectionPool(reactor)
        self._pool.maxPersistentPerHost = connections
        self._pool.cachedConnectionTimeout = IDLE_SECONDS  # type: ignore[assignment]
        self._pool.retryAutomatically = False
        self._agent = Agent(reactor, connectTimeout=REQUEST_SECONDS, pool=self._pool)

    def send(self, webhook_id: str, body: bytes) -> "Deferred[Answer]":
        """Send a delivery; the Deferred never fails.  Cancel it to drop the request."""
        timestamp = int(self._now())
        headers = {
            "content-type": "application/json",
            "user-agent": "chatd",
            "webhook-id": webhook_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._keys.secrets, webhook_id, timestamp, body),
        }
        fields = Headers({name: [value] for name, value in headers.items()})
        if self._address.authorization is not None:
            fields.setRawHeaders(b"authorization", [self._address.authorization])
        asked = cast("Deferred[Any]", self._agent.request(b"POST", self._address.url, fields, _Payload(body)))
        asked.addCallback(_read, timestamp)
        timer = self._reactor.callLater(REQUEST_SECONDS, asked.cancel)

        def done(result: "Answer | Failure") -> Answer:
            if timer.active():
                timer.cancel()
            return Answer(None, _reason(result)) if isinstance(result, Failure) else result

        return asked.addBoth(done)

    def close(self) -> "Deferred[Any]":
        """Close the idle connections."""
        return cast("Deferred[Any]", self._pool.closeCachedConnections())


def _read(response: Any, now: float) -> "Deferred[Answer]":
    """Fire with the answer when its body has ended, so that the connection can serve another request."""
    wait = response.headers.getRawHeaders(b"retry-after", [b""])[-1]
    body = _AnswerBody(Answer(response.code, "", parse_retry_after(wait.decode("latin-1"), now)))
    response.deliverBody(body)
    return body.ended


def _reason(failure: Failure) -> str:
    """Explain in a few words why there was no answer."""
    error = failure.value
    if isinstance(error, ResponseFailed) and error.reasons:
        error = error.reasons[0].value
    if isinstance(error, CancelledError):
        return f"does not answer within {REQUEST_SECONDS} seconds"
    if isinstance(error, (ConnectError, DNSLookupError)):
        return "cannot be reached"
    if isinstance(error, (SSL.Error, VerificationError)):
        return "has no valid certificate, or does not speak TLS"
    return f"gives no valid answer ({type(error).__name__})"


class _BoundedConnection(HTTP11ClientProtocol):
    """A connection that ends with an answer of more than MAX_ANSWER bytes."""

    transport: Any
    _received = 0

    @override
    def request(self, request: Any) -> "Deferred[Any]":
        self._received = 0
        return cast("Deferred[Any]", super().request(request))

    @override
    def dataReceived(self, bytes: bytes) -> None:
        left = max(0, MAX_ANSWER - self._received)
        self._received += len(bytes)
        super().dataReceived(bytes[:left])
        if self._received > MAX_ANSWER:
            self.transport.abortConnection()


class _ConnectionFactory(_HTTP11ClientFactory):
    """Builds bounded connections, and logs no line for each."""

    noisy = False

    @override
    def buildProtocol(self, addr: Any) -> HTTP11ClientProtocol:
        return _BoundedConnection(self._quiescentCallback)


class _ConnectionPool(HTTPConnectionPool):
    """Keeps connections open for a while."""

    _factory = _ConnectionFactory


@implementer(IBodyProducer)
class _Payload:
    """The body of a request."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.length = len(body)

    def startProducing(self, consumer: Any) -> "Deferred[None]":
        consumer.write(self._body)
        return succeed(None)

    def pauseProducing(self) -> None:
        """Do nothing: all is written."""

    def resumeProducing(self) -> None:
        """Do nothing: all is written."""

    def stopProducing(self) -> None:
        """Do nothing: all is written."""


class _AnswerBody(TwistedProtocol):
    """Skips the body of an answer: the status alone counts, whatever becomes of the body."""

    transport: Any

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.ended: Deferred[Answer] = Deferred(lambda _: self._abort())

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._end()

    def _end(self) -> None:
        if not self.ended.called:
            self.ended.callback(self._answer)

    def _abort(self) -> None:
        """Drop the connection, which a server may hold open; its proxy passes on no more than a polite close."""
        self.transport._producer.abortConnection()  # noqa: SLF001
        self._end()
