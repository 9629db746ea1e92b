"""scripts/bench: its checks and its reports; its figures are not tested."""

import json
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from support.servers import LONG, ROOT
from support.websocket_frames import PING, PONG, frame

sys.path.append(str(ROOT / "scripts"))

from benching import messages, plot, report, server, storm, streams

from chatd.transport.deflate import compressor, inflate
from chatd.transport.framing import masked_texts, payload, text_frame

BENCH = ROOT / "scripts" / "bench"
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
        self.reference = streams.Reference(GREETING, 2, 1)
        self.first = streams.First(self.pairs[0][0], self.reference, 0, sampled=True)
        self.other = streams.Client(self.pairs[1][0], self.reference, 1, sampled=True)
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
    known = {"--modes", "--clients", "--rooms", "--rate", "--seconds", "--stores", "--compress", "--rounds"}
    assert known | {"--json", "--plot"} <= {*result.stdout.split()}
    assert {"steady", "saturated", "rooms", "storm"} <= {*result.stdout.split()}
    assert "work and conn/CPU s are deliveries and connections per second of the server's CPU time" in result.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--clients", "0"],
        ["--clients", "x"],
        ["--stores", "disk:"],
        ["--seconds", "nan"],
        ["--fast"],
        ["--modes", "fast"],
        ["--compress", "maybe"],
        ["--modes", "rooms", "--clients", "10,200"],
        ["--modes", "storm", "--rate", "0"],
        ["--modes", "storm", "--stores", "memory:"],
    ],
    ids=" ".join,
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


