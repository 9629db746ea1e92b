"""The way to a Redis: addresses, connections that say who they are, and what becomes of those that are silent."""

import contextlib
import socket

import pytest
from support.redises import LOCAL, FastClock, Proxy, Redis, each_binary, free_port, turn, wait_in
from support.servers import certificate_for
from twisted.internet import defer
from twisted.internet.error import ConnectError, ConnectionDone, DNSLookupError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.tcp import Client
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from chatd.store.redis import link as redis_link
from chatd.store.redis.link import Link, Lost, RedisAddress, RedisConnection, Refusal, Script, code_of, why


@pytest.fixture
def link(loop):
    """What makes links, in a hurry; nothing is left of them in the end."""

    def make(url, **options):
        made = Link(RedisAddress.parse(url), loop, **options)
        made.clock = FastClock(loop)
        return made

    yield make
    assert loop.getDelayedCalls() == []
    assert [reader for reader in loop.getReaders() if isinstance(reader, Client)] == []


@pytest.fixture
def dial(loop, link):
    """What dials, and answers the connection, or raises."""
    connections = []

    def make(url, *scripts, made=None, **options):
        made = made or link(url, **options)
        connections.append(wait_in(loop, made.dial(*scripts)))
        return connections[-1]

    yield make
    for connection in connections:
        wait_in(loop, connection.drop())


def words_of(dial, *args, **options):
    """In what words dialling fails."""
    try:
        dial(*args, **options)
    except (*Lost, *redis_link.TlsErrors, Refusal):
        return why(Failure())
    raise AssertionError("it was let in")


# Addresses


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("redis://h", ("h", 6379, 0, None, None, False), "h:6379"),
        ("rediss://h/", ("h", 6379, 0, None, None, True), "h:6379"),
        ("redis://redis.example.com:7000/3", ("redis.example.com", 7000, 3, None, None, False), None),
        ("redis://[::1]:7000/0", ("::1", 7000, 0, None, None, False), "[::1]:7000"),
        ("redis://10.0.0.1/15", ("10.0.0.1", 6379, 15, None, None, False), "10.0.0.1:6379"),
        ("redis://:secret@h", ("h", 6379, 0, None, "secret", False), "h:6379"),
        ("rediss://ann:secret@h:1/0", ("h", 1, 0, "ann", "secret", True), "h:1"),
        ("redis://a%40b:p%2F%3A%40%25%C3%A4@h", ("h", 6379, 0, "a@b", "p/:@%ä", False), "h:6379"),
        ("redis://:p+p@h", ("h", 6379, 0, None, "p+p", False), None),
    ],
)
def test_an_address_is_read(url, address, text):
    found = RedisAddress.parse(url)
    assert found == address
    assert text in (None, str(found))
    assert "secret" not in str(found)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis:",
        "redis://",
        "redis:///0",
        "http://h",
        "h:6379",
        "redis://h:port",
        "redis://h:65536",
        "redis://h:-1",
        "redis://[::1",
        "redis://h/x",
        "redis://h/0/1",
        "redis://h/123456",
        "redis://h/²",
        "redis://h?db=1",
        "redis://h/0#x",
        "redis://:secret/x@h",
        "redis://:sec?ret@h",
        "redis://:sec#ret@h",
        "redis://ann:[secret@h",
    ],
)
def test_what_is_no_address_is_refused_in_words_without_the_password(url):
    with pytest.raises(ValueError, match=r"^is no redis://HOST:PORT/DATABASE$"):
        RedisAddress.parse(url)


@pytest.mark.parametrize("url", ["redis://ann@h", "redis://ann:@h"])
def test_a_user_without_a_password_is_refused(url):
    with pytest.raises(ValueError, match=r"^names a user and no password: redis://USER:PASSWORD@HOST, or CHATD_"):
        RedisAddress.parse(url)


def test_a_user_may_be_named_alone_if_the_password_is_elsewhere():
    address = RedisAddress.parse("rediss://ann%40x@h/3", password_elsewhere=True)
    assert address == RedisAddress("h", 6379, 3, "ann@x", None, tls=True)


