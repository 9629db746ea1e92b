"""The rooms over HTTP: pages, posts and Server-Sent Events, for clients without WebSocket."""

import gc
import json
import re
import weakref
from http import HTTPStatus
from urllib.parse import quote, urljoin, urlsplit

import pytest
from support.helpers import PING_SECONDS, RecordingPoster, count_held, result_of
from support.houses import JSON, House
from support.web_doubles import Stream, Transport
from support.websocket_frames import masked
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.interfaces import IHalfCloseableProtocol

from chatd.room.log import InDoubt
from chatd.room.room import MAX_LAG
from chatd.transport import http
from chatd.transport.api import PREFLIGHT_SECONDS
from chatd.transport.connections import STALL_SECONDS
from chatd.transport.frames import MAX_MESSAGE, MESSAGE, Vocabulary

RETRY = str(http.RETRY_AFTER_SECONDS)


@pytest.fixture
def house():
    return House()


def problem(answered, code=None):
    """Return the status and the words of a refusal, which is a problem as RFC 9457 has it."""
    response, body = answered
    assert response.headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    assert document["status"] == response.status
    assert document["title"] == HTTPStatus(response.status).phrase
    assert document.get("code") == code
    assert document.keys() <= {"title", "status", "detail", "code"}
    return response.status, document["detail"]


def content(answered, status=200):
    response, body = answered
    assert response.status == status, body
    assert response.headers["content-type"] == "application/json"
    assert body.endswith("}\n")
    return json.loads(body)


def links(response):
    """Return the links of an answer by relation (RFC 8288)."""
    found = re.findall(r'<([^>]*)>; rel="(prev|next)"', response.headers.get("link", ""))
    assert ", ".join(f'<{url}>; rel="{rel}"' for url, rel in found) == response.headers.get("link", "")
    return {rel: url for url, rel in found}


def numbers(document):
    """Return the numbers of a page's messages, which count back from its id."""
    end = int(document["id"].partition("-")[2])
    return [*range(end - len(document["data"]) + 1, end + 1)]


def said(document):
    return [entry["message"] for entry in document["data"]]


# Pages


def test_messages_are_the_newest_as_the_history_frame_has_them(house):
    response, body = house.get(b"/rooms/main/messages")
    assert content((response, body)) == {
        "type": "history",
        "id": house.id(2),
        "data": [
            {"username": "Alice", "message": "Hello!", "timestamp": "2024-10-20T12:30:00Z"},
            {"username": "Bob", "message": "Hi Alice!", "timestamp": "2024-10-20T12:31:00Z"},
        ],
    }
    assert response.headers["cache-control"] == "no-store"
    assert house.client().texts() == [body.rstrip("\n")]


@pytest.mark.parametrize("someone_is_there", [False, True])
@pytest.mark.parametrize(
    ("query", "want", "more", "rels"),
    [
        ("", range(5, 13), False, set()),
        ("limit=50", range(5, 13), False, set()),
        ("limit=3", range(10, 13), True, {"prev"}),
        ("limit=8", range(5, 13), False, set()),
        ("limit=0100", range(5, 13), False, set()),
        ("before={9}&limit=2", range(7, 9), True, {"prev", "next"}),
        ("before={9}&limit=4", range(5, 9), False, {"next"}),
        ("before={9}", range(5, 9), False, {"next"}),
        ("before={13}", range(5, 13), False, set()),
        ("before={5}", [], False, {"next"}),
        ("before={3}", [], False, {"next"}),
        ("before={0}", [], False, {"next"}),
        ("after={9}", range(10, 13), False, {"prev"}),
        ("after={9}&limit=2", range(10, 12), True, {"prev", "next"}),
        ("after={12}", [], False, {"prev"}),
        ("after={4}", range(5, 13), False, set()),
        ("after={1}&limit=2", range(5, 7), True, {"next"}),
        ("after={0}", range(5, 13), False, set()),
        ("before=&after=&limit=", range(5, 13), False, set()),
        ("limit=3&limit=1", range(12, 13), True, {"prev"}),
        ("utm_source=mail&label=x&type=typing", range(5, 13), False, set()),
    ],
)
def test_page_content_and_more(someone_is_there, query, want, more, rels):
    """A page has the messages that its query names, and whether more exist."""
    house = House(retain="8")
    member = house.client() if someone_is_there else None
    house.say(*map(str, range(3, 13)))
    assert (member is not None) == bool(len(house.rooms))
    asked = re.sub(r"\{(\d+)\}", lambda found: house.id(found[1]), query)
    response, body = house.get(f"/rooms/main/messages?{asked}".encode())
    document = content((response, body))
    assert said(document) == [str(number) for number in want]
    assert numbers(document) == [*want]
    assert document.get("more", False) is more
    assert ("more" in document) is more
    assert links(response).keys() == rels


@pytest.mark.parametrize("limit", [1, 3, 7, 100])
@pytest.mark.parametrize("someone_is_there", [False, True])
@pytest.mark.parametrize("rel", ["prev", "next"])
def test_links_visit_every_message_once(limit, someone_is_there, rel):
    house = House(history=2)
    member = house.client() if someone_is_there else None
    house.say(*map(str, range(3, 22)))
    url = f"http://chat.example/rooms/main/messages?limit={limit}"
    if rel == "next":
        url += f"&after={house.id(0)}"
    seen = []
    for _ in range(23):
        parts = urlsplit(url)
        response, body = house.get(f"{parts.path}?{parts.query}".encode())
        page = numbers(content((response, body)))
        assert page
        seen = page + seen if rel == "prev" else seen + page
        if rel not in links(response):
            break
        url = urljoin(url, links(response)[rel])
    assert seen == [*range(1, 22)]
    assert (member is not None) == bool(len(house.rooms))


def test_page_of_an_empty_room(house):
    """The page is empty, and reading it creates no room."""
    before = count_held(house.log)
    for path in (b"/rooms/empty/messages", b"/rooms/empty/messages?after=%b-0" % house.epoch.encode()):
        response, body = house.get(path)
        assert content((response, body)) == {"type": "history", "id": house.id(0), "data": []}
        assert links(response) == {}
    assert problem(house.get(f"/rooms/empty/messages/{house.id(1)}".encode()), "UNKNOWN_ID")[0] == 404
    assert house.forgotten
    assert count_held(house.log) == before


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize(
    "text",
    ["5", "-1", "k7Q2xe", "k7Q2xe-", "k7Q2xe-01", "k7Q2xe--1", "abc-1", "k7Q2xe-1x", "k7Q2xe-1%0a", "%C3%A9tat-1"],
)
def test_page_before_or_after_an_invalid_id(house, name, text):
    status, words = problem(house.get(f"/rooms/main/messages?{name}={text}".encode()))
    assert status == 400
    assert words.startswith(f'Validation error: "{name}" fails to match the required pattern: /')


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("0", "must be greater than or equal to 1"),
        ("-1", "must be greater than or equal to 1"),
        ("101", "must be less than or equal to 100"),
        ("999999999999999", "must be less than or equal to 100"),
        ("9" * 20, "must be an integer"),
        ("9" * 5000, "must be an integer"),
        ("many", "must be an integer"),
        ("5.5", "must be an integer"),
        ("5.0", "must be an integer"),
        ("1e2", "must be an integer"),
        ("%205", "must be an integer"),
        ("%D9%A1", "must be an integer"),
        ("true", "must be an integer"),
        ("5%0A", "must be an integer"),
    ],
)
def test_limit_that_is_none_is_refused(house, limit, words):
    asked = house.get(f"/rooms/main/messages?limit={limit}".encode())
    assert problem(asked) == (400, f'Validation error: "limit" {words}')


def test_page_both_before_and_after_is_refused(house):
    asked = house.get(f"/rooms/main/messages?before={house.id(2)}&after={house.id(1)}".encode())
    words = 'Validation error: "value" contains a conflict between optional exclusive peers [before, after]'
    assert problem(asked) == (400, words)


@pytest.mark.parametrize("path", ["messages", "events"])
def test_query_that_is_not_utf_8_is_refused(house, path):
    assert problem(house.get(f"/rooms/main/{path}?limit=%FF".encode())) == (400, "the query is not UTF-8")


@pytest.mark.parametrize("query", ["before={}-4", "after={}-3", "before={}-9999999999999999", "before=Other1-1"])
@pytest.mark.parametrize("someone_is_there", [False, True])
def test_page_at_an_id_that_the_log_never_had_is_404(house, query, someone_is_there):
    member = house.client() if someone_is_there else None
    asked = house.get(f"/rooms/main/messages?{query.format(house.epoch)}".encode())
    assert problem(asked, "UNKNOWN_ID") == (404, "there is no message of this id")
    assert (member is not None) == bool(len(house.rooms))


