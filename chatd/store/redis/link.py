"""The way to a Redis: where its primary is, and connections that have said who they are and end when it is silent.

txredisapi speaks the protocol (RESP); its pool, which gives up for ever after one refused password, is left
out.  A connection that has asked and is not answered in time is dropped, and all that waits on it fails:
whoever asked comes again by a new one.
"""

import hashlib
import importlib.resources
import pathlib
import re
from collections.abc import Generator
from contextlib import suppress
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote, urlsplit

import hiredis
import txredisapi
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, fail, inlineCallbacks, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import ConnectError, ConnectionLost, DNSLookupError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Factory, connectionDone
from twisted.internet.ssl import optionsForClientTLS
from twisted.python.failure import Failure

CONNECT_SECONDS: Final = 5
"""How long a connection may take to come about."""
REPLY_SECONDS: Final = 5
"""How long a reply may take."""
PORT: Final = 6379

Refusal = txredisapi.ResponseError
"""What Redis says no with; nothing was changed."""
Lost = (txredisapi.ConnectionError, ConnectError, ConnectionLost, DNSLookupError, DeferredTimeoutError, OSError)
"""What becomes of a connection; whether something was changed cannot be told."""
TlsErrors = (SSL.Error, VerificationError)

# Redis 6.2 says the code in the midst of the text when a command in a script is refused.
_CODE = re.compile(r"(?:^|[ -])(?!ERR\b)([A-Z]{3,})\b")
_MOVED = re.compile(r"MOVED \d+ (.*):(\d+)")


class Script:
    """A Lua script of this package, which Redis runs in one piece."""

    def __init__(self, name: str) -> None:
        lua = importlib.resources.files("chatd").joinpath("store/redis/lua")
        self.text = b"\n".join(lua.joinpath(f"{part}.lua").read_bytes() for part in ("prelude", name))
        self.sha = hashlib.sha1(self.text).hexdigest()  # noqa: S324 -- the name that Redis knows it by


