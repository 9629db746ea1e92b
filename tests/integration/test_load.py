"""The load tool against real servers, and against faulty ones: a relay in between changes a single frame."""

import io
import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
from unittest.mock import patch

import pytest
from support.helpers import Terminal
from support.loops import reactor
from support.servers import TWISTD, Server
from support.websocket_frames import TEXT, frame, frame_at
from twisted.internet.protocol import Factory, Protocol

from chatd.load import __main__ as program
from chatd.load.figures import Progress
from chatd.load.trial import INTERRUPTED, PROVED, REFUTED, UNTRIED

LISTEN = "tcp:0:interface=127.0.0.1:backlog=4096"

# The command line


def run(*words, tamper=None, tampered=0, port=None, err=None, started=program.STARTED):
    """Run the tool, by a relay to a port if there is one; return its status, its output and its errors."""
    out, err = io.StringIO(), err or io.StringIO()
    with reactor() as loop, patch.object(Progress, "SECONDS", 3600):  # however slow the machine is
        if port is not None:
            relay = Relay(loop, port, tamper, tampered)
            words = (f"ws://127.0.0.1:{relay.port}/", *words)
        try:
            status = program.main(words, loop, out, err, started)
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def test_limit_of_open_files(monkeypatch):
    """A hard limit below the clients ends the tool at once, with the remedy in one line."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", None)
    status, out, err = run("ws://127.0.0.1:1/", "--clients=1000")
    assert (status, out) == (UNTRIED, "")
    found = re.fullmatch(r"chatd\.load: (\d+) open files are needed, and 200 are allowed: (.*)\n", err)
    assert int(found[1]) > 1050, "with those that are open already"
    assert found[2] == "use fewer --clients, or raise `ulimit -Hn`"


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_unreachable_server_is_one_line(words):
    status, out, err = run("ws://127.0.0.1:1/rooms/a", *words)
    assert status == UNTRIED
    assert err == (
        "chatd.load: ws://127.0.0.1:1/rooms/a cannot be joined: connection refused: "
        "check the URL, and that the server runs\n"
    )
    assert out == "" or json.loads(out)["proved"] is False


def test_error_begins_with_the_name_of_the_command(monkeypatch):
    """The name is that by which the user started the program."""
    assert run("ws://127.0.0.1:1/rooms/a", started="chatd load")[2].startswith("load: ws://127.0.0.1:1/rooms/a cannot")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    assert re.match(r"load: \d+ open files are needed", run("ws://h/", "--clients=1000", started="chatd load")[2])


def test_run_as_a_program(monkeypatch, capsys):
    with reactor():
        monkeypatch.setattr(sys, "argv", ["chatd.load", "ws://127.0.0.1:1/"])
        begun = []
        monkeypatch.setattr(
            "twisted.logger.globalLogBeginner.beginLoggingTo", lambda observers, **_: begun.extend(observers)
        )
        monkeypatch.setattr("gc.freeze", lambda: None)
        monkeypatch.setattr("gc.set_threshold", lambda _: None)
        monkeypatch.delitem(sys.modules, "chatd.load.__main__")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("chatd.load", run_name="__main__", alter_sys=False)
    assert ended.value.code == UNTRIED
    assert capsys.readouterr().err.startswith("chatd.load: ws://127.0.0.1:1/rooms/load-")
    assert len(begun) == 1


# Real servers


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all tests that do not end it; every trial has a room of its own."""
    folder = tmp_path_factory.mktemp("load")
    with Server(folder, listen=LISTEN, command=(sys.executable, TWISTD)) as server:  # unwatched, it is faster
        yield server


def test_correct_server_is_proved(server):
    status, out, err = run(server.url, "--clients=20", "--posters=5", "--messages=100", "--rate=200", "--cut=0.2")
    assert (status, err) == (PROVED, "")
    lines = out.splitlines()
    assert re.fullmatch(rf"{server.url}rooms/load-[0-9a-f]{{6}}: 20 clients, 5 of them posters; .* s", lines[0])
    assert lines[1].startswith("posted     100; acknowledged 100, ")
    assert lines[2].startswith("delivered  2,000, ")
    assert re.fullmatch(r"cut        [1-9]\d* times; [1-9]\d* reconnections", lines[3])
    assert re.fullmatch(
        r"ack        p50 [\d.]+  p95 [\d.]+  p99 [\d.]+  max [\d.]+ ms after the post was due", lines[4]
    )
    assert lines[5].startswith("message    p50 ")
    assert lines[-1] == "proved     each client received each message exactly once, in one order, as it was posted"


