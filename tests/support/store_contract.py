"""The contract of all stores: tests that run over each of them.

The test module of a store subclasses StoreContract and provides `make`; it overrides `wait` if the store needs a
reactor.  If the log outlives the process, it subclasses DurableStoreContract and provides `again`.  If it keeps time
with a LogClock, it subclasses ClockContract, and if it guards itself against its followers and posters, GuardContract.
These tests do not know where a store keeps its messages.
"""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import NEW_YEAR, REPEATABLE, ManualTime, RecordingFollower, RecordingPoster, result_of
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import REMOVED, Entry, Id, Post
from chatd.room.cursors import Behind
from chatd.room.log import Forbidden, InDoubt, LabelReused, NotReplaceable, Page, UnknownId
from chatd.room.moderation import RoomSummary, Sanction, SanctionKind, Visitor
from chatd.store.base import DAY, JUMP_SECONDS, STEADY_SECONDS, LogClock, Retention, instant, timestamp

SEED = (
    Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
    Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
)
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


REUSED = ("refused", LabelReused)
FORBIDDEN = ("refused", Forbidden)
UNKNOWN = ("refused", UnknownId)
NOT_REPLACEABLE = ("refused", NotReplaceable)


LABELLED = {
    "message": Post("ann", "new", "l", "a"),
    "message, other text": Post("ann", "else", "l", "a"),
    "message, text of a removal": Post("ann", REMOVED, "l", "a"),
    "edit of 1": Post("ann", "new", "l", "a", Id("", 1)),
    "edit of 1, other text": Post("ann", "else", "l", "a", Id("", 1)),
    "edit of 1, text of a removal": Post("ann", REMOVED, "l", "a", Id("", 1)),
    "edit of 1, other epoch": Post("ann", "new", "l", "a", Id("other", 1)),
    "edit of 2": Post("ann", "new", "l", "a", Id("", 2)),
    "removal of 1": Post("ann", REMOVED, "l", "a", Id("", 1), removed=True),
    "removal of 1, other epoch": Post("ann", REMOVED, "l", "a", Id("other", 1), removed=True),
    "removal of 2": Post("ann", REMOVED, "l", "a", Id("", 2), removed=True),
}
"""Posts of every kind with one label; an epoch of "" stands for that of the log."""
RETRIES = {
    "message": (["message"], ["message, other text", "message, text of a removal"]),
    "message, text of a removal": (["message, text of a removal"], ["message", "message, other text"]),
    "edit of 1": (
        ["edit of 1", "edit of 1, other epoch"],
        ["edit of 1, other text", "edit of 1, text of a removal"],
    ),
    "edit of 1, text of a removal": (
        ["edit of 1, text of a removal"],
        ["edit of 1", "edit of 1, other epoch", "edit of 1, other text"],
    ),
    "removal of 1": (["removal of 1", "removal of 1, other epoch"], []),
}
"""The posts of LABELLED that are retries of a stored one, and those that also count as retries once it is erased.

All others are other posts, whose label is refused.  A retry may name its target by an old epoch, because the log keeps
its labels when it draws a new one.  An erased text is unknown, but the kind of the post and its target are known.
"""


class StrictFollower(RecordingFollower):
    """A follower that rejects empty notifications."""

    def appended(self, room, entries):
        assert entries
        super().appended(room, entries)


class Bench:
    """An open store with a clock and a follower; its methods post and read."""

    def __init__(self, make, wait, retain, seed):
        self.wait = wait
        self.now = ManualTime()
        self.store = make(retain, self.now)
        self.wait(self.store.open(seed))
        self.events = []
        self.store.follow(StrictFollower(self.events))

    def reopen(self, again, retain="all"):
        """Close the store, and open another one over the same log."""
        self.wait(self.store.close())
        self.store = again(self.store, Retention.parse(retain), self.now)
        self.wait(self.store.open(()))
        self.store.follow(StrictFollower(self.events))

    def post(self, room, *texts):
        """Post texts one after the other; return their numbers."""
        poster = RecordingPoster()
        for text in texts:
            self.store.append(room, Post("ann", text), poster)
            self.wait(self.store.settled())
        assert poster.refusals == []
        return poster.numbers

    def send(self, room, *posts):
        """Append posts one after the other; return the outcomes: ("posted", 7), ("duplicate", 7) or REUSED."""
        return [outcome for post in posts for outcome in self.send_at_once((room, post))]

    def send_at_once(self, *sent):
        """Append each (room, post) before any is settled; return the outcomes."""
        posters = [RecordingPoster() for _ in sent]
        for (room, post), poster in zip(sent, posters, strict=True):
            self.store.append(room, post, poster)
        self.wait(self.store.settled())
        outcomes = []
        for (_, post), poster in zip(sent, posters, strict=True):
            ((what, about, number),) = poster.events  # each gets one outcome
            assert about is post
            outcomes.append((what, type(number) if what == "refused" else number))
        return outcomes

    def edit(self, number, text="new", label=None, author="a", **more):
        """Return a post that replaces an entry."""
        return Post("ann", text, label, author, Id(self.store.epoch, number), **more)

    def removal(self, number, label=None, author="a", **more):
        """Return a post that removes an entry."""
        return self.edit(number, REMOVED, label, author, removed=True, **more)

    def labelled(self):
        """Return the posts of LABELLED by name, with the epoch of this log."""
        posts = {}
        for name, post in LABELLED.items():
            target = post.replaces
            posts[name] = post._replace(replaces=target and Id(target.epoch or self.store.epoch, target.number))
        return posts

    def read(self, room, after=None, limit=100):
        return self.wait(self.store.read(room, after, limit))

    def texts(self, room, after=None, limit=100):
        return [entry.message for entry in self.read(room, after, limit).entries]

    def trim(self):
        self.wait(self.store.trim())

    def ban(self, word, kind="ban", **document):
        """Store a sanction, and return it."""
        sanction = Sanction.parse({"kind": kind, **document}, word, self.now())
        self.wait(self.store.sanction(sanction))
        return sanction

    def claim(self, word="w1", reader="app"):
        """Claim a reader outside for a minute."""
        return self.wait(self.store.claim(reader, word, 60))

    def advance(self, word="w1", **cursors):
        return self.wait(self.store.advance("app", word, cursors))

    def cursor(self, room):
        return self.wait(self.store.cursor("app", room))

    def behind(self, reader="app"):
        """Return all rooms that a reader lacks entries of, in the order of their names."""
        found, place = self.wait(self.store.behind(reader, ""))
        while place:
            more, place = self.wait(self.store.behind(reader, place))
            found = [*found, *more]
        return sorted(found)

    def new_events(self):
        """Return the follower's events since the last call."""
        events, self.events[:] = [*self.events], []
        return events


