"""Keys that verify tokens: which files and key sets are accepted, and for which algorithms."""

import contextlib
import json

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE
from support.servers import certificate_for

from chatd.transport.keyring import EDDSA, HMAC, MAX_KEYS, RSA, SECRET_BYTES, Key, Keyring, read_jwks, read_key

RSA_KEY = rsa.generate_private_key(65537, 2048)
WEAK_KEY = rsa.generate_private_key(65537, 1024)
P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
SECRET = b"s" * SECRET_BYTES


def pem(key, kind=serialization.PublicFormat.SubjectPublicKeyInfo):
    return key.public_key().public_bytes(serialization.Encoding.PEM, kind)


def private_pem(key):
    no = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no)


def jwk(key, **fields):
    """Return the public half of a key as a member of a set."""
    kind = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    name = next((name for one, name in kind.items() if isinstance(key, one)), "EdDSA")
    return jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True) | fields


def by_words(value):
    """Name a test by the words that it expects, because keys differ from run to run."""
    return value if isinstance(value, str) else "data"


def key_set(*keys):
    return json.dumps({"keys": keys}).encode()


@pytest.mark.parametrize(
    ("key", "algorithms"),
    [
        (RSA_KEY, RSA),
        (P256, ("ES256",)),
        (ec.generate_private_key(ec.SECP384R1()), ("ES384",)),
        (ec.generate_private_key(ec.SECP521R1()), ("ES512",)),
        (ec.generate_private_key(ec.SECP256K1()), ("ES256K",)),
        (ED25519, EDDSA),
        (ed448.Ed448PrivateKey.generate(), EDDSA),
    ],
)
def test_pem_file_allows_asymmetric_algorithms(key, algorithms):
    """The type of a public key decides which algorithms its signatures may have."""
    found = read_key(b"\n" + pem(key)).find("any kid")
    assert found.algorithms == algorithms
    assert found.material == key.public_key()


def test_pem_of_pkcs1():
    """The older form of an RSA key in PEM is read too."""
    data = pem(RSA_KEY, serialization.PublicFormat.PKCS1)
    assert read_key(data).find(None).algorithms == RSA


@pytest.mark.parametrize(
    ("data", "secret"), [(SECRET, SECRET), (SECRET + b"\n", SECRET), (SECRET + b"\r\n", SECRET), (SECRET + b" ",) * 2]
)
def test_other_file_is_a_secret(data, secret):
    """Any other file is a secret for HS256, without the newline at its end."""
    assert read_key(data).find("any kid") == Key(secret, HMAC)


def der(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def ssh(key):
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds a secret of 0 bytes"),
        (b"s" * (SECRET_BYTES - 1) + b"\n", f"holds a secret of {SECRET_BYTES - 1} bytes"),
        (private_pem(P256), "holds a private key"),
        (private_pem(RSA_KEY) + pem(RSA_KEY), "holds a private key"),
        (pem(RSA_KEY) * 2, "holds several keys"),
        (b"comment before the key\n" + pem(RSA_KEY), "is PEM, but no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----", "cannot be read"),
        (pem(WEAK_KEY), "for no algorithm"),
        (pem(x25519.X25519PrivateKey.generate()), "for no algorithm"),
        (pem(dsa.generate_private_key(1024)), "for no algorithm"),
        (pem(ec.generate_private_key(ec.BrainpoolP256R1())), "for no algorithm"),
        (der(RSA_KEY), "is a public key, but not in PEM"),
        (ssh(ED25519), "is a public key, but not in PEM"),
        (ssh(P256), "is a public key, but not in PEM"),
        (key_set(jwk(P256)), "is JSON"),
    ],
    ids=by_words,
)
def test_file_without_a_usable_key(data, words):
    """Whatever may be no secret is never used as one; the reason is one line that quotes nothing of the file."""
    with pytest.raises(ValueError, match=words) as refused:
        read_key(data)
    assert "\n" not in str(refused.value)


def test_certificate(tmp_path):
    """A certificate is refused, because nothing would check when it ends."""
    certificate_for(tmp_path)
    with pytest.raises(ValueError, match="holds a certificate"):
        read_key((tmp_path / "cert.pem").read_bytes())


# Key sets


