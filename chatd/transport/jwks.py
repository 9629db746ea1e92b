"""Where the keys come from: a file, or a JSON Web Key Set at a URL.

A source keeps the keys in force when it cannot read new ones, and logs the reason.  The set at a URL is fetched at the
start, every REFRESH_SECONDS, and when a token names a key that the set lacks, as after a rotation.  A server that
fails, hangs or lies therefore costs one request a minute and nothing else.
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectionAborted, DNSLookupError
from twisted.internet.interfaces import IProtocolFactory, IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory
from typing_extensions import override
from zope.interface import implementer

from chatd.transport.keyring import Keyring, read_jwks

FETCH_SECONDS: Final = 5
"""The time limit of one fetch, so that handshakes that wait for it still finish in theirs."""
MAX_SET: Final = 256 << 10
"""The largest size of a key set in bytes; those of large providers have 20 KiB."""
MAX_ANSWER: Final = 2 * MAX_SET
"""The most bytes of an answer, with its headers, of which Twisted takes any number."""
UNKNOWN_SECONDS: Final = 60
"""The least time between two fetches for keys that the set lacks."""
REFRESH_SECONDS: Final = 600
"""The age at which a set is fetched again, so that a key that its owner withdraws goes out of force."""
RETRY_SECONDS: Final = 5
"""The time between two fetches while there is no key at all."""
LOG_SECONDS: Final = 60
"""The time in which the same fault is logged once."""

TOO_LONG: Final = f"answered with more than {MAX_SET >> 10} KiB"
"""The reason for giving up an answer above a limit."""

_URL = re.compile(r"(?:https?)://[!-~]+")

_logger = Logger()


class KeySource(Protocol):
    """The keys of the server, whose source may change."""

    keyring: Keyring | None
    """The keys in force; None before the first ones."""

    def look(self) -> None:
        """Fetch the keys if it is time; to be called once a second."""

    def reload(self) -> None:
        """Read the keys again; those that cannot be read leave the old ones in force."""

    def find_more(self) -> "Deferred[None] | None":
        """Look for keys that the keyring lacks; None if there is nothing to wait for."""


class KeyFile:
    """A file with keys, which `parse` reads.  The constructor raises ValueError with one line."""

    def __init__(self, path: Path, parse: Callable[[bytes], Keyring]) -> None:
        self._path = path
        self._parse = parse
        self.keyring: Keyring | None = self._read()

    def _read(self) -> Keyring:
        try:
            return self._parse(self._path.read_bytes())
        except OSError as error:
            raise ValueError(f"{self._path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"{self._path} {error}") from None

    def look(self) -> None:
        """Do nothing: a file is read at the start and at SIGHUP."""

    def reload(self) -> None:
        try:
            self.keyring = self._read()
        except ValueError as error:
            _logger.warn("the old keys stay in force: {reason}", reason=error)
        else:
            _logger.info("read the keys in {path}", path=self._path)

    def find_more(self) -> None:
        """Return None: the file is read again at SIGHUP only."""


def check_url(url: str) -> str:
    """Check the URL of a key set, and return it; raise ValueError with one line.

    Whoever can change the answer can sign tokens, so only a server on this machine may do without TLS.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        secure, whole = parts.scheme == "https", bool(_URL.fullmatch(url) and host and parts.port != 0)
    except ValueError:
        whole = False
    if not whole or parts.username is not None or parts.fragment:
        raise ValueError("the URL of a key set is like https://login.example/jwks, without a user or a fragment")
    if not secure and not is_loopback(host):
        raise ValueError(f"http://{host} could be answered by anyone on the way: use https")
    return url


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyUrl:
    """A key set at a URL."""

    def __init__(self, url: str, reactor: Any, fetch: "Callable[[str], Deferred[bytes]] | None" = None) -> None:
        self.keyring: Keyring | None = None
        self._url = url
        self._name = url.partition("?")[0]
        self._clock: IReactorTime = reactor
        self._fetch = fetch or Fetcher(reactor).fetch
        self._due = self._may_find = 0.0
        self._fetching = False
        self._waiting: list[Deferred[None]] = []
        self._logged: tuple[str, float] = "", 0.0

    def look(self) -> None:
        if not self._fetching and self._clock.seconds() >= self._due:
            self._start()

    def reload(self) -> None:
        if not self._fetching:
            self._start()

    def find_more(self) -> "Deferred[None] | None":
        if not self._fetching:
            if self.keyring is None or self._clock.seconds() < self._may_find:
                return None
            self._start()
            if not self._fetching:
                return None
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def _start(self) -> None:
        """Fetch the set."""
        self._fetching = True
        self._may_find = self._clock.seconds() + UNKNOWN_SECONDS
        fetched = self._fetch(self._url)
        fetched.addCallback(self._use).addErrback(self._failed).addBoth(self._done)

    def _use(self, data: bytes) -> None:
        self.keyring = read_jwks(data)
        self._due = self._clock.seconds() + REFRESH_SECONDS
        self._log(f"fetched {len(self.keyring)} keys from {self._name}", _logger.info)

    def _failed(self, failure: Failure) -> None:
        now = self._clock.seconds()
        self._due = now + (RETRY_SECONDS if self.keyring is None else UNKNOWN_SECONDS)
        outcome = "no token can be verified" if self.keyring is None else "the old keys stay in force"
        self._log(f"{outcome}: {self._name} {_reason(failure)}", _logger.warn)

    def _log(self, line: str, log: Callable[..., None]) -> None:
        """Log a line, unless it repeats the last one within LOG_SECONDS."""
        now = self._clock.seconds()
        if self._logged[0] != line or (log == _logger.warn and now >= self._logged[1]):
            self._logged = line, now + LOG_SECONDS
            log("{line}", line=line)

    def _done(self, _: None) -> None:
        self._fetching = False
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.callback(None)


