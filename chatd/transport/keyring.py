"""The keys that verify tokens, read from a file or from a JSON Web Key Set (RFC 7517).

A key has the algorithms that its type allows, so that no token chooses how its own signature is checked.  A public key
never serves as a secret: a client that knows the key could then sign tokens (RFC 8725, section 2.1).

This module is pure: bytes in, keys out.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_public_key
from jwt import PyJWK

SECRET_BYTES: Final = 32
"""The least length of a secret for HS256 (RFC 7518, section 3.2)."""
RSA_BITS: Final = 2048, 8192
"""The least size of an RSA key (RFC 7518, section 3.3), and the largest, whose signature takes 0.2 ms to check."""
MAX_KEYS: Final = 100
"""The largest number of keys in a set."""

RSA: Final = "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"
CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}
"""The algorithm of each elliptic curve (RFC 7518, section 3.4, and RFC 8812)."""
EDDSA: Final = ("EdDSA",)
HMAC: Final = ("HS256",)

_PUBLIC = b"-----BEGIN PUBLIC KEY-----", b"-----BEGIN RSA PUBLIC KEY-----"
_SSH = b"ssh-", b"ecdsa-sha2-"
_KINDS: Final = {"RSA": "RS256", "EC": None, "OKP": "EdDSA"}
"""The types of public keys, with an algorithm that makes PyJWT read one; a curve names its own."""
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "k"}


class Key(NamedTuple):
    """One key, and the algorithms that it may verify."""

    material: Any
    """A public key of `cryptography`, or the bytes of a secret."""
    algorithms: tuple[str, ...]


class Keyring:
    """The keys in force: one for all tokens, or several by their id (`kid`)."""

    def __init__(self, keys: Mapping[str | None, Key], *, by_id: bool) -> None:
        self._keys = keys
        self._by_id = by_id

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, kid: str | None) -> Key | None:
        """Return the key that a token names.  One that names none can only mean a key that is alone."""
        if len(self._keys) == 1 and (kid is None or not self._by_id):
            return next(iter(self._keys.values()))
        return self._keys.get(kid)


def read_key(data: bytes) -> Keyring:
    """Read a file that holds a public key in PEM, or else a secret for HS256.

    Raises ValueError, in words that follow the name of the file.  The secret is the content of the file without the
    newline at its end.
    """
    text = data.strip()
    if b"-----BEGIN " in text:
        return Keyring({None: _read_pem(text)}, by_id=False)
    if text.startswith(_SSH) or _is_public_der(data):
        raise ValueError("is a public key, but not in PEM: ssh-keygen -e -m pkcs8, or openssl pkey -pubin, converts it")
    if text.startswith(b"{"):
        raise ValueError("is JSON: give a key set to --jwks")
    secret = data.removesuffix(b"\n").removesuffix(b"\r")
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"holds a secret of {len(secret)} bytes: use at least {SECRET_BYTES}, as openssl rand prints")
    return Keyring({None: Key(secret, HMAC)}, by_id=False)


def _read_pem(text: bytes) -> Key:
    if b"PRIVATE KEY-----" in text:
        raise ValueError("holds a private key: give only its public one, which openssl pkey -pubout prints")
    if b"BEGIN CERTIFICATE-----" in text:
        raise ValueError("holds a certificate: give its public key, which openssl x509 -pubkey -noout prints")
    if text.count(b"-----BEGIN ") > 1:
        raise ValueError("holds several keys: give one, or a key set to --jwks")
    if not text.startswith(_PUBLIC):
        raise ValueError("is PEM, but no public key")
    try:
        material = load_pem_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("holds a public key that cannot be read") from None
    algorithms = _algorithms(material)
    if not algorithms:
        raise ValueError(f"holds a public key for no algorithm: use RSA of {RSA_BITS[0]} bits, P-256 or Ed25519")
    return Key(material, algorithms)


def _is_public_der(data: bytes) -> bool:
    try:
        load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _algorithms(material: object) -> tuple[str, ...]:
    """Return the algorithms that a public key may verify; none for a kind or a size that is not accepted."""
    least, most = RSA_BITS
    if isinstance(material, RSAPublicKey):
        return RSA if least <= material.key_size <= most else ()
    if isinstance(material, EllipticCurvePublicKey):
        algorithm = CURVES.get(material.curve.name)
        return (algorithm,) if algorithm else ()
    return EDDSA if isinstance(material, (Ed25519PublicKey, Ed448PublicKey)) else ()


def read_jwks(data: bytes) -> Keyring:
    """Read a JSON Web Key Set; raise ValueError, in words that follow the name of the set.

    Keys for another use, or of a kind that is unknown, are left out (RFC 7517, section 5).  A set that holds a secret
    or a private key is refused, because it is published.
    """
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise ValueError("is not JSON") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError("is no JSON Web Key Set")
    if len(listed) > MAX_KEYS:
        raise ValueError(f"holds more than {MAX_KEYS} keys")
    keys: dict[str | None, Key] = {}
    for one in listed:
        if one.get("kty") == "oct" or not _PRIVATE.isdisjoint(one):
            raise ValueError("holds a secret or private key, which nobody may publish: replace that key")
        key = _read_jwk(one)
        if key is None:
            continue
        kid = one.get("kid")
        if kid in keys:
            raise ValueError("holds two keys with one id")
        keys[kid] = key
    if not keys:
        raise ValueError("holds no key that can verify a token")
    return Keyring(keys, by_id=True)


def _read_jwk(one: dict[str, Any]) -> Key | None:
    """Read a key of a set, or return None for one that is not for signatures of tokens."""
    kind, kid, purposes, algorithm = one.get("kty"), one.get("kid"), one.get("key_ops", ["verify"]), one.get("alg")
    if not isinstance(kind, str) or kind not in _KINDS or not isinstance(kid, (str, type(None))):
        return None
    if one.get("use", "sig") != "sig" or not isinstance(purposes, list) or "verify" not in purposes:
        return None
    try:
        material = PyJWK({name: value for name, value in one.items() if name != "alg"}, _KINDS[kind]).key
    except Exception:  # noqa: BLE001 -- whatever a malformed key makes its parser raise, it is left out
        return None
    allowed = _algorithms(material)
    if algorithm is not None:
        allowed = (algorithm,) if algorithm in allowed else ()
    return Key(material, allowed) if allowed else None
