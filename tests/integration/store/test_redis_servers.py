"""The helpers of `support.redises`: servers, replicas, clusters and the proxy."""

import contextlib
import errno
import select
import socket
import ssl
import time

import pytest
from support import needs, redises, servers
from support.redises import Client, Cluster, Proxy, Redis, Refused
from support.servers import certificate_for


@pytest.fixture
def redis(tmp_path, binary):
    with Redis(tmp_path / "data", binary=binary) as server:
        yield server


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_a_server_tests_are_skipped(tmp_path, monkeypatch, ci, outcome):
    """Continuous integration has a server, so there the test fails instead."""
    monkeypatch.setattr(needs, "find", lambda tool: None)
    monkeypatch.setattr(redises.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    assert redises.find_binaries() == {}
    with pytest.raises(outcome, match="redis is missing"):
        Redis(tmp_path / "data", binary=None).start()


# A server


def test_server_replies(redis):
    assert redis.call("PING") == "PONG"
    assert redis.call("SET", "key", b"\0\r\n\xff") == "OK"
    assert redis.call("GET", "key") == b"\0\r\n\xff"
    assert redis.call("GET", "other") is None
    assert redis.call("EVAL", "return {1, {'a', false}, {}}", 0) == [1, [b"a", None], []]
    assert redis.info("replication")["role"] == "master"
    with pytest.raises(Refused, match="NOSCRIPT"):
        redis.call("EVALSHA", "f" * 40, 0)
    redis.flush()
    assert redis.call("DBSIZE") == 0


def test_start_is_quick(one):
    one.kill()
    began = time.perf_counter()
    one.start()
    assert time.perf_counter() - began < 5


def test_restart_is_empty(redis):
    port = redis.port
    for end in (redis.stop, redis.kill):
        redis.call("SET", "key", "text")
        end()
        assert not redis.running
        with pytest.raises(ConnectionRefusedError):
            redis.call("PING")
        redis.start()
        assert redis.port == port
        assert redis.call("DBSIZE") == 0


def test_restart_with_an_append_only_file(tmp_path, binary):
    with Redis(tmp_path / "data", binary=binary, appendonly=True, fsync="always") as redis:
        for end in (redis.stop, redis.kill):
            redis.call("INCR", "key")
            end()
            redis.start()
        assert redis.call("GET", "key") == b"2"


def test_pause_stops_replies(redis):
    with redis.client() as client:
        redis.pause()
        client.send("PING")
        client.socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.reply()
    redis.go_on()
    assert redis.call("PING") == "PONG"


def test_kill_a_paused_server(one):
    one.pause()
    one.kill()
    assert not one.running


def test_kill_leaves_no_child(tmp_path):
    with Redis(tmp_path / "data", appendonly=True, rdb_key_save_delay=1_000_000) as redis:
        for number in range(30):
            redis.call("SET", number, "text")
        redis.call("BGREWRITEAOF")  # would take half a minute
        redis.log.wait("rewriting started by pid")
        began = time.perf_counter()
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("appendonly", [False, True])
def test_roll_back(tmp_path, binary, appendonly):
    with Redis(tmp_path / "data", binary=binary, appendonly=appendonly) as redis:
        redis.call("XADD", "stream", "1-0", "field", "text")
        redis.copy(tmp_path / "copy")
        redis.call("XADD", "stream", "2-0", "field", "text")
        redis.roll_back(tmp_path / "copy")
        assert redis.call("XRANGE", "stream", "-", "+") == [[b"1-0", [b"field", b"text"]]]


def test_password_and_user(tmp_path, binary):
    with Redis(tmp_path / "data", binary=binary, password="a b/@") as redis:
        assert redis.url == f"redis://:a%20b%2F%40@127.0.0.1:{redis.port}/0"
        assert redis.call("PING") == "PONG"
        with Client(redis.port) as client, pytest.raises(Refused, match="NOAUTH"):
            client.call("PING")
        with pytest.raises(Refused, match="WRONGPASS"):
            Client(redis.port, "other")
    with Redis(tmp_path / "other", binary=binary, password="x", user=("ann", "s:1")) as redis:
        assert redis.url == f"redis://ann:s%3A1@127.0.0.1:{redis.port}/0"
        assert redis.call("ACL", "WHOAMI") == b"ann"


def test_directive_of_the_configuration(tmp_path, binary):
    with Redis(tmp_path / "data", binary=binary, maxmemory=1) as redis, pytest.raises(Refused, match="OOM"):
        redis.call("SET", "key", "text")


def test_start_on_a_taken_port(tmp_path, monkeypatch, one):
    ports = [one.port, redises.free_port()]
    monkeypatch.setattr(redises, "free_port", [*reversed(ports)].pop)
    with Redis(tmp_path / "other") as other:
        assert other.port == ports[1]


def test_failed_start_gives_the_reason(tmp_path):
    redis = Redis(tmp_path / "data", nonsense=1)
    with pytest.raises(AssertionError, match="nonsense"):
        redis.start()
    assert not redis.running


# Replicas


def test_replica(tmp_path, redis):
    redis.call("SET", "key", "text")
    with Redis(tmp_path / "replica", binary=redis.binary, replica_of=redis) as replica:
        assert replica.call("GET", "key") == b"text"
        redis.call("SET", "key", "more")
        redis.settle()
        assert replica.call("GET", "key") == b"more"
        with pytest.raises(Refused, match="READONLY"):
            replica.call("SET", "key", "text")
        redis.kill()
        replica.promote()
        assert replica.call("SET", "key", "text") == "OK"
        redis.start()
        redis.follow(replica)
        assert redis.call("GET", "key") == b"text"


# A cluster


def test_cluster_failover(tmp_path, binary):
    with Cluster(tmp_path, binary=binary, appendonly=True) as cluster:
        first, second = cluster.primary, cluster.replica
        assert first.call("SET", "{chatd}", "text") == "OK"
        with pytest.raises(Refused, match=rf"^MOVED \d+ 127.0.0.1:{first.port}$"):
            second.call("SET", "{chatd}", "text")

        cluster.failover()
        assert (cluster.primary, cluster.replica) == (second, first)
        with pytest.raises(Refused, match=rf"^MOVED \d+ 127.0.0.1:{second.port}$"):
            first.call("SET", "{chatd}", "text")
        assert second.call("GET", "{chatd}") == b"text"
        assert second.call("SET", "{chatd}", "more") == "OK"
        second.settle()

        second.kill()
        cluster.failover()
        assert (cluster.primary, cluster.replica) == (first, second)
        assert first.call("GET", "{chatd}") == b"more"
        assert first.call("SET", "{chatd}", "text") == "OK"
        second.start()
        second.log.wait(redises.SYNCED)
        assert second.info("replication")["role"] == "slave"


# A proxy


def test_proxy_forwards_any_size(one, proxy):
    text = b"x" * 3_000_000
    with Client(proxy.port) as client:
        assert client.call("SET", "key", text) == "OK"
        assert client.call("GET", "key") == text
    assert proxy.url() == f"redis://127.0.0.1:{proxy.port}/0"
    assert one.call("GET", "key") == text


def test_proxy_stall(proxy):
    with Client(proxy.port) as client:
        proxy.stall()
        client.send("PING")
        with Client(proxy.port) as late:
            late.send("PING")
            assert client.hears_nothing()
            assert late.hears_nothing()
            proxy.go_on()
            assert client.reply() == "PONG"
            assert late.reply() == "PONG"


def test_proxy_mute(one, proxy):
    """Requests have their effect, and replies arrive later."""
    with Client(proxy.port) as client:
        proxy.mute()
        client.send("SET", "key", "text")
        with one.client() as near:
            while near.call("GET", "key") is None:
                pass
        assert client.hears_nothing()
        proxy.go_on()
        assert client.reply() == "OK"


@pytest.mark.parametrize("stalled", [False, True])
def test_proxy_cut(proxy, stalled):
    with Client(proxy.port) as client:
        assert client.call("PING") == "PONG"
        with contextlib.ExitStack() as stack:
            clients = [client]
            if stalled:
                proxy.stall()
                clients.append(stack.enter_context(Client(proxy.port)))
            proxy.cut()
            for each in clients:
                with pytest.raises(ConnectionResetError):
                    each.reply()
    proxy.go_on()
    with Client(proxy.port) as client:
        assert client.call("PING") == "PONG"


def test_proxy_refuse(proxy):
    with Client(proxy.port) as client:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            Client(proxy.port)
        assert client.call("PING") == "PONG"
        proxy.go_on()
        with Client(proxy.port) as other:
            assert other.call("PING") == "PONG"


def test_proxy_passes_disconnects_on(one, proxy):
    with Client(proxy.port) as client:
        assert client.call("PING") == "PONG"
        one.kill()
        with pytest.raises((EOFError, ConnectionResetError)):
            client.reply()
    with pytest.raises((EOFError, ConnectionResetError)), Client(proxy.port) as client:
        client.reply()


def test_proxy_target(tmp_path, proxy):
    with Redis(tmp_path / "other", password="secret") as other:
        proxy.target = other.port
        with Client(proxy.port, "secret") as client:
            assert client.call("PING") == "PONG"


def test_proxy_tls(tmp_path, one):
    _, trusting = certificate_for(tmp_path)
    with Proxy(one.port, tls=tmp_path) as proxy:
        assert proxy.url(host="localhost") == f"rediss://localhost:{proxy.port}/0"
        with Client(proxy.port) as client, trusting.wrap_socket(client.socket, server_hostname="127.0.0.1") as sock:
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"
            proxy.cut()
            select.select([sock], [], [], servers.LONG)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        for context, host in ((trusting, "localhost"), (ssl.create_default_context(), "127.0.0.1")):
            with Client(proxy.port) as client, pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(client.socket, server_hostname=host)
