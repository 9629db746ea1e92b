"""Tokens: how a request carries one, what makes it valid, and what it permits."""

import base64
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE, result_of
from support.tokens import SECRET, HeldKeys, token, verifier
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import formatEvent

from chatd.messages import Code
from chatd.transport.admission import HttpError, JoinRequest
from chatd.transport.identity import ANYONE, LEEWAY_SECONDS
from chatd.transport.keyring import EDDSA, RSA, Key, Keyring, read_key
from chatd.transport.tokens import LOG_SECONDS, MAX_PATTERNS, MAX_SUBJECT, MAX_TOKEN, Tokens, admit, check_reading

RSA_KEY = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
PEM = RSA_KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def known(keyring):
    """Keys that are there."""
    keys = HeldKeys()
    keys.come(keyring)
    return keys


def refused(call, *arguments, status=401):
    """Return the error that a call raises, or its Deferred fails with, which must look like every other one."""

    def outcome():
        found = call(*arguments)
        return result_of(found) if isinstance(found, Deferred) else found

    with pytest.raises(HttpError) as raised:
        outcome()
    error = raised.value
    assert error.status == status
    if status == 401:
        assert (str(error), error.code) == ("a valid token is required", Code.TOKEN_REFUSED)
    return error


def unsigned(header, claims, signature=b""):
    """Compose a token with any header and signature."""
    parts = [header if isinstance(header, bytes) else json.dumps(header).encode(), json.dumps(claims).encode()]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in [*parts, signature])


CLAIMS = {"sub": "ann", "exp": int(time.time()) + 3600}


# What makes a token valid


def test_claims_of_a_token():
    """The subject, the username, the expiry and the permissions are those of the token."""
    now = int(time.time())
    found = verifier(username="name").verify(
        token("u-1", 60, name="Ann", chatd={"read": ["team-*"], "moderate": ["a"]})
    )
    assert (found.subject, found.username) == ("u-1", "Ann")
    assert now + 60 <= found.expires <= now + 65
    assert [found.may_read("team-a"), found.may_read("main"), found.may_post("main")] == [True, False, True]
    assert [found.may_moderate("a"), found.may_moderate("b")] == [True, False]


def test_permissions_by_default():
    """Without the claim a client reads and posts everywhere, and moderates nothing."""
    found = verifier().verify(token())
    assert [found.may_read("x"), found.may_post("x"), found.may_moderate("x")] == [True, True, False]


@pytest.mark.parametrize(
    ("key", "algorithm", "ring"),
    [
        (RSA_KEY, "RS256", Keyring({None: Key(RSA_KEY.public_key(), RSA)}, by_id=False)),
        (RSA_KEY, "PS512", read_key(PEM)),
        (P256, "ES256", Keyring({"k": Key(P256.public_key(), ("ES256",))}, by_id=True)),
        (ED25519, "EdDSA", Keyring({"k": Key(ED25519.public_key(), EDDSA)}, by_id=True)),
        (SECRET, "HS256", read_key(SECRET)),
    ],
)
def test_algorithms(key, algorithm, ring):
    """A token is verified with the key that it names, under an algorithm of that key."""
    signed = jwt.encode(CLAIMS, key, algorithm, {"kid": "k"})
    assert verifier(known(ring)).verify(signed).subject == "ann"


def test_audience_and_issuer():
    """The audience and the issuer are those of the options; without the option no token may have an audience."""
    strict = verifier(audience="chat", issuer="https://login.example/")
    assert strict.verify(token(aud=["other", "chat"], iss="https://login.example/")).subject == "ann"
    for claims in (
        {"aud": "other", "iss": "https://login.example/"},
        {"aud": ["chat "], "iss": "https://login.example/"},
        {"aud": "chat", "iss": "https://login.example"},
        {"aud": "chat"},
        {"iss": "https://login.example/"},
        {},
    ):
        refused(strict.verify, token(**claims))
    refused(verifier().verify, token(aud="chat"))
    assert verifier().verify(token(iss="anyone")).subject == "ann"


