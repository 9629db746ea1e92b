"""The parts that the command lines of `python -m chatd.load`, scripts/cluster and scripts/bench share.

scripts/bench imports it before the environment exists, so it needs the standard library only.
"""

import argparse
import math
import os
import resource
from collections.abc import Callable
from typing import Any, Final, NoReturn

LARGEST: Final = 1_000_000
"""The largest number that an option accepts."""


class Parser(argparse.ArgumentParser):
    """A command line that reports an error in one line, and whose options cannot be abbreviated.

    `name` begins each error, and `status` is its exit status.
    """

    def __init__(self, name: str, status: int, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._name, self._status = name, status

    def error(self, message: str) -> NoReturn:
        self.exit(self._status, f"{self._name}: {message}: see --help\n")


def number_from(least: float, kind: type[float] = float) -> Callable[[str], Any]:
    """Return a parser of numbers from `least` to LARGEST; with `kind=int` they must be whole."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= LARGEST:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {least:g} to {LARGEST:,}")
        return value

    return parse


def allow_files(count: int) -> str | None:
    """Raise the limit of open files for `count` more; return the remedy in one line if that is not permitted."""
    count += len(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- names suffice
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < count:
        return f"{count} open files are needed, and {hard} are allowed: use fewer --clients, or raise `ulimit -Hn`"
    if resource.RLIM_INFINITY != soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return None
