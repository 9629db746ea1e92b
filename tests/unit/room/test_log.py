"""Which messages a reader wants, and which of them a log has."""

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


def read(span, log):
    """The numbers, the end, and what there is before and after, of the excerpt from a log of first and head."""

    def between(begin, until):
        assert log[0] - 1 <= begin or begin == until
        assert until <= log[1]
        return [*range(begin + 1, until + 1)]

    frames, end, older, newer = span.encode(*log, between)
    return frames, end, older, newer


@pytest.mark.parametrize(
    ("span", "log", "excerpt"),
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
def test_a_page_is_of_the_newest_or_of_those_before_or_after_a_number(span, log, excerpt):
    assert read(span, log) == excerpt


@pytest.mark.parametrize(
    ("span", "log", "excerpt"),
    [
        # Before the first there is nothing, whatever is named.
        (before(0), WHOLE, ([], 0, False, True)),
        (before(1), WHOLE, ([], 0, False, True)),
        (before(0), NEW, ([], 0, False, False)),
        (before(1), NEW, ([], 0, False, False)),
        # After the newest there is nothing yet; what follows it will follow the page.
        (after(10), WHOLE, ([], 10, True, False)),
        (after(10), EMPTIED, ([], 10, False, False)),
        (after(0), NEW, ([], 0, False, False)),
        # The number before which nothing is kept any more.
        (before(5), TRIMMED, ([], 4, False, True)),
        (before(3), TRIMMED, ([], 2, False, True)),
        (before(0), TRIMMED, ([], 0, False, True)),
        (before(5), EMPTIED, ([], 4, False, False)),
        (before(11), EMPTIED, ([], 10, False, False)),
        # The entries after it begin with the oldest kept.
        (after(0), EMPTIED, ([], 10, False, False)),
        (after(5), EMPTIED, ([], 10, False, False)),
    ],
)
def test_the_number_of_an_empty_page_is_the_one_before_where_its_first_entry_would_be(span, log, excerpt):
    assert read(span, log) == excerpt


@pytest.mark.parametrize("log", [WHOLE, TRIMMED, NEW])
def test_the_next_message_may_be_named_as_the_end_of_a_page_but_none_beyond_it(log):
    _, head = log
    assert read(before(head + 1, 99), log) == read(newest(99), log)
    with pytest.raises(UnknownId):
        read(before(head + 2), log)


@pytest.mark.parametrize("log", [WHOLE, TRIMMED, EMPTIED, NEW])
def test_nothing_comes_after_a_message_that_there_is_not(log):
    _, head = log
    assert read(after(head), log)[:2] == ([], head)
    for number in (head + 1, head + 2, 10**15):
        with pytest.raises(UnknownId):
            read(after(number), log)


@pytest.mark.parametrize("span", [newest(3), before(8), after(3)])
def test_an_excerpt_takes_what_the_keeper_has_between_the_bounds(span):
    asked = []

    def between(begin, until):
        asked.append((begin, until))
        return [b"what", b"it", b"has"]

    begin, until = span.bounds(1, 10)
    assert span.encode(1, 10, between) == EncodedPage(
        [b"what", b"it", b"has"], until, older=begin >= 1, newer=until < 10
    )
    assert asked == [(begin, until)]


@REPEATABLE
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.none() | st.integers(0, 25),
    st.none() | st.integers(0, 25),
    st.integers(1, 9),
)
def test_a_page_is_what_a_look_through_the_whole_log_finds(head, trimmed, number, other, limit):
    kept = [*range(min(trimmed, head) + 1, head + 1)]
    span = PageRange(number, other if number is None else None, limit)
    log = min(trimmed, head) + 1, head
    if span.after is not None:
        expected, known = [n for n in kept if n > span.after][:limit], span.after <= head
    else:
        expected = [n for n in kept if span.before is None or n < span.before][-limit:]
        known = span.before is None or span.before <= head + 1
    if not known:
        with pytest.raises(UnknownId):
            read(span, log)
        return
    frames, end, older, newer = read(span, log)
    assert frames == expected
    assert end == (expected[-1] if expected else head if span.before is None else max(span.before - 1, 0))
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
def test_a_log_that_is_read_from_the_start_of_a_span_answers_all_of_it(head, trimmed, number, other, limit):
    span = PageRange(number, other if number is None else None, limit)
    first = min(trimmed, head) + 1
    kept = range(first, head + 1)
    page = [*kept][-limit:] if span.start is None else [n for n in kept if n > span.start][:limit]
    try:
        begin, until = span.bounds(first, head)
    except UnknownId:
        return
    assert [n for n in page if begin < n <= until] == [*range(begin + 1, until + 1)]
