"""The promise of a shared connection: each room loses nothing, repeats nothing, and no room starves another."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.houses import House
from support.shared_clients import SharedClient

from chatd.messages import Id
from chatd.room.registry import RELOAD_SECONDS

ROOMS = ("a", "b", "c")
LAG = 8
KEPT = 12

rooms = st.sampled_from(ROOMS)
spaces = st.none() | st.integers(0, 900)


class Logs(dict):
    """The texts of each room, as a follower of the log that misses nothing."""

    def __init__(self):
        super().__init__({room: [] for room in ROOMS})

    def appended(self, room, entries):
        self[room] += [entry.message for entry in entries]

    def trimmed(self, room, first):
        pass

    def interrupted(self):
        pass


class SharedMachine(RuleBasedStateMachine):
    """However rooms post, restart and end, and however the client stalls, it knows what it has of each room.

    The client follows the rules of docs/protocol.md.  It checks each frame against the logs.
    """

    @initialize(tail=st.integers(200, 2000), history=st.integers(1, 5), grants=st.integers(1, 3))
    def begin(self, tail, history, grants):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("chatd.room.tail.TAIL_BYTES", tail)
        self.patch.setattr("chatd.room.tail.RUN_BYTES", 400)
        self.patch.setattr("chatd.room.room.MAX_LAG", LAG)
        self.patch.setattr("chatd.room.registry.MAX_LAG", LAG)
        self.patch.setattr("chatd.transport.subscription.GRANTS", grants)
        self.house = House(seed=(), history=history, retain=str(KEPT))
        self.ann = SharedClient(self.house, settle=lambda: None)
        self.texts = 0
        self.logs = Logs()
        self.house.log.follow(self.logs)
        self.inside, self.asked = set(), set()
        self.last = {}
        self.labels, self.acks = 0, []
        for room in ROOMS:
            self.join(room)

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    # The log

    def write(self, room, number):
        for _ in range(number):
            self.texts += 1
            self.house.say(f"m{self.texts}", room=room)

    @rule(room=rooms, number=st.integers(1, 6))
    def post(self, room, number):
        self.write(room, number)

    @rule(names=st.lists(rooms, min_size=2, max_size=6), space=st.integers(0, 300))
    def burst(self, names, space):
        """Append to several rooms while the client does not read."""
        self.ann.fill(space)
        for room in names:
            self.write(room, 1)
        self.house.turn()

    @rule(room=rooms, number=st.integers(0, 12))
    def miss(self, room, number):
        """Append entries of which the server is not notified, as when it is cut off from Redis."""
        self.house.rooms.appended = lambda room, entries: None
        self.write(room, number)
        del self.house.rooms.appended
        self.house.rooms.interrupted()

    @rule()
    def lose(self):
        """Begin a new epoch."""
        self.house.log.epoch = f"epoch{self.texts}x{len(self.acks)}"
        self.house.rooms.interrupted()

    @rule()
    def slow(self):
        self.house.log.slow = True

    @rule()
    @precondition(lambda self: self.house.log.waiting)
    def answer(self):
        self.house.log.answer()

    @rule()
    @precondition(lambda self: self.house.log.waiting)
    def fail(self):
        self.house.log.fail()

    # The client

    @rule()
    def turn(self):
        self.house.clock.turn()

    @rule(space=spaces)
    def fill(self, space):
        self.ann.fill(space)

    @rule(space=spaces)
    def drain(self, space):
        self.ann.drain(space)
        self.read()

    @rule(room=rooms)
    @precondition(lambda self: self.asked | self.inside != {*ROOMS})
    def join(self, room):
        if room not in self.asked | self.inside:
            self.asked.add(room)
            last = {"last_event_id": str(self.last[room])} if room in self.last else {}
            self.ann.join(room, label="join", **last)

    @rule(room=rooms)
    def leave(self, room):
        if room in self.inside:
            self.ann.say(type="leave", room=room)

    @rule(room=rooms, number=st.integers(1, 2))
    def say(self, room, number):
        """Post, as a client that may have been removed from the room meanwhile."""
        for _ in range(number):
            self.labels += 1
            self.ann.say(room=room, username="bob", message=f"p{self.labels}", label=f"l{self.labels}")

    # What it receives

    @rule()
    def read(self):
        for frame in self.ann.read():
            getattr(self, f"on_{frame['type']}")(frame["room"], frame)
        assert self.ann.closed is None

    def on_history(self, room, frame):
        end, last = Id.parse(frame["id"]), self.last.get(room)
        texts = [one["message"] for one in frame["data"]]
        if frame.get("label"):
            assert room in self.asked
            self.asked.discard(room)
            self.inside.add(room)
            assert ("resumed" in frame) == (last is not None)
        else:
            assert room in self.inside
            assert frame["resumed"] is False
        if frame.get("resumed"):
            assert (end.epoch, end.number - len(texts)) == last
        elif last is not None and last.epoch == end.epoch:
            assert end.number > last.number + LAG or last.number + 1 < len(self.logs[room]) - KEPT + 1
        assert texts == self.logs[room][end.number - len(texts) : end.number]
        self.last[room] = end

    def on_message(self, room, frame):
        assert room in self.inside
        last, this = self.last[room], Id.parse(frame["id"])
        assert this == (last.epoch, last.number + 1)
        assert frame["data"]["message"] == self.logs[room][this.number - 1]
        self.last[room] = this

    def on_ack(self, room, frame):
        assert room in self.inside
        place, last = Id.parse(frame["id"]), self.last[room]
        assert place.epoch == last.epoch
        assert place.number <= last.number
        self.acks.append(frame["label"])

    def on_left(self, room, frame):
        assert frame.get("code", "EVICTED") == "EVICTED"
        self.inside.remove(room)

    def on_error(self, room, frame):
        if frame["code"] == "NOT_JOINED":
            assert frame.get("label", "l") != "join"
        else:
            assert (frame["code"], frame["label"]) == ("UNAVAILABLE", "join")
            self.asked.remove(room)

    @rule()
    def settle(self):
        """When the client reads and the log answers, each room that it is in has everything."""
        self.house.log.release()
        for _ in range(200):
            self.ann.drain()
            self.house.turn()
            if self.house.clock.idle_for(RELOAD_SECONDS) and not self.ann.transport.value():
                break
            self.house.clock.rightNow += RELOAD_SECONDS / 20
        self.read()
        session = self.ann.session
        assert not self.asked
        assert {*session.subscriptions} == self.inside
        assert not session.waiting
        assert not session.must_wait()
        assert not session.has_pending(session.head)
        for room in self.inside:
            assert self.last[room] == (self.house.epoch, len(self.logs[room]))


SharedMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestSharedMachine = SharedMachine.TestCase


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(count=st.integers(2, 20), takes=st.lists(st.integers(1, 2000), min_size=40, max_size=40))
def test_no_room_starves(count, takes):
    """While all rooms have more than the client reads, each is served before any is served three times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatd.room.tail.RUN_BYTES", 400)
        house = House(seed=())
        ann = SharedClient(house)
        names = [f"r{number:02}" for number in range(count)]
        ann.join(*names)
        ann.read()
        ann.fill(0)
        for name in names:
            house.say(*["x" * 100] * 60, room=name)
        house.turn()
        served = []
        for space in takes:
            ann.drain(space)
            for frame in ann.read():
                if served[-1:] != [frame["room"]]:
                    served.append(frame["room"])
    for name in names:
        places = [place for place, one in enumerate(served) if one == name]
        for first, third in zip(places, places[2:], strict=False):
            assert {*served[first:third]} == {*names}, served
