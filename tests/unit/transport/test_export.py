"""The export of a room as JSON Lines, on the port for clients."""

import json
import re

import pytest
from support.helpers import RecordingPoster
from support.houses import House
from support.tokens import token, verifier
from support.web_doubles import Transport
from twisted.internet.address import IPv4Address
from twisted.internet.defer import fail
from twisted.logger import LogLevel, formatEvent

from chatd.messages import Entry, Id, Post
from chatd.room.log import LogUnavailable
from chatd.transport import export
from chatd.transport.connections import MAX_BUFFERED, STALL_SECONDS
from chatd.transport.export import EXPORT_ENTRIES, client_line, operator_line
from chatd.transport.frames import message_frame
from chatd.transport.framing import payload
from chatd.transport.identity import LEEWAY_SECONDS

ANN = Entry(7, "ann", 'hi "data":', "2026-01-01T00:00:00.000Z", "subject-a")
PATH = b"/rooms/team/export"
BEARER = b"Authorization: Bearer "


@pytest.fixture
def house():
    return House(seed=())


@pytest.fixture
def reads(house, monkeypatch):
    """The numbers after which the log is read."""
    seen = []
    read = house.log.read

    def noted(room, after, limit):
        seen.append(after)
        return read(room, after, limit)

    monkeypatch.setattr(house.log, "read", noted)
    return seen


def begin(house, path=PATH, *headers, transport=None):
    """Ask for an export; nothing is read before the next turn."""
    connection = house.connect(transport)
    connection.begin(b"GET", path, *headers)
    return connection


def lines(connection):
    """Return the documents of a whole export."""
    response, body = connection.response()
    assert response.status == 200, body
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["content-length"] is None
    assert response.headers["connection"] == "close"
    assert body == "" or body.endswith("}\n")
    return [json.loads(line) for line in body.splitlines()]


def exported(house, path=PATH, *headers):
    """Return the documents of an export that is read to its end."""
    connection = begin(house, path, *headers)
    house.turn()
    found = lines(connection)
    assert connection.closing
    connection.lose()
    return found


def texts(documents):
    return [document["data"]["message"] for document in documents]


def refusal(connection):
    response, body = connection.response()
    return response.status, json.loads(body)["detail"]


def cut(connection):
    """Return whether the connection was dropped before the last chunk."""
    return connection.transport.disconnected and not connection.transport.value().endswith(b"\r\n0\r\n\r\n")


# Lines


def test_line_is_the_message_frame():
    assert client_line("k7Q2", ANN) == payload(message_frame("k7Q2", ANN)) + b"\n"


def test_operators_see_the_author():
    """Only they do, and only if there is one."""
    document = json.loads(operator_line("k7Q2", ANN))
    assert document.pop("author") == "subject-a"
    assert document == json.loads(client_line("k7Q2", ANN))
    stranger = ANN._replace(author=None)
    assert operator_line("k7Q2", stranger) == client_line("k7Q2", stranger)


# Content of an export


@pytest.mark.parametrize("count", [1, EXPORT_ENTRIES - 1, EXPORT_ENTRIES, EXPORT_ENTRIES + 1, 3 * EXPORT_ENTRIES])
def test_export_has_every_message_once(house, count):
    said = [f"m{number}" for number in range(count)]
    house.say(*said, room="team")
    found = exported(house)
    assert texts(found) == said
    assert [document["id"] for document in found] == [house.id(number) for number in range(1, count + 1)]
    assert house.forgotten


def test_export_of_an_empty_room(house):
    assert exported(house) == []


def test_export_resumes_after_an_id(house):
    house.say(*map(str, range(1, 251)), room="team")
    for after, rest in ((0, range(1, 251)), (130, range(131, 251)), (250, [])):
        found = exported(house, PATH + f"?after={house.id(after)}".encode())
        assert texts(found) == [str(number) for number in rest]


def test_export_after_trimmed_messages():
    """It begins with the oldest message that is stored."""
    house = House(seed=(), retain="3")
    house.say(*"abcde", room="team")
    assert texts(exported(house, PATH + f"?after={house.id(1)}".encode())) == [*"cde"]


def test_edits_and_removals_are_noted(house):
    house.say("helo", "secret", room="team")
    for post in (
        Post("ann", "hello", replaces=Id(house.epoch, 1), moderated=True),
        Post("ann", "[removed]", replaces=Id(house.epoch, 2), removed=True, moderated=True),
    ):
        house.log.append("team", post, RecordingPoster())
    found = exported(house)
    assert texts(found) == ["hello", "[removed]", "hello", "[removed]"]
    assert (found[0]["replaced"], found[2]["replaces"]) == (house.id(3), house.id(1))
    assert (found[1]["removed"], found[3]["removed"], found[3]["replaces"]) == (True, True, house.id(2))


def test_export_ends_at_the_head_of_its_start(house):
    """It ends although messages arrive all the time."""
    house.say(*map(str, range(150)), room="team")
    house.log.slow = True
    connection = begin(house)
    for _ in range(2):
        house.turn()
        house.log.answer()
        house.say("later", room="team")
    assert len(lines(connection)) == 150


