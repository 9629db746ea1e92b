"""scripts/bench: its checks and its reports; its figures are not tested."""

import json
import socket
import subprocess
import xml.etree.ElementTree as ET

import pytest
from support.servers import LONG, ROOT, program
from support.websocket_frames import PING, PONG, frame

BENCH = ROOT / "scripts" / "bench"

bench = program(BENCH)
GREETING = b"hello"


def run(*options):
    return subprocess.run([BENCH, *options], capture_output=True, text=True, timeout=LONG, check=False)


def message(number, sequence, sender=0):
    text = f"{sender} {sequence} 1 ..."
    document = {"type": "message", "id": f"epoch-{number}", "data": {"username": "a", "message": text}}
    return frame(1, json.dumps(document, separators=(",", ":")).encode(), masked=False)


STREAM = [message(3 + place, place) for place in range(4)]
MUTANTS = {
    "lost": [STREAM[0], *STREAM[2:]],
    "doubled": [*STREAM[:2], *STREAM[1:]],
    "swapped": [STREAM[0], STREAM[2], STREAM[1], STREAM[3]],
}


class Clients:
    """The first client and another, with real sockets to send pongs to."""

    def __init__(self):
        self.pairs = [socket.socketpair() for _ in range(2)]
        self.reference = bench.Reference(GREETING, 2, 1)
        self.first = bench.First(self.pairs[0][0], self.reference, 0, sampled=True)
        self.other = bench.Client(self.pairs[1][0], self.reference, 1, sampled=True)
        self.other.take(GREETING)

    def close(self):
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def clients():
    clients = Clients()
    yield clients
    clients.close()


def test_help_explains_the_options_and_the_columns():
    result = run("--help")
    assert result.returncode == 0
    assert {"--clients", "--rate", "--seconds", "--stores", "--rounds", "--json", "--plot"} <= {*result.stdout.split()}
    assert "work and conn/CPU s are deliveries and connections per second of the server's CPU time" in result.stdout


@pytest.mark.parametrize(
    "options", [["--clients", "0"], ["--clients", "x"], ["--stores", "disk:"], ["--seconds", "nan"], ["--fast"]]
)
def test_invalid_option_is_one_line(options):
    result = run(*options)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("bench: ")
    assert result.stderr.count("\n") == 1


def test_short_run_on_real_servers(tmp_path):
    figures, drawing = tmp_path / "figures.json", tmp_path / "drawing.svg"
    result = run("--clients=12", "--seconds=0.1", "--rounds=1", f"--json={figures}", f"--plot={drawing}")
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["store"], row["clients"], row["mode"]) for row in rows] == [
        (store, 12, mode) for store in ("memory:", "sqlite:") for mode in ("50/s", "saturated")
    ]
    for row in rows:
        assert row["exactly_once_in_order"] is True
        assert row["messages_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert row["rss_mb"] > 0
    assert sum(line.endswith(" yes") for line in result.stdout.splitlines()) == len(rows)
    assert ET.parse(drawing).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_percentiles_are_nearest_ranks():
    ordered = [float(value) for value in range(1, 101)]
    assert [bench.percentile(ordered, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert [bench.percentile([7.0], percent) for percent in (50, 99)] == [7, 7]
    assert bench.percentile([1.0, 2.0], 50) == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("order", [("first", "other"), ("other", "first")])
def test_correct_stream_in_any_pieces(clients, order, size):
    stream = b"".join(STREAM)
    for start in range(0, len(stream), size):
        for name in order:
            getattr(clients, name).take(stream[start : start + size])
    assert clients.first.position == clients.other.position == len(GREETING) + len(stream)
    assert clients.first.echoed == len(STREAM)
    assert [len(client.latencies) for client in (clients.first, clients.other)] == [len(STREAM)] * 2
    assert not clients.reference.ahead


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_first_client_notices_a_message_that_is(clients, mutant):
    with pytest.raises(bench.StreamError, match=r"came where message \d and post \d were due"):
        clients.first.take(b"".join(mutant))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
@pytest.mark.parametrize("early", [False, True], ids=["when it comes", "when the first has more"])
def test_every_other_client_notices_a_message_that_is(clients, mutant, early):
    streams = [(clients.first, STREAM), (clients.other, mutant)]
    (one, before), (two, after) = reversed(streams) if early else streams
    one.take(b"".join(before))
    with pytest.raises(bench.StreamError, match="client 1 got"):
        two.take(b"".join(after))


def test_last_message_lost_or_doubled_shows_at_the_end(clients):
    clients.first.take(b"".join(STREAM))
    clients.other.take(b"".join(STREAM[:-1]))
    assert clients.other.position < clients.first.position
    clients.other.take(STREAM[-1] * 2)
    assert clients.other in clients.reference.ahead


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_pings_are_answered_and_not_compared(clients, size):
    ping = frame(PING, b"now", masked=False)
    streams = {
        clients.first: ping + b"".join(STREAM),
        clients.other: STREAM[0] + ping + b"".join(STREAM[1:]) + ping,
    }
    for client, stream in streams.items():
        for start in range(0, len(stream), size):
            client.take(stream[start : start + size])
    assert clients.other.position == clients.first.position == len(GREETING + b"".join(STREAM))
    pong = frame(PONG, b"now", mask=bench.MASK)
    assert clients.pairs[0][1].recv(1000) == pong
    assert clients.pairs[1][1].recv(1000) == pong * 2
    assert not clients.reference.ahead
