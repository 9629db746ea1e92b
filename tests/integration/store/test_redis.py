"""The Redis store: the contract of all stores, with each server, and the faults that only Redis has."""

import contextlib
import itertools
import socket

import pytest
from support.helpers import ManualTime, RecordingPoster
from support.redis_nodes import DOUBT, UNAVAILABLE, outcome
from support.redises import LOCAL, Cluster, Proxy, Redis, WatchedLink, each_binary, turn, until, wait_in
from support.store_contract import (
    SEED,
    TIMESTAMP,
    ClockContract,
    DurableStoreContract,
    EditContract,
    ExtraContract,
    GuardContract,
)
from twisted.logger import LogLevel, formatEvent

from chatd.messages import Entry, Post
from chatd.room.log import LogUnavailable, Page
from chatd.store import base
from chatd.store.base import DAY, instant
from chatd.store.redis import redis_session
from chatd.store.redis import store as redis_store
from chatd.store.redis.link import Link, RedisAddress
from chatd.store.redis.redis_session import FORMAT
from chatd.store.redis.store import RedisStore

DATABASES = 1000
"""One for each log."""
LOG, HEADS, FEED = "{chatd}:log", "{chatd}:heads", "{chatd}:feed"
EXACT = {"stream-node-max-entries": 1}
"""Makes Redis trim the feed to its exact length, since it removes whole nodes of a stream."""


