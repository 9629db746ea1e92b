"""scripts/cluster: planted faults that the ledger must count, and short runs on a real cluster."""

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

from clustering.ledger import Ledger
from clustering.processes import BALANCER, NODES, Balancer

CLUSTER = ROOT / "scripts" / "cluster"
SMALL = ("--clients=30", "--lead=0.2", "--drain=1")
NONE = {"lost": 0, "duplicate": 0, "disorder": 0, "undelivered": 0, "unanswered": 0, "broken": 0}


@contextlib.contextmanager
def started(*options):
    """Run the script, and end it afterwards."""
    process = subprocess.Popen([CLUSTER, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()  # it ends its servers too
        process.communicate(timeout=LONG)


def run(*options):
    with started(*options) as process:
        out, err = process.communicate(timeout=LONG)
    return process.returncode, out, err


def line(process, pattern):
    """Read the output up to a line that matches a pattern, and return the match."""
    for text in process.stdout:
        if found := re.search(pattern, text):
            return found
    raise AssertionError(f"no line matches {pattern!r}: {process.stderr.read()}")


class Story:
    """Four posts of client 0, which the log has and two clients receive, and which are acknowledged at the end."""

    def __init__(self):
        self.ledger = Ledger("run", 2)
        self.readers = self.ledger.proof.readers
        for reader in self.readers:
            self.ledger.check_history(reader, History(Id("epoch", 0), []))
        self.log = [self.entry(number, self.ledger.proof.post(0)[1]) for number in range(1, 5)]
        self.acks = [Posted(Id("epoch", number)) for number in range(1, 5)]

    def entry(self, number, text):
        return Entry(number, self.ledger.proof.username(0), text, "2026-01-01T00:00:00.000Z")

    def give(self, number, entries):
        self.ledger.check_entries(self.readers[number], "epoch", entries, 0.0)

    def give_all(self):
        for number in range(2):
            self.give(number, self.log)

    def faults(self, **logs):
        """Acknowledge all posts, conclude, and return the number of faults of each kind."""
        for place, posted in enumerate(self.acks):
            self.ledger.check_ack(self.readers[0], place, posted)
        self.ledger.conclude({"Redis": self.log} | logs)
        return {kind: count for kind, count in self.ledger.faults.items() if count}


def test_good_run_has_no_faults():
    """A client may receive its entries in any number of frames."""
    story = Story()
    story.give(0, story.log)
    story.give(1, story.log[:2])
    story.give(1, story.log[2:])
    assert story.faults(node1=[*story.log]) == {}
    assert story.ledger.delivered == 8


@pytest.mark.parametrize(
    ("faults", "other"),
    [
        ({"disorder": 1}, [0, 2, 3]),
        ({"duplicate": 1}, [0, 1, 1, 2, 3]),
        ({"disorder": 1, "duplicate": 1, "undelivered": 1}, [0, 2, 1]),
        ({"undelivered": 1}, [0, 1, 2]),
    ],
    ids=["missing", "doubled", "swapped", "unfinished"],
)
def test_wrong_deliveries_to_one_client(faults, other):
    """Each wrong delivery counts once, and the client continues after it."""
    story = Story()
    story.give(0, story.log)
    story.give(1, [story.log[place] for place in other])
    assert story.faults() == faults


def test_two_messages_under_one_id():
    """All clients must receive the same message under one id."""
    story = Story()
    story.give(0, story.log)
    story.give(1, [*story.log[:3], story.entry(4, story.log[0].message)])
    assert story.faults() == {"disorder": 1}


@pytest.mark.parametrize("acknowledged", [4, 5], ids=["first", "second"])
def test_post_stored_twice(acknowledged):
    """A post must be in the log once; it is not lost, whichever copy is acknowledged."""
    story = Story()
    story.log.append(story.entry(5, story.log[3].message))
    story.acks[3] = Posted(Id("epoch", acknowledged))
    story.give_all()
    assert story.faults() == {"duplicate": 1}


def test_acknowledged_post_missing_from_log():
    """An acknowledged post is lost if the log does not have it; here a retry was acknowledged."""
    story = Story()
    del story.log[3]
    story.acks[3] = Posted(Id("epoch", 4), duplicate=True)
    story.give_all()
    assert story.faults() == {"lost": 1}


def test_post_stored_under_another_number():
    """A post must be in the log under the number of its ack."""
    story = Story()
    story.acks[2:] = story.acks[3], story.acks[2]
    story.give_all()
    assert story.faults() == {"lost": 2}


def test_ack_before_the_poster_receives_the_entry():
    """Unless it answers a retry, an ack comes after the entry."""
    story = Story()
    story.ledger.check_ack(story.readers[0], 0, story.acks.pop(0))
    assert story.ledger.faults["broken"] == 1


def test_post_without_ack():
    """Every post must be acknowledged by the end."""
    story = Story()
    story.give_all()
    story.ledger.proof.post(0)
    assert story.faults() == {"unanswered": 1}


def test_nodes_with_different_logs():
    """All nodes must return the log that Redis has."""
    story = Story()
    story.give_all()
    other = [*story.log[:3], story.entry(4, story.log[0].message)]
    assert story.faults(node1=[*story.log], node2=other) == {"disorder": 1}


def test_log_that_differs_from_deliveries():
    """The log must have what the clients received."""
    story = Story()
    story.give_all()
    story.log[3] = story.log[3]._replace(timestamp="2026-01-02T00:00:00.000Z")
    assert story.faults() == {"disorder": 1}


def test_client_told_to_start_over():
    """A client that has messages of a log must receive the rest, not another first history."""
    story = Story()
    story.give_all()
    story.ledger.check_history(story.readers[1], History(Id("epoch", 4), story.log))
    assert story.faults() == {"broken": 1}


def test_log_replaced_by_another():
    """A new epoch means that the old log is lost."""
    story = Story()
    story.give_all()
    for reader in story.readers:
        story.ledger.check_history(reader, History(Id("other", 0), []))
    story.log = []
    assert story.faults()["broken"] >= 1


def test_messages_of_another_log():
    """Messages of another epoch than that of the client's history are out of order."""
    story = Story()
    story.ledger.check_entries(story.readers[0], "other", story.log, 0.0)
    assert story.ledger.faults["disorder"] == 1


def test_help_lists_scenarios_and_examples():
    """--help names every scenario and the main options."""
    status, out, _ = run("--help")
    assert status == 0
    assert {"roll", "kill", "restart", "partition", "scale", "--clients", "--rate", "--json"} <= {*out.split()}
    assert "scripts/cluster roll kill --clients 200" in out


@pytest.mark.parametrize("options", [["crash"], ["--clients", "x"], ["--rate", "0"], ["--fast"]])
def test_wrong_usage(options):
    """Wrong options are one line on standard error and exit status 2."""
    status, out, err = run(*options)
    assert (status, out) == (2, "")
    assert err.startswith("cluster: ")
    assert err.count("\n") == 1


def test_documented_haproxy_configuration(tmp_path):
    """docs/reliability.md shows the configuration of HAProxy that the script uses, except for ports."""
    nodes = [SimpleNamespace(name=f"node{place + 1}", host=host, port=1) for place, host in enumerate(NODES)]
    balancer = Balancer("haproxy", nodes, 600, None, "haproxy", tmp_path, BALANCER)
    shown = re.search(r"```haproxy\n(.*?)```", (ROOT / "docs" / "reliability.md").read_text("utf-8"), re.DOTALL)[1]
    used = balancer.configuration().replace(str(tmp_path), "/run")
    assert re.sub(r":\d+$", ":PORT", shown, flags=re.MULTILINE) == re.sub(r":\d+$", ":PORT", used, flags=re.MULTILINE)


def test_roll_and_kill_lose_nothing(tmp_path):
    """A cluster loses nothing while its nodes are replaced and killed."""
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


def test_lost_log_is_reported():
    """The script notices that Redis is emptied during a run."""
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
