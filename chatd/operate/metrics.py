"""What the server tells Prometheus about itself, made when it is asked.

No message passes here.  Where something happens that is rare or comes by the batch (a refusal, a close, a commit),
the part that does it adds one to a number of its own; all else is a function of what is there now.  The cursors of a
room's members, counted, say how far who is behind, and with those of the members who came and left, how many messages
were delivered.  So the path of a message pays nothing, and a scrape is one look at each member.

Counters count from the start of the process; times are in seconds and sizes in bytes.
"""

import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from twisted.internet.interfaces import IReactorTime

import chatd
from chatd.histogram import SECONDS, Histogram
from chatd.room.registry import Registry
from chatd.store.base import Store
from chatd.transport.connections import CARRIERS, Connections

LAG_SECONDS: Final = 0.5
"""How often the reactor is asked how late it is."""
LAGS: Final = (0, 1, 10, 100, 1000, 10_000)
"""Bounds of how many messages a member is behind: beyond the last it is not caught up."""
CODES: Final = (1000, 1001, 1002, 1003, 1006, 1007, 1008, 1009, 1011, 1012, 1013)
"""The close codes that are counted one by one; a client may make up others (RFC 6455, section 7.4.2)."""
_STATM: Final = Path("/proc/self/statm")


class ReactorLag:
    """How late the reactor comes to what is due, in seconds: sampled from the first time that anyone asks."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._begun = False
        self._seen = Histogram(SECONDS)

    def seen(self) -> Histogram:
        """What was found until now."""
        if not self._begun:
            self._begun = True
            self._wait()
        return self._seen

    def _wait(self) -> None:
        self._clock.callLater(LAG_SECONDS, self._look, self._clock.seconds() + LAG_SECONDS)

    def _look(self, due: float) -> None:
        self._seen.add(max(0.0, self._clock.seconds() - due))  # the clock may be set back
        self._wait()


class Metrics(Collector):
    """All that is told; `refusals` are by what was refused (a frame, a handshake, a request) and then by the reason."""

    def __init__(
        self,
        *,
        store: Store,
        rooms: Registry,
        connections: Connections,
        refusals: Mapping[str, Mapping[str, int]],
        clock: IReactorTime,
    ) -> None:
        self._store = store
        self._rooms = rooms
        self._clients = connections
        self._refusals = refusals
        self._lag = ReactorLag(clock)
        self._started = time.time()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def __call__(self) -> str:
        """The text of a scrape, in Prometheus's own format 0.0.4, without the end of its last line."""
        return generate_latest(self._registry).decode().rstrip("\n")

    def collect(self) -> Iterator[Metric]:
        """What there is to tell now."""
        yield from self._who()
        yield from self._messages()
        yield from self._refused()
        yield from self._log()
        yield from self._process()

    def _who(self) -> Iterator[Metric]:
        """Who is here, and how those went who are not."""
        connections = GaugeMetricFamily(
            "chatd_connections", "Connections whose handshake was answered.", labels=["transport"]
        )
        closes = CounterMetricFamily(
            "chatd_closes",
            "Connections that ended, by close code; 1006 is no close frame, as readers of events go.",
            labels=["transport", "code"],
        )
        now = Counter(client.carrier for client in self._clients.connected)
        for carrier in CARRIERS:
            connections.add_metric([carrier], now[carrier])
            ended = {code: number for (by, code), number in self._clients.closes.items() if by == carrier}
            for code in CODES:
                closes.add_metric([carrier, str(code)], ended.pop(code, 0))
            closes.add_metric([carrier, "other"], sum(ended.values()))
        yield connections
        yield closes
        members = sum(len(room.members) for room in self._rooms)
        yield GaugeMetricFamily("chatd_rooms", "Rooms that someone is in.", len(self._rooms))
        yield GaugeMetricFamily("chatd_members", "Members of all rooms.", members)

    def _messages(self) -> Iterator[Metric]:
        """What was said, and how far it has come."""
        yield CounterMetricFamily("chatd_messages", "Messages that the log has taken.", self._rooms.messages)
        yield CounterMetricFamily(
            "chatd_deliveries", "Messages handed to members as they came, histories left out.", self._rooms.delivered
        )
        lags = Histogram(LAGS)
        held = size = 0
        for room in self._rooms:
            for cursor, members in room.cursors().items():
                lags.add(room.head - cursor, members)
            messages, frames = room.held
            held += messages
            size += frames
        yield GaugeHistogramMetricFamily(
            "chatd_cursor_lag_messages",
            "How many messages members are behind now.",
            buckets=_buckets(lags),
            gsum_value=lags.sum,
        )
        yield GaugeMetricFamily("chatd_tail_messages", "Newest messages held in memory, of all rooms.", held)
        yield GaugeMetricFamily("chatd_tail_bytes", "What those take, as frames.", size)

    def _refused(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            "chatd_refusals",
            "Frames by error code (schema: what breaks it), handshakes and HTTP requests by status, that were refused.",
            labels=["kind", "reason"],
        )
        for kind, reasons in self._refusals.items():
            for reason, number in reasons.items():
                refusals.add_metric([kind, reason], number)
        yield refusals

    def _log(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "chatd_store_up", "1, or 0 if the log could not be written or read when last tried.", not self._store.fault
        )
        commits = self._store.commits
        yield HistogramMetricFamily(
            "chatd_commit_seconds",
            "How long commits to the log took, failed ones included.",
            buckets=_buckets(commits),
            sum_value=commits.sum,
        )
        for unit, number in self._store.usage().items():
            yield GaugeMetricFamily(f"chatd_log_{unit}", "The log, or what its disk has left.", number)

    def _process(self) -> Iterator[Metric]:
        """The process, under the names that all have; the files that it has open would take too long to count."""
        lag = self._lag.seen()
        yield HistogramMetricFamily(
            "chatd_reactor_lag_seconds",
            "How late the event loop comes to what is due, sampled since the first scrape.",
            buckets=_buckets(lag),
            sum_value=lag.sum,
        )
        yield CounterMetricFamily("process_cpu_seconds", "Time of the processor.", time.process_time())
        yield GaugeMetricFamily("process_start_time_seconds", "When it started, since 1970.", self._started)
        pages = int(_STATM.read_text("ascii").split()[1])
        yield GaugeMetricFamily("process_resident_memory_bytes", "Memory.", pages * os.sysconf("SC_PAGESIZE"))
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield GaugeMetricFamily("process_max_fds", "How many files, and so connections, it may have open.", files)
        version = {"version": chatd.__version__, "python": platform.python_version()}
        yield InfoMetricFamily("chatd_build", "What runs here.", version)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return [(floatToGoString(bound), number) for bound, number in histogram.buckets()]