@each_binary
def redis(request, tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis"), binary=request.param, databases=DATABASES) as server:
        yield server


class TestRedisStore(ClockContract, EditContract, ExtraContract, GuardContract, DurableStoreContract):
    @pytest.fixture(autouse=True)
    def _loop(self, loop):
        self.loop = loop

    def wait(self, deferred):
        return wait_in(self.loop, deferred)

    @pytest.fixture
    def links(self):
        """The link of each store."""
        return {}

    @pytest.fixture
    def make(self, redis, links):
        databases = iter(range(DATABASES))

        def make(retain, now):
            url = redis.url.rpartition("/")[0]
            link = Link(RedisAddress.parse(f"{url}/{next(databases)}"), self.loop)
            store = RedisStore(link, retain, now, now.steady)
            links[store] = link
            return store

        return make

    @pytest.fixture
    def again(self, links):
        def again(store, retain, now):
            reopened = RedisStore(links[store], retain, now, now.steady)
            links[reopened] = links[store]
            return reopened

        return again


def durable(folder, **options):
    """Return a server that loses no write that it has acknowledged."""
    return Redis(folder, appendonly=True, fsync="always", **options)


# Many nodes, one room


@pytest.fixture
def three(node, redis):
    redis.flush()
    nodes = [node(redis.url, at_once=True) for _ in range(3)]
    return [one.up() for one in nodes]


def test_simultaneous_start_writes_one_seed(three):
    assert len({one.store.epoch for one in three}) == 1
    for one in three:
        assert one.read() == Page([*SEED], first=1, head=2)
        assert one.events == []


def test_all_nodes_see_one_order(three, loop):
    """Every node's followers see the same order, and before the posters at that node."""
    said = {room: [] for room in ("main", "other", "third")}
    for number, one in itertools.product(range(100), three):
        for room, texts in said.items():
            texts.append(f"{number}")
            one.store.append(room, Post("ann", texts[-1]), RecordingPoster(one.events))
    for one in three:
        one.settle()
    for room, texts in said.items():
        head = len(texts) + (2 if room == "main" else 0)
        for one in three:
            until(loop, lambda one=one, room=room, texts=texts: len(one.heard(room)) >= len(texts))
        seen = [[event[2] for event in one.events if event[:2] == ("appended", room)] for one in three]
        assert seen[0] == seen[1] == seen[2] == [e for e in three[0].read(room).entries if e not in SEED]
        assert [entry.number for entry in seen[0]] == [*range(head - len(texts) + 1, head + 1)]
    for one in three:
        posted, known = 0, dict.fromkeys(said, 0)
        for event in one.events:
            if event[0] == "appended":
                known[event[1]] = event[2].number
            else:
                assert event[2] <= max(known.values())
                posted += 1
        assert posted == 300
        assert one.store.commits.buckets()[-1][1] == 300


def test_posts_are_pipelined(one, node, loop):
    node = node(one.url)
    before = one.info("stats")["total_net_input_bytes"]
    posters = node.start(*map(str, range(500)))
    assert all(poster.events == [] for poster in posters)
    assert one.info("stats")["total_net_input_bytes"] > before
    node.settle()
    assert [poster.numbers for poster in posters] == [[number] for number in range(3, 503)]


def test_node_has_two_connections(one, node):
    node = node(one.url)
    for number in range(200):
        node.start("hi", room=f"r{number}")
    node.settle()
    for number in range(200):
        node.read(f"r{number}")
    clients = one.call("CLIENT", "LIST").decode().splitlines()
    assert len(clients) == 3  # the third is this one


def test_late_node_follows_from_now_on(one, node):
    first = node(one.url)
    first.post("before")
    second = node(one.url)
    assert second.store.epoch == first.store.epoch
    first.post("after")
    second.hears("after")
    assert second.texts() == ["before", "after"]


def test_time_comes_from_redis(one, node):
    node = node(one.url)
    node.post("hi")
    seconds, micros = map(int, one.call("TIME"))
    entry = node.read().entries[-1]
    assert TIMESTAMP.fullmatch(entry.timestamp)
    assert 0 <= seconds + micros / 1e6 - instant(entry.timestamp) < 5


def test_timestamps_of_nodes_with_different_clocks(one, node):
    ahead, behind = ManualTime(), ManualTime()
    ahead.advance(60)
    first, second = node(one.url, now=ahead), node(one.url, now=behind)
    for number in range(3):
        first.post(f"a{number}")
        second.post(f"b{number}")
        behind.advance(25)
    stamps = [entry.timestamp for entry in first.read().entries]
    assert stamps == sorted(stamps)
    assert stamps[2] == "2026-01-01T00:01:00.000Z"


def test_keys_share_one_hash_tag(one, node):
    node = node(one.url, retain="5d")
    node.post("a", "b", label=True)
    node.post("c", room="other")
    keys = [key.decode() for key in one.call("KEYS", "*")]
    assert {*keys} >= {LOG, HEADS, FEED, "{chatd}:room:main", "{chatd}:room:other"}
    assert all(key.startswith("{chatd}:") for key in keys)


@pytest.mark.parametrize(("retain", "days"), [("all", 1), ("5", 1), ("1d", 1), ("30d", 30)])
def test_lifetime_of_a_label(one, node, retain, days):
    node = node(one.url, retain=retain)
    node.post("a", label=True)
    (label,) = one.call("KEYS", "{chatd}:label:*")
    assert days * DAY * 1000 - 60_000 < one.call("PTTL", label) <= days * DAY * 1000


def test_numbers_continue_on_another_node(one, node):
    first = node(one.url, retain="1")
    first.post("a", "b")
    first.close()
    one.call("XTRIM", "{chatd}:room:main", "MAXLEN", 0)
    assert node(one.url).post("c") == [("posted", 5)]


def test_retention_by_days_of_two_nodes(one, node):
    time = ManualTime()
    first = node(one.url, retain="2d", now=time, seed=())
    for text in "abc":
        first.post(text)
        time.advance(DAY)
    first.post("d")
    assert first.texts() == ["b", "c", "d"]  # "b" was two days old when "d" came
    second = node(one.url, retain="1d", now=time, seed=())
    time.advance(DAY)
    wait_in(second.loop, second.store.trim())
    assert second.texts() == ["d"]
    first.hears(*"abcd")
    until(first.loop, lambda: ("trimmed", "main", 4) in first.events)


@pytest.mark.parametrize("small", [1, 512], ids=["a table", "a list"])
def test_trim_of_many_rooms(tmp_path, node, monkeypatch, small):
    monkeypatch.setattr(redis_store, "ROOMS", 3)
    with Redis(tmp_path / "data", hash_max_ziplist_entries=small) as redis:
        time = ManualTime()
        node = node(redis.url, retain="1d", now=time, seed=())
        for number in range(10):
            node.start("hi", room=f"r{number}")
        node.settle()
        time.advance(2 * DAY)
        node.events.clear()
        wait_in(node.loop, node.store.trim())
        assert {*node.events} == {("trimmed", f"r{number}", 2) for number in range(10)}
        assert all(node.texts(f"r{number}") == [] for number in range(10))


def test_trim_of_many_old_messages(one, node):
    time = ManualTime()
    node = node(one.url, retain="1d", now=time, seed=())
    node.start(*map(str, range(250)))
    node.settle()
    time.advance(2 * DAY)
    assert node.post("new") == [("posted", 251)]
    assert node.read() == Page([Entry(251, "ann", "new", node.read().entries[0].timestamp)], 251, 251)


def test_trim_by_the_clock_of_redis(one, node, monkeypatch):
    """Without a given clock, messages age by the time of Redis."""
    monkeypatch.setattr(base, "STEADY_SECONDS", 0)
    node = node(one.url, retain="1d", seed=())
    node.post("new", room="a")
    one.call("HSET", HEADS, "b", 1)
    micros = int(one.call("TIME")[0]) * 1_000_000
    one.call("XADD", "{chatd}:room:b", f"1-{micros - DAY * 1_000_000 - 1}", "u", "ann", "m", "old")
    wait_in(node.loop, node.store.trim())
    assert (node.texts("a"), node.texts("b")) == (["new"], [])


def test_trim_behind_many_messages_of_a_wrong_clock(one, node):
    """A post looks at a hundred messages of unknown age at most; a trim looks behind all of them."""
    time = ManualTime()
    node = node(one.url, retain="1d", now=time, seed=())
    time.jump(100 * DAY)
    node.start(*map(str, range(150)))
    node.settle()
    time.jump(-100 * DAY)
    node.post("old")
    time.advance(2 * DAY)
    node.post("new")
    assert node.read().first == 1
    wait_in(node.loop, node.store.trim())
    assert node.read().first == 152


def test_trim_passes_a_room_of_another_type(one, node, events):
    """A key that is no stream is logged, and the other rooms are trimmed."""
    time = ManualTime()
    node = node(one.url, retain="1d", now=time, seed=())
    rooms = ["a", "b", "c"]
    for room in rooms:
        node.post("old", room=room)
    one.call("SET", "{chatd}:room:b", "text")
    time.advance(2 * DAY)
    wait_in(node.loop, node.store.trim())
    assert (node.texts("a"), node.texts("c")) == ([], [])
    (logged,) = [formatEvent(event) for event in events if event["log_level"] == LogLevel.error]
    assert logged.startswith("old messages were not removed: b: ")
    assert "WRONGTYPE" in logged


# A log that went back


def test_rollback_replaces_the_epoch(tmp_path, binary, node):
    """Nodes that have read what Redis lost replace the epoch once, and reread."""
    with durable(tmp_path / "data", binary=binary) as redis:
        first, second = node(redis.url), node(redis.url)
        epoch = first.store.epoch
        first.post("a")
        second.hears("a")
        redis.copy(tmp_path / "copy")
        first.post("b", "c", label=True)
        second.hears("a", "b", "c")
        redis.roll_back(tmp_path / "copy")
        for one in (first, second):
            until(one.loop, lambda one=one: one.store.epoch != epoch)
            one.up()
        assert first.store.epoch == second.store.epoch == redis.call("HGET", LOG, "epoch").decode()
        assert (first.interruptions, second.interruptions) == (1, 1)
        assert first.texts() == ["a"]
        # The labels of the lost posts are lost too.
        assert second.post("b", label=True) == [("posted", 4)]
        first.hears("a", "b", "c", "b")
        assert (first.interruptions, second.interruptions) == (1, 1)


@pytest.mark.parametrize("more", [1, 5], ids=["as many", "more"])
def test_rollback_with_reused_numbers(tmp_path, binary, node, more):
    """The loss is noticed although another node has reused the numbers."""
    with (
        durable(tmp_path / "data", binary=binary) as redis,
        Proxy(redis.port) as near,
        Proxy(redis.port) as far,
    ):
        knows, other = node(near.url()), node(far.url())
        epoch = knows.store.epoch
        knows.post("a")
        other.hears("a")
        redis.copy(tmp_path / "copy")
        for proxy in (far, near):
            proxy.refuse()
            proxy.cut()
            if proxy is far:
                other.down()
                knows.post("lost")
        redis.roll_back(tmp_path / "copy")
        far.go_on()
        other.up()
        assert other.store.epoch == epoch
        assert other.post(*map(str, range(more))) == [("posted", 4 + number) for number in range(more)]
        assert other.interruptions == 0
        near.go_on()
        until(knows.loop, lambda: knows.store.epoch != epoch)
        until(other.loop, lambda: other.store.epoch != epoch)
        knows.up()
        other.up()
        assert knows.store.epoch == other.store.epoch
        assert (knows.interruptions, other.interruptions) == (1, 1)
        assert knows.texts() == ["a", *map(str, range(more))]
        knows.post("goes on")
        other.hears("a", *map(str, range(more)), "goes on")
        knows.hears("a", "lost", "goes on")
        assert knows.store.epoch == other.store.epoch


def test_failover_to_a_replica_that_lags(tmp_path, binary, node):
    with (
        Redis(tmp_path / "primary", binary=binary) as primary,
        Redis(tmp_path / "replica", binary=binary, replica_of=primary) as replica,
        Proxy(primary.port) as proxy,
    ):
        nodes = [node(proxy.url()) for _ in range(3)]
        epoch = nodes[0].store.epoch
        nodes[0].post("a")
        primary.settle()
        replica.promote()
        nodes[1].post("lost")
        for one in nodes:
            one.hears("a", "lost")
        proxy.target = replica.port
        primary.kill()
        for one in nodes:
            until(one.loop, lambda one=one: one.store.epoch != epoch)
            one.up()
        assert len({one.store.epoch for one in nodes}) == 1
        assert [one.interruptions for one in nodes] == [1, 1, 1]
        assert nodes[2].texts() == ["a"]
        assert nodes[2].post("b") == [("posted", 4)]
        for one in nodes:
            one.hears("a", "lost", "b")


def test_deleted_log_is_noticed_without_posts(one, node):
    nodes = [node(one.url) for _ in range(3)]
    epoch = nodes[0].store.epoch
    nodes[0].post("a")
    for each in nodes:
        each.hears("a")
    one.flush()
    for each in nodes:
        until(each.loop, lambda each=each: each.store.epoch != epoch)
        assert each.interruptions == 1
        assert each.read() == Page([*SEED], 1, 2)
    assert len({each.store.epoch for each in nodes}) == 1
    assert nodes[1].post("b") == [("posted", 3)]
    for each in nodes:
        each.hears("a", "b")
        assert each.interruptions == 1


def test_deleted_log_is_noticed_despite_presence(one, node):
    node = node(one.url)
    epoch = node.store.epoch
    node.post("a")
    one.flush()
    with one.client() as client:

        def noticed():
            client.call("XADD", "{chatd}:presence", "*", "n", "other", "r", "main", "h", "", "t", "")
            return node.store.epoch != epoch

        until(node.loop, noticed)


def test_post_to_a_deleted_log(one, node):
    node = node(one.url)
    epoch = node.store.epoch
    node.post("a")
    one.flush()
    assert {*node.post("b", "c", label=True)} <= {UNAVAILABLE, DOUBT}
    assert node.post_until_kept("b", "c") == [("posted", 3), ("posted", 4)]
    assert node.store.epoch != epoch
    assert node.texts() == ["b", "c"]
    assert node.interruptions == 1


def test_read_of_a_deleted_log(one, node):
    node = node(one.url)
    node.post("a")
    one.flush()
    with pytest.raises(LogUnavailable, match="lost messages"):
        node.read()
    node.up()
    until(node.loop, lambda: node.interruptions)
    assert node.read() == Page([*SEED], 1, 2)


@pytest.fixture
def patient(monkeypatch):
    """Disable the check for silence, so that another check must detect the fault."""
    monkeypatch.setattr(redis_session, "FEED_SILENCE_SECONDS", 100)


def test_post_with_an_old_epoch(one, node, patient):
    node = node(one.url, times=1)
    node.post("a")
    one.call("HSET", LOG, "epoch", "other")
    assert node.post("b", label=True) == [UNAVAILABLE]
    assert one.call("HGET", HEADS, "main") == b"3"
    node.up()
    assert (node.store.epoch, node.interruptions) == ("other", 1)
    assert node.post("b", label=True) == [("posted", 4)]


def test_post_to_a_log_that_went_back(one, node, patient):
    node = node(one.url, times=1)
    node.post("a", "b")
    epoch = node.store.epoch
    one.call("HSET", LOG, "seq", 1)
    one.call("XDEL", FEED, one.call("XREVRANGE", FEED, "+", "-", "COUNT", 1)[0][0])
    assert node.post("c") == [UNAVAILABLE]
    assert one.call("HGET", HEADS, "main") == b"4"
    assert node.up().post("d") == [("posted", 5)]
    assert node.store.epoch != epoch


def test_feed_with_another_epoch(one, node, patient):
    node = node(one.url, times=1)
    node.post("a")
    one.call("HSET", LOG, "epoch", "other", "seq", 2)
    one.call("XADD", FEED, "2-2000000000000000", "e", "other", "r", "main", "n", "4", "u", "bob", "m", "b")
    until(node.loop, lambda: node.store.epoch == "other")
    assert (node.heard(), node.interruptions) == (["a"], 1)
    node.up()


@pytest.fixture
def untold(node, loop):
    """A function that makes a node whose posts were answered while its feed was stalled."""

    def make(redis, asking, feed):
        made = node(None, link=WatchedLink(asking, loop, feed.url()), times=1)
        made.post("a")
        feed.stall()
        posters = made.start("b", "c", label=True)
        until(loop, lambda: redis.call("HGET", HEADS, "main") == b"5")
        pages = []
        made.store.read("main", None, 10).addBoth(pages.append)
        until(loop, lambda: made.link.answered)
        assert all(poster.events == [] for poster in posters)
        assert pages == []
        return made, posters, pages

    return make


def test_stored_post_with_a_late_feed_entry(one, untold):
    """If the session ends before the feed has reached a stored post, the post is in doubt."""
    with Proxy(one.port) as feed:
        node, posters, pages = untold(one, one.url, feed)
        feed.cut()
        node.settle()
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]
        assert pages[0].check(LogUnavailable)
        feed.go_on()
        assert node.post_until_kept("b", "c") == [("duplicate", 4), ("duplicate", 5)]
        node.hears("a", "b", "c")
        assert node.interruptions == 0
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]