# Words


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("ERR Error running script (call to f_02): @user_script:118: @user_script: 118: -OOM command not", "OOM"),
        ("ERR Error running script (call to f_02): @user_script:1: WRONGTYPE Operation against a key", "WRONGTYPE"),
        ("NOSCRIPT No matching script. Please use EVAL.", "NOSCRIPT"),
        ("READONLY You can't write against a read only replica. script: 1f, on @user_script:1.", "READONLY"),
        ("MISCONF Redis is configured to save RDB snapshots", "MISCONF"),
        ("ERR unknown command", "ERR"),
        ("", "ERR"),
    ],
)
def test_a_refusal_has_a_code_wherever_redis_puts_it(text, code):
    assert code_of(Failure(Refusal(text))) == code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refusal("WRONGPASS invalid"), "WRONGPASS invalid"),
        (defer.TimeoutError(), "it does not answer"),
        (redis_link.VerificationError(errors=[]), "its certificate is for another name"),
        (redis_link.SSL.Error([("a", "b", "bad thing"), ("c", "d", "worse")]), "no TLS: bad thing worse"),
        (redis_link.SSL.Error(), "no TLS: it hung up"),
        (ConnectError(string="no\n  way."), "An error occurred while connecting: no way"),
        (FileNotFoundError(2, "No such file", "/x"), "[Errno 2] No such file: '/x'"),
        (KeyError(), "KeyError"),
    ],
)
def test_it_is_said_why_something_failed(error, words):
    assert why(Failure(error)) == words


def test_a_script_is_known_by_what_redis_knows_it_by(one):
    for name in ("open", "append", "page", "trim"):
        script = Script(name)
        assert one.call("SCRIPT", "LOAD", script.text) == script.sha.encode()
        assert script.text.startswith(b"-- The code that the scripts share")


# A connection


class Line:
    """A connection, the time, and what becomes of what it asks."""

    def __init__(self):
        self.clock = Clock()
        self.connection = RedisConnection(self.clock)
        self.transport = StringTransport()
        self.connection.makeConnection(self.transport)
        self.answers = []

    def ask(self, *words):
        self.connection.ask(*words).addBoth(self.answers.append)

    def end(self):
        self.connection.connectionLost(Failure(ConnectionDone()))

    @property
    def dropped(self):
        return self.transport.disconnected

    def look(self, seconds):
        self.clock.advance(seconds)
        self.connection.drop_if_overdue()
        return self.dropped


@pytest.fixture
def line():
    return Line()


def test_what_is_asked_is_answered_in_order(line):
    line.ask("GET", "a", 7, b"\xff")
    line.ask("PING")
    assert line.transport.value().startswith(b"*4\r\n$3\r\nGET\r\n$1\r\na\r\n$1\r\n7\r\n$1\r\n\xff\r\n*1\r\n")
    line.connection.dataReceived(b"$5\r\n00")
    line.connection.dataReceived(b"123\r\n-ERR no\r\n")
    assert line.answers[0] == b"00123"
    assert line.answers[1].check(Refusal)


def test_a_silence_is_ended(line):
    line.ask("PING")
    assert not line.look(redis_link.REPLY_SECONDS)
    assert line.look(0.1)


def test_who_asks_nothing_may_be_silent(line):
    assert not line.look(1000)
    line.ask("PING")
    assert not line.look(1)
    line.connection.dataReceived(b"+PONG\r\n")
    assert not line.look(1000)


def test_a_reply_that_comes_gives_the_next_its_time(line):
    line.ask("PING")
    line.clock.advance(3)
    line.ask("PING")
    line.clock.advance(1)
    line.connection.dataReceived(b"+PONG\r\n")
    assert not line.look(redis_link.REPLY_SECONDS)
    assert line.look(0.1)


def test_who_asks_more_does_not_make_a_silence_shorter_or_longer(line):
    line.ask("PING")
    for _ in range(5):
        assert not line.look(1)
        line.ask("PING")
    assert line.look(0.1)


def test_a_wait_may_be_longer(line):
    line.connection.patience = 60
    line.ask("XREAD")
    assert not line.look(60)
    assert line.look(0.1)


def test_all_that_was_asked_fails_when_the_connection_ends(line):
    line.ask("PING")
    line.ask("PING")
    line.end()
    assert all(answer.check(*Lost) for answer in line.answers)
    assert len(line.answers) == 2
    line.ask("PING")
    assert line.answers[2].check(*Lost)


def test_it_is_told_when_the_connection_has_ended_also_afterwards(line):
    told = []
    line.connection.whenDisconnected().addCallback(told.append)
    dropped = line.connection.drop()
    assert (told, dropped.called, line.dropped) == ([], False, True)
    line.end()
    assert dropped.called
    line.connection.whenDisconnected().addCallback(told.append)
    assert told == [line.connection] * 2
    assert line.connection.drop().called


