"""The name by which a script was started: `backup` by its path, or `chatd backup` by that command.

It needs only Python.
"""

# ruff: noqa: INP001 -- scripts import this module from their own folder

import argparse
import pathlib
import sys
from typing import Any

COMMAND = "chatd "
"""The start of the name that the command `chatd` gives to a script, as STARTED in its main module."""


class StartedParser(argparse.ArgumentParser):
    """A parser whose help names this script, and those beside it, as the user starts them."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._started: str = getattr(sys.modules["__main__"], "STARTED", pathlib.Path(sys.argv[0]).name)
        super().__init__(*words, **{"prog": self._started} | options)

    def format_help(self) -> str:
        """Return the help."""
        text = super().format_help()
        return text.replace("scripts/", COMMAND) if self._started.startswith(COMMAND) else text