def test_stored_post_whose_reply_is_lost(one, proxy, node, loop):
    """The post is in doubt, and a retry with its label stores nothing more."""
    node = node(proxy.url(), times=1)
    node.post("a")
    proxy.mute()
    posters = node.start("b", "c", label=True)
    until(loop, lambda: one.call("HGET", HEADS, "main") == b"5")
    proxy.cut()
    node.settle()
    assert [*map(outcome, posters)] == [DOUBT, DOUBT]
    proxy.go_on()
    assert node.post_until_kept("b", "c") == [("duplicate", 4), ("duplicate", 5)]
    node.hears("a", "b", "c")
    assert node.texts() == ["a", "b", "c"]


def test_lost_post_with_a_reused_number(tmp_path, untold, node):
    """A post that Redis lost is in doubt, even if another one has its number."""
    with durable(tmp_path / "data") as redis, Proxy(redis.port) as asking, Proxy(redis.port) as feed:
        other = node(redis.url)
        redis.copy(tmp_path / "copy")
        knows, posters, _ = untold(redis, asking.url(), feed)
        other.close()
        asking.refuse()
        feed.refuse()
        redis.roll_back(tmp_path / "copy")
        node(redis.url).post("x", "y", "z")
        asking.go_on()
        feed.go_on()
        knows.settle()
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]
        until(knows.loop, lambda: knows.interruptions == 1)
        assert knows.post_until_kept("b", "c") == [("posted", 6), ("posted", 7)]


