"""Signatures as the specification Standard Webhooks 1.0.0 defines them, with shared secrets."""

import base64
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from twisted.logger import Logger

PREFIX: Final = "whsec_"
"""Marks a secret."""
LEAST: Final = 24
"""The fewest bytes of a secret (Standard Webhooks, signature scheme)."""
MOST: Final = 64
"""The most bytes of a secret (the same section)."""
MAX_SECRETS: Final = 8
"""The most secrets of a file; a rotation needs two."""

_logger = Logger()


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Read secrets, one a line; raise ValueError with a phrase that follows the name of the file."""
    secrets = tuple(_parse(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())
    if not 1 <= len(secrets) <= MAX_SECRETS:
        raise ValueError(
            f"holds {len(secrets)} keys, and not 1 to {MAX_SECRETS}: "
            f'printf "{PREFIX}%s\\n" "$(head -c 32 /dev/urandom | base64)" makes one'
        )
    return secrets


def _parse(number: int, line: str) -> bytes:
    try:
        secret = base64.b64decode(line.removeprefix(PREFIX), validate=True)
    except ValueError:
        secret = b""
    if not line.startswith(PREFIX) or not LEAST <= len(secret) <= MOST:
        raise ValueError(f"has no key in line {number}: write {PREFIX} and {LEAST} to {MOST} bytes in base64")
    return secret


def read_secrets(path: Path) -> tuple[bytes, ...]:
    """Read a file of secrets; raise ValueError with one line."""
    try:
        return parse_secrets(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeError:
        raise ValueError(f"{path} is not text") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def sign(secrets: Sequence[bytes], webhook_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature`: one signature for each secret."""
    content = b"%b.%d.%b" % (webhook_id.encode(), timestamp, body)
    return " ".join(f"v1,{base64.b64encode(hmac.digest(secret, content, 'sha256')).decode()}" for secret in secrets)


class SigningKeys:
    """The secrets in a file.  All of them sign, so that the application may have either during a rotation.

    The constructor raises ValueError with one line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.secrets = read_secrets(path)

    def reload(self) -> None:
        """Read the file again; if that fails, keep the old secrets."""
        try:
            self.secrets = read_secrets(self._path)
        except ValueError as error:
            _logger.warn("the old keys of the webhooks stay in force: {reason}", reason=error)
        else:
            _logger.info("read {number} keys of the webhooks in {path}", number=len(self.secrets), path=self._path)
