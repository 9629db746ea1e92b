"""The plain form of the opening handshake is recognised; every other form is left to Autobahn."""

import pytest
from autobahn.websocket.protocol import WebSocketServerProtocol
from support.helpers import HEAD

from chatd.transport.handshake import MAGIC, Upgrade, parse_upgrade, switch

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def test_plain_handshake_is_read():
    assert parse_upgrade(HEAD) == Upgrade("/", "", None, KEY, [])


def test_path_query_origin_and_offered_subprotocols_are_read():
    head = HEAD.replace(b"GET / ", b"GET /rooms/a?x=1&x=2 ")
    head += b"\r\nOrigin: https://chat.example\r\nSec-WebSocket-Protocol: chat.v1, other"
    assert parse_upgrade(head) == Upgrade("/rooms/a", "x=1&x=2", "https://chat.example", KEY, ["chat.v1", "other"])


@pytest.mark.parametrize("target", ["/rooms/%6dain?username=%d0%90&a=b+c?d", "/rooms/..?", "//x?x"])
def test_path_and_query_are_left_as_they_are_written(target):
    upgrade = parse_upgrade(HEAD.replace(b"GET / ", b"GET %b " % target.encode()))
    path, _, query = target.partition("?")
    assert (upgrade.path, upgrade.query) == (path, query)


def test_origin_is_left_as_it_is_written():
    assert parse_upgrade(HEAD + b"\r\nORIGIN:  HTTPS://Chat.Example  ").origin == "HTTPS://Chat.Example"
    assert parse_upgrade(HEAD + b"\r\nOrigin:").origin == ""


def test_names_and_values_are_read_whatever_their_case():
    assert parse_upgrade(HEAD.replace(b"Upgrade: websocket", b"uPGRADE:WebSocket"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"GET", b"POST"),
        (b"HTTP/1.1", b"HTTP/1.0"),
        (b"GET / ", b"GET * "),
        (b"GET / ", b"GET /#top "),
        (b"GET / ", b"GET  / "),
        (b"GET / ", b"GET http://localhost/ "),
        (b"GET / ", b"GET /?username=\xd0\x90 "),
        (b"Host: localhost:8085\r\n", b""),
        (b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Upgrade: websocket\r\n", b""),
        (b"keep-alive, Upgrade", b"keep-alive"),
        (b"Version: 13", b"Version: 8"),
        (b"b25jZQ==", b"b25jZQ="),
        (b"dGhlIHNhb", b"dGhl*HNhb"),
        (b"Host: localhost", b"Host: a\r\nHost: localhost"),
        (b"Host: localhost", b"Origin: null\r\nOrigin: null\r\nHost: localhost"),
        (b"Host: localhost", b"no colon\r\nHost: localhost"),
        (b"Host: localhost:8085", b"Host: localhost\r\n folded: more"),
    ],
)
def test_any_other_head_is_left_to_autobahn(old, new):
    head = HEAD.replace(old, new)
    assert head != HEAD
    if b"folded" in new:  # an obsolete line folding reads as a header of its own, which nobody asks for
        assert parse_upgrade(head)
    else:
        assert parse_upgrade(head) is None


def test_answer_is_that_of_the_rfcs_example():
    answer = switch("dGhlIHNhbXBsZSBub25jZQ==", None, "chatd")
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
    assert b"Sec-WebSocket-Protocol" not in answer
    assert answer.endswith(b"\r\n\r\n")


def test_answer_names_the_chosen_subprotocol():
    assert b"\r\nSec-WebSocket-Protocol: chat.v1\r\n" in switch("dGhlIHNhbXBsZSBub25jZQ==", "chat.v1", "chatd")


def test_magic_is_autobahns():
    assert MAGIC == WebSocketServerProtocol._WS_MAGIC
