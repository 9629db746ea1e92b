"""The client on a transport in memory, with the test at its other end."""

import re
import time

import pytest
from support.helpers import Longest, result_of
from support.loops import reactor
from support.server_ends import Endpoint
from support.tokens import token
from support.watches import Watch
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from chatd.client.address import ServerAddress
from chatd.client.client import Client
from chatd.client.core import Listener
from chatd.client.protocol import (
    CLOSE_SECONDS,
    CONNECT_SECONDS,
    IDLE_SECONDS,
    RENEWAL_LABEL,
    SILENCE_SECONDS,
    Backoff,
    ClientStopped,
    Posted,
    ProtocolError,
    Rejected,
)
from chatd.messages import Code, Entry, Id
from chatd.transport.frames import ack_frame, error_frame, history_frame, message_frame, presence_frame, token_frame
from chatd.transport.framing import EXPIRED
from chatd.transport.handshake import switch

# Addresses


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("ws://chat.example", (False, "chat.example", 80, "/", ""), "ws://chat.example:80/"),
        ("wss://chat.example/rooms/a", (True, "chat.example", 443, "/rooms/a", ""), "wss://chat.example:443/rooms/a"),
        ("ws://h:8085/?events=typing", (False, "h", 8085, "/", "events=typing"), "ws://h:8085/"),
        ("WS://[::1]:8085/", (False, "::1", 8085, "/", ""), "ws://[::1]:8085/"),
    ],
)
def test_parse_addresses(url, address, text):
    assert ServerAddress.parse(url) == address
    assert str(ServerAddress.parse(url)) == text


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8085",
        "http://localhost/",
        "ws://",
        "ws:///rooms/a",
        "ws://h:x/",
        "ws://h:70000/",
        "ws://[::1/",
        "ws://h:0/",
        "ws://h/a b",
        "ws://h/é",
        "ws://ann@h/",
        "ws://h/#a",
    ],
)
def test_invalid_addresses(url):
    with pytest.raises(ValueError, match=re.escape(repr(url))) as error:
        ServerAddress.parse(url)
    assert "\n" not in str(error.value)


def test_resource_has_the_query_and_the_last_id():
    address = ServerAddress.parse("ws://h/rooms/a?username=ann+b&last_event_id=abcd-1")
    assert address.resource(None) == "/rooms/a?username=ann+b&last_event_id=abcd-1"
    assert address.resource(Id("abcd", 7)) == "/rooms/a?username=ann+b&last_event_id=abcd-7"
    assert ServerAddress.parse("ws://h").resource(None) == "/"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("ws://192.0.2.7/", TCP4ClientEndpoint),
        ("ws://[::1]/", TCP6ClientEndpoint),
        ("ws://chat.example/", HostnameEndpoint),
    ],
)
def test_only_names_are_resolved(url, kind):
    """Clients of an IP address connect in the order of their starts, which threads would mix up."""
    with reactor() as loop:
        assert type(ServerAddress.parse(url).endpoint(loop)) is kind


# A client in memory


def message(number):
    return message_frame("abcd", Entry(number, "ann", f"m{number}", "2026-01-01T00:00:00.000Z"))


class Table:
    """A client with its clock and its endpoint."""

    def __init__(self, url="ws://h:8085/rooms/a", *, listener=None, **options):
        self.clock = Clock()
        self.watch = listener or Watch()
        self.endpoint = Endpoint()
        backoff = Backoff(chance=Longest())
        self.client = Client(self.clock, url, self.watch, endpoint=self.endpoint, backoff=backoff, **options)
        self.client.start()

    def join(self, number=0, **said):
        """Accept a connection, up to the history."""
        wire = self.endpoint.accept()
        wire.answer()
        wire.say(history_frame("abcd", number, [], **said))
        return wire


def test_handshake_names_the_room_and_the_last_id():
    table = Table("ws://h:8085/rooms/a?events=typing", last=Id("abcd", 7))
    wire = table.endpoint.accept()
    head = wire.request()
    assert head.startswith("GET /rooms/a?events=typing&last_event_id=abcd-7 HTTP/1.1\r\n")
    assert "\r\nHost: h:8085\r\n" in head
    assert "\r\nSec-WebSocket-Protocol: chat.v1\r\n" in head
    table = Table("ws://[::1]:8085/")
    assert "\r\nHost: [::1]:8085\r\n" in table.endpoint.accept().request()


