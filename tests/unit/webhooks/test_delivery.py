"""The schedule of a webhook over a store in memory, with a transport and a clock that the test drives."""

import json

import pytest
from support.helpers import RecordingPoster, result_of
from support.stores import FaultyStore
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import REMOVED, Id, Post
from chatd.room.cursors import HELD
from chatd.room.log import LogUnavailable
from chatd.store.base import Retention
from chatd.webhooks import delivery
from chatd.webhooks.batch import MAX_ENTRIES
from chatd.webhooks.delivery import (
    BACKOFF_SECONDS,
    BURST_SECONDS,
    GATHER_SECONDS,
    LOG_SECONDS,
    MAX_WAIT_SECONDS,
    PARALLEL,
    RATE,
    STORE_SECONDS,
    Webhook,
)
from chatd.webhooks.fanout import STOP_SECONDS, Fanout
from chatd.webhooks.lease import END_SECONDS, LEASE_SECONDS, MARGIN_SECONDS, RENEW_SECONDS
from chatd.webhooks.sender import Answer

LOST = not HELD
TAKEN, WRONG, NONE, GONE = Answer(204), Answer(500), Answer(None, "cannot be reached"), Answer(410)


class Application:
    """A transport that the test answers; a cancelled request answers as the sender's does."""

    def __init__(self):
        self.sent = []
        self.waiting = {}
        self.bodies = {}
        self.closed = 0

    answer_when_cancelled = NONE

    def send(self, webhook_id, body):
        answer = Deferred(lambda _: answer.callback(self.answer_when_cancelled))
        self.sent.append(webhook_id)
        self.waiting[webhook_id] = answer
        self.body = self.bodies[webhook_id] = json.loads(body)
        return answer

    def take(self):
        """Take the oldest delivery, and return its texts."""
        body = self.bodies[next(iter(self.waiting))]
        self.answer()
        return [message["data"]["message"] for message in body["messages"]]

    def answer(self, answer=TAKEN, webhook_id=None):
        """Answer a request, by default the oldest one."""
        self.waiting.pop(webhook_id or next(iter(self.waiting))).callback(answer)

    def close(self):
        self.closed += 1
        return succeed(None)


class Store(FaultyStore):
    """A store whose cursors fail or wait while the test asks for it."""

    lapsed = cursors_down = new_epoch = False
    held_cursors = None

    def claim(self, reader, word, seconds):
        if self.lapsed or self.cursors_down:
            return fail(LogUnavailable("away")) if self.cursors_down else succeed(LOST)
        claimed = super().claim(reader, word, seconds)
        if self.new_epoch:
            super().advance(reader, word, {"team": 0})
        return claimed

    def renew(self, reader, word, seconds):
        return fail(LogUnavailable("away")) if self.cursors_down else succeed(not self.lapsed)

    def advance(self, reader, word, cursors):
        if self.cursors_down:
            return fail(LogUnavailable("away"))
        if self.held_cursors is not None:
            self.held_cursors.append(Deferred())
            return self.held_cursors[-1]
        return succeed(LOST) if self.lapsed else super().advance(reader, word, cursors)

    def behind(self, reader, place):
        return fail(LogUnavailable("away")) if self.cursors_down else super().behind(reader, place)


