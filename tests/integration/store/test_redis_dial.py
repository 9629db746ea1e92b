"""Connecting to real servers: credentials, faults of the network, TLS and redirects."""

import contextlib
import socket

import pytest
from support.redises import LOCAL, FastClock, Proxy, Redis, each_binary, free_port, turn, wait_in
from support.servers import certificate_for
from twisted.internet import defer
from twisted.internet.error import DNSLookupError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.tcp import Client
from twisted.python.failure import Failure

from chatd.store.redis import link as redis_link
from chatd.store.redis.link import Link, Lost, RedisAddress, RedisRefused, Script, why


@pytest.fixture
def link(loop):
    """A function that makes links with a fast clock; they may leave no call and no socket."""

    def make(url, **options):
        made = Link(RedisAddress.parse(url), loop, **options)
        made.clock = FastClock(loop)
        return made

    yield make
    assert loop.getDelayedCalls() == []
    assert [reader for reader in loop.getReaders() if isinstance(reader, Client)] == []


@pytest.fixture
def dial(loop, link):
    """A function that dials and returns the connection, or raises; the fixture drops all connections."""
    connections = []

    def make(url, *scripts, made=None, **options):
        made = made or link(url, **options)
        connections.append(wait_in(loop, made.dial(*scripts)))
        return connections[-1]

    yield make
    for connection in connections:
        wait_in(loop, connection.drop())


def words_of(dial, *args, **options):
    """Return the description of the failure to connect."""
    try:
        dial(*args, **options)
    except (*Lost, *redis_link.TlsErrors, RedisRefused):
        return why(Failure())
    raise AssertionError("connected")


def test_script_hash(one):
    for name in ("open", "append", "page", "trim"):
        script = Script(name)
        assert one.call("SCRIPT", "LOAD", script.text) == script.sha.encode()
        assert script.text.startswith(b"-- The code that the scripts share")


# Credentials and setup


def test_database_is_selected(one, dial, loop):
    connection = dial(f"redis://{LOCAL}:{one.port}/3")
    wait_in(loop, connection.ask("SET", "key", "text"))
    assert "db=3" in one.call("CLIENT", "LIST").decode()
    assert one.call("GET", "key") is None


def test_first_database_needs_no_select(one, dial):
    dial(one.url)
    assert "cmdstat_select" not in one.info("commandstats")


def test_dial_loads_scripts(one, dial, loop):
    script = Script("page")
    connection = dial(one.url, script)
    keys = ["{chatd}:log", "{chatd}:heads", "{chatd}:feed", "{chatd}:room:main"]
    one.call("HSET", keys[1], "main", 0)
    assert wait_in(loop, connection.run(script, keys, "main", "", 5)) == [None, None, 1, 0, []]


@each_binary
def guarded(request, tmp_path):
    options = {"user": ("ann", "sec:ret/@")} if request.node.callspec.params.get("user") else {"password": "sec ret"}
    with Redis(tmp_path / "data", binary=request.param, **options) as server:
        yield server


@pytest.mark.parametrize("user", [False, True], ids=["password", "user"])
def test_credentials(guarded, dial, loop, user):
    connection = dial(guarded.url)
    assert wait_in(loop, connection.ask("ACL", "WHOAMI")) == (b"ann" if user else b"default")


@pytest.mark.parametrize(
    ("credentials", "words"),
    [("", "NOAUTH"), (":wrong@", "WRONGPASS"), ("ann:secret@", "WRONGPASS")],
)
def test_wrong_credentials(tmp_path, dial, credentials, words):
    with Redis(tmp_path / "data", password="secret") as redis:
        said = words_of(dial, f"redis://{credentials}{LOCAL}:{redis.port}", Script("page"))
        assert said.startswith(words)
        assert "secret" not in said
        assert "wrong" not in said


def test_user_without_permission(tmp_path, dial):
    with Redis(tmp_path / "data") as redis:
        redis.call("ACL", "SETUSER", "bob", "on", ">secret", "~*", "+@all", "-script")
        assert words_of(dial, f"redis://bob:secret@{LOCAL}:{redis.port}", Script("page")).startswith("NOPERM")


def test_password_file_is_read_at_each_connection(tmp_path, link, dial):
    file = tmp_path / "password"
    with Redis(tmp_path / "data", password="first") as redis:
        made = link(f"redis://:other@{LOCAL}:{redis.port}", password_file=file)
        assert words_of(dial, None, made=made).startswith("[Errno 2] No such file or directory")
        file.write_text("first\n")
        dial(None, made=made)
        redis.call("CONFIG", "SET", "requirepass", "second")
        assert words_of(dial, None, made=made).startswith("WRONGPASS")
        file.write_text("second\r\n")
        dial(None, made=made)
        file.write_text("")
        assert words_of(dial, None, made=made).startswith("WRONGPASS")
        file.unlink()
        file.mkdir()
        assert words_of(dial, None, made=made).startswith("[Errno 21] Is a directory")


def test_password_file_holds_bytes(tmp_path, dial):
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe \n")
    with Redis(tmp_path / "data") as redis:
        redis.call("ACL", "SETUSER", "bob", "on", b">\xff\xfe ", "~*", "+@all")
        dial(f"redis://bob:x@{LOCAL}:{redis.port}", password_file=file)


