import pytest
from twisted.internet.task import Clock

from chatd.transport.deadlines import Deadlines


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def deadlines(clock):
    return Deadlines(5, clock)


def test_nobody_is_waited_for_at_first(deadlines):
    assert list(deadlines) == []
    assert list(deadlines.expired()) == []


def test_a_deadline_is_over_when_its_delay_has_passed_and_not_before(deadlines, clock):
    deadlines.add("ann")
    clock.advance(4.999)
    assert list(deadlines.expired()) == []
    clock.advance(0.001)
    assert list(deadlines.expired()) == ["ann"]


def test_who_has_expired_is_told_once(deadlines, clock):
    deadlines.add("ann")
    clock.advance(6)
    assert list(deadlines.expired()) == ["ann"]
    assert list(deadlines.expired()) == []
    assert list(deadlines) == []


def test_the_first_to_be_added_are_the_first_to_expire(deadlines, clock):
    for who in ("ann", "bob", "cy"):
        deadlines.add(who)
        clock.advance(1)
    clock.advance(3)
    assert list(deadlines.expired()) == ["ann", "bob"]
    assert list(deadlines) == ["cy"]


def test_who_is_discarded_does_not_expire(deadlines, clock):
    deadlines.add("ann")
    deadlines.add("bob")
    deadlines.discard("ann")
    clock.advance(5)
    assert list(deadlines.expired()) == ["bob"]


def test_who_is_not_waited_for_can_be_discarded(deadlines):
    deadlines.discard("ann")
    assert list(deadlines) == []


def test_who_is_added_again_has_the_whole_time_again_and_waits_behind_the_others(deadlines, clock):
    deadlines.add("ann")
    deadlines.add("bob")
    clock.advance(3)
    deadlines.add("ann")
    assert list(deadlines) == ["bob", "ann"]
    clock.advance(2)
    assert list(deadlines.expired()) == ["bob"]
    clock.advance(3)
    assert list(deadlines.expired()) == ["ann"]


def test_who_has_expired_can_be_added_again_at_once(deadlines, clock):
    deadlines.add("ann")
    clock.advance(5)
    for who in deadlines.expired():
        deadlines.add(who)  # while expired() is under way
    assert list(deadlines) == ["ann"]
    clock.advance(5)
    assert list(deadlines.expired()) == ["ann"]


def test_one_who_is_discarded_because_another_has_expired_does_not_expire(deadlines, clock):
    deadlines.add("ann")
    deadlines.add("bob")
    clock.advance(5)
    expired = deadlines.expired()
    assert next(expired) == "ann"
    deadlines.discard("bob")
    assert list(expired) == []


def test_those_waited_for_may_change_while_they_are_looked_at(deadlines):
    for who in ("ann", "bob"):
        deadlines.add(who)
    for who in deadlines:
        deadlines.discard(who)
    assert list(deadlines) == []
