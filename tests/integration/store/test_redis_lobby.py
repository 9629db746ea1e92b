"""The lobby: presence shared between nodes through a real Redis; the tests call `tick`."""

import pytest
from support.redises import Proxy, Redis, WatchedLink, each_binary, until, wait_in

from chatd.room.log import LogUnavailable
from chatd.room.presence import Occupancy
from chatd.store.base import Retention
from chatd.store.redis import lobby as redis_lobby
from chatd.store.redis import redis_session
from chatd.store.redis.link import Link, RedisAddress
from chatd.store.redis.lobby import BEAT_SECONDS, LASTING_SECONDS, LIVE_SECONDS
from chatd.store.redis.store import RedisStore

ANN, BOB = Occupancy(1, frozenset({"ann"})), Occupancy(2, frozenset({"bob", "bo"}))
NOBODY = Occupancy(0, frozenset())


class RecordingListener:
    """A node, and the notifications that it received."""

    def __init__(self, store, link):
        self.store = store
        self.link = link
        self.events = []
        store.lobby.follow(self)

    @property
    def node(self):
        return self.store.lobby.node

    def occupancy_changed(self, room, node, here):
        self.events.append((room, node, here))

    def typing(self, room, usernames):
        self.events.append((room, usernames))

    def node_left(self, node):
        self.events.append(node)


class Nodes:
    """Several nodes on one Redis."""

    def __init__(self, loop, server):
        self.loop = loop
        self.server = server
        self.open = []

    def add(self, feed=None):
        """Open one more node; its feed may come from another URL."""
        link = WatchedLink(self.server.url, self.loop, feed)
        store = RedisStore(link, Retention())
        guest = RecordingListener(store, link)
        self.wait(store.open(()))
        self.open.append(guest)
        return guest

    def wait(self, deferred):
        return wait_in(self.loop, deferred)

    def until(self, predicate):
        until(self.loop, predicate)

    def hears(self, guest, *events):
        """Wait for the next notifications of a node, and compare them."""
        self.until(lambda: len(guest.events) >= len(events))
        heard, guest.events[:] = guest.events[: len(events)], guest.events[len(events) :]
        assert heard == [*events]

    def say(self, guest, here, *rooms):
        """Report an occupancy of rooms, and wait until it is published."""
        for room in rooms:
            guest.store.lobby.report(room, here, ())
        self.beat(guest, 1)

    def beat(self, guest, ticks=BEAT_SECONDS):
        """Let so many seconds pass at a node, and wait for the answers."""
        for _ in range(ticks):
            guest.store.lobby.tick()
        self.answered(guest)

    def answered(self, guest):
        """Wait until Redis has answered all requests of a node."""
        self.until(lambda: guest.link.answered)

    def close(self, guest):
        self.open.remove(guest)
        self.wait(guest.store.close())

    def kill(self, guest):
        """End a node without a farewell."""
        self.open.remove(guest)
        guest.store.lobby.disconnected()
        self.wait(guest.store.close())


@each_binary
def server(request, tmp_path):
    with Redis(tmp_path, binary=request.param) as server:
        yield server


@pytest.fixture
def nodes(loop, server):
    nodes = Nodes(loop, server)
    yield nodes
    for guest in [*nodes.open]:
        nodes.close(guest)


def test_report_reaches_the_other_nodes(nodes):
    one, two, three = (nodes.add() for _ in range(3))
    one.store.lobby.report("main", ANN, ())
    one.store.lobby.tick()
    for other in (two, three):
        nodes.hears(other, ("main", one.node, ANN))
    two.store.lobby.report("main", BOB, ["bob"])
    two.store.lobby.tick()
    nodes.hears(one, ("main", two.node, BOB), ("main", ["bob"]))
    nodes.hears(three, ("main", two.node, BOB), ("main", ["bob"]))
    nodes.hears(two, ("main", one.node, ANN))
    assert one.events == two.events == three.events == []


def test_report_returns_the_others_occupancy(nodes):
    one = nodes.add()
    one.store.lobby.report("main", ANN, ())
    one.store.lobby.report("other", BOB, ())
    one.store.lobby.tick()
    nodes.answered(one)
    late = nodes.add()
    late.store.lobby.report("main", BOB, ())
    late.store.lobby.tick()
    nodes.hears(late, ("main", one.node, ANN))


