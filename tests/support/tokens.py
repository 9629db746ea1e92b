"""Tokens, and keys that the test controls."""

import time

import jwt
from twisted.internet.defer import Deferred

from chatd.transport.keyring import Key, Keyring
from chatd.transport.tokens import Tokens

SECRET = b"a secret of at least 32 bytes, for tests"
RING = Keyring({None: Key(SECRET, ("HS256",))}, by_id=False)


def token(sub="ann", lasts=3600, secret=SECRET, **claims):
    """Sign a token; a claim of None is left out."""
    given = {"sub": sub, "exp": int(time.time()) + lasts} | claims
    return jwt.encode({name: value for name, value in given.items() if value is not None}, secret, "HS256")


class HeldKeys:
    """Keys that come when the test says so."""

    keyring = None

    def __init__(self):
        self.waiting = []

    def look(self):
        pass

    def reload(self):
        pass

    def find_more(self):
        self.waiting.append(Deferred())
        return self.waiting[-1]

    def come(self, keyring=RING):
        self.keyring = keyring
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            one.callback(None)


def verifier(keys=None, **options):
    """Return what verifies tokens, with keys that are there by default."""
    if keys is None:
        keys = HeldKeys()
        keys.come()
    return Tokens(keys, now=time.monotonic, **options)