def test_listener_receives_the_history_and_then_each_message():
    table = Table()
    wire = table.endpoint.accept()
    wire.answer("101 Switching Protocols", "Sec-WebSocket-Protocol: chat.v1")
    data = history_frame("abcd", 2, [message(1), message(2)]) + message(3) + presence_frame(1) + message(4)
    for cut in range(0, len(data), 7):
        wire.say(data[cut : cut + 7])
    assert table.watch.kinds() == ["on_history", "on_connect", "on_entries", "on_event", "on_entries"]
    assert table.watch.numbers == [1, 2, 3, 4]
    assert table.client.last == Id("abcd", 4)


def test_pings_and_fragments():
    """Pings are answered, and fragments are joined."""
    table = Table()
    wire = table.join(2)
    wire.clear()
    text = message(3)[2:]
    wire.say(message(3) + b"\x89\x02hi" + message(4) + b"\x01\x05" + message(5)[2:7])
    assert wire.value()[:2] == b"\x8a\x82"
    assert len(wire.value()) == 8
    rest = message(5)[7:]
    wire.say(b"\x80%c" % len(rest) + rest[:9])
    wire.say(rest[9:])
    wire.say(b"\x01\x03" + message(6)[2:5])
    wire.say(b"\x80%c" % (len(text) - 3) + message(6)[5:])
    assert table.watch.numbers == [3, 4, 5, 6]


def test_post_waits_for_the_history_and_returns_its_id():
    table = Table()
    posted = table.client.post("ann", "hi")
    wire = table.endpoint.accept()
    wire.answer()
    assert wire.value() == b""
    wire.say(history_frame("abcd", 6, []))
    ((text),) = wire.said()
    assert text == {"username": "ann", "message": "hi", "label": text["label"]}
    wire.say(ack_frame(Id("abcd", 7), text["label"], duplicate=False))
    assert result_of(posted) == Posted(Id("abcd", 7))


def test_edits_removals_and_typing_notices():
    """An edit and a removal are posts; a typing notice has no label, and is left out without a connection."""
    table = Table()
    table.client.typing("ann")
    wire = table.join()
    table.client.typing("ann")
    table.client.edit("ann", Id("abcd", 7), "hello", {"color": "red"})
    table.client.remove(Id("abcd", 7))
    typing, edit, removal = wire.said()
    assert typing == {"type": "typing", "username": "ann"}
    assert edit == {
        "color": "red",
        "username": "ann",
        "message": "hello",
        "replaces": "abcd-7",
        "label": edit["label"],
    }
    assert removal == {"type": "remove", "id": "abcd-7", "label": removal["label"]}


def test_post_with_fields_of_the_operators_own():
    """They stand beside the username and the text, and replace neither."""
    table = Table()
    wire = table.join()
    table.client.post("ann", "hi", {"color": "red", "message": "else"})
    ((text),) = wire.said()
    assert text == {"color": "red", "username": "ann", "message": "hi", "label": text["label"]}


def test_post_without_an_ack_is_repeated_with_its_label():
    table = Table()
    wire = table.join()
    posted = table.client.post("ann", "hi")
    said = wire.said()
    wire.end()
    assert table.watch.events[-1] == ("on_disconnect", table.watch.events[-1][1], 1.0)
    table.clock.advance(1)
    wire = table.join(resumed=True)
    assert wire.said() == said
    wire.say(ack_frame(Id("abcd", 7), said[0]["label"], duplicate=True))
    assert result_of(posted) == Posted(Id("abcd", 7), duplicate=True)


def test_page_requests_and_their_answers():
    table = Table()
    wire = table.join(9)
    pages = [
        table.client.page(),
        table.client.page(before=Id("abcd", 3), limit=2),
        table.client.page(after=Id("abcd", 3)),
    ]
    asked = wire.said()
    assert [{**text, "label": ""} for text in asked] == [
        {"type": "history", "limit": 50, "label": ""},
        {"type": "history", "before": "abcd-3", "limit": 2, "label": ""},
        {"type": "history", "after": "abcd-3", "limit": 50, "label": ""},
    ]
    wire.say(history_frame("abcd", 2, [message(1), message(2)], label=asked[1]["label"]))
    assert [entry.number for entry in result_of(pages[1]).entries] == [1, 2]
    assert table.client.last == Id("abcd", 9)


