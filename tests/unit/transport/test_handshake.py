"""Opening handshakes (RFC 6455, section 4.2): what a valid one asks for, and why another is refused."""

import pytest
from autobahn.websocket.protocol import WebSocketServerProtocol
from support.helpers import HEAD

from chatd.transport.admission import HttpError
from chatd.transport.framing import MAGIC
from chatd.transport.handshake import VERSIONS, Upgrade, read_upgrade, switch
from chatd.transport.heads import parse

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def upgrade(head=HEAD):
    return read_upgrade(parse(head))


def refusal(old, new):
    """The status, the reason and the headers with which a handshake is refused that differs in one place."""
    assert old in HEAD
    with pytest.raises(HttpError) as refused:
        upgrade(HEAD.replace(old, new))
    return refused.value.status, str(refused.value), dict(refused.value.headers)


def test_plain_handshake_is_read():
    assert upgrade() == Upgrade("/", "", None, KEY, [], "")


def test_path_query_origin_and_offered_subprotocols_are_read():
    head = HEAD.replace(b"GET / ", b"GET /rooms/a?x=1&x=2 ")
    head += b"\r\nOrigin: https://chat.example\r\nSec-WebSocket-Protocol: chat.v1,, other\r\nSec-WebSocket-Protocol: b"
    assert upgrade(head) == Upgrade("/rooms/a", "x=1&x=2", "https://chat.example", KEY, ["chat.v1", "other", "b"], "")


@pytest.mark.parametrize("target", ["/rooms/%6dain?username=%d0%90&a=b+c?d", "/rooms/..?", "//x?x"])
def test_path_and_query_are_left_as_they_are_written(target):
    found = upgrade(HEAD.replace(b"GET / ", b"GET %b " % target.encode()))
    path, _, query = target.partition("?")
    assert (found.path, found.query) == (path, query)


def test_origin_is_left_as_it_is_written():
    assert upgrade(HEAD + b"\r\nORIGIN:  HTTPS://Chat.Example  ").origin == "HTTPS://Chat.Example"
    assert upgrade(HEAD + b"\r\nOrigin:").origin == ""


def test_origin_of_version_8():
    """Version 8 has the origin in a header of its own name."""
    head = HEAD.replace(b"Version: 13", b"Version: 8") + b"\r\nOrigin: https://a.example"
    assert upgrade(head).origin is None
    assert upgrade(head + b"\r\nSec-WebSocket-Origin: https://b.example").origin == "https://b.example"


