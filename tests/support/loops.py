"""Event loops for tests: a reactor can run only once, so each test gets its own."""

import asyncio
import contextlib
import functools
import gc
import signal
from unittest.mock import patch

import twisted.internet
from support.servers import LONG
from twisted.internet.defer import ensureDeferred
from twisted.internet.epollreactor import EPollReactor
from twisted.python.failure import Failure


def asynchronous(test):
    """Run a test that is a coroutine, and stop one that hangs."""

    @functools.wraps(test)
    def run(*arguments, **named):
        async def bounded():
            async with asyncio.timeout(20):
                await test(*arguments, **named)

        asyncio.run(bounded())

    return run


def quiet(test):
    """Run a test that is a coroutine; it must leave no task, and no exception that nobody retrieved."""

    @functools.wraps(test)
    async def run(*arguments, **named):
        problems = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        await test(*arguments, **named)
        gc.collect()
        await asyncio.sleep(0)
        assert problems == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    return asynchronous(run)


@contextlib.contextmanager
def reactor():
    """Lend a reactor that is the global one meanwhile, which Twisted's TLS needs; clean up everything."""
    loop = EPollReactor()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    with patch.object(twisted.internet, "reactor", loop, create=True):
        try:
            yield loop
        finally:
            loop.removeAll()
            loop.disconnectAll()
            loop._poller.close()
            loop.waker.connectionLost(None)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def drive(what):
    """Run a coroutine function in a new reactor, its argument, and return its result."""
    outcome = []
    with reactor() as loop:

        def begin():
            doing = ensureDeferred(what(loop))
            doing.addTimeout(LONG, loop)
            doing.addBoth(outcome.append)
            doing.addCallback(lambda _: loop.stop())

        loop.callWhenRunning(begin)
        loop.run(installSignalHandlers=False)
    if isinstance(outcome[0], Failure):
        outcome[0].raiseException()
    return outcome[0]
