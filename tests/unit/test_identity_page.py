"""The examples of docs/identity.md work with the options beside them."""

import json
import pathlib
import re
import runpy
import shlex

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from support.tokens import HeldKeys

from chatd.config import Configuration
from chatd.transport.keyring import read_jwks, read_key
from chatd.transport.tokens import Tokens

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "identity.md"
KEY = rsa.generate_private_key(65537, 2048)
FAR = 1 << 40
"""A time that has not come yet; the page has fixed ones."""


def block(marker):
    """Return the block of code behind a marker of the page."""
    return re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


def keys(keyring):
    held = HeldKeys()
    held.come(keyring)
    return held


def test_program_that_makes_a_token(tmp_path, monkeypatch, capsys):
    """The program signs a token that the server accepts with the same file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jwt.key").write_text("a secret of at least 32 bytes, in base64\n")
    (tmp_path / "make.py").write_text(block("test: token"))
    runpy.run_path("make.py")
    tokens = Tokens(keys(read_key((tmp_path / "jwt.key").read_bytes())), now=lambda: 0.0)
    found = tokens.verify(capsys.readouterr().out.strip())
    assert (found.username, found.may_post("team-a"), found.may_post("main")) == ("ann", True, False)


@pytest.mark.parametrize("provider", ["keycloak", "auth0"])
def test_claims_of_a_provider(provider):
    """Claims in the shape of a provider give an identity under the options of its section."""
    command = re.search(rf"(?s)## {provider}\n\n```sh\nscripts/serve (.*?)```", PAGE.read_text("utf-8"), re.IGNORECASE)
    settings = Configuration(shlex.split(command[1].replace("\\\n", "")), {}).settings
    claims = json.loads(block(f"claims: {provider}"))
    public = jwt.get_algorithm_by_name("RS256").to_jwk(KEY.public_key(), as_dict=True)
    found = [
        public | {"kid": "sig", "use": "sig", "alg": "RS256"},
        public | {"kid": "enc", "use": "enc", "alg": "RSA-OAEP"},
    ]
    tokens = Tokens(
        keys(read_jwks(json.dumps({"keys": found}).encode())),
        now=lambda: 0.0,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        username=settings.jwt_username,
    )
    given = {"kid": "sig", "typ": "JWT"}
    identity = tokens.verify(jwt.encode(claims | {"exp": FAR, "iat": 0}, KEY, "RS256", given))
    assert (identity.subject, identity.username) == (claims["sub"], "ann")
    assert not identity.may_moderate("main")