def test_members_elsewhere_can_be_asked_for(nodes):
    """A node need not be in the room; its own members and those of dead nodes do not count."""
    one, two, three = (nodes.add() for _ in range(3))

    def elsewhere(guest, room="main"):
        return sorted(nodes.wait(guest.store.lobby.elsewhere(room)))

    assert elsewhere(one) == []
    nodes.say(one, ANN, "main")
    nodes.say(two, BOB, "main")
    assert elsewhere(one) == [BOB]
    assert elsewhere(three) == sorted([ANN, BOB])
    assert elsewhere(three, "other") == []
    nodes.server.call("DEL", f"{{chatd}}:node:{two.node}")
    assert elsewhere(three) == [ANN]
    assert elsewhere(one) == []
    nodes.server.call("SET", "{chatd}:here:main", "no hash")
    with pytest.raises(LogUnavailable, match="WRONGTYPE"):
        elsewhere(one)
    nodes.server.call("DEL", "{chatd}:here:main")
    one.store.lobby.disconnected()
    with pytest.raises(LogUnavailable, match="Redis is not connected"):
        elsewhere(one)


def test_occupancy_without_names(nodes):
    one, two = nodes.add(), nodes.add()
    one.store.lobby.report("main", Occupancy(300, None), ())
    one.store.lobby.tick()
    nodes.hears(two, ("main", one.node, Occupancy(300, None)))


def test_reports_are_merged(nodes):
    """Between two ticks only the latest report of a room is published."""
    one, two = nodes.add(), nodes.add()
    for here in (ANN, NOBODY, BOB):
        one.store.lobby.report("main", here, ["ann"])
    one.store.lobby.report("main", BOB, ["bob", "ann"])
    one.store.lobby.report("other", NOBODY, ())
    one.store.lobby.tick()
    nodes.hears(two, ("main", one.node, BOB), ("main", ["ann", "bob"]), ("other", one.node, NOBODY))
    one.store.lobby.tick()
    one.store.lobby.report("last", ANN, ())
    one.store.lobby.tick()
    nodes.hears(two, ("last", one.node, ANN))


def test_stopping_node_empties_its_rooms(nodes, server):
    one, two = nodes.add(), nodes.add()
    one.store.lobby.report("main", ANN, ())
    one.store.lobby.tick()
    nodes.hears(two, ("main", one.node, ANN))
    one.store.lobby.report("main", NOBODY, ())
    nodes.close(one)
    nodes.hears(two, ("main", one.node, NOBODY))
    assert server.call("KEYS", "{chatd}:here:*") == []
    assert server.call("KEYS", "{chatd}:node:*") == [f"{{chatd}}:node:{two.node}".encode()]


def test_dead_node_is_removed(nodes, server):
    """A node without heartbeats is removed, and late nodes never see it."""
    one, two = nodes.add(), nodes.add()
    for guest, here in ((one, ANN), (two, BOB)):
        guest.store.lobby.report("main", here, ())
        guest.store.lobby.tick()
        nodes.answered(guest)
    nodes.until(lambda: ("main", one.node, ANN) in two.events)
    nodes.kill(one)
    life = f"{{chatd}}:node:{one.node}"
    assert LIVE_SECONDS * 500 < server.call("PTTL", life) <= LIVE_SECONDS * 1000
    for _ in range(BEAT_SECONDS):
        two.store.lobby.tick()
    nodes.answered(two)
    assert one.node not in two.events
    server.call("DEL", life)  # as it would expire
    for _ in range(BEAT_SECONDS):
        two.store.lobby.tick()
    nodes.until(lambda: two.events[-1] == one.node)
    # Nodes that start later do not see it.
    three = nodes.add()
    three.store.lobby.report("main", ANN, ())
    three.store.lobby.tick()
    nodes.hears(three, ("main", two.node, BOB))
    assert server.call("HLEN", "{chatd}:here:main") == 2