def test_names_and_values_are_read_whatever_their_case():
    assert upgrade(HEAD.replace(b"Upgrade: websocket", b"uPGRADE:WebSocket"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"Upgrade: websocket", b"Upgrade: a-websocket", 'do not include "websocket" value (case-insensitive): "a-'),
        (b"Connection: keep-alive, Upgrade\r\n", b"", "HTTP Connection header missing"),
        (b", Upgrade", b"", 'do not include "upgrade" value (case-insensitive): "keep-alive"'),
        (b"Host: ", b"Sec-WebSocket-Protocol: a, b, a\r\nHost: ", 'duplicate protocol "a" specified in HTTP Sec-We'),
        (b"Host: ", b"Sec-WebSocket-Protocol: bearer.x, bearer.x\r\nHost: ", 'duplicate protocol "bearer." specified'),
        (b"Host: ", b"Origin: x\r\nOrigin: x\r\nHost: ", "HTTP Origin header appears more than once in opening hand"),
        (b"Host: ", b"Content-Length: 1\r\nHost: ", "an opening handshake has no body"),
        (b"Host: ", b"Transfer-Encoding: chunked\r\nHost: ", "an opening handshake has no body"),
        (b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", b"", "HTTP Sec-WebSocket-Key header missing"),
        (b"Host: ", b"Sec-WebSocket-Key: x\r\nHost: ", "Key header appears more than once in opening handshake req"),
        (b"b25jZQ==", b"b25jZQ=", 'bad Sec-WebSocket-Key (length must be 24 ASCII chars) "dGhlIHNhbXBsZSBub25jZQ="'),
        (b"b25jZQ==", b"b25jZQQQ", 'bad Sec-WebSocket-Key (invalid base64 encoding) "dGhlIHNhbXBsZSBub25jZQQQ"'),
        (b"dGhl", b"dG*l", 'bad character "*" in Sec-WebSocket-Key (invalid base64 encoding) "dG*lIHNhbXBsZSBub25jZ'),
    ],
)
def test_invalid_handshake(old, new, reason):
    """It is refused with the reason."""
    status, detail, headers = refusal(old, new)
    assert (status, headers) == (400, {})
    assert reason in detail


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (b"", "WebSocket connection denied - Hixie76 protocol not supported."),
        (b"Sec-WebSocket-Version: 7", "WebSocket version 7 not supported (supported versions: 13,8)"),
        (b"Sec-WebSocket-Version: 013", 'could not parse HTTP Sec-WebSocket-Version header "013" in opening handshake'),
        (b"Sec-WebSocket-Version: 13, 8", 'could not parse HTTP Sec-WebSocket-Version header "13, 8" in opening hand'),
        (b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Version: 13", "Sec-WebSocket-Version header appears more than o"),
    ],
)
def test_other_version(version, reason):
    """The answer names the supported versions (section 4.4)."""
    status, detail, headers = refusal(b"\r\nSec-WebSocket-Version: 13", b"\r\n" + version if version else b"")
    assert (status, headers) == (400, {"Sec-WebSocket-Version": "13,8"})
    assert reason in detail


def test_many_protocols():
    """As many as fit into a head are read, and compared by hash: comparing all pairs took a quarter of a second."""
    offered = b"Sec-WebSocket-Protocol: " + b",".join(b"%x" % number for number in range(3000))
    assert len(read_upgrade(parse(HEAD + b"\r\n" + offered)).protocols) == 3000
    assert refusal(b"\r\nHost: ", b"\r\n" + offered + b",0\r\nHost: ")[1].startswith('duplicate protocol "0"')


def test_other_method():
    """The answer names the allowed one."""
    assert refusal(b"GET", b"POST") == (405, 'HTTP method "POST" not allowed', {"Allow": "GET"})


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_other_version_of_http(version):
    detail = f'Unsupported HTTP version "HTTP/{version}"'
    assert refusal(b"HTTP/1.1", b"HTTP/" + version.encode()) == (505, detail, {})


def test_answer_is_that_of_the_rfcs_example():
    answer = switch("dGhlIHNhbXBsZSBub25jZQ==", None, "chatd")
    assert answer.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
    assert b"Sec-WebSocket-Protocol" not in answer
    assert b"Sec-WebSocket-Extensions" not in answer
    assert answer.endswith(b"\r\n\r\n")


def test_answer_names_the_chosen_subprotocol():
    assert b"\r\nSec-WebSocket-Protocol: chat.v1\r\n" in switch("dGhlIHNhbXBsZSBub25jZQ==", "chat.v1", "chatd")


def test_extensions_of_all_lines_are_read():
    head = HEAD + b"\r\nSec-WebSocket-Extensions: foo\r\nSec-WebSocket-Extensions: permessage-deflate"
    assert upgrade(head).extensions == "foo, permessage-deflate"


def test_answer_names_the_chosen_extension():
    assert b"\r\nSec-WebSocket-Extensions: x; y=1\r\n" in switch("dGhlIHNhbXBsZSBub25jZQ==", None, "chatd", "x; y=1")


def test_magic_is_autobahns():
    assert MAGIC == WebSocketServerProtocol._WS_MAGIC


def test_versions_are_autobahns():
    """Autobahn reads the frames of every version that is accepted."""
    assert sorted(map(int, VERSIONS)) == WebSocketServerProtocol.SUPPORTED_PROTOCOL_VERSIONS
