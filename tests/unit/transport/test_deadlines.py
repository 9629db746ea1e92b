import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE
from twisted.internet.task import Clock

from chatd.transport.deadlines import Deadlines, Expiries


@pytest.fixture
def deadlines(clock):
    return Deadlines(5, clock)


def test_no_deadlines_at_first(deadlines):
    assert list(deadlines) == []
    assert list(deadlines.expired()) == []


def test_deadline_expires_after_its_delay(deadlines, clock):
    deadlines.add("ann")
    clock.advance(4.999)
    assert list(deadlines.expired()) == []
    clock.advance(0.001)
    assert list(deadlines.expired()) == ["ann"]


def test_expired_items_are_yielded_once(deadlines, clock):
    deadlines.add("ann")
    clock.advance(6)
    assert list(deadlines.expired()) == ["ann"]
    assert list(deadlines.expired()) == []
    assert list(deadlines) == []


def test_first_to_be_added_are_the_first_to_expire(deadlines, clock):
    for who in ("ann", "bob", "cy"):
        deadlines.add(who)
        clock.advance(1)
    clock.advance(3)
    assert list(deadlines.expired()) == ["ann", "bob"]
    assert list(deadlines) == ["cy"]


def test_discarded_items_do_not_expire(deadlines, clock):
    deadlines.add("ann")
    deadlines.add("bob")
    deadlines.discard("ann")
    clock.advance(5)
    assert list(deadlines.expired()) == ["bob"]


def test_discard_of_an_unknown_item(deadlines):
    deadlines.discard("ann")
    assert list(deadlines) == []


def test_added_again_restarts_the_time(deadlines, clock):
    """An item that is added again has its whole time and expires last."""
    deadlines.add("ann")
    deadlines.add("bob")
    clock.advance(3)
    deadlines.add("ann")
    assert list(deadlines) == ["bob", "ann"]
    clock.advance(2)
    assert list(deadlines.expired()) == ["bob"]
    clock.advance(3)
    assert list(deadlines.expired()) == ["ann"]


def test_expired_item_can_be_added_at_once(deadlines, clock):
    deadlines.add("ann")
    clock.advance(5)
    for who in deadlines.expired():
        deadlines.add(who)  # while expired() is under way
    assert list(deadlines) == ["ann"]
    clock.advance(5)
    assert list(deadlines.expired()) == ["ann"]


def test_discard_while_expired_items_are_yielded(deadlines, clock):
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


# Times of their own


def test_items_expire_at_their_own_times():
    """An item expires in the second after its time, whatever the order in which items were set."""
    clock = Clock()
    clock.advance(0.5)
    expiries = Expiries(clock)
    for who, delay in (("late", 3), ("soon", 1.2), ("past", -5), ("gone", 1)):
        expiries.set(who, delay)
    expiries.discard("gone")
    expiries.discard("nobody")
    found = []
    for _ in range(4):
        clock.advance(1)
        found.append(expiries.expired())
    assert found == [["past"], ["soon"], [], ["late"]]


@REPEATABLE
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-2, 9), st.booleans(), st.integers(0, 3))))
def test_expiries_as_a_table(steps):
    """The set returns what a table of times returns, and keeps nothing of what is gone."""
    clock, table = Clock(), {}
    expiries = Expiries(clock)
    for who, delay, stays, passes in steps:
        if stays:
            expiries.set(who, delay)
            table[who] = clock.seconds() + max(delay, 0.001)
        else:
            expiries.discard(who)
            table.pop(who, None)
        clock.advance(passes)
        over = {who for who, due in table.items() if due <= clock.seconds()}
        assert {*expiries.expired()} == over
        table = {who: due for who, due in table.items() if who not in over}
    clock.advance(20)
    assert {*expiries.expired()} == {*table}
    assert expiries.expired() == []
