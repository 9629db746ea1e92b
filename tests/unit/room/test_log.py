"""Page ranges: the entries that a reader wants, and those that a log holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE

from chatd.room.log import EncodedPage, PageRange, UnknownId

WHOLE = (1, 10)
TRIMMED = (5, 10)
EMPTIED = (11, 10)
NEW = (1, 0)


def newest(limit):
    return PageRange(None, None, limit)


def before(number, limit=3):
    return PageRange(number, None, limit)


def after(number, limit=3):
    return PageRange(None, number, limit)


def read(wanted, log):
    """Return the numbers of a page, its end, and the flags for older and newer entries."""

    def between(begin, until):
        assert log[0] - 1 <= begin or begin == until
        assert until <= log[1]
        return [*range(begin + 1, until + 1)]

    frames, end, older, newer = wanted.encode(*log, between)
    return frames, end, older, newer


@pytest.mark.parametrize(
    ("wanted", "log", "page"),
    [
        (newest(3), WHOLE, ([8, 9, 10], 10, True, False)),
        (newest(10), WHOLE, ([*range(1, 11)], 10, False, False)),
        (newest(9), WHOLE, ([*range(2, 11)], 10, True, False)),
        (newest(99), TRIMMED, ([5, 6, 7, 8, 9, 10], 10, False, False)),
        (newest(3), EMPTIED, ([], 10, False, False)),
        (newest(3), NEW, ([], 0, False, False)),
        (before(8), WHOLE, ([5, 6, 7], 7, True, True)),
        (before(4), WHOLE, ([1, 2, 3], 3, False, True)),
        (before(3), WHOLE, ([1, 2], 2, False, True)),
        (before(2), WHOLE, ([1], 1, False, True)),
        (before(10), WHOLE, ([7, 8, 9], 9, True, True)),
        (before(8), TRIMMED, ([5, 6, 7], 7, False, True)),
        (before(7), TRIMMED, ([5, 6], 6, False, True)),
        (before(9), TRIMMED, ([6, 7, 8], 8, True, True)),
        (after(0), WHOLE, ([1, 2, 3], 3, False, True)),
        (after(3), WHOLE, ([4, 5, 6], 6, True, True)),
        (after(7), WHOLE, ([8, 9, 10], 10, True, False)),
        (after(8), WHOLE, ([9, 10], 10, True, False)),
        (after(4), TRIMMED, ([5, 6, 7], 7, False, True)),
        (after(5), TRIMMED, ([6, 7, 8], 8, True, True)),
        (after(3, 1), WHOLE, ([4], 4, True, True)),
    ],
)
def test_page_newest_before_and_after(wanted, log, page):
    assert read(wanted, log) == page


@pytest.mark.parametrize(
    ("wanted", "log", "page"),
    [
        # Before the first entry the page is empty, whatever the number.
        (before(0), WHOLE, ([], 0, False, True)),
        (before(1), WHOLE, ([], 0, False, True)),
        (before(0), NEW, ([], 0, False, False)),
        (before(1), NEW, ([], 0, False, False)),
        # After the newest entry the page is empty, and ends there.
        (after(10), WHOLE, ([], 10, True, False)),
        (after(10), EMPTIED, ([], 10, False, False)),
        (after(0), NEW, ([], 0, False, False)),
        # The number of the first stored entry, and earlier ones.
        (before(5), TRIMMED, ([], 4, False, True)),
        (before(3), TRIMMED, ([], 2, False, True)),
        (before(0), TRIMMED, ([], 0, False, True)),
        (before(5), EMPTIED, ([], 4, False, False)),
        (before(11), EMPTIED, ([], 10, False, False)),
        # The page begins with the oldest stored entry.
        (after(0), EMPTIED, ([], 10, False, False)),
        (after(5), EMPTIED, ([], 10, False, False)),
    ],
)
def test_empty_page_end(wanted, log, page):
    """An empty page ends at the number before the place of its first entry."""
    assert read(wanted, log) == page


@pytest.mark.parametrize("log", [WHOLE, TRIMMED, NEW])
def test_page_before_next_number(log):
    """A page may end before the number after the head, but no later number is known."""
    _, head = log
    assert read(before(head + 1, 99), log) == read(newest(99), log)
    with pytest.raises(UnknownId):
        read(before(head + 2), log)


@pytest.mark.parametrize("log", [WHOLE, TRIMMED, EMPTIED, NEW])
def test_page_after_unknown_number(log):
    """A page after the head is empty; a page after a later number is an error."""
    _, head = log
    assert read(after(head), log)[:2] == ([], head)
    for number in (head + 1, head + 2, 10**15):
        with pytest.raises(UnknownId):
            read(after(number), log)


@pytest.mark.parametrize("wanted", [newest(3), before(8), after(3)])
def test_encode_asks_for_bounds(wanted):
    """The frames of a page are exactly those between its bounds."""
    asked = []

    def between(begin, until):
        asked.append((begin, until))
        return [b"some", b"frames"]

    begin, until = wanted.bounds(1, 10)
    assert wanted.encode(1, 10, between) == EncodedPage([b"some", b"frames"], until, older=begin >= 1, newer=until < 10)
    assert asked == [(begin, until)]


@REPEATABLE
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.none() | st.integers(0, 25),
    st.none() | st.integers(0, 25),
    st.integers(1, 9),
)
def test_page_matches_full_scan(head, trimmed, number, other, limit):
    kept = [*range(min(trimmed, head) + 1, head + 1)]
    wanted = PageRange(number, other if number is None else None, limit)
    log = min(trimmed, head) + 1, head
    if wanted.after is not None:
        expected, known = [n for n in kept if n > wanted.after][:limit], wanted.after <= head
    else:
        expected = [n for n in kept if wanted.before is None or n < wanted.before][-limit:]
        known = wanted.before is None or wanted.before <= head + 1
    if not known:
        with pytest.raises(UnknownId):
            read(wanted, log)
        return
    frames, end, older, newer = read(wanted, log)
    assert frames == expected
    assert end == (expected[-1] if expected else head if wanted.before is None else max(wanted.before - 1, 0))
    begin = end - len(expected)
    assert (older, newer) == (any(n <= begin for n in kept), any(n > end for n in kept))


@REPEATABLE
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.none() | st.integers(0, 25),
    st.none() | st.integers(0, 25),
    st.integers(1, 9),
)
def test_read_from_start_covers_range(head, trimmed, number, other, limit):
    """One read of the log from `start` holds the whole range."""
    wanted = PageRange(number, other if number is None else None, limit)
    first = min(trimmed, head) + 1
    kept = range(first, head + 1)
    page = [*kept][-limit:] if wanted.start is None else [n for n in kept if n > wanted.start][:limit]
    try:
        begin, until = wanted.bounds(first, head)
    except UnknownId:
        return
    assert [n for n in page if begin < n <= until] == [*range(begin + 1, until + 1)]