def test_deleted_post_is_in_doubt(one, untold):
    with Proxy(one.port) as feed:
        node, posters, pages = untold(one, one.url, feed)
        one.flush()
        feed.go_on()
        node.settle()
        # Redis may have sent the first entry before everything was deleted.
        first, second = map(outcome, posters)
        assert first == (("posted", 4) if "b" in node.heard() else DOUBT)
        assert second == DOUBT
        assert pages[0].check(LogUnavailable)
        until(node.loop, lambda: node.interruptions == 1)
        assert node.post_until_kept("b") == [("posted", 3)]


def test_abandoned_posts_get_one_outcome(one, untold):
    with Proxy(one.port) as feed:
        node, posters, pages = untold(one, one.url, feed)
        node.store.abandon()
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]
        feed.go_on()
        node.hears("a", "b", "c")
        assert [entry.message for entry in pages[0].entries][2:] == ["a", "b", "c"]
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]


def test_page_waits_for_the_feed(one, node, loop):
    """Clients must not see messages whose loss this node would not notice."""
    with Proxy(one.port) as feed:
        far, near = node(None, link=WatchedLink(one.url, loop, feed.url()), times=1), node(one.url)
        feed.stall()
        near.post("a")
        pages = []
        far.store.read("main", None, 10).addCallback(pages.append)
        until(loop, lambda: far.link.answered)
        assert pages == []
        feed.go_on()
        until(loop, lambda: pages)
        assert pages[0].entries == [*SEED, *(entry for _, _, entry in far.events)]
        assert far.heard() == ["a"]


def test_late_reply_to_an_abandoned_post(one, node):
    node = node(one.url)
    (poster,) = node.start("a")
    node.store.abandon()
    node.hears("a")
    assert outcome(poster) == DOUBT
    assert node.store.settled().called
    assert node.post("b") == [("posted", 4)]


def test_trim_ends_with_the_session(one, node, loop):
    with Proxy(one.port) as feed:
        time = ManualTime()
        node = node(None, link=WatchedLink(one.url, loop, feed.url()), retain="1d", now=time, times=1)
        node.post("a")
        feed.stall()
        time.advance(2 * DAY)
        trimmed = node.store.trim()
        until(loop, lambda: node.link.answered)
        feed.cut()
        wait_in(loop, trimmed)


# Reconnecting without a loss


def test_reconnect_continues_the_feed(one, proxy, node):
    far, near = node(proxy.url()), node(one.url)
    epoch = far.store.epoch
    far.post("a")
    proxy.refuse()
    proxy.cut()
    far.down()
    near.post("b", "c", room="main")
    near.post("d", room="other")
    proxy.go_on()
    far.hears("a", "b", "c")
    far.hears("d", room="other")
    near.post("e")
    far.hears("a", "b", "c", "e")
    assert (far.store.epoch, far.interruptions) == (epoch, 0)
    assert far.up().store.fault is None


def test_reconnect_after_the_feed_was_trimmed(tmp_path, binary, node, monkeypatch):
    """A node that missed more than the feed keeps rereads its rooms; the epoch stays."""
    monkeypatch.setattr(redis_store, "FEED_LENGTH", 5)
    with Redis(tmp_path / "data", binary=binary, **EXACT) as redis, Proxy(redis.port) as proxy:
        far, near = node(proxy.url()), node(redis.url)
        epoch = far.store.epoch
        far.post("a")
        proxy.refuse()
        proxy.cut()
        far.down()
        for number in range(20):
            near.post(f"{number}")  # one by one, so that this node misses none
        proxy.go_on()
        far.hears("a", *map(str, range(15, 20)))
        assert far.events[1] == ("interrupted",)
        near.post("b")
        far.hears("a", *map(str, range(15, 20)), "b")
        assert far.interruptions == 1
        assert far.store.epoch == near.store.epoch == epoch
        assert near.interruptions == 0
        assert far.post("c") == [("posted", 25)]


