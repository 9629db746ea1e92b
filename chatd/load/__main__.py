"""The command line of `python -m chatd.load`, which runs a trial in the global reactor."""

import argparse
import gc
import json
import re
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, TextIO

from twisted.internet.error import ReactorNotRunning
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.python.failure import Failure

from chatd.client.address import ServerAddress
from chatd.load.figures import Progress, summary
from chatd.load.options import Parser, allow_files, number_from
from chatd.load.trial import UNTRIED, Trial
from chatd.operate.clock import use_monotonic_clock
from chatd.transport.admission import SHARED_PATH
from chatd.transport.subscription import MAX_SUBSCRIPTIONS

STARTED: Final = "python -m chatd.load"
"""The command that starts this program, unless the command `chatd` does.  Its last word begins each error."""
SPARE: Final = 50
"""Open files besides those of the clients."""
GARBAGE: Final = 100_000
"""The threshold of the garbage collector: rare, since nothing here makes cycles."""
_ROOM = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _address(text: str) -> ServerAddress:
    try:
        return ServerAddress.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _room(text: str) -> str:
    if not _ROOM.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a room, such as team-7")
    return text


def _extra(text: str) -> dict[str, Any]:
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(extra, dict) or not extra:
        raise argparse.ArgumentTypeError(f"{text!r} is not an object with fields")
    return extra


def arguments(words: Sequence[str], started: str = STARTED) -> argparse.Namespace:
    """Parse what follows the command `started`; raise SystemExit, with one line on standard error, if it is wrong."""
    program = started.rsplit(maxsplit=1)[-1]
    parser = Parser(
        program,
        UNTRIED,
        prog=started,
        description="Prove under load that a server loses nothing, whatever is disconnected or killed meanwhile.",
        epilog="Exit status: 0, proved; 1, refuted, and one line names the fault; 2, the trial could not run.",
    )
    add = parser.add_argument
    add("url", type=_address, metavar="URL", help="ws://HOST:PORT/ for a new room, or .../rooms/NAME; wss: for TLS")
    add("--room", type=_room, metavar="NAME", help="the room, which overrides that of the URL")
    add(
        "--rooms",
        type=number_from(1, int),
        default=0,
        metavar="N",
        help="rooms that each client joins over one connection; they are named after --room [one room, by its URL]",
    )
    add("--clients", type=number_from(1, int), default=100, metavar="N", help="number of clients [%(default)s]")
    add("--posters", type=number_from(1, int), metavar="N", help="number of clients that post [all]")
    add(
        "--rate",
        type=number_from(0),
        default=100.0,
        metavar="N",
        help="posts a second; 0: as many as possible [%(default)g]",
    )
    much = parser.add_mutually_exclusive_group()
    much.add_argument(
        "--seconds", type=number_from(0.001), default=10.0, metavar="N", help="time of posting [%(default)g]"
    )
    much.add_argument("--messages", type=number_from(1, int), metavar="N", help="number of posts, instead of a time")
    add(
        "--cut",
        type=number_from(0),
        default=10.0,
        metavar="SECONDS",
        help="mean time between disconnections of a client; 0: none [%(default)g]",
    )
    add(
        "--patience",
        type=number_from(0.001),
        default=60.0,
        metavar="SECONDS",
        help="longest time without progress [%(default)g]",
    )
    add("--extra", type=_extra, metavar="JSON", help="an object of further fields, which each post has")
    add("--seed", type=int, default=1, metavar="N", help="seed of the random choices [%(default)s]")
    add("--lenient", action="store_true", help="accept a new log, as of a restarted server with memory:")
    add("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(words)
    options.program = program
    options.posters = min(options.posters or options.clients, options.clients)
    if options.rooms > MAX_SUBSCRIPTIONS:
        parser.error(f"argument --rooms: a connection is in {MAX_SUBSCRIPTIONS:,} rooms at most")
    if options.rooms and options.url.path not in ("/", SHARED_PATH):
        parser.error(f"argument --rooms: the URL names the room {options.url.path}: use --room for the names")
    return options


def main(words: Sequence[str], reactor: Any, out: TextIO, err: TextIO, started: str = STARTED) -> int:
    """Run a trial, and return the exit status."""
    options = arguments(words, started)
    problem = allow_files(options.clients + SPARE)
    if problem:
        err.write(f"{options.program}: {problem}\n")
        return UNTRIED
    run = secrets.token_hex(3)
    address: ServerAddress = options.url
    if options.rooms:
        address = address._replace(path=SHARED_PATH)
    elif options.room or address.path == "/":
        address = address._replace(path=f"/rooms/{options.room or f'load-{run}'}")
    trial = Trial(options, address, run, reactor, Progress(err, reactor.seconds))
    ended: list[int | Failure] = []

    def end(result: int | Failure) -> None:
        ended.append(result)
        with suppress(ReactorNotRunning):  # an interrupt is stopping it already
            reactor.stop()

    trial.done.addBoth(end)
    reactor.callWhenRunning(trial.start)
    reactor.addSystemEventTrigger("before", "shutdown", trial.interrupt)
    reactor.run()
    (result,) = ended
    if isinstance(result, Failure):
        result.raiseException()
    report = trial.report()
    if options.json:
        out.write(json.dumps(report) + "\n")
    elif result != UNTRIED:
        out.write(summary(report))
    if trial.fault:
        err.write(f"{options.program}: {trial.fault}\n")
    return result


def run(words: Sequence[str], started: str = STARTED) -> int:
    """Run a trial with the global reactor, and return the exit status."""
    from twisted.internet import reactor

    use_monotonic_clock(reactor)
    faults = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.critical)])
    globalLogBeginner.beginLoggingTo([faults], redirectStandardIO=False, discardBuffer=True)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    return main(words, reactor, sys.stdout, sys.stderr, started)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
