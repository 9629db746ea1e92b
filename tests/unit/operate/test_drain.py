"""The pace, the order and the time limits of a drain, with an injected clock."""

import random
from collections import Counter

import pytest
from support.helpers import PING_SECONDS
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock, LoopingCall, deferLater

from chatd.operate import drain
from chatd.operate.drain import ANSWER_SECONDS, ASK_SECONDS, FULL_SECONDS, IMMEDIATE_SECONDS, LATE_SECONDS, Drain
from chatd.transport.connections import CLOSE_SECONDS, Connections
from chatd.transport.identity import ANYONE

TICK = drain.TICK_SECONDS
SLACK = TICK + 1e-6


class DrainedClient:
    """A client that records the calls it receives, and answers a close after `answers` seconds; None: never."""

    carrier = "websocket"
    member = property(lambda self: self)
    identity = ANYONE
    joined = True
    head = cursor = 0
    awaits_log = False
    waits = False
    """True while the client waits for an acknowledgement."""

    def __init__(self, scene, answers=0.01):
        self.scene = scene
        self.answers = answers
        self.peer = f"192.0.2.7:{id(self)}"
        self.journal = []
        scene.connections.add(self)

    def note(self, what):
        self.journal.append((what, self.scene.clock.seconds()))
        self.scene.journal.append((what, self))

    def ping(self):
        return True

    def has_pending(self, head):
        return self.waits or self.cursor < head

    def finish(self):
        self.note("finish")

    def restart(self, retry_after):
        self.note("restart")
        self.retry_after = retry_after
        if self.answers == 0:
            self.goes()
        elif self.answers is not None:
            self.scene.clock.callLater(self.answers, self.goes)

    def abort(self):
        self.note("abort")
        self.goes()

    def goes(self):
        self.scene.connections.remove(self, 1012)

    @property
    def did(self):
        return [what for what, _ in self.journal]

    @property
    def finished(self):
        """The time at which reading from it ended."""
        (moment,) = [moment for what, moment in self.journal if what == "finish"]
        return moment

    @property
    def released(self):
        """The time of its release."""
        (moment,) = [moment for what, moment in self.journal if what == "restart"]
        return moment


class Requests:
    """The HTTP connections.  The last of them closes when `gone` fires, which it has at first."""

    asked = False
    """True while a request waits for its answer, after which its connection closes."""

    def __init__(self, scene):
        self.scene = scene
        self.gone = succeed(None)

    def ask(self):
        self.asked = True
        self.gone = Deferred()

    def answer(self):
        self.asked = False
        self.gone.callback(None)

    def close(self):
        self.scene.note("requests close")
        return self.gone

    def abort(self):
        self.scene.note("requests abort")
        if not self.gone.called:
            self.gone.callback(None)


class Scene:
    """A server whose deadlines are checked each second; its log settles at once, or when the test says."""

    def __init__(self):
        self.clock = Clock()
        self.connections = Connections(self.clock, PING_SECONDS)
        self.journal = []
        self.moments = []
        """The calls that concern no client, each with its time."""
        self.log = None
        """The Deferreds that wait for the log to settle; None: the log settles at once."""
        self.takes = 0.0
        """The seconds that the log takes to settle; 0: `log` decides."""
        self.requests = Requests(self)
        self.ports = succeed(None)
        self.closed = None
        self.over = None
        looks = LoopingCall(self.connections.check_deadlines)
        looks.clock = self.clock
        looks.start(1)

    def people(self, count, **more):
        return [DrainedClient(self, **more) for _ in range(count)]

    def note(self, what):
        self.journal.append((what, None))
        self.moments.append((what, self.clock.seconds()))

    def when(self, what):
        """Return the times of a call."""
        return [moment for noted, moment in self.moments if noted == what]

    def settled(self):
        self.note("settled?")
        if self.takes:
            return deferLater(self.clock, self.takes)
        if self.log is None:
            return succeed(None)
        self.log.append(Deferred())
        return self.log[-1]

    def settle(self):
        log, self.log = self.log, None
        for settled in log:
            settled.callback(None)

    def abandon(self):
        """Reject the posts in flight.  The log does not settle sooner."""
        self.note("abandon")
        if self.requests.asked:
            self.requests.answer()

    def close_ports(self):
        self.closed = self.clock.seconds()
        self.note("ports")
        return self.ports

    def begin(self, budget, *, immediate=False, **more):
        """Begin a drain.  `over` becomes the time at which it ends."""
        self.drain = Drain(self.connections, self, self.requests, budget, self.clock)
        if immediate:
            self.drain.skip_pace()
        return self.run(**more)

    def run(self, **more):
        self.drain.run(self.close_ports, **more).addCallback(self.end)
        return self.drain

    def end(self, result):
        assert result is None
        self.over = self.clock.seconds()

    def until(self, moment):
        """Advance the clock to a time, one delayed call after another."""
        while self.clock.calls and self.clock.calls[0].getTime() <= moment:
            self.clock.advance(max(0, self.clock.calls[0].getTime() - self.clock.seconds()))
        self.clock.advance(max(0, moment - self.clock.seconds()))

    def released(self):
        """Return the number of clients released so far."""
        return sum(what == "restart" for what, _ in self.journal)

    @property
    def others(self):
        """The number of delayed calls, without that of the deadlines."""
        return len(self.clock.calls) - 1