@pytest.mark.parametrize("rest", ["", "/messages", "/messages/k7Q2xe-1", "/events"])
@pytest.mark.parametrize(
    "name",
    [
        b"",
        b"..",
        b".",
        b"%2e%2e",
        b"main%2fmessages",
        b"%6dain",
        b"Main",
        b"MAIN",
        b"-a",
        b"_a",
        b"a b",
        b"a+b",
        b"a.b",
        b"a" * 65,
        b"\xc3\xa9tat",
        b"%C3%A9tat",
        "m\N{CYRILLIC SMALL LETTER A}in".encode(),
        b"main%00",
        b"main%0a",
        b"main;x",
    ],
)
def test_what_is_no_name_of_a_room_is_404(house, events, name, rest):
    answered = house.get(b"/rooms/" + name + rest.encode())
    if b" " in name or not name.isascii():  # that is no URI
        assert answered[0].status in (400, 404)
    else:
        assert problem(answered)[0] == 404
    assert events == []


@pytest.mark.parametrize(
    "path",
    [
        b"/rooms/",
        b"/rooms//messages",
        b"/rooms/main/",
        b"/rooms/main/messages/",
        b"/rooms/main/messages//",
        b"/rooms/main/messages/a/b",
        b"/rooms/main/message",
        b"/rooms/main/events/",
        b"/rooms/main/eventsx",
        b"/rooms/../healthz",
        b"//",
        b"//messages",
        b"//rooms/main/messages",
        b"/%72ooms/main/messages",
        b"/messages",
        b"/main",
        b"http://chat.example//",
        b"/rooms/main?/messages".replace(b"?", b"%3F"),
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST", b"OPTIONS", b"DELETE"])
def test_what_is_not_there_is_404_and_nothing_is_logged(house, events, method, path):
    response, body = house.ask(method, path)
    if method == b"HEAD":
        assert (response.status, body) == (404, "")
    else:
        assert problem((response, body))[0] == 404
    assert events == []


def test_room_that_the_operator_does_not_have_is_404():
    house = House(rooms=["team-*"])
    assert house.get(b"/rooms/team-1/messages")[0].status == 200
    for path in (b"/", b"/rooms/main", b"/rooms/main/messages", b"/rooms/main/events", b"/rooms/xteam-1/messages"):
        assert problem(house.get(path)) == (404, "there is no room here; connect to / or to /rooms/NAME")
    assert problem(house.post(username="ann", message="hi"))[0] == 404


@pytest.mark.parametrize("path", ["/rooms/main/messages", "/rooms/main/messages/{}-1", "/rooms/main/events"])
def test_page_while_the_log_is_down(house, path):
    """Readers get a 503 with Retry-After."""
    house.log.down = True
    response, body = house.get(path.format(house.epoch).encode())
    assert problem((response, body), "UNAVAILABLE") == (503, "the log cannot be read now")
    assert response.headers["retry-after"] == RETRY
    assert house.forgotten
    house.log.down = False
    assert house.get(b"/rooms/main/messages")[0].status == 200


@pytest.mark.parametrize("why", ["the log is down", "the server stops", "it stops during the load"])
def test_event_source_reconnects(house, why):
    """An EventSource, which gives up on any status but 200, gets an empty stream instead of a 503."""
    connection = house.connect()
    house.log.down, house.log.held = why == "the log is down", why == "it stops during the load"
    if why == "the server stops":
        house.drain()
    connection.begin(b"GET", b"/rooms/main/events", b"Accept: text/event-stream")
    if house.log.held:
        house.drain()
        house.log.release()
    response, body = connection.response()
    assert (response.status, body) == (200, f"retry: {RETRY}000\n\n")
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["content-length"] == str(len(body))
    connection.lose()
    assert house.forgotten


def test_only_event_streams_reconnect(house):
    """A page of the log is a 503 whatever the client accepts, and a missing room is a 404."""
    house.log.down = True
    accept = b"Accept: text/event-stream"
    assert house.get(b"/rooms/main/messages", accept)[0].status == 503
    assert house.get(b"/rooms/-/events", accept)[0].status == 404


def test_client_leaves_during_a_page_read(house):
    """Nothing is written to a client that has disconnected."""
    house.log.held = True
    connection = house.connect()
    connection.begin(b"GET", b"/rooms/main/messages")
    connection.lose()
    house.log.release()
    assert connection.transport.value() == b""


# One message


def test_post_returns_the_location_of_the_message(house):
    house.say("hi")
    response, body = house.post(username="ann", message="\N{SNOWMAN} <b>", label="c1")
    assert content((response, body), 201) == {"type": "ack", "label": "c1", "id": house.id(4)}
    location = response.headers["location"]
    assert location == f"messages/{house.id(4)}"
    location = f"/rooms/main/{location}"
    assert content(house.get(location.encode())) == {
        "type": "message",
        "id": house.id(4),
        "data": {"username": "ann", "message": "\N{SNOWMAN} <b>", "timestamp": "2026-01-01T00:00:00.000Z"},
    }
    assert content(house.get(location.encode() + b"?before=nonsense"))["id"] == house.id(4)


@pytest.mark.parametrize("someone_is_there", [False, True])
@pytest.mark.parametrize("message", ["{}-0", "{}-13", "{}-14", "{}-9999999999999999", "{}-4", "{}-1", "Other1-12"])
def test_message_that_is_not_in_the_log_is_404(someone_is_there, message):
    house = House(retain="8")
    member = house.client() if someone_is_there else None
    house.say(*map(str, range(3, 13)))
    house.turn()
    asked = house.get(f"/rooms/main/messages/{message.format(house.epoch)}".encode())
    assert problem(asked, "UNKNOWN_ID") == (404, "there is no message of this id")
    for number in (5, 12):
        kept = content(house.get(f"/rooms/main/messages/{house.id(number)}".encode()))
        assert kept["data"]["message"] == str(number)
    assert (member is not None) == bool(len(house.rooms))


@pytest.mark.parametrize("message", ["1", "k7Q2xe", "k7Q2xe-01", "k7Q2xe-1%20", "..", "%2e%2e", "k7Q2xe-1%0a"])
def test_address_that_names_no_id_is_404(house, message):
    asked = house.get(f"/rooms/main/messages/{message}".encode())
    assert problem(asked, "UNKNOWN_ID") == (404, "an id is an epoch and a number, such as k7Q2xe-1042")


# Posting


def test_post_is_acknowledged_once_stored(house):
    """The answer has the id of the stored message."""
    house.log.held = True
    connection = house.connect()
    connection.begin(b"POST", b"/rooms/team-1/messages", JSON, body=b'{"username":"ann","message":"hi"}')
    assert connection.transport.value() == b""
    house.log.release()
    response, body = connection.response()
    assert content((response, body), 201) == {"type": "ack", "id": house.id(1)}
    assert response.headers["location"] == f"messages/{house.id(1)}"
    assert said(content(house.get(b"/rooms/team-1/messages"))) == ["hi"]
    assert house.forgotten


def test_post_of_a_disconnected_client(house):
    """The post of a client that disconnected is stored."""
    house.log.held = True
    connection = house.connect()
    connection.begin(b"POST", b"/rooms/main/messages", JSON, body=b'{"username":"ann","message":"hi"}')
    connection.lose()
    house.log.release()
    assert connection.transport.value() == b""
    assert said(content(house.get(b"/rooms/main/messages")))[-1] == "hi"


@pytest.mark.parametrize(
    ("key", "label"),
    [
        (b'"c81f"', "c81f"),
        (b"c81f", "c81f"),
        (b' "c81f" ', "c81f"),
        (rb'"a\"b\\c"', r'a"b\c'),
        (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (b'"' + b"x" * 64 + b'"', "x" * 64),
        (b"x" * 64, "x" * 64),
        (b'"half', '"half'),
        (b'half"', 'half"'),
    ],
)
def test_idempotency_key_is_the_label(house, key, label):
    first = house.post(b"Idempotency-Key: " + key, username="ann", message="hi")
    assert content(first, 201) == {"type": "ack", "label": label, "id": house.id(3)}
    for again in (
        house.post(b"Idempotency-Key: " + key, username="ann", message="hi"),
        house.post(b"Idempotency-Key: " + key, username="ann", message="hi", label=label),
        house.post(username="ann", message="hi", label=label),
    ):
        assert content(again) == {"type": "ack", "label": label, "id": house.id(3), "duplicate": True}
        assert again[0].headers["location"] == first[0].headers["location"]
    assert said(content(house.get(b"/rooms/main/messages"))) == ["Hello!", "Hi Alice!", "hi"]


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b'""',
        b'"a b"',
        b"a b",
        b"x" * 65,
        b'"' + b"x" * 65 + b'"',
        "é".encode(),
        '"é"'.encode(),
        b"a\tb",
        rb'"a\ b"',
    ],
)
def test_idempotency_key_that_is_no_label_is_refused(house, key):
    refused = house.post(b"Idempotency-Key: " + key, username="ann", message="hi")
    assert problem(refused) == (400, "Idempotency-Key: 1 to 64 visible ASCII characters")
    assert numbers(content(house.get(b"/rooms/main/messages"))) == [1, 2]


def test_key_and_a_label_that_differ_are_refused(house):
    refused = house.post(b"Idempotency-Key: a", username="ann", message="hi", label="b")
    assert problem(refused) == (400, 'Idempotency-Key and "label" differ')


def test_reused_key(house):
    """A reused key is a 422; each user has keys of its own in each room."""
    key = b'Idempotency-Key: "a"'
    assert house.post(key, username="ann", message="hi")[0].status == 201
    refused = house.post(key, username="ann", message="ho")
    assert problem(refused, "LABEL_REUSED") == (422, "Idempotency-Key: it was given to another message")
    assert house.post(key, username="bob", message="ho")[0].status == 201
    assert house.post(key, username="ann", message="ho", path=b"/rooms/other/messages")[0].status == 201
    assert content(house.post(key, username="ann", message="hi"))["id"] == house.id(3)


REFUSED = {
    b"": "Invalid JSON format.",
    b"hello": "Invalid JSON format.",
    b'{"username":"ann","message":"hi"': "Invalid JSON format.",
    b'{"username":"ann","message":NaN}': "Invalid JSON format.",
    rb'{"username":"ann","message":"\ud800"}': "Invalid JSON format.",
    b'{"username":"ann","message":"\xff"}': "Invalid JSON format.",
    b'\xef\xbb\xbf{"username":"ann","message":"hi"}': "Invalid JSON format.",
    '{"username":"ann","message":"hi"}'.encode("utf-16"): "Invalid JSON format.",
    b"[" * 9000: "Invalid JSON format.",
    b"[]": 'Validation error: "value" must be of type object',
    b"null": 'Validation error: "value" must be of type object',
    b"{}": 'Validation error: "username" is required',
    b'{"username":"ann"}': 'Validation error: "message" is required',
    b'{"username":"","message":"hi"}': 'Validation error: "username" is not allowed to be empty',
    b'{"username":"ann","message":1}': 'Validation error: "message" must be a string',
    b'{"username":"ann","message":"%b"}' % (b"x" * 501): (
        'Validation error: "message" length must be less than or equal to 500 characters long'
    ),
    b'{"username":"%b","message":"hi"}' % (b"x" * 31): (
        'Validation error: "username" length must be less than or equal to 30 characters long'
    ),
    b'{"username":"ann","message":"hi","extra":1}': 'Validation error: "extra" is not allowed',
    b'{"username":"ann","message":"hi","type":"message"}': 'Validation error: "type" is not allowed',
    b'{"type":"typing","username":"ann"}': 'Validation error: "message" is required',
    b'{"type":"history"}': 'Validation error: "username" is required',
}


@pytest.mark.parametrize("body", REFUSED)
def test_invalid_post_gets_the_words_of_websocket(house, body):
    asked = house.ask(b"POST", b"/rooms/main/messages", JSON, b"Idempotency-Key: a", body=body)
    assert problem(asked) == (400, REFUSED[body])
    assert numbers(content(house.get(b"/rooms/main/messages"))) == [1, 2]
    member = house.client()
    member.read()
    if b"type" not in body and body.isascii():  # over WebSocket a type says what a frame is, and bytes must be UTF-8
        member.send(masked(body))
        (error,) = member.read()
        assert (error["type"], error["message"]) == ("error", REFUSED[body])
    assert house.post(b"Idempotency-Key: a", username="ann", message="hi")[0].status == 201, "the key is free"


def test_longest_message_fully_escaped(house):
    """The largest valid message is accepted when every character is escaped."""
    body = json.dumps({"username": "\N{GRINNING FACE}" * 30, "message": "\N{GRINNING FACE}" * 500}).encode()
    assert len(body) > 6000
    assert house.ask(b"POST", b"/rooms/main/messages", JSON, body=body)[0].status == 201


@pytest.mark.parametrize(
    "kind",
    [
        None,
        b"Content-Type:",
        b"Content-Type: text/plain",
        b"Content-Type: text/plain; x=application/json",
        b"Content-Type: text/json",
        b"Content-Type: application/json-seq",
        b"Content-Type: application/x-www-form-urlencoded",
        b"Content-Type: multipart/form-data; boundary=x",
        b"Content-Type: multipart/form-data",
        b"Content-Type: */*",
    ],
)
def test_what_a_form_can_send_or_is_no_json_is_415(house, kind):
    assert problem(house.post(kind=kind, username="ann", message="hi")) == (415, "send application/json")


@pytest.mark.parametrize("coding", [b"gzip", b"GZIP", b"identity, gzip", b"br"])
def test_compressed_post_is_415(house, coding):
    """The answer names the accepted coding (RFC 9110, section 15.5.16)."""
    answered = house.post(b"Content-Encoding: " + coding, username="ann", message="hi")
    assert problem(answered) == (415, "send it without Content-Encoding")
    assert answered[0].headers["accept-encoding"] == "identity"


def test_post_of_the_coding_identity(house):
    assert house.post(b"Content-Encoding: Identity", username="ann", message="hi")[0].status == 201


# Clients that finish sending before they read, as `nc -N` does


def finish(connection):
    """Half-close a connection, as a client does."""
    connection.channel.readConnectionLost()


def test_half_closed_client_gets_its_answer(house):
    """The answer to a post is sent when it is stored, and then the connection closes."""
    connection = house.connect()
    house.log.held = True
    connection.begin(b"GET", b"/rooms/main/messages")
    assert IHalfCloseableProtocol.providedBy(connection.channel)
    finish(connection)
    assert not connection.closing
    house.log.release()
    assert numbers(content(connection.response())) == [1, 2]
    assert connection.closing
    connection.channel.writeConnectionLost()  # the server never half-closes


def test_half_closed_client_gets_all_answers(house):
    """Pipelined requests are answered too."""
    connection = house.connect()
    house.log.held = True
    for _ in range(2):
        connection.begin(b"GET", b"/rooms/main/messages")
    connection.begin(b"GET", b"/healthz")
    finish(connection)
    house.log.release()
    assert not connection.closing
    house.clock.turns()
    assert connection.transport.value().count(b"HTTP/1.1 200 OK\r\n") == 3
    assert connection.closing


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_half_closed_client_that_waits_for_nothing(house, begun):
    """A connection without a whole request closes at once."""
    connection = house.connect()
    connection.send(begun)
    finish(connection)
    assert connection.closing


@pytest.mark.parametrize("held", [True, False])
def test_half_closed_reader_of_events(house, held):
    """It gets the history, and then the connection closes, because readers close so too."""
    house.log.held = held
    connection = house.connect()
    stream = Stream(connection, b"/rooms/main/events")
    finish(connection)
    if held:
        assert not connection.closing
        house.log.release()
    (history,) = stream.read()
    assert numbers(history.json) == [1, 2]
    assert connection.closing
    connection.lose()
    assert house.forgotten
    assert numbers(content(house.get(b"/rooms/main/messages"))) == [1, 2]


@pytest.mark.parametrize(
    "kind",
    [
        b"application/json; charset=utf-8",
        b"application/json;charset=UTF-8",
        b"Application/JSON",
        b"application/json ;x",
    ],
)
def test_media_type_with_parameters(house, kind):
    """A media type may have parameters and is case-insensitive."""
    assert house.post(kind=b"Content-Type: " + kind, username="ann", message="hi")[0].status == 201


def test_body_too_large_or_without_length(house):
    """A body that is too large is a 413; one without a length is a 411."""
    for length, status in ((b"Content-Length: 16385", 413), (b"Transfer-Encoding: chunked", 411)):
        assert problem(house.ask(b"POST", b"/rooms/main/messages", JSON, length))[0] == status
    padded = b'{"username":"ann","message":"hi"}'.ljust(MAX_MESSAGE)
    assert house.ask(b"POST", b"/rooms/main/messages", JSON, body=padded)[0].status == 201


def test_large_body_stays_in_memory(house, monkeypatch):
    """Where an operator allows long messages, no body is written to the disk, as Twisted does from 100 KB on."""
    monkeypatch.setattr("twisted.web.http.tempfile.TemporaryFile", None)
    house.site.intake.vocabulary = Vocabulary()
    house.site.intake.vocabulary.use(MESSAGE, 104 << 10)
    padded = b'{"username":"ann","message":"hi"}'.ljust(104 << 10)
    assert house.ask(b"POST", b"/rooms/main/messages", JSON, body=padded)[0].status == 201


def test_post_to_no_room_is_404(house):
    for path in (b"/rooms/Main/messages", b"/rooms//messages", b"/messages"):
        assert problem(house.post(path=path, username="ann", message="hi"))[0] == 404


def test_post_while_the_log_is_down(house):
    """The post is refused, and its key may be used again."""
    key = b'Idempotency-Key: "a"'
    house.log.down = True
    response, body = house.post(key, username="ann", message="hi")
    assert problem((response, body), "UNAVAILABLE") == (503, "the message was not stored; try again")
    assert response.headers["retry-after"] == RETRY
    house.log.down = False
    assert content(house.post(key, username="ann", message="hi"), 201)["id"] == house.id(3)
    assert content(house.post(key, username="ann", message="hi"))["duplicate"] is True


def test_post_in_doubt(house):
    """A post in doubt may be stored, and a retry with its key finds out."""
    kept = []
    house.log.append, append = lambda *said: kept.append(said), house.log.append
    key = b'Idempotency-Key: "a"'
    connection = house.connect()
    body = json.dumps({"username": "ann", "message": "hi"}).encode()
    connection.begin(b"POST", b"/rooms/main/messages", b"Host: x", JSON, key, body=body)
    ((room, said, poster),) = kept
    append(room, said, RecordingPoster())
    assert connection.transport.value() == b""
    poster.refused(said, InDoubt("the disk has not answered"))
    response, body = connection.response()
    assert problem((response, body), "UNAVAILABLE") == (
        503,
        "the message may not have been stored; try again with the same key",
    )
    assert response.headers["retry-after"] == RETRY
    house.log.append = append
    assert content(house.post(key, username="ann", message="hi")) == {
        "type": "ack",
        "label": "a",
        "id": house.id(3),
        "duplicate": True,
    }


def from_address(host, *forwarded):
    """Return a transport from an address, and the headers that proxies added."""
    headers = [b"X-Forwarded-For: " + addresses for addresses in forwarded]
    return Transport(peerAddress=IPv4Address("TCP", host, 1)), headers


def statuses(house, *senders):
    answered = []
    for host, *forwarded in senders:
        transport, headers = from_address(host, *forwarded)
        answered.append(house.post(*headers, transport=transport, username="ann", message="hi")[0].status)
    return answered


def test_posts_are_limited_by_address():
    """The answer to a limited post has Retry-After."""
    house = House(rate=(0.5, 2))
    assert statuses(house, *[("10.0.0.1",)] * 3, ("10.0.0.2",)) == [201, 201, 429, 201]
    response, body = house.post(transport=from_address("10.0.0.1")[0], username="ann", message="hi")
    assert problem((response, body), "RATE_LIMITED") == (429, "Rate limit exceeded")
    assert response.headers["retry-after"] == "2"
    house.clock.advance(0.9)
    response, _ = house.post(transport=from_address("10.0.0.1")[0], username="ann", message="hi")
    assert (response.status, response.headers["retry-after"]) == (429, "2")
    house.clock.advance(int(response.headers["retry-after"]))
    assert statuses(house, *[("10.0.0.1",)] * 2) == [201, 429]
    assert numbers(content(house.get(b"/rooms/main/messages")))[-1] == 6, "what is refused is not in the log"


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("path", [b"/", b"/rooms/main", b"/rooms/main/messages", b"/rooms/main/messages/{epoch}-1"])
def test_reads_are_limited_by_address(method, path):
    """Reads have a limit of their own, which leaves the posts alone; 429 has Retry-After."""
    house = House(rate=(0.5, 2))

    def ask(host):
        target = path.replace(b"{epoch}", house.epoch.encode())
        return house.ask(method, target, transport=from_address(host)[0])[0]

    assert statuses(house, ("10.0.0.1",), ("10.0.0.1",), ("10.0.0.1",)) == [201, 201, 429]
    assert [ask(host).status for host in ("10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2")] == [200, 200, 429, 200]
    assert ask("10.0.0.1").headers["retry-after"] == "2"
    house.clock.advance(2)
    assert [ask("10.0.0.1").status for _ in range(2)] == [200, 429]


def test_refused_reads_slow_their_connection_down():
    """Reads within the rate of the address are free; those above it cost the connection a token each."""
    house = House(rate=(1, 2))
    connection = house.connect()
    connection.send(b"GET /rooms/main/messages HTTP/1.1\r\nHost: x\r\n\r\n" * 9)
    house.clock.turns()
    data = connection.transport.value()
    assert (data.count(b"HTTP/1.1 200 "), data.count(b"HTTP/1.1 429 ")) == (2, 3)
    assert house.site.intake.throttles["http"] == 1


def test_streams_and_preflights_are_not_limited():
    """A browser never repeats a stream that was refused, and a stream costs as little as a WebSocket."""
    house = House(rate=(1, 1))
    statuses = []
    for _ in range(3):
        statuses.append(house.get(b"/rooms/main/messages")[0].status)
        assert house.ask(b"OPTIONS", b"/rooms/main/messages")[0].status == 204
        stream = house.stream()
        stream.read()
        assert stream.status == 200
    assert statuses == [200, 429, 429]


def test_what_is_refused_costs_as_much():
    house = House(rate=(1, 2))
    for _ in range(2):
        assert house.post(username="ann")[0].status == 400
    assert house.post(username="ann", message="hi")[0].status == 429


@pytest.mark.parametrize(
    ("hops", "senders", "want"),
    [
        (0, [("10.0.0.1", b"1.1.1.1"), ("10.0.0.1", b"2.2.2.2")], [201, 429]),
        (1, [("10.0.0.1", b"1.1.1.1"), ("10.0.0.1", b"2.2.2.2")], [201, 201]),
        (1, [("10.0.0.1", b"1.1.1.1"), ("10.0.0.2", b"1.1.1.1")], [201, 429]),
        (1, [("10.0.0.1", b"9.9.9.9, 1.1.1.1"), ("10.0.0.1", b"8.8.8.8,1.1.1.1")], [201, 429]),
        (2, [("10.0.0.1", b"1.1.1.1, 10.0.0.9"), ("10.0.0.1", b"2.2.2.2, 10.0.0.9")], [201, 201]),
        (1, [("10.0.0.1",), ("10.0.0.1", b"1.1.1.1"), ("10.0.0.1",)], [201, 201, 429]),
        # Several lines of a header are one list (RFC 9110, section 5.3).
        (2, [("10.0.0.1", b"1.1.1.1", b"10.0.0.9"), ("10.0.0.1", b"2.2.2.2", b"10.0.0.9")], [201, 201]),
        (1, [("10.0.0.1", b"9.9.9.9", b"1.1.1.1"), ("10.0.0.1", b"8.8.8.8", b"1.1.1.1")], [201, 429]),
    ],
)
def test_address_behind_trusted_proxies(hops, senders, want):
    """The address is the one that the first trusted proxy saw."""
    assert statuses(House(rate=(1, 1), hops=hops), *senders) == want


def test_unix_socket_is_one_address():
    house = House(rate=(1, 1))
    for status in (201, 429):
        transport = Transport(peerAddress=UNIXAddress(None))
        assert house.post(transport=transport, username="ann", message="hi")[0].status == status


def test_post_reaches_all_transports(house):
    """All members get one id, and labels are shared between the transports."""
    member, reader = house.client(), house.stream()
    member.read(), reader.read()
    document = content(house.post(b'Idempotency-Key: "a"', username="ann", message="hi"), 201)
    house.turn()
    (frame,), (event,) = member.read(), reader.read()
    assert frame == event.json == content(house.get(f"/rooms/main/messages/{document['id']}".encode()))
    assert frame["id"] == event.id == document["id"] == house.id(3)

    member.say(username="ann", message="hi", label="a")
    house.turn()
    assert member.read() == [document | {"duplicate": True}]
    member.say(username="ann", message="ho", label="a")
    assert member.read()[0]["code"] == "LABEL_REUSED"
    member.say(username="ann", message="ho", label="b")
    house.turn()
    assert [frame["type"] for frame in member.read()] == ["message", "ack"]
    duplicate = content(house.post(b"Idempotency-Key: b", username="ann", message="ho"))
    assert (duplicate["id"], duplicate["duplicate"]) == (house.id(4), True)
    assert [event.id for event in reader.read()] == [house.id(4)]


# Events


def test_stream_begins_with_retry_and_history(house):
    """A stream has the retry time, the history and then the messages."""
    stream = house.stream()
    (history,) = stream.read()
    assert stream.status == 200
    assert stream.retries == [http.RETRY_AFTER_SECONDS * 1000]
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-store"
    assert stream.headers["x-accel-buffering"] == "no"
    assert stream.headers["server"] == http.SERVER
    assert "content-length" not in stream.headers
    assert (history.kind, history.id) == ("history", house.id(2))
    house.say("hi", "ho")
    house.turn()
    assert [(event.kind, event.id) for event in stream.read()] == [("message", house.id(3)), ("message", house.id(4))]
    assert stream.last == house.id(4)
    assert not stream.ended
    assert stream.retries == [http.RETRY_AFTER_SECONDS * 1000]


def test_first_bytes_of_a_stream_are_the_retry(house):
    connection = house.connect()
    connection.begin(b"GET", b"/rooms/empty/events", version=b"1.0")
    body = connection.transport.value().partition(b"\r\n\r\n")[2]
    history = f'{{"type":"history","id":"{house.id(0)}","data":[]}}'
    assert body.decode() == f"retry: 2000\n\nevent: history\nid: {house.id(0)}\ndata: {history}\n\n"


@pytest.mark.parametrize("query", ["", "?last_event_id={}-1", "?last_event_id=Other1-1", "?last_event_id={}-9"])
def test_event_data_equals_the_websocket_text(query):
    house = House(history=2)
    house.say("\N{SNOWMAN}\n\r\n\u2028\u2029\0 data: x", "</script>")
    query = query.format(house.epoch)
    member, stream = (
        house.client("/rooms/main" + query),
        house.stream(f"/rooms/main/events{query}".encode()),
    )
    house.say("x" * 500, *"abc")
    house.turn()
    texts = member.texts()
    assert [event.text for event in stream.read()] == texts
    assert [event.kind for event in stream.events] == [json.loads(text)["type"] for text in texts]
    assert [event.id for event in stream.events] == [json.loads(text)["id"] for text in texts]


@pytest.mark.parametrize("someone_is_there", [False, True])
@pytest.mark.parametrize("how", ["header", "query", "both"])
@pytest.mark.parametrize("last", [0, 1, 4, 7, 8, 9])
def test_stream_resumes_from_its_last_id(someone_is_there, how, last):
    """A reader that reconnects gets every missed message once."""
    house = House(history=3)
    member = house.client() if someone_is_there else None
    house.say(*map(str, range(3, 10)))
    given = house.id(last).encode()
    stream = {
        "header": lambda: house.stream(b"/rooms/main/events", b"Last-Event-ID: " + given),
        "query": lambda: house.stream(b"/rooms/main/events?last_event_id=" + given),
        # A page's URL says where it was when it was written, and its browser where it is.
        "both": lambda: house.stream(b"/rooms/main/events?last_event_id=Other1-1", b"Last-Event-ID: " + given),
    }[how]()
    house.say("10")
    house.turn()
    history, *messages = stream.read()
    assert history.json["resumed"] is True
    assert "more" not in history.json
    assert len(history.json["data"]) == min(3, 9 - last), "at most a history, the oldest of what was missed"
    assert [event.kind for event in messages] == ["message"] * len(messages)
    seen = numbers(history.json) + [int(event.id.partition("-")[2]) for event in messages]
    assert seen == [*range(last + 1, 11)]
    assert history.id == house.id(min(last + 3, 9))
    assert (member is None) or member.read()


@pytest.mark.parametrize("last", ["Other1-1", "{}-3", "{}-9999999999999999"])
def test_stream_resume_from_unknown_id(house, last):
    """A reader with an unknown id starts over, and its history frame has resumed:false."""
    stream = house.stream(b"/rooms/main/events", b"Last-Event-ID: " + last.format(house.epoch).encode())
    (history,) = stream.read()
    assert history.json["resumed"] is False
    assert history.id == house.id(2)
    assert said(history.json) == ["Hello!", "Hi Alice!"]


def test_stream_resume_too_far_back():
    """A reader that missed trimmed or too many messages starts over."""
    house = House(retain="5", history=2)
    house.say(*map(str, range(3, 11)))
    for last, resumed in ((4, False), (5, True)):
        (history,) = house.stream(f"/rooms/main/events?last_event_id={house.id(last)}".encode()).read()[:1]
        assert history.json["resumed"] is resumed


@pytest.mark.parametrize("last", ["1", "k7Q2xe", "k7Q2xe-01", "null", "é", "k7Q2xe-1 k7Q2xe-2"])
@pytest.mark.parametrize("how", ["header", "query"])
def test_last_id_that_is_none_is_refused(house, how, last):
    if how == "header":
        asked = house.get(b"/rooms/main/events", b"Last-Event-ID: " + last.encode())
    else:
        asked = house.get(f"/rooms/main/events?last_event_id={quote(last)}".encode())
    assert problem(asked) == (400, "last_event_id: an id is an epoch and a number, such as k7Q2xe-1042")
    assert house.forgotten


@pytest.mark.parametrize("header", [b"Last-Event-ID:", b"Last-Event-ID: ", b"X: y"])
def test_empty_last_id_is_none(house, header):
    (history,) = house.stream(b"/rooms/main/events?last_event_id=", header).read()
    assert "resumed" not in history.json


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("events=messages", "events: choose of presence, typing"),
        ("events=presence,", "events: choose of presence, typing"),
        ("username=" + "x" * 31, "username: 1 to 30 characters"),
    ],
)
def test_what_cannot_be_asked_of_a_stream_is_refused(house, query, words):
    assert problem(house.get(f"/rooms/main/events?{query}".encode())) == (400, words)


