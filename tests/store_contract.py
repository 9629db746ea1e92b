"""What every store must do: one body of tests, run over each of them.

A store's test module subclasses StoreContract and gives `make`; one that needs a reactor overrides
`wait` too.  Nothing here knows where a store keeps its messages.
"""

import re

import pytest
from helpers import NEW_YEAR, REPEATABLE, ManualTime, RecordingFollower, RecordingPoster, result_of
from hypothesis import given, settings
from hypothesis import strategies as st

from chatd.frames import Entry, Post
from chatd.rooms import Page
from chatd.store.base import DAY, Retention, timestamp

SEED = (
    Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
    Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
)
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Bench:
    """A store that is open, the time, one who follows it, and one who posts."""

    def __init__(self, make, wait, retain, seed):
        self.wait = wait
        self.now = ManualTime()
        self.store = make(retain, self.now)
        self.store.open(seed)
        self.events = []
        self.store.tail(RecordingFollower(self.events))

    def post(self, room, *texts):
        """Post texts one after the other; answers their numbers."""
        poster = RecordingPoster()
        for text in texts:
            self.store.append(room, Post("ann", text), poster)
            self.wait(self.store.settled())
        assert poster.refusals == []
        return poster.numbers

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
        log.store.tail(second)
        log.told()
        for room in "abcabcabc":
            log.post(room, "hi")
        told = log.told()
        assert second.events == told  # and not of what was before
        assert len([event for event in told if event[0] == "appended"]) == 9

    def test_a_log_that_nobody_follows_keeps_what_is_posted(self, make):
        store = make(Retention(), ManualTime())
        store.open(())
        poster = RecordingPoster()
        store.append("main", Post("ann", "hi"), poster)
        self.wait(store.settled())
        assert poster.numbers == [1]
        assert self.wait(store.read("main", None, 10)).head == 1
        self.wait(store.close())

    def test_a_poster_may_post_again_when_it_is_told(self, bench):
        log = bench()

        class Insistent(RecordingPoster):
            def posted(self, post, number):
                super().posted(post, number)
                if number < 5:
                    log.store.append("main", post, self)

        poster = Insistent()
        log.store.append("main", Post("ann", "again"), poster)
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


class Model:
    """A log as simple as it can be: what was ever appended, and a number below which it is forgotten."""

    def __init__(self, retain, seed, now):
        self.retain = retain
        self.now = now
        self.rooms = {"main": [*seed]}
        self.firsts = {}
        self.newest = max((entry.timestamp for entry in seed), default="")
        self.trim()

    def post(self, room, text):
        entries = self.rooms.setdefault(room, [])
        self.newest = max(self.newest, timestamp(self.now()))
        entries.append(Entry(len(entries) + 1, "ann", text, self.newest))
        self._trim(room)
        return len(entries)

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