@pytest.fixture
def scene(monkeypatch):
    monkeypatch.setattr(drain.random, "random", random.Random(7).random)
    return Scene()


def grace(budget):
    """Return the seconds in which handshakes are accepted."""
    return min(20, budget / 4)


def end(budget):
    """Return the time of the last release, which leaves that client time to answer."""
    return budget - min(ANSWER_SECONDS, budget / 4)


def limit(budget):
    """Return the time until which the drain waits for the log and for clients that have unread answers."""
    return budget - min(LATE_SECONDS, budget / 8)


BUDGETS = pytest.mark.parametrize("budget", [1, 8, 30, 120])


def test_times_of_the_phases():
    """The grace, the last release and the limit for posts follow from the budget."""
    assert (drain.GRACE_SECONDS, drain.SPREAD_SECONDS, drain.IMMEDIATE_SPREAD_SECONDS) == (20, 1, 10)
    assert (LATE_SECONDS, FULL_SECONDS, IMMEDIATE_SECONDS) == (6, 5, 1)
    assert [grace(budget) for budget in (0, 1, 8, 30, 120)] == [0, 0.25, 2, 7.5, 20]
    assert [end(budget) for budget in (0, 1, 8, 30, 120)] == [0, 0.75, 6, 23, 113]
    assert [limit(budget) for budget in (0, 1, 8, 30, 120)] == [0, 0.875, 7, 26.25, 114]


# The pace


@BUDGETS
@pytest.mark.parametrize("count", [1, 3, 100, 2000])
def test_even_pace_between_grace_and_end(scene, count, budget):
    """Clients are released at an even pace, from the end of the grace until time to answer is left."""
    people = scene.people(count)
    scene.begin(budget)
    scene.until(budget)
    releases = sorted(person.released for person in people)
    begin, whole = grace(budget), end(budget) - grace(budget)
    assert releases[0] >= begin
    assert releases[-1] <= end(budget) + SLACK
    for place, moment in enumerate(releases, 1):
        assert abs(moment - (begin + whole * place / count)) <= SLACK + whole / count
    assert releases[-1] <= scene.over <= budget
    assert [person.did for person in people] == [["finish", "restart"]] * count


@pytest.mark.parametrize("budget", [8, 30, 120])
def test_clients_reconnect_as_an_even_stream(scene, budget):
    """Random delays below a second keep the stream of reconnecting clients even."""
    count = 2000
    people = scene.people(count)
    scene.begin(budget)
    scene.until(budget)
    assert all(0 <= person.retry_after < 1 for person in people)
    assert 0.45 < sum(person.retry_after for person in people) / count < 0.55
    even = count / (end(budget) - grace(budget))
    arrivals = sorted(person.released + person.retry_after for person in people)
    peak = max(sum(moment <= other < moment + 1 for other in arrivals) for moment in arrivals[::10])
    assert peak <= 1.5 * even


def test_budget_of_zero(scene):
    """A drain without a budget releases and aborts all clients at once."""
    people = [*scene.people(3), *scene.people(2, answers=None)]
    scene.begin(0)
    assert scene.released() == 5
    scene.until(0)
    assert scene.over == 0
    assert [person.did[-1] for person in people] == ["abort"] * 5
    assert scene.others == 3, "the answers of clients that are aborted"


@BUDGETS
def test_clients_that_leave_do_not_change_the_pace(scene, budget):
    """Clients that leave by themselves do not bring the release of others forward."""
    people = scene.people(1000)
    scene.begin(budget)
    for person in people[::2]:
        person.goes()
    scene.until(budget)
    releases = sorted(person.released for person in people[1::2])
    assert [person.did for person in people[::2]] == [[]] * 500
    half = (grace(budget) + end(budget)) / 2
    assert 200 <= sum(moment <= half for moment in releases) <= 300
    assert releases[-1] <= end(budget) + SLACK


# Stalls of the process


def peak(moments):
    """Return the largest number of moments within one second."""
    moments = sorted(moments)
    begin = most = 0
    for place, last in enumerate(moments):
        while moments[begin] <= last - 1:
            begin += 1
        most = max(most, place - begin + 1)
    return most


def stall(scene, budget, stalls):
    """Drain 2,000 clients in a process that stalls; `stalls` are (part of the pace, seconds)."""
    people = scene.people(2000)
    scene.begin(budget)
    begin, whole = grace(budget), end(budget) - grace(budget)
    for part, seconds in stalls:
        scene.until(begin + part * whole)
        scene.clock.advance(seconds)
    scene.until(budget)
    return people, 2000 / whole


def by_chance(rate):
    """Return the most arrivals to expect in one second from clients released at a rate.

    Each client arrives after a random delay of up to a second.  The probability that its arrival is in a given
    second falls evenly from 1 to 0 on either side, so the variance of the number of arrivals is rate / 3.
    """
    return rate + 4 * (rate / 3) ** 0.5


