"""The client with tokens, against real servers."""

import re
import subprocess
import sys

import pytest
from support.loops import drive
from support.raw_clients import RawMember
from support.servers import ROOT, Lines, Server, environment, post
from support.tokens import SECRET, token
from support.watches import Watch
from twisted.internet.defer import Deferred

from chatd.client.client import Client
from chatd.client.protocol import Backoff, Rejected
from chatd.messages import Code
from chatd.transport.framing import EXPIRED
from chatd.transport.identity import LEEWAY_SECONDS

SOON = 3 - LEEWAY_SECONDS
"""The seconds until the expiry of a token whose connection closes in three."""


@pytest.fixture
def server(tmp_path):
    """A server that asks for tokens."""
    (tmp_path / "jwt.key").write_bytes(SECRET)
    with Server(tmp_path, "--jwt-key=jwt.key") as server:
        yield server


class Issuer:
    """A function that returns the next token, and the last one again and again."""

    def __init__(self, loop, *tokens):
        self._loop = loop
        self._tokens = tokens
        self._waits = {}
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls in self._waits:
            self._loop.callLater(0, self._waits[self.calls].callback, None)  # after the client has sent the token
        return self._tokens[min(self.calls, len(self._tokens)) - 1]

    def called(self, count):
        """Wait until so many tokens were asked for, and the client has sent the last one."""
        return self._waits.setdefault(count, Deferred())


def join(loop, server, tokens, path=""):
    """Start a client in a room; return it and its listener."""
    watch = Watch()
    client = Client(loop, f"{server.url}{path}", watch, token=tokens, backoff=Backoff(0.01, 0.02))
    client.start()
    return client, watch


async def rejected(post):
    """Return the code with which a post is rejected."""
    try:
        await post
    except Rejected as error:
        return error.code
    return None


def test_token_as_text(server):
    """A token that is a text opens the connection; a post under another name is refused for good."""

    async def run(loop):
        client, _ = join(loop, server, token())
        found = (await client.post("ann", "hi")).id.number, await rejected(client.post("bob", "hi"))
        await client.stop()
        return found

    assert drive(run) == (3, Code.FORBIDDEN)


def test_renewal_before_the_expiry(server):
    """The client sends the next token on the same connection, and its permissions hold from then on."""

    async def run(loop):
        issuer = Issuer(loop, token(lasts=3, chatd={"post": []}), token())
        client, watch = join(loop, server, issuer)
        renewed = issuer.called(2)
        assert await rejected(client.post("ann", "too early")) == Code.FORBIDDEN
        await renewed
        await client.post("ann", "hi")
        await client.stop()
        return watch.kinds(), issuer.calls

    assert drive(run) == (["on_history", "on_connect", "on_entries"], 2)


def test_expired_token_from_a_function(server):
    """After the close the client resumes with the next token, and misses nothing."""

    async def run(loop):
        issuer = Issuer(loop, token(lasts=SOON), token())
        client, watch = join(loop, server, issuer)
        _, reason, _ = await watch.until("on_disconnect")
        await client.post("ann", "hi")
        await client.stop()
        return reason, watch.kinds().count("on_history"), watch.numbers, issuer.calls

    assert drive(run) == (f"closed with 1008 {EXPIRED}", 1, [1, 2, 3], 2)


def test_expired_token_as_text(server):
    """A client without another token ends with the first one, and so do its posts."""

    async def run(loop):
        client, watch = join(loop, server, token(lasts=SOON))
        _, error = await watch.until("on_reject")
        return error.code, str(error), await rejected(client.post("ann", "hi"))

    assert drive(run) == (1008, f"closed with 1008 {EXPIRED}", 1008)


@pytest.mark.parametrize(
    ("status", "claims", "attempts"),
    [
        (401, {"lasts": -2 * LEEWAY_SECONDS}, (1, 2)),
        (401, {"secret": b"another secret of at least 32 bytes"}, (1, 2)),
        (403, {"chatd": {"read": ["b"]}}, (1, 1)),
    ],
    ids=["expired", "forged", "forbidden"],
)
@pytest.mark.parametrize("how", ["text", "function"])
def test_refused_token(server, status, claims, attempts, how):
    """The client gives up at the first refusal, and a function may return another token once after a 401."""

    async def run(loop):
        issuer = Issuer(loop, token(**claims))
        client, watch = join(loop, server, issuer() if how == "text" else issuer, "rooms/a")
        post = client.post("ann", "hi")
        _, error = await watch.until("on_reject")
        return error.code, await rejected(post), watch.kinds().count("on_reject")

    assert drive(run) == (status, status, 1)
    count = attempts[how == "function"]
    server.log.wait(rf"refused: {status}", count)
    server.stop()
    assert server.log.text.count(f"refused: {status}") == count


def test_program_of_the_page(tmp_path, server):
    """The program of docs/identity.md reads its token from a file, and prints what others post."""
    page = (ROOT / "docs" / "identity.md").read_text("utf-8")
    program = re.search(r"(?s)<!-- test: client -->\n```python\n(.*?)```", page)[1].replace("8085", str(server.port))
    (tmp_path / "token").write_text(f"{token()}\n")
    command = [sys.executable, "-u", "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        lines = Lines(process.stdout)
        server.log.wait("joined team")
        with RawMember(server.port, "/rooms/team", Authorization=f"Bearer {token('bob')}") as bob:
            bob.send(post("bob", "hi from bob"))
            assert "hi from bob" in lines.wait("hi from bob")[0].string
        process.kill()
        lines.close()
