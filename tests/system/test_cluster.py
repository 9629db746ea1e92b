"""scripts/cluster: that it sees what it is there to see, and a short run on a real cluster; how long anything takes is
not asked here.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.servers import LONG, ROOT, need

from chatd.client.protocol import History, Posted
from chatd.messages import Entry, Id

sys.path.append(str(ROOT / "scripts"))

from clustering.ledger import Ledger, Reader
from clustering.processes import BALANCER, NODES, Balancer

CLUSTER = ROOT / "scripts" / "cluster"
SMALL = ("--clients=30", "--lead=0.2", "--drain=1")
NONE = {"lost": 0, "duplicate": 0, "disorder": 0, "undelivered": 0, "unanswered": 0, "broken": 0}


@contextlib.contextmanager
def started(*options):
    """The script, at work; it is not left behind."""
    process = subprocess.Popen([CLUSTER, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()  # and it ends its servers
        process.communicate(timeout=LONG)


def run(*options):
    with started(*options) as process:
        out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


def line(process, pattern):
    """Read on to a line."""
    for text in process.stdout:
        if found := re.search(pattern, text):
            return found
    raise AssertionError(f"{pattern!r} did not come: {process.stderr.read()}")


def entry(number, text=None):
    return Entry(number, "ann", text or f"text {number}", "2026-01-01T00:00:00.000Z")


class Story:
    """Four posts, acknowledged, which two clients are given, and the log has; and what else may become of them."""

    def __init__(self):
        self.ledger = Ledger()
        self.readers = [Reader(number) for number in range(2)]
        self.log = [entry(number) for number in range(1, 5)]
        for reader in self.readers:
            self.ledger.begun(reader, History(Id("epoch", 0), []))
        self.ledger.posted = 4
        for one in self.log:
            self.ledger.answered(one.message, Posted(Id("epoch", one.number)))

    def give(self, number, entries):
        self.ledger.appended(self.readers[number], "epoch", entries, 0.0)

    def faults(self, **logs):
        """The kinds of what is wrong in the end."""
        self.ledger.conclude({"Redis": self.log} | logs, self.readers)
        return {kind for kind, count in self.ledger.faults.items() if count}


def test_a_good_story_has_no_faults():
    story = Story()
    story.give(0, story.log)
    story.give(1, story.log[:2])
    story.give(1, story.log[2:])
    assert story.faults(node1=[*story.log]) == set()
    assert story.ledger.delivered == 8


@pytest.mark.parametrize(
    ("kinds", "other"),
    [
        ({"disorder"}, [0, 2, 3]),
        ({"duplicate"}, [0, 1, 1, 2, 3]),
        ({"disorder", "duplicate", "undelivered"}, [0, 2, 1]),
        ({"undelivered"}, [0, 1, 2]),
    ],
    ids=["lost", "doubled", "swapped", "not given the last"],
)
def test_a_client_that_is_given_something_else_shows(kinds, other):
    story = Story()
    story.give(0, story.log)
    story.give(1, [story.log[place] for place in other])
    assert story.faults() == kinds


def test_two_messages_under_one_id_show():
    story = Story()
    story.give(0, story.log)
    story.give(1, [*story.log[:3], entry(4, "text 5")])
    assert story.faults() == {"disorder"}


def test_a_post_that_is_in_the_log_twice_shows():
    story = Story()
    story.log.append(entry(5, "text 4"))
    for number in range(2):
        story.give(number, story.log)
    assert story.faults() == {"duplicate"}


def test_an_acknowledged_post_that_the_log_has_lost_shows():
    story = Story()
    del story.log[3]
    for number in range(2):
        story.give(number, story.log)
    assert story.faults() == {"lost"}


def test_a_post_without_an_answer_shows():
    story = Story()
    for number in range(2):
        story.give(number, story.log)
    story.ledger.posted += 1
    assert story.faults() == {"unanswered"}


def test_a_node_that_tells_another_log_shows():
    story = Story()
    for number in range(2):
        story.give(number, story.log)
    assert story.faults(node1=[*story.log], node2=[*story.log[:3], entry(4, "text 5")]) == {"disorder"}


def test_a_client_that_is_told_to_begin_again_shows():
    story = Story()
    for number in range(2):
        story.give(number, story.log)
    story.ledger.begun(story.readers[1], History(Id("epoch", 4), story.log))
    assert "broken" in story.faults()


def test_help_explains_the_scenarios_and_gives_examples():
    status, out, _ = run("--help")
    assert status == 0
    assert {"roll", "kill", "restart", "partition", "scale", "--clients", "--rate", "--json"} <= {*out.split()}
    assert "scripts/cluster roll kill --clients 200" in out


@pytest.mark.parametrize("options", [["crash"], ["--clients", "x"], ["--rate", "0"], ["--fast"]])
def test_what_it_does_not_understand_it_says_in_one_line(options):
    status, out, err = run(*options)
    assert (status, out) == (2, "")
    assert err.startswith("cluster: ")
    assert err.count("\n") == 1


def test_the_documents_show_the_configuration_of_haproxy(tmp_path):
    nodes = [SimpleNamespace(name=f"node{place + 1}", host=host, port=1) for place, host in enumerate(NODES)]
    balancer = Balancer("haproxy", nodes, 600, None, "haproxy", tmp_path, BALANCER)
    shown = re.search(r"```haproxy\n(.*?)```", (ROOT / "docs" / "reliability.md").read_text("utf-8"), re.DOTALL)[1]
    used = balancer.configuration().replace(str(tmp_path), "/run")
    assert re.sub(r":\d+$", ":PORT", shown, flags=re.MULTILINE) == re.sub(r":\d+$", ":PORT", used, flags=re.MULTILINE)


def test_a_cluster_that_is_rolled_and_killed_loses_nothing(tmp_path):
    need("haproxy")
    figures = tmp_path / "figures.json"
    status, out, err = run("roll", "kill", *SMALL, "--seconds=2", "--every=1", f"--json={figures}")
    assert (status, err) == (0, ""), out
    rolled, killed = json.loads(figures.read_text())["scenarios"]
    assert len(rolled["drains_s"]) == 3
    assert killed["kills"] >= 1
    for row in (rolled, killed):
        assert row["faults"] == NONE
        assert row["clients"] == 30
        assert row["acknowledged"] == row["posted"] > 0
        assert row["delivered"] >= 30 * row["posted"]
        assert sum(row["connections_lost"].values()) > 0
        assert 0 < row["late_ms"]["p50"] <= row["late_ms"]["max"]
        assert row["away_ms"]["max"] > 0


def test_a_log_that_is_lost_in_the_midst_of_it_is_noticed():
    need("haproxy")
    with started("kill", *SMALL, "--seconds=1", "--every=1") as process:
        redis = line(process, r"redis at ([0-9.]+):(\d+)")
        line(process, "kill -9 of node1")
        with socket.create_connection((redis[1], int(redis[2])), LONG) as client:
            client.sendall(b"FLUSHALL\r\n")
            assert client.recv(100) == b"+OK\r\n"
        out, err = process.communicate(timeout=LONG)
    assert (process.returncode, err) == (1, "")
    assert re.search(r"kill: lost [1-9]", out), out
    assert "not proved: kill" in out