def arrivals(people):
    return [person.released + person.retry_after for person in people]


@pytest.mark.parametrize("budget", [20, 30, 120])
@pytest.mark.parametrize("seconds", [0.5, 1, 2])
def test_stall_raises_the_pace_evenly(scene, budget, seconds):
    """A drain makes up for a stall over all the remaining time, without a burst."""
    people, even = stall(scene, budget, [(0.5, seconds)])
    whole = end(budget) - grace(budget)
    faster = 1 / (1 - 2 * seconds / whole)  # remaining clients (half) ÷ remaining time
    assert peak(arrivals(people)) <= by_chance(faster * even)


AT_ONCE = 0.25
"""The most seconds' worth of clients that the drain releases in one moment, even after a long stall."""
STALLS = [
    [(0.5, 1)],
    [(0.2, 0.5), (0.5, 0.5), (0.8, 0.5)],
    [(0.2, 1), (0.5, 1), (0.8, 1)],
    [(0.2, 2), (0.5, 2), (0.8, 2)],
    [(0.1 * part, 0.5) for part in range(1, 9)],
]


@pytest.mark.parametrize("budget", [30, 120])
@pytest.mark.parametrize("stalls", STALLS)
def test_pace_is_bounded_after_stalls(scene, budget, stalls):
    """The drain never releases faster than remaining clients ÷ remaining time."""
    people, _ = stall(scene, budget, stalls)
    releases = Counter(person.released for person in people)
    left, fastest = 2000, 0.0
    for moment in sorted(releases):
        time = end(budget) - moment
        if time > TICK:
            assert releases[moment] <= left * AT_ONCE / time + 1
            fastest = max(fastest, left / time)
        left -= releases[moment]
    assert left == 0, "all are released"
    assert max(releases) <= end(budget) + SLACK
    assert peak(arrivals(people)) <= by_chance(fastest)


@pytest.mark.parametrize("budget", [20, 30])
def test_stall_of_a_second_in_the_stream_of_reconnects(scene, budget):
    """One stall of a second raises the peak of reconnecting clients by less than half."""
    people, even = stall(scene, budget, [(0.5, 1)])
    assert peak(arrivals(people)) <= 1.5 * even


@pytest.mark.parametrize("budget", [20, 30, 120])
@pytest.mark.parametrize("late", [0.01, 0.05, 0.1])
def test_late_ticks_keep_the_pace(scene, budget, late):
    """Ticks that are all late leave no clients over for the end."""
    people = scene.people(2000)
    scene.begin(budget)
    while scene.clock.seconds() < budget:
        scene.clock.advance(TICK + late)
    even = 2000 / (end(budget) - grace(budget))
    assert peak(arrivals(people)) <= by_chance(1.05 * even)
    assert max(person.released for person in people) <= end(budget) + SLACK + late


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_even_pace_of_a_few_clients(scene, count):
    """Ten clients or fewer are released evenly too."""
    people = scene.people(count)
    scene.begin(30)
    scene.until(30)
    begin, whole = grace(30), end(30) - grace(30)
    for place, moment in enumerate(sorted(person.released for person in people), 1):
        assert abs(moment - (begin + whole * place / count)) <= 2 * SLACK


# The grace


@BUDGETS
def test_handshakes_are_accepted_until_the_grace_is_over(scene, budget):
    """The ports close at the end of the grace, and no client is released before."""
    scene.people(1)
    scene.begin(budget)
    scene.until(grace(budget) - SLACK)
    assert scene.closed is None
    assert not scene.connections.stopping
    assert scene.released() == 0
    scene.until(grace(budget) + SLACK)
    assert grace(budget) <= scene.closed
    assert scene.connections.stopping


def test_client_that_connects_in_the_grace(scene):
    """A client that connects during the grace is released like the others."""
    first = DrainedClient(scene)
    scene.begin(8)
    scene.until(1.9)
    late = DrainedClient(scene)
    scene.until(8)
    assert (first.did, late.did) == (["finish", "restart"], ["finish", "restart"])


def test_client_that_connects_while_the_ports_close(scene):
    """Releases begin when all ports are closed, and include clients that connected until then."""
    first = DrainedClient(scene)
    scene.ports = Deferred()
    scene.begin(8)
    scene.until(3)
    assert scene.closed is not None
    assert not scene.connections.stopping
    assert first.did == []
    last = DrainedClient(scene)
    scene.ports.callback(None)
    assert scene.connections.stopping
    scene.until(6 + SLACK)
    assert (first.did, last.did) == (["finish", "restart"], ["finish", "restart"])


def test_grace_ends_without_clients(scene):
    """The drain ends at once when the last client leaves during the grace."""
    people = scene.people(3)
    scene.begin(120)
    scene.until(1)
    for person in people:
        person.goes()
    scene.until(1 + SLACK)
    assert scene.over >= 1
    assert scene.closed == scene.over
    assert scene.connections.stopping
    assert scene.others == 0