def test_reconnect_with_the_whole_feed_unread(tmp_path, node, monkeypatch):
    monkeypatch.setattr(redis_store, "FEED_LENGTH", 5)
    with Redis(tmp_path / "data", **EXACT) as redis, Proxy(redis.port) as proxy:
        far, near = node(proxy.url()), node(redis.url)
        far.post("a")
        proxy.refuse()
        proxy.cut()
        far.down()
        near.post(*"bcdef")
        assert redis.call("XLEN", FEED) == 5
        proxy.go_on()
        far.hears(*"abcdef")
        assert far.interruptions == 0


# Servers that end or fall silent


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_restart_during_posts(tmp_path, binary, node, end):
    """With retries, each post is stored once."""
    fsync = "always" if end == "kill" else "everysec"
    with Redis(tmp_path / "data", binary=binary, appendonly=True, fsync=fsync) as redis:
        first, second = node(redis.url), node(redis.url)
        epoch = first.store.epoch
        texts = [f"{number}" for number in range(300)]
        posters = first.start(*texts[:200], label=True)
        until(first.loop, lambda: posters[20].events)
        posters += first.start(*texts[200:], label=True)
        getattr(redis, end)()
        first.settle()
        posted = [poster.numbers[0] for poster in posters if poster.numbers]
        assert 20 < len(posted) <= 200
        assert posted == [*range(3, 3 + len(posted))]
        assert {outcome(poster) for poster in posters if not poster.numbers} == {DOUBT}
        assert "cannot be reached" in first.fails(f"{LOCAL}:{redis.port}")
        assert first.post("x") == [UNAVAILABLE]
        with pytest.raises(LogUnavailable, match="cannot be reached"):
            first.read()
        redis.start()
        first.post_until_kept(*texts)
        kept = first.texts()
        assert sorted(kept) == sorted(texts)
        assert kept[: len(posted)] == texts[: len(posted)]
        first.hears(*kept)
        second.hears(*kept)
        assert (first.store.epoch, first.interruptions, second.interruptions) == (epoch, 0, 0)


def test_paused_server(tmp_path, node):
    with Redis(tmp_path / "data") as redis:
        first, second = node(redis.url), node(redis.url)
        first.post("a")
        redis.pause()
        posters = first.start("b", "c", label=True)
        reading = first.store.read("main", None, 10)
        first.settle()
        assert [*map(outcome, posters)] == [DOUBT, DOUBT]
        with pytest.raises(LogUnavailable):
            wait_in(first.loop, reading)
        assert "cannot be reached" in first.down()
        redis.go_on()
        first.post_until_kept("b", "c")
        first.hears("a", "b", "c")
        second.hears("a", "b", "c")
        assert first.texts() == ["a", "b", "c"]
        assert (first.interruptions, second.interruptions) == (0, 0)


@pytest.mark.parametrize("how", ["stall", "cut", "refuse and cut"])
def test_network_failure_during_posts(one, proxy, node, how):
    """With retries, each post is stored once."""
    far, near = node(proxy.url()), node(one.url)
    far.post("a")
    texts = [f"{number}" for number in range(50)]
    posters = far.start(*texts, label=True)
    for what in how.split(" and "):
        getattr(proxy, what)()
    far.settle()
    assert {outcome(poster) for poster in posters if not poster.numbers} <= {DOUBT, UNAVAILABLE}
    near.post("b")
    proxy.go_on()
    far.post_until_kept(*texts)
    kept = near.texts()
    assert sorted(kept) == sorted(["a", "b", *texts])
    far.hears(*kept)
    near.hears(*kept)
    assert (far.interruptions, near.interruptions) == (0, 0)
    assert far.up().store.fault is None
    assert far.store.commits.buckets()[-1][1] >= 51


def test_connection_lost_while_the_session_begins(one, node, loop):
    with Proxy(one.port) as asking, Proxy(one.port) as feed:
        node = node(None, link=WatchedLink(asking.url(), loop, feed.url()), at_once=True, times=1)
        feed.stall()
        until(loop, lambda: node.link.lines)
        (line,) = node.link.lines
        asking.cut()
        until(loop, lambda: line.reason is not None)
        feed.go_on()
        until(loop, lambda: node.opened.called)
        node.up()
        assert node.post("a") == [("posted", 3)]


def test_first_connection_is_retried(tmp_path, node, events):
    with Redis(tmp_path / "data") as redis:
        redis.kill()
        node = node(redis.url, at_once=True)
        assert node.store.fault == "it is not open yet"
        assert node.post("a") == [UNAVAILABLE]
        assert node.fails("refused") == (
            f"the log at {LOCAL}:{redis.port} cannot be reached "
            "(Connection was refused by other side: 111: Connection refused)"
        )
        redis.start()
        wait_in(node.loop, node.opened)
        assert node.store.fault is None
        assert node.post("a") == [("posted", 3)]
        assert [event["log_format"] for event in events if event["log_level"] > LogLevel.info] == ["{fault}: {remedy}"]


# Servers that refuse


def set_config(redis, **directives):
    for name, value in directives.items():
        redis.call("CONFIG", "SET", name.replace("_", "-"), value)


@contextlib.contextmanager
def out_of_memory(redis):
    set_config(redis, maxmemory=1)
    yield "OOM"
    set_config(redis, maxmemory=0)


@contextlib.contextmanager
def without_replicas(redis):
    set_config(redis, min_replicas_to_write=1)
    yield "NOREPLICAS"
    set_config(redis, min_replicas_to_write=0)


