"""The log names clients by number and room, and contains no message, username or secret."""

import base64
import contextlib
import http.client
import json
import re
import signal
import sqlite3
import sys
import time
from typing import NamedTuple

import jwt
import pytest
from support.raw_clients import EventReader, RawMember
from support.servers import LONG, LOOPBACK, Raw, Server, upgrade
from support.websocket_frames import BINARY, CLOSE, PING, PONG, TEXT, frame

ROOM = "team"
PAGE = "https://chat.example"
BURST = 140


@pytest.fixture(scope="module", params=["json", "text"])
def run(request, tmp_path_factory):
    """The log, the errors and the secrets of a server that every kind of client used, from its start to its end."""
    folder, secret = tmp_path_factory.mktemp(request.param), Secrets()
    options = (f"--log-format={request.param}", f"--rate=20:{BURST}", f"--origin={PAGE}")
    with Server(folder, *options, admin=LOOPBACK) as server:
        visit(server, folder, secret)
        server.stopped()
    return Run(request.param, [*server.log], [*server.errors], secret)


class Run(NamedTuple):
    form: str
    log: list[str]
    errors: list[str]
    secret: "Secrets"


class Secrets:
    """A source of unique texts, which finds those that a log contains."""

    def __init__(self):
        self._used = {}

    def __call__(self, where):
        """Return another secret for this place; it is valid as a username, a label, a path and a query."""
        assert where not in self._used.values()
        text = f"xyzzy{len(self._used):03}plugh"
        self._used[text] = where
        return text

    def keep(self, where, *texts):
        """Find these texts too, which were not drawn here."""
        self._used |= dict.fromkeys(texts, where)

    def found(self, log):
        """Return the places of the secrets that are in a log, in any form."""
        return [where for text, where in self._used.items() if any(form in log for form in forms(text))]