def test_what_is_no_redis_is_dropped(line):
    line.ask("PING")
    line.ask("PING")
    line.connection.dataReceived(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert line.dropped
    assert why(line.answers[0]) == "the server is no Redis"
    line.end()
    assert len(line.answers) == 2


# Being let in


def test_a_database_is_chosen(one, dial, loop):
    connection = dial(f"redis://{LOCAL}:{one.port}/3")
    wait_in(loop, connection.ask("SET", "key", "text"))
    assert "db=3" in one.call("CLIENT", "LIST").decode()
    assert one.call("GET", "key") is None


def test_no_database_is_chosen_where_it_is_the_first(one, dial):
    dial(one.url)
    assert "cmdstat_select" not in one.info("commandstats")


def test_scripts_are_loaded(one, dial, loop):
    script = Script("page")
    connection = dial(one.url, script)
    keys = ["{chatd}:log", "{chatd}:heads", "{chatd}:feed", "{chatd}:room:main"]
    assert wait_in(loop, connection.run(script, keys, "main", "", 5)) == [None, None, 1, 0, []]


@each_binary
def guarded(request, tmp_path):
    options = {"user": ("ann", "sec:ret/@")} if request.node.callspec.params.get("user") else {"password": "sec ret"}
    with Redis(tmp_path / "data", binary=request.param, **options) as server:
        yield server


@pytest.mark.parametrize("user", [False, True], ids=["password", "user"])
def test_who_has_the_password_is_let_in(guarded, dial, loop, user):
    connection = dial(guarded.url)
    assert wait_in(loop, connection.ask("ACL", "WHOAMI")) == (b"ann" if user else b"default")


@pytest.mark.parametrize(
    ("credentials", "words"),
    [("", "NOAUTH"), (":wrong@", "WRONGPASS"), ("ann:secret@", "WRONGPASS")],
)
def test_who_has_not_is_refused_in_redis_own_words(tmp_path, dial, credentials, words):
    with Redis(tmp_path / "data", password="secret") as redis:
        said = words_of(dial, f"redis://{credentials}{LOCAL}:{redis.port}", Script("page"))
        assert said.startswith(words)
        assert "secret" not in said
        assert "wrong" not in said


def test_a_user_who_may_not_is_refused_in_redis_own_words(tmp_path, dial):
    with Redis(tmp_path / "data") as redis:
        redis.call("ACL", "SETUSER", "bob", "on", ">secret", "~*", "+@all", "-script")
        assert words_of(dial, f"redis://bob:secret@{LOCAL}:{redis.port}", Script("page")).startswith("NOPERM")


def test_a_password_in_a_file_is_read_anew_at_each_connection(tmp_path, link, dial):
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


def test_a_password_in_a_file_is_bytes(tmp_path, dial):
    file = tmp_path / "password"
    file.write_bytes(b"\xff\xfe \n")
    with Redis(tmp_path / "data") as redis:
        redis.call("ACL", "SETUSER", "bob", "on", b">\xff\xfe ", "~*", "+@all")
        dial(f"redis://bob:x@{LOCAL}:{redis.port}", password_file=file)


def test_a_server_that_lets_no_more_in_says_so(tmp_path, dial):
    with Redis(tmp_path / "data", maxclients=1) as redis:
        dial(redis.url)
        said = words_of(dial, redis.url, Script("page"))
        assert said in ("ERR max number of clients reached", "Lost connection")


# Where it cannot be reached


class Says(Protocol):
    """A server that answers everything with the same, or, if that is nothing, not at all."""

    words = b""

    def dataReceived(self, data):
        self.transport.write(self.words)


@pytest.fixture
def says(loop):
    """What starts such a server, and answers its URL."""
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
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the server is no Redis"),
        (b"", "it does not answer"),
    ],
)
def test_a_server_that_is_of_no_use_is_left(says, dial, said, words):
    assert words_of(dial, says(said), Script("page")) == words


def test_a_server_that_hangs_up_is_left(says, dial, monkeypatch):
    monkeypatch.setattr(Says, "dataReceived", lambda self, _: self.transport.loseConnection())
    assert words_of(dial, says(b""), Script("page")) == "Lost connection"


def test_where_nobody_listens(tmp_path, dial):
    with Redis(tmp_path / "data") as redis:
        redis.kill()
        assert "refused" in words_of(dial, redis.url)


def test_where_nobody_lets_in(dial, monkeypatch):
    monkeypatch.setattr(redis_link, "CONNECT_SECONDS", 0.05)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((LOCAL, 0))
        listening.listen(0)
        stack.enter_context(socket.create_connection(listening.getsockname()))  # now it is full
        assert "timeout" in words_of(dial, f"redis://{LOCAL}:{listening.getsockname()[1]}")