@contextlib.contextmanager
def without_disk(redis):
    (redis.folder / "dump.rdb").mkdir()
    set_config(redis, save="3600 1")
    redis.call("BGSAVE")
    redis.log.wait("Background saving error")
    with redis.client() as client:
        while redis.info("persistence")["rdb_last_bgsave_status"] != "err":
            client.call("PING")
    yield "MISCONF"
    set_config(redis, save="")


@contextlib.contextmanager
def busy(redis):
    with redis.client() as client:
        set_config(redis, lua_time_limit=1)
        client.send("EVAL", "while true do end", 0)
        redis.log.wait("Slow script detected|Lua slow script")
        yield "BUSY"
        redis.call("SCRIPT", "KILL")


@contextlib.contextmanager
def closed(redis):
    set_config(redis, requirepass="secret")
    redis.password = "secret"
    redis.call("CLIENT", "KILL", "TYPE", "normal")
    yield "NOAUTH"
    set_config(redis, requirepass="")
    redis.password = None


@contextlib.contextmanager
def taken(redis):
    redis.call("RENAME", FEED, "{chatd}:away")
    redis.call("SET", FEED, "mine")
    yield "WRONGTYPE"
    redis.call("RENAME", "{chatd}:away", FEED)


@pytest.mark.parametrize("fault", [out_of_memory, without_replicas, without_disk, busy, closed, taken])
def test_refused_writes(tmp_path, binary, node, fault, events):
    """Nothing is stored while Redis refuses writes, and posting resumes afterwards."""
    with Redis(tmp_path / "data", binary=binary) as redis:
        node = node(redis.url)
        epoch = node.store.epoch
        node.post("a")
        with fault(redis) as code:
            (refused,) = {*node.post("b", "b", label=True), *node.post("b", label=True)} - {DOUBT}
            assert refused == UNAVAILABLE
            words = node.fails(code)
            assert f"{LOCAL}:{redis.port}" in words
            assert "secret" not in words
            before = len(events)
            for _ in range(5):
                node.post("b")
            assert len(events) - before < 5
        node.up()
        assert node.texts() == ["a"]
        assert node.post("b", label=True) == [("posted", 4)]
        node.hears("a", "b")
        assert (node.store.epoch, node.interruptions) == (epoch, 0)


@pytest.mark.parametrize("fault", [out_of_memory, without_replicas, without_disk])
def test_reads_while_writes_are_refused(one, node, fault):
    """Reads work in the same session, and the fault ends without a post."""
    node = node(one.url)
    node.post("a")
    sessions = len(node.link.lines)
    with fault(one):
        assert node.post("b") == [UNAVAILABLE]
        for _ in range(2):  # the second follows a check of the log
            asked = int(one.info("commandstats")["cmdstat_evalsha"].partition("=")[2].partition(",")[0])
            until(
                node.loop,
                lambda asked=asked: (
                    int(one.info("commandstats")["cmdstat_evalsha"].partition("=")[2].partition(",")[0]) > asked
                ),
            )
            turn(node.loop)
        assert node.store.fault is not None
        assert node.texts() == ["a"]
        assert node.store.commits.buckets()[-1][1] == 2  # including failed ones
    node.up()
    assert len(node.link.lines) == sessions


@pytest.mark.parametrize("fault", [out_of_memory, without_replicas, without_disk])
def test_session_begins_while_writes_are_refused(one, node, fault):
    """A node that starts, or reconnects, reads every room and rejects posts."""
    first = node(one.url)
    first.post("a", "b")
    first.post("c", room="other")
    with fault(one) as code:
        late = node(one.url, retain="2")
        assert code in late.store.fault
        one.call("CLIENT", "KILL", "TYPE", "normal")
        first.fails(code)
        until(late.loop, lambda: len(late.link.lines) > 1)
        late.fails(code)
        for each in (first, late):
            until(each.loop, lambda each=each: "cannot be written" in each.store.fault, "it is not degraded")
            until(each.loop, lambda each=each: "connection" not in each.store.fault, "it is not connected")
            assert each.texts("other") == ["c"]
            assert each.post("d") == [UNAVAILABLE]
        if fault is out_of_memory:  # trimming needs no memory
            assert late.read().entries == first.read().entries
            assert late.read().first == 3
    for each in (first, late):
        each.up()
    assert late.post("e") == [("posted", 5)]


@pytest.mark.parametrize("fault", [out_of_memory, without_replicas])
def test_new_log_while_writes_are_refused(one, node, fault):
    """A log is created as soon as Redis accepts writes; the fault names the refusal until then."""
    with fault(one) as code:
        node = node(one.url, at_once=True)
        assert "refuses" in node.fails(code)
    wait_in(node.loop, node.opened)
    assert node.read() == Page([*SEED], 1, 2)


def test_refused_trim_at_the_start(one, node, events):
    """A foreign key in place of a room does not keep a node from starting."""
    first = node(one.url)
    first.post("a", room="other")
    one.call("SET", "{chatd}:room:other", "mine")
    late = node(one.url, retain="1")
    assert late.store.fault is None
    assert any("were not removed" in event["log_format"] for event in events)


def test_forbidden_trim_at_the_start(one, node, events):
    """A user of Redis who may not list the rooms does not keep a node from starting."""
    one.call("ACL", "SETUSER", "default", "-hscan")
    try:
        late = node(one.url, retain="1")
        assert late.store.fault is None
        assert late.post("a") == [("posted", 3)]
    finally:
        one.call("ACL", "SETUSER", "default", "+hscan")
    assert any("were not removed" in event["log_format"] for event in events)


def test_database_out_of_range(one, node, events):
    """A Redis that answers does not count as one that cannot be reached."""
    node = node(one.url.removesuffix("/0") + "/99", at_once=True)
    assert "refuses (ERR DB index is out of range)" in node.fails("refuses")
    (line,) = [event for event in events if event["log_format"] == "{fault}: {remedy}"]
    assert line["remedy"] == "name a database that it has with --store; retrying"


