"""Histograms, whose buckets are cumulative."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE

from chatd.histogram import SECONDS, Histogram


def test_empty_histogram_has_every_bucket():
    """A histogram without values has a bucket for each bound and one for infinity."""
    histogram = Histogram((1, 10))
    assert histogram.buckets() == [(1, 0), (10, 0), (inf, 0)]
    assert histogram.sum == 0


def test_value_at_a_bound_is_in_its_bucket():
    """A bucket includes the values that are equal to its bound."""
    histogram = Histogram((1, 10))
    histogram.add(1)
    histogram.add(1.5)
    histogram.add(11, 3)
    assert histogram.buckets() == [(1, 1), (10, 2), (inf, 5)]
    assert histogram.sum == 35.5


def test_bounds_are_in_order():
    """The bounds for durations are sorted and unique."""
    assert [*SECONDS] == sorted({*SECONDS})


@REPEATABLE
@given(
    st.lists(st.floats(-10, 10), max_size=5, unique=True),
    st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 5)), max_size=20),
)
def test_bucket_counts_values_at_or_below_its_bound(bounds, values):
    histogram = Histogram(sorted(bounds))
    for value, times in values:
        histogram.add(value, times)
    expected = [(bound, sum(times for value, times in values if value <= bound)) for bound in [*sorted(bounds), inf]]
    assert histogram.buckets() == expected
    assert histogram.sum == sum(value * times for value, times in values)
