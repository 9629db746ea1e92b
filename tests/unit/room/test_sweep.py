"""A slice serves for a few milliseconds, and the next one goes on where it stopped."""

import pytest
from twisted.internet.task import Clock

from chatd.room.sweep import SLICE_MEMBERS, SLICE_SECONDS, sweep


@pytest.fixture
def clock():
    return Clock()


def test_who_can_be_served_in_one_slice_is(clock):
    served = []
    assert sweep(iter(range(1000)), served.append, clock)
    assert [len(some) for some in served] == [SLICE_MEMBERS] * (1000 // SLICE_MEMBERS) + [1000 % SLICE_MEMBERS]
    assert [member for some in served for member in some] == [*range(1000)]


def test_a_slice_ends_when_its_time_is_over_and_the_next_one_goes_on_there(clock):
    members, served, slices = iter(range(SLICE_MEMBERS * 5)), [], []

    def serve(some):
        served.extend(some)
        clock.rightNow += SLICE_SECONDS * 0.6

    while not sweep(members, serve, clock):
        slices.append(len(served))
    assert slices == [SLICE_MEMBERS * 2, SLICE_MEMBERS * 4]
    assert served == [*range(SLICE_MEMBERS * 5)]


def test_every_slice_serves_someone_however_slow_that_is(clock):
    members, served = iter(range(SLICE_MEMBERS * 3)), []

    def serve(some):
        served.append(some)
        clock.rightNow += 10

    assert [sweep(members, serve, clock) for _ in range(4)] == [False, False, False, True]
    assert len(served) == 3


def test_nobody_is_served_at_once(clock):
    assert sweep(iter(()), pytest.fail, clock)