@pytest.mark.parametrize(
    ("claims", "valid"),
    [
        ({"lasts": 0}, True),
        ({"lasts": 10 - LEEWAY_SECONDS}, True),
        ({"lasts": -LEEWAY_SECONDS}, False),
        ({"nbf": int(time.time()) + 30}, True),
        ({"nbf": int(time.time()) + 3600}, False),
        ({"iat": int(time.time()) + 3600}, False),
        ({"nbf": "soon"}, False),
        ({"exp": None}, False),
        ({"exp": "never"}, False),
        ({"exp": float("inf")}, False),
        ({"exp": float("nan")}, False),
        ({"exp": 1e308}, True),
        ({"exp": 10**400}, True),
        ({"exp": {}}, False),
    ],
)
def test_times(claims, valid):
    """A token has an expiry, and clocks may differ by the leeway."""
    if valid:
        assert verifier().verify(token(**claims)).subject == "ann"
    else:
        refused(verifier().verify, token(**claims))


@pytest.mark.parametrize(
    "sub", [None, "", 7, ["ann"], "s" * (MAX_SUBJECT + 1), "\ud800"], ids=["none", "empty", "7", "list", "long", "lone"]
)
def test_subject(sub):
    """The subject is a text that can be stored with each message."""
    refused(verifier(username="name").verify, token(sub, name="ann"))
    assert verifier(username="name").verify(token("s" * MAX_SUBJECT, name="ann")).username == "ann"


@pytest.mark.parametrize(
    "name", [None, "", 7, {}, "n" * 31, "\udfff"], ids=["none", "empty", "7", "dict", "long", "lone"]
)
def test_username_claim(name):
    """The claim with the username is a valid username."""
    refused(verifier(username="name").verify, token(name=name))


@pytest.mark.parametrize(
    "claim",
    [
        None,
        [],
        "read",
        {"reads": ["*"]},
        {"read": "*"},
        {"read": [7]},
        {"read": ["Team"]},
        {"read": [""]},
        {"post": ["team-*", "a b"]},
        {"moderate": None},
        {"read": [f"room-{number}-*" for number in range(MAX_PATTERNS + 1)]},
    ],
)
def test_malformed_permissions(claim):
    """A claim that is misspelt grants nothing, and so does one whose patterns would take too long to read."""
    signed = jwt.encode(CLAIMS | {"chatd": claim}, SECRET, "HS256")
    refused(verifier().verify, signed)


def test_many_rooms():
    """A list may name as many rooms as fit into a token, beside its patterns."""
    names = [f"room-{number}" for number in range(400)]
    found = verifier().verify(token(chatd={"read": [*names, *(f"{name}-*" for name in names[:MAX_PATTERNS])]}))
    assert [found.may_read(name) for name in ("room-399", "room-400", "room-99-a", "room-100-a")] == [True, False] * 2
    assert (len(found.permissions.read.names), len(found.permissions.read.patterns)) == (400, MAX_PATTERNS)


# Attacks


def public_as_secret():
    """Sign with the text of the public key, which an attacker knows, as an HMAC secret."""
    header, claims = {"alg": "HS256", "typ": "JWT"}, CLAIMS
    signing = unsigned(header, claims).rpartition(".")[0]
    hmac = jwt.get_algorithm_by_name("HS256")
    return unsigned(header, claims, hmac.sign(signing.encode(), PEM))


def tampered():
    """Change the claims of a signed token."""
    header, _, signature = token().split(".")
    return f"{header}.{unsigned({}, CLAIMS | {'sub': 'root'}).split('.')[1]}.{signature}"


