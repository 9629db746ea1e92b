"""A store in memory that has the faults of a real one."""

from collections import deque

from support.helpers import ManualTime, result_of
from twisted.internet.defer import Deferred, fail

from chatd.room.log import LogUnavailable
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore


class FaultyStore(MemoryStore):
    """A store that fails or waits while the test asks for it.

    While it is `full` it stores nothing, and while it is `down` it reads nothing either.  While it is `slow` each read
    waits for `answer` or `fail`, the oldest first; while it is `held` each post waits too.
    """

    full = down = slow = held = False

    def __init__(self, retain=None):
        self.now = ManualTime()
        super().__init__(retain or Retention(), self.now)
        self.waiting = deque()

    @property
    def messages(self):
        """The messages in the room `main`."""
        return [entry.message for entry in result_of(super().read("main", None, 1000)).entries]

    def append(self, room, post, poster):
        if self.held:
            store = super().append
            self.waiting.append((lambda: store(room, post, poster), lambda error: poster.refused(post, error)))
        elif self.full or self.down:
            poster.refused(post, LogUnavailable("the disk is full"))
        else:
            super().append(room, post, poster)

    def read(self, room, after, limit):
        if self.down:
            return fail(LogUnavailable("no disk"))
        page = super().read(room, after, limit)
        if not (self.slow or self.held):
            return page
        reading = Deferred()
        self.waiting.append((lambda: page.chainDeferred(reading), reading.errback))
        return reading

    def answer(self):
        """Answer the oldest request that waits."""
        self.waiting.popleft()[0]()

    def fail(self, error=None):
        """Fail the oldest request that waits."""
        self.waiting.popleft()[1](error or LogUnavailable("the disk is gone"))

    def release(self):
        """Answer all requests that wait, and stop holding."""
        self.held = self.slow = False
        while self.waiting:
            self.answer()


def opened_store():
    """Return an open and empty store, in the epoch `k7Q2`."""
    store = FaultyStore()
    store.open(())
    store.epoch = "k7Q2"
    return store