def forms(text):
    """Yield the forms in which a log may write a text: plain, capitals, hexadecimal, escaped, percents, base64."""
    data = text.encode()
    yield from (text, text.upper(), data.hex(), data.hex(" "))
    yield from ("".join(pattern % byte for byte in data) for pattern in ("\\u%04x", "\\\\u%04x", "\\x%02x", "%%%02X"))
    for before in range(3):  # what of base64 depends on its neighbours is left out
        coded = base64.b64encode(bytes(before) + data).decode()
        yield coded[4 if before else 0 : len(coded) // 4 * 4 - 4]


def said(**values):
    return frame(TEXT, json.dumps(values).encode())


def post_over_websocket(client, secret):
    """Send every kind of frame, valid and invalid, on a connection that stays open."""

    def refused(data, **error):
        client.send(data)
        answer = client.answer()
        assert answer["type"] == "error"
        assert answer.items() >= error.items()

    def answered(data, *kinds):
        client.send(data)
        assert [client.answer()["type"] for _ in kinds] == [*kinds]

    ann, label = secret("the username of a post"), secret("a label")
    answered(said(username=ann, message=secret("a message")), "message")
    answered(
        said(username=ann, message=f'"\n{secret("a message with a label")}\0\x1b[1m', label=label), "message", "ack"
    )
    escaped = "".join(rf"\u{ord(character):04x}" for character in secret("a message in escapes"))
    answered(frame(TEXT, f'{{"username":"{ann}","message":"{escaped}"}}'.encode()), "message")
    text = f'{{"username":"{ann}","message":"{secret("a message in two frames")}"}}'.encode()
    answered(frame(TEXT, text[:40], fin=False) + frame(0, text[40:]), "message")
    client.send(said(type="typing", username=secret("the username of typing")))
    page = secret("the label of a page")
    client.send(said(type="history", limit=2, label=page))
    assert client.answer()["label"] == page
    refused(said(type="history", before=secret("a malformed id")))
    refused(said(type="history", before="zzzzzz-7", label=secret("the label of no page")), code="UNKNOWN_ID")
    other = secret("a message under a label that was used")
    refused(said(username=ann, message=other, label=label), code="LABEL_REUSED")
    refused(said(username=ann, message=secret("a message that is too long") * 50, label=secret("the label of that")))
    refused(said(username=secret("a username that is too long") * 3, message="hi"))
    refused(said(username=ann, message="hi", **{secret("an unknown key"): secret("the value of that")}))
    refused(said(type=secret("an unknown type"), username=ann, message="hi"))
    refused(said(username=ann, message="hi", label=f"{secret('a malformed label')} \n"))
    refused(said(username=ann, message={"nested": secret("a message that is no text")}))
    refused(frame(TEXT, f'{{"username":"{ann}","message":"{secret("invalid JSON")}'.encode()))
    refused(frame(TEXT, json.dumps(secret("JSON that is no object")).encode()))
    client.send(frame(PING, payload := secret("a ping").encode()) + frame(PONG, secret("a pong").encode()))
    while client.frame() != (PONG, payload):
        pass


def breaches(secret):
    """Send messages that end a connection, and check the close code of each."""
    return [
        (frame(BINARY, secret("a binary frame").encode()), 1003),
        (frame(TEXT, secret("what is not UTF-8").encode() + b"\xff"), 1007),
        (frame(TEXT, secret("a fragment that is not UTF-8").encode() + b"\xff", fin=False), 1007),
        (frame(TEXT, secret("a frame that is too big").encode() * 2000), 1009),
        (frame(TEXT, secret("a reserved bit").encode(), bits=4), 1002),
        (frame(TEXT, secret("no mask").encode(), masked=False), 1002),
        (frame(TEXT, secret("a fragment").encode(), fin=False) + frame(TEXT, secret("another").encode()), 1002),
        (frame(PING, secret("a ping that is too long").encode() * 20), 1002),
        (b"".join(frame(bool(not n) * TEXT, secret(f"piece {n}").encode(), fin=False) for n in range(129)), 1008),
        (frame(CLOSE, (3999).to_bytes(2) + secret("the reason of a close").encode()), 3999),
        (frame(CLOSE, (1005).to_bytes(2) + secret("the reason of a bad close").encode()), 1002),
        (frame(CLOSE, (1000).to_bytes(2) + secret("a reason that is not UTF-8").encode() + b"\xff"), 1007),
    ]


def handshakes(secret):
    """Send handshakes that chatd or Autobahn refuses; Autobahn quotes them in its errors."""
    token = secret("a token of all refused handshakes")
    room = f"/rooms/{ROOM}"

    def asked(path, **headers):
        return upgrade(path, Authorization=f"Bearer {token}", Cookie=f"session={token}", **headers)

    def at_length(path, **headers):
        return asked(path, **headers).replace(b"\r\n\r\n", b"\r\nX-Twice: 1\r\nX-Twice: 2\r\n\r\n")

    for ask, way in ((asked, "plain"), (at_length, "not plain")):
        yield ask(f"/{secret(f'a path, {way}')}?access_token={token}")
        yield ask(f"/rooms/{secret(f'a room in capitals, {way}').upper()}")
        yield ask(f"{room}?access_token={token}&last_event_id={secret(f'a malformed last id, {way}')}")
        yield ask(f"{room}?events={secret(f'an unknown event, {way}')}")
        yield ask(f"{room}?username={secret(f'the username of a query, too long, {way}') * 3}")
        yield ask(f"{room}?username={secret(f'a query that is not UTF-8, {way}')}%ff")
        yield ask(room, Origin=f"https://{secret(f'an origin, {way}')}.example")
    yield asked(f"{room}?access_token={secret('a token with a space')} after it")
    yield asked(f"{room}?access_token={token}#{secret('a token in a fragment')}")
    yield at_length(room, Origin=f"https://host:{secret('what is no port of an origin')}")
    yield at_length(room, Sec_WebSocket_Protocol="chat.v1, {0}, {0}".format(secret("a token as a subprotocol, twice")))
    yield at_length(room, Host=f"localhost:{secret('what is no port of a host')}")
    yield asked(room, Sec_WebSocket_Version=secret("a malformed version"))
    yield asked(room, Upgrade=f"websocket/{secret('a protocol to upgrade to')}")
    yield asked(room, Connection=secret("a malformed connection header"))
    yield asked(room, Sec_WebSocket_Key=secret("a malformed key of a handshake"))
    yield asked(room, Sec_WebSocket_Key=f"{secret('a key of bad characters')}!!!!!!!!!==")
    yield asked(room, X_Padding=secret("a head that is too long") * 2000)
    yield asked(room).replace(b"GET", secret("a method").upper().encode())
    yield asked(room).replace(b"HTTP/1.1", b"HTTP/" + secret("a version of HTTP").encode())
    yield asked(room).replace(b"/rooms", b"//[" + secret("a malformed host").encode(), 1)


def over_http(port, secret):
    """Send valid and invalid requests to the rooms over HTTP."""
    token, ann = secret("a token over HTTP"), secret("the username of a post over HTTP")
    messages, kind = f"/rooms/{ROOM}/messages", "application/json"
    content = json.dumps({"username": ann, "message": secret("a message over HTTP")})
    other = json.dumps({"username": ann, "message": secret("a message under a key that was used")})
    key = f'"{secret("a key")}"'

    def ask(status, method, path, body=None, /, **headers):
        fields = {"Authorization": f"Bearer {token}", "Cookie": f"session={token}", "Referer": f"https://{token}/"}
        connection.request(
            method, path, body, fields | {name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (status if isinstance(status, tuple) else (status,)), (method, path, body)
        return answer.status

    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)) as connection:
        ask(201, "POST", f"{messages}?access_token={token}", content, Content_Type=kind, Idempotency_Key=key)
        ask(200, "POST", messages, content, Content_Type=kind, Idempotency_Key=key)
        ask(422, "POST", messages, other, Content_Type=kind, Idempotency_Key=key)
        ask(400, "POST", messages, content, Content_Type=kind, Idempotency_Key=f"{secret('a malformed key')} x")
        ask(415, "POST", messages, content, Content_Type=f"text/{secret('another type of content')}")
        ask(400, "POST", messages, secret("content that is no JSON"), Content_Type=kind)
        ask(413, "POST", messages, secret("content that is too large") * 2000, Content_Type=kind)
        ask(404, "POST", f"/rooms/{secret('a room that is none')}!/messages", content, Content_Type=kind)
        ask(405, secret("a method over HTTP").upper(), messages)
        ask(400, "GET", f"{messages}?before={secret('a malformed id over HTTP')}")
        ask(404, "GET", f"{messages}/{secret('an id that is none')}")
        ask(404, "GET", f"/{secret('an address over HTTP')}?access_token={token}")
        ask(403, "GET", messages, Origin=f"https://{secret('an origin over HTTP')}.example")
        ask(400, "GET", f"/rooms/{ROOM}/events", Last_Event_ID=secret("a malformed last id over HTTP"))
        ask(200, "GET", f"/rooms/{ROOM}", Host=secret("a host"))
        late = json.dumps({"username": ann, "message": secret("a message that is too much over HTTP")})
        while ask((201, 429), "POST", messages, late, Content_Type=kind) != 429:
            pass
    for head in (f"{token}\r\n\r\n", f"GET / HTTP/1.1\r\n{token}\r\n\r\n", f"GET /{token} HTTP/{token}\r\n\r\n"):
        with Raw(port) as client:
            client.send(head.encode())
            client.rest()


def without_its_table(store, client, port, secret):
    """Break the store while it serves: posts are refused meanwhile."""
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
        db.execute("ALTER TABLE messages RENAME TO elsewhere")
        ann, label = secret("the username of what is not stored"), secret("the label of what is not stored")
        client.send(said(username=ann, message=secret("what is not stored"), label=label))
        assert client.answer()["code"] == "UNAVAILABLE"
        with Raw(port) as other:
            other.send(upgrade(f"/rooms/other?username={secret('who cannot join')}"))
            assert other.head()[0] == 503
        with Raw(port) as other:
            other.send(
                f"GET /rooms/other/messages?access_token={secret('a token of who cannot read')} HTTP/1.1\r\n".encode()
            )
            other.send(b"Host: localhost\r\n\r\n")
            assert other.head()[0] == 503
        db.execute("ALTER TABLE elsewhere RENAME TO messages")


def visit(server, folder, secret):
    """Act as every kind of client, until the server ends."""
    port, token = server.port, secret("a token of members")
    who = {"Authorization": f"Bearer {token}", "Cookie": f"session={token}", "Origin": PAGE}
    asked = f"/rooms/{ROOM}?events=presence,typing&access_token={token}&username={secret('the username of a query')}"
    offer = {"Sec_WebSocket_Protocol": f"chat.v1, {secret('a token as a subprotocol')}"}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(RawMember(port, asked, **who, **offer))
        post_over_websocket(client, secret)
        for data, code in breaches(secret):
            with RawMember(port, f"/rooms/{ROOM}?access_token={token}", **who) as other:
                other.send(data)
                other.ends()
                server.log.wait(rf"127\.0\.0\.1:{other.socket.getsockname()[1]} left {ROOM}: {code}")
        for data in handshakes(secret):
            with Raw(port) as other:
                other.send(data)
                assert 400 <= other.head()[0] < 600
        with RawMember(port, f"/rooms/{ROOM}") as other:
            label = secret("the label of what is too much")
            late = said(username=secret("whose rate is exceeded"), message=secret("what is too much"), label=label)
            other.send(late * (2 * BURST))
            while other.json().get("code") != "RATE_LIMITED":
                pass
        over_http(port, secret)
        events = f"/rooms/{ROOM}/events?access_token={token}"
        with EventReader(port, f"{events}&username={secret('the username of a reader')}", "1.1", **who):
            server.log.wait("for events")
        reader = stack.enter_context(EventReader(port, events, "1.1", Last_Event_ID="zzzzzz-3"))
        last = stack.enter_context(RawMember(port, f"/rooms/{ROOM}"))
        without_its_table(folder / "chatd.sqlite", last, port, secret)
        with Raw(server.admin_port) as other:
            other.send(f"GET /{secret('an address of the admin port')}?access_token={token} HTTP/1.0\r\n\r\n".encode())
            assert other.head()[0] == 404
        server.terminate()
        for member in (client, last):
            member.ends()
        reader.rest()


def of_clients(run):
    """Return the lines about clients: each sentence and its fields, which the text format lacks."""
    lines = []
    for line in run.log:
        if run.form == "json":
            values = json.loads(line)
            lines.append((values["system"], values["event"], values.get("fields", {})))
        else:
            system, sentence = re.fullmatch(r"\S+ \w+ ([\w.]+): (.*)", line).groups()
            lines.append((system, sentence, {}))
    others = ("twisted.", "log_legacy", "chatd.service", "chatd.store.")
    return [
        (sentence, fields)
        for system, sentence, fields in lines
        if not system.startswith(others) and not sentence.startswith("the log cannot be read: ")
    ]


REFUSED = r"127\.0\.0\.1:\d+ refused: \d{3} "
"""A handshake: nobody has joined, and so nobody has a number."""


def test_log_has_no_secrets(run):
    """No text, name or token of a client is in the log."""
    assert run.secret.found("\n".join(run.log)) == []


def test_nothing_is_written_beside_the_log(run):
    assert run.errors == []


def test_every_way_to_say_something_left_its_trace(run):
    """Every kind of client appears in the log, so that the search for secrets has something to find."""
    sentences = [sentence for sentence, _ in of_clients(run)]
    for pattern, least in ((r"joined", 17), (r"left", 17), (r"sent an invalid frame", 1), (REFUSED, 28)):
        assert len([sentence for sentence in sentences if re.search(pattern, sentence)]) >= least
    whole = "\n".join(run.log)
    stored = "not stored: no such table", "cannot be read: no such"
    for pattern in ("joined team for events", "left team: 1012", *stored):
        assert re.search(pattern, whole)


def test_lines_about_clients_have_a_number(run):
    bare, peers = [], {}
    for sentence, fields in of_clients(run):
        found = re.match(r"#([1-9]\d*) (127\.0\.0\.1:\d+) ", sentence)
        if not found:
            bare += [] if re.match(REFUSED, sentence) else [sentence]
            continue
        assert peers.setdefault(found[1], found[2]) == found[2], "one client each"
        if run.form == "json":
            assert (fields["connection"], fields["peer"]) == (int(found[1]), found[2])
    assert bare == []


def test_each_line_with_fields_about_a_member_names_the_room(run):
    lacking = {sentence for sentence, fields in of_clients(run) if "connection" in fields and "room" not in fields}
    assert {re.sub(r"^#\d+ \S+ ", "", sentence) for sentence in lacking} == set()


# Tokens, their key, and the token of the admin port

COOKIE = "session"
VERBOSE = """
import txaio
from twisted.scripts import twistd

txaio.use_twisted()
txaio.set_global_log_level("trace")
twistd.run()
"""
"""twistd, with a log of everything that Autobahn does."""
UNFIT = {
    "it has expired": {"exp": 1},
    "it is not valid yet": {"nbf": 1 << 40},
    "its audience is not": {"aud": "others"},
    "its claim chatd is malformed": {"chatd": {"reed": []}},
    "its subject is too long or empty": {"sub": ""},
    "the claim of --jwt-username is no username": {"name": "n" * 31},
    "it is malformed": {"exp": "soon"},
    "its signature is wrong": {"key": "another secret of at least 32 bytes"},
}
"""Claims of tokens that are refused, by the words in the log."""


def use_tokens(server, token):
    """Send valid and invalid tokens in every way."""

    def asked(path, sent, **headers):
        yield upgrade(path, Authorization=f"Bearer {sent}", **headers)
        yield upgrade(path, Sec_WebSocket_Protocol=f"chat.v1, bearer.{sent}", **headers)
        yield upgrade(path, Cookie=f"{COOKIE}={sent}", Origin=PAGE, **headers)

    def answer(data, status):
        with Raw(server.port) as other:
            other.send(data)
            assert other.head()[0] == status

    good, other = token("a token"), token("a token of another subject", sub="bob")
    for path in (f"/rooms/{ROOM}", f"/rooms/{ROOM}?access_token={good}"):
        for data in asked(path, good):
            answer(data, 101)
            answer(data.replace(b"\r\n\r\n", b"\r\nX-Twice: 1\r\nX-Twice: 2\r\n\r\n"), 101)  # not plain
        for data in asked(path, good, Sec_WebSocket_Version="7"):
            answer(data, 400)
    for words, claims in UNFIT.items():
        unfit = token(words, **claims)
        for data in asked("/", unfit):
            answer(data, 401)
        answer(f"GET /rooms/main/events HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {unfit}\r\n\r\n".encode(), 401)
    answer(upgrade("/", Authorization=f"Bearer {token('a token that is too large', more='x' * 8192)}"), 401)
    answer(upgrade("/", Authorization=f"Bearer {good}", Cookie=f"{COOKIE}={other}", Origin=PAGE), 401)
    with RawMember(server.port, Authorization=f"Bearer {good}") as member:
        renewals = (token("a renewal"), other, token("a renewal that has expired", exp=1), f"{good}x", good)
        for sent, kind in zip(renewals, ("token", "error", "error", "error", "token"), strict=True):
            member.send(said(type="token", token=sent))
            assert member.answer()["type"] == kind


def use_admin_port(server, right, wrong):
    """Send the right and a wrong token to the admin port."""
    for sent, status in (right, 200), (wrong, 401):
        with Raw(server.admin_port) as operator:
            operator.send(
                f"GET /sanctions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {sent}\r\n\r\n".encode()
            )
            assert operator.head()[0] == status


def test_log_has_no_token_and_no_key(tmp_path):
    """No part of a token, no key and no token of the admin port is in the log, not even with Autobahn's debugging."""
    secret = Secrets()
    key, admin = (secret(where) * 3 for where in ("the key", "the token of the admin port"))
    files = tmp_path / "jwt.key", tmp_path / "admin"

    def write(*texts):
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
            file.chmod(0o600)

    def token(where, key=key, **claims):
        given = {
            "sub": "ann",
            "name": "ann",
            "exp": int(time.time()) + 3600,
            "at": secret(f"a claim of {where}"),
        } | claims
        made = jwt.encode(given, key, "HS256")
        secret.keep(where, made, *made.split(".")[1:])
        return made

    write(key, admin)
    options = (
        *("--jwt-key=jwt.key", "--jwt-username=name", f"--jwt-cookie={COOKIE}", f"--origin={PAGE}"),
        *("--admin-token-file=admin", "--log-format=json"),
    )
    with Server(tmp_path, *options, admin=LOOPBACK, command=(sys.executable, "-c", VERBOSE)) as server:
        use_tokens(server, token)
        use_admin_port(server, admin, secret("a wrong token of the admin port"))
        write(secret("a key that is too short"), f"{secret('half of a token')} {secret('the other half')}")
        server.terminate(signal.SIGHUP)
        server.log.wait("the old token of the admin port stays")
        server.log.wait("holds a secret of ")
        server.stop()
    text = "\n".join([*server.log, *server.errors])
    assert secret.found(text) == []
    for words in (*UNFIT, "a request carries two that differ", "it is larger than 8 KiB", "connection accepted from"):
        assert words in text


@pytest.mark.parametrize("before", ["", "a", "ab"])
def test_secret_is_found_in_whatever_form_it_is_logged(before):
    secret = Secrets()
    text, _ = secret("here"), secret("elsewhere")
    data = (before + text + "!").encode()
    for log in (
        data.decode(),
        text.upper(),
        data.hex(),
        data.hex(" "),
        base64.b64encode(data).decode(),
        json.dumps({"of": data.decode()}),
        repr(data),
        "".join(f"\\u{byte:04x}" for byte in data),
        json.dumps("".join(f"\\u{byte:04x}" for byte in data)),
        "".join(f"%{byte:02X}" for byte in data),
    ):
        assert secret.found(f"a line\n#1 said {log} and left\n") == ["here"], log
    assert secret.found("xyzzy and plugh") == []
