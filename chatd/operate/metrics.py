"""The metrics for Prometheus, computed at every scrape.

Messages do not pass through this module.  The other parts count their rare or batched events (refusals, closes,
commits).  Everything else is computed from the current state.  The cursors of a room's members show how far each is
behind, and, together with those of former members, how many messages were delivered.  Metrics therefore cost nothing
on the path of a message, and a scrape visits each member once.

Counters count from the start of the process; times are in seconds and sizes in bytes.
"""

import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
from typing_extensions import override

import chatd
from chatd.histogram import SECONDS, Histogram
from chatd.room.moderation import SanctionKind
from chatd.room.registry import Registry
from chatd.store.base import Store
from chatd.transport.connections import CARRIERS, Connections
from chatd.transport.framing import CloseCode
from chatd.transport.limits import Limits
from chatd.webhooks.delivery import OUTCOMES, Webhook

LAG_SECONDS: Final = 0.5
"""The interval between two samples of the reactor lag."""
LAGS: Final = (0, 1, 10, 100, 1000, 10_000)
"""Bounds for the number of messages that a member is behind.  Beyond the last, a member is evicted."""
CODES: Final = tuple(CloseCode)
"""The close codes that are counted one by one.  Clients may invent others (RFC 6455, section 7.4.2)."""
LOG_SIZES: Final = {
    "messages": "Messages in the log.",
    "bytes": "Bytes of the log, with its write-ahead log.",
    "wal_bytes": "Bytes of the write-ahead log.",
    "free_bytes": "Free bytes on the disk of the log.",
}
"""The help of the metrics of a store's size, by their units."""
_STATM: Final = Path("/proc/self/statm")