def test_handshakes_that_wait_are_answered(scene):
    """The drain waits for handshakes whose answer is on its way, and not until they are dropped."""
    scene.connections.asked.add(scene)
    scene.begin(8)
    scene.until(3)
    assert scene.connections.stopping
    assert scene.over is None
    assert not scene.when("requests close")
    scene.connections.asked.discard(scene)
    scene.until(3 + SLACK)
    assert scene.over is not None
    assert scene.others == 0


@pytest.mark.parametrize("immediate", [False, True])
def test_unanswered_handshake_does_not_hold_up_the_drain(scene, immediate):
    """The last seconds of the budget, or of an immediate drain, are not spent on handshakes."""
    scene.connections.asked.add(scene)
    scene.begin(120, immediate=immediate)
    end = IMMEDIATE_SECONDS if immediate else 120 - LATE_SECONDS
    scene.until(end - SLACK)
    assert scene.over is None
    scene.until(end + SLACK)
    assert scene.over is not None


def test_connected_clients_can_still_ask(scene):
    """A client that has connected, perhaps over TLS, has a second for its request, and the drain asks nothing of it."""
    person = DrainedClient(scene)
    scene.connections.remove(person, 1000)
    scene.connections.handshakes.add(person)
    scene.begin(30)
    scene.until(ASK_SECONDS - SLACK)
    assert scene.over is None
    scene.until(ASK_SECONDS + SLACK)
    assert scene.over is not None
    assert person.did == []


def test_drain_ends_when_connected_clients_have_asked(scene):
    scene.connections.handshakes.add(scene)
    scene.begin(8)
    scene.until(SLACK)
    scene.connections.handshakes.discard(scene)
    scene.until(3 * SLACK)
    assert scene.over is not None


@pytest.mark.parametrize("budget", [0, 1, 30, 120])
def test_drain_without_clients_is_immediate(scene, budget):
    """A drain without clients closes the ports, settles the log and ends at once."""
    scene.begin(budget)
    assert scene.journal == [("ports", None), ("requests close", None), ("settled?", None)]
    assert scene.over == 0
    assert scene.connections.stopping
    assert scene.others == 0


@pytest.mark.parametrize(("budget", "grace"), [(0, 0), (8, 2), (30, 7.5), (120, 20)])
def test_ports_stay_open_if_clients_are_expected(scene, budget, grace):
    """A drain that expects clients keeps the ports open for the whole grace."""
    scene.begin(budget, expecting=True)
    scene.until(budget)
    assert grace <= scene.closed == scene.over <= grace + SLACK
    assert scene.others == 0


def test_immediate_drain_expects_no_clients(scene):
    """An immediate drain ends the grace, even if clients are expected."""
    scene.begin(120, expecting=True)
    scene.until(1)
    scene.drain.skip_pace()
    scene.until(1 + SLACK)
    assert scene.over is not None


# The posts


def test_client_is_released_after_its_posts_settle(scene):
    """A client is released only after the log settles all that was read from it."""
    people = scene.people(2)
    scene.log = []
    scene.begin(8)
    scene.until(5)
    (person,) = [person for person in people if person.did]
    assert scene.journal[-2:] == [("finish", person), ("settled?", None)]
    scene.journal.clear()
    scene.settle()
    scene.until(5 + SLACK)
    assert scene.journal == [("restart", person)]


def test_reading_stops_although_the_log_has_not_settled(scene):
    """A log that is slow to settle does not delay the end of reading from the next clients."""
    people = scene.people(100)
    scene.log = []
    scene.begin(8)
    scene.until(4)
    finished = [person for person in people if person.did]
    assert 48 <= len(finished) <= 52
    scene.settle()
    scene.until(4 + SLACK)
    assert 48 <= scene.released() <= 54
    assert all(person.did == ["finish", "restart"] for person in finished)


def test_client_waits_for_its_own_posts(scene):
    """A client waits for posts read before its own end of reading, and not for later ones."""
    people = scene.people(2)
    scene.log = []
    scene.begin(8)
    scene.until(4 + SLACK)
    (first,) = scene.log
    first.callback(None)  # the log settles for this client alone
    scene.until(4 + 2 * SLACK)
    assert scene.released() == 1
    scene.until(limit(8) - SLACK)
    assert scene.released() == 1
    scene.until(limit(8) + SLACK)
    assert scene.released() == 2
    scene.until(8)
    assert [person.did for person in people] == [["finish", "restart"]] * 2


def test_client_is_released_after_frames_that_were_held(scene):
    """Posts that waited for a page reach the log after it has settled, and are answered before the release too."""
    (person,) = scene.people(1)
    person.head = person.cursor = 3
    person.awaits_log = True
    scene.begin(8)
    scene.until(end(8) + 0.1)
    assert person.did == ["finish"]
    person.awaits_log = False
    person.head = 4  # its own message
    scene.until(end(8) + 0.2)
    person.head = 5  # that of somebody else
    assert person.did == ["finish"]
    person.cursor = 4
    scene.until(end(8) + 0.3)
    assert person.did == ["finish", "restart"]
    assert scene.when("abandon") == []