def test_presence_and_typing_events_have_no_id(house):
    stream = house.stream(b"/rooms/main/events?events=presence,typing&username=eve")
    other = house.stream(b"/rooms/main/events?username=dee")
    member = house.client()
    house.turn()
    assert [event.kind for event in other.read()] == ["history"]
    history, presence = stream.read()
    assert (history.kind, presence.kind) == ("history", "presence")
    assert presence.json["data"] == {"count": 3, "users": ["dee", "eve"]}
    assert presence.id == history.id, "it has none of its own"
    member.say(type="typing", username="ann")
    member.say(username="ann", message="hi")
    house.pass_time(1)
    assert [event.kind for event in stream.read()] == ["message", "presence", "typing"]
    message, presence, typing = stream.events[-3:]
    assert presence.json["data"] == {"count": 3, "join": ["ann"], "leave": []}
    assert typing.json["data"] == {"users": ["ann"]}
    assert presence.id == typing.id == message.id
    other.connection.lose()
    house.pass_time(1)
    assert [event.json["data"] for event in stream.read()] == [{"count": 2, "join": [], "leave": ["dee"]}]
    assert "presence" not in [event.kind for event in other.read()]


def test_http_posters_are_not_present(house):
    stream = house.stream(b"/rooms/main/events?events=presence")
    house.turn()
    stream.read()
    house.post(username="ann", message="hi")
    house.pass_time(2)
    assert [event.kind for event in stream.read()] == ["message"]