def test_script_flush(one, node):
    node = node(one.url)
    node.post("a")
    one.call("SCRIPT", "FLUSH")
    assert {*node.post(*map(str, range(5)))} <= {UNAVAILABLE, DOUBT}
    node.post_until_kept("b")
    assert node.texts() == ["a", "b"]
    one.call("SCRIPT", "FLUSH")
    with pytest.raises(LogUnavailable, match="NOSCRIPT"):
        node.read()
    node.up()
    one.call("SCRIPT", "FLUSH")
    node.fails("NOSCRIPT")  # noticed without a request
    node.up()
    node.hears("a", "b")
    assert node.interruptions == 0


@pytest.mark.parametrize("key", ["{chatd}:room:other", "{chatd}:label"])
def test_foreign_key_blocks_only_its_place(tmp_path, binary, node, key, loop):
    with Redis(tmp_path / "data", binary=binary) as redis:
        node = node(redis.url)
        if key.endswith("label"):
            node.post("x", room="other", label=True)
            ((key,), head) = redis.call("KEYS", "{chatd}:label:*"), 1
            redis.call("DEL", key)
            redis.call("HSET", key, "mine", "1")
        else:
            head = 0
            redis.call("SET", key, "mine")
        sessions = len(node.link.lines)
        assert node.post("x", room="other", label=True) == [UNAVAILABLE]
        assert "WRONGTYPE" in node.store.fault
        assert node.post("a") == [("posted", 3)]
        assert len(node.link.lines) == sessions
        redis.call("DEL", key)
        # The refused post took no number.
        assert node.post("x", room="other", label=True) == [("posted", head + 1)]


@pytest.mark.parametrize("key", [LOG, HEADS, FEED, "{chatd}:room:main"])
def test_foreign_key_blocks_the_opening(one, node, key):
    one.call("SET", key, "mine")
    node = node(one.url, at_once=True)
    node.fails("WRONGTYPE")
    one.call("DEL", key)
    wait_in(node.loop, node.opened)
    assert node.read() == Page([*SEED], 1, 2)
    assert node.post("a") == [("posted", 3)]


def test_failed_trim_is_logged(one, node, events):
    node = node(one.url, retain="2")
    node.post("x", room="other")
    one.call("RENAME", "{chatd}:room:other", "{chatd}:away")
    one.call("SET", "{chatd}:room:other", "mine")
    wait_in(node.loop, node.store.trim())
    assert any(event["log_format"].startswith("old messages were not removed") for event in events)
    assert node.post("a") == [("posted", 3)]


def test_too_many_pending_posts(one, node, monkeypatch):
    monkeypatch.setattr(redis_store, "MAX_PENDING", 5)
    node = node(one.url)
    outcomes = node.post(*map(str, range(7)))
    assert outcomes == [("posted", number) for number in range(3, 8)] + [UNAVAILABLE] * 2
    assert node.post("x") == [("posted", 8)]


def test_fault_is_logged_once(tmp_path, node, events):
    with Redis(tmp_path / "data") as redis:
        first = node(redis.url)
        redis.kill()
        first.fails("refused")
        for _ in range(20):
            turn(first.loop)
        logged = [event for event in events if event["log_level"] >= LogLevel.error]
        assert len(logged) <= 2  # connection lost, and unreachable
        redis.start()
        first.up()
        assert events[-1]["log_format"] == "reconnected to the log at {address}"


def test_unexpected_error_is_logged_and_retried(one, node, events):
    node = node(one.url)
    error = ZeroDivisionError("unexpected")

    def broken(*_):
        raise error

    node.link.dial = broken
    one.call("CLIENT", "KILL", "TYPE", "normal")
    node.fails("unexpected")
    for _ in range(10):
        turn(node.loop)
    failures = [event for event in events if event.get("log_failure")]
    assert [failure["log_failure"].value for failure in failures] == [error]
    for failure in failures:
        events.remove(failure)
    del node.link.dial
    node.up()
    assert node.post("a") == [("posted", 3)]


def test_failing_poster_is_logged(one, node, events):
    node = node(one.url)

    class Broken(RecordingPoster):
        def refused(self, post, error):
            raise ZeroDivisionError

    one.call("HSET", LOG, "epoch", "other")
    node.store.append("main", Post("ann", "a"), Broken())
    until(node.loop, lambda: any(event.get("log_failure") for event in events))
    events[:] = [event for event in events if not event.get("log_failure")]
    node.up()
    assert node.post("b") == [("posted", 3)]


# Formats


def test_unreadable_format_is_refused(one, node):
    old = node(one.url)
    old.post("a")
    one.call("HSET", LOG, "readable_since", FORMAT + 1, "written", FORMAT + 3)
    new = node(one.url, at_once=True)
    for each in (new, old):
        fault = each.fails("newer chatd")
        assert fault == (
            f"the log at {LOCAL}:{one.port} was written by a newer chatd, in format {FORMAT + 3}, which format "
            f"{FORMAT} cannot read: run that version again"
        )
        assert each.post("b") == [UNAVAILABLE]
    assert not new.opened.called
    assert one.call("HGET", LOG, "written") == str(FORMAT + 3).encode()


def test_newer_format_that_stays_readable(one, node):
    first = node(one.url)
    first.post("a", label=True)
    epoch = first.store.epoch
    with one.client() as client:
        client.call("MULTI")
        client.call("HSET", LOG, "written", FORMAT + 1, "more", "x")
        client.call("XADD", "{chatd}:room:main", "4-2000000000000000", "u", "bob", "m", "b", "more", "x")
        client.call("HSET", HEADS, "main", 4)
        client.call("HSET", LOG, "seq", 2, "stamped", 2000000000000000)
        fields = "e", epoch, "r", "main", "n", 4, "u", "bob", "m", "b", "more", "x"
        client.call("XADD", FEED, "2-2000000000000000", *fields)
        client.call("EXEC")
    first.hears("a", "b")
    second = node(one.url)
    assert second.texts() == ["a", "b"]
    assert second.post("c") == [("posted", 5)]
    assert one.call("HGET", LOG, "written") == str(FORMAT + 1).encode()
    assert second.store.epoch == epoch