def test_frames_that_were_held_are_rejected_at_the_limit(scene):
    """A log that never answers them holds the client no longer."""
    (person,) = scene.people(1)
    person.awaits_log = True
    scene.begin(30)
    scene.until(30)
    assert person.did == ["finish", "restart"]
    assert limit(30) - 1e-6 <= person.released <= limit(30) + SLACK
    assert scene.when("abandon") == [person.released]


def test_client_is_released_at_the_settled_head(scene):
    """A client is released when it has read the log as it was when its posts settled."""
    person = DrainedClient(scene)
    scene.log = []
    scene.begin(30, immediate=True)
    scene.until(0.2)
    person.head = 7
    scene.settle()
    scene.until(0.4)
    person.cursor = 6
    scene.until(0.6)
    assert person.did == ["finish"]
    person.cursor = 7
    person.head = 1000  # others continue to post
    scene.until(0.6 + SLACK)
    assert person.did == ["finish", "restart"]


def test_client_is_released_with_its_answers(scene):
    """A client that awaits acknowledgements is released when it has them."""
    person, other = scene.people(2)
    person.waits = True
    scene.begin(30, immediate=True)
    scene.until(0.6)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])
    person.waits = False
    scene.until(0.6 + SLACK)
    assert person.did == ["finish", "restart"]
    scene.until(1)
    assert 0.6 < scene.over < 0.7


@pytest.mark.parametrize("budget", [1, 8, 30, 120])
def test_client_that_does_not_read_its_answers(scene, budget):
    """A client that leaves its acknowledgements unread is released after FULL_SECONDS, or at the limit."""
    slow = scene.people(20)
    for person in slow:
        person.waits = True
    people = scene.people(20)
    scene.begin(budget)
    scene.until(budget)
    for person in slow:
        enough = min(person.finished + FULL_SECONDS, limit(budget))
        assert enough - 1e-6 <= person.released <= enough + SLACK
    assert all(other.released == other.finished for other in people), "no client waits for another"
    assert scene.over <= limit(budget) + SLACK + 0.02
    assert scene.when("abandon") == [], "the log has settled"


@BUDGETS
def test_log_that_never_settles(scene, budget):
    """Clients of a log that never settles are released at the limit."""
    people = scene.people(10)
    scene.log = []
    scene.begin(budget)
    scene.until(limit(budget) - SLACK)
    assert scene.released() == 0, "their posts may still be committed"
    assert scene.when("abandon") == []
    scene.until(limit(budget) + SLACK)
    assert scene.released() == 10
    scene.until(budget)
    assert scene.over <= budget
    assert [person.did for person in people] == [["finish", "restart"]] * 10


@BUDGETS
def test_late_posts_are_rejected_before_the_release(scene, budget):
    """Posts that are not committed at the limit are rejected, once, before their clients are released."""
    scene.people(10)
    scene.log = []
    scene.begin(budget)
    scene.until(budget)
    assert len(scene.when("abandon")) == len(scene.log), "once for each time that reading ended for some"
    assert min(scene.when("abandon")) >= limit(budget) - 1e-6
    rounds, read, given_up = [], [], set()
    for what, person in scene.journal:
        if what == "finish":
            read.append(person)
        elif what == "settled?":
            rounds.append(read)
            read = []
        elif what == "abandon":
            given_up.update(rounds.pop(0))
        elif what == "restart":
            assert person in given_up
    assert (len(given_up), rounds) == (10, []), "the last round is for the HTTP connections"


@pytest.mark.parametrize("budget", [8, 30, 120])
@pytest.mark.parametrize("takes", [0.01, 0.04])
def test_posts_committed_within_a_tick_are_never_rejected(scene, budget, takes):
    people = scene.people(200)
    scene.takes = takes
    scene.begin(budget)
    scene.until(budget)
    assert scene.when("abandon") == []
    assert [person.did for person in people] == [["finish", "restart"]] * 200


@pytest.mark.parametrize("budget", [8, 30])
def test_slow_log_has_time_for_the_last_posts(scene, budget):
    """A log that takes 0.2 s to commit does so for the last clients too."""
    scene.people(200)
    scene.takes = 0.2
    scene.begin(budget)
    scene.until(budget)
    assert scene.when("abandon") == []
    assert scene.over <= budget


@pytest.mark.parametrize("budget", [8, 30])
def test_stall_at_the_end_rejects_nothing(scene, budget):
    """A stall over the end of the pace does not reject posts that the log commits quickly."""
    people = scene.people(200)
    scene.takes = 0.01
    scene.begin(budget)
    scene.until(end(budget) - 0.2)
    scene.clock.advance(0.5)
    scene.until(budget)
    assert all(person.did == ["finish", "restart"] for person in people)
    assert scene.when("abandon") == []


def test_only_late_posts_are_rejected(scene):
    """Clients whose posts settle in time are released then; only the others lose posts."""
    people = scene.people(100)
    scene.begin(30)
    scene.until(15)
    before = scene.released()
    assert 30 < before < 70
    scene.log = []
    scene.until(18)
    early, scene.log = scene.log, []
    for settled in early:
        settled.callback(None)
    scene.until(18 + SLACK)
    between = scene.released()
    assert between > before
    scene.until(30)
    assert all(person.did == ["finish", "restart"] for person in people)
    assert len(scene.when("abandon")) == len(scene.log) > 0