def test_export_of_a_room_that_is_trimmed_meanwhile(house):
    """It goes on with what is left."""
    house.say(*map(str, range(150)), room="team")
    house.log.slow = True
    connection = begin(house)
    house.turn()
    house.log.answer()
    house.log.clear_room("team")
    house.turn()
    house.log.answer()
    assert len(lines(connection)) == EXPORT_ENTRIES


def test_head_reads_nothing(house, reads):
    response, body = house.ask(b"HEAD", PATH)
    assert (response.status, response.headers["content-type"], body) == (200, "application/x-ndjson", "")
    assert (response.headers["content-length"], reads) == (None, [])


# Permissions and limits


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("after=5", 400, 'Validation error: "after" fails to match the required pattern'),
        ("after=%FF", 400, "the query is not UTF-8"),
        ("after=Other1-1", 404, "there is no message of this id"),
        ("after={}-3", 404, "there is no message of this id"),
    ],
)
def test_wrong_query_is_refused(house, query, status, detail):
    house.say("a", "b", room="team")
    connection = begin(house, PATH + b"?" + query.format(house.epoch).encode())
    house.turn()
    found = refusal(connection)
    assert found[0] == status
    assert found[1].startswith(detail)
    assert not connection.closing


def test_other_method_is_refused(house):
    response, _ = house.ask(b"POST", PATH, body=b"")
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_token_must_permit_reading():
    house = House(seed=(), tokens=verifier())
    house.say("hi", room="team")
    for headers, status in (((), 401), ((BEARER + token(chatd={"read": ["main"]}).encode(),), 403)):
        assert house.get(PATH, *headers)[0].status == status
    assert texts(exported(house, PATH, BEARER + token().encode())) == ["hi"]


