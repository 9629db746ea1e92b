"""The token of the admin port, from a file."""

import re
from pathlib import Path
from typing import Final

from twisted.logger import Logger

LEAST: Final = 16
"""The fewest characters of a token, so that nobody guesses it."""

# RFC 6750, section 2.1
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_logger = Logger()


def check_file(path: Path, text: str | None) -> str:
    """Find the token in the text of a file, None for an unreadable one; raise ValueError with one line."""
    option = f"--admin-token-file {path}"
    if text is None:
        raise ValueError(f"{option}: this user cannot read it: create it, or chown it")
    token = text.strip()
    if len(token) < LEAST or not _TOKEN.fullmatch(token):
        raise ValueError(
            f"{option}: it holds no token of {LEAST} letters and digits or more: "
            f"head -c 32 /dev/urandom | base64 -w 0 >{path}"
        )
    return token


def _read(path: Path) -> bytes:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeError):
        text = None
    return check_file(path, text).encode()


class AdminToken:
    """The token in a file, or none without a file.  The constructor raises ValueError."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.value = None if path is None else _read(path)

    def reload(self) -> None:
        """Read the file again; if that fails, keep the old token."""
        if self._path is None:
            return
        try:
            self.value = _read(self._path)
        except ValueError as error:
            _logger.error(  # noqa: TRY400 -- the line says it all
                "the old token of the admin port stays: {error}", error=error
            )
