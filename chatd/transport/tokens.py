"""Tokens: how a request carries one, and what makes it valid.

A token is a signed JSON Web Token (RFC 7519).  A request carries it in one of three ways: the header
`Authorization: Bearer TOKEN` (RFC 6750), the subprotocol `bearer.TOKEN` beside `chat.v1`, or the cookie that
`--jwt-cookie` names.  A request that carries two different tokens is refused, so no way takes precedence.  A token in
the URL is ignored, because URLs are logged.

No token, and nothing out of a token that is refused, is in a log, an answer or an exception that leaves this module.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import jwt
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from chatd.messages import Code
from chatd.room.moderation import is_room
from chatd.transport.admission import HttpError, JoinRequest, room_pattern
from chatd.transport.frames import STANDARD, Vocabulary
from chatd.transport.framing import BEARER
from chatd.transport.identity import LEEWAY_SECONDS, AllowedRooms, Identity, Permissions
from chatd.transport.jwks import KeySource

MAX_TOKEN: Final = 8 << 10
"""The largest size of a token, in bytes, which is half of the largest request head."""
MAX_SUBJECT: Final = 255
"""The largest length of the claim `sub` (OpenID Connect Core, section 2), which is stored with each message."""
FOREVER: Final = 1 << 53
"""The latest expiry, in seconds since 1970: the claim may be an integer that no float holds."""
LOG_SECONDS: Final = 60
"""The time in which each reason for refusing tokens is logged once."""
MAX_PATTERNS: Final = 100
"""The most patterns in a list of rooms, names aside.  To compile a new one takes 16 µs of the reactor's time."""
CLAIM: Final = "chatd"
"""The claim with the permissions of a client."""

_AUTHORIZATION = re.compile(r"bearer +(.*)", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9_=-]+\.[A-Za-z0-9_=-]+\.[A-Za-z0-9_=-]+")
_WORDS: Final[Mapping[type[Exception], str]] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet: compare the clocks",
    jwt.InvalidAudienceError: "its audience is not --jwt-audience",
    jwt.InvalidIssuerError: "its issuer is not --jwt-issuer",
    jwt.InvalidAlgorithmError: "its algorithm is not that of the key",
    jwt.InvalidSignatureError: "its signature is wrong",
    jwt.MissingRequiredClaimError: "it lacks exp, sub, aud or iss",
}
"""The reasons for the log, by the exception of PyJWT.  The text of an exception may quote the token."""

_logger = Logger()


class TokenRefused(Exception):
    """A token that is not valid; the text is the reason, in fixed words."""


class Tokens:
    """Makes the identity of a client from its token.

    `audience` and `issuer` are the claims that a token must have; None: a token must have no audience, and may have
    any issuer.  `username` names the claim with the username, and `cookie` the cookie that may carry a token.

    A check takes 0.05 ms (HS256) to 0.4 ms (ES384) of CPU with a usual token, and 1 ms with one of 8 KiB that lists
    rooms by name.  New patterns add 2 ms for each list at most.  The rate limits bound how many checks there are.
    PyJWT compares the signatures of HS256 in constant time, by hmac.compare_digest.
    """

    def __init__(
        self,
        keys: KeySource,
        *,
        now: Callable[[], float],
        audience: str | None = None,
        issuer: str | None = None,
        username: str = "sub",
        cookie: str | None = None,
        vocabulary: Vocabulary = STANDARD,
    ) -> None:
        self.keys = keys
        self._now = now
        self._audience = audience
        self._issuer = issuer
        self._username = username
        self._vocabulary = vocabulary
        self.cookie = cookie
        self._quiet_until: dict[str, float] = {}

    @property
    def fault(self) -> str | None:
        """The current problem in words, or None."""
        return "no key to verify tokens" if self.keys.keyring is None else None

    def identify(
        self, authorization: str | None, cookies: str | None, protocols: Sequence[str] = ()
    ) -> "Identity | Deferred[Identity]":
        """Return the identity of the client that sent these headers and offered these subprotocols.

        Raises HttpError 401 without a valid token, and 503 while there is no key.  The Deferred, which fails with the
        same, waits for a key that the set lacks.
        """
        found = {*self._carried(authorization, cookies, protocols)}
        if not found:
            raise unauthorized("Bearer")
        if len(found) > 1:
            raise self._refused("a request carries two that differ")
        return self.verify(found.pop())

    def _carried(self, authorization: str | None, cookies: str | None, protocols: Sequence[str]) -> Iterator[str]:
        """Find every token of a request."""
        match = _AUTHORIZATION.fullmatch(authorization or "")
        if match:
            yield match[1].strip()
        yield from (name.removeprefix(BEARER) for name in protocols if name.startswith(BEARER))
        if self.cookie and cookies:
            for pair in cookies.split(";"):
                name, _, value = pair.strip(" \t").partition("=")
                if name == self.cookie:
                    yield value.strip('"')

    def verify(self, token: str) -> "Identity | Deferred[Identity]":
        """Return the identity that a token gives; raise and fail as `identify` does."""
        try:
            kid = _kid(token)
            known = self._known(token, kid)
            if known is not None:
                return known
        except TokenRefused as refused:
            raise self._refused(str(refused)) from None
        waiting = self.keys.find_more()
        if waiting is None:
            return self._again(token, kid, None)
        return waiting.addCallback(partial(self._again, token, kid))

    def _again(self, token: str, kid: str | None, _: None) -> Identity:
        """Verify a token after a search for its key."""
        if self.keys.keyring is None:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "tokens cannot be checked now", Code.UNAVAILABLE)
        try:
            known = self._known(token, kid)
        except TokenRefused as refused:
            raise self._refused(str(refused)) from None
        if known is None:
            raise self._refused("no key has its kid")
        return known

    def _known(self, token: str, kid: str | None) -> Identity | None:
        """Return the identity that a token gives; None if its key is unknown.  Raise TokenRefused."""
        keyring = self.keys.keyring
        key = None if keyring is None else keyring.find(kid)
        if key is None:
            return None
        try:
            claims = jwt.decode(
                token,
                key.material,
                key.algorithms,
                {"require": ["exp", "sub"]},
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
            )
        except Exception as error:  # noqa: BLE001 -- whatever a token makes a parser raise, it is refused
            raise TokenRefused(_WORDS.get(type(error), "it is malformed")) from None
        return self._identity(claims)

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject, username = claims["sub"], claims.get(self._username)
        if not 0 < len(subject) <= MAX_SUBJECT or not _is_unicode(subject):
            raise TokenRefused("its subject is too long or empty")
        if not isinstance(username, str) or not _is_unicode(username) or not self._vocabulary.is_username(username):
            raise TokenRefused(f"the claim of --jwt-username is no username of {self._vocabulary.usernames}")
        return Identity(
            subject, username, float(min(int(claims["exp"]), FOREVER)), read_permissions(claims.get(CLAIM, {}))
        )

    def _refused(self, reason: str) -> HttpError:
        """Make the error for a token that is not valid; its reason goes to the log only."""
        now = self._now()
        if now >= self._quiet_until.get(reason, now):
            self._quiet_until[reason] = now + LOG_SECONDS
            _logger.info("a token is refused: {reason}", reason=reason)
        return unauthorized()


