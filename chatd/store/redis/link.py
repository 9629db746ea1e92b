"""Connections to Redis: find the primary, connect, authenticate, and drop connections that fall silent.

txredisapi implements the protocol (RESP).  Its connection pool is not used, because it gives up for ever after one
rejected password.  When a reply is overdue the connection is dropped, and all its requests fail.  The session
(`chatd.store.redis.redis_session`) then dials a new one.
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
from typing_extensions import override

from chatd.store.redis.keys import LOG

REDIS_CONNECT_SECONDS: Final = 5
"""The time limit for connecting."""
REPLY_SECONDS: Final = 5
"""The time limit for a reply."""
PORT: Final = 6379

RedisRefused = txredisapi.ResponseError
"""An error reply of Redis: nothing was changed."""
Lost = (txredisapi.ConnectionError, ConnectError, ConnectionLost, DNSLookupError, DeferredTimeoutError, OSError)
"""A connection failed: requests in flight may or may not have had an effect."""
TlsErrors = (SSL.Error, VerificationError)

# If a command in a script is refused, Redis 6.2 puts the code in the middle of the text.
_CODE = re.compile(r"(?:^|[ -])(?!ERR\b)([A-Z]{3,})\b")
_MOVED = re.compile(r"MOVED \d+ (.*):(\d+)")


class Script:
    """A Lua script of this package, which Redis runs atomically."""

    def __init__(self, name: str) -> None:
        lua = importlib.resources.files("chatd").joinpath("store/redis/lua")
        self.text = b"\n".join(lua.joinpath(f"{part}.lua").read_bytes() for part in ("prelude", name))
        self.sha = hashlib.sha1(self.text).hexdigest()  # noqa: S324 -- the name that Redis gives it


class RedisAddress(NamedTuple):
    """The address of a Redis, and the credentials for it."""

    host: str
    port: int
    database: int
    username: str | None
    password: str | None
    tls: bool

    @classmethod
    def parse(cls, url: str, *, password_elsewhere: bool = False) -> "RedisAddress":
        """Read `redis[s]://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`; raise ValueError for anything else.

        With `password_elsewhere` the URL may name a user without a password.
        """
        try:
            parts = urlsplit(url)
            port = PORT if parts.port is None else parts.port
        except ValueError:
            parts, port = urlsplit(""), 0
        database = parts.path.lstrip("/") or "0"
        good = parts.scheme in ("redis", "rediss") and parts.hostname and not parts.query and not parts.fragment
        if not good or not port or not re.fullmatch(r"[0-9]{1,5}", database):
            raise ValueError("is not a redis://HOST:PORT/DATABASE")
        username, password = (unquote(part) if part else None for part in (parts.username, parts.password))
        if username and not password and not password_elsewhere:
            raise ValueError("names a user and no password: redis://USER:PASSWORD@HOST, or CHATD_STORE_PASSWORD_FILE")
        return cls(str(parts.hostname), port, int(database), username, password, parts.scheme == "rediss")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def code_of(refusal: Failure) -> str:
    """Return the code of a RedisRefused, such as READONLY."""
    found = _CODE.search(str(refusal.value))
    return found[1] if found else "ERR"


class RedisConnection(txredisapi.HiredisProtocol):
    """One connection, with a time limit for replies."""

    transport: Any
    callLater: Any

    def __init__(self, clock: IReactorTime) -> None:
        super().__init__(charset=None, convertNumbers=False)
        self.callLater = clock.callLater
        self._clock = clock
        self._since = 0.0
        self.reason: Failure | None = None
        """Why the connection ended; None while it is open."""
        self.patience: float = REPLY_SECONDS
        """The time limit for the next reply, in seconds."""

    def ask(self, *words: str | bytes | int) -> "Deferred[Any]":
        """Send a command; fire with the reply, or fail with a RedisRefused or one of Lost."""
        if not self.replyQueue.waiting:
            self._since = self._clock.seconds()
        try:
            asked: Deferred[Any] = self.execute_command(*words)
        except txredisapi.ConnectionError as error:
            return fail(error)
        return asked

    def run(self, script: Script, keys: list[str], *args: str | bytes | int) -> "Deferred[Any]":
        """Run a script that `dial` has loaded."""
        return self.ask("EVALSHA", script.sha, len(keys), *keys, *args)

    @override
    def dataReceived(self, data: bytes, unpause: bool = False) -> None:
        try:
            super().dataReceived(data, unpause)
        except txredisapi.InvalidData:
            self.replyReceived(txredisapi.ConnectionError("the server is not a Redis"))
            self.drop()

    @override
    def _build_command(self, *words: str | bytes | int, **_: Any) -> bytes:
        # txredisapi takes longer to pack a command than Redis takes to run it; hiredis does not.
        packed: bytes = hiredis.pack_command(cast(Any, words))
        return packed

    @override
    def tryConvertData(self, data: Any) -> Any:
        return data  # replies stay bytes

    @override
    def replyReceived(self, reply: Any) -> None:
        self._since = self._clock.seconds()
        super().replyReceived(reply)

    @override
    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reason = reason
        super().connectionLost(reason)

    @override
    def whenDisconnected(self) -> "Deferred[Any]":
        # txredisapi's never fires if the connection has already ended.
        return super().whenDisconnected() if self.reason is None else succeed(self)

    def drop_if_overdue(self) -> None:
        """Drop the connection if a reply is overdue; call this once a second."""
        if self.replyQueue.waiting and self._clock.seconds() - self._since > self.patience:
            self.drop()

    def keep_alive(self) -> None:
        """Send a request if no reply is due; call this once a second.

        Redis closes connections that are idle for its `timeout`, but not those that wait for the feed.
        """
        if not self.replyQueue.waiting:
            self.ask("EXISTS", LOG).addErrback(lambda failure: failure.trap(RedisRefused, *Lost))

    def drop(self) -> "Deferred[Any]":
        """Abort the connection, which fails all requests; fire when it is closed."""
        if self.reason is None:  # Twisted cannot abort a TLS connection that has ended
            self.transport.abortConnection()
        return self.whenDisconnected()


class RedisFactory(Factory):
    """Builds connections to Redis."""

    noisy = False

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock

    @override
    def buildProtocol(self, addr: Any) -> Any:
        return RedisConnection(self._clock)


class Link:
    """Dials connections to the primary."""

    def __init__(self, address: RedisAddress, reactor: Any, password_file: pathlib.Path | None = None) -> None:
        self.address = address
        self.clock: IReactorTime = reactor
        self._reactor = reactor
        self._password_file = password_file
        self.primary: tuple[str, int] | None = None
        """Host and port of the primary, if Redis has named another server than the one at `address`."""

    @inlineCallbacks
    def dial(self, *scripts: Script) -> Generator["Deferred[Any]", Any, RedisConnection]:
        """Connect, authenticate, and load scripts; fail with a RedisRefused, or one of Lost or TlsErrors."""
        factory = RedisFactory(self.clock)
        try:
            connection = yield self._endpoint().connect(factory)
        except Exception:
            self.primary = None  # start again from the address
            raise
        try:
            greeted = self._greet(connection, scripts)
            yield greeted.addTimeout(REPLY_SECONDS, self.clock)
        except Exception:
            self.primary = None
            with suppress(CancelledError):
                yield connection.drop()
            if connection.reason is not None and connection.reason.check(*TlsErrors):
                raise connection.reason.value from None
            raise
        return connection  # type: ignore[no-any-return]

    def _endpoint(self) -> Any:
        host, port = self.primary or (self.address.host, self.address.port)
        endpoint = HostnameEndpoint(self._reactor, host, port, timeout=REDIS_CONNECT_SECONDS)
        return wrapClientTLS(optionsForClientTLS(host), endpoint) if self.address.tls else endpoint

    @inlineCallbacks
    def _greet(self, connection: RedisConnection, scripts: tuple[Script, ...]) -> Generator["Deferred[Any]", Any, None]:
        password: str | bytes | None = self.address.password
        if self._password_file is not None:
            password = self._password_file.read_bytes().rstrip(b"\r\n")
        if password is not None:
            user = [self.address.username] if self.address.username else []
            yield connection.ask("AUTH", *user, password)
        if self.address.database:  # a cluster has no SELECT
            yield connection.ask("SELECT", self.address.database)
        for script in scripts:
            yield connection.ask("SCRIPT", "LOAD", script.text)

    @inlineCallbacks
    def refused(
        self, connection: RedisConnection, refusal: txredisapi.ResponseError
    ) -> Generator["Deferred[Any]", Any, None]:
        """Find the primary, if a request was refused because this server is not the primary."""
        moved = _MOVED.search(str(refusal))
        if moved:
            host = moved[1] or (self.primary or self.address)[0]  # since Redis 7 an empty host means the same host
            self.primary = host, int(moved[2])
        elif code_of(Failure(refusal)) == "READONLY":
            role = yield connection.ask("ROLE")
            self.primary = (role[1].decode(), role[2]) if role[0] == b"slave" else None


def why(failure: Failure) -> str:
    """Describe a failure in a few words, without credentials."""
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


_REMEDIES: Final = {
    "OOM": "give it more memory, or retain less",
    "MISCONF": "let it write to its disk",
    "NOREPLICAS": "start its replicas",
    "WRONGTYPE": "name another database with --store, because another program uses a key of this one",
    "NOAUTH": "give its password in --store or --store-password-file",
    "WRONGPASS": "correct the user or the password",
    "NOPERM": "grant its user the permissions that docs/operations.md lists",
    "LOADING": "wait until it has loaded its data",
    "BUSY": "end the script that it runs, with SCRIPT KILL",
    "DB index is out of range": "name a database that it has with --store",
    "SELECT is not allowed": "name database 0 with --store, because it is a cluster",
}
"""The remedy of an error reply, by its code or a part of its text."""


def remedy(failure: Failure) -> str:
    """Return what an operator can do about a failure."""
    error = failure.value
    if isinstance(error, txredisapi.ResponseError):
        found = (act for sign, act in _REMEDIES.items() if sign in str(error))
        return next(found, "correct it, or name another with --store")
    if isinstance(error, TlsErrors):
        return "correct its certificate, or the address in --store"
    if isinstance(error, OSError) and error.filename is not None:
        return "correct --store-password-file"
    return "start it, or name another with --store"