def test_short_run_of_many_rooms_and_of_a_storm(tmp_path):
    """With compression a delivery has fewer bytes, and after kill -9 nothing is lost or doubled."""
    figures, drawing = tmp_path / "figures.json", tmp_path / "drawing.svg"
    options = "--modes=rooms,storm", "--clients=12", "--rooms=2", "--stores=sqlite:", "--compress=off,on"
    result = run(*options, "--seconds=0.2", "--rounds=1", f"--json={figures}", f"--plot={drawing}")
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["mode"], row["compress"], row["exactly_once_in_order"]) for row in rows] == [
        (mode, compress, True) for mode in ("rooms", "storm") for compress in ("off", "on")
    ]
    plain, packed, *storms = rows
    assert packed["bytes_per_delivery"] < plain["bytes_per_delivery"] / 2
    assert "compression, sqlite:, 12 clients, 2 rooms, rooms: " in result.stdout
    for row in storms:
        assert (row["lost"], row["doubled"]) == (0, 0)
        assert row["messages"] >= row["repeated"] > 0
        assert 0 < row["ready_s"] < row["p50_s"] <= row["p99_s"] <= row["max_s"]
    assert ET.parse(drawing).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_percentiles_are_nearest_ranks():
    ordered = [float(value) for value in range(1, 101)]
    assert [server.percentile(ordered, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert [server.percentile([7.0], percent) for percent in (50, 99)] == [7, 7]
    assert server.percentile([1.0, 2.0], 50) == 1


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
    with pytest.raises(messages.StreamError, match=r"came where message \d and post \d were due"):
        clients.first.take(b"".join(mutant))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
@pytest.mark.parametrize("early", [False, True], ids=["when it comes", "when the first has more"])
def test_every_other_client_notices_a_message_that_is(clients, mutant, early):
    both = [(clients.first, STREAM), (clients.other, mutant)]
    (one, before), (two, after) = reversed(both) if early else both
    one.take(b"".join(before))
    with pytest.raises(messages.StreamError, match="client 1 of main got"):
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
    received = {
        clients.first: ping + b"".join(STREAM),
        clients.other: STREAM[0] + ping + b"".join(STREAM[1:]) + ping,
    }
    for client, stream in received.items():
        for start in range(0, len(stream), size):
            client.take(stream[start : start + size])
    assert clients.other.position == clients.first.position == len(GREETING + b"".join(STREAM))
    pong = frame(PONG, b"now", mask=messages.MASK)
    assert clients.pairs[0][1].recv(1000) == pong
    assert clients.pairs[1][1].recv(1000) == pong * 2
    assert not clients.reference.ahead


# Compressed streams


TEXTS = [payload(message(3 + place, place)) for place in range(12)]


def packed(texts):
    """The frames of a room's stream that begins with these texts, as the server makes them."""
    compress = compressor()
    return [compress(text_frame(text)) for text in texts]


def ways():
    """Pairs of streams with the same texts: of the first client and of another."""
    whole = packed(TEXTS)
    plain = [text_frame(text) for text in TEXTS]
    behind = whole[:3] + plain[3:5] + packed(TEXTS[5:])
    return {
        "in step": (whole, whole),
        "the other falls behind": (whole, behind),
        "the first falls behind": (behind, whole),
        "both fall behind": (behind, whole[:6] + plain[6:7] + packed(TEXTS[7:])),
        "only the first is compressed": (whole, plain),
    }


WAYS = ways()


@pytest.mark.parametrize("size", [1, 50, 10_000])
@pytest.mark.parametrize("early", [False, True], ids=["first", "other first"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_compressed_streams_with_the_same_texts(clients, way, early, size):
    first, other = map(b"".join, way)
    for start in range(0, len(first + other), size):
        for client, stream in ((clients.other, other), (clients.first, first))[:: 1 if early else -1]:
            client.take(stream[start : start + size])
    assert clients.first.position == clients.other.position == len(GREETING) + len(first)
    assert clients.other.received == len(GREETING) + len(other)
    assert clients.first.received == len(GREETING) + len(first)
    assert len(clients.other.latencies) == len(TEXTS)
    assert not clients.reference.ahead


@pytest.mark.parametrize("change", [lambda f: f[:-1], lambda f: f[-2:] + f, lambda f: f[1:] + f[:1]])
def test_client_that_is_apart_notices_a_wrong_text(clients, change):
    """One lost, one doubled, one swapped: in frames that are not those of the first client."""
    plain = [text_frame(text) for text in TEXTS]
    clients.first.take(b"".join(packed(TEXTS)))
    clients.other.take(b"".join(plain[:5]))
    wrong = change(plain[5:])
    if wrong == plain[5:-1]:
        clients.other.take(b"".join(wrong))
        assert clients.other.position < clients.first.position
        return
    with pytest.raises(messages.StreamError, match="client 1 of main got"):
        clients.other.take(b"".join(wrong))


def test_client_that_is_apart_notices_bytes_that_cannot_be_inflated(clients):
    whole = packed(TEXTS)
    clients.first.take(b"".join(text_frame(text) for text in TEXTS))
    clients.other.take(b"".join(whole[:5]))
    with pytest.raises(messages.StreamError, match=r"cannot be inflated|got b"):
        clients.other.take(b"".join(whole[7:]))


def test_posts_of_clients_that_compress():
    """A server inflates each post for itself."""
    plain, packed = (messages.post_frame(3, 7, 12, label="a", compress=compress) for compress in (False, True))
    (text,) = masked_texts(plain, 1000)
    assert [*masked_texts(packed, 1000, lambda data: inflate(data, 1000))] == [text]
    assert messages.facts(json.loads(text)["message"]) == (3, 7, 12)
    assert json.loads(text)["label"] == "a"


# The storm


def entry(number, text, epoch="epoch"):
    document = {"type": "message", "id": f"{epoch}-{number}", "data": {"username": "a", "message": text}}
    return text_frame(json.dumps(document, separators=(",", ":")).encode())


def history(last, *texts, epoch="epoch", **more):
    data = [{"username": "a", "message": text} for text in texts]
    document = {"type": "history", "id": f"{epoch}-{last}", **more, "data": data}
    return text_frame(json.dumps(document, separators=(",", ":")).encode())


@pytest.fixture
def reader():
    reader = storm.Reader(storm.Ledger())
    reader.take(history(1, "Hello!") + entry(2, "0 0 1 a") + entry(3, "0 1 1 b"))
    reader.connected()
    return reader


def test_reader_resumes_without_a_fault(reader):
    reader.take(history(4, "0 2 1 c", resumed=True) + entry(5, "0 3 1 d"))
    assert (reader.number, reader.lost, reader.doubled) == (5, 0, 0)
    assert len(reader._ledger.places) == 4


@pytest.mark.parametrize(
    ("frames", "lost", "doubled"),
    [
        (history(4, "0 1 1 b", "0 2 1 c", resumed=True), 0, 1),
        (history(5, "0 3 1 d", resumed=True), 1, 0),
        (history(3, resumed=True) + entry(6, "0 5 1 f"), 2, 0),
        (history(4, "0 2 1 c", resumed=True) + entry(4, "0 2 1 c"), 0, 1),
    ],
    ids=["overlap", "gap before the history", "gap after the history", "message again"],
)
def test_reader_counts_what_is_lost_and_doubled(reader, frames, lost, doubled):
    reader.take(frames)
    assert (reader.lost, reader.doubled) == (lost, doubled)


def test_ledger_counts_a_post_that_was_stored_twice(reader):
    reader.take(history(4, "0 1 1 b", resumed=True))
    assert reader._ledger.doubled == 1


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        (history(1, "Hello!", resumed=False), "could not resume"),
        (history(4, "0 2 1 c", epoch="other", resumed=True), "its epoch was epoch and is other"),
        (history(3, "0 9 1 x", resumed=True), "message 3 was '0 1 1 b', and is '0 9 1 x'"),
        (entry(4, "0 2 1 c"), "the server sent"),
    ],
    ids=["fresh start", "other epoch", "other text", "no history"],
)
def test_reader_ends_the_storm_at_a_log_that_changed(reader, frames, fault):
    with pytest.raises(messages.StreamError, match=fault):
        reader.take(frames)


# The report


def row(mode, compress, **more):
    about = {"store": "sqlite:", "compress": compress, "clients": 10, "rooms": 2 if mode == "rooms" else 1}
    return about | {"mode": mode, "exactly_once_in_order": True, "limit": ""} | more


def test_median_of_rounds_keeps_the_worst_of_faults():
    rounds = [{"work": 1.0, "lost": 0}, {"work": 5.0, "lost": 7, "fault": "7 lost"}, {"work": 2.0, "lost": 0}]
    merged = report.median(rounds)
    assert (merged["work"], merged["lost"], merged["exactly_once_in_order"]) == (2.0, 7, False)


def test_compression_is_compared_with_its_plain_row():
    rows = [row("rooms", "off", bytes_per_delivery=200, work=100), row("rooms", "on", bytes_per_delivery=80, work=90)]
    (only,) = report.comparisons([*rows, row("storm", "on")])
    assert only == "compression, sqlite:, 10 clients, 2 rooms, rooms: 200 to 80 bytes a delivery (÷ 2.5), work x 0.90"


def test_drawing_shows_each_kind_of_figure():
    sizes = {"bytes_per_delivery": 100, "work": 1000, "p99_ms": 5.0}
    rows = [row(mode, compress, **sizes) for mode in ("50/s", "saturated", "rooms") for compress in ("off", "on")]
    rows.append(row("storm", "off", p50_s=1.0, p99_s=2.5))
    drawn = "".join(ET.fromstring(plot.plot(rows, "a machine")).itertext())
    for words in ("p99 latency", "saturated", "many rooms", "bytes on the wire", "kill -9", "1.00, 2.50", "a machine"):
        assert words in drawn
    assert "kill -9" not in "".join(ET.fromstring(plot.plot(rows[:-1], "")).itertext())
