"""Values by their size, for what is too frequent to be kept one by one.

A histogram is a row of bounds, and how many values were not above each, as Prometheus has it: from that any quantile
can be told as exactly as the bounds are narrow.

This module is pure: numbers in, numbers out.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Final

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds for what should take milliseconds."""


class Histogram:
    """How many values lie between bounds, which are given in order."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        """Of all values."""

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += times * value

    def buckets(self) -> list[tuple[float, int]]:
        """Each bound, and how many values are not above it; the last is infinite, and has them all."""
        return [*zip([*self._bounds, inf], accumulate(self._counts), strict=True)]