def test_temporary_errors_delay_the_retry():
    """A retry waits as long as the server asks."""
    table = Table()
    wire = table.join()
    posted = table.client.post("ann", "hi")
    said = wire.said()
    wire.say(error_frame("slow", Code.RATE_LIMITED, said[0]["label"], 0.5))
    table.clock.advance(0.4)
    assert wire.value() == b""
    table.clock.advance(0.1)
    assert wire.said() == said
    wire.say(error_frame("no", Code.UNAVAILABLE, said[0]["label"]))
    wire.end()
    table.clock.advance(1)
    wire = table.join(resumed=True)
    assert wire.said() == said, "at once, and once"
    table.clock.advance(1)
    assert wire.said() == []
    wire.say(error_frame("no", Code.LABEL_REUSED, said[0]["label"]))
    with pytest.raises(Rejected, match="no"):
        result_of(posted)


def test_new_log_on_reconnect_replaces_all():
    table = Table()
    wire = table.join(5)
    wire.say(message(6))
    wire.end()
    table.clock.advance(1)
    wire = table.endpoint.accept()
    assert wire.request().startswith("GET /rooms/a?last_event_id=abcd-6 ")
    wire.end()
    table.clock.advance(2)
    table.join(2, resumed=False)
    assert table.watch.kinds() == [
        "on_history",
        "on_connect",
        "on_entries",
        "on_disconnect",
        "on_disconnect",
        "on_history",
        "on_connect",
    ]
    assert table.watch.numbers == []
    assert table.client.last == Id("abcd", 2)


def test_new_log_during_a_connection_replaces_all():
    table = Table()
    wire = table.join(5)
    wire.say(message(6))
    wire.say(history_frame("efgh", 2, [message(1), message(2)], resumed=False))
    wire.say(message_frame("efgh", Entry(3, "ann", "m3", "2026-01-01T00:00:00.000Z")))
    assert table.watch.kinds() == ["on_history", "on_connect", "on_entries", "on_history", "on_entries"]
    assert table.watch.numbers == [1, 2, 3]
    assert table.client.last == Id("efgh", 3)
    wire.end()
    table.clock.advance(1)
    assert table.endpoint.accept().request().startswith("GET /rooms/a?last_event_id=efgh-3 ")


def test_requests_are_repeated_to_a_new_log():
    table = Table()
    wire = table.join(5)
    posts = [table.client.post("ann", text) for text in ("one", "two", "three")]
    said = wire.said()
    labels = [text["label"] for text in said]
    wire.say(ack_frame(Id("abcd", 6), labels[0], duplicate=False))
    wire.say(history_frame("efgh", 2, [], resumed=False))
    assert wire.said() == said[1:]
    wire.say(ack_frame(Id("efgh", 3), labels[1], duplicate=False))
    wire.say(ack_frame(Id("efgh", 3), labels[1], duplicate=True))
    wire.say(error_frame("slow", Code.RATE_LIMITED, labels[1], 0.5))
    wire.say(error_frame("no", Code.UNAVAILABLE, labels[2]))
    wire.say(ack_frame(Id("efgh", 4), labels[2], duplicate=False))
    assert [result_of(post).id for post in posts] == [("abcd", 6), ("efgh", 3), ("efgh", 4)]
    table.clock.advance(5)
    assert wire.said() == []
    assert not wire.aborted


@pytest.mark.parametrize("resumed", [True, None])
def test_second_history_must_be_a_fresh_start(resumed):
    table = Table()
    wire = table.join(5)
    wire.say(history_frame("abcd", 5, [], resumed=resumed))
    assert wire.aborted
    assert table.watch.kinds() == ["on_history", "on_connect", "on_protocol_error"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (message(9), "abcd-9 arrived after abcd-7, instead of abcd-8"),
        (message(7), "abcd-7 arrived after abcd-7, again"),
        (b"\x81\x02{}", "malformed frame"),
        (error_frame("no"), "an error answers no request: no"),
    ],
)
def test_protocol_error_drops_the_connection_and_reconnects(data, words):
    table = Table()
    wire = table.join(7)
    wire.say(data + message(8))
    assert wire.aborted
    wire.say(message(8))
    wire.end()
    assert table.watch.kinds() == ["on_history", "on_connect", "on_protocol_error", "on_disconnect"]
    assert isinstance(table.watch.events[2][1], ProtocolError)
    assert words in str(table.watch.events[2][1])
    assert table.watch.events[3][1] == "the server broke the protocol"
    table.clock.advance(1)
    assert "last_event_id=abcd-7" in table.endpoint.accept().request()


