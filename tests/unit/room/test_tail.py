"""Tails and runs: the newest frames, bounded, and joined pieces that can be cut anywhere."""

from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE

from chatd.messages import Entry
from chatd.room import tail
from chatd.room.tail import RUN_BYTES, RUN_FRAMES, Run, Tail
from chatd.transport.frames import event, message_frame

FRAMES = st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=9)

# A run


def test_run_joins_frames():
    assert Run.of(7, [b"aa", b"bbb", b"c"]) == Run(b"aabbbc", 6, 10, [b"aa", b"bbb", b"c"])


def test_run_cut_finds_frame():
    run = Run.of(7, [b"aa", b"bbb", b"c"])
    assert [run.cut(taken) for taken in range(6)] == [
        (8, b"aa"),
        (8, b"a"),
        (9, b"bbb"),
        (9, b"bb"),
        (9, b"b"),
        (10, b"c"),
    ]


@REPEATABLE
@given(FRAMES, st.integers(0, 5), st.data())
def test_run_cut_keeps_frames_whole(frames, after, data):
    """The bytes taken and the rest are whole frames up to the one that was cut."""
    run = Run.of(after, frames)
    taken = data.draw(st.integers(0, run.size - 1))
    number, rest = run.cut(taken)
    assert run.data[:taken] + rest == b"".join(frames[: number - after])
    assert len(rest) <= len(frames[number - after - 1])


def test_run_is_bounded_but_never_empty(monkeypatch):
    monkeypatch.setattr(tail, "RUN_BYTES", 5)
    assert Run.of(0, [b"aa", b"bbb", b"c"]) == Run(b"aabbb", 5, 2, [b"aa", b"bbb"])
    assert Run.of(0, [b"aa", b"bbbb", b"c"]) == Run(b"aa", 2, 1, [b"aa"])
    assert Run.of(0, [b"a" * 6, b"b"]) == Run(b"a" * 6, 6, 1, [b"a" * 6])


def test_run_frames_exceed_run_bytes():
    """RUN_FRAMES of the shortest frames fill a run."""
    shortest = message_frame("abcd", Entry(1, "a", "m", "2024-10-20T12:30:00Z"))
    for frame in (shortest, event(shortest)):
        assert len(Run.of(0, [frame] * RUN_FRAMES).pieces) < RUN_FRAMES
        assert RUN_BYTES - len(frame) < Run.of(0, [frame] * RUN_FRAMES).size <= RUN_BYTES


# The tail


def test_empty_tail_has_head():
    assert [Tail(7, 4).head, Tail(7, 4).first, Tail(7, 4).between(7, 7)] == [7, 8, []]


@given(st.lists(FRAMES, max_size=9), st.integers(0, 9), st.data())
@REPEATABLE
def test_tail_returns_frames_by_number(batches, head, data):
    held = Tail(head, 100)
    for batch in batches:
        held.extend(batch)
    frames = [frame for batch in batches for frame in batch]
    assert [held.first, held.head] == [head + 1, head + len(frames)]
    after = data.draw(st.integers(head, held.head))
    until = data.draw(st.integers(after, held.head))
    assert held.between(after, until) == frames[after - head : until - head]


def test_tail_drops_oldest_but_keeps_history(monkeypatch):
    monkeypatch.setattr(tail, "TAIL_BYTES", 100)
    held = Tail(0, 4)
    for number in range(1, 101):
        held.extend([b"%030d" % number])
        assert held.head == number
        kept = held.between(held.first - 1, held.head)
        assert [int(frame) for frame in kept] == [*range(held.first, number + 1)]
        assert min(number, 4) <= len(kept) <= 9


def test_tail_of_long_frames_keeps_history(monkeypatch):
    monkeypatch.setattr(tail, "TAIL_BYTES", 10)
    held = Tail(0, 4)
    held.extend([b"x" * 30] * 8)
    assert held.first == 1
    held.extend([b"x" * 30])
    assert [held.head, held.first] == [9, 4]


def test_tail_drops_oversized_batch(monkeypatch):
    monkeypatch.setattr(tail, "TAIL_BYTES", 100)
    held = Tail(0, 4)
    held.extend([b"x" * 30] * 1000)
    assert held.head == 1000
    assert len(held.between(held.first - 1, held.head)) <= 9
