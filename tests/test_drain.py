"""How clients are sent elsewhere: at which pace, in which order, and within which time; with an injected clock."""

import random
from collections import Counter

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock, LoopingCall

from chatd import drain
from chatd.clients import CLOSE_SECONDS, Clients
from chatd.drain import ANSWER_SECONDS, Drain

TICK = drain.TICK_SECONDS
SLACK = TICK + 1e-6


class Person:
    """A client that notes when what was asked of it, and answers a close after a moment, or never."""

    carrier = "websocket"
    joined = True
    head = cursor = 0
    waits = False
    """Whether it waits for an acknowledgement."""

    def __init__(self, scene, answers=0.01):
        self.scene = scene
        self.answers = answers
        self.peer = f"192.0.2.7:{id(self)}"
        self.journal = []
        scene.clients.add(self)

    def note(self, what):
        self.journal.append((what, self.scene.clock.seconds()))
        self.scene.journal.append((what, self))

    def ping(self):
        return True

    def owed(self, head):
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
        self.scene.clients.remove(self, 1012)

    @property
    def did(self):
        return [what for what, _ in self.journal]

    @property
    def told(self):
        """When it was told to come back."""
        (moment,) = [moment for what, moment in self.journal if what == "restart"]
        return moment


class Scene:
    """A server that is looked after each second; its log settles at once, or when it is let."""

    def __init__(self):
        self.clock = Clock()
        self.clients = Clients(self.clock)
        self.journal = []
        self.log = None
        """The Deferreds of those who wait for the log, if it does not settle at once."""
        self.ports = succeed(None)
        self.closed = None
        self.over = None
        looks = LoopingCall(self.clients.look)
        looks.clock = self.clock
        looks.start(1)

    def people(self, count, **more):
        return [Person(self, **more) for _ in range(count)]

    def settled(self):
        self.journal.append(("settled?", None))
        if self.log is None:
            return succeed(None)
        self.log.append(Deferred())
        return self.log[-1]

    def settle(self):
        log, self.log = self.log, None
        for settled in log:
            settled.callback(None)

    def close_ports(self):
        self.closed = self.clock.seconds()
        self.journal.append(("ports", None))
        return self.ports

    def begin(self, budget):
        """Begin a drain; `over` is then the moment when it has ended."""
        self.drain = Drain(self.clients, self.settled, budget, self.clock)
        return self.run()

    def run(self):
        self.drain.run(self.close_ports).addCallback(self.end)
        return self.drain

    def end(self, result):
        assert result is None
        self.over = self.clock.seconds()

    def until(self, moment):
        """Let time pass, from each thing that is due to the next."""
        while self.clock.calls and self.clock.calls[0].getTime() <= moment:
            self.clock.advance(max(0, self.clock.calls[0].getTime() - self.clock.seconds()))
        self.clock.advance(max(0, moment - self.clock.seconds()))

    def told(self):
        """How many were told by now."""
        return sum(what == "restart" for what, _ in self.journal)

    @property
    def others(self):
        """How much is on the clock besides the looking."""
        return len(self.clock.calls) - 1


@pytest.fixture
def scene(monkeypatch):
    monkeypatch.setattr(drain.random, "random", random.Random(7).random)
    return Scene()


def grace(budget):
    """How long handshakes are still accepted."""
    return min(20, budget / 4)


def end(budget):
    """When the last is told, so that it has time to answer."""
    return budget - min(ANSWER_SECONDS, budget / 4)


BUDGETS = pytest.mark.parametrize("budget", [1, 8, 30, 120])


def test_the_figures():
    assert (drain.GRACE_SECONDS, drain.SPREAD_SECONDS, drain.HURRIED_SPREAD_SECONDS) == (20, 1, 10)
    assert [grace(budget) for budget in (0, 1, 8, 30, 120)] == [0, 0.25, 2, 7.5, 20]
    assert [end(budget) for budget in (0, 1, 8, 30, 120)] == [0, 0.75, 6, 23, 113]


# The pace


@BUDGETS
@pytest.mark.parametrize("count", [1, 3, 100, 2000])
def test_clients_are_told_at_an_even_pace_from_the_end_of_the_grace_until_time_to_answer_is_left(scene, count, budget):
    people = scene.people(count)
    scene.begin(budget)
    scene.until(budget)
    told = sorted(person.told for person in people)
    begin, whole = grace(budget), end(budget) - grace(budget)
    assert told[0] >= begin
    assert told[-1] <= end(budget) + SLACK
    for place, moment in enumerate(told, 1):
        assert abs(moment - (begin + whole * place / count)) <= SLACK + whole / count
    assert told[-1] <= scene.over <= budget
    assert [person.did for person in people] == [["finish", "restart"]] * count