def test_drain_ends_without_clients_and_log(scene):
    """A drain whose clients have all left does not wait for the log."""
    people = scene.people(10)
    scene.log = []
    scene.begin(120)
    scene.until(100)
    for person in people:
        person.goes()
    scene.until(100 + 2 * SLACK)
    assert scene.over is not None


# HTTP connections


@pytest.mark.parametrize("immediate", [False, True])
def test_http_connections_close_after_the_clients(scene, immediate):
    """HTTP connections close when the last client has disconnected."""
    people = scene.people(100, answers=0.5)
    scene.begin(30, immediate=immediate)
    scene.until(30)
    last = max(person.released for person in people) + 0.5
    assert scene.when("requests close") == [last]
    assert scene.over == last
    assert scene.when("requests abort") == []


@pytest.mark.parametrize("count", [0, 10])
def test_drain_ends_with_the_http_connections(scene, count):
    """A drain ends when the last HTTP connection has closed."""
    scene.people(count)
    scene.requests.gone = Deferred()
    scene.begin(30)
    scene.until(28)
    assert len(scene.when("requests close")) == 1
    assert scene.over is None
    scene.requests.gone.callback(None)
    assert scene.over == 28
    assert scene.others == 0


@BUDGETS
@pytest.mark.parametrize("count", [0, 10])
def test_http_connections_are_dropped_at_the_end(scene, budget, count):
    """HTTP connections that are open at the end of the budget are aborted."""
    scene.people(count)
    scene.requests.gone = Deferred()
    scene.begin(budget)
    scene.until(budget - 0.01)
    assert scene.over is None
    assert scene.when("requests abort") == []
    scene.until(budget)
    assert scene.when("requests abort") == [budget]
    assert scene.over == budget


@pytest.mark.parametrize("count", [0, 10])
def test_http_connections_close_before_posts_settle(scene, count):
    """Idle HTTP connections close, and the others are read no more, before the log settles."""
    scene.people(count)
    scene.begin(30)
    scene.until(30)
    assert [what for what, person in scene.journal if person is None][-2:] == ["requests close", "settled?"]


@BUDGETS
@pytest.mark.parametrize("count", [0, 10])
def test_late_http_posts_are_rejected(scene, budget, count):
    """HTTP posts that are not committed at the limit are rejected, so that their clients get a response."""
    scene.people(count, answers=0)
    scene.log = []
    scene.requests.ask()
    scene.begin(budget)
    scene.until(limit(budget) - SLACK)
    assert scene.when("abandon") == []
    assert scene.over is None
    scene.until(limit(budget) + 2 * SLACK)
    assert scene.when("abandon")[0] >= limit(budget) - 1e-6
    assert limit(budget) <= scene.over + 1e-6
    assert scene.when("requests abort") == []
    assert scene.others == 0


@pytest.mark.parametrize("count", [0, 10])
def test_immediate_drain_waits_a_second_for_http_posts(scene, count):
    """An immediate drain rejects HTTP posts that are not committed after IMMEDIATE_SECONDS."""
    scene.people(count)
    scene.log = []
    scene.requests.ask()
    scene.begin(30, immediate=True)
    scene.until(IMMEDIATE_SECONDS - SLACK)
    assert scene.when("abandon") == []
    assert scene.over is None
    scene.until(IMMEDIATE_SECONDS + 2 * SLACK)
    assert scene.when("abandon")[0] >= IMMEDIATE_SECONDS - 1e-6
    assert scene.when("requests abort") == []
    assert scene.over is not None


@pytest.mark.parametrize("moment", [0.5, 12, 25.8])
def test_skipped_pace_leaves_http_posts_a_second(scene, moment):
    """HTTP posts have a second from the first skip of the pace; a second skip does not extend it."""
    scene.log = []
    scene.requests.ask()
    scene.begin(30)
    scene.until(moment)
    scene.drain.skip_pace()
    late = min(moment + IMMEDIATE_SECONDS, limit(30))
    scene.until(late - SLACK)
    assert scene.when("abandon") == []
    scene.drain.skip_pace()
    scene.until(late + SLACK)
    assert len(scene.when("abandon")) == 1
    assert late <= scene.over + 1e-6


@pytest.mark.parametrize("immediate", [False, True])
def test_committed_http_posts_are_never_rejected(scene, immediate):
    """HTTP posts that settle in time are answered and never rejected."""
    scene.log = []
    scene.requests.ask()
    scene.begin(30, immediate=immediate)
    scene.until(0.9)
    assert scene.over is None
    scene.settle()
    scene.until(0.9 + SLACK)
    assert scene.over is None, "their answers are unread"
    scene.requests.answer()
    scene.until(30)
    assert 0.9 <= scene.over <= 0.9 + SLACK
    assert scene.when("abandon") == []


