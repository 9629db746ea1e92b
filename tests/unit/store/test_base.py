import re

import pytest
from support.helpers import NEW_YEAR, ManualTime, RecordingPoster

from chatd.messages import Post
from chatd.room.log import LabelReused
from chatd.store.base import DAY, Retention, Stamp, answer_retry, instant, new_epoch, timestamp


def test_retain_all():
    assert Retention.parse("all") == Retention(None, None) == Retention()


@pytest.mark.parametrize("messages", [1, 5000, 999_999_999_999])
def test_retain_messages(messages):
    assert Retention.parse(str(messages)) == Retention(messages=messages)


@pytest.mark.parametrize("days", [1, 30, 99_999])
def test_retain_days(days):
    assert Retention.parse(f"{days}d") == Retention(seconds=days * 86_400)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0d", "-1", "+1", "1.5", "05", "d", "30 d", " 30", "30\n", "30h", "30D", "ALL", "1e3", "1_000", "1٣"],
)
def test_invalid_retention_is_named(text):
    with pytest.raises(ValueError, match=re.escape(f"{text!r} is neither a number of messages (5000)")):
        Retention.parse(text)


def test_retention_before_the_calendar():
    # Else the first message would fail, since the oldest time to keep could not be written.
    assert timestamp(NEW_YEAR - Retention.parse("99999d").seconds).startswith("1752-")
    with pytest.raises(ValueError, match="neither"):
        Retention.parse("100000d")
    with pytest.raises(ValueError, match="neither"):
        Retention.parse("1000000000000")


def test_day_has_86400_seconds():
    assert DAY == 24 * 60 * 60


def test_epochs_are_short_and_distinct():
    epochs = [new_epoch() for _ in range(1000)]
    assert all(re.fullmatch("[0-9A-Za-z]{4,16}", epoch) for epoch in epochs)
    assert len({*epochs}) == 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (NEW_YEAR, "2026-01-01T00:00:00.000Z"),
        (NEW_YEAR + 0.5, "2026-01-01T00:00:00.500Z"),
        (NEW_YEAR - 0.0001, "2025-12-31T23:59:59.999Z"),  # cut off, not rounded up
        (-0.5, "1969-12-31T23:59:59.500Z"),
        (1_709_164_800, "2024-02-29T00:00:00.000Z"),
    ],
)
def test_timestamp_is_utc_in_milliseconds(seconds, text):
    assert timestamp(seconds) == text


def test_stamp_follows_the_clock():
    now = ManualTime()
    stamp = Stamp(now, None)
    assert stamp() == "2026-01-01T00:00:00.000Z"
    now.advance(1.25)
    assert stamp() == "2026-01-01T00:00:01.250Z"


def test_stamp_waits_for_a_clock_that_went_back():
    now = ManualTime()
    stamp = Stamp(now, None)
    stamp()
    now.advance(-3600)
    assert stamp() == "2026-01-01T00:00:00.000Z"
    now.advance(3600)
    assert stamp() == "2026-01-01T00:00:00.000Z"
    now.advance(2)
    assert stamp() == "2026-01-01T00:00:02.000Z"


@pytest.mark.parametrize("last", ["2026-01-01T00:00:10.123Z", "2026-01-01T00:00:10Z"])
def test_stamp_is_not_older_than_the_log(last):
    now = ManualTime()
    stamp = Stamp(now, last)
    assert stamp() == last.replace("10Z", "10.000Z")
    now.advance(11)
    assert stamp() == "2026-01-01T00:00:11.000Z"


def test_stamps_with_steps_below_a_millisecond():
    now = ManualTime()
    stamp = Stamp(now, None)
    stamps = []
    for step in [0.0004] * 50 + [-0.0003] * 20 + [0.0009] * 30:
        now.advance(step)
        stamps.append(stamp())
    assert stamps == sorted(stamps)
    assert stamps[-1] > stamps[0]


def test_retry_with_the_same_message():
    poster, post = RecordingPoster(), Post("ann", "hi", "l")
    answer_retry(post, 7, poster, same=True)
    assert poster.events == [("duplicate", post, 7)]


def test_retry_with_another_message():
    poster, post = RecordingPoster(), Post("ann", "hi", "l")
    answer_retry(post, 7, poster, same=False)
    ((what, about, error),) = poster.events
    assert (what, about, type(error)) == ("refused", post, LabelReused)


@pytest.mark.parametrize("text", ["2026-01-01T00:00:00.000Z", "1970-01-01T00:00:00.001Z", "2099-12-31T23:59:59.999Z"])
def test_instant_is_the_inverse_of_timestamp(text):
    assert timestamp(instant(text)) == text
