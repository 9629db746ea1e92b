"""Every partial loss of keys ends in a defined state: the log goes on, with a new epoch if messages may be missing."""

import contextlib
import itertools

import pytest
from support.redis_nodes import UNAVAILABLE
from support.redises import Redis, each_binary, until
from support.store_contract import SEED

from chatd.messages import Entry
from chatd.room.log import LogUnavailable
from chatd.store.redis.keys import FEED, HEADS, LOG, digest, label_key, room_key
from chatd.store.redis.link import RedisConnection

MAIN, TEAM, COLD = map(room_key, ("main", "team", "cold"))
LABEL = label_key("team", "ann", "t1")
NEW_EPOCH = {
    LOG: True,
    HEADS: True,
    FEED: True,
    MAIN: True,
    TEAM: True,
    COLD: True,
    LABEL: False,
    "{chatd}:presence": False,
    "{chatd}:here:team": False,
}
"""Whether the loss of a key draws a new epoch."""
LOSSES = [*itertools.combinations(NEW_EPOCH, 1), *itertools.combinations(NEW_EPOCH, 2)]


@each_binary
def server(request, tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis"), binary=request.param) as server:
        yield server


@pytest.fixture
def redis(server):
    server.flush()
    return server


def fill(node):
    """Post to three rooms."""
    assert node.post("m1", "m2") == [("posted", 3), ("posted", 4)]
    assert node.post("t1", "t2", room="team", label=True) == [("posted", 1), ("posted", 2)]
    assert node.post("c1", room="cold") == [("posted", 1)]
    node.post(*"xyz", room="other")


def read(node, room):
    """Return the texts of a room; retry a few times until it can be read."""
    for _ in range(20):
        node.up()
        with contextlib.suppress(LogUnavailable):
            return node.texts(room)
    return node.texts(room)


def goes_on(node, room, kept):
    """Read and post until it works, as clients do; the room holds what is kept, and then the new messages."""
    texts = read(node, room)
    assert texts in ([], kept)
    assert node.post_until_kept("n1", "n2", room=room)[1][0] == "posted"
    page = node.read(room)
    assert [entry.message for entry in page.entries if entry not in SEED] == [*texts, "n1", "n2"]
    numbers = [entry.number for entry in page.entries]
    assert numbers == [*range(page.first, page.head + 1)]


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_loss_of_one_or_two_keys(redis, node, restart, events):
    """Running and restarted nodes go on after the loss of each key and each pair, with a seed and without."""
    for index, lost in enumerate(LOSSES):
        redis.flush()
        seed = SEED if index % 2 else ()
        first = node(redis.url)
        fill(first)
        epoch = first.store.epoch
        if restart:
            first.close()
        redis.call("DEL", *lost)
        if restart:
            first = node(redis.url, seed=seed)
        goes_on(first, "main", ["m1", "m2"])
        goes_on(first, "team", ["t1", "t2"])
        if lost == (LABEL,):
            assert first.texts("team") == ["t1", "t2", "n1", "n2"]
            assert first.post("t1", room="team", label=True) == [("posted", 5)]
        second = node(redis.url, seed=seed)
        until(first.loop, lambda one=first, two=second: one.store.epoch == two.store.epoch)
        assert read(second, "cold") == ([] if COLD in lost else ["c1"]), lost
        assert (second.store.epoch != epoch) == any(NEW_EPOCH[key] for key in lost), lost
        first.close()
        second.close()


@pytest.mark.parametrize("key", [LOG, HEADS, FEED, TEAM])
def test_loss_is_logged_with_its_key(redis, node, events, key):
    """The node that draws the new epoch names the key that was lost."""
    first = node(redis.url)
    fill(first)
    redis.call("DEL", key)
    goes_on(first, "team", ["t1", "t2"])
    until(first.loop, lambda: first.interruptions)
    (line,) = [event for event in events if "has lost {lost}" in event["log_format"]]
    assert (line["lost"], line["epoch"]) == (key, first.store.epoch)
    assert first.interruptions == 1


def test_restart_after_the_feed_was_lost(redis, node):
    """Pages do not wait for feed entries that are lost."""
    first = node(redis.url)
    fill(first)
    first.close()
    redis.call("DEL", FEED)
    assert node(redis.url).texts("team") == ["t1", "t2"]


def test_numbers_go_on_after_the_loss_of_a_room(redis, node):
    """A label of a lost message never matches another message."""
    first = node(redis.url)
    fill(first)
    redis.call("DEL", TEAM)
    assert first.post("t2", room="team") == [UNAVAILABLE]
    assert first.up().post(*"abc", room="team") == [("posted", 3), ("posted", 4), ("posted", 5)]
    assert first.post("t1", room="team", label=True) == [("posted", 6)]


def test_label_whose_number_was_used_again(redis, node):
    """After the loss of the numbers, a label is void if its number belongs to another message."""
    first = node(redis.url)
    fill(first)
    redis.call("DEL", TEAM, HEADS)
    assert first.post_until_kept(*"ab", room="team") == [("posted", 1), ("posted", 2)]
    assert first.post("t1", room="team", label=True) == [("posted", 3)]
    assert first.post("t1", "a", room="team", label=True) == [("duplicate", 3), ("duplicate", 1)]


def test_label_of_a_message_beyond_ascii(redis, node):
    """The digest in a label and that of the stored message agree for every character."""
    first = node(redis.url)
    texts = ["ä", "漢字", "🙂🙂", "a\u0300"]
    stored = [("posted", number) for number in range(1, 5)]
    assert first.post(*texts, room="team", label=True) == stored
    assert first.post(*texts, room="team", label=True) == [("duplicate", number) for _, number in stored]


def test_loss_in_an_emptied_room(redis, node):
    """A room whose messages were all trimmed takes posts again after its number was lost."""
    first = node(redis.url)
    fill(first)
    redis.call("XTRIM", TEAM, "MAXLEN", 0)
    assert first.read("team").head == 2
    redis.call("DEL", HEADS)
    goes_on(first, "team", [])
    assert first.read("team").first == 1


def test_emptied_feed(redis, node):
    """A feed that has lost its entries, and whose key remains, takes entries again."""
    first = node(redis.url)
    fill(first)
    redis.call("XTRIM", FEED, "MAXLEN", 0)
    goes_on(first, "team", ["t1", "t2"])


def test_epoch_drawn_by_hand_on_an_empty_redis(redis, node):
    """The command of docs/operations.md also leaves a usable log if the log is gone."""
    redis.call("HSET", LOG, "epoch", "byhand")
    first = node(redis.url)
    assert first.store.epoch != "byhand"
    assert first.post("a") == [("posted", 1)]
    assert first.texts() == ["a"]


def test_loss_while_memory_is_full(redis, node):
    """A new epoch does not need free memory."""
    first = node(redis.url)
    fill(first)
    epoch = first.store.epoch
    redis.call("CONFIG", "SET", "maxmemory", 1)
    redis.call("DEL", TEAM)
    with pytest.raises(LogUnavailable, match="lost messages"):
        first.read("team")
    until(first.loop, lambda: first.store.epoch != epoch)
    first.fails("OOM")
    assert first.texts("team") == []
    redis.call("CONFIG", "SET", "maxmemory", 0)
    assert first.up().post("a", room="team") == [("posted", 3)]


# The seed


def seed_of(count):
    return [Entry(number, "ann", f"text {number}", "2024-10-20T12:30:00Z") for number in range(1, count + 1)]


def test_long_seed_is_stored_in_pieces(redis, node, monkeypatch):
    """A seed of any length is stored once, by the nodes that start together; no request has over 500 messages."""
    sizes = []
    run = RedisConnection.run

    def counting(connection, script, keys, *args):
        sizes.append(len(args))
        return run(connection, script, keys, *args)

    monkeypatch.setattr(RedisConnection, "run", counting)
    seed = seed_of(2345)
    nodes = [node(redis.url, seed=seed, at_once=True) for _ in range(2)]
    for each in nodes:
        assert each.up().read().entries == seed
    assert nodes[0].store.epoch == nodes[1].store.epoch
    assert nodes[0].post("a") == [("posted", 2346)]
    assert max(sizes) == 8 + 5 * 500


def test_seed_is_not_sent_again(redis, node, loop):
    """Checks of the log do not contain the seed."""
    seed = [Entry(1, "ann", "x" * 5000, "2024-10-20T12:30:00Z")]
    node(redis.url, seed=seed)

    def received():
        return int(redis.info("stats")["total_net_input_bytes"])

    def checks():
        return int(redis.info("commandstats")["cmdstat_evalsha"].partition("=")[2].partition(",")[0])

    before, began = received(), checks()
    until(loop, lambda: checks() >= began + 3)
    assert received() - before < 5000 * 3


@pytest.mark.parametrize("count", [5, 3, 0])
def test_seed_that_was_not_finished(redis, node, count):
    """The next node finishes the same seed, and replaces another one."""
    begun, seed = seed_of(5), seed_of(count)
    redis.call("HSET", LOG, "seeding", digest(*(text for entry in begun for text in entry[1:4])))
    for number in (1, 2):
        redis.call(
            "XADD", MAIN, f"{number}-1729427400000000", "u", "ann", "m", f"text {number}", "t", begun[0].timestamp
        )
    first = node(redis.url, seed=seed)
    assert first.read().entries == seed
    assert first.post("a") == [("posted", count + 1)]
    assert redis.call("HGET", LOG, "seeding") is None
