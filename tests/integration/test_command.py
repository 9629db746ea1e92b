"""The programs of the command `chatd`, interrupted while they are starting."""

import signal
import subprocess
import sys

import pytest
from support.servers import LONG, ROOT, environment

SLOW = "import signal\nprint('importing', flush=True)\nsignal.pause()\n"
"""A module whose import lasts until a signal."""


@pytest.mark.parametrize("words", ["client ws://h/", "load ws://h/", "serve"])
def test_interrupt_while_importing(words, tmp_path):
    """Ctrl-C shows no traceback, and the process ends by SIGINT, for which shells report 130."""
    (tmp_path / "autobahn.py").write_text(SLOW)
    path = f"{tmp_path}:{ROOT}"
    with subprocess.Popen(
        [sys.executable, "-m", "chatd", *words.split()],
        cwd=tmp_path,
        env=environment(PYTHONPATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LONG)
    assert (out, err) == ("", "")
    assert process.returncode == -signal.SIGINT
