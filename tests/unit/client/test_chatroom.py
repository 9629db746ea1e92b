"""A room without an event loop: what it shows, and what it keeps sending until the server answers."""

import json
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import REPEATABLE
from support.model_rooms import STAMP, ModelRoom

from chatd.client.chatroom import TYPING_PAUSE_SECONDS, room_address, server_address
from chatd.client.protocol import ClientStopped, Posted, Rejected
from chatd.client.storage import MemoryStorage
from chatd.client.view import TYPING_SECONDS, RoomPresence
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import error_frame, history_frame, message_frame, presence_frame, typing_frame
from chatd.transport.framing import text_frame

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.none()),
        st.tuples(st.just("exchange"), st.integers(1, 6)),
        st.tuples(st.just("cut"), st.none()),
        st.tuples(st.just("connect"), st.none()),
        st.tuples(st.just("lose"), st.integers(0, 4)),
        st.tuples(st.just("other"), st.none()),
        st.tuples(st.just("edit"), st.integers(1, 20)),
        st.tuples(st.just("refuse"), st.integers(1, 2)),
        st.tuples(st.just("double"), st.none()),
        st.tuples(st.just("older"), st.integers(1, 3)),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("wait"), st.floats(0, 2)),
    ),
    min_size=10,
    max_size=80,
)


class Story:
    """A room through which everything goes wrong that may go wrong on a network."""

    def __init__(self):
        self.table = ModelRoom()
        self.posted = []
        self.outcomes = []
        self.online = False

    def run(self, step, number):
        """Take one step, if it is possible now."""
        getattr(self, step)(number)
        self.table.room.read()

    def post(self, _):
        self.posted.append(f"m{len(self.posted)}")
        self.outcomes.append(self.table.room.ask("post", self.posted[-1]))

    def connect(self, _):
        if not self.online:
            self.table.connect()
            self.online = True

    def exchange(self, count):
        if self.online and not self.table.exchange(count):
            self.cut(None)

    def cut(self, _):
        if self.online:
            self.table.cut()
            self.online = False

    def lose(self, count):
        if self.online:
            self.table.server.lose(count)

    def other(self, _):
        self.table.server.append("other")

    def edit(self, number):
        log = self.table.server.log
        originals = [entry.number for entry in log if entry.username == "bob" and entry.replaces is None]
        if originals:
            self.table.server.append(f"edit {len(log)}", originals[number % len(originals)])

    def refuse(self, count):
        self.table.server.refusals = count

    def double(self, _):
        """Send a frame again."""
        self.table.server.queue[:0] = self.table.server.queue[:1]

    def older(self, limit):
        self.table.room.ask("older", limit)

    def wait(self, seconds):
        self.table.clock.advance(seconds)

    def restart(self, _):
        """End the program, and start it again with the same storage."""
        self.outcomes = [outcome for outcome in self.outcomes if outcome.settled]
        self.cut(None)
        self.table, old = ModelRoom(storage=self.table.storage), self.table
        self.table.server = old.server

    def conclude(self):
        """Let the network be good from now on."""
        for _ in range(8):
            if not self.online:
                self.connect(None)
            self.exchange(None)
            self.table.clock.advance(2)
        self.table.room.read()


