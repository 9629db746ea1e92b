"""The fair queue of work that waits for the next reactor turn, and the rooms that share it."""

import pytest
from support.helpers import Turns
from support.houses import House
from support.shared_clients import SharedClient

from chatd.room.turns import TURN_SECONDS, TurnQueue


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def turns(clock):
    return TurnQueue(clock)


def test_each_waits_for_the_next_turn(clock, turns):
    """Each turn calls every waiting function once, in the order of arrival."""
    served = []

    def go_on(name, times):
        served.append(name)
        if times:
            turns.wait(lambda: go_on(name, times - 1))

    turns.wait(lambda: go_on("a", 2))
    turns.wait(lambda: go_on("b", 1))
    assert served == []
    clock.turn()
    assert served == ["a", "b"]
    clock.turn()
    assert served == ["a", "b", "a", "b"]
    clock.turn()
    assert served[4:] == ["a"]
    assert clock.idle


def test_turn_stops_when_its_time_is_over(clock, turns):
    """The others go first in the next turn."""
    served = []

    def slow(name):
        served.append(name)
        clock.rightNow += 0.6 * TURN_SECONDS
        turns.wait(lambda: slow(name))

    for name in "abc":
        turns.wait(lambda name=name: slow(name))
    clock.turn()
    assert served == [*"ab"]
    clock.turns(2)
    assert served == [*"abcabc"]


def test_fault_in_one_call_leaves_the_others_waiting(clock, turns):
    served = []
    turns.wait(lambda: 1 / 0)
    turns.wait(lambda: served.append("b"))
    with pytest.raises(ZeroDivisionError):
        clock.turn()
    clock.turn()
    assert served == ["b"]


def test_rooms_share_the_time_of_a_turn():
    """However many rooms have something to send, the reactor reads in between, and each room has its turn."""
    house = House(seed=())
    clock, ann = house.clock, SharedClient(house, settle=lambda: None)
    ann.join(*"abcdef")
    clock.turns()
    ann.read()
    sent = []
    ann.socket.sending = lambda: setattr(clock, "rightNow", clock.rightNow + 0.4 * TURN_SECONDS)
    for _ in range(2):
        for room in "abcdef":
            house.say("hi", room=room)
    while not clock.idle:
        clock.turn()
        sent.append([one.split()[0] for one in ann.types()])
    assert sent == [[*"aabbcc"], [*"ddeeff"]]