class StoreContract:
    gathers = False
    """True if posts that arrive during a commit share the next one, and are trimmed after it."""
    recovers = False
    """True if timestamps and ages are those of a LogClock, which recovers after a jump."""

    @pytest.fixture
    def make(self):
        """A function that makes a new store over a new log, from a Retention and a clock."""
        raise NotImplementedError

    def wait(self, deferred):
        """Return the result of a Deferred of the store."""
        return result_of(deferred)

    @pytest.fixture
    def bench(self, make):
        """A function that makes a Bench; the fixture closes all of them."""
        benches = []

        def build(retain="all", seed=()):
            benches.append(Bench(make, self.wait, Retention.parse(retain), seed))
            return benches[-1]

        yield build
        for one in benches:
            self.wait(one.store.close())

    # A new log

    def test_every_log_draws_an_epoch(self, bench):
        """An epoch has 4 to 16 characters of [0-9A-Za-z], and no two logs share one."""
        epochs = [bench().store.epoch for _ in range(3)]
        assert all(re.fullmatch("[0-9A-Za-z]{4,16}", epoch) for epoch in epochs)
        assert len({*epochs}) == 3

    def test_epoch_is_stable(self, bench):
        """Appending and trimming do not change the epoch."""
        log = bench(retain="1")
        epoch = log.store.epoch
        log.post("main", "one", "two")
        log.trim()
        assert log.store.epoch == epoch

    def test_new_log_begins_with_the_seed(self, bench):
        """The seed goes to the room main and to no other."""
        log = bench(seed=SEED)
        assert log.read("main") == Page([*SEED], first=1, head=2)
        assert log.read("other") == Page([], first=1, head=0)

    def test_first_number_after_the_seed(self, bench):
        log = bench(seed=SEED)
        assert log.post("main", "hi") == [3]
        assert log.post("other", "hi") == [1]

    def test_log_without_a_seed_is_empty(self, bench):
        assert bench().read("main") == Page([], first=1, head=0)

    def test_seed_is_trimmed(self, bench):
        """Retention applies to the seed, and its numbers are not reused."""
        assert bench(retain="1", seed=SEED).read("main") == Page([SEED[1]], first=2, head=2)
        old = bench(retain="30d", seed=SEED)
        old.now.advance(STEADY_SECONDS)
        old.trim()
        assert old.read("main") == Page([], first=3, head=2)
        assert old.post("main", "hi") == [3]

    # Appending

    def test_numbers_are_dense(self, bench):
        """Numbers begin at 1 and have no gaps."""
        assert bench().post("main", *"abcde") == [1, 2, 3, 4, 5]

    def test_each_room_has_its_own_numbers(self, bench):
        log = bench()
        numbers = [log.post(room, "hi")[0] for room in "abacabbc"]
        assert numbers == [1, 1, 2, 1, 3, 2, 3, 2]
        assert {room: log.read(room).head for room in "abcd"} == {"a": 3, "b": 3, "c": 2, "d": 0}

    def test_entry_is_the_post_with_number_and_time(self, bench):
        log = bench()
        log.post("main", "hi")
        entry = Entry(1, "ann", "hi", "2026-01-01T00:00:00.000Z")
        assert log.new_events() == [("appended", "main", entry)]
        assert log.read("main") == Page([entry], first=1, head=1)
        assert isinstance(log.read("main").entries[0], Entry)

    @pytest.mark.parametrize("text", ["a\0b", "\0", "'; --", "%s", "😀" * 500, "\u0301", "\r\n", " ", "007", "1.0"])
    def test_text_is_stored_unchanged(self, bench, text):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post(text[:30], text), poster)
        self.wait(log.store.settled())
        assert poster.numbers == [1]
        assert [entry[1:3] for entry in log.read("main").entries] == [(text[:30], text)]

    def test_followers_are_notified_before_the_poster(self, bench):
        log = bench()
        poster = RecordingPoster(log.events)
        posts = [Post("ann", text) for text in "abc"]
        for post in posts:
            log.store.append("main", post, poster)
        self.wait(log.store.settled())
        followed, heard = [], []
        for what, *event in log.new_events():
            if what == "appended":
                followed.append(event[1].number)
            else:
                heard.append(tuple(event))
                assert event[1] in followed
        assert followed == [1, 2, 3]
        assert heard == [(post, number) for number, post in enumerate(posts, 1)]

    def test_every_follower_gets_the_same(self, bench):
        """A follower gets every room's events from the moment it follows."""
        log = bench(retain="2")
        log.post("a", "before")
        second = RecordingFollower()
        log.store.follow(second)
        log.new_events()
        for room in "abcabcabc":
            log.post(room, "hi")
        notified = log.new_events()
        assert second.events == notified  # but not the events before it followed
        assert len([event for event in notified if event[0] == "appended"]) == 9

    def test_log_without_followers(self, make):
        store = make(Retention(), ManualTime())
        self.wait(store.open(()))
        poster = RecordingPoster()
        store.append("main", Post("ann", "hi"), poster)
        self.wait(store.settled())
        assert poster.numbers == [1]
        assert self.wait(store.read("main", None, 10)).head == 1
        self.wait(store.close())

    def test_poster_posts_from_its_callback(self, bench):
        log = bench()

        class Insistent(RecordingPoster):
            def posted(self, post, number, *, duplicate=False):
                super().posted(post, number, duplicate=duplicate)
                if number < 5:
                    log.store.append("main", post, self)

        poster = Insistent()
        log.store.append("main", Post("ann", "again"), poster)
        for _ in range(5):
            self.wait(log.store.settled())
        assert poster.numbers == [1, 2, 3, 4, 5]

    # Time

    def test_timestamp_is_utc_in_milliseconds(self, bench):
        log = bench()
        log.now.now = NEW_YEAR + 86_399.25
        log.post("main", "hi")
        assert log.read("main").entries[0].timestamp == "2026-01-01T23:59:59.250Z"

    def test_timestamps_never_go_back(self, bench):
        """A clock that is set back a little stops the timestamps until it has caught up."""
        log = bench(seed=SEED)
        for step in (5, -JUMP_SECONDS, 1, 3600, -1, 0.5, -JUMP_SECONDS + 1, 2, 10**9, 60):
            log.now.advance(step)
            log.post("main", "hi")
        stamps = [entry.timestamp for entry in log.read("main").entries[len(SEED) :]]
        assert stamps == sorted(stamps)
        assert stamps[0] == "2026-01-01T00:00:05.000Z"
        assert stamps[-1] == timestamp(log.now())  # the clock has caught up
        assert all(TIMESTAMP.fullmatch(stamp) for stamp in stamps)

    def test_message_is_not_older_than_the_seed(self, bench):
        log = bench(seed=SEED)
        log.now.now = instant(SEED[-1].timestamp) - JUMP_SECONDS
        log.post("main", "hi")
        assert log.read("main").entries[-1].timestamp == "2024-10-20T12:31:00.000Z"

    # Reading

    def test_read_newest_in_order(self, bench):
        log = bench()
        log.post("main", *"abcde")
        page = log.read("main", limit=3)
        assert [(entry.number, entry.message) for entry in page.entries] == [(3, "c"), (4, "d"), (5, "e")]
        assert (page.first, page.head) == (1, 5)

    def test_read_all(self, bench):
        log = bench()
        log.post("main", *"abc")
        assert log.texts("main", limit=3) == log.texts("main", limit=4) == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("after", "limit", "texts"),
        [
            (0, 2, "ab"),
            (0, 9, "abcde"),
            (2, 2, "cd"),
            (3, 2, "de"),
            (4, 2, "e"),
            (5, 2, ""),
            (6, 2, ""),
            (10**15, 2, ""),
        ],
    )
    def test_read_after_a_number(self, bench, after, limit, texts):
        log = bench()
        log.post("main", *"abcde")
        page = log.read("main", after, limit)
        assert [entry.message for entry in page.entries] == [*texts]
        assert [entry.number for entry in page.entries] == [*range(after + 1, after + 1 + len(texts))]
        assert (page.first, page.head) == (1, 5)

    @pytest.mark.parametrize("after", [None, 0, 7])
    def test_read_unknown_room(self, bench, after):
        log = bench()
        log.post("main", "hi")
        assert log.read("other", after) == Page([], first=1, head=0)

    def test_reading_a_room_does_not_create_it(self, bench):
        log = bench()
        log.read("other")
        assert log.post("other", "hi") == [1]
        log.trim()
        assert [event[0] for event in log.new_events()] == ["appended"]

    # Retention

    def test_retention_by_number(self, bench):
        log = bench(retain="3")
        assert log.post("main", *"abcde") == [1, 2, 3, 4, 5]
        page = log.read("main")
        assert [(entry.number, entry.message) for entry in page.entries] == [(3, "c"), (4, "d"), (5, "e")]
        assert (page.first, page.head) == (3, 5)

    def test_read_after_a_trimmed_number(self, bench):
        """The page begins with the oldest message that is left."""
        log = bench(retain="3")
        log.post("main", *"abcde")
        assert log.texts("main", after=0, limit=2) == log.texts("main", after=1, limit=2) == ["c", "d"]
        assert log.texts("main", after=3, limit=2) == ["d", "e"]

    def test_followers_learn_the_first_number(self, bench):
        log = bench(retain="2")
        log.post("main", *"ab")
        assert [event for event in log.new_events() if event[0] == "trimmed"] == []
        log.post("main", "c")
        notified = log.new_events()
        assert notified == [("appended", "main", log.read("main").entries[-1]), ("trimmed", "main", 2)]
        log.post("main", "d")
        assert log.new_events()[-1] == ("trimmed", "main", 3)

    def test_retention_counts_each_room(self, bench):
        log = bench(retain="2")
        for room in "abbaabbb":
            log.post(room, room)
        assert [log.read(room)[1:] for room in "ab"] == [(2, 3), (4, 5)]

    def test_retention_by_days(self, bench):
        """A message is removed when it is older than the limit, to the second."""
        log = bench(retain="2d")
        log.post("main", "one")
        log.now.advance(DAY)
        log.post("main", "two")
        log.now.advance(DAY)
        log.post("main", "three")  # "one" is two days old to the second, and not older
        assert log.texts("main") == ["one", "two", "three"]
        log.new_events()
        log.now.advance(1)
        log.post("main", "four")
        assert log.texts("main") == ["two", "three", "four"]
        assert log.new_events()[-1] == ("trimmed", "main", 2)

    def test_trim_reaches_quiet_rooms(self, bench):
        log = bench(retain="1d")
        log.post("quiet", "one", "two")
        log.now.advance(DAY / 2)
        log.post("quiet", "three")
        log.post("busy", "one")
        log.now.advance(DAY / 2 + 1)
        log.new_events()
        log.trim()
        assert log.new_events() == [("trimmed", "quiet", 3)]
        assert log.texts("quiet") == ["three"]
        assert log.texts("busy") == ["one"]

    def test_trim_without_effect_is_silent(self, bench):
        for retain in ("all", "5", "1d"):
            log = bench(retain=retain)
            log.trim()
            log.post("main", "one")
            log.new_events()
            log.trim()
            assert log.new_events() == []

    def test_retention_is_unlimited_by_default(self, bench):
        log = bench(seed=SEED)
        log.now.advance(10_000 * DAY)
        log.post("main", "hi")
        log.trim()
        assert log.read("main").first == 1

    def test_numbers_continue_after_everything_was_trimmed(self, bench):
        log = bench(retain="1d")
        log.post("main", "one", "two")
        log.now.advance(2 * DAY)
        log.new_events()
        log.trim()
        assert log.new_events() == [("trimmed", "main", 3)]
        for after in (None, 0, 2):
            assert log.read("main", after) == Page([], first=3, head=2)
        log.trim()
        assert log.new_events() == []
        assert log.post("main", "three") == [3]
        assert [event[0] for event in log.new_events()] == ["appended"]
        assert log.read("main")[1:] == (3, 3)

    # Labels

    def test_labelled_post_is_stored(self, bench):
        log = bench()
        assert log.send("main", Post("ann", "hi", "c81f")) == [("posted", 1)]
        entry = Entry(1, "ann", "hi", "2026-01-01T00:00:00.000Z")
        assert log.new_events() == [("appended", "main", entry)]
        assert log.read("main") == Page([entry], first=1, head=1)

    def test_label_is_never_shown(self, bench):
        log = bench()
        log.send("main", Post("ann", "hi", "secret"), Post("ann", "hi", "secret"))
        shown = repr([*log.new_events(), log.read("main"), log.read("main", after=0)])
        assert "ann" in shown
        assert "secret" not in shown

    def test_retry_is_a_duplicate(self, bench):
        log = bench()
        assert log.send("main", *[Post("ann", "hi", "l")] * 4) == [("posted", 1)] + [("duplicate", 1)] * 3
        assert log.texts("main") == ["hi"]
        assert log.send("main", Post("ann", "more", "m")) == [("posted", 2)]

    def test_followers_see_no_duplicate(self, bench):
        log = bench(retain="2")
        log.send("main", Post("ann", "hi", "l"))
        log.new_events()
        log.send("main", Post("ann", "hi", "l"), Post("ann", "else", "l"))
        assert log.new_events() == []

    def test_duplicate_changes_nothing(self, bench):
        log = bench()
        log.send("main", Post("ann", "hi", "l"))
        before = log.read("main")
        log.now.advance(60)
        assert log.send("main", Post("ann", "hi", "l"), Post("ann", "else", "l")) == [("duplicate", 1), REUSED]
        assert log.read("main") == before

    def test_late_duplicate(self, bench):
        log = bench(seed=SEED)
        first = Post("ann", "hi", "l")
        sent = [first, Post("ann", "hi"), Post("bob", "hi", "l"), Post("ann", "hi", "m"), Post("ann", "more")]
        assert log.send("main", *sent) == [("posted", number) for number in range(3, 8)]
        assert log.send("main", first, sent[3], sent[2]) == [
            ("duplicate", 3),
            ("duplicate", 6),
            ("duplicate", 5),
        ]

    def test_duplicate_of_a_post_in_flight(self, bench):
        log = bench()
        before, twice = ("main", Post("bob", "before")), ("main", Post("ann", "hi", "l"))
        assert log.send_at_once(before, twice, twice, twice) == [("posted", 1), ("posted", 2)] + [("duplicate", 2)] * 2
        assert log.texts("main") == ["before", "hi"]
        assert [event[:2] for event in log.new_events()] == [("appended", "main")] * 2

    def test_reused_label_is_refused(self, bench):
        log = bench()
        first = Post("ann", "hi", "l")
        for other in ("hi ", "Hi", "h", "", "hi\0", "hi\n"):
            assert log.send("main", first, Post("ann", other, "l")) in (
                [("posted", 1), REUSED],
                [("duplicate", 1), REUSED],
            )
        assert log.texts("main") == ["hi"]
        assert log.send("main", first) == [("duplicate", 1)]  # the label still belongs to the first post

    def test_refused_post_takes_no_number(self, bench):
        log = bench()
        sent = [Post("ann", "hi", "l"), Post("ann", "else", "l"), Post("ann", "else", "m"), Post("ann", "else")]
        assert log.send("main", *sent) == [("posted", 1), REUSED, ("posted", 2), ("posted", 3)]
        assert [entry.number for entry in log.read("main").entries] == [1, 2, 3]

    def test_reused_label_of_a_post_in_flight(self, bench):
        log = bench()
        sent = [Post("bob", "before"), Post("ann", "hi", "l"), Post("ann", "else", "l"), Post("ann", "hi", "l")]
        outcomes = log.send_at_once(*[("main", post) for post in sent])
        assert outcomes == [("posted", 1), ("posted", 2), REUSED, ("duplicate", 2)]
        assert log.texts("main") == ["before", "hi"]

    @pytest.mark.parametrize(
        ("room", "username", "label"),
        [
            ("main", "bob", "7"),
            ("main", "Ann", "7"),
            ("main", "ann ", "7"),
            ("main", "ann\0", "7"),
            ("other", "ann", "7"),
            ("main", "ann", "07"),
            ("main", "ann", "7.0"),
            ("main", "ann", "7'"),
            ("main", "a", "7"),
            ("main", "ann", None),
        ],
    )
    def test_label_belongs_to_a_user_and_a_room(self, bench, room, username, label):
        log = bench()
        first, other = ("main", Post("ann", "hi", "7")), (room, Post(username, "hi", label))
        number = 2 if room == "main" else 1
        assert log.send_at_once(first, other) == [("posted", 1), ("posted", number)]
        again = ("duplicate", number) if label else ("posted", 3)
        assert log.send_at_once(other, first) == [again, ("duplicate", 1)]

    def test_labels_are_case_sensitive(self, bench):
        log = bench()
        assert log.send("main", Post("ann", "hi", "c81f"), Post("ann", "ho", "C81F")) == [
            ("posted", 1),
            ("posted", 2),
        ]

    def test_usernames_are_compared_by_code_point(self, bench):
        log = bench()
        posts = [Post(name, "hi", "l") for name in ("é", "e\u0301", "e")]
        assert log.send("main", *posts) == [("posted", 1), ("posted", 2), ("posted", 3)]
        assert log.send("main", *posts) == [("duplicate", 1), ("duplicate", 2), ("duplicate", 3)]

    @pytest.mark.parametrize("mark", [*":;,.-_/|!#=\"'{}"])
    def test_room_username_and_label_do_not_run_together(self, bench, mark):
        """No separator makes two different combinations equal."""
        log = bench()
        posts = [
            Post(f"a{mark}b", "hi", "c"),
            Post("a", "hi", f"b{mark}c"),
            Post("a", "hi", f"{mark}b{mark}c"),
            Post(f"a{mark}b{mark}", "hi", "c"),
        ]
        assert log.send("main", *posts) == [("posted", number) for number in (1, 2, 3, 4)]
        assert log.send("main", *posts) == [("duplicate", number) for number in (1, 2, 3, 4)]
        for room, username in (("r", f"a{mark}b"), ("r-a", "b"), ("r_a", "b"), ("r", "a-b!"), ("r", "a_b!")):
            assert log.send(room, Post(username, "hi", "c"))[0][0] == "posted"

    @pytest.mark.parametrize(
        "text", ["'", '"', "%s", "'; --", "\\", "{}", "$1", ":label", "?", "[x]", "*", "~" * 30, "0", "null", "NaN"]
    )
    def test_usernames_and_labels_are_not_interpreted(self, bench, text):
        log = bench()
        label = text.replace(" ", "_")
        posts = [Post(text, "hi", label), Post(text, "ho", f"{label}!"), Post(f"{text}!", "hi", label)]
        assert log.send("main", *posts) == [("posted", 1), ("posted", 2), ("posted", 3)]
        assert log.send("main", *posts) == [("duplicate", 1), ("duplicate", 2), ("duplicate", 3)]
        assert log.send("main", Post(text, "else", label)) == [REUSED]

    @pytest.mark.parametrize("username", ["a\0b", "\0", "😀" * 30, "\n", " ", "\x7f", "\u2028"])
    def test_longest_label(self, bench, username):
        log = bench()
        post = Post(username, "\0", "~" * 64)
        assert log.send("main", post, post, post._replace(label="~" * 63)) == [
            ("posted", 1),
            ("duplicate", 1),
            ("posted", 2),
        ]

    def test_posts_without_a_label_are_never_duplicates(self, bench):
        log = bench()
        same = Post("ann", "hi")
        assert log.send("main", same, same) == [("posted", 1), ("posted", 2)]
        assert log.send_at_once(*[("main", same)] * 3) == [("posted", 3), ("posted", 4), ("posted", 5)]
        assert log.send("main", Post("ann", "hi", "l"), same) == [("posted", 6), ("posted", 7)]

    def test_seed_has_no_labels(self, bench):
        log = bench(seed=SEED)
        assert log.send("main", Post("Alice", "Hello!", "l"), Post("Alice", "Hello!", "m")) == [
            ("posted", 3),
            ("posted", 4),
        ]

    def test_mixed_batch(self, bench):
        """New posts, duplicates and reused labels in several rooms: each poster gets its own outcome."""
        log = bench()
        assert log.send("a", Post("ann", "old", "o"), Post("ann", "old", "p")) == [("posted", 1), ("posted", 2)]
        log.new_events()
        sent = [
            ("b", Post("ann", "first"), ("posted", 1)),
            ("a", Post("ann", "old", "o"), ("duplicate", 1)),
            ("a", Post("ann", "new", "n"), ("posted", 3)),
            ("b", Post("ann", "old", "o"), ("posted", 2)),
            ("c", Post("ann", "new", "n"), ("posted", 1)),
            ("a", Post("ann", "else", "n"), REUSED),
            ("a", Post("bob", "new", "n"), ("posted", 4)),
            ("a", Post("ann", "new", "n"), ("duplicate", 3)),
            ("a", Post("ann", "else", "p"), REUSED),
            ("c", Post("ann", "new", "n"), ("duplicate", 1)),
            ("a", Post("ann", "new"), ("posted", 5)),
            ("c", Post("ann", "last", "z"), ("posted", 2)),
            ("a", Post("ann", "old", "p"), ("duplicate", 2)),
        ]
        assert log.send_at_once(*[(room, post) for room, post, _ in sent]) == [outcome for *_, outcome in sent]
        notified = [(room, entry.number, entry.message) for _, room, entry in log.new_events()]
        new = [(room, number, post.message) for room, post, (what, number) in sent if what == "posted"]
        for room, numbers in {"a": [1, 2, 3, 4, 5], "b": [1, 2], "c": [1, 2]}.items():
            assert [event for event in notified if event[0] == room] == [event for event in new if event[0] == room]
            assert [entry.number for entry in log.read(room).entries] == numbers
        assert len(notified) == len(new)

    def test_many_labels_in_one_batch(self, bench):
        log = bench()
        sent = [("main", Post("ann", f"text {number}", f"l{number}" if number % 3 else None)) for number in range(600)]
        assert log.send_at_once(*sent) == [("posted", number) for number in range(1, 601)]
        labelled = [(number, one) for number, one in enumerate(sent, 1) if one[1].label]
        assert log.send_at_once(*[one for _, one in labelled]) == [("duplicate", number) for number, _ in labelled]
        assert log.read("main").head == 600

    def test_poster_retries_from_its_callback(self, bench):
        log = bench()

        class Doubtful(RecordingPoster):
            def posted(self, post, number, *, duplicate=False):
                super().posted(post, number, duplicate=duplicate)
                if len(self.events) == 1:
                    log.store.append("main", post, self)

        poster, post = Doubtful(), Post("ann", "hi", "l")
        log.store.append("main", post, poster)
        for _ in range(2):
            self.wait(log.store.settled())
        assert poster.events == [("posted", post, 1), ("duplicate", post, 1)]

    def test_duplicate_is_answered_after_the_followers(self, bench):
        log = bench()
        poster = RecordingPoster(log.events)
        for post in (Post("bob", "before"), *[Post("ann", "hi", "l")] * 2):
            log.store.append("main", post, poster)
        self.wait(log.store.settled())
        notified = [event for event in log.new_events() if event[1] != Post("bob", "before")]
        assert notified.index(("appended", "main", log.read("main").entries[1])) < notified.index(
            ("duplicate", Post("ann", "hi", "l"), 2)
        )

    def test_label_is_forgotten_with_its_message(self, bench):
        log = bench(retain="2")
        posts = [Post("ann", text, text) for text in "abc"]
        log.send("main", *posts)
        assert log.send("main", posts[1], posts[2]) == [("duplicate", 2), ("duplicate", 3)]
        assert log.send("main", Post("ann", "else", "a")) == [("posted", 4)]
        # The label belongs to the new message now.
        assert log.send("main", Post("ann", "else", "a"), posts[0]) == [("duplicate", 4), REUSED]
        assert log.texts("main") == ["c", "else"]

    def test_label_survives_the_trim_of_others(self, bench):
        log = bench(retain="3")
        log.send("main", Post("ann", "a"), Post("ann", "b", "b"))
        log.send("main", *[Post("bob", text) for text in "cd"])
        assert log.read("main").first == 2
        assert log.send("main", Post("ann", "b", "b")) == [("duplicate", 2)]
        log.send("main", Post("bob", "e"))
        assert log.send("main", Post("ann", "b", "b")) == [("posted", 6)]

    def test_trim_forgets_one_users_label_only(self, bench):
        log = bench(retain="2")
        log.send("other", Post("ann", "hi", "l"))
        log.send("main", Post("ann", "hi", "l"), Post("bob", "hi", "l"), Post("ann", "more"))
        assert log.send("main", Post("bob", "hi", "l")) == [("duplicate", 2)]
        assert log.send("other", Post("ann", "hi", "l")) == [("duplicate", 1)]
        assert log.send("main", Post("ann", "hi", "l")) == [("posted", 4)]

    def test_duplicates_trim_nothing(self, bench):
        log = bench(retain="2")
        log.post("main", "before")
        log.send("main", *[Post("ann", "hi", "l")] * 5, *[Post("ann", "else", "l")] * 5)
        assert log.texts("main") == ["before", "hi"]

    def test_label_is_forgotten_with_an_old_message(self, bench):
        log = bench(retain="2d")
        old, young = Post("ann", "hi", "old"), Post("ann", "hi", "young")
        log.send("main", old)
        log.now.advance(DAY)
        log.send("main", young)
        log.now.advance(DAY)
        assert log.send("main", old) == [("duplicate", 1)]  # two days old to the second, and not older
        log.now.advance(1)
        log.trim()
        assert log.send("main", Post("ann", "else", "old"), young) == [("posted", 3), ("duplicate", 2)]

    def test_next_post_frees_an_old_label(self, bench):
        log = bench(retain="1d")
        log.send("main", Post("ann", "hi", "l"))
        log.now.advance(DAY + 1)
        log.post("main", "next")
        assert log.send("main", Post("ann", "else", "l")) == [("posted", 3)]

    def test_retry_trims_nothing(self, bench):
        """A message that is too old keeps its label until something trims it."""
        log = bench(retain="1d")
        log.send("main", Post("ann", "hi", "l"), Post("ann", "more"))
        log.now.advance(DAY + 1)
        log.new_events()
        # The message is too old, but it and its label stay until something trims them.
        for _ in range(2):
            assert log.send("main", Post("ann", "hi", "l"), Post("ann", "else", "l")) == [("duplicate", 1), REUSED]
        assert log.new_events() == []
        assert log.read("main").first == 1
        log.trim()
        assert log.new_events() == [("trimmed", "main", 3)]
        assert log.send("main", Post("ann", "hi", "l")) == [("posted", 3)]

    def test_labels_are_forgotten_when_everything_is_trimmed(self, bench):
        log = bench(retain="1d")
        posts = [Post("ann", text, text) for text in "abc"]
        log.send("main", *posts)
        log.now.advance(2 * DAY)
        log.trim()
        assert log.send("main", *posts) == [("posted", 4), ("posted", 5), ("posted", 6)]

    # Abandoning

    def test_abandon_then_retry(self, bench):
        """Each abandoned post is answered once, and its retry is stored once."""
        log = bench()
        log.post("main", "before")
        posts = [(room, Post("ann", f"{number}", f"l{number}")) for room in ("main", "other") for number in range(3)]
        posters = [RecordingPoster() for _ in posts]
        for (room, post), poster in zip(posts, posters, strict=True):
            log.store.append(room, post, poster)
        log.store.abandon()
        log.store.abandon()
        assert all(len(poster.events) == 1 for poster in posters), "at once"
        self.wait(log.store.settled())
        for (_, post), poster in zip(posts, posters, strict=True):
            ((what, about, outcome),) = poster.events
            assert about is post
            assert what == "posted" or (what == "refused" and isinstance(outcome, InDoubt))
        for posted, poster in zip(log.send_at_once(*posts), posters, strict=True):
            if poster.numbers:
                assert posted == ("duplicate", *poster.numbers)
            assert posted[0] in ("duplicate", "posted")
        assert log.texts("main")[1:] == log.texts("other") == ["0", "1", "2"]
        notified = [(room, entry.number) for what, room, entry in log.new_events() if what == "appended"]
        assert sorted(notified) == [("main", 1), *(("main", n) for n in (2, 3, 4)), *(("other", n) for n in (1, 2, 3))]

    def test_abandon_spares_stored_and_later_posts(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "one"), poster)
        self.wait(log.store.settled())
        log.store.abandon()
        assert poster.numbers == [1]
        assert poster.refusals == []
        assert log.post("main", "two", "three") == [2, 3]

    def test_close_after_abandon(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "one"), poster)
        log.store.abandon()
        self.wait(log.store.close())
        assert len(poster.events) == 1

    # Any sequence of operations, against a list

    rooms = st.sampled_from(["main", "a", "b"])
    operations = st.lists(
        st.tuples(st.just("post"), rooms)
        | st.tuples(st.just("post"), rooms)
        | st.tuples(st.just("pass"), st.sampled_from([1, 60, DAY // 2, DAY, 3 * DAY, -60, -2 * DAY]))
        | st.tuples(st.just("trim"), st.none())
        | st.tuples(st.just("read"), st.tuples(rooms, st.none() | st.integers(0, 12), st.integers(1, 6))),
        max_size=40,
    )

    def test_store_equals_a_list_for_each_room(self, make):
        """For any sequence of operations, the store behaves like the Model below."""

        # Defined here, so that each store's class gets its own examples.
        @settings(REPEATABLE, max_examples=40)
        @given(st.sampled_from(["all", "1", "3", "1d", "2d"]), st.sampled_from([(), SEED]), self.operations)
        def check(retain, seed, steps):
            log = Bench(make, self.wait, Retention.parse(retain), seed)
            model = Model(Retention.parse(retain), seed, log.now, recovers=self.recovers)
            before = log.read("main").entries
            for number, (step, what) in enumerate(steps):
                if step == "post":
                    assert log.post(what, str(number)) == [model.post(what, str(number))]
                elif step == "pass":
                    log.now.advance(what)
                elif step == "trim":
                    log.trim()
                    model.trim()
                else:
                    page, expected = log.read(*what), model.read(*what)
                    assert [entry[:3] for entry in page.entries] == [entry[:3] for entry in expected.entries]
                    assert page[1:] == expected[1:]
            # The follower's events add up to the log, so that it need not read what it has seen.
            for room in ("main", "a", "b"):
                followed = before if room == "main" else []
                for event, where, what in log.events:
                    if where == room:
                        followed = (
                            [*followed, what] if event == "appended" else [e for e in followed if e.number >= what]
                        )
                assert followed == log.read(room).entries
                stamps = [instant(entry.timestamp) for entry in followed if entry not in SEED]
                steps = [after - before for before, after in itertools.pairwise(stamps)]
                assert [step for step in steps if (-JUMP_SECONDS if self.recovers else -(10**12)) <= step < 0] == []
            self.wait(log.store.close())

        check()

    posts = st.tuples(
        st.sampled_from(["ann", "bob"]), st.sampled_from(["hi", "ho"]), st.sampled_from([None, "l", "m"])
    ).map(lambda parts: Post(*parts))
    label_steps = (
        st.tuples(st.just("send"), st.lists(st.tuples(st.sampled_from(["main", "a"]), posts), min_size=1, max_size=6))
        | st.tuples(st.just("send"), st.lists(st.tuples(st.just("main"), posts), min_size=1, max_size=6))
        | st.tuples(st.just("again"), st.none())
        | st.tuples(st.just("pass"), st.sampled_from([1, DAY // 2, DAY, 3 * DAY]))
        | st.tuples(st.just("trim"), st.none())
    )

    def check_labels(self, make, steps, again=None):
        @settings(REPEATABLE, max_examples=60)
        @given(st.sampled_from(["all", "1", "2", "4", "1d"]), st.lists(steps, max_size=20))
        def check(retain, steps):
            log = Bench(make, self.wait, Retention.parse(retain), SEED)
            model = Model(Retention.parse(retain), SEED, log.now, gathers=self.gathers, recovers=self.recovers)
            sent = []
            for step, what in steps:
                if step in ("send", "again"):
                    sent = what or sent
                    assert log.send_at_once(*sent) == model.send_at_once(*sent)
                elif step == "pass":
                    log.now.advance(what)
                elif step == "trim":
                    log.trim()
                    model.trim()
                else:
                    log.reopen(again, retain)
                    model.reopen()
            for room in ("main", "a"):
                page, expected = log.read(room), model.read(room, None, 100)
                assert [entry[:3] for entry in page.entries] == [entry[:3] for entry in expected.entries]
                assert page[1:] == expected[1:]
            self.wait(log.store.close())

        check()

    def test_labels_equal_the_model(self, make):
        """For any sequence of labelled posts, outcomes equal those of the Model below."""
        self.check_labels(make, self.label_steps)

    # Cursors of readers outside

    def test_new_reader_begins_at_the_heads(self, bench):
        """A reader gets what is appended after its first claim, in old and new rooms."""
        log = bench(seed=SEED)
        log.post("tea", "a")
        assert log.claim()
        assert log.behind() == []
        assert log.cursor("main") == 2
        log.post("tea", "b")
        log.post("new", "c", "d")
        assert log.behind() == [Behind("new", 0, 2), Behind("tea", 1, 2)]
        assert log.cursor("new") == 0

    def test_cursors_advance(self, bench):
        """A room whose cursor is at its head has nothing for the reader."""
        log = bench()
        log.claim()
        log.post("main", "a", "b")
        log.post("tea", "c")
        assert log.advance(main=1, tea=1)
        assert (log.cursor("main"), log.cursor("tea")) == (1, 1)
        assert log.behind() == [Behind("main", 1, 2)]
        assert log.wait(log.store.renew("app", "w1", 60))
        assert log.advance(main=2)
        assert log.behind() == []

    def test_readers_have_cursors_of_their_own(self, bench):
        log = bench()
        log.claim()
        log.post("main", "a")
        log.claim("w1", "other")
        assert log.behind() == [Behind("main", 0, 1)]
        assert log.behind("other") == []
        log.wait(log.store.end_claim("app", "w1"))
        assert log.claim("w2")
        assert log.behind() == [Behind("main", 0, 1)]

    def test_cleared_room_is_behind(self, bench):
        """What was removed before its delivery leaves the reader behind."""
        log = bench()
        log.claim()
        log.post("main", "a", "b")
        log.wait(log.store.clear_room("main"))
        assert log.behind() == [Behind("main", 0, 2)]

    # Moderation

    def test_sanctions_are_added_and_lifted(self, bench):
        """The set in memory changes when the store has the change, and whoever follows it hears of it."""
        log, heard = bench(), []
        log.store.sanctions.follow(heard.append)
        ban, mute = (
            log.ban("s1", username="ann"),
            log.ban("s2", kind="mute", subject="\u00fc|7", reason="\u20ac", seconds=9),
        )
        assert [*log.store.sanctions] == heard == [ban, mute]
        self.wait(log.store.lift(["s1", "unknown"]))
        assert [*log.store.sanctions] == [mute]
        self.wait(log.store.lift(["s2"]))
        assert [*log.store.sanctions] == []
        assert log.new_events() == []

    def test_trim_removes_expired_sanctions(self, bench):
        log = bench()
        log.ban("s1", username="ann", seconds=60)
        later = log.ban("s2", username="ann", seconds=61)
        log.trim()
        assert len(log.store.sanctions) == 2
        log.now.advance(60)
        log.trim()
        assert [*log.store.sanctions] == [later]

    def test_rooms_with_messages_are_listed(self, bench):
        """Rooms are in the order of their names, in pieces."""
        log = bench(retain="2")
        for room in ("b", "c", "a", "d"):
            log.post(room, "hi", "\u00fc", "ho")
            log.now.advance(1)
        self.wait(log.store.clear_room("d"))
        stamp = "2026-01-01T00:00:0{}.000Z"
        size = 2 * len("ann") + len("\u00fcho".encode())
        assert self.wait(log.store.list_rooms("", 2)) == [
            RoomSummary("a", 2, 3, size, stamp.format(2)),
            RoomSummary("b", 2, 3, size, stamp.format(0)),
        ]
        assert [room.name for room in self.wait(log.store.list_rooms("b", 2))] == ["c"]
        assert self.wait(log.store.list_rooms("c", 2)) == []

    def test_rooms_that_are_not_wanted_are_passed_over(self, bench):
        """They take no place among those that are listed."""
        log = bench()
        for number in range(9):
            log.post(f"r{number}", "hi")

        def listed(after, limit):
            found = self.wait(log.store.list_rooms(after, limit, lambda name: name in {"r1", "r4", "r7"}))
            return [room.name for room in found]

        assert listed("", 2) == ["r1", "r4"]
        assert listed("r4", 2) == ["r7"]
        assert listed("r7", 2) == []

    def test_size_of_a_room_is_estimated(self, bench):
        """The newest hundred messages stand for all of them."""
        log = bench()
        log.post("main", "x" * 997)
        log.send_at_once(*[("main", Post("ann", "hello"))] * 199)
        (room,) = self.wait(log.store.list_rooms("", 9))
        assert (room.first, room.head, room.bytes) == (1, 200, 200 * 8)

    def test_cleared_room_goes_on(self, bench):
        """Followers learn of it, the numbers go on, and labels are free again."""
        log = bench()
        log.send("main", Post("ann", "hi", "l"), Post("ann", "ho"))
        log.post("other", "hi")
        log.new_events()
        assert self.wait(log.store.clear_room("main")) == 2
        assert log.new_events() == [("trimmed", "main", 3)]
        assert log.read("main") == Page([], first=3, head=2)
        assert log.texts("other") == ["hi"]
        assert log.send("main", Post("ann", "else", "l")) == [("posted", 3)]
        assert log.read("main").first == 3

    def test_clearing_an_empty_room_changes_nothing(self, bench):
        log = bench()
        assert self.wait(log.store.clear_room("main")) == 0
        log.post("main", "hi")
        self.wait(log.store.clear_room("main"))
        epoch = log.store.epoch
        log.new_events()
        assert self.wait(log.store.clear_room("main")) == 0
        assert log.new_events() == []
        assert (log.store.epoch, log.read("main")) == (epoch, Page([], first=2, head=1))


class ClockContract(StoreContract):
    recovers = True
    far = instant("2099-07-01T00:00:00.000Z") - NEW_YEAR

    def test_room_does_not_set_the_time_of_another(self, bench):
        """A message that was stamped by a wrong clock changes the time of no other room."""
        log = bench()
        log.now.jump(50)
        log.post("a", "hi")
        log.now.jump(-50)
        log.post("b", "hi")
        assert log.read("b").entries[-1].timestamp == "2026-01-01T00:00:00.000Z"

    def test_timestamps_recover_with_the_clock(self, bench):
        """After one message of 2099, the next has the right time again, and numbers give the order."""
        log = bench()
        log.now.jump(self.far)
        log.post("main", "one")
        log.now.jump(-self.far)
        log.post("main", "two")
        assert [(entry.number, entry.timestamp) for entry in log.read("main").entries] == [
            (1, "2099-07-01T00:00:00.000Z"),
            (2, "2026-01-01T00:00:00.000Z"),
        ]

    def test_jump_of_the_clock_removes_nothing(self, bench):
        """Neither posts nor a trim remove messages by a clock that has jumped, until it has run for an hour."""
        log = bench(retain="30d")
        log.post("main", "one")
        log.post("quiet", "one")
        log.now.advance(2 * STEADY_SECONDS)
        log.trim()
        log.now.jump(self.far)
        log.post("main", "two")
        log.trim()
        log.now.advance(STEADY_SECONDS - 1)
        log.trim()
        assert log.texts("main") == ["one", "two"]
        assert log.texts("quiet") == ["one"]
        log.now.jump(-self.far)
        for _ in range(29 * 24):
            log.now.advance(3600)
            log.trim()
        assert log.texts("main") == ["one", "two"]
        assert log.texts("quiet") == ["one"]
        log.now.advance(DAY)
        log.trim()
        assert log.texts("quiet") == []

    def test_start_with_a_wrong_clock_removes_nothing(self, bench):
        """In the first hour of a store, nothing is removed by its age."""
        log = bench(retain="30d", seed=SEED)
        log.trim()
        log.post("main", "hi")
        assert log.read("main").first == 1
        log.now.advance(STEADY_SECONDS)
        log.trim()
        assert log.read("main").first == 3

    def test_message_of_a_wrong_clock_ages(self, bench):
        """A message from 2099 is removed with those around it, and keeps none of them."""
        log = bench(retain="2d")
        log.post("main", "one")
        log.now.jump(self.far)
        log.post("main", "two")
        log.now.jump(-self.far)
        log.now.advance(DAY)
        log.post("main", "three")
        assert log.texts("main") == ["one", "two", "three"]
        log.now.advance(DAY + 1)
        log.post("main", "four")
        assert log.texts("main") == ["two", "three", "four"], "the age of the second is unknown"
        log.now.advance(DAY)
        log.post("main", "five")
        assert log.texts("main") == ["four", "five"]

    def test_removal_by_age_is_logged(self, bench):
        """A trim logs how many messages it and the posts before it removed, if they removed any."""
        log = bench(retain="1d")
        log.post("main", *"abc")
        log.post("quiet", *"de")
        with capturedLogs() as events:
            log.trim()
            log.now.advance(DAY + 1)
            log.post("main", "f")
            log.trim()
            log.trim()
        assert [formatEvent(event) for event in events] == ["5 messages removed that --retain no longer keeps"]


class EditContract(StoreContract):
    """The author, or a moderator, replaces and removes entries."""

    def test_edit_is_the_next_entry(self, bench):
        """Followers get the edit as an entry, and pages show its text in the place of the original too."""
        log = bench()
        assert log.send("main", Post("ann", "old", author="a"), Post("bob", "else"), log.edit(1)) == [
            ("posted", number) for number in (1, 2, 3)
        ]
        now = "2026-01-01T00:00:00.000Z"
        old, other = Entry(1, "ann", "old", now, "a"), Entry(2, "bob", "else", now)
        edit = Entry(3, "ann", "new", now, "a", replaces=1)
        assert log.new_events() == [("appended", "main", entry) for entry in (old, other, edit)]
        newest = old._replace(message="new", replaced=3)
        assert log.read("main") == Page([newest, other, edit], first=1, head=3)
        assert log.read("main", after=0, limit=1).entries == [newest]
        assert log.read("main", after=1).entries == [other, edit]

    def test_newest_edit_wins(self, bench):
        """An earlier edit keeps the text that it had."""
        log = bench()
        log.send("main", Post("ann", "old", author="a"), log.edit(1, "second"), log.edit(1, "third"))
        assert log.texts("main") == ["third", "second", "third"]
        assert [entry.replaced for entry in log.read("main").entries] == [3, None, None]

    def test_removal_erases_the_entry_and_its_edits(self, bench):
        log = bench()
        log.send("main", Post("ann", "old", author="a"), log.edit(1), Post("bob", "stays"))
        log.new_events()
        assert log.send("main", log.removal(1)) == [("posted", 4)]
        (what,) = log.new_events()
        assert what[2][1:3] == ("ann", "[removed]")
        assert (what[2].replaces, what[2].removed) == (1, True)
        entries = log.read("main").entries
        assert [entry.message for entry in entries] == ["[removed]", "[removed]", "stays", "[removed]"]
        assert [bool(entry.removed) for entry in entries] == [True, True, False, True]
        assert [(entry.replaces, entry.replaced) for entry in entries] == [
            (None, 4),
            (1, None),
            (None, None),
            (1, None),
        ]

    def test_only_the_author_edits(self, bench):
        """The author is the token's subject: the username does not count, and without tokens nobody edits."""
        log = bench()
        log.send("main", Post("ann", "old", author="a"), Post("ann", "hi"))
        for author, number in (("b", 1), (None, 1), (None, 2), ("b", 2), (None, 9)):
            for post in (log.edit(number, author=author), log.removal(number, author=author)):
                assert log.send("main", post) == [FORBIDDEN]
        assert log.texts("main") == ["old", "hi"]
        assert log.send("main", log.edit(1)._replace(username="Ann B.")) == [("posted", 3)]

    def test_moderator_edits_everything(self, bench):
        log = bench(seed=SEED)
        log.send("main", Post("ann", "old", author="a"), Post("ann", "hi"))
        sent = [log.edit(number, author=author, moderated=True) for number, author in ((1, "m"), (3, "m"), (4, None))]
        sent += [log.removal(number, author="m", moderated=True) for number in (3, 4)]
        assert log.send("main", *sent) == [("posted", number) for number in (5, 6, 7, 8, 9)]
        assert log.texts("main", limit=9)[:4] == ["new", "Hi Alice!", "[removed]", "[removed]"]

    def test_unknown_entry_is_refused(self, bench):
        """Neither a number that was never given, nor one of another room or epoch, nor a trimmed one is replaced."""
        log = bench(retain="2")
        log.send("main", *[Post("ann", "old", author="a")] * 3)
        log.new_events()
        for number in (0, 1, 4, 10**15):
            assert log.send("main", log.edit(number), log.removal(number, author="m", moderated=True)) == [UNKNOWN] * 2
        assert log.send("other", log.edit(2)) == [UNKNOWN]
        assert log.send("main", log.edit(2)._replace(replaces=Id("other", 2))) == [UNKNOWN]
        assert log.new_events() == []
        assert log.post("other", "first") == [1]

    def test_edit_or_removed_entry_is_refused(self, bench):
        """Whoever replaces an edit must name the original, and what was removed stays so."""
        log = bench()
        log.send("main", Post("ann", "old", author="a"), log.edit(1), Post("ann", "gone", author="a"), log.removal(3))
        refused = [build(number) for number in (2, 3, 4) for build in (log.edit, log.removal)]
        refused += [log.edit(3, author="m", moderated=True)]
        assert log.send("main", *refused) == [NOT_REPLACEABLE] * 7
        assert log.read("main").head == 4

    def test_edit_of_a_post_in_flight(self, bench):
        """Edits see the posts before them, also those of the same batch."""
        log = bench()
        sent = [Post("bob", "before"), Post("ann", "old", author="a"), log.edit(2), log.edit(9), log.removal(2)]
        sent += [log.edit(2), Post("bob", "after")]
        assert log.send_at_once(*[("main", post) for post in sent]) == [
            *(("posted", number) for number in (1, 2, 3)),
            UNKNOWN,
            ("posted", 4),
            NOT_REPLACEABLE,
            ("posted", 5),
        ]
        assert log.texts("main") == ["before", "[removed]", "[removed]", "[removed]", "after"]

    def test_labels_of_edits(self, bench):
        """A retry of an edit, of a removal, or of what they replaced is a duplicate; another post is refused."""
        log = bench()
        first, other = Post("ann", "old", "l", "a"), Post("ann", "else", "o", "a")
        edit, gone = log.edit(1, label="e"), log.removal(1, label="r")
        assert log.send("main", first, other, edit, edit, first) == [
            *(("posted", number) for number in (1, 2, 3)),
            ("duplicate", 3),
            ("duplicate", 1),
        ]
        reused = [log.edit(1, "more", "e"), log.edit(2, label="e"), Post("ann", "new", "e", "a"), log.removal(1, "e")]
        assert log.send("main", *reused, log.edit(1, "old", "l")) == [REUSED] * 5
        assert log.send("main", gone, gone, edit, first) == [
            ("posted", 4),
            ("duplicate", 4),
            ("duplicate", 3),
            ("duplicate", 1),
        ]
        assert log.send("main", log.removal(2, "r"), log.edit(2, label="l")) == [REUSED] * 2

    @pytest.mark.parametrize("first", RETRIES)
    def test_label_of_another_kind_of_post(self, bench, first):
        """Only a post of the same kind, target and text is a retry; the text of an erased one is unknown."""
        log = bench()
        old = Post("ann", "old", author="a")
        assert log.send("main", old, old, log.labelled()[first]) == [("posted", 1), ("posted", 2), ("posted", 3)]
        assert retried(log) == retries(first, erased=False)
        log.send("main", log.removal(1 if log.labelled()[first].replaces else 3))
        assert retried(log) == retries(first, erased=True)

    @pytest.mark.parametrize("first", RETRIES)
    def test_label_of_another_kind_in_flight(self, bench, first):
        """Posts in flight get the same answers as later ones."""
        log = bench()
        posts = log.labelled()
        before = [Post("ann", "old", author="a")] * 2
        remove = log.removal(1 if posts[first].replaces else 3)
        sent = [*before, posts[first], *posts.values(), remove, *posts.values()]
        _, _, _, *outcomes = log.send_at_once(*[("main", post) for post in sent])
        assert dict(zip(posts, outcomes, strict=False)) == retries(first, erased=False)
        assert dict(zip(posts, outcomes[len(posts) + 1 :], strict=True)) == retries(first, erased=True)

    def test_label_of_a_removal_outlives_its_message(self, bench):
        """A removal stays one when retention has trimmed the message that it removed."""
        log = bench(retain="2")
        log.send("main", Post("ann", "old", author="a"), log.edit(1, label="e"), log.removal(1, "r"))
        again = [log.edit(1, label="e"), log.removal(1, "e"), log.removal(1, "r"), log.edit(1, label="r")]
        assert log.send("main", *again) == [("duplicate", 2), REUSED, ("duplicate", 3), REUSED]

    def test_retention_of_edits(self, bench):
        """An edit outlives the entry that it replaces, and is trimmed as any other entry."""
        log = bench(retain="2")
        log.send("main", Post("ann", "old", author="a"), log.edit(1), log.edit(1, "newer"))
        assert log.read("main").entries[0][1:3] == ("ann", "new")
        assert log.texts("main") == ["new", "newer"]
        log.post("main", "a", "b")
        assert log.texts("main") == ["a", "b"]

    def test_replaced_entry_is_trimmed_by_its_edit(self, bench):
        log = bench(retain="1")
        log.send("main", Post("ann", "old", author="a"), log.edit(1))
        assert log.texts("main") == ["new"]


class ExtraContract(StoreContract):
    """Entries keep the operator's own fields."""

    def test_extra_fields_are_stored_unchanged(self, bench):
        """Followers and pages get the fields, beside entries without any."""
        log = bench(seed=[SEED[0]._replace(extra={"color": "red"}), SEED[1]])
        extra = {"tags": ["é", 1, 1.0, None, {"b": True, "a": []}], "": "", "size": 2**63}
        posts = [Post("ann", "hi"), Post("ann", "hi", extra=extra), Post("ann", "hi", "l", "a", extra=extra)]
        assert log.send("main", *posts) == [("posted", 3), ("posted", 4), ("posted", 5)]
        expected = [{"color": "red"}, None, None, extra, extra]
        assert [event[2].extra for event in log.new_events()] == expected[2:]
        entries = log.read("main").entries
        assert [entry.extra for entry in entries] == expected
        assert [type(item) for item in entries[3].extra["tags"][1:3]] == [int, float]
        assert entries[4].author == "a"

    def test_edit_replaces_extra_fields(self, bench):
        """An edit has fields of its own, or none, and pages show those of the newest edit."""
        log = bench()
        first = Post("ann", "old", author="a", extra={"color": "red", "size": 1})
        log.send("main", first, log.edit(1, extra={"color": "blue"}))
        assert [entry.extra for entry in log.read("main").entries] == [{"color": "blue"}] * 2
        log.send("main", log.edit(1))
        assert [entry.extra for entry in log.read("main").entries] == [None, {"color": "blue"}, None]
        log.send("main", log.edit(1, extra={"size": 2}))
        assert [entry.extra for entry in log.read("main").entries] == [
            {"size": 2},
            {"color": "blue"},
            None,
            {"size": 2},
        ]

    def test_removal_erases_extra_fields(self, bench):
        log = bench()
        log.send("main", Post("ann", "old", author="a", extra={"a": 1}), log.edit(1, extra={"a": 2}), log.removal(1))
        assert [entry.extra for entry in log.read("main").entries] == [None] * 3
        assert [entry.message for entry in log.read("main").entries] == ["[removed]"] * 3

    def test_retry_has_the_same_extra_fields(self, bench):
        """The order of keys has no meaning, and the type of a value has one."""
        log = bench()
        post = Post("ann", "hi", "l", extra={"a": {"c": 1, "b": 2}, "d": 3})
        same, other = {"d": 3, "a": {"b": 2, "c": 1}}, {"d": 3.0, "a": {"b": 2, "c": 1}}
        posts = [post, post._replace(extra=same), post._replace(extra=other), post._replace(extra=None)]
        assert log.send("main", *posts) == [("posted", 1), ("duplicate", 1), REUSED, REUSED]
        plain = Post("ann", "hi", "m")
        assert log.send("main", plain, plain._replace(extra=same)) == [("posted", 2), REUSED]

    def test_size_of_a_room_counts_extra_fields(self, bench):
        log = bench()
        log.send("main", Post("ann", "hi", extra={"a": "x" * 1000}))
        (summary,) = self.wait(log.store.list_rooms("", 10))
        assert summary.bytes > 1000


class GuardContract(StoreContract):
    def test_failing_poster_disturbs_nobody(self, bench):
        """Whatever a poster raises, each of the others gets its outcome, and the store goes on."""
        log = bench()

        class Failing(RecordingPoster):
            def posted(self, post, number, *, duplicate=False):
                super().posted(post, number, duplicate=duplicate)
                raise ZeroDivisionError

            def refused(self, post, error):
                super().refused(post, error)
                raise ZeroDivisionError

        posts = [Post("ann", text, label) for text, label in ("a-", "bl", "bl", "cl", "d-", "e-")]
        for kind in (Failing, RecordingPoster):
            posters = [Failing() if number % 2 else kind() for number, _ in enumerate(posts)]
            with capturedLogs():
                for post, poster in zip(posts, posters, strict=True):
                    log.store.append("main", post, poster)
                self.wait(log.store.settled())
            assert [len(poster.events) for poster in posters] == [1] * len(posts)
        posters = [Failing() for _ in posts]
        with capturedLogs():
            for post, poster in zip(posts, posters, strict=True):
                log.store.append("main", post, poster)
            log.store.abandon()
        assert [len(poster.events) for poster in posters] == [1] * len(posts)
        self.wait(log.store.settled())
        assert log.store.fault is None

    def test_failing_follower_disturbs_nobody(self, bench):
        """Whatever a follower raises, the other followers and the posters are notified."""
        log = bench(retain="2")

        class Failing(RecordingFollower):
            def appended(self, room, entries):
                raise ZeroDivisionError

            trimmed = appended

        log.store.follow(Failing())
        after = RecordingFollower()
        log.store.follow(after)
        with capturedLogs() as events:
            assert log.post("main", *"abc") == [1, 2, 3]
        assert after.events == log.new_events()
        assert {event["log_failure"].type for event in events} == {ZeroDivisionError}


class DurableStoreContract(StoreContract):
    @pytest.fixture
    def again(self):
        """A function that makes a store over the log of a closed one, from that store, a Retention and a clock."""
        raise NotImplementedError

    def test_labels_outlive_the_process(self, bench, again):
        log = bench()
        first = Post("ann", "hi", "l")
        log.send("main", first)
        log.send("other", first, Post("bob", "hi", "l"))
        log.new_events()
        log.reopen(again)
        assert log.send("main", first, Post("ann", "else", "l"), Post("bob", "hi", "l")) == [
            ("duplicate", 1),
            REUSED,
            ("posted", 2),
        ]
        log.reopen(again)
        assert log.send("other", Post("bob", "hi", "l"), Post("bob", "hi", "m")) == [("duplicate", 2), ("posted", 3)]

    @pytest.mark.parametrize("first", RETRIES)
    def test_labels_of_every_kind_outlive_the_process(self, bench, again, first):
        """An entry whose text is erased keeps its label, its kind and its target."""
        log = bench()
        old = Post("ann", "old", author="a")
        log.send("main", old, old, log.labelled()[first])
        log.reopen(again)
        assert retried(log) == retries(first, erased=False)
        log.send("main", log.removal(1 if log.labelled()[first].replaces else 3))
        log.reopen(again)
        assert retried(log) == retries(first, erased=True)

    def test_extra_fields_outlive_the_process(self, bench, again):
        log = bench()
        post = Post("ann", "hi", "l", extra={"b": 1, "a": "é"})
        log.send("main", post)
        log.reopen(again)
        assert [entry.extra for entry in log.read("main").entries] == [post.extra]
        assert log.send("main", post, post._replace(extra=None)) == [("duplicate", 1), REUSED]

    def test_sanctions_outlive_the_process(self, bench, again):
        log = bench()
        given = [log.ban(f"s{number}", username=f"ann{number}", seconds=60) for number in range(3)]
        self.wait(log.store.lift(["s1"]))
        log.reopen(again)
        assert sorted(log.store.sanctions) == [given[0], given[2]]
        visitor = Visitor("ann2", None, None)
        assert log.store.sanctions.find(SanctionKind.BAN, "main", visitor, log.now()) == given[2]

    def test_cursors_outlive_the_process(self, bench, again):
        """A reader goes on where it was, and does not begin at the heads once more."""
        log = bench()
        log.claim()
        log.post("main", "a", "b")
        log.post("tea", "c")
        log.advance(main=1)
        log.wait(log.store.end_claim("app", "w1"))
        log.reopen(again)
        log.post("main", "d")
        assert log.claim("w2")
        assert log.behind() == [Behind("main", 1, 3), Behind("tea", 0, 1)]

    def test_cleared_room_stays_cleared(self, bench, again):
        log = bench()
        log.post("main", "hi", "ho")
        self.wait(log.store.clear_room("main"))
        log.reopen(again)
        assert log.read("main") == Page([], first=3, head=2)
        assert log.post("main", "hi") == [3]

    def test_trim_at_opening_frees_labels(self, bench, again):
        log = bench()
        posts = [Post("ann", text, text) for text in "abc"]
        log.send("main", *posts)
        log.reopen(again, "2")
        assert log.send("main", posts[1], posts[2]) == [("duplicate", 2), ("duplicate", 3)]
        assert log.send("main", Post("ann", "else", "a")) == [("posted", 4)]

    def test_labels_equal_the_model(self, make, again):
        """For any sequence of labelled posts, outcomes equal those of the Model below."""
        self.check_labels(make, self.label_steps | st.tuples(st.just("reopen"), st.none()), again)


def retried(log):
    """Return the answer to each post of LABELLED, whose label the third entry has."""
    posts = log.labelled()
    return dict(zip(posts, log.send("main", *posts.values()), strict=True))


def retries(first, *, erased):
    """Return the right answer to each post of LABELLED, when the third entry is the `first` and was `erased` or not."""
    known, unknown = RETRIES[first]
    same = {*known, *unknown} if erased else {*known}
    return {name: ("duplicate", 3) if name in same else REUSED for name in LABELLED}


class Model:
    """The simplest log: all entries ever appended, and the number of the first one that is kept."""

    def __init__(self, retain, seed, now, *, gathers=False, recovers=False):
        self.gathers = gathers
        self.recovers = recovers
        self.labels = {}
        self.retain = retain
        self.now = now
        self.rooms = {"main": [*seed]}
        self.firsts = {}
        self.newest = max((entry.timestamp for entry in seed), default="")
        self.reopen()

    def reopen(self):
        self.clock = LogClock(self.now, self.now.steady)
        self.trim()

    def post(self, room, text):
        ((_, number),) = self.send_at_once((room, Post("ann", text)))
        return number

    def send_at_once(self, *sent):
        commits = (sent[:1], sent[1:]) if self.gathers else ((one,) for one in sent)
        outcomes = []
        for commit in commits:
            outcomes += [self._append(room, post) for room, post in commit]
            for (room, _), (what, _) in zip(commit, outcomes[len(outcomes) - len(commit) :], strict=True):
                if what == "posted":
                    self._trim(room)
        return outcomes

    def _append(self, room, post):
        entries = self.rooms.setdefault(room, [])
        labelled = self.labels.setdefault((room, post.username, post.label), [])
        if post.label and labelled and labelled[-1] >= self.firsts.get(room, 1):
            same = entries[labelled[-1] - 1].message == post.message
            return ("duplicate", labelled[-1]) if same else REUSED
        self.newest = max(self.newest, timestamp(self.now()))
        stamp = self.clock.read().after(entries[-1].timestamp if entries else "") if self.recovers else self.newest
        entries.append(Entry(len(entries) + 1, post.username, post.message, stamp))
        labelled.append(len(entries))
        return "posted", len(entries)

    def trim(self):
        for room in self.rooms:
            self._trim(room)

    def _trim(self, room):
        entries = self.rooms[room]
        first = self.firsts.get(room, 1)
        if self.retain.messages:
            first = max(first, len(entries) - self.retain.messages + 1)
        if self.retain.seconds and self.recovers:
            ages = self.clock.ages(self.retain.seconds)
            first += ages.too_old(entry.timestamp for entry in entries[first - 1 :]) if ages else 0
        elif self.retain.seconds:
            oldest = timestamp(self.now() - self.retain.seconds)
            first = max(first, *(e.number + 1 for e in entries if e.timestamp < oldest), 1)
        self.firsts[room] = first

    def read(self, room, after, limit):
        entries, first = self.rooms.get(room, []), self.firsts.get(room, 1)
        kept = entries[first - 1 :]
        chosen = kept[-limit:] if after is None else [entry for entry in kept if entry.number > after][:limit]
        return Page(chosen, first, len(entries))