def test_answered_http_requests_end_the_wait(scene):
    """A drain does not wait for the log once all HTTP requests are answered."""
    scene.log = []
    scene.requests.ask()
    scene.begin(30)
    scene.until(10)
    scene.requests.answer()
    scene.until(10 + SLACK)
    assert scene.over is not None
    assert scene.when("abandon") == []
    assert scene.others == 0


def test_unread_http_answer_rejects_no_posts(scene):
    """A client that does not read its HTTP response does not cause posts to be rejected before the end."""
    scene.requests.gone = Deferred()
    scene.log = []
    scene.begin(30)
    scene.until(29.9)
    assert scene.when("abandon") == []
    scene.until(30)
    assert scene.when("abandon") == scene.when("requests abort") == [30]


def test_http_posts_settle_without_clients(scene):
    """HTTP posts have until the limit to settle, even if no WebSocket client is left."""
    people = scene.people(10)
    scene.log = []
    scene.requests.ask()
    scene.begin(120)
    scene.until(100)
    for person in people:
        person.goes()
    scene.until(limit(120) - SLACK)
    assert scene.when("abandon") == []
    assert scene.over is None
    scene.until(limit(120) + SLACK)
    assert len(scene.when("abandon")) == 1
    assert scene.over is not None


def test_order_at_the_end_of_the_budget(scene):
    """At the end of the budget the log is abandoned first, then clients and HTTP connections are aborted."""
    person = DrainedClient(scene, answers=None)
    scene.requests.gone = Deferred()
    scene.begin(8)
    scene.until(7.99)
    scene.journal.clear()
    scene.until(8)
    assert scene.journal == [
        *(("abandon", None), ("abort", person)),
        # The last client disconnects at once here.
        *(("requests close", None), ("settled?", None), ("requests abort", None)),
    ]
    assert scene.over == 8


# Clients that misbehave


def test_client_that_does_not_answer_the_close(scene):
    """A client that does not answer the close is aborted after CLOSE_SECONDS, so the drain can go on."""
    mute, *others = scene.people(50, answers=None)
    for other in others:
        other.answers = 0.01
    scene.begin(120)
    scene.until(120)
    assert mute.did == ["finish", "restart", "abort"]
    assert mute.released + CLOSE_SECONDS <= mute.journal[-1][1] <= mute.released + CLOSE_SECONDS + 1
    assert all(other.did == ["finish", "restart"] for other in others)
    assert scene.over < 120


@pytest.mark.parametrize("budget", [1, 8])
def test_clients_are_aborted_at_the_end_of_the_budget(scene, budget):
    """All clients and handshakes that remain at the end of the budget are aborted."""
    people = scene.people(5, answers=None)
    unfinished = DrainedClient(scene)
    scene.connections.remove(unfinished, 1000)
    scene.connections.handshakes.add(unfinished)
    scene.begin(budget)
    scene.until(budget - 0.1)
    assert scene.over is None
    scene.until(budget)
    assert scene.over is not None
    assert scene.over <= budget
    assert all(person.did[-1] == "abort" for person in people)
    assert all(person.journal[-1][1] <= budget for person in [*people, unfinished])


def test_aborted_clients_end_the_wait(scene):
    """A drain whose clients were aborted does not wait for the log."""
    people = scene.people(5, answers=None)
    scene.log = []
    scene.begin(8)
    scene.until(8)
    assert scene.over == 8
    assert [person.did for person in people] == [["finish", "restart", "abort"]] * 5


def test_no_calls_are_left_after_an_early_end(scene):
    """A drain that ends early leaves no delayed calls, and does nothing to later clients."""
    scene.people(10)
    scene.begin(30)
    scene.until(26)
    assert scene.over < 26
    assert scene.others == 0
    late = DrainedClient(scene)  # as if its handshake was refused
    scene.until(100)
    assert late.did == []


def test_client_that_leaves_on_its_release(scene, events):
    """The drain does not wait for a client that disconnects at the moment of its release."""
    person, other = scene.people(2, answers=0)
    other.answers = None
    scene.begin(30, immediate=True)
    scene.until(1)
    assert [*scene.connections.closings] == [other]
    scene.until(20)
    assert person.did == ["finish", "restart"]
    assert [event["peer"] for event in events if "why" in event] == [other.peer]


def test_client_that_leaves_before_its_release(scene):
    """A client that leaves while it waits for acknowledgements is not released."""
    person, other = scene.people(2)
    person.waits = other.waits = True
    scene.begin(30, immediate=True)
    scene.until(1)
    person.goes()
    other.waits = person.waits = False
    scene.until(2)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])
    assert scene.over is not None


def test_client_that_leaves_while_the_log_settles(scene):
    """A client that leaves while the log settles is not released."""
    person, other = scene.people(2)
    scene.log = []
    scene.begin(30, immediate=True)
    scene.until(1)
    person.goes()
    scene.settle()
    scene.until(2)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])


# The immediate drain


def immediate(scene, people):
    """Check that all clients are released, with delays of up to ten seconds."""
    assert all(person.did == ["finish", "restart"] for person in people)
    assert all(0 <= person.retry_after < 10 for person in people)