def test_many_rooms_over_each_connection(server):
    words = ("--rooms=5", "--clients=6", "--messages=100", "--rate=200", "--cut=0.2")
    status, out, err = run(server.url, *words)
    assert (status, err) == (PROVED, "")
    assert out.startswith(f"{server.url}connect: 6 clients, 6 of them posters; ")
    assert "rooms      5, which each client joined over one connection\n" in out
    assert "delivered  600, " in out


def test_report_as_json(server):
    words = ("--clients=3", "--seconds=0.3", "--rate=50", "--cut=0", "--room=kitchen", "--json")
    status, out, err = run(server.url, *words)
    assert (status, err) == (PROVED, "")
    report = json.loads(out)
    figures = {"p50", "p95", "p99", "max"}
    assert {name: {*latencies} for name, latencies in report.pop("latency_ms").items()} == {
        "ack": figures,
        "message": figures,
    }
    assert 0.2 < report.pop("seconds") < 10
    assert report.pop("deliveries_per_second") > 0
    assert 0 < report.pop("cpu") < 2
    assert report == {
        "proved": True,
        "fault": None,
        "url": f"{server.url}rooms/kitchen",
        "clients": 3,
        "rooms": 1,
        "posters": 3,
        "posted": 15,
        "acknowledged": 15,
        "acknowledged_again": 0,
        "delivered": 45,
        "of_others": 0,
        "cut": 0,
        "came_back": 0,
        "fresh_starts": 0,
        "logs_lost": 0,
        "lost": 0,
    }


def test_room_with_messages_of_others(server):
    url = f"{server.url}rooms/pub"
    for others in (0, 2):
        status, out, _ = run(url, "--clients=2", "--messages=2", "--rate=0", "--json")
        assert status == PROVED
        assert json.loads(out)["of_others"] == others
        assert json.loads(out)["delivered"] == 4 + 2 * others


def test_run_for_a_time(server):
    """With --rate=0 each poster posts as fast as the server acknowledges."""
    status, out, _ = run(server.url, "--clients=5", "--rate=0", "--seconds=0.5", "--cut=0", "--json")
    report = json.loads(out)
    assert status == PROVED
    assert report["posted"] == report["acknowledged"] > 5
    assert report["delivered"] == 5 * report["posted"]


def test_many_clients_in_one_process(server):
    """Both processes hold them within the usual limit of 1,024 open files, of which the server reserves 32."""
    status, out, _ = run(server.url, "--clients=900", "--messages=30", "--rate=0", "--cut=3", "--json")
    report = json.loads(out)
    assert (status, report["clients"], report["delivered"]) == (PROVED, 900, 27_000)


def test_rate_limit_slows_the_posters(tmp_path):
    with Server(tmp_path, "--rate=40:2") as server:
        status, out, _ = run(server.url, "--clients=2", "--messages=40", "--rate=0", "--cut=0", "--json")
    assert (status, json.loads(out)["acknowledged"]) == (PROVED, 40)


class Killer(Terminal):
    """A terminal that kills and restarts the server when `marks` posts are acknowledged."""

    def __init__(self, start, *marks):
        super().__init__()
        self._start = start
        self._marks = [*marks]
        self._wanted = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work)
        self.server = start("tcp:0:interface=127.0.0.1:backlog=4096")
        self.kills = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._marks = None
        self._wanted.release()
        self._thread.join()
        self.server.kill()

    def write(self, text):
        found = re.search(r"([\d,]+) acknowledged", text)
        if found and self._marks and int(found[1].replace(",", "")) >= self._marks[0]:
            self._marks.pop(0)
            self._wanted.release()
        return super().write(text)

    def _work(self):
        while self._wanted.acquire() and self._marks is not None:
            port = self.server.port
            self.server.kill()
            self.kills += 1
            self.server = self._start(f"tcp:{port}:interface=127.0.0.1:backlog=4096")


def starting(folder, *options):
    return lambda listen: Server(folder, *options, listen=listen).__enter__()


