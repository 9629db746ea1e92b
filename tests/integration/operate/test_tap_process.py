"""Signals that end a server process."""

import signal

from support.servers import Raw, Server


def test_hangup_drains_and_ends_the_process(tmp_path):
    """SIGHUP has the effect of SIGTERM, and a second one makes the drain immediate.

    The budget is long: at its end a drain aborts connections, and a machine that stalls for a second would reach it.
    """
    with Server(tmp_path, "--drain=60") as server, Raw(server.port) as client:
        client.join()
        server.terminate(signal.SIGHUP)
        server.log.wait("draining")
        server.terminate(signal.SIGHUP)
        assert client.closed() == 1012
        server.stopped(signal.SIGHUP)
