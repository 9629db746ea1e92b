"""The figures and the options of the load tool, without a server."""

import contextlib
import io

import pytest
from support.helpers import Terminal, count_held
from support.loops import reactor

from chatd.load import __main__ as program
from chatd.load.figures import Latencies, Progress, summary
from chatd.load.trial import UNTRIED, Trial

# Figures


def test_latencies_are_exact_to_two_percent():
    latencies = Latencies()
    assert latencies.figures() is None
    for milliseconds in range(1000, 0, -1):
        latencies.add(milliseconds / 1000)
    figures = latencies.figures()
    assert [*figures] == ["p50", "p95", "p99", "max"]
    for name, true in (("p50", 500), ("p95", 950), ("p99", 990)):
        assert true <= figures[name] <= 1.02 * true
    assert figures["max"] == 1000
    assert count_held(latencies) < 400


def test_percentiles_of_a_single_latency():
    latencies = Latencies()
    latencies.add(0.0)
    assert latencies.figures() == {"p50": 0, "p95": 0, "p99": 0, "max": 0}
    latencies.add(0.5)
    assert latencies.figures()["p99"] == latencies.figures()["max"] == 500


def test_progress_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(stream, lambda: 0)
    progress.show(0.5, "half")
    progress.clear()
    assert stream.getvalue() == "\r\033[K[###############               ]  50%  half\r\033[K"


def test_progress_lines_elsewhere():
    """A stream that is no terminal gets a line every few seconds."""
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    for now[0] in (0, 4, 5, 6, 9, 11):
        progress.show(now[0] / 11, f"at {now[0]}")
    progress.clear()
    assert stream.getvalue() == " 45%  at 5\n100%  at 11\n"


def test_summary_of_a_busy_program():
    with contextlib.closing(io.StringIO()):
        report = {
            "url": "ws://h:80/",
            "clients": 1,
            "rooms": 1,
            "posters": 1,
            "seconds": 0.0,
            "posted": 0,
            "acknowledged": 0,
            "acknowledged_again": 0,
            "delivered": 0,
            "deliveries_per_second": None,
            "of_others": 0,
            "cut": 0,
            "came_back": 0,
            "fresh_starts": 0,
            "logs_lost": 0,
            "lost": 0,
            "cpu": 0.93,
            "latency_ms": {"ack": None},
            "proved": False,
        }
        lines = summary(report).splitlines()
    assert lines[-1] == "busy       this program used 93% of a core, so these times contain its own delays"
    assert len(summary(report | {"cpu": None}).splitlines()) == len(lines) - 1


@pytest.mark.parametrize(("lost", "words"), [(0, "0"), (1234, "1,234"), (None, "an unknown number of")])
def test_summary_of_lost_messages(lost, words):
    with reactor() as loop:
        options = program.arguments(["ws://127.0.0.1:1/"])
        report = Trial(options, options.url, "run", loop, Progress(io.StringIO(), loop.seconds)).report()
    report |= {"fresh_starts": 9, "logs_lost": 2, "lost": lost}
    assert summary(report).splitlines()[-1] == f"lost       {words} acknowledged messages; 9 fresh starts, 2 new logs"


# Options


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        program.arguments(words)
    assert ended.value.code == UNTRIED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_default_options():
    options = program.arguments(["ws://localhost:8085/"])
    assert (options.clients, options.posters, options.rate, options.seconds, options.messages) == (
        100,
        100,
        100,
        10,
        None,
    )
    assert (options.cut, options.patience, options.seed, options.lenient, options.json) == (10, 60, 1, False, False)
    assert program.arguments(["ws://localhost:8085/", "--clients=7", "--posters=9"]).posters == 7
    assert options.extra is None
    assert program.arguments(["ws://h/", '--extra={"a":{"b":1}}']).extra == {"a": {"b": 1}}


@pytest.mark.parametrize("url", ["ws://ann:s3cret@h/", "ws://ann:s3cret@h:x/", "ann:s3cret@h"])
def test_refused_url_hides_its_password(capsys, url):
    assert "s3cret" not in refused(capsys, url)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the following arguments are required: URL"),
        (("http://localhost/",), "'http://localhost/' is not a URL such as ws://localhost:8085/rooms/main"),
        (("ws://h/", "--clients=0"), "argument --clients: '0' is not a whole number from 1 to 1,000,000"),
        (("ws://h/", "--clients=1.5"), "argument --clients: '1.5' is not a whole number from 1 to 1,000,000"),
        (("ws://h/", "--rate=-1"), "argument --rate: '-1' is not a number from 0 to 1,000,000"),
        (("ws://h/", "--cut=nan"), "argument --cut: 'nan' is not a number from 0 to 1,000,000"),
        (("ws://h/", "--extra={"), "argument --extra: '{' is not JSON ("),
        (("ws://h/", "--extra=[]"), "argument --extra: '[]' is not an object with fields"),
        (("ws://h/", "--extra={}"), "argument --extra: '{}' is not an object with fields"),
        (("ws://h/", "--room=A"), "argument --room: 'A' is not the name of a room, such as team-7"),
        (("ws://h/", "--seconds=1", "--messages=1"), "not allowed with argument"),
        (("ws://h/", "--rooms=1001"), "argument --rooms: a connection is in 1,000 rooms at most"),
        (
            ("ws://h/rooms/a", "--rooms=2"),
            "argument --rooms: the URL names the room /rooms/a: use --room for the names",
        ),
        (("ws://h/", "--nonsense"), "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_option_is_one_line(capsys, words, said):
    line = refused(capsys, *words)
    assert line.startswith("chatd.load: ")
    assert said in line
    assert line.endswith(": see --help\n")
