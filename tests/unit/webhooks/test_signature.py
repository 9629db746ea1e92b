"""Secrets and signatures, as Standard Webhooks 1.0.0 defines them."""

import base64
import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook
from support.helpers import REPEATABLE
from twisted.logger import capturedLogs, formatEvent

from chatd.webhooks.signature import LEAST, MAX_SECRETS, MOST, SigningKeys, parse_secrets, sign


def secret(size=32, letter=b"s"):
    return f"whsec_{base64.b64encode(letter * size).decode()}"


def test_secrets_of_a_file():
    """One a line; blank lines and white space around do not count."""
    assert parse_secrets(f"\n {secret()} \r\n\n{secret(LEAST, b't')}\n") == (b"s" * 32, b"t" * LEAST)
    assert parse_secrets(secret(MOST)) == (b"s" * MOST,)
    assert len(parse_secrets("\n".join([secret()] * MAX_SECRETS))) == MAX_SECRETS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds 0 keys, and not 1 to 8"),
        ("\n".join([secret()] * 9), "holds 9 keys, and not 1 to 8"),
        (secret(LEAST - 1), "has no key in line 1"),
        (secret(MOST + 1), "has no key in line 1"),
        (f"{secret()}\nwhsec_x", "has no key in line 2"),
        (secret().removeprefix("whsec_"), "has no key in line 1"),
        (secret().replace("=", "!"), "has no key in line 1"),
    ],
)
def test_wrong_secrets(text, words):
    """The line does not repeat the secret."""
    with pytest.raises(ValueError, match=words) as refused:
        parse_secrets(text)
    assert "c3Nz" not in str(refused.value)


@REPEATABLE
@given(st.binary(min_size=LEAST, max_size=MOST), st.from_regex(r"[a-z0-9:_-]{1,90}", fullmatch=True), st.text())
def test_signature_is_that_of_the_library(key, webhook_id, body):
    """The package `standardwebhooks` computes the same signature."""
    now = 1_800_000_000
    expected = Webhook(key).sign(webhook_id, dt.datetime.fromtimestamp(now, dt.UTC), body)
    assert sign([key], webhook_id, now, body.encode()) == expected


def test_all_keys_sign():
    """The signatures are in the order of the file."""
    both = sign([b"1" * 32, b"2" * 32], "a", 1, b"")
    assert both == f"{sign([b'1' * 32], 'a', 1, b'')} {sign([b'2' * 32], 'a', 1, b'')}"


def test_reload(tmp_path):
    """A file that cannot be read leaves the old keys in force."""
    file = tmp_path / "keys"
    file.write_text(secret())
    keys = SigningKeys(file)
    for wrong in (b"whsec_", b"\xff"):
        file.write_bytes(wrong)
        with capturedLogs() as events:
            keys.reload()
        assert "stay in force" in formatEvent(events[0])
        assert keys.secrets == (b"s" * 32,)
    file.write_text(f"{secret()}\n{secret(letter=b't')}")
    keys.reload()
    assert keys.secrets == (b"s" * 32, b"t" * 32)
    file.unlink()
    keys.reload()
    assert len(keys.secrets) == 2
    with pytest.raises(ValueError, match="cannot be read"):
        SigningKeys(file)
