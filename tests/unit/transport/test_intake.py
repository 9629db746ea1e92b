"""The fair queue of connections whose bytes wait for the next reactor turn."""

import pytest
from support.helpers import Turns

from chatd.messages import Code
from chatd.transport.intake import QUEUE_SECONDS_PER_TURN, Intake, TurnQueue


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
        clock.rightNow += 0.6 * QUEUE_SECONDS_PER_TURN
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


def test_counts_begin_at_zero(clock):
    """A scrape shows every reason from the start."""
    intake = Intake(clock)
    assert intake.refusals == dict.fromkeys(["schema", *Code], 0)
    assert {"FORBIDDEN", "NOT_REPLACEABLE", "RATE_LIMITED", "UNKNOWN_ID"} < intake.refusals.keys()
    assert intake.throttles == {"websocket": 0, "http": 0}