class Bench:
    """A webhook over a store in the epoch `k7Q2`; while it is `deaf`, it hears of no message."""

    deaf = False

    def __init__(self, retain=None, jitter=lambda _, most: most, *, start=True):
        self.store = Store(retain and Retention.parse(retain))
        self.store.open(())
        self.store.epoch = "k7Q2"
        self.clock = Clock()
        self.application = Application()
        self.webhook = Webhook(
            "app",
            "reader",
            self.application,
            log=self.store,
            cursors=self.store,
            clock=self.clock,
            now=self.store.now,
            jitter=jitter,
        )
        self.fanout = Fanout([self.webhook], None)
        self.store.follow(self)
        if start:
            self.webhook.start()

    def appended(self, room, entries):
        if not self.deaf:
            self.fanout.appended(room, entries)

    def trimmed(self, room, first):
        self.fanout.trimmed(room, first)

    def lose(self):
        """Lose the lease: the store refuses to renew the claim, and goes on to refuse."""
        self.store.lapsed = True
        self.pass_time(RENEW_SECONDS)
        assert not self.webhook.active

    def say(self, *texts, room="team", **fields):
        poster = RecordingPoster()
        for text in texts:
            self.store.append(room, Post("ann", text, **fields), poster)
        return poster.numbers

    def pass_time(self, seconds):
        """Let time pass in steps, between which the lease is renewed."""
        whole, rest = divmod(seconds, 1)
        self.clock.pump([1.0] * int(whole) + [rest])

    def gather(self):
        self.pass_time(GATHER_SECONDS)

    def sent(self):
        """Return the ids of the deliveries since the last call, without the epoch."""
        sent, self.application.sent[:] = [*self.application.sent], []
        return [one.replace("k7Q2-", "") for one in sent]

    def deliver(self, *texts, room="team"):
        """Post texts that the application takes."""
        self.say(*texts, room=room)
        self.gather()
        self.application.answer()
        self.sent()

    def cursor(self, room="team"):
        return result_of(self.store.cursor("reader", room))


@pytest.fixture
def bench():
    return Bench()


# Batches


def test_entries_of_a_moment_share_a_delivery(bench):
    bench.say("a")
    bench.pass_time(GATHER_SECONDS / 2)
    bench.say("b")
    assert bench.sent() == []
    bench.pass_time(GATHER_SECONDS / 2)
    assert bench.sent() == ["team:1:2"]
    assert bench.webhook.lag == (2, 0)
    bench.application.answer()
    assert (bench.cursor(), bench.webhook.lag) == (2, (0, 0))
    assert (bench.webhook.outcomes, bench.webhook.messages) == ({"taken": 1}, 2)


def test_next_batch_waits_for_the_answer(bench):
    """Entries of a room are in order, because a room has one request at a time."""
    bench.say("a")
    bench.gather()
    bench.say("b", "c")
    bench.gather()
    assert bench.sent() == ["team:1:1"]
    bench.application.answer()
    bench.gather()
    assert bench.sent() == ["team:2:3"]


def test_next_batch_waits_for_the_cursor(bench):
    """A restart therefore repeats no more than one batch of a room."""
    bench.store.held_cursors = []
    bench.say("a")
    bench.gather()
    bench.say("b")
    bench.application.answer()
    bench.gather()
    assert bench.sent() == ["team:1:1"]
    bench.store.held_cursors[0].callback(HELD)
    bench.gather()
    assert bench.sent() == ["team:2:2"]


def test_cursors_are_stored_together(bench):
    """The batches that are taken while the store writes share its next write."""
    bench.store.held_cursors = held = []
    for room in ("a", "b", "c"):
        bench.say("x", room=room)
    bench.gather()
    for _ in range(3):
        bench.application.answer()
    assert len(held) == 1
    held[0].callback(HELD)
    assert len(held) == 2
    held[1].callback(HELD)
    assert len(held) == 2


def test_retry_has_the_same_id(bench):
    """The range of a batch is fixed until it is taken, whatever is appended meanwhile."""
    bench.say("a", "b")
    bench.gather()
    bench.application.answer(WRONG)
    bench.say("c")
    bench.pass_time(BACKOFF_SECONDS[0])
    assert bench.sent() == ["team:1:2"] * 2
    bench.application.answer()
    bench.gather()
    assert bench.sent() == ["team:3:3"]


def test_retry_does_not_hold_what_was_removed(bench):
    """The text of a batch is read again for each attempt."""
    bench.say("secret", author="a")
    bench.gather()
    bench.application.answer(WRONG)
    bench.say(REMOVED, author="a", replaces=Id("k7Q2", 1), removed=True)
    bench.pass_time(BACKOFF_SECONDS[0])
    (message,) = bench.application.body["messages"]
    assert (message["data"]["message"], message["removed"]) == (REMOVED, True)
    assert bench.sent() == ["team:1:1"] * 2


