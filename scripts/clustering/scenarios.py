"""The scenarios: each makes one part of a cluster fail while the clients post, and then proves that nothing is lost.

A failure finds most bugs while posts are in flight: some are stored and not acknowledged, others not yet stored.  So
every failure follows a burst of posts after a few milliseconds at random.  The seed is fixed.

`partition` stops the link instead of closing it.  A closed connection fails at once.  The bytes on a stalled one wait,
and arrive later.  The node must notice by itself that Redis does not answer, keep its clients, and catch up.
"""
# ruff: noqa: T201 -- a script prints

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall

from chatd.client.address import ServerAddress
from chatd.load.figures import BUSY
from clustering.load import Load, Row
from clustering.processes import LONG, Cluster, RigError, Tools, say, sleep, until

PROGRESS: Final = 5.0
"""Seconds between lines of progress."""
SILENT: Final = 7.0
"""Seconds in which a node notices that Redis does not answer."""
BURST, WITHIN = 0.1, 0.01
"""Share of the clients that post at once before a failure, and the longest time before it in seconds."""


class Run(NamedTuple):
    """A cluster and its clients, to which a scenario happens."""

    reactor: Any
    cluster: Cluster
    load: Load
    options: argparse.Namespace
    chance: Random

    def sleep(self, seconds: float) -> "Deferred[None]":
        """Let the clients post for a number of seconds."""
        return sleep(self.reactor, seconds)

    async def strike(self, act: Callable[[], object]) -> None:
        """Call `act` while many posts are in flight, some of them stored but not acknowledged."""
        for member in self.chance.sample(self.load.members, math.ceil(len(self.load.members) * BURST)):
            member.post(time.monotonic())
        await self.sleep(self.chance.uniform(0, WITHIN))
        act()


async def roll(run: Run) -> Row:
    """Stop each node in turn by SIGTERM, wait for its drain, and start it again."""
    drains = []
    for node in run.cluster.nodes:
        say(f"SIGTERM to {node.name}; connections: {run.cluster.spread()}")
        begin = time.monotonic()
        await run.strike(lambda node=node: node.signal(signal.SIGTERM))
        status = await node.ended(run.options.drain + LONG)
        drains.append(round(time.monotonic() - begin, 1))
        if status != -signal.SIGTERM:
            run.load.ledger.fault("broken", f"{node.name} ended with status {status}")
        node.start()
        await node.ready()
        await run.cluster.balancer.up(node)
        say(f"{node.name} drained in {drains[-1]} s and is up again")
        await run.sleep(run.options.lead)
    return {"drains_s": drains}


async def kill(run: Run) -> Row:
    """Kill the node with the most clients and start it again, repeatedly."""
    starts, begin = [], time.monotonic()
    while time.monotonic() < begin + run.options.seconds:
        due, status = time.monotonic() + run.options.every, run.cluster.balancer.status()
        node = max(run.cluster.nodes, key=lambda node: status[node.name][1])
        say(f"kill -9 of {node.name}; connections: {run.cluster.spread()}")
        await run.strike(lambda node=node: node.signal(signal.SIGKILL))
        await node.ended()
        node.start()
        starts.append(round(await node.ready(), 1))
        await run.sleep(max(0.0, due - time.monotonic()))
    return {"kills": len(starts), "starts_s": starts}


async def _restart(run: Run, how: str, end: Callable[[], object]) -> Row:
    back = []
    for _ in range(run.options.times):
        say(f"{how} of Redis; it starts again after {run.options.down:g} s")
        await run.strike(end)
        await run.cluster.redis.ended()
        await run.sleep(run.options.down)
        run.cluster.redis.start()
        await run.cluster.redis.ready()
        begin = time.monotonic()
        for node in run.cluster.nodes:
            await node.ready()
        back.append(round(time.monotonic() - begin, 2))
        say(f"all nodes are ready {back[-1]} s after Redis")
        await run.sleep(run.options.every)
    return {"restarts": len(back), "nodes_back_s": back}


async def shutdown(run: Run) -> Row:
    """Restart Redis by SHUTDOWN."""

    def end() -> None:
        with contextlib.suppress(EOFError, OSError):
            run.cluster.redis.ask("SHUTDOWN")

    return await _restart(run, "SHUTDOWN", end)


async def kill_redis(run: Run) -> Row:
    """Restart Redis by kill -9."""
    return await _restart(run, "kill -9", lambda: run.cluster.redis.signal(signal.SIGKILL))