def unauthorized(challenge: str = 'Bearer error="invalid_token"') -> HttpError:
    """Make the error for a request without a valid token, with the challenge of RFC 6750, section 3."""
    headers = {"WWW-Authenticate": challenge}
    return HttpError(HTTPStatus.UNAUTHORIZED, "a valid token is required", Code.TOKEN_REFUSED, headers)


def _kid(token: str) -> str | None:
    """Return the id of the key that a token names."""
    if len(token) > MAX_TOKEN:
        raise TokenRefused("it is larger than 8 KiB")
    if not _TOKEN.fullmatch(token):
        raise TokenRefused("it is malformed")
    try:
        kid: str | None = jwt.get_unverified_header(token).get("kid")
    except Exception:  # noqa: BLE001 -- as in Tokens._known
        raise TokenRefused("it is malformed") from None
    return kid


def _is_unicode(text: str) -> bool:
    """Return whether a text of JSON has no lone surrogate, which cannot be stored."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_permissions(claim: object) -> Permissions:
    """Read the claim with permissions, `{"read":[…],"post":[…],"moderate":[…]}`; raise TokenRefused if it is malformed.

    Each list has names, and patterns as `--rooms` has.  Without its list a client reads and posts everywhere, and
    moderates nothing.  An unknown key is refused, because one that is misspelt would grant everything.
    """
    if not isinstance(claim, dict) or not claim.keys() <= {*Permissions._fields}:
        raise TokenRefused("its claim chatd is malformed")
    return Permissions(**{name: _rooms(listed) for name, listed in claim.items()})


def _rooms(listed: object) -> AllowedRooms:
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise TokenRefused("its claim chatd is malformed")
    names = frozenset(one for one in listed if is_room(one))
    patterns = [one for one in listed if one not in names]
    if len(patterns) > MAX_PATTERNS:
        raise TokenRefused("its claim chatd holds too many patterns")
    try:
        return AllowedRooms(names, tuple(re.compile(room_pattern(text)) for text in patterns))
    except ValueError:
        raise TokenRefused("its claim chatd is malformed") from None


def admit(request: JoinRequest, identity: Identity) -> JoinRequest:
    """Return the request of a client with its identity; raise HttpError 403 for what its token does not permit."""
    if request.room:
        check_reading(identity, request.room)
    if request.username not in (None, identity.username):
        raise HttpError(HTTPStatus.FORBIDDEN, "the username is not that of the token", Code.FORBIDDEN)
    return request._replace(identity=identity, username=identity.username)


def check_reading(identity: Identity, room: str) -> None:
    """Raise HttpError 403 unless the client may read a room."""
    if not identity.may_read(room):
        raise HttpError(HTTPStatus.FORBIDDEN, "the token does not permit reading this room", Code.FORBIDDEN)