@pytest.mark.parametrize("edited", [False, True])
def test_removal_drops_a_request_that_has_the_text(bench, edited):
    """The batch is sent again at once without the text, which an edit may hold too."""
    bench.say("secret", author="a")
    if edited:
        bench.deliver()
        bench.say("another secret", author="a", replaces=Id("k7Q2", 1))
    bench.gather()
    (sent,) = bench.sent()[-1:]
    with capturedLogs() as events:
        bench.say(REMOVED, author="a", replaces=Id("k7Q2", 1), removed=True)
        bench.application.waiting.pop(f"team:k7Q2-{sent.removeprefix('team:')}")
        bench.gather()
        assert bench.sent() == [sent]
    assert events == []
    (message,) = bench.application.body["messages"]
    assert (message["data"]["message"], message["removed"]) == (REMOVED, True)
    bench.application.answer()
    bench.gather()
    assert bench.webhook.outcomes == {"taken": 1 + edited, "unanswered": 1}
    assert len(bench.sent()) == 1


def test_removal_of_another_message_drops_nothing(bench):
    bench.say("a", author="a")
    bench.deliver()
    bench.say("b", author="a")
    bench.gather()
    bench.say(REMOVED, author="a", replaces=Id("k7Q2", 1), removed=True)
    bench.webhook.erased("other", [2])
    bench.application.answer()
    assert bench.webhook.outcomes == {"taken": 2}


def test_answer_that_precedes_a_drop_counts(bench):
    """The application that has taken the text gets the removal next."""
    bench.say("secret", author="a")
    bench.gather()
    bench.application.answer_when_cancelled = TAKEN
    bench.say(REMOVED, author="a", replaces=Id("k7Q2", 1), removed=True)
    assert bench.webhook.outcomes == {"taken": 1}
    bench.gather()
    assert bench.sent() == ["team:1:1", "team:2:2"]


def test_removal_while_the_batch_is_read(bench, monkeypatch):
    """A page from before the removal is not sent."""
    pages, read = [], bench.store.read

    def slow(*wanted):
        page = read(*wanted)
        pages.append((Deferred(), result_of(page)))
        return pages[-1][0]

    monkeypatch.setattr(bench.store, "read", slow)
    bench.say("secret", author="a")
    bench.gather()
    bench.say(REMOVED, author="a", replaces=Id("k7Q2", 1), removed=True)
    pages[0][0].callback(pages[0][1])
    bench.gather()
    assert bench.sent() == []
    pages[1][0].callback(pages[1][1])
    assert bench.sent() == ["team:1:2"]
    assert "secret" not in str(bench.application.body)


def test_cleared_room_drops_its_request(bench):
    """Messages that retention alone has trimmed may be delivered."""
    bench.say("a", "b")
    bench.gather()
    bench.fanout.trimmed("team", 2)
    bench.fanout.trimmed("other", 2)
    assert bench.webhook.outcomes == {}
    bench.store.clear_room("team")
    bench.gather()
    assert bench.sent() == ["team:1:2"] * 2
    assert bench.application.body["messages"] == []


def test_long_backlog_is_sent_in_batches(bench):
    bench.say(*"x" * (2 * MAX_ENTRIES + 1))
    for _ in range(3):
        bench.gather()
        bench.application.answer()
    assert bench.sent() == ["team:1:100", "team:101:200", "team:201:201"]


def test_new_webhook_begins_at_the_heads():
    bench = Bench(start=False)
    bench.say("a")
    bench.webhook.start()
    bench.say("b")
    bench.gather()
    assert bench.sent() == ["team:2:2"]
    assert "start" not in bench.application.body


# Failures


def test_backoff_doubles_up_to_a_limit(bench):
    """With full jitter, each pause is a random part of this."""
    bench.say("a")
    bench.gather()
    pause = BACKOFF_SECONDS[0]
    for _ in range(10):
        bench.sent()
        bench.application.answer(NONE)
        bench.pass_time(pause * 0.99)
        assert bench.sent() == []
        bench.pass_time(pause * 0.02)
        assert bench.sent() == ["team:1:1"]
        pause = min(2 * pause, BACKOFF_SECONDS[1])