@pytest.mark.parametrize("budget", [8, 30, 120])
def test_they_come_back_elsewhere_as_an_even_stream(scene, budget):
    count = 2000
    people = scene.people(count)
    scene.begin(budget)
    scene.until(budget)
    assert all(0 <= person.retry_after < 1 for person in people)
    assert 0.45 < sum(person.retry_after for person in people) / count < 0.55
    even = count / (end(budget) - grace(budget))
    arrivals = sorted(person.told + person.retry_after for person in people)
    peak = max(sum(moment <= other < moment + 1 for other in arrivals) for moment in arrivals[::10])
    assert peak <= 1.5 * even


def test_a_budget_of_nothing_tells_all_at_once_and_waits_for_nobody(scene):
    people = [*scene.people(3), *scene.people(2, answers=None)]
    scene.begin(0)
    assert scene.told() == 5
    scene.until(0)
    assert scene.over == 0
    assert [person.did[-1] for person in people] == ["abort"] * 5
    assert scene.others == 3, "the answers of those who are gone"


@BUDGETS
def test_who_leaves_by_itself_hastens_nobody(scene, budget):
    people = scene.people(1000)
    scene.begin(budget)
    for person in people[::2]:
        person.goes()
    scene.until(budget)
    told = sorted(person.told for person in people[1::2])
    assert [person.did for person in people[::2]] == [[]] * 500
    half = (grace(budget) + end(budget)) / 2
    assert 200 <= sum(moment <= half for moment in told) <= 300
    assert told[-1] <= end(budget) + SLACK


# The grace


@BUDGETS
def test_handshakes_are_accepted_until_the_grace_is_over(scene, budget):
    scene.people(1)
    scene.begin(budget)
    scene.until(grace(budget) - SLACK)
    assert scene.closed is None
    assert not scene.clients.stopping
    assert scene.told() == 0
    scene.until(grace(budget) + SLACK)
    assert grace(budget) <= scene.closed
    assert scene.clients.stopping


def test_who_came_in_the_grace_is_told_too(scene):
    first = Person(scene)
    scene.begin(8)
    scene.until(1.9)
    late = Person(scene)
    scene.until(8)
    assert (first.did, late.did) == (["finish", "restart"], ["finish", "restart"])


def test_who_comes_while_the_ports_close_is_told_too_and_nobody_before(scene):
    first = Person(scene)
    scene.ports = Deferred()
    scene.begin(8)
    scene.until(3)
    assert scene.closed is not None
    assert not scene.clients.stopping
    assert first.did == []
    last = Person(scene)
    scene.ports.callback(None)
    assert scene.clients.stopping
    scene.until(6 + SLACK)
    assert (first.did, last.did) == (["finish", "restart"], ["finish", "restart"])


def test_when_all_leave_in_the_grace_it_ends_at_once(scene):
    people = scene.people(3)
    scene.begin(120)
    scene.until(1)
    for person in people:
        person.goes()
    scene.until(1 + SLACK)
    assert scene.over >= 1
    assert scene.closed == scene.over
    assert scene.clients.stopping
    assert scene.others == 0


@pytest.mark.parametrize("budget", [0, 1, 30, 120])
def test_with_nobody_there_it_is_over_at_once(scene, budget):
    scene.begin(budget)
    assert scene.journal == [("ports", None)]
    assert scene.over == 0
    assert scene.clients.stopping
    assert scene.others == 0


def test_unfinished_handshakes_are_not_waited_for(scene):
    person = Person(scene)
    scene.clients.remove(person, 1000)
    scene.clients.handshakes.add(person)
    scene.begin(30)
    assert scene.over == 0
    assert person.did == []


# What was said


def test_a_client_is_read_no_more_before_what_was_read_of_it_is_settled_and_told_after(scene):
    person = Person(scene)
    scene.log = []
    scene.begin(8)
    scene.until(6)
    assert scene.journal[-2:] == [("finish", person), ("settled?", None)]
    scene.log = None
    scene.journal.clear()
    scene.until(6 + SLACK)
    assert scene.journal == [("restart", person)]


