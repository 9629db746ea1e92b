"""The terminal chat in pseudo-terminals."""

import codecs
import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from typing import ClassVar

from support.servers import LONG, environment

COMMAND = (sys.executable, "-m", "chatd.client")


def terminal_environment(folder, **changes):
    """Return the environment of the terminal chat, whose outbox is in a folder."""
    own = {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm"}
    return environment(**(own | changes))


class Tty:
    """The program in a pseudo-terminal, whose raw output is in `output`."""

    started: ClassVar[list[subprocess.Popen]] = []
    """The processes of all terminals, which a test that fails leaves behind."""

    def __init__(self, folder, *words, **changes):
        self._master, tty = pty.openpty()
        termios.tcsetwinsize(tty, (24, 80))
        self._before = termios.tcgetattr(tty)
        self._tty = tty
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            stdin=tty,
            stdout=tty,
            stderr=tty,
            env=terminal_environment(folder, **changes),
            process_group=0,
        )
        self.started.append(self.process)
        self.output = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                if b"\x1b[6n" in data:  # where is the cursor?
                    os.write(self._master, b"\x1b[1;1R")
                with self._changed:
                    self.output += decoder.decode(data)
                    self._changed.notify_all()

    def type(self, text):
        os.write(self._master, text.encode())

    def wait(self, pattern):
        with self._changed:
            assert self._changed.wait_for(lambda: re.search(pattern, self.output), LONG), self.output

    def end(self):
        """Wait for the end; return the status, and whether the terminal is as it was before."""
        status = self.process.wait(LONG)
        after = termios.tcgetattr(self._tty)
        self.close()
        return status, after == self._before

    def close(self):
        self.process.kill()
        self.process.wait(LONG)
        os.close(self._tty)
        self._thread.join(LONG)
        os.close(self._master)
