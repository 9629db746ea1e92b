"""One running stream serves the members of a room, whenever they join and however slowly they read."""

import json
import zlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.helpers import EditedLog, Reader, enter, stamped
from support.room_machines import RoomMachine
from support.websocket_frames import take_frames

from chatd.messages import REMOVED, Entry, Id
from chatd.room.keyframes import COMPRESSIBLE, KEYFRAME, LEAST_MEMBERS, Keyframes
from chatd.room.presence import PRESENCE
from chatd.room.tail import Tail
from chatd.transport import frames
from chatd.transport.deflate import compressor
from chatd.transport.framing import payload

PLAIN, COMPRESSED = 0x81, 0xC1


def inflated(data):
    """Return the first byte and the text of each frame, as an independent client has them."""
    inflater, found = zlib.decompressobj(-12), []
    received, rest = take_frames(data)
    assert not rest, "a frame was cut"
    for frame in received:
        assert frame.first in (PLAIN, COMPRESSED)
        text = frame.payload
        if frame.first == COMPRESSED:
            text = inflater.decompress(text + b"\x00\x00\xff\xff")
        found.append((frame.first, text))
    return found


class Taker(Reader):
    """A member that takes compressed frames, and what else is sent to it as it is."""

    def __init__(self, space=None, **others):
        super().__init__(space, form=COMPRESSIBLE, **others)

    def send_frame(self, frame):
        if self.ready:
            self.writes.append(frame)
        else:
            self.held += frame

    @property
    def received(self):
        """The first byte and the text of each frame."""
        return inflated(b"".join(self.writes))

    @property
    def texts(self):
        return [json.loads(text) for _, text in self.received]

    @property
    def kinds(self):
        """The first byte of each message."""
        return [first for first, text in self.received if text.startswith(b'{"type":"message"')]


@pytest.fixture
def log():
    return EditedLog()


@pytest.fixture
def busy(log, rooms, clock, monkeypatch):
    """A function that enters a room with further members, and one that appends entries and serves them."""
    monkeypatch.setattr("chatd.room.keyframes.KEYFRAME", 4)
    monkeypatch.setattr("chatd.room.keyframes.LEAST_MEMBERS", 2)

    class Busy:
        def __init__(self):
            self.room, self.first, _ = enter(rooms, Taker())
            self.second = self.enter()

        def enter(self, member=None, last=None):
            return enter(rooms, member or Taker(), last=last)[1]

        def say(self, count=1, text="good morning"):
            for _ in range(count):
                log.say(1, text)
                clock.turns()

        def leave(self, member):
            rooms.leave(self.room, member)

    return Busy()


def entries(count):
    return [frames.message_frame("abcd", Entry(number, "ann", "hi", stamped(number))) for number in range(1, count + 1)]


# The stream


@pytest.fixture
def tail():
    tail = Tail(0, 10)
    tail.extend(entries(300))
    return tail


@pytest.fixture
def keyframes():
    keyframes = Keyframes(compressor)
    keyframes.members = LEAST_MEMBERS
    return keyframes


def test_stream_begins_where_it_is_wanted(keyframes, tail):
    assert keyframes.next_keyframe(10) == 11
    stream = keyframes.form_at(10)
    assert keyframes.form_at(10) is stream
    found = keyframes.between(stream, 10, 20, tail)
    assert [text for _, text in inflated(b"".join(found))] == [payload(frame) for frame in entries(20)[10:]]
    assert keyframes.size == sum(map(len, found))


def test_keyframes_are_equally_far_apart(keyframes, tail):
    stream = keyframes.form_at(10)
    keyframes.between(stream, 10, 30, tail)
    assert [keyframes.next_keyframe(after) for after in (0, 9, 10, 11, 29, 30)] == [
        *(11, 11, 11, 11 + KEYFRAME, 11 + KEYFRAME, 11 + KEYFRAME)
    ]
    assert keyframes.form_at(11) is COMPRESSIBLE
    keyframes.between(stream, 30, 300, tail)
    assert keyframes.next_keyframe(11) == 11 + KEYFRAME
    second = keyframes.between(stream, 10 + KEYFRAME, 300, tail)
    assert inflated(b"".join(second))[0][1] == payload(entries(11 + KEYFRAME)[-1])


def test_stream_left_behind_begins_again(keyframes, tail):
    """Nobody has taken the stream up to the cursor, so a member need not wait for its next keyframe."""
    old = keyframes.form_at(10)
    keyframes.between(old, 10, 30, tail)
    assert keyframes.next_keyframe(31) == 32
    assert keyframes.form_at(31) is not old
    assert keyframes.between(old, 30, 40, tail) == ()
    assert keyframes.next_keyframe(5) == 32