def test_too_many_clients(tmp_path, dial):
    with Redis(tmp_path / "data", maxclients=1) as redis:
        dial(redis.url)
        said = words_of(dial, redis.url, Script("page"))
        assert said in ("ERR max number of clients reached", "Lost connection")


# Servers that cannot be used


class Says(Protocol):
    """A server with one reply to everything; if that is empty, it is silent."""

    words = b""

    def dataReceived(self, data):
        self.transport.write(self.words)


@pytest.fixture
def says(loop):
    """A function that starts a server with one reply and returns its URL."""
    ports = []

    def make(words):
        factory = Factory.forProtocol(type("Says", (Says,), {"words": words}))
        factory.noisy = False
        ports.append(loop.listenTCP(0, factory, interface=LOCAL))
        return f"redis://{LOCAL}:{ports[-1].getHost().port}"

    yield make
    for port in ports:
        wait_in(loop, port.stopListening())
    for _ in range(2):
        turn(loop)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING Redis is loading the dataset in memory"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the server is not a Redis"),
        (b"", "it does not answer"),
    ],
)
def test_unusable_server(says, dial, said, words):
    assert words_of(dial, says(said), Script("page")) == words


def test_server_that_disconnects(says, dial, monkeypatch):
    monkeypatch.setattr(Says, "dataReceived", lambda self, _: self.transport.loseConnection())
    assert words_of(dial, says(b""), Script("page")) == "Lost connection"


def test_connection_refused(tmp_path, dial):
    with Redis(tmp_path / "data") as redis:
        redis.kill()
        assert "refused" in words_of(dial, redis.url)


def test_connection_times_out(dial, monkeypatch):
    monkeypatch.setattr(redis_link, "REDIS_CONNECT_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((LOCAL, 0))
        listening.listen(0)
        stack.enter_context(socket.create_connection(listening.getsockname()))  # the backlog is full
        assert "timeout" in words_of(dial, f"redis://{LOCAL}:{listening.getsockname()[1]}")


def test_unknown_host(dial, loop, monkeypatch):
    class Resolver:
        def resolveHostName(self, receiver, name, *args, **kwargs):
            receiver.resolutionBegan(None)
            receiver.resolutionComplete()

    monkeypatch.setattr(type(loop), "nameResolver", Resolver())
    with pytest.raises(DNSLookupError):
        dial("redis://nobody.invalid")


def test_cancelled_dial(says, link, loop):
    made = link(says(b""))
    dialling = made.dial(Script("page"))
    for _ in range(5):
        turn(loop)
    dialling.cancel()
    with pytest.raises(defer.CancelledError):
        wait_in(loop, dialling)


# TLS


@pytest.fixture
def secure(one, tmp_path):
    (tmp_path / "tls").mkdir()
    certificate_for(tmp_path / "tls")
    with Proxy(one.port, tls=tmp_path / "tls") as proxy:
        yield proxy


def test_trusted_certificate(secure, dial, loop, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls" / "cert.pem"))
    connection = dial(secure.url(), Script("page"))
    assert wait_in(loop, connection.ask("PING")) == b"PONG"
    asked = connection.ask("XREAD", "BLOCK", 0, "STREAMS", "x", "0-0")
    secure.cut()
    with pytest.raises(Lost):
        wait_in(loop, asked)
    connection.drop()  # may be repeated after the end


def test_certificate_for_another_name(secure, dial, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls" / "cert.pem"))
    said = words_of(dial, secure.url(host="localhost"), Script("page"))
    assert said == "its certificate is for another name"


def test_untrusted_certificate(secure, dial):
    assert words_of(dial, secure.url(), Script("page")).startswith("no TLS: certificate verify failed")


def test_server_without_tls(one, dial):
    assert words_of(dial, f"rediss://{LOCAL}:{one.port}", Script("page")) == "it does not answer"


def test_server_that_answers_in_plain_text(says, dial):
    url = says(b"HTTP/1.1 400 Bad Request\r\n\r\n").replace("redis:", "rediss:")
    assert words_of(dial, url, Script("page")).startswith("no TLS: ")


# Redirects


def test_unreachable_primary_falls_back_to_the_address(one, link, dial, says):
    made = link(one.url)
    silent = int(says(b"").rpartition(":")[2])
    full = int(says(b"-ERR max number of clients reached\r\n").rpartition(":")[2])
    for elsewhere in (free_port(), silent, full):
        made.refused(None, RedisRefused(f"MOVED 1 {LOCAL}:{elsewhere}"))
        words_of(dial, None, Script("page"), made=made)
        connection = dial(None, Script("page"), made=made)
        assert connection.transport.getPeer().port == one.port


def test_redirect_is_remembered(one, link, dial, loop, tmp_path):
    with Redis(tmp_path / "other") as other:
        made = link(one.url)
        wait_in(loop, made.refused(None, RedisRefused(f"MOVED 1 {LOCAL}:{other.port}")))
        assert {dial(None, made=made).transport.getPeer().port for _ in range(2)} == {other.port}
