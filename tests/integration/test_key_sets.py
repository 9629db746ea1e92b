"""Key sets from a real HTTP server, which rotates, fails, hangs and lies."""

import contextlib
import gzip
import json
import ssl
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.loops import drive
from support.servers import LONG, certificate_for
from support.threads import serving
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import formatEvent

from chatd.transport import jwks
from chatd.transport.admission import HttpError
from chatd.transport.identity import Identity
from chatd.transport.jwks import MAX_SET, UNKNOWN_SECONDS, Fetcher, KeyUrl
from chatd.transport.tokens import Tokens

KEYS = {kid: ec.generate_private_key(ec.SECP256R1()) for kid in ("old", "new", "never")}


def key_set(*kids, **fields):
    """Return a set with the public keys of these ids."""
    algorithm = jwt.get_algorithm_by_name("ES256")
    keys = [algorithm.to_jwk(KEYS[kid].public_key(), as_dict=True) | {"kid": kid} | fields for kid in kids]
    return json.dumps({"keys": keys}).encode()


def token(kid):
    return jwt.encode({"sub": "ann", "exp": time.time() + 3600}, KEYS[kid], "ES256", {"kid": kid})


class Provider(ThreadingHTTPServer):
    """A server of a key set, on a free port."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/jwks"
        self.asked = []
        self.dropped = Event()
        self.status, self.headers, self.body, self.cut = 200, {}, key_set("old"), False
        self.endless = b""

    def handle_error(self, *_):
        """Print no traceback of a connection that the client has dropped."""


class Handler(BaseHTTPRequestHandler):
    """Answers with what the test has set."""

    def do_GET(self):
        provider = self.server
        provider.asked.append(self.path)
        if provider.status:
            self.send_response(provider.status)
            for name, value in provider.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(provider.body) + provider.cut))
            self.end_headers()
            self.wfile.write(provider.body)
            self.wfile.flush()
        if provider.cut and "Connection" in provider.headers:
            return  # and close
        if provider.endless:
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx: y\r\n")
                while True:
                    self.wfile.write(provider.endless)
        if provider.cut or not provider.status:
            with contextlib.suppress(OSError):
                self.rfile.read(1)  # returns when the client gives up
            provider.dropped.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def provider():
    with serving(Provider()) as server:
        yield server


def verifying(provider, *steps):
    """Run steps, each a coroutine function of the keys, the tokens and the clock, against one key source."""

    async def run(loop):
        clock = Clock()
        keys = KeyUrl(provider.url, clock, Fetcher(loop).fetch)
        keys.loop = loop
        tokens = Tokens(keys, now=clock.seconds)

        async def verify(kid):
            try:
                found = tokens.identify(f"Bearer {token(kid)}", None)
                return (found if isinstance(found, Identity) else await found).subject
            except HttpError as refused:
                return refused.status.value

        keys.look()
        for step in steps:
            await step(keys, verify, clock)

    drive(run)


async def first(_, verify, clock):
    """A handshake during the first fetch waits for it."""
    assert await verify("old") == "ann"
    clock.advance(UNKNOWN_SECONDS)


def test_rotation(provider):
    """A token that names a new key makes the server fetch the set; a key that left the set is out of force."""

    async def rotate(_, verify, clock):
        provider.body = key_set("new")
        assert await verify("new") == "ann"
        assert await verify("old") == 401
        assert await verify("never") == 401
        assert len(provider.asked) == 2  # once a minute
        clock.advance(UNKNOWN_SECONDS)
        assert await verify("never") == 401
        assert len(provider.asked) == 3

    verifying(provider, first, rotate)
    assert {*provider.asked} == {"/jwks"}


LIES = {
    "status": {"status": 500},
    "forbidden": {"status": 403, "body": key_set("new")},
    "empty": {"status": 204, "body": b""},
    "redirect": {"status": 302, "headers": {"Location": "/other"}},
    "page": {"body": b"<html>", "headers": {"Content-Type": "text/html"}},
    "no set": {"body": b"[]"},
    "no keys": {"body": b'{"keys":[]}'},
    "two keys of one id": {"body": b'{"keys":[%b,%b]}' % ((key_set("new")[9:-2],) * 2)},
    "another use": {"body": key_set("new", use="enc")},
    "another algorithm": {"body": key_set("new", alg="HS256")},
    "secret": {"body": b'{"keys":[{"kty":"oct","kid":"new","k":"c2VjcmV0"}]}'},
    "private": {"body": key_set("new", d="AAAA")},
    "huge": {"body": key_set("new") + b" " * MAX_SET},
    "cut": {"body": key_set("new"), "cut": True, "headers": {"Connection": "close"}},
    "huge at once": {"body": b" " * 4 * MAX_SET},
    "compressed": {"body": gzip.compress(key_set("new")), "headers": {"Content-Encoding": "gzip"}},
}


@pytest.mark.parametrize("lie", LIES)
def test_failing_or_lying_server(provider, lie):
    """A server that fails or lies leaves the old keys in force, and its keys are not used."""

    async def deceive(keys, verify, _):
        for name, value in LIES[lie].items():
            setattr(provider, name, value)
        assert await verify("new") == 401
        assert await verify("old") == "ann"
        assert (len(keys.keyring), provider.asked) == (1, ["/jwks"] * 2)

    verifying(provider, first, deceive)


@pytest.mark.parametrize("stage", ["before the head", "in the body"])
def test_hanging_server(provider, stage, monkeypatch):
    """A server that hangs costs its clients the time limit, and then its connection is dropped."""

    async def hang(keys, verify, _):
        monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.1)
        provider.body = key_set("new")
        if stage == "in the body":
            provider.cut = True
        else:
            provider.status = 0
        assert await verify("new") == 401
        assert await verify("old") == "ann"
        loop = keys.loop
        assert await deferToThreadPool(loop, loop.getThreadPool(), provider.dropped.wait, LONG)

    verifying(provider, first, hang)


@pytest.mark.parametrize("head", ["x: y" * 20, " folded" * 20], ids=["headers", "folded header"])
def test_endless_head(provider, head, events):
    """An answer whose head never ends is dropped when it is too long, and not only when its time is over."""

    async def flood(keys, verify, _):
        provider.status, provider.endless = 0, f"{head}\r\n".encode() * 100
        assert await verify("new") == 401
        assert await verify("old") == "ann"
        loop = keys.loop
        assert await deferToThreadPool(loop, loop.getThreadPool(), provider.dropped.wait, LONG)

    verifying(provider, first, flood)
    assert any("answered with more than 256 KiB" in formatEvent(event) for event in events)


def test_untrusted_certificate(tmp_path, events):
    """A server whose certificate the machine does not trust is asked for nothing."""
    certificate_for(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    provider = Provider()
    provider.socket = context.wrap_socket(provider.socket, server_side=True)
    provider.url = provider.url.replace("http:", "https:")

    async def refuse(_, verify, __):
        assert await verify("old") == 503

    with serving(provider):
        verifying(provider, refuse)
    assert provider.asked == []
    assert any("no token can be verified" in formatEvent(event) for event in events)


def test_server_that_is_down_at_the_start(provider):
    """Without any key a client may come again later, and does after the server has answered."""

    async def down(_, verify, clock):
        provider.status = 500
        assert await verify("old") == 503
        provider.status = 200
        assert await verify("old") == 503  # nothing is fetched for it

    async def up(keys, verify, clock):
        clock.advance(jwks.RETRY_SECONDS)
        keys.look()
        assert await verify("old") == "ann"

    provider.status = 500
    verifying(provider, down, up)


def test_unreachable_server(provider):
    """A port that nobody listens on is a failure like every other one."""
    provider.url = "http://127.0.0.1:1/jwks"

    async def refuse(keys, verify, _):
        assert await verify("old") == 503
        assert keys.keyring is None

    verifying(provider, refuse)