@given(STEPS)
@example([("connect", None), ("post", None), ("exchange", 1), ("cut", None), ("connect", None), ("exchange", 3)])
@example([("post", None), ("connect", None), ("exchange", 9), ("lose", 4), ("post", None), ("exchange", 1)])
@example([("connect", None), ("exchange", 1), ("post", None), ("exchange", 1), ("lose", 0)])
@example([("connect", None), ("other", None), ("edit", 0), ("exchange", 9), ("edit", 0), ("exchange", 9)])
@REPEATABLE
def test_nothing_is_lost_or_doubled(steps):
    """The room shows its log in order, and each post that was not lost with a log is in it once."""
    story = Story()
    for step, number in steps:
        story.run(step, number)
    story.conclude()
    table = story.table
    snapshot, log = table.room.snapshot(), table.server.log
    assert [entry.id.number for entry in snapshot.entries] == [
        entry.number for entry in log[len(log) - len(snapshot.entries) :]
    ]
    shown = {entry.number: entry for entry in log}
    for entry in snapshot.entries:
        original = shown[entry.id.number]
        assert (entry.message, entry.removed) == (original.message, original.removed)
        assert entry.replaced == (original.replaced and Id(table.server.epoch, original.replaced))
    assert snapshot.last == Id(table.server.epoch, len(log))
    assert snapshot.outbox == ()
    assert all(outcome.settled == 1 and outcome.error is None for outcome in story.outcomes)
    assert len(set(table.server.labels.values())) == len(table.server.labels)
    mine = [entry.message for entry in log if entry.username == "ann"]
    assert len(mine) == len({*mine})
    assert {*story.posted} - {*mine} <= table.server.lost
    assert mine == sorted(mine, key=lambda text: int(text[1:]))
    epoch = [entry.id.number for entry in table.room.seen if entry.id.epoch == table.server.epoch]
    assert epoch == [*range(len(log) - len(epoch) + 1, len(log) + 1)]


# The outbox


def test_posts_wait_for_the_connection_and_keep_their_order():
    """One post is in flight at a time."""
    table = ModelRoom()
    outcomes = [table.room.ask("post", text) for text in ("one", "two", "three")]
    assert [post.frame["message"] for post in table.room.snapshot().outbox] == ["one", "two", "three"]
    table.connect()
    assert table.exchange(1)
    assert len(table.member.sent) == 1
    assert table.exchange()
    assert [outcome.result for outcome in outcomes] == [Posted(Id("aaaa", number)) for number in (1, 2, 3)]
    assert table.texts() == ["one", "two", "three"]
    assert table.room.snapshot().outbox == ()
    assert table.storage.list(f"chatd {table.member.address} ann") == []


def test_post_is_shown_once():
    """It moves from the outbox to the messages when its entry arrives, which is before the answer."""
    table = ModelRoom().online()
    for _ in range(2):
        table.room.ask("post", "same")
    table.exchange(1)
    shown = table.room.snapshot()
    assert [entry.message for entry in shown.messages] == ["same"]
    assert len(shown.outbox) == 1
    table.exchange(1)
    shown = table.room.snapshot()
    assert len(shown.messages) + len(shown.outbox) == 2
    table.exchange()
    assert table.texts() == ["same", "same"]
    table.room.ask("post", "same")
    assert len(table.room.snapshot().outbox) == 1


def test_posts_of_an_earlier_program():
    """They are sent under their labels, before those of this program, though the clock was set back."""
    table = ModelRoom()
    table.room.ask("post", "first")
    later = ModelRoom(storage=table.storage, wall=0.0)
    later.room.ask("post", "second")
    labels = [post.label for post in later.room.snapshot().outbox]
    later.online()
    assert later.texts() == ["first", "second"]
    assert [*later.server.labels] == labels
    assert ModelRoom(storage=table.storage).room.snapshot().outbox == ()


def test_refused_post_stays_until_the_user_decides():
    """It is not sent again, also by a later program, unless the user asks for that."""
    table = ModelRoom().online()
    refused, fine = table.room.ask("post", "no"), table.room.ask("post", "yes")
    label = table.room.snapshot().outbox[0].label
    table.member.sent = []
    table.member.hear(error_frame("muted", Code.FORBIDDEN, label))
    assert (str(refused.error), refused.error.code) == ("muted", Code.FORBIDDEN)
    assert table.exchange()
    assert fine.result == Posted(Id("aaaa", 1))
    later = ModelRoom(storage=table.storage)
    later.server = table.server
    later.online()
    (post,) = later.room.snapshot().outbox
    assert (post.label, post.frame["message"], str(post.error), post.error.code) == (label, "no", "muted", "FORBIDDEN")
    assert later.room.ask("retry", "unknown").settled == 0
    again = later.room.ask("retry", label)
    assert later.room.ask("retry", label).settled == 0
    assert later.exchange()
    assert again.result == Posted(Id("aaaa", 2))
    assert [*later.server.labels][-1] == label


