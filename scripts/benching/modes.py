"""The measurements, and their order.

The speed of a machine drifts by a third within minutes.  So the stores, and the servers with and without compression,
take turns within each round, and a row has the median of each figure over the rounds.  Compare rows that
took turns; others compare only roughly.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from benching import load, storm
from benching.load import Case, Row
from benching.report import median

STEADY, SATURATED, ROOMS, STORM = "steady", "saturated", "rooms", "storm"
MODES: Final = (STEADY, SATURATED, ROOMS, STORM)
DURABLE: Final = "sqlite:"
"""The store of a storm: `memory:` loses its messages with the server."""


class Turn(NamedTuple):
    """Cases that are measured in turns: the names of their rows, and how to measure one."""

    modes: Sequence[str]
    cases: Sequence[Case]
    measure: Callable[[Case], Sequence[Row]]


def turns(options: argparse.Namespace, core: int) -> Iterator[Turn]:
    """Return what the options ask for."""
    rates = {f"{options.rate:g}/s": options.rate} if STEADY in options.modes and options.rate else {}
    rates |= {SATURATED: 0} if SATURATED in options.modes else {}

    def cases(stores: Sequence[str], clients: int, rooms: int) -> list[Case]:
        return [Case(store, clients, rooms, one) for store, one in itertools.product(stores, options.compress)]

    for clients in options.clients if rates else ():
        yield Turn(
            [*rates],
            cases(options.stores, clients, 1),
            lambda case: load.measure(case, [*rates.values()], options.seconds, core),
        )
    for clients, rooms in itertools.product(options.clients, options.rooms) if ROOMS in options.modes else ():
        yield Turn(
            [ROOMS], cases(options.stores, clients, rooms), lambda case: load.measure(case, [0], options.seconds, core)
        )
    for clients in options.clients if STORM in options.modes else ():
        yield Turn(
            [STORM],
            cases([DURABLE], clients, 1),
            lambda case: [storm.measure(case, options.rate, options.seconds, core)],
        )


def play(turn: Turn, rounds: int) -> Iterator[Row]:
    """Measure the cases in turns; return a row for each case and mode."""
    taken = [[turn.measure(case) for case in turn.cases] for _ in range(rounds)]
    for case, several in zip(turn.cases, zip(*taken, strict=True), strict=True):
        about = case._asdict() | {"compress": "on" if case.compress else "off"}
        for mode, rows in zip(turn.modes, zip(*several, strict=True), strict=True):
            yield about | {"mode": mode} | median(rows)