def test_heartbeat_without_changes(nodes, server):
    one = nodes.add()
    life = f"{{chatd}}:node:{one.node}"
    for _ in range(2):
        server.call("DEL", life)
        for _ in range(BEAT_SECONDS):
            one.store.lobby.tick()
        nodes.until(lambda: server.call("EXISTS", life) == 1)


def test_missing_heartbeat_publishes_all_rooms(nodes, server):
    """A live node whose key vanished is back at the nodes that dropped it."""
    one, two = nodes.add(), nodes.add()
    nodes.say(one, ANN, "main", "other")
    nodes.hears(two, ("main", one.node, ANN), ("other", one.node, ANN))
    nodes.beat(one, 2)  # the rest of the first round, which would notice too
    server.call("DEL", f"{{chatd}}:node:{one.node}")
    nodes.beat(two)
    nodes.hears(two, one.node)
    nodes.beat(one)
    nodes.beat(one, 1)
    nodes.until(lambda: {*two.events} >= {("main", one.node, ANN), ("other", one.node, ANN)})


def test_change_after_a_missing_heartbeat_publishes_all_rooms(nodes, server):
    """A change in one room restores the key, but not the rooms that the other nodes dropped."""
    one, two = nodes.add(), nodes.add()
    nodes.say(one, ANN, "main", "other")
    nodes.hears(two, ("main", one.node, ANN), ("other", one.node, ANN))
    server.call("DEL", f"{{chatd}}:node:{one.node}")
    nodes.say(one, BOB, "main")
    nodes.hears(two, ("main", one.node, BOB))
    nodes.beat(one, 1)
    nodes.hears(two, ("main", one.node, BOB), ("other", one.node, ANN))


def test_new_epoch_publishes_all_rooms(nodes, server, brisk, monkeypatch):
    """Presence survives the loss of everything in Redis, before the next heartbeat."""
    monkeypatch.setattr(redis_lobby, "BEAT_SECONDS", LASTING_SECONDS)
    one, two = nodes.add(), nodes.add()
    nodes.say(one, ANN, "main")
    nodes.say(two, BOB, "main")
    nodes.hears(two, ("main", one.node, ANN))
    nodes.until(lambda: one.events)
    one.events.clear()
    two.events.clear()
    server.flush()
    nodes.until(lambda: ("main", two.node, BOB) in one.events and ("main", one.node, ANN) in two.events)
    assert server.call("HLEN", "{chatd}:here:main") == 2


def test_gap_in_the_stream_asks_again(nodes, server, monkeypatch):
    """A node that was stalled learns of a member that left, although the stream has dropped that entry."""
    monkeypatch.setattr(redis_session, "FEED_ENTRIES", 2)
    with Proxy(server.port) as feed:
        one, two = nodes.add(), nodes.add(feed.url())
        nodes.say(two, BOB, "main")
        nodes.say(one, ANN, "main")
        nodes.hears(two, ("main", one.node, ANN))
        feed.stall()
        nodes.say(one, NOBODY, "main")
        nodes.say(one, ANN, "a", "b")
        server.call("XTRIM", redis_lobby.STREAM, "MAXLEN", 2)
        feed.go_on()
        nodes.hears(two, ("a", one.node, ANN), ("b", one.node, ANN))
        nodes.answered(two)
        nodes.beat(two, 1)
        nodes.hears(two, ("main", one.node, NOBODY))


def test_full_read_without_a_gap(nodes, server, monkeypatch, events):
    """A node that was stalled reads on if the stream still holds what it has not read."""
    monkeypatch.setattr(redis_session, "FEED_ENTRIES", 2)
    with Proxy(server.port) as feed:
        one, two = nodes.add(), nodes.add(feed.url())
        nodes.say(one, ANN, "first")
        nodes.hears(two, ("first", one.node, ANN))
        feed.stall()
        rooms = ["a", "b", "c", "d"]
        nodes.say(one, ANN, *rooms)
        feed.go_on()
        nodes.hears(two, *[(room, one.node, ANN) for room in rooms])
        nodes.answered(two)
        assert not any("has dropped entries" in event["log_format"] for event in events)


