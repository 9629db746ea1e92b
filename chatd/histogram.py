"""Histograms as Prometheus defines them, for values that are too frequent to store one by one.

A histogram counts the values at or below each of its bounds.  Narrower bounds give more exact quantiles.

This module is pure: numbers in, numbers out.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Final

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds for operations that should take milliseconds."""


class Histogram:
    """Counts of values between bounds, which are in ascending order."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        """The sum of all values."""

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += times * value

    def buckets(self) -> list[tuple[float, int]]:
        """Return each bound with the number of values at or below it; the last bound is infinite."""
        return [*zip([*self._bounds, inf], accumulate(self._counts), strict=True)]