def test_the_next_are_read_no_more_although_the_log_has_not_settled(scene):
    people = scene.people(100)
    scene.log = []
    scene.begin(8)
    scene.until(4)
    finished = [person for person in people if person.did]
    assert 48 <= len(finished) <= 52
    scene.settle()
    scene.until(4 + SLACK)
    assert 48 <= scene.told() <= 54
    assert all(person.did == ["finish", "restart"] for person in finished)


def test_each_waits_for_the_log_as_it_was_when_it_was_read_last(scene):
    # The log settles for the first, and then no more until the end.
    people = scene.people(2)
    scene.log = []
    scene.begin(8)
    scene.until(4 + SLACK)
    (first,) = scene.log
    first.callback(None)
    scene.until(4 + 2 * SLACK)
    assert scene.told() == 1
    scene.until(6 - SLACK)
    assert scene.told() == 1
    scene.until(6 + 2 * SLACK)
    assert scene.told() == 2
    scene.until(8)
    assert [person.did for person in people] == [["finish", "restart"]] * 2


def test_a_client_is_told_when_it_has_what_was_in_the_log_when_that_settled(scene):
    person = Person(scene)
    scene.log = []
    scene.begin(30)
    scene.drain.hurry()
    scene.until(1)
    person.head = 7
    scene.settle()
    scene.until(2)
    person.cursor = 6
    scene.until(3)
    assert person.did == ["finish"]
    person.cursor = 7
    person.head = 1000  # others go on posting
    scene.until(3 + SLACK)
    assert person.did == ["finish", "restart"]


def test_a_client_is_told_when_it_has_its_answers(scene):
    person, other = scene.people(2)
    person.waits = True
    scene.begin(30)
    scene.drain.hurry()
    scene.until(3)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])
    person.waits = False
    scene.until(3 + SLACK)
    assert person.did == ["finish", "restart"]
    scene.until(4)
    assert 3 < scene.over < 3.1


@pytest.mark.parametrize("budget", [1, 8, 30, 120])
def test_who_never_gets_its_answers_is_told_in_time_to_answer_the_close(scene, budget):
    person = Person(scene)
    person.waits = True
    people = scene.people(20)
    scene.begin(budget)
    scene.until(budget)
    assert end(budget) <= person.told <= end(budget) + SLACK
    assert all(other.told <= end(budget) + SLACK for other in people)
    assert scene.over <= end(budget) + SLACK + 0.02


@BUDGETS
def test_a_log_that_never_settles_makes_it_no_longer(scene, budget):
    people = scene.people(100)
    scene.log = []
    scene.begin(budget)
    scene.until(end(budget) - SLACK)
    assert scene.told() == 0, "their posts may still be kept"
    scene.until(end(budget) + 2 * SLACK)
    assert scene.told() == 100
    scene.until(budget)
    assert scene.over <= budget
    assert [person.did for person in people] == [["finish", "restart"]] * 100


def test_with_nobody_left_it_ends_at_once_although_the_log_has_not_settled(scene):
    people = scene.people(10)
    scene.log = []
    scene.begin(120)
    scene.until(100)
    for person in people:
        person.goes()
    scene.until(100 + 2 * SLACK)
    assert scene.over is not None


# Those who do not go as they should


def test_who_does_not_answer_the_close_is_dropped_in_time_to_go_on(scene):
    mute, *others = scene.people(50, answers=None)
    for other in others:
        other.answers = 0.01
    scene.begin(120)
    scene.until(120)
    assert mute.did == ["finish", "restart", "abort"]
    assert mute.told + CLOSE_SECONDS <= mute.journal[-1][1] <= mute.told + CLOSE_SECONDS + 1
    assert all(other.did == ["finish", "restart"] for other in others)
    assert scene.over < 120


@pytest.mark.parametrize("budget", [1, 8])
def test_whoever_is_left_at_the_end_of_the_budget_is_aborted(scene, budget):
    people = scene.people(5, answers=None)
    unfinished = Person(scene)
    scene.clients.remove(unfinished, 1000)
    scene.clients.handshakes.add(unfinished)
    scene.begin(budget)
    scene.until(budget - 0.1)
    assert scene.over is None
    scene.until(budget)
    assert scene.over is not None
    assert scene.over <= budget
    assert all(person.did[-1] == "abort" for person in people)
    assert all(person.journal[-1][1] <= budget for person in [*people, unfinished])