async def partition(run: Run) -> Row:
    """Cut a node off from Redis for a while.  It must keep its clients and catch up."""
    link, load, node = run.cluster.link, run.load, run.cluster.nodes[0]
    if link is None:
        raise RigError("there is no link")
    say(f"{node.name} is cut off from Redis; connections: {run.cluster.spread()}")
    before = sum(load.losses.values())
    await run.strike(lambda: link.signal(signal.SIGSTOP))
    await run.sleep(run.options.cut)
    status, words = await node.readiness()
    behind = [member.reader for member in load.members if member.reader.cursor < load.ledger.head - 1]
    refused = sum(load.refusals.values())
    say(f"{len(behind)} clients are behind, {refused} posts were refused; {node.name}: {status} {words.rstrip()!r}")
    head, begin = load.ledger.head, time.monotonic()
    link.signal(signal.SIGCONT)
    await until(run.reactor, lambda: load.least() >= head, lambda: "some clients have not caught up")
    caught_up = time.monotonic() - begin
    say(f"healed; all clients caught up after {caught_up:.2f} s")
    await node.ready()
    ready = time.monotonic() - begin
    await run.sleep(run.options.cut / 3)
    lost = sum(load.losses.values()) - before
    if lost:
        load.ledger.fault("broken", f"{lost} connections ended during the cut", lost)
    if run.options.cut > SILENT and not (behind and refused):
        load.ledger.fault(
            "broken", f"the link did not stall: {len(behind)} clients were behind, {refused} posts refused"
        )
    return {
        "clients_behind": len(behind),
        "posts_refused": refused,
        "readyz": f"{status} {words.strip()}",
        "caught_up_s": round(caught_up, 2),
        "ready_s": round(ready, 2),
    }


class Scenario(NamedTuple):
    """An act, and the settings of the cluster to which it happens."""

    act: Callable[[Run], Awaitable[Row]]
    fsync: str = "everysec"
    link: bool = False


SCENARIOS: Final = {
    "roll": {"roll": Scenario(roll)},
    "kill": {"kill": Scenario(kill)},
    "restart": {"restart, SHUTDOWN": Scenario(shutdown), "restart, kill -9": Scenario(kill_redis, "always")},
    "partition": {"partition": Scenario(partition, link=True)},
}


async def prove(reactor: Any, tools: Tools, options: argparse.Namespace, name: str, scenario: Scenario) -> Row:
    """Run one scenario, print its report, and return its figures."""
    print(f"{name}: {options.clients:,} clients, {options.rate:g} posts/s, appendfsync {scenario.fsync}", flush=True)
    with Cluster(reactor, tools, options, fsync=scenario.fsync, link=scenario.link) as cluster:
        await cluster.start()
        balancer = cluster.balancer
        load = Load(reactor, [ServerAddress.parse(f"ws://{balancer.host}:{balancer.port}/")], options.clients)
        progress = LoopingCall(lambda: say(str(load)))
        await load.join()
        load.start(options.rate)
        progress.start(PROGRESS, now=False)
        run, done = Run(reactor, cluster, load, options, Random(1)), {}  # noqa: S311 -- repeatable
        try:
            await sleep(reactor, options.lead)
            try:
                done = await scenario.act(run)
            except RigError as error:
                load.ledger.fault("broken", str(error))
            await sleep(reactor, options.lead)
            await load.settle()
        finally:
            progress.stop()
        load.ledger.conclude(await cluster.logs(load.ledger.epoch))
        await load.stop()
    row = {"scenario": name} | done | load.figures()
    print(report(row, done), flush=True)
    return row


def report(row: Row, done: Row) -> str:
    """Return the report of a scenario, as lines."""
    faults = ", ".join(f"{kind} {count}" for kind, count in row["faults"].items())
    lines = [f"{row['scenario']}: {faults}", *(f"  {line}" for line in row["first_faults"])]
    lines.append(
        f"  {row['posted']:,} posted in {row['seconds']:g} s, {row['acknowledged']:,} acknowledged, "
        f"{row['acknowledged_again']:,} of them stored by an earlier attempt; {row['delivered']:,} deliveries"
    )
    lines.append("  " + "; ".join(f"{key} {value}" for key, value in done.items()))
    losses = ", ".join(f"{count:,} {why}" for why, count in row["connections_lost"].items())
    lines.append(f"  connections ended: {losses or 'none'}")
    lines += [f"  {count:,} times {why}" for why, count in row["refusals"].items()]
    for name in ("late", "away", "ack"):
        if row[f"{name}_ms"]:
            figures = "  ".join(f"{key} {figure:,.0f}" for key, figure in row[f"{name}_ms"].items())
            lines.append(f"  {name:<5} {figures} ms")
    if (row["load_cpu"] or 0) >= BUSY:
        lines.append(f"  busy: the clients used {row['load_cpu']:.0%} of a core; the times include their own delays")
    return "\n".join(lines)
