"""A membership joins and leaves a room for a transport, and then holds neither."""

import gc
import weakref

import pytest
from support.helpers import result_of
from twisted.internet.task import Clock

from chatd.room.registry import Registry
from chatd.store.base import Retention
from chatd.store.memory import MemoryStore
from chatd.transport import frames
from chatd.transport.framing import CloseCode
from chatd.transport.membership import GONE, Membership


class Transport:
    """A transport that records its calls."""

    number = 1
    peer = "192.0.2.7:4321"

    def __init__(self):
        self.journal = []

    def write(self, data):
        self.journal.append(data)
        return 1

    def hold(self, rest):
        self.journal.append(("hold", rest))

    def send_frame(self, frame):
        self.journal.append(("frame", frame))

    def evict(self):
        self.journal.append("evict")

    def ban(self, reason):
        self.journal.append(("ban", reason))


@pytest.fixture
def rooms():
    store = MemoryStore(Retention(), lambda: 1_800_000_000.0)
    store.open(())
    return Registry(store, frames, Clock(), 100)


@pytest.fixture
def transport():
    return Transport()


@pytest.fixture
def member(rooms, transport):
    return Membership(transport, rooms)


def use(member):
    member.hold(b"rest")
    member.send_frame(b"frame")
    member.evict()
    return member.write(b"data")


def test_calls_reach_the_transport(member, transport):
    assert use(member) == 1
    assert transport.journal == [("hold", b"rest"), ("frame", b"frame"), "evict", b"data"]


def test_join_and_leave(rooms, member):
    """A client is in its room between the two, and the room is named afterwards too."""
    assert (member.joined, member.head, member.has_pending(0), member.room_name) == (False, 0, False, "")
    assert b'"type":"history"' in member.join(result_of(rooms.open("team")))
    assert member.joined
    assert [*member.room.members] == [member]
    assert (member.has_pending(0), member.has_pending(1)) == (False, True)
    assert not member.awaits_log, "it sends no frames"
    member.leave()
    assert (member.joined, member.head, member.has_pending(1), member.room_name) == (False, 0, False, "team")
    assert len(rooms) == 0


def test_detached_member(rooms, member, transport):
    """Calls after detach() are accepted and do not reach the transport."""
    member.join(result_of(rooms.open("team")))
    member.detach()
    assert use(member) == len(b"data")
    assert transport.journal == []
    assert len(rooms) == 0
    GONE.stop_reading()
    GONE.read_on()
    GONE.read_frames()
    GONE.fail(CloseCode.INVALID_DATA, "")
    assert not [*GONE.unread_texts()]


def test_detached_transport_is_freed(rooms):
    """No cycle of references keeps an ended transport in memory."""
    transport = Transport()
    transport.member = Membership(transport, rooms)
    freed = weakref.ref(transport)
    gc.disable()
    try:
        transport.member.detach()
        del transport
        assert freed() is None
    finally:
        gc.enable()


def test_transport_takes_more_outside_of_a_room(member, transport):
    """A client that has left its room is only ready again."""
    member.ready = False
    member.resume()
    assert member.ready
    assert transport.journal == []
