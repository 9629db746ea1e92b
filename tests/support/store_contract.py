"""What every store must do: one body of tests, run over each of them.

A store's test module subclasses StoreContract and gives `make`; one that needs a reactor overrides
`wait` too.  One whose log outlives the process subclasses DurableStoreContract, and gives `again`.  Nothing
here knows where a store keeps its messages.
"""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import NEW_YEAR, REPEATABLE, ManualTime, RecordingFollower, RecordingPoster, result_of

from chatd.messages import Entry, Post
from chatd.room.log import InDoubt, LabelReused, Page
from chatd.store.base import DAY, Retention, timestamp

SEED = (
    Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
    Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
)
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


REUSED = ("refused", LabelReused)


class StrictFollower(RecordingFollower):
    """One that is never to be told of nothing; what it does not accept is told to no poster either."""

    def appended(self, room, entries):
        assert entries
        super().appended(room, entries)


class Bench:
    """A store that is open, the time, one who follows it, and one who posts."""

    def __init__(self, make, wait, retain, seed):
        self.wait = wait
        self.now = ManualTime()
        self.store = make(retain, self.now)
        self.wait(self.store.open(seed))
        self.events = []
        self.store.follow(StrictFollower(self.events))

    def reopen(self, again, retain="all"):
        """Close the store, and open another over the same log."""
        self.wait(self.store.close())
        self.store = again(self.store, Retention.parse(retain), self.now)
        self.wait(self.store.open(()))
        self.store.follow(StrictFollower(self.events))

    def post(self, room, *texts):
        """Post texts one after the other; answers their numbers."""
        poster = RecordingPoster()
        for text in texts:
            self.store.append(room, Post("ann", text), poster)
            self.wait(self.store.settled())
        assert poster.refusals == []
        return poster.numbers

    def say(self, room, *posts):
        """Post one after the other; answers what became of each: ("posted", 7), ("duplicate", 7) or REUSED."""
        return [outcome for post in posts for outcome in self.say_at_once((room, post))]

    def say_at_once(self, *said):
        """Post each (room, post) before any is settled; answers what became of each."""
        posters = [RecordingPoster() for _ in said]
        for (room, post), poster in zip(said, posters, strict=True):
            self.store.append(room, post, poster)
        self.wait(self.store.settled())
        outcomes = []
        for (_, post), poster in zip(said, posters, strict=True):
            ((what, about, number),) = poster.events  # each is told once
            assert about is post
            outcomes.append((what, type(number) if what == "refused" else number))
        return outcomes

    def read(self, room, after=None, limit=100):
        return self.wait(self.store.read(room, after, limit))

    def texts(self, room, after=None, limit=100):
        return [entry.message for entry in self.read(room, after, limit).entries]

    def trim(self):
        self.wait(self.store.trim())

    def told(self):
        """What the follower was told since it was last asked."""
        events, self.events[:] = [*self.events], []
        return events


