"""Fixtures that the tests of the rooms share: rooms on a log and a clock that the test drives."""

import pytest
from support.helpers import ScriptedLog, Turns

from chatd.room.registry import Registry
from chatd.transport import frames


@pytest.fixture
def clock():
    return Turns()


@pytest.fixture
def log():
    return ScriptedLog()


@pytest.fixture
def rooms(log, clock):
    return Registry(log, frames, clock, 100)


@pytest.fixture
def short_tail(monkeypatch):
    """Shorten the tail to a few frames, so that the log is needed soon."""
    monkeypatch.setattr("chatd.room.tail.TAIL_BYTES", 400)
