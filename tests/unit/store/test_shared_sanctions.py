"""The sanctions that nodes share in Redis, without a server."""

from collections import deque

import pytest
from twisted.internet.defer import Deferred

from chatd.messages import Entry
from chatd.room.log import LogUnavailable
from chatd.room.moderation import Sanction, Sanctions
from chatd.store.base import dump_sanction
from chatd.store.redis.shared_sanctions import SANCTIONS, SharedSanctions


class Hash:
    """A connection to the hash of the sanctions, which answers when the test asks for it."""

    def __init__(self):
        self.waiting = deque()
        self.dropped = False

    def ask(self, *words):
        assert words == ("HGETALL", SANCTIONS)
        self.waiting.append(Deferred())
        return self.waiting[-1]

    def answer(self, *sanctions):
        flat = [part for one in sanctions for part in (one.id.encode(), dump_sanction(one))]
        self.waiting.popleft().callback(flat)

    def fail(self):
        self.waiting.popleft().errback(LogUnavailable("down"))

    def drop(self):
        self.dropped = True


def ban(word):
    return Sanction.parse({"kind": "ban", "username": word}, word, 0)


@pytest.fixture
def sanctions():
    return Sanctions()


@pytest.fixture
def shared(sanctions):
    return SharedSanctions(sanctions)


@pytest.fixture
def connection():
    return Hash()


def test_session_begins_with_the_whole_set(sanctions, shared, connection):
    sanctions.add(ban("old"))
    begun = shared.connected(connection)
    assert not begun.called
    connection.answer(ban("a"), ban("b"))
    assert begun.called
    assert [*sanctions] == [ban("a"), ban("b")]


def test_session_without_the_set_fails(shared, connection):
    begun = shared.connected(connection)
    connection.fail()
    begun.addErrback(lambda failure: failure.trap(LogUnavailable))


def test_changes_during_a_read_are_not_lost(sanctions, shared, connection):
    """The reply may be older than changes that the feed has announced since the request."""
    shared.connected(connection)
    shared.changed("new", dump_sanction(ban("new")))
    shared.changed("gone", b"")
    connection.answer(ban("a"), ban("gone"))
    assert [*sanctions] == [ban("a"), ban("new")]
    shared.changed("a", b"")
    shared.interrupted()
    connection.answer(ban("b"))
    assert [*sanctions] == [ban("b")]


def test_reads_at_once_keep_all_changes(sanctions, shared, connection):
    shared.connected(connection)
    shared.interrupted()
    shared.changed("new", dump_sanction(ban("new")))
    connection.answer()
    connection.answer()
    assert [*sanctions] == [ban("new")]


def test_interruption_reads_again(sanctions, shared, connection):
    """If that fails the session ends, and the next one reads."""
    shared.interrupted()  # no session yet
    shared.connected(connection)
    connection.answer(ban("a"))
    shared.interrupted()
    connection.answer(ban("b"))
    assert [*sanctions] == [ban("b")]
    shared.interrupted()
    connection.fail()
    assert connection.dropped


def test_messages_are_ignored(sanctions, shared):
    shared.appended("main", [Entry(1, "ann", "hi", "")])
    shared.trimmed("main", 2)
    assert [*sanctions] == []