def test_no_keyframe_in_a_small_room(keyframes, tail):
    """Members in step get the frames up to the next keyframe, and no others."""
    keyframes.members = LEAST_MEMBERS - 1
    assert keyframes.form_at(10) is COMPRESSIBLE
    keyframes.members = LEAST_MEMBERS
    stream = keyframes.form_at(10)
    keyframes.between(stream, 10, 20, tail)
    keyframes.members = LEAST_MEMBERS - 1
    assert len(keyframes.between(stream, 20, 300, tail)) == KEYFRAME - 10
    assert keyframes.between(stream, 10 + KEYFRAME, 300, tail) == []
    assert keyframes.form_at(10 + KEYFRAME) is COMPRESSIBLE
    assert keyframes.form_at(10) is stream


def test_stream_is_bounded(keyframes, tail, monkeypatch):
    """The oldest frames go, up to a keyframe."""
    stream = keyframes.form_at(0)
    keyframes.between(stream, 0, 100, tail)
    bound = keyframes.size
    monkeypatch.setattr("chatd.room.keyframes.STREAM_BYTES", bound)
    keyframes.between(stream, 100, 300, tail)
    assert keyframes.size <= bound
    assert stream.first % KEYFRAME == 1 < stream.first
    assert keyframes.between(stream, stream.first - 2, 300, tail) == ()
    kept = keyframes.between(stream, stream.first - 1, 300, tail)
    assert keyframes.size == sum(map(len, kept))
    assert len(inflated(b"".join(kept))) == 301 - stream.first


def test_stream_ends_if_the_tail_overruns_it(keyframes, tail):
    stream = keyframes.form_at(0)
    keyframes.between(stream, 0, 10, tail)
    tail.first = 12
    assert keyframes.between(stream, 10, 300, tail) == ()
    assert keyframes.size == 0


# In a room


def test_members_get_compressed_frames_from_the_next_keyframe(busy):
    busy.say()
    late = busy.enter()
    busy.say(5)
    assert busy.first.kinds == [COMPRESSED] * 6
    assert late.kinds == [PLAIN] * 3 + [COMPRESSED] * 2
    assert busy.first.numbers == [1, 2, 3, 4, 5, 6]
    assert late.numbers == [2, 3, 4, 5, 6]


def test_members_in_step_share_a_write(busy):
    busy.say(3)
    assert busy.first.writes == busy.second.writes
    assert all(one is other for one, other in zip(busy.first.writes, busy.second.writes, strict=True))


def test_plain_members_are_served_as_before(busy):
    plain, event = busy.enter(Reader()), busy.enter(Reader(form=frames.event))
    busy.say(6)
    assert b"".join(plain.writes) == b"".join(
        frames.message_frame("abcd", Entry(number, "ann", "good morning", stamped(number))) for number in range(1, 7)
    )
    assert event.numbers == [1, 2, 3, 4, 5, 6]


def test_nothing_is_compressed_in_a_small_room(busy):
    busy.leave(busy.second)
    busy.say(3)
    assert busy.first.kinds == [PLAIN] * 3
    assert busy.room.compressed_bytes == 0


def test_stream_ends_with_the_last_member_that_takes_it(busy):
    busy.enter(Reader())
    busy.say()
    assert busy.room.compressed_bytes > 0
    busy.leave(busy.first)
    busy.leave(busy.second)
    assert busy.room.compressed_bytes == 0


def test_member_that_catches_up_stays_in_step(busy):
    """The frames that it missed are still in the stream, and a frame that was cut is sent to its end."""
    busy.say()
    busy.first.space = 10
    busy.say(6)
    busy.first.drain(busy.room)
    busy.say()
    assert busy.first.kinds == [COMPRESSED] * 8
    assert busy.first.numbers == [1, 2, 3, 4, 5, 6, 7, 8]


def test_member_that_the_tail_overran_waits(busy, log, monkeypatch, short_tail):
    """It gets plain frames from the log and the tail, and compressed ones from the next keyframe on."""
    monkeypatch.setattr("chatd.room.keyframes.STREAM_BYTES", 400)
    busy.say()
    busy.first.space = 0
    busy.say(300)
    assert log.reads[1:] == []
    busy.first.drain(busy.room)
    busy.say(8)
    assert log.reads[1:] == [("main", 2, 100)]
    assert busy.first.numbers == busy.second.numbers == [*range(1, 310)]
    assert set(busy.second.kinds) == {COMPRESSED}
    plain = busy.first.kinds.index(PLAIN)
    behind = busy.first.kinds[plain:].index(COMPRESSED)
    assert (plain, behind > 100) == (2, True)
    assert set(busy.first.kinds[plain + behind :]) == {COMPRESSED}