def test_pause_is_a_part_of_the_backoff():
    asked = []
    bench = Bench(jitter=lambda *bounds: asked.append(bounds) or 0.0)
    bench.say("a")
    bench.gather()
    bench.application.answer(NONE)
    assert asked == [(0.0, BACKOFF_SECONDS[0])]
    bench.pass_time(0)
    assert bench.sent() == ["team:1:1"] * 2


def test_slow_room_does_not_stop_others(bench):
    bench.say("a", room="slow")
    bench.gather()
    bench.say("b", room="quick")
    bench.gather()
    bench.application.answer(webhook_id="quick:k7Q2-1:1")
    assert bench.cursor("quick") == 1
    assert [*bench.application.waiting] == ["slow:k7Q2-1:1"]


def test_failing_room_does_not_stop_others(bench):
    """Its failures count for itself while other rooms succeed."""
    bench.say("a", room="bad")
    bench.gather()
    for number in range(2 * PARALLEL):
        bench.application.answer(WRONG, "bad:k7Q2-1:1")
        bench.deliver("x", room=f"r{number}")
        bench.pass_time(BACKOFF_SECONDS[1])
    assert bench.webhook.outcomes == {"rejected": 2 * PARALLEL, "taken": 2 * PARALLEL}


def test_requests_in_parallel_are_bounded(bench):
    for number in range(PARALLEL + 2):
        bench.say("x", room=f"r{number}")
    bench.gather()
    assert len(bench.sent()) == PARALLEL
    bench.application.answer()
    assert len(bench.sent()) == 1


def test_deliveries_in_a_second_are_bounded(bench):
    """Rooms then wait for each other, and their messages share deliveries."""
    seconds, taken = 5, []
    for _ in range(10 * seconds):
        for number in range(30):
            bench.say("x", room=f"r{number}")
        bench.clock.pump([0.01] * 10)
        while bench.application.waiting:
            bench.application.answer()
        taken += bench.sent()
    assert len(taken) <= seconds * RATE + BURST_SECONDS * RATE
    bench.clock.pump([0.1] * 20)
    while bench.application.waiting:
        bench.application.answer()
        bench.clock.pump([0.1])
    assert {bench.cursor(f"r{number}") for number in range(30)} == {10 * seconds}


def test_application_that_is_away_is_probed(bench):
    """One request at a time tries it; all rooms go on with the first success."""
    rooms = 3 * PARALLEL
    for number in range(rooms):
        bench.say("x", room=f"r{number}")
    bench.gather()
    while bench.application.waiting:
        bench.application.answer(NONE)
    assert len(bench.sent()) < 2 * PARALLEL
    for _ in range(20):
        bench.pass_time(BACKOFF_SECONDS[1])
        assert len(bench.sent()) == 1
        bench.application.answer(NONE)
    bench.pass_time(BACKOFF_SECONDS[1])
    bench.application.answer()
    assert len(bench.sent()) == 1 + PARALLEL
    while bench.application.waiting:
        bench.application.answer()
        bench.pass_time(1 / RATE)
    assert sum(bench.cursor(f"r{number}") for number in range(rooms)) == rooms


def test_many_rooms_that_are_due_at_once(bench, monkeypatch):
    """A turn takes as many as it may send, however many wait, and does not look again before a request ends."""
    popped, pop = [], delivery.heapq.heappop
    monkeypatch.setattr(delivery.heapq, "heappop", lambda heap: popped.append(1) or pop(heap))
    for number in range(100):
        bench.say("x", room=f"r{number}")
    bench.gather()
    assert len(bench.sent()) == PARALLEL
    assert len(popped) <= 2 * PARALLEL
    assert not any(call.getTime() <= bench.clock.seconds() for call in bench.clock.getDelayedCalls())
    for _ in range(100):
        bench.application.answer()
        bench.pass_time(1 / RATE)
    assert bench.webhook.outcomes == {"taken": 100}