def test_immediate_drain_from_the_start(scene):
    """An immediate drain releases all clients at once, with delays spread over ten seconds."""
    people = scene.people(2000)
    scene.begin(30, immediate=True)
    assert scene.closed == 0
    scene.until(0)
    immediate(scene, people)
    assert {person.released for person in people} == {0}
    seconds = Counter(int(person.retry_after) for person in people)
    assert sorted(seconds) == [*range(10)]
    assert max(seconds.values()) < 1.5 * 200
    scene.until(1)
    assert 0 < scene.over < 0.1


@pytest.mark.parametrize("moment", [0.5, 7.4])
def test_skipped_pace_ends_the_grace(scene, moment):
    people = scene.people(50)
    scene.begin(30)
    scene.until(moment)
    assert scene.closed is None
    scene.drain.skip_pace()
    scene.until(moment + 2 * SLACK)
    immediate(scene, people)
    scene.until(moment + 1)
    assert scene.over < moment + 0.2
    assert scene.others == 0


def test_skipped_pace_releases_waiting_clients(scene):
    """When the pace is skipped, the remaining clients are released at once with longer delays."""
    people = scene.people(100)
    scene.begin(120)
    scene.until(60)
    before = scene.released()
    assert 30 < before < 50
    assert max(person.retry_after for person in people if person.did) < 1
    scene.drain.skip_pace()
    scene.until(60 + SLACK)
    immediate(scene, people)
    assert max(person.retry_after for person in people) > 5
    scene.until(61)
    assert scene.over < 60.2


def test_immediate_drain_settles_and_answers_posts(scene):
    """An immediate drain waits for posts to settle and for their answers."""
    person, other = scene.people(2)
    other.waits = True
    scene.log = []
    scene.begin(30)
    scene.until(7)
    scene.drain.skip_pace()
    scene.until(7.4)
    assert (person.did, other.did) == (["finish"], ["finish"])
    scene.settle()
    scene.until(7.4 + SLACK)
    assert (person.did, other.did) == (["finish", "restart"], ["finish"])
    other.waits = False
    scene.until(7.4 + 2 * SLACK)
    immediate(scene, [person, other])
    scene.until(30)
    assert scene.when("abandon") == []


@pytest.mark.parametrize("moment", [0, 0.5, 12, 22.5, 25.8])
def test_immediate_drain_waits_a_second_for_the_log(scene, moment):
    """An immediate drain rejects posts that are not committed after a second; a second skip changes nothing."""
    people = scene.people(40)
    scene.log = []
    scene.begin(30)
    scene.until(moment)
    assert scene.when("abandon") == []
    scene.drain.skip_pace()
    scene.drain.skip_pace()
    late = min(moment + IMMEDIATE_SECONDS, limit(30))
    scene.until(late - SLACK)
    assert scene.released() == 0
    scene.drain.skip_pace()  # which does not extend the second
    scene.until(late + 2 * SLACK)
    immediate(scene, people)
    assert min(scene.when("abandon")) >= late - 1e-6
    scene.until(30)
    assert scene.over <= late + 0.2


@pytest.mark.parametrize("moment", [0, 12])
def test_immediate_drain_waits_a_second_for_readers(scene, moment):
    """An immediate drain waits a second for clients that do not read their answers."""
    person, other = scene.people(2)
    person.waits = True
    scene.begin(30)
    scene.until(moment)
    scene.drain.skip_pace()
    scene.until(moment + IMMEDIATE_SECONDS - SLACK)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])
    scene.until(moment + IMMEDIATE_SECONDS + SLACK)
    immediate(scene, [person, other])
    assert scene.when("abandon") == []


def test_late_log_and_slow_readers_share_a_second(scene):
    """A log that settles late leaves slow readers only the rest of the second."""
    person = DrainedClient(scene)
    person.waits = True
    scene.log = []
    scene.begin(30, immediate=True)
    scene.until(0.9)
    scene.settle()
    scene.until(1 - SLACK)
    assert person.did == ["finish"]
    scene.until(1 + SLACK)
    assert person.did == ["finish", "restart"]


def test_skipped_pace_leaves_readers_a_second(scene):
    """Clients that await their answers when the pace is skipped have one more second."""
    people = scene.people(100)
    for person in people:
        person.waits = True
    scene.begin(120)
    scene.until(72)
    waiting = [person for person in people if person.did == ["finish"] and person.finished > 73 - FULL_SECONDS]
    others = [person for person in people if person.did == []]
    assert waiting
    assert others
    scene.drain.skip_pace()
    scene.until(73 - SLACK)
    assert all(person.did == ["finish"] for person in [*waiting, *others])
    scene.until(73 + SLACK)
    immediate(scene, people)


def test_skipped_pace_after_the_last_release(scene):
    """Skipping the pace after the last release changes nothing."""
    person = DrainedClient(scene, answers=None)
    scene.begin(8)
    scene.until(7)
    assert person.did == ["finish", "restart"]
    scene.drain.skip_pace()
    scene.drain.skip_pace()
    scene.until(8)
    assert person.did == ["finish", "restart", "abort"]
    assert scene.over == 8