class RedisAddress(NamedTuple):
    """Where a Redis is, and how to be let in."""

    host: str
    port: int
    database: int
    username: str | None
    password: str | None
    tls: bool

    @classmethod
    def parse(cls, url: str, *, password_elsewhere: bool = False) -> "RedisAddress":
        """Read `redis[s]://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`; ValueError for anything else.

        If the password is elsewhere the URL may name a user alone.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or PORT
        except ValueError:
            parts, port = urlsplit(""), 0
        database = parts.path.lstrip("/") or "0"
        good = parts.scheme in ("redis", "rediss") and parts.hostname and not parts.query and not parts.fragment
        if not good or not re.fullmatch(r"[0-9]{1,5}", database):
            raise ValueError("is no redis://HOST:PORT/DATABASE")
        username, password = (unquote(part) if part else None for part in (parts.username, parts.password))
        if username and not password and not password_elsewhere:
            raise ValueError("names a user and no password: redis://USER:PASSWORD@HOST, or CHATD_STORE_PASSWORD_FILE")
        return cls(str(parts.hostname), port, int(database), username, password, parts.scheme == "rediss")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def code_of(refusal: Failure) -> str:
    """What names a Refusal, such as READONLY."""
    found = _CODE.search(str(refusal.value))
    return found[1] if found else "ERR"


class RedisConnection(txredisapi.HiredisProtocol):
    """One connection."""

    transport: Any
    callLater: Any

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__(charset=None, convertNumbers=False)
        self.callLater = clock.callLater
        self._clock = clock
        self._since = 0.0
        self.reason: Failure | None = None
        """Why it ended, when it has."""
        self.patience: float = REPLY_SECONDS
        """How long the next reply may take, in seconds."""

    def ask(self, *words: str | bytes | int) -> "Deferred[Any]":
        """Send a command; answers the reply, or fails with a Refusal or one of Lost."""
        if not self.replyQueue.waiting:
            self._since = self._clock.seconds()
        try:
            asked: Deferred[Any] = self.execute_command(*words)
        except txredisapi.ConnectionError as error:
            return fail(error)
        return asked

    def run(self, script: Script, keys: list[str], *args: str | bytes | int) -> "Deferred[Any]":
        """Run a script that has been loaded."""
        return self.ask("EVALSHA", script.sha, len(keys), *keys, *args)

    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        """Something has come."""
        try:
            super().dataReceived(data, unpause)
        except txredisapi.InvalidData:
            self.replyReceived(txredisapi.ConnectionError("no Redis speaks like that"))
            self.drop()

    def _build_command(self, *words: str | bytes | int, **_: Any) -> bytes:
        """A command's bytes, which txredisapi would take longer to compose than Redis to obey."""
        packed: bytes = hiredis.pack_command(cast(Any, words))
        return packed

    def tryConvertData(self, data: Any) -> Any:
        """What has come, as it is."""
        return data

    def replyReceived(self, reply: Any) -> None:
        """A reply has come."""
        self._since = self._clock.seconds()
        super().replyReceived(reply)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It has ended: all that was asked fails."""
        self.reason = reason
        super().connectionLost(reason)

    def whenDisconnected(self) -> "Deferred[Any]":
        """Fires when it has ended, also if that was before."""
        return super().whenDisconnected() if self.reason is None else succeed(self)

    def look(self) -> None:
        """Drop the connection if a reply is overdue; to be called once a second."""
        if self.replyQueue.waiting and self._clock.seconds() - self._since > self.patience:
            self.drop()

    def drop(self) -> "Deferred[Any]":
        """Let go of it; what is asked fails.  Fires when it is gone."""
        if self.reason is None:  # Twisted's TLS cannot be aborted when it has ended
            self.transport.abortConnection()
        return self.whenDisconnected()


class _Factory(Factory):
    noisy = False

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock

    def buildProtocol(self, addr: Any) -> Any:
        return RedisConnection(self._clock)


class Link:
    """Makes connections to the primary."""

    def __init__(self, address: RedisAddress, reactor: Any, password_file: pathlib.Path | None = None) -> None:
        self.address = address
        self.clock: IReactorTime = reactor
        self._reactor = reactor
        self._password_file = password_file
        self._primary: tuple[str, int] | None = None
        """Where it has moved to, as the one at the address, or a later one, said."""

    @inlineCallbacks
    def dial(self, *scripts: Script) -> Generator["Deferred[Any]", Any, RedisConnection]:
        """Connect, say who we are, and load scripts; fails with a Refusal, or one of Lost or TlsErrors."""
        factory = _Factory(self.clock)
        try:
            connection = yield self._endpoint().connect(factory)
        except Exception:
            self._primary = None  # it may be found at the address again
            raise
        try:
            greeted = self._greet(connection, scripts)
            yield greeted.addTimeout(REPLY_SECONDS, self.clock)
        except Exception:
            self._primary = None
            with suppress(CancelledError):
                yield connection.drop()
            if connection.reason is not None and connection.reason.check(*TlsErrors):
                raise connection.reason.value from None
            raise
        return connection  # type: ignore[no-any-return]

    def _endpoint(self) -> Any:
        host, port = self._primary or (self.address.host, self.address.port)
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=CONNECT_SECONDS)
        return wrapClientTLS(optionsForClientTLS(host), endpoint) if self.address.tls else endpoint

    @inlineCallbacks
    def _greet(self, connection: RedisConnection, scripts: tuple[Script, ...]) -> Generator["Deferred[Any]", Any, None]:
        password: str | bytes | None = self.address.password
        if self._password_file is not None:
            password = self._password_file.read_bytes().rstrip(b"\r\n")
        if password is not None:
            user = [self.address.username] if self.address.username else []
            yield connection.ask("AUTH", *user, password)
        if self.address.database:  # a cluster knows no SELECT
            yield connection.ask("SELECT", self.address.database)
        for script in scripts:
            yield connection.ask("SCRIPT", "LOAD", script.text)

    @inlineCallbacks
    def refused(
        self, connection: RedisConnection, refusal: txredisapi.ResponseError
    ) -> Generator["Deferred[Any]", Any, None]:
        """Find out where the primary is, if that is why something was refused."""
        moved = _MOVED.search(str(refusal))
        if moved:
            host = moved[1] or (self._primary or self.address)[0]  # since Redis 7 an empty host is the same one
            self._primary = host, int(moved[2])
        elif code_of(Failure(refusal)) == "READONLY":
            role = yield connection.ask("ROLE")
            self._primary = (role[1].decode(), role[2]) if role[0] == b"slave" else None


def why(failure: Failure) -> str:
    """What has failed, in a few words."""
    error = failure.value
    if isinstance(error, txredisapi.ResponseError):
        return str(error)
    if isinstance(error, DeferredTimeoutError):
        return "it does not answer"
    if isinstance(error, VerificationError):
        return "its certificate is for another name"
    if isinstance(error, SSL.Error):
        return f"no TLS: {' '.join(str(reason[-1]) for reason in error.args[0]) if error.args else 'it hung up'}"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
