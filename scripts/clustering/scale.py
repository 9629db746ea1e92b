"""The cost of a message: CPU time of the nodes and of Redis, and bytes in Redis, when nothing fails.

`share` measures a room whose clients are spread over the nodes.  Its cost per message is a fixed part for each node,
which every node pays, and a part for each delivery, which the nodes share.  `store` measures Redis alone, by posts over
HTTP to rooms without members.

With more than one core, Redis and the clients run on the last one, and the nodes on the others.  Figures exclude the
CPU time of idle processes, which is measured first.
"""
# ruff: noqa: T201 -- a script prints

import argparse
import contextlib
import http.client
import json
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from twisted.internet.threads import deferToThread

from chatd.load.figures import Latencies
from clustering.ledger import TEXT_SIZE
from clustering.load import POSTERS, Load, Row
from clustering.processes import LONG, NODES, Cluster, Node, Redis, RigError, Tools, say, sleep


async def scale(reactor: Any, tools: Tools, options: argparse.Namespace) -> list[Row]:
    """Measure the cost of a message for one node, two nodes and Redis."""
    everything = os.sched_getaffinity(0)
    cores = sorted(everything) if len(everything) > 1 else []
    print(f"scale: {options.clients:,} clients, {options.rate:g} posts/s", flush=True)
    if cores:
        say(f"nodes on core {', '.join(map(str, cores[:-1]))}; Redis and the clients on core {cores[-1]}")
        os.sched_setaffinity(0, {cores[-1]})
    rows = [row for count in (1, 2) for row in await share(reactor, tools, options, count, cores)]
    rows += [row for count in (1, len(NODES)) for row in await store(reactor, tools, options, count, cores)]
    os.sched_setaffinity(0, everything)
    return rows


class Clock:
    """The CPU time of the nodes and of Redis, without the time that they use when idle."""

    def __init__(self, cluster: Cluster) -> None:
        self._processes = (*cluster.nodes, cluster.redis)
        self.idle = [0.0 for _ in self._processes]
        """The share of a core that each process uses when idle."""
        self._begin, self._before = 0.0, self.idle

    def start(self) -> None:
        """Begin to measure."""
        self._begin, self._before = time.monotonic(), [process.cpu() for process in self._processes]

    def stop(self) -> tuple[float, list[float]]:
        """Return the seconds since `start`, and the CPU seconds of each process."""
        seconds = time.monotonic() - self._begin
        used = [process.cpu() - before for process, before in zip(self._processes, self._before, strict=True)]
        return seconds, [max(0.0, cpu - seconds * idle) for cpu, idle in zip(used, self.idle, strict=True)]

    async def rest(self, seconds: float) -> Row:
        """Measure the idle processes for a number of seconds, and return their shares in percent."""
        self.idle = [0.0 for _ in self._processes]
        self.start()
        await sleep(self._processes[0].reactor, seconds)
        elapsed, used = self.stop()
        self.idle = [cpu / elapsed for cpu in used]
        *nodes, redis = [round(share * 100, 2) for share in self.idle]
        return {"nodes_percent": nodes, "redis_percent": redis}


async def share(reactor: Any, tools: Tools, options: argparse.Namespace, count: int, cores: Sequence[int]) -> list[Row]:
    """Measure one room whose clients are spread over `count` nodes, without HAProxy."""
    rows: list[Row] = []
    with Cluster(reactor, tools, options, nodes=count, settings=["--rate=0"], cores=cores) as cluster:
        await cluster.start()
        load, clock = Load(reactor, [node.address for node in cluster.nodes], options.clients), Clock(cluster)
        ledger = load.ledger
        await load.join()
        await sleep(reactor, options.lead)
        rows.append({"mode": "idle"} | await clock.rest(options.measure))
        for mode in ("steady", "saturated"):
            ledger.late = Latencies()
            posted, delivered = ledger.posted, ledger.delivered
            clock.start()
            if mode == "steady":
                load.start(options.rate)
                await sleep(reactor, options.measure)
            else:
                await load.saturate(options.measure)
            await load.settle()
            seconds, (*nodes, redis) = clock.stop()
            posted, delivered = ledger.posted - posted, ledger.delivered - delivered
            rows.append(
                {
                    "mode": mode,
                    "messages": posted,
                    "messages_per_s": round(posted / seconds),
                    "deliveries_per_s": round(delivered / seconds),
                    "node_us_per_message": [round(cpu / posted * 1e6) for cpu in nodes],
                    "deliveries_per_node_cpu_s": round(delivered / sum(nodes)) if sum(nodes) else None,
                    "redis_us_per_message": round(redis / posted * 1e6, 1),
                    "late_ms": ledger.late.figures(),
                    "load_cpu": load.figures()["load_cpu"],
                }
            )
        ledger.conclude(await cluster.logs(ledger.epoch))
        await load.stop()
    rows = [{"scenario": f"scale, {count} {'node' if count == 1 else 'nodes'}"} | row for row in rows]
    rows[-1] |= {"faults": dict(ledger.faults), "first_faults": ledger.first_faults}
    show(rows)
    return rows