def test_application_that_is_away_for_an_hour():
    """It costs about a request a minute, and gets everything in order within a minute after its return."""
    bench, texts = Bench(), []
    for minute in range(60):
        bench.say(f"{minute}", room=f"r{minute % 20}")
        for _ in range(60):
            bench.pass_time(1)
            while bench.application.waiting:
                bench.application.answer(NONE)
    assert len(bench.sent()) < 200
    for _ in range(int(BACKOFF_SECONDS[1])):
        bench.pass_time(1)
        while bench.application.waiting:
            texts += bench.application.take()
    assert sorted(texts, key=int) == [f"{minute}" for minute in range(60)]
    assert all(int(text) < 20 or texts.index(f"{int(text) - 20}") < texts.index(text) for text in texts)
    assert bench.webhook.lag == (0, 0)


def test_retry_after_is_honoured(bench):
    """It counts for all rooms, also if another one succeeds meanwhile, and at most for an hour."""
    bench.say("a", room="one")
    bench.say("b", room="two")
    bench.gather()
    bench.application.answer(Answer(429, "", 30.0))
    bench.application.answer()
    bench.say("c", room="three")
    bench.sent()
    bench.pass_time(29)
    assert bench.sent() == []
    bench.pass_time(1)
    assert sorted(bench.sent()) == ["one:1:1", "three:1:1"]
    bench.application.answer(Answer(503, "", 1e9))
    bench.application.answer()
    bench.pass_time(MAX_WAIT_SECONDS - 1)
    assert bench.sent() == []
    bench.pass_time(1)
    assert len(bench.sent()) == 1


def test_gone_stops_the_webhook(bench):
    """Nothing more is sent until a reload."""
    bench.say("a", room="one")
    bench.say("b", room="two")
    bench.gather()
    with capturedLogs() as events:
        bench.application.answer(GONE)
    assert "410" in formatEvent(events[0])
    bench.application.answer(WRONG)
    bench.sent()
    bench.say("c", room="three")
    bench.pass_time(MAX_WAIT_SECONDS)
    assert (bench.sent(), bench.webhook.stopped) == ([], True)
    bench.webhook.resume()
    bench.webhook.resume()
    assert sorted(bench.sent()) == ["one:1:1", "three:1:1", "two:1:1"]


def test_faults_are_logged_once_a_minute(bench):
    bench.say("a")
    with capturedLogs() as events:
        bench.gather()
        bench.application.answer(NONE)
        for _ in range(4):
            bench.pass_time(10)
            bench.application.answer(NONE)
        bench.pass_time(LOG_SECONDS)
        bench.application.answer(NONE)
        bench.pass_time(LOG_SECONDS)
        bench.application.answer()
    assert [formatEvent(event) for event in events] == [
        *["webhook app cannot be reached: retrying"] * 2,
        "webhook app takes deliveries again",
    ]


def test_lag_is_the_age_of_the_oldest(bench):
    """It is known for rooms that were tried."""
    bench.say("a")
    bench.gather()
    bench.application.answer(WRONG)
    bench.store.now.advance(90)
    bench.say("b", room="other")
    assert bench.webhook.lag == (2, pytest.approx(90, abs=0.01))


# Removed entries


def test_gap_is_stated():
    """A batch states that entries before it were removed, and names the first one left."""
    bench = Bench(retain="2")
    bench.deliver("a")
    bench.say("b")
    bench.gather()
    bench.application.answer(WRONG)
    bench.say(*"cdef")
    bench.pass_time(BACKOFF_SECONDS[0])
    assert bench.application.body == {
        "type": "messages",
        "room": "team",
        "missed": True,
        "first": "k7Q2-5",
        "messages": [],
    }
    assert bench.sent() == ["team:2:2"] * 2
    with capturedLogs() as events:
        bench.application.answer()
    assert "1 messages of the room team were removed" in formatEvent(events[-1])
    bench.gather()
    assert [message["id"] for message in bench.application.body["messages"]] == ["k7Q2-5", "k7Q2-6"]
    assert bench.application.body["missed"]
    bench.application.answer()
    assert bench.webhook.missed == 3


def test_cleared_room_is_stated(bench):
    """Without any entry left, the batch is empty."""
    bench.say("a", "b")
    bench.store.clear_room("team")
    bench.gather()
    assert bench.sent() == ["team:1:2"]
    assert bench.application.body["messages"] == []
    assert bench.application.body["first"] == "k7Q2-3"
    bench.application.answer()
    assert bench.cursor() == 2


