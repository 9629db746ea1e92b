"""The command line of `python -m chatd.load`, and the composition of a trial; it uses the global reactor."""

import argparse
import gc
import json
import math
import re
import resource
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, TextIO

from twisted.internet.error import ReactorNotRunning
from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from twisted.python.failure import Failure

from chatd.client.client import ServerAddress
from chatd.load.figures import Progress, summary
from chatd.load.trial import UNTRIED, Trial

MOST: Final = 1_000_000
"""Of anything that is asked for."""
SPARE: Final = 50
"""Open files besides the clients'."""
GARBAGE: Final = 100_000
"""How many more young objects are reason to look for cycles among them."""
_ROOM = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """ArgumentParser.error."""
        self.exit(UNTRIED, f"chatd.load: {message}: see --help\n")


def _number(least: float, kind: type[float] = float) -> Callable[[str], Any]:
    """A parser of numbers from `least` up to a million."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not least <= number <= MOST:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {least:g} to {MOST:,}")
        return number

    return parse


def _address(text: str) -> ServerAddress:
    try:
        return ServerAddress.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _room(text: str) -> str:
    if not _ROOM.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a room, such as team-7")
    return text


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; SystemExit with one line for what is wrong with it."""
    parser = Parser(
        prog="python -m chatd.load",
        description="Prove, under load, that a server loses nothing, whatever is cut or killed meanwhile.",
        epilog="Exit status: 0, proved; 1, refuted, and one line says what and where; 2, it could not be tried.",
    )
    add = parser.add_argument
    add("url", type=_address, metavar="URL", help="ws://HOST:PORT/, for a new room, or .../rooms/NAME; wss: for TLS")
    add("--room", type=_room, metavar="NAME", help="the room, whatever the URL says")
    add("--clients", type=_number(1, int), default=100, metavar="N", help="how many read [%(default)s]")
    add("--posters", type=_number(1, int), metavar="N", help="how many of them post [all]")
    add("--rate", type=_number(0), default=100.0, metavar="N", help="posts a second; 0: what goes [%(default)g]")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--seconds", type=_number(0.001), default=10.0, metavar="N", help="how long [%(default)g]")
    much.add_argument("--messages", type=_number(1, int), metavar="N", help="how many posts, however long it takes")
    add("--cut", type=_number(0), default=10.0, metavar="SECONDS", help="each client's mean time between cuts; 0: none")
    add("--patience", type=_number(0.001), default=60.0, metavar="SECONDS", help="how long nothing may come")
    add("--seed", type=int, default=1, metavar="N", help="of what is random [%(default)s]")
    add("--lenient", action="store_true", help="a server that begins a new log, as one with memory: does, is no fault")
    add("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(words)
    options.posters = min(options.posters or options.clients, options.clients)
    return options


def allow_files(count: int) -> str | None:
    """See to it that so many files may be open; answers what to do about it if they may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < count:
        return f"{count} files are to be open, and {hard} may be: ask for fewer --clients, or raise `ulimit -Hn`"
    if resource.RLIM_INFINITY != soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return None


def main(words: Sequence[str], reactor: Any, out: TextIO, err: TextIO) -> int:
    """Run a trial; answers the exit status."""
    options = arguments(words)
    problem = allow_files(options.clients + SPARE)
    if problem:
        err.write(f"chatd.load: {problem}\n")
        return UNTRIED
    run = secrets.token_hex(3)
    address: ServerAddress = options.url
    if options.room or address.path == "/":
        address = address._replace(path=f"/rooms/{options.room or f'load-{run}'}")
    trial = Trial(options, address, run, reactor, Progress(err, reactor.seconds))
    ended: list[int | Failure] = []

    def end(result: int | Failure) -> None:
        ended.append(result)
        with suppress(ReactorNotRunning):  # it is stopping already, as someone wished
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
        err.write(f"chatd.load: {trial.fault}\n")
    return result


def run() -> int:
    """Run a trial as a program."""
    from twisted.internet import reactor

    faults = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.critical)])
    globalLogBeginner.beginLoggingTo([faults], redirectStandardIO=False, discardBuffer=True)
    gc.freeze()
    gc.set_threshold(GARBAGE)
    return main(sys.argv[1:], reactor, sys.stdout, sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