def test_quiet_stream_is_pinged_with_comments(house):
    stream = house.stream()
    stream.read()
    for count in range(4):
        house.pass_time(PING_SECONDS - 1)
        assert stream.read() == []
        assert stream.comments == count
        house.pass_time(1)
        assert stream.read() == []
        assert stream.comments == count + 1
    assert not stream.connection.closing, "a stream has no deadline"


def full(stream):
    """Fill the transport of a stream: it pauses its producer and takes no more."""
    stream.transport.producer.pauseProducing()


def empty(stream):
    stream.transport.producer.resumeProducing()


def test_full_stream_catches_up(house):
    """A full transport gets nothing, and then every missed message."""
    stream = house.stream(b"/rooms/main/events?events=presence,typing")
    house.turn()
    stream.read()
    full(stream)
    house.say(*"abcd")
    house.client()
    house.pass_time(PING_SECONDS)
    assert stream.transport.value() == b"", "neither messages nor presence nor pings"
    empty(stream)
    house.turn()
    assert [event.json["data"]["message"] for event in stream.read() if event.kind == "message"] == [*"abcd"]
    house.say("e")
    house.pass_time(2 * STALL_SECONDS)
    assert [event.id for event in stream.read() if event.kind == "message"] == [house.id(7)]
    assert not stream.connection.closing