def test_no_post_after_a_protocol_error():
    """Posts wait for the next connection."""
    table = Table()
    wire = table.join(7)
    wire.say(message(9))
    table.client.post("ann", "hi")
    assert wire.said() == []
    wire.end()
    table.clock.advance(1)
    assert len(table.join(7, resumed=True).said()) == 1


# Listeners that raise


class Fails:
    """A callback that raises at its first call."""

    def __init__(self, callback):
        self.callback = callback
        self.failed = False

    def __call__(self, *received):
        if self.failed:
            return self.callback(*received)
        self.failed = True
        raise ValueError("the listener's own fault")


def dropped(table, wire):
    """End a connection that a failed callback has dropped, and return the head of the next request."""
    assert wire.aborted
    wire.end()
    assert table.watch.events[-1][:2] == ("on_disconnect", "a callback of the listener failed")
    table.clock.advance(1)
    wire = table.endpoint.accept()
    head = wire.value().decode()
    wire.answer()
    return head, wire


def test_entry_is_delivered_again_after_a_raise():
    """A listener that raises gets the same entries on the next connection, and those after them."""
    table = Table()
    wire = table.join(7)
    table.watch.on_entries = Fails(table.watch.on_entries)
    with capturedLogs() as events:
        wire.say(message(8) + message(9))
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ValueError]
    assert table.client.last == Id("abcd", 7)
    head, wire = dropped(table, wire)
    assert "last_event_id=abcd-7 " in head
    wire.say(history_frame("abcd", 9, [message(8), message(9)], resumed=True))
    assert table.watch.numbers == [8, 9]
    assert table.client.last == Id("abcd", 9)


def test_history_is_delivered_again_after_a_raise():
    """A failure in the first history drops the connection, though Autobahn reads it within the handshake."""
    table = Table()
    table.watch.on_history = Fails(table.watch.on_history)
    posted = table.client.post("ann", "hi")
    wire = table.endpoint.accept()
    key = re.search(r"Sec-WebSocket-Key: (\S+)", wire.request())[1]
    wire.say(switch(key, None, "chatd") + history_frame("abcd", 2, [message(1), message(2)]))
    assert table.client.last is None
    head, wire = dropped(table, wire)
    assert "last_event_id" not in head
    wire.say(history_frame("abcd", 2, [message(1), message(2)]))
    assert table.watch.numbers == [1, 2]
    assert not posted.called
    assert len(wire.said()) == 1


@pytest.mark.parametrize("name", ["on_connect", "on_event", "on_protocol_error"])
def test_other_callbacks_that_raise(name):
    """A failure elsewhere reconnects too, and repeats nothing that was delivered."""
    table = Table()
    setattr(table.watch, name, Fails(None))
    wire = table.join(7)
    wire.say(presence_frame(1) + message(7))
    head, _ = dropped(table, wire)
    assert "last_event_id=abcd-7 " in head


# Reconnecting


def test_backoff_grows_until_the_first_history():
    table = Table()
    waits = []
    for _ in range(7):
        table.endpoint.refuse()
        waits.append(table.watch.events[-1])
        table.clock.advance(waits[-1][2])
    assert [event[2] for event in waits] == [1, 2, 4, 8, 16, 30, 30]
    assert waits[0][1] == "connection refused"
    table.join(1).end()
    assert table.watch.events[-1][2] == 1


def test_other_errors_keep_their_words():
    table = Table()
    table.endpoint.refuse(OSError("no route."))
    assert table.watch.events == [("on_disconnect", "no route", 1.0)]


@pytest.mark.parametrize(
    ("reason", "wait"), [("retry_after=0.7", 0.7), ("going; retry_after=12", 12), ("restarting", 1), ("", 1)]
)
def test_stopping_server_sets_the_reconnect_time(reason, wait):
    table = Table()
    wire = table.join(7)
    wire.clear()
    wire.close(1012, reason)
    assert wire.value()[:1] == b"\x88"
    wire.end()
    assert table.watch.events[-1] == ("on_disconnect", f"closed with 1012 {reason}".rstrip(), wait)
    table.clock.advance(wait)
    table.join(7, resumed=True)


