"""Fixtures that the tests of the Redis store share."""

import gc

import pytest
from support import loops
from support.redis_nodes import Node
from support.redises import FastClock, Proxy, Redis, WatchedLink, each_binary, wait_in
from twisted.logger import LogLevel

from chatd.store.redis import redis_session


@pytest.fixture
def loop():
    """A running reactor."""
    with loops.reactor() as loop:
        loop.startRunning(installSignalHandlers=False)
        yield loop
        loop.fireSystemEvent("shutdown")  # ends the threads that resolve names


@each_binary
def binary(request):
    """Return the path of each server in turn."""
    return request.param


@pytest.fixture
def one(tmp_path):
    """Any one server."""
    with Redis(tmp_path / "one") as server:
        yield server


@pytest.fixture
def proxy(one):
    """A network in front of that server."""
    with Proxy(one.port) as proxy:
        yield proxy


@pytest.fixture
def brisk(monkeypatch):
    """Shorten the time limits."""
    monkeypatch.setattr(redis_session, "FEED_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(redis_session, "SESSION_BACKOFF_SECONDS", (0.02, 0.2))


@pytest.fixture
def node(loop, brisk, events):
    """A function that makes nodes; they are closed after the test, and leave no call, socket or logged exception."""
    nodes = []
    readers = {*loop.getReaders()}

    def make(url, *, at_once=False, link=None, times=5, **options):
        link = link or WatchedLink(url, loop)
        link.clock = FastClock(loop, times)
        nodes.append(Node(loop, link, **options))
        if not at_once:
            wait_in(loop, nodes[-1].opened)
        return nodes[-1]

    yield make
    for one in nodes:
        one.store.abandon()
        one.close()
    assert loop.getDelayedCalls() == []
    assert {*loop.getReaders()} <= readers | {loop.waker}
    assert loop.getWriters() == []
    gc.collect()  # logs failures that nobody handled
    assert [event for event in events if event["log_level"] == LogLevel.critical] == []