class StoreContract:
    gathers = False
    """Whether all that is appended while a commit is under way goes into the next, and is trimmed after that."""

    @pytest.fixture
    def make(self):
        """What makes a new store, over a new log, of a Retention and a clock."""
        raise NotImplementedError

    def wait(self, deferred):
        """The result of what was asked of the store."""
        return result_of(deferred)

    @pytest.fixture
    def bench(self, make):
        """What makes a Bench; all are closed in the end."""
        benches = []

        def build(retain="all", seed=()):
            benches.append(Bench(make, self.wait, Retention.parse(retain), seed))
            return benches[-1]

        yield build
        for one in benches:
            self.wait(one.store.close())

    # A new log

    def test_the_epoch_is_4_to_16_characters_and_every_log_has_its_own(self, bench):
        epochs = [bench().store.epoch for _ in range(3)]
        assert all(re.fullmatch("[0-9A-Za-z]{4,16}", epoch) for epoch in epochs)
        assert len({*epochs}) == 3

    def test_the_epoch_stays_while_messages_come_and_go(self, bench):
        log = bench(retain="1")
        epoch = log.store.epoch
        log.post("main", "one", "two")
        log.trim()
        assert log.store.epoch == epoch

    def test_a_new_log_begins_with_the_seed_in_the_room_main(self, bench):
        log = bench(seed=SEED)
        assert log.read("main") == Page([*SEED], first=1, head=2)
        assert log.read("other") == Page([], first=1, head=0)

    def test_the_first_message_after_the_seed_has_the_next_number(self, bench):
        log = bench(seed=SEED)
        assert log.post("main", "hi") == [3]
        assert log.post("other", "hi") == [1]

    def test_a_log_without_a_seed_is_empty(self, bench):
        assert bench().read("main") == Page([], first=1, head=0)

    def test_a_seed_that_is_not_retained_is_not_to_be_read(self, bench):
        assert bench(retain="1", seed=SEED).read("main") == Page([SEED[1]], first=2, head=2)
        old = bench(retain="30d", seed=SEED)
        assert old.read("main") == Page([], first=3, head=2)
        assert old.post("main", "hi") == [3]

    # Appending

    def test_numbers_begin_with_1_and_have_no_gaps(self, bench):
        assert bench().post("main", *"abcde") == [1, 2, 3, 4, 5]

    def test_each_room_has_its_own_numbers(self, bench):
        log = bench()
        numbers = [log.post(room, "hi")[0] for room in "abacabbc"]
        assert numbers == [1, 1, 2, 1, 3, 2, 3, 2]
        assert {room: log.read(room).head for room in "abcd"} == {"a": 3, "b": 3, "c": 2, "d": 0}

    def test_an_entry_is_what_was_posted_with_its_number_and_time(self, bench):
        log = bench()
        log.post("main", "hi")
        entry = Entry(1, "ann", "hi", "2026-01-01T00:00:00.000Z")
        assert log.told() == [("appended", "main", entry)]
        assert log.read("main") == Page([entry], first=1, head=1)
        assert isinstance(log.read("main").entries[0], Entry)

    @pytest.mark.parametrize("text", ["a\0b", "\0", "'; --", "%s", "😀" * 500, "\u0301", "\r\n", " ", "007", "1.0"])
    def test_any_text_is_kept_as_it_is(self, bench, text):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post(text[:30], text), poster)
        self.wait(log.store.settled())
        assert poster.numbers == [1]
        assert [entry[1:3] for entry in log.read("main").entries] == [(text[:30], text)]

    def test_the_followers_are_told_in_order_and_before_the_poster(self, bench):
        log = bench()
        poster = RecordingPoster(log.events)
        posts = [Post("ann", text) for text in "abc"]
        for post in posts:
            log.store.append("main", post, poster)
        self.wait(log.store.settled())
        followed, heard = [], []
        for what, *event in log.told():
            if what == "appended":
                followed.append(event[1].number)
            else:
                heard.append(tuple(event))
                assert event[1] in followed
        assert followed == [1, 2, 3]
        assert heard == [(post, number) for number, post in enumerate(posts, 1)]

    def test_every_follower_is_told_of_every_room_the_same(self, bench):
        log = bench(retain="2")
        log.post("a", "before")
        second = RecordingFollower()
        log.store.follow(second)
        log.told()
        for room in "abcabcabc":
            log.post(room, "hi")
        told = log.told()
        assert second.events == told  # and not of what was before
        assert len([event for event in told if event[0] == "appended"]) == 9

    def test_a_log_that_nobody_follows_keeps_what_is_posted(self, make):
        store = make(Retention(), ManualTime())
        self.wait(store.open(()))
        poster = RecordingPoster()
        store.append("main", Post("ann", "hi"), poster)
        self.wait(store.settled())
        assert poster.numbers == [1]
        assert self.wait(store.read("main", None, 10)).head == 1
        self.wait(store.close())

    def test_a_poster_may_post_again_when_it_is_told(self, bench):
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

    def test_a_timestamp_is_the_time_in_utc_to_the_millisecond(self, bench):
        log = bench()
        log.now.now = NEW_YEAR + 86_399.25
        log.post("main", "hi")
        assert log.read("main").entries[0].timestamp == "2026-01-01T23:59:59.250Z"

    def test_timestamps_never_go_back_even_when_the_clock_does(self, bench):
        log = bench(seed=SEED)
        for step in (5, -3600, 1, 3600, -1, 0.5, -(10**9), 2, 10**9, 60):
            log.now.advance(step)
            log.post("main", "hi")
        stamps = [entry.timestamp for entry in log.read("main").entries[len(SEED) :]]
        assert stamps == sorted(stamps)
        assert stamps[0] == "2026-01-01T00:00:05.000Z"
        assert stamps[-1] == timestamp(log.now())  # and go on when it has caught up
        assert all(TIMESTAMP.fullmatch(stamp) for stamp in stamps)

    def test_a_message_is_not_older_than_the_seed(self, bench):
        log = bench(seed=SEED)
        log.now.now = 0
        log.post("main", "hi")
        assert log.read("main").entries[-1].timestamp == "2024-10-20T12:31:00.000Z"

    # Reading

    def test_the_newest_messages_are_read_oldest_first(self, bench):
        log = bench()
        log.post("main", *"abcde")
        page = log.read("main", limit=3)
        assert [(entry.number, entry.message) for entry in page.entries] == [(3, "c"), (4, "d"), (5, "e")]
        assert (page.first, page.head) == (1, 5)

    def test_all_messages_are_read_when_the_limit_allows_it(self, bench):
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
    def test_the_oldest_messages_after_a_number_are_read(self, bench, after, limit, texts):
        log = bench()
        log.post("main", *"abcde")
        page = log.read("main", after, limit)
        assert [entry.message for entry in page.entries] == [*texts]
        assert [entry.number for entry in page.entries] == [*range(after + 1, after + 1 + len(texts))]
        assert (page.first, page.head) == (1, 5)

    @pytest.mark.parametrize("after", [None, 0, 7])
    def test_a_room_that_nobody_ever_posted_to_is_empty(self, bench, after):
        log = bench()
        log.post("main", "hi")
        assert log.read("other", after) == Page([], first=1, head=0)

    def test_reading_a_room_does_not_create_it(self, bench):
        log = bench()
        log.read("other")
        assert log.post("other", "hi") == [1]
        log.trim()
        assert [event[0] for event in log.told()] == ["appended"]

    # Retention

    def test_only_so_many_messages_are_kept(self, bench):
        log = bench(retain="3")
        assert log.post("main", *"abcde") == [1, 2, 3, 4, 5]
        page = log.read("main")
        assert [(entry.number, entry.message) for entry in page.entries] == [(3, "c"), (4, "d"), (5, "e")]
        assert (page.first, page.head) == (3, 5)

    def test_a_read_after_a_number_that_is_kept_no_more_begins_with_the_first_that_is(self, bench):
        log = bench(retain="3")
        log.post("main", *"abcde")
        assert log.texts("main", after=0, limit=2) == log.texts("main", after=1, limit=2) == ["c", "d"]
        assert log.texts("main", after=3, limit=2) == ["d", "e"]

    def test_the_followers_are_told_which_message_is_the_first_now(self, bench):
        log = bench(retain="2")
        log.post("main", *"ab")
        assert [event for event in log.told() if event[0] == "trimmed"] == []
        log.post("main", "c")
        told = log.told()
        assert told == [("appended", "main", log.read("main").entries[-1]), ("trimmed", "main", 2)]
        log.post("main", "d")
        assert log.told()[-1] == ("trimmed", "main", 3)

    def test_every_room_has_its_own_share(self, bench):
        log = bench(retain="2")
        for room in "abbaabbb":
            log.post(room, room)
        assert [log.read(room)[1:] for room in "ab"] == [(2, 3), (4, 5)]

    def test_only_so_many_days_are_kept(self, bench):
        log = bench(retain="2d")
        log.post("main", "one")
        log.now.advance(DAY)
        log.post("main", "two")
        log.now.advance(DAY)
        log.post("main", "three")  # "one" is two days old to the second, and not older
        assert log.texts("main") == ["one", "two", "three"]
        log.told()
        log.now.advance(1)
        log.post("main", "four")
        assert log.texts("main") == ["two", "three", "four"]
        assert log.told()[-1] == ("trimmed", "main", 2)

    def test_trimming_reaches_rooms_in_which_nothing_is_posted(self, bench):
        log = bench(retain="1d")
        log.post("quiet", "one", "two")
        log.now.advance(DAY / 2)
        log.post("quiet", "three")
        log.post("busy", "one")
        log.now.advance(DAY / 2 + 1)
        log.told()
        log.trim()
        assert log.told() == [("trimmed", "quiet", 3)]
        assert log.texts("quiet") == ["three"]
        assert log.texts("busy") == ["one"]

    def test_trimming_tells_nothing_when_nothing_is_removed(self, bench):
        for retain in ("all", "5", "1d"):
            log = bench(retain=retain)
            log.trim()
            log.post("main", "one")
            log.told()
            log.trim()
            assert log.told() == []

    def test_everything_is_kept_if_nothing_else_is_asked_for(self, bench):
        log = bench(seed=SEED)
        log.now.advance(10_000 * DAY)
        log.post("main", "hi")
        log.trim()
        assert log.read("main").first == 1

    def test_numbers_are_not_used_again_after_everything_was_trimmed(self, bench):
        log = bench(retain="1d")
        log.post("main", "one", "two")
        log.now.advance(2 * DAY)
        log.told()
        log.trim()
        assert log.told() == [("trimmed", "main", 3)]
        for after in (None, 0, 2):
            assert log.read("main", after) == Page([], first=3, head=2)
        log.trim()
        assert log.told() == []
        assert log.post("main", "three") == [3]
        assert [event[0] for event in log.told()] == ["appended"]
        assert log.read("main")[1:] == (3, 3)

    # Labels

    def test_a_post_with_a_label_is_kept_like_any_other(self, bench):
        log = bench()
        assert log.say("main", Post("ann", "hi", "c81f")) == [("posted", 1)]
        entry = Entry(1, "ann", "hi", "2026-01-01T00:00:00.000Z")
        assert log.told() == [("appended", "main", entry)]
        assert log.read("main") == Page([entry], first=1, head=1)

    def test_a_label_is_shown_to_nobody(self, bench):
        log = bench()
        log.say("main", Post("ann", "hi", "secret"), Post("ann", "hi", "secret"))
        assert Entry._fields == ("number", "username", "message", "timestamp")
        shown = repr([*log.told(), log.read("main"), log.read("main", after=0)])
        assert "ann" in shown
        assert "secret" not in shown

    def test_the_same_post_with_the_same_label_is_a_duplicate_of_the_first_however_often_it_comes(self, bench):
        log = bench()
        assert log.say("main", *[Post("ann", "hi", "l")] * 4) == [("posted", 1)] + [("duplicate", 1)] * 3
        assert log.texts("main") == ["hi"]
        assert log.say("main", Post("ann", "more", "m")) == [("posted", 2)]

    def test_a_follower_is_told_nothing_of_a_duplicate_or_a_reuse(self, bench):
        log = bench(retain="2")
        log.say("main", Post("ann", "hi", "l"))
        log.told()
        log.say("main", Post("ann", "hi", "l"), Post("ann", "else", "l"))
        assert log.told() == []

    def test_a_duplicate_changes_neither_the_message_nor_its_time(self, bench):
        log = bench()
        log.say("main", Post("ann", "hi", "l"))
        before = log.read("main")
        log.now.advance(60)
        assert log.say("main", Post("ann", "hi", "l"), Post("ann", "else", "l")) == [("duplicate", 1), REUSED]
        assert log.read("main") == before

    def test_a_duplicate_is_known_whatever_was_posted_since(self, bench):
        log = bench(seed=SEED)
        first = Post("ann", "hi", "l")
        said = [first, Post("ann", "hi"), Post("bob", "hi", "l"), Post("ann", "hi", "m"), Post("ann", "more")]
        assert log.say("main", *said) == [("posted", number) for number in range(3, 8)]
        assert log.say("main", first, said[3], said[2]) == [("duplicate", 3), ("duplicate", 6), ("duplicate", 5)]

    def test_a_duplicate_that_comes_while_the_first_is_not_yet_kept_is_one_too(self, bench):
        log = bench()
        before, twice = ("main", Post("bob", "before")), ("main", Post("ann", "hi", "l"))
        assert log.say_at_once(before, twice, twice, twice) == [("posted", 1), ("posted", 2)] + [("duplicate", 2)] * 2
        assert log.texts("main") == ["before", "hi"]
        assert [event[:2] for event in log.told()] == [("appended", "main")] * 2

    def test_the_same_label_with_another_message_is_refused_and_not_kept(self, bench):
        log = bench()
        first = Post("ann", "hi", "l")
        for other in ("hi ", "Hi", "h", "", "hi\0", "hi\n"):
            assert log.say("main", first, Post("ann", other, "l")) in (
                [("posted", 1), REUSED],
                [("duplicate", 1), REUSED],
            )
        assert log.texts("main") == ["hi"]
        assert log.say("main", first) == [("duplicate", 1)]  # it remains the first one's

    def test_a_refused_post_takes_no_number(self, bench):
        log = bench()
        said = [Post("ann", "hi", "l"), Post("ann", "else", "l"), Post("ann", "else", "m"), Post("ann", "else")]
        assert log.say("main", *said) == [("posted", 1), REUSED, ("posted", 2), ("posted", 3)]
        assert [entry.number for entry in log.read("main").entries] == [1, 2, 3]

    def test_a_reuse_that_comes_while_the_first_is_not_yet_kept_is_refused_too(self, bench):
        log = bench()
        said = [Post("bob", "before"), Post("ann", "hi", "l"), Post("ann", "else", "l"), Post("ann", "hi", "l")]
        outcomes = log.say_at_once(*[("main", post) for post in said])
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
    def test_a_label_is_one_users_in_one_room(self, bench, room, username, label):
        log = bench()
        first, other = ("main", Post("ann", "hi", "7")), (room, Post(username, "hi", label))
        number = 2 if room == "main" else 1
        assert log.say_at_once(first, other) == [("posted", 1), ("posted", number)]
        again = ("duplicate", number) if label else ("posted", 3)
        assert log.say_at_once(other, first) == [again, ("duplicate", 1)]

    def test_labels_differ_by_their_case(self, bench):
        log = bench()
        assert log.say("main", Post("ann", "hi", "c81f"), Post("ann", "ho", "C81F")) == [("posted", 1), ("posted", 2)]

    def test_usernames_that_only_look_equal_are_two(self, bench):
        log = bench()
        posts = [Post(name, "hi", "l") for name in ("é", "e\u0301", "e")]
        assert log.say("main", *posts) == [("posted", 1), ("posted", 2), ("posted", 3)]
        assert log.say("main", *posts) == [("duplicate", 1), ("duplicate", 2), ("duplicate", 3)]

    @pytest.mark.parametrize("mark", [*":;,.-_/|!#=\"'{}"])
    def test_a_room_a_username_and_a_label_are_never_taken_for_one_another(self, bench, mark):
        log = bench()
        posts = [
            Post(f"a{mark}b", "hi", "c"),
            Post("a", "hi", f"b{mark}c"),
            Post("a", "hi", f"{mark}b{mark}c"),
            Post(f"a{mark}b{mark}", "hi", "c"),
        ]
        assert log.say("main", *posts) == [("posted", number) for number in (1, 2, 3, 4)]
        assert log.say("main", *posts) == [("duplicate", number) for number in (1, 2, 3, 4)]
        for room, username in (("r", f"a{mark}b"), ("r-a", "b"), ("r_a", "b"), ("r", "a-b!"), ("r", "a_b!")):
            assert log.say(room, Post(username, "hi", "c"))[0][0] == "posted"

    @pytest.mark.parametrize(
        "text", ["'", '"', "%s", "'; --", "\\", "{}", "$1", ":label", "?", "[x]", "*", "~" * 30, "0", "null", "NaN"]
    )
    def test_any_username_and_any_label_are_taken_as_they_are(self, bench, text):
        log = bench()
        label = text.replace(" ", "_")
        posts = [Post(text, "hi", label), Post(text, "ho", f"{label}!"), Post(f"{text}!", "hi", label)]
        assert log.say("main", *posts) == [("posted", 1), ("posted", 2), ("posted", 3)]
        assert log.say("main", *posts) == [("duplicate", 1), ("duplicate", 2), ("duplicate", 3)]
        assert log.say("main", Post(text, "else", label)) == [REUSED]

    @pytest.mark.parametrize("username", ["a\0b", "\0", "😀" * 30, "\n", " ", "\x7f", "\u2028"])
    def test_the_longest_label_of_any_user_is_known_again(self, bench, username):
        log = bench()
        post = Post(username, "\0", "~" * 64)
        assert log.say("main", post, post, post._replace(label="~" * 63)) == [
            ("posted", 1),
            ("duplicate", 1),
            ("posted", 2),
        ]

    def test_posts_without_a_label_are_never_duplicates(self, bench):
        log = bench()
        same = Post("ann", "hi")
        assert log.say("main", same, same) == [("posted", 1), ("posted", 2)]
        assert log.say_at_once(*[("main", same)] * 3) == [("posted", 3), ("posted", 4), ("posted", 5)]
        assert log.say("main", Post("ann", "hi", "l"), same) == [("posted", 6), ("posted", 7)]

    def test_the_seed_has_no_labels(self, bench):
        log = bench(seed=SEED)
        assert log.say("main", Post("Alice", "Hello!", "l"), Post("Alice", "Hello!", "m")) == [
            ("posted", 3),
            ("posted", 4),
        ]

    def test_a_batch_of_new_posts_duplicates_and_reuses_in_several_rooms_is_told_to_each_poster_as_it_is(self, bench):
        log = bench()
        assert log.say("a", Post("ann", "old", "o"), Post("ann", "old", "p")) == [("posted", 1), ("posted", 2)]
        log.told()
        said = [
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
        assert log.say_at_once(*[(room, post) for room, post, _ in said]) == [outcome for *_, outcome in said]
        told = [(room, entry.number, entry.message) for _, room, entry in log.told()]
        new = [(room, number, post.message) for room, post, (what, number) in said if what == "posted"]
        for room, numbers in {"a": [1, 2, 3, 4, 5], "b": [1, 2], "c": [1, 2]}.items():
            assert [event for event in told if event[0] == room] == [event for event in new if event[0] == room]
            assert [entry.number for entry in log.read(room).entries] == numbers
        assert len(told) == len(new)

    def test_each_of_many_labels_in_one_batch_is_that_of_its_own_message(self, bench):
        log = bench()
        said = [("main", Post("ann", f"text {number}", f"l{number}" if number % 3 else None)) for number in range(600)]
        assert log.say_at_once(*said) == [("posted", number) for number in range(1, 601)]
        labelled = [(number, one) for number, one in enumerate(said, 1) if one[1].label]
        assert log.say_at_once(*[one for _, one in labelled]) == [("duplicate", number) for number, _ in labelled]
        assert log.read("main").head == 600

    def test_a_poster_may_retry_when_it_is_told(self, bench):
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

    def test_a_poster_is_told_of_a_duplicate_after_the_followers_of_the_first(self, bench):
        log = bench()
        poster = RecordingPoster(log.events)
        for post in (Post("bob", "before"), *[Post("ann", "hi", "l")] * 2):
            log.store.append("main", post, poster)
        self.wait(log.store.settled())
        told = [event for event in log.told() if event[1] != Post("bob", "before")]
        assert told.index(("appended", "main", log.read("main").entries[1])) < told.index(
            ("duplicate", Post("ann", "hi", "l"), 2)
        )

    def test_a_label_is_forgotten_with_its_message_and_may_be_used_again(self, bench):
        log = bench(retain="2")
        posts = [Post("ann", text, text) for text in "abc"]
        log.say("main", *posts)
        assert log.say("main", posts[1], posts[2]) == [("duplicate", 2), ("duplicate", 3)]
        assert log.say("main", Post("ann", "else", "a")) == [("posted", 4)]
        # It is that of the new message now.
        assert log.say("main", Post("ann", "else", "a"), posts[0]) == [("duplicate", 4), REUSED]
        assert log.texts("main") == ["c", "else"]

    def test_a_label_is_kept_while_other_messages_are_trimmed(self, bench):
        log = bench(retain="3")
        log.say("main", Post("ann", "a"), Post("ann", "b", "b"))
        log.say("main", *[Post("bob", text) for text in "cd"])
        assert log.read("main").first == 2
        assert log.say("main", Post("ann", "b", "b")) == [("duplicate", 2)]
        log.say("main", Post("bob", "e"))
        assert log.say("main", Post("ann", "b", "b")) == [("posted", 6)]

    def test_the_same_labels_of_other_users_and_rooms_are_kept_when_one_is_forgotten(self, bench):
        log = bench(retain="2")
        log.say("other", Post("ann", "hi", "l"))
        log.say("main", Post("ann", "hi", "l"), Post("bob", "hi", "l"), Post("ann", "more"))
        assert log.say("main", Post("bob", "hi", "l")) == [("duplicate", 2)]
        assert log.say("other", Post("ann", "hi", "l")) == [("duplicate", 1)]
        assert log.say("main", Post("ann", "hi", "l")) == [("posted", 4)]

    def test_duplicates_and_reuses_push_nothing_out(self, bench):
        log = bench(retain="2")
        log.post("main", "before")
        log.say("main", *[Post("ann", "hi", "l")] * 5, *[Post("ann", "else", "l")] * 5)
        assert log.texts("main") == ["before", "hi"]

    def test_a_label_is_forgotten_when_its_message_is_too_old_and_trimmed(self, bench):
        log = bench(retain="2d")
        old, young = Post("ann", "hi", "old"), Post("ann", "hi", "young")
        log.say("main", old)
        log.now.advance(DAY)
        log.say("main", young)
        log.now.advance(DAY)
        assert log.say("main", old) == [("duplicate", 1)]  # two days old to the second, and not older
        log.now.advance(1)
        log.trim()
        assert log.say("main", Post("ann", "else", "old"), young) == [("posted", 3), ("duplicate", 2)]

    def test_what_is_posted_next_makes_the_label_of_a_message_too_old_free(self, bench):
        log = bench(retain="1d")
        log.say("main", Post("ann", "hi", "l"))
        log.now.advance(DAY + 1)
        log.post("main", "next")
        assert log.say("main", Post("ann", "else", "l")) == [("posted", 3)]

    def test_a_retry_alone_trims_nothing(self, bench):
        log = bench(retain="1d")
        log.say("main", Post("ann", "hi", "l"), Post("ann", "more"))
        log.now.advance(DAY + 1)
        log.told()
        # Whatever is too old by now: the message is there, and so is its label, until something is trimmed.
        for _ in range(2):
            assert log.say("main", Post("ann", "hi", "l"), Post("ann", "else", "l")) == [("duplicate", 1), REUSED]
        assert log.told() == []
        assert log.read("main").first == 1
        log.trim()
        assert log.told() == [("trimmed", "main", 3)]
        assert log.say("main", Post("ann", "hi", "l")) == [("posted", 3)]

    def test_all_labels_are_forgotten_when_everything_was_trimmed(self, bench):
        log = bench(retain="1d")
        posts = [Post("ann", text, text) for text in "abc"]
        log.say("main", *posts)
        log.now.advance(2 * DAY)
        log.trim()
        assert log.say("main", *posts) == [("posted", 4), ("posted", 5), ("posted", 6)]

    # Giving up

    def test_what_is_given_up_is_told_once_and_said_again_is_in_the_log_once(self, bench):
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
        for posted, poster in zip(log.say_at_once(*posts), posters, strict=True):
            if poster.numbers:
                assert posted == ("duplicate", *poster.numbers)
            assert posted[0] in ("duplicate", "posted")
        assert log.texts("main")[1:] == log.texts("other") == ["0", "1", "2"]
        told = [(room, entry.number) for what, room, entry in log.told() if what == "appended"]
        assert sorted(told) == [("main", 1), *(("main", n) for n in (2, 3, 4)), *(("other", n) for n in (1, 2, 3))]

    def test_nothing_that_is_in_the_log_is_given_up_and_what_comes_after_is_kept(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "one"), poster)
        self.wait(log.store.settled())
        log.store.abandon()
        assert poster.numbers == [1]
        assert poster.refusals == []
        assert log.post("main", "two", "three") == [2, 3]

    def test_a_log_that_was_given_up_can_be_closed(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "one"), poster)
        log.store.abandon()
        self.wait(log.store.close())
        assert len(poster.events) == 1

    # All of it at once, against a list

    rooms = st.sampled_from(["main", "a", "b"])
    operations = st.lists(
        st.tuples(st.just("post"), rooms)
        | st.tuples(st.just("post"), rooms)
        | st.tuples(st.just("pass"), st.sampled_from([1, 60, DAY // 2, DAY, 3 * DAY, -60, -2 * DAY]))
        | st.tuples(st.just("trim"), st.none())
        | st.tuples(st.just("read"), st.tuples(rooms, st.none() | st.integers(0, 12), st.integers(1, 6))),
        max_size=40,
    )

    def test_a_store_is_a_list_for_each_room_however_it_is_used(self, make):
        # Written inside, since each store's class is to have examples of its own.
        @settings(REPEATABLE, max_examples=40)
        @given(st.sampled_from(["all", "1", "3", "1d", "2d"]), st.sampled_from([(), SEED]), self.operations)
        def check(retain, seed, steps):
            log = Bench(make, self.wait, Retention.parse(retain), seed)
            model = Model(Retention.parse(retain), seed, log.now)
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
            # Who followed knows what is in the log, and so needs never to read what it was told.
            for room in ("main", "a", "b"):
                followed = before if room == "main" else []
                for event, where, what in log.events:
                    if where == room:
                        followed = (
                            [*followed, what] if event == "appended" else [e for e in followed if e.number >= what]
                        )
                assert followed == log.read(room).entries
                stamps = [entry.timestamp for entry in followed if entry not in SEED]
                assert stamps == sorted(stamps)
            self.wait(log.store.close())

        check()

    posts = st.builds(
        Post, st.sampled_from(["ann", "bob"]), st.sampled_from(["hi", "ho"]), st.sampled_from([None, "l", "m"])
    )
    label_steps = (
        st.tuples(st.just("say"), st.lists(st.tuples(st.sampled_from(["main", "a"]), posts), min_size=1, max_size=6))
        | st.tuples(st.just("say"), st.lists(st.tuples(st.just("main"), posts), min_size=1, max_size=6))
        | st.tuples(st.just("again"), st.none())
        | st.tuples(st.just("pass"), st.sampled_from([1, DAY // 2, DAY, 3 * DAY]))
        | st.tuples(st.just("trim"), st.none())
    )

    def check_labels(self, make, steps, again=None):
        @settings(REPEATABLE, max_examples=60)
        @given(st.sampled_from(["all", "1", "2", "4", "1d"]), st.lists(steps, max_size=20))
        def check(retain, steps):
            log = Bench(make, self.wait, Retention.parse(retain), SEED)
            model = Model(Retention.parse(retain), SEED, log.now, gathers=self.gathers)
            said = []
            for step, what in steps:
                if step in ("say", "again"):
                    said = what or said
                    assert log.say_at_once(*said) == model.say_at_once(*said)
                elif step == "pass":
                    log.now.advance(what)
                elif step == "trim":
                    log.trim()
                    model.trim()
                else:
                    log.reopen(again, retain)
                    model.trim()
            for room in ("main", "a"):
                page, expected = log.read(room), model.read(room, None, 100)
                assert [entry[:3] for entry in page.entries] == [entry[:3] for entry in expected.entries]
                assert page[1:] == expected[1:]
            self.wait(log.store.close())

        check()

    def test_every_label_is_known_while_its_message_is_kept_however_they_are_used(self, make):
        self.check_labels(make, self.label_steps)


class DurableStoreContract(StoreContract):
    @pytest.fixture
    def again(self):
        """What makes a new store, over the log of one that is closed, of that one, a Retention and a clock."""
        raise NotImplementedError

    def test_labels_outlive_the_process(self, bench, again):
        log = bench()
        first = Post("ann", "hi", "l")
        log.say("main", first)
        log.say("other", first, Post("bob", "hi", "l"))
        log.told()
        log.reopen(again)
        assert log.say("main", first, Post("ann", "else", "l"), Post("bob", "hi", "l")) == [
            ("duplicate", 1),
            REUSED,
            ("posted", 2),
        ]
        log.reopen(again)
        assert log.say("other", Post("bob", "hi", "l"), Post("bob", "hi", "m")) == [("duplicate", 2), ("posted", 3)]

    def test_what_is_trimmed_when_the_log_is_opened_again_frees_its_labels(self, bench, again):
        log = bench()
        posts = [Post("ann", text, text) for text in "abc"]
        log.say("main", *posts)
        log.reopen(again, "2")
        assert log.say("main", posts[1], posts[2]) == [("duplicate", 2), ("duplicate", 3)]
        assert log.say("main", Post("ann", "else", "a")) == [("posted", 4)]

    def test_every_label_is_known_while_its_message_is_kept_however_they_are_used(self, make, again):
        self.check_labels(make, self.label_steps | st.tuples(st.just("reopen"), st.none()), again)


class Model:
    """A log as simple as it can be: what was ever appended, and a number below which it is forgotten."""

    def __init__(self, retain, seed, now, *, gathers=False):
        self.gathers = gathers
        self.labels = {}
        self.retain = retain
        self.now = now
        self.rooms = {"main": [*seed]}
        self.firsts = {}
        self.newest = max((entry.timestamp for entry in seed), default="")
        self.trim()

    def post(self, room, text):
        ((_, number),) = self.say_at_once((room, Post("ann", text)))
        return number

    def say_at_once(self, *said):
        commits = (said[:1], said[1:]) if self.gathers else ((one,) for one in said)
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
        entries.append(Entry(len(entries) + 1, post.username, post.message, self.newest))
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
        if self.retain.seconds:
            oldest = timestamp(self.now() - self.retain.seconds)
            first = max(first, *(e.number + 1 for e in entries if e.timestamp < oldest), 1)
        self.firsts[room] = first

    def read(self, room, after, limit):
        entries, first = self.rooms.get(room, []), self.firsts.get(room, 1)
        kept = entries[first - 1 :]
        chosen = kept[-limit:] if after is None else [entry for entry in kept if entry.number > after][:limit]
        return Page(chosen, first, len(entries))
