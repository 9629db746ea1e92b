"""Fixtures that the tests of the Redis store share."""

import pytest
from support import loops
from support.redises import Proxy, Redis, each_binary


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
