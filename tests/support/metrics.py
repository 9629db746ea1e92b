"""The metrics of a server, and those that the alerts and the dashboard use."""

import itertools
import json
import re

from prometheus_client.parser import text_string_to_metric_families
from support.servers import ROOT

ALERTS = ROOT / "docs" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "dashboard.json"

METRICS = {
    "chatd_buffered_bytes": "gauge",
    "chatd_build_info": "gauge",
    "chatd_closes": "counter",
    "chatd_commit_seconds": "histogram",
    "chatd_connections": "gauge",
    "chatd_cursor_lag_messages": "histogram",
    "chatd_cursor_lag_messages_gcount": "gauge",
    "chatd_cursor_lag_messages_gsum": "gauge",
    "chatd_deliveries": "counter",
    "chatd_compressed_bytes": "gauge",
    "chatd_histories_bytes": "gauge",
    "chatd_limited": "counter",
    "chatd_members": "gauge",
    "chatd_messages": "counter",
    "chatd_reactor_lag_seconds": "histogram",
    "chatd_refusals": "counter",
    "chatd_refusing": "gauge",
    "chatd_rooms": "gauge",
    "chatd_sanction_refusals": "counter",
    "chatd_sanctions": "gauge",
    "chatd_store_up": "gauge",
    "chatd_tail_bytes": "gauge",
    "chatd_tail_messages": "gauge",
    "chatd_throttles": "counter",
    "process_cpu_seconds": "counter",
    "process_max_fds": "gauge",
    "process_resident_memory_bytes": "gauge",
    "process_start_time_seconds": "gauge",
}
"""The metrics that every server has, with their types.  The samples of a counter end in `_total`."""
WEBHOOK_METRICS = {
    "chatd_webhook_active": "gauge",
    "chatd_webhook_deliveries": "counter",
    "chatd_webhook_lag_messages": "gauge",
    "chatd_webhook_lag_seconds": "gauge",
    "chatd_webhook_messages": "counter",
    "chatd_webhook_missed": "counter",
    "chatd_webhook_stopped": "gauge",
}
"""The metrics that a server with webhooks has too."""


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text):
        self.types = {}
        self.help = {}
        self.samples = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation.endswith("."), family.name
            assert family.name not in self.types
            self.types[family.name] = family.type
            self.help[family.name] = family.documentation
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples
                self.samples[key] = sample.value

    def __call__(self, name, **labels):
        """Return the value of one sample."""
        return self.samples[name, frozenset(labels.items())]

    def sum(self, name, **labels):
        """Return the sum of all samples that have these labels, and perhaps others."""
        return sum(value for (of, having), value in self.samples.items() if of == name and labels.items() <= having)

    def some(self, name):
        """Return the samples that are not 0 by the values of their labels, which are sorted by the labels' names."""
        return {
            tuple(value for _, value in sorted(labels)): number
            for (of, labels), number in self.samples.items()
            if of == name and number
        }

    def buckets(self, name):
        """Return the count of each bucket of a histogram, without the smaller buckets."""
        found = sorted(
            (float(dict(labels)["le"]), value) for (of, labels), value in self.samples.items() if of == f"{name}_bucket"
        )
        total = itertools.pairwise([0, *(value for _, value in found)])
        return {bound: after - before for (bound, _), (before, after) in zip(found, total, strict=True)}

    def labels(self):
        """Return the labels of each sample, and the values of each label."""
        known = {}
        for name, labels in self.samples:
            for label, value in labels:
                known.setdefault(name, {}).setdefault(label, set()).add(value)
            known.setdefault(name, {})
        return known


# The alerts and the dashboard

_NUMBER = re.compile(r"\[[^\]]*\]|(?<![\w\"])[0-9][0-9.e]*\b")
_SELECTOR = re.compile(r"([a-z_:][a-z0-9_:]*)(?:\{([^}]*)\})?(?![a-z0-9_:]|\s*\()", re.IGNORECASE)
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(by|without)\s*\(([^)]*)\)")
WORDS = {"and", "or", "unless", "bool", "offset"}
ADDED = {"up": {}}
"""The metrics that Prometheus itself adds to those of a server."""
ADDED_LABELS = {"job", "instance"}


def asked(expression):
    """Return the metrics that a PromQL expression names, each with its matchers, and the labels that it groups by."""
    groups = {label.strip() for _, labels in _GROUPING.findall(expression) for label in labels.split(",")}
    bare = _NUMBER.sub("", _GROUPING.sub("", expression))
    found = [(name, _MATCHER.findall(inside)) for name, inside in _SELECTOR.findall(bare) if name not in WORDS]
    return found, groups


def unknown(expression, scrape):
    """Yield the metrics and labels that an expression uses and a scrape lacks."""
    known = scrape.labels() | ADDED
    metrics, groups = asked(expression)
    assert metrics, expression
    for name, matchers in metrics:
        if name not in known:
            yield name
            continue
        for label, sign, value in matchers:
            if label not in ADDED_LABELS and (
                label not in known[name] or (sign == "=" and value not in known[name][label])
            ):
                yield f"{name}{{{label}}}"
    yield from groups - ADDED_LABELS - {label for name, _ in metrics for label in known.get(name, ())}


def rules(text):
    """Return each alert by name: its expression, and the rest of its text."""
    found = {}
    for part in text.split("- alert: ")[1:]:
        name, _, rest = part.partition("\n")
        (expression,) = re.findall(r"^ +expr: (.+)$", rest, re.MULTILINE)
        found[name] = expression, rest
    return found


def panels():
    return json.loads(DASHBOARD.read_text("utf-8"))["panels"]


def queries():
    return [target["expr"] for panel in panels() for target in panel["targets"]]