def test_reader_that_is_slow_from_the_first_byte_loses_nothing(house):
    class Full(Transport):
        """A transport that is full after any write."""

        def writeSequence(self, data):
            super().writeSequence(data)
            self.producer.pauseProducing()

    stream = Stream(house.connect(Full()), b"/rooms/main/events")
    house.say(*"abc")
    house.turn()
    assert [event.kind for event in stream.read()] == ["history"]
    for _ in range(5):
        empty(stream)
        house.turn()
    assert [event.json["data"]["message"] for event in stream.read()] == [*"abc"]


def test_full_stream_is_refilled_from_the_log(house):
    """A reader that the tail overran gets the missed messages from the log."""
    stream = house.stream()
    stream.read()
    full(stream)
    house.say(*["x" * 500] * (MAX_LAG - 3))
    (room,) = house.rooms
    assert room.held[0] < room.head - 2
    empty(stream)
    house.turn()
    assert [event.id for event in stream.read()] == [house.id(number) for number in range(3, MAX_LAG)]
    assert not stream.ended


def test_stalled_stream_is_evicted_then_dropped(house, events):
    stream = house.stream()
    stream.read()
    full(stream)
    house.say("missed")
    house.pass_time(STALL_SECONDS - 1)
    assert stream.transport.value() == b""
    assert not stream.connection.closing
    house.pass_time(1)
    stream.read()
    assert stream.ended
    assert stream.retries[1:] == [0]
    assert stream.connection.closing
    assert not stream.transport.disconnected
    assert len(house.rooms) == 0, "it is no member any more"
    house.pass_time(STALL_SECONDS - 1)
    assert not stream.transport.disconnected
    house.pass_time(1)
    assert stream.transport.disconnected
    assert house.forgotten
    assert [event for event in events if event.get("log_failure") or event["log_level"].name == "error"] == []

    back = house.stream(f"/rooms/main/events?last_event_id={stream.last}".encode())
    (history,) = back.read()
    assert (history.json["resumed"], said(history.json)) == (True, ["missed"])


