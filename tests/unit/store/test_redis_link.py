"""Redis addresses, connections and redirects, without a server."""

import pytest
from support.helpers import result_of
from twisted.internet import defer
from twisted.internet.error import ConnectError, ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from chatd.store.redis import link as redis_link
from chatd.store.redis.link import Link, Lost, RedisAddress, RedisConnection, RedisRefused, code_of, remedy, why

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
def test_parse_address(url, address, text):
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
        "redis://h:0",
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
def test_parse_invalid_address(url):
    """The error never contains the password."""
    with pytest.raises(ValueError, match=r"^is not a redis://HOST:PORT/DATABASE$"):
        RedisAddress.parse(url)


@pytest.mark.parametrize("url", ["redis://ann@h", "redis://ann:@h"])
def test_user_without_password(url):
    with pytest.raises(ValueError, match=r"^names a user and no password: redis://USER:PASSWORD@HOST, or CHATD_"):
        RedisAddress.parse(url)


def test_user_with_password_elsewhere():
    address = RedisAddress.parse("rediss://ann%40x@h/3", password_elsewhere=True)
    assert address == RedisAddress("h", 6379, 3, "ann@x", None, tls=True)


# Errors


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
def test_code_of_a_refusal(text, code):
    assert code_of(Failure(RedisRefused(text))) == code


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RedisRefused("WRONGPASS invalid"), "WRONGPASS invalid"),
        (defer.TimeoutError(), "it does not answer"),
        (redis_link.VerificationError(errors=[]), "its certificate is for another name"),
        (redis_link.SSL.Error([("a", "b", "bad thing"), ("c", "d", "worse")]), "no TLS: bad thing worse"),
        (redis_link.SSL.Error(), "no TLS: it hung up"),
        (ConnectError(string="no\n  way."), "An error occurred while connecting: no way"),
        (FileNotFoundError(2, "No such file", "/x"), "[Errno 2] No such file: '/x'"),
        (KeyError(), "KeyError"),
    ],
)
def test_description_of_a_failure(error, words):
    assert why(Failure(error)) == words


@pytest.mark.parametrize(
    ("error", "act"),
    [
        (RedisRefused("WRONGTYPE Operation against a key"), "another program uses a key"),
        (
            RedisRefused("ERR Error running script (call to f_02): @user_script:1: WRONGTYPE Operation"),
            "another program",
        ),
        (RedisRefused("ERR DB index is out of range"), "name a database that it has"),
        (RedisRefused("ERR SELECT is not allowed in cluster mode"), "name database 0"),
        (RedisRefused("OOM command not allowed when used memory > 'maxmemory'."), "more memory"),
        (RedisRefused("MISCONF Errors writing to the AOF file"), "write to its disk"),
        (RedisRefused("NOREPLICAS Not enough good replicas to write."), "start its replicas"),
        (RedisRefused("NOAUTH Authentication required."), "give its password"),
        (RedisRefused("WRONGPASS invalid username-password pair"), "correct the user or the password"),
        (
            RedisRefused("NOPERM this user has no permissions to run the 'xadd' command"),
            "grant its user the permissions",
        ),
        (RedisRefused("LOADING Redis is loading the dataset in memory"), "wait until"),
        (RedisRefused("BUSY Redis is busy running a script."), "SCRIPT KILL"),
        (RedisRefused("ERR unknown command"), "correct it"),
        (ConnectError(), "start it"),
        (redis_link.SSL.Error(), "correct its certificate"),
        (FileNotFoundError(2, "No such file", "/x"), "correct --store-password-file"),
    ],
)
def test_remedy_of_a_failure(error, act):
    """Only a Redis that does not answer needs to be started."""
    assert act in remedy(Failure(error))
    assert ("start it, or" in remedy(Failure(error))) == isinstance(error, ConnectError)


# A connection


class Line:
    """A connection with a clock and the answers to its requests."""

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


def test_replies_arrive_in_order(line):
    line.ask("GET", "a", 7, b"\xff")
    line.ask("PING")
    assert line.transport.value().startswith(b"*4\r\n$3\r\nGET\r\n$1\r\na\r\n$1\r\n7\r\n$1\r\n\xff\r\n*1\r\n")
    line.connection.dataReceived(b"$5\r\n00")
    line.connection.dataReceived(b"123\r\n-ERR no\r\n")
    assert line.answers[0] == b"00123"
    assert line.answers[1].check(RedisRefused)


def test_silent_connection_is_dropped(line):
    line.ask("PING")
    assert not line.look(redis_link.REPLY_SECONDS)
    assert line.look(0.1)


def test_idle_connection_is_kept(line):
    assert not line.look(1000)
    line.ask("PING")
    assert not line.look(1)
    line.connection.dataReceived(b"+PONG\r\n")
    assert not line.look(1000)


def test_reply_restarts_the_time_limit(line):
    line.ask("PING")
    line.clock.advance(3)
    line.ask("PING")
    line.clock.advance(1)
    line.connection.dataReceived(b"+PONG\r\n")
    assert not line.look(redis_link.REPLY_SECONDS)
    assert line.look(0.1)


def test_request_does_not_restart_the_time_limit(line):
    line.ask("PING")
    for _ in range(5):
        assert not line.look(1)
        line.ask("PING")
    assert line.look(0.1)


def test_idle_connection_is_kept_alive(line):
    """A request is sent if no reply is due, because Redis may close idle connections after a second."""
    sent = line.transport.value
    line.connection.keep_alive()
    assert sent().count(b"EXISTS") == 1
    line.connection.keep_alive()
    assert sent().count(b"EXISTS") == 1
    line.connection.dataReceived(b":1\r\n")
    line.connection.keep_alive()
    assert sent().count(b"EXISTS") == 2
    line.end()
    line.connection.keep_alive()


def test_longer_time_limit(line):
    line.connection.patience = 60
    line.ask("XREAD")
    assert not line.look(60)
    assert line.look(0.1)


def test_lost_connection_fails_requests(line):
    line.ask("PING")
    line.ask("PING")
    line.end()
    assert all(answer.check(*Lost) for answer in line.answers)
    assert len(line.answers) == 2
    line.ask("PING")
    assert line.answers[2].check(*Lost)


def test_when_disconnected_also_fires_afterwards(line):
    told = []
    line.connection.whenDisconnected().addCallback(told.append)
    dropped = line.connection.drop()
    assert (told, dropped.called, line.dropped) == ([], False, True)
    line.end()
    assert dropped.called
    line.connection.whenDisconnected().addCallback(told.append)
    assert told == [line.connection] * 2
    assert line.connection.drop().called


def test_reply_that_is_not_redis(line):
    line.ask("PING")
    line.ask("PING")
    line.connection.dataReceived(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert line.dropped
    assert why(line.answers[0]) == "the server is not a Redis"
    line.end()
    assert len(line.answers) == 2


# Redirects


class RoleConnection:
    """A connection to a server with a role."""

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
def test_refusal_names_the_primary(text, role, primary):
    link = Link(RedisAddress.parse("redis://h"), Clock())
    result_of(link.refused(RoleConnection(role), RedisRefused(text)))
    assert link.primary == primary


def test_redirect_to_a_port_of_the_same_host():
    link = Link(RedisAddress.parse("redis://h"), Clock())
    for text, primary in [("MOVED 1 h2:7000", ("h2", 7000)), ("MOVED 1 :7001", ("h2", 7001))]:
        result_of(link.refused(RoleConnection(), RedisRefused(text)))
        assert link.primary == primary
