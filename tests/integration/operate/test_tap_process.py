"""The process of the server under twistd: its start as a daemon, its signals, its log, its clock and its open files."""

import contextlib
import os
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import time

import pytest
from support.raw_clients import RawMember
from support.servers import LONG, LOOPBACK, TWISTD, Raw, Server, certificate_for, environment, post, run, upgrade
from support.websocket_frames import PING, PONG, frame


def status(port, path="/readyz"):
    """Request a page from a server; return the status."""
    with Raw(port) as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return client.head()[0]


# Failed starts


@pytest.mark.parametrize("flags", [(), ("-n",)])
@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--listen=tcp:{port}:interface=127.0.0.1", r"cannot listen on tcp:\d+:interface=127.0.0.1 \(.*in use\): .*"),
        ("--store=sqlite:missing/chatd.sqlite", r"missing cannot be written \(.*\): create the folder, .*"),
        ("--listen=systemd:domain=INET:index=0", r"--listen: .*systemd passed no such socket.*"),
    ],
)
def test_failed_start_is_one_line(tmp_path, flags, option, line):
    """A daemon too ends with one line on standard error, status 1 and no pid file, and keeps nobody waiting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = f"--listen={LOOPBACK}", "--admin=", option.format(port=taken.getsockname()[1])
        result = run(*options[option.startswith("--listen") :], cwd=tmp_path, flags=flags)
    assert result.returncode == 1
    assert re.fullmatch(f"chatd: {line}\n", result.stderr), result.stderr
    assert not (tmp_path / "twistd.pid").exists()


# Signals


@contextlib.contextmanager
def daemon(folder, *options):
    """A server that twistd starts as a daemon in a folder; its pidfd."""
    result = run(f"--listen={LOOPBACK}", "--admin=", "--drain=1", *options, cwd=folder, flags=())
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    process = os.pidfd_open(int((folder / "twistd.pid").read_text()))
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


def await_text(file, text):
    """Wait until a file contains a text."""
    end = time.monotonic() + LONG
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < end, text
        select.select([], [], [], 0.01)


def test_signals_of_a_daemon(tmp_path):
    """SIGUSR1 rotates the log, SIGHUP opens its file again, and SIGTERM removes the pid file."""
    log, rotated, moved = (tmp_path / name for name in ("twistd.log", "twistd.log.1", "moved"))
    with daemon(tmp_path) as process:
        signal.pidfd_send_signal(process, signal.SIGUSR1)
        await_text(rotated, "ready, with the log")
        await_text(log, "")
        log.rename(moved)
        signal.pidfd_send_signal(process, signal.SIGHUP)
        await_text(moved, "reloading")
        await_text(log, "")
        signal.pidfd_send_signal(process, signal.SIGTERM)
        assert select.select([process], [], [], LONG)[0]
    assert "Server Shut Down" in log.read_text()
    assert not (tmp_path / "twistd.pid").exists()


def served(port):
    """Return the certificate of a port."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), LONG) as plain, context.wrap_socket(plain) as client:
        return client.getpeercert(binary_form=True)


def test_hangup_reads_a_new_certificate(tmp_path):
    """SIGHUP replaces the certificate of an open port, and ends nothing."""
    arguments, _ = certificate_for(tmp_path)
    with Server(tmp_path, listen=f"ssl:0:interface=127.0.0.1:{arguments}") as server:
        old = served(server.port)
        certificate_for(tmp_path)
        server.terminate(signal.SIGHUP)
        server.log.wait("read the certificate of ssl:0:")
        assert served(server.port) != old
        server.stop()


# The log


def test_full_pipe_does_not_stall_the_server(tmp_path):
    """A reader of the log that stops reading holds up nobody, and gets every line when it goes on."""
    reading, writing = os.pipe()
    command = [sys.executable, TWISTD, "-n", "--pidfile=", "chatd", f"--listen={LOOPBACK}", "--admin=", "--drain=1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as log:
            port = next(int(found[1]) for line in log if (found := re.search(r"ChatFactory starting on (\d+)", line)))
            clients = 500
            for _ in range(clients):
                with Raw(port) as client:
                    client.join()
            assert status(port) == 200
            process.terminate()
            text = log.read()
        assert process.wait(LONG) == -signal.SIGTERM
    assert text.count(" joined") == text.count(" left") == clients
    assert "Server Shut Down" in text


# The clock

SET_BACK = """
import signal, time
seconds, step = time.time, [0]
time.time = lambda: seconds() + step[0]
signal.signal(signal.SIGUSR2, lambda *_: step.append(step.pop() - 86_400))
from twisted.scripts.twistd import run
run()
"""
"""twistd with a wall clock that SIGUSR2 sets back by a day."""


def test_timers_run_when_the_clock_is_set_back(tmp_path):
    """Pings, and all other timers, follow a monotonic clock."""
    with Server(tmp_path, "--ping=1", command=(sys.executable, "-c", SET_BACK)) as server, Raw(server.port) as client:
        client.join()
        server.terminate(signal.SIGUSR2)
        for _ in range(2):
            assert client.frame()[0] == PING
            client.send(frame(PONG, b""))
        server.stop()


# Open files


def test_admin_port_answers_at_the_limit_of_open_files(tmp_path):
    """Clients leave a reserve of open files, stay, and may enter when others have left; new ones are told to wait."""
    limited = "sh", "-c", 'ulimit -n 90 && exec "$@"', "sh", sys.executable, TWISTD
    with Server(tmp_path, admin=LOOPBACK, command=limited) as server, RawMember(server.port) as member:
        with contextlib.ExitStack() as clients:
            crowd = [clients.enter_context(Raw(server.port)) for _ in range(90)]
            server.log.wait("refused 1 clients: all but the reserve of 90 open files is in use")
            assert status(server.admin_port) == status(server.admin_port, "/metrics") == 200
            assert crowd[-1].rest() == b""
            crowd[0].send(upgrade("/rooms/full"))  # only one: its file is free when it has left, and others may enter
            code, head = crowd[0].head()
            assert code == 503
            assert "\r\nRetry-After: " in head
            member.send(post("ann", "still here"))
            assert member.answer()["data"]["message"] == "still here"
        while not open_again(server.port):
            select.select([], [], [], 0.01)
        assert server.log.text.count("open files is in use") == 1
        server.stop()


def open_again(port):
    try:
        return status(port) == 200
    except EOFError:
        return False


def test_two_ports_of_one_number(tmp_path):
    """tcp:P and tcp6:P serve side by side."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Server(tmp_path, f"--listen=tcp6:{port}", listen=f"tcp:{port}") as server:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, port), LONG) as client:
                client.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert client.recv(99).startswith(b"HTTP/1.1 200")
        server.stop()
