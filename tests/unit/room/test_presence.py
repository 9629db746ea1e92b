"""Who is in a room is told to those who asked: first the whole, then what changed, at most once a second."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.helpers import Turns, read_frames

from chatd.room.presence import MAX_TYPING, MAX_USERS, PRESENCE, ROUND_SECONDS, TYPING, Occupancy, Presence
from chatd.room.sweep import SLICE_MEMBERS
from chatd.transport import frames

BOTH = (PRESENCE, TYPING)


class Watcher:
    """A member; what it is told, and when."""

    def __init__(self, name=None, events=(), clock=None, seconds=0.0):
        self.name = name
        self.events = frozenset(events)
        self.ready = True
        self.frames = []
        self.clock, self.seconds = clock, seconds
        self.times = []

    def send_frame(self, frame):
        assert self.ready
        self.frames.append(frame)
        if self.clock:
            self.times.append(self.clock.seconds())
            self.clock.rightNow += self.seconds

    @property
    def told(self):
        return [text["data"] for text in read_frames(b"".join(self.frames)) if text["type"] == "presence"]

    @property
    def typing(self):
        return [text["data"]["users"] for text in read_frames(b"".join(self.frames)) if text["type"] == "typing"]

    @property
    def here(self):
        """What it knows by the snapshots and deltas that it was told: the count, and the names."""
        count, names = None, None
        for data in self.told:
            count = data["count"]
            if "join" in data:
                assert not names & {*data["join"]}
                assert names >= {*data["leave"]}
                names = (names - {*data["leave"]}) | {*data["join"]}
            else:
                names = {*data["users"]} if "users" in data else None
        return count, names


class Place:
    """What of a room presence is about: who is there."""

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
def clock():
    return Turns()


@pytest.fixture
def place(clock):
    return Place(clock)


def watcher(name=None, events=(PRESENCE,)):
    return Watcher(name, events)


def slow_watchers(clock, count, events=(PRESENCE,)):
    """Watchers so slow that a slice serves one batch of them."""
    return [Watcher(None, events, clock, 0.001) for _ in range(count)]


# What is told


def test_a_watcher_gets_the_whole_first_and_then_what_changed(place, clock):
    ann = place.join(watcher("ann"))
    place.join(Watcher("bob"), Watcher("cy"))
    clock.turns()
    place.join(Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert ann.told == [{"count": 3, "users": ["ann", "bob", "cy"]}, {"count": 4, "join": ["dee"], "leave": []}]
    assert ann.here == (4, {"ann", "bob", "cy", "dee"})


def test_what_left_and_came_in_one_second_is_one_delta_with_sorted_names(place, clock):
    ann = place.join(watcher("ann"))
    bob = place.join(Watcher("bob"))
    clock.turns()
    place.leave(bob)
    place.join(Watcher("zoe"), Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [{"count": 3, "join": ["dee", "zoe"], "leave": ["bob"]}]


def test_who_joins_later_gets_the_whole_while_the_others_get_what_changed(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    bob = place.join(watcher("bob"))
    clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [{"count": 2, "join": ["bob"], "leave": []}]
    assert bob.told == [{"count": 2, "users": ["ann", "bob"]}]


def test_who_comes_and_goes_within_a_second_is_not_told_of(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    bob = place.join(Watcher("bob"))
    place.leave(bob)
    clock.advance(ROUND_SECONDS)
    assert len(ann.told) == 1


def test_members_without_a_name_are_counted_and_not_named(place, clock):
    one = place.join(watcher())
    place.join(Watcher())
    clock.turns()
    place.join(Watcher())
    clock.advance(ROUND_SECONDS)
    assert one.told == [{"count": 2, "users": []}, {"count": 3, "join": [], "leave": []}]


def test_a_name_joins_with_its_first_member_and_leaves_with_its_last(place, clock):
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
    assert ann.told[1:] == [
        {"count": 2, "join": ["bob"], "leave": []},
        {"count": 3, "join": [], "leave": []},
        {"count": 2, "join": [], "leave": []},
        {"count": 1, "join": [], "leave": ["bob"]},
    ]


def test_who_is_known_by_another_name_leaves_by_the_one_and_joins_by_the_other(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    place.rename(ann, "anna")
    clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [{"count": 1, "join": ["anna"], "leave": ["ann"]}]


def test_a_change_that_changes_nothing_is_not_told(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    place.presence.changed()
    clock.advance(ROUND_SECONDS)
    assert len(ann.frames) == 1
    assert clock.getDelayedCalls() == []


def test_where_there_are_too_many_names_members_are_only_counted_and_then_all_are_named_again(place, clock):
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
    assert ann.told == [
        {"count": MAX_USERS, "users": names},
        {"count": MAX_USERS + 1},
        {"count": MAX_USERS + 2},
        {"count": MAX_USERS + 1},
        {"count": MAX_USERS, "users": names},
    ]


def test_above_that_other_names_are_no_news_as_long_as_they_are_as_many(place, clock):
    ann = place.join(watcher("ann"))
    others = [Watcher(f"n{number}") for number in range(MAX_USERS)]
    place.join(*others)
    clock.turns()
    place.rename(others[0], "another")
    clock.advance(ROUND_SECONDS)
    assert ann.told == [{"count": MAX_USERS + 1}]


def test_many_members_of_few_names_are_named(place, clock):
    ann = place.join(watcher("ann"))
    place.join(*[Watcher("bob") for _ in range(MAX_USERS)])
    clock.turns()
    assert ann.told == [{"count": MAX_USERS + 1, "users": ["ann", "bob"]}]


def test_nobody_is_told_who_did_not_ask(place, clock):
    member = place.join(Watcher("ann"))
    typist = place.join(watcher("bob", [TYPING]))
    place.join(watcher("cy"))
    for _ in range(3):
        place.join(Watcher("dee"))
        clock.advance(ROUND_SECONDS)
    assert [member.frames, typist.frames] == [[], []]


# At other nodes


class Node(Place):
    """A room at one node, and what it says of it to the others."""

    def __init__(self, clock):
        self.reports = []
        super().__init__(clock, lambda here, typing: self.reports.append((*here, typing)))


@pytest.fixture
def node(clock):
    return Node(clock)


def test_the_other_nodes_are_told_who_is_here_at_most_once_a_second_whether_anyone_watches_or_not(node, clock):
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


def test_they_are_told_at_once_that_nobody_is_here(node, clock):
    ann, bob = Watcher("ann"), watcher("bob", BOTH)
    node.join(ann, bob)
    clock.turns()
    node.leave(bob)
    node.presence.typing("ann")
    node.leave(ann)
    assert node.reports[1:] == [(0, frozenset(), ())]
    assert clock.getDelayedCalls() == []


def test_they_are_told_of_more_names_than_are_shown_by_their_number(node, clock):
    node.join(*[Watcher(f"n{number}") for number in range(MAX_USERS + 1)])
    clock.turns()
    assert node.reports == [(MAX_USERS + 1, None, [])]


def test_a_change_of_what_is_shown_here_alone_is_not_told_to_them(node, clock):
    ann = node.join(watcher("ann"))
    clock.turns()
    node.presence.remote_changed("B", Occupancy(1, frozenset({"bob"})))
    clock.advance(ROUND_SECONDS)
    assert len(node.reports) == 1
    assert ann.here == (2, {"ann", "bob"})


def test_watchers_are_told_the_sum_of_all_nodes(node, clock):
    ann = node.join(watcher("ann"))
    node.presence.remote_changed("B", Occupancy(2, frozenset({"bob", "ann"})))
    node.presence.remote_changed("C", Occupancy(1, frozenset({"cy"})))
    clock.turns()
    assert ann.told == [{"count": 4, "users": ["ann", "bob", "cy"]}]
    for here in (Occupancy(1, frozenset({"bob"})), Occupancy(0, frozenset()), None):
        node.presence.remote_changed("B", here)
        clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [
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
def test_too_many_names_at_all_nodes_together_are_only_counted(node, clock, others):
    ann = node.join(watcher("ann"))
    for name, here in enumerate(others):
        node.presence.remote_changed(str(name), here)
    clock.turns()
    assert ann.told == [{"count": 1 + sum(here.members for here in others)}]
    node.presence.remote_changed("0", None)
    clock.advance(ROUND_SECONDS)
    assert ann.here == (
        1 + sum(here.members for here in others[1:]),
        {"ann"} | {*map(str, range(150, 200))} if others[1:] else {"ann"},
    )


def test_who_types_is_told_here_and_to_the_others_once(node, clock):
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


def test_who_types_elsewhere_is_nothing_to_a_room_where_nobody_watches(node, clock):
    node.join(Watcher("ann"))
    clock.turns()
    node.presence.remote_typing(["cy"])
    assert clock.getDelayedCalls() == []
    clock.advance(ROUND_SECONDS)
    ann = node.join(watcher("bob", [TYPING]))
    clock.advance(ROUND_SECONDS)
    assert ann.typing == []


# When it is told


def test_nothing_is_told_in_the_turn_of_the_change(place, clock):
    ann = place.join(watcher("ann"))
    assert ann.frames == []
    clock.turn()
    assert len(ann.frames) == 1


def test_a_room_is_told_at_most_once_a_second_and_soon_after_a_quiet_time(place, clock):
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


def test_thousands_who_join_at_once_are_told_once_each_with_the_same_bytes(place, clock):
    crowd = [watcher(f"n{number % 100}") for number in range(2000)]
    place.join(*crowd)
    clock.turns()
    clock.advance(ROUND_SECONDS)
    assert sum(len(one.frames) for one in crowd) == 2000
    assert len({id(one.frames[0]) for one in crowd}) == 1


def test_thousands_who_join_in_one_second_are_told_once_each_as_is_who_was_there(place, clock):
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


def test_watchers_who_know_the_same_are_told_the_same_bytes(place, clock):
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert ann.frames[1] is bob.frames[1]


def test_where_nobody_watches_nothing_is_done(place, clock):
    members = [Watcher("ann"), Watcher("bob")]
    place.join(*members)
    place.rename(members[0], "anna")
    place.presence.typing("ann")
    place.leave(members[1])
    assert clock.getDelayedCalls() == []


def test_where_nothing_changes_no_timer_is_left(place, clock):
    place.join(watcher("ann"), watcher("bob", BOTH))
    place.presence.typing("ann")
    clock.turns()
    assert clock.getDelayedCalls() == []


def test_with_the_last_watcher_the_timer_goes(place, clock):
    ann, bob = watcher("ann"), Watcher("bob")
    place.join(ann, bob)
    clock.turns()
    place.rename(bob, "bo")
    assert len(clock.getDelayedCalls()) == 1
    place.leave(ann)
    assert clock.getDelayedCalls() == []
    place.leave(bob)


def test_who_watches_where_nobody_did_for_a_time_gets_the_whole(place, clock):
    ann = place.join(watcher("ann"))
    clock.turns()
    place.leave(ann)
    place.join(Watcher("bob"))
    cy = place.join(watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert cy.told == [{"count": 2, "users": ["bob", "cy"]}]


def test_leaving_and_coming_back_is_no_way_around_the_once_a_second(place, clock):
    told = []
    for _ in range(20):
        ann = place.join(Watcher("ann", [PRESENCE], clock))
        clock.turns(3)
        place.leave(ann)
        told += ann.times
        clock.advance(0.25)
    assert told == [0, 1, 2, 3, 4]


# Who takes nothing


def test_who_is_not_ready_is_told_nothing_and_gets_the_whole_when_ready_again(place, clock):
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    ann.ready = False
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    place.join(Watcher("dee"))
    clock.advance(ROUND_SECONDS)
    assert len(ann.told) == 1
    ann.ready = True
    clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [{"count": 4, "users": ["ann", "bob", "cy", "dee"]}]
    assert len(bob.told) == 3
    clock.advance(ROUND_SECONDS)
    assert clock.getDelayedCalls() == []


def test_who_is_not_ready_on_joining_gets_the_whole_when_ready(place, clock):
    ann = watcher("ann")
    ann.ready = False
    place.join(ann)
    clock.turns()
    ann.ready = True
    clock.advance(ROUND_SECONDS)
    assert ann.told == [{"count": 1, "users": ["ann"]}]


def test_who_was_not_ready_while_nothing_changed_has_missed_nothing(place, clock):
    ann, bob = watcher("ann"), watcher("bob")
    place.join(ann, bob)
    clock.turns()
    ann.ready = False
    place.presence.changed()
    clock.advance(ROUND_SECONDS)
    ann.ready = True
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert ann.told[1:] == [{"count": 3, "join": ["cy"], "leave": []}]


def test_who_is_never_ready_costs_one_look_a_second(place, clock):
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


def test_who_stops_being_ready_with_the_first_of_two_frames_is_spared_the_second(place, clock):
    ann = place.join(watcher("ann", BOTH))

    def send_frame(frame):
        ann.frames.append(frame)
        ann.ready = False

    ann.send_frame = send_frame
    place.presence.typing("bob")
    clock.turns()
    assert [len(ann.told), ann.typing] == [1, []]


# Slices


def test_a_long_round_is_sliced_and_goes_on_where_it_stopped(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 3)
    place.join(*crowd)
    served = []
    for _ in range(4):
        clock.turn()
        served.append(sum(bool(one.frames) for one in crowd))
    assert served == [SLICE_MEMBERS, SLICE_MEMBERS * 2, SLICE_MEMBERS * 3, SLICE_MEMBERS * 3]
    assert clock.getDelayedCalls() == []


def test_what_changes_during_a_round_is_told_in_the_next(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2, BOTH)
    place.join(*crowd)
    place.presence.typing("ann")
    clock.turn()
    place.join(Watcher("bob"))
    place.presence.typing("bob")
    late = place.join(watcher("cy", BOTH))
    clock.turns()
    whole = {"count": len(crowd), "users": []}
    assert [[one.told, one.typing] for one in crowd] == [[[whole], [["ann"]]]] * len(crowd)
    assert late.frames == []
    clock.advance(ROUND_SECONDS)
    clock.turns()
    change = {"count": len(crowd) + 2, "join": ["bob", "cy"], "leave": []}
    assert [[one.told, one.typing] for one in crowd] == [[[whole, change], [["ann"], ["bob"]]]] * len(crowd)
    assert late.told == [{"count": len(crowd) + 2, "users": ["bob", "cy"]}]


def test_who_leaves_during_a_round_is_told_nothing_any_more(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2)
    place.join(*crowd)
    clock.turn()
    place.leave(crowd[-1])
    clock.advance(ROUND_SECONDS)
    clock.turns()
    assert crowd[-1].frames == []
    assert crowd[-2].here == (len(crowd) - 1, set())


def test_a_round_ends_with_its_last_watcher(place, clock):
    crowd = slow_watchers(clock, SLICE_MEMBERS * 2)
    place.join(*crowd)
    clock.turn()
    for one in crowd:
        place.leave(one)
    assert clock.getDelayedCalls() == []
    ann = place.join(watcher("ann"))
    clock.rightNow += ROUND_SECONDS
    clock.turn()
    assert ann.told == [{"count": 1, "users": ["ann"]}]


def test_a_round_that_took_more_than_a_second_is_followed_by_the_next(place, clock):
    crowd = [Watcher(None, [PRESENCE], clock, 0.02) for _ in range(SLICE_MEMBERS)]
    place.join(*crowd)
    clock.turn()
    place.join(Watcher("bob"))
    clock.turns()
    assert crowd[0].here == (len(crowd) + 1, {"bob"})


# Who is typing


def test_who_types_is_told_to_those_who_asked_for_that(place, clock):
    ann, bob, cy = watcher("ann", [TYPING]), watcher("bob"), watcher("cy", BOTH)
    place.join(ann, bob, cy, Watcher("dee"))
    place.presence.typing("dee")
    clock.turns()
    assert [one.typing for one in (ann, bob, cy)] == [[["dee"]], [], [["dee"]]]
    assert [len(one.told) for one in (ann, bob, cy)] == [0, 1, 1]


def test_those_who_type_in_one_second_are_told_once_and_in_one_frame_of_the_same_bytes(place, clock):
    ann, bob = watcher(None, [TYPING]), watcher(None, [TYPING])
    place.join(ann, bob)
    clock.turns()
    for name in ("cy", "dee", "cy", "cy"):
        place.presence.typing(name)
        clock.advance(0.1)
    clock.advance(ROUND_SECONDS)
    assert ann.typing == [["cy", "dee"]]
    assert ann.frames[0] is bob.frames[0]


def test_typing_is_told_once_and_forgotten(place, clock):
    ann = place.join(watcher("ann", BOTH))
    place.presence.typing("bob")
    clock.turns()
    place.join(Watcher("cy"))
    clock.advance(ROUND_SECONDS)
    assert [len(ann.told), ann.typing] == [2, [["bob"]]]
    assert clock.getDelayedCalls() == []


def test_of_those_who_type_only_some_are_named(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    for number in range(MAX_TYPING * 2):
        place.presence.typing(f"n{number}")
    clock.turns()
    assert ann.typing == [[f"n{number}" for number in range(MAX_TYPING)]]


def test_typing_alone_is_no_news_of_who_is_here(place, clock):
    ann = place.join(watcher("ann", BOTH))
    clock.turns()
    place.presence.typing("bob")
    clock.advance(ROUND_SECONDS)
    assert [len(ann.told), ann.typing] == [1, [["bob"]]]


def test_who_is_not_ready_has_missed_who_typed(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    ann.ready = False
    place.presence.typing("bob")
    clock.turns()
    assert clock.getDelayedCalls() == []
    ann.ready = True
    clock.advance(ROUND_SECONDS * 3)
    assert ann.frames == []


def test_who_begins_to_watch_is_not_told_who_typed_before(place, clock):
    ann = place.join(watcher("ann", [TYPING]))
    clock.turns()
    place.presence.typing("bob")
    place.leave(ann)
    clock.advance(60)
    cy = place.join(watcher("cy", [TYPING]))
    clock.turns()
    assert cy.typing == []


# Whatever happens


class WhoIsHere(RuleBasedStateMachine):
    """After two quiet seconds a watcher that is ready knows who is here, by what it was told and nothing else."""

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
        member.ready = False  # so that it fails the test to tell it anything

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
    def all_are_ready_and_two_seconds_pass(self):
        for member in self.place.members:
            member.ready = True
        self.wait(8)
        self.clock.turns(len(self.place.members))
        names = {member.name for member in self.place.members} - {None}
        for member in self.place.members:
            if PRESENCE in member.events:
                assert member.here == (len(self.place.members), names if len(names) <= self.most else None)
            else:
                assert member.told == []
        assert self.clock.getDelayedCalls() == []

    @invariant()
    def nobody_is_told_twice_in_a_second(self):
        if hasattr(self, "place") and not self.slow:
            for member in self.place.members:
                times = sorted({*member.times})
                assert all(later - sooner >= ROUND_SECONDS for sooner, later in itertools.pairwise(times))

    @invariant()
    def a_timer_is_there_only_while_someone_watches(self):
        if hasattr(self, "place"):
            watched = any(member.events for member in self.place.members)
            assert len(self.clock.getDelayedCalls()) <= watched


WhoIsHere.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestWhoIsHere = WhoIsHere.TestCase
