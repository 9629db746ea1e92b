import gc
import tracemalloc
from functools import partial

import pytest
from support.helpers import ManualTime, RecordingPoster, result_of
from support.store_contract import SEED, ClockContract, EditContract, ExtraContract, GuardContract

from chatd.messages import Post
from chatd.room.cursors import Behind
from chatd.room.log import Page
from chatd.store import memory
from chatd.store.base import DAY, Retention
from chatd.store.memory import MemoryStore


def growth(work):
    """Return by how many bytes memory grows when work for 1,000 names is repeated under others.

    What Python itself keeps meanwhile is some 10,000 bytes.  Now and then it also enlarges a table that other code has
    filled, which counts as a whole.  So the smallest of three measurements counts: a leak is in all of them.
    """
    work("warm-up")
    return min(_grown(partial(work, name)) for name in ("first", "second", "third"))


def _grown(work):
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        work()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


class TestMemoryStore(ClockContract, EditContract, ExtraContract, GuardContract):
    @pytest.fixture
    def make(self):
        return lambda retain, now: MemoryStore(retain, now, now.steady)

    def test_messages_are_lost_with_the_store(self, bench):
        first = bench(seed=SEED)
        first.post("main", "hi")
        second = bench(seed=SEED)
        assert second.read("main").head == 2
        assert second.store.epoch != first.store.epoch

    def test_append_completes_at_once(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "hi"), poster)
        assert poster.numbers == [1]
        assert log.new_events()

    def test_reading_a_room_takes_no_memory(self, bench):
        """Clients cannot fill the memory by reading many rooms."""
        log = bench()

        def read_rooms(kind):
            for number in range(1000):
                log.read(f"{kind}{number}")

        assert growth(read_rooms) < 50_000

    def test_always_settled(self, bench):
        assert result_of(bench().store.settled()) is None

    def test_abandon_has_no_effect(self, bench):
        log = bench()
        poster = RecordingPoster()
        log.store.append("main", Post("ann", "hi"), poster)
        log.store.abandon()
        assert [event[0] for event in poster.events] == ["posted"]

    def test_usage_counts_messages(self, bench):
        log = bench()
        before = log.store.usage()["messages"]
        log.post("main", "hi", "ho")
        log.post("other", "hi")
        assert log.store.usage() == {"messages": before + 3}

    def test_never_at_fault(self, bench):
        log = bench()
        log.post("main", "hi")
        assert log.store.fault is None

    def test_default_number_of_messages(self):
        assert memory.KEEP == 10_000

    @pytest.mark.parametrize("retain", ["all", "30d"])
    def test_memory_of_a_room_is_bounded(self, bench, monkeypatch, retain):
        monkeypatch.setattr(memory, "KEEP", 3)
        log = bench(retain=retain)
        log.post("main", *"abcde")
        assert log.texts("main") == [*"cde"]
        assert log.new_events()[-1] == ("trimmed", "main", 3)

    @pytest.mark.parametrize("retain", ["3", "1d"])
    def test_labels_are_dropped_with_their_messages(self, retain):
        """The memory for labels is bounded by the number of messages kept."""
        now, poster = ManualTime(), RecordingPoster()
        store = MemoryStore(Retention.parse(retain), now)
        store.open(())

        def post_labelled(kind):
            for number in range(1000):
                store.append("main", Post("ann", "hi", f"{kind}{number}"), poster)
                now.advance(DAY / 3)
                poster.events.clear()

        assert growth(post_labelled) < 50_000

    def test_retention_may_exceed_the_default(self, monkeypatch):
        monkeypatch.setattr(memory, "KEEP", 3)
        store = MemoryStore(Retention(messages=5), ManualTime())
        store.open(())
        for text in "abcdef":
            store.append("main", Post("ann", text), RecordingPoster())
        assert result_of(store.read("main", None, 100))[1:] == (2, 6)

    def test_room_with_only_old_messages(self, bench):
        log = bench(retain="1d")
        log.post("main", *"abc")
        log.now.advance(DAY + 1)
        log.post("main", "d")
        assert log.texts("main") == ["d"]
        assert log.new_events()[-1] == ("trimmed", "main", 4)

    def test_number_of_rooms_is_bounded(self, bench, monkeypatch):
        """A post to one room too many is refused and is a fault; other rooms go on."""
        monkeypatch.setattr(memory, "MAX_ROOMS", 2)
        log, poster = bench(), RecordingPoster()
        log.post("a", "hi")
        log.post("b", "hi")
        log.store.append("c", Post("ann", "hi"), poster)
        assert poster.refusals == [log.store.fault] == ["memory: holds 2 rooms, and no more: use --store sqlite:PATH"]
        assert log.post("a", "ho") == [2]
        log.trim()
        assert log.store.fault is not None

    def test_rooms_without_messages_are_forgotten(self, bench, monkeypatch):
        """A room that has lost its messages makes place for another, and no number is used twice."""
        monkeypatch.setattr(memory, "MAX_ROOMS", 2)
        log, poster = bench(retain="1d"), RecordingPoster()
        log.post("a", *"123")
        log.now.advance(DAY / 2)
        log.post("b", "1")
        log.store.append("c", Post("ann", "hi"), poster)
        assert log.store.fault
        log.now.advance(DAY / 2 + 1)
        log.trim()
        assert log.store.fault is None
        log.new_events()
        assert log.post("c", "1", "2") == [4, 5]
        assert log.new_events()[0] == ("interrupted",)
        assert log.read("a") == Page([], first=4, head=3)
        assert log.read("c")[1:] == (4, 5)
        assert log.texts("b") == ["1"]
        log.store.append("a", Post("ann", "hi"), poster)
        assert len(poster.refusals) == 2
        log.now.advance(DAY + 1)
        log.trim()
        assert log.post("a", "again") == [6]

    def test_forgotten_room_has_no_cursor(self, bench, monkeypatch):
        """A room of the same name begins again, and its numbers go on."""
        monkeypatch.setattr(memory, "MAX_ROOMS", 1)
        log = bench()
        log.claim()
        log.post("a", "1", "2")
        log.advance(a=2)
        self.wait(log.store.clear_room("a"))
        log.post("b", "3")
        assert log.cursor("a") == 0
        assert log.behind() == [Behind("b", 0, 3)]

    def test_bound_of_rooms(self):
        assert memory.MAX_ROOMS == 10_000