def test_a_name_that_does_not_exist(dial, loop, monkeypatch):
    class Resolver:
        def resolveHostName(self, receiver, name, *args, **kwargs):
            receiver.resolutionBegan(None)
            receiver.resolutionComplete()

    monkeypatch.setattr(type(loop), "nameResolver", Resolver())
    with pytest.raises(DNSLookupError):
        dial("redis://nobody.invalid")


def test_a_connection_that_is_not_waited_for_any_more_is_dropped(says, link, loop):
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


def test_a_server_with_a_certificate_for_its_name_is_spoken_to(secure, dial, loop, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls" / "cert.pem"))
    connection = dial(secure.url(), Script("page"))
    assert wait_in(loop, connection.ask("PING")) == b"PONG"
    asked = connection.ask("XREAD", "BLOCK", 0, "STREAMS", "x", "0-0")
    secure.cut()
    with pytest.raises(Lost):
        wait_in(loop, asked)
    connection.drop()  # also when it has ended


def test_a_certificate_for_another_name_is_not_taken(secure, dial, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls" / "cert.pem"))
    said = words_of(dial, secure.url(host="localhost"), Script("page"))
    assert said == "its certificate is for another name"


def test_a_certificate_that_nobody_trusts_is_not_taken(secure, dial):
    assert words_of(dial, secure.url(), Script("page")).startswith("no TLS: certificate verify failed")


def test_a_server_without_tls_is_not_taken(one, dial):
    assert words_of(dial, f"rediss://{LOCAL}:{one.port}", Script("page")) == "it does not answer"


def test_a_server_that_answers_in_something_else_than_tls_is_not_taken(says, dial):
    url = says(b"HTTP/1.1 400 Bad Request\r\n\r\n").replace("redis:", "rediss:")
    assert words_of(dial, url, Script("page")).startswith("no TLS: ")


# Where the primary is


class Told:
    """A connection whose server tells its role."""

    def __init__(self, role=None):
        self.role = role

    def ask(self, *words):
        assert words == ("ROLE",)
        return defer.succeed(self.role)


@pytest.mark.parametrize(
    ("text", "role", "primary"),
    [
        ("MOVED 12283 10.0.0.7:7000", None, ("10.0.0.7", 7000)),
        ("MOVED 12283 ::1:7000", None, ("::1", 7000)),
        ("MOVED 12283 :7000", None, ("h", 7000)),
        ("READONLY You can't write", [b"slave", b"10.0.0.8", 7001, b"connected", 5], ("10.0.0.8", 7001)),
        ("ERR x: -READONLY You can't write", [b"slave", b"h2", 7001, b"connect", 5], ("h2", 7001)),
        ("READONLY You can't write", [b"master", 5, []], None),
        ("OOM command not allowed", None, None),
    ],
)
def test_a_refusal_may_say_where_the_primary_is(loop, text, role, primary):
    link = Link(RedisAddress.parse("redis://h"), loop)
    wait_in(loop, link.refused(Told(role), Refusal(text)))
    assert link.primary == primary


def test_a_port_at_the_same_host_is_that_of_the_one_who_said_it(loop):
    link = Link(RedisAddress.parse("redis://h"), loop)
    for text, primary in [("MOVED 1 h2:7000", ("h2", 7000)), ("MOVED 1 :7001", ("h2", 7001))]:
        wait_in(loop, link.refused(Told(), Refusal(text)))
        assert link.primary == primary


def test_a_primary_that_cannot_be_reached_is_looked_for_at_the_address_again(one, link, dial, says):
    made = link(one.url)
    silent = int(says(b"").rpartition(":")[2])
    full = int(says(b"-ERR max number of clients reached\r\n").rpartition(":")[2])
    for elsewhere in (free_port(), silent, full):
        made.refused(Told(), Refusal(f"MOVED 1 {LOCAL}:{elsewhere}"))
        words_of(dial, None, Script("page"), made=made)
        connection = dial(None, Script("page"), made=made)
        assert connection.transport.getPeer().port == one.port


def test_it_stays_at_the_primary_that_it_was_sent_to(one, link, dial, loop, tmp_path):
    with Redis(tmp_path / "other") as other:
        made = link(one.url)
        wait_in(loop, made.refused(Told(), Refusal(f"MOVED 1 {LOCAL}:{other.port}")))
        assert {dial(None, made=made).transport.getPeer().port for _ in range(2)} == {other.port}