def test_new_epoch_begins_at_the_start(bench):
    """Requests of the old one are dropped, and the first batch of each room has `start`."""
    bench.deliver("a", "b")
    bench.say("c")
    bench.gather()
    bench.store.epoch = "newone"
    bench.store.new_epoch = True
    bench.fanout.interrupted()
    assert bench.application.waiting["team:k7Q2-3:3"].called
    bench.gather()
    assert bench.application.sent[-1] == "team:newone-1:3"
    assert bench.application.body["start"] is True


# The store


def test_store_that_cannot_be_read(bench):
    """It is no failure of the application."""
    bench.say("a")
    bench.store.down = True
    bench.gather()
    assert bench.sent() == []
    bench.store.down = False
    bench.pass_time(STORE_SECONDS)
    assert bench.sent() == ["team:1:1"]
    assert bench.webhook.outcomes == {}


def test_cursor_that_cannot_be_stored(bench):
    """A delivery that was taken is not sent again, and the store is tried again."""
    bench.say("a")
    bench.gather()
    bench.store.cursors_down = True
    bench.application.answer()
    bench.say("b")
    bench.pass_time(2 * STORE_SECONDS)
    bench.store.cursors_down = False
    bench.pass_time(STORE_SECONDS)
    bench.gather()
    assert bench.sent() == ["team:1:1", "team:2:2"]


def test_unexpected_error_is_logged(bench, monkeypatch):
    """A fault of this server stops no room for good."""
    bench.say("a")
    with monkeypatch.context() as patch, capturedLogs() as events:
        patch.setattr(delivery, "make_batch", lambda *_: 1 / 0)
        bench.gather()
    assert "ZeroDivisionError" in formatEvent(events[0]) or events[0]["log_failure"].check(ZeroDivisionError)
    bench.pass_time(STORE_SECONDS)
    assert bench.sent() == ["team:1:1"]


# Too many rooms


def test_rooms_beyond_the_limit_are_found_later(monkeypatch):
    """The memory for rooms is bounded, and none is forgotten."""
    monkeypatch.setattr(delivery, "MAX_LANES", 4)
    bench = Bench()
    for number in range(20):
        bench.say("x", room=f"r{number:02}")
    bench.gather()
    taken = bench.sent()
    assert len(taken) == 4
    for _ in range(40):
        taken += bench.sent()
        while bench.application.waiting:
            bench.application.answer()
        bench.gather()
    assert sorted(taken) == [f"r{number:02}:1:1" for number in range(20)]


def test_news_during_a_scan(monkeypatch):
    """A room that gets no lane during a scan is found by another one, and one that does asks for its cursor."""
    bench = Bench(start=False)
    for room in ("a", "b", "c"):
        bench.say("1", "2", room=room)
    scans = []
    behind = bench.store.behind

    def held(reader, place):
        scans.append((Deferred(), behind(reader, place)))
        return scans[-1][0]

    monkeypatch.setattr(bench.store, "behind", held)
    bench.webhook.start()
    bench.say("3", room="a")
    monkeypatch.setattr(delivery, "MAX_LANES", 1)
    bench.say("3", room="b")
    monkeypatch.undo()
    waiting, found = scans[0]
    found.chainDeferred(waiting)
    bench.gather()
    assert sorted(bench.sent()) == ["a:3:3", "b:3:3"]


def test_scan_goes_on_in_places(bench, monkeypatch):
    """The store names the next place, and a room that has a lane already is not added twice."""
    bench.say("a", room="r")
    bench.deaf = True
    bench.say("a", room="s")
    bench.say("a", room="t")
    places = {"": ([("r", 0, 1), ("s", 0, 1)], "s"), "s": ([("t", 0, 1)], "")}
    monkeypatch.setattr(bench.store, "behind", lambda _, place: succeed(places[place]))
    bench.fanout.interrupted()
    bench.gather()
    assert sorted(bench.sent()) == ["r:1:1", "s:1:1", "t:1:1"]


def test_scan_that_fails_is_repeated(bench):
    bench.store.cursors_down = True
    bench.fanout.interrupted()
    bench.store.cursors_down = False
    bench.store.append("team", Post("ann", "a"), RecordingPoster())
    bench.pass_time(STORE_SECONDS)
    assert bench.sent() == ["team:1:1"]