def test_key_set():
    """A token finds its key by the kid; an algorithm that the set names is the only one."""
    ring = read_jwks(key_set(jwk(RSA_KEY, kid="a", alg="RS256", use="sig"), jwk(P256, kid="b", key_ops=["verify"])))
    assert len(ring) == 2
    assert (ring.find("a").algorithms, ring.find("b").algorithms) == (("RS256",), ("ES256",))
    assert ring.find("c") is ring.find(None) is None


def test_key_set_of_one_key():
    """A token without a kid can mean only a key that is alone."""
    ring = read_jwks(key_set(jwk(ED25519, kid="a")))
    assert ring.find(None).algorithms == EDDSA
    assert ring.find("b") is None


def test_key_without_an_id():
    """A key without a kid in a set serves tokens without one."""
    ring = read_jwks(key_set(jwk(P256), jwk(RSA_KEY, kid="a")))
    assert (ring.find(None).algorithms, ring.find("a").algorithms) == (("ES256",), RSA)


@pytest.mark.parametrize(
    "other",
    [
        jwk(RSA_KEY, use="enc"),
        jwk(RSA_KEY, alg="RSA-OAEP"),
        jwk(RSA_KEY, alg="HS256"),
        jwk(RSA_KEY, alg="none"),
        jwk(RSA_KEY, alg=["RS256"]),
        jwk(RSA_KEY, key_ops=["encrypt"]),
        jwk(RSA_KEY, key_ops="verify"),
        jwk(RSA_KEY, kid=7),
        jwk(RSA_KEY, n="AQAB"),
        jwk(RSA_KEY, n="!"),
        jwk(RSA_KEY, n=7),
        jwk(RSA_KEY, n="a"),
        jwk(WEAK_KEY),
        jwk(P256, crv="P-999"),
        jwk(P256, crv=7),
        jwk(P256, x="AAAA"),
        jwk(ED25519, crv="X25519"),
        jwk(ED25519, x=""),
        {"kty": "RSA"},
        {"kty": "AKP", "pub": "AAAA"},
        {"kty": ["RSA"]},
        {},
    ],
)
def test_other_keys_of_a_set_are_left_out(other):
    """A key for another use, or of an unknown kind, takes nothing from the others (RFC 7517, section 5)."""
    good = jwk(P256, kid="good")
    ring = read_jwks(key_set({"kid": "other"} | other, good))
    assert (len(ring), ring.find("other")) == (1, None)
    with pytest.raises(ValueError, match="holds no key that can verify a token"):
        read_jwks(key_set(other))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON"),
        (b"<html>", "is not JSON"),
        (b"[" * 5000, "is not JSON"),
        (b"[]", "is no JSON Web Key Set"),
        (b'{"keys":{}}', "is no JSON Web Key Set"),
        (b'{"keys":[7]}', "is no JSON Web Key Set"),
        (b'{"keys":[]}', "holds no key"),
        (key_set(*[{"kty": "x"}] * (MAX_KEYS + 1)), "holds more than 100 keys"),
        (key_set(jwk(P256, kid="a"), jwk(RSA_KEY, kid="a")), "holds two keys with one id"),
        (key_set(jwk(P256), jwk(RSA_KEY)), "holds two keys with one id"),
        (key_set(jwk(P256), {"kty": "oct", "k": "c2VjcmV0"}), "holds a secret or private key"),
        (key_set(jwk(P256), {"kty": "oct"}), "holds a secret or private key"),
        (key_set(jwk(P256, d="AAAA")), "holds a secret or private key"),
        (key_set(jwk(RSA_KEY, use="enc", p="AAAA")), "holds a secret or private key"),
    ],
    ids=by_words,
)
def test_malformed_key_set(data, words):
    """A set that is malformed, ambiguous, or holds what nobody may publish, is refused as a whole."""
    with pytest.raises(ValueError, match=words):
        read_jwks(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["RSA", "EC", "OKP", "sig", "P-256", "AQAB", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"nexy", "kty", "crv"]), inner),
    max_leaves=8,
)


@REPEATABLE
@given(fields=st.dictionaries(st.sampled_from(["kty", "kid", "use", "alg", "crv", *"nexyd", "key_ops"]), JSON))
def test_any_key_of_a_set_is_read_or_refused(fields):
    """Whatever a set holds, reading it returns keys or raises ValueError."""
    with contextlib.suppress(ValueError):
        assert isinstance(read_jwks(key_set(fields, jwk(P256, kid="good"))), Keyring)
