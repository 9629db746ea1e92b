"""Everyone who is connected: what becomes of them as time passes, and when all must go."""

import pytest
from twisted.internet.task import Clock

from chatd.transport.connections import CLOSE_SECONDS, HANDSHAKE_SECONDS, PING_SECONDS, STALL_SECONDS, Clients


class Client:
    """A connection that notes what is asked of it."""

    peer = "192.0.2.7:4321"
    carrier = "websocket"
    joined = True
    answers = True

    connection = 0

    def __init__(self):
        self.journal = []

    def ping(self):
        self.journal.append("ping")
        return self.answers

    def overrun(self):
        self.journal.append("overrun")
        self.joined = False

    def abort(self):
        self.journal.append("abort")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def clients(clock):
    return Clients(clock)


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def look(clients, clock):
    """Lets time pass, and looks each second as the service does."""

    def look(seconds):
        for _ in range(seconds):
            clock.advance(1)
            clients.look()

    return look


def reasons(events):
    return [event["why"] for event in events if "why" in event]


# Coming and going


def test_there_is_nobody_at_first(clients):
    assert clients.connected == set()
    assert not clients.stopping
    assert clients.closes == {}


def test_who_joins_is_connected_and_its_handshake_is_waited_for_no_longer(clients, client):
    clients.handshakes.add(client)
    clients.add(client)
    assert clients.connected == {client}
    assert [*clients.handshakes] == []
    assert [*clients.pings] == [client]


def test_of_who_goes_nothing_is_left(clients, client, look):
    clients.add(client)
    for deadlines in (clients.handshakes, clients.closings, clients.stalls):
        deadlines.add(client)
    assert clients.remove(client, 1000)
    assert clients.connected == set()
    look(STALL_SECONDS + 1)
    assert client.journal == []


def test_who_goes_before_its_handshake_was_answered_was_never_there(clients, client):
    clients.handshakes.add(client)
    assert not clients.remove(client, 1000)
    assert [*clients.handshakes] == []


def test_who_has_gone_is_not_there_a_second_time(clients, client):
    clients.add(client)
    assert clients.remove(client, 1000)
    assert not clients.remove(client, 1000)


def test_who_is_gone_is_counted_by_what_carried_it_and_by_its_close_code(clients):
    for carrier, code in [("websocket", 1000), ("websocket", 1012), ("events", 1012), ("websocket", 1000)]:
        client = Client()
        client.carrier = carrier
        clients.add(client)
        clients.remove(client, code)
    clients.remove(Client(), 1006)  # its handshake was never answered
    assert clients.closes == {("websocket", 1000): 2, ("websocket", 1012): 1, ("events", 1012): 1}


def test_who_is_pinged_how_often_is_for_the_operator_to_say(clock):
    clients = Clients(clock, 3)
    client = Client()
    clients.add(client)
    for journal in ([], [], ["ping"], ["ping"], ["ping"], ["ping", "ping"]):
        clock.advance(1)
        clients.look()
        assert client.journal == journal


# Looking


def test_a_handshake_that_takes_too_long_is_dropped_and_that_is_said_once(clients, client, look, events):
    clients.handshakes.add(client)
    look(HANDSHAKE_SECONDS - 1)
    assert client.journal == []
    look(HANDSHAKE_SECONDS)
    assert client.journal == ["abort"]
    assert [event["log_format"].format(**event) for event in events] == [
        "#0 192.0.2.7:4321 is dropped: it sent no whole request in time"
    ]


def test_who_answers_is_pinged_again_and_again(clients, client, look):
    clients.add(client)
    look(PING_SECONDS - 1)
    assert client.journal == []
    look(1)
    assert client.journal == ["ping"]
    look(2 * PING_SECONDS)
    assert client.journal == ["ping"] * 3


def test_who_did_not_answer_is_dropped_when_the_next_ping_is_due_and_pinged_no_more(clients, client, look, events):
    clients.add(client)
    look(PING_SECONDS)
    client.answers = False
    look(PING_SECONDS - 1)
    assert client.journal == ["ping"]
    look(2 * PING_SECONDS)
    assert client.journal == ["ping", "ping", "abort"]
    assert reasons(events) == ["did not answer a ping"]


def test_who_takes_nothing_is_told_to_come_back_and_then_dropped(clients, client, look, events):
    clients.stalls.add(client)
    look(STALL_SECONDS - 1)
    assert client.journal == []
    look(1)
    assert client.journal == ["overrun"]
    look(STALL_SECONDS - 1)
    assert client.journal == ["overrun"]
    look(STALL_SECONDS)
    assert client.journal == ["overrun", "abort"]
    assert reasons(events) == ["took nothing"]


def test_who_takes_nothing_and_is_closing_already_is_dropped_at_once(clients, client, look):
    client.joined = False
    clients.stalls.add(client)
    look(STALL_SECONDS)
    assert client.journal == ["abort"]


def test_who_takes_something_again_stays(clients, client, look):
    clients.stalls.add(client)
    look(STALL_SECONDS - 1)
    clients.stalls.discard(client)
    look(STALL_SECONDS)
    assert client.journal == []


def test_who_does_not_answer_a_close_is_dropped(clients, client, look, events):
    clients.closings.add(client)
    look(CLOSE_SECONDS - 1)
    assert client.journal == []
    look(CLOSE_SECONDS)
    assert client.journal == ["abort"]
    assert reasons(events) == ["did not answer the close"]


def test_each_has_deadlines_of_its_own(clients, look):
    early, late = Client(), Client()
    clients.add(early)
    look(1)
    clients.add(late)
    look(PING_SECONDS - 1)
    assert (early.journal, late.journal) == (["ping"], [])
    look(1)
    assert (early.journal, late.journal) == (["ping"], ["ping"])


# The end


def test_who_does_not_answer_a_close_is_dropped_however_full_its_transport_is(clients, client, look):
    clients.add(client)
    clients.stalls.add(client)
    clients.closings.add(client)
    look(CLOSE_SECONDS)
    assert client.journal == ["abort"]


def test_abort_drops_what_is_left_and_unfinished_handshakes(clients):
    joined, unfinished = Client(), Client()
    clients.add(joined)
    clients.handshakes.add(unfinished)
    clients.abort()
    assert (joined.journal, unfinished.journal) == (["abort"], ["abort"])


def test_nobody_is_there_at_once_when_there_is_none(clients):
    assert clients.empty().called


def test_empty_fires_for_all_who_asked_when_the_last_is_gone_and_only_once(clients):
    first, last = Client(), Client()
    clients.add(first)
    clients.add(last)
    fired = []
    clients.empty().addCallback(lambda _: fired.append("one"))
    clients.empty().addCallback(lambda _: fired.append("other"))
    clients.remove(first, 1000)
    assert fired == []
    clients.remove(last, 1000)
    assert fired == ["one", "other"]
    clients.add(first)
    clients.remove(first, 1000)
    assert fired == ["one", "other"]


def test_unfinished_handshakes_are_not_waited_for(clients, client):
    clients.handshakes.add(client)
    assert clients.empty().called