def test_interruption_during_a_scan(bench, monkeypatch):
    """Another scan follows, because the first one may have passed what is missing."""
    asked = []
    monkeypatch.setattr(bench.store, "behind", lambda _, place: asked.append(Deferred()) or asked[-1])
    bench.fanout.interrupted()
    bench.fanout.interrupted()
    assert len(asked) == 1
    asked[0].callback(([], ""))
    assert len(asked) == 2
    asked[1].callback(([], ""))
    assert len(asked) == 2


# The lease


def test_node_without_the_lease_sends_nothing(bench):
    """It holds nothing in memory either, and tries again."""
    other = Bench(start=False)
    other.store.lapsed = True
    other.webhook.start()
    other.fanout.interrupted()
    other.say("a")
    other.pass_time(GATHER_SECONDS)
    assert (other.sent(), other.webhook.active, other.webhook.lag) == ([], False, (0, 0))
    other.store.lapsed = False
    other.pass_time(RENEW_SECONDS)
    assert other.webhook.active
    other.say("b")
    other.pass_time(GATHER_SECONDS)
    assert other.sent() == ["team:2:2"]


def test_lost_lease_drops_requests(bench):
    """A cursor that the store refuses to move ends the lease, and so does a renewal that it refuses."""
    bench.say("a")
    bench.gather()
    bench.store.lapsed = True
    with capturedLogs() as events:
        bench.pass_time(RENEW_SECONDS)
    assert formatEvent(events[0]) == "webhook app: this node no longer delivers"
    assert (bench.webhook.active, bench.application.waiting["team:k7Q2-1:1"].called) == (False, True)
    bench.store.lapsed = False
    bench.pass_time(RENEW_SECONDS)
    assert bench.sent() == ["team:1:1"] * 2
    bench.store.lapsed = True
    bench.application.answer(webhook_id="team:k7Q2-1:1")
    assert (bench.webhook.active, bench.cursor()) == (False, 0)


def test_lease_ends_without_the_store(bench):
    """A node that cannot renew its claim stops before another one may begin."""
    bench.say("a")
    bench.gather()
    bench.store.cursors_down = True
    for _ in range(13):
        bench.pass_time(1)
        assert bench.webhook.active
    bench.pass_time(LEASE_SECONDS - MARGIN_SECONDS - 13)
    assert not bench.webhook.active
    bench.store.cursors_down = False
    bench.pass_time(RENEW_SECONDS)
    assert bench.webhook.active


def test_suspended_node_sends_nothing_late(bench):
    """After a long stop the claim is over, although nothing has told this node."""
    bench.say("a")
    bench.clock.rightNow += LEASE_SECONDS
    bench.store.lapsed = True
    bench.clock.advance(0)  # what is due earlier than the end of the claim is called first
    assert (bench.sent(), bench.webhook.active, bench.webhook.lag) == ([], False, (0, 0))


def test_late_answer_to_a_claim(bench, monkeypatch):
    """A claim whose answer takes too long counts as refused."""
    other, asked = Bench(start=False), []
    monkeypatch.setattr(other.store, "claim", lambda *_: asked.append(Deferred()) or asked[-1])
    other.webhook.start()
    other.pass_time(LEASE_SECONDS)
    asked[0].callback(HELD)
    assert not other.webhook.active
    other.pass_time(RENEW_SECONDS)
    other.webhook.start()
    asked[1].callback(HELD)
    other.webhook.start()
    asked[2].errback(LogUnavailable("away"))
    assert not other.webhook.active
    assert len(other.clock.getDelayedCalls()) == 0


def test_answers_of_the_store_after_the_lease(bench, monkeypatch):
    """Late failures of the store do not start anything on a node that has lost the lease."""
    bench.store.held_cursors = held = []
    asked = []
    bench.say("a")
    bench.gather()
    bench.application.answer()
    monkeypatch.setattr(bench.store, "behind", lambda *_: asked.append(Deferred()) or asked[-1])
    bench.fanout.interrupted()
    bench.fanout.interrupted()
    bench.lose()
    held[0].errback(LogUnavailable("away"))
    asked[0].errback(LogUnavailable("away"))
    bench.pass_time(STORE_SECONDS)
    assert len(asked) == 1


