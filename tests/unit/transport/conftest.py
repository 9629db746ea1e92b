"""Fixtures that the tests of the transports share: connections whose time the test passes."""

import pytest
import txaio
from support.helpers import PING_SECONDS
from twisted.internet.task import Clock

from chatd.transport.connections import Connections


@pytest.fixture(autouse=True)
def _restore_autobahns_clock():
    """Undo what a factory of connections sets: Autobahn keeps one clock for the whole process."""
    before = txaio.config.loop
    yield
    txaio.config.loop = before


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def connections(clock):
    return Connections(clock, PING_SECONDS)


@pytest.fixture
def pass_time(connections, clock):
    """Let time pass, and check the deadlines each second as the service does."""

    def advance(seconds):
        for _ in range(seconds):
            clock.advance(1)
            connections.check_deadlines()

    return advance
