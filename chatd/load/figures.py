"""The output of a trial: its progress, its latencies and its summary."""

import math
from collections.abc import Callable
from typing import Any, Final, TextIO

PERCENTS: Final = (50, 95, 99)
STEP: Final = 1.02
BUSY: Final = 0.8
"""The share of a core from which the delays of this program distort the figures."""


class Latencies:
    """A distribution of latencies, as counts in steps of two percent."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._most = 0.0

    def add(self, seconds: float) -> None:
        """Count one latency."""
        step = math.ceil(math.log(max(seconds, 1e-6), STEP))
        self._counts[step] = self._counts.get(step, 0) + 1
        self._most = max(self._most, seconds)

    def figures(self) -> dict[str, float] | None:
        """Return percentiles (nearest rank) in milliseconds, up to two percent too high; None without latencies."""
        if not self._counts:
            return None
        figures = {f"p{percent}": self._percentile(percent) for percent in PERCENTS} | {"max": self._most}
        return {name: round(min(seconds, self._most) * 1000, 3) for name, seconds in figures.items()}

    def _percentile(self, percent: int) -> float:
        left = sum(self._counts.values()) * percent / 100
        steps = iter(sorted(self._counts))
        step = next(steps)
        while (left := left - self._counts[step]) > 0:
            step = next(steps)
        return float(STEP**step)


class Progress:
    """A bar on a terminal; elsewhere one line every few seconds."""

    SECONDS: Final = 5.0
    WIDTH: Final = 30

    def __init__(self, stream: TextIO, now: Callable[[], float]) -> None:
        self._stream = stream
        self._now = now
        self._bar = stream.isatty()
        self._due = now() + self.SECONDS

    def show(self, part: float, words: str) -> None:
        """Show the completed part, from 0 to 1, and a description."""
        if self._bar:
            done = "#" * int(self.WIDTH * part)
            self._stream.write(f"\r\033[K[{done:{self.WIDTH}}] {part:4.0%}  {words}")
        elif self._now() >= self._due:
            self._due = self._now() + self.SECONDS
            self._stream.write(f"{part:4.0%}  {words}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the bar from its line."""
        if self._bar:
            self._stream.write("\r\033[K")


def summary(report: dict[str, Any]) -> str:
    """Return a report as text."""
    known = report | {name: report[name] or 0 for name in ("deliveries_per_second", "cpu")}
    lines = [
        "{url}: {clients:,} clients, {posters:,} of them posters; {seconds:g} s",
        "posted     {posted:,}; acknowledged {acknowledged:,}, {acknowledged_again:,} of them by an earlier attempt",
        "delivered  {delivered:,}, {deliveries_per_second:,} a second; {of_others:,} messages of others",
        "cut        {cut:,} times; {came_back:,} reconnections",
    ]
    for name, figures in report["latency_ms"].items():
        if figures:
            percentiles = "  ".join(f"{key} {figure:g}" for key, figure in figures.items())
            lines.append(f"{name:<9}  {percentiles} ms after the post was due")
    if report["logs_lost"]:
        lost = "an unknown number of" if report["lost"] is None else f"{report['lost']:,}"
        lines.append(
            f"lost       {lost} acknowledged messages; {{fresh_starts:,}} fresh starts, {{logs_lost:,}} new logs"
        )
    if known["rooms"] > 1:
        lines.insert(1, "rooms      {rooms:,}, which each client joined over one connection")
    if known["cpu"] >= BUSY:
        lines.append("busy       this program used {cpu:.0%} of a core, so these times contain its own delays")
    if report["proved"]:
        lines.append("proved     each client received each message exactly once, in one order, as it was posted")
    return "".join(f"{line.format_map(known)}\n" for line in lines)
