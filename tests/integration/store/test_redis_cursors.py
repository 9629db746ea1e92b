"""The cursors of readers outside in Redis: one node reads at a time, and a node that lost its claim moves nothing."""

import pytest
from support.redises import Redis, each_binary, until, wait_in

from chatd.room.cursors import Behind
from chatd.room.log import LogUnavailable
from chatd.store.redis import store as redis_store
from chatd.store.redis.keys import LOG, cursors_key, lease_key
from chatd.store.redis.link import RedisConnection


@each_binary
def redis(request, tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis"), binary=request.param) as server:
        yield server


@pytest.fixture
def two(node, redis):
    redis.flush()
    return node(redis.url), node(redis.url)


def claim(node, word):
    return wait_in(node.loop, node.store.claim("app", word, 60))


def renew(node, word):
    return wait_in(node.loop, node.store.renew("app", word, 60))


def advance(node, word, **cursors):
    return wait_in(node.loop, node.store.advance("app", word, cursors))


def behind(node):
    found, place = wait_in(node.loop, node.store.behind("app", ""))
    while place:
        more, place = wait_in(node.loop, node.store.behind("app", place))
        found = [*found, *more]
    return sorted(found)


def test_one_node_has_a_reader(two, redis):
    """Another node gets the reader when the claim is released, and goes on where the first one stopped."""
    one, other = two
    assert claim(one, "w1")
    assert not claim(other, "w2")
    assert not renew(other, "w2")
    assert renew(one, "w1")
    assert 0 < redis.call("PTTL", lease_key("app")) <= 60_000
    one.post("a", "b", room="tea")
    assert advance(one, "w1", tea=1)
    wait_in(other.loop, other.store.end_claim("app", "w2"))
    assert not claim(other, "w2")
    wait_in(one.loop, one.store.end_claim("app", "w1"))
    assert claim(other, "w2")
    assert behind(other) == [Behind("tea", 1, 2)]


def test_late_node_moves_no_cursor(two, redis):
    """A node whose claim has expired can neither renew it nor move a cursor after another one has claimed."""
    one, other = two
    claim(one, "w1")
    one.post("a", "b", "c", room="tea")
    redis.call("DEL", lease_key("app"))
    assert not renew(one, "w1")
    assert advance(one, "w1", tea=1), "nobody else has claimed it"
    assert claim(other, "w2")
    assert advance(other, "w2", tea=3)
    assert not advance(one, "w1", tea=2)
    assert not renew(one, "w1")
    assert behind(one) == []


def test_new_epoch_begins_at_the_start(two, redis):
    """The numbers of another epoch stand for other messages."""
    one, other = two
    claim(one, "w1")
    one.post("a", room="tea")
    advance(one, "w1", tea=1)
    redis.call("HSET", LOG, "epoch", "byhand")
    assert not advance(one, "w1", tea=1)
    until(other.loop, lambda: other.store.epoch == "byhand")
    wait_in(other.loop, other.store.end_claim("app", "w1"))
    assert claim(other, "w2")
    assert behind(other) == [Behind("main", 0, 2), Behind("tea", 0, 1)]
    assert redis.call("HGET", cursors_key("app"), "#epoch") == b"byhand"


def test_many_rooms_are_read_in_pieces(two, redis, monkeypatch):
    """A new reader begins at the head of each of them, and finds those that go on."""
    monkeypatch.setattr(redis_store, "SCANNED", 10)
    one, _ = two
    rooms = [f"r{number}" for number in range(600)]
    for room in rooms:
        one.start("a", room=room)
    one.settle()
    claim(one, "w1")
    assert behind(one) == []
    for room in rooms:
        one.start("b", room=room)
    one.settle()
    assert behind(one) == sorted(Behind(room, 1, 2) for room in rooms)


def test_unfinished_reader_begins_once_more(two, redis):
    """A node that ends before it has noted all heads leaves a reader that is still new."""
    one, other = two
    claim(one, "w1")
    redis.call("HDEL", cursors_key("app"), "#epoch")
    redis.call("HDEL", cursors_key("app"), "main")
    redis.call("DEL", lease_key("app"))
    assert claim(other, "w2")
    assert behind(other) == []


def test_claim_lost_while_heads_are_noted(two, redis, monkeypatch):
    """A node that loses its claim at once has no reader."""
    one, _ = two
    run = RedisConnection.run

    def late(connection, script, *arguments):
        if script is redis_store.ADVANCE:
            redis.call("HSET", cursors_key("app"), "#word", "w2")
        return run(connection, script, *arguments)

    monkeypatch.setattr(RedisConnection, "run", late)
    assert not claim(one, "w1")


def test_redis_that_is_away(node):
    one = node("redis://127.0.0.1:1", at_once=True)
    for asked in (
        one.store.claim("app", "w", 1),
        one.store.renew("app", "w", 1),
        one.store.end_claim("app", "w"),
        one.store.advance("app", "w", {"tea": 1}),
        one.store.cursor("app", "tea"),
        one.store.behind("app", ""),
    ):
        with pytest.raises(LogUnavailable):
            wait_in(one.loop, asked)