def test_discarded_posts():
    """The next post follows at once, and a late answer to the discarded one changes nothing."""
    table = ModelRoom().online()
    outcomes = [table.room.ask("post", text) for text in ("one", "two", "three")]
    labels = [post.label for post in table.room.snapshot().outbox]
    table.room.discard("unknown")
    table.room.discard(labels[1])
    table.room.discard(labels[0])
    assert [str(outcome.error) for outcome in outcomes[:2]] == ["the post was discarded"] * 2
    assert table.member.hear(error_frame("slow", Code.RATE_LIMITED, labels[0], 1.0)) is None
    assert table.exchange()
    assert table.texts() == ["one", "three"]
    assert outcomes[2].result == Posted(Id("aaaa", 2))
    table.cut()
    table.connect()
    assert table.exchange()
    assert table.texts() == ["one", "three"]


def test_end_of_the_room_keeps_the_posts():
    """Their requests fail with its reason, and the posts stay in the storage without an error."""
    for end, error in (
        (lambda table: table.member.stop(), ClientStopped),
        (lambda table: table.member.end("closed with 1008", 1008), Rejected),
    ):
        table = ModelRoom().online()
        outcomes = [
            table.room.ask("post", "one"),
            table.room.ask("page", None, None, 50),
            table.room.ask("post", "two"),
        ]
        end(table)
        outcomes += [table.room.ask("post", "late"), table.room.ask("page", None, None, 50)]
        assert [type(outcome.error) for outcome in outcomes] == [error] * 5
        assert [outcome.settled for outcome in outcomes] == [1] * 5
        later = ModelRoom(storage=table.storage).online()
        assert later.texts() == ["one", "two"]
        label = table.room.snapshot().outbox[0].label
        assert table.room.ask("retry", label).settled == 0


class Broken(MemoryStorage):
    """A storage on a disk that fails."""

    def delete(self, label):
        raise OSError("no space left")


def test_storage_that_fails():
    """A post that cannot be deleted is sent again by the next program only, and stored once."""
    table = ModelRoom(storage=Broken()).online()
    outcome = table.room.ask("post", "hi")
    assert table.exchange()
    assert outcome.result == Posted(Id("aaaa", 1))
    assert table.room.snapshot().outbox == ()
    assert table.member.failures == ["the storage of the outbox failed"]
    later = ModelRoom(storage=table.storage)
    later.server = table.server
    assert later.online().texts() == ["hi"]


def test_fields_that_are_not_json():
    """The call fails, and the outbox stays as it was."""
    table = ModelRoom().online()
    with pytest.raises(TypeError):
        table.room.ask("post", object())
    assert table.room.snapshot().outbox == ()
    assert table.member.sent == []


def test_edits_and_removals_are_posts():
    table = ModelRoom(username=None).online()
    table.room.ask("edit", Id("aaaa", 1), "hello")
    table.room.ask("remove", "aaaa-1")
    edit, removal = (post.frame for post in table.room.snapshot().outbox)
    assert edit == {"message": "hello", "replaces": "aaaa-1"}
    assert removal == {"type": "remove", "id": "aaaa-1"}


# Pages


def test_older_pages_join_the_entries():
    """Two requests at once read one page."""
    table = ModelRoom(history=2)
    for number in range(1, 8):
        table.server.append(f"m{number}")
    table.online()
    assert (table.texts(), table.room.snapshot().more) == (["m6", "m7"], True)
    outcomes = [table.room.ask("older", 3), table.room.ask("older", 3)]
    assert len(table.member.sent) == 1
    assert table.exchange()
    assert [outcome.settled for outcome in outcomes] == [1, 1]
    assert (table.texts(), table.room.snapshot().more) == ([f"m{number}" for number in range(3, 8)], True)
    table.room.ask("older")
    assert table.exchange()
    assert (len(table.texts()), table.room.snapshot().more) == (7, False)
    assert table.room.ask("older").settled == 1
    page = table.room.ask("page", None, None, 2)
    table.member.sent = [table.member.sent[0].replace(b'"limit":2', b'"limit":2,"before":"aaaa-8"')]
    assert table.exchange()
    assert [entry.message for entry in page.result.entries] == ["m6", "m7"]
    assert (page.result.id, page.result.more) == (Id("aaaa", 7), True)