ATTACKS = {
    "none": unsigned({"alg": "none"}, CLAIMS),
    "None": unsigned({"alg": "None"}, CLAIMS, b"x"),
    "no algorithm": unsigned({}, CLAIMS, b"x"),
    "algorithm no text": unsigned({"alg": ["HS256"]}, CLAIMS, b"x"),
    "another secret": token(secret=b"another secret of at least 32 bytes"),
    "another algorithm": jwt.encode(CLAIMS, SECRET * 2, "HS512"),
    "tampered": tampered(),
    "asymmetric": jwt.encode(CLAIMS, P256, "ES256"),
    "empty": "",
    "no token": "xyz",
    "dots": "..",
    "two parts": token().rpartition(".")[0],
    "four parts": token() + ".x",
    "spaces": f" {token()}",
    "not ASCII": token() + "é",
    "newline": token() + "\n",
    "header no JSON": unsigned(b"{", CLAIMS, b"x"),
    "header a list": unsigned(b"[]", CLAIMS, b"x"),
    "nested header": unsigned(b"[" * 3000, CLAIMS, b"x"),
    "kid no text": unsigned({"alg": "HS256", "kid": {}}, CLAIMS, b"x"),
    "critical": unsigned({"alg": "HS256", "crit": ["x"], "x": 1}, CLAIMS, b"x"),
    "detached": unsigned({"alg": "HS256", "b64": False, "crit": ["b64"]}, CLAIMS, b"x"),
    "claims a list": jwt.api_jws.encode(b"[]", SECRET, "HS256"),
    "claims no JSON": jwt.api_jws.encode(b"{", SECRET, "HS256"),
    "issuer no text": jwt.api_jws.encode(json.dumps(CLAIMS | {"iss": 7, "chatd": 7}).encode(), SECRET, "HS256"),
    "nested claims": jwt.api_jws.encode(b"[" * 3000, SECRET, "HS256"),
    "oversized": token(x="x" * MAX_TOKEN),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_forged_token(attack, logged):
    """A forged token is refused in one fixed wording, and neither the answer nor the log quotes it."""
    forged = ATTACKS[attack]
    error = refused(verifier().verify, forged)
    assert error.headers == {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    (line,) = logged
    parts = [part for part in forged.split(".") if len(part) > 3]
    assert line.startswith("a token is refused: ")
    assert not any(part in line for part in parts)


def test_public_key_as_secret():
    """No algorithm of a token makes a public key a secret (RFC 8725, section 2.1)."""
    refused(verifier(known(read_key(PEM))).verify, public_as_secret())
    ring = Keyring({None: Key(PEM, ("HS256",))}, by_id=False)  # the control: such a keyring would not help either
    refused(verifier(known(ring)).verify, public_as_secret())


def test_largest_token():
    """A token of 8 KiB is read."""
    size = MAX_TOKEN - len(token(x=""))
    signed = token(x="x" * (size * 3 // 4 - 2))
    assert MAX_TOKEN - 8 < len(signed) <= MAX_TOKEN
    assert verifier().verify(signed).subject == "ann"


@REPEATABLE
@given(text=st.text(max_size=50) | st.binary(max_size=60).map(lambda data: unsigned(data, {}, data)))
def test_any_text_is_refused(text):
    """Whatever a client sends, it is refused without another exception."""
    refused(verifier().verify, text)


@REPEATABLE
@given(
    claims=st.dictionaries(
        st.sampled_from(["sub", "exp", "nbf", "iat", "aud", "iss", "jti", "chatd", "name"]),
        st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2),
    )
)
def test_any_claims_are_refused_or_read(claims):
    """Whatever a trusted issuer signs, it gives an identity or is refused."""
    signed = jwt.api_jws.encode(json.dumps(CLAIMS | claims).encode(), SECRET, "HS256")
    try:
        found = verifier().verify(signed)
    except HttpError as error:
        assert error.status == 401  # noqa: PT017 -- both outcomes are good
    else:
        assert found.subject == found.username


# The log


@pytest.fixture
def logged(monkeypatch):
    """The lines that the log gets."""
    events = []
    monkeypatch.setattr("chatd.transport.tokens._logger.observer", lambda event: events.append(formatEvent(event)))
    return events


def test_reasons_are_logged_once_a_minute(logged):
    """The log names each reason once a minute, so that a flood of tokens does not fill it."""
    clock, keys = Clock(), HeldKeys()
    keys.come()
    tokens = Tokens(keys, now=clock.seconds)
    for _ in range(3):
        refused(tokens.verify, "x")
        refused(tokens.verify, token(lasts=-3600))
    assert logged == ["a token is refused: it is malformed", "a token is refused: it has expired"]
    clock.advance(LOG_SECONDS)
    refused(tokens.verify, "x")
    assert len(logged) == 3


# How a request carries a token


def test_carriers():
    """A token comes as a bearer header, as a subprotocol, or as the cookie that the option names."""
    good, tokens = token(), verifier(cookie="chat")
    for carried in (
        (f"Bearer {good}", None),
        (f"bearer  {good} ", None),
        (None, f"chat={good}"),
        (None, f'a=b; chat="{good}" ;c'),
        (None, None, ["chat.v1", f"bearer.{good}"]),
        ("Basic YW5uOg==", f"chat={good}"),
        (f"Bearer {good}", f"chat={good}", [f"bearer.{good}"]),
    ):
        assert tokens.identify(*carried).subject == "ann"


def test_request_without_a_token():
    """A request without a token is challenged without an error code (RFC 6750, section 3.1)."""
    for carried in (
        (None, None),
        ("Basic x", "other=x"),
        ("Bearer", None),
        (None, f"chat={token()}"),
        (None, None, ["x"]),
    ):
        assert refused(verifier().identify, *carried).headers == {"WWW-Authenticate": "Bearer"}


def test_two_tokens():
    """A request that carries two different tokens is refused, whatever carries them."""
    one, other, tokens = token("ann"), token("bob"), verifier(cookie="chat")
    for carried in (
        (f"Bearer {one}", f"chat={other}"),
        (f"Bearer {one}", None, [f"bearer.{other}"]),
        (f"Bearer {one}, Bearer {one}", None),
        (None, f"chat={one}; chat={other}"),
        (None, None, [f"bearer.{one}", "bearer."]),
        (f"Bearer {one}", "chat="),
    ):
        refused(tokens.identify, *carried)


# Keys that come later


def test_unknown_key_waits_for_the_set():
    """A token whose key is unknown waits for the set, and is verified again."""
    keys = HeldKeys()
    keys.come(Keyring({"old": Key(SECRET, ("HS256",))}, by_id=True))
    signed = jwt.encode(CLAIMS, SECRET, "HS256", {"kid": "new"})
    found, other = (verifier(keys).identify(f"Bearer {signed}", None) for _ in range(2))
    assert not found.called
    keys.come(Keyring({"new": Key(SECRET, ("HS256",))}, by_id=True))
    assert (result_of(found).subject, result_of(other).subject) == ("ann", "ann")
    late = verifier(keys).verify(jwt.encode(CLAIMS, SECRET, "HS256", {"kid": "third"}))
    keys.come(keys.keyring)
    refused(lambda: late)


def test_key_that_comes_does_not_make_a_token_valid():
    """After the wait a token is verified like any other one."""
    keys = HeldKeys()
    waiting = verifier(keys).verify(token(secret=b"another secret of at least 32 bytes"))
    keys.come()
    refused(lambda: waiting)


def test_no_key_at_all():
    """Without any key the request may be repeated later; the fault is that of the readiness."""
    keys = HeldKeys()
    tokens = verifier(keys)
    assert tokens.fault == "no key to verify tokens"
    waiting = tokens.verify(token())
    keys.come(None)
    assert refused(lambda: waiting, status=503).code == Code.UNAVAILABLE
    keys.find_more = lambda: None
    refused(tokens.verify, token(), status=503)
    refused(tokens.verify, "x")
    keys.come()
    assert tokens.fault is None


def test_unknown_key_that_cannot_be_looked_for():
    """A token with an unknown key is refused at once if the set was fetched a moment ago."""
    keys = known(Keyring({"old": Key(SECRET, ("HS256",))}, by_id=True))
    keys.find_more = lambda: None
    refused(verifier(keys).verify, jwt.encode(CLAIMS, SECRET, "HS256", {"kid": "new"}))


# What a token permits


def test_admission():
    """A client enters the rooms that it may read, under its own name."""
    ann = verifier().verify(token(chatd={"read": ["team-*"]}))
    request = JoinRequest("team-a", None, frozenset(), None)
    assert admit(request, ann).identity is ann
    assert admit(request._replace(username="ann"), ann).username == "ann"
    for wrong in (request._replace(username="bob"), request._replace(room="main")):
        assert refused(admit, wrong, ann, status=403).code == Code.FORBIDDEN
    check_reading(ann, "team-a")
    check_reading(ANYONE, "main")
    refused(check_reading, ann, "main", status=403)