def test_banned_client_is_refused(house):
    house.sanction(address="192.0.2.7", room="team")
    transport = Transport(peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
    assert refusal(begin(house, transport=transport))[0] == 403


def test_ban_ends_an_export(house, events):
    """It is in force at once."""
    house.say(*map(str, range(250)), room="team")
    transport = Transport(peerAddress=IPv4Address("TCP", "192.0.2.7", 4321))
    connection = begin(house, transport=transport)
    house.clock.turn()
    house.sanction(address="192.0.2.7")
    house.turn()
    assert cut(connection)
    assert "You are banned from this server" in formatEvent(events[-1])


def test_token_that_expires_cuts_an_export(events):
    """Its client gets no further page a minute after the expiry, as it would get no further event."""
    house = House(seed=(), tokens=verifier())
    house.say(*map(str, range(250)), room="team")
    header = BEARER + token(lasts=100).encode()
    late, connection = begin(house, PATH, header), begin(house, PATH, header)
    house.clock.turn()
    waiting = begin(house, PATH, header)
    house.clock.rightNow += LEEWAY_SECONDS + 90
    house.clock.turn()
    house.clock.turn()
    assert not cut(connection)
    house.clock.rightNow += 11
    house.turn()
    assert [cut(one) for one in (late, connection)] == [True, True]
    assert "the export of team was cut" in formatEvent(events[-1])
    assert refusal(waiting)[0] == 401


def test_export_counts_as_one_read():
    house = House(seed=(), rate=(1, 2))
    house.say(*map(str, range(250)), room="team")
    assert len(exported(house)) == 250
    assert len(exported(house)) == 250
    assert refusal(begin(house)) == (429, "Rate limit exceeded")


def test_export_counts_as_a_connection():
    """An address has no more exports at once than connections, also through a proxy."""
    house = House(seed=(), per_address=1, hops=1)
    house.say(*map(str, range(250)), room="team")
    forwarded = b"X-Forwarded-For: 198.51.100.7"
    house.log.slow = True
    first, second = begin(house, PATH, forwarded), begin(house, PATH, forwarded)
    assert refusal(second)[0] == 429
    house.log.release()
    house.turn()
    assert len(lines(first)) == 250
    first.lose()
    house.pass_time(1)
    assert len(exported(house, PATH, forwarded)) == 250


# Its pace


def test_one_page_is_read_in_a_turn(house, reads):
    """However many exports there are, in turn."""
    house.say(*map(str, range(3 * EXPORT_ENTRIES)), room="team")
    connections = [begin(house) for _ in range(3)]
    assert reads == []
    for turn in range(1, 10):
        house.clock.turn()
        assert len(reads) == turn
    assert reads == [after for after in (0, EXPORT_ENTRIES, 2 * EXPORT_ENTRIES) for _ in connections]
    assert [len(lines(one)) for one in connections] == [300] * 3


def test_long_entries_are_written_in_parts(house, monkeypatch, reads):
    """A turn writes about as many bytes as for short entries, and reads hardly more than it writes."""
    monkeypatch.setattr(export, "EXPORT_BYTES", 900)
    wanted = [*("x" * 400 + str(number) for number in range(20)), *map(str, range(130))]
    house.say(*wanted, room="team")
    connection = begin(house)
    house.clock.turn()
    assert len(connection.transport.value()) < 2000
    house.turn()
    assert texts(lines(connection)) == wanted
    assert reads[:11] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert len(reads) < 30


def test_full_transport_reads_nothing(house, reads):
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    connection.channel.pauseProducing()
    house.clock.turn()
    assert len(reads) == 2, "the page that it waited for is written"
    house.turn()
    assert len(reads) == 2
    connection.channel.resumeProducing()
    house.turn()
    assert len(lines(connection)) == 250


def test_transport_that_is_full_for_a_moment(house, reads):
    """A page that is being read is not read twice."""
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    connection.channel.pauseProducing()
    connection.channel.resumeProducing()
    house.turn()
    assert len(reads) == 3
    assert len(lines(connection)) == 250


def test_client_that_reads_nothing_is_dropped(house, events):
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    connection.channel.pauseProducing()
    house.pass_time(STALL_SECONDS - 1)
    assert not connection.transport.disconnected
    house.pass_time(1)
    assert cut(connection)
    assert "it took nothing in time" in formatEvent(events[-1])
    assert house.forgotten


def test_client_that_leaves_the_end_is_dropped(house):
    """The bytes after the last page wait no longer than others."""
    house.say("hi", room="team")
    connection = begin(house)
    house.turn()
    assert connection.closing
    house.pass_time(STALL_SECONDS + 1)
    assert connection.transport.disconnected
    assert house.forgotten


def test_bytes_of_exports_are_bounded(house):
    """The export with the most waiting bytes is dropped while all together hold too many."""
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    connection.transport.dataBuffer = bytes(MAX_BUFFERED + 1)
    connection.channel.pauseProducing()
    house.pass_time(1)
    assert connection.transport.disconnected


def test_client_that_leaves_costs_nothing(house, reads, events):
    house.say(*map(str, range(450)), room="team")
    for paused in (False, True):
        connection = begin(house)
        house.clock.turn()
        if paused:
            connection.channel.pauseProducing()
        connection.lose()
        reads.clear()
        house.turn()
        assert len(reads) <= 1
        assert house.forgotten
    house.log.down = True
    connection = begin(house)
    connection.lose()
    house.turn()
    assert [event for event in events if event["log_level"] >= LogLevel.warn] == []


def test_client_that_finishes_sending_gets_it_whole(house):
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    connection.channel.readConnectionLost()
    assert not connection.closing
    house.turn()
    assert len(lines(connection)) == 250


def test_export_over_a_unix_socket(house, events):
    """Its peer has a name in the log too."""
    house.say(*map(str, range(250)), room="team")
    connection = begin(house, transport=Transport(peerAddress="socket"))
    house.clock.turn()
    connection.channel.pauseProducing()
    house.pass_time(STALL_SECONDS + 1)
    assert "#0 socket is dropped" in formatEvent(events[-1])
    assert connection.transport.disconnected


# Faults


def test_log_that_fails_at_once_is_503(house):
    house.say("hi", room="team")
    house.log.down = True
    connection = begin(house)
    house.turn()
    assert refusal(connection) == (503, "the log cannot be read now")


@pytest.mark.parametrize("fault", ["down", "epoch", "stop"])
def test_fault_in_mid_export_cuts_it(house, events, fault):
    """The client sees that the answer is not whole, and other exports go on."""
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    if fault == "down":
        house.log.down = True
    elif fault == "epoch":
        house.log.epoch = "p9Zx"
    else:
        house.site.close()
    house.turn()
    assert cut(connection)
    words = {"down": "LogUnavailable", "epoch": "UnknownId", "stop": "the server is about to stop"}
    assert re.search(f"the export of team was cut: .*{words[fault]}", formatEvent(events[-1]))
    assert house.forgotten
    house.log.down = False
    if fault != "stop":
        assert len(exported(house)) == 250


def test_export_before_a_stop_is_503(house):
    """A request that waits for its first page when the server stops is answered."""
    connection = begin(house)
    house.site.close()
    house.turn()
    assert refusal(connection) == (503, "the server is about to stop")


def test_unexpected_fault_is_logged(house, monkeypatch, events):
    """It ends one export, and not the queue."""
    house.say(*map(str, range(250)), room="team")
    connection = begin(house)
    house.clock.turn()
    with monkeypatch.context() as patched:
        patched.setattr(house.log, "read", lambda *_: fail(RuntimeError("a bug")))
        house.turn()
    assert cut(connection)
    assert (formatEvent(events[-1]), events[-1]["log_level"]) == ("an export failed", LogLevel.critical)
    assert len(exported(house)) == 250


def test_store_that_fails_while_another_export_waits(house, monkeypatch):
    house.say(*map(str, range(250)), room="team")
    monkeypatch.setattr(export, "EXPORT_ENTRIES", 200)
    first, second = begin(house), begin(house)
    house.log.slow = True
    house.clock.turn()
    house.log.fail(LogUnavailable("the disk is gone"))
    house.log.release()
    house.turn()
    assert refusal(first)[0] == 503
    assert len(lines(second)) == 250