def test_evicted_stream_that_reads_again(house):
    """An evicted reader that reads again gets nothing more and ends."""
    stream = house.stream()
    full(stream)
    house.pass_time(STALL_SECONDS)
    house.say("missed")
    house.turn()
    assert [event.kind for event in stream.read()] == ["history"]
    assert stream.ended
    stream.connection.lose()
    assert house.forgotten


def test_stream_ends_once(house):
    stream = house.stream()
    full(stream)
    house.pass_time(STALL_SECONDS)
    stream.read()
    house.drain()
    assert stream.transport.value() == b""
    stream.connection.lose()
    assert house.forgotten


def test_resume_after_the_end_of_a_stream(house):
    """A transport that resumes after the end of its stream gets nothing."""
    stream = house.stream()
    full(stream)
    stream.connection.lose()
    empty(stream)
    assert house.forgotten


def evict(house, stream):
    """Fail the log just when a reader needs it to catch up."""
    full(stream)
    house.say(*["x" * 500] * (MAX_LAG - 3))
    assert any(room.held[0] < room.head - 2 for room in house.rooms), "so that the log is needed"
    house.log.down = True
    empty(stream)
    house.turn()
    house.log.down = False


def test_evicted_stream_may_reconnect_at_once(house):
    stream = house.stream()
    stream.read()
    evict(house, stream)
    assert stream.read() == []
    assert stream.ended
    assert stream.retries[1:] == [0]
    assert stream.connection.closing
    stream.connection.lose()
    assert house.forgotten


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_ended_stream_held_open_is_dropped(house, version):
    """A stream whose reader does not close it gets nothing more and is dropped."""
    # Its last bytes stay in the transport's buffer, which is not so full that it would stall.
    stream = house.stream(version=version)
    other = house.stream(b"/rooms/other/events")
    house.pass_time(PING_SECONDS - 1)
    evict(house, stream)
    stream.read()
    other.read()
    comments = other.comments
    house.pass_time(2 * PING_SECONDS)
    assert stream.transport.value() == b""
    other.read()
    assert other.comments == comments + 2, "others are pinged all the same"
    house.pass_time(2 * STALL_SECONDS)
    assert stream.transport.disconnected
    assert len(house.connections.connected) == 1


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_drain_ends_a_stream_with_its_time_to_come_back(house, version):
    moments = [(0, 0), (0.0004, 0), (0.25, 250), (0.9999, 999), (9.75, 9750)]
    for seconds, retry in moments:
        stream = house.stream(version=version)
        stream.read()
        (client,) = house.connections.connected
        gone = house.connections.empty()
        client.restart(seconds)
        assert stream.read() == []
        assert stream.ended or version == b"1.0"
        assert stream.connection.closing
        assert stream.retries == [http.RETRY_AFTER_SECONDS * 1000, retry]
        assert not gone.called
        stream.connection.lose()
        assert gone.called
    assert house.connections.closes == {("events", 1012): len(moments)}
    assert house.forgotten


def test_pending_messages_of_a_stalled_stream(house):
    """Messages are pending until they are sent, also while the transport is full."""
    stream = house.stream()
    (client,) = (each.member for each in house.connections.connected)
    assert (client.head, client.has_pending(2)) == (2, False)
    house.say("hi")
    assert (client.head, client.has_pending(3)) == (3, True)
    house.turn()
    assert not client.has_pending(3)
    full(stream)
    house.say("ho")
    house.turn()
    assert client.has_pending(client.head)
    empty(stream)
    assert client.has_pending(client.head)
    house.turn()
    assert not client.has_pending(client.head)
    stream.connection.lose()
    assert (client.head, client.has_pending(4)) == (0, False)


def test_stream_that_is_read_no_more_goes_on(house):
    stream = house.stream()
    stream.read()
    (client,) = house.connections.connected
    client.finish()
    house.say("hi")
    house.turn()
    assert [event.json["data"]["message"] for event in stream.read()] == ["hi"]


def test_drain_leaves_none_behind_that_does_not_go(house, events):
    stream, slow = house.stream(), house.stream()
    full(slow)
    house.drain()
    house.pass_time(6)
    assert stream.transport.disconnected
    assert slow.transport.disconnected
    assert house.forgotten
    assert [event for event in events if event.get("log_failure")] == []


def test_stream_resumes_after_a_drain(house):
    stream = house.stream()
    house.say("hi")
    house.turn()
    stream.read()
    house.drain()
    stream.connection.lose()
    house.connections.stopping = False  # the next server on the same log
    house.say("ho")
    (history,) = house.stream(b"/rooms/main/events", b"Last-Event-ID: " + stream.last.encode()).read()
    assert (history.json["resumed"], said(history.json)) == (True, ["ho"])


def test_ended_at_once_by_the_operators_last_word(house):
    stream = house.stream()
    house.connections.abort()
    assert stream.transport.disconnected
    assert house.forgotten


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (b"GET", b"/"),
        (b"GET", b"/rooms/main/messages"),
        (b"GET", b"/rooms/main/events"),
        (b"POST", b"/rooms/main/messages"),
    ],
)
def test_while_the_server_stops_all_is_503(house, method, path):
    house.drain()
    response, body = house.ask(method, path)
    assert problem((response, body), "UNAVAILABLE") == (503, "the server is about to stop")
    assert response.headers["retry-after"] == RETRY


def test_stop_during_the_load_of_a_room(house):
    """A stream whose room is being loaded when the server stops is a 503."""
    house.log.held = True
    connection = house.connect()
    connection.begin(b"GET", b"/rooms/main/events")
    house.drain()
    house.log.release()
    response, body = connection.response()
    assert problem((response, body), "UNAVAILABLE")[0] == 503
    assert response.headers["retry-after"] == RETRY
    connection.lose()
    assert house.forgotten


def test_reader_leaves_during_the_load_of_a_room(house, events):
    """Neither the reader nor the room remains."""
    house.log.held = True
    connection = house.connect()
    connection.begin(b"GET", b"/rooms/main/events")
    connection.lose()
    house.log.release()
    gc.collect()
    assert events == []
    assert connection.transport.value() == b""
    assert house.forgotten


def test_posts_during_the_load_of_a_room(house):
    """Readers that wait for a room get what was posted meanwhile."""
    house.log.held = True
    streams = [house.stream() for _ in range(3)]
    house.log.held = False
    assert len(house.log.waiting) == 1, "the log is read once"
    house.say("meanwhile")
    house.log.answer()
    house.turn()
    for stream in streams:
        history, *messages = stream.read()
        assert numbers(history.json) + [int(event.id.partition("-")[2]) for event in messages] == [1, 2, 3]


