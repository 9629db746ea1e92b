"""Sanctions and cleared rooms in Redis: every node acts on them, whatever it has missed."""

import pytest
from support.redises import Proxy, Redis, each_binary, until, wait_in

from chatd.room.log import LogUnavailable, Page
from chatd.room.moderation import Sanction, SanctionKind, Visitor
from chatd.store.redis import store as redis_store

EXACT = {"stream-node-max-entries": 1}
"""Makes Redis trim the feed to its exact length, since it removes whole nodes of a stream."""


@each_binary
def redis(request, tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis"), binary=request.param) as server:
        yield server


@pytest.fixture
def two(node, redis):
    redis.flush()
    return node(redis.url), node(redis.url)


def ban(word, kind="ban"):
    return Sanction.parse({"kind": kind, "username": word}, word, 0)


def add(node, word):
    wait_in(node.loop, node.store.sanction(ban(word)))


def lift(node, *words):
    wait_in(node.loop, node.store.lift(words))


def fails(node, deferred, words):
    with pytest.raises(LogUnavailable, match=words):
        wait_in(node.loop, deferred)


def known(node):
    return [sanction.id for sanction in node.store.sanctions]


def knows(node, *words):
    """Wait until a node knows exactly these sanctions."""
    until(node.loop, lambda: known(node) == [*words], f"the node knows {known(node)}")


def test_sanction_is_in_force_on_all_nodes(two):
    """A node acts on its own sanction when it is stored, and the other one learns of it from the feed."""
    one, other = two
    heard = []
    other.store.sanctions.follow(heard.append)
    add(one, "ann")
    assert known(one) == ["ann"]
    knows(other, "ann")
    assert heard == [ban("ann")]
    assert other.store.sanctions.find(SanctionKind.BAN, "main", Visitor("Ann", None, None), 0) == ban("ann")
    lift(other, "ann", "unknown")
    assert known(other) == []
    knows(one)
    assert one.events == other.events == []


def test_new_node_knows_the_sanctions(two, node, redis):
    add(two[0], "ann")
    add(two[0], "bob")
    lift(two[1], "bob")
    assert known(node(redis.url)) == ["ann"]


def test_node_that_was_away_catches_up(redis, node):
    """It reads in the feed what it missed."""
    redis.flush()
    with Proxy(redis.port) as proxy:
        far, near = node(proxy.url()), node(redis.url)
        add(near, "ann")
        knows(far, "ann")
        proxy.refuse()
        proxy.cut()
        far.down()
        add(near, "bob")
        lift(near, "ann")
        fails(far, far.store.sanction(ban("eve")), "session|connection|reached")
        fails(far, far.store.list_rooms("", 9), "session|connection|reached")
        proxy.go_on()
        far.up()
        knows(far, "bob")


def test_connection_is_lost_before_the_answer(redis, node):
    """The room may be cleared, and the operator looks."""
    redis.flush()
    with Proxy(redis.port) as proxy:
        far = node(proxy.url())
        proxy.refuse()
        asked = far.store.clear_room("none")
        proxy.cut()
        fails(far, asked, ".")
        proxy.go_on()
        far.up()


def test_node_that_missed_the_feed_reads_all(tmp_path, binary, node, monkeypatch):
    """The feed has dropped what it missed, so it reads the whole set."""
    monkeypatch.setattr(redis_store, "FEED_LENGTH", 5)
    with Redis(tmp_path / "data", binary=binary, **EXACT) as redis, Proxy(redis.port) as proxy:
        far, near = node(proxy.url()), node(redis.url)
        add(near, "ann")
        knows(far, "ann")
        proxy.refuse()
        proxy.cut()
        far.down()
        add(near, "bob")
        lift(near, "ann")
        for number in range(20):
            near.post(f"{number}")
        proxy.go_on()
        far.up()
        knows(far, "bob")


def test_lost_log_has_no_sanctions(two, redis):
    """Whatever Redis has lost is not in force, on any node."""
    one, other = two
    add(one, "ann")
    knows(other, "ann")
    redis.flush()
    knows(one)
    knows(other)
    add(one.up(), "bob")
    knows(other, "bob")


@pytest.mark.parametrize("act", [lambda store: store.sanction(ban("ann")), lambda store: store.clear_room("main")])
def test_moderation_of_a_log_that_was_lost(two, redis, act):
    """The node has not noticed yet that the log is another one."""
    one, _ = two
    redis.call("HSET", "{chatd}:log", "epoch", "abcdef")
    fails(one, act(one.store), "the log has lost messages")
    one.up()
    wait_in(one.loop, act(one.store))


def test_clear_and_lift_in_full_memory(two, redis):
    """Redis has no memory for one more sanction, and is still able to remove."""
    one, other = two
    add(one, "ann")
    knows(other, "ann")
    redis.call("CONFIG", "SET", "maxmemory", "1")
    fails(one, one.store.sanction(ban("bob")), "OOM")
    assert "cannot be written" in one.store.fault
    lift(one, "ann")
    assert wait_in(one.loop, one.store.clear_room("main")) == 2
    redis.call("CONFIG", "SET", "maxmemory", "0")
    knows(other)
    until(one.loop, lambda: ("trimmed", "main", 3) in other.events)
    assert other.read() == Page([], first=3, head=2)


def test_change_that_the_feed_does_not_reach(two, monkeypatch):
    """The session ends between the reply and the feed: the change may be stored."""
    one, _ = two
    with monkeypatch.context() as patch:
        patch.setattr("chatd.store.redis.feed.Feed.when", lambda self, seq, act, give_up: give_up())
        fails(one, one.store.sanction(ban("ann")), "the feed has not reached the change, which may be stored")
    knows(one, "ann")


def test_rooms_in_many_pieces(two, monkeypatch):
    monkeypatch.setattr(redis_store, "SCANNED", 2)
    monkeypatch.setattr(redis_store, "SUMMARIES", 3)
    one, other = two
    names = [f"r{number:03}" for number in range(600)]  # more than a small hash holds
    for name in names:
        one.start("hi", room=name)
    one.settle()
    found, after = [], ""
    while page := wait_in(other.loop, other.store.list_rooms(after, 250)):
        found += page
        after = page[-1].name
    assert [room.name for room in found] == ["main", *names]
    assert {room[1:4] for room in found[1:]} == {(1, 1, 5)}


def test_older_node_ignores_sanctions(two, redis):
    """Every entry of the feed has a room, which older versions read."""
    add(two[0], "ann")
    ((_, flat),) = redis.call("XREVRANGE", "{chatd}:feed", "+", "-", "COUNT", 1)
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    assert fields.keys() == {b"e", b"r", b"s", b"v"}
    assert fields[b"r"] == b""
