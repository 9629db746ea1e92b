"""Sweeps: a slice serves for a few milliseconds, and the next one continues."""

import pytest
from twisted.internet.task import Clock

from chatd.room.sweep import SLICE_MEMBERS, SLICE_SECONDS, sweep


@pytest.fixture
def clock():
    return Clock()


def test_all_served_in_one_slice(clock):
    served = []
    assert sweep(iter(range(1000)), served.append, clock)
    assert [len(some) for some in served] == [SLICE_MEMBERS] * (1000 // SLICE_MEMBERS) + [1000 % SLICE_MEMBERS]
    assert [member for some in served for member in some] == [*range(1000)]


def test_next_slice_continues(clock):
    members, served, slices = iter(range(SLICE_MEMBERS * 5)), [], []

    def serve(some):
        served.extend(some)
        clock.rightNow += SLICE_SECONDS * 0.6

    while not sweep(members, serve, clock):
        slices.append(len(served))
    assert slices == [SLICE_MEMBERS * 2, SLICE_MEMBERS * 4]
    assert served == [*range(SLICE_MEMBERS * 5)]


def test_slow_slice_makes_progress(clock):
    """Each slice serves one batch, even if that takes longer than a slice."""
    members, served = iter(range(SLICE_MEMBERS * 3)), []

    def serve(some):
        served.append(some)
        clock.rightNow += 10

    assert [sweep(members, serve, clock) for _ in range(4)] == [False, False, False, True]
    assert len(served) == 3


def test_sweep_without_members(clock):
    assert sweep(iter(()), pytest.fail, clock)
