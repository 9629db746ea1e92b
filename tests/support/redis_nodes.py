"""Nodes on a Redis: stores that a test opens, posts to, reads and waits for."""

import time

from support.helpers import RecordingPoster
from support.redises import until, wait_in
from support.store_contract import SEED, StrictFollower

from chatd.messages import Post
from chatd.room.log import InDoubt, LogUnavailable
from chatd.store.base import Retention
from chatd.store.redis.store import RedisStore

UNAVAILABLE, DOUBT = ("refused", LogUnavailable), ("refused", InDoubt)


class Node:
    """A store, opened at once, with a follower; its methods post, read and wait."""

    def __init__(self, loop, link, retain="all", now=None, seed=SEED):
        self.loop = loop
        self.link = link
        self.store = RedisStore(link, Retention.parse(retain), now, now.steady if now else time.monotonic)
        self.events = []
        self.store.follow(StrictFollower(self.events))
        self.opened = self.store.open(seed)

    def up(self):
        """Wait until the store has no fault."""
        until(self.loop, lambda: self.store.fault is None, self.store.fault)
        return self

    def down(self):
        """Wait until the store has a fault; return it."""
        until(self.loop, lambda: self.store.fault is not None, "nothing is wrong")
        return self.store.fault

    def fails(self, words):
        """Wait until the fault, one line, contains certain words; return it."""
        until(self.loop, lambda: words in (self.store.fault or ""), f"{self.store.fault!r} is not {words!r}")
        assert self.store.fault.isprintable()
        return self.store.fault

    def start(self, *texts, room="main", label=None):
        """Post texts, with themselves as labels if `label`; return their posters."""
        posters = [RecordingPoster() for _ in texts]
        for text, poster in zip(texts, posters, strict=True):
            self.store.append(room, Post("ann", text, text if label else None), poster)
        return posters

    def post(self, *texts, room="main", label=None):
        """Post texts and wait; return the outcomes: ("posted", 3), or ("refused", LogUnavailable)."""
        posters = self.start(*texts, room=room, label=label)
        self.settle()
        return [outcome(poster) for poster in posters]

    def settle(self):
        wait_in(self.loop, self.store.settled())

    def post_until_kept(self, *texts, room="main"):
        """Post with labels, and retry as clients do until all are stored; return the last outcomes."""
        left, done = [*texts], {}
        for _ in range(100):
            self.up()
            outcomes = zip(left, self.post(*left, room=room, label=True), strict=True)
            done |= {text: outcome for text, outcome in outcomes if outcome[0] != "refused"}
            left = [text for text in left if text not in done]
            if not left:
                return [done[text] for text in texts]
        raise AssertionError(f"{left} was refused 100 times")

    def read(self, room="main", after=None, limit=10_000):
        return wait_in(self.loop, self.store.read(room, after, limit))

    def texts(self, room="main"):
        return [entry.message for entry in self.read(room).entries if entry not in SEED]

    def heard(self, room="main"):
        """Return the texts that the follower has received."""
        return [event[2].message for event in self.events if event[:2] == ("appended", room)]

    def hears(self, *texts, room="main"):
        """Wait until the follower has received exactly these texts."""
        until(self.loop, lambda: len(self.heard(room)) >= len(texts), "the follower received too little")
        assert self.heard(room) == [*texts]

    @property
    def interruptions(self):
        return self.events.count(("interrupted",))

    def close(self):
        wait_in(self.loop, self.store.close())


def outcome(poster):
    ((what, _, about),) = poster.events  # each gets one outcome
    return what, type(about) if what == "refused" else about
