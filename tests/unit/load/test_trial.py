"""A trial on a clock and on transports in memory, with the test as the server."""

import re

import pytest
from support.helpers import Terminal, result_of
from support.server_ends import Endpoint
from twisted.internet.task import Clock

from chatd.client.address import ServerAddress
from chatd.load import __main__ as program
from chatd.load.figures import Progress, summary
from chatd.load.trial import INTERRUPTED, PROVED, REFUTED, TICK, TICKS, UNTRIED, Trial
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import ack_frame, addressed, error_frame, history_frame, labelled, message_frame


class Address(ServerAddress):
    """An address that leads to the test."""

    def endpoint(self, reactor):
        return reactor.endpoint


class Table:
    """A trial with its clock and its endpoint."""

    def __init__(self, *words, url="ws://h/rooms/a"):
        self.clock = Clock()
        self.clock.endpoint = self.endpoint = Endpoint()
        self.terminal = Terminal()
        options = program.arguments([url, "--cut=0", *words])
        self.trial = Trial(
            options, Address(*options.url), "run", self.clock, Progress(self.terminal, self.clock.seconds)
        )
        self.trial.start()

    def join(self):
        """Accept the connection of the next client, up to the history."""
        wire = self.endpoint.accept()
        wire.answer()
        wire.say(history_frame("abcd", 0, []))
        wire.clear()
        return wire

    def tick(self, count=1):
        self.clock.pump([TICK] * count)


def message(number, post, epoch="abcd"):
    return message_frame(epoch, Entry(number, post["username"], post["message"], "2026-01-01T00:00:00.000Z"))


def ack(number, post):
    return ack_frame(Id("abcd", number), post["label"], duplicate=False)


@pytest.fixture
def posting():
    """A trial of one client, whose only post is in flight, and the server's end of the connection."""
    table = Table("--clients=1", "--rate=0", "--messages=1", "--patience=3")
    wire = table.join()
    table.tick()
    (table.post,) = wire.said()
    return table, wire


def test_rejection_with_a_post_in_flight(posting):
    """The trial reports the rejected client, not the post that fails with it."""
    table, wire = posting
    wire.close(1008)
    wire.end()
    assert table.trial.fault == "client 0 is rejected: closed with 1008"
    assert result_of(table.trial.done) == REFUTED


def test_protocol_error_with_a_post_in_flight(posting):
    table, wire = posting
    wire.say(error_frame("no"))
    wire.end()
    assert table.trial.fault == "client 0: an error answers no request: no"


def test_refused_post(posting):
    table, wire = posting
    wire.say(error_frame("no", Code.LABEL_REUSED, table.post["label"]))
    wire.end()
    assert table.trial.fault == "client 0 was refused a request: no"


def test_interrupt_with_a_post_in_flight(posting):
    """A post that fails because the trial stops its clients is no fault."""
    table, wire = posting
    done = table.trial.interrupt()
    wire.close(1000)
    wire.end()
    assert result_of(done) == INTERRUPTED
    assert table.trial.fault == "interrupted: nothing is proved"


def test_acknowledgement_that_never_arrives(posting):
    table, _ = posting
    table.tick(20 * TICKS)
    assert table.trial.fault == (
        "nothing was acknowledged in 3 seconds: 1 posts, 1 of client 0 among them; the last connection: no answer"
    )


def test_last_message_that_one_client_never_receives():
    table = Table("--clients=2", "--posters=1", "--rate=0", "--messages=1", "--patience=3")
    second, first = table.join(), table.join()
    table.tick()
    (post,) = first.said()
    first.say(message(1, post) + ack(1, post))
    table.tick()
    for wire, number in ((first, 1), (second, 1)):
        (page,) = wire.said()
        wire.say(history_frame("abcd", number, [message(1, post)], label=page["label"]))
    table.tick(4 * TICKS)
    assert table.trial.fault is None
    table.tick(16 * TICKS)
    assert table.trial.fault == "client 1 has abcd-0 of abcd-1, and received no more in 3 seconds"