def test_older_page_of_a_lost_log():
    """A page that does not end at the oldest entry is left out."""
    table = ModelRoom(history=2)
    for number in range(1, 8):
        table.server.append(f"m{number}")
    table.online()
    table.room.ask("older", 3)
    page = table.member.sent.pop()
    table.server.lose(1)
    assert table.exchange()
    table.server.receive(page)
    assert table.exchange()
    assert table.texts() == ["m5", "m6"]


def test_older_page_that_is_refused():
    """All who asked for it fail, and the next request is made."""
    table = ModelRoom(last=Id("aaaa", 3))
    outcome = table.room.ask("older")
    table.connect()
    table.exchange(1)
    text = json.loads(table.member.sent.pop())
    assert text["before"] == "aaaa-4"
    table.member.hear(error_frame("There is no message of this id.", Code.UNKNOWN_ID, text["label"]))
    assert outcome.error.code == Code.UNKNOWN_ID


def test_page_before_an_id():
    table = ModelRoom().online()
    table.room.ask("page", Id("aaaa", 5), None, 7)
    table.room.ask("page", None, "aaaa-2", 7)
    asked = [json.loads(text) for text in table.member.sent]
    assert [{**text, "label": ""} for text in asked] == [
        {"type": "history", "before": "aaaa-5", "limit": 7, "label": ""},
        {"type": "history", "after": "aaaa-2", "limit": 7, "label": ""},
    ]


# The view


def test_snapshot_is_one_object_until_something_changes():
    table = ModelRoom().online()
    shown = table.room.snapshot()
    assert table.room.snapshot() is shown
    table.server.append("news")
    table.exchange()
    assert table.room.snapshot() is not shown
    assert shown.messages == ()


def test_states():
    """The state names each phase of the connection, with the reason and the time of the next attempt."""
    table = ModelRoom(wall=1000.0)

    def shown():
        snapshot = table.room.snapshot()
        return snapshot.state, snapshot.reason, snapshot.retry_at

    assert shown() == ("connecting", None, None)
    table.online()
    assert shown() == ("online", None, None)
    table.member.end("closed with 1012 retry_after=7", 1012, 7.0)
    assert shown() == ("waiting", "closed with 1012 retry_after=7", 1007.0)
    table.clock.advance(7)
    assert shown() == ("connecting", None, None)
    table.member.end("refused with 403 Forbidden", 403)
    assert shown() == ("rejected", "refused with 403 Forbidden", None)
    assert table.room.snapshot().error is table.room.error
    table.member.stop()
    assert shown()[0] == "rejected"


def test_edits_replace_the_text_and_removals_erase_it():
    table = ModelRoom().online()
    for text in ("first", "second"):
        table.server.append(text)
    table.server.append("first, edited", 1)
    table.exchange()
    shown = table.room.snapshot()
    assert [entry.message for entry in shown.messages] == ["first, edited", "second"]
    assert (shown.messages[0].replaced, len(shown.entries)) == (Id("aaaa", 3), 3)
    table.server.append("[removed]", 1, removed=True)
    table.exchange()
    shown = table.room.snapshot()
    assert [(entry.message, entry.removed) for entry in shown.entries] == [
        *(("[removed]", True), ("second", False)),
        *(("[removed]", True), ("[removed]", True)),
    ]
    assert shown.messages[0].timestamp == STAMP