def test_late_reply_does_not_undo_the_stream(nodes, server):
    """A reply that is older than what was read from the stream is not used, and the node asks again."""
    with Proxy(server.port) as feed:
        one, two = nodes.add(), nodes.add(feed.url())
        nodes.say(one, ANN, "main")
        nodes.hears(two, ("main", one.node, ANN))
        feed.stall()
        two.store.lobby.seen, seen = b"9999999999999-0", two.store.lobby.seen
        nodes.say(two, BOB, "main")
        assert two.events == []
        two.store.lobby.seen = seen
        nodes.beat(two, 1)
        nodes.hears(two, ("main", one.node, ANN))


def test_rooms_of_killed_nodes_expire(nodes, server, monkeypatch):
    """A live node publishes its rooms again in time, without news for the others."""
    monkeypatch.setattr(redis_lobby, "REPUBLISH_SECONDS", 3)
    one, two = nodes.add(), nodes.add()
    rooms = ["a", "b", "c", "d"]
    nodes.say(one, ANN, *rooms)
    nodes.hears(two, *[(room, one.node, ANN) for room in rooms])
    for room in rooms:
        assert 0 < server.call("PTTL", f"{{chatd}}:here:{room}") <= LASTING_SECONDS * 1000
        server.call("PEXPIRE", f"{{chatd}}:here:{room}", 60_000)
    nodes.beat(one, 6)
    for room in rooms:
        assert server.call("PTTL", f"{{chatd}}:here:{room}") > 60_000
    nodes.say(one, BOB, "a")
    nodes.hears(two, ("a", one.node, BOB))


def test_refused_departure_is_repeated(nodes, server):
    """A room whose last member left while Redis refused writes is emptied later."""
    one, two = nodes.add(), nodes.add()
    nodes.say(one, ANN, "main")
    nodes.hears(two, ("main", one.node, ANN))
    server.call("CONFIG", "SET", "maxmemory", "1")
    nodes.say(one, NOBODY, "main")
    nodes.beat(one)
    server.call("CONFIG", "SET", "maxmemory", "0")
    nodes.beat(one)
    nodes.beat(one, 1)
    nodes.until(lambda: ("main", one.node, NOBODY) in two.events)
    assert server.call("EXISTS", "{chatd}:here:main") == 0


def test_reconnect_publishes_all_rooms(nodes, server):
    one, two = nodes.add(), nodes.add()
    for guest, here in ((one, ANN), (two, BOB)):
        guest.store.lobby.report("main", here, ())
        guest.store.lobby.tick()
    nodes.hears(one, ("main", two.node, BOB))
    server.kill()
    nodes.until(lambda: one.store.fault and two.store.fault)
    for guest in (one, two):
        guest.store.lobby.tick()  # must not fail
        guest.events.clear()
    server.start()
    nodes.until(lambda: ("main", two.node, BOB) in one.events and ("main", one.node, ANN) in two.events)
    assert server.call("HLEN", "{chatd}:here:main") == 2


def test_refused_report_is_repeated(nodes, server):
    one, two = nodes.add(), nodes.add()
    server.call("CONFIG", "SET", "maxmemory", "1")
    one.store.lobby.report("main", ANN, ())
    for _ in range(BEAT_SECONDS):
        one.store.lobby.tick()
    nodes.answered(one)
    server.call("CONFIG", "SET", "maxmemory", "0")
    one.store.lobby.report("main", BOB, ())
    one.store.lobby.tick()
    nodes.hears(two, ("main", one.node, BOB))


def test_lobby_without_a_session(loop, server):
    store = RedisStore(Link(RedisAddress.parse(server.url), loop), Retention())
    store.lobby.report("main", ANN, ["ann"])
    store.lobby.tick()
    wait_in(loop, store.close())
    assert server.call("KEYS", "*") == []


def test_stream_is_bounded(nodes, server, monkeypatch):
    monkeypatch.setattr(redis_lobby, "KEEP", 100)
    one, two = nodes.add(), nodes.add()
    for hundred in range(5):
        rooms = [f"room-{100 * hundred + number}" for number in range(100)]
        for room in rooms:
            one.store.lobby.report(room, ANN, ())
        one.store.lobby.tick()
        nodes.hears(two, *[(room, one.node, ANN) for room in rooms])
    assert server.call("XLEN", redis_lobby.STREAM) <= 200