class ReactorLag:
    """The delay of due calls in the reactor, in seconds, sampled since the first scrape."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._begun = False
        self._seen = Histogram(SECONDS)

    def seen(self) -> Histogram:
        """Return the samples so far, and start sampling with the first call."""
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
    """All metrics.

    `refusals` are counted by kind (frame, handshake, request, admin) and then by reason, `throttles` by carrier, and
    what bans and mutes refused (`sanctioned`) by kind.
    """

    def __init__(
        self,
        *,
        store: Store,
        rooms: Registry,
        connections: Connections,
        refusals: Mapping[str, Mapping[str, int]],
        throttles: Mapping[str, int],
        limits: Limits,
        sanctioned: Mapping[str, int],
        clock: IReactorTime,
        webhooks: Iterable[Webhook] = (),
    ) -> None:
        self._store = store
        self._rooms = rooms
        self._connections = connections
        self._refusals = refusals
        self._throttles = throttles
        self._limits = limits
        self._sanctioned = sanctioned
        self._webhooks = webhooks
        self._lag = ReactorLag(clock)
        self._started = time.time()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def __call__(self) -> str:
        """Return the text of a scrape in Prometheus's format 0.0.4, without the final newline."""
        return generate_latest(self._registry).decode().rstrip("\n")

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._clients()
        yield from self._messages()
        yield from self._refused()
        yield from self._webhook_metrics()
        yield from self._store_metrics()
        yield from self._process()

    def _clients(self) -> Iterator[Metric]:
        """Yield the current connections and members, and the closes."""
        connections = GaugeMetricFamily("chatd_connections", "Open connections.", labels=["transport"])
        closes = CounterMetricFamily(
            "chatd_closes",
            "Closed connections by close code; 1006: without a close frame, like every event stream.",
            labels=["transport", "code"],
        )
        now = Counter(client.carrier for client in self._connections.connected)
        for carrier in CARRIERS:
            connections.add_metric([carrier], now[carrier])
            ended = {code: number for (by, code), number in self._connections.closes.items() if by == carrier}
            for code in CODES:
                closes.add_metric([carrier, str(code)], ended.pop(code, 0))
            closes.add_metric([carrier, "other"], sum(ended.values()))
        yield connections
        yield closes
        members = sum(len(room.members) for room in self._rooms)
        yield GaugeMetricFamily("chatd_rooms", "Rooms with at least one member.", len(self._rooms))
        yield GaugeMetricFamily("chatd_members", "Members of all rooms.", members)

    def _messages(self) -> Iterator[Metric]:
        """Yield the messages and their deliveries."""
        yield CounterMetricFamily("chatd_messages", "Messages stored in the log.", self._rooms.messages)
        yield CounterMetricFamily(
            "chatd_deliveries", "New messages delivered to members, without histories.", self._rooms.delivered
        )
        lags = Histogram(LAGS)
        held = size = histories = compressed = 0
        for room in self._rooms:
            for cursor, members in room.cursors().items():
                lags.add(room.head - cursor, members)
            messages, frames = room.held
            held += messages
            size += frames
            histories += room.histories_bytes
            compressed += room.compressed_bytes
        yield GaugeHistogramMetricFamily(
            "chatd_cursor_lag_messages",
            "Number of messages that members are behind.",
            buckets=_buckets(lags),
            gsum_value=lags.sum,
        )
        yield GaugeMetricFamily("chatd_tail_messages", "Newest messages of all rooms, held in memory.", held)
        yield GaugeMetricFamily("chatd_tail_bytes", "Bytes of the newest messages, held in memory.", size)
        yield GaugeMetricFamily("chatd_compressed_bytes", "Bytes of compressed frames, held in memory.", compressed)
        yield GaugeMetricFamily(
            "chatd_histories_bytes",
            "Bytes of history frames, held in memory for clients that connect together.",
            histories,
        )

    def _refused(self) -> Iterator[Metric]:
        refusals = CounterMetricFamily(
            "chatd_refusals",
            "Rejected frames by error code (schema: invalid), and rejected handshakes and requests by status; admin: "
            "requests to the admin port.",
            labels=["kind", "reason"],
        )
        for kind, reasons in self._refusals.items():
            for reason, number in reasons.items():
                refusals.add_metric([kind, reason], number)
        yield refusals
        throttles = CounterMetricFamily(
            "chatd_throttles", "Pauses in reading from a connection that exceeded the rate.", labels=["transport"]
        )
        for carrier, number in self._throttles.items():
            throttles.add_metric([carrier], number)
        yield throttles
        limited = CounterMetricFamily(
            "chatd_limited", "Clients and posts refused by a limit of the server or of an address.", labels=["limit"]
        )
        for limit, number in self._limits.refusals.items():
            limited.add_metric([limit], number)
        yield limited
        refuses = self._limits.lateness.refuses
        yield GaugeMetricFamily(
            "chatd_refusing", "1 while new clients are refused because the event loop lags.", refuses
        )
        yield GaugeMetricFamily(
            "chatd_buffered_bytes", "Bytes that full transports hold, once a second.", self._connections.buffered
        )
        sanctions = GaugeMetricFamily("chatd_sanctions", "Bans and mutes in force.", labels=["kind"])
        sanctioned = CounterMetricFamily(
            "chatd_sanction_refusals",
            "Handshakes, requests and posts that a ban or mute refused.",
            labels=["kind"],
        )
        now = self._store.sanctions.count(time.time())
        for kind in SanctionKind:
            sanctions.add_metric([kind], now[kind])
            sanctioned.add_metric([kind], self._sanctioned.get(kind, 0))
        yield sanctions
        yield sanctioned

    def _webhook_metrics(self) -> Iterator[Metric]:
        """Yield the metrics of webhooks, if there are any."""
        if not self._webhooks:
            return
        labels = ["webhook"]
        deliveries = CounterMetricFamily(
            "chatd_webhook_deliveries",
            "Deliveries by outcome: taken (2xx), rejected (another status), unanswered.",
            labels=[*labels, "outcome"],
        )
        messages = CounterMetricFamily("chatd_webhook_messages", "Messages taken by the application.", labels=labels)
        missed = CounterMetricFamily(
            "chatd_webhook_missed", "Messages that were removed before their delivery.", labels=labels
        )
        active = GaugeMetricFamily("chatd_webhook_active", "1 if this node delivers.", labels=labels)
        stopped = GaugeMetricFamily("chatd_webhook_stopped", "1 after the application answered 410.", labels=labels)
        behind = GaugeMetricFamily(
            "chatd_webhook_lag_messages", "Messages that the application lacks, where this is known.", labels=labels
        )
        age = GaugeMetricFamily(
            "chatd_webhook_lag_seconds", "Age of the oldest message that the application lacks.", labels=labels
        )
        for webhook in self._webhooks:
            for outcome in OUTCOMES:
                deliveries.add_metric([webhook.name, outcome], webhook.outcomes[outcome])
            lag, seconds = webhook.lag
            messages.add_metric([webhook.name], webhook.messages)
            missed.add_metric([webhook.name], webhook.missed)
            active.add_metric([webhook.name], webhook.active)
            stopped.add_metric([webhook.name], webhook.stopped)
            behind.add_metric([webhook.name], lag)
            age.add_metric([webhook.name], seconds)
        yield from (deliveries, messages, missed, active, stopped, behind, age)

    def _store_metrics(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "chatd_store_up", "1, or 0 if the last write or read of the log failed.", not self._store.fault
        )
        commits = self._store.commits
        yield HistogramMetricFamily(
            "chatd_commit_seconds",
            "Duration of commits to the log, including failed ones.",
            buckets=_buckets(commits),
            sum_value=commits.sum,
        )
        for unit, number in self._store.usage().items():
            yield GaugeMetricFamily(f"chatd_log_{unit}", LOG_SIZES[unit], number)

    def _process(self) -> Iterator[Metric]:
        """Yield the metrics of the process under their common names.  Counting its open files would take too long."""
        lag = self._lag.seen()
        yield HistogramMetricFamily(
            "chatd_reactor_lag_seconds",
            "Delay of due calls in the event loop, sampled since the first scrape.",
            buckets=_buckets(lag),
            sum_value=lag.sum,
        )
        yield CounterMetricFamily("process_cpu_seconds", "CPU time.", time.process_time())
        yield GaugeMetricFamily("process_start_time_seconds", "Start time, since 1970.", self._started)
        pages = int(_STATM.read_text("ascii").split()[1])
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory.", pages * os.sysconf("SC_PAGESIZE"))
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield GaugeMetricFamily("process_max_fds", "Limit of open files, and so of connections.", files)
        version = {"version": chatd.__version__, "python": platform.python_version()}
        yield InfoMetricFamily("chatd_build", "Versions of chatd and Python.", version)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return [(floatToGoString(bound), number) for bound, number in histogram.buckets()]