def test_fields_of_the_operators_own_reach_every_node(one, node):
    """Older versions find the username and the text in their places, and ignore the field more."""
    first, second = node(one.url), node(one.url)
    extra = {"color": "red", "a": [1, None]}
    poster = RecordingPoster()
    first.store.append("main", Post("ann", "hi", "l", extra=extra), poster)
    first.settle()
    second.hears("hi")
    assert second.read().entries[-1].extra == second.events[-1][2].extra == extra
    ((_, flat),) = one.call("XREVRANGE", "{chatd}:room:main", "+", "-", "COUNT", 1)
    assert flat == [b"u", b"ann", b"m", b"hi", b"j", b'{"a":[1,null],"color":"red"}']
    second.store.append("main", Post("ann", "hi", "l", extra=extra), poster)
    second.settle()
    assert [outcome for outcome, _, _ in poster.events] == ["posted", "duplicate"]


def test_log_states_its_format(one, node):
    node(one.url)
    assert one.call("HMGET", LOG, "written", "readable_since") == [b"3", b"1"]


def test_usage_is_unknown(one, node):
    assert node(one.url).store.usage() == {}


# Settling and closing


def test_settled(one, node):
    node = node(one.url)
    assert node.store.settled().called
    poster = node.start("a")[0]
    settled = [node.store.settled(), node.store.settled()]
    assert not any(each.called for each in settled)
    node.start("b")
    wait_in(node.loop, settled[1])
    assert settled[0].called
    assert poster.numbers == [3]


def test_close_before_the_first_connection(one, node):
    node = node(one.url, at_once=True)
    node.close()
    assert not node.opened.called
    assert node.post("a") == [UNAVAILABLE]
    with pytest.raises(LogUnavailable):
        node.read()
    wait_in(node.loop, node.store.trim())


@pytest.mark.parametrize("turns", range(14))
def test_close_at_any_time(one, node, turns):
    node = node(one.url, at_once=True)
    for _ in range(turns):
        node.loop.doIteration(0.01)
        node.loop.runUntilCurrent()
    node.close()


def test_close_while_the_server_is_silent(one, proxy, node):
    proxy.stall()
    node = node(proxy.url(), at_once=True)
    until(node.loop, lambda: len(node.loop.getReaders()) > 1)
    node.close()


def test_close_while_connecting(node):
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((LOCAL, 0))
        listening.listen(0)
        stack.enter_context(socket.create_connection(listening.getsockname()))  # the backlog is full
        node = node(f"redis://{LOCAL}:{listening.getsockname()[1]}", at_once=True)
        for _ in range(3):
            turn(node.loop)
        node.close()


def test_close_during_the_pause(tmp_path, node, monkeypatch):
    monkeypatch.setattr(redis_session, "SESSION_BACKOFF_SECONDS", (1000, 1000))
    with Redis(tmp_path / "data") as redis:
        redis.kill()
        node = node(redis.url, at_once=True)
        node.fails("refused")
        node.close()


def test_close_from_a_poster(one, node):
    node = node(one.url)
    closed = []

    class Closing(RecordingPoster):
        def refused(self, post, error):
            closed.append(node.store.close())

    one.call("HSET", LOG, "epoch", "other")
    node.store.append("main", Post("ann", "a"), Closing())
    until(node.loop, lambda: closed)
    wait_in(node.loop, closed[0])


def test_close_while_a_failed_session_ends(one, node):
    node = node(one.url)
    one.call("HSET", LOG, "epoch", "other")
    poster = node.start("a")[0]
    until(node.loop, lambda: poster.events)
    node.close()


def test_close_waits_for_posts_with_a_time_limit(one, proxy, node):
    node = node(proxy.url())
    proxy.stall()
    (poster,) = node.start("a")
    node.close()
    assert outcome(poster) == DOUBT


def test_close_after_abandon(one, proxy, node):
    node = node(proxy.url(), times=1)
    proxy.stall()
    posters = node.start("a", "b")
    node.store.abandon()
    assert [*map(outcome, posters)] == [DOUBT, DOUBT]
    assert node.store.settled().called
    node.store.lobby.disconnected()  # otherwise the farewell would be sent
    node.close()


def test_close_twice(one, node):
    node = node(one.url)
    node.post("a")
    node.close()
    node.close()


# A cluster, and a replica


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


def test_cluster_failover(cluster, node):
    """A node finds the primary from the replica's address, and again after a failover."""
    first, second = node(cluster.replica.url), node(cluster.url)
    assert first.store.epoch == second.store.epoch
    assert first.post("a", label=True) == [("posted", 3)]
    second.hears("a")
    epoch = first.store.epoch
    texts = [f"{number}" for number in range(100)]
    posters = first.start(*texts, label=True)
    until(first.loop, lambda: posters[0].events)
    cluster.failover()
    first.post_until_kept(*texts)
    kept = second.up().texts()
    assert sorted(kept) == sorted(["a", *texts])
    first.hears(*kept)
    second.hears(*kept)
    assert (first.store.epoch, first.interruptions, second.interruptions) == (epoch, 0, 0)


def test_replica_leads_to_its_primary(tmp_path, binary, node):
    with (
        Redis(tmp_path / "primary", binary=binary) as primary,
        Redis(tmp_path / "replica", binary=binary, replica_of=primary) as replica,
    ):
        node = node(replica.url)
        assert node.post("a") == [("posted", 3)]
        assert primary.call("HGET", HEADS, "main") == b"3"
        # They swap roles.
        primary.settle()
        replica.promote()
        primary.follow(replica)
        assert node.post_until_kept("b") == [("posted", 4)]
        assert replica.call("HGET", HEADS, "main") == b"4"
        node.hears("a", "b")
        assert node.interruptions == 0