def test_edit_of_an_unknown_message():
    """An older page has the newest text already."""
    table = ModelRoom(history=1)
    for text in ("first", "second"):
        table.server.append(text)
    table.online()
    table.server.append("first, edited", 1)
    table.exchange()
    assert table.texts() == ["second"]
    table.room.ask("older")
    table.exchange()
    assert table.texts() == ["first, edited", "second"]


def test_late_edit_of_a_newer_text():
    """The text of a history is that of the newest edit, and an earlier edit after it changes nothing."""
    table = ModelRoom()
    table.connect()
    table.server.queue = []
    first = message_frame("aaaa", Entry(1, "bob", "newest", STAMP, replaced=3))
    table.member.hear(history_frame("aaaa", 1, [first]))
    table.member.hear(message_frame("aaaa", Entry(2, "bob", "earlier", STAMP, replaces=1)))
    assert table.texts() == ["newest"]


def test_presence():
    """A change is applied to the names known so far; without them only the count is known."""
    table = ModelRoom().online()
    heard = table.member.hear
    heard(presence_frame(2, users=["bob", "ann"]))
    assert table.room.snapshot().presence == RoomPresence(2, ["ann", "bob"])
    heard(presence_frame(2, join=["cy"], leave=["bob"]))
    assert table.room.snapshot().presence == RoomPresence(2, ["ann", "cy"])
    heard(presence_frame(1200))
    heard(presence_frame(1201, join=["dee"], leave=[]))
    assert table.room.snapshot().presence == RoomPresence(1201, None)
    table.cut()
    assert table.room.snapshot().presence is None


def test_typing_of_others():
    """A name is shown until the message arrives, for a few seconds, or until the connection ends."""
    table = ModelRoom().online()
    table.member.hear(typing_frame(["bob", "cy"]))
    assert table.room.snapshot().typing == ("bob", "cy")
    table.server.append("hi")
    table.exchange()
    assert table.room.snapshot().typing == ("cy",)
    table.clock.advance(TYPING_SECONDS - 1)
    table.member.hear(typing_frame(["cy"]))
    table.clock.advance(TYPING_SECONDS - 1)
    assert table.room.snapshot().typing == ("cy",)
    table.clock.advance(1)
    assert table.room.snapshot().typing == ()
    table.member.hear(typing_frame(["cy"]))
    table.cut()
    assert table.room.snapshot().typing == ()


def test_events_of_a_later_version():
    """Unknown events change nothing, and malformed ones end the connection."""
    table = ModelRoom().online()
    assert table.member.hear(text_frame(b'{"type":"weather","data":1}')) is None
    malformed = [
        ("typing", b"7"),
        ("typing", b'{"users":[7]}'),
        ("typing", b'{"users":"ann"}'),
        ("presence", b"{}"),
        ("presence", b"null"),
        ("presence", b'{"count":"many"}'),
        ("presence", b'{"count":2,"users":[1,2]}'),
    ]
    for name, data in malformed:
        text = b'{"type":"%s","data":%s}' % (name.encode(), data)
        assert table.member.hear(text_frame(text)) == "the server broke the protocol"
    assert table.member.warnings == [f"malformed {name} event" for name, _ in malformed]


def test_typing_notices():
    """One is sent in three seconds, and only while the room is online.  It has no label, nor has its refusal."""
    table = ModelRoom()
    table.room.typing()
    table.online()
    assert table.member.hear(error_frame("no")) == "the server broke the protocol"
    table.room.typing()
    table.room.typing()
    assert [json.loads(text) for text in table.member.sent] == [{"type": "typing", "username": "ann"}]
    assert table.member.hear(error_frame("slow", Code.RATE_LIMITED)) is None
    assert table.member.hear(error_frame("slow", Code.RATE_LIMITED, "other")) == "the server broke the protocol"
    table.clock.advance(TYPING_PAUSE_SECONDS)
    table.room.typing()
    assert len(table.member.sent) == 2
    nameless = ModelRoom(username=None).online()
    nameless.room.typing()
    assert nameless.member.sent == []