def test_late_answers_of_the_store(bench, monkeypatch):
    """Neither do a late page, a late cursor, and late rooms."""
    bench.store.held_cursors = held = []
    asked = []
    monkeypatch.setattr(bench.store, "behind", lambda *_: asked.append(Deferred()) or asked[-1])
    bench.say("a")
    bench.gather()
    bench.application.answer()
    bench.store.slow = True
    bench.say("a", room="other")
    bench.gather()
    bench.fanout.interrupted()
    bench.lose()
    held[0].callback(HELD)
    asked[0].callback(([("team", 0, 1)], ""))
    bench.store.answer()
    assert (bench.webhook.lag, bench.sent()) == ((0, 0), ["team:1:1"])


def test_page_after_the_lease(bench):
    """A page that arrives too late is not sent."""
    bench.store.slow = True
    bench.say("a")
    bench.gather()
    reading = bench.store.waiting[0]
    bench.store.waiting.clear()
    bench.lose()
    bench.store.slow = False
    reading[0]()
    assert bench.sent() == []


def test_room_without_news_is_closed(bench, monkeypatch):
    """A room that a scan found behind, and that is not, is closed without a request."""
    bench.deliver("a")
    monkeypatch.setattr(bench.store, "behind", lambda *_: succeed(([("team", 1, 1)], "")))
    bench.fanout.interrupted()
    bench.gather()
    assert (bench.sent(), bench.webhook.lag) == ([], (0, 0))


# All webhooks of a server


def test_fanout(bench):
    """Each webhook gets the same, a reload reads the keys and resumes, and one stop ends all."""

    class Keys:
        read = 0

        def reload(self):
            self.read += 1

    other = Bench(start=False)
    other.store = bench.store
    webhooks, keys = [bench.webhook, other.webhook], Keys()
    fanout = Fanout(webhooks, keys)
    assert [*fanout] == webhooks
    fanout.start()
    other.webhook.stopped = True
    fanout.reload()
    assert (keys.read, other.webhook.stopped) == (1, False)
    fanout.trimmed("team", 2)
    stopped = fanout.stop(0)
    assert stopped.called
    assert bench.clock.getDelayedCalls() == other.clock.getDelayedCalls() == []


# The end


def test_stop_waits_for_answers(bench):
    """Nothing new is sent, and the cursor of what is taken is stored."""
    bench.say("a")
    bench.gather()
    bench.say("b", room="other")
    stopped = bench.webhook.stop(STOP_SECONDS)
    bench.gather()
    assert (bench.sent(), stopped.called) == (["team:1:1"], False)
    bench.application.answer()
    assert (stopped.called, bench.cursor(), bench.application.closed) == (True, 1, 1)
    assert bench.clock.getDelayedCalls() == []


def test_stop_drops_what_is_not_answered(bench):
    bench.say("a")
    bench.gather()
    stopped = bench.webhook.stop(STOP_SECONDS)
    bench.pass_time(STOP_SECONDS)
    assert (stopped.called, bench.cursor()) == (True, 0)
    assert bench.application.waiting["team:k7Q2-1:1"].called
    assert bench.clock.getDelayedCalls() == []


def test_stop_of_an_idle_webhook(bench):
    assert bench.webhook.stop(STOP_SECONDS).called
    other = Bench(start=False)
    assert Fanout([other.webhook], None).stop(0).called


def test_release_that_fails(bench, monkeypatch):
    """Another node then waits for the end of the claim."""
    monkeypatch.setattr(bench.store, "end_claim", lambda *_: fail(LogUnavailable("away")))
    assert bench.webhook.stop(0).called


def test_end_of_a_claim_is_bounded(bench, monkeypatch):
    """A store that does not answer does not delay the end of the server for long."""
    monkeypatch.setattr(bench.store, "end_claim", lambda *_: Deferred())
    stopped = bench.webhook.stop(0)
    bench.pass_time(END_SECONDS)
    assert (stopped.called, bench.application.closed) == (True, 1)
