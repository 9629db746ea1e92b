import re

import pytest
from support.helpers import NEW_YEAR, ManualTime, RecordingPoster
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import Post
from chatd.room.log import LabelReused
from chatd.store.base import (
    DAY,
    JUMP_SECONDS,
    STEADY_SECONDS,
    Ages,
    LogClock,
    Retention,
    answer_retry,
    instant,
    new_epoch,
    timestamp,
)


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


def test_moment_follows_the_clock():
    now = ManualTime()
    clock = LogClock(now)
    assert clock.read().after("") == "2026-01-01T00:00:00.000Z"
    now.advance(1.25)
    assert clock.read().after("2026-01-01T00:00:00.000Z") == "2026-01-01T00:00:01.250Z"


def test_timestamps_wait_for_a_clock_set_back():
    """A correction of up to a minute stops the timestamps of a room until the clock has caught up."""
    now = ManualTime()
    clock = LogClock(now)
    last = clock.read().after("")
    now.jump(-JUMP_SECONDS)
    assert clock.read().after(last) == last
    now.advance(JUMP_SECONDS + 2)
    assert clock.read().after(last) == "2026-01-01T00:00:02.000Z"


@pytest.mark.parametrize("last", ["2026-01-01T00:01:00.001Z", "2099-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z"])
def test_timestamps_follow_a_clock_that_recovers(last):
    """A timestamp that is more than a minute ahead was wrong, and does not hold the next ones."""
    assert LogClock(ManualTime()).read().after(last) == "2026-01-01T00:00:00.000Z"


@pytest.mark.parametrize("last", ["2026-01-01T00:00:10.123Z", "2026-01-01T00:00:10Z", "2026-01-01T02:00:10+02:00"])
def test_stamp_is_not_older_than_the_message_before(last):
    now = ManualTime()
    clock = LogClock(now)
    assert clock.read().after(last) == f"2026-01-01T00:00:10.{'123' if '.' in last else '000'}Z"
    now.advance(11)
    assert clock.read().after(last) == "2026-01-01T00:00:11.000Z"


def test_timestamps_with_steps_below_a_millisecond():
    now = ManualTime()
    clock = LogClock(now)
    stamps = [""]
    for step in [0.0004] * 50 + [-0.0003] * 20 + [0.0009] * 30:
        now.advance(step)
        stamps.append(clock.read().after(stamps[-1]))
    assert stamps == sorted(stamps)
    assert stamps[-1] > stamps[1]


# The age of messages


@pytest.fixture
def now():
    return ManualTime()


@pytest.fixture
def clock(now):
    """A clock that has run for long enough."""
    clock = LogClock(now, now.steady)
    now.advance(STEADY_SECONDS)
    return clock


def test_no_age_in_the_first_hour(now):
    """A clock that was wrong when the server started has an hour to be corrected."""
    clock = LogClock(now, now.steady)
    assert clock.ages(DAY) is None
    now.advance(STEADY_SECONDS - 1)
    assert clock.ages(DAY) is None
    now.advance(1)
    assert clock.ages(DAY) == ("2025-12-31T01:00:00.000Z", "2026-01-01T01:01:00.000Z")


@pytest.mark.parametrize("jump", [73 * 365 * DAY, -56 * 365 * DAY, JUMP_SECONDS + 1, -JUMP_SECONDS - 1])
def test_no_age_in_the_hour_after_a_jump(now, clock, jump):
    """No message is removed by a clock that has jumped, and the jump is logged once."""
    assert clock.ages(DAY)
    now.jump(jump)
    with capturedLogs() as events:
        for _ in range(3):
            assert clock.ages(DAY) is None
    (line,) = map(formatEvent, events)
    assert line == (
        f"the clock has jumped from 2026-01-01T01:00:00.000Z to {timestamp(now())}: "
        "no message is removed by its age for 60 minutes"
    )
    now.advance(STEADY_SECONDS)
    assert clock.ages(DAY)


def test_no_age_in_the_hour_after_a_recovery(now, clock):
    now.jump(10**9)
    assert clock.ages(DAY) is None
    now.advance(STEADY_SECONDS - 1)
    now.jump(-(10**9))
    assert clock.ages(DAY) is None
    now.advance(STEADY_SECONDS - 1)
    assert clock.ages(DAY) is None
    now.advance(1)
    assert clock.ages(DAY)


@pytest.mark.parametrize("step", [JUMP_SECONDS, -JUMP_SECONDS])
def test_correction_is_no_jump(now, clock, step):
    for _ in range(10):
        now.advance(1000)
        now.jump(step)
        assert clock.ages(DAY)


@pytest.mark.parametrize(
    ("timestamps", "old"),
    [
        ("", 0),
        ("3", 0),
        ("1", 1),
        ("12", 2),
        ("1234", 2),
        ("345", 0),
        ("3123", 0),  # younger than the one before, whatever its timestamp
        ("9", 0),
        ("99", 0),
        ("193", 1),
        ("913", 2),
        ("1919", 3),
        ("3919", 0),
        ("94", 0),
    ],
)
def test_messages_that_are_too_old(timestamps, old):
    """Ages 3 to 5 are young, 1 and 2 are too old, and 9 is a time to come."""
    assert Ages("3", "5").too_old(timestamps) == old


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
