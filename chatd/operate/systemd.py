"""Notify systemd that the server is ready, that it stops, and regularly that it is alive.

This is sd_notify(3): lines of NAME=VALUE, in one datagram, to the socket that NOTIFY_SOCKET names.  With WatchdogSec
in the unit, systemd waits for WATCHDOG=1 too, and kills and restarts a server that has not sent it in time.  It is the
reactor that sends it, so a reactor that hangs is one that is restarted.  Outside systemd there is no
such socket, and nothing is sent.
"""

import os
import socket
from collections.abc import Mapping
from typing import Final

from twisted.logger import Logger

SEND_SECONDS: Final = 1
"""The time that the reactor waits for systemd to take a datagram.  It only waits if the queue is full."""

_logger = Logger()


class Notifier:
    """Sends notifications to the socket that the environment names, if there is one."""

    watchdog: float | None = None
    """The seconds between two WATCHDOG=1: half of the time-out of systemd; None without a watchdog."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero byte that an address in Linux's abstract namespace begins with.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        if path and environ.get("WATCHDOG_USEC") and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = int(environ["WATCHDOG_USEC"]) / 1_000_000 / 2

    def __call__(self, **values: str) -> None:
        """Send values.  A failure is logged and has no other effect."""
        if not self._address:
            return
        datagram = "\n".join(f"{name}={value}" for name, value in values.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(datagram.encode(), self._address)
        except OSError as error:
            _logger.warn("cannot notify systemd of {datagram!r}: {error}", datagram=datagram, error=error)

    def alive(self) -> None:
        """Feed the watchdog."""
        self(WATCHDOG="1")