def test_connection_is_usable_after_a_refused_stream(house):
    house.log.down = True
    connection = house.connect()
    assert problem(connection.ask(b"GET", b"/rooms/main/events"), "UNAVAILABLE")[0] == 503
    house.log.down = False
    stream = Stream(connection, b"/rooms/main/events")
    assert [event.kind for event in stream.read()] == ["history"]
    connection.lose()
    assert house.forgotten


def test_when_all_have_left_nothing_is_left_of_them(house, events):
    streams = [house.stream(f"/rooms/room-{number}/events".encode()) for number in range(5)] + [house.stream()]
    house.turn()
    assert len(house.connections.connected) == 6
    gone = house.connections.empty()
    for stream in streams:
        stream.connection.lose()
    assert gone.called
    assert house.forgotten
    assert house.clock.getDelayedCalls() == []
    texts = [event["log_format"] for event in events]
    assert texts.count("#{connection} {peer} joined {room} for events") == 6
    assert texts.count("#{connection} {peer} left {room}") == 6
    assert {event["peer"] for event in events} == {"192.168.1.1:54321"}


def test_reader_by_a_unix_socket_is_logged_as_such(house, events):
    stream = Stream(house.connect(Transport(peerAddress=UNIXAddress(None))), b"/rooms/main/events")
    assert len(stream.read()) == 1
    assert "UNIXAddress" in events[-1]["peer"]


def test_old_client_reads_a_stream_until_the_connection_ends(house):
    stream = house.stream(version=b"1.0")
    house.say("hi")
    house.turn()
    assert [event.kind for event in stream.read()] == ["history", "message"]
    assert "transfer-encoding" not in stream.headers
    house.drain()
    assert stream.read() == []
    assert len(stream.retries) == 2
    assert stream.connection.closing


def test_request_behind_a_stream_waits_and_hurts_nobody(house):
    stream = house.stream()
    stream.connection.begin(b"POST", b"/rooms/main/messages", JSON, body=b'{"username":"ann","message":"behind"}')
    house.say("hi")
    house.turn()
    assert [event.kind for event in stream.read()] == ["history", "message"]
    assert stream.events[-1].json["data"]["message"] == "hi"
    house.drain()
    stream.read()
    assert stream.ended
    assert stream.rest == b"" or stream.rest.startswith(b"HTTP/1.1 503 ")
    stream.connection.lose()
    assert house.forgotten
    assert result_of(house.log.read("main", None, 1)).head == 3


def test_pipelined_stream_after_an_eviction(house):
    """A stream pipelined behind an evicted one does not begin."""
    stream = house.stream()
    stream.connection.begin(b"GET", b"/rooms/main/events")
    full(stream)
    house.pass_time(STALL_SECONDS)
    stream.read()
    assert stream.ended
    assert stream.connection.closing
    stream.connection.lose()
    assert house.forgotten


def test_stream_can_follow_other_requests_on_its_connection(house):
    connection = house.connect()
    connection.ask(b"GET", b"/rooms/main/messages")
    connection.ask(b"POST", b"/rooms/main/messages", JSON, body=b'{"username":"ann","message":"hi"}')
    stream = Stream(connection, b"/rooms/main/events")
    house.clock.advance(2 * http.HTTP_SECONDS)
    assert numbers(stream.read()[0].json) == [1, 2, 3]
    assert not connection.closing


# Cross-origin


def cors(response):
    return {
        name.lower().removeprefix("access-control-"): value
        for name, value in response.headers.items()
        if name.lower().startswith("access-control-")
    }


EXPOSED = "Link, Location, Retry-After"
REQUESTS = [
    (b"GET", b"/", 200),
    (b"GET", b"/rooms/main", 200),
    (b"GET", b"/rooms/main/messages", 200),
    (b"GET", b"/rooms/main/messages?limit=0", 400),
    (b"GET", b"/rooms/main/messages/x", 404),
    (b"GET", b"/rooms/Main", 404),
    (b"DELETE", b"/rooms/main/messages", 405),
    (b"POST", b"/rooms/main/messages", 415),
]


def varies_by_origin(response):
    """Return whether caches keep the answer for one origin alone; that of the page varies by its coding too."""
    return "Origin" in (response.headers["vary"] or "").split(", ")


@pytest.mark.parametrize(("method", "path", "status"), REQUESTS)
@pytest.mark.parametrize("origin", [[], [b"Origin: https://chat.example"], [b"Origin: null"]])
def test_any_page_may_read_by_a_star(method, path, status, origin):
    response, _ = House(origins=["*"]).ask(method, path, *origin)
    assert response.status == status
    assert cors(response) == {"allow-origin": "*", "expose-headers": EXPOSED}
    assert not varies_by_origin(response)


@pytest.mark.parametrize(("method", "path", "status"), REQUESTS)
def test_allowed_pages_may_read_answers(method, path, status):
    """Pages of allowed origins may read answers and errors."""
    house = House(origins=["https://chat.example", "*.team.example"])
    for origin in ("https://chat.example", "http://a.team.example:8080"[:-5]):
        response, _ = house.ask(method, path, b"Origin: " + origin.encode())
        assert response.status == status
        assert cors(response) == {"allow-origin": origin, "expose-headers": EXPOSED}
        assert varies_by_origin(response)
    response, _ = house.ask(method, path)
    assert response.status == status, "who says no origin is no browser"
    assert cors(response) == {}
    assert varies_by_origin(response)


@pytest.mark.parametrize(("method", "path", "status"), REQUESTS)
def test_page_of_the_same_host(house, method, path, status):
    """By default, pages of the host that the request names may read answers and errors."""
    response, _ = house.ask(method, path, b"Origin: https://chat.example")
    assert response.status == status
    assert cors(response) == {"allow-origin": "https://chat.example", "expose-headers": EXPOSED}
    assert varies_by_origin(response)


def test_page_of_the_host_that_a_proxy_names():
    """Behind trusted proxies, X-Forwarded-Host counts too; otherwise it does not."""
    for hops, status in ((1, 200), (0, 403)):
        headers = (b"Origin: https://front.example", b"X-Forwarded-Host: front.example")
        assert House(hops=hops).get(b"/rooms/main/messages", *headers)[0].status == status


@pytest.mark.parametrize("rules", [{"origins": ["https://chat.example"]}, {}, {"hops": 1}])
@pytest.mark.parametrize("method", [b"GET", b"POST", b"OPTIONS"])
@pytest.mark.parametrize("path", [b"/", b"/rooms/main/messages", b"/rooms/main/events", b"/rooms/nothing/here"])
@pytest.mark.parametrize(
    "origin",
    [
        b"https://evil.example",
        b"null",
        b"http://chat.example:443",
        b"https://chat.example.evil.example",
        b"https://chat.example:8443",
        b"",
    ],
)
def test_page_of_another_origin(method, path, origin, rules):
    """It gets a 403 that it may not read."""
    house = House(**rules)
    response, body = house.ask(method, path, JSON, b"Origin: " + origin, body=b'{"username":"a","message":"b"}')
    assert problem((response, body)) == (403, "this page may not connect here")
    assert cors(response) == {}
    assert response.headers["vary"] == "Origin"
    assert numbers(content(house.get(b"/rooms/main/messages"))) == [1, 2]
    assert house.forgotten


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        (b"/", "GET, HEAD, OPTIONS"),
        (b"/rooms/main", "GET, HEAD, OPTIONS"),
        (b"/rooms/main/messages", "GET, HEAD, OPTIONS, POST"),
        (b"/rooms/main/messages/k7Q2xe-1", "DELETE, GET, HEAD, OPTIONS"),
        (b"/rooms/main/events", "GET, HEAD, OPTIONS"),
    ],
)
@pytest.mark.parametrize("origins", [["*"], ["https://chat.example"]])
def test_cors_preflight(path, methods, origins):
    house = House(origins=origins)
    asked = (b"Access-Control-Request-Method: POST", b"Access-Control-Request-Headers: content-type,idempotency-key")
    response, body = house.ask(b"OPTIONS", path, b"Origin: https://chat.example", *asked)
    assert (response.status, body) == (204, "")
    assert cors(response) == {
        "allow-origin": origins[0],
        "allow-methods": methods,
        "allow-headers": "Content-Type, Idempotency-Key, Last-Event-ID",
        "max-age": str(PREFLIGHT_SECONDS),
        "expose-headers": EXPOSED,
    }
    assert response.headers["allow"] == methods
    assert response.headers["content-type"] is None