def test_subscribers_are_called_soon_and_once():
    """One that ends its subscription is not called any more, and one that raises disturbs nobody."""
    table = ModelRoom().online()
    table.clock.advance(0)
    calls = []
    call = partial(calls.append, "call")
    ends = [table.room.subscribe(call), table.room.subscribe(call), table.room.subscribe(lambda: 1 / 0)]
    table.server.append("one")
    table.server.append("two")
    table.exchange()
    assert calls == []
    with pytest.raises(ZeroDivisionError):
        table.clock.advance(0)
    table.clock.advance(0)
    assert calls == ["call"] * 2
    ends[2]()
    table.server.append("three")
    table.exchange()
    ends[0]()
    table.clock.advance(0)
    assert calls == ["call"] * 3


def test_iterator_after_a_fresh_start():
    """It goes on after the last entry if the new log has it, and else begins with the oldest one."""
    table = ModelRoom(history=2)
    for number in range(1, 4):
        table.server.append(f"m{number}")
    table.online()
    assert [entry.message for entry in table.room.read()] == ["m2", "m3"]
    table.server.queue.append(history_frame("aaaa", 3, [message_frame("aaaa", table.server.log[2])], resumed=False))
    table.server.append("m4")
    table.exchange()
    assert [entry.message for entry in table.room.read()] == ["m2", "m3", "m4"]
    table.server.queue.append(history_frame("aaaa", 1, [message_frame("aaaa", table.server.log[0])], resumed=False))
    table.exchange()
    assert [entry.message for entry in table.room.read()][3:] == ["m1"]
    table.server.lose(0)
    table.exchange()
    assert [entry.message for entry in table.room.read()][4:] == ["m3", "m4"]


def test_room_that_keeps_few_entries():
    """The oldest ones are dropped when every iterator has had them, and can be read again by page."""
    table = ModelRoom(keep=3).online()
    numbers = iter(range(1, 100))

    def grow(count):
        for _ in range(count):
            table.server.append(f"m{next(numbers)}")
        table.exchange()
        return len(table.room.snapshot().entries)

    assert (grow(5), table.room.snapshot().more) == (5, False)
    assert (grow(1), table.room.snapshot().more) == (3, True)
    table.room.follow(table.room)
    assert grow(10) == 13
    assert [entry.message for entry in table.room.read()] == [f"m{number}" for number in range(4, 17)]
    assert grow(1) == 3
    assert table.texts() == ["m15", "m16", "m17"]
    table.room.ask("older")
    table.exchange()
    assert table.texts()[0] == "m1"


# Connections


def test_reconnect_at_the_wish_of_the_user():
    """It does not wait for the pause, but for a time that the server named; a connection is checked."""
    table = ModelRoom()
    table.room.reconnect()
    assert table.member.attempts == 1
    table.online()
    table.room.reconnect()
    assert table.member.probes == 1
    table.member.end("closed with 1013 retry_after=9", 1013, 9.0)
    table.room.reconnect()
    table.clock.advance(8)
    assert table.member.attempts == 1
    table.clock.advance(1)
    assert table.member.attempts == 2
    table.member.end()
    table.room.reconnect()
    table.clock.advance(0)
    assert table.member.attempts == 3
    table.member.end()
    table.room.wake()
    table.clock.advance(1)
    assert table.member.attempts == 4


@pytest.mark.parametrize(
    ("url", "name", "address"),
    [
        ("http://h:8085", "main", "ws://h:8085/rooms/main"),
        ("https://h/chat/", "a/b", "wss://h:443/chat/rooms/a%2Fb"),
        ("ws://[::1]:1/", "team", "ws://[::1]:1/rooms/team"),
    ],
)
def test_address_of_a_room(url, name, address):
    found = room_address(server_address(url), name, ["presence", "typing"], "ann b")
    assert str(found) == address
    assert found.query == "events=presence%2Ctyping&username=ann+b"
    assert room_address(server_address(url), name, [], None).query == ""