async def store(reactor: Any, tools: Tools, options: argparse.Namespace, count: int, cores: Sequence[int]) -> list[Row]:
    """Measure Redis while one of `count` nodes receives posts by HTTP, ten at a time."""
    rows: list[Row] = []
    with Cluster(reactor, tools, options, nodes=count, settings=["--rate=0"], cores=cores) as cluster:
        await cluster.start()
        redis, total, clock = cluster.redis, options.messages, Clock(cluster)
        await clock.rest(5)
        for room, labelled in (("plain", False), ("labelled", True)):
            stream = f"{{chatd}}:room:{room}"
            before = sizes(redis, stream)
            clock.start()
            await deferToThread(post_all, cluster.nodes[0], room, total, labelled=labelled)
            seconds, (*nodes, cpu) = clock.stop()
            await sleep(reactor, 1)
            grown = [(end - start) / total for start, end in zip(before, sizes(redis, stream), strict=True)]
            row: Row = {
                "mode": room,
                "messages": total,
                "messages_per_s": round(total / seconds),
                "node_us_per_message": [round(used / total * 1e6) for used in nodes],
                "redis_us_per_message": round(cpu / total * 1e6, 1),
                "memory_bytes": round(grown[0]),
                "stream_bytes": round(grown[1]),
                "feed_bytes": round(grown[2]),
                "file_bytes": round(grown[3]),
            }
            if labelled:
                key = next(iter(redis.ask("SCAN", 0, "MATCH", "{chatd}:label:*", "COUNT", 1000)[1]))
                row["label_bytes"] = redis.ask("MEMORY", "USAGE", key)
            rows.append(row)
    rows = [{"scenario": f"Redis, {count} {'node' if count == 1 else 'nodes'}"} | row for row in rows]
    show(rows)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print figures, one line for each row."""
    for row in rows:
        words = [
            f"{key} {value}" for key, value in row.items() if key not in ("scenario", "mode", "faults", "first_faults")
        ]
        print(
            f"{row['scenario']}, {row['mode']}: {'; '.join(words)}",
            *row.get("first_faults", ()),
            sep="\n  ",
            flush=True,
        )


def sizes(redis: Redis, stream: str) -> list[int]:
    """Return four sizes in bytes: memory of Redis, stream of a room, feed, append-only file."""
    streams = [redis.ask("MEMORY", "USAGE", key, "SAMPLES", 0) or 0 for key in (stream, "{chatd}:feed")]
    return [redis.info("memory", "used_memory"), *streams, redis.info("persistence", "aof_current_size")]


def post_all(node: Node, room: str, total: int, *, labelled: bool) -> None:
    """Post `total` messages by HTTP, a few at a time.  Raises RigError if one is not stored."""

    def post(part: int) -> None:
        with contextlib.closing(http.client.HTTPConnection(node.host, node.port, timeout=LONG)) as connection:
            for number in range(part, total, POSTERS):
                body = json.dumps({"username": f"load-{part:05}", "message": f"{number} ".ljust(TEXT_SIZE, ".")})
                headers = {"Content-Type": "application/json"}
                if labelled:
                    headers["Idempotency-Key"] = secrets.token_urlsafe(16)
                connection.request("POST", f"/rooms/{room}/messages", body, headers)
                answer = connection.getresponse()
                if answer.status != http.HTTPStatus.CREATED:
                    raise RigError(f"a post failed with status {answer.status}: {answer.read().decode()}")
                answer.read()

    with ThreadPoolExecutor(POSTERS) as pool:
        for done in [pool.submit(post, part) for part in range(POSTERS)]:
            done.result()