def test_close_without_a_code_reconnects():
    table = Table()
    wire = table.join(7)
    wire.close()
    wire.end()
    assert table.watch.events[-1] == ("on_disconnect", "closed without a code", 1.0)


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1008, 1009])
def test_close_with_a_client_error_rejects(code):
    """The client fails all requests and does not reconnect."""
    table = Table()
    wire = table.join(7)
    posted = table.client.post("ann", "hi")
    wire.close(code, "why")
    wire.end()
    refused = table.watch.events[-1]
    assert (refused[0], str(refused[1]), refused[1].code) == ("on_reject", f"closed with {code} why", code)
    for answer in (posted, table.client.post("ann", "hi"), table.client.page()):
        with pytest.raises(Rejected, match="why"):
            result_of(answer)
    table.clock.advance(100)
    assert table.endpoint.attempts == []
    assert table.clock.calls == []
    assert result_of(table.client.stop()) is None


def test_rejection_precedes_the_failed_requests():
    """The listener learns the cause before the requests in flight fail of it."""
    table = Table()
    wire = table.join(7)
    order = table.watch.events
    table.client.post("ann", "hi").addErrback(lambda failure: order.append(("failed", failure.value)))
    wire.close(1008, "why")
    wire.end()
    (kind, reason), failed = order[-2:]
    assert (kind, failed) == ("on_reject", ("failed", reason))


def test_requests_fail_though_on_reject_raises():
    table = Table()
    wire = table.join(7)
    posted = table.client.post("ann", "hi")
    table.watch.on_reject = lambda _: 1 / 0
    wire.close(1008, "why")
    with pytest.raises(ZeroDivisionError):
        wire.end()
    with pytest.raises(Rejected, match="why"):
        result_of(posted)


@pytest.mark.parametrize("status", ["400 Bad Request", "403 Forbidden", "404 Not Found", "200 OK", "505"])
def test_handshake_rejected_for_good(status):
    table = Table()
    wire = table.endpoint.accept()
    wire.answer(status)
    assert wire.aborted
    wire.end()
    ((kind, refused),) = table.watch.events
    assert (kind, str(refused), refused.code) == ("on_reject", f"refused with {status}", int(status[:3]))
    assert table.clock.calls == []


def test_server_header():
    """The client keeps the last Server header that it received."""
    table = Table()
    assert table.client.server is None
    wire = table.endpoint.accept()
    wire.answer("101 Switching Protocols", "Server: chatd/1.2.3")
    assert table.client.server == "chatd/1.2.3"
    wire.end()
    assert table.client.server == "chatd/1.2.3", "the last"


def test_stop_when_rejected():
    """Stopping in the errback of a rejected post takes effect."""
    table = Table()
    posted = table.client.post("ann", "hi")
    wire = table.endpoint.accept()
    stopped = []
    posted.addErrback(lambda _: stopped.append(table.client.stop()))
    wire.answer("403 Forbidden")
    wire.end()
    assert result_of(stopped[0]) is None
    assert [kind for kind, *_ in table.watch.events] == ["on_reject"]
    assert table.clock.calls == []


@pytest.mark.parametrize(
    ("status", "header", "wait"),
    [
        ("503 Service Unavailable", "Retry-After: 7", 7),
        ("429 Too Many Requests", "Retry-After: 2", 2),
        ("502 Bad Gateway", "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT", 1),
        ("503 Service Unavailable", "X: y", 1),
    ],
)
def test_handshake_rejected_for_now(status, header, wait):
    """The client reconnects after Retry-After."""
    table = Table()
    wire = table.endpoint.accept()
    wire.answer(status, header)
    wire.end()
    assert table.watch.events == [("on_disconnect", f"refused with {status}", wait)]
    table.clock.advance(wait)
    table.join(1)