@pytest.mark.parametrize("headers", [[], [b"Origin: https://chat.example"]])
def test_no_content_has_no_length(house, headers):
    # RFC 9110, section 8.6
    response, _ = house.ask(b"OPTIONS", b"/rooms/main/messages", *headers)
    assert response.headers["content-length"] is None
    assert response.headers["transfer-encoding"] is None


def test_options_without_an_origin_name_the_methods():
    response, body = House(origins=["*"]).ask(b"OPTIONS", b"/rooms/main/messages")
    assert (response.status, body) == (204, "")
    assert response.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert cors(response) == {"allow-origin": "*", "expose-headers": EXPOSED}


@pytest.mark.parametrize("origin", ["*", "https://chat.example"])
def test_stream_may_be_read_by_the_page_that_asked_for_it(origin):
    stream = House(origins=[origin]).stream(b"/rooms/main/events", b"Origin: https://chat.example")
    assert len(stream.read()) == 1
    assert stream.headers["access-control-allow-origin"] == origin
    assert stream.headers.get("vary") == (None if origin == "*" else "Origin")


@pytest.mark.parametrize("length", [b"Content-Length: 16385", b"Transfer-Encoding: chunked"])
def test_page_may_read_that_its_body_is_refused(house, length):
    response, _ = house.ask(b"POST", b"/rooms/main/messages", JSON, b"Origin: https://chat.example", length)
    assert response.status in (411, 413)
    assert cors(response)["allow-origin"] in ("*", "https://chat.example")


# Requests


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (b"/", "GET, HEAD, OPTIONS"),
        (b"/?x", "GET, HEAD, OPTIONS"),
        (b"/rooms/main", "GET, HEAD, OPTIONS"),
        (b"/rooms/main/messages", "GET, HEAD, OPTIONS, POST"),
        (b"/rooms/main/messages/k7Q2xe-1", "DELETE, GET, HEAD, OPTIONS"),
        (b"/rooms/main/events", "GET, HEAD, OPTIONS"),
    ],
)
@pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH", b"DELETE", b"TRACE", b"get", b"_"])
def test_other_methods_are_405(house, events, method, path, allowed):
    """The answer names the allowed methods."""
    if method.decode() in allowed:
        return
    response, body = house.ask(method, path, JSON, body=b'{"username":"ann","message":"hi"}')
    assert problem((response, body)) == (405, f"{method.decode()} is not for this")
    assert response.headers["allow"] == allowed
    assert events == []


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/rooms/main",
        "/rooms/main/messages",
        "/rooms/main/messages?limit=1",
        "/rooms/main/messages/{}-1",
        "/rooms/main/messages/{}-9",
        "/rooms/main/messages?before={}-9",
        "/rooms/main/messages?limit=0",
        "/rooms/main/events?last_event_id=x",
        "/rooms/Main",
    ],
)
def test_HEAD_answers_as_GET_without_the_body(house, path):
    path = path.format(house.epoch).encode()
    connection = house.connect()
    response, body = connection.ask(b"GET", path, b"Host: x")
    head, nothing = connection.ask(b"HEAD", path, b"Host: x")
    assert (head.status, nothing) == (response.status, "")
    assert connection.transport.value().endswith(b"\r\n\r\n")
    ours, theirs = dict(head.headers), dict(response.headers)
    ours.pop("Date"), theirs.pop("Date")
    assert ours == theirs
    assert head.headers["content-length"] == str(len(body.encode()))


def test_head_of_a_stream(house):
    """HEAD has the media type and no length, and joins no room."""
    response, body = house.ask(b"HEAD", b"/rooms/main/events")
    assert (response.status, body) == (200, "")
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["content-length"] is None, "a stream's is not 0 (RFC 9110, section 8.6)"
    assert house.forgotten


@pytest.mark.parametrize("header", ["Origin", "X-Forwarded-For", "Content-Type", "Idempotency-Key", "Last-Event-ID"])
@pytest.mark.parametrize("origins", [[], ["https://chat.example"]])
def test_header_that_is_not_utf_8(events, header, origins):
    """It is refused or ignored, and nothing is logged."""
    house = House(origins=origins, rate=(1, 9), hops=1)
    bad = header.encode() + b": \xff"
    for path in (b"/", b"/rooms/main/messages", b"/rooms/main/events?last_event_id=x"):
        assert house.ask(b"GET", path, bad)[0].status in (200, 400, 403)
    assert house.post(bad, username="ann", message="hi")[0].status in (201, 400, 403, 415)
    assert [event for event in events if event.get("log_failure")] == []


def test_requests_on_one_connection_are_answered_in_their_order(house):
    house.log.held = True
    connection = house.connect()
    body = b'{"username":"ann","message":"hi"}'
    for path in (b"/rooms/main/messages", b"/rooms/other/messages"):
        connection.begin(b"POST", path, JSON, body=body)
        connection.begin(b"GET", path)
    house.log.release()
    house.clock.advance(0)
    answers = re.findall(rb"HTTP/1\.1 (\d+) ", connection.transport.value())
    assert answers == [b"201", b"200", b"201", b"200"]
    assert not connection.closing


def test_request_is_not_logged(house, events):
    house.post(username="ann", message="hi")
    for path in (b"/", b"/rooms/main", b"/rooms/main/messages", b"/rooms/Main", b"/rooms/main/messages?limit=0"):
        house.get(path)
    assert events == []


# Answers that nobody reads


@pytest.fixture
def unread(house):
    """A connection of plain HTTP whose page waits in a full transport."""
    connection = house.connect()
    connection.begin(b"GET", b"/rooms/main/messages")
    house.turn()
    connection.transport.producer.pauseProducing()
    return connection


def test_unread_answer_is_dropped(house, unread):
    """A client that does not take its answer has as long as one of an event stream."""
    house.pass_time(2 * STALL_SECONDS - 1)
    assert not unread.transport.disconnected
    house.pass_time(1)
    assert unread.transport.disconnected
    assert house.forgotten


def test_answer_that_is_read_is_no_stall(house, unread):
    """The time begins again when the transport has taken an answer."""
    house.pass_time(2 * STALL_SECONDS - 1)
    unread.transport.producer.resumeProducing()
    house.pass_time(2 * STALL_SECONDS)
    unread.transport.producer.pauseProducing()
    house.pass_time(2 * STALL_SECONDS - 1)
    assert not unread.transport.disconnected
    unread.lose()
    assert house.forgotten


def test_unread_answers_count_in_the_bound(house, unread, monkeypatch, events):
    """The bytes of plain HTTP are among those that all full transports may hold."""
    monkeypatch.setattr("chatd.transport.connections.MAX_BUFFERED", 100)
    unread.transport.dataBuffer, unread.transport.offset = b"x" * 111, 10
    house.pass_time(1)
    assert unread.transport.disconnected
    assert [event["why"] for event in events] == ["did not read its bytes, the most of too many,"]
    assert events[0]["peer"] == "192.168.1.1:54321"


def test_stream_stalls_once(house):
    """The connection below an event stream does not count beside the stream."""
    stream = house.stream()
    full(stream)
    assert len([*house.connections.stalls]) == 1


def test_full_transport_of_the_admin_port(house):
    """A site that nobody looks after waits, until the time for the next request is over."""
    house.site.stalls = None
    connection = house.connect()
    connection.begin(b"GET", b"/readyz")
    connection.transport.producer.pauseProducing()
    house.pass_time(3 * STALL_SECONDS)
    assert not connection.transport.disconnected
    connection.lose()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        (b"GET", b"/rooms/main/messages", None),
        (b"GET", b"/rooms/main/messages/zzzz-1", None),
        (b"POST", b"/rooms/main/messages", b"{}"),
        (b"OPTIONS", b"/rooms/main/messages", None),
        (b"PUT", b"/rooms/main/messages", None),
        (b"GET", b"/rooms/main", None),
        (b"GET", b"/nowhere", None),
    ],
)
def test_answered_request_is_freed_at_once(house, method, path, body):
    """No cycle keeps a request, and with it the bytes of its transport, until the garbage collector runs."""
    made = []

    class Noted(house.site.requestFactory):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    house.site.requestFactory = Noted
    gc.collect()
    gc.disable()
    try:
        house.ask(method, path, body=body)
        house.turn()
        assert [request() for request in made] == [None]
    finally:
        gc.enable()


def test_lost_stream_is_freed_at_once(house):
    """The connection below a stream lets go of it, as of a request."""
    stream = house.stream()
    reader = weakref.ref(next(iter(house.connections.connected)))
    gc.collect()
    gc.disable()
    try:
        stream.connection.lose()
        house.turn()
        assert reader() is None
    finally:
        gc.enable()
