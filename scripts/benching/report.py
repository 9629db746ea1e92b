"""The figures in words: medians of rounds, tables, and the conditions of the measurement.

A median ignores a round that something disturbed, and a mean would not.  Faults have no median: one lost message in any
round makes the row wrong.  A figure that would be noise is left out (-).
"""

import argparse
import datetime as dt
import os
import pathlib
import platform
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

Row = dict[str, Any]
LIMITS: Final = {"server": 0.9, "load": 0.9, "others": 0.1}
"""The shares of a core from which these distort the figures."""
FAULTS: Final = ("lost", "doubled")
NOTES: Final = {
    "load": "the load, not or not only the server, was the bottleneck; the server may do more, and answer sooner.",
    "others": "other processes took time from these cores; measure again when they are gone.",
}


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    key: str
    form: str
    width: int


_WHO: Final = (
    Column("store", "store", "", 7),
    Column("compress", "compress", "", 8),
    Column("clients", "clients", ",", 7),
)
_LIMITS: Final = (
    Column("srv %", "server_share", ".0%", 5),
    Column("load %", "load_share", ".0%", 6),
    Column("limit", "limit", "", 13),
    Column("once, in order", "exactly_once_in_order", "", 14),
)
LOADS: Final = (
    *_WHO,
    Column("rooms", "rooms", ",", 5),
    Column("mode", "mode", "", 9),
    Column("msg/s", "messages_per_s", ",.0f", 7),
    Column("deliv/s", "deliveries_per_s", ",.0f", 9),
    Column("work", "work", ",.0f", 9),
    Column("B/deliv", "bytes_per_delivery", ".0f", 7),
    Column("p50 ms", "p50_ms", ".2f", 8),
    Column("p95 ms", "p95_ms", ".2f", 8),
    Column("p99 ms", "p99_ms", ".2f", 8),
    Column("max ms", "max_ms", ".2f", 8),
    Column("RSS MB", "rss_mb", ".1f", 6),
    Column("idle KB", "idle_kb", ".1f", 7),
    Column("conn/CPU s", "connections_per_cpu_s", ",.0f", 10),
    *_LIMITS,
)
"""The columns of the loads."""
STORMS: Final = (
    *_WHO,
    Column("mode", "mode", "", 9),
    Column("messages", "messages", ",.0f", 8),
    Column("repeated", "repeated", ",.0f", 8),
    Column("ready s", "ready_s", ".2f", 7),
    Column("p50 s", "p50_s", ".2f", 6),
    Column("p99 s", "p99_s", ".2f", 6),
    Column("max s", "max_s", ".2f", 6),
    Column("joins/CPU s", "connections_per_cpu_s", ",.0f", 11),
    Column("lost", "lost", ",.0f", 6),
    Column("doubled", "doubled", ",.0f", 7),
    *_LIMITS,
)
"""The columns of the storms."""


def median(rounds: Sequence[Row]) -> Row:
    """Merge several rounds to one row: the median of each figure, and exact only if every round was."""
    keys = dict.fromkeys(key for row in rounds for key in row if key != "fault")
    known = {key: [row[key] for row in rounds if row.get(key) is not None] for key in keys}
    merged: Row = {key: statistics.median(values) if values else None for key, values in known.items()}
    merged |= {key: max(known[key]) for key in FAULTS if known.get(key)}
    faults = [row["fault"] for row in rounds if "fault" in row]
    busy = [name for name, share in LIMITS.items() if merged.get(f"{name}_share", 0) >= share]
    return merged | {"limit": "+".join(busy), "exactly_once_in_order": not faults, "faults": faults}


def heading(columns: Sequence[Column]) -> str:
    """Compose the first line of a table."""
    return "  ".join(f"{column.heading:>{column.width}}" for column in columns)


def line(row: Row, columns: Sequence[Column]) -> str:
    """Compose a row of a table."""
    words = {None: "-", "": "-", True: "yes", False: "NO"}
    cells = [(row.get(column.key), column) for column in columns]
    return "  ".join(
        (words[value] if value in ("", None) or isinstance(value, bool) else format(value, column.form)).rjust(
            column.width
        )
        for value, column in cells
    )


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """Compose a line for each pair of rows that differ in compression only."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["store"], row["clients"], row["rooms"], row["mode"]

    plain = {key(row): row for row in rows if row["compress"] == "off"}
    for row in rows:
        other = plain.get(key(row))
        if row["compress"] == "off" or not other or not other.get("bytes_per_delivery"):
            continue
        bytes_off, bytes_on = other["bytes_per_delivery"], row.get("bytes_per_delivery")
        if not bytes_on:
            continue
        work = f", work x {row['work'] / other['work']:.2f}" if row.get("work") and other.get("work") else ""
        rooms = f"{row['rooms']:,} room{'s' * (row['rooms'] > 1)}"
        yield (
            f"compression, {row['store']}, {row['clients']:,} clients, {rooms}, {row['mode']}: "
            f"{bytes_off:.0f} to {bytes_on:.0f} bytes a delivery (÷ {bytes_off / bytes_on:.1f}){work}"
        )


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions of the measurement."""
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    folder = os.path.realpath(tempfile.gettempdir()) + "/"
    mounts = [mount.split()[1:3] for mount in pathlib.Path("/proc/mounts").read_text().splitlines()]
    places = [(place.rstrip("/") + "/", kind) for place, kind in mounts if folder.startswith(place.rstrip("/") + "/")]
    disk = max(places, default=("/", "unknown"))  # a container may not see the mount of its root
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "cpu": cpu[1] if cpu else platform.machine(),
        "python": platform.python_version(),
        "filesystem": disk[1],
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
