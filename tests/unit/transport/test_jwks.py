"""Sources of keys: what keeps the old keys in force, and how often a set is fetched."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.tokens import SECRET
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.logger import formatEvent
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed

from chatd.transport.jwks import (
    LOG_SECONDS,
    REFRESH_SECONDS,
    RETRY_SECONDS,
    UNKNOWN_SECONDS,
    KeyFile,
    KeyUrl,
    check_url,
)
from chatd.transport.keyring import read_jwks, read_key

URL = "https://login.example/jwks?client=secret"
NAME = "https://login.example/jwks"


def key_set(*kids):
    """Return a set with new keys of these ids."""
    algorithm = jwt.get_algorithm_by_name("ES256")
    keys = [algorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True) for _ in kids]
    return json.dumps({"keys": [key | {"kid": kid} for key, kid in zip(keys, kids, strict=True)]}).encode()


@pytest.fixture
def logged(monkeypatch):
    """The lines that the log gets."""
    events = []
    monkeypatch.setattr("chatd.transport.jwks._logger.observer", lambda event: events.append(formatEvent(event)))
    return events


# Files


def test_key_file(tmp_path, logged):
    """A file is read at the start, and again at a reload; it has no more keys to find."""
    file = tmp_path / "jwks.json"
    file.write_bytes(key_set("a"))
    keys = KeyFile(file, read_jwks)
    file.write_bytes(key_set("b"))
    keys.look()
    assert keys.find_more() is None
    assert keys.keyring.find("a")
    keys.reload()
    assert (keys.keyring.find("a"), bool(keys.keyring.find("b"))) == (None, True)
    assert logged == [f"read the keys in {file}"]


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_key_file_that_cannot_be_read_again(tmp_path, logged, change):
    """A file that is missing or wrong at a reload leaves the old key in force."""
    file = tmp_path / "key"
    file.write_bytes(SECRET)
    keys = KeyFile(file, read_key)
    change(file)
    keys.reload()
    assert keys.keyring.find(None).material == SECRET
    (line,) = logged
    assert line.startswith(f"the old keys stay in force: {file} ")
    with pytest.raises(ValueError, match=f"^{file} (cannot be read|holds a secret)"):
        KeyFile(file, read_key)


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "https://login.example/jwks",
        "https://login.example:8443/a?b=c",
        "http://localhost:8080/jwks",
        "http://127.0.0.7/jwks",
        "http://[::1]:80/jwks",
    ],
)
def test_url_of_a_key_set(url):
    """A key set comes over TLS, or from this machine."""
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://login.example/jwks", "http://login.example could be answered by anyone on the way: use https"),
        ("http://127.0.0.1.example/", "use https"),
        ("http://192.168.0.1/", "use https"),
        ("ftp://login.example/", "is like"),
        ("https:///jwks", "is like"),
        ("https://login.example:0/", "is like"),
        ("https://login.example:x/", "is like"),
        ("https://[login/", "is like"),
        ("https://ann:secret@login.example/", "without a user"),
        ("https://login.example/#a", "without a user or a fragment"),
        ("https://login.example/a b", "is like"),
    ],
)
def test_other_urls(url, words):
    """Another URL is refused with one line, which quotes no password."""
    with pytest.raises(ValueError, match=words) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)


# Fetching


class FakeServer:
    """A server of a key set that answers when the test says so."""

    def __init__(self):
        self.asked = []

    def fetch(self, url):
        assert url == URL
        self.asked.append(Deferred())
        return self.asked[-1]

    def answers(self, result):
        self.asked[-1].callback(result)

    def fails(self, error=None):
        self.asked[-1].errback(Failure(error or ConnectError()))


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def keys(server, clock):
    return KeyUrl(URL, clock, server.fetch)


def watch(keys, clock, seconds):
    """Look each second."""
    for _ in range(seconds):
        clock.advance(1)
        keys.look()


def test_set_is_fetched_at_the_start_and_refreshed(keys, server, clock, logged):
    """A set is fetched at the first look, and again when it is old; the log names the URL without its query."""
    keys.look()
    keys.look()
    assert (len(server.asked), keys.keyring) == (1, None)
    server.answers(key_set("a", "b"))
    assert keys.keyring.find("a")
    watch(keys, clock, REFRESH_SECONDS - 1)
    assert len(server.asked) == 1
    watch(keys, clock, 1)
    assert len(server.asked) == 2
    server.answers(key_set("c", "d"))
    assert (keys.keyring.find("a"), bool(keys.keyring.find("c"))) == (None, True)
    assert logged == [f"fetched 2 keys from {NAME}"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectError(), "cannot be reached"),
        (DNSLookupError(), "cannot be reached"),
        (CancelledError(), "did not answer in 5 seconds"),
        (ValueError("answered with 500"), "answered with 500"),
        (ResponseFailed([Failure(ValueError("is cut"))]), "is cut"),
        (ResponseFailed([]), "failed (ResponseFailed)"),
    ],
)
def test_failure_keeps_the_old_keys(keys, server, clock, *, logged, error, words):
    """A fetch that fails leaves the old keys in force, and is repeated after a minute."""
    keys.look()
    server.answers(key_set("a"))
    clock.advance(REFRESH_SECONDS)
    keys.look()
    server.fails(error)
    assert keys.keyring.find("a")
    assert logged[1:] == [f"the old keys stay in force: {NAME} {words}"]
    watch(keys, clock, UNKNOWN_SECONDS - 1)
    assert len(server.asked) == 2
    watch(keys, clock, 1)
    assert len(server.asked) == 3


def test_failure_at_the_start(keys, server, clock, logged):
    """Without any key the fetch is repeated soon; the same fault is logged once a minute."""
    keys.look()
    server.fails()
    for attempt in range(2, 2 + LOG_SECONDS // RETRY_SECONDS):
        watch(keys, clock, RETRY_SECONDS)
        assert len(server.asked) == attempt
        server.fails()
    assert logged == [f"no token can be verified: {NAME} cannot be reached"] * 2
    watch(keys, clock, RETRY_SECONDS)
    server.answers(b"<html>")
    watch(keys, clock, RETRY_SECONDS)
    server.answers(key_set("a"))
    assert logged[2:] == [f"no token can be verified: {NAME} is not JSON", f"fetched 1 keys from {NAME}"]


def test_reload_fetches_now(keys, server, clock):
    """A reload fetches the set at once, unless that is under way."""
    keys.reload()
    keys.reload()
    assert len(server.asked) == 1
    server.answers(key_set("a"))
    keys.reload()
    assert len(server.asked) == 2


def test_unknown_keys_share_a_fetch_a_minute(keys, server, clock):
    """Tokens with unknown keys wait for one fetch, which happens at most once a minute."""
    assert keys.find_more() is None
    assert server.asked == []
    keys.look()
    first = keys.find_more()
    server.answers(key_set("a"))
    assert first.called
    assert keys.find_more() is None
    clock.advance(UNKNOWN_SECONDS)
    waiting = [keys.find_more() for _ in range(3)]
    assert len(server.asked) == 2
    assert not any(one.called for one in waiting)
    server.fails()
    assert all(one.called for one in waiting)
    assert keys.find_more() is None
    assert len(server.asked) == 2


def test_fetch_that_ends_at_once(clock):
    """A fetch that ends before it returns leaves nothing to wait for."""
    keys = KeyUrl(URL, clock, lambda _: succeed(key_set("a")))
    keys.look()
    clock.advance(UNKNOWN_SECONDS)
    assert keys.find_more() is None