def test_server_killed_and_restarted_is_proved(tmp_path):
    with Killer(starting(tmp_path), 100, 400) as killer:
        words = ("--clients=50", "--messages=800", "--rate=400", "--cut=1", "--json")
        status, out, err = run(killer.server.url, *words, err=killer)
    assert (status, killer.kills) == (PROVED, 2), err
    report = json.loads(out)
    assert (report["posted"], report["acknowledged"], report["delivered"]) == (800, 800, 40_000)
    assert report["came_back"] >= 100
    assert "reconnections" in err


def test_server_that_loses_its_log_is_refuted(tmp_path):
    with Killer(starting(tmp_path, "--store=memory:"), 20) as killer:
        words = ("--clients=5", "--messages=100", "--rate=50", "--cut=0")
        status, out, err = run(killer.server.url, *words, err=killer)
    assert (status, killer.kills) == (REFUTED, 1)
    assert re.search(
        r"chatd.load: the log (\w+) is lost, with [1-9]\d* acknowledged messages: now there is (?!\1)\w+\n$", err
    )
    assert re.search(r"^lost       [1-9]\d* acknowledged messages; 5 fresh starts, 1 new logs$", out, re.MULTILINE)
    assert out.startswith(killer.server.url[:15])
    assert "posted     100; acknowledged 100, " in out
    assert "proved" not in out
    assert re.search(r", [1-5] started over", err), "the last may have before the next look"


def test_lenient_run_accepts_a_lost_log(tmp_path):
    with Killer(starting(tmp_path, "--store=memory:"), 20) as killer:
        words = ("--clients=5", "--messages=100", "--rate=50", "--cut=0", "--lenient", "--json")
        status, out, err = run(killer.server.url, *words, err=killer)
    assert (status, killer.kills) == (PROVED, 1), err
    report = json.loads(out)
    assert (report["acknowledged"], report["fresh_starts"], report["logs_lost"]) == (100, 5, 1)
    assert 20 <= report["lost"] < 100


def test_room_that_the_server_does_not_have(tmp_path):
    with Server(tmp_path, "--rooms=main") as server:
        status, out, err = run(server.url)
        assert (status, out) == (UNTRIED, "")
        assert re.search(r"cannot be joined: client \d+ is rejected: refused with 404 Not Found: ", err)
        assert run(server.url, "--room=main", "--messages=1", "--clients=1")[0] == PROVED


def test_interrupted_run_prints_its_figures(server):
    class Impatient(Terminal):
        def write(self, text):
            if " acknowledged" in text and not self.getvalue().count("acknowledged"):
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    status, out, err = run(server.url, "--clients=2", "--rate=10", "--seconds=600", err=Impatient())
    assert status == INTERRUPTED
    assert err.endswith("chatd.load: interrupted: nothing is proved\n")
    assert out.startswith(server.url)


def test_unexpected_errors_propagate(server):
    """An error that is no fault of the server, here of the terminal, ends the program."""

    class Broken(Terminal):
        def write(self, text):
            if " posted" in text:
                raise OSError("the terminal is gone")
            return super().write(text)

    with pytest.raises(OSError, match="the terminal is gone"):
        run(server.url, "--clients=2", err=Broken())


# Faulty servers


class Front(Protocol):
    """A client's connection to the relay."""

    def connectionMade(self):
        self.back = None
        self.begun = b""
        self.number = self.factory.count
        self.factory.count += 1
        self.factory.connect(self)

    def dataReceived(self, data):
        if self.back is None:
            self.begun += data
        else:
            self.back.transport.write(self.factory.heard(self, data))

    def connectionLost(self, reason):
        if self.back is not None:
            self.back.transport.abortConnection()


class Back(Protocol):
    """The relay's connection to the server, on a client's behalf."""

    def __init__(self, front):
        self.front = front

    def connectionMade(self):
        self.front.back = self
        self.transport.write(self.front.begun)
        self.head, self.rest = True, b""

    def dataReceived(self, data):
        relay = self.front.factory
        if self.front.number != relay.tampered:
            self.front.transport.write(data)
            return
        data = self.rest + data
        if self.head:
            head, end, data = data.partition(b"\r\n\r\n")
            self.front.transport.write(head + end)
            self.head = False
        relay.tamper.front = self.front
        begin = 0
        while found := frame_at(data, begin):
            self.front.transport.write(relay.tamper(data[begin : found.end]))
            begin = found.end
        self.rest = data[begin:]

    def connectionLost(self, reason):
        self.front.transport.abortConnection()