def test_removal_ends_the_stream(busy, log, clock):
    """A member that is behind must not get the text that was removed."""
    busy.say(2, "sesame")
    slow = busy.first
    slow.space = 0
    busy.say(2, "sesame")  # the transport holds the first of them
    log.remove(4)
    clock.turns()
    assert busy.room.compressed_bytes > 0  # of the removal itself
    slow.drain(busy.room)
    clock.turns()
    busy.say(4)
    assert [text["data"]["message"] for text in slow.texts[:5]] == [*["sesame"] * 3, REMOVED, REMOVED]
    assert slow.numbers == [*range(1, 10)]
    assert slow.kinds[:5] == [*[COMPRESSED] * 3, PLAIN, COMPRESSED]


def slow_behind_plain(busy, *text):
    """Post an entry while no stream begins, and one in a stream; return the member whose transport holds that."""
    busy.leave(busy.second)
    busy.say(1, *text)
    busy.second = busy.enter()
    busy.first.space = 0
    busy.say(1)
    return busy.first


def test_removal_erases_the_edits_in_the_stream(busy, log, clock):
    """The entry itself is older than the stream, and its edit is not."""
    slow = slow_behind_plain(busy, "sesame")
    log.edit(1, "sesame 2")
    clock.turns()
    log.remove(1)
    slow.drain(busy.room)
    clock.turns()
    assert [text["data"]["message"] for text in slow.texts] == ["sesame", "good morning", REMOVED, REMOVED]
    assert [text["data"]["message"] for text in busy.second.texts] == ["good morning", "sesame 2", REMOVED]


def test_removal_erases_edits_that_the_tail_has_dropped(busy, log, clock, short_tail):
    """The stream holds more frames than the tail."""
    slow = slow_behind_plain(busy)
    log.edit(1, "sesame")
    clock.turns()
    busy.say(300)
    assert busy.room.held[0] < 300 < busy.room.head
    log.remove(1)
    slow.drain(busy.room)
    clock.turns()
    busy.say()
    assert slow.numbers == [*range(1, 306)]
    assert "sesame" not in [text["data"]["message"] for text in slow.texts if text["type"] == "message"]


def test_removal_of_what_is_not_in_the_stream(busy, log, clock):
    busy.leave(busy.second)
    busy.say(2)
    busy.second = busy.enter()
    busy.say(2)
    size = busy.room.compressed_bytes
    assert size > 0
    log.remove(2)
    clock.turns()
    assert busy.room.compressed_bytes > size


def test_edit_keeps_the_stream(busy, log, clock):
    """Whoever streams an answer by edits does not make each of them a keyframe."""
    busy.say(2)
    log.edit(2)
    clock.turns()
    assert busy.first.kinds == [COMPRESSED] * 3
    busy.say()
    late = busy.enter()
    busy.say()
    assert (busy.first.kinds, late.kinds) == ([COMPRESSED] * 5, [COMPRESSED])


def test_restart_ends_the_stream(busy, log, clock):
    busy.say(3)
    log.lose(1)
    clock.turns()
    busy.say(2)
    assert busy.first.kinds == [COMPRESSED] * 5
    assert [text["id"] for text in busy.first.texts if text["type"] == "message"][3:] == ["efgh-2", "efgh-3"]


def test_cleared_room_forgets_its_compressed_frames(busy, log):
    busy.say(3)
    log.trim(4)
    assert busy.room.compressed_bytes == 0
    busy.say(2)
    assert busy.first.kinds == [COMPRESSED] * 5
    assert busy.second.numbers == [1, 2, 3, 4, 5]


def test_first_of_many_frames_is_a_keyframe(log, rooms, clock):
    """With the real numbers: a member joins somewhere in a long stream."""
    members = [enter(rooms, Taker())[1] for _ in range(LEAST_MEMBERS)]
    head = 5 * KEYFRAME + 1
    for count in range(head):
        if count % 50 == 0:
            members.append(enter(rooms, Taker())[1])
        log.say(1, f"message {count}")
        clock.turns()
    assert all(member.kinds[-1] == COMPRESSED for member in members)
    assert all(member.kinds.index(COMPRESSED) <= KEYFRAME for member in members)
    assert all(member.numbers == [*range(head - len(member.numbers) + 1, head + 1)] for member in members)


