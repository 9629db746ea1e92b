"""The reports of the machine about real ports and real Redis servers."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from ipaddress import ip_address

import pytest
from support.redises import Proxy, Redis, each_binary
from support.servers import certificate_for

from chatd.operate import machine
from chatd.operate.check import RedisRefused, Server, Unreached
from chatd.operate.machine import ThisMachine

HERE = ThisMachine()


def test_port_that_listens():
    """A port is in use while a socket listens on it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert HERE.listening(port) == [ip_address("127.0.0.1")]
    assert HERE.listening(port) == []


# A Redis


def server(port, *auth, tls=False, database=0, host="127.0.0.1"):
    return Server(host, port, tls, auth, database)


@each_binary
def redis(request, tmp_path):
    with Redis(tmp_path / "redis", binary=request.param, appendonly=True, fsync="always") as redis:
        yield redis


def test_facts_of_a_redis(redis, tmp_path):
    """The role, the persistence and the memory policy are those that the Redis server reports."""
    said = HERE.ask(server(redis.port, database=3))
    assert (said["role"], said["aof_enabled"], said["appendfsync"]) == ("master", "1", "always")
    assert said["maxmemory_policy"] == "noeviction"
    assert tuple(map(int, said["redis_version"].split(".")[:2])) >= (6, 2)
    with Redis(tmp_path / "replica", binary=redis.binary, replica_of=redis, maxmemory_policy="volatile-lru") as replica:
        said = HERE.ask(server(replica.port, host="localhost"))
    assert (said["role"], said["master_host"], said["master_port"]) == ("slave", "127.0.0.1", str(redis.port))
    assert (said["aof_enabled"], said["maxmemory_policy"]) == ("0", "volatile-lru")


def test_redis_user_without_permissions(redis):
    """Facts that the user may not read are omitted."""
    redis.call("ACL", "SETUSER", "none", "on", ">a b", "~*")
    redis.call("ACL", "SETUSER", "some", "on", ">a b", "~*", "+info")
    assert HERE.ask(server(redis.port, "none", "a b")) == {}
    said = HERE.ask(server(redis.port, "some", "a b"))
    assert said["role"] == "master"
    assert "appendfsync" not in said


@pytest.mark.parametrize(
    ("auth", "database", "words"),
    [
        ((), 0, "NOAUTH Authentication required"),
        (("wrong",), 0, "WRONGPASS invalid username-password pair or user is disabled"),
        (("nobody", "right"), 0, "WRONGPASS invalid username-password pair or user is disabled"),
        (("right",), 99, "ERR DB index is out of range"),
    ],
)
def test_redis_that_refuses_the_login(tmp_path, auth, database, words):
    """The error of Redis is the reason of the refusal."""
    with Redis(tmp_path / "redis", password="right") as redis:
        assert HERE.ask(server(redis.port, "right"))["role"] == "master"
        with pytest.raises(RedisRefused) as refused:
            HERE.ask(server(redis.port, *auth, database=database))
    assert str(refused.value) == words


@contextmanager
def says(reply):
    """Run a server that sends one reply, whatever the command, and closes the connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        with ThreadPoolExecutor(1) as thread:
            served = thread.submit(serve)
            yield listening.getsockname()[1]
            served.result()


def test_refusal_is_cut_before_the_command():
    """A refusal does not repeat the arguments of the command, which include the password."""
    line = b"-ERR unknown command `AUTH`, with args beginning with: `secret`\r\n"
    with says(line) as port, pytest.raises(RedisRefused) as refused:
        HERE.ask(server(port, "secret"))
    assert str(refused.value) == "ERR unknown command `AUTH`"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "it closed the connection"),
        (b"$5\r\nab", "it closed the connection"),
        *(
            (data, "the server there is not a Redis, or speaks TLS")
            for data in (b"HTTP/1.1 400 Bad Request\r\n", b":1\r\n")
        ),
    ],
)
def test_server_that_is_no_redis(reply, words):
    """A server that does not speak the protocol of Redis counts as unreached."""
    with says(reply) as port, pytest.raises(Unreached) as unreached:
        HERE.ask(server(port))
    assert str(unreached.value) == words


def unreached(port, **named):
    with pytest.raises(Unreached) as unreached:
        HERE.ask(server(port, **named))
    return str(unreached.value)


def test_redis_that_cannot_be_reached(monkeypatch):
    """The reason is the error of the connection or of the resolver."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setattr(machine, "REDIS_SECONDS", 0.01)
        assert unreached(port) == "it does not answer"
    assert unreached(port) == "Connection refused"
    assert unreached(port, host="a" * 64) == "the host name is not valid"
    assert unreached(port, host="chatd.invalid")  # the words of the resolver


def test_tls_certificate_must_be_trusted_and_match_the_name(tmp_path, monkeypatch):
    certificate_for(tmp_path)
    with Redis(tmp_path / "redis") as redis, Proxy(redis.port, tls=tmp_path) as proxy:
        assert unreached(proxy.port, tls=True) == "no TLS: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert HERE.ask(server(proxy.port, tls=True))["role"] == "master"
        other = "no TLS: Hostname mismatch, certificate is not valid for 'localhost'"
        assert unreached(proxy.port, tls=True, host="localhost") == other
    with says(b"-ERR no TLS here\r\n") as port:
        assert unreached(port, tls=True).startswith("no TLS: ")