class Relay(Factory):
    """Stand between the clients and a server; each frame to one connection passes through `tamper`."""

    protocol = Front
    noisy = False

    def __init__(self, loop, port, tamper, tampered):
        self.tamper = tamper or (lambda frame: frame)
        self.heard = getattr(tamper, "heard", lambda _, data: data)
        self.tampered = tampered if tamper else None
        self.count = 0
        self._loop = loop
        self._to = port
        self.port = loop.listenTCP(0, self, 4096, "127.0.0.1").getHost().port

    def connect(self, front):
        factory = Factory.forProtocol(lambda: Back(front))
        factory.noisy = False
        factory.doStart = factory.doStop = lambda: None
        factory.startedConnecting = lambda _: None
        factory.clientConnectionFailed = factory.clientConnectionLost = lambda *_: None
        self._loop.connectTCP("127.0.0.1", self._to, factory)


def framed(text):
    return frame(TEXT, text, masked=False)


def split(message):
    """Split the text of a message frame before its data, and leave out the end."""
    text = frame_at(message).payload
    return re.fullmatch(rb'(\{"type":"message","id":"\w+-\d+","data":)(.*)\}', text, re.DOTALL).groups()


class Mutant:
    """Change one frame of a kind, the `at`-th."""

    def __init__(self, do, at, kind="message"):
        self.do = do
        self.at = at
        self.count = 0
        self.done = 0
        self._start = b'{"type":"%b"' % kind.encode()
        self._held = []

    def __call__(self, frame):
        if self._start not in frame[2:24]:
            return frame
        self.count += 1
        wanted = 2 if self.do in (swap, exchange) else 1
        if not self.at <= self.count < self.at + wanted:
            return frame
        self._held.append(frame)
        if len(self._held) < wanted:
            return b""
        self.done += 1
        return self.do(*self._held)


def drop(_):
    return b""


def double(frame):
    return frame + frame


def swap(one, two):
    return two + one


def alter(frame):
    head, data = split(frame)
    return framed(head + data.replace(b'|"', b'!"') + b"}")


def exchange(one, two):
    (first, this), (second, that) = split(one), split(two)
    return framed(first + that + b"}") + framed(second + this + b"}")


def renumber(frame):
    return re.sub(rb'(\w{6}-\d*)(\d)"', lambda found: b'%b%d"' % (found[1], (int(found[2]) + 1) % 10), frame)


MANY = ("--clients=100", "--posters=50", "--messages=1000", "--rate=0", "--cut=0", "--json")


def test_relay_that_changes_nothing_is_proved(server):
    mutant = Mutant(drop, 0)
    status, out, err = run(*MANY, port=server.port, tamper=mutant)
    assert (status, err, mutant.done, mutant.count) == (PROVED, "", 0, 1000)
    assert json.loads(out)["delivered"] == 100_000


@pytest.mark.parametrize(
    ("do", "at", "words"),
    [
        (drop, 500, r"client \d+: (\w+)-501 arrived after \1-499, instead of \1-500"),
        (double, 500, r"client \d+: (\w+)-500 arrived after \1-500, again"),
        (double, 1000, r"client \d+: (\w+)-1000 arrived after \1-1000, again"),
        (swap, 500, r"client \d+: (\w+)-501 arrived after \1-499, instead of \1-500"),
        # Either this client or another one is the first that receives the message.
        (alter, 500, r"(client \d+ received|\w+-500, as client \d+ received it, is not what anyone posted)"),
        (exchange, 500, r"client \d+ received load-.*-50[01], and client \d+ load-"),
    ],
    ids=["drop", "double", "double the last", "swap", "alter", "exchange"],
)
def test_one_wrong_frame_in_a_hundred_thousand(server, do, at, words):
    """Connection 57 is of client 57, which posts nothing, so no acknowledgement shows the fault before the messages."""
    mutant = Mutant(do, at)
    status, out, err = run(*MANY, port=server.port, tamper=mutant, tampered=57)
    assert (status, mutant.done) == (REFUTED, 1)
    assert err.count("\n") == 1
    assert re.match(f"chatd.load: {words}", err), err
    report = json.loads(out)
    assert (report["proved"], report["fault"]) == (False, err.removeprefix("chatd.load: ").rstrip("\n"))


