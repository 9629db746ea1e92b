"""Signals that end a server process."""

import signal

from support.servers import Raw, Server


def test_hangup_drains_and_ends_the_process(tmp_path):
    """SIGHUP has the effect of SIGTERM."""
    with Server(tmp_path) as server, Raw(server.port) as client:
        client.join()
        server.terminate(signal.SIGHUP)
        assert client.closed() == 1012
        server.stopped(signal.SIGHUP)