def test_start_of_a_new_log_that_never_arrives(posting):
    """The trial reads back what no client has received of a new log, and does not wait for it forever."""
    table, wire = posting
    wire.say(message(1, table.post) + ack(1, table.post))
    wire.say(history_frame("efgh", 7, [], resumed=False))
    table.tick()
    (newest,) = wire.said()
    wire.say(history_frame("efgh", 7, [], label=newest["label"]))
    table.tick()
    assert [request["before"] for request in wire.said()] == ["efgh-8"]
    table.tick(20 * TICKS)
    assert table.trial.fault == "the messages before efgh-8 were not received in 3 seconds"


class SharedTable(Table):
    """A trial of one client in the rooms `r-0` and `r-1`."""

    def __init__(self, *words):
        super().__init__("--rooms=2", "--room=r", "--clients=1", *words, url="ws://h/connect")
        self.wire = self.endpoint.accept()
        self.wire.answer()
        for join in self.wire.said():
            self.say(join["room"], labelled(history_frame("abcd", 0, []), join["label"]))

    def say(self, room, *frames):
        self.wire.say(b"".join(map(addressed(room), frames)))


def test_each_room_has_a_proof():
    """One client posts to its rooms in turn, and reads the newest page of each."""
    table = SharedTable("--rate=0", "--messages=2")
    table.tick()
    posts = table.wire.said()
    assert [post["room"] for post in posts] == ["r-0", "r-1"]
    assert posts[0]["message"] != posts[1]["message"]
    for post in posts:
        table.say(post["room"], message(1, post), ack(1, post))
    table.tick()
    for page in table.wire.said():
        table.say(page["room"], history_frame("abcd", 1, [], label=page["label"]))
    table.tick()
    table.wire.close(1000)
    table.wire.end()
    assert result_of(table.trial.done) == PROVED
    report = table.trial.report()
    assert (report["clients"], report["rooms"], report["delivered"], report["lost"]) == (1, 2, 2, 0)
    assert re.search(r"^rooms      2, ", summary(report), re.MULTILINE)


def test_message_in_another_room_is_refuted():
    """A message of another room is a fault, which names the room."""
    table = SharedTable("--rate=0", "--messages=2")
    table.tick()
    one, other = table.wire.said()
    table.say("r-0", message(1, other))
    table.say("r-0", ack(1, one))
    table.wire.end()
    assert re.fullmatch(r"post 0 of client 0 was acknowledged as abcd-1, and is nowhere in r-0", table.trial.fault)


def test_room_that_falls_behind():
    table = SharedTable("--rate=0", "--messages=2", "--patience=3")
    table.tick()
    for post in table.wire.said():
        table.say(post["room"], message(1, post), ack(1, post))
    table.tick()
    pages = table.wire.said()
    table.say("r-0", history_frame("abcd", 1, [], label=pages[0]["label"]))
    table.tick(20 * TICKS)
    assert table.trial.fault == "client 0 in r-1 has abcd-1 of abcd-1, and received no more in 3 seconds"


def test_new_log_of_each_room_is_read_back():
    table = SharedTable("--rate=0", "--messages=2", "--patience=3")
    table.tick()
    for post in table.wire.said():
        table.say(post["room"], message(1, post), ack(1, post))
        table.say(post["room"], history_frame("efgh", 7, [], resumed=False))
    table.tick()
    for page in table.wire.said():
        table.say(page["room"], history_frame("efgh", 7, [], label=page["label"]))
    table.tick()
    (page,) = table.wire.said()
    assert (page["room"], page["before"]) == ("r-0", "efgh-8")
    others = [message(number, {"username": "ann", "message": "hi"}, "efgh") for number in range(1, 8)]
    table.say("r-0", history_frame("efgh", 7, others, label=page["label"]))
    table.tick(2)
    (page,) = table.wire.said()
    assert (page["room"], page["before"]) == ("r-1", "efgh-8")
    table.tick(20 * TICKS)
    assert table.trial.fault == "the messages before efgh-8 in r-1 were not received in 3 seconds"