def test_acknowledgement_with_a_wrong_id(server):
    mutant = Mutant(renumber, 7, "ack")
    status, _, err = run(*MANY, port=server.port, tamper=mutant, tampered=3)
    assert (status, mutant.done) == (REFUTED, 1)
    assert re.match(
        r"chatd.load: post \d+ of client \d+ was acknowledged as \w+-\d+(, and is | before the client received it)", err
    )


class Twice(Mutant):
    """Post the first post of one client twice, under two labels."""

    def __init__(self):
        super().__init__(drop, 0)

    def heard(self, front, data):
        found = frame_at(data)
        if self.done or front.number != 3 or found is None or found.first != 0x81 or len(found.payload) < 126:
            return data
        label = len(found.payload) - 4  # one of its last characters
        other = bytearray(found.payload)
        other[label] = ord("2" if other[label] == ord("1") else "1")
        self.done += 1
        return frame(TEXT, bytes(other)) + data


def test_post_stored_twice(server):
    mutant = Twice()
    status, _, err = run(*MANY, port=server.port, tamper=mutant, tampered=None)
    assert (status, mutant.done) == (REFUTED, 1)
    assert re.match(r"chatd.load: \w+-\d+, as client \d+ received it, is post \d+ of client \d+ a second time", err)


class Closing(Mutant):
    """Close a connection, and send nothing more on it."""

    def __call__(self, frame):
        return b"" if self.done else super().__call__(frame)


def test_client_rejected_during_the_run(server):
    mutant = Closing(lambda _: b"\x88\x02" + (1008).to_bytes(2), 500)
    status, _, err = run(*MANY, port=server.port, tamper=mutant, tampered=57)
    assert (status, mutant.done) == (REFUTED, 1)
    assert re.match(r"chatd.load: client \d+ is rejected: closed with 1008\n", err)


def test_post_rejected_for_good(server):
    def refuse(frame):
        text = json.loads(frame[2:])
        return framed(json.dumps({"type": "error", "message": "Nonsense", "label": text["label"]}).encode())

    status, _, err = run(*MANY, port=server.port, tamper=Mutant(refuse, 2, "ack"), tampered=3)
    assert status == REFUTED
    assert re.match(r"chatd.load: client \d+ was refused a request: Nonsense\n", err)


class Failover(Mutant):
    """Replace the log at a message: later frames, and requests about them, have another epoch."""

    def __init__(self, at):
        super().__init__(drop, at)
        self._anew = set()

    def __call__(self, frame):
        text = frame_at(frame).payload
        if text.startswith(b'{"type":"message"'):
            self.epoch, number = re.match(rb'\{"type":"message","id":"(\w+)-(\d+)"', text).groups()
            if int(number) == self.at:
                self._anew.add(self.front)
                self.done += 1
                begin = b'{"type":"history","id":"efghij-%d","resumed":false,"data":[]}' % (self.at - 1)
                return framed(begin) + self.other(text)
        return self.other(text) if self.front in self._anew else frame

    def other(self, text):
        return framed(text.replace(self.epoch, b"efghij", 1))

    def heard(self, front, data):
        """Translate the new epoch to the old one in a client's frames."""
        found = frame_at(data)
        if found is None or found.first != 0x81 or found.end != len(data):
            return data
        return frame(TEXT, found.payload.replace(b"efghij", getattr(self, "epoch", b"")))


class Everyone:
    """The number of every connection, so that the relay changes frames of all of them."""

    def __eq__(self, other):
        return True

    __hash__ = None


@pytest.mark.parametrize("lenient", [True, False])
def test_log_lost_during_the_connections(server, lenient):
    mutant = Failover(300)
    words = [*MANY, "--room=failover-lenient" if lenient else "--room=failover", *["--lenient"] * lenient]
    status, out, err = run(*words, port=server.port, tamper=mutant, tampered=Everyone())
    report = json.loads(out)
    assert mutant.done == 100
    assert (report["fresh_starts"], report["logs_lost"], report["came_back"]) == (100, 1, 0)
    assert (report["acknowledged"], report["lost"]) == (1000, 0), err
    assert status == (PROVED if lenient else REFUTED)
    if not lenient:
        assert re.match(r"chatd.load: the log \w+ is lost, with 0 acknowledged messages: now there is efghij\n", err)