def test_who_was_aborted_is_waited_for_no_more_although_the_log_has_not_settled(scene):
    people = scene.people(5, answers=None)
    scene.log = []
    scene.begin(8)
    scene.until(8)
    assert scene.over == 8
    assert [person.did for person in people] == [["finish", "restart", "abort"]] * 5


def test_when_it_is_over_before_its_time_nothing_is_left_on_the_clock(scene):
    scene.people(10)
    scene.begin(30)
    scene.until(26)
    assert scene.over < 26
    assert scene.others == 0
    late = Person(scene)  # as if it had been refused
    scene.until(100)
    assert late.did == []


def test_who_is_gone_at_once_when_it_is_told_is_waited_for_no_more(scene, events):
    person, other = scene.people(2, answers=0)
    other.answers = None
    scene.begin(30)
    scene.drain.hurry()
    scene.until(1)
    assert [*scene.clients.closings] == [other]
    scene.until(20)
    assert person.did == ["finish", "restart"]
    assert [event["peer"] for event in events if "why" in event] == [other.peer]


def test_who_leaves_between_its_last_word_and_its_close_is_told_nothing(scene):
    person, other = scene.people(2)
    person.waits = other.waits = True
    scene.begin(30)
    scene.drain.hurry()
    scene.until(1)
    person.goes()
    other.waits = person.waits = False
    scene.until(2)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])
    assert scene.over is not None


def test_who_leaves_while_the_log_settles_is_told_nothing(scene):
    person, other = scene.people(2)
    scene.log = []
    scene.begin(30)
    scene.drain.hurry()
    scene.until(1)
    person.goes()
    scene.settle()
    scene.until(2)
    assert (person.did, other.did) == (["finish"], ["finish", "restart"])


# In a hurry


def hurried(scene, people):
    """All were told by now, each with a moment among longer ones."""
    assert all(person.did == ["finish", "restart"] for person in people)
    assert all(0 <= person.retry_after < 10 for person in people)


def test_in_a_hurry_from_the_first_all_are_told_now_with_longer_moments(scene):
    people = scene.people(2000)
    scene.drain = Drain(scene.clients, scene.settled, 30, scene.clock)
    scene.drain.hurry()
    scene.run()
    assert scene.closed == 0
    scene.until(0)
    hurried(scene, people)
    assert {person.told for person in people} == {0}
    seconds = Counter(int(person.retry_after) for person in people)
    assert sorted(seconds) == [*range(10)]
    assert max(seconds.values()) < 1.5 * 200
    scene.until(1)
    assert 0 < scene.over < 0.1


@pytest.mark.parametrize("moment", [0.5, 7.4])
def test_in_a_hurry_the_grace_is_over(scene, moment):
    people = scene.people(50)
    scene.begin(30)
    scene.until(moment)
    assert scene.closed is None
    scene.drain.hurry()
    scene.until(moment + 2 * SLACK)
    hurried(scene, people)
    scene.until(moment + 1)
    assert scene.over < moment + 0.2
    assert scene.others == 0


def test_in_a_hurry_those_who_wait_for_their_turn_are_told_now(scene):
    people = scene.people(100)
    scene.begin(120)
    scene.until(60)
    before = scene.told()
    assert 30 < before < 50
    assert max(person.retry_after for person in people if person.did) < 1
    scene.drain.hurry()
    scene.until(60 + SLACK)
    hurried(scene, people)
    assert max(person.retry_after for person in people) > 5
    scene.until(61)
    assert scene.over < 60.2


def test_in_a_hurry_what_was_said_is_settled_and_answered_all_the_same(scene):
    person, other = scene.people(2)
    other.waits = True
    scene.log = []
    scene.begin(30)
    scene.until(10)
    scene.drain.hurry()
    scene.until(12)
    assert (person.did, other.did) == (["finish"], ["finish"])
    scene.settle()
    scene.until(12 + SLACK)
    assert (person.did, other.did) == (["finish", "restart"], ["finish"])
    other.waits = False
    scene.until(12 + 2 * SLACK)
    hurried(scene, [person, other])


def test_a_hurry_when_all_were_told_changes_nothing(scene):
    person = Person(scene, answers=None)
    scene.begin(8)
    scene.until(7)
    assert person.did == ["finish", "restart"]
    scene.drain.hurry()
    scene.drain.hurry()
    scene.until(8)
    assert person.did == ["finish", "restart", "abort"]
    assert scene.over == 8
