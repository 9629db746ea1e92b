"""The position of a node in the feed, without a server."""

import pytest
from support.helpers import RecordingFollower

from chatd.messages import Entry
from chatd.store.redis.feed import EpochChanged, Feed
from chatd.store.redis.keys import NO_ENTRY, message_of


@pytest.fixture
def feed():
    """A feed that has read its entry 4, and its follower's events."""
    follower = RecordingFollower()
    feed = Feed([follower], print)
    feed.adopt("abcd", b"4-0")
    return feed, follower.events


def entry(seq, number, *, epoch="abcd", room="main", first=None):
    """Return an entry of the feed as Redis sends it; `number` may be None, for an entry that only trims."""
    fields = {"e": epoch, "r": room}
    if number is not None:
        fields |= {"n": number, "u": "ann", "m": f"text {number}"}
    if first is not None:
        fields["f"] = first
    flat = [str(part).encode() for field in fields.items() for part in field]
    return f"{seq}-1767225600000000".encode(), flat


def message(number):
    return Entry(number, "ann", f"text {number}", "2026-01-01T00:00:00.000Z")


def test_new_feed_has_read_nothing():
    feed = Feed([], print)
    assert (feed.epoch, feed.seen, feed.seq) == ("", NO_ENTRY, 0)


def test_entries_reach_the_followers(feed):
    feed, events = feed
    feed.take([entry(5, 1), entry(6, 2, first=2), entry(7, None, room="other", first=9)])
    assert events == [
        ("appended", "main", message(1)),
        ("appended", "main", message(2)),
        ("trimmed", "main", 2),
        ("trimmed", "other", 9),
    ]
    assert feed.seq == 7


def test_missed_entries_interrupt_the_followers(feed):
    """The followers are interrupted before they get what came after the gap."""
    feed, events = feed
    feed.take([entry(6, 2)])
    assert events == [("interrupted",), ("appended", "main", message(2))]


def test_entry_of_another_epoch(feed):
    feed, events = feed
    with pytest.raises(EpochChanged):
        feed.take([entry(5, 1), entry(6, 1, epoch="efgh")])
    assert events == []


def test_new_epoch_interrupts_and_gives_up(feed):
    feed, events = feed
    calls = []
    feed.when(9, lambda: calls.append("act"), lambda: calls.append("give up"))
    feed.adopt("abcd", b"9-0")  # the same epoch: nothing changes
    assert (calls, events, feed.seq) == ([], [], 4)
    feed.adopt("efgh", b"2-0")
    assert (calls, events) == (["give up"], [("interrupted",)])
    assert (feed.epoch, feed.seen) == ("efgh", b"2-0")


def test_actions_wait_for_the_feed(feed):
    """Actions run in order, after the followers were notified."""
    feed, events = feed
    for seq in (4, 5, 7):
        feed.when(seq, lambda seq=seq: events.append(seq), lambda seq=seq: events.append(-seq))
    assert events == [4]
    feed.take([entry(5, 1), entry(6, 2)])
    assert events == [4, ("appended", "main", message(1)), ("appended", "main", message(2)), 5]
    feed.give_up()
    feed.give_up()
    assert events[-2:] == [5, -7]


def test_removed_entry_has_no_fields_of_the_operators_own():
    """An older version leaves them beside what it removed, and nobody is shown them."""
    fields = {b"u": b"ann", b"m": b"[removed]", b"j": b'{"color":"red"}', b"t": b"2026-01-01T00:00:00.000Z"}
    assert message_of(b"5-0", 5, fields).extra == {"color": "red"}
    assert message_of(b"5-0", 5, fields | {b"x": b"1"}).extra is None
    assert message_of(b"5-0", 5, fields | {b"j": b""}).extra is None