class KeyframesMachine(RoomMachine):
    """Whatever happens in whatever order, each client inflates a gapless run of the log, byte for byte.

    A client that reconnects is another member with another inflater.
    """

    make_log = EditedLog

    def prepare(self):
        self.patch.setattr("chatd.room.keyframes.KEYFRAME", 4)
        self.patch.setattr("chatd.room.keyframes.LEAST_MEMBERS", 2)
        self.patch.setattr("chatd.room.keyframes.STREAM_BYTES", 700)
        self.versions = {}
        """The texts that each entry has had, by its number; a removal leaves the last one only."""
        self.members = {}
        """The room of each member, and the number of the last entry of its history."""
        self.checked = {}
        """The number of frames of each member that were checked."""
        self.away = []
        for space in (None, 300):
            self.enter(Taker(space), None)

    def note(self):
        """Note the text of every entry, as it is now."""
        for entry in self.log.entries:
            text = payload(frames.message_frame("abcd", entry))
            texts = self.versions.setdefault(entry.number, [])
            if text not in texts:
                texts.append(text)

    def enter(self, member, had):
        self.log.held, held = False, self.log.held
        room, _, history = enter(self.rooms, member, last=None if had is None else f"abcd-{had}")
        self.log.held = held
        self.members[member] = room, Id.parse(history["id"]).number

    def pick(self, which, fits=lambda _: True):
        return which.choice([member for member in self.members if fits(member)])

    @rule(space=st.none() | st.integers(0, 600), kind=st.sampled_from([Taker, Taker, Reader]), watches=st.booleans())
    def join(self, space, kind, watches):
        self.enter(kind(space, events=[PRESENCE] if watches else []), None)

    @rule(count=st.integers(1, 9), text=st.text(max_size=40), turns=st.integers(0, 3))
    def say(self, count, text, turns):
        self.log.say(count, text)
        self.note()
        self.clock.turns(turns)

    @rule(which=st.randoms(use_true_random=False), removed=st.booleans())
    @precondition(lambda self: any(one.replaces is None and not one.removed for one in self.log.entries))
    def edit(self, which, removed):
        one = which.choice([one for one in self.log.entries if one.replaces is None and not one.removed][-6:])
        if removed:
            self.check()  # what was handed over before
        self.log.edit(one.number, f"edit {len(self.log.entries)}", removed=removed)
        if removed:
            for entry in self.log.entries:
                if entry.removed:
                    self.versions.pop(entry.number, None)
        self.note()

    @rule(which=st.randoms(use_true_random=False))
    @precondition(lambda self: self.members and self.log.entries)
    def acknowledge(self, which):
        member, number = self.pick(which), len(self.log.entries)
        self.members[member][0].acknowledge(
            member, number, frames.ack_frame(Id("abcd", number), f"c{number}", duplicate=False)
        )

    @rule(which=st.randoms(use_true_random=False), text=st.text(max_size=99))
    @precondition(lambda self: self.members)
    def answer_client(self, which, text):
        """Send an error or a page."""
        self.pick(which).send_frame(frames.error_frame(text))

    @rule()
    def pass_time(self):
        self.clock.advance(1)

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: any(not member.ready for member in self.members))
    def drain(self, which, space):
        member = self.pick(which, lambda member: not member.ready)
        member.drain(self.members[member][0], space)

    @rule(which=st.randoms(use_true_random=False), away=st.booleans())
    @precondition(lambda self: self.members)
    def leave(self, which, away):
        member = self.pick(which)
        self.check_member(member)
        room, joined = self.members.pop(member)
        self.rooms.leave(room, member)
        if away:
            self.away.append((type(member), self.last_of(member) or joined))

    @rule(which=st.randoms(use_true_random=False), space=st.none() | st.integers(0, 600))
    @precondition(lambda self: self.away)
    def rejoin(self, which, space):
        kind, had = self.away.pop(which.randrange(len(self.away)))
        self.enter(kind(space), had)

    def handed_over(self, member):
        """The texts of all frames that were handed to a member, those that its transport holds included."""
        return [text for _, text in inflated(b"".join([*member.writes, member.held]))]

    def last_of(self, member):
        messages = [json.loads(text) for text in self.handed_over(member) if text.startswith(b'{"type":"message"')]
        return Id.parse(messages[-1]["id"]).number if messages else None

    def check(self):
        for member in self.members:
            self.check_member(member)

    def check_member(self, member):
        """Check the frames since the last check against the texts that the log has had since then."""
        _, number = self.members[member]
        texts = self.handed_over(member)
        begin = self.checked.get(member, 0)
        self.checked[member] = len(texts)
        for place, text in enumerate(texts):
            if text.startswith(b'{"type":"message"'):
                number += 1
                assert place < begin or text in self.versions[number]
            else:
                assert text.startswith((b'{"type":"ack"', b'{"type":"error"', b'{"type":"presence"'))

    @rule()
    def settle(self):
        self.run_out(lambda: [(member, room) for member, (room, _) in self.members.items()])
        self.check()
        head = len(self.log.entries)
        for member, (_, joined) in self.members.items():
            assert (self.last_of(member) or joined) == member.cursor == head
        assert self.clock.idle


KeyframesMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
TestKeyframesMachine = KeyframesMachine.TestCase