def _reason(failure: Failure) -> str:
    """Explain a failed fetch in one line."""
    error = failure.value
    if isinstance(error, ResponseFailed) and error.reasons:
        error = error.reasons[0].value
    if isinstance(error, CancelledError):
        return f"did not answer in {FETCH_SECONDS} seconds"
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, (ConnectError, DNSLookupError)):
        return "cannot be reached"
    if isinstance(error, ConnectionAborted):
        return TOO_LONG
    return f"failed ({type(error).__name__})"


class Fetcher:
    """Fetches small documents, without following redirects, within FETCH_SECONDS.

    This is Twisted's own agent.  treq would also decompress the answer, of which 64 KiB can hold 64 MiB.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._agent = Agent.usingEndpointFactory(reactor, _Endpoints(reactor))

    def fetch(self, url: str) -> "Deferred[bytes]":
        """Fetch a document; the Deferred fails with ValueError for an answer of another kind."""
        headers = Headers({"accept": ["application/jwk-set+json, application/json"], "user-agent": ["chatd"]})
        fetched: Deferred[Any] = self._agent.request(b"GET", url.encode(), headers)
        fetched.addCallback(self._read)
        timer = self._reactor.callLater(FETCH_SECONDS, fetched.cancel)

        def done(result: Any) -> Any:
            if timer.active():
                timer.cancel()
            return result

        return fetched.addBoth(done)

    @staticmethod
    def _read(response: Any) -> "Deferred[bytes]":
        body = _Body()
        if response.code != HTTPStatus.OK:
            body.read.errback(ValueError(f"answered with {response.code}"))
        elif response.headers.hasHeader(b"content-encoding"):
            body.read.errback(ValueError("answered with a compressed document"))
        response.deliverBody(body)
        return body.read


class _Bounded(ProtocolWrapper):
    """Passes on MAX_ANSWER bytes, and drops the connection when there are more."""

    transport: Any
    _left = MAX_ANSWER

    @override
    def dataReceived(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self.transport.abortConnection()
        else:
            super().dataReceived(data)


class _BoundedFactory(WrappingFactory[Any]):
    """Wraps each protocol of a factory."""

    protocol = _Bounded
    noisy = False


@implementer(IStreamClientEndpoint)
class _BoundedEndpoint:
    """An endpoint whose connections carry an answer of limited size."""

    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def connect(self, factory: IProtocolFactory) -> "Deferred[Any]":
        """IStreamClientEndpoint: connect, and fire with the protocol of the factory."""
        connected: Deferred[Any] = self._endpoint.connect(_BoundedFactory(factory))
        return connected.addCallback(lambda outer: outer.wrappedProtocol)


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """Makes the endpoints of the agent: as Twisted does, with bounds."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._policy = BrowserLikePolicyForHTTPS()

    def endpointForURI(self, uri: URI) -> _BoundedEndpoint:
        """IAgentEndpointFactory: return the endpoint for a URI."""
        endpoint: Any = HostnameEndpoint(self._reactor, uri.host, uri.port, timeout=FETCH_SECONDS)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)
        return _BoundedEndpoint(endpoint)


class _Body(TwistedProtocol):
    """Reads the body of an answer, up to MAX_SET bytes; aborts the connection if nobody waits for it."""

    transport: Any

    def __init__(self) -> None:
        self._data = b""
        self.read: Deferred[bytes] = Deferred(lambda _: self._abort())

    @override
    def connectionMade(self) -> None:
        if self.read.called:
            self._abort()

    @override
    def dataReceived(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > MAX_SET and not self.read.called:
            self._abort()
            self.read.errback(ValueError(TOO_LONG))

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.read.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.read.callback(self._data)
        else:
            self.read.errback(reason)

    def _abort(self) -> None:
        """Drop the connection, which a server may hold open; its proxy passes on no more than a polite close."""
        connection = self.transport._producer  # noqa: SLF001 -- None after the end of the answer
        if connection is not None:
            connection.abortConnection()