def test_connection_is_cut_with_all_its_rooms():
    table = SharedTable("--rate=1", "--seconds=100", "--cut=0.001")
    table.tick(5)
    assert table.wire.aborted
    assert table.trial.report()["cut"] >= 1


def test_not_all_clients_can_join():
    """A server that takes no more clients leaves the trial undecided."""
    table = Table("--clients=3", "--patience=1.5")
    wires = [table.join(), table.join()]
    table.tick(8 * TICKS)
    for wire in wires:
        wire.close(1000)
        wire.end()
    assert result_of(table.trial.done) == UNTRIED
    assert table.trial.fault == (
        "2 of 3 clients have joined, and no more are accepted (no answer): "
        "ask for fewer --clients, or allow the server more"
    )


def test_server_that_never_answers():
    """The first client that times out ends the trial, though the others have not learned of their end yet."""
    table = Table("--clients=3")
    wires = [table.endpoint.accept() for _ in range(3)]
    table.clock.pump([1] * 10)
    assert all(wire.aborted for wire in wires)
    for wire in wires:
        wire.end()
    assert result_of(table.trial.done) == UNTRIED
    assert "the server did not answer in time" in table.trial.fault
    assert table.clock.calls == []


def test_progress_in_every_phase():
    table = Table("--clients=1", "--rate=0", "--seconds=0.1", "--patience=1")
    table.tick(TICKS)
    wire = table.join()
    table.tick()
    posts = wire.said()
    table.tick(TICKS)
    wire.say(b"".join(message(number, post) + ack(number, post) for number, post in enumerate(posts, 1)))
    table.tick(TICKS)
    assert re.findall(r"\]   0%  (.*?)(?:\r|$)", table.terminal.getvalue()) == [
        "0 of 1 clients joined",
        "8 posted, 0 acknowledged, 0 delivered, 0 reconnections",
        "0 of 1 clients have everything",
    ]


def test_post_in_a_second_log_counts_one_echo():
    """The latency of a post ends when its poster first receives it, even if the post is stored in a new log too."""
    table = Table("--clients=1", "--rate=0", "--messages=1", "--lenient")
    wire = table.join()
    table.tick()
    (post,) = wire.said()
    table.tick()
    wire.say(message(1, post))
    table.tick(5)
    wire.say(history_frame("efgh", 0, [], resumed=False) + message(1, post, "efgh"))
    assert table.trial.fault is None
    assert table.trial.report()["latency_ms"]["message"] == dict.fromkeys(("p50", "p95", "p99", "max"), 1000 * TICK)


def test_unread_part_of_a_new_log_is_read_back():
    """One client reads what no client has received, page by page, once all clients are at the head of the new log."""
    table = Table("--clients=2", "--posters=1", "--rate=0", "--messages=1")
    second, first = table.join(), table.join()
    table.tick()
    (post,) = first.said()
    for wire in (first, second):
        wire.say(message(1, post))
    first.say(ack(1, post))
    table.tick()
    (page,) = second.said()
    second.say(history_frame("abcd", 1, [], label=page["label"]))
    table.tick()
    first.clear()
    first.say(history_frame("efgh", 7, [], resumed=False))
    (page,) = first.said()
    first.say(history_frame("efgh", 7, [], label=page["label"]))
    table.tick(2)
    assert first.said() == [], "the second client is not in the new log yet"
    second.say(history_frame("efgh", 7, [], resumed=False))
    for number, more in ((7, True), (6, False)):
        table.tick(2)
        (page,) = first.said()
        assert page["before"] == f"efgh-{number + 1}"
        other = message(number, {"username": "ann", "message": "hi"}, "efgh")
        first.say(history_frame("efgh", number, [other], label=page["label"], more=more))
    table.tick()
    assert table.trial.fault == "the log abcd is lost, with 1 acknowledged messages: now there is efgh"
