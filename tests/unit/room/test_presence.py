"""Presence: watchers get a snapshot, then deltas, at most once a second."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.helpers import Turns
from support.websocket_frames import read_frames

from chatd.room.presence import MAX_TYPING, MAX_USERS, PRESENCE, ROUND_SECONDS, TYPING, Occupancy, Presence
from chatd.room.sweep import SLICE_MEMBERS
from chatd.transport import frames

BOTH = (PRESENCE, TYPING)


class Watcher:
    """A member that records the frames sent to it, and when."""

    def __init__(self, name=None, events=(), clock=None, seconds=0.0):
        self.name = name
        self.events = frozenset(events)
        self.ready = True
        self.frames = []
        self.clock, self.seconds = clock, seconds
        self.times = []

    @property
    def takes_events(self):
        return self.ready

    def send_frame(self, frame):
        assert self.ready
        self.frames.append(frame)
        if self.clock:
            self.times.append(self.clock.seconds())
            self.clock.rightNow += self.seconds

    @property
    def presence_frames(self):
        return [text["data"] for text in read_frames(b"".join(self.frames)) if text["type"] == "presence"]

    @property
    def typing(self):
        return [text["data"]["users"] for text in read_frames(b"".join(self.frames)) if text["type"] == "typing"]

    @property
    def here(self):
        """The count and the names, computed from the snapshots and deltas received."""
        count, names = None, None
        for data in self.presence_frames:
            count = data["count"]
            if "join" in data:
                assert not names & {*data["join"]}
                assert names >= {*data["leave"]}
                names = (names - {*data["leave"]}) | {*data["join"]}
            else:
                names = {*data["users"]} if "users" in data else None
        return count, names


class Place:
    """The part of a room that presence needs: its members."""

    def __init__(self, clock, report=None):
        self.clock = clock
        self.members = {}
        self.presence = Presence(self.members, frames, clock, report)

    def join(self, *members):
        for member in members:
            self.members[member] = None
            self.presence.joined(member)
        return members[0]

    def leave(self, member):
        del self.members[member]
        self.presence.left(member)

    def rename(self, member, name):
        member.name = name
        self.presence.changed()


@pytest.fixture
def place(clock):
    return Place(clock)


def watcher(name=None, events=(PRESENCE,)):
    return Watcher(name, events)


def slow_watchers(clock, count, events=(PRESENCE,)):
    """Return watchers so slow that a slice serves one batch of them."""
    return [Watcher(None, events, clock, 0.001) for _ in range(count)]


# Content


def test_snapshot_then_delta(place, clock):
    ann = place.join(watcher("ann"))
    place.join(Watcher("bob"), Watcher("cy"))
    clock.turns()
    place.join(Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames == [
        {"count": 3, "users": ["ann", "bob", "cy"]},
        {"count": 4, "join": ["dee"], "leave": []},
    ]
    assert ann.here == (4, {"ann", "bob", "cy", "dee"})


def test_delta_merges_one_second(place, clock):
    """All changes of one second are one delta with sorted names."""
    ann = place.join(watcher("ann"))
    bob = place.join(Watcher("bob"))
    clock.turns()
    place.leave(bob)
    place.join(Watcher("zoe"), Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [{"count": 3, "join": ["dee", "zoe"], "leave": ["bob"]}]


def test_new_watcher_gets_snapshot(place, clock):
    """A new watcher gets a snapshot while the others get a delta."""
    ann = place.join(watcher("ann"))
    clock.turns()
    bob = place.join(watcher("bob"))
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [{"count": 2, "join": ["bob"], "leave": []}]
    assert bob.presence_frames == [{"count": 2, "users": ["ann", "bob"]}]


def test_short_visit_is_not_sent(place, clock):
    """A member that joins and leaves within one second appears in no frame."""
    ann = place.join(watcher("ann"))
    clock.turns()
    bob = place.join(Watcher("bob"))
    place.leave(bob)
    clock.advance(ROUND_SECONDS)
    assert len(ann.presence_frames) == 1


def test_nameless_members_are_counted(place, clock):
    one = place.join(watcher())
    place.join(Watcher())
    clock.turns()
    place.join(Watcher())
    clock.advance(ROUND_SECONDS)
    assert one.presence_frames == [{"count": 2, "users": []}, {"count": 3, "join": [], "leave": []}]


def test_name_shared_by_members(place, clock):
    """A name joins with its first member and leaves with its last."""
    ann = place.join(watcher("ann"))
    twins = Watcher("bob"), Watcher("bob")
    clock.turns()
    for change in (
        lambda: place.join(twins[0]),
        lambda: place.join(twins[1]),
        lambda: place.leave(twins[0]),
        lambda: place.leave(twins[1]),
    ):
        change()
        clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [
        {"count": 2, "join": ["bob"], "leave": []},
        {"count": 3, "join": [], "leave": []},
        {"count": 2, "join": [], "leave": []},
        {"count": 1, "join": [], "leave": ["bob"]},
    ]


def test_rename_is_leave_and_join(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    place.rename(ann, "anna")
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [{"count": 1, "join": ["anna"], "leave": ["ann"]}]


def test_no_frame_without_change(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    place.presence.changed()
    clock.advance(ROUND_SECONDS)
    assert len(ann.frames) == 1
    assert clock.getDelayedCalls() == []


def test_above_max_users_only_count(place, clock):
    """Above MAX_USERS names only the count is sent, and below it a snapshot again."""
    ann = place.join(watcher("n000"))
    place.join(*[Watcher(f"n{number:03}") for number in range(1, MAX_USERS)])
    clock.turns()
    one_more = place.join(Watcher("zoe"))
    clock.advance(ROUND_SECONDS)
    another = place.join(Watcher("zed"))
    clock.advance(ROUND_SECONDS)
    place.leave(one_more)
    clock.advance(ROUND_SECONDS)
    place.leave(another)
    clock.advance(ROUND_SECONDS)
    names = [f"n{number:03}" for number in range(MAX_USERS)]
    assert ann.presence_frames == [
        {"count": MAX_USERS, "users": names},
        {"count": MAX_USERS + 1},
        {"count": MAX_USERS + 2},
        {"count": MAX_USERS + 1},
        {"count": MAX_USERS, "users": names},
    ]


def test_rename_above_max_users_is_not_sent(place, clock):
    ann = place.join(watcher("ann"))
    others = [Watcher(f"n{number}") for number in range(MAX_USERS)]
    place.join(*others)
    clock.turns()
    place.rename(others[0], "another")
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames == [{"count": MAX_USERS + 1}]


def test_max_users_counts_names(place, clock):
    """MAX_USERS bounds the names, not the members."""
    ann = place.join(watcher("ann"))
    place.join(*[Watcher("bob") for _ in range(MAX_USERS)])
    clock.turns()
    assert ann.presence_frames == [{"count": MAX_USERS + 1, "users": ["ann", "bob"]}]


def test_only_watchers_get_presence(place, clock):
    member = place.join(Watcher("ann"))
    typist = place.join(watcher("bob", [TYPING]))
    place.join(watcher("cy"))
    for _ in range(3):
        place.join(Watcher("dee"))
        clock.advance(ROUND_SECONDS)
    assert [member.frames, typist.frames] == [[], []]


# Other nodes


class Node(Place):
    """A room at one node, with its reports to the other nodes."""

    def __init__(self, clock):
        self.reports = []
        super().__init__(clock, lambda here, typing: self.reports.append((*here, typing)))


@pytest.fixture
def node(clock):
    return Node(clock)


def test_report_once_a_second(node, clock):
    """The other nodes get a report at most once a second, even without watchers here."""
    node.join(Watcher("ann"))
    clock.turns()
    node.join(Watcher("bob"), Watcher())
    clock.turns()
    assert node.reports == [(1, {"ann"}, [])]
    clock.advance(ROUND_SECONDS)
    assert node.reports[1:] == [(3, {"ann", "bob"}, [])]
    clock.advance(10)
    assert len(node.reports) == 2
    assert clock.getDelayedCalls() == []


def test_report_empty_room_at_once(node, clock):
    ann, bob = Watcher("ann"), watcher("bob", BOTH)
    node.join(ann, bob)
    clock.turns()
    node.leave(bob)
    node.presence.typing("ann")
    node.leave(ann)
    assert node.reports[1:] == [(0, frozenset(), ())]
    assert clock.getDelayedCalls() == []


def test_report_count_above_max_users(node, clock):
    node.join(*[Watcher(f"n{number}") for number in range(MAX_USERS + 1)])
    clock.turns()
    assert node.reports == [(MAX_USERS + 1, None, [])]


def test_remote_change_is_not_reported(node, clock):
    ann = node.join(watcher("ann"))
    clock.turns()
    node.presence.remote_changed("B", Occupancy(1, frozenset({"bob"})))
    clock.advance(ROUND_SECONDS)
    assert len(node.reports) == 1
    assert ann.here == (2, {"ann", "bob"})


def test_watchers_see_sum_of_nodes(node, clock):
    ann = node.join(watcher("ann"))
    node.presence.remote_changed("B", Occupancy(2, frozenset({"bob", "ann"})))
    node.presence.remote_changed("C", Occupancy(1, frozenset({"cy"})))
    clock.turns()
    assert ann.presence_frames == [{"count": 4, "users": ["ann", "bob", "cy"]}]
    for here in (Occupancy(1, frozenset({"bob"})), Occupancy(0, frozenset()), None):
        node.presence.remote_changed("B", here)
        clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [
        {"count": 3, "join": [], "leave": []},
        {"count": 2, "join": [], "leave": ["bob"]},
    ], "a name is here until it is at no node"
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    "others",
    [
        [Occupancy(300, None)],
        [Occupancy(150, frozenset(map(str, range(150)))), Occupancy(50, frozenset(map(str, range(150, 200))))],
    ],
)
def test_max_users_counts_all_nodes(node, clock, others):
    ann = node.join(watcher("ann"))
    for name, here in enumerate(others):
        node.presence.remote_changed(str(name), here)
    clock.turns()
    assert ann.presence_frames == [{"count": 1 + sum(here.members for here in others)}]
    node.presence.remote_changed("0", None)
    clock.advance(ROUND_SECONDS)
    assert ann.here == (
        1 + sum(here.members for here in others[1:]),
        {"ann"} | {*map(str, range(150, 200))} if others[1:] else {"ann"},
    )


def test_typing_is_sent_and_reported_once(node, clock):
    ann = node.join(watcher("ann", [TYPING]))
    node.presence.typing("bob")
    node.presence.remote_typing(["cy", "bob"])
    clock.turns()
    assert node.reports == [(1, {"ann"}, ["bob"])]
    assert ann.typing == [["bob", "cy"]]
    clock.advance(ROUND_SECONDS)
    assert len(node.reports) == len(ann.typing) == 1
    node.presence.remote_typing([str(number) for number in range(MAX_TYPING + 1)])
    clock.advance(ROUND_SECONDS)
    assert ann.typing[1:] == [[str(number) for number in range(MAX_TYPING)]]
    assert len(node.reports) == 1


def test_remote_typing_without_watchers(node, clock):
    """A room without watchers forgets who types at other nodes."""
    node.join(Watcher("ann"))
    clock.turns()
    node.presence.remote_typing(["cy"])
    assert clock.getDelayedCalls() == []
    clock.advance(ROUND_SECONDS)
    ann = node.join(watcher("bob", [TYPING]))
    clock.advance(ROUND_SECONDS)
    assert ann.typing == []


# Timing


def test_no_frame_in_turn_of_change(place, clock):
    ann = place.join(watcher("ann"))
    assert ann.frames == []
    clock.turn()
    assert len(ann.frames) == 1


def test_one_frame_a_second(place, clock):
    """A room sends at most one frame a second, and at once after a quiet time."""
    ann = place.join(Watcher("ann", [PRESENCE], clock))
    for _ in range(32):
        clock.turns(3)
        place.join(Watcher())
        clock.advance(0.125)
    assert ann.times == [0, 1, 2, 3, 4]
    clock.advance(10.5)
    place.join(Watcher())
    clock.turn()
    assert ann.times[5:] == [14.5]


def test_crowd_shares_one_snapshot(place, clock):
    crowd = [watcher(f"n{number % 100}") for number in range(2000)]
    place.join(*crowd)
    clock.turns()
    clock.advance(ROUND_SECONDS)
    assert sum(len(one.frames) for one in crowd) == 2000
    assert len({id(one.frames[0]) for one in crowd}) == 1


def test_crowd_within_one_second(place, clock):
    """Thousands of watchers that join in one second get one frame each."""
    ann = place.join(watcher("ann"))
    clock.turns()
    crowd = [watcher() for _ in range(2000)]
    for number, one in enumerate(crowd):
        place.join(one)
        if number % 200 == 0:
            clock.advance(0.09)
    clock.advance(ROUND_SECONDS)
    assert len(ann.frames) == 2
    assert {len(one.frames) for one in crowd} == {1}
    assert len({id(one.frames[0]) for one in crowd}) == 1


def test_watchers_share_delta_bytes(place, clock):
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert ann.frames[1] is bob.frames[1]


def test_no_timer_without_watchers(place, clock):
    members = [Watcher("ann"), Watcher("bob")]
    place.join(*members)
    place.rename(members[0], "anna")
    place.presence.typing("ann")
    place.leave(members[1])
    assert clock.getDelayedCalls() == []


def test_no_timer_without_changes(place, clock):
    place.join(watcher("ann"), watcher("bob", BOTH))
    place.presence.typing("ann")
    clock.turns()
    assert clock.getDelayedCalls() == []


def test_timer_stops_with_last_watcher(place, clock):
    ann, bob = watcher("ann"), Watcher("bob")
    place.join(ann, bob)
    clock.turns()
    place.rename(bob, "bo")
    assert len(clock.getDelayedCalls()) == 1
    place.leave(ann)
    assert clock.getDelayedCalls() == []
    place.leave(bob)


def test_first_watcher_after_a_gap(place, clock):
    """A watcher gets a snapshot if the room had no watcher for a while."""
    ann = place.join(watcher("ann"))
    clock.turns()
    place.leave(ann)
    place.join(Watcher("bob"))
    cy = place.join(watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert cy.presence_frames == [{"count": 2, "users": ["bob", "cy"]}]


def test_rejoin_keeps_one_frame_a_second(place, clock):
    times = []
    for _ in range(20):
        ann = place.join(Watcher("ann", [PRESENCE], clock))
        clock.turns(3)
        place.leave(ann)
        times += ann.times
        clock.advance(0.25)
    assert times == [0, 1, 2, 3, 4]


# Full watchers


def test_full_watcher_gets_snapshot_later(place, clock):
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    ann.ready = False
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    place.join(Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert len(ann.presence_frames) == 1
    ann.ready = True
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [{"count": 4, "users": ["ann", "bob", "cy", "dee"]}]
    assert len(bob.presence_frames) == 3
    clock.advance(ROUND_SECONDS)
    assert clock.getDelayedCalls() == []


def test_watcher_full_on_joining(place, clock):
    ann = watcher("ann")
    ann.ready = False
    place.join(ann)
    clock.turns()
    ann.ready = True
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames == [{"count": 1, "users": ["ann"]}]


def test_full_watcher_without_changes(place, clock):
    """A watcher that was full while nothing changed gets a delta next."""
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    ann.ready = False
    place.presence.changed()
    clock.advance(ROUND_SECONDS)
    ann.ready = True
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert ann.presence_frames[1:] == [{"count": 3, "join": ["cy"], "leave": []}]


def test_watcher_that_stays_full(place, clock):
    """A watcher that stays full costs one check a second."""
    ann, bob = watcher("ann"), watcher("bob")
    ann.ready = False
    place.join(ann, bob)
    due = []
    for _ in range(40):
        clock.turns(5)
        due += [call.getTime() for call in clock.getDelayedCalls()]
        clock.rightNow += 0.25
    assert due == [float(second) for second in range(1, 11) for _ in range(4)]
    assert len(bob.frames) == 1
    place.leave(ann)
    clock.advance(ROUND_SECONDS)
    assert clock.getDelayedCalls() == []


def test_watcher_full_after_first_frame(place, clock):
    """A watcher that is full after the presence frame gets no typing frame."""
    ann = place.join(watcher("ann", BOTH))

    def send_frame(frame):
        ann.frames.append(frame)
        ann.ready = False

    ann.send_frame = send_frame
    place.presence.typing("bob")
    clock.turns()
    assert [len(ann.presence_frames), ann.typing] == [1, []]


# Slices


def test_long_round_is_sliced(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 3)
    place.join(*crowd)
    served = []
    for _ in range(4):
        clock.turn()
        served.append(sum(bool(one.frames) for one in crowd))
    assert served == [SLICE_MEMBERS, SLICE_MEMBERS * 2, SLICE_MEMBERS * 3, SLICE_MEMBERS * 3]
    assert clock.getDelayedCalls() == []


def test_change_during_round(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2, BOTH)
    place.join(*crowd)
    place.presence.typing("ann")
    clock.turn()
    place.join(Watcher("bob"))
    place.presence.typing("bob")
    late = place.join(watcher("cy", BOTH))
    clock.turns()
    whole = {"count": len(crowd), "users": []}
    assert [[one.presence_frames, one.typing] for one in crowd] == [[[whole], [["ann"]]]] * len(crowd)
    assert late.frames == []
    clock.advance(ROUND_SECONDS)
    clock.turns()
    change = {"count": len(crowd) + 2, "join": ["bob", "cy"], "leave": []}
    assert [[one.presence_frames, one.typing] for one in crowd] == [[[whole, change], [["ann"], ["bob"]]]] * len(crowd)
    assert late.presence_frames == [{"count": len(crowd) + 2, "users": ["bob", "cy"]}]


def test_leave_during_round(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2)
    place.join(*crowd)
    clock.turn()
    place.leave(crowd[-1])
    clock.advance(ROUND_SECONDS)
    clock.turns()
    assert crowd[-1].frames == []
    assert crowd[-2].here == (len(crowd) - 1, set())


def test_round_ends_with_last_watcher(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2)
    place.join(*crowd)
    clock.turn()
    for one in crowd:
        place.leave(one)
    assert clock.getDelayedCalls() == []
    ann = place.join(watcher("ann"))
    clock.rightNow += ROUND_SECONDS
    clock.turn()
    assert ann.presence_frames == [{"count": 1, "users": ["ann"]}]


def test_round_longer_than_a_second(place, clock):
    crowd = [Watcher(None, [PRESENCE], clock, 0.02) for _ in range(SLICE_MEMBERS)]
    place.join(*crowd)
    clock.turn()
    place.join(Watcher("bob"))
    clock.turns()
    assert crowd[0].here == (len(crowd) + 1, {"bob"})


# Typing


def test_typing_goes_to_subscribers(place, clock):
    ann, bob, cy = watcher("ann", [TYPING]), watcher("bob"), watcher("cy", BOTH)
    place.join(ann, bob, cy, Watcher("dee"))
    place.presence.typing("dee")
    clock.turns()
    assert [one.typing for one in (ann, bob, cy)] == [[["dee"]], [], [["dee"]]]
    assert [len(one.presence_frames) for one in (ann, bob, cy)] == [0, 1, 1]


def test_typing_merges_one_second(place, clock):
    """All users that type in one second are in one frame, shared by all watchers."""
    ann, bob = watcher(None, [TYPING]), watcher(None, [TYPING])
    place.join(ann, bob)
    clock.turns()
    for name in ("cy", "dee", "cy", "cy"):
        place.presence.typing(name)
        clock.advance(0.1)
    clock.advance(ROUND_SECONDS)
    assert ann.typing == [["cy", "dee"]]
    assert ann.frames[0] is bob.frames[0]


def test_typing_is_sent_once(place, clock):
    ann = place.join(watcher("ann", BOTH))
    place.presence.typing("bob")
    clock.turns()
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert [len(ann.presence_frames), ann.typing] == [2, [["bob"]]]
    assert clock.getDelayedCalls() == []


def test_typing_names_are_bounded(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    for number in range(MAX_TYPING * 2):
        place.presence.typing(f"n{number}")
    clock.turns()
    assert ann.typing == [[f"n{number}" for number in range(MAX_TYPING)]]


def test_typing_sends_no_presence(place, clock):
    ann = place.join(watcher("ann", BOTH))
    clock.turns()
    place.presence.typing("bob")
    clock.advance(ROUND_SECONDS)
    assert [len(ann.presence_frames), ann.typing] == [1, [["bob"]]]


def test_full_watcher_misses_typing(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    ann.ready = False
    place.presence.typing("bob")
    clock.turns()
    assert clock.getDelayedCalls() == []
    ann.ready = True
    clock.advance(ROUND_SECONDS * 3)
    assert ann.frames == []


def test_new_watcher_misses_past_typing(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    clock.turns()
    place.presence.typing("bob")
    place.leave(ann)
    clock.advance(60)
    cy = place.join(watcher("cy", [TYPING]))
    clock.turns()
    assert cy.typing == []


# Any order of events


class PresenceMachine(RuleBasedStateMachine):
    """After two quiet seconds each ready watcher knows the members from the frames that it received."""

    @initialize(slow=st.booleans(), most=st.integers(1, 4))
    def begin(self, slow, most):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("chatd.room.sweep.SLICE_MEMBERS", 2)
        self.patch.setattr("chatd.room.presence.MAX_USERS", most)
        self.most = most
        self.slow = slow
        self.clock = Turns()
        self.place = Place(self.clock)

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()

    @rule(name=st.none() | st.sampled_from("abcdef"), events=st.sampled_from([(), (PRESENCE,), (TYPING,), BOTH]))
    def join(self, name, events):
        self.place.join(Watcher(name, events, self.clock, 0.01 if self.slow else 0))

    @rule(which=st.randoms(use_true_random=False))
    @precondition(lambda self: self.place.members)
    def leave(self, which):
        member = which.choice([*self.place.members])
        self.place.leave(member)
        member.ready = False  # sending it anything fails the test

    @rule(which=st.randoms(use_true_random=False), name=st.sampled_from("abcdef"))
    @precondition(lambda self: self.place.members)
    def rename(self, which, name):
        self.place.rename(which.choice([*self.place.members]), name)

    @rule(which=st.randoms(use_true_random=False))
    @precondition(lambda self: self.place.members)
    def toggle(self, which):
        member = which.choice([*self.place.members])
        member.ready = not member.ready

    @rule(which=st.randoms(use_true_random=False), name=st.sampled_from("abcdef"))
    @precondition(lambda self: self.place.members)
    def miss_a_change(self, which, name):
        which.choice([*self.place.members]).ready = False
        self.rename(which, name)
        self.wait(5)

    @rule(name=st.sampled_from("abcdef"))
    def typing(self, name):
        self.place.presence.typing(name)

    @rule()
    def turn(self):
        self.clock.turn()

    @rule(quarters=st.integers(1, 8))
    def wait(self, quarters):
        for _ in range(quarters):
            self.clock.rightNow += 0.25
            self.clock.turns(3)

    @rule()
    def settle(self):
        for member in self.place.members:
            member.ready = True
        self.wait(8)
        self.clock.turns(len(self.place.members))
        names = {member.name for member in self.place.members} - {None}
        for member in self.place.members:
            if PRESENCE in member.events:
                assert member.here == (len(self.place.members), names if len(names) <= self.most else None)
            else:
                assert member.presence_frames == []
        assert self.clock.getDelayedCalls() == []

    @invariant()
    def one_frame_a_second_at_most(self):
        if hasattr(self, "place") and not self.slow:
            for member in self.place.members:
                times = sorted({*member.times})
                assert all(later - sooner >= ROUND_SECONDS for sooner, later in itertools.pairwise(times))

    @invariant()
    def timers_exist_only_with_watchers(self):
        if hasattr(self, "place"):
            watched = any(member.events for member in self.place.members)
            assert len(self.clock.getDelayedCalls()) <= watched


PresenceMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestPresenceMachine = PresenceMachine.TestCase