def test_malformed_handshake_is_retried():
    table = Table()
    wire = table.endpoint.accept()
    wire.say(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
    wire.end()
    ((kind, reason, _),) = table.watch.events
    assert (kind, reason) == ("on_disconnect", "HTTP Upgrade header missing")
    table.clock.advance(1)
    wire = table.endpoint.accept()
    wire.say(b"nonsense\r\n\r\n")
    wire.end()
    assert table.watch.kinds() == ["on_disconnect", "on_disconnect"]


def test_websocket_violation_is_reported():
    table = Table()
    wire = table.join(1)
    wire.say(b"\xf1\x00")
    wire.end()
    assert "RSV" in table.watch.events[-1][1]


# Time-outs


def test_handshake_times_out():
    table = Table()
    wire = table.endpoint.accept()
    table.clock.advance(CONNECT_SECONDS - 1)
    wire.say(b"HTTP/1.1 101")
    assert not wire.aborted
    table.clock.advance(1)
    assert wire.aborted
    wire.end()
    assert table.watch.events == [("on_disconnect", "the server did not answer in time", 1.0)]


def test_idle_server_is_pinged():
    """A server may ping once an hour, so the client finds out by itself whether it is alive."""
    table = Table()
    wire = table.join(1)
    wire.clear()
    table.clock.advance(IDLE_SECONDS - 1)
    assert wire.value() == b""
    for _ in range(10 * SILENCE_SECONDS):
        table.clock.advance(1)
        if wire.value()[:2] == b"\x89\x80":
            wire.say(b"\x8a\x00")
            wire.clear()
    assert not wire.aborted


def test_silent_server_times_out():
    table = Table()
    wire = table.join(1)
    table.clock.advance(IDLE_SECONDS - 1)
    wire.say(b"\x89\x00")
    table.clock.advance(1)
    table.clock.advance(IDLE_SECONDS - 1)
    table.clock.advance(SILENCE_SECONDS - IDLE_SECONDS - 1)
    assert not wire.aborted
    table.clock.advance(1)
    assert wire.aborted
    wire.end()
    assert table.watch.events[-1] == ("on_disconnect", "the server did not answer in time", 1.0)


def test_close_times_out():
    """The client drops the connection if the server does not end it."""
    table = Table()
    wire = table.join(1)
    wire.close(1012)
    wire.say(b"")
    table.clock.advance(CLOSE_SECONDS)
    assert wire.aborted


# Stopping


def test_stop_closes_and_waits():
    table = Table()
    wire = table.join(1)
    posted = table.client.post("ann", "hi")
    wire.clear()
    gone = table.client.stop()
    assert wire.value()[:1] == b"\x88"
    with pytest.raises(ClientStopped):
        result_of(posted)
    assert not gone.called
    wire.close(1000)
    wire.end()
    assert result_of(gone) is None
    assert result_of(table.client.stop()) is None
    assert table.clock.calls == []
    with pytest.raises(ClientStopped):
        result_of(table.client.post("ann", "hi"))


def test_stop_times_out():
    table = Table()
    wire = table.join(1)
    gone = table.client.stop()
    table.clock.advance(CLOSE_SECONDS)
    assert wire.aborted
    wire.end()
    assert result_of(gone) is None
    assert table.watch.kinds() == ["on_history", "on_connect"]


def test_stop_after_a_time_out():
    """A client whose silent connection was dropped stops before it learns of the end of that connection."""
    table = Table()
    wire = table.join(1)
    table.clock.pump([1] * SILENCE_SECONDS)
    assert wire.aborted
    gone = table.client.stop()
    wire.end()
    assert result_of(gone) is None
    assert table.clock.calls == []


def test_stop_during_the_handshake():
    table = Table()
    wire = table.endpoint.accept()
    gone = table.client.stop()
    assert wire.aborted
    wire.end()
    assert result_of(gone) is None


def test_stop_while_rejected():
    table = Table()
    wire = table.join(1)
    gone = table.client.stop()
    wire.close(1008, "why")
    wire.end()
    assert result_of(gone) is None
    assert table.watch.kinds() == ["on_history", "on_connect"]


def test_stop_cancels_a_connection_attempt():
    table = Table()
    assert result_of(table.client.stop()) is None
    assert table.endpoint.cancelled
    assert table.watch.events == []


def test_stop_during_the_backoff():
    table = Table()
    table.endpoint.refuse()
    assert result_of(table.client.stop()) is None
    assert table.clock.calls == []


def test_drop_connection():
    table = Table()
    assert not table.client.drop_connection()
    wire = table.join(1)
    assert table.client.drop_connection()
    assert wire.aborted
    wire.end()
    assert table.watch.events[-1] == ("on_disconnect", "dropped by the client", 1.0)


def test_listener_methods_are_optional():
    table = Table(listener=Listener())
    wire = table.join(1)
    wire.say(message(2) + presence_frame(1) + message(2))
    wire.end()
    table.clock.advance(1)
    wire = table.endpoint.accept()
    wire.answer("404 Not Found")
    wire.end()
    assert table.client.last == Id("abcd", 2)


# Tokens


class Issuer:
    """A function that returns tokens which last for a while, or raises."""

    def __init__(self, lasts=30):
        self.lasts = lasts
        self.made = []

    def __call__(self):
        if self.lasts is None:
            raise RuntimeError("the login is gone")
        self.made.append(token(f"ann-{len(self.made)}", self.lasts))
        return self.made[-1]


def authorization(wire):
    """Return the token of a handshake, which stays to be answered."""
    request = wire.value().decode()
    found = re.findall(r"(?m)^Authorization: Bearer (\S+)\r$", request)
    return found[0] if found else None


def test_token_in_the_handshake():
    """A token goes into the header of every handshake; without one there is no such header."""
    assert authorization(Table().endpoint.accept()) is None
    assert authorization(Table(token="a.b.c").endpoint.accept()) == "a.b.c"
    issuer = Issuer()
    table = Table(token=issuer)
    assert authorization(table.endpoint.accept()) == issuer.made[0]


def test_token_is_renewed_before_it_expires():
    """The client asks for the next token before the expiry, and sends it."""
    issuer = Issuer()
    table = Table(token=issuer)
    wire = table.join()
    assert wire.said() == []
    table.clock.advance(15)
    assert wire.said() == [{"type": "token", "token": issuer.made[1], "label": RENEWAL_LABEL}]
    wire.say(token_frame(time.time() + 30, RENEWAL_LABEL))
    assert "on_event" not in table.watch.kinds()
    table.clock.advance(15)
    assert [said["token"] for said in wire.said()] == [issuer.made[2]]
    table.client.stop()
    wire.close(1000)
    wire.end()
    assert table.clock.getDelayedCalls() == []


def test_refused_renewal():
    """A renewal that is refused leaves the connection as it is, until its token expires."""
    table = Table(token=Issuer())
    wire = table.join()
    table.clock.advance(15)
    wire.said()
    with capturedLogs() as events:
        wire.say(error_frame("The token is of another subject.", Code.TOKEN_REFUSED, RENEWAL_LABEL))
    assert "another subject" in formatEvent(events[0])
    assert table.watch.kinds() == ["on_history", "on_connect"]


def close(table, reason):
    """Close a connection with 1008."""
    wire = table.join()
    wire.close(1008, reason)
    wire.end()


def refuse(table):
    """Refuse a handshake with 401."""
    wire = table.endpoint.accept()
    wire.answer("401 Unauthorized")
    wire.end()


def test_expired_token():
    """After the close of an expired token a client that can get another one reconnects with it."""
    issuer = Issuer()
    table = Table(token=issuer)
    close(table, EXPIRED)
    assert table.watch.kinds()[-1] == "on_disconnect"
    table.clock.advance(1)
    assert authorization(table.endpoint.accept()) == issuer.made[1]
    table = Table(token="a.b.c")
    close(table, EXPIRED)
    assert table.watch.kinds()[-1] == "on_reject"
    table = Table(token=Issuer())
    close(table, "100 frames in a row were rejected")
    assert table.watch.kinds()[-1] == "on_reject"


def test_unauthorized():
    """A client that can get another token tries once more after a 401, and again after it was connected."""
    issuer = Issuer()
    table = Table(token=issuer)
    refuse(table)
    table.clock.advance(1)
    wire = table.join()
    wire.end()
    table.clock.advance(2)
    refuse(table)
    table.clock.advance(4)
    refuse(table)
    assert table.watch.kinds()[-1] == "on_reject"
    assert len(issuer.made) == 4
    table = Table(token="a.b.c")
    refuse(table)
    assert table.watch.kinds() == ["on_reject"]


def test_client_that_its_own_functions_stop():
    """It does not connect any more."""
    tables = []

    def issue():
        if tables:
            tables[0].client.stop()
        return "secret"

    table = Table(token=issue)
    attempts = len(table.endpoint.attempts)
    tables.append(table)
    table.client.start()
    assert len(table.endpoint.attempts) == attempts


def test_function_that_returns_no_token():
    """A function that raises delays the connection, or the renewal is left out."""
    issuer = Issuer(None)
    with capturedLogs():
        table = Table(token=issuer)
    assert (table.endpoint.attempts, table.watch.events) == ([], [("on_disconnect", "there is no token", 1.0)])
    issuer.lasts = 30
    table.clock.advance(1)
    wire = table.join()
    issuer.lasts = None
    with capturedLogs() as events:
        table.clock.advance(15)
    assert wire.said() == []
    assert len(events) >= 1
    assert len(table.clock.getDelayedCalls()) > 0
